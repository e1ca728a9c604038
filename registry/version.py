"""The version of the installed library."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def library_version() -> str:
    """Such as "0.1.0"; "0" in a source tree that is not installed."""
    try:
        return version("checkpoint-registry")
    except PackageNotFoundError:
        return "0"

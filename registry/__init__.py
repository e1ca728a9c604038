"""Convert, reshard, inspect and export checkpoints of large models, from declared layouts.

    import registry
    registry.convert("model/", "out/", to="megatron", parallel=registry.Parallel(tp=2, pp=2))

Importing this package imports nothing heavy: each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from registry.api import (
        architectures,
        convert,
        diff,
        explain,
        formats,
        inspect,
        open,
        plan,
        register,
        schema,
        stream,
        verify,
    )
    from registry.catalog import Codec, register_codec, register_container
    from registry.checkpoint import Checkpoint, View
    from registry.comparison import Comparison
    from registry.conversion import PlanReport, Report
    from registry.errors import (
        ArgumentError,
        CheckpointError,
        DetectionError,
        ExperimentalError,
        LayoutError,
        MappingError,
        ParallelError,
        RegistryError,
        SpecError,
        TargetError,
        UnsafePickleError,
    )
    from registry.explanation import Explanation
    from registry.inspection import Inspection
    from registry.parallel import Parallel
    from registry.storage import Rank
    from registry.training.loading import Loaded, load
    from registry.training.manager import Checkpoints
    from registry.training.retention import Retention
    from registry.training.saving import Saved, save
    from registry.verification import Verification

_HOMES = {
    "registry.api": ("architectures convert diff explain formats inspect open plan register schema stream verify"),
    "registry.catalog": "Codec register_codec register_container",
    "registry.checkpoint": "Checkpoint View",
    "registry.comparison": "Comparison",
    "registry.conversion": "PlanReport Report",
    "registry.errors": (
        "ArgumentError CheckpointError DetectionError ExperimentalError LayoutError MappingError ParallelError "
        "RegistryError SpecError TargetError UnsafePickleError"
    ),
    "registry.explanation": "Explanation",
    "registry.inspection": "Inspection",
    "registry.training.loading": "Loaded load",
    "registry.parallel": "Parallel",
    "registry.training.manager": "Checkpoints",
    "registry.training.retention": "Retention",
    "registry.training.saving": "Saved save",
    "registry.storage": "Rank",
    "registry.verification": "Verification",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "ArgumentError",
    "Checkpoint",
    "CheckpointError",
    "Checkpoints",
    "Codec",
    "Comparison",
    "DetectionError",
    "ExperimentalError",
    "Explanation",
    "Inspection",
    "LayoutError",
    "Loaded",
    "MappingError",
    "Parallel",
    "ParallelError",
    "PlanReport",
    "Rank",
    "RegistryError",
    "Report",
    "Retention",
    "Saved",
    "SpecError",
    "TargetError",
    "UnsafePickleError",
    "Verification",
    "View",
    "architectures",
    "convert",
    "diff",
    "explain",
    "formats",
    "inspect",
    "load",
    "open",
    "plan",
    "register",
    "register_codec",
    "register_container",
    "save",
    "schema",
    "stream",
    "verify",
]


if not TYPE_CHECKING:  # or any misspelt name would have a type

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            value = getattr(import_module(_HOME[name]), name)
            globals()[name] = value
            return value
        if name == "__version__":
            from registry.version import library_version

            return library_version()
        raise AttributeError(f"module 'registry' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

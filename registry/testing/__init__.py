"""The tests of the built-in formats and mappings, for others: subclass, run pytest, and get the whole battery.

    from registry.testing import FormatTests, MappingTests

    class TestMyFormat(FormatTests):
        format = "my_format"

    class TestMyModel(MappingTests):
        architecture = "my_model"

`registry.testing.strategies` draws layouts, models, parallel layouts and tensors for tests of one's own.
docs/testing.md says what each test holds a format or mapping to. Needs pytest and hypothesis, of the extra `test`.
"""

from __future__ import annotations

try:
    import hypothesis  # noqa: F401
    import pytest
except ImportError as error:
    raise ImportError(
        f"registry.testing needs pytest and hypothesis, and {error.name} is not installed: "
        "pip install 'checkpoint-registry[test]'"
    ) from error

# The assertions of these modules explain themselves, as those of a test file do.
for _module in ("comparison", "damage", "formats", "mappings"):
    pytest.register_assert_rewrite(f"registry.testing.{_module}")

from registry.testing import strategies  # noqa: E402
from registry.testing.comparison import same_bits, same_directory  # noqa: E402
from registry.testing.formats import FormatTests  # noqa: E402
from registry.testing.mappings import MappingTests  # noqa: E402
from registry.testing.models import (  # noqa: E402
    fitting_layouts,
    random_model,
    small_config,
    stored_tensors,
    transformers_model,
)

__all__ = [
    "FormatTests",
    "MappingTests",
    "fitting_layouts",
    "random_model",
    "same_bits",
    "same_directory",
    "small_config",
    "stored_tensors",
    "strategies",
    "transformers_model",
]

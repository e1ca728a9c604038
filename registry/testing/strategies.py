"""hypothesis strategies: layouts in the notation, models of a registered architecture, parallel layouts, tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from registry import catalog
from registry.errors import RegistryError
from registry.parallel import Parallel
from registry.testing.layouts import all_tensors, axes_of, layouts, show
from registry.testing.models import drawn_config, fitting_layouts, model_of, stored_tensors
from registry.testing.tensors import DTYPES, awkward_bits, random_bits, tensors

__all__ = [
    "DTYPES",
    "all_tensors",
    "architectures",
    "awkward_bits",
    "axes_of",
    "configs",
    "layouts",
    "notations",
    "parallels",
    "random_bits",
    "show",
    "tensors",
]


def notations() -> st.SearchStrategy[str]:
    """Layouts as text: `[q: group rep | k: group] head_dim`."""
    return layouts().map(show)


def architectures() -> st.SearchStrategy[str]:
    """The name of a registered architecture."""
    return st.sampled_from(catalog.names("architecture"))


@st.composite
def configs(draw: st.DrawFn, architecture: str) -> dict[str, Any]:
    """A small HuggingFace config of a registered architecture, which describes a model: also one without layers."""
    spec = catalog.architecture(architecture)
    config = drawn_config(spec, lambda _, values: draw(st.sampled_from(list(values))))
    try:
        stored_tensors(config)
    except RegistryError:
        assume(False)
    return config


@st.composite
def parallels(draw: st.DrawFn, to: str, config: Mapping[str, Any], most: int = 4) -> Parallel:
    """A parallel layout at which the format `to` can hold the model of a config, with at most `most` ranks a dimension.

    Pipeline stages are uneven as often as not, and may have no layer.
    """
    spec = catalog.format_spec(to)
    count = model_of(config).sizes.get("layer", 0)
    cut = sorted(draw(st.lists(st.integers(0, count), max_size=2)))
    stages: Sequence[int] = [b - a for a, b in pairwise([0, *cut, count])]
    vpp = draw(st.sampled_from([n for n in (1, 2, 3) if len(stages) % n == 0])) if "vpp" in spec.parallel else 1
    pp = stages if "pp" in spec.parallel else 1
    sizes = [n for n in (1, 2, 4, 8) if n <= most]
    tps = draw(st.permutations(sizes)) if "tp" in spec.parallel else [1]
    eps = draw(st.permutations(sizes)) if "ep" in spec.parallel else [1]
    tried = [Parallel(tp, pp, vpp, ep) for ep in eps for tp in tps if ep == 1 or tp % ep == 0 or ep % tp == 0]
    for layout in tried:
        if fitting_layouts(to, config, [layout]):
            return layout
    return Parallel()

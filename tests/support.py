"""What docs/support.md says: which family each format takes, how that is proven, and the layouts and quantisations.

What is taken is read from the registry and from the tables of the tests that try it, and the proofs from what those
tests are run on, so that the page cannot say more than the tests do. `python -m docs.generate` writes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from registry import catalog, expressions
from registry.parallel import Parallel
from registry.prepare import merged_options
from registry.quantization.declared import Quantizations, Scheme
from registry.specs import FormatSpec
from registry.testing.models import model_of
from tests import test_dcp, test_golden_trtllm, test_megatron_loads
from tests.conftest import HF_MODELS
from tests.families import DCP, FAMILIES, HF, LEGACY, MEGATRON, TRTLLM
from tests.goldens import packed

HEAD = """\
# What converts into what, and how that is proven

Written by `make docs` from the registry and the tests; a test fails where it is stale. Below the table of families are
the [layouts and options](#layouts-and-options) of each format, and the [quantised weights](#quantised-weights) that are
read and written.

Every family is read from and written to every format of its row, both ways: `HuggingFace -> format -> HuggingFace` is
the same directory byte for byte (tests/test_families.py), at one rank and at several tensor, pipeline and expert
parallel sizes. That alone is no proof that the format's own program reads the same model out of it. So each cell says
what else there is:

| mark | proof |
| --- | --- |
| core | megatron-core 0.16.1 loads what we write, strictly; logits as transformers' (Llama-Nemotron: as its parts') |
| golden | what Megatron's or TensorRT-LLM's own program wrote becomes the model it was made of; ours equals it |
| bridge | the same with tensors that Megatron-Bridge made |
| torch | torch.distributed.checkpoint fills transformers' own model with what we write |
| transformers | transformers loads what we write and computes the same, and its own class wrote the model |
| round trip | nothing but the way there and back: **no independent proof** |
| rounded | some tensors come back rounded or without parts, which the report says |
| - | refused: the format has no place for some of the tensors, or its program does not know the family |

"""


def proofs() -> dict[tuple[str, str], set[str]]:
    """(architecture, format) -> the independent proofs of it."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for case in packed("megatron"):
        found[case["family"], MEGATRON if case["format"] == "torch_dist" else LEGACY].add("golden")
    for case in packed("bridge"):
        found[case["family"], MEGATRON].add("bridge")
        found[case["family"], LEGACY].add("bridge")
    for name in test_golden_trtllm.FAMILIES:
        found[name, TRTLLM].add("golden")
    for case in test_megatron_loads.CASES:
        own = HF_MODELS[case.model][0] if case.model in HF_MODELS else FAMILIES[case.model].architecture
        found[own, case.format].add("core")
    for family in FAMILIES.values():
        if family.model_class is not None:
            found[family.architecture, HF].add("transformers")
    for model in test_dcp.IN_MEMORY:
        found[FAMILIES[model].architecture, DCP].add("torch")
    return found


def cell(architecture: str, to: str, known: Iterable[str]) -> str:
    """What the table says of one family in one format."""
    models = [family for family in FAMILIES.values() if family.architecture == architecture]
    taken = [family for family in models if to in family.formats]
    if not taken:
        return "-"
    marks = sorted(known) or ["round trip"]
    lossy = [family.rounded for family in taken if family.rounded and to not in (HF, DCP)]
    if any(to == TRTLLM or "positions" in glob for glob in lossy):
        marks.append("rounded")
    if len(taken) < len(models):
        marks.append("not every variant")
    return ", ".join(marks)


def _layouts() -> Iterator[str]:
    """What each format shards over, and its options."""
    yield "\n## Layouts and options\n"
    yield "| format | parallel sizes | options |\n| --- | --- | --- |"
    for name in catalog.names("format"):
        spec = catalog.format_spec(name)
        sizes = ", ".join(spec.parallel) or "-"
        options = [f"`{option}`" + (f" ({_value(each.default)})") for option, each in spec.options.items()]
        yield f"| `{name}` | {sizes} | {', '.join(options) or '-'} |"
    yield "\nIn brackets is what holds where nothing is said. `registry formats` says what each option means.\n"


def _value(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _encodings() -> Iterator[str]:
    """The encodings that are decoded on reading."""
    yield "## Quantised weights\n"
    yield "Read from a checkpoint, and decoded on the way:\n"
    yield "| format | encoding | stored as | decoded to |\n| --- | --- | --- | --- |"
    for name in catalog.names("format"):
        for encoding, each in catalog.format_spec(name).encodings.items():
            parts = {each.tensor.name: each.tensor.dtype, **{part.name: part.dtype for part in each.parts.values()}}
            stored = ", ".join(f"`{glob}` {' or '.join(_listed(dtype))}" for glob, dtype in parts.items())
            yield f"| `{name}` | `{encoding}` | {stored} | {each.dtype} |"


def _listed(dtype: Any) -> list[str]:
    return [dtype] if isinstance(dtype, str) else list(dtype)


def _schemes() -> Iterator[str]:
    """What each format quantises to, and the families that cannot have it."""
    for name in catalog.names("format"):
        spec = catalog.format_spec(name)
        if spec.quantizations is None:
            continue
        yield f"\nWritten to `{name}`, and read from it:\n"
        yield "| option | | families that it is not for |\n| --- | --- | --- |"
        for scheme, each in spec.quantizations.schemes.items():
            refused = ", ".join(f"`{family}`" for family in _refusing(name, spec, spec.quantizations, each)) or "-"
            yield f"| `{_asked(spec.quantizations, scheme)}` | {each.description} | {refused} |"
        if mixed := spec.quantizations.mixed:
            yield f"| `{spec.quantizations.option}={mixed.scheme}` | each module its own of these | as its parts |"
    yield "\n[quantization.md](quantization.md) says what is lost, and where the ranges come from.\n"


def _asked(offered: Quantizations, scheme: str) -> str:
    """How a scheme is asked for."""
    further = offered.further
    if further and scheme.startswith(further.prefix):
        return f"{further.option}={scheme.removeprefix(further.prefix)}"
    return f"{offered.option}={scheme}"


def _refusing(to: str, spec: FormatSpec, offered: Quantizations, scheme: Scheme) -> Iterator[str]:
    """The families that a format takes, but not in this quantisation: none of the tests' models of it may have it."""
    models: dict[str, list[bool]] = defaultdict(list)
    for family in FAMILIES.values():
        if to in family.formats:
            model = model_of({"model_type": family.architecture, **family.config})
            options = merged_options(spec, model.architecture, None)
            env = {**options, **model.facts, **Parallel().env(), **model.functions}
            allowed = all(expressions.parse(only.when)(env) for only in (*offered.only, *scheme.only))
            models[family.architecture].append(allowed and not (family.experts and scheme.experts == "refused"))
    yield from sorted(name for name, allowed in models.items() if not any(allowed))


def page() -> str:
    """The whole page."""
    known = proofs()
    formats = [HF, DCP, MEGATRON, LEGACY, TRTLLM]
    lines = [HEAD, f"| family | | {' | '.join(formats)} |", f"| --- | --- |{' --- |' * len(formats)}"]
    for name in catalog.names("architecture"):
        cells = [cell(name, to, known.get((name, to), ())) for to in formats]
        lines.append(f"| `{name}` | {catalog.architecture(name).description} | {' | '.join(cells)} |")
    lines += ["", f"{len(catalog.names('architecture'))} families.", *_layouts(), *_encodings(), *_schemes()]
    return "\n".join(lines)

"""Writes docs/support.md: which family each format takes, and how that is proven. `python -m tests.support`

What is taken is read from the registry and from the tables of the tests that try it, and the proofs from what those
tests are run on, so that the page cannot say more than the tests do. tests/test_support.py fails where it is stale.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from registry import catalog
from tests import test_dcp, test_golden_trtllm, test_megatron_loads
from tests.conftest import HF_MODELS
from tests.families import DCP, FAMILIES, HF, LEGACY, MEGATRON, TRTLLM
from tests.goldens import packed

PAGE = Path(__file__).resolve().parent.parent / "docs" / "support.md"

HEAD = """\
# What converts into what, and how that is proven

Written by `python -m tests.support` from the registry and the tests; `tests/test_support.py` fails where it is stale.

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


def page() -> str:
    """The whole page."""
    known = proofs()
    formats = [HF, DCP, MEGATRON, LEGACY, TRTLLM]
    lines = [HEAD, f"| family | | {' | '.join(formats)} |", f"| --- | --- |{' --- |' * len(formats)}"]
    for name in catalog.names("architecture"):
        cells = [cell(name, to, known.get((name, to), ())) for to in formats]
        lines.append(f"| `{name}` | {catalog.architecture(name).description} | {' | '.join(cells)} |")
    lines += ["", f"{len(catalog.names('architecture'))} families.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

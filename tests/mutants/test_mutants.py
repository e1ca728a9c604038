"""A few mutants of each kind, which the battery has to kill; `make mutants` tries them all."""

from __future__ import annotations

import pytest

from registry import catalog
from tests.mutants.__main__ import known
from tests.mutants.goldens import every
from tests.mutants.goldens import run as run_goldens
from tests.mutants.runner import all_mutants, run
from tests.mutants.specs import Mutant, mutants

#: (spec, kind, the rule): one of each kind that the tests of the goldens have to notice.
CHOSEN = [
    ("gpt2", "swap two parts of a sum", "transformer.h.{layer}.attn.c_attn.weight"),
    ("llama", "change an axis", "model.layers.{layer}.self_attn.q_proj.weight"),
    ("llama", "exchange names", "model.layers.{layer}.mlp.gate_proj.weight"),
    ("llama", "drop a rule", "model.norm.weight"),
    ("qwen3_moe", "drop a condition", "model.layers.{layer}.mlp.gate_proj.weight"),
    ("trtllm", "swap two parts of a sum", "transformer.layers.{layer@pp}.attention.qkv.weight"),
    ("llama", "alter a scale", "lm_head.weight"),
]


def chosen(spec: str, kind: str, where: str) -> Mutant:
    kinds = [k for k in catalog.KINDS if spec in catalog._files(k)]
    found = [m for k in kinds for m in mutants(k, spec) if m.kind == kind and m.where.startswith(where)]
    assert found, f"{spec} has no such mutant: {kind} at {where}"
    return found[0]


@pytest.mark.timeout(120)
def test_chosen_mutants_are_killed() -> None:
    left = [outcome.mutant for outcome in run([chosen(*one) for one in CHOSEN], workers=1) if outcome.by is None]
    assert not left, "survived"


def test_damaged_goldens_are_found() -> None:
    smallest = min(every(), key=lambda one: sum(f.stat().st_size for f in one.path.rglob("*") if f.is_file()))
    outcomes = list(run_goldens([smallest]))
    assert {outcome.kind for outcome in outcomes} >= {"flip a bit of a weight", "flip any bit of ours"}
    assert not [outcome.mutant for outcome in outcomes if outcome.by is None], "survived"


def test_every_excused_mutant_is_one() -> None:
    """What equivalent.yaml lists is made still: a spec that changed has other mutants."""
    specs = {pattern.pattern.partition("\\ ")[0] for pattern in known()}
    made = [str(mutant) for mutant in all_mutants(sorted(specs))]
    assert [pattern.pattern for pattern in known() if not any(pattern.fullmatch(mutant) for mutant in made)] == []

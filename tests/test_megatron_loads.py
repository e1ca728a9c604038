"""megatron-core itself, on CPU, loads what we write and computes HuggingFace's logits with it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

import registry
from tests import megatron_cpu
from tests.megatron_cpu import Job

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")

IDS = torch.arange(2 * 24).reshape(2, 24).mul(7).remainder(128)


class Case(NamedTuple):
    model: str
    format: str
    parallel: dict[str, Any]
    options: Mapping[str, Any] = MappingProxyType({})

    @property
    def id(self) -> str:
        where = " ".join(f"{k}{v}" for k, v in self.parallel.items())
        return f"{self.model} {self.format} {where}".strip() + "".join(f" {v}" for v in self.options.values())


CASES = [
    Case("llama3", "megatron", {}),
    Case("llama3", "megatron", {"tp": 2, "pp": 2}),
    Case("llama3", "megatron", {"tp": 1, "pp": [1, 3]}),
    Case("llama3", "megatron", {"tp": 2}, {"layers": "per_layer"}),
    Case("llama2", "megatron", {"tp": 4}),
    Case("llama31", "megatron", {"tp": 2}),
    Case("llama_tied", "megatron", {"tp": 2, "pp": 2}),
    Case("llama_bias", "megatron", {"tp": 2}),
    Case("mistral", "megatron", {"tp": 2, "pp": 2}),
    Case("qwen2", "megatron", {"pp": 2}),
    Case("qwen2", "megatron", {"tp": 4}),  # two query groups on four ranks
    Case("qwen3", "megatron", {"tp": 2}),
    Case("gpt2", "megatron", {"tp": 2, "pp": 2}),
    Case("llama3", "megatron-legacy", {"tp": 2, "pp": 2}),
    Case("llama3", "megatron-legacy", {"pp": 2, "vpp": 2}),
    Case("llama3", "megatron-legacy", {"tp": 2, "pp": [3, 1]}),
    Case("llama_tied", "megatron-legacy", {"tp": 2, "pp": 2}),
    Case("qwen2", "megatron-legacy", {"tp": 4}),
    Case("qwen3", "megatron-legacy", {}),
    Case("gpt2", "megatron-legacy", {"tp": 2}),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, hf_model: Callable[..., Path]) -> dict[str, Any]:
    """All cases in one launch, for importing megatron-core takes longer than the rest."""
    root = tmp_path_factory.mktemp("megatron")
    jobs = []
    for number, case in enumerate(CASES):
        target = root / str(number)
        registry.convert(
            hf_model(case.model),
            target,
            to=case.format,
            parallel=registry.Parallel(**case.parallel),
            options=case.options,
        )
        pp = case.parallel.get("pp", 1)
        stages = {"stages": tuple(pp)} if isinstance(pp, list) else {}
        jobs.append(
            Job(
                target, hf_model(case.model), tp=case.parallel.get("tp", 1), pp=len(pp) if isinstance(pp, list) else pp,
                vpp=case.parallel.get("vpp", 1), format="torch_dist" if case.format == "megatron" else "torch",
                **stages,
            )
        )  # fmt: skip
    return dict(zip((case.id for case in CASES), megatron_cpu.run(jobs, IDS, timeout=240), strict=True))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_logits_are_those_of_transformers(case: Case, outcomes: dict[str, Any], hf_model: Callable[..., Path]) -> None:
    import transformers

    found = outcomes[case.id]
    assert isinstance(found, torch.Tensor), found
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_model(case.model), attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(IDS).logits
    assert (found[..., : expected.shape[-1]] - expected).abs().max() <= 1e-5

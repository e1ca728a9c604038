"""megatron-core itself loads what we write, strictly, and computes what transformers computes of the source.

Of nemotron-nas, which transformers has no class for: what its Llama computes, put together as the config says.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import registry
from registry.source import load as open_source
from tests import megatron_cpu
from tests.conftest import HF_MODELS
from tests.families import FAMILIES, build, load, save
from tests.hub_layouts import random_like
from tests.megatron_cpu import Job, families
from tests.megatron_cpu.families import Config
from tests.megatron_cpu.reference import reference_logits

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")

IDS = torch.arange(2 * 24).reshape(2, 24).mul(7).remainder(128)


@dataclass(frozen=True)
class Case:
    model: str  # of conftest's HF_MODELS, or of tests.families
    format: str
    parallel: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)  # of the model's config, where Megatron has no choice
    edit: Callable[[Path], None] | None = None  # changes the model's directory
    mtp: int = 0
    tolerance: float = 1e-5

    def __str__(self) -> str:
        where = " ".join(f"{k}{v}" for k, v in self.parallel.items())
        changes = [*self.options.values(), *([self.edit.__name__] if self.edit else [])]
        return f"{self.model} {self.format} {where}".strip() + "".join(f" {change}" for change in changes)


def with_linear_parts(folder: Path) -> None:
    """Gives a DeciLM one matrix where layer 1 has no attention and one where layer 2 has no MLP."""
    tensors, config = load(folder)
    hidden, like = config["hidden_size"], tensors["lm_head.weight"]
    for i, part, norm, matrix in (
        (1, "attention", "input_layernorm", "self_attn.linear_attn"),
        (2, "ffn", "post_attention_layernorm", "mlp.linear_mlp"),
    ):
        assert config["block_configs"][i][part]["no_op"]
        config["block_configs"][i][part] |= {"no_op": False, "replace_with_linear": True}
        for name, shape in ((norm, (hidden,)), (matrix, (hidden, hidden))):
            key = f"model.layers.{i}.{name}.weight"
            tensors[key] = random_like(like.new_empty(shape), key)
    save(folder, tensors, config)


MEGATRON, LEGACY = "megatron", "megatron-legacy"
DENSE = [
    Case("llama3", MEGATRON),
    Case("llama3", MEGATRON, {"tp": 2, "pp": 2}),
    Case("llama3", MEGATRON, {"tp": 1, "pp": [1, 3]}),
    Case("llama3", MEGATRON, {"tp": 2}, {"layers": "per_layer"}),
    Case("llama2", MEGATRON, {"tp": 4}),
    Case("llama31", MEGATRON, {"tp": 2}),
    Case("llama_tied", MEGATRON, {"tp": 2, "pp": 2}),
    Case("llama_bias", MEGATRON, {"tp": 2}),
    Case("mistral", MEGATRON, {"tp": 2, "pp": 2}),
    Case("qwen2", MEGATRON, {"pp": 2}),
    Case("qwen2", MEGATRON, {"tp": 4}),  # two query groups on four ranks
    Case("qwen3", MEGATRON, {"tp": 2}),
    Case("gpt2", MEGATRON, {"tp": 2, "pp": 2}),
    Case("llama3", LEGACY, {"tp": 2, "pp": 2}),
    Case("llama3", LEGACY, {"pp": 2, "vpp": 2}),
    Case("llama3", LEGACY, {"tp": 2, "pp": [3, 1]}),
    Case("llama_tied", LEGACY, {"tp": 2, "pp": 2}),
    Case("qwen2", LEGACY, {"tp": 4}),
    Case("qwen3", LEGACY),
    Case("gpt2", LEGACY, {"tp": 2}),
    Case("mistral", LEGACY, {"tp": 2, "pp": 2}),
]
ENGINE = {"transformer_impl": "transformer_engine"}
SMALL_EPSILON = {"rms_norm_eps": 1e-6}  # that HuggingFace's latent norms have in any case
# HuggingFace keeps time steps from getting shorter, and Megatron has one epsilon for the norm behind the gate.
AS_MEGATRON = {"time_step_min": 1e-30, "layer_norm_epsilon": 1e-5}
ONE_GROUP = {"n_groups": 1, "layer_norm_epsilon": 1e-5}  # HuggingFace's gated norm knows no groups, Megatron's no other
ONE_RESIDUAL = {"residual_multiplier": 1.0}  # Megatron has no such multiplier
DENSE_THIRD = {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}  # which no count of dense layers says
NOISE = 3e-5  # the delta rule's float32 results are off by 1e-5 in transformers too, of those in float64
MORE = [
    Case("llama3", MEGATRON, {"tp": 2}, ENGINE),
    Case("qwen3", LEGACY, {"tp": 2, "pp": 2}, ENGINE),
    # dense variants
    Case("phi3", MEGATRON, {"tp": 2}),
    Case("phi3", LEGACY, {"tp": 2, "pp": 2}),
    Case("seed_oss", MEGATRON, {"pp": 2}),
    Case("seed_oss", LEGACY, {"tp": 2}),
    Case("smollm3", MEGATRON, {"tp": 2, "pp": 2}),
    Case("smollm3", LEGACY, {"tp": 2, "pp": 2}),
    Case("granite_tied", MEGATRON, {"tp": 2}),
    Case("granite", LEGACY, {"tp": 2, "pp": 2}, fields=ONE_RESIDUAL),
    Case("starcoder2", LEGACY, {"tp": 2, "pp": 2}),
    Case("starcoder2_tied", MEGATRON, {"tp": 2}),
    Case("stablelm", MEGATRON, {"tp": 2}),
    Case("stablelm", LEGACY, {"tp": 2}),
    Case("glm", MEGATRON, {"tp": 2}),
    Case("glm", LEGACY, {"tp": 2}),
    Case("gemma", MEGATRON, {"tp": 2, "pp": 2}, ENGINE),
    Case("gemma", LEGACY, {"tp": 2}, ENGINE),
    Case("nemotron", MEGATRON, {"tp": 2}, ENGINE),
    Case("nemotron", LEGACY, {"pp": 2}, ENGINE),
    # layers of different parts
    Case("nemotron_nas", MEGATRON, {"tp": 2}),
    Case("nemotron_nas", LEGACY, {"tp": 2}, ENGINE),
    Case("nemotron_nas", MEGATRON, edit=with_linear_parts),
    Case("nemotron_nas", MEGATRON, {"tp": 2, "pp": 2}, ENGINE, edit=with_linear_parts),
    Case("nemotron_nas", LEGACY, {"tp": 2, "pp": 2}, edit=with_linear_parts),
    Case("nemotron_nas", LEGACY, {"pp": [3, 1]}, ENGINE, edit=with_linear_parts),
    # mixtures of experts
    Case("mixtral", MEGATRON),
    Case("mixtral", MEGATRON, {"tp": 2, "ep": 2}),
    Case("mixtral", MEGATRON, {"tp": 2, "ep": 2, "pp": 2}, ENGINE),
    Case("mixtral", LEGACY, {"ep": 2, "pp": 2}),
    Case("mixtral", LEGACY, {"tp": 2, "ep": 2, "etp": 1}),
    Case("mixtral", LEGACY, {"tp": 2, "ep": 2}, ENGINE),
    Case("mixtral", LEGACY, {"ep": 4}, {**ENGINE, "expert_modules": "sequential"}),
    Case("qwen2_moe", MEGATRON, {"tp": 2}),
    Case("qwen2_moe", LEGACY, {"tp": 2, "ep": 2}, ENGINE),
    Case("qwen3_moe", MEGATRON, {"tp": 2, "ep": 4, "etp": 1}),
    Case("qwen3_moe", LEGACY, {"tp": 2, "pp": 2, "ep": 2}),
    Case("qwen3_moe_mixed", MEGATRON, {"tp": 2, "ep": 2}),
    Case("qwen3_moe_mixed", LEGACY, {"pp": 2, "ep": 2}),
    Case("granitemoe", MEGATRON, {"ep": 2}),
    Case("granitemoe", LEGACY, {"tp": 2, "ep": 2}),
    Case("glm4_moe", MEGATRON, {"tp": 2, "ep": 2}),
    Case("glm4_moe", LEGACY, {"tp": 2}, ENGINE),
    Case("glm4_moe_hub", MEGATRON, {"tp": 2, "pp": 2}, mtp=1),
    Case("gpt_oss", MEGATRON, {"tp": 2, "ep": 2, "etp": 1}),
    Case("gpt_oss", LEGACY, {"tp": 2, "ep": 2, "etp": 1}),
    Case("gpt_oss", LEGACY, {"ep": 2}, ENGINE),
    Case("gpt_oss", LEGACY, {"ep": 2}, {**ENGINE, "expert_modules": "sequential"}),
    # latent attention, which core 0.16.1 computes with Transformer-Engine's layers only
    Case("deepseek_v2", MEGATRON, {"tp": 2, "ep": 2}, ENGINE, SMALL_EPSILON),
    Case("deepseek_v2_lite", MEGATRON, {"tp": 2}, ENGINE, SMALL_EPSILON),
    Case("deepseek_v2_lite", LEGACY, {"tp": 2}, ENGINE, SMALL_EPSILON),
    Case("deepseek_v3", MEGATRON, {"tp": 2, "pp": 2}, ENGINE, SMALL_EPSILON),
    Case("deepseek_v3", LEGACY, {"tp": 2, "ep": 2}, ENGINE, SMALL_EPSILON),
    Case("deepseek_v3_hub", MEGATRON, {"tp": 2}, ENGINE, SMALL_EPSILON, mtp=1),
    Case("deepseek_v3_hub", LEGACY, {"pp": 4}, ENGINE, SMALL_EPSILON, mtp=1),
    Case("kimi_k2", MEGATRON, {"tp": 2, "ep": 2}, ENGINE, SMALL_EPSILON),
    Case("kimi_k2", LEGACY, {"tp": 2, "pp": 2}, ENGINE, SMALL_EPSILON),
    Case("glm4_moe_lite", MEGATRON, {"tp": 2, "ep": 2}, ENGINE, {**SMALL_EPSILON, **DENSE_THIRD}),
    Case("glm4_moe_lite", LEGACY, {"pp": 2}, ENGINE, {**SMALL_EPSILON, **DENSE_THIRD}),
    Case("glm4_moe_lite_hub", MEGATRON, {"tp": 2}, ENGINE, SMALL_EPSILON, mtp=1),
    # linear attention and state spaces
    Case("qwen3_next", MEGATRON, {"tp": 2, "ep": 2}, ENGINE, tolerance=NOISE),
    Case("qwen3_next", LEGACY, {"tp": 2, "pp": 2}, ENGINE, tolerance=NOISE),
    Case("qwen3_5_text", MEGATRON, {"tp": 2}, ENGINE, tolerance=NOISE),
    Case("qwen3_5_text", LEGACY, {"tp": 2}, ENGINE, tolerance=NOISE),
    Case("qwen3_5_moe_text", MEGATRON, {"tp": 2, "pp": 2}, ENGINE, tolerance=NOISE),
    Case("qwen3_5_moe_text", LEGACY, {"tp": 2, "pp": 2}, ENGINE, tolerance=NOISE),
    Case("mamba2", MEGATRON, {}, ENGINE, ONE_GROUP),
    Case("mamba2_tied", LEGACY, {"pp": 2}, ENGINE, ONE_GROUP),
    Case("nemotron_h", MEGATRON, {"tp": 2, "ep": 2}, ENGINE, AS_MEGATRON),
    Case("nemotron_h", LEGACY, {"tp": 2, "pp": 2}, ENGINE, AS_MEGATRON),
]
CASES = [*DENSE, *MORE]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, hf_model: Callable[..., Path]) -> Callable[[Case], Path]:
    """The HuggingFace directory of a case's model, made once for all cases that change it alike."""
    made: dict[str, Path] = {}

    def make(case: Case) -> Path:
        if case.model in HF_MODELS:
            return hf_model(case.model)
        key = json.dumps([case.model, case.fields, getattr(case.edit, "__name__", None)])
        if key not in made:
            family = FAMILIES[case.model]
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(FAMILIES, case.model, replace(family, config={**family.config, **case.fields}))
                made[key] = build(case.model, "float32", tmp_path_factory.mktemp(case.model) / "hf")
            if case.edit:
                case.edit(made[key])
        return made[key]

    return make


def known(case: Case) -> bool:
    return case.model in HF_MODELS or FAMILIES[case.model].architecture in registry.architectures()


def job(case: Case, folder: Path, hf: Path) -> Job:
    pp, te = case.parallel.get("pp", 1), case.options.get("transformer_impl") == "transformer_engine"
    return Job(
        folder,
        hf,
        **{**case.parallel, "pp": len(pp) if isinstance(pp, list) else pp},
        stages=tuple(pp) if isinstance(pp, list) else (),
        format="torch_dist" if case.format == MEGATRON else "torch",
        engine=te,
        grouped=te and case.options.get("expert_modules") != "sequential",
        parts=True,
        mtp=case.mtp,
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, source: Callable[[Case], Path]) -> dict[str, Any]:
    """Of all cases, logits or an error. They run together, for importing megatron-core takes longer than the rest."""
    root = tmp_path_factory.mktemp("megatron")
    found: dict[str, Any] = {}
    jobs: dict[str, Job] = {}
    for case in filter(known, CASES):
        target, name = root / str(len(found) + len(jobs)), str(case)
        try:
            registry.convert(
                source(case), target, to=case.format, parallel=registry.Parallel(**case.parallel), options=case.options
            )
            jobs[name] = job(case, target, source(case))
        except registry.RegistryError as error:
            found[name] = error
    return found | dict(zip(jobs, megatron_cpu.run(list(jobs.values()), IDS, timeout=120), strict=True))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_transformers(case: Case, outcomes: dict[str, Any], source: Callable[[Case], Path]) -> None:
    if not known(case):
        pytest.skip("no architecture spec yet")
    found = outcomes[str(case)]
    if not isinstance(found, torch.Tensor):
        pytest.fail(str(found), pytrace=False)
    expected = reference_logits(source(case), IDS)
    assert (found[..., : expected.shape[-1]] - expected).abs().max() <= case.tolerance


#: Megatron's names for them, as arguments of its training scripts.
ARGUMENTS = {"max_sequence_length": "max_position_embeddings", "num_moe_experts": "num_experts",
             "rope_scaling": "use_rope_scaling"}  # fmt: skip
#: How a number stands for a list: of so many layers, which one differs.
EVERY = {"no_rope_freq": (0, 1), "window_attn_skip_freq": (1, 0)}
#: Of these models nothing depends on the argument, or another one says it.
UNASKED = {("gpt_oss", "position_embedding_type"), ("qwen3_5_moe_text", "ffn_hidden_size"),
           ("nemotron_h", "moe_layer_freq")}  # fmt: skip
NEUTRAL = {"moe_router_topk_scaling_factor": 1.0, "add_bias_linear": False}


#: How it is computed rather than what, or said by the model's class or by other arguments.
UNWRITTEN = {
    "moe_router_load_balancing_type", "moe_router_dtype", "moe_token_dispatcher_type", "deterministic_mode",
    "max_sequence_length", "use_mamba_mem_eff_path", "hybrid_override_pattern", "softmax_scale",
    "linear_conv_kernel_dim", "kv_channels", "num_attention_heads", "gated_linear_unit",
    "share_embeddings_and_output_weights",
}  # fmt: skip


def arguments_fit(model: str, hf: Path, there: Path) -> None:
    """A checkpoint's arguments are those with which megatron-core computes right (tests/megatron_cpu/families.py)."""
    config = Config(json.loads((hf / "config.json").read_text()))
    written = open_source(there).opened.document
    for part in families.FAMILIES[config.model_type].settings(config)[:2]:
        for name, value in part.items():
            if name == "gated_linear_unit":
                assert bool(written.get("swiglu") or written.get("quick_geglu")) == value
            if name == "share_embeddings_and_output_weights":
                assert written["untie_embeddings_and_output_weights"] != value
            said = ARGUMENTS.get(name, name)
            unscaled = name == "rope_scaling_factor" and not written["use_rope_scaling"]
            unsaid = said not in written and (name in UNWRITTEN or name.startswith("yarn_"))
            if callable(value) or (model, name) in UNASKED or unscaled or unsaid:
                continue
            found = written[said]
            if name in EVERY and isinstance(found, int) and isinstance(value, list):
                usual, other = EVERY[name]
                found = [other if (i + 1) % found == 0 else usual for i in range(len(value))]
            if name == "add_qkv_bias":  # which adds to add_bias_linear
                value = value or part["add_bias_linear"]
            assert json.loads(json.dumps(value)) == (NEUTRAL.get(name) if found is None else found), name


ONCE = {case.model: case for case in reversed(CASES) if case.format == MEGATRON and known(case)}


@pytest.mark.parametrize("case", ONCE.values(), ids=str)
def test_arguments_are_those_that_megatron_has_them_computed_with(
    case: Case, source: Callable[[Case], Path], tmp_path: Path
) -> None:
    registry.convert(source(case), tmp_path / "there", to=case.format, options=case.options, durable=False)
    arguments_fit(case.model, source(case), tmp_path / "there")

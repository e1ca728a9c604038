"""Every built-in architecture through the tests that a third party's gets, on tiny models of its own classes.

And what those tests do not ask: Transformer-Engine's names in bfloat16, and that transformers computes the same.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import registry
from registry import Parallel, catalog
from registry.testing import MappingTests, same_directory
from tests.families import DCP, FAMILIES, HF, LEGACY, MEGATRON, TRTLLM, build, load

# A file of every rank is one more way to go wrong, so those formats get the layouts with more of them.
LAYOUTS = {
    HF: [Parallel()],
    DCP: [Parallel()],
    MEGATRON: [Parallel(), Parallel(tp=2, pp=2)],
    LEGACY: [Parallel(tp=2), Parallel(tp=2, pp=2)],
    TRTLLM: [Parallel(), Parallel(tp=2), Parallel(tp=2, pp=2)],
}
EXPERT_LAYOUTS = {
    MEGATRON: [Parallel(tp=2, ep=2)],
    LEGACY: [Parallel(ep=2), Parallel(tp=2, pp=2, ep=4, etp=1)],
    TRTLLM: [Parallel(tp=2, ep=2)],
}
#: One of each kind of layout that transformers 5 fuses in memory and unfuses in files, or the other way round.
RUN = ["mixtral", "qwen3_next", "gpt_oss", "deepseek_v2_lite", "falcon_40b", "phi3", "bloom_hub", "granitemoe", "olmo2",
       "mamba2", "bert", "t5"]  # fmt: skip


@pytest.fixture(scope="session")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`family_model(name, dtype="float32")`: the directory of a tiny model, made once in a session: only read it."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, dtype: str = "float32") -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = build(name, dtype, tmp_path_factory.mktemp(f"{name}-{dtype}") / "hf")
        return made[name, dtype]

    return make


def came_back(name: str, source: Path, there: registry.Report, back: Path, to: str) -> None:
    """`back` is `source`, but for copies and buffers, which may be missing, and what is said to be rounded."""
    rounded = FAMILIES[name].rounded
    if rounded and (to == TRTLLM or ("positions" in rounded and to not in (HF, DCP))):
        assert any("offset" in note or "leaves" in note for note in there.notes)
        (expected, _), (found, _) = load(source), load(back)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            if fnmatch.fnmatch(key, rounded) and "positions" in key:
                assert torch.equal(found[key][2:], tensor[2:]) and not found[key][:2].any()
            else:
                atol = 2e-7 if fnmatch.fnmatch(key, rounded) else 0
                assert torch.allclose(found[key], tensor, rtol=0, atol=atol), key
        return
    if not FAMILIES[name].dropped:
        assert not there.left_out
        same_directory(source, back)
        return
    (expected, config), (found, config_back) = load(source), load(back)
    dropped = {key for key in expected if any(fnmatch.fnmatch(key, glob) for glob in FAMILIES[name].dropped)}
    assert dropped
    assert there.left_out.keys() <= dropped
    assert expected.keys() - dropped <= found.keys() <= expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in found)
    assert config_back == config


#: Rules that no model here calls for.
UNCALLED = {
    "bert": {"cls.predictions.decoder.weight": "a copy of the embedding, which transformers 5 does not save"},
    "glm4_moe": {"model.layers.{mtp+layers}.mlp.*_proj.weight": "the further layer has experts in every release"},
    "glm4_moe_lite": {"model.layers.{mtp+layers}.mlp.*_proj.weight": "the further layer has experts in every release"},
    "gpt_oss": {"*_blocks": "MXFP4, which tests/test_encoding.py reads"},
    "nemotron-nas": {
        "*.bias": "no release has biases",
        "*.linear_*.weight": "tests/test_megatron_loads.py gives models such parts",
    },
    "opt": {"lm_head.weight": "every release ties it"},
    "qwen3_next": {
        "*.mlp.experts.*_proj": "how transformers 5 holds experts in memory; tests/test_dcp.py has them",
        "*.mlp.*_proj.weight": "every layer has experts in every release",
    },
}


class BuiltIn(MappingTests):
    """The battery on the models of one architecture."""

    layouts: ClassVar = {to: [*LAYOUTS[to], *EXPERT_LAYOUTS.get(to, [])] for to in LAYOUTS}

    def takes(self, name: str) -> Sequence[str]:
        return FAMILIES[name].formats

    @pytest.fixture(autouse=True)
    def _made(self, family_model: Callable[..., Path]) -> None:
        self.family_model = family_model

    def directory(self, name: str, factory: pytest.TempPathFactory) -> Path:
        return self.family_model(name)

    def came_back(self, name: str, source: Path, back: Path, report: registry.Report) -> None:
        came_back(name, source, report, back, report.target_format)


def battery(architecture: str) -> type[BuiltIn]:
    """The class for one architecture."""
    models = {name: family for name, family in FAMILIES.items() if family.architecture == architecture}
    configs = {name: {"model_type": architecture, **family.config} for name, family in models.items()}
    return type(
        architecture,
        (BuiltIn,),
        {"architecture": architecture, "configs": configs, "uncalled": UNCALLED.get(architecture, {})},
    )


globals().update({f"Test_{name}": battery(name) for name in registry.architectures()})


@pytest.mark.parametrize("to", [MEGATRON, LEGACY])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if MEGATRON in family.formats])
def test_transformer_engine_names_in_bfloat16(
    name: str, to: str, tmp_path: Path, family_model: Callable[..., Path]
) -> None:
    source = family_model(name, "bfloat16")
    options = {"transformer_impl": "transformer_engine"}
    parallel = Parallel(tp=2, pp=[1, 3])
    report = registry.convert(source, tmp_path / "there", to=to, parallel=parallel, options=options, durable=False)
    registry.convert(tmp_path / "there", tmp_path / "back", to=HF, durable=False)
    came_back(name, source, report, tmp_path / "back", to)


def outputs(name: str, folder: Path) -> torch.Tensor:
    """What transformers computes with a directory, every weight of which it must know and find."""
    import transformers

    model_class = getattr(transformers, str(FAMILIES[name].model_class))
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    extra = ("model.layers.4.*", *FAMILIES[name].dropped)  # multi-token prediction, which its classes leave out
    assert not [key for key in info["unexpected_keys"] if not any(fnmatch.fnmatch(key, glob) for glob in extra)]
    ids = {"input_ids": torch.arange(24).reshape(2, 12)}
    if model_class.__name__.startswith("T5"):
        ids["decoder_input_ids"] = ids["input_ids"] + 3
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**ids)[0]
    assert found.isfinite().all()
    return found


@pytest.mark.parametrize("name", RUN)
def test_transformers_computes_the_same(name: str, tmp_path: Path, family_model: Callable[..., Path]) -> None:
    source = family_model(name)
    to = next(to for to in (LEGACY, TRTLLM, HF) if to in FAMILIES[name].formats)
    parallel = Parallel(tp=2, pp=2) if to != HF else None
    registry.convert(source, tmp_path / "there", to=to, parallel=parallel, durable=False)
    options = {"shard_size": "100KB"}
    registry.convert(tmp_path / "there", tmp_path / "back", to=HF, options=options, durable=False)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert torch.equal(outputs(name, source), outputs(name, tmp_path / "back"))


# Gemma 3's text class does not read the package, nor DeepSeek's Kimi's config; T5's output matrix was its embedding.
HUB = [name for name, family in FAMILIES.items() if family.hub and name not in ("gemma3_hub", "kimi_k2", "t5_untied")]


@pytest.mark.parametrize("layout", HUB)
def test_the_published_layouts_are_those_that_transformers_reads(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family_model: Callable[..., Path]
) -> None:
    """A check of tests/hub_layouts.py: rewritten or not, it is the same model."""
    published = outputs(layout, family_model(layout))
    monkeypatch.setitem(FAMILIES, layout, dataclasses.replace(FAMILIES[layout], hub=None))
    assert torch.equal(published, outputs(layout, build(layout, "float32", tmp_path / "saved")))


def keeps_values(architecture: str) -> None:
    """Logical tensors have HuggingFace's values and types: where a format has others, its own rules say so."""
    for pattern, rule in catalog.architecture(architecture).rules():
        said = (rule.scale, rule.offset, rule.codec, rule.dtype, rule.pad, rule.cast_first, rule.shape)
        assert said == (1.0, "0", None, None, {}, "false", None), pattern
        assert not rule.parsed.sharded_over() and "@" not in pattern, f"{pattern}: HuggingFace's files are whole"


@pytest.mark.parametrize("architecture", registry.architectures())
def test_logical_values_are_huggingfaces(architecture: str) -> None:
    keeps_values(architecture)


@pytest.mark.parametrize("architecture", registry.architectures())
def test_every_architecture_has_a_model(architecture: str) -> None:
    assert architecture in {family.architecture for family in FAMILIES.values()}

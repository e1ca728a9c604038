"""Every built-in format through `registry.testing.FormatTests`; every ordered pair of formats, and casts on the way."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import registry
from registry import Parallel
from registry.testing import FormatTests, same_directory
from tests.conftest import HF_MODELS

FORMATS = ["huggingface", "dcp", "megatron", "megatron-legacy", "trtllm"]
LAYOUTS = [
    Parallel(),
    Parallel(tp=2, pp=2),
    Parallel(tp=8),
    Parallel(tp=2, pp=[1, 3]),
    Parallel(tp=4, pp=4),
]


# Every built-in format through the tests that a third party's gets, on these models.


def _config(name: str) -> dict[str, Any]:
    model_type, fields = HF_MODELS[name]
    return {"model_type": model_type, **fields}


class TestHuggingface(FormatTests):
    format = "huggingface"
    architectures: ClassVar = {name: _config(name) for name in ("llama3", "gpt2")}


class TestDcp(FormatTests):
    format = "dcp"
    architectures: ClassVar = {name: _config(name) for name in HF_MODELS}


class TestMegatron(FormatTests):
    format = "megatron"
    architectures: ClassVar = {name: _config(name) for name in HF_MODELS}
    layouts = LAYOUTS


class TestMegatronLegacy(FormatTests):
    format = "megatron-legacy"
    architectures: ClassVar = {name: _config(name) for name in HF_MODELS}
    layouts = LAYOUTS


class TestTrtllm(FormatTests):
    format = "trtllm"
    architectures: ClassVar = {name: _config(name) for name in HF_MODELS}
    layouts = LAYOUTS


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(FORMATS, 2)))
def test_any_to_any(first: str, second: str, tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    source = hf_model("qwen2", "bfloat16")
    registry.convert(source, tmp_path / "a", to=first, parallel=Parallel(tp=2, pp=2))
    registry.convert(tmp_path / "a", tmp_path / "b", to=second, parallel=Parallel(tp=4, pp=[3, 1]))
    assert registry.verify(tmp_path / "b", source)
    registry.convert(tmp_path / "b", tmp_path / "back", to="huggingface")
    same_directory(source, tmp_path / "back")


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("vpp", [2, 4])
def test_virtual_stages(to: str, vpp: int, tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    if to == "trtllm":
        with pytest.raises(registry.ArgumentError, match=r"vpp|virtual"):
            registry.convert(hf_model("llama3"), tmp_path / "a", to=to, parallel=Parallel(pp=[1] * 4, vpp=vpp))
        return
    registry.convert(hf_model("llama3"), tmp_path / "a", to=to, parallel=Parallel(pp=4 // vpp, vpp=vpp))
    assert registry.verify(tmp_path / "a", hf_model("llama3"))


def test_cast_on_the_way(tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    source = hf_model("llama3")
    for to in FORMATS:
        registry.convert(source, tmp_path / to, to=to, parallel=Parallel(tp=2), dtype=torch.bfloat16)
        registry.convert(tmp_path / to, tmp_path / f"{to}-back", to="huggingface")
        back = load_file(tmp_path / f"{to}-back/model.safetensors")
        for name, tensor in load_file(source / "model.safetensors").items():
            assert torch.equal(back[name], tensor.to(torch.bfloat16)), name
        config = json.loads((tmp_path / f"{to}-back/config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


@pytest.mark.parametrize("name", HF_MODELS)
def test_transformers_loads_what_comes_back(name: str, tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    import transformers

    source = hf_model(name)
    registry.convert(source, tmp_path / "there", to="megatron-legacy", parallel=Parallel(tp=2, pp=2))
    registry.convert(tmp_path / "there", tmp_path / "back", to="huggingface", options={"shard_size": "100KB"})
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    ids = torch.arange(24).reshape(2, 12) % 100
    models = [transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, tmp_path / "back")]
    with torch.no_grad():
        a, b = (model(ids).logits for model in models)
    assert torch.equal(a, b)


def test_gpt2_without_its_prefix_comes_back_without_it(tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    """The files of GPT-2's first release lack `transformer.`, and carry causal masks, which are no weights."""
    tensors = load_file(hf_model("gpt2") / "model.safetensors")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((hf_model("gpt2") / "config.json").read_bytes())
    weights = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file({**weights, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, bare / "model.safetensors", {"format": "pt"})
    report = registry.convert(bare, tmp_path / "m", to="megatron", parallel=Parallel(tp=2))
    assert report.left_out == {"h.0.attn.bias": "the causal mask, not a weight"}
    registry.convert(tmp_path / "m", tmp_path / "back", to="huggingface")
    found = load_file(tmp_path / "back/model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)

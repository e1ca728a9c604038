"""Directories from before safetensors: pytorch_model.bin, whole and in shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import registry

State = dict[str, torch.Tensor]


def pickled(source: Path, target: Path, shards: int = 1) -> tuple[Path, State]:
    """The model of a directory as torch saves its state dict: ties share a storage, and have two names."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    state: State = model.state_dict()
    target.mkdir()
    shutil.copy(source / "config.json", target)
    if shards == 1:
        torch.save(state, target / "pytorch_model.bin")
        return target, state
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    for i, name in enumerate(names):
        torch.save(dict(list(state.items())[i::shards]), target / name)
    weights = {key: names[i % shards] for i, key in enumerate(state)}
    index = {"metadata": {"total_size": 1}, "weight_map": weights}  # what they count there differs with their versions
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target, state


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["llama3", "llama_tied", "gpt2"])
def test_they_become_safetensors(name: str, shards: int, hf_model: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_model(name)
    old, state = pickled(source, tmp_path / "old", shards)
    registry.convert(old, tmp_path / "new", to="huggingface")
    written = load_file(tmp_path / "new/model.safetensors")
    assert written.keys() >= load_file(source / "model.safetensors").keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in written.items())
    tokens = torch.arange(12)[None]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval() for path in (source, tmp_path / "new")]
    one, other = (model(tokens).logits for model in models)
    assert torch.equal(one, other)
    assert registry.diff(source, old).equal


def test_they_go_to_megatron(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_model("llama3")
    old, _ = pickled(source, tmp_path / "old", 2)
    registry.convert(old, tmp_path / "there", to="megatron", parallel=registry.Parallel(tp=2))
    assert registry.diff(tmp_path / "there", source).equal


def test_a_tensor_that_is_stored_transposed(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    old, state = pickled(hf_model("llama3"), tmp_path / "old")
    name = "model.layers.0.mlp.down_proj.weight"
    torch.save({**state, name: state[name].t().contiguous().t()}, old / "pytorch_model.bin")
    registry.convert(old, tmp_path / "new", to="huggingface")
    assert torch.equal(load_file(tmp_path / "new/model.safetensors")[name], state[name])


REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "a dictionary of names to tensors": ({"model": {"w": torch.zeros(2)}}, {}),
    "no state dict": ([torch.zeros(2)], {}),
    "before version 1.6": ({"w": torch.zeros(2)}, {"_use_new_zipfile_serialization": False}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_other_pickles_are_refused(said: str, hf_model: Callable[..., Path], tmp_path: Path) -> None:
    old, _ = pickled(hf_model("llama3"), tmp_path / "old")
    content, how = REFUSED[said]
    torch.save(content, old / "pytorch_model.bin", **how)
    with pytest.raises(registry.CheckpointError, match=said):
        registry.open(old)


def test_shards_without_their_index(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    old, _ = pickled(hf_model("llama3"), tmp_path / "old", 2)
    (old / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(registry.CheckpointError, match="index of the shards is missing"):
        registry.open(old)


def test_safetensors_go_first(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_model("llama3")
    old, _ = pickled(source, tmp_path / "old")
    shutil.copy(source / "model.safetensors", old)
    (old / "pytorch_model.bin").write_bytes(b"not read")
    assert registry.diff(source, old).equal

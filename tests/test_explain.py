"""explain() says where elements lie: each claim is checked by reading both elements with the real formats' readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import registry
from registry import Parallel
from registry.explanation import Explanation

TP2 = Parallel(tp=2)


def hub(path: Path) -> dict[Any, torch.Tensor]:
    return {(None, name): t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def trtllm(path: Path) -> dict[Any, torch.Tensor]:
    return {
        (rank, name): t for rank in (0, 1) for name, t in load_file(path / f"rank{rank}.safetensors").items()
    }  # fmt: skip


def legacy(path: Path) -> dict[Any, torch.Tensor]:
    return {
        (rank, name): t
        for rank in (0, 1)
        for name, t in torch.load(
            path / f"release/mp_rank_0{rank}/model_optim_rng.pt", weights_only=False
        )["model"].items()
        if isinstance(t, torch.Tensor)
    }  # fmt: skip


READ: dict[str, Callable[[Path], dict[Any, torch.Tensor]]] = {
    "huggingface": hub, "trtllm": trtllm, "megatron-legacy": legacy,
}  # fmt: skip


def key(name: str, rank: dict[str, int] | None) -> Any:
    return (None if rank is None else rank["tp"], name)


@pytest.mark.parametrize("model", ["llama3", "gpt2", "qwen2_tied"])
@pytest.mark.parametrize("to", ["trtllm", "megatron-legacy"])
def test_the_elements_that_are_named_are_equal(
    model: str, to: str, hf_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = hf_model(model)
    registry.convert(source, tmp_path / "out", to=to, parallel=TP2)
    ours, theirs = hub(source), READ[to](tmp_path / "out")
    for name in {name for _, name in theirs}:
        found = registry.explain(source, name, to=to, parallel=TP2)
        there = [one for one in found.stored if one.format == to]
        assert {key(one.name, one.rank) for one in there} == {k for k in theirs if k[1] == name}
        for one in there:
            stored = theirs[key(one.name, one.rank)]
            assert tuple(stored.shape) == one.shape and one.parts
            count = 0
            for part in one.parts:
                assert part.places
                for place in part.places:
                    first = part.first if place.box == part.box else None
                    size = torch.Size([hi - lo for lo, hi in place.box.values()]).numel()
                    count += size
                    if first is not None:
                        assert stored[first] == ours[None, place.name][place.first], (name, part)
            assert count == stored.numel() or not stored.flatten()[count:].any()  # rows that pad the vocabulary
    for _, name in ours:
        [one] = [o for o in registry.explain(source, name, to=to, parallel=TP2).stored if o.format == "huggingface"]
        for part in one.parts:
            for place in part.places:
                if all(lo == part.box[axis][0] for axis, (lo, _) in place.box.items()):
                    other = theirs[key(place.name, place.rank)]
                    assert other[place.first] == ours[None, name][part.first]


def test_a_stacked_checkpoint_in_its_own_terms(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_model("llama3")
    registry.convert(source, tmp_path / "out", to="megatron", parallel=TP2)
    found = registry.explain(tmp_path / "out", "mlp.up.weight.3")
    assert [one.name for one in found.stored] == ["decoder.layers.mlp.linear_fc1.weight"] * 2
    assert [one.parts[0].box["layer"] for one in found.stored] == [(3, 4)] * 2
    up = hub(source)[None, "model.layers.3.mlp.up_proj.weight"]
    for one in found.stored:
        assert one.file and one.begin
        low, high = one.parts[0].box["ffn"]
        data = (tmp_path / "out/release" / one.file).read_bytes()[one.begin :][: up[low:high].numel() * 4]
        assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32).view(high - low, -1), up[low:high])


def test_text_and_json(hf_model: Callable[..., Path]) -> None:
    found = registry.explain(hf_model("llama3"), "decoder.layers.0.mlp.linear_fc1.weight", to="megatron-legacy")
    assert isinstance(found, Explanation)
    text = str(found)
    assert "[mlp.gate.weight: ffn@tp | mlp.up.weight: ffn@tp] hidden" in text
    assert "holds   mlp.up.weight  layer 0, ffn 0..159, hidden 0..63  from element [160, 0]" in text
    assert "model.layers.0.mlp.up_proj.weight  from element [0, 0]" in text
    assert json.loads(json.dumps(found.as_dict()))["stored"][0]["parts"][1]["box"]["ffn"] == [0, 160]


@pytest.mark.parametrize("name", ["mlp.down", "model.layers.0.mlp.up_proj", "mlp.up.weight.99", "mlp.up.weight.x", ""])
def test_a_tensor_that_is_not_there(name: str, hf_model: Callable[..., Path]) -> None:
    with pytest.raises(registry.MappingError, match="there is no tensor") as error:
        registry.explain(hf_model("llama3"), name)
    assert error.value.hint
    with pytest.raises(registry.ArgumentError, match="known format"):
        registry.explain(hf_model("llama3"), "mlp.up.weight", to="nothing")

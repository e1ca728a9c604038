"""diff(): what differs between two checkpoints is found, counted and placed, whatever their formats."""

from __future__ import annotations

import json
import math
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import registry
from registry import Parallel, comparison
from registry.cli import main

Models = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def changed(source: Path, target: Path, change: Callable[[Tensors], None], **config: object) -> Path:
    """A copy of a HuggingFace model with other tensors, and other fields in its config."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    fields = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(fields))
    return target


@pytest.mark.parametrize(
    ("to", "parallel"),
    [
        ("megatron", Parallel(tp=2, pp=2)),
        ("megatron-legacy", Parallel(tp=2)),
        ("trtllm", Parallel(tp=2)),
        ("dcp", None),
    ],
)
def test_formats_and_layouts_are_no_difference(
    to: str, parallel: Parallel | None, hf_model: Models, tmp_path: Path
) -> None:
    registry.convert(hf_model("llama3"), tmp_path / "x", to=to, parallel=parallel)
    found = registry.diff(hf_model("llama3"), tmp_path / "x")
    assert found.equal and found.tensors == 39 and not found.facts and not found.differences
    assert (found.a.format, found.b.format) == ("huggingface", to)
    assert str(found).startswith("equal: 39 logical tensors, bit for bit")
    assert found.equal == bool(registry.verify(hf_model("llama3"), tmp_path / "x"))


def test_one_value_is_counted_and_placed(hf_model: Models, tmp_path: Path) -> None:
    def change(t: Tensors) -> None:
        t["model.layers.2.mlp.up_proj.weight"][17, 5] += 0.5
        t["model.layers.2.mlp.up_proj.weight"][3, 4] -= 0.25

    other = changed(hf_model("llama3"), tmp_path / "other", change)
    registry.convert(other, tmp_path / "x", to="megatron", parallel=Parallel(tp=2))
    old = load_file(hf_model("llama3") / "model.safetensors")["model.layers.2.mlp.up_proj.weight"][17, 5].item()
    new = load_file(other / "model.safetensors")["model.layers.2.mlp.up_proj.weight"][17, 5].item()
    found = registry.diff(hf_model("llama3"), tmp_path / "x")
    (one,) = found.differences
    assert not found.equal and one.tensor == "mlp.up.weight.2" and one.values is not None
    assert (one.values.count, one.values.of, one.values.at) == (2, 160 * 64, (17, 5))
    assert (one.values.a, one.values.b, one.values.largest) == (old, new, abs(old - new))
    assert "mlp.up.weight.2: float32 [160, 64]; 2 of 10,240 elements differ" in str(found)


def test_a_stretch_is_a_stretch_of_the_whole(hf_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(t: Tensors) -> None:
        t["model.embed_tokens.weight"][[0, 60, 130], [0, 30, 63]] += torch.tensor([0.25, 2.0, 0.5])

    other = changed(hf_model("llama3"), tmp_path / "other", change)
    whole = registry.diff(hf_model("llama3"), other)
    monkeypatch.setattr(comparison, "_STRETCH", 7)
    monkeypatch.setattr(comparison, "_PART", 3)
    assert registry.diff(hf_model("llama3"), other).differences == whole.differences
    assert whole.differences[0].values is not None
    assert (whole.differences[0].values.count, whole.differences[0].values.at) == (3, (60, 30))


def test_other_types_are_compared_by_value(hf_model: Models, tmp_path: Path) -> None:
    registry.convert(hf_model("llama3"), tmp_path / "half", to="trtllm", dtype="bfloat16")
    found = registry.diff(hf_model("llama3"), tmp_path / "half")
    assert len(found.differences) == 39
    tensors = load_file(hf_model("llama3") / "model.safetensors")
    lost = (tensors["lm_head.weight"].double() - tensors["lm_head.weight"].bfloat16().double()).abs()
    one = next(one for one in found.differences if one.tensor == "output.weight")
    assert one.problem == "float32 [131, 64] against bfloat16 [131, 64]" and one.values is not None
    assert (one.values.count, one.values.largest) == (int((lost > 0).sum()), lost.max().item())
    registry.convert(tmp_path / "half", tmp_path / "wide", to="huggingface", dtype="float32")
    again = registry.diff(tmp_path / "half", tmp_path / "wide")
    assert not again.equal and all(one.values and not one.values.count for one in again.differences)
    assert "the values are equal" in str(again)


def test_nan_zeros_and_infinity(hf_model: Models, tmp_path: Path) -> None:
    name = "model.norm.weight"

    def base(t: Tensors) -> None:
        t[name][:4] = torch.tensor([float("nan"), 0.0, float("inf"), 1.0])

    def other(t: Tensors) -> None:
        t[name][:4] = torch.tensor([float("nan"), -0.0, float("inf"), 1.0])

    def worse(t: Tensors) -> None:
        t[name][:4] = torch.tensor([float("nan"), 0.0, float("inf"), float("nan")])

    a = changed(hf_model("llama3"), tmp_path / "a", base)
    assert registry.diff(a, a).equal
    signs = registry.diff(a, changed(hf_model("llama3"), tmp_path / "b", other)).differences[0].values
    assert signs is not None and (signs.count, signs.largest, signs.at) == (1, 0.0, (1,))
    lost = registry.diff(a, changed(hf_model("llama3"), tmp_path / "c", worse)).differences[0].values
    assert lost is not None and (lost.count, lost.at, lost.a) == (1, (3,), 1.0)
    assert math.isnan(lost.largest) and math.isnan(lost.b)


def test_facts_shapes_and_tensors_of_one_side(hf_model: Models) -> None:
    found = registry.diff(hf_model("llama_tied"), hf_model("qwen2"))
    assert found.facts["kv_heads"] == (4, 2) and found.facts["tied_embeddings"] == (True, False)
    problems = {one.tensor: one.problem for one in found.differences}
    assert problems["attention.k.weight.0"] == "float32 [4, 8, 64] against float32 [2, 8, 64]"
    assert problems["output.weight"] == "only in the second"
    assert problems["attention.q.bias.3"] == "only in the second"
    said = str(found)
    assert "architecture  llama against qwen2" in said and "kv_heads is 4 against 2" in said
    assert "attention.q.bias.{0..3}: only in the second" in said


def test_a_side_that_carries_no_config_need_not_be_the_other_s_model(hf_model: Models, tmp_path: Path) -> None:
    registry.convert(hf_model("qwen2"), tmp_path / "bare", to="megatron")
    for carried in ("registry.json", "config.json"):
        for path in (tmp_path / "bare").rglob(carried):
            path.unlink()
    found = registry.diff(hf_model("llama3"), tmp_path / "bare")
    assert (found.b.architecture, found.facts["kv_heads"]) == ("qwen2", (4, 2))


def test_a_fact_alone_is_a_difference(hf_model: Models, tmp_path: Path) -> None:
    other = changed(hf_model("llama3"), tmp_path / "other", lambda t: None, rms_norm_eps=1e-6)
    found = registry.diff(hf_model("llama3"), other)
    assert not found.equal and not found.differences and found.facts == {"norm_epsilon": (1e-5, 1e-6)}
    assert registry.verify(hf_model("llama3"), other)  # which asks of the tensors alone, and notes the rest


def test_the_command(hf_model: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = str(hf_model("llama3"))
    other = changed(hf_model("llama3"), tmp_path / "b", lambda t: t["model.norm.weight"].add_(1.0))
    assert main(["diff", a, a]) == 0
    capsys.readouterr()
    assert main(["diff", a, str(other), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["equal"], said["tensors"]) == (False, 39)
    assert said["differences"][0]["values"]["count"] == 64
    assert main(["diff", a, str(other), "--quiet"]) == 1
    assert capsys.readouterr().out == ""


def test_progress_counts_every_byte_of_both(hf_model: Models, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    registry.convert(hf_model("llama3"), tmp_path / "x", to="trtllm", dtype="bfloat16")
    size = sum(t.nbytes for t in load_file(hf_model("llama3") / "model.safetensors").values())
    registry.diff(hf_model("llama3"), tmp_path / "x", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (size + size // 2, size + size // 2)
    del seen[:]
    assert registry.verify(tmp_path / "x", progress=lambda done, total: seen.append((done, total)))
    assert seen and all(done <= total for done, total in seen) and seen[-1][0] > size // 2
    del seen[:]
    registry.verify(hf_model("llama3"), tmp_path / "x", progress=lambda done, total: seen.append((done, total)))
    assert seen and all(done <= total for done, total in seen)


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 64, "num_hidden_layers": 1,
        "vocab_size": 12000, "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    own, layer = {"hidden": 2048, "ffn": 64}, "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (12000, 2048), "model.norm.weight": (2048,),
        f"{layer}.input_layernorm.weight": (2048,), f"{layer}.post_attention_layernorm.weight": (2048,),
        **{f"{layer}.self_attn.{p}_proj.weight": (2048, 2048) for p in "qkvo"},
        **{f"{layer}.mlp.{p}_proj.weight": (own["ffn"], own["hidden"]) for p in ("gate", "up")},
        f"{layer}.mlp.down_proj.weight": (2048, 64),
    }  # fmt: skip
    for name, value in (("a", 1.0), ("b", 1.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file({n: torch.full(shape, value) for n, shape in shapes.items()}, tmp_path / name / "model.safetensors")
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    registry.diff(tmp_path / "a", tmp_path / "a")  # what is imported and made once
    tracemalloc.start()
    found = registry.diff(tmp_path / "a", tmp_path / "b")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(one.values and one.values.largest == 0.5 for one in found.differences)
    assert size > 150 << 20 and peak < size / 2

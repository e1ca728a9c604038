"""The public surface: open, view, stream, plan, inspect, register, schema."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import registry
from registry import Parallel, Rank


@pytest.fixture(scope="module")
def llama(hf_model: Callable[..., Path]) -> Path:
    return hf_model("llama3")


@pytest.fixture(scope="module")
def megatron(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("api") / "megatron"
    registry.convert(llama, target, to="megatron", parallel=Parallel(tp=2, pp=2))
    return target


def test_open_is_lazy_and_knows_all(megatron: Path, llama: Path) -> None:
    found = registry.open(megatron)
    assert (found.format, found.architecture, found.iteration) == ("megatron", "llama", None)
    assert found.parallel == Parallel(tp=2, pp=2)
    assert found.config == json.loads((llama / "config.json").read_text())
    assert found.shapes["decoder.layers.mlp.linear_fc1.weight"] == (4, 320, 64)
    assert set(found.names) == set(found.shapes)
    assert found.tensors["attention.q.weight"] == (4, 4, 2, 8, 64)
    assert "parameters" in repr(found)


def test_view_gives_any_tensor_in_any_terms(megatron: Path, llama: Path) -> None:
    view = registry.open(megatron).view("huggingface")
    expected = load_file(llama / "model.safetensors")
    assert set(view) == set(expected)
    assert len(view) == len(expected)
    for name, tensor in expected.items():
        assert view.shape(name) == tuple(tensor.shape)
        assert view.dtype(name) == "float32"
        assert torch.equal(view[name], tensor)
    with pytest.raises(KeyError):
        view["model.layers.99.mlp.up_proj.weight"]


def test_view_of_stacked_layers_and_of_one_rank(megatron: Path, llama: Path) -> None:
    expected = load_file(llama / "model.safetensors")
    stacked = registry.open(llama).view("megatron")["decoder.layers.mlp.linear_fc2.weight"]
    for layer in range(4):
        assert torch.equal(stacked[layer], expected[f"model.layers.{layer}.mlp.down_proj.weight"])
    ranks = [
        registry.open(megatron).view("trtllm", parallel=Parallel(tp=2, pp=2), rank=Rank(tp=tp, pp=1)) for tp in (0, 1)
    ]
    parts = [view["transformer.layers.1.mlp.proj.weight"] for view in ranks]
    assert torch.equal(torch.cat(parts, 1), expected["model.layers.3.mlp.down_proj.weight"])


def test_view_at_tp_shows_whole_tensors(llama: Path, megatron: Path) -> None:
    one = registry.open(llama).view("megatron", options={"make_vocab_size_divisible_by": 128})
    two = registry.open(llama).view("megatron", parallel=Parallel(tp=2))
    for name in one:
        if "embedding" not in name and "output_layer" not in name:
            assert torch.equal(one[name], two[name]), name


def test_stream_gives_every_tensor_once(megatron: Path, llama: Path) -> None:
    streamed = list(registry.stream(megatron, to="huggingface", dtype=torch.float16))
    expected = load_file(llama / "model.safetensors")
    assert sorted(name for name, _ in streamed) == sorted(expected)
    for name, tensor in streamed:
        assert torch.equal(tensor, expected[name].half())


def test_a_stream_reads_ahead_within_bounds(megatron: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = registry.View.__getitem__

    def counted(view: registry.View, name: str) -> torch.Tensor:
        read.append(name)
        return plain(view, name)

    monkeypatch.setattr(registry.View, "__getitem__", counted)
    monkeypatch.setattr("registry.checkpoint._AHEAD", 100_000)
    names, sizes = [], {}
    for name, tensor in registry.stream(megatron):
        names.append(name)
        sizes[name] = tensor.nbytes
        ahead = [other for other in read if other not in names]
        assert sum(sizes.get(other, 0) for other in ahead) <= 100_000
    assert sorted(read) == sorted(names) == sorted(registry.open(megatron).view("huggingface"))
    assert max(sizes.values()) < 100_000 < sum(sizes.values())
    for size in (0, 1):  # a tensor that is larger than all that may be held is read too
        monkeypatch.setattr("registry.checkpoint._AHEAD", size)
        assert [name for name, _ in registry.stream(megatron)] == names


def test_a_stream_that_is_left_reads_no_more(megatron: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    stream = registry.stream(megatron)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_a_transformers_model_is_filled_in_place(megatron: Path, llama: Path) -> None:
    import transformers

    config = transformers.LlamaConfig.from_dict(registry.open(megatron).config)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    registry.load(megatron, model=model, names="huggingface", random_states=False)
    assert before == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    expected = load_file(llama / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def test_streamed_tensors_fill_a_live_model(megatron: Path, llama: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(llama))
    model.load_state_dict(dict(registry.stream(megatron)), strict=True)
    expected = transformers.AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, expected.eval()(ids).logits)


def test_plan_says_what_convert_does(megatron: Path, tmp_path: Path) -> None:
    planned = registry.plan(megatron, to="trtllm", parallel=Parallel(tp=2))
    assert not list(tmp_path.iterdir())
    done = registry.convert(megatron, tmp_path / "t", to="trtllm", parallel=Parallel(tp=2))
    there = [p for p in (tmp_path / "t").rglob("*") if p.is_file() and p.name != ".registry-manifest.json"]
    sizes = {str(p.relative_to(tmp_path / "t")): p.stat().st_size for p in there}
    assert planned.files == sizes
    assert planned.report.nbytes == done.nbytes == sum(size for name, size in sizes.items() if name.endswith("tensors"))
    assert json.loads(json.dumps(planned.as_dict()))["copy_groups"]
    assert "rank1.safetensors" in str(planned)


def test_inspect_sums_up(megatron: Path, llama: Path) -> None:
    found = registry.inspect(megatron)
    elements = sum(t.numel() for t in load_file(llama / "model.safetensors").values())
    assert found.parameters == elements
    assert found.parallel == "tp2 pp2"
    assert json.loads(json.dumps(found.as_dict()))["architecture"] == "llama"
    assert "layers stacked" in str(found)


def test_names_of_formats_and_architectures() -> None:
    assert registry.formats() == ["dcp", "huggingface", "megatron", "megatron-legacy", "trtllm"]
    assert {"gpt2", "llama", "mistral", "qwen2", "qwen3"} <= set(registry.architectures())


def test_register_makes_a_family_convertible(llama: Path, tmp_path: Path) -> None:
    spec = {"kind": "architecture", "name": "mine", "extends": "llama", "config": {"constants": {"model_type": "mine"}}}
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((llama / "config.json").read_text()) | {"model_type": "mine"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(registry.DetectionError, match="mine"):
        registry.open(model)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(spec))
    assert registry.register(path) == "mine"
    assert "mine" in registry.architectures()
    registry.convert(model, tmp_path / "m", to="megatron", parallel=Parallel(tp=2))
    assert registry.open(tmp_path / "m").architecture == "mine"
    registry.convert(tmp_path / "m", tmp_path / "back", to="huggingface")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_affine_and_codec_rules(llama: Path, tmp_path: Path) -> None:
    """A family whose norms are stored minus one, and whose down projection through a codec, in one spec."""
    registry.register_codec(registry.Codec("negated", encode=torch.neg, decode=torch.neg))
    registry.register(
        {
            "kind": "architecture", "name": "odd", "extends": "llama",
            "config": {"constants": {"model_type": "odd"}},
            "tensors": {
                "model.norm.weight": {"layout": "final_norm.weight: hidden", "offset": -1.0},
                "model.layers.{layer}.mlp.down_proj.weight": {
                    "layout": "mlp.down.weight: hidden ffn",
                    "codec": "negated",
                },
                "model.layers.{layer}.mlp.up_proj.weight": {"layout": "mlp.up.weight: ffn hidden", "scale": 2.0},
            },
        }
    )  # fmt: skip
    tensors = load_file(llama / "model.safetensors")
    stored = dict(registry.stream(llama, to="megatron", architecture="odd"))
    assert torch.equal(stored["decoder.final_layernorm.weight"], tensors["model.norm.weight"] + 1)
    down = torch.stack([tensors[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(4)])
    assert torch.equal(stored["decoder.layers.mlp.linear_fc2.weight"], -down)
    up = torch.stack([tensors[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(4)])
    assert torch.equal(stored["decoder.layers.mlp.linear_fc1.weight"][:, 160:], up / 2)
    registry.convert(llama, tmp_path / "m", to="megatron", architecture="odd")
    back = dict(registry.stream(tmp_path / "m", architecture="odd"))
    assert torch.equal(back["model.layers.2.mlp.down_proj.weight"], tensors["model.layers.2.mlp.down_proj.weight"])
    assert torch.equal(back["model.norm.weight"], (tensors["model.norm.weight"] + 1) - 1)


def test_a_format_that_cannot_name_a_family_is_refused_for_it(llama: Path, tmp_path: Path) -> None:
    registry.register({"kind": "architecture", "name": "nameless", "extends": "llama", "formats": None})
    with pytest.raises(registry.MappingError, match="trtllm does not know the architecture nameless"):
        registry.convert(llama, tmp_path / "t", to="trtllm", architecture="nameless")
    registry.convert(llama, tmp_path / "m", to="megatron", architecture="nameless")


def test_unknown_codec_is_an_error_at_registration() -> None:
    with pytest.raises(registry.SpecError, match="no_such_codec"):
        registry.register(
            {"kind": "architecture", "name": "x", "extends": "llama",
             "tensors": {"model.norm.weight": {"layout": "final_norm.weight: hidden", "codec": "no_such_codec"}}}
        )  # fmt: skip


def test_schema_describes_both_kinds() -> None:
    schema = registry.schema()
    assert {"ArchitectureSpec", "FormatSpec", "Rule"} <= set(schema["$defs"])
    json.dumps(schema)


def test_arguments_are_checked_all_at_once(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(registry.ArgumentError) as caught:
        registry.convert(llama, "", to="no_such_format", threads=0, parallel=3)  # type: ignore[arg-type]
    text = str(caught.value)
    assert all(word in text for word in ("target", "to", "threads", "parallel"))


def test_options_are_checked(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(registry.ArgumentError) as caught:
        registry.convert(llama, tmp_path / "x", to="megatron", options={"layers": "sideways", "no_such": 1})
    assert "layers" in str(caught.value)
    assert "no_such" in str(caught.value)
    assert not (tmp_path / "x").exists()

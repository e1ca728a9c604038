"""HF -> X -> HF is the same files, for every X and layout; and every ordered pair of formats, on random models."""

from __future__ import annotations

import filecmp
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import registry
from registry import Parallel
from tests.conftest import HF_MODELS

FORMATS = ["huggingface", "dcp", "megatron", "megatron-legacy", "trtllm"]
LAYOUTS = [
    Parallel(),
    Parallel(tp=2, pp=2),
    Parallel(tp=8),
    Parallel(tp=2, pp=[1, 3]),
    Parallel(tp=4, pp=4),
]


def same_directory(a: Path, b: Path) -> None:
    """Same names, same bytes."""
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for path in a.iterdir():
        assert filecmp.cmp(path, b / path.name, shallow=False), path.name


@pytest.mark.parametrize("name", HF_MODELS)
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
@pytest.mark.parametrize("to", FORMATS[1:])
def test_there_and_back_is_the_same_directory(
    name: str, parallel: Parallel, to: str, tmp_path: Path, hf_model: Callable[..., Path]
) -> None:
    source = hf_model(name, max_shard_size="200KB") if to == "megatron" else hf_model(name)
    registry.convert(source, tmp_path / "there", to=to, parallel=parallel)
    registry.convert(tmp_path / "there", tmp_path / "back", to="huggingface")
    same_directory(source, tmp_path / "back")


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


# Random models, layouts and pairs of formats. The tensors hold random bytes, NaNs with payloads among them.

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool]


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    group, rep = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3]))
    heads, head_dim = group * rep, draw(st.sampled_from([2, 4, 6]))
    layers, hidden = draw(st.sampled_from([0, 1, 2, 4, 5])), draw(st.integers(1, 9))
    ffn, vocab = 4 * draw(st.integers(1, 3)), draw(st.integers(1, 19))
    tied, bias, mlp_bias = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    config = {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": group, "head_dim": head_dim, "intermediate_size": ffn, "vocab_size": vocab,
        "tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": mlp_bias,
        "unknown_field": {"ünïcode": [1, None]},
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    q, kv = heads * head_dim, group * head_dim
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {
            f"{p}input_layernorm.weight": (hidden,), f"{p}post_attention_layernorm.weight": (hidden,),
            f"{p}self_attn.q_proj.weight": (q, hidden), f"{p}self_attn.k_proj.weight": (kv, hidden),
            f"{p}self_attn.v_proj.weight": (kv, hidden), f"{p}self_attn.o_proj.weight": (hidden, q),
            f"{p}mlp.gate_proj.weight": (ffn, hidden), f"{p}mlp.up_proj.weight": (ffn, hidden),
            f"{p}mlp.down_proj.weight": (hidden, ffn),
        }  # fmt: skip
        if bias:
            shapes |= {f"{p}self_attn.q_proj.bias": (q,), f"{p}self_attn.k_proj.bias": (kv,)}
            shapes |= {f"{p}self_attn.v_proj.bias": (kv,), f"{p}self_attn.o_proj.bias": (hidden,)}
        if mlp_bias:
            shapes |= {
                f"{p}mlp.gate_proj.bias": (ffn,),
                f"{p}mlp.up_proj.bias": (ffn,),
                f"{p}mlp.down_proj.bias": (hidden,),
            }
    return config, shapes


def fitting(draw: st.DrawFn, config: dict[str, Any], to: str) -> Parallel:
    """A layout that the format can hold of this model."""
    group, rep = config["num_key_value_heads"], config["num_attention_heads"] // config["num_key_value_heads"]
    rows = group * (rep + 2) * config["head_dim"]
    sizes = [
        n for n in (1, 2, 4)
        if config["intermediate_size"] % n == 0 and (group * rep) % n == 0 and (group % n == 0 or n % group == 0)
        and rows % n == 0
    ]  # fmt: skip
    layers = config["num_hidden_layers"]
    cut = sorted(draw(st.lists(st.integers(0, layers), max_size=2)))
    counts = [b - a for a, b in itertools.pairwise([0, *cut, layers])]
    vpp = draw(st.sampled_from([n for n in (1, 2, 3) if len(counts) % n == 0])) if to != "trtllm" else 1
    return Parallel(tp=draw(st.sampled_from(sizes)), pp=counts, vpp=vpp)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_random_models_through_random_formats(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    config, shapes = data.draw(models())
    dtype = data.draw(st.sampled_from(DTYPES))
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    root = tmp_path_factory.mktemp("random")
    tensors = {}
    for name, shape in shapes.items():
        raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        tensors[name] = (raw.view(dtype) if dtype != torch.bool else raw % 2 == 1).reshape(shape)
    source = root / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(config, ensure_ascii=False))
    (source / "tokenizer ünï.json").write_bytes(b"\x00\xff")
    path = source
    for step in range(data.draw(st.integers(1, 3))):
        to = data.draw(st.sampled_from(FORMATS))
        parallel = fitting(data.draw, config, to)
        padding = {"make_vocab_size_divisible_by": data.draw(st.sampled_from([1, 8, 128]))} if "meg" in to else {}
        threads = data.draw(st.sampled_from([1, 2]))
        registry.convert(path, root / str(step), to=to, parallel=parallel, options=padding, threads=threads)
        path = root / str(step)
        assert registry.verify(path, source)
    registry.convert(path, root / "back", to="huggingface")
    same_directory(source, root / "back")


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

"""The format: the battery of the registry, and what other programs write and read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar

import gguf
import numpy as np
import pytest
import torch

import registry
from registry.errors import CheckpointError, MappingError, ParallelError
from registry.testing import FormatTests, random_model, same_directory, small_config, transformers_model

GOLDEN = Path(__file__).parent / "golden"
Q8_0 = {"quantization": "Q8_0"}
#: Sizes that blocks of 32 columns divide.
SIZES = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 19, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}


class TestGguf(FormatTests):
    """F32; the other types keep norms in F32, as llama.cpp does, and are tried below."""

    format = "gguf"
    architectures: ClassVar = {name: small_config(name) for name in ("llama", "mixtral")}
    dtypes = ("float32",)
    flips = 3


def tensors(file: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def same_tensors(ours: Path, theirs: Path) -> None:
    """Every tensor of the same name, type, shape and bytes."""
    found, expected = tensors(ours), tensors(theirs)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].tensor_type, found[name].shape.tolist()) == (tensor.tensor_type, tensor.shape.tolist())
        assert found[name].data.tobytes() == tensor.data.tobytes(), name


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3"])
def test_it_is_what_llama_cpp_makes_of_the_same_model(name: str, kind: str, tmp_path: Path) -> None:
    registry.convert(GOLDEN / name, tmp_path / "out", to="gguf", options=Q8_0 if kind == "q8_0" else {})
    theirs = GOLDEN / f"{name}-{kind}.gguf"
    same_tensors(tmp_path / "out" / "model.gguf", theirs)
    found, expected = (gguf.GGUFReader(file).fields for file in (tmp_path / "out" / "model.gguf", theirs))
    ours = {key: (field.types, field.contents()) for key, field in found.items() if not key.startswith("GGUF.")}
    said = {key: (field.types, field.contents()) for key, field in expected.items() if not key.startswith("GGUF.")}
    # What names the file, which is named after a directory.
    assert set(said) - set(ours) == {"general.name", "general.size_label"}
    assert {key: ours[key] for key in said if key in ours} == {key: said[key] for key in said if key in ours}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_file_of_llama_cpp_alone_is_read(name: str, tmp_path: Path) -> None:
    """No config, no manifest: the metadata say all, and the weights are those that it was made of."""
    (tmp_path / "in").mkdir()
    shutil.copy(GOLDEN / f"{name}-f16.gguf", tmp_path / "in" / "any-name.gguf")
    assert registry.open(tmp_path / "in").architecture == name
    registry.convert(tmp_path / "in", tmp_path / "out", to="huggingface", dtype="float16")
    assert registry.verify(tmp_path / "out", GOLDEN / name)


def test_transformers_computes_the_same(tmp_path: Path) -> None:
    """transformers reads GGUF with code of its own: not a bit of the logits differs."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF only where accelerate is installed")
    from transformers import AutoModelForCausalLM

    transformers_model(LLAMA, tmp_path / "hf")
    registry.convert(tmp_path / "hf", tmp_path / "out", to="gguf")
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf")(tokens).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types_come_back(dtype: str, tmp_path: Path) -> None:
    """Norms are kept in F32 as llama.cpp wants them, and come back in the type that they had."""
    transformers_model(LLAMA, tmp_path / "hf", dtype)
    registry.convert(tmp_path / "hf", tmp_path / "out", to="gguf")
    kinds = {tensor.tensor_type.name for tensor in tensors(tmp_path / "out" / "model.gguf").values()}
    assert kinds == {"F32", {"float16": "F16", "bfloat16": "BF16"}[dtype]}
    registry.convert(tmp_path / "out", tmp_path / "back", to="huggingface")
    same_directory(tmp_path / "hf", tmp_path / "back")


def test_q8_0_is_that_of_the_gguf_package_both_ways() -> None:
    """Blocks of zeros, of one value, of halves to be rounded and of numbers too small for a scale among them."""
    values = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 4, 64)[:, None]
    values[0], values[1] = 0, 1
    values[2] = torch.arange(32) * 0.5 * 127 / 15.5
    from registry_gguf.blocks import decode, encode

    kind = gguf.GGMLQuantizationType.Q8_0
    with np.errstate(divide="ignore"):
        expected = gguf.quants.quantize(values.numpy(), kind)
    assert np.array_equal(encode(values).numpy(), expected)
    assert np.array_equal(decode(torch.from_numpy(expected)).numpy(), gguf.quants.dequantize(expected, kind))


def test_q8_0_is_read_as_what_it_stands_for(tmp_path: Path) -> None:
    transformers_model(LLAMA, tmp_path / "hf")
    report = registry.convert(tmp_path / "hf", tmp_path / "out", to="gguf", options=Q8_0)
    name = "blk.1.ffn_down.weight"
    stored = tensors(tmp_path / "out" / "model.gguf")[name]
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    found = dict(registry.stream(tmp_path / "out"))["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(found, expected)
    plain = dict(registry.stream(tmp_path / "hf"))["model.layers.1.mlp.down_proj.weight"]
    assert report.losses[name.removesuffix(".weight")].max == pytest.approx(float((plain - found).abs().max()))


def test_excluded_weights_stay_as_they_are(tmp_path: Path) -> None:
    options = {**Q8_0, "exclude_modules": "output,*.attn_v"}
    registry.convert(GOLDEN / "llama", tmp_path / "out", to="gguf", options=options)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(tmp_path / "out" / "model.gguf").items()}
    assert {name for name, kind in kinds.items() if kind == "F16"} == {
        "output.weight", "blk.0.attn_v.weight", "blk.1.attn_v.weight",
    }  # fmt: skip


def test_what_it_cannot_do_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    random_model({**LLAMA, "intermediate_size": 80}, tmp_path / "odd")
    with pytest.raises(ParallelError, match=r"blk\.\*\.ffn_down.weight: 80 columns on 1 ranks in groups of 32"):
        registry.convert(tmp_path / "odd", tmp_path / "out", to="gguf", options=Q8_0)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    random_model({**LLAMA, "rope_scaling": scaling}, tmp_path / "scaled")
    with pytest.raises(MappingError, match="rotary frequencies"):
        registry.convert(tmp_path / "scaled", tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def test_other_quantizations_are_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 144), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"Q4_K is not read(.|\n)*token_embd.weight"):
        registry.open(tmp_path)

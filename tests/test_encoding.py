"""Weights in an encoding are read as the plain tensors that they stand for, whatever is read of them and how."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import registry
from registry import Parallel, assemble, catalog, computed, decoding, encoding
from registry.errors import CheckpointError, MappingError, SpecError
from registry.files import SourceFiles
from registry.source import load
from registry.storage import Opened, Piece

FP8 = torch.float8_e4m3fn


def save(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config or {"quantization_config": {}}))
    return folder


class Decoded:
    """A directory of tensors, opened and decoded."""

    def __init__(self, folder: Path) -> None:
        spec = catalog.format_spec("huggingface")
        self.opened: Opened = catalog.container("huggingface").open(folder, "huggingface")
        self.config = decoding.decode(self.opened, spec, self.opened.hub_config)
        self.pieces: dict[str, Piece] = {piece.name: piece for piece in self.opened.pieces}
        self.files = SourceFiles(self.opened.files)

    def bytes(self, name: str, offset: int, count: int) -> bytes:
        buffer = bytearray(count)
        self.files.read_into(self.pieces[name].file, self.pieces[name].begin + offset, memoryview(buffer))
        return bytes(buffer)

    def tensor(self, name: str) -> torch.Tensor:
        piece = self.pieces[name]
        raw = torch.frombuffer(bytearray(self.bytes(name, 0, math.prod(piece.shape) * 2)), dtype=torch.bfloat16)
        assert piece.dtype == "bfloat16"
        return raw.view(piece.shape)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same bits, but for what a NaN carries: torch's own depends on where in a vector it stands."""
    bits = [torch.where(t.isnan(), torch.nan, t).view(torch.int16) for t in (found, expected)]
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(*bits)


def any_bytes(shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, tuple(shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def scales_of(shape: Sequence[int], block: Sequence[int], seed: int = 0) -> torch.Tensor:
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return torch.randn(grid, generator=torch.Generator().manual_seed(seed)) * 0.01


def times_scales(weight: torch.Tensor, scale: torch.Tensor, block: Sequence[int] = (128, 128)) -> torch.Tensor:
    """DeepSeek-V3's formula, with the last blocks cut: every value times the scale of its block."""
    rows, columns = weight.shape[-2:]
    each = scale.float().repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return (weight.float() * each).to(torch.bfloat16)


# The values, against the code that these files are made and read with.


@given(
    st.lists(st.integers(1, 3), max_size=2), st.integers(1, 300), st.integers(1, 300),
    st.sampled_from([None, [128, 128], [64, 96], [7, 5], [1, 1], [500, 500]]), st.data(),
)  # fmt: skip
def test_scaled_blocks(
    tmp_path_factory: pytest.TempPathFactory, lead: list[int], rows: int, columns: int, block: list[int] | None,
    data: st.DataObject,
) -> None:  # fmt: skip
    shape = (*lead, rows, columns)
    weight, scale = any_bytes(shape).view(FP8), scales_of(shape, block or (128, 128))
    config = {"quantization_config": {"quant_method": "fp8"} | ({"weight_block_size": block} if block else {})}
    tensors = {"w.weight": weight, "w.weight_scale_inv": scale, "norm.weight": torch.ones(3)}
    decoded = Decoded(save(tmp_path_factory.mktemp("fp8"), tensors, config))
    assert decoded.pieces.keys() == {"w.weight", "norm.weight"} and decoded.pieces["w.weight"].shape == shape
    whole = decoded.tensor("w.weight")
    assert same(whole, times_scales(weight, scale, block or (128, 128)))
    raw = whole.view(torch.uint8).numpy().tobytes()
    for _ in range(5):
        begin = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(begin, len(raw)))
        assert decoded.bytes("w.weight", begin, end - begin) == raw[begin:end]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)], ids=str)
def test_scaled_blocks_as_transformers_has_them(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = any_bytes(shape).view(FP8), scales_of(shape, (128, 128)).abs().to(dtype)
    name = "experts.gate_up_proj" if len(shape) == 3 else "w.weight"
    found = Decoded(save(tmp_path, {name: weight, f"{name}_scale_inv": scale})).tensor(name)
    assert same(found, Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16))


def test_scales_that_are_not_finite_and_products_that_overflow(tmp_path: Path) -> None:
    weight = any_bytes((130, 600)).view(FP8)
    scale = torch.tensor([[math.nan, math.inf, -math.inf, 1e38, 0.0], [1e-38, 1e-45, -1e-40, 3e36, -0.0]])
    assert same(Decoded(save(tmp_path, {"a": weight, "a_scale_inv": scale})).tensor("a"), times_scales(weight, scale))


@pytest.mark.parametrize("shape", [(2, 6, 90), (1, 256, 3), (4, 1, 1)], ids=str)
def test_mxfp4_as_transformers_has_it(tmp_path: Path, shape: tuple[int, ...]) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = any_bytes((*shape, 16))
    # Every power there is; what transformers makes of byte 255, which is none, depends on the version of torch.
    scales = torch.arange(math.prod(shape)).remainder(255).to(torch.uint8).view(shape)
    found = Decoded(save(tmp_path, {"up_blocks": blocks, "up_scales": scales})).tensor("up_blocks")
    assert same(found, convert_moe_packed_tensors(blocks, scales).transpose(1, 2).contiguous())


def test_every_nan_is_the_same_one(tmp_path: Path) -> None:
    """Or two readings of a checkpoint would differ where they cut it differently."""
    weight = torch.full((3, 1000), 0xFF, dtype=torch.uint8).view(FP8)
    folder = save(tmp_path, {"a": weight, "a_scale_inv": torch.ones(1, 8)})
    assert set(Decoded(folder).tensor("a").view(torch.int16).flatten().tolist()) == {0x7FC0}


# What is read of them, and how.


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], int, tuple[int, ...], tuple[int, ...]]:
    """(shape, offset, size, stride) of a box in a tensor whose dimensions are each cut into nested axes."""
    shape, offset, axes, step = [], 0, [], 1
    for _ in range(draw(st.integers(1, 3))):
        length = 1
        for _ in range(draw(st.integers(1, 2))):
            n = draw(st.integers(1, 7))
            low = draw(st.integers(0, n - 1))
            offset += low * step
            axes.append((draw(st.integers(1, n - low)), step))
            length, step = length * n, step * n
        if not shape:  # the last dimension of MXFP4 is whole blocks
            length, step = length * 32, step * 32
        shape.insert(0, length)
    order = draw(st.permutations(axes))
    return tuple(shape), offset, tuple(n for n, _ in order), tuple(s for _, s in order)


@given(boxes(), st.sampled_from([1, 17, 300, 1 << 20]), st.sampled_from([1, 50, 1 << 17]), st.sampled_from([1, 4, 1e9]))
def test_any_strided_box(
    tmp_path_factory: pytest.TempPathFactory, box: Any, window: int, step: int, dense: float
) -> None:
    shape, offset, size, stride = box
    tensors = {"up_blocks": any_bytes((*shape[:-1], shape[-1] // 32, 16)), "up_scales": any_bytes(
        (*shape[:-1], shape[-1] // 32), 1)}  # fmt: skip
    if len(shape) > 1:
        tensors |= {"w": any_bytes(shape).view(FP8), "w_scale_inv": scales_of(shape, (3, 5))}
    config = {"quantization_config": {"weight_block_size": [3, 5]}}
    decoded = Decoded(save(tmp_path_factory.mktemp("boxes"), tensors, config))
    for name, piece in decoded.pieces.items():
        expected = torch.as_strided(decoded.tensor(name), size, stride, offset).contiguous().view(torch.int16)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(computed, "_WINDOW", window)
            patch.setattr(computed, "_STEP", step)
            patch.setattr(decoding, "_DENSE", dense)
            found = assemble.box(decoded.files, piece.file, 2, size, stride, offset * 2)
        assert np.array_equal(found.view(np.int16), expected.numpy())


EXPERTS = {
    "kind": "architecture", "name": "toy", "axes": {"expert": "experts", "ffn": "ffn", "hidden": "hidden"},
    "config": {"facts": {"experts": "experts", "ffn": "ffn", "hidden": "hidden"}},
    "tensors": {"experts.up_blocks": "expert (ffn [gate: | up:]) hidden"},
}  # fmt: skip
TURNED = {
    "kind": "format", "name": "turned", "container": "turned",
    "tensors": {"gate.{expert}": "gate: ffn hidden", "up": "up: expert hidden ffn"},
}  # fmt: skip


@pytest.mark.parametrize("size", [(2, 24, 96), (3, 1500, 1440)], ids=str)
def test_nothing_is_decoded_many_times_over(tmp_path: Path, size: tuple[int, int, int]) -> None:
    """Interleaved rows, and rows that become columns: each is decoded about once. The codec here is a user's own."""
    counts = []

    class Counted(encoding.Mxfp4):
        def decode(self, read: Any, rows: Any, begin: int, end: int) -> torch.Tensor:
            counts.append(len(rows) * (end // -32 * -32 - begin // 32 * 32))
            return super().decode(read, rows, begin, end)

    class Turned(type(catalog.container("huggingface"))):  # type: ignore[misc]
        def detect(self, path: Path) -> bool:
            return False

    experts, ffn, hidden = size
    grid = (experts, 2 * ffn, hidden // 32)
    config = {"model_type": "toy", "experts": experts, "ffn": ffn, "hidden": hidden}
    tensors = {"experts.up_blocks": any_bytes((*grid, 16)), "experts.up_scales": any_bytes(grid, 1) % 200}
    source = save(tmp_path / "source", tensors, config)
    expected = Decoded(source).tensor("experts.up_blocks").view(experts, ffn, 2, hidden).view(torch.int16)

    registry.register_container("turned", Turned())
    for spec in (EXPERTS, TURNED):
        registry.register(spec)
    encodings = {"mxfp4": {"codec": "counted"}}
    registry.register({"kind": "format", "name": "huggingface", "extends": "huggingface", "encodings": encodings})
    with pytest.raises(SpecError, match="unknown codec 'counted' of an encoding"):
        registry.open(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_codecs", dict(encoding._codecs))
        encoding.register_encoding_codec("counted", Counted)
        opened = registry.open(source)
        registry.convert(source, tmp_path / "out", to="turned", threads=2)
    assert sum(counts) <= 1.2 * expected.numel()
    assert opened.shapes == {"experts.up_blocks": (experts, 2 * ffn, hidden)}
    for found in (load_file(tmp_path / "out/model.safetensors"), opened.view("turned")):
        assert torch.equal(found["up"].view(torch.int16), expected[:, :, 1].transpose(1, 2))
        for i in range(experts):
            assert torch.equal(found[f"gate.{i}"].view(torch.int16), expected[i, :, 0])
    assert sum(counts) <= 2.4 * expected.numel()


LARGE = """
import resource, sys
from pathlib import Path
from registry import assemble, catalog, decoding
from registry.files import SourceFiles

opened = catalog.container("huggingface").open(Path(sys.argv[1]), "huggingface")
decoding.decode(opened, catalog.format_spec("huggingface"), opened.hub_config)
files = SourceFiles(opened.files)
buffer = memoryview(bytearray(64 << 20))

def read(piece, buffer):
    rows, width = piece.shape[0] * piece.shape[1] if len(piece.shape) == 3 else piece.shape[0], piece.shape[-1]
    for k in range(2):
        files.read_into(piece.file, k * (rows * width * 2 - len(buffer)), buffer)
    for size, stride in [
        ((2, rows), (1, width)),  # two columns
        ((rows // 16, 3), (16 * width, width // 3)),  # a few far apart, of few rows
        ((rows // 64 * width // 2,), (2,)),  # every other one, on and on
    ]:
        for _ in opened.files[piece.file].boxes(files, 0, size, stride):
            pass

for large in (False, True):
    if large:
        used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (used + 24576 << 10,) * 2)
    for piece in opened.pieces:
        if piece.name.startswith("large") == large:
            read(piece, buffer if large else buffer[: 8 << 20])
print("done")
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Large parts of large tensors are decoded in 24 MiB more than small ones."""
    shapes = {
        "small_blocks": ("U8", (2, 2000, 45, 16)), "small_scales": ("U8", (2, 2000, 45)),
        "small": ("F8_E4M3", (4000, 4096)), "small_scale_inv": ("F32", (32, 32)),
        "large_blocks": ("U8", (8, 5760, 90, 16)), "large_scales": ("U8", (8, 5760, 90)),
        "large": ("F8_E4M3", (16384, 16384)), "large_scale_inv": ("F32", (128, 128)),
    }  # fmt: skip
    table, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = math.prod(shape) * (4 if dtype == "F32" else 1)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(table).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + end)  # holes: no room on the disk
    (tmp_path / "config.json").write_text("{}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.stdout.strip() == "done", done.stderr


def test_a_file_that_shrinks_while_it_is_decoded(tmp_path: Path) -> None:
    folder = save(tmp_path, {"a": any_bytes((512, 512)).view(FP8), "a_scale_inv": torch.ones(4, 4)})
    decoded = Decoded(folder)
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match="ends early"):
        decoded.tensor("a")
    with pytest.raises(CheckpointError, match="outside its file"):
        assemble.box(decoded.files, decoded.pieces["a"].file, 2, (512,), (512,), 0)


# Whole models.


def encoded(folder: Path, plain: Path, block: Sequence[int] | None) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model with its projections in scaled blocks, and the tensors that it stands for."""
    tensors = load_file(plain / "model.safetensors")
    stored, expected = {}, {}
    for i, (name, tensor) in enumerate(tensors.items()):
        if tensor.ndim == 2 and ("proj" in name or "attn" in name or "mlp" in name):
            rows, columns = block or (128, 128)
            scale = scales_of(tensor.shape, (rows, columns), i)
            weight = (tensor.float() * 40).to(FP8)
            stored |= {name: weight, f"{name}_scale_inv": scale}
            expected[name] = times_scales(weight, scale, (rows, columns))
        else:
            stored[name] = expected[name] = tensor
    shutil.copytree(plain, folder)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    config["quantization_config"] = quantization | ({"weight_block_size": list(block)} if block else {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder, expected


@pytest.mark.parametrize("name", ["llama3", "gpt2"])
@pytest.mark.parametrize("block", [None, (32, 48)], ids=str)
@pytest.mark.parametrize("to", ["megatron", "megatron-legacy", "trtllm", "huggingface"])
def test_a_model_in_blocks_becomes_a_plain_one(
    tmp_path: Path, hf_model: Callable[..., Path], name: str, block: tuple[int, int] | None, to: str
) -> None:
    plain = hf_model(name, "bfloat16")
    source, expected = encoded(tmp_path / "source", plain, block)
    decoded = sum(
        not torch.equal(tensor, expected[key]) for key, tensor in load_file(plain / "model.safetensors").items()
    )
    report = registry.convert(source, tmp_path / "there", to=to, parallel=Parallel(tp=2, pp=2))
    assert f"decoded {decoded} tensors from fp8_block to bfloat16" in report.notes and decoded >= 16
    registry.convert(tmp_path / "there", tmp_path / "back", to="huggingface")
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == expected.keys() and all(same(back[key], tensor) for key, tensor in expected.items())
    # The config is that of the plain model: nothing claims to be encoded.
    carried = (tmp_path / "there").rglob("config.json" if to == "huggingface" else "huggingface/config.json")
    for path in (tmp_path / "back/config.json", next(carried)):
        assert json.loads(path.read_text()) == json.loads((plain / "config.json").read_text())
    assert registry.verify(source, tmp_path / "there") and registry.verify(source, tmp_path / "back")
    assert not registry.verify(source, plain)


def packed(folder: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A gpt-oss with its experts in MXFP4, as it is published; a plain one; and the tensors that they stand for."""
    import transformers
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = transformers.AutoConfig.for_model(
        "gpt_oss", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / "plain")
    stored, expected = {}, {}
    for i, (name, tensor) in enumerate(load_file(folder / "plain/model.safetensors").items()):
        if tensor.ndim == 3:
            experts, fan_in, fan_out = tensor.shape
            blocks = any_bytes((experts, fan_out, fan_in // 32, 16), i)
            scales = any_bytes(blocks.shape[:-1], i) % 12 + 110
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            expected[name] = convert_moe_packed_tensors(blocks, scales)
        else:
            stored[name] = expected[name] = tensor
    plain = json.loads((folder / "plain/config.json").read_text())
    save(folder / "source", stored, {**plain, "quantization_config": {"quant_method": "mxfp4"}})
    return folder / "source", folder / "plain", expected


def test_experts_in_mxfp4_become_plain_ones(tmp_path: Path) -> None:
    source, plain, expected = packed(tmp_path)
    registry.convert(source, tmp_path / "out", to="huggingface")
    registry.convert(source, tmp_path / "megatron", to="megatron", parallel=Parallel(tp=2, ep=2))
    assert registry.verify(source, tmp_path / "megatron")
    registry.convert(tmp_path / "megatron", tmp_path / "back", to="huggingface")
    for path in (tmp_path / "out", tmp_path / "back"):
        found = load_file(path / "model.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        assert json.loads((path / "config.json").read_text()) == json.loads((plain / "config.json").read_text())


def test_as_transformers_loads_it(tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    """What transformers itself makes of such files, all in all; it takes accelerate to read them."""
    pytest.importorskip("accelerate")
    import transformers

    sources = [packed(tmp_path)[0], encoded(tmp_path / "llama", hf_model("llama3", "bfloat16"), (32, 32))[0]]
    for source in sources:
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
        found = dict(registry.stream(source))
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_inspect_says_what_is_on_the_disk(tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    source, expected = encoded(tmp_path / "source", hf_model("llama3", "bfloat16"), None)
    found, stored = registry.inspect(source), load_file(source / "model.safetensors")
    assert found.nbytes == sum(t.nbytes for t in stored.values())
    assert (found.tensors, found.files) == (len(stored), 1)
    assert found.dtypes == {"bfloat16": sum(t.numel() for t in expected.values())}
    assert "decoded 28 tensors from fp8_block to bfloat16" in str(found)


def test_transformers_loads_what_was_decoded(tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    import transformers

    source, expected = encoded(tmp_path / "source", hf_model("llama3", "bfloat16"), None)
    registry.convert(source, tmp_path / "plain", to="huggingface", options={"shard_size": "100KB"})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    assert all(same(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_cast_and_a_stream(tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    source, expected = encoded(tmp_path / "source", hf_model("llama3", "bfloat16"), None)
    for name, tensor in registry.stream(source, dtype="float32"):
        assert torch.equal(tensor, expected[name].float()), name


def test_copies_of_an_encoded_tensor_are_compared(tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    """A tied output that is stored too, in an encoding of its own."""
    plain = hf_model("llama_tied", "bfloat16")
    tensors = load_file(plain / "model.safetensors")
    weight, scale = any_bytes((131, 64)).view(FP8), torch.tensor([[0.5], [0.25]])
    tensors |= {"model.embed_tokens.weight": times_scales(weight, scale)}
    tensors |= {"lm_head.weight": weight, "lm_head.weight_scale_inv": scale}
    config = json.loads((plain / "config.json").read_text())
    source = save(tmp_path / "source", tensors, config)
    tensors["model.embed_tokens.weight"] = Decoded(source).tensor("lm_head.weight")  # with the NaNs that it has
    registry.convert(save(source, tensors, config), tmp_path / "out", to="megatron")
    tensors["model.embed_tokens.weight"][130, 63] = 1.5
    with pytest.raises(MappingError, match="copies of output"):
        registry.convert(save(source, tensors, config), tmp_path / "out", to="megatron", overwrite=True)


# Configs.


def test_what_the_config_says_after_decoding(tmp_path: Path) -> None:
    tensors = {"a": any_bytes((4, 4)).view(FP8), "a_scale_inv": torch.ones(1, 1)}
    config = {"b": 1, "torch_dtype": "float8_e4m3fn", "quantization_config": {"quant_method": "fp8"}, "a": {"c": None}}
    decoded = Decoded(save(tmp_path, tensors, config))
    expected = {"b": 1, "torch_dtype": "bfloat16", "a": {"c": None}}
    assert decoded.config == decoded.opened.hub_config == decoded.opened.document == expected
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_a_model_that_is_not_encoded_keeps_its_config(tmp_path: Path) -> None:
    config = {"torch_dtype": "float16", "quantization_config": {"quant_method": "other"}}
    decoded = Decoded(save(tmp_path / "a", {"a": torch.ones(2, 2)}, config))
    assert decoded.config == config and not decoded.opened.notes and len(decoded.opened.files) == 1
    weights = {"a": any_bytes((4, 4)).view(FP8), "b_blocks": any_bytes((4, 16)), "c_scales": any_bytes((4,))}
    decoded = Decoded(save(tmp_path / "b", weights, {"torch_dtype": "float8_e4m3fn"}))
    assert [piece.dtype for piece in decoded.opened.pieces] == ["float8_e4m3fn", "uint8", "uint8"]
    assert decoded.config == {"torch_dtype": "float8_e4m3fn"}


def test_a_given_config_counts_as_the_checkpoints_own(tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    source, expected = encoded(tmp_path / "source", hf_model("llama3", "bfloat16"), (32, 48))
    (source / "config.json").rename(tmp_path / "config.json")
    registry.convert(source, tmp_path / "out", to="huggingface", config=tmp_path / "config.json")
    assert all(same(tensor, expected[key]) for key, tensor in load_file(tmp_path / "out/model.safetensors").items())
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_plain_tensors_with_the_config_of_encoded_ones(tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    """A trained checkpoint, and the config of the published model that it began as."""
    plain = hf_model("llama3")
    registry.convert(plain, tmp_path / "m", to="megatron")
    config = json.loads((plain / "config.json").read_text())
    given = {**config, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps(given))
    registry.convert(tmp_path / "m", tmp_path / "out", to="huggingface", config=tmp_path / "config.json")
    assert json.loads((tmp_path / "out/config.json").read_text()) == config


# What is wrong.

W, S = any_bytes((200, 130)).view(FP8), torch.ones(2, 2)
GOOD = {"a.weight": W, "a.weight_scale_inv": S}
B, P = any_bytes((3, 2, 16)), any_bytes((3, 2))


@pytest.mark.parametrize(
    ("tensors", "config", "problem", "expected"),
    [
        ({**GOOD, "b.weight": W}, {}, "without its scale", "b.weight_scale_inv of type float32"),
        ({"b.weight": W}, {"quantization_config": {}}, "without its scale", "found: no such tensor"),
        ({**GOOD, "b.weight_scale_inv": S}, {}, "without the tensor", "b.weight of type float8_e4m3fn"),
        ({**GOOD, "b.weight": S, "b.weight_scale_inv": S}, {}, "without the tensor", "found: b.weight of type float32"),
        ({"a.weight": W, "a.weight_scale_inv": torch.ones(2, 1)}, {}, "scale of an encoded tensor", r"\(2, 2\)"),
        ({"a.weight": W, "a.weight_scale_inv": torch.ones(4)}, {}, "scale of an encoded tensor", r"found: \(4,\)"),
        ({"a.weight": W, "a.weight_scale_inv": S.double()}, {}, "does not fit", "found: float64"),
        ({"a": W[0].clone(), "a_scale_inv": S}, {}, "tensor of an encoded tensor", "rows and columns"),
        (GOOD, {"quantization_config": {"weight_block_size": [64, 64]}}, "does not fit", r"\(4, 3\)"),
        (GOOD, {"quantization_config": {"weight_block_size": [0, 1]}}, "size of a block", r"found: \[0, 1\]"),
        (GOOD, {"quantization_config": {"weight_block_size": "128"}}, "size of a block", "found: 128"),
        ({"u_blocks": B, "u_scales": P[:2].clone()}, {}, "scales of an encoded tensor", r"\(3, 2\)"),
        ({"u_blocks": B[:, :, :8].clone(), "u_scales": P}, {}, "tensor of an encoded tensor", "16 bytes"),
        ({"u_blocks": B, "u_scales": P, "v_blocks": B}, {}, "without its scales", "v_scales of type uint8"),
        ({"u_blocks": B, "u_scales": P.float()}, {}, "scales of an encoded tensor", "found: float32"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_together(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], problem: str, expected: str
) -> None:
    save(tmp_path, tensors, {"model_type": "llama", **config})
    with pytest.raises(CheckpointError, match=problem) as caught:
        load(tmp_path)
    error = str(caught.value)
    assert error.count("model.safetensors") == 1 and "to do: " in error
    assert caught.match(expected)


def test_every_problem_is_listed(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": W for i in range(5)} | GOOD | {"b.weight": W, "b.weight_scale_inv": S[:1].clone()}
    with pytest.raises(CheckpointError) as caught:
        load(save(tmp_path, tensors))
    assert "layers.0.weight" in str(caught.value) and "layers." in caught.value.details[0]
    assert "b.weight_scale_inv" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tensor": {"name": "weight", "dtype": "uint8"}}, "must hold one *"),
        ({"parts": {"scale": {"name": "*_*", "dtype": "uint8"}}}, "must hold one *"),
        ({"tensor": {"name": "*", "dtype": "int3"}}, "unknown dtype 'int3'"),
        ({"dtype": "int8"}, "'bfloat16', 'float16' or 'float32'"),
        ({"unknown": 1}, "encodings.mine.unknown"),
    ],
)
def test_a_spec_that_is_wrong_says_so(change: dict[str, Any], problem: str) -> None:
    mine = {"codec": "mine", "tensor": {"name": "*", "dtype": "uint8"}, "parts": {}} | change
    with pytest.raises(SpecError) as caught:
        registry.register({"kind": "format", "name": "f", "container": "huggingface", "encodings": {"mine": mine}})
    assert problem in str(caught.value)


def test_a_codec_may_give_any_float(tmp_path: Path) -> None:
    """A user's encoding: halves of a pair of numbers, computed in float64 and rounded to what the spec declares."""

    class Sum:
        def __init__(self, parts: Mapping[str, encoding.Part], dtype: str, factor: float) -> None:
            self.shape, self.factor = parts["tensor"].shape, factor

        def decode(self, read: encoding.Read, rows: encoding.Ints, begin: int, end: int) -> torch.Tensor:
            high, low = (read(part, self.shape[-1], rows, begin, end).double() for part in ("tensor", "low"))
            return high * self.factor + low

    mine = {
        "codec": "sum", "tensor": {"name": "*.high", "dtype": "float32"}, "dtype": "float32",
        "parts": {"low": {"name": "*.low", "dtype": ["float32", "float16"]}},
        "parameters": {"factor": {"field": "sums.factor", "default": 1.0}},
    }  # fmt: skip
    registry.register({"kind": "format", "name": "huggingface", "extends": "huggingface", "encodings": {"sum": mine}})
    high, low = torch.randn(50, 40), torch.randn(50, 40).half()
    high[3, 4] = math.nan
    save(tmp_path, {"a.high": high, "a.low": low}, {"sums": {"factor": 3.0}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_codecs", {**encoding._codecs, "sum": Sum})
        decoded = Decoded(tmp_path)
    piece = decoded.pieces["a.high"]
    found = torch.frombuffer(bytearray(decoded.bytes("a.high", 0, 50 * 40 * 4)), dtype=torch.float32).view(50, 40)
    assert piece.dtype == "float32"
    assert torch.equal(found.nan_to_num(7), (high.double() * 3 + low.double()).float().nan_to_num(7))

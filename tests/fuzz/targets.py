"""What is fuzzed: for each parser real files to start from, and a function that reads one in a folder of its own."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

import registry
from formats import documents, extra_state, megatron_dirs, pickles, plain, safetensors_file, torchzip
from registry import catalog, expressions, layout, manifest, source
from registry.crc import crc32
from registry.errors import RegistryError
from registry.reading import reading
from registry.specs import FormatSpec
from registry.storage import Rank
from tests.goldens import golden

LLAMA = "megatron/llama"
QUANTISED = "trtllm/mo_llama_fp8_tp1"
TRTLLM = "trtllm/trt_llama_gqa_tp2_pp2"


class Target(NamedTuple):
    """`prepare(folder)` gives the seeds and what reads one input; `kind` says how inputs are damaged."""

    kind: str
    prepare: Callable[[Path], tuple[Sequence[bytes], Callable[[bytes], object]]]


Prepared = tuple[Sequence[bytes], Callable[[bytes], object]]


def _files(name: str, pattern: str, limit: int = 4) -> list[bytes]:
    return [path.read_bytes() for path in sorted(golden(name).rglob(pattern))[:limit]]


def _in_file(folder: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    path = folder / "input"

    def run(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return run


# Files alone.


def _pickle(folder: Path) -> Prepared:
    seeds = [path.read_bytes() for path in _converted("megatron")(folder).rglob(".metadata")]
    for path in [
        *_converted("megatron")(folder / "2").rglob("common.pt"),
        *golden(f"{LLAMA}/tp1pp1").rglob("common.pt"),
    ]:
        with zipfile.ZipFile(path) as archive:
            seeds.append(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
    return seeds, partial(_load_pickle, where="input")


def _load_pickle(data: bytes, where: str) -> object:
    found = pickles.loads(data, where=where, persistent=pickles.Persistent)
    return pickles.check_tree(found, where)


def _archive(folder: Path) -> Prepared:
    seeds = [torchzip.whole(torchzip.layout(value)) for value in ([None], {"a": [1, "b", (2.5, None)]})]
    seeds += _files(f"{LLAMA}/tp1pp1_optim", "common.pt")
    skeleton = torchzip.tensor_item("bfloat16", (3, 5))
    item = bytearray(skeleton.size)
    for at, data in skeleton.literals:
        item[at : at + len(data)] = data
    seeds.append(bytes(item))

    def read(path: Path) -> object:
        with reading(path) as file, contextlib.suppress(RegistryError):
            torchzip.probe_tensor(file, 0, file.size, str(path))
        return plain.plain(torchzip.read(path, where=str(path)).load(), path)

    return seeds, _in_file(folder, read)


def _safetensors(folder: Path) -> Prepared:
    seeds = []
    for data in _files(TRTLLM, "*.safetensors", 2):
        seeds.append(data)
    entries = [("a", "bfloat16", (2, 3)), ("b.weight", "float32", ()), ("empty", "int8", (0, 7)), ("é", "bool", (1,))]
    head, _, size = safetensors_file.layout(entries, {"format": "pt"})
    return [head + bytes(size - len(head)), *seeds], _in_file(folder, safetensors_file.read_header)


def _json(folder: Path) -> Prepared:
    seeds = _files(f"{LLAMA}/hf", "*.json") + _files(TRTLLM, "config.json")
    return seeds, _in_file(folder, documents.read_json)


def _extra_state(_: Path) -> Prepared:
    """Both generations: an archive, and a pickle with its storages in files of torch.save of their own."""
    import pickle

    import torch

    state = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(4, 3), "recipe": None, "extra": {"a": 1}}
    archive = io.BytesIO()
    torch.save(state, archive)
    seeds = [archive.getvalue(), pickle.dumps(state)]
    return seeds, lambda data: extra_state.scales(data, Path("input"))


def _text_of(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: parse(data.decode("utf-8", "replace"))


def _expression(_: Path) -> Prepared:
    seeds = [
        b"heads // kv_heads * (layers + 1)", b"'a' if tied and pp > 1 else rope['x'][0].y",
        b"[layers] * 3 + indices(kinds, 'x')", b"from_json(text) or {'a': max(1, 2.5)}",
        b"not x is none and -y % 7 <= 2",
    ]  # fmt: skip
    env = {"heads": 8, "kv_heads": 2, "layers": 3, "text": '{"a": [1]}', "kinds": ["x", "y"], "x": "word", "y": 10**30}
    return seeds, _text_of(lambda text: expressions.parse(text)(env))


def _layout(_: Path) -> Prepared:
    rules = [rule for name in ("llama", "gpt2", "mixtral") for _, rule in catalog.architecture(name).rules()]
    return [str(rule.layout).encode() for rule in rules], _text_of(layout.parse)


def _yaml(kind: str, name: str) -> Callable[[Path], Prepared]:
    def prepare(folder: Path) -> Prepared:
        seeds = [catalog._files(kind)[one].read_bytes() for one in name.split()]
        return seeds, _in_file(folder, lambda path: catalog.build(catalog._read_yaml(path), path))

    return prepare


# One file of a checkpoint, beside the others as they were.


def _open(path: Path, spec: FormatSpec) -> None:
    """What a container reads of a checkpoint: all but the tensors."""
    opened = catalog.container(spec.container).open(path, spec.name)
    if opened.training is not None:
        opened.training(None)
        opened.training(Rank())
    if opened.module_states is not None:
        opened.module_states()


def _within(base: Callable[[Path], Path], pattern: str, understand: bool = False) -> Callable[[Path], Prepared]:
    """One file of a checkpoint: opened, or (which takes ten times as long) also understood."""

    def prepare(folder: Path) -> Prepared:
        made = base(folder / "base")
        checkpoint = folder / "checkpoint"
        shutil.copytree(made, checkpoint)
        path = min(checkpoint.rglob(pattern))
        seed = path.read_bytes()
        spec = source.detect_format(checkpoint)

        def run(data: bytes) -> None:
            path.write_bytes(data)
            if understand:
                source.load(checkpoint, states=True)
            else:
                _open(checkpoint, spec)

        return [seed], run

    return prepare


def _golden(name: str) -> Callable[[Path], Path]:
    return lambda _: golden(name)


def _tiny(folder: Path) -> Path:
    """The golden model with one layer alone, so that reading it takes little time."""
    source, layer = golden(f"{LLAMA}/hf"), "model.layers.0."
    tensors = {n: t for n, t in load_file(source / "model.safetensors").items() if ".layers." not in n or layer in n}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    return folder


def _pickled(folder: Path) -> Path:
    made = _tiny(folder)
    torch.save(load_file(made / "model.safetensors"), made / "pytorch_model.bin")
    (made / "model.safetensors").unlink()
    return made


def _converted(to: str, **arguments: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        registry.convert(_tiny(folder / "tiny"), folder / to, to=to, durable=False, **arguments)  # type: ignore[arg-type]
        return folder / to

    return make


def _tracker(folder: Path) -> Prepared:
    root = folder / "root"
    for name in ("iter_0000010", "iter_0000020", "release"):
        (root / name).mkdir(parents=True)

    def run(data: bytes) -> object:
        (root / megatron_dirs.TRACKER).write_bytes(data)
        return megatron_dirs.directory(root, lambda path: path != root, "checkpoint")

    return [b"20", b"release", b"0000010\n"], run


def _manifest(folder: Path) -> Prepared:
    made = _converted("megatron", parallel=registry.Parallel(tp=2))(folder / "base")
    path = min(made.rglob(manifest.NAME))
    size = len(manifest._HEAD % 0)

    def run(body: bytes) -> object:
        path.write_bytes(manifest._HEAD % crc32(body) + body + b"}\n")
        return manifest.check(path.parent, 1)

    return [path.read_bytes()[size:-2]], run


def _calibration(folder: Path) -> Prepared:
    from registry.quantization.ranges import Calibration

    head, _, size = safetensors_file.layout(
        [("a.input_quantizer._amax", "float32", ()), ("b", "float32", (4, 2))], None
    )

    def read(path: Path) -> None:
        found = Calibration(path)
        for name in found.names:
            found.shape(name)
            found.tensor(name)

    return [head + bytes(size - len(head))], _in_file(folder, read)


def _layers(folder: Path) -> Prepared:
    from registry.quantization.decoding import read_layers

    seed = (
        b'{"quantized_layers": {"transformer.layers.0.mlp.fc": {"quant_algo": "FP8"}, "lm_head": {"quant_algo": null}}}'
    )
    return [seed], _in_file(folder, lambda path: read_layers(path, "quantized_layers"))


TARGETS: dict[str, Target] = {
    "pickle": Target("pickle", _pickle),
    "torch archive": Target("zip", _archive),
    "safetensors": Target("safetensors", _safetensors),
    "json": Target("json", _json),
    "module state": Target("pickle", _extra_state),
    "tracker": Target("text", _tracker),
    "manifest": Target("json", _manifest),
    "calibration": Target("safetensors", _calibration),
    "quantised layers": Target("json", _layers),
    "expression": Target("text", _expression),
    "layout": Target("text", _layout),
    "architecture spec": Target("text", _yaml("architecture", "llama gpt2")),
    "format spec": Target("text", _yaml("format", "huggingface trtllm")),
    "hf config": Target("json", _within(_tiny, "config.json", understand=True)),
    "hf weights": Target("safetensors", _within(_tiny, "model.safetensors")),
    "hf pickled weights": Target("zip", _within(_pickled, "pytorch_model.bin")),
    "hf index": Target("json", _within(_converted("huggingface", options={"shard_size": "200KB"}), "*.index.json")),
    "torch_dist .metadata": Target("pickle", _within(_converted("megatron"), ".metadata")),
    "torch_dist common.pt": Target("zip", _within(_golden(f"{LLAMA}/tp1pp1_optim"), "common.pt")),
    "torch_dist .distcp": Target("bytes", _within(_converted("megatron"), "__0_0.distcp")),
    "torch_dist understood": Target("pickle", _within(_converted("megatron"), ".metadata", understand=True)),
    "rank file": Target("zip", _within(_converted("megatron-legacy"), "model_optim_rng.pt")),
    "rank file of Megatron": Target("zip", _within(_golden(f"{LLAMA}/tp2pp1_te_torch"), "model_optim_rng.pt")),
    "rank file understood": Target("zip", _within(_converted("megatron-legacy"), "*.pt", understand=True)),
    "registry.json": Target("json", _within(_converted("megatron"), "registry.json", understand=True)),
    "DCP .metadata": Target("pickle", _within(_converted("dcp"), ".metadata")),
    "trtllm config": Target("json", _within(_golden(f"{TRTLLM}/trtllm"), "config.json", understand=True)),
    "trtllm quantised": Target(
        "json", _within(_golden("trtllm/mo_llama_fp8_tp1/trtllm"), "config.json", understand=True)
    ),
}

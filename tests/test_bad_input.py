"""Damaged, hostile and mistaken input: one clear error each, and what was at the target before stays as it was.

A case is a function that damages a copy of a small valid checkpoint, under a decorator that says which checkpoints it
is for and what the error must be. To add one, write another such function: its name becomes the test's.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import registry
from formats import pickles, torchzip
from registry import catalog, manifest
from registry.cli import main
from registry.errors import (
    ArgumentError,
    CheckpointError,
    DetectionError,
    MappingError,
    ParallelError,
    RegistryError,
    UnsafePickleError,
)
from tests.goldens import golden

Bases = dict[str, Path]
LAYER = "model.layers.1.self_attn"


# --- the checkpoints that are damaged, and what is expected of every error --------------------------------------------


@pytest.fixture(scope="module")
def bases(hf_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Valid checkpoints by name: HuggingFace directories, what we make of them, and what other programs wrote."""
    folder = tmp_path_factory.mktemp("bases")
    single = hf_model("llama3")
    made = {"hf": hf_model("llama3", max_shard_size="300KB"), "single": single}
    for to in ("megatron", "megatron-legacy", "trtllm"):
        made[to] = folder / to
        registry.convert(single, made[to], to=to, parallel=registry.Parallel(tp=2, pp=2), durable=False)
    made["trtllm-replicas"] = folder / "replicas"  # 4 KV heads on 8 ranks
    registry.convert(single, folder / "replicas", to="trtllm", parallel=registry.Parallel(tp=8), durable=False)
    made["golden-megatron"] = golden("megatron/llama/tp2pp2")
    made["golden-legacy"] = golden("megatron/llama/tp2pp2_torch")
    made["golden-trtllm"] = golden("trtllm/trt_llama_gqa_tp2_pp2") / "trtllm"
    return made


#: What a checkpoint needs beside its own files.
NEEDS: dict[str, dict[str, Any]] = {
    "golden-megatron": {"architecture": "llama"},
    "golden-legacy": {"architecture": "llama"},
}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a directory: names and bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def full_target(folder: Path) -> Path:
    """A target with something in it that only a conversion that ends well may replace."""
    target = folder / "targets" / "out"
    (target / "sub").mkdir(parents=True)
    (target / "model.safetensors").write_bytes(b"the only copy")
    (target / "sub" / "notes.txt").write_text("of great value")
    return target


def command_line(source: object, target: Path, to: str, arguments: dict[str, Any]) -> list[str]:
    line = ["convert", str(source), str(target), "--to", to, "--overwrite", "--no-sync", "--quiet"]
    for name, value in arguments.items():
        if isinstance(value, registry.Parallel):
            line += ["--tp", str(value.tp), "--vpp", str(value.vpp)]
            line += ["--pp", ",".join(map(str, value.layers)) if value.layers else str(value.pp)]
        else:
            line += [f"--{name}", str(value)]
    return line


def refused(
    source: object, target: Path, capsys: pytest.CaptureFixture[str], *, to: str = "huggingface", **arguments: Any
) -> RegistryError:
    """The error of a conversion, from Python and from the command line, after the checks that every error must pass."""
    before = contents(target.parent)
    start = time.process_time()
    with pytest.raises(RegistryError) as caught:
        registry.convert(str(source), target, to=to, overwrite=True, durable=False, **arguments)
    assert time.process_time() - start < 2
    assert contents(target.parent) == before, "the target was touched, or something was left beside it"
    error, text = caught.value, str(caught.value)
    assert error.hint and "to do: " in text, f"nothing to do in: {text}"
    said = (error.expected is not None and error.found is not None) or error.details
    assert said, f"neither details nor what was expected and found in: {text}"
    assert error.where is not None or error.details or isinstance(error, ParallelError), f"nothing is named in: {text}"
    assert all(len(line) < 1000 for line in text.splitlines()) and len(text.splitlines()) < 60, "too long to read"
    capsys.readouterr()
    code = main(command_line(source, target, to, arguments))
    assert code == (2 if isinstance(error, ArgumentError) else 1)
    assert capsys.readouterr().err == f"registry: {text}\n"
    assert contents(target.parent) == before
    return error


class Case(NamedTuple):
    base: str
    damage: Callable[[Path], Any]
    kind: type[RegistryError]
    says: tuple[str, ...]
    arguments: dict[str, Any]


CASES: dict[str, Case] = {}


def damaged(
    names: str, kind: type[RegistryError], *says: str, **arguments: Any
) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    """Registers a damage to each of the named checkpoints. The error must be of `kind`, and say all of `says`."""

    def add(damage: Callable[[Path], Any]) -> Callable[[Path], Any]:
        for name in names.split():
            key = f"{name}-{damage.__name__}"
            assert key not in CASES
            CASES[key] = Case(name, damage, kind, says, arguments)
        return damage

    return add


# --- ways to damage ---------------------------------------------------------------------------------------------------


@contextmanager
def edit(path: Path) -> Iterator[Any]:
    """A JSON file, to be changed in place."""
    data = json.loads(path.read_text())
    yield data
    path.write_text(json.dumps(data))


@contextmanager
def tensors(path: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a safetensors file, to be changed in place."""
    held = load_file(path)
    yield held
    save_file(held, path, {"format": "pt"})


@contextmanager
def header(path: Path) -> Iterator[dict[str, Any]]:
    """The header of a safetensors file, to be changed in place: nothing checks what comes of it."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8:start])
    yield table
    body = json.dumps(table).encode()
    path.write_bytes(len(body).to_bytes(8, "little") + body + raw[start:])


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


@contextmanager
def index(path: Path) -> Iterator[Any]:
    with edit(path / "model.safetensors.index.json") as found:
        yield found


def cut(path: Path, keep: int) -> None:
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)


def only(path: Path, pattern: str) -> Path:
    """The first file below a directory that fits."""
    return min(path.rglob(pattern))


@contextmanager
def metadata(path: Path) -> Iterator[Any]:
    """The attributes of a torch_dist checkpoint's metadata, to be changed in place."""
    file = only(path, ".metadata")
    node = pickles.loads(file.read_bytes(), where="test")
    yield node.state
    file.write_bytes(pickles.dumps(node, protocol=2))


@contextmanager
def rank(path: Path, name: str) -> Iterator[Any]:
    """What torch.load gives of one rank's file, to be changed in place (only of files that we wrote)."""
    file = only(path, f"{name}/model_optim_rng.pt")
    state = torch.load(file, weights_only=False)
    yield state
    torch.save(state, file)


def rank_names(path: Path) -> list[str]:
    return sorted(p.parent.name for p in path.rglob("model_optim_rng.pt"))


class Runs:
    """Unpickled by a program that trusts it, this makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/a-pickle-was-run",)


# --- HuggingFace: files -----------------------------------------------------------------------------------------------


@damaged("hf", CheckpointError, "model-00002-of-", "missing", "download it again")
def missing_shard(path: Path) -> None:
    shards(path)[1].unlink()


@damaged("hf", CheckpointError, "model-00002-of-", "the file ends before its last tensor", "download it again")
def truncated_data(path: Path) -> None:
    cut(shards(path)[1], -100)


@damaged("hf", CheckpointError, "model-00002-of-", "the file ends inside its header", "download it again")
def truncated_header(path: Path) -> None:
    cut(shards(path)[1], 60)


@damaged("hf", CheckpointError, "model-00002-of-", "the file is too short", "0 bytes")
def empty_shard(path: Path) -> None:
    cut(shards(path)[1], 0)


@damaged("hf", CheckpointError, "model-00002-of-", "at most 100000000 bytes")
def header_too_large(path: Path) -> None:
    with shards(path)[1].open("r+b") as file:
        file.write((1 << 40).to_bytes(8, "little"))


@damaged("hf", CheckpointError, "model-00001-of-", "Git LFS")
def lfs_pointer(path: Path) -> None:
    shards(path)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


@damaged("hf", CheckpointError, "model-00001-of-", "tensors overlap")
def overlapping_offsets(path: Path) -> None:
    with header(shards(path)[0]) as table:
        a, b, *_ = sorted((k for k in table if k != "__metadata__"), key=lambda k: table[k]["data_offsets"][0])
        size = table[b]["data_offsets"][1] - table[b]["data_offsets"][0]
        low = table[a]["data_offsets"][0]
        table[b]["data_offsets"] = [low, low + size]


@damaged("hf", CheckpointError, "model-00001-of-", "the file ends before its last tensor")
def offsets_out_of_range(path: Path) -> None:
    with header(shards(path)[0]) as table:
        entry = max((v for k, v in table.items() if k != "__metadata__"), key=lambda v: v["data_offsets"][1])
        entry["data_offsets"][1] += 64 << 20
        entry["shape"] = [(entry["data_offsets"][1] - entry["data_offsets"][0]) // 4]


@damaged("hf", CheckpointError, "model-00001-of-", "a hole before a tensor")
def offsets_with_a_hole(path: Path) -> None:
    with header(shards(path)[0]) as table:
        entry = table["model.embed_tokens.weight"]
        entry["data_offsets"] = [n + (1 << 40) for n in entry["data_offsets"]]


@damaged("hf", CheckpointError, "model-00001-of-", "embed_tokens.weight", "shape and data_offsets disagree")
def shape_beyond_its_bytes(path: Path) -> None:
    with header(shards(path)[0]) as table:
        table["model.embed_tokens.weight"]["shape"] = [1 << 40, 1 << 40]


@damaged("hf", CheckpointError, "model-00001-of-", "embed_tokens.weight", "F4")
def dtype_of_half_a_byte(path: Path) -> None:
    with header(shards(path)[0]) as table:
        table["model.embed_tokens.weight"]["dtype"] = "F4"


@damaged("hf", CheckpointError, "index.json", "total_size is wrong", "bytes")
def wrong_total_size(path: Path) -> None:
    with index(path) as found:
        found["metadata"]["total_size"] += 8


@damaged("hf", CheckpointError, "absent.safetensors", "missing")
def index_names_absent_file(path: Path) -> None:
    with index(path) as found:
        found["weight_map"]["lm_head.weight"] = "absent.safetensors"


def index_names(name: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        shutil.copy(shards(path)[0], path.parent / "x.safetensors")
        with index(path) as found:
            found["weight_map"]["lm_head.weight"] = name

    return damage


for title, name in {
    "a_parent": "../x.safetensors",
    "an_absolute_path": "/tmp/x.safetensors",
    "a_directory": "sub/x.safetensors",
    "nothing": "",
    "a_number": 7,
    "a_list": [["x.safetensors"]],
}.items():
    index_names_outside = index_names(name)
    index_names_outside.__name__ = f"index_names_{title}"
    damaged("hf", CheckpointError, "index.json", "a file outside its directory", repr(name))(index_names_outside)


@damaged("hf", CheckpointError, "index.json", "lm_head.weight: the index says", "which does not hold it")
def index_names_the_wrong_shard(path: Path) -> None:
    with index(path) as found:
        held = found["weight_map"]["lm_head.weight"]
        found["weight_map"]["lm_head.weight"] = next(p.name for p in shards(path) if p.name != held)


@damaged("hf", CheckpointError, "index.json", "lm_head.weight: in model-", "not in the index")
def index_lacks_a_tensor(path: Path) -> None:
    with index(path) as found:
        del found["weight_map"]["lm_head.weight"]


@damaged("hf", CheckpointError, "two files hold the same tensor", "model.norm.weight in model-0")
def tensor_in_two_shards(path: Path) -> None:
    first, *_, last = shards(path)
    twin = next(held for file in (first, last) if (held := load_file(file).get("model.norm.weight")) is not None)
    for file in (first, last):
        with tensors(file) as held:
            held["model.norm.weight"] = twin


@damaged("hf", CheckpointError, "index.json", "JSON")
def index_is_cut_short(path: Path) -> None:
    cut(path / "model.safetensors.index.json", 100)


@damaged("hf", CheckpointError, "index.json", "weight_map")
def index_without_weight_map(path: Path) -> None:
    with index(path) as found:
        del found["weight_map"]


@damaged("hf", CheckpointError, "model.safetensors.index.json", "the index of the shards is missing")
def no_index(path: Path) -> None:
    (path / "model.safetensors.index.json").unlink()


@damaged("single", CheckpointError, "pytorch_model.bin", "no state dict")
def pickled_weights_of_a_run(path: Path) -> None:
    torch.save({"model": load_file(path / "model.safetensors")}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


@damaged("single", DetectionError, "no known format fits", "config.json")
def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


# --- HuggingFace: config ----------------------------------------------------------------------------------------------


@damaged("single hf", DetectionError, "the checkpoint carries no config", "config=")
def no_config(path: Path) -> None:
    (path / "config.json").unlink()


@damaged("single", CheckpointError, "config.json", "JSON", "Expecting")
def config_is_not_json(path: Path) -> None:
    (path / "config.json").write_text("{'model_type': 'llama'}")


@damaged("single", CheckpointError, "config.json", "NaN")
def config_with_nan(path: Path) -> None:
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": NaN'))


@damaged("single", CheckpointError, "config.json", "model_type", "duplicate")
def config_with_a_key_twice(path: Path) -> None:
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace("{", '{"model_type": "gpt2",', 1))


@damaged("single", CheckpointError, "config.json", "list")
def config_is_a_list(path: Path) -> None:
    (path / "config.json").write_text("[]")


@damaged("single", CheckpointError, "config.json", "maximum recursion depth")
def config_is_nested_deep(path: Path) -> None:
    (path / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


@damaged("single", DetectionError, "several architectures fit: gemma, llama, mistral", "architecture=")
def config_without_model_type(path: Path) -> None:
    with edit(path / "config.json") as config:
        del config["model_type"]


@damaged("single", DetectionError, "unknown architecture 'llamma'", "llama", "register")
def unknown_model_type(path: Path) -> None:
    with edit(path / "config.json") as config:
        config["model_type"] = "llamma"


@damaged("single", DetectionError, "unknown architecture", "llama")
def model_type_is_a_list(path: Path) -> None:
    with edit(path / "config.json") as config:
        config["model_type"] = ["llama"]


#: Wrong values of config.json, and what the error must say.
CONFIGS: list[tuple[str, Any, str, list[str]]] = [
    ("vocab_size", 132, "too_large", ["model.embed_tokens.weight", "(132, 64)", "(131, 64)"]),
    ("vocab_size", 10**30, "absurd", ["vocab_size is 1000000"]),
    ("num_attention_heads", 16, "too_large", ["layers.{0..3}.self_attn.q_proj.weight", "(128, 64)", "(64, 64)"]),
    ("num_attention_heads", 0, "zero", ["layers.{0..3}.self_attn.q_proj.weight", "(0, 64)", "(64, 64)"]),
    ("num_key_value_heads", 2, "too_small", ["layers.{0..3}.self_attn.k_proj.weight", "(16, 64)", "(32, 64)"]),
    ("num_key_value_heads", 3, "odd", ["layers.{0..3}.self_attn.k_proj.weight", "(24, 64)", "(32, 64)"]),
    ("num_hidden_layers", 5, "too_large", ["missing from the source: model.layers.4.mlp.down_proj.weight"]),
    ("num_hidden_layers", 3, "too_small", ["layers.3.mlp.down_proj.weight: the config has no layer 3"]),
    ("num_hidden_layers", 10**9, "absurd", ["num_hidden_layers is 1000000000"]),
    *(
        (field, value, title, [field])
        for field in ("num_attention_heads", "num_hidden_layers", "hidden_size")
        for value, title in ((-8, "negative"), ("8", "text"), (None, "none"), (8.5, "fraction"), ([8], "a_list"))
    ),
]


def _config_says(field: str, value: Any, title: str, says: list[str]) -> None:
    def damage(path: Path) -> None:
        with edit(path / "config.json") as config:
            config[field] = value

    damage.__name__ = f"{field}_{title}"
    damaged("single", MappingError, *says)(damage)


for row in CONFIGS:
    _config_says(*row)


# --- HuggingFace: tensors ---------------------------------------------------------------------------------------------


@damaged("single", MappingError, "no rule claims model.layers.1.self_attn.gate.weight [3]")
def unknown_tensor(path: Path) -> None:
    with tensors(path / "model.safetensors") as held:
        held[f"{LAYER}.gate.weight"] = torch.zeros(3)


@damaged("single", MappingError, "no rule claims model.layers.{0..3}.self_attn.gate.weight [3]")
def unknown_tensor_in_every_layer(path: Path) -> None:
    with tensors(path / "model.safetensors") as held:
        held |= {f"model.layers.{i}.self_attn.gate.weight": torch.zeros(3) for i in range(4)}


@damaged("single", MappingError, "missing from the source: model.layers.1.self_attn.q_proj.weight")
def missing_tensor(path: Path) -> None:
    with tensors(path / "model.safetensors") as held:
        del held[f"{LAYER}.q_proj.weight"]


@damaged("single", MappingError, "model.layers.{0..3}.self_attn.q_proj.weight")
def missing_tensor_in_every_layer(path: Path) -> None:
    with tensors(path / "model.safetensors") as held:
        for i in range(4):
            del held[f"model.layers.{i}.self_attn.q_proj.weight"]


@damaged("single", MappingError, "lm_head.weight")
def untied_model_without_its_head(path: Path) -> None:
    with tensors(path / "model.safetensors") as held:
        del held["lm_head.weight"]


@damaged("single", MappingError, "layers.1.self_attn.q_proj.weight", "(64, 64)", "(63, 64)")
def wrong_shape(path: Path) -> None:
    with tensors(path / "model.safetensors") as held:
        held[f"{LAYER}.q_proj.weight"] = held[f"{LAYER}.q_proj.weight"][:63].clone()


@damaged("single", MappingError, "layers.1.self_attn.q_proj.weight", "(64, 64)", "(4096,)")
def wrong_number_of_dimensions(path: Path) -> None:
    with tensors(path / "model.safetensors") as held:
        held[f"{LAYER}.q_proj.weight"] = held[f"{LAYER}.q_proj.weight"].flatten()


@damaged("single", MappingError, "attention.q.weight", "float16, float32", "dtype=", to="megatron")
def two_types_in_a_fused_tensor(path: Path) -> None:
    with tensors(path / "model.safetensors") as held:
        for name in held:
            if "q_proj" in name:
                held[name] = held[name].half()


@damaged("single", MappingError, "attention.q.weight", "float16, float32", "dtype=", to="megatron")
def two_types_in_a_stacked_tensor(path: Path) -> None:
    with tensors(path / "model.safetensors") as held:
        held[f"{LAYER}.q_proj.weight"] = held[f"{LAYER}.q_proj.weight"].half()


# --- Megatron torch_dist ----------------------------------------------------------------------------------------------


@damaged("megatron golden-megatron", CheckpointError, "__1_0.distcp", "missing")
def missing_distcp(path: Path) -> None:
    only(path, "__1_0.distcp").unlink()


@damaged("megatron golden-megatron", CheckpointError, "__1_0.distcp", "shorter than its metadata says")
def truncated_distcp(path: Path) -> None:
    cut(only(path, "__1_0.distcp"), -1000)


@damaged("megatron golden-megatron", CheckpointError, ".metadata", "pickle")
def truncated_metadata(path: Path) -> None:
    cut(only(path, ".metadata"), -1000)


@damaged("megatron golden-megatron", CheckpointError, ".metadata")
def empty_metadata(path: Path) -> None:
    cut(only(path, ".metadata"), 0)


@damaged("megatron golden-megatron", CheckpointError, ".metadata", "missing", "the save did not end")
def no_metadata(path: Path) -> None:
    only(path, ".metadata").unlink()


@damaged("megatron golden-megatron", UnsafePickleError, ".metadata", "posix.system")
def metadata_that_runs_code(path: Path) -> None:
    with metadata(path) as state:
        state["planner_data"] = pickles.Global("posix", "system").call("touch /tmp/a-pickle-was-run")


@damaged("megatron golden-megatron", CheckpointError, ".metadata", "dictionaries")
def metadata_of_something_else(path: Path) -> None:
    with metadata(path) as state:
        state["state_dict_metadata"] = ["not", "a", "dictionary"]


@damaged("megatron golden-megatron", CheckpointError, ".metadata", "lacks an attribute", "storage_data")
def metadata_without_places(path: Path) -> None:
    with metadata(path) as state:
        del state["storage_data"]


def places(state: dict[str, Any], ending: str = "word_embeddings.weight") -> list[dict[str, Any]]:
    """The records of where the chunks of a tensor lie."""
    return [info.state for key, info in state["storage_data"].items() if key.state["fqn"].endswith(ending)]


def tensor(state: dict[str, Any], ending: str = "word_embeddings.weight") -> dict[str, Any]:
    found: dict[str, Any] = next(
        node.state for name, node in state["state_dict_metadata"].items() if name.endswith(ending)
    )
    return found


@damaged("megatron golden-megatron", CheckpointError, "distcp", "word_embeddings.weight", "bytes")
def item_beyond_its_file(path: Path) -> None:
    with metadata(path) as state:
        places(state)[0]["offset"] += 1 << 30


@damaged("megatron golden-megatron", CheckpointError, ".metadata", "word_embeddings.weight", "a length")
def item_at_a_negative_offset(path: Path) -> None:
    with metadata(path) as state:
        places(state)[0]["offset"] = -5


@damaged("megatron golden-megatron", CheckpointError, "__0_")
def item_at_another_place(path: Path) -> None:
    with metadata(path) as state:
        places(state)[0]["offset"] += 8


@damaged("megatron golden-megatron", CheckpointError, ".metadata", "outside its directory", "../x.distcp")
def item_in_a_parent(path: Path) -> None:
    shutil.copy(only(path, "__0_*.distcp"), only(path, ".metadata").parent.parent / "x.distcp")
    with metadata(path) as state:
        places(state)[0]["relative_path"] = "../x.distcp"


@damaged("megatron golden-megatron", CheckpointError, ".metadata", "outside its directory", "/etc/passwd")
def item_in_an_absolute_path(path: Path) -> None:
    with metadata(path) as state:
        places(state)[0]["relative_path"] = "/etc/passwd"


@damaged("megatron golden-megatron", MappingError, "embedding.weight", "holds only", "word_embeddings.weight")
def hole_between_chunks(path: Path) -> None:
    with metadata(path) as state:
        tensor(state)["chunks"].pop()


@damaged("megatron golden-megatron", CheckpointError, "word_embeddings.weight", "within")
def chunk_outside_its_tensor(path: Path) -> None:
    with metadata(path) as state:
        tensor(state)["chunks"][0].state["offsets"] = pickles.Size((1000, 0))


@damaged("megatron golden-megatron", CheckpointError, "word_embeddings.weight", "dimensions")
def chunk_of_other_dimensions(path: Path) -> None:
    with metadata(path) as state:
        tensor(state)["chunks"][0].state["offsets"] = pickles.Size((0,))


@damaged("megatron golden-megatron", MappingError, "embedding.weight", "overlap", "word_embeddings.weight")
def overlapping_chunks(path: Path) -> None:
    with metadata(path) as state:
        chunk = tensor(state)["chunks"][1].state
        old, new = chunk["offsets"], pickles.Size((chunk["offsets"][0] - 1, 0))
        chunk["offsets"] = new
        for key in list(state["storage_data"]):
            if key.state["fqn"] == "embedding.word_embeddings.weight" and key.state["offset"] == old:
                info = state["storage_data"].pop(key)
                key.state["offset"] = new
                state["storage_data"][key] = info


@damaged("megatron golden-megatron", CheckpointError, ".metadata", "where a chunk lies", "word_embeddings.weight")
def chunk_without_a_place(path: Path) -> None:
    with metadata(path) as state:
        key = next(key for key in state["storage_data"] if key.state["fqn"].endswith("word_embeddings.weight"))
        del state["storage_data"][key]


@damaged("megatron golden-megatron", CheckpointError, "__", "distcp", "word_embeddings.weight", "disagrees")
def item_of_another_shape(path: Path) -> None:
    with metadata(path) as state:
        norm = places(state, "final_layernorm.weight")[0]
        places(state)[0].update(norm)


@damaged("megatron golden-megatron", MappingError, "final_norm.weight", "lacks")
def tensor_that_the_metadata_lacks(path: Path) -> None:
    with metadata(path) as state:
        del state["state_dict_metadata"]["decoder.final_layernorm.weight"]


@damaged("megatron golden-megatron", MappingError, "no rule claims decoder.surprise.weight")
def tensor_that_nobody_knows(path: Path) -> None:
    with metadata(path) as state:
        state["state_dict_metadata"]["decoder.surprise.weight"] = state["state_dict_metadata"].pop(
            "decoder.final_layernorm.weight"
        )
        for key in list(state["storage_data"]):
            if key.state["fqn"] == "decoder.final_layernorm.weight":
                info = state["storage_data"].pop(key)
                key.state["fqn"] = "decoder.surprise.weight"
                state["storage_data"][key] = info


@damaged("megatron golden-megatron", UnsafePickleError, "common.pt", "system")
def common_state_that_runs_code(path: Path) -> None:
    torch.save({"args": Runs()}, only(path, "common.pt"))


@damaged("megatron golden-megatron", CheckpointError, "common.pt")
def truncated_common_state(path: Path) -> None:
    cut(only(path, "common.pt"), -100)


@damaged("megatron golden-megatron", CheckpointError, "common.pt", "a dictionary")
def common_state_is_a_list(path: Path) -> None:
    torch.save([1, 2], only(path, "common.pt"))


@damaged("golden-megatron", MappingError, "config")
def no_config_but_an_architecture(path: Path) -> None:
    only(path, "common.pt").unlink()


def arguments(path: Path) -> Any:
    return torchzip.read(only(path, "common.pt"), where="test").load()["args"].state


@damaged("golden-megatron", MappingError, "self_attention.linear_qkv.weight", "shape disagrees")
def arguments_of_another_model(path: Path) -> None:
    from argparse import Namespace

    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "padded_vocab_size", "normalization", "swiglu")
    args = {name: arguments(path)[name] for name in (*sizes, "position_embedding_type", "max_position_embeddings")}
    more = {"num_attention_heads": 4, "num_query_groups": 4, "untie_embeddings_and_output_weights": True}
    torch.save({"args": Namespace(**args, **more)}, only(path, "common.pt"))


# --- both of Megatron's containers: which iteration -------------------------------------------------------------------

BOTH = "megatron golden-megatron megatron-legacy golden-legacy"


def checkpoint(path: Path) -> Path:
    return next(p for p in sorted(path.iterdir()) if p.name == "release" or p.name.startswith("iter_"))


@damaged(BOTH, CheckpointError, "several iterations", "iter_0000099", "name one")
def two_iterations_without_tracker(path: Path) -> None:
    shutil.copytree(checkpoint(path), path / "iter_0000099")
    (path / "latest_checkpointed_iteration.txt").unlink()


@damaged(BOTH, CheckpointError, "latest_checkpointed_iteration.txt", "'twelve'")
def bad_tracker(path: Path) -> None:
    (path / "latest_checkpointed_iteration.txt").write_text("twelve")


@damaged(BOTH, CheckpointError, "latest_checkpointed_iteration.txt", "'²'")
def tracker_with_an_odd_digit(path: Path) -> None:
    (path / "latest_checkpointed_iteration.txt").write_text("²", encoding="utf-8")


@damaged(BOTH, CheckpointError, "latest_checkpointed_iteration.txt", "'77'", "names no checkpoint")
def tracker_of_an_absent_iteration(path: Path) -> None:
    (path / "latest_checkpointed_iteration.txt").write_text("77\n")


@damaged(BOTH, CheckpointError, "latest_checkpointed_iteration.txt")
def tracker_of_bytes(path: Path) -> None:
    (path / "latest_checkpointed_iteration.txt").write_bytes(bytes(range(128, 256)) * 1000)


@damaged("megatron megatron-legacy", CheckpointError, "registry.json", "JSON")
def bad_manifest(path: Path) -> None:
    only(path, "registry.json").write_text("{")


@damaged("megatron megatron-legacy", CheckpointError, "config.json", "JSON")
def bad_carried_config(path: Path) -> None:
    only(path, "config.json").write_text("{")


# --- Megatron, a file of every rank -----------------------------------------------------------------------------------


@damaged("megatron-legacy golden-legacy", CheckpointError, "files of some ranks are missing", "mp_rank_01_000")
def missing_rank(path: Path) -> None:
    shutil.rmtree(only(path, "mp_rank_01_000"))


@damaged("megatron-legacy golden-legacy", CheckpointError, "files of some ranks are missing", "mp_rank_01_001")
def rank_without_its_file(path: Path) -> None:
    only(path, "mp_rank_01_001/*.pt").unlink()


@damaged("megatron-legacy golden-legacy", CheckpointError, "mp_rank_01_001", "zip")
def truncated_rank(path: Path) -> None:
    cut(only(path, "mp_rank_01_001/*.pt"), -1000)


@damaged("megatron-legacy golden-legacy", CheckpointError, "mp_rank_01_001")
def empty_rank(path: Path) -> None:
    cut(only(path, "mp_rank_01_001/*.pt"), 0)


@damaged("megatron-legacy", UnsafePickleError, "mp_rank_01_001", "posix.system")
def rank_that_runs_code(path: Path) -> None:
    with rank(path, "mp_rank_01_001") as state:
        state["rng_state"] = Runs()


@damaged("megatron-legacy golden-legacy", CheckpointError, "mp_rank_00_000", "a dictionary")
def rank_with_a_list(path: Path) -> None:
    torch.save([1], only(path, "mp_rank_00_000/*.pt"))


@damaged("megatron-legacy golden-legacy", CheckpointError, "mp_rank_01_001", "the file holds no model")
def rank_without_a_model(path: Path) -> None:
    torch.save({"iteration": 3}, only(path, "mp_rank_01_001/*.pt"))


@damaged("megatron-legacy", MappingError, "mp_rank_00_001", "mp_rank_01_001", "final_layernorm", "differ")
def replicas_of_a_norm_differ(path: Path) -> None:
    with rank(path, "mp_rank_01_001") as state:
        state["model"]["decoder.final_layernorm.weight"][3] += 1


@damaged("megatron-legacy", CheckpointError, "files of some ranks are missing", "8 ranks", "mp_rank_02_000")
def arguments_with_more_ranks(path: Path) -> None:
    for name in rank_names(path):
        with rank(path, name) as state:
            state["args"].tensor_model_parallel_size = 4


@damaged("megatron-legacy", CheckpointError, "mp_rank_00_000", "lacks the expert rank", "ep 2")
def arguments_with_experts(path: Path) -> None:
    for name in rank_names(path):
        with rank(path, name) as state:
            state["args"].expert_model_parallel_size = 2


@damaged("megatron-legacy golden-legacy", CheckpointError, "two directories of one rank", "mp_rank_00_000_000")
def directory_of_another_layout(path: Path) -> None:
    first = only(path, "mp_rank_00_000")
    shutil.copytree(first, first.with_name("mp_rank_00_000_000"))


@damaged("megatron-legacy", CheckpointError, "mp_rank_00_000", "before megatron-core", "language_model")
def model_from_before_megatron_core(path: Path) -> None:
    for name in rank_names(path):
        with rank(path, name) as state:
            state["model"] = {"language_model": {"encoder": {"layers.0.input_norm.weight": torch.ones(2)}}}


@damaged("megatron-legacy", MappingError, "no rule claims decoder.layers.1.self_attention.surprise.weight [2]")
def unknown_tensor_on_a_rank(path: Path) -> None:
    with rank(path, "mp_rank_01_001") as state:
        state["model"]["decoder.layers.1.self_attention.surprise.weight"] = torch.ones(2)


@damaged("megatron-legacy", MappingError, "self_attention.linear_qkv.weight")
def missing_tensor_on_a_rank(path: Path) -> None:
    with rank(path, "mp_rank_01_001") as state:
        del state["model"]["decoder.layers.1.self_attention.linear_qkv.weight"]


@damaged("megatron-legacy", MappingError, "self_attention.linear_qkv.weight", "shape disagrees")
def wrong_shape_on_a_rank(path: Path) -> None:
    with rank(path, "mp_rank_01_001") as state:
        name = "decoder.layers.1.self_attention.linear_qkv.weight"
        state["model"][name] = state["model"][name][:-1].clone()


# --- TensorRT-LLM -----------------------------------------------------------------------------------------------------

RANKS = "trtllm golden-trtllm"


@damaged(RANKS, CheckpointError, "missing rank2.safetensors", "4 files for tp_size 2 x pp_size 2")
def missing_rank_file(path: Path) -> None:
    (path / "rank2.safetensors").unlink()


@damaged(RANKS, CheckpointError, "missing rank0.safetensors", "4 files")
def missing_first_rank_file(path: Path) -> None:
    (path / "rank0.safetensors").unlink()


@damaged(RANKS, CheckpointError, "extra rank4.safetensors", "4 files")
def extra_rank_file(path: Path) -> None:
    shutil.copy(path / "rank0.safetensors", path / "rank4.safetensors")


@damaged(RANKS, CheckpointError, "8 files for tp_size 4 x pp_size 2", "missing rank4.safetensors")
def mapping_of_more_ranks(path: Path) -> None:
    with edit(path / "config.json") as config:
        config["mapping"]["tp_size"] = 4


@damaged(RANKS, MappingError, "transformer.layers.{0..1}.attention.dense.weight", "(64, 16)", "(64, 32)")
def mapping_of_another_split(path: Path) -> None:
    with edit(path / "config.json") as config:
        config["mapping"] |= {"tp_size": 4, "pp_size": 1}


for title, value in {"zero": 0, "text": "2", "huge": 1 << 40, "none": None, "true": True}.items():

    def mapping_is_absurd(path: Path, value: Any = value) -> None:
        with edit(path / "config.json") as config:
            config["mapping"]["tp_size"] = value

    mapping_is_absurd.__name__ = f"mapping_is_{title}"
    damaged("trtllm", CheckpointError, "config.json", "tp_size", repr(value))(mapping_is_absurd)


@damaged(RANKS, CheckpointError, "config.json", "missing")
def no_config_beside_the_ranks(path: Path) -> None:
    (path / "config.json").unlink()


@damaged(RANKS, CheckpointError, "rank1.safetensors", "the file ends before its last tensor")
def truncated_rank_file(path: Path) -> None:
    cut(path / "rank1.safetensors", -10)


@damaged("trtllm-replicas", MappingError, "attention.k.weight differ", "rank2.safetensors", "rank3.safetensors")
def replicas_of_kv_heads_differ(path: Path) -> None:
    with tensors(path / "rank3.safetensors") as held:
        held["transformer.layers.2.attention.qkv.weight"][8:16] += 1  # rows of q, then those of k


@damaged(RANKS, MappingError, "rank0.safetensors", "rank1.safetensors", "input_layernorm", "differ")
def replicas_of_a_norm_file_differ(path: Path) -> None:
    with tensors(path / "rank1.safetensors") as held:
        held["transformer.layers.1.input_layernorm.weight"][0] += 1


@damaged(RANKS, MappingError, "transformer.layers.1.mlp.fc.weight", "shape disagrees")
def wrong_shape_in_a_rank_file(path: Path) -> None:
    with tensors(path / "rank1.safetensors") as held:
        held["transformer.layers.1.mlp.fc.weight"] = held["transformer.layers.1.mlp.fc.weight"][1:].clone()


@damaged(RANKS, MappingError, "transformer.layers.1.mlp.fc.weight")
def missing_tensor_in_a_rank_file(path: Path) -> None:
    with tensors(path / "rank1.safetensors") as held:
        del held["transformer.layers.1.mlp.fc.weight"]


@damaged(RANKS, MappingError, "transformer.layers.1.mlp.router.weight: by the config there is none here")
def unknown_tensor_in_a_rank_file(path: Path) -> None:
    with tensors(path / "rank1.safetensors") as held:
        held["transformer.layers.1.mlp.router.weight"] = torch.ones(4)


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_damage(case: Case, bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shutil.copytree(bases[case.base], tmp_path / "damaged" / "source")
    case.damage(source)
    error = refused(source, full_target(tmp_path), capsys, **NEEDS.get(case.base, {}), **case.arguments)
    assert type(error) is case.kind
    for text in case.says:
        assert text in str(error), f"{text!r} is not in: {error}"
    assert not Path("/tmp/a-pickle-was-run").exists()


def test_undamaged(bases: Bases, tmp_path: Path) -> None:
    """The checkpoints are valid: it is the damage that is refused."""
    for name, source in bases.items():
        registry.convert(source, tmp_path / name, to="huggingface", durable=False, **NEEDS.get(name, {}))


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        ("absent", CheckpointError, ["no such checkpoint", "absent"]),
        ("file", CheckpointError, ["a checkpoint is a directory", "file"]),
        ("empty", DetectionError, ["no known format fits", "empty", "nothing"]),
        ("a\0b", CheckpointError, ["a"]),
        ("a" * 300, CheckpointError, ["aaa"]),
        ("zz://bucket/model", CheckpointError, ["zz://bucket/model", "zz"]),
        ("meta-llama/Llama-3.1-8B", CheckpointError, ["no such checkpoint", "meta-llama/Llama-3.1-8B"]),
    ],
    ids=["absent", "file", "empty", "null", "long", "url", "hub"],
)
def test_source_is_no_checkpoint(
    source: str, kind: type[RegistryError], says: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("weights")
    local = source in ("absent", "file", "empty")
    error = refused(tmp_path / source if local else source, full_target(tmp_path), capsys)
    assert type(error) is kind
    assert all(text in str(error) for text in says), str(error)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("absent", ["absent"]),
        ("bad.json", ["bad.json", "JSON"]),
        ("list.json", ["list.json"]),
        ("empty", ["config.json"]),
    ],
)
def test_config_of_the_user(
    config: str, says: list[str], bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    error = refused(bases["golden-megatron"], full_target(tmp_path), capsys, config=tmp_path / config)
    assert type(error) is CheckpointError
    assert all(text in str(error) for text in says), str(error)


def test_nothing_says_what_model_it_is(bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shutil.copytree(bases["golden-megatron"], tmp_path / "source")
    error = refused(source, full_target(tmp_path), capsys)
    assert type(error) is DetectionError
    assert "llama, mistral" in str(error) and "architecture=" in str(error)
    only(source, "common.pt").unlink()
    error = refused(source, full_target(tmp_path / "2"), capsys)
    assert type(error) is DetectionError
    assert "config=" in str(error)


def test_links_lead_nowhere_else(bases: Bases, tmp_path: Path) -> None:
    """No link in a stranger's checkpoint carries a file of ours into the target. The hub's cache is made of links."""
    secret = tmp_path / "secret.json"
    secret.write_text("a secret")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "4d7a"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(bases["single"].iterdir())):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (blobs / "tokenizer").write_text("a tokenizer")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/tokenizer")
    (snapshot / "secret.json").symlink_to(secret)
    (snapshot / "special.json").symlink_to("/dev/zero")
    (snapshot / "loop.json").symlink_to("loop.json")
    (snapshot / "dangling.json").symlink_to("../../blobs/absent")
    report = registry.convert(snapshot, tmp_path / "out", to="huggingface", durable=False)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "a tokenizer"
    carried = contents(tmp_path / "out").keys() - {manifest.NAME}
    assert carried == contents(bases["single"]).keys() | {"tokenizer.json"}
    assert "left behind: secret.json" in report.notes


# --- arguments --------------------------------------------------------------------------------------------------------

P = registry.Parallel


@pytest.mark.parametrize(
    ("to", "parallel", "kind", "says"),
    [
        ("megatron", P(tp=3), ParallelError, ["linear_proj.weight", "linear_fc1.weight", "size 160 over 3 ranks"]),
        ("megatron", P(tp=64), ParallelError, ["linear_fc1.weight", "size 160 over 64 ranks"]),
        ("megatron-legacy", P(tp=3), ParallelError, ["linear_fc2.weight", "size 160 over 3 ranks"]),
        ("trtllm", P(tp=3), ParallelError, ["attention.qkv.weight", "mlp.fc.weight", "size 160 over 3 ranks"]),
        ("trtllm", P(tp=16), ParallelError, ["attention.qkv.weight", "size 8 over 16 ranks"]),
        ("megatron", P(pp=3), ParallelError, ["4 layers", "--pp 2,1,1"]),
        ("megatron", P(pp=2, vpp=4), ParallelError, ["4 layers", "8"]),
        ("trtllm", P(pp=8), ParallelError, ["4 layers", "8"]),
        ("megatron", P(pp=[3, 2]), ParallelError, ["4 layers", "[3, 2]"]),
        ("megatron-legacy", P(pp=[1, 1]), ParallelError, ["4 layers", "[1, 1]"]),
    ],
    ids=str,
)
def test_parallel_layout_does_not_fit(
    to: str, parallel: registry.Parallel, kind: type[RegistryError], says: list[str], bases: Bases, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    error = refused(bases["single"], full_target(tmp_path), capsys, to=to, parallel=parallel)
    assert type(error) is kind
    assert all(text in str(error) for text in says), str(error)


def test_kv_heads_neither_divide_nor_are_divided(
    hf_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """6 query heads on 3 ranks, but 2 KV heads: neither can be cut nor repeated."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=96,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    error = refused(tmp_path / "source", full_target(tmp_path), capsys, to="trtllm", parallel=P(tp=3))
    assert type(error) is ParallelError
    assert "attention.qkv.weight" in str(error) and "size 2 over 3 ranks" in str(error)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"to": "gguf"}, ["gguf", "registry.formats()"]),
        ({"to": "megatron", "dtype": "float17"}, ["float17", "bfloat16"]),
        ({"to": "megatron", "dtype": "int8"}, ["int8"]),
        ({"to": "megatron", "options": {"layers": "piled", "nope": 1}}, ["piled", "stacked", "nope"]),
        ({"to": "megatron", "architecture": "llamma"}, ["llamma", "llama"]),
    ],
)
def test_other_arguments(arguments: dict[str, Any], says: list[str], bases: Bases, tmp_path: Path) -> None:
    target = full_target(tmp_path)
    before = contents(tmp_path)
    with pytest.raises((ArgumentError, DetectionError)) as caught:
        registry.convert(bases["single"], target, overwrite=True, **arguments)
    assert all(text in str(caught.value) for text in says), str(caught.value)
    assert contents(tmp_path) == before


def test_every_bad_size_is_listed() -> None:
    with pytest.raises(ArgumentError) as caught:
        registry.Parallel(tp=0, pp="2", ep=-1, cp=1.5)  # type: ignore[arg-type]
    assert all(name in str(caught.value) for name in ("tp", "pp", "ep", "cp"))
    assert len(caught.value.details) == 4


# --- containers -------------------------------------------------------------------------------------------------------


def test_one_suffix_is_the_pipeline_or_the_experts() -> None:
    """mp_rank_00_001 says either; the arguments decide."""
    container = catalog.container("torch_ranks")
    experts = container.open(golden("megatron/mixtral/tp1pp1ep2_torch"), "megatron-legacy")
    assert {(piece.rank.pp, piece.rank.ep) for piece in experts.pieces if piece.rank} == {(0, 0), (0, 1)}
    stages = container.open(golden("megatron/llama/tp2pp2_torch"), "megatron-legacy")
    assert {(piece.rank.pp, piece.rank.ep) for piece in stages.pieces if piece.rank} == {(0, 0), (1, 0)}


# --- anything else ----------------------------------------------------------------------------------------------------

FUZZED = {
    "single": ["config.json", "model.safetensors"],
    "hf": ["model.safetensors.index.json"],
    "megatron": [".metadata", "common.pt", "registry.json", "__0_0.distcp"],
    "golden-megatron": [".metadata", "common.pt"],
    "megatron-legacy": ["model_optim_rng.pt"],
    "trtllm": ["config.json", "rank1.safetensors", "registry.json"],
}


@pytest.mark.parametrize(("base", "name"), [(base, name) for base, names in FUZZED.items() for name in names])
def test_random_damage(base: str, name: str, bases: Bases, tmp_path: Path) -> None:
    """Bytes changed, cut out and doubled near the start and the end: a plan, or an error of ours, and soon."""
    source, out = shutil.copytree(bases[base], tmp_path / "source"), tmp_path / "out"
    file = only(source, name)
    good = file.read_bytes()
    draw = random.Random(name)
    for _ in range(int(os.environ.get("FUZZ_ROUNDS", "25"))):
        raw = bytearray(good)
        for _ in range(draw.choice([1, 1, 3])):
            near = min(len(raw) - 1, int(draw.expovariate(1 / 1500)))
            at = near if draw.random() < 0.7 else len(raw) - 1 - near
            match draw.randrange(4):
                case 0:
                    raw[at] = draw.randrange(256)
                case 1:
                    raw[at] ^= 1 << draw.randrange(8)
                case 2:
                    del raw[at : at + draw.choice([1, 8, 100])]
                case 3:
                    raw[at:at] = raw[at : at + draw.choice([1, 8, 100])]
        file.write_bytes(raw)
        start = time.process_time()
        try:
            registry.convert(source, out, to="megatron", overwrite=True, durable=False, **NEEDS.get(base, {}))
        except RegistryError as error:
            assert str(error)
        except BaseException:
            (tmp_path / "culprit").write_bytes(raw)
            raise
        assert time.process_time() - start < 2

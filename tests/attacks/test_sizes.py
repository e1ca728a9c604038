"""Configs, arguments and metadata that ask for models of absurd sizes, or are of a type that nobody expects."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import registry
from formats import pickles, safetensors_file, torch_dcp, torch_dist, torch_ranks
from registry.errors import CheckpointError, DetectionError, MappingError
from registry.storage import Opened, Rank
from tests.attacks.bounded import archive, attack, cases, written
from tests.attacks.test_paths import CONFIG, DCP, TENSORS, model

ABSURD: dict[str, Any] = {
    "of_a_trillion": 10**12, "of_two_to_the_63": 1 << 63, "of_sixty_digits": 10**59, "negative": -1, "real": 2.5,
    "of_text": "8", "none": None, "a_list": [8], "an_object": {"a": 1}, "true": True, "of_1e300": 1e300,
}  # fmt: skip
FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size", "head_dim")

for field in FIELDS:
    for title, value in ABSURD.items():
        if (field, title) in {("head_dim", "none"), ("num_hidden_layers", "real")}:
            continue  # the first is said by other fields; the second is another class of error

        def size(folder: Path, field: str = field, value: Any = value) -> Callable[[], object]:
            source = model(folder / "source")
            written(source / "config.json", json.dumps({**CONFIG, "num_hidden_layers": 1, field: value}))
            return lambda: registry.convert(source, folder / "target", to="megatron", durable=False)

        size.__name__ = f"{field}_{title}"
        attack(MappingError)(size)


@attack(DetectionError, "source", "no known architecture fits", "and ", " more")
def a_long_text_that_every_architecture_complains_of(folder: Path) -> Callable[[], object]:
    config = {k: v for k, v in CONFIG.items() if k not in ("model_type", "architectures")}
    source = model(folder / "source")
    written(source / "config.json", json.dumps({**config, "num_hidden_layers": "x" * 10_000}))
    return lambda: registry.convert(source, folder / "target", to="megatron", durable=False)


TENSOR_NAMES = {
    "ten_thousand_characters": "x" * 10_000,
    "a_null_character": "model.layers.0\0.x",
    "a_layer_of_a_trillion": "model.layers.1000000000000.mlp.down_proj.weight",
    "a_layer_of_five_thousand_digits": "layers." + "9" * 5000,
}
for title, tensor_name in TENSOR_NAMES.items():

    def tensor_of(folder: Path, name: str = tensor_name) -> Callable[[], object]:
        head, _, size = safetensors_file.layout([*TENSORS, (name, "float32", (1,))], None)
        source = model(folder / "source")
        written(source / "model.safetensors", head + bytes(size - len(head)))
        return lambda: registry.open(source)

    tensor_of.__name__ = f"tensor_of_{title}"
    attack(CheckpointError, "source", "a tensor of an absurd name")(tensor_of)


@attack(MappingError, "model.layers.999999999.mlp.down_proj.weight")
def a_layer_of_a_billion(folder: Path) -> Callable[[], object]:
    name = "model.layers.999999999.mlp.down_proj.weight"
    head, _, size = safetensors_file.layout([*TENSORS, (name, "float32", (1,))], None)
    source = model(folder / "source")
    written(source / "model.safetensors", head + bytes(size - len(head)))
    return lambda: registry.open(source)


def metadata(folder: Path, size: Any, chunks: Any, items: int = 1, **state: Any) -> Callable[[], object]:
    tensor = pickles.Global(DCP, "TensorStorageMetadata").new(state={"size": size, "chunks": chunks})
    info = pickles.Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    index = pickles.Global(DCP, "MetadataIndex")
    stored = {
        index.new(state={"fqn": "a", "offset": pickles.Size((i,)), "index": None}): info.new(
            state={"relative_path": "__0_0.distcp", "offset": 0, "length": 4}
        )
        for i in range(items)
    }
    found = {"state_dict_metadata": {"a": tensor}, "storage_data": stored, "planner_data": None} | state
    written(folder / ".metadata", pickles.dumps(pickles.Global(DCP, "Metadata").new(state=found), protocol=2))
    written(folder / "__0_0.distcp", "none")
    return lambda: torch_dcp.Container().open(folder, "dcp")


def chunk(offsets: Any, sizes: Any) -> pickles.Call:
    return pickles.Global(DCP, "ChunkStorageMetadata").new(state={"offsets": offsets, "sizes": sizes})


CHUNKS: dict[str, tuple[Any, Any]] = {
    "beyond_its_tensor": (pickles.Size((4,)), [chunk(pickles.Size((4,)), pickles.Size((1,)))]),
    "of_two_to_the_63": (pickles.Size((1 << 63,)), [chunk(pickles.Size((0,)), pickles.Size((1 << 63,)))]),
    "of_other_dimensions": (pickles.Size((4,)), [chunk(pickles.Size((0, 0)), pickles.Size((4, 4)))]),
    "without_a_place": (pickles.Size((1 << 40,)), [chunk(pickles.Size((1 << 39,)), pickles.Size((1,)))]),
    "negative": (pickles.Size((4,)), [chunk((-1,), (1,))]),
    "no_chunk": (pickles.Size((4,)), ["a chunk"]),
    "no_list": (pickles.Size((4,)), 7),
    "a_size_of_text": ("four", [chunk(pickles.Size((0,)), pickles.Size((1,)))]),
    "no_archive": (pickles.Size((4,)), [chunk(pickles.Size((0,)), pickles.Size((4,)))]),
}
for title, (whole, parts) in CHUNKS.items():

    def chunks(folder: Path, whole: Any = whole, parts: Any = parts) -> Callable[[], object]:
        return metadata(folder / "source", whole, parts)

    chunks.__name__ = f"chunk_{title}"
    attack(CheckpointError)(chunks)

STATES: dict[str, dict[str, Any]] = {
    "tensors_are_a_list": {"state_dict_metadata": []},
    "tensors_by_number": {"state_dict_metadata": {7: 1}},
    "tensors_by_tuple": {"state_dict_metadata": {("a", 1): 1}},
    "places_are_text": {"storage_data": "x"},
    "places_of_text": {"storage_data": {"a": "b"}},
    "places_of_none": {"storage_data": {None: None}},
}
for title, state in STATES.items():

    def stated(folder: Path, state: dict[str, Any] = state) -> Callable[[], object]:
        return metadata(folder / "source", pickles.Size((1,)), [], **state)

    stated.__name__ = f"metadata_{title}"
    attack(CheckpointError)(stated)


@attack(CheckpointError, ".metadata", "not a pickle")
def a_metadata_of_holes(folder: Path) -> Callable[[], object]:
    run = metadata(folder / "source", pickles.Size((1,)), [])
    written(folder / "source" / ".metadata", "")
    os.truncate(folder / "source" / ".metadata", 1 << 30)
    return run


@attack(CheckpointError, ".metadata", "too large")
def a_metadata_of_terabytes(folder: Path) -> Callable[[], object]:
    run = metadata(folder / "source", pickles.Size((1,)), [])
    os.truncate(folder / "source" / ".metadata", 1 << 40)
    return run


# What lies beside a model of Megatron's, and is of another form than anybody expects.


def rank_file(folder: Path, state: dict[str, Any]) -> Callable[[], Opened]:
    written(folder / "mp_rank_00" / "model_optim_rng.pt", archive(pickles.dumps(state, protocol=2)))

    def run() -> Opened:
        opened = torch_ranks.Container().open(folder, "megatron-legacy")
        assert opened.training is not None and opened.module_states is not None
        opened.training(None)
        opened.training(Rank())
        opened.module_states()
        return opened

    return run


NAMESPACE = pickles.Global("argparse", "Namespace")
RANK_STATES: dict[str, dict[str, Any]] = {
    "no_model": {"args": NAMESPACE.new(state={})},
    "model_is_text": {"model": "x"},
    "model_is_a_name": {"model": pickles.Global("torch", "float32")},
    "ranks_without_end": {
        "model": {}, "args": NAMESPACE.new(state={"tensor_model_parallel_size": 1 << 19,
                                                  "pipeline_model_parallel_size": 1 << 19}),
    },
    "an_array_of_nothing": {
        "model": {}, "rng_state": pickles.Global("numpy.core.multiarray", "_reconstruct").call(state=(1, "x", 2, 3, 4))
    },
    "a_random_state_that_is_no_array": {
        "model": {}, "rng_state": pickles.Global("numpy.core.multiarray", "scalar").call(1, 2)},
    "keys_that_cannot_be": {"model": {}, "rng_state": {NAMESPACE.call(1): 1}},
}  # fmt: skip
for title, state in RANK_STATES.items():

    def ranked(folder: Path, state: dict[str, Any] = state) -> Callable[[], object]:
        return rank_file(folder / "source", state)

    ranked.__name__ = f"rank_{title}"
    attack(CheckpointError, "source")(ranked)


def test_odd_state_that_is_no_harm_is_read(tmp_path: Path) -> None:
    """Parameter groups and states of every odd type are passed over where nothing has to be known of them."""
    name = pickles.Global("torch", "float32")
    odd: list[Any] = [None, 7, "x", [], [7], {}, {"a": 1}, name, name.call(1), (1, 2)]
    for i, value in enumerate(odd):
        for key in ("optimizer", "opt_param_scheduler", "args", "rng_state", "iteration"):
            opened = rank_file(tmp_path / f"{i}{key}", {"model": {}, key: value})()
            assert not opened.pieces
        for key in ("param_groups", "state", "optimizer", "fp32_from_fp16_params"):
            opened = rank_file(
                tmp_path / f"{i}{key}o", {"model": {}, "optimizer": {"param_groups": [{}], key: value}}
            )()  # fmt: skip
            assert not opened.pieces


@attack(CheckpointError, "common.pt", "a dictionary")
def a_common_state_of_text(folder: Path) -> Callable[[], object]:
    metadata(folder, pickles.Size((1,)), [])
    written(folder / "common.pt", archive(pickles.dumps("x", protocol=2)))
    return lambda: torch_dist.Container().open(folder, "megatron")


# TensorRT-LLM.

for title, value in ABSURD.items():

    def mapping(folder: Path, value: Any = value) -> Callable[[], object]:
        source = model(folder / "source", "rank0.safetensors")
        written(source / "config.json", json.dumps({"architecture": "LlamaForCausalLM", "mapping": {"tp_size": value}}))
        return lambda: registry.open(source)

    mapping.__name__ = f"mapping_{title}"
    if title != "negative":  # -1 stands for "not given"
        attack(CheckpointError, "config.json", "tp_size")(mapping)

test_attacks = cases(__name__)

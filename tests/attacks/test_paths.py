"""Names and files that lead elsewhere: out of the directory, into a pipe or a device, or nowhere."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import registry
from formats import pickles, safetensors_file, torch_dcp, torch_dist, torch_ranks
from registry.errors import CheckpointError, DetectionError, RegistryError
from registry.quantization.ranges import Calibration
from tests.attacks.bounded import attack, cases, written

CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 0, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "head_dim": 4,
    "max_position_embeddings": 16, "rope_theta": 1e4,
}  # fmt: skip
TENSORS = [("model.embed_tokens.weight", "float32", (4, 8)), ("model.norm.weight", "float32", (8,))]


def model(folder: Path, weights: str = "model.safetensors") -> Path:
    """The smallest HuggingFace model: an embedding and a norm."""
    head, _, size = safetensors_file.layout(TENSORS, {"format": "pt"})
    written(folder / weights, head + bytes(size - len(head)))
    written(folder / "config.json", json.dumps(CONFIG))
    return folder


def indexed(folder: Path, name: object) -> Path:
    """The same with an index that says the weights are in `name`."""
    model(folder, "model-00001-of-00001.safetensors")
    total = {"total_size": 4 * 40}
    index = {"metadata": total, "weight_map": {tensor: name for tensor, _, _ in TENSORS}}
    written(folder / "model.safetensors.index.json", json.dumps(index))
    return folder


def converting(source: Path) -> Callable[[], object]:
    """A conversion into a target beside the source, which must not be left behind."""
    target = source.parent / "target"

    def run() -> object:
        try:
            return registry.convert(source, target, to="huggingface", durable=False)
        finally:
            assert not target.exists()

    return run


# Names in an index.

NAMES: dict[str, tuple[object, str]] = {
    "a_parent": ("../secret.safetensors", "outside its directory"),
    "a_parent_of_a_parent": ("../../etc/passwd", "outside its directory"),
    "an_absolute_path": ("/etc/passwd", "outside its directory"),
    "a_folder_within": ("sub/model.safetensors", "outside its directory"),
    "a_path_of_windows": ("..\\secret.safetensors", "outside its directory"),
    "a_null_character": ("model\0.safetensors", "outside its directory"),
    "the_directory": (".", "outside its directory"),
    "the_directory_above": ("..", "outside its directory"),
    "nothing": ("", "outside its directory"),
    "ten_thousand_characters": ("x" * 10_000, "outside its directory"),
    "a_number": (7, "outside its directory"),
    "a_url": ("https://example.com/x.safetensors", "outside its directory"),
    "an_escape_code": ("\x1b[2J\x1b]0;owned\x07", "\\x1b[2J"),
}
for title, (name, says) in NAMES.items():

    def index(folder: Path, name: object = name) -> Callable[[], object]:
        written(folder / "secret.safetensors", "secret")
        return converting(indexed(folder / "source", name))

    index.__name__ = f"index_names_{title}"
    attack(CheckpointError, "source", says)(index)

    def metadata(folder: Path, name: object = name) -> Callable[[], object]:
        written(folder / "secret.safetensors", "secret")
        return dcp(folder / "source", relative_path=name)

    metadata.__name__ = f"metadata_names_{title}"
    attack(CheckpointError, "source", says)(metadata)

DCP = "torch.distributed.checkpoint.metadata"


def dcp(folder: Path, key: object = None, **place: Any) -> Callable[[], object]:
    """A `.metadata` of one tensor, of which something is said otherwise."""
    index = pickles.Global(DCP, "MetadataIndex").new(state={"fqn": "a", "offset": pickles.Size((0,)), "index": None})
    info = pickles.Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    stored = {index: info.new(state={"relative_path": "__0_0.distcp", "offset": 0, "length": 4} | place)}
    tensor = pickles.Global(DCP, "TensorStorageMetadata").new(state={"size": pickles.Size((1,)), "chunks": []})
    state = {"state_dict_metadata": {"a": tensor}, "storage_data": stored, "planner_data": None}
    written(folder / ".metadata", pickles.dumps(pickles.Global(DCP, "Metadata").new(state=state), protocol=2))
    return lambda: torch_dcp.Container().open(folder, "dcp")


# What is no plain file, where one is expected.


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


def a_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.chdir(before)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("/nonexistent/x")


KINDS: list[Callable[[Path], None]] = [pipe, device, directory, a_socket, loop, dangling]


def _replaced(path: Path, kind: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    kind(path)


def of_each_kind(
    title: str, error: type[RegistryError], *says: str, kinds: Sequence[Callable[[Path], None]] = KINDS
) -> Callable[[Callable[..., Callable[[], object]]], Callable[..., Callable[[], object]]]:
    """An attack for each kind: what is decorated puts one in the place of a file, and returns what reads it."""

    def register(build: Callable[..., Callable[[], object]]) -> Callable[..., Callable[[], object]]:
        for kind in kinds:

            def one(folder: Path, kind: Callable[[Path], None] = kind) -> Callable[[], object]:
                return build(folder, kind)

            one.__name__ = f"{title}_{kind.__name__}"
            attack(error, *says)(one)
        return build

    return register


@of_each_kind("weights", DetectionError, "source", "no known format fits")
def weights(folder: Path, kind: Callable[[Path], None]) -> Callable[[], object]:
    source = model(folder / "source")
    _replaced(source / "model.safetensors", kind)
    return converting(source)


@of_each_kind("shard", CheckpointError, "model-00001-of-00001.safetensors", "missing")
def shard(folder: Path, kind: Callable[[Path], None]) -> Callable[[], object]:
    source = indexed(folder / "source", "model-00001-of-00001.safetensors")
    _replaced(source / "model-00001-of-00001.safetensors", kind)
    return converting(source)


@of_each_kind("config", DetectionError, "source", "no config")
def config(folder: Path, kind: Callable[[Path], None]) -> Callable[[], object]:
    source = model(folder / "source")
    _replaced(source / "config.json", kind)
    return converting(source)


@of_each_kind("items", CheckpointError, "__0_0.distcp", "missing")
def items(folder: Path, kind: Callable[[Path], None]) -> Callable[[], object]:
    run = dcp(folder / "source")
    _replaced(folder / "source" / "__0_0.distcp", kind)
    return run


@of_each_kind("rank", CheckpointError, "source", "no per-rank Megatron checkpoint")
def rank(folder: Path, kind: Callable[[Path], None]) -> Callable[[], object]:
    _replaced(folder / "source" / "mp_rank_00" / "model_optim_rng.pt", kind)
    return lambda: torch_ranks.Container().open(folder / "source", "megatron-legacy")


@of_each_kind("metadata", CheckpointError, ".metadata", "missing")
def own_metadata(folder: Path, kind: Callable[[Path], None]) -> Callable[[], object]:
    _replaced(folder / "source" / ".metadata", kind)
    written(folder / "source" / "__0_0.distcp", "x")
    return lambda: torch_dist.Container().open(folder / "source", "megatron")


@of_each_kind("calibration", CheckpointError, "ranges.safetensors", "cannot be read")
def calibration(folder: Path, kind: Callable[[Path], None]) -> Callable[[], object]:
    _replaced(folder / "ranges.safetensors", kind)
    return lambda: Calibration(folder / "ranges.safetensors")


@of_each_kind("tracker", CheckpointError, "source", "no tracker file")
def tracker(folder: Path, kind: Callable[[Path], None]) -> Callable[[], object]:
    for iteration in ("iter_0000010", "iter_0000020"):
        written(folder / "source" / iteration / "mp_rank_00" / "model_optim_rng.pt", "x")
    _replaced(folder / "source" / "latest_checkpointed_iteration.txt", kind)
    return lambda: torch_ranks.Container().open(folder / "source", "megatron-legacy")


@of_each_kind("source", DetectionError, "source", kinds=[directory])
@of_each_kind("source", CheckpointError, "source", kinds=[kind for kind in KINDS if kind is not directory])
def source_itself(folder: Path, kind: Callable[[Path], None]) -> Callable[[], object]:
    _replaced(folder / "source", kind)
    return lambda: registry.open(folder / "source")


# Paths that a user gives.

for title, path in {
    "a_null_character": "a\0b",
    "ten_thousand_characters": "x" * 10_000,
    "ten_thousand_folders": "x/" * 10_000,
    "half_a_character": "\udcff\ud800",
    "a_url": "file:///etc/passwd",
}.items():

    def given(folder: Path, path: str = path) -> Callable[[], object]:
        return lambda: registry.open(path)

    given.__name__ = f"source_of_{title}"
    attack(CheckpointError)(given)


# Trackers.

for title, text in {
    "a_parent": "../../../etc",
    "an_absolute_path": "/etc",
    "a_number_without_end": "9" * 100_000,
    "a_negative_number": "-10",
    "digits_of_another_script": "\u0661\u0660",
    "bytes": "\udcff\udcfe",
    "null": "\0",
}.items():

    def names(folder: Path, text: str = text) -> Callable[[], object]:
        for iteration in ("iter_0000010", "iter_0000020"):
            written(folder / "source" / iteration / "mp_rank_00" / "model_optim_rng.pt", "x")
        written(folder / "source" / "latest_checkpointed_iteration.txt", text.encode("utf-8", "surrogateescape"))
        return lambda: torch_ranks.Container().open(folder / "source", "megatron-legacy")

    names.__name__ = f"tracker_of_{title}"
    attack(CheckpointError, "latest_checkpointed_iteration.txt", "names no checkpoint")(names)


@attack(CheckpointError, "absurdly many ranks")
def a_directory_of_a_billionth_rank(folder: Path) -> Callable[[], object]:
    from tests.attacks.bounded import archive

    written(folder / "mp_rank_999999999_999999999" / "model_optim_rng.pt", archive(pickles.dumps({"model": {}})))
    return lambda: torch_ranks.Container().open(folder, "megatron-legacy")


# What is written: nothing outside of the target.


def test_side_files_are_copied_under_plain_names_only(tmp_path: Path) -> None:
    """Links that lead out of the checkpoint, folders and hidden files stay behind."""
    source = model(tmp_path / "source")
    secret = written(tmp_path / "secret.json", "a secret")
    written(source / "tokenizer.json", "a tokenizer")
    written(source / "sub" / "nested.json", "nested")
    written(source / ".hidden", "hidden")
    (source / "link.json").symlink_to(secret)
    (source / "relative.json").symlink_to("../secret.json")
    (source / "passwd").symlink_to("/etc/passwd")
    pipe(source / "pipe.json")
    registry.convert(source, tmp_path / "target", to="huggingface", durable=False)
    names = {path.name for path in (tmp_path / "target").iterdir() if not path.name.startswith(".registry")}
    assert names == {"model.safetensors", "config.json", "tokenizer.json"}
    assert not any(path.is_symlink() for path in (tmp_path / "target").iterdir())


def test_a_link_in_a_target_is_replaced_and_not_followed(tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    precious = written(tmp_path / "precious", "of great value")
    target = tmp_path / "target"
    target.mkdir()
    (target / "model.safetensors").symlink_to(precious)
    (target / "config.json").symlink_to(precious)
    registry.convert(source, target, to="huggingface", overwrite=True, durable=False)
    assert precious.read_text() == "of great value"
    assert not (target / "model.safetensors").is_symlink() and not (target / "config.json").is_symlink()


def test_a_snapshot_of_the_hub_is_read_through_its_links(tmp_path: Path) -> None:
    """`snapshots/<commit>/model.safetensors` is a link to `../../blobs/<hash>`: honest, and read."""
    blobs, snapshot = model(tmp_path / "blobs"), tmp_path / "snapshots" / "4d7a"
    snapshot.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    registry.convert(snapshot, tmp_path / "target", to="huggingface", durable=False)
    assert (tmp_path / "target" / "model.safetensors").read_bytes() == (blobs / "model.safetensors").read_bytes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "."])
def test_what_may_not_be_read(name: str, tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    (source / name).chmod(0)
    with pytest.raises(RegistryError, match="source"):
        registry.open(source)
    (source / name).chmod(0o700)


def test_the_smallest_model_is_honest(tmp_path: Path) -> None:
    """What the attacks damage is read as it is: it is the damage that is refused."""
    registry.convert(model(tmp_path / "a"), tmp_path / "b", to="huggingface", durable=False)
    source = indexed(tmp_path / "c", "model-00001-of-00001.safetensors")
    registry.convert(source, tmp_path / "d", to="huggingface", durable=False)
    for name, came in (("a", "b"), ("c", "d")):
        for path in (tmp_path / name).iterdir():
            assert (tmp_path / came / path.name).read_bytes() == path.read_bytes()


test_attacks = cases(__name__)

"""The manifest beside a checkpoint: right by other programs' sums, and damage anywhere is found and named."""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import registry
from registry import CheckpointError, Parallel
from registry.manifest import NAME

FORMATS = {
    "huggingface": Parallel(),
    "megatron": Parallel(tp=2, pp=2),
    "megatron-legacy": Parallel(tp=2),
    "trtllm": Parallel(tp=2),
    "dcp": Parallel(),
}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model(hf_model: Callable[..., Path]) -> Path:
    return hf_model("llama3", "bfloat16", "100KB")


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("written")
    for to, parallel in FORMATS.items():
        registry.convert(model, folder / to, to=to, parallel=parallel)
    return {to: folder / to for to in FORMATS}


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def rejected(path: Path) -> str:
    """What verify() says of a damaged checkpoint: a result that is false, or an error of ours."""
    try:
        result = registry.verify(path)
    except registry.RegistryError as error:
        return str(error)
    assert not result
    return str(result)


@pytest.mark.parametrize("to", FORMATS)
def test_the_sums_are_those_of_zlib(to: str, written: dict[str, Path]) -> None:
    [path] = written[to].rglob(NAME)
    listed = json.loads(path.read_text())["manifest"]["files"]
    there = {p.relative_to(path.parent).as_posix(): p for p in files(path.parent) if p != path}
    assert listed.keys() == there.keys()
    for name, one in listed.items():
        data = there[name].read_bytes()
        assert one["size"] == len(data) and int(one["crc32"], 16) == zlib.crc32(data)
        for tensor in one["tensors"]:
            part = data[tensor["begin"] : tensor["begin"] + tensor["nbytes"]]
            assert int(tensor["crc32"], 16) == zlib.crc32(part)


@pytest.mark.parametrize("to", ["huggingface", "trtllm"])
def test_tensors_lie_where_safetensors_finds_them(to: str, written: dict[str, Path]) -> None:
    listed = json.loads((written[to] / NAME).read_text())["manifest"]["files"]
    for path in written[to].glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            sums = {
                name: zlib.crc32(opened.get_tensor(name).contiguous().view(torch.uint8).numpy())
                for name in opened.keys()  # noqa: SIM118
            }
        assert sums == {t["name"]: int(t["crc32"], 16) for t in listed[path.name]["tensors"]}


@pytest.mark.parametrize("to", FORMATS)
def test_what_was_written_is_whole(to: str, written: dict[str, Path]) -> None:
    result = registry.verify(written[to])
    assert result and result.files and result.tensors >= 39
    assert "are as the manifest says" in str(result)


@pytest.mark.parametrize("to", FORMATS)
def test_a_flipped_bit_anywhere_is_found(to: str, written: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / to
    shutil.copytree(written[to], damaged)
    draw = random.Random(0)
    for path in files(damaged):
        good = path.read_bytes()
        for at in {0, len(good) - 1, *draw.choices(range(len(good)), k=12)}:
            bad = bytearray(good)
            bad[at] ^= 1 << draw.randrange(8)
            path.write_bytes(bad)
            assert path.name in rejected(damaged), (path, at)
        path.write_bytes(good)
    assert registry.verify(damaged)


def test_file_and_tensor_are_named(written: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(written["megatron"], tmp_path / "m")
    home = tmp_path / "m/release"
    listed = json.loads((home / NAME).read_text())["manifest"]["files"]
    name, tensor = next(
        (name, t) for name, one in listed.items() for t in one["tensors"] if "linear_fc1.weight" in t["name"]
    )
    with (home / name).open("r+b") as file:
        file.seek(tensor["begin"] + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 16]))
    result = registry.verify(tmp_path / "m")
    [difference] = result.differences
    assert difference.tensor == "mlp.gate.weight"  # Megatron stores the halves of linear_fc1 as chunks of their own
    assert str(home / name) in difference.problem and difference.stored == (tensor["name"],)
    assert "remove .registry-manifest.json from" in str(result)
    against = registry.verify(written["megatron"], tmp_path / "m")
    assert not against and name in str(against)


def test_files_that_are_missing_or_cut_or_new(written: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(written["huggingface"], tmp_path / "m")
    (tmp_path / "m/added.txt").write_text("not ours")
    assert registry.verify(tmp_path / "m").notes == ("not in the manifest: added.txt",)
    (tmp_path / "m/generation_config.json").unlink()
    assert "generation_config.json: the file is missing" in rejected(tmp_path / "m")
    assert registry.verify(tmp_path / "m", written["huggingface"])
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[0]
    size = shard.stat().st_size
    os.truncate(shard, size - 8)
    assert f"{size - 8} bytes, not {size}" in rejected(tmp_path / "m")


def test_a_tracker_that_points_nowhere(written: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(written["megatron"], tmp_path / "m")
    (tmp_path / "m/latest_checkpointed_iteration.txt").write_text("rdlease")
    with pytest.raises(CheckpointError, match="tracker"):
        registry.verify(tmp_path / "m")


def test_without_a_manifest(model: Path, written: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="no manifest"):
        registry.verify(model)
    assert registry.verify(model, written["megatron"])


def test_a_manifest_of_each_rank(model: Path, tmp_path: Path) -> None:
    for ranks in ([0], [1], [1, 0], [1]):
        registry.convert(
            model, tmp_path / "m", to="trtllm", parallel=Parallel(tp=2), ranks=ranks, overwrite=True
        )  # fmt: skip
    result = registry.verify(tmp_path / "m")
    assert result and result.files >= 4
    with (tmp_path / "m/rank1.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert "rank1.safetensors" in rejected(tmp_path / "m")


def test_a_manifest_is_not_carried_on(written: dict[str, Path], model: Path, tmp_path: Path) -> None:
    registry.convert(written["huggingface"], tmp_path / "m", to="megatron")
    registry.convert(tmp_path / "m", tmp_path / "back", to="huggingface")
    assert {p.name for p in files(tmp_path / "back")} == {p.name for p in files(model)} | {NAME}
    assert registry.verify(tmp_path / "back")


BODIES = {
    "outside": '{"version":1,"files":{"../x":{"size":1,"crc32":"00000000","tensors":[]}}}',
    "absolute": '{"version":1,"files":{"/etc/passwd":{"size":1,"crc32":"00000000","tensors":[]}}}',
    "huge": '{"version":1,"files":{"a":{"size":9223372036854775808,"crc32":"00000000","tensors":[]}}}',
    "beyond": '{"version":1,"files":{"a":{"size":4,"crc32":"00000000",'
    '"tensors":[{"name":"t","begin":2,"nbytes":4,"crc32":"00000000"}]}}}',
    "overlap": '{"version":1,"files":{"a":{"size":9,"crc32":"00000000",'
    '"tensors":[{"name":"t","begin":2,"nbytes":4,"crc32":"00000000"},'
    '{"name":"u","begin":4,"nbytes":4,"crc32":"00000000"}]}}}',
    "deep": "[" * 100_000,
    "wrong": '{"version":1,"files":[1,2]}',
    "no JSON": "\udcff",
}


@pytest.mark.parametrize("what", BODIES)
def test_a_hostile_manifest(what: str, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "m")
    body = BODIES[what].encode(errors="surrogateescape")
    (tmp_path / "m" / NAME).write_bytes(b'{"crc32": "%08x", "manifest": %s}\n' % (zlib.crc32(body), body))
    with pytest.raises(CheckpointError, match="manifest is damaged") as error:
        registry.verify(tmp_path / "m")
    assert NAME in str(error.value) and error.value.hint


def change(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(file.read(1))
    os.utime(path)


def replace(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


CHANGES: dict[str, Callable[[Path], None]] = {"changed": change, "replaced": replace, "removed": Path.unlink}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", ["model-00001-of-*.safetensors", "config.json", "generation_config.json"])
def test_a_source_that_changes_meanwhile(how: str, name: str, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "m")
    registry.convert(model, tmp_path / "out", to="megatron")
    before = {path: path.read_bytes() for path in files(tmp_path / "out")}
    [path] = (tmp_path / "m").glob(name)
    done = []

    def meddle(at: int, total: int) -> None:
        if not done:
            CHANGES[how](path)
            done.append(at)

    with pytest.raises(CheckpointError, match="changed while it was read") as error:
        registry.convert(tmp_path / "m", tmp_path / "out", to="megatron", overwrite=True, progress=meddle)
    assert path.name in str(error.value)
    assert {path: path.read_bytes() for path in files(tmp_path / "out")} == before
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_a_source_that_changes_during_a_stream(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "m")
    tensors = registry.stream(tmp_path / "m")
    next(tensors)
    change(tmp_path / "m/config.json")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        list(tensors)


def test_new_files_beside_a_source_do_not_matter(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "m")

    def add(at: int, total: int) -> None:
        (tmp_path / "m/notes.txt").write_text(str(at))

    registry.convert(tmp_path / "m", tmp_path / "out", to="trtllm", progress=add)
    assert UP in registry.open(tmp_path / "out").view("huggingface")

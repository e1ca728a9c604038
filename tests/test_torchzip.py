"""torch.save archives without torch, against torch in both directions, and against damaged and hostile files."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from formats import torchzip
from formats.pickles import Global, Persistent, dumps, loads
from formats.torchzip import NewTensor, Skeleton, TensorRef, layout, probe_tensor, read, tensor_item
from registry.dtypes import ITEMSIZE
from registry.errors import CheckpointError, UnsafePickleError
from registry.reading import open_reader, read_all, reading
from tests.goldens import SHARED

GOLDEN = SHARED / "megatron"
SHAPES = ((), (0,), (0, 3), (5,), (2, 3), (1, 2, 3, 4, 300))


def example(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    count = ITEMSIZE[dtype] * torch.Size(shape).numel()
    raw = torch.randint(0, 2 if dtype == "bool" else 255, (count,), dtype=torch.uint8)
    return raw.view(getattr(torch, dtype)).reshape(shape)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def saved(obj: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def filled(skeleton: Skeleton, tensors: list[torch.Tensor]) -> bytes:
    """The archive, with the tensors' bytes and CRCs put in."""
    data = bytearray(b"\xee" * skeleton.size)
    contents = [raw_bytes(tensor) for tensor in tensors]
    places = [(at, raw) for (_, at), raw in zip(skeleton.tensors, contents, strict=True)]
    crcs = {index: zlib.crc32(raw) for index, raw in enumerate(contents)}
    for at, raw in [*skeleton.literals, *places, *skeleton.crc_patches(crcs)]:
        data[at : at + len(raw)] = raw
    return bytes(data)


def opened(data: bytes, tmp_path: Path, **keywords: Any) -> torchzip.Archive:
    path = tmp_path / "file.pt"
    path.write_bytes(data)
    return read(path, where=str(path), **keywords)


def content(ref: TensorRef, file: bytes) -> bytes:
    offset, size = ref.span()
    return file[offset : offset + size]


# reading what torch writes


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_tensors_that_torch_saved(dtype: str, tmp_path: Path) -> None:
    tensors = {shape: example(dtype, shape) for shape in SHAPES}
    data = saved(tensors)
    archive = opened(data, tmp_path)
    assert archive.prefix == "archive"
    refs = archive.load()
    for shape, tensor in tensors.items():
        ref = refs[shape]
        assert (ref.dtype, ref.shape, ref.stride) == (dtype, shape, tensor.stride())
        assert ref.is_contiguous and ref.numel == tensor.numel() and ref.nbytes == ref.extent == tensor.nbytes
        assert content(ref, data) == raw_bytes(tensor)


def test_views_share_a_storage_and_keep_their_strides(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.int16)
    tensors = [base, base[4:10], base.reshape(4, 6).T, base.reshape(4, 6)[1:3, 2:5], base[:1].expand(5), base[::2]]
    data = saved(tensors)
    refs = opened(data, tmp_path).load()
    assert len({ref.storage_key for ref in refs}) == 1
    assert [ref.is_contiguous for ref in refs] == [tensor.is_contiguous() for tensor in tensors]
    for ref, tensor in zip(refs, tensors, strict=True):
        raw = torch.frombuffer(bytearray(content(ref, data)), dtype=torch.int16)
        assert torch.equal(raw.as_strided(ref.shape, ref.stride), tensor)


def test_parameters_and_tensors_with_attributes(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    plain = torch.zeros(3)
    plain.note = "x"  # type: ignore[attr-defined]
    module = torch.nn.Linear(2, 2).state_dict()
    refs = opened(saved([torch.nn.Parameter(torch.ones(2)), parameter, plain, module]), tmp_path).load()
    assert [ref.shape for ref in refs[:3]] == [(2,), (2,), (3,)]
    assert refs[3]["weight"].shape == (2, 2) and list(refs[3]) == ["weight", "bias"]


def test_pending_conjugation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="conjugation"):
        opened(saved(torch.ones(2, dtype=torch.complex64).conj()), tmp_path).load()


def test_a_file_saved_by_name_and_an_archive_inside_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    torch.save({"w": torch.arange(3)}, path)
    archive = read(str(path), where="x")
    assert archive.prefix == "model_optim_rng" and "data/0" in archive.members
    inner = path.read_bytes()
    outer = b"before" + inner + b"after"
    ref = opened(outer, tmp_path, base=6, length=len(inner)).load()["w"]
    assert content(ref, outer) == raw_bytes(torch.arange(3))
    file = open_reader(path)
    assert read(file, where="x").load()["w"].shape == (3,)
    file.close()


# writing what torch reads


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_one_tensor_is_written_byte_for_byte_as_torch_does(dtype: str) -> None:
    for shape in SHAPES:
        tensor = example(dtype, shape)
        real, mine = saved(tensor), filled(tensor_item(dtype, shape), [tensor])
        start = real.index(b".data/serialization_id")
        assert len(mine) == len(real) and mine[:start] == real[:start]
        described = [[_entry(info) for info in zipfile.ZipFile(io.BytesIO(data)).infolist()] for data in (mine, real)]
        assert described[0] == described[1]


def _entry(info: zipfile.ZipInfo) -> tuple[object, ...]:
    crc = None if info.filename.endswith("serialization_id") else info.CRC
    return info.filename, info.header_offset, info.file_size, info.flag_bits, info.extra, crc


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_torch_loads_what_is_written(dtype: str, tmp_path: Path) -> None:
    tensors = [example(dtype, shape) for shape in SHAPES]
    shared = NewTensor(dtype, SHAPES[0])
    leaves = [shared, *(NewTensor(dtype, shape) for shape in SHAPES[1:])]
    skeleton = layout({"list": leaves, "again": shared, "n": 1}, prefix="some")
    assert [tensor for tensor, _ in skeleton.tensors] == leaves
    assert all(at % 64 == 0 for _, at in skeleton.tensors)
    path = tmp_path / "mine.pt"
    path.write_bytes(filled(skeleton, tensors))
    assert zipfile.ZipFile(path).testzip() is None
    for keywords in ({"weights_only": True}, {"weights_only": False}, {"mmap": True}):
        loaded = torch.load(path, **keywords)  # type: ignore[arg-type]
        assert [raw_bytes(tensor) for tensor in loaded["list"]] == [raw_bytes(tensor) for tensor in tensors]
        assert [tensor.shape for tensor in loaded["list"]] == [tensor.shape for tensor in tensors]
        assert loaded["again"].data_ptr() == loaded["list"][0].data_ptr() and loaded["n"] == 1
    refs = read(path, where="x").load()
    assert [content(ref, path.read_bytes()) for ref in refs["list"]] == [raw_bytes(tensor) for tensor in tensors]


def test_many_tensors_with_inert_nodes_around(tmp_path: Path) -> None:
    args = Global("argparse", "Namespace").new(state={"dtype": Global("torch", "bfloat16")})
    tensors = [torch.full((i,), i, dtype=torch.int32) for i in range(300)]
    names = {f"layer.{i}": NewTensor("int32", (i,)) for i in range(300)}
    path = tmp_path / "mine.pt"
    path.write_bytes(filled(layout({"args": args, "model": names}), tensors))
    loaded = torch.load(path, weights_only=False)
    assert loaded["args"].dtype is torch.bfloat16
    assert all(torch.equal(loaded["model"][f"layer.{i}"], tensors[i]) for i in range(300))
    with torch.serialization.safe_globals([type(loaded["args"])]):
        assert torch.load(path, weights_only=True)["args"].dtype is torch.bfloat16


def test_offsets_that_torch_computes_without_reading_are_ours(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    tensors = [torch.arange(n) for n in (0, 3, 100)]
    path.write_bytes(filled(layout([NewTensor("int64", tuple(t.shape)) for t in tensors]), tensors))
    with torch.utils.serialization.config.patch("load.calculate_storage_offsets", True):  # type: ignore[attr-defined]
        loaded = torch.load(path, mmap=True)
    assert all(map(torch.equal, loaded, tensors))


def test_beyond_4_gib(tmp_path: Path) -> None:
    """A sparse file: only its few literal bytes take room."""
    big, small = NewTensor("uint8", (2**32 + 5,)), NewTensor("float32", (3,))
    skeleton = layout([big, small])
    path = tmp_path / "big.pt"
    patches = skeleton.crc_patches({1: zlib.crc32(raw_bytes(torch.ones(3)))})
    with path.open("wb") as file:
        for at, raw in [*skeleton.literals, (skeleton.tensors[1][1], raw_bytes(torch.ones(3))), *patches]:
            file.seek(at)
            file.write(raw)
    assert path.stat().st_size == skeleton.size
    loaded = torch.load(path, mmap=True)
    assert loaded[0].shape == (2**32 + 5,) and torch.equal(loaded[1], torch.ones(3))
    refs = read(path, where="x").load()
    assert [ref.offset for ref in refs] == [at for _, at in skeleton.tensors]
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == 2**32 + 5
        assert archive.read("archive/data/1") == raw_bytes(torch.ones(3))
    real = tmp_path / "real.pt"
    with torch.serialization.skip_data():
        torch.save([torch.empty(2**32 + 5, dtype=torch.uint8), torch.ones(3)], real)
    named = layout([big, small], prefix="real")
    assert real.stat().st_size == named.size
    assert [ref.offset for ref in read(real, where="x").load()] == [at for _, at in named.tensors]


def test_tensors_that_cannot_be_written() -> None:
    for dtype, shape in (("float7", (1,)), ("float32", (-1,))):
        with pytest.raises(CheckpointError, match="cannot be written"):
            NewTensor(dtype, shape)


# one tensor an item


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_probe_finds_what_the_long_way_finds(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "items.distcp"
    items = [saved(example(dtype, shape)) for shape in SHAPES]
    items += [filled(tensor_item(dtype, shape), [example(dtype, shape)]) for shape in SHAPES]
    path.write_bytes(b"".join(items))
    file = open_reader(path)
    at = 0
    for item in items:
        assert torchzip._parse_head(item[: item.index(b"/data/0FB") + 11 + item[item.index(b"/data/0FB") + 9]])
        found = probe_tensor(file, at, len(item), "items.distcp")
        assert found == read(file, base=at, length=len(item), where="x").load()
        at += len(item)
    file.close()


def test_probe_takes_the_long_way_for_unusual_items(tmp_path: Path) -> None:
    path = tmp_path / "item"
    view = torch.arange(10)[2:4]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, zipfile.ZipFile(io.BytesIO(saved(view))) as real:
        for name in real.namelist():
            archive.writestr(name, real.read(name))
    for data in (saved(view), buffer.getvalue()):
        path.write_bytes(data)
        with reading(path) as file:
            assert content(probe_tensor(file, 0, len(data), "x"), data) == raw_bytes(view)
    path.write_bytes(saved([torch.ones(2)]))
    with reading(path) as file, pytest.raises(CheckpointError, match="not a tensor"):
        probe_tensor(file, 0, file.size, "x")


def test_probe_refuses_what_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "item"
    data = saved(torch.ones(1000))
    path.write_bytes(data)
    with reading(path) as file:
        for base, length in ((0, len(data) + 1), (1, len(data)), (-1, 5), (0, -1), (0, 100), (0, 3000), (2**63, 9)):
            with pytest.raises(CheckpointError, match=r"dir/item"):
                probe_tensor(file, base, length, "dir/item")


def test_goldens_are_read_as_torch_reads_them() -> None:
    files = sorted(GOLDEN.glob("**/model_optim_rng.pt"))
    if not files:
        pytest.skip(f"no golden checkpoints in {GOLDEN}")
    for path in files:
        refs = read(path, where=str(path)).load()
        data = path.read_bytes()
        for name, tensor in _tensors(path).items():
            ref = refs["model"][name]
            assert ref.dtype == str(tensor.dtype).removeprefix("torch.") and ref.shape == tuple(tensor.shape)
            assert ref.is_contiguous and content(ref, data) == raw_bytes(tensor), (path, name)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The model of a golden, as torch loads it; megatron's classes are replaced by ours, which is all it needs."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.startswith("megatron."):
                return Global(module, name)
            return super().find_class(module, name)

    class Module:
        __name__ = "stub"
        Unpickler: Any = None
        load = staticmethod(pickle.load)

    Module.Unpickler = Unpickler
    model = torch.load(path, weights_only=False, pickle_module=Module).get("model", {})
    return {name: value for name, value in model.items() if isinstance(value, torch.Tensor)}


def test_golden_items_are_found_by_the_probe() -> None:
    found = sorted(GOLDEN.glob("llama/tp2pp2/*/.metadata"))
    if not found:
        pytest.skip(f"no golden checkpoints in {GOLDEN}")
    meta = loads(found[0].read_bytes(), where="x")
    infos = {index.state["fqn"]: info.state for index, info in meta.state["storage_data"].items()}
    count = 0
    for fqn, info in infos.items():
        path = found[0].parent / info["relative_path"]
        with reading(path) as file:
            begin, end = info["offset"], info["offset"] + info["length"]
            item = torch.load(io.BytesIO(read_all(file, begin, end)), weights_only=False)
            if isinstance(item, torch.Tensor):
                ref = probe_tensor(file, info["offset"], info["length"], fqn)
                assert content(ref, path.read_bytes()) == raw_bytes(item)
                count += 1
    assert count


# damaged and hostile files


def refused(data: bytes, tmp_path: Path, match: str = "where:") -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(data, tmp_path).load()
    assert "file.pt" in str(caught.value)
    return caught.value


def archive_of(graph: object, tmp_path: Path | None = None, **members: bytes) -> bytes:
    """An archive with a pickle of one's own and 8 bytes in data/0."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", graph if isinstance(graph, bytes) else dumps(graph))
        archive.writestr("archive/data/0", bytes(8))
        for name, raw in members.items():
            archive.writestr(f"archive/{name}", raw)
    return buffer.getvalue()


def tensor_node(storage: Any = None, offset: Any = 0, shape: Any = (2,), stride: Any = (1,), kind: str = "v2") -> Any:
    pid = storage or ("storage", Global("torch", "FloatStorage"), "0", "cpu", 2)
    args = (Persistent(pid) if isinstance(pid, tuple) else pid, offset, shape, stride, False, None)
    if kind == "v3":
        return Global("torch._utils", "_rebuild_tensor_v3").call(*args, Global("torch", "float32"))
    return Global("torch._utils", "_rebuild_tensor_v2").call(*args)


def test_the_hand_made_archive_is_fine_as_such(tmp_path: Path) -> None:
    assert opened(archive_of(tensor_node()), tmp_path).load().shape == (2,)


FLOAT = Global("torch", "FloatStorage")
IMPOSSIBLE = {
    "storage smaller than the shape": tensor_node(shape=(3,)),
    "storage smaller than the stride": tensor_node(stride=(2,)),
    "storage smaller than the offset": tensor_node(offset=1),
    "storage that claims more than its member": tensor_node(("storage", FLOAT, "0", "cpu", 100), shape=(100,)),
    "untyped storage counts bytes": tensor_node(
        ("storage", Global("torch.storage", "UntypedStorage"), "0", "cpu", 4), kind="v3"
    ),
    "negative size": tensor_node(shape=(-2,)),
    "negative stride": tensor_node(stride=(-1,)),
    "negative offset": tensor_node(offset=-1),
    "absurd size": tensor_node(shape=(2**63,), stride=(0,)),
    "absurd product": tensor_node(shape=(2**40, 2**40), stride=(0, 0)),
    "bool size": tensor_node(shape=(True,)),
    "size that is text": tensor_node(shape=("2",)),
    "shape that is no tuple": tensor_node(shape=[2]),
    "more strides than sizes": tensor_node(stride=(1, 1)),
    "missing storage": tensor_node(("storage", FLOAT, "1", "cpu", 2)),
    "storage of unknown type": tensor_node(("storage", Global("torch", "QInt8Storage"), "0", "cpu", 2)),
    "negative storage": tensor_node(("storage", FLOAT, "0", "cpu", -2)),
    "no storage at all": tensor_node("text"),
    "another persistent id": tensor_node(("module", FLOAT, "0", "cpu", 2)),
    "too few arguments": Global("torch._utils", "_rebuild_tensor_v2").call(1),
    "a state for a tensor": Global("torch._utils", "_rebuild_tensor_v2").call(
        *tensor_node().args, state=(None, {"data_offset": 0})
    ),
    "a tensor whose maker is data": Global("torch._tensor", "_rebuild_from_type_v2").call(
        5, Global("torch", "Tensor"), (), None
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_tensor_is_refused(case: str, tmp_path: Path) -> None:
    refused(archive_of(IMPOSSIBLE[case]), tmp_path)


def test_code_in_an_archive_is_refused(tmp_path: Path) -> None:
    error = refused(archive_of(b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R."), tmp_path, r"posix\.system")
    assert isinstance(error, UnsafePickleError)


@pytest.mark.parametrize("graph", [torch.ones(3), {"a": torch.ones(3), "b": [torch.zeros(2)]}])
def test_a_file_cut_anywhere_is_refused(graph: Any, tmp_path: Path) -> None:
    data = saved(graph)
    for end in range(0, len(data), 7):
        refused(data[:end], tmp_path)


def test_a_damaged_file_is_refused_or_harmless(tmp_path: Path) -> None:
    data = saved({"a": torch.ones(3)})
    for at in [*range(0, 90), *range(len(data) - 600, len(data))]:
        for value in (0, 0x7F, 0xFF):
            damaged = data[:at] + bytes([value]) + data[at + 1 :]
            try:
                opened(damaged, tmp_path).load()
            except CheckpointError as error:
                assert "file.pt" in str(error)


def with_entry(data: bytes, name: str, field: int, layout_: str, value: int) -> bytes:
    """`data` with one field of a member's directory entry changed."""
    start = data.index(b"PK\x01\x02")
    at = data.index(name.encode(), start) - 46
    changed = bytearray(data)
    struct.pack_into(layout_, changed, at + field, value)
    return bytes(changed)


def test_hostile_directories_are_refused(tmp_path: Path) -> None:
    data = saved(torch.ones(1000))
    name = "archive/data/0"
    refused(with_entry(data, name, 8, "<H", 0x0801), tmp_path, "encrypted")
    refused(with_entry(data, name, 10, "<H", 8), tmp_path, "compressed")
    refused(with_entry(data, name, 20, "<L", 5), tmp_path, "compressed")
    refused(with_entry(data, name, 42, "<L", 0x7FFFFFFF), tmp_path, "outside")
    refused(with_entry(data, name, 42, "<L", 0xFFFFFFFF), tmp_path, "64-bit")
    refused(with_entry(data, name, 42, "<L", 1), tmp_path, "not where the directory says")
    huge = with_entry(with_entry(data, name, 20, "<L", 0x7FFFFFFF), name, 24, "<L", 0x7FFFFFFF)
    refused(huge, tmp_path, "outside")
    longer = with_entry(with_entry(data, name, 20, "<L", 4100), name, 24, "<L", 4100)
    refused(longer, tmp_path, "overlap")
    twice = data[: (at := data.index(b"PK\x01\x02"))] + data[at:].replace(b"byteorder", b"data.pklx")
    refused(twice, tmp_path, "not where the directory says")


def test_a_64_bit_offset_out_of_this_world(tmp_path: Path) -> None:
    skeleton = layout([NewTensor("uint8", (4,))])
    data = bytearray(filled(skeleton, [torch.ones(4, dtype=torch.uint8)]))
    at = data.index(b"PK\x06\x06")
    for field in (24, 32, 40, 48):  # counts, size and offset of the directory
        for value in (2**63, 2**64 - 1):
            changed = data.copy()
            struct.pack_into("<Q", changed, at + field, value)
            if field != 24:
                refused(bytes(changed), tmp_path)


def test_other_archives_are_refused(tmp_path: Path) -> None:
    def zipped(names: list[str], method: int = zipfile.ZIP_STORED) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name in names:
                archive.writestr(name, b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
        return buffer.getvalue()

    refused(zipped(["archive/data.pkl"], zipfile.ZIP_DEFLATED), tmp_path, "compressed")
    refused(zipped(["a/data.pkl", "b/data.pkl"]), tmp_path, "not a torch.save archive")
    refused(zipped(["readme.txt"]), tmp_path, "not a torch.save archive")
    refused(zipped(["a/data.pkl", "../evil"]), tmp_path, "outside the archive's folder")
    with pytest.warns(UserWarning, match="Duplicate"):
        refused(zipped(["a/data.pkl", "a/data.pkl"]), tmp_path, "same name")
    refused(archive_of([1], byteorder=b"big"), tmp_path, "little-endian")
    refused(b"\x93NUMPY", tmp_path, "not a torch.save archive")
    refused(b"", tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be opened[^\0]*absent"):
        read(tmp_path / "absent", where="absent")
    with pytest.raises(CheckpointError, match=r"cannot be opened[^\0]*not a plain file"):
        read(tmp_path, where="dir")


def test_files_from_before_torch_1_6_say_what_to_do(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.ones(2), buffer, _use_new_zipfile_serialization=False)
    refused(buffer.getvalue(), tmp_path, r"before version 1\.6[^\0]*torch\.save it again")


def test_references_survive_the_way_to_another_process(tmp_path: Path) -> None:
    ref = opened(saved(torch.ones(2)), tmp_path).load()
    assert pickle.loads(pickle.dumps(ref)) == ref

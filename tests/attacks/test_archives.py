"""torch.save archives that lie about what they hold and where."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from formats import pickles, plain, torchzip
from formats.zips import LOCAL
from registry.errors import CheckpointError
from tests.attacks.bounded import archive, attack, cases, written

PLAIN = pickle.dumps({"a": 1}, 2)


def loading(folder: Path, data: bytes) -> Callable[[], object]:
    path = written(folder / "hostile.pt", data)
    return lambda: plain.plain(torchzip.read(path, where=str(path)).load(), path)


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as made:
        for name, content in members:
            made.writestr(name, content)
    return out.getvalue()


def tensor(offset: int, shape: Any, stride: Any, numel: int = 4, storage: bytes = bytes(16)) -> bytes:
    """An archive of one float32 tensor."""
    pid = pickles.Persistent(("storage", pickles.Global("torch", "FloatStorage"), "0", "cpu", numel))
    rebuilt = pickles.Global("torch._utils", "_rebuild_tensor_v2")
    call = rebuilt.call(pid, offset, shape, stride, False, {})
    return archive(pickles.dumps(call, protocol=2), **{"data/0": storage})


def directory(data: bytes, at: int, value: bytes) -> bytes:
    """The archive with some bytes of its first directory entry changed."""
    start = data.index(b"PK\x01\x02")
    return data[: start + at] + value + data[start + at + len(value) :]


# Members.


@attack(CheckpointError, "hostile.pt", "outside the archive's folder", "../x")
def a_member_in_a_parent(folder: Path) -> Callable[[], object]:
    return loading(folder, zipped(("archive/data.pkl", PLAIN), ("../x", b"x")))


@attack(CheckpointError, "hostile.pt", "outside the archive's folder", "/etc/cron.d/x")
def a_member_at_an_absolute_path(folder: Path) -> Callable[[], object]:
    return loading(folder, zipped(("archive/data.pkl", PLAIN), ("/etc/cron.d/x", b"x")))


@attack(CheckpointError, "hostile.pt", "outside the archive's folder")
def a_member_beside_the_folder(folder: Path) -> Callable[[], object]:
    return loading(folder, zipped(("archive/data.pkl", PLAIN), ("other", b"x")))


@attack(CheckpointError, "hostile.pt", "two zip members have the same name")
def a_member_twice(folder: Path) -> Callable[[], object]:
    return loading(folder, zipped(("archive/data.pkl", PLAIN), ("archive/data.pkl", PLAIN)))


@attack(CheckpointError, "hostile.pt", "not a torch.save archive")
def two_pickles(folder: Path) -> Callable[[], object]:
    return loading(folder, zipped(("archive/data.pkl", PLAIN), ("b/data.pkl", PLAIN)))


@attack(CheckpointError, "hostile.pt", "compressed")
def a_zip_bomb(folder: Path) -> Callable[[], object]:
    bomb = zipped(("archive/data.pkl", b"N" * 300_000_000), method=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 400_000
    return loading(folder, bomb)


@attack(CheckpointError, "hostile.pt", "compressed")
def a_bomb_that_says_it_is_stored_in_less(folder: Path) -> Callable[[], object]:
    return loading(folder, directory(archive(PLAIN), 24, struct.pack("<L", 1 << 30)))


@attack(CheckpointError, "hostile.pt", "overlap")
def members_that_overlap(folder: Path) -> Callable[[], object]:
    data = archive(PLAIN)
    size = struct.pack("<2L", len(PLAIN) + 20, len(PLAIN) + 20)
    return loading(folder, directory(data, 20, size))


@attack(CheckpointError, "hostile.pt", "lies outside the file")
def a_member_at_two_to_the_63(folder: Path) -> Callable[[], object]:
    data = archive(PLAIN)
    start = data.index(b"PK\x01\x02")
    name_size, extra = struct.unpack_from("<H", data, start + 28)[0], struct.pack("<2HQ", 1, 8, 1 << 63)
    entry = bytearray(data[start : start + 46 + name_size])
    entry[30:32] = struct.pack("<H", len(extra))
    entry[42:46] = b"\xff" * 4
    rest = data[start + 46 + name_size :]
    end = len(rest) - 22
    size = struct.unpack_from("<L", rest, end + 12)[0] + len(extra)
    rest = rest[: end + 12] + struct.pack("<L", size) + rest[end + 16 :]
    return loading(folder, data[:start] + bytes(entry) + extra + rest)


@attack(CheckpointError, "hostile.pt", "zip directory")
def a_directory_of_a_billion_members(folder: Path) -> Callable[[], object]:
    data = archive(PLAIN)
    end = data.index(b"PK\x05\x06")
    return loading(folder, data[: end + 8] + struct.pack("<2H", 65535, 65535) + data[end + 12 :])


@attack(CheckpointError, "hostile.pt", "zip64 directory")
def a_zip64_directory_beyond_the_file(folder: Path) -> Callable[[], object]:
    data = archive(PLAIN)
    end = data.index(b"PK\x05\x06")
    return loading(folder, data[:end] + struct.pack("<4sLQL", b"PK\x06\x07", 0, 1 << 63, 1) + data[end:])


@attack(CheckpointError, "hostile.pt", "not where the directory says")
def a_header_of_another_name(folder: Path) -> Callable[[], object]:
    return loading(folder, archive(PLAIN).replace(b"archive/data.pkl", b"archive/data.xyz", 1))


@attack(CheckpointError, "hostile.pt", "encrypted")
def an_encrypted_member(folder: Path) -> Callable[[], object]:
    return loading(folder, directory(archive(PLAIN), 8, b"\x01\x00"))


@attack(CheckpointError, "hostile.pt", "not text")
def a_name_that_is_no_text(folder: Path) -> Callable[[], object]:
    return loading(folder, archive(PLAIN).replace(b"archive/byteorder", b"archive/" + b"\xff" * 9))


@attack(CheckpointError, "hostile.pt", "little-endian")
def another_byte_order(folder: Path) -> Callable[[], object]:
    return loading(folder, archive(PLAIN).replace(b"little", b"bigger"))


@attack(CheckpointError, "hostile.pt", "too short")
def an_empty_archive(folder: Path) -> Callable[[], object]:
    return loading(folder, b"PK\x03\x04")


def of_holes(folder: Path, size: int) -> Callable[[], object]:
    """The file has holes: nothing of that size is on the disk, nor must be in memory."""
    local = LOCAL.pack(b"PK\x03\x04", 20, 0, 0, 0, 0, 0, size, size, 16, 0) + b"archive/data.pkl"
    central = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, size, size, 16, 0, 0, 0, 0, 0, 0)
    central += b"archive/data.pkl"
    path = written(folder / "hostile.pt", local)
    with path.open("r+b") as file:
        file.seek(len(local) + size)
        file.write(central + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local) + size, 0))
    return lambda: torchzip.read(path, where=str(path)).load()


@attack(CheckpointError, "hostile.pt", "data.pkl is too large")
def a_pickle_of_two_gigabytes(folder: Path) -> Callable[[], object]:
    return of_holes(folder, 2 << 30)


@attack(CheckpointError, "hostile.pt", "not a pickle")
def a_pickle_of_holes(folder: Path) -> Callable[[], object]:
    return of_holes(folder, 1 << 30)


# Tensors.


@attack(CheckpointError, "hostile.pt", "beyond its storage")
def a_tensor_larger_than_its_storage(folder: Path) -> Callable[[], object]:
    return loading(folder, tensor(0, (1 << 40, 1 << 20), (1 << 20, 1)))


@attack(CheckpointError, "hostile.pt", "impossible shape")
def an_offset_of_two_to_the_63(folder: Path) -> Callable[[], object]:
    return loading(folder, tensor(1 << 63, (2,), (1,)))


@attack(CheckpointError, "hostile.pt", "impossible shape")
def a_negative_size(folder: Path) -> Callable[[], object]:
    return loading(folder, tensor(0, (-1, 4), (4, 1)))


@attack(CheckpointError, "hostile.pt", "impossible shape")
def a_negative_stride(folder: Path) -> Callable[[], object]:
    return loading(folder, tensor(3, (4,), (-1,)))


@attack(CheckpointError, "hostile.pt", "impossible shape")
def a_size_that_is_text(folder: Path) -> Callable[[], object]:
    return loading(folder, tensor(0, ("4",), (1,)))


@attack(CheckpointError, "hostile.pt", "impossible shape")
def a_hundred_thousand_dimensions(folder: Path) -> Callable[[], object]:
    return loading(folder, tensor(0, ((1 << 61) + 1,) * 100_000, (0,) * 100_000))


@attack(CheckpointError, "hostile.pt", "beyond its storage")
def one_number_for_exabytes(folder: Path) -> Callable[[], object]:
    """A stride of nothing: a storage of a few bytes that unfolds to more than all disks hold."""
    return loading(folder, tensor(0, (1 << 61, 1 << 61), (0, 0)))


@attack(CheckpointError, "hostile.pt", "in a row")
def one_number_for_a_gigabyte(folder: Path) -> Callable[[], object]:
    return loading(folder, tensor(0, (1 << 28,), (0,)))


@attack(CheckpointError, "hostile.pt", "beyond its storage")
def a_storage_that_claims_more_than_its_member(folder: Path) -> Callable[[], object]:
    return loading(folder, tensor(0, (1 << 20,), (1,), numel=1 << 20))


@attack(CheckpointError, "hostile.pt", "missing from an archive")
def a_storage_in_another_file(folder: Path) -> Callable[[], object]:
    pid = pickles.Persistent(("storage", pickles.Global("torch", "FloatStorage"), "../../x", "cpu", 1))
    rebuilt = pickles.Global("torch._utils", "_rebuild_tensor_v2").call(pid, 0, (1,), (1,), False, {})
    return loading(folder, archive(pickles.dumps(rebuilt, protocol=2)))


@attack(CheckpointError, "hostile.pt", "element type")
def an_unknown_element_type(folder: Path) -> Callable[[], object]:
    pid = pickles.Persistent(("storage", pickles.Global("torch", "QuantumStorage"), "0", "cpu", 1))
    rebuilt = pickles.Global("torch._utils", "_rebuild_tensor_v2").call(pid, 0, (1,), (1,), False, {})
    return loading(folder, archive(pickles.dumps(rebuilt, protocol=2), **{"data/0": bytes(4)}))


@attack(CheckpointError, "hostile.pt", "tensors of more than the file holds")
def one_storage_in_ten_thousand_tensors(folder: Path) -> Callable[[], object]:
    size = 1_000_000
    pid = pickles.Persistent(("storage", pickles.Global("torch", "FloatStorage"), "0", "cpu", size))
    rebuilt = pickles.Global("torch._utils", "_rebuild_tensor_v2")
    calls = [rebuilt.call(pid, i, (size - i,), (1,), False, {}) for i in range(1000)]
    return loading(folder, archive(pickles.dumps(calls, protocol=2), **{"data/0": bytes(4 * size)}))


@attack(CheckpointError, "hostile.pt", "corrupt")
def an_array_of_another_shape(folder: Path) -> Callable[[], object]:
    kind = pickles.Global("numpy", "dtype").call("f8", False, True)
    kind.state = (3, "<", None, None, None, -1, -1, 0)
    made = pickles.Global("numpy.core.multiarray", "_reconstruct").call(
        pickles.Global("numpy", "ndarray"), (0,), b"b", state=(1, (1 << 62, 4), kind, False, b"12345678")
    )
    return loading(folder, archive(pickles.dumps(made, protocol=2)))


test_attacks = cases(__name__)

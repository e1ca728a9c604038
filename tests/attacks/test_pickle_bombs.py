"""Pickles that overrun the stack, the memory or anybody's patience."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from formats import pickles, torchzip
from registry.errors import CheckpointError, UnsafePickleError
from tests.attacks.bounded import archive, attack, cases, written

PROTO = b"\x80\x04"
N = 200_000


def loading(folder: Path, data: bytes) -> Callable[[], object]:
    path = written(folder / "hostile.pkl", PROTO + data)
    return lambda: pickles.check_tree(pickles.loads(path.read_bytes(), where=str(path)), str(path))


@attack(CheckpointError, "hostile.pkl", "tuples in each other")
def a_key_of_tuples_in_tuples(folder: Path) -> Callable[[], object]:
    return loading(folder, b"})" + b"\x85" * 190_000 + b"K\x01s.")


@attack(CheckpointError, "hostile.pkl", "tuples in each other")
def tuples_in_tuples_by_marks(folder: Path) -> Callable[[], object]:
    return loading(folder, b"(" * N + b"t" * N + b".")


@attack(CheckpointError, "hostile.pkl", "tuples in each other")
def tuples_in_tuples_by_the_memo(folder: Path) -> Callable[[], object]:
    return loading(folder, b")q\x00" + b"0h\x00\x85q\x00" * 50_000 + b".")


@attack(CheckpointError, "hostile.pkl", "nested deeper than 64")
def lists_in_lists(folder: Path) -> Callable[[], object]:
    return loading(folder, b"]" * N + b"a" * (N - 1) + b".")


@attack(CheckpointError, "hostile.pkl", "nested deeper than 64")
def dictionaries_in_dictionaries(folder: Path) -> Callable[[], object]:
    return loading(folder, b"}K\x00" * N + b"}" + b"s" * N + b".")


@attack(CheckpointError, "hostile.pkl", "nested deeper than 64")
def calls_in_calls(folder: Path) -> Callable[[], object]:
    n = 60_000
    return loading(folder, b"ctorch\ndevice\n\x94" + b"h\x00" * (n - 1) + b")R" + b"\x85R" * (n - 1) + b".")


@attack(CheckpointError, "hostile.pkl", "nested deeper than 64")
def states_in_states(folder: Path) -> Callable[[], object]:
    n = 30_000
    return loading(folder, b"cargparse\nNamespace\n\x940" + b"h\x00)\x81" * n + b"b" * (n - 1) + b".")


@attack(CheckpointError, "hostile.pkl", "holds itself")
def a_list_in_itself(folder: Path) -> Callable[[], object]:
    return loading(folder, b"]\x94h\x00a.")


@attack(CheckpointError, "hostile.pkl", "unfolds to far more")
def lists_that_double(folder: Path) -> Callable[[], object]:
    return loading(folder, b"]\x94" + b"".join(b"0](h%ch%ce\x94" % (i, i) for i in range(60)) + b".")


@attack(CheckpointError, "hostile.pkl", "values in keys")
def a_key_that_doubles(folder: Path) -> Callable[[], object]:
    return loading(folder, b"})" + b"".join(b"\x94h%c\x86" % i for i in range(60)) + b"K\x01s.")


@attack(CheckpointError, "hostile.pkl", "values in keys")
def a_key_of_a_thousand_to_the_third(folder: Path) -> Callable[[], object]:
    data = b"}(" + b"K\x01" * 1000 + b"t\x94(" + b"h\x00" * 1000 + b"t\x94(" + b"h\x01" * 1000 + b"tK\x01s."
    return loading(folder, data)


@attack(CheckpointError, "hostile.pkl", "values in keys")
def one_wide_key_time_and_again(folder: Path) -> Callable[[], object]:
    return loading(folder, b"}(" + b"K\x01" * 10_000 + b"t\x940" + b"h\x00K\x01s" * 10_000 + b".")


@attack(CheckpointError, "hostile.pkl", "corrupt", "more than scalars")
def keys_that_are_objects_of_objects(folder: Path) -> Callable[[], object]:
    data = (
        b"}ctorch\ndevice\n\x940h\x00)R\x94" + b"0" + b"".join(b"h\x00h%ch%c\x86R\x940" % (i, i) for i in range(1, 40))
    )
    return loading(folder, data + b"h\x27K\x01s.")


@attack(CheckpointError, "hostile.pkl", "too many objects")
def a_million_lists(folder: Path) -> Callable[[], object]:
    return loading(folder, b"(" + b"]" * 1_000_000 + b"l.")


@attack(CheckpointError, "hostile.pkl", "too many objects")
def ten_million_tuples(folder: Path) -> Callable[[], object]:
    return loading(folder, b")" + b"\x85" * 10_000_000 + b".")


@attack(CheckpointError, "hostile.pkl", "copies of more than")
def copies_of_a_text_as_bytes(folder: Path) -> Callable[[], object]:
    text = b"X" + (500_000).to_bytes(4, "little") + b"a" * 500_000
    copies = b"h\x00h\x01\x8c\x06latin1\x86R" * 20_000
    return loading(folder, b"c_codecs\nencode\n\x94" + text + b"\x94(" + copies + b"l.")


@attack(CheckpointError, "hostile.pkl", "copies of more than")
def copies_of_a_list_as_sets(folder: Path) -> Callable[[], object]:
    numbers = b"(" + b"".join(b"M" + i.to_bytes(2, "little") for i in range(50_000)) + b"l\x94"
    return loading(folder, b"cbuiltins\nset\n\x94" + numbers + b"(" + b"h\x00h\x01\x85R" * 20_000 + b"l.")


@attack(CheckpointError, "hostile.pkl", "cut short")
def a_frame_of_terabytes(folder: Path) -> Callable[[], object]:
    return loading(folder, b"\x95" + (1 << 42).to_bytes(8, "little") + b"N.")


@attack(CheckpointError, "hostile.pkl", "cut short")
def bytes_of_exabytes(folder: Path) -> Callable[[], object]:
    return loading(folder, b"\x8e" + (1 << 62).to_bytes(8, "little") + b"N.")


@attack(CheckpointError, "hostile.pkl", "bad argument")
def a_memo_of_gigabytes(folder: Path) -> Callable[[], object]:
    return loading(folder, b"Nr\xff\xff\xff\x7f.")


@attack(UnsafePickleError, "hostile.pkl", "LONG4")
def a_number_of_a_megabyte(folder: Path) -> Callable[[], object]:
    return loading(folder, b"\x8b" + (1 << 20).to_bytes(4, "little") + b"\x7f" * (1 << 20) + b".")


@attack(CheckpointError, "hostile.pkl", "sizes of a tensor")
def a_size_of_a_hundred_thousand_dimensions(folder: Path) -> Callable[[], object]:
    return loading(folder, b"ctorch\nSize\n(" + b"K\x01" * 100_000 + b"t\x85R.")


@attack(CheckpointError, "hostile.pt", "nested deeper than 64")
def an_archive_of_lists_in_lists(folder: Path) -> Callable[[], object]:
    path = written(folder / "hostile.pt", archive(PROTO + b"]" * N + b"a" * (N - 1) + b"."))
    return lambda: torchzip.read(path, where=str(path)).load()


test_attacks = cases(__name__)

"""The closed pickle codec, against the real unpickler and against hostile pickles."""

from __future__ import annotations

import argparse
import collections
import copy
import enum
import io
import os
import pathlib
import pickle
import random
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pytest
import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from formats import pickle_scan, pickles
from formats.pickle_nodes import Kind, Record
from formats.pickles import Call, Global, InertDict, Persistent, Size, attr, attributes, dumps, loads
from registry.errors import CheckpointError, UnsafePickleError
from tests.goldens import SHARED

GOLDEN = SHARED / "megatron"
PROTOCOLS = (2, 3, 4)


def there_and_back(obj: Any, protocol: int = 2) -> Any:
    """`obj` through the real pickler, our reader, our writer and the real unpickler."""
    return pickle.loads(dumps(loads(pickle.dumps(obj, protocol), where="test"), protocol=protocol))


PLAIN: list[Any] = [
    None,
    True,
    False,
    *(0, 1, -1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63, -(2**2000)),
    *(0.0, -0.0, 1.5, float("inf"), 1e300),
    *("", "text", "\u20ac\U0001f600", "\ud800", "x" * 300),
    *(b"", b"\x00\xff", b"y" * 300, bytearray(b""), bytearray(b"\x80z")),
    *((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [[]], [1], list(range(2500))),
    *({}, {1: 2}, {"a": {"b": [1]}}, {i: str(i) for i in range(2001)}),
    *(set(), {1, 2}, frozenset({3}), 1 + 2j),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data_is_read_as_itself_and_written_back(protocol: int) -> None:
    for value in PLAIN:
        read = loads(pickle.dumps(value, protocol), where="test")
        assert read == value and type(read) is type(value)
        again = pickle.loads(dumps(value, protocol=protocol))
        assert again == value and type(again) is type(value)


def objects() -> list[Any]:
    return [
        argparse.Namespace(a=1, dtype=torch.bfloat16, sig=signal.SIGTERM, path=pathlib.PosixPath("/a/b"), n=[1]),
        types.SimpleNamespace(x=1),
        collections.OrderedDict(a=1, b=2),
        collections.defaultdict(list, a=[1]),
        collections.deque([1, 2, 3]),
        collections.Counter("abca"),
        range(3),
        slice(1, 2, None),
        pathlib.PurePosixPath("x/y"),
        torch.Size([2, 3]),
        torch.Size([]),
        torch.Size([1, 2, 3, 4, 5]),
        torch.device("cpu"),
        [torch.float8_e4m3fn, torch.float32, torch.float32, torch.strided],
        metadata.TensorProperties(torch.bfloat16),
        metadata.MetadataIndex("a", torch.Size([0]), 3),
        planner.WriteItemType.SHARD,
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_come_back_under_the_real_unpickler(protocol: int) -> None:
    for obj in objects():
        again = there_and_back(obj, protocol)
        assert again == obj and type(again) is type(obj)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_comes_back_under_the_real_unpickler(protocol: int) -> None:
    for array in (numpy.arange(6, dtype=numpy.uint32).reshape(2, 3), numpy.float64(1.5), numpy.zeros(0)):
        again = there_and_back(array, protocol)
        assert numpy.array_equal(again, array) and again.dtype == array.dtype
    assert there_and_back(numpy.random.RandomState(3).get_state(), protocol)[1].shape == (624,)


def test_nodes_tell_what_they_are() -> None:
    node = loads(pickle.dumps(argparse.Namespace(hidden=8, dtype=torch.bfloat16)), where="test")
    assert isinstance(node, Call) and node.func is Global("argparse", "Namespace") and node.is_new
    assert attr(node, "hidden") == 8 and attr(node, "absent", None) is None
    assert attr(node, "dtype") is Global("torch", "bfloat16") and attr(node, "dtype").name == "bfloat16"
    assert list(attributes(node)) == ["hidden", "dtype"]
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace[^\0]*absent"):
        attr(node, "absent")
    properties = loads(pickle.dumps(metadata.TensorProperties(torch.float16)), where="test")
    assert attr(properties, "dtype") is Global("torch", "float16")
    assert isinstance(loads(pickle.dumps(torch.Size([2])), where="test"), Size)
    assert isinstance(loads(pickle.dumps(collections.OrderedDict(a=1)), where="test"), InertDict)
    assert attr(loads(pickle.dumps(io.BytesIO(b"abc")), where="test"), "value") == b"abc"


def test_nodes_built_by_hand_are_real_objects_to_the_real_unpickler() -> None:
    place = "torch.distributed.checkpoint.metadata"
    node = Global(place, "MetadataIndex").new(state={"fqn": "w", "offset": Size((0, 1)), "index": None})
    again = pickle.loads(dumps(node))
    assert again == metadata.MetadataIndex("w", [0, 1]) and type(again.offset) is torch.Size
    args = Global("argparse", "Namespace").new(state={"dtype": Global("torch", "float16")})
    assert pickle.loads(dumps(args)) == argparse.Namespace(dtype=torch.float16)
    assert pickle.loads(dumps(Global("signal", "Signals")(15))) is signal.SIGTERM


class _Early(pickle.Pickler):
    """Spells members of enums as Python 3.11.0 to 3.11.3 does (its Lib/enum.py), signals by a name of their module."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, signal.Signals):
            return obj.name
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_members_of_enums_by_name(protocol: int) -> None:
    given = (metadata.TensorProperties(torch.float16), argparse.Namespace(exit_signal=signal.SIGTERM))
    pickled = io.BytesIO()
    _Early(pickled, protocol).dump(given)
    read = loads(pickled.getvalue(), where="test")
    assert attr(read[0], "dtype") is Global("torch", "float16")
    assert pickle.loads(dumps(read, protocol=protocol)) == given


def test_scans_without_possessive_repeats_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of Python before 3.11.5 are not to be relied on."""
    whole = pickle.dumps([PLAIN, {(i, (i,)): [i] * 5 for i in range(9000)}], 2)
    cases = [
        whole,
        pickle.dumps(PLAIN, 4),
        *(whole[:cut] for cut in range(1, len(whole), 997)),
        whole[:500] + b"r" * 99,
    ]

    def found(data: bytes) -> str | bool:
        try:
            return pickle_scan.check_opcodes(data, "test") > 0
        except (CheckpointError, UnsafePickleError) as error:
            return str(error)

    expected = [found(data) for data in cases]
    monkeypatch.setattr(pickle_scan, "POSSESSIVE", False)
    monkeypatch.setattr(pickle_scan, "_MANY", b"{1,4096}")
    pickle_scan._stretch.cache_clear()
    try:
        for data, before in zip(cases, expected, strict=True):
            assert found(data) >= before if isinstance(before, bool) else found(data) == before
    finally:
        pickle_scan._stretch.cache_clear()


def test_nodes_serve_as_keys() -> None:
    index = Global("torch.distributed.checkpoint.metadata", "MetadataIndex")
    one, other = (index.new(state={"fqn": "w", "offset": Size((0,)), "index": i}) for i in (None, 7))
    assert {one: 1}[other] == 1, "the index is a hint, and no part of the identity"
    assert one != index.new(state={"fqn": "v", "offset": Size((0,)), "index": None})
    assert len({Global("m", "E")(1), Global("m", "E")(1), Global("m", "E")(2)}) == 2
    with pytest.raises(TypeError):
        hash(Global("m", "E")([1]))


def test_nodes_can_be_copied_and_sent_to_another_process() -> None:
    node = loads(pickle.dumps(objects()), where="test")
    assert copy.deepcopy(node) == node
    assert pickle.loads(pickle.dumps(node)) == node


VALUES = [None, "new", "known", 0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -1, True, 1.5, (1, "known"), [], {}]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_records_are_written_as_the_nodes_that_they_stand_for(protocol: int) -> None:
    kinds = [Kind(Global("torch", f"Kind{n}"), *(f"name{k}" for k in range(n))) for n in range(4)]
    rng = random.Random(0)

    def value(i: int) -> Any:
        drawn = rng.choice([*VALUES, Size([i % 5, i % 3]), f"text {i % 400}", i * 1_000_003])
        return Record(kinds[1], (i,)) if rng.random() < 0.1 else copy.copy(drawn)

    records = [Record(kind := rng.choice(kinds), tuple(value(i) for _ in kind.names)) for i in range(2000)]

    def node(item: Any) -> Any:
        if type(item) is Record:
            return item.kind.func.new(state=dict(zip(item.kind.names, map(node, item.values), strict=True)))
        return item

    nodes = [node(record) for record in records]
    assert dumps(["known", records], protocol=protocol) == dumps(["known", nodes], protocol=protocol)
    keyed = {Record(kinds[1], (i,)): record for i, record in enumerate(records)}
    expected = {node(key): item for key, item in zip(keyed, nodes, strict=True)}
    assert dumps(keyed, protocol=protocol) == dumps(expected, protocol=protocol)


def test_shared_and_cyclic_references_are_kept() -> None:
    shared = [1]
    cyclic: list[Any] = [shared, shared, {"a": shared}]
    inner = (cyclic, 1, 2, 3)
    cyclic += [inner, (cyclic,)]
    for again in (pickle.loads(dumps(cyclic)), loads(pickle.dumps(cyclic), where="t"), there_and_back(cyclic)):
        assert again[0] is again[1] is again[2]["a"]
        assert again[3][0] is again and again[4][0] is again
    name = argparse.Namespace()
    name.me = name
    again = there_and_back(name)
    assert again.me is again


def test_persistent_ids_and_replacement() -> None:
    data = dumps([Persistent(("storage", 1)), 2])
    assert loads(data, where="t", persistent=Persistent) == [Persistent(("storage", 1)), 2]
    with pytest.raises(CheckpointError, match=r"this file has none[^\0]*some\.pt"):
        loads(data, where="some.pt")
    thing = object()
    again = pickle.loads(dumps([thing, thing], replace=lambda obj: Global("types", "SimpleNamespace")()))
    assert again[0] is again[1] and again[0] == types.SimpleNamespace()
    with pytest.raises(CheckpointError, match="cannot be pickled"):
        dumps([thing])


def test_state_of_an_ordered_dict_is_kept() -> None:
    state: Any = torch.nn.Linear(1, 1).state_dict()
    state.clear()
    assert there_and_back(state)._metadata == state._metadata
    assert pickle.loads(dumps(state))._metadata == state._metadata


def make_metadata(count: int) -> metadata.Metadata:
    state: dict[str, Any] = {}
    storage, items = {}, []
    for i in range(count):
        key, size = f"decoder.layers.{i}.weight", torch.Size([i, 4])
        chunk = metadata.ChunkStorageMetadata(torch.Size([0, 0]), size)
        properties = metadata.TensorProperties(torch.bfloat16)
        state[key] = metadata.TensorStorageMetadata(properties, size, [chunk])
        index = metadata.MetadataIndex(key, torch.Size([0, 0]), 0)
        storage[index] = filesystem._StorageInfo(f"__{i % 8}_0.distcp", i << 20, 99)
        data = planner.TensorWriteData(chunk, properties, size)
        items.append(planner.WriteItem(index, planner.WriteItemType.TENSOR, tensor_data=data))
    made = metadata.Metadata(state, None, storage, metadata.StorageMeta("dir"), "1.0.0")
    made.all_local_plans = [planner.SavePlan(items)]  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_dcp_metadata(protocol: int) -> None:
    real = make_metadata(300)
    node = loads(pickle.dumps(real, protocol), where="t")
    again = pickle.loads(dumps(node, protocol=protocol))
    assert again == real and again.all_local_plans == real.all_local_plans  # type: ignore[attr-defined]
    infos = attr(node, "storage_data")
    index = Global("torch.distributed.checkpoint.metadata", "MetadataIndex")
    found = infos[index.new(state={"fqn": "decoder.layers.7.weight", "offset": (0, 0)})]
    assert attr(found, "offset") == 7 << 20 and attr(found, "transform_descriptors", None) is None


def test_metadata_is_read_by_torchs_reader(tmp_path: Path) -> None:
    node = loads(pickle.dumps(make_metadata(3)), where="t")
    (tmp_path / ".metadata").write_bytes(dumps(node))
    read = filesystem.FileSystemReader(tmp_path).read_metadata()
    assert read.state_dict_metadata == make_metadata(3).state_dict_metadata


def golden_pickles() -> list[Path]:
    files = [*GOLDEN.glob("**/*.pt"), *GOLDEN.glob("**/.metadata")]
    if not files:
        pytest.skip(f"no golden checkpoints in {GOLDEN}")
    return sorted(files)


def golden_bytes(path: Path) -> bytes:
    if path.suffix != ".pt":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


class _Stub:
    """What a megatron class is in the test: it keeps what it is given."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class _Real(pickle.Unpickler):
    """The real unpickler; only megatron's classes and tensors, which are not there, become stubs."""

    _stubs: ClassVar[dict[str, type]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("megatron.") or "_rebuild" in name:
            return self._stubs.setdefault(name, type(name, (_Stub,), {}))
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return pid


def real(data: bytes) -> Any:
    return _Real(io.BytesIO(data)).load()


def same(one: Any, other: Any) -> bool:
    """Equality that also holds for numpy arrays deep inside."""
    if isinstance(one, numpy.ndarray):
        return bool(numpy.array_equal(one, other)) and one.dtype == other.dtype
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, argparse.Namespace | _Stub):
        return same(vars(one), vars(other))
    return bool(one == other)


def test_goldens_are_written_back_the_same() -> None:
    for path in golden_pickles():
        data = golden_bytes(path)
        node = loads(data, where=str(path), persistent=Persistent)
        for protocol in (2, 4):
            again = dumps(node, protocol=protocol)
            assert loads(again, where=str(path), persistent=Persistent) == node, path
            assert same(real(again), real(data)), path


# hostile pickles


class _Reduce:
    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


UNSAFE = {
    "os.system": pickle.dumps(_Reduce(os.system, ("touch /tmp/pickles_owned",))),
    "builtins.eval": pickle.dumps(_Reduce(eval, ("1",)), 2),
    "builtins.getattr": pickle.dumps(_Reduce(getattr, ("", "join")), 4),
    "subprocess.Popen": pickle.dumps(_Reduce(subprocess.Popen, (["true"],))),
    "some_package.Thing": b"\x80\x02csome_package\nThing\n)R.",
    "argparse.ArgumentParser": b"\x80\x02cargparse\nArgumentParser\n)R.",
    "torch.hub.load": b"\x80\x02ctorch.hub\nload\n)R.",
    "torch.load": b"\x80\x02ctorch\nload\n)R.",
    "builtins.__import__": b"\x80\x02c__builtin__\n__import__\n)R.",
    "numpy.load": b"\x80\x02cnumpy\nload\n)R.",
    "collections.OrderedDict.fromkeys": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
}


@pytest.mark.parametrize("name", UNSAFE)
def test_a_global_outside_the_list_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsafePickleError) as caught:
        loads(UNSAFE[name], where="dir/evil.pt")
    text = str(caught.value)
    assert "dir/evil.pt" in text and name.replace("os.", "posix.") in text and "to do:" in text


@pytest.mark.parametrize(
    "arguments",
    [(), (torch.Size,), ("", "join"), (argparse.Namespace, "__subclasses__"), (argparse.Namespace, "a.b"),
     (_Reduce(getattr, (argparse.Namespace, "a")), "b"), (argparse.Namespace, "a", None)],
)  # fmt: skip
def test_nothing_else_is_looked_up_in_anything(arguments: tuple[object, ...]) -> None:
    with pytest.raises(UnsafePickleError, match=r"builtins\.getattr"):
        loads(pickle.dumps(_Reduce(getattr, arguments), 4), where="test")


def test_nothing_is_imported() -> None:
    loads(b"\x80\x02cmegatron.core.nowhere\nThing\n)\x81}b.", where="t")
    assert "megatron.core.nowhere" not in sys.modules


def test_neither_torch_nor_numpy_is_needed() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from formats import torchzip, pickles\n"
        "assert pickles.loads(torchzip.pickles.dumps(pickles.Size((1,))), where='x') == (1,)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_a_graph_that_doubles_at_every_level_has_a_short_text() -> None:
    data = b"\x80\x02cmegatron.a\nB\nq\x00)R"
    for index in range(1, 60):
        data += b"q%ch\x00h%ch%c\x86R" % (index, index, index)
    node = loads(data + b".", where="t")
    assert len(repr(node)) < 200 and len(dumps(node)) < 1000
    with pytest.raises(CheckpointError):
        loads(data + b"Q.", where="t")


@pytest.mark.parametrize(
    "data",
    [
        b"I1\n.",  # text opcodes
        b"S'x'\n.",
        b"(cargparse\nNamespace\no.",
        b"(iargparse\nNamespace\n.",
        b"\x80\x02\x82\x01.",  # extension registry
        b"\x80\x02]2\x86.",  # DUP
        b"\x80\x05\x97.",  # out-of-band buffer
        b"\x80\x02\xff.",
    ],
)
def test_opcodes_that_plain_data_never_needs_are_refused(data: bytes) -> None:
    with pytest.raises(UnsafePickleError, match=r"opcode[^\0]*evil\.pt"):
        loads(data, where="evil.pt")


CORRUPT = {
    "empty": b"",
    "no stop": b"\x80\x02]",
    "stack underflow": b"\x80\x02R.",
    "memo index beyond the file": b"\x80\x02]r\xff\xff\xff\x7f.",
    "memo entry never put": b"\x80\x02h\x05.",
    "text longer than the file": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "bytes longer than the file": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fabc.",
    "text that is no utf-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "a frame longer than the file": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f].",
    "state for a list": b"\x80\x02]}b.",
    "state for a class": b"\x80\x02cargparse\nNamespace\n}b.",
    "slots for the class of a size": b"\x80\x02ctorch\nSize\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
    "slots for a builder": b"\x80\x02c__builtin__\nset\nN}X\x04\x00\x00\x00makeK\x01s\x86b.",
    "slots for a size": b"\x80\x02ctorch\nSize\n)RN}X\x01\x00\x00\x00aK\x01s\x86b.",
    "bytes of an endless number": b"\x80\x02cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R.",
    "bytearray of an endless number": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "set of a range": b"\x80\x02cbuiltins\nset\ncbuiltins\nrange\nJ\xff\xff\xff\x7f\x85R\x85R.",
    "unhashable key": b"\x80\x02}]K\x01s.",
    "another codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
    "a call of data": b"\x80\x02K\x01)R.",
    "persistent id": b"\x80\x02K\x01Q.",
    "protocol": b"\x80\x63].",
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_pickle_is_a_clear_error(case: str) -> None:
    with pytest.raises(CheckpointError, match=r"bad\.pt"):
        loads(CORRUPT[case], where="bad.pt")


def test_a_pickle_cut_anywhere_is_a_clear_error() -> None:
    data = pickle.dumps([*objects(), make_metadata(2)], 4)
    for end in range(len(data) - 1):
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            loads(data[:end], where="cut.pt")


def test_a_damaged_pickle_never_ends_in_another_error() -> None:
    data = pickle.dumps([*objects(), make_metadata(2)], 2)
    random = numpy.random.RandomState(0)
    for _ in range(3000):
        damaged = bytearray(data)
        for at in random.randint(0, len(data), random.randint(1, 4)):
            damaged[at] = random.randint(256)
        try:
            loads(bytes(damaged), where="f")
        except CheckpointError:
            continue


def test_the_list_is_closed() -> None:
    for module in ("os", "posix", "sys", "subprocess", "importlib", "shutil", "runpy", "functools", "operator", "code"):
        assert not pickles.is_allowed(module, "system") and not pickles.is_allowed(module, "attrgetter")
    for name in ("eval", "exec", "getattr", "setattr", "open", "compile", "__import__", "vars"):
        assert not pickles.is_allowed("builtins", name)
    assert not pickles.is_allowed("megatronx.core", "Thing") and not pickles.is_allowed("megatron.core", "a b")
    for name in ("megatron.core.enums.ModelType", "transformer_engine.common.recipe.DelayedScaling"):
        assert pickles.is_allowed(*name.rsplit(".", 1))

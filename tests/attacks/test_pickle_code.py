"""Pickles that would run something if they were unpickled: wherever a pickle is read, and by whatever opcode."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import registry
from formats import extra_state, pickles, torch_dcp, torch_dist, torch_ranks, torchzip
from registry.errors import CheckpointError, UnsafePickleError
from tests.attacks.bounded import archive, attack, cases, written

PROTO = b"\x80\x04"


class Runs:
    """Unpickled by a program that trusts it, this makes a file beside its own folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.folder.parent}/ran",)


def hostile(folder: Path) -> bytes:
    return pickle.dumps({"args": Runs(folder), "model": {}}, 2)


def loading(folder: Path, data: bytes) -> Callable[[], object]:
    path = written(folder / "hostile.pkl", PROTO + data)
    return lambda: pickles.loads(path.read_bytes(), where=str(path), persistent=pickles.Persistent)


# Every place.


@attack(UnsafePickleError, ".metadata", "posix.system")
def the_metadata_of_torch_dist(folder: Path) -> Callable[[], object]:
    written(folder / ".metadata", hostile(folder))
    written(folder / "metadata.json", "{}")
    return lambda: torch_dist.Container().open(folder, "megatron")


@attack(UnsafePickleError, ".metadata", "posix.system")
def the_metadata_of_dcp(folder: Path) -> Callable[[], object]:
    written(folder / ".metadata", hostile(folder))
    return lambda: torch_dcp.Container().open(folder, "dcp")


@attack(UnsafePickleError, "common.pt", "posix.system")
def the_common_state(folder: Path) -> Callable[[], object]:
    metadata = pickles.Global("torch.distributed.checkpoint.metadata", "Metadata")
    state = {"state_dict_metadata": {}, "storage_data": {}, "planner_data": None}
    written(folder / ".metadata", pickles.dumps(metadata.new(state=state), protocol=2))
    written(folder / "common.pt", archive(hostile(folder)))
    return lambda: torch_dist.Container().open(folder, "megatron")


@attack(UnsafePickleError, "__0_0.distcp", "posix.system")
def an_object_among_the_items(folder: Path) -> Callable[[], object]:
    item = written(folder / "__0_0.distcp", archive(hostile(folder)))
    module = "torch.distributed.checkpoint"
    index = pickles.Global(f"{module}.metadata", "MetadataIndex")
    info = pickles.Global(f"{module}.filesystem", "_StorageInfo")
    place = {"relative_path": item.name, "offset": 0, "length": item.stat().st_size}
    key = index.new(state={"fqn": "common_state/shard_0_1", "offset": None, "index": None})
    stored = {key: info.new(state=place)}
    state = {"state_dict_metadata": {}, "storage_data": stored, "planner_data": None}
    metadata = pickles.Global(f"{module}.metadata", "Metadata").new(state=state)
    written(folder / ".metadata", pickles.dumps(metadata, protocol=2))
    written(folder / "metadata.json", "{}")
    return lambda: torch_dist.Container().open(folder, "megatron")


@attack(UnsafePickleError, "model_optim_rng.pt", "posix.system")
def a_rank_file(folder: Path) -> Callable[[], object]:
    written(folder / "mp_rank_00" / "model_optim_rng.pt", archive(hostile(folder)))
    return lambda: torch_ranks.Container().open(folder, "megatron-legacy")


@attack(UnsafePickleError, "distrib_optim.pt", "posix.system")
def an_optimizers_rank_file(folder: Path) -> Callable[[], object]:
    written(folder / "mp_rank_00" / "model_optim_rng.pt", archive(pickle.dumps({"model": {}}, 2)))
    written(folder / "mp_rank_00" / "distrib_optim.pt", archive(hostile(folder)))
    return lambda: torch_ranks.Container().open(folder, "megatron-legacy")


@attack(UnsafePickleError, "state of a module", "posix.system")
def the_state_of_a_module(folder: Path) -> Callable[[], object]:
    return lambda: extra_state.scales(hostile(folder), Path("state of a module"))


@attack(UnsafePickleError, "state of a module", "posix.system")
def the_state_of_a_module_as_an_archive(folder: Path) -> Callable[[], object]:
    return lambda: extra_state.scales(archive(hostile(folder)), Path("state of a module"))


@attack(UnsafePickleError, "state of a module", "posix.system")
def a_storage_in_the_state_of_a_module(folder: Path) -> Callable[[], object]:
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    inner = magic + hostile(folder) + pickle.dumps(["0"], 2) + struct.pack("<q", 0)
    load = pickles.Global("torch.storage", "_load_from_bytes").call(inner)
    data = pickles.dumps({"scale": load}, protocol=2)
    return lambda: extra_state.scales(data, Path("state of a module"))


@attack(UnsafePickleError, "pytorch_model.bin", "posix.system")
def a_bin_file(folder: Path) -> Callable[[], object]:
    written(folder / "pytorch_model.bin", archive(hostile(folder)))
    written(folder / "config.json", '{"model_type": "llama"}')
    return lambda: registry.open(folder)


@attack(CheckpointError, "from before version 1.6")
def an_archive_of_before_1_6(folder: Path) -> Callable[[], object]:
    path = written(folder / "old.pt", pickle.dumps(0x1950A86A20F9469CFC6C, 2) + hostile(folder))
    return lambda: torchzip.read(path, where=str(path)).load()


# Every name, and every opcode.

_NAMES = """
os.system posix.system nt.system subprocess.Popen builtins.eval builtins.exec builtins.getattr builtins.__import__
builtins.compile builtins.open __builtin__.eval importlib.import_module runpy.run_path shutil.rmtree sys.exit
functools.partial operator.attrgetter operator.methodcaller types.FunctionType types.CodeType code.interact
ctypes.CDLL webbrowser.open pickle.loads _pickle.loads torch.load torch.jit.load torch.hub.load torch.ops.load_library
torch.utils.cpp_extension.load_inline numpy.load numpy.core.multiarray.fromfile numpy.f2py.compile
torch.serialization.load torch.package.PackageImporter distutils.spawn.spawn pydoc.pipepager timeit.timeit
registry.api.convert formats.pickles.loads tempfile.mkdtemp
"""


@pytest.mark.parametrize("name", _NAMES.split())
@pytest.mark.parametrize("opcode", ["GLOBAL", "STACK_GLOBAL"])
def test_names_outside_the_list(name: str, opcode: str) -> None:
    module, _, attribute = name.rpartition(".")
    called = f"c{module}\n{attribute}\n".encode() if opcode == "GLOBAL" else (
        b"\x8c%c%s\x8c%c%s\x93" % (len(module), module.encode(), len(attribute), attribute.encode())
    )  # fmt: skip
    with pytest.raises(UnsafePickleError, match=r"not allowed[^\0]*evil\.pt"):
        pickles.loads(PROTO + called + b")R.", where="evil.pt")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("argparse", "Namespace.__init__"),
        ("argparse", "os.system"),
        ("collections", "OrderedDict.fromkeys"),
        ("megatron.core", "a b"),
        ("megatron.core..", "x"),
        ("", "megatron"),
        ("torch.storage", "_load_from_bytes.x"),
        ("builtins", "object.__subclasses__"),
    ],
)
def test_names_that_reach_through_others(module: str, name: str) -> None:
    """A dotted name is looked up attribute by attribute. Even those that are let in get a name's stand-in alone."""
    data = PROTO + b"\x8c%c%s\x8c%c%s\x93)R." % (len(module), module.encode(), len(name), name.encode())
    with pytest.raises(UnsafePickleError, match="not allowed"):
        pickles.loads(data, where="evil.pt")


def test_a_name_that_is_let_in_is_nothing_but_a_name() -> None:
    """Whatever is let in by a pattern, such as all of megatron's modules, is not imported and not called."""
    found = pickles.loads(PROTO + b"cmegatron.core.os\nsystem\n\x8c\x02ls\x85R.", where="f")
    assert isinstance(found, pickles.Call) and found.args == ("ls",) and found.func.module == "megatron.core.os"


OPCODES = {
    "INST": b"(ios\nsystem\n.",
    "OBJ": b"(cargparse\nNamespace\no.",
    "EXT1": b"\x82\x01.",
    "EXT2": b"\x83\x01\x00.",
    "EXT4": b"\x84\x01\x00\x00\x00.",
    "NEWOBJ_EX": b"cargparse\nNamespace\n)}\x92.",
    "NEXT_BUFFER": b"\x97.",
    "PERSID": b"P0\n.",
    "text": b"S'x'\n.",
}


@pytest.mark.parametrize("opcode", OPCODES)
def test_opcodes_that_are_not_needed(opcode: str) -> None:
    with pytest.raises(UnsafePickleError, match="opcode that plain data never needs"):
        pickles.loads(PROTO + OPCODES[opcode], where="evil.pt")


STATES = {
    "of a list": b"]}b.",
    "of a dictionary": b"}}b.",
    "of a number": b"K\x01}b.",
    "of a text": b"X\x01\x00\x00\x00a}b.",
    "of a stand-in's class": b"cargparse\nNamespace\n}b.",
    "slots of a stand-in's class": b"cargparse\nNamespace\nN}X\x08\x00\x00\x00__init__K\x01s\x86b.",
    "of a builder": b"cbuiltins\nset\nN}X\x04\x00\x00\x00makecargparse\nNamespace\ns\x86b.",
    "of a size": b"ctorch\nSize\n)RN}X\x01\x00\x00\x00aK\x01s\x86b.",
    "of a persistent id": b"K\x01QN}X\x03\x00\x00\x00pidK\x01s\x86b.",
    "of a set": b"cbuiltins\nset\n]\x85R}X\x01\x00\x00\x00aK\x01sb.",
}


@pytest.mark.parametrize("case", STATES)
def test_states_of_what_is_real(case: str) -> None:
    """BUILD reaches nothing but stand-ins: a real object's attributes, and a class's, stay as they are."""
    with pytest.raises(CheckpointError, match=r"corrupt[^\0]*evil\.pt"):
        pickles.loads(PROTO + STATES[case], where="evil.pt", persistent=pickles.Persistent)


@attack(UnsafePickleError, "hostile.pkl", "not allowed")
def a_name_of_a_megabyte(folder: Path) -> Callable[[], object]:
    return loading(folder, b"c" + b"os." * 300_000 + b"x\nsystem\n.")


test_attacks = cases(__name__)

"""The fault injector (inject.c) from Python: build it, arm a process with it, and read what it saw."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

#: What a call does, in the order of inject.c.
CALLS = (
    "stat", "open", "create", "close", "read", "write", "truncate", "sync", "flush", "rename", "unlink", "rmdir",
    "mkdir", "link", "lock", "copy", "map", "attributes", "space", "list", "readlink",
)  # fmt: skip
#: Calls that change what is on the disk, and those that may find it full.
CHANGES = frozenset({"create", "write", "truncate", "rename", "unlink", "rmdir", "mkdir", "link", "copy", "attributes"})
TAKES_SPACE = frozenset({"create", "write", "truncate", "sync", "close", "rename", "mkdir", "link", "copy"})
MOVES_BYTES = frozenset({"read", "write", "copy"})

_SHOWN, _KEPT = 200, 4096


class Action(IntEnum):
    """What happens to the call that is broken."""

    PASS = 0
    KILL_BEFORE = 1
    KILL_AFTER = 2
    FAIL = 3
    SHORT = 4


@dataclass(frozen=True)
class Fault:
    """Break call number `at`: by `action`, with `error`, and every later call of `then` with `then_error`."""

    at: int = -1
    action: Action = Action.PASS
    error: int = errno.EIO
    then: frozenset[str] = frozenset()
    then_error: int = errno.EIO


@dataclass(frozen=True)
class Call:
    """One call that was seen. Paths are relative to the directory that is watched."""

    kind: str
    path: str
    to: str
    size: int
    failed: int


class _Record(ctypes.Structure):
    _fields_ = (
        ("call", ctypes.c_int),
        ("failed", ctypes.c_int),
        ("size", ctypes.c_long),
        ("path", ctypes.c_char * _SHOWN),
        ("to", ctypes.c_char * _SHOWN),
    )


class _Control(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_long),
        ("action", ctypes.c_int),
        ("error", ctypes.c_int),
        ("then", ctypes.c_long),
        ("then_error", ctypes.c_int),
        ("no_exchange", ctypes.c_int),
        ("count", ctypes.c_long),
        ("pid", ctypes.c_long),
        ("prefix", ctypes.c_char * _SHOWN),
        ("log", _Record * _KEPT),
    )


class Watch:
    """Memory in which an armed process notes its calls below `prefix`; its parent reads them, even if it died."""

    def __init__(self, prefix: Path, *, exchange: bool = True) -> None:
        self._memory = mmap.mmap(-1, ctypes.sizeof(_Control))
        self._control = _Control.from_buffer(self._memory)
        self._control.prefix = os.fsencode(prefix.resolve())
        self._control.no_exchange = not exchange

    def set(self, fault: Fault) -> None:
        """What the next process is to suffer."""
        control = self._control
        control.at, control.action, control.error = fault.at, fault.action, fault.error
        control.then, control.then_error = sum(1 << CALLS.index(call) for call in fault.then), fault.then_error
        control.count = 0

    def arm(self) -> None:
        """From now on the calls of this process count."""
        ctypes.CDLL(None).faults_arm(ctypes.byref(self._control))

    @staticmethod
    def disarm() -> None:
        """No more."""
        ctypes.CDLL(None).faults_disarm()

    @property
    def count(self) -> int:
        """How many calls there were."""
        return int(self._control.count)

    def calls(self) -> list[Call]:
        """All of them, in order."""
        assert self.count <= _KEPT, f"{self.count} calls, and room for {_KEPT}"
        records = self._control.log[: self.count]
        return [Call(CALLS[r.call], os.fsdecode(r.path), os.fsdecode(r.to), r.size, r.failed) for r in records]


def present() -> bool:
    """Does the injector stand before the C library of this process?"""
    return hasattr(ctypes.CDLL(None), "faults_arm")


def compiler() -> str | None:
    """The C compiler, if there is one."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def built(folder: Path) -> Path:
    """The injector, compiled into a directory."""
    cc = compiler()
    assert cc is not None, "no C compiler"
    library = folder / "inject.so"
    source = Path(__file__).with_name("inject.c")
    command: Iterable[str | Path] = [cc, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-o", library, source, "-ldl"]
    subprocess.run([*command], check=True, timeout=120)
    return library


def environment(library: Path) -> dict[str, str]:
    """Of a process that the injector is to stand in. One thread each: forks of it must not miss others."""
    return {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1"}  # fmt: skip

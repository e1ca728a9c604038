"""Several processes at one target: one writes, the others are refused, and a reader never sees a mixture."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import registry
from registry.errors import CheckpointError
from registry.training.manager import TRACKER
from tests.faults.operations import held, hub, left_over, save, weights

REPOSITORY = Path(__file__).resolve().parents[2]
FORMATS = ("huggingface", "megatron", "megatron-legacy", "dcp", "trtllm")

#: Waits for a line before it calls, and says how that ended.
HEAD = """
import sys
from pathlib import Path
import registry
from registry.errors import TargetError
from tests.faults.operations import save
import registry.conversion, registry.training.saving
root = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
"""
CALLS = {
    "convert": 'registry.convert(root / "a", root / "targets" / "out", to="megatron")',
    "save": 'save(1, iteration=1)(root)',
}  # fmt: skip


@contextmanager
def programs(count: int, text: str, *arguments: object) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that have said that they are ready; they end with the block."""
    command = [sys.executable, "-c", text, *map(str, arguments)]
    pipe = subprocess.PIPE
    started = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY) for _ in range(count)]
    try:
        for one in started:
            assert one.stdout is not None and one.stdout.readline() == "ready\n"
        yield started
    finally:
        for one in started:
            one.kill()
            one.wait()
            for stream in (one.stdin, one.stdout):
                if stream is not None:
                    stream.close()


def told(one: subprocess.Popen[str], line: str = "go") -> None:
    assert one.stdin is not None
    one.stdin.write(line + "\n")
    one.stdin.flush()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with two models of the same sizes."""
    hub(tmp_path / "a", 1)
    hub(tmp_path / "b", 2)
    return tmp_path


@pytest.mark.parametrize("call", CALLS)
def test_one_wins_and_the_others_are_refused(call: str, root: Path) -> None:
    """Three processes at once; each either writes it all, or is told that another does or did."""
    text = f"""{HEAD}
try:
    {CALLS[call].replace("save(1", "save(1, overwrite=False")}
    print("wrote")
except TargetError as error:
    print(error.problem)
"""
    with programs(3, text, root) as three:
        for one in three:
            told(one)
        said = Counter(one.communicate(timeout=120)[0].strip() for one in three)
    refusals = {
        "another run is writing this target", "the target is not empty", "this iteration has been saved already",
    }  # fmt: skip
    assert said.pop("wrote") == 1 and set(said) <= refusals, said
    there = root / "targets" / ("out" if call == "convert" else "iter_0000001")
    assert registry.verify(there)
    assert {name for name, _ in registry.stream(there, to="huggingface")} == set(weights(1))
    assert not left_over(held(root / "targets"))


#: Stops when the tensors are written, says so, and goes on at the next line.
PAUSED = """
from registry.files import TargetFiles
sync = TargetFiles.sync
def paused(self):
    print("writing", flush=True)
    sys.stdin.readline()
    sync(self)
TargetFiles.sync = paused
"""


@pytest.mark.parametrize("call", CALLS)
def test_the_second_is_refused_while_the_first_writes(call: str, root: Path) -> None:
    """And a reader sees what was there before, until the first is done."""
    (registry.convert(root / "b", root / "targets" / "out", to="megatron") if call == "convert"
     else save(2, iteration=1)(root))  # fmt: skip
    there = root / "targets" / ("out" if call == "convert" else "iter_0000001")
    over = CALLS[call].replace('"megatron")', '"megatron", overwrite=True)')
    before = held(there)
    with programs(1, f"{HEAD}{PAUSED}{over}\nprint('wrote')", root) as (first,):
        told(first)
        assert first.stdout is not None and first.stdout.readline() == "writing\n"
        assert held(there) == before and seed_of(there) == 2
        second = f"{HEAD}\ntry:\n    {over}\nexcept TargetError as error:\n    print(error.problem)"
        with programs(1, second, root) as (other,):
            told(other)
            assert other.communicate(timeout=120)[0] == "another run is writing this target\n"
        assert held(there) == before
        assert first.communicate("go\n", timeout=120)[0] == "wrote\n"
    assert seed_of(there) == 1 and not left_over(held(root / "targets"))
    if call == "save":
        assert (root / "targets" / TRACKER).read_text() == "1"


def seed_of(path: Path) -> int | None:
    """Which of the two models is there; None for a mixture of them."""
    return _seed({name: tensor.numpy() for name, tensor in registry.stream(path, to="huggingface")})


def _seed(found: dict[str, np.ndarray]) -> int | None:
    known = {seed: weights(seed) for seed in (1, 2)}
    same = [seed for seed, all_ in known.items() if all(np.array_equal(all_[name], found[name]) for name in all_)]
    return same[0] if same else None


#: Reads again and again, and says each time what it saw.
READER = """
import sys
from pathlib import Path
import registry
from registry.errors import CheckpointError
from tests.faults.test_at_once import seed_of
path = Path(sys.argv[1])
seed_of(path)
print("ready", flush=True)
while True:
    try:
        print(seed_of(path), flush=True)
    except CheckpointError as error:
        print("refused:", error.problem, flush=True)
    except BaseException as error:
        print("stranger:", repr(error), flush=True)
"""


@pytest.mark.parametrize("to", ["huggingface", "megatron"])
def test_a_reader_sees_the_old_or_the_new_and_never_a_mixture(to: str, root: Path) -> None:
    target = root / "targets" / "out"
    registry.convert(root / "a", target, to=to)
    with programs(1, READER, target) as (reader,):
        for i in range(30):
            registry.convert(root / "ba"[i % 2], target, to=to, overwrite=True, threads=1)
        reader.kill()
        assert reader.stdout is not None
        said = Counter(line.strip() for line in reader.stdout.read().splitlines()[:-1])
    assert said["1"] + said["2"] > 0
    assert all(line in ("1", "2") or line.startswith("refused: ") for line in said), said


@pytest.mark.parametrize("to", FORMATS)
def test_a_reader_that_opened_it_before_goes_on_with_the_old_or_is_told(to: str, root: Path) -> None:
    """It has read some tensors when another checkpoint comes in the place of the one that it reads."""
    target = root / "targets" / "out"
    registry.convert(root / "a", target, to=to)
    view = registry.open(target).view("huggingface")
    names = list(view)
    assert np.array_equal(view[names[0]].numpy(), weights(1)[names[0]])
    registry.convert(root / "b", target, to=to, overwrite=True)
    try:
        assert _seed({name: view[name].numpy() for name in names}) == 1
    except CheckpointError as error:
        assert "changed while it was read" in error.problem


def test_another_checkpoint_while_one_is_opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its index is of one, and its files would be of the other."""
    from registry import changes, source

    target, stamps = root / "targets" / "out", changes.stamps
    registry.convert(root / "a", target, to="huggingface")
    other = registry.convert

    def late(path: Path) -> object:
        if path == target:
            monkeypatch.setattr(source, "stamps", stamps)
            other(root / "b", target, to="huggingface", overwrite=True)
        return stamps(path)

    monkeypatch.setattr(source, "stamps", late)
    with pytest.raises(CheckpointError, match="took the place"):
        registry.open(target)
    assert seed_of(target) == 2

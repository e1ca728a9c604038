"""A run over many saves: in the background, with retention, from the right place again."""

import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import registry
from registry import Retention
from tests.training import Job, results, run
from tests.training.jobs import adam
from tests.training.model import CONFIG, Model

TRACKER = "latest_checkpointed_iteration.txt"


def trained(seed: int = 0) -> tuple[Model, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Model()
    optimizer = adam([model])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def save(path: Path, iteration: int | None, seed: int = 0, **more: Any) -> registry.Saved:
    model, optimizer = trained(seed)
    return registry.save(
        path, model=model, optimizer=optimizer, iteration=iteration, config=CONFIG, **{"durable": False, **more}
    )


def same(path: Path, seed: int, **more: Any) -> registry.Loaded:
    """Load into another model; it must then be that of the seed, bit for bit."""
    model, optimizer = Model(), None
    optimizer = adam([model])
    found = registry.load(path, model=model, optimizer=optimizer, **more)
    expected, old = trained(seed)
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for kind, value in old.state[theirs].items():
            assert torch.equal(optimizer.state[mine][kind], value)
    return found


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written by a thread other than the main one before this is set."""
    opened, real = threading.Event(), os.pwrite

    def waits(*arguments: Any) -> int:
        assert threading.current_thread() is threading.main_thread() or opened.wait(30)
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", waits)
    yield opened
    opened.set()


def test_background_saves_what_was_there_when_it_was_called(tmp_path: Path, gate: threading.Event) -> None:
    model, optimizer = trained()
    saved = registry.save(
        tmp_path, model=model, optimizer=optimizer, iteration=3, config=CONFIG, extra={"n": [1]}, background=True
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
            optimizer.state[parameter]["exp_avg"].fill_(8)
    optimizer.param_groups[0]["lr"] = 9.0
    assert not saved.done
    assert not (tmp_path / TRACKER).exists()
    gate.set()
    assert saved.wait() is saved
    assert saved.done
    assert saved.nbytes > 0
    assert saved.seconds > saved.blocked > 0
    found = same(tmp_path, 0)
    assert (found.iteration, found.extra) == (3, {"n": [1]})


def test_a_load_or_save_waits_for_the_save_before(tmp_path: Path, gate: threading.Event) -> None:
    first = save(tmp_path, 1, 1, background=True)
    threading.Timer(0.2, gate.set).start()
    assert same(tmp_path, 1).iteration == 1
    assert first.done
    save(tmp_path, 2, 2, background=True)
    save(tmp_path, 3, 3, background=True).wait()
    assert names(tmp_path) == ["iter_0000001", "iter_0000002", "iter_0000003", TRACKER]
    assert same(tmp_path, 2, iteration=2).iteration == 2


@pytest.mark.parametrize("call", ["wait", "save", "load"])
def test_an_error_in_the_background_comes_out_at_the_next_call(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, 1)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        saved = save(tmp_path, 2, 2, background=True)
        while not saved.done:
            pass
    with pytest.raises(registry.TargetError, match="No space left"):
        {"wait": saved.wait, "save": lambda: save(tmp_path, 3), "load": lambda: same(tmp_path, 1)}[call]()
    assert names(tmp_path) == ["iter_0000001", TRACKER]
    assert same(tmp_path, 1).iteration == 1
    assert save(tmp_path, 3, background=True).wait().removed == ()


def test_wrong_arguments_are_refused_at_once(tmp_path: Path) -> None:
    for wrong in ({"iteration": -1}, {"iteration": True}, {"extra": {"f": print}}):
        with pytest.raises(registry.ArgumentError):
            save(tmp_path, **{"iteration": 1, "background": True, **wrong})
    assert not names(tmp_path)


@pytest.mark.timeout(200)
def test_ranks_save_beside_their_training(whole: Path, tmp_path: Path) -> None:
    given = {"whole": whole, "layout": {"tp": 2}}
    well, loaded, failed, again = run(
        [
            Job("save_beside", 4, {**given, "path": tmp_path / "a"}),
            Job("load", 2, {**given, "path": tmp_path / "a"}),
            Job("save_beside", 4, {**given, "path": tmp_path / "b", "fail": 1}),
            Job("load", 2, {**given, "path": tmp_path / "b", "iteration": 6}),
        ]
    )
    for one in results(well):
        assert not one["early"]
        assert one["talks"] > 1
    assert all(not one["differ"] and one["iteration"] == 7 for one in results(loaded))
    sizes = sorted(file.stat().st_size for file in (tmp_path / "a/iter_0000007").glob("*.distcp"))
    assert len(sizes) == 4  # replicas share the writing
    assert sizes[-1] < 1.5 * sizes[0]
    for one in results(failed):
        assert "rank 1: the target cannot be written" in one["said"]
        assert one["left"] == ["iter_0000006", "iter_0000009", TRACKER]
    assert all(not one["differ"] for one in results(again))


def test_retention(tmp_path: Path) -> None:
    gone: list[int] = []
    for iteration in range(1, 10):
        gone += save(tmp_path, iteration, retention=Retention(last=2, every=4)).removed
    assert names(tmp_path) == [f"iter_000000{i}" for i in (4, 8, 9)] + [TRACKER]
    assert gone == [1, 2, 3, 5, 6, 7]


def test_a_second_place(tmp_path: Path) -> None:
    lasting, passing = tmp_path / "a", tmp_path / "b"
    save(lasting, 10, 10)
    with pytest.raises(registry.CheckpointError, match="nothing"):
        same(passing, 0, non_persistent=passing)
    for iteration in (11, 12):
        save(passing, iteration, iteration, retention=Retention(last=1))
    assert names(passing) == ["iter_0000012", TRACKER]
    found = same(lasting, 12, non_persistent=passing)
    assert (found.iteration, found.persistent) == (12, False)
    save(lasting, 20, 20)
    found = same(lasting, 20, non_persistent=passing)
    assert (found.iteration, found.persistent) == (20, True)
    assert same(lasting, 12, non_persistent=passing, iteration=12).iteration == 12


def test_a_torn_latest_one(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        save(tmp_path, iteration, iteration)
    data = next((tmp_path / "iter_0000003").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="resuming from iter_0000002, the newest whole one, not from iter_0000003"):
        assert same(tmp_path, 2).iteration == 2
    with pytest.raises(registry.CheckpointError, match="no whole checkpoint of iteration 3"):
        same(tmp_path, 3, iteration=3)
    shutil.rmtree(tmp_path / "iter_0000003")
    with pytest.raises(registry.CheckpointError, match="tracker file names no checkpoint"):
        same(tmp_path, 2)
    (tmp_path / TRACKER).unlink()
    with pytest.warns(UserWarning, match="taking the newest whole checkpoint"):
        assert same(tmp_path, 2).iteration == 2
    for folder in tmp_path.glob("iter_*"):
        (folder / ".metadata").unlink()
    with pytest.raises(registry.CheckpointError, match="no checkpoint here is whole"):
        same(tmp_path, 2)


def test_a_release(tmp_path: Path) -> None:
    saved = save(tmp_path, None)
    assert names(tmp_path) == [TRACKER, "release"]
    assert (tmp_path / TRACKER).read_text() == "release"
    assert (saved.iteration, saved.path) == (None, str(tmp_path / "release"))
    assert same(tmp_path, 0).iteration == 0
    with pytest.raises(registry.TargetError, match="saved already"):
        save(tmp_path, None)
    save(tmp_path, None, 5, overwrite=True)
    assert same(tmp_path, 5).iteration == 0


def test_a_model_of_transformers_as_it_is(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(**CONFIG)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    given = {"names": "huggingface", "random_states": False}
    registry.save(tmp_path, model=model, iteration=1, config=config, **given)
    other = transformers.AutoModelForCausalLM.from_config(config)
    registry.load(tmp_path, model=other, **given)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(registry.MappingError, match=r"names='megatron-legacy', which says whose names the shards have"):
        registry.save(tmp_path, model=model, iteration=2, config=config)


def test_finetuning_takes_the_weights_alone(tmp_path: Path) -> None:
    save(tmp_path, 4, consumed_samples=40)
    model = Model()
    optimizer = adam([model])
    state = torch.get_rng_state()
    found = registry.load(tmp_path, model=model, optimizer=optimizer, scheduler={}, finetune=True)
    assert (found.iteration, found.consumed_samples, found.random_states) == (0, 0, False)
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained()[0].parameters(), strict=True))


def test_other_formats_from_the_ranks(whole: Path, tmp_path: Path) -> None:
    """The same call exports a running model: no rank holds more than its own shards."""
    given = {"whole": whole, "optimizer": False, "iteration": None}
    outcomes = run(
        [
            Job("save", 1, {**given, "path": tmp_path / "mg", "layout": {}}),
            Job("save", 4, {**given, "path": tmp_path / "hf", "layout": {"tp": 2, "pp": 2}, "format": "huggingface"}),
            Job("save", 4, {**given, "path": tmp_path / "trt", "layout": {"tp": 2, "pp": 2}, "format": "trtllm"}),
            Job(
                "save", 2,
                {**given, "path": tmp_path / "run", "layout": {"tp": 2}, "format": "huggingface", "iteration": 5},
            ),
        ]
    )  # fmt: skip
    for outcome in outcomes:
        results(outcome)
    assert all(registry.verify(tmp_path / name) for name in ("mg", "hf", "trt", "run/iter_0000005"))
    registry.convert(tmp_path / "mg", tmp_path / "expected", to="huggingface")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "expected").state_dict()
    for folder in (tmp_path / "hf", tmp_path / "run/iter_0000005"):
        found = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    registry.convert(
        tmp_path / "expected", tmp_path / "trt2", to="trtllm", parallel=registry.Parallel(tp=2, pp=2)
    )  # fmt: skip
    for i in range(4):
        name = f"rank{i}.safetensors"
        assert (tmp_path / "trt" / name).read_bytes() == (tmp_path / "trt2" / name).read_bytes()
    ours, theirs = (json.loads((tmp_path / at / "config.json").read_text()) for at in ("trt", "trt2"))
    assert ours == theirs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert registry.load(tmp_path / "run", model=Model()).iteration == 5

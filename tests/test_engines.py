"""Conversions on a Ray cluster and under torchrun: what comes out is, byte for byte, what one process writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

import registry
from registry import ArgumentError, CheckpointError, MappingError, Parallel, TargetError
from registry.cli import main
from registry.engines.work import Order, check_there, deal, made
from registry.storage import FilePlan, Laid
from registry.testing import random_model

pytestmark = pytest.mark.timeout(200)

FP8 = "FP8_PER_CHANNEL_PER_TOKEN"
#: A cast, files of several sizes for the tasks and ranks to share, and weights that are quantised on the way.
DIRECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "megatron": ("llama", {"to": "megatron", "parallel": Parallel(tp=2, pp=2), "dtype": "bfloat16"}),
    "huggingface": ("ranks", {"to": "huggingface", "options": {"shard_size": "100KB"}}),
    "trtllm": ("ranks", {"to": "trtllm", "parallel": Parallel(tp=4), "options": {"quantization": FP8}}),
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def equal(a: Path, b: Path) -> None:
    found, expected = contents(a), contents(b)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, hf_model: Callable[..., Path]) -> Path:
    """A model, and the files of Megatron's ranks with it."""
    path = tmp_path_factory.mktemp("engines")
    shutil.copytree(hf_model("llama3"), path / "llama")
    registry.convert(path / "llama", path / "ranks", to="megatron-legacy", parallel=Parallel(tp=2, pp=2))
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes a while to convert: 200 MB in bfloat16."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 1024,
        "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 128,
    }  # fmt: skip
    return random_model(config, tmp_path_factory.mktemp("large"), "bfloat16")


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of three workers on this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'checkpoint-registry[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets lie below it, and their paths are short
    before = set(psutil.Process().children(recursive=True))
    try:
        ray.init(
            address="local", num_cpus=3, include_dashboard=False, object_store_memory=80 << 20, logging_level="ERROR",
            log_to_driver=False, _temp_dir=str(folder),
        )  # fmt: skip
        started = set(psutil.Process().children(recursive=True)) - before
        yield ray
        started |= set(psutil.Process().children(recursive=True)) - before
        ray.shutdown()
        _, left = psutil.wait_procs(started, timeout=20)
        assert left == []
    finally:
        for process in set(psutil.Process().children(recursive=True)) - before:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


# --- Ray --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIRECTIONS)
def test_ray_writes_what_one_process_writes(name: str, ray: Any, home: Path, tmp_path: Path) -> None:
    source, how = DIRECTIONS[name]
    seen: list[tuple[int, int]] = []
    expected = registry.convert(home / source, tmp_path / "one", **how)
    found = registry.convert(
        home / source, tmp_path / "many", engine="ray", progress=lambda *done: seen.append(done), **how
    )
    equal(tmp_path / "many", tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]
    assert seen[-1] == (found.nbytes, found.nbytes)
    assert seen == sorted(seen)
    assert found.losses == expected.losses
    assert (found.files, found.nbytes, found.copies) == (expected.files, expected.nbytes, expected.copies)


def test_losses_are_of_what_all_tasks_have_rounded(ray: Any, home: Path, tmp_path: Path) -> None:
    assert registry.convert(home / "llama", tmp_path / "a", engine="ray", **DIRECTIONS["megatron"][1]).losses
    report = registry.convert(home / "ranks", tmp_path / "b", engine="ray", **DIRECTIONS["trtllm"][1])
    assert {loss.step for loss in report.losses.values()} == {FP8}


def test_ray_takes_relative_paths_and_what_is_registered_in_this_process(
    ray: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "llama", "own")
    config = json.loads(Path("own/config.json").read_text())
    Path("own/config.json").unlink()
    Path("config.json").write_text(json.dumps({**config, "model_type": "my_llama"}))
    registry.register({"kind": "architecture", "name": "my_llama", "extends": "llama"})
    for engine in ("local", "ray"):
        report = registry.convert(
            "own", engine, to="megatron", parallel=Parallel(tp=2), config="config.json", engine=engine
        )
        assert report.architecture == "my_llama"
    equal(Path("ray"), Path("local"))


def killed(stage: Path, before: float) -> list[int]:
    """Kill the first process below this one that has a file below `stage` open."""
    looked = 0.0
    while (now := time.monotonic()) < before:
        if now > looked + 0.5:  # a look at all processes takes long
            looked, processes = now, psutil.Process().children(recursive=True)
        for process in processes:
            with suppress(OSError):
                files = [fd.readlink() for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
                if any(file.is_relative_to(stage) for file in files):
                    process.kill()
                    return [process.pid]
        time.sleep(0.01)
    return []


def test_a_killed_worker_is_replaced(ray: Any, large: Path, tmp_path: Path) -> None:
    registry.convert(large, tmp_path / "one", to="megatron", parallel=Parallel(tp=2, pp=4))
    victims: list[int] = []
    stage = tmp_path / ".many.partial"
    killer = threading.Thread(target=lambda: victims.extend(killed(stage, time.monotonic() + 60)))
    killer.start()
    report = registry.convert(large, tmp_path / "many", to="megatron", parallel=Parallel(tp=2, pp=4), engine="ray")
    killer.join()
    assert len(victims) == 1
    assert not psutil.pid_exists(victims[0])
    equal(tmp_path / "many", tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]
    assert report.nbytes == sum(path.stat().st_size for path in (tmp_path / "many").rglob("*.distcp") if path.is_file())


def busy(ray: Any, until: Path) -> Any:
    """Keep all of the cluster's processors until there is a file."""

    def wait() -> None:
        while not until.exists():
            time.sleep(0.01)

    return ray.remote(wait).options(num_cpus=3).remote()


def test_an_error_in_a_worker_is_ours_and_leaves_nothing(ray: Any, home: Path, tmp_path: Path) -> None:
    source, target, go = tmp_path / "llama", tmp_path / "targets" / "out", tmp_path / "go"
    shutil.copytree(home / "llama", source)
    target.mkdir(parents=True)
    (target / "notes.txt").write_text("of great value")
    blocked = busy(ray, go)

    def truncate() -> None:
        while not (target.parent / ".out.partial").exists():
            time.sleep(0.01)
        os.truncate(source / "model.safetensors", 100_000)
        go.touch()

    changer = threading.Thread(target=truncate)
    changer.start()
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        registry.convert(source, target, to="megatron", parallel=Parallel(tp=2), engine="ray", overwrite=True)
    changer.join()
    ray.get(blocked)
    assert type(caught.value) is CheckpointError
    assert str(caught.value).count("to do:") == 1
    assert contents(target.parent) == {"out/notes.txt": b"of great value"}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_the_source_is_truncated_while_workers_read_it(ray: Any, large: Path, tmp_path: Path) -> None:
    source = tmp_path / "large"
    shutil.copytree(large, source)

    def truncate(done: int, total: int) -> None:
        os.truncate(source / "model.safetensors", 100_000)

    with pytest.raises(CheckpointError):
        registry.convert(
            source, tmp_path / "out", to="megatron", parallel=Parallel(tp=2, pp=4), engine="ray", progress=truncate
        )
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_what_the_caller_raises_ends_the_tasks(ray: Any, large: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.convert(
            large, tmp_path / "out", to="megatron", parallel=Parallel(tp=2, pp=4), engine="ray", progress=stop
        )
    assert list(tmp_path.iterdir()) == []


def damaged_replicas(home: Path, tmp_path: Path) -> Path:
    """Rank files in which two copies of a norm differ."""
    path = tmp_path / "damaged"
    registry.convert(home / "llama", path, to="trtllm", parallel=Parallel(tp=2))
    tensors = load_file(path / "rank1.safetensors")
    tensors["transformer.layers.1.input_layernorm.weight"][0] += 1
    save_file(tensors, path / "rank1.safetensors")
    return path


def test_ray_finds_replicas_that_differ(ray: Any, home: Path, tmp_path: Path) -> None:
    path = damaged_replicas(home, tmp_path)
    with pytest.raises(MappingError, match=r"rank0\.safetensors.*rank1\.safetensors"):
        registry.convert(path, tmp_path / "out", to="huggingface", engine="ray", options={"shard_size": "100KB"})
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_the_command_line_finds_a_cluster(ray: Any, home: Path, tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    command = [
        *(sys.executable, "-m", "registry", "convert", home / "llama", tmp_path / "many"),
        *("--to", "megatron", "--tp", "2", "--engine", "ray"),
    ]
    done = subprocess.run(
        command, env={**os.environ, "RAY_ADDRESS": address}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "huggingface -> megatron (tp2)" in done.stdout
    registry.convert(home / "llama", tmp_path / "one", to="megatron", parallel=Parallel(tp=2))
    equal(tmp_path / "many", tmp_path / "one")


def test_a_worker_on_another_file_system_is_refused(ray: Any, home: Path, tmp_path: Path) -> None:
    from registry.engines.cluster import OnRay

    order = Order(home / "llama", "megatron", None, None, None, None, None)
    work = made(order)
    with pytest.raises(TargetError, match="a worker does not see the target"):
        OnRay(ray, order, 1).carry_out(work, tmp_path / "nowhere", False, None)
    with pytest.raises(CheckpointError, match="a worker plans something else"):
        OnRay(ray, Order(home / "llama", "trtllm", None, None, None, None, None), 1).carry_out(
            work, tmp_path, False, None
        )
    with pytest.raises(CheckpointError, match="a worker does not see the source"):
        OnRay(ray, Order(tmp_path / "gone", "trtllm", None, None, None, None, None), 1).carry_out(
            work, tmp_path, False, None
        )
    with pytest.raises(TargetError, match="a worker has written elsewhere"):
        check_there(work, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- torchrun ---------------------------------------------------------------------------------------------------------

RANK = """
import json, os, resource, signal, sys, threading
from pathlib import Path
import registry
folder, rank, said = Path(sys.argv[1]), int(os.environ["RANK"]), []

def die(stage):
    while not stage.exists():
        pass
    os.kill(os.getpid(), signal.SIGKILL)

for job in json.loads((folder / "jobs").read_text()):
    how, target, seen = job["how"], Path(job["target"]), []
    how["parallel"] = registry.Parallel(**how.pop("layout"))
    if rank == job["full"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    if rank == job["killed"]:
        threading.Thread(target=die, args=[target.with_name(f".{target.name}.partial")], daemon=True).start()
    try:
        report = registry.convert(
            job["source"], target, engine="torchrun", progress=lambda *done: seen.append(done), **how
        )
        found = {"nbytes": report.nbytes, "losses": sorted(report.losses)}
    except registry.RegistryError as error:
        found = {"error": type(error).__name__, "text": str(error)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said.append({**found, "seen": seen})
(folder / str(rank)).write_text(json.dumps(said))
"""


def torchrun(ranks: int, *command: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command on several ranks, all of which are gone afterwards."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-addr"),
            *("127.0.0.1", "--master-port", str(free_port()), *map(str, command)),
        ],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"not finished after {timeout:g} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def job(source: Path, target: Path, how: dict[str, Any], full: int = -1, killed: int = -1) -> dict[str, Any]:
    """A conversion for `on_ranks`: on the rank `full` no file may be large, and the rank `killed` dies as it writes."""
    layout = how.get("parallel") or Parallel()
    given = {**how, "layout": {"tp": layout.tp, "pp": layout.pp}}
    given.pop("parallel", None)
    return {"source": str(source), "target": str(target), "how": given, "full": full, "killed": killed}


def on_ranks(ranks: int, tmp_path: Path, *jobs: dict[str, Any]) -> list[list[dict[str, Any]] | None]:
    """What each rank says of the conversions, one after the other; None of one that is gone."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    (folder / "rank.py").write_text(RANK)
    (folder / "jobs").write_text(json.dumps(jobs))
    done = torchrun(ranks, folder / "rank.py", folder)
    files = [folder / str(rank) for rank in range(ranks)]
    found = [json.loads(file.read_text()) if file.exists() else None for file in files]
    assert done.returncode or None not in found, done.stderr
    shutil.rmtree(folder)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_write_what_one_process_writes(ranks: int, home: Path, tmp_path: Path) -> None:
    jobs = [job(home / source, tmp_path / f"{name}-many", how) for name, (source, how) in DIRECTIONS.items()]
    said = on_ranks(ranks, tmp_path, *jobs)
    for i, (name, (source, how)) in enumerate(DIRECTIONS.items()):
        report = registry.convert(home / source, tmp_path / name, **how)
        equal(tmp_path / f"{name}-many", tmp_path / name)
        assert [one and one[i]["losses"] for one in said] == [sorted(report.losses)] * ranks
        assert bool(report.losses) == (name != "huggingface")
        first, *others = said
        assert first is not None and first[i]["seen"][-1] == [report.nbytes, report.nbytes]
        assert all(one is not None and one[i]["seen"] == [] for one in others)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("ranks", "victims"), [(2, (0, 1)), (4, (3,))])
def test_an_error_on_one_rank_is_raised_on_all(
    ranks: int, victims: tuple[int, ...], home: Path, tmp_path: Path
) -> None:
    source, how = DIRECTIONS["megatron"]
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("of great value")
    damaged = damaged_replicas(home, tmp_path)
    jobs = [job(home / source, target, {**how, "overwrite": True}, full=victim) for victim in victims]
    last = job(damaged, target, {"to": "huggingface", "options": {"shard_size": "100KB"}, "overwrite": True})
    for one in on_ranks(ranks, tmp_path, *jobs, last):
        assert one is not None
        for found in one[:-1]:
            assert found["error"] == "TargetError", found
            assert "the target cannot be written" in found["text"]
            assert "File too large" in found["text"]
        assert one[-1]["error"] == "MappingError", one[-1]
        assert "rank0.safetensors" in one[-1]["text"] and "rank1.safetensors" in one[-1]["text"]
    assert contents(target) == {"notes.txt": b"of great value"}
    assert not list(tmp_path.glob(".*"))


def test_a_killed_rank_leaves_the_target_alone(home: Path, tmp_path: Path) -> None:
    source, how = DIRECTIONS["megatron"]
    said = on_ranks(2, tmp_path, job(home / source, tmp_path / "out", how, killed=1))
    assert said[1] is None
    assert not (tmp_path / "out").exists()
    for name in ("one", "out"):  # what is left beside the target goes away with the next run
        registry.convert(home / source, tmp_path / name, **how)
    equal(tmp_path / "out", tmp_path / "one")
    assert not list(tmp_path.glob(".*"))


def test_the_command_under_torchrun_speaks_once(home: Path, tmp_path: Path) -> None:
    registry.convert(home / "llama", tmp_path / "one", to="megatron", parallel=Parallel(tp=2))
    command = ("-m", "registry", "convert", home / "llama", tmp_path / "many", "--to", "megatron")
    done = torchrun(2, *command, "--tp", 2, "--engine", "torchrun")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("huggingface -> megatron (tp2)") == 1
    equal(tmp_path / "many", tmp_path / "one")
    again = torchrun(2, *command, "--engine", "torchrun")
    assert again.returncode
    assert again.stderr.count("registry: the target is not empty") == 1


# --- arguments --------------------------------------------------------------------------------------------------------


def test_files_are_dealt_out_by_bytes() -> None:
    sizes = [7, 1, 9, 2, 8, 3, 1]
    places = [(file, 0) for file in range(len(sizes)) if file != 1]
    owners = deal(Laid([FilePlan(str(i), n, []) for i, n in enumerate(sizes)], places), 3)
    assert owners[1] == 0  # it holds no tensor
    dealt = [[n for i, n in enumerate(sizes) if owners[i] == who and i != 1] for who in range(3)]
    assert [sum(own) for own in dealt] == [10, 10, 10]


def test_no_ray_is_one_clear_error(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["convert", str(home / "llama"), str(tmp_path / "out"), "--to", "megatron", "--engine", "ray"]) == 2
    assert "pip install 'checkpoint-registry[ray]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_engines_are_refused_where_they_cannot_work(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ArgumentError, match="torchrun --nproc-per-node"):
        registry.convert(home / "llama", tmp_path / "out", to="megatron", engine="torchrun")
    with pytest.raises(ArgumentError, match="the engine deals out all files"):
        registry.convert(home / "llama", tmp_path / "out", to="trtllm", engine="ray", ranks=[0])
    with pytest.raises(ArgumentError, match="engine is one of local, ray, torchrun"):
        registry.convert(home / "llama", tmp_path / "out", to="megatron", engine="spark")
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_the_same_after_its_journey() -> None:
    import pickle

    error = CheckpointError("a file ends early", where=Path("x"), expected="3 bytes", details=["one", "two"])
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), back.where) == (CheckpointError, str(error), Path("x"))

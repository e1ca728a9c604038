"""`python -m benchmarks.training`: saving a training state, loading it at another layout, and saves in the background.

The state is a Llama's bfloat16 weights with AdamW's moments in float32. It is saved by one process and loaded by two at
TP2, by this library, torch.distributed.checkpoint and megatron-core 0.16.1 (whose writers are threads here: forked ones
get stuck beside gloo's). Each reads what it wrote itself, and `cp` of the same bytes is beside each run. Times are of
the call in the slowest rank and, under "process", of the whole run with its imports.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import measure as shared
from benchmarks.measure import copy, files_of, prime, settle

HIDDEN, FFN, VOCAB, HEADS, GROUPS = 1536, 4096, 32000, 12, 4
SYSTEMS = ("registry", "torch dcp", "megatron-core")


def config(layers: int) -> dict[str, Any]:
    """The HuggingFace config of the model."""
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS, "head_dim": HIDDEN // HEADS, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
    }  # fmt: skip


def shapes(layers: int) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Megatron's name -> the whole shape, and the dimension that tensor parallelism cuts."""
    dim = HIDDEN // HEADS
    layer: dict[str, tuple[tuple[int, ...], int | None]] = {
        "input_layernorm.weight": ((HIDDEN,), None),
        "self_attention.linear_proj.weight": ((HIDDEN, HEADS * dim), 1),
        "self_attention.linear_qkv.weight": (((HEADS + 2 * GROUPS) * dim, HIDDEN), 0),
        "pre_mlp_layernorm.weight": ((HIDDEN,), None),
        "mlp.linear_fc1.weight": ((2 * FFN, HIDDEN), 0),
        "mlp.linear_fc2.weight": ((HIDDEN, FFN), 1),
    }
    found = {"embedding.word_embeddings.weight": ((VOCAB, HIDDEN), 0), "output_layer.weight": ((VOCAB, HIDDEN), 0)}
    found |= {f"decoder.layers.{i}.{name}": value for i in range(layers) for name, value in layer.items()}
    return {**found, "decoder.final_layernorm.weight": ((HIDDEN,), None)}


def _primed(path: str, weights: dict[str, Any], moments: dict[str, dict[str, Any]]) -> None:
    """As `_prime`, in the process that saves: memory that was found and is free is soon given back to the host."""
    tensors = [*weights.values(), *(t for own in moments.values() for t in own.values() if hasattr(t, "nbytes"))]
    scratch, block = Path(path).with_name("scratch"), bytes(1 << 24)
    with scratch.open("wb") as file:
        for _ in range(sum(t.nbytes for t in tensors) >> 24):
            file.write(block)
    scratch.unlink()


# --- one rank of one system; run by `python -m benchmarks.training --child` -------------------------------------------


def _state(layers: int, tp: int, rank: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(weights, optimizer state by weight) of a rank; at TP1 with numbers in it."""
    import torch

    weights: dict[str, Any] = {}
    moments: dict[str, dict[str, Any]] = {}
    for name, (shape, cut) in shapes(layers).items():
        own = tuple(n // tp if d == cut else n for d, n in enumerate(shape))
        size = torch.Size(own).numel()
        values = (torch.arange(size, dtype=torch.float32) % 1009 - 504).reshape(own) if tp == 1 else torch.ones(own)
        weights[name] = values.bfloat16()
        moments[name] = {"exp_avg": values, "exp_avg_sq": values + 1, "step": 3}
    return weights, moments


def _ours(do: str, path: str, layers: int, tp: int, rank: int) -> float:
    import registry
    import registry.training.loading
    import registry.training.saving  # as the others have imported what they need

    weights, moments = _state(layers, tp, rank)
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-3}]}
    given: dict[str, Any] = {"model": weights, "optimizer": optimizer, "parallel": registry.Parallel(tp=tp)}
    if do != "load":
        _primed(path, weights, moments)
    start = time.perf_counter()
    if do == "save":
        registry.save(path, iteration=1, config=config(layers), durable=False, **given)
    elif do == "background":
        registry.save(path, iteration=1, config=config(layers), durable=False, **given)  # host memory is made
        start = time.perf_counter()
        saved = registry.save(path, iteration=2, config=config(layers), durable=False, background=True, **given)
        seconds = time.perf_counter() - start
        saved.wait()
        first = registry.save(path, iteration=3, config=config(layers), durable=False, background=True, **given)
        first.wait()
        return min(seconds, first.blocked)
    else:
        registry.load(path, **given)
    return time.perf_counter() - start


def _dcp(do: str, path: str, layers: int, tp: int, rank: int) -> float:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    weights, moments = _state(layers, tp, rank)
    cuts = {name: cut for name, (_, cut) in shapes(layers).items()}
    if tp > 1:
        mesh = init_device_mesh("cpu", (tp,))

        def placed(name: str, tensor: Any) -> Any:
            cut = cuts[name]
            return DTensor.from_local(tensor, mesh, [Replicate() if cut is None else Shard(cut)], run_check=False)

        weights = {name: placed(name, tensor) for name, tensor in weights.items()}
        moments = {
            name: {kind: placed(name, t) if kind != "step" else t for kind, t in own.items()}
            for name, own in moments.items()
        }
    state = {"model": weights, "optimizer": {"state": moments}}
    if do == "save":
        _primed(path, weights, moments)
    start = time.perf_counter()
    if do == "save":
        dcp.save(state, checkpoint_id=path)
    else:
        dcp.load(state, checkpoint_id=path)
    return time.perf_counter() - start


def _megatron(do: str, path: str, layers: int, tp: int, rank: int) -> float:
    from tests.megatron_cpu.cpu import import_megatron
    from tests.megatron_cpu.optimizer import writes_by_threads

    import_megatron(engine=False)
    writes_by_threads()
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    weights, moments = _state(layers, tp, rank)
    sharded: dict[str, Any] = {}

    def add(kind: str, name: str, tensor: Any) -> None:
        cut = shapes(layers)[name][1]
        numbered = name.startswith("decoder.layers.")
        parts = name.split(".")
        key = kind + (".".join(parts[:2] + parts[3:]) if numbered else name)
        axis = [(0, int(parts[2]), layers)] if numbered else []
        halves = [(tensor, rank, tp)]
        if "linear_fc1" in name:  # gate and up are cut each on its own
            halves = [(half, i * tp + rank, 2 * tp) for i, half in enumerate(tensor.chunk(2))]
        for i, (part, at, of) in enumerate(halves):
            cuts = [] if cut is None else [(cut + len(axis), at, of)]
            replica = (0, rank if cut is None else 0, 0)
            sharded[f"{kind}{name} {i}"] = ShardedTensor.from_rank_offsets(
                key, part, *axis, *cuts, replica_id=replica, prepend_axis_num=len(axis)
            )  # fmt: skip

    for name, tensor in weights.items():
        add("", name, tensor)
        for kind in ("exp_avg", "exp_avg_sq"):
            add(f"optimizer.state.{kind}.", name, moments[name][kind])
    if do == "save":
        _primed(path, weights, moments)
        Path(path).mkdir()
    start = time.perf_counter()
    if do == "save":
        dist_checkpointing.save(sharded, path)
    else:
        dist_checkpointing.load(sharded, path)
    return time.perf_counter() - start


def _child(system: str, do: str, path: str, layers: int, rank: int, world: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    call = {"registry": _ours, "torch dcp": _dcp, "megatron-core": _megatron}[system]
    print(json.dumps(call(do, path, layers, world, rank)), flush=True)
    os._exit(0)  # Megatron's writer leaves processes behind that keep an interpreter from ending


# --- the comparison ---------------------------------------------------------------------------------------------------


def ranks(system: str, do: str, path: Path, layers: int, world: int) -> tuple[float, float]:
    """(seconds of the call in the slowest rank, seconds of the processes)."""
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.training", "--child", system, do, str(path), str(layers)]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(world), f"{scratch}/store"], stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
            )
            for rank in range(world)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=900)[0] for process in processes]
        seconds = time.perf_counter() - start
    if any(process.returncode for process in processes):
        raise SystemExit(f"{system} could not {do}")
    return max(float(json.loads(output.splitlines()[-1])) for output in outputs), seconds


def measure(folder: Path, layers: int, pairs: int, rows: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of the table; what they say is added to `rows`."""
    yield f"{'':<16}{'':<12}{'MB':>7}{'cp s':>8}{'call s':>8}{'ratio':>8}{'process':>9}{'ratio':>8}"
    for system in SYSTEMS:
        kept, saved, copied = folder / "kept", folder / "saved", folder / "copy"
        ranks(system, "save", kept, layers, 1)
        for do, world in (("save", 1), ("load", 2)):
            times: list[tuple[float, float, float]] = []
            for _ in range(pairs):
                prime(kept, folder)
                call, process = ranks(system, do, kept if do == "load" else saved, layers, world)
                shutil.rmtree(saved, ignore_errors=True)
                prime(kept, folder)
                times.append((call, process, copy(kept, copied, durable=False).call))
                shutil.rmtree(copied)
            size = sum(file.stat().st_size for file in files_of(kept))
            call, process, cp = (median(column) for column in zip(*times, strict=True))
            ratios = median(t[0] / t[2] for t in times), median(t[1] / t[2] for t in times)
            rows.append({
                "name": f"{system}: {do}", "nbytes": size, "cp": cp, "call": call, "process": process,
                "ratio": ratios[0], "process_ratio": ratios[1],
            })  # fmt: skip
            yield (
                f"{system:<16}{do + (' tp1->tp2' if do == 'load' else ''):<12}{size / 1e6:>7.0f}{cp:>8.2f}"
                f"{call:>8.2f}{ratios[0]:>8.2f}{process:>9.2f}{ratios[1]:>8.2f}"
            )  # fmt: skip
        if system == "registry":
            settle()
            blocked, _ = ranks(system, "background", saved, layers, 1)
            rows.append({"name": "registry: background", "blocked": blocked})
            yield f"{system:<16}a save in the background holds training up for {blocked:.2f} s"
            shutil.rmtree(saved)
        shutil.rmtree(kept)


def main(argv: list[str] | None = None) -> None:
    """Measure, and print a table."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        system, do, path, layers, rank, world, store = argv[1:]
        _child(system, do, path, int(layers), int(rank), int(world), store)
    parser = shared.options(__doc__, "training")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model (default 8: 3 GB of state)")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each, with a run of cp beside it")
    chosen = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=shared.made(chosen.dir)) as folder:
        for line in measure(Path(folder), chosen.layers, chosen.pairs, rows):
            print(line, flush=True)
    shared.write(chosen.output, chosen.dir, rows, pairs=chosen.pairs)


if __name__ == "__main__":
    main()

"""Real training state for the tests: megatron-core's own distributed optimizer takes steps on a small model, and saves
or loads its state in each of its forms.

    training([Run(hf, save={"fully_reshardable": folder}, tp=2, dp=2), ...])      # returns each one's error, or None

The gradients are random numbers that a parameter's name decides, so that nothing has to be computed, and every weight's
moments are its own. As a program (`python -m tests.megatron_cpu.optimizer runs.json report.json`) it is the launcher:
it imports Megatron once, then forks one process a rank for each run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import types
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.megatron_cpu import Job

#: The form with files of every rank: model_optim_rng.pt, and distrib_optim.pt beside it.
LEGACY = "legacy"
#: What registry.save writes of Megatron's own optimizer.
OURS = "registry"


@dataclass(frozen=True)
class Run:
    """One training: where its state comes from, and where it goes, by Megatron's name of the form."""

    hf: Path  # a HuggingFace directory, of which only config.json is read
    save: Mapping[str, Path] = field(default_factory=dict)  # distrib_optim_sharding_type, LEGACY or OURS -> a folder
    load: Path | None = None  # a fully_reshardable or per-rank checkpoint, to go on from instead of training
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    dp: int = 1  # data parallel ranks of the dense layers
    bucket: int = 0  # elements after which a bucket of the gradient buffer is full; 0: one bucket
    bf16: bool = True
    distributed: bool = True  # the optimizer with data-parallel shards, or those without
    mtp: int = 0
    tied: bool = False  # the output layer shares the embedding
    engine: bool = False
    grouped: bool = False
    steps: int = 3
    ours: bool = False  # registry.load is what loads, into an optimizer that has made a step
    names: Path | None = None  # where to write the parameters' names, in the order in which they were made, and stop


def training(runs: Sequence[Run], timeout: float = 120, megatron: Path | None = None) -> list[str | None]:
    """Runs all in one launcher, `timeout` seconds each; `megatron` is a folder with another megatron-core."""
    with tempfile.TemporaryDirectory(prefix="megatron-cpu-") as name:
        folder, repository = Path(name), Path(__file__).resolve().parents[2]
        (folder / "runs").write_text(json.dumps([asdict(run) for run in runs], default=str))
        path = [str(part) for part in (megatron, repository, os.environ.get("PYTHONPATH")) if part]
        launcher = subprocess.run(
            [sys.executable, "-m", "tests.megatron_cpu.optimizer", folder / "runs", folder / "report", str(timeout)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
            timeout=120 + timeout * len(runs),  # it is killed then, and its workers with it
        )
        if not (folder / "report").exists():
            return [f"the launcher ended with {launcher.returncode}:\n{launcher.stderr[-4000:]}"] * len(runs)
        report: list[str | None] = json.loads((folder / "report").read_text())
        return report


def main() -> None:
    from torch.multiprocessing import _prctl_pr_set_pdeathsig as die_with_parent  # type: ignore[attr-defined]

    from tests.megatron_cpu.cpu import import_megatron

    runs = [Run(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    die_with_parent(signal.SIGKILL)
    import_megatron(any(run.engine for run in runs))
    _install_adam()
    report = [_run(run, float(sys.argv[3])) for run in runs]
    Path(sys.argv[2]).write_text(json.dumps(report))


def _run(run: Run, timeout: float) -> str | None:
    from torch.multiprocessing.spawn import ProcessException, start_processes

    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="megatron-cpu-") as scratch:
        start: Any = start_processes
        world = run.tp * run.pp * run.dp
        ranks = start(_rank, (run, f"{scratch}/store", os.getpid()), world, join=False, start_method="fork")
        try:
            while not ranks.join(max(0, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    return f"not finished after {timeout:g} s"
        except ProcessException as error:
            return str(error).strip()
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
    return None


def _rank(rank: int, run: Run, store: str, launcher: int) -> None:
    from torch.multiprocessing import _prctl_pr_set_pdeathsig as die_with_parent  # type: ignore[attr-defined]

    die_with_parent(signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(1)
    try:
        _work(run, rank, store)
    except BaseException as error:  # torch's CheckpointException is no Exception
        import traceback

        raise RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}") from error


def _install_adam() -> None:
    """The kind of Adam that Megatron trains with, Apex's and Transformer-Engine's: its step is a number of the group.

    With torch's, which has one for every parameter, Megatron saves reshardable state and cannot load it.
    """
    import torch
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    class FusedAdam(torch.optim.Optimizer):
        def __init__(
            self, params: Any, lr: float, betas: Any = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
            **_: Any,
        ) -> None:  # fmt: skip
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["step"] = n = group.get("step", 0) + 1
                first, second = group["betas"]
                for parameter in (p for p in group["params"] if p.grad is not None):
                    state = self.state[parameter]
                    for name in ("exp_avg", "exp_avg_sq"):
                        state.setdefault(name, torch.zeros_like(parameter))
                    state["exp_avg"].lerp_(parameter.grad, 1 - first)
                    state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                    size = (state["exp_avg_sq"] / (1 - second**n)).sqrt_().add_(group["eps"])
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.addcdiv_(state["exp_avg"], size, value=-group["lr"] / (1 - first**n))

    vars(optimizer).update(Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False)
    vars(distrib_optimizer).update(Adam=FusedAdam, HAVE_APEX_OR_TE=True)


def writes_by_threads() -> None:
    """Files are written by forked processes, which get stuck where another thread held a lock: threads do as well. And
    the queue of their results would be in a process of its own, which outlives the ranks.
    """
    import queue
    import threading

    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem

    threads = types.SimpleNamespace(Process=threading.Thread, Queue=queue.Queue, JoinableQueue=queue.Queue)
    vars(filesystem)["mp"] = types.SimpleNamespace(get_context=lambda _: threads)
    vars(filesystem)["_results_queue"] = queue.Queue()


def _patch() -> None:
    """What saving and optimizers need beside what loading does."""
    import torch
    import torch.distributed as dist

    writes_by_threads()
    cuda: Any = torch.cuda
    cuda.FloatTensor, cuda.IntTensor = torch.FloatTensor, torch.IntTensor
    cuda.is_current_stream_capturing = lambda: False
    for name in ("empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_: None)
    plain: Any = torch.Tensor.type

    def kind(tensor: Any, *arguments: Any, **options: Any) -> Any:
        """Optimizers decide by the name of the type, which has the device in it."""
        found = plain(tensor, *arguments, **options)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) and "cuda" not in found else found

    torch.Tensor.type = kind  # type: ignore[method-assign]
    whole = dist.all_reduce

    def all_reduce(tensor: Any, op: Any = dist.ReduceOp.SUM, **options: Any) -> Any:
        if op == dist.ReduceOp.AVG:
            whole(tensor, **options)
            tensor.div_(dist.get_world_size(options.get("group")))
            return None
        return whole(tensor, op=op, **options)

    vars(dist)["all_reduce"] = all_reduce


def _random(name: str, tensor: Any, step: int) -> Any:
    """Numbers that the parameter decides: of every tensor-parallel rank the same where all have the whole of it."""
    from megatron.core import parallel_state as ps

    own = ps.get_expert_tensor_parallel_rank() if ".experts." in name else ps.get_tensor_model_parallel_rank()
    sharded = getattr(tensor, "tensor_model_parallel", False)
    ep = ps.get_expert_model_parallel_rank() if ".experts." in name else 0
    return drawn(name, tensor.shape, step, own if sharded else 0, ep)


def drawn(name: str, shape: Sequence[int], step: int, tp: int = 0, ep: int = 0) -> Any:
    """The gradient of one parameter in one step, and as step 0 what its value begins with."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name} {tp} {ep} {step}".encode())))


def _named(chunks: Sequence[Any], tied: bool) -> list[tuple[str, Any]]:
    """Every parameter, and every buffer that is not set yet, by a name that is the same at any pipeline layout."""
    found = []
    for chunk in chunks:
        layers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
        for name, parameter in (*chunk.named_parameters(), *(b for b in chunk.named_buffers() if b[1].isnan().any())):
            head = next((head for head in layers if name.startswith(head)), None)
            name = name if head is None else f"layer {layers[head]} {name.removeprefix(head)}"
            found.append(("embedding.word_embeddings.weight" if tied and "output_layer" in name else name, parameter))
    return found


def _work(run: Run, rank: int, store: str) -> None:
    """The whole of one rank."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    import registry
    from tests.megatron_cpu import model
    from tests.megatron_cpu.families import FAMILIES, Config

    _patch()
    job = Job(
        Path(), Path(run.hf), run.tp, run.pp, run.vpp, run.ep, engine=run.engine, grouped=run.grouped, mtp=run.mtp
    )
    hf = Config(json.loads((Path(run.hf) / "config.json").read_text()))
    hf["tie_word_embeddings"] = run.tied
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=run.tp * run.pp * run.dp)
    parallel_state.initialize_model_parallel(
        run.tp, run.pp, run.vpp if run.vpp > 1 else None, expert_model_parallel_size=run.ep,
        expert_tensor_parallel_size=run.tp,
    )  # fmt: skip
    model_parallel_cuda_manual_seed(1)
    arguments, _, _ = FAMILIES[hf.model_type].settings(hf)
    vocab = -(-hf["vocab_size"] // (16 * run.tp)) * 16 * run.tp
    built = list(model.build(job, hf, vocab).values())
    for module in (module for chunk in built for module in chunk.modules() if hasattr(module, "layer_norm_weight")):
        own = module._parameters  # the engine makes the norm first, our stand-in for it last
        for name in [name for name in own if not name.startswith("layer_norm")]:
            own[name] = own.pop(name)
    config = built[0].config
    if run.names is not None:
        Path(run.names).write_text(json.dumps([name for chunk in built for name, _ in chunk.named_parameters()]))
        return
    if run.bf16:
        config.bf16, config.params_dtype = True, torch.bfloat16
        built = [chunk.bfloat16() for chunk in built]
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=run.distributed, grad_reduce_in_fp32=True, overlap_grad_reduce=run.bucket > 0,
        bucket_size=run.bucket or None,
    )  # fmt: skip
    for name, parameter in _named(built, run.tied):
        parameter.data.copy_(_random(name, parameter, 0) * (0.05 if run.load is None else 1))
    chunks = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(built)]
    settings = OptimizerConfig(
        optimizer="adam", lr=0.01, bf16=run.bf16, params_dtype=config.params_dtype,
        use_distributed_optimizer=run.distributed, clip_grad=0.0, weight_decay=0.1,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, chunks)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    names = [f"model{i}" for i in range(run.vpp)] if run.vpp > 1 else ["model"]

    def state(form: str, loading: bool = False) -> dict[str, Any]:
        metadata = {
            "singleton_local_shards": False, "chained_optim_avoid_prefix": True, "dp_cp_group": group,
            "distrib_optim_sharding_type": form, "distrib_optim_fully_reshardable_mem_efficient": False,
        }  # fmt: skip
        shards = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, built, strict=True)}
        inner = shards if run.vpp > 1 else shards["model"]
        return {**shards, "optimizer": optimizer.sharded_state_dict(inner, loading, metadata=metadata)}

    def own_folder(root: Path) -> Path:
        """Where this rank's files are (megatron/training/checkpointing.py, get_checkpoint_name)."""
        stage = f"_{parallel_state.get_pipeline_model_parallel_rank():03d}" if run.pp > 1 else ""
        expert = f"_{parallel_state.get_expert_model_parallel_rank():03d}" if run.ep > 1 else ""
        return root / f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}{stage}{expert}"

    layout = registry.Parallel(run.tp, run.pp, run.vpp, run.ep)
    if run.load is None or run.ours:
        for step in range(1 if run.ours else run.steps):
            for name, parameter in _named(built, run.tied):
                parameter.main_grad.copy_(_random(name, parameter, step + 1))
            success, *_ = optimizer.step()
            assert success
    if run.ours:
        registry.load(
            str(run.load), model=built, optimizer=optimizer, parallel=layout, config=run.hf, random_states=False
        )  # fmt: skip
    elif run.load is None:
        pass
    elif any(Path(run.load).glob("mp_rank_*")):
        folder = own_folder(Path(run.load))
        loaded = torch.load(folder / "model_optim_rng.pt", weights_only=False)
        for name, chunk in zip(names, built, strict=True):
            chunk.load_state_dict(loaded[name], strict=True)
        optimizer.load_state_dict(loaded["optimizer"])
        if run.distributed:
            with torch.no_grad():  # 0.16.1 itself fails without, where weights are float32
                optimizer.load_parameter_state(str(folder / "distrib_optim.pt"))
    else:
        folder = Path(run.load)
        loaded = dist_checkpointing.load(state("fully_reshardable", loading=True), str(folder), strict="raise_all")
        for name, chunk in zip(names, built, strict=True):
            chunk.load_state_dict(loaded[name], strict=True)
        optimizer.load_state_dict(loaded["optimizer"])
    kept = {name: value for name, value in arguments.items() if isinstance(value, int | float | str | bool)}
    own = argparse.Namespace(
        **{**kept, "tensor_model_parallel_size": run.tp, "pipeline_model_parallel_size": run.pp,
           "virtual_pipeline_model_parallel_size": run.vpp if run.vpp > 1 else None,
           "expert_model_parallel_size": run.ep, "expert_tensor_parallel_size": run.tp, "padded_vocab_size": vocab,
           "transformer_impl": "transformer_engine" if run.engine else "local"},
    )  # fmt: skip
    for form, target in run.save.items():
        common = {"args": own, "checkpoint_version": 3.0, "iteration": run.steps}
        Path(target).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        if form == OURS:
            registry.save(
                target, model=built, optimizer=optimizer, parallel=layout, config=run.hf, iteration=run.steps,
                random_states=False,
            )  # fmt: skip
            continue
        if form == LEGACY:  # as megatron/training/checkpointing.py, save_checkpoint
            folder = own_folder(Path(target))
            folder.mkdir(exist_ok=True)
            if parallel_state.get_expert_data_parallel_rank() == 0:
                models = {n: c.state_dict_for_save_checkpoint() for n, c in zip(names, built, strict=True)}
                torch.save({**common, **models, "optimizer": optimizer.state_dict()}, folder / "model_optim_rng.pt")
            if run.distributed:
                optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
            continue
        dist_checkpointing.save({**common, **state(form)}, str(target))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

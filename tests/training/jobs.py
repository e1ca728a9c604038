"""What the processes of the training tests do. Each function runs on every rank and returns plain data."""

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import registry
from registry import Parallel
from registry.training.manager import Checkpoints
from tests.training.model import CONFIGS, Model, Place, cut

Layout = dict[str, int]


def me() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def stages(layout: Layout, kind: str = "dense", values: float | None = None) -> list[Model]:
    """This rank's chunks of the model."""
    found = [Model(Place(layout, *me()), chunk, kind) for chunk in range(layout.get("vpp", 1))]
    for parameter in (p for model in found for p in model.parameters()):
        if values is not None:
            parameter.data.fill_(values)
    return found


def adam(chunks: list[Model]) -> torch.optim.AdamW:
    named = [(n, p) for chunk in chunks for n, p in chunk.named_parameters()]
    decayed = {"params": [p for n, p in named if "norm" not in n], "weight_decay": 0.1}
    return torch.optim.AdamW([decayed, {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0}], lr=3e-3)


def trained(path: Path, kind: str) -> None:
    """Write weights and moments of a model that was trained for three steps on one process."""
    torch.manual_seed(0)
    model = Model(kind=kind)
    optimizer = adam([model])
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(torch.randint(0, 61, (2, 16))).backward()
        optimizer.step()
    state: dict[str, Any] = {"weights": {k: v.detach() for k, v in model.named_parameters()}, "step": 3}
    for moment in ("exp_avg", "exp_avg_sq"):
        state[moment] = {name: optimizer.state[p][moment] for name, p in model.named_parameters()}
    torch.save(state, path)


def from_whole(path: str, layout: Layout, kind: str = "dense", add: float = 0) -> tuple[list[Model], torch.optim.AdamW]:
    """This rank's part of a state that the test wrote with torch.save, with `add` added to all of it."""
    state = torch.load(path, weights_only=True)
    for tensor in (t for part in state.values() if isinstance(part, dict) for t in part.values() if add):
        tensor += add
    chunks = stages(layout, kind)
    optimizer = adam(chunks)
    for i, chunk in enumerate(chunks):
        own = {k: cut(state[k], Place(layout, *me()), i, kind) for k in ("weights", "exp_avg", "exp_avg_sq")}
        chunk.load_state_dict(own["weights"], strict=True)
        for name, parameter in chunk.named_parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state["step"])), "exp_avg": own["exp_avg"][name],
                "exp_avg_sq": own["exp_avg_sq"][name],
            }  # fmt: skip
    return chunks, optimizer


def save(
    path: str, whole: str, layout: Layout, format: str = "megatron", iteration: int = 7, optimizer: bool = True,
    config: Any = None, kind: str = "dense", **more: Any,
) -> Any:  # fmt: skip
    chunks, adamw = from_whole(whole, layout, kind)
    found = registry.save(
        path, model=chunks if len(chunks) > 1 else chunks[0], optimizer=adamw if optimizer else None,
        parallel=Parallel(**layout), iteration=iteration, format=format, config=config or CONFIGS[kind], **more,
    )  # fmt: skip
    return found.path


def export(path: str, whole: str, layout: Layout, target: Layout, **more: Any) -> Any:
    """Write the running model in a format for inference, in another layout than its own."""
    chunks, _ = from_whole(whole, layout)
    found = registry.save(
        path, model=chunks if len(chunks) > 1 else chunks[0], parallel=Parallel(**layout),
        target=Parallel(**target), config=more.pop("config", CONFIGS["dense"]), random_states=False, **more,
    )  # fmt: skip
    return [found.path, found.nbytes]


def load(
    path: str, whole: str, layout: Layout, optimizer: bool = True, kind: str = "dense", unpadded: int | None = None,
    add: float = 0, **more: Any,
) -> Any:  # fmt: skip
    """Load into NaNs, and compare bit for bit with what the test cuts of the whole state. Returns the differences.

    `unpadded`: rows of the vocabulary that the checkpoint has; those beyond are zeros.
    """
    chunks = stages(layout, kind, float("nan"))
    adamw = adam(chunks)
    for group in adamw.param_groups:
        group["lr"] = 1.0
    found = registry.load(
        path, model=chunks if len(chunks) > 1 else chunks[0], optimizer=adamw if optimizer else None,
        parallel=Parallel(**layout), **more,
    )  # fmt: skip
    expected, old = from_whole(whole, layout, kind, add)
    differ = []
    for mine, theirs in zip(chunks, expected, strict=True):
        for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
            if unpadded is not None and ("word_embeddings" in name or "output_layer" in name):
                first = Place(layout, *me()).tp * len(b)
                b.data[max(0, unpadded - first) :] = 0
            if not torch.equal(a, b):
                differ.append(name)
            if optimizer:
                x, y = adamw.state[a], old.state[b]
                differ += [f"{k} of {name}" for k in y if not torch.equal(x[k], y[k]) or x[k].dtype != y[k].dtype]
    if optimizer and [g["lr"] for g in adamw.param_groups] != [g["lr"] for g in old.param_groups]:
        differ.append("learning rates")
    return {"differ": differ, "iteration": found.iteration, "notes": found.notes, "random": found.random_states}


def group_of(lists: list[list[int]]) -> Any:
    """The process group of the list that this process is in; none for a process alone."""
    groups = {tuple(ranks): dist.new_group(ranks) for ranks in lists if len(ranks) > 1}
    return next((group for ranks, group in groups.items() if me()[0] in ranks), None)


def half(chunks: list[Model], adamw: torch.optim.AdamW, way: str) -> Any:
    """Round the model to bfloat16, with copies in float32 that AdamW steps; that as optimizer= takes it.

    attribute: main_param on each weight is its copy. mapping: plain tensors by the names of the weights.
    """
    state, groups = {}, [{**group} for group in adamw.param_groups]
    of: dict[Any, torch.nn.Parameter] = {}
    for i, chunk in enumerate(chunks):
        for name, weight in chunk.named_parameters():
            of[weight] = torch.nn.Parameter(weight.detach().clone())
            state[(i, name)] = {**adamw.state[weight], "master": of[weight].detach()}
            weight.data = weight.data.bfloat16()
            weight.main_param = of[weight]  # type: ignore[attr-defined]
    if way == "mapping":
        return {"state": state, "param_groups": [{k: v for k, v in g.items() if k != "params"} for g in groups]}
    found = torch.optim.AdamW([{**group, "params": [of[weight] for weight in group["params"]]} for group in groups])
    for weight, copy in of.items():
        found.state[copy] = dict(adamw.state[weight])
    return found


def save_half(path: str, whole: str, layout: Layout, way: str) -> Any:
    chunks, adamw = from_whole(whole, layout)
    registry.save(
        path, model=chunks, optimizer=half(chunks, adamw, way), parallel=Parallel(**layout), iteration=7,
        config=CONFIGS["dense"], random_states=False,
    )  # fmt: skip


def load_half(path: str, whole: str, layout: Layout, way: str) -> Any:
    """Load into NaNs. Returns what differs from the state that was saved."""
    chunks, adamw = from_whole(whole, layout, add=float("nan"))
    optimizer = half(chunks, adamw, way)
    registry.load(path, model=chunks, optimizer=optimizer, parallel=Parallel(**layout), random_states=False)
    expected, old = from_whole(whole, layout)
    differ = []
    for i, (mine, theirs) in enumerate(zip(chunks, expected, strict=True)):
        for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
            copy = a.main_param  # type: ignore[attr-defined]
            found = optimizer["state"][(i, name)] if way == "mapping" else {**optimizer.state[copy], "master": copy}
            for kind, tensor in {**old.state[b], "master": b}.items():
                if not torch.equal(found[kind], tensor) or found[kind].dtype != tensor.dtype:
                    differ.append(f"{kind} of {name}")
            if not torch.equal(a, b.bfloat16()):
                differ.append(name)
    return differ


class Run:
    """A training run at TP x DP or EP x DP, with everything that decides how it goes on."""

    def __init__(self, layout: Layout, seed: int, kind: str = "dense") -> None:
        rank, size = me()
        at = Place(layout, rank, size)
        tp, ep = at["tp"], at["ep"]
        self.kind, self.layout = kind, Parallel(**layout, dp=size // tp)
        every = list(range(size))
        tp_group = group_of([every[i : i + tp] for i in range(0, size, tp)])
        ep_group = group_of([every[i : i + ep] for i in range(0, size, ep)])
        self.dp_group = group_of([every[i::tp] for i in range(tp)])
        self.expert_dp_group = group_of([every[i::ep] for i in range(ep)])
        torch.manual_seed(seed)
        whole = Model(kind="dense" if kind == "dense" else "sequential")
        state = cut({k: v.detach() for k, v in whole.named_parameters()}, at, 0, kind)
        self.model = Model(at, 0, kind, tp_group, ep_group)
        self.model.load_state_dict(state)
        self.optimizer = adam([self.model])
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + 0.1 * step))
        # dropout is the same within a tensor-parallel group, the data differ between data-parallel ranks
        for seeded in (torch.manual_seed, random.seed, np.random.seed):
            seeded(seed + 100 * (rank // tp))
        self.tracker = torch.Generator().manual_seed(seed + rank)
        self.losses: list[float] = []
        self.iteration = 0

    def steps(self, count: int) -> None:
        for _ in range(count):
            ids = torch.randint(0, 61, (2, 16))
            ids[:, : random.randrange(3) + int(np.random.randint(2))] = 0
            self.optimizer.zero_grad()
            loss = self.model.loss(ids) + 0 * float(torch.rand((), generator=self.tracker))
            loss.backward()
            for name, parameter in self.model.named_parameters():
                if (group := self.expert_dp_group if ".experts." in name else self.dp_group) is not None:
                    dist.all_reduce(parameter.grad, group=group)
            self.optimizer.step()
            self.scheduler.step()
            self.iteration += 1
            self.losses.append(float(loss))

    def all(self) -> dict[str, Any]:
        """Everything, as it can be compared bit for bit."""
        state = {k: v.detach().numpy().tobytes().hex() for k, v in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for k, v in self.optimizer.state[parameter].items():
                state[f"{name} {k}"] = v.numpy().tobytes().hex()
        state["tracker"] = str(torch.rand(3, generator=self.tracker).tolist())
        state["torch"], state["numpy"] = str(torch.rand(3).tolist()), str(np.random.rand(3).tolist())
        state["python"], state["lr"] = str(random.random()), str([g["lr"] for g in self.optimizer.param_groups])
        return state


def resume(path: str, layout: Layout, k: int, kind: str = "dense") -> Any:
    """2k steps straight, and k steps, a save, a load into another run, and k more. Returns what differs."""
    straight = Run(layout, 1, kind)
    straight.steps(2 * k)
    expected = straight.all()
    one = Run(layout, 1, kind)
    one.steps(k)
    given = {"parallel": one.layout, "config": CONFIGS[kind]}
    registry.save(
        path, model=one.model, optimizer=one.optimizer, scheduler=one.scheduler, iteration=one.iteration,
        trackers={"own": one.tracker}, consumed_samples=2 * k, extra={"note": [1, (2.5, None)]}, **given,
    )  # fmt: skip
    two = Run(layout, 99, kind)
    two.steps(1)
    two.losses.clear()
    found = registry.load(
        path, model=two.model, optimizer=two.optimizer, scheduler=two.scheduler, trackers={"own": two.tracker}, **given
    )
    assert found.random_states and found.iteration == k and found.consumed_samples == 2 * k, found
    assert found.extra == {"note": [1, (2.5, None)]} and not found.notes, found
    two.steps(k)
    state = two.all()
    differ = [name for name, value in expected.items() if state[name] != value]
    return {"differ": differ, "losses": [straight.losses[k:], two.losses]}


def fail_on_rank(path: str, whole: str, layout: Layout, rank: int, **more: Any) -> Any:
    """As save, but one rank's disk is full."""
    if me()[0] == rank:

        def full(*_: Any, **__: Any) -> int:
            raise OSError(28, "No space left on device")

        os.pwrite = full  # type: ignore[assignment]
    return save(path, whole, layout, **more)


def disagree(path: str, whole: str, layout: Layout) -> Any:
    return save(path, whole, layout, iteration=7 + me()[0] // 2)


def killed(path: str, whole: str, layout: Layout, rank: int, after: float) -> Any:
    """Save one iteration after the other, each with other numbers, and kill one rank at some moment.

    The disk is slow, so that writing is most of a save, as it is of a large one. The other ranks return the last
    iteration that was saved, and what they were told then.
    """
    real, writes = os.pwrite, []

    def slow(*arguments: Any) -> int:
        time.sleep(0.01)
        writes.append(iteration)
        return real(*arguments)

    os.pwrite = slow  # type: ignore[assignment]
    dist.barrier()
    if me()[0] == rank:
        threading.Thread(target=lambda: (time.sleep(after), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
    saved = iteration = None
    try:
        for iteration in range(8, 1000):
            chunks, adamw = from_whole(whole, layout, add=iteration)
            registry.save(
                path, model=chunks[0], optimizer=adamw, parallel=Parallel(**layout), iteration=iteration,
                config=CONFIGS["dense"], durable=False,
            )  # fmt: skip
            saved = iteration
    except registry.RegistryError as error:
        return {"saved": saved, "said": str(error), "wrote": writes.count(iteration)}
    raise AssertionError("nobody was killed")


def after_kill(path: str, whole: str, layout: Layout) -> Any:
    """What a kill left, what there is to resume from, and how that differs from what was saved."""
    left = sorted(p.name for p in Path(path).iterdir())
    found = Checkpoints(path).resume()
    assert found is not None
    result = load(path, whole, layout, add=found.iteration if found.iteration != 7 else 0)
    return {"left": left, "resumed": found.iteration, "loaded": result["iteration"], "differ": result["differ"]}


def fully_sharded(path: str, to: str) -> Any:
    """Load into an FSDP2 model, and save that again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (me()[1],)))
    optimizer = adam([model])
    found = registry.load(path, model=model, optimizer=optimizer)
    registry.save(to, model=model, optimizer=optimizer, iteration=found.iteration, config=CONFIGS["dense"])
    return [type(p).__name__ for p in model.parameters()][:1]


def save_beside(path: str, whole: str, layout: Layout, fail: int | None = None) -> Any:
    """A save in the background while the ranks go on training and talking; `fail` is a rank whose disk is full then."""
    chunks, adamw = from_whole(whole, layout)
    given = {"model": chunks[0], "optimizer": adamw, "parallel": Parallel(**layout), "config": CONFIGS["dense"]}
    registry.save(path, iteration=6, **given)
    real = os.pwrite

    def slow(*arguments: Any) -> int:
        time.sleep(0.02)
        if me()[0] == fail:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    os.pwrite = slow
    saved = registry.save(path, iteration=7, background=True, **given)
    early, talks = saved.done, 0
    going = torch.ones(())
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.add_(1)
    while going > 0:  # until it is done on every rank
        going = torch.tensor(float(not saved.done))
        dist.all_reduce(going)
        talks += 1
    os.pwrite = real
    if fail is not None:
        said = "nothing"
        try:
            registry.save(path, iteration=8, **given)
        except registry.RegistryError as error:  # that of the save before
            said = str(error)
        registry.save(path, iteration=9, **given)
        return {"said": said, "left": sorted(p.name for p in Path(path).iterdir())}
    saved.wait()
    return {"early": early, "talks": talks, "seconds": [saved.blocked, saved.seconds]}

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
from tests.training.model import CONFIG, LAYERS, Model, cut

Layout = dict[str, int]


def me() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def place(layout: Layout) -> tuple[int, int, int]:
    """(tp, dp, pp) of this process, in Megatron's order."""
    rank, size = me()
    tp, pp = layout.get("tp", 1), layout.get("pp", 1)
    return rank % tp, rank // tp % (size // tp // pp), rank // (size // pp)


def stages(layout: Layout, values: float | None = None) -> list[Model]:
    """This rank's chunks of the model."""
    tp, pp, vpp = (layout.get(dim, 1) for dim in ("tp", "pp", "vpp"))
    _, _, stage = place(layout)
    found = [
        Model(tp, LAYERS // pp // vpp, first=stage == 0 and chunk == 0, last=stage == pp - 1 and chunk == vpp - 1)
        for chunk in range(vpp)
    ]
    for model in found:
        for parameter in model.parameters():
            if values is not None:
                parameter.data.fill_(values)
    return found


def adam(chunks: list[Model]) -> torch.optim.AdamW:
    named = [(n, p) for chunk in chunks for n, p in chunk.named_parameters()]
    decayed = {"params": [p for n, p in named if "norm" not in n], "weight_decay": 0.1}
    return torch.optim.AdamW([decayed, {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0}], lr=3e-3)


def from_whole(path: str, layout: Layout) -> tuple[list[Model], torch.optim.AdamW]:
    """This rank's part of a state that the test wrote with torch.save."""
    state = torch.load(path, weights_only=True)
    chunks = stages(layout)
    optimizer = adam(chunks)
    tp, pp, vpp = (layout.get(dim, 1) for dim in ("tp", "pp", "vpp"))
    tp_rank, _, stage = place(layout)
    for i, chunk in enumerate(chunks):
        own = {k: cut(state[k], tp, pp, tp_rank, stage, vpp, i) for k in ("weights", "exp_avg", "exp_avg_sq")}
        chunk.load_state_dict(own["weights"], strict=True)
        for name, parameter in chunk.named_parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state["step"])), "exp_avg": own["exp_avg"][name],
                "exp_avg_sq": own["exp_avg_sq"][name],
            }  # fmt: skip
    return chunks, optimizer


def save(
    path: str, whole: str, layout: Layout, format: str = "megatron", iteration: int = 7, optimizer: bool = True,
    config: Any = None, **more: Any,
) -> Any:  # fmt: skip
    chunks, adamw = from_whole(whole, layout)
    found = registry.save(
        path, model=chunks if len(chunks) > 1 else chunks[0], optimizer=adamw if optimizer else None,
        parallel=Parallel(**layout), iteration=iteration, format=format, config=config or CONFIG, **more,
    )  # fmt: skip
    return found.path


def export(path: str, whole: str, layout: Layout, target: Layout, **more: Any) -> Any:
    """Write the running model in a format for inference, in another layout than its own."""
    chunks, _ = from_whole(whole, layout)
    found = registry.save(
        path, model=chunks if len(chunks) > 1 else chunks[0], parallel=Parallel(**layout), iteration=0,
        target=Parallel(**target), config=more.pop("config", CONFIG), random_states=False, **more,
    )  # fmt: skip
    return [found.path, found.nbytes]


def load(path: str, whole: str, layout: Layout, optimizer: bool = True, **more: Any) -> Any:
    """Load into NaNs, and compare bit for bit with what the test cuts of the whole state. Returns the differences."""
    chunks = stages(layout, float("nan"))
    adamw = adam(chunks)
    for group in adamw.param_groups:
        group["lr"] = 1.0
    found = registry.load(
        path, model=chunks if len(chunks) > 1 else chunks[0], optimizer=adamw if optimizer else None,
        parallel=Parallel(**layout), **more,
    )  # fmt: skip
    expected, old = from_whole(whole, layout)
    differ = []
    for mine, theirs in zip(chunks, expected, strict=True):
        for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
            if not torch.equal(a, b):
                differ.append(name)
            if optimizer:
                x, y = adamw.state[a], old.state[b]
                differ += [f"{k} of {name}" for k in y if not torch.equal(x[k], y[k]) or x[k].dtype != y[k].dtype]
    if optimizer and [g["lr"] for g in adamw.param_groups] != [g["lr"] for g in old.param_groups]:
        differ.append("learning rates")
    return {"differ": differ, "iteration": found.iteration, "notes": found.notes, "random": found.random_states}


class Run:
    """A training run at TP x DP, with everything that decides how it goes on."""

    def __init__(self, tp: int, seed: int) -> None:
        rank, size = me()
        self.layout = Parallel(tp=tp, dp=size // tp)
        self.tp_group = self.dp_group = None
        if size > 1:
            for first in range(0, size, tp):
                group = dist.new_group(list(range(first, first + tp)))
                self.tp_group = group if first <= rank < first + tp else self.tp_group
            for first in range(tp):
                group = dist.new_group(list(range(first, size, tp)))
                self.dp_group = group if rank % tp == first else self.dp_group
        torch.manual_seed(seed)
        whole = Model()
        state = cut({k: v.detach() for k, v in whole.named_parameters()}, tp, 1, rank % tp, 0)
        self.model = Model(tp, group=self.tp_group if tp > 1 else None)
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
            ids = torch.randint(0, 61, (2, 16 - random.randrange(3) - int(np.random.randint(2))))
            self.optimizer.zero_grad()
            loss = self.model.loss(ids) + 0 * float(torch.rand((), generator=self.tracker))
            loss.backward()
            if self.dp_group is not None:
                for parameter in self.model.parameters():
                    dist.all_reduce(parameter.grad, group=self.dp_group)
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


def resume(path: str, tp: int, k: int, format: str = "megatron") -> Any:
    """2k steps straight, and k steps, a save, a load into another run, and k more. Returns what differs."""
    straight = Run(tp, 1)
    straight.steps(2 * k)
    expected = straight.all()
    one = Run(tp, 1)
    one.steps(k)
    given = {"parallel": one.layout, "config": CONFIG}
    registry.save(
        path, model=one.model, optimizer=one.optimizer, scheduler=one.scheduler, iteration=one.iteration,
        trackers={"own": one.tracker}, consumed_samples=2 * k, extra={"note": [1, (2.5, None)]}, **given,
    )  # fmt: skip
    two = Run(tp, 99)
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
    """Save iteration 8 over and over, and kill one rank at some moment."""
    if me()[0] == rank:
        threading.Thread(target=lambda: (time.sleep(after), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
    chunks, adamw = from_whole(whole, layout)
    for iteration in range(8, 200):
        registry.save(
            path, model=chunks[0], optimizer=adamw, parallel=Parallel(**layout), iteration=iteration, config=CONFIG,
            durable=False,
        )  # fmt: skip
    return sorted(p.name for p in Path(path).iterdir())


def fully_sharded(path: str, to: str) -> Any:
    """Load into an FSDP2 model, and save that again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (me()[1],)))
    optimizer = adam([model])
    found = registry.load(path, model=model, optimizer=optimizer)
    registry.save(to, model=model, optimizer=optimizer, iteration=found.iteration, config=CONFIG)
    return [type(p).__name__ for p in model.parameters()][:1]

"""What both of Megatron's containers share: the tracker file, iteration directories, and the pickled arguments.

Source: megatron/training/checkpointing.py (get_checkpoint_name, read_metadata, save_checkpoint).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from registry.dtypes import ITEMSIZE
from registry.errors import CheckpointError
from registry.parallel import Parallel
from registry.storage import Request

from . import param_groups, torchzip
from . import plain as plain_data
from .pickles import Global, attributes

TRACKER = "latest_checkpointed_iteration.txt"
CHECKPOINT_VERSION = 3.0
_SMALL = 1 << 16
_ITERATION = re.compile(r"iter_(\d{7,18})|release")
_NAMESPACE = Global("argparse", "Namespace")


def find(path: Path, is_checkpoint: Callable[[Path], bool]) -> Path | None:
    """The checkpoint directory that `path` means: itself, or the one that its tracker file names.

    Without a tracker a single iteration (or release) directory will do. None where there is no checkpoint of this kind;
    raises CheckpointError where there are some and it is not clear which is meant.
    """
    if is_checkpoint(path):
        return path
    found = {p.name: p for p in sorted(path.iterdir()) if _ITERATION.fullmatch(p.name) and is_checkpoint(p)}
    tracker = path / TRACKER
    if not found:
        return None
    if not tracker.is_file():
        if len(found) == 1:
            return next(iter(found.values()))
        raise CheckpointError(
            "several iterations and no tracker file", where=path, expected=TRACKER, found=", ".join(found),
            hint="name one of these directories",
        )  # fmt: skip
    with tracker.open(encoding="utf-8", errors="replace") as file:
        text = file.read(64).strip()
    name = f"iter_{int(text):07d}" if text.isascii() and text.isdigit() else text
    if name not in found:
        raise CheckpointError(
            "the tracker file names no checkpoint", where=tracker, expected=f"one of {', '.join(found)}",
            found=repr(text), hint="name the directory of an iteration, or copy the one that the tracker names",
        )  # fmt: skip
    return found[name]


def detect(path: Path, is_checkpoint: Callable[[Path], bool]) -> bool:
    """Is there a checkpoint of this kind, clear or not?"""
    try:
        return path.is_dir() and find(path, is_checkpoint) is not None
    except CheckpointError:
        return True


def directory(path: Path, is_checkpoint: Callable[[Path], bool], what: str) -> Path:
    """As `find`. Raises CheckpointError where there is none."""
    found = find(path, is_checkpoint)
    if found is None:
        raise CheckpointError(
            f"no {what} here", where=path, expected=f"{TRACKER} beside iter_* or release",
            found=", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing",
            hint="name the directory that holds the tracker file, or iter_*",
        )  # fmt: skip
    return found


def iteration(path: Path, state: Mapping[str, Any]) -> int | None:
    """The training step: from the directory's name, or from the state; None for a release."""
    match = _ITERATION.fullmatch(path.name)
    if match and match[1]:
        return int(match[1])
    value = state.get("iteration")
    return value if path.name != "release" and type(value) is int and value > 0 else None


def place(request: Request) -> str:
    """Where below the target's root the checkpoint goes."""
    return "release" if request.iteration is None else f"iter_{request.iteration:07d}"


def tracker(request: Request) -> dict[str, bytes]:
    """The tracker file that makes the checkpoint the latest."""
    return {TRACKER: b"release" if request.iteration is None else str(request.iteration).encode()}


def arguments(state: Mapping[str, Any]) -> dict[str, Any]:
    """The training arguments as a document."""
    return attributes(state.get("args"))


def parallel(args: Mapping[str, Any]) -> Parallel:
    """The parallel layout that the arguments give. Sizes that are missing or absurd count as one."""

    def size(*names: str) -> int:
        value = next((args[name] for name in names if args.get(name) is not None), 1)
        return value if type(value) is int and 1 <= value <= 1 << 20 else 1

    tp, etp = size("tensor_model_parallel_size", "model_parallel_size"), size("expert_tensor_parallel_size")
    return Parallel(
        tp=tp,
        pp=size("pipeline_model_parallel_size"),
        vpp=size("virtual_pipeline_model_parallel_size"),
        ep=size("expert_model_parallel_size"),
        etp=etp if args.get("expert_tensor_parallel_size") and etp != tp else None,
    )


def common_state(request: Request) -> dict[str, Any]:
    """The state that Megatron keeps beside the tensors, for a checkpoint of weights alone.

    A layout of the pipeline that only its author could have meant is spelled as Megatron's own arguments spell it.
    """
    document = {name: _pickled(value) for name, value in request.document.items()}
    document["rank"] = document["local_rank"] = 0
    counts = request.parallel.layers
    document["decoder_first_pipeline_num_layers"] = counts[0] if counts and len(set(counts)) > 1 else None
    document["decoder_last_pipeline_num_layers"] = counts[-1] if counts and len(set(counts)) > 1 else None
    document["pipeline_model_parallel_layout"] = None
    state = {
        "args": _NAMESPACE.new(state=document),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": request.iteration or 0,
        **(_carried(request) if request.states else {}),
        **plain_data.nodes(dict(request.common)),
    }
    if state.get("optimizer") is not None:
        state["optimizer"] = param_groups.written(
            state["optimizer"], chained=request.chained, masters="master" in request.states, ranks=bool(request.rows)
        )  # fmt: skip
    return state


#: What of the common state belongs to the optimizer and its schedule.
_TRAINING = ("optimizer", "opt_param_scheduler", "num_floating_point_operations_so_far")


def training(common: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """What a common state says of the optimizer, with its tensors read. Raises CheckpointError."""
    own = {**common, "optimizer": param_groups.without_tensors(common.get("optimizer"))}
    return {key: plain(own[key], where) for key in _TRAINING if common.get(key) is not None}


def plain(value: Any, where: Path) -> Any:
    """A graph with the (small) tensors in it read into memory."""
    return _plain(value, plain_data.Tensors(where))


def _plain(value: Any, tensors: plain_data.Tensors) -> Any:
    if isinstance(value, torchzip.TensorRef):
        if value.nbytes > _SMALL or not value.is_contiguous:
            raise CheckpointError(
                "a large tensor in the common state", where=tensors.where, expected=f"at most {_SMALL} bytes",
                found=f"{value.dtype} {value.shape}", hint="convert without it: options={'optimizer': 'none'}",
            )  # fmt: skip
        return torchzip.NewTensor(value.dtype, value.shape, tensors.read(value))
    if isinstance(value, dict):
        return {key: _plain(inner, tensors) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(inner, tensors) for inner in value)
    return value


def _carried(request: Request) -> dict[str, Any]:
    carried: dict[str, Any] = request.source.state.get("training") or {}
    return carried


def _pickled(value: Any) -> Any:
    """Names of torch dtypes as the dtypes themselves."""
    if isinstance(value, str) and value.startswith("torch.") and value.removeprefix("torch.") in ITEMSIZE:
        return Global("torch", value.removeprefix("torch."))
    return plain_data.nodes(value)

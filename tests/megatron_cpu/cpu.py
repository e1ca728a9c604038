"""Imports megatron-core unmodified on a machine without CUDA: what it calls of `torch.cuda` unconditionally does
nothing, and what gloo lacks of torch.distributed is made of what it has.
"""

import contextlib
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode


class CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)


def import_megatron(engine: bool) -> None:
    """With `engine`, Transformer-Engine is installed as far as Megatron can see, and so are the kernels of Mamba."""
    quiet = {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    quiet["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    os.environ.update(quiet, **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}))
    torch.set_num_threads(1)
    cuda: Any = torch.cuda
    state = torch.zeros(16, dtype=torch.uint8)  # opaque to Megatron, and nothing here draws from it
    cuda.get_rng_state = lambda *_: state
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_: None
    cuda.manual_seed = lambda *_: None
    cuda.stream = cuda.device = lambda *_: contextlib.nullcontext()
    cuda.current_stream = cuda.Stream = lambda *_, **__: Stream()
    cuda.Event = Stream
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
    all_to_all = dist.all_to_all_single
    dist.all_to_all_single = lambda output, input, to=None, by=None, **options: all_to_all(  # type: ignore[assignment]
        output, input, numbers(options.pop("output_split_sizes", to)), numbers(options.pop("input_split_sizes", by)),
        **options,
    )  # fmt: skip
    CudaMeansCpu().__enter__()  # type: ignore[no-untyped-call]
    if engine:
        from tests.megatron_cpu import engine as stand_in
        from tests.megatron_cpu import kernels

        stand_in.install()
        kernels.install()
    import megatron.core.tensor_parallel.random as random
    from megatron.core.transformer.moe import moe_utils

    random._get_cuda_rng_state = lambda *_, **__: state
    random._set_cuda_rng_state = lambda *_, **__: None
    vars(moe_utils).setdefault("te_general_gemm", None)  # without Transformer-Engine the router reads it undefined
    import tests.megatron_cpu.model  # noqa: F401


class Stream:
    """A stream or an event, where everything happens at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name in ("wait_stream", "wait_event", "wait", "record", "record_event", "synchronize"):
            return lambda *_: self
        raise AttributeError(name)


def numbers(sizes: Any) -> list[int] | None:
    """Megatron makes a list of split sizes only where they lie on a GPU."""
    return None if sizes is None else [int(size) for size in sizes]

"""What is timed, one job a process: `python -m benchmarks.jobs NAME '[arguments]'` prints seconds and memory as JSON.

A job imports what it needs and makes what it starts from; then the call that it returns is timed. Jobs of other
libraries do what their documentation shows for a copy of a checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Call = Callable[[], dict[str, Any] | None]


# --- this library -----------------------------------------------------------------------------------------------------


def convert(source: str, target: str, to: str, parallel: dict[str, Any], dtype: str | None, durable: bool,
            options: dict[str, Any]) -> Call:  # fmt: skip
    """A conversion."""
    import registry
    import registry.conversion  # what convert() would import first

    if dtype:
        import torch

        assert torch.__version__

    def call() -> None:
        registry.convert(
            source, target, to=to, parallel=registry.Parallel(**parallel), dtype=dtype, durable=durable, options=options
        )  # fmt: skip

    return call


def stream(source: str, to: str) -> Call:
    """Every tensor in a format's names, one after another, as `load_weights` of an engine takes them."""
    import torch

    import registry
    import registry.checkpoint

    def call() -> dict[str, Any]:
        nbytes = sum(tensor.nbytes for _, tensor in registry.stream(source, to=to))
        return {"nbytes": nbytes}

    assert torch.__version__
    return call


def view(source: str, to: str, name: str) -> Call:
    """One tensor of a checkpoint: what is opened, and how many bytes are read."""
    import torch

    import registry
    import registry.checkpoint

    assert torch.__version__
    registry.formats()
    opened: set[str] = set()
    sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)

    def call() -> dict[str, Any]:
        before = _read()
        tensor = registry.open(source).view(to)[name]
        data = [path for path in opened if Path(path).suffix in (".safetensors", ".distcp", ".pt")]
        return {"nbytes": tensor.nbytes, "read": _read() - before, "opened": len(set(data))}

    return call


def _read() -> int:
    """Bytes that this process has asked the system for so far."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def fill_transformers(source: str) -> Call:
    """A transformers model filled from any checkpoint, in place."""
    import torch
    import transformers

    import registry
    import registry.training.loading

    found = registry.open(source)
    config = transformers.AutoConfig.for_model(**found.config)

    def call() -> dict[str, Any]:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = model.to_empty(device="cpu")
        registry.load(source, model=model, names="huggingface", config=found.config, random_states=False)
        return {"nbytes": sum(p.nbytes for p in model.parameters())}

    return call


# --- others -----------------------------------------------------------------------------------------------------------


def safetensors(source: str, target: str) -> Call:
    """Every file loaded and saved."""
    import torch
    from safetensors.torch import load_file, save_file

    assert torch.__version__

    def call() -> None:
        Path(target).mkdir()
        for file in sorted(Path(source).glob("*.safetensors")):
            save_file(load_file(file), Path(target, file.name), metadata={"format": "pt"})

    return call


def safetensors_load(source: str) -> Call:
    """Every tensor of every file loaded into memory of its own: what load_file gives is mapped, and not yet read."""
    import torch
    from safetensors.torch import load_file

    assert torch.__version__

    def call() -> dict[str, Any]:
        nbytes = 0
        for file in sorted(Path(source).glob("*.safetensors")):
            tensors = load_file(file)
            for name in list(tensors):
                nbytes += tensors.pop(name).clone().nbytes
        return {"nbytes": nbytes}

    return call


def transformers(source: str, target: str) -> Call:
    """The model loaded and saved."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.gpt2 import modeling_gpt2  # imported by name when a model is made
    from transformers.models.llama import modeling_llama

    assert torch.__version__ and modeling_llama and modeling_gpt2
    return lambda: AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(target)


def _tensors(source: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {
        name: tensor.clone()
        for file in sorted(Path(source).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def dcp_save(source: str, target: str) -> Call:
    """torch.distributed.checkpoint, from tensors in memory."""
    import torch.distributed.checkpoint as dcp

    state = {"model": _tensors(source)}
    return lambda: dcp.save(state, checkpoint_id=target, no_dist=True) and None


def dcp_load(source: str, model: str) -> Call:
    """torch.distributed.checkpoint, into tensors in memory of the shapes of `model`."""
    import torch.distributed.checkpoint as dcp

    state = {"model": _tensors(model)}
    return lambda: dcp.load(state, checkpoint_id=source, no_dist=True)


def dcp_consolidate(source: str, target: str) -> Call:
    """torch.distributed.checkpoint's directory as one file of torch.save."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    Path(target).mkdir()
    return lambda: dcp_to_torch_save(source, str(Path(target, "model.pt")))


def mergekit(source: str, target: str) -> Call:
    """mergekit's copy of one model: a passthrough merge of it alone."""
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    assert torch.__version__
    config = MergeConfiguration.model_validate(
        {"merge_method": "passthrough", "dtype": "bfloat16", "models": [{"model": source}]}
    )
    return lambda: run_merge(config, target, MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False))


JOBS: dict[str, Callable[..., Call]] = {
    call.__name__: call
    for call in (
        convert, stream, view, fill_transformers,
        safetensors, safetensors_load, transformers, dcp_save, dcp_load, dcp_consolidate, mergekit,
    )
}  # fmt: skip


def anonymous() -> int:
    """Anonymous memory of this process, in bytes."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) << 10


def main() -> None:
    """Time one job."""
    name, arguments = sys.argv[1:]
    call = JOBS[name](*json.loads(arguments))
    before, start, cpu = anonymous(), time.perf_counter(), time.process_time()
    found = call() or {}
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu": cpu, "before": before, **found}), flush=True)
    os._exit(0)  # some libraries leave threads behind that keep an interpreter from ending


if __name__ == "__main__":
    main()

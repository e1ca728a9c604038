"""Three processes with a model sharded by FSDP2, for tests/test_dcp.py: `python -m tests.dcp_ranks folder`.

Each rank writes what it found as JSON. torch and transformers are imported once, before the processes fork.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import _prctl_pr_set_pdeathsig as die_with_parent  # type: ignore[attr-defined]

import registry

RANKS, STEP = 3, 3
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 2, "max_position_embeddings": 64,
}  # fmt: skip


def build(tied: bool = False, seed: int = 0) -> Any:
    """A tiny Llama in float32. The ranks do not divide its sizes, and some weights have fewer rows than there are."""
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied))


def adam(model: Any) -> torch.optim.AdamW:
    """Two groups, as training scripts have them."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=3e-3,
    )


def train(model: Any, optimizer: torch.optim.Optimizer) -> None:
    for i in range(STEP):
        optimizer.zero_grad()
        model(torch.arange(14)[None] * (i + 3) % 61).logits.square().mean().backward()
        optimizer.step()


def sharded(seed: int = 0) -> tuple[Any, torch.optim.AdamW]:
    model, mesh = build(seed=seed), init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, adam(model)


def whole(model: Any, optimizer: Any) -> dict[str, Any]:
    """Every tensor and number of model and optimizer, gathered, by the names that DCP has for them."""
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=full)
    found = {f"model.{name}": tensor for name, tensor in weights.items()}
    for name, entries in state.get("state", {}).items():
        found |= {f"optimizer.state.{name}.{kind}": value for kind, value in entries.items()}
    found["groups"] = [{k: v for k, v in group.items() if k != "params"} for group in state.get("param_groups", [])]
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What differs."""
    odd = sorted(a.keys() ^ b.keys())
    return odd + [k for k in a.keys() & b.keys() if not (a[k] == b[k] if k == "groups" else torch.equal(a[k], b[k]))]


def work(folder: Path) -> dict[str, Any]:
    model, optimizer = sharded()
    train(model, optimizer)
    expected = whole(model, optimizer)
    if not dist.get_rank():
        torch.save(expected, folder / "whole.pt")
    # torch saves, we load
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "iteration": 7}, checkpoint_id=folder / "torch")
    given: dict[str, Any] = {"names": "huggingface"}
    again, fresh = sharded(seed=1)
    found = registry.load(folder / "torch", model=again, optimizer=fresh, config=SIZES_CONFIG, **given)
    report: dict[str, Any] = {"ours of torch's": same(whole(again, fresh), expected), "iteration": found.iteration}
    # we save, torch and we load
    for name in ("dcp", "megatron"):
        registry.save(
            folder / name, model=model, optimizer=optimizer, iteration=5, format=name, config=SIZES_CONFIG, **given
        )  # fmt: skip
        again, fresh = sharded(seed=2)
        registry.load(folder / name, model=again, optimizer=fresh, **given)
        report[f"ours of {name}"] = same(whole(again, fresh), expected)
    registry.save(folder / "huggingface", model=model, format="huggingface", config=SIZES_CONFIG, **given)
    again, fresh = sharded(seed=3)
    weights, state = get_state_dict(again, fresh)
    loaded = {"model": weights, "optimizer": state, "iteration": -1}
    dcp.load(loaded, checkpoint_id=folder / "dcp/iter_0000005")
    set_state_dict(again, fresh, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    report["torch's of ours"] = same(whole(again, fresh), expected)
    return {**report, "iterations": loaded["iteration"]}


SIZES_CONFIG = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, dtype="float32").to_dict()


def rank_of(rank: int, folder: Path) -> None:
    die_with_parent(9)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
        found: dict[str, Any] = work(folder)
    except BaseException:
        found = {"error": traceback.format_exc()}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    os._exit(0)


def main(folder: Path) -> None:
    die_with_parent(9)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_of, args=(i, folder)) for i in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
        process.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What is broken at every call: each writer's conversions and saves, with what each may leave behind.

An operation works below one directory: its source is there, and `targets` holds what it writes and what lies beside.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

import registry
from registry import Parallel, Retention
from registry.training.manager import TRACKER, Checkpoints

#: Path below `targets` -> bytes; None for a directory.
State = dict[str, bytes | None]

#: What only a run that works or died leaves.
_LEFT = re.compile(r"(^|/)\.[^/]+\.(partial|partial\.old|lock|deleted)(/|$)")

HEADS, HIDDEN, FFN, LAYERS, VOCAB = 2, 16, 24, 1, 32
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
    "head_dim": HIDDEN // HEADS, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
}  # fmt: skip


def weights(seed: int) -> dict[str, np.ndarray]:
    """A tiny Llama in its own names."""
    draw = np.random.default_rng(seed)
    shapes = {
        **{f"self_attn.{one}_proj": (HIDDEN, HIDDEN) for one in "qkvo"},
        "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN),
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    named = {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()}
    named |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    named |= {"lm_head.weight": (VOCAB, HIDDEN)}
    return {name: draw.standard_normal(shape, np.float32) for name, shape in named.items()}


def hub(folder: Path, seed: int) -> Path:
    """A tiny Llama in two files, as the hub has large ones, with side files."""
    folder.mkdir(parents=True)
    every = weights(seed)
    parts = {"model-00001-of-00002.safetensors": "model.layers.0.", "model-00002-of-00002.safetensors": ""}
    index: dict[str, str] = {}
    for file, start in parts.items():
        own = {name: array for name, array in every.items() if name.startswith(start) and name not in index}
        index |= dict.fromkeys(own, file)
        save_file(own, folder / file, {"format": "pt"})
    size = sum(array.nbytes for array in every.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    return folder


def held(folder: Path) -> State:
    """All that is below a directory."""
    found = sorted(folder.rglob("*")) if folder.exists() else ()
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in found}


def left_over(state: State) -> list[str]:
    """What should not stay."""
    return sorted(name for name in state if _LEFT.search(name))


def seen(state: State) -> State:
    """What a reader takes for a checkpoint."""
    return {name: data for name, data in state.items() if not _LEFT.search(name)}


@dataclass(frozen=True)
class Operation:
    """One call of a writer. `prepare` makes what is there before, `act` is the call, in each of `ranks` processes."""

    writer: str
    what: str
    prepare: Callable[[Path], None]
    act: Callable[[Path], object]
    outcome: Callable[[State, State, State], str] = field(repr=False)
    ranks: int = 1
    injected: int = 0
    exchange: bool = True
    check: Callable[[Path], None] = field(repr=False, default=lambda root: None)

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.writer}: {self.what}"


# --- conversions ------------------------------------------------------------------------------------------------------


def whole(state: State, old: State, new: State) -> str:
    """The outcome where the target is one directory."""
    found = seen(state)
    if found == seen(new):
        return "new"
    if found == seen(old):
        return "old" if "out" in old else "absent"
    aside = {name.replace(".out.partial.old", "out", 1): data for name, data in state.items()
             if re.match(r"\.out\.partial\.old(/|$)", name)}  # fmt: skip
    return "aside" if not found and aside == seen(old) else "torn"


def each_file(state: State, old: State, new: State) -> str:
    """The outcome where files of several machines join in one directory: each is whole, the shared ones come last."""
    found, before, after = ({k: v for k, v in seen(one).items() if v is not None} for one in (state, old, new))
    if found in (before, after):
        return "new" if found == after else "old" if before else "absent"
    for name, data in found.items():
        if data not in (before.get(name), after.get(name)):
            return "torn"
    shared = "out/config.json"
    lacking = {name for name in after if name not in found and "manifest" not in name}
    return "torn" if before.keys() - found.keys() - {n for n in before if "manifest" in n} or (
        shared in found and shared not in before and lacking
    ) else "part"  # fmt: skip


def _convert(source: str, to: str, **arguments: Any) -> Callable[[Path], object]:
    def act(root: Path) -> object:
        return registry.convert(root / source, root / "targets" / "out", to=to, threads=1, overwrite=True, **arguments)

    return act


def conversion(
    what: str, start: str, to: str, *, over: bool, exchange: bool = True, parallel: Parallel | None = None,
    origin: Parallel | None = None, before: Callable[[Path], object] | None = None,
    outcome: Callable[[State, State, State], str] = whole, **more: Any,
) -> Operation:  # fmt: skip
    """From a checkpoint in format `start`; `over` an older one, made of other weights."""
    arguments = {"parallel": parallel, **more}

    def prepare(root: Path) -> None:
        hub(root / "hub", 1)  # `targets` is made by the writer, if there is nothing before
        if start == "huggingface":
            (root / "hub").rename(root / "source")
        else:
            registry.convert(root / "hub", root / "source", to=start, parallel=origin)
            shutil.rmtree(root / "hub")
        if over:
            _convert("older", to, **{**arguments, "ranks": None})(_with_older(root))
            shutil.rmtree(root / "older")
        if before is not None:
            before(root)

    def check(root: Path) -> None:
        if "ranks" not in more:
            assert registry.verify(root / "source", root / "targets" / "out")

    return Operation(to, what, prepare, _convert("source", to, **arguments), outcome, exchange=exchange, check=check)


def _with_older(root: Path) -> Path:
    hub(root / "older", 2)
    return root


# --- saves ------------------------------------------------------------------------------------------------------------


def run_directory(latest: int | None, kept: set[int], gone: set[int]) -> Callable[[State, State, State], str]:
    """The outcome in the directory of a training run, whose tracker names `latest` before.

    `kept` are iterations that must be there at every moment, `gone` those that retention removes.
    """

    def outcome(state: State, old: State, new: State) -> str:
        found = seen(state)
        before, after, now = (_by_iteration(one) for one in (old, new, found))
        tracker, was, will = found.get(TRACKER), old.get(TRACKER), new.get(TRACKER)
        if tracker not in (was, will) or kept - now.keys():
            return "torn"
        if not all(one in (before.get(i), after.get(i)) for i, one in now.items()):
            return "torn"
        if gone & before.keys() and tracker == was and gone - now.keys():
            return "torn"  # the old ones go when the new one is the latest
        if tracker is not None and int(tracker) not in now:
            return "torn"
        latest_now = None if tracker is None else now[int(tracker)]
        if tracker == will and latest_now == after[int(will or b"")]:
            return "new"
        return "old" if latest is not None else "absent"

    return outcome


def _by_iteration(state: State) -> dict[int, State]:
    found: dict[int, State] = {}
    for name, data in state.items():
        match = re.match(r"iter_(\d+)", name)
        if match:
            found.setdefault(int(match[1]), {})[name] = data
    return found


def _model(seed: int) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in weights(seed).items()}


def _optimizer(seed: int) -> dict[str, Any]:
    moments = {kind: _model(seed + i) for i, kind in enumerate(("exp_avg", "exp_avg_sq"), 1)}
    names = list(moments["exp_avg"])
    state = {name: {"step": 3.0, **{kind: tensors[name] for kind, tensors in moments.items()}} for name in names}
    return {"state": state, "param_groups": [{"lr": 1e-3, "params": names}]}


def save(seed: int, path: str = "targets", **more: Any) -> Callable[[Path], object]:
    """registry.save of a model that `seed` made."""

    def act(root: Path) -> object:
        optimizer = None if more.get("format") == "huggingface" else _optimizer(seed)
        saved = registry.save(
            root / path, model=_model(seed), optimizer=optimizer, names="huggingface", config=CONFIG, threads=1,
            **{"overwrite": True, **more},
        )  # fmt: skip
        return saved.wait()

    return act


def saving(
    writer: str, what: str, act: Callable[[Path], object], *before: Callable[[Path], object],
    outcome: Callable[[State, State, State], str], ranks: int = 1, injected: int = 0, resume: int | None = None,
) -> Operation:  # fmt: skip
    """A save, after others that made what is there before."""

    def prepare(root: Path) -> None:
        root.mkdir()
        for each in before:
            each(root)

    def check(root: Path) -> None:
        where = root / "targets"
        if resume is not None:
            found = Checkpoints(where).resume()
            assert found is not None and found.iteration == resume, found
            where = found.path
        else:
            where = where / "out"
        assert registry.verify(where)
        names = {name for name, _ in registry.stream(where, to="huggingface")}
        assert names == set(weights(0)), names

    return Operation(writer, what, prepare, act, outcome, ranks, injected, check=check)


def _sharded(seed: int, iteration: int, **more: Any) -> Callable[[Path], object]:
    """A save of two data-parallel ranks that share the writing."""
    return save(seed, iteration=iteration, parallel=Parallel(dp=2), **more)


TP2 = Parallel(tp=2)
LAST2 = Retention(last=2)


def operations() -> list[Operation]:
    """All of them."""
    first = run_directory(None, set(), set())
    second = run_directory(1, {1}, set())
    pruned = run_directory(2, {2}, {1})
    again = run_directory(1, {1}, set())
    ranked: dict[str, Any] = {"parallel": TP2, "outcome": each_file}

    def rank(number: int, source: str = "source") -> Callable[[Path], object]:
        return _convert(source, "trtllm", parallel=TP2, ranks=[number])

    return [
        conversion("new, from megatron", "megatron", "huggingface", over=False),
        conversion("over, from dcp", "dcp", "huggingface", over=True),
        conversion("new, from huggingface", "huggingface", "megatron", over=False, parallel=TP2),
        conversion("over, from legacy", "megatron-legacy", "megatron", over=True, parallel=TP2, origin=TP2),
        conversion("over without swap", "huggingface", "megatron", over=True, exchange=False),
        conversion("new, from huggingface", "huggingface", "megatron-legacy", over=False, parallel=TP2),
        conversion("over, from megatron", "megatron", "megatron-legacy", over=True, parallel=TP2),
        conversion("new, from huggingface", "huggingface", "trtllm", over=False, parallel=TP2),
        conversion("over, from megatron", "megatron", "trtllm", over=True, parallel=TP2),
        conversion("new, from huggingface", "huggingface", "dcp", over=False),
        conversion("over, from trtllm", "trtllm", "dcp", over=True, origin=TP2),
        conversion("rank 0, new", "huggingface", "trtllm", over=False, ranks=[0], **ranked),
        conversion("rank 1, beside 0", "huggingface", "trtllm", over=False, ranks=[1], before=rank(0), **ranked),
        conversion("rank 0, over", "huggingface", "trtllm", over=True, ranks=[0], **ranked),
        saving("megatron", "save, first", save(1, iteration=1), outcome=first, resume=1),
        saving("megatron", "save, third of two kept", save(3, iteration=3, retention=LAST2), save(1, iteration=1),
               save(2, iteration=2), outcome=pruned, resume=3),
        saving("megatron", "save, same again", save(2, iteration=1), save(1, iteration=1), outcome=again, resume=1),
        saving("megatron", "save, background", save(2, iteration=2, background=True), save(1, iteration=1),
               outcome=second, resume=2),
        saving("megatron-legacy", "save, second", save(2, iteration=2, format="megatron-legacy"),
               save(1, iteration=1, format="megatron-legacy"), outcome=second, resume=2),
        saving("huggingface", "save, over", save(2, path="targets/out", format="huggingface", random_states=False),
               save(1, path="targets/out", format="huggingface", random_states=False), outcome=whole),
        saving("dcp", "save, over", save(2, path="targets/out", format="dcp", random_states=False),
               save(1, path="targets/out", format="dcp", random_states=False), outcome=whole),
        saving("megatron", "2 ranks, rank 0", _sharded(2, 2), save(1, iteration=1), outcome=second, ranks=2, resume=2),
        saving("megatron", "2 ranks, rank 1", _sharded(2, 2), save(1, iteration=1), outcome=second, ranks=2,
               injected=1, resume=2),
    ]  # fmt: skip


def by_name() -> Mapping[str, Operation]:
    return {one.name: one for one in operations()}

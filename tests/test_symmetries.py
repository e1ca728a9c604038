"""Rearranged as a spec says that its axes go together, a model computes the same: transformers is asked.

The order of attention heads, of hidden units or of experts means nothing to a model: where all its tensors are
rearranged alike along such an axis, nothing changes. So it is for a scale that the matrix after it takes back. A spec
that is wrong about where an axis or a part of a sum lies rearranges something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from registry.model import LogicalModel
from registry.source import load
from tests.families import FAMILIES, build
from tests.families import load as load_directory
from tests.families import save as save_directory
from tests.test_families import HUB, outputs

#: Axes whose order means nothing.
FREE = [
    "hidden", "embedding", "group", "rep", "head", "head_dim", "ffn", "moe_ffn", "shared_ffn", "expert", "key_head",
    "key_dim", "value_rep", "value_dim", "mamba_group", "mamba_dim", "state", "inner", "rank", "q_lora", "kv_lora",
    "nope", "v_dim",
]  # fmt: skip
#: ALiBi gives every head a slope of its own.
SLOPES = {"bloom", "mpt", "falcon_rw", "bloom_hub"}
#: Heads' own dimensions are rotated with the position, but for those of values and of what meets them.
VALUES = ("*attention.v.*", "*attention.gate.*", "*attention.output.weight")
#: Tensors and the factor that their values are multiplied by, where the next ones, all that is between being linear,
#: take it back. A norm takes every scale back but not the sign.
SCALED = [
    ("*attention.v.*", 2, "*attention.output.weight", 1 / 2), ("attention.q.*", -1, "attention.q_*norm.weight", -1),
    ("mla.v_up.weight", 2, "mla.output.weight", 1 / 2), ("ssm.x.*", 2, "ssm.conv.weight", 1 / 2),
    ("*mamba.x.*", 2, "*mamba.conv.x.weight", 1 / 2), ("*mamba.b.*", 4, "*mamba.conv.b.weight", 1 / 4),
    ("*mamba.c.*", 8, "*mamba.conv.c.weight", 1 / 8), ("gdn.q.*", 2, "gdn.conv.q.weight", 1 / 2),
    ("gdn.k.*", 4, "gdn.conv.k.weight", 1 / 4), ("gdn.v.*", 8, "gdn.conv.v.weight", 1 / 8),
]  # fmt: skip
#: The same of MLPs with a gate.
GATED = [(f"{mlp}.up.*", 2, f"{mlp}.down.weight", 1 / 2) for mlp in ("mlp", "mlp.experts", "mlp.shared")]
#: Norms before a sublayer, and the matrices that take a scale of their weights and biases back.
_QKV = [f"attention.{part}.weight" for part in ("q", "k", "v", "gate")]
_MLP = ["mlp.gate.weight", "mlp.up.weight", "mlp.router.weight", "mlp.shared_gate.weight"]
_MLP += [f"mlp.{mlp}.{part}.weight" for mlp in ("experts", "shared") for part in ("gate", "up")]
_MAMBA = [f"mamba.{part}.weight" for part in ("z", "x", "b", "c", "dt")]
_OTHER = [f"gdn.{part}.weight" for part in "qkvzba"] + [f"mla.{part}.weight" for part in ("q", "q_down", "kv_down")]
_CROSS = ["cross_attention.q.weight"]
ABSORBED = {
    "attention_norm": [*_QKV, *_OTHER], "mlp_norm": _MLP, "mamba.norm_in": _MAMBA,
    "mixer_norm": [*_QKV, *(f"parallel_{matrix}" for matrix in _MAMBA)],
    "ssm.norm_in": ["ssm.x.weight", "ssm.z.weight"], "mla.q_down_norm": ["mla.q_up.weight"],
    "mla.kv_norm": ["mla.k_up.weight", "mla.v_up.weight"], "final_norm": ["output.weight"],
    "encoder.final_norm": ["decoder.cross_attention.k.weight", "decoder.cross_attention.v.weight"],
} | {
    f"{side}.{norm}": [f"{side}.{matrix}" for matrix in matrices]
    for side in ("encoder", "decoder")
    for norm, matrices in (("attention_norm", _QKV), ("mlp_norm", _MLP), ("cross_attention_norm", _CROSS))
}  # fmt: skip
#: A norm after a sublayer takes a sign, but for BERT's, which has what goes round it inside.
AFTER = ("attention.output.", "attention_post_norm")
#: gpt-oss clamps what Llama's MLP does not.
CLAMPED = {"gpt_oss"}
#: Their outputs are hidden units; the others' are logits.
MODELS = [n for n, f in FAMILIES.items() if f.model_class not in (None, "BertModel") and (not f.hub or n in HUB)]


@dataclass
class Box:
    """One logical tensor, or the part of it at some indices, as a view of the stored bytes."""

    tensor: str
    axes: tuple[str, ...]
    at: dict[str, int]
    view: torch.Tensor


def boxes(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[Box]:
    """Where the spec says that each logical tensor lies."""
    source = load(folder)
    for group in source.bound.groups:
        for k, member in enumerate(group.members):
            stored = tensors[source.opened.pieces[int(member)].name]
            at = {axis: int(column[k]) for axis, column in group.index.items()}
            for f in group.fragments:
                yield Box(f.tensor, f.axes, at, torch.as_strided(stored, f.size, f.stride, f.offset))


def shuffled(size: int, generator: torch.Generator) -> torch.Tensor:
    """Another order."""
    while True:
        order = torch.randperm(size, generator=generator)
        if size < 2 or not torch.equal(order, torch.arange(size)):
            return order


def orders(sizes: Mapping[str, int], fixed: set[str]) -> dict[str, torch.Tensor]:
    """Axis -> a new order of its indices, the same wherever the axis is."""
    generator = torch.Generator().manual_seed(5)
    found = {a: shuffled(sizes[a], generator) for a in FREE if a in sizes and a not in fixed}
    if "expert" in found:  # which are chosen among in groups of two
        found["expert"] = torch.arange(sizes["expert"]).reshape(-1, 2).flip(1).reshape(-1)

    def along(*parts: tuple[str, int]) -> torch.Tensor:
        """The order of a product of axes."""
        sizes = [size for _, size in parts]
        grid = torch.arange(math.prod(sizes)).reshape(sizes)
        for d, (axis, _) in enumerate(parts):
            grid = grid.index_select(d, found[axis]) if axis in found else grid
        return grid.reshape(-1)

    if "mamba_group" in sizes:  # heads go with their group
        groups = sizes["mamba_group"]
        found["mamba_head"] = along(("mamba_group", groups), ("", sizes["mamba_head"] // groups))
    if "kv_head" in sizes:  # the same heads by another name
        found["kv_head"], found["head"] = found["group"], along(("group", sizes["group"]), ("rep", sizes["rep"]))
    if "hidden_out" in sizes:
        found["hidden_out"] = found["hidden"]
    for whole, part in (("q_head_dim", "nope"), ("kv_down", "kv_lora")):  # the rest of which is rotated
        if whole in sizes:
            found[whole] = torch.cat([found[part], torch.arange(sizes[part], sizes[whole])])
    return found


def scaled(name: str, model: LogicalModel) -> list[tuple[str, float, str, float]]:
    """What of SCALED and GATED the model has as a whole."""
    found = [pair for pair in SCALED if any(fnmatchcase(tensor, pair[2]) for tensor in model.tensors)]
    if model.facts.get("zero_centered_norm"):  # whose weights are stored less one
        found = [pair for pair in found if pair[1] > 0]
    gated = [pair for pair in GATED if pair[0].replace("up.*", "gate.weight") in model.tensors]
    return found + (gated if name not in CLAMPED else [])


def rescale(box: Box, model: LogicalModel) -> None:
    """Give norms another scale, and the matrices before or after them what takes it back."""
    if model.facts.get("post_norm"):  # OPT's, on what goes round the sublayer too
        return
    less = 1.0 if model.facts.get("zero_centered_norm") else 0.0  # stored less one

    def norm(factor: float) -> None:
        box.view.add_(less).mul_(factor).sub_(less)

    parallel = "mlp_norm.weight" not in model.tensors and "mlp_post_norm.weight" not in model.tensors
    for i, (name, matrices) in enumerate(ABSORBED.items()):
        factor = 1.5 + i / 4  # another one for each, so that no two can be taken for each other
        after = [*matrices, *_MLP] if name == "attention_norm" and parallel else matrices
        if f"{name}.weight" not in model.tensors or (name == "final_norm" and "output.weight" not in model.tensors):
            continue
        if box.tensor == f"{name}.weight":
            norm(factor)
        elif box.tensor == f"{name}.bias":
            box.view.mul_(factor)
        elif box.tensor in after:
            box.view.mul_(1 / factor)
    after, name = AFTER
    if f"{name}.weight" in model.tensors and f"{name}.bias" not in model.tensors:
        if box.tensor == f"{name}.weight":
            norm(-1)
        elif box.tensor.startswith(after):
            box.view.mul_(-1)


def rearranged(name: str, folder: Path, there: Path) -> None:
    """Write a model to `there` with its tensors rearranged and scaled, as its spec understands them."""
    tensors, config = load_directory(folder)
    model, found = load(folder).model, list(boxes(folder, tensors))
    fixed = {"group", "rep"} if name in SLOPES else set[str]()
    peers = {(box.tensor, *sorted(box.at.items()), box.axes): box for box in found}
    for axis, order in orders(model.sizes, fixed).items():
        moved = [box for box in found if axis != "head_dim" or any(fnmatchcase(box.tensor, glob) for glob in VALUES)]
        was = {id(box): box.view.clone() for box in moved}
        for box in moved:
            if axis in box.axes:
                box.view.copy_(was[id(box)].index_select(box.axes.index(axis), order))
            elif axis in box.at:
                at = {**box.at, axis: int(order[box.at[axis]])}
                box.view.copy_(was[id(peers[box.tensor, *sorted(at.items()), box.axes])])
    for box in found:
        rescale(box, model)
        for many, factor, one, back in scaled(name, model):
            if fnmatchcase(box.tensor, many):
                box.view.mul_(factor)
            elif fnmatchcase(box.tensor, one):
                box.view.mul_(back)
    save_directory(there, tensors, config)


def check(name: str, folder: Path, scratch: Path) -> None:
    """A model of transformers, its tensors rearranged, computes what it did."""
    rearranged(name, folder, scratch / "rearranged")
    expected, found = outputs(name, folder), outputs(name, scratch / "rearranged")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_what_goes_together_may_be_rearranged(name: str, tmp_path: Path) -> None:
    check(name, build(name, "float32", tmp_path / "hf"), tmp_path)

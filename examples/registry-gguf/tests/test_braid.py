"""The architecture: the battery of the registry, and what its oddly stored tensors are, by other means."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

import registry
from registry.parallel import Parallel
from registry.testing import MappingTests, random_model

SIZES = {"depth": 3, "width": 24, "heads": 6, "groups": 2, "inner": 16, "vocab_size": 19}


class TestBraid(MappingTests):
    """Tied and untied, in every format that takes it."""

    architecture = "braid"
    configs: ClassVar = {
        "tied": {"model_type": "braid", **SIZES},
        "untied": {"model_type": "braid", **SIZES, "tie_word_embeddings": False},
    }
    layouts = (Parallel(), Parallel(tp=2))


def test_the_parts_are_where_the_family_has_them(tmp_path: Path) -> None:
    """Taken apart by hand: GGUF has the parts one by one. Bits are compared, for some numbers are no numbers."""
    random_model({"model_type": "braid", **SIZES}, tmp_path / "hf")
    registry.convert(tmp_path / "hf", tmp_path / "out", to="gguf")
    stored = {name: tensor.view(torch.int32) for name, tensor in registry.stream(tmp_path / "hf")}
    parts = {name: tensor.view(torch.int32) for name, tensor in registry.open(tmp_path / "out").view("gguf").items()}
    qkv = stored["strands.1.qkv"].T.unflatten(0, (2, 5, 4))  # 2 groups of 3 query heads, a key head and a value head
    assert torch.equal(parts["blk.1.attn_v.weight"], qkv[:, 4].flatten(0, 1))
    pairs = qkv[:, 3].unflatten(1, (2, 2)).transpose(1, 2)  # halves of a head take turns
    assert torch.equal(parts["blk.1.attn_k.weight"], pairs.reshape(8, 24))
    assert torch.equal(parts["blk.1.ffn_up.weight"], stored["strands.1.gate_up"][1::2])
    assert torch.equal(parts["blk.1.ffn_down.weight"], stored["strands.1.out"][:, 24:])
    assert torch.equal(parts["blk.1.ffn_norm.weight"], stored["strands.1.norms"][1])

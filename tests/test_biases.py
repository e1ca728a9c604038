"""Where a bias is the first column of its matrix, it still is in every format: rows and biases are arranged alike.

Of models with biases that no golden has.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import registry
from registry.testing.models import load_directory, save_directory
from tests.families import FAMILIES, LEGACY, MEGATRON, TRTLLM, build
from tests.test_golden_megatron import global_tensors

ENGINE: dict[str, object] = {"transformer_impl": "transformer_engine"}
#: Models, other fields of their configs, a format, its options.
CASES: list[tuple[str, dict[str, Any], str, dict[str, object]]] = [
    ("mamba_bias", {}, TRTLLM, {}),
    ("qwen3_5_text", {"attention_bias": True}, MEGATRON, ENGINE),
    ("qwen3_5_text", {"attention_bias": True}, LEGACY, ENGINE),
]


def first_columns(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every bias that belongs to a matrix -> that matrix's first column."""
    matrices = {name: tensors.get(re.sub(r"\bbias(?!.*\bbias)", "weight", name)) for name in tensors if "bias" in name}
    return {
        name: matrix.flatten(1)[:, 0].contiguous()
        for name, matrix in matrices.items()
        if matrix is not None and matrix.ndim > 1 and len(matrix) == len(tensors[name])
    }


def written(folder: Path, to: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint of one rank."""
    if to == TRTLLM:
        return load_file(folder / "rank0.safetensors")
    if to == MEGATRON:
        return global_tensors(folder / "release")
    state = torch.load(folder / "release/mp_rank_00/model_optim_rng.pt", weights_only=False)
    return {name: tensor for name, tensor in state["model"].items() if isinstance(tensor, Tensor)}


@pytest.mark.parametrize(("name", "fields", "to", "options"), CASES)
def test_a_bias_lies_as_the_rows_of_its_matrix(
    name: str, fields: dict[str, Any], to: str, options: dict[str, object], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, name, replace(FAMILIES[name], config={**FAMILIES[name].config, **fields}))
        build(name, "float32", tmp_path / "hf")
    tensors, config = load_directory(tmp_path / "hf")
    save_directory(tmp_path / "hf", {**tensors, **first_columns(tensors)}, config)
    registry.convert(tmp_path / "hf", tmp_path / "out", to=to, options={**options})
    found = written(tmp_path / "out", to)
    columns = first_columns(found)
    assert columns
    for key, column in columns.items():
        assert torch.equal(found[key], column), key

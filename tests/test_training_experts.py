"""Mixtures of experts in a training run: expert-parallel ranks are data-parallel ranks of the dense weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.training import Job, results, run
from tests.training.jobs import Layout
from tests.training.model import CONFIGS, VOCAB, huggingface

#: A layout, the number of processes, and how the experts are named.
PLACES: list[tuple[Layout, int, str]] = [
    ({}, 1, "sequential"),
    ({"tp": 2}, 2, "grouped"),
    ({"ep": 2}, 2, "sequential"),
    ({"ep": 2}, 4, "grouped"),  # two processes hold each expert, four each dense weight
    ({"ep": 4}, 4, "sequential"),
    ({"tp": 2, "ep": 2}, 4, "sequential"),
    ({"pp": 2, "ep": 2}, 4, "grouped"),
    ({"tp": 2, "ep": 2, "etp": 1}, 2, "sequential"),
    ({"tp": 2, "ep": 4, "etp": 1}, 4, "grouped"),
    ({"pp": 2, "vpp": 2, "ep": 2}, 4, "sequential"),
]


def test_every_layout_to_others(whole_experts: Path, tmp_path: Path) -> None:
    given = {"whole": whole_experts}
    saves = [
        Job("save", world, {**given, "path": tmp_path / f"{i}", "layout": layout, "kind": kind})
        for i, (layout, world, kind) in enumerate(PLACES)
    ]
    loads = [
        Job("load", world, {**given, "path": job.given["path"], "layout": layout, "kind": kind})
        for n, job in enumerate(saves)
        for m, (layout, world, kind) in enumerate(PLACES)
        if (m - n) % len(PLACES) == 3  # another one; its own is what a resumed run loads
    ]
    found = run([*saves, *loads])
    for outcome in found[: len(saves)]:
        results(outcome)
    for job, outcome in zip(loads, found[len(saves) :], strict=True):
        for one in results(outcome):
            assert not one["differ"], (job, one)


def test_weights_of_mixtral_go_straight_into_the_ranks(whole_experts: Path, tmp_path: Path) -> None:
    tensors = huggingface(torch.load(whole_experts, weights_only=True)["weights"])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["sequential"]))
    given = {"path": tmp_path, "whole": whole_experts, "optimizer": False, "unpadded": VOCAB - 3}
    jobs = [Job("load", world, {**given, "layout": layout, "kind": kind}) for layout, world, kind in PLACES]
    for job, outcome in zip(jobs, run(jobs), strict=True):
        assert all(not one["differ"] for one in results(outcome)), (job, outcome)


@pytest.mark.parametrize("kind", ["sequential", "grouped"])
def test_per_rank_files(kind: str, whole_experts: Path, tmp_path: Path) -> None:
    given = {"path": tmp_path, "whole": whole_experts, "optimizer": False, "kind": kind}
    layout = {"tp": 2, "ep": 2}
    saved, same, *others = run(
        [
            Job("save", 4, {**given, "layout": layout, "format": "megatron-legacy"}),
            Job("load", 4, {**given, "layout": layout}),
            Job("load", 4, {**given, "layout": {"pp": 2, "ep": 2}}),
            Job("load", 1, {**given, "layout": {}}),
        ]
    )
    results(saved)
    assert all(one["random"] for one in results(same))
    for outcome in (same, *others):
        assert all(not one["differ"] for one in results(outcome))
    folders = sorted(path.parent.name for path in tmp_path.glob("iter_0000007/*/model_optim_rng.pt"))
    assert folders == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]

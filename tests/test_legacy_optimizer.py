"""Optimizer state in files of every rank. megatron-core's own optimizers are the judge: they save a training as
`distrib_optim.pt` (or, without data-parallel shards, inside `model_optim_rng.pt`) and as torch_dist at once, and they
load the files that we make of it at other layouts."""

from __future__ import annotations

import importlib.util
import json
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import registry
from registry import MappingError, Parallel
from tests.goldens import golden
from tests.megatron_cpu.optimizer import LEGACY, Run, training
from tests.test_golden_megatron import global_tensors
from tests.test_megatron_optimizer import GPT2, LATENT, MOE, QWEN_MOE, TINY, VOCAB, state_of
from tests.training import Job, results, run
from tests.training.jobs import Layout, adam
from tests.training.model import CONFIG, Model

megatron = [
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"),
    pytest.mark.timeout(600),
]
FULL = "fully_reshardable"
SIXTEEN = {"make_vocab_size_divisible_by": 16}
SHARDED = "megatron/llama/tp1pp1dp2_bf16_distfull_torch"
STATES = ("param", "exp_avg", "exp_avg_sq")


def rows(folder: Path) -> dict[tuple[Any, ...], Any]:
    """(directory, optimizer of the chain, buffer, types, state) -> the row, of every distrib_optim.pt."""
    found: dict[tuple[Any, ...], Any] = {}
    for file in sorted(folder.rglob("distrib_optim.pt")):
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
        state = torch.load(file)
        for chain, own in enumerate(state) if isinstance(state, list) else [(-1, state)]:
            found[file.parent.name, chain] = own is None
            assert own is None or own.pop("buckets_coalesced") is True
            for buffer, by_types in (own or {}).items():
                for types, tensors in by_types.items():
                    assert sorted(tensors) == sorted([*STATES, "numel_unpadded"])
                    found |= {(file.parent.name, chain, buffer, types, name): t for name, t in tensors.items()}
    return found


def same_rows(found: Path, expected: Path) -> None:
    a, b = rows(found), rows(expected)
    assert a.keys() == b.keys() and len(b) > 4
    for key, row in b.items():
        assert torch.equal(a[key], row) if isinstance(row, torch.Tensor) else a[key] == row, key


def same_but_for_padding(found: dict[tuple[Any, ...], Any], expected: dict[tuple[Any, ...], Any], most: int) -> None:
    """Rows of the vocabulary that are padding, `most` elements in a row, are zeros in what was found."""
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        if not isinstance(row, torch.Tensor):
            assert found[key] == row, key
            continue
        differ = found[key] != row
        assert not found[key][differ].any() and differ.sum() <= most, key


def test_what_megatron_wrote_is_written_again_bit_for_bit(tmp_path: Path) -> None:
    source = sharded = golden(SHARDED)
    steps: list[tuple[str, Parallel]] = [
        ("megatron", Parallel(tp=2)), ("megatron-legacy", Parallel(tp=2, pp=2)),
        ("megatron-legacy", Parallel(pp=2, vpp=2)), ("megatron-legacy", Parallel()),
    ]  # fmt: skip
    for i, (to, parallel) in enumerate(steps):
        report = registry.convert(
            source, tmp_path / str(i), to=to, architecture="llama", parallel=parallel, options=SIXTEEN
        )
        assert not [name for name in report.left_out if "optimizer" in name]
        source = tmp_path / str(i)
    same_rows(source, sharded)
    pytest.importorskip("megatron.core")  # whose classes are in the golden's arguments
    states = [
        torch.load(next(path.rglob("model_optim_rng.pt")), weights_only=False) for path in (source, sharded)
    ]  # fmt: skip
    for key in ("optimizer", "opt_param_scheduler", "iteration"):
        assert states[0][key] == states[1][key]


def test_an_optimizer_that_lists_its_state(tmp_path: Path) -> None:
    """Megatron's Float16OptimizerWithFloat16Params at TP2: what it lists is cut here by hand."""
    source = golden("megatron/llama/tp2pp1_bf16_optim_torch")
    registry.convert(source, tmp_path / "out", to="megatron", architecture="llama", options=SIXTEEN)
    found = global_tensors(tmp_path / "out/iter_0000010")
    pytest.importorskip("megatron.core")
    ranks = [torch.load(path, weights_only=False) for path in sorted(source.rglob("model_optim_rng.pt"))]
    assert len(ranks) == 2
    within = ["self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"]
    big = ["embedding.word_embeddings", *(f"decoder.layers.{i}.{name}" for i in range(4) for name in within)]
    small = [f"{i}.{norm}" for i in range(4) for norm in ("self_attention.linear_qkv", "mlp.linear_fc1")]
    for state, kind in (("param", None), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
        lists = []
        for rank in ranks:
            own = rank["optimizer"]
            groups = [group["params"] for group in own["optimizer"]["param_groups"]]
            taken = [[own["optimizer"]["state"][i][kind] for i in group] for group in groups] if kind else None
            lists.append(taken or own["fp32_from_fp16_params"])
        assert [len(group) for group in lists[0]] == [18, 9]
        for i, name in enumerate([*big, "output_layer"]):
            parts = [rank[0][i] for rank in lists]
            if name.endswith("fc1"):
                whole = torch.cat([part.chunk(2)[half] for half in (0, 1) for part in parts])
            else:
                whole = torch.cat(parts, 1 if name.endswith(("linear_proj", "linear_fc2")) else 0)
            layer, _, tail = name.removeprefix("decoder.layers.").partition(".")
            stored = found[f"optimizer.state.{state}.{f'decoder.layers.{tail}' if layer.isdigit() else name}.weight"]
            assert torch.equal((stored[int(layer)] if layer.isdigit() else stored), whole), name
        for i, name in enumerate(small):
            layer, _, tail = name.partition(".")
            stored = found[f"optimizer.state.{state}.decoder.layers.{tail}.layer_norm_weight"][int(layer)]
            assert torch.equal(stored, lists[0][1][i]) and torch.equal(stored, lists[1][1][i])
    common = torch.load(tmp_path / "out/iter_0000010/common.pt", weights_only=False)["optimizer"]
    own = ranks[0]["optimizer"]["optimizer"]
    assert common["param_state_sharding_type"] == FULL
    assert {group["step"] for group in common["optimizer"]["param_groups"]} == {int(own["state"][0]["step"])}
    for group, kept in zip(own["param_groups"], common["optimizer"]["param_groups"], strict=True):
        assert {**kept, "params": group["params"]} == {**group, "step": kept["step"]}


# Megatron trains, we convert, Megatron loads.


@dataclass(frozen=True)
class Case:
    """A model and the layout of its training; what ours is converted to, and what more Megatron loads that with."""

    config: dict[str, Any]
    run: dict[str, Any]
    to: Parallel
    load: dict[str, Any] = field(default_factory=dict)
    judge: bool = True  # Megatron's reshardable form of it is right (see tests/test_megatron_optimizer.py)


CASES = {
    "dense tp2 dp2": Case({"model_type": "llama", **TINY}, {"tp": 2, "dp": 2}, Parallel(pp=2, vpp=2), {"dp": 2}),
    "dense pp2 vpp2": Case({"model_type": "llama", **TINY}, {"pp": 2, "vpp": 2, "dp": 2}, Parallel(tp=2)),
    "dense float32": Case({"model_type": "qwen3", **TINY}, {"dp": 2, "bf16": False}, Parallel(tp=2, pp=2)),
    "biases tied pp2": Case(
        {"model_type": "gpt2", **GPT2}, {"pp": 2, "dp": 2, "tied": True}, Parallel(pp=4), {"dp": 1}, judge=False
    ),
    "experts ep2": Case({"model_type": "mixtral", **TINY, **MOE}, {"ep": 2, "dp": 2}, Parallel(ep=4), {"dp": 4}),
    "experts to dense": Case({"model_type": "mixtral", **TINY, **MOE}, {"ep": 2, "dp": 2}, Parallel(tp=2)),
    "experts from dense": Case({"model_type": "mixtral", **TINY, **MOE}, {"dp": 2}, Parallel(ep=2, pp=2), {"dp": 4}),
    "shared experts tp2 ep2": Case(
        {"model_type": "qwen2_moe", **TINY, **QWEN_MOE}, {"tp": 2, "ep": 2, "dp": 2}, Parallel(ep=4), {"dp": 4}
    ),
    "latent engine ep2": Case(
        {"model_type": "deepseek_v3", **TINY, **LATENT},
        {"ep": 2, "pp": 2, "dp": 2, "engine": True, "grouped": True}, Parallel(tp=2, ep=2, pp=4), {"dp": 2},
    ),
    "listed half tp2": Case(
        {"model_type": "llama", **TINY}, {"tp": 2, "distributed": False}, Parallel(pp=2, vpp=2), {"dp": 2}
    ),
    "listed half biases": Case(
        {"model_type": "gpt2", **GPT2}, {"pp": 2, "tied": True, "distributed": False}, Parallel(tp=2), {"dp": 2}
    ),
    "listed float32": Case(
        {"model_type": "qwen3", **TINY}, {"tp": 2, "distributed": False, "bf16": False}, Parallel(pp=2)
    ),
    "listed experts ep2": Case(
        {"model_type": "mixtral", **TINY, **MOE},
        {"ep": 2, "dp": 2, "distributed": False}, Parallel(tp=2, ep=2), {"dp": 2},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """What became of one case."""

    folder: Path
    error: str | None = None
    reload: str | None = None


def convert(folder: Path, source: Path, target: Path, case: Case, to: str, parallel: Parallel) -> registry.Report:
    engine = "transformer_engine" if case.run.get("engine") else "local"
    options = {**SIXTEEN, "transformer_impl": engine}
    return registry.convert(source, target, to=to, config=folder / "hf", parallel=parallel, options=options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Every case trained and saved by Megatron, converted by us, and loaded and saved again by Megatron."""
    root = tmp_path_factory.mktemp("optimizer")
    result: dict[str, Made] = {}
    for engine in (False, True):
        chosen = {name: case for name, case in CASES.items() if case.run.get("engine", False) == engine}
        folders = {name: root / f"{int(engine)}{i}" for i, name in enumerate(chosen)}
        for name, case in chosen.items():
            (folders[name] / "hf").mkdir(parents=True)
            (folders[name] / "hf/config.json").write_text(json.dumps(case.config))
        first = [
            Run(folders[name] / "hf", {form: folders[name] / form for form in (LEGACY, FULL)}, **case.run)
            for name, case in chosen.items()
        ]
        errors = dict(zip(chosen, training(first), strict=True))
        again = {name: case for name, case in chosen.items() if errors[name] is None}
        second = []
        for name, case in again.items():
            folder, to = folders[name], case.to
            convert(folder, folder / LEGACY, folder / "ours", case, "megatron", case.to)
            convert(folder, folder / "ours", folder / "ranks", case, "megatron-legacy", case.to)
            own = {key: case.run[key] for key in ("engine", "grouped", "tied", "bf16") if key in case.run}
            own |= {"tp": to.tp, "pp": to.pp, "vpp": to.vpp, "ep": to.ep, **case.load}
            saved = {form: folder / f"again {form}" for form in (LEGACY, FULL)}
            second.append(Run(folder / "hf", saved, load=next((folder / "ranks").glob("iter_*")), **own))
        reloads = dict(zip(again, training(second), strict=True))
        result |= {name: Made(folders[name], errors[name], reloads.get(name)) for name in chosen}
    return result


def reshardable(folder: Path) -> dict[str, torch.Tensor]:
    """As `state_of`, in the names that the distributed optimizer has; float32 weights are their own copies."""
    found = {name.replace(".fp32_param.", ".param."): tensor for name, tensor in state_of(folder).items()}
    own = {f"optimizer.state.param.{name}": t for name, t in found.items() if t.dtype == torch.float32}
    return {**{name: t for name, t in own.items() if "optimizer.state" not in name[22:]}, **found}


class TestMegatron:
    """Needs megatron-core."""

    pytestmark = megatron

    @pytest.mark.parametrize("name", CASES)
    def test_it_becomes_the_reshardable_form(self, name: str, made: dict[str, Made]) -> None:
        assert made[name].error is None, made[name].error
        found = reshardable(next((made[name].folder / "ours").glob("iter_*")))
        expected = reshardable(made[name].folder / FULL)
        assert found.keys() == expected.keys()
        assert len([key for key in found if key.startswith("optimizer.state.")]) >= 3 * 9
        for key, tensor in expected.items() if CASES[name].judge else ():
            assert torch.equal(found[key], tensor), key

    @pytest.mark.parametrize("name", CASES)
    def test_megatron_loads_it_at_another_layout_and_writes_the_same_rows(
        self, name: str, made: dict[str, Made]
    ) -> None:
        assert made[name].reload is None, made[name].reload
        folder = made[name].folder
        same_rows(folder / f"again {LEGACY}", folder / "ranks")
        if CASES[name].judge:
            found, expected = reshardable(folder / f"again {FULL}"), reshardable(folder / FULL)
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                assert torch.equal(found[key], tensor), key
        for part in sorted((folder / f"again {LEGACY}").glob("mp_rank_*/model_optim_rng.pt")):
            groups = torch.load(part, weights_only=False)["optimizer"]
            steps = [g["step"] for one in (groups if isinstance(groups, list) else [groups])
                     for g in one["optimizer"]["param_groups"]]  # fmt: skip
            assert set(steps) == {3}

    @pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.run.get("distributed", True)])
    def test_ours_at_the_layout_of_the_training_is_what_megatron_wrote(
        self, name: str, made: dict[str, Made], tmp_path: Path
    ) -> None:
        folder, run = made[name].folder, CASES[name].run
        parallel = Parallel(**{key: run[key] for key in ("tp", "pp", "vpp", "ep") if key in run})
        convert(folder, folder / "ours", tmp_path / "out", CASES[name], "megatron-legacy", parallel)
        for path in (tmp_path / "out", folder / LEGACY):
            assert len(list(path.rglob("distrib_optim.pt"))) == parallel.tp * parallel.pp * parallel.ep
        padded = -(-VOCAB // (16 * parallel.tp)) * 16 * parallel.tp
        same_but_for_padding(rows(tmp_path / "out"), rows(folder / LEGACY), 2 * (padded - VOCAB) * 32)


# Training runs.


def test_a_run_is_saved_in_files_of_ranks_and_loaded_at_other_layouts(whole: Path, tmp_path: Path) -> None:
    layouts: list[Layout] = [{}, {"tp": 2}, {"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}]
    worlds = [1, 4, 4, 2]
    saves = [
        Job("save", world, {"path": tmp_path / f"{i}", "whole": whole, "layout": layout, "format": "megatron-legacy"})
        for i, (layout, world) in enumerate(zip(layouts, worlds, strict=True))
    ]
    loads = [
        Job("load", world, {"path": tmp_path / f"{i}", "whole": whole, "layout": layout})
        for i in range(len(saves))
        for layout, world in zip(layouts, worlds, strict=True)
    ]
    global_form = Job("save", 1, {"path": tmp_path / "global", "whole": whole, "layout": {}})
    found = run([*saves, global_form, *loads])
    for outcome in found[: len(saves) + 1]:
        results(outcome)
    for job, outcome in zip(loads, found[len(saves) + 1 :], strict=True):
        for one in results(outcome):
            assert not one["differ"] and one["iteration"] == 7, (job, one)
    for i, layout in enumerate(layouts):
        out, parallel = tmp_path / f"converted {i}", Parallel(**layout)
        options = {"make_vocab_size_divisible_by": 64 // parallel.tp}
        registry.convert(tmp_path / "global", out, to="megatron-legacy", parallel=parallel, options=options)
        same_but_for_padding(rows(out), rows(tmp_path / f"{i}"), 2 * 3 * 32)


def test_experts_of_a_run(whole_experts: Path, tmp_path: Path) -> None:
    places: list[tuple[Layout, int, str]] = [
        ({"ep": 2}, 4, "sequential"), ({"pp": 2, "ep": 2}, 4, "grouped"),
        ({"tp": 2, "ep": 4, "etp": 1}, 4, "grouped"), ({"tp": 2}, 2, "sequential"),
    ]  # fmt: skip
    given = {"whole": whole_experts}
    saves = [
        Job(
            "save", world,
            {**given, "path": tmp_path / f"{i}", "layout": layout, "kind": kind, "format": "megatron-legacy"},
        )
        for i, (layout, world, kind) in enumerate(places)
    ]  # fmt: skip
    loads = [
        Job("load", world, {**given, "path": tmp_path / f"{i}", "layout": layout, "kind": kind})
        for i in range(len(saves))
        for layout, world, kind in places
    ]
    found = run([*saves, *loads])
    for outcome in found[: len(saves)]:
        results(outcome)
    for job, outcome in zip(loads, found[len(saves) :], strict=True):
        for one in results(outcome):
            assert not one["differ"], (job, one)


def test_weights_of_two_types_are_in_two_rows(tmp_path: Path) -> None:
    """Megatron numbers them by the first weight of each type (distributed_data_parallel.py, _allocate_buffers)."""
    torch.manual_seed(0)
    models = [Model(), Model()]
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data if "norm" in name else parameter.data.bfloat16()
    optimizers = [adam([model]) for model in models]
    for parameter in models[0].parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers[0].step()
    registry.save(
        tmp_path, model=models[0], optimizer=optimizers[0], iteration=1, format="megatron-legacy", config=CONFIG
    )  # fmt: skip
    found = {key[2:]: row for key, row in rows(tmp_path).items() if len(key) > 2}
    half, single = (torch.bfloat16, torch.float32), (torch.float32, torch.float32)
    assert {key[:2] for key in found} == {(0, half), (1, single)}
    norms = [(n, p) for n, p in models[0].named_parameters() if "norm" in n]
    assert found[1, single, "numel_unpadded"] == 64 * len(norms) - 32  # each of 32 elements, from a multiple of 64 on
    for i, (_, parameter) in enumerate(reversed(norms)):
        place = slice(64 * i, 64 * i + 32)
        assert torch.equal(found[1, single, "param"][place], parameter)
        assert torch.equal(found[1, single, "exp_avg"][place], optimizers[0].state[parameter]["exp_avg"])
    registry.load(tmp_path, model=models[1], optimizer=optimizers[1], random_states=False)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
        for kind, tensor in optimizers[0].state[a].items():
            assert torch.equal(tensor, optimizers[1].state[b][kind])


# What is refused.


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    shutil.copytree(golden(SHARDED), tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept").write_text("kept")
    return tmp_path / "source/iter_0000010/mp_rank_00/distrib_optim.pt"


@pytest.mark.parametrize("cut", [1, 64, -64], ids=str)
def test_rows_of_another_length_are_refused(cut: int, damaged: Path) -> None:
    state = torch.load(damaged)
    (tensors,) = state[0].values()
    for name in STATES:
        tensors[name] = tensors[name][:-cut].clone() if cut > 0 else torch.cat([tensors[name], torch.zeros(-cut)])
    torch.save(state, damaged)
    out = damaged.parents[3] / "out"
    with pytest.raises(MappingError, match="flat buffers do not fit the weights"):
        registry.convert(
            damaged.parents[2], out, to="megatron-legacy", architecture="llama", options=SIXTEEN, overwrite=True
        )
    assert [path.name for path in out.iterdir()] == ["kept"]


def test_groups_that_do_not_fit_the_weights_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    shutil.copytree(golden("megatron/llama/tp2pp1_bf16_optim_torch"), tmp_path / "source")
    for path in (tmp_path / "source").rglob("model_optim_rng.pt"):
        state = torch.load(path, weights_only=False)
        state["optimizer"]["optimizer"]["param_groups"][0]["params"].pop(3)
        torch.save(state, path)
    with pytest.raises(MappingError, match="parameter groups do not fit the weights"):
        registry.convert(tmp_path / "source", tmp_path / "out", to="megatron", architecture="llama", options=SIXTEEN)
    assert not (tmp_path / "out").exists()

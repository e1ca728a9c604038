"""registry.save and registry.load on the ranks of a training run."""

from pathlib import Path

import pytest
import torch

import registry
from registry import Parallel
from registry.training.ranks import check_ranks
from tests.training import Job, results, run
from tests.training.jobs import Layout, adam
from tests.training.kill import outcomes
from tests.training.model import CONFIG, Model

LAYOUTS: list[Layout] = [{}, {"tp": 2}, {"tp": 4}, {"pp": 2}, {"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}]


def world(layout: Layout, dp: int = 1) -> int:
    return layout.get("tp", 1) * layout.get("pp", 1) * dp


def test_every_layout_to_others(whole: Path, tmp_path: Path) -> None:
    saves = [
        Job("save", world(layout, dp), {"path": tmp_path / f"{i}-{dp}", "whole": whole, "layout": layout})
        for i, layout in enumerate(LAYOUTS)
        for dp in ((1, 2) if layout in ({}, {"tp": 2}) else (1,))
    ]
    loads = [
        Job("load", world(layout), {"path": job.given["path"], "whole": whole, "layout": layout})
        for n, job in enumerate(saves)
        for m, layout in enumerate(LAYOUTS)
        if (n + m) % 3 == 0  # a third of the pairs: two of each save, every layout with several
    ]
    found = run([*saves, *loads], timeout=60)
    for job, outcome in zip(saves, found, strict=False):
        results(outcome)
        assert registry.verify(job.given["path"])
    for job, outcome in zip(loads, found[len(saves) :], strict=True):
        for one in results(outcome):
            assert not one["differ"], (job, one)
            assert one["iteration"] == 7


@pytest.mark.parametrize(
    ("layout", "ranks", "kind"),
    [({}, 1, "dense"), ({"tp": 2}, 4, "dense"), ({"ep": 2}, 2, "sequential"), ({"ep": 2}, 4, "grouped")],
)
def test_a_resumed_run_is_the_run_itself(layout: Layout, ranks: int, kind: str, tmp_path: Path) -> None:
    job = Job("resume", ranks, {"path": tmp_path, "layout": layout, "k": 3, "kind": kind})
    for one in results(run([job])[0]):
        assert not one["differ"]
        assert one["losses"][0] == one["losses"][1]


def test_a_failing_rank_fails_all_and_leaves_what_was_there(whole: Path, tmp_path: Path) -> None:
    layout = {"tp": 2}
    given = {"path": tmp_path, "whole": whole, "layout": layout}
    good, full, again = run(
        [
            Job("save", 4, {**given, "iteration": 6}),
            Job("fail_on_rank", 4, {**given, "iteration": 7, "rank": 1}),
            Job("load", 2, given),
        ]
    )
    results(good)
    assert [one["error"] for one in full] == ["TargetError"] * 4
    assert all("rank 1: the target cannot be written" in one["text"] for one in full)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000006", "latest_checkpointed_iteration.txt"]
    assert [one["iteration"] for one in results(again)] == [6, 6]


def test_what_ranks_disagree_on_is_said_on_all(whole: Path, tmp_path: Path) -> None:
    given = {"path": tmp_path / "none", "whole": whole}
    outcomes = run(
        [
            Job("disagree", 4, {**given, "layout": {"tp": 2}}),
            Job("save", 3, {**given, "layout": {"tp": 2}}),
            Job("save", 4, {**given, "layout": {"tp": 2, "dp": 3}}),
            Job("save", 2, {**given, "layout": {"tp": 2}, "config": {**CONFIG, "num_hidden_layers": 5}}),
            Job("save", 2, {**given, "layout": {"tp": 2}, "extra": {"a": "b"}, "scheduler": 3, "args": {"a": 1}}),
        ]
    )
    assert all("the ranks disagree on the iteration" in one["text"] for one in outcomes[0])
    assert all("7 on rank 0, 1; 8 on rank 2, 3" in one["text"] for one in outcomes[0])
    for outcome in outcomes[1:3]:
        assert all("the number of processes does not match the layout" in one["text"] for one in outcome)
    assert all(one["error"] == "MappingError" for one in outcomes[3])
    results(outcomes[4])


def test_replicas_are_as_many_for_all() -> None:
    held = [registry.Rank(tp=0), registry.Rank(tp=1)]
    check_ranks(Parallel(tp=2), held * 2)
    with pytest.raises(registry.ArgumentError, match="more replicas than others"):
        check_ranks(Parallel(tp=2), [*held, held[0]])
    with pytest.raises(registry.ArgumentError, match="nobody holds tp 1"):
        check_ranks(Parallel(tp=2), held[:1])


def test_unknown_keys_and_strange_parameters_are_refused(tmp_path: Path) -> None:
    model = Model()
    state = dict(model.state_dict(keep_vars=True))
    with pytest.raises(registry.MappingError, match=r"no rule claims decoder\.layers\.\{0\.\.1\}\.odd"):
        odd = {f"decoder.layers.{i}.odd": torch.zeros(3) for i in (0, 1)}
        registry.save(tmp_path / "a", model={**state, **odd}, iteration=1, config=CONFIG)
    with pytest.raises(registry.MappingError, match="linear_fc2"):
        less = {k: v for k, v in state.items() if "linear_fc2" not in k}
        registry.save(tmp_path / "a", model=less, iteration=1, config=CONFIG)
    with pytest.raises(registry.ArgumentError, match="parameters that the model does not have"):
        registry.save(tmp_path / "a", model=model, optimizer=adam([Model()]), iteration=1, config=CONFIG)
    with pytest.raises(registry.ArgumentError, match="no optimizer"):
        registry.save(tmp_path / "a", model=model, optimizer=model, iteration=1, config=CONFIG)
    with pytest.raises(registry.ArgumentError, match="not plain data"):
        registry.save(tmp_path / "a", model=model, iteration=1, config=CONFIG, extra={"f": print})
    assert not (tmp_path / "a").exists()
    registry.save(tmp_path / "a", model=model, iteration=1, config=CONFIG)
    with pytest.raises(registry.TargetError, match="saved already"):
        registry.save(tmp_path / "a", model=model, iteration=1, config=CONFIG)
    with pytest.raises(registry.CheckpointError, match="no optimizer state"):
        registry.load(tmp_path / "a", model=model, optimizer=adam([model]))
    with pytest.raises(registry.MappingError, match=r"no tensor of this model: odd"):
        registry.load(tmp_path / "a", model={**state, "odd": torch.zeros(2)})
    with pytest.raises(registry.MappingError, match=r"not in the model here: output_layer\.weight"):
        registry.load(tmp_path / "a", model={k: v for k, v in state.items() if k != "output_layer.weight"})
    with pytest.raises(registry.ArgumentError, match=r"num_layers: 7 here, 4 in the checkpoint"):
        registry.load(tmp_path / "a", model=model, args={"num_layers": 7, "hidden_size": 32})


def test_random_states_stay_where_the_layout_differs_and_it_is_said(whole: Path, tmp_path: Path) -> None:
    given = {"path": tmp_path, "whole": whole}
    _, same, other = run(
        [
            Job("save", 2, {**given, "layout": {"tp": 2}}),
            Job("load", 2, {**given, "layout": {"tp": 2}}),
            Job("load", 1, {**given, "layout": {}}),
        ]
    )
    assert all(one["random"] and not one["notes"] for one in results(same))
    assert [(one["random"], len(one["notes"])) for one in results(other)] == [(False, 1)]
    assert "saved at tp2, and this run is at one rank" in results(other)[0]["notes"][0]


def test_per_rank_files(whole: Path, tmp_path: Path) -> None:
    given = {"path": tmp_path, "whole": whole, "optimizer": False}
    saved, *loaded = run(
        [
            Job("save", 4, {**given, "layout": {"tp": 2, "pp": 2}, "format": "megatron-legacy"}),
            Job("load", 4, {**given, "layout": {"tp": 2, "pp": 2}}),
            Job("load", 2, {**given, "layout": {"tp": 2}}),
        ]
    )
    results(saved)
    for outcome in loaded:
        assert all(not one["differ"] and one["iteration"] == 7 for one in results(outcome))
    assert registry.verify(tmp_path)
    state = torch.load(tmp_path / "iter_0000007/mp_rank_01_001/model_optim_rng.pt", weights_only=False)
    assert state["iteration"] == 7 and len(state["rng_state"]) == 1
    assert state["model"]["decoder.layers.0.self_attention.linear_qkv.weight"].shape == (64, 32)


def test_weights_of_a_huggingface_model_go_straight_into_the_ranks(whole: Path, tmp_path: Path) -> None:
    run([Job("save", 1, {"path": tmp_path / "ours", "whole": whole, "layout": {}})])
    registry.convert(tmp_path / "ours", tmp_path / "hf", to="huggingface")
    model = Model()
    with pytest.warns(UserWarning, match="padding that the checkpoint does not have is zeros: embedding"):
        found = registry.load(tmp_path / "hf", model=model)
    expected = torch.load(whole, weights_only=True)["weights"]
    for name, parameter in model.named_parameters():
        rows = 61 if parameter.shape[0] == 64 and "layers" not in name else None  # HuggingFace has no padded rows
        assert torch.equal(parameter[:rows], expected[name][:rows]), name
        assert rows is None or not parameter[rows:].any()
    assert found.iteration == 0


def test_a_model_sharded_by_fsdp(whole: Path, tmp_path: Path) -> None:
    given = {"path": tmp_path / "a", "whole": whole}
    _, sharded, back, parts = run(
        [
            Job("save", 2, {**given, "layout": {"tp": 2}}),
            Job("fully_sharded", 2, {"path": tmp_path / "a", "to": tmp_path / "b"}),
            Job("load", 1, {**given, "path": tmp_path / "b", "layout": {}}),
            Job("load", 2, {**given, "path": tmp_path / "b", "layout": {"pp": 2}}),
        ]
    )
    assert results(sharded) == [["DTensor"]] * 2
    assert all(not one["differ"] for one in [*results(back), *results(parts)])


def test_a_killed_rank_leaves_a_checkpoint_that_loads(whole: Path, tmp_path: Path) -> None:
    found = list(outcomes(range(4), whole, tmp_path))  # `make kill` has 50 seeds
    assert not [one.problem for one in found if one.problem]
    assert {one.rank for one in found} > {0}

"""Parallel layouts: every problem at once, and the layers of each pipeline stage as Megatron counts them."""

import itertools
import math
import pickle
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.errors import ArgumentError, ParallelError
from registry.parallel import DIMENSIONS, Parallel, Stage


def test_sizes_and_defaults() -> None:
    assert Parallel().env() == dict.fromkeys(DIMENSIONS, 1)
    parallel = Parallel(tp=4, pp=2, vpp=3, ep=5, cp=6, dp=7)
    assert parallel.env() == {"tp": 4, "pp": 2, "vpp": 3, "ep": 5, "etp": 4, "cp": 6, "dp": 7}
    assert Parallel(tp=4, etp=1).size("etp") == 1
    assert Parallel(pp=[3, 1]).size("pp") == 2
    assert Parallel(pp=[1, 2, 2, 1], vpp=2).size("pp") == 2


def test_experts_within_the_ranks_of_tp() -> None:
    """As tensorrt_llm/mapping.py counts: moe_tp_rank = tp_rank // moe_ep_size, moe_ep_rank = tp_rank % moe_ep_size."""
    parallel = Parallel(tp=6, ep=2, nested=True)
    assert parallel.size("etp") == 3
    ranks = parallel.expert_ranks()
    assert [(at["tp"], at["etp"], at["ep"]) for at in ranks] == [
        (0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1), (4, 2, 0), (5, 2, 1)
    ]  # fmt: skip
    assert all(parallel.index(dim, at["tp"], 0) == at[dim] for at in ranks for dim in ("tp", "etp", "ep"))
    assert parallel.with_size("tp", 4) == Parallel(tp=4, ep=2, nested=True)
    for wrong in ({"ep": 4}, {"ep": 2, "etp": 6}, {"ep": 2, "cp": 2}):
        with pytest.raises(ParallelError):
            Parallel(tp=6, nested=True, **wrong)


def test_it_is_a_value() -> None:
    assert Parallel(tp=2, pp=[1, 2]) == Parallel(tp=2, pp=(1, 2)) != Parallel(tp=2, pp=2)
    assert len({Parallel(tp=2), Parallel(tp=2), Parallel(tp=3)}) == 2
    assert pickle.loads(pickle.dumps(Parallel(pp=[1, 2]))) == Parallel(pp=[1, 2])


@pytest.mark.parametrize("wrong", [0, -1, 1.0, 2.5, "2", True, None, [1], 1j])
@pytest.mark.parametrize("name", DIMENSIONS)
def test_a_size_that_is_no_positive_whole_number_is_refused(name: str, wrong: Any) -> None:
    if (name, wrong) in (("etp", None), ("pp", [1])):
        Parallel(**{name: wrong})
        return
    with pytest.raises(ArgumentError) as caught:
        Parallel(**{name: wrong})
    assert [detail.split()[0] for detail in caught.value.details] == [name]
    assert repr(wrong) in caught.value.details[0] or "list" in caught.value.details[0]


@pytest.mark.parametrize("wrong", [[], [2, -1], [2, "1"], [2, 1.0], [True, 1], "12", b"12", {1, 2}, object])
def test_a_list_of_stages_holds_layer_counts(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="pp"):
        Parallel(pp=wrong)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ArgumentError) as caught:
        Parallel(tp=0, pp=[-1], vpp=0, ep=True, etp=0, cp="1", dp=None)  # type: ignore[arg-type]
    assert {detail.split()[0] for detail in caught.value.details} == set(DIMENSIONS)


def test_a_list_has_one_count_for_each_model_chunk() -> None:
    with pytest.raises(ArgumentError, match="pp lists 3 model chunks, which vpp=2 does not divide"):
        Parallel(pp=[1, 2, 3], vpp=2)


def megatron_offset(pp_rank: int, vp_stage: int, layers: int, pp: int, vp: int) -> int:
    """get_transformer_layer_offset of megatron/core/transformer/transformer_layer.py, for even stages."""
    if vp > 1:
        layers_per_pipeline_rank = layers // pp
        layers_per_virtual_stage = layers_per_pipeline_rank // vp
        total_virtual_chunks = layers // vp
        return vp_stage * total_virtual_chunks + pp_rank * layers_per_virtual_stage
    return pp_rank * (layers // pp)


@given(pp=st.integers(1, 5), vpp=st.integers(1, 4), each=st.integers(0, 4))
@settings(max_examples=100)
def test_even_stages_start_where_megatron_starts_them(pp: int, vpp: int, each: int) -> None:
    layers = pp * vpp * each
    stages = Parallel(pp=pp, vpp=vpp).stages(layers)
    assert {(s.pp, s.vpp): (s.first, s.count) for s in stages} == {
        (p, v): (megatron_offset(p, v, layers, pp, vpp), each) for p in range(pp) for v in range(vpp)
    }


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=8), data=st.data())
@settings(max_examples=100)
def test_uneven_stages_hold_every_layer_once_in_order(counts: list[int], data: st.DataObject) -> None:
    vpp = data.draw(st.sampled_from([n for n in range(1, 5) if len(counts) % n == 0]))
    parallel = Parallel(pp=counts, vpp=vpp)
    stages = parallel.stages(sum(counts))
    assert [s.count for s in stages] == counts
    assert [layer for s in stages for layer in range(s.first, s.first + s.count)] == list(range(sum(counts)))
    assert [(s.vpp, s.pp) for s in stages] == [(v, p) for v in range(vpp) for p in range(parallel.pp)]


def test_chunks_of_a_rank_are_far_apart() -> None:
    """8 layers on 2 ranks with 2 chunks each: rank 0 holds layers 0, 1, 4, 5."""
    assert Parallel(pp=2, vpp=2).stages(8) == [
        Stage(0, 0, 0, 2),
        Stage(1, 0, 2, 2),
        Stage(0, 1, 4, 2),
        Stage(1, 1, 6, 2),
    ]


def test_layers_that_do_not_divide_come_with_a_list_that_does() -> None:
    with pytest.raises(ParallelError) as caught:
        Parallel(pp=2, vpp=2).stages(7)
    assert "7 layers" in str(caught.value) and "pp x vpp = 4" in str(caught.value)
    suggested = str(caught.value.hint).split("--pp ")[1]
    counts = [int(n) for n in suggested.split(",")]
    assert counts == [2, 2, 2, 1]
    assert sum(s.count for s in Parallel(pp=counts, vpp=2).stages(7)) == 7


def test_counts_that_do_not_add_up_are_an_error() -> None:
    with pytest.raises(ParallelError) as caught:
        Parallel(pp=[3, 2]).stages(6)
    assert "expected: 6 layers" in str(caught.value) and "[3, 2]" in str(caught.value)


@pytest.mark.parametrize(
    ("parallel", "text"),
    [
        (Parallel(), "one rank"),
        (Parallel(tp=2), "tp2"),
        (Parallel(tp=2, pp=4, vpp=2, ep=8, cp=2, dp=3), "tp2 pp4 vpp2 ep8 cp2 dp3"),
        (Parallel(tp=2, etp=2), "tp2"),
        (Parallel(tp=2, etp=1), "tp2 etp1"),
        (Parallel(pp=[3, 1]), "pp2 layers 3+1"),
        (Parallel(pp=[4]), "layers 4"),
        (Parallel(pp=[1, 2, 2, 1], vpp=2), "pp2 vpp2 layers 1+2+2+1"),
    ],
)
def test_as_text(parallel: Parallel, text: str) -> None:
    assert str(parallel) == text


# Experts: tp x dp for dense layers and etp x ep x dp for experts count the same ranks


def megatron_ranks(tp: int, ep: int, etp: int, dp: int) -> list[dict[str, int]]:
    """The index of every global rank along tp, ep and etp, by the groups that Megatron itself makes of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel_state = pytest.importorskip("megatron.core.parallel_state")
    world = tp * dp
    dense = parallel_state.RankGenerator(tp=tp, ep=1, dp=dp, pp=1, cp=1, order="tp-cp-ep-dp-pp")
    experts = parallel_state.RankGenerator(tp=etp, ep=ep, dp=world // (etp * ep), pp=1, cp=1, order="tp-cp-ep-dp-pp")
    at: list[dict[str, int]] = [{} for _ in range(world)]
    for name, generator, token in (("tp", dense, "tp"), ("ep", experts, "ep"), ("etp", experts, "tp")):
        for group in generator.get_ranks(token):
            for index, rank in enumerate(group):
                at[rank][name] = index
    return at


SIZES = list(itertools.product((1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 8), (1, 2, 3, 4, 8), (1, 2)))


@pytest.mark.parametrize("etp_divides_tp", [True, False])
def test_ranks_hold_the_experts_that_megatron_gives_them(etp_divides_tp: bool) -> None:
    """Where two ranks of one (tp, ep) hold different experts, Megatron's files would overwrite each other."""
    refused = 0
    for tp, ep, etp, further in SIZES:
        if (tp % etp == 0) != etp_divides_tp:
            continue
        dp = math.lcm(tp, etp * ep) // tp * further
        files: dict[tuple[int, int], set[int]] = {}
        for rank in megatron_ranks(tp, ep, etp, dp):
            files.setdefault((rank["tp"], rank["ep"]), set()).add(rank["etp"])
        parallel = Parallel(tp=tp, ep=ep, etp=etp, dp=dp)
        if any(len(held) > 1 for held in files.values()):
            refused += 1
            with pytest.raises(ParallelError) as caught:
                parallel.expert_ranks()
            assert f"tp {tp}, ep {ep}, etp {etp}" in str(caught.value)
            continue
        expected = [{"tp": t, "ep": e, "etp": held.copy().pop()} for (t, e), held in sorted(files.items())]
        assert parallel.expert_ranks() == expected
        for at in expected:
            assert {dim: parallel.index(dim, at["tp"], at["ep"]) for dim in at} == at
    assert bool(refused) != etp_divides_tp


@pytest.mark.parametrize(("tp", "ep", "etp"), [(2, 2, 1), (4, 4, 1), (4, 2, 2), (2, 2, 2), (1, 4, 1), (6, 2, 3)])
def test_every_shard_of_an_expert_is_in_some_file(tp: int, ep: int, etp: int) -> None:
    held = {(at["ep"], at["etp"]) for at in Parallel(tp=tp, ep=ep, etp=etp).expert_ranks()}
    assert held == set(itertools.product(range(ep), range(etp)))


def test_the_default_of_etp_is_tp() -> None:
    assert Parallel(tp=4, ep=2).expert_ranks() == Parallel(tp=4, ep=2, etp=4).expert_ranks()
    assert [at["etp"] for at in Parallel(tp=4, ep=2).expert_ranks()] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert Parallel(tp=3).tensor_ranks() == [{"tp": 0}, {"tp": 1}, {"tp": 2}]

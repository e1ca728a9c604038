"""Exports to TensorRT-LLM's format in every layout that its loader takes, and in parts: rank by rank, shard by shard.

What is expected is cut by hand, by the rules of the shared reference trtllm.md 1.2 to 1.6.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import registry
from registry import Parallel
from tests.goldens import golden
from tests.training import Job, results, run
from tests.training.model import CONFIG, DIM, FFN, GROUPS, HEADS, HIDDEN, LAYERS, VOCAB

Layout = dict[str, int]


def part(whole: Tensor, ranks: int, rank: int, dim: int = 0) -> Tensor:
    return whole.chunk(ranks, dim)[rank]


def rank_files(path: Path) -> list[dict[str, Tensor]]:
    return [load_file(path / f"rank{i}.safetensors") for i in range(len(list(path.glob("rank*.safetensors"))))]


def everything(path: Path) -> dict[str, bytes]:
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".registry-manifest")]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


@pytest.fixture
def llama() -> Path:
    return golden("trtllm/_inputs/llama_gqa")


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """A random Mixtral, as its class writes it: 4 experts, and so small that it has no golden of its own."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


@pytest.mark.parametrize(("tp", "ep"), [(2, 2), (4, 2), (4, 4), (2, 1)])
def test_experts_are_shared_out_within_the_ranks_of_tp(mixtral: Path, tmp_path: Path, tp: int, ep: int) -> None:
    registry.convert(mixtral, tmp_path / "out", to="trtllm", parallel=Parallel(tp=tp, ep=ep))
    mapping = json.loads((tmp_path / "out/config.json").read_text())["mapping"]
    sizes = {"world_size": tp, "tp_size": tp, "pp_size": 1, "cp_size": 1, "moe_tp_size": tp // ep, "moe_ep_size": ep}
    assert mapping == {**sizes, "gpus_per_node": 8}
    hub = registry.open(mixtral).view("huggingface")
    mlp = "model.layers.1.block_sparse_moe"
    for rank, tensors in enumerate(rank_files(tmp_path / "out")):
        moe_tp, moe_ep = rank // ep, rank % ep  # tensorrt_llm/mapping.py
        own = range(moe_ep * 4 // ep, (moe_ep + 1) * 4 // ep)
        halves = {e: [part(hub[f"{mlp}.experts.{e}.{w}.weight"], tp // ep, moe_tp) for w in ("w3", "w1")] for e in own}
        down = [part(hub[f"{mlp}.experts.{e}.w2.weight"], tp // ep, moe_tp, 1) for e in own]
        fused = torch.stack([torch.cat(halves[e]) for e in own])
        assert torch.equal(tensors["transformer.layers.1.mlp.fc.weight"], fused)
        assert torch.equal(tensors["transformer.layers.1.mlp.proj.weight"], torch.stack(down))
        assert torch.equal(tensors["transformer.layers.1.mlp.router.weight"], hub[f"{mlp}.gate.weight"])
        output = hub["model.layers.1.self_attn.o_proj.weight"]
        assert torch.equal(tensors["transformer.layers.1.attention.dense.weight"], part(output, tp, rank, 1))
    assert registry.verify(tmp_path / "out", mixtral)
    (tmp_path / "out/huggingface/config.json").unlink()
    (tmp_path / "out/registry.json").unlink()
    assert registry.open(tmp_path / "out").parallel == Parallel(tp=tp, ep=ep, nested=True)
    assert registry.verify(tmp_path / "out", mixtral, architecture="mixtral")


@pytest.mark.parametrize(
    ("field", "value", "message"), [("moe_ep_size", 3, "ep x etp = tp"), ("cp_size", 0, "cp_size as a positive number")]
)
def test_a_mapping_that_makes_no_sense(mixtral: Path, tmp_path: Path, field: str, value: int, message: str) -> None:
    registry.convert(mixtral, tmp_path / "out", to="trtllm", parallel=Parallel(tp=2))
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["mapping"][field] = value
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(registry.CheckpointError, match="bad mapping") as error:
        registry.open(tmp_path / "out")
    assert message in str(error.value)


def test_sizes_that_are_not_given(mixtral: Path, tmp_path: Path) -> None:
    """-1 is what TensorRT-LLM's Mapping takes for that, and other writers leave the fields out."""
    registry.convert(mixtral, tmp_path / "out", to="trtllm", parallel=Parallel(tp=2))
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["mapping"] = {"world_size": 2, "tp_size": 2, "moe_tp_size": -1, "moe_ep_size": -1}
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    (tmp_path / "out/.registry-manifest.json").unlink()  # which would call the config damaged
    assert registry.open(tmp_path / "out").parallel == Parallel(tp=2, nested=True)
    assert registry.verify(tmp_path / "out", mixtral)


def test_context_parallel_ranks_share_files(llama: Path, tmp_path: Path) -> None:
    """file = rank % tp + rank // (tp * cp) * tp: those of tp x pp."""
    registry.convert(llama, tmp_path / "cp", to="trtllm", parallel=Parallel(tp=2, pp=2, cp=2))
    registry.convert(llama, tmp_path / "plain", to="trtllm", parallel=Parallel(tp=2, pp=2))
    assert sorted(p.name for p in (tmp_path / "cp").glob("rank*")) == [f"rank{i}.safetensors" for i in range(4)]
    for i in range(4):
        assert (tmp_path / f"cp/rank{i}.safetensors").read_bytes() == (
            tmp_path / f"plain/rank{i}.safetensors"
        ).read_bytes()
    mapping = json.loads((tmp_path / "cp/config.json").read_text())["mapping"]
    assert (mapping["world_size"], mapping["cp_size"]) == (8, 2)
    assert registry.open(tmp_path / "cp").parallel.cp == 2
    assert registry.verify(tmp_path / "cp", llama)


@pytest.mark.parametrize(("stages", "said"), [([2, 1], None), ([1, 2], [1, 2]), ([3], None)])
def test_uneven_stages_are_a_choice(mixtral: Path, tmp_path: Path, stages: list[int], said: Any) -> None:
    """Later readers give the first stages a layer more where layers do not divide; other splits they must be told."""
    with pytest.raises(registry.ParallelError, match="--pp 2,1"):
        registry.convert(mixtral, tmp_path / "out", to="trtllm", parallel=Parallel(pp=2))
    registry.convert(mixtral, tmp_path / "out", to="trtllm", parallel=Parallel(pp=stages))
    mapping = json.loads((tmp_path / "out/config.json").read_text())["mapping"]
    assert mapping.get("pp_partition") == said
    counts = [len({n.split(".")[2] for n in t if n.startswith("transformer.layers.")}) for t in
              rank_files(tmp_path / "out")]  # fmt: skip
    assert counts == stages
    assert registry.verify(tmp_path / "out", mixtral)


@pytest.mark.parametrize(
    ("layout", "rule", "nearest"),
    [
        ({"tp": 3}, "(group rep)@tp does not divide: size 4 over 3 ranks", "choose tp 2 or tp 4"),
        ({"tp": 8}, "(group rep)@tp does not divide: size 4 over 8 ranks", "choose tp 4"),
        ({"tp": 8, "ep": 8}, "expert@ep does not divide: size 4 over 8 ranks", "choose tp 4 with ep 4"),
        ({"tp": 4, "ep": 3}, "experts are shared out within the ranks of tp", "choose ep 1 or 2 or 4"),
        ({"tp": 2, "ep": 2, "cp": 2}, "experts cannot be shared out together with contexts", "choose ep 1 or cp 1"),
        ({"tp": 4, "etp": 4, "ep": 2}, "ep 2 x etp 4 with tp 4", "leave etp out"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(
    mixtral: Path, tmp_path: Path, layout: Layout, rule: str, nearest: str
) -> None:
    with pytest.raises(registry.ParallelError) as error:
        registry.convert(mixtral, tmp_path / "out", to="trtllm", parallel=Parallel(**layout))
    assert rule in str(error.value)
    assert nearest in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_family_that_readers_do_not_shard(tmp_path: Path) -> None:
    source = golden("trtllm/_inputs/mamba")
    with pytest.raises(registry.ParallelError, match="mamba with tp of at most 1"):
        registry.convert(source, tmp_path / "out", to="trtllm", parallel=Parallel(tp=2))
    assert not (tmp_path / "out").exists()


def test_a_bert_by_itself_has_names_without_a_prefix(tmp_path: Path) -> None:
    """tensorrt_llm/models/bert/convert.py: trtllm_prefix is "" for a BertModel."""
    source = golden("trtllm/_inputs/bert")
    (tmp_path / "hf").mkdir()
    own = {n: t for n, t in load_file(source / "model.safetensors").items() if n.startswith("bert.e")}
    save_file(own, tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(registry.MappingError, match="no place"):
        registry.convert(tmp_path / "hf", tmp_path / "out", to="trtllm")
    registry.convert(tmp_path / "hf", tmp_path / "out", to="trtllm", options={"stem": "bare"})
    (tensors,) = rank_files(tmp_path / "out")
    assert {name.split(".")[0] for name in tensors} == {"embedding", "layers"}
    word = own["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(tensors["embedding.vocab_embedding.weight"], word)
    assert json.loads((tmp_path / "out/config.json").read_text())["architecture"] == "BertModel"
    (tmp_path / "out/huggingface/config.json").unlink()
    (tmp_path / "out/registry.json").unlink()
    assert registry.verify(tmp_path / "out", tmp_path / "hf")


# --- some ranks alone -------------------------------------------------------------------------------------------------


def test_ranks_are_written_by_themselves(llama: Path, tmp_path: Path) -> None:
    layout = Parallel(tp=2, pp=2)
    registry.convert(llama, tmp_path / "whole", to="trtllm", parallel=layout)
    for ranks in ([2], [0, 3]):
        report = registry.convert(llama, tmp_path / "parts", to="trtllm", parallel=layout, ranks=ranks)
        sizes = [(tmp_path / f"whole/rank{i}.safetensors").stat().st_size for i in ranks]
        assert report.nbytes == sum(sizes)
    with pytest.raises(registry.CheckpointError, match=r"missing rank1\.safetensors"):
        registry.open(tmp_path / "parts")
    registry.convert(llama, tmp_path / "parts", to="trtllm", parallel=layout, ranks=[1])
    assert everything(tmp_path / "parts") == everything(tmp_path / "whole")
    registry.convert(llama, tmp_path / "parts", to="trtllm", parallel=layout, ranks=[1], overwrite=True)
    assert everything(tmp_path / "parts") == everything(tmp_path / "whole")


def test_ranks_of_another_export_are_left_alone(llama: Path, tmp_path: Path) -> None:
    layout = Parallel(tp=2)
    registry.convert(llama, tmp_path / "out", to="trtllm", parallel=layout, ranks=[0])
    before = everything(tmp_path / "out")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"ranks": [0]}, "written already"),
        ({"ranks": [1], "dtype": "bfloat16"}, "other files than those of this export"),
        ({"ranks": [1], "parallel": Parallel(tp=4)}, "other files than those of this export"),
        ({"ranks": [1], "options": {"gpus_per_node": 4}, "overwrite": True}, "other files"),
        ({"ranks": [2]}, "no such rank"),
        ({"ranks": [1, 1]}, "different whole numbers"),
        ({"ranks": []}, "different whole numbers"),
        ({"ranks": [1], "to": "megatron"}, "no files of single ranks"),
    ]
    for given, message in refused:
        with pytest.raises(registry.RegistryError, match=message):
            registry.convert(llama, tmp_path / "out", **{"to": "trtllm", "parallel": layout, **given})
        assert everything(tmp_path / "out") == before


def test_a_failed_rank_leaves_the_others(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Parallel(tp=2)
    registry.convert(llama, tmp_path / "out", to="trtllm", parallel=layout, ranks=[0])
    before = everything(tmp_path / "out")

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.convert(llama, tmp_path / "out", to="trtllm", parallel=layout, ranks=[1], progress=interrupted)
    assert everything(tmp_path / "out") == before


# --- a running model --------------------------------------------------------------------------------------------------


def expected(weights: dict[str, Tensor], tp: int, pp: int) -> list[dict[str, Tensor]]:
    """Every rank's file, of a Llama in Megatron's names on one rank."""
    vocab = VOCAB - 3
    head = torch.zeros(-(-vocab // tp) * tp, HIDDEN)
    head[:vocab] = weights["output_layer.weight"][:vocab]
    ranks: list[dict[str, Tensor]] = []
    for stage in range(pp):
        for rank in range(tp):

            def own(whole: Tensor, dim: int = 0, rank: int = rank) -> Tensor:
                return part(whole, tp, rank, dim)

            found: dict[str, Tensor] = {}
            if stage == 0:
                found["transformer.vocab_embedding.weight"] = weights["embedding.word_embeddings.weight"][:vocab]
            if stage == pp - 1:
                found["transformer.ln_f.weight"] = weights["decoder.final_layernorm.weight"]
                found["lm_head.weight"] = own(head)
            for i in range(LAYERS // pp):
                found |= layer(weights, f"decoder.layers.{i + stage * LAYERS // pp}", f"transformer.layers.{i}", own)
            ranks.append(found)
    return ranks


def layer(weights: dict[str, Tensor], old: str, new: str, own: Callable[..., Tensor]) -> dict[str, Tensor]:
    qkv = weights[f"{old}.self_attention.linear_qkv.weight"].view(GROUPS, HEADS // GROUPS + 2, DIM, HIDDEN)
    q, k, v = (x.reshape(-1, HIDDEN) for x in (qkv[:, :-2], qkv[:, -2], qkv[:, -1]))
    fc1 = weights[f"{old}.mlp.linear_fc1.weight"]
    return {
        f"{new}.input_layernorm.weight": weights[f"{old}.input_layernorm.weight"],
        f"{new}.post_layernorm.weight": weights[f"{old}.pre_mlp_layernorm.weight"],
        f"{new}.attention.qkv.weight": torch.cat([own(q), own(k), own(v)]),
        f"{new}.attention.dense.weight": own(weights[f"{old}.self_attention.linear_proj.weight"], 1),
        f"{new}.mlp.fc.weight": own(fc1[:FFN]),
        f"{new}.mlp.gate.weight": own(fc1[FFN:]),
        f"{new}.mlp.proj.weight": own(weights[f"{old}.mlp.linear_fc2.weight"], 1),
    }


def test_a_running_model_is_exported_from_its_shards(whole: Path, tmp_path: Path) -> None:
    cases: list[tuple[int, Layout, Layout]] = [
        (1, {}, {"tp": 2}), (2, {"tp": 2}, {"tp": 2}), (2, {"tp": 2}, {"tp": 4}), (4, {"tp": 4}, {"tp": 2, "pp": 2}),
        (2, {"pp": 2}, {"tp": 4}), (2, {"pp": 2, "vpp": 2}, {"pp": 2}), (4, {"tp": 2, "pp": 2}, {}),
        (4, {"tp": 2}, {"tp": 2}),
    ]  # fmt: skip
    given = [{"path": tmp_path / str(n), "whole": whole, "layout": layout, "target": target, "format": "trtllm",
              "dtype": "bfloat16"} for n, (_, layout, target) in enumerate(cases)]  # fmt: skip
    outcomes = run([Job("export", ranks, more) for (ranks, _, _), more in zip(cases, given, strict=True)])
    weights = {k: v.bfloat16() for k, v in torch.load(whole, weights_only=True)["weights"].items()}
    for n, (_, _, target) in enumerate(cases):
        written = sum(nbytes for _, nbytes in results(outcomes[n]))
        theirs = expected(weights, target.get("tp", 1), target.get("pp", 1))
        ours = rank_files(tmp_path / str(n))
        assert written == sum(p.stat().st_size for p in (tmp_path / str(n)).glob("rank*"))
        assert [file.keys() for file in ours] == [file.keys() for file in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(mine[name], other[name].bfloat16()) for name in other), (n, target)
        config = json.loads((tmp_path / str(n) / "config.json").read_text())
        assert (config["architecture"], config["vocab_size"]) == ("LlamaForCausalLM", VOCAB - 3)


def test_what_a_running_model_cannot_be_exported_as(whole: Path, tmp_path: Path) -> None:
    given = {"path": tmp_path / "out", "whole": whole, "layout": {"tp": 2}, "format": "trtllm"}
    outcomes = run(
        [
            Job("export", 2, {**given, "target": {"tp": 3}}),
            Job("export", 2, {**given, "target": {"tp": 2}, "format": "megatron"}),
            Job("export", 2, {**given, "target": {}, "config": {**CONFIG, "model_type": "granite"}}),
        ]
    )
    for outcome, (kind, text) in zip(
        outcomes,
        [
            ("ParallelError", "choose tp 2 or tp 4"),
            ("ArgumentError", "in the layout and type of the run"),
            ("MappingError", "trtllm does not know the architecture granite"),
        ],
        strict=True,
    ):
        assert [one["error"] for one in outcome] == [kind] * 2
        assert all(text in one["text"] for one in outcome)
    assert not (tmp_path / "out").exists()

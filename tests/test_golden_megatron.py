"""Checkpoints that Megatron's own code wrote, in both directions."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import registry
from registry.source import load as open_source
from tests.goldens import MegatronCase, golden, megatron_cases
from tests.test_golden_trtllm import IMPLIED, said

CASES = megatron_cases()
#: Where a part of a tensor begins in each dimension, and its sizes.
Part = tuple[tuple[int, ...], tuple[int, ...]]
#: Fields of HuggingFace's configs that Megatron's arguments lack; DeepSeek's further layers are not in the goldens.
UNRECORDED = {
    "gpt2": {"attn_pdrop", "embd_pdrop", "resid_pdrop"},
    "deepseek_v3": {"moe_layer_freq", "num_nextn_predict_layers"},
}
FORMATS = {"torch_dist": "megatron", "torch": "megatron-legacy"}


def test_no_family_is_missing() -> None:
    assert {case.family for case in CASES} <= set(registry.architectures())
    assert len(CASES) >= 19


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("how", ["config", "architecture"])
def test_golden_becomes_its_huggingface_model(case: MegatronCase, how: str, tmp_path: Path) -> None:
    hf = golden(case.hf)
    if how == "config":
        report = registry.convert(case.path, tmp_path / "out", to="huggingface", config=hf)
    else:
        report = registry.convert(case.path, tmp_path / "out", to="huggingface", architecture=case.family)
    assert report.source_format == FORMATS[case.format]
    found = load_file(tmp_path / "out/model.safetensors")
    if how == "architecture":  # Megatron records only the padded vocabulary; the rest is padding
        found = {n: t[: case.true_vocab] if re.search("embed_tokens|lm_head|wte", n) else t for n, t in found.items()}
        ours, theirs = said(tmp_path / "out"), said(hf)
        differ = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
        assert differ <= IMPLIED | {"vocab_size"} | UNRECORDED.get(case.family, set())
    if case.trained and case.hf_expected is None:
        weights = {name: t.dtype for name, t in load_file(hf / "model.safetensors").items()}
        assert found.keys() == weights.keys()
        assert {str(t.dtype) for t in found.values()} == {f"torch.{case.dtype}"}
        return
    expected = load_file(golden(case.hf_expected or case.hf) / "model.safetensors")
    equal(found, {name: t.to(getattr(torch, case.dtype)) for name, t in expected.items()})


def global_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """What megatron-core itself reads of a torch_dist directory, every tensor whole."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(directory)
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(wanted, storage_reader=reader, no_dist=True)
    return wanted


def parts(directory: Path) -> dict[str, list[Part]]:
    """The parts that every tensor of a torch_dist directory is stored in.

    One part of several experts counts as one part an expert: Megatron stores them so, and reads either.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = FileSystemReader(directory).read_metadata().state_dict_metadata
    tensors = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    return {
        name: sorted(p for c in entry.chunks for p in by_expert(name, tuple(c.offsets), tuple(c.sizes)))
        for name, entry in tensors.items()
    }


def by_expert(name: str, first: tuple[int, ...], sizes: tuple[int, ...]) -> list[Part]:
    """A part of a tensor of experts as one for each of them; any other as it is."""
    if ".experts.experts.linear_" not in name:
        return [(first, sizes)]
    axis = len(sizes) - (3 if name.endswith(".weight") else 2)
    one = (*sizes[:axis], 1, *sizes[axis + 1 :])
    return [((*first[:axis], first[axis] + i, *first[axis + 1 :]), one) for i in range(sizes[axis])]


def without_padding(tensors: dict[str, torch.Tensor], vocab: int) -> dict[str, torch.Tensor]:
    return {
        name: t[:vocab] if re.search(r"word_embeddings|output_layer", name) and t.ndim == 2 else t
        for name, t in tensors.items()
    }


def layout(case: MegatronCase) -> registry.Parallel:
    return registry.Parallel(**{k: v for k, v in case.layout.items() if k in ("tp", "pp", "vpp", "ep")})


def options(case: MegatronCase) -> dict[str, object]:
    implementation = "transformer_engine" if case.spec == "te" else "local"
    return {"make_vocab_size_divisible_by": 16, "transformer_impl": implementation}


WRITTEN = [case for case in CASES if not case.trained]


@pytest.mark.parametrize("case", [c for c in WRITTEN if c.format == "torch_dist"], ids=str)
def test_we_write_the_torch_dist_golden(case: MegatronCase, tmp_path: Path) -> None:
    registry.convert(
        golden(case.hf), tmp_path / "out", to="megatron", parallel=layout(case), dtype=case.dtype,
        options=options(case),
    )  # fmt: skip
    ours, theirs = global_tensors(tmp_path / "out/release"), global_tensors(golden(case.iter_dir))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert parts(tmp_path / "out/release") == parts(golden(case.iter_dir))
    equal(without_padding(ours, case.true_vocab), without_padding(theirs, case.true_vocab))
    same_arguments(tmp_path / "out", case)


#: Arguments that the goldens' harness gave for itself, or that say nothing there (groups of as many as heads).
OF_THE_HARNESS = {
    "add_position_embedding", "moe_grouped_gemm", "num_query_groups", "seq_length", "use_rotary_position_embeddings",
    "vocab_size", "world_size",
}  # fmt: skip
#: Arguments of Megatron's that make its model and its layout, which are said of every model: those that it takes over
#: from a checkpoint (shared reference megatron.md, A3), and those that its config has.
TAKEN_OVER = {
    "add_bias_linear", "add_position_embedding", "add_qkv_bias", "apply_layernorm_1p", "attention_output_gate",
    "bf16", "context_parallel_size", "experimental_attention_variant", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "ffn_hidden_size", "fp16", "group_query_attention", "hidden_size",
    "is_hybrid_model", "layernorm_zero_centered_gamma", "linear_attention_freq", "make_vocab_size_divisible_by",
    "max_position_embeddings", "moe_ffn_hidden_size", "moe_grouped_gemm", "moe_layer_freq",
    "moe_router_enable_expert_bias", "moe_router_group_topk", "moe_router_num_groups", "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor", "moe_shared_expert_gate", "moe_shared_expert_intermediate_size", "mscale",
    "mscale_all_dim", "mtp_num_layers", "multi_latent_attention", "no_rope_freq", "normalization",
    "num_attention_heads", "num_layers", "num_query_groups", "padded_vocab_size", "params_dtype",
    "pipeline_model_parallel_size", "position_embedding_type", "quick_geglu", "rope_scaling_factor", "rope_type",
    "rotary_interleaved", "rotary_percent", "rotary_scaling_factor", "seq_length", "softmax_type", "squared_relu",
    "swiglu", "tensor_model_parallel_size", "transformer_impl", "untie_embeddings_and_output_weights",
    "use_rope_scaling", "use_rotary_position_embeddings", "virtual_pipeline_model_parallel_size", "vocab_size",
    "window_attn_skip_freq", "window_size", "world_size",
}  # fmt: skip


def same_arguments(there: Path, case: MegatronCase) -> None:
    """The arguments beside the weights are those of the golden, of which ours are the ones that make the model."""
    ours = open_source(there).opened.document
    theirs = open_source(golden(case.dir), config=golden(case.hf)).opened.document
    assert ours.keys() >= TAKEN_OVER and ours.keys() - theirs.keys() == {"apply_layernorm_1p"}
    assert {name for name in ours if name in theirs and ours[name] != theirs[name]} <= OF_THE_HARNESS
    assert ours["apply_layernorm_1p"] == theirs["layernorm_zero_centered_gamma"]


#: Norms that Megatron's other layers have in the projection that they feed.
OF_THEIR_OWN = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@pytest.mark.parametrize("name", ["gpt2/tp1pp1", "llama/tp1pp1", "mixtral/tp1pp1"])
def test_norms_may_have_names_of_their_own(name: str, tmp_path: Path) -> None:
    """As layers for ModelOpt have them, unless they are told otherwise (remap_te_layernorm of
    megatron/core/post_training/modelopt/gpt/model_specs.py)."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    golden(f"megatron/{name}")
    (case,) = (case for case in CASES if case.id == name)
    state = global_tensors(golden(case.iter_dir))
    for fused, own in OF_THEIR_OWN.items():
        state = {key.replace(fused, own): tensor for key, tensor in state.items()}
    save(state, storage_writer=FileSystemWriter(tmp_path / "in"), no_dist=True)
    shutil.copy(golden(case.iter_dir) / "metadata.json", tmp_path / "in")
    registry.convert(tmp_path / "in", tmp_path / "out", to="huggingface", config=golden(case.hf))
    equal(load_file(tmp_path / "out/model.safetensors"), load_file(golden(case.hf) / "model.safetensors"))


#: Entries of a training run -> a word of the reason why they are left out (shared reference megatron.md, B4 and B5).
OF_A_RUN = {
    "rng_state/shard_0.0_1.1": "random", "rerun_state_machine_state/shard_0_1": "run",
    "optimizer.state.step": "optimizer", "chained_1.optimizer.state.step": "optimizer",
    "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2": "FP8",
}  # fmt: skip


def test_what_a_run_holds_besides_is_left_out_and_said(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemWriter, save

    theirs = golden("megatron/llama/tp1pp1/iter_0000010")
    state = {**global_tensors(theirs), **dict.fromkeys(OF_A_RUN, "of a run")}
    save(state, storage_writer=FileSystemWriter(tmp_path / "in"), no_dist=True)
    shutil.copy(theirs / "metadata.json", tmp_path / "in")
    hf = golden("megatron/llama/hf")
    later = registry.inspect(golden("megatron/llama/tp1pp1_mcore020"), config=hf).left_out
    assert "run's own state" in later["common_state/shard_0_1"]
    found = registry.inspect(tmp_path / "in", config=hf).left_out
    assert {name for name, word in OF_A_RUN.items() if word in found[name]} == OF_A_RUN.keys() == found.keys()


@pytest.mark.parametrize("case", [c for c in WRITTEN if c.format == "torch"], ids=str)
def test_we_write_the_per_rank_golden(case: MegatronCase, tmp_path: Path) -> None:
    registry.convert(
        golden(case.hf), tmp_path / "out", to="megatron-legacy", parallel=layout(case), dtype=case.dtype,
        options=options(case) | ({} if case.grouped_gemm else {"expert_modules": "sequential"}),
    )  # fmt: skip
    theirs = sorted(golden(case.iter_dir).glob("mp_rank_*/model_optim_rng.pt"))
    assert theirs
    ours = sorted((tmp_path / "out/release").glob("mp_rank_*/model_optim_rng.pt"))
    assert [p.parent.name for p in ours] == [p.parent.name for p in theirs]
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        tp = int(re.findall(r"\d+", mine.parent.name)[0])
        compare_rank(torch.load(mine, weights_only=False), load_golden(other), case, tp, index)


def load_golden(path: Path) -> dict[str, object]:
    """The golden's model, with megatron's own classes in its arguments replaced by nothing."""
    import pickle
    import types

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if module.startswith("megatron"):
                return lambda *_: None
            return super().find_class(module, name)

    fake = types.SimpleNamespace(Unpickler=Unpickler, load=pickle.load, __name__="fake")
    loaded: dict[str, object] = torch.load(path, pickle_module=fake, weights_only=False)
    return loaded


def compare_rank(mine: dict, other: dict, case: MegatronCase, tp: int, index: int) -> None:
    models = [key for key in other if re.fullmatch(r"model\d*", key)]
    assert models == [key for key in mine if re.fullmatch(r"model\d*", key)]
    for key in models:
        tensors = [{n: t for n, t in side[key].items() if torch.is_tensor(t) and t.numel()} for side in (mine, other)]
        rows = case.padded_vocab // case.layout.get("tp", 1)
        real = max(0, min(rows, case.true_vocab - tp * rows))
        equal(*(without_padding(side, real) for side in tensors))
        extra = [{n for n in side[key] if n.endswith("_extra_state")} for side in (mine, other)]
        # Transformer-Engine's norms carry an extra state too in some versions; what it lacks it does not ask for.
        assert extra[0] <= extra[1] if case.spec == "te" else extra[0] == extra[1], f"rank {index}"


@pytest.mark.parametrize("case", [c for c in CASES if c.family != "gpt2"][:3], ids=str)
def test_bare_checkpoint_of_an_ambiguous_family_is_refused(case: MegatronCase, tmp_path: Path) -> None:
    if case.family != "llama":
        pytest.skip("only Llama's tensors fit two families")
    with pytest.raises(registry.DetectionError, match="llama, mistral"):
        registry.convert(case.path, tmp_path / "out", to="huggingface")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_bare_checkpoint_of_a_clear_family_is_recognised(family: str) -> None:
    case = next(case for case in CASES if case.family == family)
    opened = registry.open(case.path)
    assert opened.architecture == family
    assert opened.iteration == 10


def test_optimizer_and_random_state_are_reported() -> None:
    case = next(case for case in CASES if case.optimizer and case.format == "torch_dist")
    found = registry.inspect(case.path, architecture=case.family)
    reasons = " ".join(found.left_out.values())
    assert "optimizer" in reasons
    assert "random state" in reasons


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_verify_against_the_model_it_was_filled_from(case: MegatronCase) -> None:
    assert registry.verify(case.path, golden(case.hf))


def test_config_flag_takes_a_file_too(tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    case = next(case for case in CASES if case.family == "llama")
    config = golden(case.hf) / "config.json"
    registry.convert(case.path, tmp_path / "out", to="huggingface", config=config)
    assert (tmp_path / "out/config.json").read_bytes() == config.read_bytes()

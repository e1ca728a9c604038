"""What one rank does: build its part of the model, load it, take part in the forward pass. It imports Megatron."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.megatron_cpu import Job

EMBEDDING = "embedding.word_embeddings.weight"
GPT2 = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_inner": "intermediate_size"}
GPT2 |= {"n_head": "num_attention_heads", "n_positions": "max_position_embeddings"}
GPT2 |= {"layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act"}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def settings(hf: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of TransformerConfig and of GPTModel that a HuggingFace config stands for."""
    hf = {GPT2.get(name, name): value for name, value in hf.items()}
    family, heads, bias = hf["model_type"], hf["num_attention_heads"], bool(hf.get("attention_bias"))
    rope = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta", 10000.0), **(hf.get("rope_scaling") or {})}
    rope_type, gpt2 = rope.get("rope_type", "default"), family == "gpt2"
    assert family in ("llama", "mistral", "qwen2", "qwen3", "gpt2"), f"the family {family}"
    assert hf["hidden_act"] == ("gelu_new" if gpt2 else "silu"), f"the activation {hf['hidden_act']}"
    assert bias == bool(hf.get("mlp_bias")), "biases in the attention alone, or in the MLP alone"
    assert rope_type == "default" or LLAMA3.items() <= rope.items(), f"rotary embeddings {rope}"
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"] or 4 * hf["hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // heads,
        "layernorm_epsilon": hf["rms_norm_eps"],
        "normalization": "LayerNorm" if gpt2 else "RMSNorm",
        "gated_linear_unit": not gpt2,
        "activation_func": F.gelu if gpt2 else F.silu,
        "bias_activation_fusion": gpt2,  # the fused GELU is the tanh approximation that gpt2 needs
        "add_bias_linear": gpt2 or bias,
        "add_qkv_bias": family == "qwen2",
        "qk_layernorm": family == "qwen3",
    }, {
        "position_embedding_type": "learned_absolute" if gpt2 else "rope",
        "rotary_base": rope["rope_theta"],
        "rope_scaling": rope_type == "llama3",
        "rope_scaling_factor": rope.get("factor", 1.0),
        "max_sequence_length": hf["max_position_embeddings"],
        "share_embeddings_and_output_weights": hf.get("tie_word_embeddings", gpt2),
    }


def build(job: Job, hf: dict[str, Any], vocab: int) -> dict[str, GPTModel]:
    """This rank's chunks of the model, by their names in a checkpoint, filled with NaN."""
    config_args, model_args = settings(hf)
    if layout := [["decoder"] * count for count in job.stages]:
        layout[0].insert(0, "embedding")
        layout[-1].append("loss")
    vpp = job.vpp if job.vpp > 1 else None
    parallel_state.initialize_model_parallel(job.tp, job.pp, vpp)
    model_parallel_cuda_manual_seed(1)
    fusions = ("masked_softmax_fusion", "bias_dropout_fusion", "apply_rope_fusion", "gradient_accumulation_fusion")
    config = TransformerConfig(
        **config_args,
        **dict.fromkeys((*fusions, "persist_layer_norm"), False),
        **dict.fromkeys(("hidden_dropout", "attention_dropout"), 0.0),
        tensor_model_parallel_size=job.tp,
        pipeline_model_parallel_size=job.pp,
        virtual_pipeline_model_parallel_size=vpp,
        pipeline_model_parallel_layout=layout or None,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
    )
    chunks = {}
    for stage in range(job.vpp):
        chunk = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm),
            vocab_size=vocab,
            pre_process=parallel_state.is_pipeline_first_stage() and stage == 0,
            post_process=parallel_state.is_pipeline_last_stage() and stage == job.vpp - 1,
            parallel_output=False,
            vp_stage=stage if vpp else None,
            **model_args,
        )
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
        chunks[f"model{stage}" if vpp else "model"] = chunk.eval()
    return chunks


def request(job: Job, stored: dict[str, Any], chunks: dict[str, GPTModel]) -> dict[str, Any]:
    """The sharded state dict to load: the model's, and what the job is to ignore."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    per_layer = any(re.match(r"decoder\.layers\.\d", key) for key in stored)
    metadata = {"singleton_local_shards": False, "non_homogeneous_layers": per_layer, "dp_cp_group": group}
    wanted: dict[str, Any] = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in chunks.items()}
    for key in (key for key in stored if key.startswith(tuple(job.ignore))):
        if isinstance(entry := stored[key], TensorStorageMetadata):
            blank = torch.empty(entry.size, dtype=entry.properties.dtype)
            wanted[key] = ShardedTensor.from_rank_offsets(key, blank, replica_id=dist.get_rank())
        else:
            wanted[key] = ShardedObject.empty_from_unique_key(key, replica_id=dist.get_rank())
    return wanted


def forward(chunks: dict[str, GPTModel], input_ids: torch.Tensor) -> torch.Tensor | None:
    """Logits on the ranks of the last stage; elsewhere None. Hidden states travel by plain send and receive."""
    batch, length = input_ids.shape
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    for chunk in chunks.values():
        if not chunk.pre_process:
            hidden = torch.empty(length, batch, chunk.config.hidden_size)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(hidden)
        output: torch.Tensor = chunk(input_ids, torch.arange(length).expand(batch, -1), mask)
        if chunk.post_process:
            return output
        dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None


def work(job: Job, rank: int, store: str) -> None:
    """The whole of one rank."""
    hf = json.loads((Path(job.hf) / "config.json").read_text())
    input_ids, folder, vocab = load_file(job.input)["input_ids"], Path(job.checkpoint), hf["vocab_size"]
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    assert window is None or window >= input_ids.shape[-1], f"more tokens than the sliding window of {window}"
    if (tracker := folder / "latest_checkpointed_iteration.txt").exists():
        step = tracker.read_text().strip()
        folder /= step if step == "release" else f"iter_{int(step):07d}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=job.tp * job.pp)
    if job.format == "torch":
        name = "mp_rank_{:02d}_{:03d}" if job.pp > 1 else "mp_rank_{:02d}"
        first, own = (
            torch.load(folder / name.format(tp, pp) / "model_optim_rng.pt", map_location="cpu", weights_only=False)
            for tp, pp in ((0, 0), (rank % job.tp, rank // job.tp))
        )
        chunks = build(job, hf, (first.get("model") or first["model0"])[EMBEDDING].shape[0] * job.tp)
        assert (found := {key for key in own if key.startswith("model")}) == set(chunks), f"{found}, not {set(chunks)}"
    else:
        stored: dict[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
        chunks = build(job, hf, stored[EMBEDDING].size[0])
        own = dist_checkpointing.load(request(job, stored, chunks), str(folder), strict=job.strict)
    for name, chunk in chunks.items():
        chunk.load_state_dict(own.get(name, {}), strict=True)
        unset = [key for key, parameter in chunk.named_parameters() if not parameter.isfinite().all()]
        assert not unset, f"parameters unset or not finite: {unset}"
    with torch.inference_mode():
        output = forward(chunks, input_ids.reshape(-1, input_ids.shape[-1]))
    if output is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
        assert output.shape[-1] >= vocab, f"{output.shape[-1]} rows for a vocabulary of {vocab}"
        save_file({"logits": output[..., :vocab].reshape(*input_ids.shape, vocab).contiguous()}, job.out)
    dist.barrier()
    dist.destroy_process_group()

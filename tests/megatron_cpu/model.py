"""What one rank does: build its part of the model, load it, take part in the forward pass. It imports Megatron."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.megatron_cpu import Job, encoders
from tests.megatron_cpu.families import FAMILIES, Config
from tests.test_golden_megatron import by_expert, parts

EMBEDDING = "embedding.word_embeddings.weight"
FUSIONS = ("masked_softmax_fusion", "bias_dropout_fusion", "bias_activation_fusion", "apply_rope_fusion")
OFF = (*FUSIONS, "gradient_accumulation_fusion", "persist_layer_norm")
#: The config's class, by the argument that asks for it.
CONFIGS = {
    "multi_latent_attention": MLATransformerConfig,
    "heterogeneous_layers_config_encoded_json": HeterogeneousTransformerConfig,
}


def world_size(job: Job) -> int:
    """The fewest ranks that hold the dense layout and the experts' layout."""
    return job.pp * math.lcm(job.tp, job.ep * (job.etp or job.tp))


def configured(job: Job, arguments: dict[str, Any]) -> TransformerConfig:
    """Megatron's config, of this rank's part in the job."""
    if layout := [["decoder"] * count for count in job.stages]:
        layout[0].insert(0, "embedding")
        layout[-1].append("loss")
    kind = next((kind for name, kind in CONFIGS.items() if arguments.get(name)), TransformerConfig)
    known = {field.name for field in dataclasses.fields(kind)}
    config = kind(
        **{name: value for name, value in arguments.items() if name in known},
        **dict.fromkeys(OFF, False),
        **dict.fromkeys(("hidden_dropout", "attention_dropout"), 0.0),
        tensor_model_parallel_size=job.tp,
        pipeline_model_parallel_size=job.pp,
        virtual_pipeline_model_parallel_size=job.vpp if job.vpp > 1 else None,
        expert_model_parallel_size=job.ep,
        expert_tensor_parallel_size=job.etp or job.tp,
        pipeline_model_parallel_layout=layout or None,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        transformer_impl="transformer_engine" if job.engine else "local",
        moe_grouped_gemm=job.grouped,
        mtp_num_layers=job.mtp or None,
    )
    for name in arguments.keys() - known:  # that Megatron reads of its config without a declaration
        setattr(config, name, arguments[name])
    return config


def gpt(job: Job, config: TransformerConfig, stage: int | None, **arguments: Any) -> GPTModel:
    if config.experimental_attention_variant:
        spec = get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=stage)
    elif config.heterogeneous_block_specs:
        spec = get_gpt_heterogeneous_layer_spec(config, job.engine, vp_stage=stage)
    else:
        spec = get_gpt_decoder_block_spec(config, job.engine, normalization=config.normalization, vp_stage=stage)
    if job.mtp and parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage):
        arguments["mtp_block_spec"] = get_gpt_mtp_block_spec(config, spec, job.engine, vp_stage=stage)
    return GPTModel(config, spec, vp_stage=stage, **arguments)


def mamba(job: Job, config: TransformerConfig, stage: int | None, **arguments: Any) -> torch.nn.Module:
    from megatron.core.models.mamba import MambaModel
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec

    assert stage is None, "Megatron's MambaModel has no virtual stages"
    return MambaModel(config, mamba_stack_spec, **arguments)


def decoder_logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Also the hidden states, of a stage that is not the last. With multi-token prediction Megatron computes the loss
    only; the logits pass through a hook."""
    batch, length = input_ids.shape
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    inputs = input_ids, torch.arange(length).expand(batch, -1), mask
    if not (model.post_process and model.config.mtp_num_layers):
        output: torch.Tensor = model(*inputs)
        return output
    seen: list[torch.Tensor] = []
    model.output_layer.register_forward_hook(lambda *call: seen.append(call[-1][0].clone()))  # the loss overwrites them
    model(*inputs, labels=input_ids)
    assert len(seen) == 1 + model.config.mtp_num_layers and all(found.isfinite().all() for found in seen)
    return seen[-1].transpose(0, 1)


#: How a kind of model is built, and what it computes of token ids.
KINDS: dict[str, tuple[Callable[..., Any], Callable[..., torch.Tensor]]] = {
    "gpt": (gpt, decoder_logits),
    "mamba": (mamba, decoder_logits),
    "bert": (encoders.bert, encoders.bert_logits),
    "t5": (encoders.t5, encoders.t5_logits),
}


def build(job: Job, hf: Config, vocab: int) -> dict[str, Any]:
    """This rank's chunks of the model, by their names in a checkpoint, filled with NaN."""
    family = FAMILIES[hf.model_type]
    assert job.engine or not family.engine, f"{hf.model_type} needs Transformer-Engine's layers"
    config_arguments, model_arguments, scale = family.settings(hf)
    config = configured(job, config_arguments)
    chunks = {}
    for stage in range(job.vpp):
        chunk = KINDS[family.kind][0](
            job, config, stage if job.vpp > 1 else None, vocab_size=vocab, parallel_output=False,
            pre_process=parallel_state.is_pipeline_first_stage() and stage == 0,
            post_process=parallel_state.is_pipeline_last_stage() and stage == job.vpp - 1, **model_arguments,
        )  # fmt: skip
        for tensor in (*chunk.parameters(), *(b for name, b in chunk.named_buffers() if name.endswith("expert_bias"))):
            tensor.data.fill_(float("nan"))
        for name, factor in scale.items():
            if (module := getattr(chunk, name, None)) is not None:
                module.register_forward_hook(lambda _, __, output, factor=factor: scaled(output, factor))
        chunks[f"model{stage}" if job.vpp > 1 else "model"] = chunk.eval()
    return chunks


def scaled(output: Any, factor: float) -> Any:
    return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor


def request(job: Job, stored: dict[str, Any], chunks: dict[str, Any]) -> dict[str, Any]:
    """The sharded state dict to load: the model's, and what the job is to ignore."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    per_layer = any(re.match(r"decoder\.layers\.\d", key) for key in stored)
    metadata = {"singleton_local_shards": False, "non_homogeneous_layers": per_layer, "dp_cp_group": group}
    wanted: dict[str, Any] = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in chunks.items()}
    if job.lenient:
        for state in wanted.values():
            for name in [k for k, v in state.items() if isinstance(v, ShardedObject) and v.unique_key not in stored]:
                del state[name]
    for key in (key for key in stored if key.startswith(tuple(job.ignore))):
        if isinstance(entry := stored[key], TensorStorageMetadata):
            blank = torch.empty(entry.size, dtype=entry.properties.dtype)
            wanted[key] = ShardedTensor.from_rank_offsets(key, blank, replica_id=dist.get_rank())
        else:
            wanted[key] = ShardedObject.empty_from_unique_key(key, replica_id=dist.get_rank())
    return wanted


def check_parts(job: Job, folder: Path, chunks: dict[str, Any]) -> None:
    """This rank's tensors are parts of the checkpoint just as they are, each experts' one by one."""
    found = parts(folder)
    for state in request(job, dict(found), chunks).values():
        apply_factories(state)
        for tensor in (t for t in nested_values(state) if isinstance(t, ShardedTensor)):
            sizes = (*[1] * tensor.prepend_axis_num, *tensor.local_shape)
            for part in by_expert(tensor.key, tensor.global_offset, sizes):
                assert part in found[tensor.key], f"{tensor.key} has no part {part}: {found[tensor.key]}"


def forward(kind: str, chunks: dict[str, Any], input_ids: torch.Tensor) -> torch.Tensor | None:
    """Logits on the ranks of the last stage; elsewhere None. Hidden states travel by plain send and receive."""
    for chunk in chunks.values():
        if not chunk.pre_process:
            hidden = torch.empty(*reversed(input_ids.shape), chunk.config.hidden_size)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(hidden)
        output = KINDS[kind][1](chunk, input_ids)
        if chunk.post_process:
            return output
        dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None


def stored_by_rank(job: Job, folder: Path) -> tuple[int, dict[str, Any]]:
    """Of the torch format: the rows of the embedding's first shard, and this rank's own file."""
    tp, pp, ep = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    )
    name = "mp_rank_{:02d}" + "_{:03d}" * (job.pp > 1) + "_{:03d}" * (job.ep > 1)
    first, own = (
        torch.load(folder / name.format(*rank) / "model_optim_rng.pt", map_location="cpu", weights_only=False)
        for rank in ((0, 0, 0)[: name.count("{")], (tp, *[pp] * (job.pp > 1), *[ep] * (job.ep > 1)))
    )
    return (first.get("model") or first["model0"])[EMBEDDING].shape[0], own


def work(job: Job, rank: int, store: str) -> None:
    """The whole of one rank."""
    hf = Config(json.loads((Path(job.hf) / "config.json").read_text()))
    input_ids, folder, vocab = load_file(job.input)["input_ids"], Path(job.checkpoint), hf["vocab_size"]
    window = hf.sliding_window if hf.get("use_sliding_window", True) else None
    windowed = "window_size" in FAMILIES[hf.model_type].config
    assert windowed or (window or math.inf) >= input_ids.shape[-1], f"more tokens than the sliding window of {window}"
    if (tracker := folder / "latest_checkpointed_iteration.txt").exists():
        step = tracker.read_text().strip()
        folder /= step if step == "release" else f"iter_{int(step):07d}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size(job))
    parallel_state.initialize_model_parallel(
        job.tp, job.pp, job.vpp if job.vpp > 1 else None, expert_model_parallel_size=job.ep,
        expert_tensor_parallel_size=job.etp or job.tp,
    )  # fmt: skip
    model_parallel_cuda_manual_seed(1)
    if job.format == "torch":
        rows, own = stored_by_rank(job, folder)
        chunks = build(job, hf, rows * job.tp)
        assert (found := {key for key in own if key.startswith("model")}) == set(chunks), f"{found}, not {set(chunks)}"
    else:
        stored: dict[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
        chunks = build(job, hf, stored[EMBEDDING].size[0])
        if job.parts:
            check_parts(job, folder, chunks)
        own = dist_checkpointing.load(request(job, stored, chunks), str(folder), strict=job.strict)
    for name, chunk in chunks.items():
        default = {k: None for k in chunk.state_dict() if k.endswith("_extra_state")} if job.lenient else {}
        chunk.load_state_dict({**default, **own.get(name, {})}, strict=True)
        named = {**dict(chunk.named_parameters()), **dict(chunk.named_buffers())}
        unset = [key for key, tensor in named.items() if not tensor.isfinite().all()]
        assert not unset, f"parameters unset or not finite: {unset}"
    with torch.inference_mode():
        output = forward(FAMILIES[hf.model_type].kind, chunks, input_ids.reshape(-1, input_ids.shape[-1]))
    leader = parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_data_parallel_rank() == 0
    if output is not None and leader:
        assert output.shape[-1] >= vocab, f"{output.shape[-1]} rows for a vocabulary of {vocab}"
        save_file({"logits": output[..., :vocab].reshape(*input_ids.shape, vocab).contiguous()}, job.out)
    dist.barrier()
    dist.destroy_process_group()

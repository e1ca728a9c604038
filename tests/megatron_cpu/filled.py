"""HuggingFace models with an encoder as Megatron's state, by hand: no golden has any, and we do not write them."""

import torch
from torch import Tensor

State = dict[str, Tensor]
PARTS = ("weight", "bias")


def interleaved(heads: int, *parts: Tensor) -> Tensor:
    """Rows of the parts in turn, head by head."""
    rows = [part.unflatten(0, (heads, -1)) for part in parts]
    return torch.cat(rows, 1).flatten(0, 1)


def megatron_bert(hf: State, layers: int, heads: int) -> State:
    """Of a MegatronBertForPreTraining, for Megatron's own layers."""
    state = {
        "embedding.word_embeddings.weight": hf["bert.embeddings.word_embeddings.weight"],
        "embedding.position_embeddings.weight": hf["bert.embeddings.position_embeddings.weight"],
        "embedding.tokentype_embeddings.weight": hf["bert.embeddings.token_type_embeddings.weight"],
        "output_layer.bias": hf["cls.predictions.bias"],
    }
    names = {
        "encoder.final_layernorm": "bert.encoder.ln",
        "lm_head.dense": "cls.predictions.transform.dense",
        "lm_head.layer_norm": "cls.predictions.transform.LayerNorm",
        "pooler.dense": "bert.pooler.dense",
        "binary_head": "cls.seq_relationship",
    }
    for i in range(layers):
        ours, theirs = f"encoder.layers.{i}", f"bert.encoder.layer.{i}"
        names |= {
            f"{ours}.input_layernorm": f"{theirs}.attention.ln",
            f"{ours}.self_attention.linear_proj": f"{theirs}.attention.output.dense",
            f"{ours}.pre_mlp_layernorm": f"{theirs}.ln",
            f"{ours}.mlp.linear_fc1": f"{theirs}.intermediate.dense",
            f"{ours}.mlp.linear_fc2": f"{theirs}.output.dense",
        }
        for part in PARTS:
            qkv = (hf[f"{theirs}.attention.self.{name}.{part}"] for name in ("query", "key", "value"))
            state[f"{ours}.self_attention.linear_qkv.{part}"] = interleaved(heads, *qkv)
    return state | {f"{ours}.{part}": hf[f"{theirs}.{part}"] for ours, theirs in names.items() for part in PARTS}


def t5(hf: State, layers: int, heads: int) -> State:
    """Of a T5ForConditionalGeneration with tied embeddings, for Transformer-Engine's layers.

    Megatron's head then has a bias, and two names.
    """
    bias = hf["shared.weight"].new_zeros(len(hf["shared.weight"]))
    state = {"embedding.word_embeddings.weight": hf["shared.weight"]}
    state |= dict.fromkeys(("lm_head.output_layer.bias", "output_layer.bias"), bias)
    for side, last in (("encoder", 1), ("decoder", 2)):
        bias = hf[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        state[f"{side}_relative_pos_emb.relative_attention_bias.weight"] = bias
        state[f"{side}.final_layernorm.weight"] = hf[f"{side}.final_layer_norm.weight"]
        for i in range(layers):
            ours, theirs = f"{side}.layers.{i}", f"{side}.block.{i}.layer"
            q, k, v, o = (hf[f"{theirs}.0.SelfAttention.{name}.weight"] for name in "qkvo")
            mlp = f"{theirs}.{last}.DenseReluDense"
            gated = f"{mlp}.wi_0.weight" in hf
            state |= {
                f"{ours}.self_attention.linear_qkv.layer_norm_weight": hf[f"{theirs}.0.layer_norm.weight"],
                f"{ours}.self_attention.linear_qkv.weight": interleaved(heads, q, k, v),
                f"{ours}.self_attention.linear_proj.weight": o,
                f"{ours}.mlp.linear_fc1.layer_norm_weight": hf[f"{theirs}.{last}.layer_norm.weight"],
                f"{ours}.mlp.linear_fc1.weight": torch.cat(
                    [hf[f"{mlp}.{name}.weight"] for name in (("wi_0", "wi_1") if gated else ("wi",))]
                ),
                f"{ours}.mlp.linear_fc2.weight": hf[f"{mlp}.wo.weight"],
            }
            if side == "decoder":
                q, k, v, o = (hf[f"{theirs}.1.EncDecAttention.{name}.weight"] for name in "qkvo")
                state |= {
                    f"{ours}.pre_cross_attn_layernorm.weight": hf[f"{theirs}.1.layer_norm.weight"],
                    f"{ours}.cross_attention.linear_q.weight": q,
                    f"{ours}.cross_attention.linear_kv.weight": interleaved(heads, k, v),
                    f"{ours}.cross_attention.linear_proj.weight": o,
                }
    return state

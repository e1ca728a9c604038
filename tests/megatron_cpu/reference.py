"""What transformers computes, to hold Megatron's logits against."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn


def reference_logits(
    hf: Path, input_ids: torch.Tensor, rounded: torch.dtype | None = None, **config: Any
) -> torch.Tensor:
    """Logits in float32 of the model in a directory, with these fields of its config changed.

    `rounded`: the weights are rounded to that type first. An encoder with a decoder gets the ids twice.
    """
    import transformers

    fields = json.loads((hf / "config.json").read_text())
    if fields["model_type"] == "nemotron-nas":
        model: Any = decilm(hf, {**fields, **config})
    else:
        if fields["model_type"] == "kimi_k2":  # whose published code is DeepSeek's, and its class of that name
            fields = {**fields, **config, "model_type": "deepseek_v3"}
            config = {"config": transformers.DeepseekV3Config.from_dict(fields)}
        model = getattr(transformers, fields["architectures"][0]).from_pretrained(
            hf, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", **config
        )
    inputs = {"decoder_input_ids": input_ids} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        for parameter in model.parameters() if rounded else ():
            parameter.copy_(parameter.to(rounded))
        output = model.eval()(input_ids, **inputs)
    logits: torch.Tensor = output.prediction_logits if "prediction_logits" in output else output.logits
    return logits


class Linear(nn.Module):
    """One matrix in place of a layer's attention, which answers with its weights too, or of its MLP."""

    def __init__(self, name: str, hidden: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(hidden, hidden, bias=False))

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        output = self.get_submodule(self.name)(hidden_states)
        return (output, None) if self.name == "linear_attn" else output


class Nothing(nn.Module):
    """Adds zero to what goes around it."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        output = torch.zeros_like(hidden_states)
        return (output, None) if self.attention else output


def decilm(hf: Path, fields: dict[str, Any]) -> nn.Module:
    """A DeciLM, which transformers has no class for: its Llama, with the parts of each layer as `block_configs` says.

    What a part is replaced with, and that a part left out takes its norm along, is as in modeling_decilm.py.
    """
    from transformers.models.llama import modeling_llama

    llama: Any = modeling_llama

    def config(**sizes: int) -> Any:
        known = {key: value for key, value in {**fields, **sizes}.items() if value is not None}
        return llama.LlamaConfig(**{**known, "model_type": "llama", "attn_implementation": "eager"})

    hidden, heads, weights = fields["hidden_size"], fields["num_attention_heads"], load_file(hf / "model.safetensors")
    model: nn.Module = llama.LlamaForCausalLM(config())
    layers: Any = model.get_submodule("model.layers")
    for i, (layer, block) in enumerate(zip(layers, fields["block_configs"], strict=True)):
        attention, ffn = block["attention"], block["ffn"]
        if attention["no_op"]:
            layer.input_layernorm, layer.self_attn = nn.Identity(), Nothing(attention=True)
        elif attention["replace_with_linear"]:
            layer.self_attn = Linear("linear_attn", hidden)
        else:
            groups = heads // attention["n_heads_in_group"]
            layer.self_attn = llama.LlamaAttention(config(num_key_value_heads=groups), i)
        if ffn["no_op"]:
            layer.post_attention_layernorm, layer.mlp = nn.Identity(), Nothing(attention=False)
        elif ffn["replace_with_linear"]:
            layer.mlp = Linear("linear_mlp", hidden)
        else:
            inner = weights[f"model.layers.{i}.mlp.gate_proj.weight"].shape[0]
            layer.mlp = llama.LlamaMLP(config(intermediate_size=inner))
    model.load_state_dict(weights, strict=True)
    return model

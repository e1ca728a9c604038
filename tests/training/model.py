"""A small Llama in Megatron's names, really tensor-parallel; and what each rank holds of a whole state, by reference D.

Written for the tests from the reference's tables alone: it shares nothing with the library.
"""

import re
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, HIDDEN, LAYERS, HEADS, GROUPS, DIM, FFN = 64, 32, 4, 8, 4, 8, 48
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB - 3, "hidden_size": HIDDEN,
    "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS, "head_dim": DIM, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False,
    "mlp_bias": False, "torch_dtype": "float32",
}  # fmt: skip


class _Copy(torch.autograd.Function):
    """The same forwards; backwards the sum over tensor-parallel ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        grad = grad.clone()
        if ctx.group is not None:
            dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum over tensor-parallel ranks; backwards the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone()
        if group is not None:
            dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, None


class Linear(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns) * 0.1)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(HIDDEN) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (HIDDEN,), self.weight, 1e-5)


class Attention(nn.Module):
    def __init__(self, tp: int, group: Any) -> None:
        super().__init__()
        self.tp, self.group = tp, group
        self.linear_proj = Linear(HIDDEN, HEADS * DIM // tp)
        self.linear_qkv = Linear((HEADS + 2 * GROUPS) * DIM // tp, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        rep = HEADS // GROUPS
        qkv = F.linear(_Copy.apply(x, self.group), self.linear_qkv.weight)
        qkv = qkv.view(batch, length, GROUPS // self.tp, rep + 2, DIM)
        q, k, v = qkv[..., :rep, :], qkv[..., rep : rep + 1, :], qkv[..., rep + 1 :, :]
        k, v = k.expand_as(q), v.expand_as(q)
        q, k, v = (t.flatten(2, 3).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return _Sum.apply(F.linear(y, self.linear_proj.weight), self.group)


class Mlp(nn.Module):
    def __init__(self, tp: int, group: Any) -> None:
        super().__init__()
        self.group = group
        self.linear_fc1, self.linear_fc2 = Linear(2 * FFN // tp, HIDDEN), Linear(HIDDEN, FFN // tp)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(_Copy.apply(x, self.group), self.linear_fc1.weight).chunk(2, -1)
        return _Sum.apply(F.linear(F.silu(gate) * up, self.linear_fc2.weight), self.group)


class Layer(nn.Module):
    def __init__(self, tp: int, group: Any) -> None:
        super().__init__()
        self.input_layernorm = Norm()
        self.self_attention = Attention(tp, group)
        self.pre_mlp_layernorm = Norm()
        self.mlp = Mlp(tp, group)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + F.dropout(self.mlp(self.pre_mlp_layernorm(x)), 0.1, self.training)


class Model(nn.Module):
    """One stage of the model: `layers` of it, with the embedding and the output where they belong."""

    def __init__(
        self, tp: int = 1, layers: int = LAYERS, first: bool = True, last: bool = True, group: Any = None
    ) -> None:
        super().__init__()
        self.group = group
        if first:
            self.embedding = nn.Module()
            self.embedding.word_embeddings = Linear(VOCAB // tp, HIDDEN)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(Layer(tp, group) for _ in range(layers))
        if last:
            self.decoder.final_layernorm = Norm()
            self.output_layer = Linear(VOCAB // tp, HIDDEN)

    def loss(self, ids: Tensor) -> Tensor:
        """Vocabulary-parallel cross entropy of the next token; the padded rows take part, as in Megatron."""
        table, tp = self.embedding.word_embeddings.weight, VOCAB // self.output_layer.weight.shape[0]
        first = dist.get_rank(self.group) * table.shape[0] if tp > 1 else 0
        local = ids - first
        here = (local >= 0) & (local < table.shape[0])
        x = F.embedding(local.clamp(0, table.shape[0] - 1), table) * here[..., None]
        x = _Sum.apply(x, self.group)
        for layer in self.decoder.layers:
            x = layer(x)
        logits = F.linear(_Copy.apply(self.decoder.final_layernorm(x), self.group), self.output_layer.weight)[:, :-1]
        local, here = local[:, 1:], here[:, 1:]
        total = _Sum.apply(logits.exp().sum(-1), self.group)
        right = logits.gather(-1, local.clamp(0, table.shape[0] - 1)[..., None])[..., 0] * here
        return (total.log() - _Sum.apply(right, self.group)).mean()


def cut(
    whole: dict[str, Tensor], tp: int, pp: int, tp_rank: int, pp_rank: int, vpp: int = 1, chunk: int = 0
) -> dict[str, Tensor]:
    """What one rank holds of a whole (TP1, PP1) state, by the tables of reference D and B3.10."""
    count = LAYERS // (pp * vpp)
    start = chunk * (LAYERS // vpp) + pp_rank * count
    found = {}
    for name, tensor in whole.items():
        if match := re.match(r"decoder\.layers\.(\d+)\.(.*)", name):
            if not start <= int(match[1]) < start + count:
                continue
            name = f"decoder.layers.{int(match[1]) - start}.{match[2]}"
        elif name.startswith("embedding"):
            if (pp_rank, chunk) != (0, 0):
                continue
        elif (pp_rank, chunk) != (pp - 1, vpp - 1):
            continue
        if "linear_fc1" in name:
            tensor = torch.cat([half.chunk(tp)[tp_rank] for half in tensor.chunk(2)])
        elif "linear_proj" in name or "linear_fc2" in name:
            tensor = tensor.chunk(tp, 1)[tp_rank]
        elif "layernorm" not in name:
            tensor = tensor.chunk(tp)[tp_rank]
        found[name] = tensor.clone()
    return found

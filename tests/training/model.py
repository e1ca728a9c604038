"""A small Llama or Mixtral in Megatron's names, really tensor- and expert-parallel; and what each rank holds of a whole
state, by reference D.

Written for the tests from the reference's tables alone: it shares nothing with the library.
"""

import re
from dataclasses import dataclass, field
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
EXPERTS, CHOSEN = 4, 2
MIXTRAL = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": VOCAB - 3, "hidden_size": HIDDEN,
    "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS, "head_dim": DIM, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "rope_theta": 10000.0, "hidden_act": "silu", "num_local_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN, "torch_dtype": "float32",
}  # fmt: skip
#: dense: Llama. sequential: Mixtral in the names of Megatron's local layers. grouped: in those of Transformer Engine's.
CONFIGS = {"dense": CONFIG, "sequential": MIXTRAL, "grouped": MIXTRAL}


@dataclass(frozen=True)
class Place:
    """A process of a layout, and where it is in it. Megatron's order of ranks is tp, ep, dp, pp; experts have their own
    tensor-parallel size (megatron/core/parallel_state.py, RankGenerator).
    """

    layout: dict[str, int] = field(default_factory=dict)
    rank: int = 0
    world: int = 1

    def __getitem__(self, dim: str) -> int:
        """The size of a dimension."""
        return self.layout.get(dim, self["tp"] if dim == "etp" else 1)

    @property
    def stage(self) -> int:
        return self.rank // (self.world // self["pp"])

    @property
    def within(self) -> int:
        """The number of the process in its stage."""
        return self.rank % (self.world // self["pp"])

    @property
    def tp(self) -> int:
        return self.within % self["tp"]

    @property
    def etp(self) -> int:
        return self.within % self["etp"]

    @property
    def ep(self) -> int:
        return self.within // self["etp"] % self["ep"]


ALONE = Place()


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


class _Both(torch.autograd.Function):
    """The sum over ranks that each have a loss of their own: backwards it is the sum too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _Sum.forward(ctx, x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _Sum.forward(ctx, grad, ctx.group), None


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


class Experts(nn.Module):
    """A router, and the experts of one rank; `group` is that of the ranks that have the others. Runs with TP1 only."""

    def __init__(self, place: Place, kind: str, group: Any) -> None:
        super().__init__()
        self.group, self.ep, self.ranks, self.kind = group, place.ep, place["ep"], kind
        self.router = Linear(EXPERTS, HIDDEN)
        self.experts = nn.Module()
        count, ffn = EXPERTS // place["ep"], FFN // place["etp"]
        if kind == "sequential":
            self.experts.local_experts = nn.ModuleList(nn.Module() for _ in range(count))
            for expert in self.experts.local_experts:
                expert.linear_fc1, expert.linear_fc2 = Linear(2 * ffn, HIDDEN), Linear(HIDDEN, ffn)
        else:
            for name, shape in (("linear_fc1", (2 * ffn, HIDDEN)), ("linear_fc2", (HIDDEN, ffn))):
                module = nn.Module()
                for i in range(count):
                    setattr(module, f"weight{i}", nn.Parameter(torch.randn(shape) * 0.1))
                setattr(self.experts, name, module)

    def _weights(self, i: int) -> tuple[Tensor, Tensor]:
        if self.kind == "sequential":
            expert = self.experts.local_experts[i]
            return expert.linear_fc1.weight, expert.linear_fc2.weight
        return getattr(self.experts.linear_fc1, f"weight{i}"), getattr(self.experts.linear_fc2, f"weight{i}")

    def forward(self, x: Tensor) -> Tensor:
        values, chosen = F.linear(x, self.router.weight).topk(CHOSEN)
        scores = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, chosen, values.softmax(-1))
        own = (torch.arange(self.ranks) == self.ep).to(x.dtype)[:, None, None, None]
        x, scores = _Both.apply(own * x, self.group), _Both.apply(own * scores, self.group)  # all ranks' tokens
        y, count = torch.zeros_like(x), EXPERTS // self.ranks
        for i in range(count):
            first, second = self._weights(i)
            gate, up = F.linear(x, first).chunk(2, -1)
            y = y + F.linear(F.silu(gate) * up, second) * scores[..., self.ep * count + i, None]
        return _Both.apply(y, self.group)[self.ep]


class _Fused(Linear):
    """A projection that has the norm before it, as Transformer Engine's."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows, HIDDEN)
        self.layer_norm_weight = nn.Parameter(1 + torch.randn(HIDDEN) * 0.1)


class Layer(nn.Module):
    def __init__(self, place: Place, kind: str, group: Any, experts: Any) -> None:
        super().__init__()
        tp = place["tp"]
        if kind != "grouped":
            self.input_layernorm = Norm()
        self.self_attention = Attention(tp, group)
        if kind == "grouped":
            self.self_attention.linear_qkv = _Fused((HEADS + 2 * GROUPS) * DIM // tp)
        self.pre_mlp_layernorm = Norm()
        self.mlp = Mlp(tp, group) if kind == "dense" else Experts(place, kind, experts)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.self_attention.linear_qkv
        norm = qkv.layer_norm_weight if isinstance(qkv, _Fused) else self.input_layernorm.weight
        x = x + self.self_attention(F.rms_norm(x, (HIDDEN,), norm, 1e-5))
        return x + F.dropout(self.mlp(self.pre_mlp_layernorm(x)), 0.1, self.training)


class Model(nn.Module):
    """One chunk of a stage: its layers, with the embedding and the output where they belong.

    `group`: the tensor-parallel ranks, `experts`: the expert-parallel ones; without groups a part cannot be run.
    """

    def __init__(
        self, place: Place = ALONE, chunk: int = 0, kind: str = "dense", group: Any = None, experts: Any = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.group = group
        tp, pp, vpp = place["tp"], place["pp"], place["vpp"]
        first, last = (place.stage, chunk) == (0, 0), (place.stage, chunk) == (pp - 1, vpp - 1)
        if first:
            self.embedding = nn.Module()
            self.embedding.word_embeddings = Linear(VOCAB // tp, HIDDEN)
        self.decoder = nn.Module()
        layers = range(LAYERS // pp // vpp)
        self.decoder.layers = nn.ModuleList(Layer(place, kind, group, experts) for _ in layers)
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


def cut(whole: dict[str, Tensor], place: Place, chunk: int = 0, kind: str = "dense") -> dict[str, Tensor]:
    """What one rank holds of a whole (TP1, PP1, EP1) state, by the tables of reference D and B3.10.

    The whole state of any model with experts has the names of sequential ones.
    """
    tp, pp, vpp = place["tp"], place["pp"], place["vpp"]
    count, experts = LAYERS // (pp * vpp), EXPERTS // place["ep"]
    start = chunk * (LAYERS // vpp) + place.stage * count
    found = {}
    for name, tensor in whole.items():
        if match := re.match(r"decoder\.layers\.(\d+)\.(.*)", name):
            if not start <= int(match[1]) < start + count:
                continue
            name = f"decoder.layers.{int(match[1]) - start}.{match[2]}"
        elif name.startswith("embedding"):
            if (place.stage, chunk) != (0, 0):
                continue
        elif (place.stage, chunk) != (pp - 1, vpp - 1):
            continue
        size, index = tp, place.tp
        if match := re.fullmatch(r"(.*\.experts)\.local_experts\.(\d+)\.(.*)", name):
            expert = int(match[2]) - place.ep * experts
            if not 0 <= expert < experts:
                continue
            size, index = place["etp"], place.etp
            grouped = f"{match[1]}.{match[3]}{expert}"
            name = grouped if kind == "grouped" else f"{match[1]}.local_experts.{expert}.{match[3]}"
        if kind == "grouped":
            name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        if "linear_fc1" in name:
            tensor = torch.cat([half.chunk(size)[index] for half in tensor.chunk(2)])
        elif "linear_proj" in name or "linear_fc2" in name:
            tensor = tensor.chunk(size, 1)[index]
        elif "norm" not in name and "router" not in name:
            tensor = tensor.chunk(size)[index]
        found[name] = tensor.clone()
    return found


def huggingface(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole state's weights as transformers has them on disk (modeling_llama.py, modeling_mixtral.py)."""
    plain = {
        "embedding.word_embeddings": "model.embed_tokens", "decoder.final_layernorm": "model.norm",
        "output_layer": "lm_head", "decoder.layers": "model.layers", "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.linear_proj": "self_attn.o_proj", "mlp.router": "block_sparse_moe.gate",
        "mlp.experts.local_experts": "block_sparse_moe.experts",
    }  # fmt: skip
    found = {}
    for name, tensor in whole.items():
        for ours, theirs in plain.items():
            name = name.replace(ours, theirs)
        names, expert = [name], "experts" in name
        parts = [tensor[: VOCAB - 3] if name.startswith(("model.embed", "lm_head")) else tensor]
        if "linear_qkv" in name:  # of every group its queries, then its key and its value
            names = [name.replace("self_attention.linear_qkv", f"self_attn.{part}_proj") for part in "qkv"]
            rep = HEADS // GROUPS * DIM
            parts = [part.flatten(0, 1) for part in tensor.view(GROUPS, -1, HIDDEN).split([rep, DIM, DIM], 1)]
        elif "linear_fc1" in name:
            halves = ("w1", "w3") if expert else ("gate_proj", "up_proj")
            names = [name.replace("linear_fc1", half) for half in halves]
            parts = list(tensor.chunk(2))
        elif "linear_fc2" in name:
            names = [name.replace("linear_fc2", "w2" if expert else "down_proj")]
        found |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
    return found

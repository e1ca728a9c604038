"""A stand-in for Transformer-Engine, in torch: what Megatron's wrappers of it need, so that their classes run on a CPU.

The names, shapes and sharding of a checkpoint come from Megatron's own wrappers (`megatron.core.extensions`), which are
subclasses of these. From here come only the parameters' names inside a module and the extra state, which is empty
without FP8; both are as in Transformer-Engine 2.0 and later.
"""

import contextlib
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VERSION = "2.8.0"  # of the API that is imitated
Group = Any


def normalized(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
    """The root-mean-square norm, or with a bias the layer norm. A zero-centred weight is stored less one."""
    weight = weight + 1 if zero_centered else weight
    if bias is not None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


class Module(nn.Module):
    """Every module of Transformer-Engine has an extra state, without FP8 an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        pass


class Linear(Module):
    def __init__(
        self, in_features: int, out_features: int, tp_group: Group = None, tp_size: int = 1, bias: bool = True,
        return_bias: bool = False, parallel_mode: str | None = None, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.use_bias, self.return_bias = bias, return_bias
        self.weight = parameter(self.out_features, self.in_features)
        if bias:
            self.bias = parameter(self.out_features)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        from megatron.core.tensor_parallel import mappings

        bias = self.bias if self.use_bias else None
        if self.tp_size == 1 or self.parallel_mode is None:
            y = F.linear(x, self.weight, None if self.return_bias else bias)
        elif self.parallel_mode == "column":
            x = mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)
            y = F.linear(x, self.weight, None if self.return_bias else bias)
        else:  # the bias is added once, to the sum
            y = mappings.reduce_from_tensor_model_parallel_region(F.linear(x, self.weight), group=self.tp_group)
            y = y if bias is None or self.return_bias else y + bias
        return (y, bias) if self.return_bias else y


class LayerNormLinear(Linear):
    def __init__(
        self, in_features: int, out_features: int, eps: float = 1e-5, normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False, **linear: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, **linear)
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.layer_norm_weight = parameter(in_features)
        self.layer_norm_bias = parameter(in_features) if normalization == "LayerNorm" else None

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        norm = self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered_gamma
        return super().forward(normalized(x, *norm))


class GroupedLinear(Module):
    """One linear layer for each expert. Megatron moves the tokens between ranks itself."""

    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, bias: bool = True, return_bias: bool = False,
        parallel_mode: str | None = None, tp_size: int = 1, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert tp_size == 1 or parallel_mode is None, "Megatron divides the sizes itself"
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        for i in range(num_gemms):
            self.register_parameter(f"weight{i}", parameter(out_features, in_features))
            if bias:
                self.register_parameter(f"bias{i}", parameter(out_features))

    def forward(self, x: Tensor, m_splits: Sequence[int], is_first_microbatch: bool | None = None) -> Any:
        rows = torch.split(x, [int(count) for count in m_splits])
        biases = [getattr(self, f"bias{i}", None) for i in range(self.num_gemms)]
        inner = [None] * self.num_gemms if self.return_bias else biases
        y = torch.cat([F.linear(part, getattr(self, f"weight{i}"), inner[i]) for i, part in enumerate(rows)])
        return (y, biases) if self.return_bias else y


class RMSNorm(Module):
    def __init__(self, hidden_size: int, eps: float = 1e-5, zero_centered_gamma: bool = False, **_: Any) -> None:
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight, self.bias = parameter(hidden_size), None

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x, self.weight, self.bias, self.eps, self.zero_centered_gamma)


class LayerNorm(RMSNorm):
    def __init__(self, hidden_size: int, **norm: Any) -> None:
        super().__init__(hidden_size, **norm)
        self.bias = parameter(hidden_size)


def extra_state_may_lack(module: nn.Module, keys: Any) -> None:
    """As in the engine: older checkpoints, and every torch_dist one, have no extra state of the attention's core."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith("core_attention._extra_state")]


class DotProductAttention(Module):
    """Softmax attention, with a window or a learned offset in the softmax where asked for; it makes its own mask."""

    def __init__(
        self, num_attention_heads: int, kv_channels: int | tuple[int, int], softmax_scale: float | None = None,
        window_size: tuple[int, int] | None = None, softmax_type: str = "vanilla", tp_size: int = 1, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        channels = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.softmax_scale = softmax_scale or channels**-0.5
        self.window_size = window_size
        self.softmax_offset = parameter(num_attention_heads // tp_size) if softmax_type == "learnable" else None
        self.register_load_state_dict_post_hook(extra_state_may_lack)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None, attn_mask_type: str = "causal",
        core_attention_bias: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
        scores = torch.einsum("ibhd,jbhd->bhij", q, k) * self.softmax_scale
        if core_attention_bias is not None:
            scores = scores + core_attention_bias
        if attn_mask_type == "causal":
            distance = torch.arange(q.shape[0])[:, None] - torch.arange(k.shape[0])
            hidden = distance < 0
            if self.window_size is not None and self.window_size[0] >= 0:
                hidden = hidden | (distance > self.window_size[0])
            scores = scores.masked_fill(hidden, float("-inf"))
        elif attention_mask is not None and "padding" in attn_mask_type:
            scores = scores.masked_fill(attention_mask, float("-inf"))
        if self.softmax_offset is not None:
            offset = self.softmax_offset.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
            weights = torch.cat([scores, offset], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return torch.einsum("bhij,jbhd->ibhd", weights, v).reshape(*q.shape[:2], -1)


def module(name: str, **contents: Any) -> types.ModuleType:
    """Puts a module of that name, made of `contents`, where imports find it."""
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    made.__path__ = []
    made.__dict__.update(contents)
    sys.modules[name] = made
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, made)
    return made


def placeholder(*names: str) -> dict[str, type]:
    """Classes that are only named: in annotations, as bases and in isinstance."""
    return {name: type(name, (), {}) for name in names}


def install() -> None:
    """Before Megatron is imported."""
    contexts = dict.fromkeys(("fp8_autocast", "fp8_model_init"), contextlib.nullcontext)
    modules = (Linear, LayerNormLinear, GroupedLinear, LayerNorm, RMSNorm, DotProductAttention)
    manager = types.SimpleNamespace(is_fp8_enabled=lambda: False, reset=lambda: None)
    recipes = ("DelayedScaling", "Format", "Recipe", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    training = ("checkpoint", "activation_recompute_forward", "is_fp8_activation_recompute_enabled")
    routing = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
    module("transformer_engine", __version__=VERSION)
    module("transformer_engine.common")
    module("transformer_engine.common.recipe", **placeholder(*recipes))
    module("transformer_engine.pytorch", **{m.__name__: m for m in modules}, **contexts)
    module("transformer_engine.pytorch.fp8", FP8GlobalStateManager=manager, **contexts)
    module("transformer_engine.pytorch.distributed", **placeholder("CudaRNGStatesTracker"), **dict.fromkeys(training))
    module("transformer_engine.pytorch.ops", **placeholder("Sequential", "FusibleOperation"))
    module("transformer_engine.pytorch.tensor", **placeholder("QuantizedTensor"))
    module("transformer_engine.pytorch.float8_tensor", **placeholder("Float8Tensor"))
    module("transformer_engine.pytorch.tensor.float8_tensor", **placeholder("Float8Tensor"))
    module("transformer_engine.pytorch.router", **dict.fromkeys(routing))

"""Stand-ins, in torch, for the packages with GPU kernels that Megatron's linear-attention layers import: `mamba_ssm`
for Mamba 2, `fla` for the gated delta net, and Megatron's own module that `triton` compiles, for inference.
"""

import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.megatron_cpu.engine import module

COMPILED = "megatron.core.inference.contexts.attention_context.triton"


class GatedRMSNorm(nn.Module):
    """Of `x` times silu of the gate, in groups of `group_size` channels."""

    def __init__(
        self, hidden_size: int, eps: float, group_size: int, norm_before_gate: bool, device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert not norm_before_gate
        self.eps, self.group_size = eps, group_size
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        groups = (x * F.silu(z)).unflatten(-1, (-1, self.group_size))
        normal = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)
        return normal.flatten(-2) * self.weight


def scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk_size: int, D: Tensor, dt_bias: Tensor, **_: Any
) -> Tensor:
    """Mamba 2's recurrence, step by step: x is [batch, time, head, dim], b and c [batch, time, group, state]."""
    dt = F.softplus(dt + dt_bias)
    b, c = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (b, c))
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], b.shape[3])
    steps = []
    for t in range(x.shape[1]):
        grown = torch.einsum("bhp,bhn->bhpn", dt[:, t, :, None] * x[:, t], b[:, t])
        state = state * torch.exp(dt[:, t] * a)[..., None, None] + grown
        steps.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]) + D[:, None] * x[:, t])
    return torch.stack(steps, 1)


def l2norm(x: Tensor, dim: int = -1, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dim, keepdim=True) + eps)


def install() -> None:
    """Before Megatron is imported. Megatron's own torch code computes the gated delta rule in deterministic mode."""
    scans = {"mamba_chunk_scan_combined": scan, "mamba_split_conv1d_scan_combined": None}
    module("mamba_ssm", __version__="2.2.4")
    module("mamba_ssm.ops")
    module("mamba_ssm.ops.triton")
    module("mamba_ssm.ops.triton.layernorm_gated", RMSNorm=GatedRMSNorm)
    module("mamba_ssm.ops.triton.ssd_combined", **scans)
    module("fla")
    module("fla.modules")
    module("fla.modules.l2norm", l2norm=l2norm)
    module("fla.ops")
    module("fla.ops.gated_delta_rule", chunk_gated_delta_rule=None)
    sys.modules[f"{COMPILED}.tensor_ops"] = types.ModuleType("tensor_ops")
    vars(sys.modules[f"{COMPILED}.tensor_ops"]).update(
        dict.fromkeys(("tensor_get_slice_after", "tensor_masked_update", "tensor_merge"))
    )

"""What the facts of a model say, transformers computes: its norms, its rotation, its MLPs and the way between them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from registry.source import load
from tests.families import FAMILIES, build
from tests.families import load as load_directory

IDS = torch.arange(24).reshape(2, 12)
#: Those that transformers has a class for, and whose files have the names of its modules.
MODELS = [name for name, family in FAMILIES.items() if family.model_class and not family.hub]
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "relu": F.relu, "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(), "gated-gelu": partial(F.gelu, approximate="tanh"),
}  # fmt: skip


@dataclass(eq=False)
class Computed:
    """A model of transformers, and where in its memory the spec says that each logical tensor is."""

    name: str
    model: Any
    facts: dict[str, Any]
    #: (tensor, layer) -> the name of what holds it, its axes there, and it itself, for what memory holds as files do.
    places: dict[tuple[str, int | None], tuple[str, tuple[str, ...], torch.Tensor]] = field(default_factory=dict)
    #: The same of all that the files hold, by the index of an expert too.
    stored: dict[tuple[str, int | None, int | None], tuple[str, tuple[str, ...], torch.Tensor]] = field(
        default_factory=dict
    )

    @classmethod
    def of(cls, name: str, folder: Path) -> Computed:
        import transformers

        model = getattr(transformers, str(FAMILIES[name].model_class)).from_pretrained(folder).eval()
        source, memory = load(folder), dict(model.named_parameters())
        files, _ = load_directory(folder)
        below = {name.partition(".")[2]: name for name in memory}  # some are renamed, but for the first word
        made = cls(name, model, source.model.facts)
        for group in source.bound.groups:
            for k, member in enumerate(group.members):
                stored = source.opened.pieces[int(member)].name
                held = stored if stored in memory else below.get(stored.partition(".")[2])
                at = {axis: int(column[k]) for axis, column in group.index.items()}
                layer, expert = at.get("layer", at.get("decoder_layer")), at.get("expert")
                for f in group.fragments:
                    value = torch.as_strided(files[stored], f.size, f.stride, f.offset)
                    made.stored[f.tensor, layer, expert] = (stored, f.axes, value)
                    if held is not None and expert is None:
                        view = torch.as_strided(memory[held].data, f.size, f.stride, f.offset)
                        made.places[f.tensor, layer] = (held, f.axes, view)
        return made

    def matrix(self, tensor: str, layer: int, expert: int | None = None) -> torch.Tensor | None:
        """A weight or a bias of an MLP, the other axis first; None where there is none."""
        found = self.stored.get((tensor, layer, expert)) or self.stored.get((tensor, layer, None))
        if found is None:
            return None
        _, axes, value = found
        if expert is not None and "expert" in axes:
            value, axes = value.select(axes.index("expert"), expert), tuple(axis for axis in axes if axis != "expert")
        return value.movedim(axes.index("hidden"), -1) if tensor.endswith("weight") else value

    def owner(self, tensor: str, layer: int | None = None) -> Any:
        """The module that has a tensor as its weight."""
        return self.model.get_submodule(self.places[tensor, layer][0].removesuffix(".weight").removesuffix(".bias"))

    def layers(self, tensor: str) -> list[int]:
        """The layers that have a tensor."""
        return [layer for found, layer in self.places if found == tensor and layer is not None]

    def outputs(self) -> torch.Tensor:
        ids = {"input_ids": IDS} | ({"decoder_input_ids": IDS + 3} if self.model.config.is_encoder_decoder else {})
        with torch.no_grad():
            found: torch.Tensor = self.model(**ids)[0]
        return found

    def seen(self, module: Any) -> tuple[torch.Tensor, Any]:
        """What goes into a module, and what comes out of it."""
        kept: list[Any] = []

        def keep(_: Any, given: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
            kept.append(((*given, *named.values())[0].clone(), (made[0] if isinstance(made, tuple) else made).clone()))

        hook = module.register_forward_hook(keep, with_kwargs=True)
        self.outputs()
        hook.remove()
        found: tuple[torch.Tensor, Any] = kept[0]
        return found


def close(found: torch.Tensor, expected: torch.Tensor, within: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= within * expected.abs().max())


# --- Norms ------------------------------------------------------------------------------------------------------------

#: Norms of the whole hidden state; those within attention may be over something else.
NORMS = ["embedding_norm", "attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm", "final_norm",
         "mixer_norm", "ssm.norm_in", "mamba.norm_in"]  # fmt: skip
FIRST = ["attention_norm", "mixer_norm", "ssm.norm_in", "mamba.norm_in"]
SUB_NORMS = ["mla.q_down_norm", "mla.kv_norm"]


def norms(computed: Computed) -> None:
    """Every norm is of the kind, and has the epsilon and the centre, that the facts say."""
    facts, asked = computed.facts, 0
    for (tensor, layer), (_, _, weight) in computed.places.items():
        norm = tensor.removesuffix(".weight").removeprefix("encoder.").removeprefix("decoder.")
        if norm not in [*NORMS, *SUB_NORMS, "cross_attention_norm"] or not tensor.endswith(".weight"):
            continue
        epsilon = facts["sub_norm_epsilon" if norm in SUB_NORMS else "norm_epsilon"]
        x = torch.randn(3, weight.numel(), generator=torch.Generator().manual_seed(7)) * 1e-3 + 1e-3
        scale = weight.reshape(-1) + (1 if facts.get("zero_centered_norm") else 0)
        bias = computed.places.get((tensor.replace(".weight", ".bias"), layer))
        if facts["norm"] == "rms":
            expected = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * scale
        else:
            expected = F.layer_norm(x, x.shape[-1:], scale, bias[2].reshape(-1) if bias else None, epsilon)
        with torch.no_grad():
            assert close(computed.owner(tensor, layer)(x), expected), tensor
        asked += 1
    assert asked, "no norm was found"


# --- Rotation ---------------------------------------------------------------------------------------------------------


def turn(size: int, generator: torch.Generator) -> torch.Tensor:
    """Some rotation of that many dimensions."""
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]


def in_planes(size: int, interleaved: bool, generator: torch.Generator) -> torch.Tensor:
    """A rotation in each plane in which rotary embeddings rotate: it changes nothing of what they do."""
    half, found = size // 2, torch.zeros(size, size)
    for i, angle in enumerate(torch.rand(half, generator=generator) * 3):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s = math.cos(angle), math.sin(angle)
        found[a, a], found[a, b], found[b, a], found[b, b] = c, -s, s, c
    return found


def rotates(facts: dict[str, Any], layer: int) -> bool:
    """Do the facts say that queries and keys of a layer are rotated?"""
    types, some = facts.get("layer_types"), facts.get("rope_layers")
    bare = facts.get("no_rope_in") is not None and types and types[layer] == facts["no_rope_in"]
    return facts["position"] == "rope" and not bare and (some is None or bool(some[layer]))


#: Queries and keys; those of latent attention end with what rotates.
ROTATED = ("attention.q.", "attention.k.", "mla.q.", "mla.q_up.", "mla.kv_down.")


def rotated(computed: Computed, how: Callable[[int], torch.Tensor | None]) -> torch.Tensor:
    """What the model computes with queries and keys of each layer turned by a matrix over the head's dimensions."""
    changed = []
    for (tensor, layer), (_, axes, view) in computed.places.items():
        if tensor.startswith(ROTATED) and (matrix := how(layer or 0)) is not None:
            changed.append((view, view.clone()))
            along = next(axes.index(axis) for axis in ("head_dim", "q_head_dim", "kv_down") if axis in axes)
            part = view.narrow(along, view.shape[along] - len(matrix), len(matrix))
            part.copy_(torch.tensordot(part, matrix, ([along], [1])).movedim(-1, along))
    found = computed.outputs()
    for view, before in changed:
        view.copy_(before)
    return found


def rotation(computed: Computed) -> None:
    """Queries and keys are rotated with the position in the planes, as far and in the layers that the facts say."""
    facts, generator = computed.facts, torch.Generator().manual_seed(3)
    size = facts["head_dim"] if "head_dim" in facts else facts["qk_rope_dim"]
    layers = [*computed.layers("attention.q.weight"), *computed.layers("mla.kv_down.weight")]
    for (tensor, _), (_, _, weight) in computed.places.items():
        if tensor.startswith(("attention.q_", "attention.k_")):  # norms that turn nothing
            weight.fill_(0 if facts.get("zero_centered_norm") else 1)
        if tensor.startswith(ROTATED):
            weight.mul_(3)  # so that attention is far from even
    count = int(size * (facts.get("rotary_percent") or 1.0))

    def allowed(layer: int) -> torch.Tensor:
        if not rotates(facts, layer):
            return turn(size, generator)
        planes = in_planes(count, bool(facts.get("rope_interleaved")), generator)
        return torch.block_diag(planes, turn(size - count, generator)) if count < size else planes

    expected = computed.outputs()
    matrices = {layer: allowed(layer) for layer in layers}
    assert close(rotated(computed, matrices.get), expected, 1e-4), "rotated otherwise"
    whole = torch.block_diag(turn(count, generator), torch.eye(size - count))
    for layer in (layer for layer in layers if rotates(facts, layer)):
        assert not close(rotated(computed, {layer: whole}.get), expected, 1e-3), f"layer {layer} is not rotated"


# --- MLPs -------------------------------------------------------------------------------------------------------------


def parallel(computed: Computed) -> None:
    """The MLP does not see what the attention beside it computes where the facts say so, and only there."""
    both = [(first, layer) for first, layer in computed.places if first in ("mlp.router.weight", "mlp.up.weight")]
    both = [(first, layer) for first, layer in both if ("attention.output.weight", layer) in computed.places]
    if not both:
        return
    first, layer = both[0]
    before, _ = computed.seen(computed.owner(first, layer))
    view = computed.places["attention.output.weight", layer][2]
    kept = view.clone()
    view.copy_(view.flip(0))
    after, _ = computed.seen(computed.owner(first, layer))
    view.copy_(kept)
    assert close(after, before) == bool(computed.facts.get("parallel_residual"))


def activation(facts: dict[str, Any], up: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """What the facts say of what goes from the first matrices of an MLP to the last."""
    clamp, scales = facts.get("activation_clamp"), facts.get("mlp_multipliers") or [1.0]
    if gate is not None and clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    alpha = facts.get("activation_alpha")
    act = ACTIVATIONS[facts["activation"]] if alpha is None else lambda x: x * torch.sigmoid(alpha * x)
    return act(up) if gate is None else act(gate * scales[0]) * (up + facts.get("linear_offset", 0))


def mlp(computed: Computed, kind: str, layer: int, x: torch.Tensor, expert: int | None = None) -> torch.Tensor:
    """What one MLP of a layer makes of rows of x."""

    def linear(part: str, x: torch.Tensor) -> torch.Tensor | None:
        weight = computed.matrix(f"{kind}.{part}.weight", layer, expert)
        if weight is None:
            return None
        weight = weight.T if part == "down" else weight
        return F.linear(x, weight, computed.matrix(f"{kind}.{part}.bias", layer, expert))

    up = linear("up", x)
    assert up is not None
    found = linear("down", activation(computed.facts, up, linear("gate", x)))
    assert found is not None
    return found


def activated(computed: Computed) -> None:
    """Between its matrices an MLP has the activation that the facts say."""
    for kind in ("mlp", "encoder.mlp", "decoder.mlp"):
        for layer in computed.layers(f"{kind}.down.weight"):
            x, _ = computed.seen(computed.owner(f"{kind}.up.weight", layer))
            _, found = computed.seen(computed.owner(f"{kind}.down.weight", layer))
            expected = mlp(computed, kind, layer, x.reshape(-1, x.shape[-1]))
            assert close(found.reshape(expected.shape), expected), layer


def chosen(facts: dict[str, Any], scores: torch.Tensor, correction: torch.Tensor | None) -> torch.Tensor:
    """Which experts the facts say that each row goes to."""
    rank = scores if correction is None else scores + correction.reshape(-1)
    groups = facts.get("expert_groups") or 1
    if groups > 1:
        grouped = rank.reshape(len(rank), groups, -1)
        best = grouped.amax(-1) if facts.get("group_score") == "max" else grouped.topk(2, dim=-1)[0].sum(-1)
        kept = torch.zeros_like(best).scatter(1, best.topk(facts["groups_per_token"])[1], 1.0)
        rank = grouped.masked_fill(kept.unsqueeze(-1) == 0, -math.inf).reshape(rank.shape)
    return rank.topk(facts["experts_per_token"])[1]


#: DeepSeek V2's own code normalises where its config says so; transformers takes no notice.
UNNORMALIZED = {"deepseek_v2_grouped"}


def routed(computed: Computed) -> None:
    """Experts are chosen and weighed as the facts say, and those for all tokens are added."""
    facts = computed.facts
    for layer in [layer for tensor, layer, _ in computed.stored if tensor == "mlp.router.weight"]:
        assert layer is not None
        name = re.match(r"\w+(\.layers\.\d+)\.(\w+)", computed.stored["mlp.router.weight", layer, None][0])
        assert name
        at = computed.model.get_submodule(f"model{name[1]}")
        x, found = computed.seen(getattr(at, name[2] if hasattr(at, name[2]) else "mlp"))  # some are renamed
        x = x.reshape(-1, x.shape[-1])
        router, bias = computed.matrix("mlp.router.weight", layer), computed.matrix("mlp.router.bias", layer)
        assert router is not None
        logits = F.linear(x, router, bias)
        scores = logits.softmax(-1) if facts["router_score"] == "softmax" else logits.sigmoid()
        top = chosen(facts, scores, computed.matrix("mlp.router.correction", layer))
        weights = scores.gather(1, top)
        if facts.get("router_normalized") and computed.name not in UNNORMALIZED:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * (facts.get("router_scale") or 1.0)
        expected = torch.zeros_like(x)
        for row, (experts, own) in enumerate(zip(top.tolist(), weights, strict=True)):
            for expert, weight in zip(experts, own, strict=True):
                before, after = (weight, 1.0) if facts.get("router_scales_input") else (1.0, weight)
                expected[row] += mlp(computed, "mlp.experts", layer, x[row] * before, expert) * after
        if ("mlp.shared.up.weight", layer, None) in computed.stored:
            gate = computed.matrix("mlp.shared_gate.weight", layer)
            weight = 1.0 if gate is None else F.linear(x, gate.reshape(1, -1)).sigmoid()
            expected += mlp(computed, "mlp.shared", layer, x) * weight
        assert close(found.reshape(expected.shape), expected), layer


def multiplied(computed: Computed) -> None:
    """What goes into the first layer are the rows of the embedding, times what the facts say."""
    facts = computed.facts
    said = facts.get("embedding_multiplier") or 1.0
    multiplier = math.sqrt(facts["hidden_size"]) if said == "sqrt(hidden_size)" else said
    norm = next(n for n in FIRST if (f"{n}.weight", 0) in computed.places)
    found, _ = computed.seen(computed.owner(f"{norm}.weight", 0))
    embedded = computed.places["embedding.weight", None][2][IDS]
    assert close(found, embedded * multiplier)


def check(name: str, folder: Path) -> None:
    """Ask a model all that can be asked of it."""
    computed = Computed.of(name, folder)
    there = {tensor for tensor, _, _ in computed.stored}
    norms(computed)
    parallel(computed)
    activated(computed)
    if "mlp.router.weight" in there and computed.facts["router_score"] in ("softmax", "sigmoid"):
        routed(computed)
    plain = not there & {"position_embedding.weight", "embedding_norm.weight"}
    if plain and any(f"{norm}.weight" in there for norm in FIRST):
        multiplied(computed)
    turned = computed.facts["norm"] == "rms" or not computed.facts.get("qk_norm")  # by no mean that is taken away
    if turned and there & {"attention.q.weight", "mla.kv_down.weight"}:
        rotation(computed)


@pytest.mark.parametrize("name", MODELS)
def test_facts_say_what_is_computed(name: str, tmp_path: Path) -> None:
    check(name, build(name, "float32", tmp_path / "hf"))

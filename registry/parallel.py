"""A parallel layout, and which layers each pipeline stage holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from attrs import field, frozen

from registry.errors import ArgumentError, ParallelError

#: The parallel dimensions that a spec may name after `@`.
DIMENSIONS = ("tp", "pp", "vpp", "ep", "etp", "cp", "dp")


class Stage(NamedTuple):
    """One pipeline stage (one model chunk of one pipeline rank) and the layers that it holds."""

    pp: int
    vpp: int
    first: int
    count: int  # type: ignore[assignment]  # tuple.count is not needed here


def _sizes(pp: int | Sequence[int]) -> tuple[int, ...] | None:
    return tuple(pp) if isinstance(pp, Sequence) and not isinstance(pp, str | bytes) else None


@cache
def _expert_ranks(tp: int, ep: int, etp: int) -> dict[tuple[int, int], int]:
    """(tp, ep) -> etp of every rank that holds weights of its own, in order."""
    found: dict[tuple[int, int], int] = {}
    for rank in range(math.lcm(tp, etp * ep)):
        key = (rank % tp, rank // etp % ep)
        if found.setdefault(key, rank % etp) != rank % etp:
            raise ParallelError(
                "two ranks would write the same file", expected="etp that divides tp",
                found=f"tp {tp}, ep {ep}, etp {etp}", hint="choose another etp, or a format with global tensors",
            )  # fmt: skip
    return dict(sorted(found.items()))


@frozen(init=False)
class Parallel:
    """Sizes of the parallel dimensions.

    `pp` is a number of stages, or a list of layer counts, one a stage, for uneven stages; with `vpp` > 1 the list has
    one count for each of `pp * vpp` model chunks in the order of the layers. `etp` defaults to `tp`.
    With `nested`, experts are shared out within the ranks of `tp` (ep x etp = tp, ep fastest), as TensorRT-LLM counts
    them (tensorrt_llm/mapping.py), and not over further ranks. Raises ArgumentError, and ParallelError for sizes of
    which nesting makes nothing.
    """

    tp: int
    pp: int
    vpp: int
    ep: int
    etp: int | None
    cp: int
    dp: int
    layers: tuple[int, ...] | None = field(default=None)
    nested: bool = field(default=False)

    def __init__(
        self,
        tp: int = 1,
        pp: int | Sequence[int] = 1,
        vpp: int = 1,
        ep: int = 1,
        etp: int | None = None,
        cp: int = 1,
        dp: int = 1,
        *,
        nested: bool = False,
    ) -> None:
        layers = _sizes(pp)
        problems = [
            f"{name} must be a whole number of at least 1, found {size!r}"
            for name, size in {"tp": tp, "vpp": vpp, "ep": ep, "etp": etp, "cp": cp, "dp": dp}.items()
            if not (name == "etp" and size is None) and (type(size) is not int or size < 1)
        ]
        if layers is None and (type(pp) is not int or pp < 1):
            problems.append(f"pp must be a whole number of at least 1 or a list of layer counts, found {pp!r}")
        if layers is not None and (not layers or any(type(n) is not int or n < 0 for n in layers)):
            problems.append(f"pp as a list needs layer counts of at least 0, found {list(layers)!r}")
        if layers is not None and not problems and len(layers) % vpp:
            problems.append(f"pp lists {len(layers)} model chunks, which vpp={vpp} does not divide")
        if problems:
            raise ArgumentError("bad parallel layout", details=problems)
        if nested and (tp % ep or (etp or tp // ep) * ep != tp):
            raise ParallelError(
                "experts are shared out within the ranks of tp", expected="ep x etp = tp",
                found=f"ep {ep} x etp {etp or tp // ep} with tp {tp}",
                hint=f"choose ep {' or '.join(str(n) for n in range(1, tp + 1) if tp % n == 0)}, and leave etp out",
            )  # fmt: skip
        if nested and ep > 1 and cp > 1:
            raise ParallelError("experts cannot be shared out together with contexts", found=f"ep {ep} and cp {cp}",
                                hint="choose ep 1 or cp 1")  # fmt: skip
        stages = pp if isinstance(pp, int) else len(layers or ()) // vpp
        self.__attrs_init__(tp, stages, vpp, ep, etp, cp, dp, layers, nested)

    def size(self, dimension: str) -> int:
        """How many ranks there are along `dimension`."""
        if dimension == "etp":
            return self.etp or (self.tp // self.ep if self.nested else self.tp)
        return int(getattr(self, dimension))

    def with_size(self, dimension: str, size: int) -> Parallel:
        """This layout with another size along `dimension`. Raises as the constructor does."""
        sizes: dict[str, int | None] = {d: self.size(d) for d in ("tp", "vpp", "ep", "cp", "dp")}
        sizes |= {"etp": None if self.nested else self.etp, dimension: size}
        return Parallel(pp=self.layers or self.pp, nested=self.nested, **sizes)  # type: ignore[arg-type]  # etp alone may be None

    def env(self) -> dict[str, int]:
        """The sizes as names for expressions."""
        return {dimension: self.size(dimension) for dimension in DIMENSIONS}

    def tensor_ranks(self) -> list[dict[str, int]]:
        """The index along `tp` of every tensor-parallel rank."""
        return [{"tp": i} for i in range(self.tp)]

    def expert_ranks(self) -> list[dict[str, int]]:
        """The indices along `tp`, `ep` and `etp` of the ranks of one pipeline stage that hold different weights.

        Dense layers count ranks as tp x dp, experts as etp x ep x dp, over the same ranks in the same order
        (megatron/core/parallel_state.py, RankGenerator). Raises ParallelError where more than one of them would write
        the file of one (tp, ep), as Megatron's per-rank files are named.
        """
        if self.nested:
            return [{"tp": i, "ep": i % self.ep, "etp": i // self.ep} for i in range(self.tp)]
        return [
            {"tp": tp, "ep": ep, "etp": i} for (tp, ep), i in _expert_ranks(self.tp, self.ep, self.size("etp")).items()
        ]

    def index(self, dimension: str, tp: int, ep: int) -> int:
        """The index along `tp`, `ep` or `etp` of the rank whose file is that of (tp, ep)."""
        if self.nested:
            return {"tp": tp, "ep": tp % self.ep, "etp": tp // self.ep}[dimension]
        if dimension == "etp":
            return _expert_ranks(self.tp, self.ep, self.size("etp")).get((tp, ep), 0)
        return tp if dimension == "tp" else ep

    def dense_ep(self, tp: int) -> int:
        """The index along `ep` of the first rank with this index along `tp`, which keeps what others would repeat."""
        return tp // self.size("etp") % self.ep

    def stages(self, layers: int) -> list[Stage]:
        """The stages in the order of the layers (chunk 0 of every rank, then chunk 1, ...). Raises ParallelError.

        The order is that of megatron/core/transformer/transformer_layer.py, get_transformer_layer_offset.
        """
        chunks = self.pp * self.vpp
        counts = self.layers
        if counts is None:
            if layers % chunks:
                raise ParallelError(
                    "layers do not divide over pipeline stages",
                    expected=f"a multiple of pp x vpp = {chunks}",
                    found=f"{layers} layers",
                    hint="give pp as a list of layer counts, such as --pp "
                    + ",".join(str(layers // chunks + (i < layers % chunks)) for i in range(chunks))
                    if layers >= chunks
                    else f"choose at most {layers} stages",
                )
            counts = (layers // chunks,) * chunks
        if sum(counts) != layers:
            raise ParallelError("stages do not add up", expected=f"{layers} layers", found=f"{list(counts)}")
        firsts = [sum(counts[:i]) for i in range(chunks)]
        return [Stage(i % self.pp, i // self.pp, firsts[i], counts[i]) for i in range(chunks)]

    def __str__(self) -> str:
        parts = [f"{name}{self.size(name)}" for name in DIMENSIONS if name != "etp" and self.size(name) > 1]
        if self.etp not in (None, self.tp) and not self.nested:
            parts.append(f"etp{self.etp}")
        if self.layers:
            parts.append("layers " + "+".join(map(str, self.layers)))
        return " ".join(parts) or "one rank"

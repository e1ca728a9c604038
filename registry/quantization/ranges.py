"""What a calibration measured of a model: read from a safetensors file, and handed to the weights that it is about.

A calibration names HuggingFace's modules. The architecture spec says which logical tensors these hold, so the ranges
serve a checkpoint in any format.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import evolve, frozen

from registry import catalog
from registry.bind import Bound, bind_source
from registry.computed import Computed, Ints
from registry.dtypes import torch_dtype
from registry.errors import CheckpointError
from registry.files import SourceFiles
from registry.groups import Group, spellings, template_of
from registry.model import LogicalModel
from registry.problems import collapse
from registry.quantization.declared import Range
from registry.quantization.trained import kept_states, module_pattern
from registry.source import Source
from registry.specs import FormatSpec, Spec
from registry.storage import Opened, Piece, slot_bytes
from registry.tensor_rules import named_axes

if TYPE_CHECKING:
    import torch

_HINT = "calibrate this very model again; docs/quantization.md lists the names that are looked for"


class Calibration:
    """A safetensors file of ranges. Its header is read at once, and a range when it is asked for."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise OSError("no plain file")
            opened: Any = safe_open  # untyped
            self._file = opened(str(path), "pt")
            self.names = frozenset(self._file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                "the calibration cannot be read", where=path, expected="a safetensors file", found=error, hint=_HINT
            ) from None

    def tensor(self, name: str) -> torch.Tensor:
        """One entry."""
        found: torch.Tensor = self._file.get_tensor(name)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an entry."""
        return tuple(self._file.get_slice(name).get_shape())

    def rows(self, name: str, rows: Ints) -> torch.Tensor:
        """Rows of an entry, which rise."""
        first, last = int(rows[0]), int(rows[-1])
        found: torch.Tensor = self._file.get_slice(name)[first : last + 1]
        return found if last - first + 1 == len(rows) else found[rows - first]


class Modules:
    """The modules that hold each logical tensor, under every name that a spec knows."""

    def __init__(self, model: LogicalModel, spec: Spec) -> None:
        self._model = model
        self._found: dict[str, list[tuple[str, list[tuple[str, str | None]]]]] = {}
        for pattern, rule in spec.rules():
            for spelling in spellings(spec, pattern, rule, model) if not rule.replica else ():
                axes = [(n.axis, n.plus) for n in named_axes(spelling.pattern)]
                if not all(axis in model.sizes for axis, _ in axes):
                    continue
                template = template_of(module_pattern(spelling.pattern))
                for tensor in rule.parsed.tensors:
                    self._found.setdefault(model.home(tensor), []).append((template, axes))

    def named(self, tensor: str, index: Mapping[str, int]) -> Iterator[str]:
        """The modules that may hold a tensor at an index."""
        for template, axes in self._found.get(self._model.home(tensor), ()):
            if all(axis in index for axis, _ in axes):
                yield template % tuple(index[a] + (self._model.facts[plus] if plus else 0) for a, plus in axes)

    def all(self) -> set[str]:
        """Every module of the model."""
        sizes = self._model.sizes
        return {
            template
            % tuple(i + (self._model.facts[plus] if plus else 0) for i, (_, plus) in zip(at, axes, strict=True))
            for found in self._found.values()
            for template, axes in found
            for at in itertools.product(*(range(sizes[axis]) for axis, _ in axes))
        }


@frozen
class Part:
    """A stretch of a matrix's rows that is one logical tensor, and the modules that may be it: HuggingFace's, and those
    of the source itself."""

    row: int
    count: int
    modules: tuple[str, ...]
    own: tuple[str, ...]


def parts_of(group: Group, position: int, shape: Sequence[int], modules: Modules, own: Modules) -> list[Part]:
    """The parts of one weight of the unquantised target, by rows."""
    width, height = shape[-1], shape[-2]
    found = []
    for f in group.fragments:
        index = {axis: int(column[position]) for axis, column in group.index.items()}
        outer = [k for k, stride in enumerate(f.stride) if stride >= height * width and len(shape) > 2]
        rows = [k for k, stride in enumerate(f.stride) if k not in outer and stride >= width and f.size[k] > 1]
        count = int(np.prod([f.size[k] for k in rows], dtype=np.int64))
        for at in itertools.product(*(range(f.size[k]) for k in outer)):
            there = index | {f.axes[k]: f.lo[k] + i for k, i in zip(outer, at, strict=True)}
            row = (f.offset + sum(i * f.stride[k] for k, i in zip(outer, at, strict=True))) // width
            names = (tuple(dict.fromkeys(m.named(f.tensor, there))) for m in (modules, own))
            found.append(Part(row, count, *names))
    return sorted(found, key=lambda part: part.row)


class Finder:
    """Finds the ranges of weights in a calibration; what is missing or wrong is collected."""

    def __init__(self, calibration: Calibration | None, declared: Mapping[str, Range], source: Source) -> None:
        self.calibration, self.declared, self._source = calibration, declared, source
        self.problems: list[str] = []

    @cached_property
    def _states(self) -> dict[str, dict[str, list[float]]]:
        """What modules of the source keep beside their weights, by the modules' names in the whole model."""
        return {} if self.calibration is not None else kept_states(self._source)

    def find(self, used: Iterable[str], parts: Sequence[Part], width: int) -> dict[str, list[torch.Tensor]]:
        """The ranges of one weight, by name and part."""
        found: dict[str, list[torch.Tensor]] = {}
        for name in used:
            declared = self.declared[name]
            if declared.state is not None:
                kept = [self._state(declared.state, part) for part in parts]
                if None not in kept:
                    found[name] = [value for value in kept if value is not None]
                continue
            keys = [self._key(declared, part) for part in parts]
            if None in keys and (declared.optional or declared.shape == "matrix"):
                continue
            if None in keys:
                asked = " or ".join(_named(declared, parts[keys.index(None)].modules[0]))
                self.problems.append(f"{asked}: not there")
                continue
            values = [self._value(declared, str(keys[k]), k, parts, keys, width) for k in range(len(parts))]
            if None not in [value if value is None else 0 for value in values]:
                found[name] = [value for value in values if value is not None]
        return found

    def _state(self, state: str, part: Part) -> torch.Tensor | None:
        """A number of a module's own state, if it has one."""
        import torch

        key, _, index = state.rstrip("]").partition("[")
        held = next((self._states[name] for name in part.own if name in self._states), {})
        values = held.get(key, [])
        if int(index) >= len(values):
            return None
        value = values[int(index)]
        if not 0 < value < float("inf"):
            self.problems.append(f"{part.own[0]}: expected a positive number as {state}, found {value}")
        return torch.tensor(value)

    def need(self, lists: Sequence[Sequence[str]], found: Mapping[str, Any], parts: Sequence[Part]) -> None:
        """One of several lists of ranges must be there as a whole."""
        if lists and not any(all(name in found for name in names) for names in lists):
            first = [[n for r in names for n in _named(self.declared[r], parts[0].modules[0])] for names in lists]
            self.problems.append(" or ".join(" and ".join(names) for names in first if names) + ": not there")

    def _key(self, declared: Range, part: Part) -> str | None:
        names = self.calibration.names if self.calibration is not None else frozenset()
        held = self._source.opened.state.get("ranges", {})
        wanted = [n for module in part.modules for n in _named(declared, module)]
        return next((n for n in wanted if n in names or n in held), None)

    def _tensor(self, key: str) -> torch.Tensor:
        """An entry of the calibration, or what the source itself keeps under that name."""
        import torch

        if self.calibration is not None and key in self.calibration.names:
            return self.calibration.tensor(key)
        piece: Piece = self._source.opened.state["ranges"][key]
        buffer = bytearray(slot_bytes(piece))
        with SourceFiles(self._source.opened.files, self._source.opened.stamps) as files:
            files.read_into(piece.file, piece.begin, memoryview(buffer))
        return torch.frombuffer(buffer, dtype=torch_dtype(piece.dtype)).reshape(piece.shape)

    def _value(
        self, declared: Range, key: str, k: int, parts: Sequence[Part], keys: Sequence[str | None], width: int
    ) -> torch.Tensor | None:
        """The range of a part, if it has the size that it should have; another is a problem, or none of these.

        Parts of one module share what came out of it. Which rows are whose is not known here: taken together they are
        all there, which is enough for the largest of them.
        """
        import torch

        if declared.shape == "matrix":
            return torch.zeros(0)  # in the source's place already
        value = self._tensor(key)
        counts = [part.count if other == key else 0 for part, other in zip(parts, keys, strict=True)]
        expected = {"one": 1, "in": width, "out": sum(counts)}[declared.shape]
        if value.numel() != expected:
            if not declared.optional:
                self.problems.append(f"{key}: expected {expected} numbers, found {list(value.shape)}")
            return None
        if declared.shape == "out":
            value = value.reshape(-1)[sum(counts[:k]) : sum(counts[: k + 1])]
        value = value.to(torch.float32)
        if not bool(torch.isfinite(value).all()):
            self.problems.append(f"{key}: infinity or NaN")
        elif declared.positive and not bool((value > 0).all()):
            self.problems.append(f"{key}: expected positive numbers, found {float(value.min()):.6g}")
        return value

    def strangers(self, modules: Modules) -> None:
        """Ranges of modules that the model lacks are problems: they are of another model."""
        if self.calibration is None:
            return
        known = modules.all()
        known |= {module.rpartition(".")[0] for module in known}
        endings = {n.split("}", 1)[1] for declared in self.declared.values() for n in declared.names}
        found = [
            f"{name}: the model has no such module"
            for name in sorted(self.calibration.names)
            for ending in sorted(endings)
            if name.endswith(ending) and name.removesuffix(ending) not in known
        ]
        self.problems += collapse(found, 4)

    def fail(self) -> None:
        """Raise CheckpointError if anything is wrong."""
        if self.problems:
            where = self.calibration.path if self.calibration is not None else "no calibration is given"
            raise CheckpointError(
                "ranges are missing or wrong", where=where, details=collapse(self.problems, 12),
                expected="a positive number, or one for each column, of every weight that is quantised", hint=_HINT,
            )  # fmt: skip


def _named(declared: Range, module: str) -> Iterator[str]:
    for name in declared.names:
        yield name.format(module=module, parent=module.rpartition(".")[0])


# Weights that a calibration has changed.


@frozen(eq=False)
class _Given(Computed):
    """The file that one entry of a calibration would be in by itself."""

    calibration: Calibration
    name: str
    dtype: str
    label = "given"

    @property
    def path(self) -> Path:  # type: ignore[override]  # an attribute there
        """As in `registry.files.Virtual`."""
        return self.calibration.path

    @property
    def width(self) -> int:
        """As in `Computed`."""
        return self.calibration.shape(self.name)[-1]

    def values(self, files: SourceFiles, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """As in `Computed`."""
        return self.calibration.rows(self.name, rows)[:, begin:end].to(torch_dtype(self.dtype))


def with_weights(source: Source, calibration: Calibration, endings: Sequence[str]) -> Source:
    """The source with the calibration's weights in the place of its own. Raises MappingError for other shapes."""
    names = sorted(n for n in calibration.names if n.endswith(tuple(endings)) and len(calibration.shape(n)) == 2)
    if not names:
        return source
    spec = next(s for s in map(catalog.format_spec, catalog.names("format")) if s.rules_from == "architecture")
    dtypes = {name: str(calibration.rows(name, np.zeros(1, np.int64)).dtype).removeprefix("torch.") for name in names}
    files = [_Given(calibration, name, dtypes[name]) for name in names]
    pieces = [Piece(name, dtypes[name], calibration.shape(name), i, 0) for i, name in enumerate(names)]
    bound = _bound(source, spec, Opened(calibration.path, spec.name, files, pieces, {}))
    volumes: dict[str, int] = {}
    for group in bound.groups:
        for f in group.fragments:
            volumes[f.tensor] = volumes.get(f.tensor, 0) + f.volume * len(group.members)
    whole = {t for t, volume in volumes.items() if volume == source.model.volume(source.model.home(t))}
    if partial := sorted(volumes.keys() - whole):
        raise CheckpointError(
            "the calibration holds weights of some layers only", where=calibration.path, details=partial,
            expected="those of every layer, or none", hint=_HINT,
        )  # fmt: skip
    return _replaced(source, bound, files, pieces, whole, dtypes)


def _bound(source: Source, spec: FormatSpec, opened: Opened) -> Bound:
    options = {name: option.default for name, option in spec.options.items()}
    return bind_source(opened, spec, source.architecture.rules(), source.model, options, source.architecture.ignored)


def _replaced(
    source: Source, bound: Bound, files: Sequence[_Given], pieces: Sequence[Piece], whole: set[str],
    dtypes: Mapping[str, str],
) -> Source:  # fmt: skip
    """The source with the tensors `whole` as another binding has them."""
    home = source.model.home
    first, before = len(source.opened.pieces), len(source.opened.files)
    groups = [
        evolve(group, fragments=tuple(f for f in group.fragments if home(f.tensor) not in whole))
        for group in source.bound.groups
    ]
    groups += [evolve(group, members=group.members + first) for group in bound.groups]
    kept = {t: d for t, d in source.dtypes.items() if t not in whole}
    kept |= {home(f.tensor): frozenset({g.dtype}) for g in bound.groups for f in g.fragments}
    opened = evolve(
        source.opened,
        files=[*source.opened.files, *files],
        pieces=[*source.opened.pieces, *(piece._replace(file=piece.file + before) for piece in pieces)],
    )
    return evolve(source, opened=opened, bound=evolve(source.bound, groups=groups), dtypes=kept)

"""Tensors in an encoding, read as plain ones: each becomes one piece in a file that is on no disk.

Reading such a file decodes what is asked for and no more, a few thousand values at a time, from the files that hold the
parts. Nothing downstream of `decode` knows of encodings.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from attrs import frozen

from registry import catalog
from registry.assemble import array, mapped
from registry.dtypes import ITEMSIZE, torch_dtype
from registry.encoding import TENSOR, ConfigEdit, Decoder, Encoding, Ints, Part, Unfit, encoding_codec, rounded
from registry.errors import CheckpointError
from registry.files import SourceFiles
from registry.problems import collapse
from registry.specs import FormatSpec
from registry.storage import Opened, Piece, Rank

if TYPE_CHECKING:
    import torch

#: Values that a codec decodes at a time: what it needs for them stays in the cache.
_STEP = 1 << 17
#: Values that are decoded before they are copied to their places; what does not fit is cut.
_WINDOW = 1 << 20
#: A stretch of a part is read whole where it is no more than so many times what is wanted of it.
_DENSE = 4


# Which stored tensors are parts of an encoded one.


def decode(opened: Opened, spec: FormatSpec, hub: dict[str, Any] | None) -> dict[str, Any] | None:
    """Put a plain piece in the place of every encoded tensor, and give the HuggingFace config of the decoded model.

    Raises CheckpointError for parts that lack others or do not fit them.
    """
    edits = [encoding.config for name, encoding in spec.encodings.items() if _decode(opened, name, encoding, hub)]
    for edit in edits:
        opened.document = _edited(opened.document, edit)
        opened.hub_config = None if opened.hub_config is None else _edited(opened.hub_config, edit)
    if spec.rules_from != "architecture" and hub:
        # These tensors are plain: a config that says how they are encoded was written for the model they come from.
        formats = map(catalog.format_spec, catalog.names("format"))
        edits += [ConfigEdit(remove=e.config.remove) for other in formats for e in other.encodings.values()]
    for edit in edits:
        hub = None if hub is None else _edited(hub, edit)
    return hub


def stored(opened: Opened) -> Iterator[Piece]:
    """The pieces of a checkpoint as they lie on the disk, encoded ones as their parts."""
    for piece in opened.pieces:
        file = opened.files[piece.file]
        yield from file.parts.values() if isinstance(file, Decoded) else (piece,)


def _decode(opened: Opened, name: str, encoding: Encoding, hub: Mapping[str, Any] | None) -> bool:
    """Decode the tensors of one encoding, if there are any."""
    if not any(piece.dtype in encoding.tensor.dtype for piece in opened.pieces):
        return False
    document = hub or opened.document
    found = _found(opened.pieces, encoding)
    whole = {key: held for key, held in found.items() if len(held) == len(encoding.stored)}
    if not whole and all(_get(document, path) is None for path in encoding.config.remove):
        return False
    problems = _incomplete(opened, encoding, {key: held for key, held in found.items() if key not in whole})
    parameters = {
        key: entry.default if (value := _get(document, entry.field)) is None else value
        for key, entry in encoding.parameters.items()
    }
    decoded: dict[int, Decoded] = {}
    for held in whole.values():
        parts = {part: opened.pieces[i] for part, i in held.items()}
        try:
            decoder = _decoder(encoding, parts, parameters)
        except Unfit as error:
            piece = parts.get(error.what, parts[TENSOR])
            what = f"{error.what} of an encoded tensor" if error.what in parts else error.what
            problems.append(_Problem(piece, f"{name}: {what} does not fit", error.expected, error.found))
        else:
            decoded[held[TENSOR]] = Decoded(_path(opened, parts[TENSOR]), encoding.dtype, decoder, parts)
    if problems:
        raise _error(opened, name, problems)
    _replace(opened, decoded, {i for held in whole.values() for i in held.values()})
    opened.notes.append(f"decoded {len(decoded)} tensors from {name} to {encoding.dtype}")
    return bool(decoded)


def _found(pieces: Sequence[Piece], encoding: Encoding) -> dict[tuple[Rank | None, str], dict[str, int]]:
    """(rank, what the names of its parts share) -> the parts that there are of an encoded tensor."""
    found: dict[tuple[Rank | None, str], dict[str, int]] = defaultdict(dict)
    for part, pattern in encoding.stored.items():
        for i, piece in enumerate(pieces):
            # What has another type is not that tensor; a part of another type has the tensor to go by.
            if part != TENSOR or piece.dtype in pattern.dtype:
                stem = pattern.stem(piece.name)
                if stem is not None:
                    found[piece.rank, stem][part] = i
    return found


def _decoder(encoding: Encoding, parts: Mapping[str, Piece], parameters: Mapping[str, Any]) -> Decoder:
    for part, piece in parts.items():
        allowed = (encoding.tensor if part == TENSOR else encoding.parts[part]).dtype
        if piece.dtype not in allowed:
            raise Unfit(part, " or ".join(allowed), piece.dtype)
        if piece.origin is not None or piece.strides is not None:
            raise Unfit(part, "a whole tensor, row by row", "a part of one")
    made = encoding_codec(encoding.codec)
    return made({part: Part(p.dtype, p.shape) for part, p in parts.items()}, encoding.dtype, **parameters)


def _replace(opened: Opened, decoded: Mapping[int, Decoded], gone: set[int]) -> None:
    files, pieces = list(opened.files), []
    for i, piece in enumerate(opened.pieces):
        if i in decoded:
            plain = decoded[i]
            pieces.append(Piece(piece.name, plain.dtype, plain.decoder.shape, len(files), 0, piece.rank))
            files.append(plain)
        elif i not in gone:
            pieces.append(piece)
    opened.files, opened.pieces = files, pieces


class _Problem(NamedTuple):
    piece: Piece
    what: str
    expected: object
    found: object


def _incomplete(
    opened: Opened, encoding: Encoding, found: Mapping[tuple[Rank | None, str], Mapping[str, int]]
) -> list[_Problem]:
    """What the parts lack that are not all there."""
    types = {(piece.rank, piece.name): piece.dtype for piece in opened.pieces} if found else {}
    problems = []
    for (rank, stem), held in found.items():
        lacking = {part: pattern for part, pattern in encoding.stored.items() if part not in held}
        names = [pattern.named(stem) for pattern in lacking.values()]
        expected = [f"{n} of type {' or '.join(p.dtype)}" for n, p in zip(names, lacking.values(), strict=True)]
        there = [f"{name} of type {types[rank, name]}" for name in names if (rank, name) in types]
        what = "an encoded tensor without its" if TENSOR in held else "a part of an encoded tensor, without the"
        piece = opened.pieces[next(iter(held.values()))]
        problems.append(
            _Problem(piece, f"{what} {', '.join(lacking)}", ", ".join(expected), ", ".join(there) or "no such tensor")
        )
    return problems


def _error(opened: Opened, name: str, problems: Sequence[_Problem]) -> CheckpointError:
    first, *others = problems
    details = collapse([f"{problem.piece.name}: {problem.what}" for problem in others])
    return CheckpointError(
        first.what, where=f"{_path(opened, first.piece)}: {first.piece.name}", expected=first.expected,
        found=first.found, details=details,
        hint=f"check that no file is missing and that all tensors are stored as {name} says; get the checkpoint again,"
        " or another one of the same model",
    )  # fmt: skip


def _path(opened: Opened, piece: Piece) -> Path:
    file = opened.files[piece.file]
    return file if isinstance(file, Path) else file.path


# The config of a decoded model.


def _get(document: Mapping[str, Any], dotted: str) -> Any:
    value: Any = document
    for step in dotted.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _edited(document: dict[str, Any], edit: ConfigEdit) -> dict[str, Any]:
    for path in edit.remove:
        document = _without(document, path.split("."))
    for path, value in edit.replace.items():
        if _get(document, path) is not None:
            document = _without(document, path.split("."), value)
    return document


def _without(document: dict[str, Any], steps: list[str], *instead: Any) -> dict[str, Any]:
    """A copy whose field at `steps` is gone, or holds what is given instead; other fields keep their places."""
    step, *further = steps
    if further:
        inner = document.get(step)
        return {**document, step: _without(inner, further, *instead)} if isinstance(inner, dict) else document
    if instead:
        return {**document, step: instead[0]}
    return {key: value for key, value in document.items() if key != step}


# Reading.


@frozen(eq=False)
class Decoded:
    """The file that an encoded tensor's values would be in, row by row. See `registry.files.Virtual`."""

    path: Path
    dtype: str
    decoder: Decoder
    parts: Mapping[str, Piece]

    def read_into(self, files: SourceFiles, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset`: whole rows together, and parts of rows at either end."""
        item, width = ITEMSIZE[self.dtype], self.decoder.shape[-1]
        while len(buffer):
            element, skip = divmod(offset, item)
            row, column = divmod(element, width)
            wanted = min(-(-(skip + len(buffer)) // item), _WINDOW)
            rows = 1 if column else max(1, wanted // width)
            columns = min(width - column, wanted)
            data = self._window(files, np.arange(row, row + rows), column, column + columns)[skip:]
            n = min(len(data), len(buffer))
            buffer[:n] = data[:n]
            buffer, offset = buffer[n:], offset + n

    def boxes(
        self, files: SourceFiles, offset: int, size: Sequence[int], stride: Sequence[int]
    ) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
        """A strided box that begins at byte `offset`, in parts: (where in the box, its raw elements)."""
        item, width = ITEMSIZE[self.dtype], self.decoder.shape[-1]
        for low, part in _cut(offset // item, tuple(size), tuple(stride), width):
            first = offset // item + sum(i * s for i, s in zip(low, stride, strict=True))
            at = (*(slice(i, i + n) for i, n in zip(low, part, strict=True)), ...)
            window = _window(first, part, stride, width)
            if window is None:
                last = first + sum((n - 1) * s for n, s in zip(part, stride, strict=True))
                stretch = files.scratch("a stretch", (last + 1 - first) * item)
                self.read_into(files, first * item, stretch)
                yield at, array(stretch, item, part, stride, 0)
            else:
                values = self._window(files, window.rows, window.begin, window.end)
                yield at, array(values, item, part, window.stride, 0)

    def _window(self, files: SourceFiles, rows: Ints, begin: int, end: int) -> memoryview:
        """Columns [begin, end) of some rows, in this thread's scratch."""
        item = ITEMSIZE[self.dtype]
        scratch = files.scratch("a window", len(rows) * (end - begin) * item)
        values = array(scratch, item, (len(rows), end - begin), (end - begin, 1), 0)
        step = max(1, _STEP // (end - begin))
        for i in range(0, len(rows), step):
            for at in range(begin, end, _STEP):
                to = min(at + _STEP, end)
                found = self.decoder.decode(_Reader(files, self.parts), rows[i : i + step], at, to)
                values[i : i + step, at - begin : to - begin] = self._raw(found, values.dtype)
        return scratch

    def _raw(self, values: torch.Tensor, dtype: np.dtype[Any]) -> np.ndarray:
        """Values as raw elements of the declared type."""
        import torch

        if values.dtype != torch_dtype(self.dtype):
            values = rounded(values, self.dtype)
        return values.view({2: torch.int16, 4: torch.int32}[dtype.itemsize]).numpy().view(dtype)


@frozen
class _Reader:
    """What a decoder reads the parts of its tensor with. See `registry.encoding.Read`."""

    files: SourceFiles
    parts: Mapping[str, Piece]

    def __call__(self, part: str, width: int, rows: Ints, begin: int, end: int) -> torch.Tensor:
        import torch

        piece = self.parts[part]
        item = ITEMSIZE[piece.dtype]
        first, span, columns = int(rows[0]), int(rows[-1] - rows[0]) + 1, end - begin
        at = piece.begin + (first * width + begin) * item
        extent = ((span - 1) * width + columns) * item
        if extent <= _DENSE * len(rows) * columns * item:
            scratch = self.files.scratch(f"part {part}", extent)
            self.files.read_into(piece.file, at, scratch)
            raw = array(scratch, item, (span, columns), (width, 1), 0)
            if span != len(rows) or not np.array_equal(rows, np.arange(first, first + span)):
                raw = raw[rows - first]
        else:
            raw = mapped(self.files, piece.file, item, (span, columns), (width, 1), at)[rows - first]
        return torch.from_numpy(raw).view(torch_dtype(piece.dtype))


class _Window(NamedTuple):
    """Rows and columns that hold a box, and the strides of the box in a matrix of them."""

    rows: Ints
    begin: int
    end: int
    stride: tuple[int, ...]


def _columns(first: int, size: Sequence[int], stride: Sequence[int], width: int) -> tuple[int, int]:
    """[begin, end) of the columns that a box reaches into; its end is beyond the row where it runs on into the next."""
    begin = first % width
    return begin, begin + 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True) if s % width)


def _window(first: int, size: Sequence[int], stride: Sequence[int], width: int) -> _Window | None:
    """The rows and columns of a box; None for one that runs on from row to row."""
    begin, end = _columns(first, size, stride, width)
    if end > width:
        return None
    steps = list(stride)
    rows = np.array([first // width], dtype=np.int64)
    across = end - begin
    for axis in sorted((d for d in range(len(size)) if stride[d] % width == 0), key=lambda d: -stride[d]):
        rows = (rows[:, None] + np.arange(size[axis]) * (stride[axis] // width)).ravel()
    for axis in sorted((d for d in range(len(size)) if stride[d] % width == 0), key=lambda d: stride[d]):
        steps[axis], across = across, across * size[axis]
    return _Window(rows, begin, end, tuple(steps))


def _cut(
    first: int, size: tuple[int, ...], stride: tuple[int, ...], width: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Parts of a box that decode little enough at a time, as (where it begins, its size)."""
    waiting = [((0,) * len(size), size)] if math.prod(size) else []
    while waiting:
        low, part = waiting.pop()
        start = first + sum(i * s for i, s in zip(low, stride, strict=True))
        begin, end = _columns(start, part, stride, width)
        if end > width:
            count = 1 + sum((n - 1) * s for n, s in zip(part, stride, strict=True))
        else:
            count = (end - begin) * math.prod(n for n, s in zip(part, stride, strict=True) if s % width == 0)
        axes = [d for d, n in enumerate(part) if n > 1]
        if count <= _WINDOW or not axes:
            yield low, part
            continue
        # Halves along the axis that reaches furthest: what lies together is decoded together.
        axis = max(axes, key=lambda d: stride[d])
        half = part[axis] // 2
        upper = tuple(i + half if d == axis else i for d, i in enumerate(low))
        waiting.append((upper, tuple(n - half if d == axis else n for d, n in enumerate(part))))
        waiting.append((low, tuple(half if d == axis else n for d, n in enumerate(part))))

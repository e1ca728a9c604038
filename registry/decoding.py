"""Tensors in an encoding, read as plain ones: each becomes one piece in a file that is on no disk.

Reading such a file decodes what is asked for and no more, a few thousand values at a time, from the files that hold the
parts. Nothing downstream of `decode` knows of encodings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from attrs import frozen

from registry import catalog
from registry.assemble import array, rows_of
from registry.casts import rounded
from registry.computed import Computed
from registry.dtypes import ITEMSIZE, torch_dtype
from registry.encoding import TENSOR, ConfigEdit, Decoder, Encoding, Ints, Part, Unfit, encoding_codec
from registry.errors import CheckpointError
from registry.files import SourceFiles
from registry.places import is_path
from registry.problems import collapse
from registry.specs import FormatSpec
from registry.storage import Opened, Piece, Rank

if TYPE_CHECKING:
    import torch

#: A stretch of a part is read whole where it is no more than so many times what is wanted of it.
_DENSE = 4


# Which stored tensors are parts of an encoded one.


def decode(opened: Opened, spec: FormatSpec, hub: dict[str, Any] | None) -> dict[str, Any] | None:
    """Put a plain piece in the place of every encoded tensor, and give the HuggingFace config of the decoded model.

    Raises CheckpointError for parts that lack others or do not fit them.
    """
    edits = [encoding.config for name, encoding in spec.encodings.items() if _decode(opened, name, encoding, spec, hub)]
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


def _decode(
    opened: Opened, name: str, encoding: Encoding, spec: FormatSpec, hub: Mapping[str, Any] | None
) -> bool:  # fmt: skip
    """Decode the tensors of one encoding, if there are any."""
    if {piece.dtype for piece in opened.pieces}.isdisjoint(encoding.tensor.dtype):
        return False
    document = hub or opened.document
    found, whole = _found(opened.pieces, encoding)
    if not whole[TENSOR] and all(_get(document, path) is None for path in encoding.config.remove):
        return False
    broken = _broken(opened, found, whole, [other for other in spec.encodings.values() if other is not encoding])
    if not whole[TENSOR] and not broken:
        return False
    problems = _incomplete(opened, encoding, broken)
    parameters = {
        key: entry.default if (value := _get(document, entry.field)) is None else value
        for key, entry in encoding.parameters.items()
    }
    pieces, files = opened.pieces, [file if is_path(file) else file.path for file in opened.files]
    decoded: dict[int, Decoded] = {}
    made: dict[object, Decoder] = {}  # models repeat few shapes
    for held in zip(*whole.values(), strict=True):
        parts = {part: pieces[i] for part, i in zip(whole, held, strict=True)}
        kind = tuple([(piece.dtype, piece.shape, piece.origin, piece.strides) for piece in parts.values()])
        try:
            decoder = made.get(kind)
            if decoder is None:
                decoder = made[kind] = _decoder(encoding, parts, parameters)
        except Unfit as error:
            piece = parts.get(error.what, parts[TENSOR])
            what = f"{error.what} of an encoded tensor" if error.what in parts else error.what
            problems.append(_Problem(piece, f"{name}: {what} does not fit", error.expected, error.found))
        else:
            decoded[held[0]] = Decoded(files[parts[TENSOR].file], encoding.dtype, decoder, parts)
    if problems:
        raise _error(opened, name, problems)
    beside = {i for pattern in encoding.beside for i, piece in enumerate(opened.pieces) if _like(piece.name, pattern)}
    scales = chain(beside, *[held for part, held in whole.items() if part != TENSOR])
    opened.state["ranges"] = opened.state.get("ranges", {}) | {pieces[i].name: pieces[i] for i in scales}
    _replace(opened, decoded, beside.union(*whole.values()))
    opened.notes.append(f"decoded {len(decoded)} tensors from {name} to {encoding.dtype}")
    return bool(decoded)


def _like(name: str, pattern: str) -> bool:
    head, tail = pattern.split("*")
    return name.startswith(head) and name.endswith(tail)


#: (rank, what the names of its parts share): an encoded tensor.
_Key = tuple[Rank | None, str]


def _found(
    pieces: Sequence[Piece], encoding: Encoding
) -> tuple[dict[str, dict[_Key, int]], dict[str, list[int]]]:  # fmt: skip
    """Of each part the pieces that there are, and in a row those of the tensors that have all of their parts."""
    found: dict[str, dict[_Key, int]] = {}
    for part, pattern in encoding.stored.items():
        # What has another type is not that tensor; a part of another type has the tensor to go by.
        types = frozenset(pattern.dtype) if part == TENSOR else None
        head, _, tail = pattern.name.partition("*")
        begin, shared = len(head), len(head) + len(tail)
        held = found[part] = {}
        for i, piece in enumerate(pieces):  # no call of ours for each: there are 100,000 of them
            name = piece.name
            fits = name.endswith(tail) and (types is None or piece.dtype in types)
            if fits and len(name) > shared and name.startswith(head):
                held[piece.rank, name[begin : len(name) - len(tail)]] = i
    common = set(found[TENSOR]).intersection(*found.values())
    whole = [key for key in found[TENSOR] if key in common]
    return found, {part: [held[key] for key in whole] for part, held in found.items()}


def _broken(
    opened: Opened, found: Mapping[str, Mapping[_Key, int]], whole: Mapping[str, Sequence[int]],
    others: Iterable[Encoding],
) -> dict[_Key, dict[str, int]]:  # fmt: skip
    """The parts that there are of tensors that lack others, but for those of tensors in other encodings."""
    used = {part: set(held) for part, held in whole.items()}
    broken: dict[_Key, dict[str, int]] = defaultdict(dict)
    for part, held in found.items():
        if len(held) > len(used[part]):
            for key, i in held.items():
                if i not in used[part]:
                    broken[key][part] = i
    if broken:
        taken = {i for other in others for i in _whole(opened.pieces, other)}
        return {key: held for key, held in broken.items() if not taken.intersection(held.values())}
    return {}


def _whole(pieces: Sequence[Piece], encoding: Encoding) -> Iterator[int]:
    """The pieces that are parts of an encoding's tensors, each with a type that the part may have."""
    types = [part.dtype for part in encoding.stored.values()]
    for held in zip(*_found(pieces, encoding)[1].values(), strict=True):
        if all(pieces[i].dtype in allowed for i, allowed in zip(held, types, strict=True)):
            yield from held


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
    return file if is_path(file) else file.path


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
class Decoded(Computed):
    """The file that an encoded tensor's values would be in."""

    path: Path
    dtype: str
    decoder: Decoder
    parts: Mapping[str, Piece]
    label = "decoded"

    @property
    def width(self) -> int:
        """As in `Computed`."""
        return self.decoder.shape[-1]

    def values(self, files: SourceFiles, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """As in `Computed`."""
        found = self.decoder.decode(_Reader(files, self.parts), rows, begin, end)
        return found if found.dtype == torch_dtype(self.dtype) else rounded(found, self.dtype)


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
            raw = rows_of(self.files, piece.file, item, rows - first, columns, width, at)
        return torch.from_numpy(raw).view(torch_dtype(piece.dtype))

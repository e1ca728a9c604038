"""GGUF on disk: one file of metadata, tensor headers and aligned data. The gguf package reads and writes the headers.

Beside `model.gguf` lies what GGUF has no place for and a conversion back needs: `registry.json` (the manifest) and
`huggingface/` (config.json, tokenizer and other small files). llama.cpp asks for neither, and a file of its own that
comes without them is read too.

Metadata are seen by the specs as one document: `general` as it is, what begins with the architecture's name under
`model`, the architecture as `architecture`, and the names of all tensors as `names`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from registry_formats.documents import carry, read_carried

from registry.encoding import register_encoding_codec
from registry.errors import CheckpointError, MappingError
from registry.storage import FilePlan, Laid, Opened, Piece, Request, Slot, slot_bytes
from registry_gguf.blocks import NBYTES, Q8_0

NAME = "model.gguf"
ALIGNMENT = 32
MAX_DIMENSIONS = 4
#: The registry's type -> GGUF's. What is stored as uint8 are the blocks of Q8_0.
TYPES = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "bfloat16": GGMLQuantizationType.BF16,
    "uint8": GGMLQuantizationType.Q8_0,
}
DTYPES = {stored: dtype for dtype, stored in TYPES.items()}
#: Type of most weights -> `general.file_type`. Source: LlamaFileType in gguf/constants.py.
FILE_TYPES = {"float32": 0, "float16": 1, "uint8": 7, "bfloat16": 32}
#: What metadata alone say of scaled rotary positions.
SCALINGS = (None, "linear")

register_encoding_codec("q8_0", Q8_0)


class Container:
    """Opens and lays out directories with one GGUF file."""

    def detect(self, path: Path) -> bool:
        """A directory with one .gguf file and no safetensors, which would be the model that the file was made of."""
        if not path.is_dir():
            return False
        names = [entry.name for entry in path.iterdir()]
        return sum(map(_is_gguf, names)) == 1 and not any(name.endswith(".safetensors") for name in names)

    def open(self, path: Path, spec_name: str) -> Opened:
        """Read the headers. Raises CheckpointError for whatever the gguf package cannot make sense of."""
        file = next(entry for entry in path.iterdir() if _is_gguf(entry.name))
        try:
            reader = GGUFReader(file)
            document = _document(reader)
            pieces = [_piece(tensor, file) for tensor in reader.tensors]
        except CheckpointError:
            raise
        except Exception as error:  # the package raises whatever its arrays do: IndexError, ValueError, ...
            raise CheckpointError(
                "not a readable GGUF file", where=file, expected="GGUF of version 2 or 3", found=error,
                hint="get the file again; it is cut off or damaged",
            ) from error  # fmt: skip
        opened = Opened(path, spec_name, [file], pieces, document)
        read_carried(opened)
        return opened

    def lay_out(self, request: Request) -> Laid:
        """One file, its tensors in the order that they are given in."""
        head, size, places = _headers(request)
        small, copies = carry(request)
        return Laid([FilePlan(NAME, size, [(0, head)])], places, small, copies)


def _is_gguf(name: str) -> bool:
    return name.endswith(".gguf")


def _piece(tensor: Any, file: Path) -> Piece:
    """Where a tensor lies."""
    kind = tensor.tensor_type
    if kind not in DTYPES:
        raise CheckpointError(
            f"{kind.name} is not read", where=f"{file}: {tensor.name}", found=kind.name,
            expected=", ".join(known.name for known in DTYPES),
            hint="get a file of another type, or make one with llama-quantize --allow-requantize",
        )  # fmt: skip
    # GGUF names the dimension that varies fastest first; what it has no numpy type for, the package shows as bytes.
    shape = tensor.data.shape if kind == GGMLQuantizationType.Q8_0 else reversed(tensor.shape)
    return Piece(tensor.name, DTYPES[kind], tuple(int(n) for n in shape), 0, int(tensor.data_offset))


def _document(reader: GGUFReader) -> dict[str, Any]:
    """The metadata as a document, but for the tokenizer's."""
    architecture = reader.fields["general.architecture"].contents()
    document: dict[str, Any] = {"architecture": architecture, "model": {}, "general": {}}
    for key, field in reader.fields.items():
        head, _, rest = key.partition(".")
        where = {architecture: "model", "general": "general"}.get(head)
        if where is not None:
            _put(document[where], rest.split("."), _value(field))
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    if tokens is not None:
        document["model"].setdefault("vocab_size", len(tokens.data))
    document["names"] = [tensor.name for tensor in reader.tensors]
    return document


def _put(document: dict[str, Any], steps: list[str], value: Any) -> None:
    *outer, last = steps
    for step in outer:
        document = document.setdefault(step, {})
    document[last] = value


def _value(field: Any) -> Any:
    """A value; of a float32 the shortest decimal number that it is the nearest to, as configs say it."""
    value = field.contents()
    if field.types == [GGUFValueType.FLOAT32]:
        return float(str(np.float32(value)))
    return value


def _headers(request: Request) -> tuple[bytes, int, list[tuple[int, int]]]:
    """All before the tensors' data, the size of the file, and each slot's place."""
    architecture = request.document["architecture"]
    scaling = request.document["model"].get("rope", {}).get("scaling", {}).get("type")
    if scaling not in SCALINGS:
        raise MappingError(
            "rotary frequencies that GGUF keeps in a tensor, which is not written here", where=request.source.path,
            expected="linear scaling, or none", found=scaling, hint="convert it with llama.cpp's convert_hf_to_gguf.py",
        )  # fmt: skip
    writer = GGUFWriter(None, str(architecture))
    for key, value in _fields(request.document):
        _add(writer, key, value)
    writer.add_uint32("general.file_type", FILE_TYPES[_main_type(request)])
    for slot in request.slots:
        _add_slot(writer, slot, request)
    with tempfile.TemporaryDirectory() as folder:  # the package writes headers to files alone
        file = Path(folder) / NAME
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = file.read_bytes()
    at = -(-len(head) // ALIGNMENT) * ALIGNMENT
    head = head.ljust(at, b"\0")
    places = []
    for slot in request.slots:
        places.append((0, at))
        at += -(-slot_bytes(slot) // ALIGNMENT) * ALIGNMENT
    return head, at, places


def _add_slot(writer: GGUFWriter, slot: Slot, request: Request) -> None:
    if slot.dtype not in TYPES or len(slot.shape) > MAX_DIMENSIONS:
        raise MappingError(
            "GGUF has no form for a tensor", where=f"{request.source.path}: {slot.name}",
            expected=f"{', '.join(list(TYPES)[:3])}, and at most {MAX_DIMENSIONS} dimensions",
            found=f"{slot.dtype} {slot.shape}", hint="--dtype casts floating-point types",
        )  # fmt: skip
    shape = slot.shape if slot.dtype != "uint8" else (*slot.shape[:-1], slot.shape[-1] // NBYTES * Q8_0.columns)
    writer.add_tensor_info(slot.name, shape, np.dtype(np.float32), slot_bytes(slot), TYPES[slot.dtype])


def _main_type(request: Request) -> str:
    """The type that most bytes have."""
    count = dict.fromkeys(FILE_TYPES, 0)
    for slot in request.slots:
        count[slot.dtype] = count.get(slot.dtype, 0) + slot_bytes(slot)
    return max(FILE_TYPES, key=lambda dtype: count[dtype])


def _fields(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of the metadata that a document says."""
    heads = {"general": "general", "model": str(document["architecture"]), "tokenizer": "tokenizer"}
    for part, head in heads.items():
        yield from _flat(head, document.get(part, {}))


def _flat(head: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{head}.{key}", inner)
    elif value is not None:
        yield head, value


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """One value, as the type that llama.cpp reads it as."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        raise MappingError(
            "GGUF has no form for a value", where=key, expected="a number or text", found=repr(value),
            hint="leave it out of `config` in the spec, or write it as several fields",
        )  # fmt: skip

"""JSON and YAML that is no honest document: configs, indexes, manifests, specs, and what is beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import registry
from formats import documents
from registry import catalog, expressions, layout
from registry.errors import CheckpointError, LayoutError, SpecError
from registry.quantization.decoding import read_layers
from registry.source import read_config
from tests.attacks.bounded import attack, cases, written

#: Ways to read a JSON document: those of checkpoints, the user's config, and the list of quantised layers.
READERS: dict[str, Callable[[Path], object]] = {
    "document": documents.read_json,
    "config": read_config,
    "layers": lambda path: read_layers(path, "quantized_layers"),
}
DOCUMENTS: dict[str, tuple[bytes, str]] = {
    "nan": (b'{"a": NaN}', "NaN is no JSON number"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is no JSON number"),
    "beyond_all_numbers": (b'{"a": 1e999}', "too large a number"),
    "a_number_of_five_thousand_digits": (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
    "a_number_of_a_million_digits": (b'{"a": ' + b"9" * 1_000_000 + b"}", "a number of 1000000 digits"),
    "a_key_twice": (b'{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'"),
    "fifty_thousand_keys_and_one_twice": (
        b"{" + b"".join(b'"%d": 1,' % i for i in range(50_000)) + b'"49999": 1}', "duplicate key '49999'",
    ),
    "nested_a_little_too_deep": (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested deeper than 64"),
    "nested_deep": (b'{"a": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", "recursion"),
    "nested_deeper": (b'{"a": ' + b"[" * 5_000_000, "5000001 lists and objects"),
    "lists": (b'{"a": [' + b"[]," * 1_000_000 + b"0]}", "lists and objects"),
    "commas": (b'{"a": [' + b'"ab",' * 1_000_000 + b"0]}", "commas"),
    "no_text": (b'{"a": "\xff\xfe"}', "utf-8"),
    "another_encoding": ('{"a": 1}'.encode("utf-16"), "utf-8"),
    "half_a_character": (b'{"a\\ud800": 1}', "surrogates not allowed"),
    "a_byte_order_mark": (b'\xef\xbb\xbf{"a": 1}', "BOM"),
    "python": (b"{'a': 1}", "Expecting"),
    "two_documents": (b'{"a": 1}{"a": 1}', "Extra data"),
    "nothing": (b"", "Expecting"),
    "null_bytes": (bytes(1000), "Expecting"),
}  # fmt: skip

for reader, read in READERS.items():
    for name, (data, says) in DOCUMENTS.items():

        def document(folder: Path, data: bytes = data, read: Callable[[Path], object] = read) -> Callable[[], object]:
            path = written(folder / "hostile.json", data)
            return lambda: read(path)

        document.__name__ = f"{reader}_{name}"
        attack(CheckpointError, "hostile.json", says)(document)

    def gigabytes(folder: Path, read: Callable[[Path], object] = read) -> Callable[[], object]:
        path = written(folder / "hostile.json", b"{")
        os.truncate(path, 8 << 30)
        return lambda: read(path)

    gigabytes.__name__ = f"{reader}_of_gigabytes"
    attack(CheckpointError, "hostile.json", "8589934592 bytes")(gigabytes)

    def a_pipe(folder: Path, read: Callable[[Path], object] = read) -> Callable[[], object]:
        os.mkfifo(folder / "hostile.json")
        return lambda: read(folder / "hostile.json")

    a_pipe.__name__ = f"{reader}_that_is_a_pipe"
    attack(CheckpointError, "hostile.json", "not a plain file")(a_pipe)

    def a_device(folder: Path, read: Callable[[Path], object] = read) -> Callable[[], object]:
        (folder / "hostile.json").symlink_to("/dev/zero")
        return lambda: read(folder / "hostile.json")

    a_device.__name__ = f"{reader}_that_is_a_device"
    attack(CheckpointError, "hostile.json", "not a plain file")(a_device)


# Specs.


def spec(folder: Path, text: str | bytes) -> Callable[[], object]:
    path = written(folder / "hostile.yaml", text)
    return lambda: registry.register(path)


@attack(SpecError, "hostile.yaml", "aliases are not allowed")
def a_billion_laughs(folder: Path) -> Callable[[], object]:
    lines = ["a0: &a0 [lol, lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    return spec(folder, "\n".join(lines))


@attack(SpecError, "hostile.yaml", "could not determine a constructor")
def a_tag_that_runs_something(folder: Path) -> Callable[[], object]:
    return spec(folder, f"kind: !!python/object/apply:os.system ['touch {folder.parent}/ran']")


@attack(SpecError, "hostile.yaml", "could not determine a constructor")
def a_tag_that_names_something(folder: Path) -> Callable[[], object]:
    return spec(folder, "kind: !!python/name:os.system")


@attack(SpecError, "hostile.yaml", "nested deeper")
def mappings_in_mappings(folder: Path) -> Callable[[], object]:
    return spec(folder, "kind: " + "{a: " * 5000 + "1" + "}" * 5000)


@attack(SpecError, "hostile.yaml", "nested deeper")
def lists_in_lists(folder: Path) -> Callable[[], object]:
    return spec(folder, "kind: " + "[" * 400_000)


@attack(SpecError, "hostile.yaml", "duplicate key")
def a_key_of_a_spec_twice(folder: Path) -> Callable[[], object]:
    return spec(folder, "kind: architecture\nkind: format\n")


@attack(SpecError, "hostile.yaml", "at most 1048576 bytes")
def a_spec_of_gigabytes(folder: Path) -> Callable[[], object]:
    run = spec(folder, "a: 1\n")
    os.truncate(folder / "hostile.yaml", 8 << 30)
    return run


@attack(SpecError, "hostile.yaml", "utf-8")
def a_spec_that_is_no_text(folder: Path) -> Callable[[], object]:
    return spec(folder, b"kind: \xff\xfe")


@attack(SpecError, "hostile.yaml", "no such spec file")
def a_spec_that_is_a_pipe(folder: Path) -> Callable[[], object]:
    os.mkfifo(folder / "hostile.yaml")
    return lambda: registry.register(folder / "hostile.yaml")


# Expressions and layouts: where a spec computes, and what a config can make it compute.


EXPRESSIONS = {
    "an_import": "__import__('os').system('true')",
    "an_attribute_of_python": "x.__class__.__mro__",
    "a_lambda": "(lambda: 1)()",
    "a_comprehension": "[i for i in x]",
    "a_power": "9 ** 9 ** 9 ** 9",
    "a_shift": "1 << 10",
    "brackets": "(" * 240 + "1" + ")" * 240,
    "too_long": "1 + " * 200 + "1",
    "null": "a\0b",
    "assignment": "(a := 1)",
}
for name, text in EXPRESSIONS.items():

    def expression(folder: Path, text: str = text) -> Callable[[], object]:
        data = {"kind": "architecture", "name": "x", "axes": {"a": text}, "tensors": {}, "config": {}}
        path = written(folder / "hostile.yaml", json.dumps(data))
        return lambda: catalog.register(path)

    expression.__name__ = f"expression_{name}"
    attack(SpecError, "hostile.yaml")(expression)


@attack(SpecError, "where: in a spec", "a list of more than")
def a_list_of_billions(folder: Path) -> Callable[[], object]:
    return lambda: _evaluated("[1, 2, 3] * layers", layers=10**12)


@attack(SpecError, "where: in a spec", "cannot evaluate")
def a_text_of_billions(folder: Path) -> Callable[[], object]:
    return lambda: _evaluated("text * layers", text="x", layers=10**12)


@attack(SpecError, "where: in a spec", "cannot evaluate")
def json_in_a_config_that_is_nested_deep(folder: Path) -> Callable[[], object]:
    return lambda: _evaluated("from_json(text)", text="[" * 1_000_000)


def _evaluated(expression: str, /, **facts: object) -> object:
    try:
        return expressions.parse(expression)(facts)
    except SpecError as error:
        raise SpecError(error.problem, where="in a spec", found=error.found) from None


@attack(LayoutError, "layout too long")
def a_layout_of_a_megabyte(folder: Path) -> Callable[[], object]:
    return lambda: _parsed("(" * 1_000_000)


@attack(LayoutError, "layout")
def brackets_in_brackets(folder: Path) -> Callable[[], object]:
    return lambda: _parsed("(" * 490)


def _parsed(text: str) -> object:
    try:
        return layout.parse(text)
    except LayoutError as error:
        raise LayoutError(error.problem, where="a layout") from None


test_attacks = cases(__name__)

"""A drafted spec: its values, what is not certain about each, and the YAML that says both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import define, field

#: Text that YAML takes for text without quotes, and words that it does not.
_PLAIN = re.compile(r"[A-Za-z][\w.-]*( // [a-z_]+)?")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "none", "y", "n"}


@define
class Line:
    """A value of the draft, and what is not certain about it."""

    value: Any
    doubt: str | None = None


@define
class Draft:
    """A spec in the making: its sections as {key: Line}, in the order in which they are written."""

    name: str
    description: str
    axes: dict[str, Line] = field(factory=dict)
    facts: dict[str, Line] = field(factory=dict)
    config: dict[str, Line] = field(factory=dict)
    constants: dict[str, Line] = field(factory=dict)
    tied: list[Line] = field(factory=list)
    tensors: dict[str, list[Line]] = field(factory=dict)
    ignored: list[Line] = field(factory=list)
    within: str | None = None
    #: What the model's config says of the facts.
    values: dict[str, Any] = field(factory=dict)

    @property
    def doubts(self) -> list[str]:
        """Everything that is marked."""
        lines = [*self.axes.values(), *self.facts.values(), *self.config.values(), *self.tied, *self.ignored]
        lines += [line for several in self.tensors.values() for line in several]
        return [line.doubt for line in lines if line.doubt]

    def data(self) -> dict[str, Any]:
        """The spec as plain data."""
        config: dict[str, Any] = {"within": self.within} if self.within else {}
        config |= {"facts": _values(self.config), "constants": _values(self.constants)}
        whole = {
            "kind": "architecture", "name": self.name, "description": self.description, "axes": _values(self.axes),
            "facts": _values(self.facts), "config": config, "tied": [line.value for line in self.tied],
            "tensors": {p: several[0].value if len(several) == 1 else [line.value for line in several]
                        for p, several in self.tensors.items()},
            "ignored": [line.value for line in self.ignored],
        }  # fmt: skip
        return {key: value for key, value in whole.items() if value not in ([], {}) or key == "axes"}

    def text(self) -> str:
        """The spec as YAML, its doubts as comments."""
        out = [
            f"# A draft, made of the config and the headers of one model: {len(self.doubts)} places are marked `?:`.",
            "# Look at each, and at what the model's class computes. docs/tutorials/add-an-architecture.md goes on.",
            "kind: architecture", f"name: {self.name}", f"description: {_flow(self.description)}", "",
            "axes:" if self.axes else "axes: {}",
        ]  # fmt: skip
        out += _lines(self.axes, 2)
        out += ["", "facts:", *_lines(self.facts, 2)] if self.facts else []
        out += ["", "config:"] + ([f"  within: {self.within}"] if self.within else [])
        out += ["  facts:" if self.config else "  facts: {}", *_lines(self.config, 4)]
        out += ["  constants:", *_lines(self.constants, 4)]
        out += ["", "tied:", *_items(self.tied)] if self.tied else []
        out += ["", "tensors:"]
        for pattern, lines in self.tensors.items():
            out += _lines({pattern: lines[0]}, 2) if len(lines) == 1 else [f"  {_key(pattern)}:", *_items(lines, 4)]
        out += ["", "ignored:", *_items(self.ignored)] if self.ignored else []
        return "\n".join(out) + "\n"


def _values(lines: Mapping[str, Line]) -> dict[str, Any]:
    return {key: line.value for key, line in lines.items()}


def _flow(value: Any) -> str:
    """A value in one line of YAML, of which JSON is a part; text that needs no quotes has none."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"^(-?\d+)e", r"\1.0e", text) if isinstance(value, float) else text  # YAML's floats have a point


def _key(name: str) -> str:
    """A key: what a checkpoint calls its tensors is not to be trusted."""
    return name if re.fullmatch(r"[A-Za-z][\w.{}+-]*", name) and name.lower() not in _WORDS else json.dumps(name)


def _lines(lines: Mapping[str, Line], indent: int) -> Iterator[str]:
    for key, line in lines.items():
        yield from _marked(line, indent)
        yield f"{' ' * indent}{_key(key)}: {_flow(line.value)}"


def _items(lines: Sequence[Line], indent: int = 2) -> Iterator[str]:
    for line in lines:
        yield from _marked(line, indent)
        yield f"{' ' * indent}- {_flow(line.value)}"


def _marked(line: Line, indent: int) -> Iterator[str]:
    if line.doubt:
        yield f"{' ' * indent}# ?: {' '.join(line.doubt.split())}"  # a name in it could end the line

"""What a spec says once and means often: named conditions, and rules repeated for another stack of layers.

Both are spelled out in the spec's data before it is checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import Field, ValidationError

from registry.errors import RegistryError
from registry.layout import parse
from registry.tensor_rules import Model, as_rules, named_axes

#: Text in quotes, or a name outside of it that is no field.
_NAME = re.compile(r"'[^']*'|\"[^\"]*\"|(?<![\w.])[^\W\d]\w*")


class Repeat(Model):
    """Rules that hold a second time, for another stack of the same layers: other names, other logical tensors.

    Every rule whose name begins with `of` also holds with `to` in its place and `prefix` before its logical tensors.
    Where `of` and `to` end in different axes, conditions read `axis` plus its fact for the axis of `of`.
    """

    of: str = Field(description="how the names begin")
    to: str = Field(description="how the further names begin")
    prefix: str = Field(description="what the further logical tensors begin with")
    optional: str | None = Field(default=None, description="as in a rule, for all of them")
    stage: Literal["first", "last", "ends"] | None = Field(default=None, description="as in a rule, for all of them")
    aliases: list[str] = Field(default=[], description="other beginnings accepted on reading")
    leave: list[str] = Field(default=[], description="globs over names that are not repeated")

    def leaves(self, pattern: str) -> bool:
        """Is this name one that is not repeated?"""
        return any(fnmatchcase(pattern, glob) for glob in self.leave)

    def condition(self, when: str) -> str:
        """A condition, asked of the other stack of layers."""
        old, new = named_axes(self.of), named_axes(self.to)
        when = re.sub(r"\bhas\((['\"])", rf"has(\g<1>{self.prefix}", when)
        if old and new and old[-1].axis != new[-1].axis:
            index = f"({new[-1].axis} + {new[-1].plus})" if new[-1].plus else new[-1].axis
            when = _NAME.sub(lambda found: index if found[0] == old[-1].axis else found[0], when)
        return when

    def rules(self, pattern: str, rule: dict[str, Any]) -> dict[str, Any]:
        """One rule, repeated. Raises LayoutError."""
        again = dict(rule)
        layout = parse(str(rule["layout"]))
        again["layout"] = str(layout.relabel(lambda label: self.prefix + label))
        if rule.get("shape"):
            again["shape"] = str(parse(str(rule["shape"])).relabel(lambda label: self.prefix + label))
        again |= {key: value for key in ("optional", "stage") if (value := getattr(self, key)) is not None}
        if isinstance(rule.get("when"), str):
            again["when"] = self.condition(rule["when"])
        names = rule.get("names") or {}
        again["names"] = {choice: name.replace(self.of, self.to, 1) for choice, name in names.items()}
        begins = [self.to, *self.aliases]
        others = [pattern, *names.values(), *(rule.get("aliases") or [])]
        aliases = dict.fromkeys(name.replace(self.of, begin, 1) for begin in begins for name in others)
        again["aliases"] = [name for name in aliases if name != pattern.replace(self.of, self.to, 1)]
        return again


def defined(data: Any) -> Any:
    """A spec's data with the conditions that it names spelled out, wherever they are used."""
    names = data.get("define") if isinstance(data, dict) else None
    if not isinstance(names, dict) or not names:
        return data
    known: dict[str, str] = {}

    def spell(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        return _NAME.sub(lambda found: f"({known[found[0]]})" if found[0] in known else found[0], text)

    for name, text in names.items():
        known[str(name)] = str(spell(text))
    whole = dict(data)
    if isinstance(data.get("axes"), dict):
        whole["axes"] = {axis: spell(text) for axis, text in data["axes"].items()}
    if isinstance(data.get("tensors"), dict):
        whole["tensors"] = {pattern: _each_when(rules, spell) for pattern, rules in data["tensors"].items()}
    return whole


def _each_when(rules: Any, change: Callable[[Any], Any]) -> Any:
    """One tensor's rules with another condition each."""
    listed = as_rules(rules)
    if not all(isinstance(rule, dict) for rule in listed):
        return rules
    return [{**rule, "when": change(rule["when"])} if "when" in rule else rule for rule in listed]


def repeated(data: Any) -> Any:
    """A spec's data with its repeats spelled out."""
    tensors = data.get("tensors") if isinstance(data, dict) else None
    if not isinstance(tensors, dict) or not data.get("repeats"):
        return data
    whole, objects = dict(tensors), dict(data.get("objects") or {})
    try:
        repeats = [Repeat.model_validate(item) for item in data["repeats"]]
    except (ValidationError, TypeError):
        return data  # they are checked once more, with their places
    for repeat in repeats:
        for pattern, rules in tensors.items():
            if pattern.startswith(repeat.of) and not repeat.leaves(pattern):
                name = pattern.replace(repeat.of, repeat.to, 1)
                try:
                    again = [repeat.rules(pattern, rule) for rule in as_rules(rules)]
                except (RegistryError, KeyError, TypeError, AttributeError):
                    continue  # the rule itself is wrong, and said to be so
                whole.setdefault(name, again)
        for pattern, when in list(objects.items()):
            if pattern.startswith(repeat.of) and not repeat.leaves(pattern):
                objects.setdefault(pattern.replace(repeat.of, repeat.to, 1), repeat.condition(str(when)))
    return {**data, "tensors": whole} | ({"objects": objects} if objects else {})

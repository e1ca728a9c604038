"""What a spec file may say of a config document: which of its fields hold which facts of the model."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from registry.tensor_rules import Expression, Model, Scalar


class FactMap(Model):
    """One fact of the model and the field of a config document that holds it."""

    field: list[str] = Field(default=[], description="dotted paths; the first is written, any is read")
    read: Expression | None = Field(
        default=None, description="an expression over the document, where a plain field will not do"
    )
    values: list[tuple[Scalar, Scalar]] = Field(default=[], description="pairs (fact, field value)")
    default: Any = Field(default=None, description="the fact where the document is silent")
    loose: bool = Field(default=False, description="a document that says otherwise, or nothing, does no harm")

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"field": [data]}
        if isinstance(data, dict):
            data = dict(data)
            if isinstance(data.get("field"), str):
                data["field"] = [data["field"]]
            if isinstance(data.get("values"), dict):
                data["values"] = list(data["values"].items())
        return data


class ConfigMap(Model):
    """A config document against the facts of the model, in both directions."""

    facts: dict[str, FactMap] = Field(default={}, description="fact -> where the document holds it")
    write: dict[str, Expression] = Field(default={}, description="field -> expression over facts, only written")
    constants: dict[str, Any] = Field(default={}, description="field -> literal, only written")
    neutral: list[str] = Field(
        default=[], description="globs over fields that do not decide what the model computes: no loss"
    )
    usual: dict[str, Any] = Field(
        default={}, description="field that no fact is read from -> the value it has when absent"
    )
    within: str | None = Field(
        default=None, description="the part of the document that holds the facts' fields, such as text_config"
    )

    def paths(self, fact: str) -> list[str]:
        """Where the document may hold a fact, the place that is written first."""
        fields = self.facts[fact].field
        return fields if self.within is None else [*(f"{self.within}.{field}" for field in fields), *fields]

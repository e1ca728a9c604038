"""What a spec file may say: every kind of mistake is reported in the spec's own terms, and the built-in specs hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from registry import catalog, expressions, layout
from registry.errors import SpecError
from registry.model import config_map
from registry.parallel import DIMENSIONS
from registry.specs import ArchitectureSpec, FormatSpec, json_schema
from registry.tensor_rules import Rule, named_axes

MAPPINGS = Path(__file__).resolve().parents[1] / "mappings"


def architecture(**changes: Any) -> dict[str, Any]:
    """A small architecture spec that is right."""
    return {
        "kind": "architecture",
        "name": "toy",
        "axes": {"layer": "layers", "hidden": "size", "ffn": "2 * size"},
        "config": {"facts": {"layers": "n_layer", "size": "n_embd", "tied": "tie"}},
        "tensors": {"embed": "embedding: hidden", "h.{layer}.up": "up: ffn hidden", "head": "output: hidden"},
        "tied": [{"tensor": "output", "to": "embedding", "when": "tied"}],
        **changes,
    }


def format_(**changes: Any) -> dict[str, Any]:
    """A small format spec that is right."""
    return {
        "kind": "format",
        "name": "toyfmt",
        "container": "huggingface",
        "parallel": ["tp", "pp"],
        "variants": {"layers": {"stacked": {"fold": "layer"}, "single": {}}},
        "tensors": {"h.{layer@pp}.up": "up: ffn@tp hidden", "embed": {"layout": "embedding: hidden", "stage": "first"}},
        **changes,
    }


def problems(data: dict[str, Any]) -> tuple[str, ...]:
    """What the catalog finds wrong with a spec."""
    with pytest.raises(SpecError) as caught:
        catalog.build(data, "toy.yaml")
    assert "where: toy.yaml" in str(caught.value), "the file is named"
    assert str(data["name"]) in caught.value.problem, "the spec is named"
    return caught.value.details


def test_the_small_specs_are_right() -> None:
    assert catalog.build(architecture(), "toy.yaml").name == "toy"
    assert catalog.build(format_(), "toy.yaml").name == "toyfmt"


# Each kind of mistake: (change, where it is, what is wrong)

ARCHITECTURE_MISTAKES = {
    "fact said twice": ({"facts": {"size": 8}}, "facts", "'size' is said for every model; config.facts reads it too"),
    "layout syntax": ({"tensors": {"w": "w: (hidden"}}, "tensors.w.0", "expected ')', found 'end of layout'"),
    "no tensor named": ({"tensors": {"w": "hidden"}}, "tensors.w.0", "no tensor is named"),
    "undeclared axis": ({"tensors": {"w": "w: hiden"}, "tied": []}, "w", "axis 'hiden' of w is not declared"),
    "undeclared axis in a name": ({"tensors": {"w.{lyr}": "w:"}, "tied": []}, "w.{lyr}", "axis 'lyr' of w is not decl"),
    "axis twice": ({"tensors": {"w.{layer}": "w: layer"}}, "w.{layer}", "axis 'layer' of w is in the name and in the"),
    "brace without an axis": ({"tensors": {"w.{}": "w: hidden"}}, "w.{}", "a brace that names no axis"),
    "open brace": ({"tensors": {"w.{layer": "w: hidden"}}, "w.{layer", "a brace that names no axis"),
    "size of a fact that is none": (
        {"axes": {"hidden": "sise"}, "tensors": {}, "tied": []},
        "axis hidden",
        "'sise' is no fact",
    ),
    "condition on a fact that is none": (
        {"tensors": {"w": {"layout": "w: hidden", "when": "biased"}}, "tied": []},
        "w",
        "'biased' is no fact",
    ),
    "tie on a fact that is none": (
        {"tied": [{"tensor": "output", "to": "embedding", "when": "shared"}]},
        "tied output",
        "'shared' is no fact",
    ),
    "tie to nothing": (
        {"tied": [{"tensor": "output", "to": "nothing", "when": "tied"}]},
        "tied",
        "'nothing' is no tensor",
    ),
    "condition with a call": (
        {"tensors": {"w": {"layout": "w: hidden", "when": "open('x')"}}},
        "tensors.w.0.when",
        "not allowed in an expression",
    ),
    "size that is no expression": ({"axes": {"hidden": "2 *"}}, "axes.hidden", "not an expression: '2 *'"),
    "unknown key": ({"tensor": {}}, "tensor", "Extra inputs are not permitted"),
    "unknown key of a rule": (
        {"tensors": {"w": {"layout": "w: hidden", "padding": 1}}},
        "tensors.w.0.padding",
        "Extra inputs are not permitted",
    ),
    "unknown key of a fact": (
        {"config": {"facts": {"size": {"feild": "n"}}}},
        "config.facts.size.feild",
        "Extra inputs are not permitted",
    ),
    "rule without a layout": ({"tensors": {"w": {"when": "tied"}}}, "tensors.w.0.layout", "Field required"),
    "rule that is nothing": ({"tensors": {"w": None}}, "tensors.w.0", "valid dictionary"),
    "no axes": ({"axes": None}, "axes", "valid dictionary"),
    "name with a blank": ({"name": "to y"}, "name", "String should match pattern"),
    "reason left out": ({"ignored": [{"name": "*.bias"}]}, "ignored.0.reason", "Field required"),
    "dtype": (
        {"tensors": {"w": {"layout": "w: hidden", "dtype": "flaot32"}}},
        "tensors.w.0",
        "unknown dtype 'flaot32'",
    ),
    "scale": ({"tensors": {"w": {"layout": "w: hidden", "scale": 0}}}, "tensors.w.0", "scale 0 has no inverse"),
    "stage": (
        {"tensors": {"w": {"layout": "w: hidden", "stage": "middle"}}},
        "tensors.w.0.stage",
        "'first', 'last' or 'ends'",
    ),
    "pad of another axis": (
        {"tensors": {"w": {"layout": "w: hidden", "pad": {"vocab": 128}}}},
        "tensors.w.0",
        "pads axis 'vocab', which the layout lacks",
    ),
    "pad that is no expression": (
        {"tensors": {"w": {"layout": "w: hidden", "pad": {"hidden": "x y"}}}},
        "tensors.w.0.pad.hidden",
        "not an expression",
    ),
}

FORMAT_MISTAKES = {
    "unknown dimension in a layout": ({"tensors": {"w": "w: hidden@tensor"}}, "tensors.w.0", "shards over 'tensor'"),
    "unknown dimension of the format": ({"parallel": ["tp", "pp", "xp"]}, "parallel", "unknown dimension 'xp'"),
    "dimension not listed, in a layout": (
        {"tensors": {"w": "w: hidden@ep"}},
        "w",
        "shards over 'ep', which `parallel`",
    ),
    "dimension not listed, in a name": ({"tensors": {"w.{e@ep}": "w: hidden"}}, "w.{e@ep}", "shards over 'ep', which"),
    "dimension not listed, in a cut": ({"tensors": {"w": "w: (a b)@ep"}}, "w", "shards over 'ep', which `parallel`"),
    "choice of no variant": (
        {"tensors": {"w": {"layout": "w: hidden", "names": {"local": "v"}}}},
        "w",
        "no variant has the choice 'local'",
    ),
    "no container": ({"container": None}, "container", "valid string"),
    "entry with a bad condition": (
        {"objects": {"state": "lambda: 1"}},
        "objects.state",
        "not allowed in an expression",
    ),
    "option that is read by a call": (
        {"options": {"x": {"read": "f(1)"}}},
        "options.x.read",
        "not allowed in an expression",
    ),
    "rules from elsewhere": ({"rules_from": "me"}, "rules_from", "'format' or 'architecture'"),
    "fold of many axes": ({"variants": {"v": {"a": {"fold": ["x", "y"]}}}}, "variants.v.a.fold", "valid string"),
}


@pytest.mark.parametrize(("change", "place", "problem"), ARCHITECTURE_MISTAKES.values(), ids=ARCHITECTURE_MISTAKES)
def test_a_mistake_in_an_architecture_is_named_with_its_place(change: dict[str, Any], place: str, problem: str) -> None:
    found = problems(architecture(**change))
    assert any(place in line and problem in line for line in found), found


@pytest.mark.parametrize(("change", "place", "problem"), FORMAT_MISTAKES.values(), ids=FORMAT_MISTAKES)
def test_a_mistake_in_a_format_is_named_with_its_place(change: dict[str, Any], place: str, problem: str) -> None:
    found = problems(format_(**change))
    assert any(place in line and problem in line for line in found), found


def test_a_wrong_layout_is_quoted_with_a_caret() -> None:
    (problem,) = problems(architecture(tensors={"w": "w: hidden (ffn"}, tied=[]))
    assert "    w: hidden (ffn\n                  ^" in problem


def test_all_mistakes_of_a_spec_are_reported_at_once() -> None:
    wrong = {"a": "a: (hidden", "b": {"layout": "b: hidden", "when": "f(1)", "stage": "nowhere"}, "c": {"when": "tied"}}
    found = "\n".join(problems(architecture(tensors=wrong, axes={"hidden": "1 +"}, bogus=1)))
    for place in ("tensors.a.0", "tensors.b.0.when", "tensors.b.0.stage", "tensors.c.0.layout", "axes.hidden", "bogus"):
        assert place in found
    found = "\n".join(
        problems(architecture(tensors={"a": "a: b", "c.{d}": {"layout": "c:", "when": "e"}}, axes={"f": "g"}))
    )
    for name in ("'b'", "'d'", "'e'", "'g'", "'embedding'"):
        assert name in found


def test_the_short_spellings() -> None:
    spec = ArchitectureSpec.model_validate(architecture())
    assert spec.tensors["embed"] == [Rule(layout="embedding: hidden")]
    assert spec.config.facts["size"].field == ["n_embd"]
    several = ArchitectureSpec.model_validate(
        architecture(tensors={"w": ["w: hidden", {"layout": "v: ffn", "when": True}]}, tied=[])
    )
    assert [str(rule.parsed) for _, rule in several.rules()] == ["w: hidden", "v: ffn"]
    assert several.tensors["w"][1].when == "True"


def test_a_spec_does_not_change() -> None:
    spec = ArchitectureSpec.model_validate(architecture())
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"  # type: ignore[misc]


def test_canonical_axes_are_those_of_the_name_and_then_those_of_the_layout() -> None:
    assert ArchitectureSpec.model_validate(architecture()).logical() == {
        "embedding": ("hidden",),
        "up": ("layer", "ffn", "hidden"),
        "output": ("hidden",),
    }


# The built-in specs

ARCHITECTURES = sorted(path.stem for path in (MAPPINGS / "architectures").glob("*.yaml"))
FORMATS = sorted(path.stem for path in (MAPPINGS / "formats").glob("*.yaml"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_built_in_architecture_is_right_and_says_where_it_comes_from(name: str) -> None:
    spec = catalog.architecture(name)
    assert (spec.kind, spec.name) == ("architecture", name)
    assert spec.description
    assert spec.config.constants["model_type"] == name
    assert "# Source: " in (MAPPINGS / f"architectures/{name}.yaml").read_text()


@pytest.mark.parametrize("name", FORMATS)
def test_a_built_in_format_is_right(name: str) -> None:
    spec = catalog.format_spec(name)
    assert (spec.kind, spec.name) == ("format", name)
    assert spec.description
    assert all(entry.reason for entry in spec.ignored)
    assert all(option.description for option in spec.options.values())


def read_by(spec: FormatSpec, architecture: ArchitectureSpec) -> dict[str, set[str]]:
    """The names that each expression of a format reads of the model, by place."""
    texts = {f"objects {name}": when for name, when in spec.objects.items()}
    texts |= {f"write {field}": text for field, text in config_map(spec, architecture).write.items()}
    for pattern, rule in spec.rules():
        texts |= {f"{pattern} pad {axis}": text for axis, text in rule.pad.items()}
        texts |= {f"{pattern} when": rule.when or "true", f"{pattern} tied": rule.tied}
    return {place: set(expressions.parse(text).names) for place, text in texts.items()}


def facts_of(spec: ArchitectureSpec) -> set[str]:
    return {*spec.facts, *spec.config.facts} | {f for added in spec.formats.values() for f in added.config.facts}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_reads_only_facts_that_some_architecture_or_the_format_knows(name: str) -> None:
    spec = catalog.format_spec(name)
    everyone = set().union(*(facts_of(catalog.architecture(a)) for a in ARCHITECTURES))
    known = everyone | {*spec.config.facts, *spec.options, *DIMENSIONS, "dtype"}
    for architecture_name in ARCHITECTURES:
        for place, names in read_by(spec, catalog.architecture(architecture_name)).items():
            # `rotary_percent or 1.0`: a fact that only some models have may be asked for with a default.
            assert names - known <= {"rotary_percent"}, f"{name}: {place} for {architecture_name}"


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_names_only_tensors_and_axes_of_some_architecture(name: str) -> None:
    spec = catalog.format_spec(name)
    logical: dict[str, set[frozenset[str]]] = {}
    for architecture_name in ARCHITECTURES:
        for tensor, axes in catalog.architecture(architecture_name).logical().items():
            logical.setdefault(tensor, set()).add(frozenset(axes))
    for made in spec.derived.values():
        for text in made.of.values():
            ((tensor, axes),) = layout.parse(text).axes.items()
            assert {*axes, *made.index} in logical[tensor], f"{name}: {text}"
    logical |= {tensor: {frozenset({*made.index, *made.axes})} for tensor, made in spec.derived.items()}
    for pattern, rule in spec.rules():
        for tensor, axes in rule.parsed.axes.items():
            if tensor not in logical and tensor.startswith(tuple(repeat.prefix for repeat in spec.repeats)):
                continue  # what no family has a second time
            here = {*axes, *(axis for axis, *_ in named_axes(pattern))}
            assert here in logical[tensor], f"{name}: {pattern} has {tensor} over {here}"


def test_mistakes_in_derived_tensors_are_listed() -> None:
    data = catalog.format_spec("trtllm").source()
    assert data is not None
    parts = {"query": "[q: a | v: b] c", "key": "k: layer nope", "other": "(("}
    wrong = {"codec": "absorb", "of": parts, "index": ["layer"], "axes": ["c"]}
    with pytest.raises(SpecError) as error:
        catalog.build({**data, "derived": {"made": wrong}}, "trtllm.yaml")
    text = "\n".join(error.value.details)
    assert "derived.made.query: a part is one tensor" in text
    assert "derived.made.key: a part is one tensor" in text
    assert "derived.made.other: expected ')'" in text


# The JSON Schema for editors


@pytest.mark.parametrize("model", [ArchitectureSpec, FormatSpec])
def test_the_schema_is_json_and_knows_every_key(model: type[ArchitectureSpec] | type[FormatSpec]) -> None:
    schema = json.loads(json.dumps(model.model_json_schema()))
    assert schema["properties"].keys() == model.model_fields.keys()
    assert schema["additionalProperties"] is False
    definitions = schema["$defs"]
    assert all(definition.get("additionalProperties") is False for definition in definitions.values())
    assert definitions["Rule"]["properties"].keys() == Rule.model_fields.keys()


def test_one_schema_covers_both_kinds_of_spec() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["discriminator"]["propertyName"] == "kind"
    assert set(schema["discriminator"]["mapping"]) == {"architecture", "format"}


def test_the_schema_describes_every_field() -> None:
    for model in (ArchitectureSpec, FormatSpec):
        schema = model.model_json_schema()
        for name, part in {model.__name__: schema, **schema["$defs"]}.items():
            for field, entry in part["properties"].items():
                assert "description" in entry, f"{name}.{field}"


def test_layouts_of_the_built_in_specs_print_as_they_parse() -> None:
    specs = [catalog.architecture(a) for a in ARCHITECTURES] + [catalog.format_spec(f) for f in FORMATS]
    for spec in specs:
        for _, rule in spec.rules():
            assert layout.parse(str(rule.parsed)) == rule.parsed


def test_a_tie_of_nothing_is_a_mistake() -> None:
    assert "nothing" in problems(architecture(tied=[{"tensor": "nothing", "to": "embedding", "when": "tied"}]))[0]


@pytest.mark.parametrize("name", ["old", "old.{layer}.{hidden}"])
def test_another_name_with_other_axes_is_a_mistake(name: str) -> None:
    assert name in problems(architecture(tensors={"w.{layer}": {"layout": "w: ffn", "aliases": [name]}}, tied=[]))[0]


def test_one_tensor_over_two_sets_of_axes_is_a_mistake() -> None:
    assert "w" in problems(architecture(tensors={"a": "w: hidden", "b": "w: ffn"}, tied=[]))[0]


def test_a_dimension_in_the_name_and_in_the_layout_is_a_mistake() -> None:
    assert "ep" in problems(format_(parallel=["ep"], tensors={"w.{e@ep}": "w: a@ep"}))[0]


def test_replicating_over_an_unknown_dimension_is_a_mistake() -> None:
    assert "xp" in problems(format_(replicate={"xp": ["group"]}))[0]


def test_mistakes_of_different_kinds_are_reported_at_once() -> None:
    found = "\n".join(problems(architecture(tensors={"a": "a: (b", "c": "c: d", "e.{": "e: hidden"}, tied=[])))
    assert "expected ')'" in found and "axis 'd'" in found and "brace" in found

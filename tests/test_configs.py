"""config.json as it is on disk: what absent fields mean, both spellings of rotary embeddings, and fields nobody reads.

What is expected comes from the config classes of transformers: a document means what its class makes of it.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.configuration_utils import remap_legacy_layer_types

import registry
from registry import catalog, defaults
from registry.config_rules import ConfigMap, FactMap
from registry.model import loose_facts, read_facts, write_document
from registry.specs import ArchitectureSpec
from tests.conftest import HF_MODELS
from tests.families import FAMILIES, MEGATRON
from tests.test_schema import architecture

# A spec without a class of its own takes no defaults from transformers; its published files say everything.
KNOWN = [name for name in catalog.names("architecture") if name in CONFIG_MAPPING]
Document = dict[str, Any]
ABSENT: Any = object()
RELEASED = {
    path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "released").glob("*.json"))
}


def of_class(model_type: str, /, **fields: Any) -> Document:
    """The whole config that transformers' class makes of these fields, in the spelling of this transformers."""
    made = CONFIG_MAPPING[model_type](**copy.deepcopy(fields)).to_dict()
    assert isinstance(made, dict)
    return made


def facts(document: Document, spec: ArchitectureSpec) -> Document:
    """What the document says and its class adds."""
    return comparable(defaults.hub_facts(document, spec)[0], spec)


def said(document: Document, spec: ArchitectureSpec) -> Document:
    """The facts of a document that says everything."""
    return comparable(read_facts(document, spec.config), spec)


def comparable(found: Document, spec: ArchitectureSpec) -> Document:
    """Facts but for nulls and those that may differ, with types of layers in the words of this transformers."""
    loose = loose_facts(spec.config)
    kept = {name: value for name, value in found.items() if name not in loose and value is not None}
    return {k: remap_legacy_layer_types(v) if isinstance(v, list) else v for k, v in kept.items()}


def leaves(document: Document, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field, tables and what is in them."""
    for name, value in document.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from leaves(value, (*above, name))


def without(document: Document, path: tuple[str, ...]) -> Document:
    """The document less one field."""
    left = copy.deepcopy(document)
    inner = left
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return left


# --- What absent fields mean ------------------------------------------------------------------------------------------


def default_facts() -> Iterator[Any]:
    for name in KNOWN:
        for fact, entry in catalog.architecture(name).config.facts.items():
            if "default" in entry.model_fields_set and entry.read is None:
                yield pytest.param(name, entry, id=f"{name}-{fact}")


@pytest.mark.parametrize(("name", "entry"), list(default_facts()))
def test_a_default_of_a_spec_is_that_of_the_class(name: str, entry: FactMap) -> None:
    config = CONFIG_MAPPING[name]()
    for path in entry.field:
        value: Any = config
        for step in path.split("."):
            value = value.get(step) if isinstance(value, dict) else getattr(value, step, None)
        if value is not None:
            assert next((fact for fact, stored in entry.values if stored == value), value) == entry.default
            return
    # either the default is none, or the field is one that this transformers has no use for and publishers write
    assert entry.default is None or not any(hasattr(config, path.split(".")[0]) for path in entry.field)


# Fields that a class has, by the last part of their names, and that no fact is read from: what a conversion says about
# one that is not as usual is the test of `lost_fields`.
UNREAD = {
    "is_decoder", "add_cross_attention", "use_bidirectional_attention", "time_step_limit", "moe_latent_size",
    "mtp_layers_block_type", "moe_norm_min", "_sliding_window_pattern", "vision_config", "mm_tokens_per_image",
    "dense_act_fn", "is_gated_act",  # T5's class takes both from feed_forward_proj
}  # fmt: skip
# What follows from another field, or what other classes with the same base have.
DERIVED = {
    "deepseek_v2": ["mlp_bias"], "gpt_bigcode": ["num_key_value_heads"], "llama4": ["layer_types"],
    "llama4_text": ["layer_types"], "nemotron_h": ["num_nextn_predict_layers"],
    "olmo3": ["rope_parameters.sliding_attention"],
}  # fmt: skip
# Names in published files that their classes have not, or not any more.
PUBLISHED = {
    "n_layer", "n_head", "n_head_kv", "d_model", "sliding_window_size", "use_sliding_window", "max_window_layers",
    "mtp_num_hidden_layers", "num_nextn_predict_layers", "rope_percent", "rope_pct", "rms_norm_eps",
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_every_field_of_the_class_is_read(name: str) -> None:
    spec = catalog.architecture(name)
    neutral = [*spec.config.neutral, *catalog.format_spec("huggingface").config.neutral, *spec.config.usual]
    neutral += ["*.rope_type", "id2label.*", *(f"*{field}" for field in [*UNREAD, *DERIVED.get(name, [])])]
    if name == "mpt":  # a config of its own inside, with the fields that every config has
        neutral += [f"attn_config.{field}" for field in PretrainedConfig().to_dict()]
    assert [path for path in defaults.unread_fields(of_class(name), spec.config, neutral) if path not in neutral] == []


@pytest.mark.parametrize("name", KNOWN)
def test_every_fact_is_read_from_fields_that_there_are(name: str) -> None:
    """Of the class, as it is or was, or of a published file."""
    spec = catalog.architecture(name)
    published = [document for document in RELEASED.values() if document["model_type"] == name]
    there = {".".join(map(str, path)) for document in (of_class(name), *published) for path in leaves(document)}
    there = {path.removeprefix(f"{spec.config.within}.") for path in there}
    words = source_words(type(CONFIG_MAPPING[name]().get_text_config()))
    for fact, entry in spec.config.facts.items():
        read = {*entry.field, *defaults.paths(entry)}
        assert {path.split(".")[-1] for path in read - there} <= words | PUBLISHED, fact


@cache
def source_words(config: type) -> set[str]:
    """Every word in the source of a config class and its bases, and of transformers' module for rotary embeddings."""
    modules = {sys.modules[base.__module__].__file__ for base in config.__mro__ if base.__module__.startswith("tr")}
    files = [Path(file) for file in (*modules, transformers.modeling_rope_utils.__file__) if file]
    return {word for file in files for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}


def families() -> Iterator[Any]:
    for name, family in FAMILIES.items():
        known = family.architecture in KNOWN
        skip = pytest.mark.skip(reason="no architecture spec yet, or none of transformers")
        yield pytest.param(family.architecture, family.config, id=name, marks=() if known else skip)


def windowed() -> Iterator[Any]:
    """A config with sliding windows, of each class that can have them."""
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    for name in (name for name in KNOWN if "use_sliding_window" in of_class(name)):
        own = {field: value for field, value in windows.items() if field in of_class(name)}
        yield pytest.param(name, {**FAMILIES[name].config, **own}, id=f"{name}-windows")


def class_of(spec: ArchitectureSpec, config: Document) -> str:
    """The model type of a config: that of the spec, or of the part of such a model."""
    part: str = CONFIG_MAPPING[spec.name]().get_text_config().model_type
    return spec.name if spec.config.within is None or spec.config.within in config else part


@pytest.mark.parametrize(
    ("name", "config"), [*(pytest.param(name, {}, id=f"{name}-nothing") for name in KNOWN), *families()]
)
def test_a_document_without_a_field_means_what_the_class_makes_of_it(name: str, config: Document) -> None:
    spec = catalog.architecture(name)
    of = class_of(spec, config) if config else name
    whole = of_class(of, **config)
    asked = 0
    for path in leaves(whole):
        if path[-1] == "original_max_position_embeddings":
            continue  # part of a scaling; where it lacks it, that of the model, which is another fact
        document = without(whole, path)
        try:
            meant = of_class(of, **document)
        except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError, StrictDataclassError):
            continue  # a document that its own class refuses means nothing
        assert facts(document, spec) == said(meant, spec), path
        asked += 1
    assert asked > len(whole) // 2


#: (class, field) of nulls that no release says and that stand for values of the class.
NULLS = {("exaone4", "layer_types"), ("gpt_oss", "rope_parameters")}


@pytest.mark.parametrize("name", KNOWN)
def test_a_null_means_what_the_class_makes_of_it(name: str) -> None:
    spec, whole = catalog.architecture(name), of_class(name)
    for field in whole:
        document = {**whole, field: None}
        try:
            meant = of_class(name, **document)
        except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError, StrictDataclassError):
            continue
        assert (facts(document, spec) == said(meant, spec)) == ((name, field) not in NULLS), field


@pytest.mark.parametrize(("name", "config"), list(families()))
def test_a_document_that_says_only_what_is_special(name: str, config: Document) -> None:
    spec = catalog.architecture(name)
    of = class_of(spec, config)
    config = {**config, "model_type": of}
    assert facts(config, spec) == said(of_class(of, **config), spec)


#: Spellings that are written as they were before transformers 5, which reads them too.
EARLIER = {
    "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "rotary_emb_base", "rotary_pct", "torch_dtype",
    "num_experts", "rope_scaling",
}  # fmt: skip


@pytest.mark.parametrize(("name", "config"), [*families(), *windowed()])
def test_a_config_that_is_written_is_one_that_the_class_reads(name: str, config: Document) -> None:
    """Of facts alone, as other formats have them: in the class's own names, and it makes the same facts of it."""
    spec = catalog.architecture(name)
    whole = of_class(class_of(spec, config), **config)
    found = {**spec.facts, **read_facts(whole, spec.config), "dtype": "bfloat16"}
    if found.get("full_attention_layers") is None:  # only there with a window
        found.pop("full_attention_layers", None)
    written = write_document(found, spec.config, found, {})
    again = of_class(str(written["model_type"]), **{k: v for k, v in written.items() if k != "model_type"})
    assert said(again, spec) == said(whole, spec)
    assert {path.split(".")[0] for path in spec.config.write} <= whole.keys()
    assert "bfloat16" in (again["dtype"], again.get(spec.config.within or "", {}).get("dtype"))
    if any(f.architecture == name and MEGATRON in f.formats for f in FAMILIES.values()):
        assert found["initializer_range"] == whole.get("initializer_range", whole.get("init_std")), "Megatron says it"
    there = {".".join(map(str, path)).removeprefix(f"{spec.config.within}.") for path in leaves(whole)}
    for fact, entry in spec.config.facts.items():
        named = [path for path in entry.field if path in there]
        assert not named or entry.field[0] in named or entry.field[0].split(".")[0] in EARLIER, fact


#: What classes take under other names besides.
OTHERWISE = {"nemotron_h": {"mamba_n_groups": 4, "mamba_d_conv": 3, "mamba_conv_bias": False}}


@pytest.mark.parametrize("name", OTHERWISE)
def test_other_names_mean_what_the_class_makes_of_them(name: str) -> None:
    spec = catalog.architecture(name)
    for field, value in OTHERWISE[name].items():
        assert facts({field: value}, spec) == said(of_class(name, **{field: value}), spec) != facts({}, spec), field


def test_a_document_that_says_nothing_is_the_class_default() -> None:
    spec = catalog.architecture("llama")
    found, added = defaults.hub_facts({"model_type": "llama"}, spec)
    default = transformers.LlamaConfig()
    assert (found["layers"], found["hidden_size"]) == (default.num_hidden_layers, default.hidden_size)
    assert {"layers", "hidden_size", "vocab_size"} <= set(added), "and it is said what the class adds"
    assert "norm_epsilon" not in added, "the spec itself says this one"


def test_what_a_document_says_is_left_as_it_is() -> None:
    spec = catalog.architecture("mistral")
    document = {"hidden_size": 48, "sliding_window": None, "rope_parameters": {"rope_type": "default"}}
    before = copy.deepcopy(document)
    found, added = defaults.hub_facts(document, spec)
    assert document == before
    assert found["hidden_size"] == 48
    assert found["sliding_window"] is None, "a document that says null does not mean the default"
    assert not {"hidden_size", "sliding_window"} & set(added)


def test_an_architecture_that_transformers_does_not_know_takes_no_defaults() -> None:
    spec = catalog.build(architecture(), "toy.yaml")
    assert isinstance(spec, ArchitectureSpec)
    assert defaults.hub_facts({"n_layer": 2}, spec) == ({"layers": 2}, [])


# What no fact describes, of released configs: how their weights are encoded, and towers that no other format takes.
ENCODED, TOWER = ["quantization_config"], ["vision_config"]
UNDESCRIBED = {
    "DeepSeek-V3": ENCODED, "Kimi-K2-Instruct": ENCODED, "MiniMax-M2": ENCODED, "gpt-oss-120b": ENCODED,
    "gpt-oss-20b": ENCODED, "Llama-4-Maverick-17B-128E": TOWER, "Llama-4-Scout-17B-16E": TOWER, "Qwen3.5-27B": TOWER,
    "Qwen3.5-35B-A3B": TOWER, "gemma-3-27b-pt": ["mm_tokens_per_image", *TOWER],
}  # fmt: skip
# Their published configs leave these out, and leave it to the class to say them.
LEFT_OUT = {"gemma-3-27b-pt": ["vocab_size", "attention_softcap", "logit_softcap"]}


def lost(name: str) -> list[str]:
    """The fields of a released config that a conversion to another format reports."""
    spec = catalog.architecture(RELEASED[name]["model_type"])
    neutral = [*spec.config.neutral, *catalog.format_spec("huggingface").config.neutral]
    return defaults.lost_fields(RELEASED[name], spec, neutral, spec.config.usual)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_says_all_and_loses_nothing(name: str) -> None:
    spec = catalog.architecture(RELEASED[name]["model_type"])
    assert defaults.silent_facts(RELEASED[name], spec.config) == LEFT_OUT.get(name, [])
    assert lost(name) == UNDESCRIBED.get(name, [])


def test_released_configs_are_read_without_transformers() -> None:
    """transformers is imported only where it has to be asked: that takes seconds."""
    code = (
        "import json, sys; from registry import catalog, defaults\n"
        "for document in json.load(sys.stdin):\n"
        "    spec = catalog.architecture(document['model_type'])\n"
        "    neutral = [*spec.config.neutral, *catalog.format_spec('huggingface').config.neutral]\n"
        "    defaults.hub_facts(document, spec)\n"
        "    defaults.lost_fields(document, spec, neutral, spec.config.usual)\n"
        "    assert 'transformers' not in sys.modules, document"
    )
    plain = [document for name, document in RELEASED.items() if name not in UNDESCRIBED]
    assert len(plain) > 50
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(plain), text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# --- Rotary embeddings, before transformers 5 and since ---------------------------------------------------------------

ROTARY = [name for name in KNOWN if of_class(name).get("rope_parameters")]
_ORIGINAL = {"original_max_position_embeddings": 512}
ROPES: dict[str, Document] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ORIGINAL},
    "yarn": {"rope_type": "yarn", "factor": 3.0, "beta_fast": 30.0, "beta_slow": 2.0, **_ORIGINAL},
}
# These classes take only scalings of their own, here for heads as large as their defaults.
_PHI3 = {"rope_type": "longrope", "short_factor": [1.5] * 48, "long_factor": [2.5] * 48, **_ORIGINAL}
_PHIMOE = {"rope_type": "longrope", "short_factor": [1.5] * 64, "long_factor": [2.5] * 64, **_ORIGINAL}
OWN_ROPES: dict[str, dict[str, Document]] = {
    "phi3": {"default": ROPES["default"], "longrope": _PHI3},
    "phimoe": {"default": ROPES["default"], "longrope": {**_PHIMOE, "short_mscale": 1.1, "long_mscale": 1.2}},
}
# Classes with a table for each type of layer.
PER_LAYER_TYPE = [name for name in ROTARY if "full_attention" in of_class(name)["rope_parameters"]]
PARTIAL = [name for name in ROTARY if "partial_rotary_factor" in of_class(name)["rope_parameters"]]


def historical(name: str, rope: Document) -> Document:
    """The fields that said before transformers 5 what `rope_parameters` says now."""
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    called = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"} if name == "gpt_neox" else {}
    fields = {called.get(k, k): v for k, v in rope.items() if k not in scaling}
    return {**fields, "rope_scaling": None if scaling["rope_type"] == "default" else scaling}


def both(name: str, old: Document, new: Document) -> tuple[Document, Document]:
    """Two whole documents in the two spellings, and that transformers takes them for the same."""
    rest = {k: v for k, v in of_class(name).items() if k not in ("rope_parameters", "partial_rotary_factor")}
    rest.pop("original_max_position_embeddings", None)
    assert of_class(name, **rest, **old)["rope_parameters"] == of_class(name, **rest, **new)["rope_parameters"]
    return {**rest, **old}, {**rest, **new}


def rotary() -> Iterator[Any]:
    for name in [name for name in ROTARY if name not in PER_LAYER_TYPE]:
        usual = of_class(name)["rope_parameters"]["rope_type"]
        for kind, rope in OWN_ROPES.get(name, ROPES).items():
            if kind == "default" and kind != usual:
                continue  # an absent scaling is one of its own: before transformers 5 none could not be said
            partial = kind != "longrope" and name in PARTIAL
            yield pytest.param(name, rope, (1.0, 0.75, 0.25) if partial else (None,), id=f"{name}-{kind}")


@pytest.mark.parametrize(("name", "rope", "partials"), list(rotary()))
def test_both_spellings_of_rotary_embeddings_are_the_same_facts(
    name: str, rope: Document, partials: tuple[float | None, ...]
) -> None:
    spec = catalog.architecture(name)
    seen = []
    for partial in partials:
        rope = {**rope, "rope_theta": 12345.0} | ({} if partial is None else {"partial_rotary_factor": partial})
        old, new = both(name, historical(name, rope), {"rope_parameters": rope})
        assert facts(old, spec) == facts(new, spec)
        assert facts(new, spec)["rope_theta"] == 12345.0
        if old["rope_scaling"] is not None:
            older = {**old["rope_scaling"], "type": old["rope_scaling"]["rope_type"]}
            assert facts({**old, "rope_scaling": older}, spec) == facts(new, spec), "some publishers write both"
            del older["rope_type"]
            assert facts({**old, "rope_scaling": older}, spec) == facts(new, spec), "and early ones only this"
            assert facts({**old, "rope_scaling": None}, spec) != facts(new, spec), "the scaling is seen"
        assert facts(new, spec) not in seen, "and so is the part of a head that rotates"
        seen.append(facts(new, spec))


@pytest.mark.parametrize("name", PER_LAYER_TYPE)
@pytest.mark.parametrize("kind", ROPES)
def test_both_spellings_of_rotary_embeddings_per_type_of_layer(name: str, kind: str) -> None:
    spec = catalog.architecture(name)
    local = of_class(name)["rope_parameters"]["sliding_attention"]
    new = {"full_attention": {**ROPES[kind], "rope_theta": 12345.0}, "sliding_attention": local}
    old = historical(name, new["full_attention"])
    if "rope_local_base_freq" in Path(sys.modules[CONFIG_MAPPING[name].__module__].__file__ or "").read_text():
        new["sliding_attention"] = {"rope_type": "default", "rope_theta": 77.0}
        old["rope_local_base_freq"] = 77.0
    else:  # one base for both
        new["full_attention"]["rope_theta"] = old["rope_theta"] = local["rope_theta"]
    before, after = both(name, old, {"rope_parameters": new})
    assert facts(before, spec) == facts(after, spec)
    assert facts(after, spec)["rope_theta"] == old["rope_theta"]
    assert facts(after, spec).get("rope_scaling_in") == ("full_attention" if kind != "default" else None)


# --- Documents that a class must not be trusted with ------------------------------------------------------------------

HOSTILE: dict[str, Document] = {
    "absurdly_many_layers": {"num_hidden_layers": 10**12},
    "absurdly_many_labels": {"num_labels": 10**12},
    "absurdly_many_layers_inside": {"text_config": {"num_hidden_layers": 10**12}},
    "text_for_a_number": {"num_hidden_layers": "four"},
    "a_list_for_a_table": {"rope_parameters": [1, 2]},
    "methods_replaced": {"to_dict": "no", "__post_init__": 1, "validate": None, "standardize_rope_params": {}},
    "what_the_class_is_made_of": {"__class__": "int", "__dict__": {}, "attribute_map": {"a": "b"}, "_auto_class": "x"},
    "code_of_its_own": {"auto_map": {"AutoConfig": "evil.Config"}, "_name_or_path": "https://example.invalid/x"},
    "nonsense_type": {"torch_dtype": "load", "dtype": ["float32"]},
    "layer_types_of_other_layers": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 5},
    "a_name_that_is_no_text": {7: "seven"},  # type: ignore[dict-item]
}


@pytest.mark.parametrize("document", HOSTILE.values(), ids=HOSTILE)
def test_a_class_is_asked_with_care(document: Document, capfd: pytest.CaptureFixture[str]) -> None:
    verbosity = transformers.logging.get_verbosity()
    before = copy.deepcopy(document)
    for name in KNOWN:
        made = defaults.class_config(document, name)
        assert made is None or made["model_type"] == name
        assert document == before
    assert capfd.readouterr() == ("", ""), "what a class warns of is of no use to who converts"
    assert transformers.logging.get_verbosity() == verbosity


def test_a_class_reads_no_file_and_asks_nobody(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()\nclass Config: pass\n")
    code = f"""
import os, sys
from registry import catalog, defaults
from transformers import CONFIG_MAPPING, PretrainedConfig
for name in {KNOWN!r}:
    CONFIG_MAPPING[name]()  # its module is imported
watched = ("socket.", "open", "subprocess.", "os.system", "os.exec", "urllib.", "import")
seen = []
sys.addaudithook(lambda event, args: seen.append((event, args)) if event.startswith(watched) else None)
document = {{"auto_map": {{"AutoConfig": "evil.Config"}}, "_name_or_path": "evil", "name_or_path": "org/model"}}
for name in {KNOWN!r}:
    assert defaults.class_config(document, name)
seen = [s for s in seen if s[0] != "import" or s[1][0] == "evil"]
sys.exit(str(seen) if seen else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


# --- Fields that no fact is read from ---------------------------------------------------------------------------------


def config_map(**parts: Any) -> ConfigMap:
    return ConfigMap.model_validate(parts)


def test_fields_that_no_fact_reads_are_found() -> None:
    config = config_map(
        facts={
            "layers": "n_layer",
            "theta": {"field": ["rope_theta", "rope.theta"]},
            "kv": {"read": "kv or heads if grouped else rope['full'].kv"},
            "first": {"read": "types[0]"},
        },
        write={"use_window": "window is not None"},
        constants={"model_type": "toy"},
    )
    document = {
        "n_layer": 2, "kv": 1, "heads": 2, "grouped": True, "types": ["a"], "use_window": False, "model_type": "toy",
        "rope": {"theta": 1.0, "full": {"kv": 3, "other": 4}, "partial": 0.5}, "empty": {}, "scale": None,
        "use_cache": True, "resid_dropout": 0.1, "kept": {"inside": {"deep": 1}}, "vision": {"depth": 3, "heads": 2},
    }  # fmt: skip
    found = ["rope.full.other", "rope.partial", "empty", "scale", "vision"]
    assert defaults.unread_fields(document, config, ["use_*", "*dropout", "kept"]) == found


def test_fields_may_be_in_a_part_of_the_document() -> None:
    config = config_map(facts={"layers": "n_layer", "tied": "tie"}, within="text")
    document = {"tie": True, "text": {"n_layer": 2, "use_cache": True, "scale": 2.0}, "vision": {"n_layer": 3}}
    assert defaults.unread_fields(document, config, ["use_cache"]) == ["text.scale", "vision"]
    assert defaults.silent_facts(document, config) == []
    assert defaults.silent_facts({"text": {"tie": False}, "vision": {"n_layer": 3}}, config) == ["layers"]


@pytest.mark.parametrize(("whole", "part"), [("gemma3", "gemma3_text"), ("llama4", "llama4_text")])
def test_the_class_of_a_part_is_asked_about_it(whole: str, part: str) -> None:
    facts_of_text = {"layers": "num_hidden_layers", "types": "layer_types", "width": "hidden_size"}
    data = {
        "kind": "architecture",
        "axes": {"layer": "layers"},
        "config": {"facts": facts_of_text, "within": "text_config"},
    }
    text = {"num_hidden_layers": 3, "model_type": part}
    expected = of_class(part, num_hidden_layers=3)
    for name in (whole, part):
        spec = catalog.build({**data, "name": name}, "toy.yaml")
        assert isinstance(spec, ArchitectureSpec)
        for document in (text, {"model_type": whole, "text_config": text}):
            found, added = defaults.hub_facts(document, spec)
            assert found == {"layers": 3, "types": expected["layer_types"], "width": expected["hidden_size"]}
            assert added == ["types", "width"]
        # a part that does not say what it is, under the name of the whole: its class must not be asked
        assert defaults.hub_facts({"num_hidden_layers": 3}, spec)[0].get("types") in (None, expected["layer_types"])
        document = {"model_type": whole, "text_config": {**text, "layer_types": expected["layer_types"], "odd": 1}}
        assert defaults.lost_fields(document, spec, ["model_type"], {}) == ["text_config.odd"]


def test_a_table_that_is_read_as_a_whole_is_looked_into() -> None:
    """`omit(rope, 'theta')` takes the whole table, but an expression that drops it drops what is inside."""
    scaling = {"read": "omit(rope, 'theta') if rope and rope.kind != 'default' else None"}
    config = config_map(facts={"theta": "rope.theta", "scaling": scaling})
    plain = {"rope": {"theta": 1.0, "kind": "default", "partial": 0.5}}
    assert defaults.unread_fields(plain, config, []) == ["rope.partial"]
    assert defaults.unread_fields({"rope": {**plain["rope"], "kind": "linear"}}, config, []) == []


def test_a_field_that_a_fact_cannot_do_without_is_read() -> None:
    config = config_map(facts={"width": {"read": "max(sizes.a, sizes.b)"}, "sizes": {"read": "len(sizes)"}})
    assert defaults.unread_fields({"sizes": {"a": 1, "b": 2}}, config, []) == []


def test_only_what_differs_from_the_class_is_lost() -> None:
    spec = catalog.architecture("llama")
    usual = of_class("llama", hidden_size=64, rms_norm_eps=1e-3)
    neutral = ["id2label", "label2id"]
    assert defaults.lost_fields(usual, spec, neutral, {}) == [], "defaults of the class are no loss"
    # is_decoder is no field of this class: what it is when absent is not known, and false is taken for absent
    document = {**usual, "logit_scale": 0.0625, "is_decoder": False, "pretraining_tp": 2, "hidden_act": "relu"}
    assert defaults.lost_fields(document, spec, neutral, {}) == ["pretraining_tp", "logit_scale"]
    assert defaults.lost_fields(document, spec, [*neutral, "pretraining_*"], {}) == ["logit_scale"]
    assert defaults.lost_fields(document, spec, neutral, {"pretraining_tp": 2, "logit_scale": 1.0}) == ["logit_scale"]
    document["pretraining_tp"], document["use_cache"] = 1, None
    assert defaults.lost_fields(document, spec, neutral, {}) == ["use_cache", "logit_scale"], "null is not the default"


def test_what_a_class_derives_is_not_lost() -> None:
    """transformers 5 writes the types of all layers, which follow from other fields where they are absent."""
    derived = of_class("qwen2", num_hidden_layers=3)["layer_types"]
    spec = catalog.build(
        {"kind": "architecture", "name": "qwen2", "axes": {"layer": "layers"},
         "config": {"facts": {"layers": "num_hidden_layers"}}}, "toy.yaml",
    )  # fmt: skip
    assert isinstance(spec, ArchitectureSpec)
    document = {"num_hidden_layers": 3, "layer_types": derived}
    assert defaults.lost_fields(document, spec, [], {}) == []
    document["layer_types"] = [*derived[:2], "sliding_attention"]
    assert defaults.lost_fields(document, spec, [], {}) == ["layer_types"]


# --- What a conversion says about it ----------------------------------------------------------------------------------


def changed(folder: Path, source: Path, **fields: Any) -> Path:
    """A copy of a model with other fields in its config.json; ABSENT takes one away."""
    shutil.copytree(source, folder)
    config = {**json.loads((folder / "config.json").read_text()), **fields}
    config = {name: value for name, value in config.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("to", ["huggingface", "megatron", "megatron-legacy", "trtllm"])
def test_a_conversion_says_which_fields_have_no_place(to: str, tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    special = {"logit_scale": 0.0625, "residual_multiplier": 0.22, "attention_dropout": 0.5, "bos_token_id": [3]}
    model = changed(tmp_path / "model", hf_model("llama3"), **special)
    report = registry.convert(model, tmp_path / "there", to=to)
    told = [note for note in report.notes if "config fields" in note]
    assert all(f"{to}'s own config has no place for: logit_scale, residual_multiplier (" in note for note in told)
    assert len(told) == (to != "huggingface")
    registry.convert(tmp_path / "there", tmp_path / "back", to="huggingface")
    assert (tmp_path / "back/config.json").read_bytes() == (model / "config.json").read_bytes()


@pytest.mark.parametrize("name", HF_MODELS)
def test_ordinary_models_lose_no_field(name: str, tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    report = registry.convert(hf_model(name), tmp_path / "there", to="megatron")
    assert not [note for note in report.notes if "config fields" in note or "silent" in note]


def test_a_conversion_says_what_it_takes_from_the_class(tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    usual = registry.convert(hf_model("mistral"), tmp_path / "usual", to="megatron").notes
    model = changed(tmp_path / "model", hf_model("mistral"), sliding_window=ABSENT, vocab_size=ABSENT)
    with pytest.raises(registry.MappingError, match=r"\(32000, 64\)"):  # what the class has is not what the file has
        registry.convert(model, tmp_path / "there", to="megatron")
    model = changed(tmp_path / "other", hf_model("mistral"), sliding_window=ABSENT)
    (note,) = set(registry.convert(model, tmp_path / "there", to="megatron").notes) - set(usual)
    assert "silent about sliding_window" in note


def test_a_guess_takes_nothing_from_a_class(tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    """Every class has defaults: with them, a config without sizes would be that of any model."""
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    model = changed(tmp_path / "model", hf_model("llama3"), model_type=ABSENT, **dict.fromkeys(sizes, ABSENT))
    with pytest.raises(registry.DetectionError, match="the config says nothing about num_hidden_layers"):
        registry.open(model)

"""Registering specs: from files, plain data and models; extending one another; and files that are not to be trusted."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from registry import catalog
from registry.errors import RegistryError, SpecError
from registry.specs import ArchitectureSpec
from tests.test_schema import architecture, format_


@pytest.fixture(autouse=True)
def _own_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers ends with it."""
    for name in ("_registered", "_containers", "_codecs"):
        monkeypatch.setattr(catalog, name, dict(getattr(catalog, name)))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """`write(text)`: a spec file with this content."""

    def make(text: str | bytes) -> Path:
        path = tmp_path / "spec.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


TOY = """
kind: architecture
name: toy
axes: {hidden: size}
config: {facts: {size: n_embd}}
tensors:
  embed: "embedding: hidden"
"""


# Finding and registering


def test_the_built_in_specs_are_known() -> None:
    assert {"llama", "mistral", "qwen2", "qwen3", "gpt2"} <= set(catalog.names("architecture"))
    assert {"huggingface", "megatron", "megatron-legacy", "trtllm"} <= set(catalog.names("format"))
    assert catalog.names("format") == sorted(catalog.names("format"))


def test_an_unknown_name_lists_what_is_known() -> None:
    with pytest.raises(SpecError) as caught:
        catalog.architecture("lama")
    assert "unknown architecture 'lama'" in str(caught.value) and "llama" in str(caught.value)
    with pytest.raises(SpecError, match="unknown format 'hf'"):
        catalog.format_spec("hf")
    with pytest.raises(SpecError, match="unknown container 'zip'"):
        catalog.container("zip")
    with pytest.raises(SpecError, match="unknown codec 'gzip'"):
        catalog.codec("gzip")


def test_a_spec_is_registered_from_a_file_from_data_and_from_a_model(write: Callable[[str], Path]) -> None:
    assert catalog.register(write(TOY)) == "toy"
    from_file = catalog.architecture("toy")
    assert catalog.register(str(write(TOY))) == "toy"
    assert catalog.architecture("toy") == from_file
    assert catalog.register(from_file.model_copy(update={"name": "toy2"})) == "toy2"
    assert catalog.register(architecture(name="toy3")) == "toy3"
    assert {"toy", "toy2", "toy3"} <= set(catalog.names("architecture"))


def test_the_last_spec_of_a_name_counts() -> None:
    catalog.register(architecture(description="first"))
    catalog.register(architecture(description="second"))
    assert catalog.architecture("toy").description == "second"
    assert catalog.names("architecture").count("toy") == 1


def test_a_format_and_an_architecture_may_share_a_name() -> None:
    catalog.register(architecture(name="both"))
    catalog.register(format_(name="both"))
    assert catalog.architecture("both").kind == "architecture"
    assert catalog.format_spec("both").kind == "format"


def test_a_wrong_spec_is_not_registered(write: Callable[[str], Path]) -> None:
    path = write(TOY.replace("embedding: hidden", "embedding: hiden"))
    with pytest.raises(SpecError) as caught:
        catalog.register(path)
    assert str(path) in str(caught.value) and "embed: axis 'hiden' of embedding is not declared" in str(caught.value)
    assert "toy" not in catalog.names("architecture")


@pytest.mark.parametrize("kind", [None, "model", 5])
def test_a_spec_says_what_it_is(kind: Any) -> None:
    with pytest.raises(SpecError, match="kind: architecture or format"):
        catalog.register(architecture(kind=kind))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(SpecError, match="no such spec file"):
            catalog.register(path)


def test_a_codec_and_a_container_must_be_known() -> None:
    spec = format_(tensors={"w": {"layout": "w: hidden", "codec": "negated"}})
    with pytest.raises(SpecError, match="unknown codecs"):
        catalog.register(spec)
    with pytest.raises(SpecError, match="unknown container 'tape'"):
        catalog.register(format_(container="tape"))
    assert "toyfmt" not in catalog.names("format")
    catalog.register_codec(catalog.Codec("negated", torch.neg, torch.neg))
    assert catalog.register(spec) == "toyfmt"
    catalog.register_container("tape", catalog.container("huggingface"))
    assert catalog.register(format_(container="tape")) == "toyfmt"


# Extending


def test_what_extends_has_all_that_it_does_not_change() -> None:
    base = catalog.architecture("llama")
    catalog.register({"kind": "architecture", "name": "cousin", "extends": "llama"})
    cousin = catalog.architecture("cousin")
    assert cousin.tensors == base.tensors and cousin.axes == base.axes and cousin.config == base.config


def test_mappings_merge_scalars_replace_and_null_removes() -> None:
    catalog.register(
        {
            "kind": "architecture",
            "name": "cousin",
            "extends": "llama",
            "facts": {"gated": False},
            "config": {"facts": {"rope_scaling": None}, "constants": {"architectures": ["Cousin"]}},
            "tensors": {
                "model.norm.weight": None,
                "lm_head.weight": "output.weight: hidden vocab",
                "model.extra": "extra: hidden",
            },
        }
    )
    base, cousin = catalog.architecture("llama"), catalog.architecture("cousin")
    assert cousin.facts == {**base.facts, "gated": False}
    assert set(base.config.facts) - set(cousin.config.facts) == {"rope_scaling"}
    assert cousin.config.constants == {**base.config.constants, "architectures": ["Cousin"]}
    assert set(base.tensors) - set(cousin.tensors) == {"model.norm.weight"}
    assert cousin.logical()["output.weight"] == ("hidden", "vocab")
    assert "extra" in cousin.logical()


def test_a_mapping_adds_to_a_rule_that_was_only_a_layout() -> None:
    catalog.register(
        {
            "kind": "architecture",
            "name": "cousin",
            "extends": "llama",
            "tensors": {
                "model.norm.weight": {"offset": 1.0},
                "lm_head.weight": {"layout": "output.weight: hidden vocab"},
            },
        }
    )
    (norm,) = catalog.architecture("cousin").tensors["model.norm.weight"]
    assert (norm.layout, norm.offset) == ("final_norm.weight: hidden", "1.0")
    (head,) = catalog.architecture("cousin").tensors["lm_head.weight"]
    assert head.layout == "output.weight: hidden vocab"


def test_a_registered_spec_can_be_extended() -> None:
    catalog.register(architecture(name="parent"))
    catalog.register(
        {
            "kind": "architecture",
            "name": "child",
            "extends": "parent",
            "tensors": {"new": "new: hidden", "head": None},
            "tied": [],
        }
    )
    assert set(catalog.architecture("child").tensors) == {"embed", "h.{layer}.up", "new"}


def test_a_registered_spec_may_take_the_name_of_the_one_that_it_extends() -> None:
    catalog.register({"kind": "architecture", "name": "llama", "extends": "llama", "description": "mine"})
    assert catalog.architecture("llama").description == "mine"
    assert catalog.architecture("llama").axes["hidden"] == "hidden_size"


@pytest.mark.parametrize("parent", ["nobody", "trtllm", 5])
def test_extending_what_there_is_not(parent: Any) -> None:
    with pytest.raises(SpecError, match="extends"):
        catalog.register(architecture(extends=parent))


@pytest.mark.parametrize("circle", [["a"], ["a", "b"], ["a", "b", "c"]], ids=len)
def test_a_circle_is_an_error_that_shows_it(circle: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {}
    for name, parent in zip(circle, circle[1:] + circle[:1], strict=True):
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(TOY.replace("name: toy", f"name: {name}\nextends: {parent}"))
    monkeypatch.setattr(catalog, "_files", lambda kind: files if kind == "architecture" else {})
    with pytest.raises(SpecError, match="in a circle") as caught:
        catalog.register({"kind": "architecture", "name": "outside", "extends": "a"})
    assert caught.value.found == " -> ".join([*circle, "a"])


def test_a_mapping_adds_to_a_rule_of_a_registered_parent() -> None:
    catalog.register(architecture(name="parent"))
    catalog.register(
        {"kind": "architecture", "name": "child", "extends": "parent", "tensors": {"head": {"offset": 1.0}}}
    )
    (rule,) = catalog.architecture("child").tensors["head"]
    assert (rule.layout, rule.offset) == ("output: hidden", "1.0")


@pytest.mark.parametrize("change", [{"default": 4}, {"field": "depth", "default": 4}])
def test_a_mapping_adds_to_a_fact_that_was_only_a_field(change: dict[str, Any]) -> None:
    catalog.register({"kind": "architecture", "name": "c", "extends": "llama", "config": {"facts": {"layers": change}}})
    fact = catalog.architecture("c").config.facts["layers"]
    assert (fact.field, fact.default) == ([change.get("field", "num_hidden_layers")], 4)


# Files that are not to be trusted


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (TOY + "name: again\n", "duplicate key 'name'"),
        (TOY.replace("{hidden: size}", "{hidden: size, hidden: 5}"), "duplicate key 'hidden'"),
        (TOY + "x: &anchor [1]\ny: *anchor\n", "aliases are not allowed"),
        (TOY + "facts: {<<: {a: 1}}\n", "could not determine a constructor"),
        (TOY + "x: !!python/object/apply:os.system ['touch pwned']\n", "could not determine a constructor"),
        (TOY + "x: !!python/name:os.system\n", "could not determine a constructor"),
        (TOY + "x: !mine 1\n", "could not determine a constructor"),
        ("[" * 20000, "recursion"),
        (TOY.encode("utf-16"), "codec can't decode"),
        (b"\xff\xfe", "codec can't decode"),
        (TOY + "x: \0\n", "characters are not allowed"),
        (TOY + "---\n" + TOY, "expected a single document"),
        (TOY + "? [a]\n: 1\n", "unhashable key"),
        ("a: [\n", "while parsing"),
        ("\ta: 1", "cannot start any token"),
        ("", "one mapping"),
        ("- a\n", "one mapping"),
        ("text", "one mapping"),
    ],
    ids=lambda value: repr(value[-24:]) if isinstance(value, str | bytes) else None,
)
def test_a_file_that_is_no_plain_mapping_is_refused(
    text: str | bytes,
    problem: str,
    write: Callable[[str | bytes], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(text)
    with pytest.raises(SpecError) as caught:
        catalog.register(path)
    assert str(path) in str(caught.value) and problem in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_a_bomb_of_aliases_ends_at_once(write: Callable[[str], Path]) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)]
    with pytest.raises(SpecError, match="aliases are not allowed"):
        catalog.register(write("\n".join(lines)))


def test_a_huge_file_is_refused_unread(write: Callable[[str], Path]) -> None:
    comment = "#" * (catalog.MAX_SPEC_BYTES - len(TOY))
    assert catalog.register(write(TOY + comment)) == "toy"
    with pytest.raises(SpecError, match=f"at most {catalog.MAX_SPEC_BYTES} bytes"):
        catalog.register(write(TOY + comment + "#"))


NO_SPECS: dict[str, Any] = {
    "a list as kind": architecture(kind=["architecture"]),
    "a list to extend": architecture(extends=["llama"]),
    "a number": 5,
    "nothing": None,
}
BAD_SCALARS = {
    "date": "kind: architecture\nname: 2020-13-45\n",
    "int": "kind: architecture\nname: !!int x\n",
    "bool": "kind: architecture\nname: !!bool x\n",
    "timestamp": "kind: architecture\nname: !!timestamp x\n",
}


@pytest.mark.parametrize("data", NO_SPECS.values(), ids=NO_SPECS)
def test_what_cannot_be_a_spec_is_an_error_of_ours(data: Any) -> None:
    with pytest.raises(RegistryError):
        catalog.register(data)


@pytest.mark.parametrize("text", BAD_SCALARS.values(), ids=BAD_SCALARS)
def test_a_scalar_that_is_not_what_its_tag_says_is_an_error_of_ours(text: str, write: Callable[[str], Path]) -> None:
    with pytest.raises(SpecError):
        catalog.register(write(text))


# Packages that bring specs


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """Two directories that stand where installed packages with specs would."""
    directories = (tmp_path / "one", tmp_path / "two")
    for directory in directories:
        (directory / "architectures").mkdir(parents=True)
    monkeypatch.setattr(catalog, "_directories", lambda: directories)
    catalog._files.cache_clear()
    catalog._load.cache_clear()
    yield directories
    catalog._files.cache_clear()
    catalog._load.cache_clear()


def test_specs_of_a_package_are_found_by_file_name(packages: tuple[Path, Path]) -> None:
    (packages[1] / "architectures/toy.yaml").write_text(TOY)
    assert catalog.names("architecture") == ["toy"]
    assert isinstance(catalog.architecture("toy"), ArchitectureSpec)


def test_two_packages_with_one_name_are_an_error_that_names_both(packages: tuple[Path, Path]) -> None:
    for directory in packages:
        (directory / "architectures/toy.yaml").write_text(TOY)
    with pytest.raises(SpecError, match="two architecture specs are called 'toy'") as caught:
        catalog.names("architecture")
    assert all(str(directory) in str(caught.value) for directory in packages)


def test_a_file_is_named_after_its_spec(packages: tuple[Path, Path]) -> None:
    (packages[0] / "architectures/other.yaml").write_text(TOY)
    with pytest.raises(SpecError, match="a spec file is named after its spec"):
        catalog.architecture("other")

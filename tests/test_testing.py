"""`registry.testing` in a third party's hands: a package of its own passes, and each fault fails the right test."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import registry
from registry.layout import parse
from registry.testing import small_config, strategies
from registry.testing.damage import damaged
from registry.testing.models import is_exact, takes

CONTAINER = '''
"""One file of all bytes and one of JSON. `fault` is what a careless author gets wrong."""
import json, time
from registry.errors import CheckpointError
from registry.dtypes import ITEMSIZE
from registry.storage import FilePlan, Laid, Opened, Piece, slot_bytes

class Container:
    fault = None

    def detect(self, path):
        return (path / f"{type(self).__name__}.json").is_file()

    def open(self, path, spec_name):
        head, data = path / f"{type(self).__name__}.json", path / "weights.bin"
        try:
            said = json.loads(head.read_text())
            pieces = [Piece(name, dtype, tuple(shape), 0, begin) for name, dtype, shape, begin in said["tensors"]]
            size = data.stat().st_size
            assert sum(slot_bytes(piece) for piece in pieces) == size
            for piece in pieces:
                assert all(type(n) is int and n >= 0 for n in (*piece.shape, piece.begin)) and type(piece.name) is str
                assert piece.begin + slot_bytes(piece) <= size
            config, manifest = dict(said["config"]), dict(said["manifest"])
            side = {p.name: p for p in (path / "side").glob("*")}
        except Exception as error:
            if self.fault == "crashes":
                raise
            raise CheckpointError("not ours", where=head, expected="what we wrote", found=repr(error)) from None
        opened = Opened(path, spec_name, [data], pieces, config, hub_config=config, side_files=side)
        opened.architecture = config.get("model_type")
        opened.state["variants"] = manifest.get("variants")
        return opened

    def lay_out(self, request):
        at, places, said = 0, [], []
        for slot in request.slots:
            places.append((0, at))
            said.append([slot.name, slot.dtype, list(slot.shape), at])
            at += slot_bytes(slot)
        if self.fault == "mixes up":  # tensors of one size
            sizes = [slot_bytes(slot) for slot in request.slots]
            i, j = next((i, j) for i in range(len(sizes)) for j in range(i) if sizes[i] == sizes[j])
            places[i], places[j] = places[j], places[i]
        head = {"config": request.hub_config, "manifest": json.loads(request.manifest), "tensors": said}
        if self.fault == "clock":
            head["written"] = time.time_ns()
        copies = {f"side/{name}": path for name, path in request.side_files.items() if self.fault != "forgets"}
        small = {f"{type(self).__name__}.json": json.dumps(head).encode()}
        return Laid([FilePlan("weights.bin", at, [])], places, small, copies)

class Crashing(Container):
    fault = "crashes"

class Mixing(Container):
    fault = "mixes up"

class Clock(Container):
    fault = "clock"

class Forgetful(Container):
    fault = "forgets"
'''
FORMAT = "kind: format\nname: {name}\ndescription: a third party's\ncontainer: {name}\nrules_from: architecture\n"
MAPPING = """
kind: architecture
name: {name}
extends: llama
config:
  facts: {{layers: depth}}
  constants: {{model_type: {name}, architectures: [AcmeForCausalLM]}}
formats: null
"""
#: Formats -> the classes of their containers: one that is right, and those with faults.
GOOD = {"acme": "Container"}
BAD = {"crashing": "Crashing", "mixing": "Mixing", "clock": "Clock", "forgetful": "Forgetful"}
TESTS = '''
import hypothesis
hypothesis.settings.register_profile("first", phases=[hypothesis.Phase.generate], derandomize=True)  # no shrinking
hypothesis.settings.load_profile("first")
from registry.testing import FormatTests, MappingTests, small_config

class TestAcme(FormatTests):
    format = "acme"
    architectures = {"acme_model": small_config("acme_model")}

class Mapping(MappingTests):
    formats = ("huggingface", "dcp", "megatron", "megatron-legacy", "acme")
    uncalled = {"*.bias": "acme has none"}

class TestModel(Mapping):
    architecture = "acme_model"

LLAMA = dict(num_hidden_layers=2, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
             intermediate_size=16, vocab_size=19, architectures=["LlamaForCausalLM"])

from registry import Parallel

class Copy(MappingTests):
    """Reads what transformers' Llama saves by a spec of another name."""
    formats = ("huggingface", "dcp", "megatron", "megatron-legacy", "acme")
    configs = {"llama": LLAMA}
    layouts = [Parallel()]

    @classmethod
    def known_configs(cls):
        return {"llama": {"model_type": cls.architecture, **LLAMA}}

    def model(self, name, folder):
        import json
        from registry.testing import transformers_model
        transformers_model({"model_type": "llama", **LLAMA}, folder)
        said = json.loads((folder / "config.json").read_text())
        said["model_type"] = self.architecture
        (folder / "config.json").write_text(json.dumps(said, indent=2, sort_keys=True))
        return folder

class TestLacksARule(Copy):
    architecture = "acme_short"

class TestMisreadsAField(Copy):
    architecture = "acme_field"

class TestHasTheWrongAxis(Copy):
    architecture = "acme_axis"
'''
BAD_TESTS = """
import hypothesis
hypothesis.settings.register_profile("first", phases=[hypothesis.Phase.generate], derandomize=True)  # no shrinking
hypothesis.settings.load_profile("first")
from registry import Parallel
from registry.testing import FormatTests, small_config

class Format(FormatTests):
    architectures = {"acme_model": small_config("acme_model")}
    layouts = [Parallel()]
    flips = 1

class TestCrashing(Format):
    format = "crashing"

class TestMixing(Format):
    format = "mixing"

class TestClock(Format):
    format = "clock"

class TestForgetful(Format):
    format = "forgetful"
"""
#: What a spec that does not fit the model fails: all that opens it.
UNFIT = {
    "test_every_tensor_is_claimed_once", "test_there_and_back", "test_every_rule_is_called_for", "test_ties",
    "test_config_fields_map_both_ways", "test_plans_are_plain_data", "test_unknown_tensors_are_refused_by_name",
    "test_missing_tensors_are_refused_by_name", "test_a_format_without_a_place_refuses",
}  # fmt: skip
#: Class -> the tests that have to fail, and no other.
GOOD_FAILS: dict[str, set[str]] = {
    "TestAcme": set(),
    "TestModel": set(),
    "TestLacksARule": UNFIT,
    "TestMisreadsAField": {"test_config_fields_map_both_ways"},
    "TestHasTheWrongAxis": UNFIT,
}
BAD_FAILS = {
    "TestCrashing": {"test_damaged_files_are_refused"},
    "TestMixing": {"test_there_and_back", "test_side_files_travel", "test_views_are_the_converted_tensors",
                   "test_random_models", "test_every_bit_pattern", "test_damaged_files_are_refused"},
    "TestClock": {"test_writes_the_same_bytes_twice", "test_overwrites_only_when_told", "test_runs_again_after_a_stop"},
    "TestForgetful": {"test_there_and_back", "test_side_files_travel", "test_random_models"},
}  # fmt: skip


def install(folder: Path, formats: dict[str, str], tests: str) -> None:
    """Make a folder an installed package with containers and specs, found by its entry points, and a file of tests."""
    (folder / "acme_formats.py").write_text(CONTAINER)
    package = folder / "acme_mappings"
    for kind in ("formats", "architectures"):
        (package / kind).mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name in formats:
        (package / "formats" / f"{name}.yaml").write_text(FORMAT.format(name=name))
    down, up = (f"model.layers.{{layer}}.mlp.{part}_proj.weight" for part in ("down", "up"))
    copied: dict[str, dict[str, Any]] = {
        "acme_short": {"tensors": {up: None}},
        "acme_field": {"config": {"facts": {"ffn_size": {"field": ["other"], "read": "intermediate_size"}}}},
        "acme_axis": {"tensors": {down: "mlp.down.weight: ffn hidden"}},
    }
    (package / "architectures" / "acme_model.yaml").write_text(MAPPING.format(name="acme_model"))
    for name, changes in copied.items():
        spec = {"kind": "architecture", "name": name, "extends": "llama", "formats": None, **changes}
        (package / "architectures" / f"{name}.yaml").write_text(json.dumps(spec))
    info = folder / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    points = "".join(f"{name} = acme_formats:{made}\n" for name, made in formats.items())
    (info / "entry_points.txt").write_text(f"[registry.formats]\n{points}\n[registry.mappings]\nacme = acme_mappings\n")
    (folder / "test_acme.py").write_text(tests)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("formats", "tests", "expected"), [(GOOD, TESTS, GOOD_FAILS), (BAD, BAD_TESTS, BAD_FAILS)], ids=["specs", "formats"]
)
def test_a_third_party_gets_the_battery(
    formats: dict[str, str], tests: str, expected: dict[str, set[str]], tmp_path: Path
) -> None:
    install(tmp_path, formats, tests)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rA", "-p", "no:cacheprovider", "test_acme.py"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    lines = re.findall(r"^(PASSED|FAILED|ERROR) test_acme\.py::(\w+)::(\w+)", found.stdout, re.M)
    assert {name for _, name, _ in lines} == set(expected), found.stdout[-2000:] + found.stderr[-2000:]
    for name, tests_of_it in expected.items():
        assert {test for fate, cls, test in lines if cls == name and fate != "PASSED"} == tests_of_it, name


def test_without_pytest_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import registry.testing"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "checkpoint-registry[test]" in found.stderr.splitlines()[-1]


def test_importing_the_library_imports_neither_pytest_nor_hypothesis() -> None:
    code = "import sys, registry; registry.formats(); print({'pytest', 'hypothesis'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "set()"


@settings(max_examples=50)
@given(strategies.notations())
def test_drawn_layouts_are_layouts(text: str) -> None:
    assert parse(str(parse(text))) == parse(text)


@settings(max_examples=20)
@given(st.data())
def test_drawn_layouts_fit_the_drawn_models(data: st.DataObject) -> None:
    name = data.draw(strategies.architectures().filter(lambda name: takes("megatron", small_config(name))))
    config = data.draw(strategies.configs(name))
    parallel = data.draw(strategies.parallels("megatron", config))
    assert registry.testing.fitting_layouts("megatron", config, [parallel]) == [parallel]


@settings(max_examples=50)
@given(strategies.tensors(["float32"], st.just((12,))))
def test_drawn_tensors_hold_what_careless_copies_change(tensor: torch.Tensor) -> None:
    bits = set(tensor.view(torch.int32).tolist())
    assert {-(2**31), 0x7F800000, 0x00000001} <= bits, "-0.0, infinity and the smallest denormal"
    assert tensor.isnan().any()


@pytest.mark.parametrize("name", registry.architectures())
def test_every_architecture_has_a_small_config(name: str) -> None:
    assert is_exact("huggingface", small_config(name))


def test_a_damaged_file_is_put_right_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    seen = []
    for what in damaged(tmp_path / "file", ("cut", "flip", "gone"), 2):
        seen.append((what, (tmp_path / "file").read_bytes() if (tmp_path / "file").exists() else None))
    assert all(content != b"0123456789" for _, content in seen) and seen[-1][1] is None
    assert (tmp_path / "file").read_bytes() == b"0123456789"

"""`MappingTests`: all that an architecture's spec is held to. Subclass it and name the architecture."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import pytest
from attrs import evolve

import registry
from registry import catalog, expressions
from registry.errors import MappingError, RegistryError
from registry.groups import template_of
from registry.model import read_facts, write_document
from registry.parallel import Parallel
from registry.prepare import prepare
from registry.problems import collapse
from registry.source import Source, load, understood
from registry.tensor_rules import named_axes
from registry.testing import models
from registry.testing.comparison import same_bits, same_directory
from registry.testing.models import HUB, Config

_FEW = (Parallel(), Parallel(tp=2), Parallel(tp=2, pp=2), Parallel(tp=2, ep=2), Parallel(tp=2, pp=2, ep=4, etp=1))

#: The directories of each class that is being run.
_made: dict[tuple[type, str], Path] = {}


class MappingTests:
    """Subclass, set `architecture`, and pytest runs all of it:

        class TestMine(MappingTests):
            architecture = "mine"
            configs = {"small": {"model_type": "mine", "num_hidden_layers": 4, ...}}

    Without `configs` a small one is made of the spec. Give one for each way that the family's models differ: rules that
    no config calls for are reported.
    """

    #: The name of the architecture, HuggingFace's model_type.
    architecture: ClassVar[str]
    #: Name -> config, as plain data or as an object of transformers.
    configs: ClassVar[Mapping[str, Any]] = {}
    #: The formats that take the architecture; the others must refuse it. None: whichever do.
    formats: ClassVar[Sequence[str] | None] = None
    #: The parallel layouts to try, by format where they differ; those that do not fit a model are left out.
    layouts: ClassVar[Sequence[Parallel] | Mapping[str, Sequence[Parallel]]] = _FEW
    #: Name patterns of rules that no config here calls for, and why: {"*.bias": "no released model has it"}.
    uncalled: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def known_configs(cls) -> dict[str, Any]:
        """Name -> config as plain data, or an error, which the tests raise."""
        if cls.configs:
            return {name: models.config_of(config) for name, config in cls.configs.items()}
        return {"drawn": models.small_config(cls.architecture)}

    def takes(self, name: str) -> Sequence[str]:
        """The formats that take a model."""
        if self.formats is not None:
            return self.formats
        return [to for to in registry.formats() if models.takes(to, self.known_configs()[name])]

    def model(self, name: str, folder: Path) -> Path:
        """Write a model as a HuggingFace directory: by its transformers class, or where there is none, by the spec."""
        config = self.known_configs()[name]
        if models.transformers_class(config) is None or not self.configs:
            return models.random_model(config, folder)
        return models.transformers_model(self.configs[name], folder)

    def came_back(self, name: str, source: Path, back: Path, report: registry.Report) -> None:
        """Assert that `back` is `source`. Families with tensors that are rounded say here what may differ."""
        if not report.left_out:
            same_directory(source, back)
            return
        (expected, config), (found, config_back) = models.load_directory(source), models.load_directory(back)
        same_bits(found, {key: t for key, t in expected.items() if key not in report.left_out})
        assert config_back == config

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Each config, in each format, at each layout that fits, as cases of their own."""
        if not {"config", "to", "parallel"} & set(metafunc.fixturenames):
            return
        try:
            configs = self.known_configs()
            pairs = [(name, to) for name in configs for to in registry.formats()]
            taken = {name: set(self.takes(name)) for name in configs}
        except RegistryError:  # the tests that need none of it will say so
            metafunc.parametrize([n for n in ("config", "to", "parallel") if n in metafunc.fixturenames], [])
            return
        if "parallel" in metafunc.fixturenames:
            cases = [(n, to, p) for n, to in pairs if to in taken[n] for p in self._fitting(to, configs[n])]
            metafunc.parametrize(("config", "to", "parallel"), cases, ids=lambda value: str(value))
        elif "to" in metafunc.fixturenames:
            metafunc.parametrize(("config", "to"), [(n, to) for n, to in pairs if to not in taken[n]])
        else:
            metafunc.parametrize("config", list(configs))

    def _fitting(self, to: str, config: Config) -> list[Parallel]:
        layouts = self.layouts.get(to, _FEW) if isinstance(self.layouts, Mapping) else self.layouts
        try:
            return models.fitting_layouts(to, config, layouts)
        except RegistryError:
            return [Parallel()]

    def directory(self, name: str, factory: pytest.TempPathFactory) -> Path:
        """The directory of a model, made once for a class. Only read it."""
        key = (type(self), name)
        if key not in _made:
            _made[key] = self.model(name, factory.mktemp(re.sub(r"\W", "_", name)) / "hf")
        return _made[key]

    def test_the_spec_is_valid(self) -> None:
        """The spec is found under its name, as an architecture, and small configs describe models of it."""
        assert self.architecture in registry.architectures(), f"no architecture {self.architecture!r} is known"
        spec = catalog.architecture(self.architecture)
        assert spec.name == self.architecture
        for name, config in self.known_configs().items():
            assert config.get("model_type") == self.architecture, f"config {name!r} is another architecture's"
            assert models.model_of(config).tensors, f"config {name!r} describes a model without tensors"

    def test_every_rule_is_called_for(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        """Some config here calls for each rule: one that nothing calls for is not tested by anything.

        Rules that another architecture has too, such as the one that this one extends, are left to its tests.
        """
        called: set[tuple[str, str]] = set()
        for name in self.known_configs():
            source = load(self.directory(name, tmp_path_factory))
            called |= {(group.pattern, group.layout) for group in source.bound.groups}
        others = (catalog.architecture(name) for name in registry.architectures() if name != self.architecture)
        shared = {(pattern, rule.model_dump_json()) for other in others for pattern, rule in other.rules()}
        idle = [
            f"{pattern}: {rule.layout}"
            for pattern, rule in catalog.architecture(self.architecture).rules()
            if not any((name, rule.layout) in called for name in (pattern, *rule.names.values(), *rule.aliases))
            and (pattern, rule.model_dump_json()) not in shared
            and not any(fnmatchcase(pattern, glob) for glob in self.uncalled)
        ]
        if not self.configs:
            pytest.skip(f"with a drawn config alone, {len(idle)} rules are not called for: give `configs`")
        assert not idle, "no config here calls for these rules: add one, or say why in `uncalled`"

    def test_every_tensor_is_claimed_once(self, config: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        """Each tensor that transformers saves belongs to one rule, with its shape; none is missing or left over."""
        source = load(self.directory(config, tmp_path_factory))
        assert source.architecture.name == self.architecture
        assert not source.bound.missing, "the spec has tensors that the model has not"
        pieces = source.opened.pieces
        times = Counter(pieces[int(member)].name for group in source.bound.groups for member in group.members)
        assert {name for name, count in times.items() if count > 1} == set(), "claimed by two rules"
        assert set(times) | set(source.bound.left_out) == {piece.name for piece in pieces}, "not claimed"
        shapes = {piece.name: piece.shape for piece in pieces}
        for group in source.bound.groups:
            assert {shapes[pieces[int(member)].name] for member in group.members} == {group.shape}, group.pattern

    def test_there_and_back(
        self, config: str, to: str, parallel: Parallel, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """HuggingFace -> format -> HuggingFace is the same directory, in every format that takes it, at each layout."""
        source = self.directory(config, tmp_path_factory)
        report = registry.convert(source, tmp_path / "there", to=to, parallel=parallel, durable=False)
        assert (report.architecture, report.target_format) == (self.architecture, to)
        registry.convert(tmp_path / "there", tmp_path / "back", to=HUB, durable=False)
        self.came_back(config, source, tmp_path / "back", report)

    def test_a_format_without_a_place_refuses(
        self, config: str, to: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """A format that has no place for some of the tensors says which, and writes nothing."""
        with pytest.raises(MappingError, match=r"no place|does not know|cannot name"):
            registry.convert(self.directory(config, tmp_path_factory), tmp_path / "there", to=to, durable=False)
        assert not (tmp_path / "there").exists()

    def test_ties(self, config: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        """Where the config ties two tensors they are one, which is stored once; where it does not they are two."""
        source = load(self.directory(config, tmp_path_factory))
        for tie in source.architecture.tied:
            tied = bool(expressions.parse(tie.when)({**source.model.facts, **source.architecture.facts}))
            assert (source.model.ties.get(tie.tensor) == tie.to) == tied, f"{tie.tensor}: {tie.when}"
            assert (tie.tensor in source.model.tensors) != tied or tie.tensor not in _stored(source), tie.tensor

    def test_config_fields_map_both_ways(self, config: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        """The facts that a config says, written into an empty config, are read from it again."""
        source = load(self.directory(config, tmp_path_factory))
        said = source.architecture.config
        facts = {**source.architecture.facts, **read_facts(source.hub_config, said)}
        written = write_document(facts, said, facts, {})
        again = read_facts(written, said)
        fielded = [name for name, entry in said.facts.items() if entry.field and not entry.loose and name in facts]
        differ = {name: (facts[name], again.get(name)) for name in fielded if again.get(name) != facts[name]}
        assert not differ, "facts (read, read again from what was written)"
        kept = write_document(facts, said, facts, source.hub_config)
        assert {k: kept.get(k) for k in source.hub_config} == source.hub_config, "a config that agrees is kept as it is"

    def test_unknown_tensors_are_refused_by_name(self, config: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        """A tensor that no rule claims is an error that names it."""
        opened = load(self.directory(config, tmp_path_factory)).opened
        more = [*opened.pieces, opened.pieces[0]._replace(name="no.such.tensor")]
        with pytest.raises(MappingError, match=r"no\.such\.tensor"):
            understood(
                evolve(opened, pieces=more), catalog.format_spec(HUB), config=None, architecture=None, states=False
            )

    def test_missing_tensors_are_refused_by_name(self, config: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        """Without any one of its stored tensors, a conversion is refused with that name: one of each rule is tried."""
        source = load(self.directory(config, tmp_path_factory))
        pieces, said = source.opened.pieces, source.architecture
        optional = {pattern for pattern, rule in said.rules() if rule.optional is not None}
        copies = {tensor for _, rule in said.rules() if rule.replica for tensor in rule.parsed.tensors}
        spare = {*said.spare, *source.model.ties, *source.model.ties.values(), *copies}
        for group in source.bound.groups:
            if group.pattern in optional or {f.tensor for f in group.fragments} <= spare or not len(group.members):
                continue
            name = pieces[int(group.members[-1])].name
            opened = evolve(source.opened, pieces=[piece for piece in pieces if piece.name != name])
            with pytest.raises(MappingError) as caught:
                prepare(understood(opened, source.spec, config=None, architecture=None, states=False), HUB)
            spelled = [
                name,
                template_of(group.pattern) % tuple(group.index[n.axis][-1] for n in named_axes(group.pattern)),
            ]
            named = any(_named(known, str(caught.value)) for known in spelled)
            assert named, f"the error does not name {name}: {caught.value}"

    def test_plans_are_plain_data(self, config: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        """`inspect` and `plan` of the model give plain data that JSON can hold."""
        folder = self.directory(config, tmp_path_factory)
        planned = registry.plan(folder, to=HUB)
        assert json.loads(json.dumps(planned.as_dict(), default=str))["architecture"] == self.architecture
        assert registry.inspect(folder).architecture == self.architecture


def _stored(source: Source) -> set[str]:
    return {f.tensor for group in source.bound.groups for f in group.fragments}


def _named(name: str, text: str) -> bool:
    """Is a name in a report, by itself, among indices that are grouped, or as the tensor that would be there?"""
    if name in text or any(line in text for line in collapse([name])):
        return True
    pattern = r"(?:\d+|\{[\d.,]+\})".join(map(re.escape, re.split(r"(?<=\.)\d+(?=\.)", name)))
    return re.search(pattern, text) is not None

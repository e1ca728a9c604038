"""`FormatTests`: all that a checkpoint format and its container are held to. Subclass it and name the format."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import registry
from registry import catalog
from registry.dtypes import dtype_name
from registry.errors import RegistryError, TargetError
from registry.parallel import Parallel
from registry.testing import models, strategies
from registry.testing.comparison import names_in, same_bits, same_directory
from registry.testing.damage import damaged
from registry.testing.models import HUB, LAYOUTS, Config

_EXAMPLES: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [
        HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.differing_executors,
        HealthCheck.filter_too_much,
    ],
}  # fmt: skip


#: Models that tests are run on which differ by layout and container rather than by model.
_FEW = 3
#: The sources of each class that is being run.
_made: dict[type, dict[str, Path]] = {}


@cache
def exact_architectures(to: str, count: int = 3) -> dict[str, dict[str, Any]]:
    """Small configs of a few registered architectures of which the format keeps every bit."""
    found: dict[str, dict[str, Any]] = {}
    for name in catalog.names("architecture") if to in catalog.names("format") else ():
        try:
            config = models.small_config(name)
            if models.takes(to, config) and models.is_exact(to, config):
                found[name] = config
        except RegistryError:
            continue
        if len(found) == count:
            break
    return found


class Interrupted(Exception):
    """What the tests stop a conversion with."""


def _count(sides: Sequence[Any], members: Any, offsets: Any, size: Sequence[int], strides: Sequence[int]) -> None:
    """Add one to every element of `sides[member]` that the boxes of some copies lie on."""
    box = np.zeros(1, dtype=np.int64)
    for n, step in zip(size, strides, strict=True):
        box = (box[:, None] + np.arange(n) * step).reshape(-1)
    for member, offset in zip(members, offsets, strict=True):
        np.add.at(sides[int(member)], int(offset) + box, 1)


class FormatTests:
    """Subclass, set `format`, and pytest runs all of it:

        class TestMine(FormatTests):
            format = "mine"

    The format's spec must be registered, or installed by an entry point, before the class is collected.
    """

    #: The name of the format.
    format: ClassVar[str]
    #: Options of the format that every conversion is given.
    options: ClassVar[Mapping[str, Any]] = {}
    #: Name -> HuggingFace config of the models to convert; by default a few registered architectures of which the
    #: format keeps every bit.
    architectures: ClassVar[Mapping[str, Config]] = {}
    #: The parallel layouts to try; those that do not fit a model are left out.
    layouts: ClassVar[Sequence[Parallel]] = LAYOUTS
    #: Types that drawn models have; those that the format stores otherwise are left out.
    dtypes: ClassVar[Sequence[str]] = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "int64", "bool")
    #: How many bits are flipped in each file.
    flips: ClassVar[int] = 6

    @classmethod
    def configs(cls) -> dict[str, Config]:
        """The models to convert."""
        return dict(cls.architectures) or dict(exact_architectures(cls.format))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Each model at each layout that fits, as cases of their own."""
        configs = self.configs()
        if metafunc.function.__name__ != "test_there_and_back":  # what differs between models, a few of them show
            configs = dict(list(configs.items())[:_FEW])
        if "parallel" in metafunc.fixturenames:
            cases = [(name, layout) for name, config in configs.items() for layout in self._fitting(config)]
            metafunc.parametrize(("model", "parallel"), cases, ids=[f"{name}-{layout}" for name, layout in cases])
        elif "model" in metafunc.fixturenames:
            metafunc.parametrize("model", list(configs))

    def _fitting(self, config: Config) -> list[Parallel]:
        try:
            return models.fitting_layouts(self.format, config, self.layouts)
        except RegistryError:  # the tests will say so
            return [Parallel()]

    @pytest.fixture
    def sources(self, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
        """Model -> a HuggingFace directory of it, with random bits, made once for a class. Only read it."""
        if type(self) not in _made:
            root = tmp_path_factory.mktemp(self.format)
            _made[type(self)] = {name: models.random_model(c, root / name) for name, c in self.configs().items()}
        return _made[type(self)]

    def convert(self, source: Path, target: Path, parallel: Parallel | None = None, **more: Any) -> registry.Report:
        """Into the format, with its options."""
        more = {"durable": False, "options": dict(self.options), **more}
        return registry.convert(source, target, to=self.format, parallel=parallel, **more)

    def smallest(self, sources: Mapping[str, Path]) -> tuple[Path, Parallel]:
        """The source with the fewest bytes, and a layout with as many files as there are."""
        name = min(sources, key=lambda name: (sources[name] / "model.safetensors").stat().st_size)
        fitting = self._fitting(self.configs()[name])
        return sources[name], max(fitting, key=lambda p: (p.tp * p.pp <= 4, p.tp * p.pp))

    def test_has_models_to_try(self) -> None:
        """There is at least one architecture of which the format keeps every bit; else give `architectures`."""
        assert self.format in registry.formats(), f"no format {self.format!r} is registered or installed"
        assert self.configs(), f"no registered architecture was found that {self.format} keeps bit for bit"

    def test_there_and_back(self, model: str, parallel: Parallel, sources: Mapping[str, Path], tmp_path: Path) -> None:
        """HuggingFace -> format -> HuggingFace is the same directory: every bit, every name, every side file."""
        report = self.convert(sources[model], tmp_path / "there", parallel)
        assert (report.source_format, report.target_format) == (HUB, self.format)
        assert not report.left_out, "what was left out cannot come back"
        assert registry.verify(tmp_path / "there", sources[model]), "verify finds another model"
        registry.convert(tmp_path / "there", tmp_path / "back", to=HUB, durable=False)
        same_directory(sources[model], tmp_path / "back")

    def test_names_shapes_and_files_are_as_planned(
        self, model: str, parallel: Parallel, sources: Mapping[str, Path], tmp_path: Path
    ) -> None:
        """What is on disk is what `plan` says: files and their sizes, tensors, shapes, and the report of it."""
        planned = registry.plan(sources[model], to=self.format, parallel=parallel, options=dict(self.options))
        report = self.convert(sources[model], tmp_path / "there", parallel)
        held = {f.path: f.size for f in planned.laid.files}
        assert held, "a format has files"
        assert {name: (tmp_path / "there" / name).stat().st_size for name in held} == held
        assert set(planned.files) <= set(names_in(tmp_path / "there"))
        expected = {s.name: s.shape if s.whole is None else s.whole for s in reversed(planned.prepared.target.slots)}
        opened = registry.open(tmp_path / "there")
        assert opened.shapes == expected
        assert set(opened.names) == set(expected)
        same = ("tensors", "files", "nbytes", "copies", "architecture", "parallel", "notes")
        assert {k: getattr(report, k) for k in same} == {k: getattr(planned.report, k) for k in same}

    def test_the_plan_covers_everything_once(self, model: str, parallel: Parallel, sources: Mapping[str, Path]) -> None:
        """No element of the target is written twice, and every element of the source is read."""
        planned = registry.plan(sources[model], to=self.format, parallel=parallel, options=dict(self.options))
        slots, pieces = planned.prepared.target.slots, planned.prepared.source.opened.pieces
        written = [np.zeros(math.prod(slot.shape), dtype=np.int64) for slot in slots]
        read = [np.zeros(math.prod(piece.shape), dtype=np.int64) for piece in pieces]
        for copies in planned.plan.copies:
            _count(written, copies.target, copies.target_offset, copies.size, copies.target_stride)
            _count(read, copies.source, copies.source_offset, copies.size, copies.source_stride)
        for copies in planned.plan.replicas:  # the same tensor once more, which is read to compare it
            _count(read, copies.target, copies.target_offset, copies.size, copies.target_stride)
        twice = {slot.name for slot, times in zip(slots, written, strict=True) if (times > 1).any()}
        assert not twice, "written more than once"
        unread = {p.name for p, times in zip(pieces, read, strict=True) if not times.all()}
        assert not unread, "not read"

    def test_is_recognised(self, model: str, sources: Mapping[str, Path], tmp_path: Path) -> None:
        """`open` needs no hint: one format alone detects the checkpoint; architecture, config and facts are known."""
        self.convert(sources[model], tmp_path / "there")
        known = [catalog.format_spec(name) for name in registry.formats()]
        claim = [spec.name for spec in known if catalog.container(spec.container).detect(tmp_path / "there")]
        assert claim == [self.format], "several formats, or another one, claim the directory"
        opened, original = registry.open(tmp_path / "there"), registry.open(sources[model])
        assert (opened.format, opened.architecture) == (self.format, original.architecture)
        assert opened.config == original.config
        assert opened.tensors == original.tensors
        container = catalog.container(catalog.format_spec(self.format).container)
        (tmp_path / "nothing").mkdir()
        assert not container.detect(tmp_path / "nothing"), "an empty directory is no checkpoint"
        assert not container.detect(tmp_path / "absent"), "nothing is no checkpoint"

    def test_views_are_the_converted_tensors(self, model: str, sources: Mapping[str, Path], tmp_path: Path) -> None:
        """Opened lazily, a checkpoint gives the very tensors that a conversion writes, one by one and as a stream."""
        expected, _ = models.load_directory(sources[model])
        self.convert(sources[model], tmp_path / "there")
        view = registry.open(tmp_path / "there").view(HUB)
        assert {name: view.shape(name) for name in view} == {name: tuple(t.shape) for name, t in expected.items()}
        same_bits(dict(view), expected, "the view")
        same_bits(dict(registry.stream(tmp_path / "there")), expected, "the stream")

    def test_side_files_travel(self, sources: Mapping[str, Path], tmp_path: Path) -> None:
        """Tokenizer, template and config come back where the checkpoint that they came from is gone."""
        original, parallel = self.smallest(sources)
        source = tmp_path / "source"
        shutil.copytree(original, source)
        self.convert(source, tmp_path / "there", parallel)
        shutil.rmtree(source)
        registry.convert(tmp_path / "there", tmp_path / "back", to=HUB, durable=False)
        same_directory(original, tmp_path / "back")

    def test_writes_the_same_bytes_twice(self, sources: Mapping[str, Path], tmp_path: Path) -> None:
        """Two conversions write the same bytes, with one thread and with several."""
        source, parallel = self.smallest(sources)
        self.convert(source, tmp_path / "a", parallel, threads=1)
        self.convert(source, tmp_path / "b", parallel, threads=4)
        same_directory(tmp_path / "a", tmp_path / "b")

    def test_overwrites_only_when_told(self, sources: Mapping[str, Path], tmp_path: Path) -> None:
        """A target that is not empty is refused and left alone; with overwrite=True it is replaced as a whole."""
        source, parallel = self.smallest(sources)
        target = tmp_path / "there"
        target.mkdir()
        (target / "precious").write_text("mine")
        with pytest.raises(TargetError, match="not empty"):
            self.convert(source, target, parallel)
        assert names_in(target) == ["precious"]
        self.convert(source, target, parallel, overwrite=True)
        self.convert(source, tmp_path / "fresh", parallel)
        same_directory(target, tmp_path / "fresh")

    def test_runs_again_after_a_stop(self, sources: Mapping[str, Path], tmp_path: Path) -> None:
        """A conversion that is stopped leaves no target; the next one succeeds and leaves nothing else behind."""
        source, parallel = self.smallest(sources)

        def stop(done: int, total: int) -> None:
            raise Interrupted

        with pytest.raises(Interrupted):
            self.convert(source, tmp_path / "here/there", parallel, progress=stop)
        assert not (tmp_path / "here/there").exists()
        self.convert(source, tmp_path / "here/there", parallel)
        assert [path.name for path in (tmp_path / "here").iterdir()] == ["there"]
        self.convert(source, tmp_path / "fresh", parallel)
        same_directory(tmp_path / "here/there", tmp_path / "fresh")

    def test_damaged_files_are_refused(self, sources: Mapping[str, Path], tmp_path: Path) -> None:
        """Every file cut off, emptied, removed and with bits flipped: RegistryError, or the same model.

        Never another exception. Tensors that read as others than were written are found by `verify`.
        """
        source, parallel = self.smallest(sources)
        expected = dict(registry.stream(source))
        target = tmp_path / "there"
        self.convert(source, target, parallel)
        assert registry.verify(target), "verify finds damage in what was just written"
        for name in names_in(target, own=True):
            for what in damaged(target / name, ("cut", "gone", "flip"), self.flips):
                self._refused_or_same(target, expected, what)

    def _refused_or_same(self, target: Path, expected: Mapping[str, Any], what: str) -> None:
        try:
            found = dict(registry.stream(target))
        except RegistryError:
            return
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__} instead of a RegistryError: {error}") from error
        try:
            same_bits(found, expected)
        except AssertionError as difference:
            assert " cut to " not in what, f"{what}: read without an error, but {difference}"
            assert not registry.verify(target), f"{what}: {difference}, and verify finds nothing"

    @settings(max_examples=12, **_EXAMPLES)
    @given(data=st.data())
    def test_random_models(self, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
        """Drawn sizes, layouts and types, down to models without layers, of random bits: all come back."""
        name = data.draw(st.sampled_from(sorted(self.configs())), label="model")
        config = data.draw(strategies.configs(self.configs()[name]["model_type"]), label="config")
        dtype = data.draw(st.sampled_from(list(self.dtypes)), label="dtype")
        assume(models.takes(self.format, config) and models.is_exact(self.format, config, dtype))
        parallel = data.draw(strategies.parallels(self.format, config), label="parallel")
        seed = data.draw(st.integers(0, 2**31), label="seed")
        root = tmp_path_factory.mktemp("random")
        source = models.random_model(config, root / "source", dtype, seed)
        self.convert(source, root / "there", parallel, threads=data.draw(st.sampled_from([1, 2]), label="threads"))
        assert registry.verify(root / "there", source)
        registry.convert(root / "there", root / "back", to=HUB, durable=False)
        same_directory(source, root / "back")
        shutil.rmtree(root)

    @settings(max_examples=6, **_EXAMPLES)
    @given(data=st.data())
    def test_every_bit_pattern(self, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
        """A tensor of one type keeps its awkward values wherever a layout puts them."""
        name = data.draw(st.sampled_from(sorted(self.configs())))
        config, dtype = self.configs()[name], data.draw(st.sampled_from(list(self.dtypes)))
        assume(models.is_exact(self.format, config, dtype))
        parallel = data.draw(st.sampled_from(self._fitting(config)))
        root = tmp_path_factory.mktemp("bits")
        tensors = models.random_tensors(config, dtype)
        chosen = data.draw(st.sampled_from(sorted(tensors)))
        shape = tuple(tensors[chosen].shape)
        tensors[chosen] = data.draw(strategies.tensors([dtype_name(tensors[chosen].dtype)], st.just(shape)))
        models.save_directory(root / "source", tensors, config)
        self.convert(root / "source", root / "there", parallel)
        same_bits(dict(registry.stream(root / "there")), tensors)
        shutil.rmtree(root)

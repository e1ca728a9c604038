"""What has to notice a damaged spec: cases out of the tests of the goldens and families, in process, the fastest first.

Each case is one assertion of those tests on one model or golden. It is run once on the sound specs, to see that it
passes and which rules of which specs it goes through; a damaged rule is only shown to the cases that go through it.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import registry
from registry import Parallel, bind, catalog, target
from registry.model import read_facts, write_document
from registry.source import load
from tests import test_families, test_golden_bridge, test_golden_megatron, test_golden_trtllm, test_megatron_loads
from tests.conftest import HF_MODELS, _save_model
from tests.families import FAMILIES, HF, LEGACY, MEGATRON, build
from tests.mutants.specs import Mutant

#: Seconds that one case may take; a damaged spec that hangs is noticed too.
LIMIT = 60
_ORDER = ["names", "config", "refusal", "golden", "core", "round trip"]
#: Round trips notice what cannot be bound or does not come back, which one does as well as another.
ROUND_TRIPS = 10


@dataclass
class Case:
    """One thing to try. `uses` are the (kind, spec, pattern) that it goes through on the sound specs."""

    name: str
    kind: str
    architecture: str
    formats: tuple[str, ...]
    run: Callable[[Path], None] = field(repr=False)
    uses: frozenset[tuple[str, str, str]] | None = None


class Models:
    """The directories of the families' tiny models, each built when it is first asked for, by whichever process."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name: str) -> Path:
        folder = self.root / name
        if not folder.exists():
            scratch = Path(tempfile.mkdtemp(dir=self.root))
            if name in HF_MODELS:
                _save_model(scratch, name, "float32", "5GB")
            else:
                build(name, "float32", scratch)
            try:
                scratch.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(scratch)
        return folder


def cases(models: Models) -> list[Case]:
    """Every case, the fastest kind first."""
    found = [*_bindings(models), *_goldens(), *_core(models), *_round_trips(models)]
    return sorted(found, key=lambda case: _ORDER.index(case.kind))


def _bindings(models: Models) -> Iterator[Case]:
    for name in catalog.names("architecture"):
        yield Case(f"{name} values", "names", name, (HF,), partial(_values, name))
    for name, family in FAMILIES.items():
        yield Case(f"{name} is claimed", "names", family.architecture, (HF,), partial(_claimed, models, name))
        yield Case(f"{name} config", "config", family.architecture, (HF,), partial(_config, models, name))


def _claimed(models: Models, name: str, scratch: Path) -> None:
    """Every tensor of transformers' own class has its place, but for the buffers that are said to be none's."""
    source = load(models(name))
    assert not source.bound.missing
    left = [key for key in source.bound.left_out if not any(fnmatch(key, glob) for glob in FAMILIES[name].dropped)]
    assert not left
    registry.plan(models(name), to=HF)


def _values(architecture: str, scratch: Path) -> None:
    test_families.keeps_values(architecture)


def _config(models: Models, name: str, scratch: Path) -> None:
    """As in MappingTests.test_config_fields_map_both_ways."""
    source = load(models(name))
    said = source.architecture.config
    facts = {**source.architecture.facts, **read_facts(source.hub_config, said)}
    written = write_document(facts, said, facts, {})
    again = read_facts(written, said)
    fielded = [name for name, entry in said.facts.items() if entry.field and not entry.loose and name in facts]
    assert {n: again.get(n) for n in fielded} == {n: facts[n] for n in fielded}
    first = next(other for other, family in FAMILIES.items() if family.architecture == source.architecture.name)
    if name == first and FAMILIES[name].model_class is not None:
        assert {k: written.get(k) for k in ("architectures", "model_type")} == {
            k: source.hub_config[k] for k in ("architectures", "model_type")
        }
    kept = write_document(facts, said, facts, source.hub_config)
    assert {k: kept.get(k) for k in source.hub_config} == source.hub_config


def _goldens() -> Iterator[Case]:
    megatron, bridge, trtllm = test_golden_megatron, test_golden_bridge, test_golden_trtllm
    for case in megatron.CASES:
        to = megatron.FORMATS[case.format]
        for how in ("config", "architecture"):
            read = partial(megatron.test_golden_becomes_its_huggingface_model, case, how)
            yield Case(f"{case} is read, {how}", "golden", case.family, (to, HF), read)
        if not case.trained:
            test = megatron.test_we_write_the_torch_dist_golden if to == MEGATRON else None
            write = partial(test or megatron.test_we_write_the_per_rank_golden, case)
            yield Case(f"{case} is written", "golden", case.family, (to, HF), write)
    for made in bridge.CASES:
        become, written = (
            bridge.test_bridge_golden_becomes_its_huggingface_model,
            bridge.test_we_write_the_bridge_torch_dist,
        )
        yield Case(f"{made} is read", "golden", made.family, (MEGATRON, HF), partial(become, made))
        yield Case(f"{made} is written", "golden", made.family, (MEGATRON, HF), partial(written, made))
    for made, layout in bridge.RANKED:
        become, written = (
            bridge.test_bridge_rank_states_become_their_huggingface_model,
            bridge.test_we_write_the_bridge_rank_states,
        )
        yield Case(f"{made} {layout} is read", "golden", made.family, (LEGACY, HF), partial(become, made, layout))
        yield Case(f"{made} {layout} is written", "golden", made.family, (LEGACY, HF), partial(written, made, layout))
    for export in trtllm.CASES:
        tests = [trtllm.test_tensors_are_those_of_the_real_converter, trtllm.test_golden_comes_back]
        tests += [trtllm.test_config_is_that_of_the_real_converter] if export in trtllm.TRT else []
        tests += [trtllm.test_config_says_what_modelopts_says] if export.id.startswith("mo_") else []
        for test in tests:
            run = partial(test, export)
            yield Case(f"{export} {test.__name__}", "golden", export.family, ("trtllm", HF), run)


def _core(models: Models) -> Iterator[Case]:
    """What megatron-core loads and computes right with (tests/test_megatron_loads.py): the same has to be written."""
    for case in test_megatron_loads.CASES:
        if not (case.edit or case.fields):
            own = HF_MODELS[case.model][0] if case.model in HF_MODELS else FAMILIES[case.model].architecture
            yield Case(f"{case} for core", "core", own, (case.format, HF), Core(models, case))


@dataclass
class Core:
    """The weights that the sound specs write for one case are those of its first run; every other run must equal them.

    That they are right is what megatron-core's logits say. Running it for each mutant would take days.
    """

    models: Models
    case: Any

    def __call__(self, scratch: Path) -> None:
        there, case = scratch / "there", self.case
        parallel = Parallel(**case.parallel)
        source = self.models(case.model)
        registry.convert(source, there, to=case.format, parallel=parallel, options=case.options, durable=False)
        digest = hashlib.sha256()
        for name, tensor in sorted(_weights(there / "release")):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        kept = self.models.root / f"core-{hashlib.sha256(str(case).encode()).hexdigest()[:16]}"
        if kept.exists():
            assert kept.read_text() == digest.hexdigest(), "other weights than megatron-core was right with"
        else:
            kept.write_text(digest.hexdigest())


def _weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that torch's own readers find in what was written."""
    for file in folder.glob("mp_rank_*/model_optim_rng.pt"):
        state = torch.load(file, weights_only=False)
        for key in (key for key in state if key.startswith("model")):
            found = state[key].items()
            yield from ((f"{file.parent.name} {key} {n}", t) for n, t in found if torch.is_tensor(t) and t.numel())
    if (folder / ".metadata").exists():
        yield from test_golden_megatron.global_tensors(folder).items()


def _round_trips(models: Models) -> Iterator[Case]:
    for name, family in FAMILIES.items():
        for to in (to for to in family.formats if to != HF):
            layouts = test_families.LAYOUTS[to] + (test_families.EXPERT_LAYOUTS.get(to, []) if family.experts else [])
            extension = catalog.architecture(family.architecture).formats.get(to)
            limits = extension.limits if extension else {}
            for layout in (p for p in layouts if all(p.size(dim) <= most for dim, most in limits.items())):
                run = partial(_there_and_back, models, name, to, layout, {})
                yield Case(f"{name} {to} {layout}", "round trip", family.architecture, (to, HF), run)
            if to in (MEGATRON, LEGACY):
                run = partial(_there_and_back, models, name, to, Parallel(tp=2, pp=[1, 3]), _ENGINE)
                yield Case(f"{name} {to} engine", "round trip", family.architecture, (to, HF), run)
        for to in (to for to in test_families.LAYOUTS if to not in family.formats):
            run = partial(_refused, models, name, to)
            yield Case(f"{name} {to} refused", "refusal", family.architecture, (to, HF), run)


_ENGINE = {"transformer_impl": "transformer_engine"}


def _there_and_back(models: Models, name: str, to: str, parallel: Parallel, options: Any, scratch: Path) -> None:
    there, back, source = scratch / "there", scratch / "back", models(name)
    report = registry.convert(source, there, to=to, parallel=parallel, options=options, durable=False)
    registry.convert(there, back, to=HF, durable=False)
    test_families.came_back(name, source, report, back, to)


def _refused(models: Models, name: str, to: str, scratch: Path) -> None:
    source = models(name)
    with pytest.raises(registry.MappingError, match=r"no place|does not know|cannot name"):
        registry.convert(source, scratch / "there", to=to, durable=False)


# Running them


class TooLong(Exception):
    """A case that ran into the limit."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TooLong in the block after some seconds."""

    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(case: Case, root: Path) -> str | None:
    """What a case says of the specs as they are: None where it passes, else the error in a line."""
    scratch = Path(tempfile.mkdtemp(dir=root))
    try:
        with limited(LIMIT):
            case.run(scratch)
    except pytest.skip.Exception:
        return None
    except (Exception, pytest.fail.Exception) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return None


def record(case: Case, root: Path) -> None:
    """Run a case on the sound specs, whatever is registered, and keep what it uses. Raises where it fails on them."""
    uses: set[tuple[str, str, str]] = set()
    group, write = bind._Reader.group, target._Writer.write

    def grouped(self: Any, pattern: str, rule: Any, *rest: Any) -> None:
        uses.add((*_owner(self), pattern))
        group(self, pattern, rule, *rest)

    def written(self: Any, pattern: str, rule: Any, kind: Any) -> None:
        uses.add((*_owner(self), pattern))
        write(self, pattern, rule, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bind._Reader, "group", grouped)
        patch.setattr(target._Writer, "write", written)
        patch.setattr(catalog, "_registered", {})
        failed = run(case, root)
    if failed:
        raise AssertionError(f"{case.name} fails without any damage: {failed}")
    case.uses = frozenset(uses)


def _owner(side: Any) -> tuple[str, str]:
    spec, architecture = side.spec, side.model.architecture
    return ("architecture", architecture.name) if spec.rules_from == "architecture" else ("format", spec.name)


def affected_by(mutant: Mutant, originals: dict[tuple[str, str], dict[str, Any]]) -> set[tuple[str, str]]:
    """Register a mutant and every spec that it changes by `extends`. Raises SpecError, as registration does."""
    catalog.register(mutant.data)
    changed = {mutant.spec}
    grown = True
    while grown:
        grown = False
        for key, data in originals.items():
            heir = key not in changed and key[0] == mutant.spec[0] and (key[0], data.get("extends")) in changed
            if heir and catalog._resolve(data, key[1]) != catalog._load(*key).source():
                catalog._registered[key] = catalog.build(data, key[1])
                changed.add(key)
                grown = True
    return changed


def unregister() -> None:
    """Back to the sound specs."""
    catalog._registered.clear()


def relevant(mutant: Mutant, affected: set[tuple[str, str]], every: Sequence[Case], root: Path) -> Iterator[Case]:
    """The cases that go through what a mutant changed, the fastest kind first, and not more round trips than a few."""
    names = {mutant.pattern}
    for kind, name in affected if mutant.pattern is not None else ():
        spec = catalog.architecture(name) if kind == "architecture" else catalog.format_spec(name)
        names |= {mutant.pattern.replace(r.of, r.to, 1) for r in spec.repeats if str(mutant.pattern).startswith(r.of)}
    trips = 0
    for case in every:
        if ("architecture", case.architecture) not in affected and not any(
            ("format", to) in affected for to in case.formats
        ):
            continue
        if mutant.pattern is not None and case.kind != "refusal" and not case.name.endswith(" values"):
            if case.uses is None:
                record(case, root)
            if case.uses is not None and not any(use[:2] in affected and use[2] in names for use in case.uses):
                continue
        trips += case.kind == "round trip"
        if trips <= ROUND_TRIPS:
            yield case

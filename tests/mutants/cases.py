"""What has to notice a damaged spec: cases out of the tests of the configs, goldens and families, the fastest first.

Each case is one assertion of those tests on one architecture, model or golden, and runs in process.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

import registry
from registry import Parallel, catalog
from registry.model import read_facts, write_document
from registry.source import load, read_config
from tests import (
    test_configs,
    test_dcp,
    test_encoding,
    test_facts,
    test_families,
    test_golden_bridge,
    test_golden_megatron,
    test_golden_trtllm,
    test_megatron_loads,
    test_symmetries,
    test_trtllm_export,
    test_variants,
)
from tests.conftest import HF_MODELS, _save_model
from tests.families import DCP, FAMILIES, HF, LEGACY, MEGATRON, build
from tests.goldens import golden
from tests.mutants.format_cases import format_cases

_ORDER = ["names", "config", "refusal", "golden", "core", "rearranged", "round trip"]


@dataclass(eq=False)
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

    def __call__(
        self, name: str, fields: dict[str, Any] | None = None, edit: Callable[[Path], None] | None = None
    ) -> Path:
        """One model, with some other fields in its config, and edited."""
        said = json.dumps([fields, edit.__name__ if edit else None]).encode() if fields or edit else b""
        folder = self.root / (name + (hashlib.sha256(said).hexdigest()[:8] if said else ""))
        if not folder.exists():
            scratch = Path(tempfile.mkdtemp(dir=self.root))
            if name in HF_MODELS and not fields:
                _save_model(scratch, name, "float32", "5GB")
            else:
                with pytest.MonkeyPatch.context() as patch:
                    family = FAMILIES[name]
                    patch.setitem(FAMILIES, name, replace(family, config={**family.config, **(fields or {})}))
                    build(name, "float32", scratch)
            if edit:
                edit(scratch)
            try:
                scratch.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(scratch)
        return folder


def cases(models: Models) -> list[Case]:
    """Every case, the fastest kind first."""
    found = [*_bindings(models), *_configs(), *_goldens(), *_core(models), *_computed(models), *_round_trips(models)]
    found += [Case(*one) for one in format_cases(models)]
    return sorted(found, key=lambda case: _ORDER.index(case.kind))


def _bindings(models: Models) -> Iterator[Case]:
    for name in catalog.names("architecture"):
        yield Case(f"{name} values", "names", name, (HF,), partial(_ours, test_families.keeps_values, name))
        yield Case(f"{name} layers", "config", name, (MEGATRON, HF), partial(_ours, test_families.default_engine, name))
        yield Case(f"{name} words", "names", name, (HF,), partial(_ours, test_families.keeps_words, name))
        yield Case(f"{name} axes", "names", name, (HF,), partial(_ours, test_families.says_what_it_uses, name))
    for name, family in FAMILIES.items():
        yield Case(f"{name} is claimed", "names", family.architecture, (HF,), partial(_claimed, models, name))
        yield Case(f"{name} config", "config", family.architecture, (HF,), partial(_config, models, name))
        asked = {
            "facts": (FAMILIES, test_families.says_what_is_there),
            "extras": (test_families.EXTRAS, test_families.leaves_out),
            "also": (test_families.ALSO, test_families.reads_also),
            "without": (test_families.FURTHER, test_families.may_lack),
        }
        for what, (names, test) in asked.items():
            if name in names:
                yield _of_model(f"{name} {what}", "names", name, partial(_of_directory, test, models, name))


def _claimed(models: Models, name: str, scratch: Path) -> None:
    """Every tensor of transformers' own class has its place, but for the buffers that are said to be none's."""
    source = load(models(name))
    assert not source.bound.missing
    left = [key for key in source.bound.left_out if not any(fnmatch(key, glob) for glob in FAMILIES[name].dropped)]
    assert not left
    registry.plan(models(name), to=HF)


def _ours(test: Callable[[Any], None], asked: Any, scratch: Path) -> None:
    test(asked)


def _of_directory(test: Callable[[str, Path], None], models: Models, name: str, scratch: Path) -> None:
    test(name, models(name))


def _config(models: Models, name: str, scratch: Path) -> None:
    """As in MappingTests.test_config_fields_map_both_ways."""
    source = load(models(name))
    said = source.architecture.config
    facts = {**source.architecture.facts, **read_facts(source.hub_config, said)}
    written = write_document(facts, said, facts, {})
    again = read_facts(written, said)
    fielded = [name for name, entry in said.facts.items() if entry.field and not entry.loose and name in facts]
    assert {n: again.get(n) for n in fielded} == {n: facts[n] for n in fielded}
    alike = [load(models(n)).hub_config for n, f in FAMILIES.items() if f.architecture == source.architecture.name]
    names = [{key: config[key] for key in ("architectures", "model_type")} for config in alike]
    assert {key: written.get(key) for key in ("architectures", "model_type")} in names
    kept = write_document(facts, said, facts, source.hub_config)
    assert {k: kept.get(k) for k in source.hub_config} == source.hub_config


def _configs() -> Iterator[Case]:
    """What transformers' config classes and published configs say (tests/test_configs.py)."""
    said = test_configs

    def case(name: str, architecture: str, *tests: Callable[[], None]) -> Case:
        return Case(name, "config", architecture, (HF,), lambda _: [test() for test in tests] and None)

    for name in said.KNOWN:
        asked = (
            said.test_every_field_of_the_class_is_read, said.test_every_fact_is_read_from_fields_that_there_are,
            said.test_a_null_means_what_the_class_makes_of_it,
            partial(said.test_a_document_without_a_field_means_what_the_class_makes_of_it, config={}),
        )  # fmt: skip
        yield case(f"{name} fields", name, partial(_defaults, name), *(partial(test, name) for test in asked))
        if name in said.OTHERWISE:
            yield case(
                f"{name} otherwise", name, partial(said.test_other_names_mean_what_the_class_makes_of_them, name)
            )
        if name in said.PER_LAYER_TYPE:
            both = said.test_both_spellings_of_rotary_embeddings_per_type_of_layer
            yield case(f"{name} rotary", name, *(partial(both, name, kind) for kind in said.ROPES))
    for name, rope, partials in (param.values for param in said.rotary()):
        both = said.test_both_spellings_of_rotary_embeddings_are_the_same_facts
        yield case(f"{name} rotary {rope['rope_type']}", name, partial(both, name, rope, partials))
    for param in said.families():
        own, config = param.values
        tests = (
            said.test_a_document_that_says_only_what_is_special,
            said.test_a_document_without_a_field_means_what_the_class_makes_of_it,
            said.test_a_config_that_is_written_is_one_that_the_class_reads,
        )
        if own in said.KNOWN:
            yield case(f"{param.id} special", own, *(partial(test, own, config) for test in tests))
    for param in said.windowed():
        test = partial(said.test_a_config_that_is_written_is_one_that_the_class_reads, *param.values)
        yield case(str(param.id), param.values[0], test)
    for name, document in said.RELEASED.items():
        test = said.test_a_released_config_says_all_and_loses_nothing
        yield case(f"{name} released", document["model_type"], partial(test, name))


def _defaults(name: str) -> None:
    for entry in catalog.architecture(name).config.facts.values():
        if "default" in entry.model_fields_set and entry.read is None:
            test_configs.test_a_default_of_a_spec_is_that_of_the_class(name, entry)


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
    for exported, (made, _) in trtllm.MEGATRON.items():
        written, own = partial(trtllm.test_tensors_are_those_of_megatrons_exporter, exported), f"trtllm/_inputs/{made}"
        architecture = read_config(golden(own))["model_type"]
        yield Case(f"{exported} of Megatron's", "golden", architecture, ("trtllm", MEGATRON), written)
    for export in trtllm.TRT:
        run = partial(_ours, test_families.golden_facts, export)
        yield Case(f"{export} facts", "golden", export.family, ("trtllm", HF), run)
    for export in trtllm.CASES:
        tests = [trtllm.test_tensors_are_those_of_the_real_converter, trtllm.test_golden_comes_back]
        tests += [trtllm.test_config_is_that_of_the_real_converter] if export in trtllm.TRT else []
        tests += [trtllm.test_config_says_what_modelopts_says] if export.id.startswith("mo_") else []
        for test in tests:
            run = partial(test, export)
            yield Case(f"{export} {test.__name__}", "golden", export.family, ("trtllm", HF), run)


def _experts(models: Models, tp: int, ep: int, scratch: Path) -> None:
    test_trtllm_export.test_experts_are_shared_out_within_the_ranks_of_tp(models("mixtral"), scratch, tp, ep)


def _core(models: Models) -> Iterator[Case]:
    """What megatron-core loads and computes right with (tests/test_megatron_loads.py): the same has to be written."""
    yield Case("mxfp4", "core", "gpt_oss", (MEGATRON, HF), test_encoding.test_experts_in_mxfp4_become_plain_ones)
    yield Case("a resumed run", "core", "llama", (DCP, HF), test_dcp.test_a_resumed_run_is_the_run_itself)
    yield Case("experts on two ranks", "core", "mixtral", ("trtllm", HF), partial(_experts, models, 2, 2))
    for case in test_megatron_loads.CASES:
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
        source = self.models(case.model, case.fields, case.edit)
        registry.convert(source, there, to=case.format, parallel=parallel, options=case.options, durable=False)
        if case is test_megatron_loads.ONCE.get(case.model):
            test_megatron_loads.arguments_fit(case.model, source, there)
        digest = hashlib.sha256(repr(_names(there / "release")).encode())
        for name, tensor in sorted(_weights(there / "release")):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        kept = self.models.root / f"core-{hashlib.sha256(str(case).encode()).hexdigest()[:16]}"
        if kept.exists():
            assert kept.read_text() == digest.hexdigest(), "other weights than megatron-core was right with"
        else:
            kept.write_text(digest.hexdigest())


def _names(folder: Path) -> list[str]:
    """Every name in a checkpoint, for objects are asked for by it, and the parts that global tensors lie in."""
    if not (folder / ".metadata").exists():
        files = sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))
        states = [torch.load(file, weights_only=False) for file in files]
        return [name for state in states for key in sorted(state) if key.startswith("model") for name in state[key]]
    names = FileSystemReader(folder).read_metadata().state_dict_metadata
    return sorted([*names, *map(str, test_golden_megatron.parts(folder).items())])


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


def _computed(models: Models) -> Iterator[Case]:
    """What transformers computes, of what facts say and with tensors that are rearranged, and of models switched."""
    for name in test_facts.MODELS:
        yield _of_model(f"{name} computed", "rearranged", name, partial(_facts, models, name))
    for name in test_symmetries.MODELS:
        yield _of_model(f"{name} rearranged", "rearranged", name, partial(_rearranged, models, name))
    for name, switch in test_variants.every(test_variants.SWITCHES):
        yield _of_model(f"{name} {switch}", "rearranged", name, partial(_switched, models, name, switch))
    for name, switch in test_variants.every(test_variants.REFUSED):
        yield _of_model(f"{name} {switch} refused", "refusal", name, partial(_unclaimed, models, name, switch))


def _of_model(title: str, kind: str, name: str, run: Callable[[Path], None]) -> Case:
    return Case(title, kind, FAMILIES[name].architecture, (HF,), run)


def _facts(models: Models, name: str, scratch: Path) -> None:
    test_facts.check(name, models(name))


def _rearranged(models: Models, name: str, scratch: Path) -> None:
    test_symmetries.check(name, models(name), scratch)


def _switched(models: Models, name: str, switch: str, scratch: Path) -> None:
    test_variants.whole(name, models(name, test_variants.fields(name, switch)), scratch)


def _unclaimed(models: Models, name: str, switch: str, scratch: Path) -> None:
    test_variants.refused(models(name, test_variants.fields(name, switch)))


_ENGINE = {"transformer_impl": "transformer_engine"}


def _there_and_back(models: Models, name: str, to: str, parallel: Parallel, options: Any, scratch: Path) -> None:
    there, back, source = scratch / "there", scratch / "back", models(name)
    report = registry.convert(source, there, to=to, parallel=parallel, options=options, durable=False)
    if to in test_families.UNSAID:
        test_families.facts_come_back(name, to, source, there)
    registry.convert(there, back, to=HF, durable=False)
    test_families.came_back(name, source, report, back, to)


def _refused(models: Models, name: str, to: str, scratch: Path) -> None:
    source = models(name)
    with pytest.raises(registry.MappingError, match=r"no place|does not know|cannot name"):
        registry.convert(source, scratch / "there", to=to, durable=False)

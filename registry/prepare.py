"""Everything up to the first byte: bind the target, lay it out, plan the copies. Reads headers only, writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from attrs import frozen

from registry import catalog
from registry.collector import no_collection
from registry.defaults import lost_fields
from registry.derived import with_derived
from registry.dtypes import is_float
from registry.errors import ArgumentError, MappingError, ParallelError
from registry.model import (
    config_map,
    extension,
    format_rules,
    loose_facts,
    read_facts,
    rules_spec,
    with_fields,
    write_document,
)
from registry.parallel import Parallel
from registry.planning import Plan, make_plan
from registry.quantization.choice import chosen
from registry.quantization.plan import Quantized, quantize
from registry.rows import flat_rules, is_chained, rows_of, unrepeated
from registry.source import Source
from registry.specs import ArchitectureSpec, FormatSpec
from registry.states import is_state, with_states
from registry.storage import Laid, Request
from registry.target import Target, bind_target, kept
from registry.version import library_version

MANIFEST_VERSION = 1


@frozen(eq=False)
class Prepared:
    """A conversion that only has to be carried out. `told`: its layout is one that was asked for."""

    source: Source
    spec: FormatSpec
    parallel: Parallel
    target: Target
    plan: Plan
    notes: tuple[str, ...]
    told: bool
    quantized: Quantized | None = None


def merged_options(spec: FormatSpec, architecture: ArchitectureSpec, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The format's options with what the user gave. Raises ArgumentError listing everything that is wrong."""
    options = {name: option.default for name, option in spec.options.items()}
    if added := extension(spec, architecture):
        options |= added.options
    problems = []
    for name, value in (given or {}).items():
        if name not in spec.options:
            problems.append(f"unknown option {name!r}; {spec.name} has {', '.join(spec.options) or 'none'}")
            continue
        option = spec.options[name]
        if option.choices and not any(value == c and type(value) is type(c) for c in option.choices):
            problems.append(f"option {name!r} is one of {', '.join(map(str, option.choices))}, found {value!r}")
        elif option.default is not None and not option.choices and type(value) is not type(option.default):
            problems.append(f"option {name!r} is of type {type(option.default).__name__}, found {value!r}")
        elif type(value) is int and value < 1 and not option.choices:
            problems.append(f"option {name!r} must be at least 1, found {value!r}")
        options[name] = value
    if problems:
        raise ArgumentError(
            f"bad options for {spec.name}", details=problems, hint="`registry formats` lists the options of each format"
        )
    return options


def wants_states(to: str, options: Mapping[str, Any] | None) -> bool:
    """Does the target take optimizer state, and does the user want it there?"""
    spec = catalog.format_spec(to)
    chosen = (options or {}).get(
        "optimizer", spec.options["optimizer"].default if "optimizer" in spec.options else None
    )
    return bool(spec.states) and chosen != "none"


def fitted(spec: FormatSpec, parallel: Parallel) -> tuple[Parallel, list[str]]:
    """The dimensions of a layout that the format shards over; a note about those that have no effect on it."""
    kept = {dim: parallel.size(dim) if dim in spec.parallel else 1 for dim in ("tp", "vpp", "ep", "cp")}
    lost = [dim for dim in ("tp", "pp", "vpp", "ep", "etp") if dim not in spec.parallel and parallel.size(dim) > 1]
    lost = [dim for dim in lost if not (dim == "etp" and parallel.etp in (None, parallel.tp))]
    pp: int | tuple[int, ...] = (parallel.layers or parallel.pp) if "pp" in spec.parallel else 1
    if parallel.layers and "pp" in spec.parallel and "vpp" in lost:
        raise ArgumentError(
            f"{spec.name} has no virtual pipeline stages", found=f"vpp {parallel.vpp} with a list of layer counts"
        )
    note = [f"{spec.name} is not sharded over {', '.join(lost)}: those sizes have no effect"] if lost else []
    etp = parallel.etp if "etp" in spec.parallel else None
    return Parallel(pp=pp, etp=etp, **kept, nested=spec.experts_within is not None), note


def _extends(architecture: str, spec: FormatSpec) -> bool:
    return extension(spec, catalog.architecture(architecture)) is not None


def hub_variants(source: Source) -> dict[str, str]:
    """How the HuggingFace files that a checkpoint came from spell their names."""
    if source.spec.rules_from == "architecture":
        return dict(source.bound.variants)
    carried = source.opened.state.get("variants")
    return carried if isinstance(carried, dict) else {}


def _choices(source: Source, spec: FormatSpec, options: Mapping[str, Any]) -> dict[str, str]:
    """Variant -> what is written: the default, the user's choice, or what the HuggingFace source had."""
    variants = rules_spec(spec, source.architecture).variants
    choices = {variant: next(iter(named)) for variant, named in variants.items()}
    if spec.rules_from == "architecture":
        choices |= {k: v for k, v in hub_variants(source).items() if v in variants.get(k, {})}
    choices |= {variant: str(options[variant]) for variant in variants if variant in options}
    for variant, named in variants.items():
        if not named[choices[variant]].written:
            choices[variant] = next(choice for choice, v in named.items() if v.written)
    return choices


def prepare_target(
    source: Source, spec: FormatSpec, parallel: Parallel, options: Mapping[str, Any], dtype: str | None
) -> tuple[Source, Target, Plan, Quantized | None]:
    """Bind the target and plan every copy; the source has what is made up for it besides.

    Raises ArgumentError, CheckpointError, MappingError and ParallelError.
    """
    source = with_derived(source, spec, dtype)
    target = bound_target(source, spec, parallel, options, dtype)
    choice = chosen(spec.quantizations, options)
    if choice is None:
        plan = make_plan(source.bound, source.opened, target.groups, target.slots, source.model)
        return source, target, plan, None
    rules = list(format_rules(spec, source.architecture))
    made = quantize(source, spec, choice, rules, parallel, options, _choices(source, spec, options), dtype)
    return made.source, made.target, made.plan, made


def bound_target(
    source: Source, spec: FormatSpec, parallel: Parallel, options: Mapping[str, Any], dtype: str | None
) -> Target:
    """Everything that the target will hold, of all ranks."""
    name = source.architecture.name
    if spec.closed and extension(spec, source.architecture) is None:
        raise MappingError(
            f"{spec.name} does not know the architecture {name}", where=source.opened.path,
            expected="one of " + ", ".join(a for a in catalog.names("architecture") if _extends(a, spec)), found=name,
            hint=f"add `formats: {{{spec.name}: ...}}` to the architecture's spec if its readers do know it",
        )  # fmt: skip
    if dtype is not None and not is_float(dtype):
        raise ArgumentError("dtype casts to a floating-point type of at least 16 bits", found=dtype)
    _check_limits(source, spec, parallel)
    choices = _choices(source, spec, options)
    kinds = [state for state in source.model.states if state in spec.states]
    owner = rules_spec(spec, source.architecture)
    rules = list(with_states(list(format_rules(spec, source.architecture)), spec, kinds, owner))
    if spec.tied:
        again = {"tied": "true"}
        rules = [(p, r if any(map(is_state, r.parsed.tensors)) else r.model_copy(update=again)) for p, r in rules]
    rows = bool(kinds) and spec.flat is not None and spec.flat.written
    rules = list(flat_rules(spec, rules, source.model)) if rows else rules

    def bound(layout: Parallel) -> Target:
        return bind_target(spec, rules, source.model, layout, options, choices, source.dtype_of, dtype)

    try:
        target = bound(parallel)
    except ParallelError as error:
        raise _with_nearest(error, spec, parallel, bound) from None
    target = kept(target, unrepeated(spec, source.model, parallel, target.slots)) if rows else target
    spare = source.architecture.spare
    if lost := [t for t in target.homeless if t not in spare and not (is_state(t) and not kinds)]:
        raise MappingError(
            f"{spec.name} has no place for some tensors", where=source.opened.path, details=lost,
            hint=f"add rules for them to the format spec {spec.name}",
        )  # fmt: skip
    return target


def _check_limits(source: Source, spec: FormatSpec, parallel: Parallel) -> None:
    """Refuse a layout that readers of the format do not take for this family. Raises ParallelError."""
    added = extension(spec, source.architecture)
    for dim, most in added.limits.items() if added else ():
        if parallel.size(dim) > most:
            raise ParallelError(
                f"{spec.name}'s readers take {source.architecture.name} with {dim} of at most {most}",
                where=source.opened.path, expected=f"{dim} {most}", found=str(parallel), hint=f"choose {dim} {most}",
            )  # fmt: skip


def _with_nearest(
    error: ParallelError, spec: FormatSpec, parallel: Parallel, bound: Callable[[Parallel], Target]
) -> ParallelError:
    """The error, naming the next smaller and larger sizes that the model divides over: of ep, or of tp."""

    def fits(**sizes: int) -> bool:
        try:
            layout = parallel
            for dim in sorted(sizes):
                layout = layout.with_size(dim, sizes[dim])
            bound(layout)
        except ParallelError:
            return False
        return True

    def near(size: int) -> tuple[range, range]:
        return range(size - 1, 0, -1), range(size + 1, 2 * size + 1)

    eps = range(parallel.ep, 0, -1) if spec.experts_within else (parallel.ep,)
    found = [f"ep {n}" for side in near(parallel.ep) for n in islice((n for n in side if fits(ep=n)), 1)]
    for side in near(parallel.tp):
        both = next(((tp, ep) for tp in side for ep in eps if fits(tp=tp, ep=ep)), None)
        if both is not None:
            found.append(f"tp {both[0]}" + (f" with ep {both[1]}" if both[1] != parallel.ep else ""))
    hint = f"choose {' or '.join(found)}" if found else error.hint
    return ParallelError(error.problem, where=error.where, expected=error.expected, found=error.found,
                         hint=hint, details=error.details)  # fmt: skip


def prepare(
    source: Source, to: str, *, parallel: Parallel | None = None, dtype: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Prepared:  # fmt: skip
    """Bind and plan a conversion of an opened source to the format `to`."""
    spec = catalog.format_spec(to)
    options = merged_options(spec, source.architecture, options)
    layout, notes = fitted(spec, parallel or Parallel())
    source, target, plan, quantized = prepare_target(source, spec, layout, options, dtype)
    coded = [(copies.tensor, copies.values) for copies in plan.copies if copies.values.source != copies.values.target]
    shifted = sorted({tensor for tensor, v in coded if v.source[:3] != v.target[:3]})
    if first := sorted({tensor for tensor, v in coded if v.target.via not in (None, v.source_dtype)}):
        notes.append(f"rounded to {dtype} before anything else, as the option cast_first says: {', '.join(first)}")
    if shifted:
        notes.append(f"stored with another offset, which may round: {', '.join(shifted)}")
    notes += [*_spared(source, spec, target), *(quantized.notes if quantized is not None else ())]
    return Prepared(source, spec, layout, target, plan, (*source.notes, *notes), parallel is not None, quantized)


def _spared(source: Source, spec: FormatSpec, target: Target) -> Iterator[str]:
    """What one of the two formats leaves out."""
    held = {source.model.home(f.tensor) for group in source.bound.groups for f in group.fragments}
    for tensor, reason in source.architecture.spare.items():
        if tensor in target.homeless:
            yield f"{spec.name} leaves {tensor} out: {reason}"
        elif tensor in source.model.tensors and tensor not in held:
            yield f"{source.spec.name} has no {tensor}, so it is zeros: {reason}"


@no_collection()
def lay_out(prepared: Prepared, options: Mapping[str, Any] | None, dtype: str | None) -> tuple[Laid, list[str]]:
    """Ask the target's container where everything goes; notes on facts that the target's own config cannot say."""
    asked, notes = request(prepared, options, dtype)
    laid = catalog.container(prepared.spec.container).lay_out(asked)
    for name, content in prepared.quantized.small.items() if prepared.quantized is not None else ():
        laid.small[name] = (json.dumps(content, indent=4) + "\n").encode()
    return laid, notes


def request(prepared: Prepared, options: Mapping[str, Any] | None, dtype: str | None) -> tuple[Request, list[str]]:
    """What the target's container is asked for."""
    source, spec = prepared.source, prepared.spec
    chosen = merged_options(spec, source.architecture, options)
    facts = {**source.model.facts, "dtype": dtype or source.dtype}
    hub_config = source.hub_config
    if dtype is not None:
        hub_config = write_document({"dtype": dtype}, source.architecture.config, facts, hub_config)
    env = {**chosen, **facts, **prepared.parallel.env(), **source.model.functions}
    if spec.rules_from == "architecture":
        document = hub_config
    else:
        same_kind = spec.container == source.spec.container or spec.config.facts == source.spec.config.facts
        base = source.opened.document if same_kind else {}
        document = write_document(facts, config_map(spec, source.architecture), env, base)
    if prepared.quantized is not None:
        document = with_fields(document, prepared.quantized.fields)
    manifest = {
        "version": MANIFEST_VERSION,
        "written_by": f"checkpoint-registry {library_version()}",
        "format": spec.name,
        "architecture": source.architecture.name,
        "metadata": source.opened.state.get("metadata"),
        "variants": hub_variants(source),
        "dtypes": _forced(prepared, dtype),
    }
    asked = Request(
        spec.name, prepared.target.slots, prepared.target.objects, document, prepared.parallel, chosen, source.opened,
        source.opened.iteration if spec.states and source.spec.states else None,
        (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode(), hub_config, source.opened.side_files,
        tuple(state for state in source.model.states if state in spec.states),
        rows=rows_of(spec, source.model, prepared.parallel, prepared.target.slots),
        chained=is_chained(spec, prepared.parallel, prepared.target.slots) if prepared.told or spec.ranked else None,
    )  # fmt: skip
    return asked, list(_unsaid(source, spec, document))


def _forced(prepared: Prepared, dtype: str | None) -> dict[str, str]:
    """The types of tensors that the target stores in a type of its own, for the way back."""
    source, found = prepared.source, {}
    for group in prepared.target.groups:
        for tensor in {source.model.home(f.tensor) for f in group.fragments} & source.model.tensors.keys():
            own = next(iter(source.dtypes.get(tensor, {source.dtype})))
            own = dtype if dtype is not None and is_float(own) else own
            if group.dtype != own:
                found[tensor] = own
    return found


def _unsaid(source: Source, spec: FormatSpec, document: Mapping[str, Any]) -> Iterator[str]:
    """A round trip of tensors does not see what a config loses; so it is said."""
    fields = config_map(spec, source.architecture)
    said = read_facts(document, fields)
    loose = loose_facts(fields) | loose_facts(source.architecture.config)
    for name, value in source.model.facts.items():
        if name in loose or name not in source.architecture.config.facts:
            continue
        if said.get(name) != value and (value or said.get(name)):
            what = f"says {said[name]!r}" if said.get(name) is not None else "has no place for it"
            yield f"{name} is {value!r}, but {spec.name}'s own config {what} (it travels along in the source's config)"
    if spec.rules_from == "format" and (lost := _lost(source)):
        yield (
            f"config fields that {spec.name}'s own config has no place for: {', '.join(lost)} "
            "(they travel along in the source's config)"
        )


def _lost(source: Source) -> list[str]:
    """The fields of a config.json that only another config.json has a place for."""
    formats = [catalog.format_spec(name) for name in catalog.names("format")]
    own = source.architecture.config
    maps = [own, *(spec.config for spec in formats if spec.rules_from == "architecture")]
    neutral = [glob for config in maps for glob in config.neutral]
    return lost_fields(source.hub_config, source.architecture, neutral, own.usual)

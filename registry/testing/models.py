"""Small models to test with: their configs, the tensors that a spec says they have, and directories of them.

config = small_config("my_architecture")
random_model(config, folder)                       # what the spec says, with random bits
transformers_model(config, folder)                 # what the model's own transformers class says
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from registry import catalog, expressions
from registry.defaults import hub_facts
from registry.errors import ArgumentError, MappingError, ParallelError, RegistryError
from registry.model import LogicalModel, extension, format_rules, logical_model, read_facts, write_document
from registry.parallel import Parallel
from registry.prepare import fitted, merged_options
from registry.source import read_config
from registry.specs import ArchitectureSpec
from registry.target import Target, bind_target
from registry.testing.tensors import random_bits

if TYPE_CHECKING:
    import torch

#: A HuggingFace config, as plain data or as an object of transformers.
Config = Mapping[str, Any]
#: Chooses one of several values of a fact: `choose(name, values)`.
Choose = Callable[[str, Sequence[Any]], Any]
HUB = "huggingface"
#: Layouts that tell formats apart: one kind of parallelism each, all together, more ranks than heads, uneven stages.
LAYOUTS = (
    Parallel(),
    Parallel(tp=2),
    Parallel(pp=2),
    Parallel(tp=2, pp=2),
    Parallel(tp=4, pp=4),
    Parallel(tp=8),
    Parallel(tp=2, pp=[1, 3]),
    Parallel(pp=2, vpp=2),
    Parallel(tp=2, ep=2),
    Parallel(tp=2, pp=2, ep=4, etp=1),
)
#: What facts are drawn from; heads and widths follow below.
_SIZES: dict[str, Sequence[int]] = {"layers": (4, 0, 1, 2, 5), "vocab_size": (19, 1, 131), "max_positions": (46, 7)}
_HEADS: dict[str, Sequence[int]] = {"kv_heads": (2, 4, 1), "rep": (2, 3, 1), "head_dim": (6, 2, 4)}


def config_of(config: Any) -> dict[str, Any]:
    """A config as plain data: a mapping, an object of transformers, or a directory that has one."""
    return read_config(config)


def model_of(config: Config) -> LogicalModel:
    """The model that a config describes. Raises SpecError for an unknown architecture, and MappingError."""
    architecture = catalog.architecture(config["model_type"])
    return logical_model(architecture, hub_facts(config, architecture)[0])


def bound(to: str, model: LogicalModel, layout: Parallel, dtype: str = "float32") -> Target:
    """All that a format would hold of a model at one layout, bound as `convert` binds it. Nothing is read or written.

    Raises SpecError for an unknown format, MappingError, and ParallelError for a layout that does not fit.
    """
    spec = catalog.format_spec(to)
    owner = model.architecture if spec.rules_from == "architecture" else spec
    options = merged_options(spec, model.architecture, None)
    choices = {
        variant: next(choice for choice, v in named.items() if v.written) for variant, named in owner.variants.items()
    }
    choices |= {variant: str(options[variant]) for variant in choices if variant in options}
    layout, _ = fitted(spec, layout)
    rules = format_rules(spec, model.architecture)
    return bind_target(spec, rules, model, layout, options, choices, lambda _: dtype, None)


def stored_tensors(config: Config, dtype: str = "float32", to: str = HUB) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of everything that a spec says a model has, on one rank. Nothing is read or written.

    Raises SpecError for an unknown architecture or format and MappingError for a config that describes no model.
    """
    slots = bound(to, model_of(config), Parallel(), dtype).slots
    return {slot.name: (slot.shape if slot.whole is None else slot.whole, slot.dtype) for slot in slots}


def is_exact(to: str, config: Config, dtype: str = "float32") -> bool:
    """Does the format store the very bits that HuggingFace stores, in the same types and without an offset?"""
    model = model_of(config)

    def stored(where: str) -> dict[str, set[tuple[Any, str]]]:
        found: dict[str, set[tuple[Any, str]]] = {}
        for group in bound(where, model, Parallel(), dtype).groups:
            for fragment in group.fragments:
                found.setdefault(model.home(fragment.tensor), set()).add((group.coding, group.dtype))
        return found

    ours, theirs = stored(HUB), stored(to)
    return all(ours[tensor] == coded for tensor, coded in theirs.items() if tensor in ours)


def random_model(config: Any, folder: Path, dtype: str = "float32", seed: int = 0) -> Path:
    """Write what the spec says of a model as a HuggingFace directory: random bits, an odd tokenizer, a template.

    The directory is what `convert` gives back, so that it can be compared byte for byte. Returns `folder`.
    """
    config = config_of(config)
    tensors = random_tensors(config, dtype, seed)
    save_directory(folder, tensors, {**config, "unknown_field": {"ünïcode": [1, None]}})
    (folder / "tokenizer ünï.json").write_bytes(b"\x00\xff")
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    return folder


def random_tensors(config: Config, dtype: str = "float32", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random bits for everything that `stored_tensors` lists; what is one tensor under two names is so here too."""
    model = model_of(config)
    target = bound(HUB, model, Parallel(), dtype)
    found = {}
    for group in target.groups:
        homes = " ".join(sorted(f"{model.home(f.tensor)}{f.lo}{f.size}{f.stride}{f.offset}" for f in group.fragments))
        for k, member in enumerate(group.members):
            slot = target.slots[int(member)]
            at = sorted((axis, int(column[k])) for axis, column in group.index.items())
            key = zlib.crc32(f"{homes} {at}".encode())
            found[slot.name] = random_bits(slot.shape, slot.dtype, (seed ^ key) & 0x7FFFFFFF)
    return found


def save_directory(folder: Path, tensors: Mapping[str, torch.Tensor], config: Config) -> None:
    """Write tensors and config as a HuggingFace directory of one file."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    # a safetensors file holds no tensor twice: what are copies here are copies there
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    text = json.dumps(dict(config), indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def load_directory(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the config of a HuggingFace directory."""
    from safetensors.torch import load_file

    tensors = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    return tensors, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def transformers_class(config: Config) -> Any:
    """The transformers class that a config or its architecture's spec names, or None where there is none."""
    import transformers

    spec = catalog.architecture(config["model_type"])
    named = config.get("architectures") or spec.config.constants.get("architectures") or []
    return next((found for name in named if (found := getattr(transformers, name, None)) is not None), None)


def random_like(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Random numbers that depend on the name only; norms' weights are near one. On the meta device, none at all."""
    import torch

    if tensor.is_meta:
        return torch.empty_like(tensor)
    draw = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    is_norm = tensor.ndim == 1 and "norm" in name.lower().replace(".ln_", ".norm_") and name.endswith("weight")
    draw = draw * (0.2 if tensor.ndim < 2 else 0.06) + (1 if is_norm else 0)
    return draw.to(tensor.dtype)


def transformers_model(config: Any, folder: Path, dtype: str = "float32", model_class: Any = None) -> Path:
    """Build a model with its own transformers class, fill it with random numbers and save it as that class does.

    Every parameter is random, norms and biases too, so that one in the wrong place changes what the model computes.
    Numbers depend on the names only; those of other types are the float32 ones, rounded. Returns `folder`.
    """
    import torch

    fields = config_of(config)
    model_class = model_class or transformers_class(fields)
    if model_class is None:
        raise MappingError(
            f"transformers has no class for {fields.get('model_type')!r}", expected="a class of transformers",
            found=fields.get("architectures"), hint="name it in the config's `architectures`, or override `model()`",
        )  # fmt: skip
    model = model_class(model_class.config_class(**fields))
    wide = getattr(model_class, "_keep_in_fp32_modules_strict", None) or ()
    kept = {}
    for key, tensor in {t.data_ptr(): (k, t) for k, t in reversed(model.state_dict().items())}.values():
        if tensor.is_floating_point():
            tensor.copy_(random_like(tensor, key))
        if any(part in key for part in wide):
            kept[key] = tensor.clone()
    model.to(getattr(torch, dtype))
    for key, tensor in kept.items():
        module = model.get_submodule(key.rpartition(".")[0])
        getattr(module, key.rpartition(".")[2]).data = tensor
    model.save_pretrained(folder)
    return folder


def takes(to: str, config: Config) -> bool:
    """Has the format a place for every tensor of a model?"""
    spec, model = catalog.format_spec(to), model_of(config)
    if spec.closed and extension(spec, model.architecture) is None:
        return False
    lost = set(bound(to, model, Parallel()).homeless) - set(model.architecture.spare)
    return not lost


def fitting_layouts(to: str, config: Config, layouts: Sequence[Parallel] = LAYOUTS) -> list[Parallel]:
    """Those of some layouts that a format can hold of a model, each once. Raises SpecError and MappingError."""
    return list(_fitting(to, config, layouts))


def _fitting(to: str, config: Config, layouts: Sequence[Parallel]) -> Iterator[Parallel]:
    spec, model = catalog.format_spec(to), model_of(config)
    added = extension(spec, model.architecture)
    seen = set()
    for layout in layouts:
        used = [dim for dim in ("tp", "pp", "vpp", "ep") if layout.size(dim) > 1]
        if not set(used) <= set(spec.parallel) or (layout.layers and "pp" not in spec.parallel):
            continue
        if any(layout.size(dim) > most for dim, most in (added.limits if added else {}).items()):
            continue
        if layout.ep > 1 and not any("expert" in axes for axes in model.tensors.values()):
            continue
        try:
            bound(to, model, layout)
        except (ParallelError, ArgumentError):
            continue
        if str(layout) not in seen:
            seen.add(str(layout))
            yield layout


def small_config(architecture: str, **fields: Any) -> dict[str, Any]:
    """A small config of a registered architecture, made of what its spec says, with some fields given.

    Raises MappingError where no sizes were found that go together: such an architecture needs configs of its own.
    """
    spec = catalog.architecture(architecture)
    failed: RegistryError | None = None
    for seed in range(20):
        random = Random(seed)

        def choose(name: str, values: Sequence[Any], seed: int = seed, random: Random = random) -> Any:
            return values[0] if not seed else random.choice(values)

        try:
            config = {**drawn_config(spec, choose), **fields}
            stored_tensors(config)
        except RegistryError as error:
            failed = error
        else:
            return config
    raise MappingError(
        f"no small config of {architecture} was found", found=failed.problem if failed else None,
        hint="give some: `configs` of MappingTests, `architectures` of FormatTests",
        details=failed.details if failed else (),
    )  # fmt: skip


def drawn_config(spec: ArchitectureSpec, choose: Choose) -> dict[str, Any]:
    """A config with small sizes, in the fields that the spec reads them from. It may describe no model: try it."""
    heads = {name: choose(name, values) for name, values in _HEADS.items()}
    facts = {name: choose(name, values) for name, values in _SIZES.items()}
    facts |= {"kv_heads": heads["kv_heads"], "heads": heads["kv_heads"] * heads["rep"], "head_dim": heads["head_dim"]}
    facts |= {"hidden_size": facts["heads"] * facts["head_dim"], "ffn_size": choose("ffn_size", (24, 8, 16))}
    used = {name for text in spec.axes.values() for name in expressions.parse(text).names}
    written = {name for text in spec.config.write.values() for name in expressions.parse(text).names}
    for name, entry in spec.config.facts.items():
        if name in facts or name in spec.facts or not (entry.field or name in written):
            continue
        if type(entry.default) is bool:
            facts[name] = choose(name, (entry.default, not entry.default))
        elif name in used and (entry.default is None or type(entry.default) is int):
            facts[name] = choose(name, (4, 2, 1))
        elif entry.default is not None:
            facts[name] = entry.default
        elif name in written:
            facts[name] = 1
    known = {name: value for name, value in facts.items() if name in spec.config.facts}
    config = write_document(known, spec.config, {**spec.facts, **facts}, {})
    # What the config cannot say is left to its class, as in a published file.
    said = read_facts(config, spec.config)
    return (
        config
        if said.get("layers") == facts["layers"]
        else write_document({**said, **known}, spec.config, facts, config)
    )

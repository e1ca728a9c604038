"""Argument rules and experimental markers: the decorators that guard the public surface.

`checked` validates a call's arguments and reports all that is wrong with them in one `ArgumentError`. `experimental`
keeps a function or class shut until experimental features are switched on. pydantic takes longer to import than the
rest of the library, so it is imported at the first call of a checked function.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.metadata
import inspect
import logging
import os
import reprlib
import sys
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import attrs
from packaging.version import InvalidVersion, Version

from registry.errors import ArgumentError, ExperimentalError

T = TypeVar("T", bound=Callable[..., Any])
_Call = tuple[tuple[Any, ...], dict[str, Any]]
_log = logging.getLogger(__name__)
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
# From Python 3.14 on, annotations are evaluated when they are read; this format (FORWARDREF) bears unknown names.
_FORMAT: dict[str, Any] = {"annotation_format": 3} if sys.version_info >= (3, 14) else {}
# What cannot be checked, and what is left to pydantic as it is.
_UNCHECKED = (Any, object, typing.IO, typing.TextIO, typing.BinaryIO, typing.Unpack)
_EXACT = (int, float, str, bytes, bool, complex, types.NoneType, type, typing.Annotated)
# The newest decides. Leaving a block removes its own wherever it is, so that blocks of several threads may overlap.
_switches: list[tuple[object, bool]] = []
_announced: dict[str, object] = {}
_rebuilding = contextvars.ContextVar("_rebuilding", default=False)


@attrs.frozen
class Rule:
    """A named condition on the parameters that `condition` takes, read by name."""

    message: str
    condition: Callable[..., Any]
    parameters: tuple[str, ...]

    def problem(self, values: dict[str, Any]) -> str:
        """What to report where the rule does not hold for `values`; empty where it does."""
        given, note = {name: values[name] for name in self.parameters}, ""
        try:
            if self.condition(*given.values()):
                return ""
        except Exception as raised:
            # Often a value that another rule forbids (a division by pp=0), which must not hide that rule.
            note = f"; the check raised {type(raised).__name__}: {raised}"
        found = ", ".join(f"{name} = {_show(value)}" for name, value in given.items())
        return f"{', '.join(given)}: expected that {self.message}, found {found}{note}"


def rule(message: str, condition: Callable[..., Any]) -> Rule:
    """A rule for `checked`: `message` says what holds ("tp is at least 1"), `condition` whether it does.

    `condition` is given the parameters that its own are named after. Where it raises, the rule counts as broken.
    """
    signature = inspect.signature(condition)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if not kinds or not kinds <= {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}:
        problem, need = "a condition must name the parameters that it is given", "such as lambda tp, pp: ..."
        raise ArgumentError(problem, where=f"the rule that {message}", expected=need, found=signature)
    return Rule(message, condition, tuple(signature.parameters))


def checked(*rules: Rule) -> Callable[[T], T]:
    """Check the arguments of every call of a function, method or class against its annotations and `rules`.

    All that is wrong with a call is reported in one `ArgumentError`. Types are strict: neither True nor "2" is an int.
    The function gets what the caller passed, except that an int given for a float becomes one, and that a parameter
    annotated with `Annotated[...]` gets what pydantic makes of it. Rules see the values in force, defaults included;
    those over a parameter of a wrong type are skipped. A call that does not fit the signature stays a TypeError.
    """
    if not all(isinstance(each, Rule) for each in rules):
        raise TypeError("checked takes rules: @checked() or @checked(rule(message, condition), ...)")

    def decorate(target: Any) -> Any:
        if isinstance(target, (staticmethod, classmethod)):
            return type(target)(decorate(target.__func__))
        where = f"{target.__module__}.{target.__qualname__}"
        if not isinstance(target, type):
            return _wrap(target, _ArgumentCheck(target, rules, where))
        if (init := vars(target).get("__init__")) is None:
            raise TypeError(f"{where} has no __init__ of its own: put checked above what generates it")
        return _set(target, __init__=_wrap(init, _ArgumentCheck(init, rules, where)))

    return decorate


class _ArgumentCheck:
    """Turns the arguments of a call into the arguments to run with, or raises what is wrong with them."""

    def __init__(self, function: Callable[..., Any], rules: Sequence[Rule], where: str) -> None:
        self.function, self.rules, self.where = function, rules, where
        self.signature = inspect.signature(function, **_FORMAT)
        self.validators: dict[str, Callable[[Any], Any]] | None = None
        known = self.signature.parameters
        lacking = [f"{name}, in the rule that {r.message}" for r in rules for name in r.parameters if name not in known]
        if lacking:
            problem, names = "rules name parameters that the function lacks", ", ".join(known) or "no parameters"
            raise ArgumentError(problem, where=where, expected=names, details=lacking)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        from pydantic import ValidationError

        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as misfit:
            raise TypeError(f"{self.function.__qualname__}() {misfit}") from None
        if self.validators is None:  # Built apart and assigned whole: another thread sees all validators or none.
            self.validators = _validators(self.function, self.signature)
        details, wrong = list[str](), set[str]()
        for name, value in bound.arguments.items():
            try:
                if name in self.validators:
                    bound.arguments[name] = self.validators[name](value)
            except ValidationError as error:
                wrong.add(name)
                details += _type_problems(name, self.signature.parameters[name].annotation, value, error)
        args, kwargs = bound.args, bound.kwargs
        bound.apply_defaults()
        sound = [each for each in self.rules if wrong.isdisjoint(each.parameters)]
        details += [problem for each in sound if (problem := each.problem(bound.arguments))]
        if details:
            raise ArgumentError("invalid arguments", where=self.where, details=details)
        return args, kwargs


def _validators(function: Callable[..., Any], signature: inspect.Signature) -> dict[str, Callable[[Any], Any]]:
    """For each parameter that can be checked: a function that gives the value to pass on, or a ValidationError."""
    namespace = getattr(inspect.unwrap(function), "__globals__", {})
    validators = {}
    for name, parameter in signature.parameters.items():
        try:
            validators[name] = _validator(parameter, namespace)
        except Exception as problem:  # Evaluating an annotation can raise anything, and must not fail the call.
            _log.debug("parameter %s of %s is not checked: %s", name, function, problem)
    return validators


def _validator(parameter: inspect.Parameter, namespace: dict[str, Any]) -> Callable[[Any], Any]:
    from pydantic import ConfigDict, TypeAdapter

    # get_type_hints resolves nested forward references as well, but fails as a whole: hence one parameter at a time.
    carrier = types.FunctionType((lambda: None).__code__, namespace)
    carrier.__annotations__ = {"value": Any if parameter.annotation is parameter.empty else parameter.annotation}
    hint = typing.get_type_hints(carrier, include_extras=True)["value"]
    takes_result = hint is float or typing.get_origin(hint) is typing.Annotated
    target = _checkable(hint)
    if parameter.kind is parameter.VAR_POSITIONAL:
        target = types.GenericAlias(tuple, (target, ...))
    elif parameter.kind is parameter.VAR_KEYWORD:
        target = types.GenericAlias(dict, (str, target))
    validate = TypeAdapter[Any](target, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python
    # Other results are copies at best: of a list that the caller shares, or of every tensor in a mapping.
    return lambda value: result if isinstance(result := validate(value), float) or takes_result else value


def _checkable(hint: Any) -> Any:
    """`hint` in terms that pydantic checks without iterating over, copying or looking into what is not plain data."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in _UNCHECKED or isinstance(origin, (TypeVar, typing.ParamSpec)):
        return Any
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(_checkable, args))]  # noqa: UP007
    if origin is typing.Literal:  # Left to pydantic, True would pass for Literal[1].
        return _passing(lambda v: any(type(v) is type(c) and v == c for c in args), f"one of {str(args)[1:-1]}")
    if origin in (Iterable, Collection, Sequence):
        item: Any = _checkable(args[0] if args else Any)
        # A lone str where several are expected is a slip, although it is a sequence of str.
        return list[item] | tuple[item, ...] | _instance(origin, besides=(list, tuple, str, bytes))
    if origin in (Mapping, MutableMapping):
        pair = tuple(map(_checkable, args or (Any, Any)))
        return types.GenericAlias(dict, pair) | _instance(origin, besides=(dict,))
    if origin in (list, tuple, dict, set, frozenset):
        return origin[tuple(map(_checkable, args))] if args else hint
    return hint if origin in _EXACT or not isinstance(origin, type) else _instance(origin)


def _instance(kind: type, besides: tuple[type, ...] = ()) -> Any:
    isinstance(None, kind)  # Raises for the classes that cannot be asked, such as most protocols.
    return _passing(lambda v: isinstance(v, kind) and not isinstance(v, besides), f"an instance of {kind.__name__}")


def _passing(accepts: Callable[[Any], bool], expected: str) -> Any:
    from pydantic import AfterValidator
    from pydantic_core import PydanticCustomError

    def validate(value: Any) -> Any:
        if accepts(value):
            return value
        raise PydanticCustomError("expected", "{expected}", {"expected": expected})

    return typing.Annotated[Any, AfterValidator(validate)]


def _type_problems(label: str, annotation: Any, value: Any, problem: Any) -> list[str]:
    """One line for each place in `value` that pydantic finds wrong; beyond twenty, their number."""
    found: dict[tuple[Any, ...], tuple[Any, list[str]]] = {}
    for error in problem.errors(include_url=False, include_context=False):
        path, at = tuple[Any, ...](), value
        for step in error["loc"]:
            # The steps that lead nowhere are labels that pydantic puts in for the branches of unions.
            if step in at if isinstance(at, dict) else isinstance(at, (list, tuple)) and isinstance(step, int):
                path, at = (*path, step), at[step]
        phrase = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        found.setdefault(path, (error["input"] if path else value, []))[1].append(phrase)
    # The branch of a union that got furthest is the one that was meant; what the others say only distracts.
    passed = {path[:end] for path in found for end in range(len(path))}
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    lines = []
    for path, (culprit, phrases) in found.items():
        if path not in passed:
            expected = text if not path and "Annotated" not in text else " or ".join(dict.fromkeys(phrases))
            place = label + "".join(f"[{step!r}]" for step in path)
            lines.append(f"{place}: expected {expected}, found {_show(culprit)}")
    return lines if len(lines) <= 20 else [*lines[:20], f"{label}: {len(lines) - 20} more elements are wrong"]


def _show(value: Any) -> str:
    text = " ".join(_repr.repr(value).split())
    return text if value is None else f"{text} ({type(value).__qualname__})"


def _set(target: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(target, name, value)
    return target


def _wrap(function: Callable[..., Any], prepare: Callable[[tuple[Any, ...], dict[str, Any]], _Call]) -> Any:
    """`function`, with its arguments passed through `prepare` ahead of every call."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = prepare(args, kwargs)
        return function(*args, **kwargs)

    async def run_async(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = prepare(args, kwargs)
        return await function(*args, **kwargs)

    return functools.wraps(function)(run_async if inspect.iscoroutinefunction(function) else run)


@attrs.frozen
class ExperimentalInfo:
    """What an experimental marker says; `end_of_life` ("0.4") is the first minor version past the experiment."""

    name: str
    introduced_with: str
    lifetime: int
    end_of_life: str

    def admit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """Raise unless experimental features are on; say once in a process that this is used, and that it expired."""
        if not experimental_enabled():
            where = f"introduced with version {self.introduced_with}"
            hint = "call registry.validation.enable_experimental(True), or set REGISTRY_EXPERIMENTAL=1"
            raise ExperimentalError(f"{self.name} is experimental", where=where, hint=hint)
        if _announced.setdefault(self.name, mark := object()) is mark:  # Atomic: one thread finds its own mark.
            _log.info("%s is experimental: it may change in any version", self.name)
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # Run from its sources: of unknown age.
                now = Version(importlib.metadata.version("checkpoint-registry"))
                # By major and minor alone, so that a pre-release of the version that ends the experiment is past it.
                if Version(f"{now.epoch}!{now.major}.{now.minor}") >= Version(self.end_of_life):
                    text = (
                        f"{self.name}, experimental since {self.introduced_with}, is past its end, {self.end_of_life}"
                    )
                    _log.warning(text)
                    warnings.warn(text, DeprecationWarning, stacklevel=3)
        return args, kwargs


def enable_experimental(on: object = True) -> contextlib.AbstractContextManager[object]:
    """Switch experimental features on (or off) for the whole process, whatever REGISTRY_EXPERIMENTAL says.

    A plain call holds until the next one; `with enable_experimental():` holds until the block ends.
    """
    block = contextlib.ExitStack()
    _switches.append(setting := (block, bool(on)))
    block.callback(_switches.remove, setting)
    return block


def experimental_enabled() -> bool:
    """Whether experimental functions and classes may be used now."""
    for _, on in reversed(_switches):
        return on
    return os.environ.get("REGISTRY_EXPERIMENTAL", "").strip().lower() in ("1", "true", "yes", "on")


def experimental(introduced_with: str, lifetime: int = 3) -> Callable[[T], T]:
    """Mark a function or class as experimental: it raises `ExperimentalError` until experimental features are on.

    `introduced_with` is the version of this library that brought it, `lifetime` for how many minor versions it may stay
    so. From then on, and in any later major version, its first use warns; it still works. A class stays the class that
    it is: constructing it or a subclass is guarded, while objects that exist can be pickled and copied whatever the
    switch. Put it above decorators that make a new class, such as `attrs.define`.
    """
    problems, version = [], Version("0")
    try:
        version = Version(introduced_with)
    except (InvalidVersion, TypeError):
        problems.append(f"introduced_with: expected a version such as '0.1.0', found {_show(introduced_with)}")
    if not isinstance(lifetime, int) or isinstance(lifetime, bool) or lifetime < 1:
        problems.append(f"lifetime: expected a number of minor versions, at least 1, found {_show(lifetime)}")
    if problems:
        raise ArgumentError("invalid arguments", where=f"{__name__}.experimental", details=problems)
    end = str(Version(f"{version.epoch}!{version.major}.{version.minor + lifetime}"))

    def decorate(target: Any) -> Any:
        if isinstance(target, (staticmethod, classmethod)):
            return type(target)(decorate(target.__func__))
        info = ExperimentalInfo(f"{target.__module__}.{target.__qualname__}", introduced_with, lifetime, end)
        guarded = _guard_class(target, info) if isinstance(target, type) else _wrap(target, info.admit)
        return _set(guarded, __experimental__=info)

    return decorate


def experimental_info(obj: object) -> ExperimentalInfo | None:
    """What the marker of `obj` says, or of the experimental class that `obj` derives from or is an instance of."""
    info = getattr(obj, "__experimental__", None)
    return info if isinstance(info, ExperimentalInfo) else None


def is_experimental(obj: object) -> bool:
    """Whether `obj` is marked as experimental."""
    return experimental_info(obj) is not None


def _guard_class(cls: type, info: ExperimentalInfo) -> Any:
    """Guard `__new__`, the one gate that every way of constructing passes, here and in subclasses that bypass ours."""
    own_hook, own_reduce = vars(cls).get("__init_subclass__"), vars(cls).get("__reduce_ex__")

    @classmethod  # type: ignore[misc]
    def hook(kind: Any, /, **kwargs: Any) -> None:
        (own_hook.__get__(None, kind) if own_hook else _next(kind, cls, "__init_subclass__", hook))(**kwargs)
        _guard_new(kind, info)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        reduced = (own_reduce or _next(type(self), cls, "__reduce_ex__", reduce_ex))(self, protocol)
        return (_rebuild, (reduced[0], *reduced[1]), *reduced[2:]) if isinstance(reduced, tuple) else reduced

    _guard_new(cls, info)
    return _set(cls, __init_subclass__=hook, __reduce_ex__=reduce_ex)


def _guard_new(cls: Any, info: ExperimentalInfo) -> None:
    if getattr(cls.__new__, "_guard", None) is info:
        return
    own = vars(cls).get("__new__")

    def __new__(kind: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not _rebuilding.get():
            info.admit(args, kwargs)
        make = own.__get__(None, kind) if own else _next(kind, cls, "__new__", guarded)
        if make is not object.__new__:
            return make(kind, *args, **kwargs)
        # object.__new__ leaves the arguments to __init__, but refuses them itself once __new__ is overridden.
        if (args or kwargs) and kind.__init__ is object.__init__:
            raise TypeError(f"{kind.__name__}() takes no arguments")
        return make(kind)

    with contextlib.suppress(ValueError):  # Classes written in C may have no signature.
        first = inspect.Parameter("cls", inspect.Parameter.POSITIONAL_ONLY)
        # inspect prefers __new__ to __init__: without this, the signature of the class would be that of ours.
        _set(__new__, __signature__=inspect.Signature([first, *inspect.signature(cls, **_FORMAT).parameters.values()]))
    cls.__new__ = guarded = staticmethod(_set(__new__, _guard=info, __qualname__=f"{cls.__qualname__}.__new__"))


def _next(kind: type, cls: type, name: str, ours: object) -> Any:
    """What `super()` gives a method of `cls` that was called for `kind`."""
    # `dataclass(slots=True)` and `attrs.define` put a class that they make in the place of `cls`, with `ours` in it.
    owner = cls if cls in kind.__mro__ else next(base for base in kind.__mro__ if vars(base).get(name) is ours)
    return getattr(super(owner, kind), name)


def _rebuild(make: Callable[..., Any], *args: Any) -> Any:
    """Make again an object that was pickled or copied: it was let in when it was constructed."""
    context = contextvars.copy_context()
    context.run(_rebuilding.set, True)
    return context.run(make, *args)

"""Rules on arguments and experimental markers: every problem in one error, and no way around the switch."""

from __future__ import annotations

import abc
import asyncio
import copy
import dataclasses
import inspect
import io
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import typing
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, Protocol, TypeVar

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, Field

from registry import validation
from registry.errors import ArgumentError, ExperimentalError, RegistryError
from registry.validation import (
    checked,
    enable_experimental,
    experimental,
    experimental_enabled,
    experimental_info,
    is_experimental,
    rule,
)

if TYPE_CHECKING:
    from nowhere import Missing  # type: ignore[import-not-found]

T = TypeVar("T")
Bound = TypeVar("Bound", bound=Mapping[str, int])
positive_tp = rule("tp is at least 1", lambda tp: tp >= 1)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No switch set, nothing announced: as in a process that just started."""
    monkeypatch.delenv("REGISTRY_EXPERIMENTAL", raising=False)
    monkeypatch.setattr(validation, "_switches", [])
    monkeypatch.setattr(validation, "_announced", {})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """`installed(version)`: the version that the library says it has; None where it is not installed."""

    def set_version(version: str | None) -> None:
        def look_up(name: str) -> str:
            assert name == "checkpoint-registry"
            if version is None:
                raise PackageNotFoundError(name)
            return version

        monkeypatch.setattr("importlib.metadata.version", look_up)

    set_version("0.1.0")
    return set_version


def details(call: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(ArgumentError) as caught:
        call()
    return caught.value.details


# ---------------------------------------------------------------------------------------------------------------------
# checked: the report


@checked(positive_tp, rule("pp divides layers", lambda pp, layers: layers % pp == 0))
def convert(
    source: str | os.PathLike[str], tp: int = 1, pp: int = 1, *, layers: int = 4, dtype: str | None = None
) -> Any:
    """Doc."""
    return source, tp, pp, layers, dtype


def test_a_right_call_goes_through() -> None:
    assert convert("a") == ("a", 1, 1, 4, None)
    assert convert(Path("a"), 2, pp=2, dtype="bfloat16") == (Path("a"), 2, 2, 4, "bfloat16")


def test_every_problem_is_in_one_error() -> None:
    with pytest.raises(ArgumentError) as caught:
        convert(3, tp=0, pp=3, dtype=b"x")  # type: ignore[arg-type]
    assert caught.value.where == f"{__name__}.convert"
    assert caught.value.details == (
        "source: expected str | os.PathLike[str], found 3 (int)",
        "dtype: expected str | None, found b'x' (bytes)",
        "tp: expected that tp is at least 1, found tp = 0 (int)",
        "pp, layers: expected that pp divides layers, found pp = 3 (int), layers = 4 (int)",
    )
    assert all(line in str(caught.value) for line in caught.value.details)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, RegistryError)


def test_rules_over_a_parameter_of_a_wrong_type_are_skipped() -> None:
    assert details(lambda: convert("a", "2", pp=3)) == (  # type: ignore[arg-type]
        "tp: expected int, found '2' (str)",
        "pp, layers: expected that pp divides layers, found pp = 3 (int), layers = 4 (int)",
    )
    assert details(lambda: convert("a", pp=None)) == ("pp: expected int, found None",)  # type: ignore[arg-type]


def test_rules_see_defaults() -> None:
    assert len(details(lambda: convert("a", pp=3))) == 1
    convert("a", pp=3, layers=6)


def test_a_condition_that_raises_is_reported_and_hides_no_other() -> None:
    @checked(
        rule("layers divide by pp", lambda layers, pp: layers % pp == 0), rule("pp is positive", lambda pp: pp > 0)
    )
    def plan(layers: int, pp: int) -> None: ...

    first, second = details(lambda: plan(4, 0))
    assert first.startswith("layers, pp: expected that layers divide by pp, found layers = 4 (int), pp = 0 (int)")
    assert "ZeroDivisionError" in first
    assert second == "pp: expected that pp is positive, found pp = 0 (int)"


def test_the_truth_of_a_condition_counts_not_its_identity() -> None:
    @checked(rule("names are given", lambda names: names))
    def take(names: list[str]) -> int:
        return len(names)

    assert take(["a"]) == 1
    assert details(lambda: take([])) == ("names: expected that names are given, found names = [] (list)",)


def test_found_values_are_cut_short_and_kept_on_a_line() -> None:
    class Long:
        def __repr__(self) -> str:
            return "line\n" * 1000

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    for value in (Long(), Broken(), "x" * 100_000, [["a"] * 1000] * 1000):
        (line,) = details(lambda value=value: convert("a", value))  # type: ignore[misc]
        assert "\n" not in line and len(line) < 600
        assert type(value).__name__ in line


@pytest.mark.parametrize("tp", [0, -1, "2", 2.0, True, None, 1, 7])
@pytest.mark.parametrize("names", [["a"], [], [1], "a", None])
def test_the_report_has_as_many_lines_as_things_are_wrong(tp: Any, names: Any) -> None:
    @checked(positive_tp, rule("there are names", lambda names: len(names) > 0))
    def call(tp: int, names: Sequence[str]) -> None: ...

    wrong_tp = not (type(tp) is int and tp >= 1)
    wrong_names = names != ["a"]
    if wrong_tp or wrong_names:
        assert len(details(lambda: call(tp, names))) == wrong_tp + wrong_names
    else:
        call(tp, names)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3)


@given(st.lists(VALUES | st.lists(VALUES, max_size=3), max_size=4))
def test_an_int_is_an_int_and_nothing_else(values: list[Any]) -> None:
    @checked()
    def take(*numbers: int) -> Any:
        return numbers

    wrong = [place for place, value in enumerate(values) if type(value) is not int]
    if wrong:
        lines = details(lambda: take(*values))
        assert [line.split(":")[0] for line in lines] == [f"numbers[{place}]" for place in wrong]
    else:
        assert take(*values) == tuple(values)


# ---------------------------------------------------------------------------------------------------------------------
# checked: which values pass


class FsPath:
    def __fspath__(self) -> str:
        return "here"


class Shape(Protocol):
    size: int


class Options(typing.TypedDict):
    size: int


class Node:
    pass


class LazyMapping(Mapping[str, int]):
    """A mapping whose values are dear: to look at one is a failure."""

    def __init__(self, *needed: int) -> None: ...

    def __getitem__(self, key: str) -> int:
        raise AssertionError("read")

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("iterated")

    def __len__(self) -> int:
        return 3


class LazySequence(Sequence[int]):
    def __init__(self, needed: int) -> None: ...

    def __getitem__(self, key: Any) -> Any:
        raise AssertionError("read")

    def __len__(self) -> int:
        return 3


def accepts(annotation: Any, value: Any) -> bool:
    """Whether a parameter of `annotation` takes `value`; where it does, it must take the same object."""

    def function(value):  # type: ignore[no-untyped-def]
        return value

    function.__annotations__ = {"value": annotation}
    try:
        assert checked()(function)(value) is value
    except ArgumentError:
        return False
    return True


ACCEPTED: list[tuple[Any, Any]] = [
    (int, 2),
    (int, 10**30),
    (bool, False),
    (float, 2.5),
    (str, "a"),
    (bytes, b"a"),
    (None, None),
    (int | None, None),
    (typing.Optional[int], 3),  # noqa: UP045
    (int | str, "2"),
    (Any, object()),
    (object, 3),
    ("int | str", 2),
    (str | os.PathLike[str], "a"),
    (str | os.PathLike[str], Path("a")),
    (str | os.PathLike[str], FsPath()),
    (os.PathLike, FsPath()),
    (Path, Path("a")),
    (Literal["a", 1], "a"),
    (Literal["a", 1], 1),
    (Literal[True], True),
    (list[int], [1, 2]),
    (list[float], [1, 2.5]),
    (list, [1, "a"]),
    (tuple[int, ...], (1, 2)),
    (tuple[int, str], (1, "a")),
    (set[str], {"a"}),
    (dict[str, list[int]], {"a": [1]}),
    (dict[str, int], OrderedDict(a=1)),
    (Sequence[int], [1]),
    (Sequence[int], (1,)),
    (Sequence[int], range(3)),
    (Sequence[int], LazySequence(1)),
    (int | Sequence[int], [1]),
    (Iterable[int], {1, 2}),
    (Iterable[int], iter([1])),
    (Iterator[int], iter([1])),
    (Mapping[str, int], {"a": 1}),
    (Mapping[str, int], LazyMapping(1)),
    (Mapping, {}),
    (Callable[[int], int], print),
    (type[Node], Node),
    (Node, Node()),
    (T, 3),
    (Bound, LazyMapping(1)),
    (typing.IO[bytes], io.BytesIO()),
    (typing.BinaryIO, io.BytesIO()),
]
REFUSED: list[tuple[Any, Any]] = [
    (int, True),
    (int, "2"),
    (int, 2.0),
    (int, b"2"),
    (int | None, "x"),
    (int | str, True),
    (bool, 1),
    (bool, "true"),
    (float, True),
    (float, "2.5"),
    (str, b"a"),
    (str, 2),
    (str, Path("a")),
    (str | os.PathLike[str], b"a"),
    (str | os.PathLike[str], 3),
    (Path, "a"),
    (Literal["a", 1], True),
    (Literal["a", 1], "1"),
    (Literal["a", 1], 1.0),
    (Literal[True], 1),
    (list[int], ["1"]),
    (list[int], [True]),
    (list[int], (1,)),
    (tuple[int, ...], [1]),
    (tuple[int, str], (1, 2)),
    (dict[str, int], {"a": "1"}),
    (dict[int, int], {"1": 1}),
    (set[int], {"1"}),
    (Sequence[int], ["1"]),
    (Sequence[int], ("1",)),
    (Sequence[int], {1}),
    (Sequence[str], "abc"),
    (Iterable[str], "abc"),
    (Iterable[int], 3),
    (Iterator[int], [1]),
    (Mapping[str, int], {"a": "1"}),
    (Mapping[str, int], [("a", 1)]),
    (Mapping, []),
    (Callable[[int], int], 3),
    (type[Node], int),
    (type[Node], Node()),
    (Node, object()),
    ("int | str", 2.0),
]


def pair_names(pairs: list[tuple[Any, Any]]) -> list[str]:
    # Not the values: the addresses in some differ between the workers of a parallel run.
    return [f"{annotation}-{type(value).__name__}" for annotation, value in pairs]


@pytest.mark.parametrize(("annotation", "value"), ACCEPTED, ids=pair_names(ACCEPTED))
def test_accepted(annotation: Any, value: Any) -> None:
    assert accepts(annotation, value)


@pytest.mark.parametrize(("annotation", "value"), REFUSED, ids=pair_names(REFUSED))
def test_refused(annotation: Any, value: Any) -> None:
    assert not accepts(annotation, value)


@pytest.mark.parametrize(
    "annotation", [Shape, Options, "Nowhere", "list[Missing]", "1 +", typing.Self, typing.ParamSpec("P").args]
)
def test_what_cannot_be_checked_is_let_through(annotation: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert accepts(annotation, object())
    assert not caught


def test_an_int_for_a_float_becomes_one() -> None:
    @checked()
    def take(a: float, b: float | None = None, *rest: float, **named: float) -> Any:
        return a, b, *rest, *named.values()

    assert [type(value) for value in take(1, 2, 3, x=4)] == [float] * 4


def test_annotated_parameters_get_what_pydantic_makes_of_them() -> None:
    @checked()
    def take(
        size: Annotated[int, Field(ge=1)],
        path: Annotated[Path, Field(strict=False)],
        name: Annotated[str, AfterValidator(str.upper)] = "a",
        node: Annotated[Node | None, AfterValidator(type)] = None,
    ) -> Any:
        return size, path, name, node

    assert take(1, "x", "b", Node()) == (1, Path("x"), "B", Node)  # type: ignore[arg-type]
    assert details(lambda: take(0, "x")) == (  # type: ignore[arg-type]
        "size: expected greater than or equal to 1, found 0 (int)",
    )


def test_the_wrong_element_is_named() -> None:
    @checked()
    def take(
        a: list[int] = [],  # noqa: B006
        b: dict[str, int | str] = {},  # noqa: B006
        c: int | Sequence[int] = 1,
        d: dict[str, list[int]] = {},  # noqa: B006
    ) -> None: ...

    assert details(lambda: take([1, "2", None])) == (  # type: ignore[list-item]
        "a[1]: expected a valid integer, found '2' (str)",
        "a[2]: expected a valid integer, found None",
    )
    assert details(lambda: take(b={"x": 1, "y": None})) == (  # type: ignore[dict-item]
        "b['y']: expected a valid integer or a valid string, found None",
    )
    assert details(lambda: take(c=[1, "2"])) == (  # type: ignore[list-item]
        "c[1]: expected a valid integer, found '2' (str)",
    )
    assert details(lambda: take(c="2")) == ("c: expected int | Sequence[int], found '2' (str)",)  # type: ignore[arg-type]
    assert details(lambda: take(d={"x": [1, "2"]})) == (  # type: ignore[list-item]
        "d['x'][1]: expected a valid integer, found '2' (str)",
    )


def test_thousands_of_wrong_elements_are_counted() -> None:
    @checked()
    def take(names: list[str], tp: int) -> None: ...

    lines = details(lambda: take(list(range(5000)), "1"))  # type: ignore[arg-type]
    assert lines[0] == "names[0]: expected a valid string, found 0 (int)"
    assert lines[-2:] == ("names: 4980 more elements are wrong", "tp: expected int, found '1' (str)")
    assert len(lines) == 22


# ---------------------------------------------------------------------------------------------------------------------
# checked: what can be decorated


def test_the_function_keeps_its_face() -> None:
    def plain(a: int, /, b: str = "x", *rest: int, c: bool = True, **more: int) -> list[int]:
        """What it does."""
        return [a, *rest]

    decorated = checked()(plain)
    assert inspect.signature(decorated) == inspect.signature(plain)
    assert (decorated.__name__, decorated.__qualname__, decorated.__doc__) == (
        "plain",
        plain.__qualname__,
        plain.__doc__,
    )
    assert decorated.__module__ == __name__ and decorated.__wrapped__ is plain  # type: ignore[attr-defined]


def test_every_kind_of_parameter() -> None:
    @checked(rule("there are fewer rest than b", lambda rest, b, more: len(rest) + len(more) < b))
    def take(a: int, /, b: int = 5, *rest: int, c: bool = False, **more: str) -> Any:
        return a, b, rest, c, more

    assert take(1) == (1, 5, (), False, {})
    assert take(1, 4, 3, 2, c=True, d="x") == (1, 4, (3, 2), True, {"d": "x"})
    assert take(1, b=2, a="x") == (1, 2, (), False, {"a": "x"})
    assert details(lambda: take("1", 4, 3, "2", c=1, d=4)) == (  # type: ignore[arg-type]
        "a: expected int, found '1' (str)",
        "rest[1]: expected a valid integer, found '2' (str)",
        "c: expected bool, found 1 (int)",
        "more['d']: expected a valid string, found 4 (int)",
    )
    assert len(details(lambda: take(1, 2, 3, d="x"))) == 1


def test_unannotated_parameters_take_part_in_rules() -> None:
    @checked(positive_tp)
    def take(tp, *rest):  # type: ignore[no-untyped-def]
        return tp, rest

    assert take(1, "x") == (1, ("x",))
    assert details(lambda: take(0)) == ("tp: expected that tp is at least 1, found tp = 0 (int)",)


def test_defaults_are_the_functions_own() -> None:
    marker: list[int] = []

    @checked()
    def take(items: list[int] = marker, unset: int = ...) -> Any:  # type: ignore[assignment]
        return items, unset

    assert take()[0] is marker and take()[1] is ...


@pytest.mark.parametrize("call", [lambda: convert(), lambda: convert("a", nope=1), lambda: convert("a", 1, 1, 4)])
def test_a_call_that_does_not_fit_is_a_type_error(call: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=r"convert\(\) ") as caught:
        call()
    assert not isinstance(caught.value, ArgumentError) and caught.value.__suppress_context__


def test_errors_of_the_function_itself_pass_unchanged() -> None:
    @checked()
    def fail(tp: int) -> None:
        raise ValueError("from within")

    with pytest.raises(ValueError, match=r"^from within$") as caught:
        fail(1)
    assert not isinstance(caught.value, ArgumentError)


class Worker:
    limit = 4

    @checked(positive_tp, rule("tp is within the limit", lambda self, tp: tp <= self.limit))
    def method(self, tp: int) -> int:
        return tp

    @classmethod
    @checked(positive_tp)
    def below(cls, tp: int) -> type:
        return cls

    @checked(positive_tp)
    @classmethod
    def above(cls, tp: int) -> type:
        return cls

    @checked(positive_tp)
    @staticmethod
    def static(tp: int) -> int:
        return tp

    @checked()
    def other(self, other: Worker) -> Worker:
        return other


def test_methods() -> None:
    class Sub(Worker):
        limit = 2

    worker = Worker()
    assert worker.method(4) == 4 and Worker.below(1) is Worker and Sub.above(1) is Sub and Worker.static(1) == 1
    assert worker.other(worker) is worker
    for call in (worker.method, Worker.below, worker.above, Worker.static):
        assert details(lambda call=call: call(0)) == (  # type: ignore[misc]
            "tp: expected that tp is at least 1, found tp = 0 (int)",
        )
    assert len(details(lambda: Sub().method(3))) == 1
    assert details(lambda: worker.other(3)) == ("other: expected Worker, found 3 (int)",)  # type: ignore[arg-type]


@checked(positive_tp)
class Plain:
    def __init__(self, tp: int, names: Sequence[str] = ()) -> None:
        self.tp, self.names = tp, names


@checked(positive_tp)
@attrs.frozen
class Frozen:
    tp: int
    node: Node | None = None
    _hidden: str = "x"


@checked(positive_tp)
@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    tp: int
    node: Node | None = None


@pytest.mark.parametrize("cls", [Plain, Frozen, Data])
def test_classes(cls: Any) -> None:
    assert cls(2).tp == 2 and isinstance(cls(2), cls) and cls.__name__ in ("Plain", "Frozen", "Data")
    assert "tp" in inspect.signature(cls).parameters
    with pytest.raises(ArgumentError) as caught:
        cls(0, 3)
    assert caught.value.where == f"{__name__}.{cls.__qualname__}"
    kind = "Sequence[str]" if cls is Plain else "Node | None"
    assert caught.value.details == (
        f"{'names' if cls is Plain else 'node'}: expected {kind}, found 3 (int)",
        "tp: expected that tp is at least 1, found tp = 0 (int)",
    )
    with pytest.raises(TypeError, match="tp"):
        cls()

    class Sub(cls):
        def __init__(self) -> None:
            super().__init__(0)

    with pytest.raises(ArgumentError):
        Sub()


def test_attrs_names_are_those_of_the_call() -> None:
    assert details(lambda: Frozen(1, hidden=3)) == ("hidden: expected str, found 3 (int)",)  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(Frozen(3))) == Frozen(3)
    assert attrs.evolve(Frozen(3), tp=4) == Frozen(4)


def test_a_class_without_an_init_of_its_own_is_an_error() -> None:
    # attrs and dataclass would replace it, or leave the class without one: the rules would be gone in silence.
    with pytest.raises(TypeError, match="no __init__ of its own"):

        @attrs.frozen
        @checked(positive_tp)
        class Wrong:
            tp: int

    class Inherits(Plain):
        pass

    with pytest.raises(TypeError, match="no __init__ of its own"):
        checked()(Inherits)


def test_async_functions() -> None:
    @checked(positive_tp)
    async def run(tp: int) -> int:
        await asyncio.sleep(0)
        return tp

    assert inspect.iscoroutinefunction(run) and asyncio.run(run(3)) == 3
    with pytest.raises(ArgumentError):
        asyncio.run(run(0))


def test_generators_are_checked_when_called() -> None:
    @checked(positive_tp)
    def generate(tp: int) -> Iterator[int]:
        yield tp

    assert list(generate(3)) == [3]
    with pytest.raises(ArgumentError):
        generate(0)


def test_iterators_reach_the_function_untouched() -> None:
    @checked()
    def take(names: Iterable[str]) -> list[str]:
        return list(names)

    assert take(name for name in "ab") == ["a", "b"]


@checked(positive_tp)
def only_for_typing(
    missing: Missing, many: list[Missing] | None = None, tp: int = 1, later: Later | None = None
) -> int:
    return tp


class Later: ...


def test_names_that_only_type_checkers_see_are_left_unchecked() -> None:
    assert only_for_typing(object(), 3, 2, Later()) == 2
    assert details(lambda: only_for_typing(1, tp="2")) == ("tp: expected int, found '2' (str)",)  # type: ignore[arg-type]
    assert details(lambda: only_for_typing(1, tp=0)) == ("tp: expected that tp is at least 1, found tp = 0 (int)",)
    assert details(lambda: only_for_typing(1, later=3)) == (  # type: ignore[arg-type]
        "later: expected Later | None, found 3 (int)",
    )


def test_annotations_are_read_where_the_function_was_defined() -> None:
    names: dict[str, Any] = {"__name__": "not_a_module", "checked": checked}
    exec("class Here: ...\n@checked()\ndef take(here: 'Here'): ...\n@checked()\ndef bad(a: 'Gone', b: int): ...", names)
    names["take"](names["Here"]())
    assert len(details(lambda: names["take"](3))) == len(details(lambda: names["bad"](3, "4"))) == 1


def test_rules_must_name_parameters_that_exist() -> None:
    def function(tp: int) -> None: ...

    with pytest.raises(ArgumentError) as caught:
        checked(positive_tp, rule("a", lambda pp: pp), rule("b", lambda tp, ep, cp: ep))(function)
    assert caught.value.details == ("pp, in the rule that a", "ep, in the rule that b", "cp, in the rule that b")
    assert caught.value.expected == "tp" and "function" in str(caught.value)
    with pytest.raises(ArgumentError, match="pp"):
        checked(rule("a", lambda pp: pp))(Plain)


@pytest.mark.parametrize("condition", [lambda: True, lambda *tp: True, lambda **tp: True, lambda *, tp: True])
def test_conditions_must_name_what_they_are_given(condition: Callable[..., bool]) -> None:
    with pytest.raises(ArgumentError, match="tp is right"):
        rule("tp is right", condition)


def test_misuse_of_the_decorator_is_an_error() -> None:
    with pytest.raises(TypeError, match="takes rules"):
        checked(convert)  # type: ignore[arg-type]
    with pytest.raises((TypeError, AttributeError)):
        checked()(3)  # type: ignore[type-var]


def test_many_threads_may_make_the_first_call() -> None:
    for _ in range(20):
        function = checked(positive_tp)(lambda tp: tp)
        barrier, problems = threading.Barrier(8), []

        def call(function: Any = function, barrier: Any = barrier, problems: Any = problems) -> None:
            barrier.wait()
            try:
                function(0)
            except ArgumentError as problem:
                problems.append(problem)

        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(problems) == 8


def test_pydantic_is_imported_by_the_first_call_only() -> None:
    # The package is stood in for, so that this is about the module alone.
    code = """
import sys, types
sys.modules["registry"] = types.ModuleType("registry")
sys.modules["registry"].__path__ = ["registry"]
from registry.validation import checked, experimental, rule
@experimental("0.1.0")
@checked(rule("tp is at least 1", lambda tp: tp >= 1))
def function(tp: int): ...
assert not {"pydantic", "torch", "numpy"} & set(sys.modules)
import registry.validation
with registry.validation.enable_experimental():
    function(1)
assert "pydantic" in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# ---------------------------------------------------------------------------------------------------------------------
# experimental: the switch


@experimental(introduced_with="0.1.0", lifetime=3)
def stream(count: int, *, name: str = "x") -> tuple[int, str]:
    """Doc."""
    return count, name


def test_off_raises_and_says_what_and_how() -> None:
    with pytest.raises(ExperimentalError) as caught:
        stream(1)
    text = str(caught.value)
    assert f"{__name__}.stream" in text and "0.1.0" in text
    assert "enable_experimental(True)" in text and "REGISTRY_EXPERIMENTAL=1" in text
    assert isinstance(caught.value, RegistryError)


@pytest.mark.parametrize("on", [True, 1, "yes", [0], object()])
def test_whatever_is_true_switches_on(on: object) -> None:
    enable_experimental(on)
    assert experimental_enabled() is True and stream(1) == (1, "x")


@pytest.mark.parametrize("off", [False, 0, None, "", []])
def test_whatever_is_false_switches_off(off: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_EXPERIMENTAL", "1")
    assert experimental_enabled()
    enable_experimental(off)
    assert experimental_enabled() is False
    with pytest.raises(ExperimentalError):
        stream(1)


@pytest.mark.parametrize(
    ("value", "on"),
    [
        ("1", True),
        ("true", True),
        ("Yes", True),
        ("on", True),
        ("0", False),
        ("", False),
        ("false", False),
        ("no", False),
    ],
)
def test_the_environment_variable(value: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_EXPERIMENTAL", value)
    assert experimental_enabled() is on


def test_the_newest_setting_decides() -> None:
    enable_experimental(True)
    with enable_experimental(False):
        assert not experimental_enabled()
        with enable_experimental():
            assert experimental_enabled()
        assert not experimental_enabled()
    assert experimental_enabled()
    enable_experimental(False)
    assert not experimental_enabled()


def test_a_plain_call_within_a_block_outlives_it() -> None:
    with enable_experimental():
        enable_experimental(False)
        assert not experimental_enabled()
    assert not experimental_enabled()


def test_a_block_that_fails_is_left_too() -> None:
    with pytest.raises(KeyError), enable_experimental():
        raise KeyError
    assert not experimental_enabled()


def test_blocks_of_threads_may_overlap() -> None:
    # Restoring what was there on entry would leave the switch on for good, or off under the feet of the second.
    first, second = enable_experimental(), enable_experimental()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert experimental_enabled()
    second.__exit__(None, None, None)
    assert not experimental_enabled()


def test_threads_see_the_switch() -> None:
    seen: list[bool] = []
    with enable_experimental():
        thread = threading.Thread(target=lambda: seen.append(experimental_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]


# ---------------------------------------------------------------------------------------------------------------------
# experimental: log, end of life, decoration


def announced(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [record.getMessage().split(" ")[0].rstrip(",") for record in caplog.records if record.levelno == level]


def named(qualname: str, module: str = __name__) -> Callable[[], None]:
    def function() -> None: ...

    function.__qualname__, function.__name__, function.__module__ = qualname, qualname.split(".")[-1], module
    return function


def test_the_first_allowed_use_is_logged_once(caplog: pytest.LogCaptureFixture, installed: object) -> None:
    caplog.set_level(logging.INFO, "registry")
    with pytest.raises(ExperimentalError):
        stream(1)
    assert announced(caplog) == []
    with enable_experimental():
        stream(1)
        stream(2)
    with enable_experimental():
        stream(3)
    assert announced(caplog) == [f"{__name__}.stream"]


def test_functions_are_told_apart_by_qualified_name(caplog: pytest.LogCaptureFixture, installed: object) -> None:
    caplog.set_level(logging.INFO, "registry")
    enable_experimental()
    mark = experimental("0.1.0")
    functions = [mark(named("A.f")), mark(named("B.f")), mark(named("f")), mark(named("f", module="elsewhere"))]
    again = experimental("0.1.0")(named("A.f"))
    for function in [*functions, *functions, again]:
        function()
    assert announced(caplog) == [f"{__name__}.A.f", f"{__name__}.B.f", f"{__name__}.f", "elsewhere.f"]


def test_of_many_threads_one_logs(caplog: pytest.LogCaptureFixture, installed: object) -> None:
    caplog.set_level(logging.INFO, "registry")
    enable_experimental()
    functions = [experimental("0.1.0")(named(f"f{number}")) for number in range(50)]
    barrier = threading.Barrier(8)

    def use() -> None:
        for function in functions:
            barrier.wait()
            function()

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert announced(caplog) == [f"{__name__}.f{number}" for number in range(50)]


@pytest.mark.parametrize(
    ("introduced", "lifetime", "current", "is_past"),
    [
        ("0.1.0", 3, "0.1.0", False),
        ("0.1.0", 3, "0.3.9", False),
        ("0.1.0", 3, "0.4.0", True),
        ("0.1.0", 3, "0.4.0rc1", True),
        ("0.1.0", 3, "0.10.0", True),
        ("0.1.0", 10, "0.10.0", False),
        ("0.1.7", 3, "0.4.0", True),
        ("0.9.0", 3, "1.0.0", True),  # a later major version is past it, whatever its minor
        ("0.9.0", 30, "1.0.0", True),
        ("1.0.0", 3, "0.16.1", False),  # and an earlier one is not, whatever its minor
        ("1.0.0", 3, "1.3", True),
        ("1.2.0", 1, "1.2.99", False),
        ("1.2.0", 1, "1.3.0.dev0", True),
        ("0.1.0", 3, "1!0.1.0", True),
        ("1!0.1.0", 3, "5.0.0", False),
    ],
)
def test_end_of_life_compares_full_versions(
    introduced: str, lifetime: int, current: str, is_past: bool, installed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "registry")
    installed(current)
    enable_experimental()
    function = experimental(introduced, lifetime)(named("f"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
        function()
    assert [each.category for each in caught] == [DeprecationWarning] * is_past
    assert announced(caplog, logging.WARNING) == [f"{__name__}.f"] * is_past
    for each in caught:
        assert each.filename == __file__, "the warning points at the caller"
        assert f"{__name__}.f" in str(each.message) and introduced in str(each.message)


def test_past_its_end_a_function_still_works_and_still_needs_the_switch(installed: Any) -> None:
    installed("0.4.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ExperimentalError):
            stream(1)
    enable_experimental()
    with pytest.warns(DeprecationWarning, match=r"stream.*0\.1\.0.*0\.4"):
        assert stream(1) == (1, "x")


def test_the_warning_of_a_class_points_at_the_caller(installed: Any) -> None:
    installed("0.4.0")
    enable_experimental()
    with pytest.warns(DeprecationWarning, match="Exporter") as caught:
        Exporter(1)
    assert [each.filename for each in caught] == [__file__]


def test_sources_that_are_not_installed_have_no_age(installed: Any) -> None:
    installed(None)
    enable_experimental()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stream(1) == (1, "x")


@pytest.mark.parametrize("version", ["", "new", "1.x", None, 1, 0.1])
@pytest.mark.parametrize("lifetime", [0, -1, 1.5, True, "3", None])
def test_bad_versions_and_lifetimes_are_errors_at_decoration(version: Any, lifetime: Any) -> None:
    lines = details(lambda: experimental(version, lifetime))
    assert [line.split(":")[0] for line in lines] == ["introduced_with", "lifetime"]
    assert [line.split(":")[0] for line in details(lambda: experimental("0.1.0", lifetime))] == ["lifetime"]
    assert [line.split(":")[0] for line in details(lambda: experimental(version))] == ["introduced_with"]


class Everything:
    def __getattr__(self, name: str) -> Any:
        return name


def test_the_marker_can_be_asked_for() -> None:
    info = experimental_info(stream)
    assert info is not None
    assert (info.name, info.introduced_with, info.lifetime, info.end_of_life) == (
        f"{__name__}.stream",
        "0.1.0",
        3,
        "0.4",
    )
    assert is_experimental(stream) and is_experimental(Exporter) and is_experimental(checked()(stream))
    assert not is_experimental(convert) and not is_experimental(Plain) and not is_experimental(3)
    assert not is_experimental(Everything()), "an object with every attribute has no marker"
    assert not is_experimental(Exporter.name)


def test_experimental_functions_keep_their_face() -> None:
    assert stream.__name__ == "stream" and stream.__doc__ == "Doc." and stream.__module__ == __name__
    assert list(inspect.signature(stream).parameters) == ["count", "name"]
    assert pickle.loads(pickle.dumps(stream)) is stream


def test_experimental_async_functions_and_methods() -> None:
    class Holder:
        @experimental("0.1.0")
        async def wait(self) -> int:
            return 1

        @experimental("0.1.0")
        @classmethod
        def above(cls) -> type:
            return cls

        @staticmethod
        @experimental("0.1.0")
        def below() -> int:
            return 2

    assert inspect.iscoroutinefunction(Holder.wait)
    assert is_experimental(Holder.above) and is_experimental(Holder().wait) and is_experimental(Holder.below)
    for call in (lambda: asyncio.run(Holder().wait()), Holder.above, Holder().above, Holder.below):
        with pytest.raises(ExperimentalError):
            call()
        with enable_experimental():
            assert call() in (1, 2, Holder)


def test_both_decorators_stack_in_either_order() -> None:
    above = experimental("0.1.0")(checked(positive_tp)(lambda tp: tp))
    below = checked(positive_tp)(experimental("0.1.0")(lambda tp: tp))
    for function in (above, below):
        assert is_experimental(function)
        with pytest.raises(ExperimentalError):
            function(1)
        with enable_experimental():
            assert function(1) == 1
            with pytest.raises(ArgumentError):
                function(0)


# ---------------------------------------------------------------------------------------------------------------------
# experimental: classes


class Meta(type):
    created = 0

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        Meta.created += 1
        return super().__call__(*args, **kwargs)


@experimental("0.1.0")
class Exporter(metaclass=Meta):
    """Doc."""

    name = "exporter"

    def __init__(self, size: int, *, deep: bool = False) -> None:
        self.size, self.deep = size, deep

    @classmethod
    def by_call(cls) -> Exporter:
        return cls(1)

    @classmethod
    def by_new(cls) -> Exporter:
        self = cls.__new__(cls)
        self.size, self.deep = 1, True
        return self

    @staticmethod
    def help() -> str:
        return "help"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Exporter) and vars(self) == vars(other)


class SubExporter(Exporter):
    def __init__(self) -> None:  # does not call super().__init__ on purpose
        self.size, self.deep = 2, False


@experimental("0.1.0")
@attrs.frozen
class AttrsExporter:
    size: int = 1


@experimental("0.1.0")
@dataclasses.dataclass(frozen=True, slots=True)
class DataExporter:
    size: int = 1


@experimental("0.1.0")
class TupleExporter(typing.NamedTuple):
    size: int = 1


@experimental("0.1.0")
class ErrorExporter(ValueError): ...


@experimental("0.1.0")
class GenericExporter(Generic[T]): ...


@attrs.define
class AttrsSub(AttrsExporter):
    more: int = 2


@dataclasses.dataclass(frozen=True, slots=True)
class DataSub(DataExporter):
    more: int = 2


class MixedFirst(dict, GenericExporter[int]):  # type: ignore[type-arg]
    """`dict.__new__` comes first, and would never reach the marked class."""


@dataclasses.dataclass(slots=True)
class MixedSlots(ValueError, GenericExporter[int]):
    more: int = 2


class OwnNew(GenericExporter[int]):
    def __new__(cls) -> OwnNew:
        return object.__new__(cls)


# By hand, in the order that the documentation advises against: both make a new class and move our functions there.
@attrs.define
@experimental("0.1.0")
class AttrsAbove:
    size: int = 1


@dataclasses.dataclass(slots=True)
@experimental("0.1.0")
class DataAbove:
    size: int = 1


@experimental("0.1.0")
@experimental("0.1.0")
class Twice:
    pass


MAKERS: dict[str, Callable[[], Any]] = {
    "call": lambda: Exporter(1),
    "classmethod": Exporter.by_call,
    "classmethod new": Exporter.by_new,
    "sub": SubExporter,
    "sub classmethod new": SubExporter.by_new,
    "attrs": AttrsExporter,
    "attrs sub": AttrsSub,
    "attrs above": AttrsAbove,
    "dataclass": DataExporter,
    "dataclass sub": DataSub,
    "dataclass above": DataAbove,
    "named tuple": TupleExporter,
    "exception": ErrorExporter,
    "generic": lambda: GenericExporter[int](),
    "mixed first": MixedFirst,
    "mixed slots": MixedSlots,
    "own new": OwnNew,
    "twice": Twice,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_construction_is_guarded_and_objects_outlive_the_switch(make: Callable[[], Any]) -> None:
    with pytest.raises(ExperimentalError, match=re.escape(__name__)):
        make()
    with enable_experimental():
        made = make()
    assert is_experimental(made) and is_experimental(type(made))
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(made, protocol))
        assert type(again) is type(made) and again is not made
    for again in (copy.copy(made), copy.deepcopy(made)):
        assert type(again) is type(made)
    if hasattr(made, "size"):
        assert pickle.loads(pickle.dumps(made)) == made and copy.copy(made) == made
    with pytest.raises(ExperimentalError):
        make()


def test_unpickling_does_not_leave_the_gate_open() -> None:
    with enable_experimental():
        data = pickle.dumps(Exporter(1))
    pickle.loads(data)
    with pytest.raises(ExperimentalError):
        Exporter(1)
    with pytest.raises(ZeroDivisionError):
        validation._rebuild(lambda: 1 / 0)
    with pytest.raises(ExperimentalError):
        Exporter(1)


def test_an_object_without_pickle_tricks_keeps_its_reduce() -> None:
    @experimental("0.1.0")
    class Constant:
        def __reduce__(self) -> str:
            return "convert"

    @experimental("0.1.0")
    class Custom:
        def __reduce_ex__(self, protocol: Any) -> Any:
            return dict, ([("protocol", protocol)],)

    with enable_experimental():
        constant, custom = Constant(), Custom()
    assert constant.__reduce_ex__(4) == "convert"
    assert copy.copy(custom) == {"protocol": 4}


def test_the_class_stays_the_class_that_it_is() -> None:
    class Bare: ...

    assert experimental("0.1.0")(Bare) is Bare
    assert Exporter.__qualname__ == "Exporter" and Exporter.__doc__ == "Doc." and type(Exporter) is Meta
    assert Exporter.__mro__ == (Exporter, object)
    assert list(inspect.signature(AttrsExporter).parameters) == ["size"]
    assert list(inspect.signature(AttrsSub).parameters) == ["size", "more"]
    # With the switch off, everything but construction works.
    assert Exporter.name == "exporter" and Exporter.help() == "help" and issubclass(SubExporter, Exporter)
    created = Meta.created
    with enable_experimental():
        made = Exporter(3, deep=True)
        assert isinstance(SubExporter(), Exporter)
    assert (made.size, made.deep) == (3, True) and type(made) is Exporter and Meta.created == created + 2
    made.size = 4
    assert vars(made) == {"size": 4, "deep": True}


def test_wrong_arguments_stay_type_errors() -> None:
    class NoInit: ...

    experimental("0.1.0")(NoInit)
    with enable_experimental():
        for call in (lambda: Exporter(), lambda: Exporter(1, 2), lambda: NoInit(1), lambda: NoInit(a=1)):  # type: ignore
            with pytest.raises(TypeError):
                call()


def test_new_of_other_bases_is_still_called() -> None:
    class Recorder:
        def __new__(cls, *args: Any) -> Any:
            self = super().__new__(cls)
            self.seen = args  # type: ignore[attr-defined]
            return self

    @experimental("0.1.0")
    class First:
        def __init__(self, *args: Any) -> None: ...

    @experimental("0.1.0")
    class WithNew:
        def __new__(cls, size: int) -> Any:
            self = super().__new__(cls)
            self.size = size  # type: ignore[attr-defined]
            return self

    class Diamond(First, Recorder): ...

    class DictLast(First, dict): ...  # type: ignore[type-arg]

    with enable_experimental():
        assert Diamond(1, 2).seen == (1, 2)  # type: ignore[attr-defined]
        assert DictLast() == {} and isinstance(DictLast(), dict)
        assert WithNew(3).size == 3  # type: ignore[attr-defined]
    assert list(inspect.signature(WithNew).parameters) == ["size"]


def test_init_subclass_and_abstract_classes_work_on() -> None:
    registered: list[str] = []

    class Base:
        def __init_subclass__(cls, *, key: str = "none", **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            registered.append(f"{cls.__name__}={key}")

    @experimental("0.1.0")
    class Inherits(Base, abc.ABC):
        @abc.abstractmethod
        def run(self) -> None: ...

    @experimental("0.1.0")
    class Owns:
        def __init_subclass__(cls, *, key: str) -> None:
            registered.append(f"{cls.__name__}={key}")

    class A(Inherits, key="a"): ...

    class B(Owns, key="b"): ...

    assert registered == ["Inherits=none", "A=a", "B=b"]
    with enable_experimental(), pytest.raises(TypeError, match="abstract"):
        A()  # type: ignore[abstract]
    with pytest.raises(ExperimentalError):
        B()


def test_a_class_is_announced_under_its_name_for_subclasses_too(
    caplog: pytest.LogCaptureFixture, installed: object
) -> None:
    caplog.set_level(logging.INFO, "registry")
    with enable_experimental():
        SubExporter()
        Exporter(1)
    assert announced(caplog) == [f"{__name__}.Exporter"]


def test_both_decorators_on_a_class() -> None:
    @experimental("0.1.0")
    @checked(positive_tp)
    @attrs.frozen
    class Layout:
        tp: int

    with pytest.raises(ExperimentalError):
        Layout(0)
    with enable_experimental():
        assert Layout(1).tp == 1
        assert len(details(lambda: Layout(0))) == 1


# ---------------------------------------------------------------------------------------------------------------------
# the page


def test_the_code_on_the_page_runs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "validation.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    assert len(blocks) >= 2
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "docs/validation.md", "exec"), names)

"""Expressions: what the closed grammar lets in, what it keeps out, and that it means what Python means."""

import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.errors import SpecError
from registry.expressions import FUNCTIONS, MAX_LENGTH, parse

# What is kept out

ATTACKS = [
    # calls
    "__import__('os').system('true')",
    "eval('1')",
    "open('/etc/passwd')",
    "print(1)",
    "x()",
    "x.y()",
    "max(1, 2)(3)",
    "'a'.upper()",
    "'{0.__class__}'.format(1)",
    "(max)(1).__call__()",
    "min(key=len)",
    "max(*xs)",
    "max(**xs)",
    "getattr(x, 'y')",
    # ways to an object's inside
    "x.__class__",
    "().__class__.__bases__",
    "x.y.__dict__",
    "__builtins__",
    "__name__",
    # code
    "lambda: 1",
    "(lambda x: x)(1)",
    "[x for x in xs]",
    "{x for x in xs}",
    "{x: x for x in xs}",
    "(x for x in xs)",
    "(x := 1)",
    "await x",
    "(yield)",
    "(yield from x)",
    # what costs time or memory
    "2 ** 64",
    "9 ** 9 ** 9",
    "1 << 1000000",
    # other operators and literals
    "x @ y",
    "x >> 1",
    "x & y",
    "x | y",
    "x ^ y",
    "~x",
    "+x",
    "b'bytes'",
    "1j",
    "...",
    "{1, 2}",
    "{1: 2}",
    "{x: 1}",
    "{**x}",
    "{'a': open('x')}",
    "f'{x}'",
    "f''",
    "[*xs]",
    "(*xs,)",
    "x[1:2]",
    # statements
    "x = 1",
    "import os",
    "del x",
    "x; y",
    "x\ny",
    "pass",
    "assert x",
    # no expression at all
    "",
    "   ",
    "#",
    "x +",
    "(x",
    "x)",
    "1 2",
    "'open",
    "\0",
    "x\0",
    "\ud800",
    "é\u0301 $",
]


@pytest.mark.parametrize("text", ATTACKS, ids=[ascii(text)[1:-1] or "empty" for text in ATTACKS])
def test_what_the_grammar_lacks_is_refused_before_anything_is_evaluated(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert "not allowed in an expression" in caught.value.problem or "not an expression" in caught.value.problem


def test_the_refusal_names_the_part_and_quotes_the_whole() -> None:
    with pytest.raises(SpecError) as caught:
        parse("heads // open('x') + 1")
    assert "\"open('x')\" is not allowed" in str(caught.value)
    assert "where: heads // open('x') + 1" in str(caught.value)
    assert "ceil_to" in str(caught.value), "the error says what is allowed"


def test_the_length_is_limited() -> None:
    fits = "x+" * (MAX_LENGTH // 2 - 1) + "xy"
    assert len(fits) == MAX_LENGTH and parse(fits).names == {"x", "xy"}
    with pytest.raises(SpecError, match=f"at most {MAX_LENGTH} characters"):
        parse(fits + "y")


#: What an expression may come to.
PLAIN = (SpecError, int, float, str, list, tuple, dict, type(None))


def outcome(text: str, names: dict[str, object]) -> object:
    """The value, or the error that says that there is none."""
    try:
        return parse(text)(names)
    except SpecError as error:
        return error


@pytest.mark.parametrize(
    "text",
    [
        "(" * 240 + "1" + ")" * 240,
        "[" * 240 + "]" * 240,
        "-" * 490 + "1",
        "~" * 490 + "1",
        "not " * 120 + "x",
        "x" + ".y" * 240,
        "1" + "+1" * 240,
        "x if " * 80 + "x" + " else x" * 20,
        "max(" * 120 + "1" + ")" * 120,
    ],
    ids=lambda text: text[:8],
)
def test_deep_nesting_ends_in_a_value_or_a_spec_error(text: str) -> None:
    assert isinstance(outcome(text, {"x": 1}), PLAIN)


def test_too_little_stack_is_a_spec_error() -> None:
    expression = parse("-" * 400 + "x")
    limit = sys.getrecursionlimit()
    frame, depth = sys._getframe(), 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
    try:
        sys.setrecursionlimit(depth + 100)
        with pytest.raises(SpecError, match="cannot evaluate"):
            expression({"x": 1})
    finally:
        sys.setrecursionlimit(limit)


@given(st.text(alphabet="ax1.,()[]'+-*/%<>=! notandrif\"\\{}:", max_size=30))
@settings(max_examples=400)
def test_any_text_gives_a_value_or_a_spec_error(text: str) -> None:
    assert isinstance(outcome(text, {"a": 2, "x": {"a": "n"}}), PLAIN)


# What is let in


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("heads // kv_heads", 4),
        ("ceil_to(vocab, 128 * tp)", 256),
        ("ceil_to(256, 128)", 256),
        ("ceil_to(0, 128)", 0),
        ("head_dim or hidden // heads", 8),
        ("hidden - heads - 1", 55),
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("7 / 2", 3.5),
        ("-7 // 2", -4),
        ("-7 % 4", 1),
        ("1 < tp <= 2 < heads", True),
        ("3 > tp > 2", False),
        ("position == 'rope'", True),
        ("position in ['rope', 'learned']", True),
        ("position not in ('none',)", True),
        ("tied and tp > 1", True),
        ("not tied", False),
        ("'torch.' + dtype", "torch.bfloat16"),
        ("rope.factor or 8.0", 4.0),
        ("rope.inner.deep", 1),
        ("rope.missing", None),
        ("omit(rope, 'factor', 'nothing')", {"inner": {"deep": 1}}),
        ("omit(missing, 'factor')", None),
        ("{}", {}),
        ("{'type': position, 'factor': 2 * tp}", {"type": "rope", "factor": 4}),
        ("{'a': {'b': rope.factor}}.a.b", 4.0),
        ("lcm(4, 6)", 12),
        ("len([1, 2, 3])", 3),
        ("min(3, tp)", 2),
        ("max([1, 5, 3])", 5),
        ("int(7 / 2)", 3),
        ("float(tp)", 2.0),
        ("bool(heads)", True),
        ("true", True),
        ("false", False),
        ("null is None", True),
        ("none is not null", False),
        ("None", None),
        ("1 if tied else 2", 1),
        ("größe + 1", 4),
        ("kinds[1]", "full"),
        ("kinds[1][0]", "f"),
        ("kinds[tp - 1]", "full"),
        ("rope['factor']", 4.0),
        ("rope['missing']", None),
        ("rope['inner']['deep']", 1),
        ("missing[0]", None),
        ("missing['a'].b[0]", None),
        ("[[1, 2], [3]][0][1]", 2),
        ("kinds + ['none']", ["sliding", "full", "none"]),
        ("['sliding', 'full'] * 2 + ['sliding'] * (7 % 2)", ["sliding", "full", "sliding", "full", "sliding"]),
        ("[1] * 0 + [] * 5", []),
        ("[1] * -1", []),
        ("index(kinds, 'full')", 1),
        ("index(kinds, 'none')", 2),
        ("index([], 1)", 0),
        ("index(missing, 1)", None),
        ("count(kinds, 'full')", 1),
        ("count(kinds, 'none')", 0),
        ("count(missing, 1)", None),
        ("count('M-M*', 'M')", 2),
        ("index('M-M*', '*')", 3),
        ("len(kinds or [])", 2),
        ("len(missing or [])", 0),
        ("'full' in (missing or [])", False),
        ("tp not in [1, 3] and 'full' in kinds", True),
    ],
)
def test_values(text: str, value: Any) -> None:
    facts = {
        "heads": 8, "kv_heads": 2, "vocab": 131, "tp": 2, "hidden": 64, "head_dim": None, "position": "rope",
        "tied": True, "dtype": "bfloat16", "rope": {"factor": 4.0, "inner": {"deep": 1}}, "größe": 3,
        "kinds": ["sliding", "full"],
    }  # fmt: skip
    result = parse(text)(facts)
    assert result == value and type(result) is type(value)


def test_a_missing_name_is_none_and_so_is_every_field_of_it() -> None:
    for text in ("missing", "missing.field", "missing.field.deeper", "number.field", "text.upper", "items.append"):
        assert parse(text)({"number": 5, "text": "a", "items": [1]}) is None


def test_only_the_branch_that_counts_is_evaluated() -> None:
    assert parse("hidden // heads if heads else 0")({"hidden": 8, "heads": 0}) == 0
    assert parse("heads and hidden // heads")({"hidden": 8, "heads": 0}) == 0
    assert parse("1 or missing + 1")({}) == 1


def test_names_are_the_facts_that_are_read() -> None:
    assert parse("a.b // c if d in ['x', e] else max(f, true)").names == {"a", "c", "d", "e", "f"}
    assert parse("None or false").names == frozenset()


def test_a_model_answers_for_its_tensors() -> None:
    asked = []

    def has(tensor: str) -> bool:
        asked.append(tensor)
        return tensor == "router"

    environment = {"has": has, "each": lambda tensor: [0, 1], "layers": 2}
    assert parse("has('router') and not has('mlp.' + 'up')")(environment) is True
    assert asked == ["router", "mlp.up"]
    assert parse("each('router') if layers else []")(environment) == [0, 1]
    assert parse("has('router') or each('x')").names == frozenset(), "functions are no facts"


def test_names_in_an_index_are_read_too() -> None:
    assert parse("sizes[layer - 1].field[other]").names == {"sizes", "layer", "other"}


def test_an_expression_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(parse("a + 1")))({"a": 2}) == 3


@pytest.mark.parametrize(
    "text",
    [
        "missing + 1",
        "missing * 2",
        "-missing",
        "missing > 1",
        "'a' * 3",
        "'%s' % 1",
        "3 * 'a'",
        "[1] * 3.0",
        "[1] * 65537",
        "[1] + 2",
        "[1][1]",
        "[1][-1]",
        "[1]['a']",
        "(3)[0]",
        "has('x')",
        "each('x')",
        "[1][1.0]",
        "[1][true]",
        "[1][none]",
        "'a'[1]",
        "{'a': 1}[[1]]",
        "[1] * true",
        "2 * [1]",
        "[1] - [1]",
        "[1] * [1]",
        "[1] + 'a'",
        "([1] * 65536) * 2",
        "index(5, 1)",
        "count(5, 1)",
        "count([1])",
        "'a' + 1",
        "'a' - 'b'",
        "-'a'",
        "1 // 0",
        "1 / 0",
        "1 % 0",
        "ceil_to(5, 0)",
        "ceil_to(5)",
        "ceil_to(missing, 2)",
        "lcm('a')",
        "omit(5, 'a')",
        "omit('text')",
        "omit([1])",
        "max(5)",
        "min()",
        "max([])",
        "len(5)",
        "int('x')",
        "int(missing)",
        "float([])",
        "1 in 5",
        "'a' < 1",
        "int(float('inf'))",
        "int(float('nan'))",
    ],
)
def test_what_cannot_be_evaluated_is_a_spec_error_that_quotes_it(text: str) -> None:
    expression = parse(text)
    with pytest.raises(SpecError) as caught:
        expression({"present": 1})
    assert f"cannot evaluate {text!r}" in caught.value.problem


def test_the_error_says_what_the_facts_were() -> None:
    with pytest.raises(SpecError, match="heads=8, kv_heads=None"):
        parse("heads // kv_heads")({"heads": 8})


# It means what Python means

NAMES = {"a": 3, "b": -2, "c": 0, "t": True, "f": 1.5, "s": "x", "none_": None, "xs": [3, -2], "d": {"x": 1}}
NUMBERS = st.sampled_from(["a", "b", "c", "t", "f", "0", "1", "7", "2.5", "True"])
STRINGS = st.sampled_from(["s", "'x'", "'xy'", "''"])


def _binary(operators: str) -> Callable[[st.SearchStrategy[str]], st.SearchStrategy[str]]:
    return lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from(operators.split()), inner)


def _numbers(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        _binary("+ - * // / %")(inner),
        st.builds("-{}".format, inner),
        st.builds("{}({}, {})".format, st.sampled_from(["min", "max"]), inner, inner),
        st.builds("{}({})".format, st.sampled_from(["int", "float", "bool"]), inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
    )


numbers = st.recursive(NUMBERS, _numbers, max_leaves=6)
strings = st.recursive(STRINGS, _binary("+"), max_leaves=3)
truths = st.one_of(
    st.builds("{} {} {}".format, numbers, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), numbers),
    st.builds("{} < {} <= {}".format, numbers, numbers, numbers),
    st.builds("{} {} {}".format, strings, st.sampled_from(["==", "!=", "in", "not in", "<"]), strings),
    st.builds("{} {} [{}, {}]".format, numbers, st.sampled_from(["in", "not in"]), numbers, numbers),
    st.builds("none_ {} None".format, st.sampled_from(["is", "is not", "==", "!="])),
)
mixed = st.recursive(
    st.one_of(numbers, strings, truths, st.just("none_")),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or"]), inner),
        st.builds("(not {})".format, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
    ),
    max_leaves=5,
)


LISTS = st.sampled_from(["xs", "[]", "[1, 'x']", "[a, b, 7]", "[xs, [0]]"])
lists = st.recursive(
    LISTS,
    lambda inner: st.one_of(
        _binary("+")(inner),
        st.builds("({} * {})".format, inner, st.sampled_from(["0", "1", "3", "-1", "a"])),
        st.builds("({} if {} else {})".format, inner, inner, inner),
    ),
    max_leaves=4,
)
of_lists = st.one_of(
    lists,
    st.builds("{}[{}]".format, lists, st.sampled_from(["0", "1", "2", "a"])),
    st.builds("{}[{}]".format, strings, st.sampled_from(["0", "1"])),
    st.builds("d[{}]".format, strings.filter(lambda text: text in ("s", "'x'"))),
    st.builds("len({})".format, lists),
    st.builds("{} in {}".format, numbers, lists),
    st.builds("{} {} {}".format, lists, st.sampled_from(["==", "!="]), lists),
)


def means_what_python_means(text: str) -> None:
    try:
        expected = eval(
            text,
            {"__builtins__": {}, **{f: FUNCTIONS[f] for f in ("min", "max", "int", "float", "bool", "len")}},
            NAMES,
        )
    except (ArithmeticError, LookupError, TypeError, ValueError):
        with pytest.raises(SpecError):
            parse(text)(NAMES)
        return
    result = parse(text)(NAMES)
    assert type(result) is type(expected)
    assert result == expected or (isinstance(result, float) and math.isnan(result) and math.isnan(expected))


@given(mixed)
@settings(max_examples=400)
def test_an_allowed_expression_means_what_python_means(text: str) -> None:
    means_what_python_means(text)


@given(of_lists)
@settings(max_examples=150)
def test_lists_mean_what_python_means(text: str) -> None:
    means_what_python_means(text)

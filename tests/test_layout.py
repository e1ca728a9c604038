"""The layout notation: what parses, what it parses to, how it prints, and where an error points.

`registry.testing.layouts` draws random layouts as plain tuples, with a printer of their own, so that the parser is
compared with something that shares no code with it. `tests/test_boxes.py` evaluates the same tuples element by element.
"""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import layout as notation
from registry.errors import LayoutError
from registry.layout import Axis, Layout, Part, Product, Sum, parse
from registry.testing.layouts import Node, Tree, layouts, show, tensors_of


def tree_of(parsed: Layout) -> Tree:
    """What the parser made, as the tuples of this file."""

    def node(value: Axis | Product | Sum) -> Node:
        if isinstance(value, Axis):
            return ("axis", value.name, value.shard)
        if isinstance(value, Product):
            return ("product", [node(factor) for factor in value.factors], value.cut)
        return ("sum", [(part.label, [node(f) for f in part.factors]) for part in value.parts], value.cut)

    return parsed.label, [node(dim) for dim in parsed.dims]


# Parsing and printing


@given(layouts())
@settings(max_examples=300)
def test_the_parser_reads_what_was_written(tree: Tree) -> None:
    text = show(tree)
    parsed = parse(text)
    assert tree_of(parsed) == tree
    assert list(parsed.tensors) == ([tree[0]] if tree[0] else tensors_of(tree[1]))


@given(layouts())
@settings(max_examples=200)
def test_printing_and_parsing_are_inverse(tree: Tree) -> None:
    parsed = parse(show(tree))
    again = parse(str(parsed))
    assert again == parsed and hash(again) == hash(parsed)
    assert str(again) == str(parsed)


@given(layouts(), st.data())
@settings(max_examples=100)
def test_white_space_means_nothing(tree: Tree, data: st.DataObject) -> None:
    text = show(tree)
    spaced = ""
    for character in text:
        if character in "()[]|:@" or character == " ":
            character = data.draw(st.sampled_from(["", " ", "\n  ", "\t"])) + character + " "
        spaced += character
    assert parse(spaced) == parse(text)


@given(st.text(alphabet="ab1 ()[]|:@.2é", max_size=24))
@settings(max_examples=400)
def test_any_text_is_a_layout_or_a_layout_error(text: str) -> None:
    try:
        parsed = parse(text)
    except LayoutError as error:
        assert text in str(error) and pointed_at(error) <= len(text)
    else:
        assert parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("attention.q: (group rep head_dim) hidden", {"attention.q": ("group", "rep", "head_dim", "hidden")}),
        (
            "hidden [q: group rep head_dim | k: group head_dim | v: group head_dim]",
            {
                "q": ("hidden", "group", "rep", "head_dim"),
                "k": ("hidden", "group", "head_dim"),
                "v": ("hidden", "group", "head_dim"),
            },
        ),
        (
            "(group@tp [q: rep | k: | v:] head_dim) hidden",
            {
                "q": ("group", "rep", "head_dim", "hidden"),
                "k": ("group", "head_dim", "hidden"),
                "v": ("group", "head_dim", "hidden"),
            },
        ),
        ("[g: ffn@tp | u: ffn@tp] hidden", {"g": ("ffn", "hidden"), "u": ("ffn", "hidden")}),
        ("expert hidden (ffn [g: | u:])", {"g": ("expert", "hidden", "ffn"), "u": ("expert", "hidden", "ffn")}),
        ("[[a: x | b: y] | c: z]", {"a": ("x",), "b": ("y",), "c": ("z",)}),
        ("scalar:", {"scalar": ()}),
        ("one: 1 1", {"one": ()}),
    ],
)
def test_axes_of_each_tensor_in_stored_order(text: str, axes: dict[str, tuple[str, ...]]) -> None:
    parsed = parse(text)
    assert parsed.axes == axes
    assert parsed.tensors == tuple(axes)


def test_brackets_around_one_node_mean_nothing_but_around_a_cut() -> None:
    assert parse("x: (a)") == parse("x: ((a))") == parse("x: a")
    assert parse("x: ()") == parse("x: 1")
    assert parse("x: (a)@tp") != parse("x: a@tp")
    assert str(parse("x: (a)@tp")) == "x: (a)@tp"


def test_where_a_node_stands_does_not_matter_to_equality() -> None:
    spread = parse("  [ x:   a@tp | y : (a   b) ]   hidden ")
    assert spread == parse("[x: a@tp | y: (a b)] hidden")
    assert spread.dims[0] == Sum((Part("x", (Axis("a", "tp"),)), Part("y", (Product((Axis("a"), Axis("b"))),))))


def test_parallel_dimensions_that_a_layout_names() -> None:
    parsed = parse("layer@pp [x: a@tp | y: (b c)@ep | z: a@etp]")
    assert parsed.shards()["layer"] == "pp"
    assert parsed.cuts() == {"ep"}
    assert parsed.sharded_over() == {"pp", "tp", "ep", "etp"}


def test_one_more_leading_dimension() -> None:
    parsed = parse("[x: a | y: b] hidden").prepend(Axis("layer", "pp"))
    assert str(parsed) == "layer@pp [x: a | y: b] hidden"
    assert parsed.axes == {"x": ("layer", "a", "hidden"), "y": ("layer", "b", "hidden")}


def test_a_layout_survives_pickling() -> None:
    parsed = parse("(group@tp [q: rep | k:] head_dim) hidden")
    assert pickle.loads(pickle.dumps(parsed)) == parsed


def test_names_may_hold_letters_of_any_alphabet() -> None:
    assert parse("вес.weight: größe ширина").axes == {"вес.weight": ("größe", "ширина")}
    assert parse("β: α@tp").shards() == {"α": "tp"}


# Errors


def pointed_at(error: LayoutError) -> int:
    """The column that the caret stands at, in the quoted pattern."""
    _, quoted, caret = str(error.where).split("\n")
    assert quoted.startswith("    ") and caret.strip() == "^"
    return caret.index("^") - 4


# The caret in the second line stands below the place.
ERRORS = [
    ("hidden ffn", "^", "no tensor is named"),
    ("", "^", "no tensor is named"),
    ("  a b", "  ^", "no tensor is named"),
    ("x: a $ b", "     ^", "unexpected character '$'"),
    ("x: a 2 b", "     ^", "2 of tensor 'x' is only one half of an axis that is taken apart"),
    ("x: a/2 b", "   ^", "a/2 of tensor 'x' is only one half"),
    ("x: a/2 2 b/2", "         ^", "two parts of tensor 'x' are counted by 2"),
    ("[x: a/2 2 | y: a] b 2", "                    ^", "two parts of tensor 'x' are counted by 2"),
    ("x: a/1", "     ^", "expected the number of parts of an axis"),
    ("x: a/b", "     ^", "expected the number of parts of an axis"),
    ("x: a/2@tp 2", "      ^", "unexpected '@'"),
    ("x: a 12345", "     ^", "unexpected character '1'"),
    ("x: a 1b", "     ^", "unexpected character '1'"),
    ("x: -a", "   ^", "unexpected character '-'"),
    ("x: a é́", "      ^", "unexpected character"),
    ("x: (a b", "       ^", "expected ')', found 'end of layout'"),
    ("x: (a b]", "       ^", "expected ')', found ']'"),
    ("[x: a | y: b", "            ^", "expected ']', found 'end of layout'"),
    ("[x: a | y: b)", "            ^", "expected ']', found ')'"),
    ("x: a) b", "    ^", "unexpected ')'"),
    ("x: a | y: b", "     ^", "unexpected '|'"),
    ("x: a@", "     ^", "expected the name of a parallel dimension"),
    ("x: a@ (b)", "      ^", "expected the name of a parallel dimension"),
    ("x: a@1", "     ^", "expected the name of a parallel dimension"),
    ("x: 1@tp", "    ^", "unexpected '@'"),
    ("x: @tp", "   ^", "unexpected '@'"),
    ("x: a y: b", "     ^", "label 'y' in the middle of a product"),
    ("x: (y: a)", "    ^", "label 'y' in the middle of a product"),
    (": a", "^", "unexpected ':'"),
    ("x: [q: a | k: b]", "^", "a layout with a sum takes its labels from the parts"),
    ("c [a | y: b]", "   ^", "a part of a sum names no tensor"),
    ("c [x: a | b]", "          ^", "a part of a sum names no tensor"),
    ("c [x: a | ]", "          ^", "a part of a sum names no tensor"),
    ("[x: [y: a | z: b] | w: c]", " ^", "part 'x' has labelled parts of its own"),
    ("[qq: a | q: b | q: c]", "                ^", "tensor 'q' appears twice"),
    ("[x: a | [y: b | x: c]]", "                ^", "tensor 'x' appears twice"),
    ("x: aa (b a) a", "            ^", "axis 'a' appears twice in tensor 'x'"),
    ("a [x: b | y: a]", "             ^", "axis 'a' appears twice in tensor 'y'"),
    ("[x: a | y: b] c [z: d | w: e]", "                ^", "two sums side by side"),
    ("([x: a | y: b] [z: d | w: e])", "               ^", "two sums side by side"),
    ("[[x: a] [y: b] | z: c]", "        ^", "two sums side by side"),
    ("x: (a@tp b)@tp c", "    ^", "'tp' shards tensor 'x' twice"),
    ("x: c ((a b)@tp d)@tp", "      ^", "'tp' shards tensor 'x' twice"),
    ("x: a@tp b@tp", "        ^", "'tp' shards tensor 'x' twice"),
    ("a@ep [x: b@tp | y: b@ep]", "                   ^", "'ep' shards tensor 'y' twice"),
    ("[x: a@tp | y: b]@tp", "    ^", "'tp' shards tensor 'x' twice"),
]


@pytest.mark.parametrize(("text", "caret", "problem"), ERRORS, ids=[text or "empty" for text, _, _ in ERRORS])
def test_an_error_quotes_the_layout_and_points_at_the_place(text: str, caret: str, problem: str) -> None:
    with pytest.raises(LayoutError) as caught:
        parse(text)
    assert problem in caught.value.problem
    assert f"\n    {text}\n" in str(caught.value)
    assert pointed_at(caught.value) == len(caret) - 1


def test_an_error_in_a_layout_of_several_lines_still_points_at_the_place() -> None:
    text = "x:\n\t(a b\n  c d"
    with pytest.raises(LayoutError) as caught:
        parse(text)
    assert "\n    x:  (a b   c d\n" in str(caught.value)
    assert pointed_at(caught.value) == len(text)


def test_the_same_tensor_may_shard_over_two_dimensions_and_two_tensors_over_one() -> None:
    assert parse("x: a@tp b@ep").sharded_over() == {"tp", "ep"}
    assert parse("[x: a@tp | y: b@tp] c@ep").sharded_over() == {"tp", "ep"}


def test_the_length_is_limited() -> None:
    axes = " ".join(f"a{i}" for i in range(100))
    label = "x" * (notation.MAX_LENGTH - len(axes) - 2)
    assert parse(f"{label}: {axes}").tensors == (label,)
    with pytest.raises(LayoutError, match=f"at most {notation.MAX_LENGTH} characters"):
        parse(f"x{label}: {axes}")


def test_the_depth_is_limited() -> None:
    def nested(depth: int) -> str:
        return "x: " + "".join(f"(a{i} " for i in range(depth)) + "b" + ")" * depth

    assert len(parse(nested(notation.MAX_DEPTH)).axes["x"]) == notation.MAX_DEPTH + 1
    with pytest.raises(LayoutError, match=f"nested deeper than {notation.MAX_DEPTH}"):
        parse(nested(notation.MAX_DEPTH + 1))
    with pytest.raises(LayoutError, match="nested deeper"):
        parse("[" * 2000)

"""Layouts evaluated on sizes, against a reference that goes through the stored tensor element by element."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from attrs import evolve, frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.boxes import Box, Fragment, assemble, clip, contiguous, fragments, interval, shape, views
from registry.errors import LayoutError, ParallelError
from registry.layout import parse
from registry.testing.layouts import Node, Tree, all_tensors, axes_of, layouts, show, tensors_of

# An element of a stored tensor: the logical tensor that it belongs to and its index there; None is padding.
Element = tuple[str, tuple[int, ...]]


# The reference. It knows nothing of strides: it lists what lies at every position.


class DoesNotDivide(Exception):
    """A size that the ranks do not divide."""


def own_part(positions: list[Any], rank: tuple[int, int] | None, replicate: bool = False) -> list[Any]:
    """The positions that a rank stores."""
    if rank is None:
        return positions
    index, count = rank
    if len(positions) % count == 0:
        each = len(positions) // count
        return positions[index * each : (index + 1) * each]
    if replicate and positions and count % len(positions) == 0:
        return [positions[index // (count // len(positions))]]
    raise DoesNotDivide


@frozen
class Reference:
    """What lies where in a stored tensor; the fields are those of `Box`."""

    tree: Tree
    sizes: Mapping[str, int]
    present: frozenset[str] | None = None
    ranks: Mapping[str, tuple[int, int]] = {}
    replicate: Mapping[str, frozenset[str]] = {}
    limits: Mapping[str, int] = {}

    @property
    def box(self) -> Box:
        return Box(self.sizes, self.present, self.ranks, self.replicate, self.limits)

    def has(self, label: str | None, nodes: list[Node]) -> bool:
        names = [label] if label else tensors_of(nodes)
        return self.present is None or any(name in self.present for name in names)

    def node(self, node: Node) -> list[tuple[str | None, dict[str, int]]]:
        """(label, index of each axis) at every position along one node."""
        kind, inner, mark = node
        rank = self.ranks.get(mark) if mark else None
        if kind == "axis":
            whole = [(None, {inner: i}) for i in range(self.sizes[inner])]
            return own_part(whole, rank, inner in self.replicate.get(mark or "", ()))
        if kind == "product":
            return own_part(self.product(inner), rank)
        found = []
        for label, nodes in inner:
            if self.has(label, nodes):
                found += [(label or below, index) for below, index in self.product(nodes)]
        return own_part(found, rank)

    def product(self, nodes: list[Node]) -> list[tuple[str | None, dict[str, int]]]:
        found: list[tuple[str | None, dict[str, int]]] = [(None, {})]
        for node in nodes:
            here = self.node(node)
            found = [(a or b, {**i, **j}) for a, i in found for b, j in here]
        return found

    def shape(self) -> tuple[int, ...]:
        return tuple(len(self.node(node)) for node in self.tree[1])

    def elements(self) -> dict[tuple[int, ...], Element | None]:
        """What lies at every stored position."""
        label, dims = self.tree
        along = [list(enumerate(self.node(dim))) for dim in dims]
        found: dict[tuple[int, ...], Element | None] = {}
        for cells in itertools.product(*along):
            name = next((tensor for _, (tensor, _) in cells if tensor), label)
            index = {axis: i for _, (_, part) in cells for axis, i in part.items()}
            padding = any(i >= self.limits.get(axis, i + 1) for axis, i in index.items())
            absent = self.present is not None and name not in self.present
            found[tuple(at for at, _ in cells)] = None if padding or absent else (str(name), tuple(index.values()))
        return found


# Random cases


@st.composite
def references(draw: st.DrawFn, ranked: bool = True) -> Reference:
    """A random layout on random sizes, with absent tensors, padding, and a rank's share of it."""
    tree = draw(layouts())
    sizes = {axis: draw(st.sampled_from([1, 2, 2, 3, 4, 4, 6, 0])) for axis in sorted({*axes_of(tree[1])})}
    while math.prod(Reference(tree, sizes).shape()) > 600:
        largest = max(sizes, key=lambda axis: sizes[axis])
        sizes[largest] //= 2
    tensors = all_tensors(tree)
    present = draw(st.none() | st.frozensets(st.sampled_from(tensors)))
    limits = {axis: draw(st.integers(0, n)) for axis, n in sizes.items() if draw(st.integers(0, 3)) == 3}
    case = Reference(tree, sizes, present, {}, {}, limits)
    if not ranked:
        return case
    # The first of these that the sizes divide; none at all always does.
    wanted = [{"tp": draw(st.sampled_from([1, 2, 3, 4])), "ep": draw(st.sampled_from([1, 2]))}]
    wanted += [{"tp": 2}, {"ep": 2}, {"tp": 3}, {}]
    replicate = {"tp": frozenset(draw(st.sets(st.sampled_from(sorted(sizes) or ["none"]))))}
    for counts in wanted:
        ranks = {dim: (draw(st.integers(0, count - 1)), count) for dim, count in counts.items()}
        made = evolve(case, ranks=ranks, replicate=replicate)
        try:
            made.shape()
        except DoesNotDivide:
            continue
        return made
    raise AssertionError("no ranks at all divide everything")


@st.composite
def pieces(draw: st.DrawFn, whole: tuple[int, ...]) -> list[tuple[int, int]]:
    """A random box of a stored tensor."""
    cuts = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in whole]
    return [(low, high - low) for low, high in cuts]


def at_positions(found: list[Fragment]) -> Iterator[tuple[int, Element]]:
    """(position, element) of everything in some fragments."""
    for fragment in found:
        for index in itertools.product(*(range(n) for n in fragment.size)):
            position = fragment.offset + sum(i * s for i, s in zip(index, fragment.stride, strict=True))
            yield position, (fragment.tensor, tuple(lo + i for lo, i in zip(fragment.lo, index, strict=True)))


# Shapes and fragments


@given(references())
@settings(max_examples=250)
def test_fragments_say_what_lies_at_every_position(case: Reference) -> None:
    layout = parse(show(case.tree))
    found = list(at_positions(fragments(layout, case.box)))
    whole = case.shape()
    assert shape(layout, case.box) == whole
    steps = contiguous(whole)
    expected = {
        sum(i * s for i, s in zip(at, steps, strict=True)): element
        for at, element in case.elements().items()
        if element
    }
    assert dict(found) == expected
    assert len(found) == len(expected), "two fragments hold the same position"


@given(references(), st.data())
@settings(max_examples=250)
def test_a_piece_pulls_back_to_the_logical_boxes_in_it(case: Reference, data: st.DataObject) -> None:
    """Any box of a stored tensor, stored with any strides."""
    layout = parse(show(case.tree))
    piece = data.draw(pieces(case.shape()))
    sizes = [n for _, n in piece]
    order = data.draw(st.permutations(range(len(sizes))))
    gaps = [data.draw(st.integers(0, 2)) for _ in sizes]
    steps, step = [0] * len(sizes), 1
    for d in order:
        steps[d] = step
        step *= sizes[d] + gaps[d]
    for strides in (None, steps):
        used = contiguous(sizes) if strides is None else strides
        expected = {
            sum((i - o) * s for i, (o, _), s in zip(at, piece, used, strict=True)): element
            for at, element in case.elements().items()
            if element and all(o <= i < o + n for i, (o, n) in zip(at, piece, strict=True))
        }
        found = list(at_positions(fragments(layout, case.box, piece=piece, strides=strides)))
        assert dict(found) == expected
        assert len(found) == len(expected)


def sharded_over(nodes: list[Node], tensor: str) -> set[str]:
    """The parallel dimensions that divide one tensor."""
    found = set()
    for kind, inner, mark in nodes:
        found |= {mark} if mark else set()
        for label, below in inner if kind == "sum" else [(tensor, inner)] if kind == "product" else []:
            if label == tensor or (label is None and tensor in tensors_of(below)):
                found |= sharded_over(below, tensor)
    return found


@given(references())
@settings(max_examples=200)
def test_all_ranks_together_hold_every_element_equally_often(case: Reference) -> None:
    """Once where the ranks divide the tensor, and as often as there are ranks that share it where they do not."""
    layout = parse(show(case.tree))
    held: Counter[Element] = Counter()
    for at in itertools.product(*(range(count) for _, count in case.ranks.values())):
        ranks = {dim: (i, case.ranks[dim][1]) for dim, i in zip(case.ranks, at, strict=True)}
        held.update(element for _, element in at_positions(fragments(layout, evolve(case.box, ranks=ranks))))
    whole = evolve(case, ranks={})
    everything = {element for element in whole.elements().values() if element}
    assert set(held) == everything
    for tensor in all_tensors(case.tree):
        times = {n for (name, _), n in held.items() if name == tensor}
        shared = [count for dim, (_, count) in case.ranks.items() if dim not in sharded_over(case.tree[1], tensor)]
        if not case.replicate.get("tp"):
            assert times <= {math.prod(shared)}
        else:
            assert len(times) <= 1 and all(n % math.prod(shared) == 0 for n in times)


@given(layouts(), st.data())
@settings(max_examples=150)
def test_a_size_that_ranks_do_not_divide_is_refused_where_the_reference_refuses_it(
    tree: Tree, data: st.DataObject
) -> None:
    sizes = {axis: data.draw(st.sampled_from([1, 2, 3])) for axis in sorted({*axes_of(tree[1])})}
    case = Reference(tree, sizes, None, {"tp": (1, data.draw(st.sampled_from([2, 3]))), "ep": (0, 2)})
    try:
        expected = case.shape()
    except DoesNotDivide:
        with pytest.raises(ParallelError, match="does not divide"):
            shape(parse(show(tree)), case.box)
    else:
        assert shape(parse(show(tree)), case.box) == expected


# What the formats do, by hand


def where(text: str, box: Box, tensor: str) -> list[tuple[int, tuple[int, ...]]]:
    """(position, index) of one tensor's elements, by position."""
    return sorted((at, index) for at, (name, index) in at_positions(fragments(parse(text), box)) if name == tensor)


def test_query_heads_of_a_group_lie_before_its_key_and_value() -> None:
    box = Box({"group": 2, "rep": 3, "head_dim": 1})
    text = "(group [q: rep | k: | v:] head_dim)"
    assert shape(parse(text), box) == (10,)
    assert [at for at, _ in where(text, box, "q")] == [0, 1, 2, 5, 6, 7]
    assert where(text, box, "k") == [(3, (0, 0)), (8, (1, 0))]
    assert where(text, box, "v") == [(4, (0, 0)), (9, (1, 0))]


def test_each_rank_has_its_own_gate_and_up() -> None:
    box = Box({"ffn": 6}, ranks={"tp": (1, 2)})
    assert where("[g: ffn@tp | u: ffn@tp]", box, "g") == [(0, (3,)), (1, (4,)), (2, (5,))]
    assert where("[g: ffn@tp | u: ffn@tp]", box, "u") == [(3, (3,)), (4, (4,)), (5, (5,))]


def test_a_part_that_is_absent_takes_no_room() -> None:
    box = Box({"ffn": 3, "hidden": 2}, frozenset({"up"}))
    layout = parse("[gate: ffn | up: ffn] hidden")
    assert shape(layout, box) == (3, 2)
    assert fragments(layout, box) == [Fragment("up", ("ffn", "hidden"), (0, 0), (3, 2), (2, 1), 0)]
    assert shape(layout, evolve(box, present=frozenset())) == (0, 2)


def test_padding_belongs_to_no_tensor() -> None:
    """131 rows on 4 ranks of 40: the last rank has 11 rows and 29 of padding."""
    layout = parse("embedding: vocab@tp hidden")
    last = Box({"vocab": 160, "hidden": 2}, ranks={"tp": (3, 4)}, limits={"vocab": 131, "hidden": 2})
    assert shape(layout, last) == (40, 2)
    assert fragments(layout, last) == [Fragment("embedding", ("vocab", "hidden"), (120, 0), (11, 2), (2, 1), 0)]


def test_a_rank_of_nothing_but_padding_holds_no_fragment() -> None:
    box = Box({"vocab": 8}, ranks={"tp": (3, 4)}, limits={"vocab": 5})
    assert shape(parse("e: vocab@tp"), box) == (2,)
    assert fragments(parse("e: vocab@tp"), box) == []


def test_padding_inside_a_product_leaves_holes() -> None:
    box = Box({"a": 2, "b": 3}, limits={"b": 2})
    assert where("x: (a b)", box, "x") == [(0, (0, 0)), (1, (0, 1)), (3, (1, 0)), (4, (1, 1))]


def test_fewer_key_heads_than_ranks_are_repeated_on_neighbours() -> None:
    layout = parse("k: group@tp head_dim")

    def heads(rank: int) -> tuple[int, ...]:
        box = Box({"group": 2, "head_dim": 4}, ranks={"tp": (rank, 8)}, replicate={"tp": frozenset({"group"})})
        assert shape(layout, box) == (1, 4)
        return fragments(layout, box)[0].lo

    assert [heads(rank)[0] for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_cut_falls_anywhere() -> None:
    """One group on two ranks: rank 0 has three queries, rank 1 one query, the key and the value."""
    text = "(group [q: rep | k: | v:] head_dim)@tp"
    sizes = {"group": 1, "rep": 4, "head_dim": 2}
    ranks = [Box(sizes, ranks={"tp": (rank, 2)}) for rank in range(2)]
    assert shape(parse(text), ranks[0]) == (6,)
    assert [index[1] for _, index in where(text, ranks[0], "q")] == [0, 0, 1, 1, 2, 2]
    assert [at for at, _ in where(text, ranks[1], "q")] == [0, 1]
    assert [at for at, _ in where(text, ranks[1], "k")] == [2, 3]
    assert [at for at, _ in where(text, ranks[1], "v")] == [4, 5]
    assert where(text, ranks[0], "k") == where(text, ranks[0], "v") == []


def test_a_cut_inside_a_product_repeats() -> None:
    """Rows of two, cut in the middle of the second: rank 0 has one and a half, and that once for each c."""
    text, sizes = "x: (c (a b)@tp)", {"c": 2, "a": 3, "b": 2}
    held = [where(text, Box(sizes, ranks={"tp": (rank, 2)}), "x") for rank in range(2)]
    assert held[0] == list(enumerate([(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0)]))
    assert held[1] == list(enumerate([(0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 1, 1), (1, 2, 0), (1, 2, 1)]))


def test_a_tensor_without_dimensions_is_one_element() -> None:
    assert fragments(parse("x:"), Box({})) == [Fragment("x", (), (), (), (), 0)]
    assert fragments(parse("x: 1 1"), Box({})) == [Fragment("x", (), (), (), (), 0)]


def test_a_tensor_without_elements_has_no_fragment() -> None:
    assert fragments(parse("x: a b"), Box({"a": 0, "b": 3})) == []
    assert where("[x: a | y: b]", Box({"a": 0, "b": 2}), "y") == [(0, (0,)), (1, (1,))]


def test_an_axis_without_a_size_is_an_error_that_names_it() -> None:
    with pytest.raises(LayoutError, match="axis 'ffn' has no size"):
        shape(parse("x: hidden ffn"), Box({"hidden": 2}))


@pytest.mark.parametrize("piece", [[(0, 3), (0, 3)], [(-1, 2), (0, 3)], [(1, 2), (0, 3)], [(0, 2)], [(0, -1), (0, 3)]])
def test_a_piece_outside_its_tensor_is_an_error(piece: list[tuple[int, int]]) -> None:
    with pytest.raises(LayoutError, match="a piece outside its tensor"):
        fragments(parse("x: a b"), Box({"a": 2, "b": 3}), piece=piece)


def test_an_interval_that_does_not_divide_says_what_would() -> None:
    assert [interval(6, i, 3, "a") for i in range(3)] == [(0, 2), (2, 2), (4, 2)]
    assert interval(0, 1, 3, "a") == (0, 0)
    with pytest.raises(ParallelError, match="group@tp does not divide") as caught:
        interval(6, 0, 4, "group@tp", replicate=True)
    assert "size 6 over 4 ranks" in str(caught.value)
    with pytest.raises(ParallelError):
        interval(2, 0, 4, "a")


# Cutting nested positions


@given(st.data())
@settings(max_examples=300)
def test_clip_gives_disjoint_boxes_of_exactly_the_positions_inside(data: st.DataObject) -> None:
    size = data.draw(st.lists(st.integers(0, 4), max_size=4))
    stride, step = [0] * len(size), data.draw(st.integers(1, 3))
    for k in range(len(size) - 1, -1, -1):
        stride[k] = step
        step = step * size[k] + data.draw(st.integers(0, 3)) if size[k] else step
    base = data.draw(st.integers(0, 5))
    low, high = data.draw(st.integers(-3, base + step + 3)), data.draw(st.integers(-3, base + step + 3))
    expected = {
        index
        for index in itertools.product(*(range(n) for n in size))
        if low <= base + sum(i * s for i, s in zip(index, stride, strict=True)) < high
    }
    boxes = clip(base, size, stride, low, high)
    found = [i for box in boxes for i in itertools.product(*(range(start, start + n) for start, n in box))]
    assert set(found) == expected
    assert len(found) == len(expected), "boxes overlap"
    assert len(boxes) <= max(1, 2 * len(size) - 1), "the number of boxes grows with the sizes"


# Views of torch tensors


DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
]


def random_bits(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Elements with every bit random (NaNs of all payloads among them); a bool has only two patterns."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (max(count, 1) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)[:count]


def strided(flat: torch.Tensor, sizes: tuple[int, ...], order: list[int]) -> torch.Tensor:
    """The elements in this shape, but stored in another order of dimensions, and not at the start of the storage."""
    made = flat.reshape([sizes[d] for d in order]).permute([order.index(d) for d in range(len(sizes))])
    room = torch.cat([flat[:1], flat, flat[:1]]) if flat.numel() else flat
    return room.as_strided(made.shape, made.stride(), 1 if flat.numel() else 0)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(references(ranked=False), st.sampled_from(DTYPES), st.data())
@settings(max_examples=150)
def test_views_hold_the_elements_that_the_reference_says(
    case: Reference, dtype: torch.dtype, data: st.DataObject
) -> None:
    case = evolve(case, present=None, limits={})
    layout, whole = parse(show(case.tree)), case.shape()
    order = data.draw(st.permutations(range(len(whole))))
    stored = strided(random_bits(math.prod(whole), dtype, 7), whole, order)
    made = views(layout, stored, case.sizes)
    assert {name: tuple(view.shape) for name, view in made.items()} == {
        name: tuple(case.sizes[axis] for axis in axes) for name, axes in layout.axes.items()
    }
    for at, element in case.elements().items():
        assert element is not None
        view = made[element[0]][element[1]]
        assert view.data_ptr() == stored[at].data_ptr(), "a view is of the stored bytes, not of a copy"
    assert sum(view.numel() for view in made.values()) == stored.numel()


@given(references(ranked=False), st.sampled_from(DTYPES))
@settings(max_examples=100)
def test_assembling_is_the_inverse_of_viewing_bit_for_bit(case: Reference, dtype: torch.dtype) -> None:
    case = evolve(case, present=None)
    layout, whole = parse(show(case.tree)), case.shape()
    stored = random_bits(math.prod(whole), dtype, 11).reshape(whole)
    again = assemble(layout, views(layout, stored, case.sizes), case.sizes)
    assert again.dtype == dtype and again.shape == stored.shape
    assert bits(again) == bits(stored)


def test_writing_through_a_view_changes_the_stored_tensor() -> None:
    stored = torch.zeros(2, 4)
    views(parse("hidden [x: a | y: b]"), stored, {"hidden": 2, "a": 1, "b": 3})["y"].fill_(5)
    assert stored.tolist() == [[0, 5, 5, 5], [0, 5, 5, 5]]


def test_views_of_tensors_without_elements_and_without_dimensions() -> None:
    sizes = {"a": 0, "b": 2}
    made = views(parse("[x: a | y: b]"), torch.ones(2), sizes)
    assert made["x"].shape == (0,) and made["y"].tolist() == [1, 1]
    assert views(parse("x:"), torch.tensor(3), {})["x"].item() == 3
    assert assemble(parse("x:"), {"x": torch.tensor(True)}, {}).item() is True


def test_nan_payloads_survive() -> None:
    payloads = torch.tensor([0x7F800001, 0x7FC00001, 0x7FFFFFFF, 0x7FABCDEF], dtype=torch.int32)
    stored = payloads.view(torch.float32).reshape(2, 2)
    again = assemble(
        parse("(a b) [x: | y:]"), views(parse("(a b) [x: | y:]"), stored, {"a": 1, "b": 2}), {"a": 1, "b": 2}
    )
    assert again.view(torch.int32).flatten().tolist() == payloads.tolist()


def test_a_shape_that_does_not_fit_is_an_error_that_says_both() -> None:
    with pytest.raises(LayoutError) as caught:
        views(parse("x: (a b)"), torch.zeros(5), {"a": 2, "b": 3})
    assert "expected: (6,)" in str(caught.value) and "found: (5,)" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"x": torch.zeros(2)}, "no y"),
        ({"x": torch.zeros(2), "y": torch.zeros(1)}, "shape of y disagrees"),
        ({"x": torch.zeros(2), "y": torch.zeros(3, dtype=torch.float64)}, "different types"),
    ],
)
def test_parts_that_do_not_fit_together_are_an_error(tensors: dict[str, torch.Tensor], problem: str) -> None:
    with pytest.raises(LayoutError, match=problem):
        assemble(parse("[x: a | y: b]"), tensors, {"a": 2, "b": 3})


# Axes that are taken apart.


@pytest.mark.parametrize(
    ("layout", "order"),
    [
        ("x: (a c/2 2) b", (0, 2, 1, 3)),
        ("x: (a 2 c/2) b", (0, 1, 2, 3)),
        ("x: (2 a) c/2 b", (1, 0, 2, 3)),
        ("x: c/2 (b a 2)", (2, 3, 0, 1)),
    ],
)
def test_an_axis_that_is_taken_apart_lies_as_torch_has_it(layout: str, order: tuple[int, ...]) -> None:
    """The parts are those of `unflatten`; every box of the stored tensor holds what it says it does."""
    sizes = {"a": 3, "b": 2, "c": 6}
    parsed = parse(layout)
    logical = torch.arange(36).reshape(3, 6, 2)
    stored = logical.unflatten(1, (2, 3)).permute(*order).reshape(shape(parsed, Box(sizes)))
    for begin in itertools.product(*map(range, stored.shape)):
        piece = [(first, n - first) for first, n in zip(begin, stored.shape, strict=True)]
        held = stored[tuple(slice(first, None) for first in begin)].flatten()
        seen = torch.full_like(held, -1)
        for f in fragments(parsed, Box(sizes), piece=piece):
            for index in itertools.product(*map(range, f.size)):
                at = dict(zip(f.axes, (lo + i for lo, i in zip(f.lo, index, strict=True)), strict=True))
                place = f.offset + sum(i * step for i, step in zip(index, f.stride, strict=True))
                assert seen[place] == -1
                seen[place] = logical[at["a"], at["c"], at["b"]]
        assert torch.equal(seen, held)


def test_what_an_axis_that_is_taken_apart_cannot_be() -> None:
    with pytest.raises(LayoutError, match="c/2 does not divide"):
        shape(parse("x: c/2 2"), Box({"c": 5}))
    with pytest.raises(LayoutError, match="no view"):
        views(parse("x: c/2 2"), torch.zeros(2, 2), {"c": 4})
    assert str(parse("x: ( a/2  2 ) b")) == "x: (a/2 2) b"

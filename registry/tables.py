"""How results show themselves: one line as a `repr`, and a small table in a notebook."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

#: Rows of a table in a notebook, and characters of one cell: it is there to be read.
MOST = 40
_LONGEST = 300


class Table(NamedTuple):
    """What a result says: a headline, the heads of the columns (none where the first column labels), and its rows."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]


class Shown:
    """A result with a short `repr` and a table in notebooks; both are made of `table()`."""

    __slots__ = ()

    @abstractmethod
    def table(self) -> Table:
        """What there is to show."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {_cut(self.table().caption)}>"

    def _repr_html_(self) -> str:
        return html(self.table())


def html(table: Table, count: int | None = None) -> str:
    """The table as HTML, with everything escaped that a checkpoint may have named; `count` where rows are left out."""
    caption, head, rows = table
    lines = [f'<table><caption style="text-align:left">{_text(caption)}</caption>']
    if head:
        lines.append(f"<thead><tr>{_cells('th', head)}</tr></thead>")
    lines += ["<tbody>", *(_row(row, bool(head)) for row in rows[:MOST])]
    if (count := count or len(rows)) > MOST:
        lines.append(f'<tr><td colspan="{len(rows[0])}">and {count - MOST:,} more</td></tr>')
    return "\n".join([*lines, "</tbody></table>"])


def _row(row: Sequence[object], headed: bool) -> str:
    first = "" if headed else _cells("th", row[:1])
    return f"<tr>{first}{_cells('td', row if headed else row[1:])}</tr>"


def _cells(tag: str, cells: Iterable[object]) -> str:
    return "".join(f'<{tag} style="text-align:left">{_text(cell)}</{tag}>' for cell in cells)


def _text(value: object) -> str:
    return escape(_cut(str(value)))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."

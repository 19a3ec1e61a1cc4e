"""The capability matrix as a terminal shows it: neighbours that say the same are joined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from rich.table import Table
from rich.text import Text

from commlayer.capability import NAME_OF, OPS, Request
from commlayer.cli.console import write
from commlayer.reduce_op import is_fp8

# In this order neighbours often have the same capabilities.
_ORDER = ("sum", "product", "min", "max", "avg", "premul_sum", "band", "bor", "bxor")
_FAMILIES = ("bool", "uint", "int", "float", "complex", "float8")
_SHORT = {"complex": "cplx", "float8": "fp8"}
_STYLES = {"native": "green", "emulated": "yellow", "absent": "red"}
T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """One request and its fate; ``ratio`` is the estimated time over that of a native one."""

    request: Request
    status: str
    ratio: float | None = None

    @property
    def symbol(self) -> str:
        if self.status != "emulated" or self.ratio is None:
            return {"native": "●", "absent": "✗"}[self.status]
        if self.ratio >= 1000:
            return "≫"
        return f"{self.ratio:.1f}" if self.ratio < 9.95 else f"{self.ratio:.0f}"

    def to_dict(self) -> dict[str, Any]:
        request = self.request
        return {
            "op": request.op,
            "reduce": request.reduce,
            "dtype": None if request.op == "barrier" else NAME_OF[request.dtype],
            "status": self.status,
            "ratio": None if self.ratio is None else round(self.ratio, 3),
        }


def show(head: dict[str, Any], cells: Sequence[Cell]) -> None:
    """Print the table, its legend and how many requests are of which kind."""
    counts = Counter(cell.status for cell in cells)
    legend = {"native": "● native", "emulated": "1.7 emulated, in 1.7 times the time", "absent": "✗ absent"}
    disabled = f", without {head['disabled']}" if head["disabled"] else ""
    rest = f" by {' and '.join(head['profiles'])}{disabled}: "
    rest += f"{head['ranks']} ranks, {head['device']}, {head['layout']} extents\n"
    write(
        Text.assemble((head["backend"], "bold"), rest),
        _table(cells),
        "",
        *(Text(f"{text} ({counts[status]})", _STYLES[status]) for status, text in legend.items()),
        Text("Estimated at 1 MiB. --explain OP [--dtype D] [--reduce R] shows a plan.", "dim"),
    )


def _table(cells: Sequence[Cell]) -> Table:
    dtypes = sorted({cell.request.dtype for cell in cells if cell.request.op != "barrier"}, key=_place)
    rows = sorted({cell.request[:2] for cell in cells}, key=_row_place)
    found = {(*cell.request[:2], cell.request.dtype): cell for cell in cells}
    found |= {("barrier", None, dtype): cell for cell in cells if cell.request.op == "barrier" for dtype in dtypes}

    def symbol(row: tuple[str, str | None], dtype: Any) -> str:
        cell = found.get((*row, dtype))
        return "" if cell is None else cell.symbol

    columns = _runs(dtypes, lambda dtype: (_family(dtype), *(symbol(row, dtype) for row in rows)))
    lines = _runs(rows, lambda row: (row[0], *(symbol(row, dtype) for dtype in dtypes)))
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column(no_wrap=True)
    title = ""
    for column in columns:
        family = _family(column[0])
        heading = "" if family == title else _SHORT.get(family, family)
        table.add_column(f"{heading}\n{_label(column)}", justify="center", no_wrap=True)
        title = family
    title = ""
    for line in lines:
        op, reduce = line[0]
        if reduce and op != title:
            table.add_row(op)
        marks = (found.get((op, reduce, column[0])) for column in columns)
        table.add_row(
            "  " + " ".join(name for _, name in line if name) if reduce else op,
            *(Text(mark.symbol, style=_STYLES[mark.status]) if mark else "" for mark in marks),
        )
        title = op
    return table


def _runs(items: Iterable[T], content: Callable[[T], Hashable]) -> list[list[T]]:
    """Neighbours of the same content, together."""
    return [list(run) for _, run in groupby(items, key=content)]


def _row_place(row: tuple[str, str | None]) -> tuple[int, int]:
    return OPS.index(row[0]), _ORDER.index(row[1]) if row[1] else 0


def _family(dtype: Any) -> str:
    name = NAME_OF[dtype]
    return "float8" if is_fp8(dtype) else "float" if name == "bfloat16" else name.rstrip("0123456789")


def _place(dtype: Any) -> tuple[int, int]:
    return _FAMILIES.index(_family(dtype)), list(NAME_OF).index(dtype)


def _label(column: Sequence[Any]) -> str:
    """Of int8, int16, int32, int64: 8-64; nothing where the family's name says it all."""
    family = _family(column[0])
    if family == "bool" or (family == "float8" and len(column) == sum(map(is_fp8, NAME_OF))):
        return ""
    widths = [NAME_OF[dtype].replace("bfloat", "b").removeprefix(family).lstrip("_") for dtype in column]
    return ",".join(widths) if len(column) < 3 else f"{widths[0]}-{widths[-1]}"

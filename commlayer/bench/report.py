"""A report as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from commlayer.bench.sweep import LIMIT, Report, Row

UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def size(count: int) -> str:
    for unit, factor in UNITS:
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count} B"


def duration(us: float) -> str:
    if us >= 1e6:
        return f"{us / 1e6:.3g} s"
    return f"{us / 1e3:.3g} ms" if us >= 1e3 else f"{us:.3g} µs"


def rate(gbs: float) -> str:
    for unit, factor in (("GB/s", 1.0), ("MB/s", 1e3)):
        if gbs * factor >= 1:
            return f"{gbs * factor:.3g} {unit}"
    return f"{gbs * 1e6:.3g} kB/s"


def title(report: Report) -> str:
    host, versions = report["host"], report["versions"]
    words = [f"{report['ranks']} ranks on {host['cores']} cores", host["cpu"]]
    words += [f"{name} {version}" for name, version in versions.items() if name != "python"]
    return " · ".join([*words, report["date"]])


def panels(report: Report) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each operation, reduce op and dtype, with a name for them."""
    for (op, reduce, dtype), rows in groupby(report["rows"], key=lambda row: (row["op"], row["reduce"], row["dtype"])):
        words = [op] if op == "barrier" else [op, reduce, dtype]
        yield " ".join(filter(None, words)), list(rows)


def tables(report: Report) -> Iterator[RenderableType]:
    """A table for each operation and dtype: sizes by implementations."""
    yield Text(title(report), style="dim")
    yield limits(report)
    names = report["implementations"]
    for name, rows in panels(report):
        keys = [key for key in names if any(row["implementation"] == key for row in rows)]
        table = Table(title=name, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1))
        table.add_column("size", no_wrap=True)
        for key in keys:
            table.add_column(names[key].replace(", ", "\n"), justify="right", no_wrap=True)
        for nbytes, group in groupby(rows, key=lambda row: row["bytes"]):
            cells = {row["implementation"]: cell(row) for row in group}
            table.add_row(size(nbytes), *(cells.get(key, "") for key in keys), end_section=True)
        yield Text()
        yield table
    base = names.get(report["baseline"], report["baseline"])
    yield Text(
        f"Medians, of each sample the slowest rank; ± half of the quartiles' distance; bus bandwidth as nccl-tests "
        f"defines it;\n× how often faster than {base}; % of what the machine's memory allows.",
        style="dim",
    )


def limits(report: Report) -> RenderableType:
    found = report["limits"]
    flag, message = (found["latency_us"][key] for key in ("flag", "message"))
    words = [f"8 bytes one way: {duration(message)} by send and recv"]
    if flag is not None:
        words.append(f"{duration(flag)} by a shared flag")
    rates = [f"{size(row['bytes'])} {row['copy']:.3g}, {row['add']:.3g}" for row in found["bandwidth"]]
    return Text(
        f"Each rank at once, GB/s of memcpy and of c = a + b: {'; '.join(rates)}\n{', '.join(words)}", style="dim"
    )


def cell(row: Row) -> Text:
    spread = (row["us_high"] - row["us_low"]) / 2 / row["us"] * 100
    text = Text(f"{duration(row['us'])} ±{spread:.0f}%")
    if row["bytes"]:
        text.append(f"\n{rate(row['busbw'])}", style="cyan")
    if row["implementation"] != LIMIT:
        text.append("\n")
        if row["speedup"] is not None:
            text.append(f"{row['speedup']:.3g}× ", style="green" if row["speedup"] >= 1 else "yellow")
        text.append(f"{row['of_limit'] * 100:.0f}%", style="dim")
    if row["wrong"]:
        text.append(f"\nWRONG: {row['wrong']} elements", style="bold red")
    return text

"""``commlayer trace``: one file of all ranks' traces, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from commlayer import trace, trace_summary
from commlayer.cli.console import print_json, write

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Where COMMLAYER_TRACE=DIR made the ranks write.")]
_FAILURES_SHOWN = 10

app = typer.Typer(no_args_is_help=True, help="Read the traces that a job wrote under COMMLAYER_TRACE=DIR.")


@app.command()
def merge(
    directory: Directory,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write; if not given, DIR/merged.json.")
    ] = None,
) -> None:
    """Make one file of all ranks' traces, for Perfetto or chrome://tracing."""
    try:
        made = trace.merge(directory, output)
    except OSError as error:
        raise ValueError(str(error)) from error
    ranks = len(made["ranks"])
    write(
        Text(f"{made['file']}: {made['operations']} operations of {ranks} {'rank' if ranks == 1 else 'ranks'}"),
        *_warnings(made),
        Text("Open it at https://ui.perfetto.dev (Open trace file; nothing is uploaded) or in chrome://tracing."),
    )


@app.command()
def summary(
    directory: Directory, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False
) -> None:
    """Show each operation's count, bytes, time and bandwidth, each rank's waiting, and the straggler."""
    found = trace_summary.summary(directory)
    if as_json:
        return print_json(found)
    write(
        _operations(found["operations"]),
        Text("Calls of all ranks; sent: what left them for others, by the plan; times with waiting;", "dim"),
        Text("bandwidths in GB/s as nccl-tests defines them.", "dim"),
        "",
        _ranks(found["ranks"]),
        Text(_straggler(found)),
        *_failures(found["failed"]),
        *_warnings(found),
    )


def _operations(rows: Sequence[dict[str, Any]]) -> Table:
    columns = ("operation", "plan", "ranks", "calls", "bytes", "sent", "total", "median", "p99", "alg", "bus")
    table = _table(*columns, left=2)
    for row in rows:
        table.add_row(
            " ".join(filter(None, (row["op"], row["reduce"]))),
            row["plan"],
            *(str(row["group_size"]), str(row["calls"]), _bytes(row["bytes"]), _bytes(row["sent"])),
            *(_seconds(row[key]) for key in ("total", "median", "p99")),
            *("" if row[key] is None else _digits(row[key]) for key in ("algbw", "busbw")),
        )
    return table


def _ranks(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table("rank", "host", "calls", "total", "waited", "was last", "caused waiting", left=2)
    for row in rows:
        table.add_row(
            *(str(row["rank"]), row["host"], str(row["calls"]), _seconds(row["total"]), _seconds(row["waited"])),
            *(str(row["last"]), _seconds(row["caused"])),
        )
    return table


def _table(*columns: str, left: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", no_wrap=True)
    return table


def _straggler(found: dict[str, Any]) -> str:
    waited = sum(row["waited"] for row in found["ranks"])
    if not waited:
        return "No rank waited for another in a collective that all ranks of its group recorded."
    worst = max(found["ranks"], key=lambda row: row["caused"])
    return (
        f"Straggler: rank {worst['rank']} on {worst['host']}, last in {worst['last']} of {found['collectives']} "
        f"collectives; {worst['caused'] / waited:.0%} of all waiting was for it."
    )


def _failures(failed: Sequence[dict[str, Any]]) -> list[RenderableType]:
    lines: list[RenderableType] = [
        Text(f"✗ rank {call['rank']}: {_place(call)}{call['error']}", "red") for call in failed[:_FAILURES_SHOWN]
    ]
    rest = len(failed) - len(lines)
    return lines + [Text(f"✗ and {rest} more that failed", "red")] * (rest > 0)


def _place(call: dict[str, Any]) -> str:
    if call["op"] in call["error"]:  # most errors name the call themselves
        return ""
    number = f" #{call['seq']}" if "seq" in call else ""
    return f"{call['op']}{number} of {call['group']}{' at ' * ('site' in call)}{call.get('site', '')}: "


def _warnings(found: dict[str, Any]) -> list[RenderableType]:
    lines = []
    if found["missing"]:
        lines.append(f"no trace of rank {', '.join(map(str, found['missing']))}")
    if found["left_out"]:
        lines.append(f"left out, of an earlier job: {', '.join(found['left_out'])}")
    return [Text(f"note: {line}", "yellow") for line in lines]


def _seconds(value: float) -> str:
    """1.23 s, 45.6 ms or 789 µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= 0.9995 * size:
            return f"{_digits(value / size)} {unit}"
    return f"{_digits(value * 1e6)} µs"


def _bytes(value: int) -> str:
    """512 B, 1.5 KiB … TiB."""
    power = min(max(value.bit_length() - 1, 0) // 10, 4)
    return f"{_digits(value / 1024**power)} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _digits(value: float) -> str:
    """Three of them, or more before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"

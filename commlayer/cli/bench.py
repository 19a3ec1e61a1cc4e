"""``commlayer bench``: how fast the collectives are here, against what else there is and what the machine allows."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import commlayer
from commlayer.bench import page
from commlayer.bench import report as reports
from commlayer.bench.measure import Effort
from commlayer.bench.operations import cases, parse_dtypes, parse_ops, parse_reduce, parse_size
from commlayer.bench.sweep import sweep, wrong_rows
from commlayer.capability import parse_disabled
from commlayer.cli.console import console, write
from commlayer.cli.launch import start
from commlayer.errors import BackendUnavailable
from commlayer.launch import discover, mpi_importable
from commlayer.probe import find_mpiexec

T = TypeVar("T")
OPS = "all_reduce,reduce_scatter,all_gather,all_to_all,broadcast"


class Preset(NamedTuple):
    maxbytes: str
    stepfactor: int
    iters: int
    seconds: float  # for one size


FULL = Preset("256M", 2, 20, 2.0)
QUICK = Preset("16M", 8, 10, 0.5)


def main(
    ops: Annotated[str, typer.Option(metavar="OPS", help="Which operations, comma separated; all is every one.")] = OPS,
    minbytes: Annotated[str, typer.Option("-b", "--minbytes", help="The smallest array: 8, 64K, 1M …")] = "8",
    maxbytes: Annotated[
        str | None, typer.Option("-e", "--maxbytes", help="The largest array: 256M; with --quick 16M.")
    ] = None,
    stepfactor: Annotated[
        int | None, typer.Option("-f", "--stepfactor", min=2, help="Between sizes: 2; with --quick 8.")
    ] = None,
    datatype: Annotated[
        str, typer.Option("-d", "--datatype", metavar="DTYPES", help="Comma separated: float32,bfloat16.")
    ] = "float32",
    op: Annotated[str, typer.Option("-o", "--op", metavar="OP", help="The reduce op: sum, avg, min, max …")] = "sum",
    iters: Annotated[
        int | None, typer.Option("-n", "--iters", min=1, help="Samples at most: 20; with --quick 10.")
    ] = None,
    warmup: Annotated[int, typer.Option("-w", "--warmup", min=0, help="Calls before them, at most.")] = 5,
    check: Annotated[
        int, typer.Option("-c", "--check", min=0, help="Further calls whose results are compared; 0: none are.")
    ] = 1,
    disable: Annotated[
        list[str] | None,
        typer.Option(metavar="ROWS", help="Also the first of these operations without any of them: all_to_all,send."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="About a minute: fewer sizes, up to 16 MiB.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures here.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FOLDER|FILE.html", help="Write a page with plots (needs matplotlib).")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option("-r", "--ranks", min=2, help="Ranks to start, if no launcher did: 2.")
    ] = None,
    backend: Annotated[
        str, typer.Option(envvar="COMMLAYER_BACKEND", help="auto is mpi where it can be started, else gloo.")
    ] = "auto",
) -> None:
    """Measure collectives: commlayer against torch.distributed, mpi4py and the limit of this machine.

    Run it as it is, or as your program is run: mpiexec -n 4 commlayer bench. All implementations are timed in turn, A B
    A B, in one run, and every result is compared with what it must be. Exit status: 0, or 1 if one was wrong.
    """
    preset = QUICK if quick else FULL
    wanted = _read("--ops", ops, parse_ops)
    dtypes = _read("--datatype", datatype, parse_dtypes)
    reduce = _read("--op", op, parse_reduce)
    smallest = _read("--minbytes", minbytes, parse_size)
    largest = _read("--maxbytes", maxbytes or preset.maxbytes, parse_size)
    if smallest > largest:
        raise ValueError(f"--minbytes {minbytes}: more than --maxbytes {maxbytes or preset.maxbytes}")
    if not all(map(parse_disabled, disable or ())):
        raise ValueError("--disable: names no operation")
    if report is not None and importlib.util.find_spec("matplotlib") is None:
        raise BackendUnavailable("--report: needs matplotlib; pip install 'commlayer[bench]'")
    _check_target("--json", json_file, folder=False)
    _check_target("--report", report, folder=report is not None and not page.is_page(report))
    if discover().launcher == "none":
        _show_through()
        return start(ranks or 2, ["-m", "commlayer", *sys.argv[1:]], _startable(backend.lower()), {})
    world = commlayer.init(None if backend == "auto" else backend.lower())
    if ranks not in (None, world.size):
        raise ValueError(f"--ranks {ranks}: a launcher has started {world.size}")
    todo = cases(wanted, dtypes, smallest, largest, stepfactor or preset.stepfactor, world.size, reduce)
    if not todo:
        raise ValueError(f"--op {op}: has no meaning for --datatype {datatype}")
    effort = Effort(iters or preset.iters, warmup, check, preset.seconds)
    with _progress(len(todo), world.rank == 0) as progress:
        found = sweep(world, todo, effort, tuple(disable or ()), progress)
    failed = wrong_rows(found)
    if world.rank == 0:
        write(*reports.tables(found))
        if json_file is not None:
            json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        written = [json_file] if json_file else []
        written += page.save(found, report) if report else []
        for path in written:
            print(f"Written to {path}", flush=True)
    raise typer.Exit(1 if failed else 0)


def _read(option: str, text: str, parse: Callable[[str], T]) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def _check_target(option: str, target: Path | None, folder: bool) -> None:
    """That it can be written, before all is measured."""
    if target is None:
        return
    if not os.access(target.absolute().parent, os.W_OK):
        raise ValueError(f"{option} {target}: no folder to write to at {target.absolute().parent}")
    if target.exists() and target.is_dir() != folder:
        raise ValueError(f"{option} {target}: is {'no folder' if folder else 'a folder'}")


def _startable(backend: str) -> str:
    if backend != "auto":
        return backend
    return "mpi" if mpi_importable() and find_mpiexec() else "gloo"


def _show_through() -> None:
    """Ranks have pipes where we have the terminal: tell rich what they lead to."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
        for name, value in {"FORCE_COLOR": "1", "COLUMNS": str(columns), "LINES": str(lines)}.items():
            os.environ.setdefault(name, value)


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int, str], None] | None]:
    """A bar on stderr, if that is a terminal."""
    out = console(stderr=True)
    if not (shown and out.is_terminal):
        yield None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    # Drawn between cases alone: a thread that draws would disturb what is measured.
    with Progress(*columns, console=out, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("limits of the machine", total=total)
        bar.refresh()
        yield lambda done, now: bar.update(task, completed=done, description=now, refresh=True)

"""``commlayer doctor``: what is here, what works, and what to do about the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from commlayer.cli.console import print_error, print_json, write
from commlayer.cli.diagnosis import diagnose, possible_ranks


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    all_ranks: Annotated[
        bool, typer.Option("--all-ranks", help="Every rank prints, not rank 0 alone; with --json, one line each.")
    ] = False,
) -> None:
    """Show the launcher, the devices and the backends: what works, and what to do where something does not.

    Run it by itself, or as your program is run: mpiexec -n 2 commlayer doctor. It waits for no other rank.
    Exit status: 0 if a program would start here, 1 if not.
    """
    report = diagnose()
    launcher = report["launcher"]
    ranks = possible_ranks(os.environ) if launcher is None else {launcher["rank"]}
    if all_ranks or 0 in ranks:
        if as_json:
            print_json(report, indent=None if all_ranks else 1)
        else:
            write(*_parts(report))
    elif launcher is not None:
        # Rank 0 cannot see what another node lacks.
        for problem in report["problems"]:
            print_error(f"rank {launcher['rank']} on {report['host']}: {problem}")
    raise typer.Exit(0 if report["ok"] else 1)


def _parts(report: dict[str, Any]) -> Iterator[RenderableType]:
    versions = report["versions"]
    yield Text(" · ".join(f"{name} {version}" for name, version in versions.items()), style="dim")
    yield _section("Launcher", _launcher(report["launcher"]))
    yield _section("Devices", _devices(report))
    yield _section("Backends", _backends(report))
    if report["variables"]:
        settings = _grid()
        for name, value in report["variables"].items():
            settings.add_row(name, Text(value))
        yield _section("Variables", settings)
    yield _section("Choice", _choice(report))
    yield Text()
    for note in report["notes"]:
        yield Text(f"note: {note}", style="yellow")
    for problem in report["problems"]:
        yield Text(f"✗ {problem}", style="red")
    if report["ok"]:
        yield Text("✓ ready", style="green")


def _section(title: str, body: RenderableType) -> RenderableType:
    return Group(Text(), Text(title, style="bold"), Padding(body, (0, 0, 0, 2)))


def _grid() -> Table:
    return Table.grid(padding=(0, 2))


def _launcher(launcher: dict[str, Any] | None) -> RenderableType:
    if launcher is None:
        return Text("unclear, see below", style="red")
    won = launcher["variables"]
    grid = _grid()

    def row(title: str, value: Any, field: str) -> None:
        grid.add_row(title, Text(str(value)), Text(won.get(field, ""), style="cyan"))

    row("started by", "no launcher" if launcher["name"] == "none" else launcher["name"], "launcher")
    for field in ("rank", "size", "local_rank", "local_size"):
        value = launcher[field]
        unknown = "MPI knows" if field == "size" and launcher["mpi"] else "not given"
        row(field.replace("_", " "), unknown if value is None else value, field)
    if launcher["size"] != 1:
        unknown = "MPI knows" if launcher["mpi"] else "not given"
        row("rank 0 is at", launcher["master_addr"] or unknown, "master_addr")
        if launcher["master_addr"]:
            row("its port", launcher["master_port"] or unknown, "master_port")
        row("connects MPI", "yes" if launcher["mpi"] else "no", "mpi")
    return grid


def _devices(report: dict[str, Any]) -> RenderableType:
    grid, devices = _grid(), report["devices"]
    grid.add_row("cpu", f"{devices['cpu_cores']} cores for this process")
    for kind in ("cuda", "xpu"):
        names = devices[kind]
        shown = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
        grid.add_row(kind, Text(shown or "none", style="" if names else "dim"))
    grid.add_row("shared memory", Text(report["shared_memory"]))
    return grid


def _backends(report: dict[str, Any]) -> RenderableType:
    grid = _grid()
    for health in report["backends"]:
        bad = "red" if health["name"] == report["chosen"]["backend"] else "dim"
        mark = Text("✓", style="green") if health["usable"] else Text("✗", style=bad)
        grid.add_row(mark, Text(health["name"], style="bold"), Text(health["version"] or health["reason"]))
        if not health["usable"]:
            if health["version"]:
                grid.add_row("", "", Text(health["reason"]))
            if health["remedy"]:
                grid.add_row("", "", Text(f"→ {health['remedy']}", style="yellow"))
    return grid


def _choice(report: dict[str, Any]) -> RenderableType:
    auto, chosen = report["auto"], report["chosen"]
    grid = _grid()

    def row(title: str, choice: dict[str, Any]) -> None:
        grid.add_row(title, Text(choice["backend"] or "?", style="bold"), Text(choice["why"]))

    row("auto", auto)
    for starter, choice in report["auto_under"].items():
        row(f"  under {starter}", choice)
    if chosen["why"] != auto["why"]:
        row("chosen", chosen)
    if chosen["profiles"]:
        grid.add_row("profile", Text(" and ".join(chosen["profiles"])))
    return grid

"""``commlayer job``: ready job scripts for Slurm and PBS."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from commlayer import __version__
from commlayer.cli.console import write
from commlayer.sites import Site, known, load
from commlayer.sites.schedulers import SCHEDULERS, Scheduler, Value

app = typer.Typer(no_args_is_help=True, help="Write ready job scripts for Slurm and PBS.")


@app.command("sites")
def sites() -> None:
    """List the machines that --site knows."""
    table = Table("site", "scheduler", "GPUs", "what it is", box=None, pad_edge=False)
    for name, path in known().items():
        site = load(str(path))
        table.add_row(name, site.scheduler, str(site.gpus or "-"), Text(site.summary))
    write(table)


def main(
    context: typer.Context,
    arguments: Annotated[list[str], typer.Argument(metavar="SCRIPT", help="The script and its own arguments.")],
    walltime: Annotated[str, typer.Option(metavar="H:MM:SS", help="How long the job may take.")],
    module: Annotated[bool, typer.Option("-m", "--module", help="SCRIPT is a module, as in python -m.")] = False,
    site: Annotated[str, typer.Option(help="A machine of `commlayer job sites`, or a site file.")] = "",
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes.")] = 1,
    ranks: Annotated[
        int, typer.Option("--ranks-per-node", min=0, help="If not given, one per GPU of the site.", show_default=False)
    ] = 0,
    cores: Annotated[
        int, typer.Option("--cores-per-rank", min=0, help="If not given, the site's, shared out.", show_default=False)
    ] = 0,
    cpu_bind: Annotated[
        str, typer.Option(metavar="HOW", help="Bind ranks to cores as --cpu-bind of srun or mpiexec says.")
    ] = "",
    account: Annotated[str, typer.Option(help="The project that pays.")] = "",
    queue: Annotated[str, typer.Option("--queue", "--partition", help="Queue, partition or QOS of the site.")] = "",
    name: Annotated[str, typer.Option(help="Name of the job; if not given, the script's.")] = "",
    log: Annotated[str, typer.Option(metavar="FILE", help="Where the job's output goes.")] = "",
    notice: Annotated[
        int,
        typer.Option(
            "--signal",
            metavar="SECONDS",
            min=0,
            help="Send SIGTERM so long before the end, for a program that then saves its state. It may be requeued.",
            show_default=False,
        ),
    ] = 0,
    directives: Annotated[
        list[str] | None,
        typer.Option("--directive", metavar="TEXT", help="More for the scheduler: --directive=--constraint=hbm80g"),
    ] = None,
    modules: Annotated[
        list[str] | None, typer.Option("--load", metavar="MODULE", help="An environment module to load.")
    ] = None,
    setup: Annotated[
        list[str] | None, typer.Option(metavar="LINE", help="A line of shell to run before the program.")
    ] = None,
    venv: Annotated[str, typer.Option(envvar="VIRTUAL_ENV", help="Virtual environment to activate.")] = "",
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable to set: COMMLAYER_BACKEND=mpi")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the script here, not to the screen.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Write a job script for the scheduler that the command is called after."""
    kind = str(context.command.name)
    scheduler, machine = SCHEDULERS[kind], load(site or kind)
    if machine.scheduler != kind:
        raise ValueError(f"--site {site}: it runs {machine.scheduler}: commlayer job {machine.scheduler}")
    if machine.needs_account and not account:
        raise ValueError(f"--account is missing: {machine.name} asks which project pays")
    seconds = _seconds(walltime)
    if notice >= seconds:
        raise ValueError(f"--signal {notice}: the job has only {seconds} s (--walltime {walltime})")
    ranks = _ranks(ranks, machine)
    bound = _cores(ranks, cores, machine)
    cores = len(bound[0]) if bound else cores or 1
    cpus = cores * machine.threads_per_core
    program = shlex.join(["python", "-u", *(["-m"] if module else []), *arguments])
    fields = {
        "name": name or _job_name(arguments),
        "account": account,
        "queue": queue or machine.queue_for(nodes, seconds / 3600),
        "nodes": nodes,
        "ranks": ranks,
        "cpus": cpus,
        "node_cpus": ranks * cpus,
        "walltime": f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}",
        "log": log,
        "notice": notice,
    }
    wanted = {**scheduler.directives, **machine.directives, **(scheduler.announced if notice else {})}
    head = scheduler.lines(_filled(wanted, fields) | dict(map(scheduler.parse, directives or ())))
    loads = [f"module load {shlex.quote(each)}" for each in modules or ()]
    activate = [f"source {shlex.quote(os.path.join(venv, 'bin', 'activate'))}"] if venv else []
    before = [*machine.setup, *loads, *(setup or ()), *scheduler.aside, *activate]
    variables = {"OMP_NUM_THREADS": str(cores), **machine.env, **dict(map(_variable, env or ()))}
    timer = scheduler.timer.format(seconds=seconds - notice) if notice else ""
    launch = scheduler.launch.format(
        ranks=ranks, cpus=cpus, binding=scheduler.binding(cpu_bind, bound, cores), program=timer + program
    )
    _deliver(_script(scheduler, machine.name, head, before, variables, launch), output, force, scheduler.submit)


for _kind, _site in (("slurm", "perlmutter"), ("pbs", "aurora")):
    app.command(
        _kind,
        help=f"Write a job script: commlayer job {_kind} --site {_site} --nodes 2 --walltime 1:00:00 -- train.py",
        context_settings={"allow_interspersed_args": False},
    )(main)


def _script(
    scheduler: Scheduler, site: str, head: list[str], before: list[str], variables: Mapping[str, str], launch: str
) -> str:
    if before:
        before = ["set +u  # modules and environments may read variables that are not set", *before, "set -u"]
    parts = [
        ["#!/bin/bash -l", *head],
        [f"# By commlayer {__version__} for the site {site}. Submit it with {scheduler.submit}."],
        ["set -euo pipefail", f'cd "${scheduler.folder}"'],
        before,
        [f"export {name}={shlex.quote(value)}" for name, value in variables.items()],
        [launch],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _seconds(walltime: str) -> int:
    """Hours, minutes and seconds alone: a shorter ``30:00`` is minutes to Slurm and PBS, and hours to people."""
    match = re.fullmatch(r"(?:(\d{1,3})-)?(\d{1,4}):([0-5]\d):([0-5]\d)", walltime, re.ASCII)
    days, hours, minutes, seconds = map(int, match.groups("0")) if match else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise ValueError(
            f"--walltime {walltime!r}: expected hours:minutes:seconds as 1:30:00, or with days as 2-0:00:00"
        )
    return total


def _ranks(ranks: int, site: Site) -> int:
    ranks = ranks or site.gpus or 1
    if site.gpus % ranks:
        fitting = ", ".join(str(n) for n in range(1, site.gpus + 1) if site.gpus % n == 0)
        raise ValueError(
            f"--ranks-per-node {ranks}: does not divide the {site.gpus} GPUs of a node of {site.name}; {fitting} do"
        )
    return ranks


def _cores(ranks: int, cores: int, site: Site) -> list[list[int]]:
    """Cores of each rank of a node; [] where the site does not say what there is."""
    bound = site.cores_of(ranks)
    if not bound:
        return []
    most = len(bound[0])
    if not most or cores > most:
        asked = f"--cores-per-rank {cores}" if most else f"--ranks-per-node {ranks}"
        raise ValueError(
            f"{asked}: {ranks} ranks on a node of {site.name} have {most} of its {sum(map(len, site.cores))} cores each"
        )
    return [part[: cores or most] for part in bound]


def _job_name(arguments: Sequence[str]) -> str:
    """The script's or module's name, of the characters that both schedulers allow."""
    program = next((argument for argument in arguments if not argument.startswith("-")), "")
    stem = Path(program).name.removesuffix(".py")
    return re.sub(r"[^\w.+-]+", "_", stem, flags=re.ASCII).strip("_.+-")[:64] or "job"


def _variable(text: str) -> tuple[str, str]:
    name, is_set, value = text.partition("=")
    if not is_set or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError(f"--env {text!r}: expected NAME=VALUE, as COMMLAYER_BACKEND=mpi")
    return name, value


def _filled(directives: Mapping[str, Value], fields: Mapping[str, object]) -> dict[str, Value]:
    try:
        return {name: value.format(**fields) if isinstance(value, str) else value for name, value in directives.items()}
    except (LookupError, ValueError, AttributeError) as error:
        names = ", ".join(f"{{{field}}}" for field in fields)
        raise ValueError(f"directives of the site: {error} in braces; the fields are {names}") from None


def _deliver(script: str, output: Path | None, force: bool, submit: str) -> None:
    data = os.fsencode(script)  # as bytes: arguments may be in any encoding
    if output is None:
        return typer.echo(data, nl=False)
    try:
        with output.open("wb" if force else "xb") as file:
            file.write(data)
    except FileExistsError:
        raise ValueError(f"--output {output}: it exists; --force overwrites it") from None
    except OSError as error:
        raise ValueError(f"--output {output}: {error}") from None
    print(f"{output}: submit it with {submit} {shlex.quote(str(output))}")

"""``commlayer launch``: one command line for every launcher."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from commlayer.capability import load_profile, parse_disabled
from commlayer.cli.backends import BACKENDS, examine
from commlayer.errors import BackendUnavailable
from commlayer.probe import find_mpiexec

Ranks = Annotated[int, typer.Option("-n", "--ranks", min=1, help="How many ranks to start.")]
Backend = Annotated[
    str,
    typer.Option(
        envvar="COMMLAYER_BACKEND",
        help="mpi starts mpiexec, anything else torchrun; under torchrun, auto is nccl or xccl on GPUs and else gloo.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command line and start nothing.")]


def main(
    ranks: Ranks,
    arguments: Annotated[list[str], typer.Argument(metavar="SCRIPT", help="The script and its own arguments.")],
    module: Annotated[bool, typer.Option("-m", "--module", help="SCRIPT is a module, as in python -m.")] = False,
    backend: Backend = "auto",
    profile: Annotated[
        str | None, typer.Option(envvar="COMMLAYER_PROFILE", help="Capability profile to obey: a name or a file.")
    ] = None,
    disable: Annotated[
        str, typer.Option(envvar="COMMLAYER_DISABLE", help="Capabilities to do without, as all_reduce:avg.")
    ] = "",
    options: Annotated[
        str, typer.Option("--with", metavar="OPTIONS", help="More options for the launcher: --with '--ppn 12'.")
    ] = "",
    dry_run: DryRun = False,
) -> None:
    """Start a Python program on N ranks: commlayer launch -n 4 -- train.py --epochs 3

    Inside a Slurm allocation it starts srun; elsewhere mpiexec for the backend mpi, and torchrun's launcher for
    all others. The exit status is that launcher's: the job's under mpiexec and srun, 1 for any failure under torchrun.
    """
    if module:
        arguments = ["-m", *arguments]
    elif not arguments[0].startswith("-") and not dry_run and not Path(arguments[0]).is_file():
        raise ValueError(f"{arguments[0]}: no such file; a module is started with -m {arguments[0]}")
    if profile:
        load_profile(profile)
    parse_disabled(disable)
    start(ranks, arguments, backend.lower(), {"PROFILE": profile, "DISABLE": disable}, options, dry_run)


def start(
    ranks: int,
    arguments: Sequence[str],
    backend: str,
    settings: Mapping[str, str | None],
    options: str = "",
    dry_run: bool = False,
) -> None:
    """Become the launcher of ``python *arguments``: so its exit status is ours, and signals reach it."""
    added = {f"COMMLAYER_{name}": value for name, value in settings.items() if value}
    if backend != "auto":
        added["COMMLAYER_BACKEND"] = backend
    if "OMP_NUM_THREADS" not in os.environ:
        added["OMP_NUM_THREADS"] = str(_threads(ranks, os.environ))
    command = command_line(ranks, arguments, backend, shlex.split(options), os.environ)
    if dry_run:
        assignments = [f"{name}={shlex.quote(value)}" for name, value in added.items()]
        print(" ".join([*assignments, shlex.join(command)]))
        return
    sys.stdout.flush()
    os.execvpe(command[0], command, {**os.environ, **added})


def command_line(
    ranks: int, arguments: Sequence[str], backend: str, options: Sequence[str], env: Mapping[str, str]
) -> list[str]:
    """What starts ``python *arguments`` on so many ranks. ValueError, BackendUnavailable."""
    if backend == "threads" or (backend == "single" and ranks > 1):
        remedy = "commlayer.run_local(fn) starts ranks as threads" if backend == "threads" else "it has one rank"
        raise ValueError(f"--backend {backend}: {remedy}; to start processes, choose {', '.join(BACKENDS[:5])}")
    if backend not in ("auto", *BACKENDS) and not (health := examine(backend, None)).usable:
        raise ValueError(f"--backend {backend}: {health.reason}; {health.remedy}")
    program = [sys.executable, "-u", *arguments]
    if env.get("SLURM_JOB_ID") and shutil.which("srun", path=env.get("PATH")):
        return ["srun", "-n", str(ranks), *options, *program]
    if backend == "mpi":
        mpiexec = find_mpiexec(env)
        missing = "mpi4py is not installed" if importlib.util.find_spec("mpi4py") is None else None
        if missing is None and mpiexec is None:
            missing = f"no mpiexec beside {sys.executable} nor on the PATH"
        if missing or mpiexec is None:
            remedy = "pip install 'commlayer[mpi]' brings mpi4py and MPICH; on a cluster, load the MPI module"
            raise BackendUnavailable(f"backend mpi: {missing}; {remedy}")
        return [mpiexec, "-n", str(ranks), *options, *program]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, *options, "--no-python", *program]


def _threads(ranks: int, env: Mapping[str, str]) -> int:
    """This node's cores shared by the ranks on it; Slurm spreads them over its nodes."""
    nodes = int(env.get("SLURM_JOB_NUM_NODES") or 1)
    return max(1, len(os.sched_getaffinity(0)) * nodes // ranks)

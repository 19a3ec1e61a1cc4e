"""Schedulers: a template of a job script for each, in which braces are filled in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby

Value = str | bool | None  # of a directive: True for one without a value, None for one taken away


@dataclass(frozen=True)
class Scheduler:
    """What sets one batch system apart."""

    submit: str
    mark: str  # starts each line that the scheduler reads
    folder: str  # variable with the directory that the job was submitted from
    pattern: str  # of a directive: its name, and its value
    example: str
    directives: Mapping[str, Value]
    announced: Mapping[str, Value]  # directives for a program that SIGTERM shall reach before the end
    timer: str  # before such a program, where the scheduler announces no end itself
    aside: Sequence[str]  # lines after the modules, before the virtual environment
    launch: str
    binding: Callable[[str, Sequence[Sequence[int]], int], str]

    def parse(self, text: str) -> tuple[str, Value]:
        """Name and value of a directive that a user wrote."""
        match = re.fullmatch(self.pattern, text.strip())
        if not match:
            raise ValueError(f"directive {text!r}: not one of {self.submit}; expected such as {self.example}")
        return match[1], True if match[2] is None else match[2]

    def lines(self, directives: Mapping[str, Value]) -> list[str]:
        """The head of the script; directives without a value are left out."""
        return [f"{self.mark} {self._line(name, value)}" for name, value in directives.items() if value]

    def _line(self, name: str, value: Value) -> str:
        line = name if value is True else f"{name}{' ' if len(name) == 2 else '='}{value}"
        # Schedulers have their own ideas of quoting, and what follows a newline is shell.
        if not re.fullmatch(self.pattern, line) or re.search(r"[\s\"'\\`#]", str(value)):
            raise ValueError(f"directive {line!r}: blanks, quotes, backslashes and # have no place in its value")
        return line


def _slurm_binding(asked: str, bound: Sequence[Sequence[int]], cores: int) -> str:
    return f"--cpu-bind={shlex.quote(asked or 'cores')}"


def _pals_binding(asked: str, bound: Sequence[Sequence[int]], cores: int) -> str:
    asked = asked or ("list:" + ":".join(map(ranges, bound)) if bound else "depth")
    return f"--depth {cores} --cpu-bind depth" if asked == "depth" else f"--cpu-bind {shlex.quote(asked)}"


def ranges(numbers: Sequence[int]) -> str:
    """4 5 6 9 is ``4-6,9``."""
    steps = count()
    runs = [list(run) for _, run in groupby(numbers, key=lambda number: number - next(steps))]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


# The launch lines ask the scheduler for the number of nodes: `sbatch --nodes` and `qsub -l select` have their say.
SCHEDULERS = {
    "slurm": Scheduler(
        submit="sbatch",
        mark="#SBATCH",
        folder="SLURM_SUBMIT_DIR",
        pattern=r"(--[a-z][a-z0-9-]*)(?:=(.+))?",
        example="--constraint=gpu",
        directives={
            "--job-name": "{name}",
            "--account": "{account}",
            "--partition": "{queue}",
            "--nodes": "{nodes}",
            "--ntasks-per-node": "{ranks}",
            "--cpus-per-task": "{cpus}",
            "--time": "{walltime}",
            "--output": "{log}",
        },
        announced={"--signal": "TERM@{notice}", "--requeue": True, "--open-mode": "append"},
        timer="",
        aside=(),
        # Since Slurm 22.05, srun does not take --cpus-per-task from sbatch.
        launch="srun --ntasks-per-node={ranks} --cpus-per-task={cpus} {binding} \\\n    {program}",
        binding=_slurm_binding,
    ),
    "pbs": Scheduler(
        submit="qsub",
        mark="#PBS",
        folder="PBS_O_WORKDIR",
        pattern=r"(-l [A-Za-z_]\w*(?==)|-[A-Za-km-z])(?:[ =](.+))?",
        example="-l filesystems=home",
        directives={
            "-N": "{name}",
            "-A": "{account}",
            "-q": "{queue}",
            "-l select": "{nodes}:ncpus={node_cpus}:mpiprocs={ranks}",
            "-l place": "scatter",
            "-l walltime": "{walltime}",
            "-j": "oe",
            "-o": "{log}",
        },
        announced={"-r": "y"},
        # Each rank has a clock of its own, as not every mpiexec hands signals on. SECONDS: since the script began.
        timer='timeout --foreground --preserve-status --signal=TERM "$(({seconds} - SECONDS))" \\\n    ',
        aside=("mpiexec=$(type -P mpiexec || echo mpiexec)  # of this machine: pip may have brought another one",),
        launch='nodes=$(sort -u "$PBS_NODEFILE" | wc -l)\n'
        '"$mpiexec" -n "$((nodes * {ranks}))" --ppn {ranks} {binding} \\\n    {program}',
        binding=_pals_binding,
    ),
}

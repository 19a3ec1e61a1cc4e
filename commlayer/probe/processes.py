"""Child processes that belong to no job and outlive nobody."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Mapping

# What launchers tell their processes; mpiexec and torch would take it for their own.
_OF_LAUNCHERS = re.compile(
    "(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_|ROLE_|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_|COMMLAYER_"
    "|PMI|MPI_|OMPI_(?!ALLOW_)|PRTE_|HYDI_|HYDRA_|I_MPI_HYDRA|SLURM_|PALS_|PBS_|JSM_|LSB_|LS_JOBPID|FLUX_|CCL_LOCAL_|CCL_PROCESS)"
)
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl


def scrubbed(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a process that no launcher started, with one thread of computation."""
    kept = {name: value for name, value in env.items() if not _OF_LAUNCHERS.match(name)}
    return kept | {"OMP_NUM_THREADS": "1"}


def python(call: str, *arguments: str) -> list[str]:
    """The command that runs ``module:function(*arguments)``, with the module path of this very process."""
    module, _, function = call.partition(":")
    code = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); import {module} as m; m.{function}(*sys.argv[2:])"
    return [sys.executable, "-c", code, json.dumps(sys.path), *arguments]


def die_with_parent(parent: int, sign: int = signal.SIGKILL) -> None:
    """Ask the kernel for a signal when the parent ends, however it ends."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, sign)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def find_mpiexec(env: Mapping[str, str] = os.environ) -> str | None:
    """The mpiexec of the running interpreter's environment, else the PATH's."""
    beside = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    return beside if os.access(beside, os.X_OK) else shutil.which("mpiexec", path=env.get("PATH"))

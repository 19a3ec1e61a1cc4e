"""Who am I: rank, size, local rank and master address, from the launcher that started this process.

A launcher is a row of a table; one piece of code reads every row. Sources: the manuals and the code of
torchrun, Hydra, Open MPI, Slurm, PALS, Cray PMI, jsrun, Flux and PMIx.
"""

from __future__ import annotations

import importlib.util
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from commlayer.errors import LaunchError
from commlayer.hostlist import expand, tasks_per_node


@dataclass(frozen=True)
class Launch:
    """What the launcher says about this process: ranks count from 0, None is what it leaves open.

    ``size`` is None under PALS and bare PMIx, where mpi4py knows it. ``variables`` maps each field to the
    ``VARIABLE=value`` it came from.
    """

    launcher: str
    rank: int
    size: int | None
    local_rank: int | None = None
    local_size: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    variables: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def mpi(self) -> bool:
        """Whether mpi4py can be expected to connect these very processes."""
        return "mpi" in self.variables


@dataclass(frozen=True)
class _Row:
    """The variables of one launcher: names separated by blanks, of which the first that is set counts."""

    rank: str
    size: str  # "": this launcher gives none
    local_rank: str
    local_size: str = ""
    tasks_per_node: str = ""  # tasks of every node, as Slurm writes them, and this node's place among them
    node: str = ""
    nodes: str = ""  # number of nodes, over which the ranks are spread evenly
    hosts: str = ""  # host list or file whose first host has rank 0
    job: str = ""  # the same on every rank and, together with step, in no other program that runs
    step: str = ""
    mpi: str = ""  # any of these shows that MPI finds its peers
    needs: str = ""  # unless one of these is set too, it was not this launcher
    same: str = ""  # launchers which, if seen as well, tell of the same start: they must agree, and fill gaps
    child: str = ""  # if set, this launcher itself is a task of any other, and nothing is compared


_SLURM_HOSTS = "SLURM_STEP_NODELIST SLURM_JOB_NODELIST SLURM_NODELIST"
_SLURM_STEP = "SLURM_STEP_ID SLURM_STEPID"

# In order of precedence: what may run inside another stands before it.
#
# Which are compared: those that tell of the same start of the same processes. Hydra and Open MPI are not
# compared with Slurm, PALS, Cray PMI or Flux, because mpiexec may be called in a shell that is a task of
# those (salloc, srun --pty, an sbatch script), and nor is Flux with Slurm, PALS or jsrun, whose tasks its
# brokers are: the inner one counts.
#
# Which have hosts: those that put rank 0 on the first host and show every rank the same list. mpiexec may do
# neither (-hosts b,a; Open MPI's daemons are a Slurm step without the first node): there MPI answers. Hydra
# has no job either: two mpiexec side by side in one allocation must not meet at the port made from its id.
_ROWS: dict[str, _Row] = {
    # RANK and WORLD_SIZE exported by a script tell of the process that some launcher started, and must agree
    # with it: a stale WORLD_SIZE=1 would split the job in silence. torchrun itself marks its children.
    "torchrun": _Row(
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
        same="hydra flux jsrun openmpi cray-pmi slurm pals pmi pmix", child="TORCHELASTIC_RUN_ID",
    ),
    # PMI_RANK is set by Slurm, Flux and Cray as well, MPI_LOCALRANKID by Hydra alone.
    "hydra": _Row(
        "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
        mpi="PMI_RANK", needs="MPI_LOCALRANKID", same="openmpi",
    ),
    "flux": _Row(
        "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", nodes="FLUX_JOB_NNODES",
        job="FLUX_JOB_ID", mpi="PMI_FD PMI_RANK", same="openmpi pmi",
    ),
    # jsrun sets the variables of Open MPI and PMIx too.
    "jsrun": _Row(
        "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE",
        hosts="LSB_DJOB_RANKFILE", job="LSB_JOBID", step="PMIX_NAMESPACE", mpi="JSM_NAMESPACE_RANK",
        same="openmpi pmix",
    ),
    # Over ssh, mpirun does not forward the batch system's variables: its own namespace names the job.
    "openmpi": _Row(
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
        job="PMIX_NAMESPACE", mpi="OMPI_COMM_WORLD_RANK", same="pmix",
    ),
    # Under Slurm, which then sets PALS_RANKID too, or under PALS, where PMI_SIZE may be missing.
    "cray-pmi": _Row(
        "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE",
        hosts=f"{_SLURM_HOSTS} PBS_NODEFILE", job="PALS_APID SLURM_JOB_ID PBS_JOBID", step=_SLURM_STEP,
        mpi="PMI_RANK", needs="PMI_LOCAL_RANK", same="slurm pals pmix",
    ),
    # A batch script or salloc shell is one process, although it has SLURM_PROCID=0 and SLURM_NTASKS=8: only
    # srun makes a step, and the step's own count is the true one.
    "slurm": _Row(
        "SLURM_PROCID", "SLURM_STEP_NUM_TASKS SLURM_NTASKS", "SLURM_LOCALID",
        tasks_per_node="SLURM_STEP_TASKS_PER_NODE SLURM_TASKS_PER_NODE", node="SLURM_NODEID",
        hosts=_SLURM_HOSTS, job="SLURM_JOB_ID SLURM_JOBID", step=_SLURM_STEP,
        mpi="SLURM_MPI_TYPE PMI_FD PMI_RANK PMIX_RANK",
        needs=f"{_SLURM_STEP} SLURM_STEP_NUM_TASKS", same="pals pmi pmix",
    ),
    "pals": _Row(
        "PALS_RANKID", "", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE",
        hosts="PBS_NODEFILE", job="PALS_APID PBS_JOBID", mpi="PALS_RANKID", same="pmi pmix",
    ),
    # The bare protocols (mpiexec.gforker, other PMI and PMIx servers) say nothing of nodes; a user may.
    "pmi": _Row("PMI_RANK", "PMI_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", mpi="PMI_RANK", same="pmix"),
    "pmix": _Row("PMIX_RANK", "", "LOCAL_RANK", "LOCAL_WORLD_SIZE", job="PMIX_NAMESPACE", mpi="PMIX_RANK"),
}  # fmt: skip

LAUNCHERS = (*_ROWS, "none")
"""The names ``COMMLAYER_LAUNCHER`` may take, in order of precedence."""

# The line to take. LSF's first is the batch host or, where there is none, one slot more of the first host.
_NODE_FILES = {"PBS_NODEFILE": 0, "LSB_DJOB_RANKFILE": 1}
_NODE_FILE_SIZE = 1 << 16  # characters that are read: enough for the first lines
_PORTS = range(20000, 32768)  # above, Linux hands them out to any outgoing connection
_MASKS = {
    "cuda": "CUDA_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
}
_NOTHING = {"SLURM_MPI_TYPE": "none"}  # a value that says no more than an empty one
_ORIGINS = {
    "tasks_per_node": "local_size",
    "nodes": "local_size",
    "hosts": "master_addr",
    "job": "master_port",
}
T = TypeVar("T")
_Found = dict[str, str]  # field of a row -> the variable that answers it


def discover(env: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables; where there is no launcher, one process on its own.

    Raises ``LaunchError`` naming the variables that are incomplete, malformed, out of range or contradict
    each other. ``COMMLAYER_LAUNCHER`` (one of ``LAUNCHERS``) decides between launchers.
    """
    forced = env.get("COMMLAYER_LAUNCHER", "")
    name, found = _forced(forced, env) if forced else _match(_ROWS, env)
    if name == "none" and not forced and env.get("WORLD_SIZE", "") not in ("", "1"):
        raise LaunchError(f"WORLD_SIZE={env['WORLD_SIZE']} is set but RANK is not: set both or neither")
    launch = Launch("none", 0, 1, 0, 1) if name == "none" else _numbers(name, found, env)
    if launch.size is not None and launch.local_size == launch.size:
        found.pop("hosts", None)  # one node needs no name
        launch = replace(launch, master_addr="127.0.0.1")
    user = {"launcher": "COMMLAYER_LAUNCHER", "master_addr": "MASTER_ADDR", "master_port": "MASTER_PORT"}
    found |= {field: variable for field, variable in user.items() if env.get(variable)}
    shown = {_ORIGINS.get(field, field): variable for field, variable in found.items()} | found
    return replace(
        launch,
        master_addr=_master_addr(found, env) or launch.master_addr,
        master_port=_master_port(found, env),
        variables={f: f"{v}={env[v]}" for f, v in shown.items() if f in {*vars(launch), "mpi"}},
    )


def _first_set(names: str, env: Mapping[str, str]) -> str | None:
    return next((name for name in names.split() if env.get(name, "") not in ("", _NOTHING.get(name))), None)


def _read(row: _Row, env: Mapping[str, str]) -> _Found:
    names = {field: names for field, names in vars(row).items() if field != "same"}
    found = {field: variable for field in names if (variable := _first_set(names[field], env))}
    return found if row.size else found | {"sizeless": row.rank}


def _match(rows: Mapping[str, _Row], env: Mapping[str, str]) -> tuple[str, _Found]:
    """The first row that is seen in the environment, once those that must agree with it do."""
    for name, row in rows.items():
        found = _read(row, env)
        if "rank" not in found or (row.needs and "needs" not in found):
            continue
        if "child" not in found:
            other, filling = _match({n: rows[n] for n in rows if n in row.same.split()}, env)
            _check_agreement(name, found, other, filling, env)
            found = filling | found
        return name, found
    return "none", {}


def _forced(name: str, env: Mapping[str, str]) -> tuple[str, _Found]:
    if name == "none":
        return name, {}
    if name not in _ROWS:
        raise LaunchError(f"COMMLAYER_LAUNCHER={name}: unknown; it may be {', '.join(LAUNCHERS)}")
    row = _ROWS[name]
    missing = [names for names in (row.rank, row.size) if names and not _first_set(names, env)]
    if missing:
        raise LaunchError(
            f"COMMLAYER_LAUNCHER={name}, but this launcher's {' and '.join(missing)} are not set: "
            "start the program with it, or unset COMMLAYER_LAUNCHER"
        )
    return name, _read(row, env)


def _check_agreement(name: str, found: _Found, other: str, filling: _Found, env: Mapping[str, str]) -> None:
    for what in ("rank", "size"):
        mine, theirs = found.get(what), filling.get(what)
        if mine and theirs and _int(mine, env) != _int(theirs, env):
            raise LaunchError(
                f"{mine}={env[mine]} ({name}) and {theirs}={env[theirs]} ({other}) disagree on {what}: "
                f"COMMLAYER_LAUNCHER={name} or COMMLAYER_LAUNCHER={other} decides"
            )


def _int(variable: str, env: Mapping[str, str], below: int | None = None) -> int:
    value = env[variable].strip()
    if not (value.isascii() and value.isdigit() and len(value) < 19):
        raise LaunchError(f"{variable}={value!r} is not a number from 0 up")
    if below is not None and int(value) >= below:
        raise LaunchError(f"{variable}={value} is out of range: it must be below {below}")
    return int(value)


def _numbers(name: str, found: _Found, env: Mapping[str, str]) -> Launch:
    if "size" not in found and "sizeless" not in found:
        raise LaunchError(f"{found['rank']}={env[found['rank']]} is set but {_ROWS[name].size} is not")
    size = _int(found["size"], env) if "size" in found else None
    local_size = _local_size(found, size, env)
    rank = _int(found["rank"], env, below=size)
    local_rank = _int(found["local_rank"], env, below=local_size) if "local_rank" in found else None
    return Launch(name, rank, size, local_rank, local_size)


def _parsed(parse: Callable[[str], list[T]], variable: str, env: Mapping[str, str]) -> list[T]:
    try:
        return parse(env[variable])
    except LaunchError as error:
        raise LaunchError(f"{variable}: {error}") from None


def _local_size(found: _Found, size: int | None, env: Mapping[str, str]) -> int | None:
    if "local_size" in found:
        return _int(found["local_size"], env)
    if "tasks_per_node" in found and "node" in found:
        tasks = _parsed(tasks_per_node, found["tasks_per_node"], env)
        return tasks[_int(found["node"], env, below=len(tasks))]
    if "nodes" in found and size is not None:
        local_size, uneven = divmod(size, _int(found["nodes"], env) or 1)
        here = _int(found["local_rank"], env) if "local_rank" in found else 0
        return None if uneven or here >= local_size else local_size
    return None


def _master_addr(found: _Found, env: Mapping[str, str]) -> str | None:
    if "master_addr" in found:
        return env[found["master_addr"]]
    if "hosts" not in found:
        return None
    hosts = found["hosts"]
    if hosts not in _NODE_FILES:
        return _parsed(expand, hosts, env)[0]
    try:
        with open(env[hosts]) as file:
            return file.read(_NODE_FILE_SIZE).split()[_NODE_FILES[hosts]]
    except (OSError, ValueError, IndexError) as error:
        raise LaunchError(
            f"{hosts}={env[hosts]}: no host can be read from this file ({error}); set MASTER_ADDR to the host of rank 0"
        ) from error


def _master_port(found: _Found, env: Mapping[str, str]) -> int | None:
    if "master_port" in found:
        return _int(found["master_port"], env, below=65536)
    if "job" not in found:
        return None
    job = ".".join(env[found[part]] for part in ("job", "step") if part in found)
    return _PORTS[zlib.crc32(os.fsencode(job)) % len(_PORTS)]


def mpi_importable() -> bool:
    return importlib.util.find_spec("mpi4py") is not None


def bind_device(launch: Launch, device_type: str, device_count: int, env: Mapping[str, str] = os.environ) -> int | None:
    """Index of this rank's device among the ``device_count`` visible ones; None on the CPU.

    Raises ``LaunchError`` when the node has more ranks than devices, or the local rank is unknown.
    """
    if device_type == "cpu":
        return None
    if device_type not in _MASKS:
        raise ValueError(f"device_type={device_type!r}: it may be cpu, {', '.join(_MASKS)}")
    if device_count == 1 and _first_set(_MASKS[device_type], env):
        return 0  # the launcher showed each rank a device of its own
    if launch.local_rank is None:
        raise LaunchError(
            f"the launcher {launch.launcher!r} gives no local rank to choose a {device_type} device by: "
            "set LOCAL_RANK and LOCAL_WORLD_SIZE on each rank"
        )
    ranks = launch.local_size or launch.local_rank + 1
    if ranks > device_count:
        raise LaunchError(
            f"{ranks} ranks on this node but {device_count} {device_type} devices are visible: start fewer "
            f"ranks per node, check {_MASKS[device_type].replace(' ', ', ')}, or use the CPU"
        )
    return launch.local_rank

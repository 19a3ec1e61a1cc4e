"""Where this process stands in its job, for libraries that want all of it: what the launcher leaves open, MPI tells."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from typing import Any

from commlayer import rendezvous
from commlayer.errors import LaunchError
from commlayer.launch import Launch, discover, mpi_importable
from commlayer.settings import DEFAULT_TIMEOUT, Settings

# The first that is set counts: what starts the ranks stands before what started that.
_NODE_RANK = ("GROUP_RANK", "SLURM_NODEID", "PALS_NODEID", "NODE_RANK")
_NEEDED = {"size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "master_addr": "MASTER_ADDR", "master_port": "MASTER_PORT"}
_OR_MPI = ", or install mpi4py, which knows"


def complete_launch() -> tuple[Launch, int]:
    """The launch, with size, local rank, master address and port always there, and the rank of the node.

    Collective under MPI's launchers, whose ranks tell each other. Raises ``LaunchError`` where variables contradict
    each other, and where nobody tells.
    """
    launch = discover()
    if launch.size == 1:
        port = launch.master_port or _free_port()
        return replace(launch, local_rank=0, local_size=1, master_addr="127.0.0.1", master_port=port), 0
    if launch.mpi and mpi_importable():
        return _told_by_mpi(launch)
    for field, variable in _NEEDED.items():
        if getattr(launch, field) is None:
            raise LaunchError(f"{launch.launcher} does not tell {variable}: set it on every rank{_OR_MPI}")
    return launch, _node_rank(launch)


def _node_rank(launch: Launch) -> int:
    if launch.rank == launch.local_rank:
        return 0
    found = next((name for name in _NODE_RANK if os.environ.get(name)), None)
    if found is None:
        raise LaunchError(f"{launch.launcher} does not tell which node this is: set NODE_RANK on every rank{_OR_MPI}")
    return int(os.environ[found])


def _told_by_mpi(launch: Launch) -> tuple[Launch, int]:
    """Nodes count in the order of their first ranks."""
    from commlayer.backends import mpi_job

    timeout = Settings.from_env().timeout or DEFAULT_TIMEOUT
    rank, size = mpi_job.place()
    if launch.rank != rank or launch.size not in (None, size):
        raise LaunchError(
            f"MPI says rank {rank} of {size}, but {launch.launcher} says {launch.rank} of {launch.size}: "
            "mpi4py is built for another MPI than the launcher's"
        )

    def exchange(value: list[Any]) -> list[list[Any]]:
        return [json.loads(row) for row in mpi_job.exchange(json.dumps(value).encode(), timeout)]

    hosts = exchange(rendezvous.whereabouts())
    here = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    address, port = exchange([] if rank else [rendezvous.seen_from(hosts), _free_port()])[0]
    told = replace(
        launch,
        size=size,
        local_rank=here.index(rank) if launch.local_rank is None else launch.local_rank,
        local_size=launch.local_size or len(here),
        master_addr=launch.master_addr or address,
        master_port=launch.master_port or port,
    )
    return told, len({tuple(host) for host in hosts[: here[0]]})


def _free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]

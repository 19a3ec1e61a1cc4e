"""How the ranks of ``init_process_group`` find each other where the launcher has no RANK and MASTER_ADDR for torch."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_count = itertools.count()
launch: Any = None  # by which the ranks have met, and with nothing left open
Met = Iterator[tuple[Any, int, int]]


def register() -> None:
    """Serve ``init_method="commlayer://"``, and ``env://`` where it would fail: under mpiexec, srun, PALS, …"""
    dist.register_rendezvous_handler("commlayer", meet)
    module = sys.modules["torch.distributed.rendezvous"]  # whose name in the package is a function's
    handlers = getattr(module, "_rendezvous_handlers", {})  # torch has no public way to complete one
    if "env" in handlers:
        handlers["env"] = _completed(handlers["env"])


def _completed(by_environment: Callable[..., Met]) -> Callable[..., Met]:
    def handler(url: str, **options: Any) -> Met:
        if "RANK" not in os.environ and "rank=" not in url:
            from commlayer.launch import discover

            if discover().launcher != "none":
                return meet(url, **options)
        return by_environment(url, **options)

    return handler


def meet(url: str, timeout: timedelta = dist.default_pg_timeout, **_: Any) -> Met:
    """Store, rank and size, from the launcher that started this process; one process alone without any."""
    from commlayer import rendezvous
    from commlayer.launch import discover

    global launch
    launch = discover()
    rank, size = launch.rank, launch.size
    if size is None:
        from commlayer.backends import mpi_job

        rank, size = mpi_job.place()
        launch = replace(launch, rank=rank, size=size)
    if size == 1:
        yield dist.HashStore(), 0, 1
    else:
        seconds = timeout.total_seconds()
        client = rendezvous.join(launch, rank, size, seconds, by_mpi=False)
        store = rendezvous.native_store(client, launch, size, seconds)
        # The same store serves a program that starts torch.distributed again.
        yield dist.PrefixStore(f"init_process_group/{next(_count)}", store), rank, size
    raise RuntimeError("ranks that met cannot meet again: the number of ranks is fixed")

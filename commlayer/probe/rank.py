"""A rank of the prober: a child process that runs what it is asked to, and tells of it as it goes."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from commlayer.backends.base import Communicator
from commlayer.capability import Request
from commlayer.probe.cache import Identity
from commlayer.probe.checks import Verdict, check
from commlayer.probe.processes import die_with_parent

# Kept well above every deadline: the keeper alone decides what hangs.
TIMEOUT = 600.0


def serve(link: Connection, connect: Callable[[], Communicator]) -> None:
    """Answer one request after the other: each size as it begins, then the verdict, None where all is well."""
    torch.set_num_threads(1)
    try:
        comm = connect()
    except Exception as error:  # whatever a backend raises is its answer
        link.send(("failed", _first_line(error)))
        return
    link.send(("ready", Identity.of(comm)))
    while True:
        try:
            request, sizes = link.recv()
        except EOFError:
            return
        link.send(("verdict", _verdict(comm, request, sizes, link.send)))


def _verdict(
    comm: Communicator, request: Request, sizes: tuple[int, ...], tell: Callable[[Any], None]
) -> Verdict | None:
    for size in sizes:
        tell(("at", size))
        try:
            problem = check(comm, request, size)
        except Exception as error:  # whatever a backend raises is its answer
            if isinstance(error, KeyError) and error.args[0] in (request.dtype, request.reduce):
                # The layer's own tables of datatypes and operations: nothing was sent.
                return Verdict("absent", "has no such datatype or operation")
            problem = Verdict("error", _first_line(error))
        if problem is not None:
            return problem._replace(what=f"at {counted(size)}: {problem.what}")
    return None


def counted(size: int) -> str:
    return f"{size} element{'s' * (size != 1)}"


def _first_line(error: Exception) -> str:
    """Without what differs from run to run: ranks, addresses, ports, source lines."""
    text = (str(error).splitlines() or [""])[0]
    text = re.sub(r"^[\w ]+ on rank \d+ of \d+: |\[[^\]\s]*:\d+\] ?|0x[0-9a-f]+|\s*\[[\d.:a-f]+\]:\d+", "", text)
    kind = type(error).__name__
    return f"{kind}: {printable(text)}"


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:200]


def main(path: str) -> None:
    """A rank that mpiexec started; the keeper listens at the socket ``path``."""
    die_with_parent(os.getppid())
    end = socket.socket(socket.AF_UNIX)
    end.connect(path)
    link = Connection(end.detach())
    from commlayer.backends import mpi

    serve(link, lambda: mpi.world(TIMEOUT))
    sys.stdout.flush()
    os._exit(0)  # MPI_Finalize would wait for the others

"""The MPI job around the communicators: what its processes tell each other before there are any, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from commlayer.backends.mpi_requests import MPI, finish

ABORT = 3  # seconds that MPI_Abort may take


def exchange(value: bytes, timeout: float) -> list[bytes]:
    """Every process' bytes, before there is a communicator. Raises CommTimeout."""
    world = MPI.COMM_WORLD
    mine, sizes = np.array([len(value)]), np.empty(world.size, dtype=int)
    finish(world.Iallgather(mine, sizes), timeout, mine, sizes)
    unlink_segments()
    row, rows = np.frombuffer(value, dtype=np.uint8), np.empty(sizes.sum(), dtype=np.uint8)
    finish(world.Iallgatherv(row, (rows, sizes)), timeout, row, rows)
    return [part.tobytes() for part in np.split(rows, np.cumsum(sizes)[:-1])]


def unlink_segments() -> None:
    """Take MPICH's shared memory off the file system, once every process has it mapped.

    Else a job that does not end in MPI_Finalize leaves it in /dev/shm for ever.
    """
    with suppress(OSError), open("/proc/self/maps") as maps:
        for path in {line.split(maxsplit=5)[-1].strip() for line in maps if "/dev/shm/mpich_shm_" in line}:
            with suppress(OSError):  # another rank of this host was first
                os.unlink(path)


def end(broken: Callable[[], bool], everybody_gone: Callable[[], bool], linger: float) -> None:
    """Before MPI_Finalize, at the exit of a rank: wait until every other rank is here too, or lost.

    In MPI_Finalize itself a rank would not learn that another has died. Where something is ``broken`` the job is
    aborted instead, as soon as the others have had ``linger`` seconds to say what they have to say.
    """
    if not MPI.Is_initialized() or MPI.Is_finalized() or MPI.COMM_WORLD.size == 1:
        return
    ends = time.monotonic() + linger
    while not everybody_gone() and not (broken() and time.monotonic() > ends):
        MPI.COMM_WORLD.Iprobe()  # lets messages of this rank that are still under way go on
        time.sleep(0.005)
    if broken():
        sys.stdout.flush()
        sys.stderr.flush()
        # It asks the launcher, which cannot answer where a link is cut. (No thread can be started at exit.)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(ABORT)
        MPI.COMM_WORLD.Abort(1)


def place() -> tuple[int, int]:
    """(rank, size), for launchers that do not say."""
    return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size

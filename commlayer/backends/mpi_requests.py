"""Requests of MPI, waited for with a deadline and without spinning other ranks off their core."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import torch

from commlayer.errors import BackendUnavailable, CollectiveMismatch, CommError, CommTimeout
from commlayer.work import Work

try:
    from mpi4py import MPI
except ImportError as error:  # also raised when mpi4py finds no MPI library
    raise BackendUnavailable(
        f"backend mpi: mpi4py cannot be imported ({error}); pip install 'commlayer[mpi]' brings it with MPICH, "
        "on a cluster build it against the site's MPI: pip install --no-binary mpi4py mpi4py"
    ) from error

# A sleep this short lasts about 60 microseconds on Linux (the timer's slack), and grows to the longest.
_SHORTEST_SLEEP, _LONGEST_SLEEP = 1e-6, 1e-4


class Pending(Work):
    """An MPI request. It holds the tensors, since MPI reads and writes them until it is complete."""

    __slots__ = ("_comm", "_finished", "_request", "_tensors", "_test", "_what")

    def __init__(self, comm: Any, request: Any, what: str, *tensors: torch.Tensor | None) -> None:
        self.result = None
        self._comm = comm
        self._request = request
        self._test = request.Test
        self._what = what
        self._tensors: tuple[torch.Tensor | None, ...] = tensors
        self._finished = False

    def done(self) -> bool:
        if not self._finished:
            try:
                if self._test():
                    self._finish()
            except MPI.Exception as error:
                raise translate(error, self._what) from error
        return self._finished

    def wait(self, timeout: float | None = None) -> Any:
        if not self._finished:
            try:
                if not self._test():
                    self._poll(self._comm.limit(timeout))
            except MPI.Exception as error:
                raise translate(error, self._what) from error
            self._finish()
        return self.result

    def _finish(self) -> None:
        self._finished, self._tensors = True, ()

    def _poll(self, timeout: float) -> None:
        # Spin first, since most requests end within microseconds; then sleep between tests, since a
        # spinning rank keeps the very peer it waits for off the core. sched_yield would not help: launchers
        # give each rank its own session, and the kernel schedules sessions against each other.
        test, now = self._test, time.perf_counter
        start = now()
        spin_end = start + self._comm.spin
        while now() < spin_end:
            if test():
                return
        pause = _SHORTEST_SLEEP
        while not test():
            late = now() - start > timeout
            if late or self._comm.failure is not None:
                abandoned.append(self)
                raise self._comm.failure or CommTimeout(
                    f"{self._what} on rank {self._comm.rank} of {self._comm.size}: not finished after {timeout:g} s"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_SLEEP)

    def __del__(self) -> None:
        # Dropped without wait(): MPI may still write into the tensors, so they stay alive with the request.
        if not getattr(self, "_finished", True) and not MPI.Is_finalized():
            with _reaping:
                reap()
                if not self._request.Test():
                    abandoned.append((self._request, self._tensors))


class Received(Pending):
    """A receive, which also sees to it that as much has come as was expected."""

    __slots__ = ("_expected", "_status")

    def __init__(self, comm: Any, request: Any, x: torch.Tensor) -> None:
        super().__init__(comm, request, "recv", x)
        self._status = status = MPI.Status()
        self._expected = x.nbytes
        self._test = lambda: request.Test(status)

    @property
    def source(self) -> int:
        """The rank that sent it, once it is complete."""
        return self._status.Get_source()

    def _finish(self) -> None:
        super()._finish()
        got = self._status.Get_count(MPI.BYTE)
        if got != self._expected:
            raise CollectiveMismatch(f"recv: expected {self._expected} bytes, rank {self.source} sent {got}")


def translate(error: MPI.Exception, what: str) -> CommError:
    """The error of the layer's own tree that says the same as MPI's."""
    kind = CollectiveMismatch if error.Get_error_class() == MPI.ERR_TRUNCATE else CommError
    return kind(f"{what}: {error}")


abandoned: list[Any] = []


_reaping = threading.RLock()  # a garbage collector may drop requests in any thread


def reap() -> None:
    """Let go of requests that were dropped unfinished and have finished since."""
    with _reaping:
        abandoned[:] = [entry for entry in abandoned if isinstance(entry, Pending) or not entry[0].Test()]


def finish(request: Any, timeout: float, *buffers: Any) -> None:
    end = time.monotonic() + timeout
    while not request.Test():
        if time.monotonic() > end:
            abandoned.append((request, buffers))
            raise CommTimeout(f"backend mpi: not every process has come to init within {timeout:g} s")
        time.sleep(_LONGEST_SLEEP)


def in_time(call: Callable[[], Any], timeout: float) -> Any:
    """The value of a blocking call. Raises CommTimeout; the thread that is inside it then stays there."""
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        return call()
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="commlayer-mpi", daemon=True).start()
    try:
        return future.result(timeout)
    except FutureTimeout:
        raise CommTimeout(f"making a communicator: not finished after {timeout:g} s") from None

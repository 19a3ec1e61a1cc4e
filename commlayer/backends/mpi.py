"""MPI through mpi4py, with no copy of CPU tensors.

Every request is nonblocking inside: blocking and nonblocking collectives may not match each other across
ranks (MPI 4.1, section 6.12), and only a request that is tested can have a deadline.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import Any

import torch

from commlayer.arithmetic import premultiplied
from commlayer.backends.base import INTERNAL_TAG, Closed, Communicator, Counts, Message, messages_to_all, offsets
from commlayer.control.seat import Seat
from commlayer.errors import BackendUnavailable, CollectiveMismatch, CommError, CommTimeout
from commlayer.reduce_op import ReduceOp
from commlayer.work import Work, gather_works

try:
    from mpi4py import MPI
except ImportError as error:  # also raised when mpi4py finds no MPI library
    raise BackendUnavailable(
        f"backend mpi: mpi4py cannot be imported ({error}); pip install 'commlayer[mpi]' brings it with MPICH, "
        "on a cluster build it against the site's MPI: pip install --no-binary mpi4py mpi4py"
    ) from error

# What MPI has a datatype for. bfloat16 is a null datatype, which aborts the process when it is passed; bool
# knows logical operations only. Both are absent from the capability set, so the planner lowers them.
DATATYPES = {
    torch.uint8: MPI.UINT8_T,
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint16: MPI.UINT16_T,
    torch.uint32: MPI.UINT32_T,
    torch.uint64: MPI.UINT64_T,
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
}
OPERATIONS = {
    "sum": MPI.SUM,
    "product": MPI.PROD,
    "min": MPI.MIN,
    "max": MPI.MAX,
    "band": MPI.BAND,
    "bor": MPI.BOR,
    "bxor": MPI.BXOR,
}

# On the duplicate communicator, above the layer's own tags. MPI promises tags up to 32767 only, but every
# implementation of today has at least 2**20.
CONTROL_TAG = 1 << 17

_address = MPI.buffer.fromaddress

ABORT = 3  # seconds that MPI_Abort may take

# A sleep this short lasts about 60 microseconds on Linux (the timer's slack), and grows to the longest.
_SHORTEST_SLEEP, _LONGEST_SLEEP = 1e-6, 1e-4


class Pending(Work):
    """An MPI request. It holds the tensors, since MPI reads and writes them until it is complete."""

    __slots__ = ("_comm", "_finished", "_request", "_tensors", "_test", "_what")

    def __init__(self, comm: MpiCommunicator, request: Any, what: str, *tensors: torch.Tensor | None) -> None:
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
                _abandoned.append(self)
                raise self._comm.failure or CommTimeout(
                    f"{self._what} on rank {self._comm.rank} of {self._comm.size}: not finished after {timeout:g} s"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_SLEEP)

    def __del__(self) -> None:
        # Dropped without wait(): MPI may still write into the tensors, so they stay alive with the request.
        if not getattr(self, "_finished", True) and not MPI.Is_finalized():
            with _reaping:
                _reap()
                if not self._request.Test():
                    _abandoned.append((self._request, self._tensors))


class Received(Pending):
    """A receive, which also sees to it that as much has come as was expected."""

    __slots__ = ("_expected", "_status")

    def __init__(self, comm: MpiCommunicator, request: Any, x: torch.Tensor) -> None:
        super().__init__(comm, request, "recv", x)
        self._status = status = MPI.Status()
        self._expected = x.nbytes
        self._test = lambda: request.Test(status)

    def _finish(self) -> None:
        super()._finish()
        got = self._status.Get_count(MPI.BYTE)
        if got != self._expected:
            source = self._status.Get_source()
            raise CollectiveMismatch(f"recv: expected {self._expected} bytes, rank {source} sent {got}")


def translate(error: MPI.Exception, what: str) -> CommError:
    """The error of the layer's own tree that says the same as MPI's."""
    kind = CollectiveMismatch if error.Get_error_class() == MPI.ERR_TRUNCATE else CommError
    return kind(f"{what}: {error}")


_abandoned: list[Any] = []


class MpiCommunicator(Communicator):
    """Ranks of an MPI communicator. The layer's own messages travel on a duplicate, apart from users'."""

    name = "mpi"
    device = torch.device("cpu")

    def __init__(self, comm: MPI.Intracomm, timeout: float, spin: float | None = None) -> None:
        self._comm: Any = comm
        self._own: Any = _duplicate(comm, timeout)
        self.rank = comm.rank
        self.size = comm.size
        self.timeout = timeout
        self.spin = _in_time(lambda: _spin(comm), timeout) if spin is None else spin

    def version(self) -> str:
        return " ".join(MPI.Get_library_version().split("\n")[0].strip("\0 ").split())

    def all_reduce(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp) -> Work:
        datatype, count = DATATYPES[x.dtype], x.numel()
        target = out.data_ptr()
        scaled = x if op.factor is None else premultiplied(x, op)
        source = scaled.data_ptr()
        send = MPI.IN_PLACE if source == target else (_address(source, x.nbytes), count, datatype)
        receive = (_address(target, out.nbytes), count, datatype)
        request = self._comm.Iallreduce(send, receive, OPERATIONS[op.name])
        return Pending(self, request, "all_reduce", out, scaled)

    def reduce(self, out: torch.Tensor | None, x: torch.Tensor, op: ReduceOp, dst: int) -> Work:
        receive = None if out is None else _buffer(out)
        return Pending(self, self._comm.Ireduce(_buffer(x), receive, OPERATIONS[op.name], dst), "reduce", out, x)

    def broadcast(self, x: torch.Tensor, src: int) -> Work:
        return Pending(self, self._comm.Ibcast(_buffer(x), src), "broadcast", x)

    def all_gather(self, out: torch.Tensor, x: torch.Tensor, counts: Counts) -> Work:
        if counts is None:
            request = self._comm.Iallgather(_buffer(x), self._even(out))
        else:
            request = self._comm.Iallgatherv(_buffer(x), _shares(out, counts))
        return Pending(self, request, "all_gather", out, x)

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp, counts: Counts) -> Work:
        operation = OPERATIONS[op.name]
        if counts is None:
            request = self._comm.Ireduce_scatter_block(self._even(x), _buffer(out), operation)
        else:
            request = self._comm.Ireduce_scatter(_buffer(x), _buffer(out), list(counts), operation)
        return Pending(self, request, "reduce_scatter", out, x)

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor, out_counts: Counts, in_counts: Counts) -> Work:
        if in_counts is None or out_counts is None:
            return Pending(self, self._comm.Ialltoall(self._even(x), self._even(out)), "all_to_all", out, x)
        # Messages rather than Ialltoallv: from 256 KiB up they take a half to a twentieth of its time on MPICH, most
        # under skew, and below that cost 20 microseconds more.
        return self.exchange(*messages_to_all(self, out, x, out_counts, in_counts), INTERNAL_TAG)

    def gather(self, out: torch.Tensor | None, x: torch.Tensor, dst: int, counts: Counts) -> Work:
        if counts is None:
            request = self._comm.Igather(_buffer(x), None if out is None else self._even(out), dst)
        else:
            request = self._comm.Igatherv(_buffer(x), None if out is None else _shares(out, counts), dst)
        return Pending(self, request, "gather", out, x)

    def scatter(self, out: torch.Tensor, x: torch.Tensor | None, src: int, counts: Counts) -> Work:
        if counts is None:
            request = self._comm.Iscatter(None if x is None else self._even(x), _buffer(out), src)
        else:
            request = self._comm.Iscatterv(None if x is None else _shares(x, counts), _buffer(out), src)
        return Pending(self, request, "scatter", out, x)

    def send(self, x: torch.Tensor, dst: int, tag: int) -> Work:
        comm, tag = self._channel(tag)
        return Pending(self, comm.Isend(_buffer(x), dst, tag), "send", x)

    def recv(self, x: torch.Tensor, src: int, tag: int) -> Work:
        comm, tag = self._channel(tag)
        return Received(self, comm.Irecv(_buffer(x), src, tag), x)

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], tag: int) -> Work:
        works = [self.recv(x, src, tag) for x, src in recvs]
        works += [self.send(x, dst, tag) for x, dst in sends]
        return gather_works(works)

    def post(self, x: torch.Tensor, dst: int, tag: int) -> Work:
        # MPI is its own control channel: the duplicate communicator, with tags of its own, as plain bytes.
        return Pending(self, self._own.Isend(_bytes(x), dst, CONTROL_TAG + tag), "post", x)

    def fetch(self, x: torch.Tensor, src: int, tag: int) -> Work:
        return Pending(self, self._own.Irecv(_bytes(x), src, CONTROL_TAG + tag), "fetch", x)

    def barrier(self) -> Work:
        return Pending(self, self._comm.Ibarrier(), "barrier")

    def subgroup(self, ranks: Sequence[int], seat: Seat) -> MpiCommunicator:
        group = self._comm.Get_group().Incl(list(ranks))
        try:
            comm = _in_time(lambda: self._comm.Create_group(group, tag=0), self.timeout)
            made = MpiCommunicator(comm, self.timeout, self.spin)
            made.seat = seat
            return made
        except MPI.Exception as error:
            raise translate(error, f"making a group of {len(ranks)} ranks") from error
        finally:
            group.Free()

    def progress(self) -> None:
        MPI.COMM_WORLD.Iprobe()

    def _even(self, x: torch.Tensor) -> tuple[Any, int, Any]:
        # For mpi4py, the count of a buffer with a share for every rank is that of one share.
        return _address(x.data_ptr(), x.nbytes), x.numel() // self.size, DATATYPES[x.dtype]

    def _channel(self, tag: int) -> tuple[Any, int]:
        return (self._comm, tag) if tag < INTERNAL_TAG else (self._own, tag - INTERNAL_TAG)

    def close(self, end: float = 0.0) -> None:
        comms, self._comm, self._own = (self._comm, self._own), Closed(), Closed()
        _reap()
        if not MPI.Is_finalized() and not _abandoned:
            for comm in comms:
                comm.Free()


_reaping = threading.RLock()  # a garbage collector may drop requests in any thread


def _reap() -> None:
    """Let go of requests that were dropped unfinished and have finished since."""
    with _reaping:
        _abandoned[:] = [entry for entry in _abandoned if isinstance(entry, Pending) or not entry[0].Test()]


def _spin(comm: MPI.Intracomm) -> float:
    """Seconds to spin in a wait: little where this host has more ranks than cores."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    cores = set().union(*node.allgather(os.sched_getaffinity(0)))
    spin = 1e-3 if node.size <= len(cores) else 20e-6
    node.Free()
    return spin


def world(timeout: float) -> MpiCommunicator:
    """All ranks the MPI launcher started, on a communicator of the layer's own."""
    return _translated(lambda: MpiCommunicator(_duplicate(MPI.COMM_WORLD, timeout), timeout))


def _in_time(call: Callable[[], Any], timeout: float) -> Any:
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


def _duplicate(comm: MPI.Intracomm, timeout: float) -> MPI.Intracomm:
    duplicate, request = comm.Idup()
    _finish(request, timeout)
    return duplicate


def exchange(value: bytes, timeout: float) -> list[bytes]:
    """Every process' bytes, before there is a communicator. Raises CommTimeout."""
    world = MPI.COMM_WORLD
    row = torch.frombuffer(bytearray(value or b"\0"), dtype=torch.uint8)
    sizes = torch.empty(world.size, dtype=torch.int64, device="cpu")
    sizes[world.rank] = len(value)
    everyone = (_address(sizes.data_ptr(), sizes.nbytes), 1, MPI.INT64_T)
    _finish(world.Iallgather(MPI.IN_PLACE, everyone), timeout, sizes)
    _unlink_segments()
    counts = [max(size, 1) for size in sizes.tolist()]
    rows = torch.empty(sum(counts), dtype=torch.uint8, device="cpu")
    _finish(world.Iallgatherv(_buffer(row), _shares(rows, counts)), timeout, row, rows)
    return [part.numpy().tobytes()[:size] for part, size in zip(rows.split(counts), sizes.tolist(), strict=True)]


def _unlink_segments() -> None:
    """Take MPICH's shared memory off the file system, once every process has it mapped.

    Else a job that does not end in MPI_Finalize leaves it in /dev/shm for ever.
    """
    with suppress(OSError), open("/proc/self/maps") as maps:
        for path in {line.split(maxsplit=5)[-1].strip() for line in maps if "/dev/shm/mpich_shm_" in line}:
            with suppress(OSError):  # another rank of this host was first
                os.unlink(path)


def _finish(request: Any, timeout: float, *tensors: torch.Tensor) -> None:
    end = time.monotonic() + timeout
    while not request.Test():
        if time.monotonic() > end:
            _abandoned.append((request, tensors))
            raise CommTimeout(f"backend mpi: not every process has come to init within {timeout:g} s")
        time.sleep(_LONGEST_SLEEP)


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


def _translated(action: Callable[[], MpiCommunicator]) -> MpiCommunicator:
    try:
        return action()
    except MPI.Exception as error:
        raise CommError(f"backend mpi: {error}") from error


def _buffer(x: torch.Tensor) -> tuple[Any, int, Any]:
    return _address(x.data_ptr(), x.nbytes), x.numel(), DATATYPES[x.dtype]


def _bytes(x: torch.Tensor) -> tuple[Any, int, Any]:
    return _address(x.data_ptr(), x.nbytes), x.nbytes, MPI.BYTE


def _shares(x: torch.Tensor, counts: Sequence[int]) -> tuple[Any, Any, Any]:
    place = (list(counts), offsets(counts)[:-1])
    return _address(x.data_ptr(), x.nbytes), place, DATATYPES[x.dtype]

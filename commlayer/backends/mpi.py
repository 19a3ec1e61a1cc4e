"""MPI through mpi4py, with no copy of CPU tensors.

Every request is nonblocking inside: blocking and nonblocking collectives may not match each other across
ranks (MPI 4.1, section 6.12), and only a request that is tested can have a deadline.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from commlayer.arithmetic import SIGNED_OF_WIDTH, premultiplied
from commlayer.backends.base import INTERNAL_TAG, Closed, Communicator, Counts, Message, messages_to_all, offsets
from commlayer.backends.mpi_job import unlink_segments
from commlayer.backends.mpi_requests import MPI, Pending, Received, abandoned, finish, in_time, reap, translate
from commlayer.control.seat import Seat
from commlayer.errors import CommError
from commlayer.reduce_op import ReduceOp
from commlayer.work import Work, gather_works

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


class MpiCommunicator(Communicator):
    """Ranks of an MPI communicator. The layer's own messages travel on a duplicate, apart from users'."""

    name = "mpi"
    uneven_apart = True
    device = torch.device("cpu")

    def __init__(self, comm: MPI.Intracomm, timeout: float, spin: float | None = None) -> None:
        self._comm: Any = comm
        self._own: Any = _duplicate(comm, timeout)
        self.rank = comm.rank
        self.size = comm.size
        self.timeout = timeout
        self.threads = MPI.Query_thread() >= MPI.THREAD_MULTIPLE
        self.spin = in_time(lambda: _spin(comm), timeout) if spin is None else spin

    def version(self) -> str:
        return " ".join(MPI.Get_library_version().split("\n")[0].strip("\0 ").split())

    def all_reduce(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp) -> Work:
        scaled = x if op.factor is None else premultiplied(x, op)
        source, target, size, dtype = scaled.data_ptr(), out.data_ptr(), x.nbytes, x.dtype
        send = MPI.IN_PLACE if source == target else _place(source, size, dtype)
        request = self._comm.Iallreduce(send, _place(target, size, dtype), OPERATIONS[op.name])
        return Pending(self, request, "all_reduce", out, scaled)

    def reduce(self, out: torch.Tensor | None, x: torch.Tensor, op: ReduceOp, dst: int) -> Work:
        receive = None if out is None else _buffer(out)
        return Pending(self, self._comm.Ireduce(_buffer(x), receive, OPERATIONS[op.name], dst), "reduce", out, x)

    def broadcast(self, x: torch.Tensor, src: int) -> Work:
        return Pending(self, self._comm.Ibcast(_buffer(x), src), "broadcast", x)

    def all_gather(self, out: torch.Tensor, x: torch.Tensor, counts: Counts) -> Work:
        if counts is None:
            own = out.data_ptr() + self.rank * x.nbytes
            send = MPI.IN_PLACE if x.nbytes and x.data_ptr() == own else _buffer(x)
            request = self._comm.Iallgather(send, self._even(out))
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

    def recv_any(self, x: torch.Tensor, tag: int) -> Received:
        if x.dtype not in DATATYPES:
            x = x.view(torch.uint8 if x.itemsize == 1 else SIGNED_OF_WIDTH[x.itemsize])  # as the planner has it sent
        return Received(self, self._comm.Irecv(_buffer(x), MPI.ANY_SOURCE, tag), x)

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
            # The tag tells it from another of the same ranks that another thread makes at the same time.
            tag = zlib.crc32(seat.label.encode()) % INTERNAL_TAG
            comm = in_time(lambda: self._comm.Create_group(group, tag=tag), self.timeout)
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
        reap()
        if not MPI.Is_finalized() and not abandoned:
            for comm in comms:
                comm.Free()


def _spin(comm: MPI.Intracomm) -> float:
    """Seconds to spin in a wait: little where this host has more ranks than cores."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    cores = set().union(*node.allgather(os.sched_getaffinity(0)))
    spin = 1e-3 if node.size <= len(cores) else 20e-6
    node.Free()
    return spin


def world(timeout: float) -> MpiCommunicator:
    """All ranks the MPI launcher started, on a communicator of the layer's own."""
    made = _translated(lambda: MpiCommunicator(_duplicate(MPI.COMM_WORLD, timeout), timeout))
    unlink_segments()
    return made


def _duplicate(comm: MPI.Intracomm, timeout: float) -> MPI.Intracomm:
    duplicate, request = comm.Idup()
    finish(request, timeout)
    return duplicate


def _translated(action: Callable[[], MpiCommunicator]) -> MpiCommunicator:
    try:
        return action()
    except MPI.Exception as error:
        raise CommError(f"backend mpi: {error}") from error


def _buffer(x: torch.Tensor) -> tuple[Any, int, Any]:
    return _place(x.data_ptr(), x.nbytes, x.dtype)


@lru_cache(maxsize=1024)  # programs reduce the same buffers again and again; this holds none of them alive
def _place(address: int, size: int, dtype: torch.dtype) -> tuple[Any, int, Any]:
    return _address(address, size), size // dtype.itemsize, DATATYPES[dtype]


def _bytes(x: torch.Tensor) -> tuple[Any, int, Any]:
    return _address(x.data_ptr(), x.nbytes), x.nbytes, MPI.BYTE


def _shares(x: torch.Tensor, counts: Sequence[int]) -> tuple[Any, Any, Any]:
    place = (list(counts), offsets(counts)[:-1])
    return _address(x.data_ptr(), x.nbytes), place, DATATYPES[x.dtype]

"""How each library spells an operation: tables of functions that make what is timed, from a case and its tensors.

Every implementation that has a form in place uses it (all_reduce, broadcast), as gradients are reduced; all others
write into a tensor that is there already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import commlayer
from commlayer.backends.torch_native import OPERATIONS as TORCH_OPERATIONS
from commlayer.bench.operations import ROOT, Case
from commlayer.group import Group

Call = Callable[[], object]
Spelling = Callable[[Case, torch.Tensor, torch.Tensor], Call]  # (case, input, output) -> what is timed
Spellings = dict[str, Spelling]

# By their names since torch 2.13, where the old ones warn.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

IN_PLACE = ("all_reduce", "broadcast")  # the output is the input, too


def commlayer_spellings(g: Group) -> Spellings:
    after, before = (g.rank + 1) % g.size, (g.rank - 1) % g.size
    return {
        "all_reduce": lambda c, x, out: lambda: commlayer.all_reduce(out, c.reduce, group=g, out=out),
        "reduce": lambda c, x, out: lambda: commlayer.reduce(x, c.reduce, dst=ROOT, group=g, out=out),
        "broadcast": lambda c, x, out: lambda: commlayer.broadcast(out, src=ROOT, group=g, out=out),
        "all_gather": lambda c, x, out: lambda: commlayer.all_gather(x, group=g, out=out),
        "reduce_scatter": lambda c, x, out: lambda: commlayer.reduce_scatter(x, c.reduce, group=g, out=out),
        "all_to_all": lambda c, x, out: lambda: commlayer.all_to_all(x, group=g, out=out),
        "gather": lambda c, x, out: lambda: commlayer.gather(x, dst=ROOT, group=g, out=out),
        "scatter": lambda c, x, out: lambda: commlayer.scatter(x, src=ROOT, group=g, out=out),
        "sendrecv": lambda c, x, out: lambda: commlayer.sendrecv(x, dst=after, src=before, group=g, out=out),
        "barrier": lambda c, x, out: lambda: commlayer.barrier(group=g),
    }


def torch_spellings(rank: int, size: int) -> Spellings:
    def op(case: Case) -> Any:
        return TORCH_OPERATIONS[case.reduce.name]

    def shares(x: torch.Tensor) -> list[torch.Tensor] | None:
        return list(x.chunk(size)) if rank == ROOT else None

    def gather(c: Case, x: torch.Tensor, out: torch.Tensor) -> Call:
        parts = shares(out)
        return lambda: dist.gather(x, parts, dst=ROOT)

    def scatter(c: Case, x: torch.Tensor, out: torch.Tensor) -> Call:
        parts = shares(x)
        return lambda: dist.scatter(out, parts, src=ROOT)

    def sendrecv(c: Case, x: torch.Tensor, out: torch.Tensor) -> Call:
        def call() -> None:
            for work in (dist.isend(x, (rank + 1) % size), dist.irecv(out, (rank - 1) % size)):
                assert work is not None
                work.wait()

        return call

    return {
        "all_reduce": lambda c, x, out: lambda: dist.all_reduce(out, op(c)),
        "reduce": lambda c, x, out: lambda: dist.reduce(out, ROOT, op(c)),
        "broadcast": lambda c, x, out: lambda: dist.broadcast(out, ROOT),
        "all_gather": lambda c, x, out: lambda: all_gather_single(out, x),
        "reduce_scatter": lambda c, x, out: lambda: reduce_scatter_single(out, x, op(c)),
        "all_to_all": lambda c, x, out: lambda: dist.all_to_all_single(out, x),
        "gather": gather,
        "scatter": scatter,
        "sendrecv": sendrecv,
        "barrier": lambda c, x, out: dist.barrier,
    }


def mpi4py_spellings() -> Spellings:
    """Blocking calls on buffers made beforehand, the fastest that mpi4py has."""
    from commlayer.backends.mpi import DATATYPES, MPI
    from commlayer.backends.mpi import OPERATIONS as MPI_OPERATIONS

    comm = MPI.COMM_WORLD.Dup()
    rank, size = comm.rank, comm.size

    def buffer(x: torch.Tensor, parts: int = 1) -> list[Any]:
        """The datatype where MPI has it, else bytes; of an array with a part for each rank the count is of one."""
        kind = DATATYPES.get(x.dtype)
        count, kind = (x.numel(), kind) if kind is not None else (x.nbytes, MPI.BYTE)
        return [MPI.buffer.fromaddress(x.data_ptr(), x.nbytes), count // parts, kind]

    def op(case: Case) -> Any:
        return MPI_OPERATIONS[case.reduce.name]

    def all_reduce(c: Case, x: torch.Tensor, out: torch.Tensor) -> Call:
        both = buffer(out)
        return lambda: comm.Allreduce(MPI.IN_PLACE, both, op(c))

    def reduce(c: Case, x: torch.Tensor, out: torch.Tensor) -> Call:
        send, receive = buffer(x), buffer(out) if rank == ROOT else None
        return lambda: comm.Reduce(send, receive, op(c), ROOT)

    def broadcast(c: Case, x: torch.Tensor, out: torch.Tensor) -> Call:
        both = buffer(out)
        return lambda: comm.Bcast(both, ROOT)

    def all_gather(c: Case, x: torch.Tensor, out: torch.Tensor) -> Call:
        send, receive = buffer(x), buffer(out, size)
        return lambda: comm.Allgather(send, receive)

    def reduce_scatter(c: Case, x: torch.Tensor, out: torch.Tensor) -> Call:
        send, receive = buffer(x, size), buffer(out)
        return lambda: comm.Reduce_scatter_block(send, receive, op(c))

    def all_to_all(c: Case, x: torch.Tensor, out: torch.Tensor) -> Call:
        send, receive = buffer(x, size), buffer(out, size)
        return lambda: comm.Alltoall(send, receive)

    def gather(c: Case, x: torch.Tensor, out: torch.Tensor) -> Call:
        send, receive = buffer(x), buffer(out, size) if rank == ROOT else None
        return lambda: comm.Gather(send, receive, ROOT)

    def scatter(c: Case, x: torch.Tensor, out: torch.Tensor) -> Call:
        send, receive = buffer(x, size) if rank == ROOT else None, buffer(out)
        return lambda: comm.Scatter(send, receive, ROOT)

    def sendrecv(c: Case, x: torch.Tensor, out: torch.Tensor) -> Call:
        send, receive = buffer(x), buffer(out)
        return lambda: comm.Sendrecv(send, (rank + 1) % size, 0, receive, (rank - 1) % size, 0)

    return {
        "all_reduce": all_reduce,
        "reduce": reduce,
        "broadcast": broadcast,
        "all_gather": all_gather,
        "reduce_scatter": reduce_scatter,
        "all_to_all": all_to_all,
        "gather": gather,
        "scatter": scatter,
        "sendrecv": sendrecv,
        "barrier": lambda c, x, out: comm.Barrier,
    }

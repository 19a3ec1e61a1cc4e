"""The contract of a transport, and of everything that behaves like one.

All of it works on *flat* tensors: one-dimensional, contiguous, on the communicator's device. ``out`` is
written, ``x`` is read and left alone. ``counts`` are elements per rank; None means equal shares.
Every call returns a ``Work`` at once; ranks are group-local.

The planner implements the same protocol on top of a transport, so a fallback cannot tell whether what it
calls is native or emulated in turn.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from commlayer.control.seat import Seat
from commlayer.errors import CommError, UnsupportedOperation
from commlayer.reduce_op import ReduceOp
from commlayer.work import Work

# Tags below belong to users (MPI guarantees no more than 32767); the layer's own messages use those above.
INTERNAL_TAG = 1 << 15

Counts = Sequence[int] | None
Message = tuple[torch.Tensor, int]  # what, and to or from which rank


class Collectives(Protocol):
    """The flat operations."""

    rank: int
    size: int
    device: torch.device

    def all_reduce(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp) -> Work:
        """``out`` may be ``x`` itself, and nothing in between."""

    def reduce(self, out: torch.Tensor | None, x: torch.Tensor, op: ReduceOp, dst: int) -> Work:
        """``out`` is None off ``dst``."""

    def broadcast(self, x: torch.Tensor, src: int) -> Work:
        """In place: ``x`` is read on ``src`` and written elsewhere."""

    def all_gather(self, out: torch.Tensor, x: torch.Tensor, counts: Counts) -> Work:
        """A native one of even shares also takes, as ``x``, this rank's own share of ``out``."""

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp, counts: Counts) -> Work: ...

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor, out_counts: Counts, in_counts: Counts) -> Work:
        """Either both counts are given or neither is."""

    def gather(self, out: torch.Tensor | None, x: torch.Tensor, dst: int, counts: Counts) -> Work:
        """``out`` is None off ``dst``; ``counts`` are known everywhere."""

    def scatter(self, out: torch.Tensor, x: torch.Tensor | None, src: int, counts: Counts) -> Work:
        """``x`` is None off ``src``; ``counts`` are known everywhere."""

    def send(self, x: torch.Tensor, dst: int, tag: int) -> Work: ...

    def recv(self, x: torch.Tensor, src: int, tag: int) -> Work: ...

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], tag: int) -> Work:
        """Messages that may all be under way at once, in either direction, without deadlock."""

    def barrier(self) -> Work: ...

    def post(self, x: torch.Tensor, dst: int, tag: int) -> Work:
        """Send through the control channel: slow, but it exists on every backend."""

    def fetch(self, x: torch.Tensor, src: int, tag: int) -> Work:
        """Receive what ``post`` sent."""


class Communicator(ABC, Collectives):
    """A transport's ordered set of ranks. Subclasses bring what their transport has.

    What a transport lacks stays unimplemented: its capability set says so, and the planner never calls it.
    """

    name: str
    device: torch.device
    rank: int
    size: int
    timeout: float
    deadline: float | None = None  # of the operation in progress, by time.perf_counter()
    synchronous = False  # whether its caller waits for the operation in progress anyway
    failure: CommError | None = None  # why nothing more can happen here
    threads = True  # whether several threads may call it at once
    uneven_apart = (
        False  # whether even and uneven all_to_alls are different things on the wire, so ranks must not mix them
    )
    parts: Sequence[Communicator] = ()  # made for steps of its operations, which fail with it
    seat: Seat | None = None  # at the control channel; None for one rank alone

    def recv_any(self, x: torch.Tensor, tag: int) -> Any:
        """Receive from whichever rank sends first: a Work whose ``source`` says who did."""
        raise UnsupportedOperation(f"recv from any source: backend {self.name} cannot; name the source")

    @abstractmethod
    def subgroup(self, ranks: Sequence[int], seat: Seat) -> Communicator:
        """A communicator of these group-local ranks, in this order; called by its members only, when all are there."""

    def share(self, value: bytes) -> list[bytes]:
        """Every rank's value, through the control channel."""
        return [value] if self.seat is None else self.seat.share(value, self.timeout)

    def limit_to(self, timeout: float) -> None:
        """Give operations another time than the communicator that this one was made from."""
        self.timeout = timeout

    def limit(self, timeout: float | None) -> float:
        """Seconds that a wait may take from now; a millisecond at the least, for torch takes less for no limit."""
        if timeout is None:
            deadline = self.deadline  # which another thread may take away
            timeout = self.timeout if deadline is None else deadline - time.perf_counter()
        return max(timeout, 1e-3)

    def progress(self) -> None:
        """Let messages under way move on, where that takes calls (MPI)."""
        return None

    def fail(self, error: CommError) -> None:
        """Give up, from any thread: whoever waits here is woken with an error. Does not block."""
        self.failure = error

    def translated(self, error: RuntimeError, what: str) -> CommError:
        """The error of the layer's own tree that says the same as the transport's."""
        return self.failure or CommError(f"{what}: {error}")

    def version(self) -> str:
        """What exactly this is, for people and for caches."""
        return ""

    def close(self, end: float = 0.0) -> None:
        """Release what this communicator holds. Waits until ``end`` (time.monotonic) at most for what is under way."""
        return None


class Closed:
    """Stands where a closed communicator's transport was, and says so."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CommError("this group was closed; commlayer.finalize() closes all")


def offsets(counts: Sequence[int]) -> list[int]:
    """Where each rank's share begins, and, last, where all end."""
    result = [0]
    for count in counts:
        result.append(result[-1] + count)
    return result


def messages_to_all(
    g: Collectives, out: torch.Tensor, x: torch.Tensor, out_counts: Counts, in_counts: Counts
) -> tuple[list[Message], list[Message]]:
    """An all_to_all as what to send and what to receive; one's own share is copied at once.

    Each rank starts with another partner, so that nobody is everybody's first. Both ends know a message's length, so
    an empty one is not sent.
    """
    outgoing, incoming = pieces(x, in_counts, g.size), pieces(out, out_counts, g.size)
    incoming[g.rank].copy_(outgoing[g.rank])
    others = [(g.rank + step) % g.size for step in range(1, g.size)]
    sends = [(outgoing[rank], rank) for rank in others if outgoing[rank].numel()]
    recvs = [(incoming[rank], rank) for rank in reversed(others) if incoming[rank].numel()]
    return sends, recvs


def pieces(x: torch.Tensor, counts: Counts, size: int) -> list[torch.Tensor]:
    """Views of each rank's share of a flat tensor."""
    if counts is None:
        counts = [x.numel() // size] * size
    return list(x.split(list(counts)))

"""What leaves a rank: the bytes that it hands to its backend for other ranks, by one convention for all backends.

What is moved counts where it comes from, once for every other rank that is to have it; what is reduced, as the ring
algorithms send it. So the ranks together count the least that any implementation sends. Which rank passes on what,
and what is padded on the way, is the backend's own affair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from commlayer.backends.base import pieces

# Of each native operation, from the arguments of ``backends.base.Collectives``. What is not here sends nothing.
SENT: dict[str, Callable[..., int]] = {
    "all_reduce": lambda g, out, x, op: 2 * (g.size - 1) * x.nbytes // g.size,
    "reduce": lambda g, out, x, op, dst: x.nbytes if g.rank != dst else 0,
    "broadcast": lambda g, x, src: (g.size - 1) * x.nbytes if g.rank == src else 0,
    "all_gather": lambda g, out, x, counts: (g.size - 1) * x.nbytes,
    "reduce_scatter": lambda g, out, x, op, counts: x.nbytes - out.nbytes,
    "all_to_all": lambda g, out, x, out_counts, in_counts: x.nbytes - pieces(x, in_counts, g.size)[g.rank].nbytes,
    "gather": lambda g, out, x, dst, counts: x.nbytes if g.rank != dst else 0,
    "scatter": lambda g, out, x, src, counts: x.nbytes - out.nbytes if g.rank == src else 0,
    "send": lambda g, x, dst, tag: x.nbytes if g.rank != dst else 0,
    "post": lambda g, x, dst, tag: x.nbytes if g.rank != dst else 0,
    "exchange": lambda g, sends, recvs, tag: sum(x.nbytes for x, dst in sends if g.rank != dst),
}


class Counted:
    """A communicator, or a channel beside one; it tells ``count`` what each of its operations sends."""

    def __init__(self, comm: Any, count: Callable[[int], None]) -> None:
        self._comm, self._count = comm, count

    def __getattr__(self, name: str) -> Any:
        plain, sent = getattr(self._comm, name), SENT.get(name)
        if sent is None:
            return plain

        def counted(*args: Any) -> Any:
            self._count(sent(self._comm, *args))
            return plain(*args)

        return counted

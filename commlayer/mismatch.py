"""What ranks may differ in by mistake, compared before an operation under COMMLAYER_DEBUG=1.

Through the control channel, since the backend is what would hang or return wrong numbers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from commlayer.control.client import Knot
from commlayer.errors import CollectiveMismatch
from commlayer.recorder import DETAILS, Operation

# Of these only the root's values count.
_FROM_ROOT = frozenset({"broadcast", "scatter"})


def compare(op: Operation) -> str:
    """In what any two ranks differ, with all their calls, the same text on each; "" where they call the same.

    Raises CollectiveMismatch where they wait for each other in different groups, CommTimeout and PeerLost where one
    does not come.
    """
    comm, ranks = op.watch.comm, op.watch.ranks
    mine = {"call": op.call(), "site": op.site(), "group": op.watch.label, **_signature(op)}
    assert comm.seat is not None
    try:
        rows = comm.seat.meet(str(op.seq), json.dumps(mine).encode(), op.timeout or comm.timeout)
    except Knot as knot:
        calls = {rank: json.loads(text) for rank, text in knot.payloads.items()}
        raise CollectiveMismatch(f"ranks wait for each other in different operations:{_table(calls)}") from None
    calls = {rank: json.loads(row) for rank, row in zip(ranks, rows, strict=True)}
    differing = _difference(list(calls.values()))
    return f"{op.label()}: ranks differ in {differing}:{_table(calls)}" if differing else ""


def announce(op: Operation, messages: Counter[tuple[int, int, int]]) -> None:
    """Say what a message holds, and note where to look for what the one to be received holds."""
    comm, tag, (sent, expected) = op.watch.comm, op.detail("tag"), op.detail("sizes")
    assert comm.seat is not None

    def place(src: int, dst: int) -> str:
        messages[src, dst, tag] += 1
        return f"message {messages[src, dst, tag]} of tag {tag} from {src} to {dst}"

    if sent is not None:
        comm.seat.set(place(comm.rank, op.peers[-1]), json.dumps([sent, str(op.dtype), op.site()]).encode())
    if expected is not None:
        op.expected = place(op.peers[0], comm.rank)


def message(op: Operation) -> str:
    """How a message differs from what is expected of it; "" where it does not. Waits for its sender."""
    comm, (_, expected) = op.watch.comm, op.detail("sizes")
    assert comm.seat is not None
    sent, dtype, site = json.loads(comm.seat.take(op.expected, op.peers[0], comm.limit(op.timeout)))
    if (sent, dtype) == (expected, str(op.dtype)):
        return ""
    return (
        f"{op.expected}: {sent} elements of {dtype.removeprefix('torch.')} are sent at {site}, "
        f"{expected} of {str(op.dtype).removeprefix('torch.')} expected at {op.site()}"
    )


def nonfinite(op: Operation, x: torch.Tensor) -> int:
    """How many of the values that this rank sends are NaN or infinite."""
    if not (x.is_floating_point() or x.is_complex()) or x.dtype.itemsize == 1 or op.name == "recv":
        return 0
    if op.name in _FROM_ROOT and op.watch.comm.rank != op.detail("root"):
        return 0
    return x.numel() - int(torch.isfinite(x.detach()).sum())


def _signature(op: Operation) -> dict[str, Any]:
    """What must agree, by the words that a difference is reported in."""
    shape = None if op.shape is None else list(op.shape)
    root, dim, sizes, _ = (op.detail(name) for name in DETAILS)
    if shape and dim is not None and (op.name == "all_to_all" or (sizes and op.name in ("all_gather", "gather"))):
        shape[dim] = -1  # the extents differ by design
    return {
        "operation": op.name,
        "reduce op": op.reduce.name if op.reduce is not None else None,
        "dtype": str(op.dtype),
        "root": root,
        "dim": dim,
        "shape": shape,
        "splits": sizes,
    }


def _difference(calls: Sequence[dict[str, Any]]) -> str:
    """The first thing that not all ranks agree on, "" where there is none."""
    first = calls[0]
    for what in ("operation", "reduce op", "dtype", "root", "dim", "shape"):
        if any(call[what] != first[what] for call in calls):
            return what
    if first["operation"] != "all_to_all":
        return "" if all(call["splits"] == first["splits"] for call in calls) else "splits"
    if any((call["splits"] is None) != (first["splits"] is None) for call in calls):
        return "splits"
    if first["splits"] is not None:
        for src, sender in enumerate(calls):
            for dst, receiver in enumerate(calls):
                if sender["splits"][0][dst] != receiver["splits"][1][src]:
                    return f"splits (rank {src} of the group sends {sender['splits'][0][dst]} to rank {dst}, " + (
                        f"which expects {receiver['splits'][1][src]})"
                    )
    return ""


def _table(calls: dict[int, dict[str, Any]]) -> str:
    """Each rank's call and source line, side by side."""
    lines = [f"\n  rank {rank}: {{call}} in group {{group}} at {{site}}" for rank in sorted(calls)]
    return "".join(line.format(**calls[rank]) for line, rank in zip(lines, sorted(calls), strict=True))

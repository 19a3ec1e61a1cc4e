"""What the traces of a job say together: where its time went, at what bandwidth, and who kept whom waiting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from commlayer.trace import Job

_EACH_BRINGS_A_PART = ("all_gather", "gather")
_FRACTION_MOVED = ("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter")


class _Kind(NamedTuple):
    """Operations that are compared with each other: a line of the table."""

    op: str
    reduce: str | None
    group_size: int
    plan: str | None


def summary(directory: str | Path) -> dict[str, Any]:
    """Tables of a directory of traces: ``operations``, ``ranks`` and the ``failed``; times in seconds.

    A call is one operation on one rank, so an all_reduce of four ranks is four calls. Its time includes waiting for
    others. Algorithm bandwidth is S / t and bus bandwidth that times 2(n-1)/n for all_reduce, (n-1)/n for
    all_gather, reduce_scatter, all_to_all, gather and scatter, and 1 otherwise, in 1e9 bytes a second. S is the
    whole array: where each rank brings a part, n times its bytes. ``sent`` is what the plans have sent for them, as
    ``volume.py`` counts it: that of an emulation may be more. Source: NVIDIA/nccl-tests, doc/PERFORMANCE.md,
    and for gather and scatter src/gather.cu and src/scatter.cu.

    A rank waits in a collective from its own start to the latest start of all, as far as every rank of the group
    has a trace; the one that started last caused all of it. Raises ``ValueError`` naming a file that is no trace.
    """
    job = Job.open(directory)
    times: dict[_Kind, list[int]] = defaultdict(list)  # ns, of each call
    sizes: dict[_Kind, int] = defaultdict(int)  # bytes, of all calls
    sent: dict[_Kind, int] = defaultdict(int)
    starts: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)  # of each collective, on each rank
    members: dict[str, int] = {}
    busy: dict[int, list[int]] = {file.rank: [] for file in job.files}
    failed = []
    for file in job.files:
        for event in file.events():
            if event["ph"] != "X":
                continue
            call = event["args"]
            group, seq = call["group"], call.get("seq")
            members[group] = len(event["ranks"])
            if seq is not None:
                starts[group, seq][file.rank] = event["ts"]
            if "error" in call:
                failed.append({"rank": file.rank, "op": event["name"], **call})
                continue
            kind = _Kind(event["name"], call.get("reduce"), members[group], call.get("plan"))
            times[kind].append(event["dur"])
            sizes[kind] += call.get("bytes", 0)
            sent[kind] += call.get("sent", 0)
            busy[file.rank].append(event["dur"])
    complete = [ranks for (group, _), ranks in starts.items() if len(ranks) == members[group] > 1]
    waiting = _waiting(complete, busy)
    return {
        "size": job.files[0].size,
        "missing": job.missing,
        "left_out": job.left_out,
        "collectives": len(complete),
        "operations": sorted(
            (_operation(kind, np.array(times[kind]) / 1e9, sizes[kind], sent[kind]) for kind in times),
            key=lambda row: -row["total"],
        ),
        "ranks": [
            {
                "rank": file.rank,
                "host": file.host,
                "calls": len(busy[file.rank]),
                "total": sum(busy[file.rank]) / 1e9,
                **waiting[file.rank],
            }
            for file in job.files
        ],
        "failed": failed,
    }


def _operation(kind: _Kind, times: np.ndarray, size: int, sent: int) -> dict[str, Any]:
    n, total = kind.group_size, float(times.sum())
    whole = size * n if kind.op in _EACH_BRINGS_A_PART else size
    factor = 2 * (n - 1) / n if kind.op == "all_reduce" else (n - 1) / n if kind.op in _FRACTION_MOVED else 1.0
    bandwidth = whole / total / 1e9 if size and total else None
    return {
        **kind._asdict(),
        "calls": len(times),
        "bytes": size,
        "sent": sent,
        "total": total,
        "median": float(np.median(times)),
        "p99": float(np.quantile(times, 0.99)),
        "algbw": bandwidth,
        "busbw": None if bandwidth is None else bandwidth * factor,
    }


def _waiting(collectives: Iterable[dict[int, int]], ranks: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Of each rank: how long it waited, how long others waited for it, and how often it was the last."""
    table = {rank: {"waited": 0, "caused": 0, "last": 0} for rank in ranks}
    for starts in collectives:
        last = max(starts, key=lambda rank: starts[rank])
        table[last]["last"] += 1
        for rank, start in starts.items():
            table[rank]["waited"] += starts[last] - start
            table[last]["caused"] += starts[last] - start
    return {
        rank: {"waited": row["waited"] / 1e9, "caused": row["caused"] / 1e9, "last": row["last"]}
        for rank, row in table.items()
    }

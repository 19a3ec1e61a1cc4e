"""A random schedule, as each rank plays it: collectives on several groups, and one fault at one of them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

import commlayer
from commlayer import MAX, Group
from tests.faults.operations import OPERATIONS, PER_RANK, other_splits

RANKS = 3
TIMEOUT = 2.5  # seconds, of every operation: more than the grace of a rank that has left

# What the victim does in place of a call: it ends, ...
ENDS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sys.exit": lambda: sys.exit(3),
    "os._exit": lambda: os._exit(0),
    "return": lambda: None,
    "raise": lambda: _raise(),
}
# ... or comes late, ...
LATE = {
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(TIMEOUT + 1.5),
}
# ... or says something else: which operations can deviate so, and how, given the group and elements per rank.
DEVIATIONS: dict[str, tuple[frozenset[str], Callable[[Group, int], dict[str, Any]]]] = {
    "reduce op": (frozenset({"all_reduce"}), lambda g, n: {"op": MAX}),
    "dtype": (frozenset({"all_reduce"}), lambda g, n: {"dtype": torch.int32}),
    "shape": (frozenset(OPERATIONS) - {"barrier", "send_recv", "sendrecv"}, lambda g, n: {"n": n // 2}),
    "root": (frozenset({"reduce", "broadcast", "gather", "scatter"}), lambda g, n: {"root": 1}),
    "splits": (frozenset({"all_to_all"}), lambda g, n: {"splits": other_splits(g, n)}),
}
# Or the calls themselves are not the others': one left out, one in place of another, two in the other order.
ORDERS = ("skip", "other", "swap")


def _raise() -> None:
    raise RuntimeError("lost my data")


def play(report: Any, schedule: dict[str, Any]) -> None:
    """``schedule``: groups (lists of ranks), steps [operation, group], fault [kind, victim, step], all drawn."""
    try:
        _play(report, schedule)
    except Exception as error:
        report.say("error", type=type(error).__name__, text=str(error))
        raise
    report.say("end")


def _play(report: Any, schedule: dict[str, Any]) -> None:
    kind, victim, at = schedule["fault"]
    world = commlayer.init(timeout=TIMEOUT)
    groups = [world, *(world.new_group(ranks) for ranks in schedule["groups"])]
    steps = [(number, operation, groups[group]) for number, (operation, group) in enumerate(schedule["steps"])]
    report.ready()
    if world.rank == victim and kind in ORDERS:
        report.say("fault")
        steps = _reordered(kind, at, steps)
    for number, operation, group in steps:
        # Of another size each, so that calls can be told apart; large where death is to come within one.
        n = (20_000 if kind == "kill soon" else PER_RANK) * (number + 1)
        deviation: dict[str, Any] = {}
        if world.rank == victim and number == at and kind not in ORDERS:
            report.say("fault", stops=kind == "stop")
            if kind == "kill soon":
                threading.Thread(target=lambda: (time.sleep(0.01), ENDS["kill"]()), daemon=True).start()
            elif kind in ENDS:
                ENDS[kind]()
                return
            elif kind in LATE:
                LATE[kind]()
            elif group.is_member:
                deviation = DEVIATIONS[kind][1](group, n)
        if group.is_member:
            OPERATIONS[operation](group, number, **({"n": n} | deviation))


def _reordered(kind: str, at: int, steps: list[Any]) -> list[Any]:
    number, operation, group = steps[at]
    if kind == "skip":
        return steps[:at] + steps[at + 1 :]
    if kind == "other":
        other = "barrier" if operation != "barrier" else "all_reduce"
        return [*steps[:at], (number, other, group), *steps[at + 1 :]]
    return steps[:at] + steps[at : at + 2][::-1] + steps[at + 2 :]

"""The faults by name: what rank 1 does, what the others call meanwhile, and what they must then see."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import commlayer
from commlayer import MAX, Group
from tests.faults.operations import OPERATIONS, all_reduce, all_to_all, barrier, broadcast, data, other_splits

VICTIM = 1
TIMEOUT = 3.0  # seconds, of every operation

Say = Callable[..., None]
AT = r"\w+\.py:\d+"  # the line that called


@dataclass(frozen=True)
class Promise:
    """What a rank must see that is not at fault itself."""

    errors: tuple[str, ...]  # one of these types
    within: float = 2.0  # seconds from the fault to the last rank's error
    says: tuple[str, ...] = ()  # patterns that the text of each error has
    breaks: bool = False  # the group: the next call on it fails at once


LOST = Promise(("PeerLost",), says=(rf"rank {VICTIM}\b", AT), breaks=True)
LATE = Promise(("CommTimeout",), TIMEOUT + 1, says=(r"all_reduce #\d+", rf"rank {VICTIM}\b", AT), breaks=True)
CROSSED = Promise(("CommTimeout",), TIMEOUT + 1, says=(r"all_reduce #\d+", AT))
MISMATCH = Promise(("CollectiveMismatch",), says=tuple(rf"rank {rank}: .*{AT}" for rank in range(4)))
NAN = Promise(("NonFinite",), says=(rf"rank {VICTIM}\b", AT))
# Without the checks a wrong call may also match by chance: then no error comes, or a sum is not the caller's.
UNCHECKED = Promise(
    ("PeerLost", "CommTimeout", "CollectiveMismatch", "CommError", "WrongAnswer", "none", "died", "ended"), TIMEOUT + 1
)


@dataclass(frozen=True)
class Fault:
    victim: Callable[[Group, Say], None]
    others: Callable[[Group], None]
    promise: Promise
    env: dict[str, str] = field(default_factory=dict)
    victim_too: bool = False  # lives on, and must see an error as well


def play(report: Any, name: str) -> None:
    """The program of each rank."""
    fault, say = CATALOGUE[name], report.say
    world = commlayer.init(timeout=TIMEOUT)
    try:
        for seed, operation in enumerate(OPERATIONS.values()):
            operation(world, seed)
        report.ready()
        if world.rank == VICTIM:
            fault.victim(world, say)
        else:
            fault.others(world)
    except Exception as error:
        if world.rank == VICTIM and not fault.victim_too:
            raise
        say("error", type=type(error).__name__, text=str(error))
        try:
            barrier(world, 0)
        except Exception as again:
            say("again", type=type(again).__name__, text=str(again))
        raise
    say("end")


def repeated(operation: Callable[..., None]) -> Callable[[Group], None]:
    """Call it until it fails; the messages are large enough for a fault to fall into one."""

    def call(g: Group) -> None:
        for seed in range(1_000_000):
            operation(g, seed, 50_000)

    return call


def killed_in(operation: Callable[..., None]) -> Callable[[Group, Say], None]:
    def victim(g: Group, say: Say) -> None:
        def strike() -> None:
            time.sleep(0.2)
            say("fault")
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=strike, daemon=True).start()
        repeated(operation)(g)

    return victim


def instead(action: Callable[[Group], None], **values: Any) -> Callable[[Group, Say], None]:
    """Say that this is the fault, then do ``action``."""

    def victim(g: Group, say: Say) -> None:
        say("fault", **values)
        action(g)

    return victim


def raises(g: Group) -> None:
    raise RuntimeError("lost my data")


def sleeps(g: Group) -> None:
    time.sleep(TIMEOUT + 2)
    all_reduce(g, 0)


def calls(*operations: Callable[..., None], **deviation: Any) -> Callable[[Group], None]:
    """One after the other, each with its place as its number; with what deviates from what the others say."""

    def call(g: Group) -> None:
        for seed, operation in enumerate(operations):
            operation(g, seed, **deviation)

    return call


def two_groups(first: int) -> Callable[[Group], None]:
    """One operation on each of two groups of all ranks, in an order that differs."""

    def call(g: Group) -> None:
        groups = [g.new_group(range(g.size)) for _ in range(2)]
        barrier(g, 0)
        all_reduce(groups[first], 0)
        all_reduce(groups[1 - first], 0)

    return call


def sends_nan(g: Group) -> None:
    x = data(g.rank, g.size, 0, 60)
    x[17] = float("nan") if g.rank == VICTIM else 0.0
    commlayer.all_reduce(x, group=g)


ONCE = calls(all_reduce)
# What the victim calls while the others call ONCE (or as given), and whether a sequence of calls is meant.
MISMATCHES: dict[str, tuple[Callable[[Group], None], Callable[[Group], None]]] = {
    "missing call": (calls(broadcast), calls(all_reduce, broadcast)),
    "different operation": (calls(broadcast), ONCE),
    "different reduce op": (calls(all_reduce, op=MAX), ONCE),
    "different dtype": (calls(all_reduce, dtype=torch.int32), ONCE),
    "different shape": (calls(all_reduce, n=20), ONCE),
    "different root": (calls(broadcast, root=2), calls(broadcast)),
    "different splits": (lambda g: all_to_all(g, 0, splits=other_splits(g)), calls(all_to_all)),
    "swapped order of two operations": (calls(broadcast, all_reduce), calls(all_reduce, broadcast)),
}

CATALOGUE: dict[str, Fault] = {
    **{f"SIGKILL in {name}": Fault(killed_in(op), repeated(op), LOST) for name, op in OPERATIONS.items()},
    "SIGKILL in all_reduce emulated by messages": Fault(
        killed_in(all_reduce), repeated(all_reduce), LOST, env={"COMMLAYER_PROFILE": "only-send-recv"}
    ),
    "early return": Fault(instead(lambda g: None), ONCE, LOST),
    "sys.exit(3)": Fault(instead(lambda g: sys.exit(3)), ONCE, LOST),
    "os._exit(0)": Fault(instead(lambda g: os._exit(0)), ONCE, LOST),
    "exception in one rank": Fault(instead(raises), ONCE, LOST),
    "sleep past the timeout": Fault(instead(sleeps), ONCE, LATE),
    "sleep past the timeout=1 of one call": Fault(
        instead(sleeps), calls(all_reduce, timeout=1.0), replace(LATE, within=2.0)
    ),
    "SIGSTOP": Fault(instead(lambda g: os.kill(os.getpid(), signal.SIGSTOP), stops=True), ONCE, LATE),
    **{
        f"{name}, COMMLAYER_DEBUG=1": Fault(
            instead(victim), others, MISMATCH, env={"COMMLAYER_DEBUG": "1"}, victim_too=True
        )
        for name, (victim, others) in MISMATCHES.items()
    },
    **{
        f"{name}, unchecked": Fault(instead(victim), others, UNCHECKED, victim_too=True)
        for name, (victim, others) in MISMATCHES.items()
    },
    "swapped order of two groups": Fault(
        instead(two_groups(1)), two_groups(0), CROSSED, victim_too=True
    ),
    "NaN sent, COMMLAYER_CHECK_NAN=1": Fault(
        instead(sends_nan), sends_nan, NAN, env={"COMMLAYER_CHECK_NAN": "1"}, victim_too=True
    ),
}  # fmt: skip

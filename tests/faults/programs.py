"""What ranks run while faults come from outside, or none must be noticed."""

from __future__ import annotations

from typing import Any

import commlayer
from tests.faults.operations import OPERATIONS, all_reduce
from tests.faults.sockets import sockets


def endure(report: Any, timeout: float) -> None:
    """The program of each rank where the fault comes from outside: every operation in turn, until one fails."""
    world = commlayer.init(timeout=timeout)
    all_reduce(world, 0)
    report.ready()
    try:
        for seed in range(1_000_000):
            for operation in OPERATIONS.values():
                operation(world, seed, 5_000)
    except Exception as error:
        report.say("error", type=type(error).__name__, text=str(error))
        raise


def answer(report: Any, rounds: int, size: int) -> None:
    """The program of each rank where nothing must go wrong: every operation, checked."""
    world = commlayer.init(timeout=60)
    for seed in range(rounds):
        for operation in OPERATIONS.values():
            operation(world, seed, size)
    report.ready()
    report.say("sockets", found=sockets())
    commlayer.barrier()  # nobody closes its sockets before all have looked
    report.say("end")

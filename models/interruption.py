"""SIGTERM, by which Slurm and its kin announce that they will end a job: a chance to save what there is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import commlayer
from commlayer import MAX, Group


@contextmanager
def sigterm_on(group: Group) -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM does nothing but make the function that is yielded return True.

    That function is collective over ``group``: a signal may reach the ranks at different moments, or one alone, and
    all of them shall stop after the same step. Threads other than the main one get no signals.
    """
    came = threading.Event()

    def asked() -> bool:
        flag = torch.tensor(float(came.is_set()), device=group.device)
        return bool(commlayer.all_reduce(flag, MAX, group=group).item())

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)

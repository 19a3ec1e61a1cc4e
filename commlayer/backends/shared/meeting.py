"""Where the ranks of one host meet: each says that it has come, and waits until all have.

A rank that waits spins a little, if every rank has a core, and then sleeps on a futex until the one that is missing
wakes it: a spinning rank would keep that one off its core.
"""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable
from typing import Any

from commlayer.backends.shared.ranks import Ranks
from commlayer.errors import CommTimeout

LINE = 128  # bytes a rank, as in kernel.c
SPIN = 50_000  # nanoseconds, where every rank has a core
PATIENCE = 300_000  # nanoseconds until the rest of the layer is looked after for the first time
SLICE = 2_000_000  # and then again and again: failures, deadlines, messages of MPI that move only when asked

_FUTEX = {"x86_64": 202, "AMD64": 202}.get(platform.machine())  # the system call, where there is no kernel.c
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_libc = ctypes.CDLL(None)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Meeting:
    """The lines of all ranks, at ``address``; ``crowded``: they share cores."""

    def __init__(self, library: Any | None, address: int, comm: Ranks, crowded: bool) -> None:
        self._comm = comm
        self.rank, self.size = rank, size = comm.rank, comm.size
        self._address = address
        self._step = 0
        self._spin = 0 if crowded else SPIN
        self._once: Callable[[int, int, int], int]
        if library is not None:
            arrive = library.meet
            self._once = lambda step, spin, limit: arrive(address, size, rank, step, spin, limit)
        else:
            # Each is stored in one piece, as struct would not.
            self._steps = [ctypes.c_uint32.from_address(address + LINE * other) for other in range(size)]
            self._once = self._meet

    def meet(self, end: float | None, progress: bool) -> None:
        """Wait for all others, until ``end`` by time.perf_counter(), None for the ranks' own limit.

        ``progress``: whether this thread may call the backend. Raises why the group is broken, or CommTimeout.
        """
        step = self._step = (self._step + 1) & 0xFFFFFFFF
        if self._once(step, self._spin, PATIENCE):
            self._wait(step, end, progress)

    def _wait(self, step: int, end: float | None, progress: bool) -> None:
        comm = self._comm
        if end is None:
            end = time.perf_counter() + comm.limit(None)
        while True:
            if comm.failure is not None:
                raise comm.failure
            if time.perf_counter() > end:
                raise CommTimeout("shared memory: not every rank of this host has come")
            if progress:
                comm.progress()
            if not self._once(step, 0, SLICE):
                return

    def _meet(self, step: int, spin: int, limit: int) -> int:
        """The same as kernel.c's."""
        mine = self._steps[self.rank]
        if mine.value != step:
            mine.value = step
            _libc.syscall(_FUTEX, ctypes.c_void_p(self._address + LINE * self.rank), _FUTEX_WAKE, self.size, 0, 0, 0)
        start = time.perf_counter_ns()
        for other in range(self.size):
            while True:
                seen = self._steps[other].value
                if (seen - step) & 0xFFFFFFFF < 1 << 31:
                    break
                left = limit - (time.perf_counter_ns() - start)
                if left <= 0:
                    return 1
                if limit - left >= spin:
                    rest = _Timespec(0, min(left, 999_999_999))
                    place = ctypes.c_void_p(self._address + LINE * other)
                    _libc.syscall(_FUTEX, place, _FUTEX_WAIT, ctypes.c_uint(seen), ctypes.byref(rest), 0, 0)
        return 0

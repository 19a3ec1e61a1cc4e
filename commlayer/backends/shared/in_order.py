"""Runs the operations of a group one after another, as every rank started them.

A call that waits anyway does its operation itself. What is started with ``async_op=True`` is done by a thread, so that
it moves on while its caller does something else, or by whoever waits for it first.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from commlayer.backends.shared.ranks import Ranks
from commlayer.errors import CommError, CommTimeout
from commlayer.work import Work

LOOK = 2e-3  # seconds between two looks at the rest of the layer, in a wait
_DONE = Work()


class UnderWay(Protocol):
    """Who is told the limits of each operation."""

    end: float | None  # by time.perf_counter()
    progress: bool  # whether this thread may call the backend


class Task(Work):
    """One operation that was started and not waited for; ``tensors`` live as long."""

    def __init__(self, queue: InOrder, action: Callable[[], None], tensors: Any) -> None:
        super().__init__()
        self._queue = queue
        self.action, self.tensors = action, tensors
        self.ended = False
        self.error: BaseException | None = None

    def done(self) -> bool:
        return self.ended

    def wait(self, timeout: float | None = None) -> Any:
        if not self.ended:
            self._queue.wait_for(self, timeout)
        if self.error is not None:
            raise self.error
        return self.result


class InOrder:
    def __init__(self, comm: Ranks, under_way: UnderWay) -> None:
        self._comm = comm
        self._under_way: UnderWay | None = under_way
        self._tasks: deque[Task] = deque()
        self._turn = threading.Lock()  # of the thread that is doing operations
        self._news = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._broken: BaseException | None = None
        self._closing = False

    def run(self, action: Callable[[], None], tensors: Any) -> Work:
        if self._comm.synchronous and not self._tasks and self._turn.acquire(blocking=False):
            try:
                self._do(action, None, True)
            finally:
                self._turn.release()
            return _DONE
        task = Task(self, action, tensors)
        self._tasks.append(task)
        if self._comm.synchronous:
            self.wait_for(task, None)
            return task
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="commlayer-shared", daemon=True)
            self._thread.start()
        self._news.release()
        return task

    def wait_for(self, task: Task, timeout: float | None) -> None:
        end = self._end(timeout)
        while not task.ended:
            if self._turn.acquire(timeout=LOOK):
                try:
                    self._do_all(end, task)
                finally:
                    self._turn.release()
            else:
                self._look(end)

    def close(self, end: float) -> bool:
        """Until ``end`` (time.monotonic) for what is still to be done; whether nothing is under way any more."""
        while self._tasks and self._broken is None and self._comm.failure is None and time.monotonic() < end:
            time.sleep(LOOK)
        self._closing = True
        if self._broken is None:
            self._broken = CommError("this group was closed; commlayer.finalize() closes all")
        self._under_way = None
        self._news.release()
        if self._thread is not None:
            self._thread.join(1.0)
        return self._thread is None or not self._thread.is_alive()

    def _end(self, timeout: float | None) -> float:
        return time.perf_counter() + self._comm.limit(timeout)

    def _look(self, end: float) -> None:
        if self._comm.failure is not None:
            raise self._comm.failure
        if time.perf_counter() > end:
            raise CommTimeout("shared memory: an operation before this one has not finished")
        self._comm.progress()

    def _serve(self) -> None:
        while not self._closing:
            self._news.acquire()
            while self._tasks:
                # Nobody who waits has taken it up: it is this thread's.
                if not self._turn.acquire(timeout=LOOK):
                    continue
                try:
                    self._do_all(math.inf, progress=self._comm.threads)
                finally:
                    self._turn.release()

    def _do_all(self, end: float, last: Task | None = None, progress: bool = True) -> None:
        """What is waiting, up to and with ``last``. The caller's turn."""
        while self._tasks and not (last is not None and last.ended):
            task = self._tasks[0]
            try:
                self._do(task.action, end, progress)
            except BaseException as error:
                task.error = error
                if task is not last and not isinstance(error, Exception):
                    raise
            finally:
                self._tasks.popleft()
                task.tensors = None
                task.ended = True

    def _do(self, action: Callable[[], None], end: float | None, progress: bool) -> None:
        if self._broken is not None:
            raise self._broken
        assert self._under_way is not None
        self._under_way.end, self._under_way.progress = end, progress
        try:
            action()
        except BaseException as error:
            # Half of it may have been done: the ranks are no longer at the same place.
            self._broken = self._comm.failure or (error if isinstance(error, CommError) else CommError(repr(error)))
            raise

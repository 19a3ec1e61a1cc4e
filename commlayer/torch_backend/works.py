"""Works and futures, as torch.distributed's callers know them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from commlayer.backends.base import Communicator
from commlayer.backends.torch_native import TorchCommunicator
from commlayer.backends.torch_requests import MESSAGES
from commlayer.torch_backend.untraced import untraced
from commlayer.watchdog import Watch
from commlayer.work import Work

_SHORTEST_PAUSE, _LONGEST_PAUSE = 5e-5, 1e-3  # seconds between two looks at a work that somebody's future is of
_thread = threading.local()  # .depth of a Completer, in its thread


@untraced
class Done(dist.Work):
    """What has already been waited for."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    is_success = is_completed


@untraced
class TorchWork(dist.Work):
    """A ``commlayer.Work`` for callers from torch; ``outputs`` are what its future is worth, as with gloo.

    C++ takes a work for what ``wait`` and ``get_future`` give. Some callers (DistributedDataParallel) keep the future
    alone, so a future completes without ``wait``.
    """

    def __init__(self, work: Any, outputs: list[Any], futures: Futures) -> None:
        super().__init__()
        self._work = work
        self._outputs = outputs
        self._futures = futures
        self._future: Any = None
        self._error: BaseException | None = None
        self.message = False  # between two ranks, in no order that all share
        self._lock = threading.Lock()  # a work's last steps are made by one thread

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._future is not None:
            self._future.wait()
            return True
        with self._lock:
            self._finish(timeout or None)  # none at all, to torch, is no limit
        return True

    def _finish(self, timeout: timedelta | None = None) -> None:
        if self._error is not None:
            raise self._error
        try:
            self._end(timeout)
        except BaseException as error:
            self._error = error
            raise

    def _end(self, timeout: timedelta | None) -> None:
        self._work.wait(None if timeout is None else timeout.total_seconds())

    def get_future(self) -> Any:
        with self._lock:
            if self._future is None:
                self._future = self._futures.of(self)
        return self._future

    def is_completed(self) -> bool:
        return self._future.done() if self._future is not None else self._done()

    def _done(self) -> bool:
        return self._work.done()

    def is_success(self) -> bool:
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> list[Any]:
        self.wait()
        return self._outputs

    def synchronize(self) -> None:
        self.wait()

    def _source_rank(self) -> int:
        return getattr(self._work, "source", -1)

    def source_rank(self) -> int:
        return self._source_rank()


@untraced
class NativeWork(TorchWork):
    """A work of torch's own backend, with the layer's errors, and its futures.

    gloo's run their callbacks in its two worker threads, and when both wait for other futures it hangs (torch 2.13,
    PowerSGD with several buckets).
    """

    def __init__(self, work: Any, outputs: list[Any], futures: Futures, name: str, watch: Watch) -> None:
        super().__init__(work, outputs, futures)
        self._name, self._watch = name, watch
        self.message = name in MESSAGES

    def _end(self, timeout: timedelta | None) -> None:
        try:
            self._work.wait() if timeout is None else self._work.wait(timeout)
        except RuntimeError as error:
            raise self._watch.explain_native(self._name, error) from error

    def _done(self) -> bool:
        return self._work.is_completed()

    def _source_rank(self) -> int:
        return self._work._source_rank()

    def __del__(self) -> None:
        self.leave()

    def leave(self) -> None:
        """To the communicator, which waits for it at its end: a gloo message is only as alive as its handle."""
        comm = self._watch.comm
        if isinstance(comm, TorchCommunicator) and not self._work.is_completed():
            comm.adopt(self._work, self.message, self._outputs)


def together(works: Sequence[dist.Work], futures: Futures) -> dist.Work:
    """One work for several."""
    return works[0] if len(works) == 1 else TorchWork(_All(works), [], futures)


class _All(Work):
    """Works of torch, as one of the layer's."""

    __slots__ = ("_works",)

    def __init__(self, works: Sequence[dist.Work]) -> None:
        super().__init__()
        self._works = works

    def done(self) -> bool:
        return all([work.is_completed() for work in self._works])  # noqa: C419 - asking makes MPI progress

    def wait(self, timeout: float | None = None) -> Any:
        for work in self._works:
            work.wait() if timeout is None else work.wait(timedelta(seconds=timeout))
        self._works = ()


class Futures:
    """The futures of one process group, completed in threads of its own.

    Callbacks may communicate. So they run in the order in which they were asked for, which is the same on every rank,
    whatever finished first. A callback may also wait for another future (PowerSGD's does): those that are made inside
    of one complete in the next thread. Messages have no order that all ranks share, and a thread each: a callback of
    one had better start no collectives.
    """

    def __init__(self, comm: Communicator) -> None:
        self._devices = [] if comm.device.type == "cpu" else [comm.device]
        self._timeout = comm.timeout
        self._threads = comm.threads
        # A wait for MPI spins at first, and would keep the interpreter from the threads that compute.
        self._gently = not isinstance(comm, TorchCommunicator)
        self._completers: list[_Completer] = []
        self._lock = threading.Lock()

    def of(self, work: TorchWork) -> torch.futures.Future[Any]:
        completer = self._completer() if self._threads and not work.message else None
        future = _Future(self._devices, completer)

        def complete() -> list[Any]:
            if self._gently:
                _wait_gently(work, self._timeout)
            work._finish()
            return work._outputs

        if work.message and self._threads:
            threading.Thread(target=future.fulfil, args=(complete,), name="commlayer-future", daemon=True).start()
        else:
            future.soon(complete)
        return future

    def _completer(self) -> _Completer:
        depth = callback_depth() + 1
        with self._lock:
            while len(self._completers) <= depth:
                self._completers.append(_Completer(len(self._completers)))
            return self._completers[depth]

    def close(self) -> None:
        for completer in self._completers:
            completer.tasks.put(None)
        self._completers.clear()


@untraced
class _Future(torch.futures.Future):
    """A future whose callbacks run in its completer, also those added when it is complete already.

    torch would run these at once where they are added: on some ranks only.
    """

    def __init__(self, devices: list[Any], completer: _Completer | None) -> None:
        super().__init__(devices=devices)
        self._devices, self._completer = devices, completer

    def then(self, callback: Callable[[Any], Any]) -> Any:
        if self._completer is None:
            return super().then(callback)
        following = _Future(self._devices, self._completer)
        following.soon(lambda: callback(self), after=self)
        return following

    def add_done_callback(self, callback: Callable[[Any], Any]) -> None:
        if self._completer is None:
            super().add_done_callback(callback)
        else:
            self.then(callback)

    def soon(self, value: Callable[[], Any], after: Any = None) -> None:
        """Complete it with a value that is found in the completer's thread."""

        def task() -> None:
            if after is not None:
                _settled(after)
            self.fulfil(value)

        if self._completer is None:
            task()
        else:
            self._completer.tasks.put(task)

    def fulfil(self, value: Callable[[], Any]) -> None:
        try:
            found = value()
        except Exception as error:
            self.set_exception(error)
        else:
            self.set_result(found)


def _settled(future: Any) -> None:
    """Wait until it is complete, well or not."""
    with suppress(Exception):
        future.wait()


def callback_depth() -> int:
    """In how many callbacks of futures, one waiting for the next, this code runs; -1 in the program itself."""
    return getattr(_thread, "depth", -1)


class _Completer:
    def __init__(self, depth: int) -> None:
        self.tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._depth = depth
        threading.Thread(target=self._run, name=f"commlayer-futures-{depth}", daemon=True).start()

    def _run(self) -> None:
        _thread.depth = self._depth
        while (task := self.tasks.get()) is not None:
            task()
            del task  # and with it the tensors


def _wait_gently(work: TorchWork, timeout: float) -> None:
    end, pause = time.monotonic() + timeout, _SHORTEST_PAUSE
    while not work._done() and time.monotonic() < end:
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)

"""Work: the handle of an asynchronous operation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Work:
    """An operation that was started and may not have finished yet.

    ``wait(timeout)`` blocks until it has and returns its result, again and again the same one; the
    timeout is in seconds and defaults to the group's, and a wait that runs into it breaks the group.
    ``done()`` asks without blocking, and gives backends that progress only inside their calls (MPI) a
    chance to move on.

    Subclasses are the backends' requests. This base class is an operation that has already finished.
    """

    __slots__ = ("result",)

    def __init__(self, result: Any = None) -> None:
        self.result = result

    def done(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> Any:
        return self.result

    def then(self, finish: Callable[[], Any]) -> Work:
        """This work followed by local steps, run once by whoever waits first; their value is the result."""
        return _Then((self,), finish)


class _Then(Work):
    __slots__ = ("_finish", "_inference", "_works")

    def __init__(self, works: Sequence[Work], finish: Callable[[], Any] | None) -> None:
        super().__init__()
        self._works: Sequence[Work] = works
        self._finish = finish
        self._inference = torch.is_inference_mode_enabled()

    def done(self) -> bool:
        # Ask every part, not only the first unfinished one: asking is what makes MPI progress.
        return all([work.done() for work in self._works])  # noqa: C419

    def wait(self, timeout: float | None = None) -> Any:
        if timeout is None:
            for work in self._works:
                work.wait()
        else:
            end = time.monotonic() + timeout
            for work in self._works:
                work.wait(max(end - time.monotonic(), 1e-3))
        self._works = ()
        if self._finish is not None:
            # The result may be part of a graph already, or an inference tensor.
            with torch.inference_mode() if self._inference else torch.no_grad():
                self.result = self._finish()
            self._finish = None
        return self.result


def gather_works(works: Sequence[Work], finish: Callable[[], Any] | None = None) -> Work:
    """One handle for several operations."""
    return _Then(tuple(works), finish)

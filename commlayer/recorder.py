"""The flight recorder: what this rank has called lately, and where in its program.

Every public call is an ``Operation``: the handle that its caller waits on, and the record of it. The last ones stay in
a ring buffer, which is written to a file on a failure and on SIGUSR1.
"""

from __future__ import annotations

import json
import math
import os
import stat
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
import typing_extensions

from commlayer.backends.base import Communicator
from commlayer.capability import NAME_OF
from commlayer.errors import CommError
from commlayer.reduce_op import ReduceOp
from commlayer.work import Work

SCHEMA = "commlayer.flight/1"
LENGTH = 512  # operations kept

# A call site is the first line outside of these: the program's, or the library's that uses the layer.
_INSIDE = (
    *(str(Path(module).parent) + os.sep for module in (__file__, torch.__file__)),
    typing_extensions.__file__,  # around what torch calls deprecated
)
_now = time.perf_counter_ns


@cache
def _is_inside(path: str) -> bool:
    return path.startswith(_INSIDE)


DETAILS = ("root", "dim", "sizes", "tag")
Details = Sequence[Any]  # the values of these, as far as an operation has them


class Watched(Protocol):
    """The group of an operation, as far as a record needs it (see ``watchdog.Watch``)."""

    comm: Communicator
    ranks: tuple[int, ...]
    label: str
    trace: Any
    failure: Any

    def plan_of(self, op: Operation, /) -> str: ...

    def explain(self, op: Operation, error: CommError) -> CommError: ...

    def expect(self, op: Operation, /) -> None: ...

    def interrupt(self, op: Operation, error: BaseException, /) -> None: ...

    def compare_message(self, op: Operation, /) -> None: ...


class Operation:
    """One public call on a group; times are nanoseconds of ``time.perf_counter_ns``.

    ``seq`` counts the collectives of the group, 1 for its first, and is the same on every rank; messages, which only
    two ranks know of, have none. It keeps the deadline, and turns whatever went wrong into an error that names this
    call and who is missing. It holds no tensor: records outlive what they are about.
    """

    # No slots but defaults: a call stores only what it has.
    seq: int | None = None
    end = 0
    sent = 0  # bytes for other ranks, of all that its plan is made of; counted where a trace is written
    error = ""
    waiting = False  # whether somebody is inside it
    expected = ""  # under COMMLAYER_DEBUG: where the sender of a message says what it sends
    handle: weakref.ref[Handle] | None = None

    def __init__(
        self,
        watch: Watched,
        name: str,
        x: torch.Tensor | None,
        reduce: ReduceOp | None,
        details: Details,
        peers: tuple[int, ...],
        timeout: float | None,
    ) -> None:
        self.watch, self.name, self.reduce, self.details = watch, name, reduce, details
        self.peers, self.timeout = peers, timeout
        self.shape: torch.Size | None
        self.dtype: torch.dtype | None
        self.shape, self.dtype = (None, None) if x is None else (x.shape, x.dtype)
        frame = sys._getframe(2)
        while _is_inside(frame.f_code.co_filename) and frame.f_back is not None:
            frame = frame.f_back
        self.where = (frame.f_code, frame.f_lasti)
        self.start = _now()

    def run(self, start: Callable[[], tuple[Any, Work]], async_op: bool = False) -> Any:
        """Do it under its deadline; the result, or with ``async_op`` a handle for it."""
        comm = self.watch.comm
        comm.deadline = self.start * 1e-9 + (self.timeout or comm.timeout)
        comm.synchronous = not async_op
        self.waiting = True
        try:
            if self.expected and not async_op:
                self.watch.compare_message(self)
            result, work = start()
            if async_op:
                self.waiting = False
                handle = Handle(self, result, work)
                self.handle = weakref.ref(handle)
                return handle
            work.wait(None if self.timeout is None else comm.limit(None))
        except CommError as error:
            raise self.failed(error) from error
        except BaseException as error:
            self.watch.interrupt(self, error)
            raise
        finally:
            comm.deadline, comm.synchronous = None, False
        self.finish()
        return result

    def finish(self) -> None:
        self.end = _now()
        if self.watch.trace is not None:
            self.watch.trace.write(self.to_dict())

    def failed(self, error: CommError) -> CommError:
        """The error to raise instead: what is known about it, on every rank."""
        explained = self.watch.explain(self, error)
        self.error = f"{type(explained).__name__}: {explained}"
        self.finish()
        return explained

    def site(self) -> str:
        """``train.py:30``, as seen from the folder that the program was started in."""
        code, instruction = self.where
        lines = (line for begin, end, line in code.co_lines() if begin <= instruction < end and line is not None)
        line = next(lines, code.co_firstlineno)
        return f"{_shown(code.co_filename)}:{line}"

    def detail(self, name: str) -> Any:
        place = DETAILS.index(name)
        return self.details[place] if place < len(self.details) else None

    def call(self) -> str:
        """What was called, without where: ``all_reduce sum float32 (4, 3)``."""
        words = [self.name]
        if self.reduce is not None:
            words.append(str(self.reduce))
        if self.dtype is not None and self.shape is not None:
            words += [NAME_OF.get(self.dtype, str(self.dtype)), str(tuple(self.shape))]
        if self.peers:
            words.append(f"peer={', '.join(map(str, self.peers))}")
        words += [f"{name}={value}" for name, value in zip(DETAILS, self.details, strict=False) if value is not None]
        return " ".join(words)

    def label(self) -> str:
        """``all_reduce #17 of group 0-3``."""
        number = "" if self.seq is None else f" #{self.seq}"
        return f"{self.name}{number} of group {self.watch.label}"

    def __str__(self) -> str:
        return f"{self.label()} at {self.site()}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "group": self.watch.label,
            "ranks": list(self.watch.ranks),
            "seq": self.seq,
            "op": self.name,
            "reduce": self.reduce.name if self.reduce is not None else None,
            "dtype": NAME_OF.get(self.dtype) if self.dtype is not None else None,
            "shape": list(self.shape) if self.shape is not None else None,
            "bytes": math.prod(self.shape) * self.dtype.itemsize if self.shape is not None and self.dtype else 0,
            "sent": self.sent if self.watch.trace is not None else None,
            "peer": self.watch.ranks[self.peers[0]] if self.peers else None,
            "plan": self.watch.plan_of(self),
            "site": self.site(),
            "start": self.start,
            "end": self.end or None,
            "error": self.error or None,
        }


class Handle(Work):
    """What the caller of an asynchronous operation waits on."""

    __slots__ = ("__weakref__", "_operation", "_work")

    def __init__(self, operation: Operation, result: Any, work: Work) -> None:
        self.result = result
        self._operation = operation
        self._work: Work | None = work

    def done(self) -> bool:
        # Nothing more comes in a broken group; wait() says why.
        return self._work is None or self._operation.watch.failure is not None or self._work.done()

    def wait(self, timeout: float | None = None) -> Any:
        if self._work is not None:
            operation = self._operation
            comm, limit = operation.watch.comm, timeout or operation.timeout
            comm.deadline = time.perf_counter() + (limit or comm.timeout)
            operation.waiting = True
            operation.watch.expect(operation)
            try:
                if operation.expected:
                    operation.watch.compare_message(operation)
                self._work.wait(limit)
            except CommError as error:
                self._work = None
                raise operation.failed(error) from error
            except BaseException as error:
                operation.watch.interrupt(operation, error)
                raise
            finally:
                comm.deadline = None
            self._work = None  # and with it the tensors
            operation.finish()
        elif self._operation.error:
            raise CommError(f"{self._operation} has failed before: {self._operation.error}")
        return self.result


@lru_cache
def _shown(path: str) -> str:
    """From the folder that the program was started in, where it is inside."""
    try:
        here = os.path.relpath(path)
    except (OSError, ValueError):  # that folder is gone
        return path
    return path if here.startswith("..") else here


class Recorder:
    """The last operations of this rank."""

    def __init__(self, rank: int, size: int, backend: str, folder: str | None) -> None:
        self.operations: deque[Operation] = deque(maxlen=LENGTH)
        self.size = size
        self._head = {"schema": SCHEMA, "rank": rank, "size": size, "backend": backend, "host": os.uname().nodename}
        self._folder = folder

    def last(self, label: str) -> Operation | None:
        """The newest operation of a group."""
        return next((op for op in reversed(list(self.operations)) if op.watch.label == label), None)

    def unfinished(self) -> Sequence[Operation]:
        return [op for op in list(self.operations) if not op.end]

    def dump(self, reason: str) -> Path:
        """Write them to a file, the oldest first, and return its path; the newest dump replaces an older one."""
        folder = Path(self._folder) if self._folder else _private_folder()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"flight-rank{self._head['rank']:05d}-{os.getpid()}.json"
        data = {
            **self._head,
            "pid": os.getpid(),
            "reason": reason,
            "now": _now(),
            "unix_ns": time.time_ns(),
            "operations": [op.to_dict() for op in list(self.operations)],
        }
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
            json.dump(data, file, indent=1)
        return path


def _private_folder() -> Path:
    """A folder for temporary files that is this user's own: in a shared one, a stranger may have made it first."""
    folder = Path(tempfile.gettempdir()) / f"commlayer-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    info = folder.lstat()
    ours = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022
    return folder if ours else Path(tempfile.mkdtemp(prefix="commlayer-"))

"""Requests of torch.distributed's process groups, and of messages through a store."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch

from commlayer.control.store import HubStore
from commlayer.errors import CollectiveMismatch, CommError, CommTimeout, PeerLost
from commlayer.work import Work

# Of these a wait that times out ends the whole group, in gloo.
MESSAGES = frozenset({"send", "recv", "exchange"})
PART = 0.2  # seconds
LOOK = 1e-3  # seconds between two looks at an accelerator


class Native(Work):
    """A request of torch.distributed, with the tensors it works on."""

    __slots__ = ("_comm", "_tensors", "_what", "_work")

    def __init__(self, comm: Any, work: Any, what: str, *tensors: Any) -> None:
        self.result = None
        self._comm, self._work, self._what, self._tensors = comm, work, what, tensors

    def done(self) -> bool:
        return self._work is None or self._work.is_completed()

    def wait(self, timeout: float | None = None) -> Any:
        if self._work is not None:
            try:
                self._wait(self._work, timeout)
            except RuntimeError as error:
                raise self._comm.translated(error, self._what) from error
            self._work, self._tensors = None, ()
        return self.result

    def _wait(self, work: Any, timeout: float | None) -> None:
        comm = self._comm
        if timeout is None and comm.asynchronous:
            work.wait()
            return
        limit = comm.limit(timeout)
        if comm.asynchronous:
            # Not by a wait with a limit: NCCL's counts from the start of the operation, and aborts the communicator.
            end = time.perf_counter() + limit
            while not work.is_completed():
                if comm.failure is not None:
                    raise comm.failure
                if time.perf_counter() > end:
                    raise CommTimeout(f"{self._what}: not finished after {limit:g} s")
                time.sleep(LOOK)
            work.wait()  # which orders the current stream after it
            return
        if self._what in MESSAGES:
            if comm.failure is not None:
                raise comm.failure  # perhaps started after all that waited was woken
            work.wait(timedelta(seconds=limit))
            return
        # In parts, since gloo now and then overlooks that a connection has ended.
        end = time.perf_counter() + limit
        while True:
            try:
                work.wait(timedelta(seconds=max(min(limit, PART), 1e-3)))  # none at all, to torch, is no limit
                return
            except RuntimeError:
                limit = end - time.perf_counter()
                if work.is_completed():
                    work.wait()  # at once: with its own error, or none if it has ended just after this part
                    return
                if comm.failure is not None or limit <= 0:
                    raise

    def __del__(self) -> None:
        # Dropped without wait(). A gloo message is only as alive as its handle; and close() must not wait without
        # limit for a collective that the others never join.
        if getattr(self, "_work", None) is not None:
            self._comm.adopt(self._work, self._what in MESSAGES, self._tensors)


class FromAny(Native):
    """A message from whichever rank sends first; its ``source`` says who did, once it is there."""

    __slots__ = ("source",)

    def wait(self, timeout: float | None = None) -> Any:
        work = self._work
        super().wait(timeout)
        if work is not None:
            self.source = work._source_rank()
        return self.result


def translate(error: RuntimeError, where: str) -> CommError:
    """The error of the layer's own tree that says the same as torch's."""
    text = str(error)
    if "imed out" in text or "imeout" in text:
        return CommTimeout(f"{where}: {text}")
    if any(words in text for words in ("closed by peer", "reset by peer", "Broken pipe", "refused", "shutdown")):
        return PeerLost(f"{where}: {text}")
    if "size mismatch" in text or "sizes do not match" in text:
        return CollectiveMismatch(f"{where}: {text}")
    return CommError(f"{where}: {text}")


def plain(x: torch.Tensor) -> torch.Tensor:
    """The same memory, apart from autograd.

    gloo's worker threads copy into results with grad mode on: that would be recorded as part of the graph, and is
    forbidden for a view made under no_grad and for an inference tensor.
    """
    if not x.is_inference():
        return x.detach()
    with torch.inference_mode(False):
        plain = torch.empty(0, dtype=x.dtype, device=x.device)
        return plain.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


class Letter(Work):
    """What another rank posted under a key of the store."""

    __slots__ = ("_comm", "_key", "_x")

    def __init__(self, comm: Any, key: str, x: torch.Tensor) -> None:
        self.result = None
        self._comm, self._key = comm, key
        self._x: torch.Tensor | None = x

    def done(self) -> bool:
        return self._x is None or self._comm._store.check([self._key])

    def wait(self, timeout: float | None = None) -> Any:
        if self._x is not None:
            store, limit = self._comm._store, self._comm.limit(timeout)
            try:
                if isinstance(store, HubStore):
                    data = store.take(self._key, limit)
                else:
                    store.wait([self._key], timedelta(seconds=limit))
                    data = store.get(self._key)
                    store.delete_key(self._key)
            except CommError:
                raise
            except RuntimeError as error:
                raise self._comm.translated(error, f"waiting for {self._key}") from error
            with torch.no_grad():
                self._x.view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            self._x = None
        return self.result

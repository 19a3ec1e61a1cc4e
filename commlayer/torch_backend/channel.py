"""One way to the other ranks of a process group, on which operations follow each other in one order."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from commlayer.backends.torch_native import TorchCommunicator
from commlayer.backends.torch_requests import MESSAGES
from commlayer.capability import Request
from commlayer.group import Group
from commlayer.reduce_op import ReduceOp
from commlayer.torch_backend.works import Done, Futures, NativeWork, TorchWork
from commlayer.work import Work

_NONE = timedelta(0)
_DONE = Done()


class Channel:
    """A ``Group``, and torch's own backend under it, which does what it can do natively.

    ``beside``: torch's backends for tensors on other devices, by device type.
    """

    def __init__(self, group: Group, beside: dict[str, Any], futures: Futures) -> None:
        self.group, self.flat, self.watch = group, group.flat, group.watch
        self._beside, self._futures = beside, futures
        comm, dog = group._comm, group.watch.dog
        watched = dog.debug or dog.check_nan or dog.trace is not None
        self._native = comm.group if isinstance(comm, TorchCommunicator) and not watched else None
        if self._native is not None and group.backend == "gloo":
            self._native._set_default_timeout(timedelta(seconds=group.timeout))  # the layer's own calls bring theirs
        self._last: Callable[[], NativeWork | None] = lambda: None
        self._never = self._native is None and not beside
        # (op, dtype, device, reduce op, layout) -> the backend of torch's to call, or None for the group.
        self._decided: dict[tuple[Any, ...], Any] = {}

    def direct(self, op: str, x: torch.Tensor, reduce: Any = None, layout: str = "even") -> Any:
        """The backend of torch's that does this call as it is; None where it is the group's to do.

        Every rank decides alike: of the tensor, only dtype and device count.
        """
        if self._never:
            return None
        key = (op, x.dtype, x.device, None if reduce is None else hash(reduce), layout)
        try:
            backend = self._decided[key]
        except KeyError:
            backend = self._decided[key] = self._decide(op, x, reduce, layout)
        return None if backend is self._native and self.watch.seq >= self.watch.bound else backend

    def _decide(self, op: str, x: torch.Tensor, reduce: Any, layout: str) -> Any:
        kind = x.device.type
        if kind != self.group.device.type:
            if kind not in self._beside and self.group.backend != "single":
                known = ", ".join([self.group.device.type, *self._beside])
                raise ValueError(f"tensor: is on {x.device}, but this process group works on {known}")
            return self._beside.get(kind)
        name = None if reduce is None else reduce.__getstate__()[0].name.lower()
        request = Request(op, name, x.dtype, kind, layout)
        if not self.group.capabilities().native(request) or self.flat.plan(request).shared_from < math.inf:
            return None
        return self._native

    def started(self, name: str, work: dist.Work, outputs: list[Any], opts: Any = None) -> dist.Work:
        """What a backend of torch's has started: not recorded, but counted, as where the group does the same."""
        if name not in MESSAGES:
            self.watch.seq += 1
        if opts is not None and not getattr(opts, "asyncOp", True):  # as torch's functions say, which wait at once
            try:
                work.wait()
            except RuntimeError as error:
                raise self.watch.explain_native(name, error) from error
            return _DONE
        made = NativeWork(work, outputs, self._futures, name, self.watch)
        self._last = weakref.ref(made)
        return made

    def run(
        self,
        name: str,
        x: torch.Tensor | None,
        start: Callable[[], tuple[Any, Work]],
        outputs: list[Any],
        opts: Any = None,
        *,
        reduce: ReduceOp | None = None,
        details: tuple[Any, ...] = (),
        peers: tuple[int, ...] = (),
    ) -> dist.Work:
        """An operation of the group's, under its deadline and in its records."""
        timeout = None
        if opts is not None and (given := opts.timeout) > _NONE:
            timeout = given.total_seconds()
        call = self.watch.begin(name, x, reduce, details, timeout, peers)
        if opts is not None and not getattr(opts, "asyncOp", True):
            call.run(start)
            return _DONE
        work = TorchWork(call.run(start, async_op=True), outputs, self._futures)
        work.message = bool(peers)
        return work

    def close(self) -> None:
        last = self._last()
        if last is not None:
            last.leave()  # after all others, so that their end is its
        self._native, self._beside, self._decided = None, {}, {}

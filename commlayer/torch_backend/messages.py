"""send and recv of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from commlayer.backends.torch_requests import plain
from commlayer.capability import Request
from commlayer.checks import check_rank, check_tag, check_tensor
from commlayer.differentiable import finished
from commlayer.errors import UnsupportedOperation
from commlayer.layout import Finish, destination, flat
from commlayer.torch_backend.arguments import as_it_lies, one
from commlayer.torch_backend.calls import Calls
from commlayer.torch_backend.works import TorchWork
from commlayer.watchdog import Watch
from commlayer.work import Work


class Messages(Calls):
    def send(self, tensors: Any, dst: int, tag: int) -> dist.Work:
        x, tag = one(tensors, self.group), check_tag(tag)
        channel = self._channel()
        direct = channel.direct("send", x)
        if direct is not None and as_it_lies(x) and dst != self.group.rank:
            return channel.started("send", direct.send([x], dst, tag), [x])
        check_tensor(x, self.group)
        dst = check_rank(dst, self.group, "dst")

        def start() -> tuple[Any, Work]:
            return None, channel.flat.send(flat(plain(x)), dst, tag) if x.numel() else Work()

        return channel.run("send", x, start, [x], details=(None, None, (x.numel(), None), tag), peers=(dst,))

    def recv(self, tensors: Any, src: int, tag: int) -> dist.Work:
        x, tag = one(tensors, self.group), check_tag(tag)
        channel = self._channel()
        direct = channel.direct("recv", x)
        if direct is not None and as_it_lies(x) and src != self.group.rank:
            return channel.started("recv", direct.recv([x], src, tag), [x])
        check_tensor(x, self.group)
        src = check_rank(src, self.group, "src")

        def start() -> tuple[Any, Work]:
            _, buffer, finish = destination(x.shape, x.new_empty(0), plain(x))
            return finished(None, channel.flat.recv(buffer, src, tag) if x.numel() else Work(), finish)

        return channel.run("recv", x, start, [x], details=(None, None, (None, x.numel()), tag), peers=(src,))

    def recv_anysource(self, tensors: Any, tag: int) -> dist.Work:
        x, tag = one(tensors, self.group), check_tag(tag)
        channel = self._channel()
        direct = channel.direct("recv", x)
        if direct is not None and as_it_lies(x):
            return channel.started("recv", direct.recv_anysource([x], tag), [x])
        check_tensor(x, self.group)
        if not x.numel():
            raise ValueError("x: a message without elements is never sent, so its source cannot be found out; name it")
        plan = self.group.flat.plan(Request("recv", None, x.dtype, self.group.device.type))
        if plan.emulated:
            raise UnsupportedOperation(f"recv from any source: messages are emulated here; name the source\n{plan}")
        _, buffer, finish = destination(x.shape, x.new_empty(0), plain(x))
        assert self.group._comm is not None
        work = self.group._comm.recv_any(buffer, tag)
        return TorchWork(_FromAny(work, tag, channel.watch, finish), [x], self._futures)


class _FromAny(Work):
    """A message from any rank, and what is left to do when it is there."""

    __slots__ = ("_finish", "_tag", "_watch", "_work")

    def __init__(self, work: Any, tag: int, watch: Watch, finish: Finish) -> None:
        super().__init__()
        self._work, self._tag, self._finish = work, tag, finish
        self._watch: Watch | None = watch

    @property
    def source(self) -> int:
        return self._work.source

    def done(self) -> bool:
        return self._work.done()

    def wait(self, timeout: float | None = None) -> Any:
        if self._watch is None:
            return
        self._work.wait(timeout)
        # Under COMMLAYER_DEBUG, so that the next one from there is compared with what its sender says.
        self._watch.messages[self.source, self._watch.comm.rank, self._tag] += 1
        if self._finish is not None:
            with torch.no_grad():
                self._finish()
        self._watch = None

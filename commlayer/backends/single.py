"""The backend of a group of one rank: every operation is a copy."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import torch

from commlayer.arithmetic import combine, premultiplied
from commlayer.backends.base import Communicator, Counts, Message
from commlayer.control.seat import Seat
from commlayer.errors import CommError
from commlayer.reduce_op import ORDERED, ReduceOp
from commlayer.work import Work


class _Queued(Work):
    """Copies that an accelerator's stream does; a wait orders the stream that is current then after them."""

    __slots__ = ("_device", "_event")

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._event = torch.accelerator.current_stream(device).record_event()

    def done(self) -> bool:
        return self._event.query()

    def wait(self, timeout: float | None = None) -> None:
        torch.accelerator.current_stream(self._device).wait_event(self._event)


class Single(Communicator):
    """One rank alone. A message to oneself must be sent before it is received."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device | str = "cpu", timeout: float = 600.0, name: str = "single") -> None:
        self.name = name  # of the backend that was asked for, of which one rank needs nothing
        self.device = torch.device(device)
        self.timeout = timeout
        self._mail: dict[int, deque[torch.Tensor]] = defaultdict(deque)

    def all_reduce(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp) -> Work:
        if op.factor is not None:
            out.copy_(premultiplied(x, op))
        elif op.name in ORDERED and x.dtype.is_floating_point:
            out.copy_(combine([x], op.name))  # the canonical NaN, as elsewhere
        elif out is not x:
            out.copy_(x)
        return self._copied()

    def reduce(self, out: torch.Tensor | None, x: torch.Tensor, op: ReduceOp, dst: int) -> Work:
        assert out is not None
        return self.all_reduce(out, x, op)

    def broadcast(self, x: torch.Tensor, src: int) -> Work:
        return Work()

    def all_gather(self, out: torch.Tensor, x: torch.Tensor, counts: Counts) -> Work:
        out.copy_(x)
        return self._copied()

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp, counts: Counts) -> Work:
        return self.all_reduce(out, x, op)

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor, out_counts: Counts, in_counts: Counts) -> Work:
        out.copy_(x)
        return self._copied()

    def gather(self, out: torch.Tensor | None, x: torch.Tensor, dst: int, counts: Counts) -> Work:
        assert out is not None
        out.copy_(x)
        return self._copied()

    def scatter(self, out: torch.Tensor, x: torch.Tensor | None, src: int, counts: Counts) -> Work:
        assert x is not None
        out.copy_(x)
        return self._copied()

    def send(self, x: torch.Tensor, dst: int, tag: int) -> Work:
        self._mail[tag].append(x.clone())
        return Work()

    def recv(self, x: torch.Tensor, src: int, tag: int) -> Work:
        def take() -> None:
            if not self._mail[tag]:
                raise CommError(f"recv from oneself, tag {tag}: nothing was sent, so this would wait forever")
            with torch.no_grad():
                x.copy_(self._mail[tag].popleft())

        if not self._mail[tag]:
            return Work().then(take)  # perhaps it is sent before somebody waits
        take()
        return Work()

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], tag: int) -> Work:
        for x, dst in sends:
            self.send(x, dst, tag)
        for x, src in recvs:
            self.recv(x, src, tag).wait()
        return Work()

    post, fetch = send, recv

    def _copied(self) -> Work:
        return Work() if self.device.type in ("cpu", "meta") else _Queued(self.device)

    def barrier(self) -> Work:
        return Work()

    def subgroup(self, ranks: Sequence[int], seat: Seat) -> Single:
        return self

"""all_to_all of rows that is under way while something else is computed, in backward too.

``wait(start(x))`` is commlayer.all_to_all of x. What a model computes between the two runs beside the exchange, as far
as the backend moves data on its own; and its gradient runs beside the exchange of gradients, since autograd goes back
through the later call first, there to start, and through the earlier one last, there to wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function

import commlayer
from commlayer import Group, Work
from parallel.derivatives import first_derivative
from parallel.notes import kept, replays_kept, unseen


class Exchange:
    """One exchange: ``outgoing`` rows to each rank of ``group``, ``incoming`` rows from each. Nothing on one rank."""

    def __init__(self, outgoing: Sequence[int], incoming: Sequence[int], group: Group) -> None:
        self.outgoing, self.incoming, self.group = outgoing, incoming, group
        self._under_way: tuple[Work, Tensor] | None = None

    def start(self, x: Tensor) -> Tensor:
        """Rows that are only there after :meth:`wait`, which takes them."""
        return x if self.group.size == 1 else _Start.apply(x, self)

    def wait(self, arriving: Tensor) -> Tensor:
        return arriving if self.group.size == 1 else _Wait.apply(arriving, self)

    def launch(self, x: Tensor, outgoing: Sequence[int], incoming: Sequence[int]) -> Tensor:
        out = x.new_empty(sum(incoming), *x.shape[1:])
        work = commlayer.all_to_all(
            x, input_splits=outgoing, output_splits=incoming, group=self.group, out=out, async_op=True
        )
        self._under_way = work, out
        return out

    def finish(self) -> Tensor:
        assert self._under_way is not None
        (work, out), self._under_way = self._under_way, None
        work.wait()
        return out


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        if replays_kept():  # nobody looks into it
            return unseen(lambda: x.new_zeros(()).expand(sum(exchange.incoming), *x.shape[1:]))
        return unseen(lambda: exchange.launch(x, exchange.outgoing, exchange.incoming))

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.exchange.finish(), None


class _Wait(Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return kept(exchange.finish).view_as(arriving)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        exchange = ctx.exchange
        exchange.launch(grad, exchange.incoming, exchange.outgoing)
        return grad.new_zeros(()).expand_as(grad), None  # what arrives, and its shape, is the affair of _Start

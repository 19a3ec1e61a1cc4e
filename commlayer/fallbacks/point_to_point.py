"""send and recv where the backend has no messages: through the control channel."""

from __future__ import annotations

import torch

from commlayer.backends.base import Collectives
from commlayer.capability import Request
from commlayer.fallbacks.registry import Use, fallback
from commlayer.work import Work


def _control(request: Request, size: int) -> list[Use]:
    return [Use(request.to("control"))]


@fallback("send", needs=_control)
def post(g: Collectives, x: torch.Tensor, dst: int, tag: int) -> Work:
    """A letter through the control channel.

    No collective will do here: only two ranks know of the message.
    """
    return g.post(x, dst, tag)


@fallback("recv", needs=_control)
def fetch(g: Collectives, x: torch.Tensor, src: int, tag: int) -> Work:
    """A letter through the control channel."""
    return g.fetch(x, src, tag)

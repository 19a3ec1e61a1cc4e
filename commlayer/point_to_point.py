"""Messages between two ranks: send, recv, and both at once."""

from __future__ import annotations

from typing import Any

import torch

from commlayer.checks import check_out, check_rank, check_tag, check_tensor, check_timeout
from commlayer.differentiable import Started, Tensor, check_gradient, finished, launch, shaped
from commlayer.errors import UnsupportedOperation
from commlayer.group import Group
from commlayer.layout import destination, flat
from commlayer.runtime import resolve
from commlayer.work import Work


def send(
    x: Tensor,
    dst: int,
    tag: int = 0,
    *,
    group: Group | None = None,
    async_op: bool = False,
    timeout: float | None = None,
) -> Work | None:
    """Send ``x`` to rank ``dst``, which receives the same shape and dtype with the same tag.

    Not differentiable (UnsupportedOperation where ``x`` requires grad): use sendrecv. (MPI_Send.)
    """
    g = resolve(group)
    check_tensor(x, g)
    dst = check_rank(dst, g, "dst")
    tag = check_tag(tag)
    if x.requires_grad and torch.is_grad_enabled():
        raise UnsupportedOperation("send has no gradient, and x requires one; use sendrecv, or send x.detach()")
    call = g.watch.begin(
        "send", x, details=(None, None, (x.numel(), None), tag), peers=(dst,), timeout=check_timeout(timeout)
    )
    return call.run(lambda: (None, g.flat.send(flat(x), dst, tag) if x.numel() else Work()), async_op)


def recv(
    x: Tensor,
    src: int,
    tag: int = 0,
    *,
    group: Group | None = None,
    async_op: bool = False,
    timeout: float | None = None,
) -> Any:
    """Receive into ``x`` what rank ``src`` sends, and return it.

    A tensor on the meta device is taken as a description only: the result is then a new one like it. (MPI_Recv.)
    """
    g = resolve(group)
    if isinstance(x, torch.Tensor) and x.device.type == "meta":
        x = torch.empty(x.shape, dtype=x.dtype, device=g.device)
    check_tensor(x, g)
    check_out(x, x.shape, x, g, "x")
    src = check_rank(src, g, "src")
    tag = check_tag(tag)
    result, buffer, finish = destination(x.shape, x.new_empty(0), x)
    call = g.watch.begin(
        "recv", x, details=(None, None, (None, x.numel()), tag), peers=(src,), timeout=check_timeout(timeout)
    )
    return call.run(lambda: finished(result, g.flat.recv(buffer, src, tag) if x.numel() else Work(), finish), async_op)


def sendrecv(
    x: Tensor,
    *,
    dst: int,
    src: int,
    like: Tensor | None = None,
    tag: int = 0,
    group: Group | None = None,
    out: Tensor | None = None,
    async_op: bool = False,
    timeout: float | None = None,
) -> Any:
    """Send ``x`` to ``dst`` while receiving from ``src``, without deadlock; the result is what arrived.

    It has the shape and dtype of ``x``, or of ``like`` where the two differ. Adjoint: the reverse. (MPI_Sendrecv.)
    """
    g = resolve(group)
    check_tensor(x, g)
    dst = check_rank(dst, g, "dst")
    src = check_rank(src, g, "src")
    tag = check_tag(tag)
    template = x if like is None else like
    if not isinstance(template, torch.Tensor):
        raise TypeError(f"like: expected a torch.Tensor, got {type(template).__name__}")
    if template.dtype != x.dtype:
        raise TypeError(f"like: expected dtype {x.dtype}, as of x, got {template.dtype}")
    shape = template.shape
    if out is not None:
        check_out(out, shape, x, g)

    def start(x: Tensor) -> Started:
        result, buffer, finish = destination(shape, x, out)
        sends = [(flat(x), dst)] if x.numel() else []
        recvs = [(buffer, src)] if buffer.numel() else []
        return finished(result, g.flat.exchange(sends, recvs, tag), finish)

    def adjoint(grad: Tensor) -> Tensor:
        return sendrecv(grad, dst=src, src=dst, like=shaped(x.shape, grad), tag=tag, group=g)

    check_gradient("sendrecv", x, out)
    call = g.watch.begin(
        "sendrecv",
        x,
        details=(None, None, (x.numel(), template.numel()), tag),
        peers=(src, dst),
        timeout=check_timeout(timeout),
    )
    return launch(call, x, async_op, start, adjoint)

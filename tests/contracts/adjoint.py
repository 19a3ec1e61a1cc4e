"""Gradients: <Ax, y> = <x, A'y> for every differentiable function, summed over the ranks; second derivatives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import commlayer as c

Operation = tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]


def operations(g: c.Group) -> dict[str, Operation]:
    """By name: the shape of this rank's input, and the function."""
    n, r, last = g.size, g.rank, g.size - 1
    sizes = [(3 * rank + 1) % 4 for rank in range(n)]
    matrix = [[(src + 2 * dst) % 3 for dst in range(n)] for src in range(n)]
    column = [row[r] for row in matrix]
    total, mine, sent = sum(sizes), sizes[r], sum(matrix[r])
    right, left = (r + 1) % n, (r - 1) % n
    premul = c.premul_sum(0.5 + r)
    tensor = c.premul_sum(torch.tensor([0.25 - r], dtype=torch.float64))
    like = torch.empty(2, sizes[left], dtype=torch.float64)
    return {
        "all_reduce sum": ((3, 2), lambda x: c.all_reduce(x, group=g)),
        "all_reduce avg": ((3, 2), lambda x: c.all_reduce(x, c.AVG, group=g)),
        "all_reduce premul": ((3,), lambda x: c.all_reduce(x, premul, group=g)),
        "all_reduce premul tensor": ((), lambda x: c.all_reduce(x, tensor, group=g)),
        "all_reduce transposed": ((3, 2), lambda x: c.all_reduce(x.t()[::2], group=g)),
        "reduce sum": ((3,), lambda x: c.reduce(x, dst=last, group=g)),
        "reduce avg": ((2, 2), lambda x: c.reduce(x, c.AVG, group=g)),
        "reduce premul": ((2,), lambda x: c.reduce(x, premul, dst=last, group=g)),
        "broadcast": ((2, 3), lambda x: c.broadcast(x, src=last, group=g)),
        "all_gather": ((2, 3), lambda x: c.all_gather(x, group=g)),
        "all_gather 0-dim": ((), lambda x: c.all_gather(x, group=g)),
        "all_gather last dim": ((2, 3), lambda x: c.all_gather(x, dim=-1, group=g)),
        "all_gather uneven": ((2, mine), lambda x: c.all_gather(x, dim=1, sizes=sizes, group=g)),
        "reduce_scatter": ((2 * n, 3), lambda x: c.reduce_scatter(x, group=g)),
        "reduce_scatter avg": ((3, n), lambda x: c.reduce_scatter(x, c.AVG, dim=1, group=g)),
        "reduce_scatter premul": ((n,), lambda x: c.reduce_scatter(x, premul, group=g)),
        "reduce_scatter uneven": ((2, total), lambda x: c.reduce_scatter(x, dim=1, sizes=sizes, group=g)),
        "all_to_all": ((2, 2 * n), lambda x: c.all_to_all(x, dim=-1, group=g)),
        "all_to_all splits": (
            (sent, 2),
            lambda x: c.all_to_all(x, input_splits=matrix[r], output_splits=column, group=g),
        ),
        "all_to_all input splits": ((2, sent), lambda x: c.all_to_all(x, input_splits=matrix[r], dim=1, group=g)),
        "gather": ((2, 2), lambda x: c.gather(x, dst=last, dim=1, group=g)),
        "gather uneven": ((mine, 2), lambda x: c.gather(x, sizes=sizes, group=g)),
        "scatter": ((2, n), lambda x: c.scatter(x, src=last, dim=1, group=g)),
        "scatter uneven": ((total, 2), lambda x: c.scatter(x, sizes=sizes, group=g)),
        "sendrecv": ((2, 3), lambda x: c.sendrecv(x, dst=right, src=left, group=g)),
        "sendrecv other shape": ((2, mine), lambda x: c.sendrecv(x, dst=right, src=left, like=like, group=g)),
    }


def _drawn(shape: torch.Size | tuple[int, ...], seed: tuple[int, ...]) -> torch.Tensor:
    return torch.asarray(np.asarray(np.random.default_rng(seed).normal(size=tuple(shape))))


def _summed(value: torch.Tensor, g: c.Group) -> float:
    texts = g._comm.share(np.float64(value.item()).tobytes())
    return float(sum(np.frombuffer(text)[0] for text in texts))


def check_adjoint(name: str, g: c.Group) -> None:
    shape, function = operations(g)[name]
    x = _drawn(shape, (1, g.rank)).requires_grad_()
    z = function(x)
    assert z.requires_grad
    y = _drawn(z.shape, (2, g.rank))
    z.backward(y)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    forward, backward = _summed((z.detach() * y).sum(), g), _summed((x.detach() * x.grad).sum(), g)
    assert forward == pytest.approx(backward, rel=1e-10, abs=1e-10), (
        f"{name}: <Ax, y> = {forward}, <x, A'y> = {backward}"
    )
    assert forward != 0 or not z.numel(), f"{name}: the check checks nothing"


def check_second_derivative(name: str, g: c.Group) -> None:
    """Of half the squared gradient of sum((Ax)^3), which is A'(6 Ax · A(A'(3 (Ax)^2)))."""
    shape, function = operations(g)[name]
    x = _drawn(shape, (3, g.rank)).requires_grad_()
    z = function(x)
    (first,) = torch.autograd.grad((z**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum() / 2, x)

    again = x.detach().clone().requires_grad_()
    z = function(again)
    inner = function(first.detach().clone().requires_grad_()).detach()
    (expected,) = torch.autograd.grad(z, again, 6 * z.detach() * inner)
    torch.testing.assert_close(second, expected, rtol=1e-10, atol=1e-10)


def check_complex_adjoint(g: c.Group) -> None:
    """Re <Ax, y> = Re <x, A^H y>."""
    factor = c.premul_sum(0.5 + g.rank)
    for function in (
        lambda x: c.all_reduce(x, factor, group=g),
        lambda x: c.reduce_scatter(x, factor, group=g),
        lambda x: c.reduce(x, factor, dst=g.size - 1, group=g),
        lambda x: c.all_to_all(x, group=g),
    ):
        x = torch.complex(_drawn((2 * g.size,), (4, g.rank)), _drawn((2 * g.size,), (5, g.rank))).requires_grad_()
        z = function(x)
        y = torch.complex(_drawn(z.shape, (6, g.rank)), _drawn(z.shape, (7, g.rank)))
        z.backward(y)
        forward = _summed((z.detach() * y.conj()).sum().real, g)
        backward = _summed((x.detach() * x.grad.conj()).sum().real, g)
        assert forward == pytest.approx(backward, rel=1e-10)


def check_asynchronous(g: c.Group) -> None:
    """Several at once, waited for in reverse, each with its gradient."""
    x = _drawn((2 * g.size, 2), (8, g.rank)).requires_grad_()
    works = [
        c.all_reduce(x, group=g, async_op=True),
        c.all_to_all(x, group=g, async_op=True),
        c.all_gather(x, dim=1, group=g, async_op=True),
        c.reduce_scatter(x, c.AVG, group=g, async_op=True),
    ]
    results = [work.wait() for work in reversed(works)][::-1]
    plain = [
        c.all_reduce(x, group=g),
        c.all_to_all(x, group=g),
        c.all_gather(x, dim=1, group=g),
        c.reduce_scatter(x, c.AVG, group=g),
    ]
    for result, expected in zip(results, plain, strict=True):
        assert result.requires_grad
        assert torch.equal(result.detach(), expected.detach())
        y = _drawn(result.shape, (9, g.rank))
        (got,) = torch.autograd.grad(result, x, y)
        (wanted,) = torch.autograd.grad(expected, x, y)
        assert torch.equal(got, wanted)


def check_no_gradient(g: c.Group) -> None:
    """What has none says so, before anything is sent; without grad mode the same calls work."""
    x = torch.ones(2 * g.size, requires_grad=True)
    for op in (c.MIN, c.MAX, c.PRODUCT):
        for function in (c.all_reduce, c.reduce, c.reduce_scatter):
            with pytest.raises(c.UnsupportedOperation, match=f"{op}.*no gradient"):
                function(x, op, group=g)
            with torch.no_grad():
                function(x, op, group=g)
    with pytest.raises(c.UnsupportedOperation, match="sendrecv"):
        c.send(x, 0, group=g)
    factor = torch.tensor(2.0, requires_grad=True)
    with pytest.raises((c.UnsupportedOperation, ValueError), match=r"factor"):
        c.all_reduce(torch.ones(2), c.premul_sum(factor), group=g)
    for function in (c.all_reduce, c.broadcast, c.all_to_all):
        with pytest.raises(ValueError, match="out"):
            function(x, out=torch.empty(2 * g.size), group=g)
        with pytest.raises(ValueError, match="out"):
            function(torch.ones(2 * g.size), out=torch.empty(2 * g.size, requires_grad=True), group=g)

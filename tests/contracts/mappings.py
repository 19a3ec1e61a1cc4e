"""Each mapping against plain arithmetic on all ranks' inputs: its value, its gradient, and both inside a graph.

Every rank knows what every other has, so that the expected values need no communication.
"""

import torch

from commlayer import balanced_sizes
from parallel import mappings


def rand(rank, *shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * seed + rank))


def strided(x):
    """The same values in another memory order."""
    return x.mT.contiguous().mT if x.ndim > 1 else x


def check(name, x, wanted, grads, wanted_grad, compiled=False, **options):
    """``grads``: what arrives in backward on this rank."""
    function = getattr(mappings, name)

    def call(x):
        return function(x, **options)

    x = strided(x).requires_grad_()
    before = x.detach().clone()
    y = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(x)
    torch.testing.assert_close(y, wanted, rtol=1e-14, atol=1e-14)
    y.backward(strided(grads))
    torch.testing.assert_close(x.grad, wanted_grad, rtol=1e-14, atol=1e-14)
    assert torch.equal(x.detach(), before)


def cases(group, total=10, other=7):
    """(name, options, x, y, gradient of y, gradient of x) of every mapping on this rank, evenly and not."""
    n, me = group.size, group.rank
    ranks = range(n)
    for dim, sizes in ((0, None), (1, None), (-1, [total - n + 1] + [1] * (n - 1))):
        cut = balanced_sizes(total, n) if sizes is None else sizes
        shape = [other, other]
        shape[dim] = total
        part = [*shape]
        whole, parts = [rand(r, *shape) for r in ranks], []
        for r in ranks:
            part[dim] = cut[r]
            parts.append(rand(r, *part, seed=1))
        mine = [w.split(cut, dim)[me] for w in whole]
        at = {"dim": dim, "group": group}
        if dim == 0:
            yield "copy_to_region", {"group": group}, whole[me], whole[me], whole[me], sum(whole)
            yield "reduce_from_region", {"group": group}, whole[me], sum(whole), whole[me], whole[me]
        joined = torch.cat(parts, dim)
        yield "scatter_to_region", {**at, "sizes": sizes}, whole[me], mine[me], parts[me], joined
        yield "reduce_scatter_to_region", {**at, "sizes": sizes}, whole[me], sum(mine), parts[me], joined
        yield "gather_from_region", {**at, "sizes": cut}, parts[me], joined, whole[me], mine[me]
        yield "all_gather_from_region", {**at, "sizes": cut}, parts[me], joined, whole[me], sum(mine)
    yield from _all_to_all(group, total, other)


def _all_to_all(group, total, other):
    n, me = group.size, group.rank
    for rows, columns, given in (
        (balanced_sizes(total, n), balanced_sizes(other, n), False),
        ([1] * (n - 1) + [total - n + 1], [other - n + 1] + [1] * (n - 1), True),
        ([2] * n, [3] * n, False),
    ):
        # From parts of the columns to parts of the rows, with a dim of 2 between them.
        whole = rand(0, sum(rows), 2, sum(columns), seed=2)
        grad = rand(0, sum(rows), 2, sum(columns), seed=3)
        options = {"scatter_dim": 0, "gather_dim": -1, "group": group, "gather_sizes": columns}
        if given:
            options["scatter_sizes"] = rows
        x, gx = (t.split(columns, 2)[me] for t in (whole, grad))
        y, gy = (t.split(rows, 0)[me] for t in (whole, grad))
        yield "all_to_all_region", options, x, y, gy, gx

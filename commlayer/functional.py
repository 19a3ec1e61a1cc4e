"""The public collectives on tensors.

All of them follow one pattern: check the arguments; bring input and destination into the flat form that
backends work on; start; wait, or hand out a ``Work`` (see ``differentiable``). ``timeout`` is in seconds and by
default the group's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from commlayer.arithmetic import premultiplied
from commlayer.checks import (
    budget,
    check_dim,
    check_divides,
    check_extent,
    check_out,
    check_rank,
    check_reduce,
    check_sizes,
    check_splittable,
    check_tensor,
    check_timeout,
)
from commlayer.differentiable import Started, Tensor, check_gradient, finished, launch
from commlayer.group import Group
from commlayer.layout import Finish, destination, flat, is_part, line, side_by_side
from commlayer.reduce_op import LINEAR, SUM, ReduceOp, as_reduce_op
from commlayer.runtime import resolve
from commlayer.work import Work


def all_reduce(
    x: Tensor,
    op: ReduceOp | str = SUM,
    *,
    group: Group | None = None,
    out: Tensor | None = None,
    async_op: bool = False,
    timeout: float | None = None,
) -> Any:
    """The reduction of every rank's ``x``, on every rank, bitwise the same.

    ``out=x`` reduces in place. Returns a tensor of the shape of ``x``, or a ``Work`` for one. Adjoint: itself, for
    SUM, AVG and premul_sum; others of a tensor that requires grad raise UnsupportedOperation. (MPI_Allreduce.)
    """
    g = resolve(group)
    op = as_reduce_op(op)
    check_tensor(x, g)
    check_timeout(timeout)
    check_reduce(op, x.dtype)
    if out is not None:
        check_out(out, x.shape, x, g)

    def start(x: Tensor) -> Started:
        if (right := side_by_side(x, out)) is not None:
            return right if out is None else _changed(out), g.flat.all_reduce(right, x, op)
        result, buffer, finish = _destination(x.shape, x, out, aliases=True)
        work = g.flat.all_reduce(buffer, flat(x), op) if x.numel() else Work()
        return finished(result, work, finish)

    def adjoint(grad: Tensor) -> Tensor:
        if op.factor is not None:
            return premultiplied(all_reduce(grad, group=g), op)
        return all_reduce(grad, op, group=g)

    check_gradient("all_reduce", x, out, op)
    call = g.watch.begin("all_reduce", x, op, (), timeout)
    return launch(call, x, async_op, start, adjoint if op.name in LINEAR else None)


def reduce(
    x: Tensor,
    op: ReduceOp | str = SUM,
    *,
    dst: int = 0,
    group: Group | None = None,
    out: Tensor | None = None,
    async_op: bool = False,
    timeout: float | None = None,
) -> Any:
    """The reduction of every rank's ``x`` on rank ``dst``; None elsewhere.

    Where ``x`` requires grad, ranks other than ``dst`` get an empty tensor instead of None: call backward on (the sum
    of) it, so that they join in the adjoint, a broadcast from ``dst``. (MPI_Reduce.)
    """
    g = resolve(group)
    op = as_reduce_op(op)
    check_tensor(x, g)
    check_timeout(timeout)
    check_reduce(op, x.dtype)
    dst = check_rank(dst, g, "dst")
    at_root = g.rank == dst
    if out is not None and at_root:
        check_out(out, x.shape, x, g)

    def start(x: Tensor) -> Started:
        if not x.numel():
            return _destination(x.shape, x, out)[0] if at_root else x.new_empty(0), Work()
        if not at_root:
            return x.new_empty(0), g.flat.reduce(None, flat(x), op, dst)
        result, buffer, finish = _destination(x.shape, x, out)
        return finished(result, g.flat.reduce(buffer, flat(x), op, dst), finish)

    def adjoint(grad: Tensor) -> Tensor:
        full = broadcast(grad if at_root else _joined(x.shape, grad), src=dst, group=g)
        if op.factor is not None:
            return premultiplied(full, op)
        return full / g.size if op.name == "avg" else full

    check_gradient("reduce", x, out, op)
    call = g.watch.begin("reduce", x, op, (dst,), timeout)
    return _only_at_root(launch(call, x, async_op, start, adjoint if op.name in LINEAR else None), at_root, async_op)


def broadcast(
    x: Tensor,
    *,
    src: int = 0,
    group: Group | None = None,
    out: Tensor | None = None,
    async_op: bool = False,
    timeout: float | None = None,
) -> Any:
    """The values of ``x`` on rank ``src``, on every rank; elsewhere only the shape and dtype of ``x`` count.

    Adjoint: reduce(SUM) to ``src``. (MPI_Bcast.)
    """
    g = resolve(group)
    check_tensor(x, g)
    check_timeout(timeout)
    src = check_rank(src, g, "src")
    if out is not None:
        check_out(out, x.shape, x, g)

    def start(x: Tensor) -> Started:
        result, buffer, finish = _destination(x.shape, x, out, aliases=True)
        if not x.numel():
            return result, Work()
        if g.rank == src:
            values = flat(x)
            if values.data_ptr() != buffer.data_ptr():
                buffer.copy_(values)
        return finished(result, g.flat.broadcast(buffer, src), finish)

    def adjoint(grad: Tensor) -> Tensor:
        total = reduce(grad, dst=src, group=g)
        return total if g.rank == src else _zeros_after(total, x.shape, grad)

    check_gradient("broadcast", x, out)
    call = g.watch.begin("broadcast", x, None, (src,), timeout)
    return launch(call, x, async_op, start, adjoint)


def all_gather(
    x: Tensor,
    *,
    dim: int = 0,
    sizes: Sequence[int] | None = None,
    group: Group | None = None,
    out: Tensor | None = None,
    async_op: bool = False,
    timeout: float | None = None,
) -> Any:
    """Every rank's ``x``, concatenated along ``dim`` in rank order, on every rank.

    ``sizes`` are the extents of ``dim`` per rank where they differ, and given on every rank; 0-dim tensors make a
    vector. ``x`` may be this rank's own part of ``out``. Adjoint: reduce_scatter(SUM). (MPI_Allgather, MPI_Allgatherv.)
    """
    g = resolve(group)
    check_tensor(x, g)
    check_timeout(timeout)
    dim = check_dim(dim, x)
    sizes, shape, counts = _gathered(x, dim, check_sizes(sizes, g), g)
    if out is not None:
        check_out(out, shape, x, g)

    def start(x: Tensor) -> Started:
        if out is not None and counts is None and is_part(x, out, g.rank) and g.flat.gathers_in_place(x.dtype):
            return _changed(out), g.flat.all_gather(line(out), line(x), None)
        result, buffer, finish = _destination(shape, x, out, dim)
        work = g.flat.all_gather(buffer, flat(x, dim), counts) if buffer.numel() else Work()
        return finished(result, work, finish)

    def adjoint(grad: Tensor) -> Tensor:
        return reduce_scatter(grad, dim=dim, sizes=sizes, group=g).reshape(x.shape)

    check_gradient("all_gather", x, out)
    call = g.watch.begin("all_gather", x, None, (None, dim, sizes), timeout)
    return launch(call, x, async_op, start, adjoint)


def reduce_scatter(
    x: Tensor,
    op: ReduceOp | str = SUM,
    *,
    dim: int = 0,
    sizes: Sequence[int] | None = None,
    group: Group | None = None,
    out: Tensor | None = None,
    async_op: bool = False,
    timeout: float | None = None,
) -> Any:
    """This rank's share, along ``dim``, of the reduction of every rank's ``x``.

    ``sizes`` are the extents of the shares where they are not equal, and given on every rank. Adjoint: all_gather.
    (MPI_Reduce_scatter_block, MPI_Reduce_scatter.)
    """
    g = resolve(group)
    op = as_reduce_op(op)
    check_tensor(x, g)
    check_timeout(timeout)
    check_reduce(op, x.dtype)
    check_splittable(x)
    dim = check_dim(dim, x)
    sizes, shape, counts = _scattered(x, dim, check_sizes(sizes, g), g)
    if out is not None:
        check_out(out, shape, x, g)

    def start(x: Tensor) -> Started:
        result, buffer, finish = _destination(shape, x, out, dim)
        work = g.flat.reduce_scatter(buffer, flat(x, dim), op, counts) if x.numel() else Work()
        return finished(result, work, finish)

    def adjoint(grad: Tensor) -> Tensor:
        full = all_gather(grad, dim=dim, sizes=sizes, group=g)
        if op.factor is not None:
            return premultiplied(full, op)
        return full / g.size if op.name == "avg" else full

    check_gradient("reduce_scatter", x, out, op)
    call = g.watch.begin("reduce_scatter", x, op, (None, dim, sizes), timeout)
    return launch(call, x, async_op, start, adjoint if op.name in LINEAR else None)


def all_to_all(
    x: Tensor,
    *,
    input_splits: Sequence[int] | None = None,
    output_splits: Sequence[int] | None = None,
    dim: int = 0,
    group: Group | None = None,
    out: Tensor | None = None,
    async_op: bool = False,
    timeout: float | None = None,
) -> Any:
    """Part r of ``x`` along ``dim`` goes to rank r; the result is what all ranks sent here, in rank order.

    ``input_splits`` are the extents of the parts, ``output_splits`` those of what arrives; without either all are
    equal. Give the same arguments on every rank: with ``input_splits`` alone, the ranks first tell each other how
    much to expect. Adjoint: all_to_all with the splits swapped. (MPI_Alltoall, MPI_Alltoallv.)
    """
    g = resolve(group)
    check_tensor(x, g)
    check_timeout(timeout)
    check_splittable(x)
    dim = check_dim(dim, x)
    incoming = check_sizes(output_splits, g, "output_splits")
    outgoing = check_sizes(input_splits, g, "input_splits")
    if outgoing is None:
        if incoming is not None:
            raise ValueError("output_splits: given without input_splits; give both, or input_splits alone")
        check_divides(x, dim, g, "give input_splits=")
        shape = list(x.shape)
    else:
        check_extent("input_splits", outgoing, x.shape[dim], dim, x)
        if out is not None:
            check_out(out, out.shape, x, g)  # all but the shape, before the ranks talk
        if incoming is None:
            counts = torch.tensor(outgoing, dtype=torch.int64, device=x.device)
            left = budget(timeout)
            incoming = all_to_all(counts, group=g, timeout=timeout).tolist()
            timeout = left()
        if incoming[g.rank] != outgoing[g.rank]:
            raise ValueError(
                f"output_splits: expects {incoming[g.rank]} from this rank itself, but input_splits sends it "
                f"{outgoing[g.rank]}"
            )
        shape = [*x.shape[:dim], sum(incoming), *x.shape[dim + 1 :]]
    if out is not None:
        check_out(out, shape, x, g)
    inner = _inner(x, dim)

    def start(x: Tensor) -> Started:
        result, buffer, finish = _destination(shape, x, out, dim)
        if inner == 0 or (outgoing is None and not x.numel()):
            return result, Work()  # empty on every rank; uneven shares of nothing still have to be called
        work = g.flat.all_to_all(buffer, flat(x, dim), _times(incoming, inner), _times(outgoing, inner))
        return finished(result, work, finish)

    def adjoint(grad: Tensor) -> Tensor:
        return all_to_all(grad, input_splits=incoming, output_splits=outgoing, dim=dim, group=g)

    splits = None if outgoing is None else (outgoing, incoming)
    check_gradient("all_to_all", x, out)
    call = g.watch.begin("all_to_all", x, None, (None, dim, splits), timeout)
    return launch(call, x, async_op, start, adjoint)


def gather(
    x: Tensor,
    *,
    dst: int = 0,
    dim: int = 0,
    sizes: Sequence[int] | None = None,
    group: Group | None = None,
    out: Tensor | None = None,
    async_op: bool = False,
    timeout: float | None = None,
) -> Any:
    """Every rank's ``x``, concatenated along ``dim`` in rank order, on rank ``dst``; None elsewhere.

    ``sizes`` as in all_gather. Where ``x`` requires grad, other ranks get an empty tensor, as in reduce. Adjoint:
    scatter from ``dst``. (MPI_Gather, MPI_Gatherv.)
    """
    g = resolve(group)
    check_tensor(x, g)
    check_timeout(timeout)
    dst = check_rank(dst, g, "dst")
    dim = check_dim(dim, x)
    sizes, shape, counts = _gathered(x, dim, check_sizes(sizes, g), g)
    at_root = g.rank == dst
    if out is not None and at_root:
        check_out(out, shape, x, g)
    total = 1
    for extent in shape:
        total *= extent

    def start(x: Tensor) -> Started:
        if not at_root:
            return x.new_empty(0), g.flat.gather(None, flat(x, dim), dst, counts) if total else Work()
        result, buffer, finish = _destination(shape, x, out, dim)
        work = g.flat.gather(buffer, flat(x, dim), dst, counts) if total else Work()
        return finished(result, work, finish)

    def adjoint(grad: Tensor) -> Tensor:
        full = grad if at_root else _joined(shape, grad)
        return scatter(full, src=dst, dim=dim, sizes=sizes, group=g).reshape(x.shape)

    check_gradient("gather", x, out)
    call = g.watch.begin("gather", x, None, (dst, dim, sizes), timeout)
    return _only_at_root(launch(call, x, async_op, start, adjoint), at_root, async_op)


def scatter(
    x: Tensor,
    *,
    src: int = 0,
    dim: int = 0,
    sizes: Sequence[int] | None = None,
    group: Group | None = None,
    out: Tensor | None = None,
    async_op: bool = False,
    timeout: float | None = None,
) -> Any:
    """This rank's share, along ``dim``, of ``x`` on rank ``src``; elsewhere only the shape and dtype of ``x`` count.

    ``sizes`` as in reduce_scatter. Adjoint: gather to ``src``. (MPI_Scatter, MPI_Scatterv.)
    """
    g = resolve(group)
    check_tensor(x, g)
    check_timeout(timeout)
    src = check_rank(src, g, "src")
    check_splittable(x)
    dim = check_dim(dim, x)
    sizes, shape, counts = _scattered(x, dim, check_sizes(sizes, g), g)
    if out is not None:
        check_out(out, shape, x, g)

    def start(x: Tensor) -> Started:
        result, buffer, finish = _destination(shape, x, out, dim)
        values = flat(x, dim) if g.rank == src else None
        work = g.flat.scatter(buffer, values, src, counts) if x.numel() else Work()
        return finished(result, work, finish)

    def adjoint(grad: Tensor) -> Tensor:
        total = gather(grad, dst=src, dim=dim, sizes=sizes, group=g)
        return total if g.rank == src else _zeros_after(total, x.shape, grad)

    check_gradient("scatter", x, out)
    call = g.watch.begin("scatter", x, None, (src, dim, sizes), timeout)
    return launch(call, x, async_op, start, adjoint)


def barrier(*, group: Group | None = None, async_op: bool = False, timeout: float | None = None) -> Work | None:
    """Wait until every rank of the group has come this far. (MPI_Barrier.)"""
    g = resolve(group)
    if not g.is_member:
        raise ValueError(f"group: this process is not a member of the group of ranks {list(g.ranks)}")
    call = g.watch.begin("barrier", timeout=check_timeout(timeout))
    return call.run(lambda: (None, g.flat.barrier()), async_op)


def balanced_sizes(total: int, parts: int) -> list[int]:
    """Extents that differ by at most one, the larger first: [3, 3, 2, 2] for 10 over 4."""
    if total < 0 or parts < 1:
        raise ValueError(f"expected total >= 0 and parts >= 1, got {total} and {parts}")
    share, rest = total // parts, total % parts  # not divmod, which torch.compile has not for symbolic sizes
    return [share + (rank < rest) for rank in range(parts)]


def _inner(x: Tensor, dim: int) -> int:
    """Elements per unit of ``dim``."""
    inner = 1
    for place, extent in enumerate(x.shape):
        inner *= 1 if place == dim else extent
    return inner


def if_uneven(sizes: list[int]) -> list[int] | None:
    """None for equal extents, which every backend can do more cheaply; all ranks have the same."""
    return None if len(set(sizes)) == 1 else sizes


def _times(sizes: Sequence[int] | None, inner: int) -> list[int] | None:
    return None if sizes is None else [size * inner for size in sizes]


def _gathered(
    x: Tensor, dim: int, sizes: list[int] | None, g: Group
) -> tuple[list[int] | None, list[int], list[int] | None]:
    """Sizes, shape of the concatenation, and counts of elements."""
    mine = x.shape[dim] if x.dim() else 1
    if sizes is None:
        total = mine * g.size
    else:
        if sizes[g.rank] != mine:
            raise ValueError(
                f"sizes: {sizes} says {sizes[g.rank]} for this rank, {g.rank}, but dim {dim} of x has {mine} "
                f"(shape {tuple(x.shape)})"
            )
        total = sum(sizes)
        sizes = if_uneven(sizes)
    return sizes, [*x.shape[:dim], total, *x.shape[dim + 1 :]], _times(sizes, _inner(x, dim))


def _scattered(
    x: Tensor, dim: int, sizes: list[int] | None, g: Group
) -> tuple[list[int] | None, list[int], list[int] | None]:
    """Sizes, shape of this rank's share, and counts of elements."""
    if sizes is None:
        mine = check_divides(x, dim, g, "give sizes=, for example balanced_sizes(total, parts)")
    else:
        check_extent("sizes", sizes, x.shape[dim], dim, x)
        mine = sizes[g.rank]
        sizes = if_uneven(sizes)
    return sizes, [*x.shape[:dim], mine, *x.shape[dim + 1 :]], _times(sizes, _inner(x, dim))


def _joined(shape: Sequence[int], part: Tensor) -> Tensor:
    """The same, in the graph of ``part``, so that a second derivative is communicated by this rank too."""
    return part.sum().expand(tuple(shape))


def _only_at_root(result: Any, at_root: bool, async_op: bool) -> Any:
    """None off the root, unless the result is needed there to take part in backward."""
    if at_root:
        return result
    if async_op:
        return result.then(lambda: _only_at_root(result.result, False, False))
    return result if result.requires_grad else None


def _zeros_after(part: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor:
    """The gradient of an input whose values did not count, kept in the graph for a second derivative."""
    zeros = like.new_zeros(tuple(shape))
    return zeros if part is None else zeros + part.sum()


def _destination(
    shape: Sequence[int], x: Tensor, out: Tensor | None = None, dim: int = 0, aliases: bool = False
) -> tuple[Tensor, Tensor, Finish]:
    return destination(shape, x, out if out is None else _changed(out), dim, aliases)


def _changed(out: Tensor) -> Tensor:
    """Tell autograd, which does not see what backends write: where it saved these values, backward is an error."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out

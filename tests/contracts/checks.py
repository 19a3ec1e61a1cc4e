"""One case, run on this rank and compared with the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import commlayer
from tests.contracts import layouts
from tests.contracts.cases import ROOTED, SPLITTING, Case
from tests.contracts.oracle import DTYPES, Exact, Near, decode, make, part, reduced

Group = commlayer.Group


def make_group(world: Group, name: str) -> Group:
    """A group by its name in a case; called by every rank. Ranks outside it get one they are no member of."""
    if name == "reversed":
        return world.new_group(list(reversed(range(world.size))))
    if name == "odd":
        return world.new_group(list(range(1, world.size, 2)) or [0])
    if name == "last":
        return world.new_group([world.size - 1])
    if name == "split":
        made = world.split(world.rank % 2, key=-world.rank)
        assert made is not None
        assert made.rank == sum(1 for rank in range(world.rank + 1, world.size) if rank % 2 == world.rank % 2)
        return made
    return world


class Call:
    """What every rank of a group brings to a case, and what each must get."""

    def __init__(self, case: Case, size: int) -> None:
        self.case, self.size = case, size
        self.dim = case.dim % max(len(case.shape), 1)
        self.root = case.root % size
        rng = np.random.default_rng((case.seed, 7))
        self.sizes = self._sizes(rng)
        self.matrix = [self._sizes(rng) for _ in range(size)]  # of all_to_all: row r is what rank r sends
        self.shift = int(rng.integers(0, size))
        self.factors = [float(factor) for factor in rng.integers(-8, 9, size) / 4.0]
        self.inputs = [self._input(rank) for rank in range(size)]

    def _sizes(self, rng: np.random.Generator) -> list[int]:
        extent = self.case.shape[self.dim] if self.case.shape else 1
        if self.case.splits == "even":
            return [extent] * self.size
        if self.case.splits == "empty":
            return [0] * self.size
        if self.case.splits == "lopsided":
            sizes = [0] * self.size
            sizes[int(rng.integers(0, self.size))] = extent
            return sizes
        return [int(size) for size in rng.integers(0, extent + 1, self.size)]

    def _shape(self, rank: int) -> tuple[int, ...]:
        op, shape = self.case.op, list(self.case.shape)
        if not shape:
            return ()
        if op in ("all_gather", "gather", "sendrecv", "messages"):
            shape[self.dim] = self.sizes[rank]
        elif op in ("reduce_scatter", "scatter"):
            shape[self.dim] = sum(self.sizes)
        elif op == "all_to_all":
            shape[self.dim] = sum(self.matrix[rank])
        return tuple(shape)

    def _input(self, rank: int) -> np.ndarray:
        data = make((self.case.seed, rank), self._shape(rank), self.case.dtype, self.case.kind)
        if self.case.layout == layouts.EXPANDED and len(data):
            data = np.repeat(data[:1], len(data), axis=0)
        return data

    def expected(self, rank: int) -> Exact | Near | None:
        """None where the function returns None."""
        case, rows, dim = self.case, self.inputs, self.dim
        if case.op in ("reduce", "gather") and rank != self.root:
            return None
        if case.op in ("all_reduce", "reduce", "reduce_scatter"):
            assert case.reduce is not None
            if case.op == "reduce_scatter":
                rows = [part(row, dim, self.sizes, rank) for row in rows]
            return reduced(rows, case.reduce, case.dtype, self.factors if case.reduce == "premul_sum" else None)
        if case.op == "broadcast":
            return Exact(rows[self.root])
        if case.op in ("all_gather", "gather"):
            return Exact(np.concatenate([row if case.shape else row[None] for row in rows], axis=dim))
        if case.op == "scatter":
            return Exact(part(rows[self.root], dim, self.sizes, rank))
        if case.op == "all_to_all":
            parts = [part(row, dim, self.matrix[src], rank) for src, row in enumerate(rows)]
            return Exact(np.concatenate(parts, axis=dim))
        return Exact(rows[(rank - self.shift) % self.size])


def _arguments(call: Call, rank: int) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function and its keyword arguments, beside x, out, group and async_op."""
    case, kwargs = call.case, {}
    if case.reduce is not None:
        if case.reduce == "premul_sum":
            factor = call.factors[rank]
            kwargs["op"] = commlayer.premul_sum(factor if case.factor == "number" else torch.tensor([factor]))
        else:
            kwargs["op"] = case.reduce if case.seed % 2 else getattr(commlayer, case.reduce.upper())
    if case.op in SPLITTING:
        kwargs["dim"] = case.dim
    if case.op in ROOTED:
        kwargs["dst" if case.op in ("reduce", "gather") else "src"] = call.root
    if case.op == "all_to_all" and case.splits != "even":
        kwargs["input_splits"] = call.matrix[rank]
        if case.splits != "input":
            kwargs["output_splits"] = [row[rank] for row in call.matrix]
    elif case.op in SPLITTING and case.splits != "even":
        kwargs["sizes"] = call.sizes
    if case.op == "sendrecv":
        source = (rank - call.shift) % call.size
        kwargs |= {"dst": (rank + call.shift) % call.size, "src": source, "tag": case.seed % 5}
        if case.splits != "even":
            kwargs["like"] = torch.empty(call._shape(source), dtype=DTYPES[case.dtype], device="meta")
    return getattr(commlayer, case.op), kwargs


def check(case: Case, group: Group) -> bytes:
    """Run one case on every member of ``group``; the bytes of this rank's result."""
    if not group.is_member:
        return b""
    call, rank = Call(case, group.size), group.rank
    what = f"{case.op} on rank {rank} of {group.size}"
    data, expected = call.inputs[rank], call.expected(rank)
    x = layouts.put(data, case.dtype, case.layout, (case.seed, rank, 1))
    out = None
    shape = () if expected is None else (expected.data if isinstance(expected, Exact) else data).shape[:-1]
    if isinstance(expected, Near) and case.op == "reduce_scatter":
        shape = expected.values.shape
    blank = make((case.seed, rank, 5), shape, case.dtype, "values")
    same = case.out == "same" and case.layout != layouts.EXPANDED and shape == data.shape[:-1]
    if expected is None and case.op != "messages":
        pass
    elif same:
        out = x
    elif case.out == "overlap":
        x, out = layouts.overlapping(x, shape, case.seed % 3)
    elif case.out == "fresh" or case.op == "messages":
        out = layouts.put(blank, case.dtype, layouts.PLAIN, (case.seed, rank, 2))
    elif case.out in ("view", "same"):
        out = layouts.put(blank, case.dtype, case.out_layout, (case.seed, rank, 2))

    if case.op == "messages":
        if case.out == "overlap" or same:
            x = layouts.put(data, case.dtype, case.layout, (case.seed, rank, 1))
            out = layouts.put(blank, case.dtype, case.out_layout, (case.seed, rank, 2))
        result = _messages(call, group, x.tensor, out.tensor)
    else:
        function, kwargs = _arguments(call, rank)
        result = function(x.tensor, group=group, out=out and out.tensor, async_op=case.async_op, **kwargs)
        if case.async_op:
            work = result
            assert isinstance(work, commlayer.Work)
            result = work.wait()
            assert work.done(), f"{what}: not done after wait()"
            assert work.wait() is result, f"{what}: a second wait() gives something else"
    return _compare(what, result, expected, x, out, case)


def _messages(call: Call, group: Group, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """send and recv: two letters to one neighbour, the second overtaking nothing."""
    case, rank = call.case, group.rank
    dst, src = (rank + call.shift) % group.size, (rank - call.shift) % group.size
    tag = case.seed % 5
    sent = commlayer.send(x, dst, tag, group=group, async_op=True)
    again = commlayer.send(x, dst, tag + 1, group=group, async_op=True)
    if case.async_op:
        work = commlayer.recv(out, src, tag, group=group, async_op=True)
        result = work.wait()
    else:
        result = commlayer.recv(out, src, tag, group=group)
    assert result is out, "recv returns its destination"
    copy = commlayer.recv(torch.empty(out.shape, dtype=out.dtype, device="meta"), src, tag + 1, group=group)
    sent.wait()
    again.wait()
    assert np.array_equal(layouts.to_bytes(copy, case.dtype), layouts.to_bytes(out, case.dtype))
    return result


def _compare(
    what: str, result: Any, expected: Exact | Near | None, x: layouts.Placed, out: layouts.Placed | None, case: Case
) -> bytes:
    if out is None or (out is not x and out.memory is not x.memory):
        x.assert_untouched(f"{what}: its input")
    if expected is None:
        assert result is None, f"{what}: expected None off the root, got {type(result).__name__}"
        return b""
    assert isinstance(result, torch.Tensor), f"{what}: got {type(result).__name__}"
    assert not result.requires_grad
    if out is not None:
        assert result is out.tensor, f"{what}: the result is not out"
        got = out.taken(f"{what}: out")
    else:
        assert result.is_contiguous()
        got = layouts.to_bytes(result, case.dtype)
    expected.check(got, what)
    if case.op not in ("all_reduce", "broadcast", "all_gather"):
        return b""
    if case.reduce in ("sum", "avg", "product", "premul_sum") and case.kind == "special":
        return without_payloads(torch.from_numpy(np.asarray(decode(got, case.dtype))))
    return got.tobytes()


def without_payloads(x: torch.Tensor) -> bytes:
    """The bytes of float64 values, with one and the same NaN: which one a sum keeps, MPI leaves open."""
    return torch.where(x.isnan(), torch.nan, x).numpy().tobytes()


def assert_alike(texts: list[bytes], what: str) -> None:
    """The same bits on every rank."""
    assert len(set(texts)) <= 1, f"{what}: not the same bits on every rank: {[text[:32].hex() for text in texts]}"


def check_halves(group: Group) -> None:
    """AVG of half types neither overflows nor loses the mean, and is rounded once."""
    n, r = group.size, group.rank
    for dtype, largest, smallest in ((torch.float16, 60000.0, 2.0**-24), (torch.bfloat16, 3.0e38, 2.0**-133)):
        # The same on every rank; of opposite signs; one unit in the last place apart, so the mean must be rounded.
        near = [1.0 + torch.finfo(dtype).eps * (rank % 2) for rank in range(n)]
        rows = [
            [largest, smallest, -largest, largest * (-1) ** rank, near[rank], -0.0, 1.0 / (rank + 1)]
            for rank in range(n)
        ]
        table = torch.tensor(rows, dtype=torch.float64).to(dtype)
        expected = table.double().mean(0)
        x = table[r].repeat(n)
        for result in (
            commlayer.all_reduce(x, "avg", group=group)[:7],
            commlayer.reduce_scatter(x, "avg", group=group),
            commlayer.reduce(x, "avg", dst=n - 1, group=group),
        ):
            if result is not None:
                error = (result[:7].double() - expected).abs()
                limit = expected.abs() * torch.finfo(dtype).eps * 0.51 + smallest / 2
                assert bool((error <= limit).all()), f"{dtype}: {result.tolist()}, expected {expected.tolist()}"
                assert result[1].item() == smallest


def check_objects(group: Group) -> None:
    """The object functions, with values of very different lengths."""
    n, r = group.size, group.rank
    values = [None, "x" * 3000, {"rank": 2}, [], 4.5][:n] + [0] * max(0, n - 5)
    assert commlayer.all_gather_object(values[r], group=group) == values
    for root in range(n):
        got = commlayer.gather_object((r, values[r]), dst=root, group=group)
        assert got == (list(enumerate(values)) if r == root else None)
        assert commlayer.broadcast_object(values[r] if r == root else "ignored", src=root, group=group) == values[root]
        assert commlayer.scatter_object(values if r == root else None, src=root, group=group) == values[r]


def check_order(group: Group) -> None:
    """Several operations under way at once, of two groups, waited for from the last to the first."""
    n, r = group.size, group.rank
    other = group.new_group(list(range(n)))
    works = []
    for i in range(6):
        g = (group, other)[i % 2]
        x = torch.full((n, 2), float(10 * r + i))
        works += [
            (commlayer.all_reduce(x, group=g, async_op=True), sum(10 * q + i for q in range(n))),
            (commlayer.broadcast(x.bool(), src=i % n, group=g, async_op=True), bool(10 * (i % n) + i)),
            (commlayer.all_to_all(x.half(), group=g, async_op=True), [[10.0 * q + i] * 2 for q in range(n)]),
            (commlayer.all_gather(x[:1], group=g, async_op=True), [[10.0 * q + i] * 2 for q in range(n)]),
            (commlayer.sendrecv(x, dst=(r + 1) % n, src=(r - 1) % n, group=g, async_op=True), 10.0 * ((r - 1) % n) + i),
        ]
    for work, expected in reversed(works):
        result = work.wait()
        wanted = torch.as_tensor(expected).to(result.dtype).expand(result.shape)
        assert torch.equal(result, wanted), f"{result.tolist()}, expected {wanted.tolist()}"


def check_inference(group: Group) -> None:
    """Begun in inference mode or without gradients, waited for outside; and inference tensors as inputs outside."""
    n = group.size
    for mode in (torch.inference_mode, torch.no_grad):
        for dtype in (torch.float32, torch.bfloat16):
            for name in ("all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "scatter"):
                function = getattr(commlayer, name)
                with mode():
                    x = torch.ones(2 * n, 2, dtype=dtype)
                    inside = function(x, group=group)
                    work = function(x, group=group, async_op=True)
                outside = work.wait()
                again = function(x, group=group)
                assert torch.equal(inside, outside), f"{name}, {mode.__name__}, {dtype}"
                assert torch.equal(inside, again), f"{name}, {mode.__name__}, {dtype}"

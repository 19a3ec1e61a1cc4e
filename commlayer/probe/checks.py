"""One request on one size: run it on the raw backend, and look at the values.

Each rank computes by itself, from everybody's inputs, what ``arithmetic`` says the result must be. Movement and
integers must agree to the bit. Guard elements around every tensor show writes beyond it; under the layout ``strided``
they also lie between its elements.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from commlayer.arithmetic import HALF, combine, premultiplied
from commlayer.backends.base import Communicator
from commlayer.capability import REDUCING, SPLITTABLE, Request
from commlayer.reduce_op import BY_NAME, ORDERED, ReduceOp, is_fp8, premul_sum
from commlayer.work import Work

# Dense where rings and trees have their remainders, then around the powers of two, where algorithms change.
SIZES = (
    *range(1, 21),
    *(power + off for power in (32, 64, 128, 256, 512, 1024) for off in (-1, 0, 1)),
    *(4097, 65536, 1 << 20),
)
STRIDED_SIZES = (1, 2, 3, 7, 257, 4097)
GUARD = 16  # elements
FACTORS = (0.5, 3.0, -1.25, 1 / 3)
_TAG = 5
_PERIOD = 4099  # of the values of large tensors: a prime, so that no block in the wrong place goes unseen


class Verdict(NamedTuple):
    """What is wrong: a status of profiles, what was seen, and an example that others of the kind need not share."""

    status: str
    what: str
    example: str = ""


class _Case(NamedTuple):
    """One rank's part."""

    x: torch.Tensor
    expected: torch.Tensor | None  # None where this rank gets nothing
    op: ReduceOp | None = None
    counts: list[int] | None = None  # elements of each rank, where they differ
    splits: tuple[list[int], list[int]] | None = None  # of an uneven all_to_all: what comes, what goes


def sizes_of(request: Request) -> tuple[int, ...]:
    """Elements per rank, the cheap ones first."""
    if request.op == "barrier":
        return (1,)
    if request.layout == "strided":
        return STRIDED_SIZES
    # Ranks' shares add up: the largest as a whole is then about as large as elsewhere.
    return (*SIZES[:-1], SIZES[-1] // 4) if request.op in SPLITTABLE else SIZES


def check(comm: Communicator, request: Request, size: int) -> Verdict | None:
    """Run one request on ``size`` elements per rank: None, or what is wrong on this rank."""
    root = 1 % comm.size
    if request.op == "barrier":
        comm.barrier().wait()
        return None
    case = _case(comm, request, size, root)
    step = 2 if request.layout == "strided" else 1
    source = _Guarded(case.x, comm.device, step)
    target = _Guarded(torch.zeros_like(case.x if case.expected is None else case.expected), comm.device, step)
    _start(comm, request.op, case, source.inside, target.inside, root).wait()
    in_place = request.op == "broadcast"
    if not (source.hold() and target.hold()):
        return Verdict("wrong-value", "neighbouring memory was written")
    if not in_place and source.unlike(case.x).any():
        return Verdict("mutates-input", "the input has changed")
    if case.expected is None:
        return None
    return _difference(source if in_place else target, case.expected, request)


def _case(comm: Communicator, request: Request, size: int, root: int) -> _Case:
    n, me, op = comm.size, comm.rank, request.op
    uneven = request.layout == "uneven"
    shares = [(size + 3 * rank) % (2 * size + 1) for rank in range(n)] if uneven else [size] * n
    counts = shares if uneven else None
    if op == "all_to_all":
        table = [[(size + src + 2 * dst) % (size + 3) if uneven else size for dst in range(n)] for src in range(n)]
        sent = [[values(request, table[s][d], s + 97 * (d + 1)) for d in range(n)] for s in range(n)]
        splits = ([row[me] for row in table], table[me]) if uneven else None
        return _Case(torch.cat(sent[me]), torch.cat([row[me] for row in sent]), splits=splits)
    if op in ("all_gather", "gather"):
        rows = [values(request, share, rank) for rank, share in enumerate(shares)]
        return _Case(rows[me], torch.cat(rows) if op == "all_gather" or me == root else None, counts=counts)
    if op == "scatter":
        x = values(request, sum(shares), root)
        return _Case(x, x.split(shares)[me], counts=counts)
    if op == "broadcast":
        expected = values(request, size, root)
        return _Case(expected if me == root else torch.zeros_like(expected), expected)
    if op == "send":  # the root sends to everybody
        x = values(request, size, root)
        return _Case(x, None if me == root else x)
    if op == "recv":  # everybody from the left
        return _Case(values(request, size, me), values(request, size, (me - 1) % n))
    assert request.reduce is not None
    rows = [values(request, sum(shares) if op == "reduce_scatter" else size, rank) for rank in range(n)]
    x, reduce_op = rows[me], BY_NAME.get(request.reduce)
    if reduce_op is None:
        factors = [premul_sum(FACTORS[(size + rank) % len(FACTORS)]) for rank in range(n)]  # each rank its own
        rows = [premultiplied(row, factor) for row, factor in zip(rows, factors, strict=True)]
        reduce_op = factors[me]
    whole = combine(rows, request.reduce)
    if op == "reduce_scatter":
        return _Case(x, whole.split(shares)[me], reduce_op, counts)
    return _Case(x, whole if op == "all_reduce" or me == root else None, reduce_op)


def _start(comm: Communicator, op: str, case: _Case, x: torch.Tensor, out: torch.Tensor, root: int) -> Work:
    at_root = comm.rank == root
    if op in REDUCING:
        assert case.op is not None
        if op == "all_reduce":
            return comm.all_reduce(out, x, case.op)
        if op == "reduce":
            return comm.reduce(out if at_root else None, x, case.op, root)
        return comm.reduce_scatter(out, x, case.op, case.counts)
    if op == "broadcast":
        return comm.broadcast(x, root)
    if op == "all_gather":
        return comm.all_gather(out, x, case.counts)
    if op == "all_to_all":
        return comm.all_to_all(out, x, *(case.splits or (None, None)))
    if op == "gather":
        return comm.gather(out if at_root else None, x, root, case.counts)
    if op == "scatter":
        return comm.scatter(out, x if at_root else None, root, case.counts)
    if op == "recv":
        return comm.exchange([(x, (comm.rank + 1) % comm.size)], [(out, (comm.rank - 1) % comm.size)], _TAG)
    if at_root:
        return comm.exchange([(x, dst) for dst in range(comm.size) if dst != root], [], _TAG)
    return comm.recv(out, root, _TAG)


class _Guarded:
    """A copy of a flat tensor amid guard elements, every byte of which is 1."""

    def __init__(self, x: torch.Tensor, device: torch.device, step: int) -> None:
        self.end, self.step = GUARD + x.numel() * step, step
        # Bytes, since copying a bool would make 1 of a 2 that a backend left there.
        self.elements = torch.ones(self.end + GUARD, x.element_size(), dtype=torch.uint8, device=device)
        self.inside = self.elements.view(x.dtype).view(-1)[GUARD : self.end : step]
        self.inside.copy_(x)

    def hold(self) -> bool:
        between = self.elements[GUARD + 1 : self.end : self.step] if self.step > 1 else self.elements[:0]
        return all(bool((part == 1).all()) for part in (self.elements[:GUARD], between, self.elements[self.end :]))

    def unlike(self, x: torch.Tensor) -> torch.Tensor:
        """Which elements are not those of a contiguous ``x``, to the bit."""
        inside = self.elements[GUARD : self.end : self.step].cpu()
        return (inside != x.contiguous().view(torch.uint8).view(inside.shape)).any(1)


def values(request: Request, size: int, rank: int) -> torch.Tensor:
    """A rank's input: every kind of value that its dtype has, the same on every rank that asks."""
    if size > _PERIOD:
        return values(request, _PERIOD, rank).repeat(-(-size // _PERIOD))[:size]
    generator = torch.Generator().manual_seed(size * 1000 + rank)
    dtype = request.dtype
    if request.op not in REDUCING or not (dtype.is_floating_point or dtype.is_complex):
        raw = torch.randint(0, 256, (size * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        return raw.remainder_(2).view(torch.bool) if dtype == torch.bool else raw.view(dtype)
    if dtype.is_complex:
        return torch.randn(size, generator=generator, dtype=torch.complex128).to(dtype)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    if request.reduce in ORDERED:
        special = torch.tensor([float("nan"), 0.0, -0.0, float("inf"), -float("inf"), 1.0], dtype=torch.float64)
        pick = torch.randint(0, len(special), (size,), generator=generator)
        x = torch.where(torch.rand(size, generator=generator) < 0.5, special[pick], x)
    elif request.reduce == "avg" and dtype in HALF:
        limit = torch.finfo(dtype)
        # Sums of the large overflow, shares of the small vanish.
        x = torch.where(x > 0, x.new_tensor(limit.max * 0.75), x.new_tensor(limit.smallest_normal * limit.eps))
    return x.to(dtype)


def _difference(target: _Guarded, expected: torch.Tensor, request: Request) -> Verdict | None:
    dtype = request.dtype
    got = target.inside.cpu()
    wrong = target.unlike(expected)
    inexact = dtype.is_floating_point or dtype.is_complex
    if request.op in REDUCING and inexact and request.reduce not in ORDERED and wrong.any():
        wide = torch.complex128 if dtype.is_complex else torch.float64
        narrow = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.complex32: 4e-3, torch.float32: 1e-5}
        tolerance = {**narrow, torch.complex64: 1e-5}.get(dtype, 1e-12)
        # Means of halves are checked on numbers so small that any absolute tolerance would hide their loss.
        slack = 0.0 if request.reduce == "avg" and dtype in HALF else 4 * tolerance
        wrong = ~torch.isclose(got.to(wide), expected.to(wide), rtol=tolerance, atol=slack)
    if not wrong.any():
        return None
    first = int(wrong.nonzero()[0])
    return Verdict("wrong-value", "wrong values", f"{_shown(got[first])} for {_shown(expected[first])}")


def _shown(x: torch.Tensor) -> Any:
    """As a number of few digits; fp8 and unsigned integers have no printing of their own everywhere."""
    value = x.float().item() if is_fp8(x.dtype) else x.item()
    return f"{value:.4g}" if isinstance(value, (float, complex)) else value

"""Finds out what a backend can do, by running it and looking at the values.

For every request it runs the raw backend on a fresh communicator over a sweep of sizes, and compares each rank's
result, to the bit for movement and integers, with what ``arithmetic`` computes from everybody's inputs, which
every rank can make for itself. Guard elements on both sides of every tensor show writes beyond it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from commlayer.arithmetic import HALF, combine
from commlayer.backends.base import Communicator
from commlayer.capability import NAME_OF, REDUCING, Profile, Request, Rule, requests
from commlayer.errors import CommTimeout
from commlayer.reduce_op import BY_NAME, ORDERED, is_fp8

SIZES = (1, 2, 3, 17, 255, 256, 4097, 65536)
GUARD = 8
DEADLINE = 5.0  # seconds for one call


def measure(
    world: Communicator, name: str, sizes: Sequence[int] = SIZES, only: Callable[[Request], bool] | None = None
) -> Profile:
    """A profile of a transport, by value. Every rank calls it and gets the same one.

    It runs in this process, so a backend that hangs or crashes takes it along.
    """
    verdicts: dict[Request, str] = {}
    for request in requests(world.device.type):
        if request.reduce == "premul_sum" or (only is not None and not only(request)):
            continue
        comm = world.subgroup(range(world.size))  # fresh: a failed call may poison a communicator
        verdicts[request] = next(filter(None, (_verdict(world, comm, request, size) for size in sizes)), "")
        comm.close()
    return Profile(
        name=name,
        rules=tuple(_rules(verdicts)),
        backend=world.name,
        summary="Measured: every entry was run, and its values compared on every rank.",
        versions={"torch": torch.__version__, world.name: world.version()},
        sources={
            "measured": f"{world.version()}, {world.size} ranks of one host, {', '.join(map(str, sizes))} elements"
        },
    )


def _verdict(world: Communicator, comm: Communicator, request: Request, size: int) -> str:
    """What is wrong on any rank, the same text on all, so that they go on or stop together."""
    try:
        problem = _check(comm, request, size)
    except KeyError:  # one of the tables of datatypes and operations
        problem = "absent: has no such datatype or operation"
    except CommTimeout:
        problem = f"hang: not finished after {DEADLINE:g} s"
    except Exception as error:  # whatever a backend raises is its answer
        text = re.sub(r"\w+ on rank \d+ of \d+: ", "", str(error).splitlines()[0])
        problem = f"error: {type(error).__name__}: {text[:200]}"
    return next(filter(None, (text.decode() for text in world.share(problem.encode()))), "")


def _rules(verdicts: dict[Request, str]) -> list[Rule]:
    """The verdicts as few rules: what says the same of other dtypes, layouts, reduce ops and ops is joined."""
    rows: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for request, problem in verdicts.items():
        rows[problem, request.op, request.reduce, request.layout].add(NAME_OF[request.dtype])
    # Each step joins the rows that agree in everything but one column: (problem, op, reduce, layout, dtypes).
    table = {(*key[:1], *map(_one, key[1:]), frozenset(dtypes)) for key, dtypes in rows.items()}
    for column in (3, 2, 1):
        joined: dict[tuple[Any, ...], set[str]] = defaultdict(set)
        for row in table:
            joined[row[:column] + row[column + 1 :]] |= row[column]
        table = {(*rest[:column], frozenset(values), *rest[column:]) for rest, values in joined.items()}
    rules = [
        Rule(problem.split(":")[0] or "native", ops, reduce or None, dtypes, None, layouts, "measured", _note(problem))
        for problem, ops, reduce, layouts, dtypes in table
    ]
    return sorted(rules, key=lambda rule: (rule.status != "native", rule.status, rule.note, sorted(rule.ops or ())))


def _one(value: str | None) -> frozenset[str]:
    return frozenset() if value is None else frozenset({value})


def _note(problem: str) -> str:
    return problem.partition(": ")[2]


def values(request: Request, size: int, rank: int) -> torch.Tensor:
    """A rank's input: every kind of value that its dtype has, the same on every rank that asks."""
    generator = torch.Generator().manual_seed(size * 1000 + rank)
    dtype = request.dtype
    if request.op not in REDUCING:
        bits = torch.randint(0, 256, (size * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        return bits.remainder_(2).view(torch.bool) if dtype == torch.bool else bits.view(dtype)
    if dtype == torch.bool:
        return torch.randint(0, 2, (size,), generator=generator).bool()
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 256, (size * dtype.itemsize,), generator=generator, dtype=torch.uint8).view(dtype)
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


def _guarded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor between guard elements, and the whole; ``x`` may come without data worth copying."""
    whole = torch.zeros(x.numel() + 2 * GUARD, dtype=torch.uint8).repeat_interleave(x.element_size())
    whole = (whole + 1).view(x.dtype)
    inside = whole[GUARD : GUARD + x.numel()]
    inside.copy_(x)
    return inside, whole


def _guards_hold(whole: torch.Tensor) -> bool:
    edge = GUARD * whole.element_size()
    data = whole.view(torch.uint8)
    return bool((data[:edge] == 1).all() and (data[-edge:] == 1).all())


def _check(comm: Communicator, request: Request, size: int) -> str:
    """Run one request on ``size`` elements per rank; "" or what is wrong on this rank."""
    n, me, uneven = comm.size, comm.rank, request.layout == "uneven"
    shares = [(size + 3 * rank) % (2 * size + 1) for rank in range(n)] if uneven else [size] * n
    counts = shares if uneven else None
    root = 1 % n
    op = request.op

    def make(length: int, rank: int, salt: int = 0) -> torch.Tensor:
        return values(request, length, rank + 97 * salt)

    expected: torch.Tensor | None
    if op == "barrier":
        comm.barrier().wait(DEADLINE)
        return ""
    if op == "all_to_all":
        table = [[(size + src + 2 * dst) % (size + 3) if uneven else size for dst in range(n)] for src in range(n)]
        sent = [[make(table[src][dst], src, dst + 1) for dst in range(n)] for src in range(n)]
        x, expected = torch.cat(sent[me]), torch.cat([sent[src][me] for src in range(n)])
    elif op in ("all_gather", "gather"):
        rows = [make(share, rank) for rank, share in enumerate(shares)]
        x, expected = rows[me], torch.cat(rows) if op == "all_gather" or me == root else None
    elif op in ("scatter", "broadcast", "send", "recv"):
        total = sum(shares) if op == "scatter" else size
        x = make(total, root)
        expected = x.split(shares)[me].clone() if op == "scatter" else x
    else:
        total = sum(shares) if op == "reduce_scatter" else size
        rows = [make(total, rank) for rank in range(n)]
        assert request.reduce is not None
        x, expected = rows[me], combine(rows, request.reduce)
        if op == "reduce_scatter":
            expected = expected.split(shares)[me]
        elif op == "reduce" and me != root:
            expected = None

    source, source_whole = _guarded(x)
    target, target_whole = _guarded(torch.zeros_like(x if expected is None else expected))
    _start(comm, request, source, target, root, counts, locals().get("table")).wait(DEADLINE)
    in_place = op == "broadcast"
    if not in_place and not _same_bits(source, x):
        return "mutates-input: the input has changed"
    if not (_guards_hold(source_whole) and _guards_hold(target_whole)):
        return "wrong-value: wrote beyond the tensor"
    if op in ("send", "recv") and me == root:
        return ""
    if expected is not None and not _agrees(source if in_place else target, expected, request):
        return f"wrong-value: at {size} elements"
    return ""


def _start(
    comm: Communicator,
    request: Request,
    x: torch.Tensor,
    out: torch.Tensor,
    root: int,
    counts: list[int] | None,
    table: list[list[int]] | None,
) -> Any:
    op, me, at_root = request.op, comm.rank, comm.rank == root
    if op in REDUCING:
        assert request.reduce is not None
        reduce_op = BY_NAME[request.reduce]
        if op == "all_reduce":
            return comm.all_reduce(out, x, reduce_op)
        if op == "reduce":
            return comm.reduce(out if at_root else None, x, reduce_op, root)
        return comm.reduce_scatter(out, x, reduce_op, counts)
    if op == "broadcast":
        if not at_root:
            x.view(torch.uint8).zero_()
        return comm.broadcast(x, root)
    if op == "all_gather":
        return comm.all_gather(out, x, counts)
    if op == "all_to_all":
        assert table is not None
        if counts is None:
            return comm.all_to_all(out, x, None, None)
        return comm.all_to_all(out, x, [row[me] for row in table], table[me])
    if op == "gather":
        return comm.gather(out if at_root else None, x, root, counts)
    if op == "scatter":
        return comm.scatter(out, x if at_root else None, root, counts)
    if at_root:  # send and recv: the root sends to everybody
        return comm.exchange([(x, dst) for dst in range(comm.size) if dst != root], [], 5)
    return comm.recv(out, root, 5)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


def _agrees(got: torch.Tensor, expected: torch.Tensor, request: Request) -> bool:
    dtype = request.dtype
    inexact = dtype.is_floating_point or dtype.is_complex
    if request.op not in REDUCING or not inexact or request.reduce in ORDERED or is_fp8(dtype):
        return _same_bits(got, expected)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    narrow = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.complex32: 4e-3, torch.float32: 1e-5}
    tolerance = {**narrow, torch.complex64: 1e-5}.get(dtype, 1e-12)
    # Means of halves are checked on numbers so small that any absolute tolerance would hide their loss.
    slack = 0.0 if request.reduce == "avg" and dtype in HALF else 4 * tolerance
    return torch.allclose(got.to(wide), expected.to(wide), rtol=tolerance, atol=slack)

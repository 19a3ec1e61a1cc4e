"""What is measured: operations, sizes, inputs that every rank knows, and what must come out.

Sizes and bandwidths are nccl-tests' (doc/PERFORMANCE.md; for gather and scatter src/gather.cu and src/scatter.cu;
for sizes the GetCollByteCount of each src/*.cu): S is the whole array, that is the larger of a rank's input and
output. Algorithm bandwidth is S / t, bus bandwidth that times a factor of the operation: what each link would carry
if the algorithm were optimal, to be compared with what the hardware can do. In 1e9 bytes a second.

Limits are for ranks that share memory (``limits.py``): the fewest bytes that a rank can read and write, if the work
is spread evenly over the ranks and every rank can reach every buffer.

=====================  ===============  ==========================================================================
operation              traffic a rank   why
=====================  ===============  ==========================================================================
all_reduce             S + S            reads its slice of S/n of all n, writes the sum to all n
reduce, reduce_scatter S + S/n          reads its slice of all n, writes it once
broadcast              2 S (n-1)/n      n-1 copies, spread over n ranks
all_gather, all_to_all 2 S              reads and writes all of its output, its own part included
gather, scatter        2 S/n            one copy of S, spread over n ranks
sendrecv               2 S              reads what it receives, writes it
=====================  ===============  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from commlayer.capability import DTYPES, NAME_OF
from commlayer.reduce_op import BY_NAME, SUM, ReduceOp, is_fp8, meaningless

BLOCK = 1 << 18  # elements that are compared at once
ROOT = 0


class Operation(NamedTuple):
    """One line of the table; of ``n`` ranks and in units of S where they are numbers."""

    whole_input: bool  # S, or S/n
    whole_output: bool
    bus: Callable[[int], float]  # bus bandwidth over algorithm bandwidth
    traffic: Callable[[int], float]  # what a rank reads and writes at the least
    kernel: str = "copy"  # how it does so: "copy" or "add"
    reduces: bool = False
    rooted: bool = False  # only the root has a result


def _all_but_own(n: int) -> float:
    return (n - 1) / n


def _one(n: int) -> float:
    return 1.0


OPERATIONS: dict[str, Operation] = {
    "all_reduce": Operation(True, True, lambda n: 2 * (n - 1) / n, lambda n: 2.0, "add", reduces=True),
    "reduce": Operation(True, True, _one, lambda n: 1 + 1 / n, "add", reduces=True, rooted=True),
    "broadcast": Operation(True, True, _one, lambda n: 2 * (n - 1) / n),
    "all_gather": Operation(False, True, _all_but_own, lambda n: 2.0),
    "reduce_scatter": Operation(True, False, _all_but_own, lambda n: 1 + 1 / n, "add", reduces=True),
    "all_to_all": Operation(True, True, _all_but_own, lambda n: 2.0),
    "gather": Operation(False, True, _all_but_own, lambda n: 2 / n, rooted=True),
    "scatter": Operation(True, False, _all_but_own, lambda n: 2 / n),
    "sendrecv": Operation(True, True, _one, lambda n: 2.0),
    "barrier": Operation(False, False, _one, lambda n: 0.0),
}

# As nccl-tests spells them.
ALIASES = {"float": "float32", "double": "float64", "half": "float16"}


@dataclass(frozen=True)
class Case:
    """One operation on an array of ``elements``, on ``ranks`` ranks."""

    op: str
    dtype: torch.dtype
    elements: int  # of the whole array; a multiple of the ranks
    ranks: int
    reduce: ReduceOp = SUM

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def part(self) -> int:
        return self.elements // self.ranks

    @property
    def inputs(self) -> int:
        """Elements of a rank's input."""
        return self.elements if OPERATIONS[self.op].whole_input else self.part

    @property
    def outputs(self) -> int:
        """Elements of a rank's output."""
        return self.elements if OPERATIONS[self.op].whole_output else self.part

    @property
    def traffic(self) -> int:
        """Bytes that a rank reads and writes at the least."""
        return int(self.nbytes * OPERATIONS[self.op].traffic(self.ranks))

    def algbw(self, seconds: float) -> float:
        return self.nbytes / seconds / 1e9

    def busbw(self, seconds: float) -> float:
        return self.algbw(seconds) * OPERATIONS[self.op].bus(self.ranks)

    def __str__(self) -> str:
        return f"{self.op} {NAME_OF[self.dtype]} {self.nbytes} B"


def cases(
    ops: list[str], dtypes: list[torch.dtype], smallest: int, largest: int, factor: int, ranks: int, reduce: ReduceOp
) -> list[Case]:
    """All of them, sizes ``smallest``, ``smallest * factor`` … up to ``largest`` bytes.

    An array has at least an element for each rank. What has no meaning (AVG of integers) is left out.
    """
    made: dict[Case, None] = {}  # sizes too small for the ranks fall into one
    for op in ops:
        for dtype in dtypes:
            if OPERATIONS[op].reduces and meaningless(reduce.name, dtype):
                continue
            size = smallest
            while size <= largest:
                part = max(1, size // dtype.itemsize // ranks)
                if op == "barrier":
                    made[Case(op, torch.uint8, 0, ranks)] = None
                else:
                    made[Case(op, dtype, part * ranks, ranks, reduce)] = None
                size *= factor
    return list(made)


def parse_size(text: str) -> int:
    """Bytes from ``8``, ``64K``, ``1M`` or ``2GiB``: powers of 1024, as nccl-tests takes them. ValueError."""
    number = text.upper().strip().removesuffix("B").removesuffix("I").strip()
    unit = {"K": 10, "M": 20, "G": 30}.get(number[-1:], 0)
    digits = number[:-1].strip() if unit else number
    if not digits.isdecimal() or not int(digits):
        raise ValueError(f"expected a number of bytes such as 8, 64K or 256M, got {text!r}")
    return int(digits) << unit


def parse_ops(text: str) -> list[str]:
    """Names of operations, comma separated, also as OSU and nccl-tests write them (allreduce); ``all`` is each."""
    known = {name.replace("_", ""): name for name in OPERATIONS}
    words = [word.strip().lower().replace("_", "") for word in text.split(",") if word.strip()]
    if words == ["all"]:
        return list(OPERATIONS)
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        raise ValueError(f"expected all, or some of {', '.join(OPERATIONS)}, got {text!r}")
    return list(dict.fromkeys(known[word] for word in words))


def parse_dtypes(text: str) -> list[torch.dtype]:
    """Dtypes by their names in torch or nccl-tests, comma separated."""
    words = [ALIASES.get(word.strip().lower(), word.strip().lower()) for word in text.split(",") if word.strip()]
    if not words or any(word not in DTYPES for word in words):
        raise ValueError(f"expected some of {', '.join([*DTYPES, *ALIASES])}, got {text!r}")
    return list(dict.fromkeys(DTYPES[word] for word in words))


def parse_reduce(text: str) -> ReduceOp:
    name = {"prod": "product"}.get(text.lower(), text.lower())
    if name not in BY_NAME:
        raise ValueError(f"expected one of {', '.join(BY_NAME)}, got {text!r}")
    return BY_NAME[name]


def fill(case: Case, rank: int, x: torch.Tensor) -> None:
    """Write the input of ``rank`` into ``x``, of ``case.inputs`` elements."""
    for start, stop in _blocks(x.numel()):
        x[start:stop] = _values(case, rank, torch.arange(start, stop)).to(case.dtype)


def wrong(case: Case, rank: int, result: torch.Tensor | None) -> int:
    """How many elements of a rank's result are not what they must be; of one that it must not have, 0.

    Inputs are small integers: sums are the same in whatever order, and exact. AVG may be off by the last digit.
    """
    if result is None or case.op == "barrier":
        return 0
    count = 0
    for start, stop in _blocks(case.outputs):
        expected, got = _expected(case, rank, torch.arange(start, stop)), result[start:stop]
        if case.reduce.name == "avg" and OPERATIONS[case.op].reduces:
            exact = expected.double() / case.ranks
            kind = torch.complex128 if case.dtype.is_complex else torch.float64
            close = 2 * torch.finfo(case.dtype).eps * exact.abs()
            count += int((~((got.to(kind) - exact).abs() <= close)).sum())  # NaN is close to nothing
        else:
            rows = (t.contiguous().view(torch.uint8).view(stop - start, -1) for t in (got, expected.to(case.dtype)))
            count += int(torch.ne(*rows).any(1).sum())
    return count


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, BLOCK):
        yield start, min(start + BLOCK, count)


def _values(case: Case, rank: int | torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Small integers, without a period that a misplaced block could hide behind."""
    mixed = index * 2654435761 + rank * 2246822519
    mixed = (mixed ^ (mixed >> 15)) & 0xFFFFFFFF
    mixed = (mixed * 1640531527 >> 16) & 0xFFFF
    if case.dtype == torch.bool:
        return mixed % 2
    if OPERATIONS[case.op].reduces and case.reduce.name == "product":
        return mixed % 2 + 1
    # bfloat16 has all integers up to 256, the 8-bit floats those up to 8.
    return mixed % (8 if is_fp8(case.dtype) else max(2, min(97, 256 // case.ranks)))


def _expected(case: Case, rank: int, index: torch.Tensor) -> torch.Tensor:
    """These elements of a rank's output, as int64; of AVG the sum."""
    if case.op in ("all_reduce", "reduce"):
        return _reduced(case, index)
    if case.op == "reduce_scatter":
        return _reduced(case, index + rank * case.part)
    if case.op == "broadcast":
        return _values(case, ROOT, index)
    if case.op == "scatter":
        return _values(case, ROOT, index + rank * case.part)
    if case.op == "sendrecv":
        return _values(case, (rank - 1) % case.ranks, index)
    source, within = index // case.part, index % case.part
    return _values(case, source, within + (rank * case.part if case.op == "all_to_all" else 0))


_BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}


def _reduced(case: Case, index: torch.Tensor) -> torch.Tensor:
    total = _values(case, 0, index)
    for rank in range(1, case.ranks):
        total = _BINARY[case.reduce.name](total, _values(case, rank, index))
    return total

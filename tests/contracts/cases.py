"""Hypothesis strategies: what may be asked of the layer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hypothesis import strategies as st

from commlayer.capability import OPS, REDUCING, shipped_profiles
from tests.contracts import layouts
from tests.contracts.oracle import COMPLEX, DTYPES, FLOATS, reductions

ROOTED = ("reduce", "broadcast", "gather", "scatter")
SPLITTING = ("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter")
FUNCTIONS = (*REDUCING, "broadcast", "all_gather", "all_to_all", "gather", "scatter", "sendrecv", "messages")


@dataclass(frozen=True, repr=False)
class Case:
    """One call, the same on every rank; what differs between ranks follows from ``seed`` and the rank."""

    op: str
    dtype: str
    shape: tuple[int, ...]  # the extent of ``dim`` is replaced by what the splits say
    seed: int
    reduce: str | None = None
    dim: int = 0
    splits: str = "even"  # even, uneven, lopsided (all on one rank), empty; for all_to_all also input (splits alone)
    root: int = 0  # modulo the size of the group
    layout: str = layouts.PLAIN
    kind: str = "values"
    out: str = "none"  # none, fresh, view (of another layout), same (in place), overlap
    out_layout: str = layouts.OFFSET
    async_op: bool = False
    group: str = "world"  # world, reversed, odd (ranks 1, 3, …), last, split
    factor: str = "number"  # number, tensor; of premul_sum

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"Case({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # for hypothesis
        printer.text(repr(self))


@st.composite
def cases(draw: st.DrawFn, groups: tuple[str, ...] = ("world", "reversed", "odd", "last", "split")) -> Case:
    op = draw(st.sampled_from(FUNCTIONS))
    dtype = draw(st.sampled_from([d for d in DTYPES if op not in REDUCING or reductions(d)]))
    reduce = draw(st.sampled_from(reductions(dtype))) if op in REDUCING else None
    ndim = draw(st.sampled_from([1, 2, 3, 0]))
    if ndim == 0 and op in ("reduce_scatter", "all_to_all", "scatter"):
        ndim = 1
    largest = draw(st.sampled_from([3, 3, 3, 40] if ndim == 1 else [3]))
    shape = tuple(draw(st.integers(0, largest)) for _ in range(ndim))
    dim = draw(st.integers(-max(ndim, 1), max(ndim, 1) - 1)) if op in SPLITTING else 0
    splits = "even"
    if op in SPLITTING and ndim:
        kinds = ["even", "uneven", "lopsided", "empty"] + (["input"] if op == "all_to_all" else [])
        splits = draw(st.sampled_from(kinds))
    if op in ("sendrecv", "messages"):
        splits = draw(st.sampled_from(["even", "uneven"])) if ndim else "even"
    if reduce is None:
        kind = draw(st.sampled_from(["bits", "bits", "values"]))
    elif reduce == "product":
        kind = "near_one"
    elif reduce in ("min", "max"):
        kind = draw(st.sampled_from(["special", "bits", "values"]))
    else:
        # Products and quotients of complex infinities are whatever torch makes of them.
        kind = draw(st.sampled_from(["values"] if dtype in COMPLEX and reduce != "sum" else ["values", "special"]))
    choices = [layouts.PLAIN, *layouts.WRITABLE, layouts.CONJ, layouts.NEG, *([layouts.EXPANDED] if ndim else [])]
    choices = [layout for layout in choices if layouts.fits(layout, dtype, kind)]
    layout = draw(st.sampled_from(choices))
    out = draw(st.sampled_from(["none", "none", "fresh", "view", "same", "overlap"]))
    writable = [*layouts.WRITABLE, layouts.CONJ, layouts.NEG]
    if reduce in ("avg", "sum", "premul_sum") and kind == "special":
        writable = list(layouts.WRITABLE)  # a lazy negative may turn NaN into another NaN
    return Case(
        op, dtype, shape, draw(st.integers(0, 2**20)), reduce, dim, splits, draw(st.integers(0, 7)), layout, kind, out,
        draw(st.sampled_from([choice for choice in writable if layouts.fits(choice, dtype, kind)])),
        draw(st.booleans()), draw(st.sampled_from(groups)), draw(st.sampled_from(["number", "tensor"])),
    )  # fmt: skip


@st.composite
def disabled(draw: st.DrawFn) -> str:
    """What COMMLAYER_DISABLE takes."""
    items = []
    for _ in range(draw(st.integers(0, 4))):
        op = item = draw(st.sampled_from([op for op in OPS if op != "barrier"]))
        dtype = draw(st.sampled_from([None, *FLOATS, *COMPLEX, "bool", "int64", "uint8"]))
        if op in REDUCING and draw(st.booleans()):
            item += ":" + draw(st.sampled_from(reductions(dtype or "float32")))
        elif op in SPLITTING and draw(st.booleans()):
            item += draw(st.sampled_from([":even", ":uneven"]))
        items.append(item + (f"@{dtype}" if dtype else ""))
    return ",".join(items)


profiles = st.sampled_from([None, *shipped_profiles()])

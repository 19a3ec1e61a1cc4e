"""Every emulation by itself, forced: also those that the planner finds too dear on any shipped profile."""

import math
import zlib

import pytest

from commlayer import run_local, world
from commlayer.capability import REDUCING, SPLITTABLE, Request
from commlayer.fallbacks import FALLBACKS
from tests.contracts import layouts
from tests.contracts.cases import Case
from tests.contracts.checks import assert_alike, check, check_order
from tests.contracts.oracle import DTYPES, reductions

FORCED = [
    (fallback, op) for fallback in FALLBACKS for op in sorted(fallback.ops) if op not in ("barrier", "send", "recv")
]


def cases(fallback, op, size):
    """What this emulation applies to: dtypes, reduce ops, splits, and inputs with NaN payloads and -0.0 among them."""
    for dtype in DTYPES:
        for reduce in reductions(dtype) if op in REDUCING else [None]:
            for splits in ["even", "uneven", "lopsided"] if op in SPLITTABLE else ["even"]:
                layout = "even" if splits == "even" else "uneven"
                if fallback.needs(Request(op, reduce, DTYPES[dtype], "cpu", layout), size) is None:
                    continue
                seed = zlib.crc32(f"{fallback.name}{op}{dtype}{reduce}{splits}".encode())
                for shape in [(5,), (2, 3)]:
                    kind = "bits" if reduce in (None, "min", "max") else "near_one" if reduce == "product" else "values"
                    out = ["none", "same", "view", "overlap"][(seed + len(shape)) % 4]
                    view = layouts.WRITABLE[seed % len(layouts.WRITABLE)]
                    dim = len(shape) - 1 if op in SPLITTABLE else 0
                    yield Case(
                        op,
                        dtype,
                        shape,
                        seed,
                        reduce,
                        dim,
                        splits,
                        seed % size,
                        view,
                        kind,
                        out,
                        layouts.SLICED,
                        seed % 5 == 0,
                    )


@pytest.mark.parametrize(("fallback", "op"), FORCED, ids=[f"{op}-{fallback.name}" for fallback, op in FORCED])
def test_by_itself(fallback, op):
    size = 3 + len(fallback.name + op) % 2
    todo = list(cases(fallback, op, size))
    assert todo, "applies to nothing"

    def program():
        group = world()
        calls = []

        def run(inner, name, args):
            calls.append(name)
            return fallback.run(inner, name, args)

        for case in todo:
            layout = "even" if case.splits == "even" else "uneven"
            key = (op, case.reduce, DTYPES[case.dtype], layout)
            group.flat._routes = {key: (math.inf, run)}
            result = check(case, group)
            assert_alike(group._comm.share(result), str(case))
        assert calls, "was never used"

    run_local(program, size, timeout=20)


@pytest.mark.parametrize("fallback", [f for f in FALLBACKS if "barrier" in f.ops], ids=lambda f: f.name)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_barrier(fallback, size):
    """Nobody leaves before everybody has come."""
    arrived = []

    def program():
        group = world()
        group.flat._routes = {("barrier", None, DTYPES["uint8"], "even"): (math.inf, fallback.run)}
        for step in range(3):
            arrived.append(step)
            group.flat.barrier().wait()
            assert arrived.count(step) == size
            group._comm.barrier().wait()

    run_local(program, size, timeout=20)


def test_through_the_control_channel():
    """Messages where a backend has none."""
    run_local(lambda: check_order(world()), 4, disable="send,recv,all_to_all,broadcast", timeout=20)

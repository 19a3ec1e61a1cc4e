"""The emulated all_to_all holds no more than its workspace beside the caller's tensors, however skewed the load is."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from commlayer import all_to_all, run_local, world
from commlayer.fallbacks import all_to_all as module
from commlayer.planned import Planned

RANKS = 4
# Whatever leaves only the named emulation: no messages, no all_to_all, and one of the two collectives.
ONLY_GATHER = "all_to_all,send,recv,broadcast,all_reduce,reduce,reduce_scatter,gather,scatter"
ONLY_BROADCAST = "all_to_all,send,recv,all_gather,all_reduce,reduce,reduce_scatter,gather,scatter"


class Held(TorchDispatchMode):
    """How many bytes were allocated under it, freed or not: no less than were held at once."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(word in str(func) for word in ("empty", "zeros", "clone", "aten.cat", "_to_copy")):
            self.total += result.nbytes
        return result


def loads(kind):
    if kind == "even":
        return [[300] * RANKS for _ in range(RANKS)]
    if kind == "one sender":
        return [[2400 if src == 1 else 0 for _ in range(RANKS)] for src in range(RANKS)]
    if kind == "one pair":
        return [[4800 if (src, dst) == (2, 0) else 1 for dst in range(RANKS)] for src in range(RANKS)]
    return [[0] * RANKS for _ in range(RANKS)]


@pytest.mark.parametrize("kind", ["even", "one sender", "one pair", "nothing"])
@pytest.mark.parametrize(("disable", "collective"), [(ONLY_GATHER, "all_gather"), (ONLY_BROADCAST, "broadcast")])
@pytest.mark.parametrize("workspace", [1 << 10, 1 << 13, 1 << 20])
def test_workspace_is_bounded(monkeypatch, kind, disable, collective, workspace):
    monkeypatch.setattr(module, "WORKSPACE", workspace)
    matrix = loads(kind)
    calls = []
    plain = getattr(Planned, collective)

    def counted(self, *args):
        if self.rank == 0 and args[0].dtype == torch.float64:
            calls.append(max(arg.nbytes for arg in args if isinstance(arg, torch.Tensor)))
        return plain(self, *args)

    monkeypatch.setattr(Planned, collective, counted)

    def program():
        r = world().rank
        plan = str(world().explain("all_to_all", dtype=torch.float64, uneven=True))
        assert (
            f"all_to_all float64 cpu uneven ⇐ {'padded_all_gather' if collective == 'all_gather' else 'broadcasts'}"
            in plan
        )
        x = torch.cat(
            [
                torch.arange(count, dtype=torch.float64) + 10_000 * r + 100_000 * dst
                for dst, count in enumerate(matrix[r])
            ]
        )
        wanted = torch.cat(
            [torch.arange(row[r], dtype=torch.float64) + 10_000 * src + 100_000 * r for src, row in enumerate(matrix)]
        )
        got = all_to_all(x, input_splits=matrix[r], output_splits=[row[r] for row in matrix])
        assert torch.equal(got, wanted)

    run_local(program, RANKS, disable=disable, timeout=20)
    assert all(size <= workspace for size in calls), f"{max(calls)} bytes in one call, of {workspace}"
    if collective == "all_gather":
        longest = max(map(max, matrix)) * 8
        rounds = -(-longest * RANKS * (RANKS + 1) // workspace)
        assert rounds - 1 <= len(calls) <= 2 * rounds + 1, f"{len(calls)} rounds, expected about {rounds}"


def test_what_it_holds(monkeypatch):
    """All that one rank allocates during the call, metadata aside."""
    workspace = 1 << 14
    monkeypatch.setattr(module, "WORKSPACE", workspace)
    matrix = loads("one pair")
    peaks, lock = [], threading.Lock()

    def program():
        r = world().rank
        x = torch.zeros(sum(matrix[r]), dtype=torch.float64)
        out = torch.empty(sum(row[r] for row in matrix), dtype=torch.float64)
        splits = {"input_splits": matrix[r], "output_splits": [row[r] for row in matrix]}
        with Held() as held:
            all_to_all(x, out=out, **splits)
        with lock:
            peaks.append(held.total)

    run_local(program, RANKS, disable=ONLY_GATHER, timeout=20)
    assert len(peaks) == RANKS
    assert max(peaks) <= workspace + 1024, f"{max(peaks)} bytes held, of {workspace}"
    assert max(peaks) > workspace / 2, "the measure measures nothing"

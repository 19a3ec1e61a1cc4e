"""What goes through shared memory, against NumPy, one operation after another, ordinary and symmetric tensors mixed."""

import hashlib
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import commlayer
from commlayer.backends.shared.rounds import HALF, LARGE, SMALL
from tests.contracts.checks import assert_alike, make_group
from tests.contracts.shared import Arena, Started, shared_cases, small_limits, without_kernel

EXAMPLES = int(os.environ.get("COMMLAYER_TEST_EXAMPLES", "80")) // 2
ON_ALL = ("world", "reversed", "python")
NAMES = (*ON_ALL, "odd", "split")


@pytest.fixture(scope="module")
def places(everyone):
    """Groups with small slots, and symmetric memory of each; "python" has no compiled kernel."""
    if everyone.shared is None:
        pytest.skip("these ranks share no memory: a profile is replayed, or COMMLAYER_SHM=0")
    with small_limits():
        groups = {name: make_group(everyone, name) for name in ("reversed", "odd", "split")}
        groups["world"] = everyone.new_group(list(range(everyone.size)))
        groups["python"] = without_kernel(everyone)
        yield {name: (group, Arena(group)) for name, group in groups.items()}
        for group in groups.values():
            group.close()


todo = st.tuples(
    st.lists(
        st.tuples(shared_cases(NAMES), st.sampled_from(["none", "all", "all", "some"]), st.sampled_from("kkkd")),
        min_size=2,
        max_size=7,
    ),
    st.integers(0, 1000),
)
seldom = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking would run on after a failure left ranks apart
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)


@seldom
@given(todo=todo)
def test_one_after_another(everyone, places, agreed, todo):
    """Those under way at once are waited for in another order on every rank, or not at all."""
    calls, seed = todo

    def run():
        rng = np.random.default_rng((seed, everyone.rank))
        under_way, results = [], {}
        for _, arena in places.values():
            arena.clear()
        for number, (case, symmetric, kept) in enumerate(calls):
            group, arena = places[case.group]
            if not group.is_member:
                continue
            started = Started(case, group, arena, symmetric)
            if not case.async_op:
                results[number] = started.finish()
            elif kept == "k":
                under_way.append((number, started))
            else:
                started.drop()
        for place in rng.permutation(len(under_way)):
            number, started = under_way[place]
            results[number] = started.finish()
        for group, _ in places.values():  # so that no other example meets what nobody has waited for
            if group.is_member:
                commlayer.barrier(group=group)
        mine = [results.get(number, b"") for number, call in enumerate(calls) if call[0].group in ON_ALL]
        digest = hashlib.sha256(b"".join(b"%d %b" % (len(part), part) for part in mine)).digest()
        assert_alike(everyone._comm.share(digest), "results")

    agreed(run, str(todo))


@seldom
@given(case=shared_cases(("world",)), symmetric=st.sampled_from(["none", "all", "some"]))
def test_without_a_compiler_the_same_bits(everyone, places, agreed, case, symmetric):
    def run():
        got = []
        for name in ("world", "python"):
            group, arena = places[name]
            arena.clear()
            got.append(Started(case, group, arena, symmetric).finish())
        assert got[0] == got[1]

    agreed(run, str(case))


def test_the_kernel_is_used_where_there_is_one(everyone, places):
    assert not places["python"][0].shared.kernel
    assert places["world"][0].shared.kernel == everyone.shared.kernel


def values(rank, count, dtype):
    """Small whole numbers, which differ by rank and place, and whose sums every dtype holds."""
    return (torch.arange(count) * (2 * rank + 3) % 13 + rank).to(dtype)


def placed(x, symmetric, group):
    if not symmetric:
        return x
    buffer = commlayer.empty_symmetric(x.numel() + 5, x.dtype, group)[5:]
    return buffer.copy_(x)


@pytest.mark.parametrize("symmetric", ["none", "all", "odd ranks"])
@pytest.mark.parametrize(
    "size",
    [SMALL, SMALL + 64, HALF - 64, HALF + 4, 3 * HALF + 20, LARGE + 8],
    ids=["SMALL", "above SMALL", "below HALF", "above HALF", "several halves", "LARGE"],
)
def test_around_the_true_limits(everyone, agreed, size, symmetric):
    if everyone.shared is None:
        pytest.skip("these ranks share no memory")
    n, r = everyone.size, everyone.rank
    special = symmetric == "all" or (symmetric == "odd ranks" and r % 2 == 1)
    count = size // 4 // n * n
    share = count // n
    every = [values(rank, count, torch.float32) for rank in range(n)]
    total = sum(every)
    own = slice(r * share, (r + 1) * share)
    # The same number of buffers on all ranks, whether they use them or not.
    x, y = placed(every[r], True, everyone), placed(torch.zeros(count), True, everyone)
    if not special:
        x, y = x.clone(), y.clone()

    def compare():
        assert torch.equal(commlayer.all_reduce(x), total)
        assert commlayer.all_reduce(x, out=y) is y
        assert torch.equal(y, total)
        reduced = commlayer.reduce(x, dst=n - 1)
        assert reduced is None or torch.equal(reduced, total)
        assert torch.equal(commlayer.reduce_scatter(x, "max"), torch.stack(every).amax(0)[own])
        assert torch.equal(commlayer.reduce_scatter(x, out=y[:share]), total[own])
        assert torch.equal(
            commlayer.all_gather(x[own]), torch.cat([theirs[: n * share][own_of(q)] for q, theirs in enumerate(every)])
        )
        y.copy_(every[r])
        assert torch.equal(
            commlayer.all_gather(y[own], out=y), torch.cat([theirs[own_of(q)] for q, theirs in enumerate(every)])
        )
        sent = torch.cat([theirs[own] for theirs in every])
        assert torch.equal(commlayer.all_to_all(x, out=y), sent)
        splits = [[(q + p) % 2 * 2 * share if p < n // 2 * 2 else share for p in range(n)] for q in range(n)]
        parts = [
            torch.cat([theirs, theirs])[: sum(row)].split(row)[r] for row, theirs in zip(splits, every, strict=True)
        ]
        mine = torch.cat([x, x])[: sum(splits[r])]
        took = commlayer.all_to_all(mine, input_splits=splits[r], output_splits=[row[r] for row in splits])
        assert torch.equal(took, torch.cat(parts))
        assert torch.equal(commlayer.broadcast(x, src=n - 1), every[n - 1])
        gathered = commlayer.gather(x[own], dst=n - 1)
        assert gathered is None or torch.equal(
            gathered, torch.cat([theirs[own_of(q)] for q, theirs in enumerate(every)])
        )
        assert torch.equal(commlayer.scatter(x, src=n - 1), every[n - 1][own])
        assert torch.equal(x, every[r])
        y.copy_(every[r])
        assert torch.equal(commlayer.all_reduce(y, out=y), total)
        y.copy_(every[r])
        assert torch.equal(commlayer.broadcast(y, src=0, out=y), every[0])

    def own_of(rank):
        return slice(rank * share, (rank + 1) * share)

    agreed(compare)

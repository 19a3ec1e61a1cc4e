"""What goes through shared memory, against NumPy, one operation after another, ordinary and symmetric tensors mixed."""

import hashlib
import os
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import commlayer
from commlayer.backends.shared import channel, rounds, sums
from commlayer.backends.shared.rounds import HALF, LARGE, SMALL
from tests.contracts.checks import assert_alike, check_halves, check_inference, check_order, make_group
from tests.contracts.shared import Arena, Started, otherwise, shared_cases, small_limits

EXAMPLES = int(os.environ.get("COMMLAYER_TEST_EXAMPLES", "80")) // 2
ON_ALL = ("world", "reversed", "python", "hosts")  # groups of all ranks
NAMES = (*ON_ALL, "odd", "split")


@pytest.fixture(scope="module")
def places(everyone):
    """Groups with small slots, and symmetric memory of each; "python" has no compiled kernel, "hosts" two hosts."""
    if everyone.shared is None:
        pytest.skip("these ranks share no memory: a profile is replayed, or COMMLAYER_SHM=0")
    with small_limits():
        groups = {name: make_group(everyone, name) for name in ("reversed", "odd", "split")}
        groups["world"] = everyone.new_group(list(range(everyone.size)))
        groups["python"] = otherwise(everyone, compiled=False)
        groups["hosts"] = otherwise(everyone, places=tuple(rank % 2 for rank in range(everyone.size)))
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


def test_the_ways_are_those_meant(everyone, places):
    assert not places["python"][0].shared.kernel
    assert places["world"][0].shared.kernel == everyone.shared.kernel
    for name, (group, _) in places.items():
        if group.is_member and group.size > 1 and (name != "hosts" or (group.size % 2 == 0 and group.size > 2)):
            assert group.explain("all_reduce").plan.shared_from == 0, name
    assert places["hosts"][0].shared is None


@pytest.mark.parametrize("name", ["world", "python", "hosts"])
@pytest.mark.parametrize("function", [check_halves, check_inference, check_order])
def test_by_hand(places, agreed, function, name):
    agreed(lambda: function(places[name][0]))


@pytest.mark.parametrize("slow", [0, -1])
@pytest.mark.parametrize("symmetric", ["both", "x", "out", "neither"])
@pytest.mark.parametrize("count", [4, 100])
def test_who_has_returned_may_go_on_at_once(everyone, places, agreed, monkeypatch, count, symmetric, slow):
    """One rank is slow to read and to add up; the others overwrite what they brought, and read what they got."""

    def late(action):
        def delayed(*args):
            time.sleep(0.002)
            return action(*args)

        return delayed

    if everyone.rank == slow % everyone.size:
        monkeypatch.setattr(rounds, "_copy", late(rounds._copy))
        monkeypatch.setattr(channel, "reducer", lambda *args: late(sums.reducer(*args)))
    group = everyone.new_group(list(range(everyone.size)))
    n, r = group.size, group.rank
    x, out = (commlayer.empty_symmetric(count * n, group=group) for _ in range(2))
    x = x if symmetric in ("both", "x") else torch.empty_like(x)
    out = out if symmetric in ("both", "out") else torch.empty_like(out)
    share = slice(count * r, count * r + count)
    # What is called with rank q's 10 * step + q, and what rank r then has.
    calls = [
        (lambda: commlayer.all_reduce(x, group=group), lambda v: [sum(v)]),
        (lambda: commlayer.all_reduce(x, group=group, out=out), lambda v: [sum(v)]),
        (lambda: commlayer.reduce(x, group=group, dst=n - 1), lambda v: [sum(v)] if r == n - 1 else None),
        (lambda: commlayer.reduce(x, group=group, out=out), lambda v: [sum(v)] if r == 0 else None),
        (lambda: commlayer.reduce_scatter(x, group=group), lambda v: [sum(v)]),
        (lambda: commlayer.all_gather(x[share], group=group, out=out), lambda v: v),
        (lambda: commlayer.all_to_all(x, group=group, out=out), lambda v: v),
        (lambda: commlayer.broadcast(x, src=n - 1, group=group), lambda v: [v[n - 1]]),
        (lambda: commlayer.gather(x[share], dst=n - 1, group=group), lambda v: v if r == n - 1 else None),
        (lambda: commlayer.scatter(x, src=n - 1, group=group), lambda v: [v[n - 1]]),
    ]

    def run():
        for step, (call, expected) in enumerate(calls * 2):
            values = [10.0 * step + rank for rank in range(n)]
            x.fill_(values[r])
            result = call()
            x.fill_(-1)
            wanted = expected(values)
            got = None if result is None else result.clone()
            out.fill_(-2)
            assert (got is None) == (wanted is None)
            if got is not None:
                assert got.view(len(wanted), -1).unique(dim=1).flatten().tolist() == wanted, step
        group.close()

    agreed(run)


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

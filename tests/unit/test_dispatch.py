"""Tokens that carry who they are and where they go: each arrives at its experts, and comes home to its place.

Values are small integers in float64, so everything is exact.
"""

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import commlayer
from commlayer import Mesh, run_local
from commlayer.backends.threads import Threads
from parallel.dispatch import Dispatcher
from tests.contracts.moe import PLANS


@dataclass(frozen=True)
class Routed:
    """Who goes where: ``tokens`` on each rank, drawn from ``seed``, with ``kind`` of skew."""

    etp: int
    ep: int
    edp: int
    experts: int
    top_k: int
    tokens: tuple[int, ...]
    capacity_factor: float
    kind: str
    seed: int
    plan: str = "native"

    @property
    def choices(self):
        """Of each rank: T × K."""
        generator = torch.Generator().manual_seed(self.seed)
        found = []
        for rank, count in enumerate(self.tokens):
            weights = torch.ones(self.experts)
            if self.kind == "hot":
                weights[self.experts - 1] = 1e4
            elif self.kind == "own":  # a favourite of each rank
                weights[(rank + self.seed) % self.experts] = 1e4
            rows = [torch.multinomial(weights, self.top_k, generator=generator) for _ in range(count)]
            found.append(torch.stack(rows) if rows else torch.zeros(0, self.top_k, dtype=torch.int64))
        return found

    @property
    def weights(self):
        generator = torch.Generator().manual_seed(self.seed + 1)
        return [torch.randint(1, 9, (n, self.top_k), generator=generator).double() for n in self.tokens]

    @property
    def kept(self):
        """Of each rank: which choices are taken, in the order of ranks, tokens, choices."""
        room = math.inf
        if self.capacity_factor:
            room = math.ceil(Fraction(str(self.capacity_factor)) * sum(self.tokens) * self.top_k / self.experts)
        taken, found = Counter(), []
        for choices in self.choices:
            found.append(torch.zeros(choices.shape))
            for t, row in enumerate(choices.tolist()):
                for k, expert in enumerate(row):
                    taken[expert] += 1
                    found[-1][t, k] = taken[expert] <= room
        return found


@st.composite
def routed(draw):
    etp, ep, edp = draw(
        st.sampled_from(
            [(1, 1, 1), (1, 2, 1), (1, 3, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (3, 1, 1), (2, 3, 1)]
        )
    )
    experts = draw(st.integers(ep, 3 * ep + 1))
    top_k = draw(st.integers(1, min(experts, 6)))
    tokens = tuple(draw(st.sampled_from([0, 1, 2, 5, 9])) for _ in range(etp * ep * edp))
    return Routed(
        etp, ep, edp, experts, top_k, tokens,
        draw(st.sampled_from([0.0, 0.25, 1.0, 1.1, 1.5])), draw(st.sampled_from(["even", "hot", "own"])),
        draw(st.integers(0, 1000)), draw(st.sampled_from(list(PLANS))),
    )  # fmt: skip


def check(case):
    mesh = Mesh(f"dp={len(case.tokens)}").fold(f"etp={case.etp} ep={case.ep}")
    me = commlayer.world().rank
    dispatcher = Dispatcher(case.experts, mesh)
    choices, weights, kept = case.choices, case.weights, case.kept
    before = choices[me].clone()
    routes = dispatcher.plan(choices[me], case.capacity_factor)
    assert torch.equal(choices[me], before)
    assert routes.chosen.tolist() == choices[me].flatten().bincount(minlength=case.experts).tolist()

    assert routes.ends.dtype == torch.int32
    assert routes.ends.tolist() == [sum(routes.rows[: i + 1]) for i in range(len(routes.rows))]

    # A token: its rank, its place, and where it goes.
    home = [torch.arange(n).double() for n in case.tokens]
    whole = [
        torch.cat([torch.full((n, 1), float(r)), home[r].unsqueeze(1), choices[r].double()], 1)
        for r, n in enumerate(case.tokens)
    ]
    x, weight = whole[me].clone().requires_grad_(), weights[me].clone().requires_grad_()
    rows = dispatcher.dispatch(x, routes)
    ep, edp = mesh.rank("ep"), mesh.rank("edp")
    experts = range(sum(dispatcher.sizes[:ep]), sum(dispatcher.sizes[: ep + 1]))
    near = mesh.ranks("etp-ep", me)
    assert len(near) == case.etp * case.ep
    assert all(mesh.coords(r)["edp"] == edp for r in near)
    for expert, part in zip(experts, rows.detach().split(routes.rows), strict=True):
        wanted = [whole[r][(kept[r] * (choices[r] == expert)).any(1)] for r in near]
        assert sorted(part.tolist()) == sorted(torch.cat(wanted).tolist()), f"expert {expert}"

    # Expert x multiplies by x + 1; over etp, partial sums.
    factors = torch.cat([torch.full((n, 1), expert + 1.0) for expert, n in zip(experts, routes.rows, strict=True)])
    last = mesh.rank("etp") == case.etp - 1
    y = dispatcher.combine(rows * factors * last, weight, routes)
    scale = weights[me] * kept[me] * (choices[me] + 1)
    assert torch.equal(y, scale.sum(1, keepdim=True) * whole[me])
    v = torch.arange(y.numel()).view(y.shape).double() % 7
    y.backward(v)
    assert torch.equal(x.grad, scale.sum(1, keepdim=True) * v)
    assert torch.equal(weight.grad, kept[me] * (choices[me] + 1) * (whole[me] * v).sum(1, keepdim=True))


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
    report_multiple_bugs=False,
)
@given(routed())
def test_trap_5_tokens_arrive_at_their_experts_and_come_home(case):
    run_local(lambda: check(case), len(case.tokens), timeout=20, **PLANS[case.plan])


@pytest.mark.parametrize("plan", PLANS)
def test_the_plan_is_really_taken(monkeypatch, plan):
    """By what reaches the backend while rows are under way."""
    case = Routed(1, 4, 1, 8, 3, (5, 0, 2, 9), 0.0, "own", 1)
    messages = {"send", "recv"}  # by which thread ranks do both
    leaves = {"native": {"all_to_all"}, "pairwise": {"exchange"} | messages, "post": {"post", "fetch"} | messages}
    leaves |= {"padded_all_gather": {"all_gather"}, "broadcasts": {"broadcast"}, "sum_with_zeros": {"all_reduce"}}
    seen = [set() for _ in range(4)]

    def spied(name, function):
        def call(self, *args):
            seen[commlayer.world().rank].add(name)
            return function(self, *args)

        return call

    for name in ("all_to_all", "exchange", "post", "fetch", "all_gather", "broadcast", "all_reduce", "send", "recv"):
        monkeypatch.setattr(Threads, name, spied(name, getattr(Threads, name)))

    def rank():
        mesh = Mesh("dp=4").fold("ep=4")
        me = commlayer.world().rank
        assert plan == "native" or plan in str(mesh["ep"].explain("all_to_all", dtype=torch.float64, uneven=True))
        dispatcher = Dispatcher(8, mesh)
        routes = dispatcher.plan(case.choices[me])
        commlayer.barrier()
        seen[me].clear()
        dispatcher.dispatch(torch.ones(case.tokens[me], 2, dtype=torch.float64), routes)
        return set(seen[me])

    assert set().union(*run_local(rank, 4, **PLANS[plan])) == leaves[plan]


@pytest.mark.parametrize(("capacity_factor", "everyone", "group"), [(0.0, False, 2), (0.0, True, 4), (1.0, False, 4)])
def test_counts_are_exchanged_once_with_those_who_must_know(monkeypatch, capacity_factor, everyone, group):
    calls, real = [], commlayer.all_gather

    def spy(x, *, group):
        calls.append((group.size, x.dtype, x.numel(), x.requires_grad))
        return real(x, group=group)

    monkeypatch.setattr(commlayer, "all_gather", spy)
    choices = torch.tensor([[0, 1], [3, 1]])

    def rank():
        routes = Dispatcher(5, Mesh("dp=4").fold("ep=2")).plan(choices, capacity_factor, everyone)
        assert routes.chosen_by_all.tolist() == [group, 2 * group, 0, group, 0]
        return routes.chosen.tolist()

    assert run_local(rank, 4) == [[1, 2, 0, 1, 0]] * 4
    assert calls == [(group, torch.int64, 5, False)] * 4


@pytest.mark.parametrize(
    ("factor", "taken"), [(1.1, 11), (1.0, 10), (0.7, 7), (1.01, 11), (0.01, 1), (2.0, 20), (9.0, 20)]
)
def test_room_is_the_factor_times_the_mean_rounded_up(factor, taken):
    """As it is written: 1.1 · 10 is 11, though as binary numbers a little more."""
    choices = torch.tensor([[0]] * 20)
    routes = Dispatcher(2).plan(choices, factor)
    assert routes.rows == (taken, 0)
    assert routes.pairs.tolist() == list(range(taken))


def test_routes_never_change():
    routes = Dispatcher(3).plan(torch.tensor([[0], [2]]))
    with pytest.raises(AttributeError, match="cannot assign"):
        routes.rows = (1, 1, 1)


@pytest.mark.parametrize(("factor", "limit"), [(4 / 3, 14), (1.1, 11), (1e-9, 1), (1e30, 100), (0.95, 10), (1e-5, 1)])
def test_the_capacity_is_exact_and_overflows_nowhere(factor, limit):
    """Of 100 choices of 10 experts; all want the first."""
    choices = torch.zeros(100, 1, dtype=torch.int64)
    assert len(Dispatcher(10).plan(choices, factor).pairs) == limit


def test_too_few_experts():
    def rank():
        with pytest.raises(ValueError, match="experts: 2 are too few for 3 ranks of ep"):
            Dispatcher(2, Mesh("dp=3").fold("ep=3"))

    run_local(rank, 3)

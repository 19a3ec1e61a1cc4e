"""What ZeRO keeps alive: bytes of tensors, counted on thread ranks."""

import gc
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import commlayer
from benchmarks.memory import Alive
from commlayer import run_local
from parallel import ZeRO
from parallel.recompute import checkpoint
from tests.contracts.tensor import drawn

LOCK = threading.RLock()  # finalizers come at any time
RANKS, WIDTH, DEPTH = 4, 64, 16
UNIT = WIDTH * WIDTH * 4  # bytes of the weight of a unit
MODEL = UNIT * DEPTH
SLACK = UNIT  # activations, biases, a flag here and there


class Deep(nn.Module):
    """All parameters are in equal units."""

    def __init__(self, recompute=False):
        super().__init__()
        self.units = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
        self.recompute = recompute

    def forward(self, x):
        for unit in self.units:
            x = checkpoint(lambda y, unit=unit: unit(y).sin(), x) if self.recompute else unit(x).sin()
        return x


class Counting(TorchDispatchMode):
    """Into one account for all ranks: some of what threads exchange is made by the one that comes last."""

    def __init__(self, account):
        super().__init__()
        self.account = account

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        with LOCK:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.account._count(leaf.untyped_storage())
        return result


class Share:
    """Of one rank, on average."""

    def __init__(self):
        self.account = Alive()

    @property
    def now(self):
        """When all ranks have come here."""
        commlayer.barrier()
        if commlayer.world().rank == 0:
            gc.collect()
        commlayer.barrier()
        found = self.account.now / RANKS
        commlayer.barrier()
        return found

    @property
    def peak(self):
        commlayer.barrier()
        return self.account.peak / RANKS

    def start(self):
        """Forget the peak; what there is now."""
        now = self.now
        self.account.peak = self.account.now
        commlayer.barrier()
        return now


def counted(step, stage, bucket_mb=UNIT / 2**20, recompute=False, **options):
    """``step(model, alive)`` on each rank, after one to make all that comes to stay. Counts of the first rank."""

    alive = Share()

    def rank():
        with Counting(alive.account):
            net = drawn(lambda: Deep(recompute))
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            model = ZeRO(net, optimizer, stage=stage, bucket_mb=bucket_mb, **options)
            model(torch.ones(1, WIDTH)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            return step(model, optimizer, alive)

    return run_local(rank, ranks=RANKS)[0]


def between(model, optimizer, alive):
    return alive.now


@pytest.mark.parametrize(("stage", "share"), [(1, 2.0), (2, 1.0), (3, 1 / RANKS)])
def test_between_steps(stage, share):
    """Parameters whole or cut; in stage 1 the vectors of gradients, too."""
    assert counted(between, stage) == pytest.approx(MODEL * share, abs=SLACK)


def backward(model, optimizer, alive):
    before = alive.start()
    model(torch.ones(1, WIDTH)).sum().backward()
    return alive.peak - before, alive.now - before


def test_gradients_of_stage_2_never_live_whole():
    """My share of them, and those of four buckets at most: one that fills, two on their way, one in torch's hands."""
    peak, left = counted(backward, 2)
    assert left == pytest.approx(MODEL / RANKS, abs=SLACK)
    assert peak <= MODEL / RANKS + 4.5 * UNIT + SLACK
    assert peak >= UNIT  # or nothing was counted
    assert MODEL > MODEL / RANKS + 4.5 * UNIT + SLACK


@pytest.mark.parametrize("recompute", [False, True])
def test_stage_3_has_a_few_units_at_a_time(recompute):
    """This unit, the next, and gradients of a few."""
    peak, left = counted(backward, 3, recompute=recompute)
    assert left == pytest.approx(MODEL / RANKS, abs=SLACK)
    assert UNIT <= peak <= MODEL / RANKS + 6.5 * UNIT + SLACK
    assert 2 * MODEL > MODEL / RANKS + 6.5 * UNIT + SLACK


def forward(model, optimizer, alive):
    before = alive.start()
    out = model(torch.ones(1, WIDTH))
    kept, peak = alive.now - before, alive.peak - before
    del out
    return kept, peak, alive.now - before


def test_after_forward_autograd_keeps_no_gathered_weights():
    """But for the last unit, with which backward begins."""
    kept, peak, left = counted(forward, 3)
    assert kept <= UNIT + SLACK
    assert peak <= 3 * UNIT + SLACK
    assert left <= UNIT + SLACK


def evaluation(model, optimizer, alive):
    before = alive.start()
    with torch.no_grad():
        model(torch.ones(1, WIDTH))
    return alive.peak - before, alive.now - before


def test_evaluation_leaves_nothing():
    peak, left = counted(evaluation, 3)
    assert UNIT <= peak <= 3 * UNIT + SLACK
    assert left <= SLACK


def inside(model, optimizer, alive):
    before = alive.now
    with model.gathered():
        whole = alive.now - before
    return whole, alive.now - before


def test_gathered_is_whole_inside_and_nothing_afterwards():
    whole, left = counted(inside, 3)
    assert whole == pytest.approx(MODEL, abs=SLACK)
    assert left <= SLACK


def two_backwards(model, optimizer, alive):
    before = alive.start()
    for _ in range(3):
        model(torch.ones(1, WIDTH)).sum().backward()
    return alive.peak - before, alive.now - before


def test_accumulation_with_communication_keeps_a_share():
    peak, left = counted(two_backwards, 2)
    assert left == pytest.approx(MODEL / RANKS, abs=SLACK)
    assert peak <= 2 * MODEL / RANKS + 3.5 * UNIT + SLACK  # what comes is added at the end


def test_state_of_the_optimizer_is_a_share():
    def rank(stage):
        net = drawn(Deep)
        optimizer = torch.optim.AdamW(net.parameters())
        model = ZeRO(net, optimizer, stage=stage, dtype=torch.bfloat16)
        model(torch.ones(1, WIDTH)).sum().backward()
        optimizer.step()
        state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
        masters = sum(p.nbytes for p in model.parameters())
        return state, masters

    for stage in (1, 2, 3):
        for state, masters in run_local(lambda stage=stage: rank(stage), ranks=RANKS):
            assert masters == MODEL / RANKS
            assert state == 2 * MODEL / RANKS


@pytest.mark.parametrize(("stage", "share"), [(1, 1.0), (2, 1.0), (3, 1 / RANKS)])
def test_a_model_from_meta_never_lives_whole(stage, share):
    """Stage 3: my share, the parameter that is drawn, and its copies on the way. Else the model that stays, no more."""

    def init(model):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)

    alive = Share()

    def rank():
        with torch.device("meta"):
            net = Deep()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with Counting(alive.account):
            model = ZeRO(net, optimizer, stage=stage, init=init, bucket_mb=UNIT / 2**20)
            peak, now = alive.peak, alive.now
        assert model is not None
        return peak, now

    peak, now = run_local(rank, ranks=RANKS)[0]
    assert now == pytest.approx(MODEL * share, abs=SLACK)
    assert peak <= MODEL * share + 4.5 * UNIT + SLACK

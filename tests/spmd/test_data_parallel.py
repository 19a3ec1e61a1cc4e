"""DataParallel between processes, on whatever backend the environment chooses.

Run under a launcher: ``mpiexec -n 4 python -m pytest --with-mpi tests/spmd`` or torchrun with ``-m pytest``.
The finer points are tested on thread ranks, in tests/unit.
"""

from itertools import pairwise

import pytest
import torch
from torch import nn

import commlayer
from parallel.data import DataParallel

TINY, LARGE = 1e-6, 25.0  # MiB: a bucket per parameter, and one for all
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(scope="module")
def world():
    return commlayer.init()


class Net(nn.Module):
    """Two ways through; the tied weight is on both."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(5, 7)
        self.tied = nn.Linear(7, 7, bias=False)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.left, self.right, self.never = nn.Linear(7, 3), nn.Linear(7, 3), nn.Linear(7, 3)
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.norm = nn.BatchNorm1d(7).eval()
        self.double()
        for p in self.parameters():
            p.data.normal_(generator=generator)

    def forward(self, x, right=False):
        h = torch.tanh(self.tied(torch.tanh(self.tied(self.frozen(self.norm(self.first(x)))))))
        return (self.right if right else self.left)(h) + self.empty.sum()


def shares(world):
    """Uneven batches, none for the last rank of three or more: all samples, and one slice per rank."""
    sizes = [3 - r % 2 for r in range(world.size)]
    if world.size > 2:
        sizes[-1] = 0
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), 5, generator=generator, dtype=torch.float64)
    y = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    starts = [sum(sizes[:r]) for r in range(world.size + 1)]
    return x, y, [slice(a, b) for a, b in pairwise(starts)]


def assert_gradients(model, reference, **tolerance):
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad.to(p.device), msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def assert_alike(model, world):
    """The same bits on every rank."""
    for name, p in model.named_parameters():
        for t in (p, p.grad):
            if t is not None and t.numel():
                low, high = (commlayer.all_reduce(t.detach(), op, group=world) for op in (commlayer.MIN, commlayer.MAX))
                assert torch.equal(low, high), name


@pytest.mark.parametrize("bucket_mb", [TINY, 4e-4, LARGE])
def test_gradients_equal_the_serial_ones(world, bucket_mb):
    x, y, parts = shares(world)
    reference = Net()
    # Every rank starts from its own numbers, and must get those of rank 0.
    model = DataParallel(Net(seed=world.rank).to(world.device), bucket_mb=bucket_mb)
    for step in range(2):
        model.zero_grad(set_to_none=step == 0)
        reference.zero_grad(set_to_none=step == 0)
        mine, right = parts[world.rank], step == 1 and world.rank == 1
        out = model(x[mine].to(world.device), right)
        ((out - y[mine].to(world.device)).square().sum() * world.size / len(x)).backward()
        for r, part in enumerate(parts):  # the second step goes right on rank 1 alone
            ((reference(x[part], step == 1 and r == 1) - y[part]).square().sum() / len(x)).backward()
        assert_gradients(model.module, reference, **CLOSE)
        assert_alike(model.module, world)
    assert model.module.never.weight.grad is None


def test_accumulation_without_communication(world):
    x, y, parts = shares(world)
    reference = Net()
    model = DataParallel(Net().to(world.device), bucket_mb=4e-4)
    mine = parts[world.rank]
    for piece, last in ((slice(mine.start, mine.start + 1), False), (slice(mine.start + 1, mine.stop), True)):
        piece = slice(piece.start, min(piece.stop, mine.stop))
        loss = (model(x[piece].to(world.device)) - y[piece].to(world.device)).square().sum() * world.size / len(x)
        if last:
            loss.backward()
        else:
            with model.no_sync():
                loss.backward()
    ((reference(x) - y).square().sum() / len(x)).backward()
    assert_gradients(model.module, reference, **CLOSE)


def test_training_follows_the_serial_run(world):
    x, y, parts = shares(world)
    reference = Net()
    model = DataParallel(Net(seed=world.rank).to(world.device), bucket_mb=4e-4)
    for m, part, ranks in ((model, parts[world.rank], world.size), (reference, slice(None), 1)):
        device = next(m.parameters()).device
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            ((m(x[part].to(device)) - y[part].to(device)).square().sum() * ranks / len(x)).backward()
            optimizer.step()
    for (name, p), q in zip(model.module.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert_alike(model.module, world)


def test_half_precision_and_many_buckets(world):
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(16, 16, bias=i % 2 == 0) for i in range(8)]).bfloat16()
    model = DataParallel(net.to(world.device), bucket_mb=1e-3)
    model(torch.full((2, 16), 0.5 + world.rank, dtype=torch.bfloat16, device=world.device)).sum().backward()
    assert world.size == 1 or len(model._buckets) > 3
    assert_alike(model.module, world)
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


def test_ranks_with_different_modules_are_all_told(world):
    if world.size == 1:
        pytest.skip("needs two ranks")
    with pytest.raises(ValueError, match=r"rank 0 has weight: float32 \[3, 2\], rank 1 has weight: float32 \[4, 2\]"):
        DataParallel(nn.Linear(2, 3 + (world.rank == 1)).to(world.device))

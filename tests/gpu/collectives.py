"""Cases and checks that go with a GPU: functions of a group, on any device."""

from dataclasses import replace

import pytest
import torch

import commlayer as c
from commlayer.capability import REDUCING
from tests.contracts.cases import SPLITTING, Case
from tests.contracts.oracle import reductions

# Elements: with the size NCCL changes its protocol (LL, LL128, Simple) and its chunks, whose ends may go wrong.
SIZES = (1, 3, 1000, 2**14 + 1, 2**17 - 1, 2**20 + 3, 2**22 + 5)


def without_tags(case):
    """The same with tag 0, the only one that NCCL has."""
    return replace(case, seed=case.seed - case.seed % 5)


def every_reduction(op, dtype):
    """A plain case of the op with each reduction that it has on this dtype, even and uneven where it is cut."""
    shape, names = (3, 4), reductions(dtype) if op in REDUCING else [None]
    splits = ["even", "uneven"] if op in SPLITTING else ["even"]
    for name in names:
        kind = "near_one" if name == "product" else "values" if name else "bits"
        for split in splits:
            yield Case(op, dtype, shape, 35, name, splits=split, root=1, kind=kind)
        if name in ("min", "max"):
            yield Case(op, dtype, shape, 40, name, kind="special")


def check_sizes(group):
    """Sums of whole numbers are exact at every size, on every path of NCCL; so is what is only moved."""
    n, me = group.size, group.rank
    for size in SIZES:
        x = torch.arange(size, device=group.device, dtype=torch.float32).remainder(251)
        assert torch.equal(c.all_reduce(x + me, group=group), x * n + n * (n - 1) / 2), size
        gathered = c.all_gather(x + me, group=group).view(n, size)
        assert torch.equal(gathered, x + torch.arange(n, device=group.device)[:, None]), size
        parts = (x + me).repeat(n)
        assert torch.equal(c.reduce_scatter(parts, group=group), x * n + n * (n - 1) / 2), size
        assert torch.equal(c.all_to_all(parts, group=group).view(n, size), gathered), size
        assert torch.equal(c.broadcast(x + me, src=n - 1, group=group), x + (n - 1)), size


def check_messages(group):
    """send and recv between neighbours, even ranks first; then sendrecv of messages larger than any buffer."""
    n, me = group.size, group.rank
    partner, left, right = me ^ 1, (me - 1) % n, (me + 1) % n
    for size in (1, 5, 2**22):
        mine, theirs = (torch.full((size,), value, device=group.device) for value in (float(me), -1.0))
        if partner < n and me % 2 == 0:
            c.send(mine, partner, group=group)
            c.recv(theirs, partner, group=group)
        elif partner < n:
            c.recv(theirs, partner, group=group)
            c.send(mine, partner, group=group)
        assert theirs.eq(partner if partner < n else -1).all(), size
        assert c.sendrecv(mine, dst=right, src=left, group=group).eq(left).all(), size


def check_refusals(group):
    """A tensor elsewhere, and a tag where there are none: errors before anything is sent."""
    if group.device.type != "cpu":
        with pytest.raises(ValueError, match=rf"x: is on cpu, but backend {group.backend} works on {group.device}"):
            c.all_reduce(torch.ones(2), group=group)
        with pytest.raises(ValueError, match=r"out: is on cpu"):
            c.all_reduce(torch.ones(2, device=group.device), out=torch.ones(2), group=group)
    if group.backend == "nccl":
        peer = (group.rank + 1) % group.size
        with pytest.raises(c.UnsupportedOperation, match=r"tag: messages on nccl carry none.*got 3"):
            c.send(torch.ones(2, device=group.device), peer, 3, group=group)
    assert c.all_reduce(torch.ones((), device=group.device), group=group).item() == group.size

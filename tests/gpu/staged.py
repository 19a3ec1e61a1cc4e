"""Ranks that compute on GPUs and talk over Gloo, through tensors on the CPU: functions of a group and a device."""

import copy

import pytest
import torch
from torch import nn

import commlayer as c
from parallel import DataParallel
from tests.contracts.tensor import rand

CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def check_gradient_through_the_host(group, device):
    """To the CPU, over it, and back: one graph with the exact gradient."""
    factor = group.rank + 2.0
    x = rand(3, 4, seed=group.rank).to(device).requires_grad_()
    y = c.all_reduce((x * factor).cpu(), group=group).to(device)
    weights = [rand(3, 4, seed=50 + rank) for rank in range(group.size)]
    (y * weights[group.rank].to(device)).sum().backward()
    expected = sum(rand(3, 4, seed=rank) * (rank + 2.0) for rank in range(group.size))
    torch.testing.assert_close(y.detach().cpu(), expected, **CLOSE)
    torch.testing.assert_close(x.grad.cpu(), sum(weights) * factor, **CLOSE)


def check_step(group, device):
    """One step of SGD on gradients that are averaged as one vector on the CPU, against all samples on one process."""
    serial = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    for i, p in enumerate(serial.parameters()):
        p.data.copy_(rand(*p.shape, seed=i))
    model = copy.deepcopy(serial).to(device)
    inputs = [rand(4, 5, seed=100 + rank) for rank in range(group.size)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, serial)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(inputs[group.rank].to(device)).square().sum().backward()
        (sum(serial(x).square().sum() for x in inputs) / group.size).backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        mean = c.all_reduce(flat.cpu(), c.AVG, group=group).to(device)
        for p, part in zip(model.parameters(), mean.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad.copy_(part.view_as(p))
        for p, q in zip(model.parameters(), serial.parameters(), strict=True):
            torch.testing.assert_close(p.grad.cpu(), q.grad, **CLOSE)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(model.parameters(), serial.parameters(), strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), **CLOSE)


def check_refusals(group, device):
    """A tensor on a GPU is an error of every function, before anything is sent; so is a module for DataParallel."""
    if device.type != "cpu":
        x = torch.ones(2 * group.size, device=device)
        for function in (c.all_reduce, c.all_gather, c.reduce_scatter, c.all_to_all, c.broadcast, c.scatter, c.gather):
            with pytest.raises(ValueError, match=rf"x: is on {device}, but backend gloo works on cpu"):
                function(x, group=group)
        with pytest.raises(ValueError, match=rf"is on {device}, but backend gloo works on cpu"):
            DataParallel(nn.Linear(2, 2).to(device), group)
    assert c.all_reduce(torch.ones(()), group=group).item() == group.size


CHECKS = (check_gradient_through_the_host, check_step, check_refusals)

"""The seven mappings between processes, also inside a graph of torch.compile."""

import os

import pytest
import torch

from tests.contracts.mappings import cases, check


@pytest.mark.parametrize("total", [12, 13])
def test_values_and_gradients(everyone, agreed, total):
    for name, options, x, y, grad, wanted in cases(everyone, total):
        agreed(lambda c=(name, x, y, grad, wanted), o=options: check(*c, **o), name)


@pytest.mark.skipif("COMMLAYER_PROFILE" in os.environ, reason="the graphs are those without a profile")
def test_inside_a_graph(everyone, agreed):
    torch._dynamo.reset()
    for name, options, x, y, grad, wanted in [*cases(everyone, 13)][:6]:
        agreed(lambda c=(name, x, y, grad, wanted), o=options: check(*c, compiled=True, **o), name)
    *_, (name, options, x, y, grad, wanted) = cases(everyone, 13)
    agreed(lambda: check(name, x, y, grad, wanted, compiled=True, **options), name)

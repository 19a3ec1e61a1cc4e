"""The seven mappings between processes, also inside a graph of torch.compile."""

import os

import pytest
import torch

from commlayer import balanced_sizes
from parallel import gather_from_region, reduce_scatter_to_region, scatter_to_region
from tests.contracts.mappings import cases, check


@pytest.mark.parametrize("total", [12, 13])
def test_values_and_gradients(everyone, agreed, total):
    for name, options, x, y, grad, wanted in cases(everyone, total):
        agreed(lambda c=(name, x, y, grad, wanted), o=options: check(*c, **o), name)


@pytest.mark.skipif(bool(os.environ.get("COMMLAYER_PROFILE")), reason="the graphs are those without a profile")
def test_inside_a_graph(everyone, agreed):
    torch._dynamo.reset()
    for name, options, x, y, grad, wanted in [*cases(everyone, 13)][:6]:
        agreed(lambda c=(name, x, y, grad, wanted), o=options: check(*c, compiled=True, **o), name)
    *_, (name, options, x, y, grad, wanted) = cases(everyone, 13)
    agreed(lambda: check(name, x, y, grad, wanted, compiled=True, **options), name)


@pytest.mark.skipif(bool(os.environ.get("COMMLAYER_PROFILE")), reason="the graphs are those without a profile")
def test_one_graph_for_many_lengths(everyone, agreed):
    torch._dynamo.reset()

    def there_and_back(x, group):
        part = scatter_to_region(x, 0, group).sin()
        return reduce_scatter_to_region(
            gather_from_region(part, 0, group, balanced_sizes(len(x), group.size)), 0, group
        )

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 14, 23):
        x = torch.randn(length, 3, generator=torch.Generator().manual_seed(length)).requires_grad_()
        agreed(lambda x=x: torch.testing.assert_close(compiled(x, everyone), there_and_back(x.detach(), everyone)))

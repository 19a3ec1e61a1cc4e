"""Gathers and reduce-scatters around the size from which Gloo does them another way, against all ranks' inputs."""

import pytest
import torch

import commlayer


def of(rank, elements, dtype):
    return torch.randn(elements, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kib", [255, 256, 300])
def test_large_tensors(everyone, agreed, dtype, kib):
    rows = kib * 1024 // dtype.itemsize
    inputs = [of(rank, rows * everyone.size, dtype) for rank in range(everyone.size)]
    mine = inputs[everyone.rank]

    def compare():
        gathered = commlayer.all_gather(mine[:rows], async_op=True).wait()
        assert torch.equal(gathered, torch.cat([theirs[:rows] for theirs in inputs]))
        at = slice(everyone.rank * rows, (everyone.rank + 1) * rows)
        exact = sum(theirs[at].double() for theirs in inputs)
        before = mine.clone()
        summed = commlayer.reduce_scatter(mine, async_op=True).wait()
        assert torch.equal(mine, before)
        close = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(summed.double(), exact, **close)

    agreed(compare)

"""The seven mappings, on ranks that are threads, and what they refuse."""

import pytest
import torch

import commlayer
from commlayer import Group, run_local
from parallel import mappings
from parallel.mappings import reduce_scatter_to_region, scatter_to_region
from tests.contracts.mappings import cases, check


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("total", [12, 13, 4])
def test_values_and_gradients(ranks, total):
    def rank():
        for name, options, x, y, grad, wanted in cases(commlayer.world(), total):
            check(name, x, y, grad, wanted, **options)

    run_local(rank, ranks=ranks)


def test_second_derivatives():
    def rank():
        world = commlayer.world()
        x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(world.rank))
        x.requires_grad_()
        for name, options, given, *_ in cases(world, 6):
            call = getattr(mappings, name)
            x = given.clone().requires_grad_()
            y = call(x, **options)
            (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            assert first.requires_grad, name
            (second,) = torch.autograd.grad(first.sum(), x)
            # The map is linear, A say: the first derivative is B 3y², and the second B (6 y · A' 1) with its pair B.
            back = {
                "copy_to_region": lambda g: commlayer.all_reduce(g, group=world),
                "reduce_from_region": lambda g: g,
            }
            if name in back:
                ones = torch.ones_like(y)
                down = {"copy_to_region": ones, "reduce_from_region": commlayer.all_reduce(ones, group=world)}[name]
                torch.testing.assert_close(second, back[name](6 * y.detach() * down))

    run_local(rank, ranks=3)


def test_a_group_of_one_is_left_alone():
    alone = Group.alone()
    for name, options, x, *_ in cases(alone, 4, 3):
        assert getattr(mappings, name)(x, **options) is x, name


def test_a_scattered_part_does_not_keep_the_whole_alive():
    def rank():
        x = torch.zeros(8, 3)
        part = scatter_to_region(x, 0, commlayer.world())
        assert part.untyped_storage().nbytes() == part.nbytes

    run_local(rank, ranks=2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scatter_to_region", {"dim": 2}, r"dim: x of shape \(6, 4\) has no dim 2"),
        ("scatter_to_region", {"dim": 0, "sizes": [3, 2]}, r"sizes: \[3, 2\] for 2 ranks; they must add up to the 6"),
        ("reduce_scatter_to_region", {"dim": 1, "sizes": [4]}, r"sizes: \[4\] for 2 ranks"),
        ("gather_from_region", {"dim": 0, "sizes": [3, 3]}, r"sizes: \[3, 3\] for 2 ranks; rank \d has 6 along dim 0"),
        ("all_gather_from_region", {"dim": -3}, "dim: x of shape"),
        ("all_to_all_region", {"scatter_dim": 1, "gather_dim": -1}, "gather_dim: must differ from scatter_dim, both"),
        ("all_to_all_region", {"scatter_dim": 0, "gather_dim": 1, "scatter_sizes": [1, 1]}, "scatter_sizes:"),
        ("all_to_all_region", {"scatter_dim": 0, "gather_dim": 1, "gather_sizes": [1, 1]}, "gather_sizes:"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(name, options, message):
    def rank():
        world = commlayer.world()
        with pytest.raises(ValueError, match=message):
            getattr(mappings, name)(torch.zeros(6, 4), group=world, **options)

    run_local(rank, ranks=2)


def test_trap_12_uneven_parts_are_balanced():
    def rank():
        world = commlayer.world()
        return scatter_to_region(torch.zeros(10, 1), 0, world).shape[0], reduce_scatter_to_region(
            torch.zeros(1, 6), 1, world
        ).shape[1]

    assert run_local(rank, ranks=4) == [(3, 2), (3, 2), (2, 1), (2, 1)]

"""The ViT: any grid, any patch; what it starts from; and the same on a mesh."""

import copy
import threading

import pytest
import torch

from commlayer import Mesh, run_local
from models.vit import SIZES, ViT, ViTConfig, sincos_positions
from parallel import DataParallel, verify_gradients
from parallel.placement import gather_full, initialise
from parallel.rng import Streams
from tests.contracts.plain_vit import PlainViT


def small(**changes):
    settings = {"grid": (37, 49), "in_channels": 3, "out_channels": 1, "patch": 8} | changes
    return ViTConfig.named("tiny", **settings)


@pytest.mark.parametrize("grid", [(37, 49), (32, 48), (5, 7), (1, 1)])
@pytest.mark.parametrize("patch", [8, 4, (4, 7)])
@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_any_grid_and_patch(grid, patch, position):
    model = ViT(small(grid=grid, patch=patch, position=position, out_channels=2))
    y = model(torch.randn(2, 3, *grid))
    assert y.shape == (2, 2, *grid)
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("grid", "patch"), [((37, 49), 8), ((12, 10), (3, 5)), ((5, 3), 8)])
def test_patches_are_put_back_where_they_came_from(grid, patch):
    model = ViT(small(grid=grid, patch=patch, in_channels=2, out_channels=2))
    x = torch.randn(3, 2, *grid)
    patches = model.to_patches(x)
    P, Q = model.config.patches
    assert torch.equal(model.from_patches(patches), x)
    # The second token of the first row holds the second patch, channel by channel, and zeros beyond the grid.
    if model.config.tokens[1] > 1:
        expected = torch.zeros(2, P, Q)
        cut = x[0, :, :P, Q : 2 * Q]
        expected[:, : cut.shape[1], : cut.shape[2]] = cut
        assert torch.equal(patches[0, 1], expected.flatten())


def test_every_output_point_depends_on_every_input_point():
    model = ViT(small(grid=(9, 11), patch=4))
    torch.nn.init.normal_(model.head.weight)
    x = torch.randn(1, 3, 9, 11, requires_grad=True)
    for row, column in ((0, 0), (8, 10)):
        (grad,) = torch.autograd.grad(model(x)[0, 0, row, column], x)
        assert (grad != 0).all()


@pytest.mark.parametrize("centre", [True, False])
def test_starts_from_the_forecast_it_skips_to(centre):
    x = torch.randn(2, 6, 37, 49)
    newest_first = x.view(2, 3, 2, 37, 49)
    for skip, expected in (("last", newest_first[:, 0]), ("mean", newest_first.mean(1))):
        model = ViT(small(in_channels=6, out_channels=2, skip=skip, centre=centre))
        torch.testing.assert_close(model(x), expected)


def test_centred_forecasts_shift_with_the_climate():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 37, 49)
    for centre in (True, False):
        model = ViT(small(skip="last", centre=centre)).eval()
        torch.nn.init.normal_(model.head.weight)
        moved = torch.allclose(model(x + 4.0), model(x) + 4.0, atol=1e-4)
        assert moved is centre


@pytest.mark.parametrize("grid", [(13, 10), (12, 12)])
def test_it_is_the_plain_vit(grid):
    torch.manual_seed(0)
    config = ViTConfig(grid, 3, 2, patch=(4, 3), embed=24, depth=2, heads=4, mlp_ratio=2.3)
    model, plain = ViT(config).double(), PlainViT(config).double()
    x = torch.randn(2, 3, *grid, dtype=torch.float64)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for name, q in plain.named_parameters():
        grad = model.get_parameter(name).grad
        torch.testing.assert_close(grad, q.grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("spec", ["tp=2", "cp=3", "cp=2 tp=2", "dp=2 cp=1 tp=2"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_trap_8_a_mesh_starts_with_the_bits_of_one_process(spec, sequence_parallel):
    config = ViTConfig((13, 10), 3, 2, patch=(4, 3), embed=24, depth=2, heads=4, mlp_ratio=2.3)
    torch.manual_seed(3)
    alone = {name: p.detach() for name, p in ViT(config).named_parameters()}
    after = torch.rand(4)
    lock = threading.Lock()

    def rank():
        mesh = Mesh(spec)
        for axis in mesh.axes:
            mesh[axis]  # made before the lock, since all ranks take part
        with lock:  # threads share the generator
            torch.manual_seed(3)
            model = ViT(config, mesh, sequence_parallel=sequence_parallel)
            numbers = torch.rand(4)
        assert torch.equal(numbers, after)
        for name, p in model.named_parameters():
            assert torch.equal(gather_full(p, p), alone[name]), name

    run_local(rank, ranks=Mesh(spec).world_size)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("context", ["ring", "all_gather", "ulysses"])
def test_fewer_tokens_than_ranks(context, sequence_parallel):
    config = ViTConfig((4, 6), 1, 1, patch=(4, 3), embed=16, depth=1, heads=8)
    plain = PlainViT(config).double()
    x = torch.randn(3, 1, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def rank():
        mesh = Mesh("dp=1 cp=3 tp=2")
        vit = ViT(config, mesh, context=context, sequence_parallel=sequence_parallel).double()
        model, serial = DataParallel(vit, mesh=mesh), copy.deepcopy(plain)
        verify_gradients(model, serial, lambda m: m(x).square().sum(), lambda m: m(x).square().sum())

    run_local(rank, ranks=6)


def test_random_numbers_on_a_mesh_need_streams():
    def rank():
        for changes in ({"dropout": 0.1}, {"drop_path": 0.1}):
            with pytest.raises(ValueError, match="streams: needed for dropout and drop_path on a mesh"):
                ViT(small(**changes), Mesh("cp=2"))

    run_local(rank, ranks=2)


@pytest.mark.parametrize("spec", ["cp=2 tp=2", "cp=1 tp=2", "cp=2 tp=1"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_recomputation_and_dropout_change_no_gradient(spec, sequence_parallel):
    config = ViTConfig((13, 10), 3, 2, patch=(4, 3), embed=24, depth=2, heads=4, drop_path=0.5)
    x = torch.randn(6, 3, 13, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def rank():
        mesh, found = Mesh(spec), []
        for recompute in (False, True):
            streams = Streams(1, mesh)
            model = ViT(config, mesh, streams=streams, sequence_parallel=sequence_parallel, recompute=recompute)
            model = model.double()
            for i, p in enumerate(model.parameters()):
                initialise(p, lambda t, i=i: t.normal_(std=0.1, generator=torch.Generator().manual_seed(i)))
            y = model(x)
            y.square().sum().backward()
            found.append([y.detach(), *(p.grad for p in model.parameters())])
        for once, again in zip(*found, strict=True):
            torch.testing.assert_close(once, again, rtol=1e-12, atol=1e-12)
        return found[0][0]

    first, *others = run_local(rank, ranks=Mesh(spec).world_size)
    for other in others:  # whole samples are dropped alike on all ranks that hold parts of them
        torch.testing.assert_close(other, first, rtol=1e-12, atol=1e-12)


def test_dropout_and_drop_path_are_off_in_evaluation():
    torch.manual_seed(0)
    model = ViT(small(dropout=0.5, drop_path=0.5))
    x = torch.randn(4, 3, 37, 49)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_drop_path_grows_with_depth():
    model = ViT(small(depth=3, drop_path=0.4))
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0.2, 0.4])


def test_initialisation():
    torch.manual_seed(0)
    model = ViT(small(embed=64))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name


def test_sincos_positions_tell_rows_and_columns_apart():
    table = sincos_positions(3, 5, 16).view(3, 5, 16)
    assert torch.equal(table[0, 2, :8], table[0, 4, :8])
    assert torch.equal(table[0, 2, 8:], table[2, 2, 8:])
    assert len(table.view(15, 16).unique(dim=0)) == 15
    torch.testing.assert_close(table[2, 0, :4], torch.sin(2 / 10000 ** (torch.arange(4) / 4)))


def test_an_empty_batch_gives_zero_gradients():
    model = ViT(small(skip="last", centre=True))
    model(torch.empty(0, 3, 37, 49)).sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_sizes_of_the_tutorial():
    parameters = {}
    for name in ("era5", "era5-mp"):
        with torch.device("meta"):
            parameters[name] = sum(p.numel() for p in ViT(ViTConfig.named(name)).parameters())
    config = ViTConfig.named("era5")
    assert (config.embed, config.depth, config.heads, config.patch) == (384, 12, 8, 8)
    assert config.tokens[0] * config.tokens[1] == 4050
    for name, embed in (("era5", 384), ("era5-mp", 1536)):
        block = 12 * embed**2 + 13 * embed
        ends = (20 * 64 + 1) * embed + 4050 * embed + 2 * embed + (embed + 1) * 20 * 64
        assert parameters[name] == 12 * block + ends


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads: must divide embed 32, got 3"),
        ({"position": "rotary"}, "position: expected 'learned' or 'sincos', got 'rotary'"),
        ({"position": "sincos", "embed": 6}, "embed: must be a multiple of 4"),
        ({"skip": "first"}, "skip: expected 'none', 'last' or 'mean', got 'first'"),
        ({"skip": "mean", "out_channels": 2}, "skip: 'mean' needs whole states as input"),
        ({"centre": True}, "centre: needs a skip"),
        ({"patch": 0}, "patch: must be at least 1, got 0"),
        ({"depth": 0}, "depth: must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_wrong_input():
    with pytest.raises(ValueError, match=r"size: expected one of tiny, .*, got 'huge'"):
        ViTConfig.named("huge")
    with pytest.raises(ValueError, match=r"x: expected B × 3 × 37 × 49, got \(2, 1, 37, 49\)"):
        ViT(small())(torch.zeros(2, 1, 37, 49))
    assert set(SIZES) >= {"tiny", "demo", "era5", "era5-mp"}

"""Whole parameters inside of gathered(), and models that are built on the meta device: ZeRO on thread ranks."""

import math

import pytest
import torch
from torch import nn

import commlayer
from commlayer import run_local
from models.moe import LanguageModel, LanguageModelConfig
from models.vit import ViT, ViTConfig
from parallel import ZeRO
from parallel.router import Routing
from tests.contracts.tensor import drawn
from tests.contracts.zero import INPUTS, Net, Plain, Plainest, adamw, sgd, squares, whole

STAGES = (1, 2, 3)
every_stage = pytest.mark.parametrize("stage", STAGES)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# gathered() --------------------------------------------------------------------------------------------------


@every_stage
@pytest.mark.parametrize("offload", ["none", "cpu", "disk"])
def test_it_reads_and_writes(stage, offload, tmp_path):
    folder = {"folder": tmp_path} if offload == "disk" else {}

    def rank():
        net = drawn(Net)
        model = ZeRO(net, adamw(net), stage=stage, offload=offload, **folder)
        expected = values(drawn(Net))
        with model.gathered():
            assert_same(values(net), expected)
            with torch.no_grad():
                net.first.weight.mul_(2)
                net.blocks[1].down.bias.fill_(7)
                net.scale.add_(1)
        expected["first.weight"] *= 2
        expected["blocks.1.down.bias"].fill_(7)
        expected["scale"] += 1
        assert_same({name: whole(p, p) for name, p in model.named_parameters()}, expected)
        with model.gathered(), model.gathered():
            assert_same(values(net), expected)
        x = torch.ones(2, INPUTS).double()
        plain = drawn(Net)
        plain.load_state_dict({**plain.state_dict(), **expected})
        torch.testing.assert_close(model(x), plain(x))

    run_local(rank, ranks=3)


@every_stage
def test_masters_of_what_was_not_touched_keep_their_bits(stage):
    """The whole parameters are in bf16; writing them back would round all of them."""

    def rank():
        net = drawn(Plain).float()
        model = ZeRO(net, sgd(net), stage=stage, dtype=torch.bfloat16)
        before = {name: whole(p, p) for name, p in model.named_parameters()}
        assert any(not torch.equal(p, p.bfloat16().float()) for p in before.values())
        with model.gathered():
            assert net.head.weight.dtype == torch.bfloat16
            with torch.no_grad():
                net.head.bias.fill_(0.5)
            net.blocks[0](torch.ones(1, 7, dtype=torch.bfloat16))
        before["head.bias"].fill_(0.5)
        assert_same({name: whole(p, p) for name, p in model.named_parameters()}, before)

    run_local(rank, ranks=3)


@every_stage
def test_forward_inside_and_after(stage):
    def rank():
        net = drawn(Plain)
        optimizer = sgd(net)
        model = ZeRO(net, optimizer, stage=stage)
        x, expected = torch.ones(2, INPUTS).double(), drawn(Plain)(torch.ones(2, INPUTS).double())
        with model.gathered(), torch.no_grad():
            torch.testing.assert_close(model(x), expected)
            torch.testing.assert_close(net(x), expected)
        torch.testing.assert_close(model(x), expected)

    run_local(rank, ranks=2)


@every_stage
def test_a_state_dict_of_the_module_inside(stage):
    def rank():
        net = drawn(Net)
        model = ZeRO(net, adamw(net), stage=stage)
        with model.gathered():
            state = {name: value.clone() for name, value in net.state_dict().items()}
        assert_same(state, dict(drawn(Net).state_dict()))
        with model.gathered():
            net.load_state_dict({name: value * 2 for name, value in state.items()})
        with model.gathered():
            assert torch.equal(net.head.weight if hasattr(net, "head") else net.strided, state["strided"] * 2)

    run_local(rank, ranks=2)


@every_stage
def test_after_an_exception_inside_the_model_is_as_usable_as_before(stage):
    def rank():
        net = drawn(Plain)
        model = ZeRO(net, sgd(net), stage=stage)
        with pytest.raises(ArithmeticError), model.gathered():
            raise ArithmeticError
        x = torch.ones(2, INPUTS).double()
        torch.testing.assert_close(model(x), drawn(Plain)(x))

    run_local(rank, ranks=2)


# Meta --------------------------------------------------------------------------------------------------------


LANGUAGE = LanguageModelConfig(
    13, 16, 2, 4, 2, hidden=11, every=2, expert_hidden=5, routing=Routing(5, 2, bias_rate=0.1), shared=1, tied=True
)
FIELDS = ViTConfig((4, 6), 2, 2, patch=2, embed=8, depth=2, heads=2)
BUILT = {
    "torch": Plainest,
    "language": lambda: LanguageModel(LANGUAGE),
    "vit": lambda: ViT(FIELDS),
}


def on_meta(make):
    with torch.device("meta"):
        model = make()
    assert all(p.is_meta for p in model.parameters())
    return model


@every_stage
@pytest.mark.parametrize("kind", BUILT)
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_from_meta_with_the_bits_of_the_model_built_whole(stage, kind, offload):
    """One rank, since thread ranks share torch's generator; more are in tests/spmd."""
    expected = drawn(BUILT[kind])
    if kind == "vit":  # when it is built, its layers draw numbers of their own before
        drawn(expected.reset_parameters)

    def rank():
        net = on_meta(BUILT[kind])
        optimizer = torch.optim.AdamW(net.parameters())
        torch.manual_seed(0)
        model = ZeRO(net, optimizer, stage=stage, offload=offload)
        assert_same({name: whole(p, p) for name, p in model.named_parameters()}, values(expected))
        with model.gathered():
            assert_same(dict(net.state_dict()), dict(expected.state_dict()))
        ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert ours == {id(p) for p in model.parameters()}

    run_local(rank, ranks=1)


@torch.no_grad()
def fill(model):
    """Of all ranks alike, by a generator of its own."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    for name, p in model.named_parameters():
        if name.endswith("weight"):
            p.normal_(generator=generator)
        else:
            nn.init.zeros_(p)
    model.head.weight[1] = 3  # a second touch, of a part
    model.embed.weight[2].zero_()


@every_stage
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"replicas": 2}, {"offload": "cpu"}])
def test_from_meta_by_a_function(stage, options):
    expected = Plainest()
    fill(expected)

    def rank():
        net = on_meta(Plainest)
        net.blocks[0].requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        model = ZeRO(net, optimizer, stage=stage, init=fill, **options)
        for name, p in model.named_parameters():
            if p.requires_grad or stage == 3:
                assert torch.equal(whole(p, p), expected.get_parameter(name)), name
            else:  # whole, in the dtype that is computed in
                full = expected.get_parameter(name).detach()
                torch.testing.assert_close(whole(p, p).float(), full, rtol=1e-2, atol=0)
        plain = Plainest()
        plain.load_state_dict(expected.state_dict())
        if "dtype" not in options:
            ids = torch.tensor([1, 2, 3])
            torch.testing.assert_close(model.eval()(ids), plain.eval()(ids))

    run_local(rank, ranks=4)


@every_stage
def test_what_init_has_left_out(stage):
    def some(model):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name != "blocks.1.2.weight":
                    p.zero_()
            model.norm.reset_running_stats()

    def no_buffers(model):
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()

    def rank(init, match, make=Plainest):
        net = on_meta(make)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=match):
            ZeRO(net, optimizer, stage=stage, init=init)

    run_local(lambda: rank(some, r"init: .*blocks\.1\.2\.weight"), ranks=2)
    run_local(lambda: rank(no_buffers, r"init: norm\.running_(mean|var)"), ranks=2)


@every_stage
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)),
            "1.*MultiheadAttention has parameters but no reset_parameters",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2)), "1.self_attn.*no reset_parameters"),
        (Plain, None),
    ],
)
def test_modules_that_cannot_reset_themselves(stage, make, match):
    def rank():
        net = on_meta(lambda: make() if match else nn.ParameterList([nn.Parameter(torch.empty(3))]))
        with pytest.raises(ValueError, match=match or "ParameterList has parameters but no reset_parameters"):
            ZeRO(net, torch.optim.SGD(net.parameters(), lr=0.1), stage=stage)

    run_local(rank, ranks=1)


@every_stage
def test_attention_of_torch_by_init(stage):
    """With the bits of torch's own initialisation."""

    def make():
        return nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))

    def init(model):
        model[0].reset_parameters()
        model[1].out_proj.reset_parameters()
        model[1]._reset_parameters()

    expected = drawn(make)

    def rank():
        net = on_meta(make)
        torch.manual_seed(0)
        model = ZeRO(net, torch.optim.SGD(net.parameters(), lr=0.1), stage=stage, init=init)
        assert_same({name: whole(p, p) for name, p in model.named_parameters()}, values(expected))

    run_local(rank, ranks=1)


@pytest.mark.parametrize("stage", [1, 3])
def test_it_trains_as_if_it_had_been_built_whole(stage):
    def loss(model, ids):
        return model(ids).square().sum()

    def rank():
        me = commlayer.world().rank
        found = []
        for meta in (True, False):
            net = on_meta(Plainest) if meta else Plainest()
            if not meta:
                fill(net)
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
            model = ZeRO(net, optimizer, stage=stage, init=fill if meta else None)
            for step in range(3):
                optimizer.zero_grad()
                loss(model, torch.tensor([step, 4 + me, 7])).backward()
                optimizer.step()
            found.append({name: whole(p, p) for name, p in model.named_parameters()})
        assert_same(*found)

    run_local(rank, ranks=2)


def test_the_function_is_not_asked_where_nothing_is_on_meta():
    def rank():
        net = drawn(Plain)
        model = ZeRO(net, sgd(net), stage=3, init=fill)
        assert_same({name: whole(p, p) for name, p in model.named_parameters()}, values(drawn(Plain)))
        assert math.isfinite(squares(model, 0, 0, 0).item())

    run_local(rank, ranks=2)

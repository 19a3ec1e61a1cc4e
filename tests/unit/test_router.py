"""Which experts are chosen, with which weights, and the losses, against the plain router token by token."""

import itertools
import math

import pytest
import torch
from torch import nn

from parallel.router import Routing, TopKRouter
from tests.contracts.plain_moe import PlainRouter
from tests.contracts.tensor import drawn, rand

EMBED = 6
CLOSE = {"rtol": 1e-12, "atol": 1e-13}
GROUPS = [(1, 1), (2, 1), (4, 2), (4, 4), (8, 5), (24, 24), (24, 13)]  # groups, and how many of them may be chosen from


def routers(routing):
    """Both kinds with the same values, and biases that change choices."""
    router, plain = TopKRouter(EMBED, routing).double(), PlainRouter(EMBED, routing).double()
    with torch.no_grad():
        for r in (router, plain):
            r.weight.copy_(rand(routing.experts, EMBED, seed=1))
            if r.bias is not None:
                r.bias = rand(routing.experts, seed=2) / 4
    return router, plain


def routed(router, x):
    """Of either kind: the choices, their weights, and the losses."""
    if isinstance(router, PlainRouter):
        chosen, weights, loss = router(x)
        return chosen, torch.stack([torch.stack(each) for each in weights]), loss
    logits, scores = router(x)
    experts = router.choose(scores)
    counts = experts.flatten().bincount(minlength=router.routing.experts)
    return experts.tolist(), router.weigh(scores, experts), router.loss(logits, scores, counts)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bias_rate", [0.0, 0.1])
def test_choices_weights_and_losses_are_the_plain_ones(groups, score, bias_rate):
    rest = {"balance_loss": 0.3, "z_loss": 0.2, "bias_rate": bias_rate}
    for top_k, normalise in itertools.product((1, 2, 3, 8, 13), (False, True)):
        if top_k > 24 // groups[0] * groups[1] or (top_k == 1 and normalise):
            continue
        v, found = rand(17, top_k, seed=4), []
        for router in routers(Routing(24, top_k, score, normalise, 1.7, *groups, **rest)):
            x = rand(17, EMBED, seed=3).requires_grad_()
            chosen, weights, loss = routed(router, x)
            ((weights * v).sum() + loss).backward()
            found.append((torch.tensor(chosen), weights, loss, x.grad, router.weight.grad))
        for mine, wanted in zip(*found, strict=True):
            torch.testing.assert_close(mine, wanted, **CLOSE)


def test_the_bias_changes_choices_and_not_weights():
    routing = Routing(8, 2, bias_rate=0.1)
    router = TopKRouter(EMBED, routing)
    x = rand(30, EMBED, dtype=torch.float32)
    _, scores = router(x)
    before = router.choose(scores)
    router.bias[5] = 2.0
    after = router.choose(scores)
    assert (after[:, 0] == 5).all()
    assert not (before[:, 0] == 5).all()
    assert torch.equal(router.weigh(scores, after), scores.gather(1, after))
    assert not router.bias.requires_grad
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert "bias" in router.state_dict()
    assert TopKRouter(EMBED, Routing(8, 2)).bias is None


def test_parts_of_the_losses_add_up_to_those_of_all_tokens():
    routing = Routing(8, 2, "sigmoid", balance_loss=0.3, z_loss=0.2)
    router, plain = routers(routing)
    x = rand(9, EMBED)
    logits, scores = router(x)
    counts = router.choose(scores).flatten().bincount(minlength=8)
    parts = [router.loss(logits[part], scores[part], counts) for part in (slice(0, 1), slice(1, 1), slice(1, 9))]
    torch.testing.assert_close(sum(parts), plain(x)[2], **CLOSE)
    assert parts[1] == 0


def test_even_choices_cost_the_coefficient():
    """X · Σ f·P is 1 where all experts have the same share, K where all tokens choose the same of equal experts."""
    logits = torch.zeros(12, 4)
    router = TopKRouter(EMBED, Routing(4, 2, balance_loss=0.01))
    assert router.loss(logits, logits.softmax(-1), torch.tensor([6] * 4)).item() == pytest.approx(0.01)
    sure = torch.tensor([[30.0, 30.0, 0, 0]] * 12)
    assert router.loss(sure, sure.softmax(-1), torch.tensor([12, 12, 0, 0])).item() == pytest.approx(0.02)
    router = TopKRouter(EMBED, Routing(4, 2, z_loss=0.01))
    assert router.loss(logits, logits, torch.tensor([6] * 4)).item() == pytest.approx(0.01 * math.log(4) ** 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_in_float32_at_least(dtype):
    """Also under autocast: of experts that differ by less than bfloat16 can tell, the better one is chosen."""
    router = TopKRouter(2, Routing(2, 1, balance_loss=0.1, z_loss=0.1)).to(dtype)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 2**-9]]))
    with torch.autocast("cpu", torch.bfloat16):
        logits, scores = router(torch.ones(3, 2, dtype=dtype))
        weights = router.weigh(scores, router.choose(scores))
        loss = router.loss(logits, scores, torch.tensor([0, 3]))
    assert {t.dtype for t in (logits, scores, weights, loss)} == {torch.float32}
    assert router.choose(scores).tolist() == [[1]] * 3
    (weights.sum() + loss).backward()
    assert router.weight.grad.dtype == dtype


def test_losses_in_float64_have_its_digits():
    """Counts are integers, whose quotient torch makes float32."""
    router, plain = routers(Routing(7, 3, balance_loss=1.0, z_loss=1.0))
    x = rand(11, EMBED)
    _, _, loss = routed(router, x)
    assert loss.dtype == torch.float64
    assert abs(loss / plain(x)[2] - 1) < 1e-14


def test_scores_that_underflow_give_zeros():
    router = TopKRouter(2, Routing(3, 2, "sigmoid", normalise=True))
    scores = torch.zeros(1, 3)
    assert torch.equal(router.weigh(scores, router.choose(scores)), torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_values_are_those_of_linear(dtype):
    wanted = drawn(lambda: nn.Linear(EMBED, 5, bias=False, dtype=dtype)).weight
    router = drawn(lambda: TopKRouter(EMBED, Routing(5, 2, bias_rate=0.1), dtype=dtype))
    assert torch.equal(router.weight, wanted)
    assert router.bias.dtype == torch.float32
    with torch.no_grad():
        for t in (router.weight, router.bias):
            t.fill_(1)
    drawn(router.reset_parameters)
    assert torch.equal(router.weight, wanted)
    assert torch.equal(router.bias, torch.zeros(5))


def test_biases_follow_the_counts():
    """Up by the rate where an expert had less than the mean, down where more, and not where it had just as much."""
    router = TopKRouter(EMBED, Routing(5, 1, bias_rate=0.25))
    router.balance(torch.tensor([4, 4, 0, 9, 3]))
    assert router.bias.tolist() == [0.0, 0.0, 0.25, -0.25, 0.25]
    router.balance(torch.tensor([0, 0, 0, 0, 1]))
    assert router.bias.tolist() == [0.25, 0.25, 0.5, 0.0, 0.0]
    TopKRouter(EMBED, Routing(5, 1)).balance(torch.tensor([1, 0, 0, 0, 0]))


def test_biases_follow_differences_that_float32_cannot_tell():
    router = TopKRouter(EMBED, Routing(2, 1, bias_rate=0.25))
    router.balance(torch.tensor([2**40, 2**40 + 2]))
    assert router.bias.tolist() == [0.25, -0.25]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"experts": 0}, "experts: expected at least 1, got 0"),
        ({"top_k": 0}, "top_k: expected 1 to 8, .* got 0"),
        ({"top_k": 9}, "top_k: expected 1 to 8, .* got 9"),
        ({"score": "relu"}, "score: expected 'softmax' or 'sigmoid', got 'relu'"),
        ({"top_k": 1, "normalise": True}, "normalise: with top_k 1 every weight would be 1"),
        ({"groups": 3}, "groups: must divide the 8 experts, got 3"),
        ({"groups": 0}, "groups: must divide the 8 experts, got 0"),
        ({"groups": 4, "top_groups": 5}, "top_groups: expected 1 to 4, .* got 5"),
        ({"groups": 4, "top_groups": 0}, "top_groups: expected 1 to 4, .* got 0"),
        ({"groups": 4, "top_k": 3}, "top_k: 3 is more than the 1 best groups have, of 2 experts each"),
        *(
            ({name: value}, f"{name}: expected a number from 0 on, got {value}")
            for name in ("capacity_factor", "balance_loss", "z_loss", "bias_rate")
            for value in (-1.0, math.nan, math.inf)
        ),
        *(({"scale": value}, f"scale: .* got {value}") for value in (0.0, -1.0, math.nan, math.inf)),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        Routing(**{"experts": 8, "top_k": 2, **given})


@pytest.mark.parametrize("name", ["experts", "top_k", "groups", "top_groups"])
def test_numbers_that_are_no_int(name):
    with pytest.raises(TypeError, match=rf"{name}: expected an int, got 2\.0"):
        Routing(**{"experts": 8, "top_k": 2, name: 2.0})

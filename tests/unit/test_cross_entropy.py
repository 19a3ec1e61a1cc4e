"""Cross entropy over a vocabulary cut over thread ranks, against F.cross_entropy of all logits in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

import commlayer
from commlayer import Mesh, balanced_sizes, run_local
from parallel import DataParallel
from parallel.cross_entropy import vocab_parallel_cross_entropy
from tests.contracts.tensor import Words, calls, drawn, in_step, mine, rand, strided

CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def targets(*shape, vocabulary=10, seed=4, ignored=(1, 4), ignore_index=-100):
    found = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    found.view(-1)[[i for i in ignored if i < found.numel()]] = ignore_index
    return found


def check(logits, target, weight=None, *, padded=0, sizes=None, **options):
    """Values and the gradient of this rank's logits; ``padded``: entries of each rank, some of them beyond the end."""
    group = commlayer.world()
    vocabulary = logits.shape[-1]
    sizes = sizes or balanced_sizes(vocabulary, group.size)
    reference = logits.clone().requires_grad_()
    rows = reference.reshape(-1, vocabulary)
    losses = F.cross_entropy(rows, target.reshape(-1), **options)
    losses = losses.reshape(target.shape) if losses.ndim else losses
    weight = torch.ones_like(losses) if weight is None else weight
    losses.mul(weight).sum().backward()

    if padded:
        filler = rand(*logits.shape[:-1], padded * group.size - vocabulary, seed=5).to(logits) + 50
        whole, sizes = torch.cat([logits, filler], -1), [padded] * group.size
    else:
        whole = logits
    part = whole.split(sizes, -1)[group.rank]
    local = strided(part.clone()).requires_grad_()
    found = vocab_parallel_cross_entropy(local, target, group=group, vocab_size=vocabulary, **options)
    assert found.shape == losses.shape
    torch.testing.assert_close(found, losses.detach(), equal_nan=True, **CLOSE)
    found.mul(weight).sum().backward()
    wanted = F.pad(reference.grad, (0, whole.shape[-1] - vocabulary)).split(sizes, -1)[group.rank]
    torch.testing.assert_close(local.grad, wanted, **CLOSE)
    assert torch.equal(local.detach(), part)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_values_and_gradients(ranks, smoothing, reduction):
    def rank():
        options = {"label_smoothing": smoothing, "reduction": reduction}
        for shape in ((7,), (2, 3), (2, 3, 2), ()):
            logits = rand(*shape, 10, seed=1) * 5
            weight = rand(*shape, seed=2) if reduction == "none" else None
            check(logits, targets(*shape, ignored=()), weight, **options)
            check(logits, targets(*shape, ignored=(1, 4, 5)), weight, **options)
            check(logits, targets(*shape, ignored=(0, 1), ignore_index=3), weight, ignore_index=3, **options)
            check(logits, targets(*shape).int().long(), weight, padded=3 if ranks == 4 else 10, **options)

    run_local(rank, ranks=ranks)


def test_equal_parts_need_no_vocab_size():
    def rank():
        group = commlayer.world()
        logits, target = rand(4, 9), targets(4, vocabulary=9, ignored=()).to(torch.int32)
        found = vocab_parallel_cross_entropy(logits[:, mine(group, 9)], target, group=group)
        torch.testing.assert_close(found, F.cross_entropy(logits, target.long()), **CLOSE)

    run_local(rank, ranks=3)


def test_large_logits_do_not_overflow():
    """Far apart between ranks, in both directions, and -inf."""

    def rank():
        for shift in (1e3, -1e3, 1e30):
            logits = rand(5, 9, seed=1)
            logits[:, :3] += shift
            logits[0, 4] = -math.inf
            check(logits, targets(5, vocabulary=9, ignored=()))
            logits[1, 3:] = -math.inf
            check(logits, torch.zeros(5, dtype=torch.long))

    run_local(rank, ranks=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    def rank():
        group = commlayer.world()
        logits = (rand(6, 300, seed=1) * 4).to(dtype)
        target = targets(6, vocabulary=300)
        reference = logits.float().requires_grad_()
        expected = F.cross_entropy(reference, target, label_smoothing=0.1)
        expected.backward()
        local = logits[:, mine(group, 300)].clone().requires_grad_()
        found = vocab_parallel_cross_entropy(local, target, group=group, label_smoothing=0.1)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        found.backward()
        assert local.grad.dtype == dtype
        torch.testing.assert_close(local.grad, reference.grad[:, mine(group, 300)].to(dtype), rtol=1e-2, atol=1e-6)

    run_local(rank, ranks=3)


@pytest.mark.parametrize("tokens", [0, 3])
def test_without_any_token_as_in_torch(tokens):
    def rank():
        logits = rand(tokens, 4).requires_grad_()
        target = torch.full((tokens,), -100)
        for reduction in ("mean", "sum", "none"):
            options = {"reduction": reduction, "label_smoothing": 0.1}
            found = vocab_parallel_cross_entropy(logits, target, group=commlayer.world(), **options)
            wanted = F.cross_entropy(rand(tokens, 8), target, **options)
            torch.testing.assert_close(found, wanted, equal_nan=True)
        found.sum().backward()
        assert not logits.grad.any()

    run_local(rank, ranks=2)


def test_one_collective_and_none_in_backward(monkeypatch):
    def rank():
        logits = rand(6, 4).requires_grad_()
        loss = vocab_parallel_cross_entropy(logits, targets(6), group=commlayer.world())
        loss.backward()

    with calls(monkeypatch) as seen:
        run_local(rank, ranks=3)
    assert seen == [("all_gather", (1, 3 * 6 + 2))] * 3


def test_what_is_kept_for_backward():
    """The logits as they came, and three numbers a token at most."""

    def rank():
        kept = []
        logits = rand(6, 4).bfloat16().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            vocab_parallel_cross_entropy(logits, targets(6), group=commlayer.world(), reduction="none")
        assert sum(t is logits for t in kept) == 1
        assert all(t is logits or t.numel() == 6 for t in kept)

    run_local(rank, ranks=2)


def test_inside_a_graph(monkeypatch):
    """The same; a target out of range, and parts that do not adjoin, cannot pass for a number."""

    def rank():
        group = commlayer.world()

        def call(logits, target, smoothing=0.1):
            options = {"vocab_size": 10, "label_smoothing": smoothing, "reduction": "none"}
            return vocab_parallel_cross_entropy(logits, target, group=group, **options)

        compiled = torch.compile(call)
        logits, target = rand(2, 3, 7, seed=group.rank).requires_grad_(), targets(2, 3)
        results = []
        for run in (call, compiled):
            losses = run(logits, target)
            results.append((losses, *torch.autograd.grad((losses * rand(2, 3)).sum(), logits)))
        torch.testing.assert_close(*results, **CLOSE)
        wrong = target.clone()
        wrong[0, 0] = 10
        assert compiled(logits, wrong).isinf().nonzero().tolist() == [[0, 0]]
        commlayer.barrier()  # the other ranks are through when this one compiles again
        assert compiled(rand(2, 3, 6 + group.rank), target)[target >= 0].isnan().all()

    with in_step(monkeypatch, 2):
        run_local(rank, ranks=2)


# The traps ------------------------------------------------------------------------------------------------


def test_trap_1_mean_over_unequal_numbers_of_tokens():
    """Two data ranks with two micro-batches each, of 4, 1, 0 and 3 targets: the sum over the global count, once."""

    def rank():
        mesh = Mesh("dp=2 tp=2")
        tp = mesh["tp"]
        model = drawn(lambda: Words(tp)).double()
        serial = drawn(Words).double()
        ids = targets(2, 2, 4, seed=1, ignored=())
        target = targets(2, 2, 4, seed=2, ignored=(5, 6, 7, 8, 9, 10, 11, 12))
        expected = serial(ids, target, "mean")
        expected.backward()

        wrapped = DataParallel(model, mesh=mesh)
        ids, target = ids[mesh.rank("dp")], target[mesh.rank("dp")]
        count = commlayer.all_reduce((target != -100).sum(), group=mesh["dp"])
        total = 0
        for micro in range(2):
            # DataParallel takes the mean over dp ranks, so the sum over them times their number.
            loss = wrapped(ids[micro], target[micro], "sum") * mesh.size("dp") / count
            if micro == 0:
                with wrapped.no_sync():
                    loss.backward()
            else:
                loss.backward()
            total += loss.detach()
        torch.testing.assert_close(commlayer.all_reduce(total, "avg", group=mesh["dp"]), expected.detach(), **CLOSE)
        for (name, p), q in zip(model.named_parameters(), serial.parameters(), strict=True):
            wanted = q.grad[mine(tp, len(q))]
            torch.testing.assert_close(p.grad, wanted, msg=lambda m, n=name: f"{n}: {m}", **CLOSE)

    run_local(rank, ranks=4)


@pytest.mark.parametrize(
    ("ranks", "padded"), [(2, 0), (2, 5), (2, 8), (3, 0), (3, 5), (3, 8), (4, 0), (4, 3), (4, 5), (4, 8)]
)
def test_trap_12_padding_stays_out_of_the_softmax(ranks, padded):
    """Uneven parts, balanced; or equal ones of which some ranks have little, or nothing, that is true. Padding with
    larger logits than all others changes neither the loss nor any gradient, and has none."""

    def rank():
        for smoothing in (0.0, 0.2):
            check(rand(2, 6, 10, seed=1), targets(2, 6), padded=padded, label_smoothing=smoothing)

    run_local(rank, ranks=ranks)


# Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, 10])
def test_targets_out_of_range_are_refused_on_all_ranks(wrong):
    def rank():
        logits = rand(3, 5)
        with pytest.raises(IndexError, match=f"target: expected 0 to 9 or -100, got {wrong}"):
            vocab_parallel_cross_entropy(logits, torch.tensor([1, wrong, -100]), group=commlayer.world())

    run_local(rank, ranks=2)


def test_parts_that_do_not_adjoin_are_refused_on_all_ranks():
    """As without vocab_size for balanced, unequal parts: each rank would count from another place."""

    def rank():
        group = commlayer.world()
        logits = rand(3, 10)[:, mine(group, 10)]
        with pytest.raises(
            ValueError, match=r"the ranks have \[4, 3, 3\] entries, from \[0, 3, 6\] on; give vocab_size"
        ):
            vocab_parallel_cross_entropy(logits, torch.tensor([1, 2, 3]), group=group)

    run_local(rank, ranks=3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "avg"}, ValueError, "reduction: expected 'none', 'mean' or 'sum', got 'avg'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected 0 to 1, got 1.5"),
        ({"target": torch.zeros(4).long()}, ValueError, r"target: expected the shape of logits .* target is \(4,\)"),
        ({"target": torch.zeros(3)}, TypeError, r"target: expected indices \(integers\), got torch.float32"),
        ({"vocab_size": 13}, ValueError, r"logits: 5 entries on rank \d, but 13 are \[7, 6\] if balanced over 2 ranks"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "logits: no entry of the vocabulary on rank"),
    ],
)
def test_bad_input(options, error, message):
    def rank():
        arguments = {"logits": torch.zeros(3, 5), "target": torch.zeros(3).long(), **options}
        with pytest.raises(error, match=message):
            vocab_parallel_cross_entropy(group=commlayer.world(), **arguments)

    run_local(rank, ranks=2)

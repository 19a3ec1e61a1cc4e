"""The language model: against a plain one, what it starts from, on a mesh, how many parameters, and what it writes."""

import copy
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import commlayer
from commlayer import Mesh, run_local
from models.flops import flops_per_token
from models.generate import generate
from models.moe import SIZES, LanguageModel, LanguageModelConfig, parameters, table
from parallel import DataParallel, verify_gradients
from parallel.placement import gather_full, part_of, placement
from parallel.router import Routing
from tests.contracts.plain_moe import PlainLanguageModel
from tests.contracts.tensor import drawn

ROUTING = Routing(5, 2, normalise=True, balance_loss=0.3, z_loss=0.2)
MIXED = LanguageModelConfig(13, 16, 2, 4, 2, hidden=11, every=2, expert_hidden=5, routing=ROUTING, shared=1)


def tokens(batch, length, seed=0):
    return torch.randint(13, (batch, length), generator=torch.Generator().manual_seed(seed))


def lively(model):
    """In float64, with weights larger than they are drawn, so that everything matters."""
    with torch.no_grad():
        for p in model.double().parameters():
            p *= 10
    return model


@torch.no_grad()
def take(model, serial):
    """This rank's parts of the parameters of one process."""
    for name, p in model.named_parameters():
        p.copy_(part_of(serial.get_parameter(name), p))


# One process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"every": 1, "hidden": 0, "tied": True},
        {"every": 0, "expert_hidden": 0, "routing": None, "shared": 0},
        {"kv_heads": 4, "shared": 0, "rope_theta": 50.0, "norm_eps": 0.1},
        {"depth": 5, "kv_heads": 1, "routing": Routing(4, 3, "sigmoid", scale=2.0, bias_rate=0.1, balance_loss=0.1)},
    ],
)
def test_it_is_the_plain_model(changes):
    config = replace(MIXED, **changes)
    model = drawn(lambda: lively(LanguageModel(config)))
    plain = PlainLanguageModel(config).double()
    plain.load_state_dict(model.state_dict())
    ids, targets = tokens(3, 9), tokens(3, 9, seed=1)
    targets[1, 2:7] = -100
    found, (entropy, auxiliary) = model(ids, targets), plain(ids, targets)
    assert len(found.loads) == config.mixtures
    loss = sum((load.loss for load in found.loads), torch.zeros(()))
    torch.testing.assert_close(found.loss, entropy, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.as_tensor(auxiliary), loss, rtol=1e-12, atol=0, check_dtype=False)
    (found.loss / 22 + loss).backward()
    (entropy / 22 + auxiliary).backward()
    for name, q in plain.named_parameters():
        assert q.grad.abs().max() > 1e-6, name
        grad = model.get_parameter(name).grad
        torch.testing.assert_close(grad, q.grad, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_the_loss_is_that_of_the_logits():
    model = drawn(lambda: lively(LanguageModel(MIXED)))
    ids, targets = tokens(2, 6), tokens(2, 6, seed=1)
    targets[0, 0] = -100
    logits = model(ids)
    assert logits.shape == (2, 6, 13)
    expected = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(model(ids, targets).loss, expected[targets >= 0].sum())


def test_no_token_sees_what_follows():
    model = drawn(lambda: lively(LanguageModel(MIXED)))
    ids = tokens(1, 8)
    before = model(ids)
    ids[0, 5] = (ids[0, 5] + 1) % 13
    after = model(ids)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-12, atol=1e-12)
    assert ((before - after)[:, 5:].abs().amax(-1) > 1e-6).all()


class Products(TorchDispatchMode):
    """Counts the matrix products between two-dimensional tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def test_recomputation_changes_no_gradient():
    ids, products, found = tokens(2, 7), {}, []
    for recompute in ("none", "selective", "full"):
        model = drawn(lambda r=recompute: lively(LanguageModel(MIXED, recompute=r)))
        output = model(ids, ids)
        assert output.loads[0].counts.sum() == 2 * 7 * 2
        with Products() as seen:
            (output.loss + output.loads[0].loss).backward()
        products[recompute] = seen.count
        found.append([p.grad for p in model.parameters()])
    for reference, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, reference, rtol=1e-12, atol=1e-12)
    assert products["none"] == products["selective"] < products["full"]


def test_recomputation_keeps_less():
    kept = {}
    for recompute in ("none", "selective", "full"):
        model = drawn(lambda r=recompute: LanguageModel(replace(MIXED, depth=4), recompute=r))
        saved = []
        with saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            model(tokens(2, 64), tokens(2, 64))
        kept[recompute] = sum(saved)
    assert kept["full"] < kept["none"] / 2


# What it starts from -----------------------------------------------------------------------------------------


def test_initialisation():
    config = replace(MIXED, embed=64, hidden=96, expert_hidden=48, depth=8, vocab_size=100)
    for name, p in drawn(lambda: LanguageModel(config)).named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
        else:
            out = name.endswith(("out.weight", "down.weight", "down"))
            assert p.std().item() == pytest.approx(0.02 / 4 if out else 0.02, rel=0.1), name
            assert abs(p.mean().item()) < 0.005, name


def at_once(*args, **options):
    return LanguageModel(*args, **options)


def off_the_meta_device(*args, **options):
    with torch.device("meta"):
        model = LanguageModel(*args, **options)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.reset_parameters()
    return model


def prepared(spec, fold):
    """The meshes, with all groups, which all ranks make together."""
    mesh = Mesh(spec)
    experts = mesh.fold(fold)
    for axes in ("dp", "cp", "tp"):
        mesh[axes]
    for axes in ("ep", "etp", "etp-ep", "etp-ep-edp"):
        experts[axes]
    return mesh, experts


@pytest.mark.parametrize("make", [at_once, off_the_meta_device])
@pytest.mark.parametrize(
    ("spec", "fold", "sequence_parallel"),
    [
        ("dp=1 cp=1 tp=2", "ep=2", True),
        ("dp=2 cp=1 tp=2", "ep=2 etp=2", False),
        ("dp=1 cp=2 tp=2", "ep=4", True),
        ("dp=1 cp=3 tp=1", "ep=1 etp=3", False),
    ],
)
def test_trap_8_a_mesh_starts_with_the_bits_of_one_process(spec, fold, sequence_parallel, make):
    config = replace(MIXED, tied="cp=3" in spec, routing=replace(ROUTING, bias_rate=0.1))
    alone, after = drawn(lambda: (LanguageModel(config), torch.rand(4)))

    def rank():
        mesh, experts = prepared(spec, fold)
        options = {"sequence_parallel": sequence_parallel}
        model, numbers = drawn(lambda: (make(config, mesh, experts, **options), torch.rand(4)))
        assert torch.equal(numbers, after)
        for name, p in model.named_parameters():
            assert torch.equal(gather_full(p, p), alone.get_parameter(name)), name
        assert torch.equal(model.blocks[1].moe.router.bias, torch.zeros(5))

    run_local(rank, ranks=Mesh(spec).world_size)


def test_marks_survive_leaving_the_meta_device():
    config = replace(MIXED, tied=True)

    def rank():
        mesh, experts = prepared("dp=1 cp=2 tp=2", "ep=2 etp=2")
        make = [at_once, off_the_meta_device]
        marks = []
        for made in (drawn(lambda m=m: m(config, mesh, experts, sequence_parallel=True)) for m in make):
            for model in (made, copy.deepcopy(made).double()):
                assert model.head.weight is model.embed.weight
                marks.append({name: placement(p) for name, p in model.named_parameters()})
        words = {name: ([shard.axis for shard in mark.shards], set(mark.partial)) for name, mark in marks[0].items()}
        assert words["embed.weight"] == (["tp"], {"cp"})
        assert words["norm.weight"] == words["blocks.0.norm2.weight"] == ([], {"cp", "tp"})
        assert words["blocks.1.moe.router.weight"] == ([], {"cp", "tp"})
        assert words["blocks.1.moe.experts.up"] == (["ep", "etp"], set())
        assert words["blocks.1.moe.shared.down.weight"] == (["tp"], {"cp"})
        for others in marks[1:]:
            for name, mark in others.items():
                assert ([shard.axis for shard in mark.shards], set(mark.partial)) == words[name], name

    run_local(rank, ranks=4)


# On a mesh ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize(("context", "sequence_parallel"), [("ring", True), ("all_gather", False), ("ulysses", True)])
def test_fewer_tokens_than_ranks(context, sequence_parallel, length):
    config = replace(MIXED, heads=8)
    plain, ids = drawn(lambda: PlainLanguageModel(config)).double(), tokens(1, length)

    def rank():
        mesh = Mesh("dp=1 cp=3 tp=2")
        experts = mesh.fold("ep=3")
        options = {"context": context, "sequence_parallel": sequence_parallel, "recompute": "full"}
        model = lively(LanguageModel(config, mesh, experts, **options))

        assert all(block.attention.method == context for block in model.blocks)

        def loss(model):
            output = model(ids, ids)
            return output.loss + output.loads[0].loss

        wrapped = DataParallel(model, mesh=mesh, experts=experts)
        verify_gradients(wrapped, copy.deepcopy(plain), loss, lambda m: sum(m(ids, ids)))

    run_local(rank, ranks=6)


@pytest.mark.parametrize("spec", ["tp=2", "cp=2", "dp=2"])
def test_without_a_fold_every_rank_has_all_experts(spec):
    serial = drawn(lambda: LanguageModel(MIXED))
    ids = tokens(2, 5)
    logits, expected = serial(ids), serial(ids, ids)

    def rank():
        mesh = Mesh(spec)
        model = LanguageModel(MIXED, mesh)
        take(model, serial)
        assert model.blocks[1].moe.experts.up.shape == (5, 10, 16)
        mine = slice(mesh.rank("dp"), mesh.rank("dp") + 1) if "dp" in mesh.axes else slice(None)
        torch.testing.assert_close(model(ids[mine]), logits[mine])
        losses = model(ids[mine], ids[mine]).loads[0].loss.detach()
        torch.testing.assert_close(commlayer.all_reduce(losses), expected.loads[0].loss.detach())

    run_local(rank, ranks=2)


# How many there are ------------------------------------------------------------------------------------------


def test_named_sizes_are_as_published():
    shapes = {name: (c.embed, c.depth, c.heads, c.kv_heads, c.every) for name, c in SIZES.items()}
    assert shapes["debug"][0] == 384
    assert shapes["medium"][:3] == (2304, 24, 24)
    assert shapes["large"] == (4608, 32, 36, 12, 2)
    assert shapes["deepseek-1b"] == (1024, 10, 8, 8, 1)
    for name in ("debug", "medium", "large"):
        assert (SIZES[name].routing.experts, SIZES[name].every) == (12, 2)
    deepseek = SIZES["deepseek-1b"]
    assert (deepseek.routing.experts, deepseek.routing.top_k, deepseek.shared) == (60, 6, 2)
    assert 49e9 < parameters(SIZES["large"]).total < 51e9
    assert 0.95e9 < parameters(deepseek).total < 1.05e9


def test_dense_equivalents():
    for name, config in SIZES.items():
        if config.routing is None:
            continue
        dense = SIZES[f"{name}-dense"]
        routers = config.mixtures * config.routing.experts * config.embed
        rounding = 3 * config.embed * config.depth / 2
        assert abs(parameters(dense).total - (parameters(config).active - routers)) <= rounding
        assert parameters(dense).active == parameters(dense).total
    whole, dense = parameters(SIZES["large"]), parameters(SIZES["large-dense-50b"])
    assert dense.total == whole.total - 16 * 12 * 4608
    assert SIZES["tiny-dense"].dense() == SIZES["tiny-dense"]


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_operations_by_hand(tied):
    config = replace(MIXED, tied=tied, depth=4)
    attention, dense = 16 * (16 + 2 * 8) + 16 * 16, 3 * 16 * 11
    router, expert = 5 * 16, 3 * 16 * 5
    body = 4 * attention + 2 * dense + 2 * (router + 5 * expert + expert)
    active = 4 * attention + 2 * dense + 2 * (router + 2 * expert + expert)
    norms, embedding = 9 * 16, 13 * 16
    ends = embedding * (1 if tied else 2) + norms
    assert parameters(config)[:2] == (body + ends, active + ends)
    multiplied = active + embedding  # the head; the lookup is none
    assert flops_per_token(config, 100) == 6 * multiplied + 12 * 4 * 16 * 100
    with pytest.raises(ValueError, match="length: expected at least 1 token, got 0"):
        flops_per_token(config, 0)


def test_operations_are_those_that_torch_counts():
    """But for the lookup, all that the formula counts is there, and nothing else of its size."""
    config = replace(MIXED, embed=64, hidden=96, every=0, expert_hidden=0, routing=None, shared=0)
    model, ids = LanguageModel(config), tokens(2, 24)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids).loss.backward()
    assert counter.get_total_flops() == pytest.approx(flops_per_token(config, 24) * 48, rel=1e-6)


def test_the_table_has_every_size():
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table())
    lines = {line.split()[0]: line.split()[1:] for line in captured.get().splitlines()}
    assert set(SIZES) <= set(lines)
    assert " ".join(lines["large"]) == "4608 32 36/12 2 of 12 2 49.2 G 13 G 787 GB"


# What it writes ----------------------------------------------------------------------------------------------


def test_the_most_probable_tokens_follow():
    model = drawn(lambda: lively(LanguageModel(MIXED)))
    prompt = tokens(2, 3)
    with saved_tensors_hooks(pytest.fail, pytest.fail):  # nothing is kept for a backward
        text = generate(model, prompt, 4, temperature=0)
    assert text.shape == (2, 7)
    assert torch.equal(text[:, :3], prompt)
    assert torch.equal(text[:, 3:], model(text).argmax(-1)[:, 2:-1])
    assert torch.equal(generate(model, prompt, 4, top_k=1), text)
    assert torch.equal(generate(model, prompt, 0), prompt)


def test_tokens_are_drawn_from_the_distribution():
    model = drawn(lambda: lively(LanguageModel(MIXED)))
    prompt = tokens(1, 3).expand(4000, 3)
    generator = torch.Generator().manual_seed(0)
    logits = model(prompt[:1])[0, -1]
    for temperature, top_k in ((1.0, None), (2.0, 4)):
        drawn_ids = generate(model, prompt, 1, temperature=temperature, top_k=top_k, generator=generator)[:, 3]
        wanted = logits / temperature
        if top_k is not None:
            wanted = wanted.masked_fill(wanted < wanted.topk(top_k).values[-1], -torch.inf)
        frequencies = drawn_ids.bincount(minlength=13) / 4000
        torch.testing.assert_close(frequencies, wanted.softmax(0).float(), rtol=0, atol=0.03)


@pytest.mark.parametrize(("spec", "fold"), [("cp=3", "ep=3"), ("dp=1 cp=1 tp=2", "ep=1 etp=2"), ("dp=2", "ep=2")])
def test_all_ranks_write_the_same(spec, fold):
    serial = drawn(lambda: LanguageModel(MIXED))
    expected = generate(serial, tokens(2, 1), 6, generator=torch.Generator().manual_seed(0))
    ranks = Mesh(spec).world_size

    def rank():
        mesh = Mesh(spec)
        model = LanguageModel(MIXED, mesh, mesh.fold(fold))
        take(model, serial)
        return generate(model, tokens(2, 1), 6, generator=torch.Generator().manual_seed(commlayer.world().rank))

    assert all(torch.equal(text, expected) for text in run_local(rank, ranks=ranks))


# Bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: must be at least 1, got 0"),
        ({"depth": 0}, "depth: must be at least 1, got 0"),
        ({"hidden": 0}, "hidden: must be at least 1, got 0"),
        ({"expert_hidden": 0}, "expert_hidden: must be at least 1, got 0"),
        ({"heads": 3}, "heads: must cut embed 16 into an even number of channels, got 3"),
        ({"heads": 16}, "heads: must cut embed 16 into an even number of channels, got 16"),
        ({"kv_heads": 3}, "kv_heads: must divide heads 4, got 3"),
        ({"every": 3}, r"every: expected 0 \(no experts\) to depth 2, got 3"),
        ({"every": -1}, r"every: expected 0 \(no experts\) to depth 2, got -1"),
        ({"routing": None}, "routing: missing, but every 2 asks for experts"),
        ({"every": 0}, "routing: given, but every 0 means no experts"),
        ({"every": 0, "routing": None}, "shared: expected 0 or more, and none without experts, got 1"),
        ({"shared": -1}, "shared: expected 0 or more, and none without experts, got -1"),
        ({"rope_theta": 0.0}, "rope_theta: must be positive, got 0.0"),
        ({"norm_eps": float("nan")}, "norm_eps: must be positive, got nan"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(MIXED, **changes)


def test_wrong_input():
    with pytest.raises(ValueError, match=r"size: expected one of tiny, .*, got 'huge'"):
        LanguageModelConfig.named("huge")
    assert LanguageModelConfig.named("tiny", tied=False) == replace(SIZES["tiny"], tied=False)
    with pytest.raises(ValueError, match="recompute: expected one of none, selective, full, got 'some'"):
        LanguageModel(MIXED, recompute="some")
    with pytest.raises(ValueError, match=r"experts: .*fold.* is the fold of a mesh, which is missing"):
        LanguageModel(MIXED, experts=Mesh("dp=2").fold("ep=2"))
    model = LanguageModel(MIXED)
    with pytest.raises(ValueError, match=r"ids: expected integers, batch × tokens, got torch.int64 of shape \(3,\)"):
        model(tokens(1, 3)[0])
    with pytest.raises(ValueError, match=r"ids: expected integers, batch × tokens, got torch.float32 of shape"):
        model(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"targets: expected the shape of ids, \(1, 3\), got \(1, 4\)"):
        model(tokens(1, 3), tokens(1, 4))


@pytest.mark.parametrize(
    ("ids", "length", "options", "message"),
    [
        (torch.zeros(3, dtype=torch.long), 1, {}, r"ids: expected batch × tokens, .*, got shape \(3,\)"),
        (torch.zeros(1, 0, dtype=torch.long), 1, {}, r"ids: expected batch × tokens, .*, got shape \(1, 0\)"),
        (tokens(1, 3), -1, {}, "length: expected 0 or more tokens, got -1"),
        (tokens(1, 3), 1, {"temperature": -0.5}, "temperature: expected 0 or more, got -0.5"),
        (tokens(1, 3), 1, {"top_k": 14}, "top_k: expected 1 to the 13 entries of the vocabulary, got 14"),
        (tokens(1, 3), 1, {"top_k": 0}, "top_k: expected 1 to the 13 entries of the vocabulary, got 0"),
    ],
)
def test_wrong_requests_for_text(ids, length, options, message):
    with pytest.raises(ValueError, match=message):
        generate(LanguageModel(MIXED), ids, length, **options)

"""Models cut over a group against the same in plain torch: values, and the gradient of every parameter.

All ranks draw the whole input and the whole reference, so that the comparison needs nothing of the layer but
``gather_full``.
"""

import math
import threading
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

import commlayer
from commlayer import balanced_sizes
from parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel.placement import gather_full, mark_replicated, placement
from parallel.tensor import ColumnParallelLinear, VocabParallelEmbedding
from parallel.transformer import ParallelAttention, ParallelMLP

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
LOCK = threading.Lock()
AXIS = "tp"


def drawn(make, seed=0):
    """``make()`` from this seed, though thread ranks share torch's generator."""
    with LOCK:
        torch.manual_seed(seed)
        return make()


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def strided(x):
    """The same values in another memory order."""
    return x.mT.contiguous().mT if x.ndim > 1 else x


def mine(group, total):
    """This rank's slice of ``total``, balanced."""
    sizes = balanced_sizes(total, group.size)
    return slice(sum(sizes[: group.rank]), sum(sizes[: group.rank + 1]))


@contextmanager
def calls(monkeypatch):
    """What the ranks of this process call of commlayer meanwhile: (name, shape of the tensor)."""
    seen = []

    def spy(name, function):
        def call(x, *args, **options):
            seen.append((name, tuple(x.shape)))
            return function(x, *args, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
            patch.setattr(commlayer, name, spy(name, getattr(commlayer, name)))
        yield seen


@contextmanager
def in_step(monkeypatch, ranks):
    """torch.compile for thread ranks: none runs before all are compiled, since ``is_compiling`` is the process's."""
    everyone, eager, compile = threading.Barrier(ranks, timeout=60), lookup_backend("aot_eager"), torch.compile

    def backend(graph, inputs):
        compiled = eager(graph, inputs)
        return lambda *args: everyone.wait() >= 0 and compiled(*args)

    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "compile", lambda model, **_: compile(model, fullgraph=True, dynamic=False, backend=backend)
        )
        yield


def whole_gradient(p, group):
    """What an optimiser on one process would see."""
    grad = p.grad
    if AXIS in placement(p).partial:
        grad = commlayer.all_reduce(grad, group=group)
    return gather_full(grad, p)


def assert_gradients(model, serial, group, **tolerance):
    for (name, p), (other, q) in zip(model.named_parameters(), serial.named_parameters(), strict=True):
        assert name == other
        grad = whole_gradient(p, group)
        torch.testing.assert_close(grad, q.grad, msg=lambda m, n=name: f"{n}: {m}", **{**CLOSE, **tolerance})


class PlainMLP(nn.Module):
    def __init__(self, embed, hidden, gated=False, bias=True):
        super().__init__()
        self.gated = gated
        self.up = nn.Linear(embed, 2 * hidden if gated else hidden, bias)
        self.down = nn.Linear(hidden, embed, bias)

    def forward(self, x):
        h = self.up(x)
        return self.down(F.silu(h[..., 0::2]) * h[..., 1::2] if self.gated else F.gelu(h))


class PlainAttention(nn.Module):
    """Head by head, by the formula."""

    def __init__(self, embed, heads, kv_heads, causal=False, bias=True):
        super().__init__()
        self.shape, self.causal = (embed // heads, heads // kv_heads, kv_heads), causal
        self.qkv = nn.Linear(embed, embed + 2 * kv_heads * (embed // heads), bias)
        self.out = nn.Linear(embed, embed, bias)

    def forward(self, x, mask=None):
        dim, queries, kv_heads = self.shape
        heads = []
        for rows in self.qkv(x).chunk(kv_heads, -1):
            *qs, k, v = rows.split(dim, -1)
            assert len(qs) == queries
            for q in qs:
                scores = q @ k.mT / math.sqrt(dim)
                if self.causal:
                    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
                if mask is not None:
                    scores = scores.masked_fill(~mask, -math.inf)
                heads.append(torch.softmax(scores, -1) @ v)
        return self.out(torch.cat(heads, -1))


class Block(nn.Module):
    """Pre-norm: attention, then MLP."""

    def __init__(self, embed, attention, mlp):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(embed), nn.LayerNorm(embed)
        self.attention, self.mlp = attention, mlp

    def forward(self, x, sizes=None, **options):
        extra = {} if sizes is None else {"sizes": sizes}
        x = x + self.attention(self.norm1(x), **options, **extra)
        return x + self.mlp(self.norm2(x), **extra)


def blocks(group, *, heads=12, kv_heads=12, hidden=13, gated=False, causal=False, sequence_parallel=False):
    """The parallel block and the plain one, with the same bits: 24 channels."""
    embed = 24
    cut = {"group": group, "sequence_parallel": sequence_parallel}
    activation = F.silu if gated else F.gelu

    def parallel():
        attention = ParallelAttention(embed, heads, kv_heads, causal=causal, **cut)
        return Block(embed, attention, ParallelMLP(embed, hidden, gated=gated, activation=activation, **cut))

    def plain():
        return Block(embed, PlainAttention(embed, heads, kv_heads, causal), PlainMLP(embed, hidden, gated))

    model, serial = drawn(parallel).double(), drawn(plain).double()
    if sequence_parallel:
        for norm in (model.norm1, model.norm2):
            mark_replicated(norm, (AXIS,))
    return model, serial


def check_block(group, *, tokens=7, compiled=False, masked=False, **options):
    """Output, gradient of the input, gradients of all parameters."""
    model, serial = blocks(group, **options)
    # A scale of its own for every entry, so that gradients are nowhere alike by symmetry.
    with torch.no_grad():
        for i, (p, q) in enumerate(zip(model.norm1.parameters(), serial.norm1.parameters(), strict=True)):
            q.copy_(rand(*q.shape, seed=10 + i))
            p.copy_(q)
    x, v = rand(2, tokens, 24, seed=1), rand(2, tokens, 24, seed=2)
    mask = {"mask": rand(tokens, tokens, seed=3).gt(-0.5) | torch.eye(tokens, dtype=torch.bool)} if masked else {}
    reference = x.clone().requires_grad_()
    expected = serial(reference, **mask)
    (expected * v).sum().backward()

    cut = options.get("sequence_parallel", False)
    part = mine(group, tokens) if cut else slice(None)
    sizes = {"sizes": balanced_sizes(tokens, group.size)} if cut else {}
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x = strided(x[:, part].to(group.device)).requires_grad_()
    model.to(group.device)
    y = run(x, **sizes, **mask)
    (y * v[:, part].to(group.device)).sum().backward()
    torch.testing.assert_close(y, expected[:, part], **CLOSE)
    torch.testing.assert_close(x.grad, reference.grad[:, part], **CLOSE)
    assert_gradients(model, serial, group)


class Words(nn.Module):
    """A language model of a sort: an embedding and a head."""

    def __init__(self, group=None, vocabulary=10):
        super().__init__()
        self.group, self.vocabulary = group, vocabulary
        if group is None:
            self.embedding, self.head = nn.Embedding(vocabulary, 6), nn.Linear(6, vocabulary)
        else:
            self.embedding = VocabParallelEmbedding(vocabulary, 6, group=group)
            self.head = ColumnParallelLinear(6, vocabulary, group=group)

    def forward(self, ids, target, reduction):
        logits = self.head(torch.tanh(self.embedding(ids)))
        if self.group is None:
            return F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction=reduction)
        options = {"group": self.group, "vocab_size": self.vocabulary, "reduction": reduction}
        return vocab_parallel_cross_entropy(logits, target, **options)

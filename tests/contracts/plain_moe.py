"""A mixture-of-experts layer and a language model of them in plain torch: what the parallel ones are compared with.

Written apart from them, from the papers: token by token, expert by expert, no layer of ours. The parameter names and
whole shapes are the same.

Routers: Shazeer et al. 2017 (arXiv:1701.06538), Fedus et al. 2021 (Switch, arXiv:2101.03961: balance loss), Zoph et al.
2022 (ST-MoE, arXiv:2202.08906: z-loss), DeepSeek-AI 2024 (V3, arXiv:2412.19437: sigmoid scores, groups, bias).
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tests.contracts.tensor import PlainMLP


class Result(NamedTuple):
    y: torch.Tensor
    loss: torch.Tensor  # balance and z-loss together
    counts: torch.Tensor  # of each expert: how many choices, those that were dropped too
    dropped: torch.Tensor


class PlainMoE(nn.Module):
    """``routing`` is a parallel.router.Routing."""

    def __init__(self, embed, hidden, routing, shared=0, gated=True):
        super().__init__()
        self.routing = routing
        self.router = PlainRouter(embed, routing)
        self.experts = PlainExperts(embed, hidden, routing.experts, gated)
        self.shared = PlainMLP(embed, hidden * shared, gated, bias=False) if shared else None

    def forward(self, x, order=None):
        """``order``: in which the tokens (of x flattened) ask for room in the experts, by default as they stand."""
        tokens, routing = x.reshape(-1, x.shape[-1]), self.routing
        choices, weights, loss = self.router(tokens)
        room = math.inf
        if routing.capacity_factor:
            # Of 1.1 as it is written, which as a binary number is a little more: 1.1 · 10 leaves room for 11.
            factor = Fraction(str(routing.capacity_factor))
            room = math.ceil(factor * len(tokens) * routing.top_k / routing.experts)
        rows = [torch.zeros_like(token) for token in tokens]
        counts, dropped = [0] * routing.experts, 0
        for t in range(len(tokens)) if order is None else order:
            for expert, weight in zip(choices[t], weights[t], strict=True):
                counts[expert] += 1
                if counts[expert] > room:
                    dropped += 1
                else:
                    rows[t] = rows[t] + weight * self.experts(expert, tokens[t])
        y = torch.stack(rows).view(x.shape) if rows else x * 0
        if self.shared is not None:
            y = y + self.shared(x)
        return Result(y, loss, torch.tensor(counts), torch.tensor(dropped))


class PlainRouter(nn.Module):
    def __init__(self, embed, routing):
        super().__init__()
        self.routing = routing
        self.weight = nn.Linear(embed, routing.experts, bias=False).weight
        self.register_buffer("bias", torch.zeros(routing.experts) if routing.bias_rate else None)

    def forward(self, tokens):
        """Which experts each token chose, with which weights; the loss of all of them."""
        experts, top_k = self.routing.experts, self.routing.top_k
        logits = tokens @ self.weight.T
        if self.routing.score == "softmax":
            scores = probabilities = torch.softmax(logits, -1)
        else:
            scores = torch.sigmoid(logits)
            probabilities = scores / scores.sum(-1, keepdim=True)
        choices = [self.choose(token) for token in scores.tolist()]
        weights = []
        for chosen, score in zip(choices, scores, strict=True):
            mine = [score[expert] for expert in chosen]
            total = sum(mine) if self.routing.normalise else 1
            weights.append([w / total * self.routing.scale for w in mine])
        if not len(tokens):
            return choices, weights, logits.sum()
        share = [sum(chosen.count(e) for chosen in choices) / (len(tokens) * top_k) for e in range(experts)]
        balance = experts * sum(f * p for f, p in zip(share, probabilities.mean(0), strict=True))
        z = torch.logsumexp(logits, -1).square().mean()
        return choices, weights, self.routing.balance_loss * balance + self.routing.z_loss * z

    def choose(self, scores):
        """The experts of one token, best first."""
        experts, groups = range(self.routing.experts), self.routing.groups
        bias = [0.0] * len(experts) if self.bias is None else self.bias.tolist()
        biased = [s + b for s, b in zip(scores, bias, strict=True)]
        size = len(experts) // groups

        def worth(group):
            return sum(sorted(biased[group * size : (group + 1) * size])[-2:])

        best = sorted(range(groups), key=worth)[-self.routing.top_groups :]
        allowed = [expert for expert in experts if groups == 1 or expert // size in best]
        return sorted(allowed, key=lambda expert: -biased[expert])[: self.routing.top_k]


class PlainExperts(nn.Module):
    """As many ParallelMLPs without biases, their weights in two stacks."""

    def __init__(self, embed, hidden, experts, gated=True, dtype=None):
        super().__init__()
        self.gated = gated
        self.up = drawn_one_by_one(experts, embed, 2 * hidden if gated else hidden, dtype)
        self.down = drawn_one_by_one(experts, hidden, embed, dtype)

    def forward(self, expert, token):
        h = token @ self.up[expert].T
        return (F.silu(h[0::2]) * h[1::2] if self.gated else F.gelu(h)) @ self.down[expert].T


def drawn_one_by_one(experts, ins, outs, dtype):
    layers = [nn.Linear(ins, outs, bias=False, dtype=dtype) for _ in range(experts)]
    return nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))


class PlainLanguageModel(nn.Module):
    """``config`` is a models.moe.LanguageModelConfig."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.embed)
        self.blocks = nn.ModuleList(PlainBlock(config, i) for i in range(config.depth))
        self.norm = nn.RMSNorm(config.embed, eps=config.norm_eps)
        self.head = nn.Linear(config.embed, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids, targets, order=None):
        """The sum of the cross entropy of all tokens, and that of the layers' losses; ``order`` as in PlainMoE."""
        x, losses = self.embed(ids), self.head.weight.new_zeros(())
        for block in self.blocks:
            x, loss = block(x, order)
            losses = losses + loss
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100), losses


class PlainBlock(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.embed, eps=config.norm_eps)
        self.attention = PlainAttention(config)
        self.norm2 = nn.RMSNorm(config.embed, eps=config.norm_eps)
        if config.every and (index + 1) % config.every == 0:
            self.moe = PlainMoE(config.embed, config.expert_hidden, config.routing, config.shared)
        else:
            self.mlp = PlainMLP(config.embed, config.hidden, gated=True, bias=False)

    def forward(self, x, order=None):
        x = x + self.attention(self.norm1(x))
        if hasattr(self, "mlp"):
            return x + self.mlp(self.norm2(x)), 0.0
        found = self.moe(self.norm2(x), order)
        return x + found.y, found.loss


class PlainAttention(nn.Module):
    """Causal, head by head. Rows of ``qkv``: of every key-value head its queries, its key, its value."""

    def __init__(self, config):
        super().__init__()
        self.dim, self.kv_heads, self.theta = config.embed // config.heads, config.kv_heads, config.rope_theta
        self.qkv = nn.Linear(config.embed, config.embed + 2 * config.kv_heads * self.dim, bias=False)
        self.out = nn.Linear(config.embed, config.embed, bias=False)

    def forward(self, x):
        heads = []
        for rows in self.qkv(x).chunk(self.kv_heads, -1):
            *queries, key, value = rows.split(self.dim, -1)
            key = rotated(key, self.theta)
            for query in queries:
                scores = rotated(query, self.theta) @ key.mT / math.sqrt(self.dim)
                hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
                heads.append(torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ value)
        return self.out(torch.cat(heads, -1))


def rotated(x, theta):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), channel i paired with i + D/2, as Llama has them."""
    tokens, dim = x.shape[-2:]
    half = dim // 2
    turns = torch.tensor([[t * theta ** (-i / half) for i in range(half)] for t in range(tokens)], dtype=torch.float64)
    cos, sin = turns.cos().to(x), turns.sin().to(x)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

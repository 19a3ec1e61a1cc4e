"""Tokens to the ranks of their experts, and the results back to where the tokens came from.

Experts stand in order on the ranks of ``ep``. A rank sorts its tokens by expert, which is also by rank, and sends each
rank its part; there the parts of all ranks are sorted by expert once more. What goes where is known from one exchange
of counts, made before: :class:`Routes`, which never change, so that forward, backward and recomputation agree.

Legend of shape suffixes:
    T tokens of this rank, E embed, K choices of a token, P = T·K pairs of token and choice, R ranks,
    X experts, N rows: pairs that experts of this rank work on
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

import commlayer
from commlayer import Group, Mesh, balanced_sizes
from parallel.exchange import Exchange
from parallel.mappings import all_gather_from_region, reduce_scatter_to_region


@dataclass(frozen=True, eq=False)
class Routes:
    """Where the tokens of one forward pass go."""

    top_k: int
    pairs: Tensor  # of this rank, those that are sent, in the order of experts
    by_expert: Tensor | None  # the order by expert of what arrives; None: it is in this order already
    outgoing: tuple[int, ...]  # rows to each rank of ep
    incoming: tuple[int, ...]  # rows from each
    gathered: tuple[int, ...]  # rows that each rank of etp got so
    rows: tuple[int, ...]  # for each expert of this rank
    ends: Tensor  # the sums of these up to each expert, on the device
    chosen: Tensor  # how often this rank's tokens chose each expert
    chosen_by_all: Tensor  # the same of all ranks (of those that share experts, if nothing asks for more)


class Dispatcher:
    """The way to ``experts`` experts on the axes ``ep`` and ``etp`` of a folded mesh, and back.

    Each rank brings tokens of its own. Along ``etp``, where every expert is cut, they are gathered, and the results,
    partial sums, are added up on the way back. ``mesh=None``: one process.
    """

    def __init__(self, experts: int, mesh: Mesh | None = None) -> None:
        self.ep, self.etp, self.near, self.all = (
            Group.alone() if mesh is None else mesh[axes] for axes in ("ep", "etp", "etp-ep", "etp-ep-edp")
        )
        if experts < self.ep.size:
            raise ValueError(f"experts: {experts} are too few for {self.ep.size} ranks of ep")
        self.experts, self.sizes = experts, balanced_sizes(experts, self.ep.size)

    @torch.no_grad()
    def plan(self, experts_TK: Tensor, capacity_factor: float = 0.0, everyone: bool = False) -> Routes:
        """Routes for these choices, by one all_gather of counts.

        ``everyone``: count over all ranks of the mesh, not only over those that share experts. With a capacity all
        ranks count, and an expert takes so many in the order of ranks, then of tokens, then of a token's choices.
        """
        group = self.all if everyone or capacity_factor else self.near
        choices_P = experts_TK.flatten()
        chosen_X = choices_P.new_zeros(self.experts).scatter_add_(0, choices_P, torch.ones_like(choices_P))
        chosen_RX = commlayer.all_gather(chosen_X, group=group).view(-1, self.experts)
        taken_RX = _within_capacity(chosen_RX, capacity_factor) if capacity_factor else chosen_RX
        taken_X = taken_RX[group.rank]

        # Of the ranks that share experts with this one: ep × etp × experts of this rank.
        taken_JIX = taken_RX.view(-1, self.ep.size, self.etp.size, self.experts)[group.rank // self.near.size]
        first, own = sum(self.sizes[: self.ep.rank]), self.sizes[self.ep.rank]
        arriving_JIX = taken_JIX.narrow(2, first, own)
        rows_X = arriving_JIX.sum((0, 1))
        counts = self._of_ranks(taken_X), arriving_JIX[:, self.etp.rank].sum(1), arriving_JIX.sum((0, 2)), rows_X
        together = torch.cat(counts).cpu()  # at once, since here the host waits for a GPU
        outgoing, incoming, gathered, rows = (
            tuple(part.tolist()) for part in together.split([len(part) for part in counts])
        )
        return Routes(
            top_k=experts_TK.shape[1],
            pairs=_taken(choices_P, chosen_X, taken_X, sum(outgoing)),
            by_expert=_by_expert(arriving_JIX, sum(rows)),
            outgoing=outgoing,
            incoming=incoming,
            gathered=gathered,
            rows=rows,
            ends=rows_X.cumsum(0).to(torch.int32),
            chosen=chosen_X,
            chosen_by_all=chosen_RX.sum(0),
        )

    def _of_ranks(self, counts_X: Tensor) -> Tensor:
        """Sums over the experts of each rank of ep, of which the first may have one more than the others."""
        least, more = divmod(self.experts, self.ep.size)
        cut = more * (least + 1)
        return torch.cat([counts_X[:cut].view(more, least + 1).sum(1), counts_X[cut:].view(-1, least).sum(1)])

    def start(self, x_TE: Tensor, routes: Routes) -> tuple[Exchange, Tensor]:
        """Send the tokens off; :meth:`finish` takes what this returns."""
        exchange = Exchange(routes.outgoing, routes.incoming, self.ep)
        return exchange, exchange.start(_Spread.apply(x_TE, routes.pairs, routes.top_k))

    def finish(self, under_way: tuple[Exchange, Tensor], routes: Routes) -> Tensor:
        """The rows for this rank's experts, expert after expert: N × E."""
        exchange, arriving = under_way
        rows_NE = all_gather_from_region(exchange.wait(arriving), 0, self.etp, routes.gathered)
        return rows_NE if routes.by_expert is None else rows_NE.index_select(0, routes.by_expert)

    def dispatch(self, x_TE: Tensor, routes: Routes) -> Tensor:
        """Both at once."""
        return self.finish(self.start(x_TE, routes), routes)

    def combine(self, rows_NE: Tensor, weights_TK: Tensor, routes: Routes) -> Tensor:
        """What the experts made of the rows, weighted and added up for each token: T × E. Dropped choices add zero."""
        if routes.by_expert is not None:
            rows_NE = torch.empty_like(rows_NE).index_copy_(0, routes.by_expert, rows_NE)
        rows_NE = reduce_scatter_to_region(rows_NE, 0, self.etp, routes.gathered)
        exchange = Exchange(routes.incoming, routes.outgoing, self.ep)
        back = exchange.wait(exchange.start(rows_NE))
        results_PE = back.new_zeros(weights_TK.numel(), back.shape[1]).index_copy_(0, routes.pairs, back)
        results_TKE = results_PE.view(*weights_TK.shape, back.shape[1])
        return torch.einsum("tk,tke->te", weights_TK.to(results_TKE.dtype), results_TKE)


class _Spread(Function):
    """The token of every pair. Its gradient sums a token's choices in a fixed order, unlike that of an index."""

    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, pairs: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(pairs)
        ctx.tokens, ctx.top_k = len(x_TE), top_k
        return x_TE.index_select(0, pairs // top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (pairs,) = ctx.saved_tensors
        grad_PE = grad.new_zeros(ctx.tokens * ctx.top_k, grad.shape[1]).index_copy_(0, pairs, grad)
        return grad_PE.view(ctx.tokens, ctx.top_k, grad.shape[1]).sum(1), None, None


def _within_capacity(chosen_RX: Tensor, factor: float) -> Tensor:
    """What of the choices of each rank the experts take: ⌈factor · mean⌉ of all, those of the first ranks first."""
    # Exactly 1.1, which as a binary number is a little more; and in numbers whose products int64 can hold.
    exact = Fraction(min(max(factor, 1e-6), chosen_RX.shape[1])).limit_denominator(10**6)
    limit = -(-chosen_RX.sum() * exact.numerator // (exact.denominator * chosen_RX.shape[1]))
    before_RX = chosen_RX.cumsum(0) - chosen_RX
    return (limit - before_RX).clamp(min=0).minimum(chosen_RX)


def _taken(choices_P: Tensor, chosen_X: Tensor, taken_X: Tensor, count: int) -> Tensor:
    """The pairs in the order of experts, without those beyond what each takes."""
    pairs = choices_P.argsort(stable=True)
    if count == len(pairs):
        return pairs
    starts_X = chosen_X.cumsum(0) - chosen_X
    place_P = torch.arange(len(pairs), device=pairs.device) - starts_X[choices_P[pairs]]
    beyond_P = place_P >= taken_X[choices_P[pairs]]
    return pairs[beyond_P.to(torch.uint8).argsort(stable=True)[:count]]


def _by_expert(arriving_JIX: Tensor, total: int) -> Tensor | None:
    """The order by expert of rows that come by rank of etp, then by rank of ep, then by expert."""
    ranks_ep, ranks_etp, experts = arriving_JIX.shape
    if ranks_ep * ranks_etp == 1 or experts == 1:
        return None
    expert_of = torch.arange(experts, device=arriving_JIX.device).repeat(ranks_etp * ranks_ep)
    lengths = arriving_JIX.transpose(0, 1).flatten()
    return expert_of.repeat_interleave(lengths, output_size=total).argsort(stable=True)

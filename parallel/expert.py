"""Mixture of experts: in place of one MLP many, of which every token uses a few, spread over the ranks of ``ep``.

After GShard (Lepikhin et al. 2020, arXiv:2006.16668), with shared experts (DeepSeekMoE, Dai et al. 2024,
arXiv:2401.06066), and experts that are cut in turn (parallel folding, Liu et al. 2025, arXiv:2504.14960).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commlayer import Group, Mesh, balanced_sizes
from parallel.amp import as_autocast
from parallel.dispatch import Dispatcher, Routes
from parallel.experts import Experts
from parallel.mappings import gather_from_region, scatter_to_region
from parallel.notes import once
from parallel.placement import mark_replicated
from parallel.router import Routing, TopKRouter
from parallel.transformer import ParallelMLP


class Load(NamedTuple):
    """What one forward pass of a layer has to say about its experts.

    - ``loss``: this rank's part of the auxiliary losses, which the ranks' parts add up to; with gradient.
    - ``counts``: how often this rank's tokens chose each expert, the dropped choices included.
    - ``dropped``: how many choices of this rank were dropped.
    """

    loss: Tensor
    counts: Tensor
    dropped: Tensor


class MoE(nn.Module):
    """A layer that maps x, … × embed, to Σ weight · expert(x) + shared experts(x), and a :class:`Load`.

    Every rank brings tokens of its own, be they of other samples or other parts of a sequence. On ranks of a
    tensor-parallel group that hold the same tokens each routes a part of them. Outputs, losses and dropped tokens are
    those of one process with the tokens of all ranks, in the order of ranks. Compiled models run it eagerly.

    Args:
        routing: how tokens choose; its ``capacity_factor`` and losses are meant for all ranks' tokens together.
        mesh: folded, ``Mesh(…).fold("ep=4")``, with axes etp, ep and edp. Give it to ``DataParallel(…, experts=)`` as
            well, which reduces the experts' gradients over edp. None: one process, whose tokens are all there are; to
            replicate experts over ranks, fold with ``ep=1``.
        group: the tensor-parallel ranks, by default this one alone; ``axis`` is what their mesh calls them.
        shared: how many experts every token uses; as one MLP of that many times ``hidden`` channels, cut over ``group``
            and computed while tokens are under way.
        sequence_parallel: ranks of ``group`` hold different tokens.

    Raises:
        ValueError: for fewer experts than ranks of ep.
    """

    def __init__(
        self,
        embed: int,
        hidden: int,
        routing: Routing,
        *,
        mesh: Mesh | None = None,
        group: Group | None = None,
        axis: str = "tp",
        shared: int = 0,
        activation: Callable[[Tensor], Tensor] = F.silu,
        gated: bool = True,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.routing, self.sequence_parallel = routing, sequence_parallel
        self.group = Group.alone() if group is None else group
        self.dispatcher = Dispatcher(routing.experts, mesh)
        kind: dict[str, Any] = {"activation": activation, "gated": gated}
        self.router = TopKRouter(embed, routing)
        self.experts = Experts(embed, hidden, routing.experts, mesh=mesh, **kind)
        self.shared = None
        if shared:
            place: dict[str, Any] = {"group": self.group, "axis": axis, "sequence_parallel": sequence_parallel}
            self.shared = ParallelMLP(embed, shared * hidden, bias=False, **kind, **place)
        if self.group.size > 1:  # each rank's router sees a part of the tokens
            mark_replicated(self.router, (axis,))

    @torch._disable_dynamo  # how many rows go where depends on the data: compiled models break here
    def forward(self, x: Tensor, sizes: Sequence[int] | None = None) -> tuple[Tensor, Load]:
        """``sizes``: under sequence parallelism the tokens of each rank of ``group``, for the shared experts."""
        embed = self.router.weight.shape[1]
        if not x.ndim or x.shape[-1] != embed:
            raise ValueError(f"x: expected … × {embed}, got {tuple(x.shape)}")
        tokens_TE = x.reshape(-1, embed)
        cut = self.group.size > 1 and not self.sequence_parallel
        parts = balanced_sizes(len(tokens_TE), self.group.size) if cut else None
        if parts:
            tokens_TE = scatter_to_region(tokens_TE, 0, self.group, parts)
        logits_TX, scores_TX = self.router(tokens_TE)
        # Not decided again in a recomputation, which rounding might turn into another decision on one rank.
        experts_TK, routes = once(lambda: self._decide(scores_TX))
        (tokens_TE,) = as_autocast(tokens_TE)  # as the experts will multiply them: half as much to send
        under_way = self.dispatcher.start(tokens_TE, routes)
        shared = None if self.shared is None else self.shared(x, sizes=sizes)
        rows_NE = self.experts(self.dispatcher.finish(under_way, routes), routes.rows, routes.ends)
        y_TE = self.dispatcher.combine(rows_NE, self.router.weigh(scores_TX, experts_TK), routes)
        if parts:
            y_TE = gather_from_region(y_TE, 0, self.group, parts)
        y = y_TE.view(x.shape)
        loss = self.router.loss(logits_TX, scores_TX, routes.chosen_by_all)
        load = Load(loss, routes.chosen, routes.chosen.sum() - len(routes.pairs))
        return y if shared is None else y + shared, load

    def _decide(self, scores_TX: Tensor) -> tuple[Tensor, Routes]:
        experts_TK = self.router.choose(scores_TX)
        everyone = bool(self.routing.balance_loss or self.routing.z_loss)
        return experts_TK, self.dispatcher.plan(experts_TK, self.routing.capacity_factor, everyone)

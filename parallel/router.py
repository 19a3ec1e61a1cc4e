"""Which experts a token goes to, with what weight, and what keeps the experts evenly busy.

Token-choice routing: every token takes its ``top_k`` best experts (Shazeer et al. 2017, arXiv:1701.06538).

Legend of shape suffixes:
    T tokens of this rank, E embed, X experts, G groups of experts, K = top_k
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.placement import initialise


@dataclass(frozen=True)
class Routing:
    """How tokens choose among ``experts`` experts.

    - ``score``: ``softmax`` over all experts, or ``sigmoid`` of each.
    - ``normalise``: the weights of a token's experts add up to 1; ``scale`` multiplies them afterwards.
    - ``groups``, ``top_groups``: the experts stand in so many equal groups, and a token may choose from the best few
      alone, by the sum of a group's two best scores: where a group is a node, its tokens go to few nodes (DeepSeek-V3,
      arXiv:2412.19437).
    - ``capacity_factor``: an expert takes at most this many times the mean, and drops the rest; 0: nothing is dropped.
    - ``balance_loss``: coefficient of X · Σ f·P, the shares of choices times the mean scores (Switch Transformer,
      arXiv:2101.03961). ``z_loss``: that of the mean of logsumexp² (ST-MoE, arXiv:2202.08906).
    - ``bias_rate``: step of the biases that balance the choice without a loss (arXiv:2408.15664); 0: no biases.

    Raises ValueError for values that do not fit together.
    """

    experts: int
    top_k: int
    score: str = "softmax"
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    capacity_factor: float = 0.0
    balance_loss: float = 0.0
    z_loss: float = 0.0
    bias_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "groups", "top_groups"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name}: expected an int, got {getattr(self, name)!r}")
        if self.experts < 1:
            raise ValueError(f"experts: expected at least 1, got {self.experts}")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k: expected 1 to {self.experts}, the number of experts, got {self.top_k}")
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"score: expected 'softmax' or 'sigmoid', got {self.score!r}")
        if self.normalise and self.top_k == 1:
            raise ValueError("normalise: with top_k 1 every weight would be 1, and the router learn nothing")
        if self.groups < 1 or self.experts % self.groups:
            raise ValueError(f"groups: must divide the {self.experts} experts, got {self.groups}")
        if not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"top_groups: expected 1 to {self.groups}, the number of groups, got {self.top_groups}")
        if self.top_k > self.top_groups * (self.experts // self.groups):
            raise ValueError(
                f"top_k: {self.top_k} is more than the {self.top_groups} best groups have, of "
                f"{self.experts // self.groups} experts each"
            )
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale: expected a positive number, got {self.scale}")
        for name in ("capacity_factor", "balance_loss", "z_loss", "bias_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number from 0 on, got {getattr(self, name)}")


class TopKRouter(nn.Module):
    """Scores of all experts for each token, and the choice by them.

    Everything is computed in float32, or float64 if the tokens are, also under autocast: rounding of scores would
    change choices. ``bias`` (a buffer, None without ``bias_rate``) is added for the choice alone.
    """

    bias: Tensor | None

    def __init__(
        self,
        embed: int,
        routing: Routing,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.routing = routing
        self.weight = nn.Parameter(torch.empty(routing.experts, embed, device=device, dtype=dtype))
        bias = torch.zeros(routing.experts, device=device, dtype=torch.float32) if routing.bias_rate else None
        self.register_buffer("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear draws its weight; biases are 0."""
        initialise(self.weight, lambda full: nn.init.kaiming_uniform_(full, a=math.sqrt(5)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKRouter:
        before = self.bias
        super()._apply(fn, recurse)
        if before is not None and self.bias is not None and self.bias.itemsize < before.itemsize:
            self.bias = before.to(self.bias.device)  # in half precision small steps would change nothing
        return self

    def forward(self, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and scores, both T × X."""
        with torch.autocast(x_TE.device.type, enabled=False):
            logits_TX = F.linear(_wide(x_TE), _wide(self.weight))
            return logits_TX, logits_TX.softmax(-1) if self.routing.score == "softmax" else logits_TX.sigmoid()

    @torch.no_grad()
    def choose(self, scores_TX: Tensor) -> Tensor:
        """The experts of each token, T × K, the best first."""
        routing = self.routing
        if self.bias is not None:
            scores_TX = scores_TX + self.bias
        if routing.top_groups < routing.groups:
            scores_TGX = scores_TX.unflatten(1, (routing.groups, -1))
            best_TG = scores_TGX.topk(min(2, scores_TGX.shape[2]), sorted=False).values.sum(2)
            allowed = torch.zeros_like(best_TG, dtype=torch.bool)
            allowed.scatter_(1, best_TG.topk(routing.top_groups, sorted=False).indices, True)
            scores_TX = scores_TGX.masked_fill(~allowed.unsqueeze(2), -math.inf).flatten(1)
        return scores_TX.topk(routing.top_k).indices

    def weigh(self, scores_TX: Tensor, experts_TK: Tensor) -> Tensor:
        """The weights of the chosen experts, T × K."""
        weights_TK = scores_TX.gather(1, experts_TK)
        if self.routing.normalise:
            weights_TK = _normalised(weights_TK)
        return weights_TK * self.routing.scale

    def loss(self, logits_TX: Tensor, scores_TX: Tensor, chosen_X: Tensor) -> Tensor:
        """This rank's part of the balance loss and the z-loss of all ranks' tokens, which the ranks' parts add up to.

        ``chosen_X``: how often all ranks together chose each expert.
        """
        routing, choices = self.routing, chosen_X.sum().clamp(min=1).to(logits_TX.dtype)
        total = logits_TX.new_zeros(())
        if routing.balance_loss:
            shares_X = chosen_X / choices
            if routing.score == "sigmoid":
                scores_TX = _normalised(scores_TX)
            means_X = scores_TX.sum(0) * (routing.top_k / choices)
            total = total + routing.balance_loss * routing.experts * (shares_X * means_X).sum()
        if routing.z_loss:
            total = total + routing.z_loss * logits_TX.logsumexp(1).square().sum() * (routing.top_k / choices)
        return total

    @torch.no_grad()
    def balance(self, chosen_X: Tensor) -> None:
        """Raise the biases of experts that were chosen less than the mean in the last step, and lower the others'.

        ``chosen_X``: how often, over all ranks and micro-batches.
        """
        if self.bias is not None:
            lacking_X = chosen_X.sum() - len(chosen_X) * chosen_X  # in integers, which lose nothing
            self.bias += self.routing.bias_rate * lacking_X.sign().to(self.bias)

    def extra_repr(self) -> str:
        return f"{self.routing}"


def _normalised(scores: Tensor) -> Tensor:
    """Over their sum; zeros, with a gradient of zero, where all have underflown."""
    return scores / (scores.sum(1, keepdim=True) + 1e-20)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

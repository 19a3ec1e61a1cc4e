"""Tensor parallelism: linear layers and embeddings whose weights are cut over a group.

After Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053), with sequence parallelism (Korthikanti et al. 2022,
arXiv:2205.05198). A column-parallel layer makes some of the features on each rank, a row-parallel one takes them in;
between the two nothing is communicated.

======================  =====================  ====================  ====================  =====================
layer                   what is cut            x                     y                     sequence_parallel
======================  =====================  ====================  ====================  =====================
ColumnParallelLinear    rows: out_features     whole                 some of the features  x: some of the tokens
RowParallelLinear       columns: in_features   some of the features  whole                 y: some of the tokens
VocabParallelEmbedding  rows: num_embeddings   ids, whole            whole                 y: some of the tokens
======================  =====================  ====================  ====================  =====================

Parts are balanced ([3, 3, 2, 2] of 10 over 4). At a given seed the ranks together hold bit for bit what torch's own
layers would, and leave the generator where those would. On a group of one rank they compute as torch's own do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commlayer import Group, balanced_sizes
from parallel.column import column_linear
from parallel.mappings import gather_from_region, reduce_from_region, reduce_scatter_to_region, scatter_to_region
from parallel.placement import gather_full, initialise, mark_replicated, mark_sharded, part_of, placement

Device = torch.device | str | None
L = TypeVar("L", bound="_ParallelLinear")


class _Sharded(nn.Module):
    """A module with parameters that are cut over a group; every one that it gets is marked as such.

    ``group``: the ranks that share the module, by default this one alone; ``axis`` is what the mesh calls them.
    """

    cuts: ClassVar[dict[str, int]]  # which parameters are cut, and along which dim
    weight: nn.Parameter

    def __init__(
        self,
        extent: int,
        *,
        group: Group | None,
        axis: str,
        sequence_parallel: bool,
        sequence_dim: int = -2,
        sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.group = Group.alone() if group is None else group
        self.axis = axis
        self.sequence_parallel, self.sequence_dim = sequence_parallel, sequence_dim
        self.sizes = tuple(balanced_sizes(extent, self.group.size) if sizes is None else sizes)
        if len(self.sizes) != self.group.size or sum(self.sizes) != extent or min(self.sizes) < 0:
            raise ValueError(
                f"sizes: expected extents for {self.group.size} ranks that add up to {extent}, got {list(self.sizes)}"
            )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._mark(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Sharded:
        super()._apply(fn, recurse)
        for name in self._parameters:  # new ones, where the module moved off the meta device
            self._mark(name)
        return self

    def _mark(self, name: str) -> None:
        param = self._parameters[name]
        if param is None or self.group.size == 1:
            return
        if name not in self.cuts:
            if self.sequence_parallel:  # it sees this rank's tokens alone
                mark_replicated(param, (self.axis,))
        elif self.axis not in [shard.axis for shard in placement(param).shards]:
            mark_sharded(param, self.cuts[name], axis=self.axis, group=self.group, sizes=self.sizes)

    def full_weight(self) -> Tensor:
        """The whole weight, without gradient; collective over the group."""
        return gather_full(self.weight, self.weight)

    def extra_repr(self) -> str:
        words = f", {self.axis}: {self.sizes[self.group.rank]} of {sum(self.sizes)} on rank {self.group.rank}"
        return words + (", sequence_parallel" if self.sequence_parallel else "")

    def _take(self, whole: nn.Module) -> None:
        """This rank's parts of the parameters of ``whole``, on their device, frozen where they are."""
        self.to_empty(device=next(whole.parameters()).device)
        for name, param in whole.named_parameters(recurse=False):
            mine = getattr(self, name)
            with torch.no_grad():
                mine.copy_(part_of(param, mine))
            mine.requires_grad_(param.requires_grad)

    def _check(self, sizes: Sequence[int] | None) -> None:
        if sizes is not None and not self.sequence_parallel:
            raise ValueError(f"sizes: {list(sizes)} are for sequence_parallel, which is off")

    def _add_up(self, y: Tensor, sizes: Sequence[int] | None) -> Tensor:
        """The sum of all ranks' y, under sequence parallelism that of this rank's tokens."""
        if not self.sequence_parallel:
            return reduce_from_region(y, self.group)
        tokens = y.shape[self.sequence_dim]
        if sizes is None and tokens % self.group.size:
            raise ValueError(
                f"sizes: {tokens} tokens do not divide into {self.group.size} equal parts; give each rank's, for "
                f"example balanced_sizes({tokens}, {self.group.size})"
            )
        return reduce_scatter_to_region(y, self.sequence_dim, self.group, sizes)


class _ParallelLinear(_Sharded):
    """What the two linear layers share: everything but the forward."""

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, *, device: Device, dtype: torch.dtype | None, **cut: Any
    ) -> None:
        shape, dim = [out_features, in_features], self.cuts["weight"]
        super().__init__(shape[dim], **cut)
        self.in_features, self.out_features = in_features, out_features
        shape[dim] = self.sizes[self.group.rank]
        length = shape[0] if "bias" in self.cuts else out_features
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(length, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """This rank's part of what nn.Linear would draw."""
        initialise(self.weight, lambda full: nn.init.kaiming_uniform_(full, a=math.sqrt(5)))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
            initialise(self.bias, lambda full: nn.init.uniform_(full, -bound, bound))

    @classmethod
    def from_linear(cls: type[L], linear: nn.Linear, **options: Any) -> L:
        """This rank's part of ``linear``, which is the same on all ranks; ``options`` are the constructor's."""
        bias, dtype = linear.bias is not None, linear.weight.dtype
        made = cls(linear.in_features, linear.out_features, bias, device="meta", dtype=dtype, **options)
        made._take(linear)
        return made

    def to_linear(self) -> nn.Linear:
        """The whole layer, as a copy; collective over the group."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.full_weight().clone(), self.weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(gather_full(self.bias, self.bias).clone(), self.bias.requires_grad)
        return linear

    def full_bias(self) -> Tensor | None:
        """The whole bias, without gradient, if there is one; collective over the group."""
        return None if self.bias is None else gather_full(self.bias, self.bias)

    def extra_repr(self) -> str:
        words = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return words + super().extra_repr()


class ColumnParallelLinear(_ParallelLinear):
    """A linear layer of which each rank has some rows, and makes some of the output features: y = x Wᵀ + b.

    x is whole on every rank, or under ``sequence_parallel`` each rank's tokens (``sequence_dim``), which are gathered.
    y has this rank's features, or with ``gather_output`` all. ``out_sizes``: the features of each rank, by default
    balanced. In backward the input's gradient is reduced while the weight's is computed.
    """

    cuts: ClassVar[dict[str, int]] = {"weight": 0, "bias": 0}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: Group | None = None,
        axis: str = "tp",
        out_sizes: Sequence[int] | None = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        sequence_dim: int = -2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        cut = {"group": group, "axis": axis, "sizes": out_sizes}
        sequence = {"sequence_parallel": sequence_parallel, "sequence_dim": sequence_dim}
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype, **cut, **sequence)
        self.gather_output = gather_output

    def forward(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """``sizes``: how many tokens each rank has, under sequence parallelism; by default as many as this one."""
        self._check(sizes)
        if self.group.size == 1:
            return F.linear(x, self.weight, self.bias)
        if self.sequence_parallel:
            sizes = [x.shape[self.sequence_dim]] * self.group.size if sizes is None else sizes
        y = column_linear(x, self.weight, self.bias, self.group, self.sequence_dim, sizes)
        return gather_from_region(y, -1, self.group, self.sizes) if self.gather_output else y


class RowParallelLinear(_ParallelLinear):
    """A linear layer of which each rank has some columns, for some of the input features: y = Σ x Wᵀ + b.

    x has this rank's features, as column-parallel layers make them, or with ``scatter_input`` all. y is whole on every
    rank, or under ``sequence_parallel`` each rank's tokens (``sequence_dim``). The bias then sees these alone, so that
    its gradient is a partial sum: it is marked as replicated over the axis.
    """

    cuts: ClassVar[dict[str, int]] = {"weight": 1}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: Group | None = None,
        axis: str = "tp",
        scatter_input: bool = False,
        sequence_parallel: bool = False,
        sequence_dim: int = -2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sequence = {"sequence_parallel": sequence_parallel, "sequence_dim": sequence_dim}
        super().__init__(
            in_features, out_features, bias, device=device, dtype=dtype, group=group, axis=axis, **sequence
        )
        self.scatter_input = scatter_input

    def forward(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """``sizes``: how many tokens each rank gets, under sequence parallelism; by default equally many."""
        self._check(sizes)
        if self.group.size == 1:
            return F.linear(x, self.weight, self.bias)
        if self.scatter_input:
            x = scatter_to_region(x, -1, self.group, self.sizes)
        y = self._add_up(F.linear(x, self.weight), sizes)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class VocabParallelEmbedding(_Sharded):
    """An embedding of which each rank has some rows; y is whole on every rank.

    Under ``sequence_parallel`` y is each rank's tokens (dim -2 of y). ids are the same on all ranks. One that is out of
    range is an IndexError on all ranks on CPU; on a GPU, or in a compiled graph, the lookup fails on one of them.
    ``padding_idx`` is as in nn.Embedding. Raises ValueError for fewer rows than ranks.
    """

    cuts: ClassVar[dict[str, int]] = {"weight": 0}

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        group: Group | None = None,
        axis: str = "tp",
        sequence_parallel: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, group=group, axis=axis, sequence_parallel=sequence_parallel)
        if num_embeddings < self.group.size:
            raise ValueError(f"num_embeddings: {num_embeddings} rows are too few for {self.group.size} ranks")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx: expected one of {num_embeddings} rows, got {padding_idx}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.weight = nn.Parameter(torch.empty(self.sizes[self.group.rank], embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """This rank's part of what nn.Embedding would draw."""

        def fill(full: Tensor) -> None:
            nn.init.normal_(full)
            if self.padding_idx is not None:
                full[self.padding_idx] = 0

        initialise(self.weight, fill)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, **options: Any) -> VocabParallelEmbedding:
        """This rank's part of ``embedding``, which is the same on all ranks; ``options`` are the constructor's.

        Raises ValueError for one with max_norm, scale_grad_by_freq or sparse gradients.
        """
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(embedding, name):
                raise ValueError(f"embedding: {name}={getattr(embedding, name)} has no parallel counterpart")
        rows, width = embedding.weight.shape
        made = cls(rows, width, embedding.padding_idx, device="meta", dtype=embedding.weight.dtype, **options)
        made._take(embedding)
        return made

    def forward(self, ids: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """``sizes``: how many tokens each rank gets, under sequence parallelism; by default equally many."""
        self._check(sizes)
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(f"ids: expected 0 to {self.num_embeddings - 1}, got {low if low < 0 else high}")
        if self.group.size == 1:
            return F.embedding(ids, self.weight, self.padding_idx)
        rank, last = self.group.rank, self.group.size - 1
        first, rows = sum(self.sizes[:rank]), self.sizes[rank]
        local = ids - first
        # What is out of range altogether stays with the first or the last rank, for its lookup to refuse.
        elsewhere = (local < (0 if rank > 0 else -math.inf)) | (local >= (rows if rank < last else math.inf))
        padding = None
        if self.padding_idx is not None and first <= self.padding_idx < first + rows:
            padding = self.padding_idx - first
        y = F.embedding(local.masked_fill(elsewhere, 0), self.weight, padding)
        return self._add_up(y.masked_fill_(elsewhere.unsqueeze(-1), 0), sizes)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}" + super().extra_repr()

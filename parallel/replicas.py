"""Which ranks hold the same parameters, and whose gradients belong together: what data parallelism has to agree on."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

import commlayer
from commlayer import AVG, SUM, Group, Mesh, UnsupportedOperation, premul_sum
from parallel.buckets import Reduction, packs_of
from parallel.placement import placement

# Who reduces the gradients of a parameter, by its id.
WRAPPERS: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


class Replicas:
    """Of a model on a mesh, whose experts are on a folded one; or without a mesh, on the ranks of ``group`` alone.

    ``caller``: the class whose arguments these are, for its errors.

    Raises:
        ValueError: for a group beside a mesh, and experts without one.
    """

    def __init__(self, group: Group | None, mesh: Mesh | None, experts: Mesh | None, caller: str) -> None:
        if mesh is not None and group is not None:
            raise ValueError("group: give a group or a mesh, not both")
        if experts is not None and mesh is None:
            raise ValueError("mesh: needed beside experts, which is folded from it")
        self.mesh, self.experts, self.caller = mesh, experts, caller
        if mesh is not None:
            self.group = mesh["dp"] if "dp" in mesh.axes else Group.alone()
        else:
            self.group = commlayer.world() if group is None else group

    def summed_over(self, param: Tensor) -> Group:
        """The ranks whose gradients of ``param`` add up: those of dp, and of the axes where they are partial sums."""
        partial = placement(param).partial
        if self.is_expert(param):
            assert self.experts is not None
            return self.experts["edp"]
        if partial:
            assert self.mesh is not None
            return self.mesh["-".join([*(["dp"] if "dp" in self.mesh.axes else []), *partial])]
        return self.group

    def reduction(self, param: Tensor) -> Reduction | None:
        """The mean over the data axis, the sum over the axes where gradients are partial; None: they are whole."""
        group = self.summed_over(param)
        if group.size == self.group.size == 1:
            return None
        if group.ranks == self.group.ranks:
            return Reduction(self.group, AVG)
        # Also over a single rank, whose expert has seen the tokens of all the others.
        return Reduction(group, SUM if self.group.size == 1 else premul_sum(1 / self.group.size))

    def is_expert(self, param: Tensor) -> bool:
        """Whether it is placed on the folded mesh, rather than on the one that this is folded from."""
        experts = self.experts
        return experts is not None and any(shard.axis in experts.axes for shard in placement(param).shards)

    def copies(self, named: Iterable[tuple[str, Tensor]]) -> dict[Group, dict[str, Tensor]]:
        """Parameters and buffers by the group whose ranks all have the same of them.

        Those of a buffer are the data-parallel ones alone: nothing says whether it differs along another axis.
        """
        found: dict[Group, dict[str, Tensor]] = {}
        for name, t in named:
            group = self.group
            if self.is_expert(t):
                assert self.experts is not None
                group = self.experts["edp"]
            elif self.mesh is not None and isinstance(t, nn.Parameter):
                cut = {"pp", *(shard.axis for shard in placement(t).shards if shard.group.size > 1)}
                axes = [axis for axis in self.mesh.axes if axis not in cut]
                group = self.mesh["-".join(axes)] if axes else Group.alone()
            found.setdefault(group, {})[name] = t
        return {group: tensors for group, tensors in found.items() if group.size > 1}

    def check_alike(self, named: Iterable[tuple[str, Tensor]], *settings: str) -> None:
        """All ranks raise ValueError, rather than one of them, while the others wait for it in a reduction.

        ``settings``: what else has to be the same.
        """
        for group, tensors in self.copies(named).items():
            mine = [*settings]
            for name, t in tensors.items():
                frozen = isinstance(t, nn.Parameter) and not t.requires_grad
                marks = "".join(f" partial over {axis}" for axis in placement(t).partial)
                mine.append(f"{name}: {str(t.dtype)[6:]} {list(t.shape)}{' frozen' if frozen else ''}{marks}")
            digest = hashlib.sha256("\n".join(mine).encode()).hexdigest()
            if len(set(commlayer.all_gather_object(digest, group=group))) == 1:
                continue
            everyone = commlayer.all_gather_object(mine, group=group)
            for rank, theirs in enumerate(everyone):
                for i in range(max(len(theirs), len(everyone[0]))):
                    pair = [entries[i] if i < len(entries) else "nothing" for entries in (everyone[0], theirs)]
                    if pair[0] != pair[1]:
                        raise ValueError(f"module: rank 0 has {pair[0]}, rank {rank} has {pair[1]}")

    @torch.no_grad()
    def broadcast(self, named: Iterable[tuple[str, Tensor]], limit: int) -> None:
        """From the first rank that has the same, in place, packed: many small tensors cost one message."""
        for group, tensors in self.copies(named).items():
            for pack in packs_of([t for t in tensors.values() if t.numel()], limit):
                flat = torch.cat([t.detach().reshape(-1) for t in pack])
                commlayer.broadcast(flat, src=0, group=group, out=flat)
                for t, part in zip(pack, flat.split([t.numel() for t in pack]), strict=True):
                    t.copy_(part.view(t.shape))

    def check_marks(self, module: nn.Module) -> None:
        """ValueError for a parameter that is placed where these ranks are not."""
        mesh, experts = self.mesh, self.experts
        for name, param in module.named_parameters():
            marks = placement(param)
            if "dp" in marks.partial:
                raise ValueError(f"mark_replicated: {name} is marked for dp, over which {self.caller} averages anyway")
            if marks.partial and mesh is None:
                raise ValueError(f"mesh: needed, since {name} is replicated over {', '.join(marks.partial)}")
            cut = [shard.axis for shard in marks.shards if shard.group.size > 1]
            axes: Sequence[str] = [*marks.partial, *cut]
            others = () if mesh is None else mesh.axes
            if experts is not None and self.is_expert(param):
                if wrong := [axis for axis in axes if axis not in experts.axes or axis in marks.partial]:
                    raise ValueError(
                        f"experts: {name} is on {experts}, so it cannot be cut or replicated over {wrong[0]}"
                    )
            elif any(shard.axis in ("ep", "etp") for shard in marks.shards) and (
                cut
                or any(mesh is not None and mesh.size(axis) > 1 for axis in others if axis not in ("dp", "pp", *axes))
            ):
                raise ValueError(f"experts: needed beside mesh, since {name} belongs to experts on a folded mesh")
            elif mesh is not None and (lacking := [axis for axis in axes if axis not in mesh.axes]):
                raise ValueError(f"mesh: {name} is cut or replicated over {lacking[0]}, but the axes are {mesh.axes}")


def check_module(module: nn.Module, caller: str) -> None:
    """UnsupportedOperation for what would make ranks differ, or cannot be reduced."""
    for name, child in module.named_modules():
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and child.sparse:
            raise UnsupportedOperation(
                f"{name or 'module'}: an embedding with sparse=True; {caller} reduces dense gradients"
            )
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and child.max_norm is not None:
            raise UnsupportedOperation(
                f"{name or 'module'}: an embedding with max_norm, which changes weights on the rank that looks them up"
            )

"""Named axes over the ranks of a group: which rank has which coordinate, and who shares an axis with it.

Index arithmetic on a table of ranks; only ``mesh[...]``, ``mesh.rank`` and ``mesh.to_device_mesh`` need a
running layer. Rank order as in Megatron-LM: the leftmost axis of the order varies fastest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from commlayer.group import Group
from commlayer.runtime import init, world
from commlayer.torch_backend.creation import start_torch_distributed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

CANONICAL_ORDER = ("tp", "cp", "ep", "dp", "pp")
"""Default order, fastest first: what communicates most is closest. Other axes follow as they stand."""

_AXIS = re.compile(r"([A-Za-z_]\w*)=(-?\d{1,18})")
_MOST_RANKS, _MOST_AXES = 1 << 20, 32  # a wrong digit shall not take all memory


class Mesh:
    """Ranks 0 … n-1 laid out along named axes: ``Mesh("dp=2 cp=1 tp=2", order="tp-cp-dp")``.

    ``spec``: ``name=size`` separated by blanks, or a dict; one size may be -1, filled up to ``world_size``,
    which is by default the size of ``group``. ``order``: all axes, fastest first. ``group``: whose ranks are
    arranged, by default the world's, looked up when needed. Raises ``ValueError`` quoting what does not fit.
    """

    def __init__(
        self,
        spec: str | Mapping[str, int],
        order: str | None = None,
        group: Group | None = None,
        *,
        world_size: int | None = None,
    ):
        sizes = _fill(_parse(spec), group.size if world_size is None and group is not None else world_size)
        axes = _parse_order(order, sizes)
        shape = [sizes[axis] for axis in reversed(axes)]
        if math.prod(shape) > _MOST_RANKS or len(shape) > _MOST_AXES:
            made = f"{len(shape)} axes of {math.prod(shape)} ranks"
            raise ValueError(f"mesh {spec!r}: {made}, but at most {_MOST_AXES} of {_MOST_RANKS} are believed")
        name = f"Mesh({_spec(sizes)!r}, order={'-'.join(axes)!r})"
        self._lay_out(name, axes, np.arange(math.prod(shape)).reshape(shape), group)

    def _lay_out(self, name: str, axes: Sequence[str], table: np.ndarray, group: Group | None) -> None:
        """``table``: the rank at each coordinate, one dimension per axis, slowest first."""
        self._name = name
        self.axes = tuple(axes)
        self.sizes = dict(zip(self.axes, reversed(table.shape), strict=True))
        self._table = table
        self._coords = np.empty((table.size, table.ndim), dtype=int)  # of each rank, in the table's order
        self._coords[table.ravel()] = np.argwhere(np.ones(table.shape))
        self._group = group
        # One table for each group that the mesh was bound to: threads may share a mesh, and the world may be
        # finalized and initialized again.
        self._groups: WeakKeyDictionary[Group, dict[tuple[str, ...], Group]] = WeakKeyDictionary()
        if group is not None:
            self._bound()

    @property
    def world_size(self) -> int:
        return self._table.size

    def size(self, axis: str) -> int:
        """Number of ranks along ``axis``, which may be combined: ``"dp-cp"``."""
        return math.prod(self.sizes[name] for name in self._split(axis))

    def coords(self, rank: int) -> dict[str, int]:
        """Coordinate of ``rank`` on every axis."""
        self._check_rank(rank)
        return dict(zip(self.axes, self._coords[rank, ::-1].tolist(), strict=True))

    def rank_of(self, **coords: int) -> int:
        """The rank at these coordinates, one for each axis."""
        if set(coords) != set(self.axes):
            raise ValueError(f"coordinates {coords}: there must be one for each of {', '.join(self.axes)}")
        for axis, coord in coords.items():
            if not 0 <= coord < self.sizes[axis]:
                raise ValueError(f"{axis}={coord}: the coordinate must be in 0 … {self.sizes[axis] - 1}")
        return int(self._table[tuple(coords[axis] for axis in reversed(self.axes))])

    def ranks(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` in nothing but ``axis``, itself among them.

        In a combined axis the axis that is faster in the mesh is faster here, however the name has it.
        """
        self._check_rank(rank)
        along = self._split(axis)
        index = tuple(
            slice(None) if name in along else coord
            for name, coord in zip(reversed(self.axes), self._coords[rank], strict=True)
        )
        return tuple(self._table[index].ravel().tolist())

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """All groups of ``axis``: every rank is in exactly one."""
        along = self._split(axis)
        names = self.axes[::-1]
        dims = sorted(range(len(names)), key=lambda dim: names[dim] in along)  # the axis last, else as before
        return [tuple(row) for row in self._table.transpose(dims).reshape(-1, self.size(axis)).tolist()]

    def rank(self, axis: str) -> int:
        """This process' rank within its group of ``axis``."""
        own = self._bound().rank
        return self.ranks(axis, own).index(own)

    def __getitem__(self, axis: str) -> Group:
        """This process' group along ``axis``. Collective over the mesh when it has to be made."""
        names = self._split(axis)
        names = tuple(name for name in names if self.sizes[name] > 1) or names[:1]  # the others change nothing
        group = self._bound()
        made = self._groups.setdefault(group, {})
        # Making a group is collective over its members. The single axes are therefore made all at once, in an
        # order that is the same on every rank, so that programs may look them up in any order afterwards. A
        # combined axis is made at its first use.
        for wanted in [*((single,) for single in self.axes), names]:
            if wanted not in made:
                made[wanted] = group.subgroup(self.ranks("-".join(wanted), group.rank))
        return made[names]

    def fold(self, spec: str | Mapping[str, int]) -> Mesh:
        """The same ranks seen by experts: axes etp, ep, edp in place of all others but pp.

        Within each pipeline stage the ranks, in this mesh's order, are laid out anew, etp fastest, then ep,
        then edp, which is deduced. A rank keeps its pp coordinate. Raises ``ValueError`` when the sizes do
        not divide the stage. Source: parallel folding, Liu et al. 2025, arXiv:2504.14960.
        """
        sizes = _parse(spec)
        names = ("etp", "ep", "edp")
        if not set(sizes) <= set(names):
            raise ValueError(f"fold {_spec(sizes)!r}: the axes may be etp, ep and edp")
        stages = self.sizes.get("pp", 1)
        sizes = _fill({"etp": 1, "ep": 1, "edp": -1} | sizes, self.world_size // stages)
        axes = [*names, "pp"] if "pp" in self.axes else [*names]
        shape = [(self.sizes | sizes)[axis] for axis in reversed(axes)]
        dims = sorted(range(len(self.axes)), key=lambda dim: self.axes[::-1][dim] != "pp")  # pp slowest
        mesh = Mesh.__new__(Mesh)
        name = f"{self._name}.fold({_spec(sizes)!r})"
        mesh._lay_out(name, axes, self._table.transpose(dims).reshape(shape), self._group)
        return mesh

    def to_device_mesh(self, device_type: str | None = None) -> DeviceMesh:
        """The same mesh for torch (FSDP2, DTensor), its dims named like the axes, slowest first.

        ``device_type``: by default that of the group's device. Starts torch.distributed over the world, on the layer,
        where the program has not. Raises ``UnsupportedOperation`` under ``run_local``, whose ranks are threads.
        """
        import torch
        from torch.distributed.device_mesh import DeviceMesh

        group = self._bound()
        start_torch_distributed()
        device_type = device_type or torch.device(group.device).type
        table = torch.as_tensor(np.asarray(group.ranks)[self._table])
        return DeviceMesh(device_type, table, mesh_dim_names=self.axes[::-1])

    @classmethod
    def from_device_mesh(cls, mesh: DeviceMesh) -> Mesh:
        """torch's mesh as the layer's: its last dim is the fastest axis. Called by every rank of it.

        Its groups are those of ``mesh``, where these are in the mesh's order. Calls ``init`` where it was not yet,
        which every rank has to call. Raises ``ValueError`` for a mesh whose dims have no names.
        """
        if mesh.mesh_dim_names is None:
            raise ValueError(f"mesh: its dims need names to be axes, mesh_dim_names=; got {mesh}")
        everyone = init()
        table = mesh.mesh.numpy()
        ranks = sorted(table.ravel().tolist())
        group = everyone.subgroup(ranks)
        made = cls.__new__(cls)
        axes = tuple(reversed(mesh.mesh_dim_names))
        sizes = dict(zip(axes, reversed(table.shape), strict=True))
        made._lay_out(f"Mesh.from_device_mesh({_spec(sizes)!r})", axes, np.searchsorted(ranks, table), group)
        for axis in axes:
            along = Group.from_process_group(mesh.get_group(axis))
            if along.ranks == tuple(ranks[rank] for rank in made.ranks(axis, group.rank)):
                made._groups.setdefault(group, {})[(axis,)] = along
        return made

    def __repr__(self) -> str:
        return self._name

    def __str__(self) -> str:
        lines = [f"{self._name}: {self.world_size} ranks, {self.axes[0]} varies fastest"]
        for axis in self.axes:
            groups = self.groups(axis)
            shown = [" ".join(map(str, ranks[:6])) + " …" * (len(ranks) > 6) for ranks in groups[:3]]
            lines.append(f"  {axis}={self.size(axis)}: [{'] ['.join(shown)}]" + " …" * (len(groups) > 3))
        return "\n".join(lines)

    def _bound(self) -> Group:
        """The group whose ranks the mesh arranges."""
        group = self._group
        if group is None:
            group = world()
        if group.size != self.world_size:
            raise ValueError(f"{self._name} has {self.world_size} ranks, but the group has {group.size}")
        return group

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank}: the mesh has the ranks 0 … {self.world_size - 1}")

    def _split(self, axis: str) -> tuple[str, ...]:
        """The single axes of a combined one, in the mesh's order."""
        names = axis.split("-")
        if not set(names) <= set(self.axes) or len(set(names)) < len(names):
            raise ValueError(f"axis {axis!r}: this mesh has {', '.join(self.axes)}, or several of them joined by '-'")
        return tuple(name for name in self.axes if name in names)


def _parse(spec: str | Mapping[str, int]) -> dict[str, int]:
    items = spec.split() if isinstance(spec, str) else [f"{name}={size}" for name, size in spec.items()]
    sizes: dict[str, int] = {}
    for item in items:
        if not (match := _AXIS.fullmatch(item)):
            raise ValueError(f"mesh {spec!r}: {item!r} is not of the form name=size")
        name, size = match[1], int(match[2])
        if size < 1 and size != -1:
            raise ValueError(f"mesh {spec!r}: {name}={size}, but a size is 1 or more (or -1: to be filled up)")
        if name in sizes:
            raise ValueError(f"mesh {spec!r}: axis {name} stands twice")
        sizes[name] = size
    if not sizes:
        raise ValueError(f"mesh {spec!r}: no axis; expected for instance 'dp=2 tp=4'")
    return sizes


def _spec(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in sizes.items())


def _fill(sizes: dict[str, int], world_size: int | None) -> dict[str, int]:
    """Put the size that is left in place of a -1, and see that all make up ``world_size``."""
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1 or (open_axes and world_size is None):
        raise ValueError(f"mesh {_spec(sizes)!r}: one size may be -1, given world_size= or group=")
    if world_size is None:
        return sizes
    if world_size < 1 or world_size % known or (not open_axes and world_size != known):
        raise ValueError(f"mesh {_spec(sizes)!r}: the sizes make {known}, which does not fit {world_size} ranks")
    return {axis: world_size // known if size == -1 else size for axis, size in sizes.items()}


def _parse_order(order: str | None, sizes: Mapping[str, int]) -> list[str]:
    if order is None:
        return [*(a for a in CANONICAL_ORDER if a in sizes), *(a for a in sizes if a not in CANONICAL_ORDER)]
    axes = order.split("-")
    if sorted(axes) != sorted(sizes):
        raise ValueError(f"order {order!r}: each of the axes {', '.join(sizes)} must stand in it once, and no other")
    return axes

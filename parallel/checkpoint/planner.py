"""Who writes what, and who reads what: planners for the storage of torch.distributed.checkpoint.

Only its public classes are used, and none of its communication, which needs a torch.distributed that MPI and ranks
as threads do not have.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallel.checkpoint.boxes import Box, check_cover, divided, overlap, within, without
from parallel.checkpoint.content import Held, Path, key_of

# Bytes that are written as one: a reader reads all of them, whatever it needs of them.
CHUNK = 64 * 2**20


class Writer(SavePlanner):
    """Each region is written by one of the ranks that hold it, so that all write about as many bytes."""

    def __init__(self, tensors: dict[Path, Held]) -> None:
        self.tensors = tensors
        self.values: dict[MetadataIndex, Tensor] = {}

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Nothing: it has got its tensors."""

    def create_local_plan(self) -> SavePlan:
        """All that this rank holds, and what the tensors are of which it may hold nothing."""
        items = []
        for path, held in self.tensors.items():
            most = max(1, CHUNK // held.dtype.itemsize)
            for box in (part for piece, _ in held.pieces for part in divided(piece, most)):
                chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
                data = TensorWriteData(chunk, TensorProperties(dtype=held.dtype), torch.Size(held.shape))
                kind = WriteItemType.TENSOR if held.alike else WriteItemType.SHARD
                items.append(WriteItem(MetadataIndex(key_of(path), box.offsets), kind, tensor_data=data))
        return SavePlan(items, planner_data=[(path, held.dtype, held.shape) for path, held in self.tensors.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Raises ValueError where ranks disagree about a tensor, or lack a part of it."""
        tensors = _described(all_plans)
        holders: dict[tuple[str, Box], list[tuple[int, WriteItem]]] = defaultdict(list)
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                holders[item.index.fqn, _box(item)].append((rank, item))
        written: list[list[WriteItem]] = [[] for _ in all_plans]
        load = [0] * len(all_plans)
        taken: dict[str, list[Box]] = defaultdict(list)
        # ZeRO cuts a parameter at other places where other parameters beside it are cut by tp into larger parts.
        overlapping = _overlapping(tensors, holders)
        # What only one rank holds is its own; then the largest first, to whom has the least.
        for (key, box), held in sorted(holders.items(), key=lambda entry: _order(entry[1])):
            # Of what should be alike the first rank's counts.
            ranks = held[:1] if held[0][1].type == WriteItemType.TENSOR else held
            rank, item = min(ranks, key=lambda choice: load[choice[0]])
            for part in without(box, taken[key]) if key in overlapping else [box]:
                taken[key].append(part)
                written[rank].append(_part_of(item, part, len(taken[key]) - 1))
                load[rank] += _bytes(written[rank][-1])
        for key, tensor in tensors.items():
            try:
                check_cover(tensor.size, taken[key])
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
            tensor.chunks.extend(ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in taken[key])
        paths = {key_of(path): path for plan in all_plans for path, _, _ in plan.planner_data}
        plans = [replace(plan, items=items, planner_data=None) for plan, items in zip(all_plans, written, strict=True)]
        return plans, Metadata({**tensors}, planner_data=paths)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Views of what this rank writes."""
        pieces = {key_of(path): held.pieces for path, held in self.tensors.items()}
        for item in new_plan.items:
            part = _box(item)
            box, values = next(piece for piece in pieces[item.index.fqn] if within(part, piece[0]))
            start = [a - b for a, b in zip(part.offsets, box.offsets, strict=True)]
            self.values[item.index] = values.detach()[Box(tuple(start), part.sizes).slices]
        return new_plan

    def copy_values(self) -> None:
        """To the CPU, so that the parameters may change while they are written."""
        self.values = {index: values.detach().to("cpu", copy=True) for index, values in self.values.items()}

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self.values[write_item.index].detach()


class Reader(LoadPlanner):
    """Reads from the files what this rank's boxes need, into them. ``targets``: name -> key in the files, and boxes."""

    def __init__(self, targets: dict[str, tuple[str, Held]], metadata: Metadata) -> None:
        self.targets, self.metadata = targets, metadata

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Nothing: it has got its tensors."""

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, (key, held) in self.targets.items():
            saved = self.metadata.state_dict_metadata[key]
            assert isinstance(saved, TensorStorageMetadata)
            mine = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box, _ in held.pieces]
            for item in create_read_items_for_chunk_list(key, saved, mine):
                items.append(replace(item, dest_index=replace(item.dest_index, fqn=name)))
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("only tensors are asked for")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index.index
        assert index is not None
        values = self.targets[read_item.dest_index.fqn][1].pieces[index][1].detach()
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            values = values.narrow(dim, start, size)
        return values

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: what resolve_tensor gave is the place itself."""


def _described(plans: list[SavePlan]) -> dict[str, TensorStorageMetadata]:
    """Every tensor that a rank has, as yet without its parts."""
    paths: dict[str, Path] = {}
    tensors: dict[str, TensorStorageMetadata] = {}
    for rank, plan in enumerate(plans):
        for path, dtype, shape in plan.planner_data:
            key, size = key_of(path), torch.Size(shape)
            if paths.setdefault(key, path) != path:
                raise ValueError(f"{key}: both {' / '.join(paths[key])} and {' / '.join(path)} are called so")
            known = tensors.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=dtype), size, []))
            if (known.properties.dtype, known.size) != (dtype, size):
                first = f"{known.properties.dtype} {list(known.size)}"
                raise ValueError(f"{key}: {first} on one rank, {dtype} {list(size)} on rank {rank}")
    return tensors


def _overlapping(tensors: dict[str, TensorStorageMetadata], holders: Iterable[tuple[str, Box]]) -> set[str]:
    """The tensors whose boxes are not all different."""
    boxes = defaultdict(list)
    for key, box in holders:
        boxes[key].append(box)
    return {key for key, found in boxes.items() if overlap(tensors[key].size, found)}


def _part_of(item: WriteItem, part: Box, place: int) -> WriteItem:
    """Only that part of the item, as the tensor's chunk of this number."""
    chunk = ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes))
    assert item.tensor_data is not None
    index = MetadataIndex(item.index.fqn, part.offsets, place)
    return replace(item, index=index, tensor_data=replace(item.tensor_data, chunk=chunk))


def _box(item: WriteItem) -> Box:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _order(held: list[tuple[int, WriteItem]]) -> tuple[bool, int]:
    return len(held) > 1, -_bytes(held[0][1])

"""Boxes: what a rank holds of a tensor, as regions that storage and other ranks understand.

A part cut by a mesh is one box. A stretch of a part, ZeRO's cut, is a few: the end of a row, whole rows, the beginning
of one; and so on, dim after dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple


class Box(NamedTuple):
    """The elements from ``offsets`` on, ``sizes`` along each dim; () and () in a tensor of no dims."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    def shifted(self, by: Sequence[int]) -> Box:
        return Box(tuple(a + b for a, b in zip(self.offsets, by, strict=True)), self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))


def stretch_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The elements ``start`` to ``stop`` of a tensor flattened row by row; at most 2·dims - 1 boxes, in that order."""
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    if len(shape) == 1:
        return [Box((start,), (stop - start,))]
    row, rest = prod(shape[1:]), tuple(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows

    def within(index: int, begin: int, end: int) -> list[Box]:
        inner = stretch_boxes(rest, begin - index * row, end - index * row)
        return [Box((index, *box.offsets), (1, *box.sizes)) for box in inner]

    if first > last:
        return within(last, start, stop)
    whole = [Box((first, *(0 for _ in rest)), (last - first, *rest))] if first < last else []
    return [*within(first - 1, start, first * row), *whole, *within(last, last * row, stop)]


def divided(box: Box, most: int) -> list[Box]:
    """``box`` in boxes of at most ``most`` elements, cut along its first dims, in the order of its elements."""
    if box.numel <= most:
        return [box]
    row, size = box.numel // box.sizes[0], box.sizes[0]
    if row > most:
        rest = Box(box.offsets[1:], box.sizes[1:])
        return [
            Box((box.offsets[0] + index, *part.offsets), (1, *part.sizes))
            for index in range(size)
            for part in divided(rest, most)
        ]
    return [
        Box((box.offsets[0] + at, *box.offsets[1:]), (min(most // row, size - at), *box.sizes[1:]))
        for at in range(0, size, most // row)
    ]


def without(box: Box, others: Sequence[Box]) -> list[Box]:
    """What is left of ``box``, in boxes."""
    left = [box] if box.numel else []
    for other in others:
        left = [piece for part in left for piece in _minus(part, other)]
    return left


def within(inner: Box, outer: Box) -> bool:
    return not without(inner, [outer])


def check_cover(shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Raises ValueError unless each element of a tensor of ``shape`` is in exactly one of the ``boxes``."""
    for box in boxes:
        inside = len(box.sizes) == len(shape) and all(
            0 <= start <= start + size <= extent
            for start, size, extent in zip(box.offsets, box.sizes, shape, strict=True)
        )
        if not inside:
            raise ValueError(f"a part at {list(box.offsets)} of sizes {list(box.sizes)} is not within {list(shape)}")
    if pair := overlap(shape, [box for box in boxes if box.numel]):
        parts = " and ".join(f"at {list(box.offsets)} of sizes {list(box.sizes)}" for box in pair)
        raise ValueError(f"parts overlap: {parts}")
    if (held := sum(box.numel for box in boxes)) != prod(shape):
        raise ValueError(f"ranks hold {held} of {prod(shape)} elements")


def overlap(shape: Sequence[int], boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes, none of which is empty, that have an element in common."""
    if not shape:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    # Along the dim with the most cuts few boxes are side by side.
    dim = max(range(len(shape)), key=lambda d: len({box.offsets[d] for box in boxes}))
    beside: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[dim]):
        beside = [other for other in beside if other.offsets[dim] + other.sizes[dim] > box.offsets[dim]]
        for other in beside:
            if _meet(box, other):
                return other, box
        beside.append(box)
    return None


def _meet(a: Box, b: Box) -> bool:
    every = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(start < other + n and other < start + m for start, m, other, n in every)


def _minus(a: Box, b: Box) -> list[Box]:
    if not _meet(a, b):
        return [a]
    pieces = []
    offsets, sizes = list(a.offsets), list(a.sizes)
    for dim, (start, size) in enumerate(zip(b.offsets, b.sizes, strict=True)):
        begin, end = offsets[dim], offsets[dim] + sizes[dim]
        for low, high in ((begin, start), (start + size, end)):
            if low < high:  # a slab before, or behind
                slab = Box((*offsets[:dim], low, *offsets[dim + 1 :]), (*sizes[:dim], high - low, *sizes[dim + 1 :]))
                pieces.append(slab)
        offsets[dim] = max(begin, start)
        sizes[dim] = min(end, start + size) - offsets[dim]
    return pieces

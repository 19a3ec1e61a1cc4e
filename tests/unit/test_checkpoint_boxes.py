"""Boxes: stretches of tensors as regions, and that regions cover a tensor."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.checkpoint.boxes import Box, check_cover, divided, stretch_boxes, within, without

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=400, deadline=None)
@given(shape=SHAPES, data=st.data())
def test_the_boxes_of_a_stretch_are_its_elements_in_order(shape, data):
    whole = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, whole.size)] * 2)))
    boxes = stretch_boxes(shape, start, stop)
    found = [whole[box.slices].reshape(-1) for box in boxes]
    assert all(part.size == box.numel > 0 for part, box in zip(found, boxes, strict=True))
    np.testing.assert_array_equal(np.concatenate([[], *found]), np.arange(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@settings(max_examples=200, deadline=None)
@given(shape=SHAPES, data=st.data())
def test_stretches_cover_a_tensor_and_less_or_more_does_not(shape, data):
    total = int(np.prod(shape, dtype=int))
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, total), max_size=3))), total]
    boxes = [box for start, stop in pairwise(bounds) for box in stretch_boxes(shape, start, stop)]
    check_cover(shape, boxes)
    if boxes:
        i = data.draw(st.integers(0, len(boxes) - 1))
        with pytest.raises(ValueError, match=f"ranks hold {total - boxes[i].numel} of {total}"):
            check_cover(shape, boxes[:i] + boxes[i + 1 :])
        with pytest.raises(ValueError, match="parts overlap"):
            check_cover(shape, [*boxes, boxes[i]])


@settings(max_examples=300, deadline=None)
@given(shape=SHAPES, data=st.data())
def test_covering_is_counting(shape, data):
    """Against a count per element, of boxes anywhere."""
    count = np.zeros(shape, dtype=int)
    boxes = [a_box(shape, data) for _ in range(data.draw(st.integers(0, 5)))]
    for box in boxes:
        count[box.slices] += 1
    if (count == 1).all():
        check_cover(shape, boxes)
    else:
        with pytest.raises(ValueError, match=r"overlap|ranks hold"):
            check_cover(shape, boxes)


@settings(max_examples=300, deadline=None)
@given(shape=SHAPES, data=st.data())
def test_what_is_left_of_a_box(shape, data):
    box, *others = [a_box(shape, data) for _ in range(data.draw(st.integers(1, 4)))]
    count = np.zeros(shape, dtype=int)
    count[box.slices] = 1
    for other in others:
        count[other.slices] = 0
    for left in without(box, others):
        assert within(left, box)
        count[left.slices] -= 1
    assert not count.any()


@settings(max_examples=200, deadline=None)
@given(shape=SHAPES, most=st.integers(1, 30), data=st.data())
def test_a_box_in_parts_of_bounded_size(shape, most, data):
    whole = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    box = a_box(shape, data)
    parts = divided(box, most)
    assert all(part.numel <= most for part in parts)
    found = [whole[part.slices].reshape(-1) for part in parts]
    np.testing.assert_array_equal(np.concatenate([[], *found]), whole[box.slices].reshape(-1))
    assert len(parts) <= 1 or all(a.numel + b.numel > most or a.sizes[1:] != b.sizes[1:] for a, b in pairwise(parts))


def a_box(shape, data):
    ends = [sorted(data.draw(st.tuples(st.integers(0, s), st.integers(0, s)))) for s in shape]
    return Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


def test_a_box_outside_is_an_error():
    for box in (Box((0, 2), (1, 2)), Box((-1, 0), (1, 1)), Box((0,), (1,))):
        with pytest.raises(ValueError, match=r"not within \[2, 3\]"):
            check_cover((2, 3), [box])

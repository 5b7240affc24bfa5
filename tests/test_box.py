"""Boxes: integer maths of rectangles, compared with arrays."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from inkdask.box import Box

spans = st.tuples(st.integers(-20, 20), st.integers(0, 15))
boxes = st.builds(lambda y, x: Box(y[0], y[0] + y[1], x[0], x[0] + x[1]), spans, spans)


def pixels_of(box):
    return {(y, x) for y in range(box.top, box.bottom) for x in range(box.left, box.right)}


@given(boxes, boxes)
def test_intersection_has_pixels_of_both(one, other):
    both = one.intersect(other)
    assert pixels_of(both) == pixels_of(one) & pixels_of(other)
    assert both.is_empty == (not pixels_of(both))
    if not other.is_empty:
        assert one.holds(other) == (pixels_of(other) <= pixels_of(one))


@given(boxes, boxes)
def test_paste_copies_shared_pixels_and_no_others(one, place):
    pixels = np.arange(np.prod(one.shape)).reshape(one.shape)
    canvas = np.full(place.shape, -1)
    one.paste(pixels, canvas, place)
    for y, x in pixels_of(place):
        expected = pixels[y - one.top, x - one.left] if (y, x) in pixels_of(one) else -1
        assert canvas[y - place.top, x - place.left] == expected


@given(boxes, st.integers(-9, 9), st.integers(-9, 9))
def test_box_survives_round_trips(box, down, right):
    assert Box.of_xyxy(box.xyxy) == box
    assert Box.of(*box.slices) == box
    assert Box.at(box.corner, box.shape) == box
    moved = box.shift(down, right)
    assert moved.shape == box.shape
    assert moved.inside((down, right)) == box

"""Shapes of other tools: run lengths and polygons against their definitions, bitmaps, counted reasons."""
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spml_kit.core import UNLABELLED, VOID, Classes, SpmlError
from spml_kit.data.shapes import VOID_NAME, Drawing, Shape, entry, fit_drawing, kit_labels, mask_of_runs, pack_runs, runs_of, shape_mask, to_kit, told_reason, unpack_runs
from test_importers import SIZE, quick


def test_equal_reasons_are_counted_and_the_first_is_named():
    reasons = []
    for k in range(3):
        with entry(reasons, f"shape {k}"): raise SpmlError("odd")
    (why, n), = Counter(reasons).items()
    assert told_reason(why, n) == "odd (shape 0 and others)" and told_reason("odd", 2) == "odd"
    with pytest.raises(KeyboardInterrupt):
        with entry(reasons, ""): raise KeyboardInterrupt


masks = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.floats(0, 1)).map(lambda t: np.random.default_rng(t[2]).random(t[:2]) < t[3])


@given(masks)
@quick
def test_run_lengths_against_their_definition(mask):
    counts, now = [0], False
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if mask[y, x] != now: counts.append(0); now = not now
            counts[-1] += 1
    assert runs_of(mask) == counts and unpack_runs(pack_runs(counts)) == counts
    assert (mask_of_runs(counts, mask.shape) == mask).all() and (mask_of_runs(pack_runs(counts), mask.shape) == mask).all()


@given(st.lists(st.integers(0, 10**9), max_size=20))
@quick
def test_compressed_text_of_any_lengths(counts): assert unpack_runs(pack_runs(counts)) == counts


@given(masks)
@quick
def test_run_lengths_are_those_of_pycocotools(mask):
    coco = pytest.importorskip("pycocotools.mask")
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert pack_runs(runs_of(mask)) == theirs["counts"].decode()
    assert (coco.decode(dict(size=list(mask.shape), counts=pack_runs(runs_of(mask)).encode())) == mask).all()
    assert (mask_of_runs(theirs["counts"], mask.shape) == mask).all()


@pytest.mark.parametrize("counts, says", [([3, 4], "pixels"), ([-1, 5], "pixels"), ("~~", "character"), ("\x7f", "character"), ("P", "within a number"), (["a"], None)])
def test_wrong_run_lengths_are_refused(counts, says):
    with pytest.raises((SpmlError, ValueError), match=says): mask_of_runs(counts, (2, 2))


def inside(x, y, ring):
    "Is a point in a polygon? By the number of edges that a ray crosses"
    odd = False
    for (ax, ay), (bx, by) in zip(ring, ring[1:] + ring[:1]):
        if (ay > y) != (by > y) and x < (bx - ax)*(y - ay)/(by - ay) + ax: odd = not odd
    return odd


def on_an_edge(x, y, ring):
    "Exact, for multiples of 1/16"
    return any((bx - ax)*(y - ay) == (by - ay)*(x - ax) for (ax, ay), (bx, by) in zip(ring, ring[1:] + ring[:1]))


off = lambda low, high: st.integers(low*8, high*8 - 1).map(lambda v: v/8 + 1/16)  # never on the centre of a pixel


@given(st.lists(st.tuples(off(-4, 20), off(-4, 16)), min_size=3, max_size=6), st.lists(st.tuples(off(2, 14), off(2, 10)), min_size=3, max_size=4))
@quick
def test_a_pixel_is_in_a_polygon_where_its_centre_is(ring, hole):
    ours = shape_mask(Shape("polygon", "a", ring, holes=[hole]), (12, 16))
    plain = np.array([[inside(x + .5, y + .5, ring) and not inside(x + .5, y + .5, hole) for x in range(16)] for y in range(12)])
    either = np.array([[on_an_edge(x + .5, y + .5, ring) or on_an_edge(x + .5, y + .5, hole) for x in range(16)] for y in range(12)])
    assert not ((ours != plain) & ~either).any()


@given(masks, st.integers(-6, 12), st.integers(-6, 12))
@quick
def test_bitmaps_lie_where_they_are_put(mask, x, y):
    plain = np.zeros((8, 8), bool)
    for i in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            if mask[i, j] and 0 <= y + i < 8 and 0 <= x + j < 8: plain[y + i, x + j] = True
    assert (shape_mask(Shape("bitmap", "a", [(x, y)], mask=mask), (8, 8)) == plain).all()


def test_what_is_ignored_beside_boxes_is_void(tmp_path):
    drawing = Drawing("a.png", SIZE)
    drawing.add("box", "cat", [(2, 2), (12, 12)])
    drawing.add("box", VOID_NAME, [(20, 20), (40, 40)])
    labels = kit_labels(to_kit(fit_drawing(drawing, SIZE), Classes(("background", "cat"))), SIZE)
    assert (labels[20:40, 20:40] == VOID).all() and labels[5, 5] == UNLABELLED and labels[15, 15] == 0

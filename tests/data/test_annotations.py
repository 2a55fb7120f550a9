"""Annotations: marks, their labels, faults."""
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from spml_kit.core import *
from spml_kit.files import *
from spml_kit.data.annotations import *
from spml_kit.data.formats import *

xy = st.tuples(st.floats(0, 60), st.floats(0, 40))
ids = st.integers(0, 253)
strokes = st.lists(st.tuples(st.lists(xy, min_size=1, max_size=6), ids), min_size=1, max_size=5)


def brute(size, stroke, width):
    "Pixels whose centre lies within width/2 of the line"
    y, x = np.mgrid[:size[0], :size[1]]
    p, near = np.stack([x, y], -1).astype(float), np.zeros(size, bool)
    for a, b in zip(stroke, stroke[1:] if len(stroke) > 1 else stroke):
        a, b = np.array(a, float), np.array(b, float)
        t = np.clip(((p - a) @ (b - a))/max((b - a) @ (b - a), 1e-12), 0, 1)
        near |= np.hypot(*np.moveaxis(p - a - t[..., None]*(b - a), -1, 0)) <= width/2
    return near


@pytest.mark.parametrize("width", [1, 2, 3, 6, 7.5])
@pytest.mark.parametrize("stroke", [[(5, 5)], [(2, 3), (30, 11)], [(4, 4), (4, 30), (20, 33), (55, 2)], [(0, 0), (60, 40)]])
def test_brush_against_distance_to_the_line(stroke, width):
    "Sampling at half pixels may miss a pixel only where the disc just grazes it"
    drawn = Scribbles([stroke], [1], width).to_labels((40, 60)) == 1
    assert not (drawn & ~brute((40, 60), stroke, width + 1e-6)).any()
    assert not (brute((40, 60), stroke, np.sqrt(max(width**2/4 - 1/16, 0))*2 - 1e-6) & ~drawn).any()


@given(strokes, st.sampled_from([1, 3, 6]))
@settings(max_examples=60, deadline=None)
def test_scribbles_survive_json_and_label_only_their_classes(pairs, width):
    ann = Scribbles([s for s, _ in pairs], [c for _, c in pairs], width)
    again = annotation_from_json(json.loads(json.dumps(ann.to_json())))
    assert again == ann
    labels = again.to_labels((41, 61))
    assert labels.dtype == np.uint8 and labels.shape == (41, 61)
    assert set(np.unique(labels)) <= {*ann.classes.tolist(), UNLABELLED}
    x, y = np.minimum(np.rint(ann.strokes[-1][0]), (60, 40)).astype(int)
    assert width < 3 or labels[y, x] == ann.classes[-1]


@given(st.lists(st.tuples(st.integers(0, 58), st.integers(0, 38), st.integers(1, 60), st.integers(1, 40), st.integers(1, 20)), max_size=6))
@settings(max_examples=60, deadline=None)
def test_boxes_are_background_outside(rows):
    boxes = [(x, y, min(x + w, 60), min(y + h, 40)) for x, y, w, h, _ in rows]
    labels = Boxes(boxes, [r[4] for r in rows]).to_labels((40, 60))
    y, x = np.mgrid[:40, :60]
    inside = np.zeros((40, 60), bool)
    for x0, y0, x1, y1 in boxes:
        inside |= (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
    assert (labels == np.where(inside, UNLABELLED, 0)).all()


def test_equality_looks_at_everything():
    a = Scribbles([[(1, 1), (2, 9)]], [2])
    assert a == Scribbles([[(1, 1), (2, 9)]], [2])
    for other in (Scribbles([[(1, 1), (2, 8)]], [2]), Scribbles([[(1, 1), (2, 9)]], [1]), Scribbles([[(1, 1), (2, 9)]], [2], width=4), Tags([2])):
        assert a != other


def test_later_marks_lie_on_top():
    labels = Scribbles([[(0, 5), (20, 5)], [(10, 0), (10, 10)]], [1, 2]).to_labels((11, 21))
    assert labels[5, 10] == 2 and labels[5, 3] == 1 and labels[0, 0] == UNLABELLED


@given(st.lists(st.sampled_from([0, 1, 2, 3, 4, UNLABELLED, VOID]), min_size=1, max_size=30))
def test_tags_of_is_set_membership(values):
    assert tags_of([values], 4).tolist() == [c in values for c in range(4)]


@pytest.mark.parametrize("size", [(40, 59), (39, 60)])
@pytest.mark.parametrize("ann", [Points([(60, 40)], [1]), Scribbles([[(1, 1), (60, 40)]], [1]), Boxes([(0, 0, 60, 40)], [1]), Keypoints([(60, 40)], [1], [1])],
    ids=lambda a: type(a).__name__)
def test_marks_of_a_larger_image_are_refused(ann, size):
    assert ann.to_labels((40, 60)).shape == (40, 60)
    with pytest.raises(SpmlError, match="cat.json: point"):
        ann.to_labels(size, "cat.json")


def test_a_wide_brush_draws_as_a_narrow_one_does():
    "Against the plain definition, in memory that does not grow with the stroke"
    xy = np.array([[5., 5], [300, 220], [380, 20]])
    labels = Scribbles([xy], [1], 120).to_labels((240, 400))
    y, x = np.mgrid[:240, :400]
    away = np.min([np.hypot(x - a[0] - t*(b - a)[0], y - a[1] - t*(b - a)[1]) for a, b in zip(xy, xy[1:]) for t in np.linspace(0, 1, 400)], 0)
    assert (labels[away <= 59.5] == 1).all() and (labels[away > 60.01] == UNLABELLED).all()


@pytest.mark.parametrize("seed", range(6))
def test_gaussians_by_the_definition(seed):
    rng = np.random.default_rng(seed)
    k, (h, w) = 5, (23, 31)
    points = Keypoints(rng.uniform(0, (w - 1, h - 1), (k, 2)), rng.integers(1, 9, k), rng.integers(0, 2, k), rng.uniform(10, 40, k), sigma=.2, labelled=.6, background=.2)
    said = points.to_labels((h, w))
    for y in range(h):
        for x in range(w):
            g = np.exp(-((points.xy - (x, y))**2).sum(1)/(2*(.2*points.scale)**2))
            assert said[y, x] == (points.parts[g.argmax()] if g.max() > .6 else 0 if g.max() < .2 else UNLABELLED)

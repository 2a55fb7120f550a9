"""Annotations: marks, files, faults, and the simulated person."""
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import ndimage as ndi

from spml_kit.core import *
from spml_kit.files import *
from spml_kit.data.annotations import *
from spml_kit.data.simulate import *
from spml_kit.data.formats import *
from spml_kit.data.scenes import SCENE_CLASSES, make_scene

CLASSES = Classes(("background", "cat", "dog"))

xy = st.tuples(st.floats(0, 60), st.floats(0, 40))
ids = st.integers(0, 253)
strokes = st.lists(st.tuples(st.lists(xy, min_size=1, max_size=6), ids), min_size=1, max_size=5)


def blob_mask(seed, size=(60, 80), n_classes=4, void=True):
    "Smooth random pieces of several classes with a void band between"
    field = ndi.gaussian_filter(rng_of(seed, "blob").normal(size=(n_classes, *size)), (0, 7, 7))
    mask = field.argmax(0).astype(np.uint8)
    if void:
        top = np.sort(field, 0)
        mask[top[-1] - top[-2] < .1*top.std()] = VOID
    return mask


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


@pytest.mark.parametrize("ann", [Tags([1, 2]), Boxes([(1, 2, 30, 20)], [1]), Points([(3, 4), (5, 6.5)], [0, 2]), Points([(3, 4)], [0], width=9),
    Scribbles([[(1, 1), (2, 9)], [(4, 4)]], [2, 0]), Keypoints([(3, 4), (8, 9)], [1, 14], [1, 2])], ids=lambda a: type(a).__name__)
def test_files_round_trip(ann, tmp_path):
    write_annotation(tmp_path/"a.json", ann)
    again = read_annotation(tmp_path/"a.json")
    assert again == ann and again.to_json() == read_json(tmp_path/"a.json")
    assert (again.to_labels((40, 60)) == ann.to_labels((40, 60))).all()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


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


# ---- the simulated person

@given(st.integers(0, 10**6), st.sampled_from([1, 3, 5]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_scribbles_never_touch_void_and_are_nearly_always_right(seed, width, void):
    mask = blob_mask(seed, void=void)
    labels = simulate_scribbles(mask, width=width, seed=seed).to_labels(mask.shape)
    marked = labels != UNLABELLED
    assert marked.any() and not (mask[marked] == VOID).any()
    assert (labels == mask)[marked].mean() >= .98
    assert set(np.unique(labels[marked])) <= set(np.unique(mask))


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_shorter_scribbles_lie_inside_longer_ones(seed, a, b):
    mask, (a, b) = blob_mask(seed), sorted((a, b))
    full, long, short = (simulate_scribbles(mask, length=n, seed=seed) for n in (1., b, a))
    reach = lambda s: sum(np.hypot(*np.diff(xy, axis=0).T).sum() for xy in s.strokes)
    assert len(full) == len(long) == len(short)
    assert abs(reach(long) - b*reach(full)) < .3*len(full) + .02*reach(full)
    inside = short.to_labels(mask.shape) != UNLABELLED
    around = ndi.binary_dilation(long.to_labels(mask.shape) != UNLABELLED)
    assert not (inside & ~around).any()


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_points_are_on_their_class(seed):
    mask = blob_mask(seed)
    points = simulate_points(mask, seed=seed)
    x, y = points.xy.round().astype(int).T
    assert (mask[y, x] == points.classes).all()
    labels = points.to_labels(mask.shape)
    assert not (mask[labels != UNLABELLED] == VOID).any()


@pytest.mark.parametrize("simulate", [simulate_scribbles, simulate_points])
def test_same_keys_same_marks(simulate):
    mask = blob_mask(0)
    assert simulate(mask, seed=1, key=2) == simulate(mask, seed=1, key=2)
    assert simulate(mask, seed=1, key=2) != simulate(mask, seed=1, key=3) and simulate(mask, seed=1, key=2) != simulate(mask, seed=2, key=2)
    assert simulate(mask, key="2007_000063") == simulate(mask, key="2007_000063") != simulate(mask, key="2007_000064")
    assert simulate(mask, key=np.int64(5)) == simulate(mask, key=5)
    state = np.random.get_state()[1].copy()
    simulate(mask)
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("simulate", [simulate_scribbles, simulate_points])
@pytest.mark.parametrize("length", [.3, 1.])
def test_every_class_of_a_scene_is_marked(simulate, length):
    more = dict(length=length) if simulate is simulate_scribbles else {}
    for i in range(25):
        s = make_scene(i, seed=11)
        labels = simulate(s.mask, key=i, instances=s.instances, **more).to_labels(s.mask.shape)
        assert (tags_of(labels, len(SCENE_CLASSES)) == s.tags).all()
        assert (labels == s.mask)[labels != UNLABELLED].mean() >= .99


def test_tiny_pieces_are_skipped_but_a_lonely_tiny_class_is_not():
    mask = np.zeros((100, 100), np.uint8)
    mask[20:50, 20:50], mask[80:83, 80:83], mask[10:13, 90:93] = 1, 1, 2
    assert sorted(simulate_scribbles(mask).classes) == [0, 1, 2]
    assert sorted(simulate_points(mask).classes) == [0, 1, 2]


def test_instances_get_a_stroke_each():
    mask = np.zeros((60, 90), np.uint8)
    mask[15:45, 10:80] = 1
    instances = mask.copy()
    instances[:, 45:] *= 2
    assert [(simulate_scribbles(mask, instances=i).classes == 1).sum() for i in (None, instances)] == [1, 2]


@pytest.mark.parametrize("mask", [np.zeros((40, 50), np.uint8), np.ones((40, 50), np.uint8), np.eye(30, dtype=np.uint8), np.arange(4, dtype=np.uint8).reshape(2, 2)],
    ids=["background only", "object only", "thin", "four pixels"])
def test_odd_masks(mask):
    for ann in (simulate_scribbles(mask), simulate_points(mask)):
        labels = ann.to_labels(mask.shape)
        assert len(ann) and set(ann.classes.tolist()) == set(np.unique(mask).tolist())
        assert labels.shape == mask.shape


def test_nothing_but_void_gives_no_marks():
    void = np.full((20, 20), VOID, np.uint8)
    assert len(simulate_scribbles(void)) == 0 and len(simulate_points(void)) == 0


@pytest.mark.parametrize("length", [-.1, 1.1, float("nan")])
def test_length_is_a_share(length):
    with pytest.raises(SpmlError, match="0..1"):
        simulate_scribbles(blob_mask(0), length=length)


def test_photographs(voc_animals):
    right = marked = 0
    for i, path in enumerate(sorted((voc_animals/"SegmentationClass").glob("*.png"))[:40]):
        mask = read_index_png(path)
        labels = simulate_scribbles(mask, key=i).to_labels(mask.shape)
        on = labels != UNLABELLED
        assert not (mask[on] == VOID).any()
        right, marked = right + (labels == mask)[on].sum(), marked + on.sum()
        boxes = read_voc_boxes(voc_animals/"Annotations"/f"{path.stem}.xml", VOC_CLASSES)
        assert boxes.to_labels(mask.shape).shape == mask.shape
    assert right >= .99*marked > 0


# ---- files of others, and broken files


@pytest.mark.parametrize("size", [(40, 59), (39, 60)])
@pytest.mark.parametrize("ann", [Points([(60, 40)], [1]), Scribbles([[(1, 1), (60, 40)]], [1]), Boxes([(0, 0, 60, 40)], [1]), Keypoints([(60, 40)], [1], [1])],
    ids=lambda a: type(a).__name__)
def test_marks_of_a_larger_image_are_refused(ann, size):
    assert ann.to_labels((40, 60)).shape == (40, 60)
    with pytest.raises(SpmlError, match="cat.json: point"):
        ann.to_labels(size, "cat.json")


# numbers and files from outside

@pytest.mark.parametrize("width", [0, -1, 1e9, float("nan"), float("inf"), 501])
@pytest.mark.parametrize("kind", ["points", "scribbles"])
def test_marks_have_a_width_that_can_be_drawn(tmp_path, kind, width):
    said = {"spml_kit": 1, "kind": kind, "classes": [1], "width": width} | ({"xy": [[3, 4]]} if kind == "points" else {"strokes": [[[3, 4]]]})
    (tmp_path / "a.json").write_text(json.dumps(said))
    with pytest.raises(SpmlError, match="a.json: .*pixels wide"): read_annotation(tmp_path / "a.json")


def test_a_wide_brush_draws_as_a_narrow_one_does():
    "Against the plain definition, in memory that does not grow with the stroke"
    xy = np.array([[5., 5], [300, 220], [380, 20]])
    labels = Scribbles([xy], [1], 120).to_labels((240, 400))
    y, x = np.mgrid[:240, :400]
    away = np.min([np.hypot(x - a[0] - t*(b - a)[0], y - a[1] - t*(b - a)[1]) for a, b in zip(xy, xy[1:]) for t in np.linspace(0, 1, 400)], 0)
    assert (labels[away <= 59.5] == 1).all() and (labels[away > 60.01] == UNLABELLED).all()

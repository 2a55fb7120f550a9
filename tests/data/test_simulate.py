"""The simulated person: strokes and points lie on their class, repeat with their key, and cover every class."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage as ndi

from spml_kit.core import UNLABELLED, VOC_CLASSES, VOID, SpmlError, rng_of
from spml_kit.data.annotations import tags_of
from spml_kit.data.formats import read_voc_boxes
from spml_kit.data.scenes import SCENE_CLASSES, make_scene
from spml_kit.data.simulate import simulate_points, simulate_scribbles
from spml_kit.files import read_index_png


def blob_mask(seed, size=(60, 80), n_classes=4, void=True):
    "Smooth random pieces of several classes with a void band between"
    field = ndi.gaussian_filter(rng_of(seed, "blob").normal(size=(n_classes, *size)), (0, 7, 7))
    mask = field.argmax(0).astype(np.uint8)
    if void:
        top = np.sort(field, 0)
        mask[top[-1] - top[-2] < .1*top.std()] = VOID
    return mask


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

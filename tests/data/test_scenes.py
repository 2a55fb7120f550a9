"""The embedded data set: the same everywhere, consistent, and not too easy."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from spml_kit.core import UNLABELLED, VOID, SpmlError
from spml_kit.data.annotations import tags_of
from spml_kit.data.images import SceneSet
from spml_kit.data.scenes import *

C, FIGURE = len(SCENE_CLASSES), SCENE_CLASSES.id("figure")


def same(a, b):
    return all((getattr(a, k) == getattr(b, k)).all() for k in ("image", "mask", "instances", "parts", "tags")) and a.boxes == b.boxes and a.keypoints == b.keypoints


def check(s, size):
    "Everything that must agree within one scene"
    assert s.image.shape == (*size, 3) and s.image.dtype == np.uint8
    for k in ("mask", "instances", "parts"):
        assert getattr(s, k).shape == size and getattr(s, k).dtype == np.uint8, k
    assert s.mask.max() < C and s.parts.max() < len(PART_CLASSES)
    assert s.tags.shape == (C,) and s.tags.dtype == bool and (s.tags == tags_of(s.mask, C)).all()
    assert ((s.instances > 0) == (s.mask > 0)).all() and ((s.parts > 0) == (s.mask == FIGURE)).all()
    assert np.unique(s.instances[s.instances > 0]).tolist() == list(range(1, len(s.boxes) + 1))
    for i, ((x0, y0, x1, y1), c) in enumerate(zip(s.boxes.boxes, s.boxes.classes), 1):
        y, x = np.nonzero(s.instances == i)
        assert (x.min(), y.min(), x.max() + 1, y.max() + 1) == (x0, y0, x1, y1)
        assert (s.mask[y, x] == c).all() and c > 0
    x, y = s.keypoints.xy.astype(int).T
    assert (s.parts[y, x] == s.keypoints.parts).all() and (s.instances[y, x] == s.keypoints.instances).all()
    visible = {(i, p) for i, p in zip(s.instances.flat, s.parts.flat) if p}
    assert sorted(visible) == sorted(zip(s.keypoints.instances, s.keypoints.parts))


@given(st.integers(0, 10**9), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_consistent_and_repeatable(index, seed):
    s = make_scene(index, seed)
    check(s, (128, 128))
    assert same(s, make_scene(index, seed))


@pytest.mark.parametrize("size", [32, 64, 127, 128, 200, (64, 160), (161, 96)])
def test_any_size(size):
    shape = (size, size) if isinstance(size, int) else size
    for i in range(6):
        check(make_scene(i, size=size), shape)


@pytest.mark.parametrize("size", [16, (128, 31), 0])
def test_too_small(size):
    with pytest.raises(SpmlError, match="choose a larger size"):
        make_scene(0, size=size)


def test_independent_of_what_came_before():
    alone = make_scene(7)
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    for i in (3, 9, 0):
        make_scene(i)
    assert same(make_scene(7), alone) and same(make_scene(np.int64(7), np.int64(0)), alone)
    assert (np.random.get_state()[1] == state).all()


def test_indices_and_seeds_differ():
    images = [make_scene(i, seed).image for seed in (0, 1) for i in range(4)]
    assert all((a != b).mean() > .5 for k, a in enumerate(images) for b in images[:k])


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(i, seed=5) for i in range(200)]


def test_every_class_occurs_and_keeps_company(scenes):
    tags = np.stack([s.tags for s in scenes])
    assert tags[:, 0].mean() > .95 and tags[:, 1:].mean(0).min() > .07
    together = tags[:, 1:].T.astype(int) @ tags[:, 1:]
    own = np.kron(np.eye(4, dtype=int), np.ones((3, 3), int)) - np.eye(12, dtype=int)
    foreign = np.kron(1 - np.eye(4, dtype=int), np.ones((3, 3), int))
    assert together[own == 1].mean() > 3*together[foreign == 1].mean() > 0


def test_objects_have_a_useful_size_and_number(scenes):
    assert .25 < np.mean([(s.mask > 0).mean() for s in scenes]) < .45
    counts = np.bincount([len(s.boxes) for s in scenes], minlength=6)
    assert counts[0] == 0 and (counts[1:6] > 0).all() and len(counts) == 6
    sides = np.concatenate([s.boxes.boxes[:, 2:] - s.boxes.boxes[:, :2] for s in scenes]).max(1)
    assert np.percentile(sides, 10) > 25 and np.percentile(sides, 75) < 80
    assert any(np.bincount(s.boxes.classes).max() > 1 for s in scenes)


def test_figures_have_all_parts(scenes):
    assert set(np.concatenate([s.keypoints.parts for s in scenes])) == set(range(1, 15))


def test_left_and_right_are_the_persons(scenes):
    "Seen from the front (two cases in three) the right arm is on the left of the image"
    side = []
    for s in scenes:
        for i in np.unique(s.keypoints.instances):
            x = {p: xy[0] for p, k, xy in zip(s.keypoints.parts, s.keypoints.instances, s.keypoints.xy) if k == i}
            if 10 in x and 11 in x: side.append(x[11] < x[10])
    assert len(side) > 15 and .45 < np.mean(side) < .9


def test_objects_stand_out_from_the_ground(scenes):
    "The median colour step across an object's border is well above the noise"
    steps = []
    for s in scenes[:60]:
        im = s.image.astype(float)
        edge = (s.mask[:, 3:] > 0) & (s.mask[:, :-3] == 0)
        steps.append(np.abs(im[:, 3:] - im[:, :-3]).sum(-1)[edge])
    assert np.median(np.concatenate(steps)) > 60


def test_colour_does_not_tell_the_class(scenes):
    "A table of colours, the best that can be had from single pixels, stays near nothing on the foreground"
    key = lambda s: ((s.image.astype(np.int64)//16) @ (256, 16, 1)).ravel()
    counts = np.bincount(np.concatenate([key(s)*C + s.mask.ravel() for s in scenes[:140]]), minlength=4096*C).reshape(-1, C)
    pred = counts.argmax(1)[np.concatenate([key(s) for s in scenes[140:]])]
    gt = np.concatenate([s.mask.ravel() for s in scenes[140:]]).astype(int)
    table = np.bincount(gt*C + pred, minlength=C*C).reshape(C, C)
    iou = np.diag(table)/np.maximum(table.sum(0) + table.sum(1) - np.diag(table), 1)
    assert iou.mean() < .2 and iou[1:].mean() < .15


def test_other_scenes_stay_as_they_are():
    assert make_scene(3).mask.tobytes() == SceneSet(4).mask(3).tobytes() == make_scene(3, only=None).mask.tobytes()
    for i, only, mean in ((3, None, (108.4, 96.1, 108.8)), (2, ("figure", "cat"), (122.1, 120.1, 133.5))):
        np.testing.assert_allclose(make_scene(i, only=only).image.mean((0, 1)), mean, atol=.2) # as they were before figures got clothes of their own
    with pytest.raises(SpmlError, match="'dragon' is not a class of scenes"): make_scene(0, only=("dragon",))


def test_mirror_exchanges_left_and_right():
    ids, names = PART_CLASSES.mirrored, PART_CLASSES.names
    assert np.array_equal(ids[ids], np.arange(256)) and ids[VOID] == VOID and ids[UNLABELLED] == UNLABELLED
    for k, name in enumerate(names): assert names[ids[k]] == name.replace("right", "?").replace("left", "right").replace("?", "left")
    assert [(a, b) for a, b in enumerate(ids[:15]) if a < b] == [(2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13)] # the pairs of the paper's set

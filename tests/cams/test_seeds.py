"""How labels with gaps are judged: coverage and mIoU, the threshold from the tuning images, the plane of thresholds."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from spml_kit.cams.labels import tag_labels, unlabelled_share
from spml_kit.cams.seeds import best_point, label_quality, seed_quality, threshold_labels, threshold_plane
from spml_kit.core import SpmlError, UNLABELLED, VOID, rng_of
from spml_kit.metrics import Confusion
from test_background import CLASSES
from test_labels import random_maps


def test_quality_of_labels_without_gaps_is_that_of_the_confusion_matrix():
    rng = rng_of(0, "labels")
    labels, masks = rng.integers(0, CLASSES, (2, 3, 8, 8)).astype(np.uint8)
    masks[0, 0] = VOID
    q = label_quality(labels, masks, CLASSES)
    assert q["miou"] == pytest.approx(Confusion(CLASSES).add(labels, masks).mean_iou(present_only=True))
    assert q["unlabelled"] == 0
    objects = (masks > 0) & (masks < CLASSES)
    assert q["recall"] == pytest.approx(100*(labels == masks)[objects].mean())
    assert q["coverage"] == pytest.approx(100*(labels > 0)[objects].mean())
    assert q["precision"] == pytest.approx(100*(labels == masks)[(labels > 0) & (masks < CLASSES)].mean())


def test_gaps_cost_coverage_and_not_miou():
    mask = rng_of(0, "mask").integers(0, CLASSES, (8, 8)).astype(np.uint8)
    gaps = mask.copy()
    gaps[:, :4] = UNLABELLED
    q = label_quality([gaps], [mask], CLASSES)
    assert q["miou"] == 100 and q["precision"] == 100 and q["unlabelled"] == 50 and q["coverage"] == q["recall"] < 100


def test_the_threshold_comes_from_the_tuning_images_alone():
    mask = np.zeros((4, 4), np.uint8)
    mask[:2] = 1
    at = lambda low, high: np.stack([np.zeros((4, 4)), np.where(mask == 1, high, low)])
    maps = [at(.1, .3), at(.6, .9)]  # separated by .2, and by .7
    q = seed_quality(maps, [mask, mask], thresholds=(.2, .7))
    assert q["threshold"] == .2 and q["precision"] == 50 and q["recall"] == 100
    q = seed_quality(maps[::-1], [mask, mask], thresholds=(.2, .7))
    assert q["threshold"] == .7 and q["recall"] == 0


def test_every_cell_of_the_plane_is_one_labelling():
    maps = [random_maps(i) for i in range(3)]
    masks = [threshold_labels(m, .6) for m in maps]
    tags = [np.ones(CLASSES, bool)]*3
    plane = threshold_plane(maps, masks, tags, alphas=(2., 6.), thresholds=(.2, .5), normalise="sum")
    for (i, j), value in np.ndenumerate(plane["miou"]):
        labels = [tag_labels(m, t, plane["alphas"][i], plane["thresholds"][j]) for m, t in zip(maps, tags)]
        q = label_quality(labels, masks, CLASSES)
        assert value == q["miou"] and plane["unlabelled"][i, j] == q["unlabelled"] == pytest.approx(100*unlabelled_share(labels))


@given(st.integers(0, 2**32 - 1), st.floats(0, 100))
@settings(max_examples=40, deadline=None)
def test_the_chosen_point_is_allowed_and_no_other_is_better(seed, most):
    rng = np.random.default_rng(seed)
    plane = dict(alphas=(1., 2., 4.), thresholds=(.1, .5), miou=rng.uniform(0, 100, (3, 2)), unlabelled=rng.uniform(0, 100, (3, 2)))
    allowed = {(a, t): plane["miou"][r, c] for r, a in enumerate(plane["alphas"]) for c, t in enumerate(plane["thresholds"]) if plane["unlabelled"][r, c] <= most}
    if not allowed:
        with pytest.raises(SpmlError, match="smaller thresholds"): best_point(plane, most)
    else: assert allowed[best_point(plane, most)] == max(allowed.values())

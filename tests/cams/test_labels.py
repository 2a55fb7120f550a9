"""Label maps from class maps: tags and boxes against their plain versions, gaps, faults."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spml_kit.cams.background import tag_scores
from spml_kit.cams.labels import box_labels, tag_labels, unlabelled_share, winning_class
from spml_kit.cams.seeds import seed_quality
from spml_kit.core import UNLABELLED, SpmlError, rng_of
from spml_kit.data.annotations import Boxes
from test_background import CLASSES, some_maps

some_tags = arrays(bool, CLASSES).filter(lambda t: t.any())


def random_maps(seed=0, size=(7, 9), n_classes=CLASSES, dtype=np.float32):
    maps = rng_of(seed, "maps").random((n_classes, *size)).astype(dtype)
    maps[0] = 0
    return maps


@given(some_maps, some_tags, st.floats(0, 1), st.sampled_from(["none", "sum"]))
@settings(max_examples=80, deadline=None)
def test_labels_are_classes_of_the_image_background_or_gaps(maps, tags, threshold, normalise):
    labels = tag_labels(maps, tags, threshold=threshold, normalise=normalise)
    assert labels.dtype == np.uint8 and labels.shape == maps.shape[1:]
    assert set(np.unique(labels)) <= {0, *np.flatnonzero(tags), UNLABELLED}
    more = tag_labels(maps, tags, threshold=min(1, threshold + .2), normalise=normalise)
    assert unlabelled_share(more) >= unlabelled_share(labels)
    kept = more != UNLABELLED
    np.testing.assert_array_equal(more[kept], labels[kept])


@given(some_maps, some_tags)
@settings(max_examples=50, deadline=None)
def test_a_share_is_never_below_that_of_a_draw(maps, tags):
    share = winning_class(maps, tags, normalise="sum")[1]
    assert share.min() >= 1/(1 + tags[1:].sum()) - 1e-6 and share.max() <= 1 + 1e-6


def test_absent_classes_do_not_count():
    maps = random_maps()
    tags = np.array([True, True, False, True])
    maps[2] = 1
    scores = tag_scores(maps[[0, 1, 3]])
    label, share = winning_class(maps, tags)
    np.testing.assert_array_equal(label, np.array([0, 1, 3])[scores.argmax(0)])
    np.testing.assert_allclose(share, scores.max(0)/scores.sum(0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_types(dtype):
    maps = random_maps(dtype=dtype)
    assert tag_labels(maps, [1, 1, 1, 1]).dtype == np.uint8
    assert tag_scores(maps).dtype == dtype


def plain_box_labels(maps, boxes, threshold):
    "Pixel by pixel: the smallest box that holds it decides"
    out = np.zeros(maps.shape[1:], np.uint8)
    for y, x in np.ndindex(*out.shape):
        inside = [(int((b[2] - b[0])*(b[3] - b[1])), -i) for i, b in enumerate(boxes.boxes) if b[0] <= x < b[2] and b[1] <= y < b[3]]
        if not inside:
            continue
        i = -min(inside)[1]
        x0, y0, x1, y1 = boxes.boxes[i].astype(int)
        part = maps[boxes.classes[i], y0:y1, x0:x1]
        high = part.max() > part.min() and maps[boxes.classes[i], y, x] - part.min() >= threshold*(part.max() - part.min())
        out[y, x] = boxes.classes[i] if high else UNLABELLED
    return out


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [0, .5, 1])
def test_boxes_against_the_plain_version(seed, threshold):
    rng = rng_of(seed, "boxes")
    corner = np.sort(rng.permuted(np.tile(np.arange(12), (5, 2, 1)), axis=2)[..., :2], 2)  # two different numbers an axis
    boxes = Boxes(np.stack([corner[:, 0, 0], corner[:, 1, 0], corner[:, 0, 1], corner[:, 1, 1]], 1), rng.integers(1, CLASSES, 5))
    maps = random_maps(seed, (12, 12))
    np.testing.assert_array_equal(box_labels(maps, boxes, threshold), plain_box_labels(maps, boxes, threshold))


def test_the_smaller_box_wins_whatever_the_order():
    maps = random_maps(size=(8, 8))
    one, two = Boxes([[0, 0, 8, 8], [2, 2, 5, 5]], [1, 2]), Boxes([[2, 2, 5, 5], [0, 0, 8, 8]], [2, 1])
    labels = box_labels(maps, one)
    np.testing.assert_array_equal(labels, box_labels(maps, two))
    assert set(np.unique(labels[2:5, 2:5])) <= {2, UNLABELLED} and 2 in labels


def test_a_flat_map_says_nothing():
    boxes = Boxes([[1, 1, 4, 4]], [1])
    for flat in (0, 1):
        maps = np.zeros((2, 6, 6))
        maps[1] = flat
        np.testing.assert_array_equal(box_labels(maps, boxes), boxes.to_labels((6, 6)))


@pytest.mark.parametrize("call, words", [
    (lambda m: tag_labels(m*np.nan, [1]*4), "not finite"),
    (lambda m: box_labels(m*np.nan, Boxes([[0, 0, 2, 2]], [1])), "not finite"),
    (lambda m: tag_labels(m - 1, [1]*4), "0..1"),
    (lambda m: tag_labels(m[0], [1]*4), "(C,H,W)"),
    (lambda m: tag_labels(m, [1]*3), "one flag per class"),
    (lambda m: tag_labels(m, [0]*4), "without any tag"),
    (lambda m: tag_labels(m, [1]*4, threshold=1.1), "threshold 1.1"),
    (lambda m: tag_labels(m, [1]*4, threshold=-.1), "threshold -0.1"),
    (lambda m: tag_labels(m, [1]*4, threshold=float("nan")), "threshold nan"),
    (lambda m: tag_labels(m, [1]*4, alpha=0), "alpha 0"),
    (lambda m: tag_labels(m, [1]*4, normalise="max"), "normalise 'max'"),
    (lambda m: box_labels(m, Boxes([[0, 0, 20, 4]], [1])), "20"),
    (lambda m: box_labels(m, Boxes([[-3, 0, 2, 4]], [1])), "-3"),
    (lambda m: box_labels(m, Boxes([[0, 0, 2, 2]], [4])), "class 4"),
    (lambda m: box_labels(m, Boxes([[0, 0, 2, 2]], [1]), threshold=2), "threshold 2"),
    (lambda m: seed_quality([m, m], [np.zeros((7, 9), np.uint8)]), "2 maps for 1 masks"),
    (lambda m: seed_quality([m, m], [np.zeros((7, 9), np.uint8)]*2, thresholds=(.5, 1.5)), "0..1"),
    (lambda m: seed_quality([m, m], [np.zeros((7, 8), np.uint8)]*2), "must agree"),
])
def test_faults_are_named(call, words):
    with pytest.raises(SpmlError) as e:
        call(random_maps())
    assert words in str(e.value)

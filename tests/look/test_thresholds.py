"""The explorers of background thresholds and of regions, against the labels themselves."""
import numpy as np
import pytest
import torch
from PIL import Image

from spml_kit.cams.labels import tag_labels
from spml_kit.core import UNLABELLED, SpmlError
from spml_kit.data.images import SceneSet
from spml_kit.data.scenes import SCENE_CLASSES
from spml_kit.data.weak import WeakSet
from spml_kit.look.thresholds import PLANE_CELL, explore_background, explore_regions
from test_explore import SIZE, C, said


def box_maps(s):
    "Class maps with a ramp in each present class"
    maps = np.zeros((C, SIZE, SIZE), np.float32)
    for k, c in enumerate(np.flatnonzero(s.tags[1:]) + 1): maps[c] = np.roll(np.linspace(0, 1, SIZE, dtype=np.float32), 20*k)[:, None]
    return maps


def test_background_shows_what_the_labels_are(world):
    weak, _, _, _ = world
    tagged = WeakSet(weak.images, "tags")
    ex = explore_background(tagged, box_maps, weak.images)
    assert "spml-explore-background" in ex._dom_classes and ex.took > 0
    for alpha, threshold, normalise in ((6., .2, "sum"), (2., .6, "none"), (12., .9, "sum")):
        with ex.hold(): ex.alpha.value, ex.threshold.value, ex.normalise.value = alpha, threshold, normalise
        s = tagged.sample(0)
        want = tag_labels(box_maps(s), s.tags, alpha, threshold, normalise)
        assert {k: v[0] for k, v in ex.view.bars.items()} == pytest.approx({("unlabelled" if k == UNLABELLED else SCENE_CLASSES.names[k]): (want == k).mean() for k in [*np.flatnonzero(s.tags), UNLABELLED]})
    ex.pictures[5].point = [2*PLANE_CELL, PLANE_CELL + 3]
    assert (ex.alpha.value, ex.threshold.value) == (2., .2)
    ex.pictures[0].point = [7, 9]
    assert ex.point == (7, 9) and "The pixel (7, 9)" in said(ex)
    ex.image.value = 1
    assert ex.view.sentence in ex._repr_mimebundle_()["text/plain"]


def test_background_without_masks_and_tags(world):
    weak, _, _, _ = world
    silent = WeakSet(weak.images, lambda i: np.full((SIZE, SIZE), 1 if i else UNLABELLED, np.uint8))
    ex = explore_background(WeakSet(weak.images, "tags"), box_maps)
    assert list(ex.plane.options) == ["unlabelled"] and "mIoU" not in said(ex)
    with pytest.raises(SpmlError, match="no tag"): explore_background(silent, box_maps)
    ex.weak, ex._kept = silent, {}
    ex.refresh()
    assert "no tag" in said(ex)


def test_regions_react(world):
    weak, _, learn, _ = world
    ex = explore_regions(weak.images, learn)
    assert "spml-explore-regions" in ex._dom_classes and ex.took > 0
    table = lambda: next(iter(ex.view.tables.values())).set_index("partition")
    ex.number.value = 5
    assert table().number["regions"] == 5
    more = table().leak["regions"]
    ex.number.value = 60
    assert table().leak["regions"] <= more and table().over["regions"] > 0
    with ex.hold(): ex.cut.value, ex.strength.value = "strength", 1.
    assert table().number["regions"] == 1
    ex.iteration.value = 4
    assert "k-means after 4 steps" in table().index and not torch.equal(ex.clusters_of(0, 4, 0), ex.clusters_of(0, 4, 4))
    ex.pictures[1].point = [60, 3]
    assert ex.point == (60, 3)
    ex.image.value = 2
    assert len(ex.figure().axes) >= 5


def test_regions_of_a_folder_without_a_network(tmp_path):
    Image.fromarray(SceneSet(1, size=50).image(0)).save(tmp_path / "a.png")
    ex = explore_regions(tmp_path)
    assert len(ex.view.pictures) == 2 and "leak" not in next(iter(ex.view.tables.values()))


def test_regions_of_odd_sizes(tmp_path, world):
    "Neither a multiple of 32 nor square: the padding leaves no clusters behind"
    _, _, learn, _ = world
    Image.fromarray(SceneSet(1, size=75).image(0)[:50]).save(tmp_path / "a.png")
    ex = explore_regions(tmp_path, learn)
    ex.pictures[0].point = [74, 49]
    assert ex.point == (74, 49) and ex.clusters_of(0, 4, 2).shape == (13, 19)

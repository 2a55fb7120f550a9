"""The explorer of relations without a browser: what it shows against the loss itself; clicks in odd places."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from spml_kit.data.batches import weak_dls
from spml_kit.method.contrast import relation_loss
from spml_kit.core import VOID, SpmlError
from spml_kit.data.images import FolderSet, SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.method.nets import location_colours
from spml_kit.look.explore import explore_relations
from spml_kit.learn.learner import spml_learner
from spml_kit.look.lending import explore_affinity
from spml_kit.method.recipes import RECIPES
from spml_kit.method.relations import feature_affinity
from spml_kit.data.scenes import SCENE_CLASSES
from spml_kit.method.segments import make_segments
from spml_kit.look.widgets import GAP

SIZE, C = 64, len(SCENE_CLASSES)


def said(ex): return ex._words.value


@pytest.mark.parametrize("memory", [True, False])
def test_bars_are_the_losses_of_training(world, memory):
    weak, _, learn, _ = world
    ex = explore_relations(learn, weak, which=(0, 1, 2), relations=[feature_affinity()])
    ex.memory.value = memory
    seg, candidates = ex.segments()
    assert (len(candidates) > len(seg.protos)) == memory
    for name, relation in ex.relations.items():
        want = relation_loss(replace(relation, anchors=1.), seg, candidates)[1]
        for at in ((0, 3, 5), (1, 30, 40), (2, 63, 63)):
            ex.point = at
            row = int(seg.map(torch.arange(len(seg.v)))[at[0], at[2]*seg.shape[1]//SIZE, at[1]*seg.shape[2]//SIZE])
            bar, text = ex.view.bars[name]
            assert bar == pytest.approx(relation.weight*float(want[row]), abs=1e-4) and text.startswith(f"{float(want[row]):.2f}")
            assert sorted(ex.view.bars) == sorted([*ex.relations, "head"])


def test_relations_react(world):
    weak, _, learn, _ = world
    ex = explore_relations(learn, weak)
    assert "spml-explore-relations" in ex._dom_classes and ex.took > 0 and {"scribbles", "points", "keypoints", "boxes", "tags", "full"} == set(ex.annotation.options)
    before = learn.loss_func.relations[0]
    weights = ex.shown[0][0].gradient
    ex.kappa.value = 30
    assert ex.shown[0][0].relation.kappa == 30 and not torch.equal(weights, ex.shown[0][0].gradient) and learn.loss_func.relations[0] == before
    ex.relation.value = "similarity"
    assert ex.kappa.value == ex.relations["similarity"].kappa != 30
    ex.relation.value = "annotation"
    assert ex.kappa.value == 30 # each relation keeps its own
    n = len(ex.segments()[0].protos)
    ex.regions.value = 2
    fewer = len(ex.segments()[0].protos)
    ex.clusters.value = 1
    assert n > fewer > len(ex.segments()[0].protos)
    ex.annotation.value = "tags"
    assert "does not apply" in said(ex)
    ex.second.value = "none"
    assert len(ex.view.pictures) == 2 and ex.pictures[2].layout.display == "none"
    assert len(ex.figure().axes) >= 3


def test_relations_by_clicks(world):
    weak, _, learn, _ = world
    ex = explore_relations(learn, weak)
    ex.pictures[1].point = [SIZE + GAP + 9, SIZE + GAP + 11]
    assert ex.point == (3, 9, 11) and "Pixel (9, 11) of image 3" in said(ex)
    ex.pictures[0].point = [SIZE + 1, 5]
    assert "Between the pictures" in said(ex) and ex.point == (3, 9, 11)
    ex.relation.value = "cooccurrence"
    ex.pictures[1].point = [3, 2*SIZE + 2*GAP + 3]
    assert "memory bank" in said(ex) and "similarity" in said(ex)
    ex.pictures[1].point = [3, 2*SIZE + GAP + 2]
    assert "Between" in said(ex)
    ex.point = (0, 999, 0)
    assert "There is no pixel" in said(ex)


def test_relations_of_a_batch_with_void(world):
    _, _, learn, _ = world
    batch = list(learn.dls.train.one_batch())
    batch[1] = batch[1].clone()
    batch[1][:, :20] = VOID
    ex = explore_relations(learn, batch, which=(0, 1))
    assert list(ex.annotation.options) == ["as given"]
    ex.point = (0, 5, 5)
    assert "void" in said(ex)
    batch[1][:] = VOID
    with pytest.raises(SpmlError, match="every pixel"): explore_relations(learn, batch, which=(0,))


def test_relations_of_images_of_several_sizes(tmp_path, world):
    "Padded to one size; the padding is void"
    _, _, learn, _ = world
    for k, size in enumerate((40, 70)): Image.fromarray(SceneSet(1, size=size).image(0)).save(tmp_path / f"{k}.png")
    images = FolderSet(tmp_path, classes=SCENE_CLASSES)
    weak = WeakSet(images, lambda i: np.full(images.image(i).shape[:2], i, np.uint8))
    ex = explore_relations(learn, weak, which=(0, 1))
    assert list(ex.annotation.options) == ["as given"] and ex.size == (96, 96)
    ex.point = (0, 50, 10)
    assert "void (padding" in said(ex)


def test_cross_entropy_has_the_papers_relations(world):
    weak, held_out, learn, _ = world
    plain = spml_learner(learn.dls, method="cross_entropy", recipe=learn.recipe)
    ex = explore_relations(plain, weak, which=(0, 1))
    assert ex.memory.disabled and "annotation" in ex.view.bars


def test_colours_of_the_learner_reach_the_explorers(world, tmp_path):
    "With the paper's DensePose features, a filled memory bank too: segments are those of a training step"
    weak, held_out, _, _ = world
    recipe = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8, grid=(4, 4), iterations=3, crop=SIZE, colours=True, embedding_scale=.1)
    learn = spml_learner(weak_dls(weak, held_out, bs=3, crop=SIZE, steps=2, device=torch.device("cpu")), "keypoints", recipe=recipe, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(1)
    ex, lending = explore_relations(learn, weak, which=(0, 1)), explore_affinity(learn, weak, which=(0, 1))
    seg, candidates = ex.segments()
    want = make_segments(ex.emb, *ex.batches["scribbles"][1:], (4, 4), 3, location_colours(ex.images, *ex.emb.shape[-2:]), .1)
    assert len(candidates) > len(seg.protos) and want.u.shape[1] == 8 + 5
    for made in (seg, lending.seg):
        assert torch.equal(made.own, want.own)
        torch.testing.assert_close(made.u, want.u)
        torch.testing.assert_close(made.protos.mu_loc, want.protos.mu_loc)
    for name in ("similarity", "affinity"): # those that look at location
        ex.relation.value = name
        assert name in said(ex) and ex.view.bars[name][0] >= 0, said(ex)


def test_the_legend_names_the_classes_in_the_pictures(world):
    weak, _, learn, _ = world
    ex = explore_relations(learn, weak, which=(0, 1, 2))
    drawn = {int(k) for i in range(3) for k in np.unique(weak.sample(i).labels) if k < C}
    bank = {int(k) for f, order in ex.shown for k in f.protos.label[order] if k < C}
    names = ex.classes.names
    assert list(ex.view.legend) == [names[k] for k in sorted(drawn | bank)]
    assert all(ex.view.legend[names[k]] == "#%02x%02x%02x" % tuple(ex.classes.palette[k]) for k in drawn)
    assert all(f"</span> {name}</span>" in ex._below.value for name in ex.view.legend)
    ex.annotation.value = "tags" # no pixel is labelled
    assert set(ex.view.legend) == {names[int(k)] for f, order in ex.shown for k in f.protos.label[order] if k < C}


def test_the_figure_has_the_legend(world):
    weak, _, learn, _ = world
    ex = explore_relations(learn, weak, which=(0, 1))
    texts = [t.get_text() for part in ex.figure().subfigs for legend in part.legends for t in legend.get_texts()]
    assert texts == list(ex.view.legend)

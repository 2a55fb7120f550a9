"""Explorers without a browser: what they show against the loss itself, the index and the labels; clicks in odd places; colours for every eye; notebooks that keep pictures, not widgets."""
import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_batch
from PIL import Image

from spml_kit.cams.labels import tag_labels
from spml_kit.data.batches import weak_dls
from spml_kit.method.contrast import contrast_plain, relation_loss
from spml_kit.core import SpmlError, UNLABELLED, VOID
from spml_kit.data.images import FolderSet, SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.method.nets import location_colours
from spml_kit.look.explain import PULL, PUSH, View, colour_distances, cross, deuteranopia, division_errors, forces_table, memory_strip, outline, paint_forces, pixel_forces, rgb_of, view_figure
from spml_kit.look.explore import explore_relations
from spml_kit.learn.learner import spml_learner
from spml_kit.look.lending import explore_affinity
from spml_kit.method.memory import MemoryBank
from spml_kit.look.store import CROP, on_map
from spml_kit.look.embedding import SnapshotCB, explore_embedding, snapshots
from spml_kit.look.nearness import explore_retrieval
from spml_kit.infer.scores import predict_retrieval, training_index
from spml_kit.method.recipes import RECIPES
from spml_kit.method.relations import Relation, feature_affinity, image_similarity, relation_sets, semantic_annotation, semantic_cooccurrence
from spml_kit.data.scenes import SCENE_CLASSES
from spml_kit.method.segments import make_segments
from spml_kit.look.thresholds import PLANE_CELL, explore_background, explore_regions
from spml_kit.look.widgets import GAP, mosaic, mosaic_at

SIZE, C = 64, len(SCENE_CLASSES)
RELATIONS = [semantic_annotation(), semantic_cooccurrence(), image_similarity(), feature_affinity(), Relation("silent", lambda p: torch.full_like(p.label, -1), 6.), Relation("alone", lambda p: torch.arange(len(p)), 9.)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A weak set, held-out scenes, a learner after a few steps and its snapshots"
    weak, held_out, folder = WeakSet(SceneSet(6, seed=3, size=SIZE), "scribbles", regions=12), SceneSet(3, seed=3, size=SIZE, start=100), tmp_path_factory.mktemp("snapshots")
    recipe = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8, grid=(4, 4), iterations=3, crop=SIZE)
    learn = spml_learner(weak_dls(weak, held_out, bs=3, crop=SIZE, steps=2, device=torch.device("cpu")), recipe=recipe, path=tmp_path_factory.mktemp("run"))
    with learn.no_bar(), learn.no_logging():
        learn.fit_poly(2, cbs=SnapshotCB(folder))
    return weak, held_out, learn, folder


def said(ex): return ex._words.value


def seen(ex, k): return np.array(Image.open(io.BytesIO(ex.pictures[k].png)))


def candidates_of(seed, size=2):
    "Segments of a batch, and candidates with those of `size` earlier batches"
    bank = MemoryBank(size)
    for k in range(size): bank.push(make_segments(*random_batch(100 + seed + k), grid=(2, 2)).protos)
    seg = make_segments(*random_batch(seed), grid=(3, 3))
    return seg, bank.candidates(seg.protos)


# forces

@pytest.mark.parametrize("own_negative", [False, True])
@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: r.name)
def test_forces_are_the_gradient_of_the_loss(relation, own_negative):
    "In float64, for every pixel: by prototype, by feature, and the loss itself"
    seg, candidates = candidates_of(3)
    protos = candidates if relation.scope == "memory" else seg.protos
    anchor, candidate, positive = relation_sets(relation, seg, candidates)
    mu = (protos.mu_loc if relation.location else protos.mu).clone()
    features, spoken = seg.u if relation.location else seg.v, 0
    for row in range(0, len(seg.v), 7):
        f = pixel_forces(relation, seg, candidates, row, own_negative)
        assert f.anchor == bool(anchor[row]) and f.own == int(seg.own[row])
        if not f.anchor:
            assert f.loss == 0 and not f.gradient.any() and f.strength == 0 and not f.share.any()
            continue
        spoken += 1
        x, m = features[row:row+1].clone().requires_grad_(), mu.clone().requires_grad_()
        loss = contrast_plain(x, m, seg.own[row:row+1], candidate[row:row+1], positive[row:row+1], relation.kappa, own_negative)
        loss.sum().backward()
        torch.testing.assert_close(m.grad @ x[0].detach(), relation.kappa*f.gradient, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(x.grad[0], relation.kappa*(f.gradient @ mu), rtol=1e-10, atol=1e-12)
        assert f.loss == pytest.approx(float(loss.detach()), abs=1e-12)
        if f.loss > 1e-9 and not own_negative:
            assert f.strength == pytest.approx(1 - np.exp(-f.loss)) and float(f.share.clamp_max(0).sum()) == pytest.approx(-1) and float(f.share.clamp_min(0).sum()) == pytest.approx(1)
    assert spoken > 5 or relation.name == "silent"


def test_table_of_forces():
    seg, candidates = candidates_of(1)
    row = int((seg.protos.label[seg.own] < 4).nonzero()[0])
    f = pixel_forces(semantic_cooccurrence(), seg, candidates, row)
    t = forces_table(f, SCENE_CLASSES, 3, n=4)
    assert t.side.tolist() == ["pull"]*4 + ["push"]*4
    for side in ("pull", "push"): assert t[t.side == side].share.is_monotonic_decreasing
    whole = forces_table(f, SCENE_CLASSES, 3, n=10**6)
    assert "memory" in set(whole.image) and len(whole) == int((f.gradient != 0).sum())
    j = int((-f.share).argmax())
    first = whole.iloc[0]
    assert (first.share, first.similarity) == (pytest.approx(-100*float(f.share[j]), abs=.06), pytest.approx(float(f.similarity[j]), abs=.006))


# colours and pictures

def test_pull_and_push_differ_for_every_eye():
    hues = np.stack([rgb_of(PULL), rgb_of(PUSH)])
    grey = np.array([[170, 170, 170]], np.uint8)
    for eyes in (lambda o: o, deuteranopia):
        d = colour_distances(eyes(np.concatenate([hues, grey])))
        assert d[0, 1] > 40 and d[:2, 2].min() > 20, d # from each other, and from the ground they are painted on
    assert colour_distances(deuteranopia(np.array([[200, 60, 0], [110, 120, 0]], np.uint8)))[0, 1] < 20 < colour_distances(np.array([[200, 60, 0], [110, 120, 0]]))[0, 1] # the test can fail


def test_distances_of_class_colours():
    "Some VOC colours nearly coincide, which is why names stand beside them: the notebook says how near"
    d = colour_distances(SCENE_CLASSES.palette[:C])
    assert d.shape == (C, C) and not d.diagonal().any()
    np.testing.assert_allclose(d, d.T, atol=.5)
    stated = json.loads((Path(__file__).parents[2] / "nbs" / "api" / "look" / "91_explain.ipynb").read_text())
    table = next("".join(o["data"]["text/plain"]) for c in stated["cells"] for o in c.get("outputs", []) if "closest classes" in "".join(o.get("data", {}).get("text/plain", "")))
    assert f"{d[np.triu_indices(C, 1)].min():.1f}" in table


def test_painted_forces():
    image = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3)).astype(np.uint8)
    force = np.zeros((2, 5, 6))
    still = paint_forces(image, force)
    assert (still == still[..., :1]).all() # grey
    force[0, 1, 1], force[1, 2, 2], force[0, 0, 0] = -1, 1, -.1
    out = paint_forces(image, force)
    assert np.abs(out[0, 1, 1].astype(int) - rgb_of(PULL)).max() < 15 and np.abs(out[1, 2, 2].astype(int) - rgb_of(PUSH)).max() < 15
    assert np.array_equal(out[1, 0], still[1, 0]) and not np.array_equal(out[0, 0, 0], still[0, 0, 0])


@pytest.mark.parametrize("n,columns,size", [(1, 1, (5, 7)), (4, 2, (8, 6)), (5, 3, (4, 4))])
def test_every_pixel_of_a_mosaic_leads_back(n, columns, size):
    rng = np.random.default_rng(n)
    pictures = rng.integers(0, 255, (n, *size, 3)).astype(np.uint8) # white is the gap alone
    out = mosaic(pictures, columns)
    for y, x in np.ndindex(out.shape[:2]):
        at = mosaic_at(x, y, n, size, columns)
        assert np.array_equal(out[y, x], pictures[at[0], at[2], at[1]]) if at else (out[y, x] == 255).all()


def test_strip_shows_the_strongest():
    rng = np.random.default_rng(0)
    force, label = rng.normal(size=500), rng.integers(0, 5, 500)
    force[::3] = 0
    strip, order = memory_strip(force, label, SCENE_CLASSES, 100, rows=3)
    assert strip.shape == (24, 100, 3) and len(order) == 36 and (np.diff(label[order]) >= 0).all()
    assert np.abs(force[order]).min() >= np.sort(np.abs(force))[-36]
    assert len(memory_strip(0*force, label, SCENE_CLASSES, 100)[1]) == 0


def test_marks_stay_inside():
    for x, y in ((0, 0), (8, 0), (0, 6), (8, 6), (4, 3)):
        out = cross(np.full((7, 9, 3), 9, np.uint8), x, y)
        assert out.shape == (7, 9, 3) and (out[y, x] == 9).all() and (out != 9).any() # the pixel itself stays visible
    inside = np.zeros((7, 9), bool)
    inside[2:5, 3:6] = True
    out = outline(np.full((7, 9, 3), 9, np.uint8), inside)
    assert (out[2, 3] == 255).all() and (out[3, 4] == 9).all() and (out[1, 3] == 0).all()


@pytest.mark.parametrize("n,tables,bars", [(1, 0, 0), (3, 2, 4), (6, 1, 0)])
def test_figure_shows_the_whole_view(n, tables, bars):
    view = View("a sentence", {f"picture {k}": np.full((9, 9 + k, 3), 40*k, np.uint8) for k in range(n)}, {f"bar {k}": (k, f"{k} units") for k in range(bars)} or None, {f"table {k}": pd.DataFrame({"value": [k]}) for k in range(tables)})
    fig = view_figure(view)
    words = {t.get_text().strip() for f in (fig, *fig.subfigs) for ax in f.axes for t in (ax.title, ax._left_title, *ax.texts)} | {fig.get_suptitle()}
    assert {"a sentence", *view.pictures, *(view.tables or {}), *(f"{k} units" for k in range(bars))} <= words
    assert sorted(ax.images[0].get_array().shape for ax in fig.axes if ax.images) == sorted(p.shape for p in view.pictures.values())


def test_errors_of_divisions():
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 1
    assert division_errors(mask.astype(int), mask) == dict(leak=0, under=0, over=0)
    assert division_errors(np.zeros((8, 8), int), mask) == dict(leak=50, under=1, over=0)
    quarters = (np.indices((8, 8)) // 4).sum(0) + 2*(np.indices((8, 8)) // 4)[0]
    assert division_errors(quarters, mask) == dict(leak=0, under=0, over=pytest.approx(1))
    mask[:, 4:] = VOID
    assert division_errors(quarters, mask)["leak"] == 0
    with pytest.raises(SpmlError, match="all void"): division_errors(quarters, 0*mask + VOID)


# relations

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
    assert "says nothing" in said(ex)
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


@pytest.mark.parametrize("unmatched, words", [("all", "is positive to every segment"), ("out", "is left out"), (None, "is positive to every segment")])
def test_lending_says_what_becomes_of_those_without_a_lender(world, unmatched, words):
    "As the learner trains it; by default where affinity is not trained"
    weak, _, learn, _ = world
    relations = [semantic_annotation(), *([feature_affinity(threshold=.9, across=True, unmatched=unmatched)] if unmatched else [])]
    ex = explore_affinity(spml_learner(learn.dls, recipe=learn.recipe, relations=relations), weak, which=(0, 1))
    assert (ex.threshold.value, ex.across.value) == ((.9, True) if unmatched else (.95, False))
    ex.across.value, ex.threshold.value = True, 1.
    assert f"too far: without a label it {words}" in said(ex) and "memory bank are asked too; they are not shown" in said(ex)
    ex.across.value = False
    assert f"without a label it {words}" in said(ex) and "memory bank" not in said(ex)
    ex.threshold.value = -1.
    assert "it lends its label" in said(ex) and words not in said(ex)


@pytest.mark.parametrize("unmatched", ["all", "out"])
def test_lending_where_nobody_of_the_image_can(world, unmatched):
    weak, _, learn, _ = world
    plain = WeakSet(weak.images, lambda i: np.full((SIZE, SIZE), UNLABELLED if i else 1, np.uint8))
    ex = explore_affinity(spml_learner(learn.dls, recipe=learn.recipe, relations=[feature_affinity(unmatched=unmatched)]), plain, which=(0, 1))
    ex.point = (1, 5, 5)
    assert "so nobody can lend; without a label it " + ("is positive to every segment" if unmatched == "all" else "is left out") in said(ex)


def test_lending_of_a_plain_learner(world):
    weak, _, learn, _ = world
    ex = explore_affinity(spml_learner(learn.dls, method="cross_entropy", recipe=learn.recipe), weak, which=(0, 1))
    assert (ex.threshold.value, ex.across.value) == (.95, False) and "find a label" in said(ex)


# background

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


# regions

def test_regions_react(world):
    weak, _, learn, _ = world
    ex = explore_regions(weak.images, learn)
    assert "spml-explore-regions" in ex._dom_classes and ex.took > 0
    table = lambda: next(iter(ex.view.tables.values())).set_index("pieces")
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


# retrieval

@pytest.fixture(scope="module")
def retrieval(world):
    weak, held_out, learn, _ = world
    masks = [weak.images.mask(i) for i in range(len(weak))]
    return explore_retrieval(learn, weak, held_out, masks, grid=(4, 4)), masks


def test_store_is_the_training_index(world, retrieval):
    weak, _, learn, _ = world
    ex, masks = retrieval
    want = training_index(learn.model, [weak.images.image(i) for i in range(len(weak))], masks, C, grid=(4, 4))
    assert torch.equal(ex.store.index.label, want.label) and torch.equal(ex.store.index.image, want.image)
    torch.testing.assert_close(ex.store.index.mu, want.mu)
    for i, m in enumerate(ex.store.maps): assert set(ex.store.index.image[np.unique(m[m >= 0])].tolist()) == {i}


@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_are_those_of_the_prediction(world, retrieval, k):
    _, held_out, learn, _ = world
    ex, _ = retrieval
    with ex.hold(): ex.k.value, ex.image.value, ex.only_class.value, ex.only_image.value = k, 1, "all", -1
    want = predict_retrieval(learn.model, held_out.image(1), ex.store.index, C, k=k, grid=(4, 4))
    for x, y in ((0, 0), (20, 40), (63, 63), (40, 10)):
        ex.point = x, y
        assert f"is called '{SCENE_CLASSES.names[want[y, x]]}'" in said(ex).replace("&#x27;", "'")
        assert sum(b[0] for b in ex.view.bars.values()) == k
        agrees = "The mask agrees" in said(ex)
        inside = held_out.mask(1)[ex._query()[0] == ex._query()[0][y, x]]
        assert agrees == (np.bincount(inside[inside < C], minlength=C).argmax() == want[y, x])


def test_pictures_and_map_are_linked(retrieval):
    ex, _ = retrieval
    with ex.hold(): ex.k.value, ex.only_class.value, ex.only_image.value = 20, "all", -1
    ex.pictures[0].point = [11, 12]
    assert ex.point == (11, 12) and ex.chosen == -1 and ex.place == ex.shown[0]
    ex.pictures[2].point = [ex.crop + 4 + GAP + 5, 5]
    assert ex.chosen == ex.place == ex.shown[1]
    ex.pictures[2].point = [ex.crop + 4 + 1, 5]
    assert "Between the pictures" in said(ex)
    there = int(ex.store.index.image[ex.place])
    ex.pictures[4].point = [50, 40]
    assert ex.chosen in (int(ex.store.maps[there][40, 50]), ex.place)
    ex.pictures[3].point = on_map(ex._map()[1][7]).tolist()
    assert np.array_equal(on_map(ex._map()[1][ex.chosen]), on_map(ex._map()[1][7]))
    ex.only_class.value = "background"
    assert ex.chosen == -1 and set(ex.view.tables["neighbours"].label) == {"background"}
    name, number = ex.only_image.options[3]
    with ex.hold(): ex.only_class.value, ex.only_image.value = "all", number
    assert set(ex.view.tables["neighbours"].image) == {name}
    absent = next(c for c in ex.only_class.options[1:] if not ((ex.store.index.image == number) & (ex.store.index.label == SCENE_CLASSES.id(c))).any())
    ex.only_class.value = absent
    assert "No segment of class" in said(ex)


def test_a_wrong_vote_names_who_caused_it(world):
    "All training labels are one class: the mask cannot agree, and all neighbours are framed red"
    weak, held_out, learn, _ = world
    ex = explore_retrieval(learn, weak, held_out, [np.full((SIZE, SIZE), 5, np.uint8)]*len(weak), grid=(3, 3))
    assert "the 20 neighbours of" in said(ex) and "outvote 0 of its own class." in said(ex)
    assert (seen(ex, 2)[0, :CROP] == rgb_of(PUSH)).all()
    closed = SceneSet(2, seed=3, size=SIZE, start=100, masks=False)
    ex = explore_retrieval(learn, weak, closed, [np.full((SIZE, SIZE), 5, np.uint8)]*len(weak), grid=(3, 3))
    assert "mask" not in said(ex)
    with pytest.raises(SpmlError, match="label maps"): explore_retrieval(learn, weak.images, held_out)


# embedding

def test_embedding_over_steps(world):
    weak, _, learn, folder = world
    ex = explore_embedding(learn, weak, folder)
    assert "spml-explore-embedding" in ex._dom_classes and [*ex.step.options] == [0, 2, 4, "now"] and ex.took > 0
    torch.testing.assert_close(ex.seen[4], ex.seen["now"])
    assert not torch.allclose(ex.seen[0], ex.seen["now"])
    ex.pictures[0].hover = [5, 6]
    assert ex.point == (0, 5, 6)
    ex.pictures[0].hover = []
    assert ex.point == (0, 5, 6)
    ex.follow.value = False
    assert not ex.pictures[0].follow
    v = ex.seen["now"]
    cosine = torch.einsum("bdhw,d->bhw", v, v[0, :, 6*16//SIZE, 5*16//SIZE])
    assert f"{float((cosine > .8).float().mean()):.0%} of all pixels" in said(ex)
    h, w = v.shape[-2:]
    ex.pictures[3].point = [w + GAP + 1, 1]
    assert ex.step.value == 2
    ex.pictures[0].point = [SIZE + 1, 1]
    assert "Between" in said(ex)
    ex.point = (9, 0, 0)
    assert "There is no pixel" in said(ex)


def test_embedding_without_labels_and_snapshots(world, tmp_path):
    weak, _, learn, _ = world
    ex = explore_embedding(learn, weak.images, which=(0, 1))
    assert len(ex.view.pictures) == 3 and ex.view.bars is None
    ex = explore_embedding(learn, learn.dls.train.one_batch(), which=(0, 1))
    assert ex.view.bars
    with pytest.raises(SpmlError, match="no snapshots"): snapshots(learn.model, torch.zeros(1, 3, 32, 32), tmp_path)
    other = spml_learner(learn.dls, recipe=learn.recipe.but(dim=4))
    with pytest.raises(SpmlError, match="another network"): snapshots(other.model, torch.zeros(1, 3, 32, 32), world[3])


# all of them

def test_a_broken_widget_would_show(world):
    "An error that is not ours is not hidden"
    ex = explore_regions(world[0].images)
    ex.contours, ex._trees = (lambda image: 1/0), {}
    with pytest.raises(ZeroDivisionError): ex.refresh()


def test_controls_explain_themselves(world, retrieval):
    weak, _, learn, folder = world
    explorers = [explore_relations(learn, weak), explore_background(WeakSet(weak.images, "tags"), box_maps), explore_regions(weak.images, learn), retrieval[0], explore_embedding(learn, weak, folder)]
    for ex in explorers:
        assert all(w.description and w.tooltip for w in ex.controls.values())
        assert all(p.caption and p.help and p.png[:4] == b"\x89PNG" for p in ex.pictures if p.layout.display != "none")
        bundle = ex._repr_mimebundle_()
        assert bundle["text/plain"].startswith(type(ex).__name__) and Image.open(io.BytesIO(base64.b64decode(bundle["image/jpeg"]))).size[0] > 300


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_keep_pictures_not_widgets(path):
    nb = json.loads(path.read_text())
    assert "widgets" not in nb["metadata"], "widget state makes a notebook heavy: execute with --ExecutePreprocessor.store_widget_state=False"
    kinds = {k for c in nb["cells"] for o in c.get("outputs", []) for k in o.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" not in kinds

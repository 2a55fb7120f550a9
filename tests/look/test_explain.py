"""What explorers say: forces against the gradient of the loss, colours for every eye, marks, errors of divisions."""

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import random_batch
from spml_kit.core import UNLABELLED, VOID, SpmlError, voc_palette
from spml_kit.data.scenes import PART_CLASSES, SCENE_CLASSES
from spml_kit.look.explain import PULL, PUSH, View, colour_blind, colour_distances, cross, division_errors, forces_table, memory_strip, outline, paint_forces, pixel_forces, rgb_of, view_figure
from spml_kit.method.contrast import contrast_plain
from spml_kit.method.memory import MemoryBank
from spml_kit.method.relations import Relation, feature_affinity, image_similarity, relation_sets, semantic_annotation, semantic_cooccurrence
from spml_kit.method.segments import make_segments

RELATIONS = [semantic_annotation(), semantic_cooccurrence(), image_similarity(), feature_affinity(), Relation("silent", lambda p: torch.full_like(p.label, -1), 6.), Relation("alone", lambda p: torch.arange(len(p)), 9.)]


def candidates_of(seed, size=2):
    "Segments of a batch, and candidates with those of `size` earlier batches"
    bank = MemoryBank(size)
    for k in range(size): bank.push(make_segments(*random_batch(100 + seed + k), grid=(2, 2)).protos)
    seg = make_segments(*random_batch(seed), grid=(3, 3))
    return seg, bank.candidates(seg.protos)


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


def test_pull_and_push_differ_for_every_eye():
    hues = np.stack([rgb_of(PULL), rgb_of(PUSH)])
    grey = np.array([[170, 170, 170]], np.uint8)
    for eyes in (lambda o: o, colour_blind):
        d = colour_distances(eyes(np.concatenate([hues, grey])))
        assert d[0, 1] > 40 and d[:2, 2].min() > 20, d # from each other, and from the ground they are painted on
    assert colour_distances(colour_blind(np.array([[200, 60, 0], [110, 120, 0]], np.uint8)))[0, 1] < 20 < colour_distances(np.array([[200, 60, 0], [110, 120, 0]]))[0, 1] # the test can fail


@pytest.mark.parametrize("table", [SCENE_CLASSES, PART_CLASSES], ids=["scenes", "body parts"])
@pytest.mark.parametrize("eyes", [lambda o: o, colour_blind, lambda o: colour_blind(o, "protan")], ids=["all cones", "deutan", "protan"])
def test_classes_are_told_apart_by_every_eye(table, eyes):
    codes = [*range(len(table)), UNLABELLED, VOID]
    d = colour_distances(eyes(table.palette[codes]))
    assert d.shape == (len(codes),)*2 and not d.diagonal().any()
    np.testing.assert_allclose(d, d.T, atol=.5)
    least = lambda d: d[np.triu_indices(len(d), 1)].min()
    assert least(d) > 12 and least(colour_distances(eyes(voc_palette()[codes]))) < 12 # VOC's table fails


def test_painted_forces():
    image = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3)).astype(np.uint8)
    force = np.zeros((2, 5, 6))
    still = paint_forces(image, force)
    assert (still == still[..., :1]).all() # grey
    force[0, 1, 1], force[1, 2, 2], force[0, 0, 0] = -1, 1, -.1
    out = paint_forces(image, force)
    assert np.abs(out[0, 1, 1].astype(int) - rgb_of(PULL)).max() < 15 and np.abs(out[1, 2, 2].astype(int) - rgb_of(PUSH)).max() < 15
    assert np.array_equal(out[1, 0], still[1, 0]) and not np.array_equal(out[0, 0, 0], still[0, 0, 0])


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


def test_titles_of_neighbouring_pictures_do_not_meet():
    title = "annotation: blue pulls, orange pushes\nbelow: the strongest segments of the memory bank"
    view = View("", {f"{k} {title}": np.zeros((40, 40, 3), np.uint8) for k in range(3)})
    fig = view_figure(view)
    fig.draw_without_rendering()
    boxes = [ax.title.get_window_extent() for ax in fig.subfigs[0].axes]
    assert all(one.x1 < other.x0 for one, other in zip(boxes, boxes[1:]))

"""Metrics: golden vectors, plain definitions, properties, faults."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from spml_kit.core import Classes, SpmlError, UNLABELLED, VOID
from spml_kit.metrics import (Confusion, average_best_overlap, boundary_f, bootstrap_interval, instance_ap, instance_weighted_iou, per_class_table,
                              true_instances, weak_vs_full)

C = 4
labels = lambda values, shape=(5, 6): arrays(np.uint8, shape, elements=st.sampled_from(values))


def test_v24_iou(vectors):
    v, e = vectors["V24"]["inputs"], vectors["V24"]["expected"]
    c = Confusion(v["num_classes"]).add(v["pred"], v["gt"])
    assert c.counts.sum(1).tolist() == e["tp_fn"] and c.counts.sum(0).tolist() == e["tp_fp"] and c.counts.diagonal().tolist() == e["tp"]
    np.testing.assert_allclose(c.iou, e["iou"], atol=1e-8)
    assert c.miou == pytest.approx(e["miou"]) and c.accuracy/100 == pytest.approx(e["pixel_acc"])


def test_v25_instances(vectors):
    v, e = vectors["V25"]["inputs"], vectors["V25"]["expected"]
    triples = [(i["pred"], i["gt"], i["inst"]) for i in v["images"]]
    out = instance_weighted_iou(triples, v["num_classes"], void_instance=True)
    np.testing.assert_allclose(out, e["iou"], atol=1e-8)
    assert out.mean() == pytest.approx(e["mean"])
    assert instance_weighted_iou(triples, v["num_classes"])[0] == pytest.approx((75 + 100/3)/2) # void is no instance: one of class 0 in each image


def test_v31_weak_vs_full(vectors):
    v, e = vectors["V31"]["inputs"], vectors["V31"]["expected"]
    np.testing.assert_allclose([weak_vs_full(*pair) for pair in v["pairs"]], e["wvf"], atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(labels([0, 1, 2, 3]), labels([0, 1, 2, UNLABELLED, VOID]))
def test_confusion_against_sets(pred, gt):
    c, valid = Confusion(C).add(pred, gt), gt < C
    for k in range(C):
        p, g = (pred == k) & valid, (gt == k) & valid
        union = (p | g).sum()
        assert c.iou[k] == pytest.approx(100*(p & g).sum()/union if union else 0)
    assert c.miou == pytest.approx(c.iou.mean())
    there = [k for k in range(C) if (gt == k).any()]
    assert c.mean_iou(present_only=True) == pytest.approx(c.iou[there].mean() if there else 0)
    assert c.accuracy == pytest.approx(100*(pred == gt)[valid].mean() if valid.any() else 0)
    assert c.present.tolist() == [k in there for k in range(C)]


@settings(max_examples=60, deadline=None)
@given(labels([0, 1, 2, 3, UNLABELLED, VOID]), labels([0, 1, 2, 3]))
def test_p16(gt, other):
    perfect = np.where(gt < C, gt, 0)
    c = Confusion(C).add(perfect, gt)
    assert c.mean_iou(present_only=True) == (100 if (gt < C).any() else 0)
    if c.present.all():
        assert c.miou == 100
    assert np.array_equal(Confusion(C).add(np.where(gt < C, perfect, other), gt).counts, c.counts) # ignored pixels
    assert np.array_equal(Confusion(C).add(np.where(gt < C, perfect, 255), gt).counts, c.counts)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
@pytest.mark.parametrize("shape", [(7,), (5, 6), (2, 3, 4)])
@pytest.mark.parametrize("wrap", [np.asarray, torch.as_tensor, lambda a: a.tolist()])
def test_any_integers_of_any_shape(dtype, shape, wrap):
    rng = np.random.default_rng(0)
    pred, gt = rng.integers(0, C, shape), rng.integers(0, C, shape)
    want = np.zeros((C, C), int)
    np.add.at(want, (gt, pred), 1)
    assert np.array_equal(Confusion(C).add(wrap(pred.astype(dtype)), wrap(gt.astype(dtype))).counts, want)


def test_merging_is_adding():
    rng = np.random.default_rng(0)
    maps = [(rng.integers(0, C, (6, 6)), rng.choice([0, 1, 2, 255], (6, 6))) for _ in range(5)]
    whole = Confusion(C)
    for pred, gt in maps:
        whole.add(pred, gt)
    parts = [Confusion(C).add(*m) for m in maps]
    kept = parts[0].counts.copy()
    assert np.array_equal(sum(parts, Confusion(C)).counts, whole.counts) and np.array_equal(parts[0].counts, kept)


def test_confusion_faults():
    ones = np.ones((2, 3), int)
    for bad, message in [(lambda: Confusion(2).add(2*ones, ones), "prediction is 2"), (lambda: Confusion(2).add(-ones, ones), "prediction is -1"), (lambda: Confusion(2).add(254*ones, ones), "prediction is 254"),
                         (lambda: Confusion(2).add(ones, ones[:1]), "resize"), (lambda: Confusion(2).add(ones/2, ones), "argmax"), (lambda: Confusion(2) + Confusion(3), "2 and 3"),
                         (lambda: weak_vs_full(40, 0), "give a score above 0"), (lambda: weak_vs_full(40, float("nan")), "give a score above 0"), (lambda: bootstrap_interval([]), "no images"),
                         (lambda: per_class_table({"a": Confusion(3)}, Classes(("x", "y"))), "3 classes, there are 2")]:
        with pytest.raises(SpmlError, match=message):
            bad()
    c = Confusion(2).add(ones, ones)
    with pytest.raises(SpmlError):
        c.add(np.array([1, 2]), np.array([1, 1]))
    assert c.counts.sum() == 6 # a refused map leaves no trace


def test_table():
    rng = np.random.default_rng(0)
    counts = {n: Confusion(2).add(rng.integers(0, 2, 50), rng.integers(0, 2, 50)) for n in ("a", "b")}
    table = per_class_table(counts, Classes(("x", "y")))
    assert list(table.columns) == ["a", "b"] and list(table.index) == ["x", "y", "mean"]
    for n, c in counts.items():
        assert table[n].tolist() == pytest.approx([*c.iou, c.miou])


def images(n, seed=0):
    rng = np.random.default_rng(seed)
    gts = [rng.integers(0, 3, 60) for _ in range(n)]
    return [Confusion(3).add(np.where(rng.random(60) < .4*rng.random(), 0, gt), gt) for gt in gts]


def test_bootstrap():
    few, many = images(10), images(400)
    low, high = bootstrap_interval(many)
    assert low < sum(many, Confusion(3)).miou < high
    assert bootstrap_interval(many) == (low, high) != bootstrap_interval(many, seed=1)
    wide = bootstrap_interval(few)
    assert wide[1] - wide[0] > 2*(high - low) # 40 times the images: six times narrower in expectation
    inner = bootstrap_interval(many, level=.5)
    assert low < inner[0] < inner[1] < high
    assert bootstrap_interval(few[:1]) == pytest.approx((few[0].miou,)*2)


@pytest.mark.parametrize("present_only", [False, True])
def test_bootstrap_of_two_images_is_enumerable(present_only):
    a, b = Confusion(3).add([0, 1, 1], [0, 1, 0]), Confusion(3).add([2, 0, 0], [2, 2, 0])
    outcomes = sorted(c.mean_iou(present_only) for c in (a + a, a + b, b + b))
    assert bootstrap_interval([a, b], level=.9, present_only=present_only) == pytest.approx((outcomes[0], outcomes[-1])) # each has probability 1/4, 1/2, 1/4


def plain_boundary_f(pred, gt, tolerance):
    "All pairs of boundary pixels; maps without void"
    def edge(labels, k):
        inside, h, w = labels == k, *labels.shape
        return [(r, c) for r in range(h) for c in range(w) if inside[r, c]
                and any(0 <= a < h and 0 <= b < w and not inside[a, b] for a, b in ((r-1, c), (r+1, c), (r, c-1), (r, c+1)))]
    reach, counts = tolerance*np.hypot(*gt.shape), np.zeros(4)
    for k in set(np.unique(pred)) | set(np.unique(gt)):
        p, g = edge(pred, k), edge(gt, k)
        near = lambda x, others: any(np.hypot(x[0]-o[0], x[1]-o[1]) <= reach for o in others)
        counts += [sum(near(x, g) for x in p), len(p), sum(near(x, p) for x in g), len(g)]
    if not counts[1] and not counts[3]:
        return 1.
    precision, recall = counts[0]/max(counts[1], 1), counts[2]/max(counts[3], 1)
    return 2*precision*recall/max(precision + recall, 1e-12)


@settings(max_examples=60, deadline=None)
@given(labels([0, 1, 2], (6, 8)), labels([0, 1, 2], (6, 8)), st.sampled_from([.05, .1, .15, .3]))
def test_boundary_f_against_all_pairs(pred, gt, tolerance):
    assert boundary_f(pred, gt, tolerance) == pytest.approx(plain_boundary_f(pred, gt, tolerance))
    assert boundary_f(gt, gt, tolerance) == 1
    assert boundary_f(pred, gt, tolerance) == pytest.approx(boundary_f(gt, pred, tolerance))


def disc(shift=0, n=80, r=20):
    y, x = np.mgrid[:n, :n]
    return ((y - n//2)**2 + (x - n//2 - shift)**2 < r*r).astype(np.uint8)


def test_boundary_f_falls_with_the_shift():
    scores = [boundary_f(disc(s), disc()) for s in range(0, 20, 2)]
    assert scores[0] == 1 and scores == sorted(scores, reverse=True) and scores[-1] < .3


def test_boundary_f_void():
    y, x = np.mgrid[:80, :80]
    rim = np.where(np.abs(np.hypot(y-40, x-40) - 20) < 2, VOID, disc())
    assert boundary_f(disc(), rim) == 1
    assert boundary_f(disc(8), rim) < .6
    padded = disc()
    padded[:, 70:] = VOID
    pred = disc()
    pred[:, 75:] = 1 # 5 pixels inside the padding, the tolerance is 2.3
    assert boundary_f(pred, padded) == boundary_f(disc(), padded) == 1
    assert boundary_f(pred, disc()) < 1
    assert boundary_f(np.where(padded == VOID, VOID, disc()), padded) == 1
    for bad, message in [(lambda: boundary_f(disc(), 0*disc() + VOID), "all void"), (lambda: boundary_f(0*disc() + VOID, disc()), "give every pixel a class"), (lambda: boundary_f(disc()[:9], disc()), "resize")]:
        with pytest.raises(SpmlError, match=message):
            bad()


@pytest.mark.parametrize("wrap", [np.asarray, torch.as_tensor])
def test_boundary_f_takes_arrays_and_tensors(wrap):
    assert boundary_f(wrap(disc(3)), wrap(disc())) == boundary_f(disc(3).astype(np.int64), disc())


def test_the_right_outline_of_the_wrong_class_is_no_boundary():
    assert boundary_f(2*disc(), disc()) == pytest.approx(boundary_f(disc(), 2*disc()))
    assert boundary_f(2*disc(), disc()) < .6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees():
    rng = np.random.default_rng(0)
    pred, gt = torch.tensor(rng.integers(0, C, (3, 20, 20))), torch.tensor(rng.integers(0, C, (3, 20, 20)))
    assert np.array_equal(Confusion(C).add(pred.cuda(), gt.cuda()).counts, Confusion(C).add(pred, gt).counts)


# ---- instances

def plain_iou(a, b): return (a & b).sum()/max((a | b).sum(), 1)


def plain_ap(predicted, truth, iou):
    "By class, in words: match in the order of scores; precision at each recall level is the best at that level or beyond"
    each = []
    for c in {c for image in truth for c, _ in image}:
        ranked = sorted(((s, i, m) for i, image in enumerate(predicted) for k, s, m in image if k == c), key=lambda o: -o[0])
        true, taken, points, hits = [[m for k, m in image if k == c] for image in truth], set(), [], 0
        for n, (_, i, m) in enumerate(ranked, 1):
            overlaps = [plain_iou(m, t) for t in true[i]]
            best = overlaps.index(max(overlaps)) if overlaps else None
            if best is not None and overlaps[best] >= iou and (i, best) not in taken:
                taken.add((i, best))
                hits += 1
            points.append((hits, hits/n))
        total = sum(map(len, true))
        each.append(sum(max((p for h, p in points if h >= k), default=0) for k in range(1, total + 1))/total)
    return 100*np.mean(each) if each else np.nan


def plain_abo(predicted, truth):
    best = {}
    for found, image in zip(predicted, truth):
        for c, m in image: best.setdefault(c, []).append(max((plain_iou(p, m) for k, _, p in found if k == c), default=0))
    return 100*np.mean([np.mean(o) for o in best.values()]) if best else np.nan


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([.1, .25, .5, .75]))
def test_instances_against_plain_definitions(seed, iou):
    rng = np.random.default_rng(seed)
    mask = lambda: np.pad(np.ones((2, 2), bool), [(y, 3 - y) for y in rng.integers(0, 4, 2)])
    truth = [[(int(rng.integers(1, 3)), mask()) for _ in range(rng.integers(0, 4))] for _ in range(3)]
    predicted = [[(int(rng.integers(1, 4)), rng.random(), mask()) for _ in range(rng.integers(0, 6))] for _ in range(3)]
    np.testing.assert_allclose(instance_ap(predicted, truth, iou), plain_ap(predicted, truth, iou))
    np.testing.assert_allclose(average_best_overlap(predicted, truth), plain_abo(predicted, truth), rtol=1e-5)
    perfect = [[(c, rng.random(), m) for c, m in image] for image in truth]
    if any(truth):
        assert instance_ap([o + p for o, p in zip(perfect, predicted)], truth, iou) <= 100 and average_best_overlap(perfect, truth) == pytest.approx(100)
        assert instance_ap([[]]*3, truth, iou) == average_best_overlap([[]]*3, truth) == 0


def test_a_second_hit_is_none():
    m = np.eye(4, dtype=bool)
    twice = [[(1, .9, m), (1, .8, m)]]
    assert instance_ap(twice, [[(1, m)]]) == 100 and instance_ap(twice, [[(1, m), (1, ~m)]]) == 50
    assert instance_ap([[(2, .9, m), (1, .8, m)]], [[(1, m)]]) == 100 # a class that is nowhere is not asked


def test_true_instances():
    labels = np.array([[1, 1, 2, 255], [0, 0, 2, 255], [0, 1, 255, 254]], np.uint8)
    ids = np.array([[1, 1, 1, 2], [3, 3, 4, 2], [3, 3, 4, 5]])
    found = true_instances(labels, ids)
    assert [c for c, _ in found] == [1, 2] # 2 and 5 are void, 3 is background; a majority counts
    assert np.array_equal(found[0][1], ids == 1) and np.array_equal(found[1][1], ids == 4)
    assert true_instances(labels, 0*ids) == []


def test_instances_refuse():
    m = np.eye(4, dtype=bool)
    for iou in (0, 1.1):
        with pytest.raises(SpmlError, match="iou"): instance_ap([[]], [[]], iou)
    for f in (instance_ap, average_best_overlap):
        with pytest.raises(SpmlError, match="give a list for each image"): f([[]], [])
    with pytest.raises(SpmlError, match="they must agree"): true_instances(np.zeros((4, 4), int), m[:2])

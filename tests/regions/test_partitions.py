"""Measures of contours and regions: fast against plain, scikit-image and a one-to-one assignment; properties, faults, the experiment."""
from itertools import combinations
from math import log2

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from skimage.metrics import variation_of_information

from spml_kit.regions.contours import gradient_contours
from spml_kit.core import SpmlError
from spml_kit.files import read_json
from spml_kit.runs.experiment import run_notebook
from spml_kit.runs.cli import spml_run
from spml_kit.regions.oversegment import hierarchy_of
from spml_kit.regions.partitions import (THRESHOLDS, best_f, boundary_counts, contingency, contour_counts, f_measure, partition_scores, region_boundaries,
                                 thin_contours)
from spml_kit.data.scenes import make_scene

sizes = st.tuples(st.integers(1, 6), st.integers(2, 6))


@st.composite
def divisions(draw, n=2, top=4):
    "n maps of one size"
    size = draw(sizes)
    return [draw(arrays(np.int32, size, elements=st.integers(0, top))) for _ in range(n)]


@st.composite
def lines(draw, n=2):
    size = draw(st.tuples(st.integers(3, 12), st.integers(3, 12)))
    return [draw(arrays(bool, size)) for _ in range(n)]


def plain(regions, truth):
    "The four measures of one person, by their definitions"
    r, t = regions.ravel().tolist(), truth.ravel().tolist()
    N = len(r)
    parts = lambda v: [{i for i in range(N) if v[i] == k} for k in sorted(set(v))]
    R, T = parts(r), parts(t)
    covering = sum(len(s)*max(len(s & q)/len(s | q) for q in R) for s in T)/N
    pairs = [*combinations(range(N), 2)]
    rand = sum((r[i] == r[j]) == (t[i] == t[j]) for i, j in pairs)/len(pairs)
    left = lambda A, B: -sum(len(a & b)/N*log2(len(a & b)/len(b)) for a in A for b in B if a & b) # H(A|B)
    return dict(covering=covering, rand=rand, variation=left(R, T) + left(T, R), purity=sum(max(len(q & s) for s in T) for q in R)/N)


# regions

@given(divisions(3))
@settings(max_examples=80, deadline=None)
def test_scores_are_their_definitions(maps):
    regions, *truths = maps
    got, wanted = partition_scores(regions, truths), [plain(regions, t) for t in truths]
    for k in got: assert got[k] == pytest.approx(np.mean([w[k] for w in wanted]), abs=1e-9), k


@given(divisions())
@settings(max_examples=60, deadline=None)
def test_variation_is_that_of_scikit_image(maps):
    a, b = maps
    assert partition_scores(a, [b])["variation"] == pytest.approx(sum(variation_of_information(a, b)), abs=1e-9)


@given(divisions(3))
@settings(max_examples=60, deadline=None)
def test_variation_is_a_metric_and_rand_symmetric(maps):
    a, b, c = maps
    v = lambda x, y: partition_scores(x, [y])["variation"]
    assert v(a, a) == pytest.approx(0, abs=1e-9) and v(a, b) == pytest.approx(v(b, a), abs=1e-9) and v(a, c) <= v(a, b) + v(b, c) + 1e-9
    assert partition_scores(a, [b])["rand"] == pytest.approx(partition_scores(b, [a])["rand"])


@given(divisions())
@settings(max_examples=60, deadline=None)
def test_names_do_not_matter_and_purity_grows_with_division(maps):
    a, b = maps
    assert partition_scores(a*1000 + 7, [(4 - b)*3]) == pytest.approx(partition_scores(a, [b]))
    finer = np.unique(np.stack([a, b]).reshape(2, -1), axis=1, return_inverse=True)[1].reshape(a.shape)
    assert partition_scores(finer, [b])["purity"] == pytest.approx(1) and partition_scores(a, [b])["purity"] <= 1
    table = contingency(a, b)
    assert table.sum() == a.size and np.array_equal(table.sum(1), np.unique(a, return_counts=True)[1]) and (table.data > 0).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_kinds_of_ids(dtype):
    scene = make_scene(2, size=64)
    r = hierarchy_of(gradient_contours(scene.image)).regions(n=9)
    assert partition_scores(r.astype(dtype), [scene.mask.astype(dtype)]) == partition_scores(r, [scene.mask])


@pytest.mark.parametrize("regions, truths, says", [
    (np.zeros((3, 4), int), [np.zeros((4, 3), int)], "must agree"),
    (np.zeros((0, 4), int), [np.zeros((0, 4), int)], "have pixels"),
    (np.zeros((3, 4), int), [], "nothing to compare with"),
    (np.full((3, 4), -1), [np.zeros((3, 4), int)], "0 or above"),
    (np.zeros((3, 4)), [np.zeros((3, 4), int)], "must be integers"),
])
def test_divisions_are_checked(regions, truths, says):
    with pytest.raises(SpmlError, match=says): partition_scores(regions, truths)


# boundaries

@given(lines(3), st.sampled_from([.0075, .1, .2]))
@settings(max_examples=80, deadline=None)
def test_counts_are_their_definition(maps, tolerance):
    drawn, *truths = maps
    reach = max(1, tolerance*np.hypot(*drawn.shape))
    points = lambda m: np.argwhere(m)
    near = lambda p, m: any(np.hypot(*(p - q)) <= reach for q in points(m))
    right = sum(any(near(p, t) for t in truths) for p in points(drawn))
    met = sum(near(p, drawn) for t in truths for p in points(t))
    assert boundary_counts([drawn], truths, tolerance).tolist() == [[drawn.sum(), right, sum(t.sum() for t in truths), met]]


@given(lines(2))
@settings(max_examples=60, deadline=None)
def test_never_below_the_one_to_one_assignment(maps):
    drawn, truth = maps
    tolerance, (a, b) = .15, (np.argwhere(m) for m in maps)
    close = np.hypot(*(a[:, None] - b[None]).T).T <= max(1, tolerance*np.hypot(*drawn.shape))
    pairs = int((maximum_bipartite_matching(csr_array(close), perm_type="column") >= 0).sum()) if close.size else 0
    exact = np.array([len(a), pairs, len(b), pairs])
    got = boundary_counts([drawn], [truth], tolerance)[0]
    assert (got >= exact).all() and f_measure(got) >= f_measure(exact) - 1e-12


@given(lines(3))
@settings(max_examples=40, deadline=None)
def test_a_person_agrees_with_everybody_who_includes_that_person(maps):
    drawn, other, third = maps
    n, right, people, met = boundary_counts([drawn], [drawn, other, third])[0]
    assert right == n and met >= n and people == sum(m.sum() for m in maps) and 0 <= f_measure([n, right, people, met]) <= 1


def test_f_of_sets():
    counts = np.random.default_rng(0).integers(1, 50, (7, 5, 4))
    counts[..., 1], counts[..., 3] = np.minimum(counts[..., 0], counts[..., 1]), np.minimum(counts[..., 2], counts[..., 3])
    slow = []
    for t in range(5):
        n, right, people, met = counts[:, t].sum(0)
        p, r = right/n, met/people
        slow.append(2*p*r/(p + r))
    best = best_f(counts)
    assert best["ods"] == pytest.approx(max(slow)) and best["at"] == int(np.argmax(slow)) and best["ois"] > best["ods"]
    assert f_measure([0, 0, 0, 0]) == 1 and f_measure([0, 0, 5, 0]) == f_measure([5, 0, 0, 0]) == 0


@pytest.mark.parametrize("angle", range(0, 180, 15))
def test_contours_of_any_direction_become_thin_and_stay(angle):
    y, x = np.indices((41, 41)) - 20.
    away = x*np.cos(np.radians(angle)) + y*np.sin(np.radians(angle))
    thin, away = (a[3:-3, 3:-3] for a in (thin_contours(.8*np.exp(-away**2/18)), away)) # at the image's border, a neighbour is missing
    assert np.abs(away[thin > .1]).max() < 1.1 # on the line, nothing beside it
    line = thin > .7
    assert 35 <= line.sum() <= 80 and (line.any(0).sum() == 35 or line.any(1).sum() == 35) # and all along it


@given(arrays(np.int32, st.tuples(st.integers(2, 9), st.integers(2, 9)), elements=st.integers(0, 3)))
@settings(max_examples=60, deadline=None)
def test_boundaries_lie_where_ids_change(r):
    edge = region_boundaries(r)
    assert edge.dtype == bool and edge.any() == (len(np.unique(r)) > 1)
    for y, x in np.argwhere(edge): assert len(np.unique(r[y:y+2, x:x+2])) > 1


def test_a_perfect_contour_scores_one_at_every_threshold():
    mask = make_scene(0, size=96).mask
    edge = region_boundaries(mask)
    counts = contour_counts(edge.astype(np.float32), [edge])
    assert counts.shape == (len(THRESHOLDS), 4) and f_measure(counts).min() > .98


@pytest.mark.parametrize("what, says", [
    (lambda: thin_contours(np.full((5, 5), 2.)), "in 0..1"),
    (lambda: thin_contours(np.full((5, 5), np.nan)), "finite"),
    (lambda: thin_contours(np.zeros(5)), r"\(H,W\)"),
    (lambda: boundary_counts([np.zeros((3, 3), bool)], [np.zeros((4, 3), bool)]), "must agree"),
    (lambda: boundary_counts([np.zeros((3, 3), bool)], []), "nothing to compare with"),
])
def test_contours_are_checked(what, says):
    with pytest.raises(SpmlError, match=says): what()


# the experiment

def write_benchmark(root, n=2):
    "A benchmark of two people: one who draws classes, one who sees a single thing"
    for kind in ("images", "segments"): (root/kind/"test").mkdir(parents=True)
    for i in range(n):
        scene = make_scene(i, size=64)
        Image.fromarray(scene.image).save(root/"images"/"test"/f"{i}.jpg", quality=95)
        np.savez(root/"segments"/"test"/f"{i}.npz", scene.mask.astype(np.uint16) + 1, np.ones((64, 64), np.uint16))
    return root


def test_experiment_reads_a_benchmark(tmp_path, capfd):
    root = write_benchmark(tmp_path/"benchmark")
    words = ["--root", root, "--out", tmp_path/"run", "-p", "methods", ["gradient", "slic"], "-p", "levels", [2, 6], "-p", "n_images", 0]
    assert spml_run([*map(str, ["regions", *words])]) == 0
    m = read_json(tmp_path/"run"/"metrics.json")
    assert f"covering_ods {m['rows'][0]['covering_ods']:.3f}" in capfd.readouterr().out
    assert [r["method"] for r in m["rows"]] == ["gradient", "slic"] and m["conditions"]["n_images"] == 2 and m["conditions"]["data"] == "bsds500 test"
    slow = np.mean([[partition_scores(hierarchy_of(gradient_contours(im)).regions(n=n), [t, np.zeros_like(t)])["covering"] for n in (2, 6)]
                    for im, t in ((np.array(Image.open(root/"images"/"test"/f"{i}.jpg")), make_scene(i, size=64).mask) for i in range(2))], 0)
    assert m["rows"][0]["covering_ods"] == pytest.approx(slow.max()) and m["curves"]["gradient"]["covering"] == pytest.approx(slow)
    assert m["rows"][0]["variation_ois"] <= m["rows"][0]["variation_ods"] and str(tmp_path) not in (tmp_path/"run"/"metrics.json").read_text()


def test_experiment_says_what_root_must_hold(tmp_path):
    with pytest.raises(SpmlError, match="root must hold images/test and segments/test"): run_notebook("regions", tmp_path/"run", {"root": str(tmp_path)}, progress=False)

"""Region merging: the tables against their definitions, the order against all pairs, nested cuts, proposals, labels, faults."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage as ndi

from spml_kit.core import SpmlError
from spml_kit.regions.contours import contour_channels, gradient_contours
from spml_kit.regions.merging import BINS, RegionPairs, SCALES, merge_order, merge_regions, region_proposals, snap_labels, waterpixels
from spml_kit.regions.oversegment import as_regions, oversegment, prepare_regions, region_graph


def noise(h, w, seed=0):
    "Smooth coloured noise"
    x = ndi.gaussian_filter(np.random.default_rng(seed).normal(size=(h, w, 3)), (2, 2, 0))
    return np.uint8(255*(x - x.min())/np.ptp(x))


def setting(h=36, w=40, side=9, seed=0, cues='both'):
    image = noise(h, w, seed)
    contours = gradient_contours(image)
    ids = waterpixels(contours, side)
    return image, contours, ids, RegionPairs(image, contours, ids, cues)


def connected(mask): return ndi.label(mask)[1] == 1 # 4-neighbours
def nested(fine, coarse): return all(len(np.unique(coarse[fine == r])) == 1 for r in np.unique(fine))


@given(arrays(np.float32, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.floats(0, 1, width=16)), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_superpixels_are_connected_and_cover(contours, side):
    ids = waterpixels(contours, side)
    assert ids.shape == contours.shape and ids.min() == 0
    assert all(connected(ids == r) for r in range(ids.max() + 1))


def test_edges_are_those_of_the_region_graph():
    _, _, ids, pairs = setting()
    edges, length = region_graph(ids)
    np.testing.assert_array_equal(pairs.edges, edges)
    np.testing.assert_array_equal(pairs.length, length)


def plain(image, contours, ids, a, b):
    "Similarity of two regions by its definition, pixel by pixel"
    lab = np.stack(contour_channels(image)[:3])
    def histogram(x, c):
        low, width = ((0, 1), (-.6, 1.2), (-.6, 1.2))[c]
        h, k = np.zeros(BINS), np.clip(((x - low)*BINS/width).astype(int), 0, BINS - 1)
        for i in k:
            for j, v in ((i - 1, .25), (i, .5), (i + 1, .25)): h[min(max(j, 0), BINS - 1)] += v
        return h/h.sum()
    A, B = ids == a, ids == b
    root, content, total = np.sqrt(min(A.sum(), B.sum())), 0, 0
    for s in SCALES:
        m = lab if s == 0 else [ndi.gaussian_filter(c, s, truncate=2.) for c in lab]
        c = np.mean([np.sqrt(histogram(m[k][A], k)*histogram(m[k][B], k)).sum() for k in range(3)])
        content, total = content + np.exp(-4*s*s/root)*c, total + np.exp(-4*s*s/root)
    H, W = ids.shape
    strength, bands = [], ([], [])
    for y in range(H):
        for x in range(W):
            for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                v, u = y + dy, x + dx
                if not (0 <= v < H and 0 <= u < W and ids[y, x] == a and ids[v, u] == b): continue
                strength.append(max(contours[y, x], contours[v, u]))
                for band, (p, q), (d, e) in ((bands[0], (y, x), (-dy, -dx)), (bands[1], (v, u), (dy, dx))):
                    far = p + d, q + e
                    ok = 0 <= far[0] < H and 0 <= far[1] < W
                    band += [(p, q), far if ok else (p, q)]
    border, n = np.exp(-3*np.mean(strength)), len(strength)
    if n >= 4:
        at = [tuple(np.array(o).T) for o in bands]
        border = (border + np.mean([np.sqrt(histogram(lab[k][at[0]], k)*histogram(lab[k][at[1]], k)).sum() for k in range(3)]))/2
    share = .5*min(1, n/root)
    return (1 - share)*content/total + share*border


@pytest.mark.parametrize('seed', range(2))
def test_similarity_is_its_definition_and_symmetric(seed):
    image, contours, ids, pairs = setting(seed=seed)
    a, b = pairs.edges.T
    e = np.arange(len(a))
    got = pairs.similarity(a, b, e)
    np.testing.assert_allclose(got, [plain(image, contours, ids, i, j) for i, j in pairs.edges], atol=1e-6)
    np.testing.assert_array_equal(got, pairs.similarity(b, a, e))
    assert got.min() >= 0 and got.max() <= 1


@pytest.mark.parametrize('cues', ['both', 'content', 'border'])
def test_best_pair_of_all_first_and_tables_add_up(cues):
    image, contours, ids, pairs = setting(side=8, seed=3, cues=cues)
    assert pairs.n <= 30
    merges, now = merge_order(pairs), ids.astype(np.int64)
    for c, (a, b, score) in enumerate(merges, pairs.n):
        names, dense = np.unique(now, return_inverse=True) # tables of the merged map, made anew
        fresh = RegionPairs(image, contours, dense.reshape(now.shape), cues)
        all_scores = fresh.scores(*fresh.edges.T, np.arange(len(fresh.edges)))
        pair = next(k for k, e in enumerate(fresh.edges) if set(names[e]) == {a, b})
        assert score == pytest.approx(all_scores.max(), abs=1e-9) and all_scores[pair] == pytest.approx(score, abs=1e-9)
        now[(now == a) | (now == b)] = c


@pytest.mark.parametrize('order', ['global', 'scan'])
def test_cuts_are_nested_connected_partitions(order):
    tree = merge_regions(noise(48, 56), side=9, order=order)
    L = tree.n_pieces
    assert (np.diff(tree.altitudes) >= 0).all() and (tree.altitudes[:L] == 0).all() and tree.altitudes[-1] <= 1
    before = None
    for n in range(1, L + 1):
        cut = tree.regions(n=n)
        assert cut.max() + 1 == n and all(connected(cut == r) for r in range(n)) # regions = superpixels - merges
        assert nested(tree.pieces, cut) and (before is None or nested(cut, before))
        before = cut
    middle = float(np.median(tree.altitudes[L:]))
    assert tree.regions(threshold=middle).max() + 1 == 1 + (tree.altitudes > middle).sum()


@pytest.mark.parametrize('seed', range(3))
def test_two_noisy_tones(seed):
    truth = np.zeros((36, 36), int)
    truth[:, 17:] = 1
    image = np.clip(np.where(truth, 170, 80)[..., None] + np.random.default_rng(seed).normal(0, 15, (36, 36, 3)), 0, 255).astype(np.uint8)
    two = merge_regions(image, side=6).regions(n=2)
    assert max((two == truth).mean(), (two != truth).mean()) > .97


def test_equal_histograms_without_edge_are_one():
    image = np.full((30, 40, 3), 90, np.uint8)
    contours = gradient_contours(image)
    pairs = RegionPairs(image, contours, waterpixels(contours, 10))
    np.testing.assert_allclose(pairs.similarity(*pairs.edges.T, np.arange(len(pairs.edges))), 1)


def test_one_colour_merges_at_nothing():
    tree = merge_regions(np.full((40, 50, 3), 90, np.uint8))
    assert tree.altitudes.max() < 1e-9 and tree.regions(threshold=.01).max() == 0


def test_same_result_twice_and_one_superpixel():
    image = noise(40, 50)
    np.testing.assert_array_equal(merge_regions(image).parents, merge_regions(image).parents)
    tree = merge_regions(noise(9, 9), side=30)
    assert tree.n_pieces == 1 and tree.regions(n=5).max() == 0 and region_proposals(tree, (0, 1)).all()


@pytest.mark.parametrize('image', [noise(1, 30), noise(30, 1), noise(20, 20)[None], noise(20, 20)/255 - .5, [[1, 2]]], ids=['1xN', 'Nx1', 'batch', 'standardised', 'list'])
def test_images_that_are_refused(image):
    with pytest.raises(SpmlError, match='batch|black and white|at least 2x2'): merge_regions(image)


@pytest.mark.parametrize('kwargs, said', [(dict(order='random'), 'order'), (dict(cues='colour'), 'cues'), (dict(side=0), 'side')])
def test_settings_that_are_refused(kwargs, said):
    with pytest.raises(SpmlError, match=said): merge_regions(noise(20, 20), **kwargs)


class Images:
    names = ['one', 'two']
    def __len__(self): return 2
    def image(self, i): return noise(40, 60, i)


def test_takes_the_place_of_contours(tmp_path):
    cache = prepare_regions(Images(), tmp_path/'regions', n=6, contours=merge_regions, progress=False)
    np.testing.assert_array_equal(cache.read('one'), oversegment(noise(40, 60), n=6, contours=merge_regions))
    assert cache.settings['contours'] == 'spml_kit.regions.merging.merge_regions'
    np.testing.assert_array_equal(as_regions(merge_regions(noise(40, 60)), n=6), cache.read('one'))
    assert merge_regions(noise(40, 60)).ucm.shape == (79, 119)


def test_proposals_are_connected_and_nested():
    tree = merge_regions(noise(48, 56), side=9)
    masks = region_proposals(tree, (0, 1), most=10**6)
    assert len(masks) == len(tree.parents) == len(np.unique(masks.reshape(len(masks), -1), axis=0))
    assert all(connected(m) for m in masks)
    flat = masks.reshape(len(masks), -1).astype(int)
    both, area = flat@flat.T, flat.sum(1)
    assert ((both == 0) | (both == np.minimum.outer(area, area))).all() # apart, or one within the other
    few = region_proposals(tree, (.02, .5), most=5)
    assert len(few) == 5 and few.mean((1, 2)).min() >= .02 and few.mean((1, 2)).max() <= .5
    for area in ((.5, .1), (-1, .5)):
        with pytest.raises(SpmlError, match='smallest'): region_proposals(tree, area)


@given(arrays(np.uint8, (5, 6), elements=st.sampled_from([0, 1, 2, 254, 255])), arrays(np.int32, (5, 6), elements=st.integers(0, 4)), st.sampled_from([0., .6, 1.]))
@settings(max_examples=80, deadline=None)
def test_labels_are_snapped_by_definition(labels, regions, least):
    wanted = labels.copy()
    for r in np.unique(regions):
        known = labels[(regions == r) & (labels < 254)]
        if not len(known): continue
        votes = np.bincount(known)
        if votes.max() >= least*len(known): wanted[(regions == r) & (labels != 255)] = votes.argmax()
    got = snap_labels(labels, regions, least)
    np.testing.assert_array_equal(got, wanted)
    assert got.dtype == labels.dtype


def test_labels_without_any_stay():
    np.testing.assert_array_equal(snap_labels(np.full((3, 4), 254, np.uint8), np.zeros((3, 4), int)), np.full((3, 4), 254))
    with pytest.raises(SpmlError, match='must agree'): snap_labels(np.zeros((3, 4), int), np.zeros((4, 3), int))
    with pytest.raises(SpmlError, match='least'): snap_labels(np.zeros((3, 4), int), np.zeros((3, 4), int), 2)

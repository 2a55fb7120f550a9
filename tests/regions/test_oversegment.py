"""Hierarchies, the region graph and the cache of regions."""
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage as ndi

from spml_kit.regions.contours import gradient_contours
from spml_kit.core import SpmlError
from spml_kit.regions.oversegment import (REGION_WAYS, RegionCache, hierarchy_of, named_contours, oversegment, prepare_regions,
                                           region_graph)

maps = arrays(np.float32, st.tuples(st.integers(2, 14), st.integers(2, 14)), elements=st.floats(0, 1, width=16))


def noise(h, w, seed=0):
    "Smooth coloured noise: an image with many contours"
    x = ndi.gaussian_filter(np.random.default_rng(seed).normal(size=(h, w, 3)), (2, 2, 0))
    return np.uint8(255*(x - x.min())/np.ptp(x))


def nested(fine, coarse): return all(len(np.unique(coarse[fine == r])) == 1 for r in np.unique(fine))


class Images:
    "Smallest image set; some of its images may fail"
    def __init__(self, n=5, broken=()): self.names, self.broken, self.asked = [f'im{i}' for i in range(n)], broken, []
    def __len__(self): return len(self.names)
    def image(self, i):
        self.asked.append(self.names[i])
        if i in self.broken: raise SpmlError(f'{self.names[i]}.jpg: not a readable image')
        return noise(40, 60, i)


# ways

@pytest.mark.parametrize("way", [w for w in REGION_WAYS if w != "hed"]) # whose weights are not at hand everywhere
@given(n=st.integers(1, 30), seed=st.integers(0, 5))
@settings(max_examples=6, deadline=None)
def test_every_way_gives_at_most_so_many_regions(way, n, seed):
    regions = oversegment(noise(24, 30, seed), n=n, contours=named_contours(way))
    assert regions.shape == (24, 30) and len(np.unique(regions)) == regions.max() + 1 <= n


def test_an_unknown_way_is_refused():
    with pytest.raises(SpmlError, match="'merge' is not one of .*did you mean 'merging'"): named_contours("merge")


# hierarchies

@given(maps, st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_cuts_are_contiguous_nested_and_never_too_many(contours, n, m):
    tree = hierarchy_of(contours)
    fine, coarse = tree.regions(n=max(n, m)), tree.regions(n=min(n, m))
    for r, k in ((fine, max(n, m)), (coarse, min(n, m))):
        assert r.shape == contours.shape and r.dtype == np.int32
        assert np.array_equal(np.unique(r), np.arange(min(k, tree.n_pieces)))
    assert nested(fine, coarse)


@given(maps)
@settings(max_examples=60, deadline=None)
def test_hierarchy_is_a_monotone_tree(contours):
    tree = hierarchy_of(contours)
    L, N = tree.n_pieces, len(tree.parents)
    assert N == 2*L - 1 and tree.parents[-1] == N - 1 and (tree.parents[:-1] > np.arange(N - 1)).all()
    assert (np.diff(tree.altitudes) >= 0).all() and (tree.altitudes[:L] == 0).all() and tree.altitudes[-1] <= 1
    assert (np.bincount(tree.parents[:-1], minlength=N)[L:] == 2).all()


@pytest.mark.parametrize('n', [1, 2, 17, 100])
def test_regions_are_connected(n):
    r = oversegment(noise(40, 60), n=n)
    assert all(ndi.label(r == k)[1] == 1 for k in range(r.max() + 1))


@pytest.mark.parametrize('threshold', [0., .05, .1, .3, 1.])
@pytest.mark.parametrize('size', [0, .25, 1])
def test_threshold_cut_is_the_ucm(threshold, size):
    tree = hierarchy_of(gradient_contours(noise(40, 60)), size)
    r = tree.regions(threshold=threshold)
    assert np.array_equal(tree.ucm[::2, 1::2] > threshold, r[:, 1:] != r[:, :-1])
    assert np.array_equal(tree.ucm[1::2, ::2] > threshold, r[1:] != r[:-1])
    assert (tree.ucm[::2, ::2] == 0).all()


def test_two_halves():
    c = np.zeros((10, 10)); c[:, 5] = .8
    r = hierarchy_of(c).regions(n=2)
    assert len(np.unique(r[:, :5])) == 1 and len(np.unique(r[:, 6:])) == 1 and r[0, 0] != r[0, 9]


def test_size_keeps_the_large_region():
    c = np.zeros((40, 40)); c[:, 20] = .5 # two halves
    c[3:8, 3:8] = .9; c[4:7, 4:7] = 0     # a tiny strong ring
    plain, sized = (hierarchy_of(c, s).regions(n=2) for s in (0, .25))
    assert plain[5, 5] != plain[30, 5] and plain[30, 5] == plain[30, 35]
    assert sized[5, 5] == sized[30, 5] and sized[30, 5] != sized[30, 35]


def test_one_piece():
    tree = hierarchy_of(np.zeros((16, 16)))
    assert tree.n_pieces == 1 and tree.ucm.shape == (31, 31) and tree.ucm.max() == 0
    assert tree.regions(n=9).max() == tree.regions(threshold=0).max() == 0


@pytest.mark.parametrize('how, says', [({}, 'one of the two'), (dict(n=3, threshold=.1), 'one of the two'), (dict(n=0), 'at least one')])
def test_cut_refuses(how, says):
    with pytest.raises(SpmlError, match=says): hierarchy_of(np.zeros((4, 4))).regions(**how)


@pytest.mark.parametrize('bad', [np.zeros(5), np.zeros((1, 5)), np.full((4, 4), np.nan)])
def test_hierarchy_refuses(bad):
    with pytest.raises(SpmlError, match='finite'): hierarchy_of(bad)


# region graph

@given(arrays(np.int32, st.tuples(st.integers(1, 8), st.integers(1, 8)), elements=st.integers(0, 4)))
@settings(max_examples=60, deadline=None)
def test_region_graph_counts_every_side(r):
    edges, length = region_graph(r)
    slow = {}
    for y, x in np.ndindex(*r.shape):
        for v, u in ((y, x + 1), (y + 1, x)):
            if v < r.shape[0] and u < r.shape[1] and r[y, x] != r[v, u]:
                key = tuple(sorted((int(r[y, x]), int(r[v, u]))))
                slow[key] = slow.get(key, 0) + 1
    assert {tuple(e): n for e, n in zip(edges.tolist(), length.tolist())} == slow


# cache

def test_cache_holds_more_than_256_regions(tmp_path):
    cache = RegionCache(tmp_path, {})
    r = np.arange(30*40, dtype=np.int32).reshape(30, 40)
    cache.write('a', r)
    back = cache.read('a', (30, 40))
    assert back.dtype == np.int32 and np.array_equal(back, r)


def test_workers_equal_serial(tmp_path):
    serial = prepare_regions(Images(), tmp_path/'a', n=30, progress=False)
    parallel = prepare_regions(Images(), tmp_path/'b', n=30, workers=2, progress=False)
    for name in Images().names: assert np.array_equal(serial.read(name), parallel.read(name)) and serial.read(name).max() == 29
    assert serial.settings == parallel.settings


def test_resume_makes_only_what_is_missing_or_broken(tmp_path):
    images = Images()
    cache = prepare_regions(images, tmp_path/'r', n=30, progress=False)
    whole = {n: cache.path(n).read_bytes() for n in images.names}
    cache.path('im1').write_bytes(whole['im1'][:len(whole['im1'])*3//4])
    cache.path('im2').write_bytes(b'')
    cache.path('im3').unlink()
    images.asked.clear()
    prepare_regions(images, tmp_path/'r', n=30, progress=False)
    assert images.asked == ['im1', 'im2', 'im3']
    assert {n: cache.path(n).read_bytes() for n in images.names} == whole
    assert not [p for p in (tmp_path/'r').iterdir() if p.name.startswith('.')] # no temporary file left


@pytest.mark.parametrize('workers', [0, 2])
def test_failing_images_are_named_and_the_rest_done(tmp_path, workers):
    with pytest.raises(SpmlError, match=r'2 of 5 images, the others are done: im1: im1.jpg: not a readable image; im4: '):
        prepare_regions(Images(broken=(1, 4)), tmp_path/'r', n=30, workers=workers, progress=False)
    cache = RegionCache(tmp_path/'r')
    assert [n in cache for n in Images().names] == [True, False, True, True, False]
    prepare_regions(Images(), tmp_path/'r', n=30, progress=False)
    assert all(n in cache for n in Images().names)


@pytest.mark.parametrize('other', [dict(n=31), dict(threshold=.1), dict(n=30, contours=lambda image: image.mean(2)/255)])
def test_mixed_settings_are_refused(tmp_path, other):
    prepare_regions(Images(2), tmp_path, n=30, progress=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(SpmlError, match="holds results of other settings .*was .*choose another folder"): prepare_regions(Images(2), tmp_path, progress=False, **other)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_broken_settings_file_is_named(tmp_path):
    prepare_regions(Images(1), tmp_path, n=30, progress=False)
    (tmp_path/'settings.json').write_text('{"n": 3')
    with pytest.raises(SpmlError, match='settings.json: not JSON'): prepare_regions(Images(1), tmp_path, n=30, progress=False)


def test_reading_refuses(tmp_path):
    with pytest.raises(SpmlError, match='prepare_regions'): RegionCache(tmp_path/'none')
    cache = prepare_regions(Images(1), tmp_path/'r', n=30, progress=False)
    with pytest.raises(SpmlError, match='im9.png: no such file'): cache.read('im9')
    with pytest.raises(SpmlError, match=r'im0.png: regions are 40x60, the image 41x60'): cache.read('im0', (41, 60))
    assert json.loads((tmp_path/'r'/'settings.json').read_text())['n'] == 30


@pytest.mark.parametrize('how', [{}, dict(n=3, threshold=.1)])
def test_prepare_needs_one_criterion(tmp_path, how):
    with pytest.raises(SpmlError, match='one of the two'): prepare_regions(Images(1), tmp_path/'r', progress=False, **how)
    assert not (tmp_path/'r').exists()


def test_photographs(voc_animals, tmp_path):
    from spml_kit.data.images import VocSet
    images = VocSet(voc_animals, 'val')
    images.names = images.names[:3]
    cache = prepare_regions(images, tmp_path/'r', n=300, progress=False)
    for i in range(3):
        r = cache.read(images.names[i], images.image(i).shape[:2])
        assert 256 < r.max() + 1 <= 300
        m, r = images.mask(i).ravel(), r.ravel()
        table = np.zeros((300, 256), int); np.add.at(table, (r[m < 255], m[m < 255]), 1)
        assert table.max(1).sum() > .95*table.sum() # most pixels lie in a region of their own class

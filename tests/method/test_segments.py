"""Over-segmentation against plain loops: masks, void pixels, resizing, order of the ids, degenerate batches."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from conftest import random_batch
from spml_kit.core import SpmlError, UNLABELLED, VOID
from spml_kit.method.nets import location_colours, unit
from spml_kit.method.memory import MemoryBank
from spml_kit.method.segments import _count_all, _move, cluster_means, cut_segments, grid_labels, make_segments, resize_labels, spherical_kmeans


def plain_means(x, labels, k):
    "Mean direction of each cluster, row by row"
    sums = np.zeros((k, x.shape[1]))
    for row, label in zip(x, labels): sums[label] += row
    return np.array([s/max(np.sqrt((s*s).sum()), 1e-12) for s in sums]).reshape(sums.shape)


def plain_kmeans(x, labels, k, iterations):
    "Spherical k-means of one image; the first of equal clusters wins"
    for _ in range(iterations):
        mu = plain_means(x, labels, k)
        labels = np.array([max(range(k), key=lambda c: ((row*mu[c]).sum(), -c)) for row in x], int)
    return labels


def plain_segments(emb, labels, regions, grid, iterations):
    "The whole over-segmentation of a batch, image by image and pixel by pixel: (own, label, region, image)"
    keys = []
    for b in range(len(emb)):
        D, h, w = emb[b].shape
        v = emb[b].reshape(D, -1).T.numpy()
        v = v/np.maximum(np.sqrt((v*v).sum(1, keepdims=True)), 1e-12)
        loc = np.array([(y/max(h - 1, 1) - .5, x/max(w - 1, 1) - .5) for y in range(h) for x in range(w)])
        u = np.concatenate([v, loc], 1)
        u = u/np.sqrt((u*u).sum(1, keepdims=True))
        start = grid_labels(h, w, grid).numpy()
        small = [[int(o[b][y*o.shape[1]//h, x*o.shape[2]//w]) for y in range(h) for x in range(w)] for o in (labels, regions)]
        valid = [p for p in range(h*w) if small[0][p] != VOID]
        cluster = plain_kmeans(u[valid], start[valid], start.max() + 1, iterations)
        keys += [(b, int(c), small[0][p], small[1][p]) for c, p in zip(cluster, valid)]
    order = sorted(set(keys))
    return [order.index(key) for key in keys], [o[2] for o in order], [o[3] for o in order], [o[0] for o in order]


def features(seed, n_images, pixels, dim, coarse=False):
    "Unit vectors, or few exact values with many ties"
    g = torch.Generator().manual_seed(seed)
    if coarse: return torch.randint(-1, 2, (n_images, pixels, dim), generator=g, dtype=torch.float64)
    return unit(torch.randn(n_images, pixels, dim, generator=g, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 40), st.integers(1, 6), st.integers(0, 4), st.floats(0, 1), st.booleans())
def test_p15_batched_kmeans_is_the_loop(seed, n_images, pixels, k, iterations, share, each_its_own):
    u, g = features(seed, n_images, pixels, 4), torch.Generator().manual_seed(seed + 1)
    valid = torch.rand(n_images, pixels, generator=g) < share
    start = torch.randint(k, (n_images, pixels) if each_its_own else (pixels,), generator=g)
    found = spherical_kmeans(u, start, k, iterations, valid)
    for b in range(n_images):
        keep = valid[b].numpy()
        want = plain_kmeans(u[b].numpy()[keep], start.expand(n_images, pixels)[b].numpy()[keep], k, iterations)
        assert found[b].numpy()[keep].tolist() == want.tolist()


@pytest.mark.parametrize("elements", [1, 300, 700, 10**6])
def test_chunks_of_images(elements):
    u, start = features(0, 7, 50, 4), torch.arange(50) % 6
    valid = features(1, 7, 50, 1)[..., 0] > 0
    assert torch.equal(*(spherical_kmeans(u, start, 6, 5, valid, n)[valid] for n in (elements, None)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 40), st.integers(1, 6), st.integers(0, 4), st.floats(0, 1), st.integers(1, 50))
def test_the_form_of_a_gpu_is_that_of_a_cpu(seed, n, pixels, k, iterations, share, at_once):
    "Who moves, and everybody counted anew: the same clusters"
    u, g = features(seed, n, pixels, 4), torch.Generator().manual_seed(seed + 1)
    counted, start = torch.rand(n*pixels, generator=g) < share, torch.randint(k, (n*pixels,), generator=g)
    found = []
    for form in (_move, _count_all):
        own = start.clone()
        form(u.flatten(0, 1), own, counted, n, k, iterations, u.new_empty(n*k*min(at_once, pixels)), min(at_once, pixels))
        found.append(own[counted])
    assert torch.equal(*found)


def test_ties():
    "One E step on small integers, where no order of summation rounds; clusters 1 and 3 start equal to 0 and 2: a pixel keeps its own, else takes the first"
    u = features(0, 1, 30, 2, coarse=True)
    u = torch.cat([u, u], 1)
    start = torch.cat([torch.arange(30) % 2 * 2]*2)
    start[30:] += 1
    found = spherical_kmeans(u, start, 4, 1)[0]
    near = (u[0] @ cluster_means(u[0], start, 4).T)
    best = near == near.amax(1, keepdim=True)
    stays = best[torch.arange(60), start]
    assert (best.sum(1) >= 2).all() and stays.any() and not stays.all()
    assert torch.equal(found, torch.where(stays, start, best.int().argmax(1)))


def test_start_and_inputs_are_left_alone():
    u, start = features(0, 3, 20, 4), torch.arange(20) % 3
    before = u.clone(), start.clone()
    assert torch.equal(spherical_kmeans(u, start, 3, 0), start.expand(3, 20))
    spherical_kmeans(u, start, 3, 5, torch.rand(3, 20) > .5)
    assert torch.equal(u, before[0]) and torch.equal(start, before[1])


def test_no_gradient_through_assignments():
    u = features(0, 2, 20, 4).requires_grad_()
    assert not spherical_kmeans(u, torch.arange(20) % 3, 3, 2).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means(dtype):
    x, own = features(0, 1, 200, 5)[0].to(dtype), torch.arange(200)*7 % 11
    own[own == 4] = 3 # nobody in 4
    found = cluster_means(x, own, 12)
    np.testing.assert_allclose(found, plain_means(x.double().numpy(), own.numpy(), 12), atol=1e-6 if dtype == torch.float32 else 1e-12)
    assert found.dtype == dtype and not found[4].any() and not found[11].any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [dict(), dict(n_images=1, size=(1, 1)), dict(n_images=2, size=(1, 7)), dict(size=(5, 13), regions=60), dict(void=.7), dict(annotated=1., void=0., n_classes=1)],
                         ids=lambda d: ",".join(f"{k}={v}" for k, v in d.items()) or "usual")
@pytest.mark.parametrize("label_size", [1, 2, 2.6])
def test_segments_against_loops(shape, seed, label_size):
    emb, labels, regions, tags = random_batch(seed, **shape)
    H, W = (int(label_size*n) for n in emb.shape[-2:])
    labels, regions = (o.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :H, :W] for o in (labels, regions))
    grid, iterations = ((2, 3), (4, 4), (1, 1))[seed], (3, 10, 1)[seed]
    seg = make_segments(emb, labels, regions, tags, grid, iterations)
    own, label, region, image = plain_segments(emb, labels, regions, grid, iterations)
    assert seg.own.tolist() == own
    assert [seg.protos.label.tolist(), seg.protos.region.tolist(), seg.protos.image.tolist()] == [label, region, image]
    assert torch.equal(seg.protos.tags, tags)
    np.testing.assert_allclose(seg.protos.mu, plain_means(seg.v.numpy(), own, len(label)), atol=1e-12)
    np.testing.assert_allclose(seg.protos.mu_loc, plain_means(seg.u.numpy(), own, len(label)), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integer_types_of_the_maps(dtype):
    emb, labels, regions, tags = random_batch()
    one, other = (make_segments(emb, labels.to(t), regions.to(t), tags, (2, 2), 3) for t in (torch.int64, dtype))
    assert torch.equal(one.own, other.own) and torch.equal(one.protos.label, other.protos.label) and torch.equal(one.protos.region, other.protos.region)


def test_many_regions():
    "Region ids of 16-bit files and a large batch: the joint key must not overflow"
    n = torch.arange(4)
    own, label, region, image = cut_segments(n*0 + 143, n % 2 + 253, n*0 + 65_535 - n // 2, n*0 + 63)
    assert own.tolist() == [1, 3, 0, 2] and label.tolist() == [253, 253, 254, 254] and region.tolist() == [65_534, 65_535]*2 and image.tolist() == [63]*4


def test_pictures():
    emb, labels, regions, tags = random_batch()
    seg = make_segments(emb, labels, regions, tags, (2, 2), 3)
    assert torch.equal(seg.map() == -1, labels == VOID)
    assert torch.equal(seg.map(seg.protos.label[seg.own], VOID), labels) # segments are pure, so their labels give the map back
    assert torch.equal(seg.map(seg.protos.region[seg.own], 0), regions.masked_fill(labels == VOID, 0))
    assert torch.equal(seg.map().flatten()[seg.pixel], seg.own)


def test_one_label():
    "Nothing annotated, one region: k-means alone decides"
    emb, labels, regions, tags = random_batch(void=0.)
    seg = make_segments(emb, torch.full_like(labels, UNLABELLED), regions*0, tags, (2, 2), 5)
    h, w = emb.shape[-2:]
    v, u = (o.view(len(emb), h*w, -1) for o in (seg.v, seg.u))
    cluster = spherical_kmeans(u, grid_labels(h, w, (2, 2)), 4, 5)
    assert torch.equal(seg.own, (cluster + 4*torch.arange(len(emb))[:, None]).flatten().unique(return_inverse=True)[1])
    assert set(seg.protos.label.tolist()) == {UNLABELLED} and set(seg.protos.region.tolist()) == {0}
    single = make_segments(emb, labels*0, regions*0, tags, (1, 1), 5)
    assert len(single.protos) == len(emb) and torch.allclose(single.protos.mu, unit(v.sum(1)))


def test_all_void():
    emb, labels, regions, tags = random_batch()
    seg = make_segments(emb.requires_grad_(), torch.full_like(labels, VOID), regions, tags)
    assert len(seg.protos) == len(seg.own) == 0 and seg.v.shape == (0, 5) and seg.protos.mu_loc.shape == (0, 7)
    assert (seg.map() == -1).all() and seg.map().shape == labels.shape
    bank = MemoryBank(2) # and it can be remembered and followed by an ordinary batch
    bank.push(seg.protos)
    usual = make_segments(*random_batch(1), (2, 2), 3).protos
    assert torch.equal(bank.candidates(usual).mu, usual.mu)


def test_void_image_among_others():
    emb, labels, regions, tags = random_batch()
    labels[1] = VOID
    seg = make_segments(emb, labels, regions, tags, (2, 2), 3)
    rest = torch.tensor([0, 2])
    without = make_segments(emb[rest], labels[rest], regions[rest], tags[rest], (2, 2), 3)
    assert torch.equal(seg.own, without.own) and torch.equal(seg.protos.mu, without.protos.mu) and torch.equal(seg.protos.image, rest[without.protos.image])


def test_zero_embedding():
    emb, labels, regions, tags = random_batch()
    emb[0, :, 2:5] = 0
    emb.requires_grad_()
    seg = make_segments(emb, labels, regions, tags, (2, 2), 3)
    (seg.protos.mu.sum() + seg.protos.mu_loc.sum()).backward()
    assert all(o.isfinite().all() for o in (seg.v, seg.u, seg.protos.mu, emb.grad))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_resize(H, W, h, w):
    labels = torch.arange(2*H*W).view(2, H, W)
    want = [[[int(labels[b, i*H//h, j*W//w]) for j in range(w)] for i in range(h)] for b in range(2)]
    assert resize_labels(labels, (h, w)).tolist() == want


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_grid_is_bands(h, w, ky, kx):
    bands = lambda n, k: np.round(torch.linspace(0, k - 1, n).numpy()).astype(int) # halves to even; float32 decides what is a half
    y, x = (np.unique(bands(*o), return_inverse=True)[1] for o in ((h, ky), (w, kx)))
    found = grid_labels(h, w, (ky, kx)).view(h, w).numpy()
    assert (found == y[:, None] + (y.max() + 1)*x).all()
    assert sorted(set(found.ravel().tolist())) == [*range(found.max() + 1)] and found.max() < ky*kx


def test_faults():
    for grid in ((0, 3), (3, -1)):
        with pytest.raises(SpmlError, match="needs at least one band"): grid_labels(8, 8, grid)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kmeans_under_autocast_is_that_of_float32(dtype):
    g = torch.Generator().manual_seed(0)
    u = torch.nn.functional.normalize(torch.randn(2, 64, 5, generator=g), dim=2)
    start = torch.arange(64) % 4
    with torch.autocast("cpu", dtype): found = spherical_kmeans(u, start, 4)
    assert torch.equal(found, spherical_kmeans(u, start, 4))


def test_colours_and_a_smaller_share_of_the_embedding():
    "By the definition, after the clusters are found with the whole embedding"
    g = torch.Generator().manual_seed(0)
    emb, images = torch.randn(2, 4, 6, 6, generator=g), torch.rand(2, 3, 12, 12, generator=g)
    labels, regions, tags = torch.zeros(2, 6, 6, dtype=torch.long), torch.zeros(2, 6, 6, dtype=torch.long), torch.ones(2, 2).bool()
    local = location_colours(images, 6, 6)
    whole, seg = (make_segments(emb, labels, regions, tags, (2, 2), 3, local, share) for share in (1., .1))
    assert torch.equal(whole.own, seg.own) and seg.u.shape == (72, 9) and torch.equal(whole.v, seg.v)
    want = torch.nn.functional.normalize(torch.cat([.1*seg.v, local.flatten(0, 1)], 1), dim=1)
    torch.testing.assert_close(seg.u, want)
    torch.testing.assert_close(seg.protos.mu_loc, cluster_means(want, seg.own, len(seg.protos)))
    assert not torch.equal(make_segments(emb, labels, regions, tags, (2, 2), 3).own, whole.own) # colours move borders

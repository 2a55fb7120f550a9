"SBA: pooling against its plain form, what changes a vector and what does not, channels, whitening, ranking, the next image, faults."
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from spml_kit.cams.classifier import TagNet
from spml_kit.core import SpmlError
from spml_kit.data.scenes import make_scene
from spml_kit.data.tag_index import TagIndex
from spml_kit.method.nets import unit
from spml_kit.neighbours.sba import (POOLINGS, Descriptor, Whitening, deep_map, expand_queries, farthest_first, part_vectors, retrieval_precision, select_channels, similar_partners, soft_masks,
                                     sum_vectors)


def features(seed=0, b=3, d=6, h=4, w=5, dtype=torch.float64):
    "Non-negative maps, half of them zero"
    return torch.randn(b, d, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype).relu()


def plain(X, channels, alpha, beta):
    out = []
    for n in channels:
        size = (X[n]**alpha).sum()**(1/alpha)
        out.append(sum(((X[n, y, x]/size)**(1/beta) if size > 0 else 0.)*X[:, y, x] for y in range(X.shape[1]) for x in range(X.shape[2])))
    v = torch.cat(out)
    return v/v.norm()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha, beta", [(2., 2.), (1., 1.), (3., 1.5), (2., 8.)])
def test_the_plain_form(seed, alpha, beta):
    X, channels = features(seed), torch.tensor([4, 0, 2])
    X[0, 4] = 0
    for X_i, v in zip(X, part_vectors(X, channels, alpha, beta)): torch.testing.assert_close(v, plain(X_i, channels.tolist(), alpha, beta))


@pytest.mark.parametrize("dtype, factors", [(torch.float64, (1e-30, .1, 7., 1e30)), (torch.float32, (1e-15, .1, 7., 1e15))])
def test_scale_and_place_do_not_matter_and_the_size_is_right(dtype, factors):
    X, channels = features(dtype=dtype), torch.tensor([1, 3])
    v = part_vectors(X, channels)
    assert v.shape == (3, 2*6) and torch.allclose(v.norm(dim=1), torch.ones(3, dtype=dtype))
    for a in factors: torch.testing.assert_close(part_vectors(a*X, channels), v, rtol=1e-4, atol=1e-6)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(part_vectors(X.flatten(2)[..., order].unflatten(2, (4, 5)), channels), v, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_silent_channel_is_a_zero_block(dtype):
    X = features(dtype=torch.float64).to(dtype)
    X[:, 2] = 0
    v = part_vectors(X, torch.tensor([1, 2, 3])).unflatten(1, (3, 6))
    assert v[:, 1].eq(0).all() and v[:, 0].ne(0).any() and v.isfinite().all()
    nothing = part_vectors(torch.zeros_like(X), torch.tensor([0, 1]))
    assert nothing.eq(0).all()
    for pool in POOLINGS.values(): assert pool(X).isfinite().all() and pool(torch.zeros_like(X)).isfinite().all()


def test_masks_are_largest_where_the_channel_is_and_flatten_to_sum_pooling():
    X = features() + .01
    w = soft_masks(X, torch.tensor([1]))[:, 0]
    assert (w >= 0).all() and (w <= 1).all()
    assert torch.equal(w.flatten(1).argsort(1), X[:, 1].flatten(1).argsort(1))
    torch.testing.assert_close(part_vectors(X, torch.tensor([1]), beta=1e9), sum_vectors(X))
    spread = [soft_masks(X, torch.tensor([1]), beta=b)[:, 0] for b in (1., 2., 8.)]
    shares = [(m/m.amax((1, 2), keepdim=True)).mean() for m in spread]
    assert shares[0] < shares[1] < shares[2]


# channels

def test_a_channel_that_goes_on_and_off_comes_first_and_a_constant_one_never():
    maps = [.1*torch.rand(8, 3, 3, generator=torch.Generator().manual_seed(k)) for k in range(7)]
    for k, m in enumerate(maps): m[5], m[2], m[0] = float(k % 2), 1e6, 0
    assert select_channels(maps, 1).tolist() == [5]
    assert {2, 0} & set(select_channels(maps, 6).tolist()) == set()
    assert len(select_channels(maps, 8)) == 7 and 0 not in select_channels(maps, 8) # it never answers
    assert select_channels(maps, 1, by="lowest").tolist() == [2] and 0 not in select_channels(maps, 7, by="random")
    loud = [m.clone() for m in maps]
    for m in loud: m[6] *= 1e3 # scale, no meaning
    assert select_channels(loud, 1).tolist() == [6] and select_channels(loud, 1, by="relative").tolist() == [5]
    assert select_channels(maps, 3, by="random", seed=1).tolist() == select_channels(maps, 3, by="random", seed=1).tolist() != select_channels(maps, 3, by="random", seed=2).tolist()


def test_maps_of_different_sizes():
    maps = [features(k, 1, 6, 4 + k, 7 - k)[0] for k in range(4)]
    describe = Descriptor(maps, n=3, dim=10)
    out = describe(maps)
    assert out.shape[0] == 4 and out.shape[1] <= 3 and torch.allclose(out.norm(dim=1), torch.ones(4))


# whitening

@pytest.mark.parametrize("m, k, dim, kept", [(50, 8, 4, 4), (50, 8, 20, 8), (5, 30, 20, 4), (2, 3, 3, 1)])
def test_whitened_vectors_have_unit_covariance_and_no_more_components_than_images_less_one(m, k, dim, kept):
    v = unit(torch.randn(m, k, generator=torch.Generator().manual_seed(0), dtype=torch.double)*torch.linspace(3, 1, k) + 1)
    w = Whitening(v, dim)
    assert w.axes.shape == (kept, k)
    raw = (v - w.mean) @ w.axes.T
    torch.testing.assert_close(raw.T @ raw/(m - 1), torch.eye(kept, dtype=torch.double), rtol=1e-2, atol=1e-2)
    assert torch.allclose(w(v).norm(dim=1), torch.ones(m))
    top = torch.linalg.eigvalsh((v - v.mean(0)).T @ (v - v.mean(0))/(m - 1)).flip(0)[:kept]
    torch.testing.assert_close(w.axes.norm(dim=1)**-2, top + 1e-6)


def test_directions_without_difference_are_left_out():
    v = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    assert Whitening(torch.cat([v, v, torch.ones(20, 3)], 1), 6).axes.shape == (2, 7)


# ranking

def test_precision_by_hand_and_without_oneself():
    v = unit(torch.tensor([[1., 0], [.9, .2], [.5, .5], [0, 1]]))
    relevant = np.array([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
    # the first finds its answer second of three, the second third of three; the others have no answer but themselves
    assert retrieval_precision(v, v, relevant, range(4)) == pytest.approx(100*(1/2 + 1/3)/2)
    assert retrieval_precision(v, v, relevant) != retrieval_precision(v, v, relevant, range(4))


def test_expansion_moves_a_query_towards_its_answers():
    g = torch.Generator().manual_seed(0)
    centres = unit(torch.randn(3, 8, generator=g))
    v = unit(centres.repeat(20, 1) + .5*torch.randn(60, 8, generator=g)/8**.5)
    answers = np.arange(60)[:, None] % 3 == np.arange(60) % 3
    noisy = unit(v + .8*torch.randn(60, 8, generator=g)/8**.5)
    before, after = (retrieval_precision(q, v, answers, range(60)) for q in (noisy, expand_queries(noisy, v, 5, range(60))))
    assert after > before
    assert torch.equal(expand_queries(v, v, 0), unit(v)) and expand_queries(v[:1], v[:2], 9, [0]).shape == (1, 8)


def test_partners_share_a_tag_and_the_most_similar_come_first():
    v = unit(torch.tensor([[1., 0], [0, 1], [.9, .1], [1, .01], [.5, .5]]))
    index = TagIndex([[0, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0]])
    assert similar_partners(v, index, 0, 2).tolist() == [2, 1] # the third has no tag in common
    assert similar_partners(v, index, 0, 3).tolist() == [2, 1, 2] and similar_partners(v, index, 4, 2).tolist() == [4, 4]
    assert similar_partners(v, index, 2, 1).tolist() == [3]


def test_from_pictures_to_answers():
    net = TagNet(13, backbone="test_resnet", pretrained=False)
    maps = [deep_map(net, make_scene(i, size=64).image) for i in range(8)]
    assert all((m >= 0).all() and m.ndim == 3 and not m.requires_grad for m in maps)
    for pool in (None, *POOLINGS.values()):
        v = Descriptor(maps[:5], pool, n=3, dim=4)(maps[5:])
        assert v.shape == (3, 4) and v.isfinite().all()


# the next image

@st.composite
def images_and_drawn(draw):
    "Vectors on a coarse grid, so that many are alike and as far away, and some of their numbers"
    n = draw(st.integers(1, 9))
    v = torch.tensor(draw(st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=n, max_size=n)), dtype=torch.float32)
    return v, draw(st.lists(st.integers(0, n - 1), max_size=n - 1, unique=True).filter(lambda o: len(o) < n))


@settings(max_examples=60, deadline=None)
@given(images_and_drawn())
def test_the_next_image_is_the_farthest_from_all_before_it(made):
    v, drawn = made
    order, before = farthest_first(v, drawn).tolist(), [*drawn]
    assert sorted(order + drawn) == [*range(len(v))]
    for i in order:
        far = [-1 if j in before else min((float(((v[j] - v[k])**2).sum()) for k in before), default=np.inf) for j in range(len(v))]
        assert i == far.index(max(far))
        before.append(i)
    for k in range(1, len(order)):
        assert farthest_first(v, drawn, k).tolist() == order[:k] and farthest_first(v, drawn[::-1] + order[:k]).tolist() == order[k:]


@settings(max_examples=40, deadline=None)
@given(images_and_drawn(), st.integers(1, 3))
def test_nobody_is_left_farther_than_twice_the_best_choice(made, k):
    v, drawn = made
    k = min(k, len(v) - len(drawn))
    reach = lambda some: torch.cdist(v.double(), v.double()[[*drawn, *some]]).amin(1).max().item()
    best = min(reach(some) for some in combinations(range(len(v)), k))
    assert reach(farthest_first(v, drawn, k).tolist()) <= 2*best + 1e-9


@pytest.mark.parametrize("call, words", [
    (lambda: farthest_first(torch.eye(3), [0, 5, -1]), "annotated=[-1, 5]: there are 3 images"), (lambda: farthest_first(torch.eye(3), [0, 1, 2]), "all 3 images are annotated"),
    (lambda: farthest_first(torch.eye(3), [0], 3), "n=3: 2 of 3 images are left; choose 1 to 2"), (lambda: farthest_first(torch.eye(3), n=0), "n=0"),
    (lambda: farthest_first(torch.full((2, 2), torch.nan)), "not finite"),
    (lambda: select_channels([*features()], 0), "n=0"), (lambda: select_channels([*features()], by="best"), "by='best'"), (lambda: select_channels([*features(b=1)]), "1 image"),
    (lambda: select_channels([*features() - 1]), "after a ReLU"), (lambda: select_channels([*torch.full((3, 2, 2, 2), torch.nan)]), "finite"),
    (lambda: select_channels([*torch.zeros(3, 2, 2, 2)]), "none of 2 channels"), (lambda: Whitening(torch.ones(4, 3)), "all alike"), (lambda: Whitening(torch.rand(1, 3)), "1 vectors"),
    (lambda: Whitening(torch.rand(4, 3), 0), "0 components"), (lambda: retrieval_precision(torch.rand(2, 3), torch.rand(4, 3), np.ones((2, 3))), "relevant has shape (2, 3)"),
])
def test_faults_are_named(call, words):
    with pytest.raises(SpmlError) as e: call()
    assert words in str(e.value)

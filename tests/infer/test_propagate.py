"""Random walk: golden vectors, properties, every form against squared matrices in float64, faults."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from spml_kit.core import SpmlError
from spml_kit.infer.propagate import affinity, normalise_scores, random_walk, transition


def formula(shape, a, b, c, **_):
    i, j = np.mgrid[:shape[0], :shape[1]]
    return F.normalize(torch.tensor(np.sin(a*i + b*j + c)), dim=1)


def rand(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


def plain(scores, views, squarings=6, beta=5, power=20):
    "The reference's order of operations, in float64"
    views = F.normalize(views.double(), dim=-1)
    W = torch.stack([torch.exp(beta*(v @ v.T - 1)) for v in views]).mean(0)**power
    T = W / W.sum(0, keepdim=True)
    for _ in range(squarings):
        T = T @ T
    return scores.double() @ T


@pytest.fixture(scope="module")
def v22(vectors):
    v = vectors["V22"]
    one, two = formula(**v["inputs"]["nodes"]), formula(**v["inputs"]["second_view"])
    return one[None], torch.stack([one, two]), torch.tensor(v["inputs"]["cam"], dtype=torch.float64), v["expected"]


def test_v22_matrices(v22):
    one, both, _, e = v22
    np.testing.assert_allclose(affinity(one), e["A"], atol=1e-9)
    np.testing.assert_allclose(affinity(both), e["A_mean_two_views"], atol=1e-9)
    T = transition(affinity(one)).T
    np.testing.assert_allclose(T, e["T1"], atol=1e-9)
    np.testing.assert_allclose(T.sum(0), e["column_sums"], atol=1e-9)
    np.testing.assert_allclose(torch.linalg.matrix_power(T, 64), e["T64"], atol=1e-9)


@pytest.mark.parametrize("dtype,atol", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_v22_walks(v22, dtype, atol):
    one, both, cam, e = v22
    one, both, cam = one.to(dtype), both.to(dtype), cam.to(dtype)
    np.testing.assert_allclose(random_walk(cam, one), e["out_one_view"], atol=atol)
    np.testing.assert_allclose(random_walk(cam, both), e["out_two_views"], atol=atol)
    np.testing.assert_allclose(random_walk(cam, one, steps=1), e["out_zero_squarings"], atol=atol)


def test_v33_score_normalisation(vectors):
    v, e = vectors["V33"]["inputs"], vectors["V33"]["expected"]
    out = normalise_scores(torch.tensor(v["prob"], dtype=torch.float64), torch.tensor(v["present"]))
    np.testing.assert_allclose(out, e["normalised"], atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 5)])
def test_a_class_without_score_stays_zero(shape):
    prob = rand(*shape).abs()
    prob[1] = 0
    out = normalise_scores(prob, torch.tensor([1, 1, 1]))
    assert out.isfinite().all() and not out[1].any() and out[0].max() == pytest.approx(1) and out[2].max() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes,n,dim,n_views", [(1, 1, 1, 1), (2, 30, 4, 1), (21, 200, 16, 2), (5, 77, 64, 3)])
def test_against_squaring_in_float64(dtype, classes, n, dim, n_views):
    scores, views = rand(classes, n).abs().to(dtype), F.normalize(rand(n_views, n, dim, seed=1) + 2*rand(1, 1, dim, seed=2), dim=-1).to(dtype)
    out = random_walk(scores, views)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), plain(scores, views), atol=1e-9 if dtype == torch.float64 else 1e-3, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 6), st.integers(1, 3), st.integers(0, 70), st.integers(0, 10**6))
def test_p12(classes, n, dim, n_views, steps, seed):
    views, scores = rand(n_views, n, dim, seed=seed), rand(classes, n, seed=seed + 1)
    T = transition(affinity(views)).T
    torch.testing.assert_close(T.sum(0), torch.ones(n, dtype=torch.float64))
    out = random_walk(scores, views, steps)
    assert (out <= scores.amax(1, keepdim=True) + 1e-9).all() and (out >= scores.amin(1, keepdim=True) - 1e-9).all()
    constant = torch.full((2, n), .3, dtype=torch.float64)
    torch.testing.assert_close(random_walk(constant, views, steps), constant)
    torch.testing.assert_close(random_walk(scores, views, 64), plain(scores, views), atol=1e-9, rtol=0)


def test_maps_are_nodes():
    scores, views = rand(3, 6, 7).abs(), rand(2, 5, 6, 7, seed=1)
    flat = random_walk(scores.flatten(1), views.flatten(2).transpose(1, 2))
    assert torch.equal(random_walk(scores, views), flat.view(3, 6, 7))


def test_absent_classes_stay_absent_and_change_nothing():
    scores, views = rand(4, 50).abs(), rand(1, 50, 5, seed=1)
    scores[2] = 0
    before = scores.clone()
    out = random_walk(scores, views)
    assert not out[2].any() and torch.equal(scores, before)
    torch.testing.assert_close(out[[0, 1, 3]], random_walk(scores[[0, 1, 3]], views))
    assert not random_walk(0*scores, views).any()


def test_scale_of_the_embedding_does_not_matter():
    scores, views = rand(2, 30).abs(), rand(2, 30, 5, seed=1)
    torch.testing.assert_close(random_walk(scores, 7*views), random_walk(scores, views))


def test_order_of_the_nodes_does_not_matter():
    scores, views, order = rand(2, 30).abs(), rand(2, 30, 5, seed=1), torch.randperm(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(random_walk(scores[:, order], views[:, order]), random_walk(scores, views)[:, order])


def test_sharp_settings_do_not_underflow():
    views = rand(1, 40, 5, seed=1).float()
    out = random_walk(torch.eye(40), views, steps=3, beta=50, power=100)
    assert out.isfinite().all()
    torch.testing.assert_close(out.sum(0), torch.ones(40))


@pytest.mark.parametrize("scores,views", [((2, 9), (9, 4)), ((2, 9), (1, 8, 4)), ((2, 3, 3), (1, 9, 4)), ((2, 3, 3), (1, 4, 3, 4)), ((9,), (1, 9, 4))])
def test_shapes_that_do_not_fit(scores, views):
    with pytest.raises(SpmlError, match="do not fit"):
        random_walk(torch.ones(scores), torch.ones(views))


def test_faults():
    ones, views = torch.ones(2, 9), torch.ones(1, 9, 4)
    for bad, message in [(lambda: random_walk(ones, views, steps=-1), "steps=-1"), (lambda: random_walk(ones*float("nan"), views), "not finite"),
                         (lambda: random_walk(torch.ones(1, 300, 300), torch.ones(1, 2, 300, 300)), "90000 pixels")]:
        with pytest.raises(SpmlError, match=message):
            bad()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees():
    scores, views = rand(5, 300).abs().float(), (rand(2, 300, 16, seed=1) + 2*rand(1, 1, 16, seed=2)).float()
    torch.testing.assert_close(random_walk(scores.cuda(), views.cuda()).cpu(), random_walk(scores, views), atol=1e-3, rtol=0)

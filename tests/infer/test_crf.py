"""Dense CRF: pydensecrf2's own numbers (golden file, and live on photographs where it is installed), the definition on small images, matrices, properties, faults."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from spml_kit.core import SpmlError
from spml_kit.infer.crf import KERNELS, Blur, Kernel, Rows, dense_crf, enclosing_simplex, permutohedral

HERE = Path(__file__).parent
GOLDEN = {  # name: (scores' classes, of which the last so many are 0 everywhere, smoothness, appearance, iterations)
    "default": (3, 0, KERNELS[0], KERNELS[1], 10),
    "appearance_only": (3, 0, None, Kernel(4, sxy=67, srgb=3), 10),
    "wide": (3, 0, None, Kernel(3, sxy=9, srgb=40), 5),
    "absent_classes": (6, 3, KERNELS[0], Kernel(4, sxy=20, srgb=13), 10),
}


def synthetic(size=(18, 22), classes=3, absent=0):
    "Image and scores from formulas, so that the golden file need not hold them"
    y, x = np.mgrid[:size[0], :size[1]]
    inside = (x - 9)**2 + (y - 8)**2 < 36
    image = np.stack([90 + 80*inside + 6*np.sin(a*x + b*y) + 2*((5*x + 3*y*a) % 7) for a, b in ((1, 2), (2, 1), (3, 5))], -1)
    maps = np.stack([2*(inside == (c == 1)) * (c < 2) + 1.5*np.sin(.7*x*(c + 1) + .4*y + c) for c in range(classes)])
    scores = np.exp(maps)/np.exp(maps).sum(0)
    scores[classes - absent:] = 0
    return image.astype(np.uint8), scores.astype(np.float32)


def by_pydensecrf(image, scores, smooth, look, iterations):
    import pydensecrf.densecrf as dcrf
    from pydensecrf.utils import unary_from_softmax
    C, H, W = scores.shape
    field = dcrf.DenseCRF2D(W, H, C)
    field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(scores)))
    if smooth:
        field.addPairwiseGaussian(sxy=smooth.sxy, compat=smooth.weight)
    field.addPairwiseBilateral(sxy=look.sxy, srgb=look.srgb, rgbim=np.ascontiguousarray(image), compat=look.weight)
    return np.array(field.inference(iterations)).reshape(scores.shape)


def write_golden():
    "How crf_golden.json was made: pip install pydensecrf2==1.1; python tests/infer/test_crf.py"
    out = {}
    for name, (classes, absent, smooth, look, iterations) in GOLDEN.items():
        Q = by_pydensecrf(*synthetic(classes=classes, absent=absent), smooth, look, iterations)
        out[name] = np.round(1000*Q).astype(int).reshape(classes, -1).tolist()
    (HERE/"crf_golden.json").write_text(json.dumps({"source": "pydensecrf2 1.1; probabilities in thousandths, by class", **out}, separators=(",", ":")).replace("]],", "]],\n") + "\n")


def plain_crf(image, scores, kernels=KERNELS, iterations=10):
    "The definition, all pairs in float64"
    log = torch.tensor(scores, dtype=torch.float64).flatten(1).T.clip(1e-5, 1).log()
    mixed = 0
    for k in kernels:
        f = k.features(image).double()
        K = torch.exp(-torch.cdist(f, f)**2/2)
        mixed = mixed + k.weight*K/(K.sum(0)*K.sum(1)[:, None]).sqrt()
    Q = log.softmax(1)
    for _ in range(iterations):
        Q = (log + mixed @ Q).softmax(1)
    return Q.T.reshape(scores.shape).float()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    classes, absent, smooth, look, iterations = GOLDEN[name]
    image, scores = synthetic(classes=classes, absent=absent)
    want = np.array(json.loads((HERE/"crf_golden.json").read_text())[name]).reshape(scores.shape)/1000
    got = dense_crf(image, scores, (smooth, look) if smooth else (look,), iterations).numpy()
    assert (got.argmax(0) == want.argmax(0)).mean() >= .99
    assert (want.argmax(0) != scores.argmax(0)).mean() > .01, "the field changed nothing: this case shows nothing"
    if smooth:  # theirs is a lattice, ours the exact blur
        assert np.abs(got - want).mean() < .01
    else:
        np.testing.assert_allclose(got, want, atol=2e-3)


def test_photographs_against_pydensecrf(voc_animals):
    pytest.importorskip("pydensecrf", reason="pydensecrf2 is not installed (needs a compiler; only this comparison uses it)")
    sys.path.insert(0, str(HERE.parents[1]/"benchmarks"))
    try:
        from crf import tasks
    finally:
        sys.path.pop(0)
    shares = []
    for _, image, by_setting in tasks(voc_animals, 20):
        for scores in by_setting.values():
            shares.append((dense_crf(image, scores).numpy().argmax(0) == by_pydensecrf(image, scores, *KERNELS, 10).argmax(0)).mean())
    assert len(shares) == 40 and min(shares) >= .99, sorted(shares)[:5]


@pytest.mark.parametrize("size", [(1, 9), (7, 1), (13, 17), (24, 20)])
@pytest.mark.parametrize("classes", [2, 5])
def test_against_the_definition(size, classes):
    image, scores = synthetic(size, classes)
    torch.testing.assert_close(dense_crf(image, scores, KERNELS[:1]), plain_crf(image, scores, KERNELS[:1]), atol=5e-3, rtol=0)
    kernels = (KERNELS[0], Kernel(4, sxy=20, srgb=25))
    got, want = dense_crf(image, scores, kernels), plain_crf(image, scores, kernels)
    assert (got - want).abs().mean() < .02
    assert (got.argmax(0) == want.argmax(0)).float().mean() > .97


@pytest.mark.parametrize("sxy", [.3, 1, 2.5, 40])
def test_blur(sxy):
    f = Kernel(1, sxy=sxy).features(np.zeros((11, 14, 3), np.uint8)).double()
    values = torch.rand(11*14, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Blur((11, 14), sxy).filter(values), (torch.exp(-torch.cdist(f, f)**2/2) @ values.double()).float(), atol=1e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    image, scores = synthetic()
    scores = torch.tensor(scores).to(dtype)
    out = dense_crf(image, scores)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, dense_crf(image, scores.float().numpy()), atol=1e-5, rtol=0)


def test_scores_that_want_a_gradient_and_views():
    image, scores = synthetic()
    out = dense_crf(image, torch.tensor(scores, requires_grad=True))
    assert not out.requires_grad
    flipped = dense_crf(image[:, ::-1], scores[:, :, ::-1], KERNELS[:1])
    torch.testing.assert_close(flipped.flip(2), dense_crf(image, scores, KERNELS[:1]), atol=1e-5, rtol=0)


def test_absent_classes_change_nothing():
    image, scores = synthetic(classes=6, absent=3)
    before = scores.copy()
    out = dense_crf(image, scores)
    assert (scores == before).all()
    floor = scores.copy()
    floor[3:] = np.array([1.1e-5, 1.01e-5, 1.0001e-5])[:, None, None]  # just above the clip: columns of their own
    torch.testing.assert_close(out, dense_crf(image, floor), atol=1e-3, rtol=0)
    torch.testing.assert_close(out[3], out[5])
    torch.testing.assert_close(out.sum(0), torch.ones(out.shape[1:]))
    torch.testing.assert_close(dense_crf(image, 0*scores), torch.full(scores.shape, 1/6))


def test_scores_above_one_count_as_one():
    image, scores = synthetic()
    torch.testing.assert_close(dense_crf(image, 5*scores), dense_crf(image, np.clip(5*scores, 0, 1)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.floats(.1, 50), st.integers(0, 10**6))
def test_simplex_holds_its_point(n, d, spread, seed):
    features = torch.tensor(np.random.default_rng(seed).normal(0, spread, (n, d)), dtype=torch.float32)
    zero, rank, weight = enclosing_simplex(features)
    assert weight.min() > -1e-3 and torch.equal(rank.sort(1).values, torch.arange(d+1).expand(n, -1))
    torch.testing.assert_close(weight.sum(1), torch.ones(n))
    corners = torch.stack([zero*(d+1) + k - (d+1)*(rank > d-k) for k in range(d+1)], 1)
    assert not corners.sum(2).any()
    inside = (corners*weight[..., None]).sum(1)  # an isometry of the features, times a constant
    scale = (2/3)**.5*(d+1)
    torch.testing.assert_close(torch.cdist(inside.double(), inside.double()), scale*torch.cdist(features.double(), features.double()), atol=.02*spread**.5*scale, rtol=2e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 80), st.integers(1, 6), st.floats(.1, 20), st.integers(0, 10**6))
def test_lattice_by_brute_force(n, d, spread, seed):
    "Splat, blur, slice with a dictionary of corners, in float64"
    rng = np.random.default_rng(seed)
    features, values = torch.tensor(rng.normal(0, spread, (n, d)), dtype=torch.float32), rng.normal(size=n)
    zero, rank, weight = enclosing_simplex(features)
    corner = lambda i, k: tuple((zero[i]*(d+1) + k - (d+1)*(rank[i] > d-k)).tolist())
    held = {}
    for i in range(n):
        for k in range(d+1):
            held[corner(i, k)] = held.get(corner(i, k), 0) + weight[i, k].item()*values[i]
    for j in range(d+1):
        step = lambda c, s: tuple(v + s*(1 - (d+1)*(i == j)) for i, v in enumerate(c))
        held = {c: v + (held.get(step(c, 1), 0) + held.get(step(c, -1), 0))/2 for c, v in held.items()}
    want = [sum(weight[i, k].item()*held[corner(i, k)] for k in range(d+1))/(1 + 2**-d) for i in range(n)]
    got = permutohedral(features).filter(torch.tensor(values, dtype=torch.float32)[:, None])
    np.testing.assert_allclose(got[:, 0], want, atol=1e-4, rtol=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_order_of_classes_and_pixels(seed):
    rng = np.random.default_rng(seed)
    image, scores = rng.integers(0, 256, (9, 8, 3)).astype(np.uint8), rng.random((4, 9, 8)).astype(np.float32)
    order = rng.permutation(4)
    torch.testing.assert_close(dense_crf(image, scores[order]), dense_crf(image, scores)[order], atol=1e-4, rtol=0)
    f, values, order = KERNELS[1].features(image), torch.rand(72, 2), torch.tensor(rng.permutation(72))
    torch.testing.assert_close(permutohedral(f[order]).filter(values[order]), permutohedral(f).filter(values)[order], atol=1e-4, rtol=1e-4)


def test_same_twice():
    image, scores = synthetic()
    assert torch.equal(dense_crf(image, scores), dense_crf(image, scores))


def test_rows_are_a_sparse_matrix():
    a = torch.tensor([[0, 2., 0, 1], [0, 0, 0, 0], [3, 0, 0, 4]])
    counts = (a != 0).sum(1)
    rows = Rows(a.nonzero()[:, 1].int(), (counts.cumsum(0) - counts).int(), a[a != 0])
    v = torch.rand(4, 5)
    torch.testing.assert_close(rows @ v, a @ v)


@pytest.mark.parametrize("change,message", [
    (dict(image=np.zeros((18, 22, 3)) - 1), "black and white"), (dict(image=np.array([["a"]])), r"\(H,W,3\) uint8"), (dict(image=np.zeros((18, 22, 5), np.uint8)), r"\(18, 22, 5\)"),
    (dict(image=np.zeros((0, 22, 3), np.uint8)), r"\(0, 22, 3\)"), (dict(scores=np.ones((3, 22, 18))), "resize the scores"), (dict(scores=np.ones((18, 22))), r"expected \(C,18,22\)"),
    (dict(scores=np.ones((1, 18, 22))), "at least one more"), (dict(scores=np.full((2, 18, 22), np.nan)), "not finite"), (dict(scores=np.full((2, 18, 22), np.inf)), "not finite"),
    (dict(scores=np.full((2, 18, 22), -.5)), "-0.5 is negative"), (dict(iterations=-1), "iterations=-1"), (dict(kernels=(Kernel(1, sxy=67, srgb=1e-4),)), "larger sxy and srgb")])
def test_faults(change, message):
    image, scores = synthetic()
    with pytest.raises(SpmlError, match=message):
        dense_crf(**{"image": image, "scores": scores, **change})


@pytest.mark.parametrize("fields,message", [(dict(sxy=0), "sxy=0"), (dict(sxy=-1), "sxy=-1"), (dict(srgb=0), "srgb=0"), (dict(sxy=float("nan")), "sxy=nan"),
    (dict(srgb=float("inf")), "srgb=inf"), (dict(weight=-1), "weight=-1"), (dict(weight=float("nan")), "weight=nan")])
def test_kernels_that_cannot_be(fields, message):
    with pytest.raises(SpmlError, match=message):
        Kernel(**{"weight": 1, "sxy": 1, "srgb": 1, **fields})


def test_features_that_are_not_finite():
    with pytest.raises(SpmlError, match="not finite"):
        permutohedral(torch.tensor([[0.], [float("nan")]]))


def test_benchmark_says_what_is_missing(tmp_path):
    r = subprocess.run([sys.executable, HERE.parents[1]/"benchmarks"/"crf.py", "--root", tmp_path], capture_output=True, text=True)
    assert r.returncode and "takes the VOC2012 folder" in r.stderr and "Traceback" not in r.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees():
    image, scores = synthetic()
    out = dense_crf(image, torch.tensor(scores).cuda())
    assert out.is_cuda
    torch.testing.assert_close(out.cpu(), dense_crf(image, scores), atol=1e-3, rtol=0)


if __name__ == "__main__":
    write_golden()

"""Segment index: golden vectors, every block size against the plain definition, ties, faults."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import spml_kit.infer.retrieval as retrieval
from spml_kit.core import SpmlError, UNLABELLED, VOID
from spml_kit.files import save_tensors
from spml_kit.infer.retrieval import SegmentIndex, legacy_topk, nearest, normalise_votes, topk_precision


def formula(shape, a, b, c, **_):
    i, j = np.mgrid[:shape[0], :shape[1]]
    return F.normalize(torch.tensor(np.sin(a*i + b*j + c)), dim=1)


def plain(q, mu, k):
    "All similarities, sorted; equal ones by rising row"
    sim, i = (q @ mu.T).sort(dim=1, descending=True, stable=True)
    return sim[:, :k], i[:, :k]


def coarse(n, dim, seed):
    "Vectors of few exact values: many ties, and no rounding in any order of summation"
    return torch.tensor(np.random.default_rng(seed).integers(-1, 2, (n, dim)) / 4.)


def unit(n, dim, seed, dtype=torch.float64):
    return F.normalize(torch.tensor(np.random.default_rng(seed).normal(size=(n, dim))), dim=1).to(dtype)


def index_of(mu, label):
    return SegmentIndex(mu, torch.as_tensor(label), torch.zeros(len(mu)).long())


def test_v18_topk(vectors):
    v, e = vectors["V18"]["inputs"], vectors["V18"]["expected"]
    x, label = formula(**v["x"]), torch.tensor(v["labels"])
    mu, proto_label = formula(**v["prototypes"]), torch.tensor(v["prototype_labels"])
    index = index_of(mu, proto_label)
    found = proto_label[index.nearest(x, v["k"])[1]]
    assert found.tolist() == e["topk_labels"]
    assert (found == label[:, None]).double().mean().item() == pytest.approx(e["precision"])
    assert index.predict(x, 4, v["k"]).tolist() == e["majority"]
    assert legacy_topk(mu, proto_label) == pytest.approx(e["self_top5_precision"])


def test_v19_prediction(vectors):
    v, e = vectors["V19"]["inputs"], vectors["V19"]["expected"]
    x, mu = formula(**v["x"]), formula(**v["memory"])
    segments = F.normalize(x.view(6, 4, -1).sum(1), dim=1)
    index = index_of(mu, torch.arange(30) // 5)
    assert (20*index.vote(segments, 6)).round().int().tolist() == e["votes_per_segment"]
    assert index.predict(segments, 6).repeat_interleave(4).tolist() == e["pixel_prediction"]


def test_v32_vote_normalisation(vectors):
    v, e = vectors["V32"]["inputs"], vectors["V32"]["expected"]
    out = normalise_votes(torch.tensor(v["prob"], dtype=torch.float64), torch.tensor(v["present"]))
    np.testing.assert_allclose(out, e["normalised"], atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 60), st.integers(1, 25), st.integers(1, 500), st.integers(0, 10**6))
def test_any_block_size_is_the_definition_with_ties(n_q, n_mu, k, chunk, seed):
    q, mu = coarse(n_q, 4, seed), coarse(n_mu, 4, seed + 1)
    sim, i = nearest(q, mu, k, chunk)
    want_sim, want_i = plain(q, mu, k)
    assert torch.equal(i, want_i) and torch.equal(sim, want_sim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n_q,n_mu,dim,k", [(1, 1, 1, 1), (5, 20_000, 64, 20), (300, 9_000, 8, 7), (0, 10, 4, 3), (3, 10, 4, 20)])
def test_random_input_against_float64(n_q, n_mu, dim, k, dtype):
    q, mu = unit(n_q, dim, 0, dtype), unit(n_mu, dim, 1, dtype)
    sim, i = nearest(q, mu, k)
    want, _ = plain(q.double(), mu.double(), k)
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-6)
    assert sim.shape == i.shape == (n_q, min(k, n_mu)) and sim.dtype == dtype
    torch.testing.assert_close(sim.double(), want, atol=tolerance, rtol=0)
    torch.testing.assert_close((q.double()[:, None] * mu.double()[i]).sum(-1), want, atol=tolerance, rtol=0) # the rows are as good as the best
    assert all(len(set(row)) == len(row) for row in i.tolist())


def test_all_equal_gives_the_first_rows():
    _, i = nearest(torch.zeros(3, 8), unit(20_000, 8, 0, torch.float32), 20)
    assert i.tolist() == [list(range(20))]*3


@pytest.mark.parametrize("chunk", [1, 64, 1000, 2**16])
def test_memory_bound(monkeypatch, chunk):
    held, best = [], retrieval._best
    monkeypatch.setattr(retrieval, "_best", lambda sim, k: held.append(sim.numel()) or best(sim, k))
    nearest(unit(40, 4, 0), unit(300, 4, 1), 5, chunk)
    assert max(held) <= chunk and sum(held) == 40*300


def test_votes():
    mu, label = unit(500, 8, 0, torch.float32), np.random.default_rng(0).integers(0, 5, 500)
    q = unit(40, 8, 1, torch.float32)
    index = index_of(mu, label)
    vote = index.vote(q, 7, 15)
    want = np.stack([np.bincount(label[row], minlength=7)/15 for row in plain(q, mu, 15)[1]])
    np.testing.assert_allclose(vote, want, atol=1e-6)
    torch.testing.assert_close(index.vote(q, 7, 10_000), torch.tensor(np.bincount(label, minlength=7)/500).float().expand(40, 7)) # more than there are: all of them
    assert index.predict(q, 7, 15).tolist() == want.argmax(1).tolist() # numpy's argmax takes the first


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_unlabelled_and_void_do_not_vote(dtype):
    mu = unit(50, 8, 0, torch.float32)
    label = torch.arange(50) % 3
    label[::5], label[1::5] = UNLABELLED, VOID
    index = SegmentIndex(mu, label.to(dtype), torch.arange(50) // 10)
    kept = torch.tensor([i for i in range(50) if i % 5 > 1])
    assert torch.equal(index.row, kept) and torch.equal(index.label, label[kept]) and torch.equal(index.mu, mu[kept]) and torch.equal(index.image, kept // 10)
    assert len(SegmentIndex(mu, label, label, n_classes=2)) == (label < 2).sum()


def test_explain_leads_back():
    mu, label, image = unit(60, 8, 0), torch.arange(60) % 4, torch.arange(60) // 6
    label[::2] = UNLABELLED
    reasons = SegmentIndex(mu, label, image).explain(mu[7], k=4)
    assert reasons.row[0] == 7 and reasons.similarity.is_monotonic_decreasing
    for r in reasons.itertuples():
        assert r.label == label[r.row] and r.image == image[r.row] and r.similarity == pytest.approx((mu[7] @ mu[r.row]).item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_save_load(tmp_path, dtype):
    label = torch.arange(30) % 3
    label[4] = UNLABELLED
    index = SegmentIndex(unit(30, 8, 0, dtype), label, torch.arange(30) // 7)
    index.save(tmp_path/"deep"/"index.safetensors")
    again = SegmentIndex.load(tmp_path/"deep"/"index.safetensors")
    for name in ("mu", "label", "image", "row"):
        assert torch.equal(getattr(index, name), getattr(again, name))


def test_a_gradient_is_not_kept():
    mu = unit(5, 4, 0).requires_grad_()
    assert not index_of(mu, torch.arange(5)).mu.requires_grad


def plain_precision(mu, label, k):
    "Loops: own segment and everything unlabelled left out"
    labelled = [i for i in range(len(mu)) if label[i] < UNLABELLED]
    shares = []
    for i in labelled:
        others = sorted((j for j in labelled if j != i), key=lambda j: (-(mu[i] @ mu[j]).item(), j))[:k]
        shares.append(np.mean([label[j] == label[i] for j in others]))
    return np.mean(shares)


@pytest.mark.parametrize("k", [1, 5, 100])
@pytest.mark.parametrize("make", [unit, coarse])
def test_topk_precision(make, k):
    mu, label = make(60, 4, 3), np.random.default_rng(0).choice([0, 1, 2, UNLABELLED, VOID], 60)
    assert topk_precision(mu, torch.tensor(label), k) == pytest.approx(plain_precision(mu, label, k))


def test_topk_precision_ignores_the_unlabelled():
    mu, label = unit(40, 8, 0), torch.arange(40) % 3
    more = torch.cat([mu, unit(30, 8, 1)]), torch.cat([label, torch.full((30,), UNLABELLED)])
    assert topk_precision(*more) == topk_precision(mu, label)
    assert legacy_topk(*more) != legacy_topk(mu, label)
    assert math.isnan(topk_precision(mu[:1], label[:1]))


@pytest.mark.parametrize("shape", [(3, 7), (3, 4, 5)])
def test_normalise_votes(shape):
    votes, present = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.tensor([True, False, True])
    votes[2] *= .1
    out = normalise_votes(votes, present)
    assert out[0].max() == pytest.approx(1) and torch.equal(out[1], votes[1])
    torch.testing.assert_close(out[2], votes[2]/.15)


def test_faults(tmp_path):
    mu, zeros = unit(6, 4, 0), torch.zeros(6).long()
    for bad, message in [(lambda: SegmentIndex(mu[:0], zeros[:0], zeros[:0]), "nothing to retrieve"), (lambda: SegmentIndex(mu, zeros + UNLABELLED, zeros), "nothing to retrieve"),
                         (lambda: SegmentIndex(mu/0, zeros, zeros), "unit vectors"), (lambda: SegmentIndex(2*mu, zeros, zeros), "unit vectors"),
                         (lambda: SegmentIndex(mu[0], zeros, zeros), "expected"), (lambda: SegmentIndex(mu, zeros, zeros[1:]), "expected"),
                         (lambda: nearest(mu[:, :3], mu), "expected"), (lambda: nearest(mu, mu, chunk=0), "at least 1"), (lambda: nearest(mu*float("nan"), mu), "not finite"),
                         (lambda: index_of(mu, zeros + 3).vote(mu, 3), "holds class 3")]:
        with pytest.raises(SpmlError, match=message):
            bad()
    path = tmp_path/"index.safetensors"
    with pytest.raises(SpmlError, match="no such file"):
        SegmentIndex.load(path)
    save_tensors(path, {"mu": mu})
    with pytest.raises(SpmlError, match="no SegmentIndex"):
        SegmentIndex.load(path)
    index_of(mu, zeros).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SpmlError, match="cut short"):
        SegmentIndex.load(path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees():
    mu, q = coarse(20_000, 8, 0).float(), coarse(50, 8, 1).float()
    sim, i = nearest(q, mu.cuda(), 20)
    want_sim, want_i = plain(q, mu, 20)
    assert torch.equal(i.cpu(), want_i) and torch.equal(sim.cpu(), want_sim)
    unit_mu = unit(500, 8, 0, torch.float32)
    on_gpu, on_cpu = (SegmentIndex(m, torch.arange(500) % 5, torch.arange(500)) for m in (unit_mu.cuda(), unit_mu))
    assert torch.equal(on_gpu.vote(unit_mu[:50], 5).cpu(), on_cpu.vote(unit_mu[:50], 5))


def test_faiss_finds_the_same():
    pytest.importorskip("faiss", reason="faiss is an extra: pip install faiss-cpu")
    mu, q = unit(3000, 16, 0, torch.float32), unit(50, 16, 1, torch.float32)
    index = index_of(mu, torch.arange(3000) % 4)
    (sim, row), votes = index.nearest(q, 20), index.vote(q, 4)
    exact_sim, exact = index.use_faiss().nearest(q, 20)
    torch.testing.assert_close(exact_sim, sim, atol=1e-6, rtol=0)
    assert (exact == row).float().mean() > .99 and torch.allclose(index.vote(q, 4), votes, atol=.06)
    assert index.nearest(q, 5000)[1].shape == (50, 3000)
    index.use_faiss("IVF16,Flat")
    with pytest.raises(SpmlError, match="nprobe"): index.nearest(q, 2000)
    index.faiss.nprobe = 8
    assert .5 < torch.tensor([len(set(a) & set(b))/20 for a, b in zip(index.nearest(q, 20)[1].tolist(), row.tolist())]).mean() < 1
    with pytest.raises(SpmlError, match="cannot build 'nonsense'"): index.use_faiss("nonsense")


def test_faiss_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(SpmlError, match="pip install faiss-cpu"): index_of(unit(10, 4, 0), torch.zeros(10).long()).use_faiss()

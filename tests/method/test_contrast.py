"""The fast loss against its definition: every dtype, scope, match table, concentration and chunk size; values, gradients, faults."""
import os

import pytest
import torch

from conftest import random_batch
from spml_kit.method.contrast import contrast, contrast_plain, relation_loss
from spml_kit.core import SpmlError, UNLABELLED, VOID
from spml_kit.method.nets import unit
from spml_kit.method.memory import MemoryBank
from spml_kit.method.relations import (Relation, feature_affinity, image_similarity, near_label, relation_sets, same_class, same_region, semantic_annotation,
                                semantic_cooccurrence, shared_tags)
from spml_kit.method.segments import Prototypes, make_segments

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11} # relative to the largest value
NOTHING = 1e-9 # below it there is rounding only
INTERPRETED = bool(os.environ.get("SPML_KERNELS_MUST_RUN")) # test_fused.py runs these tests again with the kernels in an interpreter, which takes its time for every block of a group


def one_way(protos):
    "A table that is not symmetric: classes match themselves and the next, the unlabelled are left out"
    match = torch.eye(4).bool() | torch.eye(4).roll(1, 1).bool()
    return same_class(protos), match


def no_table(protos):
    "A table in which group 1 matches nothing, not even itself"
    match = torch.eye(4).bool()
    match[1, 1] = False
    return protos.label.clamp_max(3), match


CODES = dict(same_class=same_class, same_region=same_region, shared_tags=shared_tags, near_label=lambda p: near_label(p, .5), near_across=lambda p: near_label(p, .5, across=True), near_or_out=lambda p: near_label(p, .5, unmatched="out"), one_way=one_way, no_table=no_table)
RELATIONS = [semantic_annotation(6), semantic_cooccurrence(12), image_similarity(16), feature_affinity(12)]


def problem(dtype=torch.float64, seed=0, **kwargs):
    "Segments of a batch and a memory bank with two further batches, of other sizes"
    seg = make_segments(*random_batch(seed, **kwargs), (2, 2), 3)
    bank = MemoryBank(2)
    for s in (1, 2): bank.push(make_segments(*random_batch(seed + s, n_images=4 - s), (2, 2), 3).protos)
    cast = lambda p: Prototypes(p.mu.to(dtype), p.mu_loc.to(dtype), p.label, p.region, p.image, p.tags)
    seg.v, seg.u, seg.protos = seg.v.to(dtype), seg.u.to(dtype), cast(seg.protos)
    for i, p in enumerate(bank.batches): bank.batches[i] = cast(p)
    return seg, bank


def leaves(seg, bank, location):
    "Pixels and prototypes as leaves, the segments made of them, and all candidates"
    x = (seg.u if location else seg.v).detach().clone().requires_grad_()
    mu = (seg.protos.mu_loc if location else seg.protos.mu).detach().clone().requires_grad_()
    if location: seg.u, seg.protos.mu_loc = x, mu
    else: seg.v, seg.protos.mu = x, mu
    return x, mu, seg, bank.candidates(seg.protos)


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    "Where the kernels are tested, the chunked form must not step in"
    if not INTERPRETED: return
    def refuse(*args): raise AssertionError("the chunked form ran instead of the kernels")
    monkeypatch.setattr("spml_kit.method.contrast._pieces", refuse)


def fast(relation, seg, bank, own_negative, elements):
    "Mean, loss of each pixel, gradients by pixels and by the batch's prototypes: `relation_loss`, with the chunk size in our hands"
    x, mu, seg, candidates = leaves(seg, bank, relation.location)
    if elements is None: total, each = relation_loss(relation, seg, candidates, own_negative)
    else:
        protos = candidates if relation.scope == "memory" else seg.protos
        ids, match = relation.groups(protos)
        total, each = contrast(x, protos.mu_loc if relation.location else protos.mu, seg.own, ids, relation.kappa, match,
                               protos.image if relation.scope == "image" else None, own_negative, elements)
    total.backward()
    return total, each, x.grad, mu.grad


def defined(relation, seg, bank, own_negative):
    "The same by the definition, in float64"
    x, mu, seg, candidates = leaves(seg, bank, relation.location)
    protos = candidates if relation.scope == "memory" else seg.protos
    anchor, candidate, positive = relation_sets(relation, seg, candidates)
    losses = contrast_plain(x[anchor], protos.mu_loc if relation.location else protos.mu, seg.own[anchor], candidate[anchor], positive[anchor], relation.kappa, own_negative)
    each = torch.zeros(len(x), dtype=x.dtype).index_put((anchor,), losses)
    if relation.scope == "image":
        image = seg.protos.image[seg.own]
        total = torch.stack([each[anchor & (image == b)].mean() for b in image[anchor].unique()]).mean()
    else: total = losses.mean()
    total.backward()
    return total, each, x.grad, mu.grad


def compare(relation, own_negative=False, elements=None, dtype=torch.float64, learns=True, **kwargs):
    found = fast(relation, *problem(dtype, **kwargs), own_negative, elements)
    want = defined(relation, *problem(**kwargs), own_negative)
    for name, f, w in zip(("mean", "each", "dx", "dmu"), found, want):
        assert f.dtype == dtype, name
        torch.testing.assert_close(f.double(), w, rtol=0, atol=TOLERANCE[dtype]*max(1, w.abs().max().item()), msg=lambda m: f"{name}: {m}")
    for w in (want[0], want[2], want[3]): assert (w.abs().max() > NOTHING) == learns # by default, a problem of which something can be learned
    return want


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("own_negative", [False, True])
@pytest.mark.parametrize("scope", ["image", "batch", "memory"])
@pytest.mark.parametrize("code", CODES)
def test_value_and_gradient(code, scope, own_negative, dtype):
    locations = (False,) if scope == "memory" else (scope == "image",) if INTERPRETED else (False, True) # the kernels see one width either way
    for location in locations: compare(Relation(code, CODES[code], 8, scope=scope, location=location), own_negative, dtype=dtype)


def test_own_negative_matters():
    "The matrix above would not tell if the flag did nothing"
    for code in ("no_table", "shared_tags"):
        one, other = (compare(Relation(code, CODES[code], 8), flag)[0] for flag in (False, True))
        assert other > one


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kappa", [1, 6, 16, 30, 50])
@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: r.name)
def test_concentrations(relation, kappa, dtype):
    compare(Relation(relation.name, relation.code, kappa, scope=relation.scope, location=relation.location), dtype=dtype)


KINDS = "class", "table", "image", "image and table", "lonely"


def random_problem(kind, D, N=203, M=61, images=3, seed=0):
    "Unit pixels near their segments, which lie image by image; nothing a multiple of anything. Arguments of `contrast` from the third on, but for the concentration, and x and mu in float64"
    g = torch.Generator().manual_seed(seed)
    image, own = torch.arange(M)*images//M, torch.randint(M, (N,), generator=g)
    mu = unit(torch.randn(M, D, generator=g, dtype=torch.float64))
    x = unit(mu[own] + torch.randn(N, D, generator=g, dtype=torch.float64)*.7/D**.5)
    ids = torch.arange(M)//2*(torch.arange(M) % 7 > 0) if kind == "lonely" else torch.randint(-1, 5, (M,), generator=g) # some groups of one
    match = torch.rand(5, 5, generator=g) < .4 if "table" in kind else None
    return x, mu, own, ids, match, image if "image" in kind else None


def plain_mean(x, mu, own, ids, kappa, match, image, own_negative):
    "Mean and loss of each pixel by the definition"
    row = ids[own]
    candidate = (row >= 0)[:, None] & (ids >= 0)
    if image is not None: candidate = candidate & (image[own][:, None] == image)
    positive = candidate & (row[:, None] == ids if match is None else match[row][:, ids])
    anchor = row >= 0
    losses = contrast_plain(x[anchor], mu, own[anchor], candidate[anchor], positive[anchor], kappa, own_negative)
    each = torch.zeros(len(x), dtype=x.dtype, device=x.device).index_put((anchor,), losses)
    if image is None: return losses.mean(), each
    where = image[own][anchor]
    return torch.stack([losses[where == i].mean() for i in where.unique()]).mean(), each


def agree(kind, D, kappa, dtype=torch.float32, device="cpu", **size):
    "Values and gradients of the fast form are those of the definition in float64"
    x, mu, own, ids, match, image = (None if o is None else o.to(device) for o in random_problem(kind, D, **size))
    for own_negative in (False, True) if match is not None else (False,):
        results = []
        for form, t in ((contrast, dtype), (plain_mean, torch.float64)):
            leaves = [o.to(t).detach().requires_grad_() for o in (x, mu)]
            total, each = form(*leaves, own, ids, kappa, match, image, own_negative)
            results.append((total.detach(), each.detach(), *torch.autograd.grad(3*total, leaves)))
        for name, found, want in zip(("mean", "each", "dx", "dmu"), *results):
            torch.testing.assert_close(found.double(), want, rtol=0, atol=TOLERANCE[dtype]*want.abs().max().item(), msg=lambda m: f"{name}, own_negative {own_negative}: {m}")


@pytest.mark.parametrize("D", [3, 16, 32, 64, 66, 128, 130])
@pytest.mark.parametrize("kind", KINDS)
def test_random_problems(kind, D):
    agree(kind, D, 12. if D < 64 else 60., **(dict(N=41, M=11, images=2) if INTERPRETED else {}))


@pytest.mark.parametrize("D", [66, 130])
def test_groups_of_several_blocks_and_tiles(D):
    agree("class", D, 12., N=803, M=149)


@pytest.mark.parametrize("elements", [1, 37, 500, 10**4])
@pytest.mark.parametrize("scope", ["image", "memory"])
@pytest.mark.parametrize("code", CODES)
def test_chunk_sizes(code, scope, elements):
    compare(Relation(code, CODES[code], 8, scope=scope), elements=elements)


@pytest.mark.parametrize("elements", [1, 37, 500, 10**4])
@pytest.mark.parametrize("scope", ["image", "memory"])
def test_memory_is_bounded(monkeypatch, scope, elements):
    import spml_kit.method.contrast as module
    held, chunk = [], module._chunk
    monkeypatch.setattr(module, "_chunk", lambda x, mu, *rest: held.append((len(x), len(mu))) or chunk(x, mu, *rest))
    seg, bank = problem()
    fast(Relation("any", same_class, 8, scope=scope), seg, bank, False, elements)
    assert all(n*m <= max(elements, m) for n, m in held) # one row at the least
    assert sum(n for n, _ in held) == (seg.protos.label[seg.own] < UNLABELLED).sum() # every anchor once


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("shape", [dict(n_images=1), dict(n_images=5, size=(3, 4)), dict(annotated=1., void=0.), dict(annotated=.05), dict(void=.6), dict(regions=1), dict(regions=40)],
                         ids=lambda d: ",".join(f"{k}={v}" for k, v in d.items()))
def test_shapes(code, shape):
    for scope in ("image", "memory"):
        alone = code == "same_region" and scope == "image" and shape.get("regions") == 1 # every segment of the image is a positive
        compare(Relation(code, CODES[code], 8, scope=scope), learns=not alone, **shape)


def test_memory_counts():
    "Relations over the memory see it, the others do not"
    seg, bank = problem()
    for relation in RELATIONS:
        without, with_bank = relation_loss(relation, seg)[0], relation_loss(relation, seg, bank.candidates(seg.protos))[0]
        assert torch.equal(without, with_bank) == (relation.scope != "memory"), relation.name


def small(n=6, m=7, dim=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, mu = (unit(torch.randn(k, dim, generator=g, dtype=torch.float64)).requires_grad_() for k in (n, m))
    image = torch.arange(m)*3 // m
    return x, mu, torch.randint(m, (n,), generator=g), torch.randint(-1, 3, (m,), generator=g), image, torch.rand(3, 3, generator=g) < .5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_gradcheck(images, table, seed):
    x, mu, own, ids, image, match = small(seed=seed)
    loss = lambda x, mu: 3*contrast(x, mu, own, ids, 5., match if table else None, image if images else None)[0]
    assert torch.autograd.gradcheck(loss, (x, mu))
    assert torch.autograd.gradcheck(lambda x: loss(x, mu.detach()), x) and torch.autograd.gradcheck(lambda mu: loss(x.detach(), mu), mu)


def test_without_gradient():
    x, mu, own, ids, _, _ = small()
    with_grad = contrast(x, mu, own, ids, 5.)
    with torch.no_grad(): without = contrast(x, mu, own, ids, 5.)
    assert torch.equal(with_grad[0], without[0]) and not without[0].requires_grad
    assert torch.equal(with_grad[1], without[1]) and not with_grad[1].requires_grad


def test_no_anchors():
    x, mu, own, _, image, match = small()
    for more in (dict(), dict(image=image), dict(match=match)):
        total, each = contrast(x, mu, own, torch.full((len(mu),), -1), 6., **more)
        x.grad = mu.grad = None
        total.backward() # connected: a batch without labels trains on
        assert total == 0 and not each.any() and not x.grad.any() and not mu.grad.any()


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: r.name)
def test_nothing_labelled(relation):
    emb, labels, regions, tags = random_batch()
    labels[labels < UNLABELLED] = UNLABELLED
    total, _ = relation_loss(relation, make_segments(emb.requires_grad_(), labels, regions, tags, (2, 2), 3))
    total.backward()
    assert total.isfinite() and emb.grad.isfinite().all()
    assert (total < 1e-12) == (relation.name in ("annotation", "affinity")) # affinity: all segments are unmatched, so all match


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: r.name)
@pytest.mark.parametrize("with_memory", [False, True])
def test_all_void(relation, with_memory):
    emb, labels, regions, tags = random_batch()
    seg = make_segments(emb.requires_grad_(), torch.full_like(labels, VOID), regions, tags, (2, 2), 3)
    _, bank = problem()
    total, each = relation_loss(relation, seg, bank.candidates(seg.protos) if with_memory else None)
    total.backward()
    assert total == 0 and each.shape == (0,) and not emb.grad.any()


@pytest.mark.parametrize("own_negative", [False, True])
def test_one_segment(own_negative):
    x = unit(torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    mu, own, one = x.detach()[:1].clone().requires_grad_(), torch.zeros(5).long(), torch.tensor([0])
    for more in (dict(), dict(image=one)):
        total, each = contrast(x, mu, own, one, 16., own_negative=own_negative, **more)
        total.backward()
        assert total == 0 and not each.any()
        assert x.grad.abs().max() < 1e-12 and mu.grad.abs().max() < 1e-12
    alone = contrast(x, mu, own, one, 16., torch.tensor([[False]]), own_negative=own_negative)[1] # matches nothing: its own negative if that is asked for
    torch.testing.assert_close(alone, torch.full_like(alone, 2).log() if own_negative else torch.zeros_like(alone))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kappa", [1, 16, 50, 60])
@pytest.mark.parametrize("cosines", [(1, -1, 1), (-1, 1, 1), (-1, -1, 1), (1, 1, -1), (1, -1, -1), (-1, 1, -1), (0, -1, 1)])
def test_extreme_similarity(cosines, kappa, dtype):
    "Own segment, one other positive and one negative at the ends of the scale: by hand the loss is log(1 + exp(kappa (negative - positive)))"
    _, pos_cos, neg_cos = cosines
    mu = torch.tensor([[c, (1 - c*c)**.5] for c in cosines], dtype=dtype, requires_grad=True)
    x = torch.tensor([[1., 0]], dtype=dtype, requires_grad=True)
    total, _ = contrast(x, mu, torch.tensor([0]), torch.tensor([0, 0, 1]), kappa)
    want = torch.nn.functional.softplus(torch.tensor(float(kappa*(neg_cos - pos_cos)), dtype=torch.float64))
    torch.testing.assert_close(total.double(), want, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=2e-6 if dtype == torch.float32 else 1e-12)
    total.backward()
    share = torch.sigmoid(torch.tensor(float(kappa*(neg_cos - pos_cos)), dtype=torch.float64)) # of the negative
    want_mu = kappa*share*torch.tensor([[0, 0], [-1, 0], [1, 0]], dtype=torch.float64)
    torch.testing.assert_close(mu.grad.double(), want_mu, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-5 if dtype == torch.float32 else 1e-10)


def test_equal_vectors():
    "A collapsed embedding: every similarity is 1, the loss counts segments"
    x = unit(torch.ones(10, 8)).requires_grad_()
    mu, ids = unit(torch.ones(6, 8)), torch.tensor([0, 0, 0, 1, 1, 2])
    own = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3])
    total, each = contrast(x, mu, own, ids, 50.)
    others = torch.tensor([2, 2, 2, 1, 1, 1])[own] # of its class; the last stands in for itself
    negatives = torch.tensor([3, 3, 3, 4, 4, 5])[own]
    torch.testing.assert_close(each, ((others + negatives)/others).log())
    total.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("emb_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_half_precision(emb_dtype, autocast):
    emb, labels, regions, tags = random_batch(dtype=torch.float32)
    emb = emb.to(emb_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        seg = make_segments(emb, labels, regions, tags, (2, 2), 3)
        losses = [relation_loss(Relation(r.name, r.code, 50, scope=r.scope, location=r.location), seg) for r in RELATIONS]
    sum(total for total, _ in losses).backward()
    assert emb.grad.dtype == emb_dtype and emb.grad.isfinite().all() and emb.grad.any()
    wide = make_segments(emb.detach().double(), labels, regions, tags, (2, 2), 3)
    if not autocast: assert torch.equal(wide.own, seg.own)
    for r, (total, each) in zip(RELATIONS, losses):
        assert total.dtype == each.dtype == torch.float32 and total.isfinite() and each.isfinite().all() and total > 0, r.name


def test_autocast_changes_no_value():
    seg, bank = problem(torch.float32)
    for r in RELATIONS[:3]: # feature affinity compares segments outside the loss
        plain = relation_loss(r, seg, bank.candidates(seg.protos))[1]
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype=dtype): assert torch.equal(relation_loss(r, seg, bank.candidates(seg.protos))[1], plain), r.name


def test_faults():
    seg, _ = problem()
    for bad, message in [(lambda: semantic_annotation(kappa=0), "concentration 0 must be above 0"), (lambda: semantic_annotation(kappa=float("nan")), "must be above 0"),
                         (lambda: image_similarity(weight=-1), "weight -1 must be finite and not negative"), (lambda: Relation("mine", same_class, 1, scope="world"), "'mine': scope 'world'"),
                         (lambda: relation_loss(Relation("mine", lambda p: p.label[:-1], 1), seg), "'mine': its code has shape")]:
        with pytest.raises(SpmlError, match=message): bad()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees():
    "In float64: the chunked form"
    x, mu, own, ids, image, match = small(n=3000, m=300)
    for more in (dict(), dict(image=image), dict(match=match)):
        total, each = contrast(x, mu, own, ids, 16., **more)
        gpu = {k: v.cuda() for k, v in more.items()}
        gpu_total, gpu_each = contrast(x.cuda(), mu.cuda(), own.cuda(), ids.cuda(), 16., **gpu)
        torch.testing.assert_close(gpu_each.cpu(), each)
        for one, other in zip(torch.autograd.grad(total, (x, mu)), torch.autograd.grad(gpu_total, (x, mu))): torch.testing.assert_close(other, one)

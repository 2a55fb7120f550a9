"""Properties P1-P18 that any correct implementation has, on random batches."""
from fractions import Fraction

import torch
from hypothesis import assume, given, settings, strategies as st

from conftest import random_batch
from spml_kit.method.contrast import contrast, contrast_plain, relation_loss
from spml_kit.core import UNLABELLED, VOID
from spml_kit.method.nets import locations, unit, with_location
from spml_kit.learn.losses import SpmlLoss
from spml_kit.method.memory import MemoryBank
from spml_kit.method.relations import feature_affinity, image_similarity, relation_sets, semantic_annotation, semantic_cooccurrence
from spml_kit.method.segments import cluster_means, grid_labels, make_segments, spherical_kmeans

S, C, I, A = RELATIONS = [semantic_annotation(6), semantic_cooccurrence(12), image_similarity(16), feature_affinity(12)]
seeds = given(st.integers(0, 10**6))
few = settings(max_examples=15, deadline=None)


def segments(emb, labels, regions, tags):
    return make_segments(emb, labels, regions, tags, (2, 2), 4)


def losses(seg, candidates=None):
    "Loss of each pixel under each relation"
    return torch.stack([relation_loss(r, seg, candidates)[1] for r in RELATIONS])


def totals(seg):
    return torch.stack([relation_loss(r, seg)[0] for r in RELATIONS])


def pixels_and_segments(seed, n=12, m=9, dim=5):
    "x (n,D), mu (m,D), own (n,), group (m,): every group has two segments or more"
    g = torch.Generator().manual_seed(seed)
    x, mu = (unit(torch.randn(k, dim, generator=g, dtype=torch.float64)) for k in (n, m))
    return x, mu, torch.randint(m, (n,), generator=g), torch.arange(m) % 3


def each(x, mu, own, ids, kappa=8., **more):
    return contrast(x, mu, own, ids, kappa, **more)[1]


@few
@seeds
def test_p1_scale_of_the_embedding(seed):
    emb, *rest = random_batch(seed)
    factor = torch.rand(len(emb), 1, *emb.shape[2:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)*9 + .1 # one for each pixel
    one, other = segments(emb, *rest), segments(factor*emb, *rest)
    assert torch.equal(one.own, other.own)
    torch.testing.assert_close(losses(one), losses(other), rtol=0, atol=1e-10)


@few
@seeds
def test_p2_order_of_segments(seed):
    x, mu, own, ids = pixels_and_segments(seed)
    order = torch.randperm(len(mu), generator=torch.Generator().manual_seed(seed))
    moved = each(x, mu[order], order.argsort()[own], ids[order])
    torch.testing.assert_close(moved, each(x, mu, own, ids), rtol=0, atol=1e-12)


@few
@seeds
def test_p2_order_of_images(seed):
    batch = random_batch(seed)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    one, other = segments(*batch), segments(*(o[order] for o in batch))
    blocks = [one.protos.image == b for b in order] # the segments of an image stay together, in their order
    for name in ("mu", "mu_loc", "label", "region"):
        assert torch.equal(torch.cat([getattr(one.protos, name)[b] for b in blocks]), getattr(other.protos, name))
    assert torch.equal(other.protos.image, torch.cat([torch.full((int(b.sum()),), i) for i, b in enumerate(blocks)]))
    pictures = lambda seg: torch.stack([seg.map(row, 0.) for row in losses(seg)], 1)
    torch.testing.assert_close(pictures(one)[order], pictures(other), rtol=0, atol=1e-10)
    torch.testing.assert_close(totals(one), totals(other), rtol=0, atol=1e-10)


@few
@seeds
def test_p3_more_negatives_more_positives(seed):
    x, mu, own, ids = pixels_and_segments(seed)
    loss = each(x, mu, own, ids)
    assert (loss > 0).all()
    assert each(x, mu, own, ids*0).abs().max() < 1e-12 # no negatives
    one_more = torch.cat([mu, unit(torch.ones(1, mu.shape[1], dtype=mu.dtype))])
    negative = each(x, one_more, own, torch.cat([ids, torch.tensor([3])]))
    assert (negative > loss).all()
    for group in range(3):
        positive, mine = each(x, one_more, own, torch.cat([ids, torch.tensor([group])])), ids[own] == group
        assert (positive[mine] < loss[mine]).all() and (positive[~mine] > loss[~mine]).all()


@few
@seeds
def test_p4_gradient_by_similarities(seed):
    "With unit vectors along the axes as prototypes, the gradient by a pixel is kappa times that by its similarities"
    g, m = torch.Generator().manual_seed(seed), 9
    x = torch.rand(12, m, generator=g, dtype=torch.float64)
    own, ids = torch.randint(m, (12,), generator=g), torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3]) # each has another of its group
    x.requires_grad_()
    contrast(x, torch.eye(m, dtype=torch.float64), own, ids, 7.)[0].backward()
    assert x.grad.sum(1).abs().max() < 1e-12
    assert not x.grad[torch.arange(12), own].any()
    others = torch.ones_like(x).bool().index_put((torch.arange(12), own), torch.tensor(False))
    positive = ids[own][:, None] == ids
    assert (x.grad[positive & others] < 0).all() and (x.grad[~positive] > 0).all()


@few
@seeds
def test_p5_segments_are_pure(seed):
    emb, labels, regions, tags = random_batch(seed)
    seg = segments(emb, labels, regions, tags)
    h, w = emb.shape[-2:]
    cluster = spherical_kmeans(seg_u(emb), grid_labels(h, w, (2, 2)), 4, 4, (labels != VOID).flatten(1))
    for values in (labels, regions, cluster.view_as(labels), torch.arange(3)[:, None, None].expand_as(labels)):
        inside = values.flatten()[seg.pixel]
        first = torch.zeros(len(seg.protos)).long().index_put((seg.own.flip(0),), inside.flip(0)) # of some pixel of each segment
        assert torch.equal(first[seg.own], inside)
    assert torch.equal(seg.protos.label[seg.own], labels.flatten()[seg.pixel]) and torch.equal(seg.protos.image[seg.own], seg.pixel // (h*w))
    assert torch.equal(seg.own.unique(), torch.arange(len(seg.protos))) and len(seg.protos) <= len(seg.own) == (labels != VOID).sum()
    assert (seg.protos.image.diff() >= 0).all()


def seg_u(emb):
    "Unit features with location of a batch, (B,h*w,D+2)"
    return with_location(unit(emb, 1).flatten(2).transpose(1, 2), locations(*emb.shape[-2:], dtype=emb.dtype))


@few
@seeds
def test_p6_kmeans_objective(seed):
    u = seg_u(random_batch(seed, n_images=1)[0])
    start, k = grid_labels(9, 8, (3, 3)), 9
    runs = [spherical_kmeans(u, start, k, t)[0] for t in range(8)]
    objective = torch.stack([(u[0]*cluster_means(u[0], z, k)[z]).sum() for z in runs])
    assert torch.equal(runs[0], start) and (objective.diff() > -1e-10).all() and objective[-1] > objective[0]


@few
@seeds
def test_p7_void_takes_no_part(seed):
    emb, labels, regions, tags = random_batch(seed)
    void = labels == VOID
    assume(void.any())
    other = random_batch(seed + 1)
    changed = torch.where(void[:, None], 100*other[0], emb), labels, torch.where(void, other[2], regions), tags
    one, two = segments(emb, labels, regions, tags), segments(*changed)
    assert torch.equal(one.own, two.own) and torch.equal(losses(one), losses(two))
    emb = emb.requires_grad_()
    totals(segments(emb, labels, regions, tags)).sum().backward()
    assert not emb.grad.movedim(1, -1)[void].any()


@few
@seeds
def test_p8_unlabelled_features(seed):
    seg = segments(*random_batch(seed, annotated=.5))
    unlabelled = seg.protos.label[seg.own] == UNLABELLED
    assume(unlabelled.any() and not unlabelled.all())
    before = totals(seg)
    assume(before[1] > 1e-6) # some images share no class
    v = torch.where(unlabelled[:, None], unit(torch.randn(seg.v.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)), seg.v)
    loc = locations(*seg.shape[1:], dtype=torch.float64).repeat(seg.shape[0], 1)[seg.pixel]
    seg.v, seg.u = v, with_location(v, loc) # the assignment is held
    seg.protos.mu, seg.protos.mu_loc = (cluster_means(o, seg.own, len(seg.protos)) for o in (seg.v, seg.u))
    after = totals(seg)
    assert after[0] == before[0] and (after[1:3] != before[1:3]).all()


@few
@seeds
def test_p9_background_is_no_shared_class(seed):
    emb, labels, regions, tags = random_batch(seed)
    flipped = tags.clone()
    flipped[:, 0] = ~tags[:, 0]
    one, two = (relation_loss(C, segments(emb, labels, regions, t)) for t in (tags, flipped))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_p10_images_that_share_a_class():
    emb, labels, regions, _ = random_batch()
    tags = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 1]]).bool() # 0 and 1 share class 2, 2 shares background only
    seg = segments(emb, labels, regions, tags)
    anchor, candidate, positive = relation_sets(C, seg)
    pixel, segment = seg.protos.image[seg.own][:, None], seg.protos.image
    assert anchor.all() and candidate.all() and torch.equal(positive, (pixel == 2) == (segment == 2))


@few
@seeds
def test_p11_memory(seed):
    seg, bank, nothing = segments(*random_batch(seed)), MemoryBank(2), MemoryBank(0)
    for s in (1, 2, 3):
        for b in (bank, nothing): b.push(segments(*random_batch(seed + s)).protos)
    assert len(nothing) == 0 and torch.equal(losses(seg, nothing.candidates(seg.protos)), losses(seg))
    assume(losses(seg)[1].max() > 1e-6) # some images share no class
    with_bank = losses(seg, bank.candidates(seg.protos))
    assert torch.equal(with_bank[2], losses(seg)[2])
    for i in (0, 1, 3): assert not torch.equal(with_bank[i], losses(seg)[i])


@few
@seeds
def test_p14_fast_equals_dense(seed):
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        seg, bank = segments(*random_batch(seed, dtype=dtype)), MemoryBank(1)
        bank.push(segments(*random_batch(seed + 1, dtype=dtype)).protos)
        candidates = bank.candidates(seg.protos)
        for r in RELATIONS:
            protos = candidates if r.scope == "memory" else seg.protos
            anchor, candidate, positive = relation_sets(r, seg, candidates)
            x, mu = (seg.u, protos.mu_loc) if r.location else (seg.v, protos.mu)
            dense = contrast_plain(x[anchor].double(), mu.double(), seg.own[anchor], candidate[anchor], positive[anchor], r.kappa)
            found = relation_loss(r, seg, candidates)[1]
            torch.testing.assert_close(found[anchor].double(), dense, rtol=0, atol=tolerance)
            assert not found[~anchor].any()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 13), st.integers(1, 13))
def test_p17_flipped_bands(h, w, ky, kx):
    "Symmetric unless a pixel lies halfway between bands, where rounding half to even is not"
    halfway = lambda n, k: any(Fraction(p*(k - 1), n - 1) % 1 == Fraction(1, 2) for p in range(n)) if n > 1 else False
    assume(not halfway(h, ky) and not halfway(w, kx))
    bands = grid_labels(h, w, (ky, kx)).view(h, w)
    for axis in (0, 1):
        widths = bands.movedim(axis, 0)[:, 0].unique_consecutive(return_counts=True)[1]
        assert h == 1 or w == 1 or torch.equal(widths, widths.flip(0))
        mirrored = bands.flip(axis)
        assert torch.equal(mirrored.unique(return_inverse=True)[1], mirrored) # the same ids
        assert len(torch.stack([bands.flatten(), mirrored.flatten()]).unique(dim=1)[0]) == bands.max() + 1 # one to one


def test_p18_scale_of_the_weights():
    emb, labels, regions, tags = random_batch()
    logits = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def total_and_gradient(w_s, w_c, w_i, head):
        e, l = emb.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = SpmlLoss([semantic_annotation(6, w_s), semantic_cooccurrence(12, w_c), image_similarity(16, w_i)], (2, 2), 4, head_weight=head)((e, l), labels, regions, tags)
        return loss, *torch.autograd.grad(loss, (e, l))
    for small, large in zip(total_and_gradient(.3, .3, .1, .3), total_and_gradient(1, 1, 1/3, 1)):
        assert large.any()
        torch.testing.assert_close(small.double(), .3*large.double(), rtol=1e-6, atol=1e-9)

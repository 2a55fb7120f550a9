"""Relations between segments against their plain definitions; settings that are refused."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import random_batch
from spml_kit.core import UNLABELLED, SpmlError
from spml_kit.method.nets import unit
from spml_kit.method.relations import Relation, feature_affinity, image_similarity, near_label, nearest_labels, relation_sets, same_class, semantic_annotation, semantic_cooccurrence
from spml_kit.method.segments import make_segments


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("threshold", [-1., .3, .95])
def test_nearest_labels_by_their_definition(across, threshold, seed):
    "segment by segment; in some images nobody has a label, in some everybody"
    g = torch.Generator().manual_seed(seed)
    mu, image = unit(torch.randn(30, 4, generator=g, dtype=torch.float64)), torch.randint(5, (30,), generator=g)
    label = torch.where(torch.rand(30, generator=g) < torch.rand(5, generator=g).round(decimals=1)[image], torch.randint(3, (30,), generator=g), UNLABELLED)
    found, lender, cosine = nearest_labels(mu, label, image, threshold, across)
    for i in range(30):
        lenders = [j for j in range(30) if label[j] < UNLABELLED and (across or image[i] == image[j])]
        if label[i] < UNLABELLED: near, who = 1., i
        else: near, who = max(((float(mu[i] @ mu[j]), j) for j in lenders), default=(-float("inf"), -1))
        assert int(lender[i]) == who and float(cosine[i]) == pytest.approx(near)
        assert int(found[i]) == (int(label[who]) if near >= threshold else -1)


def batch(seed): return make_segments(*random_batch(seed, regions=3), (2, 2), 2)


PLAIN = { # of two segments a (the pixel's) and b: may a ask, may it compare itself with b, are they alike?
    "annotation": (lambda a: a.label < UNLABELLED, lambda a, b: b.label < UNLABELLED, lambda a, b: a.label == b.label),
    "cooccurrence": (lambda a: True, lambda a, b: True, lambda a, b: bool((a.tags & b.tags)[1:].any())),
    "similarity": (lambda a: True, lambda a, b: a.image == b.image, lambda a, b: a.region == b.region)}


class One:
    "A segment by itself"
    def __init__(self, protos, k): self.label, self.region, self.image, self.tags = int(protos.label[k]), int(protos.region[k]), int(protos.image[k]), protos.tags[protos.image[k]].numpy()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
@pytest.mark.parametrize("relation", [semantic_annotation(), semantic_cooccurrence(), image_similarity()], ids=lambda r: r.name)
def test_sets_are_what_two_segments_say(relation, seed, memory):
    seg, (asks, compares, alike) = batch(seed), PLAIN[relation.name]
    candidates = seg.protos.cat(batch(seed + 1).protos) if memory else None
    anchor, candidate, positive = relation_sets(relation, seg, candidates)
    protos = candidates if memory and relation.scope == "memory" else seg.protos
    every = [One(protos, k) for k in range(len(protos))]
    for own in seg.own.unique().tolist():
        a, pixels = every[own], seg.own == own
        may = torch.tensor([asks(a) and compares(a, b) for b in every])
        assert (anchor[pixels] == asks(a)).all() and (candidate[pixels] == may).all()
        assert (positive[pixels] == may & torch.tensor([alike(a, b) for b in every])).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([-1., .2, .95]), st.sampled_from(["all", "out"]))
def test_affinity_is_that_of_the_labels_that_were_lent(seed, threshold, unmatched):
    seg = batch(seed)
    found = nearest_labels(seg.protos.mu_loc, seg.protos.label, seg.protos.image, threshold)[0].tolist()
    anchor, candidate, positive = relation_sets(feature_affinity(threshold=threshold, unmatched=unmatched), seg)
    for n, own in enumerate(seg.own.tolist()):
        there = [unmatched == "all" or min(found[own], f) >= 0 for f in found]
        assert bool(anchor[n]) == (unmatched == "all" or found[own] >= 0) and candidate[n].tolist() == there
        assert positive[n].tolist() == [t and (f == found[own] or min(f, found[own]) < 0) for t, f in zip(there, found)] # who has no label is like everybody


@pytest.mark.parametrize("make, says", [(lambda: Relation("own", same_class, 0), "'own': concentration 0 must be above 0"), (lambda: Relation("own", same_class, 61), "concentration 61"), (lambda: Relation("own", same_class, 6, -1), "weight -1"),
    (lambda: Relation("own", same_class, 6, anchors=0), "share of anchors 0"), (lambda: Relation("own", same_class, 6, anchors=1.1), "share of anchors 1.1"), (lambda: Relation("own", same_class, 6, scope="set"), "scope 'set' is not image, batch or memory"),
    (lambda: feature_affinity(threshold=1.5), "threshold 1.5 must be a cosine"), (lambda: feature_affinity(unmatched="some"), "unmatched 'some' is not one of")])
def test_settings_that_are_refused(make, says):
    with pytest.raises(SpmlError, match=says): make()


def test_a_code_has_one_entry_a_segment():
    protos = batch(0).protos
    with pytest.raises(SpmlError, match=rf"'own': its code has shape \(1,\), but there are {len(protos)} segments"): Relation("own", lambda p: p.label[:1], 6).groups(protos)
    ids, match = Relation("own", near_label, 6).groups(protos)
    assert ids.shape == (len(protos),) and torch.equal(match, match.T) and match.diagonal().all()

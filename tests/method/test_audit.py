"""Relations held against masks: shares by a plain loop over pixels, void, images without labels."""
import numpy as np
import pytest
import torch

from spml_kit.method.audit import audit, true_classes
from spml_kit.method.recipes import paper_relations
from spml_kit.method.relations import relation_sets
from spml_kit.method.segments import make_segments


def batch(seed, B=3, C=4, size=12):
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(n, (B, size//4, size//4), generator=g).repeat_interleave(4, 1).repeat_interleave(4, 2)
    masks, regions = draw(C), draw(5)
    labels = torch.where(torch.rand(B, size, size, generator=g) < .4, masks, 254)
    labels[0, :2], masks[1, :3] = 255, 255
    tags = torch.stack([(torch.arange(C)[:, None] == m[m < C]).any(1) for m in masks])
    return torch.randn(B, 8, size, size, generator=g), labels, regions, tags, masks


@pytest.mark.parametrize("seed", range(2))
def test_shares_are_those_of_a_plain_loop(seed):
    emb, labels, regions, tags, masks = batch(seed)
    relations = paper_relations("scribbles", changes={"affinity": {"weight": .5, "threshold": .2}})
    found = audit(relations, emb, labels, regions, tags, masks, grid=(3, 3))
    seg = make_segments(emb, labels, regions, tags, (3, 3))
    y, kind = (o.numpy() for o in true_classes(seg, masks, 4))
    own = seg.own.numpy()
    for s in range(len(seg.protos)):
        inside = [int(c) for c in y[own == s] if c < 4]
        assert int(kind[s]) == (max(range(4), key=inside.count) if inside else 255)
    for r in relations:
        anchor, candidate, positive = relation_sets(r, seg)
        x, mu = (seg.u, seg.protos.mu_loc) if r.location else (seg.v, seg.protos.mu)
        near, right, missed = (r.kappa*(x.double() @ mu.double().T)).exp().numpy(), [], []
        anchor, candidate, positive = anchor.numpy(), candidate.numpy(), positive.numpy()
        for i in range(len(y)):
            if not anchor[i] or y[i] == 255: continue
            others = [s for s in range(len(mu)) if candidate[i, s] and s != own[i]]
            pos, same = [s for s in others if positive[i, s]], [s for s in others if kind[s] == y[i]]
            if pos: right.append(sum(near[i, s] for s in pos if s in same)/sum(near[i, s] for s in pos))
            if same: missed.append(sum(near[i, s] for s in same if s not in pos)/sum(near[i, s] for s in same))
        assert found.right[r.name] == pytest.approx(100*np.mean(right), abs=1e-3)
        assert found.missed[r.name] == pytest.approx(100*np.mean(missed), abs=1e-3)
    assert found.gradient.sum() == pytest.approx(100)


def test_anchors_drawn_in_training_are_all_asked():
    few, all_ = (audit(paper_relations("scribbles", changes={"cooccurrence": {"anchors": a}}), *batch(9)) for a in (.1, 1.))
    assert few.equals(all_)


def test_the_gradient_of_masks_agrees_with_itself():
    emb, _, regions, tags, masks = batch(5)
    assert audit(paper_relations("scribbles")[:1], emb, masks, regions, tags, masks).agreement["annotation"] == pytest.approx(1, abs=1e-5)


def test_nothing_labelled_asks_nobody():
    emb, labels, regions, tags, masks = batch(6)
    found = audit(paper_relations("scribbles"), emb, labels.masked_fill(labels < 4, 254), regions, tags, masks)
    assert found.asked["annotation"] == 0 and np.isnan(found.right["annotation"]) and found.gradient["annotation"] == 0

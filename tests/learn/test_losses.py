"""The parts of the loss: weighted sum, relations without weight, labelled pixels."""
import pytest
import torch
from torch import nn

from conftest import random_batch
from spml_kit.core import UNLABELLED, VOID
from spml_kit.learn.losses import SpmlLoss, labelled_cross_entropy
from spml_kit.method.contrast import relation_loss
from spml_kit.method.relations import image_similarity, semantic_annotation, semantic_cooccurrence
from spml_kit.method.segments import make_segments
from test_learner import learner


def test_total_is_the_weighted_sum():
    emb, labels, regions, tags = random_batch(dtype=torch.float32)
    logits, relations = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(0)), [semantic_annotation(6, .7), semantic_cooccurrence(12, .5), image_similarity(16, .1)]
    loss = SpmlLoss(relations, (2, 2), 3, memory=1, head_weight=.3)
    assert loss.names == ("annotation", "cooccurrence", "similarity", "head")
    seg = make_segments(emb, labels, regions, tags, (2, 2), 3)
    for bank in (None, seg.protos): # first step, second step
        candidates = seg.protos if bank is None else seg.protos.cat(bank)
        parts = [relation_loss(r, seg, candidates)[0] for r in relations]
        want = sum(r.weight*p for r, p in zip(relations, parts)) + .3*labelled_cross_entropy(logits, labels)
        torch.testing.assert_close(loss((emb, logits), labels, regions, tags), want)
        loss.after_step()
    loss.means()
    loss((emb, logits), labels, regions, tags)
    assert [*loss.means().values()] == pytest.approx([float(p) for p in (*parts, labelled_cross_entropy(logits, labels))]) # means start anew
    assert torch.equal(loss.eval()((emb, logits), labels, regions, tags), labelled_cross_entropy(logits, labels))


def test_relation_of_weight_zero_costs_nothing():
    def explode(protos): raise AssertionError("computed in vain")
    from spml_kit.method.relations import Relation
    learn = learner(relations=[Relation("unused", explode, 6, weight=0), semantic_annotation()])
    learn.fit_poly(1)
    assert learn.history[0]["unused"] is None and learn.history[0]["annotation"] > 0


@pytest.mark.parametrize("size", [(8, 8), (16, 12), (5, 7)])
def test_cross_entropy_counts_labelled_pixels_only(size):
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 4, 8, 8, generator=g), torch.randint(4, (2, *size), generator=g)
    labels[:, ::2] = UNLABELLED
    labels[:, :, ::3] = VOID
    large = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False).log_softmax(1)
    want = -torch.stack([large[b, labels[b, y, x], y, x] for b in range(2) for y in range(size[0]) for x in range(size[1]) if labels[b, y, x] < 4]).mean()
    torch.testing.assert_close(labelled_cross_entropy(logits, labels), want)
    assert labelled_cross_entropy(logits.requires_grad_(), torch.full_like(labels, UNLABELLED)) == 0

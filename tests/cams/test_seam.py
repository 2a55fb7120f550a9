"""SEAM: shared evidence, seeds, the parts of its loss by hand, and what each part teaches."""
import numpy as np
import pytest
import torch

from spml_kit.cams.classifier import TagNet
from spml_kit.cams.seam import SeamLoss, scaled_maps, seed_maps, share_evidence
from test_classifier import SIZE, learner, network


def test_shared_evidence_is_a_weighted_mean():
    g = torch.Generator().manual_seed(0)
    seeds, features = torch.rand(2, 3, 4, 5, generator=g, dtype=torch.float64), torch.randn(2, 6, 4, 5, generator=g, dtype=torch.float64)
    out = share_evidence(seeds, features)
    for b in range(2):
        f = features[b].flatten(1)
        f = f/f.norm(dim=0)
        for i in range(20):
            w = (f[:, i] @ f).relu()
            torch.testing.assert_close(out[b].flatten(1)[:, i], (seeds[b].flatten(1)*w).sum(1)/w.sum())
    assert (out.amin((2, 3)) >= seeds.amin((2, 3)) - 1e-12).all() and (out.amax((2, 3)) <= seeds.amax((2, 3)) + 1e-12).all()


def test_seeds_hold_one_class_a_cell_even_where_two_are_equal():
    maps = scaled_maps(torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)) - .3)
    maps[0, :2, 0, 0] = 1
    seeds = seed_maps(maps)
    assert ((seeds[:, 1:] > 0).sum(1) <= 1).all()
    torch.testing.assert_close(seeds.sum(1), torch.ones(2, 5, 6))
    assert seeds[0, 1, 0, 0] == 1 and seeds[0, 0, 0, 0] == 0


def test_parts_of_the_seam_loss_by_hand():
    g = torch.Generator().manual_seed(1)
    raw1, raw2 = (torch.randn(2, 3, 4, 4, generator=g) for _ in range(2))
    refined1, refined2 = (torch.rand(2, 4, 4, 4, generator=g) for _ in range(2))
    tags = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0]]).bool()
    loss = SeamLoss(hardest=.2, empty=.25)
    total = loss((raw1, refined1, raw2, refined2), None, None, tags)
    parts = loss.means()
    assert float(total) == pytest.approx(sum(parts.values()))
    told = tags.float()[:, :, None, None]
    one, two = (scaled_maps(r)*told[:, 1:] for r in (raw1, raw2))
    assert parts["equivariance"] == pytest.approx(float((one - two).abs().mean()))
    worst = lambda seeds, refined: np.mean([sorted((seeds[b]*told[b] - (scaled_maps(refined)*told)[b]).abs().flatten().tolist())[-12:] for b in range(2)])  # a fifth of 64
    assert parts["cross"] == pytest.approx(worst(seed_maps(two), refined1) + worst(seed_maps(one), refined2), rel=1e-5)
    least = lambda refined: np.mean([sorted((refined*told)[b, 1:].amax(0).flatten().tolist())[:4] for b in range(2)])
    assert parts["pooling"] == pytest.approx((least(refined1) + least(refined2))/2, rel=1e-5)


def test_raw_maps_are_those_of_the_classifier():
    net, x = network("seam"), torch.rand(1, 3, SIZE, SIZE)
    refined, net.refine = net.maps(x), False
    torch.testing.assert_close(net.maps(x), TagNet.maps(net, x))
    assert refined.min() >= 0 and refined.max() <= 1 + 1e-5 and not torch.equal(refined, net.maps(x))


def test_refined_maps_teach_the_comparison_only_and_raw_maps_the_backbone():
    learn = learner(method="seam")
    learn.model.train()
    x = torch.rand(2, 3, SIZE, SIZE)
    raw, refined = learn.model.look(x)
    refined[:, 1].square().sum().backward()
    heard = {n.split(".")[0] for n, p in learn.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert heard == {"middle", "last", "compare"}

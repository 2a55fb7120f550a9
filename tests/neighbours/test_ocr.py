"OCR: regions, attention and the whole head against plain forms in float64; its properties; learners, pipelines, refusals."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import assert_equal, quiet, weights
from spml_kit.core import SpmlError
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.infer.crf_loss import CrfCrossEntropy
from spml_kit.infer.scores import predict_head
from spml_kit.learn.head import head_learner
from spml_kit.learn.learner import create_model, head_score, kit_learner, spml_learner, spml_splitter
from spml_kit.learn.losses import COARSE_WEIGHT, CrossEntropy, labelled_cross_entropy
from spml_kit.method.nets import create_head
from spml_kit.method.recipes import RECIPES
from spml_kit.neighbours.adaptive import AdaptiveLoss
from spml_kit.neighbours.ocr import (OcrHead, TrueRegionsCB, attention_accuracy, image_context, ocr_head, region_attention, region_prototypes,
                                     soft_regions, true_regions)
from spml_kit.runs.pipelines import PIPELINES, Pipeline, feature_head_plan

SIZE, C, D = 64, 13, 8
TINY = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=D, grid=(4, 4), iterations=3, crop=SIZE, bs=3)


def made(seed=0, **kwargs):
    torch.manual_seed(seed)
    return OcrHead(6, D, 5, **kwargs).double()


def given(seed=0, n=2, size=(6, 5), middle=(3, 4)):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return [None, draw(n, 6, *middle), None, draw(n, 9, 2, 2)], draw(n, D, *size)


def batches(kind="full", n=6):
    weak, held_out = WeakSet(SceneSet(n, seed=3, size=SIZE), kind, regions=12), SceneSet(3, seed=3, size=SIZE, start=100)
    return weak_dls(weak, held_out, bs=3, crop=SIZE, steps=2, device=torch.device("cpu"))


def fitted(learn, rounds=1, **kwargs):
    with quiet(learn).no_bar(): learn.fit_poly(rounds, **kwargs)
    return learn


# against plain forms

def plain_head(head, maps, emb, tags=None):
    "Pixel by pixel, class by class, as the paper writes it: the mean of the regions first, its layer after"
    coarse = head.coarse(maps[1])
    up = F.interpolate(coarse, emb.shape[-2:], mode="bilinear", align_corners=False)
    x, q = head.pixel(emb), head.query(head.pixel(emb))
    B, K, h, w = up.shape
    pixels, mean = [(i, j) for i in range(h) for j in range(w)], []
    for b in range(B):
        f = []
        for k in range(K):
            e = [(up[b, k, i, j]).exp() for i, j in pixels]
            f.append(sum(e_*x[b, :, i, j] for e_, (i, j) in zip(e, pixels))/sum(e))
        f = torch.stack(f)
        keys, values, rows = head.key(f), head.value(f), []
        for i, j in pixels:
            who = [k for k in range(K) if tags is None or tags[b, k] or not tags[b].any()]
            e = [((q[b, :, i, j]*keys[k]).sum()/len(keys[k])**.5).exp() for k in who]
            rows.append(sum(e_/sum(e)*values[k] for e_, k in zip(e, who)))
        mean.append(head.spread(torch.stack(rows)).T.view(-1, h, w))
    return head.last(torch.cat([head.norm(torch.stack(mean)), x], 1)), coarse


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tagged", [False, True])
def test_the_head_and_its_gradients_are_those_of_the_plain_form(seed, tagged):
    head, (maps, emb) = made(seed, dropout=0.).train(), given(seed)
    tags = torch.tensor([[True, False, True, True, False], [False]*5]) if tagged else None
    for o in (maps[1], emb): o.requires_grad_()
    ours, theirs = head.context(maps, emb, tags), plain_head(head, maps, emb, tags)
    torch.testing.assert_close(ours.logits, theirs[0])
    torch.testing.assert_close(ours.coarse, theirs[1])
    inputs = [maps[1], emb, *head.parameters()]
    loss = lambda logits, coarse: (logits**2).sum() + (coarse**3).sum()
    for a, b in zip(torch.autograd.grad(loss(ours.logits, ours.coarse), inputs), torch.autograd.grad(loss(*theirs), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tagged", [False, True])
def test_gradients_by_differences(tagged):
    head, (maps, emb) = made(dropout=0.).eval(), given(1, 1, (3, 2), (2, 2))
    tags = torch.tensor([[True, True, False, False, True]]) if tagged else None
    f = lambda m, v: head.context([m, m], v, tags).logits
    assert torch.autograd.gradcheck(f, (maps[1].requires_grad_(), emb.requires_grad_()))


# properties of the specification

@pytest.mark.parametrize("seed", range(4))
def test_regions_are_means_and_do_not_know_of_constants(seed):
    g = torch.Generator().manual_seed(seed)
    coarse, x = 5*torch.randn(2, 5, 4, 3, generator=g, dtype=torch.float64), torch.randn(2, 42, 7, generator=g, dtype=torch.float64)
    m = soft_regions(coarse, (7, 6))
    torch.testing.assert_close(m.sum(2), torch.ones(2, 5, dtype=torch.float64))
    f = m @ x
    assert (f <= x.amax(1, keepdim=True) + 1e-12).all() and (f >= x.amin(1, keepdim=True) - 1e-12).all()
    moved = soft_regions(coarse + torch.randn(2, 5, 1, 1, generator=g, dtype=torch.float64), (7, 6)) @ x
    torch.testing.assert_close(moved, f)


def test_coarse_logits_of_zero_give_one_context_to_all():
    head, (maps, emb) = made().eval(), given()
    nn.init.zeros_(head.coarse[-1].weight); nn.init.zeros_(head.coarse[-1].bias)
    seen, mean = head.context(maps, emb), head.pixel(emb).flatten(2).mean(2)
    torch.testing.assert_close(seen.prototypes, mean[:, None].expand_as(seen.prototypes))
    torch.testing.assert_close(seen.attention, torch.full_like(seen.attention, 1/5))
    context = (head.spread(head.value(seen.prototypes)).mT @ seen.attention.mT)
    torch.testing.assert_close(context, context[..., :1].expand_as(context))


@pytest.mark.parametrize("training", [False, True])
def test_permuted_pixels_permute_the_output(training):
    head, g = made(kernel=1, dropout=0.).train(training), torch.Generator().manual_seed(0)
    (maps, emb), order = given(size=(4, 5), middle=(4, 5)), torch.randperm(20, generator=g)
    moved = lambda o: o.flatten(2)[..., order].view_as(o)
    one, other = head.context([maps[1]], emb), head.context([moved(maps[1])], moved(emb))
    torch.testing.assert_close(other.logits, moved(one.logits))
    torch.testing.assert_close(other.attention, one.attention[:, order])


def test_absent_classes_get_exactly_nothing_and_no_gradient():
    head, (maps, emb) = made().eval(), given()
    tags = torch.tensor([[True, False, True, False, False], [False]*5])
    seen = head.context(maps, emb, tags)
    assert (seen.attention[0][:, ~tags[0]] == 0).all() and (seen.attention[1] > 0).all() # of an untagged image nothing is known
    torch.testing.assert_close(seen.attention.sum(2), torch.ones_like(seen.attention[..., 0]))
    slope, = torch.autograd.grad(seen.logits[0].sum(), seen.coarse)
    assert (slope[0, ~tags[0]] == 0).all() and slope[0, tags[0]].abs().amax((1, 2)).min() > 0 # the middle of an absent region moves nothing


def test_one_class_one_pixel_and_extreme_logits():
    torch.manual_seed(0)
    lone = OcrHead(6, D, 1).eval()
    assert torch.isfinite(lone([torch.randn(1, 6, 1, 1)], torch.randn(1, D, 1, 1))).all()
    m = soft_regions(torch.tensor([[[[1e30, -1e30]], [[0., 0.]]]]), (1, 2))
    assert m.tolist() == [[[1, 0], [.5, .5]]]


# true regions

def test_true_regions_are_even_over_the_class_and_skip_void():
    labels = torch.tensor([[[0, 0, 1], [254, 255, 1]], [[255]*3]*2])
    m = true_regions(labels, 3, (2, 3))
    assert m[0].tolist() == [[.5, .5, 0, 0, 0, 0], [0, 0, .5, 0, 0, .5], [0]*6] and not m[1].any()


def test_masks_take_the_place_of_soft_regions_and_go():
    head, (maps, emb) = made().eval(), given(size=(2, 3))
    soft = head.context(maps, emb)
    head.masks = torch.tensor([[[0, 0, 1], [254, 255, 1]], [[255]*3]*2])
    seen = head.context(maps, emb)
    torch.testing.assert_close(seen.prototypes[0, 1], head.pixel(emb)[0, :, :, 2].mean(1))
    assert (seen.attention[0, :, 2:] == 0).all() and torch.isfinite(seen.logits).all()
    head.masks = None
    assert torch.equal(head.context(maps, emb).logits, soft.logits)


def test_the_upper_bound_says_that_it_uses_masks(capsys, tmp_path):
    dls = batches()
    learn = kit_learner(dls, create_model(TINY, C, False, "ocr"), CrossEntropy(), TINY, "bound", spml_splitter, [head_score(dls)], path=tmp_path, cbs=[TrueRegionsCB()])
    fitted(learn)
    assert "uses masks" in capsys.readouterr().out and learn.model.head.masks is None


# measures

def test_attention_accuracy_by_hand():
    attention = torch.tensor([[[.7, .3], [.2, .8], [.5, .5], [.9, .1]]])
    assert attention_accuracy(attention, torch.tensor([[[0, 1], [255, 1]]]), (2, 2)) == pytest.approx((.7 + .8 + .1)/3)
    assert np.isnan(attention_accuracy(attention, torch.full((1, 2, 2), 254), (2, 2)))


def test_region_prototypes_are_unit_means():
    v = F.normalize(torch.randn(2, D, 3, 4), dim=1)
    m = soft_regions(torch.randn(2, 5, 3, 4), (3, 4))
    out = region_prototypes(m, v)
    for b in range(2):
        for k in range(5):
            mean = (m[b, k]*v[b].flatten(1)).sum(1)
            torch.testing.assert_close(out[b, k], mean/mean.norm())


# in the kit

@pytest.mark.parametrize("loss", [CrossEntropy, CrfCrossEntropy, lambda: AdaptiveLoss(0, 1.)])
def test_coarse_logits_count_in_training_alone(loss):
    torch.manual_seed(0)
    emb, logits, coarse = torch.randn(1, D, 4, 4), torch.randn(1, C, 4, 4), torch.randn(1, C, 2, 2)
    labels, loss = torch.randint(0, C, (1, 8, 8)), loss().train()
    loss.images = torch.rand(1, 3, 8, 8)
    alone, beside = (float(loss((emb, *o), labels, None, None)) for o in ((logits,), (logits, coarse)))
    assert beside - alone == pytest.approx(COARSE_WEIGHT*float(labelled_cross_entropy(coarse, labels)), rel=1e-4)


@pytest.mark.parametrize("network", ["EmbedNet", "FrozenNet"])
@pytest.mark.parametrize("method", ["spml", "cross_entropy"])
def test_every_part_of_the_head_learns(network, method, tmp_path):
    learn = spml_learner(batches("scribbles"), method=method, recipe=TINY.but(network=network), path=tmp_path, head="ocr")
    before = weights(learn)
    fitted(learn)
    still = [k for k, v in weights(learn).items() if k.startswith("head.") and torch.equal(v, before[k])]
    assert not still and np.isfinite(learn.history[-1]["loss"])
    assert predict_head(learn.model, SceneSet(1, size=SIZE).image(0)).max() < C


def test_beside_spml_the_head_leaves_the_embedding_alone(tmp_path):
    torch.manual_seed(0)
    model = create_model(TINY, C, True, "ocr").train()
    _, logits, coarse = model(torch.rand(2, 3, SIZE, SIZE))
    (logits.sum() + coarse.sum()).backward()
    assert all(p.grad is None for p in model.embed.parameters())


def test_resumed_and_again_the_same_numbers(tmp_path):
    def run(folder, *rounds):
        for n in rounds: learn = fitted(spml_learner(batches(), method="cross_entropy", recipe=TINY, path=tmp_path/folder, head="ocr"), 2, resume=True, **n)
        return learn
    class Stop(Exception): pass
    from fastai.callback.core import Callback
    class StopCB(Callback):
        order = 100
        def after_epoch(self):
            if self.epoch == 0: raise Stop("stopped")
    whole = run("whole", {})
    with pytest.raises(Stop): run("broken", dict(cbs=StopCB()))
    assert_equal(weights(run("broken", {})), weights(whole))
    assert_equal(weights(run("again", {})), weights(whole))
    with pytest.raises(SpmlError): fitted(spml_learner(batches(), method="cross_entropy", recipe=TINY, path=tmp_path/"whole"), 2, resume=True) # another head


def test_a_second_head_on_the_frozen_embedding(tmp_path):
    trained = create_model(TINY, C)
    learn = head_learner(batches(), trained, TINY, path=tmp_path, head="ocr")
    before = weights(learn)
    fitted(learn)
    assert isinstance(learn.model.head, OcrHead)
    for k, v in weights(learn).items(): assert torch.equal(v, before[k]) == k.startswith("embed."), k


def test_the_pipeline_of_scribbles(tmp_path):
    weak, valid = WeakSet(SceneSet(4, size=SIZE), "scribbles", regions=12), SceneSet(2, size=SIZE, start=100)
    run = lambda **more: Pipeline(weak, valid, "scribbles", tmp_path/"run", TINY, 1, 2, 2, refine=("regions",), progress=False, **more).run()
    pipe = run(head="ocr")
    assert all(isinstance(l.model.head, OcrHead) for l in pipe.learners.values())
    with pytest.raises(SpmlError, match="other settings"): run()


@pytest.mark.parametrize("more,message", [
    (dict(head="ocrr"), "did you mean 'ocr'"), (dict(head="ocr", plan=feature_head_plan(PIPELINES["scribbles"])), "choose one of them"),
    (dict(head="ocr", recipe=TINY.but(head_enlarged=True)), "head_enlarged must be")])
def test_refused_before_anything_is_trained(more, message, tmp_path):
    weak = WeakSet(SceneSet(2, size=SIZE), "scribbles", regions=12)
    with pytest.raises(SpmlError, match=message): Pipeline(weak, SceneSet(2, size=SIZE), "scribbles", tmp_path/"run", **dict(recipe=TINY) | more)
    assert not (tmp_path/"run").exists()


def test_names_of_heads():
    net = create_model(TINY, C).embed
    assert isinstance(create_head("spml_kit.neighbours.ocr:ocr_head", net, D, C), OcrHead)
    with pytest.raises(SpmlError, match="head 'other' is not one of"): create_head("other", net, D, C)
    with pytest.raises(SpmlError, match="choose one of them"): head_learner(batches(), create_model(TINY, C), TINY, sees="features", head="ocr")


@pytest.mark.parametrize("training", [True, False])
def test_making_a_head_leaves_the_network_as_it_was(training):
    net = create_model(TINY.but(embed={**TINY.embed, "freeze_bn": False}), C).embed.train(training)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    ocr_head(net, D, C)
    assert net.training is training
    assert_equal(net.state_dict(), before)


def test_an_image_of_any_size_and_its_tags():
    torch.manual_seed(0)
    model, image = create_model(TINY, C, head="ocr"), np.random.default_rng(0).integers(0, 256, (50, 77, 3), dtype=np.uint8)
    tags = np.arange(C) < 2
    seen, (h, w) = image_context(model, image, tags)
    assert seen.logits.shape == (1, C, h, w) and (seen.attention[..., 2:] == 0).all()
    torch.testing.assert_close(region_attention(torch.zeros(1, 3, 2), torch.zeros(1, 4, 2)), torch.full((1, 3, 4), .25))

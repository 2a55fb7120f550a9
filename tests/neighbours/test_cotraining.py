"Co-training: divergence, ramp and adversaries against their properties and plain forms, who learns from what, whole runs, faults."
import math
import warnings
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from conftest import assert_equal, quiet, weights
from spml_kit.core import SpmlError, UNLABELLED, VOID
from spml_kit.data.batches import weak_dls
from spml_kit.data.half_labelled import HalfLabelled, half_batches
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.learn.losses import labelled_cross_entropy
from spml_kit.method.recipes import RECIPES
from spml_kit.neighbours.cotraining import (COTRAINING, CoNets, adversary, agreed_labels, cotraining_learner, diversity_loss, fit_cotraining, pixel_divergence,
                                            ramp)
from spml_kit.runs.semi import HalfPlan, fit_half

SIZE, SEEDS = 32, st.integers(0, 2**31 - 1)
RECIPE = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), bs=4, crop=SIZE, warmup=1)


def logits_of(n, seed, scale=3., shape=(2, 4, 3, 5)): return scale*torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# divergence

def plain_divergence(logits):
    "Entropy of the mean less mean of the entropies"
    p = logits.softmax(2)
    entropy = lambda q: -(q*q.log()).sum(-3)
    return entropy(p.mean(0)) - entropy(p).mean(0)


@settings(deadline=None)
@given(st.integers(2, 4), SEEDS, st.floats(.1, 10))
def test_divergence_and_its_gradients_are_those_of_the_plain_form(n, seed, scale):
    one, other = (logits_of(n, seed, scale).requires_grad_() for _ in range(2))
    fast, plain = pixel_divergence(one), plain_divergence(other)
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)
    for loss in (fast, plain): loss.mean().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-7, atol=1e-10)
    assert (one.grad.flatten(1).abs().sum(1) > 0).all() # all networks learn


@settings(deadline=None)
@given(st.integers(2, 4), SEEDS)
def test_divergence_lies_between_0_and_log_n_whatever_the_order_of_the_networks(n, seed):
    z = logits_of(n, seed, 20.)
    d = pixel_divergence(z)
    assert (d >= -1e-12).all() and (d <= math.log(n) + 1e-12).all()
    for order in permutations(range(n)): torch.testing.assert_close(pixel_divergence(z[list(order)]), d)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_divergence_is_0_for_equals_only_and_log_n_for_different_sure_classes(n):
    same = logits_of(1, n).expand(n, -1, -1, -1, -1)
    assert pixel_divergence(same).abs().max() < 1e-12
    other = same.clone()
    other[0] += torch.tensor([.5, 0, 0, 0])[:, None, None]
    assert (pixel_divergence(other) > 1e-6).all()
    sure = 1000*F.one_hot(torch.arange(n), 4).double()[:, None, :, None]
    torch.testing.assert_close(pixel_divergence(sure), torch.full((1, 1), math.log(n), dtype=torch.float64))
    assert pixel_divergence(sure.half()).isfinite().all() # computed in float32


# ramp

@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(.05, 1), st.floats(0, .9))
def test_ramp_never_falls_and_ends_at_the_top(a, b, end, begin):
    low, high = sorted((a, b))
    assert ramp(0, .5, end, begin) == 0 and ramp(low, .5, end, begin) <= ramp(high, .5, end, begin)
    for done in (max(end, low), 1.): assert ramp(done, .5, end, begin) == (0 if done <= begin else .5)


def test_ramp_begins_at_less_than_a_hundredth(): assert math.isclose(ramp(1e-9, 1.), math.exp(-5), rel_tol=1e-6)


# adversaries

class Linear(nn.Module):
    "A 1x1 convolution, for which the gradient sign is the worst change"
    def __init__(self, seed, c=3):
        super().__init__()
        self.layer = nn.Conv2d(3, c, 1)
        for p in self.parameters(): nn.init.normal_(p, generator=torch.Generator().manual_seed(seed + p.dim()))
    def forward(self, x): return x, self.layer(x)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.floats(0, .2), st.integers(0, 3))
def test_adversaries_are_near_in_range_and_worse(seed, epsilon, labelled):
    g = torch.Generator().manual_seed(seed)
    net, x = Linear(seed), torch.rand(3, 3, 4, 5, generator=g)
    labels = torch.randint(0, 3, (labelled, 4, 5), generator=g)
    changed, logits = adversary(net, x, labels, epsilon)
    assert (changed - x).abs().max() <= epsilon + 1e-6 and changed.min() >= 0 and changed.max() <= 1
    target = torch.cat([labels, net(x)[1][labelled:].argmax(1)])
    loss = lambda o: F.cross_entropy(net(o)[1], target, reduction="none").mean((1, 2))
    assert (loss(changed) >= loss(x) - 1e-6).all()
    torch.testing.assert_close(logits, net(x)[1].detach())
    assert not changed.requires_grad and all(p.grad is None and p.requires_grad for p in net.parameters())


def test_pixels_without_a_label_give_no_direction():
    labels = torch.full((1, 4, 5), UNLABELLED)
    labels[0, 0] = VOID
    x = torch.rand(1, 3, 4, 5)
    assert torch.equal(adversary(Linear(0), x, labels)[0], x)
    labels[0, 2, 3] = 1
    assert ((adversary(Linear(0), x, labels)[0] != x).any(1) == (labels == 1)).all()


def small(n=2, bs=4, labelled=.34, seed=0, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = HalfLabelled(WeakSet(SceneSet(9, size=SIZE), "full"), labelled)
    dls = half_batches(weak_dls(half.every, SceneSet(2, size=SIZE, start=900), bs=bs, crop=SIZE, steps=3), half, n)
    return quiet(cotraining_learner(dls, RECIPE, seed, **how))


def test_judging_leaves_modes_and_batch_statistics_as_they_were():
    net = small().model.nets[0].train()
    before, modes = {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]
    learns = [p.requires_grad for p in net.parameters()]
    one, two = (adversary(net, torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.zeros(1, SIZE, SIZE).long()) for _ in range(2))
    assert_equal(before, net.state_dict())
    assert modes == [m.training for m in net.modules()] and learns == [p.requires_grad for p in net.parameters()]
    assert torch.equal(one[0], two[0]) # no dropout


@pytest.mark.parametrize("teacher, pupil", [(0, 1), (1, 0)])
def test_only_the_other_network_learns_from_an_adversary(teacher, pupil):
    nets = small().model.train().nets
    loss = diversity_loss(nets[teacher], nets[pupil], torch.rand(2, 3, SIZE, SIZE), torch.zeros(1, SIZE, SIZE).long())
    loss.backward()
    assert all(p.grad is None for p in nets[teacher].parameters()) and any(p.grad is not None and p.grad.abs().sum() > 0 for p in nets[pupil].parameters())
    assert loss >= 0


def test_diversity_is_the_plain_divergence_from_the_teacher_in_float64():
    teacher, pupil, x = Linear(1).double(), Linear(2).double(), torch.rand(2, 3, 4, 5, dtype=torch.float64)
    labels = torch.randint(0, 3, (1, 4, 5))
    changed, _ = adversary(teacher, x, labels, .03)
    p, q = teacher(x)[1].softmax(1), pupil(changed)[1].softmax(1)
    torch.testing.assert_close(diversity_loss(teacher, pupil, x, labels, .03).double(), (p*(p/q).log()).sum(1).mean().detach(), rtol=1e-5, atol=1e-6)


# the networks and their loss

@pytest.mark.parametrize("n", [2, 3])
def test_each_network_sees_its_own_labelled_images_and_all_the_others(n):
    model = small(n).model
    batch = torch.arange(2*(n + 1))
    own = model.shared_out(batch)
    assert [o.tolist() for o in own] == [[2*k, 2*k + 1, 2*n, 2*n + 1] for k in range(n)]
    x = torch.rand(2*(n + 1), 3, SIZE, SIZE)
    each, joint = model.eval()(x)
    torch.testing.assert_close(joint.exp(), torch.stack([net(x)[1].softmax(1) for net in model.nets]).mean(0))
    assert each.shape[:2] == (n, len(x)) and model.train()(x)[0].shape[:2] == (n, 4)


def test_unlabelled_images_do_not_shift_what_is_said_of_labelled_ones():
    "Batch statistics are those of one part"
    model = small().model.train()
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    one = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    other = one.clone()
    other[4:] = 0.
    (a, _), (b, _) = model(one), model(other)
    assert torch.equal(a[:, :2], b[:, :2]) and not torch.equal(a[:, 2:], b[:, 2:])
    assert not torch.equal(model.nets[0](torch.cat([one[:2], one[4:]]))[1][:2], a[0, :2]) # in one pass they would


@pytest.mark.parametrize("done, count, adversaries", [(0., 1, False), (.1, 1, False), (.5, 1, True), (.5, 0, False), (1., 3, True)])
def test_the_loss_is_the_weighted_sum_of_its_parts(done, count, adversaries, monkeypatch):
    learn = small()
    model, loss = learn.model.train(), learn.loss_func.train()
    calls = []
    monkeypatch.setattr("spml_kit.neighbours.cotraining.diversity_loss", lambda i, j, x, labels, epsilon: calls.append((i, j, x, labels)) or torch.tensor(7.))
    images, labels, regions, tags = learn.dls.train.one_batch()
    loss.images, loss.done, loss.count = images, done, count
    pred = model(images)
    total = loss(pred, labels, regions, tags)
    each, _ = pred
    supervised = sum(labelled_cross_entropy(each[k, :2], labels[2*k:2*k + 2]) for k in (0, 1))
    agreement = plain_divergence(each[:, 2:].double()).mean()
    torch.testing.assert_close(total.double(), (supervised + ramp(done, .5)*agreement + (ramp(done, .05, begin=1/6)*7 if adversaries else 0)).double(), rtol=1e-5, atol=1e-6)
    assert len(calls) == adversaries
    for i, j, x, said in calls:
        k = [*model.nets].index(i)
        assert j is model.nets[1 - k] and torch.equal(x, model.shared_out(images)[k]) and torch.equal(said, labels[2*k:2*k + 2])
    assert torch.isclose(loss.eval()(model.eval()(images), labels, regions, tags), labelled_cross_entropy(model(images)[1], labels))


def test_unlabelled_images_teach_by_agreement_alone():
    "Their labels are never looked at"
    learn = small()
    images, labels, regions, tags = learn.dls.train.one_batch()
    learn.loss_func.images, learn.loss_func.done, learn.loss_func.count = images, .5, 0
    pred = learn.model.train()(images)
    other = labels.clone()
    other[4:] = 3
    def judged(l):
        torch.manual_seed(0)
        learn.loss_func.count = 1
        return learn.loss_func.train()(pred, l, regions, tags)
    assert torch.equal(judged(labels), judged(other)) and judged(labels) != judged(labels.clone().fill_(3))


def test_networks_begin_differently_and_the_seed_decides_how():
    one, again, other = (small(seed=s).model for s in (0, 0, 1))
    heads = lambda m: [n.head[0].weight for n in m.nets]
    assert not torch.equal(*heads(one)) and all(map(torch.equal, heads(one), heads(again))) and not torch.equal(heads(one)[0], heads(other)[0])


def test_every_parameter_learns_at_the_rate_of_its_group():
    learn = small()
    groups = learn.splitter(learn.model)
    assert len(groups) == 4
    assert {p for g in groups for p in g} == {p for p in learn.model.parameters() if p.requires_grad} and sum(map(len, groups)) == len({p for g in groups for p in g})


# whole runs

class Stop(Exception): pass


def trained(path, rounds=2, stop=None, **how):
    learn = small(path=path, **how)
    def stopping(*args):
        if stop is not None and learn.epoch == stop: raise Stop("here")
    learn.loss_func.after_step = stopping
    try: learn.fit_poly(rounds, resume=True)
    except Stop: pass
    return learn


def test_a_run_that_broke_off_ends_as_the_unbroken_one(tmp_path):
    how = dict(begin=0., end=.2, every=1)
    whole = trained(tmp_path/"whole", **how)
    trained(tmp_path/"broken", stop=1, **how)
    went_on = trained(tmp_path/"broken", **how)
    assert_equal(weights(whole), weights(went_on))
    assert whole.history == went_on.history and whole.history[1]["diversity"] > 0
    again = trained(tmp_path/"again", **how)
    assert_equal(weights(whole), weights(again)) # the same seed


def test_a_run_of_other_images_or_weights_is_refused(tmp_path):
    trained(tmp_path)
    for how, says in ((dict(labelled=.5), "stream"), (dict(agree=.1), "loss"), (dict(n=3), "another model")):
        with pytest.raises(SpmlError, match=says): trained(tmp_path, **how)


def test_divergence_of_a_training_is_said(tmp_path):
    learn = small(path=tmp_path)
    with pytest.raises(SpmlError, match="not finite|the loss is"): learn.fit_poly(2, lr=1e12)


def half_set(masks=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HalfLabelled(WeakSet(SceneSet(9, size=SIZE), masks or "full"), .34)


PLAN = HalfPlan(SceneSet(2, size=SIZE, start=900), RECIPE, rounds=1, steps=2)


@pytest.mark.parametrize("n", [2, 3])
def test_the_method_predicts_the_mean_of_its_networks(tmp_path, n):
    fitted = fit_cotraining(half_set(), PLAN, tmp_path, n, begin=0.)
    nets = [f"net{k}" for k in range(1, n + 1)]
    assert [*fitted.scorers] == ["", *nets] and len(fitted.history["networks"]) == 1
    image = SceneSet(1, size=50, start=800).image(0) # another size
    mean = torch.stack([fitted.scorers[k](image) for k in nets]).mean(0)
    torch.testing.assert_close(fitted.scorers[""](image), mean)
    torch.testing.assert_close(mean.sum(0), torch.ones(50, 50))


def test_masks_of_the_rest_change_nothing(tmp_path):
    "Wrong ones give the same networks"
    plain, scenes = half_set(), SceneSet(9, size=SIZE)
    wrong = half_set(lambda i: scenes.mask(i) if i in plain.numbers else np.ones((SIZE, SIZE), np.uint8))
    image = scenes.image(0)
    assert torch.equal(*(fit_half("cotraining", h, PLAN, tmp_path/str(k)).scorers[""](image) for k, h in enumerate((plain, wrong))))


def test_what_few_networks_and_other_batches_are_told(tmp_path):
    with pytest.raises(SpmlError, match="1 network.s.: co-training takes two"): CoNets([nn.Identity()])
    with pytest.raises(SpmlError, match="half_batches"): cotraining_learner(weak_dls(half_set().every, PLAN.valid, bs=2, crop=SIZE), RECIPE)
    assert COTRAINING.labels and not COTRAINING.hints


# labels

def test_labels_where_networks_agree_and_are_sure():
    p = torch.tensor([[.99, .6, .99, .5], [.97, .6, .01, .5]])
    scores = torch.stack([p, 1 - p], 1)[:, :, None]
    assert agreed_labels(scores).tolist() == [[0, UNLABELLED, UNLABELLED, UNLABELLED]]
    assert agreed_labels(scores, sure=.5).tolist() == [[0, 0, UNLABELLED, 0]] and agreed_labels(scores, spread=1., sure=0.).tolist() == [[0, 0, 0, 0]]
    assert agreed_labels(torch.tensor([[[[1.]], [[0.]]]]*2)).tolist() == [[0]] # zeros have no logarithm

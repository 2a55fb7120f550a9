"CycleGAN: one backward pass against the plain four fits, masks and pools, what learns from what, resumed runs, faults."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from torch import nn

from conftest import assert_equal, quiet, weights
from spml_kit.core import UNLABELLED, VOID, SpmlError
from spml_kit.data.batches import weak_dls
from spml_kit.data.half_labelled import HalfLabelled, half_batches
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.infer.scores import predict_head
from spml_kit.learn.learner import create_model
from spml_kit.method.nets import SegNet
from spml_kit.method.recipes import RECIPES
from spml_kit.neighbours.cyclegan import (CYCLEGAN, SEEN, CycleLoss, CycleNet, FakePool, MaskGenerator, SamplesCB, cycle_errors, cycle_labels, cycle_learner, cycle_splitter,
                                          fit_cycle, held, mask_probabilities, sample_rows, seen_masks)
from spml_kit.runs.semi import HALF_METHODS, HalfPlan, fit_half

SIZE, C = 32, 13
TINY = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8, crop=SIZE, bs=4, scale=(1, 1))
NET = dict(width=8, blocks=1)
PARTS = "embed", "head", "generator", "image_critic", "mask_critic"


class Embed(nn.Conv2d):
    "An embedding at full size, without norm and chance"
    def __init__(self, dim=6): super().__init__(3, dim, 3, padding=1)


def small_net(seed=0, n_classes=4):
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Tanh(), nn.Conv2d(6, n_classes, 1))
    net = CycleNet(SegNet(Embed(), head), n_classes, **NET).double()
    for m in (net.generator, net.image_critic, net.mask_critic): # as drawn, critics say nearly nothing
        for p in m.parameters(): p.data += .1*torch.randn(p.shape, dtype=torch.double)
    return net


def batch(seed=0, n=2, size=16, n_classes=4, unknown=0.):
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(2*n, 3, size, size, generator=g, dtype=torch.double)
    labels = torch.randint(n_classes, (2*n, size, size), generator=g)
    labels[:n][torch.rand(n, size, size, generator=g) < unknown] = VOID
    labels[n:] = UNLABELLED
    return images, labels


def total(net, loss, images, labels):
    loss.images = images
    return loss(net(images), labels, None, None)


def half(n=5, share=.4, size=SIZE, seed=0): return HalfLabelled(WeakSet(SceneSet(n, size=size), "full"), share, seed)


def learner(path, steps=2, half=None, seed=0, recipe=TINY, **kwargs):
    half = half or HALF
    dls = half_batches(weak_dls(half.every, VALID, bs=recipe.bs, crop=recipe.crop, steps=steps, seed=seed, scale=(1, 1), device="cpu"), half)
    return quiet(cycle_learner(dls, recipe, seed, path, **{"net": NET, **kwargs}))


@pytest.fixture(scope="module", autouse=True)
def world():
    global HALF, VALID
    HALF, VALID = half(), SceneSet(2, size=SIZE, start=100)


# one step against the plain one

def plain_losses(net, images, labels, pool, seen="straight", sees="soft"):
    "The two losses, each in words of its own; labels everywhere"
    n, n_classes = len(images)//2, net.mask_critic[0].in_channels
    S, G = lambda x: net.segmenter((x + 1)/2)[1], net.generator
    x_l, x_u, y = 2*images[:n] - 1, 2*images[n:] - 1, labels[:n]
    one_hot = F.one_hot(y, n_classes).permute(0, 3, 1, 2).double()
    probs = S(x_u).softmax(1)
    hard = F.one_hot(probs.argmax(1), n_classes).permute(0, 3, 1, 2).double()
    ways = dict(soft=probs, straight=hard + probs - probs.detach(), hard=hard)
    image, mask = G(one_hot), ways[seen]
    gen = F.cross_entropy(S(x_l), y) + F.mse_loss(image, x_l)
    gen = gen + .5*((net.image_critic(image) - 1)**2).mean() + .5*((net.mask_critic(mask) - 1)**2).mean()
    gen = gen + (G(ways[sees]) - x_u).abs().mean() + .05*F.cross_entropy(S(image), y)
    real = .9*one_hot + .1/n_classes if seen == "soft" else one_hot
    old_image, old_mask = pool("images", image.detach()), pool("masks", mask.detach())
    critics = .5*((net.image_critic(x_u) - 1)**2).mean() + .5*(net.image_critic(old_image)**2).mean()
    return gen, critics + .5*((net.mask_critic(real) - 1)**2).mean() + .5*(net.mask_critic(old_mask)**2).mean()


def sides(net): return [[*net.embed.parameters(), *net.head.parameters(), *net.generator.parameters()], [*net.image_critic.parameters(), *net.mask_critic.parameters()]]


@pytest.mark.parametrize("sees", SEEN)
@pytest.mark.parametrize("seen", SEEN)
def test_one_backward_pass_has_the_gradients_of_the_plain_fits(seen, sees):
    net, (images, labels) = small_net(), batch()
    ours = total(net, CycleLoss(net, critic_sees=seen, generator_sees=sees), images, labels)
    gen, critics = plain_losses(net, images, labels, FakePool(), seen, sees)
    torch.testing.assert_close(ours, gen + critics)
    every = sum(sides(net), [])
    found = torch.autograd.grad(ours, every)
    wanted = [*torch.autograd.grad(gen, sides(net)[0]), *torch.autograd.grad(critics, sides(net)[1])]
    for a, b in zip(found, wanted): torch.testing.assert_close(a, b)
    assert all(g.abs().sum() > 0 for g in wanted)


def test_several_steps_are_those_of_two_optimisers_in_turn():
    one, two = small_net(), small_net()
    loss, pool = CycleLoss(one, pool=3), FakePool(3)
    joint = torch.optim.Adam(sum(sides(one), []), 1e-3)
    apart = [torch.optim.Adam(some, 1e-3) for some in sides(two)]
    for k in range(4): # the pools of three are full after the second
        images, labels = batch(k)
        torch.manual_seed(k)
        joint.zero_grad(); total(one, loss, images, labels).backward(); joint.step()
        torch.manual_seed(k)
        gen, _ = plain_losses(two, images, labels, lambda name, o: o)
        apart[0].zero_grad(); gen.backward()
        # the critics' fit, on the fakes from before the fit of S and G
        _, critics = plain_losses(two, images, labels, pool)
        grads = torch.autograd.grad(critics, sides(two)[1])
        apart[0].step()
        for p, g in zip(sides(two)[1], grads): p.grad = g
        apart[1].step()
    for a, b in zip(one.parameters(), two.parameters()): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8) # Adam divides by small numbers


def test_the_fits_of_s_and_g_leave_the_critics_alone_and_the_other_way_round():
    net, (images, labels) = small_net(), batch()
    loss = CycleLoss(net)
    kept = {}
    loss.record = kept.update
    total(net, loss, images, labels)
    for name, value in kept.items():
        critic = name.endswith("_critic")
        grads = [torch.autograd.grad(value, some, retain_graph=True, allow_unused=True) for some in sides(net)]
        assert all(g is None for g in grads[0 if critic else 1]) and any(g is not None and g.any() for g in grads[1 if critic else 0]), name
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(ZeroDivisionError), held(net.image_critic): 1/0
    assert all(p.requires_grad for p in net.parameters())


def test_a_critic_of_hard_masks_teaches_nothing():
    net, (images, labels) = small_net(), batch()
    learned = {}
    for kind in SEEN:
        loss, kept = CycleLoss(net, critic_sees=kind), {}
        loss.record = kept.update
        total(net, loss, images, labels)
        grads = torch.autograd.grad(kept["mask_real"], sides(net)[0][:2], allow_unused=True) if kept["mask_real"].requires_grad else [None]
        learned[kind] = any(g is not None and g.abs().sum() > 0 for g in grads)
    assert learned == dict(soft=True, straight=True, hard=False)


# masks and pools

@pytest.mark.parametrize("seed", range(3))
def test_masks_are_probabilities_and_unknown_ones_favour_nothing(seed):
    _, labels = batch(seed, unknown=.3)
    m = mask_probabilities(labels, 4, .9)
    known = labels < 4
    torch.testing.assert_close(m.sum(1), torch.ones(labels.shape))
    assert torch.equal(m.argmax(1)[known], labels[known]) and torch.allclose(m.amax(1)[known], torch.tensor(.925))
    assert (m.permute(0, 2, 3, 1)[~known] == .25).all()
    assert torch.equal(mask_probabilities(labels.byte(), 4, .9), m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_through_is_hard_ahead_and_soft_behind(dtype):
    logits = torch.randn(2, 5, 3, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    probs, w = logits.softmax(1), torch.randn(2, 5, 3, 3, dtype=dtype)
    straight = seen_masks(probs, "straight")
    assert torch.equal(straight, seen_masks(probs, "hard")) and not seen_masks(probs, "hard").requires_grad
    grads = [torch.autograd.grad((w*seen_masks(probs, k)).sum(), logits, retain_graph=True)[0] for k in ("straight", "soft")]
    assert torch.equal(*grads) and grads[0].any()


@pytest.mark.parametrize("size, bs", [(50, 1), (50, 8), (3, 4), (0, 2), (1, 1)])
def test_a_pool_gives_back_the_newest_or_one_that_it_kept(size, bs):
    torch.manual_seed(0)
    pool, kept, fresh, old = FakePool(size), set(), 0, 0
    for k in range(30):
        new = torch.arange(k*bs, (k + 1)*bs)
        given = pool("a", new).tolist()
        for n, g in zip(new.tolist(), given):
            assert g == n or g in kept
            if len(kept) < size: assert g == n; kept.add(n)
            elif g != n: kept = kept - {g} | {n}; old += 1
            else: fresh += 1
        assert {int(o) for o in pool.kept["a"]} == kept and len(kept) <= size
    if 30*bs > 2*size > 0: assert old > 0 and fresh > 0
    assert (old == 0) == (size == 0 or 30*bs <= size)
    again = FakePool(size)
    again.load_state_dict(pool.state_dict())
    assert_equal(pool.state_dict(), again.state_dict())


def test_what_a_pool_keeps_is_its_own():
    pool, fakes = FakePool(2), torch.zeros(1, 3)
    given = pool("a", fakes)
    fakes += 1
    given += 1
    assert pool.kept["a"][0].eq(0).all()


def test_masks_in_the_pool_take_a_byte_a_pixel():
    net, (images, labels) = small_net(), batch(unknown=.2)
    for kind, dtype in (("straight", torch.uint8), ("soft", torch.float64)):
        loss = CycleLoss(net, critic_sees=kind)
        total(net, loss, images, labels)
        assert loss.bank.state_dict()["masks"].dtype == dtype


def test_the_palette_makes_both_cycles_exact():
    colours = 2*torch.tensor([[0., 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]) - 1
    G = lambda masks: torch.einsum("bchw,ck->bkhw", masks, colours)
    S = lambda x: -100*((x[:, None] - colours[None, :, :, None, None])**2).sum(2)
    y = torch.randint(4, (2, 9, 9), generator=torch.Generator().manual_seed(0))
    x = G(mask_probabilities(y, 4))
    assert F.cross_entropy(S(x), y) < 1e-4
    for kind in ("straight", "hard"): assert torch.equal(G(seen_masks(S(x).softmax(1), kind)), x)


# what is not known

def test_what_is_unknown_is_neither_drawn_nor_judged():
    "Void pixels of a labelled image: their colour in G, and what S says at their place in the other half, count for nothing"
    net, (images, labels) = small_net(), batch(unknown=.3)
    blank = labels[:2] == VOID
    seen = {}
    def judge(images=None, masks=None):
        seen.setdefault("images" if masks is None else "masks", []).append((images if masks is None else masks).detach())
        return CycleNet.judge(net, images, masks)
    net.judge = judge
    total(net, CycleLoss(net), images, labels)
    made = seen["images"][0]
    at = blank[:, None].expand_as(made)
    assert torch.equal(made[at], (2*images[:2] - 1)[at])
    fake, (real, old) = seen["masks"][0], seen["masks"][1].chunk(2)
    for m in (fake, real, old): assert (m.permute(0, 2, 3, 1)[blank] == .25).all()
    assert (fake.permute(0, 2, 3, 1)[~blank] != .25).any()


def test_padding_of_an_unlabelled_image_is_not_in_its_cycle():
    net, (images, labels) = small_net(), batch()
    labels[2:, 8:] = VOID
    loss = CycleLoss(net)
    total(net, loss, images, labels)
    probs = net.probabilities(net(images[2:])[1], (16, 16))
    error = (net.draw(probs) - (2*images[2:] - 1)).abs()[:, :, :8].mean()
    torch.testing.assert_close(loss.latest["image_cycle"], error)


def test_masks_of_unlabelled_images_and_tags_are_not_read():
    a, b = half(), half()
    b.full.images._mask = lambda i: np.full((SIZE, SIZE), i % C, np.uint8) # of other images than the labelled
    for i in a.numbers: b.labelled.sample(list(a.numbers).index(i)) # read before
    la, lb = (half_batches(weak_dls(h.every, VALID, bs=4, crop=SIZE, steps=3, scale=(1, 1), device="cpu"), h).train for h in (a, b))
    for x, y in zip(la, lb):
        assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])
        assert (x[1][2:] >= UNLABELLED).all() and (x[1][:2] < C).all()


@pytest.mark.parametrize("n_classes, labels", [(2, 0), (2, 1), (4, 3)])
def test_classes_that_no_pixel_has(n_classes, labels):
    net, (images, y) = small_net(n_classes=n_classes), batch(n_classes=n_classes)
    y[:2] = labels
    loss = CycleLoss(net)
    total(net, loss, images, y).backward()
    assert all(v.isfinite() for v in loss.latest.values()) and all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("unknown", [VOID, UNLABELLED])
def test_a_batch_whose_labelled_half_shows_nothing(unknown):
    net, (images, y) = small_net(), batch()
    y[:2] = unknown
    loss = CycleLoss(net)
    total(net, loss, images, y).backward()
    assert loss.latest["segment"] == loss.latest["draw"] == 0 and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


# warm-up and terms left out

def test_labelled_terms_first():
    net, (images, labels) = small_net(), batch()
    loss = CycleLoss(net, warmup=.2)
    for done, n in ((0., 2), (.199, 2), (.2, 8), (1., 8)):
        loss.done = done
        total(net, loss, images, labels)
        assert len(loss.latest) == n
    assert set(loss.names) == set(loss.latest)


@pytest.mark.parametrize("off, terms", [("adversarial", {"image_real", "mask_real", "image_critic", "mask_critic"}), ("image_cycle", {"image_cycle"}), ("mask_cycle", {"mask_cycle"})])
def test_a_weight_of_zero_leaves_its_terms_out(off, terms):
    net, (images, labels) = small_net(), batch()
    loss, all_of = CycleLoss(net, **{off: 0.}), CycleLoss(net)
    values = [total(net, o, images, labels) for o in (loss, all_of)]
    assert set(all_of.latest) - set(loss.latest) == terms
    left = sum(all_of.weights.get(t, 1.)*all_of.latest[t] for t in terms)
    torch.testing.assert_close(values[1] - values[0], left, rtol=1e-5, atol=1e-6, check_dtype=False) # cross-entropy is taken in float32


def test_statistics_of_drawn_images_are_not_kept():
    net = CycleNet(create_model(TINY, C), C, **NET).train()
    loss, (images, labels) = CycleLoss(net), batch(size=SIZE, n_classes=C)
    loss.images = images.float()
    pred = net(loss.images)
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
    loss(pred, labels, None, None)
    assert before and all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert any(m.momentum == .1 for m in net.head.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_halves_of_a_batch_do_not_see_each_other():
    "Else a batch norm tells the labelled images by what stands beside them"
    net = CycleNet(create_model(TINY.but(dropout=0.), C), C, **NET).train()
    a, b, c = torch.rand(3, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    one, other = (net(torch.cat([a, o])) for o in (b, c))
    for x, y in zip(one, other): assert torch.equal(x[:2], y[:2]) and not torch.equal(x[2:], y[2:])
    together = SegNet.forward(net, torch.cat([a, b]))
    assert not torch.allclose(together[1][:2], one[1][:2])


def test_evaluation_is_the_cross_entropy_of_s():
    net, (images, labels) = small_net(), batch()
    loss = CycleLoss(net).eval()
    torch.testing.assert_close(total(net, loss, images, labels), F.cross_entropy(net(images)[1][:2], labels[:2]), check_dtype=False)
    assert not loss.latest


# the network and the learner

@pytest.mark.parametrize("size", [(8, 8), (9, 14), (31, 33)])
def test_the_generator_draws_at_every_size(size):
    out = MaskGenerator(4, 8, 1)(torch.rand(1, 4, *size))
    assert out.shape == (1, 3, *size) and (out.abs() <= 1).all()


def test_every_parameter_learns_in_one_group():
    net = CycleNet(create_model(TINY, C), C, **NET)
    groups = cycle_splitter(net)
    flat = [id(p) for g in groups for p in g]
    assert len(groups) == 8 and len(flat) == len({*flat}) and {*flat} == {id(p) for p in net.parameters() if p.requires_grad}
    names = {id(p): n for n, p in net.named_parameters()}
    for k, g in enumerate(groups):
        assert g and {names[id(p)].endswith("bias") for p in g} == {k % 2 == 1}
        assert {names[id(p)].split(".")[0] for p in g} == [{"embed"}, {"embed", "head"}, {"generator"}, {"image_critic", "mask_critic"}][k//2] or k < 2


def test_rates_and_betas(tmp_path):
    learn = learner(tmp_path, rate=3e-4, critic_rate=5e-5)
    learn.create_opt()
    assert np.allclose(np.array(learn.recipe.multipliers)*learn.recipe.lr, [3e-4, 3e-4, 1e-3, 1e-3, 3e-4, 3e-4, 5e-5, 5e-5])
    assert [h["mom"] for h in learn.opt.hypers] == [.9]*4 + [.5]*4 and [h["sqr_mom"] for h in learn.opt.hypers] == [.99]*4 + [.999]*4


def test_all_four_learn_and_the_history_tells_of_each(tmp_path):
    learn = learner(tmp_path, 3, loss=dict(warmup=.3))
    before = weights(learn)
    learn.fit_poly(1)
    after = learn.model.state_dict()
    for part in PARTS: assert any(not torch.equal(before[k], v) for k, v in after.items() if k.startswith(f"{part}.") and "running" not in k), part
    row = learn.history[-1]
    assert {*CycleLoss.names, "miou"} <= row.keys() and all(math.isfinite(v) for v in row.values())
    labels = predict_head(learn.model, VALID.image(0))
    assert labels.shape == (SIZE, SIZE) and np.array_equal(labels, predict_head(learn.model.segmenter.eval(), VALID.image(0)))


def test_the_same_seed_gives_the_same_and_another_does_not(tmp_path):
    runs = []
    for k, seed in enumerate((0, 0, 1)):
        learn = learner(tmp_path/str(k), seed=seed, loss=dict(warmup=0., pool=3))
        learn.fit_poly(1)
        runs.append((weights(learn), learn.loss_func.bank.state_dict(), learn.history))
    assert_equal(runs[0][0], runs[1][0]); assert_equal(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2] != runs[2][2]


def test_a_run_that_was_cut_goes_on_with_networks_optimisers_and_pools(tmp_path):
    class Cut(Exception): pass
    options = dict(loss=dict(warmup=.3, pool=3)) # the warm-up ends within the second round: the critics' states begin late
    whole = learner(tmp_path/"whole", **options)
    whole.fit_poly(3, checkpoint=True)
    for done in (1, 2):
        path = tmp_path/f"cut{done}"
        first = learner(path, **options)
        class StopCB(Callback):
            order = 99
            def after_epoch(self):
                if self.epoch + 1 == done: raise Cut("here")
        with pytest.raises(Cut): first.fit_poly(3, checkpoint=True, cbs=[StopCB()])
        second = learner(path, **options)
        second.fit_poly(3, resume=True)
        assert_equal(weights(whole), weights(second))
        assert_equal(whole.loss_func.bank.state_dict(), second.loss_func.bank.state_dict())
        assert whole.history == second.history
        states = [learn.opt.state_dict()["state"] for learn in (whole, second)]
        for a, b in zip(*states):
            assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    assert any("grad_avg" in s for s in states[0][-4:])


def test_another_setting_of_the_loss_is_another_run(tmp_path):
    learner(tmp_path).fit_poly(1, checkpoint=True)
    with pytest.raises(SpmlError, match="checkpoint of another run"): learner(tmp_path, loss=dict(image_cycle=2.)).fit_poly(2, resume=True)


def test_images_of_different_sizes_and_a_single_labelled_one(tmp_path):
    class Sized(SceneSet):
        def _paint(self, i): self.size = (32, 40) if i % 2 else (48, 33); return super()._paint(i)
    with pytest.warns(UserWarning, match="no labelled image shows"): one = HalfLabelled(WeakSet(Sized(4), "full"), .1)
    assert len(one.numbers) == 1
    learn = learner(tmp_path, half=one, recipe=TINY.but(crop=36), loss=dict(warmup=0.))
    learn.fit_poly(1)
    assert all(math.isfinite(v) for v in learn.history[0].values())


@pytest.mark.parametrize("call, words", [
    (lambda p: seen_masks(torch.ones(1, 2, 1, 1), "st"), "soft, straight, hard"), (lambda p: CycleLoss(None, critic_sees="st"), "soft, straight, hard"),
    (lambda p: CycleLoss(None, adversarial=-1), "adversarial -1"), (lambda p: CycleLoss(None, mask_cycle=math.nan), "mask_cycle nan"),
    (lambda p: CycleLoss(None, warmup=1.5), "warmup 1.5"), (lambda p: FakePool(-1), "-1 fakes"),
    (lambda p: CycleNet(create_model(TINY, 2), 2, width=4), "multiple of 8"), (lambda p: learner(p, recipe=TINY.but(optimiser="sgd")), "need adamw"),
    (lambda p: learner(p, critic_rate=0.), "critic_rate 0.0"), (lambda p: learner(p, rate=math.nan), "rate nan"),
    (lambda p: cycle_learner(weak_dls(HALF.every, VALID, bs=2, crop=SIZE, steps=1, device="cpu"), TINY), "half_batches"),
    (lambda p: half(share=0), "above 0 and below 1"), (lambda p: half(share=1.), "above 0 and below 1"),
    (lambda p: cycle_labels(small_net(), VALID.image(0), least=2), "least 2"), (lambda p: cycle_labels(small_net(), VALID.image(0), worst=-.1), "worst -0.1"),
])
def test_faults_are_named(tmp_path, call, words):
    with pytest.raises(SpmlError) as e: call(tmp_path)
    assert words in str(e.value)


def test_a_loss_that_is_not_finite_ends_the_training_by_name(tmp_path):
    learn = learner(tmp_path, loss=dict(warmup=0.))
    with torch.no_grad(): learn.model.image_critic[0].weight.fill_(torch.nan)
    with pytest.raises(SpmlError, match="image_real nan.*image_critic nan"): learn.fit_poly(1)


class OnCpu(MixedPrecision):
    "fastai's callback with the autocast of a CPU"
    def before_fit(self):
        super().before_fit()
        self.autocast, self.learn.scaler = torch.autocast("cpu", torch.bfloat16), torch.amp.GradScaler("cpu", enabled=False)


def finite_at_half(path, steps):
    learn = learner(path, steps, cbs=OnCpu(amp_mode="bf16"), loss=dict(warmup=.01))
    learn.fit_poly(1)
    assert all(math.isfinite(v) for v in learn.history[0].values())
    assert all(v.isfinite().all() for v in learn.model.state_dict().values())
    return learn


def test_half_precision(tmp_path): finite_at_half(tmp_path, 3)


def test_the_networks_compute_in_the_precision_of_s(tmp_path):
    low = TINY.but(embed={**TINY.embed, "precision": "bfloat16"})
    net, seen = CycleNet(create_model(low, C), C, **NET).train(), []
    for part in (net.generator, net.image_critic, net.mask_critic): part.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    loss, (images, labels) = CycleLoss(net), batch(size=SIZE, n_classes=C)
    loss.images = images.float()
    loss(net(loss.images), labels, None, None).backward()
    assert {*seen} == {torch.bfloat16} and all(v.dtype == torch.float32 and v.isfinite() for v in loss.latest.values())


@pytest.mark.long
def test_two_thousand_steps_at_half_precision_stay_finite(tmp_path):
    learn = finite_at_half(tmp_path, 2000)
    row = learn.history[0]
    assert 0 < row["image_critic"] < 2 and 0 < row["mask_critic"] < 2 and row["draw"] < 1 # neither has run away


# pictures and labels

def test_samples_are_written_and_change_nothing(tmp_path):
    runs = []
    for k, cbs in enumerate(([], [SamplesCB(2, every=2)])):
        learn = learner(tmp_path/str(k), 1)
        learn.fit_poly(4, cbs=cbs)
        runs.append(weights(learn))
    assert_equal(*runs)
    assert sorted(p.name for p in (tmp_path/"1"/"samples").iterdir()) == ["round_002.png", "round_004.png"]


def test_sample_rows_leave_the_mode_as_it_was():
    net = CycleNet(create_model(TINY, C), C, **NET).train()
    rows = sample_rows(net, torch.rand(2, 3, 20, 30), torch.full((2, 20, 30), 255), VALID.classes)
    assert net.training and len(rows) == 2 and all(p.shape == (20, 30, 3) and p.dtype == np.uint8 for r in rows for p in r)


def test_labels_only_where_both_speak_for_them():
    net = CycleNet(create_model(TINY, C), C, **NET).eval()
    image = VALID.image(0)
    everywhere = cycle_labels(net, image, least=0., worst=0.)
    assert np.array_equal(everywhere, predict_head(net, image))
    for worst in (.1, .5):
        some = cycle_labels(net, image, least=0., worst=worst)
        left = some == UNLABELLED
        assert abs(left.mean() - worst) < .01 and np.array_equal(some[~left], everywhere[~left])
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float()/255
        error = cycle_errors(net, x)[0].numpy()
        assert error[left].min() >= error[~left].max() - 1e-5
    assert (cycle_labels(net, image, least=1., worst=0.) == UNLABELLED).all()


# the experiment

def test_it_is_a_method_of_the_experiment(tmp_path):
    assert HALF_METHODS["cyclegan"].endswith("cyclegan:CYCLEGAN") and CYCLEGAN.labels and not CYCLEGAN.hints
    plan = HalfPlan(VALID, TINY, rounds=1, steps=1)
    fitted = fit_half("cyclegan", HALF, plan, tmp_path)
    scores = fitted.scorers[""](VALID.image(0))
    assert scores.shape == (C, SIZE, SIZE) and len(fitted.history["network"]) == 1
    again = fit_cycle(HALF, plan, tmp_path/"cyclegan") # nothing left to do
    assert torch.equal(again.scorers[""](VALID.image(0)), scores)

"The adaptive loss: windows against plain ones in float64, its properties, the Minkowski mean, learners, refusals."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from conftest import assert_equal, quiet, weights
from spml_kit.core import SpmlError
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.learn.learner import spml_learner
from spml_kit.method.recipes import RECIPES
from spml_kit.neighbours.adaptive import AdaptiveLoss, minkowski_mean, speckle, window_losses

SIZE = 64
TINY = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8, crop=SIZE, bs=3)


def drawn(seed=0, B=2, C=3, H=5, W=4, size=None):
    "Logits and labels, a quarter of them unlabelled or void"
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (B, H, W), generator=g)
    chance = torch.rand(B, H, W, generator=g)
    labels[chance > .75], labels[chance > .9] = 254, 255
    return 3*torch.randn(B, C, *(size or (H, W)), generator=g, dtype=torch.float64), labels


def plain(logits, labels, radius, sigma):
    "Window by window, with all classes"
    p, out = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False).softmax(1), []
    for b, y, x in (labels < logits.shape[1]).nonzero().tolist():
        total = mass = 0
        for v in range(max(0, y - radius), min(labels.shape[1], y + radius + 1)):
            for u in range(max(0, x - radius), min(labels.shape[2], x + radius + 1)):
                if labels[b, v, u] != labels[b, y, x]: continue
                w = np.exp(-max(abs(v - y), abs(u - x))**2/(2*sigma**2))
                total, mass = total + w*p[b, :, v, u], mass + w
        out.append(-(total/mass)[labels[b, y, x]].log())
    return torch.stack(out)


# windows

@pytest.mark.parametrize("radius", [0, 1, 2, 7])
@pytest.mark.parametrize("sigma", [.6, 1., float("inf")])
@pytest.mark.parametrize("size", [None, (3, 2)])
def test_windows_and_their_gradients_are_those_of_the_plain_form(radius, sigma, size):
    logits, labels = drawn(radius, size=size)
    logits.requires_grad_()
    losses, known = window_losses(logits, labels, radius, sigma)
    ours, theirs = losses[known], plain(logits, labels, radius, sigma)
    torch.testing.assert_close(ours, theirs)
    w = torch.randn(len(ours), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad((w*ours).sum(), logits), torch.autograd.grad((w*theirs).sum(), logits)): torch.testing.assert_close(a, b)
    assert not losses[~known].any()


def test_gradients_by_differences():
    logits, labels = drawn(3)
    assert torch.autograd.gradcheck(lambda z: window_losses(z, labels, 2)[0], logits.requires_grad_())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_merging_forgives(seed, radius): # Jensen: a mean of probabilities costs at most the mean of the costs
    logits, _ = drawn(seed, 1, 3, 9, 9)
    labels = torch.full((1, 9, 9), 1)
    each = F.cross_entropy(logits, labels, reduction="none")
    side, inner = 2*radius + 1, slice(radius, 9 - radius)
    mean = F.avg_pool2d(each[:, None], side, 1)[:, 0]
    assert (window_losses(logits, labels, radius, float("inf"))[0][:, inner, inner] <= mean + 1e-9).all()


def test_nothing_crosses_to_other_labels_or_void():
    logits, labels = drawn(5)
    logits.requires_grad_()
    losses, known = window_losses(logits, labels, 2)
    total, = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    assert (total.abs().sum(1)[~known] == 0).all() and (total.abs().sum(1)[known] > 0).all()
    for b, y, x in known.nonzero().tolist()[:8]: # one window at a time
        slope, = torch.autograd.grad(losses[b, y, x], logits, retain_graph=True)
        moved = slope.abs().sum(1) > 0
        inside = torch.zeros_like(moved)
        inside[b, max(0, y - 2):y + 3, max(0, x - 2):x + 3] = True
        assert torch.equal(moved, inside & (labels == labels[b, y, x]))


def test_sure_and_wrong_stays_finite():
    z = torch.tensor([1e4, -1e4]).view(1, 2, 1, 1).expand(1, 2, 4, 4).clone().requires_grad_()
    losses, _ = window_losses(z, torch.ones(1, 4, 4, dtype=torch.uint8), 1)
    slope, = torch.autograd.grad(losses.sum(), z)
    assert torch.allclose(losses, torch.full_like(losses, 2e4)) and torch.isfinite(slope).all() and slope.abs().sum() > 1


def test_memory_does_not_grow_with_the_window():
    logits, labels = drawn()
    own = lambda r: window_losses(logits.requires_grad_(), labels, r)[0].grad_fn.next_functions[0][0].next_functions[0][0]
    kept = [sum(o.numel() for o in own(r).saved_tensors) for r in (1, 4)]
    assert kept[0] == kept[1] == 3*labels.numel()


# the mean

@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_the_mean_grows_with_the_power_up_to_the_largest(values):
    l = torch.tensor(values, dtype=torch.float64)
    means = [minkowski_mean(l, torch.ones_like(l, dtype=torch.bool), k).item() for k in (1, 2, 5, 20, 200)]
    assert all(a <= b*(1 + 1e-9) for a, b in zip(means, [*means[1:], max(values)]))
    assert means[0] == pytest.approx(np.mean(values))
    assert means[2] == pytest.approx(np.mean(np.array(values)**5)**.2)


@pytest.mark.parametrize("power", [1., 2., 3.7, 5.])
def test_the_mean_and_its_slope_are_those_of_the_plain_form(power):
    l = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    known = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)) < .6
    ours, theirs = minkowski_mean(l, known, power), (l[known]**power).mean()**(1/power)
    torch.testing.assert_close(ours, theirs)
    (a,), (b,) = torch.autograd.grad(ours, l), torch.autograd.grad(theirs, l)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a[known], ((l/theirs)**(power - 1)).detach()[known]/known.sum())


@pytest.mark.parametrize("power", [1., 5.])
@pytest.mark.parametrize("values", [[0., 0.], [0., 1e-30], [1e30, 1.]])
def test_nothing_and_extremes_give_finite_means_and_slopes(values, power):
    l = torch.tensor(values, requires_grad=True)
    mean = minkowski_mean(l, torch.ones(2, dtype=torch.bool), power)
    slope, = torch.autograd.grad(mean, l)
    assert torch.isfinite(mean) and torch.isfinite(slope).all() and mean <= max(values)
    none = minkowski_mean(l, torch.zeros(2, dtype=torch.bool), power)
    assert none == 0 and not torch.autograd.grad(none, l)[0].any()


# the loss

@pytest.mark.parametrize("seed", range(3))
def test_without_window_and_power_it_is_cross_entropy(seed):
    logits, labels = drawn(seed, size=(3, 2))
    up = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    ours = AdaptiveLoss(0, 1.).train()((None, logits), labels, None, None)
    torch.testing.assert_close(ours, F.cross_entropy(up, labels.clamp(max=255).masked_fill(labels == 254, 255), ignore_index=255), rtol=1e-5, atol=1e-5)


def test_the_power_warms_up():
    loss = AdaptiveLoss(power=5., warmup=.5)
    for done, power in ((0., 1.), (.25, 3.), (.5, 5.), (1., 5.)):
        loss.done = done
        assert loss.power_now() == power
    assert AdaptiveLoss(warmup=0.).power_now() == 5


def test_half_precision_and_no_labels():
    logits, labels = drawn()
    loss, half = AdaptiveLoss(warmup=0.).train(), (60*logits).half().requires_grad_()
    value = loss((None, half), labels, None, None)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(half.grad).all()
    torch.testing.assert_close(value, AdaptiveLoss(warmup=0.).train()((None, half.detach().float()), labels, None, None))
    assert loss((None, logits), torch.full_like(labels, 254), None, None) == 0


@pytest.mark.parametrize("kwargs,message", [
    (dict(radius=-1), "radius -1"), (dict(radius=1.5), "radius 1.5"), (dict(power=.5), "power 0.5"), (dict(power=float("inf")), "power inf"),
    (dict(sigma=0), "sigma 0"), (dict(warmup=2), "warmup 2")])
def test_refused(kwargs, message):
    with pytest.raises(SpmlError, match=message): AdaptiveLoss(**kwargs)


@pytest.mark.parametrize("kind", ["full", "scribbles"])
def test_a_learner_learns_and_tells_the_power(kind, tmp_path):
    weak, valid = WeakSet(SceneSet(6, seed=3, size=SIZE), kind, regions=12), SceneSet(3, seed=3, size=SIZE, start=100)
    def run(folder, loss=None):
        dls = weak_dls(weak, valid, bs=3, crop=SIZE, steps=3, device=torch.device("cpu"))
        learn = quiet(spml_learner(dls, method=loss or AdaptiveLoss(), recipe=TINY, path=tmp_path/folder))
        with learn.no_bar(): learn.fit_poly(2, resume=True)
        return learn
    learn = run("one")
    first, last = learn.history
    assert 1 < first["power"] < last["power"] == 5 and np.isfinite(last["windows"])
    assert_equal(weights(run("again")), weights(learn))
    with pytest.raises(SpmlError): run("one", AdaptiveLoss(2))


def test_speckle_counts_pieces():
    assert speckle(np.zeros((4, 4), np.uint8)) == 1
    board = np.indices((4, 4)).sum(0) % 2
    assert speckle(board.astype(np.uint8)) == 8

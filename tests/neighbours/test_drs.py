"DRS: the cap against its plain form, activations of any backbone, the classifier, refinement and its step, faults."
import numpy as np
import pytest
import torch
from torch import nn

from conftest import assert_equal, quiet, weights
from spml_kit.cams.classifier import TAG_RECIPE, TagLoss, TagNet, class_maps, tag_learner, tag_splitter
from spml_kit.core import SpmlError, UNLABELLED
from spml_kit.data.annotations import Tags
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.scenes import SCENE_CLASSES, make_scene
from spml_kit.data.weak import WeakSet
from spml_kit.neighbours.drs import (DRS, DRS_REFINER, REFINE_RECIPE, DrsNet, RefineLoss, Suppression, SuppressPeaks,
                                     map_targets, refine_maps, refined_plan, suppress_activations, winner_take_all)
from spml_kit.runs.pipelines import Pipeline

SIZE, C = 64, len(SCENE_CLASSES)
NET = dict(backbone="test_resnet", pretrained=False)


def plain(u, share):
    rows = [[ch.clamp(max=(share if isinstance(share, float) else share[b, d, 0, 0])*ch.max()) for d, ch in enumerate(image)] for b, image in enumerate(u)]
    return torch.stack([torch.stack(r) for r in rows])


def tagged(n=4, start=0, tags=None):
    say = lambda i: np.flatnonzero(make_scene(start + i, size=SIZE).tags) if tags is None else np.array(tags[i], int)
    return WeakSet(SceneSet(n, size=SIZE, start=start, masks=False), lambda i: Tags(say(i)), tags=say)


# the cap

@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [.1, .55, .8, 1., "each"])
def test_the_cap_and_its_gradients_are_those_of_the_plain_form(seed, share):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64)
    x[0, 0] = -1  # a dead channel
    inputs = [x.requires_grad_()]
    if share == "each": inputs.append(share := torch.rand(2, 3, 1, 1, generator=g, dtype=torch.float64).requires_grad_())
    w = torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64)
    ours, theirs = SuppressPeaks.apply(x.relu(), share), plain(x.relu(), share)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad((w*ours).sum(), inputs), torch.autograd.grad((w*theirs).sum(), inputs)): torch.testing.assert_close(a, b)


@pytest.mark.parametrize("seed", range(4))
def test_bounds_density_and_composition(seed):
    x = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(seed))
    u = x.relu()
    assert torch.equal(Suppression(4, 1.)(u), u)
    peak = u.amax((2, 3), keepdim=True)
    for d in (.3, .55, .8):
        y = Suppression(4, d)(u)
        assert (y >= 0).all() and (y <= d*peak).all() and torch.equal(y[u <= d*peak], u[u <= d*peak])
    dense = lambda y, s: (y >= s*y.amax((2, 3), keepdim=True)).sum((2, 3))
    for s in (.05, .3, .5, .7, .99): assert (dense(Suppression(4, .4)(u), s) >= dense(Suppression(4, .7)(u), s)).all()
    torch.testing.assert_close(Suppression(4, .5)(Suppression(4, .8)(u)), Suppression(4, .4)(u), atol=1e-6, rtol=0)


def test_capped_cells_hand_their_gradient_to_the_largest():
    x = torch.tensor([[[[4., 3], [1, .5]]]], requires_grad=True)
    slope, = torch.autograd.grad(Suppression(1, .5)(x).sum(), x)
    assert slope.flatten().tolist() == [1, 0, 1, 1]


def test_a_controller_begins_at_a_half_and_learns_as_a_head():
    u = torch.rand(2, 6, 4, 4)
    assert Suppression(6, "learn").share(u).sub(.5).abs().max() < .05
    net = DrsNet(C, delta="learn", **NET)
    controllers = {p for m in net.modules() if isinstance(m, Suppression) for p in m.parameters()}
    assert controllers and controllers <= set(tag_splitter(net)[2])
    assert sum(map(len, tag_splitter(net))) == len([*net.parameters()])


# activations

@pytest.mark.parametrize("backbone, n", [("test_resnet", 12), ("tf_efficientnet_lite0", 32), ("resnet18", 17)])
def test_every_activation_once_and_delta_one_changes_nothing(backbone, n):
    torch.manual_seed(0)
    before, x = TagNet(C, backbone=backbone, pretrained=False).eval(), torch.rand(1, 3, 64, 64)
    torch.manual_seed(0)
    net = DrsNet(C, backbone=backbone, pretrained=False, delta=1., last=None).eval()
    made = [m for m in net.modules() if isinstance(m, Suppression)]
    assert len(made) == len({*made}) == n
    assert torch.equal(net(x), before(x))
    for m in made: m.delta = .5
    assert not torch.equal(net(x), before(x))


def test_one_object_called_twice_gets_two():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.ReLU(inplace=True)
        def forward(self, x): return self.act(self.b(self.act(self.a(x))))
    net = Twice()
    one, two = suppress_activations(net, "learn", None)
    assert (one.controller.in_features, two.controller.in_features) == (4, 6)
    x = torch.rand(1, 3, 8, 8)
    expected = two(net.b(one(net.a(x).relu())).relu())
    assert torch.equal(net(x), expected) and torch.equal(net(x), expected)
    net.act.turn = 1  # as after a pass that was broken off
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("call, words", [
    (lambda: Suppression(3, 0), "delta 0"), (lambda: Suppression(3, 1.2), "delta 1.2"), (lambda: Suppression(3, float("nan")), "delta nan"),
    (lambda: Suppression(3, "auto"), "delta 'auto'"),
    (lambda: suppress_activations(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU())), "choose another backbone"),
    (lambda: suppress_activations(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardtanh(-1, 1))), "choose another backbone"),
    (lambda: suppress_activations(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), last=2), "last 2: the network has 1"),
    (lambda: suppress_activations(DrsNet(C, **NET).backbone), "already"),
    (lambda: winner_take_all(np.full((3, 2, 2), 2.)), "0..1"),
])
def test_faults_are_named(call, words):
    with pytest.raises(SpmlError) as e: call()
    assert words in str(e.value)


@pytest.mark.parametrize("delta", [.8, "learn"])
def test_mixed_precision_is_finite(delta):
    net = DrsNet(C, delta=delta, last=None, **NET).train()
    tags = torch.ones(2, C, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16): loss = TagLoss()(net(torch.rand(2, 3, SIZE, SIZE)), None, None, tags)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_untagged_images_teach_nothing_and_every_class_may_be_there():
    net, image = DrsNet(C, **NET).eval(), make_scene(3, size=SIZE).image
    assert TagLoss()(net(torch.rand(2, 3, SIZE, SIZE)), None, None, torch.zeros(2, C, dtype=torch.bool)) == 0
    maps = class_maps(net, image, np.ones(C, bool))
    assert np.isfinite(maps).all() and not maps[0].any()


# refinement

def test_winners():
    maps = np.random.default_rng(0).random((4, 5, 6)); maps[:, 0] = 0
    winner, value = winner_take_all(maps)
    for y in range(5):
        for x in range(6):
            v = maps[1:, y, x]
            assert (winner[y, x], value[y, x]) == ((1 + v.argmax(), round(255*v.max())) if v.max() > 0 else (0, 0))


def test_the_loss_against_its_definition():
    g = torch.Generator().manual_seed(0)
    pred, labels, value = torch.randn(3, 3, 4, 4, generator=g, dtype=torch.float64), torch.randint(0, 4, (3, 4, 4), generator=g), torch.randint(0, 256, (3, 4, 4), generator=g)
    labels[0, 1], labels[2] = 255, UNLABELLED
    tags = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    errors = [sum((float(pred[b, c, y, x]) - (float(value[b, y, x])/255 if labels[b, y, x] == c + 1 else 0))**2 for c in range(3))/3
              for b in range(3) for y in range(4) for x in range(4) if labels[b, y, x] < UNLABELLED]
    assert float(RefineLoss()(pred, labels, value, tags)) == pytest.approx(np.mean(errors), rel=1e-5)
    assert RefineLoss()(pred[2:], labels[2:], value[2:], tags[2:]) == 0
    assert RefineLoss()(pred, labels*0, value*0, tags).isfinite()  # empty maps
    with pytest.raises(SpmlError, match="no map to regress"): RefineLoss()(pred, labels*0 + UNLABELLED, value, tags)


def test_targets_of_untagged_images_and_of_all_classes(tmp_path):
    weak = tagged(3, tags=[[], np.arange(C), [0]])
    targets = map_targets(weak, DrsNet(C, **NET), tmp_path/"maps", (1.,))
    samples = [targets.sample(i) for i in range(3)]
    assert (samples[0].labels == UNLABELLED).all() and not samples[2].labels.any() and not samples[2].regions.any()
    with pytest.raises(SpmlError, match="other settings"): map_targets(weak, DrsNet(C, **NET), tmp_path/"maps", (1.,))


def test_refinement_learns_and_goes_on_where_it_was(tmp_path):
    model, run = DrsNet(C, **NET), lambda path, rounds: refine_maps(tagged(), tagged(2, 100), model, path, REFINE_RECIPE.but(bs=2, crop=SIZE), rounds, 4, (1.,), NET)
    whole = run(tmp_path/"whole", 2)
    assert whole.history[1]["loss"] < whole.history[0]["loss"]
    done = run(tmp_path/"whole", 2)
    assert_equal(weights(whole), weights(done))
    maps = class_maps(done.model, make_scene(0, size=SIZE).image, np.ones(C, bool))
    assert np.isfinite(maps).all()


def test_the_plan_takes_maps_from_the_refiner(tmp_path):
    weak = tagged()
    pipe = Pipeline(weak, tagged(2, 100), "tags", tmp_path/"run", tag_steps=2, cam="drs", cam_scales=(1.,), plan=refined_plan(), progress=False)
    pipe.run(only=("classifier", "refine", "seeds"))
    assert [s.name for s in pipe.plan[:3]] == ["classifier", "refine", "seeds"]
    assert pipe.learners["classifier"] is pipe.learners["refine"] and pipe.learners["refine"].settings["method"] == DRS_REFINER.name
    with pytest.raises(SpmlError, match="put it before"):
        Pipeline(weak, tagged(2, 100), "tags", tmp_path/"other", plan=refined_plan(), progress=False).run(only=("refine",))


def test_the_method_trains_under_its_name(tmp_path):
    dls = weak_dls(tagged(), tagged(2, 100), bs=2, crop=SIZE, steps=6, scale=TAG_RECIPE.scale, device="cpu")
    learn = quiet(tag_learner(dls, "drs", TAG_RECIPE.but(warmup=2), NET, path=tmp_path))
    learn.fit_poly(2)
    assert learn.settings["method"] == DRS.name and learn.history[1]["loss"] < learn.history[0]["loss"]

"Class maps from tags: the network, maps against their plain version, what training reads, runs that are killed, faults."
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback

from conftest import assert_equal, quiet, weights
from spml_kit.data.batches import weak_dls
from spml_kit.cams.classifier import CAM, GRAD_CAMS, TAG_RECIPE, TagMethod, TagLoss, TagNet, average_precision, class_maps, grad_cam, tag_learner
from spml_kit.core import SpmlError, rng_of
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.data.annotations import Tags
from spml_kit.data.scenes import SCENE_CLASSES, make_scene
from spml_kit.cams.seam import SEAM, SeamNet

SIZE, C = 64, len(SCENE_CLASSES)
NET = dict(backbone="test_resnet", pretrained=False)
RECIPE = TAG_RECIPE.but(warmup=2)
METHODS, BY_NAME = ["cam", "seam"], {"cam": CAM, "seam": SEAM}
each_method = pytest.mark.parametrize("method", METHODS)


def tags_of_scene(i):
    return make_scene(i, size=SIZE).tags


def tagged(n=8, start=0):
    images = SceneSet(n, size=SIZE, start=start, masks=False)
    return WeakSet(images, lambda i: Tags(np.flatnonzero(tags_of_scene(start + i))))


def learner(path=".", method="cam", train=None, steps=3, seed=0):
    dls = weak_dls(train or tagged(), tagged(4, start=100), bs=2, crop=SIZE, steps=steps, scale=RECIPE.scale, device="cpu")
    return quiet(tag_learner(dls, method, RECIPE, NET, seed, path))


def network(method="cam", seed=0, **kwargs):
    torch.manual_seed(seed)
    return BY_NAME[method].net(C, **NET, **kwargs).eval()


@pytest.fixture
def image():
    return make_scene(3, size=SIZE).image


# the network

@each_method
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (33, 47)])
def test_shapes(method, stride, size):
    net, x = network(method, output_stride=stride), torch.rand(2, 3, *size)
    maps, logits = net.maps(x), net(x)
    assert logits.shape == (2, C - 1) and logits.dtype == torch.float32
    assert maps.shape == (2, C, *(-(-n//stride) for n in size))


def test_logits_are_the_mean_of_the_maps_and_background_is_empty():
    net, x = network(), torch.rand(2, 3, 64, 64)
    maps = net.maps(x)
    assert not maps[:, 0].any()
    torch.testing.assert_close(maps[:, 1:].mean((2, 3)), net(x))


@each_method
def test_frozen_statistics(method):
    learn = learner(method=method)
    before = {k: v for k, v in weights(learn).items() if "running" in k}
    learn.fit_poly(1)
    after = weights(learn)
    assert before and all(torch.equal(v, after[k]) for k, v in before.items())


# class maps

def plain_class_maps(net, image, tags, scales, flip):
    "One view and one class at a time"
    h, w = image.shape[:2]
    out = np.zeros((len(tags), h, w))
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()/255
    for c in np.flatnonzero(tags[1:]) + 1:
        for s in scales:
            for mirror in ([False, True] if flip else [False]):
                view = torch.nn.functional.interpolate(x, (round(s*h), round(s*w)), mode="bilinear", align_corners=False)
                with torch.no_grad():
                    m = net.maps(view.flip(-1) if mirror else view)[0, c].relu()
                m = torch.nn.functional.interpolate(m[None, None], (h, w), mode="bilinear", align_corners=False)[0, 0]
                out[c] += (m.flip(-1) if mirror else m).numpy()
        out[c] /= max(out[c].max(), 1e-12)
    return out


@each_method
@pytest.mark.parametrize("scales, flip", [((1.,), False), ((1.,), True), ((.5, 1.5), True)])
def test_maps_against_the_plain_version(method, scales, flip, image):
    net, tags = network(method), np.isin(np.arange(C), [0, 2, 5, 7])
    maps = class_maps(net, image, tags, scales, flip)
    assert maps.dtype == np.float32 and maps.shape == (C, SIZE, SIZE)
    np.testing.assert_allclose(maps, plain_class_maps(net, image, tags, scales, flip), atol=2e-5)


@each_method
def test_maps_are_zero_to_one_and_empty_where_nothing_was_said(method, image):
    tags = np.isin(np.arange(C), [0, 1, 3])
    maps = class_maps(network(method), image, tags)
    assert maps.min() >= 0 and maps.max() <= 1
    assert not maps[~tags].any() and not maps[0].any()
    assert all(m.max() == 0 or m.max() == pytest.approx(1) for m in maps)
    np.testing.assert_array_equal(maps, class_maps(network(method), image, tags))


def test_an_image_of_background_alone_has_empty_maps(image):
    assert not class_maps(network(), image, np.arange(C) == 0).any()


def test_mirrored_image_mirrored_maps(image):
    net, tags = network(), np.isin(np.arange(C), [1, 4])
    np.testing.assert_allclose(class_maps(net, image[:, ::-1], tags), class_maps(net, image, tags)[..., ::-1], atol=1e-4)


@pytest.mark.parametrize("call, words", [
    (lambda net, image: class_maps(net, image, np.zeros(C)), "without any tag"),
    (lambda net, image: class_maps(net, image, np.ones(C - 1)), f"{C - 1} tags"),
    (lambda net, image: class_maps(net, image[..., :1, None], np.ones(C)), "(64, 64, 1, 1)"),
    (lambda net, image: class_maps(net, image, np.ones(C), scales=()), "scales"),
    (lambda net, image: class_maps(net, image, np.ones(C), scales=(0.,)), "scales"),
    (lambda net, image: grad_cam(net, image, np.ones(C), "lrp"), "'lrp' is not one of"),
    (lambda net, image: grad_cam(net, image, np.zeros(C)), "without any tag"),
    (lambda net, image: grad_cam(net, image, np.ones(C + 1)), f"{C + 1} tags"),
    (lambda net, image: TagNet(1, **NET), "1 class"),
    (lambda net, image: SeamNet(C, scale=1., **NET), "scale 1.0"),
    (lambda net, image: tag_learner(None, "seem"), "'seem' is not one of"),
])
def test_faults_are_named(call, words, image):
    with pytest.raises(SpmlError) as e:
        call(network(), image)
    assert words in str(e.value)


def test_a_network_that_diverged_is_refused(image):
    net = network()
    with torch.no_grad():
        net.classifier.weight.fill_(float("nan"))
    with pytest.raises(SpmlError, match="diverged"):
        class_maps(net, image, np.ones(C, bool))


def test_a_recipe_of_four_groups_is_refused():
    with pytest.raises(SpmlError, match="multipliers"):
        tag_learner(weak_dls(tagged(), tagged(), bs=2, crop=SIZE, steps=1, device="cpu"), recipe=TAG_RECIPE.but(multipliers=(.3, .3, 1, 1)), net=NET)


# pytorch-grad-cam

def test_without_the_package_its_name_is_told(monkeypatch, image):
    monkeypatch.setitem(__import__("sys").modules, "pytorch_grad_cam", None)
    with pytest.raises(SpmlError, match="pip install grad-cam"):
        grad_cam(network(), image, np.ones(C, bool))


@pytest.mark.parametrize("method", GRAD_CAMS)
def test_other_methods(method, image):
    pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam is not installed")
    net, tags = network(), np.isin(np.arange(C), [0, 2, 5])
    maps = grad_cam(net, image, tags, method)
    assert maps.shape == (C, SIZE, SIZE) and maps.dtype == np.float32
    assert maps.min() >= 0 and maps.max() <= 1 and not maps[~tags].any() and not maps[0].any()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_grad_cam_of_an_average_is_the_class_map(image):
    pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam is not installed")
    net, tags = network(), np.ones(C, bool)
    ours, theirs = class_maps(net, image, tags, (1.,), False), grad_cam(net, image, tags)
    alike = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(ours[1:], theirs[1:]) if a.std() and b.std()]
    assert len(alike) > 3 and min(alike) > .98  # its resize differs a little


# loss and metric

def test_loss_is_the_soft_margin_over_tagged_images():
    g = torch.Generator().manual_seed(0)
    logits, tags = torch.randn(5, C - 1, generator=g), torch.rand(5, C, generator=g) < .3
    tags[:4, 0], tags[4] = True, False
    expected = torch.nn.functional.multilabel_soft_margin_loss(logits[:4], tags[:4, 1:].float())
    torch.testing.assert_close(TagLoss()(logits, None, None, tags), expected)
    assert TagLoss()(logits[4:], None, None, tags[4:]) == 0


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_of_scikit_learn(seed):
    reference = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed").average_precision_score
    rng = rng_of(seed, "ap")
    scores, truth = rng.integers(0, 9, 40)/8, rng.random(40) < .3
    assert average_precision(scores, truth) == pytest.approx(100*reference(truth, scores))
    assert np.isnan(average_precision(scores, np.zeros(40, bool)))


# training

@each_method
def test_training_reads_tags_alone(method):
    "Label maps at random change nothing"
    class Poisoned(WeakSet):
        def sample(self, i):
            s = super().sample(i)
            s.labels = rng_of(i, "poison").integers(0, C, s.labels.shape).astype(np.uint8)
            s.regions = rng_of(i, "regions").integers(0, 99, s.labels.shape).astype(np.int32)
            return s
    clean = learner(method=method)
    clean.fit_poly(2)
    say = lambda i: Tags(np.flatnonzero(tags_of_scene(i)))
    poisoned = learner(method=method, train=Poisoned(SceneSet(8, size=SIZE, masks=False), say))
    poisoned.fit_poly(2)
    assert_equal(weights(clean), weights(poisoned))
    other = learner(method=method, train=WeakSet(SceneSet(8, size=SIZE, masks=False), lambda i: Tags([0, 1 + i % 3])))
    other.fit_poly(2)
    assert not torch.equal(weights(clean)["classifier.weight"], weights(other)["classifier.weight"])  # but tags do


class StopCB(Callback):
    "Break off within a round"
    order = 95

    def __init__(self, step):
        self.at = step

    def after_step(self):
        if self.train_iter == self.at:
            raise KeyboardInterrupt


@each_method
def test_a_killed_run_goes_on_to_the_same_weights(method, tmp_path):
    whole = learner(tmp_path/"whole", method)
    whole.fit_poly(4)
    broken = learner(tmp_path/"broken", method)
    with pytest.raises(KeyboardInterrupt):
        broken.fit_poly(4, checkpoint=True, cbs=StopCB(7))  # in the third round of three steps
    again = learner(tmp_path/"broken", method)
    again.fit_poly(4, resume=True)
    assert_equal(weights(whole), weights(again))
    assert again.history == whole.history and [r["round"] for r in again.history] == [0, 1, 2, 3]
    assert {"loss", "precision"} | set(BY_NAME[method].loss.names) <= set(again.history[0])


def test_a_checkpoint_of_another_method_or_network_is_refused(tmp_path):
    learner(tmp_path).fit_poly(1, checkpoint=True)
    with pytest.raises(SpmlError, match="checkpoint of another"):
        learner(tmp_path, "seam").fit_poly(1, resume=True)
    other = learner(tmp_path)
    other.settings["net"] = dict(NET, dropout=.1)
    with pytest.raises(SpmlError, match="net was"):
        other.fit_poly(1, resume=True)


@each_method
def test_a_few_steps_teach_something(method):
    learn = learner(method=method, steps=20)
    learn.fit_poly(2)
    key = "tags" if method == "seam" else "loss"
    assert learn.history[1][key] < learn.history[0][key]


class StrongestNet(TagNet):
    def forward(self, x): return self.classify(self.features(x)).amax((-2, -1))


STRONGEST = TagMethod("strongest", StrongestNet)


@pytest.mark.parametrize("given", [STRONGEST, f"{__name__}:STRONGEST"], ids=["object", "name"])
def test_a_method_of_ones_own(given):
    "As an object, or by the name under which a command finds it"
    learn = learner(method=given)
    learn.fit_poly(1)
    assert learn.settings["method"] == "strongest" and isinstance(learn.model, StrongestNet) and learn.history[0]["loss"] > 0


@pytest.mark.parametrize("name, words", [("cem", "did you mean 'cam'"), ("cams", "did you mean 'cam'"), ("no_such_package.at:all", "no module no_such_package"),
    ("spml_kit.cams.nowhere:CAM", "no module spml_kit.cams.nowhere"), ("spml_kit.cams.seam:SAEM", "spml_kit.cams.seam has no SAEM"), ("", "is not one of"), ("a b:c", "is not one of")])
def test_names_that_are_no_method(name, words):
    with pytest.raises(SpmlError, match=words): learner(method=name)

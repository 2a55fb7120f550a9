"""Training windows: the quick interpolation against the plain form, and transforms that move image, labels and regions together. albumentations is not installed where these tests were written: a stand-in with its calling convention (keywords image and masks, a dictionary back, a stream of its own) takes its place."""
import random
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchvision import transforms as v1
from torchvision.transforms import v2

from spml_kit.core import Classes, SpmlError, UNLABELLED, VOID, rng_of
from spml_kit.data.batches import MEAN_COLOUR, augment, weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.transforms import Transforms
from spml_kit.data.weak import Sample, WeakSet
from spml_kit.learn.learner import spml_learner
from spml_kit.method.recipes import RECIPES


# the window itself

def plain(sample, rng, crop, scale, flip, mirrored):
    "As the formulas say, pixel by pixel of the whole window, in float64"
    flipped, ratio, *shift = rng.random() < flip, rng.uniform(*scale), rng.random(), rng.random()
    image, labels, regions, tags = sample.image, sample.labels, sample.regions, sample.tags
    if flipped: image, labels, regions, tags = image[:, ::-1], mirrored[labels[:, ::-1]], regions[:, ::-1], tags[mirrored[:len(tags)]]
    old = np.array(labels.shape)
    new = np.maximum((ratio*old).astype(int), 1)
    first = [int(u*(max(n, crop) - crop)) for u, n in zip(shift, new)]
    y, x = (np.arange(s, min(s + crop, n)) for s, n in zip(first, new))
    at = [np.clip((o + .5)*f - .5, 0, n - 1) for o, f, n in zip((y, x), old/new, old)]
    (y0, x0), (ty, tx) = (a.astype(int) for a in at), (a % 1 for a in at)
    y1, x1 = np.minimum(y0 + 1, old[0] - 1), np.minimum(x0 + 1, old[1] - 1)
    mix = lambda a, b, t: a*(1 - t) + b*t
    pick = lambda r, c: image[np.ix_(r, c)].astype(float)
    mixed = mix(mix(pick(y0, x0), pick(y1, x0), ty[:, None, None]), mix(pick(y0, x1), pick(y1, x1), ty[:, None, None]), tx[:, None])
    out = np.full((crop, crop, 3), MEAN_COLOUR).astype(float), np.full((crop, crop), VOID), np.zeros((crop, crop), int)
    near = np.ix_(*((o*f).astype(int) for o, f in zip((y, x), old/new)))
    for o, m in zip(out, (mixed, labels[near], regions[near])): o[:len(y), :len(x)] = m
    return *out, tags


def random_sample(rng, h, w, classes=5):
    return Sample(rng.integers(0, 256, (h, w, 3), np.uint8), rng.integers(0, classes, (h, w), np.uint8), rng.integers(0, 40, (h, w), np.int32), rng.random(classes) < .5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 140), st.floats(.3, 2), st.floats(0, 1.5), st.sampled_from([0., .5, 1.]), st.integers(0, 99))
def test_the_quick_window_is_the_plain_one(h, w, crop, low, more, flip, seed):
    sample = random_sample(np.random.default_rng(seed), h, w)
    swapped = np.arange(256, dtype=np.uint8)
    swapped[[1, 2]] = 2, 1
    args = crop, (low, low + more), flip, swapped
    a = augment(sample, np.random.default_rng(seed), *args)
    image, labels, regions, tags = plain(sample, np.random.default_rng(seed), *args)
    assert np.abs(a.image - image).max() <= .5 + 1e-3 # float32, rounded
    assert np.array_equal(a.labels, labels) and np.array_equal(a.regions, regions) and np.array_equal(a.tags, tags)
    assert (a.image.dtype, a.labels.dtype, a.regions.dtype) == (np.uint8, np.uint8, np.int32)


# transforms

SIDES = Classes(("background", "hand left", "hand right", "head"))
TFMS = [v2.RandomRotation(30), v2.RandomPerspective(.4, 1.), v2.ColorJitter(.5, .5, .5), v2.GaussianBlur(3)]


def same(a, b): return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("image", "labels", "regions", "tags"))


@pytest.fixture
def sample(): return random_sample(np.random.default_rng(0), 48, 48, 4)


def scenes(n=6): return WeakSet(SceneSet(n, seed=1, size=64), "scribbles", regions=12)


def batches(weak, **kwargs): return [*weak_dls(weak, SceneSet(2, seed=9, size=64), bs=2, crop=48, steps=3, device="cpu", **kwargs).train]


def equal(a, b): return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_maps_move_with_the_image_by_the_nearest_pixel_and_nothing_is_unlabelled(seed):
    "The image holds what the maps hold; interpolated by the nearest pixel, it must still do so"
    rng = np.random.default_rng(seed)
    labels = rng.integers(1, 4, (40, 40)).astype(np.uint8) # never 0, which is what fills
    regions = rng.integers(1, 200, (40, 40)).astype(np.int32)
    s = Sample(np.stack([labels*60, regions, labels], -1).astype(np.uint8), labels, regions, np.ones(4, bool))
    moved = Transforms([v2.RandomAffine(60, (.2, .2), (.6, 1.4), interpolation=v2.InterpolationMode.NEAREST), v2.RandomHorizontalFlip()])(s, seed)
    there = moved.labels != UNLABELLED
    assert np.array_equal(moved.image[there][:, 2], moved.labels[there]) and np.array_equal(moved.image[there][:, 1], moved.regions[there])
    assert (moved.image[~there] == 0).all() and (moved.regions[~there] == regions.max() + 1).all() and there.any()


@pytest.mark.parametrize("fill", [0, 1, 255])
def test_whatever_a_transform_fills_with_is_no_label(fill, sample):
    there = Transforms(v2.RandomRotation((45, 45), fill=fill))(sample, 0).labels != UNLABELLED
    corners = there[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert not corners.any() and there[24, 24] and abs(there.mean() - .83) < .05 # an octagon


def test_none_changes_no_byte_and_photometry_no_map(sample):
    weak = scenes()
    assert equal(batches(weak), batches(weak, tfms=None))
    for (a, *maps), (b, *others) in zip(batches(weak), batches(weak, tfms=v2.ColorJitter(.5, .5))):
        assert not torch.equal(a, b) and all(map(torch.equal, maps, others))


@pytest.mark.parametrize("group", [1, 2])
def test_the_same_seed_gives_the_same_batches_with_any_number_of_workers(group):
    weak = scenes()
    first = batches(weak, tfms=TFMS, group=group)
    assert equal(first, batches(weak, tfms=TFMS, group=group, num_workers=2)) and not equal(first, batches(weak, tfms=TFMS, group=group, seed=1))


def test_global_streams_stay_as_they_were(sample):
    torch.manual_seed(3); np.random.seed(3); random.seed(3)
    want = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(3); np.random.seed(3); random.seed(3)
    Transforms(TFMS)(sample, 5)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == want


@pytest.mark.parametrize("t,turn", [(v2.RandomHorizontalFlip(1.), lambda a: a), (v2.RandomVerticalFlip(1.), lambda a: a[::-1, ::-1]),
                                    (v2.Compose([v2.RandomHorizontalFlip(1.), v2.RandomVerticalFlip(1.)]), lambda a: a[::-1, ::-1]), (v2.RandomRotation((180, 180)), lambda a: a[::-1, ::-1])])
def test_mirrors_are_undone_and_sides_stay(t, turn, sample):
    moved = Transforms(t)(sample, 0)
    assert same(moved, Sample(*(np.ascontiguousarray(turn(o)) for o in (sample.image, sample.labels, sample.regions)), sample.tags))


def test_the_kits_own_flip_still_changes_left_and_right():
    swap = SIDES.mirrored
    s = random_sample(np.random.default_rng(1), 48, 48, 4)
    flipped = Transforms(v2.ColorJitter(.2))(augment(s, rng_of(0), 48, (1, 1), 1., swap), 1)
    assert np.array_equal(swap[:4], [0, 2, 1, 3]) and np.array_equal(flipped.labels, swap[s.labels[:, ::-1]])


@pytest.mark.parametrize("t,message", [(v2.RandomCrop(20), "a window must stay uint8"), (v2.ToDtype(torch.float32, scale=True), "a window must stay uint8"), (v2.Grayscale(1), "a window must stay uint8")])
def test_other_sizes_and_types_are_refused(t, message, sample):
    with pytest.raises(SpmlError, match=message): Transforms(t)(sample, 0)


@pytest.mark.parametrize("t,message", [(v1.ColorJitter(.1), "use that of torchvision.transforms.v2"), (lambda image: image, "not a transform of torchvision"), ("flip", "not a transform")])
def test_what_cannot_move_maps_is_refused(t, message):
    with pytest.raises(SpmlError, match=message): weak_dls(scenes(2), SceneSet(2, size=64), bs=1, tfms=t)


def stand_in(monkeypatch):
    module = ModuleType("albumentations.augmentations")
    class Shift:
        __module__ = "albumentations.augmentations"
        def set_random_seed(self, seed): self.rng = np.random.default_rng(seed)
        def __call__(self, image, masks):
            assert all(m.dtype == np.float32 for m in masks) # OpenCV cannot move int32
            self.by = int(self.rng.integers(1, 20))
            move = lambda a: np.concatenate([np.zeros_like(a[:, :self.by]), a[:, :-self.by]], 1)
            return dict(image=move(image), masks=[move(m) for m in masks])
    module.Shift = Shift
    monkeypatch.setitem(sys.modules, "albumentations.augmentations", module)
    return Shift()


def test_albumentations_move_maps_along_from_the_same_seed(sample, monkeypatch):
    "With a stand-in"
    t = stand_in(monkeypatch)
    moved = Transforms(t)(sample, 4)
    by = t.by
    assert np.array_equal(moved.labels[:, by:], sample.labels[:, :-by]) and (moved.labels[:, :by] == UNLABELLED).all()
    assert np.array_equal(moved.regions[:, by:], sample.regions[:, :-by]) and (moved.regions[:, :by] == sample.regions.max() + 1).all()
    assert same(Transforms(t)(sample, 4), moved)


def test_a_run_remembers_its_transforms(tmp_path):
    weak, tiny = scenes(), RECIPES["small"].but(bs=2, crop=48, embed=dict(backbone="test_resnet", pretrained=False), dim=8)
    dls = lambda t: weak_dls(weak, SceneSet(2, seed=9, size=64), bs=2, crop=48, steps=1, device="cpu", tfms=t)
    def fit(t):
        learn = spml_learner(dls(t), recipe=tiny, path=tmp_path)
        with learn.no_bar(), learn.no_logging(): learn.fit_poly(1, resume=True)
    fit(v2.ColorJitter(.1))
    fit(v2.ColorJitter(.1)) # done
    with pytest.raises(SpmlError, match="tfms"): fit(v2.ColorJitter(.2))
    assert dls(v2.ColorJitter(.1)).train.new(num_workers=0).tfms is not None and "tfms" not in spml_learner(dls(None), recipe=tiny, path=tmp_path).settings["stream"]

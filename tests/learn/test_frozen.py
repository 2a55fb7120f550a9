"""A frozen backbone: cached features are those of the network, window by window; training from them is training; folders of others, changed images and cut files are refused; prediction, head and retrieval take it as any other."""
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spml_kit.core import SpmlError, VOID, rng_of, seed_everything
from spml_kit.data.batches import MEAN_COLOUR, weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import Sample, WeakSet
from spml_kit.infer.scores import predict_head
from spml_kit.learn.frozen import FeatureCache, FeatureLoader, fingerprint, grid_window, with_features
from spml_kit.learn.head import head_learner
from spml_kit.learn.learner import create_model, spml_learner
from spml_kit.method.nets import FrozenNet, SegNet, image_tensor
from spml_kit.method.recipes import RECIPES

SCENES, VALID = SceneSet(4, size=64), SceneSet(2, size=64, start=50)
WEAK = WeakSet(SCENES, "scribbles", regions=8)
KINDS = {"cnn": dict(backbone="test_resnet"), "vit": dict(backbone="test_vit"), "patch 14": dict(backbone="vit_small_patch14_dinov2", embed_dim=48, depth=3, num_heads=3), "windows": dict(backbone="swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)),
    "no laterals": dict(backbone="test_resnet", lateral=False, output_stride=8), "coarse": dict(backbone="efficientvit_m0")}


def net_of(kind="cnn", seed=0):
    torch.manual_seed(seed)
    return FrozenNet(dim=8, pretrained=False, **KINDS[kind])


def recipe_of(kind="cnn", **more): return RECIPES["small"].but(network="FrozenNet", embed=dict(pretrained=False, **KINDS[kind]), dim=8, grid=(2, 2), iterations=2, bs=2, crop=64, scale=(1, 1), warmup=2, **more)


def batches(cache=None, steps=3, seed=0, **more):
    dls = weak_dls(WEAK, VALID, bs=2, crop=64, steps=steps, seed=seed, scale=(1, 1), **more)
    return with_features(dls, cache) if cache else dls


@pytest.mark.parametrize("kind", KINDS)
def test_only_neck_and_head_learn_and_nothing_of_the_backbone_moves(kind):
    net, x = net_of(kind).train(), torch.rand(2, 3, 64, 64)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1.)
    for _ in range(2):
        optimiser.zero_grad(); net(x).square().mean().backward(); optimiser.step()
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(not k.startswith("backbone.") or k.startswith("backbone.neck.") for k in moved)
    assert any(k.startswith("backbone.neck.") for k in moved) == (kind in ("vit", "patch 14", "coarse"))


@pytest.mark.parametrize("kind", KINDS)
def test_features_along_with_an_image_take_its_place(kind):
    net = net_of(kind).eval()
    for size in (64, 64), (75, 101):
        x = torch.rand(2, 3, *size)
        kept = torch.zeros_like(x) # nobody looks at it
        kept.features, kept.features_of = net.fixed(x), net.key
        assert torch.equal(net(kept), net(x)) and [m.shape[-2:] for m in kept.features] == [tuple(-(-n//s) for n in size) for s in net.strides]


def test_keys_tell_backbones_apart():
    a, b = net_of(), net_of(seed=1)
    assert a.key == net_of().key != b.key and len({net_of(k).key for k in KINDS}) == len(KINDS) - 1 # without laterals it is the same backbone
    b.load_state_dict(a.state_dict())
    assert b.key == a.key == pickle.loads(pickle.dumps(a)).key
    vit, other = net_of("vit"), net_of("vit")
    torch.nn.init.ones_(other.backbone.neck.norm.weight.data.mul_(2))
    assert vit.key == other.key # the neck is none of it


@pytest.mark.parametrize("kind", ["cnn", "vit", "patch 14", "windows"])
@pytest.mark.parametrize("flipped", [False, True])
def test_windows_are_parts_of_the_features(tmp_path, kind, flipped):
    net = net_of(kind)
    cache = FeatureCache(tmp_path, net)
    image = np.random.default_rng(0).integers(0, 255, (80, 101, 3), np.uint8)
    cache.fill(SimpleNamespace(names=["a"], image=lambda i: image), progress=False)
    x = image_tensor(image[:, ::-1] if flipped else image)
    whole = [m[0].half() for m in net.eval().fixed(x)]
    for y, x0, side in ((0, 0, 64), (32, 64, 64), (64, 32, 32), (0, 0, 128)):
        for m, w, s in zip(cache.window("a", (80, 101), y, x0, side, flipped), whole, cache.strides):
            want = torch.zeros(w.shape[0], side//s, side//s, dtype=torch.half)
            part = w[:, y//s:(y + side)//s, x0//s:(x0 + side)//s]
            want[:, :part.shape[1], :part.shape[2]] = part
            torch.testing.assert_close(m, want, rtol=1e-2, atol=1e-3) # a batch of two is computed in another order


@pytest.mark.parametrize("size", [(64, 96), (50, 40), (33, 100)])
def test_grid_windows(size):
    "Image, labels and regions stay together; whatever is beyond is void; every place of the grid comes up, and every pixel is seen"
    h, w = size
    ids = np.arange(h*w).reshape(h, w)
    image = np.stack([ids % 256, ids//256, np.zeros_like(ids)], -1).astype(np.uint8)
    sample, seen, places = Sample(image, (ids % 7).astype(np.uint8), ids.astype(np.int32), np.ones(7, bool)), set(), set()
    for k in range(200):
        a, (y, x), flipped = grid_window(sample, rng_of(k), 32, 16)
        places.add((y, x))
        assert y % 16 == x % 16 == 0 and a.image.shape == (32, 32, 3)
        inside = (np.arange(32)[:, None] + y < h) & (np.arange(32)[None] + x < w)
        got = a.image[..., 0].astype(int) + 256*a.image[..., 1].astype(int)
        turned = ids[:, ::-1] if flipped else ids
        assert np.array_equal(got[inside], turned[y:y + 32, x:x + 32].ravel()) and np.array_equal(a.regions[inside], got[inside]) and np.array_equal(a.labels[inside], got[inside] % 7)
        assert (a.labels[~inside] == VOID).all() and (a.image[~inside] == MEAN_COLOUR).all()
        seen |= {*got[inside].tolist()}
    assert len(seen) == h*w and len(places) == np.prod([1 + -(-max(n - 32, 0)//16) for n in size])


def test_mirrored_classes_change_sides():
    mirrored = np.arange(256, dtype=np.uint8)
    mirrored[[1, 2]] = 2, 1
    sample = Sample(np.zeros((32, 32, 3), np.uint8), np.ones((32, 32), np.uint8), np.zeros((32, 32), np.int32), np.array([True, True, False]))
    a, _, flipped = grid_window(sample, rng_of(0), 32, 16, flip=1., mirrored=mirrored)
    assert flipped and (a.labels == 2).all() and a.tags.tolist() == [True, False, True]


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_training_from_the_cache_is_training_from_images(tmp_path, kind):
    "Of whole images without flips, the losses are those of the network that looks at them, but for half precision"
    losses = []
    for cached in False, True:
        seed_everything(0)
        cache = FeatureCache(tmp_path, create_model(recipe_of(kind), 13).embed).fill(SCENES, progress=False) if cached else None
        learn = spml_learner(batches(cache, flip=0.), recipe=recipe_of(kind), path=tmp_path/f"run{cached}")
        with learn.no_bar(), learn.no_logging(): learn.fit_poly(2)
        losses.append([r["loss"] for r in learn.history])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_what_is_there_stays_and_what_is_missing_is_made(tmp_path, monkeypatch):
    net = net_of()
    cache, made, make = FeatureCache(tmp_path, net, "test_resnet"), [], FeatureCache.make
    monkeypatch.setattr(FeatureCache, "make", lambda self, image: made.append(fingerprint(image)) or make(self, image))
    needs = cache.budget(SCENES)
    assert needs["images"] == 4 and needs["seconds"] > 0
    made.clear()
    cache.fill(SCENES.take(2), progress=False)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
    made.clear()
    again = FeatureCache(tmp_path, net, "test_resnet").fill(SCENES, progress=False)
    assert sorted(made[1:]) == sorted(fingerprint(SCENES.image(i)) for i in range(4) if SCENES.names[i] not in SCENES.take(2).names) # once each; the first sets things up
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    held = sum(sum(2*m.numel() for m in make(again, SCENES.image(i)).values()) for i in range(4))
    assert needs["bytes"] == held and sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) < 1.1*held + 4*2000
    assert json.loads((tmp_path/"settings.json").read_text()) == dict(spml_kit=1, kind="features", backbone="test_resnet", key=net.key, strides=net.strides)


def test_others_are_refused(tmp_path):
    cache = FeatureCache(tmp_path/"a", net_of()).fill(SCENES, progress=False)
    with pytest.raises(SpmlError, match="results of other settings .*key was"): FeatureCache(tmp_path/"a", net_of(seed=1))
    (tmp_path/"b").mkdir()
    (tmp_path/"b"/"notes.txt").write_text("mine")
    with pytest.raises(SpmlError, match="holds notes.txt"): FeatureCache(tmp_path/"b", net_of())
    changed = SimpleNamespace(names=SCENES.names, image=lambda i: 255 - SCENES.image(i))
    before = {p: p.read_bytes() for p in (tmp_path/"a").glob("*.safetensors")}
    with pytest.raises(SpmlError, match="made of another image.*nothing was changed"): cache.fill(changed, progress=False)
    assert all(p.read_bytes() == b for p, b in before.items())
    with pytest.raises(SpmlError, match=r"features of an image of \[64, 64\], not \[32, 64\]"): cache.window(SCENES.names[0], (32, 64), 0, 0, 32)
    with pytest.raises(SpmlError, match="no features of this image"): cache.window("scene9", (64, 64), 0, 0, 32)
    with pytest.raises(SpmlError, match="path below its folder"): cache.path("../x")
    cache.path(SCENES.names[0]).write_bytes(before[cache.path(SCENES.names[0])][:100])
    with pytest.raises(SpmlError, match="not a readable file of features"): cache.window(SCENES.names[0], (64, 64), 0, 0, 32)


def test_batches_are_checked(tmp_path):
    cache = FeatureCache(tmp_path, net_of()).fill(SCENES, progress=False)
    with pytest.raises(SpmlError, match="crop=40.*take 32"): FeatureLoader(WEAK, 2, 40, scale=(1, 1), cache=cache)
    with pytest.raises(SpmlError, match="one size"): with_features(weak_dls(WEAK, VALID, bs=2, crop=64, steps=1), cache)
    with pytest.raises(SpmlError, match="GroupLoader"): with_features(weak_dls(WeakSet(SCENES, "tags"), VALID, bs=2, crop=64, steps=1, group=2, scale=(1, 1)), cache)
    other = spml_learner(batches(cache), recipe=recipe_of(), seed=7, path=tmp_path/"run")
    with other.no_bar(), other.no_logging(), pytest.raises(SpmlError, match="features of another backbone"): other.fit_poly(1)


def test_loaders_can_be_made_anew_and_sent_to_workers(tmp_path):
    cache = FeatureCache(tmp_path, net_of()).fill(SCENES, progress=False)
    first = batches(cache).train
    for other in first.new(steps=2), pickle.loads(pickle.dumps(first)), batches(cache, num_workers=1).train:
        for a, b in zip(first, other):
            assert torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[0].features, b[0].features)) and a[0].features_of == b[0].features_of == cache.key
        first.round = other.round = 0


def test_too_little_space_is_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr("spml_kit.learn.frozen.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(SpmlError, match="features of 4 images take .* MB are free"): FeatureCache(tmp_path, net_of()).fill(SCENES, progress=False)
    assert [*tmp_path.glob("*.safetensors")] == []


def test_numbers_beyond_half_precision_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(FrozenNet, "fixed", lambda self, x: [1e6*torch.ones(2, 1, 4, 4)])
    with pytest.raises(SpmlError, match="exceed the range of half precision"): FeatureCache(tmp_path, net_of()).make(SCENES.image(0))


PROCESS = """
import sys, torch
from spml_kit.data.images import SceneSet
from spml_kit.learn.frozen import FeatureCache
from spml_kit.method.nets import FrozenNet
torch.manual_seed(0)
FeatureCache(sys.argv[1], FrozenNet(dim=8, pretrained=False, backbone='test_resnet')).fill(SceneSet(12, size=64), progress=False)
"""


@pytest.mark.long
def test_two_processes_fill_one_folder(tmp_path):
    both = [subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=240)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    scenes, cache = SceneSet(12, size=64), FeatureCache(tmp_path, net_of())
    assert all(cache.holds(n, scenes.image(i)) for i, n in enumerate(scenes.names)) and cache.budget(scenes)["images"] == 0
    assert {p.name for p in tmp_path.iterdir()} == {"settings.json", *(Path(cache.path(n)).name for n in scenes.names)}


def test_a_run_goes_on_and_its_network_predicts_and_takes_a_head(tmp_path):
    def learner(path):
        seed_everything(0)
        cache = FeatureCache(tmp_path/"features", create_model(recipe_of("vit"), 13).embed).fill(SCENES, progress=False)
        learn = spml_learner(batches(cache), recipe=recipe_of("vit"), path=path)
        return cache, learn
    cache, whole = learner(tmp_path/"whole")
    with whole.no_bar(), whole.no_logging(): whole.fit_poly(2)
    for rounds in 1, 2:
        _, broken = learner(tmp_path/"broken")
        with broken.no_bar(), broken.no_logging():
            broken.settings["rounds"] = 2
            broken.fit_poly(2, resume=True) if rounds == 2 else broken.fit_poly(2, checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), broken.model.state_dict().values()))
    head = head_learner(batches(cache), whole.model, recipe_of("vit"), path=tmp_path/"head")
    with head.no_bar(), head.no_logging(): head.fit_poly(1)
    image = np.random.default_rng(0).integers(0, 255, (75, 101, 3), np.uint8)
    assert predict_head(head.model, image).shape == (75, 101)


def test_heads_that_see_maps_get_those_that_there_are():
    class Deep(torch.nn.Module):
        sees_features = True
        def __init__(self): super().__init__(); self.last = torch.nn.Conv2d(64, 3, 1)
        def forward(self, maps, v): return self.last(maps[-1])
    net = net_of("vit")
    assert SegNet(net, Deep())(torch.rand(1, 3, 64, 64))[1].shape == (1, 3, 4, 4)

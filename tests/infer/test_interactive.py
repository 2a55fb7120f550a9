"The segmenter that learns while one draws: the same numbers again, no stroke waits, a killed process loses nothing, odd input is refused."
import os
import subprocess
import sys
import threading
import time
from functools import cache

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from spml_kit.core import Classes, SpmlError, UNLABELLED
from spml_kit.data.images import FolderSet, SceneSet
from spml_kit.files import load_tensors, read_index_png, save_tensors
from spml_kit.infer.bundle import load_model, save_model
from spml_kit.infer.interactive import BackgroundLearner, LiveSegmenter, doubt_of, fit_linear, stroke_place
from spml_kit.learn.frozen import FeatureCache
from spml_kit.method.nets import FrozenNet
from spml_kit.runs.export import export_network
from spml_kit.runs.predict import spml_predict

SIZE = 96


@pytest.fixture(scope="module")
def net(): return FrozenNet().eval()


@pytest.fixture(scope="module")
def images(): return SceneSet(3, size=SIZE, seed=3)


def marks(images, i):
    "Every class of a scene, on some of its pixels"
    mask = images.mask(i)
    chosen = np.random.default_rng(i).random(mask.shape) < .05
    return np.where(chosen & (mask < UNLABELLED), mask, np.uint8(UNLABELLED))


def test_the_same_strokes_give_the_same_numbers(images, net):
    a, b = (LiveSegmenter(images, net=net).update(0, marks(images, 0), steps=4).predict(0) for _ in range(2))
    assert torch.equal(a.scores, b.scores) and a.place == b.place
    np.testing.assert_array_equal(a.doubt, b.doubt)


def test_other_steps_give_other_numbers(images, net):
    a, b = (LiveSegmenter(images, net=net).update(0, marks(images, 0), steps=n).predict(0, crf=False) for n in (0, 4))
    assert not torch.equal(a.parts["retrieval"], b.parts["retrieval"])


def test_an_opinion_is_of_the_image(images, net):
    labels = marks(images, 0)
    o = LiveSegmenter(images, net=net).update(0, labels, steps=4).predict(0)
    assert o.labels.shape == o.doubt.shape == labels.shape and o.labels.dtype == np.uint8
    assert set(np.unique(o.labels)) <= set(np.unique(labels[labels < UNLABELLED]))
    assert 0 <= o.doubt.min() <= o.doubt.max() <= 1
    assert all(-.5 <= v < n for v, n in zip(o.place, labels.shape[::-1]))
    for p in o.parts.values(): torch.testing.assert_close(p.sum(0), torch.ones(p.shape[1:]), atol=1e-4, rtol=0)
    truth = images.mask(0)
    assert (o.labels == truth).mean() > .8


def test_strokes_that_are_taken_back_leave_nothing(images, net):
    s = LiveSegmenter(images, net=net).update(0, marks(images, 0), steps=2)
    s.update(0, np.full((SIZE, SIZE), UNLABELLED, np.uint8), steps=2)
    assert s.drawn == s.own == {}
    with pytest.raises(SpmlError, match="nothing is drawn"): s.predict(0)


def test_one_stroke_of_one_class_labels_all(images, net):
    labels = np.full((SIZE, SIZE), UNLABELLED, np.uint8)
    labels[40:44, 20:60] = 1
    assert (LiveSegmenter(images, net=net).update(0, labels).predict(0).labels == 1).all()


def test_void_is_not_drawn(images, net):
    labels = marks(images, 0)
    a, b = (LiveSegmenter(images, net=net).update(0, m, steps=2).predict(0) for m in (labels, np.where(labels == 254, np.uint8(255), labels)))
    assert torch.equal(a.scores, b.scores)


def test_what_is_not_drawn_on_leans_on_the_rest(images, net):
    s = LiveSegmenter(images, net=net).update(0, marks(images, 0), steps=2).consolidate()
    o = s.predict(1)
    assert set(o.parts) == {"head", "retrieval"} and o.labels.shape == (SIZE, SIZE)
    assert sorted(s.order()) == [0, 1, 2]
    doubts = [s.doubt(i) for i in s.order()]
    assert doubts == sorted(doubts, reverse=True)


@pytest.mark.parametrize("call, why", [
    (lambda s, m: s.update(0, m[:5]), "must agree"), (lambda s, m: s.update(3, m), "0..2"), (lambda s, m: s.update(-1, m), "0..2"),
    (lambda s, m: s.update(0, np.where(m == 254, np.uint8(200), m)), "200"), (lambda s, m: s.predict(0), "nothing is drawn"),
    (lambda s, m: s.save("x"), "no state to save")])
def test_bad_input_is_refused(images, net, call, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpmlError, match=why): call(LiveSegmenter(images, net=net), marks(images, 0))
    assert not (tmp_path / "x").exists()


def test_state_comes_back(images, net, tmp_path):
    s = LiveSegmenter(images, net=net).update(0, marks(images, 0), steps=2).consolidate()
    s.save(tmp_path / "s.safetensors")
    back = LiveSegmenter(images, net=net).load(tmp_path / "s.safetensors")
    assert torch.equal(back.predict(0).scores, s.predict(0).scores) and back.updates == 1
    with pytest.raises(SpmlError, match="classes"): LiveSegmenter(images, Classes(("a", "b")), net=net).load(tmp_path / "s.safetensors")
    with pytest.raises(SpmlError, match="not of these images"): LiveSegmenter(SceneSet(3, size=SIZE, seed=9), net=net).load(tmp_path / "s.safetensors")
    tensors, meta = load_tensors(tmp_path / "s.safetensors")
    save_tensors(tmp_path / "t.safetensors", tensors | dict(neck=tensors["neck"][:3]), **meta)
    with pytest.raises(SpmlError, match="neck"): LiveSegmenter(images, net=net).load(tmp_path / "t.safetensors")
    (tmp_path / "cut").write_bytes((tmp_path / "s.safetensors").read_bytes()[:500])
    with pytest.raises(SpmlError, match="cut short"): LiveSegmenter(images, net=net).load(tmp_path / "cut")


def test_masks_are_written(images, net, tmp_path):
    s = LiveSegmenter(images, net=net).update(0, marks(images, 0), steps=2)
    path, = s.write_masks(tmp_path / "masks", [0])
    np.testing.assert_array_equal(read_index_png(path), s.predict(0).labels)


def test_a_stroke_reads_no_image(images, net, monkeypatch):
    s = LiveSegmenter(images, net=net).update(0, marks(images, 0), steps=1)
    monkeypatch.setattr(type(images), "image", lambda self, i: pytest.fail("the image is read again"))
    s.update(0, marks_of_size(SIZE), steps=1)


def marks_of_size(n):
    labels = np.full((n, n), UNLABELLED, np.uint8)
    labels[4:8, 4:40], labels[60:64, 4:40] = 0, 1
    return labels


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_order_of_the_images_does_not_decide_what_they_share(images, net, order):
    s = LiveSegmenter(images, net=net)
    for i in order: s.update(i, marks(images, i), steps=0)
    assert torch.equal(s.consolidate().base, in_turn(images, net).base) and torch.equal(s.predict(2).scores, in_turn(images, net).predict(2).scores)


@cache
def in_turn(images, net):
    s = LiveSegmenter(images, net=net)
    for i in (0, 1): s.update(i, marks(images, i), steps=0)
    return s.consolidate()


# taken along

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Files larger than what is looked at"
    folder, scenes = tmp_path_factory.mktemp("pictures"), SceneSet(3, size=SIZE, seed=3)
    for i in range(3): Image.fromarray(scenes.image(i)[:, :80]).save(folder / f"scene_{i}.png")
    return FolderSet(folder, classes=scenes.classes, max_size=72)


def test_a_model_labels_files_as_the_segmenter_does(pictures, net, tmp_path):
    s = LiveSegmenter(pictures, net=net)
    for i in (0, 1): s.update(i, marks(SceneSet(3, size=SIZE, seed=3), i)[:, :80], steps=2)
    save_model(tmp_path / "model.spml", s.as_model())
    assert torch.equal(load_model(tmp_path / "model.spml").scores(pictures.image(2)), s.predict(2).scores)
    assert spml_predict([str(tmp_path / "model.spml"), str(pictures.paths["scene_2"]), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    shown, = s.write_masks(tmp_path / "masks", [2])
    assert (tmp_path / "out" / "labels" / "scene_2.png").read_bytes() == shown.read_bytes()
    with pytest.raises(SpmlError, match="this model learned from strokes"): export_network(load_model(tmp_path / "model.spml"), tmp_path / "net.pt2")
    assert not (tmp_path / "net.pt2").exists()


def test_a_model_changes_nothing_and_is_changed_by_nothing(images, net):
    s = LiveSegmenter(images, net=net).update(0, marks(images, 0), steps=2).consolidate()
    before, model = s.predict(0).scores, s.as_model()
    assert torch.equal(s.predict(0).scores, before)
    there = model.scores(images.image(2))
    s.update(1, marks(images, 1), steps=4).consolidate()
    assert torch.equal(model.scores(images.image(2)), there) and not torch.equal(s.predict(2).scores, there)


def test_a_model_says_which_network_it_is_of(images, tmp_path):
    own = FrozenNet("mobilenetv3_small_050", pretrained=False)
    s = LiveSegmenter(images, net=own).update(0, marks(images, 0), steps=1)
    for embed in (None, dict(backbone="mobilenetv3_small_075")):
        with pytest.raises(SpmlError, match="not the network that was given"): s.as_model(embed)
    save_model(tmp_path / "m", s.as_model(dict(backbone="mobilenetv3_small_050")))
    assert torch.equal(load_model(tmp_path / "m").scores(images.image(2)), s.predict(2).scores)
    with pytest.raises(SpmlError, match="nothing is drawn"): LiveSegmenter(images, net=own).as_model()


def test_features_on_disk_give_the_same(images, net, tmp_path):
    cache = FeatureCache(tmp_path / "features", net)
    a = LiveSegmenter(images, cache=cache).update(0, marks(images, 0), steps=2).predict(0)
    assert cache.path(images.names[0]).is_file()
    b = LiveSegmenter(images, cache=cache).update(0, marks(images, 0), steps=2).predict(0)
    assert torch.equal(a.scores, b.scores)


# the pieces against their definitions

def test_the_classifier_is_at_its_minimum():
    g = torch.Generator().manual_seed(0)
    x, y, prior = torch.randn(60, 4, generator=g), torch.randint(3, (60,), generator=g), torch.zeros(5, 3)
    w = fit_linear(x, y, prior, decay=.01, steps=60).double().requires_grad_()
    weight = 1/torch.bincount(y)[y].double()
    logits = torch.nn.functional.pad(x, (0, 1), value=1.).double() @ w
    ((torch.nn.functional.cross_entropy(logits, y, reduction="none") @ weight/weight.sum()) + .01*w[:-1].square().sum()).backward()
    assert w.grad.abs().max() < 1e-3


def test_classes_that_are_not_drawn_keep_their_prior():
    prior = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    w = fit_linear(torch.tensor([[0., 1], [1, 0]]), torch.tensor([0, 2]), prior)
    assert torch.equal(w[:, [1, 3]], prior[:, [1, 3]]) and not torch.equal(w, prior)


def test_doubt_is_none_where_all_agree_and_most_where_they_differ():
    sure = torch.tensor([[[1., 1.]], [[0., 0.]]])
    differ = torch.tensor([[[1., 0.]], [[0., 1.]]])
    doubt = doubt_of([sure, differ])
    torch.testing.assert_close(doubt, torch.tensor([[0., 1.]]))
    assert stroke_place([sure, differ], doubt) == (.75, .5)
    x, y = stroke_place([sure, sure], doubt_of([sure, sure]))
    assert 0 <= x <= 1 and 0 <= y <= 1


# in the background

class Slow:
    "A segmenter that takes its time"
    def __init__(self): self.learnt, self.go, self.begun = [], threading.Event(), threading.Event()
    def update(self, i, labels):
        self.begun.set()
        assert self.go.wait(20)
        if labels.max() == 99: raise SpmlError("odd labels")
        self.learnt.append((i, int(labels.max())))
    def predict(self, i): return f"opinion of {i}"
    def consolidate(self): pass
    def refresh(self): return False
    def save(self, path): path.write_text(str(self.learnt))


def test_a_stroke_never_waits_and_only_the_newest_is_learnt(tmp_path):
    slow, heard = Slow(), []
    learner = BackgroundLearner(slow, lambda i, o: heard.append((i, o)), tmp_path / "state")
    start = time.perf_counter()
    learner.stroke(0, np.full((4, 4), 1))
    assert slow.begun.wait(10)
    for k in range(2, 30): learner.stroke(0, np.full((4, 4), k))
    assert time.perf_counter() - start < 5 and slow.learnt == [] # all handed over while the first is still being learnt
    slow.go.set()
    assert learner.wait(20)
    assert slow.learnt == [(0, 1), (0, 29)] and heard[-1] == (0, "opinion of 0")
    learner.close()
    learner.thread.join(10)
    assert not learner.thread.is_alive()


def test_an_error_is_told_and_the_next_stroke_is_learnt():
    slow, heard = Slow(), []
    slow.go.set()
    learner = BackgroundLearner(slow, lambda i, o: heard.append(o))
    learner.stroke(0, np.full((4, 4), 99))
    assert learner.wait(20) and isinstance(heard[-1], SpmlError)
    learner.stroke(0, np.full((4, 4), 1))
    assert learner.wait(20) and heard[-1] == "opinion of 0"
    learner.close()


@pytest.mark.parametrize("last", ["learner.stroke(0, labels)", "learner.stroke(0, labels); time.sleep(2.); learner.close()"])
def test_an_interpreter_ends_while_a_stroke_is_learnt(last, tmp_path):
    code = f"""
import time
import numpy as np
from spml_kit.data.images import SceneSet
from spml_kit.infer.interactive import BackgroundLearner, LiveSegmenter
from spml_kit.method.nets import FrozenNet
images = SceneSet(3, size={SIZE}, seed=3)
learner = BackgroundLearner(LiveSegmenter(images, net=FrozenNet().eval()))
labels = np.full(({SIZE}, {SIZE}), 254, np.uint8)
labels[:9], labels[-9:] = 0, 1
{last}
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr # an abort says -6


def test_a_killed_process_leaves_a_whole_state(tmp_path):
    labels = np.full((64, 64), UNLABELLED, np.uint8)
    labels[5:9, 5:9], labels[40:44, 20:50] = 0, 1
    s = LiveSegmenter(SceneSet(1, size=64, seed=3)).update(0, labels, steps=1)
    s.save(tmp_path / "s")
    pid = os.fork()
    if not pid:
        try:
            safetensors.torch.save_file = lambda tensors, path, metadata: (open(path, "wb").write(b"half"), os._exit(9)) # killed in the middle of the next
            s.save(tmp_path / "s")
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    back = LiveSegmenter(SceneSet(1, size=64, seed=3)).load(tmp_path / "s")
    assert back.updates == 1 and (back.drawn[0] < UNLABELLED).any()

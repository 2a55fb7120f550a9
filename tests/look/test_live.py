"""The live view without a notebook: curves, pictures, stopping at any moment, and runs that go on as if nobody had stopped them."""
import os
import signal
import threading

import ipywidgets
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from spml_kit.data.batches import weak_dls
from spml_kit.core import SpmlError, UNLABELLED
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.learn.learner import spml_learner
from spml_kit.look.live import LiveCB, LossCurves, answer_while_busy
from spml_kit.method.recipes import RECIPES

STEPS, ROUNDS = 4, 3
TINY = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8, grid=(3, 3), iterations=3, bs=2, crop=64, warmup=2)


def learner(path, weak=None, **kwargs):
    weak = weak or WeakSet(SceneSet(6, size=64), "scribbles", regions=12)
    learn = spml_learner(weak_dls(weak, SceneSet(2, size=64, start=100), bs=2, crop=64, steps=STEPS, device="cpu"), recipe=TINY, path=path, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda row: None
    return learn


@pytest.fixture(autouse=True)
def interruptible():
    "A shell's background jobs ignore interrupts"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def live(**kwargs): return LiveCB(**dict(images=2, every=2, show=False) | kwargs)


class AtCB(Callback):
    "Does something at an event of a step, counted over the run"
    def __init__(self, event, step, do): self.event, self.at, self.do, self.n = event, step, do, 0
    def __call__(self, name):
        if name == self.event:
            if self.n == self.at: self.do()
            self.n += 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run without a live view"
    learn = learner(tmp_path_factory.mktemp("whole"))
    learn.fit_poly(ROUNDS)
    return learn


def assert_same_run(learn, whole):
    assert learn.history == whole.history
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, whole.model.state_dict()[k]), k


def test_looking_changes_nothing(whole, tmp_path):
    learn, view = learner(tmp_path), live(every=1)
    learn.fit_poly(ROUNDS, cbs=view)
    assert_same_run(learn, whole)
    assert view.curves.steps == list(range(1, STEPS * ROUNDS + 1)) and view.note == f"{ROUNDS} rounds done"
    means = np.array(view.curves.parts["head"]).reshape(ROUNDS, STEPS).mean(1) # of the steps of a round: what the history says
    np.testing.assert_allclose(means, [row["head"] for row in learn.history], rtol=1e-5)


@pytest.mark.parametrize("event, step", [("before_batch", 0), ("after_step", 2), ("after_step", STEPS + 1), ("after_step", 2 * STEPS - 1), ("before_validate", 1), ("after_epoch", 1), ("before_train", 1)])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["own checkpoints", "those of fit_poly"])
def test_a_stopped_run_goes_on_exactly(whole, tmp_path, event, step, checkpoint):
    view = live()
    learn = learner(tmp_path)
    learn.fit_poly(ROUNDS, checkpoint=checkpoint, cbs=[view, AtCB(event, step, view.stop)])
    assert "stopped in round" in view.note and len(learn.history) < ROUNDS
    learn.fit_poly(ROUNDS, resume=True, cbs=view) # the same objects
    assert_same_run(learn, whole)
    assert view.curves.steps == list(range(2, STEPS * ROUNDS + 1, 2)) and list(view.quality) == list(range(ROUNDS + 1))


def test_a_fresh_process_goes_on(whole, tmp_path):
    view = live()
    learner(tmp_path).fit_poly(ROUNDS, cbs=[view, AtCB("after_step", STEPS + 1, view.stop)])
    learn = learner(tmp_path)
    learn.fit_poly(ROUNDS, resume=True, cbs=live())
    assert_same_run(learn, whole)


def test_an_older_checkpoint_is_not_taken_for_this_run(whole, tmp_path):
    learner(tmp_path).fit_poly(ROUNDS, checkpoint=True)
    view, learn = live(), learner(tmp_path)
    learn.fit_poly(ROUNDS, cbs=[view, AtCB("after_step", 1, view.stop)])
    learn.fit_poly(ROUNDS, resume=True)
    assert_same_run(learn, whole)


def test_first_interrupt_stops_second_breaks(whole, tmp_path):
    interrupt, before = lambda: signal.raise_signal(signal.SIGINT), signal.getsignal(signal.SIGINT)
    learn, view = learner(tmp_path), live()
    learn.fit_poly(ROUNDS, cbs=[view, AtCB("after_step", STEPS, interrupt)])
    assert "stopped in round 2" in view.note and signal.getsignal(signal.SIGINT) == before
    def twice(): interrupt(); interrupt()
    with pytest.raises(KeyboardInterrupt): learner(tmp_path).fit_poly(ROUNDS, cbs=[live(), AtCB("after_step", 1, twice)])
    assert signal.getsignal(signal.SIGINT) == before
    learn.fit_poly(ROUNDS, resume=True)
    assert_same_run(learn, whole)


def test_an_interrupt_after_an_error_is_an_interrupt(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    def fail(): raise RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"): learner(tmp_path).fit_poly(ROUNDS, cbs=[live(), AtCB("after_step", 1, fail)])
    with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_training_in_a_thread(whole, tmp_path):
    "Signals belong to the main thread; stopping from another one works all the same"
    learn, view = learner(tmp_path), live()
    thread = threading.Thread(target=lambda: learn.fit_poly(ROUNDS, cbs=[view, AtCB("after_step", STEPS, view.stop)]))
    thread.start(); thread.join(60)
    assert "stopped in round 2" in view.note
    learn.fit_poly(ROUNDS, resume=True)
    assert_same_run(learn, whole)


def test_quality_without_masks(tmp_path):
    "Closed masks stay closed; images of which nothing is known are passed over"
    scenes = SceneSet(4, size=64)
    said = [WeakSet(scenes, "scribbles").sample(i).labels for i in range(4)]
    said[0] = np.full_like(said[0], UNLABELLED)
    weak = WeakSet(SceneSet(4, size=64, masks=False), lambda i: said[i], regions=12)
    view = live(images=9)
    learner(tmp_path, weak).fit_poly(1, cbs=view)
    assert view.judge == "weak labels" and len(view.maps) == 3 and all(len(row) == 4 for row in view.maps)
    assert all(0 <= q <= 100 for q in view.quality.values())
    assert "pseudo-labels against weak labels" in [t.get_text() for ax in view.figure().subfigs[0].axes for t in ax.get_legend().get_texts()]


def test_plain_training_has_one_curve(tmp_path):
    view = live()
    learner(tmp_path, method="cross_entropy").fit_poly(1, cbs=view)
    assert list(view.curves.parts) == ["loss"] and view.curves.steps == [2, 4]


def test_curves_forget_what_is_done_again():
    class Loss: sums, count = {}, 0
    curves = LossCurves(loss := Loss())
    for step in (2, 4, 6):
        loss.sums, loss.count = {"a": torch.tensor(float(step))}, step
        curves.look(step)
    curves.forget(4)
    assert (curves.steps, curves.parts) == ([2, 4], {"a": [1, 1]})


def test_messages_are_left_to_the_subshell():
    button = ipywidgets.Button()
    assert answer_while_busy(button) is button # without a kernel there is nothing to leave
    button.comm._reply_subshell_for = lambda data, asked: None # as ipykernel 7.4 does
    answer_while_busy(button)
    assert button.comm._reply_subshell_for({}, "subshell-1") == "subshell-1"


def test_a_kernel_that_nobody_looks_at(tmp_path):
    "As papermill runs it: no harm, and the saved notebook holds the last picture and a sentence"
    code = f"""import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_live import *
view = LiveCB(images=1, every=2)
learner({str(tmp_path)!r}).fit_poly(1, cbs=view)"""
    nb = new_notebook(cells=[new_code_cell("import warnings; warnings.simplefilter('ignore')"), new_code_cell(code)])
    NotebookClient(nb, timeout=120, kernel_name="python3").execute()
    kinds = [sorted(o.data) for o in nb.cells[1].outputs]
    assert ["text/plain"] in kinds and any("image/png" in k for k in kinds)
    assert not any("widget" in k for kind in kinds for k in kind)
    assert "1 rounds done" in [o.data.get("text/plain") for o in nb.cells[1].outputs]


@pytest.mark.parametrize("wrong", [dict(every=0), dict(images=0), dict(stride=0)], ids=str)
def test_odd_settings(wrong):
    with pytest.raises(SpmlError, match="must be at least 1"): LiveCB(**wrong)

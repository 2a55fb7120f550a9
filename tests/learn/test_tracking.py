"""What a training tells a tracker. None of the four packages is installed where these tests were written, so a stand-in module that records its calls is put into `sys.modules` for each; the calls are those of the packages' documentation."""
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from fastai.callback.core import Callback

from spml_kit.core import SpmlError
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.learn import tracking
from spml_kit.learn.learner import spml_learner
from spml_kit.learn.tracking import TRACKERS, TrackCB, tracked_picture, tracker_module
from spml_kit.method.recipes import RECIPES
from spml_kit.runs.experiment import check_parameters, find_notebook
from spml_kit.runs.pipelines import Pipeline, fit_run

TINY = RECIPES["small"].but(bs=2, crop=64, embed=dict(backbone="test_resnet", pretrained=False), dim=8)


def stand_in(kind, notes):
    "A module that writes into `notes` what it is told: (what, name, step, value)"
    module = ModuleType(TRACKERS[kind])
    values = lambda said, step=None: [notes.append(("image" if isinstance(v, np.ndarray) else "number", k, step, v)) for k, v in said.items()]
    end = lambda *_: notes.append(("end", None, None, None))
    config = SimpleNamespace(update=lambda said: notes.append(("settings", None, None, said)))
    begun = lambda **kwargs: notes.append(("init", None, None, kwargs)) or SimpleNamespace(config=config, log=values, finish=end)
    if kind == "tensorboard":
        def SummaryWriter(folder):
            notes.append(("init", None, None, folder))
            return SimpleNamespace(add_text=lambda name, text: notes.append(("settings", None, None, json.loads(text.strip("`\n")))), add_scalar=lambda k, v, step: values({k: v}, step),
                                   add_image=lambda k, v, step, dataformats: values({k: v}, step) if dataformats == "HWC" else None, flush=lambda: None, close=end)
        module.SummaryWriter = SummaryWriter
    elif kind == "mlflow":
        def MlflowClient(tracking_uri):
            notes.append(("init", None, None, tracking_uri))
            return SimpleNamespace(get_experiment_by_name=lambda name: None, create_experiment=lambda name, place: "1", create_run=lambda e, run_name: SimpleNamespace(info=SimpleNamespace(run_id="r")),
                                   log_dict=lambda run, said, file: notes.append(("settings", None, None, said)), log_metric=lambda run, k, v, step: values({k: v}, step),
                                   log_image=lambda run, image, file: values({file.rpartition("_")[0]: image}, int(file.rpartition("_")[2].removesuffix(".png"))), set_terminated=end)
        module.MlflowClient = MlflowClient
    else: module.init, module.Image = begun, lambda image: image
    return module


@pytest.fixture(params=TRACKERS)
def tracker(request, monkeypatch):
    notes = []
    monkeypatch.setitem(sys.modules, TRACKERS[request.param], stand_in(request.param, notes))
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    return request.param, notes


def learner(path):
    scenes = SceneSet(4, seed=1, size=64)
    return spml_learner(weak_dls(WeakSet(scenes, "scribbles", regions=12), scenes, bs=2, crop=64, steps=2), recipe=TINY, path=path)


def fit(learn, rounds, *cbs, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(rounds, cbs=[*cbs], **kwargs)
    return learn.history


def numbers(notes): return {(k, step): v for what, k, step, v in notes if what == "number"}


def test_every_number_of_the_history_settings_and_pictures_are_sent(tracker, tmp_path):
    "With a stand-in for each package"
    kind, notes = tracker
    learn = learner(tmp_path)
    history = fit(learn, 2, TrackCB(kind, tmp_path / "track", "mine"))
    assert numbers(notes) == {(k, row["steps"]): v for row in history for k, v in row.items() if k not in ("round", "steps") and v is not None}
    assert notes[0][0] == "init" and str(tmp_path / "track") in str(notes[0][3]) or kind == "trackio"
    assert [w for w, *_ in notes].count("settings") == 1 and notes[1][3]["rounds"] == 2 and notes[-1][0] == "end"
    pictures = [(k, step, v) for what, k, step, v in notes if what == "image"]
    assert [p[:2] for p in pictures] == [("predictions", row["steps"]) for row in history]
    assert pictures[0][2].shape == (2*64, 3*64, 3) and pictures[0][2].dtype == np.uint8
    assert np.array_equal(pictures[0][2][:64, :64], learn.dls.valid.dataset.image(0))


def test_tracking_changes_nothing(tracker, tmp_path):
    "With a stand-in for each package"
    plain = fit(learner(tmp_path / "a"), 1)
    assert fit(learner(tmp_path / "b"), 1, TrackCB(tracker[0], tmp_path / "track")) == plain


class StopCB(Callback):
    order = 95 # after the checkpoint
    def after_epoch(self): raise KeyboardInterrupt


def test_a_run_that_is_gone_on_with_sends_what_is_new(tmp_path, monkeypatch):
    "With a stand-in for TensorBoard"
    first, second = [], []
    monkeypatch.setitem(sys.modules, TRACKERS["tensorboard"], stand_in("tensorboard", first))
    with pytest.raises(KeyboardInterrupt): fit(learner(tmp_path), 3, TrackCB("tensorboard", tmp_path / "track", pictures=0), StopCB(), resume=True)
    monkeypatch.setitem(sys.modules, TRACKERS["tensorboard"], stand_in("tensorboard", second))
    history = fit(learner(tmp_path), 3, TrackCB("tensorboard", tmp_path / "track"), resume=True)
    assert {step for _, step in numbers(first)} == {2} and not [n for n in first if n[0] == "image"]
    assert {step for _, step in numbers(second)} == {4, 6} and len(history) == 3


@pytest.mark.parametrize("kind", TRACKERS)
def test_absent_packages_are_refused_in_one_sentence(kind, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, TRACKERS[kind], None)
    with pytest.raises(SpmlError, match=f"{kind} is not installed: pip install {kind}$"): TrackCB(kind, tmp_path)
    weak = WeakSet(SceneSet(2, size=64), "scribbles", regions=12)
    with pytest.raises(SpmlError, match=f"pip install {kind}"): Pipeline(weak, weak, "scribbles", tmp_path / "run", track=kind)
    assert not (tmp_path / "run").exists()


def test_unknown_trackers_are_refused():
    with pytest.raises(SpmlError, match="no tracker 'wand'; did you mean 'wandb'"): tracker_module("wand")


def test_a_network_without_a_head_of_its_own_has_numbers_and_no_picture(tmp_path, monkeypatch):
    "With a stand-in for TensorBoard"
    notes = []
    monkeypatch.setitem(sys.modules, TRACKERS["tensorboard"], stand_in("tensorboard", notes))
    cb = TrackCB("tensorboard", tmp_path)
    cb.learn = SimpleNamespace(training=False, pred=np.zeros((2, 3)))
    cb.after_pred()
    assert cb.seen is None


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    "With a stand-in for TensorBoard"
    notes = []
    monkeypatch.setitem(sys.modules, TRACKERS["tensorboard"], stand_in("tensorboard", notes))
    monkeypatch.setattr(tracking, "rank", lambda: 1)
    fit(learner(tmp_path), 1, TrackCB("tensorboard", tmp_path / "track"))
    assert notes == [] and not (tmp_path / "track").exists()


def test_fit_run_tells_its_tracker(tmp_path, monkeypatch):
    "With a stand-in for TensorBoard"
    notes, scenes = [], SceneSet(4, seed=1, size=64)
    monkeypatch.setitem(sys.modules, TRACKERS["tensorboard"], stand_in("tensorboard", notes))
    make = lambda dls, path: spml_learner(dls, recipe=TINY, path=path)
    learn = fit_run(make, WeakSet(scenes, "scribbles", regions=12), scenes, TINY, 1, 2, tmp_path / "embedding", track="tensorboard")
    assert numbers(notes)["loss", 2] == learn.history[0]["loss"] and notes[0][3] == str(tmp_path / "embedding" / "track" / "embedding")


def test_pictures_lie_side_by_side():
    rng = np.random.default_rng(0)
    images, palette = rng.integers(0, 255, (2, 3, 4, 3), np.uint8), rng.integers(0, 255, (256, 3), np.uint8)
    maps = rng.integers(0, 256, (2, 2, 3, 4))
    made = tracked_picture(images, *maps, palette=palette)
    for i in range(2):
        assert np.array_equal(made[3*i:3*i + 3, :4], images[i])
        for k in range(2): assert np.array_equal(made[3*i:3*i + 3, 4*(k + 1):4*(k + 2)], palette[maps[k, i]])


def test_a_run_is_refused_before_its_kernel_starts(monkeypatch):
    monkeypatch.setitem(sys.modules, TRACKERS["mlflow"], None)
    with pytest.raises(SpmlError, match="single: track: mlflow is not installed: pip install mlflow"): check_parameters(find_notebook("single"), dict(track="mlflow"))
    with pytest.raises(SpmlError, match="no 'tensorbord'; did you mean 'tensorboard'"): check_parameters(find_notebook("single"), dict(track="tensorbord"))
    assert check_parameters(find_notebook("single"), dict(track="none")) == dict(track="none")


@pytest.mark.parametrize("kind", TRACKERS)
def test_the_package_itself_keeps_what_it_is_told(kind, tmp_path, monkeypatch):
    "Of those that are installed: pip install spml_kit[track]"
    pytest.importorskip(TRACKERS[kind])
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "track"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    history = fit(learner(tmp_path), 2, TrackCB(kind, tmp_path / "track", "first"))
    files = [p for p in (tmp_path / "track").rglob("*") if p.is_file() and p.stat().st_size]
    assert files
    if kind != "tensorboard": assert sum(p.suffix == ".png" for p in files) == len(history) == 2

"""What training tells of itself: schedule, history, time, divergence."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spml_kit.core import SpmlError
from test_learner import ROUNDS, STEPS, TINY, Probe, learner
from spml_kit.learn import callbacks
from spml_kit.learn.callbacks import TimeCB, lr_poly


def times(monkeypatch, seconds, rounds=4, steps=30, after=0, begin=0):
    "A run whose steps take so long, and the first three ten times that"
    clock = [0.]
    monkeypatch.setattr(callbacks, "perf_counter", lambda: clock[0])
    cb = TimeCB("embedding", after)
    cb.learn = SimpleNamespace(training=True, loss=torch.tensor(1.), n_epoch=rounds, epoch=begin, iter=0, dls=SimpleNamespace(train=range(steps)))
    for epoch in range(begin, rounds):
        for k in range(steps):
            clock[0] += seconds*(10 if epoch == begin and k < 3 else 1)
            cb.learn.epoch, cb.learn.iter = epoch, k
            cb.after_batch()


@pytest.mark.parametrize("seconds, more, said", [
    (.5, {}, "a step takes 0.50 s: about 1 minute for 113 steps of training"),
    (6, dict(after=60), "a step takes 6.00 s: about 17 minutes for 173 steps of training, including the heads"),
    (6, dict(begin=2), "a step takes 6.00 s: about 5 minutes for 53 steps"),
    (.1, {}, ""), (6, dict(steps=4, rounds=1), "")])
def test_the_time_is_told_once_and_early(monkeypatch, capsys, seconds, more, said):
    times(monkeypatch, seconds, **more)
    out = capsys.readouterr().out
    assert out.count("a step takes") == bool(said) and said in out


def test_scoring_is_no_step(monkeypatch, capsys):
    cb = TimeCB("head")
    cb.learn = SimpleNamespace(training=False)
    for _ in range(20): cb.after_batch()
    assert cb.counted == 0


@pytest.mark.parametrize("recipe", [TINY, TINY.but(optimiser="sgd", multipliers=(1, 2, 10, 20), lr=3e-3, wd=5e-4, warmup=4)], ids=lambda r: r.optimiser)
def test_schedule_and_decay(recipe):
    learn, probe = learner(recipe=recipe), Probe()
    learn.fit_poly(ROUNDS, cbs=probe)
    for t, row in enumerate(probe.rows):
        lr = lr_poly(t, recipe.lr, ROUNDS*STEPS, recipe.warmup, recipe.power)
        assert row["lr"] == pytest.approx([m*lr for m in recipe.multipliers]) and row["wd"] == [recipe.wd, 0, recipe.wd, 0]
    assert [row["bank"] for row in probe.rows] == [1] + [2]*(ROUNDS*STEPS - 1)
    assert [row["epoch"] for row in probe.rows] == sorted([*range(ROUNDS)]*STEPS)


def test_history():
    learn, probe = learner(), Probe()
    learn.fit_poly(ROUNDS, cbs=probe)
    relations = learn.loss_func.relations
    assert [(h["round"], h["steps"]) for h in learn.history] == [(i, (i + 1)*STEPS) for i in range(ROUNDS)]
    for i, h in enumerate(learn.history):
        assert [*h] == ["round", "steps", "loss", "annotation", "similarity", "cooccurrence", "head", "miou"]
        assert h["loss"] == pytest.approx(np.mean([row["loss"] for row in probe.rows if row["epoch"] == i]), rel=1e-5)
        assert h["loss"] == pytest.approx(sum(r.weight*h[r.name] for r in relations) + h["head"], rel=1e-5)
        assert 0 <= h["miou"] <= 100
    assert json.loads(json.dumps(learn.history)) == learn.history
    learn.fit_poly(1)
    assert len(learn.history) == 1 # another run, another history


def test_plain_history():
    learn = learner(method="cross_entropy")
    learn.fit_poly(2)
    assert [[*h] for h in learn.history] == [["round", "steps", "loss", "miou"]]*2


def test_divergence_is_said(tmp_path, capsys):
    learner(tmp_path, method="cross_entropy").fit_poly(2)
    assert "diverged" not in capsys.readouterr().out
    try: learner(tmp_path, method="cross_entropy").fit_poly(2, lr=1e3)
    except SpmlError: return # it may end in infinity at once
    assert "training has diverged; lower the learning rate" in capsys.readouterr().out

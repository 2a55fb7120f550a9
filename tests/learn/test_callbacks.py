"""What training tells of itself."""
from types import SimpleNamespace

import pytest
import torch

from spml_kit.learn import callbacks
from spml_kit.learn.callbacks import TimeCB


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
    (.5, {}, "a step takes 0.50 s: about 1 minutes for 113 steps of training"),
    (6, dict(after=60), "a step takes 6.00 s: about 17 minutes for 173 steps of training, those of the heads included"),
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

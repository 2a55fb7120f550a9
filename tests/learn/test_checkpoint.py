"""Runs that are killed and go on; checkpoints that are damaged, changed, or of another run."""
import multiprocessing
import os
import re
import signal
import time

import pytest
import torch
from fastai.callback.core import Callback

from conftest import assert_equal, weights
from spml_kit.core import SpmlError
from spml_kit.files import load_tensors, save_tensors
from spml_kit.infer.crf_loss import CrfCrossEntropy
from spml_kit.learn.checkpoint import load_run
from spml_kit.method.relations import feature_affinity, image_similarity
from test_learner import ROUNDS, STEPS, TINY, learner, scenes


class Interrupted(Exception): pass


class Stop(Callback):
    "Do something in the middle of a round"
    order = 98
    def __init__(self, round, do): self.round, self.do = round, do
    def after_step(self):
        if (self.epoch, self.iter) == (self.round, 1): self.do()


def interrupt(): raise Interrupted("by the test")


@pytest.mark.parametrize("change", [dict(), dict(optimiser="sgd"), dict(memory=0), dict(method="cross_entropy")], ids=lambda d: str(*d.values()) or "usual")
def test_resume_after_an_error(tmp_path, change):
    kwargs = dict(recipe=TINY.but(**{k: v for k, v in change.items() if k != "method"}), method=change.get("method", "spml"))
    unbroken = learner(tmp_path/"unbroken", **kwargs)
    unbroken.fit_poly(ROUNDS)
    for round in (0, 1, 3): # the same run, broken thrice
        with pytest.raises(Interrupted): learner(tmp_path/"broken", **kwargs).fit_poly(ROUNDS, resume=True, cbs=Stop(round, interrupt))
    resumed = learner(tmp_path/"broken", **kwargs)
    resumed.fit_poly(ROUNDS, resume=True)
    assert_equal(weights(resumed), weights(unbroken))
    assert resumed.history == unbroken.history


def run(path, reached, stop):
    "What a process of its own does: the run of `path`, from its checkpoint if there is one, until it has to wait to be killed"
    def wait():
        reached.set()
        time.sleep(300)

    class WhileWriting(Callback):
        def before_validate(self):
            if self.epoch == 2: os.replace = lambda *_: wait()
    torch.set_num_threads(1)
    learn = learner(path)
    learn.fit_poly(ROUNDS, resume=True, cbs=dict(mid_round=[Stop(1, wait)], mid_write=[WhileWriting()], never=[])[stop])
    save_tensors(path/"final.safetensors", learn.model.state_dict(), history=learn.history)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_resume_after_kill(tmp_path):
    context = multiprocessing.get_context("forkserver") # processes that share no state; libraries are imported once
    context.set_forkserver_preload(["spml_kit.learn.learner", "spml_kit.data.batches"])

    def start(name, stop):
        reached = context.Event()
        process = context.Process(target=run, args=(tmp_path/name, reached, stop), daemon=True)
        process.start()
        return process, reached

    unbroken, _ = start("unbroken", "never")
    for stop, rounds in (("mid_round", 1), ("mid_write", 2)):
        process, reached = start("killed", stop)
        while not reached.wait(.1): assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert load_tensors(tmp_path/"killed"/"checkpoint.safetensors")[1]["rounds"] == rounds and not (tmp_path/"killed"/"final.safetensors").exists()
    process, _ = start("killed", "never")
    for p in (process, unbroken):
        p.join(120)
        assert p.exitcode == 0
    for file in ("final.safetensors", "checkpoint.safetensors"): # weights; and optimiser, memory bank, random state
        (found, found_meta), (want, want_meta) = (load_tensors(tmp_path/name/file) for name in ("killed", "unbroken"))
        assert_equal(found, want)
        assert found_meta == want_meta and len(want_meta["history"]) == ROUNDS


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A learner after two rounds, with its checkpoint"
    learn = learner(tmp_path_factory.mktemp("trained"))
    learn.fit_poly(2, checkpoint=True)
    return learn


def test_state_is_restored(trained):
    file = trained.path/"checkpoint.safetensors"
    saved, meta = load_tensors(file)
    fresh = learner()
    assert load_run(fresh, file) == meta["rounds"] == 2 and fresh.history == trained.history
    assert torch.equal(torch.get_rng_state(), saved["random"])
    assert_equal(weights(fresh), weights(trained))
    bank, want = fresh.loss_func.bank, trained.loss_func.bank
    assert len(bank) == len(want) == 2 and bank.batches.maxlen == 2
    for one, other in zip(bank.batches, want.batches):
        for name in vars(other): assert torch.equal(getattr(one, name), getattr(other, name)), name
    states = [[fresh.opt.state[p] for p, *_ in fresh.opt.all_params()], [trained.opt.state[p] for p, *_ in trained.opt.all_params()]]
    for one, other in zip(*states):
        assert one.keys() == other.keys() and all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in other)


def test_complete_run_is_left_alone(trained, tmp_path):
    (tmp_path/"checkpoint.safetensors").write_bytes((trained.path/"checkpoint.safetensors").read_bytes())
    again = learner(tmp_path)
    again.fit_poly(2, resume=True, cbs=Stop(0, interrupt))
    assert_equal(weights(again), weights(trained))
    assert again.history == trained.history


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:len(b)//2], lambda b: b[:5], lambda b: b"", lambda b: b"not a checkpoint"], ids=["last byte", "half", "header", "empty", "other"])
def test_damaged_checkpoint(trained, tmp_path, damage):
    file = tmp_path/"checkpoint.safetensors"
    file.write_bytes(damage((trained.path/"checkpoint.safetensors").read_bytes()))
    learn = learner(tmp_path)
    before = weights(learn)
    with pytest.raises(SpmlError, match=f"{re.escape(str(file))}.*cut short"): learn.fit_poly(2, resume=True)
    assert_equal(weights(learn), before)


@pytest.mark.parametrize("change,message", [(dict(recipe=TINY.but(dim=9)), "another model"), (dict(recipe=TINY.but(embed=dict(backbone="test_efficientnet", pretrained=False))), "another model"),
    (dict(recipe=TINY.but(optimiser="sgd")), "another run, recipe.optimiser was adamw and is now sgd"), (dict(seed=1), "another run, seed was 0 and is now 1"), (dict(method="cross_entropy"), "another run, method"),
    (dict(annotation="points"), "another run, relations"), (dict(dls=dict(steps=STEPS + 1)), "another run, (steps|stream) was"), (dict(dls=dict(seed=1)), "another run, stream"),
    (dict(dls=dict(n=7)), "another run, images was 8 and is now 7"), (dict(rounds=3), "another run, rounds was 2 and is now 3"), (dict(lr=1.), "another run, lr")], ids=lambda o: str(o)[:30])
def test_checkpoint_of_another_run(trained, tmp_path, change, message):
    file = tmp_path/"checkpoint.safetensors"
    file.write_bytes((trained.path/"checkpoint.safetensors").read_bytes())
    fit = dict(rounds=2) | {k: change[k] for k in ("rounds", "lr") if k in change}
    learn = learner(tmp_path, dls=scenes(**change.get("dls", {})), **{k: v for k, v in change.items() if k not in ("dls", *fit)})
    before = weights(learn)
    with pytest.raises(SpmlError, match=f"{re.escape(str(file))}.*{message}"): learn.fit_poly(**fit, resume=True)
    assert_equal(weights(learn), before)


@pytest.mark.parametrize("first,then,part", [
    (dict(method=CrfCrossEntropy(1.)), dict(method=CrfCrossEntropy(2.)), "loss was {'weight': 1.0"),
    (dict(relations=[feature_affinity(threshold=.9)]), dict(relations=[feature_affinity(threshold=.5)]), "relations was"),
    (dict(relations=[image_similarity()]), dict(relations=[image_similarity(location=False)]), "relations was")], ids=["crf", "affinity", "location"])
def test_checkpoint_of_another_loss(tmp_path, first, then, part):
    learner(tmp_path, **first).fit_poly(1, resume=True)
    with pytest.raises(SpmlError, match=f"another run, {part}"): learner(tmp_path, **then).fit_poly(1, resume=True)


def test_a_file_that_is_no_checkpoint(tmp_path):
    save_tensors(tmp_path/"checkpoint.safetensors", dict(mu=torch.eye(3)))
    with pytest.raises(SpmlError, match="checkpoint.safetensors.*not a checkpoint of training"): learner(tmp_path).fit_poly(1, resume=True)


@pytest.mark.parametrize("change", [dict(rounds=99), dict(rounds="1"), dict(history=5), dict(history=[5]), dict(history=[]), dict(numbers=[]), dict(numbers=None), dict(settings=[]), dict(settings={}), dict(rounds=-1), dict(settings={"recipe": 3})],
                         ids=lambda c: next(f"{k} {v}" for k, v in c.items()))
def test_metadata_that_was_changed_is_refused(tmp_path, change):
    learner(tmp_path).fit_poly(1, checkpoint=True)
    file = tmp_path/"checkpoint.safetensors"
    tensors, meta = load_tensors(file)
    save_tensors(file, tensors, **meta | change)
    before = file.read_bytes()
    with pytest.raises(SpmlError, match="checkpoint.safetensors"): learner(tmp_path).fit_poly(1, resume=True)
    assert file.read_bytes() == before


def test_a_checkpoint_of_another_run_is_not_written_over(tmp_path):
    learner(tmp_path).fit_poly(1, checkpoint=True)
    before = (tmp_path/"checkpoint.safetensors").read_bytes()
    with pytest.raises(SpmlError, match="recipe.dim was 8 and is now 6|another model"): learner(tmp_path, recipe=TINY.but(dim=6)).fit_poly(1, checkpoint=True)
    assert (tmp_path/"checkpoint.safetensors").read_bytes() == before
    learner(tmp_path).fit_poly(1, checkpoint=True) # the same run may begin anew

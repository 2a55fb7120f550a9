"""Training: parameter groups, schedule, the parts of the loss, history, unlabelled batches, and runs that are killed and go on."""
import json
import math
import multiprocessing
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from conftest import assert_equal, quiet, random_batch, weights
from spml_kit.core import SpmlError, UNLABELLED, VOID
from spml_kit.files import load_tensors, save_tensors
from spml_kit.method.contrast import relation_loss
from spml_kit.data.batches import weak_dls
from spml_kit.infer.crf_loss import CrfCrossEntropy
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.method.nets import EmbedNet, SegNet, SoftmaxHead
from spml_kit.learn.losses import SpmlLoss, labelled_cross_entropy
from spml_kit.learn.checkpoint import load_run
from spml_kit.learn.callbacks import lr_poly
from spml_kit.learn.learner import spml_learner, spml_splitter
from spml_kit.method.memory import MemoryBank
from spml_kit.method.recipes import RECIPES, paper_relations, paper_weights
from spml_kit.method.relations import feature_affinity, image_similarity, semantic_annotation, semantic_cooccurrence
from spml_kit.method.segments import make_segments

STEPS, ROUNDS = 3, 4
TINY = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8, grid=(3, 3), iterations=3, bs=2, crop=64, warmup=2)


def scenes(annotation="scribbles", n=8, steps=STEPS, **kwargs):
    return weak_dls(WeakSet(SceneSet(n, size=64), annotation, regions=12), SceneSet(2, size=64, start=100), bs=2, crop=64, steps=steps, device="cpu", **kwargs)


def learner(path=".", dls=None, recipe=TINY, **kwargs):
    return quiet(spml_learner(dls or scenes(), recipe=recipe, path=path, **kwargs))


# parameter groups and schedule

def names_of(model, group):
    ids = {id(p) for p in group}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def test_groups_of_the_paper(deeplab):
    model = SegNet(deeplab, SoftmaxHead(64, 21))
    groups = [names_of(model, g) for g in spml_splitter(model)]
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("embed.backbone.conv1", "embed.backbone.bn1", "embed.backbone.layer1"))}
    body = {n for n, _ in model.named_parameters() if n.startswith("embed.backbone")} - frozen
    head = {n for n, _ in model.named_parameters()} - body - frozen
    biases = {n for n in body | head if n.endswith("bias")}
    assert groups == [body - biases, body & biases, head - biases, head & biases]
    assert sum(len(g) for g in spml_splitter(model)) == len(body | head) # nothing twice


def test_batch_norm(deeplab):
    "The paper's network learns its statistics, slowly; ours keeps those of the body"
    norms = lambda net: [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.momentum, m.eps, m.training) for m in norms(deeplab.train())} == {(3e-4, 1e-5, True)}
    ours = SegNet(EmbedNet(dim=8, **TINY.embed), SoftmaxHead(8, 3)).train()
    assert {m.training for m in norms(ours.embed)} == {False} and {m.training for m in norms(ours.head)} == {True}


@pytest.mark.parametrize("embed", [TINY.embed, dict(), dict(backbone="resnet18", pretrained=False, output_stride=8, lateral=False, head="psp")], ids=["tiny", "usual", "psp"])
def test_groups_hold_every_trainable_parameter(embed):
    model = SegNet(EmbedNet(dim=8, **embed), SoftmaxHead(8, 3))
    groups = spml_splitter(model)
    assert sorted(id(p) for g in groups for p in g) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [p for p in model.embed.frozen() if p.requires_grad] == []


class Probe(Callback):
    "Writes down what a step was made of"
    order = 99
    def before_fit(self): self.rows = []
    def after_step(self):
        hypers = self.opt.hypers
        self.rows.append(dict(epoch=self.epoch, loss=self.loss.item(), lr=[h["lr"] for h in hypers], wd=[h["wd"] for h in hypers], bank=len(getattr(self.loss_func, "bank", []))))


@pytest.mark.parametrize("recipe", [TINY, TINY.but(optimiser="sgd", multipliers=(1, 2, 10, 20), lr=3e-3, wd=5e-4, warmup=4)], ids=lambda r: r.optimiser)
def test_schedule_and_decay(recipe):
    learn, probe = learner(recipe=recipe), Probe()
    learn.fit_poly(ROUNDS, cbs=probe)
    for t, row in enumerate(probe.rows):
        lr = lr_poly(t, recipe.lr, ROUNDS*STEPS, recipe.warmup, recipe.power)
        assert row["lr"] == pytest.approx([m*lr for m in recipe.multipliers]) and row["wd"] == [recipe.wd, 0, recipe.wd, 0]
    assert [row["bank"] for row in probe.rows] == [1] + [2]*(ROUNDS*STEPS - 1)
    assert [row["epoch"] for row in probe.rows] == sorted([*range(ROUNDS)]*STEPS)


def test_frozen_weights_stay():
    learn = learner()
    before = weights(learn)
    frozen = {n for n, p in learn.model.named_parameters() if not p.requires_grad}
    statistics = {n for n in before if n.startswith("embed.backbone") and "running" in n} # TINY keeps the body's batch norm as it is
    learn.fit_poly(1)
    same = {n for n, v in learn.model.state_dict().items() if torch.equal(v, before[n])}
    trained = {n for n, p in learn.model.named_parameters() if p.requires_grad}
    assert frozen | statistics <= same and len(same & trained) < len(trained)/4 # of some deep biases the gradient may vanish


# the loss

def test_total_is_the_weighted_sum():
    emb, labels, regions, tags = random_batch(dtype=torch.float32)
    logits, relations = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(0)), [semantic_annotation(6, .7), semantic_cooccurrence(12, .5), image_similarity(16, .1)]
    loss = SpmlLoss(relations, (2, 2), 3, memory=1, head_weight=.3)
    assert loss.names == ("annotation", "cooccurrence", "similarity", "head")
    seg = make_segments(emb, labels, regions, tags, (2, 2), 3)
    for bank in (None, seg.protos): # first step, second step
        candidates = seg.protos if bank is None else seg.protos.cat(bank)
        parts = [relation_loss(r, seg, candidates)[0] for r in relations]
        want = sum(r.weight*p for r, p in zip(relations, parts)) + .3*labelled_cross_entropy(logits, labels)
        torch.testing.assert_close(loss((emb, logits), labels, regions, tags), want)
        loss.after_step()
    loss.means()
    loss((emb, logits), labels, regions, tags)
    assert [*loss.means().values()] == pytest.approx([float(p) for p in (*parts, labelled_cross_entropy(logits, labels))]) # means start anew
    assert torch.equal(loss.eval()((emb, logits), labels, regions, tags), labelled_cross_entropy(logits, labels))


def test_relation_of_weight_zero_costs_nothing():
    def explode(protos): raise AssertionError("computed in vain")
    from spml_kit.method.relations import Relation
    learn = learner(relations=[Relation("unused", explode, 6, weight=0), semantic_annotation()])
    learn.fit_poly(1)
    assert learn.history[0]["unused"] is None and learn.history[0]["annotation"] > 0


@pytest.mark.parametrize("size", [(8, 8), (16, 12), (5, 7)])
def test_cross_entropy_counts_labelled_pixels_only(size):
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 4, 8, 8, generator=g), torch.randint(4, (2, *size), generator=g)
    labels[:, ::2] = UNLABELLED
    labels[:, :, ::3] = VOID
    large = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False).log_softmax(1)
    want = -torch.stack([large[b, labels[b, y, x], y, x] for b in range(2) for y in range(size[0]) for x in range(size[1]) if labels[b, y, x] < 4]).mean()
    torch.testing.assert_close(labelled_cross_entropy(logits, labels), want)
    assert labelled_cross_entropy(logits.requires_grad_(), torch.full_like(labels, UNLABELLED)) == 0


@pytest.mark.parametrize("annotation", ["tags", "boxes", "points", "scribbles", "keypoints"])
def test_reference_scale(annotation):
    ours, theirs = ({r.name: r for r in paper_relations(annotation, scale)} for scale in (False, True))
    head = paper_weights(annotation, True).head
    assert paper_weights(annotation).head == 1 and ours["annotation"].weight == 1 and ours.keys() == theirs.keys()
    for name, r in ours.items():
        assert theirs[name].kappa == r.kappa
        assert theirs[name].weight == pytest.approx(head*r.weight, rel=.12) # the paper prints 0.1/0.3 as 0.3


@pytest.mark.parametrize("method", ["spml", "cross_entropy"])
@pytest.mark.parametrize("annotation", ["tags", "boxes", "points", "scribbles", "keypoints"])
def test_unlabelled_batches_train_on(annotation, method):
    nothing = lambda i: np.full((64, 64), UNLABELLED, np.uint8)
    learn, probe = learner(dls=scenes(nothing), annotation=annotation, method=method), Probe()
    before = weights(learn)
    learn.fit_poly(1, cbs=probe)
    after = weights(learn)
    assert all(math.isfinite(row["loss"]) for row in probe.rows) and len(probe.rows) == STEPS
    assert all(v.isfinite().all() for v in after.values() if v.is_floating_point())
    moved = any(not torch.equal(before[n], after[n]) for n in names_of(learn.model, spml_splitter(learn.model)[0]))
    assert moved if method == "spml" else probe.rows[0]["loss"] == 0 # contour regions teach without labels
    if method == "spml": assert learn.history[0]["annotation"] == learn.history[0]["head"] == 0 < learn.history[0]["similarity"]


def test_colours_of_the_batch_reach_the_bank():
    learn = learner(recipe=TINY.but(colours=True, embedding_scale=.1))
    learn.fit_poly(1)
    protos = learn.loss_func.protos
    assert protos.mu_loc.shape[1] == protos.mu.shape[1] + 5 and math.isfinite(learn.history[0]["similarity"])


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


def test_same_seed_same_run():
    runs = []
    for seed in (0, 0, 1):
        runs.append(learner(seed=seed))
        runs[-1].fit_poly(2)
    assert_equal(weights(runs[0]), weights(runs[1]))
    assert runs[0].history == runs[1].history != runs[2].history


# interrupted runs

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


@pytest.mark.parametrize("size", [0, 1, 3])
def test_bank_survives_its_state(size):
    bank, again = MemoryBank(size), MemoryBank(size)
    for seed in range(5): bank.push(make_segments(*random_batch(seed, n_images=1 + seed % 3), (2, 2), 1).protos)
    again.load_state_dict(bank.state_dict())
    now = make_segments(*random_batch(9), (2, 2), 1).protos
    one, other = (vars(b.candidates(now)) for b in (bank, again))
    assert len(again) == size
    assert_equal(one, other)
    sizes = [1 + seed % 3 for seed in range(5)][5 - size:] # images of the batches in the bank, oldest first
    assert one["tags"].shape[0] == 3 + sum(sizes)
    parts = one["image"].split([len(now), *(len(p) for p in bank.batches)])
    first = [int(p.min()) for p in parts]
    assert first == [0, *(3 + sum(sizes[k + 1:]) for k in range(size))] # counted on from the newest
    for part, batch, start in zip(parts[1:], bank.batches, first[1:]): # and every segment keeps the tags of its image
        assert torch.equal(one["tags"][part], batch.tags[batch.image]) and torch.equal(part - start, batch.image)


def test_bank_keeps_no_gradient_and_no_shared_memory():
    emb, labels, regions, tags = random_batch()
    protos, bank = make_segments(emb.requires_grad_(), labels, regions, tags, (2, 2), 1).protos, MemoryBank(1)
    bank.push(protos)
    kept = bank.batches[0]
    assert not kept.mu.requires_grad and kept.mu.data_ptr() != protos.mu.data_ptr()
    candidates = bank.candidates(protos)
    candidates.mu.sum().backward()
    assert emb.grad.any()


def test_faults():
    dls = scenes()
    for bad, message in [(lambda: learner(dls=dls, method="magic"), "method 'magic' is not spml or cross_entropy"), (lambda: learner(dls=dls, annotation="guesses"), "annotation 'guesses'"),
                         (lambda: SpmlLoss([semantic_annotation(), semantic_annotation(8)]), "share a name"), (lambda: MemoryBank(-1), "bank of -1"),
                         (lambda: TINY.but(lr=0), "lr = 0"), (lambda: TINY.but(optimiser="lion"), "'lion' is not adamw or sgd"), (lambda: TINY.but(lrr=1), "no entry .*lrr"), (lambda: TINY.but(bs=0), "bs = 0")]:
        with pytest.raises(SpmlError, match=message): bad()


# numbers that are not finite

class Spoil(Callback):
    "At a step of a round, something becomes NaN or infinite"
    order = -100
    def __init__(self, what, epoch, step, value): self.what, self.at, self.value = what, (epoch, step), value
    def _now(self): return self.training and (self.epoch, self.iter) == self.at
    def before_batch(self):
        if self._now() and self.what == "pixel": self.xb[0][0, 0, 3, 3] = self.value
    def before_step(self):
        if self._now() and self.what == "gradient": next(p for p in self.model.parameters() if p.grad is not None).grad[0] = self.value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["pixel", "gradient"])
@pytest.mark.parametrize("method", ["spml", "cross_entropy"])
def test_training_stops_at_the_first_number_that_is_not_finite(tmp_path, what, value, method):
    "... with the round, the step and the images; the checkpoint stays that of the last whole round"
    learn = learner(tmp_path, method=method)
    with pytest.raises(SpmlError, match="round 2, step 3: .*(nan|inf|not finite).*images scene_00000") as e: learn.fit_poly(ROUNDS, checkpoint=True, cbs=Spoil(what, 1, 2, value))
    assert all(name in str(e.value) for name in learn.dls.train.names_at(1, 2))
    if method == "spml" and what == "pixel": assert "annotation" in str(e.value)
    tensors, meta = load_tensors(tmp_path/"checkpoint.safetensors") # refuses what is not finite
    assert meta["rounds"] == len(learn.history) == 1
    again = learner(tmp_path, method=method)
    again.fit_poly(ROUNDS, resume=True)
    assert len(again.history) == ROUNDS


def test_names_of_a_batch_are_those_that_it_holds():
    dls = scenes(n=7)
    seen = []
    item = dls.train.create_item
    dls.train.create_item = lambda at: (seen.append(dls.train.dataset.names[at[1]]), item(at))[1]
    for round in range(3):
        dls.train.round, seen[:] = round, []
        for _ in dls.train: pass
        assert seen == [name for step in range(STEPS) for name in dls.train.names_at(round, step)]


def test_divergence_is_said(tmp_path, capsys):
    learner(tmp_path, method="cross_entropy").fit_poly(2)
    assert "diverged" not in capsys.readouterr().out
    try: learner(tmp_path, method="cross_entropy").fit_poly(2, lr=1e3)
    except SpmlError: return # it may end in infinity at once
    assert "training has diverged; lower the learning rate" in capsys.readouterr().out


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


@pytest.mark.parametrize("change", [dict(lr=math.inf), dict(lr=math.nan), dict(lr=-1.), dict(wd=math.nan), dict(wd=-.1), dict(scale=(0, 0)), dict(scale=(2., 1.)), dict(scale=(.5, math.inf)), dict(dropout=1.5), dict(dropout=-.1), dict(dropout=math.nan),
    dict(multipliers=(1, 1, -1, 1)), dict(multipliers=(1, 1, math.inf, 1)), dict(bs=0), dict(crop=0), dict(steps=0), dict(dim=0), dict(iterations=-1), dict(grid=(0, 6)), dict(grid=(6, .5)), dict(memory=-1), dict(warmup=-1),
    dict(power=math.inf), dict(embedding_scale=math.nan), dict(infer_grid=(12, -1)), dict(scale=("a", "b"))], ids=str)
def test_numbers_of_a_recipe_have_their_ranges(change):
    with pytest.raises(SpmlError, match=f"recipe: {next(iter(change))} = "): TINY.but(**change)


def test_lengths_and_weights_are_checked_before_training():
    with pytest.raises(SpmlError, match="2 multipliers"): learner(recipe=TINY.but(multipliers=(1, 1)))
    for weight in (math.inf, math.nan, -1):
        with pytest.raises(SpmlError, match="weight .* must be finite and not negative"): paper_relations("scribbles", changes={"similarity": {"weight": weight}})


@pytest.mark.parametrize("make, says", [(lambda f: torch.save({"w": torch.tensor([math.nan])}, f), "not finite"), (lambda f: torch.save([1], f), "not a state dict"), (lambda f: torch.save({"model": {"w": torch.zeros(1)}}, f), "does not fit 'test_resnet'"),
    (lambda f: f.write_bytes(b"x"*100), "not a readable state dict"), (lambda f: f.mkdir(), "this is a folder"), (os.mkfifo, "a pipe"), (lambda f: None, "no such file")], ids=["nan", "list", "nested", "bytes", "folder", "pipe", "absent"])
def test_weights_of_ones_own_are_looked_at(tmp_path, make, says):
    make(tmp_path/"w.pth")
    with pytest.raises(SpmlError, match=f"w.pth.*{says}"): EmbedNet("test_resnet", weights=str(tmp_path/"w.pth"))

"""Training: parameter groups, unlabelled batches, the same run from the same seed, faults, numbers that are not finite."""
import math

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from conftest import assert_equal, quiet, weights
from spml_kit.core import UNLABELLED, SpmlError
from spml_kit.files import load_tensors
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.method.nets import EmbedNet, SegNet, SoftmaxHead
from spml_kit.learn.losses import SpmlLoss
from spml_kit.learn.learner import spml_learner, spml_splitter
from spml_kit.method.memory import MemoryBank
from spml_kit.method.recipes import RECIPES, paper_relations
from spml_kit.method.relations import semantic_annotation

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


def test_frozen_weights_stay():
    learn = learner()
    before = weights(learn)
    frozen = {n for n, p in learn.model.named_parameters() if not p.requires_grad}
    statistics = {n for n in before if n.startswith("embed.backbone") and "running" in n} # TINY keeps the body's batch norm as it is
    learn.fit_poly(1)
    same = {n for n, v in learn.model.state_dict().items() if torch.equal(v, before[n])}
    trained = {n for n, p in learn.model.named_parameters() if p.requires_grad}
    assert frozen | statistics <= same and len(same & trained) < len(trained)/4 # of some deep biases the gradient may vanish


# what a run learns and tells

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


def test_same_seed_same_run():
    runs = []
    for seed in (0, 0, 1):
        runs.append(learner(seed=seed))
        runs[-1].fit_poly(2)
    assert_equal(weights(runs[0]), weights(runs[1]))
    assert runs[0].history == runs[1].history != runs[2].history


def test_faults():
    dls = scenes()
    for bad, message in [(lambda: learner(dls=dls, method="magic"), "method 'magic' is unknown: give 'spml', 'cross_entropy'"), (lambda: learner(dls=dls, annotation="guesses"), "annotation 'guesses'"),
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


def test_lengths_and_weights_are_checked_before_training():
    with pytest.raises(SpmlError, match="2 multipliers"): learner(recipe=TINY.but(multipliers=(1, 1)))
    for weight in (math.inf, math.nan, -1):
        with pytest.raises(SpmlError, match="weight .* must be finite and not negative"): paper_relations("scribbles", changes={"similarity": {"weight": weight}})

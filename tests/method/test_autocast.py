"Half precision: the loss under autocast and on half inputs at every concentration, its gradient, fastai's mixed precision in training."
import math

import pytest
import torch
from fastai.callback.fp16 import MixedPrecision

from conftest import assert_equal, quiet, random_batch, weights
from spml_kit.data.batches import weak_dls
from spml_kit.method.contrast import contrast, contrast_plain
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.learn.losses import SpmlLoss
from spml_kit.learn.learner import spml_learner
from spml_kit.method.recipes import RECIPES
from spml_kit.method.relations import feature_affinity, image_similarity, relation_sets, semantic_annotation, semantic_cooccurrence
from spml_kit.method.segments import make_segments

HALF = torch.float16, torch.bfloat16
STEP = {torch.float16: 2**-11, torch.bfloat16: 2**-8} # relative rounding
each_half = pytest.mark.parametrize("half", HALF, ids=str)
each_kappa = pytest.mark.parametrize("kappa", [6, 12, 16, 30, 50])


def loss_of(kappa, emb, logits, maps, half=None, steps=3, scale=1.):
    "Total of the last of some steps on the same batch, its gradient, and the means of the parts"
    loss = SpmlLoss([semantic_annotation(kappa), semantic_cooccurrence(kappa), image_similarity(kappa), feature_affinity(kappa)], (3, 3), 3, memory=2)
    for _ in range(steps):
        emb = emb.detach().requires_grad_()
        with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None): value = loss((emb, logits), *maps)
        (scale*value).backward()
        loss.after_step()
    return value.detach(), emb.grad, loss.means()


def batch(seed=0, length=1.):
    emb, *maps = random_batch(seed, dim=16, dtype=torch.float32)
    return length*emb, torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(seed)), maps


# the loss

@each_half
@each_kappa
def test_autocast_changes_nothing_in_the_loss(half, kappa):
    emb, logits, maps = batch()
    one, other = loss_of(kappa, emb, logits, maps), loss_of(kappa, emb, logits, maps, half)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]


@each_half
@each_kappa
@pytest.mark.parametrize("length", [2**-10, 1., 2.**10])
def test_a_half_embedding_costs_only_its_rounding(half, kappa, length):
    emb, logits, maps = batch(length=length)
    scale = 2.**10*length # fp16 has no gradients below 6e-8, which is why fastai scales the loss
    exact, rounded, given = (loss_of(kappa, *o, scale=scale) for o in ((emb, logits, maps), (emb.to(half).float(), logits, maps), (emb.to(half), logits.to(half), maps, half)))
    assert given[0].dtype == torch.float32 and given[1].dtype == half and given[1].isfinite().all()
    for part, value in rounded[2].items():
        if part != "head": assert given[2][part] == pytest.approx(value, rel=1e-6) # everything after is float32
    torch.testing.assert_close(given[1].float(), rounded[1], rtol=4*STEP[half], atol=float(rounded[1].abs().max())*STEP[half])
    for part, value in exact[2].items(): assert given[2][part] == pytest.approx(value, abs=max(1, kappa)*STEP[half]), part
    assert torch.cosine_similarity(given[1].float().flatten(), exact[1].flatten(), 0) > .99


@each_half
@each_kappa
def test_normalised_in_float32(half, kappa):
    "Lengths that half precision cannot hold, nothing at all, and features that all agree"
    huge = torch.full((3, 64, 9, 8), 4e4)*torch.randn(3, 64, 9, 8, generator=torch.Generator().manual_seed(0)).sign()
    _, logits, maps = batch()
    for emb in huge, huge.abs(), 0*huge, huge*torch.tensor([1., -1, 1]).view(3, 1, 1, 1):
        with torch.autocast("cpu", half, enabled=False): seg = make_segments(emb.to(half), *maps, (3, 3), 3)
        assert seg.v.dtype == seg.protos.mu.dtype == seg.u.dtype == torch.float32
        if emb.any(): torch.testing.assert_close(seg.v.norm(dim=1), torch.ones(len(seg.v)), rtol=0, atol=1e-6)
        value, grad, _ = loss_of(kappa, emb.to(half), logits.to(half), maps, half)
        assert value.isfinite() and grad.isfinite().all()


@each_half
@each_kappa
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_contrast(half, kappa, scope):
    emb, *maps = random_batch(3, dim=16, dtype=torch.float32)
    seg = make_segments(emb, *maps, (3, 3), 3)
    relation = (image_similarity if scope == "image" else semantic_annotation)(kappa)
    ids, match = relation.groups(seg.protos)
    image = seg.protos.image if scope == "image" else None

    def run(x, mu, autocast=False):
        x, mu = (o.detach().clone().requires_grad_() for o in (x, mu))
        with torch.autocast("cpu", half, enabled=autocast): total, each = contrast(x, mu, seg.own, ids, kappa, match, image)
        total.backward()
        return total.detach(), each, x.grad, mu.grad

    plain = run(seg.v, seg.protos.mu)
    for a, b in zip(plain, run(seg.v, seg.protos.mu, autocast=True)): assert torch.equal(a, b)
    got, want = run(seg.v.to(half), seg.protos.mu.to(half), autocast=True), run(seg.v.to(half).float(), seg.protos.mu.to(half).float())
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[2].dtype == got[3].dtype == half
    for a, b in zip(got[2:], want[2:]): torch.testing.assert_close(a, b.to(half), rtol=0, atol=0)
    anchor, candidate, positive = relation_sets(relation, seg)
    exact = contrast_plain(seg.v.double(), seg.protos.mu.double(), seg.own, candidate, positive, kappa)[anchor]
    torch.testing.assert_close(plain[1][anchor].double(), exact, rtol=1e-5, atol=1e-5)
    assert (got[1][anchor] - exact).abs().max() <= 4*kappa*STEP[half] # each of two similarities is off by two roundings at most


# training

class OnCpu(MixedPrecision):
    "fastai's callback, whose autocast and scaler are made for GPUs, with those of a CPU"
    def __init__(self, scale=None, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def before_fit(self):
        super().before_fit()
        half = torch.float16 if self.amp_mode.value == "fp16" else torch.bfloat16
        self.autocast, self.learn.scaler = torch.autocast("cpu", half), torch.amp.GradScaler("cpu", enabled=half == torch.float16, **(dict(init_scale=self.scale) if self.scale else {}))

    def after_pred(self):
        self.seen = self.pred[0].dtype
        super().after_pred()


def learner(**kwargs):
    recipe = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8, grid=(3, 3), iterations=3, bs=2, crop=64, warmup=2, dropout=0., optimiser="sgd", lr=3e-3, **kwargs)
    dls = weak_dls(WeakSet(SceneSet(8, size=64), "scribbles", regions=12), SceneSet(2, size=64, start=100), bs=2, crop=64, steps=3, device="cpu")
    return quiet(spml_learner(dls, recipe=recipe))


pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available")


@pytest.mark.parametrize("mode", ["fp16", "bf16"])
def test_training_in_mixed_precision(mode):
    plain, mixed, callback = learner(), learner(), OnCpu(amp_mode=mode)
    plain.fit_poly(3)
    mixed.fit_poly(3, cbs=callback)
    assert callback.seen == dict(fp16=torch.float16, bf16=torch.bfloat16)[mode] # the network did compute in half precision
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in mixed.model.parameters())
    for row, want in zip(mixed.history, plain.history, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=.05) and row["loss"] != want["loss"]


def test_steps_that_overflow_are_left_out():
    learn = learner()
    before = weights(learn)
    learn.fit_poly(1, cbs=OnCpu(scale=2.**80))
    trained = {n for n, p in learn.model.named_parameters() if p.requires_grad}
    after = weights(learn)
    assert_equal({n: before[n] for n in trained}, {n: after[n] for n in trained})
    assert math.isfinite(learn.history[0]["loss"]) and len(learn.loss_func.bank) == 2


@pytest.mark.parametrize("switch", ["to_fp16", "to_bf16"])
def test_switches_of_fastai(switch):
    plain, mixed = learner(), getattr(learner(), switch)()
    if not torch.cuda.is_available(): # where they do nothing
        plain.fit_poly(1)
        mixed.fit_poly(1)
        assert_equal(weights(plain), weights(mixed))

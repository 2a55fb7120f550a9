"What people call on a fastai Learner: it works on the kit's, or says in a sentence why not."
import io
import tempfile
from contextlib import redirect_stdout

import matplotlib
import numpy as np
import pytest
import torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.interpret import Interpretation, SegmentationInterpretation
from fastai.learner import load_learner
from fastai.vision.data import SegmentationDataLoaders
from matplotlib import pyplot as plt
from PIL import Image

from spml_kit.core import SpmlError
from spml_kit.cams.classifier import TAG_RECIPE, TagMethod, TagNet, tag_learner
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.infer.scores import predict_head
from spml_kit.learn.head import head_learner
from spml_kit.learn.learner import spml_learner
from spml_kit.learn.verbs import KitLearner, Pictures
from spml_kit.method.recipes import RECIPES

from conftest import photo, weights, assert_equal

matplotlib.use("Agg")
RECIPE = RECIPES["small"].but(embed=dict(backbone="mobilenetv3_small_050", pretrained=False), bs=2, crop=64, dim=16)
SCENES = SceneSet(3, size=64, start=100)


def loaders(): return weak_dls(WeakSet(SceneSet(4, size=64), "scribbles"), SCENES, bs=2, crop=64, steps=2, device="cpu")


def make(**kwargs): return spml_learner(loaders(), recipe=RECIPE, path=tempfile.mkdtemp(), **kwargs)


@pytest.fixture(scope="module")
def learn(): return make()


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def call(f, learn):
    with redirect_stdout(io.StringIO()) as said, learn.no_bar(): f()
    return said.getvalue()


def learning(learn): return {n for n, p in learn.model.named_parameters() if p.requires_grad}


def test_freeze_leaves_the_whole_head_and_unfreeze_everything():
    learn = make()
    before = learning(learn)
    learn.freeze()
    assert learning(learn) == {n for n in before if not n.startswith("embed.backbone")} and {"head.0.weight", "head.4.bias"} <= learning(learn)
    learn.unfreeze()
    assert learning(learn) == before


def test_a_frozen_backbone_stays_and_the_head_moves():
    learn = make()
    learn.freeze()
    was = weights(learn)
    call(lambda: learn.fit(1, 1e-2), learn)
    moved = {k for k, v in learn.model.state_dict().items() if not torch.equal(v, was[k])}
    assert "head.4.weight" in moved and not [k for k in moved if k.startswith("embed.backbone")]


def test_freeze_of_a_second_head_and_of_a_tag_learner(learn):
    second = head_learner(learn.dls, learn.model, RECIPE)
    before = learning(second)
    second.freeze()
    assert learning(second) == before != set()
    tags = tag_learner(learn.dls, TagMethod("small", lambda n, **kw: TagNet(n, "mobilenetv3_small_050", pretrained=False)), TAG_RECIPE.but(bs=2))
    tags.freeze()
    assert learning(tags) == {"classifier.weight"}
    names, found, prob = tags.predict(photo(40, 50))
    assert prob.shape == (12,) and len(names) == int(found.sum())
    call(lambda: tags.show_results(), tags)


def test_fine_tune_keeps_the_multipliers():
    learn = make()
    with redirect_stdout(io.StringIO()), learn.no_bar():
        learn.fine_tune(1, 1e-3)
    rates = [h["lr"] for h in learn.opt.hypers]
    assert np.allclose(np.array(rates)/rates[-1], np.array(RECIPE.multipliers)/RECIPE.multipliers[-1]) and len(learning(learn)) > 10


def test_lr_find_leaves_network_and_memory_as_they_were():
    learn = make()
    call(lambda: learn.fit(1), learn)
    was, bank = weights(learn), {k: v.clone() for k, v in learn.loss_func.bank.state_dict().items()}
    call(lambda: learn.lr_find(num_it=8, show_plot=False), learn)
    assert_equal(was, weights(learn))
    assert_equal(bank, learn.loss_func.bank.state_dict())


@pytest.mark.parametrize("size", [(64, 64), (40, 50), (97, 33)])
def test_predict_labels_as_prediction_does(learn, size):
    image = photo(*size)
    labels, tensor, prob = learn.predict(image)
    assert np.array_equal(labels, predict_head(learn.model, image)) and np.array_equal(labels, tensor.numpy())
    assert prob.shape == (13, *size) and torch.allclose(prob.sum(0), torch.ones(size), atol=1e-5)


def test_predict_takes_what_a_picture_may_be(learn, tmp_path):
    image = photo(40, 50)
    Image.fromarray(image).save(tmp_path / "a.png")
    want = learn.predict(image)[0]
    for item in (tmp_path / "a.png", Image.fromarray(image), torch.from_numpy(image)): assert np.array_equal(learn.predict(item)[0], want)
    with pytest.raises(SpmlError, match="no such file"): learn.predict(tmp_path / "b.png")


def test_test_dl_and_get_preds(learn):
    dl = learn.dls.test_dl([photo(64, 64), photo(64, 64, 1)])
    (emb, logits), _ = learn.get_preds(dl=dl)
    assert emb.shape[:2] == (2, 16) and logits.shape[:2] == (2, 13) and len(dl.dataset) == 2
    several = learn.get_preds(dl=learn.dls.test_dl([photo(64, 64), photo(32, 64)], bs=1))[0][1]
    assert [tuple(o.shape[-2:]) for o in several] == [(16, 16), (8, 16)]
    assert (Pictures([photo(8, 9)], SCENES.classes).mask(0) == 255).all()


@pytest.mark.parametrize("which", ["train", "valid"])
def test_loaders_show_themselves(learn, which):
    dl = getattr(learn.dls, which)
    round = getattr(dl, "round", None)
    dl.show_batch(max_n=2)
    assert len(plt.gcf().axes) == 6 and getattr(dl, "round", None) == round
    assert repr(dl).startswith(type(dl).__name__) and "13 classes" in repr(dl)
    with pytest.raises(SpmlError, match="names_at"): learn.dls.show_batch(unique=True)


def test_show_results(learn):
    for at in (0, 1): call(lambda: learn.show_results(ds_idx=at, max_n=2), learn)
    assert [len(plt.figure(k).axes) for k in plt.get_fignums()] == [6, 6]


def test_export_leaves_the_images_at_home(learn):
    train = learn.dls.train
    learn.export()
    assert learn.dls.train is train and learn.opt is not None
    again = load_learner(learn.path / "export.pkl")
    image = photo(50, 40)
    assert isinstance(again, KitLearner) and np.array_equal(again.predict(image)[0], learn.predict(image)[0])
    assert len(again.dls.valid.dataset) == 0 and again.dls.classes == learn.dls.classes and (learn.path / "export.pkl").stat().st_size < 12e6
    assert again.get_preds(dl=again.dls.test_dl([photo(64, 64)]))[0][1].shape[:2] == (1, 13)


@pytest.mark.parametrize("cb", [MixUp(), CutMix(), MixUp], ids=["MixUp", "CutMix", "class"])
def test_blends_are_refused(cb):
    learn = make()
    with pytest.raises(SpmlError, match="blends two images"): call(lambda: learn.fit(1, cbs=cb), learn)
    call(lambda: learn.fit(1), learn) # and the learner is as it was


@pytest.mark.parametrize("kind", [Interpretation, SegmentationInterpretation])
def test_a_loss_of_each_image_is_refused(learn, kind):
    with pytest.raises(SpmlError, match="no image has a separate loss"): kind.from_learner(learn)
    learn.validate()


def test_callbacks_of_fastai_run():
    learn = make()
    cbs = [SaveModelCallback(monitor="miou"), EarlyStoppingCallback(monitor="valid_loss"), CSVLogger()]
    call(lambda: learn.fit(2, cbs=cbs), learn)
    assert (learn.path / "models" / "model.pth").exists() and "miou" in (learn.path / "history.csv").read_text()
    with redirect_stdout(io.StringIO()): learn.fit(1, cbs=ShowGraphCallback())
    assert "Total params" in learn.summary()


def test_ordinary_loaders_are_refused(tmp_path):
    for k in range(2):
        Image.fromarray(photo(32, 32, k)).save(tmp_path / f"{k}.png")
    dls = SegmentationDataLoaders.from_label_func(tmp_path, [tmp_path / f"{k}.png" for k in range(2)], label_func=lambda p: p, codes=["a", "b"], bs=1, num_workers=0)
    with pytest.raises(SpmlError, match="SegmentationDataLoaders|DataLoaders.*weak_dls"): spml_learner(dls, recipe=RECIPE)
    with pytest.raises(SpmlError, match="weak_dls"): spml_learner(None, recipe=RECIPE)

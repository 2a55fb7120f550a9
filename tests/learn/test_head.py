"""A second head, and classifiers straight on frozen features: what does not learn stays bit for bit, linear is linear, cached features and the network's give the same training."""
import pytest
import torch
from fastai.callback.progress import ProgressCallback

from conftest import quiet
from spml_kit.core import SpmlError
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.infer.scores import predict_head
from spml_kit.learn.frozen import FeatureCache, with_features
from spml_kit.learn.head import FeatureHead, FrozenEmbed, head_learner, probe_learner
from spml_kit.learn.learner import create_model
from spml_kit.method.nets import EmbedNet, FrozenNet, SegNet, SoftmaxHead, image_tensor
from spml_kit.method.recipes import RECIPES

SCENES = SceneSet(4, size=64)
NETS = {"cnn": dict(backbone="test_resnet"), "vit": dict(backbone="test_vit"), "patch 14": dict(backbone="vit_small_patch14_dinov2", embed_dim=48, depth=3, num_heads=3)}


def recipe_of(net): return RECIPES["small"].but(network="FrozenNet", embed=dict(pretrained=False, **NETS[net]), dim=8, bs=2, crop=64, scale=(1, 1), warmup=2)


def batches(): return weak_dls(WeakSet(SCENES, "scribbles", regions=8), SCENES, bs=2, crop=64, steps=3, scale=(1, 1))


def test_only_the_second_head_learns(tmp_path):
    net = SegNet(EmbedNet("test_resnet", 8, pretrained=False, freeze_bn=False), SoftmaxHead(8, 13)) # even where batch norm would learn
    scenes = SceneSet(4, size=64)
    labels = [scenes.mask(i) for i in range(4)]
    dls = weak_dls(WeakSet(scenes, lambda i: labels[i]), SceneSet(1, size=64, start=50), bs=2, crop=64, steps=2, device="cpu")
    recipe = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8, warmup=1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    learn = head_learner(dls, net, recipe, path=tmp_path)
    fresh = {k: v.clone() for k, v in learn.model.head.state_dict().items()}
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda row: None
    learn.fit_poly(2, resume=True)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) # batch norm's statistics included
    assert not any(torch.equal(v, fresh[k]) for k, v in learn.model.head.named_parameters())
    assert learn.recipe.multipliers == (10, 20) # as in the paper
    assert [h["lr"] for h in learn.opt.hypers] == pytest.approx([learn.opt.hypers[0]["lr"]*m for m in (1, 2)])
    assert len(learn.history) == 2 and all(h["loss"] > 0 for h in learn.history)
    again = head_learner(dls, net, recipe, path=tmp_path)
    again.fit_poly(2, resume=True)
    assert all(torch.equal(v, again.model.head.state_dict()[k]) for k, v in learn.model.head.state_dict().items())
    assert predict_head(learn.model, scenes.image(0)).shape == (64, 64)


def test_frozen_network_moves_as_a_whole():
    frozen = FrozenEmbed(EmbedNet("test_resnet", 8, pretrained=False)).to("meta")
    assert {t.device.type for t in (*frozen.parameters(), *frozen.buffers(), frozen.mean)} == {"meta"}


def test_building_a_frozen_network_leaves_its_weights_alone():
    net = FrozenNet(dim=8, pretrained=False, **NETS["cnn"])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.fixed(torch.zeros(1, 3, 64, 64)) # of a network that was never told to train or to predict
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("hidden", [0, 12])
@pytest.mark.parametrize("net", NETS)
def test_a_probe_learns_and_its_backbone_does_not(net, hidden, tmp_path):
    learn = quiet(probe_learner(batches(), recipe_of(net), hidden, path=tmp_path))
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.fit_poly(1)
    moved = {k for k, v in learn.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith("head.") for k in moved)
    x = image_tensor(SCENES.image(0)[:50], "cpu")
    assert learn.model.eval()(x)[1].shape == (1, learn.dls.c, 13, 16)


def test_features_that_come_with_an_image_are_judged_as_its_own(tmp_path):
    learn = probe_learner(batches(), recipe_of("cnn"), 12, path=tmp_path)
    cached = with_features(learn.dls, FeatureCache(tmp_path / "f", learn.model.embed.embed).fill(SCENES, progress=False))
    model, image = learn.model.eval(), cached.train.one_batch()[0] # windows are as large as the images
    seen = model(image)[1]
    own = model(image.detach().as_subclass(torch.Tensor).clone())[1]
    assert torch.allclose(seen, own, atol=1e-2) and seen.std() > .05


def test_a_linear_probe_is_linear_and_one_with_a_hidden_layer_is_not():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 6, 5, 4, generator=g).double()
    for hidden, wanted in (0, True), (9, False):
        head = FeatureHead(6, 3, hidden).double().eval()
        f = lambda m: head([m], None)
        assert torch.allclose(f(.3*a + .7*b), .3*f(a) + .7*f(b)) == wanted


def test_a_backbone_that_learns_is_refused(tmp_path):
    with pytest.raises(SpmlError, match="its backbone learns; a probe needs"): probe_learner(batches(), RECIPES["small"], path=tmp_path)


@pytest.mark.parametrize("net", ["cnn", "vit"])
def test_a_second_head_on_the_features_sees_no_embedding_and_the_network_keeps_its_own(net, tmp_path):
    recipe = recipe_of(net)
    trained = create_model(recipe, batches().c)
    learn = quiet(head_learner(batches(), trained, recipe, path=tmp_path, sees="features"))
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.fit_poly(1)
    moved = {k for k, v in learn.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith("head.") for k in moved)
    model, x = learn.model.eval(), torch.rand(2, 3, 48, 64)
    maps, emb = model.embed.look(x)
    assert torch.equal(emb, trained.eval().embed(x)) and torch.equal(model(x)[0], emb)
    assert torch.equal(model.head(maps, emb), model.head(maps, torch.randn_like(emb)))
    want = [m for m in model.embed.embed.features(x) if m is not None]
    assert maps[0].shape == (2, sum(m.shape[1] for m in want), 12, 16)


def test_what_a_second_head_cannot_see_is_refused(tmp_path):
    with pytest.raises(SpmlError, match="sees='image': give 'embedding' or 'features'"): head_learner(batches(), create_model(recipe_of("cnn"), 3), recipe_of("cnn"), path=tmp_path, sees="image")

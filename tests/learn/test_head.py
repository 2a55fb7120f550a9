"""The second head learns alone; the network below it stays as it is."""
import pytest
import torch
from fastai.callback.progress import ProgressCallback

from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.infer.scores import predict_head
from spml_kit.learn.head import FrozenEmbed, head_learner
from spml_kit.method.nets import EmbedNet, SegNet, SoftmaxHead
from spml_kit.method.recipes import RECIPES


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

"""Weights: files as people have them give the network of the file, bit for bit, or are refused by what is wrong; nothing in them runs; without a network, nobody waits."""
import argparse
import math
import os
import time
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from spml_kit.core import SpmlError
from spml_kit.method import weights as room
from spml_kit.method.backbones import create_backbone
from spml_kit.method.nets import EmbedNet
from spml_kit.method.weights import answers, cached_weights, check_download, read_weights, without_prefix

X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def features(net):
    with torch.no_grad(): return list(net.eval()(X))


def reference(name, state, **kwargs):
    "The features of timm's own loading of a state dict of the whole network"
    overlay = dict(state_dict=dict(state))
    return features(timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs))


def same(a, b): return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


WRAPPED = {"plain": lambda s: s, "state_dict": lambda s: {"state_dict": s, "epoch": 3}, "model": lambda s: {"model": s, "args": argparse.Namespace(lr=1)}, "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "ema before the rest": lambda s: {"model_ema": s, "model": {k: 0*v for k, v in s.items()}}, "twice nested, prefixed, with another head": lambda s: {"state_dict": {"model": {**{f"module.backbone.{k}": v for k, v in s.items()}, "module.decode.weight": torch.ones(2)}}}}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_files_as_people_have_them(tmp_path, name, wrap):
    torch.manual_seed(1)
    state = timm.create_model(name).state_dict()
    torch.save(WRAPPED[wrap](state), tmp_path/"w.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(features(create_backbone(name, weights=str(tmp_path/"w.pth"))), reference(name, state, output_stride=16))


def test_safetensors_whatever_they_are_called(tmp_path):
    state = timm.create_model("test_resnet").state_dict()
    for file in "w.safetensors", "w.bin":
        save_file(state, tmp_path/file)
        assert same(features(create_backbone("test_resnet", weights=str(tmp_path/file))), reference("test_resnet", state, output_stride=16))


def test_names_of_feature_maps_and_of_whole_runs(tmp_path):
    "As `state_dict` of a backbone gives them, and as an embedding network has them inside"
    net = EmbedNet("test_convnext", 8, pretrained=False)
    for prefix in "", "embed.backbone.":
        torch.save({f"{prefix}{k}": v for k, v in net.backbone.state_dict().items()}, tmp_path/"w.pth")
        assert same(features(create_backbone("test_convnext", weights=str(tmp_path/"w.pth"))), features(net.backbone))


def test_timms_own_renaming_and_resizing(tmp_path):
    "Names of the first release of DINOv2 (mask token, blocks in chunks), and positions of other sizes, by the family's filter"
    small = dict(embed_dim=48, depth=3, num_heads=3)
    state = timm.create_model("vit_small_patch14_dinov2", img_size=70, **small).state_dict()
    torch.save({**state, "mask_token": torch.zeros(1, 48)}, tmp_path/"w.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error") # the filter knows the mask token
        net = create_backbone("vit_small_patch14_dinov2", weights=str(tmp_path/"w.pth"), **small)
    assert torch.equal(net.net.model.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    old, new = state["pos_embed"], net.net.model.pos_embed
    assert new.shape[1] == (518//14)**2 + 1 > old.shape[1]
    torch.testing.assert_close(new[:, 1:].mean(1), old[:, 1:].mean(1), atol=5e-3, rtol=0)


def test_old_files_without_a_count_of_batches(tmp_path):
    state = timm.create_model("test_resnet").state_dict()
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path/"w.pth")
    assert same(features(create_backbone("test_resnet", weights=str(tmp_path/"w.pth"))), reference("test_resnet", state, output_stride=16))


def changed(**of): return lambda s: {**s, **of}


@pytest.mark.parametrize("name, make, says", [
    ("resnet18", lambda s: timm.create_model("resnet34").state_dict(), r"80 are of layers that it does not have \(first layer1.2.conv1.weight\)"),
    ("resnet34", lambda s: timm.create_model("resnet18").state_dict(), "80 of its 216 tensors are missing"),
    ("test_resnet", lambda s: {k: v for k, v in s.items() if "layer2" not in k}, "tensors are missing .first layer2"),
    ("test_resnet", changed(**{"layer1.0.conv1.weight": torch.zeros(3, 3)}), r"1 have another shape \(first layer1.0.conv1.weight: \(3, 3\) in the file"),
    ("test_vit", lambda s: timm.create_model("test_resnet").state_dict(), "tensors are missing"),
    ("test_vit", lambda s: {}, "not a state dict"), ("test_vit", lambda s: nn.Linear(2, 2), "could run code"), ("test_vit", lambda s: {"a": 1}, "not a state dict"),
], ids=["larger", "smaller", "cut", "shape", "other family", "empty", "network", "number"])
def test_what_does_not_fit_is_told(tmp_path, name, make, says):
    torch.save(make(timm.create_model(name).state_dict()), tmp_path/"w.pth")
    with pytest.raises(SpmlError, match=f"w.pth.*{says}"): create_backbone(name, weights=str(tmp_path/"w.pth"))


def test_surplus_beside_the_body_is_told_and_a_classifier_is_not(tmp_path):
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    torch.save(state, tmp_path/"w.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_backbone("test_resnet", weights=str(tmp_path/"w.pth"))
    torch.save(changed(**{"decode_head.conv.weight": torch.ones(1)})(state), tmp_path/"w.pth")
    with pytest.warns(UserWarning, match="left out 1 tensor of no layer of 'test_resnet', first decode_head.conv.weight"): create_backbone("test_resnet", weights=str(tmp_path/"w.pth"))


class Rogue:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_runs(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(1)}, "args": Rogue(tmp_path/"made")}, tmp_path/"w.pth")
    with pytest.raises(SpmlError, match="could run code"): read_weights(tmp_path/"w.pth")
    assert not (tmp_path/"made").exists()


def test_the_seed_of_what_follows_does_not_feel_the_file(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path/"w.pth")
    def head(**kw):
        torch.manual_seed(3)
        return EmbedNet("test_resnet", 8, pretrained=False, **kw).head.convs[0].weight
    assert torch.equal(head(), head(weights=str(tmp_path/"w.pth")))


def test_prefixes():
    wanted = {"a.weight", "b.c.weight", "b.bias"}
    names = lambda *keys: set(without_prefix(dict.fromkeys(keys, 0), wanted))
    assert names("x.y.a.weight", "x.y.b.bias", "z") == {"a.weight", "b.bias", "z"}
    assert names(*wanted) == wanted and names("q", "r.s") == {"q", "r.s"}
    assert names("x.a.weight", "x.b.bias", "a.weight") == {"x.a.weight", "b.bias", "a.weight"} # nothing is written over


# published weights

def test_a_machine_that_is_cut_off_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(room, "cached_weights", lambda name: None)
    monkeypatch.setattr(room.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    with pytest.raises(SpmlError, match="backbone 'test_resnet': its weights are not on this machine .*127.0.0.1 does not answer.*weights="): create_backbone("test_resnet")
    monkeypatch.setattr(room.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SpmlError, match="HF_HUB_OFFLINE is set"): check_download("test_vit")
    with pytest.raises(SpmlError, match="'hf-hub:timm/x'.*HF_HUB_OFFLINE is set"): create_backbone("hf-hub:timm/x", pretrained=False)
    assert time.perf_counter() - start < 6


def test_a_name_that_is_looked_up_for_long_is_given_up(monkeypatch):
    monkeypatch.setattr(room, "urlopen", lambda *a, **k: time.sleep(3))
    start = time.perf_counter()
    assert not answers("http://nobody.invalid", .2) and time.perf_counter() - start < 1.5


def test_any_answer_is_an_answer(monkeypatch):
    def refused(request, timeout): raise room.HTTPError(request.full_url, 404, "no", None, None)
    monkeypatch.setattr(room, "urlopen", refused)
    assert answers("http://nobody.invalid", 1)


def test_what_was_downloaded_before_is_read_without_a_question(tmp_path, monkeypatch):
    state = timm.create_model("test_resnet").state_dict()
    save_file(state, tmp_path/"model.safetensors")
    asked = []
    def found(repo, file, revision=None):
        asked.append((repo, file))
        return str(tmp_path/file) if file == "model.safetensors" else None
    monkeypatch.setattr(room, "try_to_load_from_cache", found)
    monkeypatch.setattr(room, "urlopen", lambda *a, **k: pytest.fail("asked the network"))
    assert cached_weights("test_resnet") == tmp_path/"model.safetensors" and ("timm/test_resnet.r160_in1k", "model.safetensors") in asked
    assert same(features(create_backbone("test_resnet")), reference("test_resnet", state, output_stride=16))
    monkeypatch.setattr(room, "try_to_load_from_cache", lambda *a, **k: object()) # known to be absent there
    assert cached_weights("test_resnet") is None


@pytest.mark.parametrize("make, says", [(lambda f: torch.save({"w": torch.tensor([math.nan])}, f), "not finite"), (lambda f: torch.save([1], f), "not a state dict"), (lambda f: torch.save({"model": {"w": torch.zeros(1)}}, f), "does not fit 'test_resnet'"),
    (lambda f: f.write_bytes(b"x"*100), "not a readable state dict"), (lambda f: f.mkdir(), "this is a folder"), (os.mkfifo, "a pipe"), (lambda f: None, "no such file")], ids=["nan", "list", "nested", "bytes", "folder", "pipe", "absent"])
def test_weights_of_ones_own_are_looked_at(tmp_path, make, says):
    make(tmp_path/"w.pth")
    with pytest.raises(SpmlError, match=f"w.pth.*{says}"): EmbedNet("test_resnet", weights=str(tmp_path/"w.pth"))

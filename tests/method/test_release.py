"""Models of the paper's authors: a network in their layout, written here anew, and what is loaded from its file are the same function."""
import os
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck

from spml_kit.core import SpmlError
from spml_kit.data.images import SceneSet
from spml_kit.infer.scores import predict_head, score
from spml_kit.method.nets import SegNet, SoftmaxHead, paper_deeplab
from spml_kit.method.release import read_release, release_model, release_name, save_release


def named(**parts): return nn.Sequential(OrderedDict(parts))


def stage(n_in, width, n, stride, first, rest):
    down = nn.Sequential(nn.Conv2d(n_in, 4*width, 1, stride, bias=False), nn.BatchNorm2d(4*width))
    return nn.Sequential(Bottleneck(n_in, width, stride, down, dilation=first), *(Bottleneck(4*width, width, dilation=rest) for _ in range(n - 1)))


class Theirs(nn.Module):
    "The embedding network under the release's names"
    def __init__(self, kind, dim):
        super().__init__()
        conv = lambda i, o, s=1: nn.Conv2d(i, o, 3, s, 1, bias=False)
        stem = named(conv1=nn.Sequential(conv(3, 64, 2), nn.BatchNorm2d(64), nn.ReLU(), conv(64, 64), nn.BatchNorm2d(64), nn.ReLU(), conv(64, 128)), bn1=nn.BatchNorm2d(128))
        self.resnet_backbone = named(conv1=stem, res2=stage(128, 64, 3, 1, 1, 1), res3=stage(256, 128, 4, 2, 1, 1), res4=stage(512, 256, 23, 1, 1, 2), res5=stage(1024, 512, 3, 1, 2, 4))
        if kind == "aspp":
            self.aspp = nn.ModuleDict({f"aspp_{k}": nn.Sequential(nn.Conv2d(2048, dim, 3, padding=6*k, dilation=6*k)) for k in (1, 2, 3, 4)})
        else:
            block = lambda i, k: [nn.Conv2d(i, 512, k, padding=k//2, bias=False), nn.BatchNorm2d(512), nn.ReLU()]
            pools = {f"pspp_{k}": nn.Sequential(nn.AdaptiveAvgPool2d(b), *block(2048, 1)) for k, b in enumerate((1, 2, 3, 6), 1)}
            self.pspp = nn.Sequential(nn.ModuleDict({**pools, "conv": nn.Sequential(*block(4096, 3))}), nn.Conv2d(512, dim, 1))
            self.lfn = nn.Conv2d(3, 3, 5, groups=3)

    def forward(self, x):
        b = self.resnet_backbone
        x = F.max_pool2d(F.relu(b.conv1.bn1(b.conv1.conv1(x))), 3, 2, 1)
        x = b.res5(b.res4(b.res3(b.res2(x))))
        up = lambda o, **how: F.interpolate(o, mode="bilinear", align_corners=False, **how)
        if hasattr(self, "aspp"): return up(sum(o(x) for o in self.aspp.values()), scale_factor=2)
        first, last = self.pspp
        return up(last(first["conv"](torch.cat([x, *(up(first[f"pspp_{k}"](x), size=x.shape[-2:]) for k in (1, 2, 3, 4))], 1))), scale_factor=2)


def theirs(kind, dim, n_classes):
    torch.manual_seed(dim)
    embed = Theirs(kind, dim)
    head = named(semantic_classifier=nn.Sequential(nn.Conv2d(dim, 2*dim, 3, padding=1, bias=False), nn.BatchNorm2d(2*dim), nn.ReLU(), nn.Dropout(.65), nn.Conv2d(2*dim, n_classes, 1)))
    for m in [*embed.modules(), *head.modules()]: # as trained ones have it
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .1); m.running_var.uniform_(.5, 2); nn.init.uniform_(m.weight, .5, 1.5); nn.init.normal_(m.bias, 0, .1)
    return embed.eval(), head.eval()


@pytest.fixture(scope="module", params=[("aspp", 64, 21), ("pspp", 32, 15)], ids=["voc", "densepose"])
def pair(request, tmp_path_factory):
    embed, head = theirs(*request.param)
    path = tmp_path_factory.mktemp("release")/"model-29999.pth"
    torch.save({"embedding_model": embed.state_dict(), "prediction_model": head.state_dict()}, path)
    return embed, head, path


def test_the_loaded_model_is_the_same_function(pair):
    embed, head, path = pair
    model, x = release_model(path).double(), torch.rand(2, 3, 49, 65, dtype=torch.float64)
    with torch.no_grad():
        ours = model(x)
        emb = embed.double()((x - model.embed.mean)/model.embed.std)
        logits = head.double().semantic_classifier(emb/emb.norm(dim=1, keepdim=True))
    for a, b in zip(ours, (emb, logits)): assert a.shape == b.shape and (a - b).abs().max() <= 1e-11*b.abs().max()
    embed.float(), head.float()


def test_it_predicts_and_scores(pair):
    embed, head, path = pair
    scenes, model = SceneSet(2, size=64), release_model(path)
    assert not model.training
    labels = [predict_head(model, scenes.image(i)) for i in range(2)]
    assert {p.shape for p in labels} == {(64, 64)}
    assert len(score([p % 13 for p in labels], scenes, progress=False)) == 2


def test_written_in_their_layout_their_network_loads_it(pair, tmp_path):
    "Every name and shape, strictly"
    embed, head, path = pair
    model = release_model(path)
    save_release(model, tmp_path/"ours.pth")
    said = torch.load(tmp_path/"ours.pth", weights_only=True)
    kept = {k: v for k, v in embed.state_dict().items() if not k.startswith("lfn")}
    assert {*said["embedding_model"]} == {*kept} and all(torch.equal(v, said["embedding_model"][k]) for k, v in kept.items())
    head.load_state_dict(said["prediction_model"])


def saved(tmp_path, embedding, prediction, **more):
    torch.save({"embedding_model": embedding, "prediction_model": prediction, **more}, tmp_path/"x.pth")
    return tmp_path/"x.pth"


@pytest.fixture(scope="module")
def good():
    "A small checkpoint in their layout"
    m = SegNet(paper_deeplab(8), SoftmaxHead(8, 3))
    parts = {"embedding_model": {}, "prediction_model": {}}
    for k, v in m.state_dict().items():
        part, _, name = release_name(k).partition(".")
        parts[part][name] = v
    return parts


def without(state, *words): return {k: v for k, v in state.items() if not any(w in k for w in words)}


@pytest.mark.parametrize("what, words", [
    ("missing", "missing tensors: .*, first embedding_model.resnet_backbone.res3.1.conv2.weight"), ("more", "unknown tensors: 1, first embedding_model.decoder"), ("shape", "tensors of another shape: 1, first"),
    ("nan", "not finite"), ("no head", "no softmax head"), ("no aspp", "no head of the embedding"), ("entries", r"there are \['model'\]"), ("list", "it holds a list"), ("text", "'embedding_model.n' is not a tensor"), ("short", "not a readable checkpoint"), ("absent", "no such file")])
def test_other_files_are_refused(tmp_path, good, what, words):
    e, p = good["embedding_model"], good["prediction_model"]
    path = saved(tmp_path, e, p) if what == "short" else tmp_path/"x.pth"
    if what == "missing": saved(tmp_path, without(e, "res3.1.conv2"), p)
    if what == "more": saved(tmp_path, {**e, "decoder": torch.ones(2)}, p)
    if what == "shape": saved(tmp_path, {**e, "aspp.aspp_3.0.bias": torch.ones(2)}, p)
    if what == "nan": saved(tmp_path, {**e, "aspp.aspp_3.0.bias": torch.full((8,), torch.nan)}, p)
    if what == "no head": saved(tmp_path, e, {})
    if what == "no aspp": saved(tmp_path, without(e, "aspp"), p)
    if what == "entries": torch.save({"model": e}, path)
    if what == "list": torch.save([1, 2], path)
    if what == "text": saved(tmp_path, {**e, "n": 3}, p)
    if what == "short": path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(SpmlError, match=words): release_model(path)


def test_names_of_several_gpus_and_old_batch_norms_are_known(tmp_path):
    m = SegNet(paper_deeplab(8), SoftmaxHead(8, 3)).eval()
    save_release(m, tmp_path/"x.pth")
    said = torch.load(tmp_path/"x.pth", weights_only=True)
    old = {part: {f"module.{k}": v for k, v in without(s, "num_batches_tracked").items()} for part, s in said.items()}
    torch.save(old, tmp_path/"old.pth")
    x = torch.rand(1, 3, 33, 33)
    with torch.no_grad():
        for a, b in zip(m(x), release_model(tmp_path/"old.pth")(x)): assert torch.equal(a, b)
    assert all(release_name(k).startswith(("embedding_model.", "prediction_model.")) for k in m.state_dict())


class Harm:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.system, (f"touch {self.mark}",)


def test_a_harmful_checkpoint_does_not_run(tmp_path):
    torch.save({"embedding_model": {"a": Harm(tmp_path/"mark")}, "prediction_model": {}}, tmp_path/"x.pth")
    with pytest.raises(SpmlError, match="not a readable checkpoint"): read_release(tmp_path/"x.pth")
    assert not (tmp_path/"mark").exists()

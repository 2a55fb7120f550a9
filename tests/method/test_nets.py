"""Networks: gradient checkpointing, compiled and half-precision forms give the outputs and gradients of the plain ones."""
import copy
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from spml_kit.core import SpmlError
from spml_kit.method.backbones import CheckpointedBlocks
from spml_kit.method.nets import EmbedNet, SegNet, SoftmaxHead, paper_deeplab, unit


BACKBONES = ["test_resnet", "tf_efficientnet_lite0", "test_convnext2"]


def twice(net, x):
    "Two training steps: maps, gradients, and the state with the statistics of batch norm"
    net.train()
    for seed in 1, 2:
        torch.manual_seed(seed) # of dropout
        y = net(x)
        (y*torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y, *(p.grad for p in net.parameters() if p.grad is not None), *net.state_dict().values()]


def pair(name, **options):
    torch.manual_seed(0)
    kw = dict(dim=8, pretrained=False, output_stride=32 if "convnext" in name else 16, freeze_bn=options.pop("freeze_bn", False))
    plain, other = EmbedNet(name, **kw), EmbedNet(name, **kw, **options)
    other.load_state_dict(plain.state_dict())
    return plain, other, torch.rand(2, 3, 64, 96)


@pytest.mark.parametrize("freeze_bn", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
def test_checkpointing_changes_no_number(name, freeze_bn):
    plain, other, x = pair(name, freeze_bn=freeze_bn, checkpointing=True)
    assert any(isinstance(m, CheckpointedBlocks) for m in other.modules())
    for a, b in zip(twice(plain, x), twice(other, x), strict=True): assert torch.equal(a, b)
    assert torch.equal(plain.eval()(x), copy.deepcopy(other).eval()(x))


class Saved:
    "A tensor that a graph holds"
    def __init__(self, t): self.t = t


def test_checkpointing_keeps_less():
    def kept(net):
        "Bytes that the graph holds when the maps are there; of what was let go, another tensor may have the address"
        held = weakref.WeakSet()
        def pack(t): held.add(saved := Saved(t)); return saved
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.t): y = net.train()(x)
        assert y.requires_grad
        return sum({o.t.untyped_storage().data_ptr(): o.t.untyped_storage().nbytes() for o in held if not isinstance(o.t, nn.Parameter)}.values())
    plain, other, x = pair("resnet50", checkpointing=True)
    assert kept(other) < .4*kept(plain)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="minutes on a CPU"))])
def test_compiled_gives_the_same(monkeypatch, backend):
    "Traced and differentiated ahead; on a GPU also with kernels of its own"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain, other, x = pair("test_resnet", compiled=True, freeze_bn=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for a, b in zip(twice(plain, x), twice(other, x), strict=True): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert other.state_dict().keys() == plain.state_dict().keys()
    copy.deepcopy(other)


@pytest.mark.parametrize("name", BACKBONES[:2])
def test_bfloat16_trains_and_float32_leaves(name):
    "What enters and leaves, the gradients and the prediction are float32; within training the numbers are those of bfloat16"
    plain, other, x = pair(name, precision="bfloat16", freeze_bn=True)
    emb, logits = SegNet(other, SoftmaxHead(8, 3, 0.)).train()(x)
    assert emb.dtype == logits.dtype == torch.float32 and other.features(x)[-1].dtype == torch.float32
    near = torch.nn.functional.cosine_similarity(emb, plain.train()(x)).mean()
    assert .99 < near < 1 and not torch.equal(emb, plain(x))
    emb.square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in other.parameters())
    assert torch.equal(other.eval()(x), plain.eval()(x))


def test_precisions_are_named():
    with pytest.raises(SpmlError, match="float32 or bfloat16"): EmbedNet("test_resnet", pretrained=False, precision="half")


def test_the_papers_networks_take_them():
    net = paper_deeplab(8, precision="bfloat16", checkpointing=True)
    assert net.precision == "bfloat16" and sum(isinstance(m, CheckpointedBlocks) for m in net.modules()) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unit_of_half_precision(dtype):
    x = torch.tensor([[0., 0.], [300., 400.], [6e4, 6e4], [1e-4, 0.]], dtype=dtype)
    assert unit(x).dtype == torch.float32
    torch.testing.assert_close(unit(x), torch.tensor([[0., 0.], [.6, .8], [.5**.5, .5**.5], [1., 0.]]), atol=2e-3, rtol=0)

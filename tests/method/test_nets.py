"""Networks: dilated depthwise convolutions, gradient checkpointing, compiled and half-precision forms give the outputs and gradients of the plain ones."""
import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from spml_kit.core import SpmlError
from spml_kit.method.backbones import CheckpointedBlocks, DepthwiseDilated, checkpoint_blocks, create_backbone
from spml_kit.method.nets import EmbedNet, SegNet, SoftmaxHead, paper_deeplab


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels last"])
@pytest.mark.parametrize("kernel,dilation,size", [(3, 2, (8, 8)), (5, 2, (9, 7)), (5, 4, (3, 12)), (7, 3, (1, 1))])
@pytest.mark.parametrize("frozen", ["nothing", "image", "kernel"])
def test_depthwise_gradients(kernel, dilation, size, frozen, form, dtype, tolerance):
    torch.manual_seed(kernel*dilation)
    layer = dict(kernel_size=kernel, padding=dilation*(kernel//2), dilation=dilation, groups=5, bias=False, dtype=dtype)
    plain, quick = nn.Conv2d(5, 5, **layer), DepthwiseDilated(5, 5, **layer)
    assert DepthwiseDilated.fits(plain)
    quick.load_state_dict(plain.state_dict())
    x, away = torch.randn(2, 3, 5, *size, dtype=dtype)
    x = x.contiguous(memory_format=form).requires_grad_(frozen != "image")

    def seen(conv):
        conv.weight.requires_grad_(frozen != "kernel")
        y = conv(x)
        return [y, *torch.autograd.grad((y*away).sum(), [o for o in (x, conv.weight) if o.requires_grad])]

    for ours, theirs in zip(seen(quick), seen(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("change", [dict(stride=2), dict(dilation=1, padding=2), dict(padding=2), dict(bias=True), dict(groups=1), dict(padding_mode="reflect"), dict(kernel_size=4)], ids=str)
def test_other_layers_stay(change):
    assert not DepthwiseDilated.fits(nn.Conv2d(6, 6, **dict(kernel_size=5, padding=4, dilation=2, groups=6, bias=False) | change))


def test_backbone_takes_them_in():
    "the last two stages at output stride 8; names and values of the weights stay those of timm"
    net = create_backbone(output_stride=8)
    quick = [name for name, layer in net.named_modules() if isinstance(layer, DepthwiseDilated)]
    assert len(quick) == sum(isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.dilation > (1, 1) for layer in net.modules()) > 5
    plain = create_backbone(output_stride=8)
    for layer in plain.modules():
        if isinstance(layer, DepthwiseDilated): layer.__class__ = nn.Conv2d
    x = torch.rand(1, 3, 64, 64)
    for ours, theirs in zip(net.eval()(x), plain.eval()(x), strict=True): torch.testing.assert_close(ours, theirs)


def test_half_precision_is_left_to_torch():
    layer = DepthwiseDilated(4, 4, 3, padding=2, dilation=2, groups=4, bias=False)
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16): y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


# forms of a network that differ in memory and time only

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


def test_checkpointing_keeps_less():
    def kept(net):
        held = {}
        def pack(t):
            if not isinstance(t, nn.Parameter): held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): net.train()(x)
        return sum(held.values())
    plain, other, x = pair("resnet50", checkpointing=True)
    assert kept(other) < .4*kept(plain)


def test_what_cannot_be_checkpointed():
    with pytest.raises(SpmlError, match="no row of blocks"): checkpoint_blocks(nn.Sequential(nn.Conv2d(3, 3, 1)))


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

"""Dilated depthwise convolutions: outputs and gradients are those of PyTorch."""
import pytest
import torch
from torch import nn

from spml_kit.embed import DepthwiseDilated, create_backbone


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

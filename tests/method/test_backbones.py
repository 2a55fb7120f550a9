"""Backbones: one of each kind builds, takes any size, gives its maps on the grids of its strides, trains, and is checkpointed without another number; dilated depthwise convolutions have the gradients of plain ones."""
import copy
import pickle
from math import ceil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from spml_kit.cams.classifier import TagNet, class_maps, tag_splitter
from spml_kit.core import SpmlError
from spml_kit.learn.learner import spml_splitter
from spml_kit.method.backbones import AdaptedNet, DepthwiseDilated, Neck, Pyramid, checkpoint_blocks, create_backbone, image_norm, on_grid, parameters_upto
from spml_kit.method.nets import EmbedNet, SegNet, SoftmaxHead

pytestmark = pytest.mark.filterwarnings("ignore:backbone .* takes images of")
SIZES = (64, 96), (75, 101), (33, 40)

SMALL = { # a name that one would choose, made small
    "swin_tiny_patch4_window7_224": dict(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2)), "swinv2_tiny_window8_256": dict(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2)),
    "vit_tiny_patch16_224": dict(embed_dim=48, depth=3), "vit_small_patch14_dinov2": dict(embed_dim=48, depth=3, num_heads=3), "vit_small_patch16_dinov3": dict(embed_dim=48, depth=3, num_heads=3),
    "eva02_tiny_patch14_224": dict(embed_dim=48, depth=3), "vit_tiny_r_s16_p8_224": dict(embed_dim=48, depth=3), "hiera_tiny_224": dict(embed_dim=24, stages=(1, 1, 2, 1), num_heads=1),
    "mambaout_femto": dict(depths=(1, 1, 1, 1), dims=(24, 32, 48, 64)), "fastvit_t8": dict(layers=(1, 1, 1, 1)), "efficientvit_b0": {}, "efficientvit_m0": {}, "test_maxvit": {}, "test_coatnet": {},
    "hrnet_w18_small": {}, "levit_128s": {}, "xcit_nano_12_p8_224": dict(depth=3), "densenet121": dict(growth_rate=8, block_config=(1, 1, 1, 1)), "pvt_v2_b0": {}, "mixer_s32_224": {},
}
DILATED = "test_resnet", "test_efficientnet", "mobilenetv3_small_050", "mobilenetv4_conv_small", "regnety_002"


def made(name, **kw): return EmbedNet(name, 8, pretrained=False, **SMALL.get(name, {}), **kw)


@pytest.mark.parametrize("name", [*SMALL, *DILATED])
def test_any_size_in_and_stride_4_out(name):
    torch.manual_seed(0)
    net = made(name).eval()
    reductions = net.backbone.feature_info.reduction()
    for h, w in SIZES:
        x = torch.rand(2, 3, h, w)
        with torch.no_grad(): maps, y = net.look(x)
        assert y.shape == (2, 8, ceil(h/4), ceil(w/4)) and y.isfinite().all()
        assert [m.shape[1:] for m in maps] == [(c, ceil(h/r), ceil(w/r)) for c, r in zip(net.backbone.feature_info.channels(), reductions)]


@pytest.mark.parametrize("name", [*SMALL, *DILATED])
def test_it_trains(name):
    "Every parameter that is not frozen has a gradient or belongs to nothing that a map is made of; a step lowers the loss"
    torch.manual_seed(0)
    net, x = made(name, freeze_bn=False).train(), torch.rand(2, 3, 64, 64) # of random weights, batch norm must learn
    if "hiera" not in name and name not in ("levit_128s", "test_coatnet", "mixer_s32_224"): assert net.frozen() and not any(p.requires_grad for p in net.frozen())
    learning = [p for p in net.parameters() if p.requires_grad]
    if "_r_s16" not in name: # its patches come from half a ResNet
        assert sum(p.numel() for p in net.frozen()) < .5*sum(p.numel() for p in net.backbone.parameters())
    aim, losses = torch.randn(2, 8, 16, 16), []
    optimiser = torch.optim.Adam(learning, 2e-3)
    for _ in range(4):
        loss = F.mse_loss(net(x), aim)
        optimiser.zero_grad(); loss.backward(); optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in net.backbone.named_parameters() if "neck" not in n)


NATIVE = [n for n in SMALL if n not in ("hiera_tiny_224", "levit_128s", "test_coatnet", "mixer_s32_224", "vit_small_patch14_dinov2", "eva02_tiny_patch14_224")]


@pytest.mark.parametrize("name", NATIVE)
def test_maps_are_those_of_the_network(name):
    "On a size that a network takes by itself nothing is changed but the order of the dimensions"
    net = made(name).backbone.eval()
    x = torch.rand(1, 3, net.multiple, 2*net.multiple)
    with torch.no_grad(): ours, theirs = net.native(x), net.net(x)
    if net.plain: theirs = theirs[-1:]
    for m, o in zip(ours, theirs, strict=True):
        turned = o if o.shape[1] == m.shape[1] and o.shape[2:] == m.shape[2:] else o.permute(0, 3, 1, 2)
        assert torch.equal(m, turned)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_small_patch14_dinov2", "mambaout_femto"])
def test_what_is_filled_up_is_the_edge_and_is_cut_off(name):
    net, x = made(name).backbone.eval(), torch.rand(1, 3, 75, 101)
    h, w = (ceil(n/net.multiple)*net.multiple for n in (75, 101))
    full = torch.cat([x, x[..., -1:].expand(-1, -1, -1, w - 101)], 3)
    full = torch.cat([full, full[:, :, -1:].expand(-1, -1, h - 75, -1)], 2)
    with torch.no_grad(): cut, whole = net.native(x), net.native(full)
    for a, b, s in zip(cut, whole, net.strides):
        if h % s == 0 and w % s == 0: b = b[..., :a.shape[2], :a.shape[3]]
        else: b = on_grid(net.net(full)[-1], (h, w), (75, 101), s) # of patches that are not of the grid
        assert torch.allclose(a, b, atol=1e-5)


def plain_grid(x, covered, size, stride):
    "Bilinear by PyTorch's own sampling, in float64"
    at = [((torch.arange(ceil(n/stride), dtype=torch.float64) + .5)*stride)/c*2 - 1 for n, c in zip(size, covered)]
    grid = torch.stack(torch.meshgrid(at[1], at[0], indexing="xy"), -1)
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False)


@pytest.mark.parametrize("cells, covered, size, stride", [((8, 6), (112, 84), (101, 75), 16), ((5, 7), (70, 98), (70, 98), 16), ((7, 7), (50, 80), (50, 80), 8), ((1, 3), (14, 42), (3, 40), 16), ((4, 4), (64, 64), (64, 64), 12)])
def test_grids_against_the_plain_form(cells, covered, size, stride):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *cells, dtype=torch.float64, generator=g, requires_grad=True)
    ours, theirs = on_grid(x, covered, size, stride), plain_grid(x, covered, size, stride)
    torch.testing.assert_close(ours, theirs)
    away = torch.randn(ours.shape, dtype=torch.float64, generator=g)
    for a, b in zip(torch.autograd.grad((ours*away).sum(), x), torch.autograd.grad((theirs*away).sum(), x)): torch.testing.assert_close(a, b)


def test_grids_far_apart_hear_every_cell():
    x = torch.zeros(1, 1, 14, 14)
    x[..., 5, 6] = 1.
    assert on_grid(x, (64, 64), (64, 64), 32).sum() > 0 # 14 cells on 2
    torch.testing.assert_close(on_grid(torch.ones(1, 2, 14, 14), (60, 61), (60, 61), 32), torch.ones(1, 2, 2, 2))


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("lateral", [True, False])
def test_output_stride_of_a_neck(output_stride, lateral):
    net = made("vit_tiny_patch16_224", output_stride=output_stride, lateral=lateral).eval()
    assert net.backbone.feature_info.reduction() == [s for s in (4, 8, 16, 32) if s <= output_stride]
    with torch.no_grad(): y = net(torch.rand(1, 3, 64, 96))
    assert y.shape[-2:] == ((16, 24) if lateral or output_stride == 8 else (8, 12))


def test_layers_of_ones_choice_are_laid_together():
    net = create_backbone("vit_tiny_patch16_224", pretrained=False, embed_dim=48, depth=4, out_indices=(1, 3))
    assert net.every and net.neck.norm.weight.shape == (96,) and net(torch.rand(1, 3, 32, 32))[-1].shape == (1, 96, 2, 2)


def test_what_is_frozen():
    inside = lambda net: {n for n, p in net.backbone.named_parameters() if not p.requires_grad}
    vit = made("vit_tiny_patch16_224")
    assert inside(vit) == {"net.model.cls_token", "net.model.pos_embed", "net.model.patch_embed.proj.weight", "net.model.patch_embed.proj.bias"}
    assert {n.split(".")[1] for n in inside(made("swin_tiny_patch4_window7_224"))} == {"patch_embed", "layers_0"}
    assert {n.split(".")[1] for n in inside(made("hrnet_w18_small"))} == {"conv1", "bn1", "conv2", "bn2", "layer1"}
    with pytest.raises(SpmlError, match="no part 'layer9'; supported are"): parameters_upto(timm.create_model("test_resnet", features_only=True), "layer9")


def test_the_neck_learns_as_a_head():
    model = SegNet(made("vit_tiny_patch16_224"), SoftmaxHead(8, 3))
    neck = {*model.embed.backbone.neck.parameters()}
    groups = spml_splitter(model)
    assert neck and neck <= {*groups[2], *groups[3]} and not neck & {*groups[0], *groups[1]}
    assert {*sum(groups, [])} == {p for p in model.parameters() if p.requires_grad}
    tags = TagNet(3, "test_vit", pretrained=False)
    assert {*tags.backbone.neck.parameters()} <= {*tag_splitter(tags)[2]}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "hiera_tiny_224", "mambaout_femto", "test_maxvit"])
def test_checkpointing_changes_no_number(name):
    torch.manual_seed(0)
    plain = made(name).train()
    other = made(name, checkpointing=True).train()
    other.load_state_dict(plain.state_dict())
    x, seen = torch.rand(1, 3, 64, 64), []
    for net in plain, other:
        torch.manual_seed(1) # of dropped paths
        y = net(x)
        y.square().mean().backward()
        seen.append([y, *(p.grad for p in net.parameters() if p.grad is not None)])
    for a, b in zip(*seen, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_checkpointing_of_a_transformer_keeps_less():
    def kept(net):
        held = {}
        def pack(t):
            if not isinstance(t, nn.Parameter): held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): net.train().features(torch.rand(2, 3, 128, 128))
        return sum(held.values())
    size = dict(pretrained=False, embed_dim=48, depth=8)
    assert kept(EmbedNet("vit_tiny_patch16_224", 8, checkpointing=True, **size)) < .6*kept(EmbedNet("vit_tiny_patch16_224", 8, **size))


def test_checkpointing_that_would_count_twice_or_is_not_there_is_refused():
    with pytest.raises(SpmlError, match="count each batch twice"): made("efficientvit_b0", checkpointing=True, freeze_bn=False)
    with pytest.raises(SpmlError, match="has no checkpointing"): checkpoint_blocks(create_backbone(Tokens()))


def test_batch_norm_inside_is_kept():
    net = made("test_maxvit").train()
    assert not any(m.training for m in net.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
    net(torch.rand(2, 3, 64, 64))
    assert before and all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "swin_tiny_patch4_window7_224"])
def test_bfloat16_trains_and_float32_leaves(name):
    torch.manual_seed(0)
    net, x = made(name, precision="bfloat16").train(), torch.rand(2, 3, 64, 64)
    y = net(x)
    y.square().sum().backward()
    assert y.dtype == torch.float32 and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    exact = made(name).train()
    exact.load_state_dict(net.state_dict())
    assert .98 < F.cosine_similarity(y.flatten(), exact(x).flatten(), 0) < 1


def test_a_download_that_fails_is_not_tried_again(monkeypatch):
    class Absent(FileNotFoundError, ValueError): "as huggingface_hub's own"
    tries = []
    def create(name, pretrained=False, **kw):
        tries.append(name)
        raise Absent(2, "not on the hub")
    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr("spml_kit.method.backbones.check_download", lambda name: None)
    monkeypatch.setattr("spml_kit.method.backbones.cached_weights", lambda name: None)
    with pytest.raises(SpmlError, match="cannot be downloaded"): create_backbone("test_vit")
    assert len(tries) == 1


def test_a_network_of_one_size_says_so():
    with pytest.warns(UserWarning, match="'hiera_tiny_224' takes images of 224x224 only"): net = create_backbone("hiera_tiny_224", pretrained=False, **SMALL["hiera_tiny_224"])
    with pytest.warns(UserWarning, match="takes images of 96x96 only"): other = create_backbone("hiera_tiny_224", pretrained=False, img_size=(96, 96), **SMALL["hiera_tiny_224"])
    x = torch.rand(1, 3, 96, 96)
    with torch.no_grad(): assert all(torch.equal(a, b) for a, b in zip(other.eval()(x), other.net(x)))
    assert net.only == (224, 224) and other.only == (96, 96)


def test_copies_and_states():
    net = made("vit_small_patch14_dinov2").eval()
    x = torch.rand(1, 3, 40, 50)
    other = made("vit_small_patch14_dinov2").eval()
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        for o in copy.deepcopy(net), pickle.loads(pickle.dumps(net)), other: assert torch.equal(o(x), net(x))


# networks of one's own

class Tokens(nn.Module):
    "As a backbone of transformers: maps of one stride, packed"
    def __init__(self, patch=14):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, patch, patch)
    def forward(self, x):
        if x.shape[-1] % self.patches.stride[0] and x.shape[-1] != 256: raise ValueError("no multiple")
        y = self.patches(x)
        return SimpleNamespace(feature_maps=(y, 2*y))


class Own(nn.Module):
    mean, std = (.1, .2, .3), (.4, .5, .6)
    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 16, 2, 2)
    def forward(self, x): return (y := self.fine(x)), self.coarse(y)


def test_modules_serve_as_objects_and_by_name():
    torch.manual_seed(0)
    whole = Own()
    net = EmbedNet(whole, 8).eval()
    assert isinstance(net.backbone, AdaptedNet) and net.backbone.net is whole and net.mean.flatten().tolist() == pytest.approx(Own.mean)
    assert net(torch.rand(1, 3, 64, 64)).shape == (1, 8, 16, 16) and all(p.requires_grad for p in whole.parameters())
    named = EmbedNet(f"{__name__}:Own", 8).eval()
    named.load_state_dict(net.state_dict())
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(named(x), net(x))


def test_weights_of_a_module_of_ones_own(tmp_path):
    first = Own()
    torch.save(first.state_dict(), tmp_path/"w.pth")
    assert torch.equal(create_backbone(f"{__name__}:Own", weights=str(tmp_path/"w.pth")).net.fine.weight, first.fine.weight)


def test_backbones_that_pack_their_maps():
    net = EmbedNet(Tokens(), 8).eval()
    assert isinstance(net.backbone, Pyramid) and net.backbone.strides == [16] and net.backbone.feature_info.reduction() == [4, 8, 16]
    for h, w in SIZES: assert net(torch.rand(1, 3, h, w)).shape == (1, 8, ceil(h/4), ceil(w/4))


def test_what_cannot_serve_is_refused_by_name():
    with pytest.raises(SpmlError, match="backbone 'resnet_of_nobody'"): create_backbone("resnet_of_nobody", pretrained=False)
    with pytest.raises(SpmlError, match="backbone 'naflexvit_base_patch16_gap'.*supported are"): create_backbone("naflexvit_base_patch16_gap", pretrained=False, depth=3, embed_dim=48, num_heads=3, bananas=1)
    with pytest.raises(SpmlError, match="output_stride=12 is not"): create_backbone("test_resnet", 12, pretrained=False)
    with pytest.raises(SpmlError, match="makes no maps"): Pyramid(nn.Linear(3, 3), "line")
    with pytest.raises(SpmlError, match="Conv2d is no backbone"): create_backbone(nn.Conv2d(3, 8, 3))


def test_colours():
    for name in "test_vit", "vit_small_patch14_dinov2.lvd142m", "swin_tiny_patch4_window7_224":
        cfg = timm.get_pretrained_cfg(name)
        assert [tuple(c) for c in image_norm(name, nn.Identity())] == [tuple(cfg.mean), tuple(cfg.std)]
    assert image_norm("x.y:Own", Own()) == ([.1, .2, .3], [.4, .5, .6])


# classifiers of tags

@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "hiera_tiny_224", "test_maxvit"])
def test_classifiers_of_tags_take_them(name, monkeypatch):
    small = SMALL.get(name, {})
    monkeypatch.setattr("spml_kit.method.nets.create_backbone", lambda *a, **k: create_backbone(*a, **k, **small))
    net = TagNet(4, name, pretrained=False)
    assert net(torch.rand(2, 3, 75, 101)).shape == (2, 3)
    net.train()(torch.rand(2, 3, 64, 64)).sum().backward()
    maps = class_maps(net, np.random.default_rng(0).integers(0, 255, (75, 101, 3), np.uint8), [True, True, False, True])
    assert maps.shape == (4, 75, 101) and np.isfinite(maps).all()


def test_necks_meet_the_grids():
    for stride, upto in (4, 16), (8, 32), (16, 16), (32, 32), (32, 8):
        for size in SIZES:
            maps = Neck(24, stride, upto)(torch.rand(1, 24, *(ceil(n/stride) for n in size)), size)
            assert {s: m.shape[-2:] for s, m in maps.items()} == {s: tuple(ceil(n/s) for n in size) for s in maps} and min(maps) == 4 and max(maps) == max(stride, upto)


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


def test_what_cannot_be_checkpointed():
    with pytest.raises(SpmlError, match="no sequence of blocks"): checkpoint_blocks(nn.Sequential(nn.Conv2d(3, 3, 1)))

"""Twenty backbones that one would choose today, as they are named: does each build, at which strides, does it train, does it predict, and how long does that take?

    python benchmarks/backbones.py                     # all of them: a table, benchmarks/backbones.json and backbones.md
    python benchmarks/backbones.py vit_small_patch16_224 hiera_tiny_224

Weights are random: nothing is downloaded. Images have 96 pixels a side, one thread computes. What cannot serve is told with its message.
"""
import json, os, sys, tempfile, time, warnings
from pathlib import Path

os.environ.setdefault('SPML_DEVICE', 'cpu')
import numpy as np
import timm
import torch

from measure import machine
from spml_kit.core import SpmlError
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.files import write_json
from spml_kit.infer.scores import predict_head
from spml_kit.learn.learner import spml_learner
from spml_kit.method.nets import EmbedNet
from spml_kit.method.recipes import RECIPES

NAMES = ('resnet50', 'resnet101', 'convnext_tiny', 'swin_tiny_patch4_window7_224', 'mobilenetv3_large_100', 'efficientnet_b0', 'vit_small_patch14_dinov2', 'vit_small_patch16_dinov3', 'vit_small_patch16_224',
         'eva02_small_patch14_224', 'hiera_tiny_224', 'mambaout_femto', 'regnety_008', 'convnextv2_tiny', 'swinv2_tiny_window8_256', 'mobilenetv4_conv_small', 'fastvit_t8', 'efficientvit_b0', 'hrnet_w18_small', 'maxvit_tiny_rw_224')
SIDE = 96


def seconds(f):
    start = time.perf_counter()
    return f(), round(time.perf_counter() - start, 2)


def forward(net):
    with torch.no_grad(): return net(torch.rand(1, 3, SIDE, SIDE))


def trained(name):
    "Two steps of SPML on drawn scenes, their seconds, and a prediction on an image of other sides"
    recipe = RECIPES['small'].but(embed=dict(backbone=name, pretrained=False), bs=2, crop=SIDE, scale=(1., 1.))
    dls = weak_dls(WeakSet(SceneSet(4, size=SIDE), 'scribbles'), SceneSet(2, size=SIDE, start=100), bs=2, crop=SIDE, steps=2)
    learn = spml_learner(dls, recipe=recipe, path=tempfile.mkdtemp())
    with learn.no_bar(), learn.no_logging(): _, took = seconds(lambda: learn.fit_poly(1))
    image = np.random.default_rng(0).integers(0, 255, (75, 101, 3), np.uint8)
    assert predict_head(learn.model, image).shape == image.shape[:2] and np.isfinite(learn.history[-1]['loss'])
    return took


def row(name):
    "What there is to say of one"
    try:
        net, build = seconds(lambda: EmbedNet(name, pretrained=False).eval())
        y, once = seconds(lambda: forward(net))
        _, once = seconds(lambda: forward(net)) # warm
        assert y.shape[-2:] == (SIDE//4, SIDE//4)
        frozen, every = (sum(p.numel() for p in some) for some in (net.frozen(), net.backbone.parameters()))
        return dict(strides=net.backbone.feature_info.reduction(), channels=net.backbone.feature_info.channels(), weights=every, frozen=round(100*frozen/every, 1), build=build, forward=once, train=trained(name), predicts=True)
    except SpmlError as e: return dict(refused=str(e))


def table(rows):
    "As Markdown"
    lines = ['| backbone | strides | weights, millions | frozen, % | build, s | image, s | 2 steps of 2 images, s | predicts 75x101 |', '|---|---|---|---|---|---|---|---|']
    for name, r in rows.items():
        if 'refused' in r: lines.append(f"| {name} | {r['refused']} | | | | | | no |")
        else: lines.append(f"| {name} | {', '.join(map(str, r['strides']))} | {r['weights']/1e6:.1f} | {r['frozen']} | {r['build']} | {r['forward']} | {r['train']} | yes |")
    return '\n'.join(lines)


def main(names):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    rows = {}
    for name in names or NAMES:
        rows[name] = row(name)
        print(name, json.dumps(rows[name]), flush=True)
    text = table(rows)
    print(text)
    if names: return
    here = Path(__file__).parent
    write_json(here/'backbones.json', dict(machine=machine(), timm=timm.__version__, side=SIDE, rows=rows))
    (here/'backbones.md').write_text(f"# Backbones\n\nMade by `benchmarks/backbones.py`: random weights, images of {SIDE} pixels a side, one thread, timm {timm.__version__}.\n\n{text}\n")


if __name__ == '__main__': main(sys.argv[1:])

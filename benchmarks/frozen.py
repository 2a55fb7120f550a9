"""What a cache of features saves: seconds of the processor for training steps with the whole network, with a frozen backbone that looks at every image again, and from cached features.

    python benchmarks/frozen.py                # EfficientNet-Lite0 and a DINOv2-sized transformer, 192 pixels: a table and benchmarks/frozen.json
    python benchmarks/frozen.py --steps 300    # measure all 300 steps, where else some are measured and 300 are reckoned

One thread, 8 images a step, the SPML loss of scribbles with 32 regions an image. The transformer has random weights, since only time is asked for.
"""
import argparse, json, os, tempfile, time, warnings
from pathlib import Path

os.environ.setdefault('SPML_DEVICE', 'cpu')
import torch

from measure import machine
from spml_kit.core import seed_everything
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.files import write_json
from spml_kit.learn.frozen import FeatureCache, with_features
from spml_kit.learn.learner import create_model, spml_learner
from spml_kit.method.recipes import RECIPES

NETS = {'tf_efficientnet_lite0': {}, 'vit_small_patch14_dinov2': dict(pretrained=False)}
SIZE, IMAGES, BS = 192, 16, 8


def per_step(way, name, steps, weak, valid):
    "Processor seconds a step after a warm-up, and those of filling the cache, an image"
    embed = dict(backbone=name, **NETS[name])
    recipe = RECIPES['small'].but(embed=embed, network='EmbedNet' if way == 'whole' else 'FrozenNet', crop=SIZE, scale=(1., 1.), bs=BS)
    dls, filled = weak_dls(weak, valid, bs=BS, crop=SIZE, steps=steps + 2, scale=(1., 1.)), 0.
    if way == 'cached':
        seed_everything(0)
        cache, start = FeatureCache(Path(tempfile.mkdtemp())/'features', create_model(recipe, dls.c).embed, name), time.process_time()
        cache.fill(weak.images, progress=False)
        filled = time.process_time() - start
        dls = with_features(dls, cache)
    learn, times = spml_learner(dls, recipe=recipe, path=tempfile.mkdtemp()), []
    learn.model.train()
    for batch in dls.train:
        start = time.process_time()
        learn.loss_func.images = batch[0]
        learn.loss_func.train()
        loss = learn.loss_func(learn.model(batch[0]), *batch[1:])
        loss.backward()
        for p in learn.model.parameters(): p.grad = None
        learn.loss_func.after_step()
        times.append(time.process_time() - start)
    return sum(times[2:])/steps, filled/IMAGES


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--steps', type=int, default=6)
    parser.add_argument('--nets', nargs='*', default=[*NETS])
    steps, nets = (a := parser.parse_args()).steps, a.nets
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    weak, valid, rows = WeakSet(SceneSet(IMAGES, size=SIZE), 'scribbles', regions=32), SceneSet(1, size=SIZE, start=1000), []
    for i in range(IMAGES): weak.sample(i) # drawn before the clock runs
    for name in nets:
        for way in ('whole', 'frozen', 'cached'):
            step, fill = per_step(way, name, steps, weak, valid)
            rows.append(dict(net=name, way=way, step=round(step, 3), steps_300=round(300*step, 1), fill_per_image=round(fill, 3)))
            print(json.dumps(rows[-1]), flush=True)
    write_json(Path(__file__).with_suffix('.json'), dict(machine=machine(), size=SIZE, bs=BS, measured_steps=steps, rows=rows))


if __name__ == '__main__': main()

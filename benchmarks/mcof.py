"""One round of mining common object features on one core: features of all regions, the classifier of regions, the labels of all images.

    python benchmarks/mcof.py --n 400 --size 128

Scenes are drawn and cut into regions before the clock starts; seeds are blurred masks, which set the task. The features count for the first round only: they are kept for the others.
"""
import argparse, os, time
os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = '1'

import numpy as np
import torch

from spml_kit.cams.background import PowerBackground, geodesic_saliency, simulate_maps
from spml_kit.cams.classifier import TagNet
from spml_kit.cams.labels import SeedRule, seed_labels
from spml_kit.data.scenes import SCENE_CLASSES, make_scene
from spml_kit.neighbours.mcof import bayes_refine, mine_regions, region_features, region_seed_labels, train_region_net
from spml_kit.regions.oversegment import oversegment

def main():
    "Print wall and processor seconds of each part"
    said = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    said.add_argument('--n', type=int, default=400, help='images')
    said.add_argument('--size', type=int, default=128, help='pixels a side')
    said.add_argument('--regions', type=int, default=100, help='regions an image, at most')
    o = said.parse_args()
    torch.set_num_threads(1)
    scenes, c = [make_scene(i, size=o.size) for i in range(o.n)], len(SCENE_CLASSES)
    regions = [oversegment(s.image, n=o.regions) for s in scenes]
    maps = (simulate_maps(s.mask, c) for s in scenes)
    seeds = [seed_labels(m, s.tags, PowerBackground(1.)(s.image, m, r), SeedRule(share=.6)) for m, s, r in zip(maps, scenes, regions)]
    net, clocks = TagNet(c), []
    def clock(name, f):
        wall, cpu = time.perf_counter(), time.process_time()
        out = f()
        clocks.append((time.perf_counter() - wall, time.process_time() - cpu))
        print(f'{name:<28}{clocks[-1][0]:8.1f}{clocks[-1][1]:8.1f}', flush=True)
        return out
    print(f"{o.n} images of {o.size}x{o.size}, {sum(int(r.max()) + 1 for r in regions)} regions\n{'':<28}{'wall s':>8}{'cpu s':>8}")
    features = clock('features', lambda: [region_features(net, s.image, r) for s, r in zip(scenes, regions)])
    labels = clock('seeds of regions', lambda: np.concatenate([region_seed_labels(s, r, c) for s, r in zip(seeds, regions)]))
    areas = np.concatenate([np.bincount(r.ravel()) for r in regions])
    learned = clock('classifier of regions', lambda: train_region_net(torch.cat(features), torch.as_tensor(labels), torch.as_tensor(areas), c))
    mined = clock('mined labels', lambda: [mine_regions(learned(f).detach(), r, s.tags) for f, r, s in zip(features, regions, scenes)])
    clock('refined, as if all had 1 tag', lambda: [bayes_refine(s.image, (m > 0) & (m < c), geodesic_saliency(s.image, r)) for s, m, r in zip(scenes, mined, regions)])
    print(f"{'together':<28}{sum(w for w, _ in clocks):8.1f}{sum(p for _, p in clocks):8.1f}")

if __name__ == '__main__': main()

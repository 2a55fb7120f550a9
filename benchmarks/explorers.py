"""How fast the explorers react: milliseconds from the change of a control to the packed pictures, at two sizes of image.

    python benchmarks/explorers.py                  # benchmarks/explorers.json

Median and worst of several changes, on one thread. Processor time is told beside the wall time that the explorer itself records (`took`), since it depends little on what else the machine does. What a new
image needs, a pass of the network, is not a reaction and is listed apart.
"""
import os
os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = os.environ['OPENBLAS_NUM_THREADS'] = '1'
import argparse, datetime, platform, tempfile, time, warnings
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated') # said by torch when fastai is imported

import numpy as np
import torch

from spml_kit.all import *
from spml_kit.look.explore import explore_relations
from spml_kit.look.embedding import SnapshotCB, explore_embedding
from spml_kit.look.nearness import explore_retrieval
from spml_kit.look.thresholds import explore_background, explore_regions

LIMIT = {128: 150, 320: 300} # milliseconds


def changes(ex, n, **values):
    "Wall and processor milliseconds of each reaction to a control or trait that takes n values"
    for name, value in values.items():
        wall, cpu, target = [], [], ex if ex.has_trait(name) else getattr(ex, name)
        for k in range(n):
            start = time.process_time()
            setattr(target, name if target is ex else 'value', value(k))
            cpu.append(1000*(time.process_time() - start)); wall.append(ex.took)
        yield name, wall, cpu


def explorers(size, folder):
    "Each explorer, and what is changed in it"
    scenes, held_out = SceneSet(8, seed=3, size=size), SceneSet(3, seed=3, size=size, start=1000)
    weak = WeakSet(scenes, 'scribbles', regions=32)
    learn = spml_learner(weak_dls(weak, held_out, bs=4, crop=size, steps=2), path=folder)
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(1, cbs=SnapshotCB(f'{folder}/snapshots'))
    masks = [scenes.mask(i) for i in range(len(scenes))]
    at = lambda k: ((37*k + 11) % size, (23*k + 40) % size)
    yield explore_relations(learn, weak), dict(point=lambda k: (k % 4, *at(k)), kappa=lambda k: 5. + k, iterations=lambda k: 5 + k, clusters=lambda k: 4 + k, regions=lambda k: 20 + k, annotation=lambda k: ('points', 'scribbles')[k % 2])
    maps = lambda s: np.stack([np.full(s.labels.shape, .1*t, np.float32)*np.linspace(0, 1, size, dtype=np.float32) for t in s.tags])
    yield explore_background(WeakSet(scenes, 'tags'), maps, scenes), dict(point=at, alpha=lambda k: 2. + k, threshold=lambda k: .1 + .05*k, normalise=lambda k: NORMALISE[k % 2])
    yield explore_regions(scenes, learn), dict(point=at, number=lambda k: 20 + 5*k, iteration=lambda k: 1 + k, clusters=lambda k: 4 + k)
    yield explore_retrieval(learn, weak, held_out, masks), dict(point=at, k=lambda k: 5 + k, chosen=lambda k: 10*k, only_class=lambda k: ('background', 'all')[k % 2])
    yield explore_embedding(learn, weak, f'{folder}/snapshots'), dict(point=lambda k: (k % 4, *at(k)), step=lambda k: (0, 'now')[k % 2])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--n', type=int, default=8, help='changes of each control')
    p.add_argument('--out', default='benchmarks/explorers.json')
    args = p.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size, limit in LIMIT.items():
        with tempfile.TemporaryDirectory() as folder:
            for ex, values in explorers(size, folder):
                for name, wall, cpu in changes(ex, args.n, **values):
                    rows.append(dict(explorer=type(ex).__name__, size=size, change=name, median_ms=round(float(np.median(wall)), 1), worst_ms=round(max(wall), 1), cpu_ms=round(float(np.median(cpu)), 1), worst_cpu_ms=round(max(cpu), 1), limit_ms=limit))
                    print(*(f'{v:>12}' for v in rows[-1].values()), flush=True)
    write_json(args.out, dict(when=datetime.date.today().isoformat(), machine=platform.processor() or platform.machine(), threads=1, load=os.getloadavg()[0], rows=rows))


if __name__ == '__main__': main()

"""Prediction in batches against one image at a time: images a second and peak memory of the network, the segments
and the training index, and how far the results differ.

    python benchmarks/predict.py                    # scenes, benchmarks/predict.json
    python benchmarks/predict.py --images photos    # a folder of photographs, resized to a longer side of --side pixels
    python benchmarks/predict.py --device cuda      # predict_cuda.json

The network is the small recipe's, untrained but for its backbone. Each part takes the median of runs that take turns;
processor seconds stand beside wall seconds, which others on the machine lengthen.
"""
import argparse, os, sys, time
os.environ.setdefault('OMP_NUM_THREADS', '1')
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from measure import clock, machine, peak
from spml_kit.core import SpmlError, seed_everything
from spml_kit.data.images import SceneSet
from spml_kit.files import write_json
from spml_kit.learn.learner import create_model
from spml_kit.infer.scores import stream_segments, training_index
from spml_kit.infer.views import stream_views
from spml_kit.method.recipes import RECIPES

CLASSES = 21


def photographs(folder, n, side):
    "n photographs spread over a folder"
    paths = sorted(p for p in folder.glob('*') if p.suffix.lower() in ('.jpg', '.jpeg', '.png'))
    if not paths: sys.exit(f"{folder}: no photographs (jpg, png) there; leave --images out for scenes")
    for p in paths[::max(1, len(paths)//n)][:n]:
        image = Image.open(p).convert('RGB')
        yield np.array(image.resize([max(1, round(x*side/max(image.size))) for x in image.size], Image.BILINEAR))


def parts(model, images):
    "Name to function of the batch size"
    labels = [np.random.default_rng(i).integers(0, CLASSES, x.shape[:2], np.uint8) for i, x in enumerate(images)]
    seen = lambda bs: (v for [(v, _)] in stream_views(model, images, head=False, bs=bs))
    held = list(seen(1))
    def drain(stream):
        for _ in stream: pass
    return {'network': lambda bs: drain(seen(bs)), 'segments': lambda bs: drain(stream_segments(held, bs=bs)),
            'index': lambda bs: training_index(model, images, labels, CLASSES, bs=bs)}


def timed(job, sizes, repeats, device):
    "Batch size to median wall seconds and processor seconds"
    took = {bs: [] for bs in sizes}
    for bs in sizes: job(bs)
    for _ in range(repeats):
        for bs in sizes: # in turns
            cpu = time.process_time()
            wall, _ = clock(lambda: job(bs), device)
            took[bs].append((wall, time.process_time() - cpu))
    return {bs: [median(o) for o in zip(*t)] for bs, t in took.items()}


def differ(a, b):
    "Greatest difference of the prototypes of two indices; None if they have not the same segments"
    return float((a.mu - b.mu).abs().max()) if len(a) == len(b) and torch.equal(a.image, b.image) else None


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=Path, help='folder of photographs; default: drawn scenes of 144x192 and 192x144')
    p.add_argument('--n', type=int, default=32, help='images')
    p.add_argument('--side', type=int, default=192, help='longer side, pixels')
    p.add_argument('--bs', type=int, nargs='+', default=[8], help='batch sizes, beside 1')
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--out', type=Path, help='default: benchmarks/predict.json; predict_cuda.json on a GPU')
    args = p.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available(): sys.exit('--device cuda: torch sees no GPU here')
    torch.set_num_threads(1)
    before, short = machine(args.device), args.side*3//4
    scenes = SceneSet(args.n, size=args.side)
    if args.images: images = list(photographs(args.images, args.n, args.side))
    else: images = [x[:short] if i % 3 else x[:, :short] for i, x in enumerate(map(scenes.image, range(args.n)))]
    seed_everything(0)
    model = create_model(RECIPES['small'], CLASSES).to(args.device).eval()
    rows, jobs, sizes = [], parts(model, images), list(dict.fromkeys([1, *args.bs]))
    for name, job in jobs.items():
        took = timed(job, sizes, args.repeats, args.device)
        for bs in sizes:
            wall, cpu = took[bs]
            rows.append(dict(part=name, bs=bs, images_per_second=len(images)/wall, cpu_ms=1e3*cpu/len(images),
                faster=took[1][0]/wall, faster_cpu=took[1][1]/cpu, mib=peak(lambda: job(bs), args.device)))
            print("{part:<9} bs {bs:>3}: {images_per_second:6.2f} images a second, {cpu_ms:.0f} ms of processor an image, "
                  "{faster:.2f} times as fast as one by one (by processor time {faster_cpu:.2f}), {mib:.0f} MiB".format(**rows[-1]), flush=True)
    off = {bs: differ(jobs['index'](1), jobs['index'](bs)) for bs in sizes[1:]}
    out = args.out or Path(__file__).parent/('predict.json' if args.device == 'cpu' else f'predict_{args.device}.json')
    more = dict(images='photographs' if args.images else 'scenes', n=len(images), side=args.side, repeats=args.repeats)
    more['load_after'] = [round(x, 1) for x in os.getloadavg()]
    write_json(out, dict(rows=rows, prototypes_differ=off, conditions=before | more))


if __name__ == '__main__':
    try: main()
    except SpmlError as e: sys.exit(str(e))

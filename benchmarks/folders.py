"""Does a folder of one's own cost in proportion to its images? Listing, check and regions of doubling numbers of small photographs with strokes, in seconds and peak memory.

    python benchmarks/folders.py                  # 1250, 2500, 5000 images; a table and benchmarks/folders.json

Each number runs in a process of its own. An exponent of 1 is linear; what is kept in memory by intent (images and labels that were read) is part of the peak.
"""
import argparse, json, tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from growth import exponent
from measure import child, clock, machine, peak
from spml_kit.data.weak import WeakSet, check_weak_set
from spml_kit.data.images import folder_sets
from spml_kit.files import write_index_png, write_json
from spml_kit.regions.oversegment import prepare_regions
from spml_kit.data.scenes import make_scene


def folder(root, n):
    "So many images of 96 x 72 pixels with a stroke of each of two classes; 50 pictures in turn"
    for name in ('images', 'labels'): (root/name).mkdir()
    (root/'classes.txt').write_text('background\nobject\n')
    pictures = [make_scene(i, size=(72, 96)).image for i in range(50)]
    labels = np.full((72, 96), 254, np.uint8)
    labels[5:8, 10:80], labels[40:43, 30:60] = 0, 1
    for i in range(n):
        Image.fromarray(pictures[i % 50]).save(root/'images'/f'{i:05d}.jpg', quality=85)
        write_index_png(root/'labels'/f'{i:05d}.png', labels, np.zeros((256, 3), np.uint8))


def point(n):
    with tempfile.TemporaryDirectory() as d:
        folder(root := Path(d), n)
        row, made = dict(images=n), {}

        def step(name, f):
            def run(): made[name] = f()
            def timed(): row[f'{name}_seconds'] = clock(run)[0]
            row[f'{name}_mib'] = peak(timed)

        step('list', lambda: folder_sets(root)[0])
        step('check', lambda: check_weak_set(WeakSet(made['list'], root/'labels')))
        step('regions', lambda: prepare_regions(made['list'], root/'regions', n=30, progress=False))
    return row


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, nargs='+', default=[1250, 2500, 5000])
    p.add_argument('--out', type=Path, default=Path(__file__).with_name('folders.json'))
    p.add_argument('--point', type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.point: return print(json.dumps(point(args.point)))
    rows = []
    for n in args.images:
        rows.append(r := child(__file__, '--point', str(n)))
        print(f"{n:>6} images  " + '  '.join(f"{k}: {r[f'{k}_seconds']:.2f} s, {r[f'{k}_mib']:.0f} MiB" for k in ('list', 'check', 'regions')), flush=True)
    grows = {k: exponent(args.images, [r[f'{k}_seconds'] for r in rows]) for k in ('list', 'check', 'regions')}
    print('time ~ images^' + ', '.join(f'{e:.2f} ({k})' for k, e in grows.items()))
    write_json(args.out, dict(rows=rows, exponents=grows, machine=machine()))


if __name__ == '__main__': main()

"""Photographs of 12 megapixels, drawn on with the annotator's files and trained end to end: does every mark arrive, and how long does each part take?

    python benchmarks/large_photographs.py [--images 6] [--size 160] [--out FOLDER]

Scenes stand in for photographs, enlarged to 4000x3000 and saved as JPEG. The training is a few steps: its time says nothing of a real one."""
import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

from spml_kit.core import UNLABELLED
from spml_kit.files import read_json, read_index_png
from spml_kit.data.images import SceneSet, folder_sets
from spml_kit.data.simulate import simulate_scribbles
from spml_kit.data.weak import WeakSet, check_weak_set
from spml_kit.look.drawings import Mark, drawn_labels, to_annotations, write_drawing
from spml_kit.runs.cli import spml_run

H, W = 3000, 4000


def project(root, n, brush=3):
    "Pictures, and on all but two of them what a person would draw: strokes, a dot for each"
    scenes = SceneSet(n, size=128)
    (root/'images').mkdir(parents=True)
    (root/'classes.txt').write_text('\n'.join(scenes.classes.names))
    for i, name in enumerate(scenes.names):
        Image.fromarray(scenes.image(i)).resize((W, H), Image.Resampling.BICUBIC).save(root/'images'/f'{name}.jpg', quality=92)
        if i >= n - 2: continue
        said = simulate_scribbles(scenes.mask(i), key=i)
        scale = np.array([W, H])/128
        marks = [Mark('scribbles', int(c), s*scale) for s, c in zip(said.strokes, said.classes)] + [Mark('points', int(said.classes[0]), [said.strokes[0][0]*scale])]
        drawing = to_annotations(marks, brush)
        write_drawing(root, name, drawing, drawn_labels(drawing, (H, W)), scenes.classes.palette)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--images', type=int, default=6); p.add_argument('--size', type=int, default=160); p.add_argument('--out', type=Path)
    args = p.parse_args()
    root, at = Path(tempfile.mkdtemp())/'project', perf_counter()

    def told(what):
        nonlocal at
        print(f'{what:<60} {perf_counter() - at:7.1f} s', flush=True)
        at = perf_counter()
    project(root, args.images)
    told(f'{args.images} pictures of {W}x{H} made and drawn on')
    train, _ = folder_sets(root, args.size)
    for i in range(len(train)): train.image(i)
    told(f'{len(train)} of them read and reduced to {args.size}')
    weak = WeakSet(train, root/'labels')
    samples = [weak.sample(i) for i in range(len(weak))]
    told('their labels drawn at that size')
    for s, name in zip(samples, train.names):
        full = read_index_png(root/'labels'/f'{name}.png')
        kept = {int(c): (int((full == c).sum()), int((s.labels == c).sum())) for c in np.unique(full[full < UNLABELLED])}
        assert all(n for _, n in kept.values()), f'{name}: {kept}'
        print(f'  {name}: pixels drawn, pixels in training', kept)
    check_weak_set(weak)
    at = perf_counter()
    out = args.out or root.parent/'run'
    assert spml_run(['scribbles', '--data', 'folder', '--root', str(root), '--profile', 'tiny', '-p', 'size', str(args.size), '--out', str(out)]) == 0
    told('spml_run, a few steps')
    sizes = {Image.open(f).size for f in (out/'training_masks').iterdir()}
    assert sizes == {(W, H)} and len([*(out/'training_masks').iterdir()]) == len(train), sizes
    print(f"{len(train)} masks of {W}x{H} in {out/'training_masks'}; {len(read_json(out/'metrics.json')['conditions'])} conditions noted")


if __name__ == '__main__': main()

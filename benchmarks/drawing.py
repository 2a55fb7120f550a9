"""How good label maps become as one draws: IoU against the number of strokes, for the segmenter that learns while one draws and for random forests, on photographs with the same simulated strokes.

    SPML_DATA=... python benchmarks/drawing.py             # 40 photographs of voc_animals: a table, benchmarks/drawing.json and drawing.png
    python benchmarks/drawing.py --images 10               # the first of the same list
    python benchmarks/drawing.py --resume                  # go on with what the file has, to the same numbers

Strokes: the first is one of each class of the photograph, background included, through its largest piece, half as long as the piece allows, 3 pixels wide. Each further one goes through the largest piece that is wrong when every pixel takes the class of the nearest stroke: all methods get the same strokes, and none of them decides where they lie. True masks place the strokes and judge; nothing learns from them.

Methods: `filters` is what scikit-image's trainable segmentation does, a random forest on `multiscale_basic_features` (sigma 1..16); `features` is the same forest on the frozen backbone's features at every pixel; `segmenter` is `LiveSegmenter` of one photograph alone; `segmenter, with earlier` has seen the photographs before it with all their strokes. IoU is the mean over the classes of a photograph, void left out, then the mean over photographs.
"""
import argparse, os, time, warnings
from pathlib import Path

os.environ.setdefault('SPML_DEVICE', 'cpu')
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage as ndi
from skimage.feature import multiscale_basic_features
from skimage.measure import label
from sklearn.ensemble import RandomForestClassifier

from measure import machine
from spml_kit.core import UNLABELLED, VOID, data_root, rng_of
from spml_kit.data.images import VocSet
from spml_kit.data.simulate import simulate_scribbles
from spml_kit.files import read_json, write_json
from spml_kit.infer.interactive import LiveSegmenter
from spml_kit.method.nets import FrozenNet, image_tensor

COUNTS = 1, 2, 3, 5 # strokes after which is judged; the first is one of each class
METHODS = 'filters', 'features', 'segmenter', 'segmenter, with earlier'
STEPS = 10 # of the embedding at each update; a count, so that the numbers do not depend on the machine


def largest(piece):
    "The largest connected part, and its area"
    parts = label(piece, connectivity=1)
    area = np.bincount(parts.ravel())
    area[0] = 0
    return parts == area.argmax(), int(area.max())


def draw(labels, part, c, name, k):
    "Labels with one more stroke"
    made = simulate_scribbles(np.where(part, np.uint8(c), np.uint8(VOID)), length=.5, width=3, seed=k, key=name).to_labels(part.shape)
    return np.where((made == c) & part, np.uint8(c), labels)


def strokes(mask, name, n):
    "Label maps after 1..n strokes"
    classes, labels, out = [c for c in np.unique(mask) if c != VOID], np.full(mask.shape, UNLABELLED, np.uint8), []
    for c in classes: labels = draw(labels, largest(mask == c)[0], c, name, 0)
    for k in range(1, n + 1):
        out.append(labels)
        nearest = labels[tuple(ndi.distance_transform_edt(labels == UNLABELLED, return_indices=True)[1])]
        area, c, part = max(((a, c, p) for c in classes for p, a in [largest((mask == c) & (nearest != c))]), key=lambda o: o[0])
        if area: labels = draw(labels, part, c, name, k)
    return out


def iou(predicted, mask):
    "Mean over the classes of a photograph"
    known = mask != VOID
    shares = [((predicted == c) & (mask == c)).sum()/(((predicted == c) | (mask == c)) & known).sum() for c in np.unique(mask[known])]
    return float(np.mean(shares))


def forest(rows, labels):
    "scikit-image's example has max_samples=.05, for thousands of drawn pixels; a few hundred are all used"
    drawn = labels.ravel() < UNLABELLED
    model = RandomForestClassifier(50, max_depth=10, n_jobs=1, random_state=0).fit(rows[drawn], labels.ravel()[drawn])
    return model.predict(rows).reshape(labels.shape)


def rows_of(image, net):
    "Filters and frozen features of every pixel"
    filters = multiscale_basic_features(image, channel_axis=-1, sigma_min=1, sigma_max=16)
    maps = [F.interpolate(m.float(), image.shape[:2], mode='bilinear', align_corners=False)[0] for m in net.fixed(image_tensor(image))]
    return dict(filters=filters.reshape(-1, filters.shape[-1]), features=torch.cat(maps).flatten(1).T.numpy())


def judge(images, i, net, shared):
    "IoU of each method after each count of strokes; seconds of an update and of an opinion"
    image, mask = images.image(i), images.mask(i)
    maps, rows, alone = strokes(mask, images.names[i], max(COUNTS)), rows_of(image, net), LiveSegmenter(images, net=net, share=False)
    alone._known, scores, seconds = shared._known, {m: [] for m in METHODS}, []
    shared.described(i)
    for n in COUNTS:
        labels = maps[n - 1]
        for kind in ('filters', 'features'): scores[kind].append(iou(forest(rows[kind], labels), mask))
        for method, segmenter in (('segmenter', alone), ('segmenter, with earlier', shared)):
            start = time.process_time()
            segmenter.update(i, labels, steps=STEPS)
            middle = time.process_time()
            scores[method].append(iou(segmenter.predict(i).labels, mask))
            seconds.append((middle - start, time.process_time() - middle))
    shared.consolidate()
    return dict(name=images.names[i], strokes=[int((m < UNLABELLED).sum()) for m in (maps[n - 1] for n in COUNTS)], iou=scores, seconds=np.mean(seconds, 0).tolist())


def learn(images, i, shared):
    "What a photograph that was judged earlier leaves in `segmenter, with earlier`"
    maps = strokes(images.mask(i), images.names[i], max(COUNTS))
    for n in COUNTS: shared.update(i, maps[n - 1], steps=STEPS)
    shared.consolidate()


def known(out, conditions, names):
    "Rows of a file that a run of the same conditions left"
    said = read_json(out)
    other = [k for k, v in conditions.items() if k not in ('date', 'load') and said['conditions'].get(k) != v]
    rows = said['rows'][:len(names)]
    if other or [r['name'] for r in rows] != names[:len(rows)]: raise SystemExit(f"{out}: made under other conditions ({', '.join(other) or 'other photographs'}); leave --resume away")
    return rows


def show(rows, out, conditions):
    "Table, JSON and figure"
    mean = {m: np.mean([r['iou'][m] for r in rows], 0) for m in METHODS}
    error = {m: np.std([r['iou'][m] for r in rows], 0, ddof=1)/len(rows)**.5 if len(rows) > 1 else 0*mean[m] for m in METHODS}
    best = np.maximum(mean['filters'], mean['features'])
    write_json(out, dict(conditions=conditions | dict(images=len(rows)), counts=COUNTS, mean={m: v.round(4).tolist() for m, v in mean.items()},
                         standard_error={m: v.round(4).tolist() for m, v in error.items()}, above_the_better_forest=(mean['segmenter'] - best).round(4).tolist(),
                         seconds=dict(zip(('update', 'opinion'), np.mean([r['seconds'] for r in rows], 0).round(3).tolist())), rows=rows))
    fig, ax = plt.subplots(figsize=(5.2, 3.6))
    for (m, v), style in zip(mean.items(), ('s:', 'd:', 'o-', '^--')): ax.errorbar(COUNTS, 100*v, 100*error[m], fmt=style, capsize=2, label=m)
    ax.set_xlabel('strokes (the first: one of each class)'); ax.set_ylabel('mean IoU, %'); ax.set_xticks(COUNTS); ax.grid(alpha=.3)
    ax.set_title(f'{len(rows)} photographs, the same strokes for all', fontsize='medium'); ax.legend(fontsize='small')
    fig.tight_layout(); fig.savefig(out.with_suffix('.png'), dpi=80); plt.close(fig)
    return mean


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=40)
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.json'))
    p.add_argument('--resume', action='store_true', help="keep the photographs that --out has already")
    args = p.parse_args()
    root = data_root('voc_animals', 'VOC2012')
    if root is None: return print("skipped: no photographs; SPML_DATA is to name a folder with voc_animals/VOC2012 in it")
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    images, net = VocSet(root, 'train'), FrozenNet().eval()
    which = rng_of(0, 'drawing').permutation(len(images))[:args.images]
    shared, conditions = LiveSegmenter(images, net=net), machine() | dict(split='train', steps=STEPS, backbone='tf_efficientnet_lite0', forest='50 trees, depth 10', length=.5, width=3)
    rows = known(args.out, conditions, [images.names[i] for i in which]) if args.resume and args.out.exists() else []
    for i in which[:len(rows)]: learn(images, int(i), shared)
    for i in which[len(rows):]:
        rows.append(judge(images, int(i), net, shared))
        mean = show(rows, args.out, conditions) # a run that is cut short leaves what it has
        print(f"{len(rows):>3} {rows[-1]['name']}", {m: (100*v).round(1).tolist() for m, v in mean.items()}, flush=True)
    mean = show(rows, args.out, conditions)
    print('\n'.join([f"{'strokes':<26}" + ''.join(f'{n:>7}' for n in COUNTS), *(f'{m:<26}' + ''.join(f'{100*s:7.1f}' for s in v) for m, v in mean.items())]))


if __name__ == '__main__': main()

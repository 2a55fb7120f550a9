"""Dense CRF of the kit against pydensecrf2, on photographs in one run: agreement and time on one thread.

    pip install pydensecrf2        # needs a compiler; the kit itself does not use it
    python benchmarks/crf.py --root VOC2012

Scores are masks with smooth noise, blurred: they set the task, nothing is trained or scored with the masks. Two settings: 7 classes with scores everywhere; 21 classes of which only those
in the image have scores, as after the random walk. Building the kernels counts for both.
"""
import argparse, os, sys, time
os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = '1'
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from measure import machine
from spml_kit.core import SpmlError, VOC_CLASSES, VOID, rng_of
from spml_kit.files import read_index_png, write_json
from spml_kit.pictures import read_image
from spml_kit.infer.crf import KERNELS, dense_crf

def noisy_scores(labels, n_classes, key):
    "Softmax of blurred masks with smooth noise; classes that the labels lack are noise alone"
    rng = rng_of(0, 'crf benchmark', key)
    maps = np.stack([gaussian_filter((labels == c) + rng.normal(0, 10, labels.shape), 6) for c in range(n_classes)])
    return torch.tensor(6*maps).softmax(0).float().numpy()

def tasks(root, n):
    "Name, image, and scores by setting, of n photographs spread over the validation list"
    names = (root/'ImageSets/Segmentation/val.txt').read_text().split()
    for name in names[::max(len(names)//n, 1)][:n]:
        mask = read_index_png(root/'SegmentationClass'/f'{name}.png')
        present = [0] + [int(c) for c in np.unique(mask) if 0 < c < VOID]
        labels = np.zeros(mask.shape, int)
        for i,c in enumerate(present): labels[mask == c] = i
        sparse = np.zeros((len(VOC_CLASSES), *mask.shape), np.float32)
        sparse[present] = noisy_scores(labels, len(present), name)
        yield name, read_image(root/'JPEGImages'/f'{name}.jpg'), {'7 classes': noisy_scores(labels, 7, name), '21 classes, absent ones 0': sparse}

def reference(image, scores, iterations=10):
    "The same field by pydensecrf2"
    import pydensecrf.densecrf as dcrf
    from pydensecrf.utils import unary_from_softmax
    (C, H, W), (smooth, look) = scores.shape, KERNELS
    field = dcrf.DenseCRF2D(W, H, C)
    field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(scores)))
    field.addPairwiseGaussian(sxy=smooth.sxy, compat=smooth.weight)
    field.addPairwiseBilateral(sxy=look.sxy, srgb=look.srgb, rgbim=np.ascontiguousarray(image), compat=look.weight)
    return np.array(field.inference(iterations)).reshape(scores.shape)

def clock(f, repeats):
    "Median of wall and of processor milliseconds, and the last result"
    wall, cpu = [], []
    for _ in range(repeats):
        w, c = time.perf_counter(), time.process_time()
        out = f()
        wall.append(1e3*(time.perf_counter() - w)); cpu.append(1e3*(time.process_time() - c))
    return np.median(wall), np.median(cpu), out

def measure(root, n, repeats):
    rows = []
    for i,(name, image, settings) in enumerate(tasks(root, n)):
        for setting,scores in settings.items():
            if i == 0: reference(image, scores); dense_crf(image, scores)
            wall, cpu, a = clock(lambda: dense_crf(image, scores).numpy(), repeats)
            ref_wall, ref_cpu, b = clock(lambda: reference(image, scores), repeats)
            same = a.argmax(0) == b.argmax(0)
            rows.append(dict(setting=setting, image=name, size=list(image.shape[:2]), agreement=float(same.mean()), changed=float((a.argmax(0) != scores.argmax(0)).mean()),
                mean_difference=float(np.abs(a - b).mean()), wall_ms=wall, cpu_ms=cpu, reference_wall_ms=ref_wall, reference_cpu_ms=ref_cpu))
    return rows

def summary(rows):
    "One line a setting: medians over the photographs"
    out = []
    for setting in dict.fromkeys(r['setting'] for r in rows):
        mine = [r for r in rows if r['setting'] == setting]
        median = lambda f: float(np.median([f(r) for r in mine]))
        out.append(dict(setting=setting, photographs=len(mine), agreement_mean=float(np.mean([r['agreement'] for r in mine])), agreement_least=min(r['agreement'] for r in mine),
            changed_by_field=float(np.mean([r['changed'] for r in mine])), wall_ms=median(lambda r: r['wall_ms']), reference_wall_ms=median(lambda r: r['reference_wall_ms']),
            cpu_ms=median(lambda r: r['cpu_ms']), reference_cpu_ms=median(lambda r: r['reference_cpu_ms']), wall_ratio=median(lambda r: r['wall_ms']/r['reference_wall_ms']),
            cpu_ratio=median(lambda r: r['cpu_ms']/r['reference_cpu_ms'])))
    return out

def main():
    ap = argparse.ArgumentParser(description='Dense CRF: agreement with pydensecrf2, and time of both on one thread')
    ap.add_argument('--root', type=Path, required=True, help='VOC2012 folder: ImageSets, JPEGImages, SegmentationClass')
    ap.add_argument('--n', type=int, default=20, help='photographs')
    ap.add_argument('--repeats', type=int, default=3, help='runs of each, of which the median counts')
    ap.add_argument('--out', type=Path, default=Path(__file__).parent/'crf.json')
    args = ap.parse_args()
    if not (args.root/'ImageSets/Segmentation/val.txt').exists(): sys.exit(f"{args.root}: no ImageSets/Segmentation/val.txt there; --root takes the VOC2012 folder")
    try: ref_version = version('pydensecrf2')
    except ImportError: sys.exit("pydensecrf2 is not installed: pip install pydensecrf2 (it needs a compiler)")
    torch.set_num_threads(1)
    load = [round(x, 1) for x in os.getloadavg()]
    rows = measure(args.root, args.n, args.repeats)
    table = summary(rows)
    print(f"{'setting':28}{'changed by field':>18}{'agreement: mean':>17}{'least':>9}{'kit ms':>9}{'pydensecrf2 ms':>16}{'ratio':>7}{'ratio of cpu time':>19}")
    for t in table: print(f"{t['setting']:28}{100*t['changed_by_field']:16.1f} %{100*t['agreement_mean']:15.3f} %{100*t['agreement_least']:7.2f} %{t['wall_ms']:9.0f}{t['reference_wall_ms']:16.0f}{t['wall_ratio']:7.2f}{t['cpu_ratio']:19.2f}")
    write_json(args.out, dict(conditions=dict(command=f'python benchmarks/crf.py --root VOC2012 --n {args.n} --repeats {args.repeats}', iterations=10,
            kernels=[vars(k) for k in KERNELS], **machine(), load_before=load, pydensecrf2=ref_version), summary=table, photographs=rows))
    print(f'written: {args.out}')

if __name__ == '__main__':
    try: main()
    except SpmlError as e: sys.exit(str(e))

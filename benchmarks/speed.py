"""The kit's fast paths against the straightforward forms of `baselines.py`: time in one run, by turns, after a warm-up; peak memory of each in a process of its own.

    python benchmarks/speed.py                       # all tasks on the CPU: a table, benchmarks/results.json and results.png
    python benchmarks/speed.py relations kmeans_36   # some
    python benchmarks/speed.py --device cuda         # benchmarks/results_cuda.json

The figures are ratios: baseline over kit. Both must give the same result, to a stated tolerance, or the task fails. `target` says what is aimed at; a target that is missed is printed as such.
"""
import argparse, json, tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Callable

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

import baselines
from measure import child, clock, machine, peak
from spml_kit.data.batches import augment, weak_dls
from spml_kit.method.contrast import contrast
from spml_kit.core import VOID, data_root
from spml_kit.files import read_json, write_json
from spml_kit.data.images import SceneSet, VocSet
from spml_kit.data.weak import Sample, WeakSet
from spml_kit.method.backbones import DepthwiseDilated
from spml_kit.method.nets import locations, unit, with_location
from spml_kit.learn.learner import spml_learner
from spml_kit.method.memory import MemoryBank
from spml_kit.regions.oversegment import prepare_regions
from spml_kit.infer.propagate import random_walk
from spml_kit.method.recipes import RECIPES
from spml_kit.infer.retrieval import SegmentIndex
from spml_kit.method.segments import Prototypes, cluster_means, cut_segments, grid_labels, resize_labels, spherical_kmeans

random_unit = lambda *shape, g: F.normalize(torch.randn(*shape, generator=g), dim=-1)


@dataclass
class Pair:
    "Two functions that do the same, and what must hold of their results"
    plain: Callable      # the straightforward form
    ours: Callable       # the kit
    differ: Callable     # of both results: how far they are apart
    tolerance: float     # at most so far
    share: float = 1.    # the baseline does this part of the work, and its time counts accordingly
    more: Callable = None # further figures, a dict
    memory: bool = True  # measure peak memory too?


def batch(device, images=16, pixels=4096, segments=75, old=2400, classes=21, D=64):
    "Pixels of a batch, their segments and codes, and a memory: what the three relations of the paper take"
    g = torch.Generator().manual_seed(0)
    own = (torch.randint(segments, (images, pixels), generator=g).sort(1)[0] + segments*torch.arange(images)[:, None]).flatten()
    M = images*segments
    x = F.normalize(random_unit(M, D, g=g)[own] + .5*random_unit(len(own), D, g=g), dim=1)
    label = torch.randint(classes, (M,), generator=g)
    label[torch.rand(M, generator=g) < .5] = 254
    tags = torch.rand(images, classes, generator=g) < .1
    tags[:, 0], tags[:, 1] = True, tags[:, 1] | ~tags[:, 2:].any(1)
    side = 2**(pixels.bit_length()//2) # of a grid of a power of two pixels
    b = dict(x=x, own=own, label=label, region=torch.randint(30, (M,), generator=g), image=torch.arange(images).repeat_interleave(segments), tags=tags,
             loc=locations(side, pixels//side).repeat(images, 1), old_mu=random_unit(old, D, g=g), old_label=torch.randint(classes, (old,), generator=g),
             old_image=images + torch.arange(old) % (2*images), old_tags=torch.cat([tags, tags.flip(0)]))
    return {k: v.to(device) for k, v in b.items()}


def features(x, b):
    "Unit features of the pixels and of their segments, without and with location; with gradient, as in training"
    v = F.normalize(x, dim=1)
    u = with_location(v, b['loc'])
    mean = lambda o: F.normalize(torch.zeros(len(b['label']), o.shape[1], device=o.device).index_add(0, b['own'], o), dim=1)
    return v, u, mean(v), mean(u)


def dense(x, b):
    v, u, mu, mu_loc = features(x, b)
    return baselines.three_relations(v, u, b['own'], b['label'], b['region'], b['image'], b['tags'], mu, mu_loc, (b['old_mu'], b['old_label'], b['old_image'], b['old_tags']), b['tags'].shape[1])


def chunked(x, b):
    v, u, mu, mu_loc = features(x, b)
    both, known = torch.cat([mu, b['old_mu']]), torch.cat([b['label'], b['old_label']])
    said = torch.cat([b['tags'], b['old_tags']])[:, 1:].float()
    return (contrast(v, both, b['own'], torch.where(known < b['tags'].shape[1], known, -1), 6.)[0] + .5*contrast(v, both, b['own'], torch.cat([b['image'], b['old_image']]), 12., match=said @ said.T > 0)[0]
            + .1*contrast(u, mu_loc, b['own'], b['region'], 16., image=b['image'])[0])


def gradient(loss, b):
    "Value and gradient by the pixels"
    x = b['x'].clone().requires_grad_()
    value = loss(x, b)
    value.backward()
    return value.detach(), x.grad


def relations(device):
    b = batch(device)
    differ = lambda a, c: max(float((a[0] - c[0]).abs()), float((a[1] - c[1]).abs().max()/a[1].abs().max()))
    return Pair(lambda: gradient(dense, b), lambda: gradient(chunked, b), differ, 1e-4)


def kmeans(k, device):
    g = torch.Generator().manual_seed(0)
    side = int(k**.5)
    smooth = F.interpolate(torch.randn(16, 64, 16, 16, generator=g), (128, 128), mode='bilinear')
    v = F.normalize(smooth.flatten(2).transpose(1, 2), dim=2).to(device)
    u, start = with_location(v, locations(128, 128, device)), grid_labels(128, 128, (side, side), device)
    return Pair(lambda: baselines.looped_kmeans(u, start, k, 10), lambda: spherical_kmeans(u, start, k, 10), lambda a, b: float((a != b).float().mean()), 1e-3)


def depthwise(device):
    layer = dict(in_channels=1152, out_channels=1152, kernel_size=5, padding=4, dilation=2, groups=1152, bias=False)
    plain, quick = (kind(**layer).to(device, memory_format=torch.channels_last) for kind in (torch.nn.Conv2d, DepthwiseDilated))
    quick.load_state_dict(plain.state_dict())
    g = torch.Generator().manual_seed(0)
    x, away = (torch.randn(8, 1152, 8, 8, generator=g).to(device, memory_format=torch.channels_last) for _ in range(2))
    def gradients(conv): return torch.autograd.grad((conv(x.requires_grad_())*away).sum(), [x, conv.weight])
    return Pair(lambda: gradients(plain), lambda: gradients(quick), lambda a, b: max(float((p - q).abs().max()/p.abs().max()) for p, q in zip(a, b)), 1e-4)


def default_preset(device, workers=0):
    "Learner and loader of the default preset on scenes"
    images = SceneSet(64)
    dls = weak_dls(WeakSet(images, 'scribbles', regions=32), images.take(8), bs=RECIPES['small'].bs, crop=RECIPES['small'].crop, steps=8, num_workers=workers, device=torch.device(device))
    learn = spml_learner(dls, 'scribbles')
    learn.model.to(device).train()
    learn.loss_func.train()
    return learn


def step(device):
    "Both forms of the loss on the same network, which does not change (lr 0), each with a full memory bank"
    learn = default_preset(device)
    model, ours, recipe, batches = learn.model, learn.loss_func, learn.recipe, [*learn.dls.train]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.)
    weight, kappa = ({r.name: getattr(r, key) for r in ours.relations} for key in ('weight', 'kappa'))
    order, bank = ('annotation', 'cooccurrence', 'similarity'), MemoryBank(recipe.memory)

    def plain_loss(pred, labels, regions, tags):
        emb, _ = pred
        B, D, h, w = emb.shape
        labels, regions = (resize_labels(o, (h, w)).flatten(1).long() for o in (labels, regions))
        v = unit(emb, 1).flatten(2).transpose(1, 2)
        u, start, valid = with_location(v, locations(h, w, emb.device)), grid_labels(h, w, recipe.grid, emb.device), labels != VOID
        cluster = baselines.looped_kmeans(u.detach(), start, int(start.max()) + 1, recipe.iterations)
        image = torch.arange(B, device=emb.device)[:, None].expand(B, h*w)
        own, *codes = cut_segments(cluster[valid], labels[valid], regions[valid], image[valid])
        v, u = v[valid], u[valid]
        protos = Prototypes(cluster_means(v, own, len(codes[0])), cluster_means(u, own, len(codes[0])), *codes, tags)
        old, M = bank.candidates(protos), len(protos)
        bank.push(protos)
        memory = old.mu[M:], old.label[M:], old.image[M:], old.tags[len(tags):]
        return baselines.three_relations(v, u, own, protos.label, protos.region, protos.image, tags, protos.mu, protos.mu_loc, memory, tags.shape[1], [kappa[n] for n in order], [weight[n] for n in order])

    def our_loss(*args):
        total = ours(*args) # 0 times the head's share: the baseline leaves it out
        ours.after_step()
        return total

    def stepper(loss):
        turn = iter(range(10**6))
        def one():
            x, *given = batches[next(turn) % len(batches)]
            total = loss(model(x), *given)
            total.backward()
            optimiser.step(); optimiser.zero_grad()
            return total.detach()
        for _ in range(recipe.memory): one()
        return one

    ours.head_weight = 0.
    forms = dict(baseline=(plain_loss, stepper(plain_loss)), kit=(our_loss, stepper(our_loss)))

    def shares():
        out = {}
        for name, (loss, one) in forms.items():
            x, *given = batches[0]
            def part():
                emb, logits = (o.detach().requires_grad_() for o in model(x))
                return clock(lambda: loss((emb, logits), *given).backward(), device)[0]
            out[name] = median(part() for _ in range(5))/median(clock(one, device)[0] for _ in range(5))
        return dict(share=out['kit'], baseline_share=out['baseline'])

    return Pair(forms['baseline'][1], forms['kit'][1], lambda a, b: float((a - b).abs()/a), .05, more=shares) # a quarter of the pixels are drawn as anchors of co-occurrence


def loading(device):
    "Share of the time that training spends waiting for batches: the first round, which paints the scenes and draws the scribbles, and the second"
    learn = default_preset(device)
    waited, worked = [], []
    for _ in range(2):
        batches, wait, work = iter(learn.dls.train), 0, 0
        while True:
            seconds, b = clock(lambda: next(batches, None), device)
            if b is None: break
            x, *given = b
            wait += seconds
            work += clock(lambda: learn.loss_func(learn.model(x), *given).backward(), device)[0]
            learn.loss_func.after_step()
        waited.append(wait); worked.append(work)
    share = [a/(a + b) for a, b in zip(waited, worked)]
    return dict(waiting_first=share[0], waiting=share[1])


def crop(device, n=20):
    "Training windows of 512 from a photograph's size, with ratios of 0.5 to 1.5; torchvision's resized crop of the image alone stands beside"
    g = np.random.default_rng(0)
    sample = Sample(g.integers(0, 256, (375, 500, 3), np.uint8), g.integers(0, 21, (375, 500), np.uint8), g.integers(0, 200, (375, 500), np.int32), np.zeros(21, bool))
    crops = lambda f: [f(sample, np.random.default_rng(k), 512) for k in range(n)]
    differ = lambda a, b: max(float(np.abs(x.astype(int) - y).max()) for p, q in zip(a, b) for x, y in ((p.image, q.image), (p.labels, q.labels), (p.regions, q.regions)))
    def more():
        other, image = v2.RandomResizedCrop(512, scale=(.5, 1.), antialias=False), tv_tensors.Image(torch.from_numpy(sample.image).permute(2, 0, 1))
        maps = tv_tensors.Mask(torch.from_numpy(np.stack([sample.labels, sample.regions])))
        ours, theirs = (median(clock(f)[0] for _ in range(5)) for f in (lambda: crops(augment), lambda: [other(image, maps) for _ in range(n)]))
        return dict(ms_per_crop=1e3*ours/n, torchvision_ms_per_crop=1e3*theirs/n)
    return Pair(lambda: crops(baselines.blended_crop), lambda: crops(augment), differ, 0, more=more, memory=False)


def walk(device):
    g = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.randn(2, 64, 8, 6, generator=g), (63, 47), mode='bilinear').flatten(2).transpose(1, 2)
    views, scores = F.normalize(smooth, dim=2).to(device), torch.rand(21, 63*47, generator=g).to(device)
    scores[5:] = 0
    return Pair(lambda: baselines.squared_walk(scores, views), lambda: random_walk(scores, views), lambda a, b: float((a - b).abs().max()), 1e-5)


def neighbours(faiss, device):
    g = torch.Generator().manual_seed(0)
    query, prototypes = random_unit(10_000, 64, g=g).to(device), random_unit(1_000_000, 64, g=g).to(device)
    zeros = torch.zeros(len(prototypes), dtype=torch.long, device=device)
    index = SegmentIndex(prototypes, zeros, zeros, 21)
    if faiss: index.use_faiss()
    few = query[:100] # sorting all would take many minutes: the baseline sorts a hundredth, and its time counts a hundredfold
    return Pair(lambda: baselines.sorted_neighbours(few, prototypes, 20), lambda: index.nearest(query, 20)[1], lambda a, b: float((a != b[:100]).float().mean()), 1e-3, share=100)


def regions(device, n=200):
    root = data_root('voc_animals', 'VOC2012')
    images = lambda: VocSet(root, 'train', masks=False).take(n) if root else SceneSet(n, size=384)
    def prepare(workers):
        with tempfile.TemporaryDirectory() as folder:
            prepare_regions(images(), folder, n=80, workers=workers, progress=False)
            return {f.name: f.read_bytes() for f in sorted(Path(folder).glob('*.png'))}
    def more():
        seconds, files = clock(lambda: prepare(2))
        return dict(data='photographs of voc_animals' if root else 'scenes of 384 x 384, for want of photographs', ms_per_image=1e3*seconds/n, bytes_per_image=sum(map(len, files.values()))/n)
    return Pair(lambda: prepare(1), lambda: prepare(2), lambda a, b: float(a != b), 0, more=more, memory=False)


@dataclass
class Task:
    make: Callable # of the device: a Pair, or figures
    size: str
    target: dict   # figure to what it should reach; `memory_ratio`, `share` and `waiting` should stay below
    cpu_only: bool = False # on a GPU the kit does what the baseline does


TASKS = {
    'relations': Task(relations, 'three VOC relations, forward and backward: N 65,536, M 1,200 + 2,400, D 64, 21 classes, 16 images', dict(speedup=5, memory_ratio=.1)),
    'kmeans_36': Task(lambda device: kmeans(36, device), 'spherical k-means, 10 iterations: 16 x 128 x 128 x 66, 36 clusters', dict(speedup=2)),
    'kmeans_576': Task(lambda device: kmeans(576, device), 'spherical k-means, 10 iterations: 16 x 128 x 128 x 66, 576 clusters', dict(speedup=2)),
    'depthwise': Task(depthwise, 'dilated depthwise convolution of EfficientNet-Lite0, forward and backward: 8 x 1152 x 8 x 8, kernel 5 x 5, dilation 2, against torch.nn.Conv2d', dict(speedup=3), cpu_only=True),
    'step': Task(step, 'training step of the default preset: 8 x 128 x 128, EfficientNet-Lite0; share is that of loss and clustering', dict(share=.25)),
    'loading': Task(loading, 'waiting for batches of the default preset, as a share of the time, without worker processes', dict(waiting=.05)),
    'crop': Task(crop, '20 training windows of 512 x 512 out of 500 x 375, image, labels and regions, against the whole window as floats; bytes are equal', dict(speedup=2), cpu_only=True),
    'walk': Task(walk, 'random walk of 64 steps, matrix included: 63 x 47 grid, 5 of 21 classes present, image and mirror image', dict(speedup=8)),
    'neighbours': Task(lambda device: neighbours(False, device), '20 nearest of 1,000,000 prototypes, 10,000 queries, D 64', dict(speedup=8)),
    'neighbours_faiss': Task(lambda device: neighbours(True, device), 'the same through faiss', dict(speedup=8)),
    'regions': Task(regions, 'regions of 200 photographs, 2 processes against 1', dict(speedup=1.8)),
}


def time_task(name, device, repeats):
    "Both forms by turns, in this process"
    task = TASKS[name].make(device)
    if isinstance(task, dict): return task
    for _ in range(3): (_, a), (_, b) = clock(task.plain, device), clock(task.ours, device) # warm-up; kernels that are compiled for their arguments want several
    off = task.differ(a, b)
    if not off <= task.tolerance: raise SystemExit(f"{name}: the two differ by {off:.2g}, allowed are {task.tolerance:.0e}")
    times = [(clock(task.plain, device)[0], clock(task.ours, device)[0]) for _ in range(repeats)]
    plain, ours = (median(t) for t in zip(*times))
    return dict(baseline_s=plain*task.share, kit_s=ours, speedup=plain*task.share/ours, differ=off, memory=task.memory, **(task.more() if task.more else {}))


def met(row):
    "Does a row reach its target?"
    return all(row[k] >= v if k == 'speedup' else row[k] <= v for k, v in row['target'].items())


def measure(name, device, repeats):
    "A row of the table; time and memory of each form in processes of their own"
    same = '--device', device
    row = dict(name=name, size=TASKS[name].size, speedup=None, memory_ratio=None, target=TASKS[name].target) | child(__file__, '--time', name, '--repeats', str(repeats), *same)
    if row.pop('memory', False):
        row |= {f'{form}_mib': child(__file__, '--memory', name, form, *same) for form in ('plain', 'ours')}
        row['memory_ratio'] = row['ours_mib']/row['plain_mib']
    return row | dict(met=met(row))


def show(row):
    "A row as a line"
    some = lambda key, form: format(row[key], form) if row.get(key) is not None else ''
    aim = ', '.join(f"{k} {'at least' if k == 'speedup' else 'at most'} {v:g}" for k, v in row['target'].items())
    print(f"{row['name']:<17}{some('baseline_s', '9.3f'):>10}{some('kit_s', '9.3f'):>10}{some('speedup', '7.1f'):>8}{some('memory_ratio', '8.3f'):>9}{some('share', '7.3f'):>8}{some('waiting', '7.3f'):>8}   "
          f"{aim}: {'met' if row['met'] else 'MISSED'}", flush=True)


def picture(rows, path):
    "Speed-ups as bars, targets as marks"
    rows = [r for r in rows if r['speedup']][::-1]
    fig, ax = plt.subplots(figsize=(7, .45*len(rows) + 1))
    ax.barh([r['name'] for r in rows], [r['speedup'] for r in rows], color='#4477aa')
    for i, r in enumerate(rows):
        ax.text(r['speedup'], i, f" {r['speedup']:.1f}", va='center')
        if 'speedup' in r['target']: ax.plot([r['target']['speedup']]*2, [i - .45, i + .45], color='#ee6677', lw=2)
    ax.set_xscale('log'); ax.set_xlabel('times faster than the baseline (red: target)'); ax.margins(x=.15)
    fig.tight_layout(); fig.savefig(path, dpi=80)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('tasks', nargs='*', help=f"out of {list(TASKS)}; none: all")
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--out', type=Path, help="JSON to write (default benchmarks/results.json; results_cuda.json on a GPU)")
    p.add_argument('--time', metavar='TASK', help=argparse.SUPPRESS)
    p.add_argument('--memory', nargs=2, metavar=('TASK', 'FORM'), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.time: return print(json.dumps(time_task(args.time, args.device, args.repeats)))
    if args.memory: return print(json.dumps(peak(getattr(TASKS[args.memory[0]].make(args.device), args.memory[1]), args.device)))
    unknown = set(args.tasks) - set(TASKS)
    if unknown: p.error(f"no task {sorted(unknown)}; there are {list(TASKS)}")
    out = args.out or Path(__file__).parent/('results.json' if args.device == 'cpu' else f'results_{args.device}.json')
    rows = {r['name']: r for r in read_json(out)['rows']} if out.exists() else {} # of tasks that do not run now
    print(f"{'':<17}{'baseline s':>10}{'kit s':>10}{'faster':>8}{'memory':>9}{'share':>8}{'waiting':>8}   target")
    for name in args.tasks or [n for n, task in TASKS.items() if args.device == 'cpu' or not task.cpu_only]:
        rows[name] = dict(conditions=machine(args.device) | dict(repeats=args.repeats, dtype='float32')) | measure(name, args.device, args.repeats)
        show(rows[name])
        kept = [rows[k] for k in TASKS if k in rows]
        write_json(out, dict(rows=kept))
        picture(kept, out.with_suffix('.png'))


if __name__ == '__main__': main()

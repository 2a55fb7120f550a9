"""How fast is it? The loss in its three forms and its kernels, clustering, walk, retrieval, loading, whole steps
against the backbone alone, and the share of what the chip can do."""
import os
import tempfile
import warnings
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from PIL import Image

from measure import clock
from right import SMALL, by_definition, fused, losses, off_definition, problem, with_regions
from spml_kit.method import fused as forms
from spml_kit.data.batches import augment, weak_dls
from spml_kit.method.contrast import contrast_plain
from spml_kit.core import rng_of
from spml_kit.data.images import FolderSet, SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.method.nets import locations, with_location
from spml_kit.data.simulate import simulate_scribbles
from spml_kit.data.formats import write_annotation
from spml_kit.learn.learner import spml_learner
from spml_kit.infer.propagate import _series, random_walk
from spml_kit.method.recipes import RECIPES
from spml_kit.infer.retrieval import SegmentIndex
from spml_kit.method.segments import grid_labels, spherical_kmeans

RELATIONS = dict(annotation=(6., 64), cooccurrence=(12., 64), similarity=(16., 66)) # concentration, D
CEILINGS = {} # as measured: bytes a second of a copy, operations a second of a product


# time, memory, waits

@contextmanager
def waiting(gpu):
    "Where the host waits for the GPU, one entry each time, within"
    places = []
    if gpu: torch.cuda.set_sync_debug_mode('warn')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        try: yield places
        finally:
            if gpu: torch.cuda.set_sync_debug_mode('default')
    places += [f'{Path(w.filename).name}:{w.lineno}' for w in said if 'synchroniz' in str(w.message)]


def timed(rows, f, n=5):
    "Milliseconds, the median after a warm-up; peak memory above what is there, MiB; how often the host waited"
    f()
    gpu = rows.device == 'cuda'
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with waiting(gpu) as places: first = clock(f, rows.device)[0]
    ms = 1e3*median([first, *(clock(f, rows.device)[0] for _ in range(0 if rows.dry else n - 1))])
    if not gpu: return dict(ms=ms)
    return dict(ms=ms, peak_MiB=(torch.cuda.max_memory_allocated() - before)/2**20, waits=len(places))


def share(ms, operations, bytes, unit):
    "What a part does and moves, counted by hand; how near that is to the chip's best, as measured here"
    a, b = operations/ms/1e9, bytes/ms/1e9
    best = CEILINGS.get(unit, float('nan')), CEILINGS.get('copy', float('nan'))
    return dict(GFLOP=operations/1e9, MB=bytes/1e6, TFLOP_s=a, TB_s=b, of_product=a/best[0], of_copy=b/best[1],
                floor_ms=max(operations/1e9/best[0], bytes/1e9/best[1]), unit=unit)


def ceilings(rows):
    "Copy of memory, and matrix products: what the others are held against"
    n = 2**20 if rows.dry else 2**30
    a = torch.empty(n, device=rows.device).normal_()
    b = torch.empty_like(a)
    CEILINGS['copy'] = 2*a.nbytes/timed(rows, lambda: b.copy_(a))['ms']/1e9
    rows.add(ceiling='copy', TB_s=CEILINGS['copy'])
    del a, b
    side = 256 if rows.dry else 8192
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        w = torch.randn(side, side, device=rows.device, dtype=dtype)
        unit = str(dtype).removeprefix('torch.')
        CEILINGS[unit] = 2*side**3/timed(rows, lambda: w @ w)['ms']/1e9
        rows.add(ceiling=unit, TFLOP_s=CEILINGS[unit])


# the loss

def shapes(rows):
    """Images, segments of each, pixels of each, images in memory: the paper's 16 windows of 512, with 1,200 segments
    and 2,400 remembered, and halvings and doublings of it"""
    if rows.dry: return [(2, 3, 15, 1)]
    return [(16, 75, 16384, 32), (16, 75, 4096, 32), (16, 75, 8192, 32), (16, 75, 32768, 32), (16, 150, 16384, 32),
            (16, 300, 16384, 32)]


def of_relation(rows, kind, shape):
    images, segments, pixels, old = shape
    if kind == 'similarity': old = 0 # it knows no memory
    return problem(kind, images, segments, pixels, RELATIONS[kind][1], rows.device, old)


def plain(p, kappa):
    "As `losses`, by the definition as it stands, all pixels at once"
    x, mu, own, ids, match, image = p
    x, mu = x.detach().requires_grad_(), mu.detach().requires_grad_()
    row = ids[own]
    candidate = (row >= 0)[:, None] & (ids >= 0)
    if image is not None: candidate &= image[own][:, None] == image
    positive = candidate & ((row[:, None] == ids) if match is None else match[row][:, ids.clamp_min(0)])
    each = torch.where(row >= 0, contrast_plain(x, mu, own, candidate, positive, kappa), 0)
    total = each.sum()/(row >= 0).sum() # of images alike in size, also the mean over images
    return total.detach(), each.detach(), *torch.autograd.grad(total, (x, mu))


def of_forms(rows):
    "Forward and backward in three forms, and how far each is from float64"
    for kind, (kappa, D) in RELATIONS.items():
        for shape in shapes(rows):
            p = of_relation(rows, kind, shape)
            want = by_definition(p, kappa)
            for form in ('fused', 'chunked', 'plain'):
                def one():
                    run = (lambda: plain(p, kappa)) if form == 'plain' else lambda: losses(p, kappa, False)
                    row = dict(loss=form, kind=kind, N=len(p[0]), M=len(p[1]), D=D)
                    try: rows.add(**row, **timed(rows, run, 2 if form == 'plain' else 5),
                                  off=off_definition(p, kappa, run(), want))
                    except torch.cuda.OutOfMemoryError: rows.add(**row, out_of_memory=True)
                with fused(form == 'fused'): rows.attempt(f'{form} {kind} {shape}', one)
            del p, want


# its kernels

class Watched:
    "A kernel whose launches leave their times"
    def __init__(self, kernel, gpu): self.kernel, self.gpu, self.times = kernel, gpu, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.gpu else []
            for e in ends[:1]: e.record()
            begin = perf_counter()
            self.kernel[grid](*args, **kwargs)
            took = perf_counter() - begin
            for e in ends[1:]: e.record()
            self.times.append(ends or took)
        return launch

    def ms(self):
        "Median of all launches but the first, which compiles"
        if self.gpu: torch.cuda.synchronize()
        each = [t[0].elapsed_time(t[1]) if self.gpu else 1e3*t for t in self.times]
        return median(each[1:] or each)


@contextmanager
def watched(gpu):
    "Within, the three kernels leave their times"
    kernels = {name: Watched(getattr(forms, name), gpu) for name in ('_forward', '_by_pixels', '_by_segments')}
    for name, k in kernels.items(): setattr(forms, name, k)
    try: yield kernels
    finally:
        for name, k in kernels.items(): setattr(forms, name, k.kernel)


def counted(p):
    """By hand, of each kernel: operations of the matrix units, bytes that must move, exponentials.

    Of n anchors, m candidates and `pairs` of them, a product is 2 D operations a pair, and takes three of halves.
    Forward makes the cosines; both others make them again, and one product more. Features are two halves: 4 bytes a
    number. Forward reads an anchor's place and own segment, and writes its loss and four numbers; the others read its
    place and these, and write a gradient: by pixels once, by segments once for each part of the pixels. A table is read
    once.
    """
    x, mu, own, ids, match, image = p
    D, row = x.shape[1], ids[own]
    n, m, parts = int((row >= 0).sum()), int((ids >= 0).sum()), min(forms.PARTS, -(-len(x)//forms.BLOCK))
    pairs = n*m if image is None else int(torch.bincount(image)[image[own]].sum())
    features, table = 4*D*(n + m), 0 if match is None else len(match)*m
    return {'_forward': (6*pairs*D, features + table + 28*n, pairs),
            '_by_pixels': (12*pairs*D, features + table + 20*n + 4*D*len(x), pairs),
            '_by_segments': (12*pairs*D, features + table + 20*n + 4*D*m*parts, pairs)}


def of_kernels(rows):
    "Each kernel alone, at the paper's size"
    for kind, (kappa, D) in RELATIONS.items():
        def one():
            p = of_relation(rows, kind, shapes(rows)[0])
            with watched(rows.device == 'cuda') as kernels:
                for _ in range(2 if rows.dry else 12): losses(p, kappa, False)
            for name, (operations, bytes, exponentials) in counted(p).items():
                rows.add(kernel=name, kind=kind, N=len(p[0]), M=len(p[1]), D=D, ms=(ms := kernels[name].ms()),
                         Gexp=exponentials/1e9, **share(ms, operations, bytes, 'float16'))
        with fused(True): rows.attempt(f'kernels {kind}', one)


TILES = {'_forward': [dict(BM=b, num_warps=w, num_stages=s) for s in (3, 2) for b in (64, 128, 32) for w in (8, 4)],
         '_by_pixels': [dict(BM=b, num_warps=w, num_stages=s) for s in (3, 2) for b in (64, 32) for w in (8, 4)],
         '_by_segments': [dict(STEP=t, num_warps=w, num_stages=s)
                          for s in (2, 3) for t in (64, 32, 128) for w in (8, 4)]}

def tiles(rows):
    "Tiles, warps and stages of each kernel, the others as they are, while there is time; on co-occurrence, the largest"
    p, chosen = of_relation(rows, 'cooccurrence', shapes(rows)[0]), forms._launch
    # those as they are first
    trials = [(name, changes) for some in zip_longest(*TILES.values()) for name, changes in zip(TILES, some) if changes]
    for name, changes in trials[:3] if rows.dry else trials:
        if rows.left() < 15: return rows.add(tiles='stopped', why='the time is over')
        forms._launch = lambda width: tuple(o | changes if k == name else o for k, o in zip(TILES, chosen(width)))
        row = dict(tiles=name, as_it_is=all(dict(zip(TILES, chosen(64)))[name].get(k) == v for k, v in changes.items()),
                   **changes)
        try:
            with fused(True), watched(rows.device == 'cuda') as kernels:
                for _ in range(2 if rows.dry else 6): losses(p, 12., False)
            rows.add(**row, ms=kernels[name].ms())
        except Exception as e: rows.add(**row, cannot=f'{type(e).__name__}: {str(e)[:100]}') # no room on the chip
        finally: forms._launch = chosen


# clustering, walk, retrieval

def parts(rows):
    B, h = (2, 16) if rows.dry else (16, 128)
    v = F.normalize(F.interpolate(torch.randn(B, 64, 16, 16), (h, h), mode='bilinear'), dim=1).to(rows.device)
    u = with_location(v.flatten(2).transpose(1, 2), locations(h, h, rows.device))
    for grid in ((2, 2),) if rows.dry else ((6, 6), (12, 12)):
        def kmeans():
            k = grid[0]*grid[1]
            t = timed(rows, lambda: spherical_kmeans(u, grid_labels(h, h, grid, rows.device), k))
            # ten times two products, which read the features
            rows.add(part='kmeans', pixels=B*h*h, clusters=k, **t,
                     **share(t['ms'], 10*2*2*B*h*h*k*66, 10*2*4*B*h*h*66, 'float32'))
        rows.attempt(f'kmeans {grid}', kmeans)
    n = 8 if rows.dry else 64
    scores = torch.rand(5, n, n, device=rows.device)
    def walk():
        terms = len(_series(64, torch.finfo(torch.float32).eps))
        t = timed(rows, lambda: random_walk(scores, F.interpolate(v[:2], (n, n))))
        # two views are compared; the matrix of all pairs is written, and read for every term
        rows.add(part='walk', nodes=n*n, **t, **share(t['ms'], 2*2*n**4*64, (1 + terms)*4*n**4, 'float32'))
    rows.attempt('walk', walk)
    del u, v
    for count in ((2000,) if rows.dry else (10**5, 10**6, 10**7)):
        def retrieval():
            mu = F.normalize(torch.randn(count, 64, device=rows.device), dim=1)
            index = SegmentIndex(mu, torch.randint(21, (count,), device=rows.device),
                                 torch.zeros(count, dtype=torch.long, device=rows.device), 21)
            q = mu[:100 if rows.dry else 10_000]
            some = q[:len(q)//100]
            a_hundredth = clock(lambda: index.nearest(some, 20), rows.device)[0]
            if not rows.dry and 250*a_hundredth > rows.left() - 20:
                why = f'a hundredth of the queries took {a_hundredth:.2f} s'
                return rows.add(part='retrieval', queries=len(q), prototypes=count, skipped=why)
            t = timed(rows, lambda: index.nearest(q, 20), 1)
            # similarities are written, and read for the best
            rows.add(part='retrieval', queries=len(q), prototypes=count, **t,
                     **share(t['ms'], 2*len(q)*count*64, 4*64*count + 4*len(q)*count*2, 'float32'))
        rows.attempt(f'retrieval {count}', retrieval)


# loading, and whole steps

def on_disk(folder, n, size):
    "Photograph-like files: JPEG images, masks, strokes, regions"
    scenes = SceneSet(n, size=size)
    for kind in ('images', 'masks'): (folder/kind).mkdir(parents=True)
    for i, name in enumerate(scenes.names):
        mask = scenes.mask(i)
        Image.fromarray(scenes.image(i)).save(folder/'images'/f'{name}.jpg', quality=90)
        Image.fromarray(mask).save(folder/'masks'/f'{name}.png')
        write_annotation(folder/'scribbles'/f'{name}.json', simulate_scribbles(mask, key=name))
    with_regions(scenes, 'scribbles', 60, folder/'regions')
    return WeakSet(FolderSet(folder/'images', folder/'masks', scenes.classes), folder/'scribbles',
                   regions=folder/'regions')


def loading(rows, weak, crop):
    "Augmentation of a window on one core, and the loader with workers"
    sample = weak.sample(0)
    rows.add(part='augment', crop=crop,
             ms=1e3*median(clock(lambda: augment(sample, rng_of(0, i), crop))[0] for i in range(3 if rows.dry else 15)))
    for workers in (0, 1) if rows.dry else (0, 4, os.cpu_count()):
        def load():
            bs, steps = (2, 2) if rows.dry else (16, 12 if workers else 3)
            dls = weak_dls(weak, weak.images, bs=bs, crop=crop, steps=steps, num_workers=workers,
                           device=torch.device(rows.device))
            list(dls.train) # files are in memory, and workers begin
            took = clock(lambda: [None for _ in dls.train], rows.device)[0]
            rows.add(part='loader', workers=workers, crop=crop, images=bs*steps, seconds=took,
                     images_a_second=bs*steps/took)
        rows.attempt(f'loader {workers}', load)


class OneStep(Callback):
    "Waits and seconds from one batch to the next, in training as it is"
    order = -100
    def __init__(self, gpu, at=3): self.gpu, self.at, self.held, self.places = gpu, at, None, []
    def before_batch(self):
        if not self.training: return
        if self.iter == self.at:
            self.held = waiting(self.gpu)
            self.places = self.held.__enter__()
        elif self.held:
            self.held.__exit__(None, None, None)
            self.held = None


def step(rows, name, recipe, weak):
    "One training step: its parts, and the backbone alone"
    valid = weak.images.take(2)
    learn = spml_learner(weak_dls(weak, valid, bs=recipe.bs, crop=recipe.crop, steps=5,
                                  device=torch.device(rows.device)), recipe=recipe)
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(1, cbs=(counts := OneStep(rows.device == 'cuda')))
    rows.add(step=name, counted='waits of the host, from one batch to the next', waits=len(counts.places),
             places={p: counts.places.count(p) for p in sorted({*counts.places})})
    load, batch = clock(learn.dls.train.one_batch, rows.device)
    x, *labels = (o.to(rows.device) for o in batch)
    model, loss_func = learn.model.train(), learn.loss_func.train()
    loss_func.images = x
    def backbone():
        model(x)[0].square().mean().backward()
        learn.opt.step(); learn.opt.zero_grad()
    def whole():
        loss_func(model(x), *labels).backward()
        learn.opt.step(); learn.opt.zero_grad()
        loss_func.after_step()
    emb, logits = (o.detach().requires_grad_() for o in model(x))
    def loss(): torch.autograd.grad(loss_func((emb, logits), *labels), (emb, logits))
    @torch.no_grad()
    def clustering(): loss_func.segments(x, emb, *labels)
    for _ in range(3): whole() # the memory is full
    ours, alone, l, c = (timed(rows, f) for f in (whole, backbone, loss, clustering))
    rows.add(step=name, images=recipe.bs, crop=recipe.crop, segments=len(loss_func.protos), **ours,
             backbone_ms=alone['ms'], loss_ms=l['ms'], clustering_ms=c['ms'], share_of_loss=l['ms']/ours['ms'],
             share_of_clustering=c['ms']/ours['ms'], times_backbone=ours['ms']/alone['ms'],
             images_a_second=1e3*recipe.bs/ours['ms'], loading_ms=1e3*load)


def steps(rows):
    changes = SMALL if rows.dry else dict(embed=dict(pretrained=False))
    presets = dict(small=changes | dict(bs=2, crop=64)) if rows.dry else dict(small=changes, paper_voc={})
    with tempfile.TemporaryDirectory() as folder:
        size = 64 if rows.dry else 512
        weak = on_disk(Path(folder)/'set', 4 if rows.dry else 32, size)
        for name, of in presets.items():
            rows.attempt(f'step {name}', lambda: step(rows, name, RECIPES[name].but(**of), weak))
        rows.attempt('loading', lambda: loading(rows, weak, size))


def main(rows):
    for part in (ceilings, of_kernels, of_forms, steps, parts, tiles): rows.attempt(part.__name__, lambda: part(rows))

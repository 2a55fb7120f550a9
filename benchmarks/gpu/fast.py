"""How fast is it? The loss in its three forms, clustering, walk, retrieval, whole steps against the backbone alone, and the fraction of what the chip can do."""
import os
import tempfile
import warnings
from statistics import median

import torch
import torch.nn.functional as F

from measure import clock
from right import SMALL, problem, with_regions
from spml_kit.batches import weak_dls
from spml_kit.contrast import contrast, contrast_plain
from spml_kit.data import SceneSet
from spml_kit.embed import locations, with_location
from spml_kit.learner import spml_learner
from spml_kit.propagate import random_walk
from spml_kit.recipes import RECIPES
from spml_kit.retrieval import SegmentIndex
from spml_kit.segments import grid_labels, spherical_kmeans


def timed(rows, f, n=5):
    "Milliseconds, the median after a warm-up; peak memory above what is there, MiB; where the host waited"
    f()
    gpu = rows.device == 'cuda'
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    ms = 1e3*median(clock(f, rows.device)[0] for _ in range(1 if rows.dry else n))
    if not gpu: return dict(ms=ms)
    peak = (torch.cuda.max_memory_allocated() - before)/2**20
    torch.cuda.set_sync_debug_mode('warn')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        f()
    torch.cuda.set_sync_debug_mode('default')
    return dict(ms=ms, peak_MiB=peak, waits=sum('synchroniz' in str(w.message) for w in said))


def ceilings(rows):
    "Copy of memory, and matrix products: what the others are held against"
    n = 2**20 if rows.dry else 2**30
    a = torch.empty(n, device=rows.device).normal_()
    b = torch.empty_like(a)
    t = timed(rows, lambda: b.copy_(a))
    rows.add(ceiling='copy', TB_s=2*a.nbytes/t['ms']/1e9)
    del a, b
    side = 256 if rows.dry else 8192
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(side, side, device=rows.device, dtype=dtype)
        rows.add(ceiling=f'product {dtype}', TFLOP_s=2*side**3/timed(rows, lambda: w @ w)['ms']/1e9)


def gradient(form, p, kappa):
    x, mu, own, ids, match, image = p
    x, mu = x.detach().requires_grad_(), mu.detach().requires_grad_()
    if form == 'plain':
        row = ids[own]
        candidate = (row >= 0)[:, None] & (ids >= 0)
        if image is not None: candidate &= image[own][:, None] == image
        loss = contrast_plain(x, mu, own, candidate, candidate & ((row[:, None] == ids) if match is None else match[row][:, ids]), kappa).mean()
    else: loss = contrast(x, mu, own, ids, kappa, match, image)[0]
    return torch.autograd.grad(loss, (x, mu))


def losses(rows):
    "At the paper's size, 16 windows of 512 (262,144 pixels, 1,200 segments and 2,400 remembered), and at doublings"
    shapes = [(3, 10, 60)] if rows.dry else [(12, 75, 5461), (24, 75, 5461), (48, 75, 5461), (48, 150, 5461)]
    for kind, kappa, D in (('annotation', 6., 64), ('cooccurrence', 12., 64), ('similarity', 16., 66)):
        for images, segments, pixels in shapes:
            p = problem(kind, images, segments, pixels, D, rows.device)
            N, M = len(p[0]), len(p[1])
            for form in ('fused', 'chunked', 'plain'):
                def one():
                    os.environ['SPML_FUSED'] = '0' if form == 'chunked' else '1'
                    t = timed(rows, lambda: gradient(form, p, kappa), 2 if form == 'plain' else 5)
                    pairs = N*M if kind != 'similarity' else N*segments
                    rows.add(loss=form, kind=kind, N=N, M=M, D=D, **t, TFLOP_s=5*2*pairs*D/t['ms']/1e9, bytes_MiB=3*4*(N + M)*D/2**20) # five products of a flash-like form; features in twice, gradients out
                rows.attempt(f'{form} {kind} N={N} M={M}', one)
    os.environ.pop('SPML_FUSED', None)


def parts(rows):
    "Clustering, walk, retrieval"
    B, h, grid = (2, 16, (2, 2)) if rows.dry else (16, 128, (6, 6))
    v = F.normalize(F.interpolate(torch.randn(B, 64, 16, 16), (h, h), mode='bilinear'), dim=1).to(rows.device)
    u, start = with_location(v.flatten(2).transpose(1, 2), locations(h, h, rows.device)), grid_labels(h, h, grid, rows.device)
    rows.attempt('kmeans', lambda: rows.add(part='kmeans', pixels=B*h*h, clusters=grid[0]*grid[1], **timed(rows, lambda: spherical_kmeans(u, start, grid[0]*grid[1]))))
    n = 8 if rows.dry else 64
    scores = torch.rand(5, n, n, device=rows.device)
    rows.attempt('walk', lambda: rows.add(part='walk', nodes=n*n, **timed(rows, lambda: random_walk(scores, F.interpolate(v[:2], (n, n))))))
    for count in ((2000,) if rows.dry else (10**5, 10**6, 10**7)):
        def retrieval():
            mu = F.normalize(torch.randn(count, 64, device=rows.device), dim=1)
            index = SegmentIndex(mu, torch.randint(21, (count,), device=rows.device), torch.zeros(count, dtype=torch.long, device=rows.device), 21)
            q = mu[:100 if rows.dry else 10_000]
            t = timed(rows, lambda: index.nearest(q, 20), 2)
            rows.add(part='retrieval', queries=len(q), prototypes=count, **t, TFLOP_s=2*len(q)*count*64/t['ms']/1e9)
        rows.attempt(f'retrieval {count}', retrieval)


def steps(rows):
    "A whole training step, its loss and clustering, and the backbone alone"
    presets = dict(small=SMALL | dict(bs=2, crop=64)) if rows.dry else dict(small=dict(embed=dict(pretrained=False)), paper_voc={})
    folder = tempfile.TemporaryDirectory()
    for name, changes in presets.items():
        def one():
            recipe = RECIPES[name].but(**changes)
            weak = with_regions(SceneSet(max(4, recipe.bs), size=recipe.crop), 'scribbles', 30, f'{folder.name}/{name}')
            learn = spml_learner(weak_dls(weak, weak.images, bs=recipe.bs, crop=recipe.crop, steps=1, device=torch.device(rows.device)), recipe=recipe)
            loading, batch = clock(learn.dls.train.one_batch, rows.device)
            x, *labels = (o.to(rows.device) for o in batch)
            learn.model.train().to(rows.device)
            learn.create_opt()
            def backbone():
                learn.model(x)[0].square().mean().backward()
                learn.opt.step(); learn.opt.zero_grad()
            def whole():
                learn.loss_func.images = x
                loss = learn.loss_func.train()(learn.model(x), *labels)
                loss.backward()
                learn.opt.step(); learn.opt.zero_grad()
                learn.loss_func.after_step()
            for _ in range(3): whole() # the memory fills
            ours, alone = timed(rows, whole), timed(rows, backbone)
            rows.add(step=name, images=recipe.bs, crop=recipe.crop, **ours, backbone_ms=alone['ms'], times_backbone=ours['ms']/alone['ms'],
                     share_of_loss=1 - alone['ms']/ours['ms'], images_a_second=1e3*recipe.bs/ours['ms'], loading_ms=1e3*loading)
        rows.attempt(f'step {name}', one)


def main(rows):
    for part in (ceilings, losses, parts, steps): rows.attempt(part.__name__, lambda: part(rows))

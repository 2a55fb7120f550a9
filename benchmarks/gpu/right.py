"""Is what runs on the GPU right? The loss against the plain definition in float64, everything else against the CPU; runs that are killed; the same seed twice."""
import tempfile
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback # patches Learner.no_bar
from skimage.segmentation import slic

from spml_kit.batches import weak_dls
from spml_kit.contrast import contrast, contrast_plain
from spml_kit.crf import dense_crf
from spml_kit.crf_loss import CrfCrossEntropy
from spml_kit.data import SceneSet, WeakSet
from spml_kit.embed import locations, with_location
from spml_kit.learner import spml_learner
from spml_kit.oversegment import RegionCache
from spml_kit.predict import head_scores, retrieval_scores, training_index
from spml_kit.propagate import random_walk
from spml_kit.recipes import RECIPES
from spml_kit.retrieval import SegmentIndex
from spml_kit.segments import grid_labels, spherical_kmeans

SMALL = dict(embed=dict(backbone='test_resnet', pretrained=False), dim=8, grid=(3, 3), iterations=3, infer_grid=(4, 4)) # a network of nearly nothing, for dry runs
KINDS = dict(annotation=6., cooccurrence=12., similarity=16., lonely=60.) # and their concentrations


def with_regions(images, annotation, n, folder):
    "A weak set whose regions are superpixels: the machine with the GPU lacks what makes the kit's own"
    cache = RegionCache(folder, dict(contours='skimage.segmentation.slic', n=n))
    for i, name in enumerate(images.names): cache.write(name, slic(images.image(i), n_segments=n, start_label=0))
    return WeakSet(images, annotation, regions=folder)


def problem(kind, images, segments, pixels, D, device, classes=21, seed=0):
    "Pixels near their segments, and the codes of a relation; pixels are sorted by image"
    g = torch.Generator().manual_seed(seed)
    M, image = images*segments, torch.arange(images).repeat_interleave(segments)
    own = torch.cat([torch.randint(segments, (pixels,), generator=g) + i*segments for i in range(images)])
    mu = F.normalize(torch.randn(M, D, generator=g), dim=1)
    x = F.normalize(mu[own] + .7*torch.randn(len(own), D, generator=g)/D**.5, dim=1)
    tags = torch.rand(images, classes, generator=g) < .1
    codes = dict(annotation=(torch.where(torch.rand(M, generator=g) < .3, -1, torch.randint(classes, (M,), generator=g)), None, None),
        cooccurrence=(image, tags.float() @ tags.float().T > 0, None), similarity=(torch.randint(30, (M,), generator=g), None, image), lonely=(torch.arange(M)//2, None, None))[kind]
    return [o if o is None else o.to(device) for o in (x, mu, own, *codes)]


def losses(p, kappa, own_negative, dtype=torch.float32):
    x, mu, own, ids, match, image = p
    x, mu = (o.detach().to(dtype).requires_grad_() for o in (x, mu))
    total, each = contrast(x, mu, own, ids, kappa, match, image, own_negative)
    return total.detach(), each.detach(), *torch.autograd.grad(total, (x, mu))


def defined(p, kappa, own_negative, some):
    "The plain definition in float64 for some pixels: their losses"
    x, mu, own, ids, match, image = p
    row, x, mine = ids[own[some]], x[some].double(), own[some]
    candidate = (row >= 0)[:, None] & (ids >= 0)
    if image is not None: candidate &= image[mine][:, None] == image
    positive = candidate & ((row[:, None] == ids) if match is None else match[row][:, ids])
    return contrast_plain(x, mu.double(), mine, candidate, positive, kappa, own_negative)


def off(got, want):
    "Largest difference, relative to the largest value"
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).abs().max()/want.abs().max().clamp_min(1e-300)) if got.isfinite().all() else float('inf')


def kernels(rows):
    sizes = [(3, 15, 90, 16), (2, 7, 33, 66)] if rows.dry else [(5, 60, 700, D) for D in (16, 32, 64, 66, 128, 256, 512)] + [(1, 1, 1, 64), (1, 2, 5, 64), (40, 500, 7500, 64), (48, 75, 6250, 64)]
    for (kind, kappa), (images, segments, pixels, D), own_negative in product(KINDS.items(), sizes, (False, True)):
        def check():
            p = problem(kind, images, segments, pixels, D, rows.device)
            total, each, dx, dmu = losses(p, kappa, own_negative)
            small = images*segments*images*pixels < 2e8
            want = losses([o.double() if o is not None and o.is_floating_point() else o for o in p], kappa, own_negative, torch.float64) if small else None
            errors = [off(a, b) for a, b in zip((total, each, dx, dmu), want)] if small else []
            some = torch.arange(0, len(each), max(1, len(each)//2000), device=rows.device)
            anchors = some[p[3][p[2][some]] >= 0]
            plain = off(each[anchors], defined(p, kappa, own_negative, anchors)) if len(anchors) else 0.
            rows.add(check='loss', kind=kind, N=images*pixels, M=images*segments, D=D, own_negative=own_negative, off=max([plain, *errors]), right=max([plain, *errors]) < 1e-4)
        rows.attempt(f'loss {kind} D={D} M={images*segments}', check)
    for dtype in (torch.bfloat16, torch.float16):
        def autocast():
            p = problem('annotation', 3, 15, 90, 64, rows.device)
            with torch.autocast(rows.device, dtype): got = losses(p, 6., False)
            rows.add(check='autocast', dtype=str(dtype), off=(o := off(got[0], losses(p, 6., False)[0])), right=o < 1e-6)
        if not (rows.dry and dtype is torch.float16): rows.attempt(f'autocast {dtype}', autocast)


def against_cpu(rows):
    "The same function on both"
    g = torch.Generator().manual_seed(1)
    h = 16 if rows.dry else 64
    v = F.normalize(F.interpolate(torch.randn(2, 32, 8, 8, generator=g), (h, h), mode='bilinear'), dim=1)
    u = with_location(v.flatten(2).transpose(1, 2), locations(h, h))
    scores, image = torch.rand(5, h, h, generator=g), np.random.default_rng(0).integers(0, 255, (h, h, 3), dtype=np.uint8)
    q, mu, label = F.normalize(torch.randn(40, 32, generator=g), dim=1), F.normalize(torch.randn(900, 32, generator=g), dim=1), torch.randint(5, (900,), generator=g)
    logits, labels = torch.randn(2, 5, h, h, generator=g), torch.randint(5, (2, h, h), generator=g)
    def crf_loss(d):
        loss = CrfCrossEntropy(1.).to(d)
        loss.images = torch.rand(2, 3, h, h, generator=torch.Generator().manual_seed(2)).to(d)
        return loss.train()((v.to(d), logits.to(d)), labels.to(d), None, None)
    jobs = dict(kmeans=lambda d: spherical_kmeans(u.to(d), grid_labels(h, h, (4, 4), d), 16).float(), walk=lambda d: random_walk(scores.to(d), v.to(d)), crf=lambda d: dense_crf(image, scores.softmax(0).to(d)),
        retrieval=lambda d: SegmentIndex(mu.to(d), label.to(d), torch.zeros(900, dtype=torch.long, device=d), 5).vote(q.to(d), 5), crf_loss=crf_loss)
    for name, job in jobs.items():
        def check():
            a, b = job('cpu'), job(rows.device)
            wrong = float((a.cpu() != b.cpu()).float().mean()) if name == 'kmeans' else off(b, a)
            rows.add(check=name, off=wrong, right=wrong < (.01 if name == 'kmeans' else 1e-3))
        rows.attempt(name, check)


class Cut(Callback):
    "The power goes in the second round"
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 1): raise InterruptedError('no power')


def runs(rows):
    "Training goes on as if it had never stopped; the same seed gives the same; predictions on the GPU are those of the CPU"
    scenes = SceneSet(8, size=64)
    recipe = RECIPES['small'].but(**SMALL if rows.dry else dict(embed=dict(pretrained=False)), bs=2, crop=64, warmup=2)
    def train(path, rounds, resume):
        learn = spml_learner(weak_dls(weak, scenes, bs=2, crop=64, steps=3, device=torch.device(rows.device)), recipe=recipe, path=path)
        with learn.no_bar(), learn.no_logging():
            if resume == 'cut':
                try: learn.fit_poly(rounds, checkpoint=True, cbs=Cut())
                except InterruptedError: return learn
            learn.fit_poly(rounds, resume=resume is True)
        return learn
    with tempfile.TemporaryDirectory() as d:
        weak = with_regions(scenes, 'scribbles', 12, f'{d}/regions')
        whole = train(f'{d}/a', 2, False)
        train(f'{d}/b', 2, 'cut')
        resumed, again = train(f'{d}/b', 2, True), train(f'{d}/c', 2, False)
        far = lambda a, b: max(off(x.float(), y.float()) for x, y in zip(a.model.parameters(), b.model.parameters()))
        for name, other in (('resumed', resumed), ('same seed', again)):
            rows.add(check=name, off=(o := far(other, whole)), right=o < (1e-9 if rows.dry else .05)) # on a GPU sums are in no fixed order
        model, image, n = whole.model, scenes.image(0), len(scenes.classes)
        def scores(): return head_scores(model, image).cpu(), retrieval_scores(model, image, training_index(model, [image], [weak.sample(0).labels], n), n).argmax(0).cpu()
        there = scores()
        model.to('cpu')
        head, retrieved = scores()
        rows.add(check='head scores', off=(o := off(there[0], head)), right=o < 1e-2)
        rows.add(check='retrieval labels', off=(o := float((there[1] != retrieved).float().mean())), right=o < .02) # a pixel at a border of clusters may go either way


def main(rows):
    for part in (kernels, against_cpu, runs): rows.attempt(part.__name__, lambda: part(rows))

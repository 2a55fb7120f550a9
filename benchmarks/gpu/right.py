"""Is what runs on the GPU right? The loss against the plain definition in float64, everything else against the CPU;
runs that are killed; the same seed twice."""
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from skimage.segmentation import slic

from spml_kit.data.batches import weak_dls
from spml_kit.method.contrast import contrast, contrast_plain
from spml_kit.infer.crf import dense_crf
from spml_kit.infer.crf_loss import CrfCrossEntropy
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.method.nets import locations, with_location
from spml_kit.files import save_tensors
from spml_kit.method.fused import WIDEST, use_fused
from spml_kit.regions.hed import Hed, HedContours
from spml_kit.learn.learner import spml_learner
from spml_kit.regions.oversegment import RegionCache
from spml_kit.infer.scores import head_scores, retrieval_scores, training_index
from spml_kit.infer.propagate import random_walk
from spml_kit.method.recipes import RECIPES
from spml_kit.infer.retrieval import SegmentIndex
from spml_kit.method.segments import grid_labels, spherical_kmeans

HERE = Path(__file__).resolve().parent
# for dry runs: a network of nearly nothing
SMALL = dict(embed=dict(backbone='test_resnet', pretrained=False), dim=8, grid=(3, 3), iterations=3, infer_grid=(4, 4))
# kinds of relation and their concentrations
KINDS = dict(annotation=6., cooccurrence=12., similarity=16., table_of_images=12., lonely=60.)
TABLES = 'cooccurrence', 'table_of_images' # with these the own segment may be its own negative
WIDTHS = 16, 32, 64, 66, 128, 256, 512


def with_regions(images, annotation, n, folder):
    "A weak set whose regions are superpixels: the machine with the GPU lacks what makes the kit's own"
    cache = RegionCache(folder, dict(contours='skimage.segmentation.slic', n=n))
    for i, name in enumerate(images.names): cache.write(name, slic(images.image(i), n_segments=n, start_label=0))
    return WeakSet(images, annotation, regions=folder)


@contextmanager
def fused(yes):
    "Within, the kernels serve where they can, or never"
    before = os.environ.get('SPML_FUSED', '')
    os.environ['SPML_FUSED'] = '1' if yes else '0'
    try: yield
    finally: os.environ['SPML_FUSED'] = before


# the loss

def problem(kind, images, segments, pixels, D, device, old=0, classes=21, seed=0):
    "Pixels near their segments, by image, and codes of a relation; `old` images more have segments only, as in memory"
    g = torch.Generator().manual_seed(seed)
    M, image = (images + old)*segments, torch.arange(images + old).repeat_interleave(segments)
    own = torch.cat([torch.randint(segments, (pixels,), generator=g) + i*segments for i in range(images)])
    mu = F.normalize(torch.randn(M, D, generator=g), dim=1)
    x = F.normalize(mu[own] + .7*torch.randn(len(own), D, generator=g)/D**.5, dim=1)
    tags = torch.rand(images + old, classes, generator=g) < .1
    labels, regions = (torch.randint(k, (M,), generator=g) for k in (classes, 30))
    codes = dict(annotation=(torch.where(torch.rand(M, generator=g) < .3, -1, labels), None, None),
        cooccurrence=(image, tags.float() @ tags.float().T > 0, None), similarity=(regions, None, image),
        table_of_images=(regions, torch.rand(30, 30, generator=g) < .3, image),
        lonely=(torch.arange(M)//2, None, None))[kind]
    return [o if o is None else o.to(device) for o in (x, mu, own, *codes)]


def losses(p, kappa, own_negative, change=lambda o: o):
    "Mean, losses, gradients by pixels and by prototypes, by whichever form serves"
    x, mu, own, ids, match, image = p
    x, mu = (change(o.detach()).requires_grad_() for o in (x, mu))
    total, each = contrast(x, mu, own, ids, kappa, match, image, own_negative)
    return total.detach(), each.detach(), *torch.autograd.grad(total, (x, mu))


def by_definition(p, kappa, own_negative=False):
    "The same by the plain definition in float64, some pixels at a time"
    x, mu, own, ids, match, image = p
    x, mu = (o.detach().double().requires_grad_() for o in (x, mu))
    anchors = (ids[own] >= 0).nonzero()[:, 0]
    weight = torch.full_like(anchors, max(1, len(anchors))).double().reciprocal()
    if image is not None: # the mean over images of means over their anchors
        counts = torch.bincount(image[own[anchors]], minlength=int(image.max()) + 1)
        weight = 1/(counts[image[own[anchors]]]*(counts > 0).sum()).double()
    each, dx, dmu = x.detach().new_zeros(len(x)), torch.zeros_like(x), torch.zeros_like(mu)
    for some, w in zip(*(o.split(max(1, 2**27//len(mu))) for o in (anchors, weight))):
        features, row = x.detach()[some].requires_grad_(), ids[own[some]]
        candidate = (ids >= 0).expand(len(some), -1)
        if image is not None: candidate = candidate & (image[own[some]][:, None] == image)
        positive = candidate & ((row[:, None] == ids) if match is None else match[row][:, ids.clamp_min(0)])
        found = contrast_plain(features, mu, own[some], candidate, positive, kappa, own_negative)
        dx[some], part = torch.autograd.grad((w*found).sum(), (features, mu))
        each[some], dmu = found.detach(), dmu + part
    return (each[anchors]*weight).sum(), each, dx, dmu


def off(got, want, least=1e-300):
    "Largest difference, relative to the largest value, or to the least that counts as one"
    got, want = got.double(), want.to(got.device).double()
    return float((got - want).abs().max()/want.abs().max().clamp_min(least)) if got.isfinite().all() else float('inf')


def farthest(found, wanted): return max(off(a, b) for a, b in zip(found, wanted, strict=True))


def off_definition(p, kappa, found, wanted):
    "Of what `losses` gave; of nearly nothing, relative to a loss of 1, and to a hundredth of the steepest gradient"
    steep = .01*kappa/len(p[0])
    return max(off(a, b, least) for a, b, least in zip(found, wanted, (1, 1, steep, steep), strict=True))


def kernels(rows, sizes):
    "Mean, losses and gradients of every kind of relation at some sizes: images, segments and pixels of each, D"
    for images, segments, pixels, D in sizes:
        for kind, kappa in KINDS.items():
            for own_negative in (False, True) if kind in TABLES else (False,):
                def check():
                    p = problem(kind, images, segments, pixels, D, rows.device)
                    served = use_fused(p[0])
                    o = off_definition(p, kappa, losses(p, kappa, own_negative), by_definition(p, kappa, own_negative))
                    rows.add(check='loss', kind=kind, N=images*pixels, M=images*segments, D=D,
                             own_negative=own_negative, form='kernels' if served else 'chunked', off=o,
                             right=o < 1e-4 and served == (D <= WIDEST))
                with fused(True): rows.attempt(f'loss {kind} D={D} M={images*segments}', check)


def autocast(rows):
    "Under autocast the loss is the same; of half features, it is that of their values"
    for dtype in (torch.bfloat16, torch.float16):
        for kind, kappa in KINDS.items():
            def check():
                p = problem(kind, 3, 15, 90, 64, rows.device)
                plain, rounded = losses(p, kappa, False), losses(p, kappa, False, lambda o: o.to(dtype).float())
                with torch.autocast(rows.device, dtype):
                    same, half = (losses(p, kappa, False, change) for change in (lambda o: o, lambda o: o.to(dtype)))
                o = max(farthest(same, plain), farthest(half[:2], rounded[:2]))
                step = off(half[2], rounded[2]) # its gradient has 11 bits, or 8
                rows.add(check='autocast', dtype=str(dtype), kind=kind, off=o, gradient_of_halves_off=step,
                         right=o < 1e-6 and step < 2**-7)
            with fused(not rows.dry): rows.attempt(f'autocast {dtype} {kind}', check)


COMPILES = """
import sys, torch
from spml_kit.method.fused import FusedContrast
D, table, device = int(sys.argv[1]), sys.argv[2] == 'True', sys.argv[3]
x = torch.nn.functional.normalize(torch.randn(9, D, device=device), dim=1).requires_grad_()
own = torch.arange(9, device=device)
for own_negative in {False, table}:
    match = torch.eye(3, device=device) > 0 if table else None
    FusedContrast.apply(x, x, own, own//3, 9., match, None, own_negative)[0].backward()
"""

def compiling(rows):
    "Processes that compile the kernels, all widths at a time: by turns it would take half of what this stage has"
    widths, tables = ((16,), (True,)) if rows.dry else ([D for D in WIDTHS if D <= WIDEST], (False, True))
    return [subprocess.Popen([sys.executable, '-c', COMPILES, str(D), str(table), rows.device])
            for D in widths for table in tables]


# everything else

def hed(device, images, folder):
    "Contours of images, by weights drawn from a seed: those of the paper are 59 MB, which is too much to carry"
    if not (file := Path(folder)/'hed.safetensors').exists():
        torch.manual_seed(3)
        model = Hed()
        for name, p in model.named_parameters():
            if name.endswith('bias'): p.data.zero_()
            elif name.startswith('new'): p.data.fill_(.2)
            # logits of a few units
            else: p.data.normal_(0, (2/p[0].numel())**.5*(.03 if name.startswith('score') else 1))
        save_tensors(file, model.state_dict())
    return torch.cat([torch.from_numpy(o).flatten() for o in HedContours(file, device).many(images)])


def against_cpu(rows):
    "The same function on both"
    rand = torch.Generator().manual_seed(1)
    h = 16 if rows.dry else 64
    v = F.normalize(F.interpolate(torch.randn(2, 32, 8, 8, generator=rand), (h, h), mode='bilinear'), dim=1)
    u = with_location(v.flatten(2).transpose(1, 2), locations(h, h))
    scores, colours, logits = (torch.rand(*size, h, h, generator=rand) for size in ((5,), (2, 3), (2, 5)))
    image = np.random.default_rng(0).integers(0, 255, (h, h, 3), dtype=np.uint8)
    q, mu = (F.normalize(torch.randn(n, 32, generator=rand), dim=1) for n in (40, 900))
    label, labels = (torch.randint(5, size, generator=rand) for size in ((900,), (2, h, h)))
    def crf_loss(d):
        loss, x = CrfCrossEntropy(1.).to(d), logits.to(d, copy=True).requires_grad_()
        loss.images = colours.to(d)
        value = loss.train()((v.to(d), x), labels.to(d), None, None)
        return torch.cat([value.detach().view(1), torch.autograd.grad(value, x)[0].flatten()])
    def retrieval(d): return SegmentIndex(mu.to(d), label.to(d), torch.zeros(900, dtype=torch.long, device=d), 5)
    folder = tempfile.TemporaryDirectory()
    jobs = dict(kmeans=lambda d: spherical_kmeans(u.to(d), grid_labels(h, h, (4, 4), d), 16).float(),
                walk=lambda d: random_walk(scores.to(d), v.to(d)),
                crf=lambda d: dense_crf(image, scores.softmax(0).to(d)), crf_loss=crf_loss,
                hed=lambda d: hed(d, [image, image[::-1].copy(), image[:-4]], folder.name),
                retrieval=lambda d: retrieval(d).vote(q.to(d), 5),
                neighbours=lambda d: retrieval(d).nearest(q.to(d), 20)[0])
    for name, job in jobs.items():
        def check():
            a, b = job('cpu'), job(rows.device)
            wrong = float((a.cpu() != b.cpu()).float().mean()) if name == 'kmeans' else off(b, a)
            # convolutions multiply with 11 bits on a GPU
            rows.add(check=name, off=wrong, right=wrong < dict(kmeans=.01, hed=.01).get(name, 1e-3))
        rows.attempt(name, check)


# runs

def learner(folder, name, device):
    "A run on eight scenes, whose regions are in the folder"
    scenes = SceneSet(8, size=64)
    recipe = RECIPES['small'].but(**SMALL if device == 'cpu' else dict(embed=dict(pretrained=False)), bs=2, crop=64,
                                  warmup=2)
    weak = WeakSet(scenes, 'scribbles', regions=f'{folder}/regions')
    return spml_learner(weak_dls(weak, scenes, bs=2, crop=64, steps=3, device=torch.device(device)), recipe=recipe,
                        path=f'{folder}/{name}')


def train(learn, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(2, **kwargs)
    return learn


class Kill(Callback):
    "The power goes in the second round"
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 1): os.kill(os.getpid(), signal.SIGKILL)


def to_be_killed(folder, device):
    "A process that trains until it is killed"
    learn = f'right.learner({folder!r}, "killed", {device!r})'
    call = f'import right; right.train({learn}, checkpoint=True, cbs=right.Kill())'
    return subprocess.Popen([sys.executable, '-c', call], cwd=HERE)


def runs(rows, folder, killed):
    "Training goes on as if it had never been killed; the same seed gives the same; predictions are those of the CPU"
    whole = train(learner(folder, 'whole', rows.device))
    def resumed():
        if (status := killed.wait()) != -signal.SIGKILL: raise RuntimeError(f'not killed: it ended with {status}')
        learn = learner(folder, 'killed', rows.device)
        return train(learn, resume=True)
    for name, run in dict(resumed=resumed, same_seed=lambda: train(learner(folder, 'again', rows.device))).items():
        def check():
            other = run()
            o = farthest([p.float() for p in other.model.parameters()], [p.float() for p in whole.model.parameters()])
            rows.add(check=name, off=o, right=o < (1e-9 if rows.dry else .05)) # on a GPU sums are in no fixed order
        rows.attempt(name, check)
    rows.attempt('predictions', lambda: predictions(rows, whole))
    rows.attempt('half steps', lambda: half_steps(rows, whole))


def predictions(rows, learn):
    weak, model = learn.dls.train.dataset, learn.model
    image, n = weak.images.image(0), len(weak.classes)
    def scores():
        index = training_index(model, [image], [weak.sample(0).labels], n)
        return head_scores(model, image).cpu(), retrieval_scores(model, image, index, n).argmax(0).cpu()
    there = scores()
    model.to('cpu')
    head, retrieved = scores()
    model.to(rows.device)
    rows.add(check='head scores', off=(o := off(there[0], head)), right=o < 1e-2)
    # a pixel at a border of clusters may go either way
    rows.add(check='retrieval labels', off=(o := float((there[1] != retrieved).float().mean())), right=o < .02)


def half_steps(rows, learn):
    "The loss of a batch, the network under autocast, against the network in float32"
    x, *labels = (o.to(rows.device) for o in learn.dls.train.one_batch())
    learn.loss_func.images = x
    def loss(dtype):
        torch.manual_seed(0) # dropout
        with torch.autocast(rows.device, dtype or torch.bfloat16, enabled=dtype is not None):
            return float(learn.loss_func.train()(learn.model.train()(x), *labels))
    exact = loss(None)
    for dtype in (torch.bfloat16, torch.float16):
        rows.add(check='half step', dtype=str(dtype), off=(o := abs(loss(dtype) - exact)/exact), right=o < .05)


def main(rows):
    with tempfile.TemporaryDirectory() as folder:
        with_regions(SceneSet(8, size=64), 'scribbles', 12, f'{folder}/regions')
        compilers, killed = compiling(rows), to_be_killed(folder, rows.device)
        rows.attempt('against_cpu', lambda: against_cpu(rows))
        statuses = [p.wait() for p in compilers]
        rows.add(check='compiled', kernels_for=len(statuses), right=not any(statuses))
        small = [(5, 60, 700, D) for D in WIDTHS] + [(1, 1, 1, D) for D in WIDTHS] + [(1, 2, 5, D) for D in WIDTHS]
        # M = 20,000 and 3,600, N = 300,000
        large = [(40, 500, 7500, D) for D in (64, 16, 66, 128, 512)] + [(48, 75, 6250, D) for D in (32, 256)]
        if rows.dry: small, large = [(2, 4, 20, 66), (1, 1, 1, 16)], []
        rows.attempt('kernels', lambda: kernels(rows, small))
        rows.attempt('autocast', lambda: autocast(rows))
        rows.attempt('runs', lambda: runs(rows, folder, killed))
        rows.attempt('large', lambda: kernels(rows, large))

"""Does it learn? Cross-entropy and SPML from strokes, and full masks, on photographs of animals: the same steps for
each, as many as fit."""
import os
import time
from pathlib import Path

import torch

from right import SMALL
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import FolderSet, SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.learn.learner import spml_learner
from spml_kit.metrics import Confusion
from spml_kit.infer.scores import retrieval_scores, score, training_index
from spml_kit.method.recipes import RECIPES

PACKED = Path(__file__).resolve().parents[2]/'.carry'/'gpu'/'photographs'
NAMES = 'background', 'cat', 'cow', 'dog', 'horse', 'person', 'sheep'
METHODS = dict(cross_entropy=('strokes', 'cross_entropy'), spml=('strokes', 'spml'),
               full_masks=('masks', 'cross_entropy'))
MOST = 12 # rounds
SHARE = .75 # of the time that is left goes into training; the rest is for retrieval, and for rounds that take longer


def sets(dry):
    "Training images with strokes, the same with masks, images to score on; drawn scenes in a dry run"
    if dry:
        train = SceneSet(6, size=64)
        return dict(strokes=WeakSet(train, 'scribbles'), masks=WeakSet(train, 'full')), SceneSet(2, size=64, start=100)
    listed = lambda split: (PACKED/f'{split}.txt').read_text().split()
    train, valid = (FolderSet(PACKED/'images', PACKED/'masks', NAMES, names=listed(split))
                    for split in ('train_aug', 'val'))
    return dict(strokes=WeakSet(train, PACKED/'scribbles', regions=PACKED/'regions'),
                masks=WeakSet(train, 'full', regions=PACKED/'regions')), valid


def recipe_of(dry):
    changes = dict(multipliers=(.1, .1, 1, 1), dropout=.2,
                   relations={'similarity': {'weight': None}, 'cooccurrence': {'weight': .1}})
    return RECIPES['small'].but(**SMALL | dict(bs=2, crop=64) if dry else dict(bs=16, crop=160), **changes)


def learner(name, dry, device, steps):
    recipe, (weak, valid) = recipe_of(dry), sets(dry)
    kind, method = METHODS[name]
    dls = weak_dls(weak[kind], valid, bs=recipe.bs, crop=recipe.crop, steps=steps, scale=recipe.scale,
                   num_workers=0 if dry else min(8, os.cpu_count()), device=torch.device(device))
    return spml_learner(dls, 'scribbles', method, recipe)


def trained(name, rows, rounds, steps):
    "A trained learner, seconds"
    learn, start = learner(name, rows.dry, rows.device, steps), time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(rounds)
    return learn, time.perf_counter() - start


def by_retrieval(learn, n):
    "mIoU of 100 images by 300 others, in the training set"
    weak, valid = learn.dls.train.dataset, learn.dls.valid.dataset.take(100)
    some = range(min(len(weak), 300))
    index = training_index(learn.model, map(weak.images.image, some), (weak.sample(i).labels for i in some), n)
    maps = [retrieval_scores(learn.model, valid.image(i), index, n).argmax(0).byte().cpu().numpy()
            for i in range(len(valid))]
    return sum(score(maps, valid, progress=False), Confusion(n)).mean_iou(present_only=True)


def main(rows):
    steps = 2 if rows.dry else 100
    seconds = trained('spml', rows, 1, steps)[1] # the slowest of them, with all that happens once
    rounds = 1 if rows.dry else max(1, min(MOST, int(SHARE*rows.left()/(len(METHODS)*seconds))))
    rows.add(probe='spml', steps=steps, seconds=seconds, rounds=rounds)
    for name in METHODS:
        def one():
            learn, took = trained(name, rows, rounds, steps)
            row = dict(method=name, steps=rounds*steps, seconds=took, miou_head=learn.history[-1]['miou'],
                       history=learn.history)
            if name == 'spml': row['miou_retrieval'] = by_retrieval(learn, learn.dls.c)
            rows.add(**row)
        rows.attempt(name, one)

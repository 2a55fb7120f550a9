"""Does it learn? Cross-entropy and SPML from strokes, and full masks, on photographs of animals: the same steps for each, as many as fit."""
import time
from pathlib import Path

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback # patches Learner.no_bar

from right import SMALL
from spml_kit.batches import weak_dls
from spml_kit.data import FolderSet, SceneSet, WeakSet
from spml_kit.learner import spml_learner
from spml_kit.metrics import Confusion
from spml_kit.predict import head_scores, retrieval_scores, score, training_index
from spml_kit.recipes import RECIPES

PACKED = Path(__file__).resolve().parents[2]/'.carry'/'gpu'/'photographs'
NAMES = 'background', 'cat', 'cow', 'dog', 'horse', 'person', 'sheep'


def sets(rows):
    "Training images with strokes, the same with masks, images to score on; drawn scenes in a dry run"
    if rows.dry:
        train = SceneSet(6, size=64)
        return WeakSet(train, 'scribbles'), WeakSet(train, 'full'), SceneSet(2, size=64, start=100)
    listed = lambda split: (PACKED/f'{split}.txt').read_text().split()
    train, valid = (FolderSet(PACKED/'images', PACKED/'masks', NAMES, names=listed(split)) for split in ('train_aug', 'val'))
    return WeakSet(train, PACKED/'scribbles', regions=PACKED/'regions'), WeakSet(train, 'full', regions=PACKED/'regions'), valid


class Until(Callback):
    "End after a round if the next would not fit"
    order = 95
    def __init__(self, seconds): self.seconds, self.begun = seconds, time.perf_counter()
    def after_epoch(self):
        took = time.perf_counter() - self.begun
        if took*(self.epoch + 2)/(self.epoch + 1) > self.seconds: raise CancelFitException


def main(rows):
    weak, full, valid = sets(rows)
    changes = dict(multipliers=(.1, .1, 1, 1), dropout=.2, relations={'similarity': {'weight': None}, 'cooccurrence': {'weight': .1}})
    recipe = RECIPES['small'].but(**SMALL | dict(bs=2, crop=64) if rows.dry else dict(bs=16, crop=160), **changes)
    rounds, steps, seconds = (1, 2, 60) if rows.dry else (12, 100, 60) # each
    for name, source, method in (('cross_entropy', weak, 'cross_entropy'), ('spml', weak, 'spml'), ('full_masks', full, 'cross_entropy')):
        def one():
            learn = spml_learner(weak_dls(source, valid, bs=recipe.bs, crop=recipe.crop, steps=steps, scale=recipe.scale, device=torch.device(rows.device)), 'scribbles', method, recipe)
            start = time.perf_counter()
            with learn.no_bar(), learn.no_logging(): learn.fit_poly(rounds, cbs=Until(seconds))
            row = dict(method=name, steps=len(learn.history)*steps, of=rounds*steps, seconds=time.perf_counter() - start, miou_head=learn.history[-1]['miou'], history=learn.history)
            if name == 'spml':
                n, some, judge = len(valid.classes), range(min(len(weak), 300)), valid.take(100)
                index = training_index(learn.model, map(weak.images.image, some), (weak.sample(i).labels for i in some), n)
                maps = [retrieval_scores(learn.model, judge.image(i), index, n).argmax(0).byte().cpu().numpy() for i in range(len(judge))]
                row['miou_retrieval'] = sum(score(maps, judge, progress=False), Confusion(n)).mean_iou(present_only=True) # of at most 100 images
            rows.add(**row)
        rows.attempt(name, one)


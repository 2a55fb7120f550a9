"""What the processes of the suite do: small, the same each time, and told as JSON."""
import hashlib
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback

from spml_kit.look.annotate import Annotator
from spml_kit.data.batches import weak_dls
from spml_kit.core import UNLABELLED, VOC_CLASSES, VOID, SpmlError
from spml_kit.data.images import FolderSet, SceneSet, folder_sets
from spml_kit.data.weak import WeakSet
from spml_kit.look.drawings import class_table
from spml_kit.method.nets import EmbedNet, SegNet, SoftmaxHead
from spml_kit.runs.experiment import copy_run
from spml_kit.files import save_tensors, write_index_png, write_json
from spml_kit.pictures import read_image
from spml_kit.data.formats import read_annotation
from spml_kit.learn.learner import spml_learner
from spml_kit.regions.oversegment import RegionCache, prepare_regions
from spml_kit.runs.pipelines import Pipeline
from spml_kit.method.recipes import RECIPES
from spml_kit.runs.shards import load_shards, sharded_index, sharded_pseudo_labels, trained_model
from spml_kit.runs.workers import local_client
from spml_kit.runs.sweep import run_state
from spml_kit.runs.tables import collect_runs, sweep_table

CLASSES = ["background", "cat", "dog"]
TINY = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8, grid=(2, 2),
    infer_grid=(3, 3), iterations=2, bs=2, crop=32, warmup=1)
N, SIZE, C = 8, 48, 13 # of the sharded set


def answer(words):
    "Do what is asked and write down how it went"
    name, kwargs, path = words
    torch.set_num_threads(1)
    try: said = dict(value=globals()[name](**kwargs), error=None, kinds=[], message="")
    except Exception as e: said = dict(value=None, error=type(e).__name__, kinds=[c.__name__ for c in type(e).__mro__],
        message=str(e))
    Path(path).write_text(json.dumps(said))


def go(words):
    "Do what is asked until the end, or until somebody kills this process"
    name, kwargs = words
    torch.set_num_threads(1)
    globals()[name](**kwargs)


def die_at(k, folder):
    "End this process at its k-th change of a file below the folder, before the change is made"
    folder, seen = os.path.realpath(folder), [0]
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
        "shutil.rmtree", "shutil.move"}

    def hook(event, args):
        changing = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if event == "open" else event in changes
        if not changing: return
        if not isinstance(args[0], (str, os.PathLike)) or not os.path.abspath(args[0]).startswith(folder): return
        if seen[0] == k: os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += 1
    sys.addaudithook(hook)


def digest(*arrays):
    total = hashlib.sha256()
    for a in arrays:
        a = np.ascontiguousarray(a)
        total.update(f"{a.dtype}{a.shape}".encode() + a.tobytes())
    return total.hexdigest()[:16]


# regions

def regions(images, folder, n=9, workers=0, die=None):
    if die is not None: die_at(die, folder)
    images = FolderSet(images, classes=CLASSES)
    cache = prepare_regions(images, folder, n=n, workers=workers, progress=False)
    return [digest(cache.read(name)) for name in images.names]


def read_regions(images, folder):
    images = FolderSet(images, classes=CLASSES)
    cache = RegionCache(folder)
    return [digest(cache.read(name)) for name in images.names]


# shards

def net():
    torch.manual_seed(0)
    return SegNet(EmbedNet("test_resnet", 8, pretrained=False), SoftmaxHead(8, C)).eval()


def banded(i):
    m = ((np.arange(SIZE*SIZE).reshape(SIZE, SIZE)//500 + i) % C).astype(np.uint8)
    m[:12, :12], m[40:, 40:] = UNLABELLED, VOID
    return m


def banded_set(): return WeakSet(SceneSet(N, size=SIZE, masks=False), banded, regions=8)


def index_digest(index): return digest(*(getattr(index, k).numpy() for k in ("mu", "label", "image", "row")))


def index(folder, workers=0, die=None):
    if die is not None: die_at(die, folder)
    if not workers: return index_digest(sharded_index(net(), banded_set(), folder, per=2, grid=(3, 3), progress=False))
    with local_client(workers) as client: return index_digest(sharded_index(net(), banded_set(), folder, client, per=2,
        grid=(3, 3), progress=False))


def load_index(folder): return index_digest(load_shards(folder))


def pseudo(folder, die=None):
    if die is not None: die_at(die, folder)
    maps = sharded_pseudo_labels(net(), banded_set(), folder, per=2, steps=3, refine=("regions",), progress=False)
    return [digest(maps(i)) for i in range(N)]


# training

def learner(folder):
    dls = weak_dls(WeakSet(SceneSet(4, size=32), "scribbles", regions=6), SceneSet(1, size=32, start=100), bs=2,
        crop=32, steps=2, device="cpu")
    learn = spml_learner(dls, recipe=TINY, path=Path(folder))
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def model_digest(model): return digest(*(v.numpy() for _, v in sorted(model.state_dict().items())))


class Keep(Callback):
    "Keeps the checkpoint of an earlier round"
    order = 95
    def __init__(self, rounds): self.rounds = rounds
    def after_epoch(self):
        if self.epoch + 1 == self.rounds: shutil.copy(self.path/"checkpoint.safetensors", self.path/"kept")


def train(folder, rounds=3, keep=None):
    learn = learner(folder)
    learn.fit_poly(rounds, resume=True, cbs=[Keep(keep)] if keep else None)
    return [model_digest(learn.model), learn.history]


def network(checkpoint): return model_digest(trained_model(checkpoint))


def pipeline(folder):
    weak = WeakSet(SceneSet(3, size=32), "scribbles", regions=6)
    p = Pipeline(weak, SceneSet(1, size=32, start=100), "scribbles", folder, TINY, rounds=1, steps=1, walk_stride=8,
        progress=False)
    return p.run(only=("embedding", "walk")).done


# runs and sweeps

def state(folder): return run_state(folder)
def table(folder): return json.loads(sweep_table(folder).to_json())
def collected(folder): return sorted(collect_runs(folder).miou.tolist())
def copied(folder, url): copy_run(folder, url)


# one's own folder

def sample(root):
    s = WeakSet(folder_sets(root)[0], Path(root)/"labels").sample(0)
    return digest(s.image, s.labels)


def image(path): return digest(read_image(path))
def names_of(folder): return list(class_table(folder).names)
def annotation(path): return digest(read_annotation(path).to_labels((40, 56), path))


# writers

def write(kind, path, size, before_rename=None):
    "A file of about so many bytes that cannot be packed"
    if before_rename:
        sys.addaudithook(lambda event, _: event == "os.rename" and os.kill(os.getpid(), getattr(signal, before_rename)))
    noise = np.random.default_rng(size).integers(0, 256, (max(1, size//64), 64))
    if kind == "json": write_json(path, dict(noise=noise.tobytes().hex()[:size]))
    elif kind == "tensors": save_tensors(path, dict(noise=torch.from_numpy(noise.astype(np.uint8))), size=size)
    else: write_index_png(path, noise.astype(np.uint8), VOC_CLASSES.palette)



# drawings

def act(a, step):
    kind, *more = step
    if kind == "stroke": a.add_stroke([(5, more[0]), (20, more[0])], more[1])
    elif kind == "point": a.add_point(*more)
    elif kind == "box": a.add_box(more[0], more[1])
    elif kind == "tag": a.set_tag(more[0], more[1])
    elif kind == "erase": a.erase(*more)
    else: a.undo(redo=kind == "redo")


def draw(folder, before, last, die=None):
    "Some steps, and one more, in which this process may end; the marks before and after it"
    a = Annotator(folder, CLASSES)
    for step in before: act(a, step)
    marks = marks_of(a)
    if die is not None: die_at(die, folder)
    act(a, last)
    return [marks, marks_of(a)]


def marks_of(a): return json.loads(json.dumps(list(a.marks)))


def draw_on(folder, seed):
    "Strokes, undone and done again, for ever"
    a, rng = Annotator(folder, CLASSES), random.Random(seed)
    while True:
        if rng.random() < .5 and len(a.marks) < 4: act(a, ("stroke", rng.randrange(1, 35), rng.randrange(3)))
        else: act(a, (rng.choice(("undo", "undo", "redo")),))
        print(len(a.marks), flush=True)


def open_drawing(folder):
    a = Annotator(folder, CLASSES)
    return dict(failed=a.failed, status=a.status, marks=marks_of(a),
        labels=None if a.labels is None else digest(a.labels))


def full_drawing(folder):
    "A stroke on a full disk, as the page draws it"
    a = Annotator(folder, CLASSES)
    marks = marks_of(a)
    a._receive(dict(do="add", index=a.index, id="page:1", mark=dict(kind="scribbles", xy=[[5, 9], [20, 9]], c=1)))
    return dict(status=a.status, same=marks_of(a) == marks)


def refused_when_drawn_on(folder, steps):
    "Each step, whatever comes of it"
    a, told = Annotator(folder, CLASSES), []
    for step in steps:
        try: act(a, step)
        except SpmlError as e: told.append(str(e))
    return told

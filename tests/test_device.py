"""The kit on a device that is not the CPU: training, prediction, retrieval, pseudo-labels and the CRF loss never mix devices, give the CPU's numbers, and make the host wait no more than they must. On a simulated device, in processes of their own."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PREPARE = """
import json, os, sys, warnings
warnings.filterwarnings("ignore")
import simulated_device as sd
import numpy as np, torch
from fastai.callback.core import Callback
from spml_kit.data.batches import weak_dls
from spml_kit.infer.crf_loss import CrfCrossEntropy
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.learn.learner import spml_learner
from spml_kit.method.recipes import RECIPES

RECIPE = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8, grid=(3, 3), iterations=5, bs=2, crop=64, warmup=2, dropout=0., memory=1,
                              relations=dict(cooccurrence=dict(anchors=1.))) # nothing drawn at random
HERE = torch.device("gpu:0")

class Count(Callback):
    "Waits of the last step, when the memory bank is full"
    order = -100
    def last(self): return self.training and self.iter == len(self.dls.train) - 1
    def before_batch(self):
        if self.last(): sd.waits.clear(); sd.operations.clear(); sd._counting[0] = True

class Stop(Count):
    order = 1000
    def after_batch(self):
        if self.last(): sd._counting[0] = False; self.learn.waits, self.learn.kernels = {" ".join(k): n for k, n in sd.waits.items()}, sd.operations["kernel"]

def trained(annotation, device, steps=3, method="spml"):
    marks = "points" if annotation == "keypoints" else annotation
    weak = WeakSet(SceneSet(8, size=64), marks, regions=8)
    dls = weak_dls(weak, SceneSet(2, size=64, start=100), bs=2, crop=64, steps=steps, device=device)
    learn = spml_learner(dls, annotation, method, RECIPE)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    learn.model.to(device) # before there is an optimiser: a module that moves to the simulated device gets new parameters
    learn.fit_poly(1, cbs=[Count(), Stop()])
    return learn, weak

def told(learn): return dict(history=learn.history[0], waits=learn.waits, kernels=learn.kernels)
"""

TRAINING = """
if os.environ.get("TRITON_INTERPRET"): sd.interpret_kernels()
found = {}
for annotation in ("scribbles", "keypoints"):
    os.environ.pop("SPML_FUSED", None)
    found[annotation] = told(trained(annotation, HERE)[0])
    os.environ["SPML_FUSED"] = "0"
    found[annotation]["cpu"] = trained(annotation, torch.device("cpu"))[0].history[0]
print(json.dumps(found))
"""

AFTERWARDS = """
from spml_kit.infer.scores import predict_head, predict_retrieval, training_index
from spml_kit.infer.pseudo import pseudo_labels
found = {}
for device in (HERE, torch.device("cpu")):
    learn, weak = trained("scribbles", device, 2)
    model, images = learn.model, weak.images
    some = [images.image(i) for i in range(3)]
    labels = [weak.sample(i).labels for i in range(3)]
    index = training_index(model, some, labels, len(images.classes), grid=(4, 4))
    small = WeakSet(SceneSet(2, size=64), "scribbles", regions=8)
    one = dict(head=predict_head(model, some[0], scales=(1., .5), flip=True), retrieval=predict_retrieval(model, some[0], index, len(images.classes), k=5, grid=(4, 4)),
               walk=pseudo_labels(model, small, progress=False, steps=4), nearest=pseudo_labels(model, small, progress=False, steps=4, start="nearest", grid=(4, 4)))
    crf, _ = trained("points", device, 2, CrfCrossEntropy(2.))
    found[device.type] = dict(maps={k: np.asarray(v).tolist() for k, v in one.items()}, segments=index.mu.cpu().tolist(), crf=told(crf))
print(json.dumps(found))
"""


PARTS = """
import json, torch
import simulated_device as sd
from spml_kit.infer.crf import Kernel
from spml_kit.infer.crf_loss import crf_disagreement
from spml_kit.method.nets import unit
from spml_kit.infer.scores import majority_labels, stream_segments
from spml_kit.method.relations import nearest_labels
from spml_kit.infer.retrieval import nearest
from spml_kit.method.segments import cut_segments, grid_labels, spherical_kmeans
g = torch.Generator().manual_seed(0)
rand = lambda *size: torch.rand(size, generator=g, dtype=torch.float64)
ints = lambda n, *size: torch.randint(n, size, generator=g)
grad = lambda total, x: (total.detach(), torch.autograd.grad(total, x)[0])
u, mu = unit(rand(3, 130, 5) - .5), unit(rand(90, 4) - .5)
mu[50:60] = mu[40:50] # equally near
label, image = torch.where(rand(90) < .3, ints(5, 90), 254), torch.arange(90)//15
label[15:30] = 254 # nobody gives
crf = lambda p, images, counts: grad(crf_disagreement(p, images, Kernel(1., 3., 40.), counts), p)
jobs = {f"kmeans of {elements} at a time": (lambda u, start, valid, elements=elements: spherical_kmeans(u, start, 7, 6, valid, elements).masked_fill(~valid, 0), u, ints(7, 130), rand(3, 130) < .8) for elements in (None, 100, 2000)}
jobs |= {f"nearest labels, {across}, {threshold}": (lambda *a, o=(threshold, across): nearest_labels(*a, *o), mu, label, image) for across in (False, True) for threshold in (-1, .9)}
jobs |= {"nothing labelled": (nearest_labels, mu, label*0 + 254, image), "nobody": (nearest_labels, mu[:0], label[:0], image[:0]),
         "cut": (cut_segments, ints(9, 400), ints(256, 400), ints(65_536, 400), ints(3, 400).sort()[0]), "grid": (lambda o: grid_labels(13, 40, (3, 7), o.device), mu),
         "retrieval": (lambda q, mu: nearest(q, mu, 6), mu[::3], mu), "retrieval, in pieces": (lambda q, mu: nearest(q, mu, 6, 40), mu[::3], mu),
         "majority": (lambda labels, own: majority_labels(labels, own, 9), ints(256, 400), ints(9, 400)),
         "segments of five images": (lambda v: tuple(o for pair in stream_segments(v, (3, 3), 6) for o in pair), unit(rand(5, 4, 13, 9) - .5, 1)),
         "crf": (crf, unit(rand(3, 4, 9, 7), 1).requires_grad_(), rand(3, 3, 18, 14).float(), rand(3, 9, 7) < .9)}
found = {}
for name, (job, *tensors) in jobs.items():
    here = [t.detach().to("gpu:0").requires_grad_(t.requires_grad) for t in tensors]
    with sd.counting(): got = job(*here)
    found[name] = sum(sd.waits.values())
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (got, job(*tensors))), strict=True):
        assert a.device.type == "gpu", name
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-6, atol=1e-6, msg=lambda m: f"{name}: {m}")
print(json.dumps(found))
"""


def run(script, prepare=PREPARE, **env):
    "What a script prints, as JSON"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", prepare + script], env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def same_history(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items(): assert value == pytest.approx(other[name], rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize("form", ["kernels", "chunked"])
def test_training(form):
    "Kernels in Triton's interpreter, and the chunked form; by hand 6 and 22 waits a step"
    if form == "kernels": pytest.importorskip("triton")
    found = run(TRAINING, **(dict(TRITON_INTERPRET="1") if form == "kernels" else dict(TRITON_INTERPRET="", SPML_FUSED="")))
    for annotation, most in dict(scribbles=12, keypoints=20).items():
        r = found[annotation]
        same_history(r["history"], r["cpu"])
        assert r["kernels"] == (9 if form == "kernels" else 0), annotation # three of each relation
        assert sum(r["waits"].values()) <= (most if form == "kernels" else 26), r["waits"]


def test_prediction_and_crf_loss():
    found = run(AFTERWARDS, TRITON_INTERPRET="")
    one, other = found["gpu"], found["cpu"]
    for name, m in one["maps"].items(): # borders may go either way where scores are nearly equal
        flat = [json.dumps(o).replace("[", "").replace("]", "").split(",") for o in (m, other["maps"][name])]
        assert sum(a == b for a, b in zip(*flat, strict=True)) >= .99*len(flat[0]), name
    assert len(one["segments"]) == len(other["segments"])
    same_history(one["crf"]["history"], other["crf"]["history"])
    assert sum(one["crf"]["waits"].values()) <= 10, one["crf"]["waits"]


def test_parts_agree_with_the_cpu():
    "Also where the form on a GPU is another than on a CPU"
    waits = run(PARTS, prepare="")
    for name, n in waits.items():
        if name.startswith(("kmeans", "nearest labels", "nobody", "nothing", "grid", "majority")): assert n == 0, (name, n)
    assert waits["cut"] <= 3 and waits["crf"] <= 6 and waits["retrieval"] <= 6 and waits["segments of five images"] <= 2, waits # the grid goes there once; how many segments there are


def test_the_device_refuses_and_counts():
    found = run("""
import json, torch
import simulated_device as sd
HERE, refused = torch.device("gpu:0"), []
for mix in (lambda a, b: a + b, lambda a, b: torch.cat([a, b]), lambda a, b: b.index_add(0, a.long(), b), lambda a, b: a.numpy()):
    try: mix(torch.ones(3, device=HERE), torch.ones(3))
    except (RuntimeError, TypeError) as e: refused.append(type(e).__name__)
x = torch.arange(4., device=HERE)
with sd.counting():
    x[x > 1]
    float(x.sum())
    (x + 1).max(0)
    x.cpu()
print(json.dumps(dict(refused=refused, waits={k: n for (k, _), n in sd.waits.items()})))
""", prepare="")
    assert found == dict(refused=["RuntimeError"]*3 + ["TypeError"], waits={"bool index": 1, "_local_scalar_dense": 1, "copy": 1})

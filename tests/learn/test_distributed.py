"Several processes with a part of each batch against one with the whole: gather, batches, losses, gradients, memory, training, resumption, launchers, faults."
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from conftest import assert_equal, quiet, random_batch, weights
from spml_kit.data.batches import weak_dls
from spml_kit.cams.classifier import TAG_RECIPE, tag_learner
from spml_kit.core import SpmlError
from spml_kit.files import save_tensors
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.learn.distributed import all_mean, gather, gather_segments, join_processes, world_size, rank
from spml_kit.learn.losses import SpmlLoss
from spml_kit.learn.checkpoint import load_run
from spml_kit.learn.learner import spml_learner
from spml_kit.learn.head import head_learner
from spml_kit.method.recipes import RECIPES
from spml_kit.neighbours.adaptive import AdaptiveLoss
from spml_kit.method.relations import Relation, feature_affinity, image_similarity, same_class, semantic_annotation, semantic_cooccurrence

ROOT = Path(__file__).parents[2]
TINY = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8, grid=(3, 3), iterations=3, bs=4, crop=64, warmup=2,
                            relations=dict(cooccurrence=dict(anchors=.5)), dropout=.5)
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without Gloo")


# processes

def _process(k, n, port, out, task, args):
    os.environ |= dict(RANK=str(k), LOCAL_RANK=str(k), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        join_processes()
        torch.save(task(*args), out/f"{k}.pt")
        dist.destroy_process_group()
    except BaseException:
        (out/f"{k}.txt").write_text(traceback.format_exc())
        raise


def spread(out, task, *args, n=2):
    "What each of n processes, joined as a launcher's are, returns from a task"
    context = multiprocessing.get_context("forkserver") # libraries are imported once
    context.set_forkserver_preload(["spml_kit.learn.learner", "spml_kit.data.batches", "spml_kit.cams.classifier"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    everyone = [context.Process(target=_process, args=(k, n, port, out, task, args), daemon=True) for k in range(n)]
    for p in everyone: p.start()
    until = time.monotonic() + 300
    while any(p.exitcode is None for p in everyone) and not any(p.exitcode for p in everyone) and time.monotonic() < until: time.sleep(.05)
    for p in everyone: # whoever still waits, waits in vain
        if any(q.exitcode != 0 for q in everyone): p.kill()
        p.join()
    assert [p.exitcode for p in everyone] == [0]*n, "\n".join(f.read_text() for f in sorted(out.glob("*.txt"))) or "no answer"
    return [torch.load(out/f"{k}.pt", weights_only=False) for k in range(n)]


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# gather

SIZES, DTYPES = (3, 0, 2), (torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)


def rows(k, dtype, shape=(4,)):
    return (torch.arange(SIZES[k]*4).view(SIZES[k], *shape) % 3 + k).to(dtype)


def gather_rows():
    values = [gather(rows(rank(), d)) for d in DTYPES]
    x = rows(rank(), torch.float64, (2, 2)).requires_grad_()
    (gather(x)**(rank() + 2)).sum().backward()
    return values, x.grad


def test_gather_is_concatenation_with_gradient(tmp_path):
    answers = spread(tmp_path, gather_rows, n=3)
    for values, _ in answers:
        for d, v in zip(DTYPES, values):
            want = torch.cat([rows(k, d) for k in range(3)])
            assert v.dtype == d and torch.equal(v, want)
    x = torch.cat([rows(k, torch.float64, (2, 2)) for k in range(3)]).requires_grad_()
    sum((x**(k + 2)).sum() for k in range(3)).backward() # the losses of all processes
    close(torch.cat([g for _, g in answers]), x.grad, 1e-12)


def test_one_process_is_left_alone():
    from spml_kit.method.segments import make_segments
    x, seg = torch.rand(2, 3), make_segments(*random_batch(), (2, 2), 1)
    assert gather(x) is x and gather_segments(seg) is seg and (rank(), world_size()) == (0, 1)


# batches

def scenes(n=9, bs=4, steps=2, valid=6, annotation="scribbles", **kwargs):
    return weak_dls(WeakSet(SceneSet(n, size=64), annotation, regions=12), SceneSet(valid, size=64, start=100), bs=bs, crop=64, steps=steps, device="cpu", **kwargs)


@pytest.mark.parametrize("n, workers", [(1, 0), (2, 0), (4, 2)])
def test_parts_make_the_batch(n, workers):
    whole, parts = scenes(), []
    for k in range(n):
        dls = scenes(num_workers=workers)
        dls.train.process = dls.valid.process = k, n
        parts.append((list(dls.train), list(dls.valid)))
        assert len(dls.train) == len(parts[-1][0]) == 2 and dls.train.round == 1
    for want, *own in zip(whole.train, *(p[0] for p in parts)):
        for a, b in zip(want, zip(*own)): assert torch.equal(a, torch.cat(b))
    scored = torch.cat([b[0] for p in parts for b in p[1]])
    assert len(scored) == 6 # the last batch is smaller, and may have nothing for some
    assert len({o.numpy().tobytes() for o in scored} & {o.numpy().tobytes() for b in whole.valid for o in b[0]}) == 6


# the loss

RELATIONS = [semantic_annotation(), semantic_cooccurrence(), image_similarity(), feature_affinity(), Relation("own", same_class, 8, .3, scope="batch")]


def batch(seed, annotated):
    emb, labels, regions, tags = random_batch(seed, n_images=4)
    if annotated == "first": labels[1:][labels[1:] < 254] = 254 # one process has no label
    if annotated == "nowhere": labels[labels < 254] = 254
    if annotated == "void": labels[2:] = 255 # one process has no pixel
    return emb, torch.randn(4, 4, 9, 8, generator=torch.Generator().manual_seed(seed)), labels, regions, tags


def steps_of(loss, annotated, steps=4):
    "Losses, gradients, means and memory of some steps"
    values, grads, part = [], [], slice(4*rank()//world_size(), 4*(rank() + 1)//world_size())
    for step in range(steps):
        emb, logits, *maps = [o[part] for o in batch(step, annotated)]
        emb, logits = emb.requires_grad_(), logits.requires_grad_()
        value = loss((emb, logits), *maps)
        value.backward()
        loss.after_step()
        values.append(float(all_mean(value.detach())))
        grads.append([gather(o.grad)/world_size() for o in (emb, logits)]) # as DistributedDataParallel averages them
    return values, grads, loss.means(), loss.bank.state_dict()


ANNOTATED = "some", "first", "nowhere", "void"


def all_steps():
    return [steps_of(SpmlLoss(RELATIONS, (2, 2), 3, memory=2, head_weight=.7), a) for a in ANNOTATED]


@pytest.mark.parametrize("n", [2, 4])
def test_loss_and_gradient_of_the_whole_batch(tmp_path, n):
    answers = spread(tmp_path, all_steps, n=n)
    for a, want, *got in zip(ANNOTATED, all_steps(), *answers):
        for values, grads, means, bank in got:
            assert values == pytest.approx(want[0], rel=1e-5), a
            close(grads, want[1])
            assert means == pytest.approx(want[2], rel=1e-5), a
            assert_equal(bank, got[0][3]) # the memory is the same everywhere, to the last bit
            close(bank, want[3])


# training

def adaptive(n):
    "The adaptive loss of this process's images, and its slope"
    g = torch.Generator().manual_seed(0)
    logits, labels = 3*torch.randn(4, 3, 6, 5, generator=g, dtype=torch.float64), torch.randint(0, 3, (4, 6, 5), generator=g)
    labels[2:][torch.rand(2, 6, 5, generator=g) < .8] = 254 # the second half knows little
    part = slice(None) if n == 1 else slice(2*rank(), 2*rank() + 2)
    logits, loss = logits[part].requires_grad_(), AdaptiveLoss(warmup=0.).train()
    value = loss((None, logits), labels[part], None, None)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def test_the_adaptive_loss_of_the_whole_batch(tmp_path):
    (whole, slope), parts = adaptive(1), spread(tmp_path, adaptive, 2)
    close(torch.stack([v for v, _ in parts]).mean(), whole)
    close(torch.cat([g for _, g in parts])/2, slope)


def learner(kind, path, recipe=TINY, **kwargs):
    dls = scenes(**kwargs) if kind not in ("cam", "seam") else weak_dls(WeakSet(SceneSet(9, size=64, masks=False), "tags"),
        WeakSet(SceneSet(6, size=64, start=100, masks=False), "tags"), bs=4, crop=64, steps=2, device="cpu")
    if kind in ("cam", "seam"): return quiet(tag_learner(dls, kind, TAG_RECIPE.but(optimiser=recipe.optimiser, warmup=2), net=dict(backbone="test_resnet", pretrained=False), path=path))
    learn = spml_learner(dls, method="cross_entropy" if kind == "head" else kind, recipe=recipe, path=path)
    if kind == "head": learn = head_learner(dls, learn.model, recipe, path=path)
    return quiet(learn)


KINDS = "spml", "cross_entropy", "head", "cam", "seam"
PLAIN = TINY.but(optimiser="sgd", lr=3e-3) # Adam takes the sign of a gradient that is all rounding


def train_each(path):
    answers = {}
    for kind in KINDS:
        learn = learner(kind, path/kind, PLAIN)
        with mock.patch("spml_kit.learn.checkpoint.save_tensors", wraps=save_tensors) as writes: learn.fit_poly(2, checkpoint=True)
        answers[kind] = weights(learn), learn.history, [list(v) for v in learn.recorder.values], learn.dls.train.process, len(list(learn.dls.valid)), writes.call_count
    return answers


def test_training_is_that_of_one_process(tmp_path):
    one, two = spread(tmp_path/"out", train_each, tmp_path/"two")
    alone = train_each(tmp_path/"one")
    for kind in KINDS:
        assert_equal(one[kind][0], two[kind][0])
        assert one[kind][1:-1] == two[kind][1:-1] # history and what fastai records, known to both
        assert (one[kind][-1], two[kind][-1]) == (2, 0) # written by one
        close(one[kind][0], alone[kind][0])
        for row, want in zip(one[kind][1], alone[kind][1], strict=True): assert row == pytest.approx(want, rel=1e-4), kind
        assert one[kind][3:-1] == ((0, 1), 2) # afterwards loaders give whole batches again
        assert [p.name for p in (tmp_path/"two"/kind).iterdir()] == ["checkpoint.safetensors"]


class Interrupted(Exception): pass


def resume(path):
    "A run of three rounds, and one that breaks off in the second and goes on, with dropout and drawn anchors"
    from fastai.callback.core import Callback
    class Stop(Callback):
        def before_batch(self):
            if (self.epoch, self.iter) == (1, 1): raise Interrupted("by the test")
    make = lambda name: learner("spml", path/name)
    whole, broken, resumed = make("whole"), make("broken"), make("broken")
    whole.fit_poly(3)
    try: broken.fit_poly(3, checkpoint=True, cbs=Stop())
    except Interrupted: pass
    draws = torch.get_rng_state()
    resumed.fit_poly(3, resume=True)
    return weights(whole), whole.history, weights(resumed), resumed.history, draws


def test_resume(tmp_path):
    one, two = spread(tmp_path/"out", resume, tmp_path/"run")
    for whole, history, resumed, again, _ in (one, two):
        assert_equal(whole, resumed)
        assert history == again and len(history) == 3
    assert_equal(one[0], two[0]) # batch norm's statistics included
    assert torch.equal(one[4], two[4]) # each draws for the whole batch


def checkpoints(path, rounds, recipe=PLAIN):
    learn = learner("spml", path, recipe)
    learn.fit_poly(rounds, checkpoint=True)
    return weights(learn)


def test_one_process_goes_on_with_the_checkpoint_of_two_and_the_other_way(tmp_path):
    spread(tmp_path/"out", checkpoints, tmp_path/"two", 1)
    alone = checkpoints(tmp_path/"one", 1)
    for name in ("one", "two"):
        fresh = learner("spml", tmp_path/name, PLAIN)
        fresh.settings = fresh.settings | dict(rounds=1, steps=2, lr=PLAIN.lr)
        assert load_run(fresh, tmp_path/name/"checkpoint.safetensors") == 1
        close(weights(fresh), alone)
    for state in spread(tmp_path/"back", reload, tmp_path/"one"): close(state, alone)


def reload(path):
    learn = learner("spml", path, PLAIN)
    learn.fit_poly(1, resume=True) # complete
    return weights(learn)


# launchers

LAUNCHERS = {"python": ("{bin}/python",), "torchrun": ("{bin}/torchrun", "--standalone", "--nproc-per-node", "2"),
             "accelerate": ("{bin}/accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")}


@pytest.mark.parametrize("launcher", [pytest.param(k, marks=[] if k == "torchrun" else pytest.mark.long) for k in LAUNCHERS])
def test_the_script_of_the_tutorial(tmp_path, launcher):
    cells = json.loads((ROOT/"nbs"/"tutorials"/"several_machines.ipynb").read_text())["cells"]
    (tmp_path/"train.py").write_text(next(s for c in cells for s in re.findall(r"```python\n(.*?)```", "".join(c["source"]), re.S) if "join_processes()" in s))
    command = [o.format(bin=Path(sys.executable).parent) for o in LAUNCHERS[launcher]]
    if not Path(command[0]).exists(): pytest.skip(f"{launcher} is not installed")
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run([*command, "train.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.findall("round ./2|mIoU", done.stdout) == ["round 1/2", "round 2/2", "mIoU"] # one process speaks
    assert [p.name for p in (tmp_path/"runs"/"several").iterdir()] == ["checkpoint.safetensors"]


# faults

def faults():
    messages = []
    for kwargs in dict(bs=3), dict(valid=1):
        try: learner("spml", ".", TINY, **kwargs).fit_poly(1)
        except SpmlError as e: messages.append(str(e))
    try:
        import fastai.distributed # noqa: F401, gives `distrib_ctx`; needs accelerate
        with learner("spml", ".").distrib_ctx() as learn: learn.fit_poly(1)
    except SpmlError as e: messages.append(str(e))
    except ImportError: messages.append("distrib_ctx: no accelerate")
    return messages


def test_faults(tmp_path, monkeypatch):
    for messages in spread(tmp_path, faults):
        for message, want in zip(messages, ("batches of 3 from 9 images cannot be shared by 2", "batches of 4 from 1 image cannot be shared by 2", "distrib_ctx"), strict=True): assert want in message
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SpmlError, match="2 processes were launched, but are not connected: call join_processes"): learner("spml", tmp_path).fit_poly(1)

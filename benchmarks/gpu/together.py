"""Two processes by torchrun, a GPU for each: are they right, how fast are they, do they learn? What one process gives
alone is beside it."""
import subprocess
import sys
import tempfile
import time

import torch
from fastai.callback.core import Callback
from torch import nn

import learn as photographs
from right import SMALL, farthest, with_regions
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.learn.distributed import all_mean, gather, join_processes, world_size, rank
from spml_kit.learn.losses import SpmlLoss
from spml_kit.learn.learner import spml_learner
from spml_kit.method.recipes import RECIPES
from spml_kit.method.relations import feature_affinity, image_similarity, semantic_annotation, semantic_cooccurrence


def of_a_loss(dry, device):
    "Losses of three steps, gradients and memory: each process has its part of the images"
    B, D, h = (4, 8, 8) if dry else (16, 64, 64)
    loss, found = SpmlLoss([semantic_annotation(), semantic_cooccurrence(), image_similarity(), feature_affinity()],
                           (3, 3), 3), []
    mine = slice(rank()*B//world_size(), (rank() + 1)*B//world_size())
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        emb, logits = torch.randn(B, D, h, h, generator=g), torch.randn(B, 5, h, h, generator=g)
        labels, regions = (torch.randint(k, (B, h, h), generator=g) for k in (5, 6))
        tags = torch.rand(B, 5, generator=g) < .4
        labels[torch.rand(B, h, h, generator=g) < .5] = 254
        emb, logits, labels, regions, tags = (o[mine].to(device) for o in (emb, logits, labels, regions, tags))
        value = loss((emb.requires_grad_(), logits.requires_grad_()), labels, regions, tags)
        value.backward()
        loss.after_step()
        # as they are averaged in training
        found += [all_mean(value.detach()).view(1), *(gather(o.grad)/world_size() for o in (emb, logits))]
    return [o.cpu() for o in (*found, *loss.bank.state_dict().values()) if o.is_floating_point()]


class Clock(Callback):
    "Seconds from the third step to the last, of the first round"
    def before_batch(self):
        if self.training and self.epoch == 0 and self.iter == 2: self.begun = self.now()
    def after_batch(self):
        if self.training and self.epoch == 0 and self.iter == self.n_iter - 1:
            self.seconds = (self.now() - self.begun)/(self.n_iter - 2)
    def now(self):
        if next(self.model.parameters()).is_cuda: torch.cuda.synchronize()
        return time.perf_counter()


def of_a_run(folder, name, dry, device):
    "Trained weights on scenes, and seconds a step"
    changes = dict(bs=16, crop=512) if name == 'paper_voc' else dict(bs=16, crop=128, embed=dict(pretrained=False))
    if dry: changes = SMALL | dict(bs=4, crop=64)
    # Adam takes the sign of a gradient that is all rounding
    nothing_drawn = dict(dropout=0., relations=dict(cooccurrence=dict(anchors=1.)), optimiser='sgd', lr=3e-3)
    recipe = RECIPES['small' if dry else name].but(**changes | nothing_drawn, warmup=2)
    weak = with_regions(SceneSet(8 if dry else 16, size=recipe.crop), 'scribbles', 12, f'{folder}/{name}/{rank()}')
    learn = spml_learner(weak_dls(weak, weak.images.take(4), bs=recipe.bs, crop=recipe.crop, steps=4 if dry else 12,
                                  num_workers=0 if dry else 4, device=torch.device(device)), recipe=recipe)
    # torch takes statistics over several processes on GPUs only
    if dry: learn.model.head[1] = nn.GroupNorm(1, learn.model.head[1].num_features)
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(1, cbs=(clock := Clock()))
    return learn, clock.seconds, recipe.bs


def of_photographs(dry, device):
    learn = photographs.learner('spml', dry, device, 2 if dry else 50)
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(1 if dry else 2)
    return time.perf_counter() - start, learn.history


def everything(folder, dry, device):
    "What one process, or each of two, finds"
    said = dict(processes=world_size(), runs={}, right={'loss': of_a_loss(dry, device)})
    for name in ('small',) if dry else ('small', 'paper_voc'):
        learn, seconds, images = of_a_run(folder, name, dry, device)
        said['runs'][name] = dict(ms=1e3*seconds, images_a_second=images/seconds)
        if name == 'small': said['right']['weights'] = [p.detach().float().cpu() for p in learn.model.parameters()]
    said['learn'] = of_photographs(dry, device)
    return said


def process(folder, dry):
    "One of those that torchrun has started"
    join_processes()
    torch.set_num_threads(1 if dry else 4)
    said = everything(folder, dry, 'cpu' if dry else f'cuda:{torch.cuda.current_device()}')
    if rank() == 0: torch.save(said, f'{folder}/two.pt')


def main(rows):
    n = 2 if rows.dry else torch.cuda.device_count()
    if n < 2: return rows.add(skipped='together', why=f'{n} GPU here, and two are needed')
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', __file__,
                folder, *(['--dry'] if rows.dry else [])]
        done = subprocess.run(call, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            why = [line for line in done.stderr.splitlines() if 'Error' in line] or [f'ended with {done.returncode}']
            raise RuntimeError(f'torchrun: {why[0]}')
        two, one = torch.load(f'{folder}/two.pt', weights_only=False), everything(folder, rows.dry, rows.device)
    for name, most in dict(loss=1e-4, weights=.05).items():
        rows.add(check=name, processes=two['processes'], off=(o := farthest(two['right'][name], one['right'][name])),
                 right=o < most)
    for name, run in one['runs'].items():
        rows.add(step=name, ms_of_one=run['ms'], ms_of_two=two['runs'][name]['ms'],
                 images_a_second_of_one=run['images_a_second'],
                 images_a_second_of_two=two['runs'][name]['images_a_second'])
    (alone, history), (both, ours) = one['learn'], two['learn']
    rows.add(method='spml', steps=history[-1]['steps'], seconds_of_one=alone, seconds_of_two=both,
             miou_of_one=history[-1]['miou'], miou_of_two=ours[-1]['miou'], history=ours)


if __name__ == '__main__': process(sys.argv[1], '--dry' in sys.argv[2:])

"""A training step of the CycleGAN for half-labelled sets against plain training of the same network, each in turn, in one run.

    python benchmarks/cyclegan.py                   # one thread, processor time
    python benchmarks/cyclegan.py --device cuda --size 320 --width 64 --blocks 9

A step is forward, backward and the optimiser's. Plain training sees the labelled half of a batch; beside it stands plain training on as many images as the CycleGAN sees.
"""
import os
os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = '1'
import argparse, json
from pathlib import Path

import torch

from measure import in_turns, machine, peak
from spml_kit.core import UNLABELLED, seed_everything
from spml_kit.learn.learner import create_model, spml_splitter
from spml_kit.learn.losses import CrossEntropy
from spml_kit.learn.optimisers import adamw
from spml_kit.method.recipes import RECIPES
from spml_kit.neighbours.cyclegan import CycleLoss, CycleNet, cycle_adamw, cycle_splitter

def stepper(model, loss, opt, images, labels, done=1.):
    "A function that takes one step"
    def step():
        loss.images, loss.done = images, done
        loss(model(images), labels, None, None).backward()
        opt.step()
        opt.zero_grad()
    return step

def main():
    said = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    said.add_argument('--repeats', type=int, default=9, help='steps of each that count')
    said.add_argument('--images', type=int, default=8, help='labelled images a step, and as many without labels')
    said.add_argument('--size', type=int, default=64, help='pixels')
    said.add_argument('--width', type=int, default=16, help='first filters of generator and critics')
    said.add_argument('--blocks', type=int, default=4, help='residual blocks of the generator')
    said.add_argument('--classes', type=int, default=13)
    said.add_argument('--device', default='cpu')
    said.add_argument('--out', default=str(Path(__file__).with_suffix('.json')))
    o = said.parse_args()
    if o.device == 'cpu': torch.set_num_threads(1)
    recipe, n = RECIPES['small'], o.images
    x, y = torch.rand(2*n, 3, o.size, o.size, device=o.device), torch.randint(o.classes, (2*n, o.size, o.size), device=o.device)
    half = y.clone(); half[n:] = UNLABELLED
    steps = {}
    for name, images in (('plain, labelled half', n), ('plain, as many images', 2*n)):
        seed_everything(0)
        model = create_model(recipe, o.classes, detach=False).to(o.device).train()
        steps[name] = stepper(model, CrossEntropy().train(), adamw(spml_splitter(model), recipe.lr), x[:images], y[:images])
    for name, options in (('cyclegan', {}), ('cyclegan, no critics', dict(adversarial=0.)), ('cyclegan, no cycles', dict(image_cycle=0., mask_cycle=0.))):
        seed_everything(0)
        model = CycleNet(create_model(recipe, o.classes), o.classes, o.width, o.blocks).to(o.device).train()
        loss = CycleLoss(model, **options).train()
        steps[name] = stepper(model, loss, cycle_adamw(cycle_splitter(model), recipe.lr), x, half)
    steps['cyclegan, warm-up'] = stepper(model, loss, cycle_adamw(cycle_splitter(model), recipe.lr), x, half, done=0.)
    times = in_turns(steps, o.repeats, o.device)
    memory = {name: peak(step, o.device) for name, step in steps.items()}
    first = times['plain, labelled half']
    rows = {name: dict(ms=round(1e3*t, 1), times=round(t/first, 2), peak_mib=round(memory[name])) for name, t in times.items()}
    where = machine(o.device)
    print(where)
    for name, row in rows.items(): print(f"{name:<24}{row['ms']:9.1f} ms a step {row['times']:6.2f} times plain {row['peak_mib']:6d} MiB at the peak")
    Path(o.out).write_text(json.dumps(dict(machine=where, settings={k: v for k, v in vars(o).items() if k != 'out'}, steps=rows), indent=1))

if __name__ == '__main__': main()

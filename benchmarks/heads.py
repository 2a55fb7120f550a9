"""A training step with the OCR head, and with the adaptive loss, against plain training of the same network; the loss alone for growing windows.

    python benchmarks/heads.py            # on one core, some three minutes: prints a table and writes heads.json
    python benchmarks/heads.py --device cuda --size 512 --images 16

Steps (forward, backward, optimiser) are timed in turns in one run, on a CPU as processor time; peak memory is that of a step in a process of its own.
"""
import os
os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = '1'
import argparse, json
from pathlib import Path

import torch

from measure import child, in_turns, machine, peak
from spml_kit.core import seed_everything
from spml_kit.learn.learner import create_model
from spml_kit.learn.losses import CrossEntropy
from spml_kit.method.recipes import RECIPES
from spml_kit.neighbours.adaptive import AdaptiveLoss

C = 21
WAYS = dict(plain=('softmax', CrossEntropy), ocr=('ocr', CrossEntropy),
            **{f'adaptive, radius {r}': ('softmax', lambda r=r: AdaptiveLoss(r)) for r in (1, 2)})
RADII = 0, 1, 2, 4, 8

def batch(o):
    "Images, and labels in blocks, a tenth of them void"
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, C, (o.images, o.size//16, o.size//16), generator=g)
    labels[torch.rand(labels.shape, generator=g) < .1] = 255
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return torch.rand(o.images, 3, o.size, o.size, generator=g).to(o.device), labels.to(o.device)

def prepared(way, o):
    "A function that takes one step, and its network"
    head, loss = WAYS[way]
    seed_everything(0)
    model, loss, (x, labels) = create_model(RECIPES['small'], C, False, head).to(o.device).train(), loss().train(), batch(o)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    def step():
        loss(model(x), labels, None, None).backward()
        opt.step()
        opt.zero_grad()
    return step, model

def loss_alone(loss, o):
    "A function that takes the loss and its gradient of fixed logits at stride 4"
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(o.images, C, o.size//4, o.size//4, generator=g).to(o.device).requires_grad_()
    labels, loss = batch(o)[1], loss.train()
    return lambda: loss((None, logits), labels, None, None).backward()

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--images', type=int, default=8, help='images a step')
    p.add_argument('--size', type=int, default=128, help='pixels a side, a multiple of 32')
    p.add_argument('--repeats', type=int, default=9, help='steps of each that count')
    p.add_argument('--device', default='cpu', help='cpu or cuda')
    p.add_argument('--out', default=str(Path(__file__).with_suffix('.json')), help='JSON file')
    p.add_argument('--peak', choices=WAYS, help=argparse.SUPPRESS)
    o = p.parse_args()
    torch.set_num_threads(1)
    if o.peak:
        step, _ = prepared(o.peak, o)
        return print(json.dumps(dict(mib=peak(step, o.device))))
    made = {way: prepared(way, o) for way in WAYS}
    steps = in_turns({way: step for way, (step, _) in made.items()}, o.repeats, o.device)
    losses = in_turns({'cross-entropy': loss_alone(CrossEntropy(), o), **{f'radius {r}': loss_alone(AdaptiveLoss(r), o) for r in RADII}}, o.repeats, o.device)
    said = [f'--{k}={v}' for k, v in vars(o).items() if k not in ('peak', 'out')]
    rows = [dict(what=way, seconds=s, times_plain=s/steps['plain'], peak_mib=child(__file__, *said, f'--peak={way}')['mib'],
                 head_parameters=sum(q.numel() for q in made[way][1].head.parameters())) for way, s in steps.items()]
    window = lambda r: (2*r + 1)**2
    alone = [dict(what=name, seconds=s) for name, s in losses.items()]
    for row, r in zip(alone[1:], RADII): row |= dict(window=window(r), per_offset=(row['seconds'] - losses['radius 0'])/max(window(r) - 1, 1))
    print(f"{'a step':<24}{'ms':>8}{'times plain':>13}{'peak, MiB':>11}")
    for r in rows: print(f"{r['what']:<24}{1e3*r['seconds']:8.0f}{r['times_plain']:13.2f}{r['peak_mib']:11.0f}")
    print(f"\n{'the loss alone':<24}{'ms':>8}{'window':>8}{'ms for each further pixel of it':>33}")
    for r in alone: print(f"{r['what']:<24}{1e3*r['seconds']:8.1f}{r.get('window', ''):>8}" + (f"{1e3*r['per_offset']:33.2f}" if r.get('window', 1) > 1 else ''))
    Path(o.out).write_text(json.dumps(dict(conditions=machine(o.device) | dict(images=o.images, size=o.size, classes=C), steps=rows, loss=alone), indent=1) + '\n')

if __name__ == '__main__': main()

"""Time of a training step of tag classifiers, side by side: each in turn, in one run, on one thread.

    python benchmarks/tags.py cam drs seam          # names of `TAG_METHODS`, or package.module:name
"""
import os
os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = '1'
import argparse
from functools import partial

import torch

from measure import in_turns, machine
from spml_kit.core import named_object, seed_everything
from spml_kit.cams.classifier import TAG_METHODS

def step(net, loss, x, tags):
    "One forward and backward pass"
    loss(net(x), None, None, tags).backward()
    net.zero_grad()

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('methods', nargs='*', default=['cam', 'drs'], help='the first is what the others are compared with')
    p.add_argument('--repeats', type=int, default=9, help='steps of each that count')
    p.add_argument('--images', type=int, default=8, help='images a step')
    p.add_argument('--size', type=int, default=96, help='pixels')
    o = p.parse_args()
    torch.set_num_threads(1)
    runs = {}
    for name in o.methods:
        seed_everything(0)
        way = named_object(name, TAG_METHODS, 'method')
        runs[name] = way.net(13).to(memory_format=torch.channels_last).train(), way.loss().train()
    x, tags = torch.rand(o.images, 3, o.size, o.size), torch.rand(o.images, 13) < .2
    tags[:, :2] = True
    times = in_turns({name: partial(step, net, loss, x, tags) for name, (net, loss) in runs.items()}, o.repeats)
    print(machine())
    for name, t in times.items(): print(f'{name:<24} {1e3*t:7.0f} ms a step   {t/times[o.methods[0]]:5.2f} times {o.methods[0]}')

if __name__ == '__main__': main()

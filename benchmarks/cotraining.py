"""What a step of co-training costs, against plain training of the same network on as many images a step: each in turn, in one run.

    python benchmarks/cotraining.py                    # two and three networks, one thread
    python benchmarks/cotraining.py --device cuda --size 512 --images 16

Half of a network's images are labelled, half are not, and both terms have their full weight. `every 1` and `never` are the same with adversaries in each step and in none. Peak memory is that of a process
that makes the networks and takes two steps, less what it had before.
"""
import argparse, json, os
from functools import partial
os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = '1'

import torch

from measure import child, in_turns, machine, peak
from spml_kit.core import seed_everything
from spml_kit.files import write_json
from spml_kit.learn.learner import create_model
from spml_kit.learn.losses import CrossEntropy
from spml_kit.method.recipes import RECIPES
from spml_kit.neighbours.cotraining import CoNets, CoTrainingLoss

CLASSES = 13
WAYS = {'plain training': (1, 0), '2 networks': (2, 2), '2 networks, every 1': (2, 1), '2 networks, never': (2, 10**9), '3 networks': (3, 2)} # networks, steps from one with adversaries to the next


def system(way, o):
    "A function that takes a step of training"
    n, every = WAYS[way]
    seed_everything(0)
    nets = [create_model(RECIPES['small'].but(embed=dict(pretrained=False)), CLASSES, detach=False) for _ in range(n)]
    model = (nets[0] if n == 1 else CoNets(nets)).to(o.device).train()
    loss = CrossEntropy() if n == 1 else CoTrainingLoss(model, every=every)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5)
    b = o.images if n == 1 else (n + 1)*o.images//2
    x, labels = torch.rand(b, 3, o.size, o.size, device=o.device), torch.randint(0, CLASSES, (b, o.size, o.size), device=o.device)
    loss.images, loss.done = x, 1.
    def step():
        opt.zero_grad()
        loss(model(x), labels, None, None).backward()
        opt.step()
    return step


def two(step): # one of them with adversaries, where every second has some
    step()
    step()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--repeats', type=int, default=6, help='pairs of steps of each that count')
    p.add_argument('--images', type=int, default=8, help='images a step and network')
    p.add_argument('--size', type=int, default=96, help='pixels a side')
    p.add_argument('--device', default='cpu')
    p.add_argument('--peak', help='print the peak memory of one of the ways alone')
    p.add_argument('--out', default='cotraining.json')
    o = p.parse_args()
    torch.set_num_threads(1)
    if o.peak: return print(json.dumps(peak(lambda: two(system(o.peak, o)), o.device)))
    pairs = {way: partial(two, system(way, o)) for way in WAYS}
    times = {way: t/2 for way, t in in_turns(pairs, o.repeats, o.device).items()}
    first = times['plain training']
    said = ['--images', str(o.images), '--size', str(o.size), '--device', o.device]
    rows = [dict(way=way, networks=WAYS[way][0], ms=1e3*t, ratio=t/first, mib=child(__file__, '--peak', way, *said)) for way, t in times.items()]
    for r in rows: print(f"{r['way']:<22}{r['ms']:8.0f} ms a step{r['ratio']:7.2f} times plain training{r['mib']:8.0f} MiB")
    write_json(o.out, dict(machine=machine(o.device), images=o.images, size=o.size, rows=rows))

if __name__ == '__main__': main()

"""The kit's fast paths against the straightforward forms of `baselines.py`: time in one run, by turns, after a warm-up; peak memory of each in a process of its own.

    python benchmarks/speed.py                       # all tasks on the CPU, a table, results/benchmarks/speed_cpu.json
    python benchmarks/speed.py relations kmeans_36   # some
    python benchmarks/speed.py --device cuda

The figures are ratios: baseline over kit. Both must give the same result, to a stated tolerance, or the task fails.
"""
import argparse, json, os, platform, statistics, subprocess, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F

import baselines
from spml_kit.contrast import contrast
from spml_kit.core import write_json
from spml_kit.embed import locations, with_location
from spml_kit.propagate import random_walk
from spml_kit.retrieval import SegmentIndex
from spml_kit.segments import grid_labels, spherical_kmeans

unit = lambda *shape, g: F.normalize(torch.randn(*shape, generator=g), dim=-1)


def batch(device, images=16, pixels=4096, segments=75, old=2400, classes=21, D=64):
    "Pixels of a batch, their segments and codes, and a memory: what the three relations of the paper take"
    g = torch.Generator().manual_seed(0)
    own = (torch.randint(segments, (images, pixels), generator=g).sort(1)[0] + segments*torch.arange(images)[:, None]).flatten()
    M = images*segments
    x = F.normalize(unit(M, D, g=g)[own] + .5*unit(len(own), D, g=g), dim=1)
    label = torch.randint(classes, (M,), generator=g)
    label[torch.rand(M, generator=g) < .5] = 254
    tags = torch.rand(images, classes, generator=g) < .1
    tags[:, 0], tags[:, 1] = True, tags[:, 1] | ~tags[:, 2:].any(1)
    side = 2**(pixels.bit_length()//2) # of a grid of a power of two pixels
    b = dict(x=x, own=own, label=label, region=torch.randint(30, (M,), generator=g), image=torch.arange(images).repeat_interleave(segments), tags=tags,
             loc=locations(side, pixels//side).repeat(images, 1), old_mu=unit(old, D, g=g), old_label=torch.randint(classes, (old,), generator=g),
             old_image=images + torch.arange(old) % (2*images), old_tags=torch.cat([tags, tags.flip(0)]))
    return {k: v.to(device) for k, v in b.items()}


def features(x, b):
    "Unit features of the pixels and of their segments, without and with location; with gradient, as in training"
    v = F.normalize(x, dim=1)
    u = with_location(v, b['loc'])
    mean = lambda o: F.normalize(torch.zeros(len(b['label']), o.shape[1], device=o.device).index_add(0, b['own'], o), dim=1)
    return v, u, mean(v), mean(u)


def dense(x, b):
    v, u, mu, mu_loc = features(x, b)
    return baselines.three_relations(v, u, b['own'], b['label'], b['region'], b['image'], b['tags'], mu, mu_loc, (b['old_mu'], b['old_label'], b['old_image'], b['old_tags']), b['tags'].shape[1])


def chunked(x, b):
    v, u, mu, mu_loc = features(x, b)
    both, known = torch.cat([mu, b['old_mu']]), torch.cat([b['label'], b['old_label']])
    said = torch.cat([b['tags'], b['old_tags']])[:, 1:].float()
    return (contrast(v, both, b['own'], torch.where(known < b['tags'].shape[1], known, -1), 6.)[0] + .5*contrast(v, both, b['own'], torch.cat([b['image'], b['old_image']]), 12., match=said @ said.T > 0)[0]
            + .1*contrast(u, mu_loc, b['own'], b['region'], 16., image=b['image'])[0])


def gradient(loss, b):
    "Value and gradient by the pixels"
    x = b['x'].clone().requires_grad_()
    value = loss(x, b)
    value.backward()
    return value.detach(), x.grad


def relations(device):
    "Three VOC relations, forward and backward: 65,536 pixels, 1,200 segments and 2,400 in memory, D = 64, 21 classes, 16 images"
    b = batch(device)
    differ = lambda a, c: max(float((a[0] - c[0]).abs()), float((a[1] - c[1]).abs().max()/a[1].abs().max()))
    return lambda: gradient(dense, b), lambda: gradient(chunked, b), differ, 1e-4


def kmeans(k):
    def task(device):
        g = torch.Generator().manual_seed(0)
        side = int(k**.5)
        smooth = F.interpolate(torch.randn(16, 64, 16, 16, generator=g), (128, 128), mode='bilinear')
        v = F.normalize(smooth.flatten(2).transpose(1, 2), dim=2).to(device)
        u, start = with_location(v, locations(128, 128, device)), grid_labels(128, 128, (side, side), device)
        differ = lambda a, b: float((a != b).float().mean())
        return lambda: baselines.looped_kmeans(u, start, k, 10), lambda: spherical_kmeans(u, start, k, 10), differ, 1e-3
    task.__doc__ = f"Spherical k-means, 10 iterations: 16 x 128 x 128 x 66, {k} clusters"
    return task


def walk(device):
    "Random walk of 64 steps, building the matrix included: 63 x 47 grid, 5 of 21 classes present, image and mirror image"
    g = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.randn(2, 64, 8, 6, generator=g), (63, 47), mode='bilinear').flatten(2).transpose(1, 2)
    views, scores = F.normalize(smooth, dim=2).to(device), torch.rand(21, 63*47, generator=g).to(device)
    scores[5:] = 0
    return lambda: baselines.squared_walk(scores, views), lambda: random_walk(scores, views), lambda a, b: float((a - b).abs().max()), 1e-5


def neighbours(device):
    "20 nearest segments: 10,000 queries against 1,000,000 prototypes, D = 64"
    g = torch.Generator().manual_seed(0)
    query, prototypes = unit(10_000, 64, g=g).to(device), unit(1_000_000, 64, g=g).to(device)
    index = SegmentIndex(prototypes, torch.zeros(len(prototypes), dtype=torch.long, device=device), torch.zeros(len(prototypes), dtype=torch.long, device=device), 21)
    few = query[:100] # sorting all would take many minutes: the baseline sorts a hundredth, and its time counts a hundredfold
    differ = lambda a, b: float((a != b[:100]).float().mean())
    return lambda: baselines.sorted_neighbours(few, prototypes, 20), lambda: index.nearest(query, 20)[1], differ, 1e-3, 100


TASKS = dict(relations=relations, kmeans_36=kmeans(36), kmeans_576=kmeans(576), walk=walk, neighbours=neighbours)


def clock(f, device):
    "Seconds, result"
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    wait()
    start = time.perf_counter()
    out = f()
    wait()
    return time.perf_counter() - start, out


def time_task(name, device, repeats):
    "Both forms by turns"
    plain, ours, differ, tolerance, *share = TASKS[name](device)
    (_, a), (_, b) = clock(plain, device), clock(ours, device) # warm-up
    off = differ(a, b)
    if not off <= tolerance: raise SystemExit(f"{name}: the two differ by {off:.2g}, allowed are {tolerance:.0e}")
    times = [(clock(plain, device)[0], clock(ours, device)[0]) for _ in range(repeats)]
    p, o = (statistics.median(t) for t in zip(*times))
    return dict(baseline_s=p*(share[0] if share else 1), kit_s=o, differ=off)


def peak_of(name, device, which):
    "Peak memory of one form, in this process alone"
    return peak(TASKS[name](device)[which], device)


def peak(f, device):
    "MiB that a call takes above what is there before it"
    if device == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        return (torch.cuda.max_memory_allocated() - before)/2**20
    status = lambda key: next(int(line.split()[1]) for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(key))
    torch.ones(512, 512) @ torch.ones(512, 512) # libraries are loaded
    Path('/proc/self/clear_refs').write_text('5') # forget the peak so far
    before = status('VmRSS')
    f()
    return (status('VmHWM') - before)/1024


def child(*words, file=__file__):
    "What a process of its own prints last"
    done = subprocess.run([sys.executable, file, *words], capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{words} failed with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('tasks', nargs='*', help=f"out of {list(TASKS)}; none: all")
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--out', type=Path, help="JSON to write (default results/benchmarks/speed_DEVICE.json)")
    p.add_argument('--time', metavar='TASK', help=argparse.SUPPRESS)
    p.add_argument('--memory', nargs=2, metavar=('TASK', 'WHICH'), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.time: return print(json.dumps(time_task(args.time, args.device, args.repeats)))
    if args.memory: return print(json.dumps(peak_of(args.memory[0], args.device, int(args.memory[1]))))
    unknown = set(args.tasks) - set(TASKS)
    if unknown: p.error(f"no task {sorted(unknown)}; there are {list(TASKS)}")
    rows = []
    print(f"{'task':<12} {'baseline':>10} {'kit':>10} {'ratio':>7} {'baseline':>11} {'kit':>10} {'share':>7}   differ")
    for name in args.tasks or TASKS:
        same = ['--device', args.device]
        row = dict(task=name, what=TASKS[name].__doc__, **child('--time', name, '--repeats', str(args.repeats), *same),
                   baseline_mib=child('--memory', name, '0', *same), kit_mib=child('--memory', name, '1', *same))
        row |= dict(faster=row['baseline_s']/row['kit_s'], memory_share=row['kit_mib']/row['baseline_mib'])
        rows.append(row)
        print(f"{name:<12} {row['baseline_s']:>8.3f} s {row['kit_s']:>8.3f} s {row['faster']:>6.1f}x {row['baseline_mib']:>7.0f} MiB {row['kit_mib']:>6.0f} MiB {row['memory_share']:>6.1%}   {row['differ']:.1e}", flush=True)
    gpu = torch.cuda.get_device_name() if args.device == 'cuda' else None
    conditions = dict(threads=torch.get_num_threads(), cores=os.cpu_count(), gpu=gpu, torch=torch.__version__, platform=platform.machine(), load=os.getloadavg(), repeats=args.repeats, dtype='float32')
    write_json(args.out or Path(f'results/benchmarks/speed_{args.device}.json'), dict(rows=rows, conditions=conditions))


if __name__ == '__main__': main()

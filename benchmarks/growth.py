"""How the cost of the three relations grows: forward and backward on doublings of pixels, segments, images and classes, with a fitted exponent.

    python benchmarks/growth.py                  # a table, benchmarks/growth.json and growth.png
    python benchmarks/growth.py --device cuda

Each point runs in a process of its own: the median of some runs after a warm-up, and the peak memory above the inputs. An exponent of 1 is linear.
"""
import argparse, json
from pathlib import Path
from statistics import median

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np

from measure import child, clock, machine, peak
from speed import batch, chunked, gradient
from spml_kit.files import write_json

BASE = dict(images=8, pixels=1024, segments=50, old=800, classes=21)
AXES = {
    'pixels an image': [dict(pixels=n) for n in (1024, 2048, 4096, 8192)], # N grows, M stays
    'segments': [dict(segments=n, old=16*n) for n in (50, 100, 200, 400)], # M grows, N stays
    'images': [dict(images=n, old=100*n) for n in (4, 8, 16, 32)],         # N and M grow
    'classes': [dict(classes=n) for n in (5, 10, 20, 40, 80)],
}


def point(change, device, repeats):
    b = batch(device, **{**BASE, **change})
    run = lambda: gradient(chunked, b)
    clock(run, device)
    return dict(change, N=len(b['x']), M=len(b['label']) + len(b['old_mu']), seconds=median(clock(run, device)[0] for _ in range(repeats)), mib=peak(run, device))


def exponent(x, y): return float(np.polyfit(np.log(x), np.log(np.maximum(y, 1e-9)), 1)[0])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--out', type=Path, help="JSON to write (default benchmarks/growth.json; growth_cuda.json on a GPU)")
    p.add_argument('--point', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.point: return print(json.dumps(point(json.loads(args.point), args.device, args.repeats)))
    out, curves = args.out or Path(__file__).parent/('growth.json' if args.device == 'cpu' else f'growth_{args.device}.json'), {}
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for name, changes in AXES.items():
        rows = [child(__file__, '--point', json.dumps(c), '--device', args.device, '--repeats', str(args.repeats)) for c in changes]
        x, key = [list(c.values())[0] for c in changes], list(changes[0])[0]
        work = [r['N']*r['M'] for r in rows] if name != 'classes' else x
        room = [r['N'] + r['M'] for r in rows] if name != 'classes' else x
        curves[name] = dict(rows=rows, time_exponent=exponent(work, [r['seconds'] for r in rows]), memory_exponent=exponent(room, [r['mib'] for r in rows]))
        print(f"{name:<16} {key} {x}: seconds {[round(r['seconds'], 3) for r in rows]}, MiB {[round(r['mib']) for r in rows]}; "
              f"time ~ {'(N x M)' if name != 'classes' else 'C'}^{curves[name]['time_exponent']:.2f}, memory ~ {'(N + M)' if name != 'classes' else 'C'}^{curves[name]['memory_exponent']:.2f}", flush=True)
        for ax, what in zip(axes, ('seconds', 'mib')): ax.loglog([v/x[0] for v in x], [r[what]/rows[0][what] for r in rows], 'o-', label=name)
    for ax, what in zip(axes, ('time', 'peak memory')): ax.set_xlabel('times the first size'); ax.set_title(what + ', times the first'); ax.grid(alpha=.3)
    axes[0].legend()
    conditions = machine(args.device) | dict(base=BASE, repeats=args.repeats)
    write_json(out, dict(curves=curves, conditions=conditions))
    fig.tight_layout(); fig.savefig(out.with_suffix('.png'), dpi=80)


if __name__ == '__main__': main()

"""What prototypes, pseudo-labels and the search for neighbours cost an image: the figures behind the page on ten million images.

    pip install "dask[distributed]" faiss-cpu      # without faiss its rows are left out
    python benchmarks/cluster.py                   # benchmarks/cluster.json

Scenes are written as JPEG with scribbles as PNG and regions on disk, then read as any folder of photographs is; a network trained for some steps looks at them on one thread. Processor time counts for
the cost of an image, since it depends little on what else the machine does; wall time and load are noted beside it. Workers are timed on a second run, when they have imported everything.
"""
import os
os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = os.environ['OPENBLAS_NUM_THREADS'] = '1'
import argparse, pickle, sys, tempfile, time, warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated') # said by torch when fastai is imported

import numpy as np
import torch
from PIL import Image

from measure import machine
from spml_kit.all import *
from spml_kit.infer.scores import image_segments
from spml_kit.infer.views import embed_view
from spml_kit.runs.shards import load_shards, sharded_index, sharded_pseudo_labels
from spml_kit.runs.workers import local_client

REFINE, REGIONS, VOTERS = ('regions', 'crf'), 200, 20


def photographs(folder, n, side, start=0):
    "A weak set of files: JPEG images, PNG scribbles, PNG regions"
    scenes = SceneSet(n, size=side, start=start)
    drawn = WeakSet(scenes, 'scribbles')
    for k in ('images', 'labels'): (folder/k).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(scenes.names):
        Image.fromarray(scenes.image(i)).save(folder/'images'/f'{name}.jpg', quality=95)
        write_index_png(folder/'labels'/f'{name}.png', drawn.sample(i).labels, scenes.classes.palette)
    prepare_regions(FolderSet(folder/'images', classes=scenes.classes), folder/'regions', n=REGIONS, progress=False)
    return WeakSet(FolderSet(folder/'images', classes=scenes.classes), str(folder/'labels'), regions=str(folder/'regions')) # that has read nothing


def trained(steps, out):
    "The network of recipe 'small' after some steps on scribbles"
    recipe = RECIPES['small']
    dls = weak_dls(WeakSet(SceneSet(100, start=5000), 'scribbles', regions=32), SceneSet(2, start=9000), bs=recipe.bs, crop=recipe.crop, steps=steps, scale=recipe.scale)
    learn = spml_learner(dls, 'scribbles', path=out)
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(1)
    return learn.model.eval()


def clock(f):
    "Processor and wall seconds, and the result"
    cpu, wall = time.process_time(), time.perf_counter()
    out = f()
    return time.process_time() - cpu, time.perf_counter() - wall, out


def bytes_of(folder, pattern): return sum(p.stat().st_size for p in Path(folder).glob(pattern))


def work(model, weak, out, client=None, **run):
    "What is done to a set, as (stage, files it leaves, function); each reads the images anew"
    fresh, maps = lambda: FolderSet(weak.images.folder, classes=weak.classes), out/'labels'
    if client is None: yield 'regions', (out/'regions', '*.png'), lambda: prepare_regions(fresh(), out/'regions', n=REGIONS, progress=False)
    yield 'pseudo-labels', (maps, '*.png'), lambda: sharded_pseudo_labels(model, weak, maps, client, refine=REFINE, progress=False, **run)
    yield 'prototypes', (out/'prototypes', '*.safetensors'), lambda: sharded_index(model, WeakSet(fresh(), str(maps)), out/'prototypes', client, progress=False, **run)


def one_process(model, tmp, side, n):
    "Cost of an image of this size"
    weak, rows = photographs(tmp/f'{side}_{n}', n, side), []
    warm = photographs(tmp/f'{side}_{n}_warm', 1, side, start=n)
    for (_, _, first), (stage, (folder, pattern), do) in zip(work(model, warm, tmp/f'{side}_{n}_warm_out'), work(model, weak, tmp/f'{side}_{n}_out')):
        first()
        cpu, wall, out = clock(do)
        rows.append(dict(stage=stage, side=side, images=n, cpu=cpu/n, wall=wall/n, bytes=bytes_of(folder, pattern)/n, image_bytes=bytes_of(tmp/f'{side}_{n}'/'images', '*.jpg')/n)
                    | (dict(segments=len(out)/n) if stage == 'prototypes' else {}))
        print(f"{stage:<14} {n:>4} images of {side:>3}: {rows[-1]['cpu']:.3f} processor seconds an image, {rows[-1]['bytes']:.0f} bytes", flush=True)
    return rows


def with_workers(model, tmp, side, n, workers):
    "Images a second by so many processes; a first run has them import"
    weak, rows = photographs(tmp/f'workers_{workers}', n, side), []
    with local_client(workers) as client:
        for again in (0, 1):
            for stage, _, do in work(model, weak, tmp/f'workers_{workers}_{again}', client, per=4):
                before = sum(client.run(time.process_time).values())
                _, wall, _ = clock(do)
                cpu = sum(client.run(time.process_time).values()) - before
                if again: rows.append(dict(stage=stage, side=side, images=n, workers=workers, wall=wall, cpu=cpu, images_per_second=n/wall, busy=cpu/wall))
    for r in rows: print(f"{r['stage']:<14} {workers} worker(s): {r['images_per_second']:.2f} images a second, {r['busy']:.2f} processors busy", flush=True)
    return rows


def sent(model, tmp):
    "What travels to a worker once"
    import cloudpickle
    many = photographs(tmp/'sent_many', 1, 64) # names and paths of a hundred thousand files that are not there
    many.images.names = many.names = [f'image_{i:08d}' for i in range(100_000)]
    many.images.paths = {s: tmp/'images'/f'{s}.jpg' for s in many.names}
    packed = cloudpickle.dumps(many)
    return dict(model_bytes=len(cloudpickle.dumps(model)), weak_bytes_per_image=len(packed)/len(many.names), unpack_seconds_per_image=clock(lambda: pickle.loads(packed))[0]/len(many.names))


def search(model, tmp, n, held_out):
    "Exact and cheaper searches among the prototypes of n scenes: labels of held-out scenes, bytes, time"
    weak, out = photographs(tmp/'search', n, 128), tmp/'search_out'
    index = [do() for _, _, do in work(model, weak, out)][-1]
    test = SceneSet(held_out, start=7000)
    seen = [image_segments(embed_view(model, test.image(i))[0], (12, 12)) for i in range(held_out)]
    q = torch.cat([mu for _, mu in seen])
    ends = np.cumsum([len(mu) for _, mu in seen])

    def judge(label): # (Q,k) classes of the neighbours
        votes = torch.zeros(len(label), weak.c).scatter_add_(1, label, torch.ones(label.shape))
        total, said = Confusion(weak.c), votes.argmax(1)
        for i, ((own, _), end) in enumerate(zip(seen, ends)):
            total.add(said[end - len(seen[i][1]):end][own].view(test.image(i).shape[:2]).numpy(), test.mask(i))
        return total.mean_iou(present_only=True)

    def row(kind, index, bytes_each, find, **more): # find: neighbours of the queries
        cpu, _, found = clock(find)
        return dict(kind=kind, prototypes=len(index), bytes_per_prototype=bytes_each, recall=float((found[:, :, None] == exact[:, None]).any(2).float().mean()) if len(index) == len(whole) else None,
                    miou=judge(index.label[found]), cpu_per_image=cpu/held_out, **more)

    exact, whole, full = index.nearest(q, VOTERS)[1], index, 4.*index.mu.shape[1]
    scan = lambda few: lambda: few.nearest(q, VOTERS)[1]
    rows = [row('all, exact', index, full, scan(index), images=n)]
    for per_class in (1000, 300, 100, 30, 10):
        for draw in (dict(per_class=per_class), dict(max_prototypes=sum(c.clamp(max=per_class) for c in index.label.bincount()).item())): # the same number
            few = load_shards(out/'prototypes', **draw)
            rows.append(row(f'{per_class} of each class' if 'per_class' in draw else f'{len(few)} of all', few, full, scan(few), **draw))
    for part in (n//2, n//5, n//15, n//50):
        few = SegmentIndex(*(o[index.image < part] for o in (index.mu, index.label, index.image)))
        rows.append(row(f'all of {part} images', few, full, scan(few), images=part))
    for spec in ('SQfp16', 'IVF128,PQ32', 'IVF128,PQ16'):
        try: index.use_faiss(spec)
        except SpmlError: break # faiss is not installed
        if spec.startswith('IVF'): index.faiss.nprobe = 8
        rows.append(row(f'faiss {spec}', index, float(index.faiss.code_size + 8*spec.startswith('IVF')), scan(index)))
    return rows


def growth(dim, sizes):
    "Processor seconds of an exact search of 144 queries among so many random prototypes"
    rows = []
    for m in sizes:
        mu, q = (torch.nn.functional.normalize(torch.randn(k, dim, generator=torch.Generator().manual_seed(0)), dim=1) for k in (m, 144))
        nearest(q, mu[:10_000], VOTERS)
        rows.append(dict(prototypes=m, queries=144, cpu=clock(lambda: nearest(q, mu, VOTERS))[0]))
    return rows


def found_version(name):
    try: return version(name)
    except PackageNotFoundError: return None


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sides', type=int, nargs='+', default=[128, 256, 384, 512], help="sides of the images, pixels")
    p.add_argument('--images', type=int, default=6, help="images of each size")
    p.add_argument('--numbers', type=int, nargs='+', default=[4, 8, 16, 32], help="numbers of images of the smallest side")
    p.add_argument('--workers', type=int, nargs='*', default=[1, 2], help="numbers of processes")
    p.add_argument('--index', type=int, default=150, help="images whose prototypes are searched")
    p.add_argument('--steps', type=int, default=80, help="steps of training")
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.json'), help="JSON to write (default benchmarks/cluster.json)")
    args = p.parse_args()
    torch.set_num_threads(1)
    before = machine()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        model = trained(args.steps, tmp/'run')
        data = dict(
            sizes=[r for side in args.sides for r in one_process(model, tmp, side, args.images)],
            numbers=[r for n in args.numbers for r in one_process(model, tmp/'numbers', min(args.sides), n)],
            workers=[r for w in args.workers for r in with_workers(model, tmp, args.sides[1], 16, w)],
            sent=sent(model, tmp), search=search(model, tmp, args.index, 30), growth=growth(RECIPES['small'].dim, (30_000, 100_000, 300_000, 1_000_000)))
    conditions = before | dict(load_after=machine()['load'], **{k: found_version(k) for k in ('distributed', 'faiss-cpu')}, command=' '.join(['python benchmarks/cluster.py', *sys.argv[1:]]),
        recipe='small', dim=RECIPES['small'].dim, steps=args.steps, grid=[12, 12], refine=REFINE, regions=REGIONS, voters=VOTERS)
    write_json(args.out, dict(conditions=conditions, **data))
    print(f"written to {args.out}")


if __name__ == '__main__': main()

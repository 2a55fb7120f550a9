"""Run the stages, each in a process of its own that is ended when it takes too long; see README.md."""
import argparse, gc, os, signal, subprocess, sys, tempfile, time
from pathlib import Path

import torch

from measure import machine
from spml_kit.files import read_json, write_json

HERE = Path(__file__).resolve().parent
LIMITS = dict(right=90, fast=150, learn=240, together=120) # seconds; together is skipped at once where there is one GPU


def limit(name, dry): return LIMITS[name]*(5 if dry else 1) # whatever else a machine does that only tries


class Rows:
    "What a stage has found, in a file that is whole after every row"
    def __init__(self, file, dry):
        self.file, self.dry, self.device, self.begun = file, dry, 'cpu' if dry else 'cuda', time.perf_counter()
        self.said = dict(stage=file.stem, dry=dry, machine=machine(self.device), rows=[])
        self.write()

    def write(self): write_json(self.file, self.said | dict(seconds=round(time.perf_counter() - self.begun, 1)))

    def left(self):
        "Seconds until the stage is ended"
        return limit(self.file.stem, self.dry) - (time.perf_counter() - self.begun)

    def add(self, **row):
        self.said['rows'].append(row)
        words = [f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in row.items()]
        print(f'{time.perf_counter() - self.begun:6.1f} s ', *words, sep='  ', flush=True)
        self.write()

    def attempt(self, name, f):
        "Do it; an error is a row, and the next one begins"
        try: return f()
        except Exception as e:
            self.add(failed=name, error=f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:300]}")


def stage(name, out, dry):
    "One stage, in this process"
    torch.manual_seed(0)
    if dry: torch.set_num_threads(1) # small things are done sooner by one
    rows = Rows(out/f'{name}.json', dry)
    gc.disable() # what is imported stays
    main = rows.attempt(name, lambda: __import__(name).main)
    gc.freeze()
    gc.enable()
    if main: rows.attempt(name, lambda: main(rows))


def apart(name, out, dry):
    "One stage in a process of its own; how it ended, if not well"
    # in a dry run they go through the interpreter where they are looked at, and rest elsewhere
    for_kernels = dict(TRITON_INTERPRET='1', SPML_FUSED='0') if dry else {}
    run = subprocess.Popen([sys.executable, __file__, name, '--here', '--out', out, *(['--dry'] if dry else [])],
                           env=os.environ | for_kernels, start_new_session=True)
    try: status = run.wait(limit(name, dry))
    except subprocess.TimeoutExpired: return f'ended after {limit(name, dry)} s'
    finally:
        try: os.killpg(run.pid, signal.SIGKILL) # with all that it has started
        except ProcessLookupError: pass
    return status and f'its process ended with {status}'


def failed(file, name, status):
    "Rows that failed, and of how many; how the stage ended is one"
    said = read_json(file) if file.exists() else dict(stage=name, dry=False, machine=None, rows=[])
    if status: write_json(file, said | dict(rows=said['rows'] + [dict(failed=name, error=status)]))
    rows = said['rows'] + [dict(failed=name)]*bool(status)
    return [r for r in rows if 'failed' in r or r.get('right') is False], len(rows)


def main():
    p = argparse.ArgumentParser('benchmarks/gpu/run', description=__doc__)
    p.add_argument('stages', nargs='*', choices=[*LIMITS, []],
                   help=f"of {', '.join(LIMITS)} (default: all: 8 minutes at most on one GPU, 10 on two)")
    p.add_argument('--dry', action='store_true', help="on the CPU, in small")
    p.add_argument('--out', type=Path,
                   help="folder of the JSON files (default: $OUT, else benchmarks/gpu/results; dry: one that goes)")
    p.add_argument('--here', action='store_true', help=argparse.SUPPRESS) # in this process
    args = p.parse_args()
    args.out = args.out or Path(tempfile.mkdtemp() if args.dry else os.environ.get('OUT') or HERE/'results')
    args.out.mkdir(parents=True, exist_ok=True)
    if args.here: return stage(args.stages[0], args.out, args.dry)
    if not args.dry and not torch.cuda.is_available():
        sys.exit('no GPU here: --dry runs the stages on the CPU, in small')
    bad = 0
    for name in args.stages or LIMITS:
        print(f'== {name}, at most {limit(name, args.dry)} s', flush=True)
        (args.out/f'{name}.json').unlink(missing_ok=True) # of an earlier run
        status = apart(name, args.out, args.dry)
        wrong, n = failed(args.out/f'{name}.json', name, status)
        print(f"== {name}: {n} rows, {len(wrong)} of them failed" + (f'; {status}' if status else ''), flush=True)
        bad += len(wrong)
    sys.exit(1 if bad else 0)


if __name__ == '__main__': main()

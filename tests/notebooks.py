"""Runs every notebook but the lessons (pytest runs those) as nbdev_test does, two at a time, each in a process of its own: what one imports must change no other. The processes are forked from this one, which has imported what takes long (not fastai: it changes how fastcore compares tensors)."""
import gc
import os
import re
import sys
from pathlib import Path

from nbdev.test import nbdev_test

from faults.server import end
from kernels import import_long

ROOT = Path(__file__).parent.parent
import_long()


def start(path):
    "Process that tests the notebook"
    if pid := os.fork(): return pid
    end(nbdev_test, dict(path=str(path), timing=True)) # which leaves with 1 when it fails


def one(name):
    "Run a notebook, then the tests of what it exports"
    nbs, tests = ROOT/'nbs', ROOT/'tests'
    found = sorted(p for p in nbs.rglob('*.ipynb') if name in (p.stem, str(p.relative_to(nbs)), str(p.relative_to(ROOT))) and '.ipynb_checkpoints' not in p.parts)
    if len(found) != 1: sys.exit(f"{name}: {len(found)} notebooks have this name; NB=50_relations runs nbs/api/method/50_relations.ipynb")
    _, status = os.waitpid(start(found[0]), 0)
    if status: sys.exit(f"failed: {found[0]}")
    room = re.sub(r'^\d+[a-z]?_', '', found[0].stem)
    files = [*tests.rglob(f'test_{room}.py')]
    if files: os.execv(sys.executable, [sys.executable, '-m', 'pytest', '-q', *map(str, files)])
    print(f"no tests but its own cells: there is no test_{room}.py")


def main():
    "Exit with 1 if any notebook fails"
    nbs = ROOT/'nbs'
    # from the last to the first: tutorials take long, and the short ones fill the end
    waiting = sorted(p for p in nbs.rglob('*.ipynb') if not any(part.startswith('.') or part == 'lessons' for part in p.relative_to(nbs).parts))
    running, failed = {}, []
    gc.freeze() # else each process looks through what was imported here
    while waiting or running:
        while waiting and len(running) < 2:
            path = waiting.pop()
            running[start(path)] = path
        pid, status = os.wait()
        path = running.pop(pid)
        if status: failed.append(path.name)
    if failed: sys.exit(f"failed: {', '.join(failed)}")


if __name__ == '__main__': one(sys.argv[1]) if sys.argv[1:] else main()

"""Time, peak memory and conditions of what the benchmarks run."""
import ctypes, json, os, platform, subprocess, sys, time
from datetime import date
from pathlib import Path
from statistics import median

import torch


def clock(f, device='cpu'):
    "Seconds, result"
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    wait()
    start = time.perf_counter()
    out = f()
    wait()
    return time.perf_counter() - start, out


def seconds(f, device='cpu'):
    "Of the processor, or of a GPU with what it still has to do"
    if device != 'cpu': return clock(f, device)[0]
    start = time.process_time()
    f()
    return time.process_time() - start


def in_turns(calls, repeats, device='cpu'):
    "Name to the median of its seconds: each in turn, the first two rounds to warm up"
    times = {name: [] for name in calls}
    for k in range(repeats + 2):
        for name, f in calls.items():
            s = seconds(f, device)
            if k >= 2: times[name].append(s)
    return {name: median(t) for name, t in times.items()}


def peak(f, device='cpu'):
    "MiB that a call takes above what is there before it"
    if device == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        return (torch.cuda.max_memory_allocated() - before)/2**20
    status = lambda key: next(int(line.split()[1]) for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(key))
    torch.ones(512, 512) @ torch.ones(512, 512) # libraries are loaded
    if hasattr(libc := ctypes.CDLL(None), 'malloc_trim'): libc.malloc_trim(0) # what was freed before would else be taken again unseen
    Path('/proc/self/clear_refs').write_text('5') # forget the peak so far
    before = status('VmRSS')
    f()
    return (status('VmHWM') - before)/1024


def child(file, *words):
    "What a process of its own prints last"
    run = f"import sys; sys.path.insert(0, {str(Path(file).parent)!r}); import {Path(file).stem}; {Path(file).stem}.main()" # as a module: processes that a task starts would import all of a main file again, but nothing of a notebook
    done = subprocess.run([sys.executable, '-c', run, *words], capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{words} failed with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def processor():
    "Model name where Linux tells it"
    try: return next(l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name'))
    except (OSError, StopIteration): return platform.processor()


def machine(device='cpu'):
    "Conditions of a measurement"
    return dict(date=str(date.today()), processor=processor(), cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=torch.cuda.get_device_name() if device == 'cuda' else None,
                python=platform.python_version(), torch=torch.__version__, load=[round(x, 1) for x in os.getloadavg()])

"""Kernels of the tests, forked from a process that has imported what takes long. Fastai and the kit are not among it:
they ask where they are imported. What a command starts in a process of its own starts its kernel as everywhere."""
import functools
import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path

TESTS = Path(__file__).parent
LONG = ("higra", "nbconvert.exporters.html", "pandas", "papermill", "plotly.graph_objects", "scipy.signal", "skimage.metrics",
    "sklearn.model_selection", "timm", "torch._dynamo")


def import_long():
    for name in LONG: importlib.import_module(name)


def kernel(words):
    "What `python -m ipykernel_launcher` does, in a forked process"
    environment, *arguments = words
    os.environ.clear()
    os.environ.update(json.loads(environment))
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    sys.path[:] = [p for p in sys.path if p and not Path(p).is_relative_to(TESTS)]
    import matplotlib
    import numpy as np
    from ipykernel.kernelapp import IPKernelApp
    matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"] # read at import, which was before
    np.random.seed() # nor do two kernels draw alike
    IPKernelApp.launch_instance([*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])


class Kernel:
    "What jupyter_client wants of a `Popen`"
    stdin = stdout = stderr = None

    def __init__(self, fork):
        from faults.forks import wait_for
        self.fork, self.pid = fork, fork.pid
        assert wait_for(lambda: os.getpgid(self.pid) == self.pid, 20, .002), "signals would go to its parent"

    def poll(self): return self.fork.status()

    def wait(self, timeout=None):
        while self.poll() is None: time.sleep(.02)
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)

    def terminate(self): self.send_signal(15)
    def kill(self): self.send_signal(9)


def forking(launch, folder):
    "Another `launch_kernel`; and what ends the process that forks, which starts with the first kernel"
    from faults.forks import Server
    server, lock = functools.cache(lambda: Server(folder, ("ipykernel.kernelapp", "ipywidgets", *LONG), {})), threading.Lock()

    def forked(cmd, env=None, cwd=None, **kwargs):
        if cmd[1:3] != ["-m", "ipykernel_launcher"]: return launch(cmd, env=env, cwd=cwd, **kwargs)
        environment = dict(os.environ if env is None else env)
        with lock: return Kernel(server().start("kernels:kernel", [json.dumps(environment), *cmd[3:]], cwd or os.getcwd()))

    def end():
        if server.cache_info().currsize: server().close()
    return forked, end

"""Processes of the suite: started, watched, killed alone, and looked for with all that they started."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import psutil

import spml_kit

# what the tests import, their processes import too
ROOTS = os.pathsep.join(str(Path(file).resolve().parents[1]) for file in (spml_kit.__file__, __file__))
QUIET = dict(PYTHONPATH=ROOTS, PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
COMMANDS = Path(sys.executable).parent
MODULES = "nbformat", "nbclient", "nbconvert", "papermill", "distributed", "spml_kit.all", "spml_kit.runs.cli", "faults.work"


def wait_for(true, seconds, each=.02):
    "The first value that is neither None nor False; the last one when time is over"
    end = time.monotonic() + seconds
    while ((value := true()) is None or value is False) and time.monotonic() < end: time.sleep(each)
    return value


class Tree:
    "A process and all that it starts"
    def __init__(self, folder):
        self.token, self.children = uuid.uuid4().hex, []
        self.files = [Path(folder)/f"{self.token}.{name}" for name in ("out", "err")]
        self.environment = QUIET | {"FAULTS_TREE": self.token}

    @property
    def told(self): return self.said(0)
    @property
    def complained(self): return self.said(1)
    def said(self, k): return self.files[k].read_text(errors="replace") if self.files[k].exists() else ""

    def wait(self, seconds):
        "Exit status; None if it takes longer, and then all of it is ended"
        status = wait_for(self.status, seconds)
        if status is None: self.end()
        return status

    def kill(self):
        "Kill the parent alone, as one who wants memory does; it is stopped first, so that nobody is born unseen"
        os.kill(self.pid, signal.SIGSTOP)
        self.children = psutil.Process(self.pid).children(recursive=True)
        os.kill(self.pid, signal.SIGKILL)
        return wait_for(self.status, 20)

    def living(self):
        "Whoever is left of the tree"
        found = {p.pid: p for p in self.children}
        for p in psutil.process_iter():
            try:
                if p.environ().get("FAULTS_TREE") == self.token: found[p.pid] = p
            except psutil.Error: continue # not ours, or gone
        return [p for p in found.values() if p.is_running() and p.pid != self.pid
            and p.status() != psutil.STATUS_ZOMBIE]

    def left(self, seconds=40): # what is still importing notices only then
        "What still lives after some time; it is ended then, so that it spoils nothing else"
        wait_for(lambda: not self.living(), seconds, .2)
        left = []
        for p in self.living():
            try: left.append(" ".join(p.cmdline())[:150]); p.kill()
            except psutil.Error: continue
        return left

    def end(self):
        "Kill everybody"
        try: self.kill()
        except (OSError, psutil.Error): "It has ended meanwhile"
        self.left(0)


class Fork(Tree):
    "Forked by the server"
    def __init__(self, server, function, words, folder, cwd, memory=0):
        super().__init__(folder)
        self.server, self.known = server, None
        out, err = map(str, self.files)
        self.pid = server.say(function=function, words=[*map(str, words)] if function.startswith("spml_kit")
            else words, cwd=str(cwd), out=out, err=err, environment=self.environment, memory=memory)

    def status(self):
        if self.known is None: self.known = self.server.say(reap=self.pid)
        return self.known


class Command(Tree):
    "A console command"
    def __init__(self, name, words, folder, cwd):
        super().__init__(folder)
        out, err = (open(f, "w") for f in self.files)
        with out, err: self.process = subprocess.Popen([COMMANDS/name, *map(str, words)], cwd=cwd,
            env=os.environ | self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        self.pid = self.process.pid

    def status(self): return self.process.poll()


class Server:
    "The process that forks the others, and has imported the modules"
    def __init__(self, folder, modules=MODULES, environment=QUIET):
        self.folder, self.lock = Path(folder), threading.Lock()
        self.process = subprocess.Popen([sys.executable, Path(__file__).with_name("server.py"), *modules],
            env=os.environ | {"PYTHONPATH": ROOTS} | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n", "the server of the fault suite does not start"

    def say(self, **asked):
        with self.lock:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def start(self, function, words, cwd, memory=0): return Fork(self, function, words, self.folder, cwd, memory)

    def run(self, name, *words, cwd, seconds=60, memory=0):
        "A console command, to its end: status (None: it hangs), told, complained, took"
        start = time.monotonic()
        tree = self.start(f"spml_kit.runs.cli:{name}", words, cwd, memory)
        return SimpleNamespace(status=tree.wait(seconds), told=tree.told, complained=tree.complained,
            took=time.monotonic() - start)

    def ask(self, name, seconds=10, memory=0, **kwargs):
        "A function of `work`, to its end: value; or error, kinds, message; status (None: it hangs, -9: killed), took"
        answer, start = self.folder/uuid.uuid4().hex, time.monotonic()
        tree = self.start("faults.work:answer", [name, json.loads(json.dumps(kwargs, default=str)), str(answer)],
            self.folder, memory)
        status, said = tree.wait(seconds), dict(value=None, error="no answer", kinds=[], message="")
        if status == 0: said = json.loads(answer.read_text())
        return SimpleNamespace(**said | dict(status=status, complained=tree.complained, took=time.monotonic() - start))

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)

"""A process that has imported what takes long, and forks another for each request: who is to be killed, may hang or may take too
much memory is a process of its own, and begins at once."""
import atexit
import gc
import importlib
import json
import os
import resource
import sys
import threading
import traceback


def serve(modules):
    "Answer a line with a line, until nobody asks any more"
    gc.disable() # nothing of what is imported can go
    for name in modules: importlib.import_module(name)
    gc.freeze() # what is never looked at is never copied
    gc.enable()
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "reap" in asked:
            pid, status = os.waitpid(asked["reap"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer: end(begin, asked)
        print(json.dumps(answer), flush=True)


def end(begin, asked):
    "As an interpreter ends, but without taking to pieces what was imported: that takes seconds"
    status = 1
    try: status = begin(**asked) or 0
    except SystemExit as e: status = e.code if isinstance(e.code, int) else e.code is not None
    except BaseException: traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        for f in (sys.stdout, sys.stderr): f.flush()
        os._exit(status)


def begin(function, words, cwd, out, err, environment, memory):
    "What the forked process does; its exit status"
    os.setsid()
    for fd, path, how in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY | os.O_CREAT),
        (2, err, os.O_WRONLY | os.O_CREAT)): os.dup2(os.open(path, how, 0o644), fd)
    os.chdir(cwd)
    os.environ.update(environment)
    if memory:
        with open("/proc/self/statm") as f: now = int(f.read().split()[0])*resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory,)*2)
    module, name = function.split(":")
    sys.argv = [name, *map(str, words)]
    return getattr(importlib.import_module(module), name)(words)


if __name__ == "__main__": sys.exit(serve(sys.argv[1:]))

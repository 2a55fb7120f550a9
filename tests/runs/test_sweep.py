"""Sweeps: what a grid asks for, Dask workers, killed ones, failures, time limits, the command line."""
import os
import signal
import threading
import time

import nbformat
import pytest

from spml_kit.core import SpmlError
from spml_kit.files import read_json
from spml_kit.runs.experiment import run_id
from spml_kit.runs.sweep import _own_gpu, read_grid, run_folders, run_state, sweep
from spml_kit.runs.cli import spml_sweep

CELL = """
import json, os, pathlib, time
here = pathlib.Path(out)
print('step', x)
times = len(list(here.glob('attempt*')))
(here/f'attempt{times}').write_text(f'{os.getpid()} {os.getppid()}')
if x == 0: raise ValueError('x is 0')
if x == 13 and times == 0: time.sleep(60) # the first attempt is killed
if x == 7: time.sleep(60)
if x == 3000: bytearray(b'1')*3_000_000_000, time.sleep(30)
(here/'metrics.json').write_text(json.dumps({'rows': [{'x': x, 'pid': os.getpid()}]}))
"""


@pytest.fixture
def toy(tmp_path):
    "A notebook that divides nothing, but fails, hangs or finishes as its parameter says"
    new = nbformat.v4.new_code_cell
    cells = [new("x = 1 # what to do\nout = ''", metadata={"tags": ["parameters"]}), new(CELL)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "toy.ipynb")
    return str(tmp_path / "toy.ipynb")


def runs_of(*xs): return {f"x {x}": {"x": x} for x in xs}


def test_workers_do_every_run_once(toy, tmp_path):
    table = sweep(toy, runs_of(1, 2, 0, 3), tmp_path / "s", workers=2, code="v", progress=False)
    assert list(table.state) == ["done", "done", "failed", "done"] and "ValueError: x is 0" in table.message[2]
    found = [read_json(tmp_path / "s" / f / "metrics.json")["rows"][0] for f in table.folder[table.state == "done"]]
    assert [r["x"] for r in found] == [1, 2, 3] and len({r["pid"] for r in found}) == 3 # a kernel each
    failed = nbformat.read(tmp_path / "s" / table.folder[2] / "toy.ipynb", 4)
    assert any(o.get("ename") == "ValueError" for c in failed.cells for o in c.get("outputs", [])) # the traceback is kept
    sweep(toy, runs_of(1, 0), tmp_path / "s", workers=0, code="v", progress=False)
    sweep(toy, runs_of(0), tmp_path / "s", workers=0, code="v", progress=False, retry=True)
    attempts = {x: len(list((tmp_path / "s" / f).glob("attempt*"))) for x, f in zip((1, 2, 0, 3), table.folder)}
    assert attempts == {1: 1, 2: 1, 0: 2, 3: 1}
    assert set(read_json(tmp_path / "s" / "sweep.json")["runs"]) == {"x 0"}


def alive(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    with open(f"/proc/{pid}/stat") as f: return f.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_killed_workers_run_goes_on_elsewhere(toy, tmp_path):
    folder = run_folders(tmp_path / "s", toy, runs_of(13, 1), "v")["x 13"]
    pids = []

    def kill():
        for _ in range(3000): # a busy machine takes its time to start workers and a kernel
            try: pids.extend(map(int, (folder / "attempt0").read_text().split()))
            except (OSError, ValueError): time.sleep(.1)
            if len(pids) == 2: return os.kill(pids[1], signal.SIGKILL) # the worker, not the kernel

    thread = threading.Thread(target=kill)
    thread.start()
    table = sweep(toy, runs_of(13, 1), tmp_path / "s", workers=2, code="v", progress=False)
    thread.join()
    assert list(table.state) == ["done", "done"] and len(list(folder.glob("attempt*"))) == 2
    for _ in range(100):
        if not alive(pids[0]): break
        time.sleep(.1)
    assert not alive(pids[0]) # the kernel went with its worker


def test_a_cell_that_takes_too_long_is_ended(toy, tmp_path):
    table = sweep(toy, runs_of(7, 1), tmp_path / "s", workers=0, code="v", timeout=3, progress=False)
    assert list(table.state) == ["failed", "done"] and "took longer than 3 s" in table.message[0]


@pytest.mark.long
def test_a_run_that_takes_too_much_memory_is_ended(toy, tmp_path):
    table = sweep(toy, runs_of(3000, 1), tmp_path / "s", workers=1, memory="2GB", code="v", progress=False)
    assert list(table.state) == ["failed", "done"] and "more than the 1.9 GB of a worker" in table.message[0]
    assert run_state(tmp_path / "s" / table.folder[0])["state"] == "failed"


def test_whatever_ends_a_run_the_others_go_on(toy, tmp_path, monkeypatch):
    import spml_kit.runs.sweep as module
    def full(experiment, folder, parameters, **_):
        if parameters["x"] == 1: raise OSError(28, "No space left on device")
    monkeypatch.setattr(module, "run_notebook", full)
    table = sweep(toy, runs_of(1, 2), tmp_path / "s", workers=0, code="v", progress=False)
    assert list(table.state) == ["failed", "done"] and "No space left" in table.message[0]


def test_two_sweeps_do_not_share_a_folder(toy, tmp_path):
    from filelock import FileLock
    (tmp_path / "s").mkdir()
    with FileLock(tmp_path / "s" / ".lock"), pytest.raises(SpmlError, match="another sweep is running there"):
        sweep(toy, runs_of(1), tmp_path / "s", workers=0, code="v", progress=False)
    assert not (tmp_path / "s" / "sweep.json").exists()


def test_a_scheduler_without_workers_is_named(toy, tmp_path, monkeypatch):
    import distributed
    monkeypatch.setattr("spml_kit.runs.workers.PATIENCE", 1)
    with distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster:
        with pytest.raises(SpmlError, match="this Dask scheduler has no workers"):
            sweep(toy, runs_of(1), tmp_path / "s", address=cluster.scheduler_address, code="v", progress=False)


def test_copies_that_fail_stop_nobody(toy, tmp_path):
    (tmp_path / "file").write_text("")
    table = sweep(toy, runs_of(1, 2), tmp_path / "s", workers=0, code="v", progress=False, copy_to=f"file://{tmp_path}/file/x")
    assert list(table.state) == ["done", "done"]
    for _ in range(2): sweep(toy, runs_of(1, 2), tmp_path / "s", workers=0, code="v", progress=False, copy_to=f"file://{tmp_path}/copies")
    assert sorted(p.parent.name for p in (tmp_path / "copies").rglob("metrics.json")) == sorted(table.folder) # each once


def test_grid(toy, tmp_path):
    (tmp_path / "g.yaml").write_text(f"experiment: {toy}\nruns: {{one: {{}}, two: {{x: 2}}}}\nparameters: {{x: 5}}\n")
    experiment, runs = read_grid(tmp_path / "g.yaml")
    assert experiment == toy and runs == {"one": {"x": 5}, "two": {"x": 2}}
    (tmp_path / "g.yaml").write_text(f"experiment: {toy}\n")
    assert read_grid(tmp_path / "g.yaml")[1] == {"toy": {}}
    with pytest.raises(SpmlError, match="none.yaml"): read_grid(tmp_path / "none.yaml")


def test_dictionaries_of_a_grid_are_merged_entry_by_entry(tmp_path):
    (tmp_path / "g.yaml").write_text("experiment: single\nprofile: voc_animals\nruns: {none: {recipe_changes: {relations: {cooccurrence: {weight: 0.0}}}}}\n")
    (run,) = read_grid(tmp_path / "g.yaml", [("recipe_changes", "{'bs': 4}")])[1].values()
    assert run["recipe_changes"] == {"multipliers": [.1, .1, 1, 1], "dropout": .2, "relations": {"similarity": {"weight": None}, "cooccurrence": {"weight": 0.}}, "bs": 4}


@pytest.mark.parametrize("text, said", [("runs: [a, b]", "runs is"), ("runs: {a: 3}", "the run 'a' is 3"), ("grid: [1]", "grid is"), ("parameters: 5", "parameters is 5"), ("profile: [a]", "profile is"), ("experiment: 5", "takes a name")])
def test_grids_that_are_none(text, said, tmp_path):
    (tmp_path / "g.yaml").write_text("experiment: single\n"*("experiment" not in text) + text)
    with pytest.raises(SpmlError, match="g.yaml.*" + said): read_grid(tmp_path / "g.yaml")


def test_address_of_a_run(toy):
    same = run_id(toy, {"x": 1, "y": [1, 2]}, "v")
    assert same == run_id(toy, {"y": [1, 2], "x": 1}, "v") and len(same) == 10
    assert len({same, run_id(toy, {"x": 2, "y": [1, 2]}, "v"), run_id(toy, {"x": 1, "y": [1, 2]}, "w"), run_id("other", {"x": 1, "y": [1, 2]}, "v")}) == 4


def test_command(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.yaml").write_text(f"experiment: {toy}\ngrid: {{x: [1, 0]}}\n")
    words = ["g.yaml", "--workers", "0", "--code", "v"]
    assert spml_sweep([*words, "--dry"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["new", "new"] and not (tmp_path / "runs").exists()
    assert spml_sweep(words) == 1
    said = capsys.readouterr()
    assert "1 of 2 runs failed" in said.err and "x 1" in said.out
    assert spml_sweep([*words, "--dry"]) == 0 and [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["done", "failed"]
    (tmp_path / "g.yaml").write_text(f"experiment: {toy}\ngrid: {{z: [1]}}\n")
    assert spml_sweep(words) == 2 and "no parameter 'z'" in capsys.readouterr().err
    assert len(list((tmp_path / "runs" / "g").glob("toy-*"))) == 2 # refused before anything started


@pytest.mark.parametrize("words, said", [([], "--data voc needs --root DIR"), (["--root", "nowhere"], "nowhere: no such folder")])
def test_images_must_be_there(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert spml_sweep(["table2_paper", *words]) == 2 and said in capsys.readouterr().err and not (tmp_path / "runs").exists()
    assert spml_sweep(["table2_paper", "--dry"]) == 0 # what would run may be asked anywhere


def test_state_of_what_never_ran(tmp_path): assert run_state(tmp_path / "x")["state"] == "new"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    "Commands with the names of SLURM's that run the script of a job right here"
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is an extra")
    for name, script in (("sbatch", f'cat "$1" > {tmp_path}/job.sh\nsetsid bash {tmp_path}/job.sh > {tmp_path}/job.log 2>&1 &\necho "Submitted batch job $!"'), ("scancel", 'kill -- "-$1"')):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def test_jobs_of_slurm_do_the_runs(toy, slurm):
    table = sweep(toy, runs_of(1, 0), slurm / "s", slurm=1, memory="4GB", code="v", progress=False)
    assert list(table.state) == ["done", "failed"]
    header = (slurm / "job.sh").read_text()
    assert "#SBATCH --cpus-per-task=1" in header and "#SBATCH --mem=4G" in header
    worker = int((slurm / "s" / table.folder[0] / "attempt0").read_text().split()[1])
    for _ in range(100):
        if not alive(worker): break
        time.sleep(.1)
    assert worker != os.getpid() and not alive(worker) # the job was cancelled


def test_slurm_says_what_it_lacks(toy, slurm, monkeypatch):
    with pytest.raises(SpmlError, match="SLURM, jobs of auto"): sweep(toy, runs_of(1), slurm / "s", slurm=1, code="v", progress=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SpmlError, match="sbatch: no such command"): sweep(toy, runs_of(1), slurm / "s", slurm=1, memory="1GB", code="v", progress=False)


def test_a_grid_without_end_is_refused_at_once(tmp_path):
    (tmp_path / "g.yaml").write_text("experiment: single\ngrid:\n" + "".join(f"  {k}: [{', '.join(str(v) for v in range(1, 101))}]\n" for k in ("seed", "steps", "rounds", "regions", "crop", "size")))
    start = time.monotonic()
    with pytest.raises(SpmlError, match=r"g.yaml: has 1,000,000,000,000 runs, and the limit is 10,000"): read_grid(tmp_path / "g.yaml")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("text", ["[]", "5", "{}", '{"state": 5}', '{"state": "done"}', '{"state": "finished", "message": "", "seconds": 1}', "{", ""])
def test_a_spoiled_status_is_that_of_a_run_to_do(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert run_state(tmp_path)["state"] == "new"


def test_a_sweep_touches_nobodys_folder(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sweep.json").write_text('{"mine": 1}')
    assert spml_sweep(["table2_scenes", "--out", str(tmp_path / "mine"), "--workers", "0"]) == 2
    assert "no record that the kit made this folder" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["sweep.json"]


@pytest.mark.parametrize("gpus, devices", [(0, [None]*4), (1, [None]*4), (2, ["cuda:0", "cuda:1"]*2), (3, ["cuda:0", "cuda:1", "cuda:2", "cuda:0"])])
def test_workers_share_the_gpus_in_turn(monkeypatch, gpus, devices):
    monkeypatch.delenv("SPML_DEVICE", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert [_own_gpu(k) for k in range(4)] == devices and _own_gpu("tcp://far:1") is None
    monkeypatch.setenv("SPML_DEVICE", "cpu")
    assert _own_gpu(1) is None

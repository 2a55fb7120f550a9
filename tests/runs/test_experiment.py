"Experiments: papermill runs of toy notebooks and the two commands, each as a user meets it."
import ast
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from papermill import inspect_notebook
from PIL import Image

from spml_kit.core import SpmlError
from spml_kit.files import read_json
from spml_kit.runs.experiment import RunFailed, check_parameters, clocked, code_version, copy_run, check_given, experiments, find_notebook, notebook_parameters, profile_parameters, run_notebook, typed_values
from spml_kit.runs.cli import spml_prepare, spml_run
from spml_kit.regions.oversegment import RegionCache

COMMANDS = Path(sys.executable).parent
PARAMETERS = "steps = 3 # of training\nrate = 0.1 # of learning\nroot = '' # folder of images\nannotation = 'scribbles' # kind\nseeds = (0, 1) # of the runs\nsize = None # any\nout = '.' # folder of the run"
WRITE = """from spml_kit.files import write_json
write_json(f'{out}/metrics.json', {'rows': [{'method': 'spml_head', 'data': 'scenes', 'annotation': annotation, 'seed': s, 'miou': 10.*steps, 'per_class': {}} for s in seeds]})"""


def write_notebook(path, *cells, tagged=True):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    if tagged:
        nb.cells[0].metadata.tags = ["parameters"]
    nbformat.write(nb, path)
    return path


@pytest.fixture
def toy(tmp_path):
    return write_notebook(tmp_path / "toy.ipynb", PARAMETERS, "import sys\nprint('python', sys.executable)\nprint('root', root)", WRITE)


def command(*words, cwd, **environment):
    "Run a console command from a shell that knows nothing of the virtual environment"
    clean = {k: v for k, v in os.environ.items() if k not in ("PATH", "VIRTUAL_ENV", "PYTHONPATH") and not k.startswith("JUPYTER")}
    env = clean | {"PATH": "/usr/bin:/bin", "COLUMNS": "200"} | environment
    name, *rest = map(str, words)
    return subprocess.run([COMMANDS / name, *rest], cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)


def test_parameters_are_what_the_cell_assigns_with_the_words_behind_it(tmp_path):
    cell = "%matplotlib inline\ncolour: str = '#ffb000' # of strokes; # twice\nsizes = ( # of pictures\n    64,\n    128, # pixels\n)\nbare: int\nrate, more = 1, 2\nwhole = 3*4\nlast = None"
    assert notebook_parameters(write_notebook(tmp_path / "a.ipynb", cell)) == {
        "colour": ("#ffb000", "of strokes; # twice"), "sizes": ((64, 128), "of pictures pixels"), "whole": ("3*4", ""), "last": (None, "")}
    with pytest.raises(SpmlError, match=r"b.ipynb: the cell of parameters is not Python \(line 2\)"):
        notebook_parameters(write_notebook(tmp_path / "b.ipynb", "a = 1\nb = = 2"))


def test_parameters_of_the_experiments_are_those_that_papermill_tells():
    for path in experiments().values():
        told = {p["name"]: p["help"].strip() for p in inspect_notebook(str(path)).values()}
        assert {name: comment for name, (_, comment) in notebook_parameters(path).items()} == told


def test_run_leaves_notebook_report_metrics_and_environment(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    final = run_notebook(toy, "deep/run", {"steps": 5, "root": Path("photographs")}, progress=False)
    assert final == tmp_path / "deep" / "run" / "toy.ipynb"
    assert sorted(p.name for p in final.parent.iterdir()) == ["environment.json", "log.txt", "metrics.json", "report.html", "toy.ipynb"]
    assert [r["miou"] for r in read_json(final.parent / "metrics.json")["rows"]] == [50, 50]
    text = "".join(o["text"] for c in nbformat.read(final, 4).cells for o in c.get("outputs", []))
    assert f"python {sys.executable}" in text and f"root {tmp_path}/photographs" in text
    env = read_json(final.parent / "environment.json")
    assert env["parameters"] == {"steps": 5, "root": f"{tmp_path}/photographs", "out": str(final.parent)}
    assert env["packages"]["torch"] and env["python"] and env["platform"]


def test_the_device_reaches_the_notebook_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_notebook(tmp_path / "asks.ipynb", "out = '.'", "import os\nfrom spml_kit.files import write_json\nwrite_json(f'{out}/metrics.json', {'rows': [], 'device': os.environ.get('SPML_DEVICE')})")
    for before, word, inside in ((None, "cpu", "cpu"), ("cuda:7", "cpu", "cpu"), ("cuda:7", None, "cuda:7"), (None, "cuda:1", "cuda:1"), (None, None, None)):
        if before is None: monkeypatch.delenv("SPML_DEVICE", raising=False)
        else: monkeypatch.setenv("SPML_DEVICE", before)
        assert spml_run(["asks.ipynb", "--out", "run", *(["--device", word] if word else [])]) == 0
        assert read_json(tmp_path / "run" / "metrics.json")["device"] == inside and os.environ.get("SPML_DEVICE") == before


@pytest.mark.parametrize("word", ["gpu", "cuda:", "cuda:a", "0", "", "cpu "])
def test_words_that_are_no_device(word, capsys):
    with pytest.raises(SystemExit): spml_run(["scribbles", "--device", word])
    assert "give cpu, cuda or cuda:1" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_said_by_the_run(tmp_path, capsys):
    assert spml_run(["scribbles", "--device", "cuda:99", "--out", str(tmp_path / "run")]) == 2
    assert "device 'cuda:99': PyTorch sees" in capsys.readouterr().err


def test_report_stands_alone(tmp_path):
    Image.fromarray(np.full((4, 4, 3), 200, np.uint8)).save(tmp_path / "dot.png")
    nb = nbformat.read(write_notebook(tmp_path / "picture.ipynb", "#| hide\nsecret = 1", "import matplotlib.pyplot as plt", "plt.plot([1, 2]);", tagged=False), 4)
    nb.cells.append(nbformat.v4.new_markdown_cell("![a dot](dot.png)"))
    nbformat.write(nb, tmp_path / "picture.ipynb")
    final = run_notebook(tmp_path / "picture.ipynb", tmp_path / "run", progress=False)
    html = (final.parent / "report.html").read_text()
    assert len(re.findall(r'<img[^>]*src="data:image/png;base64', html)) == 2
    assert 'src="http' not in html and "<link" not in html and "secret" not in html


@pytest.mark.parametrize("given, said", [
    ({"step": 3}, "no parameter 'step'; did you mean 'steps'?"),
    ({"zzz": 3}, "no parameter 'zzz' (there are: steps, rate, root, annotation, seeds, size, out)"),
    ({"steps": "three"}, "steps='three' must be of type int, like its default 3"),
    ({"steps": 3.5}, "steps=3.5 must be of type int"),
    ({"steps": True}, "steps=True must be of type int"),
    ({"rate": "fast"}, "rate='fast' must be of type float"),
    ({"annotation": 3}, "annotation=3 must be of type str"),
    ({"steps": Path("x")}, "must be of type int"),
])  # fmt: skip
def test_wrong_parameters_are_refused_before_anything_starts(toy, tmp_path, given, said):
    with pytest.raises(SpmlError) as e:
        run_notebook(toy, tmp_path / "run", given)
    assert said in str(e.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given, said", [
    ({"methods": ["smpl"]}, "no 'smpl'; did you mean 'spml'?"),
    ({"refine": ["regions", "crff"]}, "no 'crff'; did you mean 'crf'?"),
    ({"data": "vok"}, "no 'vok'; did you mean 'voc'?"),
    ({"skip": ["wallk"]}, "no 'wallk'; did you mean 'walk'?"),
    ({"recipe_changes": {"gird": [2, 2]}}, "recipe has no entry 'gird'; did you mean 'grid'?"),
    ({"recipe_changes": {"relations": {"cooccurence": {}}}}, "no relation 'cooccurence'; did you mean 'cooccurrence'?"),
    ({"recipe_changes": {"relations": {"similarity": {"kapa": 3}}}}, "kapa"),
    ({"recipe_changes": {"relations": {"similarity": 3}}}, "relation 'similarity' is 3; it takes arguments by name"),
    ({"recipe_changes": {"relations": 3}}, "relations = 3 is of type int, not dict"),
    ({"recipe_changes": {"lr": "1e-3"}}, "lr = '1e-3' is of type str, not float"), # YAML takes 1e-3 for a text
    ({"recipe_changes": {"bs": True}}, "bs = True is of type bool, not int"),
    ({"recipe_changes": {"grid": [6]}}, "grid = [6] must be two numbers"),
    ({"tag_recipe_changes": {"gird": 1}}, "tag_recipe_changes: recipe has no entry 'gird'"),
    ({"keypoints": {"sgma": 1}}, "keypoints have no 'sgma'; did you mean 'sigma'?"),
])  # fmt: skip
def test_misspelt_values_are_refused_before_anything_starts(given, said):
    with pytest.raises(SpmlError) as e: check_parameters(find_notebook("single"), given)
    assert said in str(e.value)


@pytest.mark.parametrize("name, given", [("quickstart", {"annotation": "scribble"}), ("regions", {"methods": ["hedd"]}), ("seeds", {"methods": ["camm"]}), ("seeds", {"data": "vok"}),
    ("relations", {"annotation": "scrible"}), ("relations", {"data": "vok"}), ("relations", {"recipe_name": "smal"}), ("semi", {"methods": ["spmll"]}), ("semi", {"labels": "ful"})])  # fmt: skip
def test_every_experiment_lists_its_choices(name, given):
    with pytest.raises(SpmlError, match="did you mean"): check_parameters(find_notebook(name), given)


def test_folders_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = check_parameters(find_notebook("single"), {"root": "photos", "weights": "net.pt", "region_folder": "hed", "label_folder": "", "train_split": "train"})
    assert given == {"root": f"{tmp_path}/photos", "weights": f"{tmp_path}/net.pt", "region_folder": f"{tmp_path}/hed", "label_folder": "", "train_split": "train"}


def test_version_of_the_code_is_that_of_its_source(toy):
    before = code_version(toy)
    nb = nbformat.read(toy, 4)
    nb.cells.append(nbformat.v4.new_markdown_cell("told at length"))
    nb.cells[1].execution_count = 7
    nbformat.write(nb, toy)
    assert code_version(toy) == before
    nb.cells[1].source += "\n1 + 1"
    nbformat.write(nb, toy)
    assert code_version(toy) != before


def test_going_on_under_other_code_is_said(toy, tmp_path, capsys):
    run_notebook(toy, tmp_path / "run", progress=False)
    run_notebook(toy, tmp_path / "run", progress=False)
    assert "another version of the code" not in capsys.readouterr().out
    write_notebook(toy, PARAMETERS, WRITE)
    run_notebook(toy, tmp_path / "run", progress=False)
    assert "started with another version of the code, and resumed" in capsys.readouterr().out


@pytest.mark.parametrize("url", ["memory://copies", "file"])
def test_copies_of_a_run(url, tmp_path):
    import fsspec
    run = tmp_path / "run-1"
    url = f"file://{tmp_path}/copies/deep" if url == "file" else url
    (run / "spml").mkdir(parents=True)
    for name in ("environment.json", "metrics.json", "spml/checkpoint"): (run / name).write_text("old")
    copy_run(run, url)
    copy_run(run, url)
    fs, root = fsspec.url_to_fs(url)
    listed = lambda: sorted(p.split("run-1/", 1)[1] for p in fs.find(root))
    assert listed() == ["copied.json", "environment.json", "metrics.json", "spml/checkpoint"]
    (run / "spml/checkpoint").unlink()
    (run / "metrics.json").write_text("new")
    copy_run(run, url)
    assert listed() == ["copied.json", "environment.json", "metrics.json"] and fs.cat_file(f"{root}/run-1/metrics.json") == b"new"


def test_a_copy_that_was_cut_short_does_not_pass_for_whole(tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem
    run, url = tmp_path / "run-1", f"file://{tmp_path}/copies"
    (run / "spml").mkdir(parents=True)
    for name in ("environment.json", "metrics.json", "spml/checkpoint"): (run / name).write_text(name)
    put = LocalFileSystem.put_file
    def full(self, here, there, **k):
        if "checkpoint" in here: raise OSError(28, "No space left on device")
        return put(self, here, there, **k)
    with monkeypatch.context() as m:
        m.setattr(LocalFileSystem, "put_file", full)
        with pytest.raises(OSError): copy_run(run, url)
    copy_run(run, url)
    assert (tmp_path / "copies" / "run-1" / "spml" / "checkpoint").read_text() == "spml/checkpoint"


def test_profiles_fit_their_notebooks():
    import yaml
    table = yaml.safe_load((find_notebook("single").parent / "profiles.yaml").read_text())
    for name, per_notebook in table.items():
        for stem, given in per_notebook.items():
            check_parameters(find_notebook(stem), given)
            if stem == "single" and name != "paper_densepose" and given.get("rounds", 1)*given.get("steps", 1) > 100: # seeds of a classifier of four steps would spoil them
                assert given["tag_steps"] >= 100, name
    with pytest.raises(SpmlError, match=r"profile 'voc' has no seeds; profiles with it: tiny, scenes, voc_animals"):
        profile_parameters("voc", find_notebook("seeds"))
    assert profile_parameters("tiny", find_notebook("seeds")) == {} # the defaults


def test_profiles_are_merged_entry_by_entry(monkeypatch, tmp_path):
    import spml_kit.runs.cli as module
    seen = {}
    monkeypatch.setattr(module, "run_notebook", lambda name, out, parameters, timeout, device, processes: seen.update(parameters) or tmp_path / "x.ipynb")
    assert spml_run(["keypoints", "--profile", "paper_densepose", "--profile", "dry", "--data", "parts", "-p", "seed", "3"]) == 0
    assert (seen["data"], seen["steps"], seen["seed"], seen["recipe_name"], seen["size"]) == ("parts", 2, 3, "paper_densepose", 640)
    seen.clear()
    assert spml_run(["points", "--profile", "parts", "--profile", "dry"]) == 0
    assert seen["recipe_changes"]["bs"] == 2 and seen["recipe_changes"]["grid"] == [12, 12]
    for words, expected in ((["quickstart"], ("n_train", 400)), (["points"], ("n_train", 400)), (["points", "--profile", "tiny"], ("n_train", None)), (["comparison"], ("n_train", None))):
        seen.clear()
        assert spml_run(words) == 0 and seen.get(expected[0]) == expected[1], words


def test_runs_are_made_on_this_machine(capsys):
    with pytest.raises(SystemExit): spml_run(["scribbles", "--out", "s3://bucket/runs"])
    assert "--copy-to copies it there" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"rate": 1}, {"seeds": [3]}, {"size": 7}, {"size": "large"}, {}])
def test_fitting_parameters_pass(toy, given):
    assert check_parameters(toy, given) == given


def test_notebook_without_parameters_cell(tmp_path):
    path = write_notebook(tmp_path / "plain.ipynb", "1 + 1", tagged=False)
    assert notebook_parameters(path) == {}
    with pytest.raises(SpmlError, match=r"no parameter 'a' \(there are: none\)"):
        check_parameters(path, {"a": 1})


def test_files_that_are_no_notebooks_are_named(tmp_path):
    (tmp_path / "half.ipynb").write_text('{"cells": [')
    with pytest.raises(SpmlError, match="half.ipynb: not a notebook"):
        run_notebook(tmp_path / "half.ipynb", tmp_path / "run")
    with pytest.raises(SpmlError, match="absent.ipynb: no such notebook"):
        find_notebook(tmp_path / "absent.ipynb")


def test_failing_cell_keeps_the_notebook_and_puts_old_results_aside(toy, tmp_path):
    out = tmp_path / "run"
    run_notebook(toy, out, progress=False)
    write_notebook(toy, PARAMETERS, "print('before')", "[][steps]")
    with pytest.raises(RunFailed, match=r"cell \[4\] failed with IndexError: list index out of range; the traceback is in .*toy.ipynb") as e:
        run_notebook(toy, out, {"steps": 7}, progress=False)
    assert "\n" not in str(e.value)
    kept = (out / "toy.ipynb").read_text()
    assert "before" in kept and "Traceback" in kept and "steps = 7" in kept
    assert sorted(p.name for p in out.iterdir()) == ["environment.json", "log.txt", "previous", "toy.ipynb"]
    assert sorted(p.name for p in (out / "previous").iterdir()) == ["environment.json", "log.txt", "metrics.json", "report.html", "toy.ipynb"]
    with pytest.raises(RunFailed): run_notebook(toy, out, progress=False)
    assert (out / "previous" / "metrics.json").exists() # once more: what was good is kept
    write_notebook(toy, PARAMETERS, WRITE)
    run_notebook(toy, out, progress=False)
    assert (out / "metrics.json").exists() and not (out / "previous").exists()


def test_a_refused_run_leaves_everything_as_it_was(toy, tmp_path):
    out = tmp_path / "run"
    run_notebook(toy, out, progress=False)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    write_notebook(toy, PARAMETERS, "from spml_kit.core import SpmlError", "raise SpmlError('other labels')")
    with pytest.raises(SpmlError, match="other labels"): run_notebook(toy, out, {"steps": 7}, progress=False)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_runs_have_addresses(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = lambda: {p.name for p in (tmp_path / "runs").iterdir()}
    for words, n in (([], 1), ([], 1), (["-p", "steps", "4"], 2), (["-p", "steps", "3"], 3)): # what is said is the address, even where it is the default
        assert spml_run(["toy.ipynb", *words]) == 0 and len(names()) == n
    write_notebook(toy, PARAMETERS, WRITE)
    assert spml_run(["toy.ipynb"]) == 0 and len(names()) == 4


def test_death_of_the_kernel_is_told(tmp_path):
    path = write_notebook(tmp_path / "dies.ipynb", "import os", "print('alive', flush=True)", "os._exit(9)", tagged=False)
    with pytest.raises(RunFailed, match="the kernel died"):
        run_notebook(path, tmp_path / "run", progress=False)
    assert "alive" in (tmp_path / "run" / "dies.ipynb").read_text()


def test_out_that_cannot_be_a_folder(toy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpmlError, match="file: this is a file"):
        run_notebook(toy, tmp_path / "file")


def test_every_experiment_takes_the_folder_of_the_run_and_has_titles():
    for path in experiments().values():
        assert "out" in notebook_parameters(path), f"{path.name}: its cell tagged `parameters` needs out = ..."


@pytest.mark.parametrize("path", experiments().values(), ids=lambda p: p.stem)
def test_parameters_tell_their_type_and_meaning(path):
    for p in inspect_notebook(str(path)).values():
        assert type(ast.literal_eval(p["default"])).__name__ == p["inferred_type_name"] and p["help"], p


@pytest.mark.parametrize("name", ["spml_run", "spml_prepare"])
def test_help(name, tmp_path):
    done = command(name, "--help", cwd=tmp_path)
    assert done.returncode == 0 and f"usage: {name}" in done.stdout and "--root DIR" in done.stdout


def test_command_from_a_strange_shell(toy, tmp_path):
    elsewhere, home = tmp_path / "with space", tmp_path / "home"
    elsewhere.mkdir()
    kernel = home / ".local" / "share" / "jupyter" / "kernels" / "python3"  # a kernel of the user's that must not be taken
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    done = command("spml_run", "../toy.ipynb", "-p", "steps", "4", "-p", "seeds", "(7,)", "-p", "annotation", "5", cwd=elsewhere, HOME=str(home))
    assert done.returncode == 0, done.stderr
    (python,) = re.findall(r"python (\S+)", done.stdout)  # what the cells print reaches the terminal
    assert Path(python).parent.samefile(Path(sys.executable).parent)
    assert "seed 7" in done.stdout and "40.00 %" in done.stdout and "report.html" in done.stdout
    assert "cell" not in done.stderr  # a progress bar would stand between the lines of a log
    (folder,) = (elsewhere / "runs").iterdir()
    assert re.fullmatch("toy-[0-9a-f]{10}", folder.name) and read_json(folder / "metrics.json")["rows"][0]["annotation"] == "5"


def test_a_terminal_sees_a_progress_bar(toy, tmp_path):
    pty, termios, fcntl = map(pytest.importorskip, ("pty", "termios", "fcntl"))  # not on Windows
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # in one of no width a bar is empty
    run = subprocess.Popen([COMMANDS / "spml_run", str(toy), "--out", str(tmp_path / "run")], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=there)
    os.close(there)
    said = b""
    try:
        while part := os.read(here, 4096): said += part
    except OSError: pass  # the other end is closed
    os.close(here)
    assert run.wait(300) == 0 and b"report.html" in run.stdout.read(), said[-2000:]
    assert re.search(rb"Executing: *100%.*cell", said)


@pytest.mark.parametrize("words, said", [
    ([], "name an experiment"),
    (["scribbles", "--data", "voc"], "--data voc needs --root DIR"),
    (["scribbles", "--data", "folder", "--root", "nowhere"], "nowhere: no such folder"),
    (["scribbles", "--data", "folder", "--root", "."], "no folder images/ in it"),
    (["nothing"], "no experiment 'nothing'"),
    (["scribble"], "did you mean 'scribbles'?"),
    (["scribbles", "--profile", "paper_voc"], "--data voc needs --root DIR"),
    (["scribbles", "--profile", "voc_animals", "--root", "nowhere"], "nowhere: no such folder"),
    (["clicks"], "not for scenes: give --data voc"),
    (["toy.ipynb", "-p", "stepz", "1"], "did you mean 'steps'?"),
    (["toy.ipynb", "-p", "steps", "many"], "steps='many' must be of type int"),
    (["toy.ipynb", "--profile", "paper"], "no profile 'paper'"),
])  # fmt: skip
def test_errors_are_one_line(toy, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert spml_run(words) == 2
    told = capsys.readouterr().err
    assert said in told and told.startswith("spml_run: ") and told.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_exit_codes_of_failing_cells(toy, tmp_path):
    write_notebook(toy, PARAMETERS, "from spml_kit.core import SpmlError", "raise SpmlError('masks/7.png: value 21 is not a label')")
    done = command("spml_run", toy, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.endswith("spml_run: masks/7.png: value 21 is not a label\n") and "Traceback" not in done.stderr
    write_notebook(toy, PARAMETERS, "1/0")
    done = command("spml_run", toy, cwd=tmp_path)
    assert done.returncode == 1 and "spml_run: cell [3] failed with ZeroDivisionError" in done.stderr and "Traceback" not in done.stderr


def test_interrupt_ends_the_kernel_too(tmp_path):
    path = write_notebook(tmp_path / "long.ipynb", "import os, time", "open('kernel.pid', 'w').write(str(os.getpid()))", "time.sleep(300)", tagged=False)
    run = subprocess.Popen([COMMANDS / "spml_run", path], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    wait_until(lambda: (tmp_path / "kernel.pid").exists() and (tmp_path / "kernel.pid").read_text())
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=60)[1].endswith("spml_run: interrupted\n") and run.returncode == 130
    wait_until(lambda: not Path("/proc", (tmp_path / "kernel.pid").read_text()).exists())
    assert len([*(tmp_path / "runs").glob("long-*/long.ipynb")]) == 1


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_list_shows_the_experiments_and_their_parameters(tmp_path):
    done = command("spml_run", "--list", cwd=tmp_path)
    assert done.returncode == 0
    for name, path in experiments().items():
        assert name in done.stdout and all(f"    {k} = " in done.stdout for k in notebook_parameters(path))


def test_prepare_regions_of_a_folder(tmp_path, capsys):
    images, regions = tmp_path / "images", tmp_path / "regions"
    images.mkdir()
    rng = np.random.default_rng(0)
    for k in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(images / f"{k}.png")
    words = ["--data", "folder", "--root", images, "--out", regions, "--n", "9", "--max-size", "48"]
    done = command("spml_prepare", *words, "--workers", "2", cwd=tmp_path)
    assert done.returncode == 0 and f"regions of 3 images are in {regions}" in done.stdout, done.stderr
    assert 1 < len(np.unique(RegionCache(regions).read("2", (32, 48)))) <= 9

    here = [*map(str, words), "--workers", "0"]
    written = (regions / "1.png").stat().st_mtime_ns
    (regions / "2.png").unlink()
    assert spml_prepare(here) == 0
    assert (regions / "2.png").exists() and (regions / "1.png").stat().st_mtime_ns == written  # only what was missing

    (images / "1.png").write_bytes(b"no image")
    (regions / "1.png").unlink()
    capsys.readouterr()
    assert spml_prepare(here) == 2 and "1.png: not a readable image" in capsys.readouterr().err


def test_prepare_regions_of_a_voc_folder_without_masks(tmp_path, capsys):
    root = tmp_path / "VOC2012"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("a\n")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8)).save(root / "JPEGImages" / "a.jpg")
    words = ["--data", "voc", "--root", str(root), "--out", str(tmp_path / "regions"), "--workers", "0"]
    assert spml_prepare(words) == 0 and (tmp_path / "regions" / "a.png").exists()
    assert spml_prepare([*words, "--split", "test"]) == 2 and "test.txt: no such list" in capsys.readouterr().err


def test_reader_that_stops_reading(tmp_path):
    "as in `spml_run --list | head -1`; more than a pipe holds is written only when nobody reads any more"
    run = subprocess.Popen([COMMANDS / "spml_run", "--list"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    run.stdout.close()
    assert (run.stderr.read(), run.wait(timeout=300)) == ("", 0)


# files of others, numbers, what the machine refuses

def contents(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("there", ["previous/mine.txt", "report.html", "metrics.json", "log.txt", "toy.ipynb", "environment.json", "photo.png"])
def test_a_run_touches_nobodys_files(toy, tmp_path, there, capsys):
    out = tmp_path / "mine"
    (out / there).parent.mkdir(parents=True)
    (out / there).write_text('{"mine": 1}')
    before = contents(tmp_path)
    assert spml_run([str(toy), "--out", str(out)]) == 2
    assert f"{out}: holds" in (said := capsys.readouterr().err) and "nothing was changed" in said and len(said.strip().splitlines()) == 1
    assert contents(tmp_path) == before


def test_what_somebody_put_into_a_run_stays(toy, tmp_path):
    out = tmp_path / "run"
    run_notebook(toy, out, progress=False)
    (out / "notes.txt").write_text("mine")
    run_notebook(toy, out, progress=False)
    assert (out / "notes.txt").read_text() == "mine" and not (out / "previous").exists()
    (out / "previous").mkdir()
    (out / "previous" / "report.html").write_text("mine")
    before = contents(out)
    with pytest.raises(SpmlError, match="previous: holds report.html"): run_notebook(toy, out, progress=False)
    assert contents(out) == before


def test_a_notebook_is_never_replaced_by_its_run(toy, tmp_path):
    run_notebook(toy, tmp_path / "run", progress=False)
    before = contents(tmp_path / "run")
    with pytest.raises(SpmlError, match="is in the folder of the run"): run_notebook(tmp_path / "run" / "toy.ipynb", tmp_path / "run", progress=False)
    assert contents(tmp_path / "run") == before


def test_a_copy_goes_only_where_a_copy_was(toy, tmp_path):
    (tmp_path / "there" / "run").mkdir(parents=True)
    (tmp_path / "there" / "run" / "thesis.tex").write_text("mine")
    run_notebook(toy, tmp_path / "run", progress=False)
    with pytest.raises(SpmlError, match="was not copied there by the kit"): copy_run(tmp_path / "run", f"file://{tmp_path}/there")
    assert contents(tmp_path / "there") == {"run/thesis.tex": b"mine"}


@pytest.mark.parametrize("name", ["x {0}", "{steps} {nothing}", "}{", "n" * 240])
def test_names_of_folders_are_taken_as_they_are(toy, tmp_path, name):
    final = run_notebook(toy, tmp_path / name, progress=False)
    assert final == tmp_path / name / "toy.ipynb" and (tmp_path / name / "metrics.json").exists() and [p.name for p in tmp_path.iterdir() if p.is_dir()] == [name]


def test_a_notebook_with_a_long_or_odd_name(toy, tmp_path):
    for name in ("a {0}.ipynb", "n" * 244 + ".ipynb"):
        assert run_notebook(toy.rename(tmp_path / name), tmp_path / "out" / name[:5], progress=False).name == name
        toy = tmp_path / name


REFUSALS = {"full": ("ENOSPC", "disk is full"), "read only": ("EROFS", "read-only"), "permission": ("EACCES", "no permission"), "long": ("ENAMETOOLONG", "too long"), "loop": ("ELOOP", "link leads to itself")}


@pytest.mark.parametrize("name, says", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("prog", ["spml_run", "spml_prepare", "spml_import", "spml_sweep", "spml_tables"])
def test_what_the_machine_refuses_is_one_line_with_path_and_cure(prog, name, says, capsys):
    import errno
    from spml_kit.runs.cli import _command
    number = getattr(errno, name)
    def action(): raise OSError(number, os.strerror(number), "runs/a")
    assert _command(prog, action) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(f"{prog}: runs/a: .*{says}.*\\n", said)


def test_a_file_or_a_loop_in_place_of_a_folder(toy, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "a.png")
    for out in ("file", "file/deeper", "loop", "loop/deeper"):
        for words in (["spml_run", toy], ["spml_prepare", "--data", "folder", "--root", "images", "--workers", "0"]):
            done = command(*words, "--out", out, cwd=tmp_path)
            assert done.returncode in (1, 2) and "Traceback" not in done.stderr and out.split("/")[0] in done.stderr.strip().splitlines()[-1], done.stderr


@pytest.mark.parametrize("words", [["spml_prepare", "--data", "folder", "--root", ".", "--out", "r", "--max-size", "0"], ["spml_prepare", "--data", "folder", "--root", ".", "--out", "r", "--n", "0"],
    ["spml_prepare", "--data", "folder", "--root", ".", "--out", "r", "--workers", "-1"], ["spml_run", "quickstart", "--timeout", "-5"], ["spml_run", "quickstart", "--timeout", "1.5"], ["spml_sweep", "table2_scenes", "--workers", "-1"],
    ["spml_sweep", "table2_scenes", "--slurm", "-1"], ["spml_sweep", "table2_scenes", "--timeout", "0"]], ids=" ".join)
def test_numbers_on_the_command_line_have_their_ranges(words, tmp_path):
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 2 and "a whole number from" in done.stderr.strip().splitlines()[-1] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, value", [("n_train", -1), ("steps", -1), ("rounds", 0), ("length", 1.5), ("length", float("nan")), ("alpha", float("inf")), ("scales", [1., 0.]), ("threshold", -0.1), ("workers", -2), ("recipe_changes", {"lr": float("inf")}),
    ("recipe_changes", {"multipliers": [1, 1]}), ("recipe_changes", {"relations": {"similarity": {"weight": float("inf")}}}), ("tag_recipe_changes", {"scale": [0, 0]})])
def test_numbers_of_an_experiment_have_their_ranges(name, value):
    with pytest.raises(SpmlError, match=f"single: (parameter )?{name}"): check_parameters(find_notebook("single"), {name: value})


def test_defaults_and_profiles_are_in_their_ranges():
    import yaml
    profiles = yaml.safe_load((find_notebook("single").parent / "profiles.yaml").read_text())
    for path in experiments().values():
        check_parameters(path, {k: v for k, (v, _) in notebook_parameters(path).items()})
        for profile in profiles.values(): check_parameters(path, profile.get(path.stem, {}))


def test_papermill_by_hand_gets_no_further_than_the_parameters(tmp_path):
    done = subprocess.run([sys.executable, "-m", "papermill", find_notebook("regions"), tmp_path / "a.ipynb", "--no-progress-bar", "-p", "out", tmp_path / "out", "-p", "n_imagse", "2"], capture_output=True, text=True, timeout=250)
    assert done.returncode != 0 and "no parameter 'n_imagse'; did you mean 'n_images'" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, value, says", [("flip", "false", "must be of type bool"), ("rounds", 0, "rounds=0"), ("annotation", "scribble", "did you mean 'scribbles'"), ("length", 1.5, "in 0..1")])
@pytest.mark.parametrize("path", experiments().values(), ids=experiments())
def test_every_experiment_checks_what_it_was_given(path, name, value, says):
    "Its first cell after the parameters does"
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    at = next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", []))
    known = {}
    exec(cells[at].source, known)
    known["check_given"] = check_given
    exec(cells[at + 1].source, known) # the defaults pass
    if name not in known: return
    with pytest.raises(SpmlError, match=says): exec(cells[at + 1].source, known | {name: value})


@pytest.mark.parametrize("text", ["[]", "5", "null", "{}", '{"cells": 3, "nbformat": 4}', '{"cells": [3], "nbformat": 4}', '{"cells": [{}], "nbformat": 4}', '{"nbformat": 3, "worksheets": []}', '{"cells": [], "nbformat": "x"}', "\x00"])
def test_notebooks_of_another_shape_are_named(tmp_path, text):
    (tmp_path / "a.ipynb").write_text(text)
    with pytest.raises(SpmlError, match="a.ipynb: (not )?a notebook"): notebook_parameters(tmp_path / "a.ipynb")
    assert spml_run([str(tmp_path / "a.ipynb"), "--out", str(tmp_path / "run")]) == 2


def test_warnings_of_the_kernel_reach_the_log(tmp_path):
    toy = write_notebook(tmp_path / "t.ipynb", "out = '.'", "import warnings; warnings.warn('3 of 9 files belong to no image')")
    run_notebook(toy, tmp_path / "run", progress=False)
    assert "3 of 9 files belong to no image" in (tmp_path / "run" / "log.txt").read_text()


def test_large_images_are_reduced_as_training_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)).save("images/a.jpg")
    for more, size in (([], (120, 160)), (["--max-size", "80"], (60, 80)), (["--max-size", "full"], (300, 400))):
        assert spml_prepare(["--data", "folder", "--root", "images", "--out", f"r{len(more) and more[1]}", "--workers", "0", *more]) == 0
        assert RegionCache(f"r{len(more) and more[1]}").read("a").shape == size
    assert "images larger than 160 pixels are reduced, as `spml_run --data folder` does" in capsys.readouterr().out


def test_regions_are_not_taken_for_what_they_are_not(tmp_path, monkeypatch, capsys):
    "Photographs, masks, and a folder of another program"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for k in range(3): Image.fromarray(np.random.default_rng(k).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(f"images/{k}.png")
    (tmp_path / "masks").mkdir()
    for k in range(3): Image.fromarray(np.eye(20, dtype=np.uint8)).save(f"masks/{k}.png")
    before = contents(tmp_path)
    for out in ("images", "masks", "."):
        assert spml_prepare(["--data", "folder", "--root", "images", "--out", out]) == 2
        assert "no record that the kit made this folder" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert spml_prepare(["--data", "folder", "--root", "images", "--out", "r", "--workers", "0"]) == 0
    Image.new("RGB", (20, 20)).save("r/1.png") # somebody's, by mistake
    before = contents(tmp_path)
    assert spml_prepare(["--data", "folder", "--root", "images", "--out", "r", "--workers", "0"]) == 2
    assert "r/1.png: a picture with colours" in capsys.readouterr().err and contents(tmp_path) == before


@pytest.mark.parametrize("text, value", [("[1, 2.5]", [1, 2.5]), ("['a', 'b']", ["a", "b"]), ("[a, b_c]", ["a", "b_c"]), ("{lr: 0.1, name: x}", {"lr": 0.1, "name": "x"}),
                                         ("[1e-3]", [1e-3]), ("3", 3), ("True", True), ("[a, b", "[a, b"), ("plain words", "plain words")])
def test_lists_of_the_command_line_may_hold_bare_words(text, value):
    assert typed_values([("k", text)], {"k": ([], "")}) == {"k": value}


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_seconds_of_all_attempts_count_until_one_ends(tmp_path, monkeypatch, failures):
    now = iter(range(0, 1000, 5)) # each look at the clock is 5 seconds after the last
    monkeypatch.setattr(time, "process_time", lambda: float(next(now)))
    path = tmp_path / "seconds" / "net.json"
    for _ in range(failures):
        with pytest.raises(SpmlError), clocked(path): raise SpmlError("out of disk")
        assert not read_json(path)["whole"]
    with clocked(path): pass
    assert read_json(path) == dict(seconds=5.*(failures + 1), whole=True)
    with clocked(path): pass
    assert read_json(path) == dict(seconds=5.*(failures + 1), whole=True)


@pytest.mark.parametrize("text, value", [("true", True), ("True", True), ("TRUE", True), ("false", False), (" False ", False)])
def test_words_for_yes_and_no(text, value):
    known = dict(flip=(False, ""), name=("", ""))
    assert typed_values([("flip", text), ("name", text)], known) == dict(flip=value, name=text)

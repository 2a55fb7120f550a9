"""The commands: a folder without labels, the annotator's command, other data by one word, what is looked at before a run begins."""
import shlex
import json
import re
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from conftest import FIXTURES
from spml_kit.core import SpmlError
from spml_kit.data.annotations import Boxes
from spml_kit.data.formats import read_annotation
from spml_kit.data.readers import recognise_tool
from spml_kit.runs import cli
from spml_kit.runs.cli import ANNOTATE, annotator_notebook, spml_annotate, spml_import, spml_run


@pytest.fixture
def project(tmp_path):
    root = tmp_path/"my project"
    (root/"images").mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(root/"images"/"a.jpg")
    return root


@pytest.mark.parametrize("labels", [False, True])
def test_a_folder_without_labels_is_told_at_once_how_to_make_them(project, labels, tmp_path):
    "In a process of its own: less than three seconds of a processor, and nothing slow is imported"
    if labels: (project/"labels").mkdir()
    code = "import sys; from spml_kit.runs.cli import spml_run; rc = spml_run(sys.argv[1:]); print('torch' in sys.modules); sys.exit(rc)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, "scribbles", "--data", "folder", "--root", str(project), "--out", str(tmp_path/"run")], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and done.stdout.strip() == "False" and not (tmp_path/"run").exists()
    assert f"spml_annotate '{project}'" in done.stderr and f"spml_import FILE --images '{project}/images' --out NEW_FOLDER" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_the_annotators_notebook(project, capsys):
    assert spml_annotate([str(project), "--print"]) == 2 and "--classes background cat dog" in capsys.readouterr().err
    assert not (project/ANNOTATE).exists()
    assert spml_annotate([str(project), "--print", "--classes", "background", "cat's"]) == 0
    assert capsys.readouterr().out.strip().endswith(shlex.join(["-m", "jupyterlab", str(project/ANNOTATE)]))
    nb = json.loads((project/ANNOTATE).read_text())
    code = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
    assert code == ["from spml_kit.look.annotate import annotate", """annotate('.', ['background', "cat's"])"""] and nb["nbformat"] == 4
    assert spml_annotate([str(project), "--print"]) == 0 # the notebook knows the classes
    assert annotator_notebook(project, ["background", "cat's"]) == annotator_notebook(project, ["background", "cat's"])
    with pytest.raises(SpmlError, match=r"dog.*annotate\('\.', \[.*cat's"): annotator_notebook(project, ["background", "dog"])
    (project/ANNOTATE).write_text("{}") # somebody's by now
    with pytest.raises(SpmlError, match="other classes than .*dog"): annotator_notebook(project, ["background", "dog"])
    assert (project/ANNOTATE).read_text() == "{}"


def test_the_notebook_draws(project, monkeypatch):
    annotator_notebook(project, ["background", "cat"])
    monkeypatch.chdir(project)
    scope = {}
    for c in json.loads((project/ANNOTATE).read_text())["cells"]:
        if c["cell_type"] == "code": exec("a = " + c["source"] if c["source"].startswith("annotate") else c["source"], scope)
    scope["a"].add_stroke([(1, 1), (5, 4)], "cat")
    assert (project/"labels"/"a.png").exists() and (project/"classes.txt").read_text().split() == ["background", "cat"]


def test_jupyterlab_is_started_on_it(project, monkeypatch, capsys):
    (project/"classes.txt").write_text("background\ncat\n")
    calls = []
    monkeypatch.setattr(cli.subprocess, "run", lambda words: calls.append(words) or SimpleNamespace(returncode=0))
    assert spml_annotate([str(project)]) == 0 and calls == [[sys.executable, "-m", "jupyterlab", str(project/ANNOTATE)]]
    assert "annotate('.')" in (project/ANNOTATE).read_text()
    monkeypatch.setattr(cli.subprocess, "run", lambda words: SimpleNamespace(returncode=3))
    assert spml_annotate([str(project)]) == 1 and "ended with code 3" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert spml_annotate([str(project)]) == 2 and "pip install jupyterlab" in capsys.readouterr().err


@pytest.mark.parametrize("make, says", [(lambda r: r/"nowhere", "no such folder; make it"), (lambda r: r/"images", "no folder images/ in it"), (lambda r: (r/"images"/"a.jpg").unlink() or r, "no images here")])
def test_folders_that_cannot_be_drawn_on(project, make, says, capsys):
    assert spml_annotate([str(make(project)), "--print", "--classes", "background", "cat"]) == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("words, says", [(["--data", "csv"], "--root FILE"), (["--data", "csv", "--root", "."], "is not a file"), (["--data", "cityscapes"], "needs --root DIR"), (["--data", "ade20k", "--root", "nowhere"], "nowhere: no such folder")])
def test_other_data_want_a_root(words, says, capsys, tmp_path):
    assert spml_run(["scribbles", *words, "--out", str(tmp_path/"run")]) == 2 and says in capsys.readouterr().err
    assert not (tmp_path/"run").exists()


def test_lists_of_voc_are_looked_at_before_a_kernel_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "run_notebook", lambda *a, **k: pytest.fail("it has started"))
    (tmp_path / "JPEGImages").mkdir()
    assert cli.spml_run(["scribbles", "--data", "voc", "--root", str(tmp_path)]) == 2
    assert "ImageSets/Segmentation/train.txt: no such list" in capsys.readouterr().err


def test_regions_of_a_project_are_those_of_its_images(tmp_path, capsys):
    root = tmp_path / "p"
    for name, mode in (("images/a.jpg", "RGB"), ("labels/a.png", "L")):
        (root / name).parent.mkdir(parents=True)
        Image.new(mode, (80, 60)).save(root / name)
    (root / "classes.txt").write_text("background\ncat\n")
    assert cli.spml_prepare(["--data", "folder", "--root", str(root), "--out", str(tmp_path / "r"), "--workers", "0", "--n", "4"]) == 0
    assert [p.name for p in sorted((tmp_path / "r").glob("*.png"))] == ["a.png"] and "regions of 1 image are in" in capsys.readouterr().out
    assert cli.spml_prepare(["--data", "folder", "--root", str(root / "images"), "--out", str(tmp_path / "s"), "--workers", "0", "--n", "4"]) == 0


def test_the_command(tmp_path, capsys):
    words = [str(FIXTURES / "labelme"), "--out", str(tmp_path / "p")]
    assert spml_import([*words, "--dry"]) == 0 and not (tmp_path / "p").exists()
    said = capsys.readouterr().out
    assert "labelme; pictures: 1, without any shape: 0" in said and "nothing is written" in said and re.search(r"dog +1 ", said)
    assert spml_import([*words, "--as", "boxes"]) == 0 and "becomes its box" in capsys.readouterr().out
    assert read_annotation(tmp_path / "p" / "labels" / "a.json") == Boxes([(10, 10, 40, 40), (50, 20, 70, 55)], [1, 2])
    assert (tmp_path / "p" / "images" / "a.png").is_symlink()
    assert spml_import(words) == 2 and capsys.readouterr().err.count("\n") == 1
    assert spml_import([words[0]]) == 2 and "--out PROJECT" in capsys.readouterr().err
    assert spml_import([str(tmp_path / "p"), "--to", "coco", "--out", str(tmp_path / "c")]) == 0 and recognise_tool(tmp_path / "c" / "instances.json") == "coco"
    assert spml_import([str(tmp_path / "p"), "--to", "coco"]) == 2
    assert spml_import([str(tmp_path / "nothing"), "--out", str(tmp_path / "q")]) == 2 and not (tmp_path / "q").exists()


def test_the_annotators_notebook_learns_where_it_is_asked_to(project):
    path = annotator_notebook(project, ["background", "cat"], learn=True)
    assert "annotate('.', ['background', 'cat'], learn=True)" in path.read_text()
    annotator_notebook(project, ["background", "cat"], learn=True)
    path.write_text(path.read_text().replace(", learn=True", ""))
    with pytest.raises(SpmlError, match="does not learn"): annotator_notebook(project, ["background", "cat"], learn=True)

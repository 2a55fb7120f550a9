"The repository itself: notebooks, library and README agree, and files keep their form."
import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest
from fastai.callback.core import event
from fastcore.docments import docments

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT / "spml_kit").rglob("*.py") if not p.name.startswith("_") and p.stem != "all")
relative = lambda p: str(p.relative_to(ROOT))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
each_module = pytest.mark.parametrize("path", MODULES, ids=relative)


def tree(folder, pattern):
    "Contents of the files below a folder, by relative name"
    files = (p for p in folder.rglob(pattern) if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts))
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in files}


def differing(a, b):
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


@pytest.fixture(scope="module")
def synced(tmp_path_factory):
    "A copy of the project on which `make sync` has run"
    copy = tmp_path_factory.mktemp("synced")
    for name in ("settings.ini", "Makefile", "README.md"):
        shutil.copy2(ROOT / name, copy)
    for name in ("nbs", "spml_kit", "results"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    make = ["make", "sync", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed"]  # -o: this environment is good as it is
    done = subprocess.run(make, cwd=copy, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy


def test_library_is_what_the_notebooks_export(synced):
    assert differing(tree(ROOT / "spml_kit", "*.py"), tree(synced / "spml_kit", "*.py")) == [], "run `make sync`"


def test_notebooks_are_clean(synced):
    assert differing(tree(ROOT / "nbs", "*.ipynb"), tree(synced / "nbs", "*.ipynb")) == [], "run `make sync`"


def test_readme_is_what_the_index_shows(synced):
    assert (synced / "README.md").read_text() == (ROOT / "README.md").read_text(), "run `make sync`"


def test_links_of_the_readme_lead_somewhere():
    links = [t for t in re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text()) if "://" not in t]
    assert links and [t for t in links if not (ROOT / t).exists()] == []


@each_notebook
def test_links_of_notebooks_lead_to_notebooks(path):
    text = "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown")
    links = [t for t in re.findall(r"\]\(([^)#\s]+)", re.sub(r"`[^`]*`|\$[^$]*\$", "", text)) if "://" not in t]
    assert [t for t in links if not (path.parent / t).exists()] == []


@each_notebook
def test_notebook_is_small_and_shows_no_error(path):
    assert path.stat().st_size < 1e6
    cells = json.loads(path.read_text())["cells"]
    assert re.match(r"# .+\n+> .+", "".join(cells[0]["source"])), "the first cell holds a title and a subtitle"
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert [o["ename"] for o in outputs if o["output_type"] == "error"] == []
    # a printed folder of one's machine differs on every other one
    assert re.findall(r"(?:/tmp/|/home/|/root/|/Users/)[\w./-]*|[\w./-]*site-packages[\w./-]*", json.dumps(outputs)) == []


PAGES = [p for p in NOTEBOOKS if any(p.is_relative_to(ROOT / "nbs" / part) for part in ("api", "neighbours"))]


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_pages_of_the_library_begin_with_a_picture_or_a_table(path):
    lines = 0
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if "|---" in source or any(o.get("data", {}).keys() - {"text/plain"} for o in cell.get("outputs", [])):
            break
        lines += source.count("\n") + 1
    assert lines <= 45, "the first screen shows neither"


@each_notebook
def test_import_cells_hold_imports_only(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        if re.search(r"^\s*%%", source, re.M):
            continue
        statements = ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M)).body
        imports = [isinstance(s, (ast.Import, ast.ImportFrom)) for s in statements]
        assert all(imports) or not any(imports), f"an import stands among other code:\n{source}"


@each_notebook
def test_exported_cells_are_short(path):
    cells = [(c["id"], "".join(c["source"])) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    imports = re.compile(r"(#\|.*|from .*|import .*|\s*)$")
    long = [i for i, s in cells if s.startswith("#| export") and s.count("\n") > 40 and not all(map(imports.match, s.splitlines()))]
    assert long == []


def long_lines(source):
    "Numbers of the lines of code beyond 120 characters; the module's docstring and `__all__` are generated, and lie as they come"
    body = ast.parse(source).body
    generated = [n for n in body[:1] if isinstance(n, ast.Expr)] + [n for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    skipped = {k for n in generated for k in range(n.lineno, n.end_lineno + 1)}
    return [k for k, line in enumerate(source.splitlines(), 1) if len(line) > 120 and k not in skipped]


@pytest.mark.parametrize("path", sorted(p for p in (ROOT / "spml_kit").rglob("*.py") if p.stem != "_modidx"), ids=relative)
def test_lines_are_short(path):
    assert long_lines(path.read_text()) == []


def test_long_lines_are_seen():
    long = f"x = {'1' * 117}\n"
    assert long_lines(f"y = {'1' * 116}\n{long}z = 1\n{long}") == [2, 4]
    assert long_lines(f'"""{"a " * 80}"""\n__all__ = ["a",\n{" " * 120}"b"]\n{long}') == [4]


def unshown(path):
    "Public functions and classes that no later example of their notebook names and shows an output of"
    cells = [(c["outputs"], "".join(c["source"])) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    examples = [re.sub(r"#.*", "", s) if outputs and not re.match(r"#\| *(export|hide)", s) else "" for outputs, s in cells]
    for k, (_, source) in enumerate(cells):
        if not source.startswith("#| export"): continue
        made = [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
        made = [n.name for n in made if not any("patch" in ast.unparse(d) for d in n.decorator_list)]
        yield from (name for name in made if not re.search(rf"\b{name}\b", "\n".join(examples[k + 1:])))


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if "api" in p.parts], ids=relative)
def test_public_names_are_shown(path):
    assert not list(unshown(path))


ORDER = "core", "files", "arrays", "pictures", "metrics", "regions", "data", "method", "learn", "cams", "infer", "runs", "look", "neighbours", "renamed"


def imported(path):
    "Whole names of the modules that a file imports, wherever it does"
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    froms = [(n.module, a.name) for n in nodes if isinstance(n, ast.ImportFrom) and n.module for a in n.names]
    return {m for m, _ in froms} | {f"{m}.{a}" for m, a in froms} | {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}


@each_module
def test_a_folder_uses_those_above_it_and_nothing_private(path):
    place = path.relative_to(ROOT / "spml_kit").with_suffix("").parts
    for n in ast.walk(ast.parse(path.read_text())):
        if not isinstance(n, ast.ImportFrom): continue
        base = ("spml_kit", *place[:-1])[:len(place) + 1 - n.level] if n.level else ()
        name = [*base, *(n.module.split(".") if n.module else [])]
        if name[0] != "spml_kit" or len(name) < 2: continue
        assert ORDER.index(name[1]) <= ORDER.index(place[0]), f"{'.'.join(place)} uses {'.'.join(name)}"
        assert [a.name for a in n.names if a.name.startswith("_") and a.name != "__version__"] == []


@each_module
def test_a_module_has_a_file_of_tests(path):
    "tests/<wing>/test_<module>.py, which `make one` runs"
    place = path.relative_to(ROOT / "spml_kit")
    tests = ROOT / "tests" / place.with_name(f"test_{place.name}")
    assert tests.exists() and f"spml_kit.{'.'.join(place.with_suffix('').parts)}" in imported(tests), f"{relative(tests)} tests {relative(path)}"


def undocumented(name, thing):
    "What is missing in the documentation of a public function, or of a class and its methods"
    if not inspect.getdoc(thing):
        yield f"{name}: no docstring"
    if not inspect.isclass(thing) or "__init__" in vars(thing):  # else its base class says what it takes
        documented = docments(thing, full=True)
        for p in inspect.signature(thing).parameters.values():
            if p.name not in ("self", "cls") and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and not getattr(documented.get(p.name), "docment", None):
                yield f"{name}: no comment on parameter {p.name}"
    for k, member in vars(thing).items() if inspect.isclass(thing) else ():
        f = getattr(member, "fget", getattr(member, "__func__", member))
        told = any(k in vars(base) for base in thing.__mro__[1:]) or hasattr(event, k)  # by a base class, or by fastai
        if inspect.isfunction(f) and not k.startswith("_") and not told:
            yield from undocumented(f"{name}.{k}", f)


@each_module
def test_public_names_are_documented(path):
    module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    things = [(n, getattr(module, n)) for n in module.__all__]
    own = [(n, t) for n, t in things if (inspect.isfunction(t) and not hasattr(t, "__wrapped__") or inspect.isclass(t) and not issubclass(t, Exception)) and t.__module__.startswith("spml_kit")]
    assert [line for n, t in own for line in undocumented(n, t)] == []


def test_notebooks_leave_nothing_behind():
    kinds = {".ipynb", ".png", ".jpg", ".gif", ".svg", ".yml", ".yaml", ".css"}
    files = [p for p in (ROOT / "nbs").rglob("*") if p.is_file() and ".ipynb_checkpoints" not in p.parts]
    assert [relative(p) for p in files if p.suffix not in kinds] == []


def test_no_file_is_large():
    folders = [ROOT / n for n in ("nbs", "spml_kit", "tests", "results", ".ci")]
    assert [relative(p) for f in folders for p in f.rglob("*") if p.is_file() and p.stat().st_size > 5e6] == []


def test_a_wheel_brings_experiments_grids_and_commands(tmp_path):
    "What is installed without a checkout finds all that it needs"
    for name in ("settings.ini", "setup.py", "README.md"): shutil.copy2(ROOT / name, tmp_path)
    for name in ("spml_kit", "nbs/experiments"): shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    built = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", "wheels", "."], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    ask = "import os, sys; os.environ['PYTHONWARNINGS'] = 'ignore'; import spml_kit; from spml_kit.runs.cli import spml_run; from spml_kit.runs.cli import spml_sweep; print(spml_kit.__file__); sys.exit(spml_run(['--list']) or spml_sweep(['table7_scenes', '--dry']) or spml_run(['quickstart', '--profile', 'tiny', '--out', 'run']))"
    done = subprocess.run([sys.executable, "-c", ask], cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "spml_head" in (elsewhere / "run" / "metrics.json").read_text() and '"commit": null' in (elsewhere / "run" / "environment.json").read_text() # no checkout
    assert done.stdout.startswith(str(site)) and done.stdout.count("new      single-") == 15 and "\nquickstart\n" in done.stdout
    assert {p.name for p in (ROOT / "nbs" / "experiments" / "grids").iterdir()} == {p.name for p in (site / "spml_kit" / "experiments" / "grids").iterdir()}


def test_badges_are_true():
    read = lambda name: (ROOT / "nbs" / "images" / f"{name}.svg").read_text()
    said = ConfigParser()
    said.read(ROOT / "settings.ini")
    assert f"Python: {said['DEFAULT']['min_python']} or newer" in read("python")
    assert "licence: Apache 2.0" in read("licence") and said["DEFAULT"]["license"] == "apache2" and "Apache License" in (ROOT / "LICENSE").read_text()
    for name in ("python", "licence"): assert f"](nbs/images/{name}.svg)" in (ROOT / "README.md").read_text()

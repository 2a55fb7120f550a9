"""What goes wrong on a machine: kills at any moment, full disks, spoiled files, files of others, and demands that no
machine can meet. `FAULTS=long` tries more of each."""
import itertools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from faults.forks import Command, Server, wait_for
from faults.work import CLASSES, digest
from spml_kit.look.annotate import Annotator
from spml_kit.core import UNLABELLED, VOC_CLASSES, SpmlError
from spml_kit.data.images import SceneSet
from spml_kit.look.drawings import drawn_labels, read_drawing
from spml_kit.runs.experiment import check_parameters, find_notebook
from spml_kit.files import read_index_png
from spml_kit.data.formats import read_annotation
from spml_kit.method.recipes import Recipe

LONG = os.environ.get("FAULTS") == "long"
some = lambda quick, long: long if LONG else quick
kills, disk, spoiled, others, at_once = (pytest.mark.faults(kind)
    for kind in ("kills", "full disk", "spoiled files", "files of others", "refused at once"))
NEEDED = "environment.json log.txt report.html steps.png predictions.png".split() # must be there, whatever they say
HW = 40, 56 # of one's own images

TOY = """from pathlib import Path
import time
import numpy as np
from spml_kit.core import SpmlError, VOC_CLASSES
from spml_kit.files import claim_folder, read_index_png, write_index_png, write_json
claim_folder(f'{out}/work', dict(x=x))
for k in range(12):
    path = Path(out)/'work'/f'{k}.png'
    time.sleep(.1)
    try: read_index_png(path)
    except SpmlError: write_index_png(path, np.random.default_rng(k).integers(0, x + 2, (50, 60)), VOC_CLASSES.palette)
row = dict(method='toy', data='none', annotation='none', seed=0, miou=10.*x)
write_json(f'{out}/metrics.json', dict(rows=[row]))"""
SMALL = {"embed": {"backbone": "test_resnet", "pretrained": False}, "dim": 8, "grid": [3, 3], "infer_grid": [4, 4],
    "iterations": 2, "bs": 2}
SCRIBBLES = dict(recipe_changes=SMALL, size=32, crop=32, n_train=3, n_valid=2, n_watch=1, regions=8, steps=2,
    head_steps=2, refine=["regions"], scales=[1.], vote_scales=[1.], crf=False)


# what is looked at

def snapshot(root):
    "Everything below a folder, to the byte"
    def what(p):
        mode = p.lstat().st_mode
        return os.readlink(p) if stat.S_ISLNK(mode) else p.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
    return {str(p.relative_to(root)): what(p) for p in sorted(Path(root).rglob("*"))}


def hidden(p, root): return any(part.startswith(".") for part in p.relative_to(root).parts)


def leftovers(root):
    "Hidden files that no finished command leaves, but for the lock of a sweep and what a test has put there"
    return [str(p.relative_to(root)) for p in Path(root).rglob(".*") if p.name not in (".lock", ".mine")]


def broken(root):
    "Files that are not whole"
    wrong = []
    for p in sorted(Path(root).rglob("*")):
        if hidden(p, root) or not p.is_file(): continue
        try:
            if p.suffix in (".json", ".ipynb"): json.loads(p.read_text())
            elif p.suffix in (".png", ".jpg"):
                with Image.open(p) as im: im.load()
            elif p.suffix == ".safetensors":
                with safe_open(str(p), "pt") as f: [f.get_tensor(k) for k in f.keys()]
            elif p.suffix == ".html": assert p.read_text().rstrip().endswith("</html>")
        except Exception as e: wrong.append(f"{p.relative_to(root)}: {type(e).__name__}: {e}")
    return wrong


def timeless(said):
    if isinstance(said, dict): return {k: timeless(v) for k, v in said.items() if not re.search("seconds|time|took", k)}
    return [timeless(v) for v in said] if isinstance(said, list) else said


def results(root):
    "What a command left, but for times, machines, and pictures that it drew"
    found = {}
    for p in sorted(Path(root).rglob("*")):
        if hidden(p, root) or not p.is_file() or p.name.startswith("mine"): continue
        name = str(p.relative_to(root))
        if p.name in NEEDED or p.suffix in (".ipynb", ".jpg"): found[name] = "there"
        elif p.suffix == ".json": found[name] = timeless(json.loads(p.read_text()))
        elif p.suffix == ".png": found[name] = digest(np.array(Image.open(p)))
        elif p.suffix == ".safetensors":
            with safe_open(str(p), "pt") as f: found[name] = [digest(*(f.get_tensor(k).numpy()
                for k in sorted(f.keys()))), json.loads(f.metadata()["meta"])]
    return found


def lines(complained):
    "What a command complained of, without its bars"
    return [line for line in map(str.strip, re.split("[\r\n]", complained))
        if line and not re.fullmatch(r"(Executing|runs|regions):.*[]%]", line)]


def one_line(done, name):
    "The line with which a command ended, if that is all it complained of"
    said = lines(done.complained)
    assert "Traceback" not in done.complained, done.complained[-3000:]
    assert len(said) == 1 and said[0].startswith(f"{name}: "), done.complained[-3000:]
    return said[0]


def refused(done, name, *named, status=2, seconds=None):
    "A command that ended at once, in one line that names what is wrong"
    how = "it hangs" if done.status is None else f"exit status {done.status}"
    assert done.status == status, f"{how}: {done.told[-500:]} {done.complained[-3000:]}"
    line = one_line(done, name)
    assert all(str(n) in line for n in named), line
    if seconds: assert done.took < seconds
    return line


def why_not(said, right, *named):
    "None, if a function gave a right result, or refused in one line that names the file; else what it did"
    if said.status is None: return "it hangs"
    if said.error is None: return None if said.value in right else f"it gave {str(said.value)[:200]}"
    if "SpmlError" not in said.kinds: return f"{said.error}: {said.message[:300]} {said.complained[-1000:]}"
    if "\n" in said.message or not any(str(n) in said.message
        for n in named): return f"it does not say in one line that it is {named[0]}: {said.message[:300]}"


def fails(said, *named):
    "A function that refused in one line, naming the file"
    assert why_not(said, [], *named) is None, why_not(said, [], *named)


# the world

class World:
    "Folders of images, a notebook, a grid; what unkilled commands make of them, each made once and copied"
    def __init__(self, home, server):
        self.home, self.server, self.photos = home, server, home/"photos"
        self.photos.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for k in range(12):
            y, x = np.mgrid[:100, :140]/20
            waves = [np.sin(x*f + a)*np.cos(y*g + b) for f, g, a, b in rng.uniform(.5, 3, (3, 4))]
            Image.fromarray(((np.dstack(waves) + 1)*127).astype(np.uint8)).save(self.photos/f"p{k:02d}.png")
        (home/"few").mkdir()
        for k in range(3): shutil.copy(self.photos/f"p{k:02d}.png", home/"few")
        new = nbformat.v4.new_code_cell
        nbformat.write(nbformat.v4.new_notebook(cells=[new("x = 1 # what decides\nout = '.' # folder of the run",
            metadata={"tags": ["parameters"]}), new(TOY)]), home/"toy.ipynb")
        (home/"g.yaml").write_text(f"experiment: {home/'toy.ipynb'}\ngrid: {{x: [1, 2]}}\n")
        self.made = {}

    def words(self, name, out, workers):
        if name == "prepare":
            return "spml_prepare", ["--data", "folder", "--root", self.photos, "--out", out, "--n", 9, "--workers", workers]
        if name == "run": return "spml_run", [self.home/"toy.ipynb", "--out", out]
        if name == "sweep": return "spml_sweep", [self.home/"g.yaml", "--out", out, "--workers", workers, "--code", "v"]
        changes = [w for k, v in SCRIBBLES.items() for w in ("-p", k, v)]
        if name == "scribbles": return "spml_run", ["scribbles", "--profile", "tiny", "--out", out, *changes]

    def start(self, name, out, workers=None):
        "An unhurried command or function on its way"
        if name in ("index", "pseudo", "index_workers"):
            given = dict(folder=str(out)) | (dict(workers=1) if name == "index_workers" else {})
            return self.server.start("faults.work:go", [name.split("_")[0], given], self.home)
        command, words = self.words(name, out, dict(prepare=2, sweep=1).get(name) if workers is None else workers)
        if LONG: return Command(command, words, self.server.folder, self.home)
        return self.server.start(f"spml_kit.runs.cli:{command}", words, self.home)

    def reference(self, name):
        "Folder, results and seconds of one that nobody killed"
        if name not in self.made:
            out, start = self.home/f"unkilled_{name}", time.monotonic()
            tree = self.start(name, out, workers=some(0, None))
            assert tree.wait(300) == 0, tree.complained
            assert broken(out) == leftovers(out) == []
            self.made[name] = out, results(out), time.monotonic() - start
        return self.made[name]

    def finished(self, name, to):
        "A copy of a finished folder, with files of somebody else beside the kit's; what a reader makes of it"
        out = self.home/f"finished_{name}"
        if not out.exists(): getattr(self, f"_{name}")(out)
        shutil.copytree(out, to, symlinks=True)
        for file in ("mine.txt", ".mine"): (to/file).write_text("not the kit's")
        return to

    def done(self, function, **kwargs):
        said = self.server.ask(function, seconds=60, **kwargs)
        assert said.error is None, f"{said.error}: {said.message} {said.complained}"
        return said.value

    def _regions(self, out): self.done("regions", images=self.home/"few", folder=out)
    def _index(self, out): self.done("index", folder=out)
    def _pseudo(self, out): self.done("pseudo", folder=out)
    def _trained(self, out): self.done("train", folder=out)
    def _half(self, out):
        self.done("train", folder=out, keep=2)
        os.replace(out/"kept", out/"checkpoint.safetensors")
    def _run(self, out): shutil.copytree(self.reference("run")[0], out)
    def _swept(self, out):
        shutil.copytree(self.reference("sweep")[0], out)
        for k, run in enumerate(sorted(out.glob("toy-*"))):
            run.rename(run.with_name(f"toy-{k}")) # a name that a test can know
        said = json.loads((out/"sweep.json").read_text())
        for k, entry in enumerate(sorted(said["runs"].values(), key=lambda r: r["folder"])):
            entry["folder"] = f"toy-{k}"
        (out/"sweep.json").write_text(json.dumps(said))

    def _scored(self, out):
        for k, miou in enumerate((30., 40.)):
            (out/"ab"[k]).mkdir(parents=True)
            row = dict(method="spml_head", data="scenes", annotation="scribbles", seed=k, miou=miou,
                per_class={"cat": 1.})
            conditions = dict(n_train=9, size=64, steps=9, recipe=dict(network="EmbedNet", relations={}))
            for name, said in dict(metrics=dict(rows=[row], conditions=conditions),
                status=dict(state="done", message="", seconds=1.),
                environment=dict(spml_kit="0.1.0", experiment="single", code="v")).items():
                (out/"ab"[k]/f"{name}.json").write_text(json.dumps(said))

    def _own_unlabelled(self, out):
        self._own(out)
        shutil.rmtree(out/"labels")

    def _own(self, out):
        (out/"images").mkdir(parents=True)
        (out/"labels").mkdir()
        for k, name in enumerate("ab"):
            Image.fromarray(SceneSet(2, seed=3, size=56).image(k)[:HW[0]]).save(out/"images"/f"{name}.png")
            self.hand_drawn(out/"labels"/f"{name}.png", k)
        (out/"classes.txt").write_text("\n".join(CLASSES) + "\n")

    def _boxed(self, out):
        self._own(out)
        for name in "ab":
            (out/"labels"/f"{name}.png").unlink()
            (out/"labels"/f"{name}.json").write_text(json.dumps(dict(spml_kit=1, kind="scribbles",
                strokes=[[[5, 5], [20, 5]], [[5, 30], [20, 30]]], classes=[1, 2], width=3)))

    def _drawn(self, out):
        self._own_unlabelled(out)
        self.done("draw", folder=out, before=[["stroke", 5, 1], ["box", [2, 2, 30, 30], 2]], last=["stroke", 20, 2])

    @staticmethod
    def hand_drawn(path, k=0, size=HW):
        labels = np.full(size, UNLABELLED, np.uint8)
        labels[5:9, 4:20], labels[20 + k:24 + k, 4:20] = 1, 2
        im = Image.fromarray(labels, mode="P")
        im.putpalette(VOC_CLASSES.palette.tobytes())
        im.save(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    home = tmp_path_factory.mktemp("faults")
    (home/"said").mkdir()
    server = Server(home/"said")
    yield World(home/"world", server)
    server.close()


# kills

TIMES = dict(prepare=(1, 10), run=(1, 7), sweep=(1, 6), index=(1, 7), pseudo=(1, 7), scribbles=(0, 6),
    index_workers=(0, 2)) # quick and long


@kills
@pytest.mark.parametrize("name, k, n", [pytest.param(name, k, some(*n), id=f"{name}-{k}")
    for name, n in TIMES.items() for k in range(some(*n))])
def test_what_was_killed_goes_on_and_comes_to_the_same(name, k, n, world, tmp_path):
    _, want, seconds = world.reference(name)
    out, share = tmp_path/"out", (k + np.random.default_rng([k, len(name)]).random())/n
    tree = world.start(name, out)
    if name == "sweep" and not LONG: # nobody has timed one with workers: from its beginning
        wait_for(lambda: (out/"sweep.json").exists() or tree.status() is not None, 120)
        seconds = 6
    time.sleep(share*seconds)
    status = tree.kill() if tree.status() is None else tree.status()
    found = dict(killed=status in (-9, 0), left=tree.left(), broken=broken(out))
    again = world.start(name, out)
    found |= dict(status=again.wait(300), complained=again.complained[-2000:] if again.status() else "",
        leftovers=leftovers(out))
    found["same"] = results(out) == want
    assert found == dict(killed=True, left=[], broken=[], status=0, complained="", leftovers=[], same=True)


@kills
@pytest.mark.parametrize("name, step", dict(regions=some(9, 1), index=some(9, 1), pseudo=some(29, 1)).items())
def test_killed_before_any_change_of_a_file(name, step, world, tmp_path):
    "Not at random: before every rename, removal and opening for writing"
    given = dict(images=world.home/"few") if name == "regions" else {}
    right, wrong = world.done(name, folder=tmp_path/"whole", **given), []
    files = set(results(tmp_path/"whole"))
    for k in range(1, 1000, step):
        out = tmp_path/f"{k}"
        said = world.server.ask(name, folder=out, die=k, **given)
        if said.status == 0: break
        assert said.status == -9, said.complained
        torn, again = broken(out), world.server.ask(name, folder=out, **given)
        if torn or again.value != right or leftovers(out) or set(results(out)) != files:
            wrong.append((k, torn, again.error, again.message, leftovers(out)))
    assert k > 0 and not wrong, wrong


def told_alike(root, name="a"):
    "The files of a drawing agree; which they are"
    said = read_drawing(root, name, len(CLASSES), HW)
    png, plain = (root/"labels"/f"{name}{s}" for s in (".png", ".json"))
    exact = {"scribbles", "points"} & set(said)
    there = [p.suffix for p in (png, plain) if p.exists()]
    assert there == ([".png"] if exact else [".json"] if said else []), f"drawn: {[*said]}; labels: {there}"
    if exact: assert (read_index_png(png) == drawn_labels(said, HW)).all(), "the label map is not that of the drawing"
    elif said: assert read_annotation(plain) == said["boxes" if "boxes" in said else "tags"]


def drawn_on_after_a_kill(root, marks):
    "The image can be shown and drawn on; its marks are among these"
    a = Annotator(root, CLASSES)
    a.go(0)
    assert not a.failed, a.status
    assert marks is None or json.loads(json.dumps(list(a.marks))) in marks
    told_alike(root)
    for more in (partial(a.add_stroke, [(9, 2), (30, 2)], 1), partial(a.add_point, 3, 3, 2),
        partial(a.add_box, (1, 1, 9, 9), 1), partial(a.set_tag, 2)): more()
    told_alike(root)
    assert broken(root) == leftovers(root) == []
    return a


STROKE, BOX = ["stroke", 5, 1], ["box", [2, 2, 30, 30], 2]
CHANGES = {"first stroke": ([], STROKE), "second stroke": ([STROKE], ["stroke", 9, 2]),
    "undo of the only stroke": ([STROKE], ["undo"]), "redo": ([STROKE, ["undo"]], ["redo"]),
    "undo of one of two": ([STROKE, ["stroke", 9, 2]], ["undo"]),
           "first box": ([], BOX), "stroke in a box": ([BOX], STROKE),
               "undo of a stroke in a box": ([BOX, STROKE], ["undo"]), "first tag": ([], ["tag", 1, True]),
               "no tag any more": ([["tag", 1, True]], ["tag", 1, False]),
               "erased": ([STROKE, ["point", 30, 30, 2]], ["erase", 30, 30])}


@kills
@pytest.mark.parametrize("what", some(["first stroke", "undo of the only stroke", "redo", "undo of a stroke in a box"],
    CHANGES))
def test_killed_between_the_files_of_a_drawing(what, world, tmp_path):
    (before, last), wrong = CHANGES[what], []
    marks = world.done("draw", folder=world.finished("own_unlabelled", tmp_path/"whole"), before=before, last=last)
    for k in range(0, 100, some(3, 1)):
        root = world.finished("own_unlabelled", tmp_path/f"{k}")
        said = world.server.ask("draw", folder=root, before=before, last=last, die=k)
        if said.status == 0: break
        assert said.status == -9, said.complained
        try: drawn_on_after_a_kill(root, marks)
        except Exception as e: wrong.append(f"before change {k}: {type(e).__name__}: {str(e).splitlines()[0]}")
    assert k > 2 and not wrong, "\n".join(wrong)


@kills
@pytest.mark.parametrize("k", range(some(2, 10)))
def test_killed_while_drawing(k, world, tmp_path):
    root, rng = world.finished("own_unlabelled", tmp_path/"own"), np.random.default_rng(k)
    tree = world.server.start("faults.work:go", ["draw_on", dict(folder=str(root), seed=k)], tmp_path)
    wait_for(lambda: tree.told.count("\n") > 3 or tree.status() is not None, 60)
    assert tree.status() is None and tree.told, tree.complained
    time.sleep(rng.uniform(0, .8))
    assert tree.kill() == -9 and tree.left() == [] and broken(root) == []
    confirmed = int(tree.told[:tree.told.rindex("\n")].split()[-1])
    a = Annotator(root, CLASSES)
    assert not a.failed and abs(len(a.marks) - confirmed) <= 1, (a.status, len(a.marks), confirmed)
    drawn_on_after_a_kill(root, None)


@kills
def test_temporary_files_of_the_living_stay(world, tmp_path):
    "They are another process's, at work in the same folder; those of the dead go at the next write, and nobody else's"
    (tmp_path/".mine").write_text("half")
    words = lambda how: ["write", dict(kind="json", path=str(tmp_path/"a.json"), size=99, before_rename=how)]
    start = lambda how: world.server.start("faults.work:go", words(how), tmp_path)
    living = start("SIGSTOP") # first: what writes later would clear away what the dead have left
    assert wait_for(lambda: len(leftovers(tmp_path)) == 1, 60), leftovers(tmp_path)
    dead = start("SIGKILL")
    assert dead.wait(60) == -9 and wait_for(lambda: len(leftovers(tmp_path)) == 2, 60), leftovers(tmp_path)
    assert world.server.ask("write", kind="json", path=tmp_path/"a.json", size=9).error is None
    assert len(leftovers(tmp_path)) == 1 and (tmp_path/".mine").exists()
    os.kill(living.pid, signal.SIGCONT)
    assert living.wait(60) == 0 and leftovers(tmp_path) == [] and broken(tmp_path) == []


# a full disk

FULL = re.compile("no space left|disk is full", re.I)


@pytest.fixture
def full(tmp_path):
    "A disk of three megabytes; a function that fills it but for some bytes, or empties it again"
    at = tmp_path/"disk"
    at.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", at], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()[:80]}")
    def fill(leave=None):
        if leave is None: return (at/"ballast").unlink()
        room = os.statvfs(at)
        (at/"ballast").write_bytes(b"\0"*(room.f_bavail*room.f_frsize - leave))
    fill.at = at
    try: yield fill
    finally:
        if subprocess.run(["umount", at]).returncode: subprocess.run(["umount", "-l", at])


@disk
@pytest.mark.parametrize("kind, name", [("json", "a.json"), ("tensors", "a.safetensors"), ("png", "a.png")])
@pytest.mark.parametrize("leave", some([0], [0, 8192]))
def test_a_file_that_does_not_fit_leaves_the_old_one(kind, name, leave, full, world):
    ask = partial(world.server.ask, "write", kind=kind, path=full.at/"deep"/name)
    assert ask(size=5000).error is None
    old = (full.at/"deep"/name).read_bytes()
    full(leave)
    said = ask(size=60_000)
    assert {"OSError", "SpmlError"} & set(said.kinds) and FULL.search(said.message), f"{said.error}: {said.message}"
    assert str(full.at/"deep"/name) in said.message, said.message
    assert [p.name for p in (full.at/"deep").iterdir()] == [name] and (full.at/"deep"/name).read_bytes() == old
    full()
    assert ask(size=60_000).error is None
    assert (full.at/"deep"/name).stat().st_size > 30_000 and leftovers(full.at) == []


def runs_onto_a_full_disk(name, leave, full, world):
    command, words = world.words(name, out := full.at/"out", workers=some(0, 2))
    full(leave)
    done = world.server.run(command, *words, cwd=world.home)
    found = dict(status=done.status, broken=broken(out), leftovers=leftovers(full.at))
    line = " ".join(lines(done.complained)) if "Traceback" not in done.complained else ""
    found["line"] = bool(line.startswith(command) and str(full.at) in line
        and FULL.search(line)) or done.complained[-1500:]
    found["lines"] = len(lines(done.complained))
    full()
    again = world.server.run(command, *words, cwd=world.home)
    found |= dict(again=again.status, same=results(out) == world.reference(name)[1], later=leftovers(full.at))
    assert found == dict(status=1, broken=[], leftovers=[], line=True, lines=1, again=0, same=True, later=[])


@disk
@pytest.mark.parametrize("leave", some([20_480], [0, 4096, 12_288, 20_480, 36_864]))
def test_regions_on_a_full_disk(leave, full, world): runs_onto_a_full_disk("prepare", leave, full, world)


@disk
@pytest.mark.parametrize("leave", some([40_960], [0, 4096, 8192, 16_384, 40_960, 65_536, 122_880, 262_144]))
def test_a_run_on_a_full_disk(leave, full, world): runs_onto_a_full_disk("run", leave, full, world)


@disk
def test_a_drawing_on_a_full_disk(full, world):
    root = world.finished("drawn", full.at/"own")
    full(0)
    said = world.server.ask("full_drawing", folder=root)
    assert said.error is None, f"{said.error}: {said.message}"
    assert said.value["same"] and "not saved" in said.value["status"] and FULL.search(said.value["status"]), said.value
    full()
    told_alike(root)
    drawn_on_after_a_kill(root, None)


# spoiled files

def spoil(path, how):
    "Another thing in the place of a file"
    raw = path.read_bytes()
    path.unlink()
    if how == "directory":
        path.mkdir()
        (path/"mine.txt").write_text("not the kit's")
    elif how == "fifo": os.mkfifo(path)
    elif how == "loop": path.symlink_to(path.name)
    else: path.write_bytes({"truncated": raw[:len(raw)//2], "short": raw[:-2], "empty": b"",
        "random": np.random.default_rng(0).bytes(len(raw))}.get(how, how.encode()))


SHAPES = "[]", "5", '"x"', "null", "{}"
PLACES = "directory", "fifo", "loop"
HOWS = ("truncated", "short", "empty", "random", *PLACES)
SPOILED = [ # finished folder, file, who reads it
    ("regions", "settings.json", "regions"), ("regions", "settings.json", "read_regions"),
        ("regions", "p01.png", "regions"), ("regions", "p01.png", "read_regions"),
    ("index", "settings.json", "index"), ("index", "settings.json", "load_index"),
        ("index", "shard_000001.safetensors", "index"), ("index", "shard_000001.safetensors", "load_index"),
    ("pseudo", "settings.json", "pseudo"), ("pseudo", "shard_000001.json", "pseudo"),
        ("pseudo", "scene_000002.png", "pseudo"),
    ("trained", "checkpoint.safetensors", "train"), ("half", "checkpoint.safetensors", "train"),
        ("trained", "checkpoint.safetensors", "network"),
    ("own", "images/a.png", "sample"), ("own", "labels/a.png", "sample"), ("own", "classes.txt", "sample"),
        ("own", "classes.txt", "names_of"), ("boxed", "labels/a.json", "sample"),
    ("drawn", "images/a.png", "open_drawing"), ("drawn", "scribbles/a.json", "open_drawing"),
        ("drawn", "boxes/a.json", "open_drawing"), ("drawn", "labels/a.png", "open_drawing"),
        ("drawn", "classes.txt", "open_drawing"),
    ("swept", "sweep.json", "table"), ("swept", "toy-0/metrics.json", "table"), ("swept", "toy-0/status.json", "state"),
    ("scored", "a/metrics.json", "collected"), ("scored", "a/status.json", "collected"),
        ("scored", "a/environment.json", "collected")]
READERS = "read_regions load_index network sample names_of open_drawing table state collected".split() # change nothing


def asked(function, folder, file, world):
    "What the reader is told, beside its name"
    if function in ("regions", "read_regions"): return dict(images=world.home/"few", folder=folder)
    if function == "network": return dict(checkpoint=folder/file)
    if function == "sample": return dict(root=folder)
    return dict(folder=(folder/file).parent if function == "state" else folder)


def read_after(change, how, where, file, function, world, tmp_path):
    "What a reader did wrong with a file that was changed; None if nothing"
    folder = world.finished(where, tmp_path)
    given = asked(function, folder, file, world)
    key = where, file, function
    def made(key, file=None):
        if key not in world.made:
            if file: (folder/file).unlink()
            world.made[key] = world.done(function, **given)
            shutil.rmtree(folder)
            world.finished(where, folder)
        return world.made[key]
    right = [made(key)]
    if function == "state": right.append(dict(state="new", message="", seconds=None)) # it will be made again
    if file.endswith("metrics.json") and how in (("{}", "no rows") if function == "table"
        else (*SHAPES, "no rows", "rows = None", "no conditions")): right.append(made((*key, "absent"), file)) # of something else
    change(folder/file)
    before, named = snapshot(folder), [Path(file).name]
    if file.endswith(("settings.json", "sweep.json")): named.append(folder) # it is the folder that is of other settings
    if how == "loop": named.append((folder/file).parent) # there is nothing of this name
    said = world.server.ask(function, **given)
    if function == "open_drawing" and said.error is None and said.value["failed"]: # told on the page
        said.error, said.kinds, said.message = "refused", ["SpmlError"], said.value["status"]
    wrong = why_not(said, right, *named)
    after = snapshot(folder)
    kept = {k: v for k, v in before.items() if "mine" in k}
    if function in READERS and (function, file) != ("open_drawing", "classes.txt"): kept = before
    gone = [k for k in kept if after.get(k) != kept[k]]
    if function in READERS: gone += [k for k in after if k not in before]
    shutil.rmtree(folder)
    return wrong if wrong or not gone else f"it changed {gone}"


def each_spoiling():
    "Every file in every way; in the quick form one way of each, in turn"
    for i, (where, file, function) in enumerate(SPOILED):
        hows = [h for h in HOWS + SHAPES*file.endswith(".json") if file != "classes.txt"
            or h not in ("truncated", "short")] # half a list of names is one
        for how in some([hows[5*i % len(hows)]], hows):
            yield pytest.param(where, file, function, how, id=f"{where}-{file}-{function}-{how}")


@spoiled
@pytest.mark.parametrize("where, file, function, how", [*each_spoiling()])
def test_a_spoiled_file(where, file, function, how, world, tmp_path):
    wrong = read_after(partial(spoil, how=how), how, where, file, function, world, tmp_path/"f")
    assert wrong is None, wrong


def wrong_entries(path):
    "Of each entry of a JSON file, values of a type that it cannot have; and none"
    said = json.loads(path.read_text())
    for k, v in said.items():
        if v is None: continue # it may be anything
        for other in (5, "x", [], {}, None):
            if type(other) is type(v) or {type(other), type(v)} == {int, float}: continue
            yield {**said, k: other}, f"{k} = {other!r}"
        if isinstance(v, list) and v and isinstance(v[0], (dict, list)): yield {**said, k: [5]}, f"{k} = [5]"
        if isinstance(v, dict) and v: yield {**said, k: dict.fromkeys(v, [])}, f"{k} = {{...: []}}"
        yield {o: w for o, w in said.items() if o != k}, f"no {k}"


@spoiled
@pytest.mark.parametrize("where, file, function", [s for s in SPOILED if s[1].endswith(".json")], ids=lambda o: o)
def test_wrong_entries_of_a_file(where, file, function, world, tmp_path):
    wrong, changes = [], list(wrong_entries(world.finished(where, tmp_path/"f")/file))
    shutil.rmtree(tmp_path/"f")
    for said, what in some(changes[3::len(changes)], changes):
        write = lambda path: path.write_text(json.dumps(said))
        why = read_after(write, what, where, file, function, world, tmp_path/"f")
        if why: wrong.append(f"{what}: {why}")
    assert changes and not wrong, f"{len(wrong)} of {len(changes)}: " + "\n".join(wrong)


def tensors_changed(path, change):
    "The file with other tensors or metadata"
    tensors = load_file(path)
    with safe_open(str(path), "pt") as f: meta = json.loads(f.metadata()["meta"])
    given = change(tensors, meta)
    text = given if isinstance(given, str) else json.dumps(meta)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=None if given == "" else {"meta": text})


def filled(value, *parts):
    def change(tensors, meta):
        named = [k for k in sorted(tensors) if any(p in k for p in parts) and tensors[k].is_floating_point()
            and tensors[k].numel()]
        assert named, f"no {parts} among {sorted(tensors)[:9]}"
        tensors[named[len(named)//2]].view(-1)[0] = value
    return change


def changed(key, to): # of a tensor
    def change(tensors, meta):
        at = next(k for k in sorted(tensors) if key in k)
        tensors[at] = to(tensors[at])
    return change


def told(**entries):
    def change(tensors, meta): meta.update(entries)
    return change


def without(entry):
    def change(tensors, meta): del meta[entry]
    return change


def lost(key):
    def change(tensors, meta): del tensors[next(k for k in sorted(tensors) if key in k)]
    return change


OTHER = {"metadata none": lambda t, m: "", "metadata 5": lambda t, m: "5", "metadata []": lambda t, m: "[]",
    "metadata no JSON": lambda t, m: "{"}
CHECKPOINT = OTHER | {
    "rounds 99": told(rounds=99), "rounds -1": told(rounds=-1), "rounds x": told(rounds="x"),
        "rounds null": told(rounds=None), "rounds 1.5": told(rounds=1.5), "no rounds": without("rounds"),
        "fewer rounds than rows": told(rounds=1),
    "history 5": told(history=5), "history x": told(history="x"), "history null": told(history=None),
        "history of numbers": told(history=[5, 5, 5]), "no history": without("history"),
    "settings 5": told(settings=5), "settings []": told(settings=[]), "settings {}": told(settings={}),
        "no settings": without("settings"), "recipe 5": lambda t, m: m["settings"].update(recipe=5),
        "recipe []": lambda t, m: m["settings"].update(recipe=[]),
    "numbers 5": told(numbers=5), "numbers []": told(numbers=[]), "numbers of text": told(numbers=["x"]),
        "no numbers": without("numbers"),
    "NaN among weights": filled(np.nan, "model."), "infinite weight": filled(np.inf, "model."),
        "NaN in the head": filled(np.nan, "model.head.4"), "NaN in the optimiser": filled(np.nan, "opt."),
        "NaN in the bank": filled(np.nan, "bank."),
    "weight lost": lost("model."), "state of the optimiser lost": lost("opt."), "bank lost": lost("bank."),
        "random state lost": lost("random"), "random state cut": changed("random", lambda v: v[:100].clone()),
    "weights as doubles": changed("model.", lambda v: v.double()),
        "weights as integers": changed("model.head.4.weight", lambda v: (v*100).int()),
        "optimiser of another shape": changed("opt.", lambda v: v.reshape(-1)[:1].clone()),
    "stranger in the optimiser": lambda t, m: t.update({"opt.999.x": t["random"].clone()}),
        "name without number": lambda t, m: t.update({"opt.x": t["random"].clone()})}
SHARD = OTHER | {
    "segments 0": told(segments=0), "segments x": told(segments="x"), "segments null": told(segments=None),
        "segments -1": told(segments=-1), "no segments": without("segments"), "failed 5": told(failed=5),
        "failed null": told(failed=None), "no failed": without("failed"),
    "NaN in a prototype": filled(np.nan, "mu"), "infinite prototype": filled(np.inf, "mu"),
        "label beyond the classes": changed("label", lambda v: v*0 + 77),
        "image beyond the set": changed("image", lambda v: v*0 + 99),
        "image below 0": changed("image", lambda v: v*0 - 5),
    "rows cut": changed("label", lambda v: v[:1].clone()),
        "other dimension": changed("mu", lambda v: v[:, :3].clone()), "labels lost": lost("label"),
        "row lost": lost("row"), "prototypes as integers": changed("mu", lambda v: (v*100).int())}


@spoiled
@pytest.mark.parametrize("where, function, what", [pytest.param(where, function, what, id=f"{where}-{function}-{what}")
    for where, function, changes, step in (("half", "train", CHECKPOINT, 7), ("trained", "train", CHECKPOINT, 17),
        ("trained", "network", CHECKPOINT, 13), ("index", "index", SHARD, 9), ("index", "load_index", SHARD, 7))
    for what in list(changes)[::some(step, 1)]])
def test_tensors_that_were_changed(where, function, what, world, tmp_path):
    file, changes = ("shard_000001.safetensors", SHARD) if where == "index" else ("checkpoint.safetensors", CHECKPOINT)
    wrong = read_after(partial(tensors_changed, change=changes[what]), what, where, file, function, world, tmp_path/"f")
    assert wrong is None, wrong


def repeated(name, where, file, how, world, tmp_path):
    "The command that made a folder, after one of its files was spoiled"
    out = world.finished(where, tmp_path/"out")
    spoil(out/file, how)
    before = {k: v for k, v in snapshot(out).items() if "mine" in k}
    command, words = world.words(name, out, workers=0)
    done = world.server.run(command, *words, cwd=world.home)
    assert done.status is not None, "it hangs"
    after = snapshot(out)
    assert {k: after.get(k) for k in before} == before
    if done.status == 0: assert (results(out), leftovers(out)) == (world.reference(name)[1], [])
    else:
        assert done.status in (1, 2), done.status
        line = one_line(done, command)
        assert Path(file).name in line or str(out) in line, line


RUN_FILES = [*itertools.product(("environment.json", "metrics.json", "work/settings.json"), HOWS + SHAPES),
    *itertools.product(("toy.ipynb", "work/3.png", "report.html", "log.txt"), ("empty", "random", *PLACES))]


@spoiled
@pytest.mark.parametrize("file, how", some([("environment.json", "[]"), ("metrics.json", "directory")], RUN_FILES))
def test_a_run_repeated_in_a_spoiled_folder(file, how, world, tmp_path):
    repeated("run", "run", file, how, world, tmp_path)


SWEEP_FILES = [*itertools.product(("sweep.json", "toy-0/status.json"), HOWS + SHAPES),
    *itertools.product(["toy-0/environment.json"], ("[]", "directory", "fifo"))]


@spoiled
@pytest.mark.parametrize("file, how", some([("toy-0/status.json", "[]")], SWEEP_FILES))
def test_a_sweep_repeated_in_a_spoiled_folder(file, how, world, tmp_path):
    name = sorted(p.name for p in world.reference("sweep")[0].glob("toy-*"))[0]
    world._swept_as_made = lambda out: shutil.copytree(world.reference("sweep")[0], out)
    repeated("sweep", "swept_as_made", file.replace("toy-0", name), how, world, tmp_path)


@spoiled
@pytest.mark.parametrize("how", ["random", "fifo", "[]", '{"cells": 5}',
    *some([], ["truncated", "empty", "directory", "loop", *SHAPES[1:]]),
    '{"cells": [5], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'])
def test_a_notebook_that_is_none(how, world, tmp_path):
    nb = Path(shutil.copy(world.home/"toy.ipynb", tmp_path/"mine.ipynb"))
    spoil(nb, how)
    before = snapshot(tmp_path)
    done = world.server.run("spml_run", nb, "--out", tmp_path/"out", cwd=tmp_path, seconds=20)
    assert done.status in (1, 2), (done.status, done.complained[-2000:])
    assert nb.name in one_line(done, "spml_run") and snapshot(tmp_path) == before


@spoiled
@pytest.mark.parametrize("how", some(["random", "fifo", "null"], ["random", *PLACES, *SHAPES]))
def test_a_grid_that_is_none(how, world, tmp_path):
    path = Path(shutil.copy(world.home/"g.yaml", tmp_path/"mine.yaml"))
    spoil(path, how)
    done = world.server.run("spml_sweep", path, "--out", tmp_path/"out", "--dry", cwd=tmp_path, seconds=20)
    assert done.status in (1, 2), (done.status, done.complained[-2000:])
    assert path.name in one_line(done, "spml_sweep") and not (tmp_path/"out").exists()


@spoiled
@pytest.mark.parametrize("how", some(["random", "fifo"], ["random", *PLACES]))
def test_a_list_of_images_that_is_none(how, world, tmp_path):
    root = voc(world, tmp_path, ["a"])
    spoil(root/"ImageSets/Segmentation/train.txt", how)
    done = world.server.run("spml_prepare", "--data", "voc", "--root", root, "--out", tmp_path/"out", "--workers", 0,
        cwd=tmp_path, seconds=20)
    assert done.status in (1, 2) and "train" in one_line(done, "spml_prepare"), (done.status, done.complained[-2000:])


@spoiled
def test_rows_of_metrics_that_name_no_method(world, tmp_path):
    "A notebook of one's own may write what it likes there"
    nb = nbformat.read(world.home/"toy.ipynb", 4)
    nb.cells[1].source = "import json\nopen(f'{out}/metrics.json', 'w').write(json.dumps(dict(rows=[dict(x=1.), 5])))"
    nbformat.write(nb, tmp_path/"own.ipynb")
    done = world.server.run("spml_run", tmp_path/"own.ipynb", "--out", tmp_path/"out", cwd=tmp_path)
    assert done.status == 0 or "metrics.json" in one_line(done, "spml_run"), done.complained[-2000:]


@spoiled
@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_that_may_not_be_read(world, tmp_path):
    wrong = {s: read_after(lambda path: path.chmod(0), "unreadable", *s, world, tmp_path/"f") for s in SPOILED}
    assert not any(wrong.values()), wrong


# files of others

def photographs(folder, mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(3): Image.fromarray(SceneSet(3, seed=3,
        size=56).image(k)[:HW[0]]).convert(mode).save(folder/f"{k}.png")


def voc(world, tmp_path, names):
    root = tmp_path/"VOC2012"
    (root/"JPEGImages").mkdir(parents=True)
    (root/"ImageSets/Segmentation").mkdir(parents=True)
    (root/"ImageSets/Segmentation/train.txt").write_text("\n".join(names) + "\n")
    for name in ("a", "b"): Image.fromarray(SceneSet(1, seed=3, size=56).image(0)).save(root/"JPEGImages"/f"{name}.jpg")
    return root


@others
@pytest.mark.parametrize("mode", some(["RGB", "P"], ["RGB", "L", "P", "1"]))
def test_regions_onto_the_photographs_themselves(mode, world, tmp_path):
    photographs(tmp_path/"mine", mode)
    before = snapshot(tmp_path)
    done = world.server.run("spml_prepare", "--data", "folder", "--root", ".", "--out", ".", "--workers", 0,
        cwd=tmp_path/"mine")
    refused(done, "spml_prepare", ".")
    assert snapshot(tmp_path) == before


@others
@pytest.mark.parametrize("there", ["masks", "notes", "settings of another", "a file"])
def test_regions_into_a_folder_of_others(there, world, tmp_path):
    photographs(tmp_path/"images")
    out = tmp_path/"masks"
    if there == "a file": out.write_text("mine")
    else: out.mkdir()
    if there == "masks": [world.hand_drawn(out/f"{k}.png", k) for k in range(3)]
    if there == "notes": (out/"notes.txt").write_text("mine")
    if there == "settings of another": (out/"settings.json").write_text('{"editor.fontSize": 12}')
    before = snapshot(tmp_path)
    refused(world.server.run("spml_prepare", "--data", "folder", "--root", "images", "--out", out, "--workers", 0,
        cwd=tmp_path), "spml_prepare", out)
    assert snapshot(tmp_path) == before


@others
@pytest.mark.parametrize("files", ["previous/mine.txt report.html metrics.json log.txt", "environment.json",
    *some([], ["previous/mine.txt", "report.html", "metrics.json", "log.txt", "toy.ipynb"])])
def test_a_run_into_a_folder_of_others(files, world, tmp_path):
    out = tmp_path/"mine"
    for name in files.split():
        (out/name).parent.mkdir(parents=True, exist_ok=True)
        (out/name).write_text('{"rows": [], "of": "another tool"}')
    before = snapshot(tmp_path)
    refused(world.server.run("spml_run", world.home/"toy.ipynb", "--out", out, cwd=tmp_path), "spml_run", out)
    assert snapshot(tmp_path) == before


@others
@pytest.mark.parametrize("name", [".partial.ipynb", ".spml_kit.ipynb", ".lock"])
def test_hidden_files_of_others_stay(name, world, tmp_path):
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/name).write_text("mine")
    done = world.server.run("spml_run", world.home/"toy.ipynb", "--out", tmp_path/"out", cwd=tmp_path)
    assert done.status == 0 and (tmp_path/"out"/name).read_text() == "mine"


@others
def test_a_run_into_the_folder_of_its_notebook(world, tmp_path):
    shutil.copy(world.home/"toy.ipynb", tmp_path)
    before = snapshot(tmp_path)
    refused(world.server.run("spml_run", "toy.ipynb", "--out", ".", cwd=tmp_path), "spml_run")
    assert snapshot(tmp_path) == before


@others
def test_what_somebody_put_into_a_run_stays(world, tmp_path):
    out = world.finished("run", tmp_path/"out")
    (out/"previous").mkdir()
    for name in ("previous/mine.txt", "work/mine.png", ".toy.mine.ipynb"): (out/name).write_text("mine")
    before = {k: v for k, v in snapshot(out).items() if "mine" in k}
    done = world.server.run("spml_run", world.home/"toy.ipynb", "--out", out, cwd=tmp_path)
    after = snapshot(out)
    assert {k: after.get(k) for k in before} == before and (done.status == 0 or str(out) in one_line(done, "spml_run"))


@others
@pytest.mark.parametrize("there", ["notes.txt", *some([], ["sweep.json", "toy-0/metrics.json"])])
def test_a_sweep_into_a_folder_of_others(there, world, tmp_path):
    out = tmp_path/"mine"
    (out/there).parent.mkdir(parents=True)
    (out/there).write_text('{"of": "another tool"}')
    before = snapshot(tmp_path)
    refused(world.server.run("spml_sweep", world.home/"g.yaml", "--out", out, "--workers", 0, cwd=tmp_path),
        "spml_sweep", out)
    assert snapshot(tmp_path) == before


@others
@pytest.mark.parametrize("function, there", [("pseudo", "scene_000000.png"), ("pseudo", "notes.txt"),
    ("index", "shard_000000.safetensors"), ("index", "notes.txt"), ("pipeline", "walk/scene_000000.png"),
    ("pipeline", "notes.txt"), ("pipeline", "embedding/checkpoint.safetensors"), ("regions", "p00.png")])
def test_results_into_a_folder_of_others(function, there, world, tmp_path):
    out = tmp_path/"mine"
    (out/there).parent.mkdir(parents=True)
    if there.endswith(".png"): world.hand_drawn(out/there, size=(32, 32) if function == "pipeline" else (48, 48))
    else: (out/there).write_bytes(b"mine")
    before = snapshot(tmp_path)
    said = world.server.ask(function, folder=out, **dict(images=world.home/"few") if function == "regions" else {})
    fails(said, out)
    assert snapshot(tmp_path) == before


@others
@pytest.mark.parametrize("there", ["notes.txt", "metrics.json", "deep/notes.txt", ""])
def test_a_copy_onto_what_is_no_run(there, world, tmp_path):
    run, at = world.finished("run", tmp_path/"run-1"), tmp_path/"copies"/"run-1"
    if there: (at/there).parent.mkdir(parents=True)
    else: at.parent.mkdir()
    (at/there if there else at).write_text('{"of": "another tool"}')
    before = snapshot(tmp_path)
    fails(world.server.ask("copied", folder=run, url=f"file://{tmp_path}/copies"), at.parent)
    assert snapshot(tmp_path) == before


@others
def test_a_copy_onto_itself(world, tmp_path):
    run = world.finished("run", tmp_path/"run-1")
    (run/"metrics.json").unlink() # nothing tells that it is done
    before = snapshot(tmp_path)
    world.server.ask("copied", folder=run, url=f"file://{tmp_path}")
    assert snapshot(tmp_path) == before


@others
@pytest.mark.parametrize("name", ["../evil", "ABSOLUTE", *some([], ["../../evil", "a/../../evil"])])
def test_names_that_lead_out_of_the_folder(name, world, tmp_path):
    name = str(tmp_path/"evil") if name == "ABSOLUTE" else name
    root = voc(world, tmp_path, ["a", name])
    (root/"JPEGImages/a").mkdir() # so that the path through it can be walked
    for p in (root/"evil.jpg", tmp_path/"evil.jpg", root/"JPEGImages/evil.jpg"): shutil.copy(root/"JPEGImages/a.jpg", p)
    before = snapshot(tmp_path)
    done = world.server.run("spml_prepare", "--data", "voc", "--root", root, "--out", tmp_path/"out/regions",
        "--workers", 0, cwd=tmp_path)
    refused(done, "spml_prepare", name)
    outside = {k: v for k, v in snapshot(tmp_path).items() if not k.startswith("out/regions/")
        and k not in ("out", "out/regions")}
    assert outside == before


@others
@pytest.mark.parametrize("drawn", [False, True], ids=["nothing drawn", "drawn"])
@pytest.mark.parametrize("there", ["labels/a.json", "labels/a.xml", "boxes/a.json"])
def test_labels_of_another_tool_beside_a_drawing(there, drawn, world, tmp_path):
    root = world.finished("own_unlabelled", tmp_path/"own")
    if drawn: world.done("draw", folder=root, before=[], last=STROKE)
    (root/there).parent.mkdir(exist_ok=True)
    (root/there).write_text('{"version": "5.0", "shapes": [], "imagePath": "a.png"}')
    kept = (root/there).read_bytes()
    said = world.server.ask("refused_when_drawn_on", folder=root,
        steps=[["stroke", 9, 2], ["undo"], ["undo"], ["box", [2, 2, 30, 30], 1], ["tag", 1, True], ["undo"], ["undo"],
        ["erase", 5, 5]])
    assert said.error is None, f"{said.error}: {said.message}"
    assert (root/there).exists() and (root/there).read_bytes() == kept
    if not drawn: assert said.value and all(str(root) in line for line in said.value[:1])


# refused at once

MEMORY = 2 << 30


@at_once
@pytest.mark.parametrize("n, deep", [(12, 10), (6, 100)], ids=["12 of 10", "6 of 100"])
def test_a_grid_of_a_million_million_runs(n, deep, world, tmp_path):
    names = ["seed", "n_train", "n_valid", "n_watch", "size", "crop", "regions", "rounds", "steps", "head_steps",
        "tag_steps", "walk_stride"][:n]
    (tmp_path/"g.yaml").write_text("experiment: single\ngrid:\n" + "".join(f"  {k}: {list(range(1, deep + 1))}\n"
        for k in names))
    done = world.server.run("spml_sweep", tmp_path/"g.yaml", "--out", tmp_path/"out", "--dry", cwd=tmp_path,
        seconds=15, memory=MEMORY)
    refused(done, "spml_sweep", "g.yaml", seconds=10)
    assert not (tmp_path/"out").exists()


@at_once
def test_a_pipe_for_an_image(world, tmp_path):
    photographs(tmp_path/"images")
    (tmp_path/"images/1.png").unlink()
    os.mkfifo(tmp_path/"images/1.png")
    fails(world.server.ask("image", path=tmp_path/"images/1.png", seconds=8), "1.png")
    done = world.server.run("spml_prepare", "--data", "folder", "--root", "images", "--out", "out", "--workers", 0,
        cwd=tmp_path, seconds=15)
    refused(done, "spml_prepare", "1.png")


@at_once
@pytest.mark.parametrize("more", [dict(width=1e9), dict(width=-3), dict(width=float("nan")), dict(width="x"),
    dict(strokes=[[[5, 5], [float("nan"), 5]]], classes=[1]), dict(strokes=[[[5, 5], [1e12, 5]]], classes=[1]),
    dict(classes=[1e9, 1]), dict(classes=[1.5, 1])], ids=str)
def test_a_drawing_that_no_memory_holds(more, world, tmp_path):
    said = dict(spml_kit=1, kind="scribbles", strokes=[[[5, 5], [20, 5]], [[5, 30], [20, 30]]], classes=[1, 2],
        width=3) | more
    (tmp_path/"a.json").write_text(json.dumps(said))
    answer = world.server.ask("annotation", path=tmp_path/"a.json", seconds=10, memory=MEMORY)
    fails(answer, "a.json")
    assert answer.took < 6


PREPARE, SWEEP = ["spml_prepare", "--data", "folder", "--root", "images", "--out", "out"], ["spml_sweep", "g.yaml",
    "--out", "out", "--code", "v"]


@at_once
@pytest.mark.parametrize("words", [[*PREPARE, "--max-size", 0], [*PREPARE, "--max-size", -3],
    [*PREPARE, "--workers", -1], [*PREPARE, "--n", 0], [*PREPARE, "--n", -1],
    ["spml_run", "toy.ipynb", "--out", "out", "--timeout", -5],
    ["spml_run", "toy.ipynb", "--out", "out", "--timeout", 0],
    [*SWEEP, "--workers", -1], [*SWEEP, "--timeout", -5]], ids=lambda w: " ".join(map(str, (w[0], *w[-2:]))))
def test_numbers_that_mean_nothing(words, world, tmp_path):
    photographs(tmp_path/"images")
    for name in ("toy.ipynb", "g.yaml"): shutil.copy(world.home/name, tmp_path)
    done = world.server.run(*words, cwd=tmp_path, seconds=30)
    assert done.status == 2, f"exit status {done.status}: {done.complained[-2000:]}"
    line = lines(done.complained)[-1]
    named = words[-2].strip("-").replace("-", "[-_ ]") + r"\b.*" + str(words[-1])
    assert line.startswith(words[0]) and re.search(named, line) and "Traceback" not in done.complained, line
    assert done.took < 8 and not (tmp_path/"out").exists()


@at_once
@pytest.mark.parametrize("changes", [dict(lr=np.inf), dict(lr=np.nan), dict(wd=np.nan), dict(wd=np.inf), dict(wd=-1.),
    dict(scale=[0, 0]), dict(scale=[-1, 1]), dict(scale=[np.nan, 1]), dict(scale=["a", "b"]), dict(dropout=1.5),
    dict(dropout=-.1), dict(dropout=np.nan),
    dict(multipliers=[1, 1]), dict(multipliers=[1, 1, 1, 1, 1]), dict(multipliers=[1, 1, 1, np.nan]),
        dict(multipliers=[1, 1, 1, "x"]), dict(grid=[0, 3]), dict(grid=[1.5, 3]), dict(infer_grid=[-1, 3]),
        dict(power=np.nan), dict(warmup=-1), dict(memory=-1), dict(embedding_scale=np.inf),
    dict(relations={"similarity": {"weight": float("inf")}})], ids=str)
def test_recipes_that_cannot_be_trained(changes):
    "Said when it is made, or, of relations and of too few multipliers for the network, when the command's parameters are checked"
    if "relations" not in changes and changes != dict(multipliers=[1, 1]): # two are a head's
        with pytest.raises(SpmlError, match=next(iter(changes))): Recipe(**changes)
    with pytest.raises(SpmlError, match="weight" if "relations" in changes
        else next(iter(changes))): check_parameters(find_notebook("single"), dict(recipe_changes=changes))

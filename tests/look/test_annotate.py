"""The annotator without a browser: files, undo, messages of a page, odd input, a kernel that dies."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from spml_kit.look.annotate import annotate
from spml_kit.core import UNLABELLED, SpmlError
from spml_kit.files import read_index_png, read_json, write_index_png
from spml_kit.data.images import SceneSet, folder_sets
from spml_kit.data.weak import WeakSet, check_weak_set
from spml_kit.infer.bundle import load_model
from spml_kit.learn.learner import create_model
from spml_kit.method.recipes import RECIPES

CLASSES = ["background", "cat", "dog"]
SIZE = 40, 56


@pytest.fixture
def root(tmp_path):
    "Three images of one size"
    (tmp_path / "images").mkdir()
    scenes = SceneSet(3, seed=3, size=56)
    for i in range(3):
        Image.fromarray(scenes.image(i)[:SIZE[0]]).save(tmp_path / "images" / f"photo_{i}.png")
    return tmp_path


def written(root): return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.parent.name != "images" and p.name != "classes.txt")


def said(a, **message):
    "What the page sends"
    a._receive(dict(index=a.index, id="page:1") | message)
    return a.status


# files

def test_one_file_for_each_image(root):
    a = annotate(root, CLASSES)
    a.set_tag("cat")
    assert written(root) == ["labels/photo_0.json", "tags/photo_0.json"] and read_json(root / "labels/photo_0.json")["kind"] == "tags"
    a.add_box((4, 4, 20, 20), "dog")
    assert read_json(root / "labels/photo_0.json")["kind"] == "boxes"
    a.add_point(30, 5, 0)
    assert written(root) == ["boxes/photo_0.json", "labels/photo_0.png", "points/photo_0.json", "tags/photo_0.json"]
    for _ in range(3): a.undo()
    assert written(root) == [] and a.can == [False, True]
    for _ in range(3): a.undo(redo=True)
    assert written(root) == ["boxes/photo_0.json", "labels/photo_0.png", "points/photo_0.json", "tags/photo_0.json"]


def test_folder_trains(root):
    a = annotate(root, CLASSES)
    a.add_stroke([(5, 5), (20, 5)], 0); a.add_stroke([(5, 20), (20, 20)], 1)
    a.index = 2
    a.add_stroke([(5, 5), (20, 5)], 2)
    train, rest = folder_sets(root)
    assert (train.names, rest.names, train.classes.names) == (["photo_0", "photo_2"], ["photo_1"], tuple(CLASSES))
    assert check_weak_set(WeakSet(train, root / "labels"))["tags"] == dict(background=1, cat=1, dog=1)


def test_images_without_a_folder_of_their_own(root):
    a = annotate(root / "images", CLASSES)
    a.add_point(3, 3, 1)
    assert (root / "images/labels/photo_0.png").exists() and annotate(root / "images").marks == a.marks


# changes

def test_undo_is_of_an_image(root):
    a = annotate(root, CLASSES)
    a.add_point(3, 3, 1)
    a.go(1)
    a.undo()
    assert a.marks == [] and a.can == [False, False] and (root / "labels/photo_0.png").exists()
    a.go(0)
    assert a.can == [True, False] and len(a.marks) == 1
    a.undo()
    assert a.marks == [] and not (root / "labels/photo_0.png").exists()
    a.undo(); a.undo(redo=True); a.undo(redo=True)
    assert len(a.marks) == 1
    a.undo(); a.add_point(9, 9, 2); a.undo(redo=True) # a new change ends what could be done again
    assert [m["c"] for m in a.marks] == [2]


@pytest.mark.parametrize("x, y, left", [(10, 5.5, ["boxes"]), (20, 30, ["scribbles"]), (25, 25, ["scribbles", "boxes"])], ids=["on the stroke", "on the outline", "inside the box"])
def test_erase(root, x, y, left):
    a = annotate(root, CLASSES)
    a.add_stroke([(5, 5), (20, 5)], 1); a.add_box((20, 10, 40, 38), 2)
    a.erase(x, y)
    assert [m["kind"] for m in a.marks] == left


def test_brush_is_part_of_the_drawing(root):
    a = annotate(root, CLASSES)
    a.brush = 7
    assert written(root) == [] and a.can == [False, False]
    a.add_stroke([(5, 5), (20, 5)], 1)
    thick = (read_index_png(root / "labels/photo_0.png") == 1).sum()
    a.brush = 2
    assert (read_index_png(root / "labels/photo_0.png") == 1).sum() < thick
    assert annotate(root).brush == 2
    a.undo()
    assert a.brush == 7 and (read_index_png(root / "labels/photo_0.png") == 1).sum() == thick
    a.brush = 0
    assert a.brush == 7 and "not saved: brush of 0" in a.status


def test_class_is_added_later(root):
    annotate(root, CLASSES).add_point(3, 3, 2)
    a = annotate(root, [*CLASSES, "fish"])
    a.add_point(9, 9, "fish")
    assert [m["c"] for m in annotate(root).marks] == [2, 3]


# messages of the page

def test_messages(root):
    a = annotate(root, CLASSES)
    assert said(a, do="add", mark=dict(kind="scribbles", c=1, xy=[[5, 5], [9, 9]])) == "saved: labels/photo_0.png" and a.done == "page:1"
    said(a, do="tag", c=2, on=True); said(a, do="tag", c=2, on=True)
    assert [m["kind"] for m in a.marks] == ["scribbles", "tags"]
    said(a, do="tag", c=2, on=False)
    assert [m["kind"] for m in a.marks] == ["scribbles"]
    said(a, do="undo"); said(a, do="redo")
    said(a, do="erase", xy=[7, 7])
    assert a.marks == []
    said(a, do="go", by=1)
    assert (a.index, a.name) == (1, "photo_1")
    said(a, do="go", by=9)
    assert a.index == 2


@pytest.mark.parametrize("message, says", [
    (dict(do="add", mark=dict(kind="points", c=1, xy=[[500, 5]])), "outside the image"), (dict(do="add", mark=dict(kind="points", c=9, xy=[[5, 5]])), "class id 9"),
    (dict(do="add", mark=dict(kind="boxes", c=1, xy=[[5, 5], [5, 9]])), "is empty"), (dict(do="add", mark=dict(kind="circle", c=1, xy=[])), "'circle'"),
    (dict(do="add", index=1, mark=dict(kind="points", c=1, xy=[[5, 5]])), "the image has changed")], ids=["outside", "class", "box", "kind", "other image"])
def test_a_bad_message_changes_nothing(root, message, says):
    a = annotate(root, CLASSES)
    a.add_point(3, 3, 1)
    before = a.marks, written(root)
    assert says in said(a, **message) and a.done == "page:1"
    assert (a.marks, written(root)) == before
    assert "saved: " in said(a, do="add", mark=dict(kind="points", c=1, xy=[[5, 5]])) # and goes on


def test_a_full_disk_is_told(root, monkeypatch):
    a = annotate(root, CLASSES)
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr("spml_kit.look.annotate.write_drawing", full)
    assert "not saved" in said(a, do="add", mark=dict(kind="points", c=1, xy=[[5, 5]])) and a.marks == []


# what the drawing would give

def test_preview(root):
    a = annotate(root, CLASSES)
    a.preview = True
    assert a.spread == b"" and "at least two classes" in a.status
    a.add_stroke([(5, 5), (20, 5)], 0)
    assert a.spread == b""
    a.add_stroke([(5, 30), (20, 30)], 1)
    one = a.spread
    assert one[:4] == b"\x89PNG"
    a.add_stroke([(40, 10), (40, 30)], 2)
    assert a.spread not in (b"", one)
    labels, certainty = a.spread_drawing()
    assert labels.shape == SIZE and set(np.unique(labels)) <= {0, 1, 2} and 0 <= certainty.min() <= certainty.max() <= 1
    a.go(1)
    assert a.spread == b""


def test_a_trained_model_spreads(root):
    model = create_model(RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8), 3)
    a = annotate(root, CLASSES, model=model)
    a.add_stroke([(5, 5), (20, 5)], 0); a.add_stroke([(5, 30), (20, 30)], 1)
    own = a.spread_drawing()[1]
    a.model, a._seen = None, None
    assert own.shape == SIZE and not np.array_equal(own, a.spread_drawing()[1])


def test_figure(root):
    a = annotate(root, CLASSES)
    assert len(a.figure().axes) == 2 # nothing to propagate yet
    a.add_stroke([(5, 5), (20, 5)], 0); a.add_box((5, 20, 30, 35), 1); a.add_point(10, 30, 2)
    assert len(a.figure().axes) == 3


# odd input

def test_odd_folders(tmp_path, root):
    with pytest.raises(SpmlError, match="no such folder; make it"): annotate(tmp_path / "none", CLASSES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpmlError, match="no images here"): annotate(tmp_path / "empty", CLASSES)
    assert not (tmp_path / "empty" / "classes.txt").exists()
    with pytest.raises(SpmlError, match="classes.txt: no such file; write the class names there"): annotate(root)
    annotate(root, CLASSES)
    with pytest.raises(SpmlError, match="keep their order"): annotate(root, ["background", "dog"])


@pytest.mark.parametrize("damage, says", [
    (lambda root: (root / "images/photo_0.png").write_bytes(b"x"), "photo_0.png: not a readable image"),
    (lambda root: (root / "scribbles/photo_0.json").write_text("{"), "scribbles/photo_0.json: not JSON"),
    (lambda root: os.replace(root / "scribbles/photo_0.json", root / "boxes/photo_0.json"), "contains scribbles, not boxes"),
    (lambda root: Image.fromarray(SceneSet(1, size=64).image(0)).save(root / "images/photo_0.png"), "put the old one back"),
    (lambda root: (root / "scribbles/photo_0.json").unlink(), "labels were not drawn here"),
    (lambda root: (root / "labels/photo_0.png").write_bytes(b"x"), "labels/photo_0.png: not a readable image")], ids=["image", "json", "kind", "size", "foreign", "png"])
def test_damage_is_told_and_left_alone(root, damage, says):
    a = annotate(root, CLASSES)
    (root / "boxes").mkdir()
    a.add_stroke([(5, 5), (20, 5)], 1)
    damage(root)
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    a = annotate(root)
    assert a.failed and says in a.status and str(root) in a.status
    with pytest.raises(SpmlError, match=says): a.add_point(3, 3, 1)
    assert "not saved" in said(a, do="undo") or a.marks == []
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    a.go(1)
    assert not a.failed and a.status == ""


KILLED = """
import sys, warnings; warnings.simplefilter('ignore')
from spml_kit.look.annotate import annotate
a = annotate(sys.argv[1], ['background', 'cat', 'dog'], learn=True)
print('ready', flush=True)
n = 0
while True:
    n += 1
    a.add_stroke([(5, 1 + n % 30), (20, 1 + n % 30)], n % 3)
    print(len(a.marks), flush=True)
"""


def test_nothing_is_lost_when_the_kernel_dies(root):
    "Killed in the midst of drawing and learning: every stroke that was confirmed is there and is learnt, and training reads the folder"
    drawing = subprocess.Popen([sys.executable, "-c", KILLED, str(root)], stdout=subprocess.PIPE, text=True)
    assert drawing.stdout.readline() == "ready\n"
    for _ in range(5): drawing.stdout.readline()
    time.sleep(.05)
    drawing.send_signal(signal.SIGKILL)
    confirmed = max([5, *map(int, drawing.stdout.read().split())])
    drawing.wait()
    a = annotate(root)
    assert not a.failed and len(a.marks) in (confirmed, confirmed + 1)
    a.save()
    np.testing.assert_array_equal(WeakSet(folder_sets(root)[0], root / "labels").sample(0).labels, a.labels)
    again = learning(root)
    assert torch.equal(again.segmenter.drawn[0], again.segmenter._on_grid(0, a.labels)) and set(np.unique(again._opinions[0].labels)) <= {0, 1, 2}
    again.learner.close()


@pytest.mark.parametrize("name, content", [("json", b'{"shapes": []}'), ("json", b'{"spml_kit": 1, "kind": "tags", "classes": [1]}'), ("xml", b"<annotation/>"), ("png", None)])
def test_labels_of_others_beside_a_drawing_stay(root, name, content):
    "A file that another tool, or a hand, has put there since"
    a = annotate(root, ["background", "cat", "dog"])
    a.add_stroke([(5, 9), (20, 9)], "dog")
    path = root / "labels" / f"{a.name}.{name}"
    if content is None:
        Image.fromarray(np.full(a.image.shape[:2], 2, np.uint8)).save(path) # edited elsewhere
        content = path.read_bytes()
    else: path.write_bytes(content)
    for opened in (a, annotate(root)):
        try: opened.add_stroke([(5, 20), (20, 20)], "cat")
        except SpmlError as e: assert "labels were not drawn here" in str(e)
        else: raise AssertionError("written over")
        assert path.read_bytes() == content


def test_drawings_of_earlier_versions_go_on(root):
    "Their label files do not say who wrote them"
    a = annotate(root, ["background", "cat", "dog"])
    a.add_stroke([(5, 9), (20, 9)], "dog")
    write_index_png(root / "labels" / f"{a.name}.png", a.labels, a.classes.palette)
    b = annotate(root)
    b.add_stroke([(5, 20), (20, 20)], "cat")
    assert not b.failed and len(b.marks) == 2


def test_class_tables_keep_what_a_person_wrote(root):
    (root / "classes.txt").write_bytes("\ufeff# mine\nbackground\ncat\n".encode())
    annotate(root, ["background", "cat", "dog"])
    assert (root / "classes.txt").read_text(encoding="utf-8-sig") == "# mine\nbackground\ncat\ndog\n"
    (root / "classes.txt").write_text("0 background\n1 cat\n")
    with pytest.raises(SpmlError, match="add dog there"): annotate(root, ["background", "cat", "dog"])


# it learns while one draws

def learning(root, **kwargs):
    a = annotate(root, CLASSES, learn=True, **kwargs)
    assert a.learner.wait(60)
    return a


def test_it_learns_what_is_drawn_and_begins_again_where_it_ended(root):
    a = learning(root)
    assert a.learns and a.preview and not a.place
    a.add_stroke([(4, 4), (50, 4)], 0)
    a.add_stroke([(20, 20), (30, 30)], "cat")
    assert a.learner.wait(60)
    assert len(a.place) == 2 and a.spread and set(np.unique(a._opinions[0].labels)) <= {0, 1}
    labels = a.spread
    a.doubtful = True
    assert a.spread != labels
    path = a.accept()
    accepted, drawn = read_index_png(path), a.labels
    assert accepted.shape == SIZE and (accepted < 3).all()
    np.testing.assert_array_equal(accepted[drawn < UNLABELLED], drawn[drawn < UNLABELLED])
    np.testing.assert_array_equal(read_index_png(root / "labels" / "photo_0.png"), drawn) # what training reads is as drawn
    a.next_doubtful()
    assert a.index != 0
    a.learner.close()
    again = learning(root)
    assert [*again.segmenter.drawn] == [0] and set(np.unique(again._opinions[0].labels)) <= {0, 1}
    again.learner.close()


def test_a_stroke_does_not_wait_for_learning(root):
    a = learning(root)
    slow = a.segmenter.update
    a.segmenter.update = lambda *args: (time.sleep(1), slow(*args))
    start = time.perf_counter()
    for k in range(4): a.add_stroke([(4, 4 + 2*k), (50, 4 + 2*k)], k % 2)
    assert time.perf_counter() - start < 1
    assert len(read_json(root / "scribbles" / "photo_0.json")["strokes"]) == 4
    assert a.learner.wait(60)
    a.learner.close()


def test_what_strokes_taught_is_written_and_labels_other_pictures(root):
    a = learning(root)
    assert "nothing is drawn" in said(a, do="model") and not (root / "model.spml").exists()
    a.add_stroke([(4, 4), (50, 4)], 0)
    a.add_stroke([(20, 20), (30, 30)], "cat")
    assert said(a, do="model").startswith("written: model.spml")
    shown = a.segmenter.predict(1).labels
    np.testing.assert_array_equal(load_model(root / "model.spml").predict(root / "images" / "photo_1.png"), shown)
    a.learner.close()


def test_without_learning_there_is_nothing_to_accept(root):
    a = annotate(root, CLASSES)
    assert not a.learns
    assert "no label map" in said(a, do="accept") and all("learn=True" in said(a, do=k) for k in ("doubtful", "model"))


def test_it_prints_its_state(root):
    a = annotate(root, CLASSES)
    assert repr(a) == f"Annotator: {a.name}, {a.status}" == a._repr_mimebundle_()[0]["text/plain"]

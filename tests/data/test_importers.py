"""Other tools' files become projects: pictures, classes, what is missing or broken."""
import base64
import io
import json
import sys
import tempfile
from collections import Counter
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from conftest import FIXTURES
from spml_kit.core import *
from spml_kit.files import *
from spml_kit.pictures import *
from spml_kit.data import importers
from spml_kit.data.annotations import *
from spml_kit.data.batches import weak_dls
from spml_kit.data.formats import *
from spml_kit.data.images import folder_sets
from spml_kit.data.importers import *
from spml_kit.data.json_tools import *
from spml_kit.data.shapes import *
from spml_kit.data.weak import WeakSet, check_weak_set
from spml_kit.learn.learner import spml_learner
from spml_kit.look.drawings import mend_labels, read_drawing

TOOLS = sorted(p.name for p in FIXTURES.iterdir())
CLASSES = Classes(("background", "cat", "dog"))
SIZE = H, W = 60, 80
SQUARE = [[10, 10], [40, 10], [40, 40], [10, 40]]
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

TRUTH = np.full(SIZE, UNLABELLED, np.uint8)  # what is drawn in every fixture
TRUTH[10:40, 10:40], TRUTH[20:55, 50:70] = 1, 2


def iou(a, b): return (a & b).sum() / max(1, (a | b).sum())


def picture(path, size=SIZE, value=90, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path, **save)
    return path


def shape(label, kind="polygon", points=SQUARE, **more): return dict(label=label, points=points, shape_type=kind) | more


def labelme(path, *shapes, size=SIZE, picture="a.png", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(imagePath=picture, imageHeight=size[0], imageWidth=size[1], shapes=shapes) | more))
    return path


def labels_of(plan, k=0): return kit_labels(plan.annotations(plan.pictures[k]), plan.pictures[k].drawing.size)


# ---- a file of each tool

@pytest.mark.parametrize("tool", TOOLS)
def test_each_tool_becomes_a_project_that_trains(tool, tmp_path):
    plan = import_annotations(FIXTURES / tool, tmp_path / "p")
    assert plan.tool == tool and plan.classes == CLASSES and not plan.skipped and not plan.bare()
    train, test = folder_sets(tmp_path / "p")
    assert train.names == ["a"] and train.classes == CLASSES
    assert (train.image(0) == np.array(Image.open(next(p for p in FIXTURES.joinpath(tool).rglob("a.png") if p.parent.name != "SegmentationClass")).convert("RGB"))).all()
    weak = WeakSet(train, tmp_path / "p" / "labels", regions=4)
    labels = weak.sample(0).labels
    if tool == "scribblesup":  # strokes inside the objects
        assert (TRUTH[labels == 1] == 1).mean() > .95 and (TRUTH[labels == 2] == 2).mean() > .95
    else:
        for c in (1, 2) if tool != "voc" else (2,): assert iou(labels == c, TRUTH == c) > .98
    if tool == "voc": assert set(np.unique(labels[10:40, 10:40])) == {UNLABELLED}  # a box
    assert plan.annotations(plan.pictures[0]).keys() >= {"scribblesup": {"scribbles"}, "voc": {"boxes", "full"}}.get(tool, {"full"})
    assert check_weak_set(weak)["images"] == 1
    learn = spml_learner(weak_dls(weak, weak, bs=2, crop=32, steps=2, device="cpu"), method="cross_entropy", path=tmp_path / "run")
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    learn.fit_poly(1)
    assert np.isfinite(float(learn.recorder.losses[-1])) and len(learn.recorder.losses) == 2


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("meaning", ["boxes", "points", "scribbles", "tags"])
def test_what_a_polygon_means_is_the_users_to_say(tool, meaning):
    if tool == "scribblesup" and meaning in ("boxes", "points"):  # strokes are neither
        with pytest.raises(SpmlError, match="does not use it"): plan_import(FIXTURES / tool, meaning=meaning)
        return
    plan = plan_import(FIXTURES / tool, meaning=meaning)
    said = plan.annotations(plan.pictures[0])
    kind = said[meaning]
    assert {1, 2} <= {*kind.classes.tolist()} or tool == "voc" and meaning != "boxes" and {*kind.classes.tolist()} == {2}
    if meaning == "boxes":
        found = {c: b.round().tolist() for c, b in zip(kind.classes.tolist(), kind.boxes)}
        assert found[1] == [10, 10, 40, 40] and found[2] == [50, 20, 70, 55]
    if meaning in ("points", "scribbles") and tool != "scribblesup":
        labels = kind.to_labels(SIZE)
        for c in (1, 2): assert (TRUTH[labels == c] == c).all() or tool == "voc"


def my_reader(path, data): return ToolExport([Drawing("a.png", shapes=[Shape("box", "cat", [(1, 1), (9, 9)])], source=path)])


def test_a_reader_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    picture(tmp_path / "a.png")
    (tmp_path / "a.json").write_text("[1]")
    assert plan_import(tmp_path / "a.json", tool="mine:my_reader").annotations(plan_import(tmp_path / "a.json", tool="mine:my_reader").pictures[0])["boxes"] == Boxes([(1, 1, 9, 9)], [1])


def test_the_annotator_opens_what_was_imported(tmp_path):
    picture(tmp_path / "in" / "a.png")
    labelme(tmp_path / "in" / "a.json", shape("cat", "linestrip", [[5, 5], [30, 30]]), shape("dog", "point", [[60, 20]]), shape("dog", "rectangle", [[50, 10], [70, 40]]), shape("background", "line", [[2, 50], [70, 50]]))
    import_annotations(tmp_path / "in", tmp_path / "p")
    said = read_drawing(tmp_path / "p", "a", 3, SIZE)
    assert {*said} == {"scribbles", "points", "boxes"}
    assert (read_index_png(tmp_path / "p" / "labels" / "a.png") == drawn_labels(said, SIZE)).all()
    assert not mend_labels(tmp_path / "p", "a", said, drawn_labels(said, SIZE))


# ---- pictures

@pytest.mark.parametrize("suffix", ["jpg", "tif", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_labels_lie_where_they_were_drawn(orientation, suffix, tmp_path):
    "Labels are drawn on the picture as it is seen"
    seen = np.full((*SIZE, 3), 60, np.uint8)
    seen[10:40, 10:40] = 200, 40, 40
    undo = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: lambda a: np.rot90(a, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "in").mkdir()
    Image.fromarray(np.ascontiguousarray(undo[orientation](seen))).save(tmp_path / "in" / f"a.{suffix}", **dict(jpg=dict(quality=95, exif=exif), png=dict(exif=exif), tif=dict(tiffinfo={0x0112: orientation}))[suffix])
    labelme(tmp_path / "in" / "a.json", shape("thing", "polygon", SQUARE), picture=f"a.{suffix}")
    import_annotations(tmp_path / "in", tmp_path / "p")
    train, _ = folder_sets(tmp_path / "p")
    s = WeakSet(train, tmp_path / "p" / "labels").sample(0)
    assert (s.labels == 1).sum() == 900 and s.image[s.labels == 1][:, 0].mean() > 150 and s.image[s.labels != 1][:, 0].mean() < 80


def test_a_picture_of_four_colours_that_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.new("CMYK", SIZE[::-1]).rotate(90, expand=True).save(tmp_path / "in" / "a.jpg", exif=exif)
    labelme(tmp_path / "in" / "a.json", shape("thing", "polygon", SQUARE), picture="a.jpg")
    import_annotations(tmp_path / "in", tmp_path / "p")
    train, _ = folder_sets(tmp_path / "p")
    assert train.image(0).shape == (*SIZE, 3)


def test_the_picture_of_another_file_is_not_taken(tmp_path):
    "A file that names its picture, which is missing, does not draw on that of another folder"
    picture(tmp_path / "in" / "one" / "a.png")
    for folder in ("one", "two"):
        (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
        labelme(tmp_path / "in" / folder / "a.json", shape(folder, "polygon", SQUARE), picture="a.png")
    plan = plan_import(tmp_path / "in")
    assert plan.classes.names == ("background", "one") and any("missing picture" in k for k in plan.skipped)


@pytest.mark.parametrize("below", ["", "pictures"])
def test_each_picture_of_a_file_gets_its_own_shapes(below, tmp_path):
    "Several pictures that one file names, beside it or in a folder below"
    coco = json.loads((FIXTURES / "coco" / "instances.json").read_text())
    boxes = {n: [5 + 10*k, 5, 20, 20] for k, n in enumerate("abc")}
    coco["images"] = [dict(id=n, file_name=f"{n}.png", height=H, width=W) for n in boxes]
    coco["annotations"] = [dict(id=k, image_id=n, category_id=coco["categories"][0]["id"], bbox=b) for k, (n, b) in enumerate(boxes.items())]
    for n in boxes: picture(tmp_path / below / f"{n}.png")
    (tmp_path / "all.json").write_text(json.dumps(coco))
    plan = plan_import(tmp_path / "all.json")
    assert {p.name: [s.xy.min(0).tolist() for s in p.drawing.shapes] for p in plan.pictures} == {n: [b[:2]] for n, b in boxes.items()}


def test_names_in_either_unicode_form(tmp_path):
    import unicodedata
    (tmp_path / "in").mkdir()
    picture(tmp_path / "in" / unicodedata.normalize("NFD", "Käfer.png"))
    labelme(tmp_path / "in" / "a.json", shape(unicodedata.normalize("NFC", "Käfer"), "polygon", SQUARE), shape(unicodedata.normalize("NFD", "Käfer"), "polygon", SQUARE), picture=unicodedata.normalize("NFC", "Käfer.png"))
    plan = plan_import(tmp_path / "in")
    assert len(plan.pictures) == 1 and len(plan.classes) == 2


def test_names_that_two_pictures_bear(tmp_path):
    for folder in ("one", "two"):
        picture(tmp_path / "in" / folder / "a.png")
        labelme(tmp_path / "in" / folder / "a.json", shape("cat", "polygon", SQUARE), picture=f"{folder}/a.png")
    plan = import_annotations(tmp_path / "in", tmp_path / "p", link=False)
    assert [p.name for p in plan.pictures] == ["one_a", "two_a"]
    assert not any(p.is_symlink() for p in (tmp_path / "p" / "images").iterdir())
    labelme(tmp_path / "in" / "a.json", shape("cat", "polygon", SQUARE))
    with pytest.raises(SpmlError, match="Two pictures have this name"): plan_import(tmp_path / "in")
    picture(tmp_path / "other" / "a.png"), picture(tmp_path / "other" / "a.jpg")
    labelme(tmp_path / "other" / "a.json", shape("cat", "polygon", SQUARE)), labelme(tmp_path / "other" / "b.json", shape("cat", "polygon", SQUARE), picture="a.jpg")
    assert [p.name for p in plan_import(tmp_path / "other").pictures] == ["a_jpg", "a_png"]


def test_pictures_that_are_missing_embedded_or_of_another_size(tmp_path):
    raw = io.BytesIO()
    Image.new("RGB", (W, H), (9, 8, 7)).save(raw, "PNG")
    labelme(tmp_path / "in" / "a.json", shape("cat", "polygon", SQUARE), picture="gone.jpg")
    with pytest.raises(SpmlError, match="gone.jpg.*--images DIR"): plan_import(tmp_path / "in")
    labelme(tmp_path / "in" / "b.json", shape("cat", "polygon", SQUARE), picture="b.jpg", imageData=base64.b64encode(raw.getvalue()).decode())
    picture(tmp_path / "in" / "c.png", (30, 40))
    labelme(tmp_path / "in" / "c.json", shape("cat", "polygon", SQUARE), picture="c.png")
    picture(tmp_path / "in" / "d.png")
    plan = import_annotations(tmp_path / "in", tmp_path / "p", images=tmp_path / "in")
    assert [p.name for p in plan.pictures] == ["b", "d"] and plan.bare() == ["d"]
    assert read_image(tmp_path / "p" / "images" / "b.png")[0, 0].tolist() == [9, 8, 7]
    assert sorted(plan.skipped.values()) == [1, 1] and any("gone.jpg" in k for k in plan.skipped) and any("c.json: drawn on a picture of 80x60, c.png has 40x30" in k for k in plan.skipped)
    (tmp_path / "in" / "e.json").write_text((tmp_path / "in" / "a.json").read_text().replace("gone.jpg", "e.png"))
    (tmp_path / "in" / "e.png").write_bytes(b"no picture")
    assert any("e.png: not a readable image" in k for k in plan_import(tmp_path / "in").skipped)


# ---- classes, overlaps, borders

def test_spellings_background_holes_and_borders(tmp_path):
    picture(tmp_path / "a.png")
    labelme(tmp_path / "a.json", shape("Cat ", "polygon", SQUARE), shape("cat", "polygon", [[20, 20], [30, 20], [30, 30]]), shape("cat", "point", [[5, 5]]), shape("_background_", "polygon", [[60, 10], [70, 10], [70, 20], [60, 20]]),
        shape("__ignore__", "rectangle", [[0, 0], [2, 2]]), shape("__ignore__", "polygon", [[0, 50], [10, 50], [10, 60], [0, 60]]), shape("dog", "polygon", [[70, 40], [90, 40], [90, 50], [70, 50]]), shape("dog", "point", [[200, 10]]),
        shape("dog", "polygon", [[1, 1], [2, 2]]), shape("dog", "polygon", [[1, 1], [2, 2], [3, 3]]), shape("", "point", [[1, 1]]), shape("dog", "point", [[float("nan"), 1]]), shape("dog", "cuboid", []))
    plan = plan_import(tmp_path)
    assert plan.classes == CLASSES and plan.notes == ["'Cat' is read as 'cat'"]
    labels = labels_of(plan)
    assert (labels == 1).sum() > 900 and (labels[10:20, 60:70] == 0).all() and (labels[50:60, :10] == VOID).all() and (labels[40:50, 70:] == 2).all()
    assert plan.skipped == Counter({"box to ignore, void in pictures with boxes": 1, "polygon clipped at the border of the picture (kept)": 1, "point outside the picture": 1, "polygon of 2 points, at least 3 needed": 1,
        "polygon that covers no pixel of the picture": 1, "point without a class": 1, "point with a coordinate that is not a number": 1, "cuboid (labelme)": 1})
    text = plan_text(plan)
    assert all(w in text for w in ("left out: 1 x point outside the picture", "Pixels without a shape are unlabelled", "the smaller lies on top", "--as full"))


def test_which_of_two_lies_on_top(tmp_path):
    picture(tmp_path / "a.png")
    small, large = shape("cat", "polygon", [[20, 20], [30, 20], [30, 30], [20, 30]]), shape("dog", "polygon", SQUARE)
    for first, second, order, inner in ((small, large, "smaller", 1), (large, small, "smaller", 1), (small, large, "file", 2), (large, small, "file", 1)):
        labelme(tmp_path / "a.json", first, second)
        assert labels_of(plan_import(tmp_path, order=order))[25, 25] == inner
    assert (labels_of(plan_import(tmp_path, background=True))[0] == 0).all()
    with pytest.raises(SpmlError, match="largest"): labels_of(plan_import(tmp_path, order="largest"))


def test_boxes_go_around_objects_of_several_parts(tmp_path):
    picture(tmp_path / "a.png")
    labelme(tmp_path / "a.json", shape("cat", "polygon", [[1, 1], [9, 1], [9, 9]], group_id=1), shape("cat", "polygon", [[20, 20], [30, 20], [30, 30]], group_id=1), shape("cat", "polygon", [[40, 1], [45, 1], [45, 9]]))
    plan = plan_import(tmp_path, meaning="boxes")
    assert plan.annotations(plan.pictures[0])["boxes"].boxes.tolist() == [[1, 1, 30, 30], [40, 1, 45, 9]]


# ---- files that are broken, or mean ill

DOCUMENTS = {t: next(p for p in sorted((FIXTURES / t).rglob("*")) if p.suffix in (".json", ".geojson") and p.name != "meta.json") for t in ("labelme", "coco", "via", "label_studio", "supervisely", "qupath")}
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-5, 100), st.just(10**30), st.just(float("nan")), st.just(float("inf")), st.text(max_size=3), st.just([]), st.just({}), st.just([[]]), st.just({"a": 1}), st.just([1, "b"]))


def places(d, way=()):
    yield way
    for k, v in (d.items() if isinstance(d, dict) else enumerate(d) if isinstance(d, list) else ()): yield from places(v, (*way, k))


def changed(d, way, value, remove):
    d = deepcopy(d)
    if not way: return value
    at = d
    for k in way[:-1]: at = at[k]
    if remove and isinstance(at, (dict, list)): del at[way[-1]]
    else: at[way[-1]] = value
    return d


def only_refused(path, tool, **more):
    "Is it read, or refused with its name? Anything else is a fault"
    try:
        plan = plan_import(path, tool=tool, **more)
        for p in plan.pictures: labels_of(plan, 0)
        plan_text(plan)
    except SpmlError as e: assert path.name in str(e), str(e)


@pytest.mark.parametrize("tool", DOCUMENTS)
@given(data=st.data())
@settings(quick, max_examples=80)
def test_changed_json_is_read_or_refused_by_name(tool, data):
    good = json.loads(DOCUMENTS[tool].read_text())
    ways = list(places(good))
    bad = good
    for _ in range(data.draw(st.integers(1, 2))):
        way = data.draw(st.sampled_from(ways))
        try: bad = changed(bad, way, data.draw(VALUES), data.draw(st.booleans()))
        except (KeyError, IndexError, TypeError): pass  # the first change took the place away
    with tempfile.TemporaryDirectory() as folder:
        picture(Path(folder) / "a.png")
        path = Path(folder) / DOCUMENTS[tool].name
        path.write_text(json.dumps(bad))
        only_refused(path, tool)
        only_refused(path, "")


TEXTS = {"cvat": "annotations.xml", "voc": "Annotations/a.xml", "scribblesup": "a.xml", "via_csv": "via.csv", "napari": "layers/a.cat.csv"}


@pytest.mark.parametrize("tool", TEXTS)
@given(data=st.data())
@quick
def test_changed_text_is_read_or_refused_by_name(tool, data):
    text = (FIXTURES / tool / TEXTS[tool]).read_text()
    a = data.draw(st.integers(0, len(text)))
    b = data.draw(st.integers(a, min(len(text), a + 30)))
    with tempfile.TemporaryDirectory() as folder:
        picture(Path(folder) / "a.png")
        path = Path(folder) / Path(TEXTS[tool]).name
        path.write_text(text[:a] + data.draw(st.sampled_from(["", "x", "-1", "9e99", "<a>", "nan", ",", "\x00"])) + text[b:])
        only_refused(path, tool)


def test_names_that_lead_elsewhere_stay_names(tmp_path):
    picture(tmp_path / "a.png")
    labelme(tmp_path / "a.json", shape("cat", "polygon", SQUARE), picture="../../../a.png")
    assert [p.name for p in plan_import(tmp_path).pictures] == ["a"]
    raw = io.BytesIO()
    Image.new("RGB", (W, H)).save(raw, "PNG")
    labelme(tmp_path / "a.json", shape("cat", "polygon", SQUARE), picture="..\\..\\b.png", imageData=base64.b64encode(raw.getvalue()).decode())
    import_annotations(tmp_path / "a.json", tmp_path / "p")
    assert [p.name for p in (tmp_path / "p" / "images").iterdir()] == ["b.png"]


# ---- all or nothing, and the command

def test_nothing_is_left_of_an_import_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(importers, "write_annotations", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): import_annotations(FIXTURES / "labelme", tmp_path / "deep" / "p")
    assert list((tmp_path / "deep").iterdir()) == []
    monkeypatch.undo()
    import_annotations(FIXTURES / "labelme", tmp_path / "deep" / "p")
    with pytest.raises(SpmlError, match="files are not overwritten"): import_annotations(FIXTURES / "coco", tmp_path / "deep" / "p")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SpmlError, match="files are not overwritten"): import_annotations(FIXTURES / "coco", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    import_annotations(FIXTURES / "coco", tmp_path / "empty")
    assert (tmp_path / "empty" / "classes.txt").read_text() == "background\ncat\ndog\n"


def test_folders_of_several_tools_or_of_none(tmp_path):
    with pytest.raises(SpmlError, match="no annotations of a supported tool"): plan_import(tmp_path)
    with pytest.raises(SpmlError, match="no such file"): plan_import(tmp_path / "gone")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(SpmlError, match="unpack it"): plan_import(tmp_path / "a.zip")
    picture(tmp_path / "a.png")
    labelme(tmp_path / "a.json", shape("cat", "polygon", SQUARE))
    (tmp_path / "v.json").write_text(DOCUMENTS["via"].read_text())
    with pytest.raises(SpmlError, match=r"files of labelme \(1\), VIA \(1\); choose one: --tool labelme"): plan_import(tmp_path)
    assert plan_import(tmp_path, tool="labelme").tool == "labelme" and plan_import(tmp_path, tool="via").classes == CLASSES
    with pytest.raises(SpmlError, match="tool 'labelmee' is not one of .*did you mean"): plan_import(tmp_path, tool="labelmee")
    with pytest.raises(SpmlError, match="looks like labelme; COCO writes"): plan_import(tmp_path / "a.json", tool="coco")
    with pytest.raises(SpmlError, match="--images names the folder"): plan_import(tmp_path, tool="via", images=tmp_path / "gone")


def test_one_broken_file_of_a_folder_stops_no_other(tmp_path):
    for n in "ab":
        picture(tmp_path / f"{n}.png")
        labelme(tmp_path / f"{n}.json", shape("cat"), picture=f"{n}.png")
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text()[:60])
    plan = plan_import(tmp_path)
    assert [p.name for p in plan.pictures] == ["b"] and any("a.json: not JSON" in w for w in plan.skipped)
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(SpmlError, match="2 files cannot be read, first .*a.json: not JSON"): plan_import(tmp_path)


@pytest.mark.parametrize("bad, says", [(shape("cat", "circle", [[9, 9]]), "circle of 1 point, 2 needed"), (dict(label="cat"), "'points' is missing"), (shape(None), "polygon without a class"), (None, "wrong type")])
def test_the_reason_names_the_entry(bad, says, tmp_path):
    picture(tmp_path / "a.png")
    labelme(tmp_path / "a.json", shape("dog"), bad)
    text = plan_text(plan_import(tmp_path))
    assert says in text and "(shape 2 of a.json)" in text


@pytest.mark.parametrize("tool", ["labelme", "coco", "yolo"])
def test_the_same_names_in_two_folders(tool, tmp_path):
    for k, part in enumerate(("train", "val")):
        picture(tmp_path / "images" / part / "1.jpg", value=10*k)
        if tool == "labelme": labelme(tmp_path / "ann" / part / "1.json", shape("cat", points=[[x + k, y] for x, y in SQUARE]), picture="1.jpg")
        elif tool == "coco":
            (tmp_path / "ann").mkdir(exist_ok=True)
            (tmp_path / "ann" / f"instances_{part}2017.json").write_text(json.dumps(dict(images=[dict(id=1, file_name="1.jpg")], categories=[dict(id=1, name="cat")], annotations=[dict(id=1, image_id=1, category_id=1, bbox=[10 + k, 10, 30, 30])])))
        else:
            (tmp_path / "labels" / part).mkdir(parents=True)
            (tmp_path / "labels" / part / "1.txt").write_text(f"0 {(25 + k)/W} .5 .2 .2")
    if tool == "yolo": (tmp_path / "classes.txt").write_text("cat\n")
    for more in (dict(), dict(images=tmp_path / "images")):
        plan = import_annotations(tmp_path if tool == "yolo" else tmp_path / "ann", tmp_path / f"out{len(more)}", **more)
        assert [p.name for p in plan.pictures] == ["train_1", "val_1"] and [p.path.parent.name for p in plan.pictures] == ["train", "val"]
        left = [p.drawing.shapes[0].xy[:, 0].min() for p in plan.pictures]
        assert abs(left[1] - left[0] - 1) < 1e-6 and not plan.skipped


def test_pictures_in_their_files_stay_apart(tmp_path):
    "Two files that hold pictures of one name are two pictures"
    import base64, io
    for k, part in enumerate(("train", "val")):
        raw = io.BytesIO()
        Image.new("RGB", (W, H), (k, k, k)).save(raw, "PNG")
        labelme(tmp_path / "in" / part / "x.json", shape("cat"), picture="1.jpg", imageData=base64.b64encode(raw.getvalue()).decode())
    plan = import_annotations(tmp_path / "in", tmp_path / "p")
    assert [p.name for p in plan.pictures] == ["train_1", "val_1"] and [len(p.drawing.shapes) for p in plan.pictures] == [1, 1]
    assert [np.array(Image.open(tmp_path / "p" / "images" / f"{n}_1.png")).max() for n in ("train", "val")] == [0, 1]


def test_advice_that_can_be_followed(tmp_path):
    for part in ("one", "two"): picture(tmp_path / part / "a.png")
    path = labelme(tmp_path / "c.json", shape("cat"))
    with pytest.raises(SpmlError, match="write the folder before it in .*c.json, one/a.png, or import each annotation file separately.*--images .*one"): plan_import(path)
    assert plan_import(path, images=tmp_path / "one").pictures[0].path == tmp_path / "one" / "a.png"
    assert plan_import(labelme(tmp_path / "c.json", shape("cat"), picture="one/a.png")).pictures[0].path == tmp_path / "one" / "a.png"


@pytest.mark.parametrize("said, there, taken", [("frame.jpg", "other/frame.png", True), ("other/frame.jpg", "other/frame.png", True), ("mine/frame.jpg", "other/frame.png", False), ("mine/frame.png", "other/frame.png", True)])
def test_another_ending_is_said_and_another_folder_refused(said, there, taken, tmp_path):
    picture(tmp_path / there)
    path = labelme(tmp_path / "x.json", shape("cat"), picture=said)
    if not taken:
        with pytest.raises(SpmlError, match="frame.png has another folder and another suffix"): plan_import(path)
        return
    plan = plan_import(path)
    assert any("such as frame.png for " + said in n for n in plan.notes) == (said[-3:] != there[-3:])


def test_a_picture_of_a_kind_that_is_not_read_is_named(tmp_path):
    picture(tmp_path / "a.png")
    labelme(tmp_path / "a.json", shape("cat"))
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    labelme(tmp_path / "b.json", shape("cat"), picture="b.heic")
    assert "b.heic: HEIC is not read here: convert it to JPEG" in plan_text(plan_import(tmp_path))
    with pytest.raises(SpmlError, match="b.heic: HEIC is not read here"): plan_import(tmp_path / "b.json")
    Image.new("P", (W, H)).save(tmp_path / "c.GIF", "GIF")
    labelme(tmp_path / "c.json", shape("cat"), picture="c.GIF")
    assert [p.name for p in plan_import(tmp_path / "c.json").pictures] == ["c"]


def test_pictures_without_objects_are_said(tmp_path):
    for name, body in (("a", ""), ("b", "<object><name>cat</name><bndbox><xmin>11</xmin><ymin>11</ymin><xmax>40</xmax><ymax>40</ymax></bndbox></object>")):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.xml").write_text(f"<annotation><filename>{name}.png</filename>{body}</annotation>")
    picture(tmp_path / "c.png")
    plan = plan_import(tmp_path)
    assert plan.bare() == ["a"] and "without any shape: 1 (a): they get no label" in plan_text(plan)
    assert "1 other picture in these folders, named in no file, left out" in plan_text(plan) and plan_import(tmp_path, images=tmp_path).bare() == ["a", "c"]
    plan = import_annotations(tmp_path, tmp_path / "p", background=True)
    assert "they are all background" in plan_text(plan)
    assert (read_index_png(tmp_path / "p" / "labels" / "a.png") == 0).all()
    inside = read_index_png(tmp_path / "p" / "labels" / "b.png") == UNLABELLED
    assert inside[10:40, 10:40].all() and inside.sum() == 900  # nobody said that a box holds nothing


def test_settings_of_pictures_come_along(tmp_path):
    "The page that was drawn on is the page that is trained on"
    for name, page in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        Image.new("L", (9, 9)).save(tmp_path / name / f"{name}.tif", save_all=True, append_images=[Image.new("L", (W, H))]*2)
        labelme(tmp_path / name / f"{name}.json", shape("cat"), picture=f"{name}.tif")
        (tmp_path / name / PICTURE_SETTINGS).write_text(f"page: {page}")
    import_annotations(tmp_path / "a", tmp_path / "p")
    train, _ = folder_sets(tmp_path / "p")
    assert train.image(0).shape[:2] == SIZE and train.page == 1
    with pytest.raises(SpmlError, match=f"folders whose {PICTURE_SETTINGS} differ"): import_annotations(tmp_path, tmp_path / "q", images=tmp_path)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("names, first, noted", [
    (dict(cat=9, kat=1), (), ["kat"]), (dict(cat=9, kat=4), (), []), (dict(dog=3, dogs=1), (), ["dogs"]), (dict(cat=9, umbrella=1), (), []),
    (dict(kat=5), ("cat",), ["kat"]), (dict(cat=1, kat=5), ("cat",), ["kat"]), (dict(cat=9, kat=1), ("cat", "kat"), []), (dict(cat=1), (), [])])
def test_rare_names_that_resemble_others_are_noted(names, first, noted):
    shapes = [Shape("box", n, [(1, 1), (9, 9)]) for n, k in names.items() for _ in range(k)]
    classes, _, notes = class_order([Drawing("a.png", shapes=shapes)], list(first), "full")
    assert [n.split("'")[1] for n in notes] == noted and {*names} < {*classes.names}
    assert all("if it is misspelt, correct it in the files" in n for n in notes)
    assert class_order([Drawing("a.png", shapes=[Shape("point", s.name, [(1, 1)], part=True) for s in shapes])], list(first), "keypoints")[2] == []

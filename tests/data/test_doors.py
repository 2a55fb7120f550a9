"""Files as they come: one damaged entry, tables and lists in many forms, pictures of many kinds."""
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from spml_kit.core import *
from spml_kit.files import *
from spml_kit.data.images import FolderSet
from spml_kit.data.importers import *
from spml_kit.data.json_tools import *
from spml_kit.data.listing import *
from spml_kit.data.masks import *
from spml_kit.data.other_tools import *
from spml_kit.data.readers import *
from spml_kit.data.shapes import *
from spml_kit.data.weak import WeakSet
from spml_kit.runs import cli

FIXTURES = Path(__file__).parents[1] / "fixtures" / "importers"
SIZE = H, W = 60, 80
SQUARE = [[10, 10], [40, 10], [40, 40], [10, 40]]
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def picture(path, size=SIZE, value=90, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path, **save)
    return path


def shape(label, kind="polygon", points=SQUARE, **more): return dict(label=label, points=points, shape_type=kind) | more


def labelme(path, *shapes, picture="a.png", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(imagePath=picture, imageHeight=H, imageWidth=W, shapes=shapes) | more))
    return path


# ---- one damaged entry

def fitted(export):
    "Drawings that fit their picture"
    for d in export.drawings:
        try: yield fit_drawing(d, SIZE)
        except SpmlError as e: export.skipped.append(Reason(str(e), d.picture))


def signs(export):
    "Shapes and tags as they come, without which object they are of"
    drawn = [*fitted(export)]
    mask = lambda s: None if s.mask is None else np.asarray(s.mask).tobytes()
    return Counter((d.picture, s.kind, s.name, s.xy.tobytes(), tuple(r.tobytes() for r in s.holes), mask(s)) for d in drawn for s in d.shapes) + Counter((d.picture, t) for d in drawn for t in d.tags)


def told(export): return [*export.skipped, *(w for d in export.drawings for w in d.skipped)]


def placed(export): return any(getattr(w, "where", "") or "picture" in w for w in [*told(export), *(w for d in fitted(export) for w in d.skipped)])


def check(read, whole, without, spoilt):
    "The others are read as if this one were not there; what is lost of this one is told, with its place"
    rest, all_of_it, now = signs(read(without)), signs(read(whole)), read(spoilt)
    found = signs(now)
    assert not rest - found, (rest - found, spoilt)
    if found.total() < all_of_it.total():
        assert placed(now), (told(now), spoilt)
        assert not any(w in why for why in told(now) for w in ("Error", "NoneType", "subscriptable", "has no attribute", "object is"))


ENTRIES = {"labelme": [("shapes",)], "coco": [("annotations",), ("images",), ("categories",)], "via": [("a.png300", "regions")], "label_studio": [(0, "annotations", 0, "result")], "supervisely": [("objects",)], "qupath": [("features",)]}
DOCUMENTS = {t: next(p for p in sorted((FIXTURES / t).rglob("*")) if p.suffix in (".json", ".geojson") and p.name != "meta.json") for t in ENTRIES}
WRONG = [None, 3, -1.5, "x", "", [], {}, [None], {"a": 1}, True]


def at(d, way):
    for k in way: d = d[k]
    return d


def ways(d, depth=3):
    "Places within an entry"
    yield ()
    for k, v in (d.items() if isinstance(d, dict) else list(enumerate(d))[:3] if isinstance(d, list) else ()) if depth else ():
        yield from ((k, *w) for w in ways(v, depth - 1))


def spoils(entry):
    "Each place without what it held, and with each wrong thing in its place"
    for way in ways(entry):
        gone = ["remove"] if way and isinstance(at(entry, way[:-1]), dict) else []  # a list may well be shorter
        for wrong in (*gone, *WRONG):
            bad = deepcopy(entry)
            if not way: bad = wrong
            elif isinstance(wrong, str) and wrong == "remove": del at(bad, way[:-1])[way[-1]]
            else: at(bad, way[:-1])[way[-1]] = wrong
            yield bad


@pytest.mark.parametrize("tool", ENTRIES)
def test_one_spoilt_entry_of_json_stops_no_other(tool):
    good, path = json.loads(DOCUMENTS[tool].read_text()), DOCUMENTS[tool]
    read = lambda d: named_reader(tool).read(path, d)
    n = 0
    for place in ENTRIES[tool]:
        for k, one in enumerate(at(good, place)):
            without, spoilt = deepcopy(good), deepcopy(good)
            del at(without, place)[k]
            for bad in spoils(one):
                at(spoilt, place)[k] = bad
                check(read, good, without, spoilt)
                n += 1
    assert n > 100


@pytest.mark.parametrize("tool, name, tag", [("cvat", "annotations.xml", "image/*"), ("voc", "Annotations/a.xml", "object"), ("scribblesup", "a.xml", "polygon")])
def test_one_spoilt_entry_of_xml_stops_no_other(tool, name, tag):
    text = (FIXTURES / tool / name).read_text()
    path = FIXTURES / tool / name
    read, parse = (lambda root: named_reader(tool).read(path, root)), lambda: [root := ET.fromstring(text), [setattr(e, "tag", e.tag.lower()) for e in root.iter()]][0]
    n = len(parse().findall(tag))
    for k in range(n):
        without = parse()
        next(p for p in without.iter() if without.findall(tag)[k] in [*p]).remove(without.findall(tag)[k])
        inner = len([*parse().findall(tag)[k].iter()])
        for j in range(inner):
            keys = [None, "drop", *[*parse().findall(tag)[k].iter()][j].attrib]
            for key in keys:
                for wrong in ("x", "", "nan", "1,2"):
                    spoilt = parse()
                    e = [*spoilt.findall(tag)[k].iter()][j]
                    if key == "drop":
                        if e is spoilt.findall(tag)[k]: continue
                        next(p for p in spoilt.iter() if e in [*p]).remove(e)
                    elif key is None: e.text = wrong
                    else: e.set(key, wrong)
                    check(read, parse(), without, spoilt)


@pytest.mark.parametrize("wrong", ["x .5 .5 .2 .2", "0 .5", "7 .5 .5 .2 .2", "-1 .5 .5 .2 .2", "0.5 .5 .5 .2 .2", "nan .5 .5 .2 .2", "0 a b c d", "\t", "1 nan .5 .2 .2"])
def test_one_spoilt_line_of_yolo_stops_no_other(wrong, tmp_path):
    (tmp_path / "labels").mkdir()
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "data.yaml").write_text("names: {0: cat, 1: dog}")
    (tmp_path / "labels" / "a.txt").write_text(f"0 .5 .5 .2 .2\n{wrong}\n1 .5 .5 .2 .2\n")
    plan = plan_import(tmp_path)
    assert [s.name for s in plan.pictures[0].drawing.shapes] == ["cat", "dog"] and plan.tool == "yolo"
    assert not wrong.strip() or [w.where for w in plan.skipped] == ["line 2 of a.txt"] and "line 2 of a.txt" in plan_text(plan)


def test_one_spoilt_row_stops_no_other(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("index,shape-type,vertex-index,axis-0,axis-1,label\n0,polygon,0,1,1,cat\n0,polygon,1,9,1,cat\n0,polygon,2,9,x,cat\n1,rectangle,0,1,1,dog\n1,rectangle,1,9,9,dog\n1,rectangle,2,1,9,dog\n1,rectangle,3,9,1,dog\n")
    plan = plan_import(tmp_path / "a.csv")
    assert [s.name for s in plan.pictures[0].drawing.shapes] == ["dog"] and [w.where for w in plan.skipped] == ["shape 0 of a.csv"]
    row = lambda s, a: f'a.png,1,{{}},2,0,"{s}","{a}"\n'.replace("'", '""')
    (tmp_path / "a.csv").write_text("filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes\n"
        + row("{'name': 'rect', 'x': 1, 'y': 1, 'width': 9}", "{'name': 'cat'}") + row("{'name'", "{'name': 'cat'}") + row("{'name': 'rect', 'x': 1, 'y': 1, 'width': 9, 'height': 9}", "{'name': 'dog'}"))
    plan = plan_import(tmp_path / "a.csv")
    assert [s.name for s in plan.pictures[0].drawing.shapes] == ["dog"] and plan.skipped.total() == 2 and all(w.where for w in plan.skipped)


def test_one_broken_file_of_a_folder_stops_no_other(tmp_path):
    for n in "ab":
        picture(tmp_path / f"{n}.png")
        labelme(tmp_path / f"{n}.json", shape("cat"), picture=f"{n}.png")
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text()[:60])
    plan = plan_import(tmp_path)
    assert [p.name for p in plan.pictures] == ["b"] and any("a.json: not JSON" in w for w in plan.skipped)
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(SpmlError, match="2 files cannot be read, first .*a.json: not JSON"): plan_import(tmp_path)


@pytest.mark.parametrize("bad, says", [(shape("cat", "circle", [[9, 9]]), "circle of 1 points, 2 are needed"), (dict(label="cat"), "there is no 'points' in it"), (shape(None), "polygon without a class"), (None, "another kind")])
def test_the_reason_names_the_entry(bad, says, tmp_path):
    picture(tmp_path / "a.png")
    labelme(tmp_path / "a.json", shape("dog"), bad)
    text = plan_text(plan_import(tmp_path))
    assert says in text and "(shape 2 of a.json)" in text


def test_tasks_without_a_picture_and_captions(tmp_path):
    picture(tmp_path / "a.png")
    region = dict(type="rectanglelabels", original_width=W, original_height=H, value=dict(x=10, y=10, width=20, height=20, rectanglelabels=["cat"]))
    text = dict(type="textarea", value=dict(text=["a cat.png on a mat"]))
    tasks = [dict(data=dict(text="nothing"), annotations=[]), dict(data=dict(caption="see b.png there", image="/data/upload/1/a.png"), annotations=[dict(result=[text, region])])]
    (tmp_path / "p.json").write_text(json.dumps(tasks))
    plan = plan_import(tmp_path / "p.json")
    assert [p.name for p in plan.pictures] == ["a"] and plan.tool == "label_studio"
    assert {str(w): w.where for w in plan.skipped} == {"task without a picture": "task 1 of p.json", "textarea without a label (Label Studio)": "result 1 of task 2 in p.json"}
    (tmp_path / "p.json").write_text(json.dumps(dict(images=[dict(id=1, file_name="a.png")], categories=[], annotations=[dict(id=1, image_id=1, caption="a cat")])))
    with pytest.raises(SpmlError, match="caption, which marks nothing"): plan_import(tmp_path / "p.json")


def test_equal_reasons_are_counted_and_the_first_is_named():
    reasons = []
    for k in range(3):
        with entry(reasons, f"shape {k}"): raise SpmlError("odd")
    (why, n), = Counter(reasons).items()
    assert told_reason(why, n) == "odd (shape 0 and others)" and told_reason("odd", 2) == "odd"
    with pytest.raises(KeyboardInterrupt):
        with entry(reasons, ""): raise KeyboardInterrupt


# ---- options of VIA

def via_project(value, kind="dropdown", options=None, attribute="species", **more):
    region = dict(shape_attributes=dict(name="rect", x=10, y=10, width=20, height=20), region_attributes={attribute: value} | more)
    return dict(_via_attributes=dict(region={attribute: dict(type=kind, options=options or {"1": "cat", "2": "dog", "3": ""})}, file={}), _via_settings={}, _via_img_metadata={"a.png1": dict(filename="a.png", size=1, regions=[region], file_attributes={})})


@pytest.mark.parametrize("value, kind, name", [("1", "dropdown", "cat"), ("2", "radio", "dog"), ({"2": True}, "checkbox", "dog"), ({"1": False, "2": True}, "checkbox", "dog"), ("3", "dropdown", "3"), ("cat", "text", "cat"), ("1", "image", "1")])
def test_the_class_is_what_the_option_says(value, kind, name):
    export = VIA.read(Path("v.json"), via_project(value, kind))
    assert [s.name for s in export.drawings[0].shapes] == [name] and not told(export)
    assert export.names == (["cat", "dog", "3"] if kind not in ("text", "image") else [])


def test_options_that_do_not_fit_are_told():
    read = lambda *args, **more: VIA.read(Path("v.json"), via_project(*args, **more))
    assert "region whose species is '9', which is none of its options ['1', '2', '3']" in told(read("9")) and not read("9").drawings[0].shapes
    both = read({"1": True, "2": True}, "checkbox")
    assert [s.name for s in both.drawings[0].shapes] == ["cat"] and "several classes in species" in told(both)[0]
    assert "nothing is checked" in told(read({"1": False}, "checkbox"))[0]
    assert [s.name for s in read("1", breed="tabby").drawings[0].shapes] == ["cat"]  # the one with options
    assert told(read(""))[0].startswith("region without a class")
    odd = via_project("1")
    odd["_via_attributes"]["region"]["species"] = None
    assert any("_via_attributes of v.json" in w.where for w in told(VIA.read(Path("v.json"), odd)))


# ---- YOLO

def yolo(root, line="1 .5 .5 .2 .2", **files):
    picture(root / "images" / "a.png")
    (root / "labels").mkdir(exist_ok=True)
    (root / "labels" / "a.txt").write_text(line)
    for name, text in files.items(): (root / name.replace("__", "/").replace("_txt", ".txt").replace("_yaml", ".yaml")).write_text(text)
    return root


@pytest.mark.parametrize("line", ["1 .5 .5 .2 .2", "1\t.5\t.5\t.2\t.2", "1.0 .5 .5 .2 .2", "1.000000 5e-1 .5 .2 .2 .9", "  1   .5 .5 .2  .2  "])
@pytest.mark.parametrize("files", [dict(classes_txt="cat\ndog"), dict(labels__classes_txt="cat\ndog"), dict(data_yaml="names: [cat, dog]"), dict(data_yaml="names: {1: dog, 0: cat}"), dict(classes_txt="0: cat\n1: dog"), dict(classes_txt="cat # a pet\ndog")])
def test_forms_of_yolo(line, files, tmp_path):
    plan = plan_import(yolo(tmp_path, line, **files))
    assert plan.tool == "yolo" and [s.name for s in plan.pictures[0].drawing.shapes] == ["dog"] and plan.classes.names == ("background", "cat", "dog")
    assert not plan.skipped


def test_numbers_without_a_name_are_not_invented(tmp_path):
    plan = plan_import(yolo(tmp_path, "7 .5 .5 .2 .2\n0 .5 .5 .2 .2", classes_txt="cat\ndog"))
    assert plan.classes.names == ("background", "cat", "dog") and [*plan.skipped] == ["line of class 7, which classes.txt does not name (2 names, from 0 on)"]
    plan = plan_import(yolo(tmp_path, "5 .5 .5 .2 .2\n1 .5 .5 .2 .2\n0 .5 .5 .2 .2", data_yaml="names: {0: cat, 5: dog}"))  # gaps
    assert [s.name for s in plan.pictures[0].drawing.shapes] == ["dog", "cat"] and "line of class 1, which data.yaml does not name (2 names, from 0 on)" in plan.skipped
    (tmp_path / "data.yaml").unlink()
    yolo(tmp_path, labels__classes_txt="dog\ncat")
    with pytest.raises(SpmlError, match="names other classes than"): plan_import(tmp_path)
    (tmp_path / "classes.txt").unlink(), (tmp_path / "labels" / "classes.txt").unlink()
    with pytest.raises(SpmlError, match="write classes.txt"): plan_import(tmp_path, tool="yolo")


# ---- tables of classes

NAME = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=6)
NAMES = st.lists(st.lists(NAME, min_size=1, max_size=3).map(" ".join), min_size=1, max_size=6, unique=True)


@given(NAMES)
@quick
def test_a_table_is_read_as_it_was_written(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("t") / "classes.txt"
    path.write_text("\n".join(map(table_line, names)), encoding="utf-8")
    assert read_table_names(path) == names


@pytest.mark.parametrize("text, names", [
    ("0 background\n1 cat", "background cat"), ("0: background\n1: cat", "background cat"), ("1,cat\n0,background", "background cat"), ("background,0\ncat,1", "background cat"), ("background 0\ncat 1", "background cat"),
    ("id,name\n0,background\n1,cat", "background cat"), ("name;id\ncat;1\nbackground;0", "background cat"), ("label,class\n0,background\n1,cat", None), ("background  # nothing\ncat # pet", "background cat"), ("background\n1 cat\n2 dog", "background cat dog"),
    ("0. background\n1) cat", "background cat"), ("name,r,g,b\nbackground,0,0,0\ncat,1,2,3", "background cat"), ("'background'\n\"cat\"", "background cat"), ("__ignore__\n_background_\ncat #1", None), ("0 - background\n1 - cat", "background cat")])
def test_forms_of_tables(text, names, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    found = read_table_names(tmp_path / "classes.txt")
    if names: assert found == names.split()
    elif text[0] == "_": assert found == ["_background_", "cat #1"]
    else: assert found == ["0", "1"] or found == ["background", "cat"]


@pytest.mark.parametrize("text", ["1 background\n2 cat", "background\ncat\n2 wheeler", "background\n2 wheeler\ncar", "cat,255,0,0\ndog,0,255,0", "background, cat, dog", "cat #pet", "0 background\n2 cat", "id,name\n0,background\n1,cat,x", "id,name\n1,background\n2,cat", "background\t0\ncat\t7"])
def test_tables_that_could_mean_two_things_are_refused(text, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(SpmlError, match="classes.txt: line .*Quotes keep a name"): read_table_names(tmp_path / "classes.txt")


# ---- lists

@pytest.mark.parametrize("line, name", [('"my cat.jpg"', "my cat"), ("'my cat.jpg' 1", "my cat"), ("my cat.jpg", "my cat"), ("my cat", "my cat"), ("my cat.jpg my cat.png", "my cat"), ("sub/my dog.png, x.png", "sub/my dog"), ("a a.jpg", "a"), ("a JPEGImages/a.jpg", "a"), ("a 1", "a"), ("./my cat.jpg", "my cat"), ("/data/JPEGImages/my cat.jpg /data/SegmentationClass/my cat.png", "my cat")])
def test_names_with_blanks_in_lists(line, name, tmp_path):
    for n in ("my cat.jpg", "a.jpg", "sub/my dog.png"): picture(tmp_path / n)
    (tmp_path / "l.txt").write_text(line + "\n")
    assert read_names(tmp_path / "l.txt", tmp_path) == [name]


def test_lists_of_main_with_blanks(tmp_path):
    for n in ("my cat.jpg", "a.jpg"): picture(tmp_path / n)
    (tmp_path / "l.txt").write_text('my cat 1\na -1\n"b c" 0\n')
    assert read_names(tmp_path / "l.txt", tmp_path) == ["my cat", "b c"]
    (tmp_path / "l.txt").write_text('"my cat\n')
    with pytest.raises(SpmlError, match="l.txt: line .*a quote that does not end"): read_names(tmp_path / "l.txt")


# ---- which picture

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
    with pytest.raises(SpmlError, match="write the folder before it in .*c.json, one/a.png, or import each annotation file by itself.*--images .*one"): plan_import(path)
    assert plan_import(path, images=tmp_path / "one").pictures[0].path == tmp_path / "one" / "a.png"
    assert plan_import(labelme(tmp_path / "c.json", shape("cat"), picture="one/a.png")).pictures[0].path == tmp_path / "one" / "a.png"


@pytest.mark.parametrize("said, there, taken", [("frame.jpg", "other/frame.png", True), ("other/frame.jpg", "other/frame.png", True), ("mine/frame.jpg", "other/frame.png", False), ("mine/frame.png", "other/frame.png", True)])
def test_another_ending_is_said_and_another_folder_refused(said, there, taken, tmp_path):
    picture(tmp_path / there)
    path = labelme(tmp_path / "x.json", shape("cat"), picture=said)
    if not taken:
        with pytest.raises(SpmlError, match="frame.png has another folder and another ending"): plan_import(path)
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
    assert plan.bare() == ["a"] and "without any shape: 1 (a): no label is written" in plan_text(plan)
    assert "1 pictures that lie beside these are named by no file" in plan_text(plan) and plan_import(tmp_path, images=tmp_path).bare() == ["a", "c"]
    plan = import_annotations(tmp_path, tmp_path / "p", background=True)
    assert "all of it is background" in plan_text(plan)
    assert (read_index_png(tmp_path / "p" / "labels" / "a.png") == 0).all()
    inside = read_index_png(tmp_path / "p" / "labels" / "b.png") == UNLABELLED
    assert inside[10:40, 10:40].all() and inside.sum() == 900  # nobody said that a box holds nothing


# ---- panoptic

def panoptic(root, folder="panoptic", **segment):
    picture(root / "images" / "a.jpg")
    ids = np.zeros(SIZE, np.int64)
    ids[10:40, 10:40], ids[20:55, 50:70], ids[:5, :5] = 70000, 300, 5
    (root / folder).mkdir(exist_ok=True)
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8)).save(root / folder / "a.png")
    info = [dict(id=70000, category_id=3), dict(id=300, category_id=18) | segment, dict(id=5, category_id=3, iscrowd=1)]
    (root / "panoptic.json").write_text(json.dumps(dict(images=[dict(id=1, file_name="a.jpg", height=H, width=W)], annotations=[dict(image_id=1, file_name="a.png", segments_info=info)], categories=[dict(id=3, name="cat", isthing=1), dict(id=18, name="dog", isthing=0)])))
    return root / "panoptic.json"


@pytest.mark.parametrize("folder", ["panoptic", "."])
def test_panoptic_segments(folder, tmp_path):
    plan = plan_import(panoptic(tmp_path, folder))
    labels = kit_labels(plan.annotations(plan.pictures[0]), SIZE)
    assert plan.classes.names == ("background", "cat", "dog") and not plan.skipped
    assert (labels[10:40, 10:40] == 1).all() and (labels[20:55, 50:70] == 2).all() and (labels[:5, :5] == VOID).all() and (labels == UNLABELLED).sum() == 4800 - 900 - 700 - 25


def test_spoilt_segments(tmp_path):
    for wrong in (dict(id=301), dict(category_id=4), dict(category_id=None), dict(id="x")):
        plan = plan_import(panoptic(tmp_path, **wrong))
        assert [w.where for w in plan.skipped] == ["segment 2 of annotation 1 of panoptic.json"] and len(plan.pictures[0].drawing.shapes) == 2
    (tmp_path / "panoptic" / "a.png").unlink()
    with pytest.raises(SpmlError, match="panoptic annotation whose a.png is not in panoptic/ beside the file"): plan_import(tmp_path / "panoptic.json")


# ---- a file is read once

@pytest.mark.parametrize("name, text", [("a.json", json.dumps(dict(spml_kit=1, kind="tags", classes=[1]))), ("a.xml", (FIXTURES / "voc" / "Annotations" / "a.xml").read_text().replace("polygon", "ring")), ("a.xml", (FIXTURES / "scribblesup" / "a.xml").read_text()), ("a.xml", (FIXTURES / "cvat" / "annotations.xml").read_text()), ("a.json", (FIXTURES / "labelme" / "a.json").read_text())])
def test_training_reads_a_file_once(name, text, tmp_path, monkeypatch):
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / name).write_text(text)
    weak = WeakSet(FolderSet(tmp_path / "images", classes=("background", "cat", "dog")), tmp_path / "labels")
    read, count = Path.read_bytes, Counter()
    monkeypatch.setattr(Path, "read_bytes", lambda self: (count.update([self.name]), read(self))[1])
    assert weak.tags(0)[1]
    assert count[name] == 1


# ---- colours, ids, and what is transparent

@pytest.mark.parametrize("place, seen", [("", False), ("p", True), ("p/labels", True), ("p/labels/sub", True)])
def test_colours_of_a_labelmap_are_those_of_its_project(place, seen, tmp_path):
    (tmp_path / "p" / "images").mkdir(parents=True), (tmp_path / "p" / "labels" / "sub").mkdir(parents=True)
    (tmp_path / place / "labelmap.txt").write_text("background:0,0,0\ncat:1,1,1\n")
    path = tmp_path / "p" / "labels" / "sub" / "a.png"
    assert (labelmap_near(path.parent) is not None) == seen
    two, ids = Classes(("background", "cat")), np.eye(4, dtype=np.uint8)
    Image.fromarray(ids).save(path)
    assert (read_mask(path, two) == ids).all()
    (tmp_path / place / "labelmap.txt").write_text("horse:7,7,7\n")  # asked by colours only
    assert (read_mask(path, two) == ids).all()
    Image.fromarray(two.palette[ids]).save(path)
    if seen:
        with pytest.raises(SpmlError, match="'horse' is not one of the classes"): read_mask(path, two)
    else: assert (read_mask(path, two) == ids).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_of_a_true_mask_are_named(mode, tmp_path):
    two, ids = Classes(("background", "cat")), np.repeat(np.eye(4, dtype=np.uint8), 2, 1)
    alpha = np.full(ids.shape, 255, np.uint8)
    alpha[0, 0] = 0
    (tmp_path / "masks").mkdir()
    picture(tmp_path / "images" / "a.png", (4, 8))
    Image.fromarray(np.dstack([two.palette[ids], alpha]) if mode == "RGBA" else np.dstack([ids, alpha])).save(tmp_path / "masks" / "a.png")
    truth = FolderSet(tmp_path / "images", tmp_path / "masks", two)
    with pytest.raises(SpmlError, match="a.png: 3.1% of the pixels are transparent, and a true mask tells the class of each"): truth.mask(0)
    assert read_mask(tmp_path / "masks" / "a.png", two)[0, 0] == UNLABELLED  # of a weak label


# ---- before anything slow begins

def project(root, labels, name="a.png", classes="background\ncat\n"):
    picture(root / "images" / "a.jpg")
    (root / "labels").mkdir(exist_ok=True)
    (root / "classes.txt").write_text(classes)
    if isinstance(labels, str): (root / "labels" / name).write_text(labels)
    else: write_index_png(root / "labels" / name, labels)
    return root


GOOD = np.zeros(SIZE, np.uint8)
KIT = json.dumps(dict(spml_kit=1, kind="boxes", boxes=[[1, 1, 9, 9]], classes=[1]))


@pytest.mark.parametrize("labels, name, says", [(GOOD + 7, "a.png", "a.png: value 7 is not a label"), (GOOD, "b.png", "none of these files is named as an image"), (GOOD[:9], "a.png", "a.png: .*label map is"), (KIT.replace("[1]}", "[5]}"), "a.json", "a.json: value 5 is not a label"),
    ((FIXTURES / "voc" / "Annotations" / "a.xml").read_text(), "a.xml", "a.xml: class 'dog' is not one of"), ((FIXTURES / "labelme" / "a.json").read_text(), "a.json", "a.json: class 'dog' is not one of")])
def test_labels_are_looked_at_before_a_kernel_starts(labels, name, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "run_notebook", lambda *a, **k: pytest.fail("it has started"))
    root = project(tmp_path / "p", labels, name)
    assert cli.spml_run(["scribbles", "--data", "folder", "--root", str(root)]) == 2
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize("labels, name", [(GOOD, "a.png"), (GOOD + UNLABELLED, "a.png"), (GOOD + VOID, "a.png"), (KIT, "a.json"), (json.dumps(dict(spml_kit=1, kind="keypoints", xy=[[1, 1]], parts=[1], instances=[0])), "a.json")])
def test_good_labels_pass_the_early_look(labels, name, tmp_path): check_drawn(project(tmp_path / "p", labels, name))


def test_a_look_takes_no_longer_than_it_may(tmp_path):
    root = project(tmp_path / "p", GOOD)
    picture(root / "images" / "b.jpg")
    write_index_png(root / "labels" / "b.png", GOOD + 9)
    check_drawn(root, seconds=0)
    with pytest.raises(SpmlError, match="b.png: value 9"): check_drawn(root)


def test_lists_of_voc_are_looked_at_before_a_kernel_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "run_notebook", lambda *a, **k: pytest.fail("it has started"))
    (tmp_path / "JPEGImages").mkdir()
    assert cli.spml_run(["scribbles", "--data", "voc", "--root", str(tmp_path)]) == 2
    assert "ImageSets/Segmentation/train.txt: no such list" in capsys.readouterr().err


def test_regions_of_a_project_are_those_of_its_images(tmp_path, capsys):
    root = project(tmp_path / "p", GOOD)
    assert cli.spml_prepare(["--data", "folder", "--root", str(root), "--out", str(tmp_path / "r"), "--workers", "0", "--n", "4"]) == 0
    assert [p.name for p in sorted((tmp_path / "r").glob("*.png"))] == ["a.png"] and "1 images have their regions" in capsys.readouterr().out
    assert cli.spml_prepare(["--data", "folder", "--root", str(root / "images"), "--out", str(tmp_path / "s"), "--workers", "0", "--n", "4"]) == 0

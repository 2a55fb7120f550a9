"""Annotations in files: the kit's JSON, label PNGs, XML as programs write it."""
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from spml_kit.core import *
from spml_kit.files import *
from spml_kit.data.annotations import *
from spml_kit.data.formats import *

CLASSES = Classes(("background", "cat", "dog"))
SIZE = "<size><width>60</width><height>40</height></size>"


SCRIBBLE = """<annotation>{size}<polygon><tag>cat</tag><point><X>9</X><Y>13</Y></point><point><X>20</X><Y>17.5</Y></point></polygon>
<polygon><tag>background</tag><point><X>4</X><Y>34</Y></point></polygon></annotation>"""


BOX = "<annotation>{size}<object><name>dog</name><bndbox><xmin>1</xmin><ymin>3</ymin><xmax>60</xmax><ymax>40</ymax></bndbox></object></annotation>"


@pytest.mark.parametrize("case", [str.lower, str.upper, str])
def test_scribblesup_in_any_case(tmp_path, case):
    text = SCRIBBLE.format(size=SIZE)
    for tag in ("annotation", "polygon", "point", "tag", "size", "width", "height", "X", "Y"):
        text = text.replace(f"<{tag}>", f"<{case(tag)}>").replace(f"</{tag}>", f"</{case(tag)}>")
    (tmp_path/"s.xml").write_text(text)
    assert read_annotation(tmp_path/"s.xml", CLASSES) == Scribbles([[(9, 13), (20, 17.5)], [(4, 34)]], [1, 0], 3)


def test_voc_boxes_become_half_open(tmp_path):
    (tmp_path/"b.xml").write_text(BOX.format(size=SIZE))
    assert read_annotation(tmp_path/"b.xml", CLASSES) == Boxes([(0, 2, 60, 40)], [2])


@pytest.mark.parametrize("old,new,message", [
    ("<tag>cat", "<tag>lion", "class 'lion' is not one of"),
    ("</annotation>", "", "not XML"),
    ("<X>9<", "<X>61<", r"point \(61, 13\) lies outside the image of 60x40"),
    ("<X>9<", "<X>-3<", "lies outside"),
    ("<X>9<", "<X>nan<", "not a number|lies outside"),
    ("<X>9<", "<X>nine<", "'nine', not a number"),
    ("<X>9</X>", "", "not a number"),
    ("<point><X>4</X><Y>34</Y></point>", "", "without <point>"),
    (SIZE, "", "size/height"),
])
def test_broken_scribble_xml(tmp_path, old, new, message):
    text = SCRIBBLE.format(size=SIZE)
    assert old in text
    (tmp_path/"s.xml").write_text(text.replace(old, new))
    with pytest.raises(SpmlError, match=message) as e:
        read_scribblesup_xml(tmp_path/"s.xml", CLASSES)
    assert str(tmp_path/"s.xml") in str(e.value)


@pytest.mark.parametrize("old,new,message", [
    ("<name>dog", "<name>lion", "class 'lion'"),
    ("<xmax>60", "<xmax>0", "is empty"),
    ("<xmax>60", "<xmax>99", "lies outside"),
    ("<xmax>60</xmax>", "", "not a number"),
    ("<bndbox>", "<robndbox>", "not XML|without <bndbox>"),
])
def test_broken_box_xml(tmp_path, old, new, message):
    (tmp_path/"b.xml").write_text(BOX.format(size=SIZE).replace(old, new))
    with pytest.raises(SpmlError, match=message) as e:
        read_voc_boxes(tmp_path/"b.xml", CLASSES)
    assert str(tmp_path/"b.xml") in str(e.value)


@pytest.mark.parametrize("text,message", [
    ("", "not JSON"), ("[]", "not an annotation"), ("{}", "not an annotation"), ('{"spml_kit": 2, "kind": "tags", "classes": [1]}', "update the kit"),
    ('{"spml_kit": 1, "kind": "lasso"}', "kind 'lasso'"), ('{"spml_kit": 1, "kind": "tags", "classes": []}', "annotation is empty"),
    ('{"spml_kit": 1, "kind": "points", "xy": [[1, 2]], "classes": [1, 2]}', "1 mark but 2 classes"),
    ('{"spml_kit": 1, "kind": "points", "xy": [[1, 2]]}', "damaged points"), ('{"spml_kit": 1, "kind": "points", "xy": "abc", "classes": [1]}', "damaged points"),
    ('{"spml_kit": 1, "kind": "tags", "classes": [254]}', "class ids are 0..253"), ('{"spml_kit": 1, "kind": "scribbles", "strokes": [[]], "classes": [1]}', "no points"),
    ('{"spml_kit": 1, "kind": "tags", "classes": [1], "extra": 3}', "damaged tags"), ('{"spml_kit": 1, "kind": ["tags"], "classes": [1]}', "kind"),
])
def test_broken_json(tmp_path, text, message):
    (tmp_path/"a.json").write_text(text)
    with pytest.raises(SpmlError, match=message) as e:
        read_annotation(tmp_path/"a.json")
    assert str(tmp_path/"a.json") in str(e.value)


@pytest.mark.parametrize("name", ["a.json", "a.xml", "a.png"])
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(SpmlError, match=name):
        read_label_png(tmp_path/name, 3) if name.endswith("png") else read_annotation(tmp_path/name, CLASSES)


def test_an_empty_annotation_is_not_written(tmp_path):
    with pytest.raises(SpmlError, match="annotation is empty"):
        write_annotation(tmp_path/"a.json", Points([], []))
    assert not list(tmp_path.iterdir())


def test_label_png(tmp_path):
    weak = np.full((20, 30), UNLABELLED, np.uint8)
    weak[3:6, 4:20] = 2
    public = np.where(weak == UNLABELLED, VOID, weak)
    for name, labels in dict(ours=weak, public=public, none=np.full_like(weak, VOID), wrong=weak + (weak == 2)*5).items():
        write_index_png(tmp_path/f"{name}.png", labels, CLASSES.palette)
    assert (read_label_png(tmp_path/"ours.png", 3) == weak).all() and (read_label_png(tmp_path/"public.png", 3, remap255=True) == weak).all()
    for name, kw, message in (("public", {}, "remap255=True"), ("none", {}, "no pixel is labelled"), ("wrong", {}, "value 7 is not a label"), ("ours", dict(size=(20, 31)), "20x30")):
        with pytest.raises(SpmlError, match=message) as e:
            read_label_png(tmp_path/f"{name}.png", 3, **kw)
        assert f"{name}.png" in str(e.value)


@pytest.mark.parametrize("ids", [[1.5], ["1"], [float("nan")], [1e30], [None], [[1, 2]], [-1], [254]])
def test_class_ids_are_whole_numbers(tmp_path, ids):
    (tmp_path / "a.json").write_text(json.dumps({"spml_kit": 1, "kind": "tags", "classes": ids}))
    if ids == [[1, 2]]: return # two tags
    with pytest.raises(SpmlError, match="a.json"): read_annotation(tmp_path / "a.json")


@pytest.mark.parametrize("text, says", [("<a", "not XML"), ("", "not XML"), ('<?xml version="1.0" encoding="nonsense"?><a/>', "not XML"), ("<annotation><size><width>nan</width><height>9</height></size><polygon/></annotation>", "not a number"),
    ("<annotation><size><width>80</width><height>60</height></size><object><name>cat</name><bndbox><xmin>-5</xmin><ymin>10</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object></annotation>", "lies outside")])
def test_what_is_wrong_with_xml_is_said(tmp_path, text, says):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(SpmlError, match=f"a.xml: .*{says}"): read_annotation(tmp_path / "a.xml", VOC_CLASSES)


# PASCAL VOC's XML as it occurs

def voc_xml(*objects, size=(40, 60)):
    "Objects are (name, inside, flags); size (H,W) or text"
    said = size if isinstance(size, str) else f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    flags = lambda more: "".join(f"<{k}>1</{k}>" for k in more)
    return f"<annotation><filename>a.jpg</filename>{said}" + "".join(f"<object><name>{n}</name>{flags(more)}{inside}</object>" for n, inside, more in objects) + "</annotation>"


def bndbox(*b): return "<bndbox>" + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), b)) + "</bndbox>"


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30), st.integers(2, 10), st.integers(2, 10), st.floats(0, .4)), min_size=1, max_size=5),
       st.sampled_from([0, 1]), st.sampled_from([(40, 60), "<size><width>0</width><height>0</height></size>", "", "<size><width>60</width></size>"]))
def test_boxes_of_any_counting(tmp_path_factory, rows, first, size):
    "Boxes x, y, w, h with fractions, counted from 0 or 1: never more than a pixel off, and inside the picture"
    path = tmp_path_factory.mktemp("xml")/"b.xml"
    true = np.array([[x, y, x + w, y + h] for x, y, w, h, _ in rows], float)
    off = np.array([[f, -f, f, f] for *_, f in rows])
    written = true + (np.array([1, 1, 0, 0]) if first else 0) + off
    path.write_text(voc_xml(*(("cat", bndbox(*b), ()) for b in written), size=size))
    said = read_annotation(path, CLASSES, (40, 60))
    assert np.abs(said.boxes - true).max() <= 1.5 and (said.boxes >= 0).all() and (said.boxes <= [60, 40, 60, 40]).all()
    assert said.to_labels((40, 60)).shape == (40, 60)
    if first and not (written[:, :2] < 1).any(): assert np.allclose(said.boxes, (true + off).clip(0, [60, 40, 60, 40]))


@pytest.mark.parametrize("inside", ["<polygon><x1>10</x1><y1>12</y1><x2>40</x2><y2>12</y2><x3>40</x3><y3>30.5</y3></polygon>",
    "<polygon><pt><x>10</x><y>12</y></pt><pt><x>40</x><y>30.5</y></pt></polygon>",
    "<polygon><x1>1</x1><y1>1</y1></polygon>" + bndbox(10, 12, 40, 30.5)])
def test_polygons_in_objects(tmp_path, inside):
    (tmp_path/"a.xml").write_text(voc_xml(("dog", inside, ())))
    assert read_annotation(tmp_path/"a.xml", CLASSES, (40, 60)) == Boxes([(9, 11, 40, 30.5)], [2])


def test_no_object_says_background(tmp_path):
    (tmp_path/"a.xml").write_text(voc_xml())
    said = read_annotation(tmp_path/"a.xml", CLASSES, (40, 60))
    assert len(said) == 0 and (said.to_labels((40, 60)) == 0).all()


@pytest.mark.parametrize("skip, left", [((), [1, 2, 1, 2]), (("difficult",), [1, 1, 2]), (("truncated",), [1, 2, 2]), (("difficult", "truncated"), [1, 2]), (("occluded",), [1, 2, 1, 2])])
def test_flags_are_an_option(tmp_path, skip, left):
    (tmp_path/"a.xml").write_text(voc_xml(("cat", bndbox(1, 1, 9, 9), ()), ("dog", bndbox(1, 1, 9, 9), ("difficult",)), ("cat", bndbox(1, 1, 9, 9), ("truncated",)), ("dog", bndbox(1, 1, 9, 9), ())))
    assert read_voc_boxes(tmp_path/"a.xml", CLASSES, skip=skip).classes.tolist() == left


@pytest.mark.parametrize("text, says", [
    (voc_xml(("cat", bndbox(1, 1, 63, 9), ())), r"point \(63, 9\) lies outside the image of 60x40"),
    (voc_xml(("cat", bndbox(1, 1, 60, 9), ()), size=(80, 120)), "drawn on a picture of 120x80 .*this one has 60x40"),
    (voc_xml(("cat", "<robndbox><cx>3</cx></robndbox>", ())), "without <bndbox>"),
    (voc_xml(("cat", "<polygon></polygon>", ())), "<polygon> without points"),
    (voc_xml(("cat", bndbox(9, 9, 3, 3), ())), "is empty"),
    (voc_xml(("cat", bndbox("a", 1, 9, 9), ())), "'a', not a number"),
    (voc_xml(("lion", bndbox(1, 1, 9, 9), ())), "class 'lion'")])
def test_what_cannot_be_mended_is_refused(tmp_path, text, says):
    (tmp_path/"a.xml").write_text(text)
    with pytest.raises(SpmlError, match=f"a.xml: .*{says}"): read_annotation(tmp_path/"a.xml", CLASSES, (40, 60))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_drawings_are_boxes_strokes_dots(tmp_path_factory, seed):
    "Against the plain definition: each kind painted over those before it"
    rng, folder, size = np.random.default_rng(seed), tmp_path_factory.mktemp("drawing"), (40, 60)
    every = {"tags": Tags([1]), "boxes": Boxes([(5, 6, 40, 30)], [1]), "scribbles": Scribbles([rng.uniform(0, 40, (3, 2))], [2]), "points": Points(rng.uniform(0, 40, (2, 2)), [0, 1])}
    kept = {k: a for k, a in every.items() if rng.random() < .6}
    for k, a in kept.items(): write_annotation(folder/k/"sub"/"a.json", a)
    assert drawing_of(folder, "sub/a") == kept and drawing_of(folder, "a") == {}
    plain = np.full(size, UNLABELLED, np.uint8)
    for k, a in kept.items():
        more = a.to_labels(size)
        plain[more != UNLABELLED] = more[more != UNLABELLED]
    assert (drawn_labels(kept, size) == plain).all()


@pytest.mark.parametrize("ann", [Tags([1, 2]), Boxes([(1, 2, 30, 20)], [1]), Points([(3, 4), (5, 6.5)], [0, 2]), Points([(3, 4)], [0], width=9),
    Scribbles([[(1, 1), (2, 9)], [(4, 4)]], [2, 0]), Keypoints([(3, 4), (8, 9)], [1, 14], [1, 2])], ids=lambda a: type(a).__name__)
def test_files_round_trip(ann, tmp_path):
    write_annotation(tmp_path/"a.json", ann)
    again = read_annotation(tmp_path/"a.json")
    assert again == ann and again.to_json() == read_json(tmp_path/"a.json")
    assert (again.to_labels((40, 60)) == ann.to_labels((40, 60))).all()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("width", [0, -1, 1e9, float("nan"), float("inf"), 501])
@pytest.mark.parametrize("kind", ["points", "scribbles"])
def test_marks_have_a_width_that_can_be_drawn(tmp_path, kind, width):
    said = {"spml_kit": 1, "kind": kind, "classes": [1], "width": width} | ({"xy": [[3, 4]]} if kind == "points" else {"strokes": [[[3, 4]]]})
    (tmp_path / "a.json").write_text(json.dumps(said))
    with pytest.raises(SpmlError, match="a.json: .*500 pixels"): read_annotation(tmp_path / "a.json")

"""Tools that write XML, CSV, text or tables: YOLO, CVAT, VOC, VIA, napari and Hugging Face as they come."""
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spml_kit.core import UNLABELLED, SpmlError
from spml_kit.data.importers import import_annotations, plan_import, plan_text
from spml_kit.data.other_tools import read_csv
from spml_kit.files import read_index_png
from spml_kit.pictures import read_image
from test_importers import CLASSES, SIZE, TRUTH, H, W, labels_of, picture, quick


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


def test_hugging_face_columns(tmp_path, monkeypatch):
    "With a stand-in for the library, which need not be there"
    class Rows(list):
        features = dict(image=type("Image", (), {})(), label=type("Image", (), {})(), caption=type("Value", (), {})())
    ids = np.where(TRUTH == UNLABELLED, 0, TRUTH)
    rows = Rows([dict(image=Image.fromarray(np.full((*SIZE, 3), 7, np.uint8)), label=Image.fromarray(ids))])
    for name in ("dataset_info.json", "state.json"): (tmp_path / name).write_text("{}")
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "datasets", None)
        with pytest.raises(SpmlError, match="pip install datasets"): plan_import(tmp_path)
    (tmp_path / "id2label.json").write_text('{"1": "cat", "2": "dog"}')
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_from_disk=lambda path: rows))
    plan = import_annotations(tmp_path, tmp_path.parent / f"{tmp_path.name}_out")
    out = tmp_path.parent / f"{tmp_path.name}_out"
    assert plan.tool == "hugging_face" and plan.classes == CLASSES
    assert (read_index_png(out / "labels" / "image_000000.png") == ids).all() and read_image(out / "images" / "image_000000.png")[0, 0, 0] == 7


def test_poses_of_yolo_are_refused(tmp_path):
    (tmp_path / "labels").mkdir()
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "a.txt").write_text("0 .5 .5 .2 .2 .4 .4 .5 .5 .6 .6\n")
    (tmp_path / "data.yaml").write_text("names: [person]\nkpt_shape: [3, 2]\n")
    with pytest.raises(SpmlError, match="kpt_shape"): plan_import(tmp_path)


def test_tracks_of_cvat(tmp_path):
    for k in range(6): picture(tmp_path / "images" / f"frame_{k:06}.PNG")
    box = lambda f, x, outside=0: f'<box frame="{f}" outside="{outside}" keyframe="1" xtl="{x}" ytl="{x}" xbr="{x + 10}" ybr="{x + 10}"/>'
    ring = lambda f, x: f'<polygon frame="{f}" outside="0" keyframe="1" points="{x},1;{x + 9},1;{x + 9},9"/>'
    (tmp_path / "t.xml").write_text(f'<annotations><meta><task><original_size><width>{W}</width><height>{H}</height></original_size></task></meta><track id="0" label="cat">{box(0, 0)}{box(2, 8)}{box(4, 10, 1)}</track>'
        f'<track id="1" label="dog">{ring(1, 30)}{ring(3, 40)}</track></annotations>')
    plan = plan_import(tmp_path, meaning="boxes")
    found = {p.name: {plan.classes.names[c]: b.tolist() for c, b in zip(a.classes, a.boxes)} for p in plan.pictures if (a := plan.annotations(p).get("boxes"))}
    assert {k: v.get("cat") for k, v in found.items() if "cat" in v} == {"frame_000000": [0, 0, 10, 10], "frame_000001": [4, 4, 14, 14], "frame_000002": [8, 8, 18, 18], "frame_000003": [9, 9, 19, 19]}
    assert {k: v.get("dog") for k, v in found.items() if "dog" in v} == {"frame_000001": [30, 1, 39, 9], "frame_000002": [35, 1, 44, 9], "frame_000003": [40, 1, 49, 9]}


BOX = "<object><name>cat</name>{}<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


@pytest.mark.parametrize("body, said", [(BOX.format("", 40.4, 20.56, 80, 49.7), [39.4, 19.56, 80, 49.7]), (BOX.format("", 41, 21, 80.3, 50), [40, 20, 80, 50]), ("<size><width>0</width><height>0</height></size>" + BOX.format("", 11, 11, 40, 40), [10, 10, 40, 40]),
    (BOX.format("<polygon><x1>10</x1><y1>10</y1><x2>40</x2><y2>10</y2><x3>40</x3><y3>40</y3></polygon>", 10, 10, 40, 40), "full")])
def test_xml_of_tools_that_follow_voc_loosely(body, said, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.xml").write_text(f"<annotation><filename>other.jpg</filename>{body}</annotation>")
    plan = plan_import(tmp_path)
    found = plan.annotations(plan.pictures[0])
    assert "full" in found if said == "full" else np.allclose(found["boxes"].boxes, [said])


def test_a_picture_of_which_voc_says_nothing(tmp_path):
    for name, body in (("a", ""), ("b", BOX.format("", 11, 11, 40, 40))):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.xml").write_text(f"<annotation><filename>{name}.png</filename>{body}</annotation>")
    assert plan_import(tmp_path).bare() == ["a"]


def test_boxes_of_voc_that_count_from_0(tmp_path):
    picture(tmp_path / "a.png")
    text = "<annotation><object><name>cat</name><bndbox><xmin>{}</xmin><ymin>10</ymin><xmax>40</xmax><ymax>40</ymax></bndbox></object></annotation>"
    for xmin, box in ((0, [0, 10, 40, 40]), (1, [0, 9, 40, 40])):
        (tmp_path / "a.xml").write_text(text.format(xmin))
        plan = plan_import(tmp_path)
        assert plan.annotations(plan.pictures[0])["boxes"].boxes.tolist() == [box]


@given(st.lists(st.lists(st.sampled_from(["0", "1", "7", "-1", ".5", "x", "nan", "1e400"]), max_size=9).map(" ".join), min_size=1, max_size=3))
@quick
def test_changed_yolo_is_read_or_refused_by_name(lines):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        picture(root / "images" / "a.png")
        (root / "labels").mkdir()
        (root / "classes.txt").write_text("cat\ndog\n")
        (root / "labels" / "a.txt").write_text("\n".join(lines))
        try: labels_of(plan_import(root, tool="yolo"))
        except SpmlError as e: assert "a.txt" in str(e) or str(root) in str(e) and "no shape" in str(e)


@pytest.mark.parametrize("text, says", [("a,b\n1,2\n3\n", "row 2 has more or fewer entries"), ("a,b\n1,2,3\n", "row 1 has more or fewer entries"), ('a,b\n"1,2\n', "not CSV")])
def test_tables_that_were_cut_short_are_refused(text, says, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(SpmlError, match=f"a.csv: {says}"): read_csv(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text('a,b\n"1,\n2",3\n', encoding="utf-16")
    assert read_csv(tmp_path / "a.csv") == [{"a": "1,\n2", "b": "3"}]


def test_endings_of_yolo_in_capitals(tmp_path):
    yolo(tmp_path, classes_txt="cat\ndog")
    label = next((tmp_path / "labels").glob("*.txt"))
    label.rename(label.with_suffix(".TXT"))
    assert [s.name for s in plan_import(tmp_path).pictures[0].drawing.shapes] == ["dog"]


def test_files_that_macos_leaves_hide_no_tool(tmp_path):
    root = tmp_path / "y"
    yolo(root, classes_txt="cat\ndog")
    for folder in (root / "labels", root / "__MACOSX" / "labels"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "._a.txt").write_bytes(b"\0\5\x16\7")
    plan = plan_import(root)
    assert plan.tool == "yolo" and [s.name for s in plan.pictures[0].drawing.shapes] == ["dog"] and not plan.skipped
    picture(tmp_path / "n" / "a.png")
    (tmp_path / "n" / "a.cat.csv").write_text("index,axis-0,axis-1\n0,5,6\n"); (tmp_path / "n" / "._a.cat.csv").write_bytes(b"\0\5\x16\7")
    assert plan_import(tmp_path / "n").tool == "napari"

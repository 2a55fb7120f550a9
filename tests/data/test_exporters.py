"""Projects as files of other tools: nothing is lost there and back."""
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spml_kit.core import UNLABELLED, VOID, SpmlError
from spml_kit.data.annotations import Boxes, Keypoints, Points, Scribbles, Tags
from spml_kit.data.exporters import coco_json, export_drawings, labelme_json, to_drawing
from spml_kit.data.formats import drawn_labels, read_annotation, write_annotation
from spml_kit.data.importers import import_annotations
from spml_kit.data.json_tools import COCO, LABELME
from spml_kit.data.shapes import fit_drawing, to_kit
from spml_kit.files import read_index_png, write_index_png
from test_importers import CLASSES, SIZE, TRUTH, H, W, picture, quick

xy = st.tuples(st.floats(0, W), st.floats(0, H)).map(lambda p: tuple(round(v, 3) for v in p))
ids = st.integers(0, 2)
box = st.tuples(st.integers(0, 70), st.integers(0, 50), st.integers(1, 10), st.integers(1, 10)).map(lambda b: (b[0] + .25, b[1], b[0] + b[2], b[1] + b[3] - .125))
filled = lambda items: st.lists(items, min_size=1, max_size=4)
drawings = st.fixed_dictionaries({}, optional=dict(
    tags=st.sets(ids, min_size=1).map(lambda s: Tags(sorted(s))),
    boxes=filled(st.tuples(box, ids)).map(lambda v: Boxes([b for b, _ in v], [c for _, c in v])),
    scribbles=st.tuples(filled(st.tuples(st.lists(xy, min_size=1, max_size=5), ids)), st.sampled_from([1., 3., 6.5])).map(lambda v: Scribbles([s for s, _ in v[0]], [c for _, c in v[0]], v[1])),
    points=st.tuples(filled(st.tuples(xy, ids)), st.sampled_from([2., 6.])).map(lambda v: Points([p for p, _ in v[0]], [c for _, c in v[0]], v[1]))))
keypoints = st.tuples(filled(st.tuples(xy, ids, st.integers(1, 3), st.floats(1, 50))), st.booleans()).map(lambda v: dict(keypoints=Keypoints(
    [p for p, *_ in v[0]], [c for _, c, *_ in v[0]], [i for _, _, i, _ in v[0]], [s for *_, s in v[0]] if v[1] else None, sigma=.2)))


def there_and_back(said, to):
    one = to_drawing("a.png", said, CLASSES, SIZE)
    if to == "labelme": reader, data = LABELME, labelme_json(one, "a.png")
    else: reader, data = COCO, coco_json([one], CLASSES)
    again = reader.read(Path("a.json"), json.loads(json.dumps(data))).drawings[0]
    again = fit_drawing(again, SIZE)
    assert again.skipped == []
    return to_kit(again, CLASSES, "keypoints" if "keypoints" in said else "full")


def close(a, b):
    "The same but for the last bits of half a pixel added and taken"
    a, b = a.to_json(), b.to_json()
    flat = lambda d: [v for k in sorted(d) for v in (np.ravel(np.concatenate([np.ravel(s) for s in d[k]]) if k == "strokes" else d[k]) if d[k] is not None else [None])]
    return a.keys() == b.keys() and [len(s) for s in a.get("strokes", [])] == [len(s) for s in b.get("strokes", [])] and all(x == y if isinstance(x, (str, type(None))) else abs(float(x) - float(y)) < 1e-9 for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.parametrize("to", ["labelme", "coco"])
@given(said=st.one_of(drawings.filter(bool), keypoints))
@quick
def test_nothing_is_lost_there_and_back(to, said):
    back = there_and_back(said, to)
    assert back.keys() == said.keys() and all(close(back[k], said[k]) for k in said)


@pytest.mark.parametrize("to", ["labelme", "coco"])
@given(seed=st.integers(0, 10**6))
@quick
def test_label_maps_survive_there_and_back(to, seed):
    labels = np.random.default_rng(seed).choice([0, 1, 2, UNLABELLED, VOID], SIZE).astype(np.uint8)
    assert (there_and_back(dict(full=labels), to)["full"] == labels).all()


@pytest.mark.parametrize("to", ["labelme", "coco"])
def test_a_project_there_and_back(to, tmp_path):
    from spml_kit.look.drawings import write_drawing
    root = tmp_path / "p"
    root.mkdir()
    (root / "classes.txt").write_text("background\ncat\ndog\nunused\n")
    said = {"a": dict(scribbles=Scribbles([[(3, 3), (30, 20)]], [1], 5), points=Points([(50, 50)], [0], 10)), "b": dict(boxes=Boxes([(1, 2, 30, 40)], [2]), tags=Tags([2])), "c": dict(tags=Tags([0, 1]))}
    for name, ann in said.items():
        picture(root / "images" / f"{name}.png")
        write_drawing(root, name, ann, drawn_labels(ann, SIZE))
    picture(root / "images" / "d.png")
    write_index_png(root / "labels" / "d.png", TRUTH, CLASSES.palette)
    assert export_drawings(root, tmp_path / to, to) == 4
    plan = import_annotations(tmp_path / to, tmp_path / "again", images=root / "images")
    assert plan.classes.names == ("background", "cat", "dog", "unused") and not plan.skipped
    there = lambda r: {p.relative_to(r).as_posix(): p for p in sorted(r.rglob("*")) if p.is_file() and "images" not in p.parts}
    before, after = there(root), there(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, p in before.items():
        if p.suffix == ".png": assert (read_index_png(p) == read_index_png(after[name])).all()
        elif p.suffix == ".json": assert read_annotation(p) == read_annotation(after[name])
    with pytest.raises(SpmlError, match="overwritten"): export_drawings(root, tmp_path / to, to)
    with pytest.raises(SpmlError, match="--to gif"): export_drawings(root, tmp_path / "x", "gif")


STORED = { # how training may find the labels of a.png
    "capitals": ("a.PNG", TRUTH), "TIFF": ("a.tif", TRUTH), "colours": ("a.png", CLASSES.palette[TRUTH].astype(np.uint8)), "twice": ("a.png.png", TRUTH),
    "XML": ("a.XML", "<annotation><object><name>cat</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>")}


@pytest.mark.parametrize("to", ["labelme", "coco"])
@pytest.mark.parametrize("kind", STORED)
def test_labels_of_every_form_go_out(to, kind, tmp_path):
    root, (name, labels) = tmp_path / "p", STORED[kind]
    picture(root / "images" / "a.png")
    (root / "labels").mkdir()
    (root / "images" / "classes.txt").write_text("background\ncat\ndog\n")
    if isinstance(labels, str): (root / "labels" / name).write_text(labels)
    else: Image.fromarray(labels).save(root / "labels" / name)
    assert export_drawings(root, tmp_path / to, to) == 1
    import_annotations(tmp_path / to, tmp_path / "again", images=root / "images")
    if kind == "XML": assert read_annotation(tmp_path / "again" / "labels" / "a.json").boxes.tolist() == [[2, 2, 9, 9]]
    else: assert (read_index_png(tmp_path / "again" / "labels" / "a.png") == TRUTH).all()


@pytest.mark.parametrize("to", ["labelme", "coco"])
def test_pictures_of_one_name_in_two_subfolders_go_out(to, tmp_path):
    root = tmp_path / "p"
    for sub, labels in (("x", TRUTH), ("y", TRUTH[::-1])):
        picture(root / "images" / sub / "a.png")
        write_index_png(root / "labels" / sub / "a.png", labels, CLASSES.palette)
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    export_drawings(root, tmp_path / to, to)
    import_annotations(tmp_path / to, tmp_path / "again", images=root / "images")
    for sub, labels in (("x", TRUTH), ("y", TRUTH[::-1])): assert (read_index_png(tmp_path / "again" / "labels" / f"{sub}_a.png") == labels).all()


def test_ids_outside_of_the_table_are_refused_on_the_way_out(tmp_path):
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "classes.txt").write_text("background\ncat\n")
    write_index_png(tmp_path / "labels" / "a.png", np.full(SIZE, 2, np.uint8))
    with pytest.raises(SpmlError, match="a.png: value 2 is not a label"): export_drawings(tmp_path, tmp_path / "o")
    write_annotation(tmp_path / "tags" / "a.json", Tags([1, 5]))
    with pytest.raises(SpmlError, match="tags of a: value 5 is not a label"): export_drawings(tmp_path, tmp_path / "o")

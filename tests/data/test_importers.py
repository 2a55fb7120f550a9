"""Other tools' files: shapes, readers, projects made of them, and the way back."""
import base64
import io
import json
import re
import sys
import tempfile
import types
import zlib
from collections import Counter
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from spml_kit.core import *
from spml_kit.files import *
from spml_kit.pictures import *
from spml_kit.data import importers
from spml_kit.data.annotations import *
from spml_kit.data.batches import weak_dls
from spml_kit.data.formats import *
from spml_kit.data.exporters import *
from spml_kit.data.images import FolderSet, folder_sets
from spml_kit.data.importers import *
from spml_kit.data.json_tools import *
from spml_kit.data.other_tools import *
from spml_kit.data.readers import *
from spml_kit.data.shapes import *
from spml_kit.data.weak import WeakSet, check_weak_set
from spml_kit.learn.learner import spml_learner
from spml_kit.look.drawings import mend_labels, read_drawing
from spml_kit.runs.cli import spml_import

FIXTURES = Path(__file__).parents[1] / "fixtures" / "importers"
TOOLS = sorted(p.name for p in FIXTURES.iterdir())
CLASSES = Classes(("background", "cat", "dog"))
SIZE = H, W = 60, 80
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

TRUTH = np.full(SIZE, UNLABELLED, np.uint8)  # what is drawn in every fixture
TRUTH[10:40, 10:40], TRUTH[20:55, 50:70] = 1, 2


def iou(a, b): return (a & b).sum() / max(1, (a | b).sum())


def picture(path, size=SIZE, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path, **save)
    return path


def shape(label, kind, points, **more): return dict(label=label, points=points, shape_type=kind) | more


def labelme(path, *shapes, size=SIZE, picture="a.png", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(imagePath=picture, imageHeight=size[0], imageWidth=size[1], shapes=shapes) | more))
    return path


SQUARE = [[10, 10], [40, 10], [40, 40], [10, 40]]


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
        with pytest.raises(SpmlError, match="no use for it"): plan_import(FIXTURES / tool, meaning=meaning)
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


def test_every_reader_has_a_file_here_and_recognises_nobody_elses():
    assert {*READERS} == {*TOOLS, "hugging_face"}
    for tool in TOOLS:
        files = [FIXTURES / tool, *(p for p in (FIXTURES / tool).rglob("*") if p.suffix in LOADERS)]
        assert {recognise_tool(f) for f in files} - {""} == {tool}


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


def my_reader(path, data): return ToolExport([Drawing("a.png", shapes=[Shape("box", "cat", [(1, 1), (9, 9)])], source=path)])


def test_a_reader_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    picture(tmp_path / "a.png")
    (tmp_path / "a.json").write_text("[1]")
    assert plan_import(tmp_path / "a.json", tool="mine:my_reader").annotations(plan_import(tmp_path / "a.json", tool="mine:my_reader").pictures[0])["boxes"] == Boxes([(1, 1, 9, 9)], [1])


# ---- run lengths, brushes, pixels

masks = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.floats(0, 1)).map(lambda t: np.random.default_rng(t[2]).random(t[:2]) < t[3])


@given(masks)
@quick
def test_run_lengths_against_their_definition(mask):
    counts, now = [0], False
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if mask[y, x] != now: counts.append(0); now = not now
            counts[-1] += 1
    assert runs_of(mask) == counts and unpack_runs(pack_runs(counts)) == counts
    assert (mask_of_runs(counts, mask.shape) == mask).all() and (mask_of_runs(pack_runs(counts), mask.shape) == mask).all()


@given(st.lists(st.integers(0, 10**9), max_size=20))
@quick
def test_compressed_text_of_any_lengths(counts): assert unpack_runs(pack_runs(counts)) == counts


@given(masks)
@quick
def test_run_lengths_are_those_of_pycocotools(mask):
    coco = pytest.importorskip("pycocotools.mask")
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert pack_runs(runs_of(mask)) == theirs["counts"].decode()
    assert (coco.decode(dict(size=list(mask.shape), counts=pack_runs(runs_of(mask)).encode())) == mask).all()
    assert (mask_of_runs(theirs["counts"], mask.shape) == mask).all()


@pytest.mark.parametrize("counts, says", [([3, 4], "pixels"), ([-1, 5], "pixels"), ("~~", "character"), ("\x7f", "character"), ("P", "within a number"), (["a"], None)])
def test_wrong_run_lengths_are_refused(counts, says):
    with pytest.raises((SpmlError, ValueError), match=says): mask_of_runs(counts, (2, 2))


@given(masks, st.lists(st.integers(1, 6), min_size=4, max_size=4), st.randoms())
@quick
def test_brushes_of_any_packing(mask, lengths, random):
    "Runs and literal stretches, each with one of four widths of its length"
    values, text, at = np.repeat(mask.ravel(), 4).astype(int)*255, "", 0
    text = f"{len(values):032b}{7:05b}" + "".join(f"{n - 1:04b}" for n in lengths)
    while at < len(values):
        k = random.randrange(4)
        n = min(random.randint(1, 2**lengths[k]), len(values) - at)
        same = bool((values[at:at + n] == values[at]).all())
        text += f"{int(same)}{k:02b}{n - 1:0{lengths[k]}b}" + "".join(f"{v:08b}" for v in (values[at:at + 1] if same else values[at:at + n]))
        at += n
    raw = [int(text[i:i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8)]
    assert (unpack_brush(raw, mask.shape) == mask).all() and (unpack_brush(pack_brush(mask), mask.shape) == mask).all()


def inside(x, y, ring):
    "Is a point in a polygon? By the number of edges that a ray crosses"
    odd = False
    for (ax, ay), (bx, by) in zip(ring, ring[1:] + ring[:1]):
        if (ay > y) != (by > y) and x < (bx - ax)*(y - ay)/(by - ay) + ax: odd = not odd
    return odd


def on_an_edge(x, y, ring):
    "Exact, for multiples of 1/16"
    return any((bx - ax)*(y - ay) == (by - ay)*(x - ax) for (ax, ay), (bx, by) in zip(ring, ring[1:] + ring[:1]))


off = lambda low, high: st.integers(low*8, high*8 - 1).map(lambda v: v/8 + 1/16)  # never on the centre of a pixel


@given(st.lists(st.tuples(off(-4, 20), off(-4, 16)), min_size=3, max_size=6), st.lists(st.tuples(off(2, 14), off(2, 10)), min_size=3, max_size=4))
@quick
def test_a_pixel_is_in_a_polygon_where_its_centre_is(ring, hole):
    ours = shape_mask(Shape("polygon", "a", ring, holes=[hole]), (12, 16))
    plain = np.array([[inside(x + .5, y + .5, ring) and not inside(x + .5, y + .5, hole) for x in range(16)] for y in range(12)])
    either = np.array([[on_an_edge(x + .5, y + .5, ring) or on_an_edge(x + .5, y + .5, hole) for x in range(16)] for y in range(12)])
    assert not ((ours != plain) & ~either).any()


@given(masks, st.integers(-6, 12), st.integers(-6, 12))
@quick
def test_bitmaps_lie_where_they_are_put(mask, x, y):
    plain = np.zeros((8, 8), bool)
    for i in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            if mask[i, j] and 0 <= y + i < 8 and 0 <= x + j < 8: plain[y + i, x + j] = True
    assert (shape_mask(Shape("bitmap", "a", [(x, y)], mask=mask), (8, 8)) == plain).all()


# ---- the way back

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
    with pytest.raises(SpmlError, match="written over"): export_drawings(root, tmp_path / to, to)
    with pytest.raises(SpmlError, match="--to gif"): export_drawings(root, tmp_path / "x", "gif")


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
    assert plan.classes.names == ("background", "one") and any("not there" in k for k in plan.skipped)


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


def test_what_is_ignored_beside_boxes_is_void(tmp_path):
    drawing = Drawing("a.png", SIZE)
    drawing.add("box", "cat", [(2, 2), (12, 12)])
    drawing.add("box", VOID_NAME, [(20, 20), (40, 40)])
    labels = kit_labels(to_kit(fit_drawing(drawing, SIZE), Classes(("background", "cat"))), SIZE)
    assert (labels[20:40, 20:40] == VOID).all() and labels[5, 5] == UNLABELLED and labels[15, 15] == 0


def test_poses_of_yolo_are_refused(tmp_path):
    (tmp_path / "labels").mkdir()
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "a.txt").write_text("0 .5 .5 .2 .2 .4 .4 .5 .5 .6 .6\n")
    (tmp_path / "data.yaml").write_text("names: [person]\nkpt_shape: [3, 2]\n")
    with pytest.raises(SpmlError, match="kpt_shape"): plan_import(tmp_path)


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
    with pytest.raises(SpmlError, match="Two pictures bear this name"): plan_import(tmp_path / "in")
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
    assert plan.skipped == Counter({"box of what shall be ignored, void in pictures with boxes": 1, "polygon clipped at the border of the picture (kept)": 1, "point outside the picture": 1, "polygon of 2 points, 3 are needed": 1,
        "polygon that covers no pixel of the picture": 1, "point without a class": 1, "point with a coordinate that is no number": 1, "cuboid (labelme)": 1})
    text = plan_text(plan)
    assert all(w in text for w in ("left out: 1 x point outside the picture", "What nobody drew is unlabelled", "the smaller lies on top", "--as full"))


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


def test_keypoints_of_coco(tmp_path):
    picture(tmp_path / "a.png")
    people = [dict(id=k, image_id=1, category_id=1, keypoints=[x, 10, 2, x, 20, 1, 0, 0, 0], bbox=[x - 5, 5, 10, 30], segmentation=[[x - 5, 5, x + 5, 5, x + 5, 35, x - 5, 35]]) for k, x in ((1, 10), (2, 50))]
    (tmp_path / "k.json").write_text(json.dumps(dict(images=[dict(id=1, file_name="a.png", height=H, width=W)], categories=[dict(id=1, name="person", keypoints=["nose", "hand", "foot"])], annotations=people)))
    full, parts = plan_import(tmp_path), plan_import(tmp_path, meaning="keypoints")
    assert full.classes.names == ("background", "person") and (labels_of(full) == 1).sum() == 600 and full.skipped == Counter({"point of a body part (--as keypoints takes them)": 4})
    said = parts.annotations(parts.pictures[0])["keypoints"]
    assert parts.classes.names == ("background", "nose", "hand") and said.xy.tolist() == [[10, 10], [10, 20], [50, 10], [50, 20]]
    assert said.instances.tolist() == [1, 1, 2, 2] and np.allclose(said.scale, np.sqrt(300))
    for p in people: del p["segmentation"], p["bbox"]
    (tmp_path / "k.json").write_text(json.dumps(dict(images=[dict(id=1, file_name="a.png")], categories=[dict(id=1, name="person", keypoints=["nose", "hand", "foot"])], annotations=people)))
    assert plan_import(tmp_path).meaning == "keypoints"  # there is nothing else


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


# ---- straight into training

def project(root, *shapes, names="background\ncat\ndog\n"):
    picture(root / "images" / "a.jpg")
    (root / "classes.txt").write_text(names)
    return labelme(root / "labels" / "a.json", *shapes)


def test_training_reads_a_file_of_one_picture_where_it_lies(tmp_path):
    project(tmp_path, shape("cat", "polygon", SQUARE), shape("background", "linestrip", [[3, 3], [3, 56]]))
    for size in (None, 40):
        s = WeakSet(folder_sets(tmp_path, size)[0], tmp_path / "labels").sample(0)
        assert abs((s.labels == 1).sum()/s.labels.size - 900/4800) < .01 and s.tags.tolist() == [True, True, False] and (s.labels == 0).any()
    labelme(tmp_path / "labels" / "a.json", shape("dog", "rectangle", [[10, 10], [40, 40]]))
    weak = WeakSet(folder_sets(tmp_path)[0], tmp_path / "labels")
    assert weak.boxes(0) == Boxes([(10, 10, 40, 40)], [2]) and weak.tags(0).tolist() == [True, False, True]
    (tmp_path / "labels" / "a.json").write_text(next((FIXTURES / "qupath").glob("*.geojson")).read_text())
    assert (WeakSet(folder_sets(tmp_path)[0], tmp_path / "labels").sample(0).labels == 1).sum() == 900


def test_names_in_files_of_other_tools_are_those_of_the_set(tmp_path):
    "A set that keeps some classes, in another order: names decide, not numbers"
    project(tmp_path, shape("dog", "polygon", SQUARE))
    for file_ids in (False, True):
        weak = WeakSet(FolderSet(tmp_path / "images", classes=("background", "dog", "cat")), tmp_path / "labels", file_ids=file_ids)
        assert (weak.sample(0).labels == 1).sum() == 900


@pytest.mark.parametrize("write, says", [
    (lambda p: labelme(p, shape("cow", "polygon", SQUARE)), r"a.json: class 'cow' is not one of"), (lambda p: labelme(p), r"a.json: the annotation is empty"), (lambda p: labelme(p, shape("cat", "polygon", SQUARE), size=(W, H)), r"a.json: drawn on a picture of 60x80, .*EXIF"),
    (lambda p: p.write_text('{"lasso": 1}'), r"a.json: not an annotation of this kit"), (lambda p: labelme(p, shape("cat", "point", [[900, 1]])), r"a.json: the annotation is empty \(1 point outside the picture\)"),
    (lambda p: p.write_text((FIXTURES / "coco" / "instances.json").read_text().replace('"images": [', '"images": [{"id": 8, "file_name": "b.png"},')), r"a.json: looks like COCO with 2 pictures: spml_import .*a.json --out PROJECT")])
def test_files_that_training_cannot_read_are_named(write, says, tmp_path):
    write(project(tmp_path, shape("cat", "polygon", SQUARE)))
    with pytest.raises(SpmlError, match=says): WeakSet(folder_sets(tmp_path)[0], tmp_path / "labels").sample(0)


def test_folders_with_files_of_other_tools_name_the_command(tmp_path):
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "classes.txt").write_text("background\ncat\n")
    labelme(tmp_path / "images" / "a.json", shape("cat", "polygon", SQUARE))
    with pytest.raises(SpmlError, match="labels: no such folder.*a.json looks like labelme: spml_import"): folder_sets(tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "all.xml").write_text((FIXTURES / "cvat" / "annotations.xml").read_text())
    with pytest.raises(SpmlError, match="all.xml looks like CVAT: spml_import"): folder_sets(tmp_path)
    (tmp_path / "labels" / "a.xml").write_text((FIXTURES / "cvat" / "annotations.xml").read_text().replace("</annotations>", '<image name="b.png"/></annotations>'))
    with pytest.raises(SpmlError, match="looks like CVAT with 2 pictures"): WeakSet(FolderSet(tmp_path / "images"), tmp_path / "labels").sample(0)


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


@pytest.mark.parametrize("text", ['<!DOCTYPE annotation><annotation/>', '<!DOCTYPE a [<!ENTITY b "c">]><annotations><image name="&b;"/></annotations>', '<?xml version="1.0"?><!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>'])
def test_document_types_are_refused(text, tmp_path):
    (tmp_path / "a.xml").write_text(text)
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "a.xml").write_text(text, encoding=encoding)
        for read in (read_xml, open_export, lambda p: read_annotation(p, CLASSES)):
            with pytest.raises(SpmlError, match="a.xml: XML with a document type"): read(tmp_path / "a.xml")


def test_what_unpacks_to_very_much_is_left_out(tmp_path):
    picture(tmp_path / "a.png")
    bomb = base64.b64encode(zlib.compress(bytes(1 << 27))).decode()
    item = lambda data: dict(classTitle="cat", geometryType="bitmap", bitmap=dict(origin=[0, 0], data=data))
    one = SUPERVISELY.read(tmp_path / "a.json", dict(size=dict(height=H, width=W), objects=[item(bomb), item("AAAA"), item(3)])).drawings[0]
    assert one.shapes == [] and one.skipped == ["bitmap that is too large", "bitmap that is damaged", "bitmap that is damaged"]
    coco = dict(images=[dict(id=1, file_name="a.png")], categories=[dict(id=1, name="cat")], annotations=[dict(id=1, image_id=1, category_id=1, segmentation=dict(size=[10**6, 10**6], counts=[0, 10**12]))])
    assert "mask of" in COCO.read(tmp_path / "c.json", coco).drawings[0].skipped[0]


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
    with pytest.raises(SpmlError, match="nothing is written over"): import_annotations(FIXTURES / "coco", tmp_path / "deep" / "p")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SpmlError, match="nothing is written over"): import_annotations(FIXTURES / "coco", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    import_annotations(FIXTURES / "coco", tmp_path / "empty")
    assert (tmp_path / "empty" / "classes.txt").read_text() == "background\ncat\ndog\n"


def test_folders_of_several_tools_or_of_none(tmp_path):
    with pytest.raises(SpmlError, match="no annotations of a tool that is known"): plan_import(tmp_path)
    with pytest.raises(SpmlError, match="no such file"): plan_import(tmp_path / "gone")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(SpmlError, match="unpack it"): plan_import(tmp_path / "a.zip")
    picture(tmp_path / "a.png")
    labelme(tmp_path / "a.json", shape("cat", "polygon", SQUARE))
    (tmp_path / "v.json").write_text(DOCUMENTS["via"].read_text())
    with pytest.raises(SpmlError, match=r"files of labelme \(1\), VIA \(1\); say which: --tool labelme"): plan_import(tmp_path)
    assert plan_import(tmp_path, tool="labelme").tool == "labelme" and plan_import(tmp_path, tool="via").classes == CLASSES
    with pytest.raises(SpmlError, match="tool 'labelmee' is not one of .*did you mean"): plan_import(tmp_path, tool="labelmee")
    with pytest.raises(SpmlError, match="looks like labelme; COCO keeps"): plan_import(tmp_path / "a.json", tool="coco")
    with pytest.raises(SpmlError, match="--images names the folder"): plan_import(tmp_path, tool="via", images=tmp_path / "gone")


def test_the_command(tmp_path, capsys):
    words = [str(FIXTURES / "labelme"), "--out", str(tmp_path / "p")]
    assert spml_import([*words, "--dry"]) == 0 and not (tmp_path / "p").exists()
    said = capsys.readouterr().out
    assert "labelme; pictures: 1, without any shape: 0" in said and "nothing is written" in said and re.search(r"dog +1 ", said)
    assert spml_import([*words, "--as", "boxes"]) == 0 and "the box around it" in capsys.readouterr().out
    assert read_annotation(tmp_path / "p" / "labels" / "a.json") == Boxes([(10, 10, 40, 40), (50, 20, 70, 55)], [1, 2])
    assert (tmp_path / "p" / "images" / "a.png").is_symlink()
    assert spml_import(words) == 2 and capsys.readouterr().err.count("\n") == 1
    assert spml_import([words[0]]) == 2 and "--out PROJECT" in capsys.readouterr().err
    assert spml_import([str(tmp_path / "p"), "--to", "coco", "--out", str(tmp_path / "c")]) == 0 and recognise_tool(tmp_path / "c" / "instances.json") == "coco"
    assert spml_import([str(tmp_path / "p"), "--to", "coco"]) == 2
    assert spml_import([str(tmp_path / "nothing"), "--out", str(tmp_path / "q")]) == 2 and not (tmp_path / "q").exists()

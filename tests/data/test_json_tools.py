"""Tools that write JSON: options of VIA, tasks of Label Studio, keypoints and panoptic segments of COCO, packed brushes."""
import base64
import json
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spml_kit.core import UNLABELLED, VOID, SpmlError
from spml_kit.data.importers import plan_import
from spml_kit.data.json_tools import COCO, SUPERVISELY, VIA, pack_brush, unpack_brush
from spml_kit.data.shapes import kit_labels
from test_importers import SIZE, H, W, labels_of, picture, quick
from test_readers import told
from test_shapes import masks


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
    with pytest.raises(SpmlError, match="caption without a shape"): plan_import(tmp_path / "p.json")


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
    assert "region whose species is '9', not one of its options ['1', '2', '3']" in told(read("9")) and not read("9").drawings[0].shapes
    both = read({"1": True, "2": True}, "checkbox")
    assert [s.name for s in both.drawings[0].shapes] == ["cat"] and "several classes in species" in told(both)[0]
    assert "nothing is checked" in told(read({"1": False}, "checkbox"))[0]
    assert [s.name for s in read("1", breed="tabby").drawings[0].shapes] == ["cat"]  # the one with options
    assert told(read(""))[0].startswith("region without a class")
    odd = via_project("1")
    odd["_via_attributes"]["region"]["species"] = None
    assert any("_via_attributes of v.json" in w.where for w in told(VIA.read(Path("v.json"), odd)))


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
    with pytest.raises(SpmlError, match="panoptic annotation whose a.png is not in panoptic/ next to the file"): plan_import(tmp_path / "panoptic.json")


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


def test_what_unpacks_to_very_much_is_left_out(tmp_path):
    picture(tmp_path / "a.png")
    bomb = base64.b64encode(zlib.compress(bytes(1 << 27))).decode()
    item = lambda data: dict(classTitle="cat", geometryType="bitmap", bitmap=dict(origin=[0, 0], data=data))
    one = SUPERVISELY.read(tmp_path / "a.json", dict(size=dict(height=H, width=W), objects=[item(bomb), item("AAAA"), item(3)])).drawings[0]
    assert one.shapes == [] and one.skipped == ["bitmap that is too large", "damaged bitmap", "damaged bitmap"]
    coco = dict(images=[dict(id=1, file_name="a.png")], categories=[dict(id=1, name="cat")], annotations=[dict(id=1, image_id=1, category_id=1, segmentation=dict(size=[10**6, 10**6], counts=[0, 10**12]))])
    assert "mask of" in COCO.read(tmp_path / "c.json", coco).drawings[0].skipped[0]


def studio(task, **region):
    r = dict(type="rectanglelabels", original_width=W, original_height=H, value=dict(x=10, y=10, width=20, height=20, rectanglelabels=["cat"]))
    return dict(data=dict(image="a.png"), **{k: [dict(result=[r | region])]*n for k, n in task.items()})


@pytest.mark.parametrize("task, region, reason", [(dict(annotations=2), {}, "annotation of a task that has a later one"), (dict(annotations=0, predictions=1), {}, "prediction that was not accepted"), (dict(annotations=1), dict(image_rotation=90), "rotated by 90 degrees in Label Studio")])
def test_what_label_studio_leaves_open_is_told(task, region, reason, tmp_path):
    picture(tmp_path / "a.png"); picture(tmp_path / "b.png")
    good = studio(dict(annotations=1), image_rotation=360) | dict(data=dict(image="b.png"))
    (tmp_path / "p.json").write_text(json.dumps([studio(task, **region), good]))
    plan = plan_import(tmp_path / "p.json")
    assert [len(p.drawing.shapes) for p in plan.pictures] == [int(task == dict(annotations=2)), 1]
    assert len(plan.skipped) == 1 and reason in next(iter(plan.skipped)) and "task 1 " in next(iter(plan.skipped)).where


def test_run_lengths_of_another_size_are_left_out(tmp_path):
    picture(tmp_path / "a.png")
    runs = lambda h, w: dict(counts=[h + 1, 3, h*w - h - 4], size=[h, w])
    said = [dict(id=k, image_id=1, category_id=1, segmentation=runs(*size)) for k, size in enumerate([(H, W), (W, H)])]
    (tmp_path / "c.json").write_text(json.dumps(dict(images=[dict(id=1, file_name="a.png")], categories=[dict(id=1, name="cat")], annotations=said)))
    plan = plan_import(tmp_path / "c.json")
    assert len(plan.pictures[0].drawing.shapes) == 1 and [*plan.skipped] == [f"mask of {H}x{W} on a picture of {W}x{H} (width x height)"]


def test_results_of_coco_are_named(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps([dict(image_id=1, category_id=1, bbox=[1, 2, 3, 4], score=.5)]))
    with pytest.raises(SpmlError, match="r.json: looks like COCO results.*'annotations'"): plan_import(tmp_path / "r.json")

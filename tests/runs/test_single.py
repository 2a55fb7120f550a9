"""The command line on data of one's own: a folder of images with strokes, as a user would type it."""
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from spml_kit.core import UNLABELLED
from spml_kit.files import load_tensors, read_index_png, write_index_png
from spml_kit.data.weak import WeakSet
from spml_kit.runs.cli import spml_prepare, spml_run
from spml_kit.runs.experiment import find_notebook, profile_parameters
from spml_kit.runs.predict import spml_predict
from spml_kit.data.body_parts import PartScenes

from conftest import stroked_project


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Eight scenes: six with strokes, two with masks to score on"
    return stroked_project(tmp_path_factory.mktemp("own"), 64)


def run(folder, out, *more):
    return spml_run(["scribbles", "--data", "folder", "--root", str(folder), "--out", str(out), "--profile", "tiny", *more])


def test_own_folder_is_trained_predicted_and_scored(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "run") == 0
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert {r["method"] for r in rows} == {"spml_retrieval", "spml_head"}
    assert all(0 <= r["miou"] <= 100 and r["data"] == "folder" for r in rows)
    for method in ("spml_retrieval", "spml_head"):
        assert len(list((tmp_path / "run" / "predictions" / method).glob("*.png"))) == 2
    made = {p.stem: read_index_png(p) for p in (tmp_path / "run" / "masks").glob("*.png")} # of every image, those drawn on included
    assert made.keys() == {p.stem for p in (folder / "images").iterdir()}
    for name, mask in made.items():
        assert mask.shape == (64, 64) and mask.max() < 13
        if not (folder / "labels" / f"{name}.png").exists(): continue
        drawn = read_index_png(folder / "labels" / f"{name}.png")
        assert (mask == drawn)[drawn < UNLABELLED].all()
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    said = capsys.readouterr()
    assert "spml_head" in said.out and "Executing" not in said.err # a log has no bar between its lines


def test_a_finished_run_is_not_repeated_and_gives_the_same_numbers(folder, tmp_path):
    assert run(folder, tmp_path / "run") == 0
    first = (tmp_path / "run" / "metrics.json").read_text()
    checkpoint = tmp_path / "run" / "spml" / "embedding" / "checkpoint.safetensors"
    stamp = checkpoint.stat().st_mtime_ns
    assert run(folder, tmp_path / "run") == 0
    assert checkpoint.stat().st_mtime_ns == stamp
    assert (tmp_path / "run" / "metrics.json").read_text() == first
    assert run(folder, tmp_path / "again") == 0 # trained anew
    assert (tmp_path / "again" / "metrics.json").read_text() == first


def test_another_head_and_another_loss(folder, tmp_path):
    out = tmp_path / "run"
    assert run(folder, out, "-p", "head", "ocr", "-p", "methods", "['adaptive', 'spml']", "-p", "adaptive_radius", "2") == 0
    said = json.loads((out / "metrics.json").read_text())
    assert {r["method"] for r in said["rows"]} == {"adaptive", "spml_retrieval", "spml_head"}
    assert (said["conditions"]["head"], said["conditions"]["adaptive_radius"]) == ("ocr", 2) and "power" in said["history"]["adaptive"][0]
    for name in ("spml_head", "adaptive"): # one file each holds the whole network
        where = out if name == "spml_head" else out / name
        images = folder / "images"
        assert spml_predict([str(where / "model.spml"), str(images), "--out", str(tmp_path / name)]) == 0
        for p in (out / "predictions" / name).glob("*.png"): assert np.array_equal(read_index_png(p), read_index_png(tmp_path / name / "labels" / p.name))


def test_labels_and_regions_of_ones_own(folder, tmp_path, capsys):
    labels = shutil.copytree(folder / "labels", tmp_path / "drawn")
    given = ["points", "--data", "folder", "--root", str(folder), "--out", str(tmp_path / "run"), "--profile", "tiny", "-p", "label_folder", str(labels)]
    assert spml_run(given) == 0
    said = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {r["annotation"] for r in said["rows"]} == {"points"} and said["conditions"]["label_folder"] == "drawn" # the kind stays, for pipeline and tables
    assert json.loads((tmp_path / "run" / "spml" / "settings.json").read_text())["annotation"] == "points"
    assert spml_run([*given, "-p", "regions", "20"]) == 2 # a network trained with other regions is not theirs
    assert "other settings (regions was 30, is 20)" in capsys.readouterr().err


@pytest.fixture
def broken(folder, tmp_path):
    "A copy that a test may break"
    return shutil.copytree(folder, tmp_path / "broken")


def label_with(root, value):
    path = sorted((root / "labels").iterdir())[0]
    labels = np.full((64, 64), UNLABELLED, np.uint8)
    labels[:8] = value
    write_index_png(path, labels, np.zeros((256, 3), np.uint8))
    return path.name


def test_a_folder_with_results_of_other_labels_is_left_as_it_is(folder, broken, tmp_path, capsys):
    assert run(broken, tmp_path / "run") == 0
    results = [tmp_path / "run" / n for n in ("metrics.json", "predictions/spml_head/scene_000006.png", "spml/embedding/checkpoint.safetensors")]
    kept = [p.read_bytes() for p in results]
    label_with(broken, 1)  # somebody draws more
    assert run(broken, tmp_path / "run") == 2
    assert "other settings (labels was" in capsys.readouterr().err
    assert [p.read_bytes() for p in results] == kept
    shutil.copy(next(iter(sorted((folder / "labels").iterdir()))), broken / "labels")  # and takes it back
    assert run(broken, tmp_path / "run") == 0
    assert (tmp_path / "run" / "metrics.json").read_bytes() == kept[0]


def test_regions_bounded_in_another_way(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "merged", "-p", "contours", "merging", "-p", "methods", "[spml]") == 0
    assert json.loads((tmp_path / "merged" / "metrics.json").read_text())["conditions"]["contours"] == "merging"
    assert run(folder, tmp_path / "merged", "-p", "methods", "[spml]") == 2 # results of other regions stay what they are
    assert spml_prepare([str(folder), "--n", "12", "--workers", "0", "--out", str(tmp_path / "made")]) == 0
    assert run(folder, tmp_path / "both", "-p", "contours", "merging", "-p", "region_folder", str(tmp_path / "made")) == 2
    assert "leave one of the two out" in capsys.readouterr().err
    assert run(folder, tmp_path / "hog", "-p", "contours", "hog") == 2 and "parameter contours='hog'" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["value", "size", "image", "empty", "one class"])
def test_faults_name_file_and_value(fault, broken, tmp_path, capsys):
    first = sorted(p.name for p in (broken / "labels").iterdir())[0]
    if fault == "value":
        label_with(broken, 99)
        words = [first, "value 99"]
    elif fault == "size":
        write_index_png(broken / "labels" / first, np.full((10, 12), UNLABELLED), np.zeros((256, 3), np.uint8))
        words = [first, "10x12", "64x64"]
    elif fault == "image":
        image = broken / "images" / first
        image.write_bytes(image.read_bytes()[:200])
        words = [first, "not a readable image"]
    else:
        for path in (broken / "labels").iterdir():
            labels = np.full((64, 64), UNLABELLED, np.uint8)
            if fault == "one class":
                labels[:8] = 0
            write_index_png(path, labels, np.zeros((256, 3), np.uint8))
        words = ["no pixel is labelled"] if fault == "empty" else ["only 'background' is labelled"]
    assert run(broken, tmp_path / "run") == 2
    said = capsys.readouterr().err
    message = said.replace("\r", "\n").strip().splitlines()[-1]  # after the progress bar
    assert message.startswith("spml_run: ") and all(word in message for word in words), said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.long
def test_a_frozen_backbone_from_a_file(folder, tmp_path, capsys):
    "Features are made once, of any backbone and file; a run that goes on finds them; the network predicts"
    torch.save({"model": timm.create_model("test_vit").state_dict()}, tmp_path / "vit.pth")
    frozen = ["-p", "backbone", "test_vit", "-p", "weights", str(tmp_path / "vit.pth"), "-p", "frozen", "True"]
    assert run(folder, tmp_path / "run", *frozen) == 0
    said = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (said["conditions"]["backbone"], said["conditions"]["frozen"]) == ("test_vit", True)
    assert {r["method"] for r in said["rows"]} == {"spml_retrieval", "spml_head"}
    features = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "features").glob("*.safetensors")}
    assert len(features) == 6 and json.loads((tmp_path / "run" / "features" / "settings.json").read_text())["backbone"] == "test_vit"
    first = load_tensors(tmp_path / "run" / "spml" / "embedding" / "checkpoint.safetensors")[0]
    assert all(any(torch.equal(v, w) for w in torch.load(tmp_path / "vit.pth")["model"].values()) for k, v in first.items() if "backbone.net.model" in k and "qkv.weight" in k)
    assert run(folder, tmp_path / "run", *frozen) == 0
    assert all(p.stat().st_mtime_ns == t for p, t in features.items())
    assert run(folder, tmp_path / "paper", "-p", "frozen", "True", "-p", "recipe_name", "paper_voc") == 2
    assert "want recipe_name=small" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [
    (["scribbles", "--data", "folder", "--root", "nowhere"], "nowhere: no such folder"),
    (["scribbles", "--data", "voc"], "needs --root"),
    (["scribbles", "--profile", "tinny"], "did you mean 'tiny'"),
    (["scribbles", "-p", "stepz", "4"], "did you mean 'steps'"),
    (["scribbles", "-p", "head", "ocrr"], "did you mean 'ocr'"), (["scribbles", "-p", "adaptive_power", "0.5"], "is not in 1.."),
])
def test_mistyped_commands_are_refused_before_anything_starts(argv, words, tmp_path, capsys):
    assert spml_run([*argv, "--out", str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def paper(out, *more):
    "A run with the published settings, two steps of each; what it says of itself"
    assert spml_run(["scribbles", "--profile", "paper_voc", "--profile", "dry", "--out", str(out / "run"), *more]) == 0
    said = json.loads((out / "run" / "metrics.json").read_text())
    assert {r["method"] for r in said["rows"]} == {"spml_retrieval", "spml_head", "spml_retrieval_crf", "spml_head_crf"}
    recipe = said["conditions"]["recipe"]
    assert (recipe["network"], recipe["optimiser"], recipe["grid"], recipe["dim"], said["conditions"]["steps"]) == ("paper_deeplab", "sgd", [6, 6], 64, 2)
    return said["conditions"]


def test_the_papers_settings_go_through(tmp_path):
    "Network, clusters, second head and CRF as published; windows a sixteenth of the published ones"
    assert profile_parameters("paper_voc", find_notebook("single"))["crop"] == 512
    assert paper(tmp_path, "-p", "size", "128", "-p", "crop", "128")["crop"] == 128


@pytest.mark.long
def test_the_papers_windows_go_through(tmp_path):
    assert paper(tmp_path)["crop"] == 512


def test_photographs(voc_animals, tmp_path):
    assert spml_run(["points", "--data", "voc", "--root", str(voc_animals), "--profile", "tiny", "--out", str(tmp_path / "run")]) == 0
    conditions = json.loads((tmp_path / "run" / "metrics.json").read_text())["conditions"]
    assert conditions["n_train"] == 12 and len(conditions["classes"]) == 21


@pytest.mark.long
def test_lists_of_people_with_point_masks(tmp_path, capsys):
    "The paper's layout for body parts: points, or masks, of training images in lists of their own"
    for listed, start, n, said in (("points.txt", 0, 6, "points"), ("full.txt", 0, 6, "masks"), ("masks.txt", 100, 3, "masks")):
        people, lines = PartScenes(n, size=64, start=start), []
        weak = WeakSet(people, "keypoints")
        for i, name in enumerate(people.names):
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.fromarray(people.image(i)).save(tmp_path / "images" / f"{name}.png")
            write_index_png(tmp_path / said / f"{name}.png", weak.sample(i).labels if said == "points" else people.mask(i), people.classes.palette)
            lines.append(f"/images/{name}.png /{said}/{name}.png\n")
        (tmp_path / listed).write_text("".join(lines))
    lists = ["--data", "densepose", "--root", str(tmp_path), "--profile", "tiny", "-p", "train_split", "points.txt", "-p", "valid_split", "masks.txt"]
    assert spml_run(["keypoints", *lists, "-p", "methods", "['spml', 'full_masks']", "-p", "full_split", "full.txt", "-p", "flip", "True", "--out", str(tmp_path / "run")]) == 0
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert {(r["method"], r["annotation"]) for r in rows} == {("spml_retrieval", "keypoints"), ("spml_head", "keypoints"), ("full_masks", "full")} and all(len(r["per_class"]) == 15 for r in rows)
    for word, more, said in (("keypoints", ["-p", "methods", "['full_masks']"], "full_split is empty"), ("scribbles", [], "annotation 'scribbles': densepose has keypoints")):
        assert spml_run([word, *lists, *more, "--out", str(tmp_path / word)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("more, at_the_walk", [([], None), (["walk_background=mean"], "MeanBackground(alpha=1.0)"), (["walk_alpha=6"], "GeodesicBackground(alpha=6)"), (["walk_background=power", "walk_alpha=3"], "PowerBackground(alpha=3)")])
def test_the_walk_from_tags_begins_with_its_own_background(more, at_the_walk, tmp_path):
    chosen = [w for said in ("background=geodesic", "skip=[neighbours, walk again, neighbours again, head again]", "steps=1", "rounds=1", "n_train=4", "n_valid=2", "n_watch=2", *more) for w in ("-p", *said.split("=", 1))]
    assert spml_run(["tags", "--profile", "tiny", "--out", str(tmp_path / "run"), *chosen]) == 0
    assert json.loads((tmp_path / "run" / "spml" / "settings.json").read_text()).get("walk_background") == at_the_walk

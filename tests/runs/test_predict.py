"A finished run labels new pictures: as it predicted itself, again and again, and refuses what would mix."
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from spml_kit.core import SpmlError
from spml_kit.files import read_index_png
from spml_kit.infer.bundle import load_model
from spml_kit.runs.cli import spml_run
from spml_kit.runs.predict import Wanted, label_picture, picture_files, predict_pictures, run_model, spml_predict

from conftest import photo, stroked_project


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "Eight scenes of 96 pixels, which a run sees at 64: six with strokes, two with masks"
    return stroked_project(tmp_path_factory.mktemp("own"), 96)


@pytest.fixture(scope="module")
def trained(own, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert spml_run(["scribbles", "--data", "folder", "--root", str(own), "--out", str(out), "--profile", "tiny", "-p", "scales", "[1.0, 0.75]", "-p", "flip", "True", "-p", "crf", "True"]) == 0
    return out


@pytest.fixture
def photos(own, tmp_path):
    "The two pictures that the run predicted, alone"
    (tmp_path / "photos").mkdir()
    for k in (6, 7): shutil.copy(own / "images" / f"scene_{k:06d}.png", tmp_path / "photos")
    return tmp_path / "photos"


def bytes_of(folder): return {p.name: p.read_bytes() for p in sorted(folder.glob("*.png"))}


@pytest.mark.parametrize("more, name", [([], "spml_head"), (["--crf"], "spml_head_crf"), (["--by", "retrieval"], "spml_retrieval"), (["--by", "retrieval", "--crf"], "spml_retrieval_crf")], ids=lambda o: o if isinstance(o, str) else "")
def test_the_runs_own_pictures_get_the_runs_own_labels(trained, photos, tmp_path, more, name):
    assert spml_predict([str(trained), str(photos), "--out", str(tmp_path / "out"), *more]) == 0
    made = bytes_of(tmp_path / "out" / "labels")
    assert len(made) == 2 and made == bytes_of(trained / "predictions" / name)


def test_one_file_is_enough(trained, photos, tmp_path):
    alone = shutil.copy(trained / "model.spml", tmp_path / "mine.spml")
    assert spml_predict([str(alone), str(photos), "--out", str(tmp_path / "out")]) == 0
    assert bytes_of(tmp_path / "out" / "labels") == bytes_of(trained / "predictions" / "spml_head")
    assert load_model(alone).card["training_images"] == 6 and [r["method"] for r in load_model(alone).card["rows"]][-2:] == ["spml_head", "spml_head_crf"]


def test_a_run_of_before_labels_by_its_last_head(trained, photos, tmp_path, capsys):
    old = shutil.copytree(trained, tmp_path / "old", ignore=shutil.ignore_patterns("model.spml", "predictions"))
    assert spml_predict([str(old), str(photos), "--out", str(tmp_path / "out")]) == 0
    assert bytes_of(tmp_path / "out" / "labels") == bytes_of(trained / "predictions" / "spml_head")
    assert spml_predict([str(old), str(photos), "--out", str(tmp_path / "other"), "--by", "retrieval"]) == 2
    assert "no training segments" in capsys.readouterr().err and not (tmp_path / "other").exists()
    (old / "metrics.json").unlink()
    with pytest.raises(SpmlError, match="not finished"): run_model(old)


def test_everything_that_can_be_asked_for(trained, photos, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6 # lies on its side; upright it is 90x60
    Image.fromarray(photo(60, 90)).save(photos / "turned.jpg", exif=exif)
    out = tmp_path / "out"
    words = [str(trained), str(photos), "--out", str(out), "--by", "retrieval", "--overlay", "--confidence", "--probabilities", "--explain", "--sheet", "--size", "full", "--window", "64", "--scales", "1", "--no-flip"]
    assert spml_predict(words) == 0
    said = capsys.readouterr()
    assert "3 label maps are in" in said.out and "about" in said.out + said.err
    for folder, end in dict(labels="png", overlays="jpg", confidence="png", segments="png").items():
        assert Image.open(out / folder / f"turned.{end}").size == (60, 90), folder
    scores = np.load(out / "probabilities" / "turned.npz")
    assert scores["scores"].shape == (13, 90, 60) and np.array_equal(scores["scores"].argmax(0), read_index_png(out / "labels" / "turned.png")) and scores["classes"][0] == "background"
    sure = np.array(Image.open(out / "confidence" / "turned.png"))
    assert np.abs(sure/255. - scores["scores"].astype(float).max(0)).max() < .005
    votes = (out / "witnesses" / "turned.csv").read_text().splitlines()
    segments = read_index_png(out / "segments" / "turned.png")
    assert len(votes) == 1 + 20*(segments.max() + 1) and votes[0].startswith("scale,mirrored,segment,")
    assert Image.open(out / "sheet.jpg").size[0] > 300 and (out / "classes.txt").read_text().splitlines()[0] == "background"
    assert json.loads((out / "settings.json").read_text())["spml_kit"] == 1


def test_what_is_done_is_not_repeated_and_nothing_is_mixed(trained, photos, tmp_path, capsys):
    out = tmp_path / "out"
    words = [str(trained), str(photos), "--out", str(out)]
    assert spml_predict([*words, "--dry"]) == 0 and not out.exists()
    assert spml_predict(words) == 0
    stamps = {p: p.stat().st_mtime_ns for p in (out / "labels").iterdir()}
    (out / "labels" / "scene_000007.png").unlink()
    (out / "pictures.jsonl").write_text((out / "pictures.jsonl").read_text() + '{"name": "cut sh')
    assert spml_predict(words) == 0
    assert (out / "labels" / "scene_000006.png").stat().st_mtime_ns == stamps[out / "labels" / "scene_000006.png"]
    assert bytes_of(out / "labels") == bytes_of(trained / "predictions" / "spml_head")
    assert spml_predict([*words, "--crf"]) == 2 and "other settings (crf was False, is True)" in capsys.readouterr().err
    shutil.copy(photos / "scene_000007.png", photos / "scene_000006.png")
    assert spml_predict(words) == 2 and "of another picture" in capsys.readouterr().err
    assert bytes_of(out / "labels") == bytes_of(trained / "predictions" / "spml_head")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("mine")
    assert spml_predict([str(trained), str(photos), "--out", str(tmp_path / "theirs")]) == 2
    assert [p.name for p in (tmp_path / "theirs").iterdir()] == ["thesis.txt"]


@pytest.mark.long
def test_several_processes_give_the_same(trained, photos, tmp_path):
    shutil.copy(photos / "scene_000006.png", photos / "again.png")
    assert spml_predict([str(trained), str(photos), "--out", str(tmp_path / "out"), "--workers", "2"]) == 0
    made, own = bytes_of(tmp_path / "out" / "labels"), bytes_of(trained / "predictions" / "spml_head")
    assert made == own | {"again.png": own["scene_000006.png"]}


def test_a_broken_picture_is_named_and_the_others_are_done(trained, photos, tmp_path, capsys):
    (photos / "a.png").write_bytes((photos / "scene_000006.png").read_bytes()[:2000])
    (photos / "b.jpg").write_bytes(b"")
    assert spml_predict([str(trained), str(photos), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "2 of 4 pictures could not be labelled" in said and "a.png" in said and "b.jpg" in said
    assert bytes_of(tmp_path / "out" / "labels") == bytes_of(trained / "predictions" / "spml_head")


@pytest.mark.parametrize("words, said", [
    (["nowhere", "PHOTOS"], "nowhere: no such file"),
    (["PHOTOS", "PHOTOS"], "neither model.spml nor the steps of a run in it"),
    (["RUN", "nothing"], "nothing: no such file or folder"),
    (["RUN", "nothing/*.jpg"], "nothing matches it"),
    (["RUN", "RUN/spml/*.json"], "no picture among"),
    (["RUN", "PHOTOS", "--explain"], "the head uses none"),
    (["RUN", "PHOTOS", "--scales", "0"], "from 0.1 to 10"),
    (["RUN", "PHOTOS", "RUN/predictions/*/scene_000006.png"], ""),
    (["RUN/metrics.json", "PHOTOS"], "not a readable safetensors file"),
    (["RUN/spml/head/checkpoint.safetensors", "PHOTOS"], "no model of the kit"),
], ids=str)
def test_what_cannot_be_done_is_said_in_a_line(trained, photos, tmp_path, capsys, words, said):
    words = [w.replace("RUN", str(trained)).replace("PHOTOS", str(photos)) for w in words]
    assert spml_predict([*words, "--out", str(tmp_path / "out"), *(["--dry"] if not said else [])]) == (2 if said else 0)
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_names_of_pictures(tmp_path):
    for name in ("a/1.png", "b/1.png", "b/2.png", "out/labels/9.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(8, 8)).save(tmp_path / name)
    names = lambda *words, out=None: [*picture_files([tmp_path / w for w in words], out and tmp_path / out)]
    assert names("a") == ["1"] and names("a", "b") == ["a/1", "b/1", "b/2"] and names("b/2.png") == ["2"]
    assert names("*/1.png") == ["a/1", "b/1"] and names("**/*.png", out="out") == ["a/1", "b/1", "b/2"]
    assert names("", out="out") == ["a/1", "b/1", "b/2"]
    Image.fromarray(photo(8, 8)).save(tmp_path / "b/2.jpg")
    with pytest.raises(SpmlError, match="the same name"): names("b/2.jpg", "b/2.png")


def test_a_run_without_spml_tells_which_models_there_are(trained, tmp_path):
    for name in ("cross_entropy", "full_masks"):
        (tmp_path / "run" / name).mkdir(parents=True)
        shutil.copy(trained / "model.spml", tmp_path / "run" / name)
    with pytest.raises(SpmlError, match="trained by cross_entropy, full_masks.*give .*cross_entropy"): run_model(tmp_path / "run")
    assert run_model(tmp_path / "run" / "full_masks").index is not None


@pytest.mark.parametrize("bad", [dict(by="tail"), dict(window=8), dict(scales=()), dict(explain=True)], ids=str)
def test_wanted_is_checked(bad):
    with pytest.raises(SpmlError): Wanted(**bad)


def test_python_gives_the_files(trained, photos, tmp_path):
    made = predict_pictures(trained, [photos / "scene_000006.png"], tmp_path / "out", progress=False)
    assert {n: p.relative_to(tmp_path).as_posix() for n, p in made.items()} == {"scene_000006": "out/labels/scene_000006.png"}


def test_other_settings_of_a_folder_are_other_pictures(trained, photos, tmp_path):
    deep = photos.parent / "deep"
    deep.mkdir()
    for p in sorted(photos.iterdir()): Image.fromarray(np.array(Image.open(p).convert("L")).astype(np.uint16)*16).save(deep / p.name)
    first = predict_pictures(trained, [deep], tmp_path / "out", progress=False)
    assert [*first] == sorted(p.stem for p in photos.iterdir())
    (deep / "spml_pictures.yaml").write_text("scale: [0, 65535]")
    with pytest.raises(SpmlError, match="the label map of another picture, or of an earlier"): predict_pictures(trained, [deep], tmp_path / "out", progress=False)


@pytest.mark.parametrize("own, seen", [("", 255), ("page: 0", 255), ("scale: [0, 4095]", 16)])
def test_pictures_are_scaled_as_in_training(own, seen, tmp_path, monkeypatch):
    "Unless their own folder says otherwise"
    class Model:
        card = dict(scale=[0, 255])
        def reduced(self, image, size): raise SpmlError(f"seen {image.max()}")
    Image.fromarray(np.full((4, 6), 255, np.uint16)).save(tmp_path / "a.png")
    if own: (tmp_path / "spml_pictures.yaml").write_text(own)
    with pytest.raises(SpmlError, match=f"seen {seen}$"): label_picture(Model(), tmp_path / "a.png", "a", tmp_path / "out")

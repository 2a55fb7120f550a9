"""Lists of the paper's authors: image, label map and regions of each line, and label codes above the classes."""
import json

import numpy as np
import pytest
from PIL import Image

from spml_kit.core import UNLABELLED, SpmlError
from spml_kit.data.images import SceneSet
from spml_kit.data.release_lists import Listed, listed_regions, read_list
from spml_kit.data.weak import WeakSet
from spml_kit.regions.oversegment import oversegment
from spml_kit.runs.cli import spml_run

SCENES = SceneSet(6, seed=3, size=64)
DRAWN = WeakSet(SCENES, "scribbles")
REGIONS = [oversegment(SCENES.image(i), n=12) for i in range(6)]


@pytest.fixture
def root(tmp_path):
    "Four scenes to learn from, with codes 13..253 where nobody drew; two with masks"
    for d in ("JPEGImages", "scribble", "hed", "truth"): (tmp_path/"VOC2012"/d).mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for i, n in enumerate(SCENES.names):
        labels = DRAWN.sample(i).labels
        codes = np.where(labels == UNLABELLED, rng.integers(13, 255, labels.shape), labels).astype(np.uint8)
        Image.fromarray(SCENES.image(i)).save(tmp_path/f"VOC2012/JPEGImages/{n}.png")
        Image.fromarray(codes).save(tmp_path/f"VOC2012/scribble/{n}.png")
        Image.fromarray(SCENES.mask(i)).save(tmp_path/f"VOC2012/truth/{n}.png")
        Image.fromarray((REGIONS[i]*20).astype(np.uint8)).save(tmp_path/f"VOC2012/hed/{n}.png")
        lines.append(f"/VOC2012/JPEGImages/{n}.png VOC2012/{'scribble' if i < 4 else 'truth'}/{n}.png" + f" VOC2012/hed/{n}.png"*(i < 4))
    (tmp_path/"train.txt").write_text("\n".join(lines[:4]) + "\n\n")
    (tmp_path/"val.txt").write_text("\n".join(lines[4:]))
    (tmp_path/"classes.txt").write_text("\n".join(SCENES.classes.names))
    return tmp_path


def test_a_list_is_trained_on_as_the_files_would_be(root):
    source = Listed(root, 64, train_split="train.txt", valid_split=str(root/"val.txt"))
    train, valid = source.train(), source.valid()
    weak = WeakSet(train, source.said(train, "scribbles"), source.regions(train), unlabelled="C..253")
    for i in range(4):
        s = weak.sample(i)
        assert np.array_equal(s.image, SCENES.image(i)) and np.array_equal(s.labels, DRAWN.sample(i).labels) and np.array_equal(s.regions, REGIONS[i]) and np.array_equal(s.tags, DRAWN.tags(i))
    assert not train.masks and [np.array_equal(valid.mask(i), SCENES.mask(4 + i)) for i in range(2)] == [True]*2
    part = source.__class__(root, 64, n_train=2, train_split="train.txt").train()
    assert len(part) == 2 and WeakSet(part, source.said(part, ""), source.regions(part), unlabelled="13..253").sample(0).regions.max() == 11


@pytest.mark.parametrize("line, words", [("a.png b.png c.png d.png", "line 5: 4 words"), ("VOC2012/JPEGImages/none.png", "no such file"), ("VOC2012/hed/scene_000000.png", "a second image named"), ("../x.png", "without '..'")])
def test_wrong_lines_are_named(root, line, words):
    (root/"train.txt").write_text((root/"train.txt").read_text().rstrip() + "\n" + line)
    with pytest.raises(SpmlError, match=words): read_list(root/"train.txt", root)


def test_lists_that_lack_something(root):
    for name, text, words in (("empty", "\n", "an empty list"), ("bare", "VOC2012/JPEGImages/scene_000000.png", "has no label map")):
        (root/f"{name}.txt").write_text(text)
        source = Listed(root, 64, train_split=f"{name}.txt")
        with pytest.raises(SpmlError, match=words): source.said(source.train(), "points")
    with pytest.raises(SpmlError, match="no such list"): Listed(root, 64, train_split="train").train()
    files = read_list(root/"train.txt", root)
    files["scene_000001"][2] = None
    with pytest.raises(SpmlError, match="1 of 4 lines name no regions"): listed_regions(files, "train.txt")
    assert listed_regions({n: [*f[:2], None] for n, f in files.items()}, "train.txt") is None


@pytest.mark.parametrize("codes", ["C", "C..", "c..253", "C..255", "0..253", "-1", "254..253", "21 to 253"][1:])
def test_codes_that_make_no_sense_are_refused(codes):
    with pytest.raises(SpmlError, match="'C..253'"): WeakSet(SCENES, "points", unlabelled=codes)


def test_without_the_word_such_codes_are_refused(root):
    with pytest.raises(SpmlError, match="is not a label"): WeakSet(Listed(root, 64, train_split="train.txt").train(), root/"VOC2012"/"scribble").sample(0)


@pytest.mark.long
def test_on_the_command_line(root):
    assert spml_run(["scribbles", "--data", "list", "--root", str(root), "--profile", "tiny", "-p", "train_split", "train.txt", "-p", "valid_split", "val.txt", "-p", "unlabelled", "C..253", "--out", str(root/"run")]) == 0
    said = json.loads((root/"run"/"metrics.json").read_text())
    assert said["rows"] and json.loads((root/"run"/"settings.json").read_text())["regions"] == "regions of train.txt"

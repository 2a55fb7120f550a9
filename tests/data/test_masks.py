"""Class ids from files of ids and of colours."""
import re

import json

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings, strategies as st
from PIL import Image

from conftest import FIXTURES
from test_importers import SIZE, picture
from spml_kit.core import UNLABELLED, VOID, Classes, SpmlError, check_labels, voc_palette
from spml_kit.data.images import FolderSet
from spml_kit.files import read_index_png, write_index_png
from spml_kit.data.masks import check_drawn, ids_of_colours, labelmap_near, read_labelmap, read_mask
from spml_kit.pictures import read_image
from spml_kit.runs import cli

N = 5
CLASSES = Classes(("background", "cat", "dog", "cow", "hen"))
PALETTE = CLASSES.palette
LABELMAP = {n: (37*k % 251, 91*k % 241, 17*k) for k, n in enumerate(CLASSES.names)}


def labels(seed, of=(0, 1, 2, 3, 4, UNLABELLED, VOID), size=(12, 17)):
    return np.random.default_rng(seed).choice(of, size).astype(np.uint8)


def write_labelmap(path, table):
    path.write_text("# label:color_rgb:parts:actions\n" + "".join(f"{n}:{r},{g},{b}::\n" for n, (r, g, b) in table.items()))


def reindexed(ids, palette, rng):
    "As an image editor stores it: the colours in use, in an order of its own"
    used = rng.permutation(np.unique(ids))
    new = np.zeros(256, np.uint8); new[used] = np.arange(len(used))
    im = Image.fromarray(new[ids], mode="P"); im.putpalette(palette[used].tobytes())
    return im


KINDS = { # how a program stores ids
    "palette": lambda m: _palette(m, PALETTE), "grey": Image.fromarray, "16 bit": lambda m: Image.fromarray(m.astype(np.uint16)),
    "kit's colours": lambda m: Image.fromarray(PALETTE[m]), "three channels": lambda m: Image.fromarray(np.dstack([m]*3)),
    "with alpha": lambda m: Image.fromarray(np.dstack([PALETTE[m], np.full_like(m, 255)])), "another palette": lambda m: _palette(m, FOREIGN),
    "greys": lambda m: _palette(m, np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1))}
FOREIGN = (np.arange(768).reshape(256, 3)*7 % 256).astype(np.uint8)


def _palette(m, palette):
    im = Image.fromarray(m, mode="P"); im.putpalette(palette.tobytes())
    return im


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([*KINDS]), st.sampled_from([".png", ".PNG", ".tif", ".bmp"]))
def test_every_way_to_store_ids(tmp_path_factory, seed, kind, suffix):
    if suffix == ".bmp" and kind in ("16 bit", "with alpha"): return # which that format does not hold
    ids, path = labels(seed), tmp_path_factory.mktemp("m")/f"a{suffix}"
    KINDS[kind](ids).save(path)
    assert np.array_equal(read_mask(path, CLASSES), ids)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_palettes_numbered_anew_are_read_by_colour(tmp_path_factory, seed, own):
    "With the kit's colours, and with those of a labelmap"
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("m")
    of = rng.permutation([*range(N), *([] if own else [UNLABELLED, VOID])])[:rng.integers(2, 5)]
    ids, palette = labels(seed, of), PALETTE.copy()
    if own:
        write_labelmap(folder/"labelmap.txt", LABELMAP)
        palette[:N] = [*LABELMAP.values()]
    stored = reindexed(ids, palette, rng)
    stored.save(folder/"a.png")
    moved = np.unique(ids[np.asarray(stored) != ids]) # black and white alone tell nothing
    if any(own or c not in (0, VOID) for c in moved): assert np.array_equal(read_mask(folder/"a.png", CLASSES), ids)


def test_white_is_named_where_it_may_be_unknown(tmp_path, capsys):
    "A background of white paper beside a class in the kit's colour"
    im = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    im.putpalette(np.array([[255]*3, PALETTE[1]], np.uint8).tobytes())
    im.save(tmp_path/"a.png")
    with pytest.warns(UserWarning, match="number 0 is white, which is 255"): ids = read_mask(tmp_path/"a.png", CLASSES)
    assert ids.tolist() == [[0, 1]]


def test_smoothed_palettes_are_refused(tmp_path):
    im = Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8), mode="P")
    im.putpalette(np.array([PALETTE[0], PALETTE[3], PALETTE[1], (PALETTE[3]//2)], np.uint8).tobytes())
    im.save(tmp_path/"a.png")
    with pytest.raises(SpmlError, match=r"a.png: number 1 has the colour \(0, 150, 105\), which is class 3 in the kit.s colours, and number 3 .*belongs to no class"): read_mask(tmp_path/"a.png", CLASSES)


@pytest.mark.parametrize("colours", [voc_palette(), PALETTE], ids=["VOC", "the kit"])
def test_colour_pictures_in_either_table(colours, tmp_path):
    ids = labels(0, (*range(N), VOID))
    Image.fromarray(colours[ids]).save(tmp_path/"a.png")
    assert np.array_equal(read_mask(tmp_path/"a.png", CLASSES), ids)
    Image.fromarray(voc_palette()[np.array([[254]])]).save(tmp_path/"b.png") # VOC has no unlabelled
    with pytest.raises(SpmlError, match="belongs to no class"): read_mask(tmp_path/"b.png", CLASSES)


def test_black_and_white_palettes_are_anybodys(tmp_path):
    ids = labels(0, (0, 1))
    _palette(ids, np.array([(0, 0, 0), (255, 255, 255)], np.uint8)).save(tmp_path/"a.png")
    assert np.array_equal(read_mask(tmp_path/"a.png", CLASSES), ids)


@pytest.mark.parametrize("place", [".", "..", "../.."])
def test_labelmaps_beside_or_above(tmp_path, place):
    folder = tmp_path/"x"/"y"; folder.mkdir(parents=True)
    write_labelmap(folder/place/"labelmap.txt", LABELMAP)
    ids = labels(1, range(N))
    Image.fromarray(np.array([*LABELMAP.values()], np.uint8)[ids]).save(folder/"a.png")
    assert np.array_equal(read_mask(folder/"a.png", CLASSES), ids)
    write_labelmap(folder/place/"labelmap.txt", dict(zip(reversed(LABELMAP), LABELMAP.values()))) # a table that changes is read again
    assert np.array_equal(read_mask(folder/"a.png", CLASSES), N - 1 - ids)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_colours_against_the_plain_definition(seed):
    rng = np.random.default_rng(seed)
    table = {tuple(rng.integers(0, 256, 3).tolist()): int(k) for k in rng.permutation(N)}
    rgb = np.array([*table], np.uint8)[rng.integers(0, len(table), (9, 11))]
    assert ids_of_colours(rgb, table, "a", "b").tolist() == [[table[tuple(p)] for p in row] for row in rgb.tolist()]


def test_unknown_colours_are_named(tmp_path):
    rgb = PALETTE[labels(2, range(N))]; rgb[3, 4] = 1, 2, 3; rgb[5, :2] = 9, 9, 9
    Image.fromarray(rgb).save(tmp_path/"a.png")
    with pytest.raises(SpmlError, match=r"a.png: colour \(1, 2, 3\) at \(4, 3\) belongs to no class in the kit's colours; 2 such colours cover 1.5% of the pixels; .*labelmap.txt"): read_mask(tmp_path/"a.png", CLASSES)


@pytest.mark.parametrize("text, says", [("cat:1,2\n", "has no colour"), ("cat:1,2,300\n", "has no colour"), ("cat\n", "has no colour"), ("", "no class"), ("cat:1,2,3\ncat:4,5,6\n", "repeats"), ("lion:1,2,3\n", "'lion' is not one of the classes")])
def test_broken_labelmaps(tmp_path, text, says):
    (tmp_path/"labelmap.txt").write_text(text)
    write_index_png(tmp_path/"a.png", labels(0), PALETTE)
    with pytest.raises(SpmlError, match=f"labelmap.txt: .*{says}"): read_mask(tmp_path/"a.png", CLASSES)


def test_labelmap_in_any_form(tmp_path):
    for text in ("\ufeff# x\r\n_background_:0,0,0::\r\n cat : 1, 2,3 : :\r\n", "_background_:0,0,0\ncat:1,2,3"):
        (tmp_path/"labelmap.txt").write_text(text, encoding="utf-8")
        assert read_labelmap(tmp_path/"labelmap.txt") == {"_background_": (0, 0, 0), "cat": (1, 2, 3)}


def test_transparency(tmp_path):
    ids, clear = labels(3, range(N)), labels(4, (0, 1)).astype(bool)
    for kind in ("LA", "RGBA"):
        Image.fromarray(np.dstack([ids if kind == "LA" else PALETTE[ids], np.where(clear, 0, 255).astype(np.uint8)])).save(tmp_path/"a.png")
        assert np.array_equal(read_mask(tmp_path/"a.png", CLASSES), np.where(clear, UNLABELLED, ids))
    Image.fromarray(np.dstack([PALETTE[ids], np.full_like(ids, 99)])).save(tmp_path/"a.png")
    with pytest.raises(SpmlError, match="a.png: .*half-transparent"): read_mask(tmp_path/"a.png", CLASSES)


@pytest.mark.parametrize("mode, says", [("CMYK", "mode CMYK"), ("F", "mode F")])
def test_other_pixels_are_refused(tmp_path, mode, says):
    Image.fromarray(labels(0)).convert(mode).save(tmp_path/"a.tif")
    with pytest.raises(SpmlError, match=f"a.tif: .*{says}"): read_mask(tmp_path/"a.tif", CLASSES)


def test_numbers_outside_of_the_table_are_seen(tmp_path):
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path/"a.png")
    with pytest.raises(SpmlError, match="value 300"): check_labels(read_mask(tmp_path/"a.png", CLASSES), N, "a.png")
    with pytest.raises(SpmlError, match="JPEG changes"): read_mask(tmp_path/"a.jpg", CLASSES)


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
    with pytest.raises(SpmlError, match="a.png: 3.1% of the pixels are transparent, but a true mask labels every pixel"): truth.mask(0)
    assert read_mask(tmp_path / "masks" / "a.png", two)[0, 0] == UNLABELLED  # of a weak label


def project(root, labels, name="a.png", classes="background\ncat\n"):
    picture(root / "images" / "a.jpg")
    (root / "labels").mkdir(exist_ok=True)
    (root / "classes.txt").write_text(classes)
    if isinstance(labels, str): (root / "labels" / name).write_text(labels)
    else: write_index_png(root / "labels" / name, labels)
    return root


GOOD = np.zeros(SIZE, np.uint8)
KIT = json.dumps(dict(spml_kit=1, kind="boxes", boxes=[[1, 1, 9, 9]], classes=[1]))


@pytest.mark.parametrize("labels, name, says", [(GOOD + 7, "a.png", "a.png: value 7 is not a label"), (GOOD, "b.png", "none of these files has the name of an image"), (GOOD[:9], "a.png", "a.png: .*label map is"), (KIT.replace("[1]}", "[5]}"), "a.json", "a.json: value 5 is not a label"),
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


def test_ids_of_several_pages_are_refused(tmp_path):
    one, two = Image.fromarray(GOOD), Image.fromarray(GOOD + 1)
    for name in ("a.tif", "a.png"):
        one.save(tmp_path / name, save_all=True, append_images=[two])
        with pytest.raises(SpmlError, match=f"{name}: holds 2 pages, where one is expected"): read_mask(tmp_path / name, CLASSES)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_smallest_number_is_white_is_refused(dtype, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", labels(0).astype(dtype), photometric="miniswhite")
    with pytest.raises(SpmlError, match="a.tif: a TIFF in which the smallest number is white"): read_mask(tmp_path / "a.tif", CLASSES)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_labels_are_upright_as_their_pictures_are(orientation, suffix, tmp_path):
    "A program that keeps a camera's EXIF stores picture and labels alike"
    stored, exif = labels(1, of=(0, 1, 2)), Image.Exif()
    exif[0x0112] = orientation
    _palette(stored, PALETTE).save(tmp_path / f"a.{suffix}", exif=exif)
    Image.fromarray(PALETTE[stored]).save(tmp_path / f"p.{suffix}", exif=exif)
    np.testing.assert_array_equal(PALETTE[read_mask(tmp_path / f"a.{suffix}", CLASSES)], read_image(tmp_path / f"p.{suffix}"))
    np.testing.assert_array_equal(read_index_png(tmp_path / f"a.{suffix}"), read_mask(tmp_path / f"a.{suffix}", CLASSES))


def test_a_label_map_on_its_side_is_told_so():
    with pytest.raises(SpmlError, match="a.png: label map is 12x17, its image 17x12 .*it is rotated"): check_labels(labels(0), 5, "a.png", (17, 12))
    with pytest.raises(SpmlError) as e: check_labels(labels(0), 5, "a.png", (17, 13))
    assert "side" not in str(e.value)


@pytest.mark.parametrize("name, says", [("a.gif", "a.gif: not a label file; labels are PNG, TIFF or BMP files .*convert it"), ("a.txt", "a.txt: not a label file; labels are .*labels looks like YOLO: spml_import '.*/my p/labels' --out PROJECT"), ("a.jpg", "a.jpg: JPEG changes")])
def test_other_files_among_labels_are_named(name, says, tmp_path):
    root = project(tmp_path / "my p", "1 .5 .5 .2 .2\n", name)
    with pytest.raises(SpmlError, match=says): check_drawn(root)


def test_pictures_that_nobody_drew_on_are_opened_too(tmp_path):
    root = project(tmp_path / "p", GOOD)
    picture(root / "images" / "b.png")
    check_drawn(root)
    (root / "images" / "b.png").write_bytes(b"cut")
    with pytest.raises(SpmlError, match="b.png: not a readable image"): check_drawn(root)

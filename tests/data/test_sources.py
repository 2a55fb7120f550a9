"""Data where well-known data sets and people keep them, through `Source`; tiny folders in each layout."""
import numpy as np
import pytest
from PIL import Image

from spml_kit.core import UNLABELLED, VOID, SpmlError
from spml_kit.files import write_index_png
from spml_kit.data.annotations import Points
from spml_kit.data.formats import write_annotation
from spml_kit.data.layouts import CITYSCAPES
from spml_kit.data.sources import SOURCES, named_source
from spml_kit.data.weak import WeakSet, check_weak_set

HW = 24, 32


def photo(seed): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*HW, 3), dtype=np.uint8))


def numbers(seed, top): return np.random.default_rng(seed).choice([*range(top + 1)], HW).astype(np.uint8)


def save(path, im):
    path.parent.mkdir(parents=True, exist_ok=True)
    (im if isinstance(im, Image.Image) else Image.fromarray(im)).save(path)


@pytest.fixture
def cityscapes(tmp_path):
    for split, cities in dict(train=("aachen", "bonn"), val=("ulm",), test=("bern",)).items():
        for k, city in enumerate(cities):
            name = f"{split}/{city}/{city}_00000{k}_000019"
            save(tmp_path/"leftImg8bit"/f"{name}_leftImg8bit.png", photo(k))
            save(tmp_path/"gtFine"/f"{name}_gtFine_labelIds.png", numbers(k, 33))
            save(tmp_path/"gtFine"/f"{name}_gtFine_color.png", photo(k)); save(tmp_path/"gtFine"/f"{name}_gtFine_instanceIds.png", numbers(k, 33))
    return tmp_path


def test_cityscapes(cityscapes):
    source = named_source("cityscapes")(cityscapes)
    train, valid = source.train(masks=True), source.valid()
    assert train.names == ["aachen/aachen_000000_000019", "bonn/bonn_000001_000019"] and len(valid) == 1 and len(train.classes) == 19
    official = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    want = np.array([official.get(v, VOID) for v in range(256)])
    for i in range(2): assert np.array_equal(train.mask(i), want[numbers(i, 33)])
    assert not source.train().masks and not named_source("cityscapes")(cityscapes, valid_split="test").valid().masks
    weak = WeakSet(train, "full")
    assert check_weak_set(weak)["images"] == 2 and source.simulates("points")
    some = named_source("cityscapes")(cityscapes, classes=["road", "car"]).valid()
    assert np.array_equal(some.mask(0), np.select([numbers(0, 33) == 7, numbers(0, 33) == 26], [0, 1], VOID))


def test_cityscapes_as_train_ids(cityscapes):
    for p in [*cityscapes.rglob("*_labelIds.png")]:
        save(p.with_name(p.name.replace("labelIds", "labelTrainIds")), np.where(numbers(1, 19) == 19, VOID, numbers(1, 19)).astype(np.uint8)); p.unlink()
    assert np.array_equal(named_source("cityscapes")(cityscapes).valid().mask(0), np.where(numbers(1, 19) == 19, VOID, numbers(1, 19)))


def test_cityscapes_names_what_is_wrong(cityscapes):
    valid = named_source("cityscapes")(cityscapes, size=8).valid()
    path = next((cityscapes/"gtFine"/"val").rglob("*labelIds.png"))
    save(path, np.full(HW, 40, np.uint8))
    with pytest.raises(SpmlError, match="ulm_000000_000019_gtFine_labelIds.png: value 40 is not a label"): valid.mask(0)
    with pytest.raises(SpmlError, match="vall: no such folder, or no file"): named_source("cityscapes")(cityscapes, valid_split="vall").valid()
    next((cityscapes/"gtFine"/"train"/"bonn").rglob("*labelIds.png")).unlink()
    with pytest.raises(SpmlError, match="bonn_000001_000019_gtFine_labelIds.png: no such mask"): named_source("cityscapes")(cityscapes).train()


def test_ade20k(tmp_path):
    for folder, n in dict(training=3, validation=2).items():
        for k in range(n):
            save(tmp_path/"images"/folder/f"ADE_{k:08}.jpg", photo(k)); save(tmp_path/"annotations"/folder/f"ADE_{k:08}.png", numbers(k, 150))
    source = named_source("ade20k")(tmp_path, n_train=2)
    train = source.train(masks=True)
    assert len(train) == 2 and len(source.valid()) == 2 and train.classes.names[0] == "class 1"
    assert np.array_equal(source.valid().mask(1), np.where(numbers(1, 150) == 0, VOID, numbers(1, 150) - 1.).astype(np.uint8))
    rows = ["Idx\\tRatio\\tTrain\\tVal\\tStuff\\tName".replace("\\t", "\t")] + [f"{k}\t0.1\t1\t1\t0\t{'door' if k in (15, 59) else f'thing{k}'}, other" for k in range(1, 151)]
    (tmp_path/"objectInfo150.txt").write_text("\n".join(rows))
    names = named_source("ade20k")(tmp_path).valid().classes.names
    assert names[0] == "thing1" and names[14] == "door 15" and names[58] == "door 59"
    (tmp_path/"annotations"/"validation"/"ADE_00000001.png").unlink()
    with pytest.raises(SpmlError, match="ADE_00000001.png: no such mask"): named_source("ade20k")(tmp_path).valid()


@pytest.fixture
def listed(tmp_path):
    for k in range(4):
        save(tmp_path/"photos"/f"{k}.jpg", photo(k))
        weak = np.full(HW, UNLABELLED, np.uint8); weak[2:4], weak[9:11, 5:20] = 0, 1
        if k == 1: write_annotation(tmp_path/"drawn"/"1.json", Points([[4, 4], [20, 9]], [0, 1]))
        else: write_index_png(tmp_path/"drawn"/f"{k}.png", weak if k < 2 else (numbers(k, 1)), np.zeros((256, 3), np.uint8))
    (tmp_path/"classes.txt").write_text("background\ncat\n")
    return tmp_path


ROWS = [("photos/0.jpg", "drawn/0.png", "train"), ("photos/1.jpg", "drawn/1.json", "train"), ("photos/2.jpg", "drawn/2.png", "val"), ("photos/3.jpg", "drawn/3.png", "val")]


def write_csv(path, rows, order=(0, 1, 2), by=",", head=("image", "label", "split"), mark="", end="\n"):
    path.write_bytes((mark + end.join(by.join(row[k] for k in order) for row in (head, *rows)) + end).encode())


@pytest.mark.parametrize("form", [{}, dict(by=";"), dict(by="\t", end="\r\n"), dict(mark="\ufeff", head=("Image", "LABEL", "Split")), dict(order=(2, 0, 1))])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_table_of_files(listed, form, absolute):
    rows = [(str(listed/a) if absolute else a, b, c.upper() if form else c) for a, b, c in ROWS]
    write_csv(listed/"l.csv", rows, **form)
    source = named_source("csv")(listed/"l.csv")
    train, valid = source.train(), source.valid()
    assert train.names == ["0", "1"] and valid.names == ["2", "3"] and not train.masks and valid.masks and train.classes.names == ("background", "cat")
    assert np.array_equal(valid.mask(1), numbers(3, 1)) and not source.simulates("scribbles")
    weak = WeakSet(train, source.said(train, "scribbles"))
    report = check_weak_set(weak)
    assert report["images"] == 2 and report["pixels"]["cat"] >= 30 and np.flatnonzero(weak.sample(1).tags).tolist() == [0, 1]


def test_without_a_split_labels_tell(listed):
    write_csv(listed/"l.csv", [(a, b if k < 2 else "", "") for k, (a, b, _) in enumerate(ROWS)])
    source = named_source("csv")(listed/"l.csv")
    assert source.train().names == ["0", "1"] and source.valid().names == ["2", "3"] and not source.valid().masks


@pytest.mark.parametrize("rows, says", [([("photos/9.jpg", "", "val")], "line 2: .*photos/9.jpg: no such file"), ([("photos/0.jpg", "drawn/9.png", "train")], "line 2: .*drawn/9.png: no such file"), ([("", "drawn/0.png", "train")], "line 2: no image"),
    ([("photos/0.jpg", "", "train")], "line 2: .*has no label"), ([("photos/0.jpg", "drawn/0.png", "trian")], "split 'trian' is neither 'train' nor 'val'"), ([ROWS[0], ROWS[0]], "line 3: .*listed twice"), ([ROWS[2]], "no row for training")])
def test_broken_tables(listed, rows, says):
    write_csv(listed/"l.csv", rows)
    with pytest.raises(SpmlError, match=f"l.csv.*{says}"): named_source("csv")(listed/"l.csv").train()


def test_tables_that_are_none(listed):
    (listed/"l.csv").write_text("file,mask\na,b\n")
    with pytest.raises(SpmlError, match=r"must name the columns image, label and split; it is \['file', 'mask'\]"): named_source("csv")(listed/"l.csv").train()
    with pytest.raises(SpmlError, match="no such file; give the table"): named_source("csv")(listed)
    write_csv(listed/"l.csv", ROWS); (listed/"classes.txt").unlink()
    with pytest.raises(SpmlError, match="classes.txt: no such file"): named_source("csv")(listed/"l.csv").train()
    assert named_source("csv")(listed/"l.csv", classes=["a", "b"]).train().classes.names == ("a", "b")


def test_nested_folders(tmp_path):
    "images/city/a.jpg, labels/city/a.png, masks/city/a.png: a name is city/a"
    for k, name in enumerate(("bonn/a", "bonn/b", "ulm/a", "ulm/c")):
        save(tmp_path/"images"/f"{name}.JPG".replace("JPG", "jpg"), photo(k))
        if k < 2: write_index_png(tmp_path/"labels"/f"{name}.png", np.where(numbers(k, 1) == 1, 1, 0))
        else: write_index_png(tmp_path/"masks"/f"{name}.png", numbers(k, 1))
    (tmp_path/"classes.txt").write_text("background\ncat\n")
    source = named_source("folder")(tmp_path)
    train, valid = source.train(), source.valid()
    assert train.names == ["bonn/a", "bonn/b"] and valid.names == ["ulm/a", "ulm/c"] and np.array_equal(valid.mask(1), numbers(3, 1))
    assert np.array_equal(WeakSet(train, source.said(train, "scribbles")).sample(1).labels, numbers(1, 1))


def test_every_source_has_a_name():
    assert {"scenes", "voc", "folder", "cityscapes", "ade20k", "csv"} <= {*SOURCES} and len(CITYSCAPES) == 19
    for name in SOURCES: named_source(name)


@pytest.mark.parametrize("change", [lambda b: b"\n\n" + b, lambda b: b.replace(b"\n", b"\r"), lambda b: b.replace(b"/", b"\\"), lambda b: b"\xef\xbb\xbf" + b.replace(b"\n", b"\r\n"), lambda b: b.decode().encode("utf-16")], ids=["blank lines", "old Mac", "backslashes", "Windows", "UTF-16"])
def test_tables_as_programs_write_them(listed, change):
    write_csv(listed/"l.csv", ROWS)
    (listed/"l.csv").write_bytes(change((listed/"l.csv").read_bytes()))
    source = named_source("csv")(listed/"l.csv")
    assert source.train().names == ["0", "1"] and source.valid().names == ["2", "3"] and source.every().names == ["0", "1", "2", "3"]
    assert not source.every().masks and source.every().image(3).shape == source.valid().image(1).shape


def test_a_table_that_is_no_csv_is_refused(listed):
    (listed/"l.csv").write_text('image,label,split\n"' + "x"*200_000 + '",,val\n')
    with pytest.raises(SpmlError, match="l.csv: not CSV .field larger"): named_source("csv")(listed/"l.csv").train()


def test_hidden_files_of_data_sets_are_none(cityscapes):
    for p in [*cityscapes.rglob("*.png")]: (p.parent/f"._{p.name}").write_bytes(b"\0\5\x16\7")
    source = named_source("cityscapes")(cityscapes)
    assert not any("._" in n for n in source.train().names + source.valid().names)

"""Which file belongs to which image, and what lists say."""
import os
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from test_importers import picture
from spml_kit.core import SpmlError
from spml_kit.data.listing import IMAGE_SUFFIXES, MASK_SUFFIXES, check_project, class_table_near, drawn_images, files_by_name, find_files, images_by_name, name_of, read_names, read_table_names, table_line

stems = st.text(st.sampled_from("abcAB01_- .é\u0301üñ漢"), min_size=1, max_size=8).map(lambda s: "x" + s.strip(" .") + "y")
FORMS = {"NFC": lambda s: unicodedata.normalize("NFC", s), "NFD": lambda s: unicodedata.normalize("NFD", s)}


@settings(max_examples=120, deadline=None)
@given(stems, st.sampled_from(["NFC", "NFD"]), st.sampled_from(["NFC", "NFD"]), st.sampled_from([".png", ".PNG", ".Tif"]), st.sampled_from(["", "sub/", "a/b/"]), st.sampled_from(["", ".jpg", ".JPEG"]))
def test_a_file_is_found_however_it_is_spelt(tmp_path_factory, stem, form, other, suffix, sub, inner):
    "Unicode form, case of the ending, subfolder, and cat.jpg.png"
    folder = tmp_path_factory.mktemp("f")
    path = folder/sub/f"{FORMS[form](stem)}{inner}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True); path.touch()
    name = FORMS["NFC"](f"{sub}{stem}")
    assert name_of(path, folder) == name and files_by_name(folder, deep=True) == {name: [path]}
    assert find_files(folder, name, MASK_SUFFIXES) == [path]
    assert find_files(folder, name + "z", MASK_SUFFIXES) == [] == find_files(folder, name, [".json"])


def test_new_files_are_found_at_once(tmp_path):
    assert find_files(tmp_path, "b", [".png"]) == []
    for k, name in enumerate(("a.PNG", "b.PNG", "b.Tif")):
        (tmp_path/name).touch()
        os.utime(tmp_path, ns=(k*10**9, k*10**9)) # clocks of file systems are coarse
    assert [p.name for p in find_files(tmp_path, "b", MASK_SUFFIXES)] == ["b.PNG", "b.Tif"]


@pytest.mark.parametrize("first, second", [("a.jpg", "a.png"), ("a.jpg", "a.JPG"), ("caf\xe9.jpg", "cafe\u0301.jpg"), ("s/a.jpg", "s/a.tif")])
def test_two_images_of_one_name(tmp_path, first, second):
    for name in (first, second):
        (tmp_path/name).parent.mkdir(exist_ok=True); (tmp_path/name).touch()
    with pytest.raises(SpmlError, match="another image has the same stem.*rename one"): images_by_name(tmp_path)


def test_what_is_listed(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt", ".a.jpg", "classes.txt"): (tmp_path/name).touch()
    (tmp_path/"sub").mkdir(); (tmp_path/"sub"/"c.jpg").touch(); (tmp_path/".git").mkdir(); (tmp_path/".git"/"d.jpg").touch()
    assert [*images_by_name(tmp_path)] == ["a", "b"] # subfolders only where there is nothing else
    assert [*files_by_name(tmp_path)] == ["a", "b", "notes"] and [*files_by_name(tmp_path, IMAGE_SUFFIXES, deep=True)] == ["a", "b", "sub/c"]
    (tmp_path/"a.PNG").unlink(); (tmp_path/"b.jpg").unlink()
    assert images_by_name(tmp_path) == {"sub/c": tmp_path/"sub"/"c.jpg"}
    (tmp_path/"empty").mkdir()
    with pytest.raises(SpmlError, match="no images here"): images_by_name(tmp_path/"empty")


LISTS = { # as published, and as people write them
    "plain": ("a\nb\n", ["a", "b"]), "IRN": ("/JPEGImages/a.jpg /SegmentationClassAug/a.png\n/JPEGImages/b.jpg /SegmentationClassAug/b.png\n", ["a", "b"]),
    "release": ("JPEGImages/a.jpg\tSegmentationClassAug/a.png\nJPEGImages/b.jpg\tsegcls/b.png\n", ["a", "b"]), "commas": ("a.jpg,a.png\nb.JPG, b.png", ["a", "b"]),
    "Main": ("a  1\nb  0\nc -1\n", ["a", "b"]), "counted": ("a 1\nb 2\n", ["a", "b"]), "Windows": ("\ufeffC:\\data\\VOC2012\\JPEGImages\\a.jpg\r\n\r\nb.jpg\r\n", ["a", "b"]),
    "absolute": ("/data/VOC2012/JPEGImages/a.jpg\n./b.png\n", ["a", "b"]), "comment": ("# mine\na\n\nb", ["a", "b"]), "nested": ("city/a\nJPEGImages/city/b.jpg", ["city/a", "city/b"]),
    "dots": ("v1.5\nb.2.jpg", ["v1.5", "b.2"]), "leads out": ("../JPEGImages/a\n", ["../JPEGImages/a"]), "accents": ("cafe\u0301", ["caf\xe9"])}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_as_they_occur(tmp_path, kind):
    text, names = LISTS[kind]
    (tmp_path/"l.txt").write_text(text, encoding="utf-8", newline="")
    assert read_names(tmp_path/"l.txt") == names


def test_a_name_twice(tmp_path):
    (tmp_path/"l.txt").write_text("a\nJPEGImages/a.jpg x\nb\n")
    with pytest.raises(SpmlError, match="l.txt: 1 name occurs more than once, the first is a"): read_names(tmp_path/"l.txt")


def test_a_project_step_by_step(tmp_path):
    "Each refusal names the next thing to do"
    def refused(*words):
        with pytest.raises(SpmlError) as e: check_project(tmp_path)
        assert all(w in str(e.value) for w in words), e.value
    refused("no folder images/ in it", "put the pictures there")
    (tmp_path/"images").mkdir()
    for _ in range(2):
        refused("labels: no", "holds no picture", f"spml_annotate {tmp_path} --classes background", f"spml_import FILE --images {tmp_path}/images --out NEW_FOLDER", "label PNG")
        (tmp_path/"labels").mkdir(exist_ok=True)
    (tmp_path/"labels"/"a.png").touch()
    refused("classes.txt: no such file", "background first")
    (tmp_path/"labelmap.txt").write_text("background:0,0,0\ncat:1,1,1\n")
    check_project(tmp_path)
    assert class_table_near(tmp_path/"images", tmp_path) == tmp_path/"labelmap.txt" and class_table_near(tmp_path/"images") is None


quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
NAME = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=6)
NAMES = st.lists(st.lists(NAME, min_size=1, max_size=3).map(" ".join), min_size=1, max_size=6, unique=True)


@given(NAMES)
@quick
def test_a_table_is_read_as_it_was_written(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("t") / "classes.txt"
    path.write_text("\n".join(map(table_line, names)), encoding="utf-8")
    assert read_table_names(path) == names


@pytest.mark.parametrize("text, names", [
    ("0 background\n1 cat", "background cat"), ("0: background\n1: cat", "background cat"), ("1,cat\n0,background", "background cat"), ("background,0\ncat,1", "background cat"), ("background 0\ncat 1", "background cat"),
    ("id,name\n0,background\n1,cat", "background cat"), ("name;id\ncat;1\nbackground;0", "background cat"), ("label,class\n0,background\n1,cat", None), ("background  # nothing\ncat # pet", "background cat"), ("background\n1 cat\n2 dog", "background cat dog"),
    ("0. background\n1) cat", "background cat"), ("name,r,g,b\nbackground,0,0,0\ncat,1,2,3", "background cat"), ("'background'\n\"cat\"", "background cat"), ("__ignore__\n_background_\ncat #1", None), ("0 - background\n1 - cat", "background cat")])
def test_forms_of_tables(text, names, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    found = read_table_names(tmp_path / "classes.txt")
    if names: assert found == names.split()
    elif text[0] == "_": assert found == ["_background_", "cat #1"]
    else: assert found == ["0", "1"] or found == ["background", "cat"]


@pytest.mark.parametrize("text", ["1 background\n2 cat", "background\ncat\n2 wheeler", "background\n2 wheeler\ncar", "cat,255,0,0\ndog,0,255,0", "background, cat, dog", "cat #pet", "0 background\n2 cat", "id,name\n0,background\n1,cat,x", "id,name\n1,background\n2,cat", "background\t0\ncat\t7"])
def test_tables_that_could_mean_two_things_are_refused(text, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(SpmlError, match="classes.txt: line .*Quotes keep a name"): read_table_names(tmp_path / "classes.txt")


@pytest.mark.parametrize("line, name", [('"my cat.jpg"', "my cat"), ("'my cat.jpg' 1", "my cat"), ("my cat.jpg", "my cat"), ("my cat", "my cat"), ("my cat.jpg my cat.png", "my cat"), ("sub/my dog.png, x.png", "sub/my dog"), ("a a.jpg", "a"), ("a JPEGImages/a.jpg", "a"), ("a 1", "a"), ("./my cat.jpg", "my cat"), ("/data/JPEGImages/my cat.jpg /data/SegmentationClass/my cat.png", "my cat")])
def test_names_with_blanks_in_lists(line, name, tmp_path):
    for n in ("my cat.jpg", "a.jpg", "sub/my dog.png"): picture(tmp_path / n)
    (tmp_path / "l.txt").write_text(line + "\n")
    assert read_names(tmp_path / "l.txt", tmp_path) == [name]


def test_lists_of_main_with_blanks(tmp_path):
    for n in ("my cat.jpg", "a.jpg"): picture(tmp_path / n)
    (tmp_path / "l.txt").write_text('my cat 1\na -1\n"b c" 0\n')
    assert read_names(tmp_path / "l.txt", tmp_path) == ["my cat", "b c"]
    (tmp_path / "l.txt").write_text('"my cat\n')
    with pytest.raises(SpmlError, match="l.txt: line .*a quote that does not end"): read_names(tmp_path / "l.txt")


@pytest.mark.parametrize("at", ["images", "images/x"])
def test_a_link_that_leads_back_is_followed_once(at, tmp_path, recwarn):
    picture(tmp_path/at/"a.png")
    os.symlink(tmp_path/"images", tmp_path/at/"loop")
    picture(tmp_path/"store"/"b.png")
    if at != "images": os.symlink(tmp_path/"store", tmp_path/"images"/"y") # elsewhere
    assert [*images_by_name(tmp_path/"images")] == (["a"] if at == "images" else ["x/a", "y/b"]) and not recwarn


def test_what_systems_leave_is_no_label(tmp_path):
    for name in ("a.png", "Thumbs.db", "desktop.ini", ".DS_Store", "._a.png"): (tmp_path/name).touch()
    assert [*files_by_name(tmp_path, deep=True)] == ["a"]


@pytest.mark.parametrize("image, label", [("x/a.png", "a.png"), ("a.png", "x/a.png"), ("x/a.png", "y/a.png")])
def test_a_label_in_another_subfolder_is_told_where_its_image_is(image, label, tmp_path):
    picture(tmp_path/"images"/image); picture(tmp_path/"labels"/label)
    with pytest.raises(SpmlError, match=f"the image of this name is {image[:-4]}: move the label into the same subfolder"): drawn_images(tmp_path)


def test_told_commands_can_be_typed(tmp_path):
    root = tmp_path/"my 100% project"
    (root/"images").mkdir(parents=True)
    with pytest.raises(SpmlError, match=f"spml_annotate '{root}'.*--images '{root}/images'"): check_project(root)


def test_a_folder_of_nothing_but_hidden_files_holds_no_labels(tmp_path):
    picture(tmp_path/"images"/"a.png")
    (tmp_path/"labels").mkdir(); (tmp_path/"labels"/".DS_Store").touch(); (tmp_path/"classes.txt").write_text("background\ncat\n")
    with pytest.raises(SpmlError, match="labels: no file in it; nothing has been drawn yet"): check_project(tmp_path)


def test_the_folder_of_images_is_told_from_the_project(tmp_path):
    picture(tmp_path/"images"/"a.png")
    with pytest.raises(SpmlError, match=f"images: no folder images/ in it.*Give the folder that holds it, {tmp_path}$"): check_project(tmp_path/"images")

"Reading and writing: whole or absent, refused by name, inside its folder, never somebody else's."
import errno
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from spml_kit import files
from spml_kit.core import SpmlError
from spml_kit.files import (atomic_path, check_output, claim_folder, holds_ids, inside, is_ours, load_tensors, read_bytes, read_index_png,
    read_json, read_lines, read_text, save_tensors, write_index_png, write_json, written_by)
from spml_kit.pictures import read_image

READERS = dict(bytes=read_bytes, text=read_text, lines=read_lines, json=read_json, image=read_image, index=read_index_png, tensors=load_tensors, by=written_by)
each_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@each_reader
@pytest.mark.parametrize("make, says", [
    (lambda p: None, "no such file"),
    (lambda p: p.mkdir(), "this is a folder"),
    (os.mkfifo, "a pipe or a device"),
    (lambda p: p.symlink_to(p.name), "cannot be opened"),
], ids=["absent", "folder", "pipe", "loop"])
def test_what_is_no_file_is_refused_at_once(tmp_path, read, make, says):
    make(tmp_path / "x")
    start = time.monotonic()
    with pytest.raises(SpmlError, match=f"x: .*{says}"): read(tmp_path / "x")
    assert time.monotonic() - start < 2


@each_reader
def test_names_too_long_and_devices_are_refused(read):
    with pytest.raises(SpmlError, match="cannot be opened"): read("n"*300)
    with pytest.raises(SpmlError, match="/dev/zero: .*device"): read("/dev/zero")


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=30))
def test_names_never_leave_their_folder(name):
    base = Path("/folder")
    try: path = inside(base, name, ".png")
    except SpmlError as e: assert repr(name)[1:-1] in repr(str(e)) or not name
    else: assert Path(os.path.normpath(path)).is_relative_to(base) and "\0" not in name


@pytest.mark.parametrize("name", ["2007_000032", "a b", "día", "sub/a", "12:30", "a..b", ".hidden", "x" * 250])
def test_ordinary_names_pass(name): assert inside("f", name, ".png") == Path("f") / f"{name}.png"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(min_codepoint=33, exclude_characters="#\x85\xa0\u2028\u2029", exclude_categories=["Cs", "Zs", "Cc"]), min_size=1), min_size=1),
       st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), st.sampled_from(["\n", "\r\n"]))
def test_lists_are_read_from_every_editor(tmp_path_factory, names, code, end):
    path = tmp_path_factory.mktemp("lists") / "a.txt"
    names = [n.lstrip("\ufeff") or "a" for n in names]
    path.write_bytes(end.join(["# a comment", "", *names]).encode(code))
    assert read_lines(path) == names


def test_utf16_without_its_mark_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("background\ncat".encode("utf-16-le"))
    with pytest.raises(SpmlError, match="a.txt: holds zero bytes"): read_lines(tmp_path / "a.txt")


@pytest.mark.parametrize("text", ["[]", "5", '"x"', "null", "true", "1e9", "{", "", "\x00", "[" * 100_000, "9" * 5000, "{'a': 1}"])
def test_json_of_another_shape_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SpmlError, match="a.json: "): read_json(tmp_path / "a.json")


def test_a_failed_write_names_its_file_and_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(OSError) as e:
        with atomic_path(tmp_path / "a.json") as tmp:
            tmp.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert e.value.errno == errno.ENOSPC and e.value.filename == str(tmp_path / "a.json")
    assert read_json(tmp_path / "a.json") == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("number", ["os error 28", "Os { code: 28, kind: StorageFull }"])
def test_a_full_disk_under_safetensors_is_an_oserror(tmp_path, monkeypatch, number):
    def full(*args, **kwargs): raise files.SafetensorError(f"Error while serializing: IoError({number})")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError) as e: save_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(2)})
    assert (e.value.errno, e.value.filename) == (errno.ENOSPC, str(tmp_path / "a.safetensors"))


def test_only_leftovers_of_dead_processes_go(tmp_path, monkeypatch):
    here, dead = files._machine(), 2**22 + 12345 # above the largest process number of Linux
    names = {f".spml_kit.{here}.{dead}.a.png": False, f".spml_kit.{here}.{os.getpid()}.a.png": True, f".spml_kit.00000000.{dead}.a.png": True, ".spml_kit.note": True, ".spml_kit.a.b.c.d": True,
             ".x.safetensors.016yyq38": True, "a.png": True}
    for name in names: (tmp_path / name).write_bytes(b"x")
    old = f".spml_kit.00000000.{dead}.old.png" # of another machine, two days old
    (tmp_path / old).write_bytes(b"x")
    os.utime(tmp_path / old, (time.time() - 2*86400,)*2)
    monkeypatch.setattr(files, "_cleared", set())
    write_json(tmp_path / "b.json", {})
    assert {p.name for p in tmp_path.iterdir()} == {n for n, stays in names.items() if stays} | {"b.json"}


@pytest.mark.parametrize("name", ["a.png", "settings.json", "sub/a.txt"])
def test_folders_of_others_are_refused_and_stay(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"editor": 1}')
    for claim in (check_output, lambda f: claim_folder(f, {"seed": 1})):
        with pytest.raises(SpmlError, match="nothing was changed"): claim(tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / name] and (tmp_path / name).read_text() == '{"editor": 1}'


@pytest.mark.parametrize("record", [dict(n=30, threshold=None, contours="c", max_size=None), dict(kind="prototypes", images=3, per=2)])
def test_records_of_earlier_versions_hold(tmp_path, record):
    (tmp_path / "settings.json").write_text(json.dumps(record))
    assert is_ours(tmp_path)
    claim_folder(tmp_path, record)
    with pytest.raises(SpmlError, match="other settings"): claim_folder(tmp_path, record | {"more": 1})


def test_new_empty_and_hidden_are_no_obstacle(tmp_path):
    (tmp_path / ".DS_Store").write_bytes(b"x")
    for folder in (tmp_path, tmp_path / "new"):
        check_output(folder)
        claim_folder(folder, {"seed": 1})
        assert is_ours(folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(SpmlError, match="this is a file"): check_output(tmp_path / "file")


def test_pictures_in_place_of_maps_are_left_alone(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(SpmlError, match="a.png: a picture with colours, which the kit did not write"): holds_ids(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    write_index_png(tmp_path / "c.png", np.zeros((2, 2), int), by="somebody")
    assert [holds_ids(tmp_path / f"{n}.png") for n in "bcd"] == [False, True, False] and written_by(tmp_path / "c.png") == "somebody"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, dtype, value):
    w = torch.zeros(3, 4, dtype=dtype)
    save_tensors(tmp_path / "a.safetensors", {"fine": torch.arange(3), "w": w})
    assert load_tensors(tmp_path / "a.safetensors")[0]["w"].dtype == dtype
    w[1, 2] = value
    save_tensors(tmp_path / "a.safetensors", {"fine": torch.arange(3), "w": w})
    with pytest.raises(SpmlError, match=r"a.safetensors: 1 of 12 numbers of 'w' are not finite"): load_tensors(tmp_path / "a.safetensors")

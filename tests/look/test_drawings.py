"""Drawings and their files, the palette, and labels that spread."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spml_kit.core import UNLABELLED
from spml_kit.data.images import FolderSet
from spml_kit.data.weak import WeakSet
from spml_kit.look.drawings import KEYS, Mark, drawn_labels, prepare_spread, read_drawing, spread_labels, to_annotations, to_marks, write_drawing
from test_annotate import CLASSES, SIZE

inside = st.tuples(st.integers(0, 10 * (SIZE[1] - 1)).map(lambda v: v / 10), st.integers(0, 10 * (SIZE[0] - 1)).map(lambda v: v / 10))
ids = st.integers(0, 2)
boxes = st.tuples(st.integers(0, 50), st.integers(0, 34), st.integers(1, 5), st.integers(1, 5)).map(lambda b: ((b[0], b[1]), (b[0] + b[2], b[1] + b[3])))
any_mark = st.one_of(st.builds(Mark, st.just("scribbles"), ids, st.lists(inside, min_size=1, max_size=5)), st.builds(Mark, st.just("points"), ids, st.tuples(inside)),
                     st.builds(Mark, st.just("boxes"), ids, boxes), st.builds(Mark, st.just("tags"), ids))


@settings(max_examples=40, deadline=None)
@given(st.lists(any_mark, max_size=6), st.integers(1, 9))
def test_a_drawing_comes_back_from_its_files(tmp_path_factory, marks, brush):
    folder, annotations = tmp_path_factory.mktemp("drawing"), to_annotations(marks, brush)
    labels = drawn_labels(annotations, SIZE)
    write_drawing(folder, "a", annotations, labels)
    back = read_drawing(folder, "a", 3, SIZE)
    assert back == annotations
    again, width = to_marks(back)
    assert to_annotations(again, width or brush) == annotations
    assert len([p for p in (folder / "labels").glob("a.*")] if annotations else []) == bool(annotations)


@settings(max_examples=40, deadline=None)
@given(st.lists(any_mark, min_size=1, max_size=6))
def test_training_reads_what_was_drawn(tmp_path_factory, marks):
    folder = tmp_path_factory.mktemp("weak")
    (folder / "images").mkdir()
    Image.new("RGB", SIZE[::-1]).save(folder / "images" / "a.png")
    annotations = to_annotations(marks)
    labels = drawn_labels(annotations, SIZE)
    write_drawing(folder, "a", annotations, labels)
    sample = WeakSet(FolderSet(folder / "images", classes=CLASSES), folder / "labels").sample(0)
    np.testing.assert_array_equal(sample.labels, labels)
    for kind, ann in annotations.items():
        only = WeakSet(FolderSet(folder / "images", classes=CLASSES), folder / kind).sample(0)
        np.testing.assert_array_equal(only.labels, ann.to_labels(SIZE))
        if kind in ("tags", "boxes"):
            assert only.tags[ann.classes].all()


def test_exact_marks_win():
    annotations = to_annotations([Mark("points", 2, [(10, 10)]), Mark("scribbles", 1, [(5, 10), (20, 10)]), Mark("boxes", 1, [(4, 4), (30, 30)]), Mark("tags", 0)])
    labels = drawn_labels(annotations, SIZE)
    assert (labels[10, 10], labels[10, 18], labels[20, 20], labels[35, 5]) == (2, 1, UNLABELLED, 0)


def test_keys():
    assert len(set(KEYS)) == len(KEYS) and not set(KEYS) & set("spbev")


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (480, 640)], ids=str)
def test_any_size_can_be_spread(size):
    rng = np.random.default_rng(0)
    image, labels = rng.integers(0, 255, (*size, 3), dtype=np.uint8), rng.choice([0, 1, UNLABELLED], size).astype(np.uint8)
    features, regions = prepare_spread(image)
    assert max(regions.shape) <= 320
    if size == (1, 1): labels = np.array([[0, 1]], np.uint8) # of a larger picture
    given, certainty = spread_labels(features, regions, labels)
    assert given.shape == certainty.shape == regions.shape and np.isfinite(certainty).all()


def test_two_colours_are_told_apart():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 200, 60, 60
    labels = np.full((64, 64), UNLABELLED, np.uint8)
    labels[30:34, 4:8], labels[30:34, 56:60] = 0, 2
    given, _ = spread_labels(*prepare_spread(image), labels)
    assert (given[:, :28] == 0).all() and (given[:, 36:] == 2).all()

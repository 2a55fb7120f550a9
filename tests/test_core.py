"""Classes and their sides, label maps, seeds, and words for what is wrong."""
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spml_kit.core import UNLABELLED, VOC_CLASSES, VOID, Classes, SpmlError, check_labels, did_you_mean, merged, named_device, named_object, plural, renamed_keys, rng_of, seed_everything, voc_palette


def test_classes_without_pairs_stay():
    assert np.array_equal(Classes(("a", "b")).mirrored, np.arange(256))
    for swaps, message in ((((1, 2),), "class '1'"), ((("a", "a"),), "not two classes"), ((("a",),), "not two classes")):
        with pytest.raises(SpmlError, match=message): Classes(("a", "b"), swaps)


def test_pairs_by_name():
    pairs = lambda *names, **kw: Classes(('background', *names), **kw).swaps
    assert pairs('left arm', 'right arm', 'arm', 'leg_right', 'leg_left') == (('left arm', 'right arm'), ('leg_right', 'leg_left'))
    assert pairs('left', 'right') == (('left', 'right'),)
    assert pairs('left arm', 'left leg', 'upright', 'upleft', 'bright', 'righteous', 'lefteous') == () # one of two, or no such word
    assert pairs('Left arm', 'left arm', 'right arm') == (('left arm', 'right arm'),) # nobody is in two pairs
    assert pairs('left arm', 'right arm', swaps=()) == ()
    assert pairs('left', 'right', 'up', swaps=(('left', 'up'),)) == (('left', 'up'),)


@pytest.mark.parametrize('name', [r'$\frac{bad$', 'a\nb', 'a\tb', '', ' ', 'a\x00', '\ufeffa', 5])
def test_class_names_that_no_picture_bears(name):
    with pytest.raises(SpmlError, match='class name'): Classes(('background', name))


@pytest.mark.parametrize("names, says", [(("background",), "at least one more"), (tuple(f"c{k}" for k in range(255)), "at most 254 fit"), (("background", "cat", "cat"), "names repeat")])
def test_tables_of_classes_that_cannot_be(names, says):
    with pytest.raises(SpmlError, match=says): Classes(names)


def test_colours_of_voc():
    "As its development kit prints them; no class shares one"
    said = {"background": (0, 0, 0), "aeroplane": (128, 0, 0), "bicycle": (0, 128, 0), "person": (192, 128, 128), "tvmonitor": (0, 64, 128)}
    for name, colour in said.items(): assert tuple(voc_palette()[VOC_CLASSES.id(name)]) == colour
    assert tuple(voc_palette()[VOID]) == (224, 224, 192)
    for table in voc_palette(), VOC_CLASSES.palette: assert len(np.unique(table, axis=0)) == 256
    assert VOC_CLASSES.colour(np.array([[0, 1, VOID]])).tolist() == [[[195]*3, [255, 120, 0], [255]*3]]


@settings(max_examples=100, deadline=None)
@given(arrays(st.sampled_from([np.uint8, np.int32, np.float32]), (3, 4), elements=st.integers(0, 9)), st.integers(1, 9), st.booleans())
def test_label_maps_hold_class_ids_and_the_two_codes_alone(labels, n_classes, unlabelled):
    labels[0, 0], labels[2, 3] = VOID, UNLABELLED if unlabelled else 0
    bad = sorted(v for v in {*labels.astype(int).flatten().tolist()} - {VOID, UNLABELLED} if v >= n_classes)
    if not bad:
        found = check_labels(labels, n_classes, "a.png", (3, 4), unlabelled)
        assert found.dtype == np.uint8 and (found == labels).all()
        return
    with pytest.raises(SpmlError, match=rf"^a.png: value {bad[0]} is not a label: classes are 0..{n_classes - 1}"): check_labels(labels, n_classes, "a.png", (3, 4), unlabelled)


@pytest.mark.parametrize("labels, how, says", [(np.zeros((2, 2, 3), int), {}, r"shape \(2, 2, 3\)"), (np.zeros((2, 3), int), dict(size=(3, 2)), "label map is 2x3, its image 3x2"),
    (np.array([[.5]]), {}, "0.5 is not a whole number"), (np.array([[UNLABELLED]]), dict(unlabelled=False), "value 254 is not a label"), (np.array([[-1]]), {}, "value -1 is not a label")])
def test_label_maps_that_are_none(labels, how, says):
    with pytest.raises(SpmlError, match=says): check_labels(labels, 3, "a.png", **how)


def test_generators_depend_on_their_keys_alone():
    keys = [(0,), (1,), (0, 1), (1, 2), (2, 1), (0, "a"), (0, "b"), ("a", 1), (-1,), ("0",)]
    drawn = [rng_of(*k).integers(2**60) for k in keys]
    assert len({*drawn}) == len(keys) and drawn == [rng_of(*k).integers(2**60) for k in keys]
    np.random.seed(5)
    assert rng_of(0).integers(2**60) == drawn[0] == rng_of(np.int64(0)).integers(2**60)


def test_one_seed_for_every_generator():
    draw = lambda: (random.random(), np.random.random(), torch.rand(1).item())
    seen = []
    for seed in (3, 3, 4):
        seed_everything(seed)
        seen.append(draw())
    assert seen[0] == seen[1] and all(a != b for a, b in zip(seen[1], seen[2]))


def test_settings_are_merged_entry_by_entry():
    first, second = {"a": 1, "b": {"c": 1, "d": {"e": 1}}}, {"b": {"d": {"f": 2}, "c": {"g": 3}}, "h": [4]}
    assert merged(first, second) == {"a": 1, "b": {"c": {"g": 3}, "d": {"e": 1, "f": 2}}, "h": [4]}
    assert first == {"a": 1, "b": {"c": 1, "d": {"e": 1}}} # as it was
    assert renamed_keys([{"share": {"keep": 1}, "own": [{"share": 2}]}, 3]) == [{"embedding_scale": {"keep_annotated": 1}, "own": [{"embedding_scale": 2}]}, 3]


def test_words_that_were_probably_meant():
    assert did_you_mean("scribles", ["points", "scribbles"]) == "; did you mean 'scribbles'?" and did_you_mean("x", ["points"]) == did_you_mean("x", []) == ""


def test_objects_by_name():
    known = {"square": "math:sqrt"}
    assert named_object("square", known, "shape")(4) == 2 and named_object("os.path:join", known, "shape")("a", "b").startswith("a")
    for name, says in (("sqare", r"shape 'sqare' is not one of \['square'\].*did you mean 'square'"), ("nowhere.at_all:f", "no module nowhere; is its folder in PYTHONPATH"), ("math:sqroot", "math has no sqroot")):
        with pytest.raises(SpmlError, match=says): named_object(name, known, "shape")


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert named_device("cpu") == torch.device("cpu") and named_device("cuda:0").index == 0
    for name, says in (("tpu4", "'tpu4': unknown to PyTorch"), ("cuda:1", "PyTorch sees 1 GPUs here")):
        with pytest.raises(SpmlError, match=says): named_device(name)


@pytest.mark.parametrize("n, words, said", [
    (1, ["image"], "1 image"), (0, ["image"], "0 images"), (2, ["image"], "2 images"), (3, ["batch"], "3 batches"), (2, ["box"], "2 boxes"), (2, ["pass"], "2 passes"),
    (1, ["run failed", "runs failed"], "1 run failed"), (5, ["run failed", "runs failed"], "5 runs failed"), (np.int64(1), ["class"], "1 class"), (torch.tensor(1), ["class"], "1 class")])
def test_one_thing_is_not_several(n, words, said): assert plural(int(n) if torch.is_tensor(n) else n, *words) == said

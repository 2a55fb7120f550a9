"""Class maps from elsewhere: every form says the same, what does not fit is named, and tags run without a classifier of the kit."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from spml_kit.cams.map_files import MapFolder, as_class_maps, fit_maps
from spml_kit.core import Classes, SpmlError, UNLABELLED
from spml_kit.data.annotations import Tags
from spml_kit.data.formats import write_annotation
from spml_kit.data.images import ImageSet, SceneSet
from spml_kit.data.weak import Sample, WeakSet
from spml_kit.files import read_index_png, write_index_png
from spml_kit.method.recipes import RECIPES
from spml_kit.cams.labels import SeedRule
from spml_kit.runs.cli import spml_run
from spml_kit.runs.pipelines import Pipeline

NAMES = "background", "cat", "dog", "cow", "bird"


class Table(ImageSet):
    "Images whose files count five classes, of which a set may keep some"
    def __init__(self, kept=NAMES, n=1): super().__init__([f"im{i}" for i in range(n)], Classes(tuple(kept)), False, None, Classes(NAMES))
    def _image(self, i): return np.zeros((20, 30, 3), np.uint8)


def sample_of(kept, tagged, size=(20, 30)):
    tags = np.array([k == 0 or n in tagged for k, n in enumerate(kept)])
    return Sample(np.zeros((*size, 3), np.uint8), np.full(size, UNLABELLED), np.zeros(size, int), tags, 0)


@settings(max_examples=60, deadline=None)
@given(st.permutations(NAMES[1:]), st.integers(1, 4), st.sets(st.sampled_from(NAMES[1:]), min_size=1), st.integers(0, 9))
def test_every_form_says_the_same(order, n_kept, there, seed):
    "Ids of the files, names, IRN's keys, arrays with and without background; classes that the set leaves out are left out"
    kept = ("background", *order[:n_kept])
    images, s = Table(kept), sample_of(kept, there)
    maps = {n: np.random.default_rng([seed, k]).random((20, 30)).astype(np.float32) for k, n in enumerate(NAMES)}
    wanted = np.stack([maps[n] if n in there and k else np.zeros((20, 30)) for k, n in enumerate(kept)])
    ids = {NAMES.index(n) - 1: maps[n] for n in there}
    keys = [*ids]
    forms = [ids, {str(k): m for k, m in ids.items()}, {n: maps[n] for n in there}, {"keys": torch.tensor(keys), "cam": 1, "high_res": torch.stack([torch.tensor(ids[k]) for k in keys])},
             {"keys": np.array(keys), "cam": np.stack([ids[k] for k in keys])}, torch.tensor(np.stack([*maps.values()]))]
    if len(kept) != 4: forms.append(np.stack([*maps.values()][1:]))
    for made in forms: assert np.array_equal(as_class_maps(made, s, images), wanted)
    assert np.array_equal(as_class_maps({k + 1: m for k, m in ids.items()}, s, images, first=1), wanted)
    if len(kept) < 4:
        assert np.array_equal(as_class_maps(np.stack([maps[n] for n in kept]), s, images), wanted) # rows of the set


ONE = np.full((20, 30), .5, np.float32)


@pytest.mark.parametrize("made, words", [
    ({3: ONE}, "a map of ['bird'], which is no tag"), ({}, "no map of its tag ['dog']"), ({1: ONE, 4: ONE}, "class 4 is none of the 4"), ({-1: ONE, 1: ONE}, "class -1"),
    ({1: ONE, "wolf": ONE}, "class 'wolf'"), ({1: -ONE}, "lie in 0..1"), ({1: 4*ONE}, "divide each by its maximum"), ({1: ONE*np.nan}, "not finite"), ({1: ONE*np.inf}, "not finite"),
    ({1: ONE.T}, "other proportions"), ({1: ONE[:, :20]}, "other proportions"), ({1: ONE[0]}, "a map (h,w)"), ({1: 3.}, "a map (h,w)"), ({"keys": [1], "map": ONE}, "without 'high_res' or 'cam'"),
    ({"keys": [0, 1], "cam": ONE[None]}, "2 classes with maps"), (np.zeros((3, 20, 30)), "an array (3, 20, 30)"), (ONE, "an array (20, 30)")])
def test_what_does_not_fit_is_named(made, words):
    with pytest.raises(SpmlError) as e: as_class_maps(made, sample_of(NAMES, ["dog"]), Table(), source="a.npy")
    assert words in str(e.value) and ("a.npy" in str(e.value) or "wolf" in words)


def test_an_array_that_may_be_read_in_two_ways_is_refused():
    "Of five classes a set keeps four: four rows are either those, or all without background"
    kept = NAMES[:4]
    with pytest.raises(SpmlError, match="an array"): as_class_maps(np.zeros((4, 20, 30)), sample_of(kept, ["dog"]), Table(kept))


@settings(max_examples=80, deadline=None)
@given(st.integers(8, 90), st.integers(8, 90), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_maps_of_any_stride_fit_their_image(h, w, stride, up):
    "Rounded up as convolutions do, rounded down as poolings do; the values are those of plain interpolation"
    grid = [max(1, -(-n//stride) if up else n//stride) for n in (h, w)]
    maps = np.random.default_rng(0).random((2, *grid)).astype(np.float32)
    if 1 in grid: return # of one cell, anything may be the image
    made = fit_maps(maps, (h, w), "")
    plain = F.interpolate(torch.tensor(maps)[None], (h, w), mode="bilinear", align_corners=False)[0].numpy()
    assert np.allclose(made, plain, atol=1e-6)
    small = fit_maps(made, grid, "") # and back
    assert small.shape == maps.shape and 0 <= small.min() and small.max() <= 1


def test_a_smaller_map_sees_every_pixel():
    fine = np.zeros((1, 80, 80), np.float32)
    fine[:, ::2, ::2] = 1
    assert np.allclose(fit_maps(fine, (20, 20), "")[:, 2:-2, 2:-2], .25, atol=.02)


def test_files_are_found_by_name(tmp_path):
    images, s = Table(n=3), sample_of(NAMES, ["dog"])
    for name in ("im0.npy", "im1.jpg.NPY"): np.save(open(tmp_path/name, "wb"), {1: ONE}, allow_pickle=True)
    with pytest.raises(SpmlError, match="for 1 of 3 images, the first is im2"): MapFolder(tmp_path, images)
    np.savez(tmp_path/"im2.npz", **{"1": ONE/2})
    read = MapFolder(tmp_path, images)
    for i in range(3):
        s.number = i
        assert np.array_equal(read(s)[2], ONE/(1 + (i == 2)))
    np.save(tmp_path/"im2.npy", {1: ONE})
    with pytest.raises(SpmlError, match="keep one"): read(s)
    with pytest.raises(SpmlError, match="no such folder"): MapFolder(tmp_path/"none", images)
    with pytest.raises(SpmlError, match="has id 0 or 1"): MapFolder(tmp_path, images, 2)


# in pipelines and on the command line

TINY = dict(recipe=RECIPES["small"].but(bs=2, crop=64, warmup=1), rounds=1, steps=2, head_steps=1, tag_steps=2, refine=("regions",), rule=SeedRule(share=.6), progress=False, vote_scales=(1.,))


def bright(sample): return np.repeat(sample.image.mean(2)[None]/255, len(sample.tags), 0)


def make(out, kind="tags", weak=None, **changes):
    weak = weak or WeakSet(SceneSet(3, size=64, masks=False), kind, regions=12)
    return Pipeline(weak, SceneSet(2, size=64, start=900), kind, out, **(TINY | changes))


@pytest.mark.parametrize("kind", ["tags", "boxes"])
def test_a_function_or_its_files_take_the_place_of_the_classifier(tmp_path, kind):
    p = make(tmp_path/"function", kind, maps=bright).run()
    assert "classifier" not in p.done and not (tmp_path/"function"/"classifier").exists() and p.done[:2] == ["seeds", "embedding"]
    for i in range(3): np.save(tmp_path/f"{p.weak.names[i]}.npy", bright(p.weak.sample(i)))
    q = make(tmp_path/"files", kind, maps=tmp_path).run(only=["seeds", "embedding", "walk"])
    for step in ("seeds", "walk"):
        for i in range(3): assert np.array_equal(p.maps_of(step)(i), q.maps_of(step)(i))
    with pytest.raises(SpmlError, match="maps was"): make(tmp_path/"files", kind, maps=bright)
    with pytest.raises(SpmlError, match="maps was"): make(tmp_path/"files", kind)


def test_seeds_of_others_are_trained_on_and_may_be_overruled(tmp_path):
    first = make(tmp_path/"first", maps=bright).run(only=["seeds"])
    weak = WeakSet(first.weak.images, tmp_path/"first"/"seeds", regions=12)
    p = make(tmp_path/"second", weak=weak, skip=["classifier", "seeds"]).run()
    assert p.done == ["embedding", "walk", "neighbours", "head", "walk again", "neighbours again", "head again"]
    seeded = [i for i in range(3) if (weak.sample(i).labels < weak.c).any()]
    assert any((p.maps_of("walk")(i) != weak.sample(i).labels)[weak.sample(i).labels < weak.c].any() for i in seeded) # a seed is no annotation
    for i in seeded: assert (p.maps_of("walk")(i) < UNLABELLED).all() and set(np.unique(p.maps_of("walk")(i))) <= {*np.flatnonzero(weak.tags(i))}


@pytest.mark.parametrize("kind, changes, words", [
    ("tags", dict(skip=["classifier"]), "give maps"), ("boxes", dict(skip=["classifier"]), "give maps"), ("tags", dict(skip=["classifier", "seeds"]), "must be seeds"),
    ("points", dict(maps=bright), "maps are for boxes and tags"), ("tags", dict(maps=lambda s: np.zeros((2, 64, 64))), "maps of scene_000000: an array")])
def test_steps_that_lack_what_they_look_at_are_refused(tmp_path, kind, changes, words):
    weak = WeakSet(SceneSet(3, size=64), kind, regions=12)
    with pytest.raises(SpmlError, match=words): make(tmp_path, kind, weak=weak, **changes).run()


@pytest.mark.long
def test_on_the_command_line(tmp_path):
    scenes = SceneSet(6, seed=3, size=64)
    root, maps, seeds = tmp_path/"own", tmp_path/"maps", tmp_path/"seeds"
    for d in (root/"images", root/"labels", maps, seeds): d.mkdir(parents=True)
    (root/"classes.txt").write_text("\n".join(scenes.classes.names))
    weak = WeakSet(scenes, "tags", regions=12)
    for i, name in enumerate(scenes.names):
        write_index_png(root/"images"/f"{name}.png", scenes.image(i)[..., 0], scenes.classes.palette)
        s = weak.sample(i)
        write_annotation(root/"labels"/f"{name}.json", Tags(np.flatnonzero(s.tags)))
        np.save(maps/f"{name}.npy", {int(c) - 1: bright(s)[0] for c in np.flatnonzero(s.tags) if c})
        write_index_png(seeds/f"{name}.png", np.where(bright(s)[0] > .6, np.flatnonzero(s.tags)[1], UNLABELLED), scenes.classes.palette)
    given = ["tags", "--data", "folder", "--root", str(root), "--profile", "tiny", "-p", "vote_scales", "[1.0]"]
    assert spml_run([*given, "--out", str(tmp_path/"by_maps"), "-p", "map_folder", str(maps)]) == 0
    said = json.loads((tmp_path/"by_maps"/"metrics.json").read_text())["conditions"]
    assert said["maps"] == "maps" and not (tmp_path/"by_maps"/"spml"/"classifier").exists() and read_index_png(next((tmp_path/"by_maps"/"spml"/"seeds").glob("*.png"))).shape == (64, 64)
    assert spml_run([*given, "--out", str(tmp_path/"by_seeds"), "-p", "label_folder", str(seeds), "-p", "skip", "['classifier','seeds']"]) == 0
    assert not (tmp_path/"by_seeds"/"spml"/"seeds").exists()

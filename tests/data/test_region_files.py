"""Regions of others: every file form says the same, overlapping and holed masks become a partition, what does not fit is named."""
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.ndimage import label

from spml_kit.core import SpmlError
from spml_kit.data.images import SceneSet
from spml_kit.data.region_files import RegionFolder, alike_sizes, fill_holes, partition_of, read_regions, region_source, take_regions
from spml_kit.data.shapes import pack_runs, runs_of
from spml_kit.data.weak import WeakSet
from spml_kit.regions.oversegment import RegionCache, oversegment, prepare_regions
from spml_kit.runs.cli import spml_prepare


def same(a, b):
    "The same pieces, whatever their ids; those of `a` without gaps"
    a, b = np.asarray(a), np.unique(b, return_inverse=True)[1].reshape(np.shape(b))
    return set(np.unique(a)) == set(range(a.max() + 1)) and len(np.unique(a.astype(np.int64)*10**6 + b)) == a.max() + 1 == b.max() + 1


def by_hand(masks, scores=None):
    "Pixel by pixel: the mask on top, else the connected piece that nothing covers"
    m, h, w = masks.shape
    holes = label(~masks.any(0))[0]
    out = np.zeros((h, w), int)
    for y in range(h):
        for x in range(w):
            over = [k for k in range(m) if masks[k, y, x]]
            key = (lambda k: (-masks[k].sum(), k)) if scores is None else (lambda k: (scores[k], k))
            out[y, x] = max(over, key=key) if over else m + holes[y, x]
    return out


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 5).flatmap(lambda m: arrays(bool, (m, 7, 8))), st.lists(st.integers(0, 3), min_size=5, max_size=5), st.booleans())
def test_a_partition_by_hand(masks, scores, by_score):
    scores = scores[:len(masks)] if by_score else None
    made = partition_of(masks, scores, order="score" if by_score else "smaller")
    assert same(made, by_hand(masks, scores))
    if len(masks): # all forms of masks
        runs = [dict(size=[7, 8], counts=runs_of(m)) for m in masks]
        packed = [dict(segmentation=dict(size=[7, 8], counts=pack_runs(r["counts"])), predicted_iou=1.) for r in runs]
        for form in (runs, packed, list(masks), [dict(segmentation=m) for m in masks], masks.astype(np.uint8)*255, masks.astype(float)):
            assert np.array_equal(partition_of(form, scores, order="score" if by_score else "smaller"), made)


@settings(max_examples=80, deadline=None)
@given(arrays(np.int64, (9, 10), elements=st.integers(-1, 2)), st.integers(1, 8))
def test_holes(regions, least):
    "Pieces of `least` pixels are regions, smaller ones join a region, and nothing else changes"
    made, (holes, n) = fill_holes(regions, least), label(regions < 0)
    sizes = np.bincount(holes.ravel(), minlength=n + 1)[1:]
    large = [holes == k + 1 for k in range(n) if sizes[k] >= least]
    ids = {v for v in np.unique(regions) if v >= 0}
    if not ids and not large: large = [holes == k + 1 for k in range(n)]
    assert made.max() + 1 == len(ids) + len(large)
    for piece in large: assert len(np.unique(made[piece])) == 1
    known = regions >= 0
    if known.any(): assert same(np.unique(made[known], return_inverse=True)[1], regions[known])
    if least == 1: assert all((made == made[p][0]).sum() == p.sum() for p in large)


SIZE = 30, 40


@pytest.fixture
def ids(): return oversegment(SceneSet(1, size=64).image(0)[:30, :40], n=14)


def forms(folder, ids):
    "Files that hold these regions"
    colours = np.random.default_rng(0).permutation(256**3)[:ids.max() + 1]
    rgb = np.stack([colours//256**k % 256 for k in range(3)], 1).astype(np.uint8)[ids]
    grey = (ids*18).astype(np.uint8)
    grey[grey == 234] = 255 # 0 and 255 are regions as any other
    palette = Image.fromarray(grey, "P")
    palette.putpalette(list(range(256))*3)
    masks = [ids == k for k in range(ids.max() + 1)]
    for name, im in dict(grey8=Image.fromarray(grey), palette=palette, grey16=Image.fromarray((ids*4001).astype(np.uint16)), rgb=Image.fromarray(rgb),
                         rgba=Image.fromarray(np.dstack([rgb, np.full(ids.shape, 255, np.uint8)]))).items(): im.save(folder/f"{name}.png")
    Image.fromarray((ids*10**6).astype(np.int32), "I").save(folder/"int32.tif")
    for name, a in dict(uint32=(ids*10**8).astype(np.uint32), int64=ids.astype(np.int64)*10**12, floats=ids.astype(np.float32), masks=np.stack(masks), sam=[dict(segmentation=m, area=1) for m in masks]).items():
        np.save(folder/f"{name}.npy", a)
    np.savez(folder/"one.npz", ids)
    sa1b = dict(image=dict(width=40, height=30), annotations=[dict(segmentation=dict(size=SIZE, counts=pack_runs(runs_of(m)))) for m in masks])
    (folder/"sa1b.json").write_text(json.dumps(sa1b))
    (folder/"coco.json").write_text(json.dumps(sa1b["annotations"]))
    (folder/"pngs").mkdir()
    for k, m in enumerate(masks): Image.fromarray(m.astype(np.uint8)*255).save(folder/"pngs"/f"{k}.png")
    (folder/"pngs"/"metadata.csv").write_text("id,area\n")
    return [p for p in sorted(folder.iterdir())]


def test_every_form_says_the_same(tmp_path, ids):
    found = forms(tmp_path, ids)
    assert len(found) == 15
    for path in found: assert same(read_regions(path), ids), path


def test_what_means_nothing_becomes_regions_of_its_own(tmp_path, ids):
    "An id named as hole, a negative id, a transparent pixel"
    nothing = np.isin(ids, [0, 3])
    wanted = np.where(nothing, 100 + label(nothing)[0], ids)
    Image.fromarray(np.where(nothing, 0, ids + 1).astype(np.uint8)).save(tmp_path/"a.png")
    np.save(tmp_path/"b.npy", np.where(nothing, -1, ids))
    rgba = np.dstack([*[np.where(nothing, 0, ids)]*3, ~nothing*255]).astype(np.uint8)
    Image.fromarray(rgba).save(tmp_path/"c.png")
    assert same(read_regions(tmp_path/"a.png", holes=(0,)), wanted) and same(read_regions(tmp_path/"a.png"), np.where(nothing, -1, ids))
    assert same(read_regions(tmp_path/"b.npy"), wanted) and same(read_regions(tmp_path/"c.png"), wanted)


@pytest.mark.parametrize("what, words", [
    ("photograph", "this is a photograph"), ("jpeg", "no regions"), ("floats", "not a region map"), ("nan", "not a region map"), ("4d", "not a region map"), ("empty", "holds no masks"), ("text", "not JSON"),
    ("sizes", "need one size"), ("runs", "run lengths"), ("words", "x.json"), ("none", "no regions"), ("two", "needs one file"), ("turned", "other proportions"), ("cut", "other proportions"), ("harm", "nothing of it was run")])
def test_what_does_not_fit_is_named(tmp_path, ids, what, words):
    rng = np.random.default_rng(0)
    im = Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8))
    if what == "photograph": Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(tmp_path/"x.png")
    if what == "jpeg": im.save(tmp_path/"x.jpg")
    arrays_ = dict(floats=rng.random(SIZE), nan=np.full(SIZE, np.nan), turned=ids.T, cut=ids[:, :30], harm=[print])
    arrays_ |= {"4d": [np.zeros((2, 2, 2))], "sizes": [dict(segmentation=np.ones((2, 2), bool)), dict(segmentation=np.ones((3, 2), bool))]}
    if what in arrays_: np.save(tmp_path/"x.npy", np.array(arrays_[what], dtype=object) if what in ("sizes", "harm") else arrays_[what])
    texts = dict(empty='{"annotations": []}', text="{", runs='[{"segmentation": {"size": [3, 3], "counts": [1, 2]}}]', words='[{"segmentation": "cat"}]')
    if what in texts: (tmp_path/"x.json").write_text(texts[what])
    if what == "two": np.save(tmp_path/"x.npy", ids); Image.fromarray(ids.astype(np.uint8)).save(tmp_path/"x.png")
    with pytest.raises(SpmlError) as e: RegionFolder(tmp_path).read("x", SIZE if what != "photograph" else (60, 80))
    assert words in str(e.value) and str(tmp_path) in str(e.value)


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 900), st.integers(20, 900), st.integers(10, 900))
def test_a_reduced_map_is_of_the_same_image(h, w, longer):
    ratio = longer/max(h, w)
    for rounded in (round, int, lambda n: int(-(-n//1))):
        small = tuple(max(1, rounded(ratio*n)) for n in (h, w))
        assert alike_sizes((h, w), small) and alike_sizes(small, (h, w))
    if min(h, w) > 30: assert alike_sizes((h, w), (w, h)) == (abs(h - w) <= 2 or alike_sizes((w, h), (h, w)))
    assert not alike_sizes((h, w), (h, 2*w + 4))


def test_a_larger_map_is_reduced_with_the_image(tmp_path):
    fine = SceneSet(1, size=128)
    ids = oversegment(fine.image(0), n=10)
    np.save(tmp_path/f"{fine.names[0]}.npy", ids)
    made = RegionFolder(tmp_path).read(fine.names[0], (64, 64))
    blocks = ids.reshape(64, 2, 64, 2)
    pure = (blocks == blocks[:, :1, :, :1]).all((1, 3)) # blocks of one region stay in it
    assert pure.mean() > .5 and len(np.unique(made[pure]*100 + ids[::2, ::2][pure])) == len(np.unique(made[pure]))


def test_where_a_weak_set_reads_them(tmp_path):
    "A folder of the kit has settings; one without is somebody else's; an empty one is told as before"
    scenes = SceneSet(2, size=64)
    prepare_regions(scenes, tmp_path/"ours", n=9, progress=False)
    (tmp_path/"theirs").mkdir()
    (tmp_path/"empty").mkdir()
    for n in scenes.names: np.save(tmp_path/"theirs"/f"{n}.npy", RegionCache(tmp_path/"ours").read(n) + 7)
    assert type(region_source(tmp_path/"ours")) is RegionCache and type(region_source(tmp_path/"theirs")) is RegionFolder
    for name in ("empty", "none"):
        with pytest.raises(SpmlError, match="no regions here"): region_source(tmp_path/name)
    a, b = (WeakSet(scenes, regions=tmp_path/k).sample(1).regions for k in ("ours", "theirs"))
    assert np.array_equal(a, b)
    with pytest.raises(SpmlError, match="does not write there"): region_source(tmp_path/"theirs").write("x", a)


def test_taking_over_goes_on_where_it_was(tmp_path):
    scenes = SceneSet(3, size=64)
    source = tmp_path/"theirs"
    source.mkdir()
    for i in (0, 2): np.save(source/f"{scenes.names[i]}.npy", oversegment(scenes.image(i), n=8))
    with pytest.raises(SpmlError, match="for 1 of 3 images, the others are done"): take_regions(scenes, RegionFolder(source), tmp_path/"out")
    stamp = RegionCache(tmp_path/"out").path(scenes.names[0]).stat().st_mtime_ns
    np.save(source/f"{scenes.names[1]}.npy", oversegment(scenes.image(1), n=8))
    cache = take_regions(scenes, RegionFolder(source), tmp_path/"out")
    assert cache.path(scenes.names[0]).stat().st_mtime_ns == stamp and all(n in cache for n in scenes.names)
    with pytest.raises(SpmlError, match="holes was"): take_regions(scenes, RegionFolder(source, holes=(0,)), tmp_path/"out")


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    scenes = SceneSet(4, size=64)
    own, theirs = tmp_path/"own", tmp_path/"sam"
    for d in (own/"images", theirs): d.mkdir(parents=True)
    for i, n in enumerate(scenes.names):
        Image.fromarray(scenes.image(i)).save(own/"images"/f"{n}.png")
        np.save(theirs/f"{n}.npy", [dict(segmentation=oversegment(scenes.image(i), n=9) == k) for k in (0, 3, 5)])
    monkeypatch.chdir(tmp_path)
    assert spml_prepare(["own", "--regions", "sam"]) == 0 and "regions of 4 images are in regions" in capsys.readouterr().out
    made = RegionCache("regions")
    assert same(made.read(scenes.names[2]), partition_of([oversegment(scenes.image(2), n=9) == k for k in (0, 3, 5)]))
    assert spml_prepare(["own/images", "--regions", "sam", "--least", "50", "--out", "fewer"]) == 0
    assert RegionCache("fewer").read(scenes.names[0]).max() <= made.read(scenes.names[0]).max()
    for wrong, words in ((["own", "--data", "folder", "--root", "own"], "give either"), ([], "give either"), (["--root", "own"], "needs --data")):
        assert spml_prepare([*wrong, "--regions", "sam", "--out", "other"]) == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit): spml_prepare(["own", "--regions", "sum"])
    assert "or give an existing folder" in capsys.readouterr().err

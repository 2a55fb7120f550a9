"""From weak annotation to a model, step by step: what each step leaves, resuming, leaving out, and that masks of training images stay closed."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from spml_kit.infer import pseudo
from spml_kit.core import SpmlError, UNLABELLED, VOC_CLASSES
from spml_kit.files import read_index_png, write_index_png
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.cams.labels import SeedRule
from spml_kit.runs.cli import spml_run
from spml_kit.runs.pipelines import PIPELINES, Pipeline, steps_for
from spml_kit.method.recipes import RECIPES

TINY = dict(recipe=RECIPES["small"].but(bs=2, crop=64, warmup=1), rounds=1, steps=2, head_steps=1, tag_steps=2, refine=("regions",), rule=SeedRule(share=.6), progress=False)
STEPS = {k: tuple(s.name for s in plan) for k, plan in PIPELINES.items()}
LABELS = {k: [s.name for s in plan if s.leaves == "labels"] for k, plan in PIPELINES.items()}


def make(out, kind, truth=None, n=4, **changes):
    images = SceneSet(n, size=64, masks=kind in ("scribbles", "points", "keypoints"))
    return Pipeline(WeakSet(images, kind, regions=12), SceneSet(2, size=64, start=900), kind, out, truth=truth, **(TINY | changes))


def label_maps(pipeline):
    return {s: [pipeline.maps_of(s)(i) for i in range(len(pipeline.weak))] for s in LABELS[pipeline.annotation] if s in pipeline.done}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Each pipeline once, scored"
    return {kind: make(tmp_path_factory.mktemp(kind), kind, SceneSet(4, size=64)).run() for kind in STEPS}


@pytest.mark.parametrize("kind", STEPS)
def test_every_step_leaves_its_result(runs, kind):
    p = runs[kind]
    assert tuple(p.done) == STEPS[kind]
    for step in STEPS[kind]: assert (p.out/step/"checkpoint.safetensors").exists() != (step in LABELS[kind])
    for step, maps in label_maps(p).items():
        for i, m in enumerate(maps):
            given = p.weak.sample(i)
            assert m.shape == (64, 64) and set(np.unique(m)) <= {*range(p.weak.c), UNLABELLED, 255}
            if not step.startswith("neighbours"): assert set(np.unique(m)) <= {*np.flatnonzero(given.tags), UNLABELLED, 255} # nothing that the tags deny; neighbours may outvote them, as in the release
            if step != "seeds": assert (m != UNLABELLED).all()
            known = given.labels != UNLABELLED
            assert (m[known] == given.labels[known]).all() # what was annotated stays
    assert [s["step"] for s in json.loads((p.out/"steps.json").read_text())] == LABELS[kind]


@pytest.mark.parametrize("kind", ["keypoints", "points", "tags"])
def test_what_walks(tmp_path, monkeypatch, kind):
    "Of keypoints the labels of the nearest labelled segments, on the grid of inference and of the walk; of tags the activation; else None, which asks the head"
    spread, walk, asked, walked = pseudo._spread, pseudo._walked, [], []
    def spreading(v, sample, grid, stride):
        asked.append((grid, stride, spread(v, sample, grid, stride)))
        return asked[-1][-1]
    def walking(seen, size, present, scores, stride, steps):
        walked.append((scores, stride))
        return walk(seen, size, present, scores, stride, steps)
    monkeypatch.setattr(pseudo, "_spread", spreading)
    monkeypatch.setattr(pseudo, "_walked", walking)
    make(tmp_path, kind, n=2, recipe=TINY["recipe"].but(infer_grid=(5, 3)), walk_stride=16).run(only=("classifier", "seeds", "embedding", "walk"))
    assert [stride for _, stride in walked] == [16, 16]
    if kind == "keypoints":
        assert [a[:2] for a in asked] == [((5, 3), 16)]*2
        for (scores, _), (*_, given) in zip(walked, asked): assert scores is given and scores.shape[1:] == (4, 4)
    else: assert not asked and all((scores is None) == (kind == "points") for scores, _ in walked)


def test_the_walk_may_begin_with_another_background_than_the_seeds(tmp_path, monkeypatch):
    walk, begun = pseudo._walked, []
    monkeypatch.setattr(pseudo, "_walked", lambda seen, size, present, scores, stride, steps: begun.append(scores) or walk(seen, size, present, scores, stride, steps))
    half = lambda image, maps, regions: np.full(image.shape[:2], .5)
    make(tmp_path, "tags", n=2, walk_background=half).run(only=("classifier", "seeds", "embedding", "walk"))
    assert len(begun) == 2 and all((scores[0] == .5).all() and scores[1:].max() > 0 for scores in begun)
    make(tmp_path/"same", "tags", n=2).run(only=("classifier", "seeds", "embedding"))
    for name in ("scene_000000", "scene_000001"): assert (tmp_path/"seeds"/f"{name}.png").read_bytes() == (tmp_path/"same"/"seeds"/f"{name}.png").read_bytes()
    with pytest.raises(SpmlError, match="other settings"): make(tmp_path, "tags", n=2)


def test_masks_that_judge_teach_nothing(runs, tmp_path):
    p = make(tmp_path, "tags").run()
    for a, b in zip(p.model.parameters(), runs["tags"].model.parameters()): assert torch.equal(a, b)
    assert p.scores == [] and not (tmp_path/"steps.json").exists()


def test_what_is_done_is_not_repeated_and_what_is_missing_is_made_again(runs, monkeypatch):
    p = runs["boxes"]
    stamps = {f: f.stat().st_mtime_ns for f in p.out.rglob("*") if f.is_file() and f.name != "steps.json"}
    lost = p.out/"walk"/f"{p.weak.names[1]}.png"
    before = read_index_png(lost)
    lost.unlink()
    again = make(p.out, "boxes").run()
    assert (read_index_png(lost) == before).all()
    assert {f for f, t in stamps.items() if f.stat().st_mtime_ns != t} == {lost}
    for a, b in zip(p.model.parameters(), again.model.parameters()): assert torch.equal(a, b)


def test_an_interrupted_run_ends_as_the_unbroken_one(runs, tmp_path, monkeypatch):
    p = make(tmp_path, "tags")
    def stop(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr("spml_kit.runs.pipelines.stream_retrieval", stop)
        with pytest.raises(KeyboardInterrupt): p.run()
    assert p.done == list(STEPS["tags"][:4])
    p = make(tmp_path, "tags").run()
    for a, b in zip(p.model.parameters(), runs["tags"].model.parameters()): assert torch.equal(a, b)


def test_steps_can_be_left_out(tmp_path):
    skip = ["neighbours", "head", "walk again", "neighbours again"]
    p = make(tmp_path, "tags", skip=skip).run()
    assert p.done == ["classifier", "seeds", "embedding", "walk", "head again"] and not (tmp_path/"neighbours").exists()
    assert all((p.labels.sample(i).labels == p.maps_of("walk")(i)).all() for i in range(4))


def test_seeds_alone(tmp_path):
    p = make(tmp_path, "boxes").run(only=("classifier", "seeds"))
    assert p.done == ["classifier", "seeds"]
    for i in range(4):
        seeds, given = p.labels.sample(i).labels, p.weak.sample(i).labels
        assert (seeds[given == 0] == 0).all() and (seeds[given == UNLABELLED] != 0).all() # background is what lies outside all boxes, and only that


def test_an_image_without_tags_stays_unlabelled(tmp_path):
    images = SceneSet(3, size=64, masks=False)
    nothing = lambda i: np.full((64, 64), UNLABELLED) if i == 1 else np.arange(4096).reshape(64, 64)//1024
    p = Pipeline(WeakSet(images, nothing, regions=12), SceneSet(2, size=64, start=900), "scribbles", tmp_path, **TINY).run()
    assert (p.labels.sample(1).labels == UNLABELLED).all() and (p.labels.sample(0).labels != UNLABELLED).all()


@pytest.mark.parametrize("changes, words", [(dict(seed=1), "seed was 0, is 1"), (dict(steps=3), "steps was 2, is 3"), (dict(refine=()), "refine was ..regions"), (dict(skip=["walk"]), "skip was")])
def test_another_setting_wants_another_folder(runs, changes, words):
    with pytest.raises(SpmlError, match=words): make(runs["points"].out, "points", **changes)


@pytest.mark.parametrize("kind, changes, words", [("lassos", {}, "annotation 'lassos' is not one of"), ("points", dict(skip=["seeds"]), "the steps of points are"),
                                                  ("points", dict(skip=["embedding"]), "'embedding' cannot be skipped"), ("points", dict(truth=SceneSet(3, size=64)), "the same images")])
def test_what_makes_no_sense_is_refused(tmp_path, kind, changes, words):
    weak = WeakSet(SceneSet(4, size=64), "points")
    with pytest.raises(SpmlError, match=words): Pipeline(weak, weak, kind, tmp_path, **(TINY | changes))


# masks of training images

def voc_root(root, poison):
    "Scenes in VOC layout, classes renamed to VOC's; `poison` spoils the masks of the training images"
    scenes = SceneSet(6, seed=5, size=64)
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"): (root/folder).mkdir(parents=True)
    for split, ids in (("train", range(4)), ("val", (4, 5))): (root/"ImageSets"/"Segmentation"/f"{split}.txt").write_text("\n".join(scenes.names[i] for i in ids))
    for i, name in enumerate(scenes.names):
        Image.fromarray(scenes.image(i)).save(root/"JPEGImages"/f"{name}.jpg", quality=95)
        mask = root/"SegmentationClass"/f"{name}.png"
        write_index_png(mask, scenes.mask(i), scenes.classes.palette)
        if i < 4: poison(mask)
        said = scenes.boxes(i)
        objects = "".join(f"<object><name>{VOC_CLASSES.names[c]}</name><bndbox><xmin>{x0 + 1:.0f}</xmin><ymin>{y0 + 1:.0f}</ymin><xmax>{x1:.0f}</xmax><ymax>{y1:.0f}</ymax></bndbox></object>"
                          for (x0, y0, x1, y1), c in zip(said.boxes, said.classes))
        (root/"Annotations"/f"{name}.xml").write_text(f"<annotation><size><width>64</width><height>64</height></size>{objects}</annotation>")
    return root


def keep(path): "As it is"
def tear(path): path.write_bytes(b"no image at all")


@pytest.mark.parametrize("kind", ["tags", pytest.param("boxes", marks=pytest.mark.long)])
def test_poisoned_masks_of_training_images_change_nothing(kind, tmp_path):
    found = {}
    for poison in (keep, tear):
        root, out = voc_root(tmp_path/poison.__name__, poison), tmp_path/f"run_{poison.__name__}"
        assert spml_run([kind, "--data", "voc", "--root", str(root), "--out", str(out), "--profile", "tiny", "-p", "score_steps", "False", "-p", "n_watch", "2", "-p", "cam_scales", "[1.0]", "-p", "vote_scales", "[1.0]"]) == 0
        rows = json.loads((out/"metrics.json").read_text())["rows"]
        maps = [read_index_png(f).tolist() for step in LABELS[kind] for f in sorted((out/"spml"/step).glob("*.png"))]
        assert len(maps) == 4*len(LABELS[kind])
        found[poison.__name__] = rows, maps
    assert found["tear"] == found["keep"]


@pytest.mark.parametrize("bs", [1, 4, 8, 16])
def test_steps_follow_the_number_of_images(bs):
    "Eight views of each image a round, or a few more; between 25 and 100 steps"
    steps = [steps_for(n, bs) for n in range(1, 2000)]
    assert steps == sorted(steps) and min(steps) == 25 and max(steps) == 100
    for n, k in enumerate(steps, 1):
        if 25 < k < 100: assert 8*n <= k*bs < 8*n + bs

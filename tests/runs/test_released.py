"""What the released scripts do otherwise, by its switches: scale of the loss, own negatives, what the second head sees, windows, canvas, size at test."""
import json

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings, strategies as st
from PIL import Image

from spml_kit.core import SpmlError
from spml_kit.data.batches import recolour, weak_dls
from spml_kit.data.images import FolderSet, SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.infer.scores import head_scores, stream_retrieval, stream_segments, training_index
from spml_kit.infer.views import stream_views
from spml_kit.learn.learner import create_model, spml_learner
from spml_kit.method.nets import image_tensor, locations, unit, with_location
from spml_kit.method.recipes import RECIPES, RELEASE_CHANGES, SCRIPT_WEIGHTS
from spml_kit.method.segments import cluster_means, start_grid
from spml_kit.runs.cli import spml_run
from spml_kit.runs.experiment import find_notebook, profiles
from spml_kit.runs.pipelines import Pipeline

TINY = RECIPES["small"].but(bs=2, crop=64, warmup=1)


def sets(): return WeakSet(SceneSet(3, size=64), "points", regions=12), SceneSet(2, size=64, start=900)


@pytest.mark.parametrize("kind", ["tags", "points", "scribbles"])
def test_the_released_scale_and_own_negatives_by_a_recipe(kind):
    dls = weak_dls(*sets(), 2, 64, 1, device="cpu")
    loss = spml_learner(dls, kind, recipe=TINY.but(relations={"similarity": {"weight": None}, "cooccurrence": {"anchors": None}}, **RELEASE_CHANGES)).loss_func
    w = SCRIPT_WEIGHTS[kind]
    assert {r.name: r.weight for r in loss.relations} == dict(annotation=w.annotation[0], similarity=w.similarity[0], cooccurrence=w.cooccurrence[0])
    assert loss.head_weight == w.head and loss.own_negative
    plain = spml_learner(dls, kind, recipe=TINY).loss_func
    assert plain.head_weight == 1 and not plain.own_negative


def test_recipes_of_before_are_as_they_were():
    assert not {*RELEASE_CHANGES} & {*RECIPES["paper_voc"].settings()} and {*RELEASE_CHANGES} <= {*TINY.but(**RELEASE_CHANGES).settings()}


@pytest.mark.parametrize("changes, words", [(dict(head_scale=(2., .5)), "the smaller size"), (dict(head_scale=(1.,)), "two numbers"), (dict(head_grey=1.5), "a probability"), (dict(head_blur=-1), "at least 0"), (dict(own_negative=1), "not bool")])
def test_wrong_entries_are_refused(changes, words):
    with pytest.raises(SpmlError, match=words): TINY.but(**changes)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_greys_and_blurs_by_the_plain_definition(seed, grey, blur):
    image = np.random.default_rng(seed).integers(0, 256, (9, 11, 3)).astype(np.uint8)
    rng = np.random.default_rng(seed)
    sigma = [rng.random(), rng.random(), rng.uniform(.1, 5)][2]
    wanted = image.astype(float)
    if grey: wanted = np.repeat((wanted*[.3, .59, .11]).sum(2, keepdims=True), 3, 2)
    if blur:
        x = np.arange(-2, 3)
        kernel = np.exp(-(x[:, None]**2 + x**2)/sigma**2)
        wide = np.pad(wanted, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        wanted = sum(k*wide[i:i + 9, j:j + 11] for (i, j), k in np.ndenumerate(kernel/kernel.sum()))
    made = recolour(image, np.random.default_rng(seed), float(grey), float(blur))
    assert made.dtype == np.uint8 and np.abs(made - wanted).max() <= .51


def test_only_the_second_head_sees_them(tmp_path):
    "Batches of the embedding are those of before; the head's have the wanted share of greys"
    weak, valid = sets()
    grey = lambda dl: [(b[0].amax(1) - b[0].amin(1)).flatten(1).amax(1) < .01 for b in dl]
    share = torch.cat(grey(weak_dls(weak, valid, 8, 32, 20, grey=.3, device="cpu").train)).float().mean()
    assert .15 < share < .45
    pipe = Pipeline(weak, valid, "points", tmp_path, TINY.but(**RELEASE_CHANGES | dict(head_grey=1.)), 1, 1, 1, skip=["walk"], progress=False).run()
    dl = pipe.learners["head"].dls.train
    assert torch.cat(grey(dl)).all() and dl.scale == (.5, 2.) and "grey" in dl.settings
    dl = pipe.learners["embedding"].dls.train
    assert not torch.cat(grey(dl)).any() and dl.scale == TINY.scale and "grey" not in dl.settings


def by_hand(v, grid, canvas, iterations):
    "Pad the embedding, cluster the canvas without its padding"
    D, h, w = v.shape
    H, W = max(h, canvas), max(w, canvas)
    start, k = start_grid(H, W, grid, "cpu")
    inside = torch.zeros(H, W, dtype=torch.bool)
    inside[:h, :w] = True
    own = start.view(H, W)[inside]
    u = with_location(v.permute(1, 2, 0).reshape(-1, D), locations(H, W, dtype=v.dtype).view(H, W, 2)[inside])
    for _ in range(iterations):
        s = u @ cluster_means(u, own, k).T
        best = s.max(1)
        own = torch.where(best.values > s.gather(1, own[:, None])[:, 0], best.indices, own)
    return torch.unique(own, return_inverse=True)[1].view(h, w)


@pytest.mark.parametrize("size, canvas", [((20, 30), 40), ((40, 24), 32), ((33, 33), 33), ((50, 60), 32)])
def test_clusters_on_the_padded_canvas(size, canvas):
    v = unit(torch.randn(5, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0)
    own, mu = next(stream_segments([v], (6, 6), 3, canvas=canvas))
    assert torch.equal(own, by_hand(v, (6, 6), canvas, 3)) and len(mu) == own.max() + 1
    plain = next(stream_segments([v], (6, 6), 3))[0]
    assert torch.equal(own, plain) == (min(size) >= canvas)


def test_retrieval_in_windows_on_a_canvas():
    weak, valid = sets()
    torch.manual_seed(0)
    model = create_model(TINY, weak.c).eval()
    images = [weak.images.image(i)[:48] for i in range(2)]
    labels = [weak.images.mask(i)[:48] for i in range(2)]
    made = {c: training_index(model, images, labels, weak.c, grid=(4, 4), crop=64, canvas=c) for c in (False, True)}
    assert len(made[True]) < len(made[False]) # a part of the grid lies in the padding
    scores = next(stream_retrieval(model, images, made[True], weak.c, grid=(4, 4), crop=64, canvas=True))
    assert scores.shape == (weak.c, 48, 64) and torch.allclose(scores.sum(0), torch.ones(48, 64))
    with pytest.raises(SpmlError, match="crop is none"): training_index(model, images, labels, weak.c, canvas=True)


@pytest.mark.parametrize("crop", [None, 64])
def test_the_head_on_the_enlarged_embedding(crop):
    "One window: the plain definition; and the embedding is the same"
    torch.manual_seed(0)
    model, image = create_model(TINY, 13).eval(), SceneSet(1, size=64).image(0)
    (v, logits), (w, plain) = (next(stream_views(model, [image], crop=crop, enlarged=e))[0] for e in (True, False))
    with torch.no_grad():
        up = torch.nn.functional.interpolate(model.embed(image_tensor(image)), (64, 64), mode="bilinear", align_corners=False)
        wanted = model.head(unit(up, 1))[0]
    assert torch.allclose(logits, wanted, atol=1e-5) and torch.equal(v, w) and not torch.allclose(plain, wanted, atol=1e-3)
    assert torch.allclose(head_scores(model, image, crop=crop, enlarged=True), wanted.softmax(0), atol=1e-5)


@pytest.mark.parametrize("size, wanted", [((30, 40), (48, 64)), ((100, 50), (64, 32)), ((64, 64), (64, 64))])
def test_small_images_are_enlarged_where_asked_for(tmp_path, size, wanted):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(tmp_path/"a.png")
    images = FolderSet(tmp_path, classes=("background", "thing"), max_size=64)
    images.enlarge = True
    assert images.image(0).shape[:2] == wanted and images.stored_size(0) == size
    plain = FolderSet(tmp_path, classes=("background", "thing"), max_size=64).image(0).shape[:2]
    assert plain == (wanted if max(size) > 64 else size)


def test_profiles_say_what_exists():
    said = profiles()["released"]["single"]
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in said["recipe_changes"].items()} == RELEASE_CHANGES
    text = (find_notebook("single").parent/"profiles.yaml").read_text()
    assert [f"# {k} " in text for k in range(1, 10)] == [True]*8 + [False] and yaml.safe_load(text)


@pytest.mark.long
def test_on_the_command_line(tmp_path):
    "The profile of the release, on embedded scenes, two steps of each part"
    assert spml_run(["points", "--profile", "released", "--profile", "dry", "--out", str(tmp_path), "-p", "recipe_name", "small", "-p", "size", "64", "-p", "crop", "64", "-p", "window", "64", "-p", "regions", "12",
                     "-p", "weights", "", "-p", "crf", "False"]) == 0
    said = json.loads((tmp_path/"metrics.json").read_text())["conditions"]
    assert said["window"] == 64 and said["canvas"] and said["enlarge"] and said["recipe"]["own_negative"] and said["recipe"]["head_blur"] == .5

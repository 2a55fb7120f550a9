"""What the released scripts do otherwise, by its switches: scale of the loss, own negatives, what the second head sees, windows, canvas."""
import json

import pytest
import torch
import yaml

from spml_kit.core import SpmlError
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.infer.scores import head_scores, stream_retrieval, training_index
from spml_kit.infer.views import stream_views
from spml_kit.learn.learner import create_model, spml_learner
from spml_kit.method.nets import image_tensor, unit
from spml_kit.method.recipes import RECIPES, RELEASE_CHANGES, SCRIPT_WEIGHTS
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
    with pytest.raises(SpmlError, match="give crop"): training_index(model, images, labels, weak.c, canvas=True)


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

"""Methods of half-labelled sets: the contract, what each reads, labels that SPML guesses, the experiment."""
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from spml_kit.core import UNLABELLED, SpmlError, named_object
from spml_kit.data.half_labelled import ANNOTATION_SECONDS, HalfLabelled
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.files import read_json
from spml_kit.method.nets import EmbedNet
from spml_kit.method.recipes import RECIPES
from spml_kit.runs.experiment import experiments, notebook_parameters, run_notebook
from spml_kit.runs.semi import HALF_METHODS, HalfMethod, HalfPlan, fit_half, guessed_labels, mean_scores, norm_halves, spml_pipeline

SIZE = 32
RECIPE = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), bs=4, crop=SIZE, warmup=1, infer_grid=(3, 3))
PLAN = HalfPlan(SceneSet(2, size=SIZE, start=900), RECIPE, rounds=1, steps=2, head_steps=1, refine=("regions",))


class Counted(SceneSet):
    "Scenes that remember whose masks were opened"
    def mask(self, i):
        self.opened.add(self.names[i])
        return super().mask(i)


def half_set(masks="full", n=7, share=.3, scenes=None):
    scenes = scenes or SceneSet(n, size=SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HalfLabelled(WeakSet(scenes, masks, regions=5), share, hints=WeakSet(SceneSet(n, size=SIZE), "scribbles", regions=5))


def stamps(folder): return {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.suffix in (".safetensors", ".png")}


@pytest.mark.parametrize("name", HALF_METHODS)
def test_every_method_fits_predicts_and_is_not_repeated(name, tmp_path):
    scenes = Counted(7, size=SIZE)
    scenes.opened = set()
    half = half_set(scenes=scenes)
    fitted = fit_half(name, half, PLAN, tmp_path)
    image = scenes.image(0)[:20]
    scores = {part: f(image) for part, f in fitted.scorers.items()}
    assert "" in scores and all(s.shape == (half.full.c, 20, SIZE) and s.min() >= 0 for s in scores.values())
    assert fitted.history and all(rows[0]["round"] == 0 for rows in fitted.history.values())
    assert scenes.opened <= {scenes.names[i] for i in half.numbers}
    there = stamps(tmp_path)
    again = fit_half(name, half, PLAN, tmp_path)
    assert stamps(tmp_path) == there and {p.parts[len(tmp_path.parts)] for p in there} == {name}
    assert again.history == fitted.history and all(torch.equal(again.scorers[k](image), s) for k, s in scores.items())


@pytest.mark.parametrize("name", HALF_METHODS)
def test_masks_of_the_rest_teach_nothing(name, tmp_path):
    "Nor do those of the labelled part, where a method reads scribbles only"
    scenes, half = SceneSet(7, size=SIZE), half_set()
    method = named_object(name, HALF_METHODS, "method")
    reads = half.numbers if method.labels else []
    other = half_set(lambda i: scenes.mask(i) if i in reads else np.arange(SIZE*SIZE).reshape(SIZE, SIZE).astype(np.uint8) % 3)
    image = scenes.image(1)
    one, two = (fit_half(name, h, PLAN, tmp_path/str(k)).scorers[""](image) for k, h in enumerate((half, other)))
    assert torch.equal(one, two)


def test_two_runs_are_equal_and_another_seed_is_another_run(tmp_path):
    half, image = half_set(), SceneSet(1, size=SIZE, start=50).image(0)
    fits = [fit_half("ensemble", half, replace(PLAN, seed=s), tmp_path/str(k)) for k, s in enumerate((0, 0, 3))]
    one, same, other = ([f.scorers[n](image) for n in ("net1", "net2")] for f in fits)
    assert all(map(torch.equal, one, same)) and not torch.equal(one[0], other[0]) and not torch.equal(*one)


def test_what_methods_cost():
    half, s = half_set(), ANNOTATION_SECONDS
    cost = lambda name, **how: named_object(name, HALF_METHODS, "method").minutes(half, **how)*60
    masks, scribbles, rest = 2*s["full"], 7*s["scribbles"], 5*s["scribbles"]
    for name in ("supervised", "ensemble", "cotraining", "spml"): assert np.isclose(cost(name), masks)
    assert np.isclose(cost("scribbles"), scribbles) and np.isclose(cost("both"), masks + rest)
    assert np.isclose(cost("both", labels="scribbles"), scribbles) and np.isclose(cost("spml", labels="scribbles"), 2*s["scribbles"])


def test_a_method_of_ones_own_and_a_misspelt_one(tmp_path):
    with pytest.raises(SpmlError, match="did you mean 'cotraining'"): fit_half("cotrainin", half_set(), PLAN, tmp_path)
    fit_half(f"{__name__}:MINE", half_set(), PLAN, tmp_path)
    assert SEEN[-1] == tmp_path/f"{__name__}.MINE" # no colon in a folder


SEEN = []
MINE = HalfMethod(lambda half, plan, folder: SEEN.append(folder))


# labels that SPML guesses

@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    half = half_set()
    return half, spml_pipeline(half.every, PLAN, tmp_path_factory.mktemp("spml")).run(only=("embedding",))


def test_what_is_labelled_stays_and_the_rest_is_labelled_where_the_network_is_sure(pipe):
    half, p = pipe
    every = range(len(half))
    some, none, all_of = ([*guessed_labels(p, every, sure)] for sure in (.2, 1.01, 0.))
    for i in every:
        if i in half.numbers: assert all((o[i] == half.every.sample(i).labels).all() for o in (some, none, all_of))
        else:
            assert (none[i] == UNLABELLED).all() and (all_of[i] < half.full.c).all()
            assert ((some[i] == all_of[i]) | (some[i] == UNLABELLED)).all()


def test_images_of_which_something_is_known_get_no_other_class(tmp_path):
    half = half_set()
    p = spml_pipeline(half.hinted, PLAN, tmp_path).run(only=("embedding",))
    for i, labels in zip(half.rest, guessed_labels(p, half.rest)):
        s = half.hinted.sample(int(i))
        assert {*np.unique(labels)} <= {*np.flatnonzero(s.tags)} and (labels[s.labels < half.full.c] == s.labels[s.labels < half.full.c]).all()


def test_several_scorers_say_their_mean():
    a, b = torch.rand(2, 3, 4, 5)
    assert torch.equal(mean_scores([lambda i: a, lambda i: b], None), (a + b)/2)


# the experiment

TINY = dict(n_train=8, n_valid=2, n_watch=1, size=SIZE, crop=SIZE, regions=5, rounds=1, steps=2, head_steps=1, refine=["regions"],
            recipe_changes=dict(embed=dict(backbone="test_resnet", pretrained=False), bs=4, warmup=1, infer_grid=[3, 3]))


@pytest.mark.parametrize("labels, methods, minutes", [("full", ["supervised", "both", "full_masks"], dict(supervised=2*239.7, both=2*239.7 + 6*34.9, full_masks=8*239.7)),
                                                      ("scribbles", ["ensemble"], dict(ensemble=2*34.9))])
def test_the_experiment_scores_methods_and_tells_their_minutes(labels, methods, minutes, tmp_path):
    run_notebook("semi", tmp_path, TINY | dict(labels=labels, methods=methods), progress=False)
    said = read_json(tmp_path/"metrics.json")
    assert {k: round(60*v, 1) for k, v in said["minutes"].items()} == {k: round(v, 1) for k, v in minutes.items()}
    assert {r["method"] for r in said["rows"]} >= {*methods} and all(0 <= r["miou"] <= 100 and r["masks"] == .25 for r in said["rows"])
    assert [*said["divergence"]] == [m for m in methods if m == "ensemble"]
    assert all((tmp_path/"predictions"/m).is_dir() for m in methods)
    assert (tmp_path/"labels").exists() == (labels == "scribbles")


def test_its_choices_are_the_methods_there_are():
    default, comment = notebook_parameters(experiments()["semi"])["methods"]
    listed = comment.split(";")[0].removeprefix("some of ").split(", ")
    assert listed == [*HALF_METHODS, "full_masks"] and {*default} <= {*listed}


def test_half_of_each_batch_of_the_embedding_is_labelled(tmp_path):
    half = half_set()
    pipe = spml_pipeline(half.every, PLAN, tmp_path, half).run(only=("embedding",))
    known = (pipe.learners["embedding"].dls.train.one_batch()[1] < UNLABELLED).flatten(1).any(1)
    assert known.reshape(2, -1).float().mean(1).tolist() == [1, 0]
    norms = [m for m in pipe.learners["embedding"].model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(hasattr(m.forward, "func") for m in norms) # which `norm_halves` changed


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_the_unlabelled_half_is_normalised_as_new_images_are(backbone):
    "the labelled half as if it were alone, statistics and gradients too"
    torch.manual_seed(0)
    halves, alone = (EmbedNet(backbone=backbone, pretrained=False, dim=8).double() for _ in range(2))
    alone.load_state_dict(halves.state_dict())
    norm_halves(halves)
    x, y = torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64), torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64)
    made, want = halves(torch.cat([x, y])), alone(x)
    torch.testing.assert_close(made[:2], want)
    torch.testing.assert_close(made[2:], alone.eval()(y)) # the running statistics, which x alone has changed
    for name, value in alone.state_dict().items(): torch.testing.assert_close(halves.state_dict()[name], value, msg=name)
    for out in (made[:2], want): out.square().mean().backward(retain_graph=True)
    for (name, p), q in zip(halves.named_parameters(), alone.parameters()): torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert all(n.training for n in halves.modules())
    torch.testing.assert_close(halves.eval()(y), alone(y))

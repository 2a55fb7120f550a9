"Mining common object features: the pieces against their plain definitions, bad input, and whole runs that are repeated, broken off and resumed."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import rgb2lab

from spml_kit.core import SpmlError, UNLABELLED, VOID
from spml_kit.files import read_index_png
from spml_kit.cams.labels import SeedRule
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.method.recipes import RECIPES
from spml_kit.neighbours.mcof import (RegionNet, bayes_refine, colour_log_likelihood, mcof_plan, mcof_spml_plan, mine_regions, mined_labels, posterior,
                                      refined_labels, region_features, region_loss, region_seed_labels, train_region_net)
from spml_kit.runs.pipelines import PIPELINES, Pipeline

SEEDS = st.integers(0, 10**6)


def drawn(seed, n=7, size=(9, 11), n_classes=4):
    "Random regions (some ids nowhere) and labels with 254 and 255"
    rng = np.random.default_rng(seed)
    regions = rng.integers(0, n, size)
    common = rng.choice([*range(n_classes), UNLABELLED, VOID], n)[regions]
    return regions, np.where(rng.random(size) < .3, rng.choice([*range(n_classes), UNLABELLED, VOID], size), common).astype(np.uint8)


# seeds of regions

@settings(deadline=None, max_examples=60)
@given(SEEDS, st.sampled_from([(.7, .5), (1., .01), (.34, 1.)]))
def test_seed_labels_of_regions_are_the_plain_count(seed, shares):
    regions, labels = drawn(seed)
    purity, labelled = shares
    plain = []
    for r in range(regions.max() + 1):
        own = labels[regions == r]
        counts = [(own == c).sum() for c in range(4)]
        known, best = sum(counts), int(np.argmax(counts))
        plain.append(best if known and counts[best] >= purity*known and known >= labelled*len(own) else UNLABELLED)
    assert region_seed_labels(labels, regions, 4, purity, labelled).tolist() == plain


def test_seed_labels_at_the_thresholds_and_with_nothing_said():
    one = np.zeros((2, 5), int)
    labels = np.array([[1, 1, 1, 1, 1], [1, 1, 2, 2, 2]], np.uint8)
    assert region_seed_labels(labels, one, 3).tolist() == [1] # 7 of 10 are enough
    labels[0, 0] = 2
    assert region_seed_labels(labels, one, 3).tolist() == [UNLABELLED] # 6 are not
    labels[:] = np.where(np.arange(5) < 2, 1, UNLABELLED)
    assert region_seed_labels(labels, one, 3).tolist() == [UNLABELLED] # 4 of 10 labelled
    assert region_seed_labels(np.full((2, 5), UNLABELLED), one, 3).tolist() == [UNLABELLED]
    every = np.arange(10, dtype=np.uint8).reshape(2, 5)
    assert region_seed_labels(every, every.astype(int), 10).tolist() == list(range(10)) # every class in an image


@pytest.mark.parametrize("call, words", [
    (lambda: region_seed_labels(np.zeros((2, 2), np.uint8), np.zeros((2, 3), int), 3), "must agree"),
    (lambda: region_seed_labels(np.zeros((2, 2), np.uint8), np.zeros((2, 2), int), 3, purity=0), "purity 0"),
    (lambda: region_seed_labels(np.zeros((2, 2), np.uint8), np.zeros((2, 2), int), 3, labelled=1.5), "labelled 1.5"),
    (lambda: mine_regions(torch.zeros(1, 3), np.zeros((2, 2), int), [1, 1]), "2 tags, but 3 classes"),
    (lambda: mine_regions(torch.zeros(1, 3), np.ones((2, 2), int), [1, 1, 0]), "ids up to 1"),
    (lambda: mine_regions(torch.zeros(1, 3), np.zeros((2, 2), int), [1, 1, 0], 2), "outside 0..1"),
    (lambda: bayes_refine(np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), bool), np.full((9, 9), 1.1)), "saliency must lie in 0..1"),
    (lambda: bayes_refine(np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), bool), np.full((9, 9), np.nan)), "saliency must lie in 0..1"),
    (lambda: mcof_plan(0), "rounds 0"), (lambda: mcof_plan(2, refine_rounds=3), "refine_rounds 3"),
    (lambda: region_features(torch.nn.Conv2d(3, 3, 1), np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), int)), "Conv2d is none"),
    (lambda: train_region_net(torch.zeros(3, 2), torch.full((3,), UNLABELLED), torch.ones(3), 4), "have 0 class"),
    (lambda: train_region_net(torch.zeros(3, 2), torch.tensor([1, 1, UNLABELLED]), torch.ones(3), 4), "have 1 class"),
])
def test_bad_input_is_refused(call, words):
    with pytest.raises(SpmlError, match=words): call()


# the network

@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_loss_is_the_weighted_mean_of_cross_entropies(seed):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    labels, areas = torch.randint(0, 3, (6,), generator=rng), torch.randint(1, 90, (6,), generator=rng)
    terms = [-(a.double()**.5)*torch.log(row.exp()[k]/row.exp().sum()) for row, k, a in zip(logits, labels, areas)]
    plain = sum(terms)/sum(a.double()**.5 for a in areas)
    fast = region_loss(logits, labels, areas)
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(*(torch.autograd.grad(o, logits, retain_graph=True)[0] for o in (fast, plain)))


def clouds(n=600, wrong=.25, seed=0):
    "Regions of three classes in 8 dimensions; a share of the labels is wrong, some are missing"
    rng = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 3, (n,), generator=rng)
    features = 100*(4*F.one_hot(truth, 8) + torch.randn(n, 8, generator=rng)) + 7 # a scale that must not matter
    said = torch.where(torch.rand(n, generator=rng) < wrong, torch.randint(0, 3, (n,), generator=rng), truth)
    return features, truth, torch.where(torch.rand(n, generator=rng) < .2, UNLABELLED, said)


def test_what_is_common_outlives_wrong_labels():
    features, truth, said = clouds()
    net = train_region_net(features, said, torch.ones(600), 3, epochs=20)
    right = lambda label: float((label == truth).float().mean())
    assert right(net(features).argmax(1)) > .93 > .75 > right(said)


def test_same_seed_same_network_and_the_global_generator_is_left_alone():
    features, _, said = clouds(200)
    torch.manual_seed(5); expected = torch.rand(3); torch.manual_seed(5)
    a, b, c = (train_region_net(features, said, torch.ones(200), 3, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["layers.0.weight"], c["layers.0.weight"])


def test_constant_features_and_a_single_labelled_region_a_class_train():
    net = train_region_net(torch.ones(2, 4), torch.tensor([0, 1]), torch.tensor([1, 9]), 3)
    assert isinstance(net, RegionNet) and net(torch.ones(2, 4)).isfinite().all()


# property 3: mined labels

@settings(deadline=None, max_examples=60)
@given(SEEDS, st.floats(0, 1))
def test_mined_labels_stay_within_tags_and_are_one_a_region(seed, least):
    rng = np.random.default_rng(seed)
    regions, _ = drawn(seed)
    logits, tags = torch.from_numpy(rng.normal(0, 4, (regions.max() + 1, 4))), rng.random(4) < .5
    mined = mine_regions(logits, regions, tags, least)
    plain = []
    for row in logits.numpy(): # by hand: softmax among the background and the tags
        allowed = [c for c in range(4) if c == 0 or tags[c]]
        p = np.exp(row[allowed])/np.exp(row[allowed]).sum()
        plain.append(allowed[p.argmax()] if p.max() >= least and tags.any() else UNLABELLED)
    assert mined.dtype == np.uint8 and (mined == np.array(plain)[regions]).all()
    assert set(np.unique(mined)) <= {0, *np.flatnonzero(tags), UNLABELLED}
    assert set(np.unique(mine_regions(logits, regions, np.zeros(4, bool), least))) == {UNLABELLED}
    assert set(np.unique(mine_regions(logits, regions, np.array([True, False, False, False]), least))) == {0}


# property 2: the posterior

@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_posterior_obeys_bayes(seed):
    rng = np.random.default_rng(seed)
    s, p, q = rng.random(20), rng.random(20) + .01, rng.random(20) + .01
    np.testing.assert_allclose(posterior(s, np.log(p) - np.log(q)), s*p/(s*p + (1 - s)*q))
    np.testing.assert_allclose(posterior(s, 0*s), s)
    ratio = rng.normal(0, 50, 20)
    assert (posterior(0*s, ratio) == 0).all() and (posterior(0*s + 1, ratio) == 1).all()
    order = np.sort(s)
    assert (np.diff(posterior(order, 3.)) >= 0).all() and (np.diff(posterior(.3, np.sort(ratio))) >= 0).all()


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from([4, 16]))
def test_likelihood_is_the_plain_product_of_histograms(seed, bins):
    rng = np.random.default_rng(seed)
    lab, inside = rgb2lab(rng.integers(0, 256, (6, 7, 3), np.uint8)), rng.random((6, 7)) < .5
    low, width = (0, -128, -128), (100/bins, 256/bins, 256/bins)
    place = [[[min(int((lab[y, x, k] - low[k])/width[k]), bins - 1) for k in range(3)] for x in range(7)] for y in range(6)]
    own = [place[y][x] for y in range(6) for x in range(7) if inside[y, x]]
    count = lambda k, b: sum(o[k] == b for o in own)
    plain = [[np.prod([(count(k, b) + 1)/(len(own) + bins) for k, b in enumerate(place[y][x])]) for x in range(7)] for y in range(6)]
    np.testing.assert_allclose(np.exp(colour_log_likelihood(lab, inside, bins)), plain)


def test_colours_recover_what_mining_missed_and_tiny_objects_keep_the_prior():
    image = np.zeros((30, 30, 3), np.uint8)
    image[8:22, 8:22] = 200, 40, 40
    inside, prior = np.zeros((30, 30), bool), np.full((30, 30), .5)
    inside[8:22, 8:16] = True # half of the object
    assert ((bayes_refine(image, inside, prior) > .5) == (image[..., 0] > 0)).all()
    gentle, sharp = (bayes_refine(image, inside, prior, exponent=e) for e in (1/3, 1))
    assert (abs(gentle - .5) < abs(sharp - .5)).all()
    inside[:] = False; inside[8:15, 8:15] = True # 49 pixels
    assert (bayes_refine(image, inside, prior) == prior).all() and (bayes_refine(image, inside, prior, least=49) != prior).any()
    assert (bayes_refine(image, ~inside, prior) == prior).all() # so does a tiny rest


# whole runs

ROUNDS = ["mined 1", "refined 1", "network 1", "masks 1", "mined 2", "network 2", "masks 2"]
TINY = dict(recipe=RECIPES["small"].but(bs=2, crop=64, warmup=1), rounds=1, steps=2, head_steps=1, tag_steps=2, cam_scales=(1.,), vote_scales=(1.,), refine=("regions",), rule=SeedRule(share=.6), progress=False)


def make(out, plan, n=4, annotation="tags", regions=12, truth=True, **changes):
    weak = WeakSet(SceneSet(n, size=64, masks=False), annotation, regions=regions)
    return Pipeline(weak, SceneSet(2, size=64, start=900), "tags", out, truth=SceneSet(n, size=64) if truth else None, plan=plan, **(TINY | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return make(tmp_path_factory.mktemp("mcof"), mcof_plan(2)).run()


def maps(p, name): return np.stack([p.maps_of(name)(i) for i in range(len(p.weak))])


def test_plans_name_their_steps():
    names = lambda plan: [s.name for s in plan]
    assert names(mcof_plan(2)) == ["classifier", "seeds", *ROUNDS]
    assert names(mcof_plan(1, mine=False, refine_rounds=0)) == ["classifier", "seeds", "network 1", "masks 1"]
    assert names(mcof_plan(2, refine_rounds=2)).count("refined 2") == 1
    assert names(mcof_spml_plan(1)) == ["classifier", "seeds", *ROUNDS[:4], *[s.name for s in PIPELINES["tags"][2:]]]


def test_every_step_leaves_labels_within_the_tags_and_is_scored(whole):
    stages = ["seeds", "mined 1", "refined 1", "masks 1", "mined 2", "masks 2"]
    assert [s["step"] for s in whole.scores] == stages
    for name in stages:
        for i, m in enumerate(maps(whole, name)):
            s = whole.weak.sample(i)
            assert set(np.unique(m)) <= {0, *np.flatnonzero(s.tags), UNLABELLED}
            if name.startswith("mined"): assert all(len(np.unique(m[s.regions == r])) == 1 for r in np.unique(s.regions))
            if name.startswith("masks"): assert (m != UNLABELLED).all()
    single = [i for i in range(4) if whole.weak.tags(i)[1:].sum() == 1]
    assert all((maps(whole, "refined 1")[i] == maps(whole, "mined 1")[i]).all() for i in range(4) if i not in single)
    assert (whole.labels.sample(0).labels == maps(whole, "masks 2")[0]).all() # what a next step learns from


def test_truth_teaches_nothing_and_the_same_seed_gives_the_same_labels(whole, tmp_path):
    again = make(tmp_path, mcof_plan(2), truth=False).run()
    assert again.scores == []
    for name in ("mined 1", "refined 1", "masks 1", "mined 2", "masks 2"): assert (maps(again, name) == maps(whole, name)).all()


def test_what_is_missing_is_made_again_and_nothing_else(whole):
    lost = whole.out/"mined 2"/f"{whole.weak.names[1]}.png"
    stamps = {f: f.stat().st_mtime_ns for f in whole.out.rglob("*") if f.is_file() and f.name != "steps.json"}
    before = read_index_png(lost)
    lost.unlink()
    make(whole.out, mcof_plan(2)).run()
    assert (read_index_png(lost) == before).all()
    assert {f for f, t in stamps.items() if f.stat().st_mtime_ns != t} == {lost}


def test_a_run_that_broke_off_in_the_second_mining_ends_as_the_unbroken_one(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        calls = []
        def stop(*args, **kwargs):
            calls.append(1)
            if len(calls) == 6: raise KeyboardInterrupt # the second image of the second round
            return mine_regions(*args, **kwargs)
        m.setattr("spml_kit.neighbours.mcof.mine_regions", stop)
        p = make(tmp_path, mcof_plan(2))
        with pytest.raises(KeyboardInterrupt): p.run()
    assert p.done[-1] == "masks 1" and len(list((tmp_path/"mined 2").glob("*.png"))) == 1
    p = make(tmp_path, mcof_plan(2)).run()
    assert all((maps(p, name) == maps(whole, name)).all() for name in ("mined 1", "mined 2", "masks 2"))


def test_spml_learns_from_the_mined_labels(tmp_path):
    p = make(tmp_path, mcof_spml_plan(1), n=2).run()
    assert p.done == [s.name for s in mcof_spml_plan(1)] and p.model is p.learners["head again"].model


def test_untagged_images_and_images_of_one_region_stay_as_they_are(whole, tmp_path):
    tags = lambda i: [] if i == 1 else np.flatnonzero(whole.weak.tags(i))
    weak = WeakSet(whole.weak.images, lambda i: np.full((64, 64), UNLABELLED), tags=tags, regions=lambda image: np.zeros((64, 64), int) if (image == whole.weak.images.image(0)).all() else np.arange(4096).reshape(64, 64)//256)
    p = Pipeline(weak, SceneSet(2, size=64, start=900), "tags", tmp_path, plan=mcof_plan(1), **TINY).run()
    for name in ("mined 1", "refined 1", "masks 1"): assert (p.maps_of(name)(1) == UNLABELLED).all()
    assert len(np.unique(p.maps_of("mined 1")(0))) == 1 # its single region
    assert (p.maps_of("refined 1")(0) == p.maps_of("mined 1")(0)).all()


def test_seeds_that_say_nothing_and_a_missing_classifier_are_told(tmp_path, whole):
    p = make(tmp_path/"a", mcof_plan(1), rule=SeedRule(winner=1., share=1.))
    p.run(only=("classifier",))
    p.labels = p.weak.relabel(lambda i: np.full((64, 64), UNLABELLED, np.uint8))
    with pytest.raises(SpmlError, match="have 0 class.es.*seed rule"): list(mined_labels(p, [0]))
    with pytest.raises(SpmlError, match="'seeds' needs class maps, which 'classifier' makes"): make(tmp_path/"b", mcof_plan(1), skip=["classifier"])
    p = make(tmp_path/"c", mcof_plan(1))
    with pytest.raises(SpmlError, match="step 'classifier' must come first"): list(mined_labels(p, [0]))
    assert list(mined_labels(p, [])) == []


def test_what_was_annotated_stays(tmp_path, whole):
    "Outside of all boxes is background, whatever was mined"
    p = make(tmp_path, mcof_plan(1), annotation="boxes")
    p.learners["classifier"] = whole.learners["classifier"]
    p.labels = whole.weak.relabel(whole.maps_of("seeds"))
    for i, m in enumerate(mined_labels(p, [0, 1, 2, 3])):
        given = p.weak.sample(i).labels
        assert (given == 0).any() and (m[given == 0] == 0).all()


def test_refinement_makes_object_and_background_of_a_single_tag(whole):
    i = next(i for i in range(4) if whole.weak.tags(i)[1:].sum() == 1)
    p = make(whole.out, mcof_plan(2))
    c = int(np.flatnonzero(whole.weak.tags(i)[1:])[0]) + 1
    p.labels = whole.weak.relabel(lambda k: np.full((64, 64), c, np.uint8)) # everything was mined: saliency alone decides
    (refined,) = refined_labels(p, [i])
    assert set(np.unique(refined)) == {0, c} and (refined[0] == 0).all() # the border of the image is never salient

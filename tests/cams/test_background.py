"Background from class maps: golden numbers, properties."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from spml_kit.cams.background import BACKGROUNDS, GeodesicBackground, MeanBackground, PowerBackground, background_map, named_background, tag_scores
from spml_kit.cams.labels import NORMALISE, tag_labels, unlabelled_share, winning_class
from spml_kit.core import SpmlError

CLASSES = 4
some_maps = arrays(np.float32, (CLASSES, 3, 5), elements=st.floats(0, 1, width=32)).map(lambda m: np.concatenate([0*m[:1], m[1:]]))


def test_background_of_the_reference(vectors):
    v = vectors["V21"]
    m = np.array(v["inputs"]["max_fg"])
    maps = np.stack([0*m, m])[:, None]
    np.testing.assert_allclose(background_map(maps, v["inputs"]["alpha"])[0], v["expected"]["bg"], atol=5e-11)
    label, score = winning_class(maps, [True, True], v["inputs"]["alpha"], "none")
    assert label[0].tolist() == v["expected"]["winner_is_fg"]
    fine = np.linspace(0, 1, 100_001)
    fine = np.stack([0*fine, fine])[:, None]
    lowest = winning_class(fine, [True, True], v["inputs"]["alpha"], "none")[1]
    assert abs(lowest.min() - v["expected"]["min_winning_score"]) < 1e-5
    assert abs(fine[1, 0, lowest.argmin()] - v["expected"]["at_max_fg"]) < 2e-5
    assert unlabelled_share(tag_labels(fine, [True, True], threshold=.2, normalise="none")) == 0
    assert unlabelled_share(tag_labels(fine, [True, True], threshold=.23, normalise="none")) > 0


@given(some_maps, st.floats(.5, 16))
@settings(max_examples=50, deadline=None)
def test_background_is_what_the_classes_leave(maps, alpha):
    bg = background_map(maps, alpha)
    assert bg.min() >= 0 and bg.max() <= 1
    np.testing.assert_array_equal(background_map(np.concatenate([maps, 0*maps[:1]]), alpha), bg)
    np.testing.assert_array_equal(background_map(0*maps, alpha), np.ones(maps.shape[1:]))
    maps[2, 1, 1] = 1
    assert background_map(maps, alpha)[1, 1] == 0
    np.testing.assert_array_equal(tag_scores(maps, alpha)[1:], maps[1:])


@given(st.integers(0, 2**32 - 1), st.floats(.1, 8))
@settings(max_examples=25, deadline=None)
def test_geodesic_background_is_a_power_of_what_is_not_salient(seed, alpha):
    rng = np.random.default_rng(seed)
    image, regions = rng.integers(0, 256, (12, 15, 3), np.uint8), np.arange(180).reshape(12, 15)//rng.integers(1, 30)
    strength = GeodesicBackground(alpha)(image, None, regions)
    assert strength.shape == (12, 15) and strength.min() >= 0 and strength.max() <= 1
    np.testing.assert_allclose(strength, GeodesicBackground(1.)(image, None, regions)**alpha, rtol=1e-6, atol=1e-12)
    maps = rng.random((CLASSES, 12, 15))
    both = PowerBackground(alpha)(image, maps, regions) + GeodesicBackground()(image, maps, regions)
    np.testing.assert_allclose(MeanBackground(alpha)(image, maps, regions), both/2)


@pytest.mark.parametrize("alpha", [0, -1., float("nan")])
def test_a_background_without_a_power_is_refused(alpha):
    with pytest.raises(SpmlError, match="above 0"): GeodesicBackground(alpha)


@given(some_maps, st.lists(st.booleans(), min_size=CLASSES, max_size=CLASSES).filter(any), st.floats(.5, 16), st.sampled_from(NORMALISE))
@settings(max_examples=40, deadline=None)
def test_a_given_background_is_that_of_the_power(maps, tags, alpha, normalise):
    "`winning_class` with the strength that it would compute itself"
    maps = maps*np.array(tags)[:, None, None]
    for a, b in zip(winning_class(maps, tags, alpha, normalise), winning_class(maps, tags, 99., normalise, background_map(maps, alpha))): np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name, kind", zip(BACKGROUNDS, (PowerBackground, GeodesicBackground, MeanBackground)))
def test_a_background_by_its_name(name, kind):
    assert named_background(name) == kind() and named_background(name, 3.) == kind(3.)


def test_a_background_of_ones_own_has_no_power():
    own = "spml_kit.cams.background:MeanBackground"
    assert named_background(own) == MeanBackground()
    with pytest.raises(SpmlError, match=f"walk_background {own} with the power 3: only power, geodesic, mean have"): named_background(own, 3., "walk_background")
    with pytest.raises(SpmlError, match="walk_background 'powr'.*did you mean 'power'"): named_background("powr", 0., "walk_background")

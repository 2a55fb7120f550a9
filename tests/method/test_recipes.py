"""Recipes: the reference's scale, ranges of their numbers, the switches of the release."""
import math

import pytest

from spml_kit.core import SpmlError
from spml_kit.method.recipes import RECIPES, RELEASE_CHANGES, paper_relations, paper_weights


@pytest.mark.parametrize("annotation", ["tags", "boxes", "points", "scribbles", "keypoints"])
def test_reference_scale(annotation):
    ours, theirs = ({r.name: r for r in paper_relations(annotation, scale)} for scale in (False, True))
    head = paper_weights(annotation, True).head
    assert paper_weights(annotation).head == 1 and ours["annotation"].weight == 1 and ours.keys() == theirs.keys()
    for name, r in ours.items():
        assert theirs[name].kappa == r.kappa
        assert theirs[name].weight == pytest.approx(head*r.weight, rel=.12) # the paper prints 0.1/0.3 as 0.3


@pytest.mark.parametrize("change", [dict(lr=math.inf), dict(lr=math.nan), dict(lr=-1.), dict(wd=math.nan), dict(wd=-.1), dict(scale=(0, 0)), dict(scale=(2., 1.)), dict(scale=(.5, math.inf)), dict(dropout=1.5), dict(dropout=-.1), dict(dropout=math.nan),
    dict(multipliers=(1, 1, -1, 1)), dict(multipliers=(1, 1, math.inf, 1)), dict(bs=0), dict(crop=0), dict(steps=0), dict(dim=0), dict(iterations=-1), dict(grid=(0, 6)), dict(grid=(6, .5)), dict(memory=-1), dict(warmup=-1),
    dict(power=math.inf), dict(embedding_scale=math.nan), dict(infer_grid=(12, -1)), dict(scale=("a", "b"))], ids=str)
def test_numbers_of_a_recipe_have_their_ranges(change):
    with pytest.raises(SpmlError, match=f"recipe: {next(iter(change))} = "): RECIPES["small"].but(**change)


def test_recipes_of_before_are_as_they_were():
    assert not {*RELEASE_CHANGES} & {*RECIPES["paper_voc"].settings()} and {*RELEASE_CHANGES} <= {*RECIPES["small"].but(**RELEASE_CHANGES).settings()}


@pytest.mark.parametrize("changes, words", [(dict(head_scale=(2., .5)), "the smaller size"), (dict(head_scale=(1.,)), "two numbers"), (dict(head_grey=1.5), "a probability"), (dict(head_blur=-1), "at least 0"), (dict(own_negative=1), "not bool")])
def test_wrong_entries_are_refused(changes, words):
    with pytest.raises(SpmlError, match=words): RECIPES["small"].but(**changes)

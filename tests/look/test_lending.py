"""The explorer of feature affinity: who lends a label, and who finds no lender."""
import numpy as np
import pytest

from spml_kit.core import UNLABELLED
from spml_kit.data.weak import WeakSet
from spml_kit.learn.learner import spml_learner
from spml_kit.look.lending import explore_affinity
from spml_kit.method.relations import feature_affinity, semantic_annotation
from test_explore import SIZE, said


@pytest.mark.parametrize("unmatched, words", [("all", "is positive to every segment"), ("out", "is left out"), (None, "is positive to every segment")])
def test_lending_says_what_becomes_of_those_without_a_lender(world, unmatched, words):
    "As the learner trains it; by default where affinity is not trained"
    weak, _, learn, _ = world
    relations = [semantic_annotation(), *([feature_affinity(threshold=.9, across=True, unmatched=unmatched)] if unmatched else [])]
    ex = explore_affinity(spml_learner(learn.dls, recipe=learn.recipe, relations=relations), weak, which=(0, 1))
    assert (ex.threshold.value, ex.across.value) == ((.9, True) if unmatched else (.95, False))
    ex.across.value, ex.threshold.value = True, 1.
    assert f"too dissimilar: without a label it {words}" in said(ex) and "memory bank are compared too; they are not shown" in said(ex)
    ex.across.value = False
    assert f"without a label it {words}" in said(ex) and "memory bank" not in said(ex)
    ex.threshold.value = -1.
    assert "takes this label" in said(ex) and words not in said(ex)


@pytest.mark.parametrize("unmatched", ["all", "out"])
def test_lending_where_nobody_of_the_image_can(world, unmatched):
    weak, _, learn, _ = world
    plain = WeakSet(weak.images, lambda i: np.full((SIZE, SIZE), UNLABELLED if i else 1, np.uint8))
    ex = explore_affinity(spml_learner(learn.dls, recipe=learn.recipe, relations=[feature_affinity(unmatched=unmatched)]), plain, which=(0, 1))
    ex.point = (1, 5, 5)
    assert "so it takes no label; without a label it " + ("is positive to every segment" if unmatched == "all" else "is left out") in said(ex)


def test_lending_of_a_plain_learner(world):
    weak, _, learn, _ = world
    ex = explore_affinity(spml_learner(learn.dls, method="cross_entropy", recipe=learn.recipe), weak, which=(0, 1))
    assert (ex.threshold.value, ex.across.value) == (.95, False) and "take a label" in said(ex)

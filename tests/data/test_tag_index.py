"""Partners by their tags, against the plain definition."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spml_kit.core import SpmlError
from spml_kit.data.annotations import Tags
from spml_kit.data.images import SceneSet
from spml_kit.data.tag_index import TagIndex, tag_index
from spml_kit.data.weak import WeakSet

tables = arrays(bool, st.tuples(st.integers(1, 9), st.integers(2, 5)))


@given(tables)
@settings(max_examples=80, deadline=None)
def test_lists_are_those_of_a_plain_search(tags):
    before = tags.copy()
    index, N = TagIndex(tags), range(len(tags))
    assert len(index) == len(tags) and np.array_equal(tags, before) # background is nobody's partner, but the table stays
    for c in range(1, tags.shape[1]): assert index.with_tag(c).tolist() == [i for i in N if tags[i, c]]
    for i in N: assert index.same_tags(i).tolist() == [j for j in N if (tags[j, 1:] == tags[i, 1:]).all()]


@given(tables, st.integers(0, 10**6), st.booleans(), st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_partners_share_a_tag_and_are_somebody_else(tags, seed, same, n):
    index = TagIndex(tags)
    for i, mine in enumerate(tags[:, 1:]):
        found = index.related(i, n, np.random.default_rng(seed), same)
        equal = [j for j in index.same_tags(i).tolist() if j != i]
        sharing = [j for j in range(len(tags)) if j != i and (tags[j, 1:] & mine).any()]
        allowed = equal if same and equal else sharing or [i]
        assert found.shape == (n,) and {*found.tolist()} <= {*allowed}
        if same and len(equal) >= n: assert len({*found.tolist()}) == n # nobody twice while there are others
        assert np.array_equal(found, index.related(i, n, np.random.default_rng(seed), same))


def test_every_partner_and_every_shared_tag_is_drawn():
    "One tag is common, the other rare: each is taken half of the time, and within it everybody alike"
    tags = np.zeros((12, 3), bool)
    tags[0, 1:], tags[1:11, 1], tags[11, 2] = True, True, True
    drawn = np.bincount(TagIndex(tags).related(0, 4000, np.random.default_rng(0)), minlength=12)
    assert drawn[0] == 0 and abs(drawn[11] - 2000) < 150 and (abs(drawn[1:11] - 200) < 60).all()


def test_of_a_weak_set():
    tags = [[1, 2], [2], [3], [1, 2]]
    index = tag_index(WeakSet(SceneSet(4, size=64, masks=False), lambda i: Tags(tags[i])))
    assert index.with_tag(2).tolist() == [0, 1, 3] and index.same_tags(0).tolist() == [0, 3] and index.same_tags(2).tolist() == [2]


def test_tables_without_partners_are_refused():
    with pytest.raises(SpmlError, match="no two of 3 images share a tag"): tag_index(WeakSet(SceneSet(3, size=64, masks=False), lambda i: Tags([i + 1])))
    for tags in ([], [True, False], np.zeros((3, 0))):
        with pytest.raises(SpmlError, match=r"an \(N,C\) table"): TagIndex(tags)

"""Half-labelled sets: which images are labelled, that nothing else is ever read, batches of both parts, parts of sets."""
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from spml_kit.core import UNLABELLED, Classes, SpmlError
from spml_kit.data.annotations import Tags
from spml_kit.data.batches import weak_dls
from spml_kit.data.half_labelled import ANNOTATION_SECONDS, HalfLabelled, HalfLoader, half_batches, label_subsets, labelled_numbers
from spml_kit.data.images import ImageSet, SceneSet
from spml_kit.data.weak import WeakSet

SIZE = 32


class Counted(SceneSet):
    "Scenes that remember whose masks were opened"
    def mask(self, i):
        self.opened.add(self.names[i])
        return super().mask(i)


def counted(n=10):
    images = Counted(n, size=SIZE)
    images.opened = set() # parts and copies share it
    return images


def half_of(n=10, share=.3, seed=0, hints=None, images=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # classes that no labelled image shows
        return HalfLabelled(WeakSet(images or SceneSet(n, size=SIZE), "full"), share, seed, hints)


# the choice

@settings(deadline=None)
@given(st.integers(2, 300), st.floats(.001, .999), st.floats(.001, .999), st.integers(0, 5))
def test_a_larger_share_adds_images_and_both_parts_have_some(n, a, b, seed):
    few, more = (labelled_numbers(n, s, seed) for s in sorted((a, b)))
    assert {*few} <= {*more} < {*range(n)} and 1 <= len(few) and abs(len(more) - max(a, b)*n) <= 1
    assert (few == labelled_numbers(n, min(a, b), seed)).all() and (np.diff(few) > 0).all()


def test_another_seed_chooses_others(): assert (labelled_numbers(100, .1, 0) != labelled_numbers(100, .1, 1)).any()


@pytest.mark.parametrize("n, share, says", [(9, 0, "share of 0 of the images"), (9, 1, "share of 1 of"), (9, 1.5, "above 0 and below 1"), (9, -.1, "above 0"), (1, .5, "1 image; at least one with and one without")])
def test_shares_that_leave_no_half(n, share, says):
    with pytest.raises(SpmlError, match=says): labelled_numbers(n, share)


# what may be read

def test_no_mask_of_the_rest_is_ever_opened():
    images = counted()
    half = half_of(images=images)
    known = {images.names[i] for i in half.numbers}
    dls = half_batches(weak_dls(half.every, SceneSet(2, size=SIZE), bs=4, crop=SIZE, steps=6), half, 2)
    for _ in dls.train: pass
    for s in map(half.every.sample, range(10)): assert s.labels.shape == (SIZE, SIZE)
    assert images.opened == known
    for closed in (half.every, half.unlabelled):
        with pytest.raises(SpmlError, match="closed"): closed.images.mask(int(half.rest[0]) if closed is half.every else 0)
    assert images.masks # of the set itself they stay open


def test_the_rest_has_neither_labels_nor_tags_and_the_labelled_part_has_all():
    scenes = SceneSet(10, size=SIZE)
    half = half_of(images=scenes)
    for i in range(10):
        s, mask = half.every.sample(i), scenes.mask(i)
        if i in half.numbers: assert (s.labels == mask).all() and (np.flatnonzero(s.tags) == np.unique(mask)).all()
        else: assert (s.labels == UNLABELLED).all() and not s.tags.any()
    assert half.labelled.names == [scenes.names[i] for i in half.numbers] and half.unlabelled.names == [scenes.names[i] for i in half.rest]


def test_hints_stand_where_no_mask_is():
    scenes = SceneSet(8, size=SIZE)
    drawn = WeakSet(scenes, "scribbles")
    half = half_of(8, hints=drawn, images=scenes)
    for i in range(8):
        s = half.hinted.sample(i)
        assert (s.labels == (scenes.mask(i) if i in half.numbers else drawn.sample(i).labels)).all()
        if i in half.rest: assert (s.tags == drawn.tags(i)).all()
    with pytest.raises(SpmlError, match="has no hints"): half_of(8).hinted
    with pytest.raises(SpmlError, match="same images in the same order"): half_of(8, hints=WeakSet(SceneSet(7, size=SIZE), "scribbles"))


class Squares(ImageSet):
    "A square of one class in images of different sizes, or nothing"
    def _image(self, i): return np.repeat(self._mask(i)[..., None]*60, 3, 2).astype(np.uint8)
    def _mask(self, i):
        k = int(self.names[i])
        mask = np.zeros((20 + 4*k, 24), np.uint8)
        mask[4:12, 4:12] = self.show[k]
        return mask


def squares(show):
    images = Squares([str(k) for k in range(len(show))], Classes(("background", "one", "two")[:max(2, max(show) + 1)]))
    images.show = show
    return images


def test_two_classes_of_which_one_is_in_no_labelled_image():
    images = squares([0]*6)
    with pytest.raises(SpmlError, match="only 'background' is labelled in 2 images: training needs two classes"): HalfLabelled(WeakSet(images, "full"), .3)


def test_a_class_that_no_labelled_image_shows_is_named():
    show = [1]*6
    show[int(labelled_numbers(6, .9)[-1])] = 2
    unseen = next(s for s in range(50) if all(show[i] == 1 for i in labelled_numbers(6, .3, s)))
    with pytest.warns(UserWarning, match="no labelled image shows two"): HalfLabelled(WeakSet(squares(show), "full"), .3, unseen)


def test_one_labelled_image_and_images_of_different_sizes_make_batches():
    half = HalfLabelled(WeakSet(squares([1]*5), "full"), .01)
    assert len(half.numbers) == 1
    dls = half_batches(weak_dls(half.every, squares([1]), bs=6, crop=16, steps=2), half)
    for image, labels, _, _ in dls.train: assert image.shape == (6, 3, 16, 16) and ((labels < 2).flatten(1).any(1) == torch.tensor([True]*3 + [False]*3)).all()
    assert {n for step in range(2) for n in dls.train.names_at(0, step)[:3]} == {str(half.numbers[0])}


# minutes

def test_minutes_are_those_of_the_images_that_were_annotated():
    half = half_of(10, .3)
    second = ANNOTATION_SECONDS
    assert np.isclose(half.minutes(), 3*second["full"]/60) and np.isclose(half.minutes("scribbles"), 3*second["scribbles"]/60)
    assert np.isclose(half.minutes(None, "points"), 10*second["points"]/60) and np.isclose(half.minutes("full", "tags"), (3*second["full"] + 7*second["tags"])/60)
    assert half.minutes(None) == 0


# batches

def loader(half, groups=1, overlap=1., bs=4, **how):
    return half_batches(weak_dls(half.every, SceneSet(2, size=SIZE), bs=bs, crop=SIZE, steps=5, **how), half, groups, overlap).train


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.sampled_from([2, 4, 6]), st.sampled_from([0., .5, 1.]), st.integers(0, 3))
def test_every_group_goes_through_its_images_before_one_comes_again(groups, bs, overlap, seed):
    half = half_of(16, .4)
    stream = loader(half, groups, overlap, bs, seed=seed)
    drawn = np.array([[half.every.names.index(n) for n in stream.names_at(r, s)] for r in range(4) for s in range(5)])
    parts = np.split(drawn, groups + 1, axis=1)
    members = [*label_subsets(half.numbers, groups, overlap, seed), half.rest]
    for part, own in zip(parts, members):
        seen = part.ravel()
        assert {*seen} <= {*own.tolist()}
        for k in range(0, len(seen) - len(own) + 1, len(own)): assert sorted(seen[k:k + len(own)]) == sorted(own)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.floats(0, 1), st.integers(0, 3))
def test_subsets_share_what_overlaps_and_deal_out_the_others(n, groups, overlap, seed):
    try: parts = label_subsets(range(n), groups, overlap, seed)
    except SpmlError as e: assert "a network has none" in str(e) and n - round(overlap*n) < groups and round(overlap*n) == 0; return
    common = set.intersection(*[{*p.tolist()} for p in parts])
    assert set().union(*[{*p.tolist()} for p in parts]) == {*range(n)} and len({len(p) for p in parts}) <= 2
    assert groups == 1 or len(common) == round(overlap*n)


def test_groups_have_orders_of_their_own_and_the_seed_decides_them():
    half = half_of(20, .5)
    names = lambda stream: [stream.names_at(0, s) for s in range(5)]
    two = names(loader(half, 2))
    assert [n[:2] for n in two] != [n[2:4] for n in two] and two == names(loader(half, 2)) and two != names(loader(half, 2, seed=1))


def test_batches_are_the_same_with_workers_and_from_any_round():
    half = half_of()
    plain, many = loader(half), loader(half, num_workers=1)
    first, second = [[[t.clone() for t in b] for b in plain] for _ in range(2)]
    for a, b in zip(first, many): assert all(torch.equal(x, y) for x, y in zip(a, b))
    later = loader(half)
    later.round = 1
    for a, b in zip(second, later): assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_the_settings_of_the_stream_tell_a_run_apart():
    half = half_of()
    told = {k: getattr(loader(half, 2, .5), k) for k in HalfLoader.settings}
    assert told["labelled"] == half.numbers.tolist() and told["groups"] == 2 and told["overlap"] == .5


def test_faults_of_batches_are_said():
    half = half_of()
    with pytest.raises(SpmlError, match="bs=1: a batch needs two images"): loader(half, bs=1)
    with pytest.raises(SpmlError, match="half.every"): half_batches(weak_dls(half.labelled, SceneSet(2, size=SIZE), bs=2, crop=SIZE), half)
    with pytest.raises(SpmlError, match="bs=5: not a multiple of 3"): HalfLoader(half.every, 5, labelled=[0], groups=2)
    with pytest.raises(SpmlError, match="overlap=1.2 is not a share"): loader(half, 2, 1.2)
    torn = loader(half)
    torn.process = 0, 2
    with pytest.raises(SpmlError, match="2 processes would split"): torn.get_idxs()


# parts of sets

@pytest.mark.parametrize("said", ["scribbles", "points", "boxes", "tags", "full", "called", "relabelled"])
def test_a_part_says_of_its_images_what_the_whole_says(said):
    scenes, numbers = SceneSet(5, size=SIZE), [3, 0, 4]
    whole = WeakSet(scenes, "scribbles" if said == "relabelled" else said if said != "called" else lambda i: Tags([0, i + 1]), regions=6)
    if said == "relabelled": whole = whole.relabel(lambda i: np.full((SIZE, SIZE), i, np.uint8))
    part = whole.part(numbers)
    assert part.names == part.images.names == [scenes.names[i] for i in numbers] and len(part) == 3
    for k, i in enumerate(numbers):
        a, b = part.sample(k), whole.sample(i)
        for field in ("image", "labels", "regions", "tags"): assert (getattr(a, field) == getattr(b, field)).all()
        if said == "boxes": assert (part.boxes(k).boxes == whole.boxes(i).boxes).all()


def test_a_part_of_a_part_and_closed_masks():
    scenes = SceneSet(6, size=SIZE)
    assert (scenes.part([5, 2, 1]).part([2, 0]).image(0) == scenes.image(1)).all()
    with pytest.raises(SpmlError, match="closed"): scenes.closed().mask(0)
    assert (scenes.mask(0) == scenes.part([0]).mask(0)).all() and scenes.closed().part([1]).masks is False

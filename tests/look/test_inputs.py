"""What explorers look at: samples of any sizes as one batch, pixels by number, the loss that is looked at."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import photo
from spml_kit.core import VOID, SpmlError
from spml_kit.data.batches import MEAN_COLOUR
from spml_kit.data.weak import Sample
from spml_kit.learn.losses import CrossEntropy, SpmlLoss
from spml_kit.look.inputs import check_pixel, chosen, images_of, labels_of, loss_of, pad_batch, picture_batch, pixel_of

SIZES = st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from([np.uint8, np.int32]))
def test_arrays_of_any_sizes_lie_at_the_top_left(sizes, dtype):
    arrays = [np.random.default_rng(k).integers(0, 200, size).astype(dtype) for k, size in enumerate(sizes)]
    batch = pad_batch(arrays, 201).numpy()
    side = lambda k: next(n for n in range(32, 128, 32) if n >= max(s[k] for s in sizes))
    assert batch.dtype == dtype and batch.shape == (len(sizes), side(0), side(1))
    for padded, a in zip(batch, arrays):
        assert np.array_equal(padded[:a.shape[0], :a.shape[1]], a) and (padded == 201).sum() == padded.size - a.size


@settings(max_examples=20, deadline=None)
@given(SIZES)
def test_samples_as_a_network_and_its_loss_take_them(sizes):
    samples = [Sample(photo(h, w, k), np.full((h, w), k, np.uint8), np.full((h, w), k + 5, np.int32), np.arange(4) == k) for k, (h, w) in enumerate(sizes)]
    (images, regions), (labels, tags) = images_of(samples), labels_of(samples)
    assert torch.equal(images, picture_batch([s.image for s in samples])) and images.dtype == torch.float32
    for k, (h, w) in enumerate(sizes):
        assert torch.equal((images[k, :, :h, :w]*255).round().byte().permute(1, 2, 0), torch.from_numpy(samples[k].image))
        outside = torch.ones(images.shape[2:], dtype=torch.bool)
        outside[:h, :w] = False
        assert ((images[k, :, outside]*255).round().T == torch.tensor(MEAN_COLOUR)).all() and (labels[k][outside] == VOID).all() and not regions[k][outside].any()
        assert (labels[k, :h, :w] == k).all() and (regions[k, :h, :w] == k + 5).all() and tags[k].tolist() == samples[k].tags.tolist()


def test_images_that_are_there():
    assert chosen((2, -1, 5, 0), 3) == [2, 0]
    with pytest.raises(SpmlError, match="none of these images exists: there are 3"): chosen((3, -1), 3)


@pytest.mark.parametrize("point, there", [((0, 0, 0), True), ((1, 7, 4), True), ((2, 0, 0), False), ((-1, 0, 0), False), ((0, 8, 0), False), ((0, 0, 5), False), ((0, -1, 0), False)])
def test_pixels_that_are_nowhere(point, there):
    if there: return check_pixel(point, 2, (5, 8))
    with pytest.raises(SpmlError, match=rf"no pixel \({point[1]}, {point[2]}\) in image {point[0]}"): check_pixel(point, 2, (5, 8))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
def test_a_cell_is_found_again_from_the_pixel_in_its_middle(images, h, w, stride):
    shape, size = (images, h, w), (h*stride, w*stride)
    for cell in range(images*h*w):
        i, x, y = pixel_of(cell, shape, size)
        check_pixel((i, x, y), images, size)
        assert i*h*w + y*h//size[0]*w + x*w//size[1] == cell


def test_a_plain_loss_is_looked_at_as_if_it_were_the_papers():
    own = SpmlLoss([], (2, 2), 1)
    assert loss_of(SimpleNamespace(loss_func=own)) is own
    assert {r.name for r in loss_of(SimpleNamespace(loss_func=CrossEntropy())).relations} == {"annotation", "cooccurrence", "similarity"}

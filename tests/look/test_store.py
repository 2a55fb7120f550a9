"""The store of segments beside the index of training, crops and marks at every border."""
import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import photo
from spml_kit.infer.scores import training_index
from spml_kit.look.store import MAP, RIM, crop_around, framed, on_map, project, scatter
from test_explore import C


def test_store_is_the_training_index(world, retrieval):
    weak, _, learn, _ = world
    ex, masks = retrieval
    want = training_index(learn.model, [weak.images.image(i) for i in range(len(weak))], masks, C, grid=(4, 4))
    assert torch.equal(ex.store.index.label, want.label) and torch.equal(ex.store.index.image, want.image)
    torch.testing.assert_close(ex.store.index.mu, want.mu)
    for i, m in enumerate(ex.store.maps): assert set(ex.store.index.image[np.unique(m[m >= 0])].tolist()) == {i}


@settings(max_examples=60, deadline=None)
@given(st.integers(5, 40), st.integers(5, 40), st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
@example(5, 5, 1, 0., 1.)
def test_a_crop_lies_in_its_image_and_holds_the_segment(h, w, size, down, right):
    image, inside = photo(h, w), np.zeros((h, w), bool)
    y, x = int(down*(h - 1)), int(right*(w - 1))
    inside[y, x] = True
    crop = crop_around(image, inside, size)
    side = min(size, h, w)
    assert crop.shape == (side, side, 3)
    where = [(i, j) for i in range(h - side + 1) for j in range(w - side + 1) if i <= y < i + side and j <= x < j + side]
    assert any((crop[y - i, x - j] == 255).all() for i, j in where) # the outline of a lone pixel is the pixel, in white


def test_a_frame_goes_around():
    crop = photo(4, 5)
    out = framed(crop, (1, 2, 3), 2)
    assert out.shape == (8, 9, 3) and (out[2:6, 2:7] == crop).all()
    out[2:6, 2:7] = 1, 2, 3
    assert (out == (1, 2, 3)).all()


def test_a_map_keeps_the_two_widest_directions_and_places_others_on_it():
    g = torch.Generator().manual_seed(0)
    mu = torch.randn(50, 4, generator=g)*torch.tensor([.1, 5., 1., .1])
    place = project(mu)
    xy = place(mu)
    assert xy.min(0).tolist() == [0, 0] and xy.max(0).tolist() == [1, 1]
    for k, axis in enumerate((1, 2)): assert abs(np.corrcoef(xy[:, k], mu[:, axis])[0, 1]) > .99
    assert np.allclose(place(mu[:3]), xy[:3]) and np.array_equal(place(torch.tensor([[0., 1000, 0, 0]]))[:, :1], np.array([[1.]])) # beyond its border: on it


def test_points_are_where_the_map_says():
    assert on_map(np.array([[0., 0], [1, 1]])).tolist() == [[RIM, RIM], [MAP - 1 - RIM]*2]
    xy, colours = np.array([[0., 0], [1, .5], [.25, 1]]), np.array([[10, 0, 0], [0, 20, 0], [0, 0, 30]], np.uint8)
    plain, marked = scatter(xy, colours), scatter(xy, colours, ringed=[1], boxed=2)
    at = on_map(xy)
    for out in (plain, marked):
        for (x, y), colour in zip(at, colours): assert (out[y, x] == colour).all()
    assert (plain != 255).any(2).sum() == 27 # nine pixels a point
    (x, y), (u, v) = at[1], at[2]
    assert not marked[y, x + 3].any() and not marked[v, u + 6].any() and (marked[v, u + 4] == 255).all() and (plain[y, x + 3] == 255).all()

"What strokes taught as a network: its pieces against their definitions, and that no place and no class comes in that nobody drew."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from spml_kit.infer.drawn import STRIDE, DrawnNet, agreed, cell_rows, linear_drawn, nearest_drawn, without_place
from spml_kit.method.nets import FrozenNet, image_tensor, locations, unit

from conftest import photo

quick = settings(max_examples=25, deadline=None)


@quick
@given(st.integers(0, 1000), st.integers(2, 4))
def test_retrieval_is_its_definition(seed, n):
    g = torch.Generator().manual_seed(seed)
    q, mu, label = unit(torch.randn(7, 5, generator=g)), unit(torch.randn(9, 5, generator=g)), torch.randint(n, (9,), generator=g)
    plain = torch.full((7, n), -torch.inf, dtype=torch.float64)
    for c in set(label.tolist()):
        sim = (q.double() @ mu[label == c].double().T).sort(1, descending=True)[0][:, :3]
        plain[:, c] = 12*sim.mean(1)
    torch.testing.assert_close(nearest_drawn(q, mu, label, n).double(), plain.softmax(1), atol=1e-5, rtol=1e-4)


@quick
@given(st.integers(0, 1000), st.sets(st.integers(0, 3), min_size=1))
def test_the_linear_classifier_knows_only_what_is_drawn(seed, drawn):
    g, drawn = torch.Generator().manual_seed(seed), torch.tensor(sorted(drawn))
    rows, w = torch.randn(6, 5, generator=g), torch.randn(6, 4, generator=g)
    out = linear_drawn(rows, w, drawn)
    torch.testing.assert_close(out[:, drawn], (F.pad(rows, (0, 1), value=1.) @ w)[:, drawn].softmax(1))
    assert (out.sum(1) - 1).abs().max() < 1e-5 and (out > 0).any(0).nonzero().flatten().tolist() == drawn.tolist()


@quick
@given(st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_a_cell_is_four_pixels(size):
    rows, (h, w) = cell_rows(photo(*size), [torch.rand(3, 5, 4), torch.rand(2, 1, 1)])
    assert (h, w) == tuple(-(-n//STRIDE) for n in size) and rows.shape == (h*w, 3 + 2 + 3 + 2) and rows.isfinite().all()
    assert torch.equal(rows[:, -2:], locations(h, w))
    assert torch.equal(without_place(rows)[:, :-2], rows[:, :-2]) and not without_place(rows)[:, -2:].any()


def test_opinions_that_agree_are_kept_and_others_are_halved():
    sure, other = torch.tensor([1 - 1e-3, 1e-3, 0.]), torch.tensor([1e-3, 1 - 1e-3, 0.])
    as_maps = lambda p: p.view(3, 1, 1).expand(3, 2, 2)
    same, halved = (agreed([as_maps(sure), as_maps(o)], photo(8, 8), crf=False) for o in (sure, other))
    assert same.shape == (3, 8, 8) and (same[0] > .99).all() and (halved[:2] - .5).abs().max() < 1e-3 and not halved[2].any()


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = DrawnNet(FrozenNet("test_resnet", pretrained=False), 6, 4, 5)
    made.base.normal_()
    made.mu, made.label = unit(torch.randn(5, 6)), torch.tensor([0, 2, 2, 0, 2])
    return made


def test_the_network_is_its_parts(net):
    image = photo(50, 37)
    rows, grid = cell_rows(image, [m[0] for m in net.embed.fixed(image_tensor(image))])
    rows = without_place(rows)
    with torch.no_grad(): parts = linear_drawn(rows, net.base, torch.tensor([0, 2])), nearest_drawn(unit(net.neck(rows)), net.mu, net.label, 4)
    assert torch.equal(net.scores(image), agreed([p.T.reshape(4, *grid) for p in parts], image))


@pytest.mark.parametrize("size", [(50, 37), (1, 1), (3, 70)])
def test_every_pixel_gets_a_class_that_was_drawn(net, size):
    scores = net.scores(photo(*size))
    assert scores.shape == (4, *size) and (scores.sum(0) - 1).abs().max() < 1e-4
    assert set(np.unique(scores.argmax(0))) <= {0, 2}


def test_where_a_thing_is_does_not_count(net):
    "Whatever head and embedding make of the location"
    before = net.scores(photo(40, 40))
    with torch.no_grad(): net.base[-3:-1] += 5; net.neck.weight[:, -2:] += 5
    assert torch.equal(net.scores(photo(40, 40)), before)

"""Explorers of the neighbours: what they show against the networks themselves, clicks in odd places, images without masks."""
import io

import numpy as np
import pytest
import torch
from PIL import Image

from spml_kit.core import SpmlError
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.look.widgets import GAP
from spml_kit.method.nets import image_tensor, unit
from spml_kit.learn.learner import create_model
from spml_kit.method.recipes import RECIPES
from spml_kit.neighbours.explorers import THUMB, attention_of, effective_places, explore_coattention, explore_context, explore_images, explore_peaks
from spml_kit.neighbours.group_wsss import GroupNet
from spml_kit.neighbours.mcis import McisNet
from spml_kit.neighbours.ocr import image_context
from spml_kit.neighbours.prm import PrmNet, image_peaks, response_maps

NET = dict(backbone="test_resnet", pretrained=False)


def network(kind):
    torch.manual_seed(0)
    return kind(13, **NET).eval()


def weak(masks=True): return WeakSet(SceneSet(4, size=64, masks=masks), "tags")


def said(ex): return ex._words.value


@pytest.mark.parametrize("kind", [McisNet, GroupNet])
def test_attention_is_the_networks_own(kind):
    net, images = network(kind), weak().images
    w = attention_of(net, images.image(0), images.image(1)[:48])
    assert np.allclose(w.sum((2, 3)), 1, atol=1e-5) and (w >= 0).all()
    one, two = (image_tensor(o, "cpu") for o in (images.image(0), images.image(1)[:48]))
    with torch.no_grad():
        if kind is McisNet: asks, answers, attention = net.features(one)[-1], net.features(two)[-1], net.attention
        else: asks, answers, attention = net.look(one)[1], net.look(two)[1], net.graph.attention
        heard = attention.receive(asks, answers)
    assert np.allclose(np.einsum("hwkl,dkl->dhw", w, answers[0].numpy()), heard[0].numpy(), atol=1e-4)


def test_places_between_one_and_all():
    w = np.random.default_rng(0).dirichlet(np.full(12, .1), (5, 6)).reshape(5, 6, 3, 4)
    n = effective_places(w)
    assert n.shape == (5, 6) and (n >= 1 - 1e-9).all() and (n <= 12 + 1e-9).all()


@pytest.mark.parametrize("kind", [McisNet, GroupNet])
@pytest.mark.parametrize("masks", [True, False])
def test_a_place_is_clicked(kind, masks):
    ex = explore_coattention(network(kind), weak(masks), (0, 1, 2))
    before = ex.pictures[1].png
    ex.pictures[0].point = [3, 60]
    assert ex.point == (3, 60) and len(ex.view.pictures) == 2 and ("% of the weight" in str(ex.view.bars)) == masks
    ex.pictures[1].point = [1, 1] # nothing happens
    assert ex.point == (3, 60) and "first picture" in said(ex)
    ex.sender.value = 2
    assert ex.pictures[1].png != before and np.array(Image.open(io.BytesIO(ex.pictures[1].png))).shape == (64, 64, 3)
    ex.point = (64, 0)
    assert "no pixel" in said(ex)


def test_models_without_attention_are_refused():
    with pytest.raises(SpmlError, match="no attention to other images"): attention_of(network(PrmNet), *map(weak().images.image, (0, 1)))
    for which in ((0,), (2, 99)):
        with pytest.raises(SpmlError, match="two at least"): explore_coattention(network(McisNet), weak(), which)


@pytest.mark.parametrize("masks", [True, False])
def test_the_nearest_peak_is_taken(masks):
    net, images = network(PrmNet), weak(masks)
    ex = explore_peaks(net, images, (1, 2))
    ex.least.value = 0.
    peaks, places = image_peaks(net, images.images.image(1), images.tags(1), least=0.)
    assert len(peaks) > 1
    for k in (0, len(peaks) - 1):
        ex.pictures[0].point = [int(v) for v in places[k][::-1]]
        assert (places[ex.peak] == places[k]).all()
        assert np.allclose(ex.response(ex.peak), response_maps(net, images.images.image(1), peaks[ex.peak:ex.peak + 1])[0])
    assert ("IoU" in str(ex.view.bars) or "no such object" in str(ex.view.bars)) == masks
    scores = [s for s, _ in ex.ranked(ex.peak)]
    assert scores == sorted(scores, reverse=True)


def test_no_proposals_and_no_peaks():
    ex = explore_peaks(network(PrmNet), weak(), (0, 1), proposals=lambda x, maps: np.zeros((0, *x.shape[:2]), bool))
    assert "There is no proposal" in said(ex) and ex.view.bars is None
    ex.kept[0, ex.least.value] = torch.zeros(0, 4, dtype=torch.long), np.zeros((0, 2), int)
    ex.refresh()
    assert "No class map of this image has a peak" in said(ex)
    ex.pictures[0].point = [1, 1]
    assert "no peak" in said(ex)


def segmenting(head="ocr"):
    torch.manual_seed(0)
    return create_model(RECIPES["small"].but(embed=NET, dim=8), 13, head=head).eval()


@pytest.mark.parametrize("masks", [True, False])
def test_weights_of_regions_are_those_of_the_head(masks):
    net, images = segmenting(), weak(masks)
    ex = explore_context(net, images, (1, 2))
    ex.pictures[0].point = [61, 5]
    seen, (h, w) = image_context(net, images.images.image(1))
    weights = seen.attention[0].view(h, w, 13)[5*h//64, 61*w//64].numpy()
    bars = [v for v, *_ in ex.view.bars.values()]
    assert bars == sorted(bars, reverse=True) and np.allclose(bars, np.sort(weights)[::-1][:6])
    assert (" and labelled '" in ex.view.sentence) == masks and ex.point == (61, 5)
    before = ex.pictures[2].png
    ex.region.value = int(weights.argmin())
    assert ex.pictures[2].png != before and images.classes.names[int(weights.argmin())] in [*ex.view.pictures][2]
    ex.point = (64, 0)
    assert "no pixel" in said(ex)


def test_other_heads_have_no_regions():
    with pytest.raises(SpmlError, match="SoftmaxHead has no class regions"): explore_context(segmenting("softmax"), weak())
    with pytest.raises(SpmlError, match="PrmNet has no class regions"): explore_context(network(PrmNet), weak())


def whole(n=7, size=64, d=5):
    "Vectors of scenes, two of them alike, and the scenes"
    v = unit(torch.randn(n, d, generator=torch.Generator().manual_seed(0)))
    v[-1] = v[1]
    return v, WeakSet(SceneSet(n, size=size), "tags")


def test_the_nearest_images_and_their_tags():
    v, images = whole()
    ex = explore_images(v, images)
    for i in range(7):
        ex.image.value, ex.n.value = i, 4
        sim = (v @ v[i]).tolist()
        assert i not in ex.shown and len({*ex.shown}) == 4
        assert [sim[j] for j in ex.shown] == pytest.approx(sorted((s for j, s in enumerate(sim) if j != i), reverse=True)[:4], abs=1e-5)
        for j, (name, (value, words, colour)) in zip(ex.shown, ex.view.bars.items()):
            both = images.tags(i) & images.tags(j)
            assert name == images.images.names[j] and value == pytest.approx(sim[j], abs=1e-5)
            assert words.split("  ")[1] == (", ".join(np.array(images.classes.names)[both][1:]) or "no tag in common")
            assert (colour == "#0072B2") == bool(both[1:].any())
        share = [(images.tags(i) & images.tags(j))[1:].any() for j in range(7) if j != i]
        assert f"{sum((images.tags(i) & images.tags(j))[1:].any() for j in ex.shown)} of its 4" in said(ex) and f"{100*np.mean(share):.0f} % of all" in said(ex)


def test_a_neighbour_is_clicked():
    v, images = whole()
    ex = explore_images(v, images)
    third = ex.shown[2]
    ex.pictures[0].point = [1, 1] # nothing happens
    assert ex.image.value == 0 and "Click one of the neighbours" in said(ex)
    ex.pictures[1].point = [THUMB + 6 + GAP//2, 5] # nor between two
    assert ex.image.value == 0
    ex.pictures[1].point = [2*(THUMB + 6 + GAP) + 7, 5]
    assert ex.image.value == third and images.images.names[third] in said(ex)


def test_images_of_any_size_and_faults():
    v, images = whole(3, size=250)
    ex = explore_images(v, images)
    assert len(ex.shown) == 2 and np.array(Image.open(io.BytesIO(ex.pictures[1].png))).shape == (THUMB + 6, 2*(THUMB + 6) + GAP, 3)
    with pytest.raises(SpmlError, match="2 vectors of 3 images"): explore_images(v[:2], images)
    with pytest.raises(SpmlError, match="give two at least"): explore_images(v[:1], WeakSet(SceneSet(1, size=64), "tags"))

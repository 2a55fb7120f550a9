"""From image to label map: scores of the head, votes of segments, many images at once."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spml_kit.core import UNLABELLED, VOID, SpmlError
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.infer.pseudo import random_walk_scores
from spml_kit.infer.retrieval import SegmentIndex
from spml_kit.infer.scores import head_scores, image_segments, majority_labels, mean_boundary_f, predict_head, predict_retrieval, retrieval_scores, score, stream_head, stream_retrieval, stream_segments, training_index
from spml_kit.infer.views import embed_view, views
from spml_kit.metrics import boundary_f
from spml_kit.method.nets import locations, unit, with_location
from spml_kit.method.segments import cluster_means, start_grid
from test_views import SIZES, Pointwise, close, make, mirrored, photographs, picture


@pytest.mark.parametrize("size", SIZES)
def test_flipped_scores_are_symmetric(net, size):
    image = picture(*size)
    one, other = (head_scores(net, o, scales=(1., .75), flip=True) for o in (image, mirrored(image)))
    close(one, other.flip(-1))
    close(one.sum(0), torch.ones(size))


def test_scores_are_the_mean_over_views(net):
    image = picture(40, 56)
    assert views((.5, 1.), flip=True) == [(.5, False), (.5, True), (1., False), (1., True)] and views() == [(1., False)]
    each = [F.interpolate(embed_view(net, image, *view)[1][None], (40, 56), mode="bilinear", align_corners=False)[0].softmax(0) for view in views((.5, 1.), True)]
    found = head_scores(net, image, scales=(.5, 1.), flip=True)
    close(found, sum(each)/4)
    assert (predict_head(net, image, scales=(.5, 1.), flip=True) == found.argmax(0).numpy()).all()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0, 1, 2, 7, UNLABELLED, VOID])), min_size=1, max_size=40), st.integers(5, 7), st.sampled_from([torch.uint8, torch.int64]))
def test_majority_against_counting(pairs, m, dtype):
    own, labels = (torch.tensor(o) for o in zip(*pairs))
    want = [max(range(256), key=lambda c: (sum(p == (s, c) for p in pairs)*(.001 if c == UNLABELLED else 1), -c)) for s in range(m)] # V09: ties to the smallest, empty gives 0; the unlabelled have a say where nobody else has
    assert majority_labels(labels.to(dtype), own, m).tolist() == want


@pytest.mark.parametrize("size", [(24, 24), (9, 31), (3, 5), (1, 1)])
def test_image_segments(size):
    v = unit(torch.randn(5, *size, generator=torch.Generator().manual_seed(0)), 0)
    own, mu = image_segments(v, (4, 4), 5)
    assert torch.equal(own.unique(), torch.arange(len(mu))) and len(mu) <= 16
    close(mu, unit(torch.stack([v.flatten(1)[:, own == s].sum(1) for s in range(len(mu))])))


def two_colours(size=(40, 48)):
    "Left half red, right half blue: image and label map (1 and 2)"
    labels = np.ones(size, np.uint8)
    labels[:, size[1]//2:] = 2
    return np.array([[0, 0, 0], [220, 30, 40], [30, 40, 220]], np.uint8)[labels], labels


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [None, 32])
@pytest.mark.parametrize("scales", [(1.,), (.5, 1.)])
def test_retrieval_finds_colours(scales, crop, flip):
    model, (image, labels) = make(Pointwise), two_colours()
    index = training_index(model, [image], [labels], 3, (1.,), (3, 3), crop)
    assert set(index.label.tolist()) == {1, 2} and not index.image.any()
    test = np.concatenate([image[:, ::-1], image[:20, ::-1]]) # another size, the colours exchanged
    scores = retrieval_scores(model, test, index, 3, k=3, scales=scales, flip=flip, grid=(3, 3), crop=crop)
    close(scores.sum(0), torch.ones(test.shape[:2]))
    assert (predict_retrieval(model, test, index, 3, k=3, scales=scales, flip=flip, grid=(3, 3), crop=crop) == np.concatenate([labels[:, ::-1], labels[:20, ::-1]])).all()


@pytest.mark.parametrize("scales", [(1.,), (.5, 1.)])
def test_index_leaves_out_the_unlabelled(net, scales):
    scenes = SceneSet(3, size=64)
    images, labels = [scenes.image(i) for i in range(3)], [scenes.mask(i).copy() for i in range(3)]
    labels[0][:] = UNLABELLED
    labels[1][:, :30] = VOID
    labels[2][:25] = UNLABELLED
    index = training_index(net, images, labels, 13, scales, (4, 4))
    want = []
    for i in range(3):
        for scale in scales:
            v = embed_view(net, images[i], scale)[0]
            own, mu = image_segments(v, (4, 4))
            h, w = v.shape[-2:]
            small = labels[i][np.arange(h)[:, None]*64//h, np.arange(w)*64//w].ravel()
            for s in range(len(mu)):
                voters = small[(own.numpy() == s) & (small != UNLABELLED)]
                top = np.bincount(voters).argmax() if len(voters) else UNLABELLED # the first of the largest
                if top < UNLABELLED: want.append((mu[s], top, i))
    mu, label, image = zip(*want)
    close(index.mu, torch.stack(mu))
    assert index.label.tolist() == [*label] and index.image.tolist() == [*image]
    assert 0 not in index.image and {1, 2} == set(index.image.tolist())
    with pytest.raises(SpmlError, match="nothing to retrieve"): training_index(net, images[:1], labels[:1], 13)


def test_strokes_name_segments(net):
    weak = WeakSet(SceneSet(2, size=64), "scribbles")
    samples = [weak.sample(i) for i in range(2)]
    index = training_index(net, [s.image for s in samples], [s.labels for s in samples], 13, grid=(4, 4))
    assert {*index.label.tolist()} == {*np.unique([s.labels for s in samples])} - {UNLABELLED} # every stroke runs through some segment of its own


@pytest.mark.parametrize("scores", ["head", "retrieval", "walk"])
def test_left_and_right_change_places_in_the_mirror(net, scores):
    "What is said of a mirror image is what is said of the image, with the sides exchanged"
    image, mirror = picture(64, 64), np.arange(256)
    mirror[[3, 4]] = 4, 3
    index = SegmentIndex(unit(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), 1), torch.arange(40) % 13, torch.zeros(40, dtype=torch.long), 13)
    say = {"head": lambda x, m: head_scores(net, x, flip=True, mirror=m), "retrieval": lambda x, m: retrieval_scores(net, x, index, 13, k=5, flip=True, mirror=m),
           "walk": lambda x, m: random_walk_scores(net, x, np.ones(13, bool), steps=2, mirror=m)}[scores]
    there, here = say(mirrored(image), mirror), say(image, mirror)
    close(there.flip(-1)[mirror[:13]], here, atol=1e-4)
    assert (there.flip(-1)[mirror[:13]] - say(image, None)).abs().max() > 1e-3


def test_score(net):
    scenes = SceneSet(3, size=64)
    masks = [scenes.mask(i) for i in range(3)]
    assert [c.accuracy for c in score(masks, scenes, progress=False)] == [100]*3
    wrong = [masks[0], (masks[1] + 1) % 13, masks[2]]
    assert [c.accuracy for c in score(iter(wrong), scenes, progress=False)] == [100, 0, 100]
    for n, predictions in ((2, masks[:2]), (4, [*masks, masks[0]])):
        with pytest.raises(SpmlError, match=f"{n} predictions for 3 images"): score(predictions, scenes, progress=False)


def test_mean_boundary_f_leaves_void_images_out():
    class Masks(list):
        mask = list.__getitem__
    rng = np.random.default_rng(0)
    masks = Masks(rng.integers(0, 3, (4, 24, 32)).astype(np.uint8))
    predictions = rng.integers(0, 3, (4, 24, 32)).astype(np.uint8)
    masks[1] = np.full((24, 32), VOID, np.uint8)
    each = [100*boundary_f(predictions[i], masks[i]) for i in (0, 2, 3)]
    assert mean_boundary_f(iter(predictions), masks) == pytest.approx(np.mean(each))
    assert np.isnan(mean_boundary_f(predictions[:1], Masks(masks[1:2])))
    with pytest.raises(SpmlError, match="3 predictions for 4 images"): mean_boundary_f(predictions[:3], masks)


def test_index_of_another_network(net):
    index = SegmentIndex(torch.eye(5), torch.arange(5), torch.zeros(5).long())
    with pytest.raises(SpmlError, match="shape"): predict_retrieval(net, picture(32, 32), index, 13)


@pytest.mark.parametrize("bs", [2, 5, 16])
@pytest.mark.parametrize("crop", [None, 32])
@pytest.mark.parametrize("scales,flip", [((1.,), False), ((.5, 1.), True)])
def test_batches_predict_what_one_image_alone_gets(net, bs, crop, scales, flip):
    images, labels = photographs(np.random.default_rng(bs), 6)
    mirror = np.arange(256)
    mirror[[3, 4]] = 4, 3
    looks = dict(scales=scales, crop=crop)
    indices = [training_index(net, images, labels, 13, grid=(4, 4), bs=n, **looks) for n in (1, bs)]
    close(indices[0].mu, indices[1].mu, atol=1e-4)
    for name in ("label", "image", "row"): assert torch.equal(*(getattr(i, name) for i in indices))
    looks |= dict(flip=flip, mirror=mirror)
    for found, image in zip(stream_head(net, images, bs=bs, **looks), images, strict=True): close(found, head_scores(net, image, **looks))
    ask = dict(index=indices[0], n_classes=13, k=5, grid=(4, 4), **looks)
    for found, image in zip(stream_retrieval(net, images, bs=bs, **ask), images, strict=True):
        assert ((found - retrieval_scores(net, image, **ask)).abs() < 1e-5).float().mean() > .98 # an equally near neighbour may take another's place


def test_segments_of_many_are_those_of_each():
    g = torch.Generator().manual_seed(0)
    vs = [unit(torch.randn(5, *size, generator=g, dtype=torch.float64), 0) for size in [(9, 31), (24, 24), (9, 31), (3, 5), (24, 24), (9, 31)]]
    for v, (own, mu) in zip(vs, stream_segments(iter(vs), (4, 4), bs=4), strict=True):
        want = image_segments(v, (4, 4))
        assert own.shape == v.shape[1:] and torch.equal(own.flatten(), want[0])
        torch.testing.assert_close(mu, want[1])


def by_hand(v, grid, canvas, iterations):
    "Pad the embedding, cluster the canvas without its padding"
    D, h, w = v.shape
    H, W = max(h, canvas), max(w, canvas)
    start, k = start_grid(H, W, grid, "cpu")
    inside = torch.zeros(H, W, dtype=torch.bool)
    inside[:h, :w] = True
    own = start.view(H, W)[inside]
    u = with_location(v.permute(1, 2, 0).reshape(-1, D), locations(H, W, dtype=v.dtype).view(H, W, 2)[inside])
    for _ in range(iterations):
        s = u @ cluster_means(u, own, k).T
        best = s.max(1)
        own = torch.where(best.values > s.gather(1, own[:, None])[:, 0], best.indices, own)
    return torch.unique(own, return_inverse=True)[1].view(h, w)


@pytest.mark.parametrize("size, canvas", [((20, 30), 40), ((40, 24), 32), ((33, 33), 33), ((50, 60), 32)])
def test_clusters_on_the_padded_canvas(size, canvas):
    v = unit(torch.randn(5, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0)
    own, mu = next(stream_segments([v], (6, 6), 3, canvas=canvas))
    assert torch.equal(own, by_hand(v, (6, 6), canvas, 3)) and len(mu) == own.max() + 1
    plain = next(stream_segments([v], (6, 6), 3))[0]
    assert torch.equal(own, plain) == (min(size) >= canvas)

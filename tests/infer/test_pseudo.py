"""Pseudo-labels without masks: what is known stays, the walk and its start, refinements."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spml_kit.core import UNLABELLED, VOID, SpmlError
from spml_kit.data.body_parts import PartScenes
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import Sample, WeakSet
from spml_kit.infer import views as room
from spml_kit.infer.crf import dense_crf
from spml_kit.infer.pseudo import nearest_segment_scores, pseudo_labels, random_walk_scores, scores_to_labels
from spml_kit.infer.scores import predict_retrieval, training_index
from spml_kit.infer.views import embed_view
from spml_kit.learn.learner import create_model
from spml_kit.method.recipes import RECIPES
from spml_kit.method.segments import make_segments
from spml_kit.regions.pooling import region_mean
from test_scores import two_colours
from test_views import Pointwise, close, make, mirrored, picture


def test_spread_by_the_definition():
    "Pixel by pixel: nearest labelled segment, then shares within each segment"
    weak = WeakSet(PartScenes(2, size=64), "keypoints", regions=20)
    model = create_model(RECIPES["small"], 15)
    s = weak.sample(0)
    s.labels[:, 50:] = VOID
    v = embed_view(model, s.image)[0]
    v = torch.nn.functional.interpolate(v[None], (32, 32), mode="bilinear", align_corners=False)
    seg = make_segments(v, *(torch.as_tensor(o[None]) for o in (s.labels, s.regions, s.tags)), (3, 3))
    counts = torch.zeros(len(seg.protos), 15)
    for x, own in zip(seg.v, seg.own):
        cosine = (seg.protos.mu @ x).masked_fill(seg.protos.label >= UNLABELLED, -2)
        counts[own, seg.protos.label[cosine.argmax()]] += 1
    shares = counts/counts.sum(1, keepdim=True)
    half = torch.zeros(32*32, 15)
    half[seg.pixel] = shares[seg.own]
    half = half.T.view(1, 15, 32, 32)
    for stride in (2, 4, 8): # the maximum of a class is 1 where the walk begins, whatever the resize took from it
        want = torch.nn.functional.interpolate(half, (64//stride, 64//stride), mode="bilinear", align_corners=False)[0]
        want = want/want.amax((1, 2), keepdim=True).clamp_min(1e-12)
        want[~torch.as_tensor(s.tags)] = 0
        found = nearest_segment_scores(model, s, (3, 3), stride)
        torch.testing.assert_close(found, want)
        assert not found[..., -(-50//stride):].any() and found.amax((1, 2)).max() == 1 # void
    s.labels[:] = UNLABELLED
    with pytest.raises(SpmlError, match="without any labelled pixel"): nearest_segment_scores(model, s)


def pseudo_label(net, image, labels, present, refine=(), **kwargs):
    "One image by hand"
    return scores_to_labels(random_walk_scores(net, image, present, **kwargs), Sample(image, labels, np.arange(labels.size).reshape(labels.shape)//50, present), refine)


def sparse(scenes, i, seed=0):
    "A tenth of the pixels annotated, some void"
    mask, chance = scenes.mask(i).copy(), np.random.default_rng(seed + i).random(scenes.mask(i).shape)
    mask[chance > .1] = UNLABELLED
    mask[chance > .95] = VOID
    return mask


@pytest.mark.parametrize("size", [(64, 64), (50, 61), (7, 90)])
@pytest.mark.parametrize("kwargs", [dict(), dict(refine=("regions", "crf")), dict(stride=16, steps=3, scales=(.5, 1.)), dict(crop=32, steps=0)], ids=str)
def test_pseudo_label_keeps_what_is_known(net, size, kwargs):
    rng, present = np.random.default_rng(0), np.isin(np.arange(13), [0, 3, 7])
    labels = rng.choice(np.array([0, 3, 7, UNLABELLED, UNLABELLED, VOID], np.uint8), size)
    before = labels.copy()
    found = pseudo_label(net, picture(*size), labels, present, **kwargs)
    assert (labels == before).all() and found.dtype == np.uint8 and found.shape == size
    unknown = labels == UNLABELLED
    assert (found[~unknown] == labels[~unknown]).all()
    assert set(found[unknown].tolist()) <= {0, 3, 7} # only classes that the image holds


@pytest.mark.parametrize("size", [(64, 64), (50, 61)])
def test_pseudo_label_sees_the_mirror_image_too(net, size):
    "so that the mirrored image has the mirrored labels"
    image, labels, present = picture(*size), np.full(size, UNLABELLED, np.uint8), np.ones(13, bool)
    one, other = (pseudo_label(net, o, labels, present, steps=2) for o in (image, mirrored(image)))
    assert len(np.unique(one)) > 2 and (one != mirrored(other)).mean() < .002 # but for rounding


def test_pseudo_label_spreads_what_the_head_says():
    "Colours that the head knows; it is asked about classes 1 and 2 only"
    model, (image, mask) = make(Pointwise, dim=3, n_classes=3), two_colours((64, 64))
    with torch.no_grad():
        model.embed.conv.weight.copy_(torch.eye(3).view(3, 3, 1, 1)), model.embed.conv.bias.zero_()
        model.head.weight.copy_(torch.tensor([[0., 9, 0], [9, 0, 0], [0, 0, 9]]).view(3, 3, 1, 1)), model.head.bias.zero_() # green, red, blue
    found = pseudo_label(model, image, np.full_like(mask, UNLABELLED), np.array([False, True, True]))
    inner = np.abs(np.arange(64) - 31.5) > 8 # the walk's cells
    assert (found[:, inner] == mask[:, inner]).all()
    only = pseudo_label(model, image, np.full_like(mask, UNLABELLED), np.array([False, False, True]))
    assert (only == 2).all()
    with pytest.raises(SpmlError, match="without any tag"): pseudo_label(model, image, mask, np.zeros(3, bool))


@pytest.mark.parametrize("keep_annotated", [True, False])
def test_what_was_annotated_may_be_labelled_anew(keep_annotated):
    labels, scores = np.array([[0, 1, UNLABELLED, VOID]], np.uint8), torch.tensor([0., 0, 1]).view(3, 1, 1).expand(3, 1, 4)
    found = scores_to_labels(scores, Sample(picture(1, 4), labels, np.zeros((1, 4), int), np.ones(3, bool)), (), keep_annotated)
    assert found.tolist() == ([[0, 1, 2, VOID]] if keep_annotated else [[2, 2, 2, VOID]])


def test_other_scores_may_walk(net):
    "maps of any size instead of the head's; classes nobody names stay 0"
    image, maps = picture(40, 56), torch.rand(13, 20, 28)
    maps[5:] = 0
    walked = random_walk_scores(net, image, np.ones(13, bool), maps, stride=4)
    assert walked.shape == (13, 40, 56) and (walked[5:] == 0).all()
    close(random_walk_scores(net, image, np.ones(13, bool), torch.ones(13, 3, 3), stride=4), torch.ones(13, 40, 56)) # constant maps are fixed points
    still = random_walk_scores(net, image, np.ones(13, bool), maps, stride=2, steps=0)
    close(still, F.interpolate(maps[None], (40, 56), mode="bilinear", align_corners=False)[0])


def test_refinements_come_in_order(net):
    image, labels = picture(24, 30), np.full((24, 30), UNLABELLED, np.uint8)
    sample, scores = Sample(image, labels, np.arange(720).reshape(24, 30)//45, np.ones(3, bool)), torch.rand(3, 24, 30)
    mean = region_mean(scores, torch.as_tensor(sample.regions))
    assert (scores_to_labels(scores, sample, ()) == scores.argmax(0).numpy()).all()
    assert (scores_to_labels(scores, sample, ("regions",)) == mean.argmax(0).numpy()).all()
    assert (scores_to_labels(scores, sample, ("regions", "crf")) == dense_crf(image, mean).argmax(0).numpy()).all()
    assert (scores_to_labels(scores, sample, ("crf", "regions")) != scores_to_labels(scores, sample, ("regions", "crf"))).any()
    with pytest.raises(SpmlError, match="refine .*magic"): scores_to_labels(scores, sample, ("magic",))


def test_masks_stay_closed(net):
    opened = SceneSet(3, size=64)
    given = [sparse(opened, i) for i in range(3)]
    given[2][:] = UNLABELLED
    closed = SceneSet(3, size=64, masks=False)
    for look in (closed.mask, closed.instances):
        with pytest.raises(SpmlError, match="closed"): look(0)
    weak = WeakSet(closed, lambda i: given[i])
    labels = pseudo_labels(net, weak, progress=False, steps=2)
    for i in (0, 1): assert (labels[i][given[i] != UNLABELLED] == given[i][given[i] != UNLABELLED]).all() and not (labels[i] == UNLABELLED).any()
    assert (labels[2] == UNLABELLED).all() # nobody knows anything about it
    index = training_index(net, (closed.image(i) for i in range(3)), labels, 13, grid=(4, 4))
    assert set(index.image.tolist()) == {0, 1} and predict_retrieval(net, closed.image(2), index, 13, grid=(4, 4)).shape == (64, 64)


def test_windows_reach_what_walks(net, monkeypatch):
    "The start from segments looks through the same windows as the walk"
    seen, real = [], room._windows
    monkeypatch.setattr(room, "_windows", lambda model, x, head, crop, **how: seen.append((tuple(x.shape), crop)) or real(model, x, head, crop, **how))
    weak = WeakSet(scenes := SceneSet(1, size=64), lambda i: sparse(scenes, i))
    pseudo_labels(net, weak, progress=False, start="nearest", grid=(3, 3), steps=2, crop=32)
    assert seen == [((1, 3, 64, 64), 32)]*2 # the image and its mirror, once each
    with pytest.raises(SpmlError, match="start 'tail' is not one of"): pseudo_labels(net, weak, progress=False, start="tail")


@pytest.mark.parametrize("start", ["head", "nearest"])
@pytest.mark.parametrize("bs", [3, 8])
def test_batches_label_what_one_image_alone_gets(net, bs, start):
    scenes = SceneSet(5, size=64)
    labels = [sparse(scenes, i) for i in range(5)]
    labels[1][:] = UNLABELLED
    weak = WeakSet(scenes, lambda i: labels[i], regions=12)
    one, other = (pseudo_labels(net, weak, progress=False, start=start, grid=(3, 3), steps=2, scales=(.75, 1.), bs=n) for n in (1, bs))
    assert len(one) == 5 and (one[1] == UNLABELLED).all() and all((a == b).mean() > .99 for a, b in zip(one, other, strict=True))

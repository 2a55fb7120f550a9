"""From image to label map: windows, padding, mirror images, votes, pseudo-labels without masks, the second head."""
import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.progress import ProgressCallback
from hypothesis import given, settings, strategies as st
from torch import nn

from spml_kit.infer import views as room
from spml_kit.data.batches import weak_dls
from spml_kit.core import SpmlError, UNLABELLED, VOID
from spml_kit.infer.crf import dense_crf
from spml_kit.data.weak import Sample, WeakSet
from spml_kit.data.images import SceneSet
from spml_kit.method.nets import EmbedNet, SegNet, SoftmaxHead, unit
from spml_kit.learn.head import FrozenEmbed, head_learner
from spml_kit.infer.scores import head_scores, image_segments, majority_labels, predict_head, predict_retrieval, retrieval_scores, score, stream_head, stream_retrieval, stream_segments, training_index
from spml_kit.regions.pooling import region_mean
from spml_kit.infer.pseudo import pseudo_labels, scores_to_labels, random_walk_scores
from spml_kit.infer.views import embed_view, stream_views, views, window_ends
from spml_kit.method.recipes import RECIPES
from spml_kit.infer.retrieval import SegmentIndex

close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
SIZES = [(32, 32), (40, 56), (33, 70), (20, 45), (1, 1), (64, 7)]


class Pointwise(nn.Module):
    "An embedding network that sees single pixels: where it stands makes no difference"
    def __init__(self, dim=6):
        super().__init__()
        self.register_buffer("mean", torch.tensor([.5, .4, .3]).view(3, 1, 1))
        self.conv, self.seen = nn.Conv2d(3, dim, 1), []

    def forward(self, x):
        self.seen.append(x)
        return self.conv(x - self.mean)


class Placed(Pointwise):
    "One that also sees how far a pixel is from the left and the top of what is shown"
    def forward(self, x):
        y, z = (torch.linspace(-1, 1, n).view(shape) for n, shape in zip(x.shape[-2:], ((-1, 1), (1, -1))))
        return super().forward(x) + 2*y + torch.cos(5*z)


def make(embed, dim=6, n_classes=4, seed=0):
    torch.manual_seed(seed)
    return SegNet(embed(dim), nn.Conv2d(dim, n_classes, 1)).eval()


@pytest.fixture(scope="module")
def net():
    "A real network, small and untrained"
    torch.manual_seed(0)
    return SegNet(EmbedNet("test_resnet", 8, pretrained=False), SoftmaxHead(8, 13)).eval()


def picture(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def mirrored(image):
    return image[:, ::-1].copy()


# views

@pytest.mark.parametrize("scale", [.5, .75, 1., 1.5])
@pytest.mark.parametrize("crop", [None, 32])
@pytest.mark.parametrize("size", SIZES)
def test_any_size(net, size, crop, scale):
    v, logits = embed_view(net, picture(*size), scale, crop=crop)
    want = tuple(max(1, int(scale*n)) for n in size)
    assert v.shape == (8, *want) and logits.shape == (13, *want)
    close(v.norm(dim=0), torch.ones(want)) # also where embeddings are resized or windows averaged
    assert logits.isfinite().all() and predict_head(net, picture(*size), scales=(scale,), crop=crop).shape == size


@pytest.mark.parametrize("crop", [None, 32, 50])
@pytest.mark.parametrize("size", SIZES)
def test_padding_is_the_mean_colour(size, crop):
    model, image = make(Pointwise), picture(*size)
    embed_view(model, image, crop=crop)
    shown = torch.cat([x.flatten(2).transpose(1, 2).reshape(-1, 3) for x in model.embed.seen])
    pixels = torch.from_numpy(image).view(-1, 3).float()/255
    fill = model.embed.mean.view(3)
    whole = model.embed.seen[0][0].permute(1, 2, 0)
    h, w = min(size[0], whole.shape[0]), min(size[1], whole.shape[1])
    close(whole[:h, :w], torch.from_numpy(image[:h, :w]).float()/255)
    close(whole[h:], fill.expand_as(whole[h:])), close(whole[:, w:], fill.expand_as(whole[:, w:]))
    distance = torch.cdist(shown, torch.cat([pixels, fill[None]]), compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert distance.max() < 1e-5 # nothing is shown but the image and the mean colour
    assert all(n % 32 == 0 for n in whole.shape[:2]) if crop is None else whole.shape[:2] == (crop, crop)


@pytest.mark.parametrize("scale", [.6, 1.])
@pytest.mark.parametrize("crop", [16, 32, 33])
@pytest.mark.parametrize("size", SIZES)
def test_windows_that_agree_equal_the_whole(size, crop, scale):
    model, image = make(Pointwise), picture(*size)
    for whole, windows in zip(embed_view(model, image, scale), embed_view(model, image, scale, crop=crop)): close(windows, whole)


@pytest.mark.parametrize("size,crop", [((40, 56), 32), ((33, 70), 32), ((20, 45), 24), ((64, 64), 32)])
def test_windows_that_differ_are_averaged(size, crop):
    model, image = make(Placed), picture(*size)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()/255
    padded = model.embed.mean[None].expand(1, 3, *(max(n, crop) for n in size)).clone()
    padded[..., :size[0], :size[1]] = x
    sums, logit_sums, count = (torch.zeros(n, *padded.shape[-2:]) for n in (6, 4, 1))
    tops = [[e - crop for e in window_ends(crop, crop, n)] for n in padded.shape[-2:]]
    for y in tops[0]:
        for z in tops[1]:
            with torch.no_grad(): emb, logits = model(padded[..., y:y + crop, z:z + crop])
            sums[:, y:y + crop, z:z + crop] += unit(emb[0], 0) # the mean of directions, not of raw embeddings
            logit_sums[:, y:y + crop, z:z + crop] += logits[0]
            count[:, y:y + crop, z:z + crop] += 1
    assert count.min() == 1 and (count.max() > 1 or size == (64, 64))
    v, logits = embed_view(model, image, crop=crop)
    close(v, unit(sums, 0)[:, :size[0], :size[1]])
    close(logits, (logit_sums/count)[:, :size[0], :size[1]])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 300))
def test_windows_cover(crop, stride, more):
    ends = window_ends(crop, min(stride, crop), crop + more)
    assert ends[0] == crop and ends[-1] == crop + more
    assert all(0 <= b - a <= min(stride, crop) + 1 for a, b in zip(ends, ends[1:])) # the reference rounds down, so a step can be longer by one...
    covered = np.zeros(crop + more, bool)
    for e in ends: covered[e - crop:e] = True
    assert covered.all() # ...but leaves no gap


@pytest.mark.parametrize("crop", [None, 32])
@pytest.mark.parametrize("size", SIZES)
def test_flip_is_the_mirror_image_mirrored_back(net, size, crop):
    image = picture(*size)
    for back, mirror in zip(embed_view(net, image, flip=True, crop=crop), embed_view(net, mirrored(image), crop=crop)): assert torch.equal(back, mirror.flip(-1))
    for one, other in zip(embed_view(make(Pointwise), image, flip=True, crop=crop), embed_view(make(Pointwise), image, crop=crop)): close(one, other) # nothing is shifted
    if size[1] > 1: assert not torch.allclose(embed_view(net, image, flip=True)[0], embed_view(net, image)[0]) # the real network does tell them apart


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


def test_a_training_model_is_shown_in_evaluation_mode(net):
    image = picture(32, 40)
    want = embed_view(net.eval(), image)
    found = embed_view(net.train(), image)
    assert all(torch.equal(*pair) for pair in zip(want, found)) and not net.training


# segments and votes

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


# pseudo-labels

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
    with pytest.raises(SpmlError, match="without any known class"): pseudo_label(model, image, mask, np.zeros(3, bool))


@pytest.mark.parametrize("keep_annotated", [True, False])
def test_what_was_annotated_may_be_labelled_anew(keep_annotated):
    labels, scores = np.array([[0, 1, UNLABELLED, VOID]], np.uint8), torch.tensor([0., 0, 1]).view(3, 1, 1).expand(3, 1, 4)
    found = scores_to_labels(scores, Sample(picture(1, 4), labels, np.zeros((1, 4), int), np.ones(3, bool)), (), keep_annotated)
    assert found.tolist() == ([[0, 1, 2, VOID]] if keep_annotated else [[2, 2, 2, VOID]])


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


# second head

def test_only_the_second_head_learns(tmp_path):
    net = SegNet(EmbedNet("test_resnet", 8, pretrained=False, freeze_bn=False), SoftmaxHead(8, 13)) # even where batch norm would learn
    scenes = SceneSet(4, size=64)
    labels = [scenes.mask(i) for i in range(4)]
    dls = weak_dls(WeakSet(scenes, lambda i: labels[i]), SceneSet(1, size=64, start=50), bs=2, crop=64, steps=2, device="cpu")
    recipe = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8, warmup=1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    learn = head_learner(dls, net, recipe, path=tmp_path)
    fresh = {k: v.clone() for k, v in learn.model.head.state_dict().items()}
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda row: None
    learn.fit_poly(2, resume=True)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) # batch norm's statistics included
    assert not any(torch.equal(v, fresh[k]) for k, v in learn.model.head.named_parameters())
    assert learn.recipe.multipliers == (10, 20) # as in the paper
    assert [h["lr"] for h in learn.opt.hypers] == pytest.approx([learn.opt.hypers[0]["lr"]*m for m in (1, 2)])
    assert len(learn.history) == 2 and all(h["loss"] > 0 for h in learn.history)
    again = head_learner(dls, net, recipe, path=tmp_path)
    again.fit_poly(2, resume=True)
    assert all(torch.equal(v, again.model.head.state_dict()[k]) for k, v in learn.model.head.state_dict().items())
    assert predict_head(learn.model, scenes.image(0)).shape == (64, 64)


def test_frozen_network_moves_as_a_whole():
    frozen = FrozenEmbed(EmbedNet("test_resnet", 8, pretrained=False)).to("meta")
    assert {t.device.type for t in (*frozen.parameters(), *frozen.buffers(), frozen.mean)} == {"meta"}


# scoring

def test_score(net):
    scenes = SceneSet(3, size=64)
    masks = [scenes.mask(i) for i in range(3)]
    assert [c.accuracy for c in score(masks, scenes, progress=False)] == [100]*3
    wrong = [masks[0], (masks[1] + 1) % 13, masks[2]]
    assert [c.accuracy for c in score(iter(wrong), scenes, progress=False)] == [100, 0, 100]
    for n, predictions in ((2, masks[:2]), (4, [*masks, masks[0]])):
        with pytest.raises(SpmlError, match=f"{n} predictions for 3 images"): score(predictions, scenes, progress=False)


def test_index_of_another_network(net):
    index = SegmentIndex(torch.eye(5), torch.arange(5), torch.zeros(5).long())
    with pytest.raises(SpmlError, match="shape"): predict_retrieval(net, picture(32, 32), index, 13)


# batches

def photographs(rng, n):
    "Images of few sizes, so that some share one, and their label maps"
    sizes = [SIZES[i] for i in rng.integers(0, len(SIZES), n)]
    return [rng.integers(0, 256, (*s, 3), np.uint8) for s in sizes], [rng.integers(0, 5, s).astype(np.uint8) for s in sizes]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 9), st.sampled_from([(1.,), (.5, 1.)]), st.booleans(), st.sampled_from([None, 32]), st.booleans())
def test_batches_see_what_one_image_alone_shows(double, seed, n, bs, scales, flip, crop, head):
    rng = np.random.default_rng(seed)
    images, mirror = photographs(rng, n)[0], np.append(rng.permutation(13), 0)
    looks, asked = views(scales, flip), []
    found = list(stream_views(double, (asked.append(i) or i for i in images), looks, crop, mirror, head, bs))
    assert len(found) == len(asked) == n and all(a is b for a, b in zip(asked, images))
    for image, seen in zip(images, found):
        for look, (v, logits) in zip(looks, seen, strict=True):
            want = embed_view(double, image, *look, crop, mirror)
            close(v, want[0], atol=1e-6)
            assert (logits is None) != head
            if head: close(logits, want[1], atol=1e-6)


@pytest.fixture(scope="module")
def double(net):
    "The network in double precision, where an image's neighbours in a batch change no decision"
    whole = copy.deepcopy(net).double()
    whole.embed.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    return whole


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


@pytest.mark.parametrize("start", ["head", "nearest"])
@pytest.mark.parametrize("bs", [3, 8])
def test_batches_label_what_one_image_alone_gets(net, bs, start):
    scenes = SceneSet(5, size=64)
    labels = [sparse(scenes, i) for i in range(5)]
    labels[1][:] = UNLABELLED
    weak = WeakSet(scenes, lambda i: labels[i], regions=12)
    one, other = (pseudo_labels(net, weak, progress=False, start=start, grid=(3, 3), steps=2, scales=(.75, 1.), bs=n) for n in (1, bs))
    assert len(one) == 5 and (one[1] == UNLABELLED).all() and all((a == b).mean() > .99 for a, b in zip(one, other, strict=True))


def test_segments_of_many_are_those_of_each():
    g = torch.Generator().manual_seed(0)
    vs = [unit(torch.randn(5, *size, generator=g, dtype=torch.float64), 0) for size in [(9, 31), (24, 24), (9, 31), (3, 5), (24, 24), (9, 31)]]
    for v, (own, mu) in zip(vs, stream_segments(iter(vs), (4, 4), bs=4), strict=True):
        want = image_segments(v, (4, 4))
        assert own.shape == v.shape[1:] and torch.equal(own.flatten(), want[0])
        torch.testing.assert_close(mu, want[1])


@pytest.mark.parametrize("bs", [1, 2, 5])
def test_no_more_is_held_than_a_batch(net, bs):
    read, done = [], 0
    for _ in stream_views(net, (read.append(i) or picture(32, 40, i) for i in range(11)), bs=bs):
        done += 1
        assert len(read) <= -(-done//bs)*bs
    assert done == len(read) == 11
    with pytest.raises(SpmlError, match="bs=0"): next(stream_views(net, [picture(32, 32)], bs=0))

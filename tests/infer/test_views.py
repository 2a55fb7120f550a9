"""What a network is shown: padding, windows, mirror images, many images at once."""
import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spml_kit.core import SpmlError
from spml_kit.infer.scores import predict_head
from spml_kit.infer.views import embed_view, stream_views, views, window_ends
from spml_kit.method.nets import SegNet, unit

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


def picture(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def mirrored(image):
    return image[:, ::-1].copy()


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


def test_a_training_model_is_shown_in_evaluation_mode(net):
    image = picture(32, 40)
    want = embed_view(net.eval(), image)
    found = embed_view(net.train(), image)
    assert all(torch.equal(*pair) for pair in zip(want, found)) and not net.training


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


@pytest.mark.parametrize("bs", [1, 2, 5])
def test_no_more_is_held_than_a_batch(net, bs):
    read, done = [], 0
    for _ in stream_views(net, (read.append(i) or picture(32, 40, i) for i in range(11)), bs=bs):
        done += 1
        assert len(read) <= -(-done//bs)*bs
    assert done == len(read) == 11
    with pytest.raises(SpmlError, match="bs=0"): next(stream_views(net, [picture(32, 32)], bs=0))

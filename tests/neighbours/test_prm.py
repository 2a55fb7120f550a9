"Peaks against their definition, peak back-propagation against loops and its conservation of mass, retrieval, bad input."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from torch import nn

from spml_kit.cams.classifier import TAG_METHODS, TAG_RECIPE, TagNet, tag_learner
from spml_kit.core import SpmlError, named_object
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.scenes import SCENE_CLASSES, make_scene
from spml_kit.data.weak import WeakSet
from spml_kit.learn.losses import MultiTermLoss
from spml_kit.method.backbones import DepthwiseDilated
from spml_kit.neighbours.prm import (PRM, Instance, PeakBackprop, PrmNet, boundary_contrast, connected_proposals, find_peaks, image_peaks, instance_ids,
                                     instance_labels, mask_iou, peak_mask, peak_recall, peak_scores, proposal_scores, response_class_maps,
                                     response_maps, retrieve_instances, upsampled)
from spml_kit.regions.contours import gradient_contours
from spml_kit.regions.oversegment import hierarchy_of

C = len(SCENE_CLASSES)
BACKBONES = ["tf_efficientnet_lite0", "test_resnet", "resnet18", "tf_efficientnet_b0"] # ReLU6 and depthwise; ReLU; max-pool; SiLU and squeeze-and-excite
each_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def network(backbone="test_resnet", seed=0, **kwargs):
    torch.manual_seed(seed)
    return PrmNet(C, backbone=backbone, pretrained=False, **kwargs).eval()


def traced(module, x, p, shift=False):
    "What comes back to the input of a module from `p` at its output"
    x = x.clone().requires_grad_()
    with PeakBackprop(module, shift): y = module(x)
    return torch.autograd.grad(y, x, p)[0]


# ---- peaks

def plain_peaks(m, window=3):
    r, median = window//2, np.sort(m.ravel())[(m.size - 1)//2]
    out = np.zeros(m.shape, bool)
    for i, j in np.ndindex(m.shape):
        places = [(a, b) for a in range(max(0, i - r), min(len(m), i + r + 1)) for b in range(max(0, j - r), min(m.shape[1], j + r + 1))]
        out[i, j] = max(places, key=lambda o: m[o]) == (i, j) and m[i, j] >= median # max gives the first of equal ones
    return out


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (6, 7), elements=st.integers(-3, 3).map(float)), st.sampled_from([3, 5]))
def test_peaks_against_their_definition(m, window):
    assert np.array_equal(peak_mask(torch.from_numpy(m)[None, None], window)[0, 0].numpy(), plain_peaks(m, window))


def bumps(*places):
    y, x = torch.meshgrid(torch.arange(32.), torch.arange(32.), indexing="ij")
    return sum(h*torch.exp(-((y - a)**2 + (x - b)**2)/8) for h, a, b in places)[None, None]


def test_planted_peaks():
    m = bumps((1, 7, 6), (.7, 9, 22), (.8, 25, 15))
    assert peak_mask(m).nonzero()[:, 2:].tolist() == [[7, 6], [9, 22], [25, 15]]
    for shift in (-3, 5): assert torch.equal(peak_mask(m + shift), peak_mask(m))
    assert peak_mask(torch.full((1, 1, 9, 9), 2.)).sum() == 1 # a constant map


@pytest.mark.parametrize("legacy", [False, True])
def test_gradient_goes_to_the_peaks(legacy):
    torch.manual_seed(0)
    m = torch.randn(2, 3, 8, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, dtype=torch.float64)
    s = peak_scores(m, legacy_grad=legacy)
    g, = torch.autograd.grad((s*weight).sum(), m)
    mask = peak_mask(m).double()
    n = mask.sum((2, 3), keepdim=True)
    torch.testing.assert_close(s, (m*mask).sum((2, 3))/n[..., 0, 0])
    torch.testing.assert_close(g, mask*weight[..., None, None]/(1 if legacy else n))
    if not legacy: assert torch.autograd.gradcheck(peak_scores, m)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_peaks_of_enlarged_maps_lie_on_cells(seed, factor):
    m = torch.randn(1, 2, 5, 6, generator=torch.Generator().manual_seed(seed))
    up = upsampled(m, factor)
    assert torch.allclose(up[..., ::factor, ::factor], m, atol=1e-5)
    assert (peak_mask(up).nonzero()[:, 2:] % factor == 0).all()


def test_which_peaks_are_found():
    m = torch.cat([9 + bumps((1, 16, 16)), bumps((1, 7, 6), (.45, 24, 15)), 3*bumps((1, 9, 22)), -bumps((1, 4, 4))], 1)
    assert find_peaks(m, [[True]*4]).tolist() == [[0, 2, 9, 22]] # background never; class 1 is below half of the largest
    assert find_peaks(m, [[True, True, False, True]]).tolist() == [[0, 1, 7, 6]]
    assert find_peaks(m, [[True, True, False, True]], least=.4).tolist() == [[0, 1, 7, 6], [0, 1, 24, 15]]
    for tags in ([[False]*4], [[True, False, False, False]]): assert find_peaks(m, tags).shape == (0, 4)
    assert find_peaks(torch.zeros(2, 4, 5, 5)).shape == (0, 4)
    for flat in (0, 1, -1): # of a constant map nothing rises
        for tags in (None, [[True]*3]): assert len(find_peaks(torch.full((1, 3, 5, 5), float(flat)), tags)) == 0
    for shift in (-50, 50): assert torch.equal(find_peaks(m + shift, [[True]*4]), find_peaks(m, [[True]*4]))
    assert len(find_peaks(m - 5)) == 0 and len(find_peaks(m)) == 1 # without tags a peak is above 0


def test_peaks_refuse():
    m = bumps((1, 7, 6))
    for window in (0, 1, 4):
        with pytest.raises(SpmlError, match="odd and at least 3"): peak_mask(m, window)
    with pytest.raises(SpmlError, match="one flag per image and class"): find_peaks(m, [[True, True]])
    with pytest.raises(SpmlError, match="diverged"): find_peaks(m*torch.nan)
    with pytest.raises(SpmlError, match="at least 1"): upsampled(m, 0)


# ---- back-propagation

def plain_back(u, weight, p, stride=1, padding=1, dilation=1, groups=1):
    "The rule in words: each output hands what it has to its inputs by what they contributed"
    out, (D, G, k, _) = torch.zeros_like(u), weight.shape
    for d, i, j in p.nonzero().tolist():
        reach = [(d//(D//groups)*G + c, i*stride + a*dilation - padding, j*stride + b*dilation - padding, weight[d, c, a, b].clamp_min(0))
                 for c in range(G) for a in range(k) for b in range(k)]
        reach = [(c, y, x, w) for c, y, x, w in reach if 0 <= y < u.shape[1] and 0 <= x < u.shape[2]]
        z = sum(w*u[c, y, x] for c, y, x, w in reach)
        for c, y, x, w in reach if z >= 1e-10 else (): out[c, y, x] += w*u[c, y, x]*p[d, i, j]/z
    return out


@pytest.mark.parametrize("how", [dict(), dict(stride=2), dict(dilation=2, padding=2), dict(groups=2), dict(groups=4, padding=0)], ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_convolution_against_loops(how, shift):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, **{"padding": 1, **how}).double()
    x = torch.randn(1, 4, 7, 6, dtype=torch.float64)
    p = torch.rand_like(conv(x)).detach()
    u = x - x.min() if shift else x.clamp_min(0)
    torch.testing.assert_close(traced(conv, x, p, shift)[0], plain_back(u[0], conv.weight.detach(), p[0], **{"padding": 1, **how}))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([1, 3]))
def test_a_convolution_conserves_mass(seed, stride, dilation, groups):
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 6, 3, stride, dilation, dilation, groups)
    conv.weight.data[:, :, 1, 1].abs_() # each filter has a positive weight within the image
    x = torch.rand(1, 3, 12, 13) + .01
    p = torch.zeros_like(conv(x))
    i, j = (int(torch.randint(n, ())) for n in p.shape[-2:])
    p[0, 4, i, j] = 1
    back = traced(conv, x, p)
    assert back.min() >= 0 and back.sum().item() == pytest.approx(1, abs=1e-4)
    reach = (torch.ones_like(x).requires_grad_())
    field, = torch.autograd.grad(F.conv2d(reach, torch.ones_like(conv.weight), None, stride, dilation, dilation, groups), reach, p)
    assert (field[back > 0] > 0).all()


def test_where_nothing_speaks_for_a_unit_mass_is_dropped():
    conv = nn.Conv2d(1, 1, 3, padding=1)
    conv.weight.data.fill_(-1)
    assert traced(conv, torch.rand(1, 1, 5, 5), torch.ones(1, 1, 5, 5)).abs().max() == 0


def test_half_precision_is_raised_within_a_convolution():
    torch.manual_seed(0)
    conv, x, p = nn.Conv2d(3, 4, 3, padding=1), torch.rand(1, 3, 6, 6), torch.rand(1, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16): low = traced(conv, x, p.bfloat16())
    torch.testing.assert_close(low, traced(conv, x, p), atol=.02, rtol=.02)


def test_layers_that_pass_everything():
    torch.manual_seed(0)
    x, p = torch.randn(2, 4, 6, 6), torch.rand(2, 4, 6, 6)
    norm = nn.BatchNorm2d(4).eval()
    norm.weight.data.copy_(torch.tensor([-1., 0, 2, 5]))
    for layer in (norm, nn.GroupNorm(2, 4), nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(inplace=True), nn.GELU(), nn.LeakyReLU(), nn.Hardswish()):
        kept = x.clone()
        assert torch.equal(traced(layer, 9*x, p), p), layer
        assert torch.equal(x, kept)


class Two(nn.Module):
    "A residual sum, in one of the ways in which networks write it"
    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.way = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False), way

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        if self.way == "+": return a + b
        if self.way == "torch.add": return torch.add(a, b)
        a += b
        return a


@pytest.mark.parametrize("way", ["+", "+=", "torch.add"])
def test_sums_take_shares(way):
    torch.manual_seed(0)
    net, x, p = Two(way), torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    a, b = (f(x).detach().clamp_min(0) for f in (net.a, net.b))
    share = torch.where(a + b > 0, a/(a + b).clamp_min(1e-10), .5)
    torch.testing.assert_close(traced(net, x, p), traced(net.a, x, p*share) + traced(net.b, x, p*(1 - share)))


def test_gates_get_nothing():
    from timm.layers import SqueezeExcite
    torch.manual_seed(0)
    x, p = torch.rand(2, 16, 5, 5), torch.rand(2, 16, 5, 5)
    assert torch.equal(traced(SqueezeExcite(16), x, p), p)


def test_max_pool_routes_to_the_largest():
    x = torch.arange(16.).view(1, 1, 4, 4)
    assert traced(nn.MaxPool2d(2), x, torch.ones(1, 1, 2, 2)).nonzero()[:, 2:].tolist() == [[1, 1], [1, 3], [3, 1], [3, 3]]


def test_dilated_depthwise_layers_follow_the_rule():
    torch.manual_seed(0)
    own, plain = DepthwiseDilated(4, 4, 3, padding=2, dilation=2, groups=4, bias=False), nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False)
    plain.load_state_dict(own.state_dict())
    x, p = torch.rand(1, 4, 8, 8), torch.rand(1, 4, 8, 8)
    assert torch.equal(traced(own, x, p), traced(plain, x, p)) and "forward" not in vars(own)


@each_backbone
@pytest.mark.parametrize("shift", [False, True])
def test_whole_networks(backbone, shift):
    "The network computes the same, ordinary gradients come back afterwards, mass is never negative and never grows"
    net, x = network(backbone), torch.rand(2, 3, 64, 64)
    plain, traces = x.clone().requires_grad_(), x.clone().requires_grad_()
    before, = torch.autograd.grad(net.maps(plain).sum(), plain)
    with PeakBackprop(net, shift): maps = net.maps(traces)
    torch.testing.assert_close(maps, net.maps(plain), atol=1e-5, rtol=1e-5)
    after, = torch.autograd.grad(net.maps(plain).sum(), plain)
    assert torch.equal(before, after)
    start = torch.zeros_like(maps)
    start[0, 3, 1, 1] = start[1, 5, 1, 1] = 1
    mass = torch.autograd.grad(maps, traces, start)[0]*net.std
    assert mass.isfinite().all() and mass.min() >= 0
    total = mass.sum((1, 2, 3))
    assert (total <= 1 + 1e-4).all() and (total > 0).all()
    if backbone == "test_resnet" and not shift: assert total.tolist() == pytest.approx([1, 1], abs=.02)


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "test_resnet"])
def test_gradients_may_be_taken_within_the_context(backbone):
    net, x = network(backbone), torch.rand(1, 3, 64, 64)
    p = torch.rand_like(net.maps(x)).detach()
    inner = x.clone().requires_grad_()
    with PeakBackprop(net): within, = torch.autograd.grad(net.maps(inner), inner, p)
    outer = x.clone().requires_grad_()
    with PeakBackprop(net): maps = net.maps(outer)
    assert torch.equal(within, torch.autograd.grad(maps, outer, p)[0])


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "test_resnet"])
@pytest.mark.parametrize("scale", [1, 1.5])
def test_peaks_of_an_image_in_one_batch(backbone, scale):
    net, image = network(backbone), make_scene(3, size=64).image
    peaks, places = image_peaks(net, image, scale=scale, least=0)
    peaks, places = peaks[:7], places[:7]
    assert len(peaks) == 7 and places.min() >= 0 and places.max() < 64
    together = response_maps(net, image, peaks, scale)
    assert together.shape == (7, 64, 64) and together.dtype == np.float32 and together.min() >= 0
    np.testing.assert_allclose(together.sum((1, 2)), 1, atol=1e-4)
    for batch in (1, 3): np.testing.assert_allclose(response_maps(net, image, peaks, scale, batch=batch), together, atol=1e-6)


def test_a_response_stays_near_its_peak():
    "A network of one small receptive field: nothing outside it"
    class Near(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
        def maps(self, x): return self.conv(x)
    torch.manual_seed(0)
    net, image = Near(), np.random.default_rng(0).integers(1, 255, (16, 16, 3), np.uint8)
    response = response_maps(net, image, torch.tensor([[0, 2, 5, 9]]), factor=1)[0]
    assert response.sum() == pytest.approx(1, abs=1e-4) and np.delete(np.delete(response, range(4, 7), 0), range(8, 11), 1).max() == 0


def test_response_maps_of_nothing_and_refusals():
    net, image = network(), make_scene(3, size=64).image
    nobody, places = image_peaks(net, image, np.zeros(C, bool)) # not tagged
    assert nobody.shape == (0, 4) and places.shape == (0, 2) and response_maps(net, image, nobody).shape == (0, 64, 64)
    everybody, _ = image_peaks(net, image, np.ones(C, bool), least=0)
    assert set(everybody[:, 1].tolist()) <= set(range(1, C)) and len(everybody)
    net.classifier.weight.data.fill_(-1.) # nothing speaks for a class
    assert response_maps(net, image, torch.tensor([[0, 1, 8, 8]])).max() == 0
    with pytest.raises(SpmlError, match="batch"): image_peaks(net, image[None])
    with pytest.raises(SpmlError, match="above 0"): image_peaks(net, image, scale=0)


# ---- training

def test_the_method_learns_by_name(tmp_path):
    assert named_object("prm", TAG_METHODS, "method") is PRM and issubclass(PrmNet, TagNet)
    train = WeakSet(SceneSet(8, size=64, masks=False), "tags")
    learn = tag_learner(weak_dls(train, train, bs=4, crop=64, steps=3, scale=TAG_RECIPE.scale, device="cpu"), "prm", TAG_RECIPE.but(warmup=2),
                        dict(backbone="test_resnet", pretrained=False), path=tmp_path)
    assert learn.settings["net"] == dict(backbone="test_resnet", pretrained=False) and isinstance(learn.loss_func, MultiTermLoss)
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(1)
    assert np.isfinite(learn.history[-1]["loss"])


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "test_resnet"])
def test_bfloat16_stays_finite(backbone):
    net = network(backbone).train()
    with torch.autocast("cpu", torch.bfloat16): logits = net(torch.rand(2, 3, 64, 64))
    F.binary_cross_entropy_with_logits(logits.float(), torch.ones(2, C - 1)).backward()
    assert logits.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    image = make_scene(3, size=64).image
    with torch.autocast("cpu", torch.bfloat16):
        peaks, _ = image_peaks(net, image, least=0)
        responses = response_maps(net, image, peaks[:3])
    assert np.isfinite(responses).all() and responses.sum((1, 2)) == pytest.approx(np.ones(3), abs=1e-3)


# ---- proposals and retrieval

def test_proposals_are_masks_that_may_be_objects():
    image = make_scene(5, size=64).image
    hierarchy, maps = hierarchy_of(gradient_contours(image)), np.zeros((C, 64, 64), np.float32)
    maps[3, 10:20, 10:20] = maps[3, 40:60, 40:60] = 1
    masks = connected_proposals(hierarchy, maps, most=400)
    assert masks.dtype == bool and masks.shape[1:] == (64, 64)
    assert len({m.tobytes() for m in masks}) == len(masks)
    assert all(20 <= m.sum() <= .85*m.size and ndimage.label(m)[1] == 1 for m in masks)
    has = lambda m: any(np.array_equal(m, o) for o in masks)
    assert has(maps[3].astype(bool) & (np.arange(64) < 30)) and has(maps[3].astype(bool) & (np.arange(64) > 30)) # parts of the class map
    contrast = boundary_contrast(masks, hierarchy)
    assert (np.diff(contrast) <= 1e-9).all()
    few = connected_proposals(hierarchy, maps, most=7)
    assert np.array_equal(few, masks[:7]) # those of strongest boundary
    m, ucm, plain = masks[3], hierarchy.ucm, []
    for i, j in np.ndindex(64, 64):
        if j < 63 and m[i, j] != m[i, j + 1]: plain.append(ucm[2*i, 2*j + 1])
        if i < 63 and m[i, j] != m[i + 1, j]: plain.append(ucm[2*i + 1, 2*j])
    assert contrast[3] == pytest.approx(np.mean(plain), abs=1e-5)
    for nothing in (np.zeros_like(maps), None): assert len(connected_proposals(hierarchy, nothing, cuts=(1,))) == 0 # the whole image alone


def squares(*at, size=24, side=6):
    out = np.zeros((len(at), size, size), bool)
    for m, (y, x) in zip(out, at): m[y:y + side, x:x + side] = True
    return out


def test_scores_against_their_definition():
    rng = np.random.default_rng(0)
    responses, proposals, unlikely = rng.random((3, 12, 13)), rng.random((5, 12, 13)) < .3, rng.random((3, 12, 13)) < .5
    proposals[0] = False
    proposals[0, 3:9, 2:8] = True
    got = proposal_scores(responses, proposals, unlikely, .8, .01*12*13)
    for p, s in np.ndindex(3, 5):
        m = proposals[s]
        grown = ndimage.binary_dilation(m, np.ones((5, 5)))
        kept = ndimage.binary_erosion(m, np.ones((5, 5)), border_value=1)
        assert got[p, s] == pytest.approx(.8*responses[p][m].sum() + responses[p][grown & ~kept].sum() - .01*unlikely[p][m].sum(), abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(arrays(bool, (3, 5, 5)), arrays(bool, (2, 5, 5)))
def test_mask_iou(a, b):
    for i, j in np.ndindex(3, 2): assert mask_iou(a, b)[i, j] == pytest.approx((a[i] & b[j]).sum()/max((a[i] | b[j]).sum(), 1))


def test_two_objects_of_a_class_are_two_instances():
    masks = squares((2, 2), (14, 14), (2, 14))
    near = squares((3, 2))
    proposals = np.concatenate([masks, near, masks[:1] | masks[1:2]])
    responses = np.stack([m/m.sum() for m in (*masks[:2], *near)]).astype(np.float32)
    peaks = torch.tensor([[0, 1, 4, 4], [0, 1, 16, 16], [0, 1, 5, 4]])
    found = retrieve_instances(peaks, responses, proposals)
    assert [o.label for o in found] == [1, 1] and all(o.score > 0 for o in found) # the third peak is of the first object
    assert sorted(o.response.sum() for o in found) == pytest.approx([1, 2])
    assert any(np.array_equal(o.mask, masks[1]) for o in found)
    assert responses.sum((1, 2)) == pytest.approx(np.ones(3)) # the given ones stay
    peaks[2, 1] = 2 # of another class: it stays
    assert sorted(o.label for o in retrieve_instances(peaks, responses, list(proposals))) == [1, 1, 2]
    same = np.stack([responses.mean(0)]*2)
    assert len(retrieve_instances(peaks[:2], same, proposals)) == 1 # one map for both tells nothing apart


def test_the_cost_of_unlikely_pixels():
    masks = squares((2, 2), (14, 14))
    proposals, response = np.concatenate([masks[:1] | masks[1:], masks]), masks[:1]/36
    maps = np.zeros((2, 24, 24), np.float32)
    maps[1] = .1*~masks[1] + .9*masks[0]
    one, = retrieve_instances(torch.tensor([[0, 1, 4, 4]]), response, proposals, maps)
    assert np.array_equal(one.mask, masks[0])


def test_retrieval_of_nothing():
    peaks, responses = torch.tensor([[0, 1, 4, 4]]), np.full((1, 24, 24), 1/576, np.float32)
    assert retrieve_instances(peaks[:0], responses[:0], squares((2, 2))) == []
    for none in (np.zeros((0, 24, 24), bool), []): assert retrieve_instances(peaks, responses, none) == []
    assert retrieve_instances(peaks, 0*responses, squares((2, 2))) == [] # nothing speaks for it
    for level in (0, 1): # maps without or with the same evidence everywhere
        assert len(retrieve_instances(peaks, responses, squares((2, 2)), np.full((2, 24, 24), level, np.float32))) == 1
    with pytest.raises(SpmlError, match="one for each"): retrieve_instances(peaks, responses[:0], squares((2, 2)))
    with pytest.raises(SpmlError, match="size of the image"): retrieve_instances(peaks, responses, squares((2, 2), size=20))


def test_union_of_instances():
    masks = squares((2, 2), (5, 5), (16, 16))
    found = [Instance(1, .9, masks[0], None), Instance(2, .5, masks[1], None), Instance(2, .7, masks[2], None)]
    labels, ids = instance_labels(found, (24, 24)), instance_ids(found, (24, 24))
    for i, j in np.ndindex(24, 24):
        here = [(o.score, o.label, k) for k, o in enumerate(found, 1) if o.mask[i, j]]
        assert (labels[i, j], ids[i, j]) == max(here, default=(0, 0, 0))[1:]
    assert instance_labels([], (4, 5)).tolist() == [[0]*5]*4


def test_response_class_maps():
    rng = np.random.default_rng(0)
    responses, peaks = rng.random((3, 5, 6)).astype(np.float32), torch.tensor([[0, 1, 0, 0], [0, 3, 0, 0], [0, 1, 0, 0]])
    maps = response_class_maps(peaks, responses, 4)
    np.testing.assert_allclose(maps[1], (responses[0] + responses[2])/(responses[0] + responses[2]).max(), rtol=1e-6)
    assert maps[3].max() == 1 and not maps[[0, 2]].any() and maps.dtype == np.float32
    assert not response_class_maps(peaks[:0], responses[:0], 4).any()


def test_peak_recall():
    mask = np.zeros((6, 6), np.uint8)
    mask[:2, :2], mask[4:, 4:], mask[0, 5] = 1, 2, 255
    peaks, places = torch.tensor([[0, 1, 0, 0], [0, 2, 0, 0], [0, 2, 0, 0]]), np.array([[1, 1], [0, 0], [5, 4]])
    truth = [(1, mask == 1), (2, mask == 2), (3, mask == 1)]
    assert peak_recall(peaks, places, truth) == (2, 3) and peak_recall(peaks[:0], places[:0], truth) == (0, 3)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("k, dilation", [(3, 2), (4, 1), (2, 3)])
def test_padding_by_name(padding, k, dilation):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, k, padding=padding, dilation=dilation).double()
    x, reach = torch.rand(1, 2, 9, 8, dtype=torch.float64), dilation*(k - 1) if padding == "same" else 0
    p = torch.rand_like(conv(x)).detach()
    with PeakBackprop(conv): traced_output = conv(x.clone().requires_grad_())
    torch.testing.assert_close(traced_output, conv(x))
    wide = F.pad(x, (reach//2, reach - reach//2, reach//2, reach - reach//2)) # more at the end
    back = plain_back(wide[0], conv.weight.detach(), p[0], padding=0, dilation=dilation)
    torch.testing.assert_close(traced(conv, x, p)[0], back[:, reach//2:reach//2 + 9, reach//2:reach//2 + 8])

"Few shots: InfoNCE against its definition and SPML's loss, episodes, prototypes, crops, segments, starts that carry over, faults."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from spml_kit.core import SpmlError, rng_of
from spml_kit.data.images import SceneSet
from spml_kit.method.contrast import contrast
from spml_kit.method.nets import EmbedNet, unit
from spml_kit.neighbours.few_shots import (STARTS, VIEW_LOSSES, CropNet, EpisodeLoss, EpisodeSampler, FourBlocks, amdim, colour_histograms, colour_map, cosine_scores, crop_vectors, few_shot_accuracy,
                                           fit_classes, fit_episodes, fit_start, fit_views, global_local, images_without, info_nce, object_crops, prototype_logits, save_body, scaled_scores, segment_vectors)


def vectors(*shape, seed=0, **kwargs): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **kwargs)


def plain(logits):
    n, s, _, m = logits.shape
    each = [-(logits[i, a, i, l].exp()/(logits[i, a, i, l].exp() + sum(logits[i, a, j].exp().sum() for j in range(n) if j != i))).log()
            for i in range(n) for a in range(s) for l in range(m)]
    return torch.stack(each).mean()


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_info_nce_is_its_definition_with_gradients(n, s, m, seed):
    u, v = vectors(n, s, 5, seed=seed).requires_grad_(), vectors(n, m, 5, seed=seed + 1)
    for score in (cosine_scores, scaled_scores):
        ours, theirs = info_nce(score(u, v)), plain(score(u, v))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(o, u)[0] for o in (ours, theirs)))


def test_info_nce_is_spml_with_the_own_segment_as_only_positive():
    x, mu, each = unit(vectors(7, 4)), unit(vectors(7, 4, seed=1)), torch.arange(7)
    torch.testing.assert_close(contrast(x, mu, each, each, 5.)[0], info_nce(cosine_scores(x[:, None], mu[:, None], .2)))


def test_info_nce_of_known_cases():
    assert float(info_nce(cosine_scores(*2*[torch.ones(9, 1, 3)]))) == pytest.approx(np.log(9), abs=1e-5)
    assert float(info_nce(cosine_scores(*2*[torch.eye(8)[:, None]], .05))) < 1e-5
    assert info_nce(1e4*torch.randn(6, 1, 6, 4)).isfinite()


@pytest.mark.parametrize('loss', VIEW_LOSSES.values())
def test_view_losses_do_not_care_for_the_order_of_crops(loss):
    views = [[vectors(5, k, 6, seed=10*v + k) for k in (1, 4, 4)] for v in range(2)]
    torch.testing.assert_close(loss(*[[o[[2, 0, 1, 4, 3]] for o in v] for v in views]), loss(*views))


def test_losses_under_a_swap_of_the_views():
    a, b = ([vectors(5, k, 6, seed=10*v + k) for k in (1, 4, 4)] for v in range(2))
    torch.testing.assert_close(amdim(a, b), amdim(b, a))
    whole = lambda a, b: global_local(a, b) - info_nce(cosine_scores(a[0], b[1]))
    torch.testing.assert_close(whole(a, b), whole(b, a))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_episodes_hold_what_they_say(way, shot, query, seed):
    labels = rng_of(seed).permutation(np.repeat(np.arange(6), shot + query + 2))
    sampler = EpisodeSampler(labels, way, shot, query, 3, seed)
    first, second = [*sampler], [*sampler]
    assert len(first) == len(sampler) == 3 and first != second
    assert first == [*EpisodeSampler(labels, way, shot, query, 3, seed)]
    for items in first:
        table = labels[items].reshape(shot + query, way)
        assert (table == table[0]).all() and len({*table[0]}) == way and len({*items}) == len(items)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_support_is_labelled_and_queries_are_not(way, shot, query, seed):
    rng = rng_of(seed)
    labels, labelled = np.repeat(np.arange(4), shot + query + 3), np.tile(np.arange(shot + query + 3) < shot + 1, 4)
    order = rng.permutation(len(labels))
    labels, labelled = labels[order], labelled[order]
    for items in EpisodeSampler(labels, way, shot, query, 3, seed, labelled):
        table = np.array(items).reshape(shot + query, way)
        assert (labels[table] == labels[table[0]]).all() and len({*labels[table[0]]}) == way and len({*items}) == len(items)
        assert labelled[table[:shot]].all() and not labelled[table[shot:]].any()
    x = rng.normal(size=(len(labels), 3)).astype(np.float32)
    x[~labelled] = 1 # queries that say nothing
    assert abs(few_shot_accuracy(torch.from_numpy(x), labels, way, shot, query, 40, labelled=labelled)[0] - 100/way) < 1e-4


def test_logits_of_prototypes():
    x = vectors(3*(2 + 4), 8)
    support, query = unit(x[:6]), unit(x[6:])
    proto = torch.stack([support[j::3].mean(0) for j in range(3)])
    torch.testing.assert_close(prototype_logits(x, 3, 2, .5), -((query[:, None] - proto)**2).sum(2)/.5)
    torch.testing.assert_close(prototype_logits(x, 3, 2, .5).softmax(1), ((2*query @ proto.T - (proto**2).sum(1))/.5).softmax(1))
    torch.testing.assert_close(EpisodeLoss(3, 2)(x, None), F.cross_entropy(prototype_logits(x, 3, 2), torch.arange(12) % 3))


def test_accuracy_of_vectors_that_know_everything_or_nothing():
    labels = torch.arange(200) % 5
    assert few_shot_accuracy(F.one_hot(labels).float(), labels, n=10) == (100., 0.)
    mean, half = few_shot_accuracy(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), labels, n=200)
    assert abs(mean - 20) < 4 and 0 < half < 2


def test_histograms_count_colours():
    crops = torch.randint(0, 256, (3, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    table = colour_histograms(crops, 4)
    expected = np.stack([np.histogramdd(c.flatten(1).T.numpy(), bins=4, range=[(0, 256)]*3)[0].ravel()/36 for c in crops])
    np.testing.assert_allclose(table, expected, atol=1e-6)


def test_crops_hold_their_objects_and_no_novel_class_is_seen():
    scenes, novel = SceneSet(30, seed=3, size=96), [2, 5]
    numbers = images_without(scenes, novel)
    crops, labels = object_crops(scenes, numbers, size=32)
    assert crops.shape == (len(labels), 3, 32, 32) and crops.dtype == torch.uint8 and not {2, 5, 0} & {*labels.tolist()}
    sizes = [(scenes.instances(i) == k).sum() for i in numbers for k in np.unique(scenes.instances(i)) if k]
    assert len(labels) == sum(s >= 64 for s in sizes)
    with pytest.raises(SpmlError, match='no object of 100000 pixels'): object_crops(scenes, least=100000)


@pytest.fixture(scope='module')
def few():
    scenes = SceneSet(60, seed=0, size=96)
    return object_crops(scenes, size=24)


def small(seed=0):
    torch.manual_seed(seed)
    return CropNet(FourBlocks(8), dim=16, places=2, n_classes=13)


@pytest.mark.parametrize('fit', [lambda net, c, l: fit_views(net, c, epochs=2, bs=16, progress=False), lambda net, c, l: fit_views(net, c, 'amdim', epochs=2, bs=16, progress=False),
                                 lambda net, c, l: fit_classes(net, c, l, epochs=2, bs=16, progress=False)])
def test_trainings_repeat_and_change_the_network(fit, few):
    crops, labels = few
    a, b, before = small(), small(), small()
    for net in (a, b): assert fit(net, crops[:48], labels[:48]) is net and not net.training
    assert torch.equal(crop_vectors(a, crops), crop_vectors(b, crops))
    assert not torch.equal(crop_vectors(a, crops), crop_vectors(before, crops))
    assert crop_vectors(a, crops).isfinite().all()


def test_episodes_improve_their_own_loss(few):
    crops, labels = few
    keep = torch.isin(labels, torch.bincount(labels).topk(4).indices)
    crops, labels = crops[keep], labels[keep]
    score = lambda net: few_shot_accuracy(crop_vectors(net, crops), labels, 4, 1, 4, 200)[0]
    before = score(net := small())
    fit_episodes(net, crops, labels, 4, 1, 4, n=40, epochs=1, lr=5e-3, progress=False)
    assert score(net) > before + 3


@pytest.mark.parametrize('backbone', ['spml_kit.neighbours.few_shots:FourBlocks', 'resnet10t'])
def test_weights_go_on_in_other_networks(tmp_path, backbone):
    net = CropNet(backbone)
    save_body(net, tmp_path/'body.safetensors')
    other = EmbedNet(backbone, weights=str(tmp_path/'body.safetensors')).backbone.state_dict()
    assert all(torch.equal(t, other[k]) for k, t in net.body.backbone.state_dict().items())


@pytest.mark.parametrize('labels, kwargs, said', [([0, 0, 1], dict(way=2), r'fewer of class 0 \(2\), 1 \(1\)'), (np.repeat([0, 1], 20), dict(way=3), 'way=3'), (np.repeat([0, 1], 20), dict(way=1), 'way=1'),
                                                  ([0]*30 + [1]*30, dict(way=2, labelled=np.arange(60) < 40), r'needs 1 \+ 15 crops of a class; there are fewer of class 0 \(30 \+ 0\)')])
def test_impossible_episodes_are_refused(labels, kwargs, said):
    with pytest.raises(SpmlError, match=said): EpisodeSampler(np.array(labels), **kwargs)


def test_other_faults(few):
    with pytest.raises(SpmlError, match='two at least'): fit_views(small(), few[0][:1], progress=False)
    with pytest.raises(SpmlError, match="'mine' is not global_local or amdim"): fit_views(small(), few[0], 'mine')
    with pytest.raises(SpmlError, match="start 'mine' is not random, supervised, views"): fit_start('mine', *few)


# starts

def test_starts_begin_alike_and_repeat(few):
    crops, labels = few
    make = lambda start, more=None: fit_start(start, crops[:32], labels[:32], more, steps=2, bs=16, progress=False, dim=16, places=2)
    made = {start: make(start) for start in STARTS}
    for start, net in made.items():
        assert not net.training and all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), make(start).state_dict().values()))
    first = [crop_vectors(net, crops) for net in made.values()]
    assert not any(torch.equal(first[i], first[j]) for i in range(3) for j in range(i))
    wider = make('views', crops[32:])
    assert not torch.equal(crop_vectors(wider, crops), first[2])
    assert torch.equal(crop_vectors(make('supervised', crops[32:]), crops), first[1]) # it has no use for crops without labels


# segments

def squares(image): # eight times eight
    y, x = (k*8//n for k, n in zip(np.indices(image.shape[:2]), image.shape))
    return y*8 + x


@pytest.mark.parametrize('pure', [.5, .9])
def test_segments_are_their_plain_definition(pure):
    scenes = SceneSet(6, seed=1, size=64)
    ramp = lambda image: torch.from_numpy(image).permute(2, 0, 1)[:, ::2, ::2].float()/255 # half as large
    found, labels, where = segment_vectors(scenes, squares, dict(colours=colour_map, ramp=ramp), pure=pure)
    rows = []
    for i in range(6):
        image, mask = scenes.image(i), scenes.mask(i)
        for k in range(64):
            inside = squares(image) == k
            votes = np.bincount(mask[inside], minlength=256)
            if 0 < votes.argmax() < 13 and votes.max()/inside.sum() >= pure:
                rows.append((i, int(votes.argmax()), unit(colour_map(image)[:, torch.from_numpy(inside)].mean(1)[None])[0]))
    assert [(int(w), int(c)) for w, c in zip(where, labels)] == [r[:2] for r in rows]
    torch.testing.assert_close(found['colours'], torch.stack([r[2] for r in rows]))
    assert found['ramp'].shape == (len(rows), 3) and len(rows) > 5


def test_classes_and_images_of_segments_are_chosen():
    scenes = SceneSet(6, seed=1, size=64)
    whole = lambda image: np.indices(image.shape[:2]).sum(0)*0 # one segment: mostly ground
    with pytest.raises(SpmlError, match='no segment has 75 % of its pixels'): segment_vectors(scenes, whole, dict(colours=colour_map), classes=[7])
    _, labels, where = segment_vectors(scenes, whole, dict(colours=colour_map), classes=[0], numbers=[4, 2], pure=0)
    assert labels.tolist() == [0, 0] and where.tolist() == [4, 2]
    v, _, _ = segment_vectors(scenes, squares, dict(colours=colour_map), classes=[0])
    assert torch.allclose(v['colours'].norm(dim=1), torch.ones(len(v['colours'])))


def test_colours_of_pixels_are_those_of_histograms():
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    torch.testing.assert_close(colour_map(image).mean((1, 2)), colour_histograms(torch.from_numpy(image).permute(2, 0, 1)[None])[0])

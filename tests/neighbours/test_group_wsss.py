"Group-WSSS: the graph against a loop over pairs, order, graph dropout, inference with and without partners, accumulation, faults."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from conftest import quiet
from spml_kit.cams.classifier import TAG_METHODS, TAG_RECIPE, TagNet, class_maps, related_images, tag_learner
from spml_kit.cams.seam import scaled_maps
from spml_kit.core import SpmlError, named_object
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.scenes import SCENE_CLASSES
from spml_kit.data.tag_index import TagIndex
from spml_kit.data.weak import WeakSet
from spml_kit.neighbours.group_wsss import GROUP_WSSS, AccumulateMaps, ConvGRU, GraphDropout, GroupGraph, GroupLoss, GroupNet

SIZE, C = 64, len(SCENE_CLASSES)
NET = dict(backbone="test_resnet", pretrained=False)
each_agg = pytest.mark.parametrize("agg", ["mean", "concat"])
each_node = pytest.mark.parametrize("node", ["map", "feat"])


def network(seed=0, **kwargs):
    torch.manual_seed(seed)
    return GroupNet(C, **NET | kwargs).eval()


def tagged(n=12, start=0): return WeakSet(SceneSet(n, size=SIZE, start=start, masks=False), "tags")


def flags(*rows): return torch.tensor([[c in row for c in range(C)] for row in rows])


# the graph

def plain(graph, states):
    "Rounds over a list of (1,D,h,w) states, one pair at a time; in order of the circle"
    G = len(states)
    for _ in range(graph.rounds):
        new = []
        for i, h in enumerate(states):
            news = []
            for k in range(1, G):
                other = states[(i + k) % G]
                a, b = (torch.nn.functional.conv2d(x, layer.weight[..., None], layer.bias).flatten(2) for x, layer in ((h, graph.attention.asks), (other, graph.attention.answers)))
                alpha = (a[0].T @ b[0]*graph.attention.scale).softmax(1)
                m = (other.flatten(2)[0] @ alpha.T).view_as(h)
                news.append(m*(m*graph.gate.weight).sum(1, keepdim=True).sigmoid())
            merged = graph.merge(sum(news)/len(news) if graph.agg == "mean" else torch.cat(news, 1))
            both = torch.cat([merged, h], 1)
            z, r = graph.memory.update(both).sigmoid(), graph.memory.reset(both).sigmoid()
            new.append((1 - z)*h + z*graph.memory.propose(torch.cat([merged, r*h], 1)).tanh())
        states = new
    return states


@each_agg
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_all_pairs_at_once_are_one_after_the_other_with_gradients(agg, rounds):
    torch.manual_seed(0)
    graph = GroupGraph(4, rounds, agg, group=3).double().eval()
    states = torch.randn(2, 3, 4, 3, 5).double().requires_grad_()
    whole, target = graph(states), torch.randn(2, 3, 4, 3, 5).double()
    parts = torch.stack([torch.cat(plain(graph, list(s[:, None]))) for s in states])
    torch.testing.assert_close(whole, parts)
    a, b = (torch.autograd.grad((o*target).sum(), states, retain_graph=True)[0] for o in (whole, parts))
    torch.testing.assert_close(a, b)


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(5)), st.integers(2, 5))
def test_the_order_of_the_images_is_nothing_to_the_mean(order, G):
    torch.manual_seed(1)
    graph, states = GroupGraph(4, 2).eval(), torch.randn(1, G, 4, 3, 3)
    order = [k for k in order if k < G]
    with torch.no_grad(): torch.testing.assert_close(graph(states[:, order]), graph(states)[:, order], rtol=0, atol=1e-5)


def test_concatenation_is_made_for_its_number():
    graph = GroupGraph(4, agg="concat", group=3)
    with pytest.raises(SpmlError, match="made for 3"): graph(torch.randn(1, 4, 4, 3, 3))


def test_evaluation_repeats_bit_by_bit():
    graph, states = GroupGraph(4).eval(), torch.randn(1, 3, 4, 3, 3)
    assert torch.equal(graph(states), graph(states))


def test_a_state_lies_between_itself_and_one():
    memory, state = ConvGRU(4), 3*torch.randn(1, 4, 5, 5)
    new = memory(torch.randn(1, 4, 5, 5), state)
    assert new.abs().max() <= max(1, state.abs().max())


# graph dropout

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.floats(.05, .95))
def test_the_strongest_places_are_exactly_halved(seed, level):
    state = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out, strength = GraphDropout(1., level)(state), state.mean(1)
    strong = (strength >= level*strength.amax((1, 2), keepdim=True))[:, None].expand_as(state)
    assert strong.any()
    assert torch.equal(out[strong], state[strong]/2) and torch.equal(out[~strong], state[~strong])


def test_importance_keeps_a_half_to_all():
    state = torch.randn(2, 3, 4, 5).abs() + .01
    share = GraphDropout(0.)(state)/state
    assert .5 <= share.min() and share.max() <= 1
    torch.testing.assert_close(share, ((state.mean(1, keepdim=True).sigmoid() + 1)/2).expand_as(state))


def test_the_coin_has_its_rate_and_evaluation_tosses_none():
    torch.manual_seed(0)
    drop, state = GraphDropout(.8), torch.rand(1, 1, 1, 2)
    state[...] = torch.tensor([.1, 1.])
    halved = [float(drop(state)[0, 0, 0, 0]) == pytest.approx(.1) for _ in range(400)] # of the weak place: kept, or weighed
    assert abs(np.mean(halved) - .8) < .07
    assert drop.eval()(state) is state


# network and loss

@each_node
@pytest.mark.parametrize("n", [1, 2, 4])
def test_single_images_of_any_number_in_evaluation(node, n):
    net, x = network(node=node), torch.rand(n, 3, 48, 80)
    maps = net.maps(x)
    assert net(x).shape == (n, C - 1) and maps.shape == (n, C, *net.look(x)[0].shape[2:])
    assert not maps[:, 0].any() and 0 <= maps.min() and maps.max() <= 1
    torch.testing.assert_close(net(x), TagNet.forward(net, x))


@each_node
@each_agg
def test_every_part_learns(node, agg):
    net = network(node=node, agg=agg).train()
    pred = net(torch.rand(6, 3, SIZE, SIZE))
    assert [tuple(o.shape) for o in pred] == [(6, C - 1)]*2
    GroupLoss()(pred, None, None, flags(*[[0, 1]]*3, *[[0, 2, 3]]*3)).backward()
    assert [n for n, p in net.named_parameters() if not n.startswith("backbone") and (p.grad is None or not p.grad.any())] in ([], ["graph.attention.asks.bias"], ["graph.attention.answers.bias"])


def test_groups_do_not_hear_of_each_other():
    net, x = network().train(), torch.rand(6, 3, SIZE, SIZE)
    net.dropout.p, net.graph.dropout.rate = 0., 1.
    both, first = net(x), net(x[:3])
    for a, b in zip(both, first): torch.testing.assert_close(a[:3], b, rtol=1e-4, atol=1e-5)


def test_loss_by_hand():
    g, tags, loss = torch.Generator().manual_seed(0), flags([0, 1], [0, 1], [0, 1]), GroupLoss()
    pred = tuple(torch.randn(3, C - 1, generator=g) for _ in range(2))
    total = loss(pred, None, None, tags)
    single, group = (torch.nn.functional.multilabel_soft_margin_loss(o, tags[:, 1:].float()) for o in pred)
    torch.testing.assert_close(total, group + .4*single)
    assert loss.means() == dict(group=pytest.approx(float(group)), single=pytest.approx(float(single)))
    assert GroupLoss()(pred, None, None, 0*tags) == 0 and GroupLoss()(pred, None, None, flags(*[range(C)]*3)).isfinite()


# maps

def test_maps_with_partners_by_hand():
    net, x, others = network(), torch.rand(1, 3, SIZE, SIZE), torch.rand(4, 3, 48, 80)
    has = np.arange(C) == 3
    with torch.no_grad():
        got = net.maps(x, [(o[None], has) for o in others])
        single, state = net.look(x)
        fit = [torch.nn.functional.interpolate(net.look(o[None])[1], state.shape[2:], mode="bilinear", align_corners=False) for o in others]
        after = sum(net.graph(torch.stack([state, *fit[k:k + 2]], 1))[:, 0] for k in (0, 2))/2
    torch.testing.assert_close(got[:, 1:], (scaled_maps(single) + scaled_maps(after))/2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [2, 3, 5])
def test_alone_an_image_stands_beside_its_own_copies(group):
    net, x = network(group=group), torch.rand(2, 3, SIZE, SIZE)
    untagged = [(torch.rand(1, 3, SIZE, SIZE), np.zeros(C, bool))]
    assert torch.equal(net.maps(x), net.maps(x, untagged))
    assert not torch.equal(net.maps(x), net.maps(x, [(torch.rand(1, 3, SIZE, SIZE), np.ones(C, bool))]))


def test_maps_of_nothing_are_zero():
    net, x = network(), torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad(): net.classifier.weight.zero_()
    maps = net.maps(x)
    assert maps.isfinite().all()
    net.graph.rounds = 0
    assert not net.maps(x).any()


def test_class_maps_take_partners_of_equal_tags():
    weak, net = tagged(40), network()
    index = TagIndex([weak.tags(i) for i in range(40)])
    i = next(i for i in range(40) if len(index.same_tags(i)) > 2 and weak.tags(i)[1:].any())
    related = related_images(weak, i, GROUP_WSSS, index)
    assert related and all(np.array_equal(t, weak.tags(i)) for _, t in related)
    maps = class_maps(net, weak.images.image(i), weak.tags(i), (1.,), related=related)
    assert maps.min() >= 0 and maps.max() <= 1 and not maps[~weak.tags(i)].any()


# training and accumulation

def test_it_trains_and_maps_add_up(tmp_path):
    weak = tagged(6)
    dls = weak_dls(weak, tagged(4, 100), bs=3, crop=SIZE, steps=2, device="cpu", group=3, same_tags=True)
    learn = quiet(tag_learner(dls, GROUP_WSSS, TAG_RECIPE.but(warmup=2), NET, 0, tmp_path))

    class Watched(AccumulateMaps):
        def after_epoch(self):
            super().after_epoch()
            seen.append([self.maps(i) for i in range(6)])
            own.append([class_maps(self.model, weak.images.image(i), weak.tags(i), (1.,)) for i in range(6)])
    seen, own, keep = [], [], Watched(weak, start=1, least=0.)
    learn.fit_poly(3, cbs=keep)
    assert all(np.isfinite(row["loss"]) for row in learn.history) and {"group", "single"} <= learn.history[0].keys()
    assert not any(m.any() for m in seen[0]) # before the first round that counts
    for i in range(6):
        np.testing.assert_allclose(seen[1][i], own[1][i], atol=1e-3)
        np.testing.assert_allclose(seen[2][i], np.maximum(own[1][i], own[2][i]), atol=1e-3)
        assert not keep.maps(i)[~weak.tags(i)].any()


def test_what_was_never_believed_in_keeps_the_last_maps(tmp_path):
    weak = tagged(4)
    dls = weak_dls(weak, weak, bs=3, crop=SIZE, steps=1, device="cpu", group=3, same_tags=True)
    learn, keep = quiet(tag_learner(dls, GROUP_WSSS, TAG_RECIPE.but(warmup=2), NET, 0, tmp_path)), AccumulateMaps(weak, start=0, least=1.)
    learn.fit_poly(2, cbs=keep)
    for i in range(4): np.testing.assert_allclose(keep.maps(i), class_maps(learn.model, weak.images.image(i), weak.tags(i), (1.,)), atol=1e-3)


# faults

def test_faults_are_named():
    with pytest.raises(SpmlError, match="group=3"): network().train()(torch.rand(4, 3, SIZE, SIZE))
    with pytest.raises(SpmlError, match="two at least"): GroupGraph(4)(torch.randn(1, 1, 4, 3, 3))
    with pytest.raises(SpmlError, match="two images at least"): network(group=1)
    with pytest.raises(SpmlError, match="mean or concat"): network(agg="sum")
    with pytest.raises(SpmlError, match="map or feat"): network(node="pixel")
    with pytest.raises(SpmlError, match="0 or more"): network(rounds=-1)
    with pytest.raises(SpmlError, match="0..1"): GraphDropout(2.)


def test_bfloat16_stays_finite():
    net, x = network().train(), torch.rand(3, 3, SIZE, SIZE)
    with torch.autocast("cpu", torch.bfloat16): loss = GroupLoss()(net(x), None, None, flags(*[[0, 1]]*3))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    with torch.autocast("cpu", torch.bfloat16): assert net.eval().maps(x[:1], [(x[1:2], np.ones(C, bool))]).isfinite().all()


def test_the_command_line_knows_it(): assert named_object("group_wsss", TAG_METHODS, "method") is GROUP_WSSS and GROUP_WSSS.same_tags

"MCIS: targets of pairs, branches, self pairs, the loss against its definition, related images at inference, faults."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from conftest import quiet
from spml_kit.cams.classifier import CAM, TAG_METHODS, TAG_RECIPE, TagMethod, TagNet, class_maps, related_images, tag_learner
from spml_kit.cams.seam import scaled_maps
from spml_kit.core import SpmlError, named_object
from spml_kit.data.annotations import Tags
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import SceneSet
from spml_kit.data.scenes import SCENE_CLASSES
from spml_kit.data.tag_index import TagIndex
from spml_kit.data.weak import WeakSet
from spml_kit.neighbours.mcis import MCIS, JoinedSet, McisLoss, McisNet, pair_targets, with_wrong_tags

SIZE, C = 64, len(SCENE_CLASSES)
NET = dict(backbone="test_resnet", pretrained=False, dim=16)


def network(seed=0, **kwargs):
    torch.manual_seed(seed)
    return McisNet(C, **NET | kwargs).eval()


def tagged(n=8, start=0): return WeakSet(SceneSet(n, size=SIZE, start=start, masks=False), "tags")


def flags(*rows): return torch.tensor([[c in row for c in range(C)] for row in rows])


# targets

@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=2, max_size=8).filter(lambda rows: len(rows) % 2 == 0))
def test_shared_and_other_tags_are_the_tags(rows):
    tags = torch.tensor(rows)
    tags[:, 0] = True
    shared, alone = pair_targets(tags)
    partner = tags.view(-1, 2, 5).flip(1).reshape(-1, 5)
    assert torch.equal(shared | alone, tags)
    assert not (shared & alone)[:, 1:].any() and not (alone & partner)[:, 1:].any()
    assert torch.equal(shared[:, 1:], (tags & partner)[:, 1:])


def test_beside_an_untagged_image_nothing_is_known():
    for o in pair_targets(flags([0, 1], [])): assert not o.any()


# network

@pytest.mark.parametrize("size", [(64, 64), (48, 80), (33, 47)])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_single_images_of_any_number_in_evaluation(n, size):
    net, x = network(), torch.rand(n, 3, *size)
    maps = net.maps(x)
    assert net(x).shape == (n, C - 1) and maps.shape[:2] == (n, C) and not maps[:, 0].any()
    torch.testing.assert_close(maps[:, 1:].mean((2, 3)), net(x))


def test_branches_by_hand():
    net, x = network(mirrored=True, sizes=(.75,)), torch.rand(4, 3, SIZE, SIZE)
    torch.manual_seed(1)
    net.dropout.p = 0.
    basic, common, contrast, selves = net.train()(x)
    f = net.features(x)[-1].detach().flatten(2)
    for i in range(4):
        own, other = f[i], f[i ^ 1]
        W = net.attention.weight.detach()
        A = own.T @ (W if i % 2 == 0 else W.T) @ other/16**.5
        heard = other @ A.softmax(1).T
        g = net.pair_classifier.weight.detach().flatten(1)
        torch.testing.assert_close(common[i].detach(), (g @ heard).mean(1), rtol=1e-4, atol=1e-5)
        b = (net.gate.weight.detach().flatten(1) @ heard).sigmoid()
        torch.testing.assert_close(contrast[i].detach(), (g @ (own*(1 - b))).mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own*b + own*(1 - b), own)
    torch.testing.assert_close(basic, net.eval()(x), rtol=1e-4, atol=1e-5)
    assert [[tuple(o.shape) for o in s] for s in selves] == [[(2, C - 1)]*3]*2
    torch.testing.assert_close(selves[0][0], net(x[0::2].flip(-1)), rtol=1e-4, atol=1e-5)


def test_gradients_pass_through_the_gate_into_every_part():
    net = network().train()
    McisLoss()(net(torch.rand(4, 3, SIZE, SIZE)), None, None, flags([0, 1, 2], [0, 1], [0, 3], [0, 3, 4])).backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in silent if not n.startswith("backbone")] == []


def test_the_same_image_twice_leaves_what_the_gate_leaves():
    net, x = network(), torch.rand(1, 3, SIZE, SIZE)
    f = net.features(x)[-1]
    one, two = net.attention(f, f)
    torch.testing.assert_close(one, two) # W is the identity at the start


# loss

def branches(n=4, selves=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randn(k, C - 1, generator=g)
    return draw(n), draw(n), draw(n), [tuple(draw(n//2) for _ in range(3)) for _ in range(selves)]


def soft_margin(logits, tags): return F.multilabel_soft_margin_loss(logits, tags[:, 1:].float())


def test_loss_by_hand():
    tags, pred, loss = flags([0, 1, 2], [0, 1], [0, 3], [0, 3]), branches(selves=2), McisLoss()
    total, parts = loss(pred, None, None, tags), loss.means()
    shared, alone = flags([1], [1], [3], [3]), flags([2])
    assert parts["basic"] == pytest.approx(float(soft_margin(pred[0], tags)))
    assert parts["common"] == pytest.approx(float(soft_margin(pred[1], shared)))
    assert parts["contrast"] == pytest.approx(float(soft_margin(pred[2][:1], alone))) # the only image that has something of its own
    assert parts["self"] == pytest.approx(sum(float(soft_margin(o, tags[0::2])) for s in pred[3] for o in s))
    assert float(total) == pytest.approx(sum(parts.values())) and list(parts) == list(McisLoss.names)


def test_equal_tags_have_no_contrast_unless_it_is_told_that_nothing_is_left():
    same, pred = flags([0, 1], [0, 1], [0, 2, 3], [0, 2, 3]), branches()
    parts = {}
    for empty in ("skip", "zero"):
        loss = McisLoss(empty)
        loss(pred, None, None, same)
        parts[empty] = loss.means()["contrast"]
    assert parts["skip"] == 0
    assert parts["zero"] == pytest.approx(float(soft_margin(pred[2], torch.zeros(4, C))))


def test_contrast_begins_when_told_and_parts_can_be_left_out():
    tags, pred = flags([0, 1], [0, 1, 2]), branches(2)
    for done, there in ((0., False), (.49, False), (.5, True), (1., True)):
        loss = McisLoss(contrast_from=.5)
        loss.done = done
        loss(pred, None, None, tags)
        assert ("contrast" in loss.means()) is there
    loss = McisLoss(contrast=False, selves=False)
    loss(pred, None, None, tags)
    assert list(loss.means()) == ["basic", "common"]


def test_untagged_images_say_nothing_and_an_image_of_every_class_is_no_fault():
    pred = branches(2)
    assert McisLoss()(pred, None, None, flags([], [])) == 0
    assert McisLoss()(pred, None, None, flags(range(C), range(C))).isfinite()


def test_the_contrast_starts_within_training(tmp_path):
    "The share of the training that is done reaches the loss"
    method = TagMethod("late", McisNet, lambda: McisLoss(contrast_from=.5), group=2)
    dls = weak_dls(tagged(), tagged(4, 100), bs=2, crop=SIZE, steps=2, device="cpu", group=2)
    learn = quiet(tag_learner(dls, method, TAG_RECIPE.but(warmup=2), NET | dict(sizes=()), 0, tmp_path))
    learn.fit_poly(2)
    assert [row["contrast"] is None for row in learn.history] == [True, False]
    assert all(np.isfinite(row["loss"]) for row in learn.history)


# related images

def test_maps_with_partners_by_hand():
    net, x, others = network(sizes=(.75,)), torch.rand(2, 3, SIZE, SIZE), torch.rand(3, 3, 48, 80)
    tags = flags([0, 1, 2], [0, 1], [0, 5]).numpy()
    with torch.no_grad():
        got, alone = net.maps(x, [(o[None], t) for o, t in zip(others, tags)], least=0.), net.maps(x)
        for v in range(2):
            own = net.features(x[v:v + 1])[-1]
            against = lambda image: net.judge(net.attention.receive(own, net.features(image)[-1]))
            selves = [against(x[v:v + 1].flip(-1)), against(F.interpolate(x[v:v + 1], scale_factor=.75, mode="bilinear", align_corners=False))]
            for c in range(1, C):
                mine = [against(o[None]) for o, t in zip(others, tags) if t[c]]
                expected = sum(scaled_maps(m) for m in [sum(mine)/len(mine), *selves])[0, c - 1]/3 if mine else alone[v, c]
                torch.testing.assert_close(got[v, c], expected, rtol=1e-4, atol=1e-5)


def test_without_partners_the_basic_branch_speaks():
    net, x = network(), torch.rand(1, 3, SIZE, SIZE)
    nobody = [(torch.rand(1, 3, SIZE, SIZE), np.zeros(C, bool)), (torch.rand(1, 3, SIZE, SIZE), np.arange(C) == 0)]
    for related in ((), nobody): torch.testing.assert_close(net.maps(x, related), TagNet.maps(net, x))


def test_unlikely_maps_are_left_out():
    net, x, has = network(), torch.rand(1, 3, SIZE, SIZE), np.ones(C, bool)
    assert not net.maps(x, [(x, has)], least=1.).any() # nothing is kept: all maps are zero, none is not a number


def test_class_maps_take_partners_and_repeat():
    net, weak = network(), tagged(12)
    index = TagIndex([weak.tags(i) for i in range(12)])
    i = next(i for i in range(12) if related_images(weak, i, MCIS, index))
    related, image, tags = related_images(weak, i, MCIS, index), weak.images.image(i), weak.tags(i)
    maps = class_maps(net, image, tags, (.5, 1.), related=related)
    assert maps.min() >= 0 and maps.max() <= 1 and not maps[~tags].any()
    np.testing.assert_array_equal(maps, class_maps(net, image, tags, (.5, 1.), related=related_images(weak, i, MCIS, index)))
    assert not np.array_equal(maps, class_maps(net, image, tags, (.5, 1.)))


def test_partners_show_each_tag_and_are_never_the_image():
    weak = tagged(30)
    index = TagIndex([weak.tags(i) for i in range(30)])
    for i in range(30):
        drawn = related_images(weak, i, MCIS, index, seed=1)
        assert all(not np.array_equal(o, weak.images.image(i)) and (t & weak.tags(i))[1:].any() for o, t in drawn)
        for c in np.flatnonzero(weak.tags(i)[1:]) + 1:
            assert sum(t[c] for _, t in drawn) >= min(MCIS.related, len(index.with_tag(c)) - 1)
        assert related_images(weak, i, CAM, index) == []


# settings

def test_further_images_stand_beside_the_training_set():
    weak, extra = tagged(6), tagged(3, start=50)
    both = JoinedSet(weak, extra)
    assert len(both) == 9 and len({*both.names}) == 9
    for i, (part, k) in ((5, (weak, 5)), (6, (extra, 0))):
        np.testing.assert_array_equal(both.sample(i).image, part.sample(k).image)
        np.testing.assert_array_equal(both.tags(i), part.tags(k))
    b = next(iter(weak_dls(both, weak, bs=4, crop=SIZE, steps=1, device="cpu", group=2).train))
    assert len(b[0]) == 4 and pair_targets(b[3])[0][:, 1:].any(1).all()


@pytest.mark.parametrize("rate", [0., .3, 1.])
def test_tags_are_wrong_at_the_rate_asked_for(rate):
    weak = tagged(60)
    wrong = with_wrong_tags(weak, rate)
    kept = np.mean([wrong.tags(i)[c] for i in range(60) for c in np.flatnonzero(weak.tags(i)[1:]) + 1])
    assert kept == 1 if rate == 0 else abs(1 - kept - rate) < .2 # an error may name the right class again
    for i in range(60): np.testing.assert_array_equal(wrong.sample(i).tags, wrong.tags(i))


# faults

def test_faults_are_named():
    with pytest.raises(SpmlError, match="group=2"): network().train()(torch.rand(3, 3, SIZE, SIZE))
    with pytest.raises(SpmlError, match="skip or zero"): McisLoss("drop")
    with pytest.raises(SpmlError, match="above 0"): network(sizes=(0.,))
    with pytest.raises(SpmlError, match="must lie in 0..1"): with_wrong_tags(tagged(2), 2.)
    unlike = WeakSet(SceneSet(2, size=SIZE, masks=False), lambda i: Tags(np.array([1 + i])))
    with pytest.raises(SpmlError, match="share a tag"): weak_dls(unlike, unlike, bs=2, crop=SIZE, steps=1, device="cpu", group=2)


def test_bfloat16_stays_finite():
    net, x = network().train(), torch.rand(4, 3, SIZE, SIZE)
    with torch.autocast("cpu", torch.bfloat16): loss = McisLoss()(net(x), None, None, flags([0, 1, 2], [0, 1], [0, 3], [0, 3]))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    with torch.autocast("cpu", torch.bfloat16): assert net.eval().maps(x[:1], [(x[1:2], np.ones(C, bool))]).isfinite().all()


def test_the_command_line_knows_it(): assert named_object("mcis", TAG_METHODS, "method") is MCIS and MCIS.group == 2

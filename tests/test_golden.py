"""Golden vectors: numbers that the released code gives, computed once in float64 and rounded to ten decimals."""
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spml_kit.method.contrast import contrast, contrast_plain, relation_loss
from spml_kit.method.nets import SegNet, SoftmaxHead, location_colours, locations, paper_pspnet, unit
from spml_kit.learn.callbacks import lr_poly
from spml_kit.learn.learner import spml_splitter
from spml_kit.learn.optimisers import paper_sgd
from spml_kit.method.memory import MemoryBank
from spml_kit.infer.scores import majority_labels
from spml_kit.infer.views import window_ends
from spml_kit.method.recipes import RECIPES
from spml_kit.method.relations import image_similarity, near_label, nearest_labels, semantic_annotation, semantic_cooccurrence
from spml_kit.infer.retrieval import legacy_topk
from spml_kit.method.segments import Prototypes, cluster_means, cut_segments, grid_labels, make_segments, resize_labels, spherical_kmeans

close = partial(np.testing.assert_allclose, rtol=0, atol=1e-9)


def rows(shape, a, b, c, **_):
    "The vectors' formula: x[i][j] = sin(a i + b j + c), rows normalised"
    i, j = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    return unit(torch.sin(a*i + b*j + c))


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def v07_batch(vectors):
    "Raw embedding (2,3,6,6), labels and regions (2,6,6), tags (2,4) of the batch that V07 and V14-V16 share"
    v = vectors["V07"]["inputs"]
    b, c, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (2, 3, 6, 6)), indexing="ij")
    labels = torch.tensor(v["semantic"])
    tags = torch.stack([(labels == k).flatten(1).any(1) for k in range(4)], 1)
    return torch.sin(1.7*c + .9*y + .5*x + .3*b), labels, torch.tensor(v["low_level"]), tags


def v14_relations():
    return dict(sem_ann=semantic_annotation(6, 1.), sem_occ=semantic_cooccurrence(12, .5), img_sim=image_similarity(16, .1))


def test_v01_unit(vectors):
    x = f64(vectors["V01"]["inputs"]["x"])
    assert x[2].tolist() == [0, 0] # 1e-14 before the file rounded it: see the note
    x[2, 0] = 1e-14
    close(unit(x), vectors["V01"]["expected"]["y"])


def test_v02_grid(vectors):
    e = vectors["V02"]["expected"]
    for case, want in e.items():
        grid, image = ([int(n) for n in part.split("x")] for part in case.split("_")[0].split("@"))
        found = grid_labels(*image, grid).view(*image)
        if case.endswith("rows_per_band"): found = (found[:, 0] % grid[0]).bincount()
        if case.endswith("cols_per_band"): found = (found[0] // grid[0]).bincount()
        assert found.tolist() == want, case


def test_v03_locations(vectors):
    h, w = vectors["V03"]["inputs"]["H"], vectors["V03"]["inputs"]["W"]
    close(locations(h, w, dtype=torch.float64).view(h, w, 2), vectors["V03"]["expected"]["loc"])


def test_v04_prototypes(vectors):
    v = vectors["V04"]["inputs"]
    close(cluster_means(rows(**v["x"]), torch.tensor(v["labels"]), 5), vectors["V04"]["expected"]["prototypes"])


def test_v05_nearest_prototype(vectors):
    v = vectors["V05"]["inputs"]
    # An iteration makes its own prototypes: these further pixels make its M step give those of the vector, exactly.
    further, start = f64([[.5, -.5], [2, .2], [0, 1]]), torch.tensor([0, 0, 2, 0, 2, 1])
    x = torch.cat([f64(v["x"]), further])
    assert torch.equal(cluster_means(x, start, 4), f64(v["prototypes"]))
    assert spherical_kmeans(x[None], start, 4, 1)[0, :3].tolist() == vectors["V05"]["expected"]["idx"]


def test_v06_kmeans(vectors):
    x, e = rows(**vectors["V06"]["inputs"]["x"]), vectors["V06"]["expected"]
    for name, want in e.items():
        assert spherical_kmeans(x[None], torch.arange(12) % 3, 3, int(name.split("_")[1]))[0].tolist() == want


def test_v07_segments(vectors):
    v, e = vectors["V07"]["inputs"], vectors["V07"]["expected"]
    seg = make_segments(*v07_batch(vectors), tuple(v["num_clusters"]), v["iterations"])
    assert len(seg.own) == e["n_valid"] and len(seg.protos) == e["n_segments"]
    assert seg.own.tolist() == e["cluster_index"]
    for name, found in dict(batch_index=seg.protos.image, semantic=seg.protos.label, low_level=seg.protos.region).items():
        assert found[seg.own].tolist() == e[name]
    close(seg.v.sum(1), e["emb_row_sums"])
    close(seg.u.sum(1), e["emb_loc_row_sums"])


def test_v08_joint_labels(vectors):
    v, e = ({k: torch.as_tensor(o) for k, o in vectors["V08"][part].items()} for part in ("inputs", "expected"))
    own, label, _, _ = cut_segments(v["instance"], v["semantic"], torch.zeros(6).long(), torch.zeros(6).long())
    assert torch.equal(label, e["prototype_labels"]) and torch.equal(own, e["indices"])


def test_v09_majority(vectors):
    v, e = vectors["V09"]["inputs"], vectors["V09"]["expected"]
    labels, own = torch.tensor(v["semantic"]), torch.tensor(v["cluster"])
    found = majority_labels(labels, own, 4)
    assert found.tolist() == e["majority"]
    assert (found[own] == labels).nonzero()[:, 0].tolist() == e["agreeing_pixels"]


def test_v10_two_replicas(vectors):
    v, e = vectors["V10"]["inputs"], vectors["V10"]["expected"]
    cluster, label, region, image = (torch.tensor(sum(v[k], [])) for k in ("cluster", "semantic", "low_level", "batch"))
    own, label, region, image = cut_segments(cluster, label, region, image)
    close(cluster_means(torch.cat([rows(**o) for o in v["emb"]]), own, len(label)), e["prototypes"])
    assert own.tolist() == e["cluster_0"] + e["cluster_1"]
    assert [label.tolist(), region.tolist(), image.tolist()] == [e["prototype_semantic"], e["prototype_low_level"], e["prototype_batch"]]


def both(x, mu, own, ids, kappa, match=None, own_negative=False):
    "Loss of each pixel by the definition and by the fast form, which have to agree"
    positive = ids[own][:, None] == ids if match is None else match[ids[own]][:, ids]
    plain = contrast_plain(x, mu, own, torch.ones_like(positive), positive, kappa, own_negative)
    mean, fast = contrast(x, mu, own, ids, kappa, match, own_negative=own_negative)
    close(fast, plain)
    close(mean, plain.mean())
    return plain


@pytest.mark.parametrize("kappa", [1, 2])
def test_v11_by_hand(vectors, kappa):
    v = vectors["V11"]["inputs"]
    ids, own = torch.tensor(v["prototype_labels"]), torch.tensor(v["own"])
    assert ids[own].tolist() == v["labels"]
    close(both(f64(v["x"]), f64(v["prototypes"]), own, ids, kappa), vectors["V11"]["expected"][f"kappa{kappa}"])


@pytest.mark.parametrize("kappa", [6, 8, 12, 16])
def test_v12_segsort_plus(vectors, kappa):
    v, e = vectors["V12"]["inputs"], vectors["V12"]["expected"]
    ids, own = torch.tensor(v["prototype_labels"]), torch.tensor(v["own"])
    assert ids[own].tolist() == v["labels"]
    loss = both(rows(**v["x"]), rows(**v["prototypes"]), own, ids, kappa)
    close(loss, e[f"kappa{kappa}"])
    close(loss.mean(), e[f"kappa{kappa}_mean"])


@pytest.mark.parametrize("kappa", [8, 12])
def test_v13_cooccurrence(vectors, kappa):
    v, e = vectors["V13"]["inputs"], vectors["V13"]["expected"]
    tags, own = torch.tensor(v["prototype_tags"]), torch.tensor(v["own"])
    problem = rows(**v["x"]), rows(**v["prototypes"]), own, torch.arange(5), kappa, tags @ tags.T > 0
    loss = both(*problem, own_negative=True)
    close(loss, e[f"kappa{kappa}"])
    close(loss.mean(), e[f"kappa{kappa}_mean"])
    ours = both(*problem) # an untagged image's own segment is no negative
    tagged = tags[own].any(1)
    assert torch.equal(ours[tagged], loss[tagged]) and (~tagged).nonzero()[:, 0].tolist() == [3, 7]
    close(ours[~tagged].exp() + 1, loss[~tagged].exp()) # the reference counts it once more


def test_v14_three_losses(vectors):
    e = vectors["V14"]["expected"]
    seg = make_segments(*v07_batch(vectors), (2, 2), 10)
    loss = {name: r.weight*relation_loss(r, seg)[0] for name, r in v14_relations().items()}
    for name, value in loss.items(): close(value, e[f"weighted_{name}"])
    close(sum(loss.values()), e["total"])
    assert len(seg.protos) == e["n_prototypes"]
    assert seg.protos.label.tolist() == e["prototype_semantic"] and seg.protos.image.tolist() == e["prototype_batch"]
    assert legacy_topk(seg.protos.mu, seg.protos.label) == pytest.approx(e["top5_acc"])


def test_v15_with_memory(vectors):
    v, e = vectors["V15"]["inputs"], vectors["V15"]["expected"]
    bank = MemoryBank(2)
    for mu, label, tags in zip(v["memory_prototypes"], v["memory_semantic"], v["memory_tags_fg"]):
        tags, image = torch.tensor(tags).bool().unique_consecutive(dim=0, return_inverse=True) # an image of its own for every row of tags
        mu, zeros = rows(**mu), torch.zeros(len(label))
        bank.push(Prototypes(mu, zeros.double()[:, None].expand(-1, 5), torch.tensor(label), zeros.long(), image, torch.cat([tags[:, :1]*0 > 0, tags], 1)))
    seg = make_segments(*v07_batch(vectors), (2, 2), 10)
    for name, r in v14_relations().items(): close(r.weight*relation_loss(r, seg, bank.candidates(seg.protos))[0], e[f"weighted_{name}"])


def test_v16_gradients(vectors):
    e = vectors["V16"]["expected"]
    emb, labels, regions, tags = v07_batch(vectors)
    for name, r in v14_relations().items():
        emb = emb.detach().requires_grad_()
        (r.weight*relation_loss(r, make_segments(emb, labels, regions, tags, (2, 2), 10))[0]).backward()
        close(emb.grad.norm(), e[f"norm_{name}"])
        close(emb.grad[0, :, 0, 0], e[f"d_{name}_000"])
        assert not emb.grad.movedim(1, -1)[labels == 255].any()


def test_v17_memory(vectors):
    v, e = vectors["V17"]["inputs"], vectors["V17"]["expected"]
    n, bank = v["total_batch"], MemoryBank(v["bank_size"])
    batch = Prototypes(torch.eye(n), torch.eye(n), torch.zeros(n).long(), torch.zeros(n).long(), torch.arange(n), torch.ones(n, 2).bool())
    first, last = v["stored_each_iteration"]
    assert batch.image[[0, -1]].tolist() == [first, last]
    for want in e["bank_after"]:
        bank.push(batch)
        now, *stored = bank.candidates(batch).image.split(n)
        assert [[o.min(), o.max()] for o in stored] == want and now.tolist() == [*range(n)]


@pytest.mark.parametrize("threshold", ["0.95", "0.8", "-1"])
def test_v20_nearest_label(vectors, threshold):
    v, e = vectors["V20"]["inputs"], vectors["V20"]["expected"]
    mu, label, image, C = rows(**v["prototypes"]), torch.tensor(v["semantic"]), torch.tensor(v["image"]), v["num_classes"]
    close(mu @ mu.T, e["cosine"])
    found = nearest_labels(mu, label, image, float(threshold))[0]
    assert (found[:, None] == torch.arange(C)).int().tolist() == e[f"tags_thr{threshold}"]
    if threshold == "0.95": # a row without a label matches everything
        ids, match = near_label(Prototypes(mu, mu, label, label, image, torch.zeros(3, C).bool()), .95)
        filled = torch.tensor(e["tags_thr0.95_filled"])
        assert torch.equal(match[ids][:, ids], filled @ filled.T > 0)


def test_v29_colours(vectors):
    e = vectors["V29"]["expected"]
    c, y, x = torch.meshgrid(torch.arange(3.), torch.arange(9.), torch.arange(9.), indexing="ij")
    found = location_colours(torch.sin(1.3*c + .7*y + .4*x)[None], *vectors["V29"]["inputs"]["size"])
    torch.testing.assert_close(found.view(1, 3, 3, 5), torch.tensor(e["features"]), rtol=0, atol=1e-5)
    kernel = location_colours(F.pad(torch.ones(1, 3, 1, 1), (6, 6, 6, 6)), 9, 9)[0, :, 2].view(9, 9)[2:7, 2:7] # an impulse shows the kernel, less the mean
    want = torch.tensor(e["kernel5"])
    torch.testing.assert_close((kernel - kernel[2, 2])/(kernel - kernel[2, 2]).sum(), want, rtol=0, atol=1e-5)


def test_v23_learning_rate(vectors):
    v, e = vectors["V23"]["inputs"], vectors["V23"]["expected"]
    close([1e3*lr_poly(t, 3e-3, 30_000) for t in v["iters"]], e["poly"])
    close([1e3*lr_poly(t, 3e-3, 4_000) for t in (0, 50, 99, 100, 2000, 3999)], e["poly_4000"])


def test_v26_windows(vectors):
    v = vectors["V26"]
    assert [window_ends(*case) for case in v["inputs"]["cases"]] == v["expected"]["ends"]


def test_v27_sgd(vectors):
    v = vectors["V27"]["inputs"]
    p = nn.Parameter(f64(v["p0"]))
    opt = paper_sgd([[p]], lr=0., mom=v["momentum"], wd=v["weight_decay"])
    for lr, grad, want in zip(v["lrs"], v["grads"], vectors["V27"]["expected"]["trajectory"]):
        opt.set_hypers(lr=v["multiplier"]*lr)
        p.grad = f64(grad)
        opt.step()
        close(p.detach(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_v28_cancellation(vectors, dtype):
    angles = torch.deg2rad(f64([0, 178, 90])) # own, the other positive, the negative
    mu = torch.stack([angles.cos(), angles.sin()], 1).to(dtype)
    x, own, ids = mu[:1], torch.tensor([0]), torch.tensor([0, 0, 1])
    want = vectors["V28"]["expected"]["exact_logsumexp"]
    candidate, positive = torch.ones(1, 3).bool(), (ids == 0)[None]
    tolerance = dict(atol=1e-9) if dtype == torch.float64 else dict(atol=1e-5)
    close(contrast(x, mu, own, ids, vectors["V28"]["inputs"]["kappa"])[0], want, **tolerance)
    close(contrast_plain(x, mu, own, candidate, positive, vectors["V28"]["inputs"]["kappa"])[0], want, **tolerance)


def test_v30_mean_and_resize(vectors):
    v, e = vectors["V30"]["inputs"], vectors["V30"]["expected"]
    close(cluster_means(f64(v["x"]), torch.tensor(v["index"]), 3), unit(f64(e["segment_mean"]))) # ours has unit length
    assert resize_labels(torch.arange(64).view(1, 8, 8), v["size"]).tolist() == e["resized"]


def count(*modules):
    return sum(p.numel() for m in modules for p in m.parameters())


def test_v34_parameters(vectors, deeplab):
    e, body = vectors["V34"]["expected"], deeplab.backbone
    stages = dict(res2=body.layer1, res3=body.layer2, res4=body.layer3, res5=body.layer4)
    assert {k: count(m) for k, m in stages.items()} == {k: e[k] for k in stages}
    assert [count(body.conv1, body.bn1), count(body), count(deeplab.head), count(deeplab)] == [e["stem"], e["backbone"], e["aspp"], e["total"]]
    assert [count(SoftmaxHead(64, 21)), count(SoftmaxHead(32, 15))] == [e["classifier_dim64_21"], e["classifier_dim32_15"]]


def test_v34_pspnet(vectors):
    net, e = paper_pspnet(), vectors["V34"]["expected"]
    colour_kernel = 3*5*5 # the reference counts its constant smoothing kernel of the colours
    assert [count(net), count(net.head)] == [e["pspnet_total_dim32"] - colour_kernel, e["pspp"]]


def test_v34_lr_groups(vectors, deeplab):
    groups, recipe = spml_splitter(SegNet(deeplab, nn.Identity())), RECIPES["paper_voc"]
    decays = "global", 0, "global", 0 # what `spml_learner` gives its four groups: see test_learner
    assert recipe.wd == 5e-4
    assert [[m, wd, sum(p.numel() for p in g)] for m, wd, g in zip(recipe.multipliers, decays, groups)] == vectors["V34"]["expected"]["lr_groups"]


def test_v34_strides_and_dilations(vectors, deeplab):
    e, body = vectors["V34"]["expected"], deeplab.backbone
    dilations = lambda layer: [block.conv2.dilation[0] for block in layer]
    assert dilations(body.layer3)[:4] == e["dilations_res4"] and set(dilations(body.layer3)[4:]) == {2} and dilations(body.layer4) == e["dilations_res5"]
    deeplab.eval() # leaves the running statistics alone
    for n, *sizes in e["input_res2_res3_res4_res5_emb"]:
        with torch.no_grad(): maps, emb = body(torch.zeros(1, 3, n, n)), deeplab(torch.zeros(1, 3, n, n))
        assert [m.shape[-1] for m in maps] + [emb.shape[-1]] == sizes
    deeplab.train()

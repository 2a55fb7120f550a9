"""The straightforward forms that the kit is measured against: what the paper's formulas say, in dense torch, one step after the other. The library uses none of this."""
import numpy as np
import torch
import torch.nn.functional as F

from spml_kit.core import VOID
from spml_kit.data.batches import MEAN_COLOUR
from spml_kit.data.weak import Sample


def dense_loss(x, mu, own, positive, candidate, kappa):
    "Mean loss of pixels (N,D) against segments (M,D): similarity, exponent and masks all N x M"
    e = torch.exp(kappa*x @ mu.T)
    mine = F.one_hot(own, len(mu)).to(e.dtype)
    pos, neg = positive.to(e.dtype), (candidate & ~positive).to(e.dtype)
    others = pos*(1 - mine) # taking the own segment's share off the sum instead would lose small positives in float32
    numerator = torch.where(others.sum(1) > 0, (e*others).sum(1), (e*mine).sum(1))
    return -torch.log(numerator/(numerator + (e*neg).sum(1))).mean()


def three_relations(v, u, own, label, region, image, tags, mu, mu_loc, memory, C=21, kappas=(6., 12., 16.), weights=(1., .5, .1)):
    "Semantic annotation, co-occurrence and image similarity of a batch; `memory` is (mu, label, image, tags) of earlier batches"
    all_mu, all_label = torch.cat([mu, memory[0]]), torch.cat([label, memory[1]])
    all_image, all_tags = torch.cat([image, memory[2]]), torch.cat([tags, memory[3]])
    y = label[own]
    anchor, known = y < C, all_label < C
    keep = known.nonzero()[:, 0]
    place = known.cumsum(0) - 1
    same = y[anchor][:, None] == all_label[keep]
    annotation = dense_loss(v[anchor], all_mu[keep], place[own[anchor]], same, torch.ones_like(same), kappas[0])
    said = all_tags[all_image][:, 1:].float()
    shared = (said[own] @ said.T) > 0
    cooccurrence = dense_loss(v, all_mu, own, shared, torch.ones_like(shared), kappas[1])
    similarity = []
    for b in range(len(tags)):
        pixels, segments = (image[own] == b).nonzero()[:, 0], (image == b).nonzero()[:, 0]
        r, mine = region[own[pixels]], own[pixels] - segments[0]
        same = r[:, None] == region[segments]
        similarity.append(dense_loss(u[pixels], mu_loc[segments], mine, same, torch.ones_like(same), kappas[2]))
    return weights[0]*annotation + weights[1]*cooccurrence + weights[2]*torch.stack(similarity).mean()


def looped_kmeans(u, start, k, iterations):
    "Spherical k-means, image by image: (B,P,D) unit features, (P,) first clusters"
    out = []
    for rows in u:
        labels = start
        for _ in range(iterations):
            chosen = F.one_hot(labels, k).to(rows.dtype)
            means = F.normalize(chosen.T @ rows, dim=1)
            labels = (rows @ means.T).argmax(1)
        out.append(labels)
    return torch.stack(out)


def squared_walk(scores, views, squarings=6, beta=5., power=20):
    "(C,n) scores after 2**squarings steps, the matrix squared so often; (V,n,D) unit embeddings"
    A = torch.stack([torch.exp(beta*(v @ v.T - 1)) for v in views]).mean(0)**power
    T = A/A.sum(0, keepdim=True)
    for _ in range(squarings): T = T @ T
    return scores @ T


def sorted_neighbours(query, prototypes, k, parts=10):
    "Indices (Q,k) of the nearest prototypes, by sorting all similarities"
    return torch.cat([(q @ prototypes.T).argsort(1, descending=True)[:, :k] for q in query.split(max(1, len(query)//parts))])


def blend(a, axis, at):
    "Linear interpolation of an image along one axis, all at once"
    low = np.clip(np.floor(at).astype(int), 0, a.shape[axis] - 1)
    part = np.clip(at - low, 0, 1).astype(np.float32).reshape([-1 if k == axis else 1 for k in range(3)])
    return a.take(low, axis)*(1 - part) + a.take(np.minimum(low + 1, a.shape[axis] - 1), axis)*part


def blended_crop(sample, rng, crop, scale=(.5, 1.5), flip=.5):
    "Flip, scale and cut image and maps: the whole crop as floats, maps by pairs of indices"
    flipped, ratio, *shift = rng.random() < flip, rng.uniform(*scale), rng.random(), rng.random()
    maps = [sample.image, sample.labels, sample.regions]
    if flipped: maps = [m[:, ::-1] for m in maps]
    old = np.array(sample.labels.shape)
    new = np.maximum((ratio*old).astype(int), 1)
    start = [int(u*(max(n, crop) - crop)) for u, n in zip(shift, new)]
    y, x = (np.arange(s, min(s + crop, n)) for s, n in zip(start, new))
    fy, fx = old/new
    image = blend(blend(maps[0], 0, (y + .5)*fy - .5), 1, (x + .5)*fx - .5)
    out = [np.full((crop, crop, 3), MEAN_COLOUR), np.full((crop, crop), VOID, np.uint8), np.zeros((crop, crop), np.int32)]
    out[0][:len(y), :len(x)] = np.rint(image)
    for o, m in zip(out[1:], maps[1:]): o[:len(y), :len(x)] = m[np.ix_((y*fy).astype(int), (x*fx).astype(int))]
    return Sample(*out, sample.tags)

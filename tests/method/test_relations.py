"""Relations between segments against their plain definitions; settings that are refused."""
import pytest
import torch
from hypothesis import given, settings, strategies as st

from spml_kit.core import UNLABELLED
from spml_kit.method.nets import unit
from spml_kit.method.relations import nearest_labels


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("threshold", [-1., .3, .95])
def test_nearest_labels_by_their_definition(across, threshold, seed):
    "segment by segment; in some images nobody has a label, in some everybody"
    g = torch.Generator().manual_seed(seed)
    mu, image = unit(torch.randn(30, 4, generator=g, dtype=torch.float64)), torch.randint(5, (30,), generator=g)
    label = torch.where(torch.rand(30, generator=g) < torch.rand(5, generator=g).round(decimals=1)[image], torch.randint(3, (30,), generator=g), UNLABELLED)
    found, lender, cosine = nearest_labels(mu, label, image, threshold, across)
    for i in range(30):
        lenders = [j for j in range(30) if label[j] < UNLABELLED and (across or image[i] == image[j])]
        if label[i] < UNLABELLED: near, who = 1., i
        else: near, who = max(((float(mu[i] @ mu[j]), j) for j in lenders), default=(-float("inf"), -1))
        assert int(lender[i]) == who and float(cosine[i]) == pytest.approx(near)
        assert int(found[i]) == (int(label[who]) if near >= threshold else -1)

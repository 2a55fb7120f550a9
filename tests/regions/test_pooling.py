"""Means of regions against the plain loop, with gradients."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spml_kit.core import SpmlError
from spml_kit.regions.pooling import region_mean, region_pool


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_pooling_and_spreading_is_a_projection_that_keeps_the_total(seed):
    regions = np.random.default_rng(seed).integers(0, 7, (9, 11))
    features = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 9, 11))).requires_grad_()
    ids = torch.from_numpy(regions)
    once = region_mean(features, ids)
    torch.testing.assert_close(region_mean(once, ids), once)
    torch.testing.assert_close(once.sum((1, 2)), features.sum((1, 2)))
    plain = torch.stack([features[:, ids == r].mean(1) if (ids == r).any() else features.new_zeros(3) for r in range(int(ids.max()) + 1)])
    torch.testing.assert_close(region_pool(features, ids), plain)
    weight = torch.from_numpy(np.random.default_rng(seed + 1).normal(size=plain.shape))
    torch.testing.assert_close(*(torch.autograd.grad((o*weight).sum(), features, retain_graph=True)[0] for o in (region_pool(features, ids), plain)))


def test_an_id_that_is_nowhere_has_the_mean_zero():
    features, ids = torch.tensor([[[2., 4.], [6., 8.]]]), torch.tensor([[0, 3], [3, 3]], dtype=torch.int32)
    assert region_pool(features, ids).tolist() == [[2.], [0.], [0.], [6.]] and region_mean(features, ids).tolist() == [[[2., 6.], [6., 6.]]]


@pytest.mark.parametrize("size", [(3, 2), (2, 4), (6,)])
def test_regions_of_another_size_are_refused(size):
    for f in (region_pool, region_mean):
        with pytest.raises(SpmlError, match=r"features are \(2, 3\), the regions .*must agree"): f(torch.zeros(1, 2, 3), torch.zeros(size, dtype=torch.long))

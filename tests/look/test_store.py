"""The store of segments beside the index of training, crops and marks at every border."""
import numpy as np
import torch

from test_explore import C
from spml_kit.infer.scores import training_index


def test_store_is_the_training_index(world, retrieval):
    weak, _, learn, _ = world
    ex, masks = retrieval
    want = training_index(learn.model, [weak.images.image(i) for i in range(len(weak))], masks, C, grid=(4, 4))
    assert torch.equal(ex.store.index.label, want.label) and torch.equal(ex.store.index.image, want.image)
    torch.testing.assert_close(ex.store.index.mu, want.mu)
    for i, m in enumerate(ex.store.maps): assert set(ex.store.index.image[np.unique(m[m >= 0])].tolist()) == {i}

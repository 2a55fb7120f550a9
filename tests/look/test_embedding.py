"""The explorer of the embedding over the steps of training."""
import pytest
import torch

from spml_kit.core import SpmlError
from spml_kit.learn.learner import spml_learner
from spml_kit.look.embedding import explore_embedding, snapshots
from spml_kit.look.widgets import GAP
from test_explore import SIZE, said


def test_embedding_over_steps(world):
    weak, _, learn, folder = world
    ex = explore_embedding(learn, weak, folder)
    assert "spml-explore-embedding" in ex._dom_classes and [*ex.step.options] == [0, 2, 4, "now"] and ex.took > 0
    torch.testing.assert_close(ex.seen[4], ex.seen["now"])
    assert not torch.allclose(ex.seen[0], ex.seen["now"])
    ex.pictures[0].hover = [5, 6]
    assert ex.point == (0, 5, 6)
    ex.pictures[0].hover = []
    assert ex.point == (0, 5, 6)
    ex.follow.value = False
    assert not ex.pictures[0].follow
    v = ex.seen["now"]
    cosine = torch.einsum("bdhw,d->bhw", v, v[0, :, 6*16//SIZE, 5*16//SIZE])
    assert f"{float((cosine > .8).float().mean()):.0%} of all pixels" in said(ex)
    h, w = v.shape[-2:]
    ex.pictures[3].point = [w + GAP + 1, 1]
    assert ex.step.value == 2
    ex.pictures[0].point = [SIZE + 1, 1]
    assert "Between" in said(ex)
    ex.point = (9, 0, 0)
    assert "There is no pixel" in said(ex)


def test_embedding_without_labels_and_snapshots(world, tmp_path):
    weak, _, learn, _ = world
    ex = explore_embedding(learn, weak.images, which=(0, 1))
    assert len(ex.view.pictures) == 3 and ex.view.bars is None
    ex = explore_embedding(learn, learn.dls.train.one_batch(), which=(0, 1))
    assert ex.view.bars
    with pytest.raises(SpmlError, match="no snapshots"): snapshots(learn.model, torch.zeros(1, 3, 32, 32), tmp_path)
    other = spml_learner(learn.dls, recipe=learn.recipe.but(dim=4))
    with pytest.raises(SpmlError, match="another network"): snapshots(other.model, torch.zeros(1, 3, 32, 32), world[3])

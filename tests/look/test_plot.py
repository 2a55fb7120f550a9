"""Pictures: what is drawn, with which colours, and that nothing is left open."""
import io, json

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from spml_kit.core import Classes, SpmlError, UNLABELLED, VOID
from spml_kit.metrics import Confusion, per_class_table
from spml_kit.look.plot import confusion_figure, curve, draw_regions, embedding_rgb, overlay, per_class_bars, show_grid, show_predictions

CLASSES = Classes(("background", "cat", "dog"))
IMAGE = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
LABELS = np.zeros((12, 16), np.uint8)
LABELS[3:8, 2:6], LABELS[9:], LABELS[0] = 1, UNLABELLED, VOID


def drawn(fig):
    "The figure as an array, after checking that it is closed"
    assert not plt.get_fignums()
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    return plt.imread(io.BytesIO(buffer.getvalue()))


def texts(fig):
    return [t.get_text() for t in fig.legends[0].get_texts()]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
@pytest.mark.parametrize("alpha", [0, .3, 1])
def test_overlay(dtype, alpha):
    out, before = overlay(IMAGE, LABELS.astype(dtype), CLASSES, alpha), IMAGE.copy()
    assert out.dtype == np.uint8 and np.array_equal(IMAGE, before)
    assert np.array_equal(out[9:], IMAGE[9:]) # unlabelled
    want = (1 - alpha)*IMAGE[:9].astype(float) + alpha*CLASSES.colour(LABELS[:9])
    assert np.abs(out[:9] - want).max() <= .5


def test_draw_regions():
    regions = np.repeat([0, 1], 8)[None].repeat(12, 0).astype(np.int32)
    out = draw_regions(IMAGE, regions, (1, 2, 3))
    changed = (out != IMAGE).any(2)
    assert changed[:, 7].all() and changed.sum() == 12 and (out[:, 7] == (1, 2, 3)).all()
    rows = (np.arange(12) > 4)[:, None].repeat(16, 1)
    assert np.array_equal((draw_regions(IMAGE, rows, (1, 2, 3)) != IMAGE).any(2).nonzero()[0], np.full(16, 4))
    assert np.array_equal(draw_regions(IMAGE, 0*regions), IMAGE)


@pytest.mark.parametrize("f", [lambda a: overlay(IMAGE, a, CLASSES), lambda a: draw_regions(IMAGE, a)])
def test_sizes_must_agree(f):
    with pytest.raises(SpmlError, match="must agree"):
        f(LABELS[:5])


def test_grid_shows_each_array_as_what_it_is():
    regions, scores = np.arange(12*16).reshape(12, 16).astype(np.int32)//20, np.random.default_rng(0).random((12, 16))
    fig = show_grid([[IMAGE, LABELS], [regions, scores], [None, torch.tensor(LABELS)]], ["a", "b"], CLASSES, row_titles=["x", "y", "z"])
    assert drawn(fig).std() > 0
    axs = fig.axes
    assert len(axs) == 6 and [a.get_title() for a in axs[:2]] == ["a", "b"] and axs[2].get_ylabel() == "y"
    pictures = [a.images[0].get_array() if a.images else None for a in axs]
    assert np.array_equal(pictures[0], IMAGE) and np.array_equal(pictures[1], CLASSES.colour(LABELS)) and np.array_equal(pictures[3], scores)
    assert len(np.unique(pictures[2])) == len(np.unique(regions)) and pictures[4] is None
    assert texts(fig) == ["background", "cat", "unlabelled", "void"] # dog is not seen


def test_grid_without_classes_has_no_legend():
    assert not show_grid([[IMAGE]]).legends
    with pytest.raises(SpmlError, match="nothing to show"):
        show_grid([])


def test_predictions():
    fig = show_predictions([IMAGE]*2, {"ours": [0*LABELS]*2, "theirs": torch.ones(2, 12, 16).long()}, [LABELS]*2, CLASSES)
    assert [a.get_title() for a in fig.axes[:4]] == ["image", "ours", "theirs", "truth"] and len(fig.axes) == 8
    assert np.array_equal(fig.axes[2].images[0].get_array(), CLASSES.colour(0*LABELS + 1))
    drawn(fig)
    fig = show_predictions([IMAGE], {"ours": [LABELS]}, classes=CLASSES, alpha=.5)
    assert np.array_equal(fig.axes[1].images[0].get_array(), overlay(IMAGE, LABELS, CLASSES, .5))
    with pytest.raises(SpmlError, match="2 images but 1 map of 'ours'"):
        show_predictions([IMAGE]*2, {"ours": [LABELS]}, classes=CLASSES)


@pytest.mark.parametrize("dim", [1, 2, 3, 16])
@pytest.mark.parametrize("wrap", [lambda a: a, torch.tensor, lambda a: torch.tensor(a, requires_grad=True), lambda a: torch.tensor(a).half()])
def test_embedding_rgb(dim, wrap):
    emb = np.random.default_rng(0).normal(size=(2, dim, 9, 11)) * np.arange(1, dim + 1)[:, None, None]
    out = embedding_rgb(wrap(emb))
    assert out.shape == (2, 9, 11, 3) and out.dtype == np.uint8 and np.array_equal(out, embedding_rgb(wrap(emb)))
    assert embedding_rgb(wrap(emb[0])).shape == (9, 11, 3)
    assert np.ptp(out[..., 0]) == 255


def test_embedding_colours_do_not_depend_on_the_axes():
    emb = np.random.default_rng(0).normal(size=(5, 9, 11)) * np.array([5, 4, 3, .2, .1])[:, None, None]
    turned = np.einsum("ij,jhw->ihw", np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0], emb)
    for a, b in zip(np.moveaxis(embedding_rgb(emb).astype(int), -1, 0), np.moveaxis(embedding_rgb(turned).astype(int), -1, 0)):
        assert min(np.abs(a - b).max(), np.abs(255 - a - b).max()) <= 1 # up to the sign of a component
    assert np.array_equal(embedding_rgb(emb + 7), embedding_rgb(emb))


@pytest.mark.parametrize("seed", range(8))
def test_embedding_colours_rise_with_the_strongest_dimension(seed):
    emb = np.random.default_rng(seed).normal(size=(3, 40, 40)) * np.array([1, 9, 3])[:, None, None]
    rgb = np.moveaxis(embedding_rgb(emb), -1, 0)
    for channel, dim in zip(rgb, (1, 2, 0)):
        assert np.corrcoef(channel.ravel(), emb[dim].ravel())[0, 1] > .9


def test_equal_embeddings_have_equal_colours():
    assert len(np.unique(embedding_rgb(np.ones((4, 5, 6))).reshape(-1, 3), axis=0)) == 1
    two = np.where(LABELS == 1, 1, -1)[None] * np.array([1, 2, 3])[:, None, None]
    assert len(np.unique(embedding_rgb(two).reshape(-1, 3), axis=0)) == 2


def counts():
    rng = np.random.default_rng(0)
    return {n: Confusion(3).add(rng.integers(0, 3, 90), rng.integers(0, 3, 90)) for n in ("ours", "theirs")}


def test_bars():
    table = per_class_table(counts(), CLASSES)
    fig = per_class_bars(table)
    assert type(fig) is go.Figure and len(fig.to_json()) < 20_000
    bars = json.loads(fig.to_json())["data"]
    assert [b["name"] for b in bars] == ["ours", "theirs"] and bars[0]["x"] == [*CLASSES.names, "mean"]
    assert bars[0]["y"] == pytest.approx(table["ours"].tolist(), abs=.006) and bars[0]["marker"]["color"] != bars[1]["marker"]["color"]


def test_curve():
    fig = curve({"a": ([0, 1, 2], [3, 4, 5]), "b": ([0, 2], [1, 1])}, xlabel="epoch", ylabel="F", title="t")
    drawn(fig)
    ax = fig.axes[0]
    assert [line.get_label() for line in ax.lines] == ["a", "b"] and ax.lines[0].get_ydata().tolist() == [3, 4, 5] and ax.get_xlabel() == "epoch" and ax.get_title() == "t"
    assert len({(line.get_color(), line.get_marker()) for line in ax.lines}) == 2


def test_confusion_figure():
    c = counts()["ours"]
    fig = confusion_figure(c, CLASSES)
    drawn(fig)
    np.testing.assert_allclose(fig.axes[0].images[0].get_array().sum(1), 100)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == list(CLASSES.names)
    with pytest.raises(SpmlError, match="3 class names for counts of 2"):
        confusion_figure(Confusion(2), CLASSES)

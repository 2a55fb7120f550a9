"""Mosaics and explorers as widgets: clicks lead back, controls explain themselves, notebooks keep pictures."""
import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spml_kit.data.weak import WeakSet
from spml_kit.look.embedding import explore_embedding
from spml_kit.look.explore import explore_relations
from spml_kit.look.thresholds import explore_background, explore_regions
from spml_kit.look.widgets import mosaic, mosaic_at
from test_thresholds import box_maps


@pytest.mark.parametrize("n,columns,size", [(1, 1, (5, 7)), (4, 2, (8, 6)), (5, 3, (4, 4))])
def test_every_pixel_of_a_mosaic_leads_back(n, columns, size):
    rng = np.random.default_rng(n)
    pictures = rng.integers(0, 255, (n, *size, 3)).astype(np.uint8) # white is the gap alone
    out = mosaic(pictures, columns)
    for y, x in np.ndindex(out.shape[:2]):
        at = mosaic_at(x, y, n, size, columns)
        assert np.array_equal(out[y, x], pictures[at[0], at[2], at[1]]) if at else (out[y, x] == 255).all()


def test_a_broken_widget_would_show(world):
    "An error that is not ours is not hidden"
    ex = explore_regions(world[0].images)
    ex.contours, ex._trees = (lambda image: 1/0), {}
    with pytest.raises(ZeroDivisionError): ex.refresh()


def test_controls_explain_themselves(world, retrieval):
    weak, _, learn, folder = world
    explorers = [explore_relations(learn, weak), explore_background(WeakSet(weak.images, "tags"), box_maps), explore_regions(weak.images, learn), retrieval[0], explore_embedding(learn, weak, folder)]
    for ex in explorers:
        assert all(w.description and w.tooltip for w in ex.controls.values())
        assert all(p.caption and p.help and p.png[:4] == b"\x89PNG" for p in ex.pictures if p.layout.display != "none")
        bundle = ex._repr_mimebundle_()
        assert bundle["text/plain"].startswith(type(ex).__name__) and Image.open(io.BytesIO(base64.b64decode(bundle["image/jpeg"]))).size[0] > 300


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_keep_pictures_not_widgets(path):
    nb = json.loads(path.read_text())
    assert "widgets" not in nb["metadata"], "widget state makes a notebook heavy: execute with --ExecutePreprocessor.store_widget_state=False"
    kinds = {k for c in nb["cells"] for o in c.get("outputs", []) for k in o.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" not in kinds

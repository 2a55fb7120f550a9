"""The explorer of retrieval: its votes are those of the prediction; pictures and map are linked."""
import io

import numpy as np
import pytest
from PIL import Image

from spml_kit.core import SpmlError
from spml_kit.data.images import SceneSet
from spml_kit.data.scenes import SCENE_CLASSES
from spml_kit.infer.scores import predict_retrieval
from spml_kit.look.explain import PUSH, rgb_of
from spml_kit.look.nearness import explore_retrieval
from spml_kit.look.store import CROP, on_map
from spml_kit.look.widgets import GAP
from test_explore import SIZE, C, said


def seen(ex, k): return np.array(Image.open(io.BytesIO(ex.pictures[k].png)))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_are_those_of_the_prediction(world, retrieval, k):
    _, held_out, learn, _ = world
    ex, _ = retrieval
    with ex.hold(): ex.k.value, ex.image.value, ex.only_class.value, ex.only_image.value = k, 1, "all", -1
    want = predict_retrieval(learn.model, held_out.image(1), ex.store.index, C, k=k, grid=(4, 4))
    for x, y in ((0, 0), (20, 40), (63, 63), (40, 10)):
        ex.point = x, y
        assert f"is predicted as '{SCENE_CLASSES.names[want[y, x]]}'" in said(ex).replace("&#x27;", "'")
        assert sum(b[0] for b in ex.view.bars.values()) == k
        agrees = "The mask agrees" in said(ex)
        inside = held_out.mask(1)[ex._query()[0] == ex._query()[0][y, x]]
        assert agrees == (np.bincount(inside[inside < C], minlength=C).argmax() == want[y, x])


def test_pictures_and_map_are_linked(retrieval):
    ex, _ = retrieval
    with ex.hold(): ex.k.value, ex.only_class.value, ex.only_image.value = 20, "all", -1
    ex.pictures[0].point = [11, 12]
    assert ex.point == (11, 12) and ex.chosen == -1 and ex.place == ex.shown[0]
    ex.pictures[2].point = [ex.crop + 4 + GAP + 5, 5]
    assert ex.chosen == ex.place == ex.shown[1]
    ex.pictures[2].point = [ex.crop + 4 + 1, 5]
    assert "Between the pictures" in said(ex)
    there = int(ex.store.index.image[ex.place])
    ex.pictures[4].point = [50, 40]
    assert ex.chosen in (int(ex.store.maps[there][40, 50]), ex.place)
    ex.pictures[3].point = on_map(ex._map()[1][7]).tolist()
    assert np.array_equal(on_map(ex._map()[1][ex.chosen]), on_map(ex._map()[1][7]))
    ex.only_class.value = "background"
    assert ex.chosen == -1 and set(ex.view.tables["neighbours"].label) == {"background"}
    name, number = ex.only_image.options[3]
    with ex.hold(): ex.only_class.value, ex.only_image.value = "all", number
    assert set(ex.view.tables["neighbours"].image) == {name}
    absent = next(c for c in ex.only_class.options[1:] if not ((ex.store.index.image == number) & (ex.store.index.label == SCENE_CLASSES.id(c))).any())
    ex.only_class.value = absent
    assert "No segment of class" in said(ex)


def test_a_wrong_vote_names_who_caused_it(world):
    "All training labels are one class: the mask cannot agree, and all neighbours have orange frames"
    weak, held_out, learn, _ = world
    ex = explore_retrieval(learn, weak, held_out, [np.full((SIZE, SIZE), 5, np.uint8)]*len(weak), grid=(3, 3))
    assert "20 neighbours of" in said(ex) and "outvote 0 of the true class." in said(ex)
    assert (seen(ex, 2)[0, :CROP] == rgb_of(PUSH)).all()
    closed = SceneSet(2, seed=3, size=SIZE, start=100, masks=False)
    ex = explore_retrieval(learn, weak, closed, [np.full((SIZE, SIZE), 5, np.uint8)]*len(weak), grid=(3, 3))
    assert "mask" not in said(ex)
    with pytest.raises(SpmlError, match="label maps"): explore_retrieval(learn, weak.images, held_out)

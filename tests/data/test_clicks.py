"""Clicks of people on photographs of animals."""
import numpy as np
import pytest

from spml_kit.core import VOID, Classes, SpmlError
from spml_kit.data.clicks import animal_clicks
from spml_kit.data.images import VocSet
from spml_kit.data.weak import WeakSet
from spml_kit.files import write_json
from test_weak import ANIMALS


@pytest.fixture
def clicked(voc):
    write_json(voc/'Points/animal_pose_points.json', {'a': [
        dict(cls='dog', bbox=[10, 8, 25, 20], points=[[12, 9, 'nose'], [20, 18, 'withers']]), dict(cls='cow', bbox=[30, 2, 38, 12], points=[[33, 5, 'nose']])]})
    return voc


def test_clicks_are_points_of_named_classes(clicked):
    p = animal_clicks(VocSet(clicked, classes=Classes(('background', 'dog', 'cat')), masks=False))(0)
    assert p.xy.tolist() == [[12, 9], [20, 18]] and p.classes.tolist() == [1, 1]
    assert len(animal_clicks(VocSet(clicked))(0)) == 3 and len(animal_clicks(VocSet(clicked))(1)) == 0
    with pytest.raises(SpmlError, match="background 'all'"): animal_clicks(VocSet(clicked), background='all')


@pytest.mark.parametrize('seed', range(5))
def test_background_clicks_lie_at_the_border_outside_boxes(clicked, seed):
    p = animal_clicks(VocSet(clicked, masks=False), background='border', seed=seed)(0)
    ground = p.xy[p.classes == 0]
    assert len(ground) == 4
    for x, y in ground:
        assert min(x, y, 39 - x, 29 - y) < 8
        assert not (10 <= x <= 25 and 8 <= y <= 20) and not (30 <= x <= 38 and 2 <= y <= 12)
    assert np.array_equal(p.xy, animal_clicks(VocSet(clicked, masks=False), background='border', seed=seed)(0).xy)


def test_clicks_by_people(voc_animals):
    s, closed = (VocSet(voc_animals, 'val', max_size=160, classes=ANIMALS, masks=m) for m in (True, False))
    weak = WeakSet(closed, animal_clicks(closed, width=1, background='border'))
    right, ground = [], []
    for i in range(0, 445, 15):
        labels, mask = weak.sample(i).labels, s.mask(i)
        right.append((mask == labels)[(labels > 0) & (labels < 7) & (mask != VOID)]); ground.append((mask == 0)[(labels == 0) & (mask != VOID)])
    right, ground = np.concatenate(right), np.concatenate(ground)
    assert len(right) > 200 and right.mean() > .8 and len(ground) > 50 and ground.mean() > .8

"""Keypoints: sizes of figures, and simulated clicks that lie in their parts."""
import numpy as np
import pytest

from spml_kit.core import SpmlError
from spml_kit.data.annotations import Boxes, Keypoints
from spml_kit.data.keypoints import scaled, simulate_keypoints
from spml_kit.data.scenes import make_scene


def test_sizes_of_figures():
    instances = np.zeros((20, 30), int)
    instances[2:12, 3:7], instances[5:9, 20:29] = 4, 7
    points = Keypoints([(4, 3), (5, 9), (22, 6)], [1, 2, 1], [4, 4, 7])
    assert np.allclose(scaled(points, instances).scale, [40**.5, 40**.5, 6])
    assert np.allclose(scaled(points, Boxes([(3, 2, 7, 12), (20, 5, 29, 9)], [1, 1])).scale, [40**.5, 40**.5, 6])
    assert np.allclose(scaled(points, 9).scale, 9)
    with pytest.raises(SpmlError, match="no pixel"): scaled(points, instances*0)


def test_clicks_lie_in_their_parts():
    for i in range(4):
        s = make_scene(i, only=("figure",))
        points = simulate_keypoints(s.parts, s.instances)
        x, y = points.xy.astype(int).T
        assert np.array_equal(s.parts[y, x], points.parts) and np.array_equal(s.instances[y, x], points.instances)
        pairs = {(int(k), int(p)) for k, p in zip(s.instances[s.parts > 0], s.parts[s.parts > 0])}
        assert sorted(pairs) == sorted(zip(points.instances.tolist(), points.parts.tolist()))
        assert np.allclose(points.scale, [((s.instances == k) & (s.parts > 0)).sum()**.5 for k in points.instances])


def test_pieces_without_instances():
    parts = np.zeros((30, 30), np.uint8)
    parts[2:8, 2:8], parts[2:8, 20:28], parts[20:28, 5:9], parts[0, 29] = 1, 1, 2, 2
    points = simulate_keypoints(parts)
    assert sorted(points.parts.tolist()) == [1, 1, 2] # a crumb gets no click
    parts[29, 0], parts[15, 12:14], parts[15, 29], parts[0, 0], parts[29, 29] = 3, 3, 3, 4, 4
    points = simulate_keypoints(parts)
    assert sorted(points.parts.tolist()) == [1, 1, 2, 3, 4] # unless there is nothing else of its part: then the largest does, or one of the largest
    assert points.xy[points.parts == 3][0, 1] == 15 and points.xy[points.parts == 3][0, 0] in (12, 13)
    assert sorted(simulate_keypoints(parts, (parts > 0)*1).parts.tolist()) == [1, 2, 3, 4] # one a part, where figures are known
    empty = simulate_keypoints(np.zeros((9, 9), np.uint8))
    assert len(empty) == 0 and (empty.to_labels((9, 9)) == 0).all()

"""Contours of an image: range, mirror images, equal lightness, resolution."""
import numpy as np
import pytest

from spml_kit.core import SpmlError
from spml_kit.data.scenes import make_scene
from spml_kit.regions.contours import contour_channels, gradient_contours
from test_oversegment import noise


@pytest.mark.parametrize('size', [(16, 16), (16, 50), (33, 47), (2, 40), (128, 128)])
def test_contours_range(size):
    c = gradient_contours(noise(*size))
    assert c.shape == size and c.dtype == np.float32 and np.isfinite(c).all()
    assert 0 <= c.min() and .05 < c.max() <= 1


@pytest.mark.parametrize('value', [0, 77, 255])
def test_constant_image_has_no_contours(value): assert gradient_contours(np.full((16, 20, 3), value, np.uint8)).max() == 0


@pytest.mark.parametrize('axis', [0, 1])
def test_contours_of_mirrored_image(axis):
    im = noise(40, 60)
    np.testing.assert_allclose(gradient_contours(np.flip(im, axis)), np.flip(gradient_contours(im), axis), atol=1e-4)


def test_equal_lightness_edge_is_seen():
    im = np.zeros((32, 32, 3), np.uint8)
    im[:, :16], im[:, 16:] = (200, 60, 60), (60, 129, 60) # about the same lightness
    light = contour_channels(im)[0]
    assert np.ptp(light) < .03
    c = gradient_contours(im)
    assert c[16, 15:17].min() > .5 and c[16, [2, 29]].max() < .05


def test_contours_follow_the_resolution():
    small = make_scene(1, size=96).image
    large = small.repeat(2, 0).repeat(2, 1)
    a, b = gradient_contours(small), gradient_contours(large)[::2, ::2]
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > .9


@pytest.mark.parametrize('bad', [np.zeros((8, 1), np.uint8), np.zeros((1, 8, 4), np.uint8), np.zeros((1, 8, 3), np.uint8)])
def test_contours_refuse(bad):
    with pytest.raises(SpmlError, match='at least 2x2'): gradient_contours(bad)

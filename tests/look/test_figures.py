"Figures that lessons share: what they draw follows from what they are given"
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from spml_kit.core import UNLABELLED, SpmlError, rng_of
from spml_kit.look.explain import PULL, PUSH, rgb_of
from spml_kit.look.figures import ERRORS, draw_circle, error_legend, gains_figure, judged_picture


def circle(x, mu, g, **kwargs):
    fig, ax = plt.subplots()
    draw_circle(ax, x, mu, g, 0, ['']*len(mu), ['#777777']*len(mu), **kwargs)
    plt.close(fig)
    return ax, [t for t in ax.texts if getattr(t, 'arrow_patch', None)]


def on_circle(angles): return np.stack([np.cos(angles), np.sin(angles)], 1)


@settings(max_examples=10)
@given(st.lists(st.floats(0, 6), min_size=2, max_size=5), st.floats(.05, 2), st.integers(0, 10**6))
def test_arrows_lie_along_the_forces(angles, gain, seed):
    mu, x = on_circle(np.array(angles)), on_circle(np.array([6.1]))[0]
    g = rng_of(seed).uniform(.01, 1, len(mu))*np.where(np.arange(len(mu)) % 2, 1, -1)
    _, arrows = circle(x, mu, g, gain=gain)
    assert len(arrows) == len(mu) + 1
    for arrow, m, force in zip(arrows, mu, g):
        np.testing.assert_allclose(np.array(arrow.xyann) - x, 0, atol=1e-12)
        np.testing.assert_allclose(np.array(arrow.xy) - x, -gain*force*(m - x), atol=1e-12)
        assert to_hex(arrow.arrow_patch.get_edgecolor()).upper() == (PULL if force < 0 else PUSH)
    step = np.array(arrows[-1].xy) - np.array(arrows[-1].xyann)
    tangent = np.array([-x[1], x[0]])
    np.testing.assert_allclose(step @ x, 0, atol=1e-9)
    np.testing.assert_allclose(step @ tangent, gain*sum(-force*(m - x) for m, force in zip(mu, g)) @ tangent, atol=1e-9)


def test_no_force_draws_no_arrow():
    assert not circle(np.array([1, 0]), on_circle(np.arange(3)), np.zeros(3))[1]


@pytest.mark.parametrize('x, mu, g', [((3,), (2, 2), (2,)), ((2,), (2, 3), (2,)), ((2,), (3, 2), (2,))])
def test_wrong_shapes_are_refused(x, mu, g):
    with pytest.raises(SpmlError, match='takes x'): circle(np.ones(x), np.ones(mu), np.ones(g))


@given(st.integers(0, 10**6))
def test_each_pixel_shows_its_error(seed):
    rng = rng_of(seed)
    image = rng.integers(0, 256, (7, 9, 3)).astype(np.uint8)
    labels, mask = rng.choice([0, 1, 2, UNLABELLED], (7, 9)), rng.choice([0, 1, 2], (7, 9))
    painted = judged_picture(image, labels, mask)
    def shown(said, true, rgb):
        if said == UNLABELLED: return rgb_of(ERRORS['unlabelled'])
        if said == true: return rgb if said else (.2*rgb + .8*255).astype(np.uint8)
        return rgb_of(ERRORS['wrong' if said else 'missed'])
    np.testing.assert_array_equal(painted, [[shown(*o) for o in zip(*row)] for row in zip(labels, mask, image)])


def test_the_legend_names_every_colour():
    fig = plt.figure()
    error_legend(fig)
    plt.close(fig)
    shown = {to_hex(p.get_facecolor()) for p in fig.legends[0].get_patches()}
    assert {c.lower() for c in ERRORS.values()} < shown and len(shown) == 4


def test_other_sizes_are_refused():
    with pytest.raises(SpmlError, match=r'\(4, 4\), \(3, 4\)'):
        judged_picture(np.zeros((4, 4, 3), np.uint8), np.zeros((3, 4), int), np.zeros((4, 4), int))


@pytest.mark.parametrize('gain, said', [(.1, 'not certain'), (3, 'certain'), (-3, 'certain')])
def test_a_gain_is_certain_where_its_interval_leaves_out_zero(gain, said):
    shared, rng = rng_of(0).normal(0, 5, 500), rng_of(1)
    drawn = dict(a=40 + shared, b=40 + gain + shared + rng.normal(0, .5, 500))
    fig = gains_figure(dict(a=[40, 41], b=[40 + gain, 41 + gain]), drawn, [('a', 'b')])
    left, right = fig.axes
    assert [t.get_text() for t in right.texts] == [said]
    dots = [c for c in right.collections if isinstance(c, PathCollection)]
    np.testing.assert_allclose(dots[0].get_offsets()[0, 0], gain)
    np.testing.assert_allclose(right.lines[0].get_xdata(), np.percentile(drawn['b'] - drawn['a'], [2.5, 97.5]))


def test_methods_without_draws_are_refused():
    with pytest.raises(SpmlError, match='other'): gains_figure(dict(a=[1]), dict(a=np.ones(3)), [('a', 'other')])

"""Classes and their sides, label maps, seeds, and words for what is wrong."""
import numpy as np
import pytest

from spml_kit.core import Classes, SpmlError


def test_classes_without_pairs_stay():
    assert np.array_equal(Classes(("a", "b")).mirrored, np.arange(256))
    for swaps, message in ((((1, 2),), "class '1'"), ((("a", "a"),), "not two classes"), ((("a",),), "not two classes")):
        with pytest.raises(SpmlError, match=message): Classes(("a", "b"), swaps)


def test_pairs_by_name():
    pairs = lambda *names, **kw: Classes(('background', *names), **kw).swaps
    assert pairs('left arm', 'right arm', 'arm', 'leg_right', 'leg_left') == (('left arm', 'right arm'), ('leg_right', 'leg_left'))
    assert pairs('left', 'right') == (('left', 'right'),)
    assert pairs('left arm', 'left leg', 'upright', 'upleft', 'bright', 'righteous', 'lefteous') == () # one of two, or no such word
    assert pairs('Left arm', 'left arm', 'right arm') == (('left arm', 'right arm'),) # nobody is in two pairs
    assert pairs('left arm', 'right arm', swaps=()) == ()
    assert pairs('left', 'right', 'up', swaps=(('left', 'up'),)) == (('left', 'up'),)


@pytest.mark.parametrize('name', [r'$\frac{bad$', 'a\nb', 'a\tb', '', ' ', 'a\x00', '\ufeffa', 5])
def test_class_names_that_no_picture_bears(name):
    with pytest.raises(SpmlError, match='class name'): Classes(('background', name))

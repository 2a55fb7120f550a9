"Gains run by run: their means, their intervals, settings apart, faults"
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from spml_kit.core import SpmlError, rng_of
from spml_kit.runs.paired import gain_interval, paired_gains


def rows(scores, **more):
    "Rows of runs: (seed, method) to score"
    return pd.DataFrame([dict(file=f'run{s}/metrics.json', data='scenes', annotation='points', setting='a', seed=s, method=m, miou=v) | more for (s, m), v in scores.items()])


@pytest.mark.parametrize('n', [2, 3, 10])
@pytest.mark.parametrize('level', [.5, .95])
def test_the_interval_is_that_of_the_t_test(n, level):
    gains = rng_of(n).normal(3, 2, n)
    low, high = gain_interval(gains, level)
    assert (low + high)/2 == pytest.approx(gains.mean())
    for end in (low, high): assert stats.ttest_1samp(gains, end).pvalue == pytest.approx(1 - level)


@pytest.mark.parametrize('gains', [[], [4.]])
def test_one_seed_has_no_interval(gains): assert np.isnan(gain_interval(gains)).all()


def test_differences_are_taken_within_runs():
    table = paired_gains(rows({(0, 'a'): 10, (0, 'b'): 7, (1, 'a'): 90, (1, 'b'): 88, (2, 'a'): 50}), [('a', 'b'), ('b', 'a')])
    assert [*table.index.get_level_values('pair')] == ['a over b', 'b over a']
    assert [*table.gain] == [2.5, -2.5] and [*table.seeds] == [2, 2] # seed 2 has no partner
    assert (table.low.iloc[0], table.high.iloc[0]) == pytest.approx(gain_interval([3, 2]))


def test_settings_and_annotations_are_kept_apart():
    one = rows({(0, 'a'): 10, (0, 'b'): 7})
    table = paired_gains(pd.concat([one, one.assign(setting='other', miou=[5, 5]), one.assign(annotation='boxes')]), [('a', 'b')])
    assert sorted(table.gain) == [0, 3, 3] and 'setting' in table.index.names
    assert 'setting' not in paired_gains(one, [('a', 'b')]).index.names


def test_faults():
    one = rows({(0, 'control'): 10, (0, 'spml'): 7})
    with pytest.raises(SpmlError, match="'contrl'; did you mean 'control'"): paired_gains(one, [('spml', 'contrl')])
    with pytest.raises(SpmlError, match='run0/metrics.json and other: both have control of seed 0'): paired_gains(pd.concat([one, one.assign(file='other')]), [('spml', 'control')])

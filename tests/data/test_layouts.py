"""Pairs of images and masks against the plain definition, and names of a table of files."""
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spml_kit.core import VOID, Classes
from spml_kit.data.layouts import PairSet, read_table
from spml_kit.files import write_index_png
from test_sources import numbers, photo, save, write_csv


def test_names_of_a_table_stay_apart(tmp_path):
    for sub in "ab": save(tmp_path/sub/"1.jpg", photo(0))
    write_index_png(tmp_path/"m.png", numbers(0, 1))
    write_csv(tmp_path/"l.csv", [(f"{s}/1.jpg", "m.png", "train") for s in "ab"])
    assert [*read_table(tmp_path/"l.csv")[0]] == ["a/1", "b/1"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 6))
def test_pairs_against_the_plain_definition(tmp_path_factory, seed, top, kept):
    folder, rng = tmp_path_factory.mktemp("p"), np.random.default_rng(seed)
    mask = numbers(seed, top); save(folder/"a.png", photo(0)); save(folder/"m.png", mask)
    table = Classes(tuple(f"c{k}" for k in range(8)))
    values = {int(n): int(rng.integers(8)) for n in rng.permutation(top + 1)[:kept]}
    some = Classes(tuple(rng.permutation(table.names)[:rng.integers(2, 9)].tolist()))
    got = PairSet({"a": (folder/"a.png", folder/"m.png")}, table, values, some, numbers=top + 1).mask(0)
    want = [[some.names.index(table.names[values[v]]) if v in values and table.names[values[v]] in some.names else VOID for v in row] for row in mask.tolist()]
    assert got.tolist() == want

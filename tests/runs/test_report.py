"""A report begins with the results, loses nothing, and ends with parameters and environment."""
import re

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spml_kit.runs.experiment import experiments
from spml_kit.runs.report import results_first, write_report

ENVIRONMENT = dict(python="3.12.1", cpus=2, packages={"secret": "9"})


def notebook(tags):
    cells = [nbformat.v4.new_code_cell(f"cell_{i}", metadata=dict(tags=[t] if t else [])) for i, t in enumerate(tags)]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), *cells])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["", "result", "parameters", "injected-parameters", "other"]), max_size=8))
def test_every_cell_stands_once_in_the_order_of_a_report(tags):
    page = results_first(notebook(tags), ENVIRONMENT)
    order = [int(c.source[5:]) for c in page.cells if c.source.startswith("cell_")]
    rank = lambda i: {"result": 0, "": 1, "other": 1}.get(tags[i], 2)
    assert order == sorted(range(len(tags)), key=lambda i: (rank(i), i))
    assert page.cells[0].source == "# Title" and "3.12.1" in page.cells[-1].source and "secret" not in page.cells[-1].source
    assert ("## Results" in [c.source for c in page.cells]) == ("result" in tags)


def test_code_is_folded_but_for_the_parameters_given(tmp_path):
    nbformat.write(notebook(["parameters", "injected-parameters", "result", ""]), tmp_path / "a.ipynb")
    write_report(tmp_path / "a.ipynb", tmp_path / "a.html", tmp_path / "a.ipynb", ENVIRONMENT)
    html = (tmp_path / "a.html").read_text()
    folded = "".join(re.findall(r"<details>.*?</details>", html, re.S))
    assert {k: f"cell_{k}" in folded for k in range(4)} == {0: True, 1: False, 2: True, 3: True} and "cell_1" in html


@pytest.mark.parametrize("path", experiments().values(), ids=lambda p: p.stem)
def test_experiments_say_what_their_results_are(path):
    cells = nbformat.read(path, 4).cells
    assert path.stem == "comparison" or any("result" in c.metadata.get("tags", []) for c in cells)

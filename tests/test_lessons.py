"""Every lesson runs from top to bottom as its reader finds it; its exercises say what is missing, and its solutions pass their tests."""
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

LESSONS = sorted((Path(__file__).parent.parent/'nbs'/'lessons').glob('*.ipynb'))


def kind(cell): return next(iter(cell.metadata.get('tags', [])), '')


def printed(cell): return ''.join(o.text for o in cell.outputs if o.output_type == 'stream' and o.name == 'stdout')


def test_there_are_nine(): assert [p.name[0] for p in LESSONS] == list('123456789')


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_exercises_and_solutions(path):
    "One pass through the notebook; the tests of an exercise run as its reader finds them, and once more after the solution."
    nb, cells, before, after, checks = nbformat.read(path, 4), [], [], [], []
    for cell in nb.cells:
        cells.append(cell)
        if kind(cell) == 'check': checks.append(cell)
        if kind(cell) == 'solution':
            assert checks, f'{path.name}: a solution without tests before it'
            assert cell.metadata.get('jupyter', {}).get('source_hidden'), f'{path.name}: a solution that is not folded away'
            again = [deepcopy(c) for c in checks]
            for c in again: c.id += '_again'
            before += checks
            after += again
            cells += again
            checks = []
    assert not checks, f'{path.name}: an exercise without a solution'
    assert len(before) >= 3
    nb.cells = cells
    NotebookClient(nb, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    for cell in before: assert 'not written yet' in printed(cell), f'{path.name} begins with an exercise solved: {cell.source}\n{printed(cell)}'
    for cell in after: assert printed(cell).strip().endswith(': right.'), f'{path.name}: {cell.source}\n{printed(cell)}'

"""Fixtures that every test file shares."""
import json
from pathlib import Path

import pytest

from spml_kit.core import data_root


@pytest.fixture(scope="session")
def vectors():
    "Golden vectors by id: {inputs, expected}"
    data = json.loads((Path(__file__).parent / "spml_vectors.json").read_text())
    return {v["id"]: v for v in data["vectors"]}


@pytest.fixture(scope="session")
def voc_animals():
    "Folder of the VOC-layout photographs; skips where they are absent"
    root = data_root("voc_animals", "VOC2012")
    if root is None:
        pytest.skip("photographs absent: set SPML_DATA to a folder that holds voc_animals/VOC2012")
    return root

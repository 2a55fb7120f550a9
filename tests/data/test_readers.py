"""Readers of other tools: each is recognised by its own files, and one spoilt entry stops no other."""
import json
import xml.etree.ElementTree as ET
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest

from conftest import FIXTURES
from spml_kit.core import SpmlError
from spml_kit.data.formats import read_annotation
from spml_kit.data.readers import LOADERS, READERS, named_reader, open_export, read_xml, recognise_tool
from spml_kit.data.shapes import Reason, fit_drawing
from test_importers import CLASSES, DOCUMENTS, SIZE, TOOLS


def fitted(export):
    "Drawings that fit their picture"
    for d in export.drawings:
        try: yield fit_drawing(d, SIZE)
        except SpmlError as e: export.skipped.append(Reason(str(e), d.picture))


def signs(export):
    "Shapes and tags as they come, without which object they are of"
    drawn = [*fitted(export)]
    mask = lambda s: None if s.mask is None else np.asarray(s.mask).tobytes()
    return Counter((d.picture, s.kind, s.name, s.xy.tobytes(), tuple(r.tobytes() for r in s.holes), mask(s)) for d in drawn for s in d.shapes) + Counter((d.picture, t) for d in drawn for t in d.tags)


def told(export): return [*export.skipped, *(w for d in export.drawings for w in d.skipped)]


def placed(export): return any(getattr(w, "where", "") or "picture" in w for w in [*told(export), *(w for d in fitted(export) for w in d.skipped)])


def check(read, whole, without, spoilt):
    "The others are read as if this one were not there; what is lost of this one is told, with its place"
    rest, all_of_it, now = signs(read(without)), signs(read(whole)), read(spoilt)
    found = signs(now)
    assert not rest - found, (rest - found, spoilt)
    if found.total() < all_of_it.total():
        assert placed(now), (told(now), spoilt)
        assert not any(w in why for why in told(now) for w in ("Error", "NoneType", "subscriptable", "has no attribute", "object is"))


ENTRIES = {"labelme": [("shapes",)], "coco": [("annotations",), ("images",), ("categories",)], "via": [("a.png300", "regions")], "label_studio": [(0, "annotations", 0, "result")], "supervisely": [("objects",)], "qupath": [("features",)]}
WRONG = [None, 3, -1.5, "x", "", [], {}, [None], {"a": 1}, True]


def at(d, way):
    for k in way: d = d[k]
    return d


def ways(d, depth=3):
    "Places within an entry"
    yield ()
    for k, v in (d.items() if isinstance(d, dict) else list(enumerate(d))[:3] if isinstance(d, list) else ()) if depth else ():
        yield from ((k, *w) for w in ways(v, depth - 1))


def spoils(entry):
    "Each place without what it held, and with each wrong thing in its place"
    for way in ways(entry):
        gone = ["remove"] if way and isinstance(at(entry, way[:-1]), dict) else []  # a list may well be shorter
        for wrong in (*gone, *WRONG):
            bad = deepcopy(entry)
            if not way: bad = wrong
            elif isinstance(wrong, str) and wrong == "remove": del at(bad, way[:-1])[way[-1]]
            else: at(bad, way[:-1])[way[-1]] = wrong
            yield bad


@pytest.mark.parametrize("tool", ENTRIES)
def test_one_spoilt_entry_of_json_stops_no_other(tool):
    good, path = json.loads(DOCUMENTS[tool].read_text()), DOCUMENTS[tool]
    read = lambda d: named_reader(tool).read(path, d)
    n = 0
    for place in ENTRIES[tool]:
        for k, one in enumerate(at(good, place)):
            without, spoilt = deepcopy(good), deepcopy(good)
            del at(without, place)[k]
            for bad in spoils(one):
                at(spoilt, place)[k] = bad
                check(read, good, without, spoilt)
                n += 1
    assert n > 100


@pytest.mark.parametrize("tool, name, tag", [("cvat", "annotations.xml", "image/*"), ("voc", "Annotations/a.xml", "object"), ("scribblesup", "a.xml", "polygon")])
def test_one_spoilt_entry_of_xml_stops_no_other(tool, name, tag):
    text = (FIXTURES / tool / name).read_text()
    path = FIXTURES / tool / name
    read, parse = (lambda root: named_reader(tool).read(path, root)), lambda: [root := ET.fromstring(text), [setattr(e, "tag", e.tag.lower()) for e in root.iter()]][0]
    n = len(parse().findall(tag))
    for k in range(n):
        without = parse()
        next(p for p in without.iter() if without.findall(tag)[k] in [*p]).remove(without.findall(tag)[k])
        inner = len([*parse().findall(tag)[k].iter()])
        for j in range(inner):
            keys = [None, "drop", *[*parse().findall(tag)[k].iter()][j].attrib]
            for key in keys:
                for wrong in ("x", "", "nan", "1,2"):
                    spoilt = parse()
                    e = [*spoilt.findall(tag)[k].iter()][j]
                    if key == "drop":
                        if e is spoilt.findall(tag)[k]: continue
                        next(p for p in spoilt.iter() if e in [*p]).remove(e)
                    elif key is None: e.text = wrong
                    else: e.set(key, wrong)
                    check(read, parse(), without, spoilt)


def test_every_reader_has_a_file_here_and_recognises_nobody_elses():
    assert {*READERS} == {*TOOLS, "hugging_face"}
    for tool in TOOLS:
        files = [FIXTURES / tool, *(p for p in (FIXTURES / tool).rglob("*") if p.suffix in LOADERS)]
        assert {recognise_tool(f) for f in files} - {""} == {tool}


@pytest.mark.parametrize("text", ['<!DOCTYPE annotation><annotation/>', '<!DOCTYPE a [<!ENTITY b "c">]><annotations><image name="&b;"/></annotations>', '<?xml version="1.0"?><!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>'])
def test_document_types_are_refused(text, tmp_path):
    (tmp_path / "a.xml").write_text(text)
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "a.xml").write_text(text, encoding=encoding)
        for read in (read_xml, open_export, lambda p: read_annotation(p, CLASSES)):
            with pytest.raises(SpmlError, match="a.xml: XML with a document type"): read(tmp_path / "a.xml")

"""The paper's tables beside our runs: what belongs to a cell, spread over seeds, order, faults, the command line."""
import json

import pytest

from spml_kit.core import VOC_CLASSES, SpmlError, write_json
from spml_kit.experiment import find_notebook
from spml_kit.scenes import PART_CLASSES
from spml_kit.tables import beside, collect_runs, compare, published, reversed_pairs, spml_tables


def run(folder, name, miou, seed=0, annotation="scribbles", method="spml_head", relations=None, **conditions):
    c = dict(n_train=4, size=64, steps=6, classes=["a", "b"], length=1.0, recipe=dict(network="EmbedNet", relations=relations or {}))
    write_json(folder / name / "metrics.json", dict(rows=[dict(method=method, data="scenes", annotation=annotation, seed=seed, miou=miou)], conditions=c | conditions))


def test_published_tables_are_whole():
    tables = published()
    assert {"table2", "table6a", "table6b", "table6c", "table7"} <= set(tables)
    for t in tables.values():
        assert t["title"] and t["source"] and len(t["cells"]) >= 4
        assert all(0 < c["paper"] < 100 and ("where" in c or "class" in c) for c in t["cells"].values())
    assert [c["paper"] for c in tables["table6c"]["cells"].values()] == [71.2, 72.8, 74.2, 73.8]


def test_the_papers_classes_are_those_of_voc():
    table = published()["table8"]
    assert {c["class"] for c in table["cells"].values()} == set(VOC_CLASSES.names[1:])
    mean = lambda t, background: (sum(c["paper"] for c in t["cells"].values()) + background)/21
    assert round(mean(table, 92.7), 1) == 74.2 and round(mean(published()["table8crf"], 94.1), 1) == 76.1 # Table 7; the backgrounds follow from it


def test_the_papers_parts_are_those_of_the_scenes():
    for name, mean in (("table10", 44.15), ("table10loss", 31.31), ("table10full", 60.28)):
        cells = published()[name]["cells"]
        assert [c["class"] for c in cells.values()] == list(PART_CLASSES.names)
        assert round(sum(c["paper"] for c in cells.values())/15, 2) == mean # Table 10, background included


def test_classes_make_cells(tmp_path):
    run(tmp_path, "a", 40., per_class=None)
    said = json.loads((tmp_path / "a/metrics.json").read_text())
    said["rows"][0]["per_class"] = {"background": 90., "cat": 33.}
    write_json(tmp_path / "a/metrics.json", said)
    assert beside(published()["table8"], collect_runs(tmp_path)).ours.dropna().to_dict() == {"cat": 33.}


def test_weights_in_effect_choose_the_cell(tmp_path):
    off = lambda *names: {n: {"weight": 0} for n in names}
    run(tmp_path, "a", 40., relations=off("similarity", "cooccurrence"))
    run(tmp_path, "b", 50., relations=off("cooccurrence"))
    run(tmp_path, "c", 45.)
    both = beside(published()["table6c"], collect_runs(tmp_path))
    assert both.ours.dropna().to_dict() == {"annotation": 40., "with similarity": 50., "with co-occurrence": 45.}
    assert reversed_pairs(both) == [("with co-occurrence", "with similarity")]


def test_small_differences_of_the_paper_are_no_order(tmp_path):
    run(tmp_path, "a", 40., length=1.0)
    run(tmp_path, "b", 50., length=.8) # equal in the paper
    assert reversed_pairs(beside(published()["table7"], collect_runs(tmp_path))) == []


def test_other_conditions_are_another_setting(tmp_path):
    run(tmp_path, "a", 40.)
    run(tmp_path, "b", 50., seed=1, steps=600)
    runs = collect_runs(tmp_path)
    assert runs.setting.nunique() == 2
    with pytest.raises(SpmlError, match="2 settings"): compare("table7", runs)
    run(tmp_path, "b", 50., seed=1, length=.5, relations={"similarity": {"weight": .3}})
    assert collect_runs(tmp_path).setting.nunique() == 1 # what tables vary
    run(tmp_path, "b", 50., seed=1, relations={"similarity": {"kappa": 3}})
    assert collect_runs(tmp_path).setting.nunique() == 2


def test_seeds(tmp_path):
    for seed, miou in enumerate((50., 52., 57.)): run(tmp_path, f"s{seed}", miou, seed)
    row = beside(published()["table7"], collect_runs(tmp_path)).loc["100 %"]
    assert row.ours == 53 and row.seeds == 3 and abs(row.sd - 13**.5) < 1e-9 and 50 <= row.low < 53 < row.high <= 57


def test_other_files_are_passed_over(tmp_path):
    run(tmp_path, "a", 40.)
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text(json.dumps([1]))
    assert len(collect_runs(tmp_path)) == 1 and len(collect_runs(tmp_path / "a" / "metrics.json")) == 1


def test_command(tmp_path, capsys):
    run(tmp_path, "a", 40., length=1.0)
    run(tmp_path, "b", 50., length=.3)
    assert spml_tables([str(tmp_path), "--out", str(tmp_path / "csv")]) == 0
    said = capsys.readouterr().out
    assert "table7, scenes" in said and "the paper has '100 %' above '30 %'" in said and "4 images of scenes" in said
    assert "cell,paper,ours" in next(p for p in (tmp_path / "csv").glob("table7_scenes_*.csv")).read_text()
    assert spml_tables([str(tmp_path), "--table", "table77"]) == 2 and "did you mean 'table7" in capsys.readouterr().err
    assert spml_tables([str(tmp_path / "csv")]) == 2


def test_published_travels_with_the_experiments():
    assert (find_notebook("single").parent / "published.yaml").exists()

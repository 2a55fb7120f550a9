"""The paper's tables beside our runs: what belongs to a cell, spread over seeds, order, faults, the command line."""
import json

import numpy as np
import pytest

from spml_kit.core import VOC_CLASSES, SpmlError
from spml_kit.files import write_json
from spml_kit.runs.experiment import find_notebook
from spml_kit.data.scenes import PART_CLASSES
from spml_kit.runs.tables import table_with_runs, by_setting, collect_runs, published, reversed_pairs, run_seconds
from spml_kit.runs.captions import captioned_table, tables_by_setting
from spml_kit.runs.cli import spml_tables


def run(folder, name, miou, seed=0, annotation="scribbles", method="spml_head", relations=None, **conditions):
    c = dict(n_train=4, size=64, steps=6, classes=["a", "b"], length=1.0, recipe=dict(network="EmbedNet", relations=relations or {}))
    write_json(folder / name / "metrics.json", dict(rows=[dict(method=method, data="scenes", annotation=annotation, seed=seed, miou=miou)], conditions=c | conditions))


def test_published_tables_are_whole():
    tables = published()
    assert {"table2", "table6a", "table6b", "table6c", "table7"} <= set(tables)
    for t in tables.values():
        assert t["title"] and t["source"] and len(t["cells"]) >= 4
        assert all(0 < c["paper"] < 100 and ("where" in c or "class" in c or "of" in c and {*c["of"]} < {*t["cells"]}) for c in t["cells"].values())
    assert [c["paper"] for c in tables["table6c"]["cells"].values()] == [71.2, 72.8, 74.2, 73.8]


def test_the_papers_classes_are_those_of_voc():
    table = published()["table8"]
    assert {c["class"] for c in table["cells"].values()} == set(VOC_CLASSES.names[1:])
    mean = lambda t, background: (sum(c["paper"] for c in t["cells"].values()) + background)/21
    assert round(mean(table, 92.7), 1) == 74.2 and round(mean(published()["table8crf"], 94.1), 1) == 76.1 # Table 7; the backgrounds follow from it
    assert round(mean(published()["table8loss"], 93.5), 1) == 73.2 and round(mean(published()["table8losscrf"], 94.), 1) == 75.2


def test_the_papers_parts_are_those_of_the_scenes():
    for name, mean in (("table10", 44.15), ("table10loss", 31.31), ("table10full", 60.28), ("table10segsort", 57.32)):
        cells = published()[name]["cells"]
        assert [c["class"] for c in cells.values()] == list(PART_CLASSES.names)
        assert round(sum(c["paper"] for c in cells.values())/15, 2) == mean # Table 10, background included


def test_the_papers_tables_agree_where_they_say_the_same():
    at = lambda table, cell: published()[table]["cells"][cell]["paper"]
    assert at("table3", "scribbles") == at("table7", "100 %") == 74.2 and at("table3", "with CRF, scribbles") == at("table7crf", "100 %") == at("table2", "scribbles") == 76.1
    assert at("table3", "points") == at("table7", "0 %") and at("table3", "with CRF, points") == at("table7crf", "0 %") == at("table2", "points")
    assert at("table3", "full masks") == at("table7", "full masks") and at("table3", "with CRF, full masks") == at("table7crf", "full masks")
    full = [c["paper"] for c in published()["table10segsort"]["cells"].values()]
    assert round(sum(full)/15, 1) == at("table4", "SPML, full masks")


@pytest.mark.parametrize("kind, name", [(k, {"full": "full masks"}.get(k, k)) for k in ("tags", "points", "boxes", "scribbles", "full")])
def test_the_papers_classes_have_the_mean_of_their_row(kind, name):
    classes = [c["paper"] for c in published()[f"table9{kind}"]["cells"].values()]
    assert 91 < 21*published()["table9"]["cells"][name]["paper"] - sum(classes) < 96 # what is left for the background, which the paper does not list


def test_classes_make_cells(tmp_path):
    run(tmp_path, "a", 40., per_class=None)
    said = json.loads((tmp_path / "a/metrics.json").read_text())
    said["rows"][0]["per_class"] = {"background": 90., "cat": 33.}
    write_json(tmp_path / "a/metrics.json", said)
    assert table_with_runs(published()["table8"], collect_runs(tmp_path)).ours.dropna().to_dict() == {"cat": 33.}
    said["rows"][0]["per_class"]["balloon"] = 50.
    write_json(tmp_path / "a/metrics.json", said)
    assert table_with_runs(published()["table8"], collect_runs(tmp_path)).seeds.sum() == 0 # a cat among balloons is not VOC's
    said["rows"][0] |= dict(annotation="full", method="full_masks", per_class={"background": 90., "cat": 33.})
    write_json(tmp_path / "a/metrics.json", said)
    assert table_with_runs(published()["table10full"], collect_runs(tmp_path)).seeds.sum() == 0 # only the background is common to body parts and cats


def test_weights_in_effect_choose_the_cell(tmp_path):
    off = lambda *names: {n: {"weight": 0} for n in names}
    run(tmp_path, "a", 40., relations=off("similarity", "cooccurrence"))
    run(tmp_path, "b", 50., relations=off("cooccurrence"))
    run(tmp_path, "c", 45.)
    both = table_with_runs(published()["table6c"], collect_runs(tmp_path))
    assert both.ours.dropna().to_dict() == {"annotation": 40., "with similarity": 50., "with co-occurrence": 45.}
    assert reversed_pairs(both) == [("with co-occurrence", "with similarity")]


def test_small_differences_of_the_paper_are_no_order(tmp_path):
    run(tmp_path, "a", 40., length=1.0)
    run(tmp_path, "b", 50., length=.8) # equal in the paper
    assert reversed_pairs(table_with_runs(published()["table7"], collect_runs(tmp_path))) == []


def test_other_conditions_are_another_setting(tmp_path):
    run(tmp_path, "a", 40.)
    run(tmp_path, "b", 50., seed=1, steps=600)
    runs = collect_runs(tmp_path)
    assert runs.setting.nunique() == 2
    with pytest.raises(SpmlError, match=r"2 settings .*\(scenes: steps 6; scenes: steps 600\)"): captioned_table("table7", runs)
    run(tmp_path, "b", 50., seed=1, length=.5, relations={"similarity": {"weight": .3}})
    assert collect_runs(tmp_path).setting.nunique() == 1 # what some table varies
    run(tmp_path, "b", 50., seed=1, relations={"similarity": {"kappa": 3}})
    assert collect_runs(tmp_path).setting.nunique() == 2


def test_what_other_tables_vary_parts_the_runs_of_this_one(tmp_path):
    off, more = {"similarity": {"weight": 0}}, {"similarity": {"weight": .3}}
    for seed, (miou, relations, length) in enumerate([(40., {}, 1.), (50., off, 1.), (60., more, 1.), (70., {}, .5)]): run(tmp_path, f"s{seed}", miou, seed, relations=relations, length=length)
    runs = collect_runs(tmp_path)
    scores = lambda name: {words: group.miou.tolist() for _, words, group in by_setting(name, runs)}
    assert scores("table7") == {"similarity not given": [40., 70.], "similarity 0": [50.], "similarity 0.3": [60.]} # lengths are its cells
    assert scores("table6a") == {"length 1": [40., 50., 60.], "length 0.5": [70.]} # weights are its cells
    run(tmp_path / "relation", "a", 40., relations={"annotation": {"weight": 2}})
    assert len(by_setting("table7", collect_runs(tmp_path))) == 4 # the relation, not the kind of annotation that cells name
    with pytest.raises(SpmlError, match=r"table7: runs of 3 settings .*scenes: similarity 0.3.*by_setting"): captioned_table("table7", runs)
    shown, passed = tables_by_setting("table7", runs)
    assert [s[0] for s in shown] == ["table7, scenes (similarity not given)"] and "(similarity 0; similarity 0.3)" in passed[0] and len(passed) == 1
    assert len(tables_by_setting("table7", runs, every=True)[0]) == 3


def test_kinds_of_annotation_stand_together_whatever_weights_the_paper_gives_them(tmp_path):
    strong = {"similarity": {"weight": 1.0}} # as the paper has it for points, not for tags
    for annotation, seed in (("tags", 0), ("points", 0)): run(tmp_path, f"{annotation}{seed}", 50., seed, annotation, "spml_head_crf", strong)
    run(tmp_path, "off", 40., 1, "points", "spml_head_crf", {"similarity": {"weight": 0}})
    assert [len(group) for *_, group in by_setting("table2", collect_runs(tmp_path))] in ([2, 1], [1, 2])


def test_words_tell_settings_apart_once(tmp_path):
    run(tmp_path, "a", 40., steps=100, crop=64, refine=[])
    run(tmp_path, "b", 50., steps=200, crop=32, refine=["crf"])
    run(tmp_path, "c", 60., steps=200, crop=32, refine=["crf"], flip=True)
    assert [words for _, words, _ in by_setting("table7", collect_runs(tmp_path))] == ["steps 100", "steps 200", "steps 200, flip True"]


def test_seeds(tmp_path):
    for seed, miou in enumerate((50., 52., 57.)): run(tmp_path, f"s{seed}", miou, seed)
    row = table_with_runs(published()["table7"], collect_runs(tmp_path)).loc["100 %"]
    assert row.ours == 53 and row.seeds == 3 and abs(row.sd - 13**.5) < 1e-9 and 50 <= row.low < 53 < row.high <= 57


def test_scores_of_before_a_rerun_are_not_read(tmp_path):
    run(tmp_path / "a", "previous", 40.)
    with pytest.raises(SpmlError, match="no metrics.json"): collect_runs(tmp_path)
    run(tmp_path, "a", 50.)
    assert collect_runs(tmp_path).miou.tolist() == [50.]
    for named in ("a/previous", "a/previous/metrics.json"): assert collect_runs(tmp_path / named).miou.tolist() == [40.] # who names it wants it


def test_other_files_are_passed_over(tmp_path):
    run(tmp_path, "a", 40.)
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text(json.dumps([1]))
    assert len(collect_runs(tmp_path)) == 1 and len(collect_runs(tmp_path / "a" / "metrics.json")) == 1


@pytest.mark.parametrize("own", [
    dict(rows=[dict(method="mine", data="scenes", annotation="scribbles", seed=0, miou=1.)], conditions=dict(lr=.1)),
    dict(rows=[dict(method="mine", data="scenes", annotation="scribbles", seed=0, miou=1.)], conditions=dict(n_train=4, size=64, steps=6, recipe="small")),
    dict(rows=[dict(method="mine", data="scenes", annotation="scribbles", seed=0, miou=1.)], conditions=dict(n_train=4, size=64, steps=6, recipe={})),
    dict(rows=[dict(name="mine", miou=1.)], conditions=dict(n_train=4, size=64, steps=6, recipe=dict(network="EmbedNet", relations={}))),
    dict(rows=["mine"], conditions=["lr"]), dict(rows=None, conditions=None)])
def test_experiments_of_ones_own_are_left_out(tmp_path, capsys, own):
    write_json(tmp_path / "own" / "metrics.json", own)
    assert spml_tables([str(tmp_path)]) == 2 and "no metrics.json of a run there with method" in capsys.readouterr().err
    run(tmp_path, "a", 40.)
    assert collect_runs(tmp_path).miou.tolist() == [40.]
    assert spml_tables([str(tmp_path)]) == 0 and "mine" not in capsys.readouterr().out


def test_conditions_that_some_runs_do_not_have(tmp_path):
    run(tmp_path, "a", 40.)
    run(tmp_path, "b", 50., 1)
    said = json.loads((tmp_path / "b/metrics.json").read_text())
    del said["conditions"]["length"]
    write_json(tmp_path / "b/metrics.json", said)
    assert [group.miou.tolist() for *_, group in by_setting("table6a", collect_runs(tmp_path))] == [[40., 50.]] # strokes are whole unless something else is said


def test_sweep_of_an_experiment_of_ones_own(tmp_path, capsys):
    write_json(tmp_path / "sweep.json", dict(experiment="mine", runs={"lr 0.1": dict(folder="a"), "lr 0.2": dict(folder="b")}))
    write_json(tmp_path / "a" / "metrics.json", dict(rows=[dict(method="mine", seed=0, miou=33.), dict(miou=11.)], conditions=dict(lr=.1)))
    assert spml_tables([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "lr 0.1" in said and "33.0" in said and "11.0" not in said # the folder has numbers in its name


def test_command(tmp_path, capsys):
    run(tmp_path, "a", 40., length=1.0)
    run(tmp_path, "b", 50., length=.3)
    assert spml_tables([str(tmp_path), "--out", str(tmp_path / "csv")]) == 0
    said = capsys.readouterr().out
    assert "table7, scenes" in said and "'30 %' is above '100 %' here, and below in the paper." in said and "4 images of scenes" in said
    assert "cell,paper,ours" in next(p for p in (tmp_path / "csv").glob("table7_scenes_*.csv")).read_text()
    assert spml_tables([str(tmp_path), "--table", "table77"]) == 2 and "did you mean 'table7" in capsys.readouterr().err
    assert spml_tables([str(tmp_path / "csv")]) == 2


def test_command_is_brief_on_what_a_table_does_not_vary(tmp_path, capsys):
    for i, weight in enumerate((0., .1, .3)): run(tmp_path, f"{i}", 40. + i, relations={"similarity": {"weight": weight}})
    assert spml_tables([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "table6a, scenes: Weight" in said and "similarity 0;" in said and said.count("table7") == 2 # the line, and how to see more
    assert spml_tables([str(tmp_path), "--table", "table7", "--out", str(tmp_path / "csv")]) == 0
    assert capsys.readouterr().out.count("\ntable7, scenes (similarity") == 3 and len(list((tmp_path / "csv").glob("*.csv"))) == 3


def test_published_travels_with_the_experiments():
    assert (find_notebook("single").parent / "published.yaml").exists()


def test_seconds_come_from_the_file_beside(tmp_path):
    run = tmp_path/"run"
    run.mkdir()
    conditions = dict(n_train=4, size=64, steps=10, recipe=dict(relations={}))
    (run/"metrics.json").write_text(json.dumps(dict(rows=[dict(method=m, data="scenes", annotation="points", seed=0, miou=50.) for m in ("a", "b")], conditions=conditions)))
    assert run_seconds(run/"metrics.json") == {} and "seconds" not in collect_runs(run)
    (run/"seconds.json").write_text(json.dumps(dict(a=12.5)))
    rows = collect_runs(run).set_index("method")
    assert rows.seconds["a"] == 12.5 and np.isnan(rows.seconds["b"])
    (run/"seconds.json").write_text(json.dumps(dict(a="long")))
    with pytest.raises(SpmlError, match="seconds.json: seconds is"): collect_runs(run)

"""The paper's tables beside our runs: what belongs to a cell, spread over seeds, order, faults, the command line."""
import json
from pathlib import Path

import numpy as np
import pytest

from spml_kit.core import VOC_CLASSES, SpmlError
from spml_kit.files import write_json
from spml_kit.runs.experiment import find_notebook
from spml_kit.data.scenes import PART_CLASSES
from spml_kit.runs.tables import table_with_runs, by_setting, collect_runs, published, reversed_pairs
from spml_kit.runs.captions import captioned_table, tables_by_setting
from spml_kit.runs.cli import spml_tables

RESULTS = Path(__file__).parents[2] / "results"


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


def test_full_masks_are_the_papers_own_embedding(tmp_path):
    run(tmp_path, "a", 60.)
    for method, miou in (("full_masks", 80.), ("full_masks_crf", 81.), ("spml_head", 70.), ("spml_head_crf", 71.)): run(tmp_path, method, miou, annotation="full", method=method)
    runs = collect_runs(tmp_path)
    assert {name: captioned_table(name, runs)[0].ours["full masks"] for name in ("table3", "table7", "table7crf", "table9")} == {"table3": 70., "table7": 70., "table7crf": 71., "table9": 71.}
    assert captioned_table("table7crf", runs)[0].ours.dropna().index.tolist() == ["full masks"] # nothing of ours beside the rows of others


@pytest.mark.parametrize("network, embed, words", [
    ("EmbedNet", {}, "EfficientNet-Lite0 from ImageNet weights"), ("EmbedNet", {"backbone": "resnet18", "pretrained": False}, "resnet18 from random weights"),
    ("paper_deeplab", {}, "ResNet-101 with dilated convolutions from random weights"), ("paper_pspnet", {"weights": "/data/r101.pth"}, "ResNet-101 with pyramid pooling from weights of r101.pth"),
    ("paper_pspnet", {"pretrained": True}, "ResNet-101 with pyramid pooling from ImageNet weights"), ("paper_deeplab", None, "ResNet-101 with dilated convolutions, 6 steps"), ("mine", None, "mine, 6 steps"),
    ("FrozenNet", {"backbone": "vit_small_patch14_dinov2", "weights": "/data/dinov2.pth"}, "vit_small_patch14_dinov2 from weights of dinov2.pth, frozen")])
def test_caption_names_the_network_and_its_start(tmp_path, network, embed, words):
    run(tmp_path, "a", 60., recipe=dict(network=network, relations={}) | ({} if embed is None else dict(embed=embed)))
    paper, ours = captioned_table("table7", collect_runs(tmp_path))[1].split("Ours: ")
    assert words in ours and "ResNet-101 with dilated convolutions from ImageNet weights, HED contours" in paper


@pytest.mark.parametrize("folder, words", [({}, "classes, 64 pixels, EfficientNet-Lite0, 6 steps, scribbles"), ({"region_folder": ""}, "Lite0, gradient contours without training, 6 steps,"),
    ({"region_folder": "/data/hed_voc"}, "Lite0, contours of the folder hed_voc, 6 steps,")])
def test_caption_names_the_contours(tmp_path, folder, words):
    run(tmp_path, "a", 60., recipe=dict(network="EmbedNet", relations={}, embed=None), **folder)
    assert words in captioned_table("table7", collect_runs(tmp_path))[1]


def test_caption_names_what_the_table_does_not_vary(tmp_path):
    run(tmp_path, "a", 60., relations={"similarity": {"weight": 1.0}}, length=.5)
    caption = {name: captioned_table(name, collect_runs(tmp_path))[1] for name in ("table7", "table6b")}
    assert caption["table7"].endswith("from masks, with similarity 1.") and caption["table6b"].endswith("belongs here yet.")
    run(tmp_path, "a", 60., relations={"similarity": {"weight": .1}, "annotation": {"weight": 2}}, length=.5)
    assert captioned_table("table6b", collect_runs(tmp_path))[1].endswith("from masks, with annotation 2, length 0.5.")
    run(tmp_path, "a", 60.)
    assert captioned_table("table6b", collect_runs(tmp_path))[1].endswith("from masks.") # the paper's weights, whole strokes


def test_caption_notes_what_stands_beside_points(tmp_path):
    run(tmp_path, "a", 60.)
    assert "a dot of every scribble" not in captioned_table("table7", collect_runs(tmp_path))[1]
    run(tmp_path, "b", 50., length=0.)
    assert captioned_table("table7", collect_runs(tmp_path))[1].endswith("and the weights of scribbles.")


def test_caption_says_which_steps_were_left_out(tmp_path):
    run(tmp_path, "a", 40., skip=["walk", "head"])
    run(tmp_path, "b", 50., 1, skip=["walk", "head"])
    assert "from masks, without the pipeline's head and walk." in captioned_table("table7", collect_runs(tmp_path))[1]


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


def test_a_rival_is_given_its_best_weight(tmp_path):
    for weight, mious in ((5., (20., 24.)), (1., (35., 33.))):
        for seed, miou in enumerate(mious): run(tmp_path, f"{weight}_{seed}", miou, seed, "keypoints", "crf_loss", crf_weight=weight)
    for seed, miou in enumerate((30., 30.)):
        run(tmp_path, f"s{seed}", miou, seed, "keypoints", relations={"affinity": {"weight": .5}}, crf_weight=5.) # which SPML has no use for
        run(tmp_path, f"f{seed}", 50., seed, "full", "full_masks")
    (_, _, _, both, caption, reverse), = tables_by_setting("table4", collect_runs(tmp_path))[0]
    assert both.ours["clicks with CRF loss"] == 34. and both.ours["SPML"] == 30. and both.seeds["clicks with CRF loss"] == 2
    assert "clicks with CRF loss: crf_weight 1, the best of 1, 5." in caption and ("SPML", "clicks with CRF loss") in reverse
    assert both.ours["CRF loss, % of full"] == 68. and np.isnan(both.ours["SPML, % of full"]) # there are no full masks by SPML
    assert not any("% of full" in name for pair in reverse for name in pair)


def test_runs_that_failed_are_left_out_and_other_code_is_said(tmp_path):
    for seed, (code, state) in enumerate((("A", "done"), ("B", "done"), ("B", "failed"))):
        run(tmp_path, str(seed), 40. + seed, seed)
        folder = tmp_path / str(seed)
        write_json(folder / "environment.json", dict(code=code))
        write_json(folder / "status.json", dict(state=state))
    both, caption, _ = captioned_table("table7", collect_runs(tmp_path))
    assert both.seeds["100 %"] == 2 and "made by 2 versions of the code" in caption
    assert "versions" not in captioned_table("table7", collect_runs(tmp_path / "0"))[1]


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


def test_runs_of_the_repository_make_the_tables_they_were_run_for():
    scenes, parts = collect_runs(RESULTS / "table6_scenes"), collect_runs(RESULTS / "table10_parts")
    seeds = {name: captioned_table(name, scenes)[0].seeds.tolist() for name in ("table6a", "table6b", "table6c")}
    assert seeds == {"table6a": [3, 3, 3, 3], "table6b": [3, 3, 3, 3], "table6c": [3, 3, 3, 3]}
    assert tables_by_setting("table7", scenes)[0] == [] and [set(s[3].seeds) for s in tables_by_setting("table7", scenes, every=True)[0]] == [{0, 3}]*9
    every = collect_runs(RESULTS / "table2_scenes", RESULTS / "table7_scenes") # scribbles of full length are in both
    assert [tables_by_setting("table7", every)[0][0][3].seeds.tolist(), tables_by_setting("table2", every)[0][0][3].seeds.tolist()] == [[3]*6, [3]*4]
    with_rival = collect_runs(RESULTS / "table2_scenes", RESULTS / "table3_scenes")
    assert [s[3].seeds.tolist() for s in tables_by_setting("table3", with_rival)[0]] == [[3]*12]
    assert tables_by_setting("table8", every)[0] == [] # drawn things are not those of VOC
    shown, _ = tables_by_setting("table4", parts)
    assert [s[3].seeds.tolist() for s in shown] == [[3]*6] # full masks need weights of their own to be like clicks


def test_full_masks_alone_are_shown_where_they_are_asked_for(tmp_path):
    run(tmp_path, "a", 60., annotation="full")
    assert tables_by_setting("table7", collect_runs(tmp_path)) == ([], [])
    assert [title for title, *_ in tables_by_setting("table7", collect_runs(tmp_path), every=True)[0]] == ["table7, scenes"]
    run(tmp_path, "masks", 70., annotation="full", method="full_masks")
    run(tmp_path, "b", 50.)
    assert [title for title, *_ in tables_by_setting("table7", collect_runs(tmp_path))[0]] == ["table7, scenes"]
    assert [both.ours["full masks"] for *_, both, _, _ in tables_by_setting("table4", collect_runs(tmp_path))[0]] == [] # a click is what it is about


def test_seeds(tmp_path):
    for seed, miou in enumerate((50., 52., 57.)): run(tmp_path, f"s{seed}", miou, seed)
    row = table_with_runs(published()["table7"], collect_runs(tmp_path)).loc["100 %"]
    assert row.ours == 53 and row.seeds == 3 and abs(row.sd - 13**.5) < 1e-9 and 50 <= row.low < 53 < row.high <= 57


def test_a_seed_counts_once(tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("copy", 1)): run(tmp_path, name, 50., seed)
    assert captioned_table("table7", collect_runs(tmp_path))[0].seeds["100 %"] == 2
    run(tmp_path, "copy", 51., 1)
    with pytest.raises(SpmlError, match=r"'100 %': seed 1 is in .*b/metrics.json and in .*copy/metrics.json, with another score.*Leave one"): captioned_table("table7", collect_runs(tmp_path))
    assert captioned_table("table7", collect_runs(tmp_path / "a", tmp_path / "copy"))[0].seeds["100 %"] == 2
    assert len(collect_runs(tmp_path / "a", tmp_path / "b", tmp_path / "a", tmp_path / "b" / "metrics.json")) == 2


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
    assert spml_tables([str(tmp_path)]) == 2 and "no metrics.json of a run there that has method" in capsys.readouterr().err
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


def test_runs_without_classes_are_left_out_of_tables_of_classes(tmp_path):
    run(tmp_path, "a", 40.)
    run(tmp_path, "b", 50., 1)
    said = json.loads((tmp_path / "a/metrics.json").read_text())
    said["rows"][0]["per_class"] = {"cat": 33.}
    write_json(tmp_path / "a/metrics.json", said)
    assert captioned_table("table8", collect_runs(tmp_path))[0].ours.dropna().to_dict() == {"cat": 33.}


def test_command(tmp_path, capsys):
    run(tmp_path, "a", 40., length=1.0)
    run(tmp_path, "b", 50., length=.3)
    assert spml_tables([str(tmp_path), "--out", str(tmp_path / "csv")]) == 0
    said = capsys.readouterr().out
    assert "table7, scenes" in said and "the paper has '100 %' above '30 %'" in said and "4 images of scenes" in said
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

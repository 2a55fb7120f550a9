"""What stands above and below a table: settings in words, notes, seeds, the best weight of a rival."""
import json
from pathlib import Path

import numpy as np
import pytest

from spml_kit.core import SpmlError
from spml_kit.files import write_json
from spml_kit.runs.captions import METHODS, captioned_table, method_words, order_in_words, tables_by_setting
from spml_kit.runs.tables import collect_runs
from test_tables import run

RESULTS = Path(__file__).parents[2] / "results"


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
    ({"region_folder": "/data/hed_voc"}, "Lite0, contours of the folder hed_voc, 6 steps,"),
    ({"region_folder": "", "contours": "merging"}, "Lite0, regions by merging, 6 steps,")])
def test_caption_names_the_contours(tmp_path, folder, words):
    run(tmp_path, "a", 60., recipe=dict(network="EmbedNet", relations={}, embed=None), **folder)
    assert words in captioned_table("table7", collect_runs(tmp_path))[1]


@pytest.mark.parametrize("sees, words", [("features", ", second heads on the backbone's features"), ("embedding", ""), (None, "")])
def test_caption_names_what_second_heads_see(tmp_path, sees, words):
    run(tmp_path, "a", 60., **({} if sees is None else dict(head_sees=sees)))
    caption = captioned_table("table7", collect_runs(tmp_path))[1]
    assert ("second heads" in caption) == bool(words) and words in caption


@pytest.mark.parametrize("head", ["ocr", "softmax"])
def test_caption_names_another_head(tmp_path, head):
    run(tmp_path, "a", 60., **({} if head == "softmax" else dict(head=head)))
    assert (", heads: ocr" in captioned_table("table7", collect_runs(tmp_path))[1]) == (head == "ocr")


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


def test_a_seed_counts_once(tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("copy", 1)): run(tmp_path, name, 50., seed)
    assert captioned_table("table7", collect_runs(tmp_path))[0].seeds["100 %"] == 2
    run(tmp_path, "copy", 51., 1)
    with pytest.raises(SpmlError, match=r"'100 %': seed 1 is in .*b/metrics.json and in .*copy/metrics.json, with another score.*leave one"): captioned_table("table7", collect_runs(tmp_path))
    assert captioned_table("table7", collect_runs(tmp_path / "a", tmp_path / "copy"))[0].seeds["100 %"] == 2
    assert len(collect_runs(tmp_path / "a", tmp_path / "b", tmp_path / "a", tmp_path / "b" / "metrics.json")) == 2


def test_runs_without_classes_are_left_out_of_tables_of_classes(tmp_path):
    run(tmp_path, "a", 40.)
    run(tmp_path, "b", 50., 1)
    said = json.loads((tmp_path / "a/metrics.json").read_text())
    said["rows"][0]["per_class"] = {"cat": 33.}
    write_json(tmp_path / "a/metrics.json", said)
    assert captioned_table("table8", collect_runs(tmp_path))[0].ours.dropna().to_dict() == {"cat": 33.}


def test_methods_are_told_apart_in_words():
    every = [f"{m}{crf}" for m in METHODS for crf in ("", "_crf")]
    assert len({*map(method_words, every)}) == len(every) and not any("_" in method_words(m) for m in every)
    assert method_words("mine") == "mine"


@pytest.mark.parametrize("pairs, words", [
    ([], "No pair of cells has another order than in the paper."), ([("a", "b")], "'b' is above 'a' here, and below in the paper."),
    ([("a", "b"), ("c", "d"), ("e", "b"), ("f", "b")], "'b' is above 'a', 'e' and 'f' here, and below in the paper. 'd' is above 'c' here, and below in the paper.")])
def test_another_order_is_said_once_per_cell(pairs, words): assert order_in_words(pairs) == words

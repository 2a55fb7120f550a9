"Thirteen systems: their facts, their rows among those of all runs, gains over baselines, pictures that runs kept"
import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spml_kit.core import SpmlError
from spml_kit.data.half_labelled import ANNOTATION_SECONDS
from spml_kit.runs.experiment import find_notebook
from spml_kit.runs.landscape import all_rows, kept_predictions, landscape_figure, system_scores, systems, systems_table

NBS = find_notebook("single").parents[1]


def write(folder, rows, **conditions):
    folder.mkdir(parents=True)
    (folder/"metrics.json").write_text(json.dumps(dict(rows=rows, conditions=conditions)))


def row(**more): return dict(method="spml_head", data="scenes", annotation="tags", seed=0, miou=50.) | more


def test_every_system_has_a_page_and_plain_facts():
    assert len(systems()) == 13 and systems_table().map(len).to_numpy().min() > 3
    for name, said in systems().items():
        assert (NBS/f"{said['page']}.ipynb").is_file(), name
        assert {*said} - {"found"} == {"page", "reads", "learns", "gives", "assumes", "take"}
        for way in said.get("found", []): assert {*way} == {"measure", "where", "against", "baseline"} and "method" in way["where"], name


def test_a_system_is_compared_within_its_sweep_and_seed(tmp_path):
    for s in (0, 1, 2):
        write(tmp_path/"a"/f"cam{s}", [row(seed=s, miou=40. + 10*s)])
        write(tmp_path/"a"/f"drs{s}", [row(seed=s, miou=[43., 52., 64.][s], seconds=120.)], cam="drs")
    write(tmp_path/"b"/"drs", [row(miou=99.)], cam="drs") # no baseline in this sweep
    found = system_scores(all_rows(tmp_path))
    assert [*found.system] == ["DRS"] and [*found.sweep] == ["a"]
    drs = found.iloc[0]
    assert (drs.gain, drs.seeds, drs.score, drs.minutes_core) == (pytest.approx(3), 3, pytest.approx(53), 2.)
    assert drs.low < 3 < drs.high and drs.seconds_each == ANNOTATION_SECONDS["tags"]


def test_shares_of_masks_are_kept_apart_and_cost_their_share(tmp_path):
    for masks in (.1, .5):
        write(tmp_path/"semi"/f"{masks}", [row(method=m, annotation="half", masks=masks, miou=v, minutes=masks*200*239.7/60) for m, v in (("supervised", 20.), ("spml", 20. + 10*masks))], n_train=200)
    found = system_scores(all_rows(tmp_path)).sort_values("masks")
    assert [*found.gain] == [pytest.approx(1), pytest.approx(5)]
    assert [*found.seconds_each] == [pytest.approx(23.97), pytest.approx(119.85)]


@settings(deadline=None, max_examples=10)
@given(st.permutations(range(3)), st.sampled_from(["drs", "mcis", "prm", "group_wsss"]))
def test_order_of_rows_does_not_matter(order, cam):
    rows = pd.DataFrame([row(sweep="a", file=f"{c}{s}", seed=s, cam=c, miou=50. + s + (c == cam), seconds_each=20.) for s in range(3) for c in ("cam", cam)])
    one, other = (system_scores(r).drop(columns="files") for r in (rows, pd.concat([rows[rows.seed == s] for s in order], ignore_index=True)))
    pd.testing.assert_frame_equal(one, other)
    assert one.gain.iloc[-1] == pytest.approx(1)


def test_other_measures_and_other_files(tmp_path):
    (tmp_path/"regions").mkdir()
    (tmp_path/"regions"/"bsds.json").write_text(json.dumps(dict(rows=[dict(method="merging", covering_ods=.6), dict(method="slic", covering_ods=.5)], conditions=dict(data="bsds"))))
    (tmp_path/"regions"/"other.json").write_text("[1, 2]")
    (tmp_path/"regions"/"broken.json").write_text("{")
    found = system_scores(all_rows(tmp_path))
    assert [*found.system] == ["Region merging"] and found.gain.iloc[0] == pytest.approx(.1)


def test_data_of_one_folder_are_kept_apart(tmp_path):
    (tmp_path/"retrieval").mkdir()
    for data, gain in (("scenes", 3.), ("voc", 1.)):
        rows = [dict(method=m, data=data, annotation="none", seed=s, retrieval_map=v + s) for s in range(3) for m, v in (("variance", 40. + gain), ("sum", 40.))]
        (tmp_path/"retrieval"/f"{data}.json").write_text(json.dumps(dict(rows=rows, conditions={})))
    found = system_scores(all_rows(tmp_path)).set_index("data")
    assert dict(found.gain) == dict(scenes=pytest.approx(3), voc=pytest.approx(1)) and {*found.seeds} == {3}


def test_old_scores_of_a_restarted_run_do_not_count(tmp_path):
    write(tmp_path/"a"/"run", [row(miou=50.)])
    write(tmp_path/"a"/"run"/"previous", [row(miou=10.)])
    assert [*all_rows(tmp_path).miou] == [50.]


def test_faults(tmp_path):
    with pytest.raises(SpmlError, match="no metrics.json of a run"): all_rows(tmp_path)
    write(tmp_path/"a"/"run", [row()])
    with pytest.raises(SpmlError, match="no run of a system beside its baseline"): system_scores(all_rows(tmp_path))
    (tmp_path/"a"/"run"/"metrics.json").write_text("{")
    with pytest.raises(SpmlError, match="metrics.json"): all_rows(tmp_path)


def test_figure_and_pictures(tmp_path):
    for cam in ("cam", "drs"): write(tmp_path/"a"/cam, [row()], cam=cam, background="geodesic")
    maps = tmp_path/"a"/"drs"/"predictions"/"spml_head"
    maps.mkdir(parents=True)
    for name in ("x", "y"): (maps/f"{name}.png").write_bytes(b"")
    scores = system_scores(all_rows(tmp_path))
    assert kept_predictions(scores, "scenes", ["x", "y"]) == {"DRS, tags": [maps/"x.png", maps/"y.png"]}
    assert kept_predictions(scores, "scenes", ["x", "z"]) == {} and kept_predictions(scores, "voc", ["x"]) == {}
    assert [ax.get_title() for ax in landscape_figure(scores).axes] == ["scenes"]
    assert [t.get_text() for t in landscape_figure(scores.assign(masks=.1)).axes[0].get_yticklabels()] == ["DRS, 10 % masks\nover SPML from CAM"]
    with pytest.raises(SpmlError, match="no system has a score"): landscape_figure(scores, "covering_ods")

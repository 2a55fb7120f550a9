"An experiment in several processes: what each executes, how a process ends, what is refused, and the history of one process."
import json
import os
import time
from functools import partial

import pytest

from spml_kit.core import SpmlError
from spml_kit.runs import processes
from spml_kit.runs.cli import spml_run
from spml_kit.runs.experiment import check_joint, find_notebook, joint_cells, run_notebook
from spml_kit.runs.processes import ProcessDied, check_processes, other_processes


def test_one_process_starts_no_other(tmp_path):
    before = dict(os.environ)
    with other_processes(1, ["1/0"], tmp_path): assert dict(os.environ) == before
    assert not [*tmp_path.iterdir()]


def test_the_others_know_their_place_and_are_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RANK", "7")
    look = "import os, time; print(*(os.environ[k] for k in ('RANK', 'WORLD_SIZE', 'OMP_NUM_THREADS')))"
    with other_processes(3, [look, "time.sleep(300)"], tmp_path):
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "3")
        until = time.monotonic() + 60
        said = lambda: [(tmp_path/f"log_{k}.txt").read_text().split() for k in (1, 2)]
        while not all(said()) and time.monotonic() < until: time.sleep(.1)
        assert said() == [[str(k), "3", str(max(1, os.cpu_count()//3))] for k in (1, 2)]
    assert os.environ["RANK"] == "7" and "WORLD_SIZE" not in os.environ


def test_the_first_does_not_wait_for_a_process_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_watch", partial(processes._watch, grace=.1))
    with pytest.raises(ProcessDied, match="process 1 of 2 failed; its output is in .*log_1.txt"):
        with other_processes(2, ["print('here')", "1/0"], tmp_path): time.sleep(60)
    assert "ZeroDivisionError" in (tmp_path/"log_1.txt").read_text()


def test_the_cells_hold_the_parameters_where_papermill_puts_them():
    cells = joint_cells(find_notebook("single"), dict(seed=3, methods=["spml"], out="it's"))
    at = cells.index("# Parameters\nseed = 3\nmethods = ['spml']\nout = \"it's\"")
    assert "seed: int = 0" in cells[at - 1] and "check_given" in cells[at + 1]


@pytest.mark.parametrize("name", ["regions", "comparison"])
def test_experiments_that_do_not_join_are_refused(name, tmp_path):
    with pytest.raises(SpmlError, match=f"{name} runs in one process; 2 need an experiment that calls join_processes"):
        run_notebook(name, tmp_path/"run", {}, processes=2)
    assert not (tmp_path/"run").exists()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SpmlError, match="2 processes need a GPU each, and this machine has 1; --device cpu"): check_joint(find_notebook("single"), 2)
    for fine in (dict(n=2, device="cpu"), dict(n=1)): check_processes(**fine)


@pytest.mark.parametrize("words", [["0"], ["two"]])
def test_the_option_is_checked(words, capsys):
    with pytest.raises(SystemExit): spml_run(["scribbles", "--processes", *words])
    assert "give a whole number from 1 on" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("words", [["scribbles", "-p", "methods", "['cross_entropy', 'spml', 'control']"], ["tags", "-p", "frozen", "True"]])
def test_two_processes_give_the_history_of_one(words, tmp_path):
    for n in 1, 2: assert spml_run([*words, "--profile", "tiny", "--out", str(tmp_path/str(n)), "--processes", str(n)]) == 0
    one, two = (json.loads((tmp_path/n/"metrics.json").read_text()) for n in "12")
    assert one["history"].keys() == two["history"].keys()
    for name, rounds in one["history"].items():
        for want, row in zip(rounds, two["history"][name], strict=True):
            assert row.pop("miou", 0) == pytest.approx(want.pop("miou", 0), abs=.01), name # in percent: pixels whose two best classes are level
            assert row == pytest.approx(want, rel=1e-4), name
    assert [r["miou"] for r in two["rows"]] == pytest.approx([r["miou"] for r in one["rows"]], abs=.5)


@pytest.mark.long
def test_a_batch_that_cannot_be_shared_is_refused_in_one_line(tmp_path, capsys):
    assert spml_run(["scribbles", "--profile", "tiny", "--out", str(tmp_path/"run"), "--processes", "3"]) == 2
    assert "cannot be shared by 3 processes" in capsys.readouterr().err

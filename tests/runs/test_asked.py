"What is asked of a run: `--list` beside profiles, `--dry` that writes nothing, files in place of options, refusals."
import os
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from spml_kit.core import merged
from spml_kit.files import write_json
from spml_kit.runs import cli
from spml_kit.runs.asked import dry_lines, folder_lines, layered, training_steps
from spml_kit.runs.cli import spml_run
from spml_kit.runs.experiment import experiments, find_notebook, notebook_parameters, profile_parameters

VALUES = st.dictionaries(st.sampled_from("abc"), st.one_of(st.integers(0, 3), st.dictionaries(st.sampled_from("xy"), st.integers(0, 3))))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *words):
    rc = spml_run([*map(str, words)])
    said = capsys.readouterr()
    return rc, said.out, said.err


# --list

def test_list_of_one_experiment_shows_what_a_profile_says_beside_the_defaults(capsys):
    rc, out, _ = run(capsys, "--list", "single", "--profile", "voc")
    lines = out.splitlines()
    known, said = notebook_parameters(find_notebook("single")), profile_parameters("voc", find_notebook("single"))
    assert rc == 0 and lines[0].split() == ["single", "profile", "voc"] and len(lines) == 1 + len(known)
    for line, (k, (default, comment)) in zip(lines[1:], known.items(), strict=True):
        own = f"{k} = {default!r}"
        assert line.strip().startswith(own) and line.endswith(comment)
        assert line.strip()[len(own):len(line.strip()) - len(comment)].strip() == (repr(said[k]) if k in said else "")


def test_list_merges_profiles_and_takes_an_annotation_for_its_experiment(capsys):
    _, two, _ = run(capsys, "tags", "--list", "--profile", "paper_voc", "--profile", "dry")
    both = merged(profile_parameters("paper_voc", find_notebook("single")), profile_parameters("dry", find_notebook("single")))
    line = next(l for l in two.splitlines() if l.strip().startswith("n_train = "))
    assert line.split()[3] == repr(both["n_train"]) == "2" and "profile paper_voc, dry" in two.splitlines()[0]


def test_list_of_a_profile_alone_shows_the_experiments_it_speaks_of(capsys):
    _, out, _ = run(capsys, "--list", "--profile", "bsds")
    assert [l.split()[0] for l in out.splitlines() if not l.startswith(" ")] == ["regions"]
    _, every, _ = run(capsys, "--list")
    assert [l for l in every.splitlines() if not l.startswith(" ")] == list(experiments())


@pytest.mark.parametrize("words,message", [
    (["--list", "singel"], "did you mean 'single'"), (["--list", "--profile", "vco"], "no profile 'vco'; did you mean 'voc'?"),
    (["--list", "seeds", "--profile", "clothes"], "profile 'clothes' has no seeds")])
def test_list_refuses(words, message, capsys):
    rc, _, err = run(capsys, *words)
    assert rc == 2 and message in err


# layers

@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["one", "two", "three"]), VALUES), max_size=4))
def test_values_of_layers_are_merged_and_each_knows_its_last_source(layers):
    given, origins = layered(*layers)
    plain = {}
    for _, values in layers: plain = merged(plain, values)
    assert given == plain and set(origins) == set(plain)
    for k in plain: assert origins[k].split(", ")[-1] == next(where for where, v in reversed(layers) if k in v)


# --dry

def test_dry_shows_what_differs_and_writes_nothing(here, capsys):
    rc, out, err = run(capsys, "scribbles", "--dry", "-p", "length", "0.5", "-p", "seed", "0")
    assert (rc, err, os.listdir()) == (0, "", [])
    said = {l.split("=")[0].replace("parameters", "").strip(): l for l in out.splitlines() if " = " in l}
    profile = profile_parameters("scenes", find_notebook("single"))
    assert set(said) == {"length", *profile} # seed is what it is anyway
    assert "-p; the notebook has 1.0" in said["length"] and "profile scenes; the notebook has 12" in said["n_train"]
    assert "embedding: 300 steps of 8 images, 2,400 image visits" in out and "head: 120 steps" in out and "not known before steps are timed" in out
    assert "runs/scribbles-" in out and "new" in out


def test_the_folder_that_dry_names_is_that_of_the_run(here, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(cli, "run_notebook", lambda name, out, *args, **kwargs: made.append((name, out)) or out / "single.ipynb")
    words = "points", "-p", "n_train", "20"
    _, out, _ = run(capsys, *words, "--dry")
    assert not made
    run(capsys, *words)
    assert made[0][0] == "single" and f"runs/{made[0][1].name}\n" in out


@pytest.mark.parametrize("words,message", [
    (["scribbles", "-p", "lenght", "1"], "did you mean 'length'"), (["scribbles", "--data", "voc"], "--data voc needs --root"), ([], "name an experiment"),
    (["scribbles", "--out", "mine"], "no record that the kit made this folder"), (["scribbles", "-p", "length", "2"], "length=2")])
def test_dry_refuses_what_the_run_refuses(words, message, here, capsys):
    (here / "mine").mkdir()
    (here / "mine" / "letter.txt").write_text("mine")
    rc, _, err = run(capsys, *words, "--dry")
    assert rc == 2 and message in err


@pytest.mark.parametrize("was,code,want,same", [
    (None, "a", "new", False), (dict(seed=1), "a", "holds an unfinished run of these parameters, which is resumed", True), (dict(seed=1), "b", "another version of the code", True),
    (dict(seed=2), "a", "seed was 2", False), ({}, "a", "seed was 'its default'", False)])
def test_what_lies_in_the_folder(was, code, want, same, tmp_path):
    if was is not None: write_json(tmp_path / "environment.json", dict(spml_kit="0", experiment="single", parameters={**was, "out": "x"}, code=code))
    lines, alike = folder_lines(tmp_path, find_notebook("single"), dict(seed=1), "a")
    assert want in "; ".join(lines) and alike is same


def test_a_measured_time_is_told_and_only_of_the_same_run(tmp_path):
    source = find_notebook("single")
    write_json(tmp_path / "environment.json", dict(spml_kit="0", experiment="single", parameters=dict(seed=1), code="a"))
    (tmp_path / "log.txt").write_text("embedding      a step takes 0.52 s: about 3 minutes for 300 steps of training\n")
    (tmp_path / "spml" / "head").mkdir(parents=True)
    (tmp_path / "spml" / "head" / "checkpoint.safetensors").touch()
    lines = "\n".join(dry_lines("single", source, dict(seed=1), {}, tmp_path, "a"))
    assert "a step of embedding took 0.52 s" in lines and "checkpoints of spml/head" in lines
    assert "not known before" in "\n".join(dry_lines("single", source, dict(seed=2), {}, tmp_path, "a"))
    write_json(tmp_path / "metrics.json", {})
    assert "finished run of these parameters" in "\n".join(dry_lines("single", source, dict(seed=1), {}, tmp_path, "a"))


@pytest.mark.parametrize("given,want", [
    (dict(annotation="tags"), dict(classifier=(4, 8), embedding=(6, 8), head=(6, 8), **{"head again": (6, 8)})),
    (dict(annotation="full", methods=["full_masks"]), dict(full_masks=(6, 8))),
    (dict(annotation="clicks", rounds=3, skip=["walk", "head"]), dict(embedding=(9, 8))),
    (dict(methods=["adaptive"], head="ocr"), dict(adaptive=(6, 8))),
    (dict(annotation="boxes", map_folder="maps"), dict(embedding=(6, 8), head=(6, 8))),
    (dict(recipe_changes={"bs": 3}, steps=0), dict(embedding=(None, 3), head=(6, 3)))])
def test_steps_are_those_that_the_pipeline_trains(given, want):
    assert training_steps(find_notebook("single"), given) == want


def test_trainings_are_the_learners_of_the_plan():
    from spml_kit.runs.pipelines import PIPELINES
    for annotation, plan in PIPELINES.items():
        assert [*training_steps(find_notebook("single"), dict(annotation=annotation))] == [s.name for s in plan if s.leaves == "learner"]


# a file

def write(path, **said):
    path.write_text(yaml.safe_dump(said))
    return path


def test_a_file_means_what_the_options_mean(here, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "run_notebook", lambda name, out, parameters, **kwargs: calls.append((name, str(out), parameters)) or here / "x.ipynb")
    write(here / "run.yaml", experiment="scribbles", profile="tiny", parameters=dict(length=.5, recipe_changes=dict(bs=4)), out="runs/half")
    assert run(capsys, "run.yaml")[0] == 0
    assert run(capsys, "scribbles", "--profile", "tiny", "-p", "length", "0.5", "-p", "recipe_changes", "{'bs': 4}", "--out", "runs/half")[0] == 0
    assert calls[0] == calls[1] == ("single", "runs/half", dict(annotation="scribbles", length=.5, recipe_changes=dict(bs=4)))
    assert run(capsys, "run.yaml", "--profile", "scenes", "-p", "length", "0.25", "--out", "elsewhere")[0] == 0
    assert calls[2][1] == "elsewhere" and calls[2][2] == dict(profile_parameters("scenes", find_notebook("single")), annotation="scribbles", length=.25, recipe_changes=dict(bs=4))
    write(here / "two.yml", experiment="single", profile=["paper_voc", "dry"], parameters=dict(data="scenes"))
    assert run(capsys, "two.yml")[0] == 0 and calls[3][2]["recipe_name"] == "paper_voc" and calls[3][2]["n_train"] == 2


def test_a_file_without_a_folder_has_the_address_of_the_same_command(here, capsys):
    write(here / "run.yaml", experiment="scribbles", parameters=dict(length=.5))
    folder = lambda *words: next(l.split()[1] for l in run(capsys, *words, "--dry")[1].splitlines() if l.startswith("folder"))
    assert folder("run.yaml") == folder("scribbles", "-p", "length", "0.5") and "run.yaml; the notebook has 1.0" in run(capsys, "run.yaml", "--dry")[1]


@pytest.mark.parametrize("text,message", [
    ("experiment: single\nprofil: tiny", "unknown entry 'profil'; did you mean 'profile'? (there are: experiment, profile, parameters, out)"),
    ("experiment: single\nparameters: {lenght: 1}", "did you mean 'length'"), ("experiment: singel", "did you mean 'single'"),
    ("experiment: single\ngrid: {seed: [0, 1]}", "has `grid`, so it is a grid of many runs: run it with spml_sweep run.yaml"),
    ("experiment: single\nruns: {a: {}}", "has `runs`, so it is a grid of many runs"), ("profile: tiny", "names no experiment"), ("- 1", "begins with an experiment"),
    ("experiment: 3", "it takes a name"), ("experiment: single\nparameters: 3", "names with their values"), ("a: [", "cannot be read as YAML"), ("", "begins with an experiment"),
    ("experiment: single\nout: s3://bucket/x", "--copy-to copies it there"), ("experiment: single\nprofile: vco", "did you mean 'voc'")])
def test_files_that_are_refused(text, message, here, capsys):
    (here / "run.yaml").write_text(text)
    rc, _, err = run(capsys, "run.yaml")
    assert rc == 2 and message in err and len(err.strip().splitlines()) == 1 and os.listdir() == ["run.yaml"]


def test_a_file_that_is_not_there(here, capsys): assert "run.yaml: no such file" in run(capsys, "run.yaml")[2]


# completion

def completed(script, *words):
    "What bash offers for the last word"
    line = f'{script}\nCOMP_WORDS=({" ".join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}; _{words[0]}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return subprocess.run(["bash", "--norc", "-c", line], capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture
def script(capsys):
    with pytest.raises(SystemExit) as end: spml_run(["--completion", "bash"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes_options_names_and_what_follows_options(script):
    assert completed(script, "spml_run", "--pro") == ["--processes", "--profile"] and completed(script, "spml_run", "scr") == ["scribbles"]
    assert completed(script, "spml_run", "quickstart", "--profile", "paper_v") == ["paper_voc"] and completed(script, "spml_run", "--data", "cl") == ["clothes"]
    assert completed(script, "spml_run", "single", "-p", "n_tr") == ["n_train"] and completed(script, "spml_run", "--completion", "") == ["bash", "zsh"]
    assert completed(script, "spml_run", "--out", "") == [] # files, as bash does by itself
    assert set(experiments()) < set(completed(script, "spml_run", ""))


def test_every_option_is_offered(script, capsys):
    with pytest.raises(SystemExit): spml_run(["--help"])
    told = {o for o in re.findall(r"(?m)^  (-[\w-]+)", capsys.readouterr().out)}
    assert told <= set(script.replace('"', " ").split()) and len(told) > 10


@pytest.mark.parametrize("command", [cli.spml_prepare, cli.spml_import, cli.spml_sweep, cli.spml_tables, cli.spml_annotate])
def test_every_command_has_a_script_in_both_shells(command, capsys):
    for shell in "bash", "zsh":
        with pytest.raises(SystemExit): command(["--completion", shell])
        said = capsys.readouterr().out
        assert f"complete -o default -F _{command.__name__} {command.__name__}" in said and ("bashcompinit" in said) is (shell == "zsh")
    with pytest.raises(SystemExit) as end: command(["--completion", "fish"])
    assert end.value.code == 2

"The experiment on starts for few shots: what it tells, that a second run reads the first one's starts, faults."
import pytest

from spml_kit.core import SpmlError
from spml_kit.files import read_json
from spml_kit.runs.experiment import check_parameters, find_notebook, profile_parameters, run_notebook
from spml_kit.runs.sweep import read_grid

TINY = dict(starts=["random", "views_more"], n_more=10, crop=16, steps=1, episodes=1, query=2, n_episodes=5, n_learn=3, n_score=2, regions=5,
            round_steps=1, head_steps=1)


def test_the_experiment_compares_starts_and_goes_on_where_it_was(tmp_path):
    run_notebook("few_shots", tmp_path, TINY, progress=False)
    said = read_json(tmp_path/"metrics.json")
    rows = {r["method"]: r for r in said["rows"]}
    assert [*rows] == ["colours", "random", "random_episodes", "views_more", "views_more_episodes"] + [f"{s}_{p}" for s in TINY["starts"] for p in ("seeds", "spml", "retrieval")]
    assert all(0 <= r[f"shot_{k}"] <= 100 and r[f"half_{k}"] >= 0 for r in said["rows"] if "miou" not in r for k in (1, 5))
    assert all(0 <= rows[f"{s}_{p}"]["miou"] <= 100 for s in TINY["starts"] for p in ("seeds", "spml", "retrieval"))
    seconds = read_json(tmp_path/"seconds.json")
    assert {*seconds} == {"random", "random_episodes", "views_more", "views_more_episodes"}
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path/"starts").glob("*.safetensors") if "body" not in f.name}
    assert {f.stem for f in stamps} == {*seconds}
    (tmp_path/"starts"/"random_episodes.safetensors").unlink() # as if it had been stopped there
    run_notebook("few_shots", tmp_path, TINY, progress=False)
    again = read_json(tmp_path/"metrics.json")
    assert again == said
    assert all(f.stat().st_mtime_ns == t for f, t in stamps.items() if f.stem != "random_episodes")


def test_profile_and_grid_say_the_full_size():
    given = profile_parameters("scenes", find_notebook("few_shots"))
    assert given["n_episodes"] == 600 and given["n_more"] > given["n_base"]
    name, runs = read_grid("few_shots_scenes")
    assert name == "few_shots" and [r["seed"] for r in runs.values()] == [0, 1, 2]


@pytest.mark.parametrize("given, words", [({"starts": ["view"]}, "did you mean 'views'"), ({"data": "scene"}, "did you mean 'scenes'"), ({"way": 1}, "is not in 2.."), ({"helps": ["tag"]}, "did you mean 'tags'")])
def test_wrong_parameters_are_refused(given, words):
    with pytest.raises(SpmlError, match=words): check_parameters(find_notebook("few_shots"), given)

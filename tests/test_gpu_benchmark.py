"What is prepared for an accelerator goes through on a CPU, in small."
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run"


def test_every_stage_goes_through_and_leaves_its_file(tmp_path):
    done = subprocess.run([RUN, "--dry", "--out", tmp_path], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    said = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    assert set(said) == {"right", "fast", "learn", "together"} and all(s["dry"] and len(s["rows"]) > 2 for s in said.values())
    assert [r for s in said.values() for r in s["rows"] if "failed" in r or r.get("right") is False] == []
    of = lambda stage, key: {r[key] for r in said[stage]["rows"] if key in r}
    assert of("right", "check") >= {"loss", "autocast", "kmeans", "walk", "crf", "crf_loss", "hed", "retrieval", "resumed", "same_seed", "head scores", "retrieval labels", "half step"}
    assert of("right", "kind") == {"annotation", "cooccurrence", "similarity", "table_of_images", "lonely"} and of("right", "form") == {"kernels"}
    assert of("fast", "loss") == {"fused", "chunked", "plain"} and of("fast", "kernel") == of("fast", "tiles") == {"_forward", "_by_pixels", "_by_segments"}
    assert of("fast", "part") == {"kmeans", "walk", "retrieval", "augment", "loader"} and of("fast", "step") == {"small"}
    assert [(r["method"], r["steps"]) for r in said["learn"]["rows"] if "method" in r] == [("cross_entropy", 2), ("spml", 2), ("full_masks", 2)]
    assert of("together", "check") == {"loss", "weights"} and of("together", "processes") == {2}
    tables_of(tmp_path, said)


def tables_of(folder, said):
    "Every row comes into a table; what a dry run wrote is not taken for measured"
    tables = runpy.run_path(str(RUN.with_name("tables.py")))
    assert tables["measured"](folder) == {}
    for name, s in said.items(): (folder / f"{name}.json").write_text(json.dumps(s | dict(dry=False)))
    text = tables["page"](tables["measured"](folder))
    rows = [r for s in said.values() for r in s["rows"] if "probe" not in r]
    curves = 1 + len([r for r in said["learn"]["rows"] if "history" in r]) # a line a round, and here there is one
    assert [line for line in text.splitlines() if line.startswith("### ")] == ["### right", "### fast", "### learn", "### together"]
    assert sum(line.startswith("| ") and not line.startswith("| --- ") for line in text.splitlines()) >= len(rows) + curves


def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run([RUN, "fast", "--out", tmp_path], env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "no GPU here" in done.stderr

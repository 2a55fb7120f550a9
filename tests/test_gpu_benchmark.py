"What is prepared for an accelerator goes through on a CPU, in small."
import json
import os
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run"


def test_every_stage_goes_through_and_leaves_its_file(tmp_path):
    done = subprocess.run([RUN, "--dry", "--out", tmp_path], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    said = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    assert set(said) == {"right", "fast", "learn"} and all(s["dry"] and len(s["rows"]) > 2 for s in said.values())
    assert [r for s in said.values() for r in s["rows"] if "failed" in r or r.get("right") is False] == []
    assert {r["check"] for r in said["right"]["rows"]} >= {"loss", "autocast", "kmeans", "walk", "crf", "crf_loss", "retrieval", "resumed", "same seed", "head scores", "retrieval labels"}
    assert {r["loss"] for r in said["fast"]["rows"] if "loss" in r} == {"fused", "chunked", "plain"}
    assert [r["method"] for r in said["learn"]["rows"]] == ["cross_entropy", "spml", "full_masks"]


def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run([RUN, "fast", "--out", tmp_path], env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "no GPU here" in done.stderr

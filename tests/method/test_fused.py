"""The GPU kernels of the loss against its definition: the tests of the chunked form, in float32, run again with the kernels in Triton's interpreter; compiled ahead for a GPU; on a GPU where there is one."""
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from test_contrast import KINDS, agree, random_problem
from spml_kit.method.contrast import contrast

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
CASES = { # of each file, those that the kernels see as different: without a table the own segment is no negative, a batch is a short memory, near_across another way to a table
    "test_contrast.py": ("test_value_and_gradient and float32 and not near_across and not (True and (same_class or same_region or batch))",
                         "test_concentrations and float32 and (-50-torch or annotation-1-torch)", "test_random_problems and not -3]", "test_groups_of_several_blocks_and_tiles"),
    "test_autocast.py": ("test_contrast and 50 and batch",),
}


def python(*args, **env):
    "A process of its own: the interpreter has to be asked for before Triton is imported"
    return subprocess.run([sys.executable, *args], env={**os.environ, **env}, capture_output=True, text=True)


def test_kernels_agree_with_the_definition():
    which = " or ".join(f"({file} and {one})" for file, cases in CASES.items() for one in cases)
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *(str(HERE/file) for file in CASES), "-k", which, TRITON_INTERPRET="1", SPML_KERNELS_MUST_RUN="1")
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) == 31 + 5 + 30 + 2 + 2


SERVES = """
import json, os, warnings, torch
from spml_kit.method.contrast import contrast
from spml_kit.method.fused import use_fused
import spml_kit.method.fused as fused
x, found = torch.zeros(2, 3), {}
found["on"], found["float64"] = use_fused(x), use_fused(x.double())
os.environ["SPML_FUSED"] = "0"
found["off"] = use_fused(x)
del os.environ["SPML_FUSED"]
for D in (256, 512):
    x = torch.nn.functional.normalize(torch.randn(9, D), dim=1).requires_grad_()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        totals = [contrast(x, x, torch.arange(9), torch.arange(9) // 3, 9.)[0] for _ in range(3)]
        totals[0].backward()
    found[D] = [str(w.message) for w in said]
x = torch.nn.functional.normalize(torch.randn(300, 8), dim=1).requires_grad_()
ids, own = torch.arange(40) // 9, torch.arange(300) % 40
all_, some = (contrast(x, x[:40].detach(), own, ids, 9., anchors=a) for a in (1., .3))
drawn = some[1] != 0
found["drawn"], found["the same"] = int(drawn.sum()), bool(torch.allclose(some[1][drawn], all_[1][drawn]))
found["mean"] = abs(float(some[0] - all_[1][drawn].mean()))
found["others"] = float(torch.autograd.grad(some[0], x)[0][~drawn].abs().max())
print(json.dumps(found))
"""


def test_when_the_kernels_serve():
    "Not in float64, not where they are switched off, not for features that are too wide, which is said once; and a share of the anchors"
    done = python("-c", SERVES, TRITON_INTERPRET="1", SPML_FUSED="")
    found = json.loads(done.stdout or done.stderr)
    assert found["on"] and not found["float64"] and not found["off"]
    for D in "256", "512": assert len(found[D]) == 1 and f"features have {D} columns" in found[D][0]
    assert 60 < found["drawn"] < 120 and found["the same"] and found["mean"] < 1e-5 and found["others"] == 0


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available(), reason="kernels run here")
def test_what_cannot_run_is_said_once(monkeypatch):
    "Kernels that were not made for the interpreter cannot run on a CPU: as on a machine without a compiler"
    from spml_kit.method import fused
    x, mu, own, ids, match, image = random_problem("class", 8)
    want = contrast(x.float(), mu.float(), own, ids, 9.)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("SPML_FUSED", raising=False)
    fused._runs.cache_clear()
    with pytest.warns(UserWarning, match="the loss uses the slower, chunked form on cpu"): found = contrast(x.float(), mu.float(), own, ids, 9.)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = contrast(x.float(), mu.float(), own, ids, 9.)
    for one in (found, again): assert torch.equal(one[0], want[0]) and torch.equal(one[1], want[1])


AHEAD = r"""
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spml_kit.method import fused
INTEGERS = dict(M="i32", D="i32", scale="fp32", shift="fp32")
tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
if not os.path.exists(tool): sys.exit("SKIP this Triton comes without cuobjdump")
def kind(name, table): # of an argument of a kernel
    if name in INTEGERS: return INTEGERS[name]
    if name in ("xh", "xl", "yh", "yl"): return "*fp16"
    if name == "codes": return "*u8" if table else "*i32"
    return "*i32" if name in ("slot", "blocks", "own", "own_at", "used") else "*fp32"
found = {}
for D, table in ((32, True), (64, False), (66, True), (128, False)):
    columns = fused._columns(D)
    for name, options in zip(("_forward", "_by_pixels", "_by_segments"), fused._launch(columns["W"])):
        kernel, fixed = getattr(fused, name), options | columns | dict(TABLE=table, OWN_NEGATIVE=table)
        for_gpu = {k: fixed.pop(k) for k in ("num_warps", "num_stages")}
        names = list(enumerate(kernel.arg_names))
        signature = {n: "constexpr" if n in fixed else kind(n, table) for _, n in names}
        source = ASTSource(fn=kernel, signature=signature, constexprs={(i,): fixed[n] for i, n in names if n in fixed},
                           attrs={(i,): [["tt.divisibility", 16]] for i, n in names if signature[n][0] == "*"})
        try: made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=for_gpu)
        except Exception as e:
            if "ptxas" in str(e) and not found: sys.exit(f"SKIP Triton cannot compile for sm_90 here: {str(e)[:200]}")
            raise
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(made.asm["cubin"])
            f.flush()
            usage = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
            code = subprocess.run([tool, "-sass", f.name], capture_output=True, text=True, check=True).stdout
        number = lambda what: int(re.search(what + r":(\d+)", usage)[1])
        found[f"{name} D={D}{' table' if table else ''}"] = dict(registers=number("REG"), stack=number("STACK"), shared=made.metadata.shared, products=code.count("HGMMA"))
print(json.dumps(found))
"""


def test_compiled_ahead_for_a_gpu(tmp_path):
    "For sm_90: nothing on the stack, on the matrix units, within a multiprocessor's shared memory"
    done = python("-c", AHEAD, TRITON_INTERPRET="", TRITON_CACHE_DIR=str(tmp_path))
    if "SKIP" in done.stderr: pytest.skip(done.stderr.split("SKIP ")[1].strip())
    assert done.returncode == 0, done.stderr[-3000:]
    for name, r in json.loads(done.stdout).items():
        print(name, r)
        assert r["stack"] == 0 and r["registers"] <= 255 and r["products"] > 0 and r["shared"] <= 227*1024, (name, r)


# on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernels run in Triton's interpreter only")


@needs_gpu
@pytest.mark.parametrize("size", [dict(N=1003, M=101), dict(N=20_011, M=1003, images=7)], ids=["small", "large"])
@pytest.mark.parametrize("D, kappa", [(3, 30.), (16, 12.), (32, 12.), (64, 6.), (66, 16.), (96, 60.), (128, 60.), (130, 12.)])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_on_a_gpu(monkeypatch, kind, D, kappa, size):
    monkeypatch.delenv("SPML_FUSED", raising=False)
    monkeypatch.setattr("spml_kit.method.contrast._chunked", lambda *args: pytest.fail("the chunked form ran instead of the kernels"))
    agree(kind, D, kappa, device="cuda", **size)
    if torch.cuda.device_count() > 1: agree(kind, D, kappa, device="cuda:1", **size)


@needs_gpu
@pytest.mark.parametrize("D", [256, 512])
def test_wide_features_on_a_gpu(D):
    with pytest.warns(UserWarning, match="chunked form"): agree("class", D, 12., device="cuda")


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_never_waits(kind):
    x, mu, own, ids, match, image = (None if o is None else o.cuda() for o in random_problem(kind, 64, N=5003, M=403))
    x, mu = (o.float().requires_grad_() for o in (x, mu))
    step = lambda anchors: contrast(x, mu, own, ids, 12., match, image, anchors=anchors)[0].backward()
    step(1.) # compiles
    torch.cuda.set_sync_debug_mode("error")
    try: step(1.), step(.5)
    finally: torch.cuda.set_sync_debug_mode("default")

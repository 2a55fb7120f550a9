"""The GPU kernels of the loss against its definition: the tests of the chunked form, in float32, run again with the kernels in Triton's interpreter; on a GPU where there is one."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CASES = {
    "codes": "test_value_and_gradient and float32 and not float64",
    "concentrations": "test_concentrations and float32 and not float64",
}


def run(case, **env):
    "pytest in a process of its own: the interpreter has to be asked for before Triton is imported"
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(Path(__file__).with_name("test_contrast.py")), "-k", CASES[case]],
                          env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_the_definition(case):
    done = run(case, TRITON_INTERPRET="1", SPML_KERNELS_MUST_RUN="1")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_kernels_can_be_switched_off(monkeypatch):
    from spml_kit.fused import use_fused
    x = torch.zeros(2, 3)
    monkeypatch.delenv("SPML_FUSED", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_fused(x) and not use_fused(x.double())
    monkeypatch.setenv("SPML_FUSED", "0")
    assert not use_fused(x)
    monkeypatch.delenv("SPML_FUSED"), monkeypatch.delenv("TRITON_INTERPRET")
    assert not use_fused(x) # on a CPU the chunked form serves


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernels run in Triton's interpreter only")
@pytest.mark.parametrize("D, M, N", [(16, 100, 1000), (64, 3600, 20_000), (66, 75, 5000)])
def test_kernels_on_a_gpu(D, M, N):
    from spml_kit.contrast import contrast
    g = torch.Generator().manual_seed(0)
    x, mu = (torch.nn.functional.normalize(torch.randn(n, D, generator=g), dim=1).cuda().requires_grad_() for n in (N, M))
    own, ids = torch.randint(M, (N,), generator=g).cuda(), torch.randint(-1, 21, (M,), generator=g).cuda()
    found, want = ([total, *torch.autograd.grad(total, (x, mu))] for total in (contrast(x, mu, own, ids, 12.)[0], contrast(x.double(), mu.double(), own, ids, 12.)[0]))
    for a, b in zip(found, want): torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=2e-5*b.abs().max().item())

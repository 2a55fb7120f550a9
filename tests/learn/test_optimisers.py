"""Steps of whole groups of tensors: fastai's numbers, bit for bit, and the velocity of the reference."""
import copy

import pytest
import torch
from fastai.optimizer import Adam, Optimizer, l2_reg
from hypothesis import given, settings, strategies as st

from spml_kit.learn.optimisers import adamw, paper_sgd


def _velocity(p, lr, mom, velocity=None, **kwargs):
    velocity = lr*p.grad if velocity is None else velocity.mul_(mom).add_(p.grad, alpha=lr)
    p.data.sub_(velocity)
    return {"velocity": velocity}


def one_by_one(params, lr, mom=.9, wd=5e-4): return Optimizer(params, [l2_reg, _velocity], lr=lr, mom=mom, wd=wd)


PAIRS = {"adamw": (adamw, Adam), "sgd": (paper_sgd, one_by_one)}


def tensors(seed, dtype):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in ((3, 2), (4,), (2, 1, 3, 3), (1,), (5,))], g


def steps(make, seed, dtype, n, wd, gaps, spared, begin=None):
    "On random gradients at changing rates; some parameters go without a gradient now and then, some do not decay"
    ps, g = tensors(seed, dtype)
    opt = make([ps[:2], ps[2:]], lr=.1)
    opt.set_hypers(wd=[wd, 0.])
    for p in ps[:1] if spared else []: opt.state[p]["do_wd"] = False
    if begin is not None: begin(opt, ps)
    for k in range(n):
        drawn = [torch.randn(p.shape, generator=g, dtype=dtype) for p in ps]
        opt.set_hypers(lr=[.1/(k + 1), .2/(k + 1)])
        for i, (p, d) in enumerate(zip(ps, drawn)): p.grad = None if gaps and (i + k) % 3 == 0 else d
        opt.step()
        opt.zero_grad()
        assert all(p.grad is None or not p.grad.any() for p in ps)
    return ps, opt


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), double=st.booleans(), n=st.integers(1, 6), wd=st.sampled_from([0., .01, .3]), gaps=st.booleans(), spared=st.booleans())
def test_the_numbers_of_one_tensor_at_a_time(name, seed, double, n, wd, gaps, spared):
    of = [steps(make, seed, torch.float64 if double else torch.float32, n, wd, gaps, spared)[0] for make in PAIRS[name]]
    for a, b in zip(*of): assert torch.equal(a, b)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("first, then", [(0, 1), (1, 0)])
def test_the_state_of_one_goes_on_in_the_other(name, first, then):
    old, opt = steps(PAIRS[name][first], 1, torch.float32, 4, .1, True, False)

    def begin(new, ps):
        new.load_state_dict({"state": copy.deepcopy([opt.state[p] for p in old]), "hypers": new.hypers})
        with torch.no_grad():
            for p, o in zip(ps, old): p.copy_(o)
    other, same = (steps(PAIRS[name][k], 2, torch.float32, 3, .1, True, False, begin)[0] for k in (then, first))
    for a, b in zip(other, same): assert torch.equal(a, b)

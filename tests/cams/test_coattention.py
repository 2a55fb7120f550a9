"Co-attention: against the plain definition, in chunks, with gradients; what it does not depend on; how much memory it takes."
import weakref

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from spml_kit.cams.coattention import FORMS, CoAttention, PairAttention, attend, attend_plain
from spml_kit.core import SpmlError

each_form = pytest.mark.parametrize("form", FORMS)


def by_loops(asks, answers, values, scale):
    "The definition, one place at a time"
    out = torch.zeros(len(asks), values.shape[1], asks.shape[2], dtype=asks.dtype)
    for b in range(len(asks)):
        for p in range(asks.shape[2]):
            affinity = torch.stack([scale*(asks[b, :, p]*answers[b, :, q]).sum() for q in range(answers.shape[2])])
            weights = affinity.exp()/affinity.exp().sum()
            out[b, :, p] = (weights*values[b]).sum(1)
    return out


def network(form="bilinear", dim=6, seed=0, cls=CoAttention, **kwargs):
    torch.manual_seed(seed)
    net = cls(dim, form, **kwargs).double()
    with torch.no_grad():
        for p in net.parameters(): p.normal_()
    return net


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 99), st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 60))
def test_chunks_are_the_plain_definition_and_so_are_their_gradients(seed, B, N, M, largest):
    g = torch.Generator().manual_seed(seed)
    given = [torch.randn(B, d, n, generator=g, dtype=torch.float64) for d, n in ((3, N), (3, M), (4, M))]
    ways = []
    for f in (lambda *a: by_loops(*a, .7), lambda *a: attend_plain(*a, .7), lambda *a: attend(*a, .7, largest)):
        leaves = [x.clone().requires_grad_() for x in given]
        out = f(*leaves)
        out.square().sum().backward()
        ways.append([out.detach(), *(x.grad for x in leaves)])
    for other in ways[1:]:
        for a, b in zip(ways[0], other): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@each_form
@pytest.mark.parametrize("largest", [50, 2**24])
def test_weights_sum_to_one_and_messages_stay_within_the_sender(form, largest):
    net = network(form, largest=largest)
    one, two = torch.randn(2, 6, 4, 5).double(), torch.randn(2, 6, 3, 7).double()
    torch.testing.assert_close(net.weights(one, two).sum((3, 4)), torch.ones(2, 4, 5).double())
    message, sent = net.receive(one, two), two.flatten(2)
    assert message.shape == one.shape
    assert (message.flatten(2) <= sent.amax(2, keepdim=True) + 1e-12).all() and (message.flatten(2) >= sent.amin(2, keepdim=True) - 1e-12).all()
    torch.testing.assert_close(message.flatten(2), torch.einsum("bpq,bdq->bdp", net.weights(one, two).flatten(3).flatten(1, 2), sent))


@each_form
def test_order_of_the_sender_is_nothing_and_that_of_the_receiver_is_kept(form):
    net, one, two = network(form), torch.randn(1, 6, 1, 12).double(), torch.randn(1, 6, 1, 9).double()
    message, p, q = net.receive(one, two), torch.randperm(12), torch.randperm(9)
    torch.testing.assert_close(net.receive(one, two[..., q]), message)
    torch.testing.assert_close(net.receive(one[..., p], two), message[..., p])


@pytest.mark.parametrize("largest", [60, 2**24])
def test_one_matrix_serves_both_images(largest):
    "Rows for the first, columns for the second, as the formula has it; whole or in chunks"
    net = network(cls=PairAttention, largest=largest)
    one, two = torch.randn(2, 6, 4, 5).double().requires_grad_(), torch.randn(2, 6, 3, 3).double().requires_grad_()
    f, g = one.flatten(2), two.flatten(2)
    A = torch.einsum("bdp,de,beq->bpq", f, net.weight, g)*net.scale
    expected = torch.einsum("bpq,bdq->bdp", A.softmax(2), g), torch.einsum("bpq,bdp->bdq", A.softmax(1), f)
    got = net(one, two)
    for a, b in zip(got, expected): torch.testing.assert_close(a.flatten(2), b)
    inputs, target = (one, two, net.weight), [torch.randn_like(o) for o in expected]
    wanted = torch.autograd.grad(sum((o*t).sum() for o, t in zip(expected, target)), inputs)
    have = torch.autograd.grad(sum((o.flatten(2)*t).sum() for o, t in zip(got, target)), inputs)
    for a, b in zip(have, wanted): torch.testing.assert_close(a, b)


def test_images_swapped_and_the_matrix_transposed():
    net, other = network(cls=PairAttention), network(cls=PairAttention)
    with torch.no_grad(): other.weight.copy_(net.weight.T)
    one, two = torch.randn(2, 6, 4, 5).double(), torch.randn(2, 6, 3, 3).double()
    for a, b in zip(net(one, two), other(two, one)[::-1]): torch.testing.assert_close(a, b)


def test_an_image_of_unlike_places_hears_itself():
    own, net = torch.eye(20).view(1, 20, 4, 5), PairAttention(20, scaled=False)
    with torch.no_grad(): net.weight.copy_(50*torch.eye(20))
    for message in net(own, own): torch.testing.assert_close(message, own, rtol=0, atol=1e-4)


class Live(TorchDispatchMode):
    "Most entries that are alive at once in tensors of a size and more"
    def __init__(self, least):
        super().__init__()
        self.least, self.now, self.most, self.seen = least, 0, 0, set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes()//x.element_size() >= self.least:
                storage = x.untyped_storage()
                if storage._cdata in self.seen: continue
                n, key = storage.nbytes()//x.element_size(), storage._cdata
                self.seen.add(key)
                self.now += n
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key, n)
        return out

    def _gone(self, key, n):
        self.seen.discard(key)
        self.now -= n


def entries(net, n):
    one, two = (torch.randn(1, 4, n, n, requires_grad=True) for _ in range(2))
    with Live(8*4*n*n) as live: sum(o.square().sum() for o in net(one, two)).backward()
    return live.most


def test_at_most_four_matrices_live_at_once_and_in_chunks_less_than_one():
    n = 24
    N = n*n
    whole = entries(PairAttention(4), n)
    assert 2*N*N <= whole <= 4*N*N
    assert entries(PairAttention(4, largest=N*N//16), n) < N*N


@each_form
@pytest.mark.parametrize("value", [0., 1e4])
def test_no_number_is_lost(form, value):
    "Flat maps, large ones, and half precision"
    net, x = CoAttention(6, form), torch.full((1, 6, 4, 4), value)
    torch.testing.assert_close(net.receive(x, x), x)
    with torch.autocast("cpu", torch.bfloat16):
        message = net.receive(torch.randn(1, 6, 4, 4).bfloat16(), 30*torch.randn(1, 6, 4, 4).bfloat16())
        both = PairAttention(6)(torch.randn(1, 6, 4, 4).bfloat16(), torch.randn(1, 6, 4, 4).bfloat16())
    assert all(o.isfinite().all() and o.dtype == torch.float32 for o in (message, *both))


def test_an_unknown_form_is_refused():
    with pytest.raises(SpmlError, match="bilinear"): CoAttention(4, "dot")

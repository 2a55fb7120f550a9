"""The dense-CRF loss: against all pairs of pixels, void pixels, what it rewards, a training step."""
import pytest
import torch

from spml_kit.core import SpmlError, VOID
from spml_kit.infer.crf import Kernel, permutohedral
from spml_kit.infer.crf_loss import CrfCrossEntropy, _Disagreement, crf_disagreement


def exact(W): return lambda values: W @ values


def plain(S, W, counts):
    S, total = S*counts, (counts.T @ W @ counts).squeeze()
    return (S*(W @ (counts - S))).sum()/total


@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_by_the_definition(seed):
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(30, 3, generator=g, dtype=torch.float64)
    W = torch.exp(-torch.cdist(f, f)**2/2)
    counts = (torch.rand(30, 1, generator=g) > .2).double()
    S = torch.randn(30, 4, generator=g, dtype=torch.float64).softmax(1).requires_grad_()
    found, want = _Disagreement.apply(S, exact(W), counts), plain(S, W, counts)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(*(torch.autograd.grad(3*o, S)[0] for o in (found, want)))
    assert 0 <= found <= 1


def test_void_pixels_do_not_count():
    g = torch.Generator().manual_seed(0)
    image, prob = torch.rand(1, 3, 12, 12, generator=g), torch.randn(1, 3, 12, 12, generator=g).softmax(1)
    counts = torch.ones(1, 12, 12, dtype=torch.bool)
    counts[:, :, 8:] = False
    other = prob.clone()
    other[..., 8:] = torch.randn(1, 3, 12, 4, generator=g).softmax(1)
    kernel = Kernel(1., 3., 60.)
    a, b = (crf_disagreement(p.requires_grad_(), image, kernel, counts) for p in (prob, other))
    assert a == b > 0
    a.backward()
    assert not prob.grad[..., 8:].any() and prob.grad[..., :8].any()
    assert crf_disagreement(prob, image, kernel, torch.zeros_like(counts)) == 0


def test_a_batch_is_the_mean_of_its_images():
    g = torch.Generator().manual_seed(1)
    images, prob, kernel = torch.rand(3, 3, 24, 24, generator=g), torch.randn(3, 2, 8, 8, generator=g).softmax(1), Kernel(1., 2., 40.)
    each = torch.stack([crf_disagreement(p[None], i[None], kernel) for p, i in zip(prob, images)])
    torch.testing.assert_close(crf_disagreement(prob, images, kernel), each.mean())


def test_images_in_one_lattice_do_not_touch():
    "Exactly what each gives by itself, though colours and sizes of the images differ"
    g = torch.Generator().manual_seed(3)
    images, kernel, values = torch.randint(256, (3, 7, 9, 3), generator=g, dtype=torch.uint8), Kernel(1., 3., 20.), torch.rand(3, 63, 2, generator=g)
    images[1] //= 9
    features = torch.stack([kernel.features(i) for i in images])
    together = permutohedral(features).filter(values.flatten(0, 1)).view_as(values)
    assert torch.equal(together, torch.stack([permutohedral(f).filter(v) for f, v in zip(features, values)]))


def test_loss_adds_the_penalty():
    g = torch.Generator().manual_seed(2)
    images, logits = torch.rand(2, 3, 16, 16, generator=g), torch.randn(2, 3, 8, 8, generator=g).requires_grad_()
    labels = torch.full((2, 16, 16), 254)
    labels[:, 2:5, 2:5], labels[:, :, 14:] = 1, VOID
    found = {}
    for weight in (0., 2.):
        loss = CrfCrossEntropy(weight)
        loss.images = images
        found[weight] = loss((None, logits), labels, None, None)
        parts = loss.means()
    torch.testing.assert_close(found[2.], found[0.] + 2*parts["disagreement"])
    loss.eval()
    torch.testing.assert_close(loss((None, logits), labels, None, None), found[0.])
    with pytest.raises(SpmlError, match="must not be negative"): CrfCrossEntropy(-1)

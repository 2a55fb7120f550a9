"""The memory bank: its state, the order of its batches, no gradient."""
import pytest
import torch

from conftest import assert_equal, random_batch
from spml_kit.method.memory import MemoryBank
from spml_kit.method.segments import make_segments


@pytest.mark.parametrize("size", [0, 1, 3])
def test_bank_survives_its_state(size):
    bank, again = MemoryBank(size), MemoryBank(size)
    for seed in range(5): bank.push(make_segments(*random_batch(seed, n_images=1 + seed % 3), (2, 2), 1).protos)
    again.load_state_dict(bank.state_dict())
    now = make_segments(*random_batch(9), (2, 2), 1).protos
    one, other = (vars(b.candidates(now)) for b in (bank, again))
    assert len(again) == size
    assert_equal(one, other)
    sizes = [1 + seed % 3 for seed in range(5)][5 - size:] # images of the batches in the bank, oldest first
    assert one["tags"].shape[0] == 3 + sum(sizes)
    parts = one["image"].split([len(now), *(len(p) for p in bank.batches)])
    first = [int(p.min()) for p in parts]
    assert first == [0, *(3 + sum(sizes[k + 1:]) for k in range(size))] # counted on from the newest
    for part, batch, start in zip(parts[1:], bank.batches, first[1:]): # and every segment keeps the tags of its image
        assert torch.equal(one["tags"][part], batch.tags[batch.image]) and torch.equal(part - start, batch.image)


def test_bank_keeps_no_gradient_and_no_shared_memory():
    emb, labels, regions, tags = random_batch()
    protos, bank = make_segments(emb.requires_grad_(), labels, regions, tags, (2, 2), 1).protos, MemoryBank(1)
    bank.push(protos)
    kept = bank.batches[0]
    assert not kept.mu.requires_grad and kept.mu.data_ptr() != protos.mu.data_ptr()
    candidates = bank.candidates(protos)
    candidates.mu.sum().backward()
    assert emb.grad.any()

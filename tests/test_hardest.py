"""The search data in the order of the float model's doubt: nothing is lost, and each sample keeps its targets."""

import pytest
import torch

from mpsearch.hardest import hardest_first


def entropies(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize("per_sample", [1, 3])
def test_samples_come_by_falling_doubt_with_their_targets(per_sample):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(22, per_sample, 5, generator=generator) * torch.rand(22, 1, 1, generator=generator) * 9
    y = (x.sum(-1) * 1000).round().long().flatten()
    batches = list(zip(x.split(8), y.split(8 * per_sample), strict=True))
    found = hardest_first(batches, lambda inputs: inputs.flatten(0, 1))
    assert [len(inputs) for inputs, _ in found] == [8, 8, 6]
    inputs, targets = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert torch.equal(targets, (inputs.sum(-1) * 1000).round().long().flatten())
    assert sorted(targets.tolist()) == sorted(y.tolist())
    doubt = entropies(inputs).mean(1)
    assert (doubt.diff() <= 1e-6).all()
    assert doubt[0] > 2 * doubt[-1]


@pytest.mark.parametrize("kind", ["in pairs", "mapping"])
def test_where_samples_cannot_be_told_apart_batches_are_ordered(kind):
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 13)[:, None]

    def forward(inputs):
        if kind == "mapping":
            return inputs["x"]
        return inputs + inputs.mean(0)  # a sample's logits depend on the others of its batch

    batches = [({"x": part} if kind == "mapping" else part, i) for i, part in enumerate(x.split(4))]
    batches = [(inputs, torch.full((4,), i)) for inputs, i in batches]
    found = hardest_first(batches, forward)
    doubt = [entropies(forward(inputs)).mean().item() for inputs, _ in found]
    assert doubt == sorted(doubt, reverse=True)
    assert all(inputs is batches[int(targets[0])][0] for inputs, targets in found)
    assert [int(targets[0]) for _, targets in found] == [0, 1, 2]


def test_logits_that_are_no_numbers_come_last():
    x = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [1.0, 1.0]])
    ((inputs, targets),) = hardest_first([(x, torch.arange(3))], lambda inputs: inputs)
    assert targets.tolist() == [2, 0, 1]
    assert torch.isnan(inputs[2, 0])

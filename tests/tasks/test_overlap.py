"""Whether splits share samples is found by the samples themselves."""

import numpy as np
import pytest
import torch

from mpsearch.errors import InputError
from mpsearch.tasks.base import Task
from mpsearch.tasks.classification import Classification
from mpsearch.tasks.language import Language
from mpsearch.tasks.overlap import overlap


def split(values):
    """Samples [n, 2] that are told apart by their values, label 0."""
    x = torch.tensor(values, dtype=torch.float32)
    return torch.stack([x, x + 0.5], dim=1), torch.zeros(len(x), dtype=torch.int64)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_shared_samples_are_counted_however_they_are_batched(batch_size):
    task = Classification(split(range(7)), split([3, 10, 11]), split([11, 11, 20, 6, 30]), 2, batch_size)
    assert overlap(task) == {
        "samples": {"calibration": 7, "search": 3, "confirm": 5},
        "shared": {"search in the calibration": 1, "confirm in the calibration": 1, "confirm in the search": 2},
    }


def test_a_confirm_split_that_is_all_known_is_refused():
    task = Classification(split(range(7)), split([3, 10, 11]), split([11, 3, 6]), 2)
    with pytest.raises(InputError, match="All 3 samples of the confirm split are in the calibration or the search split"):
        overlap(task)


def test_samples_of_several_tensors_and_of_none():
    class Pairs(Task):
        def __init__(self, of):
            self.of = of

        def batches(self, split):
            return [(self.of(split), torch.zeros(2))]

    def pairs(split):
        n = {"calibration": 0, "search": 1, "confirm": 2}[split]
        return {"a": torch.tensor([7, 8]), "b": torch.tensor([[n], [5]])}  # the first samples differ in b alone

    assert set(overlap(Pairs(pairs))["shared"].values()) == {1}
    assert overlap(Pairs(lambda split: (torch.zeros(2, 3), torch.tensor(1.0)))) is None
    assert overlap(Pairs(lambda split: (torch.zeros(2, 3), torch.zeros(3)))) is None


def test_windows_of_texts_are_samples():
    task = Language([np.arange(30 * i, 30 * i + 30) for i in range(12)], 4, 4, 4, window=10)
    assert overlap(task) == {
        "samples": {"calibration": 4, "search": 4, "confirm": 4},
        "shared": {"search in the calibration": 0, "confirm in the calibration": 0, "confirm in the search": 0},
    }

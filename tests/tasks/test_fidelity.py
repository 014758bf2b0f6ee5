"""Inputs without labels from a file: one or several, passed as the model takes them."""

import numpy as np
import pytest
import torch
from torch import nn

from mpsearch.errors import InputError
from mpsearch.tasks.base import SPLITS
from mpsearch.tasks.fidelity import Fidelity


class Two(nn.Module):
    def forward(self, first, second):
        return first + 10 * second


def saved(folder, **arrays):
    np.savez(folder / "inputs.npz", **arrays)
    return folder / "inputs.npz"


@pytest.mark.parametrize("positional", [False, True])
def test_several_inputs(tmp_path, positional):
    first = np.arange(9, dtype=np.float32)[:, None].repeat(2, 1)
    task = Fidelity(saved(tmp_path, second=first, first=first + 1) if not positional else saved(tmp_path, a=first + 1, b=first),
                    positional=positional, batch_size=2)  # fmt: skip
    n = 0
    for split in SPLITS:
        for inputs, _ in task.batches(split):
            outputs = task.forward(Two(), inputs)
            assert torch.equal((outputs[:, 0] - 1) / 11, (outputs[:, 0] - 1) / 11 // 1), "first = second + 1"
            n += len(outputs)
    assert n == 9
    assert [len(inputs) for inputs, _ in task.batches("search")] in ([2, 1], [2, 2])


def test_maps_are_flattened(tmp_path):
    task = Fidelity(saved(tmp_path, x=np.ones((6, 1, 2, 2), np.float32)), loss="relative_mse", flatten=True)
    assert task.forward(nn.Identity(), task.batches("search")[0][0]).shape == (2, 4)


def test_what_cannot_be_used_is_one_sentence(tmp_path):
    def refused(sentence, path, **options):
        with pytest.raises(InputError, match=sentence):
            Fidelity(path, **options)

    refused("There is no data file", tmp_path / "nowhere.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK")
    refused("is not a whole .npz file", tmp_path / "bad.npz")
    refused(r"same number of samples first; it has a \[2\], b \[3\]", saved(tmp_path, a=np.zeros(2), b=np.zeros(3)))
    refused("it has no array", saved(tmp_path))
    good = saved(tmp_path, x=np.zeros((9, 2), np.float32))
    refused("task.loss must be one of softmax_kl, sigmoid_kl, relative_mse; got 'mse'", good, loss="mse")
    refused("9 samples, 12 were asked for", good, n_confirm=6)

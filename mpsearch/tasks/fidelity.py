"""Inputs without labels from an `.npz` file: the quality is the agreement with the float model."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.tasks.arrays import npz_arrays
from mpsearch.tasks.base import SPLITS, check_batch_size, in_batches
from mpsearch.tasks.classification import draw_splits
from mpsearch.tasks.makers import FidelityTask
from mpsearch.tree import map_tensors

LOSSES = ("softmax_kl", "sigmoid_kl", "relative_mse")


class Fidelity(FidelityTask):
    """Samples of one or several inputs, dealt out to the splits in an order drawn with `seed`; see `fidelity_task`.

    Parameters
    ----------
    path
        An `.npz` file whose arrays have the samples first: one array is the model's input; several are its keyword arguments, or
        its positional ones in the file's order where `positional` is true (as of a model from ONNX).
    loss
        "softmax_kl" (outputs are logits of classes), "sigmoid_kl" (of independent labels) or "relative_mse" (anything else).
    flatten
        Whether all dimensions of an output but the samples are its columns, as of an image or a map.
    n_calibration, n_search, n_confirm
        Samples of each split; `None`: a third.

    Raises
    ------
    InputError
        The file is absent or damaged, its arrays differ in length, or there are too few samples.
    """

    def __init__(
        self,
        path: str | Path,
        loss: str = "softmax_kl",
        flatten: bool = False,
        positional: bool = False,
        n_calibration: int | None = None,
        n_search: int | None = None,
        n_confirm: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        if loss not in LOSSES:
            raise InputError(f"task.loss must be one of {', '.join(LOSSES)}; got '{loss}'.")
        check_batch_size(batch_size)
        source, self.flatten = Path(path).expanduser(), flatten
        arrays = {name: torch.from_numpy(array) for name, array in npz_arrays(source).items()}
        lengths = {name: len(array) if array.dim() else 0 for name, array in arrays.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            listed = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()) or "no array"
            raise InputError(f"{source} must hold arrays with the same number of samples first; it has {listed}.")
        whole: Any = next(iter(arrays.values())) if len(arrays) == 1 else tuple(arrays.values()) if positional else arrays
        sizes = dict(zip(SPLITS, (n_calibration, n_search, n_confirm), strict=True))
        splits = {}
        for split, index in draw_splits(min(lengths.values()), sizes, seed, source.name).items():
            inputs = map_tensors(itemgetter(torch.from_numpy(index)), whole)
            splits[split] = [batch for batch, _ in in_batches(batch_size, inputs, torch.zeros(len(index)))]
        super().__init__(splits, labelled=False, divergence=loss)

    def forward(self, model: nn.Module, inputs: Any) -> Tensor:
        """The outputs `[n, columns]`."""
        outputs = super().forward(model, inputs)
        return outputs.flatten(1) if self.flatten else outputs

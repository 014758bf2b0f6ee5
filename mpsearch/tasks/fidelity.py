"""Inputs without labels from an `.npz` file: the quality is the agreement with the float model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import InputError, one_line
from mpsearch.tasks.base import SPLITS, check_batch_size
from mpsearch.tasks.classification import draw_splits
from mpsearch.tasks.makers import FidelityTask

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
        arrays = _arrays(source)
        n = len(next(iter(arrays.values())))
        sizes = dict(zip(SPLITS, (n_calibration, n_search, n_confirm), strict=True))
        splits = {}
        for split, index in draw_splits(n, sizes, seed, source.name).items():
            parts = (index[begin : begin + batch_size] for begin in range(0, len(index), batch_size))
            splits[split] = [_inputs({name: array[part] for name, array in arrays.items()}, positional) for part in parts]
        super().__init__(splits, labelled=False, divergence=loss)

    def forward(self, model: nn.Module, inputs: Any) -> Tensor:
        """The outputs `[n, columns]`."""
        outputs = super().forward(model, inputs)
        return outputs.flatten(1) if self.flatten else outputs


def _arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of an `.npz` file, by name."""
    if not path.is_file():
        raise InputError(f"There is no file {path}. Set task.path to an .npz file with the model's inputs.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} cannot be read as .npz: {one_line(error)}") from error
    lengths = {name: len(array) if array.dim() else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        listed = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()) or "no array"
        raise InputError(f"{path} must hold arrays with the same number of samples first; it has {listed}.")
    return arrays


def _inputs(arrays: dict[str, Tensor], positional: bool) -> Any:
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    return tuple(arrays.values()) if positional else arrays

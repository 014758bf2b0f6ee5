"""Channel scaling: the factors that the weights of a network are multiplied by, applied and recorded; its outputs stay the same.

An output channel of one layer (or norm) is multiplied by 1/s, and the weights that read it by s: nothing changes but rounding
(Nagel et al. 2019, section 4.1). ReLU and pooling commute with a positive factor; a ReLU6 does where its bound is scaled too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError, check_memory, did_you_mean
from mpsearch.files import file_errors, write_atomically
from mpsearch.files.strict_json import damaged
from mpsearch.files.tensor_file import read_tensors, tensor_file
from mpsearch.layer import from_rows, kind_of, set_values, weight_rows

FILE = "equalization.safetensors"
FORMAT = "mpsearch-equalization"
SIX = 6.0
PARTS = ("outputs", "inputs", "high")  # of what a module is scaled by


class ChannelClip(nn.Module):
    """min(max(x, 0), high): a ReLU6 with a per-channel bound; `high` float16, broadcast over x."""

    high: Tensor

    def __init__(self, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("high", high)

    def forward(self, x: Tensor) -> Tensor:
        """Shaped like x."""
        return torch.minimum(x, self.high.to(x.dtype)).relu_()


@dataclass(frozen=True)
class Equalization:
    """The factors by which an equalizer scaled a network.

    Attributes
    ----------
    equalizer
        Its class name.
    tensors
        `<module>.outputs` float32 `[out]` and `<layer>.inputs` float32 `[in]`: the weight is multiplied by both, the bias by the
        first. `<activation>.high` float16 `[out, ...]`: the upper bound of a ReLU6, instead of 6.
    """

    equalizer: str
    tensors: Mapping[str, Tensor]

    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """Scale the float `model`, batch norms folded, in place and return it; `InputError` where it is another network."""
        factors: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            name, _, part = key.rpartition(".")
            factors.setdefault(name, {})[part] = tensor
        modules = dict(model.named_modules())
        for name, tensors in factors.items():
            if name not in modules:
                raise InputError(f"The model has no module '{name}' to equalize.{did_you_mean(name, modules)}")
            module = modules[name]
            try:
                if "high" in tensors:
                    clip = ChannelClip(tensors["high"].to(next(model.parameters()).device))
                    model.set_submodule(name, clip.train(module.training))
                else:
                    scale(module, tensors.get("outputs"), tensors.get("inputs"))
            except (AttributeError, RuntimeError) as error:
                check_memory(error)
                raise InputError(f"'{name}' is not the module that was equalized ({error}). Give the same network.") from error
        return model

    @property
    def names(self) -> dict[str, list[str]]:
        """The scaled modules by what was scaled: `outputs`, `inputs`, `high`."""
        return {part: [key.removesuffix(f".{part}") for key in self.tensors if key.endswith(f".{part}")] for part in PARTS}

    @property
    def sha256(self) -> str:
        """Hex digest of the file that `save` writes."""
        return hashlib.sha256(self.content).hexdigest()

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        with file_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.content)

    @property
    def content(self) -> bytes:
        """The bytes that `save` writes."""
        return tensor_file(self.tensors, FORMAT, {"equalizer": self.equalizer})


def load_equalization(path: Path) -> Equalization:
    """Read what `Equalization.save` wrote; `InputError` where it is missing or damaged."""
    remedy = "It says how the network's channels were scaled: restore it, or start a new run."
    about, tensors = read_tensors(path, FORMAT, remedy)
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] not in PARTS or not tensor.is_floating_point():
            raise damaged(path, f"'{name}' ({tensor.dtype}) is none of {', '.join(PARTS)} of a module", remedy)
    return Equalization(about.text("equalizer"), tensors)


def recorded(folder: Path) -> Equalization | None:
    """The equalization of a run, `None` where its folder holds none."""
    return load_equalization(folder / FILE) if (folder / FILE).exists() else None


@torch.no_grad()
def scale(module: Any, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
    """Multiply the module's weight, in place, by a factor for each output and each input channel, and its bias by the first.

    The module is a layer, or a norm with a weight `[channels]`, which takes `outputs` alone. Products are rounded once.
    """
    if kind_of(module) is None:
        assert outputs is not None  # a norm reads no channels
        weight = module.weight.double() * outputs.to(module.weight.device)
    else:
        weight = weight_rows(module).double()
        if inputs is not None:
            weight = by_input(module, weight).mul(by_groups(module, inputs.to(weight.device))).reshape(weight.shape)
        if outputs is not None:
            weight = weight * outputs.to(weight.device).view(-1, *[1] * (weight.ndim - 1))
        weight = from_rows(module, weight)
    set_values(module.weight, weight)
    if outputs is not None and getattr(module, "bias", None) is not None:
        set_values(module.bias, module.bias.double() * outputs.to(module.bias.device))


def by_input(module: Any, rows: Tensor) -> Tensor:
    """Rows as `[groups, out / groups, in / groups, kernel]`: the first and the third dimension are the input channel."""
    groups = getattr(module, "groups", 1)
    return rows.reshape(groups, rows.shape[0] // groups, rows.shape[1], -1)


def by_groups(module: Any, inputs: Tensor) -> Tensor:
    """Per-input-channel numbers `[in]`, shaped to broadcast over `by_input`."""
    return inputs.view(getattr(module, "groups", 1), 1, -1, 1)

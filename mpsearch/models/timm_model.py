"""Networks of the package timm, by name, with weights of its own or of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpsearch.errors import InputError, did_you_mean, one_line
from mpsearch.models.base import fill, load_weights
from mpsearch.models.without_torchvision import without_torchvision

INSTALL = "pip install 'mpsearch[timm]', and pip install --no-deps timm"  # which asks for torchvision, and needs none
CONTAINERS = ("state_dict_ema", "state_dict", "model")  # under which timm's training scripts keep the weights


def timm_model(
    model_name: str, pretrained: bool = True, weights: str | Path | None = None, **options: float | bool | None
) -> nn.Module:
    """`timm.create_model` of a model in timm's own registry, in eval mode.

    timm also takes checkpoints, folders and repositories, which it may unpickle. These are not accepted here, because the
    arguments may come from somebody else's run folder.

    Parameters
    ----------
    model_name
        A name in timm's registry.
    pretrained
        Whether to load timm's weights, which timm downloads; not where `weights` are given.
    weights
        A file of weights: `.safetensors`, or a checkpoint of PyTorch of which tensors alone are read.
    **options
        Numbers, such as `num_classes`.

    Raises
    ------
    InputError
        For other arguments, for weights that are absent or not this network's, and where timm is not installed.
    """
    check_name(model_name)
    for name, value in options.items():
        if not isinstance(value, int | float | None):
            raise InputError(
                f"model.{name} must be a number, true, false or null; got {value!r}. For other arguments of timm: model=custom "
                "model._target_=timm.create_model."
            )
    timm = import_timm("model=timm")
    try:
        model: nn.Module = timm.create_model(model_name, pretrained=pretrained and weights is None, **options)
    except Exception as error:  # unknown names and options, and weights that cannot be fetched
        names = timm.list_models()
        hint = "" if model_name.partition(".")[0] in names else did_you_mean(model_name, names)
        raise InputError(
            f"timm cannot make {model_name} with pretrained={str(pretrained).lower()}: {one_line(error)}.{hint} For weights of "
            "your own: model.weights=FILE."
        ) from error
    if weights is None:
        return model.eval()
    if Path(weights).suffix == ".safetensors":
        return load_weights(model, weights)
    return fill(model, _checkpoint(Path(weights).expanduser()), weights)


def import_timm(what: str) -> Any:
    """The package timm, also without torchvision; `InputError`, which names `what` needs it, where it is not installed."""
    try:
        with without_torchvision():
            import timm
    except ImportError as error:
        raise InputError(f"{what} needs the package timm ({one_line(error)}): {INSTALL}") from None
    return timm


def check_name(model_name: object) -> None:
    """Raise `InputError` where it can be no name in timm's registry."""
    if not isinstance(model_name, str) or ":" in model_name or "/" in model_name:
        raise InputError(
            f"model.model_name must be a name in timm's registry, such as resnet18; got {model_name!r}. For a repository or a "
            "folder that you trust: model=custom model._target_=timm.create_model +model.model_name=NAME."
        )


def _checkpoint(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of PyTorch."""
    if not file.is_file():
        raise InputError(f"There is no weights file {file}. Set model.weights.")
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"{file} is no checkpoint of tensors alone ({one_line(error)}). Save the state_dict() by itself, or as .safetensors."
        ) from error
    inner = next((stored[name] for name in CONTAINERS if isinstance(stored.get(name), dict)), stored)
    return {name.removeprefix("module."): tensor for name, tensor in inner.items() if isinstance(tensor, torch.Tensor)}

"""A copy of a model that shares its weights, so that the caller's model stays as it is without a second full copy in memory."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from mpsearch.errors import InputError, check_memory


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode: modules and buffers are new; parameters are new objects on the same memory.

    Modules of the copy may be replaced, and parameters given other values by `mpsearch.layer.set_values` or by assigning their
    `data`; neither changes `model`. Every floating-point parameter of the copy requires a gradient.

    Raises
    ------
    InputError
        The model cannot be copied by `copy.deepcopy`.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        is_float = parameter.is_floating_point() or parameter.is_complex()
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=is_float)
    for module in model.modules():  # computed weights, as of `torch.nn.utils.weight_norm`, which `deepcopy` refuses
        memo |= {id(x): x.detach() for x in vars(module).values() if isinstance(x, Tensor) and not x.is_leaf}
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception as error:  # a module's own code may raise anything
        check_memory(error)
        raise InputError(
            f"The model cannot be copied ({type(error).__name__}: {error}). Give a function that builds it instead of the model."
        ) from error

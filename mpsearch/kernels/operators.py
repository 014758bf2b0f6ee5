"""Registers the kernels as operators of PyTorch, `mpsearch::<name>`, which torch.compile, torch.export and meta tensors know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("mpsearch", "DEF")  # lives as long as its operators


def register(name: str, arguments: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `mpsearch::name(arguments) -> Tensor`: `run` computes it on any device, `fake` says the result's shape and dtype.

    Gradients are not followed. (`torch.library.custom_op` would do the same at ten times the cost of a call.)
    """
    _library.define(f"{name}({arguments}) -> Tensor")
    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"mpsearch::{name}", fake, lib=_library)

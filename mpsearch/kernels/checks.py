"""Checks that the kernels' faces share: a kernel gets addresses, and trusts that values of the right type lie there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mpsearch.errors import InputError

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
SCALE_DTYPES = (torch.float16, torch.float32)


def check_range(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raise `InputError` unless `least <= value <= most`."""
    if value < least or (most is not None and value > most):
        raise InputError(f"{name} must be {least} {'or more' if most is None else f'to {most}'}; got {value}.")


def check_column_groups(column_groups: Tensor, n_groups: int) -> None:
    """Raise `InputError` unless every column belongs to one of the groups."""
    first, last = (int(column_groups.min()), int(column_groups.max())) if len(column_groups) else (0, -1)
    if first < 0 or last >= n_groups:
        raise InputError(f"column_groups must be 0 to {n_groups - 1} for {n_groups} groups; got {first} to {last}.")


def check_tensor(
    name: str,
    tensor: Tensor | None,
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    shape: Sequence[int | str],
    device: torch.device | None = None,
    *,
    contiguous: bool = True,
) -> None:
    """Raise `InputError` where a tensor has another dtype, shape, layout or device.

    In `shape` a string stands for any size, and an initial "..." for any dimensions; `None` is no tensor, and no error.
    """
    if tensor is None:
        return
    dtypes, sizes = dtypes if isinstance(dtypes, tuple) else (dtypes,), tuple(tensor.shape)
    n_any = shape[0] == "..." if shape else 0  # any number of dimensions
    n_fixed = len(shape) - n_any
    fits = len(sizes) >= n_fixed if n_any else len(sizes) == n_fixed
    for wanted, size in zip(reversed(shape), reversed(sizes), strict=False):
        fits = fits and (wanted == size or isinstance(wanted, str))
    is_contiguous = not contiguous or tensor.is_contiguous()
    if tensor.dtype in dtypes and fits and is_contiguous and (device is None or tensor.device == device):
        return
    names = [dtype_of(dtype) for dtype in dtypes]
    expected = f"{', '.join(names[:-1])}{' or ' if names[1:] else ''}{names[-1]} [{', '.join(map(str, shape))}]"
    raise InputError(
        f"{name} must be {'contiguous ' if contiguous else ''}{expected}{f' on {device}' if device else ''}; got "
        f"{'' if is_contiguous else 'not contiguous '}{dtype_of(tensor.dtype)} {list(tensor.shape)} on {tensor.device}."
    )


def checked(
    name: str,
    tensor: MaybeTensor,
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    shape: Sequence[int | str],
    device: torch.device | None = None,
    *,
    contiguous: bool = True,
) -> MaybeTensor:
    """`check_tensor`, then the `readable` tensor, without its gradients."""
    check_tensor(name, tensor, dtypes, shape, device, contiguous=contiguous)
    return None if tensor is None else readable(name, tensor.detach())


def readable(name: str, tensor: MaybeTensor) -> MaybeTensor:
    """`tensor`, or a copy without the negative bit, which kernels cannot see; dtype, shape and strides are the same.

    Raises `InputError` where the storage is smaller than shape, strides and offset require, as after
    `untyped_storage().resize_(0)`, by which FSDP frees a parameter between uses. `name` stands in the message.
    """
    if tensor is None:
        return None
    if tensor.is_contiguous():
        reach = tensor.numel()
    else:
        reach = (
            1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        )
    if reach:
        needed, stored = (tensor.storage_offset() + reach) * tensor.itemsize, tensor.untyped_storage().nbytes()
        if stored < needed:
            raise InputError(
                f"The storage of {name} has {stored} bytes, but {dtype_of(tensor.dtype)} {list(tensor.shape)} needs {needed}. "
                "Restore its values before the call (FSDP frees parameters between uses)."
            )
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def dtype_of(dtype: torch.dtype) -> str:
    """A dtype in a message: `float32`."""
    return str(dtype).removeprefix("torch.")

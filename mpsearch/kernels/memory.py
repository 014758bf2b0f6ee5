"""What a kernel may read of a tensor: it gets addresses, and trusts that the values lie there as they are."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from mpsearch.errors import InputError

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


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
        needed, there = (tensor.storage_offset() + reach) * tensor.itemsize, tensor.untyped_storage().nbytes()
        if there < needed:
            raise InputError(
                f"The storage of {name} has {there} bytes, but {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} "
                f"needs {needed}. Restore its values before the call (FSDP frees parameters between uses)."
            )
    return tensor.resolve_neg() if tensor.is_neg() else tensor

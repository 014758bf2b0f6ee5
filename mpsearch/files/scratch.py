"""Tensors that are larger than memory should hold: in files without a name, mapped into memory.

The operating system reads pages of such a file when they are used, and drops them where memory is short.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mpsearch.errors import InputError
from mpsearch.files import file_errors

WEIGHT_BYTES = 2**27  # of a network's weights in memory
LEAST_FREE = 10**9  # bytes of the disk that are left to others


def joined(parts: Iterable[Tensor], max_bytes: int, folder: Path | None = None) -> Tensor:
    """`torch.cat(parts)`; where they are more than `max_bytes` and on the CPU, they are in a file.

    Parameters
    ----------
    parts
        Of one dtype and shape but for their length; each is written before the next is asked for.
    folder
        Of the file, which vanishes with the tensor; `None`: the system's folder for temporary files.

    Raises
    ------
    InputError
        The file cannot be written, or the disk would have less than `LEAST_FREE` left.
    """
    kept: list[Tensor] = []
    remaining = iter(parts)
    for part in remaining:
        kept.append(part)
        if sum(x.nbytes for x in kept) > max_bytes and part.device.type == "cpu":
            return _mapped(itertools.chain(_popped(kept), remaining), folder)
    return torch.cat(kept)


class Kept:
    """Tensors that are kept as they are now: the first `max_bytes` of them in memory, later ones in files.

    Parameters
    ----------
    max_bytes
        Limit on those in memory.
    folder
        Of the files; `None`: the system's folder for temporary files.
    held
        Tensors that are in memory anyway, such as a network's weights.
    """

    def __init__(self, max_bytes: int, folder: Path | None = None, held: Iterable[Tensor] = ()) -> None:
        self.max_bytes, self.folder = max_bytes, folder
        self._held = {tensor.untyped_storage().data_ptr() for tensor in held}
        self._known = WeakTensorKeyDictionary()  # one copy of what several layers read

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, or its contiguous copy in a file; raises `InputError` as `joined` does."""
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu" or storage.data_ptr() in self._held or storage.nbytes() < tensor.nbytes:
            return tensor
        known: tuple[int, Tensor] | None = self._known.get(tensor)
        if known is None or known[0] != n_writes(tensor):
            fits = tensor.nbytes <= self.max_bytes
            self.max_bytes -= tensor.nbytes * fits
            kept = tensor.detach() if fits else joined([tensor.detach()[None]], 0, self.folder)[0]
            known = self._known[tensor] = n_writes(tensor), kept
        return known[1]


def weights_in_files(model: nn.Module) -> None:
    """Put the weights of a network that nobody else holds into files where they are more than `WEIGHT_BYTES` on the CPU.

    They stay in memory where the system's folder for temporary files has no space.
    """
    kept = Kept(WEIGHT_BYTES)
    with suppress(InputError):
        for parameter in model.parameters():
            parameter.data = kept.keep(parameter.data)


def n_writes(tensor: Tensor) -> int:
    """Counts the operations in place on the tensor's memory; 0 where PyTorch does not count them."""
    return 0 if tensor.is_inference() else tensor._version


def _popped(parts: list[Tensor]) -> Iterable[Tensor]:
    while parts:
        yield parts.pop(0)


def zeros(shape: Sequence[int], folder: Path | None = None) -> Tensor:
    """Zeros, float32, in a file; raises `InputError` as `joined` does."""
    with _new_file(folder) as (file, name):
        n = math.prod(shape)
        _check_space(Path(name).parent, 4 * n)
        os.posix_fallocate(file.fileno(), 0, max(4 * n, 1))  # a disk that is full later would end the process
        return torch.from_file(name, shared=True, size=n).view(*shape)


def _mapped(parts: Iterable[Tensor], folder: Path | None) -> Tensor:
    shape, dtype, n = torch.Size(), torch.float32, 0
    with _new_file(folder) as (file, name):
        for part in parts:
            _check_space(Path(name).parent, part.nbytes)
            file.write(part.detach().contiguous().flatten().view(torch.uint8).numpy().data)
            shape, dtype, n = part.shape[1:], part.dtype, n + len(part)
        file.flush()
        # Private: the tensor may be written into, the file stays.
        return torch.from_file(name, shared=False, size=n * shape.numel(), dtype=dtype).view(n, *shape)


@contextmanager
def _new_file(folder: Path | None) -> Iterator[tuple[BinaryIO, str]]:
    """An open file and its name, which is gone after the block."""
    folder = folder or Path(tempfile.gettempdir())
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".tensor-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file, name
        finally:
            os.unlink(name)


def _check_space(folder: Path, n_bytes: int) -> None:
    if shutil.disk_usage(folder).free - n_bytes < LEAST_FREE:
        raise InputError(
            f"{folder} has too little space for what does not fit into memory: {n_bytes / 1e9:.1f} GB more, and "
            f"{LEAST_FREE / 1e9:g} GB for others. Free some, choose a folder on another disk, or ask for fewer samples."
        )

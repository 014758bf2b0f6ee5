"""Tensors that are larger than memory should hold: in a file without a name, mapped into memory.

The operating system reads pages of such a file when they are used, and drops them where memory is short.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.files import file_errors

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
            return _mapped(itertools.chain(_popped(kept), remaining), folder or Path(tempfile.gettempdir()))
    return torch.cat(kept)


def _popped(parts: list[Tensor]) -> Iterable[Tensor]:
    while parts:
        yield parts.pop(0)


def _mapped(parts: Iterable[Tensor], folder: Path) -> Tensor:
    shape, dtype, n = torch.Size(), torch.float32, 0
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".outputs-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                for part in parts:
                    if shutil.disk_usage(folder).free - part.nbytes < LEAST_FREE:
                        raise InputError(
                            f"{folder} has too little space for the float model's outputs, of which {file.tell() / 1e9:.1f} GB "
                            "are written. Free some, choose a folder on another disk, or ask for fewer samples."
                        )
                    file.write(part.detach().contiguous().flatten().view(torch.uint8).numpy().data)
                    shape, dtype, n = part.shape[1:], part.dtype, n + len(part)
            # Private: the tensor may be written into, the file stays.
            return torch.from_file(name, shared=False, size=n * shape.numel(), dtype=dtype).view(n, *shape)
        finally:
            os.unlink(name)

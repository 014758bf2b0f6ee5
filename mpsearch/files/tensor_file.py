"""Safetensors files that cover themselves: their metadata hold a description (JSON) and a digest over it and every tensor.

A digest finds damage and careless edits. It is no signature: whoever changes a file on purpose can compute a new one.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.files.strict_json import JsonObject, canonical, damaged, parse

SHA256 = "sha256"


def tensors_sha256(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """Hex digest of `about` and of all tensors: names, shapes, dtypes, bytes."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        _update(digest, name, tensor)
    return digest.hexdigest()


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    value = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
    if value.numel():  # an empty one may have strides that no view as bytes has
        digest.update(value.reshape(-1).view(torch.uint8).numpy())


def tensor_file(tensors: Mapping[str, Tensor], kind: str, about: Mapping[str, Any]) -> bytes:
    """The content of a file of this `kind`; `about` is JSON-able."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = tensors_sha256(tensors, canonical(about))
    return save(tensors, {kind: canonical({**about, SHA256: digest})})


class TensorFile:
    """An open file: `about` is its description without the digest, `names` are those of its tensors."""

    def __init__(self, path: Path, file: Any, about: JsonObject) -> None:
        self.path, self.about = path, about
        self._file, self._sha256 = file, about.data.pop(SHA256, None)
        self.names: tuple[str, ...] = tuple(sorted(file.keys()))

    def tensor(self, name: str) -> Tensor:
        """A view of the file's memory, which is mapped as long as the tensor lasts."""
        if name not in self.names:
            raise self.about.damaged(f"the tensor '{name}' is missing")
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise self.about.damaged(f"the tensor '{name}' cannot be read ({error})") from None

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return self.tensor(name).nbytes

    def verify(self) -> None:
        """Raise `InputError` where the digest is not that of the content; one pass over the file, a tensor at a time."""
        digest = hashlib.sha256(canonical(self.about.data).encode())
        for name in self.names:
            _update(digest, name, self.tensor(name))
        if digest.hexdigest() != self._sha256:
            raise self.about.damaged("its content does not match its digest")


@contextmanager
def opened(path: Path, kind: str, remedy: str) -> Iterator[TensorFile | None]:
    """A file of `tensor_file`, not yet verified; `None` where it is a safetensors file of another kind.

    `InputError`, ending in the `remedy`, where the file is absent, unreadable or damaged.
    """
    check_regular(path, remedy)
    try:
        file = safe_open(path, framework="pt")
        metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error, remedy) from None
    with file:
        if kind not in metadata:
            yield None
        else:
            yield TensorFile(path, file, JsonObject(parse(metadata[kind], path, remedy), path, remedy))


def read_tensors(path: Path, kind: str, remedy: str) -> tuple[JsonObject, dict[str, Tensor]]:
    """What a file of `tensor_file` says of itself, and copies of all its tensors, both verified.

    `InputError`, ending in the `remedy`, where the file is absent, unreadable, damaged, or of another kind.
    """
    with opened(path, kind, remedy) as file:
        if file is None:
            raise damaged(path, f"it has no {kind} metadata", remedy)
        file.verify()
        return file.about, {name: file.tensor(name).clone() for name in file.names}


def check_regular(path: Path, remedy: str) -> None:
    """Raise `InputError` unless `path` is a regular file (or a link to one): a pipe or device could block or never end."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise InputError(f"{str(path)!r} does not exist. {remedy}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). {remedy}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is a {'folder' if stat.S_ISDIR(mode) else 'pipe or device'}, not a regular file. {remedy}")


def sibling(path: Path, name: str, remedy: str) -> Path:
    """The regular file called `name` in the folder of `path`, which names it; `InputError` for anything but a bare name."""
    if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise damaged(path, f"it names the file {name!r}, which must be a bare file name, without a folder", remedy)
    check_regular(path.parent / name, remedy)
    return path.parent / name

"""The weight bank on disk: one file for each layer and scheme, so that nothing that was quantized is quantized again.

A run that goes on finds its weights there, and so do its workers (each quantizes what no other has yet), `solve`, `finetune` and
`export`. A file is written whole or not at all; one that is of other settings, or cannot be read, is quantized anew and replaced.
The folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mpsearch.schemes.base import QuantizedTensor, QuantScheme

IDENTITY = "mpsearch-bank"


class Bank:
    """The files in `folder`; `identity` (JSON-able) is all that their contents depend on."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._writes = True

    def read(self, layer: str, name: str, scheme: QuantScheme, shape: tuple[int, ...]) -> QuantizedTensor | None:
        """The layer's weight of `shape` in the scheme called `name`; `None` where it is not there."""
        try:
            with safe_open(self._file(layer, name), framework="pt") as file:
                if (file.metadata() or {}).get(IDENTITY) != self.identity:
                    return None
                # Copies: the file may be replaced while they are in use.
                return QuantizedTensor(scheme, shape, {key: file.get_tensor(key).clone() for key in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError):
            return None

    def write(self, layer: str, name: str, weight: QuantizedTensor) -> None:
        """Keep it, but for floats, which nothing had to be found for; where that fails, once a warning."""
        if not self._writes or weight.scheme.weight_bits >= 16:
            return
        file = self._file(layer, name)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weight.tensors.items()}
            save_file(tensors, temporary, {IDENTITY: self.identity})
            temporary.replace(file)
        except (SafetensorError, OSError) as error:
            self._writes = False
            with suppress(OSError):
                temporary.unlink()
            warnings.warn(f"Quantized weights cannot be kept in {self.folder} ({error}): they will be found anew.", stacklevel=3)

    def _file(self, layer: str, name: str) -> Path:
        return self.folder / f"{quote(layer, safe='')}.{quote(name, safe='')}.safetensors"

"""Quantized weights on disk: one file for each layer and scheme, so that nothing is quantized twice.

A resumed run reads its weights from there, and so do its workers (each quantizes what no other has yet), `solve`, `finetune` and
`export`. A file is written whole or not at all, and holds a digest over its tensors and what they are of. A file of other
settings is replaced; so is one whose content does not match its digest, with one warning per run. The folder may be deleted at
any time.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.files import file_errors, write_atomically
from mpsearch.files.tensor_file import opened, tensor_file
from mpsearch.schemes.base import QuantizedTensor, QuantScheme

WEIGHT, BIASES = "mpsearch-weight", "mpsearch-biases"
LONGEST = 150  # characters of a file name that name the layer and the scheme; ONNX files have longer names of nodes


class WeightFiles:
    """The files in `folder`; `identity` (JSON-able) is all that their contents depend on.

    Weights in a float format are rounded again in less time than a file takes, and have none; with `keeps_floats` they have.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, keeps_floats: bool = False) -> None:
        self.folder, self.keeps_floats = folder, keeps_floats
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._writes, self._warned = True, False

    def derived(self, folder: Path, about: Mapping[str, Any]) -> WeightFiles:
        """The files of other weights, made of the same model and data, that depend on `about` too: all of them, in `folder`."""
        return WeightFiles(folder, {"identity": self.identity, **about}, keeps_floats=True)

    def read(self, layer: str, name: str, scheme: QuantScheme, shape: tuple[int, ...]) -> QuantizedTensor | None:
        """The layer's weight of `shape` in the scheme called `name`; `None` where no intact file has it."""
        tensors = self._read(WEIGHT, layer, name)
        return None if tensors is None else QuantizedTensor(scheme, shape, tensors)

    def write(self, layer: str, name: str, weight: QuantizedTensor) -> bool:
        """Keep the weight, and say whether it is; where the folder cannot be written there is one warning."""
        if self.keeps_floats or weight.scheme.weight_bits < 16:
            self._write(WEIGHT, layer, name, weight.tensors)
            return self._writes
        return False

    def read_biases(self, layer: str, name: str) -> dict[str, Tensor] | None:
        """Module name -> corrected bias of the layer in the scheme called `name`; `None` as in `read`."""
        return self._read(BIASES, layer, name)

    def write_biases(self, layer: str, name: str, biases: Mapping[str, Tensor]) -> None:
        """Keep the corrected biases, as `write` does."""
        self._write(BIASES, layer, name, biases)

    def _about(self, layer: str, name: str) -> dict[str, str]:
        return {"identity": self.identity, "layer": layer, "scheme": name}

    def _read(self, kind: str, layer: str, name: str) -> dict[str, Tensor] | None:
        file = self._file(kind, layer, name)
        if not file.exists():
            return None
        try:
            with opened(file, kind, "It is replaced.") as stored:
                if stored is None:
                    return None
                stored.verify()
                if stored.about.data != self._about(layer, name):
                    return None
                # Views of the file's memory, which last: a file that is replaced meanwhile is another one.
                return {key: stored.tensor(key) for key in stored.names}
        except InputError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"{error} It is quantized again, as is any other damaged file in that folder.", stacklevel=4)
            return None

    def _write(self, kind: str, layer: str, name: str, tensors: Mapping[str, Tensor]) -> None:
        if not self._writes:
            return
        try:
            with file_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(kind, layer, name), tensor_file(tensors, kind, self._about(layer, name)))
        except InputError as error:
            self._writes = False
            warnings.warn(f"Quantized weights cannot be kept in {self.folder} and are quantized again: {error}", stacklevel=4)

    def _file(self, kind: str, layer: str, name: str) -> Path:
        suffix = "" if kind == WEIGHT else ".biases"
        stem = f"{quote(layer, safe='')}.{quote(name, safe='')}"
        if len(stem) > LONGEST:
            stem = f"{stem[:LONGEST]}.{hashlib.sha256(stem.encode()).hexdigest()[:16]}"
        return self.folder / f"{stem}{suffix}.safetensors"

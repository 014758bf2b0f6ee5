"""What a GGUF file has that the search did not change: from a Hugging Face folder, or from the GGUF file that was searched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import InputError, one_line
from mpsearch.exporters.gguf_architecture import Architecture, import_gguf
from mpsearch.exporters.gguf_blocks import Stored, ordered_blocks
from mpsearch.exporters.gguf_tokenizer import add_tokenizer, check_tokenizer
from mpsearch.exporters.hf_checkpoint import stored_dtypes
from mpsearch.models.huggingface import check_folder
from mpsearch.schemes.floating import Float

STORED: dict[torch.dtype | None, Float] = {torch.float16: Float("float16"), torch.bfloat16: Float("bfloat16")}
# Keys that are not copied: those of the reader, and those that describe the tensors.
OWN_KEYS = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version", "split.")


def source_of(model: nn.Module) -> Source:
    """The source of a model; `InputError` where its folder is not known or incomplete."""
    path = Path(str(getattr(model, "name_or_path", "")))
    if path.suffix == ".gguf" and path.is_file():
        return GGUFSource(path)
    if not path.parts:
        raise InputError("exporter=gguf needs the folder of the model, for its tokenizer. Load it by model=hf model.path=FOLDER.")
    check_folder(path)
    check_tokenizer(path)
    return FolderSource(path)


def float32(values: Tensor) -> Stored:
    """The values as the file stores float32."""
    return values.detach().float().cpu().contiguous().numpy(), "F32"


class Source(ABC):
    """What the search did not change."""

    @abstractmethod
    def array(self, parameter: str, values: Tensor, architecture: Architecture) -> Stored:
        """The parameter as it is stored, where its `values` are still those; else in float32."""

    @abstractmethod
    def others(self, architecture: Architecture, written: set[str]) -> Iterator[tuple[str, Stored]]:
        """Tensors that are no parameters, by their names in the file; none of those in `written`."""

    @abstractmethod
    def add_keys(self, writer: Any, architecture: Architecture) -> None:
        """Write hyperparameters and tokenizer to a `gguf.GGUFWriter` that has all tensors."""


class FolderSource(Source):
    """A Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dtypes = stored_dtypes(folder)

    def array(self, parameter: str, values: Tensor, architecture: Architecture) -> Stored:
        """See `Source.array`; biases, norms and position embeddings are float32."""
        name, narrow = architecture.tensor_name(parameter), STORED.get(self.dtypes.get(parameter))
        if narrow is not None and values.dim() > 1 and name != "position_embd.weight":
            weight = narrow.quantize(values)
            if torch.equal(weight.dequantize(), values):
                return ordered_blocks(weight, architecture.row_order(parameter, len(values)))
        return float32(architecture.to_file(parameter, values))

    def others(self, architecture: Architecture, written: set[str]) -> Iterator[tuple[str, Stored]]:
        """See `Source.others`."""
        for name, values in architecture.extra_tensors().items():
            yield name, float32(values)

    def add_keys(self, writer: Any, architecture: Architecture) -> None:
        """See `Source.add_keys`."""
        gguf = import_gguf()
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self.folder.resolve().name)
        writer.add_size_label(gguf.size_label(writer.get_total_parameter_count()[0], 0, 0, 0))
        architecture.add_hyperparameters(writer)
        add_tokenizer(writer, self.folder, architecture.config.vocab_size)


class GGUFSource(Source):
    """A GGUF file; its keys and the tensors of types that no scheme has are copied as they are."""

    def __init__(self, path: Path) -> None:
        self.reader = read_gguf(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def array(self, parameter: str, values: Tensor, architecture: Architecture) -> Stored:
        """See `Source.array`."""
        stored = self.tensors.get(architecture.tensor_name(parameter))
        if stored is not None and torch.equal(architecture.from_file(parameter, dequantized(stored)), values):
            return _raw(stored)
        return float32(architecture.to_file(parameter, values))

    def others(self, architecture: Architecture, written: set[str]) -> Iterator[tuple[str, Stored]]:
        """See `Source.others`."""
        for name, tensor in self.tensors.items():
            if name not in written:
                yield name, _raw(tensor)

    def add_keys(self, writer: Any, architecture: Architecture) -> None:
        """See `Source.add_keys`."""
        for field in self.reader.fields.values():
            if field.types and not field.name.startswith(OWN_KEYS):
                kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)


def read_gguf(path: Path) -> Any:
    """The `gguf.GGUFReader` of a file; `InputError` where it is damaged."""
    gguf = import_gguf()
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} is not a complete GGUF file ({one_line(error)}). Copy or download it again.") from error


def dequantized(tensor: Any) -> Tensor:
    """A tensor of a `gguf.GGUFReader`, float32, by the package gguf."""
    gguf = import_gguf()
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _raw(tensor: Any) -> Stored:
    return tensor.data, tensor.tensor_type.name

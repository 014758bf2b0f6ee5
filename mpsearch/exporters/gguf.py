"""One GGUF file, which llama.cpp opens: hyperparameters, tokenizer and tensors, the searched ones in the codes of the search.

The model is a Hugging Face folder (`model=hf`) or a GGUF file that transformers reads, whose keys are copied. Biases, norms and
position embeddings are float32; other weights that were not searched keep the type in which they were stored.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.exporters.base import Exporter, Picked
from mpsearch.exporters.gguf_architecture import Architecture, import_gguf
from mpsearch.exporters.gguf_blocks import Stored, check_blocks, ordered_blocks
from mpsearch.exporters.gguf_source import Source, dequantized, float32, read_gguf, source_of
from mpsearch.exporters.llama_cpp_model import LlamaCppModel, import_llama_cpp
from mpsearch.files import file_errors
from mpsearch.graph.projections import expose_projections
from mpsearch.layer import kind_of, set_values
from mpsearch.packed.model import Weights

FILE = "model.gguf"


class GGUF(Exporter):
    """Writes `model.gguf`."""

    runtime = "llama.cpp"

    def check_installed(self) -> None:
        """Raise `InputError` where gguf, which writes the file, or llama-cpp-python, which opens it, is missing."""
        import_gguf()
        import_llama_cpp()

    def check(self, model: nn.Module) -> None:
        """Raise `InputError` for a model that no GGUF file can hold, whatever its allocation."""
        architecture = Architecture.from_model(model)
        for parameter, _ in model.named_parameters():
            architecture.tensor_name(parameter)
        source_of(model)

    def export(self, picked: Picked, engine: Weights, folder: Path) -> Path:
        """The path of `model.gguf`."""
        architecture = Architecture.from_model(engine.model)
        for layer, name in engine.space.layer_schemes(picked.evaluation.allocation):
            check_blocks(layer, name, engine.space.schemes[name])
        source = source_of(engine.model)
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            return _write(folder / FILE, architecture, source, dict(_tensors(engine, picked, architecture, source)))

    def load(self, path: Path, model: nn.Module) -> nn.Module:
        """The float model with every parameter as the package gguf decodes it."""
        model = expose_projections(model.eval())
        decoded = dict(_decoded(path, model))
        for name, parameter in model.named_parameters():
            set_values(parameter, decoded[name])
        return model

    def decode(self, path: Path, model: nn.Module) -> dict[str, Tensor]:
        """The weights of all Linear layers and embeddings."""
        kinds = {f"{name}.weight": name for name, module in model.named_modules() if kind_of(module) is not None}
        return {kinds[name]: values for name, values in _decoded(path, model) if name in kinds}

    def open(self, path: Path, model: nn.Module) -> nn.Module:
        """llama.cpp as a module: token ids int64 `[n, length]` -> logits float32 `[n, length, vocabulary]`."""
        return LlamaCppModel(path)


def _tensors(engine: Weights, picked: Picked, architecture: Architecture, source: Source) -> Iterator[tuple[str, Stored]]:
    """Every tensor of the file, by its name there."""
    schemes = {layer.name: scheme for layer, scheme in engine.space.layer_schemes(picked.evaluation.allocation)}
    layers = {f"{module}.weight": layer.name for layer in engine.space.layers for module in layer.modules}
    biases = {
        f"{module}.bias": bias for layer, scheme in schemes.items() for module, bias in engine.biases(layer, scheme).items()
    }
    written = set()
    for parameter, values in engine.model.named_parameters():
        name = architecture.tensor_name(parameter)
        written.add(name)
        if parameter in layers:
            layer = layers[parameter]
            yield name, ordered_blocks(engine.quantized(layer, schemes[layer]), architecture.row_order(parameter, len(values)))
        elif parameter in biases:
            yield name, float32(architecture.to_file(parameter, biases[parameter]))
        else:
            yield name, source.array(parameter, values.detach().cpu(), architecture)
    yield from source.others(architecture, written)


def _write(path: Path, architecture: Architecture, source: Source, tensors: dict[str, Stored]) -> Path:
    """Write the file next to its place, and move it there."""
    gguf = import_gguf()
    unfinished = path.with_name(f".{path.name}.tmp")
    writer = gguf.GGUFWriter(unfinished, architecture.name)
    sizes: Counter[str] = Counter()
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
        sizes[kind] += array.nbytes
    source.add_keys(writer, architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(gguf.LlamaFileType, sizes.most_common(1)[0][0]))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise
    return path


def _file_type(kinds: Any, most: str) -> Any:
    """llama.cpp's name for files in which `most` is the type of most bytes, which it shows; it reads the type of each tensor."""
    names = (kind for kind in kinds if kind.name in (f"ALL_{most}", f"MOSTLY_{most}") or kind.name.startswith(f"MOSTLY_{most}_"))
    return next(names, kinds.GUESSED)


def _decoded(path: Path, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The name of each parameter and its values, float32."""
    architecture = Architecture.from_model(model)
    tensors = {tensor.name: tensor for tensor in read_gguf(path).tensors}
    for parameter, float_values in model.named_parameters():
        name = architecture.tensor_name(parameter)
        if name not in tensors:
            raise InputError(f"{path} lacks the tensor {name}. Export it again.")
        values = architecture.from_file(parameter, dequantized(tensors[name]))
        if values.shape != float_values.shape:
            raise InputError(
                f"{name} in {path} has the shape {list(values.shape)}; the model's '{parameter}' has {list(float_values.shape)}. "
                "Export it again."
            )
        yield parameter, values

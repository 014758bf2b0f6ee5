"""The allocation alone, as options of llama-quantize, which then quantizes by its own algorithms.

Its file of types (tools/quantize/quantize.cpp: `parse_tensor_type_file`) has a line `regular expression=type` for each tensor, of
which the first that matches counts, and no comments. The embedding and the output have options of their own. `exporter=gguf`
writes the file itself, which keeps the codes of the search, and with them its loss.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from mpsearch.errors import InputError
from mpsearch.exporters.base import Exporter, Picked
from mpsearch.exporters.gguf_architecture import Architecture, import_gguf
from mpsearch.exporters.gguf_blocks import check_blocks, ggml_type
from mpsearch.files import file_errors, write_atomically
from mpsearch.packed.model import Weights

TYPES, COMMAND = "tensor_types.txt", "llama_quantize.txt"
OPTIONS = {"token_embd.weight": "--token-embedding-type", "output.weight": "--output-tensor-type"}
REST = "Q8_0"  # of tensors that are not searched; llama-quantize reads the types of others only where this one is quantized


class LlamaCppRecipe(Exporter):
    """Writes `tensor_types.txt`, and `llama_quantize.txt` with the command that uses it."""

    holds_weights = False

    def check_installed(self) -> None:
        """Raise `InputError` where gguf, which has the names of the tensors, is missing."""
        import_gguf()

    def check(self, model: nn.Module) -> None:
        """Raise `InputError` for a model that llama.cpp does not know."""
        Architecture.from_model(model)

    def export(self, picked: Picked, engine: Weights, folder: Path) -> Path:
        """The path of `llama_quantize.txt`."""
        architecture = Architecture.from_model(engine.model)
        types = {}
        for layer, name in engine.space.layer_schemes(picked.evaluation.allocation):
            scheme = engine.space.schemes[name]
            check_blocks(layer, name, scheme)
            types[architecture.tensor_name(layer.weight_name)] = str(ggml_type(scheme)).lower()
        options = [f"{OPTIONS[name]} {kind}" for name, kind in types.items() if name in OPTIONS]
        lines = [f"^{re.escape(name)}$={kind}\n" for name, kind in types.items() if name not in OPTIONS]
        command = ["llama-quantize", f"--tensor-type-file {TYPES}", *options, f"model-f32.gguf model.gguf {REST}"]
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / TYPES, "".join(lines))
        write_atomically(folder / COMMAND, " ".join(command) + "\n")
        return folder / COMMAND

    def load(self, path: Path, model: nn.Module) -> nn.Module:
        """`InputError`: a recipe holds no weights."""
        raise InputError(
            f"{path} holds no weights: llama-quantize makes them. Export by exporter=gguf to get those of the search."
        )

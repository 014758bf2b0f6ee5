"""An ONNX file, which ONNX Runtime and other runtimes open: the float graph, with the codes of the search as its weights.

The graph is what `torch.onnx.export` makes of the folded and equalized model, with a dynamic batch size; of a model that was
itself read from an ONNX file, it is that file's (`onnx_original`). How weights are stored: see `onnx_weights`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.exporters.base import Exporter, ModelCall, Picked, check_packages
from mpsearch.exporters.onnx_convolutions import store_convolutions
from mpsearch.exporters.onnx_graph import GraphEditor
from mpsearch.exporters.onnx_original import original_graph
from mpsearch.exporters.onnx_session import RuntimeModule, Session, decoded
from mpsearch.exporters.onnx_trace import traced
from mpsearch.exporters.onnx_weights import store
from mpsearch.files import file_errors, write_atomically
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.layer import LayerSpec, set_values, to_rows
from mpsearch.packed.model import Weights
from mpsearch.runtimes.base import Runtime
from mpsearch.runtimes.onnxruntime import ONNXRuntime
from mpsearch.tree import map_tensors

OPSET, OPSET_2_BITS = 21, 25  # the first with 4-bit and with 2-bit integers
INSTALL = "pip install 'mpsearch[onnxruntime]'"
MOST_BYTES = 2**31 - 2**26  # of the tensors in a protobuf file


@dataclass(frozen=True)
class ONNX(Exporter):
    """Writes `onnx/model.onnx` and, of more than 2 GB, its tensors next to it: `tensors-<checksum>.data`.

    Parameters
    ----------
    packed_products
        Linear weights of 2, 4 or 8 bits in blocks of a power of two from 16 stay packed in memory (`com.microsoft.MatMulNBits`,
        which ONNX Runtime alone has). By default ONNX Runtime turns weights into float32 when it loads the file, which multiplies
        batches faster.
    """

    packed_products: bool = False

    own_folder = "onnx"
    runtime = "onnxruntime"
    needs_call = True

    def check_installed(self) -> None:
        """See `Exporter.check_installed`."""
        check_packages("onnx", ("onnx", "onnxscript", "onnxruntime"), INSTALL)

    def export(self, picked: Picked, engine: Weights, folder: Path) -> Path:
        """The path of `model.onnx`."""
        self.check_installed()
        path = folder / "model.onnx"
        proto = self.graph(picked, engine)
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > MOST_BYTES:
                _move_tensors(proto, folder)
        write_atomically(path, proto.SerializeToString())
        return path

    def graph(self, picked: Picked, engine: Weights) -> Any:
        """The quantized graph, an `onnx.ModelProto`."""
        chosen = chosen_layers(picked, engine, ONNXRuntime())
        proto = float_graph(picked, engine, "onnx")
        has_2_bits = any(engine.space.schemes[name].weight_bits == 2 for _, name in chosen)
        _set_opset(proto, OPSET_2_BITS if has_2_bits else OPSET)
        editor = GraphEditor(proto.graph)
        convolutions = []
        for layer, name in chosen:
            known = [own for module in layer.modules if (own := f"{module}.weight") in editor.constants]
            if not known:
                raise InputError(f"Layer '{layer.name}' is not a weight of the ONNX graph. Use exporter=native.")
            editor.rename(known[0], f"{layer.name}.weight")
            weight = engine.quantized(layer.name, name)
            if layer.kind != "linear" and weight.scheme.input_format is not None:
                convolutions.append((layer, weight))
            else:
                store(editor, layer, weight, self.packed_products)
        store_convolutions(editor, convolutions)
        editor.finish()
        return proto

    def load(self, path: Path, model: nn.Module) -> nn.Module:
        """As `open`."""
        return self.open(path, model)

    def open(self, path: Path, model: nn.Module) -> nn.Module:
        """The file in ONNX Runtime."""
        self.check_installed()
        return RuntimeModule(Session(path), model)

    def decode(self, path: Path, model: nn.Module) -> dict[str, Tensor]:
        """Layer name -> float32 weight, output channels first, computed by ONNX Runtime; `model` says which are transposed."""
        import onnx

        self.check_installed()
        modules = dict(model.named_modules())
        return {name: to_rows(modules.get(name), weight) for name, weight in decoded(onnx.load(str(path))).items()}


def chosen_layers(picked: Picked, engine: Weights, runtime: Runtime) -> list[tuple[LayerSpec, str]]:
    """Each layer with its scheme; `InputError` where the runtime does not run one."""
    space = engine.space
    chosen = space.layer_schemes(picked.evaluation.allocation)
    for layer, name in chosen:
        if not runtime.runs(layer, space.schemes[name]):
            raise InputError(
                f"Layer '{layer.name}' ({layer.kind}) in scheme '{name}' ({space.schemes[name].describe()}) has no form in the "
                f"files of {runtime.name}; expected {runtime.what}. Search with runtime={runtime.name}."
            )
    return chosen


def float_graph(picked: Picked, engine: Weights, exporter: str) -> Any:
    """The graph of the float model, with the corrected biases of the allocation: an `onnx.ModelProto`."""
    if picked.call is None:
        raise InputError(f"exporter={exporter} runs the model on samples of the task's data, which are absent. Restore them.")
    model = shared_copy(engine.model).cpu()
    for layer, scheme in engine.space.layer_schemes(picked.evaluation.allocation):
        for name, bias in engine.biases(layer.name, scheme).items():
            module: Any = model.get_submodule(name)
            set_values(module.bias, bias)
    call = ModelCall(*map_tensors(lambda tensor: tensor.cpu(), (picked.call.args, picked.call.kwargs)))
    kept = original_graph(model, call, OPSET)
    return traced(model, call, opset=OPSET) if kept is None else kept


def _move_tensors(proto: Any, folder: Path) -> None:
    """Write the tensors of a graph to a file in `folder`, named by its content, which the graph refers to."""
    from onnx.external_data_helper import convert_model_to_external_data, write_external_data_tensors

    digest = hashlib.sha256()
    for tensor in proto.graph.initializer:
        digest.update(tensor.raw_data)
    name = f"tensors-{digest.hexdigest()[:12]}.data"
    (folder / name).unlink(missing_ok=True)  # onnx appends
    convert_model_to_external_data(proto, all_tensors_to_one_file=True, location=name)
    write_external_data_tensors(proto, str(folder))


def _set_opset(proto: Any, version: int) -> None:
    """At least `version`; other domains than ONNX's own stay."""
    from onnx import helper

    versions = {entry.domain: entry.version for entry in proto.opset_import}
    version = max(version, versions.pop("", 0), versions.pop("ai.onnx", 0))
    versions = {"": version, "com.microsoft": 1, **versions}
    del proto.opset_import[:]
    proto.opset_import.extend(helper.make_opsetid(domain, number) for domain, number in versions.items())
    proto.ir_version = max(13 if version >= OPSET_2_BITS else 10, proto.ir_version)

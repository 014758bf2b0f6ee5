"""OpenVINO IR: the float graph, with the codes of the search as constants of 2, 3, 4, 6 or 8 bits.

A weight is `(Convert(codes) - zero_point) * scale`; OpenVINO computes it when it compiles the model for a CPU, or keeps the codes
where a kernel takes them. Inputs with a static scale are rounded by `FakeQuantize`, from which it makes products of integers: for
convolutions where the codes have the weight's own shape, and exactly for 256 levels. On x86 CPUs without VNNI these saturate
(outputs of a small network differed by 7 %): there the files compute what was scored only with the option
`LP_TRANSFORMS_MODE=NO`, in float32, as they are opened here.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import InputError, one_line
from mpsearch.exporters.base import Exporter, Picked, check_packages
from mpsearch.exporters.onnx import chosen_layers, float_graph
from mpsearch.exporters.onnx_session import RuntimeModule
from mpsearch.exporters.onnx_weights import unpacked
from mpsearch.files import file_errors
from mpsearch.kernels import available_backends
from mpsearch.layer import LayerSpec, in_layout, n_swapped, to_rows
from mpsearch.packed.model import Weights
from mpsearch.runtimes.openvino import OpenVINO as Profile
from mpsearch.schemes.base import QuantizedTensor
from mpsearch.schemes.floating import Float

INSTALL = "pip install 'mpsearch[openvino]'"
FORMATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
PASSED = ("Transpose", "Reshape", "Convert")  # between a weight and its product


class OpenVINO(Exporter):
    """Writes `openvino/model.xml` and `model.bin`, which hold the graph and its tensors."""

    own_folder = "openvino"
    runtime = "openvino"
    needs_call = True

    def check_installed(self) -> None:
        """See `Exporter.check_installed`."""
        check_packages("openvino", ("onnx", "onnxscript", "openvino"), INSTALL)

    def export(self, picked: Picked, engine: Weights, folder: Path) -> Path:
        """The path of `model.xml`."""
        self.check_installed()
        import openvino

        chosen = chosen_layers(picked, engine, Profile())
        proto = float_graph(picked, engine, "openvino")
        model = _core().read_model(proto.SerializeToString())
        constants = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
        for layer, name in chosen:
            weight = engine.quantized(layer.name, name)
            known = [constants[own] for module in layer.modules if (own := f"{module}.weight") in constants]
            if not known:
                raise InputError(f"Layer '{layer.name}' is not a constant of the OpenVINO graph. Use exporter=native.")
            _store(layer, weight, known[0])
        path = folder / "model.xml"
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                openvino.save_model(model, path, compress_to_fp16=False)
            except RuntimeError as error:
                path.unlink(missing_ok=True)
                path.with_suffix(".bin").unlink(missing_ok=True)
                raise InputError(f"{path} cannot be written: {one_line(error)[:300]}. Check the disk.") from error
        return path

    def load(self, path: Path, model: nn.Module) -> nn.Module:
        """As `open`."""
        return self.open(path, model)

    def open(self, path: Path, model: nn.Module) -> nn.Module:
        """The files in OpenVINO, which computes in float32 where it does not compute in integers."""
        self.check_installed()
        return RuntimeModule(Request(path), model)

    def decode(self, path: Path, model: nn.Module) -> dict[str, Tensor]:
        """Layer name -> float32 weight, output channels first, computed by OpenVINO; `model` says which are transposed."""
        self.check_installed()
        import openvino

        weights, modules = {}, dict(model.named_modules())
        for node in _core().read_model(path).get_ops():
            name, _, last = node.get_friendly_name().rpartition(".")
            if last == "weight" and node.get_output_size() == 1:
                part = openvino.Model([openvino.opset13.result(node.output(0))], [])
                (values,) = _compiled(part, path)([]).values()
                weights[name] = to_rows(modules.get(name), torch.from_numpy(np.array(values)))
        return weights


class Request:
    """A compiled model with as many threads as PyTorch uses: arrays in the order of its inputs -> its outputs."""

    def __init__(self, path: Path) -> None:
        try:
            self.compiled = _compiled(_core().read_model(path), path)
        except RuntimeError as error:
            raise InputError(f"OpenVINO cannot open {path}: {one_line(error)[:300]}") from error

    def __call__(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """See the class."""
        results = self.compiled(arrays)
        return [np.array(results[output]) for output in self.compiled.outputs]


def _core() -> Any:
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # a file that is replaced while it is mapped ends the process
    return core


def _compiled(model: Any, path: Path) -> Any:
    """For the CPU, in float32: by default it computes in bfloat16, and rounds inputs of weights in groups to 8 bits."""
    exact: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    if saturates():
        exact["LP_TRANSFORMS_MODE"] = "NO"
    options = {**exact, "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    return _core().compile_model(model, "CPU", options)


def saturates() -> bool:
    """Whether OpenVINO's products of bytes are not exact here: without VNNI it adds pairs of them in 16 bits, which saturate."""
    return platform.machine() in ("x86_64", "AMD64") and "avx512vnni" not in available_backends()


def _store(layer: LayerSpec, weight: QuantizedTensor, constant: Any) -> None:
    """Put the quantized weight in the place of a float constant."""
    import openvino
    from openvino import opset13 as ops

    scheme: Any = weight.scheme
    readers = list(constant.output(0).get_target_inputs())
    if isinstance(scheme, Float):
        values = in_layout(layer, weight.tensors["values"], constant.output(0).shape)
        value = ops.constant(values.float().numpy(), dtype=getattr(openvino.Type, FORMATS[values.dtype]))
        if values.dtype != torch.float32:
            value = ops.convert(value, "f32")
    else:
        codes, scales, zero_points = unpacked(weight, signed=scheme.bits == 8)
        # Behind a Reshape, convolutions would be computed in float32.
        by_row, shape = scales.shape[1] == 1, tuple(weight.shape)
        whole = shape if by_row else (shape[0], scales.shape[1], -1)
        ends = (1,) * (len(whole) - 2)
        dtype = getattr(openvino.Type, f"{'i' if codes.dtype == np.int8 else 'u'}{scheme.bits}")
        value = ops.convert(ops.constant(codes.reshape(whole), dtype=dtype), "f32")
        if codes.dtype != np.int8:
            zeros = np.full((1, 1), 2 ** (scheme.bits - 1), np.uint8) if zero_points is None else zero_points
            value = ops.subtract(value, ops.convert(ops.constant(zeros.reshape(*zeros.shape, *ends)), "f32"))
        scale = ops.constant(scales.reshape(*scales.shape, *ends))
        value = ops.multiply(value, scale if scales.dtype == np.float32 else ops.convert(scale, "f32"))
        if groups := n_swapped(layer, constant.output(0).shape):
            split = _reshaped(value, (groups, shape[0] // groups, *shape[1:]))
            swapped = ops.transpose(split, np.array([0, 2, 1, *range(3, 1 + len(shape))], dtype=np.int64))
            value = _reshaped(swapped, constant.output(0).shape)
        elif not by_row:
            value = _reshaped(value, shape)
    if scheme.input_format is not None:
        _round_inputs(constant, weight)
    value.set_friendly_name(f"{layer.name}.weight")
    for reader in readers:
        reader.replace_source_output(value.output(0))


def _reshaped(value: Any, shape: Sequence[int]) -> Any:
    from openvino import opset13 as ops

    return ops.reshape(value, np.array(shape, dtype=np.int64), special_zero=False)


def _round_inputs(constant: Any, weight: QuantizedTensor) -> None:
    """`FakeQuantize` in front of each product with the weight: codes and saturation are those of `IntegerInput`.

    OpenVINO's products of integers are exact for 256 levels, and not for the 255 of our codes: one is added, and cut off before.
    """
    from openvino import opset13 as ops

    scheme: Any = weight.scheme
    params, n_codes = weight.input_params, 256
    step, most = float(params["input_scale"]), scheme.input.largest_code
    if scheme.input.symmetric:
        low, high = -most - 1, most
        kept = (low + 1, high)
    else:
        low = -int(params["input_zero_point"])
        high = low + n_codes - 1
        kept = (low, low + most)
    for product in list(_products(constant)):
        x = product.input(0).get_source_output()
        ends = [np.float32(code * step) for code in (low, high)]
        rounded = ops.fake_quantize(ops.clamp(x, *(code * step for code in kept)), *ends, *ends, n_codes)
        product.input(0).replace_source_output(rounded.output(0))


def _products(node: Any) -> Iterator[Any]:
    """What reads a node, behind operators that only reshape it."""
    for target in node.output(0).get_target_inputs():
        reader = target.get_node()
        if reader.get_type_name() in PASSED:
            yield from _products(reader)
        else:
            yield reader

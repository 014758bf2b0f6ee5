"""Other libraries' products with quantized weights, for `bench_matmul.py`: ONNX Runtime's MatMulNBits and ggml's types.

    pip install -e ".[bench]"      ggml is part of llama-cpp-python, which pip builds from source

Each peer multiplies by copies of a weight float32 [rows, columns], quantized by the peer, on one thread or more. Peers that are
not installed are left out.
"""

import ctypes
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpsearch import kernels

GROUP_SIZE = 128
GGML_TYPES = {"ggml Q4_0": 2, "ggml Q4_K": 12, "ggml Q8_0": 8, "ggml Q2_K": 10, "ggml TQ2_0": 35}
# Peer -> the width, with int8 input, that it is compared with.
BITS = {"ORT b2": 2, "ORT b4": 4, "ORT b8": 8, "ggml Q4_0": 4, "ggml Q4_0 repacked": 4, "ggml Q4_K": 4, "ggml Q4_K repacked": 4}
BITS |= {"ggml Q8_0": 8, "ggml Q2_K": 2, "ggml TQ2_0": 2}

Run = Callable[[int], Tensor]  # multiplies by copy i of the weight
Product = tuple[Run, int]  # and how many copies there are


def absent() -> list[str]:
    """The packages that are not installed."""
    return [name for name in ("onnxruntime", "onnx", "llama_cpp") if importlib.util.find_spec(name) is None]


def peers(weight: Tensor, x: Tensor, copies: Callable[[float], int], n_threads: int) -> dict[str, Product]:
    """Products of x float32 [tokens, columns]; `copies(n_bytes)` is how many copies to make of a weight of that size."""
    products: dict[str, Product] = {}
    if not {"onnxruntime", "onnx"} & set(absent()):
        for bits in (2, 4, 8):
            products[f"ORT b{bits}"] = onnxruntime_product(weight, x, bits, copies(weight.numel() * bits / 8), n_threads)
    if "llama_cpp" not in absent() and weight.shape[1] % 32 == 0:
        ggml = Ggml()
        for name, kind in GGML_TYPES.items():
            if weight.shape[1] % 256 and kind not in (2, 8):
                continue  # these come in blocks of 256 columns
            for repacked in (False, True):
                product = ggml.product(weight, x, kind, repacked, copies, n_threads)
                if product is not None:
                    products[name + " repacked" * repacked] = product
    return products


def onnxruntime_product(weight: Tensor, x: Tensor, bits: int, n_copies: int, n_threads: int) -> Product:
    """One-node models with MatMulNBits at accuracy level 4 (int8 input), in groups of 128, asymmetric."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = weight.shape
    codes, scales, zero_points = kernels.quantize(
        weight, bits=bits, group_size=GROUP_SIZE, symmetric=False, scale_dtype=torch.float32
    )
    assert zero_points is not None
    n_groups = scales.shape[1]
    whole = torch.nn.functional.pad(zero_points, (0, -n_groups % 8))
    packed_zeros = kernels.pack(whole, bits).reshape(rows, -1)[:, : -(-n_groups * bits // 8)]
    arrays = {
        "B": kernels.pack(codes, bits).reshape(rows, n_groups, GROUP_SIZE * bits // 8).numpy(),
        "scales": scales.flatten().numpy(),
        "zeros": packed_zeros.flatten().numpy(),
    }
    node = helper.make_node(
        "MatMulNBits",
        ["x", *arrays],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=GROUP_SIZE,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", rows])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = n_threads, 1, 3
    sessions = [onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for _ in range(n_copies)]
    source = onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy())
    y = torch.empty(len(x), rows)
    bindings = []
    for session in sessions:
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", source)
        binding.bind_output("y", "cpu", 0, np.float32, list(y.shape), y.data_ptr())
        bindings.append(binding)

    def run(i: int) -> Tensor:
        sessions[i].run_with_iobinding(bindings[i])
        return y

    return run, n_copies


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The libraries inside llama-cpp-python, called through ctypes; `repacked` weights lie in the CPU's own layout."""

    def __init__(self) -> None:
        folder = Path(importlib.import_module("llama_cpp").__file__ or "").parent / "lib"
        self._libraries = [ctypes.CDLL(str(folder / f"lib{name}.so")) for name in ("ggml-base", "ggml-cpu")]

    def __call__(self, name: str, result: Any, *arguments: Any) -> Any:
        """Calls a C function; `arguments` are ctypes values."""
        library = next(library for library in self._libraries if hasattr(library, name))
        function = library[name]
        function.restype = result
        return function(*arguments)

    def _context(self, n_bytes: int, no_alloc: bool) -> ctypes.c_void_p:
        return ctypes.c_void_p(self("ggml_init", ctypes.c_void_p, _InitParams(n_bytes, None, no_alloc)))

    def _matrix(self, context: ctypes.c_void_p, kind: int, columns: int, rows: int) -> ctypes.c_void_p:
        sizes = (ctypes.c_int64(columns), ctypes.c_int64(rows))
        return ctypes.c_void_p(self("ggml_new_tensor_2d", ctypes.c_void_p, context, ctypes.c_int(kind), *sizes))

    def _repacking(self) -> ctypes.c_void_p | None:
        registry = ctypes.c_void_p(self("ggml_backend_cpu_reg", ctypes.c_void_p))
        device = ctypes.c_void_p(self("ggml_backend_reg_dev_get", ctypes.c_void_p, registry, ctypes.c_size_t(0)))
        name = b"ggml_backend_dev_get_extra_bufts"
        address = self("ggml_backend_reg_get_proc_address", ctypes.c_void_p, registry, ctypes.c_char_p(name))
        if not address:
            return None
        types = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        kinds: list[ctypes.c_void_p] = []
        while types and types[len(kinds)]:
            kinds.append(ctypes.c_void_p(types[len(kinds)]))
        return next((kind for kind in kinds if b"REPACK" in self("ggml_backend_buft_name", ctypes.c_char_p, kind)), None)

    def product(
        self, weight: Tensor, x: Tensor, kind: int, repacked: bool, copies: Callable[[float], int], n_threads: int
    ) -> Product | None:
        """`None` where this build does not repack the type."""
        rows, columns = weight.shape
        n_bytes = rows * self("ggml_row_size", ctypes.c_size_t, ctypes.c_int(kind), ctypes.c_int64(columns))
        quantized = torch.empty(n_bytes, dtype=torch.uint8)
        source, none = ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(0)
        sizes = (ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(columns))
        data = ctypes.c_void_p(quantized.data_ptr())
        self("ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int(kind), source, data, *sizes, none)
        buffer_type = self._repacking() if repacked else None
        if repacked and (buffer_type is None or kind not in (2, 12)):
            return None
        backend = ctypes.c_void_p(self("ggml_backend_cpu_init", ctypes.c_void_p))
        self("ggml_backend_cpu_set_n_threads", None, backend, ctypes.c_int(n_threads))
        graphs: list[ctypes.c_void_p] = []
        results: list[Tensor] = []
        for _ in range(copies(n_bytes)):
            context = self._context(1 << 20 if repacked else n_bytes + (1 << 20), repacked)
            tensor = self._matrix(context, kind, columns, rows)
            if repacked:
                self("ggml_backend_alloc_ctx_tensors_from_buft", ctypes.c_void_p, context, buffer_type)
                self("ggml_backend_tensor_set", None, tensor, data, ctypes.c_size_t(0), ctypes.c_size_t(n_bytes))
            else:
                ctypes.memmove(self("ggml_get_data", ctypes.c_void_p, tensor), quantized.data_ptr(), n_bytes)
            work = self._context((x.numel() + len(x) * rows) * 4 + (1 << 20), False)
            inputs = self._matrix(work, 0, columns, len(x))
            ctypes.memmove(self("ggml_get_data", ctypes.c_void_p, inputs), x.data_ptr(), x.numel() * 4)
            result = ctypes.c_void_p(self("ggml_mul_mat", ctypes.c_void_p, work, tensor, inputs))
            graph = ctypes.c_void_p(self("ggml_new_graph", ctypes.c_void_p, work))
            self("ggml_build_forward_expand", None, graph, result)
            graphs.append(graph)
            y = (ctypes.c_float * (len(x) * rows)).from_address(self("ggml_get_data", ctypes.c_void_p, result))
            results.append(torch.frombuffer(y, dtype=torch.float32))
        compute = self._libraries[0].ggml_backend_graph_compute

        def run(i: int) -> Tensor:
            compute(backend, graphs[i])
            return results[i]

        return run, len(graphs)

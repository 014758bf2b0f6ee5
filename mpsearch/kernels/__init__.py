"""The compiled kernels: quantizing and packing weights, products and convolutions with packed weights, rotation.

Tensors take the fastest backend that this machine has. Devices other than the CPU and NVIDIA's GPUs take `reference`, which is
plain PyTorch and the specification. Where a compiled module is missing everything runs on `reference`, after one warning;
`MPSEARCH_REQUIRE_KERNELS=1` makes that an `ImportError`.
"""

from mpsearch.kernels.backends import active_backend, available_backends, use_backend
from mpsearch.kernels.convolution import conv, conv_a8
from mpsearch.kernels.feedback import round_with_feedback
from mpsearch.kernels.formats import ConvFormat, WeightFormat
from mpsearch.kernels.half_quadratic import half_quadratic
from mpsearch.kernels.joint import round_jointly
from mpsearch.kernels.packed_conv import PackedConv, pack_conv, unpack_conv
from mpsearch.kernels.packed_weight import MOST_GROUP_COLUMNS, PackedWeight, pack_weight, unpack_weight
from mpsearch.kernels.products import embedding, linear, linear_a8
from mpsearch.kernels.quantization import dequantize, pack, quantize, unpack
from mpsearch.kernels.rotation import blocks_of, rotate

__all__ = [
    "MOST_GROUP_COLUMNS",
    "ConvFormat",
    "PackedConv",
    "PackedWeight",
    "WeightFormat",
    "active_backend",
    "available_backends",
    "blocks_of",
    "conv",
    "conv_a8",
    "dequantize",
    "embedding",
    "half_quadratic",
    "linear",
    "linear_a8",
    "pack",
    "pack_conv",
    "pack_weight",
    "quantize",
    "rotate",
    "round_jointly",
    "round_with_feedback",
    "unpack",
    "unpack_conv",
    "unpack_weight",
    "use_backend",
]

"""Convolutions on packed weights against PyTorch's."""

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator

import torch
from harness import Row, benchmark, compared, interleaved
from networks import packed_copy
from torch import Tensor, nn

from mpsearch.graph.fold import fold_batch_norms
from mpsearch.models.resnet import resnet
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer

FLOAT, INT8 = "torch float32", "torch int8"
SCALE = 0.03  # of quantized inputs
INPUTS = {"": None, "a8": IntegerInput(8, "token"), "a8 static": IntegerInput(8, "static")}
# name: in channels, out channels, height and width of the input, kernel, stride, groups
LAYERS = {
    "resnet20 stem 3x3 3-16 @32": (3, 16, 32, 3, 1, 1),
    "resnet20 3x3 16-16 @32": (16, 16, 32, 3, 1, 1),
    "resnet20 3x3/2 16-32 @32": (16, 32, 32, 3, 2, 1),
    "resnet20 3x3 32-32 @16": (32, 32, 16, 3, 1, 1),
    "resnet20 3x3/2 32-64 @16": (32, 64, 16, 3, 2, 1),
    "resnet20 3x3 64-64 @8": (64, 64, 8, 3, 1, 1),
    "3x3 64-64 @56": (64, 64, 56, 3, 1, 1),
    "1x1 256-64 @56": (256, 64, 56, 1, 1, 1),
    "7x7/2 3-64 @224": (3, 64, 224, 7, 2, 1),
    "depthwise 3x3 128 @28": (128, 128, 28, 3, 1, 128),
    "depthwise 5x5 128 @28": (128, 128, 28, 5, 1, 128),
}


def torch_int8(layer: nn.Conv2d, x: Tensor) -> Callable[[], Tensor]:
    """PyTorch's int8 convolution (fbgemm), without quantizing its input and dequantizing its result."""
    warnings.filterwarnings("ignore", message="torch.quantize_per")  # deprecated; the convolution is what is measured
    weight, zeros = layer.weight.detach(), torch.zeros(layer.out_channels, dtype=torch.int64)
    quantized = torch.quantize_per_channel(weight, weight.abs().flatten(1).amax(1) / 127, zeros, 0, torch.qint8)
    options = (layer.stride, layer.padding, layer.dilation, layer.groups)
    prepacked = torch.ops.quantized.conv2d_prepack(quantized, layer.bias.detach(), *options)
    inputs = torch.quantize_per_tensor(x, SCALE, 128, torch.quint8).contiguous(memory_format=torch.channels_last)
    return lambda: torch.ops.quantized.conv2d(inputs, prepacked, 0.1, 128)


@benchmark(
    "conv",
    layer=(*LAYERS, "resnet20, the whole network"),
    batch=(1, 64),
    threads=(1, 2),
    seconds=(0.2,),
    quick={"layer": ("resnet20 3x3 64-64 @8",), "batch": (1,), "threads": (1,), "seconds": (0.001,)},
)
def conv(layer: str, batch: int, seconds: float) -> Iterator[Row]:
    """Convolutions with packed weights of 4 and 8 bits against PyTorch's float32 and int8 ones, interleaved in this process.

    Per-channel float16 scales; inputs float32 (`w4`), or quantized to int8 with a scale for each sample (`a8`) or a static
    one. Of PyTorch's float32 convolution the faster of contiguous and channels-last counts.
    """
    torch.manual_seed(0)
    torch.backends.quantized.engine = "fbgemm"
    if layer in LAYERS:
        n_in, n_out, size, kernel, stride, groups = LAYERS[layer]
        model: nn.Module = nn.Sequential(nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups)).eval()
    else:
        model, n_in, size = resnet(20).eval(), 3, 32
        fold_batch_norms(model, lambda model, x: model(x), torch.randn(1, 3, 32, 32))
    x = torch.randn(batch, n_in, size, size)
    last, x_last = copy.deepcopy(model).to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], object]] = {FLOAT: lambda: model(x), "channels_last": lambda: last(x_last)}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    for bits, (inputs, scheme) in itertools.product((4, 8), INPUTS.items()):
        calls[f"w{bits}{inputs}"] = functools.partial(packed_copy(model, dict.fromkeys(names, Integer(bits, input=scheme))), x)
    if layer in LAYERS:
        calls[INT8] = torch_int8(model[0], x)
    with torch.inference_mode():
        times = interleaved(calls, seconds)
    times[FLOAT] = min(times[FLOAT], times.pop("channels_last"))
    yield from compared(times, [name for name in (FLOAT, INT8) if name in times])

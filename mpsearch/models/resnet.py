"""The CIFAR ResNets (He et al. 2015, https://arxiv.org/abs/1512.03385, section 4.2).

Three stages of 16, 32 and 64 channels; shortcuts are "option A", without parameters: where the shape changes they take
every second pixel and pad the channels with zeros. Parameter names are those of the widely used akamaster checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.errors import check_choice
from mpsearch.models.base import load_weights

# depth = 6 n + 2: three stages of n blocks of two convolutions, the stem and the classifier.
DEPTHS = (20, 32, 44, 56)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride = stride
        self.pad = (c_out - c_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c_in, h, w]` -> `[n, c_out, h / stride, w / stride]`."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))

    def skip(self, x: Tensor) -> Tensor:
        """The shortcut."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x


class ResNet(nn.Module):
    """Images float32 [n, 3, 32, 32] -> logits [n, 10]."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        n_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(n_blocks, 16, 16, stride=1)
        self.layer2 = _stage(n_blocks, 16, 32, stride=2)
        self.layer3 = _stage(n_blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, 10]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(n_blocks: int, c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(c_in, c_out, stride), *(Block(c_out, c_out, 1) for _ in range(n_blocks - 1)))


def resnet(depth: int, weights: str | Path | None = None) -> ResNet:
    """A CIFAR ResNet in eval mode.

    Parameters
    ----------
    depth
        20, 32, 44 or 56.
    weights
        A `.safetensors` file; `None`: untrained.

    Raises
    ------
    InputError
        For another depth, and for weights that are not this network's.
    """
    check_choice("depth of a CIFAR ResNet", depth, DEPTHS)
    return load_weights(ResNet(depth), weights)

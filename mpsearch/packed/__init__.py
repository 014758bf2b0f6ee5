"""Packed models: weights stored as codes and run by the compiled kernels.

Linear, Conv1d, Conv2d (strides, padding, dilation, groups, depthwise) and Embedding have kernels for integer schemes of 1 to 8
bits, with float32 inputs or inputs of 2 to 8 bits (8 asymmetric ones where static). Other layers and schemes (transposed and 3-D
convolutions, float, codebook and outlier schemes, wider inputs, modules with their own `forward`) are dequantized on every call:
correct and small, but slow. `mpsearch hardware` and the report say where.

In a program with several threads, set `GOMP_SPINCOUNT=3000` in the environment, as the command `mpsearch` does: otherwise
threads of PyTorch's OpenMP spin for milliseconds after each operation on the cores that the kernels need next.
"""

from mpsearch.packed.model import load, save

__all__ = ["load", "save"]

"""Bias correction (Nagel et al. 2019, section 4.2, https://arxiv.org/abs/1906.04721): mean outputs stay where a layer has a bias.

A quantized weight W + dW shifts the mean output by dW E[x], and a quantized input by (W + dW) E[q(x) - x]. Both are subtracted
from the bias, which costs no byte.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.engine.calibrate import Calibration
from mpsearch.errors import InputError
from mpsearch.graph.products import Product
from mpsearch.layer import LayerSpec, weight_rows
from mpsearch.schemes.base import QuantizedTensor, QuantScheme
from mpsearch.schemes.input import InputFormat


class BiasCorrection:
    """Computes corrected biases from the calibration data; mean shifts of quantized inputs are kept for each input format."""

    def __init__(self, model: nn.Module, calibration: Calibration) -> None:
        self.model, self.calibration = model, calibration
        self._shifts: dict[InputFormat, dict[str, Tensor]] = {}

    def biases(self, layer: LayerSpec, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Module name -> corrected bias, float32 `[out]`, of the layer's modules that have a bias and were calibrated."""
        corrected: dict[str, Tensor] = {}
        modules: dict[str, Any] = {n: self.model.get_submodule(n) for n in layer.modules if n in self.calibration.moments}
        modules = {name: module for name, module in modules.items() if getattr(module, "bias", None) is not None}
        if not modules:
            return {}
        rows, shifts = weight_rows(self.model.get_submodule(layer.name)).float().cpu(), self._input_shifts(weight.scheme)
        change = weight.dequantize() - rows
        for name, module in modules.items():
            shift = _mean_product(change, self.calibration.moments[name].mean.double())
            if name in shifts:  # what is never negative is not rounded down as often as up
                shift += _mean_product(change + rows, shifts[name])
            corrected[name] = (module.bias.detach().cpu().double() - shift).float()
        return corrected

    def _input_shifts(self, scheme: QuantScheme) -> dict[str, Tensor]:
        """Module name -> E[q(x)] - E[x] of its input in the scheme, by one pass over the calibration data for all layers."""
        input_format = scheme.input_format
        if input_format is None:
            return {}
        if input_format not in self._shifts:
            moments = self.calibration.moments
            params: dict[str, dict[str, Tensor]] = {}
            for name in (name for layer in self.calibration.layers for name in layer.modules if name in moments):
                with suppress(InputError):  # no static range: the error is raised where that layer is quantized
                    params[name] = input_format.stored(moments[name].for_scheme(scheme).histogram)

            def quantize(name: str, product: Product) -> Tensor:
                n_inner = len(product.kernel) + 1 if product.kernel else 1
                return input_format.fake_quantize(product.input.float(), n_inner, params[name])

            self._shifts[input_format] = self.calibration.mean_shifts(list(params), quantize)
        return self._shifts[input_format]


def _mean_product(weight: Tensor, mean: Tensor) -> Tensor:
    """float64 `[rows]`: rows, the first dimension of `weight`, times the mean `[k, columns]` of what meets their columns."""
    return torch.einsum("krc,kc->kr", weight.double().reshape(len(mean), -1, mean.shape[1]), mean).flatten()

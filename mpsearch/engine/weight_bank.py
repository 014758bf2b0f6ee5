"""The weight bank: every (layer, scheme) is quantized once and kept, as stored, in the run's files or in memory.

Weights of large networks are read from mapped files, whose pages the operating system drops where memory is short. Dense copies,
which are swapped into the model, are in memory as long as it allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.allocation import SearchSpace
from mpsearch.engine.bias_correction import BiasCorrection
from mpsearch.engine.calibrate import Calibration
from mpsearch.engine.fisher_blocks import fisher_blocks
from mpsearch.engine.recent import Recent
from mpsearch.engine.weight_files import WeightFiles
from mpsearch.errors import InputError
from mpsearch.layer import LayerSpec, from_rows, weight_rows
from mpsearch.memory import trim
from mpsearch.quantizers.base import InputMoments, Quantizer
from mpsearch.schemes.base import QuantizedTensor, QuantScheme
from mpsearch.schemes.floating import Float

Key = tuple[str, str]  # (layer, scheme)
Swaps = list[tuple[Tensor, Tensor]]
FLOAT_SHARE = 0.25  # of the memory for dense copies: for weights in 16 bits, which are rounded again in no time


class WeightBank:
    """Quantized weights and corrected biases of the float `model`.

    Parameters
    ----------
    model, space
        The float model, its searched layers and their schemes.
    quantizers
        Scheme name -> its quantizer.
    calibration
        What quantizers may ask of the data.
    correction
        Corrects biases; `None` leaves them as they are.
    files
        Where weights and biases are also kept; `None` for memory alone.
    dense_max_bytes
        Limit on the dense copies in memory; a share of it, `FLOAT_SHARE`, limits weights in float formats. Where it
        is less than all layers take in all schemes, stored weights stay in their files.
    weights, biases
        What is known already, as from training. It is not in the files, and not written to them.
    """

    def __init__(
        self,
        model: nn.Module,
        space: SearchSpace,
        quantizers: Mapping[str, Quantizer],
        calibration: Calibration,
        correction: BiasCorrection | None = None,
        *,
        files: WeightFiles | None = None,
        dense_max_bytes: int = 2 * 10**9,
        weights: Mapping[Key, QuantizedTensor] | None = None,
        biases: Mapping[Key, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.model, self.space, self.quantizers, self.calibration = model, space, quantizers, calibration
        self.correction, self.files, self.dense_max_bytes = correction, files, dense_max_bytes
        self._layers = {layer.name: layer for layer in space.layers}
        self._weights = dict(weights or {})
        self._biases = {key: dict(of_modules) for key, of_modules in (biases or {}).items()}
        self._given = frozenset(self._weights)
        self._latest: tuple[tuple[str, bool], InputMoments | None] | None = None
        self._floats: Recent[QuantizedTensor] = Recent(int(FLOAT_SHARE * dense_max_bytes))
        self._dense: Recent[Swaps] = Recent(dense_max_bytes)

    def with_weights(self, weights: Mapping[Key, QuantizedTensor], biases: Mapping[Key, Mapping[str, Tensor]]) -> WeightBank:
        """A bank that has these weights and biases already, and quantizes all others as this one does."""
        parts = self.model, self.space, self.quantizers, self.calibration, self.correction
        limit = self.dense_max_bytes
        return WeightBank(*parts, files=self.files, dense_max_bytes=limit, weights=weights, biases=biases)

    @property
    def dense_bytes(self) -> int:
        """The bytes of the dense copies in memory."""
        return self._dense.n_bytes

    @property
    def holds_all(self) -> bool:
        """Whether the limit allows the dense copies of all layers in all schemes."""
        return 4 * self.space.numel * len(self.space.schemes) <= self.dense_max_bytes

    def release(self) -> None:
        """Let go of matrices that were derived to quantize, and of dense copies: what the next phase does not need."""
        self._latest = None
        self._dense.clear()
        self.calibration.release()
        trim()

    def quantized(self, layer: str, scheme: str) -> QuantizedTensor:
        """The layer's weight in the scheme; quantized at the first call, unless the files have it."""
        key = (layer, scheme)
        weight = self._weights.get(key) or self._floats.get(key)
        if weight is not None:
            return weight
        spec, scheme_object = self._layers[layer], self.space.schemes[scheme]
        about = layer, scheme, scheme_object, spec.shape
        weight = None if self.files is None else self.files.read(*about)
        if weight is None:
            weight = self._quantize(spec, scheme)
            if self.files is not None and self.files.write(layer, scheme, weight):
                weight = self.files.read(*about) or weight
            elif isinstance(scheme_object, Float):
                return self._floats.put(key, weight, weight.nbytes)
        if self.files is not None and self.holds_all:
            weight = replace(weight, tensors={name: tensor.clone() for name, tensor in weight.tensors.items()})
        self._weights[key] = weight
        return weight

    def biases(self, layer: str, scheme: str) -> dict[str, Tensor]:
        """Module name -> corrected bias (float32 `[out]`) of the layer in the scheme; empty if none is corrected."""
        key = (layer, scheme)
        if key not in self._biases:
            self._biases[key] = {} if self.correction is None else self._corrected(self.correction, key)
        return self._biases[key]

    def dense(self, layer: str, scheme: str, *, keep: bool = True) -> Swaps:
        """(parameter, its dense value in the scheme) of the layer's weight and corrected biases.

        With `keep` in memory as long as it allows; who goes through all of them again and again keeps none, or all.
        """
        key = (layer, scheme)
        kept = self._dense.get(key)
        if kept is not None:
            return kept
        module: Any = self.model.get_submodule(layer)
        weight, own = from_rows(module, self.quantized(layer, scheme).dequantize()), module.weight.detach()
        # In the parameter's own memory format: another one would run other kernels, and score other last bits than an export.
        if (weight.stride(), weight.dtype, weight.device) != (own.stride(), own.dtype, own.device):
            weight = torch.empty_like(own).copy_(weight)
        values = [(module.weight, weight)]
        for name, bias in self.biases(layer, scheme).items():
            parameter: Any = self.model.get_submodule(name).bias
            values.append((parameter, bias.to(parameter.device)))
        return self._dense.put(key, values, sum(value.nbytes for _, value in values)) if keep else values

    def _quantize(self, layer: LayerSpec, scheme: str) -> QuantizedTensor:
        quantizer = self.quantizers[scheme]
        try:
            weight = weight_rows(self.model.get_submodule(layer.name)).float().cpu()
            self._check_input(layer, scheme, self.calibration.input_moments(layer))
            needs_hessian = needs_hessians(quantizer, self.space.schemes[scheme])
            return quantizer.quantize(weight, self.space.schemes[scheme], self._moments(layer, needs_hessian))
        except InputError as error:
            raise InputError(f"Layer '{layer.name}' in scheme '{scheme}': {error}") from error

    def work(self, layer: str, scheme: str) -> float:
        """About how many multiplications `quantized` takes; 0 where the weight is known."""
        if (layer, scheme) in self._weights or (layer, scheme) in self._floats:
            return 0.0
        module: Any = self.model.get_submodule(layer)
        rows, k = len(weight_rows(module)), getattr(module, "groups", 1)
        n_blocks = fisher_blocks(rows // k)
        return n_blocks * self.quantizers[scheme].work(rows // k // n_blocks, self._layers[layer].numel // rows, k)

    def _moments(self, layer: LayerSpec, with_hessian: bool) -> InputMoments | None:
        """The layer's moments, the same object from one scheme to the next: what was derived from them is not derived again."""
        key = layer.name, with_hessian
        if self._latest is None or self._latest[0] != key:
            self._latest = None  # frees the memory first
            trim()
            centred = self.correction is not None
            calibration = self.calibration
            moments = calibration.with_hessian(layer, centred=centred) if with_hessian else calibration.input_moments(layer)
            self._latest = key, moments
        return self._latest[1]

    def _check_input(self, layer: LayerSpec, scheme: str, moments: InputMoments | None) -> None:
        input_format = self.space.schemes[scheme].input_format
        if input_format is not None and input_format.has_static_scale and moments is None and layer.kind != "embedding":
            raise InputError(
                "its input was not calibrated (the module runs a forward of its own, or the calibration data do not reach it), "
                "so that it has no static range. Use input.scale=token, or pin the layer to another scheme."
            )

    def _corrected(self, correction: BiasCorrection, key: Key) -> dict[str, Tensor]:
        layer = self._layers[key[0]]
        if all(getattr(self.model.get_submodule(name), "bias", None) is None for name in layer.modules):
            return {}
        files = None if key in self._given else self.files
        biases = None if files is None else files.read_biases(*key)
        if biases is None:
            biases = correction.biases(layer, self.quantized(*key))
            if files is not None:
                files.write_biases(*key, biases)
        return biases


def needs_hessians(quantizer: Quantizer, scheme: QuantScheme) -> bool:
    """Whether a weight in the scheme depends on a Hessian: rounding to a float format does not."""
    return quantizer.needs_hessian and not isinstance(scheme, Float)

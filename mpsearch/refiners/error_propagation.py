"""Layers are quantized in forward order, each towards the output that the float model has, from the inputs that it really gets.

For each layer the float model and a copy, in which all layers before it are quantized, run on the calibration data; what its
weight should be is a regression (`targets.py`), which the run's quantizer rounds with the Hessian of the quantized inputs and the
output Fisher of the float model. The bias makes the mean outputs agree; static ranges are those of the quantized inputs.

Layers of which no product is seen, or several in one run of the model, or whose weight several modules own, keep the weight of
the bank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.allocation import Allocation
from mpsearch.engine.engine import QuantEngine
from mpsearch.engine.weight_files import WeightFiles
from mpsearch.errors import InputError
from mpsearch.graph.products import Product
from mpsearch.layer import LayerSpec, weight_rows
from mpsearch.progress import phase
from mpsearch.quantizers.base import InputMoments
from mpsearch.refiners.base import Refined, Refinement, Refiner, read_refined, write_refined
from mpsearch.refiners.paired import PairedModels, Stage
from mpsearch.refiners.targets import Regression, Sums, held_out
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.rotated import Rotated

DAMPINGS = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class ErrorPropagation(Refiner):
    """Regression towards the float outputs, layer by layer.

    Parameters
    ----------
    damping
        As a share of the mean of the Hessian's diagonal; `None`: that of `DAMPINGS` with the least error on held-out samples.
    step
        How much of the way to the regression's weight is gone, from 0 to 1; `None`: as held-out samples say. With 0 only the
        inputs are propagated, as GPTQ does.
    residuals
        Whether a layer whose output is added to another tensor makes up for the error of that too.
    n_positions
        Output positions of each layer, as a multiple of its columns, that statistics are taken of, at most.
    """

    damping: float | None = None
    step: float | None = None
    residuals: bool = True
    n_positions: float = 32.0

    def __post_init__(self) -> None:
        if self.damping is not None and not self.damping > 0:
            raise InputError(f"damping must be a number above 0, or null; got {self.damping}.")
        if self.step is not None and not 0 <= self.step <= 1:
            raise InputError(f"step must be from 0 to 1, or null; got {self.step}.")
        if self.n_positions < 2:
            raise InputError(f"n_positions must be 2 or more, else the regression has no solution; got {self.n_positions}.")

    def start(self, engine: QuantEngine) -> Refinement:
        """Finds the order of the layers."""
        return Propagation(self, engine)


class Propagation:
    """Refines allocations of one engine; see `refiners.base.Refinement`."""

    def __init__(self, settings: ErrorPropagation, engine: QuantEngine) -> None:
        self.settings, self.engine = settings, engine
        prefix_max_bytes = 0 if engine.prefix_cache is None else engine.prefix_cache.max_bytes
        self.models = PairedModels(engine, settings.n_positions, prefix_max_bytes)
        self.stages = self.models.stages()
        self._last: tuple[dict[str, str], dict[str, Refined]] = {}, {}  # schemes and weights of the allocation before

    def __call__(self, allocation: Allocation, files: WeightFiles | None = None) -> QuantEngine:
        """See `refiners.base.Refinement`."""
        schemes = {layer.name: scheme for layer, scheme in self.engine.space.layer_schemes(allocation)}
        known: dict[str, Refined] = {}
        staged = {layer.name for stage in self.stages for layer in stage.layers}
        self.models.restart()
        self.engine.release()

        def keep(layer: LayerSpec, refined: Refined, *, is_new: bool) -> None:
            scheme = schemes[layer.name]
            known[layer.name] = refined
            self.models.place(layer, scheme, *refined)
            if is_new:
                write_refined(layer, scheme, refined, files)

        for layer in self.engine.space.layers:
            if layer.name not in staged:
                scheme = schemes[layer.name]
                banked = self.engine.quantized(layer.name, scheme), self.engine.biases(layer.name, scheme)
                keep(layer, banked, is_new=read_refined(self.engine, layer, scheme, files) is None)
        before, refined = self._last  # what follows the same layers in the same schemes is the same
        same = all(before.get(la.name) == schemes[la.name] for la in self.engine.space.layers if la.name not in staged)
        with phase("refine", len(staged)) as advance:
            for stage in self.stages:
                read = {la.name: read_refined(self.engine, la, schemes[la.name], files) for la in stage.layers}
                same = same and all(before.get(la.name) == schemes[la.name] for la in stage.layers)
                is_new = None in read.values()
                new = (refined if same else dict(self._refined(stage, schemes))) if is_new else read
                for layer in stage.layers:
                    keep(layer, new[layer.name], is_new=is_new)  # type: ignore[arg-type]
                    advance(layer.name)
        self.models.restart()
        self._last = schemes, known
        weights = {(name, schemes[name]): weight for name, (weight, _) in known.items()}
        biases = {(name, schemes[name]): by_module for name, (_, by_module) in known.items()}
        return self.engine.with_weights(weights, biases)

    def _refined(self, stage: Stage, schemes: dict[str, str]) -> Iterator[tuple[str, Refined]]:
        """Layer -> its weight and biases, of the layers of a stage."""
        objects = {la.name: self.engine.space.schemes[schemes[la.name]] for la in stage.layers}
        histograms = self._histograms(stage, schemes)
        formats = {name: scheme.input_format for name, scheme in objects.items()}
        params = {name: f.stored(histograms.get(name)) for name, f in formats.items() if f is not None}

        def with_quantized_input(name: str, product: Product) -> Product:
            if (input_format := formats[name]) is None:
                return product
            n_inner = len(product.kernel) + 1 if product.kernel else 1
            return replace(product, input=input_format.fake_quantize(product.input.float(), n_inner, params[name]))

        sums = {la.name: (Sums(), Sums()) for la in stage.layers}
        for i, pairs in enumerate(self.models.pairs(stage, with_quantized_input)):
            for name, (wanted, given) in pairs.items():
                if not self.settings.residuals:
                    wanted = replace(wanted, residual=None)
                sums[name][i % 2].add(wanted, given)
        for layer in stage.layers:
            yield layer.name, self._layer(layer, schemes[layer.name], sums[layer.name], histograms.get(layer.name))

    def _histograms(self, stage: Stage, schemes: dict[str, str]) -> dict[str, Histogram]:
        """Of the (rotated) inputs that have a static range, by one pass over the data where there is one."""
        objects = {la.name: self.engine.space.schemes[schemes[la.name]] for la in stage.layers}
        static = {name for name, scheme in objects.items() if scheme.input_format and scheme.input_format.has_static_scale}
        histograms: dict[str, Histogram] = {}

        def see(name: str, product: Product) -> None:
            if name in static:
                x = kernels.rotate(product.input) if isinstance(objects[name], Rotated) else product.input
                new = Histogram.from_values(x)
                histograms[name] = Histogram.merged([histograms[name], new]) if name in histograms else new

        if static:
            self.models.see_inputs(stage, see)
        return histograms

    def _layer(self, layer: LayerSpec, scheme: str, halves: tuple[Sums, Sums], histogram: Histogram | None) -> Refined:
        """The layer's weight, quantized from its target, and its bias; those of the bank where nothing was seen of it."""
        bank = self.engine.bank
        module: Any = self.engine.model.get_submodule(layer.name)
        if not halves[0].n:
            return bank.quantized(layer.name, scheme), bank.biases(layer.name, scheme)
        rows, bias = weight_rows(module).float().cpu(), getattr(module, "bias", None)
        centred = bias is not None and bank.correction is not None
        weight = rows.reshape(len(halves[0].parts["mean"]), -1, rows[0].numel()).double()
        quantizer = bank.quantizers[scheme]
        fisher = bank.calibration.output_fisher(layer) if quantizer.needs_fisher else None
        regression = Regression.from_sums(halves[0].merged(halves[1]), weight, centred=centred)
        parts = [Regression.from_sums(half, weight, centred=centred) for half in halves if half.n]
        dampings = DAMPINGS if self.settings.damping is None else (self.settings.damping,)
        damping, step = held_out(parts, dampings, None if fisher is None else fisher.double(), self.settings.step)
        target = weight + step * regression.change(damping) if step else weight
        moments = self._moments(regression, scheme, histogram, fisher, centred=centred)
        quantized = quantizer.quantize(target.float().reshape(rows.shape), self.engine.space.schemes[scheme], moments)
        if bias is None or not centred:
            return quantized, {}
        stored = quantized.dequantize().reshape(weight.shape).double()
        outputs = torch.einsum("krc,kc->kr", weight, regression.float_mean) + regression.residual_mean
        shift = outputs - torch.einsum("krc,kc->kr", stored, regression.mean)
        return quantized, {layer.modules[0]: (bias.detach().cpu().double() + shift.flatten()).float()}

    def _moments(
        self, regression: Regression, scheme: str, histogram: Histogram | None, fisher: Tensor | None, *, centred: bool
    ) -> InputMoments:
        """The moments of the copy's input, for the quantizer."""
        mean = torch.zeros_like(regression.mean) if centred else regression.mean
        hessian = regression.hessian.float()
        second = hessian.diagonal(dim1=1, dim2=2).contiguous()
        moments = InputMoments(mean.float(), second, hessian=hessian, fisher=fisher)
        target = self.engine.space.schemes[scheme]
        if histogram is None:
            return moments
        if not isinstance(target, Rotated):
            return replace(moments, histogram=histogram)
        rotated = replace(moments.for_scheme(target), histogram=histogram, hessian=None, fisher=None)
        return replace(moments, histogram=histogram, rotated=rotated)

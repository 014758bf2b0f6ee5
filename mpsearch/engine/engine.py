"""The quantization engine: quantize each (layer, scheme) once, swap an allocation in, score it, swap back.

The *weight bank* keeps what was quantized, packed as it is stored; dense copies are kept beside while `bank_max_bytes` allows.
An allocation is then a matter of pointers, and a score one forward pass over a split, from where it differs from earlier ones.
"""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.engine.calibrate import fisher_bytes, hessian_bytes, hessians, mean_shifts, output_fishers
from mpsearch.engine.prefix_cache import PrefixCache
from mpsearch.engine.scoring import score_outputs
from mpsearch.engine.weight_files import Bank
from mpsearch.errors import InputError
from mpsearch.evaluation import Score
from mpsearch.graph.products import Product
from mpsearch.graph.surgery import cloned_inputs, quantize_input, swapped_data
from mpsearch.graph.trace import overwritten_inputs
from mpsearch.layer import check_finite, from_rows, weight_rows
from mpsearch.quality import Quality
from mpsearch.quantizers.base import InputMoments, Quantizer
from mpsearch.schemes.base import QuantizedTensor
from mpsearch.schemes.input import InputFormat
from mpsearch.tasks.base import Task
from mpsearch.tree import map_tensors

FLOAT = Allocation()


class QuantEngine:
    """Scores allocations of `space` on the float `model`, which is left bitwise as it was found.

    `quantizers` maps every scheme's name to its quantizer, `moments` the modules' names to what calibration found. With
    `bias_correction` a layer that has a bias gets the shift of its mean output, dW E[x], taken off that bias (Nagel et al. 2019,
    section 4.2), and that of a quantized input, W' E[q(x) - x]: it costs no byte. What was quantized is kept in the `bank`, too,
    where there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        space: SearchSpace,
        quantizers: Mapping[str, Quantizer],
        moments: Mapping[str, InputMoments],
        *,
        bias_correction: bool = True,
        bank_max_bytes: int = 2 * 10**9,
        hessian_max_bytes: int = 2 * 10**9,
        prefix_max_bytes: int = 10**9,
        device: str = "cpu",
        bank: Bank | None = None,
    ) -> None:
        self.model, self.task, self.space, self.bank = model, task, space, bank
        self.quality = Quality(task.quality_name, task.quality_kind)
        self.quantizers, self.moments = quantizers, moments
        self.bias_correction, self.bank_max_bytes, self.device = bias_correction, bank_max_bytes, device
        self.hessian_max_bytes = hessian_max_bytes
        self._prefix = PrefixCache(model, task, space, prefix_max_bytes)
        self._layers = {layer.name: layer for layer in space.layers}
        self._members = {group.name: group.layers for group in space.groups}
        self._modules: dict[str, list[Any]] = {la.name: [model.get_submodule(name) for name in la.modules] for la in space.layers}
        self._packed: dict[tuple[str, str], QuantizedTensor] = {}
        self._biases: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._dense: OrderedDict[tuple[str, str], list[tuple[Tensor, Tensor]]] = OrderedDict()
        self._dense_bytes = 0
        self._hessians: dict[str, Tensor | None] = {}
        self._fishers: dict[str, Tensor] = {}
        self._overwritten: tuple[str, ...] | None = None
        self._n_applied = 0  # allocations that are swapped in just now
        self._needs_fisher = any(quantizer.needs_fisher for quantizer in quantizers.values())
        self._shifts: dict[InputFormat, dict[str, Tensor]] = {}
        self._batches: dict[str, list[tuple[Any, Tensor]]] = {}
        self._float_logits: dict[str, Tensor] = {}
        self._scores: dict[tuple[Allocation, str], Score] = {}
        for layer in space.layers:
            check_finite(layer.name, self._modules[layer.name][0].weight)
        self.divergence = task.chosen_divergence(model, self.batches("calibration"))[0]

    def batches(self, split: str) -> list[tuple[Any, Tensor]]:
        """The split's (inputs, targets), on the engine's device; an `InputError` where it is empty."""
        if split not in self._batches:
            self._batches[split] = load_batches(self.task, split, self.device)
        return self._batches[split]

    @contextmanager
    def own_inputs(self) -> Iterator[None]:
        """While the block runs, layers whose input the network writes into later (`inplace.py`) read a copy of it."""
        if self._overwritten is None:
            inputs, names = self.batches("calibration")[0][0], [name for layer in self.space.layers for name in layer.modules]
            self._overwritten = overwritten_inputs(self.model, names, lambda: self.task.forward(self.model, inputs))
        with cloned_inputs(self.model, self._overwritten):
            yield

    def quantized(self, layer: str, scheme: str) -> QuantizedTensor:
        """The layer's weight in the scheme, from the bank; quantized at the first call."""
        key = (layer, scheme)
        if key not in self._packed:
            found = self.bank and self.bank.read(layer, scheme, self.space.schemes[scheme], self._layers[layer].shape)
            self._packed[key] = found or self._quantize(layer, scheme)
        return self._packed[key]

    def _quantize(self, layer: str, scheme: str) -> QuantizedTensor:
        """By the scheme's quantizer, with what calibration found."""
        try:
            weight = weight_rows(self._modules[layer][0]).float().cpu()
            found = [self.moments[name] for name in self._layers[layer].readers if name in self.moments]
            moments = InputMoments.pooled(found) if found else None
            self._check_input(layer, scheme, moments)
            quantizer = self.quantizers[scheme]
            if quantizer.needs_hessian:
                moments = self._with_hessian(layer)
            quantized = quantizer.quantize(weight, self.space.schemes[scheme], moments)
        except InputError as error:
            raise InputError(f"Layer '{layer}' in scheme '{scheme}': {error}") from error
        if self.bank is not None:
            self.bank.write(layer, scheme, quantized)
        return quantized

    def _with_hessian(self, layer: str) -> InputMoments | None:
        """The layer's moments with the Hessian, where it has one: of x - E[x] where the mean error is taken off its bias.

        Hessians (and the outputs' Fisher information, where a quantizer needs that) are found with one pass over the calibration
        data for as many layers, in forward order, as `hessian_max_bytes` holds (at least one), and kept until another layer is
        asked for.
        """
        names = self._read_by(layer)
        if not all(name in self._hessians for name in names):
            self._hessians, self._fishers = {}, {}  # what was held goes first
            wanted, size = list(names), self._held(layer)
            for other in list(self._layers)[list(self._layers).index(layer) + 1 :]:
                size += self._held(other)
                if size > self.hessian_max_bytes:
                    break
                wanted += self._read_by(other)
            self._hessians = dict.fromkeys(wanted) | hessians(self.model, self.task, wanted, self.batches("calibration"))
            if self._needs_fisher:
                layers = [la for la in self._layers if fisher_bytes(self._modules[la][0]) <= self.hessian_max_bytes]
                small = [name for la in layers for name in self._read_by(la) if name in self._hessians]
                with self.own_inputs():
                    self._fishers = output_fishers(self.model, self.task, small, self.batches("calibration"), self.divergence)
        found = []
        for name, module in itertools.zip_longest(names, self._modules[layer]):  # none of a use outside of them
            if name in self.moments:
                moments = replace(self.moments[name], hessian=self._hessians[name], fisher=self._fishers.get(name))
                corrected = self.bias_correction and getattr(module, "bias", None) is not None
                found.append(moments.centred() if corrected else moments)
        if self._layers[layer].kind != "embedding" and not any(moments.hessian is not None for moments in found):
            warnings.warn(f"Layer '{layer}' is quantized without a Hessian: none can be had of its input.", stacklevel=3)
        return InputMoments.pooled(found) if found else None

    def _held(self, layer: str) -> int:
        """Bytes of the matrices of all that read the layer's weight."""
        module = self._modules[layer][0]
        return len(self._read_by(layer)) * (hessian_bytes(module) + (fisher_bytes(module) if self._needs_fisher else 0))

    def _read_by(self, layer: str) -> tuple[str, ...]:
        """The layer's modules, and its weight's name where it is used outside of them."""
        of = self._layers[layer]
        return of.readers if of.weight_name in self.moments else of.modules

    def _check_input(self, layer: str, scheme: str, moments: InputMoments | None) -> None:
        wanted = self.space.schemes[scheme].input_format
        if wanted is not None and wanted.has_static_scale and moments is None and self._layers[layer].kind != "embedding":
            raise InputError(
                "its input was not calibrated (the module runs a forward of its own, or the calibration data do not reach it), "
                "so that it has no static range. Use input.scale=token, or pin the layer to another scheme."
            )

    def biases(self, layer: str, scheme: str) -> dict[str, Tensor]:
        """Module name -> corrected bias (float32 `[out]`) of the layer in the scheme; empty where none is corrected."""
        key = (layer, scheme)
        if key not in self._biases:
            found = self.bank.read_biases(layer, scheme) if self.bank and self.bias_correction else None
            self._biases[key] = self._correct_biases(layer, scheme) if found is None and self.bias_correction else found or {}
        return self._biases[key]

    def _correct_biases(self, layer: str, scheme: str) -> dict[str, Tensor]:
        corrected = {}
        change: Tensor | None = None
        for name, module in zip(self._layers[layer].modules, self._modules[layer], strict=True):
            if getattr(module, "bias", None) is None or name not in self.moments:
                continue
            if change is None:
                change = self.quantized(layer, scheme).dequantize() - weight_rows(module).float().cpu()
            mean = self.moments[name].mean.double()
            shift = _mean_product(change, mean)
            rounded = self._input_shifts(scheme).get(name)
            if rounded is not None:  # (W + dW) E[q(x) - x]: what is never negative is not rounded down as often as up
                shift += _mean_product(change + weight_rows(module).float().cpu(), rounded)
            corrected[name] = (module.bias.detach().cpu().double() - shift).float()
        if self.bank is not None and any(getattr(module, "bias", None) is not None for module in self._modules[layer]):
            self.bank.write_biases(layer, scheme, corrected)
        return corrected

    def _input_shifts(self, scheme: str) -> dict[str, Tensor]:
        """Module name -> E[q(x)] - E[x] of its input in the scheme, by one pass over the calibration data for all layers."""
        wanted = self.space.schemes[scheme].input_format
        if wanted is None:
            return {}
        if wanted not in self._shifts:
            stored: dict[str, dict[str, Tensor]] = {}
            for name in (name for layer in self._layers.values() for name in layer.modules if name in self.moments):
                with suppress(InputError):  # without a static range: said where the layer is quantized
                    stored[name] = wanted.stored(self.moments[name].for_scheme(self.space.schemes[scheme]).histogram)

            def rounded(name: str, product: Product) -> Tensor:
                return wanted.fake_quantize(product.input.float(), len(product.kernel) + 1 if product.kernel else 1, stored[name])

            self._shifts[wanted] = mean_shifts(self.model, self.task, list(stored), self.batches("calibration"), rounded)
        return self._shifts[wanted]

    def with_weights(
        self, weights: Mapping[tuple[str, str], QuantizedTensor], biases: Mapping[tuple[str, str], Mapping[str, Tensor]]
    ) -> QuantEngine:
        """An engine on the same model and data whose bank holds these (layer, scheme) already, and quantizes the others."""
        other = copy.copy(self)
        other._packed, other._biases = dict(weights), {key: dict(found) for key, found in biases.items()}
        other._dense, other._dense_bytes, other._scores = OrderedDict(), 0, {}
        other._prefix = PrefixCache(self.model, self.task, self.space, self._prefix.max_bytes)  # of other weights
        return other

    def swaps(self, layer: str, scheme: str) -> list[tuple[Tensor, Tensor]]:
        """(parameter, its dense value in the scheme) of the layer's weight and corrected biases; kept while memory allows."""
        key = (layer, scheme)
        if key in self._dense:
            self._dense.move_to_end(key)
            return self._dense[key]
        first = self._modules[layer][0]
        # In the parameter's own memory format: another one would run other kernels, and score other last bits than an export.
        weight = torch.empty_like(first.weight.detach()).copy_(from_rows(first, self.quantized(layer, scheme).dequantize()))
        swaps = [(first.weight, weight)]
        for name, bias in self.biases(layer, scheme).items():
            module: Any = self.model.get_submodule(name)
            swaps.append((module.bias, bias.to(self.device)))
        self._dense[key] = swaps
        self._dense_bytes += sum(value.nbytes for _, value in swaps)
        while self._dense_bytes > self.bank_max_bytes and self._dense:
            _, dropped = self._dense.popitem(last=False)
            self._dense_bytes -= sum(value.nbytes for _, value in dropped)
        return swaps

    @contextmanager
    def input_quantized(self, layer: str, scheme: str) -> Iterator[None]:
        """The layer's input is quantized as the scheme says, wherever one of its modules is called."""
        quantized = self.quantized(layer, scheme)
        with ExitStack() as undo:
            for module in self._modules[layer]:
                undo.callback(quantize_input(module, quantized))
            yield

    @contextmanager
    def applied(self, allocation: Allocation) -> Iterator[nn.Module]:
        """The model with the allocation swapped in; groups that it leaves out stay float. Swaps back on the way out."""
        pairs = [(layer.name, scheme) for group, scheme in allocation.items() for layer in self._members[group]]
        swaps = [self.swaps(*pair) for pair in pairs]  # all before the first is applied: quantizing may run the float model
        self._n_applied += 1
        try:
            with ExitStack() as stack:
                stack.enter_context(swapped_data(itertools.chain(*swaps)))
                for layer, scheme in pairs:
                    if self.space.schemes[scheme].input_format is not None:
                        stack.enter_context(self.input_quantized(layer, scheme))
                yield self.model
        finally:
            self._n_applied -= 1

    def score(self, allocation: Allocation, split: str = "search") -> Score:
        """The allocation's score on a split; measured once, then looked up."""
        key = (allocation, split)
        if key not in self._scores:
            start = time.perf_counter()
            reference = self.float_logits(split)
            with self.applied(allocation):
                logits = self._own_logits(allocation, split) if allocation else None
                score = self._compare(logits, reference, split)
            # Ten thousand trials' samples would fill the memory, and only confirmation compares sample by sample.
            self._scores[key] = replace(score, qualities=score.qualities[:0], seconds=time.perf_counter() - start)
        return self._scores[key]

    def score_of(self, model: nn.Module | None, split: str) -> Score:
        """The score of any model on a split, `None` for the float one, compared with the float model's outputs there."""
        reference = self.float_logits(split)
        return self._compare(None if model is None else self._logits(model, split), reference, split)

    def float_logits(self, split: str) -> Tensor:
        """The float model's outputs on a split, float32 `[n, classes]`; computed once, while nothing else is swapped in."""
        if split not in self._float_logits:
            if self._n_applied:
                raise RuntimeError(f"float_logits('{split}') was first asked for while an allocation is swapped in; ask before.")
            logits = self._own_logits(FLOAT, split)
            if not torch.isfinite(logits).all():
                raise InputError(
                    f"The float model gives NaN or infinite outputs on the {split} split. Check the model and its input."
                )
            self._float_logits[split] = logits
        return self._float_logits[split]

    def _own_logits(self, allocation: Allocation, split: str) -> Tensor:
        """Of the engine's model while the allocation is swapped in."""
        return torch.cat(
            [self._prefix.forward(split, i, inputs, allocation) for i, (inputs, _) in enumerate(self.batches(split))]
        )

    @torch.no_grad()
    def _logits(self, model: nn.Module, split: str) -> Tensor:
        return torch.cat([self.task.forward(model, inputs) for inputs, _ in self.batches(split)])

    def _compare(self, logits: Tensor | None, reference: Tensor, split: str) -> Score:
        """Of the split's outputs `[n, columns]` against the float model's; `None`: of the float model itself."""
        targets = torch.cat([target for _, target in self.batches(split)])
        return score_outputs(self.task, self.divergence, logits, reference, targets, split)


def _mean_product(weight: Tensor, mean: Tensor) -> Tensor:
    """float64 `[rows]`: what rows, first dimension of `weight`, make of the mean `[k, columns]` of what meets their columns."""
    return torch.einsum("krc,kc->kr", weight.double().reshape(len(mean), -1, mean.shape[1]), mean).flatten()


def load_batches(task: Task, split: str, device: str) -> list[tuple[Any, Tensor]]:
    """A split's batches on `device`; an `InputError` where there is none."""
    batches = [(map_tensors(lambda x: x.to(device), inputs), targets.to(device)) for inputs, targets in task.loaded(split)]
    if not batches:
        raise InputError(f"The task gives no batch for its {split} split. Give it data, or a size above 0.")
    return batches

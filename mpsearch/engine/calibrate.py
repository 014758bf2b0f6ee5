"""Calibration: the statistics of every layer's input, and of the gradient at its output, that quantization needs.

For every product of a layer's weight: the mean and second moment of each input value that meets a column of the weight matrix, a
histogram of the input, and on demand second moments of whole rows of the input (Hessians) and of the gradients at the output
(output Fishers). For a convolution an input value is a (channel, kernel offset), padding counted as the zeros it is; mean and
second moment are linear in the (squared) input, so that the batch is averaged first and no patch matrix is made.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch import kernels
from mpsearch.divergence import Divergence
from mpsearch.engine.fisher_blocks import fisher_blocks, fisher_bytes, hessian_bytes, say_if_in_blocks
from mpsearch.engine.sums import Sums
from mpsearch.errors import InputError, check_memory
from mpsearch.graph.gradients import GradientTaps
from mpsearch.graph.products import Product, observe_products
from mpsearch.graph.surgery import cloned_inputs, hooked
from mpsearch.graph.trace import overwritten_inputs
from mpsearch.layer import LayerSpec, check_finite
from mpsearch.progress import phase
from mpsearch.quantizers.base import InputMoments
from mpsearch.schemes.histogram import Histogram
from mpsearch.tasks.base import Task
from mpsearch.tree import tensors_in

Batches = Sequence[tuple[Any, Tensor]]


class Calibration:
    """Answers what quantizers and bias correction ask of the calibration data.

    Hessians and output Fishers are computed by one pass over the data for as many layers, in forward order, as
    `hessian_max_bytes` hold (at least one). Hessians are kept until another layer is asked for, output Fishers as long as the
    object. Both are in files where they are large (`Sums`). A pass runs the model as it is then.

    Parameters
    ----------
    model, task, layers
        The network, what runs it, and its searched layers.
    batches
        The calibration data, (inputs, targets) on the model's device.
    moments
        What `calibrate` returned for the layers.
    divergence
        The loss whose output Fishers are asked for.
    with_fishers
        Whether `with_hessian` adds the output Fishers.
    hessian_max_bytes
        Limit on the matrices of one pass.
    with_hessians
        Names of the layers that will ask for a Hessian; `None`: all.
    scratch
        The folder of files of large matrices and graphs (`mpsearch.files.scratch`).
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        layers: Sequence[LayerSpec],
        batches: Batches,
        moments: Mapping[str, InputMoments],
        divergence: Divergence,
        *,
        with_fishers: bool = False,
        hessian_max_bytes: int = 2 * 10**9,
        with_hessians: Collection[str] | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.model, self.task, self.layers, self.batches, self.moments = model, task, layers, batches, moments
        self.divergence, self.with_fishers, self.hessian_max_bytes = divergence, with_fishers, hessian_max_bytes
        self.with_hessians, self.scratch = with_hessians, scratch
        self._fishers: dict[str, Tensor | None] = {}
        self.release()
        self._overwritten: tuple[str, ...] | None = None

    def release(self) -> None:
        """Let go of the Hessians."""
        self._hessians: dict[str, Tensor | None] = {}

    def input_moments(self, layer: LayerSpec) -> InputMoments | None:
        """The moments of the layer's input, pooled over its readers; `None` if none is known."""
        known = [self.moments[name] for name in layer.readers if name in self.moments]
        return InputMoments.pooled(known) if known else None

    def with_hessian(self, layer: LayerSpec, *, centred: bool) -> InputMoments | None:
        """`input_moments` with the Hessian, and with the output Fisher where asked for; a warning if there is no Hessian.

        `centred`: of x - E[x] for modules that have a bias, from which the mean error will be subtracted.
        """
        names = self._readers(layer)
        if not all(name in self._hessians for name in names):
            self._collect_from(layer)
        pooled = []
        for name, module in itertools.zip_longest(names, layer.modules):  # the weight's own name has no module
            if name in self.moments:
                moments = replace(self.moments[name], hessian=self._hessians[name], fisher=self._fishers.get(name))
                has_bias = module is not None and getattr(self.model.get_submodule(module), "bias", None) is not None
                pooled.append(moments.centred() if centred and has_bias else moments)
        if layer.kind != "embedding" and all(moments.hessian is None for moments in pooled):
            warnings.warn(f"Layer '{layer.name}' is quantized without a Hessian: none is known of its input.", stacklevel=3)
        return InputMoments.pooled(pooled) if pooled else None

    def output_fisher(self, layer: LayerSpec) -> Tensor | None:
        """E[g g^T] of the gradient at the output of the layer's first module, as `output_fishers` returns it; `None` for none."""
        name = layer.modules[0]
        if not self.with_fishers or fisher_bytes(self.model.get_submodule(name)) > self.hessian_max_bytes:
            return None
        if name not in self._fishers:
            self.release()
            layers = [la for la in self.layers[list(self.layers).index(layer) :] if la is layer or len(la.modules) == 1]
            sizes = itertools.accumulate(fisher_bytes(self.model.get_submodule(la.name)) for la in layers)
            names = [la.modules[0] for la, size in zip(layers, sizes, strict=True) if size <= self.hessian_max_bytes]
            self._add_fishers(names)
        return self._fishers.get(name)

    def mean_shifts(self, names: Sequence[str], quantize: Callable[[str, Product], Tensor]) -> dict[str, Tensor]:
        """Module name -> E[q(x)] - E[x] of what meets the columns of its weight, float64 `[groups, columns]` on the CPU.

        `quantize(name, product)` is q(x), the product's quantized input.
        """
        sums = Sums()

        def see(name: str, product: Product, output: Tensor) -> None:
            change = product.column_means(quantize(name, product) - product.input).double().cpu()
            sums.add(name, change * product.count, product.count)

        with torch.no_grad(), observe_products(self.model, names, see):
            _run(self.model, self.task, self.batches, "rounded inputs")
        return sums.means()

    @contextmanager
    def own_inputs(self) -> Iterator[None]:
        """While the block runs, layers whose input the network writes into later read a copy of it."""
        if self._overwritten is None:
            inputs, names = self.batches[0][0], [name for layer in self.layers for name in layer.modules]
            self._overwritten = overwritten_inputs(self.model, names, lambda: self.task.forward(self.model, inputs))
        with cloned_inputs(self.model, self._overwritten):
            yield

    def _collect_from(self, layer: LayerSpec) -> None:
        """Compute the matrices of this layer and of those after it, as far as memory allows."""
        self.release()
        layers = list(self.layers)
        wanted, size = [layer], self._matrix_bytes(layer)
        for other in layers[layers.index(layer) + 1 :]:
            if self.with_hessians is not None and other.name not in self.with_hessians:
                continue
            size += self._matrix_bytes(other)
            if size > self.hessian_max_bytes:
                break
            wanted.append(other)
        names = [name for each in wanted for name in self._readers(each)]
        self._hessians = dict.fromkeys(names) | hessians(self.model, self.task, names, self.batches, self.scratch)
        if self.with_fishers:
            for each in wanted:
                say_if_in_blocks(each.name, each.shape[0] // getattr(self.model.get_submodule(each.name), "groups", 1))
            self._add_fishers(names)

    def _add_fishers(self, names: Sequence[str]) -> None:
        """Compute the output Fishers of these modules that are not known; large ones go into a file."""
        if not (wanted := [name for name in names if name not in self._fishers]):
            return
        with self.own_inputs():
            new = output_fishers(self.model, self.task, wanted, self.batches, self.divergence, self.scratch)
        self._fishers |= dict.fromkeys(wanted) | new

    def _matrix_bytes(self, layer: LayerSpec) -> int:
        module = self.model.get_submodule(layer.modules[0])
        one = hessian_bytes(module) + (fisher_bytes(module) if self.with_fishers else 0)
        return len(self._readers(layer)) * one

    def _readers(self, layer: LayerSpec) -> tuple[str, ...]:
        """The layer's modules, and its weight's name if it is used outside of them."""
        return layer.readers if layer.weight_name in self.moments else layer.modules


@torch.no_grad()
def calibrate(
    model: nn.Module, task: Task, layers: Sequence[LayerSpec], batches: Batches, *, rotated: bool = False
) -> dict[str, InputMoments]:
    """Run the data once; reader (`LayerSpec.readers`) -> moments of its input, float32 on the CPU.

    With `rotated` also those of the rotated inputs of Linear layers, which rotated schemes ask for.

    Left out are modules of which no product is seen (`mpsearch.graph.products`): embeddings, whose input is indices, and modules
    that change their weight first (a convolution that standardizes it, say), whose output is not what weight and input alone say.
    Raises `InputError` for a weight or an input that is NaN or infinite.
    """
    sums: dict[str, InputMoments] = {}
    histograms: dict[str, Histogram] = {}
    modules: dict[Any, str] = {model.get_submodule(name): name for layer in layers for name in layer.modules}
    weights = {layer.weight_name for layer in layers}

    def see_input(name: str, x: Tensor) -> None:
        if not torch.isfinite(x).all():
            raise _not_finite(name)
        histogram = Histogram.from_values(x)
        histograms[name] = Histogram.merged([histograms[name], histogram]) if name in histograms else histogram

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see_input(modules[module], next(tensors_in((args, kwargs))).detach())

    def see(name: str, product: Product, output: Tensor) -> None:
        if name in weights:  # a use outside of the module, whose input no hook has seen
            see_input(name, product.input)
        moments = _moments(product, product.input)
        if rotated and not product.kernel:
            x = kernels.rotate(product.input)
            moments = replace(moments, rotated=replace(_moments(product, x), histogram=Histogram.from_values(x)))
        sums[name] = InputMoments.pooled([sums[name], moments]) if name in sums else moments

    for module, name in modules.items():
        check_finite(name, module.weight.detach())  # else the next layer's input would be to blame
    hooks = [(module, called) for module in modules if not isinstance(module, nn.Embedding)]
    with hooked(hooks), observe_products(model, [*modules.values(), *weights], see):
        _run(model, task, batches, "calibrate")
    return {name: replace(_in_float32(moments), histogram=histograms[name]) for name, moments in sums.items()}


@torch.no_grad()
def hessians(
    model: nn.Module, task: Task, modules: Sequence[str], batches: Batches, scratch: Path | None = None
) -> dict[str, Tensor]:
    """Module name -> E[x x^T] of what meets the columns of its weight, float32 `[groups, columns, columns]` on the CPU.

    Half the Hessian of the mean squared error of a row's output (Frantar et al. 2023, section 3.1), for the modules of which a
    product is seen and whose input meets the weight as rows of patches (no transposed convolution). Patches are made of a few
    samples at a time; in addition to the result, at most `products.PATCH_BYTES` and a batch are in memory.

    Raises `InputError` where a layer's input is NaN or infinite.
    """
    sums = Sums(scratch)

    def see(name: str, product: Product, output: Tensor) -> None:
        for patches in product.patches():
            sums.add_squares(name, patches)

    with observe_products(model, modules, see):
        _run(model, task, batches, "hessians")
    means = sums.means()
    for name, mean in means.items():
        if not torch.isfinite(mean).all():
            raise _not_finite(name)
    return means


def output_fishers(
    model: nn.Module, task: Task, modules: Sequence[str], batches: Batches, divergence: Divergence, scratch: Path | None = None
) -> dict[str, Tensor]:
    """Module name -> E[g g^T] of the gradient g at its output, float32 `[groups, rows, rows]` on the CPU, rows of a group.

    Of a group of more than `fisher_blocks.MOST_ROWS` rows the blocks on the diagonal alone, `[groups * blocks, rows, rows]`.
    The mean over output positions, for the modules of which a product is seen and reaches the loss: the divergence's `probe`, at
    its `temperature` for the first batch, by one backward pass per batch: random signs vary less than drawn labels, of which
    most are those predicted. In addition to the result, a batch's graph and one gradient are in memory.
    """
    sums = Sums(scratch)
    generator = torch.Generator().manual_seed(0)
    temperature: float | None = None
    with phase("output fishers", len(batches)) as advance:
        for inputs, _ in batches:
            taps = GradientTaps(model, scratch)

            def see(name: str, product: Product, output: Tensor, taps: GradientTaps = taps) -> Tensor:
                shape, is_conv, rows, groups = product.output.shape, bool(product.kernel), product.rows, product.groups

                def add(gradient: Tensor) -> None:
                    by_row = gradient.reshape(shape).movedim(1 if is_conv else -1, -1)
                    n_blocks = groups * fisher_blocks(rows // groups)
                    sums.add_squares(name, by_row.reshape(-1, n_blocks, rows // n_blocks).transpose(0, 1))

                return taps.tap(output, add)

            with taps.recording(), observe_products(model, modules, see):
                logits = task.forward(model, inputs)
            temperature = temperature or divergence.temperature(logits)
            signs = torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8) * 2 - 1
            try:
                with torch.enable_grad():  # the caller may be in no_grad
                    taps.backward(divergence.probe(logits, signs.to(logits.device), temperature))
            except RuntimeError as error:
                check_memory(error)
                warnings.warn(
                    f"The model has no gradients, so that layers are quantized without output Fishers: {error}", stacklevel=2
                )
            advance("")
    return sums.means()


def _run(model: nn.Module, task: Task, batches: Batches, title: str) -> None:
    with phase(title, len(batches)) as advance:
        for inputs, _ in batches:
            task.forward(model, inputs)
            advance("")


def _moments(product: Product, x: Tensor) -> InputMoments:
    """Of x in the place of the product's input, float64."""
    mean, second = (product.column_means(y).double().cpu() for y in (x, x.square()))
    return InputMoments(mean, second, product.count)


def _in_float32(moments: InputMoments) -> InputMoments:
    rotated = None if moments.rotated is None else _in_float32(moments.rotated)
    return replace(moments, mean=moments.mean.float(), second_moment=moments.second_moment.float(), rotated=rotated)


def _not_finite(layer: str) -> InputError:
    return InputError(f"The calibration data make NaN or infinite inputs of layer '{layer}'. Check the data and the model.")

"""Run the calibration data and keep what quantizers, bias correction and static ranges need of every layer's product: moments
and a histogram of its input, and on demand second moments of whole rows of its input and of the gradient at its output.

The mean and the second moment of each input value that meets a column of the weight matrix. For a convolution that is each
(channel, kernel offset), padding counted as the zeros it is; both are linear in the (squared) input, so that the batch can be
averaged first and no patch matrix is ever made.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch import kernels
from mpsearch.divergence import Divergence
from mpsearch.errors import InputError, check_memory
from mpsearch.graph.products import Product, observe_products
from mpsearch.graph.surgery import Hook, hooked
from mpsearch.layer import LayerSpec, check_finite, rows_shape
from mpsearch.progress import phase
from mpsearch.quantizers.base import InputMoments
from mpsearch.schemes.histogram import Histogram
from mpsearch.tasks.base import Task
from mpsearch.tree import tensors_in

Batches = Sequence[tuple[Any, Tensor]]


@torch.no_grad()
def calibrate(
    model: nn.Module, task: Task, layers: Sequence[LayerSpec], batches: Batches, *, rotated: bool = False
) -> dict[str, InputMoments]:
    """Reader (`LayerSpec.readers`) -> moments of its input, float32 on the CPU; `InputError` where one is NaN or infinite.

    With `rotated` also those of the rotated inputs of Linear layers, which rotated schemes ask for.

    Left out are modules of which no product is seen (`mpsearch.graph.products`): embeddings, whose input is indices, and modules
    that change their weight first (a convolution that standardizes it, say), whose output is not what weight and input alone say.
    """
    sums: dict[str, InputMoments] = {}
    inputs_of: dict[str, Histogram] = {}
    names = [name for layer in layers for name in layer.modules]
    weights = {layer.weight_name for layer in layers}

    def called(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(tensors_in((args, kwargs))).detach()
            if not torch.isfinite(x).all():
                raise _not_finite(name)
            found = Histogram.from_values(x)
            inputs_of[name] = Histogram.merged([inputs_of[name], found]) if name in inputs_of else found

        return hook

    def see(name: str, product: Product, output: Tensor) -> None:
        if name in weights:  # a use outside of the module, whose input no hook has seen
            called(name)(model, (product.input,), {})
        found = _moments(product, product.input)
        if rotated and not product.kernel:
            turned = kernels.rotate(product.input)
            found = replace(found, rotated=replace(_moments(product, turned), histogram=Histogram.from_values(turned)))
        sums[name] = InputMoments.pooled([sums[name], found]) if name in sums else found

    hooks: list[tuple[nn.Module, Hook]] = []
    for name in names:
        module: Any = model.get_submodule(name)
        check_finite(name, module.weight.detach())  # else the next layer's input would be to blame
        if not isinstance(module, nn.Embedding):
            hooks.append((module, called(name)))
    with hooked(hooks), observe_products(model, [*names, *weights], see), phase("calibrate", len(batches)) as advance:
        for inputs, _ in batches:
            task.forward(model, inputs)
            advance("")
    return {name: replace(_single(moments), histogram=inputs_of[name]) for name, moments in sums.items()}


def _moments(product: Product, x: Tensor) -> InputMoments:
    """Of x in the place of the product's input, float64."""
    mean, second = (product.column_means(y).double().cpu() for y in (x, x.square()))
    return InputMoments(mean, second, product.count)


def _single(moments: InputMoments) -> InputMoments:
    """In float32."""
    rotated = None if moments.rotated is None else _single(moments.rotated)
    return replace(moments, mean=moments.mean.float(), second_moment=moments.second_moment.float(), rotated=rotated)


@torch.no_grad()
def hessians(model: nn.Module, task: Task, modules: Sequence[str], batches: Batches) -> dict[str, Tensor]:
    """Module name -> E[x x^T] of what meets the columns of its weight, float32 `[groups, columns, columns]` on the CPU.

    Half the Hessian of the mean squared error of a row's output (Frantar et al. 2023, section 3.1), for the modules of which a
    product is seen and whose input meets the weight as rows of patches (no transposed convolution). Patches are made of a few
    samples at a time; beside the result, what is held is at most `products.PATCH_BYTES` and a batch.

    Raises `InputError` where a layer's input is NaN or infinite.
    """
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()

    def see(name: str, product: Product, output: Tensor) -> None:
        for patches in product.patches():
            found = patches.transpose(1, 2) @ patches
            sums[name] = sums[name].add_(found) if name in sums else found
            counts[name] += patches.shape[1]

    with observe_products(model, modules, see), phase("hessians", len(batches)) as advance:
        for inputs, _ in batches:
            task.forward(model, inputs)
            advance("")
    for name, total in sums.items():
        if not torch.isfinite(total.div_(counts[name])).all():
            raise _not_finite(name)
    return {name: total.cpu() for name, total in sums.items()}


def output_fishers(
    model: nn.Module, task: Task, modules: Sequence[str], batches: Batches, divergence: Divergence
) -> dict[str, Tensor]:
    """Module name -> E[g g^T] of the gradient g at its output, float32 `[groups, rows, rows]` on the CPU, rows of a group.

    The mean over output positions, of the modules of which a product is seen and reaches the loss: the divergence's
    `drawn_loss`, by one backward pass per batch. Beside the result, what is held is a batch's outputs and gradients.
    """
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    seen: list[tuple[str, Product, Tensor]] = []
    generator = torch.Generator().manual_seed(0)

    def see(name: str, product: Product, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        seen.append((name, product, output))
        return output.clone()  # what follows may work in place

    with phase("output fishers", len(batches)) as advance:
        for inputs, _ in batches:
            with torch.enable_grad(), observe_products(model, modules, see):
                logits = task.forward(model, inputs)
            outputs = [output for *_, output in seen]
            gradients = _gradients(logits, outputs, lambda logits: divergence.drawn_loss(logits, generator))
            for (name, product, _), gradient in zip(seen, gradients, strict=True):
                if gradient is not None:
                    rows = gradient.reshape(product.output.shape).movedim(1 if product.kernel else -1, -1)
                    grouped = rows.reshape(-1, product.groups, product.rows // product.groups).transpose(0, 1)
                    found = grouped.transpose(1, 2) @ grouped
                    sums[name] = sums[name].add_(found) if name in sums else found
                    counts[name] += grouped.shape[1]
            seen.clear()
            advance("")
    return {name: total.div_(counts[name]).cpu() for name, total in sums.items()}


def _gradients(logits: Tensor, outputs: Sequence[Tensor], loss: Callable[[Tensor], Tensor]) -> Sequence[Tensor | None]:
    """Of the loss; none, and a warning, where the model gives none."""
    try:
        with torch.enable_grad():  # whoever asks for a quantized layer may be in no_grad
            return torch.autograd.grad(loss(logits), outputs, allow_unused=True)
    except RuntimeError as error:
        check_memory(error)
        warnings.warn(f"No gradient can be had of the model, so that layers are quantized without: {error}", stacklevel=3)
        return [None] * len(outputs)


@torch.no_grad()
def mean_shifts(
    model: nn.Module, task: Task, modules: Sequence[str], batches: Batches, rounded: Callable[[str, Product], Tensor]
) -> dict[str, Tensor]:
    """Module name -> E[q(x)] - E[x] of what meets the columns of its weight, float64 `[groups, columns]` on the CPU.

    `rounded(name, product)` is q(x), the product's quantized input.
    """
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()

    def see(name: str, product: Product, output: Tensor) -> None:
        change = product.column_means(rounded(name, product) - product.input).double().cpu() * product.count
        sums[name] = sums[name].add_(change) if name in sums else change
        counts[name] += product.count

    with observe_products(model, modules, see), phase("rounded inputs", len(batches)) as advance:
        for inputs, _ in batches:
            task.forward(model, inputs)
            advance("")
    return {name: total.div_(counts[name]) for name, total in sums.items()}


def _not_finite(layer: str) -> InputError:
    return InputError(f"The calibration data make NaN or infinite inputs of layer '{layer}'. Check the data and the model.")


def hessian_bytes(module: Any) -> int:
    """What `hessians` holds for a module."""
    columns = math.prod(rows_shape(module)[1:])
    return 4 * getattr(module, "groups", 1) * columns**2


def fisher_bytes(module: Any) -> int:
    """What `output_fishers` holds for a module."""
    groups = getattr(module, "groups", 1)
    return 4 * groups * (rows_shape(module)[0] // groups) ** 2

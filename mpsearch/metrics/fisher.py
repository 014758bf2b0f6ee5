"""Diagonal Fisher information on layer outputs: one backward pass for all layers and schemes.

A small change dy of a layer's output changes the loss L by g dy + 1/2 dy^T H dy. At a trained model g vanishes on average, H is
close to the Fisher information E[g g^T], and its diagonal gives

    sensitivity(layer, scheme) = 1/2 E_x sum_i g_i^2 dy_i^2,        g = dL/dy,  dy = (W' x' + b') - (W x + b)

(LeCun et al. 1990, "Optimal Brain Damage", eq. 3 with the Fisher in place of the Hessian; on layer outputs as in Li et al. 2021,
"BRECQ", eq. 10). L is the negative log-likelihood of targets drawn from the model's own prediction (`Divergence.drawn_loss`),
which makes E[g g^T] the true Fisher and not the empirical one (Kunstner et al. 2019). Runs on the calibration split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.engine.engine import QuantEngine
from mpsearch.errors import InputError, check_memory
from mpsearch.graph.gradients import GradientTaps
from mpsearch.graph.surgery import hooked
from mpsearch.graph.uses import Use, observe_uses
from mpsearch.metrics.base import Pair, SensitivityMetric, layers_by_group, quantize_groups
from mpsearch.tree import map_tensors


class Fisher(SensitivityMetric):
    """Half the Fisher-weighted squared change of the layers' outputs, in the unit of the loss; no label is used."""

    name = "fisher"
    unit = "nats"

    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """All pairs at once, then yielded one by one."""
        quantize_groups(engine, pairs)
        layers = layers_by_group(engine)
        measured = {(layer.name, scheme) for group, scheme in pairs for layer in layers[group]}
        sums = dict.fromkeys(sorted(measured), 0.0)
        generator = torch.Generator().manual_seed(0)
        n_samples = 0
        layer_of = {name: layer.name for layer in engine.space.layers for name in layer.readers}
        for inputs, targets in engine.batches("calibration"):
            n_samples += len(targets)
            with record_calls(engine, list(layer_of), inputs) as recording:

                def add(i: int, gradient: Tensor, recording: Recording = recording) -> None:
                    name, call = recording.calls[i]
                    before = float_output(engine, name, call)
                    for scheme in [s for layer, s in sums if layer == layer_of[name]]:
                        change = changed(engine, name, layer_of[name], scheme, call, before)
                        sums[layer_of[name], scheme] += 0.5 * (change * gradient).double().square().sum().item()

                recording.backward(engine.divergence.drawn_loss(recording.logits, generator), add)
        for group, scheme in pairs:
            yield sum(sums[layer.name, scheme] for layer in layers[group]) / n_samples


@dataclass(frozen=True)
class Call:
    """The inputs of a module's call, or of a `use` of its weight outside of it, and the shape of its output."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape: torch.Size
    use: Use | None = None


class Recording:
    """A forward pass of the float model whose graph is kept; gradients reach the output of every call of a layer.

    Attributes
    ----------
    calls
        (reader, call), in the order in which they ran.
    logits
        What the pass returned.
    consume
        `consume(i, gradient)` is called during a backward pass.
    """

    def __init__(self, model: nn.Module, scratch: Path | None = None) -> None:
        self.calls: list[tuple[str, Call]] = []
        self.logits = torch.empty(0)
        self.taps = GradientTaps(model, scratch)
        self.consume: Callable[[int, Tensor], None] = _ignore

    def taken(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """A call's arguments, kept in memory or in files as the graph's tensors are."""
        return map_tensors(self.taps.kept.keep, (args, kwargs))

    def add(self, name: str, call: Call, output: Tensor) -> Tensor:
        """Record a call; the network goes on with the tensor that is returned."""
        i = len(self.calls)
        self.calls.append((name, call))
        return self.taps.tap(output, lambda gradient: self.consume(i, gradient))

    def backward(self, loss: Tensor, consume: Callable[[int, Tensor], None]) -> None:
        """Call `consume(i, gradient)` with the gradient of `loss` at the output of each call that it reaches; none is kept."""
        self.consume = consume
        try:
            self.taps.backward(loss)
        except RuntimeError as error:
            check_memory(error)
            raise InputError(
                f"The model has no gradients, which this metric needs ({str(error).splitlines()[0]}; torch.no_grad in its "
                "forward?). Use metric=kl, which needs none."
            ) from None
        finally:
            self.consume = _ignore  # which may refer to this recording, and would keep its graph


def _ignore(i: int, gradient: Tensor) -> None:
    pass


@contextmanager
def record_calls(engine: QuantEngine, readers: Sequence[str], inputs: Any) -> Iterator[Recording]:
    """Run the float model on one batch; `readers` are names of modules and of weights (`LayerSpec.readers`).

    The graph is let go of after the block.
    """
    recording = Recording(engine.model, engine.scorer.scratch)
    names = {module: name for name, module in engine.model.named_modules() if name in set(readers)}
    weights = {name: engine.model.get_parameter(name) for name in readers if name not in names.values()}
    weight_names = {id(weight): name for name, weight in weights.items()}

    def record_use(use: Use) -> Tensor | None:
        if use.owner is not None:
            return None
        call = Call(*recording.taken(use.args, use.kwargs), use.output.shape, replace(use, output=use.output.new_empty(0)))
        return recording.add(weight_names[id(use.weight)], call, use.output)

    def record_call(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return recording.add(names[module], Call(*recording.taken(args, kwargs), output.shape), output)

    observed = observe_uses(engine.model, list(weights.values()), record_use)
    after = [(module, record_call) for module in names]
    with recording.taps.recording(), engine.own_inputs(), hooked(after=after), observed:
        recording.logits = engine.task.forward(engine.model, inputs)
    try:
        yield recording
    finally:
        recording.taps.close()


@torch.no_grad()
def float_output(engine: QuantEngine, reader: str, call: Call) -> Tensor:
    """What the call returned, computed again: outputs are not kept."""
    if call.use is not None:
        return call.use.run_with(call.use.weight)
    output: Tensor = engine.model.get_submodule(reader)(*call.args, **call.kwargs)
    return output


@torch.no_grad()
def changed(engine: QuantEngine, reader: str, layer: str, scheme: str, call: Call, before: Tensor) -> Tensor:
    """The change of a call's output from `before`, when the module runs on the quantized weight and input and the corrected bias.

    For a use outside of the layer's modules: when it runs on the quantized weight.
    """
    swaps = engine.swaps(layer, scheme, keep=engine.bank.holds_all)
    if call.use is not None:
        return call.use.run_with(swaps[0][1]) - before
    module = engine.model.get_submodule(reader)
    own = dict(module.named_parameters(recurse=False))
    swapped = {name: value for parameter, value in swaps for name, p in own.items() if p is parameter}
    with engine.input_quantized(layer, scheme):
        return torch.func.functional_call(module, swapped, call.args, dict(call.kwargs)) - before

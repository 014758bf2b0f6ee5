"""Find the channels of a network that can be scaled without changing its outputs, by scaling them and observing a forward pass.

The output channels of one layer (or norm) are multiplied by powers of two, which floating-point arithmetic carries without any
rounding, and the network runs. Each layer whose input is the same numbers times these factors could take the inverse into its
weight: it is given its own input again. If nothing else changes, and the outputs are as before, the factors went through
operations that commute with them (ReLU, pooling, attention's weighted sum, products with something else, …), wherever they are in
the code. The outputs must also be as before with the factors and their inverses in the weights themselves.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.graph.channel_scaling import SIX, ChannelClip, scale
from mpsearch.graph.fold import uses_of_tensors
from mpsearch.graph.surgery import hooked, replace_module, swapped_data
from mpsearch.graph.trace import evaluating
from mpsearch.layer import kind_of, rows_shape, runs_as_usual
from mpsearch.progress import phase
from mpsearch.tree import tensors_in

Forward = Callable[[nn.Module, Any], Any]

EXPONENTS = (-4, -3, -2, -1, 1, 2, 3, 4)  # of the factors; never 0, so that a channel that is scaled is a channel that changes
RELATIVE, ABSOLUTE = 1e-5, 1e-6  # of a value and of the largest: tolerance for devices that add up in another order each time


@dataclass(frozen=True)
class Link:
    """Channels that may be scaled: the outputs of one module, undone in the weights of all its consumers.

    Attributes
    ----------
    producer
        The name of the module.
    channels
        How many output channels it has.
    consumers
        Layer -> int64 `[in]`: the producer's channel that each of its input channels carries.
    clips
        The ReLU6 modules between, whose bound must be scaled too -> the shape that broadcasts over the channels (`[out, 1, 1]`).
    """

    producer: str
    channels: int
    consumers: Mapping[str, Tensor]
    clips: Mapping[str, tuple[int, ...]]


class _BlockedError(Exception):
    """A scaled value has reached code that cannot undo it."""


def find_links(model: nn.Module, forward: Forward, inputs: Any) -> list[Link]:
    """All links of a network in eval mode, in forward order, by running `forward(model, inputs)` once for each layer and norm.

    Producers and consumers are layers that run torch's own `forward` with weights that nothing else uses, and, as producers,
    modules with a per-channel weight (norms). A layer that `inputs` do not reach, such as an expert, rules out the producers of
    as many channels as it takes: it may read them. The model is left bitwise as it was.
    """
    network = _Network(model, forward, inputs)
    producers, links = list(network.producers()), []
    with phase("links", len(producers)) as advance:
        for producer in producers:
            if (link := _Scaling(network, producer).link()) is not None:
                links.append(link)
            advance("")
    return links


class _Network:
    """The modules of a network and the inputs that reach them in one forward pass."""

    def __init__(self, model: nn.Module, forward: Forward, inputs: Any) -> None:
        self.model, self.forward, self.inputs = model, forward, inputs
        self.names = {module: name for name, module in model.named_modules()}
        uses = uses_of_tensors(model)
        self.unshared = {m for m in self.names if all(uses[id(p)] == 1 for p in m._parameters.values() if p is not None)}
        self.layers = {module for module in self.names if kind_of(module) is not None}
        self.norms = {module for module in self.names if _is_norm(module)} - self.layers
        n_names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self.clips = {module for module in self.names if type(module) is nn.ReLU6 and n_names[module] == 1}
        self.seen: dict[nn.Module, list[Tensor]] = defaultdict(list)

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.seen[module].append(next(tensors_in((args, kwargs))).clone())

        with hooked([(module, record) for module in self.layers | self.norms | self.clips]):
            self.outputs = self.run()
        unreached = {module for module in self.layers - self.seen.keys() if kind_of(module) != "embedding"}
        self.unreached_channels = {rows_shape(m)[1] * getattr(m, "groups", 1) for m in unreached}

    def producers(self) -> Iterator[nn.Module]:
        """The modules whose output channels might be scaled, in the order in which they are called."""
        for module in self.seen:
            possible = module in self.unshared if module in self.norms else module in self.layers and self.can_scale(module)
            if possible and kind_of(module) != "embedding" and _channels(module) not in self.unreached_channels:
                yield module

    def can_scale(self, module: nn.Module) -> bool:
        """Whether the layer's weight is its own and torch's own `forward` reads it."""
        return module in self.unshared and runs_as_usual(module) and "weight" in module._parameters

    @torch.no_grad()
    def run(self) -> Tensor:
        """The outputs."""
        with evaluating(self.model):
            return self.forward(self.model, self.inputs)

    def is_unchanged(self, outputs: Tensor) -> bool:
        """Whether the outputs are those of the first run."""
        return outputs.shape == self.outputs.shape and _is_close(outputs, self.outputs)


class _Scaling:
    """A run in which the output channels of `producer` are scaled, and undone at the inputs of the layers that read them."""

    def __init__(self, network: _Network, producer: nn.Module) -> None:
        self.network, self.producer, self.channels = network, producer, _channels(producer)
        n = self.channels
        generator = torch.Generator().manual_seed(0)
        exponents = torch.tensor(EXPONENTS).repeat(-(-n // len(EXPONENTS)))[:n][torch.randperm(n, generator=generator)]
        self.factors = torch.exp2(exponents.float()).to(next(producer.parameters()).device)
        self.indices: dict[nn.Module, list[Tensor | None]] = defaultdict(list)  # of each call of a layer; `None`: unscaled
        self.clips: dict[str, tuple[int, ...]] = {}

    def link(self) -> Link | None:
        """The link of the producer; `None` where not all that reads its outputs can undo the factors."""
        network = self.network
        before = [*((m, self._undo) for m in network.layers), *((m, self._enter_clip) for m in network.clips)]
        after = [*((m, self._clip) for m in network.clips), (self.producer, self._produce)]
        try:
            with hooked(before, after):
                outputs = network.run()
        except _BlockedError:
            return None
        if not network.is_unchanged(outputs):
            return None
        consumers = {}
        for module, calls in self.indices.items():
            first = next((index for index in calls if index is not None), None)
            if first is None:
                continue
            if len(calls) < len(network.seen[module]) or not all(i is not None and torch.equal(i, first) for i in calls):
                return None
            consumers[network.names[module]] = first
        link = Link(network.names[self.producer], self.channels, consumers, self.clips)
        return link if consumers and self._is_exact(link) else None

    def _produce(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        with _scaled(module, outputs=self.factors):
            scaled = module.forward(*args, **kwargs)
        if not isinstance(output, Tensor) or output.ndim < 2 or self._shape(scaled, output) is None:
            raise _BlockedError
        return scaled

    def _undo(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give a layer its own input again, where that can be done in its weight."""
        x, before = self._inputs(module, args, kwargs)
        if _is_close(x, before):
            self.indices[module].append(None)
            return None
        index = _carried_channels(x, before, -1 if isinstance(module, nn.Linear) else 1, self.factors)
        if index is None or not args or args[0] is not x or not self.network.can_scale(module):
            raise _BlockedError
        self.indices[module].append(index.cpu())
        return (before.clone(), *args[1:]), kwargs

    def _enter_clip(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, before = self._inputs(module, args, kwargs)
        self.indices[module].append(None)
        if _is_close(x, before):
            return
        shape = self._shape(x, before) if x.ndim > 1 else None
        if shape is None or len(self.network.seen[module]) > 1:
            raise _BlockedError
        self.clips[self.network.names[module]] = shape

    def _clip(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        shape = self.clips.get(self.network.names[module])
        return None if shape is None else F.relu6(self.network.seen[module][0]) * self.factors.view(shape)

    def _inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The input of a call, and that of the same call in the first run."""
        x, seen = next(tensors_in((args, kwargs))), self.network.seen[module]
        call = len(self.indices[module])
        if call >= len(seen) or x.shape != seen[call].shape:
            raise _BlockedError
        return x, seen[call]

    def _shape(self, x: Tensor, before: Tensor) -> tuple[int, ...] | None:
        """The shape in which the factors broadcast over the second or the last dimension, if x is `before` times them there."""
        shapes = ((self.channels, *[1] * (x.ndim - 2)), (self.channels,))
        return next((s for s in shapes if _can_broadcast(x, s) and _is_close(x, before * self.factors.view(s))), None)

    def _is_exact(self, link: Link) -> bool:
        """Whether the outputs are as before with the factors in the weights: these may have other readers too."""
        model = self.network.model
        with ExitStack() as stack:
            stack.enter_context(_scaled(self.producer, outputs=self.factors))
            for name, index in link.consumers.items():
                inverse = 1 / self.factors[index.to(self.factors.device)]
                stack.enter_context(_scaled(model.get_submodule(name), inputs=inverse))
            for name, shape in link.clips.items():
                stack.callback(replace_module(model, name, ChannelClip(SIX * self.factors.view(shape)).eval()))
            return _is_close(self.network.run(), self.network.outputs)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has a per-channel weight, perhaps a bias, and nothing else: any LayerNorm, RMSNorm, batch norm."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    weight = parameters.get("weight")
    return (
        weight is not None
        and weight.ndim == 1
        and weight.is_floating_point()
        and parameters.keys() <= {"weight", "bias"}
        and all(p.shape == weight.shape for p in parameters.values())
        and not list(module.children())
    )


def _channels(module: Any) -> int:
    return rows_shape(module)[0] if kind_of(module) is not None else len(module.weight)


@contextmanager
def _scaled(module: Any, outputs: Tensor | None = None, inputs: Tensor | None = None) -> Iterator[None]:
    with swapped_data([(parameter, parameter.data.clone()) for parameter in module.parameters(recurse=False)]):
        scale(module, outputs, inputs)
        yield


def _carried_channels(x: Tensor, before: Tensor, axis: int, factors: Tensor) -> Tensor | None:
    """The scaled channel that each channel of x carries, int64; `None` where x is not `before` times their factors.

    In order; or repeated, in runs of any length: each by itself where feature maps are flattened, heads where several queries
    share one.
    """
    n, channels = x.shape[axis], len(factors)
    if n % channels:
        return None
    runs = [channels] if n == channels else [run for run in range(1, channels + 1) if channels % run == 0]
    for run in runs:
        index = torch.arange(channels, device=x.device).view(-1, run).repeat_interleave(n // channels, 0).flatten()
        shape = [n if i == axis % x.ndim else 1 for i in range(x.ndim)]
        if _is_close(x, before * factors[index].view(shape)):
            return index
    return None


def _can_broadcast(x: Tensor, shape: tuple[int, ...]) -> bool:
    return x.ndim >= len(shape) and all(size in (1, other) for size, other in zip(shape[::-1], x.shape[::-1], strict=False))


def _is_close(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x, y) or torch.allclose(x, y, rtol=RELATIVE, atol=ABSOLUTE * float(y.abs().max()))

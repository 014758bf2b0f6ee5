"""Finds the channels of a network that can be scaled without changing what it answers: by doing it, and looking on.

One layer's (or norm's) output channels are multiplied by powers of two, which float arithmetic carries without any rounding, and
the network runs. Each layer whose input comes as the same numbers times these factors could take the inverse into its weight: it
is given its own input again. If nothing else changes, and the outputs are as before, the factors went through operations that
commute with them (ReLU, pooling, attention's weighted sum, products with something else, …), wherever they are in the code. The
outputs must also be as before with the factors and their inverses in the weights themselves.
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
RELATIVE, ABSOLUTE = 1e-5, 1e-6  # of a value and of the largest: room for devices that add up in another order each time


@dataclass(frozen=True)
class Link:
    """Channels that may be scaled: the outputs of `producer`, undone in the weights of all `consumers`.

    `consumers` maps a layer to int64 [in]: the producer's channel that each of its input channels carries. `clips` are the ReLU6
    modules between, whose bound must be scaled too, each with the shape that meets the channels there ([out, 1, 1]).
    """

    producer: str
    channels: int
    consumers: Mapping[str, Tensor]
    clips: Mapping[str, tuple[int, ...]]


class _BlockedError(Exception):
    """What was scaled has reached what cannot undo it."""


def find_links(model: nn.Module, forward: Forward, inputs: Any) -> list[Link]:
    """All links of a network in eval mode, in forward order, found by `forward(model, inputs)`, once for each layer and norm.

    Producers and consumers are layers that run torch's own `forward` with weights that nothing else uses, and, as producers,
    modules with a weight for each channel (norms). A layer that `inputs` do not reach, such as an expert, rules out the producers
    of as many channels as it takes: nobody knows whether it would read them. The model is left bitwise as it was.
    """
    probe = _Probe(model, forward, inputs)
    producers, found = list(probe.producers()), []
    with phase("links", len(producers)) as advance:
        for producer in producers:
            found.append(probe.link(producer))
            advance("")
    return [link for link in found if link is not None]


class _Probe:
    def __init__(self, model: nn.Module, forward: Forward, inputs: Any) -> None:
        self.model, self.forward, self.inputs = model, forward, inputs
        self.names = {module: name for name, module in model.named_modules()}
        uses = uses_of_tensors(model)
        self.alone = {m for m in self.names if all(uses[id(p)] == 1 for p in m._parameters.values() if p is not None)}
        self.layers = {module for module in self.names if kind_of(module) is not None}
        self.norms = {module for module in self.names if _is_norm(module)} - self.layers
        n_names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self.clips = {module for module in self.names if type(module) is nn.ReLU6 and n_names[module] == 1}
        self.seen: dict[nn.Module, list[Tensor]] = defaultdict(list)

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.seen[module].append(next(tensors_in((args, kwargs))).clone())

        with hooked([(module, look) for module in self.layers | self.norms | self.clips]):
            self.outputs = self._run()
        unreached = {module for module in self.layers - self.seen.keys() if kind_of(module) != "embedding"}
        self.unreached = {rows_shape(m)[1] * getattr(m, "groups", 1) for m in unreached}

    def producers(self) -> Iterator[nn.Module]:
        """The modules whose output channels might be scaled, in the order in which they are called."""
        for module in self.seen:
            usual = module in self.norms or (module in self.layers and runs_as_usual(module) and "weight" in module._parameters)
            if usual and module in self.alone and kind_of(module) != "embedding" and _channels(module) not in self.unreached:
                yield module

    def link(self, producer: nn.Module) -> Link | None:
        """Scale the producer's output channels and see who can undo that; `None` where not all can."""
        n = _channels(producer)
        generator = torch.Generator().manual_seed(0)
        exponents = torch.tensor(EXPONENTS).repeat(-(-n // len(EXPONENTS)))[:n][torch.randperm(n, generator=generator)]
        factors = torch.exp2(exponents.float()).to(next(producer.parameters()).device)
        calls: dict[nn.Module, list[Tensor | None]] = defaultdict(list)
        clips: dict[str, tuple[int, ...]] = {}

        def give_back(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = next(tensors_in((args, kwargs)))
            before = self._before(module, len(calls[module]), x)
            if _is_close(x, before):
                calls[module].append(None)
                return None
            axis = -1 if isinstance(module, nn.Linear) else 1
            index = _carried(x, before, axis, factors)
            if index is None or not args or args[0] is not x or not self._can_undo(module):
                raise _BlockedError
            calls[module].append(index.cpu())
            return (before.clone(), *args[1:]), kwargs

        def look_at_clip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(tensors_in((args, kwargs)))
            before = self._before(module, len(calls[module]), x)
            calls[module].append(None)
            if _is_close(x, before):
                return
            shapes = ((n, *[1] * (x.ndim - 2)), (n,)) if x.ndim > 1 else ()
            shape = next((s for s in shapes if _can_meet(x, s) and _is_close(x, before * factors.view(s))), None)
            if shape is None or len(self.seen[module]) > 1:
                raise _BlockedError
            clips[self.names[module]] = shape

        def clip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
            shape = clips.get(self.names[module])
            return None if shape is None else F.relu6(self.seen[module][0]) * factors.view(shape)

        def produce(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            with _scaled(module, outputs=factors):
                scaled = module.forward(*args, **kwargs)
            if not isinstance(output, Tensor) or output.ndim < 2:
                raise _BlockedError
            shapes = ((n, *[1] * (output.ndim - 2)), (n,))
            if not any(_can_meet(output, s) and _is_close(scaled, output * factors.view(s)) for s in shapes):
                raise _BlockedError
            return scaled

        before = [*((module, give_back) for module in self.layers), *((module, look_at_clip) for module in self.clips)]
        try:
            with hooked(before, [*((module, clip) for module in self.clips), (producer, produce)]):
                outputs = self._run()
        except _BlockedError:
            return None
        if outputs.shape != self.outputs.shape or not _is_close(outputs, self.outputs):
            return None
        consumers = {}
        for module, found in calls.items():
            indices = [index for index in found if index is not None]
            if not indices:
                continue
            if len(found) < len(self.seen[module]) or not all(i is not None and torch.equal(i, indices[0]) for i in found):
                return None
            consumers[self.names[module]] = indices[0]
        link = Link(self.names[producer], n, consumers, clips)
        return link if consumers and self._holds(link, factors) else None

    def _holds(self, link: Link, factors: Tensor) -> bool:
        """Whether the outputs are as before with the factors in the weights: these may be read elsewhere too."""
        with ExitStack() as stack:
            stack.enter_context(_scaled(self.model.get_submodule(link.producer), outputs=factors))
            for name, index in link.consumers.items():
                inverse = 1 / factors[index.to(factors.device)]
                stack.enter_context(_scaled(self.model.get_submodule(name), inputs=inverse))
            for name, shape in link.clips.items():
                stack.callback(replace_module(self.model, name, ChannelClip(SIX * factors.view(shape)).eval()))
            return _is_close(self._run(), self.outputs)

    def _can_undo(self, module: nn.Module) -> bool:
        return module in self.alone and runs_as_usual(module) and "weight" in module._parameters

    def _before(self, module: nn.Module, call: int, x: Tensor) -> Tensor:
        if call >= len(self.seen[module]) or x.shape != self.seen[module][call].shape:
            raise _BlockedError
        return self.seen[module][call]

    @torch.no_grad()
    def _run(self) -> Tensor:
        with evaluating(self.model):
            return self.forward(self.model, self.inputs)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has a weight for each channel, perhaps a bias, and nothing else: any LayerNorm, RMSNorm, batch norm."""
    found = {name: p for name, p in module._parameters.items() if p is not None}
    weight = found.get("weight")
    return (
        weight is not None
        and weight.ndim == 1
        and weight.is_floating_point()
        and found.keys() <= {"weight", "bias"}
        and all(p.shape == weight.shape for p in found.values())
        and not list(module.children())
    )


def _channels(module: Any) -> int:
    return rows_shape(module)[0] if kind_of(module) is not None else len(module.weight)


@contextmanager
def _scaled(module: Any, outputs: Tensor | None = None, inputs: Tensor | None = None) -> Iterator[None]:
    with swapped_data([(parameter, parameter.data.clone()) for parameter in module.parameters(recurse=False)]):
        scale(module, outputs, inputs)
        yield


def _carried(x: Tensor, before: Tensor, axis: int, factors: Tensor) -> Tensor | None:
    """Which of the scaled channels each channel of x carries, int64; `None` where x is not `before` times their factors.

    In order; or repeated, in runs of any length: each on its own where feature maps are flattened, heads where several queries
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


def _can_meet(x: Tensor, shape: tuple[int, ...]) -> bool:
    return x.ndim >= len(shape) and all(size in (1, other) for size, other in zip(shape[::-1], x.shape[::-1], strict=False))


def _is_close(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x, y) or torch.allclose(x, y, rtol=RELATIVE, atol=ABSOLUTE * float(y.abs().max()))

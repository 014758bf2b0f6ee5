"""The contract of the equalizers: the factor by which each channel is scaled before anything is quantized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError, check_memory
from mpsearch.graph.channel_scaling import SIX, Equalization, by_input
from mpsearch.graph.fold import TOLERANCE
from mpsearch.graph.links import Link, find_links
from mpsearch.graph.surgery import hooked
from mpsearch.graph.trace import first_samples
from mpsearch.layer import kind_of, weight_rows
from mpsearch.schemes.base import QuantScheme
from mpsearch.tasks.base import Batch, Task
from mpsearch.tree import tensors_in

N_PROBED = 1  # samples by which links are found
LIMIT = 2.0**10  # largest factor of a channel: one that would need more is practically unused


@dataclass(frozen=True)
class Network:
    """The float `model` that is equalized: its links, the calibration `batches`, and the run's `schemes` by name."""

    model: nn.Module
    task: Task
    links: Sequence[Link]
    batches: Sequence[Batch]
    schemes: Mapping[str, QuantScheme]

    @torch.no_grad()
    def magnitudes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Consumer -> largest and mean magnitude of each of its input channels, float32 [in], over the calibration data."""
        largest: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        names = {self.model.get_submodule(name): name for link in self.links for name in link.consumers}

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            name, x = names[module], next(tensors_in((args, kwargs))).detach().float().abs()
            x = x.movedim(-1 if isinstance(module, nn.Linear) else 1, -1).flatten(0, -2)
            largest[name] = torch.maximum(largest[name], x.amax(0)) if name in largest else x.amax(0)
            sums[name] = sums.get(name, torch.zeros((), device=x.device)) + x.double().sum(0)
            counts[name] = counts.get(name, 0) + len(x)

        with hooked([(module, watch) for module in names]):
            for inputs, _ in self.batches:
                self.task.forward(self.model, inputs)
        return {name: (largest[name].cpu(), (sums[name] / counts[name]).float().cpu()) for name in largest}


class Equalizer(ABC):
    """Chooses scales; a frozen dataclass whose fields are its settings."""

    def usable(self, network: Network) -> Sequence[Link]:
        """The links that this equalizer scales. Raises `InputError` if it does not apply to the run's schemes."""
        return network.links

    @abstractmethod
    def scales(self, network: Network) -> Sequence[Tensor]:
        """For each of the network's links (all of them `usable`) float32 `[channels]` above 0, on the CPU.

        The producer's output channel c is divided by scale c, and the weights of its consumers are multiplied by it.
        """

    @torch.no_grad()
    def equalize(
        self, model: nn.Module, task: Task, batches: Sequence[Batch], schemes: Mapping[str, QuantScheme]
    ) -> Equalization:
        """Scale `model` in place (eval mode, batch norms folded); returns the factors.

        Raises `InputError` if no channels can be scaled, or if the outputs on the calibration `batches` change by more than
        `fold.TOLERANCE` of the largest (rounding makes 1e-6); the model is then left scaled.
        """
        inputs = batches[0][0]
        try:
            links = find_links(model, task.forward, first_samples(inputs, N_PROBED))
        except Exception as error:  # the model takes batches of one size only
            check_memory(error)
            links = find_links(model, task.forward, inputs)
        network = Network(model, task, links, batches, schemes)
        network = replace(network, links=self.usable(network))
        name = type(self).__name__
        if not network.links:
            raise InputError(
                f"{name} finds no channels of {type(model).__name__} that can be scaled without changing its outputs: a layer or "
                "norm must feed other layers through operations that commute with a factor. Leave equalizer= out."
            )
        before = [task.forward(model, inputs) for inputs, _ in batches]
        equalization = Equalization(name, tensors_of(model, network.links, self.scales(network)))
        equalization.apply(model)
        largest = max(float(logits.abs().max()) for logits in before)
        pairs = zip(before, (task.forward(model, inputs) for inputs, _ in batches), strict=True)
        change = max(float((new - old).abs().max()) for old, new in pairs) / max(largest, 1e-30)
        if not change <= TOLERANCE:
            raise InputError(
                f"{name} would change the outputs of {type(model).__name__} by {change:.2g} of the largest, where float rounding "
                "makes 1e-6: the network behaves differently on the whole calibration split. Leave equalizer= out."
            )
        return equalization


def tensors_of(model: nn.Module, links: Sequence[Link], scales: Sequence[Tensor]) -> dict[str, Tensor]:
    """The factors that `Equalization` records, for links and their scales s.

    The bound 6 / s of a ReLU6 in between is stored in float16, and s is computed from the stored bound: the function stays exact.
    """
    tensors: dict[str, Tensor] = {}
    for link, scale in zip(links, scales, strict=True):
        scale = scale.float().clamp(1 / LIMIT, LIMIT)
        if link.clips:
            high = (SIX / scale).half()
            scale = SIX / high.float()
            tensors |= {f"{name}.high": high.view(shape).clone() for name, shape in link.clips.items()}
        tensors[f"{link.producer}.outputs"] = 1 / scale
        for name, index in link.consumers.items():
            tensors[f"{name}.inputs"] = scale[index]
    return {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}


def by_channel(link: Link, inputs: Mapping[str, Tensor], reduce: str = "amax") -> Tensor:
    """float32 `[channels]`: the largest (or the "mean") over all consumers of their `inputs`, numbers `[in]` by consumer."""
    index = torch.cat(list(link.consumers.values()))
    values = torch.cat([inputs[name].float() for name in link.consumers])
    return torch.zeros(link.channels).scatter_reduce(0, index, values, reduce, include_self=False)


def input_ranges(module: Any, rows: Tensor) -> Tensor:
    """`[in]`: the largest magnitude of the weights (rows, output channels first) of each input channel."""
    return by_input(module, rows).abs().amax((1, 3)).flatten()


def rows_of(network: Network) -> dict[str, Tensor]:
    """Name -> weight rows, float32 on the CPU, of all producers that are layers and of all consumers; copies."""
    names = {name for link in network.links for name in (link.producer, *link.consumers)}
    modules = {name: network.model.get_submodule(name) for name in names}
    return {name: weight_rows(m).detach().float().cpu().clone() for name, m in modules.items() if kind_of(m) is not None}

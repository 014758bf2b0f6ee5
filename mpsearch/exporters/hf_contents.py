"""What of a picked point the files of a Hugging Face folder hold: quantized layers, float layers, biases, and all the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from torch import Tensor

from mpsearch.exporters.base import Picked
from mpsearch.exporters.hf_checkpoint import Checkpoint, Origin
from mpsearch.packed.model import Weights
from mpsearch.schemes.base import QuantizedTensor, QuantScheme
from mpsearch.schemes.floating import Float

logger = logging.getLogger("mpsearch")


class Contents:
    """The tensors of the files, by the checkpoint that the model was loaded from.

    Attributes
    ----------
    chosen
        Layer name -> the layer and the name of its scheme.
    quantized
        Layer name -> scheme, where that is no float format.
    owner
        Weight of the state -> the layer that it is of.
    unties
        Quantized layers whose weight several modules share: it is written for each, as packed codes cannot be tied.
    """

    def __init__(self, checkpoint: Checkpoint, engine: Weights, picked: Picked) -> None:
        self.checkpoint, self.engine = checkpoint, engine
        self.schemes: Mapping[str, QuantScheme] = engine.space.schemes
        self.chosen = {la.name: (la, name) for la, name in engine.space.layer_schemes(picked.evaluation.allocation)}
        self.quantized = {
            name: scheme for name, (_, scheme) in self.chosen.items() if not isinstance(self.schemes[scheme], Float)
        }
        self.owner = {f"{module}.weight": la for la, _ in self.chosen.values() for module in la.modules}
        self.unties = [la for name in self.quantized if len((la := self.chosen[name][0]).modules) > 1]
        for layer in self.unties:
            logger.warning(
                "The tied weight of %s is quantized: it is written twice, %s bytes more than the search counted.",
                " and ".join(layer.modules),
                f"{engine.quantized(layer.name, self.quantized[layer.name]).nbytes:,}",
            )

    def scheme(self, state: str) -> tuple[str, QuantScheme] | None:
        """The quantized scheme of a tensor of the state, with its name."""
        layer = self.owner.get(state)
        name = self.quantized.get(layer.name) if layer is not None else None
        return None if name is None else (name, self.schemes[name])

    def weight(self, state: str) -> QuantizedTensor:
        """The weight of a searched layer."""
        layer = self.owner[state].name
        return self.engine.quantized(layer, self.chosen[layer][1])

    def entries(self) -> Iterator[tuple[str, Origin, Tensor | None]]:
        """Tensor of the files, what it is made of, and its values; `None` where it is quantized."""
        state, biases = self.engine.model.state_dict(), {}
        for layer, scheme in self.chosen.values():
            for module, bias in self.engine.biases(layer.name, scheme).items():
                biases[f"{module}.bias"] = bias
        copies = {module for layer in self.unties for module in layer.modules}
        for name, origin in self.checkpoint.origins.items():
            if self.scheme(origin.parts[0].name) is not None:
                yield name, origin, None
            elif name in self.checkpoint.dtypes or name.rpartition(".")[0] in copies:
                value = origin([biases[p.name] if p.name in biases else self._dense(p.name, state) for p in origin.parts])
                is_chosen = any(part.name in self.owner or part.name in biases for part in origin.parts)
                yield name, origin, value if is_chosen else self.checkpoint.as_stored(name, value)

    def _dense(self, state: str, values: Mapping[str, Tensor]) -> Tensor:
        """A tensor that is not quantized, in the float format of its scheme."""
        if state not in self.owner:
            return values[state]
        weight = self.weight(state)
        return weight.tensors["values"] if "values" in weight.tensors else weight.dequantize()

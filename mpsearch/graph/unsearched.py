"""Name the weights of a model that no layer covers, so that they stay float, and their share of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mpsearch.layer import LayerSpec

NAMED = 5  # modules in the sentence, the largest first


def stored_tensors(model: nn.Module) -> dict[int, Tensor]:
    """All parameters and buffers that a file of the model stores, by id; buffers that are not persistent are in none."""
    return {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}


def other_bits(model: nn.Module, layers: Sequence[LayerSpec]) -> int:
    """Bits of all that a file stores of the model but the weights of `layers`; shared tensors are counted once."""
    searched = _searched(model, layers)
    return sum(8 * tensor.nbytes for key, tensor in stored_tensors(model).items() if key not in searched)


def _searched(model: nn.Module, layers: Sequence[LayerSpec]) -> set[int]:
    return {id(model.get_parameter(layer.weight_name)) for layer in layers}


def unsearched(model: nn.Module, layers: Sequence[LayerSpec]) -> dict[str, Any]:
    """The weights that stay float, JSON-able: `bytes` of all parameters and `float_bytes` of those that no layer covers.

    `weights` maps a module's name to its class and the bytes of its parameters with two or more dimensions, the largest first;
    `biases_and_norms` are the bytes of all others.
    """
    searched = _searched(model, layers)
    others = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in searched}
    small = sum(parameter.nbytes for parameter in others.values() if parameter.dim() < 2)
    weights: dict[str, dict[str, Any]] = {}
    for name, parameter in others.items():
        if parameter.dim() < 2:
            continue
        owner = name.rpartition(".")[0]
        kind = type(model.get_submodule(owner)).__name__
        entry = weights.setdefault(owner or name, {"class": kind if owner else "Parameter", "bytes": 0})
        entry["bytes"] += parameter.nbytes
    largest = sorted(weights.items(), key=lambda item: -item[1]["bytes"])
    float_bytes = small + sum(entry["bytes"] for entry in weights.values())
    total = sum(parameter.nbytes for parameter in model.parameters())
    return {"bytes": total, "float_bytes": float_bytes, "weights": dict(largest), "biases_and_norms": small}


def sentence(summary: Mapping[str, Any]) -> str:
    """ "97.8 % of the parameters are not searched: lstm (LSTM, 97.1 %), biases and norms (0.7 %)." """
    total = max(summary["bytes"], 1)

    def share(nbytes: int) -> str:
        return f"{100 * nbytes / total:.3g} %"

    parts = [f"{name} ({entry['class']}, {share(entry['bytes'])})" for name, entry in list(summary["weights"].items())[:NAMED]]
    if more := list(summary["weights"].values())[NAMED:]:
        parts.append(f"{len(more)} more modules ({share(sum(entry['bytes'] for entry in more))})")
    if summary["biases_and_norms"]:
        parts.append(f"biases and norms ({share(summary['biases_and_norms'])})")
    if not parts:
        return "All parameters are searched."
    return f"{share(summary['float_bytes'])} of the parameters are not searched and stay float: {', '.join(parts)}."

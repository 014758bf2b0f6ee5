"""Whether a packed model computes what was simulated: the outputs of both are compared on a batch of each confirmed point."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation

ROUNDING = 1e-8  # of the outputs' power: what float32 products may make in another order
SHARE = 1e-4  # of the power that quantization itself adds to the outputs
# Rounding moves a few values over the edge of an input's code, and what follows moves more of them: in a deep network the errors
# of quantized inputs become partly independent. Their power stays the same; a product that skips them has another.
SHARE_OF_INPUTS, FACTOR_OF_INPUTS = 0.5, 2.0


def agrees(packed: Tensor, simulated: Tensor, reference: Tensor, has_quantized_inputs: bool) -> bool:
    """Whether the packed model's outputs are the simulated ones, given the float model's (`reference`); all of one shape.

    The squared difference must be at most `SHARE` of the squared change by quantization. With quantized inputs it may be
    `SHARE_OF_INPUTS` of it, and the packed model's own change must lie within `FACTOR_OF_INPUTS` of the simulated one.
    """
    finite = torch.isfinite(simulated)
    if not torch.equal(finite, torch.isfinite(packed)):
        return False
    ours, theirs, base = (x[finite].double() for x in (packed, simulated, reference))
    difference, floor = _power(ours - theirs), ROUNDING * _power(theirs)
    of_packed, of_simulated = _power(ours - base), _power(theirs - base)
    if not has_quantized_inputs:
        return difference <= SHARE * of_simulated + floor
    is_near = of_simulated / FACTOR_OF_INPUTS - floor <= of_packed <= of_simulated * FACTOR_OF_INPUTS + floor
    return is_near and difference <= SHARE_OF_INPUTS * of_simulated + floor


def _power(x: Tensor) -> float:
    return x.square().sum().item()


def check_verified(evaluations: Iterable[Evaluation]) -> None:
    """Raise `InputError` where packed outputs differed from the simulated ones."""
    evaluations = list(evaluations)
    if wrong := [e for e in evaluations if not e.verified]:
        sizes = ", ".join(f"{e.size_bytes:,}" for e in wrong[:5]) + (", …" if len(wrong) > 5 else "")
        raise InputError(
            f"{len(wrong)} of {len(evaluations)} confirmed points are unverified ({sizes} bytes): packed outputs differ from "
            "the simulated ones, so a module of this model does not run as its float one does. Everything measured is kept and "
            "they are marked in the report; do not export them packed."
        )

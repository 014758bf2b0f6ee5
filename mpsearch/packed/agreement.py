"""How far rounding may move outputs and losses, and whether a packed model computes what was simulated.

Float32 products in another order (packed kernels, another library or number of threads) move outputs a little. Every divergence
is quadratic in the change of the outputs, so the square root of a loss is a distance from the float model, and by the triangle
inequality outputs that move by r change it by at most r:

    |sqrt(loss) - sqrt(recorded)| <= r        r = distance + share * sqrt(recorded)

`distance` is rounding itself, `share` what follows where rounding moves a value over the edge of an input's code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mpsearch.batches import chunk_rows
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation

OUTPUT_ROUNDING = 1e-4  # of the outputs' size: ten times what rounding makes
ERROR_ROUNDING = 1e-2  # of the distance by which quantization moves the outputs
# Of a KL divergence in nats: a logit moves by up to e = 1e-3 (1e-5 of logits of up to 100), and the divergence by at most
# e sqrt(2 KL) + e^2 / 2 (Pinsker's inequality), which is r = e / sqrt(2).
LOGIT_DISTANCE = 1e-3 / math.sqrt(2)
# Rounding moves a few values over the edge of an input's code, and what follows moves more of them: in a deep network the errors
# of quantized inputs become partly independent. Their power stays the same; a product that skips them has another.
CODE_SHARE = 0.048  # of the distance: a tenth of the loss
SHARE_OF_INPUTS, FACTOR_OF_INPUTS = 0.5, 2.0  # of the power that quantization adds to the outputs


def losses_agree(loss: float, recorded: float, *, distance: float, share: float = 0.0) -> bool:
    """Whether rounding explains the difference of two losses; see the module."""
    root, recorded_root = math.sqrt(max(loss, 0.0)), math.sqrt(max(recorded, 0.0))
    return abs(root - recorded_root) <= distance + share * recorded_root


def agrees(packed: Tensor, simulated: Tensor, reference: Tensor, has_quantized_inputs: bool) -> bool:
    """Whether the packed model's outputs are the simulated ones, given the float model's (`reference`); all of one shape.

    They must be `ERROR_ROUNDING` of the change by quantization apart, or `OUTPUT_ROUNDING` of the outputs. With quantized inputs
    the power of the difference may be `SHARE_OF_INPUTS` of that of the change, and the power of the packed change must
    be within `FACTOR_OF_INPUTS` of that of the simulated one.
    """
    if not torch.equal(torch.isfinite(simulated), torch.isfinite(packed)):
        return False
    sums = [0.0] * 4
    for part in zip(*(outputs.split(chunk_rows(reference)) for outputs in (packed, simulated, reference)), strict=True):
        y, y0, float_y = (outputs[torch.isfinite(part[1])].double() for outputs in part)
        sums = [total + _power(x) for total, x in zip(sums, (y - y0, y0, y - float_y, y0 - float_y), strict=True)]
    difference, power, packed_change, simulated_change = sums
    floor = OUTPUT_ROUNDING**2 * power
    if not has_quantized_inputs:
        return difference <= ERROR_ROUNDING**2 * simulated_change + floor
    lowest, highest = simulated_change / FACTOR_OF_INPUTS - floor, simulated_change * FACTOR_OF_INPUTS + floor
    return lowest <= packed_change <= highest and difference <= SHARE_OF_INPUTS * simulated_change + floor


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

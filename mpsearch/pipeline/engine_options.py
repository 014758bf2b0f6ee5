"""What an engine needs in addition to the prepared model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpsearch.costs.size import parse_bytes

LEAST_BYTES, OUTPUT_BYTES = 8 * 10**8, 256 * 10**6  # of `EngineOptions.max_bytes`, where it is not given
FILE_SHARE = 4  # times as many bytes of Hessians and output Fishers, which lie in files on a CPU (`mpsearch.engine.sums`)


@dataclass(frozen=True)
class EngineOptions:
    """Sizes in bytes, as numbers or as text ("2GB").

    `max_bytes` is the memory for a pass over the data while layers are quantized (on a CPU Hessians are in files of at most
    `FILE_SHARE` times that), and then for quantized weights and for layer outputs from which evaluations start; `None`:
    `LEAST_BYTES`, or the weights in float32 and `OUTPUT_BYTES`. `prefix_max_bytes` is the part for layer outputs; `None`: what
    dense weights leave, a quarter at least.
    """

    bias_correction: bool = True
    max_bytes: str | float | None = None
    prefix_max_bytes: str | float | None = None
    device: str = "cpu"

    def limits(self, n_weights: int, n_schemes: int) -> dict[str, Any]:
        """`hessian_max_bytes`, `bank_max_bytes` and `prefix_max_bytes` of an engine for so many searched weights and schemes."""
        dense = 4 * n_weights
        default = max(LEAST_BYTES, dense + OUTPUT_BYTES)
        total = default if self.max_bytes is None else parse_bytes(self.max_bytes)
        bank = min(n_schemes * dense, max(total // 2, dense), 3 * total // 4)
        prefix = total - bank if self.prefix_max_bytes is None else parse_bytes(self.prefix_max_bytes)
        hessian = max(total - OUTPUT_BYTES, total // 2)  # a pass over the data needs memory too
        hessian *= FILE_SHARE if self.device == "cpu" else 1
        return {"hessian_max_bytes": hessian, "bank_max_bytes": bank, "prefix_max_bytes": prefix}

"""AdaRound: whether each weight is rounded up or down is learnt, by gradient descent (Nagel et al. 2020, arXiv 2004.10568).

With H = E[x x^T] of the layer's input, the mean squared error of the outputs is tr(E H E^T), E being the error of the weight
(equation 20): that is what is minimized, so that no samples are needed beside H. Each weight lies at floor(w / s) + h(v) steps,

    h(v) = clip(sigmoid(v) * (zeta - gamma) + gamma, 0, 1),    zeta = 1.1, gamma = -0.1                        (equation 23)

and lambda * sum(1 - |2 h - 1|^beta) draws h to 0 or 1 (equation 24), the more the lower beta, which falls from 20 to 2 after a
first part without. The scales come first, of the clip search weighted by the diagonal of H, and stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.grids import Grid, Integers

ZETA, GAMMA = 1.1, -0.1
BETAS = (20.0, 2.0)


@dataclass(frozen=True)
class AdaRound(GPTQ):
    """`n_steps` of Adam with `learning_rate`; h is free for the first `warmup` of them and then drawn with `pull`, lambda.

    The error is taken relative to that of rounding to nearest, a weight, so that `pull` means the same for all layers. That, and
    few large steps, are not the paper's (20,000 steps of 0.001 on batches): here the gradient is exact. `act_order` is of no use.
    A layer without a Hessian, and a codebook, are rounded as by `GPTQ`.
    """

    n_steps: int = 300
    learning_rate: float = 0.1
    warmup: float = 0.2
    pull: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_steps < 1 or self.learning_rate <= 0 or not 0 <= self.warmup < 1 or self.pull <= 0:
            raise InputError(
                f"AdaRound needs n_steps >= 1, learning_rate > 0, 0 <= warmup < 1 and pull > 0; {self.n_steps}, "
                f"{self.learning_rate:g}, {self.warmup:g} and {self.pull:g} came."
            )

    def _solve(
        self, weight: Tensor, hessian: Tensor, scales: Tensor, grid: Grid, groups: Tensor, shared: bool
    ) -> tuple[Tensor, Tensor]:
        """Codes `[rows, columns]` and scales `[rows, n_groups]`, these as they came."""
        if not isinstance(grid, Integers):
            return super()._solve(weight, hessian, scales, grid, groups, shared)
        k, columns, top = len(hessian), len(groups), 2**grid.bits - 1
        scale, zero = scales.float()[:, groups], grid.zeros[:, groups]
        place = torch.where(scale == 0, zero, weight / torch.where(scale == 0, 1.0, scale) + zero)
        below = place.floor().clamp(0, top)
        share = (place - below).clamp(0.01, 0.99)  # beyond the range both ways are the same code
        single = hessian.float()

        def error(steps: Tensor) -> Tensor:
            e = (steps.clamp(0, top) - zero) * scale - weight
            e = (e if grid.fixed is None else e.masked_fill(grid.fixed, 0.0)).reshape(k, -1, columns)
            return ((e @ single) * e).sum()

        usual = error(place.round()).clamp(min=torch.finfo(torch.float32).tiny) / weight.numel()
        with torch.enable_grad():
            v = torch.logit((share - GAMMA) / (ZETA - GAMMA)).requires_grad_()
            optimizer = torch.optim.Adam([v], lr=self.learning_rate)
            start = round(self.warmup * self.n_steps)
            for step in range(self.n_steps):
                h = (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
                loss = error(below + h) / usual
                if step >= start:
                    left = 1 - (step - start) / max(self.n_steps - start, 1)
                    beta = BETAS[1] + (BETAS[0] - BETAS[1]) * left
                    loss = loss + self.pull * (1 - (2 * h - 1).abs().pow(beta)).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return (below + (v.detach() >= 0)).clamp(0, top).to(torch.uint8), scales

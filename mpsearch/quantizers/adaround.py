"""AdaRound: whether each weight is rounded up or down is learned by gradient descent (Nagel et al. 2020, arXiv 2004.10568).

With H = E[x x^T] of the layer's input, the mean squared error of the outputs is tr(E H E^T), E being the error of the weight
(equation 20). It is minimized directly, so that no samples are needed but H. Each weight lies at floor(w / s) + h(v) steps,

    h(v) = clip(sigmoid(v) * (zeta - gamma) + gamma, 0, 1),    zeta = 1.1, gamma = -0.1                        (equation 23)

and lambda * sum(1 - |2 h - 1|^beta) pulls h to 0 or 1 (equation 24), more for a lower beta, which falls from 20 to 2 after a
warm-up without this term. The scales come first, from the clip search weighted by the diagonal of H, and stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.grids import Integers, RoundingProblem

ZETA, GAMMA = 1.1, -0.1
BETAS = (20.0, 2.0)


@dataclass(frozen=True)
class AdaRound(GPTQ):
    """Adam on the rounding of each weight.

    The error is relative to that of rounding to nearest, per weight, so that `pull` means the same for all layers. This, and few
    large steps, differ from the paper (20,000 steps of 0.001 on batches): here the gradient is exact. `act_order` is not used.
    A layer without a Hessian, and a codebook, are rounded as by `GPTQ`.

    Parameters
    ----------
    n_candidates, min_ratio, damping, act_order
        Of GPTQ.
    n_steps, learning_rate
        Of Adam.
    warmup
        Share of the steps without the pull to 0 or 1.
    pull
        The paper's lambda.
    """

    n_steps: int = 300
    learning_rate: float = 0.1
    warmup: float = 0.2
    pull: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_steps < 1 or self.learning_rate <= 0 or not 0 <= self.warmup < 1 or self.pull <= 0:
            raise InputError(
                f"AdaRound needs n_steps >= 1, learning_rate > 0, 0 <= warmup < 1 and pull > 0; got {self.n_steps}, "
                f"{self.learning_rate:g}, {self.warmup:g} and {self.pull:g}."
            )

    def _solve(self, problem: RoundingProblem, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[rows, columns]` and the given scales `[rows, n_groups]`."""
        grid, groups = problem.grid, problem.groups
        if not isinstance(grid, Integers):
            return super()._solve(problem, scales)
        weight, hessian, top = problem.weight, problem.hessian.float(), 2**grid.bits - 1
        scale, zero = scales.float()[:, groups], grid.zeros[:, groups]
        steps = torch.where(scale == 0, zero, weight / torch.where(scale == 0, 1.0, scale) + zero)
        below = steps.floor().clamp(0, top)
        share = (steps - below).clamp(0.01, 0.99)  # beyond the range both ways are the same code

        def error(steps: Tensor) -> Tensor:
            e = (steps.clamp(0, top) - zero) * scale - weight
            e = (e if grid.fixed is None else e.masked_fill(grid.fixed, 0.0)).reshape(len(hessian), -1, len(groups))
            return ((e @ hessian) * e).sum()

        reference = error(steps.round()).clamp(min=torch.finfo(torch.float32).tiny) / weight.numel()
        with torch.enable_grad():
            v = torch.logit((share - GAMMA) / (ZETA - GAMMA)).requires_grad_()
            optimizer = torch.optim.Adam([v], lr=self.learning_rate)
            start = round(self.warmup * self.n_steps)
            for step in range(self.n_steps):
                h = (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
                loss = error(below + h) / reference
                if step >= start:
                    remaining = 1 - (step - start) / max(self.n_steps - start, 1)
                    beta = BETAS[1] + (BETAS[0] - BETAS[1]) * remaining
                    loss = loss + self.pull * (1 - (2 * h - 1).abs().pow(beta)).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return (below + (v.detach() >= 0)).clamp(0, top).to(torch.uint8), scales

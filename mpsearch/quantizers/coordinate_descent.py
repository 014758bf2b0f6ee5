"""Cyclic coordinate descent on the error of the layer's output, starting from GPTQ's codes (Behdin et al. 2023, QuantEase).

GPTQ's early columns do not depend on the errors of the later ones. Here columns take turns: each moves to the code that is best
with all others as they are, which is the one nearest to w_j - sum_(i != j) H_ji e_i / H_jj (equation 10), so that e^T H e never
grows. Between the sweeps each group's scale takes the best value for its codes, s + (q^T H (w - s q)) / (q^T H q).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import check_integer
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.grids import RoundingProblem


@dataclass(frozen=True)
class CoordinateDescent(GPTQ):
    """Sweeps over all columns, each after the scales were fitted; stops early where no code changes.

    Parameters
    ----------
    n_candidates, min_ratio, damping, act_order
        Of GPTQ.
    n_sweeps
        At most so many sweeps.
    """

    n_sweeps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("n_sweeps", self.n_sweeps, hint=" For none, use quantizer=gptq.")

    def work(self, rows: int, columns: int, k: int = 1) -> float:
        """In addition, the sweeps and the fits of the scales."""
        return super().work(rows, columns, k) + 3.0 * self.n_sweeps * k * rows * columns**2

    def _solve(self, problem: RoundingProblem, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The codes and scales with the least error of all sweeps, for each row by itself."""
        codes, scales = super()._solve(problem, scales)
        feedback = (problem.hessian / problem.hessian.diagonal(dim1=1, dim2=2)[:, :, None]).float()
        least, best_codes, best_scales = problem.squared_errors(codes, scales), codes, scales
        for _ in range(self.n_sweeps):
            scales = problem.fitted_scales(codes, scales)
            errors = problem.dequantized(codes, scales) - problem.weight
            moved = problem.grid.rounded(problem.weight, feedback, scales, problem.groups, errors)
            error = problem.squared_errors(moved, scales)
            better = (error < least)[:, None]
            least = torch.minimum(error, least)
            best_codes, best_scales = torch.where(better, moved, best_codes), torch.where(better, scales, best_scales)
            if torch.equal(moved, codes):
                break
            codes = moved
        return best_codes, best_scales

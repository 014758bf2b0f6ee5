"""What a layer's weight should be, given the inputs that quantized layers before it make: a regression on their statistics.

With x the input of the float model, x' that of the model whose layers before this one are quantized (its own quantized input, if
the scheme has one), and r, r' what is added to the output in either (a residual connection; 0 without one), the output that is
wanted is W x + r - r'. The weight V that comes nearest to it solves

    V = argmin E |W x + r - r' - V x'|^2 + d |V - W|^2 = W + P (H + d I)^-1,    H = E[x' x'^T],  P = E[(W (x - x') + r - r') x'^T]

(GPTAQ: Li et al. 2025, https://arxiv.org/abs/2504.02692, without r). Only part of the way to V is gone, as in QEP (Arai and
Ichikawa 2025, https://arxiv.org/abs/2504.09629): V is fitted to few samples, and what it loses in variance, as every regression
on noisy inputs does, later layers cannot restore. Damping and step are those with the least error on samples that V was not
fitted to: each half of the batches tests what was fitted to the other. The output Fisher, where it is known, weighs errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.refiners.paired import Rows


class Sums:
    """Sums over output positions, float32 `[k, …]` on the CPU, of k groups of a grouped convolution (else 1)."""

    def __init__(self) -> None:
        self.n = 0
        self.parts: dict[str, Tensor] = {}

    def add(self, wanted: Rows, given: Rows) -> None:
        """Add what the same positions hold in the float model and in the copy."""
        x, q = wanted.inputs, given.inputs
        new = {"float_mean": x.sum(1), "mean": q.sum(1), "hessian": q.transpose(1, 2) @ q, "cross": x.transpose(1, 2) @ q}
        if wanted.residual is not None and given.residual is not None:
            difference = wanted.residual - given.residual
            r = difference.reshape(len(difference), len(q), -1).transpose(0, 1)
            new |= {"residual_mean": r.sum(1), "residual_cross": r.transpose(1, 2) @ q}
        self.n += q.shape[1]
        for name, value in new.items():
            self.parts[name] = self.parts[name] + value.cpu() if name in self.parts else value.cpu()

    def merged(self, other: Sums) -> Sums:
        """The sums over the positions of both."""
        both = Sums()
        both.n = self.n + other.n
        both.parts = {name: value + other.parts[name] if other.n else value for name, value in self.parts.items()}
        return both


@dataclass(frozen=True)
class Regression:
    """Means of the inputs and of r - r', H and P as above; float64, `[k, columns]`, `[k, rows / k]`, and matrices of these.

    Centred, if the layer's bias takes up all means: H and P are then covariances.
    """

    mean: Tensor
    float_mean: Tensor
    residual_mean: Tensor
    hessian: Tensor
    pull: Tensor

    @classmethod
    def from_sums(cls, sums: Sums, weight: Tensor, *, centred: bool) -> Regression:
        """Of the layer's float `weight`, float64 `[k, rows / k, columns]`."""
        means = {name: total.double() / sums.n for name, total in sums.parts.items()}
        mean, float_mean, hessian, cross = (means[name] for name in ("mean", "float_mean", "hessian", "cross"))
        residual_mean = means.get("residual_mean", weight.new_zeros(weight.shape[:2]))
        residual_cross = means.get("residual_cross", torch.zeros_like(weight))
        if centred:
            hessian = hessian - mean[:, :, None] * mean[:, None, :]
            hessian.diagonal(dim1=1, dim2=2).clamp_(min=0)  # of an input that is constant it is rounding of either sign
            cross = cross - float_mean[:, :, None] * mean[:, None, :]
            residual_cross = residual_cross - residual_mean[:, :, None] * mean[:, None, :]
        return cls(mean, float_mean, residual_mean, hessian, weight @ (cross - hessian) + residual_cross)

    def change(self, damping: float) -> Tensor:
        """V - W, float64 `[k, rows / k, columns]`; d is `damping` times the mean of H's diagonal (1 where that is 0).

        Where H, of few positions, is not positive definite with d, ten times d is tried; V is W where even 1e6 times it is not.
        """
        diagonal = self.hessian.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1, keepdim=True)
        d = torch.diag_embed((damping * torch.where(mean > 0, mean, 1.0)).expand_as(diagonal))
        for power in range(7):
            factor, info = torch.linalg.cholesky_ex(self.hessian + 10.0**power * d)
            if not info.any():
                return torch.cholesky_solve(self.pull.transpose(1, 2), factor).transpose(1, 2)
        return torch.zeros_like(self.pull)


def held_out(
    halves: Sequence[Regression], dampings: Sequence[float], fisher: Tensor | None, step: float | None = None
) -> tuple[float, float]:
    """(damping, step) with the least error on the half that V was not fitted to; a step of 0 where no V has less than W.

    With D = V - W the error changes by tr(G (s^2 D H D^T - 2 s D P^T)) after a step s in [0, 1]; its least is at a ratio.

    Parameters
    ----------
    halves
        Two; of fewer nothing can be held out, and the step is 0.
    fisher
        G, float64 `[k, rows / k, rows / k]`; `None` weighs all rows alike.
    step
        Given, only the damping is chosen.
    """
    if len(dampings) == 1 and step is not None:
        return dampings[0], step
    tried = [(0.0, dampings[0], step or 0.0)] if step is None or len(halves) < 2 else []
    for damping in dampings if len(halves) == 2 else ():
        linear = square = 0.0
        for fitted, test in (halves, halves[::-1]):
            change = fitted.change(damping)
            weighted = change if fisher is None else fisher @ change
            linear += float((weighted * test.pull).sum())
            square += float((weighted @ test.hessian * change).sum())
        s = step if step is not None else min(max(linear / square, 0.0), 1.0) if square > 0 else 0.0
        tried.append((s**2 * square - 2 * s * linear, damping, s))
    return min(tried)[1:]

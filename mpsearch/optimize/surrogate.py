"""Predicts the loss of an allocation from what was measured so far, with an error bar.

A layer's quantization moves the network's output by an error e_g, and near the float model the loss is a quadratic form of their
sum (LeCun et al. 1990, "Optimal Brain Damage"; Deng et al. 2023, "CLADO", https://arxiv.org/abs/2307.05657, eq. 3):

    L(x) = |sum_g e_g|^2 / 2 = sum_g a_g + sum_{g != h} rho_gh sqrt(a_g a_h),      a_g: the sensitivity of group g in its scheme,

so an allocation is seen as the unit vector of its amplitudes, phi_gs(x) = sqrt(a_gs / A) where g takes s, else 0; A = sum_g a_g.
In logarithms,

    ln L(x) = ln C (1 - exp(-J / C)) + sum_gs,ht rho_gs,ht(ln A) phi_gs phi_ht + noise,      g != h
              [+ b + l(ln A) + sum_gs w_gs phi_gs].

The first term is what the sensitivities say, with a link that saturates at the largest loss C that was measured: J = A, or where
the metric knows e_g too (`metrics/gauss_newton.py`) |sum_g e_g|^2 / 2 and what is left of each a_g. The rho are what is missed,
smooth functions of the level: a network that is damaged much has other interactions. A group alone has none: its loss was
measured, it *is* the sensitivity. Only where the sensitivities are no losses, but a metric of another kind, there are also b for
its unit, l for its curve and w for what it misjudges; they would be learned from mixed allocations, and wrong for any others.
All are Gaussian and regularized towards none, so this is a Gaussian process (Rasmussen and Williams 2006, chapter 2) whose kernel
needs inner products of the phi only: no matrix over pairs is ever formed, its rank is at most the number of evaluations. How much
there is of each term is chosen by the evidence (chapter 5): interactions are taken up where the measurements ask for them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

from mpsearch.optimize.pareto import nearest_front

Floats = NDArray[np.float64]
Choices = NDArray[np.intp]

MAX_FITTED, MAX_EVIDENCE = 256, 128  # evaluations that it is fitted to, and that choose its variances: its cost is their cube
LEVEL_WIDTH = 2.0  # nats of ln A over which l and rho change their course
SHARED = 0.5  # the part of a group's coefficients that all its schemes have in common
OFFSET = 10.0  # prior variance of b: a metric in another unit than the loss
START = np.log([3e-3, 0.05, 0.2, 0.2])  # variances of the noise, of l, w and rho
WEIGHT = 0.05  # of the log-normal prior on these variances round START; a factor of 20 costs half a nat
BOUNDS = [(-12.0, 3.0)] + [(-12.0, 5.0)] * 3
NUGGET = 1e-5
SMALLEST = 1e-7  # of the largest sensitivity: what counts as none
CANCELLED = 0.01  # of the summed sensitivities: the least that is believed to be left where effects cancel


class _Seen(NamedTuple):
    """What the kernel sees of `n` allocations."""

    level: Floats  # [n] ln A
    group: NDArray[np.float32]  # [n, n_groups] sqrt(a_g / A)
    scheme: NDArray[np.float32]  # [n, n_groups * n_choices] the same, where the group takes the scheme
    squared: NDArray[np.float32]  # [n, n_groups * n_choices] its squares


class Surrogate:
    """The model of one search; `fit` it, then `predict`.

    Args:
        losses: float64 [n_groups, n_choices], the sensitivities, in any unit that adds up; infinite where not allowed.
        exact: they are what is predicted, measured of each group alone.
        effects: float32 [n, n_groups, n_choices], e: of the sensitivities |e|^2 / 2, what adds up with signs.
    """

    def __init__(self, losses: Floats, exact: bool = True, effects: NDArray[np.float32] | None = None) -> None:
        allowed = np.isfinite(losses)
        top = float(losses[allowed].max(initial=0.0)) or 1.0
        self.amplitude = np.sqrt(np.where(allowed, np.maximum(losses, SMALLEST * top), top))
        self._effects = np.zeros((0, *losses.shape), dtype=np.float32) if effects is None else effects
        self._own = np.square(self.amplitude) - 0.5 * np.square(self._effects).sum(0)
        self._free = np.array([0, 3] if exact else [0, 1, 2, 3])  # the variances that there are
        self.variances = np.where(np.isin(np.arange(4), self._free), np.exp(START), 0.0)
        self._offset = 0.0 if exact else OFFSET
        self._forget()

    def _forget(self) -> None:
        self.ceiling, self._weights, self._factor = np.inf, np.empty(0), np.empty((0, 0))
        self._known = self._see(np.empty((0, len(self.amplitude)), dtype=np.intp))

    def additive(self, choices: Choices) -> Floats:
        """[n] ln of the summed sensitivities of `choices` [n, n_groups]: what a model without measurements would say."""
        return np.log(np.square(self.amplitude[np.arange(len(self.amplitude)), choices]).sum(1))

    def _together(self, choices: Choices) -> Floats:
        """[n] the J of `choices` [n, n_groups]."""
        rows, (groups, n_choices) = np.arange(len(self.amplitude)), self.amplitude.shape
        own = self._own[rows, choices].sum(1)
        if not len(self._effects):
            return own
        taken = np.zeros((len(choices), groups * n_choices), dtype=np.float32)
        np.put_along_axis(taken, rows * n_choices + choices, 1.0, axis=1)
        joint = own + 0.5 * np.square(_product(taken, self._effects.reshape(len(self._effects), -1).T)).sum(1)
        return np.maximum(joint, CANCELLED * np.square(self.amplitude[rows, choices]).sum(1))

    def choose_variances(self, choices: Choices, log_losses: Floats, costs: Floats | None = None) -> None:
        """Set the variances by the evidence of these measurements, `MAX_EVIDENCE` at most; arguments as `fit`."""
        choices, log_losses = _nearest_front(choices, log_losses, costs, MAX_EVIDENCE)
        seen, residual = self._see(choices), log_losses - self._mean(choices, float(np.exp(log_losses.max())))
        free = self._free
        parts = self._parts(seen, seen)[free[1:] - 1]

        def objective(logs: Floats) -> tuple[float, Floats]:
            kernel = self._offset + np.tensordot(np.exp(logs[1:]), parts, 1)
            kernel[np.diag_indices(len(kernel))] += np.exp(logs[0])
            factor = cholesky(kernel, lower=True)
            weights = cho_solve((factor, True), residual)
            inverse = cho_solve((factor, True), np.eye(len(kernel)))
            off = logs - START[free]
            value = 0.5 * residual @ weights + np.log(np.diag(factor)).sum() + WEIGHT * off @ off
            outer = inverse - np.outer(weights, weights)
            slopes = np.append(np.trace(outer), (parts * outer).sum((1, 2)))
            return value, 0.5 * np.exp(logs) * slopes + 2 * WEIGHT * off

        bounds = [BOUNDS[i] for i in free]
        minimum = minimize(objective, START[free], jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 30})
        self.variances[free] = np.exp(minimum.x)

    def fit(self, choices: Choices, log_losses: Floats, costs: Floats | None = None) -> None:
        """Condition on measurements, of more than `MAX_FITTED` on those nearest to the front.

        Parameters
        ----------
        choices
            intp `[n, n_groups]`.
        log_losses
            float64 `[n]`: natural logarithms of the losses, finite.
        costs
            float64 `[n]`: the other axis of the front; `None`: all measurements are used.
        """
        choices, log_losses = _nearest_front(choices, log_losses, costs, MAX_FITTED)
        if not len(choices):
            self._forget()
            return
        self.ceiling = float(np.exp(log_losses.max()))
        self._known = self._see(choices)
        kernel = self._kernel(self._known, self._known)
        kernel[np.diag_indices(len(kernel))] += self.variances[0]
        self._factor = cholesky(kernel, lower=True)
        self._weights = cho_solve((self._factor, True), log_losses - self._mean(choices, self.ceiling))

    def predict(self, choices: Choices) -> tuple[Floats, Floats]:
        """(mean, standard deviation) [n] of ln loss of `choices` [n, n_groups], the noise of a measurement included."""
        seen = self._see(choices)
        kernel = self._kernel(seen, self._known)
        noise, level, linear, square = self.variances
        own = self._offset + noise + level + linear + square * (1 - np.power(seen.group, 4).sum(1))  # phi has length 1
        explained = (
            np.square(solve_triangular(self._factor, kernel.T, lower=True)).sum(0) if kernel.size else np.zeros(len(choices))
        )
        return self._mean(choices, self.ceiling) + kernel @ self._weights, np.sqrt(np.maximum(own - explained, noise))

    def table(self, choice: Choices) -> Floats:
        """[n_groups, n_choices]: what each choice adds to ln loss near the allocation `choice` [n_groups], to first order.

        Sums over groups are comparable among allocations near `choice`: a knapsack of it is the way down from there.
        """
        seen = self._see(choice[None])
        total = np.exp(seen.level[0])
        _, level, linear, square = self.variances
        rows, shape = np.arange(len(self.amplitude)), self.amplitude.shape
        near, inner, pairs = self._parts(seen, self._known)[:, 0]
        cross = (2 * self._weights * square * near).astype(np.float32)
        pull = (self._weights * linear + cross * inner).astype(np.float32)
        of_group, of_scheme = _product(pull, self._known.group), _product(pull, self._known.scheme).reshape(shape)
        # A group's own part of an inner product is none of its interactions.
        own, phi = _product(cross, self._known.squared).reshape(shape), seen.group[0]
        of_group -= phi * (SHARED * own.sum(1) + (1 - SHARED) * own[rows, choice])
        of_scheme -= phi[:, None] * own * np.where(np.arange(shape[1]) == choice[:, None], 1.0, SHARED)
        slope = SHARED * of_group[:, None] + (1 - SHARED) * of_scheme
        share = self.amplitude / np.sqrt(total)
        away = self._known.level - seen.level[0]
        steeper = float(self._weights @ ((level * near + square * pairs) * away)) / LEVEL_WIDTH**2
        # Raising a_g also turns phi away from all the others: w by half as much as rho.
        turned = 0.5 * float(self._weights @ (linear * inner)) + float(self._weights @ (square * pairs))
        joint = float(self._together(choice[None])[0])
        link = (joint / self.ceiling) / np.expm1(min(joint / self.ceiling, 50.0)) if np.isfinite(self.ceiling) else 1.0
        now = self._effects[:, rows, choice]
        added = self.amplitude**2 + np.einsum("ng,ngs->gs", now.sum(1, keepdims=True) - now, self._effects)  # but for constants
        return max(link + steeper - turned, 0.1) * added / joint + slope * share

    def _see(self, choices: Choices) -> _Seen:
        rows = np.arange(len(self.amplitude))
        amplitude = self.amplitude[rows, choices]
        total = np.square(amplitude).sum(1)
        group = (amplitude / np.sqrt(total)[:, None]).astype(np.float32)
        scheme = np.zeros((len(choices), *self.amplitude.shape), dtype=np.float32)
        scheme[np.arange(len(choices))[:, None], rows, choices] = group
        scheme = scheme.reshape(len(choices), self.amplitude.size)
        return _Seen(np.log(total), group, scheme, scheme**2)

    def _mean(self, choices: Choices, ceiling: float) -> Floats:
        expected = np.log(self._together(choices))
        if not np.isfinite(ceiling):
            return expected
        return np.log(ceiling) + np.log(-np.expm1(-np.exp(expected - np.log(ceiling))))

    def _inner(self, a: _Seen, b: _Seen) -> Floats:
        return (SHARED * _product(a.group, b.group.T) + (1 - SHARED) * _product(a.scheme, b.scheme.T)).astype(np.float64)

    def _parts(self, a: _Seen, b: _Seen) -> Floats:
        """[3, n, m]: the kernels of l, w and rho; among the same allocations with the nugget that float32 asks for."""
        level = np.exp(-0.5 * np.square((a.level[:, None] - b.level) / LEVEL_WIDTH))
        inner = self._inner(a, b)
        # What is left of the square without the products of a group with itself.
        own = SHARED**2 * _product(a.group**2, (b.group**2).T) + (1 - SHARED**2) * _product(a.squared, b.squared.T)
        parts = np.stack([level, inner, level * (inner**2 - own)])
        if a is b:
            parts[:, np.arange(len(inner)), np.arange(len(inner))] += NUGGET
        return parts

    def _kernel(self, a: _Seen, b: _Seen) -> Floats:
        return self._offset + np.tensordot(self.variances[1:], self._parts(a, b), 1)


def _nearest_front(choices: Choices, log_losses: Floats, costs: Floats | None, n: int) -> tuple[Choices, Floats]:
    if costs is None:
        return choices, log_losses
    nearest = nearest_front(costs, log_losses, n)
    return choices[nearest], log_losses[nearest]


def _product(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """`a @ b` of finite float32 arrays, without the warning that NumPy may give although all numbers are valid.

    OpenBLAS (0.3.31, AVX-512) reads unset memory of its stack where a vector meets five columns. The product is right, but the
    processor's flag for invalid operations is set where these bits happen to be a signaling NaN.
    """
    with np.errstate(invalid="ignore"):
        return a @ b

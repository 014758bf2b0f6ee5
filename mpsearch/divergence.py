"""The loss: the divergence of a model's outputs from the float model's, one definition for every kind of task.

A `Divergence` compares outputs `[n, columns]` with the float model's and gives one number per row, 0 where both are equal. It
also gives its Hessian at that minimum, as random probes (`gauss_newton`, `kronecker_descent`) and as drawn labels (`fisher`,
`hawq`), the loss that distillation minimizes, and the task loss and quality of tasks that define none.

    softmax_kl     KL(softmax(z0) || softmax(z))                          classes, tokens
    sigmoid_kl     sum over columns of KL(sigmoid(z0) || sigmoid(z))      one binary output, or several labels for each sample
    relative_mse   ||y - y0||^2 / E ||y0 - E y0||^2                       regression, embeddings, detection heads

Losses are computed in float64 from the outputs as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mpsearch.batches import chunk_rows
from mpsearch.errors import InputError, did_you_mean

# The smallest loss that is distinguished from 0, where a logarithm of a loss is taken. Float32 arithmetic changes outputs by 1e-6
# to 1e-5 of their size (sums of hundreds of products, in another order with other kernels or threads), and every divergence here
# is quadratic in that change: 1e-12 to 1e-10. Weights in float16, the finest scheme, cost about 1e-8.
LOSS_FLOOR = 1e-9

TINY = torch.finfo(torch.float32).tiny
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
COUNTING = 0.3  # of the rows: as many must count in a mean over rows of Hessians
SUM_TOLERANCE = 1e-3  # by which a row of probabilities may miss 1: float16 rounds each of a thousand to 3e-8


class Divergence(ABC):
    """Compares outputs `[n, columns]` with the float model's; see the module."""

    name: ClassVar[str]
    label: ClassVar[str]
    unit: ClassVar[str] = "nats"

    def rows(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """The divergence of each row from the float model's outputs `reference`, float64 `[n]`; NaN where they are not finite."""
        step = chunk_rows(reference)
        pairs = zip(outputs.split(step), reference.split(step), strict=True)
        return torch.cat([self._rows(y.double(), y0.double()) for y, y0 in pairs])

    def mean(self, outputs: Tensor, reference: Tensor) -> float:
        """The mean over the rows, infinite where it is not a number."""
        loss = self.rows(outputs, reference).mean().item()
        return loss if loss == loss else float("inf")

    @abstractmethod
    def _rows(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """`rows` of a chunk in float64."""

    @abstractmethod
    def distillation(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """The mean divergence, differentiable with respect to `outputs`, in their own precision."""

    @abstractmethod
    def probe(self, outputs: Tensor, signs: Tensor, temperature: float = 1.0) -> Tensor:
        """The differentiable sum of (B v)^T y over rows, v their `signs` `[n, columns]` of any dtype; B B^T is the Hessian.

        With a `temperature` t the Hessian is that of predictions by y / t, with respect to y / t; of no prediction, the same.
        """

    def temperature(self, outputs: Tensor) -> float:
        """At which a mean of Hessians over the rows is one of many rows, not of the few that are predicted without confidence.

        On data that a network was trained on, nearly all predictions are confident and have Hessians near 0: one row in twenty
        may decide, and other data have others. The least of `TEMPERATURES` at which (sum w)^2 / sum w^2 of the traces w is
        `COUNTING` of their number, which it often is at 1.
        """
        return 1.0

    @abstractmethod
    def drawn_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """The summed negative log-likelihood of targets drawn from the prediction itself; no label is used.

        The second moment of its gradient is the true Fisher information, the Hessian of the divergence, and not the empirical one
        (Kunstner et al. 2019).
        """

    @abstractmethod
    def task_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each row against its target, float32 `[n]`: cross-entropy in nats, or squared error."""

    @abstractmethod
    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The share of each row that is predicted right, float32 `[n]`. Raises `InputError` where there is no such thing."""

    def describe(self) -> str:
        """As in "softmax KL"."""
        return self.label


@dataclass(frozen=True)
class KLDivergence(Divergence):
    """A KL divergence in nats between predictions; `probabilities` says that outputs are these, and not logits."""

    probabilities: bool = False

    @abstractmethod
    def _logits(self, outputs: Tensor) -> Tensor:
        """Whose softmax or sigmoid is the prediction."""

    @abstractmethod
    def _predicted(self, logits: Tensor) -> Tensor:
        """Probabilities, float32."""

    def temperature(self, outputs: Tensor) -> float:
        """See `Divergence`."""
        z = self._logits(outputs.detach()).float()
        for t in TEMPERATURES:
            traces = torch.cat([(p - p.square()).sum(-1).double() for p in (self._predicted(part / t) for part in z.split(64))])
            if traces.sum().square() >= COUNTING * len(traces) * traces.square().sum():
                return t
        return TEMPERATURES[-1]

    def describe(self) -> str:
        """As in "softmax KL of probabilities"."""
        return self.label + " of probabilities" * self.probabilities


@dataclass(frozen=True)
class SoftmaxKL(KLDivergence):
    """KL divergence between the distributions over columns."""

    name = "softmax_kl"
    label = "softmax KL"

    def _logits(self, outputs: Tensor) -> Tensor:
        return outputs.clamp_min(TINY).log() if self.probabilities else outputs

    def _rows(self, outputs: Tensor, reference: Tensor) -> Tensor:
        z, z0 = self._logits(outputs), self._logits(reference)
        log_p = z0.log_softmax(-1)
        change = z - z0  # exact for float32 logits; the difference of two log-softmaxes would lose digits
        change = change - (log_p + change).logsumexp(-1, keepdim=True) + log_p.logsumexp(-1, keepdim=True)
        return _kl_terms(log_p, change).sum(-1)

    def distillation(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """As `Divergence.distillation`."""
        log_q, log_p = (self._logits(y).log_softmax(-1) for y in (outputs, reference))
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def _predicted(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def probe(self, outputs: Tensor, signs: Tensor, temperature: float = 1.0) -> Tensor:
        """The Hessian is diag(p) - p p^T, and B = diag(sqrt p) - p sqrt(p)^T."""
        z = self._logits(outputs)
        weights = torch.empty_like(z, dtype=torch.float32, requires_grad=False)
        for part, of_z, v in zip(*(x.split(chunk_rows(z)) for x in (weights, z.detach(), signs)), strict=True):
            p = self._predicted(of_z.float() / temperature)
            part.copy_((root := p.sqrt() * v) - p * root.sum(-1, keepdim=True))
        return torch.dot(z.flatten(), weights.to(z).flatten())

    def drawn_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """One class is drawn for each row."""
        z = self._logits(outputs)
        drawn = torch.multinomial(z.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(z.device)
        return F.cross_entropy(z, drawn, reduction="sum")

    def task_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy; targets are class numbers, one for each row, or probabilities `[n, columns]`."""
        targets = targets.float() if targets.shape == outputs.shape else targets.long().flatten()
        return F.cross_entropy(self._logits(outputs.float()), targets, reduction="none")

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1 where the largest output is the target's, else 0."""
        return (outputs.argmax(-1) == (targets.argmax(-1) if targets.shape == outputs.shape else targets.flatten())).float()


@dataclass(frozen=True)
class SigmoidKL(KLDivergence):
    """KL divergence between Bernoulli distributions, summed over columns."""

    name = "sigmoid_kl"
    label = "sigmoid KL"

    def _logits(self, outputs: Tensor) -> Tensor:
        # A float32 probability is 1 from 1 - 2^-25 on.
        return outputs.clamp(TINY, 1 - 2**-24).logit() if self.probabilities else outputs

    def _rows(self, outputs: Tensor, reference: Tensor) -> Tensor:
        z, z0 = self._logits(outputs), self._logits(reference)
        one, zero = (_kl_terms(F.logsigmoid(s * z0), F.logsigmoid(s * z) - F.logsigmoid(s * z0)) for s in (1, -1))
        return (one + zero).sum(-1)

    def distillation(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """As `Divergence.distillation`."""
        z, z0 = self._logits(outputs), self._logits(reference)
        one, zero = (F.kl_div(F.logsigmoid(s * z), F.logsigmoid(s * z0), reduction="sum", log_target=True) for s in (1, -1))
        return (one + zero) / len(z)

    def _predicted(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def probe(self, outputs: Tensor, signs: Tensor, temperature: float = 1.0) -> Tensor:
        """The Hessian is diag(p (1 - p))."""
        z = self._logits(outputs)
        p = self._predicted(z.detach().float() / temperature)
        return (z * (p * (1 - p)).sqrt() * signs).sum()

    def drawn_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A coin is drawn for each output."""
        z = self._logits(outputs)
        drawn = torch.bernoulli(z.detach().float().sigmoid().cpu(), generator=generator).to(z)
        return F.binary_cross_entropy_with_logits(z, drawn, reduction="sum")

    def task_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy, summed over columns; targets are 0 or 1 (or probabilities), as many as outputs."""
        z = self._logits(outputs.float())
        return F.binary_cross_entropy_with_logits(z, _like(targets, z), reduction="none").sum(-1)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The share of columns whose probability is on the target's side of one half."""
        positive = outputs > (0.5 if self.probabilities else 0.0)
        return (positive == (_like(targets, outputs) > 0.5)).float().mean(-1)


@dataclass(frozen=True)
class RelativeMSE(Divergence):
    """Squared error, summed over columns, as a share of the float outputs' `variance` (which is summed over columns too).

    The variance is one number for all rows and splits, so that a row whose own output is near 0 does not decide the mean.
    """

    variance: float = 1.0

    name = "relative_mse"
    label = "relative MSE"
    unit = "share of the outputs' variance"

    def _rows(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return (outputs - reference).square().sum(-1) / self.variance

    def distillation(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """As `Divergence.distillation`."""
        return (outputs - reference).square().sum(-1).mean() / self.variance

    def probe(self, outputs: Tensor, signs: Tensor, temperature: float = 1.0) -> Tensor:
        """The Hessian is 2 / variance, times the identity."""
        return (outputs * signs).sum() * (2 / self.variance) ** 0.5

    def drawn_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Targets are drawn from the normal distribution whose log-likelihood this is; its variance is half of `variance`."""
        noise = torch.randn(outputs.shape, generator=generator).to(outputs) * (self.variance / 2) ** 0.5
        return (outputs - outputs.detach() - noise).square().sum() / self.variance

    def task_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared error, the mean over columns; as many targets as outputs."""
        return (outputs.float() - _like(targets, outputs)).square().mean(-1)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """There is none: an `InputError`."""
        raise InputError(
            "There is no accuracy of outputs that are compared by relative MSE. Override the task's quality, and set its "
            "quality_name and quality_kind ('error' where lower is better, 'number' where higher is)."
        )


CHOICES: dict[str, type[Divergence]] = {kind.name: kind for kind in (SoftmaxKL, SigmoidKL, RelativeMSE)}


def choose(wanted: str | Divergence | None, outputs: Iterable[Tensor], targets: Sequence[Tensor]) -> tuple[Divergence, str]:
    """(the divergence, why it is this one) of a task from the float model's `outputs` and the `targets` of some batches.

    `wanted` is a name of `CHOICES`, a divergence, or `None`. The default is softmax KL for integer targets, one for each row, and
    at least two columns, and for targets that are distributions over the columns; sigmoid KL for targets 0 and 1, one for each
    output; relative MSE for all others. Outputs are taken for probabilities where all lie between 0 and 1 (for softmax KL, where
    rows also sum to 1). Batches of `outputs` after the first are only asked for by sigmoid KL and relative MSE.

    Raises `InputError` for another name, and for the softmax of one column.
    """
    if isinstance(wanted, Divergence):
        return wanted, "set by the task"
    outputs = (y.reshape(len(y), -1) for y in outputs)
    first = next(outputs)
    name, why = wanted, "set by the task"
    if name is None:
        name, why = _by_targets(first, targets)
    elif name not in CHOICES:
        raise InputError(f"There is no divergence '{name}'." + did_you_mean(name, CHOICES))
    if name == SoftmaxKL.name:
        if first.shape[1] < 2:
            raise InputError(
                "softmax_kl needs two output columns or more; the model has one, whose softmax is always 1. Set the task's "
                "divergence to sigmoid_kl (a binary output) or relative_mse (a number)."
            )
        sums = first.double().sum(-1)
        return SoftmaxKL(_between_0_and_1(first) and bool(((sums - 1).abs() < SUM_TOLERANCE).all())), why
    if name == SigmoidKL.name:
        return SigmoidKL(_between_0_and_1(first) and all(_between_0_and_1(other) for other in outputs)), why
    return RelativeMSE(_variance([first, *outputs])), why


def _by_targets(outputs: Tensor, targets: Sequence[Tensor]) -> tuple[str, str]:
    """(name, reason), from the outputs `[n, columns]` of the first batch and the targets of all."""
    n_rows, n_columns = outputs.shape
    if n_columns >= 2 and not targets[0].is_floating_point() and targets[0].numel() == n_rows:
        return SoftmaxKL.name, f"integer targets, {n_columns} outputs"
    if targets[0].numel() != outputs.numel():
        return RelativeMSE.name, f"targets {list(targets[0].shape)} for outputs {list(outputs.shape)}"
    values = torch.cat([target.detach().reshape(-1, n_columns).double() for target in targets])
    if n_columns >= 2 and bool((values >= 0).all()) and bool(((values.sum(-1) - 1).abs() < SUM_TOLERANCE).all()):
        return SoftmaxKL.name, f"targets are distributions over {n_columns} outputs"
    if bool(((values == 0) | (values == 1)).all()):
        return SigmoidKL.name, "a binary target" if n_columns == 1 else f"{n_columns} binary targets for each sample"
    return RelativeMSE.name, "regression: targets are numbers"


def _like(targets: Tensor, outputs: Tensor) -> Tensor:
    """The targets as float32 in the outputs' shape."""
    if targets.numel() != outputs.numel():
        raise InputError(
            f"The targets {list(targets.shape)} do not match the outputs {list(outputs.shape)}: binary cross-entropy and squared "
            "error need one target for each output. Override the task's quality and cross_entropy, or set its divergence."
        )
    return targets.float().reshape(outputs.shape)


def _between_0_and_1(outputs: Tensor) -> bool:
    return bool(((outputs >= 0) & (outputs <= 1)).all())


def _variance(outputs: Sequence[Tensor]) -> float:
    """Of all rows, summed over columns; the mean square where all rows are alike, 1 where all are 0."""
    n = sum(map(len, outputs))
    mean = torch.stack([y.double().sum(0) for y in outputs]).sum(0) / n
    variance, power = (sum((y.double() - at).square().sum().item() for y in outputs) / n for at in (mean, torch.zeros_like(mean)))
    return variance if variance > 1e-12 * power else power or 1.0


def _kl_terms(log_p: Tensor, change: Tensor) -> Tensor:
    """p (e^d - 1 - d) for d = `change` = log q - log p: sums to KL(p || q) where p and q do to 1.

    No term is below 0 and none cancels another, so that a KL of 1e-16 is as exact as one of 1. (p d, the textbook's terms, are as
    large as the square root of their sum.)
    """
    p = log_p.exp()
    small = p * (change.expm1() - change)
    large = (log_p + change).exp() - p - torch.where(p > 0, p * change, 0.0)
    return torch.where(change.abs() < 1, small, large)

"""How a task's quality is read: what its samples make of a score, which way is better, and how a number of it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpsearch.errors import InputError, did_you_mean

KINDS = ("share", "number", "error", "perplexity")


@dataclass(frozen=True)
class Quality:
    """A task's measure: its name, and its kind, which says what the task gives for each sample and what a score is.

    kind          a sample                          the score          written
    "share"       from 0 to 1, higher is better     the mean           in percent; differences in points
    "number"      finite, higher is better          the mean           as it is
    "error"       finite, lower is better           the mean           as it is
    "perplexity"  mean nats a token, lower better   exp of the mean    as it is

    Tables and files hold the score as it is (a share from 0 to 1, a perplexity). Raises `InputError` for another kind.
    """

    name: str = "accuracy"
    kind: str = "share"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"There is no kind '{self.kind}' of quality." + did_you_mean(self.kind, KINDS))

    @property
    def sign(self) -> int:
        """1 where higher is better, -1 where lower is."""
        return -1 if self.kind in ("error", "perplexity") else 1

    @property
    def scale(self) -> float:
        """What a score is multiplied by to be written."""
        return 100.0 if self.kind == "share" else 1.0

    def score(self, mean: float) -> float:
        """The score that the samples' mean makes."""
        if self.kind != "perplexity":
            return mean
        return math.exp(mean) if mean < 709 else math.inf  # what a float64 holds

    def drop(self, baseline: float, score: float, low: float, high: float) -> tuple[float, float, float]:
        """(how much worse a score is than the baseline, its low, its high), of a score and its interval."""
        ends = sorted((self.sign * (baseline - low), self.sign * (baseline - high)))
        return self.sign * (baseline - score), ends[0], ends[1]

    def text(self, score: float) -> str:
        """A score as it is written, without a unit."""
        return f"{100 * score:.2f}" if self.kind == "share" else f"{score:.4g}"

    def difference(self, value: float) -> str:
        """A drop as it is written."""
        return f"{100 * value:.2f}" if self.kind == "share" else f"{value:.3g}"

    @property
    def label(self) -> str:
        """The name with its unit."""
        return f"{self.name} %" if self.kind == "share" else self.name

    @property
    def drop_label(self) -> str:
        """What a difference for the worse is called."""
        return {"share": "drop, points", "number": "drop", "error": "rise", "perplexity": "rise"}[self.kind]

    @property
    def drop_word(self) -> str:
        """The first word of it."""
        return self.drop_label.partition(",")[0]

"""The quality measure of a task: how a score is computed from its samples, whether higher is better, and how it is formatted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mpsearch.errors import InputError, did_you_mean
from mpsearch.intervals import paired_interval

KINDS = ("share", "number", "error", "perplexity")


@dataclass(frozen=True)
class Quality:
    """A task's quality measure: its name and its kind, which defines a sample's value and the score.

    kind          a sample                          the score          formatted
    "share"       from 0 to 1, higher is better     the mean           in percent; differences in points
    "number"      finite, higher is better          the mean           as it is
    "error"       finite, lower is better           the mean           as it is
    "perplexity"  mean nats a token, lower better   exp of the mean    as it is

    Tables and files hold the score as it is (a share from 0 to 1, a perplexity). A *drop* is how much worse a score is than a
    baseline, positive for the worse: a difference for "share" and "number", relative to the baseline for all others.
    Raises `InputError` for another kind.
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
        """The factor of a score when it is formatted: 100 for a percentage."""
        return 100.0 if self.kind == "share" else 1.0

    def score(self, mean: float) -> float:
        """The score from the mean of the samples' values."""
        if self.kind != "perplexity":
            return mean
        return math.exp(mean) if mean < 709 else math.inf  # what a float64 holds

    @property
    def relative(self) -> bool:
        """Whether drops are relative to the baseline."""
        return self.kind not in ("share", "number")

    @property
    def max_drop(self) -> float:
        """The largest drop that counts as none, where nothing else is said: 1 % of a perplexity, half a point of accuracy."""
        return 0.01 if self.relative else 0.005

    def drop(self, baseline: float, score: float, low: float, high: float) -> tuple[float, float, float]:
        """(drop of a score from the baseline, its low, its high), of a score and the ends of its interval."""
        unit = self.sign / (abs(baseline) if self.relative and baseline else 1.0)
        drop, *ends = (unit * (baseline - x) for x in (score, low, high))
        return drop, min(ends), max(ends)

    def paired_drop(self, values: ArrayLike, reference: ArrayLike) -> tuple[float, float, float]:
        """(drop, its low, its high) of one model from another, of both models' values of the same samples, `[n]` each."""
        base, mean = (float(np.asarray(x, dtype=np.float64).mean()) for x in (reference, values))
        low, high = paired_interval(values, reference)
        score = self.score(mean)
        return self.drop(self.score(base), score, self.score(base + low), self.score(base + high))

    def text(self, score: float) -> str:
        """A formatted score, without a unit."""
        return f"{100 * score:.2f}" if self.kind == "share" else f"{score:.4g}"

    def range_text(self, low: float, high: float) -> str:
        """The formatted ends of a score's interval, without a unit; a share is from 0 to 1, whatever its drop may be."""
        if self.kind == "share":
            low, high = max(low, 0.0), min(high, 1.0)
        return f"{self.text(low)} to {self.text(high)}"

    def difference(self, value: float) -> str:
        """A formatted drop, without a unit."""
        return f"{value:z.3g}" if self.kind == "number" else f"{100 * value:z.2f}"

    @property
    def label(self) -> str:
        """The name with its unit."""
        return f"{self.name} %" if self.kind == "share" else self.name

    @property
    def drop_label(self) -> str:
        """The name of a drop with its unit."""
        return {"share": "drop, points", "number": "drop"}.get(self.kind, "rise, %")

    @property
    def drop_word(self) -> str:
        """The name of a drop without its unit."""
        return self.drop_label.partition(",")[0]

    def drop_text(self, drop: float) -> str:
        """A formatted drop with its unit, for a sentence."""
        return self.difference(drop) + self.drop_unit

    @property
    def drop_unit(self) -> str:
        """The unit of a drop, for a sentence."""
        return {"share": " points", "number": ""}.get(self.kind, " %")

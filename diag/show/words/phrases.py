"""Numbers, intervals and judgements as parts of sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from diag.results.decimals import fixed
from diag.results.profiles import FEWEST, UNCLEAR


@dataclass(frozen=True)
class Found:
    """A number with its interval, and what else it has: a place in depth, a word. NaN: unknown.

    depth: relative. paired: it is a difference between two lines, whose inputs are all the same.
    """

    value: float
    low: float
    high: float
    n: int
    layer: float = float("nan")
    depth: float = float("nan")
    word: str = ""
    paired: bool = False

    @property
    def known(self) -> bool:
        return not pd.isna(self.value)

    @property
    def above(self) -> bool:
        """Whether it is surely above 0: also with an interval as wide as so few inputs call for."""
        return self.n >= FEWEST and self.value - (self.value - self.low) * widening(self.n) > 0

    @property
    def below(self) -> bool:
        """Whether it is surely below 0."""
        return self.n >= FEWEST and self.value + (self.high - self.value) * widening(self.n) < 0

    @property
    def close(self) -> bool:
        """Whether its interval leaves out 0 only because it is too narrow for so few inputs."""
        outside = self.low > 0 or self.high < 0
        return self.n >= FEWEST and outside and not self.above and not self.below

    def judged(self, yes: str = "", no: str = "not distinguishable from 0") -> str:
        """`above 0`, `below 0` (or `yes`), or what else can be said."""
        if self.n < FEWEST:
            return f"not judged: {self.n} inputs are too few"
        if self.above or self.below:
            return yes or ("above 0" if self.above else "below 0")
        return f"too close to 0 to call with n = {self.n}" if self.close else no

    def interval(self, *, n: bool = False, percent: bool = False, sign: bool = False) -> str:
        """`(0.403 to 0.613)`, or with the number of inputs; says so where there is none."""
        if pd.isna(self.low):
            return "(one input, no interval)" if self.n == 1 else "(no interval)"
        low, high = (share(x) if percent else fixed(x, sign=sign) for x in (self.low, self.high))
        return f"(95 % interval {low} to {high}, n = {self.n})" if n else f"({low} to {high})"


Profile = dict[tuple[str, str], Found]
"""(metric, quantity) -> number, of one line."""


def profile_of(profiles: pd.DataFrame, label: str) -> Profile:
    """The profile of one line; quantities without a value stay, with NaN."""
    rows = profiles[profiles["label"] == label]
    columns = ["metric", "quantity", "value", "ci_low", "ci_high", "n", "layer", "relative_depth", "word"]
    return {
        (metric, quantity): Found(value, low, high, int(n), layer, depth, "" if pd.isna(word) else str(word))
        for metric, quantity, value, low, high, n, layer, depth, word in rows[columns].itertuples(index=False)
    }


def doubt_of(found: Profile, metric: str) -> str:
    """Why the shape of a curve is unclear; `""` where it is not, or was not looked for."""
    word = found[metric, "shape"].word if (metric, "shape") in found else ""
    return word.removeprefix(f"{UNCLEAR}: ") if word.startswith(UNCLEAR) else ""


def layer_of(layers: pd.DataFrame, layer: int) -> dict[str, Found]:
    """The metrics of one layer of a run's table that have a value."""
    rows = layers[(layers["layer"] == layer) & layers["mean"].notna()]
    columns = rows[["metric", "mean", "ci_low", "ci_high", "n"]]
    return {
        metric: Found(value, low, high, int(n))
        for metric, value, low, high, n in columns.itertuples(index=False)
    }


def widening(n: int) -> float:
    """How much wider than a percentile bootstrap interval one of n inputs should be.

    The bootstrap's variance is (n - 1)/n of the unbiased one, and its quantiles are a normal's, not a t
    distribution's (first term of the Cornish-Fisher expansion, within 1 % from n = 10 on).
    """
    return (n / (n - 1)) ** 0.5 * (1 + (1.96**2 + 1) / (4 * (n - 1)))


def decimal(value: float, *, digits: int = 3, sign: bool = False) -> str:
    """`0.511`, `−0.004`, as people read it: with a real minus, and a dash where there is no number."""
    if pd.isna(value):
        return "–"
    return fixed(value, digits, sign=sign).replace("-", "−")


def interval(low: float, high: float, *, digits: int = 3, sign: bool = False) -> str:
    """`0.101 to 0.134`: a dash between numbers would read as a minus."""
    if pd.isna(low) or pd.isna(high):
        return "–"
    return " to ".join(decimal(end, digits=digits, sign=sign) for end in (low, high))


def percent(value: float) -> str:
    """`18%`; what is not all or nothing is not said to be."""
    if 0.995 <= value < 1:
        return ">99%"
    return "<1%" if 0 < value < 0.005 else f"{fixed(100 * value, 0)}%"


def share(value: float) -> str:
    """`18 %`, in sentences."""
    return percent(value).replace("%", " %")


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else list(words))

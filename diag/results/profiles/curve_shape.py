"""What a curve over depth is called: its shape, and the layer after which it grows.

Both look at the curve before they choose the layers to compare. So differences between layers are judged by
simultaneous intervals over all pairs of layers: in a curve that is flat but for noise, at most one in
twenty times is any pair called different, whichever pair that is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FEWEST = 5
"""Inputs below which nothing is decided: a bootstrap of fewer knows too little of the spread."""

SHAPES = ("falling", "rising", "U", "inverted U", "mixed", "flat")
UNCLEAR = "unclear"

DOUBTS = {
    "falling": "the ends may differ by noise",
    "rising": "the ends may differ by noise",
    "U": "the dip may be noise",
    "inverted U": "the bump may be noise",
    "mixed": "the dip or the bump may be noise",
    "flat": "some layer may be off the mean",
}
"""Why a shape that most resamples have is not given all the same: what makes it is not shown."""


@dataclass(frozen=True)
class Shape:
    """What a curve is called, and how sure that is.

    word: one of `SHAPES`, or unclear. share: of the resamples whose own curve has that shape (NaN: unclear).
    likeliest, likeliest_share: the shape that most resamples have, decided or not. doubt: why it is unclear.
    """

    word: str
    share: float
    likeliest: str
    likeliest_share: float
    doubt: str = ""


def shape_of(mean: np.ndarray, draws: np.ndarray, *, smallest: float, n: int) -> Shape:
    """The shape of a curve over depth.

    mean: [layer]. draws: [resample, layer]. smallest: size below which a change is none. n: inputs.

    A *dip* is an inner layer below both ends, a *bump* one above both, by at least `smallest`. Dip: U;
    bump: inverted U; both: mixed; neither: falling or rising if the ends differ by `smallest`, else flat.
    That is what the curve looks like; it is unclear unless

    - the simultaneous 95 % intervals of the differences that make the shape exclude 0; for flat instead
      the 95 % interval of every layer's distance from the mean over layers lies within `smallest` (each
      alone may be at 95 %, because all must be within);
    - and most resamples, looked at in the same way, have that shape;
    - and there are two layers and `FEWEST` inputs.
    """
    if len(mean) < 2 or n < FEWEST:
        doubt = "one layer has none" if len(mean) < 2 else f"n = {n} is too few"
        return Shape(UNCLEAR, np.nan, UNCLEAR, np.nan, doubt)
    surely = mean - mean[:, None] > _margins(mean, draws, n)  # [i, j]: layer j above layer i
    inner = slice(1, len(mean) - 1)
    dip = bool((surely[inner, 0] & surely[inner, -1]).any())
    bump = bool((surely[0, inner] & surely[-1, inner]).any())
    low, high = np.percentile(draws - draws.mean(1, keepdims=True), [2.5, 97.5], axis=0)
    shown = {
        "falling": surely[-1, 0],
        "rising": surely[0, -1],
        "U": dip,
        "inverted U": bump,
        "mixed": dip and bump,
        "flat": (low >= -smallest).all() and (high <= smallest).all(),
    }
    drawn = _plain_shapes(draws, smallest)
    shares = [float((drawn == place).mean()) for place in range(len(SHAPES))]
    likeliest = int(np.argmax(shares))
    seen = int(_plain_shapes(mean[None], smallest)[0])
    told = SHAPES[likeliest], shares[likeliest]
    if shares[likeliest] <= 0.5:
        return Shape(UNCLEAR, np.nan, *told, "no shape has most resamples")
    if seen != likeliest:
        return Shape(UNCLEAR, np.nan, *told, f"the curve itself counts as {SHAPES[seen]}")
    if not shown[SHAPES[seen]]:
        return Shape(UNCLEAR, np.nan, *told, DOUBTS[SHAPES[seen]])
    return Shape(*told, *told)


def onset_of(mean: np.ndarray, draws: np.ndarray, *, smallest: float, n: int) -> tuple[float, np.ndarray]:
    """Place of the last layer that is still at the level of the curve's minimum, and in every resample.

    From the next layer to the last, all lie above the minimum, by `smallest` and by the simultaneous 95 %
    intervals. NaN where the last layer is not above it, with one layer or fewer than `FEWEST` inputs.
    """
    if len(mean) < 2 or n < FEWEST:
        return np.nan, np.full(len(draws), np.nan)
    margin = np.maximum(_margins(mean, draws, n), smallest)
    curves = np.vstack([mean, draws])
    rise = curves - curves.min(1, keepdims=True)
    level = rise < margin[curves.argmin(1)]  # [curve, layer], true at the minimum itself
    last = len(mean) - 1
    place = last - level[:, ::-1].argmax(1)
    found = np.where(place == last, np.nan, place.astype(float))
    return float(found[0]), found[1:]


def _margins(mean: np.ndarray, draws: np.ndarray, n: int) -> np.ndarray:
    """Half widths of the simultaneous 95 % intervals of all differences between layers, [layer, layer].

    The standard error of each difference times the 95 % quantile, over resamples, of the largest
    studentised deviation (max-t bootstrap). Both are made wider for few inputs: the bootstrap's variance is
    (n - 1)/n of the unbiased one, and its quantile q that of a normal, not of a t distribution, for which
    q + (q³ + q)/4(n - 1) is the first term of the Cornish-Fisher expansion.
    """
    error = np.zeros((len(mean), len(mean)))
    largest = np.zeros(len(draws))
    for layer in range(len(mean)):
        apart = draws - draws[:, [layer]] - (mean - mean[layer])
        error[layer] = apart.std(0)
        real = error[layer] > 1e-9  # curves that move together have no error to speak of
        if real.any():
            largest = np.maximum(largest, np.abs(apart[:, real] / error[layer, real]).max(1))
    quantile = float(np.percentile(largest, 95))
    quantile += (quantile**3 + quantile) / (4 * (n - 1))
    return error * quantile * np.sqrt(n / (n - 1))


def _plain_shapes(curves: np.ndarray, smallest: float) -> np.ndarray:
    """Places in `SHAPES` of curves [curve, layer], by sizes alone."""
    first, last, inner = curves[:, 0], curves[:, -1], curves[:, 1:-1]
    none = np.zeros(len(curves), bool)
    dip = np.minimum(first, last) - inner.min(1) >= smallest if inner.shape[1] else none
    bump = inner.max(1) - np.maximum(first, last) >= smallest if inner.shape[1] else none
    cases = [dip & bump, dip, bump, first - last >= smallest, last - first >= smallest]
    words = ("mixed", "U", "inverted U", "falling", "rising")
    return np.select(cases, [SHAPES.index(word) for word in words], SHAPES.index("flat"))

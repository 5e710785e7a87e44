"""Numbers with weights, how they become one number per input and head, and the error of sampled rows.

A mean over sampled rows is a regression estimate (Cochran 1977, chapter 7; Särndal, Swensson and
Wretman 1992, chapter 6): quantities that go with the one that is measured and are known of all rows, the
controls, tell how the drawn rows differ from the others. Whatever the controls are, the estimate has no
bias beyond that of a fitted slope, which is small against its standard error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch.nn.functional import avg_pool1d

from diag.attention.sampling import RowSample

PERCENTILE = 0.15
"""The lower percentile of the entropy that Context Broadcasting reports (2210.08457, Fig. 4)."""

PAIRS_PER_CONTROL = 8
"""Fewer drawn strata than this for each control leave them unused."""

NEIGHBOURS = 33
"""Over how many drawn rows what the controls leave is averaged, to predict the rows between them."""

SMOOTHING = 0.1
"""Width of the ramps that stand for steps in an estimated percentile, in standard deviations."""

BISECTIONS = 24


class Controls:
    """What is known of all rows of a sampled call, and what it tells of a number known of the drawn ones.

    Slopes are those that leave least variance between the two rows of each stratum. Everything is
    relative to the mean over all rows that count. Several numbers can share one object.

    known: the quantities. counts: the rows that count.
    """

    def __init__(
        self,
        known: Float[Tensor, "control batch head token"],
        counts: Bool[Tensor, "#batch #head token"],
        sample: RowSample,
    ) -> None:
        self.counts = counts.expand(known.shape[1:])
        self.known = torch.where(self.counts & known.isfinite(), known, 0.0)
        self.means = self.known.sum(-1, dtype=torch.float64) / self.counts.sum(-1).clamp(min=1)
        self.pairs = _pairs(sample)
        self.sample = sample
        inside = sample.at(counts) & (sample.weight > 0)[:, None]
        drawn = [
            torch.where(inside, sample.at(x).double() - mean[..., None], 0.0)
            for x, mean in zip(self.known, self.means, strict=True)
        ]
        self.drawn = torch.stack(drawn, 2)  # [batch, head, control, row]
        apart = torch.stack([_apart(x, sample) for x in drawn], 2)
        gram = (apart * self.pairs[:, :, None]) @ apart.transpose(-1, -2)
        scale = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)[..., None]
        # controls go together: a little ridge keeps the slopes of what they share finite
        ridge = 1e-6 * torch.eye(len(known), device=gram.device, dtype=gram.dtype)
        solved = torch.linalg.solve(gram / scale / scale.transpose(-1, -2) + ridge, apart / scale) / scale
        used = ((self.pairs > 0) & inside).sum(-1) / 2 >= PAIRS_PER_CONTROL * len(known)
        self.solved = torch.where(used[..., None, None], solved, 0.0)  # [batch, head, control, row]
        # of each difference, what the slopes take for themselves; both rows of a stratum are one difference
        self.lever = (2 * self.pairs * (self.solved * apart).sum(2)).clamp(max=0.9)

    def slopes(self, values: Float64[Tensor, "batch head row"]) -> Float64[Tensor, "batch head control"]:
        """How much of each quantity goes with the values of the drawn rows."""
        return (self.solved @ (self.pairs * _apart(values, self.sample))[..., None])[..., 0]

    def of_drawn(self, slopes: Float64[Tensor, "batch head control"]) -> Float64[Tensor, "batch head row"]:
        """What the quantities say of the drawn rows."""
        return (slopes[..., None, :] @ self.drawn)[..., 0, :]

    def of_all(self, slopes: Float64[Tensor, "batch head control"]) -> Float[Tensor, "batch head token"]:
        """What the quantities say of all rows."""
        everywhere = torch.zeros_like(self.known[0])
        for slope, x, mean in zip(slopes.unbind(-1), self.known, self.means, strict=True):
            everywhere += (slope[..., None] * (x - mean[..., None])).float()
        return everywhere


class Reading(NamedTuple):
    """Numbers and how much each counts: 0 for not at all.

    Both broadcast to `[batch, head, token]`; the token axis is 1 for numbers of a whole row of the
    batch, whose weight is then the number of tokens behind them. With a `sample` the token axis holds the
    drawn rows, and the weights say how many tokens each stands for. `variance`: of numbers that were
    estimated.
    """

    values: Tensor
    weights: Tensor
    sample: RowSample | None = None
    controls: Controls | None = None
    variance: Tensor | None = None


def reduce(parts: Sequence[Reading], inputs: int, how: str) -> Float64[Tensor, "input head"]:
    """One number per input and head from all readings of a layer in one forward pass.

    A call may hold several rows per input (windows in the batch, input by input) and a layer may be
    called several times (one window after the other): all their tokens are pooled, so that each
    counts once. NaN where nothing counts; infinite where something that counts is not finite.

    how: "mean" or "percentile". The percentile of several windows whose rows are sampled is the mean of
    their percentiles.
    """
    sampled = any(part.sample is not None or part.variance is not None for part in parts)
    parts = [condensed(part, inputs, how) for part in parts] if sampled else parts
    if how == "percentile" and not sampled:
        value, weight = _pooled([(part.values, part.weights) for part in parts], inputs)
        total = weight.sum(-1)
        finite = torch.where(weight > 0, value, 0.0).isfinite().all(-1)
        result = _percentile(value, weight, torch.full_like(total, PERCENTILE))
    else:
        sums = [_sums(part.values, part.weights, inputs) for part in parts]
        if len(sums) == 1:
            return _mean(*sums[0])
        return _mean(*(torch.stack(each).sum(0) for each in zip(*sums, strict=True)))
    return torch.where(total > 0, torch.where(finite, result, torch.inf), torch.nan)


def sampling_error(parts: Sequence[Reading], inputs: int, how: str) -> Float64[Tensor, "input head"]:
    """Standard error of `reduce` that comes from sampling rows; 0 where all rows are there."""
    parts = [condensed(part, inputs, how) for part in parts]
    weights = [_pooled([(part.values, part.weights)], inputs)[1] for part in parts]
    total = torch.stack([weight.sum(-1) for weight in weights]).sum(0)
    variance = torch.zeros_like(total)
    for part, weight in zip(parts, weights, strict=True):
        if part.variance is not None:
            variance += (weight.square() * part.variance).sum(-1)
    return torch.where(total > 0, variance.sqrt() / total, torch.nan)


def condensed(part: Reading, inputs: int, how: str) -> Reading:
    """A reading that says the same in less memory, where its tokens are no longer needed one by one.

    A layer's readings wait until the forward pass has ended: whole, they would grow with depth × tokens.
    """
    if part.sample is not None:
        value, weight, variance = _estimated(part, how)
        pooled = _pooled([(value[..., None], weight[..., None])], inputs)
        spread, _ = _pooled([(variance[..., None], weight[..., None])], inputs)
        total = pooled[1].sum(-1, keepdim=True)
        share = torch.where(total > 0, pooled[1] / total, 0.0)
        values = reduce([Reading(value[..., None], weight[..., None])], inputs, "mean")[..., None]
        return Reading(values, total, variance=(share.square() * spread).sum(-1, keepdim=True))
    if part.variance is not None or how != "mean":
        return part
    summed, total = _sums(part.values, part.weights, inputs)
    return Reading(_mean(summed, total)[..., None], total[..., None])


def _estimated(part: Reading, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate, number of rows behind it and variance of each row of the batch, `[batch, head]`, float64.

    With two rows a, b in each stratum of N, the estimated variance of a sum is Σ N(N-2)(e_a - e_b)²/4
    (Cochran 1977, section 5.4), e what the controls leave of the values.
    """
    sample = part.sample
    assert sample is not None
    values = part.values.double()
    weights = part.weights.double().expand(values.shape)
    inside, total = weights > 0, weights.sum(-1)
    some = total.clamp(min=1)
    wild = (inside & ~values.isfinite()).any(-1)
    values = torch.where(inside & values.isfinite(), values, 0.0)
    centred = torch.where(inside, values - ((weights * values).sum(-1) / some)[..., None], 0.0)
    left, lever, slopes = centred, torch.zeros_like(centred), None
    if part.controls is not None:
        slopes, lever = part.controls.slopes(centred), part.controls.lever
        left = torch.where(inside, centred - part.controls.of_drawn(slopes), 0.0)
    mean = (weights * (values - centred + left)).sum(-1) / some
    if how == "mean":
        variance = _variance(left, sample, some, lever)
    else:
        mean, variance = _estimated_percentile(part, values, weights, mean, left, slopes)
    return torch.where(wild, torch.inf, mean), total, variance


def _variance(left: Tensor, sample: RowSample, total: Tensor, lever: Tensor | float = 0.0) -> Tensor:
    """lever: how much of each difference the slopes took for themselves (MacKinnon and White 1985, HC3)."""
    return (_pairs(sample) * (_apart(left, sample) / (1 - lever)).square()).sum(-1) / total.square()


def _pairs(sample: RowSample) -> Float64[Tensor, "batch 1 row"]:
    """N (N - 2) / 8 of each drawn row: both rows of a stratum of N have weight N / 2."""
    weight = sample.weight.double()
    return (weight * (weight - 1) / 2).clamp(min=0)[:, None]


def _apart(x: Tensor, sample: RowSample) -> Tensor:
    """Of each drawn row its number minus that of the other row of its stratum, over the last axis."""
    return x - x.gather(-1, sample.partner[:, None].expand(x.shape))


def _estimated_percentile(
    part: Reading, values: Tensor, weights: Tensor, mean: Tensor, left: Tensor, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The percentile and its variance.

    The share of rows below the percentile of what is predicted of all rows is corrected by the drawn rows
    (the difference estimator of Rao, Kovar and Mantel 1990); its error is that of the corrected share over
    the density of the rows there.
    """
    sample = part.sample
    assert sample is not None
    total = weights.sum(-1).clamp(min=1)
    at = torch.full_like(total, PERCENTILE)
    index = sample.index[:, None].expand(values.shape)
    if slopes is None or part.controls is None:
        points, masses, of_drawn = values, weights, torch.full_like(values, 1e30)
    else:
        predicted, counts = part.controls.of_all(slopes), part.controls.counts
        tokens = torch.arange(predicted.shape[-1], device=predicted.device)
        nearest = torch.searchsorted(sample.index, tokens.expand(len(sample.index), -1).contiguous())
        nearest = nearest.clamp(max=sample.rows - 1)[:, None].expand(predicted.shape)
        around = (avg_pool1d(x, NEIGHBOURS, 1, NEIGHBOURS // 2) for x in (left, (weights > 0).double()))
        smooth = torch.nan_to_num(torch.div(*around))
        every = predicted + mean[..., None] + smooth.gather(-1, nearest)
        of_drawn = every.gather(-1, index)
        points = torch.cat([every, values, of_drawn], -1)
        masses = torch.cat([counts.double(), weights, -weights], -1)
    width = SMOOTHING * ((weights * (values - mean[..., None]).square()).sum(-1) / total).sqrt()
    middle = _quantile(points, masses, at * total, width)
    share = _share_below(values, middle, width) - _share_below(of_drawn, middle, width)
    share = share - (weights * share).sum(-1, keepdim=True) / total[..., None]
    error = _variance(torch.where(weights > 0, share, 0.0), sample, total).sqrt()
    near = (1.5 * width).clamp(min=torch.finfo(width.dtype).tiny)
    below, above = (
        (masses * _share_below(points, middle + sign * near, width)).sum(-1) / total for sign in (-1, 1)
    )
    # where hardly any row lies, a tenth of what an even spread over ten deviations would have
    density = torch.maximum((above - below) / (2 * near), 0.015 * SMOOTHING / near)
    # where every row was drawn nothing is estimated
    whole = ((weights > 0).sum(-1) >= weights.sum(-1)) & (weights <= 1).all(-1)
    middle = torch.where(whole, _percentile(values, weights, at), middle)
    return middle, torch.where(whole, 0.0, (error / density).square())


def _share_below(points: Tensor, bound: Tensor, width: Tensor) -> Tensor:
    """Whether each point is below the bound, as a ramp of some width: 0, 1 or between."""
    tiny = torch.finfo(points.dtype).tiny
    return ((bound[..., None] - points) / width[..., None].clamp(min=tiny) + 0.5).clamp(0, 1)


def _quantile(points: Tensor, masses: Tensor, reached: Tensor, width: Tensor) -> Tensor:
    """Up to where the masses, some of which are negative, sum up to `reached`; by bisection.

    Points count as ramps: steps that lie close together would change places with the last digit.
    """
    there = masses != 0
    low = torch.where(there, points, torch.inf).amin(-1) - width
    high = torch.where(there, points, -torch.inf).amax(-1) + width
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        less = (masses * _share_below(points, middle, width)).sum(-1) < reached
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return (low + high) / 2


def _percentile(values: Tensor, weights: Tensor, at: Tensor) -> Tensor:
    """The percentile `at` `[input, head]` of the values of positive weight, over the last axis.

    A value of weight w stands for w order statistics, and lies in the middle of them; between such
    places it is linear. With weights of 1 this is linear interpolation between order statistics.
    """
    ordered, order = torch.where(weights > 0, values, torch.inf).sort(-1)
    weights = weights.gather(-1, order)
    summed = weights.cumsum(-1)
    centre = summed - (weights + 1) / 2
    place = ((summed[..., -1:] - 1) * at[..., None]).clamp(min=0)
    last = ((weights > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    below = (torch.searchsorted(centre, place, right=True) - 1).clamp(min=0).minimum(last)
    above = (below + 1).minimum(last)
    low, high = ordered.gather(-1, below), ordered.gather(-1, above)
    start, end = centre.gather(-1, below), centre.gather(-1, above)
    share = torch.where(end > start, (place - start) / (end - start), 0.0).clamp(0, 1)
    return (low + (high - low) * share)[..., 0]


def _mean(summed: Tensor, total: Tensor) -> Tensor:
    """The mean of what sums to `summed`: NaN where nothing counts, infinite where the sum is not finite."""
    return torch.where(total > 0, torch.where(summed.isfinite(), summed / total, torch.inf), torch.nan)


def _sums(values: Tensor, weights: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """The weighted sum over all tokens of an input, and that of its weights, `[input, head]`, float64.

    What counts and is not finite makes the sum not finite. Nothing of the size of the values is copied
    in float64 unless their weights differ.
    """
    counts = weights if weights.dtype == torch.bool else weights > 0
    counted = torch.where(counts, values, 0.0)
    if weights.dtype != torch.bool:
        counted = counted.double() * weights
    batch, heads, tokens = counted.shape
    total = weights.sum(-1, dtype=torch.float64) * (tokens // weights.shape[-1])
    each = (counted.sum(-1, dtype=torch.float64), total.expand(batch, heads))
    return each[0].unflatten(0, (inputs, -1)).sum(1), each[1].unflatten(0, (inputs, -1)).sum(1)


def _pooled(parts: Sequence[tuple[Tensor, Tensor]], inputs: int) -> tuple[Tensor, Tensor]:
    """Values and weights of all parts, `[input, head, rows · token]`, float64."""
    pooled: tuple[list[Tensor], list[Tensor]] = ([], [])
    for part in parts:
        shape = torch.broadcast_shapes(*(x.shape for x in part))
        for x, into in zip(part, pooled, strict=True):
            into.append(x.expand(shape).unflatten(0, (inputs, -1)).movedim(1, 2).flatten(2).double())
    return torch.cat(pooled[0], -1), torch.cat(pooled[1], -1)

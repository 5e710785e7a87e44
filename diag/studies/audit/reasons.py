"""Why what a hook shows is not what attention used: told by tests on the numbers, never by names.

Each test proposes what was done to the tensor of the hook, does it, and looks at what is left: a reason holds
where the remaining relative error is a rounding error. `shown` is what a hook gave, `used` what the attention
call had; rows are tokens of all inputs, in the order of the call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diag.attention.call import repeats
from diag.studies.audit.words import (
    CONSTANT,
    ELSEWHERE,
    GATE,
    INTERLEAVED,
    LATENT,
    NORM,
    OTHER_ORDER,
    OTHER_TOKENS,
    REPEATED,
    SAME,
    SCALED,
    SHARED,
    SUM,
    UNEXPLAINED,
)

EPSILONS = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3)
"""What norms add to a mean of squares; the one that fits best is taken."""
LEAST_ROWS = 12
"""A weight and a bias per channel are fitted to so many rows, or nothing is."""


@dataclass(frozen=True)
class Finding:
    """What was found of one hook in one layer.

    relative_error: ‖a − b‖/‖b‖ after the obvious reshape; NaN where the shapes do not allow one.
    remaining_error: the same once the reason is undone; NaN where nothing could be.
    reason: one of those in `diag.studies.audit.words`. detail: its particulars, in words.
    """

    relative_error: float
    remaining_error: float
    reason: str
    detail: str = ""


def error_of(shown: Tensor, used: Tensor) -> float:
    """‖shown − used‖/‖used‖ in float64."""
    shown, used = shown.double(), used.double()
    size = used.norm().item()
    apart = (shown - used).norm().item()
    return apart / size if size else math.inf if apart else 0.0


def distinct_heads(used: Float[Tensor, "row head dim"]) -> Float[Tensor, "row kv_head dim"]:
    """The heads without repetitions, of values that were repeated for the query heads that share them."""
    return used[:, :: repeats(used.transpose(0, 1))]


def why_values_differ(
    shown: Float[Tensor, "row channel"],
    used: Float[Tensor, "row head dim"],
    *,
    heads: int,
    tolerance: float,
    latent: int = 0,
    earlier: Mapping[int, Tensor] | None = None,
    constants: Mapping[str, Float[Tensor, " channel"]] | None = None,
) -> Finding:
    """Why the output of a value projection is not V.

    heads: query heads. latent: how many numbers the projection reads, where that is a compressed state; 0 of
    others. earlier: V of earlier layers, by number. constants: what may have been folded away, by its name.
    The obvious reading takes the last channels: all of them, or the last part of a fused projection.
    """
    used = distinct_heads(used)
    kv_heads, dim = used.shape[1:]
    flat = used.flatten(1)
    if len(shown) != len(flat):
        why = f"{len(shown)} tokens of the projection, {len(flat)} values"
        return Finding(math.nan, math.nan, OTHER_TOKENS, why)
    wide = shown.shape[1] >= flat.shape[1]
    last = shown[:, -flat.shape[1] :] if wide else None
    first_error = math.nan if last is None else error_of(last, flat)
    if first_error < tolerance:
        if kv_heads < heads:
            shared = f"{kv_heads} value heads for {heads} query heads"
            return Finding(first_error, first_error, REPEATED, shared)
        return Finding(first_error, first_error, SAME)
    for layer, values in (earlier or {}).items():
        other = distinct_heads(values)
        if other.shape == used.shape and (left := error_of(other, used)) < tolerance:
            return Finding(first_error, left, SHARED, f"of layer {layer}")
    places = channels_of(shown, flat, tolerance)
    if places is not None:
        left = error_of(shown[:, places], flat)
        reason, detail = _arranged(places.unflatten(0, (kv_heads, dim)), shown.shape[1], latent)
        return Finding(first_error, left, reason, detail)
    if last is not None:
        for found in _undone(last.unflatten(1, (kv_heads, dim)), used, tolerance, constants or {}):
            if found.remaining_error < tolerance:
                return replace(found, relative_error=first_error)
    return Finding(first_error, math.nan, UNEXPLAINED)


def channels_of(shown: Tensor, used: Tensor, tolerance: float) -> Int[Tensor, " channel"] | None:
    """Which channel of `shown` each of `used` is, all of them to the tolerance; None where one is none.

    shown: `[row, channel]`. A channel is known by its product with random numbers.
    """
    one, other = shown.double(), used.double()
    draw = torch.randn(len(one), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prints, wanted = draw.to(one.device) @ one, draw.to(one.device) @ other
    ordered, order = prints.sort()
    after = torch.searchsorted(ordered, wanted).clamp(max=len(ordered) - 1)
    before = (after - 1).clamp(min=0)
    nearer = (ordered[before] - wanted).abs() < (ordered[after] - wanted).abs()
    places = order[torch.where(nearer, before, after)]
    return places if error_of(one[:, places], other) < tolerance else None


def _arranged(places: Int[Tensor, "head dim"], width: int, latent: int) -> tuple[str, str]:
    """The reason and its words for values that are other channels than the last ones."""
    heads, dim = places.shape
    starts = places[:, 0]
    whole = bool((places == starts[:, None] + torch.arange(dim, device=places.device)).all())
    steps = starts.diff().unique().tolist()
    if not whole or len(steps) > 1:
        return ELSEWHERE, f"{heads} × {dim} of {width} channels, in another order"
    first, step = int(starts[0]), int(steps[0]) if steps else width
    part = f"channels {first % step} to {first % step + dim - 1} of each {step}"
    if step == dim:
        return ELSEWHERE, f"channels {first} to {first + heads * dim - 1} of {width}"
    if latent:
        return LATENT, f"{part}, made of {latent} numbers"
    return INTERLEAVED, f"{part}: a head's values stand beside its queries and keys"


def _undone(
    shown: Float[Tensor, "row head dim"],
    used: Float[Tensor, "row head dim"],
    tolerance: float,
    constants: Mapping[str, Tensor],
) -> Iterator[Finding]:
    """What may have been done to the right channels, and what is left of each."""
    a, b = shown.double(), used.double()
    factor = float((a * b).sum() / (a * a).sum().clamp(min=1e-300))
    yield Finding(math.nan, error_of(factor * a, b), SCALED, f"by {factor:.4g}")
    constant = (b - a).mean(0)
    why = "a constant is missing from every value"
    for name, known in constants.items():
        if known.numel() == constant.numel() and error_of(constant.flatten(), known) < 100 * tolerance:
            why = f"{name} is missing from every value"
            break
    yield Finding(math.nan, error_of(a + constant, b), CONSTANT, why)
    yield from norms(a, b)
    rows = channels_of(shown.flatten(1).T, used.flatten(1).T, tolerance)
    left = math.nan if rows is None else error_of(shown[rows], used)
    yield Finding(math.nan, left, OTHER_ORDER, "as where windows are cut behind the projection")


def norms(a: Float[Tensor, "row head dim"], b: Float[Tensor, "row head dim"]) -> Iterator[Finding]:
    """b as a norm of a, over the dims of each head or over all, with a weight and bias per channel."""
    if len(a) < LEAST_ROWS:
        return
    a, b = a.double(), b.double()
    for over, axes in (("each head", (-1,)), ("all heads together", (-2, -1))):
        centred = a - a.mean(axes, keepdim=True)
        for kind, x, shifted in (("RMS", a, False), ("layer", centred, True)):
            square = x.pow(2).mean(axes, keepdim=True)
            fits = (error_of(_fitted(x * (square + epsilon).rsqrt(), b, shifted), b) for epsilon in EPSILONS)
            yield Finding(math.nan, min(fits), NORM, f"{kind} norm over {over}")


def _fitted(x: Tensor, y: Tensor, shifted: bool) -> Tensor:
    """y as w x, or w x + β, with w and β per channel, by least squares over rows."""
    mean_x, mean_y = (x.mean(0), y.mean(0)) if shifted else (torch.zeros_like(x[0]), torch.zeros_like(y[0]))
    u, v = x - mean_x, y - mean_y
    weight = (u * v).sum(0) / (u * u).sum(0).clamp(min=1e-300)
    return weight * u + mean_y


def why_outputs_differ(
    read: Float[Tensor, "row channel"],
    output: Float[Tensor, "row head dim"],
    again: tuple[Tensor, Tensor] | None,
    *,
    tolerance: float,
) -> Finding:
    """Why what the output projection reads is not Y.

    again: the same two from a run in which every number of Y was multiplied with another one of its own: a
    factor that does not follow Y is a gate; what comes on top of Y and does not follow it is a sum.
    """
    flat = output.flatten(1)
    if read.shape != flat.shape:
        why = f"{list(read.shape)} is read of {list(flat.shape)}"
        return Finding(math.nan, math.nan, OTHER_TOKENS, why)
    first_error = error_of(read, flat)
    if first_error < tolerance:
        return Finding(first_error, first_error, SAME)
    found = UNEXPLAINED, math.nan, ""
    if again is not None:
        read_again, changed = again[0].double(), again[1].flatten(1).double()
        ratio = torch.where(flat == 0, 0.0, changed / flat.double())
        left = error_of(ratio * read.double(), read_again)
        more = error_of(read.double() + changed - flat.double(), read_again)
        if left < tolerance:
            constant, detail = _factor(read, output)
            found = SCALED if constant else GATE, left, detail
        elif more < tolerance:
            found = SUM, more, "to Y, and does not follow it"
    places = channels_of(read, flat, tolerance)
    if places is not None:
        found = ELSEWHERE, error_of(read[:, places], flat), "the same, with channels in another order"
    elif found[0] == UNEXPLAINED:
        for one in norms(output, read.unflatten(1, output.shape[1:])):
            if one.remaining_error < tolerance:
                found = NORM, one.remaining_error, one.detail
                break
    reason, left, detail = found
    return Finding(first_error, left, reason, detail)


def _factor(read: Tensor, output: Tensor) -> tuple[bool, str]:
    """Whether what Y is multiplied with is the same for all tokens of a head, and what it is in words."""
    of = read.unflatten(1, output.shape[1:]).double() / output.double()
    of = torch.where(of.isfinite(), of, of[of.isfinite()].mean())
    spread = of.amax((0, 2)) - of.amin((0, 2))
    close = 1e-3 * of.abs().mean()
    if bool((spread < close).all()):
        return True, f"by {of.mean():.3g}"
    one_per_head = bool((of.amax(2) - of.amin(2) < close).all())
    per = "token and head" if one_per_head else "token and channel"
    return (
        False,
        f"a factor for each {per}, from {of.min():.3g} to {of.max():.3g}, {of.mean():.3g} on average",
    )

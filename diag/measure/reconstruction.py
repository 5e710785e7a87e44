"""The reconstruction gate: A V rebuilt from a call must be what the model used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.pattern import pattern_rows, weighted_values
from diag.errors import MeasurementError, NotFinite
from diag.models.base import Batch
from diag.models.hooks.residual import relative_error, tolerance
from diag.results.layer_values import LayerFacts

GATE_ROWS = 32
"""Query rows of each call that are rebuilt, spread evenly over its tokens."""
SUM_DIGITS = 3
"""To so many digits the sum of a row is told: weights in bfloat16 sum to 1 within less."""

NOT_FINITE = "gives values that are not finite"


class ReconstructionCheck:
    """The gate on the calls of the first batch, and what it saw of each layer."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[int, str, str, float, float]]] = {}

    def check(self, call: AttentionCall, ids: Sequence[str]) -> None:
        """Rebuilds rows of a call and notes what its layer is. ids: of the batch's inputs.

        Raises MeasurementError, naming the layer, if they differ from what the model used, and NotFinite,
        naming the inputs as well, for values that are not finite.
        """
        rows = gate_rows(call)
        visible = call.visibility.count.expand(call.batch, call.heads, call.tokens)[:, :, rows] > 0
        # where, not a product: of a row that sees nothing some kernels make NaN
        used = torch.where(visible[..., None], call.output[:, :, rows].float(), 0.0)
        non_finite = ~used.isfinite().flatten(1).all(1)
        if non_finite.any():
            raise NotFinite(dict.fromkeys(inputs_of(non_finite, ids), f"layer '{call.module}' {NOT_FINITE}"))
        error = total = math.nan  # of a layer without softmax there are no weights to rebuild it from
        if call.has_pattern:
            weights = pattern_rows(call, rows)
            whole = weighted_values(call, weights) + call.outside_at(rows)
            rebuilt = torch.where(visible[..., None], whole, 0.0)
            error = rebuilt_error(call, rebuilt, used)
            total = (weights.sum(-1) * visible).sum(dtype=torch.float64).item() / max(1, int(visible.sum()))
        seen = call.visibility
        windowed = call.batch > len(ids) or (seen.rule == "general" and bool(seen.count.max() < call.keys))
        alone = bool((seen.count[..., 0] <= 1).all()) and call.tokens > 1
        scope, first = "window" if windowed else "full", "excluded" if alone else "included"
        self.seen.setdefault(call.layer, []).append((call.tokens, scope, first, error, total))

    def facts(self, layer: int, projection: str) -> LayerFacts:
        """What was seen of a layer, all of its calls together. projection: as in `LayerFacts`."""
        tokens, scopes, firsts, errors, totals = zip(*self.seen[layer], strict=True)
        scope = "window" if len(tokens) > 1 else scopes[0]
        total = round(sum(totals) / len(totals), SUM_DIGITS)
        return LayerFacts(max(tokens), scope, firsts[0], projection, max(errors), row_sum=total)


def gate_rows(call: AttentionCall) -> Int[Tensor, " row"]:
    """The query rows that are rebuilt."""
    return torch.linspace(0, call.tokens - 1, min(GATE_ROWS, call.tokens)).long().to(call.output.device)


def inputs_of(rows: Bool[Tensor, " batch"], ids: Sequence[str]) -> list[str]:
    """Whose the marked rows of a batch are, which holds the rows of each input side by side.

    All of the inputs where rows belong to none of them.
    """
    if len(rows) % len(ids):
        return list(ids)
    marked = rows.view(len(ids), -1).any(1).tolist()
    return [name for name, spoiled in zip(ids, marked, strict=True) if spoiled]


def refuse_non_finite(states: Tensor, batch: Batch, path: str) -> None:
    """Raises NotFinite for inputs with NaN or infinity in what a block returns; padding may hold any.

    states: `[batch, …, width]`. path: of the block.
    """
    non_finite = ~states.isfinite().all(-1)
    if batch.real is not None and batch.real.shape == non_finite.shape:
        non_finite = non_finite & batch.real.to(non_finite.device)
    if non_finite.any():
        whose = inputs_of(non_finite.flatten(1).any(1), batch.ids)
        raise NotFinite(dict.fromkeys(whose, f"the block of layer '{path}' {NOT_FINITE}"))


def rebuilt_error(call: AttentionCall, rebuilt: Tensor, used: Tensor) -> float:
    """Relative error of some rows of A V.

    Raises MeasurementError, naming the layer and where it is known the reason, if it is too large.
    """
    error = relative_error(rebuilt, used)
    allowed = tolerance(call.output.dtype)
    if error < allowed:
        return error
    if outweighed(call, allowed):
        raise MeasurementError(
            f"layer '{call.module}': scores of this input outweigh what its mask adds to hide keys: "
            "hidden ones have weight",
            "hide them with -inf or a boolean mask, or leave the layer out with --layers",
        )
    half = call.output.dtype not in (torch.float32, torch.float64)
    raise MeasurementError(
        f"layer '{call.module}': A V rebuilt from the call differs from what the model used "
        f"(relative error {error:.1e}, allowed {allowed:.0e})",
        f"{'try --dtype float32; if that differs too, ' if half else ''}"
        "this attention is not understood; please report the model",
    )


def outweighed(call: AttentionCall, least: float) -> bool:
    """Whether a key that an additive mask hides has a weight of `least` or more: scores differ by as much."""
    if call.query is None or call.mask is None or call.mask.dtype == torch.bool:
        return False
    rows = gate_rows(call)
    visible = call.visibility.of_rows(rows)  # [batch or 1, head or 1, row or 1, token]
    added = replace(call, visibility=replace(call.visibility, hidden=-torch.inf))
    return bool(((pattern_rows(added, rows) >= least) & ~visible & visible.any(-1, keepdim=True)).any())

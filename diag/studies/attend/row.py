"""One query row of one attention call: its weights, value cosines with its own, and its output's parts.

Only this row of the pattern is computed: O(token · dim), no token × token matrix. Everything is
reduced in float64. Definitions and token sets are those of `diag.metrics.default`; the tests hold that the
two agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from diag.attention.call import AttentionCall
from diag.attention.pattern import pattern_rows
from diag.attention.value_statistics import reciprocal
from diag.errors import UserError
from diag.measure.reconstruction import rebuilt_error
from diag.results.looks import NUMBERS


@dataclass(frozen=True)
class TokenRow:
    """One row, per query head.

    weight, value_cosine: `[head, token]`, NaN where the row does not see the token.
    numbers: name -> `[head]`, the names of `NUMBERS`; NaN where undefined.
    gate_error: relative error of the row's output rebuilt from its weights.
    """

    weight: np.ndarray
    value_cosine: np.ndarray
    numbers: dict[str, np.ndarray]
    gate_error: float


def row_of(call: AttentionCall, row: int, among: Bool[Tensor, " token"]) -> TokenRow:
    """Reads one row off a call whose batch is one.

    among: the tokens that are partners of the two nulls, as a token set selects them.
    Raises UserError where the row is not finite, sees nothing or has no value of its own, and
    MeasurementError, naming the layer, where its weights do not rebuild its output.
    """
    here = torch.tensor([row], device=call.output.device)
    if not call.own_keys:
        raise UserError(
            f"layer '{call.module}' attends to keys that are not its tokens' own: no token has a value there",
            "choose another layer with --layer",
        )
    visible = call.visibility.of_rows(here)[0, :, 0].expand(call.heads, -1)  # [head, token]
    if not bool(visible.any()):
        raise UserError(f"token {row} of layer '{call.module}' sees no token", "choose another token")
    grouped = (call.kv_heads, call.group)
    seen = visible.unflatten(0, grouped)  # [kv_head, group, token]
    # hidden values may hold anything, and 0 · NaN is NaN
    value = call.value[0].double().masked_fill(~seen.any(1)[..., None], 0.0)  # [kv_head, token, dim]
    output = call.output[0, :, row].double().unflatten(0, grouped)  # [kv_head, group, dim]
    weight = pattern_rows(call, [row])[0, :, 0].double().unflatten(0, grouped)  # [kv_head, group, token]
    if not all(bool(torch.isfinite(x).all()) for x in (value, output, weight)):
        raise UserError(
            f"layer '{call.module}' gives values that are not finite",
            "the weights or activations hold NaN or infinity; try --dtype float32",
        )
    outside = torch.zeros_like(output)
    if call.outside is not None:
        outside += call.outside.expand_as(call.output)[0, :, row].double().unflatten(0, grouped)
    error = rebuilt_error(call, weight @ value + outside, output)

    norm = vector_norm(value, dim=-1)  # [kv_head, token]
    unit = value * reciprocal(norm)[..., None]
    own, own_norm = unit[:, row], norm[:, row, None]  # [kv_head, dim], [kv_head, 1]
    cosine = unit @ own[..., None]  # [kv_head, token, 1]
    output_norm = vector_norm(output, dim=-1)  # [kv_head, group]
    per_output = reciprocal(output_norm)
    projection = vecdot(output, own[:, None])
    bias = projection * per_output
    self_part = weight[..., row] * own_norm * per_output

    partners = seen & among.to(seen.device)
    # a uniform row has the same sum; what comes of no token stays
    total = partners.double() @ value / partners.sum(-1, keepdim=True).clamp(min=1)  # [kv_head, group, dim]
    total = total * weight.sum(-1, keepdim=True) + outside
    uniform = vecdot(total, own[:, None]) * reciprocal(vector_norm(total, dim=-1))
    signed = (weight < 0).any(-1) | bool(call.maps)
    others = partners.clone()
    others[..., row] = False
    count = others.sum(-1)
    partner = vecdot(output, others.double() @ unit) * per_output / count
    found = {
        "cos_y_vself": bias,
        "self_part": self_part,
        "context_part": bias - self_part,
        "cos_y_vpartner": partner.masked_fill(count == 0, torch.nan),
        # of weights that may be negative no uniform attention is the reference
        "cos_y_vuniform": uniform.masked_fill((partners.sum(-1) == 0) | signed, torch.nan),
        "excess": (bias - partner).masked_fill(count == 0, torch.nan),
        "removed_energy": bias.square(),
        "self_weight": weight[..., row],
        "output_norm": output_norm,
        "projection": projection,
        "exclusive_norm": vector_norm(output - projection[..., None] * own[:, None], dim=-1),
        "value_norm": own_norm.expand_as(bias),
    }
    cosines = cosine[..., 0].repeat_interleave(call.group, 0)  # [head, token]
    return TokenRow(
        weight.flatten(0, 1).masked_fill(~visible, torch.nan).numpy(force=True),
        cosines.masked_fill(~visible, torch.nan).numpy(force=True),
        {name: found[name].flatten().numpy(force=True) for name in NUMBERS},
        error,
    )

"""The slow, dense, float64 reference of every attention statistic, and the calls it is compared on.

Written from the formulas alone, one query row at a time, with the whole token × token pattern in
memory. It shares no code with `diag`: two independent routes have to agree.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from diag.attention.call import AttentionCall, WeightMap

Array = np.ndarray


# --- building calls ---------------------------------------------------------------------------------


def make_call(
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    tokens: int = 13,
    keys: int | None = None,
    dim: int = 16,
    value_dim: int | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AttentionCall:
    """A random call whose output is computed densely in float32 and rounded to `dtype`.

    keys: how many, where they are not the tokens' own.

    Values share a direction and keys resemble values, so that no statistic is trivially near zero.
    """
    generator = torch.Generator().manual_seed(seed)
    kv_heads = heads if kv_heads is None else kv_heads
    value_dim = dim if value_dim is None else value_dim
    query = torch.randn(batch, heads, tokens, dim, generator=generator)
    width = tokens if keys is None else keys
    key = torch.randn(batch, kv_heads, width, dim, generator=generator)
    shared = torch.randn(batch, kv_heads, 1, value_dim, generator=generator)
    value = torch.randn(batch, kv_heads, width, value_dim, generator=generator) + 0.7 * shared
    if keys is None:  # Some attention to oneself: queries lean towards their own key.
        query = query + 0.2 * key.repeat_interleave(heads // kv_heads, 1)
    call = AttentionCall(
        layer=0,
        module="layer",
        query=query.to(dtype),
        key=key.to(dtype),
        value=value.to(dtype),
        output=torch.empty(batch, heads, tokens, value_dim, dtype=dtype),
        mask=mask,
        causal=causal,
        scale=1.5 / math.sqrt(dim),
        own_keys=keys is None,
    )
    return with_dense_output(call)


def with_dense_output(call: AttentionCall) -> AttentionCall:
    """The call with `output` recomputed from its queries (or pattern), keys and values, in its own format."""
    pattern = torch.from_numpy(dense_pattern(call)).float()
    value = call.value.float().repeat_interleave(call.group, 1)
    outside = 0.0 if call.outside is None else call.outside.float()
    return replace(call, output=(pattern @ value + outside).to(call.output.dtype))


def with_other_keys(call: AttentionCall, number: int = 2, *, valued: bool = True) -> AttentionCall:
    """The call with keys in its softmax that are no tokens; sinks, which have no value, unless `valued`."""
    assert call.query is not None
    generator = torch.Generator().manual_seed(17)
    keys = torch.randn(1, call.heads, number, call.query.shape[-1], generator=generator).double()
    values = torch.randn(1, call.heads, number, call.value.shape[-1], generator=generator).double()
    others = float64(call.query.double() @ keys.transpose(-1, -2)) * call.scale + 1
    scores = np.concatenate([dense_scores(call), others], -1)
    top = scores.max(-1, keepdims=True)
    lse = top + np.log(np.exp(scores - top).sum(-1, keepdims=True))
    outside = torch.from_numpy(np.exp(others - lse)) @ values if valued else torch.zeros(1, 1, 1, 1)
    lse = torch.from_numpy(lse[..., 0]).float()
    return with_dense_output(replace(call, log_normaliser=lse, outside=outside.float()))


def with_mixed_heads(call: AttentionCall, least: float = 0.1) -> AttentionCall:
    """The call of talking heads: each head's weights are a sum of those of all heads. Coefficients are drawn
    from `least` to 1.
    """
    drawn = torch.rand(call.heads, call.heads, generator=torch.Generator().manual_seed(18)).double()
    mixed = torch.einsum("gh,bhij->bgij", least + (1 - least) * drawn, torch.from_numpy(dense_pattern(call)))
    return with_dense_output(replace(call, query=None, key=None, pattern=mixed.float()))


def with_pattern(call: AttentionCall) -> AttentionCall:
    """The same call as a library would hand it over that materialises its pattern (float32)."""
    pattern = torch.from_numpy(dense_pattern(call)).float()
    return replace(call, query=None, key=None, pattern=pattern)


def with_maps(call: AttentionCall, *more: float, known: bool = False) -> AttentionCall:
    """The call with further maps of the same keys and values added, by their coefficients; the last one has a
    coefficient for each head and query.

    known: whether a kernel has returned the log-normaliser of each map.
    """
    assert call.query is not None
    assert call.key is not None
    drawn = torch.rand(1, call.heads, call.tokens, generator=torch.Generator().manual_seed(5))
    maps = []
    for place, weight in enumerate((1.0, *more)):
        one = replace(call, query=call.query.roll(place, 2), scale=call.scale * (1 + place))
        coefficient = weight * drawn if place == len(more) else torch.full((1, 1, 1), weight)
        lse = with_log_normaliser(one).log_normaliser if known else None
        assert one.query is not None
        maps.append(WeightMap(one.query, call.key, one.scale, coefficient, lse))
    return with_dense_output(replace(call, query=None, key=None, maps=tuple(maps)))


def with_log_normaliser(call: AttentionCall) -> AttentionCall:
    """The same call with the float32 `lse` that a flash kernel would have returned."""
    scores = dense_scores(call)
    lse = np.full(scores.shape[:3], -np.inf)
    for b, h, i in np.ndindex(*lse.shape):
        seen = scores[b, h, i][np.isfinite(scores[b, h, i])]
        if len(seen):
            lse[b, h, i] = seen.max() + np.log(np.exp(seen - seen.max()).sum())
    return replace(call, log_normaliser=torch.from_numpy(lse).float())


# --- scores, pattern, visibility --------------------------------------------------------------------


def float64(x: Tensor) -> Array:
    """The tensor as a float64 array."""
    return x.detach().cpu().to(torch.float64).numpy()


def dense_visible(call: AttentionCall) -> Array:
    """Whether query i sees key j, `[batch, head, token, token]` of bool."""
    batch, heads, tokens, _ = call.output.shape
    keys = call.value.shape[2]
    visible = np.ones((batch, heads, tokens, keys), dtype=bool)
    if call.mask is not None:
        visible &= call.mask.cpu().numpy() if call.mask.dtype == torch.bool else dense_shown(call.mask)
    if call.causal:
        visible &= np.tri(tokens, keys, dtype=bool)
    return visible


def dense_shown(mask: Tensor) -> Array:
    """Whether an additive mask shows each key, `[batch or 1, head or 1, row or 1, token or 1]`.

    By the weights that it would give alone: down the sorted entries of a head, to the first whose weight
    beside the largest is none in float32, and beside the entry before it less than the root of that.
    """
    none = float(np.finfo(np.float32).tiny)
    entries = float64(mask[(None,) * (4 - mask.ndim)])
    shown = np.ones(entries.shape, dtype=bool)
    for head in range(entries.shape[1]):
        sorted_ones = np.unique(entries[:, head])[::-1]
        first, kept = sorted_ones[0], len(sorted_ones) if sorted_ones[0] > -9000 else 0
        for place in range(1, kept):
            beside_first, beside_last = np.exp(sorted_ones[place] - [first, sorted_ones[place - 1]])
            if beside_first < none and beside_last < none**0.5:
                kept = place
                break
        shown[:, head] = np.isin(entries[:, head], sorted_ones[:kept])
    return shown


def dense_scores(call: AttentionCall) -> Array:
    """`scale · q_i·k_j + mask_ij`, -inf where hidden, `[batch, head, token, token]`."""
    assert call.query is not None
    assert call.key is not None
    query, key, visible = float64(call.query), float64(call.key), dense_visible(call)
    group = query.shape[1] // key.shape[1]
    scores = np.full(visible.shape, -np.inf)
    bias = np.zeros(visible.shape)
    if call.mask is not None and call.mask.dtype != torch.bool:
        bias = bias + float64(call.mask)
    for b, h in np.ndindex(*visible.shape[:2]):
        biased = call.scale * query[b, h] @ key[b, h // group].T + bias[b, h]
        scores[b, h][visible[b, h]] = biased[visible[b, h]]
    return scores


def dense_pattern(call: AttentionCall) -> Array:
    """The attention weights in float64, `[batch, head, token, token]`; a row that sees nothing is 0."""
    if call.pattern is not None:
        return float64(call.pattern)
    if call.maps:
        found = np.zeros((*call.output.shape[:3], call.tokens))
        for one in call.maps:
            alone = replace(call, query=one.query, key=one.key, scale=one.scale, maps=())
            found += float64(one.coefficient)[..., None] * dense_pattern(alone)
        return found
    scores = dense_scores(call)
    if call.outside is not None:
        assert call.log_normaliser is not None
        return np.exp(scores - float64(call.log_normaliser)[..., None])
    pattern = np.zeros(scores.shape)
    for b, h, i in np.ndindex(*scores.shape[:3]):
        if np.isfinite(scores[b, h, i]).any():
            weights = np.exp(scores[b, h, i] - scores[b, h, i].max())
            pattern[b, h, i] = weights / weights.sum()
    return pattern


# --- small formulas ---------------------------------------------------------------------------------


def length_of(x: Array) -> float:
    """‖x‖ of one vector, as `np.linalg.norm` computes it after much longer deliberation."""
    return math.sqrt(x @ x)


def cosine(x: Array, y: Array) -> float:
    """cos(x, y); 0 where either vector is zero."""
    lengths = length_of(x) * length_of(y)
    return float(x @ y / lengths) if lengths > 0 else 0.0


def pairwise(x: Array) -> float:
    """Mean of cos(x_i, x_j) over i ≠ j; NaN for fewer than two vectors. `x` is `[vector, dim]`."""
    if len(x) < 2:
        return float("nan")
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    unit = np.divide(x, lengths, out=np.zeros_like(x), where=lengths > 0)
    cosines = unit @ unit.T
    return float(cosines[~np.eye(len(x), dtype=bool)].mean())


def without(x: Array, direction: Array, least: float = 1e-6) -> Array:
    """`x` with its component along `direction` removed; `x` itself where the direction is zero.

    Zero where no more than `least` of `x` is left: what rounding leaves there is no direction.
    """
    length = length_of(direction)
    if length == 0:
        return x
    unit = direction / length
    left = x - (x @ unit) * unit
    return left if length_of(left) > least * length_of(x) else np.zeros_like(x)


def partial_similarity(values: Array, anchor: int) -> float:
    """Mean over j ≠ k, both ≠ anchor, of cos(v_j^⊥anchor, v_k^⊥anchor); NaN for fewer than three values."""
    return pairwise(np.array([without(values[j], values[anchor]) for j in range(len(values)) if j != anchor]))


def participation_ratio(x: Array) -> float:
    """(tr C)² / ‖C‖²_F of the covariance C of the rows of `x`; NaN where nothing varies."""
    if len(x) < 2:
        return float("nan")
    centred = x - x.mean(0)
    covariance = centred.T @ centred
    if np.trace(covariance) <= 1e-20 * (x**2).sum():  # only rounding is left
        return float("nan")
    return float(np.trace(covariance) ** 2 / (covariance**2).sum())


def mean(numbers: list[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return float(np.mean(numbers)) if numbers else float("nan")


# --- the statistics ---------------------------------------------------------------------------------


def reference(
    call: AttentionCall,
    tokens: Bool[Tensor, "batch token"] | None = None,
    anchors: list[list[int]] | None = None,
) -> dict[str, Float64[Tensor, "batch head"]]:
    """Every statistic of every input and query head.

    tokens: the token set; all if None.
    anchors: anchor tokens of `value_similarity_partial` for each input; every counted token if None.
    """
    pattern, visible = dense_pattern(call), dense_visible(call)
    value, output = float64(call.value), float64(call.output)
    outside = np.zeros(output.shape) if call.outside is None else float64(call.outside) + 0 * output
    batch, heads, length, _ = output.shape
    group = heads // value.shape[1]
    chosen = np.ones((batch, length), dtype=bool) if tokens is None else tokens.cpu().numpy()
    if not call.own_keys:
        return of_other_keys(call, chosen)
    least = max(4e-6, 4 * torch.finfo(call.output.dtype).eps)
    result: dict[str, Array] = {}
    for b in range(batch):
        real = visible[b].any(axis=(0, 1))  # a key that any query sees
        counted = [t for t in range(length) if real[t] and chosen[b, t]]
        for h in range(heads):
            row_numbers = rows_of_one_head(
                *(pattern[b, h], visible[b, h], value[b, h // group], output[b, h], outside[b, h]),
                *(counted, real, least),
            )
            value_numbers = values_of_one_head(
                value[b, h // group], counted, counted if anchors is None else anchors[b]
            )
            for name, number in (row_numbers | value_numbers).items():
                result.setdefault(name, np.full((batch, heads), np.nan))[b, h] = number
    return {name: torch.from_numpy(numbers) for name, numbers in result.items()}


def of_other_keys(call: AttentionCall, chosen: Array) -> dict[str, Float64[Tensor, "batch head"]]:
    """The statistics where keys are not the tokens' own: of weights and outputs, the others are undefined."""
    pattern, visible, output = dense_pattern(call), dense_visible(call), float64(call.output)
    nothing = np.full(output.shape[:2], np.nan)
    values = ("value_similarity_partial_reference", "value_participation_ratio")
    names = (
        *ROW_NAMES,
        "value_similarity",
        "value_similarity_partial",
        *values,
        "exclusive_output_similarity",
    )
    result = {name: nothing.copy() for name in (*names, "entropy_p15", "output_similarity")}
    for b, h in np.ndindex(*output.shape[:2]):
        rows = [i for i in range(output.shape[2]) if chosen[b, i] and visible[b, h, i].sum() >= 2]
        first = int(np.flatnonzero(visible[b].any(axis=(0, 1)))[0])
        weights = [pattern[b, h, i] for i in rows]
        entropies = [-sum(float(w * np.log(w)) for w in row if w > 0) for row in weights]
        even = [row.sum() / visible[b, h, i].sum() for i, row in zip(rows, weights, strict=True)]
        most = [-row.sum() * np.log(w) for row, w in zip(weights, even, strict=True)]
        found = {
            "entropy": mean(entropies),
            "entropy_normalized": mean([one / bound for one, bound in zip(entropies, most, strict=True)]),
            "entropy_p15": float(np.percentile(entropies, 15)) if rows else math.nan,
            "effective_keys": mean([row.sum() ** 2 / (row**2).sum() for row in weights]),
            "first_weight": mean([row[first] for row in weights]),
            "output_similarity": pairwise(output[b, h, rows]),
        }
        for name, number in found.items():
            result[name][b, h] = number
    return {name: torch.from_numpy(numbers) for name, numbers in result.items()}


def values_of_one_head(values: Array, counted: list[int], anchors: list[int]) -> dict[str, float]:
    """What needs the values only: no rule about how many keys a token sees."""
    kept = values[counted]
    similarity = pairwise(kept)
    return {
        "value_similarity": similarity,
        "value_similarity_partial": mean([partial_similarity(kept, counted.index(a)) for a in anchors]),
        "value_similarity_partial_reference": similarity / (1 + similarity),
        "value_participation_ratio": participation_ratio(kept),
    }


ROW_NAMES = ["cos_y_vself", "self_part", "context_part", "cos_y_vpartner", "cos_y_vuniform", "excess"]
ROW_NAMES += ["removed_energy", "self_weight", "self_weight_ratio", "entropy", "entropy_normalized"]
ROW_NAMES += ["effective_keys", "first_weight"]


def rows_of_one_head(
    pattern: Array,
    visible: Array,
    values: Array,
    outputs: Array,
    outside: Array,
    counted: list[int],
    real: Array,
    least: float,
) -> dict[str, float]:
    """What is averaged over query rows: those that see at least two keys."""
    rows = [i for i in counted if visible[i].sum() >= 2]
    negative = bool((pattern[visible.any(-1)] < 0).any())
    first = int(np.flatnonzero(real)[0]) if real.any() else 0
    names = (
        "cos_y_vself self_part context_part cos_y_vpartner cos_y_vuniform excess removed_energy self_weight "
    )
    names += "self_weight_ratio entropy entropy_normalized effective_keys first_weight"
    numbers: dict[str, list[float]] = {name: [] for name in names.split()}
    for i in rows:
        y, v, weights, seen = outputs[i], values[i], pattern[i], visible[i].sum()
        alignment = cosine(y, v)
        own = weights[i] * length_of(v) / length_of(y) if length_of(y) > 0 else 0.0
        numbers["cos_y_vself"].append(alignment)
        numbers["removed_energy"].append(alignment**2)
        numbers["self_part"].append(own)
        numbers["context_part"].append(alignment - own)

        visible_in_set = [j for j in counted if visible[i, j]]
        partners = [cosine(y, values[j]) for j in visible_in_set if j != i]
        if partners:
            numbers["cos_y_vpartner"].append(mean(partners))
            numbers["excess"].append(alignment - mean(partners))
        total = weights.sum()
        numbers["self_weight"].append(weights[i])
        numbers["first_weight"].append(weights[first])
        if negative:
            continue
        # a uniform row has the same visible keys and the same sum
        if visible_in_set:
            numbers["cos_y_vuniform"].append(cosine(total * values[visible_in_set].mean(0) + outside[i], v))
        numbers["self_weight_ratio"].append(weights[i] / (total / seen))
        entropy = -sum(float(w * np.log(w)) for w in weights if w > 0)
        numbers["entropy"].append(entropy)
        of_uniform = -sum([total / seen * np.log(total / seen)] * seen)
        if of_uniform > 0:
            numbers["entropy_normalized"].append(entropy / of_uniform)
        numbers["effective_keys"].append(total**2 / (weights**2).sum())

    exclusive = np.array([without(outputs[i], values[i], least) for i in rows])
    entropies = numbers["entropy"]
    return {name: mean(column) for name, column in numbers.items()} | {
        "entropy_p15": float(np.percentile(entropies, 15)) if entropies else float("nan"),
        "output_similarity": pairwise(outputs[rows]),
        "exclusive_output_similarity": pairwise(exclusive),
    }


# --- values and outputs -----------------------------------------------------------------------------


def unit(x: Array) -> Array:
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)


def dense_values(call: AttentionCall, among: Array, rows: Array, least: float) -> dict[str, Array]:
    """Every number of `ValueStatistics` by its formula; among: [batch, token], rows: [batch, head, token]."""
    visible, group = dense_visible(call), call.group
    real = visible.any(axis=(1, 2))
    value = np.where(real[:, None, :, None], float64(call.value), 0)
    output = np.where(visible.any(-1)[..., None], float64(call.output), 0)
    chosen = visible & among[:, None, None, :]
    per_head = value.repeat(group, 1)
    apart = bool((visible != visible[:, :1]).any())
    uniform = (chosen.astype(float) @ per_head)[:, :: 1 if apart else group]
    product = (output * per_head).sum(-1)
    exclusive = output - (output * unit(per_head)).sum(-1, keepdims=True) * unit(per_head)
    left, norm = np.linalg.norm(exclusive, axis=-1), np.linalg.norm(output, axis=-1)
    kept = rows & (left > least * norm)
    return {
        "value_norm": np.linalg.norm(value, axis=-1),
        "uniform": ((per_head if apart else value) * uniform).sum(-1),
        "uniform_norm": np.linalg.norm(uniform, axis=-1),
        "output_norm": norm,
        "product": product,
        "partner": (output * (chosen.astype(float) @ unit(per_head))).sum(-1),
        "exclusive_norm": left,
        "value_total": (unit(value) * among[:, None, :, None]).sum(2),
        "output_total": (unit(output) * rows[..., None]).sum(2),
        "exclusive_total": (unit(exclusive) * kept[..., None]).sum(2),
    }


# --- the calls that every statistic is compared on --------------------------------------------------


def key_padding(batch_of_real: list[range], tokens: int) -> Bool[Tensor, "batch 1 1 token"]:
    """The mask that hides padding keys from every query; `batch_of_real` holds the real tokens."""
    mask = torch.zeros(len(batch_of_real), 1, 1, tokens, dtype=torch.bool)
    for b, real in enumerate(batch_of_real):
        mask[b, ..., list(real)] = True
    return mask


def window(tokens: int, left: int, right: int) -> Bool[Tensor, "token token"]:
    """Sliding window: a query sees `left` keys before it, itself, and `right` keys after it."""
    distance = torch.arange(tokens)[None, :] - torch.arange(tokens)[:, None]
    return (distance >= -left) & (distance <= right)


def distance(tokens: int) -> Float[Tensor, "token token"]:
    """|i - j|."""
    position = torch.arange(tokens)
    return (position[:, None] - position).abs().float()


def of_two_kinds(tokens: int) -> Float[Tensor, "batch head token token"]:
    """Three heads of which -100 hides what comes later, and one of a distance in steps of 20."""
    causal = additive(torch.ones(tokens, tokens, dtype=torch.bool).tril(), -100.0)
    return torch.stack([causal, causal, causal, -20.0 * distance(tokens)])[None]


def random_mask(*shape: int, seed: int = 7, share: float = 0.6) -> Bool[Tensor, ...]:
    """Each entry visible with probability `share`."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def additive(mask: Bool[Tensor, ...], hidden: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The additive form of a boolean mask."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)


def random_bias(*shape: int, seed: int = 11) -> Float[Tensor, ...]:
    """A finite position bias."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_zeros(call: AttentionCall) -> AttentionCall:
    """Some zero values, one batch row with only zero values for a head, and some zero output rows."""
    value = call.value.clone()
    value[0, :, 3] = 0
    value[0, 1, 5] = 0
    value[1, 2] = 0
    output = with_dense_output(replace(call, value=value)).output.clone()
    output[0, 2, 4] = 0
    return replace(call, value=value, output=output)


def with_repeats(call: AttentionCall) -> AttentionCall:
    """Equal and parallel values, as the same word gives in the first layer of a rotary model."""
    value = call.value.clone()
    value[:, :, 5] = value[:, :, 2]
    value[:, :, 7] = 3 * value[:, :, 4]
    value[:, :, 9] = -value[:, :, 1]
    return with_dense_output(replace(call, value=value))


def build_cases() -> dict[str, AttentionCall]:
    """Every kind of call the statistics have to get right, by name."""
    right, left = [range(13), range(9)], [range(13), range(4, 13)]
    lowest = torch.finfo(torch.float32).min
    ragged, both = key_padding(right, 13), key_padding(left, 13)
    holes = random_mask(2, 1, 13, 13)
    per_head = random_mask(2, 4, 13, 13, seed=8)
    nothing_seen = random_mask(2, 4, 13, 13, seed=9)
    nothing_seen[0, 1, 3:6] = False  # rows that see nothing, in one head only
    nothing_seen[1, :, :, 6] = False  # a key that nobody sees
    alone = torch.eye(13, dtype=torch.bool) | random_mask(13, 13, seed=10, share=0.1)
    lower = torch.ones(13, 13, dtype=torch.bool).tril()
    causal_left = both & lower
    unmasked_rows = causal_left | ~causal_left.any(-1, keepdim=True)
    square = [range(3, 12), range(2, 9)]
    both_ways = key_padding(square, 13) & key_padding(square, 13).transpose(-1, -2)
    cases = {
        "full": make_call(),
        "causal": make_call(causal=True, seed=1),
        "long": make_call(tokens=40, heads=2, seed=2),
        "long causal": make_call(tokens=40, heads=2, causal=True, seed=3),
        "right padding": make_call(mask=ragged, seed=4),
        "left padding": make_call(mask=both, seed=5),
        "padding hides queries too": make_call(mask=both_ways, seed=6),
        "causal right padding": make_call(mask=ragged, causal=True, seed=7),
        "causal left padding": make_call(mask=both, causal=True, seed=8),
        "causal left padding as one mask": make_call(mask=causal_left, seed=9),
        "causal left padding, unmasked rows": make_call(mask=unmasked_rows, seed=10),
        "padding shared by the batch": make_call(mask=key_padding([range(2, 11)], 13), seed=11),
        "random mask": make_call(mask=holes, seed=12),
        "random mask, two dimensions": make_call(mask=holes[0, 0], seed=13),
        "random mask, three dimensions": make_call(mask=per_head[0], seed=14),
        "random mask, causal": make_call(mask=holes, causal=True, seed=15),
        "mask per head": make_call(mask=per_head, seed=16),
        "mask per head, causal": make_call(mask=per_head, causal=True, seed=17),
        "mask per head, shared by the batch": make_call(mask=per_head[:1], seed=18),
        "mask per head, unseen keys": make_call(mask=nothing_seen, seed=19),
        "mask per head, grouped": make_call(mask=nothing_seen, kv_heads=2, seed=20),
        "mask that often hides oneself": make_call(mask=random_mask(2, 1, 13, 13, share=0.3), seed=21),
        "many rows see themselves only": make_call(mask=alone, seed=22),
        "window": make_call(mask=window(13, 3, 3), seed=23),
        "causal window": make_call(mask=window(13, 4, 0), seed=24),
        "window and causal": make_call(mask=window(13, 4, 4), causal=True, seed=25),
        "bias per head": make_call(mask=random_bias(1, 4, 13, 13), seed=26),
        "bias per input and head": make_call(mask=random_bias(2, 4, 13, 13), causal=True, seed=27),
        "bias of keys": make_call(mask=random_bias(2, 1, 1, 13), seed=28),
        "bias and -inf": make_call(mask=additive(holes, -math.inf) + random_bias(1, 4, 13, 13), seed=29),
        "additive -inf": make_call(mask=additive(ragged, -math.inf), seed=30),
        "additive lowest": make_call(mask=additive(causal_left, lowest), seed=31),
        "additive lowest and causal": make_call(mask=additive(both, lowest), causal=True, seed=32),
        "additive -10000": make_call(mask=additive(ragged, -10000.0), seed=33),
        "additive -1000": make_call(mask=additive(causal_left, -1000.0), seed=62),
        "windows of -100 with a bias": make_call(
            mask=additive(both, -100.0) + 4 * random_bias(1, 4, 13, 13), seed=63
        ),
        "far keys have no weight": make_call(
            mask=-30.0 * (distance(13) - 2).clamp(min=0), causal=True, seed=64
        ),
        "hidden in some heads, far in others": make_call(mask=of_two_kinds(13), seed=65),
        "group of 2": make_call(kv_heads=2, seed=34),
        "group of 4": make_call(kv_heads=1, causal=True, seed=35),
        "group of 2, left padding": make_call(kv_heads=2, mask=both, causal=True, seed=36),
        "group of 2, bias": make_call(kv_heads=2, mask=random_bias(1, 4, 13, 13), seed=37),
        "one token": make_call(tokens=1, seed=38),
        "one token, causal": make_call(tokens=1, causal=True, seed=39),
        "two tokens": make_call(tokens=2, seed=40),
        "two tokens, causal": make_call(tokens=2, causal=True, seed=41),
        "three tokens, causal": make_call(tokens=3, causal=True, seed=42),
        "one real token": make_call(mask=key_padding([range(13), range(5, 6)], 13), seed=43),
        "no real token": make_call(mask=key_padding([range(13), range(0)], 13), seed=44),
        "zero vectors": with_zeros(make_call(seed=45)),
        "zero vectors, causal": with_zeros(make_call(causal=True, seed=46)),
        "repeated values": with_repeats(make_call(seed=60)),
        "repeated values, bfloat16": with_repeats(make_call(dtype=torch.bfloat16, causal=True, seed=61)),
        "bfloat16": make_call(dtype=torch.bfloat16, seed=47),
        "bfloat16, causal, grouped": make_call(dtype=torch.bfloat16, causal=True, kv_heads=2, seed=48),
        "float16": make_call(dtype=torch.float16, seed=49),
        "float16, padding": make_call(dtype=torch.float16, mask=both, seed=50),
        "float64": make_call(dtype=torch.float64, causal=True, seed=51),
        "head dimension 8": make_call(dim=8, seed=52),
        "head dimension 64": make_call(dim=64, causal=True, seed=53),
        "narrow values": make_call(dim=24, value_dim=8, kv_heads=2, seed=57),
        "wider values": make_call(dim=8, value_dim=24, seed=54),
        "one head": make_call(heads=1, batch=1, seed=55),
    }
    for dtype in (torch.bfloat16, torch.float16):
        mask = additive(causal_left, torch.finfo(dtype).min, dtype)
        cases[f"additive lowest {dtype}"] = make_call(dtype=dtype, mask=mask, seed=56)
    for name in ("full", "causal left padding"):
        cases[f"{name}; sinks"] = with_other_keys(cases[name], valued=False)
        cases[f"{name}; mixed heads"] = with_mixed_heads(cases[name])
    for name in ("group of 2, bias", "mask per head, grouped"):
        cases[f"{name}; other keys"] = with_other_keys(cases[name])
    cases["full; other keys, pattern given"] = with_pattern(with_other_keys(cases["full"]))
    cases["random mask; mixed heads of both signs"] = with_mixed_heads(cases["random mask"], -0.3)
    for name in ("full", "causal left padding", "mask per head, unseen keys", "group of 2", "bias and -inf"):
        cases[f"{name}; log-normaliser given"] = with_log_normaliser(cases[name])
        cases[f"{name}; pattern given"] = with_pattern(cases[name])
    return cases


CASES = build_cases()

_RAGGED = key_padding([range(5), range(3)], 5)
OTHER_TOKENS = {
    "pooled keys": make_call(keys=5, seed=70),
    "more keys, grouped": make_call(keys=20, kv_heads=2, seed=71),
    "as many keys": make_call(keys=13, seed=72),
    "padded keys": make_call(keys=5, mask=_RAGGED, seed=73),
    "bias of pooled keys": make_call(keys=5, mask=random_bias(1, 4, 13, 5), seed=74),
    "masked per head": make_call(keys=5, mask=random_mask(2, 4, 13, 5, seed=75), seed=75),
    "causal": make_call(keys=5, causal=True, seed=76),
    "causal, more keys": make_call(keys=20, causal=True, seed=77),
    "bfloat16": make_call(keys=5, dtype=torch.bfloat16, seed=78),
}
"""Calls whose keys are not those of the queries' own tokens."""
OTHER_TOKENS["pooled keys; pattern given"] = with_pattern(OTHER_TOKENS["pooled keys"])
OTHER_TOKENS["padded keys; sinks"] = with_other_keys(OTHER_TOKENS["padded keys"], valued=False)
OTHER_TOKENS["pooled keys; other keys"] = with_other_keys(OTHER_TOKENS["pooled keys"])
OTHER_TOKENS["pooled keys; log-normaliser given"] = with_log_normaliser(OTHER_TOKENS["pooled keys"])

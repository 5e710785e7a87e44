"""The metrics measured by default: pure functions from one call and a token set to numbers per token or head.

Every function of `METRICS` takes a `Selection` and returns a `Reading`. Their wording is in
`diag.metrics.catalogue`, and so are the ratios of two metrics' means, which are taken later, from tables.

Notation: per head, `v_i` values, `y_i` outputs, `A` the pattern, `v̂ = v/‖v‖`; S the token set. A
cosine with a zero vector is 0. Which tokens count:

- a token is in S and is a real key (some query sees it);
- for what is a row's (all but the value statistics) it also sees another key than itself: where a
  token sees only itself, y = v and A_ii = 1 whatever the model learned. For a causal model this
  leaves out exactly the first token; it also leaves out rows that see nothing.

Rows of A sum to s_i, which is 1 of a softmax over tokens: it is in the formulas, and nothing is renormalised
without being written there. Where weights are negative, what takes a row for shares of its attention
(`of_shares`) is undefined: in layers that add up several maps (differential attention), and in the heads of a
given pattern that have a negative weight in any row.

Where keys are not the tokens' own (cross-attention, pooled keys), no token has a v_i: what needs one
(`of_own_keys`) is undefined, and the rows that see two keys or more count.

Where a layer has no softmax, whatever needs weights (`of_weights`) is undefined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.containers import SoftmaxStatistics, ValueStatistics
from diag.attention.softmax_statistics import CallStatistics
from diag.attention.value_spread import ValueSpread, mean_pairwise, value_spread
from diag.attention.value_statistics import reciprocal, uniform_outputs, value_statistics
from diag.metrics.readings import Controls, Reading, reduce
from diag.metrics.registry import Metric, metric, registered


class Selection:
    """One call seen through one token set, with the quantities that several metrics share.

    tokens: the set's mask, `[batch or 1, token]`; None for all tokens.
    statistics: those of the call, which its token sets share; new ones if None.

    Per-token tensors are grouped, `[batch, kv_head, group, token]`, so that heads which share a KV
    head read its values without a copy.
    """

    def __init__(
        self,
        call: AttentionCall,
        tokens: Bool[Tensor, "#batch token"] | None = None,
        statistics: CallStatistics | None = None,
    ) -> None:
        self.call = call
        self.statistics = CallStatistics(call) if statistics is None else statistics
        assert self.statistics.call is call
        device = call.output.device
        among = torch.ones(1, call.tokens, dtype=torch.bool, device=device) if tokens is None else tokens
        keys = call.visibility.keys
        self.among = among if keys is None or not call.own_keys else among & keys
        """partners, and the tokens of the value statistics: `[batch or 1, token]`"""
        self.rows = self.among[:, None, :] & (call.visibility.count > 1)
        """rows that count: `[batch or 1, head or 1, token]`"""

    @cached_property
    def values(self) -> ValueStatistics:
        """Norms, products and sums of values and outputs."""
        return value_statistics(self.call, self.among, self.rows, self.rounding_floor)

    @property
    def rounding_floor(self) -> float:
        """How much of ‖y‖ is more than what rounding leaves where y is parallel to v."""
        return max(4e-6, 4 * torch.finfo(self.call.output.dtype).eps)

    @cached_property
    def value_norm(self) -> Float[Tensor, "batch kv_head 1 token"]:
        """‖v_i‖"""
        return self.values.value_norm[:, :, None]

    @cached_property
    def per_value_norm(self) -> Float[Tensor, "batch kv_head 1 token"]:
        """1/‖v_i‖, 0 for zero vectors."""
        return reciprocal(self.value_norm)

    @cached_property
    def per_output_norm(self) -> Float[Tensor, "batch kv_head group token"]:
        """1/‖y_i‖, 0 for zero vectors."""
        return self.of_heads(reciprocal(self.values.output_norm))

    @cached_property
    def cosine(self) -> Float[Tensor, "batch kv_head group token"]:
        """cos(y_i, v_i)"""
        return self.of_heads(self.values.product) * self.per_value_norm * self.per_output_norm

    @cached_property
    def self_part(self) -> Float[Tensor, "batch kv_head group token"]:
        """A_ii ‖v_i‖ / ‖y_i‖"""
        return self.of_heads(self.softmax.self_weight) * self.value_norm * self.per_output_norm

    @cached_property
    def value_similarity(self) -> Float[Tensor, "batch kv_head"]:
        units = self.among[:, None] & (self.values.value_norm > 0)
        return mean_pairwise(self.values.value_total, units.sum(-1), self.count[:, None])

    @cached_property
    def spread(self) -> ValueSpread:
        """How values lie about each other."""
        return value_spread(self.call, self.among, self.values.value_norm)

    @cached_property
    def partner(self) -> tuple[Tensor, Tensor]:
        """Mean cosine of y_i with the other visible values of S, and whether there is any."""
        own = self.grouped(self.among[:, None] & self.call.visibility.sees_itself)  # [.., 1 or group, token]
        partners = self.grouped(self.call.visibility.count_among(self.among)) - own.long()
        cosines = self.of_heads(self.values.partner) * self.per_output_norm - own * self.cosine
        return cosines / partners.clamp(min=1), partners > 0

    @property
    def row_sum(self) -> Float[Tensor, "batch head token"] | None:
        """s_i; None where it is 1 by the way A is made."""
        return None if self.call.is_softmax else self.softmax.row_sum

    @cached_property
    def count(self) -> Tensor:
        """Number of tokens of S, `[batch or 1]`."""
        return self.among.sum(-1)

    @cached_property
    def keys(self) -> Bool[Tensor, "#batch key"]:
        """Keys that are in S; where they are not the tokens' own, all that any query sees."""
        if self.call.own_keys:
            return self.among
        seen = self.call.visibility.keys
        return self.among.new_ones(1, self.call.keys) if seen is None else seen

    @property
    def softmax(self) -> SoftmaxStatistics:
        """Those of the call's rows, whatever the token set."""
        return self.statistics.softmax

    def of_heads(self, x: Float[Tensor, "batch head *rest"]) -> Float[Tensor, "batch kv_head group *rest"]:
        """Numbers of query heads beside those of the KV head that they share."""
        return x.unflatten(1, (self.call.kv_heads, self.call.group))

    def grouped(self, x: Tensor) -> Tensor:
        """`[batch, head, …]` to `[batch, kv_head, group, …]`; a head axis of 1 or of KV heads is kept."""
        if x.shape[1] == self.call.heads and self.call.group > 1:
            return x.unflatten(1, (self.call.kv_heads, self.call.group))
        return x[:, :, None]

    def per_row(self, values: Tensor, also: Tensor | None = None) -> Reading:
        """A reading of grouped numbers per token, on the rows that count."""
        weights = self.rows if also is None else self.rows & self._ungrouped(also)
        return Reading(self._ungrouped(values), weights)

    def at(self, x: Tensor) -> Tensor:
        """`[batch or 1, head or 1, token]` at the call's sampled rows; as it is where all rows are there."""
        return x if self.call.sample is None else self.call.sample.at(x)

    def of_pattern(self, values: Float[Tensor, "batch head row"], rows: Tensor | None = None) -> Reading:
        """A reading of what needs whole rows of the pattern, on the rows that count (or those of `rows`)."""
        rows, sample = self.rows if rows is None else rows, self.call.sample
        if sample is None:
            return Reading(values, rows)
        weights = sample.at(rows) * sample.weight[:, None]
        controls = self.controls if rows is self.rows else Controls(self.statistics.controls, rows, sample)
        return Reading(values, weights, sample, controls)

    @property
    def nothing(self) -> Reading:
        """A reading in which nothing counts, of what is undefined for the call."""
        nothing = self.rows.new_zeros((self.call.batch, self.call.heads, 1)).float()
        return Reading(nothing, nothing)

    @cached_property
    def controls(self) -> Controls:
        """What is known of all rows that count, where rows are sampled."""
        assert self.call.sample is not None
        return Controls(self.statistics.controls, self.rows, self.call.sample)

    def of_all_rows(self, statistics: CallStatistics) -> Selection:
        """The same token set of the call without its sample; statistics: `of_all_rows` of this one's."""
        whole = Selection(statistics.call, self.among, statistics)
        whole.values = self.values  # these are of all tokens in any case
        return whole

    def per_kv_head(self, values: Float[Tensor, "batch kv_head"], least: int = 2) -> Reading:
        """A reading of one number per KV head; undefined with fewer than `least` tokens."""
        values = values.repeat_interleave(self.call.group, 1)[..., None]
        weights = torch.where(self.count >= least, self.count, 0)[:, None, None]
        return Reading(values, weights.expand(values.shape[0], -1, -1))

    def _ungrouped(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], self.call.kv_heads, self.call.group, x.shape[3])
        return x.expand(shape).flatten(1, 2)


def selections_of(
    call: AttentionCall, token_sets: Sequence[Bool[Tensor, "#batch token"] | None]
) -> list[Selection]:
    """One call through each of several token sets, which share what does not depend on the set."""
    statistics = CallStatistics(call)
    return [Selection(call, tokens, statistics) for tokens in token_sets]


@metric("call", of_own_keys=True)
def cos_y_vself(on: Selection) -> Reading:
    return on.per_row(on.cosine)


@metric("call", of_own_keys=True, of_weights=True)
def self_part(on: Selection) -> Reading:
    return on.per_row(on.self_part)


@metric("call", of_own_keys=True, of_weights=True)
def context_part(on: Selection) -> Reading:
    return on.per_row(on.cosine - on.self_part)


@metric("call", of_own_keys=True)
def cos_y_vpartner(on: Selection) -> Reading:
    return on.per_row(*on.partner)


@metric("call", of_own_keys=True)
def excess(on: Selection) -> Reading:
    null, defined = on.partner
    return on.per_row(on.cosine - null, defined)


@metric("call", of_shares=True, of_own_keys=True)
def cos_y_vuniform(on: Selection) -> Reading:
    outside = on.call.outside
    if outside is None or not outside.any():  # the cosine is that of the mean, whatever the sum
        inner, norm = on.grouped(on.values.uniform), on.grouped(on.values.uniform_norm)
    else:
        assert on.row_sum is not None
        inner, norm = map(on.grouped, uniform_outputs(on.call, on.among, on.row_sum))
    cosine = inner * on.per_value_norm * reciprocal(norm)
    return on.per_row(cosine, on.grouped(on.call.visibility.count_among(on.among)) > 0)


@metric("call", of_own_keys=True)
def removed_energy(on: Selection) -> Reading:
    return on.per_row(on.cosine.square())


@metric("call", of_own_keys=True)
def value_similarity(on: Selection) -> Reading:
    return on.per_kv_head(on.value_similarity)


@metric("call", of_own_keys=True)
def value_similarity_partial(on: Selection) -> Reading:
    return on.per_kv_head(on.spread.partial_similarity, least=3)


@metric("call", of_own_keys=True)
def value_similarity_partial_reference(on: Selection) -> Reading:
    return on.per_kv_head(on.value_similarity / (1 + on.value_similarity))


@metric("call")
def output_similarity(on: Selection) -> Reading:
    return _pairwise_rows(on, on.values.output_total, on.values.output_norm > 0)


@metric("call", of_own_keys=True)
def exclusive_output_similarity(on: Selection) -> Reading:
    found = on.values
    return _pairwise_rows(
        on, found.exclusive_total, found.exclusive_norm > on.rounding_floor * found.output_norm
    )


@metric("call", of_own_keys=True)
def value_participation_ratio(on: Selection) -> Reading:
    reading = on.per_kv_head(on.spread.participation_ratio)
    spread = on.spread.is_spread.repeat_interleave(on.call.group, 1)[..., None]
    return reading._replace(weights=reading.weights * spread)


@metric("call", of_own_keys=True, of_weights=True)
def self_weight(on: Selection) -> Reading:
    return Reading(on.softmax.self_weight, on.rows)


@metric("call", of_shares=True, of_own_keys=True, of_weights=True)
def self_weight_ratio(on: Selection) -> Reading:
    ratio, total = on.softmax.self_weight * on.call.visibility.count, on.row_sum
    return Reading(ratio, on.rows) if total is None else Reading(ratio / total, on.rows & (total > 0))


@metric("call", of_shares=True, of_weights=True)
@metric("call", name="entropy_p15", reduce="percentile", of_shares=True, of_weights=True)
def entropy(on: Selection) -> Reading:
    return on.of_pattern(on.softmax.entropy)


@metric("call", of_shares=True, of_weights=True)
def entropy_normalized(on: Selection) -> Reading:
    # ln n; log goes through a library that may wake all threads for a few numbers
    bound = torch.xlogy(1.0, on.at(on.call.visibility.count).clamp(min=2).float())
    total = on.row_sum
    if total is None:
        return on.of_pattern(on.softmax.entropy / bound)
    total = on.at(total)
    bound = total * bound - torch.xlogy(total, total)  # s ln(n/s), that of a uniform row
    reading = on.of_pattern(on.softmax.entropy / bound)
    return reading._replace(weights=reading.weights * (bound > 0))


@metric("call", of_shares=True, of_weights=True)
def effective_keys(on: Selection) -> Reading:
    squares, total = on.softmax.sum_of_squares, on.row_sum
    if total is None:
        return on.of_pattern(1 / squares)
    reading = on.of_pattern(on.at(total).square() / squares)
    return reading._replace(weights=reading.weights * (squares > 0))


@metric("call", of_weights=True)
def first_weight(on: Selection) -> Reading:
    return Reading(on.softmax.first_weight, on.rows)


METRICS = registered("call")
"""The metrics of one attention call, by name: all that are measured by default."""


def readings_of(on: Selection, names: Sequence[str]) -> dict[str, Reading]:
    """The named metrics of one call seen through one token set."""
    defined = [name for name in names if METRICS[name].defined_for(on.call)]
    computed = {function: function(on) for function in {METRICS[name].compute: None for name in defined}}
    found = {name: computed[METRICS[name].compute] if name in defined else on.nothing for name in names}
    return without_negative(on, found, METRICS)


def without_negative(
    on: Selection, readings: Mapping[str, Reading], metrics: Mapping[str, Metric]
) -> dict[str, Reading]:
    """The readings where a pattern is given: what takes rows for shares is undefined in heads with negative
    weights.

    metrics: those of the readings, by name.
    """
    shares = [name for name in readings if metrics[name].of_shares]
    if on.call.pattern is None or not shares:
        return dict(readings)
    negative = on.softmax.negative
    assert negative is not None
    if not negative.any():
        return dict(readings)
    undefined = {
        name: readings[name]._replace(weights=readings[name].weights * ~negative[..., None])
        for name in shares
    }
    return dict(readings) | undefined


def per_input(
    call: AttentionCall,
    names: Sequence[str] | None = None,
    tokens: Bool[Tensor, "#batch token"] | None = None,
) -> dict[str, Float64[Tensor, "batch head"]]:
    """The named metrics (all if None) of one call, one number per row of its batch and query head."""
    names = list(METRICS) if names is None else names
    found = readings_of(Selection(call, tokens), names)
    return {name: reduce([found[name]], call.batch, METRICS[name].reduce) for name in names}


def _pairwise_rows(
    on: Selection, total: Float[Tensor, "batch head dim"], directed: Bool[Tensor, "batch head token"]
) -> Reading:
    """Mean cosine of the rows that count, from the sum of their unit vectors; directed: which have any."""
    count = on.rows.sum(-1)  # [batch or 1, head or 1]
    mean = mean_pairwise(total, (on.rows & directed).sum(-1), count)
    return Reading(mean[..., None], torch.where(count > 1, count, 0)[..., None])

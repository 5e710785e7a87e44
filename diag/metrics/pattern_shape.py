"""The shape of attention: where it goes, how far, and whether all queries look alike. Optional metrics.

Functions from one call and a token set to numbers, as in `default`, here by way of a `View`. All of them
read one pass over blocks of query rows (`diag.metrics.pattern_pass`), so they cost more than the default
metrics, which need single keys only. Groups are asked for together.

Which tokens count is as in `diag.metrics.default`: a row of the token set S counts if it sees another key
than itself. Attention runs over all keys.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from diag.attention.positions import TEXT, Geometry
from diag.metrics import names as known
from diag.metrics.default import Selection, without_negative
from diag.metrics.pattern_pass import Neighbour, key_places, norms_of, overlap, pattern_pass, uniform
from diag.metrics.readings import Reading
from diag.metrics.registry import metric, registered

SINK = 0.3
"""ε of the sink rate (Gu 2024, section 3: ε = 0.3, with sequences of T = 64 tokens)."""

TOP_KEYS = 10
"""How many most attended keys two layers are compared on."""

DECADES = 6.0
"""Where `sink_strength` ends: a head whose median key receives nothing is no stronger than this."""


@dataclass(frozen=True, eq=False)
class View:
    """One call through one token set, with what the pass over its blocks found.

    found, uniform: what `pattern_pass` and `uniform` give, `received` of this set only.
        With sampled rows they hold those, but `own` and `first` all rows.
    norms: ‖f(v_j)‖ of each key, `[batch, head, token]`. top_before: of the neighbouring layer.
    """

    on: Selection
    geometry: Geometry
    found: dict[str, Tensor]
    uniform: dict[str, Tensor]
    norms: Tensor | None
    top_before: Tensor | None

    @property
    def count(self) -> Float[Tensor, "batch head"]:
        """Number of rows that count."""
        return self.on.rows.expand(self.on.call.output.shape[:3]).sum(-1).double()

    @property
    def placed(self) -> Bool[Tensor, "#batch #head token"]:
        """Rows that count, have a place and see a key that has one."""
        call, device = self.on.call, self.on.among.device
        place = torch.arange(call.tokens, device=device) >= self.geometry.prefix
        of_keys = torch.arange(call.keys, device=device) >= key_places(call, self.geometry).prefix
        return self.on.rows & place & (call.visibility.count_among(of_keys[None]) > 0)

    def per_row(
        self, values: Tensor | None, rows: Tensor | None = None, also: Tensor | None = None
    ) -> Reading:
        """A reading of numbers per row of the pass, on the rows that count; undefined where there are none.

        rows: those that count, `[batch or 1, head or 1, token]`. also: among the rows of the pass.
        """
        call = self.on.call
        if values is None:
            return self.on.nothing
        reading = self.on.of_pattern(values.expand(call.batch, call.heads, -1), rows)
        return reading if also is None else reading._replace(weights=reading.weights * also)

    def per_head(self, values: Float[Tensor, "batch head"], defined: Tensor) -> Reading:
        """A reading of one number per head of a call, which weighs as much as it has rows."""
        return Reading(values[..., None], torch.where(defined, self.count, 0.0)[..., None])

    @property
    def received(self) -> Float[Tensor, "batch head token"]:
        """Share of all attention of the rows that each key of S receives; sorts as float64."""
        share = self.found["received"].double() / self.count[..., None].clamp(min=1)
        return share * self.on.keys[:, None, :]

    @property
    def several(self) -> Bool[Tensor, "batch head"]:
        """Whether there are rows to receive from and at least two keys in S."""
        return (self.count > 0) & (self.on.keys.sum(-1) > 1)[:, None]


# --- sinks


@metric("pattern", needs=("first",))
def first_key_received(view: View) -> Reading:
    sees = view.on.among[:, None, :] & (view.on.call.visibility.count > 0)
    return Reading(view.found["first"], sees)


@metric("pattern", needs=("first",), of_shares=True)
def sink_rate(view: View) -> Reading:
    values, rows = first_key_received(view)[:2]
    rows = rows.expand(values.shape)
    count = rows.sum(-1)
    alpha = torch.where(rows, values, 0.0).double().sum(-1) / count.clamp(min=1)
    above = torch.where(alpha.isnan(), torch.nan, (alpha > SINK).double())
    return Reading(above[..., None], count[..., None])


@metric("pattern", needs=("received",), of_shares=True)
def sink_share(view: View) -> Reading:
    return view.per_head(view.received.amax(-1), view.several)


@metric("pattern", needs=("received",), of_shares=True)
def sink_strength(view: View) -> Reading:
    received = view.received
    largest = received.amax(-1)
    median = torch.maximum(_median(received, view.on.keys[:, None]), largest * 10**-DECADES)
    return view.per_head((largest / median).log10(), view.several & (largest != 0))


@metric("pattern", needs=("received",), of_shares=True)
def received_gini(view: View) -> Reading:
    ordered = view.received.sort(-1).values
    tokens, keys = ordered.shape[-1], view.on.keys.sum(-1)[:, None]
    # keys outside S hold zeros and come first: ranks are counted from the end
    rank = torch.arange(1, tokens + 1, device=ordered.device, dtype=ordered.dtype) - tokens + keys[..., None]
    total = ordered.sum(-1)
    gini = ((2 * rank - keys[..., None] - 1) * ordered).sum(-1) / (keys.clamp(min=1) * total)
    return view.per_head(gini, view.several & (total != 0))


@metric("pattern", needs=("received",), of_shares=True)
def sink_value_norm(view: View) -> Reading:
    norms = view.on.value_norm[:, :, 0].repeat_interleave(view.on.call.group, 1).double()
    largest, place = view.received.max(-1, keepdim=True)
    sink = norms.gather(-1, place)[..., 0]
    median = _median(norms, view.on.keys[:, None])
    return view.per_head(sink / median, view.several & (median != 0) & (largest[..., 0] != 0))


# --- distance


@metric("pattern", needs=("distance",), of_shares=True)
def attention_distance(view: View) -> Reading:
    return view.per_row(view.found.get("distance"), view.placed, _mass(view))


@metric("pattern", needs=("distance",), of_shares=True)
def attention_distance_rms(view: View) -> Reading:
    squares = view.found.get("distance_square")
    return view.per_row(None if squares is None else squares.sqrt(), view.placed, _mass(view))


@metric("pattern", needs=("uniform distance",), of_shares=True)
def attention_distance_uniform(view: View) -> Reading:
    return view.per_row(view.uniform.get("distance"), view.placed)


@metric("pattern", needs=("distance", "uniform distance"), of_shares=True)
def attention_distance_ratio(view: View) -> Reading:
    if "distance" not in view.found:
        return view.per_row(None)
    reference = view.uniform["distance"]
    ratio = view.found["distance"] / torch.where(reference == 0, 1.0, reference)
    return view.per_row(ratio, view.placed, (view.found["placed"] != 0) & (reference != 0))


# --- all queries alike?


@metric("pattern", needs=("received", "entropy"), of_shares=True)
def attention_nmi(view: View) -> Reading:
    of_row = torch.where(view.on.rows, view.found["entropy"], 0.0).double()
    sums, count = view.on.row_sum, view.count
    total, of_queries = count, count.clamp(min=2).log()  # Σ A and H(q) where every row sums to 1
    if sums is not None:
        sums = torch.where(view.on.rows, sums, 0.0).double()
        total = sums.sum(-1)
        of_queries = _entropy(sums / total[..., None].where(total[..., None] > 0, 1.0))
    some = total.where(total > 0, 1.0)
    of_keys = _entropy(view.found["received"].double() / some[..., None])
    of_both = of_row.sum(-1) / some + some.log()
    scale = (of_queries * of_keys).sqrt()
    # one key takes all: every query sees the same map, and 0/0 is 0. What is left below is rounding
    found = torch.where(of_keys <= 1e-6, of_keys * 0, (of_queries + of_keys - of_both) / scale)
    return view.per_head(found.clamp(min=0), (count > 1) & (total > 0))


def _entropy(shares: Float64[Tensor, "batch head token"]) -> Float64[Tensor, "batch head"]:
    return -torch.xlogy(shares, shares).sum(-1)


# --- neighbouring layers


@metric("pattern", needs=("top",), of_shares=True)
def top_key_overlap(view: View) -> Reading:
    if view.top_before is None:
        return view.per_row(None)
    top = view.found["top"]
    return view.per_row(overlap(view.top_before, top, top.shape[-1]), _with_choice(view))


@metric("pattern", needs=("top",), of_shares=True)
def top_key_overlap_chance(view: View) -> Reading:
    if view.top_before is None:
        return view.per_row(None)
    top = view.found["top"].shape[-1]
    return view.per_row(top / view.on.at(view.on.call.visibility.count).clamp(min=1), _with_choice(view))


# --- relative position


@metric("pattern", needs=("previous",), of_own_keys=True)
def previous_weight(view: View) -> Reading:
    line = view.geometry.grid(view.on.call.tokens)
    if line is None or line[0] != 1:
        return view.per_row(None)
    keys = view.on.call.visibility.keys
    before = torch.ones_like(view.on.among) if keys is None else keys.roll(1, -1)  # that one is no padding
    after = torch.arange(view.on.call.tokens, device=before.device) > view.geometry.prefix
    return view.per_row(view.found["previous"], view.on.rows & (before & after)[:, None])


@metric("pattern", needs=("near",), of_own_keys=True)
def near_share(view: View) -> Reading:
    return view.per_row(view.found.get("near"), view.placed)


@metric("pattern", needs=("uniform near",), of_shares=True, of_own_keys=True)
def near_share_uniform(view: View) -> Reading:
    near, sums = view.uniform.get("near"), view.on.row_sum
    return view.per_row(near if near is None or sums is None else near * view.on.at(sums), view.placed)


@metric("pattern", needs=("prefix",), of_own_keys=True)
def prefix_share(view: View) -> Reading:
    return view.per_row(view.found["prefix"] if view.geometry.prefix else None)


# --- the whole of a row


@metric("pattern", needs=("sum",))
def row_sum(view: View) -> Reading:
    return view.per_row(view.found["sum"])


# --- norm-weighted attention


@metric("pattern", needs=("own", "norms"), of_shares=True, of_own_keys=True)
def norm_weighted_self(view: View) -> Reading:
    assert view.norms is not None
    return _norm_share(view, view.on.at(view.found["own"] * view.norms))


@metric("pattern", needs=("first", "norms"), of_shares=True)
def norm_weighted_first(view: View) -> Reading:
    assert view.norms is not None
    keys = view.on.call.visibility.keys
    norms = view.norms
    if keys is not None:  # the first key is the first that anyone sees
        first = keys.int().argmax(-1).expand(norms.shape[0])[:, None, None]
        norms = norms.gather(-1, first.expand(-1, norms.shape[1], 1))
    return _norm_share(view, view.on.at(view.found["first"] * norms[..., :1]))


@metric("pattern", needs=("norms",), of_shares=True)
def norm_weighted_entropy(view: View) -> Reading:
    return view.per_row(view.found["norm_entropy"], also=view.found["norm_total"] != 0)


# --- the table

SHAPE_METRICS = registered("pattern")
"""The metrics of the shape of attention, by name."""

GROUPS = {group: names for group, names in known.GROUPS.items() if SHAPE_METRICS.keys() & {*names}}
"""Name of a group -> its metrics."""


def shape_readings(
    selections: Sequence[Selection],
    names: Sequence[str],
    *,
    geometry: Geometry = TEXT,
    neighbour: Neighbour | None = None,
    projection: Float[Tensor, "head value_dim width"] | None = None,
    top_keys: int = TOP_KEYS,
) -> list[dict[str, Reading]]:
    """The named shape metrics of one call, for each token set, from one pass over its blocks.

    selections: the call through each token set, as `selections_of` gives them. geometry: where tokens lie.
    neighbour: of this forward pass; without it there is no overlap with another layer.
    projection: W_O of each query head, so that f(v) = v W_O as in Kobayashi 2020; f(v) = v without it.

    Where the call has a sample of rows, what is a mean over query rows is estimated from it; what a key
    receives is a sum over all rows, and is summed up over all of them.
    """
    call, statistics = selections[0].call, selections[0].statistics
    defined = [name for name in names if SHAPE_METRICS[name].defined_for(call)]
    if len(defined) < len(names):
        neighbour = neighbour if any("top" in SHAPE_METRICS[name].needs for name in defined) else None
        found_of = shape_readings(
            selections,
            defined,
            geometry=geometry,
            neighbour=neighbour,
            projection=projection,
            top_keys=top_keys,
        )
        return [
            {name: one.get(name, on.nothing) for name in names}
            for on, one in zip(selections, found_of, strict=True)
        ]
    if not call.has_pattern:
        return [{} for _ in selections]
    summed = [name for name in names if "received" in SHAPE_METRICS[name].needs]
    if call.sample is not None and summed:
        of_all = statistics.of_all_rows()
        whole = shape_readings([on.of_all_rows(of_all) for on in selections], summed, geometry=geometry)
        others = shape_readings(
            selections,
            [name for name in names if name not in summed],
            geometry=geometry,
            neighbour=neighbour,
            projection=projection,
            top_keys=top_keys,
        )
        return [one | other for one, other in zip(whole, others, strict=True)]
    needs = {need for name in names for need in SHAPE_METRICS[name].needs}
    if neighbour is None:
        needs -= {"top"}
    norms = norms_of(call, projection) if "norms" in needs else None
    references = {need for need in needs if need.startswith("uniform ")}
    streamed = needs - references
    found: dict[str, Tensor] = {}
    of_single_keys = {"own": "self_weight", "first": "first_weight"}
    if call.sample is not None:
        # these need the log-normaliser only: they stay exact
        known = streamed & of_single_keys.keys()
        found = {need: getattr(statistics.softmax, of_single_keys[need]) for need in known}
        streamed -= found.keys()
    if streamed:
        among = functools.reduce(torch.logical_or, (on.among for on in selections))
        live = selections[0].at(among[:, None, :] & (call.visibility.count > 0))
        rows = [on.rows for on in selections]
        found |= pattern_pass(statistics, streamed, rows, live, geometry=geometry, norms=norms, top=top_keys)
    of_uniform = uniform(call, geometry, {need.removeprefix("uniform ") for need in references})
    before = neighbour.before(call, found["top"]) if neighbour is not None and "top" in found else None
    results = []
    for number, on in enumerate(selections):
        own = {name: x[number] if name == "received" else x for name, x in found.items()}
        view = View(on, geometry, own, of_uniform, norms, before)
        readings = {name: SHAPE_METRICS[name].compute(view) for name in names}
        results.append(without_negative(on, readings, SHAPE_METRICS))
    return results


def _mass(view: View) -> Tensor | None:
    """Whether each row of the pass has weight on keys that have a place."""
    return view.found["placed"] != 0 if "placed" in view.found else None


def _with_choice(view: View) -> Tensor:
    """Rows that count and see more keys than the top ones."""
    return view.on.rows & (view.on.call.visibility.count > view.found["top"].shape[-1])


def _norm_share(view: View, weighted: Tensor) -> Reading:
    total = view.found["norm_total"]
    return view.per_row(weighted / torch.where(total == 0, 1.0, total), also=total != 0)


def _median(values: Float[Tensor, "batch head token"], among: Tensor) -> Float[Tensor, "batch head"]:
    """Of the values that are among; the mean of the middle two where their number is even.

    NaN if one of them is not finite: sorted away, it would not be found.
    """
    among = among.expand(values.shape)
    ordered = torch.where(among, values, torch.inf).sort(-1).values
    last = (among.sum(-1, keepdim=True) - 1).clamp(min=0)
    low, high = ordered.gather(-1, last // 2), ordered.gather(-1, (last + 1) // 2)
    finite = torch.where(among, values, 0.0).isfinite().all(-1)
    return torch.where(finite, ((low + high) / 2)[..., 0], torch.nan)

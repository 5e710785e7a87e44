"""Sinks of a vision tower followed into its language model: what the tokens that carry them get. Optional.

A carrier is an image token of the language model whose patch is the sink of an event (`sink_events`) in any
head and layer of the vision tower that its token comes through. Beside the carriers stand the other image
tokens, and as many of these as there are carriers, drawn at random. Numbers are per token of a class C:
`mean_{j∈C} A_ij` and `mean_{j∈C} A_ij (v_j·y_i)/‖y_i‖²`; rows are those that see every image token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diag.attention.value_statistics import reciprocal
from diag.metrics.catalogue import FOLLOWED_CLASSES
from diag.metrics.default import Selection, without_negative
from diag.metrics.ledger import class_sums
from diag.metrics.readings import Reading
from diag.metrics.registry import metric, registered
from diag.metrics.sink_events import sink_readings

Classes = Mapping[str, Bool[Tensor, "batch token"]]
"""Class of `FOLLOWED_CLASSES` -> which tokens are of it."""

MASS, OUTPUT = 2, 0
"""Places of the weights, and of the products with y, in what `class_sums` gives."""

ROWS = 512
"""Query rows that are looked at together, to tell which of them see every image token."""


@dataclass(frozen=True, eq=False)
class Followed:
    """One call through one token set. sums: of `class_sums`. events: `sink_event` and `sink_index`."""

    on: Selection
    classes: Classes
    rows: Bool[
        Tensor,
        (
            batch  # head token
        ),
    ]
    sums: Mapping[str, Float[Tensor, "3 batch head token"]]
    events: Mapping[str, Reading]

    def _per_token(self, values: Tensor, name: str) -> Reading:
        count = self.classes[name].sum(-1)[:, None, None]
        return Reading(values / count.clamp(min=1), self.rows & (count > 0))

    def attention(self, name: str) -> Reading:
        """What a row gives to a token of a class, in the mean over these."""
        return self._per_token(self.sums[name][MASS], name)

    def output(self, name: str) -> Reading:
        """The share of y that a token of a class has, in the mean over these; undefined where y is zero."""
        scale = reciprocal(self.on.values.output_norm).square()
        reading = self._per_token(self.sums[name][OUTPUT] * scale, name)
        return reading._replace(weights=reading.weights & (scale > 0))

    def sink_is(self, name: str) -> Reading:
        """Whether a head has an event whose sink is of a class; undefined where the class is empty."""
        event, place = self.events["sink_event"], self.events["sink_index"]
        of_class = self.classes[name][:, None].expand(-1, place.values.shape[1], -1)
        hit = of_class.gather(-1, place.values.long()) & (place.weights > 0)
        there = self.classes[name].any(-1)[:, None, None]
        return Reading(hit.to(event.values.dtype), event.weights * there)

    def number(self) -> Reading:
        """How many carriers an input has: of every head the same."""
        event = self.events["sink_event"]
        count = self.classes["carriers"].sum(-1).to(event.values.dtype)
        return Reading(count[:, None, None].expand_as(event.values), event.weights)


for _name in FOLLOWED_CLASSES:
    for _prefix, _compute in (
        ("attention_to", Followed.attention),
        ("given_by", Followed.output),
        ("sink_among", Followed.sink_is),
    ):
        _of_shares = _prefix == "sink_among"
        metric(
            "followed", name=f"{_prefix}_{_name}", of_shares=_of_shares, of_own_keys=True, of_weights=True
        )(partial(_compute, name=_name))
metric("followed", name="carriers", of_shares=True, of_own_keys=True, of_weights=True)(Followed.number)

FOLLOWED_METRICS = registered("followed")
"""The metrics of followed sinks, by name."""


def followed_readings(
    selections: Sequence[Selection], names: Sequence[str], classes: Classes | None
) -> list[dict[str, Reading]]:
    """The named metrics of one call of a language model, for each token set; all rows are read.

    selections: the call through each token set, as `selections_of` gives them. classes: None where no sinks
    are followed into this tower.
    """
    call = selections[0].call
    defined = [name for name in names if FOLLOWED_METRICS[name].defined_for(call)]
    if classes is None or not defined:
        return [dict.fromkeys(names, on.nothing) for on in selections]
    if call.sample is not None:
        whole = selections[0].statistics.of_all_rows()
        selections = [on.of_all_rows(whole) for on in selections]
    classes = {name: mask.to(call.output.device) for name, mask in classes.items()}
    statistics = selections[0].statistics
    sums = class_sums(statistics, classes, mass=True)
    behind = _behind(selections[0], classes["carriers"] | classes["other_image"])
    events: Sequence[Mapping[str, Reading]]
    events = (
        sink_readings(selections, ("sink_event", "sink_index")) if not call.maps else [{}] * len(selections)
    )
    found = []
    for on, of_sinks in zip(selections, events, strict=True):
        view = Followed(on, classes, on.rows & behind, sums, of_sinks)
        readings = {name: FOLLOWED_METRICS[name].compute(view) for name in defined}
        readings = without_negative(on, readings, FOLLOWED_METRICS)
        found.append({name: readings.get(name, on.nothing) for name in names})
    return found


def _behind(
    on: Selection, image: Bool[Tensor, "batch token"]
) -> Bool[
    Tensor,
    (
        batch  # head token
    ),
]:
    """Which rows see every image token."""
    call, number = on.call, image.sum(-1)[:, None, None]
    parts = []
    for rows in torch.arange(call.tokens, device=image.device).split(ROWS):
        seen = call.visibility.of_rows(rows) & image[:, None, None]
        parts.append(seen.sum(-1) == number)
    return torch.cat(parts, -1)

"""What one forward pass leaves behind: readings of every layer, then read off the device at once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.positions import TEXT
from diag.attention.sampling import RowSampling, sample_rows
from diag.attention.states import BlockStates
from diag.errors import MeasurementError, NotFinite
from diag.measure.edited_model import geometry_of, given_in_line
from diag.measure.next_inputs import NextInputs
from diag.measure.output_projections import OutputProjections
from diag.measure.reconstruction import NOT_FINITE, refuse_non_finite
from diag.measure.token_values import Part, TokenValues, parts_of
from diag.metrics.catalogue import SAMPLING_ERROR
from diag.metrics.default import METRICS, Selection, readings_of, selections_of
from diag.metrics.divergence import DIVERGENCE_METRICS, divergence_readings
from diag.metrics.followed import FOLLOWED_METRICS, followed_readings
from diag.metrics.ledger import FEW, LEDGER_METRICS, MANY, ledger_readings
from diag.metrics.nulls import NULL_METRICS, null_readings
from diag.metrics.pattern_pass import Neighbour
from diag.metrics.pattern_shape import SHAPE_METRICS, shape_readings
from diag.metrics.readings import Reading, condensed, reduce, sampling_error
from diag.metrics.sink_events import OF_PROJECTION, SINK_METRICS, sink_readings
from diag.metrics.stream import StreamReadings
from diag.models.base import Batch, Tower
from diag.models.hooks.block_parts import Block
from diag.models.hooks.interventions import Edit
from diag.models.hooks.layers import Layer
from diag.models.hooks.residual import check_states, projection_error, tolerance
from diag.models.hooks.seam import other_windows
from diag.results.layer_values import LayerFacts, LayerValues

OF_HEADS = METRICS | SHAPE_METRICS | SINK_METRICS | DIVERGENCE_METRICS | LEDGER_METRICS | NULL_METRICS
OF_HEADS |= FOLLOWED_METRICS
"""Every metric of an attention call; by default only those of `METRICS` are measured."""

FEW_KEYS = 64
"""Rows that see no more keys than this are a kind of their own when rows are sampled."""


@dataclass
class Incidents:
    """What happened beside the numbers; filled while the loop runs.

    failed: inputs that could not be read or measured, by id, and why. skipped_layers: layers that do not
        attend to their own tokens, by path, and why. unprojected: layers whose output projection is not
        understood, so that what needs it is undefined there; of stream metrics. sinks_unprojected: the same
        of what sinks do, and where a gate or norm comes between heads and projection. tokens: where numbers
        of single tokens are kept; nowhere if None.
    """

    failed: dict[str, str] = field(default_factory=dict)
    skipped_layers: dict[str, str] = field(default_factory=dict)
    unprojected: list[str] = field(default_factory=list)
    sinks_unprojected: list[str] = field(default_factory=list)
    tokens: TokenValues | None = None


class BatchReadings:
    """Readings of one forward pass, by layer, until every call of a layer has been seen.

    neutral: outputs of the same inputs with a neutral image, by layer in the order of its calls; for
        divergence metrics.
    projections: W_O of the layers, for what their sinks do.
    following: where the next input of each one is, for the null across inputs.
    carrying: which image tokens carry sinks of the vision tower, and which do not; for followed sinks.
    per_token: whether numbers of single tokens are kept as well, in `each`.
    """

    def __init__(
        self,
        names: Sequence[str],
        sets: Sequence[str],
        tower: Tower,
        batch: Batch,
        sampling: RowSampling,
        neutral: Mapping[int, list[Tensor]] | None = None,
        projections: OutputProjections | None = None,
        following: NextInputs | None = None,
        carrying: Mapping[str, Tensor] | None = None,
        per_token: bool = False,
    ) -> None:
        self.names, self.sets, self.tower, self.batch = names, sets, tower, batch
        self.sampling = sampling
        self.plain = [name for name in names if name in METRICS]
        self.shape = [name for name in names if name in SHAPE_METRICS]
        self.sinks = [name for name in names if name in SINK_METRICS]
        self.projections = projections or OutputProjections(())
        self.unprojected = set[int]()
        self.diverging = [name for name in names if name in DIVERGENCE_METRICS]
        self.ledger = [name for name in names if name in LEDGER_METRICS]
        receiving = any("received" in SHAPE_METRICS[name].needs for name in self.shape)
        of_rows = any(METRICS[name].of_weights for name in self.plain)
        self.in_one_sweep = bool(self.ledger) or ((receiving or bool(self.sinks)) and of_rows)
        self.nulls = [name for name in names if name in NULL_METRICS]
        self.followed = [name for name in names if name in FOLLOWED_METRICS]
        self.carrying = carrying
        self.neutral = neutral or {}
        self.following = following
        self.neighbour = Neighbour(len(batch.ids))
        self.readings: dict[int, dict[str, list[dict[str, Reading]]]] = {}
        self.masks: dict[tuple[str, int, int, torch.device], Tensor] = {}
        self.sizes: dict[int, list[int]] = {}
        self.per_token, self.each = per_token, list[Part]()
        self.padded = {
            layer.index: [x for x in layer.form.padding if x is not None]
            for layer in batch.layers(tower.layers)
        }

    def add(self, call: AttentionCall) -> None:
        inputs = len(self.batch.ids)
        if call.batch % inputs:
            raise MeasurementError(
                f"layer '{call.module}' ran {call.batch} rows for {inputs} inputs: whose they are is unclear",
                "try --batch-size 1",
            )
        padded, windows = self.padded.get(call.layer), call.batch // inputs
        if padded and call.padding is not None and all(len(known) != windows for known in padded):
            raise other_windows(call.module, padded[0], windows, call.tokens)
        self.sizes.setdefault(call.layer, []).append(call.tokens)
        of_layer = self.readings.setdefault(call.layer, {name: [] for name in self.sets})
        masks = [self.tokens(token_set, call) for token_set in self.sets]
        selections = selections_of(self.sampled(call, masks), masks)
        if self.in_one_sweep:
            selections[0].statistics.givers = [on.rows for on in selections]
        found = [readings_of(on, self.plain) for on in selections]
        for more in self.optional(call, selections, masks):
            found = [known | others for known, others in zip(found, more, strict=True)]
        for token_set, part in zip(self.sets, found, strict=True):
            if self.per_token:
                first = sum(self.sizes[call.layer][:-1]) * windows
                self.each += parts_of(call, token_set, part, inputs, first)
            of_layer[token_set].append(
                {name: condensed(one, inputs, OF_HEADS[name].reduce) for name, one in part.items()}
            )

    def optional(
        self, call: AttentionCall, selections: Sequence[Selection], masks: Sequence[Tensor]
    ) -> Iterator[list[dict[str, Reading]]]:
        """Yields what each optional group says of a call, for each token set; nothing of groups not asked."""
        placed = self.shape or self.sinks or self.ledger or self.nulls
        geometry = geometry_of(self.tower, self.batch, call) if placed else TEXT
        if self.shape:
            yield shape_readings(selections, self.shape, geometry=geometry, neighbour=self.neighbour)
        if self.sinks:
            roots, kinds = self.projections.of(call), self.sink_kinds(call)
            if roots is None:
                self.unprojected.add(call.layer)
            yield sink_readings(selections, self.sinks, roots=roots, kinds=kinds, geometry=geometry)
        if self.ledger:
            yield ledger_readings(selections, self.ledger, geometry=geometry, kinds=self.kinds(call))
        if self.diverging:
            other = self.neutral[call.layer].pop(0)
            yield [divergence_readings(on, other, self.diverging) for on in selections]
        if self.followed:
            yield followed_readings(selections, self.followed, self.carrying)
        if self.nulls:
            others = [None] * len(masks) if self.following is None else self.following.of(call, masks)
            yield [
                null_readings(on, self.nulls, geometry=geometry, other=one)
                for on, one in zip(selections, others, strict=True)
            ]

    def sampled(self, call: AttentionCall, masks: Sequence[Tensor]) -> AttentionCall:
        """The call with the query rows that stand for all of them, where its sequence is long.

        The rows follow from the input's id: they do not depend on batches, and are the same in every
        layer. Where heads differ in which rows count, all rows are computed.
        """
        whole = call.query is None or call.pattern is not None or not call.own_keys
        if whole or not self.sampling.applies(call.tokens):
            return call
        seen = call.visibility
        counts = seen.count > 1
        if counts.shape[1] > 1 and bool((counts != counts[:, :1]).any()):
            return call
        real = counts[:, 0] if seen.keys is None else counts[:, 0] & seen.keys
        # rows that see few keys are like no others, and a prefix would be missed in a set of all tokens
        token = torch.arange(call.tokens, device=real.device)
        alone = (token < len(self.tower.prefix)) | (token >= call.tokens - len(self.tower.suffix))
        alone = alone | (seen.count[:, 0] <= FEW_KEYS)
        sets = [mask & real for mask in masks]
        sets.append(torch.stack(torch.broadcast_tensors(*sets)).any(0) & alone)
        windows = range(call.batch // len(self.batch.ids))
        place = len(self.sizes[call.layer])
        keys = [f"{name}/{place}/{window}" for name in self.batch.ids for window in windows]
        return replace(call, sample=sample_rows(sets, keys, self.sampling))

    def kinds(self, call: AttentionCall) -> dict[str, Tensor]:
        """Which tokens of a call are of the classes that have names: beside patches, or of image and text."""
        marked = {name: self.tokens(name, call) for name in MANY if name in self.tower.marks}
        if marked or "patch" not in self.tower.token_sets:
            return marked
        windows = call.batch // len(self.batch.ids)
        patches, *beside = (
            self.tower.tokens_in(name, call.tokens, windows)[None].to(call.output.device)
            for name in ("patch", *(name for name in FEW if name in self.tower.token_sets))
        )
        known = [name for name in FEW if name in self.tower.token_sets]
        found = dict(zip(known, beside, strict=True))
        others = ~patches & ~torch.stack([patches, *beside]).any(0)
        return {name: mask for name, mask in (found | {FEW[-1]: others}).items() if bool(mask.any())}

    def sink_kinds(self, call: AttentionCall) -> dict[str, Tensor]:
        """Which keys are of which kind (`diag.metrics.sink_events.KINDS`); empty where that is not known."""
        if not call.own_keys:
            return {}
        named = self.kinds(call)
        if self.tower.marks:
            return named
        every = self.tokens("all", call)
        if self.tower.name != "vision":
            of_text = self.tower.input_kind == "text" or given_in_line(self.batch, call.tokens, ids=True)
            return {"text": every} if of_text else {}
        if "patch" not in self.tower.token_sets:
            return {}
        beside = functools.reduce(torch.logical_or, named.values(), torch.zeros_like(every))
        cls = named.get("cls", torch.zeros_like(every))
        return {"image": every & ~beside, "cls": cls, "registers": beside & ~cls}

    def sized(self, layer: Layer, facts: LayerFacts) -> LayerFacts:
        """A layer's facts with the sizes of this batch: images of native resolution differ."""
        sizes = self.sizes[layer.index]
        scope = "window" if len(sizes) > 1 else facts.attn_scope
        return replace(facts, n_tokens=max(sizes), attn_scope=scope)

    def tokens(self, token_set: str, of: AttentionCall | BlockStates) -> Tensor:
        """The token set's mask `[batch or 1, token]`, without padding."""
        device = of.output.device if isinstance(of, AttentionCall) else of.before.device
        place = (token_set, of.tokens, of.batch, device)
        if place not in self.masks:
            mask, real = self.marked(token_set, of), self.batch.real
            if real is not None and real.shape == (of.batch, of.tokens):
                mask = mask & real.cpu()
            self.masks[place] = mask.to(device)
        padding = of.padding if isinstance(of, AttentionCall) else None
        return self.masks[place] if padding is None else self.masks[place] & ~padding

    def marked(self, token_set: str, of: AttentionCall | BlockStates) -> Tensor:
        """The token set's mask `[batch or 1, token]` on the CPU, from the batch or by position."""
        if token_set not in self.batch.sets:
            return self.tower.tokens_in(token_set, of.tokens, of.batch // len(self.batch.ids))[None]
        mask = self.batch.sets[token_set].cpu()
        if mask.shape != (of.batch, of.tokens):
            raise MeasurementError(
                f"a layer sees {of.batch} × {of.tokens} tokens where {tuple(mask.shape)} were given: "
                f"which of them are '{token_set}' is unclear",
                "measure --tokens all",
            )
        return mask

    def blocks(self, layers: Sequence[Layer]) -> Iterator[tuple[Layer, tuple[str, ...], Tensor]]:
        """Each layer with its metrics and their `[token set, metric, input, head]`, on the device.

        Where rows were sampled, the standard error that comes from it follows as a metric of its own.
        """
        inputs = len(self.batch.ids)
        for layer in layers:
            of_layer = self.readings.pop(layer.index)
            if layer.index in self.unprojected:
                for part in itertools.chain.from_iterable(of_layer.values()):
                    part |= {name: _undefined(part[name]) for name in OF_PROJECTION if name in part}
            parts = {
                (token_set, name): [part[name] for part in of_layer[token_set]]
                for token_set in self.sets
                for name in self.names
            }
            estimated = {name for (_, name), of in parts.items() for part in of if part.variance is not None}
            sampled = [name for name in self.names if name in estimated]
            rows = [
                summed(parts[token_set, name], inputs, OF_HEADS[name].reduce)
                for token_set in self.sets
                for summed, chosen in ((reduce, self.names), (sampling_error, sampled))
                for name in chosen
            ]
            names = (*self.names, *(name + SAMPLING_ERROR for name in sampled))
            yield layer, names, torch.stack(rows).view(len(self.sets), len(names), inputs, rows[0].shape[-1])


def _undefined(reading: Reading) -> Reading:
    return reading._replace(weights=torch.zeros_like(reading.weights))


class BatchStreamReadings:
    """Stream metrics of one forward pass: a layer's calls are kept until its block has finished.

    of_heads: the readings of the same pass. gated: whether it is the first one, and is checked.
    """

    def __init__(
        self,
        names: Sequence[str],
        of_heads: BatchReadings,
        blocks: Sequence[Block],
        edits: Sequence[Edit],
        incidents: Incidents,
        gated: bool,
    ) -> None:
        self.names, self.of_heads, self.incidents, self.gated = tuple(names), of_heads, incidents, gated
        on_branch = [edit for edit in edits if edit.where == "attention branch"]
        self.changed = {block.index for block in blocks if any(edit.at(block.index) for edit in on_branch)}
        self.known = {block.index: block for block in blocks}
        self.readings = StreamReadings(names, of_heads.tower.depth)
        self.calls: dict[int, list[tuple[AttentionCall, AttentionCall]]] = {}

    def add(self, states: BlockStates) -> None:
        here = states.after.device  # of a model over several GPUs, what enters a block may lie on another
        states = replace(states, before=states.before.to(here), middle=states.middle.to(here))
        if self.gated:
            refuse_non_finite(states.after, self.of_heads.batch, states.path)
        calls = self.calls.pop(states.layer, [])
        if len(calls) == 1:
            call, used = calls[0]
            if self.gated and call.batch == states.batch and states.layer not in self.changed:
                error = projection_error(self.known[states.layer], replace(states, call=call))
                known = states.path in self.incidents.unprojected  # from before the batch was run again
                if not error < tolerance(states.after.dtype) and not known:
                    self.incidents.unprojected.append(states.path)
            states = replace(states, call=used)
        if self.gated:
            check_states(self.known[states.layer], states)
        if states.path in self.incidents.unprojected:
            states = replace(states, to_stream=None)
        sets = self.of_heads.sets
        self.readings.add(states, {name: self.of_heads.tokens(name, states) for name in sets})

    def blocks(self, layers: Sequence[Layer]) -> Iterator[tuple[Layer, tuple[str, ...], Tensor]]:
        """Each layer with its metrics and their `[token set, metric, input, 1]`, on the device."""
        self.readings.finished()
        inputs = len(self.of_heads.batch.ids)
        for layer in layers:
            if layer.index in self.readings.readings:
                yield layer, self.names, self.readings.block(layer.index, inputs)


def layer_values(
    of_heads: BatchReadings,
    of_stream: BatchStreamReadings | None,
    layers: Sequence[Layer],
    facts: Mapping[int, LayerFacts],
    first_input: int,
) -> list[LayerValues]:
    """All that was read of one forward pass, its numbers on the CPU; each device is read once.

    facts: of the layers, by depth index. first_input: the number of the pass's first input.
    Raises NotFinite, naming the layer, the metric and the inputs, for numbers that are infinite.
    """
    found = [(True, *block) for block in of_heads.blocks(layers if of_heads.names else ())]
    if of_stream is not None:
        found += [(False, *block) for block in of_stream.blocks(layers)]
    ids, measured, non_finite = of_heads.batch.ids, list[LayerValues](), dict[str, tuple[int, str]]()
    arrays = _on_host([numbers for *_, numbers in found])
    for (per_head, layer, names, _), values in zip(found, arrays, strict=True):
        for metric, who in np.argwhere(np.isinf(values).any((0, 3))):
            told = (layer.index, f"layer '{layer.path}' {NOT_FINITE} ({names[metric]})")
            non_finite[ids[who]] = min(non_finite.get(ids[who], told), told, key=itemgetter(0))
        sized = of_heads.sized(layer, facts[layer.index])
        measured.append(
            LayerValues(
                layer.index, layer.path, sized, of_heads.sets, names, ids, first_input, values, per_head
            )
        )
    if non_finite:
        raise NotFinite({name: non_finite[name][1] for name in ids if name in non_finite})
    return measured


def _on_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """The tensors on the CPU; each device is read once for all of its own."""
    found: dict[int, np.ndarray] = {}
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        flat = torch.cat([tensors[place].flatten() for place in places]).cpu().numpy()
        ends = np.cumsum([tensors[place].numel() for place in places])
        for place, part in zip(places, np.split(flat, ends[:-1]), strict=True):
            found[place] = part.reshape(tensors[place].shape)
    return [found[place] for place in range(len(tensors))]

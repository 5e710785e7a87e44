"""Whether one input of a batch, or one document of a sequence, reaches another: by changing the one.

A case is a batch in which one input, or one document, is watched. What it must not see is changed: the other
input, what its padding holds, the document before it. By how much Y of each layer and what the tower returns
change for the watched tokens is the leak. Beside it: the watched input alone, which tells whether it gets the
same numbers by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.errors import UserError
from diag.measure.loop import told_if_the_model_fails
from diag.models.base import Batch, Model, Tower, device_of_module
from diag.models.hooks.residual import tolerance
from diag.models.loading import first_line
from diag.studies.audit.words import (
    ALONE,
    BLOCKS,
    DIFFERS,
    DOCUMENT,
    FINAL,
    IN_BATCH,
    LEAK,
    LEFT,
    NONE,
    NOT_TESTED,
    OTHER_INPUT,
    PADDING,
    PLAIN,
    RESTART,
    RIGHT,
    ROUNDING,
    UNCACHED,
    UNCOUNTED,
    UNMASKED,
)

ABOVE_NOISE = 10.0
"""A change of so many times that of the same batch run twice is more than noise."""

WHOLE = slice(None)

Windows = Callable[[Sequence[int]], list[list[int]]]
"""Lengths -> token ids of texts that are so long, of other content each."""


Pick = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Change:
    """By how much the watched tokens change in one layer. changed: what was. layer: or `FINAL`.

    change: ‖Y′ − Y‖/‖Y‖. noise: the same of the batch run twice. control: of all tokens together, which must
    change; NaN where nothing is. level: `NONE` (bit for bit), `ROUNDING`, `LEAK`, `DIFFERS` or `NOT_TESTED`.
    why: of what was not tested.
    """

    case: str
    changed: str
    layer: int
    change: float
    noise: float
    control: float
    level: str
    why: str = ""


@dataclass(frozen=True)
class Case:
    """One batch. inputs: how many it holds. place: which tokens of its first input are watched.

    others: what is changed -> the batch then. alone: a batch of what is watched, and of nothing else; None
    where the model takes none. own, own_alone: pick what is watched of the tokens of the first input, where
    these are no stretch of them, `[token, channel]` to those rows, or to None where they are not known; in
    the batch, and alone.
    """

    name: str
    inputs: int
    batch: Batch
    place: slice
    others: Mapping[str, Batch]
    alone: Batch | None = None
    own: Pick | None = None
    own_alone: Pick | None = None


def untested(case: str, changed: str, why: str) -> Change:
    """That a case was not tested."""
    return Change(case, changed, FINAL, math.nan, math.nan, math.nan, NOT_TESTED, why)


def batch_case(both: Batch, other: Batch, alone: Batch) -> Case:
    """Two inputs of one size, the first of them watched. other: the second one replaced."""
    return Case(IN_BATCH, 2, both, WHOLE, {OTHER_INPUT: other}, alone)


def tail_case(one: Batch, other: Batch) -> Case:
    """Texts of a model that takes no mask: the last quarter of the one is that of the other, as if it were
    padding."""
    ids = one.data
    kept = max(1, 3 * ids.shape[1] // 4)
    changed = replace(one, data=torch.cat([ids[:, :kept], other.data[:, kept:]], 1))
    return Case(UNMASKED, 1, one, slice(0, kept), {PADDING: changed})


def filled_case(batch: Batch) -> Case | None:
    """One image whose processor fills its patches up behind it (SigLIP 2), the padding replaced by other
    numbers; None where none are filled up."""
    real, data = batch.real, batch.data
    if real is None or bool(real.all()) or not isinstance(data, Mapping):
        return None
    kept = int(real[0].sum())
    name = next((n for n, x in data.items() if x.is_floating_point() and x.shape[:2] == real.shape), None)
    if name is None or not bool(real[0, :kept].all()):
        return None
    changed = data[name].clone()
    changed[:, kept:] = changed[:, :1] + 1
    return Case("padded", 1, batch, slice(0, kept), {PADDING: replace(batch, data={**data, name: changed})})


def text_changes(model: Model, tower: Tower, windows: Windows, seq_len: int) -> Iterator[Change]:
    """Padded and packed batches of a text tower that takes a mask or positions by name (`Tower.also`)."""
    first = first_position(model.module)
    batches = TextBatches(tower, device_of_module(model.module), _dtype_of(model), padding_id(model), first)
    cases = list[Case]()
    a, b, c = windows((max(2, 3 * seq_len // 4), seq_len, seq_len))
    if "attention_mask" in tower.also:
        counted = (LEFT, UNCOUNTED) if "position_ids" in tower.also else (UNCOUNTED,)
        cases += [batches.padded(name, a, b, c) for name in (RIGHT, *counted)]
    else:
        yield untested("padded", PADDING, "the model takes no attention_mask")
    half = max(2, seq_len // 2)
    one, two, three = windows((half, half, half))
    cases.append(batches.packed(PLAIN, one, two, three))
    if "position_ids" in tower.also:
        cases.append(batches.packed(RESTART, one, two, three))
        if "use_cache" in tower.also:
            cases.append(batches.packed(UNCACHED, one, two, three))
    else:
        yield untested(RESTART, DOCUMENT, "the model takes no position_ids")
    if "attention_mask" in tower.also:
        cases.append(batches.packed(BLOCKS, one, two, three))
    for case in cases:
        try:
            yield from changes_of(tower, case)
        except UserError as error:  # what a model says of a mask or of positions that it does not take
            why = f"the model does not take it: {first_line(error.__cause__ or error)}"
            yield untested(case.name, next(iter(case.others)), why)


def padding_id(model: Model) -> int:
    """The id that fills texts up, by the model's config; 0 where that has none."""
    config: Any = getattr(model.module, "config", None)
    known = (getattr(one, "pad_token_id", None) for one in (config, getattr(config, "text_config", None)))
    return next((number for number in known if number is not None), 0)


def first_position(module: nn.Module) -> int:
    """The position of a first token: 0, or behind that of padding in models that number it, too (RoBERTa)."""
    for path, child in module.named_modules():
        if path.endswith("position_embeddings") and getattr(child, "padding_idx", None) is not None:
            return int(child.padding_idx) + 1
    return 0


def _dtype_of(model: Model) -> torch.dtype:
    floats = (parameter.dtype for parameter in model.module.parameters() if parameter.is_floating_point())
    return next(floats, torch.float32)


@dataclass(frozen=True)
class TextBatches:
    """Makes the batches of a text tower. filling: the id of padding. first: the position of a first token."""

    tower: Tower
    device: torch.device
    dtype: torch.dtype
    filling: int
    first: int

    def padded(self, name: str, a: list[int], b: list[int], c: list[int]) -> Case:
        """a, filled up, and b; in the place of b, c; in the place of padding, other ids."""
        more = len(b) - len(a)
        front = 0 if name == RIGHT else more
        mask = torch.ones(2, len(b), dtype=torch.long)
        mask[0, :front] = mask[0, front + len(a) :] = 0
        # as generate() counts them; forward() alone counts the padding, too
        positions = (mask.cumsum(1) - 1).clamp(min=0) + self.first if name == LEFT else None

        def batch(beside: list[int], filling: int) -> Batch:
            row = [filling] * front + a + [filling] * (more - front)
            return self._batch([row, beside], mask, positions)

        other = next(number for number in a if number != self.filling)
        changed = {OTHER_INPUT: batch(c, self.filling), PADDING: batch(b, other)}
        place = slice(front, front + len(a))
        return Case(name, 2, batch(b, self.filling), place, changed, self._batch([a]))

    def packed(self, name: str, a: list[int], b: list[int], c: list[int]) -> Case:
        """a and b in one sequence, b watched; in the place of a, c."""
        sizes = torch.tensor([len(a), len(b)])
        positions, mask = None, None
        if name != PLAIN and "position_ids" in self.tower.also:
            positions = torch.cat([torch.arange(size) + self.first for size in sizes.tolist()])[None]
        if name == BLOCKS:
            document = torch.repeat_interleave(torch.arange(2), sizes)
            seen = document[:, None] == document
            if is_causal(self.tower, self._batch([a + b])):
                seen = seen.tril()
            # added to scores: a boolean mask would be added, too, where a model computes attention itself
            mask = torch.where(seen, 0.0, torch.finfo(self.dtype).min)[None, None].to(self.dtype)
        # a model may take positions that start anew for documents only where it makes no cache
        cached = {RESTART: True, UNCACHED: False}.get(name)
        batch, other = (self._batch([x + b], mask, positions, cached) for x in (a, c))
        return Case(name, 1, batch, slice(len(a), len(a) + len(b)), {DOCUMENT: other}, self._batch([b]))

    def _batch(
        self,
        ids: list[list[int]],
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cached: bool | None = None,
    ) -> Batch:
        given = {"input_ids": torch.tensor(ids), "attention_mask": mask, "position_ids": positions}
        data: dict[str, Any] = {name: x.to(self.device) for name, x in given.items() if x is not None}
        if cached is not None and "use_cache" in self.tower.also:
            data["use_cache"] = cached
        return Batch(tuple(map(str, range(len(ids)))), data)


# --- running a case


def changes_of(tower: Tower, case: Case) -> list[Change]:
    """By how much the watched tokens change, per layer, for everything that is changed, and beside alone.

    Raises UserError as the model's run does.
    """
    in_a_row = case.own is not None
    first, again = (seen_of(tower, case.batch, case.inputs, in_a_row=in_a_row) for _ in range(2))
    others = {
        what: seen_of(tower, batch, case.inputs, in_a_row=in_a_row) for what, batch in case.others.items()
    }
    alone = {} if case.alone is None else {ALONE: seen_of(tower, case.alone, 1, in_a_row=in_a_row)}
    data = case.batch.data
    given = next(iter(data.values())) if isinstance(data, Mapping) else data  # ids, or patches
    tokens = given.shape[1] if case.place != WHOLE else None
    rows = {x.shape[1] for layer, x in first.items() if layer != FINAL}  # how many tokens layers have

    def at(layer: int, x: Tensor, own: Pick | None) -> Tensor | None:
        """What is watched of a layer, or of what is returned; all of that where it is of no tokens."""
        if own is None:
            return _at(x, case, tokens)
        no_tokens = layer == FINAL and (x.ndim == 2 or (x.ndim == 3 and x.shape[1] not in rows))
        return x[0] if no_tokens else own(x[0]) if x.ndim == 3 else None

    found = list[Change]()
    for what, seen in {**others, **alone}.items():
        # in one layer it may be without consequence, as where padding sees nothing
        moved = max(map(apart, (seen.get(layer) for layer in first), first.values()), default=0.0)
        for layer, whole in first.items():
            base = at(layer, whole, case.own)
            if what == ALONE:
                by_itself = seen.get(layer)
                if by_itself is None or case.own_alone is None:
                    other = None if by_itself is None else by_itself[0]
                else:
                    other = at(layer, by_itself, case.own_alone)
                control = math.nan
            else:
                other = at(layer, seen[layer], case.own) if layer in seen else None
                control = apart(seen.get(layer), whole)
            noise, change = apart(at(layer, again[layer], case.own), base), apart(other, base)
            level, why = _level(what, change, noise, moved, whole.dtype)
            found.append(Change(case.name, what, layer, change, noise, control, level, why))
    return found


def _level(what: str, change: float, noise: float, moved: float, dtype: torch.dtype) -> tuple[str, str]:
    """How a change is called, and why where it is not tested. moved: the largest one of any token."""
    level, why = LEAK if what != ALONE else DIFFERS, ""
    if math.isnan(change):
        level, why = NOT_TESTED, "its rows are not those of the inputs, or hold no tokens"
    elif moved == 0:
        level, why = NOT_TESTED, "what was changed changed nothing"
    elif change == 0:
        level = NONE
    elif change <= max(tolerance(dtype), ABOVE_NOISE * noise):
        level = ROUNDING
    return level, why


def seen_of(tower: Tower, batch: Batch, inputs: int, *, in_a_row: bool = False) -> dict[int, Tensor]:
    """Y of each layer, and as `FINAL` what the tower returns, `[input, token, channel]`, in one forward pass.

    Several rows of an input (windows) are side by side in its tokens. What has no row for each input is left
    out; what is returned may lack the axis of tokens. in_a_row: whether tokens have to be in their order: of
    windows there are none then.
    """
    parts = dict[int, list[Tensor]]()

    def on_call(call: AttentionCall) -> None:
        parts.setdefault(call.layer, []).append(call.output.transpose(1, 2).flatten(2))

    with (
        torch.inference_mode(),
        told_if_the_model_fails(tower, batch),
        tower.capture(tower.layers, on_call),
    ):
        final = _first_tensor(tower.forward(batch))
    found = dict[int, Tensor]()
    for layer, rows in parts.items():
        if all(len(x) % inputs == 0 for x in rows):
            found[layer] = torch.cat([x.reshape(inputs, -1, x.shape[-1]) for x in rows], 1)
            if in_a_row and (len(rows) > 1 or len(rows[0]) > inputs):
                found[layer] = found[layer][:, :0]
    if final is not None and len(final) == inputs:
        found[FINAL] = final
    return found


def is_causal(tower: Tower, batch: Batch) -> bool:
    """Whether the first token of a batch sees none but itself, in every layer that is seen."""
    counts = list[bool]()

    def on_call(call: AttentionCall) -> None:
        counts.append(bool((call.visibility.count[..., 0] <= 1).all()))

    with (
        torch.inference_mode(),
        told_if_the_model_fails(tower, batch),
        tower.capture(tower.layers, on_call),
    ):
        tower.forward(batch)
    return all(counts)


def _first_tensor(output: Any) -> Tensor | None:
    """The first tensor of what a model returns."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return next((found for x in output if (found := _first_tensor(x)) is not None), None)
    return output if isinstance(output, Tensor) and output.ndim else None


def _at(x: Tensor, case: Case, tokens: int | None) -> Tensor | None:
    """The watched tokens; None where a layer has others. tokens: of the batch, if only some are watched."""
    if tokens is None or (x.ndim == 2 and case.inputs > 1):
        return x[0]
    return x[0, case.place] if x.ndim > 2 and x.shape[1] == tokens else None


def apart(one: Tensor | None, base: Tensor | None) -> float:
    """‖one − base‖/‖base‖ in float64, 0 where they are the same to the bit; NaN where they do not compare."""
    if one is None or base is None or one.shape != base.shape:
        return math.nan
    if torch.equal(one, base):
        return 0.0
    one, base = (torch.nan_to_num(x.double()) for x in (one, base))  # rows that see nothing may be NaN
    return ((one - base).norm() / base.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()

"""What the attention calls of a model mean, found by test on its first inputs and not by names.

Three tests, in two forward passes of a few inputs. *Axis* (`diag.models.hooks.axis`): whose tokens V is of.
*Owner*: the first input is replaced; only its own rows may change. *Content*: where windows are filled up,
their tokens that stay what they were in all layers are padding. Where the second of two inputs, run alone,
has the rows that it has behind the first, and no token of the two is alike, both are as plain as can be: then
this shorter pass stands for the second one.

A model that gives other numbers for the same input is found in passing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from diag.errors import MeasurementError, UserError
from diag.models.hooks.content import (
    EVERYWHERE,
    OTHERWISE,
    Changed,
    changed_alone,
    changed_tokens,
    joining,
    of_groups,
    padding_in,
    plainly_apart,
    whose_rows,
    windows_in_a_row,
)
from diag.models.hooks.depth import BESIDE, EAGER, Place, stacks_of, with_reasons
from diag.models.hooks.in_python import WHAT_TO_TYPE
from diag.models.hooks.layers import Form, Layer
from diag.models.hooks.seam import refuse_compiled
from diag.models.hooks.seen import (
    ELSEWHERE,
    EVERYTHING,
    EXPERTS,
    MIXED,
    OWN,
    POOLED,
    REASONS,
    SHARED,
    Seen,
)
from diag.models.hooks.survey import Survey, watched

SEVERAL = (
    "it calls attention several times in one run, and these are neither windows of its tokens nor layers "
    "that follow each other"
)
BESIDE_OWN = (
    "its values do not follow what its module reads first: it is of another stream, or cross-attention, "
    "beside the call that is the layer's"
)
IN_PARTS = (
    "it attends to its tokens in parts: a call for each of several parts of its queries, or of its keys"
)
SEVERAL_MIXERS = "it mixes its tokens several times in one run without softmax, as for one head after another"
EAGER_ELSEWHERE = (
    "it computes a softmax itself, over other numbers of queries and keys (cross-attention or pooling)"
)
UNTOLD = "whose values its mixer without softmax is handed could not be told"
NO_HEADS = "which axis holds its heads could not be told"


@dataclass(frozen=True, eq=False)
class Understood:
    """One tower of a model: what is measured of it, and what is not.

    name: that of the tower among several; empty where there is one.
    layers: in depth order, with the model's own numbers. places: all of its depth axis, with why one is not
        measured.
    skipped: layers that are not measured, by path, and why.
    joined: tokens that join those of the first layer later, before and behind them, by how many then are.
    side_by_side: how many windows of an input, each with prefix tokens of its own, stand in one row in layers
        that see all of them.
    totals: how many tokens all calls of a layer have together for one input, by name. prefix: how many of the
        first layer's are the same for all inputs.
    hides_padding: whether its masks hide what is padding in the inputs that were looked at. alone: whether no
        other stack attends, which padding may be of.
    """

    name: str
    layers: tuple[Layer, ...]
    places: tuple[Place, ...]
    skipped: Mapping[str, str]
    joined: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    side_by_side: int = 1
    hides_padding: bool = False
    alone: bool = True
    totals: Mapping[str, int] = field(default_factory=dict)
    prefix: int = 0

    @property
    def depth(self) -> int:
        """How many places its depth axis has."""
        return len(self.places)


@dataclass(frozen=True, eq=False)
class Meaning:
    """What was found of a model.

    towers: those that have a layer to measure. rows: whose the rows of calls are. random: whether the same
    input gave other numbers. sequence_first: whether inputs lie along the second axis of what was given.
    untested: layers that could not be asked what they attend to: they are taken to be of their own tokens.
    """

    towers: tuple[Understood, ...]
    rows: str
    random: bool = False
    sequence_first: bool = False
    untested: tuple[str, ...] = ()


def meaning_of(
    root: nn.Module,
    run: Callable[[Any], object],
    first: Any,
    other: Any,
    *,
    inputs: int,
    everywhere: bool = True,
    real: Bool[Tensor, "input token"] | None = None,
    last: Any = None,
    instead: Any = None,
) -> Meaning:
    """What the attention calls below `root` mean.

    run: runs the model on something. first: some inputs. other: the same, the first of them replaced by
        another of its size. inputs: how many they are. everywhere: whether the other one differs in every
        element; ids in another order may be the same here and there, and then nothing is taken for padding.
        real: which of their tokens are no padding. last: of two inputs the second one alone. instead:
        another one in the place of that, alone.
    Raises UserError where no layer can be measured, saying why, and for compiled modules.
    """
    refuse_compiled([Layer(0, path, module) for path, module in root.named_modules()])
    seen = watched(root, lambda: run(first))
    _share(seen.seen)
    calls, changed, closely = _Calls(seen), dict[Seen, Tensor](), dict[Seen, Tensor]()
    rows, random, sequence_first = EVERYWHERE, False, False
    plain, of_one = None, dict[Seen, Tensor]()
    if calls.measured and last is not None and _is_exact(root):
        alone = _passed(root, lambda: run(last), len(seen.seen))
        plain = None if alone is None else plainly_apart(seen.seen, alone.seen, calls.measured, everywhere)
    if plain is not None:
        changed = plain
        rows = whose_rows(changed.values(), inputs)
    elif calls.measured:
        second = _passed(root, lambda: run(other), len(seen.seen))
        changed = {} if second is None else changed_tokens(seen.seen, second.seen)
        closely = {} if second is None else changed_tokens(seen.seen, second.seen, closely=True)
        rows = whose_rows((changed[one] for one in calls.measured if one in changed), inputs)
        rows = OTHERWISE if second is None else rows
    if rows == EVERYWHERE and seen.seen:
        twice = watched(root, lambda: run(first), asked=False, most=len(seen.seen))
        again = changed_tokens(seen.seen, twice.seen)
        random, rows = any(bool(x.any()) for x in again.values()), OTHERWISE
        if random:  # then what followed what is not known either
            for one in seen.seen:
                one.forget()
            calls, changed, closely = _Calls(seen), {}, {}
        elif calls.measured:
            ahead = changed.get(calls.measured[0])
            sequence_first = ahead is not None and _in_one_column(ahead)
    if not calls.measured:
        raise _nothing(root, seen, calls.refused)
    if rows == OTHERWISE and not random and instead is not None:  # then inputs are measured one by one
        passes = (
            _passed(root, lambda: run(last), len(seen.seen)),
            _passed(root, lambda: run(instead), len(seen.seen)),
        )
        of_one = {} if None in passes else changed_alone(seen.seen, *(each.seen for each in passes if each))
    own = {one: x[: len(x) // inputs] for one, x in (closely or changed).items()}
    own = own if rows != OTHERWISE else of_one
    untested = dict.fromkeys(one.path for one in calls.measured if not one.asked)
    towers = _towers(root, calls, own, everywhere, real, inputs)
    return Meaning(towers, rows, random, sequence_first, tuple(untested))


def _in_one_column(changed: Tensor) -> bool:
    """Whether it is the same token of each row that is another one: one of a sequence, and no input."""
    columns = changed.any(0).nonzero()[:, 0]
    return changed.shape[1] > 1 and len(columns) == 1 and bool(changed[:, columns].all())


def _passed(root: nn.Module, run: Callable[[], object], most: int) -> Survey | None:
    """A pass on an input that was made up, up to as many calls; None where the model does not take it."""
    try:
        return watched(root, run, asked=False, most=most)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:  # a model may say anything of what it was not made for
        return None


class _Calls:
    """The calls of a pass by module and run, and which of them are measured.

    numbers: of the calls of each run that are its layer's. refused: why a run has none. measured: all of
    them, in order.
    """

    def __init__(self, seen: Survey) -> None:
        self.seen = seen
        self.of_run = dict[tuple[str, int], list[Seen]]()
        for one in seen.seen:
            self.of_run.setdefault((one.path, one.run), []).append(one)
        decided = {key: _decided(calls) for key, calls in self.of_run.items()}
        self.numbers = {key: numbers for key, (numbers, _) in decided.items()}
        self.refused = {key: why for key, (_, why) in decided.items() if why is not None}
        self.measured = [one for one in seen.seen if one.number in self.numbers[one.path, one.run]]


def _share(seen: Sequence[Seen]) -> None:
    """Notes calls whose values, which do not follow their module's input, are those of an earlier layer."""
    for place, one in enumerate(seen):
        if one.kind in (None, ELSEWHERE) and one.why is None and one.print.unique().numel() > 1:
            others = (other for other in seen[:place] if other.kind == OWN)
            if any(_same_values(one, other) for other in others):
                one.kind = SHARED


def _same_values(one: Seen, other: Seen) -> bool:
    return one.print.shape == other.print.shape and torch.equal(one.print, other.print)


def refuse_random(module: nn.Module, found: Meaning, allowed: bool) -> None:
    """Raises UserError for a model that gives other numbers for the same input, unless that is allowed."""
    if found.random and not allowed:
        raise UserError(
            f"{type(module).__name__} draws at random: the same input gives other numbers each time",
            "measure it all the same with --allow-random (Python: allow_random=True)",
        )


def told(found: Meaning, chosen: Understood) -> dict[str, Any]:
    """The verdict of the tests on one tower, as a manifest has it."""
    padded = [layer.name for layer in chosen.layers if any(x is not None for x in layer.form.padding)]
    others = {layer.name: layer.form.value_from for layer in chosen.layers if layer.form.value_from != "own"}
    extra = {layer.name: list(layer.form.extra) for layer in chosen.layers if any(layer.form.extra)}
    paths = {layer.path for layer in chosen.layers}
    return {
        "tested": True,
        "rows": found.rows,
        "random": found.random,
        "padded_windows": padded,
        "values_from": others,
        "extra_keys": extra,
        "axis_untested": [path for path in found.untested if path in paths],
    }


def _decided(calls: Sequence[Seen]) -> tuple[frozenset[int], str | None]:
    """Which calls of one run of a module are the layer's, by number; and why, if none is.

    Where a mixer without softmax runs beside attention, those of attention, if one of them can be measured.
    """
    attends = [one for one in calls if one.recurrence is None]
    if 0 < len(attends) < len(calls):
        numbers, why = _decided(attends)
        return (numbers, why) if numbers else _decided([one for one in calls if one.recurrence is not None])
    own = [
        one
        for one in calls
        if one.kind in (OWN, MIXED, SHARED) or not (one.kind or one.asked or one.recurrence)
    ]
    pooled = [one for one in calls if one.kind == POOLED]
    if pooled and not own:
        if len(calls) > 1:  # also beside others, as of landmarks, whose outputs are the values of the next
            return frozenset(), IN_PARTS if _are_parts(calls) else SEVERAL
        own = pooled
    if not own:
        first = calls[0]
        unknown = UNTOLD if first.recurrence is not None else REASONS[ELSEWHERE]
        return frozenset(), first.why or REASONS.get(first.kind or "", unknown)
    if all(one.adds_up for one in calls):
        return frozenset(one.number for one in calls), None
    if len(own) > 1 and any(one.recurrence is not None for one in own):
        return frozenset(), SEVERAL_MIXERS
    if len(calls) > 1 and any(one.kind == EVERYTHING for one in calls):
        return frozenset(), SEVERAL
    if sum(one.touched for one in own) > 1:
        return frozenset(), SEVERAL
    if any(one.layout is None for one in own):
        return frozenset(), NO_HEADS
    return frozenset(one.number for one in own), None


def _beside(one: Seen) -> str:
    """Why a call is not the layer's, where another one is."""
    if one.kind == POOLED and one.sizes is not None:
        return "{} queries over {} keys of its tokens, beside the call that is the layer's".format(*one.sizes)
    return one.why or REASONS.get(one.kind or "", BESIDE_OWN)


def _are_parts(calls: Sequence[Seen]) -> bool:
    """Whether the calls of a run have as many queries together as each has keys, or the other way round."""
    queries, keys = zip(*(one.sizes for one in calls if one.sizes is not None), strict=True)
    return len({*keys, sum(queries)}) == 1 or len({*queries, sum(keys)}) == 1


def nothing_of_its_own(path: str, why: str) -> MeasurementError:
    """That no layer is over its own tokens, or can be told to be, with one that is not as the reason."""
    reason = f"'{path}': {why}" if path else why
    if why in (SEVERAL, IN_PARTS):
        parts = "call attention once, for all queries and keys"
        return MeasurementError(
            f"no layer can be measured ({reason})",
            parts if why == IN_PARTS else "give each of its layers a module of its own to call it in",
        )
    return MeasurementError(
        f"no layer attends to its own tokens ({reason})", "attnbias measures self-attention over tokens"
    )


def _nothing(root: nn.Module, seen: Survey, why: Mapping[tuple[str, int], str]) -> UserError:
    """Why a model has nothing to measure."""
    for path, reason in seen.not_read.items():
        return MeasurementError(f"layer '{path}' cannot be read: {reason}", WHAT_TO_TYPE)
    for one in seen.seen:
        if not bool(one.print.isfinite().all()):
            return MeasurementError(
                f"layer '{one.path}' gives values that are not finite for the first inputs",
                "leave those inputs out, or load the weights in another format: --dtype float32",
            )
    if why:
        (path, _), reason = next(iter(why.items()))
        return nothing_of_its_own(path, reason)
    if seen.eager:
        where = max(seen.eager, key=lambda path: seen.eager[path].numel()) or type(root).__name__
        return UserError(
            f"the model computes attention itself, in '{where}', and what it weighs is not seen",
            "call F.scaled_dot_product_attention there, or multiply weights and values: weights @ values",
        )
    return UserError(
        f"{type(root).__name__} made no self-attention call",
        "attnbias measures models that call F.scaled_dot_product_attention, or multiply what a softmax gives "
        "with values",
    )


def _is_exact(root: nn.Module) -> bool:
    """Whether an input gives the same numbers alone as beside another one, but for the last digits."""
    first = next(root.parameters(), None)
    return first is None or first.dtype in (torch.float32, torch.float64)


# --- towers


def _towers(
    root: nn.Module, calls: _Calls, own: Changed, everywhere: bool, real: Tensor | None, inputs: int
) -> tuple[Understood, ...]:
    found = dict[str, str | None]()
    for key, numbers in calls.numbers.items():
        if all(one.kind == EXPERTS for one in calls.of_run[key]):
            continue  # no attention, and no place on a depth axis
        if found.get(key[0], "") is not None:
            found[key[0]] = None if numbers else calls.refused[key]
    found = {**calls.seen.not_read, **found}
    for path, scores in calls.seen.eager.items():
        square = not scores or scores[-1] == scores[-2]
        found.setdefault(path, EAGER if square else EAGER_ELSEWHERE)
    towers, unmeasured = list[Understood](), dict[str, str]()
    keys = {one.path: one.print.shape[-1] for one in calls.seen.seen}
    linear = {one.path for one in calls.seen.seen if one.recurrence is not None}
    linear -= {one.path for one in calls.measured if one.recurrence is None}
    for stack in stacks_of(root, found, ran=calls.of_run, keys=keys, linear=linear):
        layers, skipped, of_stack = list[Layer](), dict[str, str](), dict[Seen, int]()
        totals = dict[str, int]()
        for place in stack.places:
            key = (place.path, place.run)
            mine = [one for one in calls.of_run.get(key, ()) if one.number in calls.numbers[key]]
            if not mine:
                skipped[place.path] = place.why or calls.refused.get(key, EAGER)
                continue
            skipped |= {
                f"{place.path} (call {one.number})": _beside(one)
                for one in calls.of_run[key]
                if one not in mine and one.kind != EXPERTS and one.recurrence is None
            }
            form = Form(
                runs=calls.seen.runs[place.path],
                calls=None if len(mine) == len(calls.of_run[key]) else calls.numbers[key],
                layout=mine[0].layout,
                adds_up=mine[0].adds_up,
                extra=mine[0].extra,
                value_from=_values_of(mine, of_stack),
                keys_of=mine[0].keys_of,
                in_turn=place.path in calls.seen.in_turn,
                recurrence=mine[0].recurrence,
            )
            of_stack |= dict.fromkeys(mine, place.index)
            for one in calls.of_run[key]:
                if one.recurrence is not None and mine[0].recurrence is None:
                    skipped[f"{place.path} ({one.recurrence.called})"] = BESIDE
            layer = Layer(place.index, place.path, root.get_submodule(place.path), place.run, form)
            layers.append(layer)
            total = sum(one.queries for one in (mine[:1] if form.adds_up else mine))
            if total % inputs == 0:
                totals[layer.name] = total // inputs
        skipped |= stack.beside
        if not layers:
            unmeasured |= skipped
            continue
        of_tokens = [one for one in of_stack if one.kind != POOLED]  # of keys alone no token is told
        ran = (one for place in stack.places for one in calls.of_run.get((place.path, place.run), ()))
        padding = padding_in([one for one in ran if one in of_tokens or one.kind == OWN], own, everywhere)
        hides = real is not None and any(_shows(one, real) for one in of_tokens)
        padded = tuple(_with_padding(layer, calls, padding) for layer in layers)
        places = with_reasons(stack.places, {(layer.path, layer.run) for layer in layers}, skipped)
        of_stack_or_pooled = [one for one in calls.seen.seen if one in of_stack or one.sizes is not None]
        joined = joining(list(of_stack), own, of_groups(of_stack_or_pooled, own)) if everywhere else {}
        in_a_row = windows_in_a_row(of_tokens, own) if everywhere else 1
        ahead = next((own[one] for one in of_tokens if one in own), None)
        prefix = int((~ahead).sum()) if everywhere and ahead is not None and len(ahead) == 1 else 0
        towers.append(
            Understood(
                stack.name,
                padded,
                places,
                skipped,
                joined,
                in_a_row,
                hides,
                totals=totals,
                prefix=prefix,
            )
        )
    # stacks of which nothing is measured are told with the first one
    first, *others = (replace(one, alone=len(towers) == 1 and not unmeasured) for one in towers)
    return (replace(first, skipped={**first.skipped, **unmeasured}), *others)


def _shows(one: Seen, real: Tensor) -> bool:
    """Whether the mask of a call shows the keys that are no padding, and no others."""
    return one.keys is not None and one.keys.shape[-1] == real.shape[-1] and bool((one.keys == real).all())


def _values_of(calls: Sequence[Seen], before: Mapping[Seen, int]) -> str:
    """Whose the values of a layer are: "own", "mixed", "pooled", "others", or those of an earlier layer."""
    if calls[0].kind == POOLED:
        return calls[0].keys_of
    if any(one.kind == MIXED for one in calls):
        return "mixed"
    for other, index in before.items():
        if all(one.kind == SHARED and _same_values(one, other) for one in calls):
            return f"layer {index}"
    return "own"


def _with_padding(layer: Layer, calls: _Calls, padding: Mapping[Seen, Tensor]) -> Layer:
    mine = [
        one
        for one in calls.of_run[layer.path, layer.run]
        if (one.recurrence is None) == (layer.form.recurrence is None)
    ]
    if padding.keys().isdisjoint(mine):
        return layer
    return replace(layer, form=replace(layer.form, padding=tuple(padding.get(one) for one in mine)))

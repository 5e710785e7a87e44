"""Decides what a table says of a model: exact, partial, refused, wrong or silently incomplete.

Pure: evidence (`evidence.py`) and what attnbias answered go in, a verdict comes out. Nothing of attnbias is
used.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from zoo.evidence import Evidence, configured_heads, within
from zoo.numbering import numbering_faults, unnamed_blocks
from zoo.observer import Call
from zoo.provenance import CHANNELS, CROSS, MIXED, ORDER, OWN, POOLED
from zoo.reference import METRICS, Rows, layouts, numbers, numbers_of_weights, rows_of, weights_of
from zoo.refusals import faults_of_refusal

EXACT, PARTIAL, REFUSED, FALSE, WRONG, SILENT, NONE, FAILED, NOT_BUILT = (
    "exact",
    "partial (named)",
    "refused (true reason)",
    "refused (false reason or raw exception)",
    "wrong",
    "silently incomplete",
    "no verdict",
    "judge failed",
    "not built",
)
VERDICTS = (EXACT, PARTIAL, REFUSED, FALSE, WRONG, SILENT, NONE, FAILED, NOT_BUILT)
TOLERANCE = 1e-5
SAME = 1e-3
"""Two inputs' rows are the same where they differ by no more than this beside the rows that differ most."""
OWN_KINDS = {OWN, MIXED}
UNDEFINED = frozenset({"entropy", "cos_y_vuniform"})
"""Metrics that weights below zero, and maps that are subtracted, may leave without a number."""


@dataclass
class Answer:
    """What attnbias said: a table of samples and what it skipped, or an error."""

    samples: pd.DataFrame | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    raw: bool = False


@dataclass
class Verdict:
    """One word, and why."""

    word: str
    reasons: list[str] = field(default_factory=list)


def judged(evidence: Evidence, answer: Answer) -> Verdict:
    """The verdict on one answer."""
    if answer.samples is None:
        faults = [answer.error] if answer.raw else faults_of_refusal(answer.error, evidence)
        return Verdict(FALSE, faults) if faults else Verdict(REFUSED, [answer.error])
    if evidence.failed:
        return Verdict(NOT_BUILT, [f"it fails on one of its inputs alone: {evidence.failed[:100]}"])
    wrong = list(faults_of_table(evidence, answer))
    if wrong:
        return Verdict(WRONG, wrong)
    silent = list(unnamed(evidence, answer))
    if silent:
        return Verdict(SILENT, silent)
    left = [f"{path}: {why}" for path, why in answer.skipped.items() if _has_own_tokens(evidence, path)]
    return Verdict(PARTIAL, left) if left else Verdict(EXACT, evidence.notes)


def _has_own_tokens(evidence: Evidence, path: str) -> bool:
    """Whether something at a path could have been measured: its tokens meet their own values."""
    call, path = re.search(r" \(call (\d+)\)$", path), _without_run(path)
    kinds = {
        kind
        for (of, _, _, number), kind in evidence.kinds.items()
        if within(of, path) and (call is None or number == int(call[1]))
    }
    return not kinds <= {CROSS, CHANNELS, ORDER}


def _without_run(path: str) -> str:
    return re.sub(r" \(.*\)$", "", path)


# --- what is not there


def unnamed(evidence: Evidence, answer: Answer) -> Iterable[str]:
    """Attention that was seen, and is neither in the table nor named."""
    assert answer.samples is not None
    known = {_without_run(str(path)) for path in answer.samples["module"].unique()} | {
        _without_run(path) for path in answer.skipped
    }
    for path in evidence.attending:
        if not any(within(path, of) or (path and within(of, path)) for of in known):
            how = "computes softmax attention itself" if path in evidence.eager else "calls attention"
            yield f"'{path}' {how}: neither measured nor named"
    for path in unnamed_blocks(evidence.root, set(evidence.attending), known):
        yield f"'{path}' mixes tokens without attention between blocks that attend: not named"


# --- what is there


@dataclass
class Line:
    """A layer of the table: `numbers[metric]` is `[input, head]` for each token set."""

    tower: str
    layer: int
    path: str
    run: int | None
    numbers: dict[str, dict[str, np.ndarray]]
    facts: str
    inputs: int


def lines_of(samples: pd.DataFrame) -> list[Line]:
    """The table, layer by layer."""
    found: list[Line] = []
    samples = samples[samples["head"] >= 0]
    names = ["tower", "layer", "module"]
    for (tower, layer, module), rows in samples.groupby(names, observed=True, sort=False):
        by_set: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        for (tokens, metric), cell in rows.groupby(["tokens", "metric"], observed=True, sort=False):
            if metric in METRICS:
                grid = cell.pivot_table(index="input_index", columns="head", values="value", dropna=False)
                by_set[str(tokens)][str(metric)] = grid.to_numpy(dtype=float)
        run = re.search(r"\(run (\d+)\)", str(module))
        columns = rows.columns.difference(["metric", "input", "value", "head", "input_index"])
        facts = " ".join(f"{column}={rows[column].iloc[0]}" for column in columns) + " "
        found.append(
            Line(
                str(tower),
                int(layer),
                _without_run(str(module)),
                int(run[1]) if run else None,
                dict(by_set),
                facts,
                rows["input_index"].nunique(),
            )
        )
    several: dict[str, int] = defaultdict(int)
    count = pd.Series([line.path for line in found]).value_counts() if found else {}
    for line in sorted(found, key=lambda line: line.layer):
        if line.run is None and count[line.path] > 1:
            line.run = several[line.path]
            several[line.path] += 1
    return found


def faults_of_table(evidence: Evidence, answer: Answer) -> Iterable[str]:
    """All that is wrong with a table."""
    assert answer.samples is not None
    if evidence.random:
        yield "the model gives other outputs for the same input twice: measured without a word"
    lines = lines_of(answer.samples)
    groups = [evidence.grouped(number) for number in range(evidence.inputs)]
    for line in lines:
        if "mixer=linear" in line.facts:
            continue  # its values and outputs have tests of their own: the judge sees attention alone
        if line.inputs != evidence.inputs:
            yield f"'{line.path}': {line.inputs} inputs in the table, {evidence.inputs} were given"
            continue
        places = [
            (path, run)
            for path, run in groups[0]
            if within(path, line.path) and (line.run is None or run == line.run)
        ]
        if not places:  # a product that is made by a module of its own
            places = [place for place in groups[0] if place[0] and line.path.startswith(f"{place[0]}.")]
            places = places if len({path for path, _ in places}) == 1 else []
        if not places and re.search(r"\bn_tokens=1(\.0)? ", line.facts):
            continue  # a product over one key may be no product
        if not places:
            yield f"'{line.path}' is in the table, but calls no attention"
            continue
        yield from _faults_of_line(evidence, line, places, groups, _left_out(answer, line.path))
    yield from numbering_faults(evidence.root, lines, [call.path for call in evidence.calls[0]])


def _left_out(answer: Answer, path: str) -> frozenset[int]:
    """Which calls of a layer are named as not measured."""
    named = (re.fullmatch(rf"{re.escape(path)} \(call (\d+)\)", of) for of in answer.skipped)
    return frozenset(int(match[1]) for match in named if match)


def _faults_of_line(
    evidence: Evidence,
    line: Line,
    places: list[tuple[str, int]],
    groups: list[dict[tuple[str, int], list[Call]]],
    left: frozenset[int],
) -> Iterable[str]:
    """What is wrong with a layer of the table. left: which of its calls are named as not measured."""
    kinds = set().union(*(evidence.kind(*place, left) for place in places))
    groups = [
        {place: [call for n, call in enumerate(of) if n not in left] for place, of in group.items()}
        for group in groups
    ]
    if re.search(r"value_from=(pooled|others) ", line.facts):
        yield from _faults_of_pooled(evidence, line, places, groups, kinds)
        return
    if kinds & OWN_KINDS and any(len(set(call.lengths)) > 1 for place in places for call in groups[0][place]):
        kinds -= {
            CROSS,
            POOLED,
        }  # beside its attention it weighs something else, as ConvBERT does the steps of a kernel
    for kind in (CROSS, POOLED, CHANNELS, ORDER, MIXED):
        if kind in kinds and not (kind == MIXED and "mixed" in line.facts):
            yield f"'{line.path}' is in the table, but its values are of {kind}"
    if kinds & {CROSS, POOLED, CHANNELS, ORDER}:
        return
    calls = [_of_its_own([call for place in places for call in group.get(place, [])]) for group in groups]
    if any(len(of) != len(calls[0]) for of in calls):
        yield f"'{line.path}' makes other numbers of calls for different inputs"
        return
    first = calls[0]
    total = re.search(r"row_sum=(\S+) ", line.facts)
    if total and abs(float(total[1]) - 1) > 1e-6 and len(calls[0]) > 1:
        if any(call.eager for call in calls[0]):
            return
        told = next(iter(line.numbers.values())).get("row_sum")  # the column is rounded
        factor = 1 - float(total[1] if told is None else told[0, 0])
        calls = [subtracted(of, factor) for of in calls]
        if not all(calls):
            return  # maps that are added up in other ways have tests of their own
    weights = [call.pattern for of in calls for call in of if call.pattern is not None]
    lenient = calls[0] is not first or any(bool((pattern < 0).any()) for pattern in weights)
    heads = configured_heads(evidence.root, places[0][0])
    shown = next(iter(next(iter(line.numbers.values())).values())).shape[1]
    if heads is not None and shown != heads:
        yield f"'{line.path}' has {shown} heads in the table, {heads} in its configuration"
        return
    same_values = [
        (a, b)
        for n, a in enumerate(calls[0])
        for b in calls[0][:n]
        if a.value is not None
        and b.value is not None
        and a.value.shape == b.value.shape
        and torch.equal(a.value, b.value)
    ]
    if same_values:
        yield f"'{line.path}' calls attention several times on the same values: pooled like windows"
        return
    others = any(len(set(call.lengths)) > 1 for call in calls[0])
    for tokens, by_metric in line.numbers.items():
        if others:  # the uniform null keeps what keys without a token gave, which is not taken apart here
            by_metric = {name: x for name, x in by_metric.items() if name != "cos_y_vuniform"}
        worst = min(
            (
                _apart(evidence, calls, layout, by_metric, tokens, UNDEFINED if lenient else frozenset())
                for layout in layouts(calls[0][0], heads or shown)
            ),
            default=(np.inf, "its heads were not found"),
        )
        if worst[0] > TOLERANCE:
            yield f"'{line.path}' ({tokens}): {worst[1]}"


def _faults_of_pooled(
    evidence: Evidence,
    line: Line,
    places: list[tuple[str, int]],
    groups: list[dict[tuple[str, int], list[Call]]],
    kinds: set[str],
) -> Iterable[str]:
    """What is wrong with a line of which only weights have numbers: keys, or queries, were pooled."""
    if POOLED not in kinds:
        yield f"'{line.path}' is in the table as pooled, but its values are of {', '.join(sorted(kinds))}"
        return
    heads = configured_heads(evidence.root, places[0][0])
    shown = next(iter(next(iter(line.numbers.values())).values())).shape[1]
    for tokens, by_metric in line.numbers.items():
        worst = (np.inf, "its heads were not found")
        calls = [[call for place in places for call in group.get(place, [])] for group in groups]
        for layout in layouts(calls[0][0], shown):
            apart = (0.0, "")
            for number, of_input in enumerate(calls):
                right = numbers_of_weights(of_input, layout, _counting(evidence, of_input[0], tokens, number))
                for metric, table in by_metric.items():
                    true = right[metric].numpy() if metric in right else np.full(table.shape[1], np.nan)
                    if true.shape != table[number].shape:
                        apart = max(apart, (np.inf, f"{table.shape[1]} heads where {len(true)} are"))
                        continue
                    far = np.abs(table[number] - true) / np.maximum(1, np.abs(true))
                    far = np.where(
                        np.isnan(table[number]) & np.isnan(true), 0, np.nan_to_num(far, nan=np.inf)
                    )
                    apart = max(
                        apart,
                        (float(far.max()), f"{metric} of input {number} is {table[number]}, not {true}"),
                    )
            worst = min(worst, apart)
        if worst[0] > TOLERANCE:
            yield f"'{line.path}' ({tokens}): {worst[1]}"
    if heads is not None and shown != heads:
        yield f"'{line.path}' has {shown} heads in the table, {heads} in its configuration"


def _counting(evidence: Evidence, call: Call, tokens: str, number: int) -> Tensor:
    """Which queries of a call count for a token set: real ones, those behind the prefix, or the prefix."""
    counting = torch.ones(call.lengths[0], dtype=torch.bool)
    mask = evidence.masks[number] if number < len(evidence.masks) else None
    if mask is not None and mask.shape == counting.shape:
        counting &= mask
    if tokens in ("patch", "cls", "registers"):
        counting &= (torch.arange(len(counting)) >= (evidence.prefix or 0)) == (tokens == "patch")
    return counting


def _of_its_own(calls: list[Call]) -> list[Call]:
    """Calls with as many keys as queries, where a module makes others as well."""
    return [call for call in calls if len(set(call.lengths)) == 1] or calls


def subtracted(calls: list[Call], factor: float) -> list[Call]:
    """Two calls on the same values as one: the first map without `factor` times the second; else nothing."""
    values = [call.value for call in calls]
    if len(calls) != 2 or values[0] is None or values[1] is None or not torch.equal(values[0], values[1]):
        return []
    one, other = calls
    assert one.output is not None
    assert other.output is not None
    (first, seen), (second, _) = weights_of(one), weights_of(other)
    both = Call(one.path, one.run, True, value=one.value, output=one.output - factor * other.output)
    both.pattern, both.seen = first - factor * second, seen
    return [both]


def _apart(
    evidence: Evidence,
    calls: list[list[Call]],
    layout: tuple[int, int | None],
    by_metric: Mapping[str, np.ndarray],
    tokens: str,
    undefined: frozenset[str],
) -> tuple[float, str]:
    """The largest difference between the table and the reference, and where it is.

    undefined: metrics that may be without a number in the table.
    """
    worst = (0.0, "")
    for number, of_input in enumerate(calls):
        other = calls[1 - number if number < 2 else 0]
        rows = [
            counted(evidence, call, beside, layout, tokens, number, len(of_input))
            for call, beside in zip(of_input, other, strict=True)
        ]
        right = numbers(rows)
        for metric, table in by_metric.items():
            true = right[metric].numpy()
            if table[number].shape != true.shape:
                return np.inf, f"{table.shape[1]} heads where {len(true)} are"
            apart = np.abs(table[number] - true) / np.maximum(1, np.abs(true))
            apart = np.where(
                np.isnan(table[number]) & (np.isnan(true) | (metric in undefined)),
                0,
                np.where(np.isnan(apart), np.inf, apart),
            )
            if apart.max() > worst[0]:
                head = int(apart.argmax())
                told, truth = table[number][head], true[head]
                worst = (
                    float(apart.max()),
                    f"{metric} of input {number}, head {head} is {told:.5f}, not {truth:.5f}",
                )
    return worst


def counted(
    evidence: Evidence,
    call: Call,
    other: Call,
    layout: tuple[int, int | None],
    tokens: str,
    number: int,
    calls: int,
) -> Rows:
    """A call with the tokens that count: without padding, and for patches without what stands beside them.

    other: the same call of another input; rows of V that are the same in both stand for nothing of an input.
    """
    rows = rows_of(call, layout)
    prompts = getattr(getattr(evidence.root, "config", None), "prompt_length", 0)  # tokens of their own
    constant = _constant(call, other, layout)
    if constant is not None and prompts:
        constant[:, :prompts] = False
    windows = rows.value.shape[0] > 1 or calls > 1
    first = _first_like(evidence.calls[number], call) is call  # prefix tokens are the same in the first one
    ahead = rows.visible.triu(1).any()  # in a causal call, first tokens that are the same stay the same
    words = (
        rows.among.shape[1] in evidence.texts
    )  # the same word in the same place of two texts is no padding
    between = constant is not None and not windows and not words and _between(constant[0])
    if between and constant is not None:
        between = _stays(evidence, call, layout, number, constant)
    of_windows = _prefix_of_windows(evidence, call, layout, number)
    if constant is not None and of_windows is not None:
        constant &= ~of_windows
    if constant is not None and ahead and not constant.all() and (windows or between or not first):
        rows.among &= ~constant
    rows.among &= ~_seen_by_none(evidence.calls[number], call, layout)
    mask = evidence.masks[number] if number < len(evidence.masks) else None
    if mask is not None and rows.among.shape == (1, len(mask)):
        hidden = ~rows.visible[:, :, mask][..., ~mask].any()
        # causality alone hides what is at the end; padding is hidden from itself, too
        causal = not ahead and bool(rows.visible.diagonal(dim1=-2, dim2=-1)[..., ~mask].any())
        if hidden and not causal:
            rows.among &= mask
    if tokens in ("patch", "cls", "registers") and (of_windows is not None or not windows):
        beside = _beside(evidence, rows.among.shape[1]) if of_windows is None else of_windows
        rows.among &= ~beside if tokens == "patch" else beside
    return rows


def _prefix_of_windows(
    evidence: Evidence, call: Call, layout: tuple[int, int | None], number: int
) -> Tensor | None:
    """Tokens that each window has of its own, `[row, token]` of a call; None where there are none.

    They are at the same places of all windows, the same for all inputs in the first call over as many tokens
    in all, and others in every later one.
    """
    stack = re.sub(r"\d+", "#", call.path)
    pairs = zip(evidence.calls[number], evidence.calls[1 - number if number < 2 else 0], strict=False)
    alike = [_constant(one, other, layout) for one, other in pairs if re.sub(r"\d+", "#", one.path) == stack]
    here = rows_of(call, layout).among
    first, *later = [x for x in alike if x is not None and x.numel() == here.numel()] or [here]
    rows = max((len(x) for x in (first, *later)), default=1)
    if rows == 1 or not later or first.all() or any(x.any() for x in later):
        return None
    each = first.reshape(rows, -1)
    return first.reshape(here.shape) if each.any() and bool((each == each[0]).all()) else None


def _seen_by_none(calls: list[Call], call: Call, layout: tuple[int, int | None]) -> Tensor:
    """Which keys no query sees, `[row, token]`, neither here nor in the other layers over as many tokens.

    A layer that selects keys may leave out one here and one there: those are tokens like others.
    """
    stack = re.sub(r"\d+", "#", call.path)
    alike = [
        rows_of(one, layout).visible
        for one in calls
        if re.sub(r"\d+", "#", one.path) == stack and one.lengths == call.lengths and one.value is not None
    ]
    here = rows_of(call, layout).visible
    seen = torch.stack([x.any(1).any(1) for x in alike if x.shape == here.shape])
    return ~seen.any(0)


def _first_like(calls: list[Call], call: Call) -> Call:
    """The first call of the same stack of blocks over as many tokens; itself, if it is beside that."""
    stack = re.sub(r"\d+", "#", call.path)
    first = next(
        one for one in calls if re.sub(r"\d+", "#", one.path) == stack and one.lengths == call.lengths
    )
    beside = re.compile(r"(?<=attns\.)\d+|(?<=fns\.)\d+")  # layers that read the same tokens side by side
    return call if beside.sub("#", first.path) == beside.sub("#", call.path) else first


def _constant(call: Call, other: Call, layout: tuple[int, int | None]) -> Tensor | None:
    """Which rows of V are the same in both: `[row, token]`.

    Same but for rounding, and beside how far other rows are apart: all of a model's may be close.
    """
    if call.value is None or other.value is None or other.value.shape != call.value.shape:
        return None
    here, there = (rows_of(one, layout).value for one in (call, other))
    apart = (here - there).abs().amax((1, 3))
    least = 1e-6 * here.abs().amax().clamp(min=1e-12)
    if apart.amax() <= least:  # what is left is rounding, and tells nothing
        return torch.ones_like(apart, dtype=torch.bool)
    return apart <= torch.minimum(least, SAME * apart.amax())


def _stays(
    evidence: Evidence, call: Call, layout: tuple[int, int | None], number: int, constant: Tensor
) -> bool:
    """Whether what is the same for two inputs still is in the last layer over as many tokens.

    Learned tokens, as those that stand for what is to be predicted, are others by then.
    """
    stack = re.sub(r"\d+", "#", call.path)
    here, there = (evidence.calls[place] for place in (number, 0 if number else 1))
    pairs = [
        (one, other)
        for one, other in zip(here, there, strict=False)
        if re.sub(r"\d+", "#", one.path) == stack and one.lengths == call.lengths
    ]
    last = _constant(*pairs[-1], layout) if pairs else None
    return last is None or last.shape != constant.shape or bool((last & constant).any())


def _between(constant: Tensor) -> bool:
    """Whether tokens that stay the same stand between others, as those that fill up a grid do."""
    places = (~constant).nonzero()[:, 0]
    return len(places) > 0 and bool(constant[places[0] : places[-1]].any())


def _beside(evidence: Evidence, tokens: int) -> Tensor:
    """Which tokens are no patches: those that are the same for all inputs in the first call over so many.

    Where none is, those that are known of the architecture, in a call over as many tokens as the first one or
    fewer: patches are pooled, and class tokens are handed on.
    """
    pairs = list(zip(evidence.calls[0], evidence.calls[1], strict=False))
    first, other = next((pair for pair in pairs if pair[0].lengths == (tokens, tokens)), pairs[0])
    found = torch.zeros(tokens, dtype=torch.bool)
    if first.value is not None and other.value is not None:
        layout = layouts(first, None)[0]
        same = _constant(first, other, layout)
        if same is not None and same.shape == (1, tokens) and not same.all():
            found = same[0]
    if evidence.prefix and not found.any() and tokens <= pairs[0][0].lengths[0]:
        found[: evidence.prefix] = True
    return found

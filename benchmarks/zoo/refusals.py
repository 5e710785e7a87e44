"""Whether a refusal gives a true reason: each kind of message is checked against what the judge saw."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from zoo.evidence import Evidence
from zoo.observer import Calls
from zoo.provenance import OWN

Check = Callable[[Evidence, re.Match[str]], bool]


def _within(path: str, of: str) -> bool:
    return path == of or path.startswith(f"{of}.") or of.startswith(f"{path}.")


def _eager(seen: Evidence, match: re.Match[str]) -> bool:
    """A softmax of its own is a reason only where its values are not seen, or are not of its own tokens."""
    named = re.search(r"in '([^']*)'", match.string)
    softmaxes = seen.together.softmaxes if isinstance(seen.together, Calls) else []
    there = bool(seen.eager) or any(_within(path, named[1]) for path in softmaxes if named)
    return there and _none_of_its_own(seen, match)


def _none_of_its_own(seen: Evidence, match: re.Match[str]) -> bool:
    return OWN not in seen.kinds.values()


def _rows(seen: Evidence, match: re.Match[str]) -> bool:
    rows, inputs = int(match[1]), int(match[2])
    found = {call.value.shape[0] for call in seen.together if call.value is not None}
    return inputs == seen.inputs and rows in found and rows % inputs != 0


def _runs(seen: Evidence, match: re.Match[str]) -> bool:
    runs = Counter({call.path: call.run + 1 for call in seen.together})
    return any(_within(path, match[1]) and count > 1 for path, count in runs.items())


def _several(seen: Evidence, match: re.Match[str]) -> bool:
    """Whether a module calls attention several times in one run of it."""
    calls = Counter((call.path, call.run) for call in seen.together)
    return any(_within(path, match[1]) and count > 1 for (path, _), count in calls.items())


def _none_in_tower(seen: Evidence, match: re.Match[str]) -> bool:
    """Whether what is named, a layer of the tower that was asked for, is not over its own tokens."""
    return OWN not in seen.kinds_within(match[1])


def _pairs(seen: Evidence, match: re.Match[str]) -> bool:
    """Whether the model does not take what is said that it does not take: one image for each input."""
    given = seen.batch.get("pixel_values") if isinstance(seen.batch, Mapping) else None
    return given is not None and given.ndim == 5 and "5D" in match.string


def _silent(seen: Evidence, match: re.Match[str]) -> bool:
    return not any(_within(path, match[1]) for path in seen.seen)


def _single(seen: Evidence, match: re.Match[str]) -> bool:
    of_equal = [call.lengths for call in seen.together if len(set(call.lengths)) == 1]
    return all(queries == 1 for queries, _ in of_equal)


def _differ(told: str) -> bool:
    return len(set(re.findall(r": (\d+)", told))) > 1


CHECKS: tuple[tuple[str, Check], ...] = (
    (r"no layer of its \w+ tower attends to its own tokens \('([^']*)'", _none_in_tower),
    (r"'([^']*)': it calls attention several times in one run", _several),
    (r"comput\w+ (softmax )?attention (by )?itself|softmax itself|eager", _eager),
    (r"made no self-attention call|no self-attention layer|no attention layer", _none_of_its_own),
    (r"no layer attends to its own tokens", _none_of_its_own),
    (r"over channels|over heads|cross-attention|pooling|of many tokens|not in the order", _none_of_its_own),
    (r"ran (\d+) rows for (\d+) inputs", _rows),
    (r"layer '([^']*)' ran \d+ times", _runs),
    (r"'([^']*)' (?:finished without a call|was never run)", _silent),
    (r"none of the metrics has a number", _single),
    (r"drops attention weights at random", lambda seen, match: any(call.dropout for call in seen.together)),
    (r"same input twice|draws at random|at random|train mode", lambda seen, match: seen.random),
    (
        r"(?:one|other|another) input'?s|inputs? (?:are|is) mixed|sequence first|inputs mix|batch_first",
        lambda seen, match: seen.coupled,
    ),
    (
        r"takes '(\w+)', neither images nor text",
        lambda seen, match: match[1] not in ("pixel_values", "input_ids"),
    ),
    (
        r"needs '([^']*)', which its image processor does not give",
        lambda seen, match: "pixel_values" not in match[1],
    ),
    (r"tensors of one batch differ in rows: \{(.*)\}", lambda seen, match: _differ(match[1])),
    (
        r"folder '([^']*)' has no preprocessor_config.json",
        lambda seen, match: not (Path(match[1]) / "preprocessor_config.json").exists(),
    ),
    (r"fails on its own input", lambda seen, match: bool(seen.failed) or _pairs(seen, match)),
    (r"is not understood|several maps|differential", lambda seen, match: "report" not in match.string),
)


def faults_of_refusal(message: str, seen: Evidence) -> list[str]:
    """What is false about a refusal; nothing where its reason is true."""
    if re.search(r"report (this|the) (model|one)", message):
        return [f"asks to report the model: {message}"]
    for pattern, true in CHECKS:
        match = re.search(pattern, message)
        if match:
            return [] if true(seen, match) else [f"not true: {message}"]
    return [f"a reason that the judge does not know: {message}"]

"""What an audit says: one sentence on hooks and one on leaks per tower, and the tables. No torch."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from diag.errors import spans

# --- the cases of leaks

IN_BATCH = "batch"
UNEQUAL = "padded images"
RIGHT, LEFT = "padded right", "padded left"
UNCOUNTED, UNMASKED = "padded left without positions", "padded right without mask"
PLAIN, BLOCKS = "packed", "packed with block mask"
RESTART, UNCACHED = "packed with positions", "packed with positions without cache"
"""Positions of padding on the left are counted from the first real token, as `generate()` does, or left to
`forward()`. Packed documents: one behind the other and nothing said; with positions that start anew; with a
mask of a block for each."""

OTHER_INPUT, PADDING, DOCUMENT, ALONE = "other input", "padding", "other document", "alone"
"""What is changed; the last compares the watched input in the batch with itself alone."""

NONE, ROUNDING, LEAK, DIFFERS, NOT_TESTED = "none", "rounding", "leak", "differs", "not tested"

FINAL = -1
"""In the place of a layer's number: what the tower returns."""

BY_DESIGN = (PLAIN,)
"""Cases in which the one is meant to reach the other, unless something says that they are two."""

# --- why hooks differ

SAME = "the same"
REPEATED = "repeated heads"
INTERLEAVED = "interleaved heads"
ELSEWHERE = "other channels"
LATENT = "latent attention"
NORM = "norm"
SCALED = "scaled"
CONSTANT = "folded bias"
SHARED = "shared values"
OTHER_ORDER = "tokens in another order"
OTHER_TOKENS = "other tokens"
CONVOLVED = "made of several tokens"
GATE = "gate"
SUM = "something is added"
NEVER = "the hook never fires"
MISSING = "no such module"
UNEXPLAINED = "not explained"

IS_USED = (SAME, REPEATED)
"""Reasons with which a hook shows what attention uses, to the rounding of its numbers."""


def verdicts(hooks: pd.DataFrame, leaks: pd.DataFrame) -> dict[str, dict[str, str]]:
    """ "MODEL · TOWER" -> "hooks" and "leaks", a sentence each; what was not audited has none."""
    found = dict[str, dict[str, str]]()
    for name, table, sentence in (("hooks", hooks, on_hooks), ("leaks", leaks, on_leaks)):
        for (model, tower), rows in table.groupby(["model", "tower"], sort=False):
            found.setdefault(f"{model} · {tower}", {})[name] = sentence(rows)
    return found


def on_hooks(rows: pd.DataFrame) -> str:
    """Whether what people hook is what attention uses, of one tower, in a sentence."""
    said = list[str]()
    for (hook, of), part in rows.groupby(["hook", "of"], sort=False):
        used = part["reason"].isin(IS_USED)
        many = len(part) > 1
        if used.all():
            said.append(f"{hook} is {of} in {'all ' if many else ''}{layers_of(part)}")
            continue
        whys = [
            f"{_told(str(why), group)} in {layers_of(group)}"
            for why, group in part[~used].groupby("reason", sort=False)
        ]
        kept = f", and is in {layers_of(part[used])}" if used.any() else ""
        said.append(f"{hook} is not {of} ({'; '.join(whys)}){kept}")
    return "; ".join(said)


def _told(why: str, rows: pd.DataFrame) -> str:
    """A reason with its particulars, where these are the same in all layers."""
    details = set(rows["detail"].fillna(""))
    return f"{why}, {details.pop()}," if len(details) == 1 and details != {""} else why


def on_leaks(rows: pd.DataFrame) -> str:
    """Whether batches of one tower leak, in a sentence."""
    exact, close, leaky, untold, apart = (list[str]() for _ in range(5))
    for case, part in rows.groupby("case", sort=False):
        changed, alone = part[part["changed"] != ALONE], part[part["changed"] == ALONE]
        reached = changed[changed["level"] == LEAK]
        if len(reached):
            where, what = (
                _place(in_depth(reached)),
                ", ".join(f"the {one}" for one in reached["changed"].unique()),
            )
            why = "by design, " if case in BY_DESIGN else ""
            leaky.append(f"{case} ({why}{what}: {reached['change'].max():.2g} {where})")
        elif (changed["level"] == NOT_TESTED).all():
            untold.append(f"{case} ({changed['why'].iloc[0]})")
        else:
            (close if (changed["level"] == ROUNDING).any() else exact).append(str(case))
        if (differs := alone[alone["level"] == DIFFERS]).size and not len(reached):
            apart.append(f"{case} ({differs['change'].max():.2g})")
    parts = {
        "no leak, to the bit": exact,
        "no leak, to rounding": close,
        "LEAK": leaky,
        "other numbers than alone": apart,
        "not tested": untold,
    }
    return "; ".join(f"{words}: {', '.join(cases)}" for words, cases in parts.items() if cases)


def worst(levels: Iterable[str]) -> str:
    """The gravest of some levels."""
    order = (NONE, NOT_TESTED, ROUNDING, DIFFERS, LEAK)
    return max(levels, key=order.index)


def layers_of(rows: pd.DataFrame) -> str:
    """`layers 0-5`, or `layer 3`."""
    numbers = sorted(set(rows["layer"]))
    return f"layer{'s' if len(numbers) > 1 else ''} {spans(numbers)}"


def in_depth(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows from the first layer on, what the tower returns last."""
    return rows.assign(last=rows["layer"] == FINAL).sort_values(["last", "layer"], kind="stable")


def _place(rows: pd.DataFrame) -> str:
    first = int(rows["layer"].iloc[0])
    return "in the output" if first == FINAL else f"from layer {first} on"

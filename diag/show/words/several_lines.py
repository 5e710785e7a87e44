"""Lines beside each other, in sentences: the strongest bias and how sure that is, a trend, the control."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pandas as pd

from diag.results.collect import Collection
from diag.results.decimals import fixed
from diag.results.profiles import FEWEST, differences, strongest
from diag.show.words.control import alike, control_sentence
from diag.show.words.ledger import ledger_sentence
from diag.show.words.one_line import NULLS
from diag.show.words.phrases import Found, Profile, listed, profile_of, share

FEW = 20
"""Inputs below which percentile intervals are noticeably too narrow."""

ORDERS = (("patch_size", "patch size"), ("n_tokens", "T"), ("layer_count", "number of layers"))
"""What may put lines in an order: column, name."""


def comparison(
    collection: Collection,
    profiles: pd.DataFrame,
    known: pd.DataFrame | None = None,
    *,
    control: str | None = None,
    seed: int = 0,
) -> list[str]:
    """Sentences over lines: the strongest bias and the next, its nulls, its split, a trend, the control.

    known: differences that were computed already, as of `profiles.differences` with the same seed.
    control: what is controlled between the lines, where they are members of one series.
    """
    sure = strongest(collection.samples, seed=seed)
    if sure.empty:
        return ["The alignment bias was measured in none of the lines.", *_whose(collection)]
    labels = [str(label) for label in sure.index]
    found = {label: profile_of(profiles, label) for label in labels}

    def difference(of: str, to: str) -> Found:
        """Bias of one line less another's, as it is known or from its own two lines."""
        found = None if known is None else _difference(known, of, to)
        found = found or _difference(differences(collection.samples, seed=seed, pairs=[(to, of)]), of, to)
        assert found is not None
        return found

    said = [_most(labels[0], found[labels[0]], sure)]
    if len(labels) > 1:
        said[0] += f" {_next(labels[1], difference(labels[0], labels[1]))}"
    said += [_nulls(found, labels), *_split(found[labels[0]])]
    if control is not None or alike(collection):
        said += _trend(collection, found, difference)
    return [*said, *_whose(collection), *_coverage(collection), *control_sentence(collection, control)]


def _whose(collection: Collection) -> Iterator[str]:
    """Whose y is in each line of which the ledger was measured."""
    for label, part in collection.layers.groupby("label", sort=False):
        if sentence := ledger_sentence(part):
            yield f"{label}: {sentence[0].lower()}{sentence[1:]}"


def _coverage(collection: Collection) -> Iterator[str]:
    """Which lines are not of all layers of their model."""
    if "layer_count" not in collection.layers:
        return
    lines = collection.layers.groupby("label", sort=False)
    found = lines.agg(measured=("layer", "nunique"), count=("layer_count", "max"))
    partial = found[found["measured"] < found["count"]]
    if len(partial):
        parts = [f"{label}, {row['measured']} of {row['count']}" for label, row in partial.iterrows()]
        yield f"Not all layers are measured, and means are over those that are: {'; '.join(parts)}."


def _most(label: str, found: Profile, sure: pd.Series) -> str:
    bias = found["cos_y_vself", "mean"]
    said = f"Strongest mean bias: {label}, {fixed(bias.value)} {bias.interval(n=True)}"
    if len(sure) > 1 and pd.notna(sure.iloc[0]) and bias.n >= FEWEST:
        said += f"; it is the strongest in {share(sure.iloc[0])} of resamples"
    if FEWEST <= bias.n < FEW:
        said += f". With n = {bias.n}, intervals are somewhat too narrow; what follows allows for that"
    return f"{said}."


def _difference(table: pd.DataFrame, of: str, to: str) -> Found | None:
    """Bias of one line less another's, where the table holds it either way round."""
    for a, b, sign in ((to, of, 1), (of, to, -1)):
        rows = table[(table["a"] == a) & (table["b"] == b) & (table["quantity"] == "bias")]
        if len(rows):
            row = rows.iloc[0]
            low, high = sorted((sign * row["ci_low"], sign * row["ci_high"]))
            n = min(row["n_a"], row["n_b"])
            return Found(sign * row["difference"], low, high, n, paired=bool(row["paired"]))
    return None


def _next(label: str, difference: Found) -> str:
    said = f"The next, {label}, is {fixed(difference.value)} lower"
    if difference.n < 2:
        return f"{said}; one input does not tell how sure that is."
    how = "paired by input" if difference.paired else "not paired"
    spread = f"({fixed(difference.low)} to {fixed(difference.high)}, {how})"
    return f"{said} {spread}: {difference.judged('distinguishable', 'not distinguishable')}."


def _nulls(found: dict[str, Profile], labels: Sequence[str]) -> str:
    """Whether the strongest line's bias is more than its nulls, and which of the others' are."""
    first, parts, above = found[labels[0]], [], []
    for metric, null, name in NULLS:
        excess, level = first.get((metric, "mean")), first.get((null, "mean"))
        if excess is None:
            continue
        gives = f"{name} gives {fixed(level.value)}, excess" if level else f"excess over {name}"
        parts.append(f"{gives} {fixed(excess.value)} {excess.interval()}, {excess.judged()}")
        above.append(excess.above)
    if not parts:
        return "Its nulls were not measured, so whether it is more than geometry is open."
    whole = len(parts) == len(NULLS)
    if all(above):
        head = "It is more than both nulls" if whole else "It is more than the one null that was measured"
    elif any(above):
        head = "It is more than one null, but not shown to be more than the other"
    else:
        head = f"It is not shown to be more than {'either null' if whole else 'the one null measured'}"
    said = f"{head}: {'; '.join(parts)}."
    if len(labels) > 1 and whole:
        held = [label for label in labels[1:] if _above_both(found[label])]
        said += (
            f" Of the other lines, {listed(held) or 'none'} {'are' if len(held) > 1 else 'is'} shown to be "
        )
        said += "more than both."
    return said


def _above_both(found: Profile) -> bool:
    excesses = [found.get((metric, "mean")) for metric, _, _ in NULLS]
    return all(excess is not None and excess.above for excess in excesses)


def _split(found: Profile) -> Iterator[str]:
    part = found.get(("self_part", "share"))
    if part is not None and part.known:
        yield (
            f"{share(part.value)} {part.interval(percent=True)} of it is the token attending to itself, "
            "the rest other tokens' values that point the same way."
        )


def _trend(
    collection: Collection, found: dict[str, Profile], difference: Callable[[str, str], Found]
) -> Iterator[str]:
    """Bias along what puts three or more lines in an order: patch size from coarse to fine, T, depth."""
    table = collection.layers[collection.layers["label"].isin(list(found))]
    for column, name in ORDERS:
        if column not in table or len(found) < 3:
            continue
        sizes = pd.to_numeric(table[column], errors="coerce").groupby(table["label"]).max()
        if sizes.isna().any() or sizes.nunique() < len(found):
            continue
        sizes = sizes.sort_values(ascending=column != "patch_size")
        labels = [str(label) for label in sizes.index]
        values = ", ".join(fixed(found[label]["cos_y_vself", "mean"].value) for label in labels)
        rise = difference(labels[-1], labels[0])
        order = ", ".join(f"{size:g}" for size in sizes)
        yield (
            f"Along {name} {order} the mean bias is {values}; from the first to the last of these "
            f"{fixed(rise.value, sign=True)} {rise.interval(sign=True)}, {rise.judged()}."
        )
        return

"""Profiles in plain sentences: what one line shows, which of several is strongest, and how sure that is.

Nothing is claimed beyond the data. Where an interval includes 0, the sentence says "not distinguishable";
where it leaves out 0 only because it is too narrow for so few inputs, "too close to call"; with fewer than
five inputs, that they are too few to judge. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from diag.results.collect import Collection
from diag.results.profiles import FEWEST, SMALLEST, UNCLEAR, differences, strongest
from diag.show.words.control import alike, control_sentence, uncontrolled
from diag.show.words.phrases import Found, Profile, layer_of, listed, number, profile_of, share

__all__ = ["comparison", "summary", "uncontrolled"]

FEW = 20
"""Inputs below which percentile intervals are noticeably too narrow."""

SHAPES = {
    "falling": "falls with depth",
    "rising": "rises with depth",
    "U": "falls and rises again (U)",
    "inverted U": "rises and falls again (inverted U)",
    "mixed": "goes up and down by turns",
    "flat": f"is flat over depth, within {SMALLEST} of its mean",
}
NULLS = (
    ("excess", "cos_y_vpartner", "another token's value"),
    ("excess_over_uniform", "cos_y_vuniform", "uniform attention"),
)
ORDERS = (("patch_size", "patch size"), ("n_tokens", "T"), ("layer_count", "number of layers"))
"""What may put lines in an order: column, name."""


@dataclass(frozen=True)
class Difference(Found):
    """A difference between two lines; paired: all their inputs are the same."""

    paired: bool = False


def summary(collection: Collection, profiles: pd.DataFrame, label: str) -> list[str]:
    """Sentences about one line: its strongest layer with nulls and split, means over layers, depth.

    profiles: as of `diag.results.profiles.profiles`. Sentences whose metrics were not measured are left out.
    """
    found = profile_of(profiles, label)
    said = [
        *_strongest_layer(collection.layers[collection.layers["label"] == label]),
        *_over_layers(found),
        *_depth(found, "cos_y_vself", "bias"),
        *_depth(found, "value_similarity", "similarity of values"),
        *_growth(found),
    ]
    return said or ["The alignment bias was not measured here."]


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
        return ["The alignment bias was measured in none of the lines."]
    labels = [str(label) for label in sure.index]
    found = {label: profile_of(profiles, label) for label in labels}

    def difference(a: str, b: str) -> Difference:
        """Bias of a - b, as it is known or from its own two lines."""
        for one, other, sign in ((a, b, 1), (b, a, -1)):
            if known is not None and (row := _bias_row(known, one, other)) is not None:
                return _difference(row, sign)
        row = _bias_row(differences(collection.samples, seed=seed, pairs=[(a, b)]), a, b)
        assert row is not None
        return _difference(row, 1)

    said = [_most(found[labels[0]], sure)]
    if len(labels) > 1:
        said[0] += f" {_next(labels[1], difference(labels[0], labels[1]))}"
    said += [_nulls(found, labels), *_split(found[labels[0]])]
    if control is not None or alike(collection):
        said += _trend(collection, found, difference)
    return [*said, *control_sentence(collection, control)]


# --- one line


def _strongest_layer(layers: pd.DataFrame) -> Iterator[str]:
    biases = layers[(layers["metric"] == "cos_y_vself") & layers["mean"].notna()]
    if biases.empty:
        return
    layer = int(biases["layer"].to_numpy()[biases["mean"].to_numpy().argmax()])
    at = layer_of(layers, layer)
    bias, where = at["cos_y_vself"], ", where it is strongest," if len(biases) > 1 else ""
    said = (
        f"In layer {layer}{where} the bias is {number(bias.value)} {bias.interval(n=True)}: the mean cosine "
    )
    said += "between what attention returns to a token and that token's own value"
    if "removed_energy" in at:
        said += (
            f"; {share(at['removed_energy'].value)} of the energy of what it returns lies along that value"
        )
    yield f"{said}."
    if "cos_y_vuniform" in at:
        uniform = at["cos_y_vuniform"].value
        said = f"Uniform attention over the same values would give {number(uniform)}"
        if uniform > bias.value:
            yield f"{said}, more than the {number(bias.value)} that is there."
        else:
            part = f" ({share(uniform / bias.value)})" if bias.value > 0 else ""
            yield f"{said} of the {number(bias.value)}{part}."
    if "cos_y_vpartner" in at:
        said = "Compared with another token's value instead of its own, the cosine is "
        said += number(at["cos_y_vpartner"].value)
        if "excess" in at:
            excess = at["excess"]
            said += f"; the excess of {number(excess.value)} {excess.interval()} is {excess.judged()}"
        yield f"{said}."
    if "self_part" in at and bias.value > 0:
        own = at["self_part"].value
        yield (
            f"{number(own)} of the {number(bias.value)} ({share(own / bias.value)}) is the token attending "
            "to itself; the rest is other tokens whose values point the same way."
        )


def _over_layers(found: Profile) -> Iterator[str]:
    bias = found.get(("cos_y_vself", "mean"))
    if bias is None:
        return
    parts = [
        f"{number(excess.value, sign=True)} {excess.interval()} over {name}, {excess.judged()}"
        for metric, _, name in NULLS
        if (excess := found.get((metric, "mean")))
    ]
    said = f"Mean over layers: bias {number(bias.value)} {bias.interval(n=True)}"
    yield f"{said}; excess {'; '.join(parts)}." if parts else f"{said}."


def _depth(found: Profile, metric: str, name: str) -> Iterator[str]:
    rise = found.get((metric, "last_minus_first"))
    if rise is None or not rise.known:
        return
    first, lowest, last = (found[metric, quantity] for quantity in ("first", "minimum", "last"))
    way = f"{number(first.value)} in layer {first.layer:.0f}, "
    if lowest.layer not in (first.layer, last.layer):
        way += (
            f"lowest {number(lowest.value)} in layer {lowest.layer:.0f} (relative depth {lowest.depth:.2f}), "
        )
    way += f"{number(last.value)} in layer {last.layer:.0f}; "
    way += f"last − first {number(rise.value, sign=True)} {rise.interval(sign=True)}"
    shape, likeliest = found[metric, "shape"], found[metric, "likeliest_shape"]
    if shape.word in SHAPES:
        yield f"The {name} {SHAPES[shape.word]}, in {share(shape.value)} of resamples: {way}."
    elif likeliest.word == UNCLEAR:
        yield f"The {name} over depth: {way}. Too few inputs to name its shape."
    else:
        seen = f"{share(likeliest.value)} of resamples look {_look(likeliest.word)}"
        yield f"The shape of the {name} over depth is not decided by these data ({seen}): {way}."


def _look(word: str) -> str:
    return f"like {'an' if word == 'inverted U' else 'a'} {word}" if word.endswith("U") else word


def _growth(found: Profile) -> Iterator[str]:
    growth, onset = (found.get(("value_similarity", quantity)) for quantity in ("growth", "onset"))
    if growth is None or onset is None or not growth.known:
        return
    low, high = (f"{end:.2f}" for end in (growth.low, growth.high))
    spread = "one input, no interval" if pd.isna(growth.low) else f"{low} to {high}"
    said = f"From {growth.word} the similarity of values changes by a factor of {growth.value:.2f} ({spread})"
    if onset.known:
        said += f"; after layer {onset.value:.0f} it stays above its lowest value"
    elif onset.n >= FEWEST:
        said += "; there is no layer after which it stays above its lowest value"
    yield f"{said}."


# --- several lines


def _most(found: Profile, sure: pd.Series) -> str:
    bias = found["cos_y_vself", "mean"]
    said = f"Strongest mean bias: {sure.index[0]}, {number(bias.value)} {bias.interval(n=True)}"
    if len(sure) > 1 and pd.notna(sure.iloc[0]) and bias.n >= FEWEST:
        said += f"; it is the strongest in {share(sure.iloc[0])} of resamples"
    if FEWEST <= bias.n < FEW:
        said += f". With n = {bias.n}, intervals are somewhat too narrow; what follows allows for that"
    return f"{said}."


def _bias_row(table: pd.DataFrame, a: str, b: str) -> pd.Series | None:
    rows = table[(table["a"] == a) & (table["b"] == b) & (table["quantity"] == "bias")]
    return rows.iloc[0] if len(rows) else None


def _difference(row: pd.Series, sign: int) -> Difference:
    low, high = sorted((sign * row["ci_low"], sign * row["ci_high"]))
    n = min(row["n_a"], row["n_b"])
    return Difference(sign * row["difference"], low, high, n, paired=bool(row["paired"]))


def _next(label: str, difference: Difference) -> str:
    said = f"The next, {label}, is {number(difference.value)} lower"
    if difference.n < 2:
        return f"{said}; one input does not tell how sure that is."
    how = "paired by input" if difference.paired else "not paired"
    spread = f"({number(difference.low)} to {number(difference.high)}, {how})"
    return f"{said} {spread}: {difference.judged('distinguishable', 'not distinguishable')}."


def _nulls(found: dict[str, Profile], labels: Sequence[str]) -> str:
    """Whether the strongest line's bias is more than its nulls, and which of the others' are."""
    first, parts, above = found[labels[0]], [], []
    for metric, null, name in NULLS:
        excess, level = first.get((metric, "mean")), first.get((null, "mean"))
        if excess is None:
            continue
        gives = f"{name} gives {number(level.value)}, excess" if level else f"excess over {name}"
        parts.append(f"{gives} {number(excess.value)} {excess.interval()}, {excess.judged()}")
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
    collection: Collection,
    found: dict[str, Profile],
    difference: Callable[[str, str], Difference],
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
        values = ", ".join(number(found[label]["cos_y_vself", "mean"].value) for label in labels)
        rise = difference(labels[-1], labels[0])
        order = ", ".join(f"{size:g}" for size in sizes)
        yield (
            f"Along {name} {order} the mean bias is {values}; from the first to the last of these "
            f"{number(rise.value, sign=True)} {rise.interval(sign=True)}, {rise.judged()}."
        )
        return

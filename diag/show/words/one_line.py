"""What one line shows, in sentences: its strongest layer, means over layers, the way over depth."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from diag.errors import spans
from diag.results.caveats import caveats
from diag.results.collect import Collection
from diag.results.decimals import fixed
from diag.results.profiles import DOUBTS, FEWEST, SMALLEST, UNCLEAR
from diag.show.words.control import random_lines
from diag.show.words.ledger import ledger_sentence
from diag.show.words.phrases import Profile, doubt_of, layer_of, profile_of, share
from diag.show.words.unusual import unusual

SHAPES = {
    "falling": "falls with depth",
    "rising": "rises with depth",
    "U": "falls and rises again (U)",
    "inverted U": "rises and falls again (inverted U)",
    "mixed": "goes up and down by turns",
    "flat": f"is flat over depth, within {SMALLEST} of its mean",
}
LIKE = {"U": "like a U", "inverted U": "like an inverted U"}
NULLS = (
    ("excess", "cos_y_vpartner", "another token's value"),
    ("excess_over_uniform", "cos_y_vuniform", "uniform attention"),
)
"""Metric of the excess, metric of the null, what it compares with."""


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
    said += filter(None, [ledger_sentence(collection.layers[collection.layers["label"] == label])])
    if said:
        said += coverage(collection.layers[collection.layers["label"] == label])
        said += unusual(collection.layers[collection.layers["label"] == label])
    first = collection.layers[collection.layers["label"] == label].iloc[0]
    others = [words for words in caveats(first) if words != "random weights"]
    if said and others:
        said.append(f"To be known: {', '.join(others)}.")
    if said and label in random_lines(collection):
        said.append("The weights are random, nothing was learned: such numbers show the architecture alone.")
    return said or ["The alignment bias was not measured here."]


def coverage(layers: pd.DataFrame) -> list[str]:
    """How many of the model's layers are behind a line, where not all are; as a sentence, or none."""
    measured = set(layers["layer"])
    count = int(layers["layer_count"].max()) if "layer_count" in layers else len(measured)
    if len(measured) == count:
        return []
    which = f"layer{'s' if len(measured) > 1 else ''} {spans(measured)}"
    return [f"Of the model's {count} layers, {len(measured)} are measured ({which}): all of this is of them."]


def _strongest_layer(layers: pd.DataFrame) -> Iterator[str]:
    biases = layers[(layers["metric"] == "cos_y_vself") & layers["mean"].notna()]
    if biases.empty:
        return
    layer = int(biases["layer"].to_numpy()[biases["mean"].to_numpy().argmax()])
    at = layer_of(layers, layer)
    bias, where = at["cos_y_vself"], ", where it is strongest," if len(biases) > 1 else ""
    said = f"In layer {layer}{where} the bias is {fixed(bias.value)} {bias.interval(n=True)}: the mean "
    said += "cosine between what attention returns to a token and that token's own value"
    if "removed_energy" in at:
        along = share(at["removed_energy"].value)
        said += f"; {along} of the energy of what it returns lies along that value"
    yield f"{said}."
    if "cos_y_vuniform" in at:
        uniform = at["cos_y_vuniform"].value
        said = f"Uniform attention over the same values would give {fixed(uniform)}"
        if uniform > bias.value:
            yield f"{said}, more than the {fixed(bias.value)} that is there."
        else:
            part = f" ({share(uniform / bias.value)})" if bias.value > 0 else ""
            yield f"{said} of the {fixed(bias.value)}{part}."
    if "cos_y_vpartner" in at:
        said = "Compared with another token's value instead of its own, the cosine is "
        said += fixed(at["cos_y_vpartner"].value)
        if "excess" in at:
            excess = at["excess"]
            said += f"; the excess of {fixed(excess.value)} {excess.interval()} is {excess.judged()}"
        yield f"{said}."
    if "self_part" in at and bias.value > 0:
        own = at["self_part"].value
        yield (
            f"{fixed(own)} of the {fixed(bias.value)} ({share(own / bias.value)}) is the token attending "
            "to itself; the rest is other tokens whose values point the same way."
        )


def _over_layers(found: Profile) -> Iterator[str]:
    bias = found.get(("cos_y_vself", "mean"))
    if bias is None:
        return
    parts = [
        f"{fixed(excess.value, sign=True)} {excess.interval()} over {name}, {excess.judged()}"
        for metric, _, name in NULLS
        if (excess := found.get((metric, "mean")))
    ]
    said = f"Mean over layers: bias {fixed(bias.value)} {bias.interval(n=True)}"
    yield f"{said}; excess {'; '.join(parts)}." if parts else f"{said}."


def _depth(found: Profile, metric: str, name: str) -> Iterator[str]:
    rise = found.get((metric, "last_minus_first"))
    if rise is None or not rise.known:
        return
    first, lowest, last = (found[metric, quantity] for quantity in ("first", "minimum", "last"))
    way = f"{fixed(first.value)} in layer {first.layer:.0f}, "
    if lowest.layer not in (first.layer, last.layer):
        way += f"lowest {fixed(lowest.value)} in layer {lowest.layer:.0f} "
        way += f"(relative depth {lowest.depth:.2f}), "
    way += f"{fixed(last.value)} in layer {last.layer:.0f}; "
    way += f"last − first {fixed(rise.value, sign=True)} {rise.interval(sign=True)}"
    shape, likeliest = found[metric, "shape"], found[metric, "likeliest_shape"]
    if shape.word in SHAPES:
        yield f"The {name} {SHAPES[shape.word]}, in {share(shape.value)} of resamples: {way}."
    elif likeliest.word == UNCLEAR:
        yield f"The {name} over depth: {way}. Too few inputs to name its shape."
    else:
        seen = f"{share(likeliest.value)} of resamples look {LIKE.get(likeliest.word, likeliest.word)}"
        doubt = doubt_of(found, metric)
        seen += f", but {doubt}"
        seen += ", judged over all pairs of layers at once" if doubt in DOUBTS.values() else ""
        yield f"The shape of the {name} over depth is not decided by these data ({seen}): {way}."


def _growth(found: Profile) -> Iterator[str]:
    growth, onset = (found.get(("value_similarity", quantity)) for quantity in ("growth", "onset"))
    if growth is None or onset is None or not growth.known:
        return
    factor, low, high = (fixed(end, 2) for end in (growth.value, growth.low, growth.high))
    spread = "one input, no interval" if pd.isna(growth.low) else f"{low} to {high}"
    said = f"From {growth.word} the similarity of values changes by a factor of {factor} ({spread})"
    if onset.known:
        said += f"; after layer {onset.value:.0f} it stays above its lowest value"
    elif onset.n >= FEWEST:
        said += "; there is no layer after which it stays above its lowest value"
    yield f"{said}."

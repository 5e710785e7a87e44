"""Whether lines are a controlled comparison: the series that holds them, what differs, and what may."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from diag.models.families import FAMILIES, family_of
from diag.models.names.series import listing
from diag.models.names.spec import HUB
from diag.results.caveats import CAVEATS, RANDOM, apart
from diag.results.collect import Collection
from diag.show.words.phrases import listed

FACTORS = {"patch_size": "patch size", "image_size": "image size", "n_tokens": "T", "weights": "weights"}
STEP = {"t": "time step"}
"""What a controlled comparison may vary, one at a time; diffusion models also their time step."""
CONDITIONS = {
    "tower": "towers",
    "tokens": "token sets",
    "values": "ways of taking values",
    "intervention": "interventions",
    "dtype": "dtypes",
    "content": "inputs",
}
"""What no series varies: how and on what was measured."""

SIZES = r",(?:img_size|patch_size|t)=[^,]*"
"""Arguments of a name that fit weights to another size or say at which time step they are looked at: the hash
may change, the checkpoint does not."""


def series_control(collection: Collection) -> str | None:
    """What is controlled in the first series that holds all models; None: no such series, or one model."""
    models = [
        {str(entry["given"]), str(entry.get("resolved", entry["given"]))} for entry in _entries(collection)
    ]
    if len({frozenset(names) for names in models}) < 2:
        return None
    for series in listing():
        if all(names & set(series["members"]) for names in models):
            return str(series["control"])
    return None


def _entry(collection: Collection, run: str, model: str, tower: str) -> Mapping[str, Any]:
    """What the manifest of a line's run says of its model."""
    known = collection.manifests.get(run, {}).get("models", ())
    return next((one for one in known if (one["given"], one["tower"]) == (model, tower)), {})


def _entries(collection: Collection) -> list[Mapping[str, Any]]:
    return [entry for manifest in collection.manifests.values() for entry in manifest.get("models", ())]


def control_sentence(collection: Collection, control: str | None) -> Iterator[str]:
    """What is controlled between lines, or that it is no controlled comparison and why."""
    reasons = uncontrolled(collection, in_series=control is not None)
    if reasons:
        yield f"Not a controlled comparison: {'; '.join(reasons)}."
    elif control is not None:
        yield f"Controlled series: {control}"
    elif varying := _varying(facts := _facts(collection), FACTORS | STEP):
        may_vary = FACTORS | (STEP if facts["t"].any() else {})
        differs = "differ" if varying == ["weights"] else "differs"
        windows = "; windows of another length are other stretches of the text" if varying == ["T"] else ""
        yield f"Of {listed([*may_vary.values()])} only {varying[0]} {differs}{windows}."
    yield from _surprised(collection)
    if untrained := random_lines(collection):
        whose = _whose(untrained, collection)
        yield f"Random weights, nothing was learned: {whose}. Such numbers show the architecture alone."
    yield from _other_caveats(collection)
    yield from _without_matched(collection)


def _without_matched(collection: Collection) -> Iterator[str]:
    """Lines under a projection beside which no direction of matched energy stands."""
    if "intervention" not in collection.layers:
        return
    lines = collection.layers.drop_duplicates("label").set_index("label")["intervention"].astype(str)
    alone = [str(label) for label, changes in lines.items() if matched(changes) not in (None, *lines)]
    if alone:
        control = matched(str(lines[alone[0]]))
        yield (
            f"A projection without its control: {_whose(alone, collection)}. A random direction that removes "
            f"as much of each token tells what is special about it: --intervene {control}."
        )


def matched(changes: str) -> str | None:
    """Interventions, as a table has them, with the matched-energy control in place of each projection.

    None where there is none. A fixed random direction is no control: it removes next to nothing.

    >>> matched("xsa:8-11 skip:0"), matched("gated_xsa=0.3"), matched("uniform")
    ('matched_direction:8-11 skip:0', 'matched_direction=0.3', None)
    """
    found = [_control_of(text) for text in changes.split()]
    return " ".join(found) if found != changes.split() else None


def _control_of(text: str) -> str:
    """One intervention, or the control in place of a projection; a gated one is of a half unless it says."""
    name, *rest = re.split("(?=[=:])", text, maxsplit=1)
    if name not in ("xsa", "gated_xsa"):
        return text
    half = "=0.5" if name == "gated_xsa" and not "".join(rest).startswith("=") else ""
    return f"matched_direction{half}{''.join(rest)}"


def _other_caveats(collection: Collection) -> Iterator[str]:
    """What has to be known of lines besides random weights, and of which."""
    found: dict[str, list[str]] = {}
    for label in collection.labels:
        for words in apart(label)[1]:
            if words != CAVEATS["weights", RANDOM]:
                found.setdefault(words, []).append(label)
    if found:
        said = [f"{words} ({_whose(labels, collection)})" for words, labels in found.items()]
        yield f"To be known: {', '.join(said)}."


def _whose(labels: Sequence[str], collection: Collection) -> str:
    """Lines by their names, without what is said of them here."""
    every = len(labels) == len(collection.labels)
    return "all lines" if every else listed([apart(label)[0] for label in labels])


def random_lines(collection: Collection) -> list[str]:
    """The labels of lines whose model was given random weights."""
    if "weights" not in collection.layers:
        return []
    random = collection.layers[collection.layers["weights"] == RANDOM]
    return [str(label) for label in random["label"].unique()]


def _surprised(collection: Collection) -> Iterator[str]:
    """Which models were given sizes that they were not trained on."""
    found = [
        str(entry["given"])
        for entry in _entries(collection)
        if any("off the training distribution" in str(note) for note in entry.get("notes", ()))
    ]
    if found:
        unlike = listed(list(dict.fromkeys(found)))
        yield f"Off the training distribution, because fitted to another size: {unlike}."


def uncontrolled(collection: Collection, *, in_series: bool = False) -> list[str]:
    """Why lines are no controlled comparison, in words; empty where they are one.

    in_series: they belong to one series, so models differ as that series says. Otherwise family and
    architecture must agree, and only one of patch size, image size, T and weights may differ; T follows
    from patch and image size. How and on what was measured must agree in any case.
    """
    facts = _facts(collection)
    conditions = _varying(facts, CONDITIONS)
    reasons = [f"{listed(conditions)} differ"] if conditions else []
    if in_series:
        # the size of images is in the members' names, the length of texts is not
        cut = "text" in set(facts.get("tower", ())) and facts["n_tokens"].nunique() > 1
        return [*reasons, "T differs as well"] if cut else reasons
    for name, shown in (
        ("families", list(facts["family"].unique())),
        ("architectures", _architectures(facts)),
    ):
        if len(shown) > 1:
            reasons.append(f"{name} differ ({', '.join(shown[:3])}{', …' if len(shown) > 3 else ''})")
    varying = _varying(facts, FACTORS | STEP)
    if len(varying) > 1:
        reasons.append(f"{listed(varying)} differ at once")
    return reasons


def alike(collection: Collection) -> bool:
    """Whether lines are of one architecture, measured in one way: what may be put in an order."""
    facts = _facts(collection)
    return not _varying(facts, CONDITIONS) and facts["architecture"].nunique() == 1


def _facts(collection: Collection) -> pd.DataFrame:
    """A row per line: what may differ between lines, and their sizes."""
    rows = []
    sources = collection.samples.groupby("label", sort=False)["source"].first()
    heads = collection.heads.groupby("label", sort=False)["head"].max() + 1
    for label, part in collection.layers.groupby("label", sort=False):
        first = part.iloc[0]
        entry = _entry(collection, first["run"], first["model"], first["tower"])
        resolved = str(entry.get("resolved", first["model"]))
        same = [name for name in ("patch_size", "image_size", *CONDITIONS) if name in part]
        facts = {"n_tokens": str(part["n_tokens"].max())} if "n_tokens" in part else {}
        facts |= {name: str(first[name]) for name in same} | {
            "weights": f"{re.sub(SIZES, '', resolved)} {entry.get('checkpoint')}",
            "t": str(entry.get("t", "")),
            "resolved": resolved,
            "hash": f"{resolved} {entry.get('weights_sha256')}",
            "family": str(entry.get("family", resolved.split(":")[0])),
            "architecture": architecture(resolved),
            "called": model_name(resolved),
            "layers": int(part["layer_count"].max()),
            "heads": heads.get(label, 0),
            "content": str(sources.get(label, "")).split("/")[0],
        }
        rows.append(facts)
    table = pd.DataFrame(rows)
    if table["resolved"].nunique() < table["hash"].nunique():
        table["weights"] += table["hash"]  # one name, but what it stands for has changed
    return table


def _architectures(facts: pd.DataFrame) -> list[str]:
    """Each architecture, by a model that has it, and its layers and heads where these differ."""
    sizes = [name for name in ("layers", "heads") if facts[name].nunique() > 1]
    found = []
    for one in facts.drop_duplicates("architecture").to_dict("records"):
        its = " and ".join(f"{one[name]} {name}" for name in sizes)
        found.append(f"{one['called']} with {its}" if its else str(one["called"]))
    return found


def _varying(facts: pd.DataFrame, names: Mapping[str, str]) -> list[str]:
    found = [name for name in names if name in facts and facts[name].nunique(dropna=False) > 1]
    if {"patch_size", "image_size"} & set(found):
        found = [name for name in found if name != "n_tokens"]  # it follows from them
    return [names[name] for name in found]


def model_name(resolved: str) -> str:
    """A model's name without its family, weights, revision and arguments.

    >>> model_name("timm:vit_base_patch16_224.augreg_in21k"), model_name("open_clip:ViT-B-16/openai")
    ('vit_base_patch16_224', 'ViT-B-16')
    """
    family, _, name = re.split(r"[@,]", resolved)[0].partition(":")
    if name.startswith(HUB):
        return name.rsplit("/", 1)[-1]
    return family_of(family).architecture(name) if family in FAMILIES else name


def architecture(resolved: str) -> str:
    """`model_name` without patch and image size: what is alike where only these differ.

    >>> architecture("timm:vit_base_patch16_224.augreg_in21k"), architecture("open_clip:ViT-B-16/openai")
    ('vit_base_patch', 'ViT-B')
    """
    name = re.sub(r"(?<=patch)\d+", "", model_name(resolved))
    return re.sub(r"(?<=^ViT-[BSLHg])-\d+|[_-]\d{3,4}(?=[_-]|$)", "", name)

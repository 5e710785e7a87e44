"""What each metric means, in the words of the report: groups, short labels, formulas.

`diag.metrics` holds the same names beside the code that computes them, but needs torch; the report does not.
A test holds that both list the same metrics.
"""

from __future__ import annotations

from collections.abc import Iterable

from diag.metrics.catalogue import MEANINGS, Meaning

GROUPS: dict[str, tuple[str, ...]] = {
    "Alignment bias, its parts and its nulls": (
        "cos_y_vself",
        "self_part",
        "context_part",
        "cos_y_vpartner",
        "cos_y_vuniform",
        "excess",
        "self_specific_fraction",
        "removed_energy",
    ),
    "Similarity between tokens": (
        "value_similarity",
        "value_similarity_partial",
        "value_similarity_partial_reference",
        "output_similarity",
        "exclusive_output_similarity",
        "value_participation_ratio",
    ),
    "Where attention goes": (
        "self_weight",
        "self_weight_ratio",
        "first_weight",
        "entropy",
        "entropy_p15",
        "entropy_normalized",
        "effective_keys",
    ),
}
"""Title of a table -> its columns."""

OTHER = "Other metrics"


def meaning(metric: str) -> Meaning:
    """What a metric means; of one that is not listed, only its name."""
    return MEANINGS.get(metric) or Meaning(metric.replace("_", " "), "", "No definition in this version.")


def grouped(metrics: Iterable[str]) -> dict[str, list[str]]:
    """The metrics that are there, by the title of their table; unlisted ones come last."""
    there = list(dict.fromkeys(metrics))
    found = {title: [name for name in names if name in there] for title, names in GROUPS.items()}
    listed = {name for names in GROUPS.values() for name in names}
    found[OTHER] = [name for name in there if name not in listed]
    return {title: names for title, names in found.items() if names}

"""What each metric means, in the words of the report: groups, short labels, formulas.

`diag.metrics` holds the same names beside the code that computes them, but needs torch; the report does not.
A test holds that both list the same metrics.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Meaning:
    """A metric: its heading in a table, its formula (or `""`), and what it says in one sentence."""

    heading: str
    formula: str
    sentence: str

    @property
    def text(self) -> str:
        """Formula and sentence in one line, for a tooltip."""
        return f"{self.formula} — {self.sentence}" if self.formula else self.sentence


MEANINGS: dict[str, Meaning] = {
    "cos_y_vself": Meaning(
        "alignment bias", "cos(yᵢ, vᵢ)", "How far a token's attention output points along its own value."
    ),
    "cos_y_vpartner": Meaning(
        "partner null",
        "mean over other visible j of cos(yᵢ, vⱼ)",
        "What the cosine is with another token's value instead of the token's own.",
    ),
    "cos_y_vuniform": Meaning(
        "uniform null",
        "cos(ȳᵢ, vᵢ), ȳᵢ the plain mean of the visible values",
        "What the cosine would be with uniform attention.",
    ),
    "excess": Meaning("excess", "bias − partner null", "What is specific to the token itself."),
    "self_specific_fraction": Meaning(
        "specific share",
        "excess / bias",
        "The excess as a share of the bias, both averaged over inputs; it leaps where the bias is near zero.",
    ),
    "self_part": Meaning(
        "self part", "Aᵢᵢ‖vᵢ‖ / ‖yᵢ‖", "The part of the bias that comes from attending to oneself."
    ),
    "context_part": Meaning(
        "context part",
        "Σ Aᵢⱼ (vⱼ·v̂ᵢ) / ‖yᵢ‖ over j ≠ i",
        "The part of the bias that comes from other tokens' values pointing the same way.",
    ),
    "removed_energy": Meaning(
        "removed energy", "cos²(yᵢ, vᵢ)", "The share of ‖y‖² that XSA's projection would remove."
    ),
    "value_similarity": Meaning(
        "values alike", "mean over i ≠ j of cos(vᵢ, vⱼ)", "How alike the values of different tokens are."
    ),
    "value_similarity_partial": Meaning(
        "values alike, partial",
        "mean of cos(vⱼ, vₖ) after vᵢ was projected out of both",
        "How alike values are beyond what they share with an anchor token.",
    ),
    "value_similarity_partial_reference": Meaning(
        "partial, reference",
        "ρ / (1 + ρ), ρ the value similarity",
        "What the partial similarity is for values that are merely all alike.",
    ),
    "output_similarity": Meaning(
        "outputs alike", "mean over i ≠ j of cos(yᵢ, yⱼ)", "How alike the outputs of different tokens are."
    ),
    "exclusive_output_similarity": Meaning(
        "exclusive outputs alike",
        "mean over i ≠ j of cos(zᵢ, zⱼ), z = y − (y·v̂)v̂",
        "How alike outputs are once their part along the own value is removed.",
    ),
    "value_participation_ratio": Meaning(
        "value directions",
        "tr(C)² / ‖C‖², C the covariance of the values",
        "How many directions the centred values fill.",
    ),
    "self_weight": Meaning("self weight", "Aᵢᵢ", "Attention that a token pays to itself."),
    "self_weight_ratio": Meaning(
        "self weight / uniform",
        "Aᵢᵢ × visible keys",
        "Self weight relative to uniform attention, which is 1.",
    ),
    "first_weight": Meaning(
        "first-token weight", "Aᵢ₀", "Attention to the first key: class token, BOS, first word or patch."
    ),
    "entropy": Meaning("entropy", "−Σ Aᵢⱼ ln Aᵢⱼ", "How widely attention is spread, in nats."),
    "entropy_p15": Meaning(
        "entropy, 15th pct.", "15th percentile of the entropy over tokens", "The narrow end, in nats."
    ),
    "entropy_normalized": Meaning(
        "entropy / maximum", "entropy / ln(visible keys)", "How near to uniform attention is, which is 1."
    ),
    "effective_keys": Meaning("effective keys", "1 / Σ Aᵢⱼ²", "How many keys share the attention."),
}
"""Metric -> what it means, in the order in which tables show them."""

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

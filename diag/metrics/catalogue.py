"""What every metric is called and means, without torch: the table that all who show numbers read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


from dataclasses import dataclass

RATIOS: dict[str, tuple[str, str]] = {"self_specific_fraction": ("excess", "cos_y_vself")}
"""Metrics that are a ratio of two others' means over inputs: name -> (numerator, denominator)."""


COLUMNS = {
    "cos_y_vself": ("cos(y,v)", "alignment bias = self + context"),
    "self_part": ("self", ""),
    "context_part": ("context", ""),
    "cos_y_vpartner": ("partner", "null, another token's value"),
    "cos_y_vuniform": ("uniform", "null, uniform attention"),
    "value_similarity": ("v~v", "similarity of values"),
    "self_weight": ("A_ii", "weight on oneself"),
    "entropy_normalized": ("H/max", "entropy over its bound"),
    "excess": ("excess", "cos(y,v) - partner"),
    "self_specific_fraction": ("specific", "excess over cos(y,v)"),
    "removed_energy": ("cos²", "energy that XSA removes"),
    "value_similarity_partial": ("v~v|i", "similarity of values beyond v_i"),
    "value_similarity_partial_reference": ("ref|i", "v~v|i of equicorrelated values"),
    "output_similarity": ("y~y", "similarity of outputs"),
    "exclusive_output_similarity": ("z~z", "similarity of outputs without their part along v_i"),
    "value_participation_ratio": ("dim(v)", "directions that values fill"),
    "self_weight_ratio": ("A_ii·T", "weight on oneself over uniform"),
    "entropy": ("H", "entropy in nats"),
    "entropy_p15": ("H p15", "15th percentile of entropy"),
    "effective_keys": ("keys", "how many share the attention"),
    "first_weight": ("A_i0", "weight on the first token"),
    "attention_stream_cosine": ("Δattn·x", "cosine of the attention update with the stream"),
    "mlp_stream_cosine": ("Δmlp·x", "cosine of the MLP update with the stream"),
    "value_stream_cosine": ("Wv·x", "cosine of W_O v with the stream"),
    "output_value_cosine": ("Wy·Wv", "cosine of W_O y with W_O v"),
    "block_influence": ("BI", "block influence, 1 - cos(x_in, x_out)"),
    "token_similarity": ("x~x", "similarity of tokens after the block"),
    "massive_activation": ("max/med", "largest over median activation"),
    "attention_update_ratio": ("|Δattn|", "norm of the attention update over the stream's"),
    "mlp_update_ratio": ("|Δmlp|", "norm of the MLP update over the stream's"),
    "token_distance": ("X-mean", "distance of tokens from their mean, over their norm"),
    "attention_stream_energy": ("Δattn·x²", "share of the attention update along the stream"),
    "mlp_stream_energy": ("Δmlp·x²", "share of the MLP update along the stream"),
    "update_cosine_previous": ("Δattn·prev", "cosine of the attention update with the one before"),
    "delta_cosine_previous": ("Δ·prev", "cosine of the block's update with the one before"),
    "secondary_sinks": ("sinks", "secondary sinks that begin here"),
    "secondary_sink_lifetime": ("life", "share of layers in which they stand"),
    "first_key_received": ("α_0", "attention that the first key receives"),
    "sink_rate": ("α_0>.3", "share of heads that do"),
    "sink_share": ("top c", "share of all attention that one key receives"),
    "sink_strength": ("log c", "log10 of the largest over the median received attention"),
    "received_gini": ("gini", "inequality of received attention"),
    "sink_value_norm": ("‖v_s‖", "norm of the sink's value over the median"),
    "attention_distance": ("dist", "mean distance of attention in pixels or tokens"),
    "attention_distance_rms": ("rms", "root mean square distance"),
    "attention_distance_uniform": ("dist u", "distance of uniform attention"),
    "attention_distance_ratio": ("d/d_u", "distance over that of uniform attention"),
    "attention_nmi": ("NMI", "0 where all queries see the same map"),
    "top_key_overlap": ("top-10", "share of the 10 top keys kept from the layer before"),
    "top_key_overlap_chance": ("chance", "that share by chance"),
    "previous_weight": ("A_i,i-1", "weight on the token before"),
    "near_share": ("near", "share within 16 tokens or the next patches"),
    "near_share_uniform": ("near u", "that share of uniform attention"),
    "prefix_share": ("prefix", "share on class token and registers"),
    "head_divergence": ("‖y-y⁰‖", "distance of heads' outputs from those of a neutral image"),
    "head_divergence_relative": ("Δy rel", "that distance over the outputs' mean norm, 0 to 2"),
    "norm_weighted_self": ("self‖v‖", "self weight, weighted with norms of values"),
    "norm_weighted_first": ("first‖v‖", "weight on the first key, weighted with norms"),
    "norm_weighted_entropy": ("H‖v‖", "entropy, weighted with norms"),
}
"""Metric -> its heading and what that means. The table shows as many as fit, in this order."""


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

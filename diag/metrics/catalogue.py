"""What every metric is called and means: the one table that all who show numbers read. No torch, no pandas.

A metric is one line here and one function beside its like (`diag.metrics.registry`). The lines stand in the
order in which metrics are measured and tables show them. Terminal, report, figures, captions, `attnbias
metrics` and docs/metrics.md (`python -m tools.metrics_page`) take every word from here; what only one figure
calls a metric stands in that figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Dashes = Literal["-", "--", ":", "-.", ""]


class Place(NamedTuple):
    """Where a metric is found: the group that `--metrics` names, and the title of its table."""

    group: str
    section: str


@dataclass(frozen=True)
class DrawnAs:
    """How a line among others is drawn: label, Okabe-Ito colour (or any, as a value), dashes and marker."""

    label: str = ""
    colour: str | tuple[float, float, float] = ""
    dashes: Dashes = "-"
    marker: str = "o"


@dataclass(frozen=True)
class MetricEntry:
    """One line of the catalogue.

    column, gloss: its heading in the terminal, and what that means in the legend below.
    heading: its name in words, for tables. formula; sentence: what it says, for people.
    unit, source: as the documentation has them; `–` where it is from nowhere in particular.
    rank: a terminal too narrow for all shows lower ones first, among the default, the stream's, the others.
    ratio: (numerator, denominator) of a metric that is a ratio of two others' means over inputs.

    In figures: drawn, its name where it is not the heading; symbol, a short formula behind that name; axis
    and title of a panel of its own (the title is the name if empty); unit_interval, whether such a panel
    runs from 0 to 1; scale, the colours of a layer x head map; line, its role in a panel of several.
    """

    name: str
    place: Place
    column: str
    gloss: str
    heading: str
    formula: str
    sentence: str
    unit: str
    source: str = "–"
    rank: int = 1
    ratio: tuple[str, str] | None = None
    drawn: str = ""
    symbol: str = ""
    axis: str = ""
    title: str = ""
    unit_interval: bool = False
    scale: str = ""
    line: DrawnAs = DrawnAs()

    @property
    def text(self) -> str:
        """Formula and sentence in one line, for a tooltip."""
        return f"{self.formula} — {self.sentence}" if self.formula else self.sentence

    @property
    def definition(self) -> str:
        """What `attnbias metrics` prints: formula, sentence, unit and source in one line."""
        told = self.unit if self.source == "–" else f"{self.unit}; {self.source}"
        return f"{self.text} ({told})"

    @property
    def label(self) -> str:
        """What figures call it."""
        return self.drawn or self.heading

    @property
    def labelled(self) -> str:
        """The label with its symbol: `self weight Aᵢᵢ`."""
        return f"{self.label} {self.symbol}".rstrip()

    @property
    def panel(self) -> tuple[str, str]:
        """Title and y label of a panel that shows this metric alone."""
        if not self.axis:
            return self.label, "mean over layers"
        return self.title or capitalised(self.label), self.axis


def capitalised(words: str) -> str:
    """Words with a capital first letter; `str.capitalize` would make the others small."""
    return words[:1].upper() + words[1:]


BIAS = Place("default", "Alignment bias, its parts and its nulls")
ALIKE = Place("default", "Similarity between tokens")
WHERE = Place("default", "Where attention goes")
STREAM = Place("stream", "Redundancy in the residual stream")
SINKS, DISTANCE, NMI, OVERLAP, POSITION, SUM, NORMS = (
    Place(group, "The shape of attention")
    for group in ("sinks", "distance", "nmi", "overlap", "position", "sum", "norms")
)
SINK_EVENTS = Place("sink_events", "Sink events: what a sink does")
DIVERGENCE = Place("divergence", "Head divergence: what the image changes")
LEDGER = Place("ledger", "The ledger: whose is y?")
NULLS = Place("nulls", "Further nulls of the bias")
FOLLOWED = Place("followed", "Sinks of the vision tower, followed into the language model")
UNTRAINED = Place("untrained", "The untrained null")

_XSA = "Exclusive Self Attention (Zhai 2026, arXiv 2603.09078), Fig. 1"
_POST = "the vision post's generalisation"
_SECONDARY = "arXiv 2512.22213 and its code"
_GU = "Gu 2024 (arXiv 2410.10781): ε = .3, T = 64"
_SINKS = "studies of sinks in ViTs"
_FESSER = "Fesser 2026 (2606.08105) and its code"
_RAGHU = "Dosovitskiy 2021 (2010.11929), Fig. 7; Raghu 2021 (2108.08810)"
_POSITION = "relative position"
_KOBAYASHI = "Kobayashi 2020 (2004.10102), there f(v) = v W_O"
_ACROSS = "a public study's excess across groups"
_VISION = "after vision-aware head divergence (2412.13949), there with the image taken out"

_COSINE, _SHARE, _RATIO, _NATS = "cosine", "share, 0 to 1", "ratio", "nats"
_PER_EVENT = "0 or 1 per event"
_LENGTH, _UNIFORM = "pixels (images), tokens (texts)", "1 = uniform"

FOLLOWED_CLASSES = {
    "carriers": ("carry", "image tokens that carry a sink of the vision tower"),
    "other_image": ("other", "image tokens that carry none"),
    "random_image": ("rand", "as many that carry none, drawn at random"),
}
"""Classes of image tokens that vision sinks are followed to: short, and in words."""

LEDGER_CLASSES = {
    "self": "the token itself",
    "sink": "the key that receives most",
    "cls": "the class token",
    "registers": "the registers",
    "prefix": "other tokens beside the patches",
    "near": "near tokens",
    "image": "image tokens",
    "text": "text tokens",
    "extra": "keys that are no tokens",
    "rest": "all other tokens",
}
"""Classes of keys in words: a key is of the first that fits. `diag.metrics.ledger` says what is in them."""

_CONTRIBUTION = "exact split of y; beside Contribution Weights (2606.07604), Kobayashi 2020 (2004.10102)"


def _followed() -> tuple[MetricEntry, ...]:
    """The lines of followed sinks: three for each class of image tokens, and how many carriers there are."""
    lines = []
    for prefix, column, formula, unit, words in (
        (
            "attention_to",
            "A",
            "mean of Aᵢⱼ over the {}",
            "share, per token",
            "What a row gives to one of the {}.",
        ),
        (
            *("given_by", "y", "mean of Aᵢⱼ (vⱼ·yᵢ) / ‖yᵢ‖² over the {}", "signed share, per token"),
            "The share of what attention returns that comes from one of the {}.",
        ),
        (
            *("sink_among", "s", "1 if there is an event whose sink is one of the {}", "0 or 1 per head"),
            "Whether nearly all queries of a head attend to one of the {}.",
        ),
    ):
        for name, (short, keys) in FOLLOWED_CLASSES.items():
            gloss, heading = f"{unit}: {keys}", f"{prefix} {name}".replace("_", " ")
            texts = (f"{column} {short}", gloss, heading, formula.format(keys), words.format(keys), unit)
            lines.append(MetricEntry(f"{prefix}_{name}", FOLLOWED, *texts, rank=3))
    gloss = FOLLOWED_CLASSES["carriers"][1]
    own = (
        "n carry",
        f"number of {gloss}",
        "carriers",
        f"number of {gloss}",
        f"How many {gloss} there are.",
    )
    return (*lines, MetricEntry("carriers", FOLLOWED, *own, "tokens", rank=3))


def _ledger() -> tuple[MetricEntry, ...]:
    """The lines of the ledger: two for each class, and what part of the sinks' is of which kind."""
    lines = []
    for of, column, heading, formula, unit, source, words in (
        (
            "output",
            "y",
            "output",
            "Σ Aᵢⱼ (vⱼ·yᵢ) / ‖yᵢ‖² over {}",
            "signed share; all classes sum to 1",
            _CONTRIBUTION,
            "The share of what attention returns that comes from {}.",
        ),
        (
            "bias",
            "b",
            "bias",
            "Σ Aᵢⱼ (vⱼ·v̂ᵢ) / ‖yᵢ‖ over {}",
            "cosine; all classes sum to the bias",
            "exact split of the cosine",
            "The part of the bias that comes from {}.",
        ),
    ):
        for name, keys in LEDGER_CLASSES.items():
            lines.append(
                MetricEntry(
                    f"{of}_from_{name}",
                    LEDGER,
                    f"{column} {name}",
                    f"share of {column} from {keys}" if of == "output" else f"part of the bias from {keys}",
                    f"{heading} from {name}",
                    formula.format(keys),
                    words.format(keys),
                    unit,
                    source,
                    rank=3,
                )
            )
    for name in ("cls", "registers"):
        keys = LEDGER_CLASSES[name].replace("the registers", "a register")
        lines.append(
            MetricEntry(
                f"output_from_sink_{name}",
                LEDGER,
                f"y s={name}",
                f"share of y from sinks that are {keys}",
                f"output from sink that is {name}",
                f"output_from_sink where the sink is {keys}, else 0",
                f"The part of the sink's share that it has as {keys}.",
                "signed share, within output_from_sink",
                _CONTRIBUTION,
                rank=3,
            )
        )
    return tuple(lines)


# a table: three or four lines to a metric, which the formatter would make twelve
# fmt: off
_TABLE = (
    # name, place, column, gloss,
    # heading, formula, sentence, unit, source; then what only some have
    MetricEntry(
        "cos_y_vself", BIAS, "cos(y,v)", "alignment bias = self + context",
        "alignment bias", "cos(yᵢ, vᵢ)", "How far a token's attention output points along its own value.",
        _COSINE, _XSA, rank=0, symbol="cos(yᵢ, vᵢ)", axis="cos(yᵢ, vᵢ)", scale="cosine",
        line=DrawnAs("own value", "blue"),
    ),
    MetricEntry(
        "self_part", BIAS, "self", "",
        "self part", "Aᵢᵢ‖vᵢ‖ / ‖yᵢ‖", "The part of the bias that comes from attending to oneself.",
        _COSINE, "exact split of the cosine", rank=0, axis="part of cos(yᵢ, vᵢ)",
        title="Self part of the bias", line=DrawnAs("self part", "vermillion", "-", "s"),
    ),
    MetricEntry(
        "context_part", BIAS, "context", "",
        "context part", "Σ Aᵢⱼ (vⱼ·v̂ᵢ) / ‖yᵢ‖ over j ≠ i",
        "The part of the bias that comes from other tokens' values pointing the same way.",
        _COSINE, "exact split: the two parts sum to the bias", rank=0, axis="part of cos(yᵢ, vᵢ)",
        title="Context part of the bias", line=DrawnAs("context part", "green", "-", "^"),
    ),
    MetricEntry(
        "cos_y_vpartner", BIAS, "partner", "null, another token's value",
        "partner null", "mean over other visible j of cos(yᵢ, vⱼ)",
        "What the cosine is with another token's value instead of the token's own.",
        _COSINE, rank=0, axis="cos(yᵢ, vⱼ)", line=DrawnAs("partner null", "black", "--", "D"),
    ),
    MetricEntry(
        "cos_y_vuniform", BIAS, "uniform", "null, uniform attention",
        "uniform null", "cos(ȳᵢ, vᵢ), ȳᵢ the plain mean of the visible values",
        "What the cosine would be with uniform attention: √ρ for unit values of similarity ρ.",
        _COSINE, rank=0, drawn="uniform-attention null", axis="cosine",
        line=DrawnAs("uniform-attention null", "black", ":", "X"),
    ),
    MetricEntry(
        "excess", BIAS, "excess", "cos(y,v) - partner",
        "excess", "bias − partner null", "What is specific to the token itself.",
        "difference of cosines", drawn="excess over partner null", axis="cosine difference", scale="signed",
    ),
    MetricEntry(
        "self_specific_fraction", BIAS, "specific", "excess over cos(y,v)",
        "self-specific fraction", "excess / bias",
        "The excess as a share of the bias, both averaged over inputs; it leaps where the bias is near zero.",
        "share", ratio=("excess", "cos_y_vself"), axis="excess / cos(yᵢ, vᵢ)",
    ),
    MetricEntry(
        "removed_energy", BIAS, "cos²", "energy that XSA removes",
        "removed energy", "cos²(yᵢ, vᵢ)", "The share of ‖y‖² that XSA's projection would remove.",
        _SHARE, "1 − ‖z‖²/‖y‖², z = y − (y·v̂)v̂",
    ),
    MetricEntry(
        "value_similarity", ALIKE, "v~v", "similarity of values",
        "value similarity", "mean over i ≠ j of cos(vᵢ, vⱼ)", "How alike the values of different tokens are.",
        _COSINE, rank=0, axis="mean pairwise cosine", scale="cosine", line=DrawnAs("values", "orange"),
    ),
    MetricEntry(
        "value_similarity_partial", ALIKE, "v~v|i", "similarity of values beyond v_i",
        "partial value similarity", "mean of cos(vⱼ, vₖ) after vᵢ was projected out of both, over j ≠ k ≠ i",
        "How alike values are beyond what they share with an anchor token i: 16 anchors, one from each of 16 "
        "equal strata of the sequence; all tokens where there are no more.",
        _COSINE, line=DrawnAs("values, partial", "purple", "-", "^"),
    ),
    MetricEntry(
        "value_similarity_partial_reference", ALIKE, "ref|i", "v~v|i of equicorrelated values",
        "partial value similarity, reference", "ρ / (1 + ρ), ρ the value similarity",
        "What the partial similarity is for values that are merely all alike.",
        _COSINE, line=DrawnAs("partial, reference", "purple", ":", ""),
    ),
    MetricEntry(
        "output_similarity", ALIKE, "y~y", "similarity of outputs",
        "output similarity", "mean over i ≠ j of cos(yᵢ, yⱼ)",
        "How alike the outputs of different tokens are.",
        _COSINE, line=DrawnAs("outputs", "sky", "-", "s"),
    ),
    MetricEntry(
        "exclusive_output_similarity", ALIKE, "z~z", "similarity of outputs without their part along v_i",
        "exclusive output similarity", "mean over i ≠ j of cos(zᵢ, zⱼ), z = y − (y·v̂)v̂",
        "How alike outputs are once their part along the own value is removed.",
        _COSINE, line=DrawnAs("exclusive outputs", "blue", "--", "D"),
    ),
    MetricEntry(
        "value_participation_ratio", ALIKE, "dim(v)", "directions that values fill",
        "value participation ratio", "tr(C)² / ‖C‖_F², C the covariance of the centred values",
        "How many directions the centred values fill.", "directions",
    ),
    MetricEntry(
        "self_weight", WHERE, "A_ii", "weight on oneself",
        "self weight", "Aᵢᵢ", "Attention that a token pays to itself.",
        _SHARE, rank=0, symbol="Aᵢᵢ", axis="Aᵢᵢ", unit_interval=True, scale="weight",
        line=DrawnAs("self weight", "vermillion", "-", "s"),
    ),
    MetricEntry(
        "self_weight_ratio", WHERE, "A_ii·T", "weight on oneself over uniform",
        "self weight / uniform weight", "Aᵢᵢ × number of visible keys / Σⱼ Aᵢⱼ",
        "Self weight relative to uniform attention, whatever the number of tokens.",
        _UNIFORM, axis="Aᵢᵢ × visible keys",
    ),
    MetricEntry(
        "entropy", WHERE, "H", "entropy in nats",
        "entropy", "−Σ Aᵢⱼ ln Aᵢⱼ", "How widely attention is spread, in nats.",
        _NATS, line=DrawnAs("mean over tokens", "blue"),
    ),
    MetricEntry(
        "entropy_p15", WHERE, "H p15", "15th percentile of entropy",
        "entropy p15", "15th percentile of the entropy over an input's tokens",
        "How widely the more narrowly attending tokens spread it, in nats.", _NATS,
        "Context Broadcasting (arXiv 2210.08457), Fig. 4",
        line=DrawnAs("15th percentile over tokens", "vermillion", "-", "s"),
    ),
    MetricEntry(
        "entropy_normalized", WHERE, "H/max", "entropy over its bound",
        "entropy normalized", "entropy / (s ln(n/s)), n visible keys, s = Σⱼ Aᵢⱼ: ln n of a softmax",
        "How near attention is to uniform, which is its maximum.",
        _UNIFORM, rank=0, drawn="entropy / maximum", axis="share", unit_interval=True,
        line=DrawnAs("entropy / maximum", "black", "--", "D"),
    ),
    MetricEntry(
        "effective_keys", WHERE, "keys", "how many share the attention",
        "effective keys", "(Σⱼ Aᵢⱼ)² / Σⱼ Aᵢⱼ²", "How many keys share the attention.", "keys",
    ),
    MetricEntry(
        "first_weight", WHERE, "A_i0", "weight on the first token",
        "weight on first token", "Aᵢ₀",
        "Attention to the first real key: class token, BOS, first word or patch.",
        _SHARE, unit_interval=True, line=DrawnAs("weight on first token", "purple", "-", "^"),
    ),
    # --- the residual stream
    MetricEntry(
        "attention_stream_cosine", STREAM, "Δattn·x", "cosine of the attention update with the stream",
        "attention stream cosine", "cos(Δ_attn, x)", "Whether what attention adds is in the stream already.",
        _COSINE, _POST, rank=0,
    ),
    MetricEntry(
        "attention_stream_energy", STREAM, "Δattn·x²", "share of the attention update along the stream",
        "attention stream energy", "cos²(Δ_attn, x)",
        "The share of the attention update's energy that lies along the stream.", _SHARE, _POST, rank=2,
    ),
    MetricEntry(
        "attention_update_ratio", STREAM, "|Δattn|", "norm of the attention update over the stream's",
        "attention update ratio", "‖Δ_attn‖ / ‖x‖", "How much attention adds, in units of the stream.",
        _RATIO,
    ),
    MetricEntry(
        "mlp_stream_cosine", STREAM, "Δmlp·x", "cosine of the MLP update with the stream",
        "MLP stream cosine", "cos(Δ_mlp, x), x after the attention update",
        "Whether what the MLP adds is in the stream already.", _COSINE, _POST, rank=0,
    ),
    MetricEntry(
        "mlp_stream_energy", STREAM, "Δmlp·x²", "share of the MLP update along the stream",
        "MLP stream energy", "cos²(Δ_mlp, x)",
        "The share of the MLP update's energy that lies along the stream.", _SHARE, _POST, rank=2,
    ),
    MetricEntry(
        "mlp_update_ratio", STREAM, "|Δmlp|", "norm of the MLP update over the stream's",
        "MLP update ratio", "‖Δ_mlp‖ / ‖x‖", "How much the MLP adds, in units of the stream.", _RATIO,
    ),
    MetricEntry(
        "value_stream_cosine", STREAM, "Wv·x", "cosine of W_O v with the stream",
        "value stream cosine", "cos(W_O vᵢ, xᵢ)",
        "Whether values are in the stream already: all heads side by side, with layer scale, without the "
        "bias of W_O.", _COSINE, _POST, rank=0,
    ),
    MetricEntry(
        "output_value_cosine", STREAM, "Wy·Wv", "cosine of W_O y with W_O v",
        "output value cosine", "cos(W_O yᵢ, W_O vᵢ)",
        "The alignment bias as the stream sees it; rows that see only themselves do not count.",
        _COSINE, _POST, rank=0,
    ),
    MetricEntry(
        "block_influence", STREAM, "BI", "block influence, 1 - cos(x_in, x_out)",
        "block influence", "1 − cos(x_in, x_out)",
        "How far the whole block turns the stream; the cosine of consecutive states is 1 minus it.",
        "1 − cosine", "ShortGPT (arXiv 2403.03853)", rank=0,
    ),
    MetricEntry(
        "update_cosine_previous", STREAM, "Δattn·prev", "cosine of the attention update with the one before",
        "attention update, cosine with previous", "cos(Δ_attn, Δ_attn of the layer before)",
        "Whether attention adds what the layer before added; undefined in the first layer.", _COSINE, rank=2,
    ),
    MetricEntry(
        "delta_cosine_previous", STREAM, "Δ·prev", "cosine of the block's update with the one before",
        "block update, cosine with previous", "cos(x_out − x_in, the same of the layer before)",
        "Whether the whole block adds what the block before added; undefined in the first layer.",
        _COSINE, rank=2,
    ),
    MetricEntry(
        "token_similarity", STREAM, "x~x", "similarity of tokens after the block",
        "token similarity", "mean over i ≠ j of cos(xᵢ, xⱼ) after the block",
        "How alike the states of different tokens are.", _COSINE, "oversmoothing literature", rank=0,
    ),
    MetricEntry(
        "token_distance", STREAM, "X-mean", "distance of tokens from their mean, over their norm",
        "token distance", "‖X − mean over tokens‖_F / ‖X‖_F after the block",
        "How far tokens lie from their mean; 0 where all are the same.", _RATIO,
        "rank collapse (Dong 2021)",
    ),
    MetricEntry(
        "massive_activation", STREAM, "max/med", "largest over median activation",
        "massive activation", "max|x| / median|x| over tokens and dimensions after the block",
        "How far the largest activation stands out.", _RATIO, "visual attention sinks", rank=0,
    ),
    MetricEntry(
        "secondary_sinks", STREAM, "sinks", "secondary sinks that begin here",
        "secondary sinks", "tokens whose |cos(x, x of the first token)| > .9 begins here",
        "Tokens that become secondary sinks in this layer; their sum over layers is the number in the input.",
        "tokens", _SECONDARY, rank=2,
    ),
    MetricEntry(
        "secondary_sink_lifetime", STREAM, "life", "share of layers in which they stand",
        "secondary sink lifetime", "layers in which such a token stands / layers",
        "How long a secondary sink that begins in this layer lasts.", "share of layers", _SECONDARY, rank=2,
    ),
    # --- the shape of attention
    MetricEntry(
        "first_key_received", SINKS, "α_0", "attention that the first key receives",
        "first key received", "α = mean over i ≥ k of Aᵢₖ, k the first key",
        "The mean attention to the first key, the first row included.", _SHARE, _GU,
    ),
    MetricEntry(
        "sink_rate", SINKS, "α_0>.3", "share of heads that do",
        "sink rate", "1 if α > .3, α the mean attention to the first key",
        "Whether a head's first key is a sink, per softmax; the mean over heads and layers is the sink rate.",
        "0 or 1 per head", _GU,
    ),
    MetricEntry(
        "sink_share", SINKS, "top c", "share of all attention that one key receives",
        "sink share", "maxⱼ cⱼ / N, cⱼ = Σᵢ Aᵢⱼ over N rows, j in the token set",
        "The share of all attention that the key which receives most takes.", _SHARE, "column sums",
    ),
    MetricEntry(
        "sink_strength", SINKS, "log c", "log10 of the largest over the median received attention",
        "sink strength", "log₁₀(maxⱼ cⱼ / medianⱼ cⱼ), cⱼ = Σᵢ Aᵢⱼ",
        "Decades from the usual key to the sink, at most 6.", "decades, 0 = all alike", _SINKS,
    ),
    MetricEntry(
        "received_gini", SINKS, "gini", "inequality of received attention",
        "received Gini", "Gini coefficient of cⱼ = Σᵢ Aᵢⱼ",
        "How unequally keys receive attention: 0 all alike, towards 1 one key takes all.",
        "0 to 1", "Gini coefficient",
    ),
    MetricEntry(
        "sink_value_norm", SINKS, "‖v_s‖", "norm of the sink's value over the median",
        "sink value norm", "‖v_s‖ / medianⱼ ‖vⱼ‖, s the key that receives most",
        "How long the sink's value is: short in trained sinks.", "1 = as long as the others", _SINKS,
    ),
    MetricEntry(
        "attention_distance", DISTANCE, "dist", "mean distance of attention in pixels or tokens",
        "attention distance", "Σⱼ Aᵢⱼ Dᵢⱼ over keys with a place, weights renormalised",
        "How far away a token attends on average.", _LENGTH, _RAGHU,
    ),
    MetricEntry(
        "attention_distance_rms", DISTANCE, "rms", "root mean square distance",
        "attention distance, RMS", "√(Σⱼ Aᵢⱼ Dᵢⱼ²) of the same weights",
        "The root mean square distance: far keys count more.", _LENGTH,
    ),
    MetricEntry(
        "attention_distance_uniform", DISTANCE, "dist u", "distance of uniform attention",
        "attention distance, uniform", "mean of Dᵢⱼ over the visible keys with a place",
        "The distance of uniform attention.", _LENGTH, "reference",
    ),
    MetricEntry(
        "attention_distance_ratio", DISTANCE, "d/d_u", "distance over that of uniform attention",
        "attention distance ratio", "distance / uniform distance, row by row",
        "How local attention is, whatever the size of the input.", _UNIFORM,
    ),
    MetricEntry(
        "attention_nmi", NMI, "NMI", "0 where all queries see the same map",
        "attention NMI", "I(q;k) / √(H(q)H(k)), p(q,k) = A_qk / ΣA, ΣA = N of a softmax",
        "How much a query tells of where it attends; 0 where all queries see the same map.",
        "0 to 1", "Park 2023 (2305.00729)",
    ),
    MetricEntry(
        "top_key_overlap", OVERLAP, "top-10", "share of the 10 top keys kept from the layer before",
        "top key overlap", "|top k of Aᵢ ∩ top k of the layer before| / k, same head, k = 10",
        "Whether a head attends to the keys of the layer before.", _SHARE, "after HyLRA (2602.00777)",
    ),
    MetricEntry(
        "top_key_overlap_chance", OVERLAP, "chance", "that share by chance",
        "top key overlap, chance", "k / number of visible keys",
        "The overlap of two random choices of k keys.",
        _SHARE, "reference",
    ),
    MetricEntry(
        "previous_weight", POSITION, "A_i,i-1", "weight on the token before",
        "previous weight", "Aᵢ,ᵢ₋₁ (texts)", "Attention to the token before.", _SHARE, _POSITION,
    ),
    MetricEntry(
        "near_share", POSITION, "near", "share within 16 tokens or the next patches",
        "near share", "Σ Aᵢⱼ over |i − j| ≤ 16 (text) or the 3 × 3 patches around (image)",
        "Attention to what is near, oneself included.", _SHARE, _POSITION,
    ),
    MetricEntry(
        "near_share_uniform", POSITION, "near u", "that share of uniform attention",
        "near share, uniform", "Σⱼ Aᵢⱼ × near visible keys / visible keys",
        "The near share of uniform attention.",
        _SHARE, "reference",
    ),
    MetricEntry(
        "prefix_share", POSITION, "prefix", "share on class token and registers",
        "prefix share", "Σ Aᵢⱼ over the prefix tokens j", "Attention to class token and registers.",
        _SHARE, _POSITION,
    ),
    MetricEntry(
        "row_sum", SUM, "ΣA", "what the weights of a row sum to",
        "row sum", "Σⱼ Aᵢⱼ",
        "What a token's weights sum to: 1 of a softmax over tokens, less beside sinks and keys that are "
        "no tokens, 1 − λ where a layer subtracts λ of a second map.",
        "1 = a softmax",
    ),
    MetricEntry(
        "norm_weighted_self", NORMS, "self‖v‖", "self weight, weighted with norms of values",
        "norm-weighted self", "Aᵢᵢ‖f(vᵢ)‖ / Σⱼ Aᵢⱼ‖f(vⱼ)‖, f(v) = v in the probe",
        "The token's own share of what is added up.", _SHARE, _KOBAYASHI, rank=2,
    ),
    MetricEntry(
        "norm_weighted_first", NORMS, "first‖v‖", "weight on the first key, weighted with norms",
        "norm-weighted first", "Aᵢ₀‖f(v₀)‖ / Σⱼ Aᵢⱼ‖f(vⱼ)‖",
        "The first key's share of what is added up: little at a sink of short value.",
        _SHARE, _KOBAYASHI, rank=2,
    ),
    MetricEntry(
        "norm_weighted_entropy", NORMS, "H‖v‖", "entropy, weighted with norms",
        "norm-weighted entropy", "entropy over j of Aᵢⱼ‖f(vⱼ)‖ / Σⱼ Aᵢⱼ‖f(vⱼ)‖",
        "How widely what is added up is spread.", _NATS, _KOBAYASHI, rank=2,
    ),
    # --- sink events
    MetricEntry(
        "sink_event", SINK_EVENTS, "events", "share of heads with a sink event",
        "sink event", "1 if Aᵢₛ ≥ .5 for at least 90 % of the queries i, s = argmaxⱼ meanᵢ Aᵢⱼ",
        "Whether nearly all queries of a head attend to one key, any key that they see; the mean is a rate.",
        "0 or 1 per head", _FESSER, rank=0,
    ),
    MetricEntry(
        "sink_no_op", SINK_EVENTS, "no-op", "share of heads whose sink adds hardly anything",
        "no-op sink", "1 if there is an event and value_norm_ratio_out ≤ .2",
        "Whether a head idles: it attends to a key whose value adds hardly anything to the stream.",
        "0 or 1 per head", _FESSER, rank=0, line=DrawnAs("no-op", "blue"),
    ),
    MetricEntry(
        "sink_broadcast", SINK_EVENTS, "broadc", "share of heads whose sink gives all queries the same",
        "broadcast sink", "1 if there is an event, value_norm_ratio_out ≥ .5 and stable_rank ≤ 1.5",
        "Whether a head hands the sink's value on to all queries: what it adds has about one direction.",
        "0 or 1 per head", _FESSER, rank=0, line=DrawnAs("broadcast", "vermillion"),
    ),
    MetricEntry(
        "sink_unclassified", SINK_EVENTS, "other", "share of heads with an event that is neither",
        "unclassified sink", "1 if there is an event that is neither no-op nor broadcast",
        "Whether a head has an event of neither class.",
        "0 or 1 per head", _FESSER, rank=0, line=DrawnAs("unclassified", "0.72"),
    ),
    MetricEntry(
        "value_norm_ratio_out", SINK_EVENTS, "‖u_s‖", "norm of the sink's value after W_O over the mean",
        "value norm ratio after W_O", "‖uₛ‖ / mean of ‖uⱼ‖ over j ≠ s, uⱼ = γ W_O vⱼ, γ the layer scale",
        "How much the sink's value adds to the stream beside those of other keys; of heads with an event.",
        "1 = as much as the others", _FESSER,
    ),
    MetricEntry(
        "stable_rank", SINK_EVENTS, "s-rank", "stable rank of what heads with an event add",
        "stable rank", "‖U‖_F² / σ₁(U)², U = A u over the queries",
        "How many directions what a head adds to the stream has: 1 where all queries get the same; of heads "
        "with an event.", "directions, from 1", _FESSER,
    ),
    MetricEntry(
        "sink_index", SINK_EVENTS, "index", "place of the sink in the sequence",
        "index of the sink", "s, counted from 0 in the sequence; of events",
        "Where the sink is; its standard deviation over inputs is 0 where it is the same key in all of them.",
        "index", rank=2,
    ),
    MetricEntry(
        "sink_row", SINK_EVENTS, "row", "row of the patch that is the sink",
        "row of the sink", "row of patch s, from 0 at the top",
        "Where the sink is in the image, downwards.", "patches", rank=2,
    ),
    MetricEntry(
        "sink_column", SINK_EVENTS, "column", "column of the patch that is the sink",
        "column of the sink", "column of patch s, from 0 at the left",
        "Where the sink is in the image, sideways.", "patches", rank=2,
    ),
    MetricEntry(
        "sink_on_first", SINK_EVENTS, "s=0", "share of sinks that are the first key",
        "sink is the first key", "1 if s is the first key that any query sees; of events",
        "How many sinks are the first key: class token, BOS, first word or patch.", _PER_EVENT, rank=2,
    ),
    MetricEntry(
        "sink_on_cls", SINK_EVENTS, "s=cls", "share of sinks that are the class token",
        "sink is the class token", "1 if s is the class token; of events",
        "How many sinks are the class token.", _PER_EVENT, rank=2,
    ),
    MetricEntry(
        "sink_on_registers", SINK_EVENTS, "s=reg", "share of sinks that are registers",
        "sink is a register", "1 if s is a register or another token beside the patches; of events",
        "How many sinks are registers.", _PER_EVENT, rank=2,
    ),
    MetricEntry(
        "sink_on_image", SINK_EVENTS, "s=img", "share of sinks that are patches or image tokens",
        "sink is a patch", "1 if s is a patch, or a token that stands for a piece of an image; of events",
        "How many sinks lie in the image.", _PER_EVENT, rank=2,
    ),
    MetricEntry(
        "sink_on_text", SINK_EVENTS, "s=txt", "share of sinks that are tokens of text",
        "sink is a text token", "1 if s is a token of text; of events",
        "How many sinks lie in the text.", _PER_EVENT, rank=2,
    ),
    # --- what the image changes
    MetricEntry(
        "head_divergence", DIVERGENCE, "‖y-y⁰‖", "distance of heads' outputs from those of a neutral image",
        "head divergence", "‖yᵢ − yᵢ⁰‖, yᵢ⁰ the same head's output where the image is its mean colour",
        "How far the image moves a head's output.", "norm of a head's output", _VISION,
    ),
    MetricEntry(
        "head_divergence_relative", DIVERGENCE, "Δy rel", "that distance over the outputs' mean norm, 0 to 2",
        "head divergence, relative", "2‖yᵢ − yᵢ⁰‖ / (‖yᵢ‖ + ‖yᵢ⁰‖), row by row",
        "How far the image moves a head's output, whatever its size; 0 where the image does not matter.",
        "0 to 2", _VISION,
    ),
    # --- whose y is
    *_ledger(),
    # --- what becomes of a vision tower's sinks
    *_followed(),
    # --- further nulls
    MetricEntry(
        "cos_y_vnear", NULLS, "near v", "null, a near token's value",
        "neighbourhood null", "mean over near visible j ≠ i of cos(yᵢ, vⱼ)",
        "What the cosine is with the value of a token within 16 (text) or of the next patches (image).",
        _COSINE, rank=2, axis="cos(yᵢ, vⱼ), j near", line=DrawnAs("near token", "green", "--", "^"),
    ),
    MetricEntry(
        "excess_over_near", NULLS, "over near", "cos(y,v) - near v",
        "excess over neighbourhood null", "bias − neighbourhood null",
        "What is specific to the token, and not to the place where it lies.", "difference of cosines", rank=2,
    ),
    MetricEntry(
        "cos_y_vother_input", NULLS, "other v", "null, another input's value at the same place",
        "across-inputs null", "cos(yᵢ, vᵢ of the next input)",
        "What the cosine is with the value that another input has at the same place.",
        _COSINE, rank=2, axis="cos(yᵢ, vᵢ of another input)",
        line=DrawnAs("same place, next input", "vermillion", "--", "s"),
    ),
    MetricEntry(
        "excess_over_other_input", NULLS, "over other", "cos(y,v) - other v",
        "excess over across-inputs null", "bias − across-inputs null",
        "What depends on the input at all.", "difference of cosines", rank=2,
    ),
    MetricEntry(
        "cos_y_vother_group", NULLS, "group v", "null, v_i of the other KV heads",
        "across-groups null", "mean over the other KV heads g of cos(yᵢ, vᵢ of g)",
        "What the cosine is with the token's own value in another KV head, or head where each has its own.",
        _COSINE, rank=2, axis="cos(yᵢ, vᵢ of another KV head)",
        line=DrawnAs("own token, other KV head", "purple", "--", "D"),
    ),
    MetricEntry(
        "excess_over_other_group", NULLS, "over group", "cos(y,v) - group v",
        "excess over across-groups null", "bias − across-groups null",
        "What belongs to the head's own values.", "difference of cosines", rank=2,
    ),
    MetricEntry(
        "cos_y_vother_group_partner", NULLS, "group vj", "another token's value in the other KV heads",
        "across-groups partner null", "mean over other KV heads g and other visible j of cos(yᵢ, vⱼ of g)",
        "What the across-groups null would be with another token.", _COSINE, _ACROSS, rank=2,
    ),
    MetricEntry(
        "excess_across_groups", NULLS, "across", "group v - group vj",
        "excess across groups", "across-groups null − across-groups partner null",
        "Whether the output knows its own token in the other KV heads, too: the excess, across groups.",
        "difference of cosines", _ACROSS, rank=2,
    ),
    # --- of the same architecture with fresh weights (--null untrained)
    MetricEntry(
        "cos_y_vself_untrained", UNTRAINED, "untrained", "null, the bias of the untrained model",
        "untrained null", "cos(yᵢ, vᵢ) of the same architecture, freshly initialised; mean over seeds",
        "What the bias is before training, on the same inputs.",
        _COSINE, rank=2, axis="cos(yᵢ, vᵢ), untrained", line=DrawnAs("untrained", "orange", "--", "o"),
    ),
    MetricEntry(
        "excess_over_untrained", UNTRAINED, "over untr", "cos(y,v) - untrained",
        "excess over untrained null", "bias − untrained null",
        "What training made of the bias; below 0 where it took some away.", "difference of cosines", rank=2,
    ),
    MetricEntry(
        "value_similarity_untrained", UNTRAINED, "v~v untr", "similarity of values of the untrained model",
        "value similarity, untrained", "mean over i ≠ j of cos(vᵢ, vⱼ), untrained; mean over seeds",
        "How alike values are before training.", _COSINE, rank=2, axis="mean pairwise cosine",
    ),
    MetricEntry(
        "self_weight_untrained", UNTRAINED, "A_ii untr", "self weight of the untrained model",
        "self weight, untrained", "Aᵢᵢ of the untrained model; mean over seeds",
        "Attention to oneself before training.", _SHARE, rank=2, axis="Aᵢᵢ",
    ),
)
# fmt: on

CATALOGUE: dict[str, MetricEntry] = {entry.name: entry for entry in _TABLE}
"""Metric -> its line."""

RATIOS: dict[str, tuple[str, str]] = {
    name: entry.ratio for name, entry in CATALOGUE.items() if entry.ratio is not None
}
"""Metrics that are a ratio of two others' means over inputs: name -> (numerator, denominator)."""

OF_UNTRAINED: dict[str, str] = {
    name: f"{name}_untrained" for name in ("cos_y_vself", "value_similarity", "self_weight")
}
"""What is measured of untrained models (`--null untrained`) -> what it is called beside the trained one's."""
OVER_UNTRAINED = "excess_over_untrained"

SAMPLING_ERROR = "_sampling_error"
"""What follows the name of a metric in the name of its standard error from sampled query rows."""

OTHER = "Other metrics"
"""Title of the table of what is not in the catalogue."""


def entry_of(name: str) -> MetricEntry:
    """The line of a metric; made up from the name where this version has none."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    of = name.removesuffix(SAMPLING_ERROR)
    sentence = "No definition in this version."
    if of != name and of in CATALOGUE:
        sentence = f"Standard error of {of} that comes from sampling query rows; 0 where all were drawn."
    return MetricEntry(name, Place("", OTHER), name, "", name.replace("_", " "), "", sentence, "–")

"""What a change of a model costs or gains, per input: losses, divergences, changes of embeddings.

Every function takes the untouched and the changed outcome of one batch and gives one number per input,
float64, so that effects are paired by input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PassOutcome:
    """What one forward pass ended in; None where the model has no such thing.

    next_logits: `[batch, token, vocabulary]` of a causal language model. ids: its input tokens.
    bytes: `[batch]`, UTF-8 bytes of the predicted tokens (all but the first).
    class_logits: `[batch, class]` of a classifier, or similarities to class names (zero-shot).
    embedding: `[batch, dim]`, pooled. states: `[batch, token, dim]`, tokens after the last block.
    labels: `[batch]`, the true class, -1 where it is not known.
    counted: `[batch, token]`, those of `states` that are patches, or all that are real where there are none;
        without the keys that an edit took for sinks.
    kept: `[batch]`, the share of attention weight that an edit left where it was; 1 of the untouched model.
    """

    next_logits: Tensor | None = None
    ids: Tensor | None = None
    bytes: Tensor | None = None
    class_logits: Tensor | None = None
    embedding: Tensor | None = None
    states: Tensor | None = None
    labels: Tensor | None = None
    counted: Tensor | None = None
    kept: Tensor | None = None


def next_token_loss(
    logits: Float[Tensor, "batch token vocabulary"], ids: Int[Tensor, "batch token"]
) -> Float[Tensor, " batch"]:
    """Mean cross-entropy of the next token over a window, nats per token: T − 1 predictions."""
    # float32 as the libraries do; a batch of logits in float64 would be the largest tensor of all
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return each.double().mean(1)


def divergence(
    before: Float[Tensor, "batch class"], after: Float[Tensor, "batch class"]
) -> Float[Tensor, " batch"]:
    """KL(before ‖ after) of the predicted distributions, in nats."""
    first, second = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1)


def in_top(
    logits: Float[Tensor, "batch class"], labels: Int[Tensor, " batch"], k: int
) -> Float[Tensor, " batch"]:
    """1 where the true class is among the k most likely, 0 where not, NaN without a label."""
    found = (logits.topk(min(k, logits.shape[-1]), -1).indices == labels[:, None]).any(-1).double()
    return torch.where(labels >= 0, found, torch.nan)


def agreement(
    before: Float[Tensor, "batch class"], after: Float[Tensor, "batch class"]
) -> Float[Tensor, " batch"]:
    """1 where both predict the same class."""
    return (before.argmax(-1) == after.argmax(-1)).double()


def direction_change(
    before: Float[Tensor, "batch *token dim"], after: Float[Tensor, "batch *token dim"]
) -> Float[Tensor, " batch"]:
    """1 − cos(before, after), averaged over tokens where there are any."""
    cosine = F.cosine_similarity(before.double(), after.double(), dim=-1, eps=1e-30)
    return 1 - cosine.flatten(1).mean(1) if cosine.ndim > 1 else 1 - cosine


def norm_ratio(
    before: Float[Tensor, "batch *token dim"], after: Float[Tensor, "batch *token dim"]
) -> Float[Tensor, " batch"]:
    """‖after‖ / ‖before‖, averaged over tokens where there are any; NaN for a zero vector."""
    norms = [torch.linalg.vector_norm(x.double(), dim=-1) for x in (after, before)]
    ratio = torch.where(norms[1] > 0, norms[0] / norms[1], torch.nan)
    return ratio.flatten(1).mean(1) if ratio.ndim > 1 else ratio


def relative_change(
    before: Float[Tensor, "batch *token dim"],
    after: Float[Tensor, "batch *token dim"],
    counted: Bool[Tensor, "batch some_token"],
) -> Float[Tensor, " batch"]:
    """√(mean ‖after − before‖²) / √(mean ‖before‖²) over the tokens that count; NaN where none does, or
    where they are 0.
    """
    first, second = (x.double().reshape(*counted.shape, -1) for x in (before, after))
    squares = [x.square().sum(-1).masked_fill(~counted, 0.0).sum(-1) for x in (second - first, first)]
    return torch.where(squares[1] > 0, (squares[0] / squares[1]).sqrt(), torch.nan)


@dataclass(frozen=True)
class Effect:
    """One line of the table.

    needs: the fields of `PassOutcome` that it reads.
    compute: these fields of the untouched outcome, then of the changed one → one number per input.
    """

    definition: str
    needs: tuple[str, ...]
    compute: Callable[..., Tensor]


def _loss_change(logits: Tensor, ids: Tensor, changed: Tensor, _: Tensor) -> Tensor:
    return next_token_loss(changed, ids) - next_token_loss(logits, ids)


def _loss_change_per_byte(logits: Tensor, ids: Tensor, size: Tensor, changed: Tensor, *_: Tensor) -> Tensor:
    return _loss_change(logits, ids, changed, ids) * (ids.shape[1] - 1) / size.double()


def _loss_increase(logits: Tensor, ids: Tensor, changed: Tensor, _: Tensor) -> Tensor:
    return next_token_loss(changed, ids) / next_token_loss(logits, ids) - 1


def _state_change(before: Tensor, _: Tensor, after: Tensor, counted: Tensor) -> Tensor:
    return relative_change(before, after, counted)


def _kept(_: Tensor, after: Tensor) -> Tensor:
    return after.double()


def _top_change(k: int, logits: Tensor, labels: Tensor, changed: Tensor, _: Tensor) -> Tensor:
    return in_top(changed, labels, k) - in_top(logits, labels, k)


EFFECTS: dict[str, Effect] = {
    "loss_change": Effect(
        "next-token loss after − before, nats per token", ("next_logits", "ids"), _loss_change
    ),
    "loss_change_per_byte": Effect(
        "next-token loss after − before, nats per byte of text",
        ("next_logits", "ids", "bytes"),
        _loss_change_per_byte,
    ),
    "loss_increase": Effect("next-token loss after / before − 1", ("next_logits", "ids"), _loss_increase),
    "top1_change": Effect(
        "share of inputs whose most likely class is the true one, after − before",
        ("class_logits", "labels"),
        partial(_top_change, 1),
    ),
    "top5_change": Effect(
        "share of inputs whose true class is among the five most likely, after − before",
        ("class_logits", "labels"),
        partial(_top_change, 5),
    ),
    "class_divergence": Effect(
        "KL(before ‖ after) of the predicted classes, nats", ("class_logits",), divergence
    ),
    "same_class": Effect("share of inputs with the same most likely class", ("class_logits",), agreement),
    "embedding_change": Effect(
        "1 − cosine of the pooled embedding with the untouched one", ("embedding",), direction_change
    ),
    "embedding_norm": Effect(
        "norm of the pooled embedding over the untouched one", ("embedding",), norm_ratio
    ),
    "token_change": Effect(
        "1 − cosine of each token after the last block with the untouched one, averaged over tokens",
        ("states",),
        direction_change,
    ),
    "token_norm": Effect(
        "norm of each token after the last block over the untouched one, averaged over tokens",
        ("states",),
        norm_ratio,
    ),
    "state_change": Effect(
        "root mean square change of the patches (or tokens) after the last block over their root mean "
        "square, sinks that were edited left out",
        ("states", "counted"),
        _state_change,
    ),
    "kept_mass": Effect(
        "share of the changed heads' attention weight that stays where it was", ("kept",), _kept
    ),
}


def effects(before: PassOutcome, after: PassOutcome) -> Mapping[str, Float[Tensor, " batch"]]:
    """Every effect that the outcomes allow, one number per input each."""
    found = {}
    for name, effect in EFFECTS.items():
        read = [getattr(outcome, need) for outcome in (before, after) for need in effect.needs]
        if all(part is not None for part in read):
            found[name] = effect.compute(*read)
    return found

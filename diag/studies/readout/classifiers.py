"""Classifiers of frozen features: multinomial logistic regression on a vector, or on what one query pools.

`linear` reads a vector per image, `attentive` its tokens: p = Σ_i softmax_i(q·x_i/√d) x_i with one learned
query q, then the same regression of p. At q = 0, where it begins, it is the regression on mean tokens
(attentive probing, Psomas et al. 2025, arXiv 2506.10178, with one query and no projections).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diag.errors import UserError, counted

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Of the L2 penalty λ/2·(‖W‖² + ‖q‖²) beside the mean cross-entropy, of features of standard deviation 1."""
LINEAR_STEPS, ATTENTIVE_STEPS = 200, 60
"""At most so many steps of L-BFGS."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """Weights of one classifier. query is None where features are vectors."""

    weight: Float[Tensor, "class dim"]
    bias: Float[Tensor, " class"]
    query: Float[Tensor, " dim"] | None = None

    def logits(self, features: Float[Tensor, "image *token dim"]) -> Float[Tensor, "image class"]:
        """Class logits of features of the shape that it was fitted to."""
        return F.linear(_pooled(features, self.query), self.weight, self.bias)


def fitted(
    features: Float[Tensor, "image *token dim"], labels: Int[Tensor, " image"], classes: int, strength: float
) -> Classifier:
    """The classifier of least penalised loss; of tokens, from q = 0 on, which need not be the only minimum.

    features: `[image, dim]`, or `[image, token, dim]` for one with a query.
    """
    dim, attends = features.shape[-1], features.ndim == 3
    weight = features.new_zeros(classes, dim, requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    query = features.new_zeros(dim, requires_grad=True) if attends else None
    parameters = [weight, bias, *([query] if query is not None else [])]
    steps = ATTENTIVE_STEPS if attends else LINEAR_STEPS
    optimiser = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = F.linear(_pooled(features, query), weight, bias)
        penalty = weight.square().sum() + (0.0 if query is None else query.square().sum())
        value = F.cross_entropy(logits, labels) + strength / 2 * penalty
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return Classifier(weight.detach(), bias.detach(), None if query is None else query.detach())


def held_out(
    features: Float[Tensor, "image *token dim"],
    labels: Int[Tensor, " image"],
    parts: Int[np.ndarray, " image"],
    strengths: dict[int, float] | None = None,
) -> tuple[Float[Tensor, "2 image"], dict[int, float]]:
    """Each image as a classifier predicts it that was fitted without its part: whether rightly, and the loss.

    parts: the part of each image. strengths: the penalty for each part; where it is None, for each part the
    one of `STRENGTHS` that predicts the next part best when fitted without both. Gives them too.
    """
    classes, found = int(labels.max()) + 1, features.new_zeros(2, len(labels))
    names = sorted(set(parts.tolist()))
    chosen = dict[int, float]()
    for part, following in zip(names, [*names[1:], names[0]], strict=True):
        test, inner = (torch.from_numpy(parts == name).to(features.device) for name in (part, following))
        if strengths is not None:
            chosen[part] = strengths[part]
        else:
            chosen[part] = min(
                STRENGTHS, key=_loss_without(features, labels, classes, fit=~test & ~inner, score=inner)
            )
        logits = _logits_without(features, labels, classes, chosen[part], fit=~test, score=test)
        found[0, test] = (logits.argmax(-1) == labels[test]).to(found.dtype)
        found[1, test] = F.cross_entropy(logits, labels[test], reduction="none")
    return found, chosen


def parts_of(labels: np.ndarray, parts: int, names: list[str], seed: int) -> np.ndarray:
    """The part of each image, `[image]`: classes are spread evenly over the parts, images drawn by `seed`.

    Raises UserError for one class alone, and for a class that has fewer images than there are parts.
    """
    if len(names) < 2:
        raise UserError(
            f"all images are of one class, '{names[0]}'", "give a folder of two class folders or more"
        )
    found, generator = np.zeros(len(labels), int), np.random.default_rng(seed)
    for label, name in enumerate(names):
        where = generator.permutation(np.flatnonzero(labels == label))
        if len(where) < parts:
            raise UserError(
                f"class '{name}' has {counted(len(where), 'image')}, and every one of {parts} parts "
                "needs one",
                "more images of it, a larger --limit, or fewer --folds (3 at least)",
            )
        found[where] = (np.arange(len(where)) + label) % parts
    return found


def _pooled(features: Tensor, query: Tensor | None) -> Tensor:
    if query is None:
        return features
    weights = (features @ query / math.sqrt(features.shape[-1])).softmax(-1)  # [image, token]
    return (weights[:, None] @ features)[:, 0]


def _logits_without(
    features: Tensor, labels: Tensor, classes: int, strength: float, *, fit: Tensor, score: Tensor
) -> Tensor:
    """Of the images of `score`, from a classifier of those of `fit`, in units of these' deviations."""
    known, asked = features[fit], features[score]
    axes = tuple(range(features.ndim - 1))
    mean, deviation = known.mean(axes), known.std(axes)
    scale = torch.where(deviation > 0, 1 / deviation, 0.0)  # a constant says nothing
    classifier = fitted((known - mean) * scale, labels[fit], classes, strength)
    return classifier.logits((asked - mean) * scale)


def _loss_without(
    features: Tensor, labels: Tensor, classes: int, *, fit: Tensor, score: Tensor
) -> Callable[[float], float]:
    def loss(strength: float) -> float:
        logits = _logits_without(features, labels, classes, strength, fit=fit, score=score)
        return F.cross_entropy(logits, labels[score]).item()

    return loss

"""Classifiers of frozen features against the formulas, and against what can and cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diag.errors import UserError
from diag.studies.readout.classifiers import fitted, held_out, parts_of

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.arange(60) % 3
NAMES = ["a", "b", "c"]
PARTS = parts_of(LABELS.numpy(), 4, NAMES, 0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def penalised(
    features: Tensor, weight: Tensor, bias: Tensor, query: Tensor | None, strength: float
) -> Tensor:
    """The loss written out, image by image, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for x, label in zip(features.double(), LABELS, strict=True):
        if query is not None:
            scores = torch.stack([query @ token for token in x]) / x.shape[-1] ** 0.5
            weights = scores.exp() / scores.exp().sum()
            x = sum(a * token for a, token in zip(weights, x, strict=True))  # type: ignore[assignment]
        logits = weight @ x + bias
        total = total - (logits[label] - logits.exp().sum().log())
    penalty = weight.square().sum() + (0 if query is None else query.square().sum())
    return total / len(LABELS) + strength / 2 * penalty


@pytest.mark.parametrize("attends", [False, True])
def test_no_step_lowers_the_penalised_loss(attends: bool) -> None:
    """The gradient of the loss, written out, is zero at what was fitted."""
    features = drawn(60, 5, 4) if attends else drawn(60, 4)
    found = fitted(features, LABELS, 3, 0.1)
    assert (found.query is not None) == attends
    parts = [x.double().requires_grad_() for x in (found.weight, found.bias)]
    query = None if found.query is None else found.query.double().requires_grad_()
    penalised(features, parts[0], parts[1], query, 0.1).backward()
    for x in (*parts, *([] if query is None else [query])):
        assert x.grad is not None
        assert x.grad.abs().max() < 1e-3


def test_a_class_that_lies_in_the_mean_is_read_by_both() -> None:
    tokens = drawn(60, 6, 8) + 3 * drawn(3, 1, 8)[LABELS]
    right, strengths = held_out(tokens.mean(1), LABELS, PARTS)
    assert right[0].mean() == 1
    assert held_out(tokens, LABELS, PARTS, strengths)[0][0].mean() == 1


def test_a_class_that_one_marked_token_holds_is_read_by_the_query_alone() -> None:
    """One token of 16 is marked and holds the class; all others hold a class that is drawn."""
    tokens, kinds = 0.1 * drawn(60, 16, 8), drawn(3, 6)
    tokens[:, :, :6] += kinds[torch.randint(0, 3, (60, 16), generator=GENERATOR)] * 2
    at = torch.randint(0, 16, (60,), generator=GENERATOR)
    tokens[torch.arange(60), at, :6] = kinds[LABELS] * 2
    tokens[torch.arange(60), at, 6] += 5
    on_mean, strengths = held_out(tokens.mean(1), LABELS, PARTS)
    with_query, _ = held_out(tokens, LABELS, PARTS, strengths)
    assert with_query[0].mean() > 0.9
    assert on_mean[0].mean() < 0.7


def test_an_image_is_never_predicted_by_what_was_fitted_to_it() -> None:
    """Drawn labels are read no better than by chance, and other labels of a part do not matter to it."""
    features, labels = drawn(60, 20), torch.randint(0, 3, (60,), generator=GENERATOR)
    found, strengths = held_out(features, labels, PARTS)
    assert found[0].mean() < 0.6
    changed = labels.clone()
    inside = torch.from_numpy(PARTS == 0)
    changed[inside] = (changed[inside] + 1) % 3
    again, _ = held_out(features, changed, PARTS, strengths)
    wrong = found[0, inside] == 1
    assert not again[0, inside][wrong].any()  # the same predictions, which are wrong now


def test_one_class_alone_is_no_question() -> None:
    with pytest.raises(UserError, match="all images are of one class, 'a'"):
        parts_of(np.zeros(9, int), 3, ["a"], 0)
    with pytest.raises(UserError, match="class 'b' has 1 image, and every one of 3 parts needs one"):
        parts_of(np.array([0, 0, 0, 1]), 3, ["a", "b"], 0)


def test_parts_hold_each_class_evenly() -> None:
    for label in range(3):
        counts = np.bincount(PARTS[LABELS.numpy() == label], minlength=4)
        assert counts.tolist() == [5, 5, 5, 5]
    with pytest.raises(UserError, match="class 'c' has 2 images, and every one of 3 parts needs one"):
        parts_of(np.array([0, 0, 0, 1, 1, 1, 2, 2]), 3, NAMES, 0)

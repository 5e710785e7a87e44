"""Effects against formulas written out, and what each is where nothing changed."""

from __future__ import annotations

import math

import pytest
import torch

from diag.studies.intervene.effect import (
    EFFECTS,
    PassOutcome,
    direction_change,
    divergence,
    effects,
    in_top,
    next_token_loss,
    norm_ratio,
    relative_change,
)

UNCHANGED = dict.fromkeys(("same_class", "embedding_norm", "token_norm", "kept_mass"), 1.0)
"""What an effect is where nothing changed; 0 for the others."""


def whole(seed: int) -> PassOutcome:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return PassOutcome(
        next_logits=drawn(3, 6, 11),
        ids=torch.arange(18).view(3, 6) % 11,
        bytes=torch.tensor([5, 10, 20]),
        class_logits=drawn(3, 7),
        embedding=drawn(3, 8),
        states=drawn(3, 6, 8),
        labels=torch.tensor([2, 6, -1]),
        counted=torch.ones(3, 6, dtype=torch.bool),
        kept=torch.ones(3) / seed,
    )


def test_the_loss_is_the_mean_negative_log_probability_of_the_next_token() -> None:
    outcome = whole(0)
    assert outcome.next_logits is not None
    assert outcome.ids is not None
    found = next_token_loss(outcome.next_logits, outcome.ids)
    for row in range(3):
        each = [
            -math.log(
                math.exp(outcome.next_logits[row, t, outcome.ids[row, t + 1]])
                / sum(math.exp(x) for x in outcome.next_logits[row, t])
            )
            for t in range(5)
        ]
        assert found[row].item() == pytest.approx(sum(each) / 5, rel=1e-6)


def test_the_divergence_is_that_of_the_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert divergence(p.log(), q.log()).item() == pytest.approx(expected)
    assert divergence(p.log() + 3, q.log()).item() == pytest.approx(expected)


def test_the_true_class_among_the_first() -> None:
    logits, labels = torch.tensor([[3.0, 2.0, 1.0]] * 4), torch.tensor([0, 1, 2, -1])
    assert in_top(logits, labels, 1).tolist()[:3] == [1, 0, 0]
    assert in_top(logits, labels, 2).tolist()[:3] == [1, 1, 0]
    assert in_top(logits, labels, 9).tolist()[:3] == [1, 1, 1]
    assert math.isnan(in_top(logits, labels, 1)[3])


def test_direction_and_norm() -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    assert direction_change(x, 5 * x).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert direction_change(x, -x).tolist() == pytest.approx([2, 2])
    assert direction_change(x, x.flip(1)).tolist() == pytest.approx([1, 1])
    assert norm_ratio(x, 5 * x).tolist() == pytest.approx([5, 5])
    assert math.isnan(norm_ratio(torch.zeros(1, 2), x[:1]).item())
    # tokens are averaged
    assert direction_change(x[None], torch.stack([x[0], -x[1]])[None]).item() == pytest.approx(1)


def test_the_relative_change_is_of_the_tokens_that_count() -> None:
    before = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]])
    after = torch.tensor([[[3.0, 1.0], [2.0, 4.0], [0.0, 0.0]]])
    counted = torch.tensor([[True, True, False]])
    assert relative_change(before, after, counted).item() == pytest.approx(math.sqrt((1 + 4) / (9 + 16)))
    assert relative_change(before, 2 * before, ~counted).item() == pytest.approx(1)
    assert math.isnan(relative_change(before, after, torch.zeros_like(counted)).item())
    picture = before.view(1, 3, 1, 2)  # blocks may keep rows and columns apart
    assert relative_change(picture, after.view(1, 3, 1, 2), counted).item() == pytest.approx(math.sqrt(0.2))


def test_the_loss_in_shares_is_the_same_loss() -> None:
    before, after = whole(1), whole(2)
    found = effects(before, after)
    assert before.next_logits is not None
    assert before.ids is not None
    loss = next_token_loss(before.next_logits, before.ids)
    torch.testing.assert_close(found["loss_increase"], found["loss_change"] / loss)
    assert found["kept_mass"].tolist() == [0.5] * 3


def test_where_nothing_changed() -> None:
    outcome = whole(1)
    found = effects(outcome, outcome)
    assert set(found) == set(EFFECTS)
    for name, values in found.items():
        known = values[~values.isnan()]
        assert known.tolist() == pytest.approx([UNCHANGED.get(name, 0.0)] * len(known), abs=1e-12), name


def test_where_something_changed() -> None:
    """A negative control."""
    for name, values in effects(whole(1), whole(2)).items():
        if name not in ("top1_change", "top5_change", "same_class"):
            assert (values != UNCHANGED.get(name, 0.0)).all(), name


def test_the_loss_per_byte_is_the_same_loss_in_another_unit() -> None:
    found = effects(whole(1), whole(2))
    per_byte = found["loss_change"] * 5 / torch.tensor([5, 10, 20])
    torch.testing.assert_close(found["loss_change_per_byte"], per_byte.double())


def test_only_what_a_model_has_is_measured() -> None:
    states = torch.ones(2, 3, 4)
    assert set(effects(PassOutcome(states=states), PassOutcome(states=2 * states))) == {
        "token_change",
        "token_norm",
    }

"""Weights: what does not fit a model, or holds no numbers, is told by name; a digest sees every bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diag.errors import UserError
from diag.models.weights import digest, fit, refuse_non_finite


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_wrong_shapes_are_named(linear: nn.Module) -> None:
    with pytest.raises(UserError) as error:
        fit(linear, {"weight": torch.zeros(2, 5), "bias": torch.zeros(2)}, "checkpoint 'w.pt'")
    assert (
        str(error.value)
        == "checkpoint 'w.pt' does not fit the model: 'weight' is [2, 5], the model's is [2, 3]"
    )


def test_missing_and_foreign_tensors_are_named_up_to_three(linear: nn.Module) -> None:
    tensors = {f"x{i}": torch.zeros(1) for i in range(5)} | {"weight": torch.zeros(2, 3)}
    with pytest.raises(UserError) as error:
        fit(linear, tensors, "it")
    message = "it does not fit the model: it lacks 'bias' and the model has no 'x0', 'x1', 'x2' and 2 more"
    assert str(error.value) == message


def test_nan_in_weights_names_the_tensor(linear: nn.Module) -> None:
    refuse_non_finite(linear, "it")
    linear.bias.data[1] = float("nan")
    with pytest.raises(UserError, match="the weights 'bias' hold NaN or infinity"):
        refuse_non_finite(linear, "it")


def test_the_digest_sees_every_bit_name_and_type(linear: nn.Module) -> None:
    before = digest(linear)
    assert digest(linear) == before
    linear.bias.data[0] = torch.nextafter(linear.bias.data[0], torch.tensor(9.0))
    changed = digest(linear)
    assert len({before, changed, digest(linear.to(torch.bfloat16)), digest(nn.Sequential(linear))}) == 4


def test_whole_numbers_are_no_weights(linear: nn.Module) -> None:
    state = linear.state_dict() | {"weight": torch.ones(2, 3, dtype=torch.int8)}
    with pytest.raises(UserError, match="it: 'weight' holds int8, no weights") as error:
        fit(linear, state, "it")
    assert "quantised models are not read" in (error.value.tip or "")

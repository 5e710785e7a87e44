"""Weights: what does not fit a model, or holds no numbers, is told by name; a digest sees every bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


class Quantised(Tensor):
    """Whole numbers and a scale, in the place of weights; it does not do all that tensors do."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


def test_the_digest_of_quantised_weights_is_that_of_what_they_are_made_of(linear: nn.Module) -> None:
    def with_codes(codes: Tensor, scale: float) -> str:
        weight = Quantised(codes, torch.tensor(scale))
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return digest(linear)

    codes = torch.arange(6, dtype=torch.int8).view(2, 3)
    before = with_codes(codes, 0.5)
    assert with_codes(codes.clone(), 0.5) == before
    assert len({before, with_codes(codes + 1, 0.5), with_codes(codes, 0.25)}) == 3


def test_whole_numbers_are_no_weights(linear: nn.Module) -> None:
    state = linear.state_dict() | {"weight": torch.ones(2, 3, dtype=torch.int8)}
    with pytest.raises(UserError, match="it: 'weight' holds int8, no weights") as error:
        fit(linear, state, "it")
    assert "quantised models are not read" in (error.value.tip or "")

"""A model run on the side of its training."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from diag.errors import UserError
from diag.studies.monitor.training_pass import (
    Given,
    InputRecorder,
    Precision,
    fixed,
    precision,
    untouched,
    unwrapped,
)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        random.random()
        return self.inner(x + torch.rand(3) + np.random.rand())


def state(module: nn.Module) -> list[object]:
    return [
        {name: value.tolist() for name, value in module.state_dict().items()},
        [id(buffer) for buffer in module.buffers()],
        [buffer._version for buffer in module.buffers()],
        [child.training for child in module.modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        [np.random.get_state()[1].tolist(), np.random.get_state()[2]],
        torch.get_float32_matmul_precision(),
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_a_pass_leaves_everything_as_it_was(fails: bool) -> None:
    module = Counting()
    module.inner[2].eval()
    before = state(module)
    try:
        with untouched(module):
            assert not any(child.training for child in module.modules())
            module(torch.ones(4, 3))
            assert module.calls == 1
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert state(module) == before


def test_a_pass_that_is_not_guarded_is_noticed() -> None:
    """A negative control: every part of the state that is compared does change."""
    module = Counting()
    before = state(module)
    module(torch.ones(4, 3))
    changed = [one != other for one, other in zip(before, state(module), strict=True)]
    assert changed == [True, False, True, False, True, True, True, False]


def test_products_are_in_full_precision_in_between() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with untouched(nn.Linear(2, 2)):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_measuring_between_forward_and_backward_does_no_harm() -> None:
    module = Counting()
    loss = (module(torch.ones(4, 3)) * module.calls).sum()
    with untouched(module), torch.no_grad():
        module(torch.ones(4, 3))
    loss.backward()


def heard(*positional: object, rows: int = 2, **named: object) -> Given | None:
    ear = InputRecorder(rows)
    ear(nn.Identity(), positional, named)
    return ear.heard


def test_what_is_heard_is_cut_and_copied() -> None:
    x, scalar, mask = torch.arange(12.0).view(4, 3).requires_grad_(), torch.tensor(5.0), torch.ones(3, 3)
    found = heard(x, [x, "text"], {"inner": x}, mask=mask, divisor=scalar, use_cache=False)
    assert found is not None
    assert found.rows == 2
    first, (second, text), third = found.positional
    for part in (first, second, third["inner"]):
        assert torch.equal(part, x[:2])
        assert not part.requires_grad
        assert part.data_ptr() != x.data_ptr()
    assert text == "text"
    assert torch.equal(found.named["mask"], mask)
    assert found.named["divisor"] == 5
    assert found.named["use_cache"] is False


def test_a_tokenizers_batch_stays_one() -> None:
    batch = transformers.BatchEncoding({"input_ids": torch.ones(4, 3)})
    found = heard(batch)
    assert found is not None
    assert found.positional[0].input_ids.shape == (2, 3)
    assert batch.input_ids.shape == (4, 3)


def test_nothing_is_heard_of_passes_without_gradients_or_tensors() -> None:
    with torch.no_grad():
        assert heard(torch.ones(3)) is None
    assert heard("text", torch.tensor(1.0)) is None
    assert heard(torch.ones(3)) is not None


def test_autocast_is_heard_and_set_again_without_its_cache() -> None:
    device = torch.device("cpu")
    plain, linear = Precision.now(device), nn.Linear(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = heard(torch.ones(2, 3))
        with precision(device, plain):
            assert linear(torch.ones(1, 3)).dtype == torch.float32
    assert found is not None
    assert found.precision is not None
    with precision(device, found.precision):
        assert linear(torch.ones(1, 3)).dtype == torch.bfloat16
        assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()


def test_padding_is_a_two_dimensional_mask_by_name() -> None:
    mask = torch.tensor([[1, 1, 0]])
    assert torch.equal(fixed({"x": torch.ones(1, 3), "attention_mask": mask}).real, mask.bool())
    assert fixed({"attention_mask": mask[None, None]}).real is None
    assert fixed(mask).real is None


@pytest.mark.parametrize("batch", ["text", {}, {"x": 3}, torch.tensor(1.0), (torch.ones(2),)])
def test_batches_that_are_none(batch: object) -> None:
    with pytest.raises(UserError, match=f"the fixed batch is a {type(batch).__name__}"):
        fixed(batch)  # type: ignore[arg-type]


def test_wrappers_are_taken_off() -> None:
    module = nn.Linear(2, 2)
    assert unwrapped(torch.compile(nn.DataParallel(module), backend="eager")) is module
    assert unwrapped(module) is module

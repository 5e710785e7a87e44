"""The fused statistics of values and outputs against float64, formula by formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import (
    CASES,
    dense_values,
    key_padding,
    make_call,
    random_bias,
    random_mask,
    with_zeros,
)
from torch import Tensor

from diag.attention.call import AttentionCall

triton_scores = pytest.importorskip("diag.attention.kernels.triton_scores", reason="Triton is not installed")
from diag.attention.kernels import triton_values  # noqa: E402
from diag.attention.kernels.triton_values import supports_values, value_statistics  # noqa: E402

DEVICE = "cpu" if triton_scores.INTERPRETED else "cuda"
LEAST = 4e-6
PADDED = key_padding([range(37), range(5, 30)], 37)
CALLS = {
    "full": make_call(tokens=37, heads=2),
    "causal": make_call(tokens=37, heads=2, causal=True),
    "padding": make_call(tokens=37, heads=2, mask=PADDED),
    "causal left padding": make_call(tokens=37, heads=2, mask=PADDED, causal=True),
    "grouped": make_call(tokens=20, heads=4, kv_heads=2, causal=True),
    "bias": make_call(tokens=20, heads=2, mask=random_bias(1, 2, 20, 20)),
    "zero vectors": with_zeros(make_call(causal=True)),
    "bfloat16": make_call(tokens=20, heads=2, dtype=torch.bfloat16, causal=True),
    "float16": make_call(tokens=20, heads=2, dtype=torch.float16),
    "narrow values": make_call(dim=24, value_dim=8, kv_heads=2),
    "head size 80": make_call(batch=1, heads=1, tokens=20, dim=80, causal=True),
    "one token": make_call(tokens=1, causal=True),
    "no real token": CASES["no real token"],
}


def on_device(call: AttentionCall) -> AttentionCall:
    return replace(call, **{name: x.to(DEVICE) for name, x in vars(call).items() if isinstance(x, Tensor)})


@pytest.mark.parametrize(
    ("name", "share"), [*((name, 0.6) for name in CALLS), ("full", 1.0), ("causal left padding", 1.0)]
)
def test_values_match_the_dense_reference(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all tokens, and for a token set, in blocks of 16 tokens."""
    monkeypatch.setattr(triton_values, "ELEMENTS", 16)
    call = CALLS[name]
    among = random_mask(call.batch, call.tokens, share=share)
    if call.visibility.keys is not None:
        among = among & call.visibility.keys
    rows = (among[:, None] & (call.visibility.count > 1)).expand(call.output.shape[:3])
    assert supports_values(on_device(call))
    found = value_statistics(on_device(call), among.to(DEVICE), rows.to(DEVICE), LEAST)
    for field, expected in dense_values(call, among.numpy(), rows.numpy(), LEAST).items():
        measured = getattr(found, field).cpu().numpy()
        assert measured.dtype == np.float32, field
        assert measured.shape == expected.shape, field
        # the direction of what hardly is left of an output is known to fewer digits
        tolerance = 2e-3 if field == "exclusive_total" else 2e-5
        np.testing.assert_allclose(measured, expected, tolerance, tolerance, err_msg=field)


def test_layouts_of_models_are_read_in_place() -> None:
    call = CALLS["grouped"]
    value, output = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.value, call.output))
    assert not value.is_contiguous()
    among, rows = torch.ones(1, 20, dtype=torch.bool), torch.ones(1, 1, 20, dtype=torch.bool)
    given = [on_device(call), on_device(replace(call, value=value, output=output))]
    one, other = (value_statistics(each, among.to(DEVICE), rows.to(DEVICE), LEAST) for each in given)
    for field, x in vars(one).items():
        assert torch.equal(x, getattr(other, field)), field  # the same bits on every run, too


def test_padding_may_hold_anything() -> None:
    call = CALLS["padding"]
    value = call.value.masked_fill(~PADDED.transpose(2, 3), torch.nan)
    among = PADDED[:, 0, 0]
    rows = among[:, None]
    found = value_statistics(on_device(replace(call, value=value)), among.to(DEVICE), rows.to(DEVICE), LEAST)
    for field, x in vars(found).items():
        assert x.isfinite().all(), field


def test_a_mask_without_structure_is_left_to_plain_pytorch() -> None:
    assert not supports_values(on_device(CASES["random mask"]))
    assert not supports_values(on_device(CASES["float64"]))
    assert not supports_values(on_device(make_call(value_dim=257)))
    assert supports_values(on_device(CASES["full; pattern given"]))  # queries are not read

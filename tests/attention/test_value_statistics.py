"""The statistics of values and outputs in plain PyTorch against float64, formula by formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import CASES, dense_values, key_padding, make_call, random_mask

from diag.attention import call as attention
from diag.attention.value_statistics import value_blocks, value_statistics

LEAST = 4e-6


@pytest.mark.parametrize("elements", [1, 13 * 16 * 5, 1 << 18])
@pytest.mark.parametrize("name", list(CASES))
def test_values_match_the_dense_reference(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head by head, a few heads at a time, and all at once."""
    monkeypatch.setitem(attention.TENSOR_ELEMENTS, "cpu", elements)
    call = CASES[name]
    least = max(LEAST, 4 * torch.finfo(call.output.dtype).eps)
    among = random_mask(call.batch, call.tokens, share=0.6)
    if call.visibility.keys is not None:
        among = among & call.visibility.keys
    rows = (among[:, None] & (call.visibility.count > 1)).expand(call.output.shape[:3])
    found = value_statistics(call, among, rows, least)
    for field, expected in dense_values(call, among.numpy(), rows.numpy(), least).items():
        measured = getattr(found, field).numpy()
        assert measured.dtype == np.float32, field
        assert measured.shape == expected.shape, field
        # the direction of what hardly is left of an output is known to fewer digits
        tolerance = 2e-3 if field == "exclusive_total" else 2e-5
        np.testing.assert_allclose(measured, expected, tolerance, tolerance, err_msg=field)


def test_blocks_hold_every_value_once_and_are_of_about_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(batch=3, heads=10, kv_heads=5, tokens=7, dim=4)
    for number, shapes in ((2, [(1, 2), (1, 2), (1, 1)] * 3), (7, [(1, 5)] * 3), (10, [(2, 5), (1, 5)])):
        monkeypatch.setitem(attention.TENSOR_ELEMENTS, "cpu", number * call.group * 7 * 4)
        whole = torch.full_like(call.value, torch.nan)
        seen = []
        for where, value in value_blocks(call):
            assert whole[where].isnan().all()
            whole[where] = value
            seen.append(tuple(value.shape[:2]))
        assert torch.equal(whole, call.value)
        assert seen == shapes


def test_blocks_are_those_of_all_threads_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's block is no larger where the CPU beside it has more threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert attention.of_threads({"cpu": 5, "cuda": 7}, torch.device("cpu")) == 30
    assert attention.of_threads({"cpu": 5, "cuda": 7}, torch.device("cuda")) == 7


def test_padding_may_hold_anything() -> None:
    padding = key_padding([range(13), range(5, 11)], 13)
    call = make_call(mask=padding)
    value = call.value.masked_fill(~padding.transpose(2, 3), torch.nan)
    among = padding[:, 0, 0]
    given = [
        value_statistics(each, among, among[:, None], LEAST) for each in (call, replace(call, value=value))
    ]
    for field, x in vars(given[0]).items():
        assert torch.equal(x, getattr(given[1], field)), field

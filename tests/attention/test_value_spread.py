"""How values lie about each other, at lengths and angles where float32 has few digits to spare."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import float64, make_call, values_of_one_head

from diag.attention.call import AttentionCall
from diag.attention.value_spread import ANCHORS, ValueSpread, anchors, value_spread


def spread_of(call: AttentionCall) -> ValueSpread:
    norm = torch.linalg.vector_norm(call.value, dim=-1)
    return value_spread(call, torch.ones(1, call.tokens, dtype=torch.bool), norm)


@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("apart", [1.0, 1e-1, 1e-2])
def test_neither_length_nor_nearly_parallel_values_cost_digits(length: float, apart: float) -> None:
    call = make_call(tokens=40, seed=5)
    value = call.value[:, :, :1] + apart * call.value
    call = replace(call, value=value * length)
    found = spread_of(call)
    ranks, _ = anchors(torch.tensor([40]), ANCHORS)
    for place in np.ndindex(call.batch, call.kv_heads):
        expected = values_of_one_head(float64(call.value)[place], list(range(40)), ranks[0].tolist())
        measured = found.partial_similarity[place].item()
        assert measured == pytest.approx(expected["value_similarity_partial"], abs=1e-6)
        ratio = found.participation_ratio[place].item()
        assert ratio == pytest.approx(expected["value_participation_ratio"], rel=2e-6 / apart)
        assert found.is_spread[place]


def test_values_that_are_all_the_same_have_no_spread() -> None:
    call = make_call(tokens=40)
    same = replace(call, value=call.value[:, :, :1].expand(-1, -1, 40, -1).contiguous())
    assert not spread_of(same).is_spread.any()
    assert spread_of(call).is_spread.all()

"""Attention with its log-normaliser: the public function's output to the bit, and the exact `lse`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diag.attention.kernels.flash import attention_with_normaliser


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call; `flash` is whether the operator with `lse` may serve it."""

    flash: bool = True
    tokens: int = 13
    keys: int | None = None
    kv_heads: int = 4
    dim: int = 16
    value_dim: int | None = None
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    grouped: bool = False
    dtype: torch.dtype = torch.float32
    dimensions: int = 4


LOWER = torch.ones(13, 13, dtype=torch.bool).tril()
CASES = {
    "plain": Case(),
    "causal": Case(causal=True),
    "long": Case(tokens=700),
    "long, causal": Case(tokens=700, causal=True),
    "one token": Case(tokens=1),
    "scale": Case(scale=1.0),
    "odd head dimension": Case(dim=10),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16, causal": Case(dtype=torch.float16, causal=True),
    "float64": Case(dtype=torch.float64),
    "fewer queries": Case(keys=29),
    "one KV head": Case(kv_heads=1),
    "grouped": Case(kv_heads=2, grouped=True),
    "grouped, causal": Case(kv_heads=2, grouped=True, causal=True),
    "mask": Case(mask=LOWER),
    "padding": Case(mask=torch.arange(13)[None, None, None] > torch.tensor([2, 5])[:, None, None, None]),
    "grouped, mask": Case(kv_heads=1, grouped=True, mask=LOWER, tokens=13),
    "mask of numbers": Case(mask=torch.zeros(13, 13).masked_fill(~LOWER, torch.finfo(torch.float32).min)),
    "mask, bfloat16": Case(mask=LOWER, dtype=torch.bfloat16),
    "bias": Case(mask=torch.randn(1, 4, 13, 13, generator=torch.Generator().manual_seed(0))),
    "bias of other heads": Case(mask=torch.randn(2, 1, 13, 13, generator=torch.Generator().manual_seed(3))),
    "bias in another format": Case(
        flash=False,
        mask=torch.randn(13, 13, generator=torch.Generator().manual_seed(3)),
        dtype=torch.bfloat16,
    ),
    "mask of three dimensions": Case(flash=False, mask=LOWER[None].expand(4, 13, 13)),
    "three dimensions": Case(flash=False, dimensions=3),
    "five dimensions": Case(flash=False, dimensions=5),
    "narrow values": Case(flash=False, value_dim=8),
}
every_case = pytest.mark.parametrize("name", CASES)


def arguments(case: Case) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)

    def draw(heads: int, tokens: int, dim: int) -> Tensor:
        x = torch.randn(2, heads, tokens, dim, generator=generator).to(case.dtype)
        return {3: x.flatten(0, 1), 4: x, 5: x[:, :, None]}[case.dimensions]

    keys = case.keys or case.tokens
    query, key = draw(4, case.tokens, case.dim), draw(case.kv_heads, keys, case.dim)
    value = draw(case.kv_heads, keys, case.value_dim or case.dim)
    return query, key, value, case.mask, 0.0, case.causal, case.scale, case.grouped


def public(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    mask, dropout, causal, scale, grouped = options
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped
    )


@every_case
def test_the_output_is_that_of_the_public_function_to_the_bit(name: str) -> None:
    given = arguments(CASES[name])
    output, normaliser = attention_with_normaliser(*given)
    assert torch.equal(output, public(*given))
    assert output.dtype == CASES[name].dtype
    assert (normaliser is not None) == CASES[name].flash


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.flash])
def test_the_normaliser_is_exact(name: str) -> None:
    case = CASES[name]
    query, key, *_ = arguments(case)
    _, normaliser = attention_with_normaliser(*arguments(case))
    scale = case.dim**-0.5 if case.scale is None else case.scale
    key = key.repeat_interleave(4 // case.kv_heads, 1)
    scores = scale * query.double() @ key.double().transpose(-1, -2)
    if case.mask is not None:
        scores = scores + (
            torch.where(case.mask, 0.0, -torch.inf) if case.mask.dtype == torch.bool else case.mask
        )
    if case.causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    assert normaliser is not None
    assert normaliser.shape == (2, 4, case.tokens)
    tolerance = 1e-2 if case.dtype.itemsize == 2 else 1e-5  # half formats round the scores
    torch.testing.assert_close(normaliser.double(), scores.logsumexp(-1), rtol=0, atol=tolerance)


def test_a_row_that_sees_nothing() -> None:
    query, key, value, *_ = arguments(CASES["plain"])
    mask = torch.ones(13, 13, dtype=torch.bool)
    mask[4] = False
    output, normaliser = attention_with_normaliser(query, key, value, mask, 0.0, False, None, False)
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    assert torch.equal(output.nan_to_num(1), expected.nan_to_num(1))
    assert normaliser is not None
    other = torch.arange(13) != 4
    whole = attention_with_normaliser(query, key, value, None, 0.0, False, None, False)[1]
    assert whole is not None
    torch.testing.assert_close(normaliser[:, :, other], whole[:, :, other])


def test_a_view_as_projections_give_it() -> None:
    """Queries, keys and values cut out of one projection and transposed, not contiguous."""
    qkv = torch.randn(2, 9, 3, 4, 8, generator=torch.Generator().manual_seed(2)).permute(2, 0, 3, 1, 4)
    output, normaliser = attention_with_normaliser(*qkv, None, 0.0, False, None, False)
    assert torch.equal(output, F.scaled_dot_product_attention(*qkv))
    assert normaliser is not None
    contiguous = attention_with_normaliser(*qkv.contiguous(), None, 0.0, False, None, False)[1]
    torch.testing.assert_close(normaliser, contiguous)


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_flow_where_they_are_asked_for(grad: bool) -> None:
    given = arguments(CASES["plain"])
    given[0].requires_grad_()
    with nullcontext() if grad else torch.no_grad():
        output, normaliser = attention_with_normaliser(*given)
    assert output.requires_grad == grad
    assert (normaliser is None) == grad


def test_a_chosen_backend_is_kept() -> None:
    given = arguments(CASES["long"])
    with sdpa_kernel(SDPBackend.MATH):
        output, normaliser = attention_with_normaliser(*given)
        assert torch.equal(output, public(*given))
    assert normaliser is None
    assert not torch.equal(output, public(*given))  # the flash operator rounds differently


def test_autocast_is_kept() -> None:
    given = arguments(CASES["plain"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = attention_with_normaliser(*given)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, public(*given))


def test_dropout_is_left_to_the_public_function() -> None:
    query, key, value, *_ = arguments(CASES["plain"])
    torch.manual_seed(0)
    output, normaliser = attention_with_normaliser(query, key, value, None, 0.5, False, None, False)
    torch.manual_seed(0)
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value, dropout_p=0.5))
    assert normaliser is None

"""Keys that are no tokens: what they add to the output is what is missing from A V of the tokens."""

from __future__ import annotations

import pytest
import torch

from diag.attention import extra_keys
from diag.attention.call import AttentionCall
from diag.attention.extra_keys import without_extra_keys, without_extra_weights
from diag.attention.pattern import attend, pattern_rows


@pytest.mark.parametrize("extra", [(0, 1), (2, 0), (1, 2)])
@pytest.mark.parametrize("how", ["none", "bool", "added"])
@pytest.mark.parametrize("blocks", [1 << 20, 60])
def test_tokens_and_others_make_up_the_output(
    extra: tuple[int, int], how: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against softmax over all keys in float64; two query heads share a key head."""
    monkeypatch.setitem(extra_keys.BLOCK_ELEMENTS, "cpu", blocks)
    generator = torch.Generator().manual_seed(0)
    tokens, keys = 7, 7 + sum(extra)
    q = torch.randn(2, 4, tokens, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, keys, 8, generator=generator)
    seen = torch.rand(2, 1, tokens, keys, generator=generator) > 0.3
    seen[..., extra[0] :].diagonal(dim1=-2, dim2=-1).fill_(True)
    mask = {"none": None, "bool": seen, "added": torch.zeros(seen.shape).masked_fill(~seen, -1e4)}[how]
    wide_k, wide_v = (x.double().repeat_interleave(2, 1) for x in (k, v))
    scores = q.double() @ wide_k.mT * 0.3
    weights = (scores if mask is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1)
    output = (weights @ wide_v).float()
    found = without_extra_keys(q, k, v, mask, 0.3, extra)
    call = AttentionCall(
        layer=0,
        module="",
        query=q,
        key=found.key,
        value=found.value,
        output=output,
        mask=found.mask,
        causal=False,
        scale=0.3,
        log_normaliser=found.log_normaliser,
        outside=found.outside,
    )
    own = slice(extra[0], extra[0] + tokens)
    torch.testing.assert_close(pattern_rows(call), weights[..., own].float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(attend(call), output, atol=1e-6, rtol=1e-5)
    pattern, value, outside = without_extra_weights(weights, wide_v, extra)
    assert torch.equal(pattern, weights[..., own])
    assert torch.equal(value, wide_v[:, :, own])
    torch.testing.assert_close(outside, found.outside.double(), atol=1e-6, rtol=1e-5)

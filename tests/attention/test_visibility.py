"""What hides a key: its weight, and that a mask goes down at once where a distance goes down in steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import (
    additive,
    dense_scores,
    dense_shown,
    distance,
    float64,
    key_padding,
    make_call,
    random_bias,
    random_mask,
)
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left

from diag.attention import visibility
from diag.attention.pattern import pattern_rows
from diag.attention.visibility import Visibility, hiding, plain, prefix_sums
from diag.errors import MeasurementError
from diag.metrics.default import METRICS, per_input

LOWEST = torch.finfo(torch.float32).min
ENTRIES = (-100.0, -1e3, -1e4, -1e9, LOWEST, -math.inf)
"""What libraries add to hide a key, beside the smallest numbers of other formats."""


def read(mask: Tensor) -> Visibility:
    """What is read off a mask over `[…, token]`."""
    return Visibility.of(mask, False, torch.empty(1, 1, mask.shape[-1], 1))


def shows(mask: Tensor, shown: Tensor) -> bool:
    """Whether exactly these keys are seen, broadcastable to `[batch, head, token, token]`."""
    found = read(mask).of_rows(torch.arange(mask.shape[-1]))
    return bool((found == shown).all())


ALL = torch.tensor(True)


def alibi(tokens: int, heads: int, *, of_keys: bool = False, symmetric: bool = False) -> Tensor:
    """`[1, head, token, token]`: slopes of 2^(-8 h / heads), as MPT, Falcon and Jina write them.

    of_keys: counted from the last key, one row for all queries.
    """
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
    position = torch.arange(tokens)
    away = position - position[:, None]
    away = -away.abs() if symmetric else away.clamp(max=0)
    away = position[None] - (tokens - 1) if of_keys else away
    return (slopes[:, None, None] * away)[None]


# --- what is in use


LOWER = torch.ones(200, 200, dtype=torch.bool).tril()
PADDED = key_padding([range(200), range(60, 200), range(0)], 200)
FORMATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("entry", [*ENTRIES, "lowest"])
def test_what_libraries_write_hides(dtype: torch.dtype, entry: float | str) -> None:
    """Causality and padding, one after the other and added up, and rows that see nothing."""
    lowest = torch.finfo(dtype).min
    entry = lowest if isinstance(entry, str) else max(entry, lowest) if math.isfinite(entry) else entry
    for shown in (LOWER, PADDED, LOWER & PADDED):
        assert shows(additive(shown, entry, dtype), shown)
        assert read(additive(shown, entry, dtype)).rule == read(shown).rule
    assert shows(additive(LOWER, entry, dtype) + additive(PADDED, entry, dtype), LOWER & PADDED)


@pytest.mark.parametrize("tokens", [200, 2048])
@pytest.mark.parametrize("form", ["of_keys", "symmetric", "causal"])
def test_a_distance_is_of_keys_that_are_seen(tokens: int, form: str) -> None:
    """However steep and long: at 2,048 tokens many weights of the steeper head are exactly zero."""
    bias = alibi(tokens, 2, **({} if form == "causal" else {form: True}))
    assert shows(bias, ALL)
    assert bias.min() < (-87.4 if tokens > 200 else 0)
    lower = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    for entry in (LOWEST, -math.inf, -1e4):
        assert shows(bias + additive(lower, entry), lower)


def test_long_and_steep_distances() -> None:
    for dtype in FORMATS:  # down to -32768, where neighbours in bfloat16 are 128 apart
        assert hiding(-torch.arange(32768.0).to(dtype))[1] == -math.inf
    for slope in (0.3, 1.0, 20.0, 43.0):
        assert shows(-slope * distance(60), ALL)


@pytest.mark.parametrize("size", [1.0, 10.0, 20.0])
def test_windows_hide_with_a_hundred_on_top_of_a_learned_bias(size: float) -> None:
    """Swin: each window adds the bias of its places; some windows add -100 as well."""
    shown = random_mask(16, 1, 49, 49) | torch.eye(49, dtype=torch.bool)
    shown[:4] = True
    bias = size * (2 * torch.rand(1, 3, 49, 49, generator=torch.Generator().manual_seed(1)) - 1)
    assert shows(bias + additive(shown, -100.0), shown)
    assert shows(bias, ALL)


def test_a_bias_that_leaves_weight_hides_nothing() -> None:
    """e^-80 is a weight in float32, e^-88 is none that is kept in full."""
    for entry in (-20.0, -50.0, -80.0):
        assert shows(additive(LOWER, entry), ALL)
    assert shows(additive(LOWER, -88.0), LOWER)


def test_what_all_entries_of_a_head_have_in_common_hides_nothing() -> None:
    """A softmax takes no notice of it: heads may stand 90 lower than others. Below -9000 all is padding."""
    offset = torch.tensor([0.0, 90.0, -500.0])[:, None, None]
    assert shows(offset.expand(3, 9, 9), ALL)
    shown = torch.ones(9, 9, dtype=torch.bool).tril()
    assert shows(offset + additive(shown, -1e3), shown)
    for entry in (-1e4, LOWEST, -math.inf):
        assert shows(torch.full((1, 1, 9, 9), entry), ~ALL)


def test_heads_that_no_entry_parts() -> None:
    """Hidden at -100 in one head, seen at -1180 in another: the call has a copy of the mask with -inf."""
    lower = torch.ones(60, 60, dtype=torch.bool).tril()
    far = -20.0 * distance(60)
    mask = torch.stack([additive(lower, -100.0), far])[None]
    before = mask.clone()
    call = make_call(batch=1, heads=2, tokens=60, mask=mask)
    assert torch.equal(mask, before)
    assert call.mask is not None
    assert torch.equal(call.mask, torch.stack([additive(lower, -math.inf), far])[None])
    assert call.hidden == -math.inf
    assert replace(call, output=-call.output).visibility is call.visibility


@pytest.mark.parametrize("most", [0, 2, 100])
def test_steps_that_a_few_rows_do_not_hold(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of several lengths in one row, the longest in between: walked down, or sorted."""
    monkeypatch.setattr(visibility, "MOST_STEPS", most)
    shown = torch.block_diag(*(torch.ones(n, n) for n in (20, 130, 50))).bool()
    for entry in (-1e4, -math.inf):
        assert shows(-2 * distance(200) + additive(shown, entry), shown)
    assert shows(torch.where(shown, -2 * distance(200), 0.0), ALL)


@pytest.mark.parametrize("budget", [1, 60 * 200])
def test_blocks_of_rows_do_not_matter(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(visibility.BLOCK_ELEMENTS, "cpu", budget)
    assert shows(alibi(200, 4) + additive(LOWER, -1e4), LOWER)
    assert shows(alibi(200, 4, symmetric=True), ALL)


# --- against the reference


BIASES: dict[str, Callable[[int], Tensor]] = {
    "none": lambda seed: torch.zeros(1, 1, 13, 13),
    "learned": lambda seed: 5 * random_bias(1, 4, 13, 13, seed=seed),
    "of keys": lambda seed: 5 * random_bias(2, 1, 1, 13, seed=seed),
    "distance": lambda seed: (
        -torch.rand(1, 4, 1, 1, generator=torch.Generator().manual_seed(seed)) * 40 * distance(13)
    ),
    "offsets": lambda seed: 200 * random_bias(1, 4, 1, 1, seed=seed),
}
SHAPES = ((2, 4, 13, 13), (2, 1, 13, 13), (1, 1, 13, 13), (2, 1, 1, 13), (1, 4, 1, 13))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("seed", range(4))
def test_random_masks_hide_what_the_weights_say(bias: str, seed: int) -> None:
    """As the reference decides, which sorts; a softmax in which nothing is hidden gives the same weights."""
    for number, (shape, entry) in enumerate(product(SHAPES, ENTRIES)):
        share = (0.2, 0.6, 0.95)[(seed + number) % 3]
        dtype = FORMATS[(seed + number) % 3] if bias == "none" else torch.float32
        entry = max(entry, torch.finfo(dtype).min) if math.isfinite(entry) else entry
        drawn = random_mask(*shape, seed=100 * seed + number, share=share)
        mask = additive(drawn, entry, dtype) + BIASES[bias](seed).to(dtype)
        expected = dense_shown(mask)
        call = make_call(mask=mask, seed=seed)
        shown = np.broadcast_to(expected, (2, 4, 13, 13))
        assert np.array_equal(call.visibility.count.expand(2, 4, 13).numpy(), shown.sum(-1))
        scores = dense_scores(replace(call, mask=None)) + float64(mask)
        meaningful = shown.any(-1)
        scores = scores[meaningful] - scores[meaningful].max(-1, keepdims=True)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        assert weights[~shown[meaningful]].max(initial=0.0) < 1e-17
        np.testing.assert_allclose(pattern_rows(call).numpy()[meaningful], weights, rtol=1e-5, atol=1e-5)
        assert not pattern_rows(call).numpy()[~meaningful].any()


@pytest.mark.parametrize("causal", [False, True])
def test_every_way_of_hiding_gives_the_same_numbers(causal: bool) -> None:
    """All metrics, also where rows see nothing and what they hold is of no meaning."""
    shown = random_mask(2, 1, 13, 13) & key_padding([range(13), range(3, 11)], 13)
    shown[1, :, 4] = False
    call = make_call(mask=shown, causal=causal)
    sees = (call.visibility.count > 0)[..., None]
    assert not sees[1, :, 4].any()
    exact = per_input(call)
    assert set(exact) == set(METRICS)
    for entry in ENTRIES:
        mask = additive(shown, entry)
        # what the model returns for a row that sees nothing: a mean of values, or NaN
        mean = F.scaled_dot_product_attention(call.query, call.key, call.value, mask, scale=call.scale)
        measured = per_input(replace(call, mask=mask, output=call.output.where(sees, mean)))
        for name, numbers in measured.items():
            message = f"{entry}: {name}"
            torch.testing.assert_close(numbers, exact[name], rtol=0, atol=1e-6, equal_nan=True, msg=message)


# --- PyTorch's objects


@pytest.mark.parametrize(
    "mask", [causal_lower_right(13, 13), causal_upper_left(13, 13), causal_upper_left(3, 5)]
)
def test_a_causal_bias_is_causal(mask: CausalBias) -> None:
    """Its memory holds nothing. One of the upper left is causal whatever sizes it was made for."""
    call, causal = make_call(mask=mask), make_call(causal=True)
    assert (call.mask, call.causal) == (None, True)
    assert torch.equal(pattern_rows(call), pattern_rows(causal))
    assert torch.equal(call.output, causal.output)


def test_masks_of_other_tokens_are_refused() -> None:
    aligned = causal_lower_right(4, 13)
    assert plain(aligned, False) == (aligned, False)
    for mask, shape in ((aligned, "4 x 13"), (torch.ones(5, 5).bool(), "5 x 5")):
        with pytest.raises(
            MeasurementError, match=f"(?m)^a mask of {shape} queries and keys is not of 13 tokens$"
        ):
            make_call(mask=mask)


SELECTED = {
    "causal": [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 4, 5], [0, 4, 5], [0, 5, 7]],
    "of all": [[0, 1], [0, 2], [1, 2], [3, 4], [4, 5], [5, 7], [0, 7], [3, 7]],
}
UNEVEN = {
    "a window over padding": [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 7], [5, 7], [7]],
    "padding that sees nothing": [[0, 1], [0, 2], [1, 2], [3, 4], [4, 5], [5, 7], [], [3, 7]],
}


@pytest.mark.parametrize("case", SELECTED | UNEVEN)
def test_a_key_that_no_query_selects_is_no_padding(case: str) -> None:
    """Nobody sees the seventh key: padding, unless every query has as many keys as it may have."""
    rows = (SELECTED | UNEVEN)[case]
    mask = torch.tensor([[key in row for key in range(8)] for row in rows])
    seen = Visibility.of(mask, False, torch.zeros(1, 1, 8, 2))
    assert seen.rule == "general"
    assert not mask[:, 6].any()
    if case in SELECTED:
        assert seen.keys is None
    else:
        assert seen.keys is not None
        assert torch.equal(seen.keys[0], mask.any(0))


@pytest.mark.parametrize("keys", [1, 31, 32, 33, 100])
def test_prefix_sums_are_those_of_one_weighted_vector_after_the_other(keys: int) -> None:
    x, weights = torch.randn(2, 3, keys, 5), torch.rand(2, 1, keys)
    expected = (x.double() * weights.double()[..., None]).cumsum(2)
    torch.testing.assert_close(prefix_sums(x, weights).double(), expected, rtol=1e-5, atol=1e-5)

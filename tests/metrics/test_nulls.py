"""Further nulls against a dense reference from the formulas, hand-made calls, and masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import cosine, dense_visible, float64, make_call, with_dense_output
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.positions import TEXT, Geometry
from diag.metrics.catalogue import CATALOGUE
from diag.metrics.default import Selection, per_input, reduce
from diag.metrics.names import metric_names
from diag.metrics.nulls import NULL_METRICS, OtherInput, null_readings

NAMES = list(NULL_METRICS)
GRID = Geometry(prefix=2, rows=4, cols=5, patch_size=16.0)
SETS = {"all": None, "some": torch.arange(22)[None] % 5 != 3}


def sparse(heads: int, tokens: int = 22, batch: int = 1) -> Tensor:
    """A mask in which every query of a head selects six keys up to itself, as an indexer would."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(batch, heads, tokens, tokens, generator=generator)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    top = scores.masked_fill(~causal, -1).topk(6, -1).indices
    return torch.zeros_like(causal).expand_as(scores).scatter(-1, top, True) & causal


def padded_left(tokens: int = 22) -> Tensor:
    """The first input begins with three tokens that nobody sees."""
    seen = torch.ones(2, 1, tokens, tokens, dtype=torch.bool)
    seen[0, :, :, :3] = False
    return seen


WAYS = {
    "full": {},
    "causal": {"causal": True},
    "grouped": {"causal": True, "kv_heads": 2},
    "one KV head": {"kv_heads": 1},
    "padded": {"mask": padded_left(), "causal": True, "kv_heads": 2},
    "padded, full": {"mask": padded_left()},
    "selected keys": {"mask": sparse(1), "kv_heads": 2},
    "selected keys of each head": {"mask": sparse(4), "kv_heads": 2},
    "selected keys of each input": {"mask": sparse(1, batch=2), "kv_heads": 2},
    "half precision": {"dtype": torch.bfloat16, "kv_heads": 2},
}
CALLS = {name: make_call(tokens=22, seed=number, **way) for number, (name, way) in enumerate(WAYS.items())}


def are_near(i: int, j: int, geometry: Geometry) -> bool:
    """|i − j| ≤ 16 in a text; in an image, one of the 3 × 3 patches around."""
    if geometry is TEXT:
        return abs(i - j) <= 16
    if min(i, j) < geometry.prefix:
        return False
    (a, b), (c, d) = (divmod(place - geometry.prefix, geometry.cols) for place in (i, j))
    return abs(a - c) <= 1 and abs(b - d) <= 1


def reference(call: AttentionCall, tokens: Tensor | None, geometry: Geometry, other: OtherInput) -> dict:
    """Every null of every input and head, one row and key at a time, in float64."""
    visible, value, output = dense_visible(call), float64(call.value), float64(call.output)
    batch, heads, length, _ = output.shape
    kv_heads = value.shape[1]
    chosen = np.ones(length, bool) if tokens is None else tokens[0].numpy()
    found = {name: np.full((batch, heads), np.nan) for name in NAMES}
    for b, h in np.ndindex(batch, heads):
        own, real = h // (heads // kv_heads), visible[b].any((0, 1))
        selecting = (visible[b, h].sum(-1) == np.minimum(np.arange(length) + 1, 6)).all()
        real |= selecting  # a key that no query selected is a token like others
        inside = [t for t in range(length) if chosen[t] and real[t]]
        rows: dict[str, list[float]] = {name: [] for name in NAMES}
        for i in inside:
            if visible[b, h, i].sum() < 2:
                continue
            y, bias = output[b, h, i], cosine(output[b, h, i], value[b, own, i])
            partners = [j for j in inside if j != i and visible[b, h, i, j]]
            if near := [cosine(y, value[b, own, j]) for j in partners if are_near(i, j, geometry)]:
                rows["cos_y_vnear"].append(np.mean(near))
                rows["excess_over_near"].append(bias - np.mean(near))
            if bool(other.there[b, i]):
                null = cosine(y, float64(other.value)[b, own, i])
                rows["cos_y_vother_input"].append(null)
                rows["excess_over_other_input"].append(bias - null)
            groups = [g for g in range(kv_heads) if g != own]
            if groups:
                null = np.mean([cosine(y, value[b, g, i]) for g in groups])
                rows["cos_y_vother_group"].append(null)
                rows["excess_over_other_group"].append(bias - null)
                if partners:
                    across = np.mean([cosine(y, value[b, g, j]) for g in groups for j in partners])
                    rows["cos_y_vother_group_partner"].append(across)
                    rows["excess_across_groups"].append(null - across)
        for name, numbers in rows.items():
            found[name][b, h] = np.mean(numbers) if numbers else np.nan
    return found


def another(call: AttentionCall) -> OtherInput:
    """Drawn values; three places are none of the other input, and what they hold is no number."""
    drawn = torch.randn(call.value.shape, generator=torch.Generator().manual_seed(9))
    there = torch.ones(call.batch, call.tokens, dtype=torch.bool)
    there[1, 4:7] = False
    return OtherInput(torch.where(there[:, None, :, None], drawn, torch.nan), there)


@pytest.mark.parametrize("geometry", [TEXT, GRID], ids=["text", "image"])
@pytest.mark.parametrize("subset", SETS)
@pytest.mark.parametrize("case", CALLS)
def test_every_null_is_that_of_the_formula(case: str, subset: str, geometry: Geometry) -> None:
    call, tokens = CALLS[case], SETS[subset]
    other = another(call)
    found = null_readings(Selection(call, tokens), NAMES, geometry=geometry, other=other)
    for name, expected in reference(call, tokens, geometry, other).items():
        got = reduce([found[name]], call.batch, "mean").numpy()
        np.testing.assert_allclose(got, expected, atol=2e-6, err_msg=name)


def test_long_texts_have_near_keys_on_both_sides() -> None:
    """A window of 33 tokens, or 17 of a causal one, moves along: its sums are of those alone."""
    for causal in (False, True):
        call = make_call(tokens=70, causal=causal, batch=1)
        other = another(make_call(tokens=70))
        found = null_readings(Selection(call), ["cos_y_vnear"])
        expected = reference(call, None, TEXT, other)["cos_y_vnear"]
        np.testing.assert_allclose(reduce([found["cos_y_vnear"]], 1, "mean").numpy(), expected, atol=2e-6)


def test_what_belongs_to_a_place_is_in_the_neighbourhood_null_and_not_in_the_partner_null() -> None:
    """Values of two halves point two ways, outputs are the token's own value: its neighbours give as much."""
    call = make_call(batch=1, heads=1, tokens=80, dim=2)
    value = torch.eye(2)[(torch.arange(80) >= 40).long()][None, None]
    call = replace(call, value=value, output=value.clone())
    inner = (torch.arange(80) - 39.5).abs()[None] > 17
    near = null_readings(Selection(call, inner), ["cos_y_vnear"])["cos_y_vnear"]
    assert reduce([near], 1, "mean").item() == pytest.approx(1, abs=1e-6)
    partner = per_input(call, ["cos_y_vpartner"], inner)["cos_y_vpartner"].item()
    assert partner == pytest.approx(22 / 45, abs=1e-6)  # 23 tokens of each half, without oneself


def test_excess_within_groups_is_positive_and_across_negative() -> None:
    """Outputs that hold their own value of their own KV head, and less than nothing of that of the others:
    the pattern of public values of grouped models."""
    call = make_call(batch=1, heads=4, kv_heads=2, tokens=16, dim=64)
    value = torch.randn(1, 2, 16, 64, generator=torch.Generator().manual_seed(1))
    own = value.repeat_interleave(2, 1)
    call = replace(call, value=value, output=own - 0.5 * own.roll(2, 1))
    within = per_input(call, ["excess"])["excess"]
    across = null_readings(Selection(call), ["excess_across_groups"])["excess_across_groups"]
    assert (within > 0.7).all()
    assert (reduce([across], 1, "mean") < -0.3).all()


@pytest.mark.parametrize("case", ["grouped", "padded", "one KV head"])
def test_values_written_out_for_their_query_heads_are_of_one_head(case: str) -> None:
    """As models do where there is a mask: a head's own values are none of another's."""
    call = CALLS[case]
    assert call.key is not None
    key, value = (x.repeat_interleave(call.group, 1) for x in (call.key, call.value))
    written = replace(call, key=key, value=value)
    assert written.group == 1
    for name in (name for name in NAMES if "group" in name):
        shared, apart = (null_readings(Selection(x), [name])[name] for x in (call, written))
        got, expected = (reduce([x], call.batch, "mean") for x in (apart, shared))
        np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-6, err_msg=name)


def test_an_input_that_is_the_same_leaves_no_excess() -> None:
    """The next input holds the same values: the null is the bias, and nothing depends on the input."""
    call = make_call(kv_heads=2)
    same = OtherInput(call.value, torch.ones(call.batch, call.tokens, dtype=torch.bool))
    found = null_readings(Selection(call), NAMES, other=same)
    bias = per_input(call, ["cos_y_vself"])["cos_y_vself"]
    assert reduce([found["cos_y_vother_input"]], call.batch, "mean").allclose(bias, atol=1e-6)
    assert reduce([found["excess_over_other_input"]], call.batch, "mean").abs().max() < 1e-6


@pytest.mark.parametrize("geometry", [Geometry.unknown(), Geometry.unknown(2)], ids=["", "prefix"])
def test_what_has_nothing_to_compare_with_is_undefined(geometry: Geometry) -> None:
    """Places that are not known, no other input, one KV head, and keys that are not the tokens' own."""
    lone = make_call(kv_heads=1)
    foreign = with_dense_output(make_call(keys=7))
    for call in (lone, foreign):
        found = null_readings(Selection(call), NAMES, geometry=geometry)
        assert all(reduce([found[name]], call.batch, "mean").isnan().all() for name in NAMES)
    own = null_readings(Selection(make_call()), NAMES, geometry=geometry)
    assert reduce([own["cos_y_vother_group"]], 2, "mean").isfinite().all()  # the control


@pytest.mark.parametrize("heads", [1, 4], ids=["one selection", "of each head"])
def test_partner_and_uniform_nulls_range_over_the_selected_keys(heads: int) -> None:
    """Where an indexer selected keys, the nulls are over these, and not over all that come before."""
    call = make_call(tokens=22, mask=sparse(heads), kv_heads=2)
    visible, value, output = dense_visible(call), float64(call.value), float64(call.output)
    found = per_input(call, ["cos_y_vpartner", "cos_y_vuniform"])
    for b, h in np.ndindex(2, 4):
        rows = [i for i in range(22) if visible[b, h, i].sum() > 1]
        keys = {i: [j for j in np.flatnonzero(visible[b, h, i]) if j != i] for i in rows}
        v = value[b, h // 2]
        partner = np.mean([np.mean([cosine(output[b, h, i], v[j]) for j in keys[i]]) for i in rows])
        uniform = np.mean([cosine(v[visible[b, h, i]].mean(0), v[i]) for i in rows])
        assert found["cos_y_vpartner"][b, h].item() == pytest.approx(partner, abs=2e-6)
        assert found["cos_y_vuniform"][b, h].item() == pytest.approx(uniform, abs=2e-6)
    causal = per_input(replace(call, mask=None, causal=True), ["cos_y_vpartner"])["cos_y_vpartner"]
    assert (causal - found["cos_y_vpartner"]).abs().max() > 1e-3  # the control: over all keys it is another


def test_the_group_by_name() -> None:
    assert metric_names(["nulls"]) == NAMES
    assert all(CATALOGUE[name].place.group == "nulls" for name in NAMES)

"""Sink events against a slow dense float64 reference, hand-made heads of each class, and exact identities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import (
    CASES,
    OTHER_TOKENS,
    Array,
    dense_pattern,
    dense_visible,
    float64,
    key_padding,
    make_call,
    mean,
    with_dense_output,
    with_log_normaliser,
    with_maps,
    with_other_keys,
    with_pattern,
)
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.positions import TEXT, Geometry
from diag.attention.sampling import RowSampling, sample_rows
from diag.attention.single_keys import pattern_columns
from diag.attention.softmax_statistics import CallStatistics
from diag.metrics import sink_events
from diag.metrics.default import Selection, readings_of, selections_of
from diag.metrics.pattern_shape import shape_readings
from diag.metrics.readings import reduce
from diag.metrics.sink_events import OF_PROJECTION, SINK_METRICS, roots_of, sink_readings

NAMES = list(SINK_METRICS)
CLASSES = ("sink_no_op", "sink_broadcast", "sink_unclassified")
WIDTH = 24


def sunk(call: AttentionCall, sink: int = 1) -> AttentionCall:
    """The call with the queries of every other head leaning towards one key."""
    if call.query is None or call.key is None or not call.query.is_floating_point():
        return call
    key = call.key[:, :, min(sink, call.keys - 1)].repeat_interleave(call.group, 1).double()
    lean = 14 / call.scale * key / key.square().sum(-1, keepdim=True).clamp(min=1e-9)
    lean[:, 1::2] = 0
    query = (call.query.double() + lean[:, :, None]).to(call.query.dtype)
    return with_dense_output(replace(call, query=query, log_normaliser=None))


def projection_of(call: AttentionCall, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(call.heads, call.value.shape[-1], WIDTH, generator=generator)


def measured(
    call: AttentionCall,
    tokens: Tensor | None = None,
    weight: Tensor | None = None,
    geometry: Geometry = TEXT,
    statistics: CallStatistics | None = None,
) -> dict[str, Array]:
    """One number per row of the batch and query head, NaN where undefined."""
    on = Selection(call, tokens, statistics)
    image = torch.arange(call.keys)[None] % 3 == 1
    roots = None if weight is None else lambda: roots_of(weight)
    kinds = {"image": image, "text": ~image}
    (found,) = sink_readings([on], NAMES, roots=roots, kinds=kinds, geometry=geometry)
    return {name: reduce([reading], call.batch, "mean").numpy() for name, reading in found.items()}


def reference(call: AttentionCall, weight: Tensor, tokens: Tensor | None = None) -> dict[str, Array]:
    """All metrics, from the definitions, with U as it stands, `[query, width]`."""
    pattern, visible, value = dense_pattern(call), dense_visible(call), float64(call.value)
    result = {name: np.full(call.output.shape[:2], np.nan) for name in NAMES}
    for b, h in np.ndindex(*call.output.shape[:2]):
        real = visible[b].any(axis=(0, 1))
        chosen = (
            np.ones(call.tokens, dtype=bool) if tokens is None else tokens.expand(call.batch, -1)[b].numpy()
        )
        rows = [
            i
            for i in range(call.tokens)
            if chosen[i] and visible[b, h, i].sum() >= 2 and (not call.own_keys or real[i])
        ]
        if not rows:
            continue
        if (pattern[b, h] < 0).any():
            continue
        attention = pattern[b, h, rows]
        sink = int(attention.mean(0).argmax())
        event = np.mean(attention[:, sink] >= 0.5) >= 0.9
        contributions = value[b, h // call.group] @ float64(weight)[h]
        norms = np.linalg.norm(contributions, axis=-1)
        others = mean([norms[j] for j in np.flatnonzero(real) if j != sink])
        ratio = norms[sink] / others if others else np.nan
        singular = np.linalg.svd(attention @ contributions, compute_uv=False)
        rank = (singular**2).sum() / singular[0] ** 2 if singular[0] else np.nan
        no_op, broadcast = event and ratio <= 0.2, event and ratio >= 0.5 and rank <= 1.5
        found = {
            "sink_event": event,
            "sink_no_op": no_op,
            "sink_broadcast": broadcast,
            "sink_unclassified": event and not no_op and not broadcast,
        }
        if event:
            found |= {"value_norm_ratio_out": ratio, "stable_rank": rank, "sink_index": sink}
            found |= {"sink_on_first": sink == np.flatnonzero(real)[0]}
            found |= {"sink_on_image": sink % 3 == 1, "sink_on_text": sink % 3 != 1}
            found |= {"sink_on_cls": False, "sink_on_registers": False}
        for name, number in found.items():
            result[name][b, h] = float(number)
    return result


def assert_close(found: dict[str, Array], expected: dict[str, Array], tolerance: float = 1e-5) -> None:
    for name, numbers in expected.items():
        np.testing.assert_allclose(found[name], numbers, tolerance, tolerance, err_msg=name)


EVERY = {
    name: call
    for name, call in (CASES | OTHER_TOKENS).items()
    if call.has_pattern and not call.maps and call.outside is None
}


@pytest.mark.parametrize("case", EVERY)
def test_every_number_is_that_of_the_reference(case: str) -> None:
    call = sunk(EVERY[case])
    weight = projection_of(call)
    tolerance = 1e-5 if call.output.dtype == torch.float32 else 2e-2
    assert_close(measured(call, weight=weight), reference(call, weight), tolerance)
    half = torch.arange(call.tokens)[None] % 2 == 0
    assert_close(measured(call, half, weight), reference(call, weight, half), tolerance)


def test_the_cases_hold_heads_with_and_without_events() -> None:
    found = [reference(sunk(call), projection_of(call))["sink_event"] for call in EVERY.values()]
    rates = np.array([np.nan_to_num(events).mean() for events in found])
    assert (rates == 0.5).sum() > 10
    assert (rates < 0.5).sum() > 3


@pytest.mark.parametrize("case", ["grouped heads", "causal"])
@pytest.mark.parametrize("change", [with_pattern, with_log_normaliser, with_other_keys])
def test_events_are_the_same_by_every_route(case: str, change: object) -> None:
    call = sunk(make_call(kv_heads=2, causal=case == "causal"))
    other = change(call)  # type: ignore[operator]
    weight = projection_of(call)
    assert_close(measured(other, weight=weight), reference(other, weight))


def heads_of(call: AttentionCall, values: Tensor) -> AttentionCall:
    """One input whose heads all have a given pattern: nine tenths of every row on key 0, the rest even."""
    tokens = values.shape[1]
    pattern = torch.full((1, len(values), tokens, tokens), 0.1 / (tokens - 1))
    pattern[..., 0] = 0.9
    given = replace(call, query=None, key=None, value=values[None], pattern=pattern)
    return with_dense_output(given)


def test_hand_made_heads_of_each_class() -> None:
    """A sink of no value; one as long as all others, which is what all queries get; and two in between."""
    tokens, dim = 20, 20
    values = torch.eye(tokens).repeat(4, 1, 1)
    values[0, 0] *= 0.01  # no-op
    values[2, 0] *= 0.3  # neither
    values[3, 0] *= 1.0
    call = heads_of(make_call(batch=1, heads=4, tokens=tokens, dim=dim), values)
    # the fourth head's projection takes nearly all of the sink away, and of the others nothing
    weight = torch.eye(dim).repeat(4, 1, 1)
    weight[3, 0] *= 0.1
    found = {name: numbers[0] for name, numbers in measured(call, weight=weight).items()}
    np.testing.assert_array_equal(found["sink_event"], [1, 1, 1, 1])
    np.testing.assert_array_equal(found["sink_no_op"], [1, 0, 0, 1])
    np.testing.assert_array_equal(found["sink_broadcast"], [0, 1, 0, 0])
    np.testing.assert_array_equal(found["sink_unclassified"], [0, 0, 1, 0])
    np.testing.assert_allclose(found["value_norm_ratio_out"], [0.01, 1, 0.3, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(found["sink_index"], [0, 0, 0, 0])
    np.testing.assert_array_equal(found["sink_on_first"], [1, 1, 1, 1])


@pytest.mark.parametrize(("rows", "weight", "event"), [(9, 0.5, 1), (8, 1.0, 0), (10, 0.49, 0), (10, 0.5, 1)])
def test_an_event_is_half_of_the_weight_of_nine_in_ten_queries(rows: int, weight: float, event: int) -> None:
    tokens = 10
    pattern = torch.full((1, 1, tokens, tokens), 0.1)
    pattern[..., :rows, :] = (1 - weight) / (tokens - 1)
    pattern[..., :rows, 4] = weight
    call = make_call(batch=1, heads=1, tokens=tokens)
    call = with_dense_output(replace(call, query=None, key=None, pattern=pattern))
    found = measured(call, weight=projection_of(call))
    assert found["sink_event"].item() == event
    np.testing.assert_equal(found["sink_index"].item(), 4 if event else np.nan)


def test_the_sink_may_lie_outside_the_token_set() -> None:
    """A class token that all patches attend to is their sink."""
    call = sunk(make_call(tokens=13), sink=0)
    patches = torch.arange(13)[None] > 0
    found = measured(call, patches, projection_of(call), Geometry(1, 3, 4, 16.0))
    np.testing.assert_array_equal(found["sink_event"][:, ::2], 1)
    np.testing.assert_array_equal(found["sink_index"][:, ::2], 0)
    assert np.isnan(found["sink_row"]).all()  # it is no patch


def test_rows_and_columns_are_those_of_the_grid() -> None:
    call = sunk(make_call(tokens=13), sink=8)  # patch 7 of three rows of four
    found = measured(call, geometry=Geometry(1, 3, 4, 16.0))
    np.testing.assert_array_equal(found["sink_row"][:, ::2], 1)
    np.testing.assert_array_equal(found["sink_column"][:, ::2], 3)
    assert np.isnan(measured(call)["sink_row"]).all()  # a line of text has no rows


def test_without_the_projection_events_stand_and_classes_are_undefined() -> None:
    found = measured(sunk(make_call()))
    assert found["sink_event"].sum() == 4
    for name in OF_PROJECTION:
        assert np.isnan(found[name]).all()


def test_the_projection_is_not_asked_for_where_no_head_has_an_event() -> None:
    def asked() -> Tensor:
        raise AssertionError

    (found,) = sink_readings([Selection(make_call())], NAMES, roots=asked)
    assert reduce([found["sink_no_op"]], 2, "mean").sum() == 0


def test_several_maps_and_negative_weights_have_no_events() -> None:
    found = measured(with_maps(make_call(), -0.4))
    assert all(np.isnan(numbers).all() for numbers in found.values())
    call = with_pattern(make_call())
    assert call.pattern is not None
    pattern = call.pattern.clone()
    pattern[:, 1, 0, 0] = -0.1
    found = measured(with_dense_output(replace(call, pattern=pattern)))
    np.testing.assert_array_equal(np.isnan(found["sink_event"])[0], [False, True, False, False])


def test_padding_may_hold_anything() -> None:
    mask = key_padding([range(9), range(13)], 13)
    call = sunk(make_call(mask=mask))
    weight = projection_of(call)
    assert call.query is not None
    query, value, output = (x.clone() for x in (call.query, call.value, call.output))
    for x in (query, value, output):
        x[0, :, 9:] = torch.nan
    spoiled = replace(call, query=query, value=value, output=output)
    expected = reference(call, weight)
    assert_close(measured(spoiled, weight=weight), expected)
    assert expected["sink_event"][0].sum() == 2


def test_numbers_that_are_not_finite_are_told() -> None:
    call = sunk(make_call())
    value = call.value.clone()
    value[0, 0, 3] = torch.inf
    found = measured(replace(call, value=value), weight=projection_of(call))
    assert np.isinf(found["value_norm_ratio_out"][0, 0])
    assert call.query is not None
    query = call.query.clone()
    query[0, 1, 3] = torch.nan
    assert np.isinf(measured(replace(call, query=query))["sink_event"][0, 1])


def test_sampled_rows_change_nothing() -> None:
    call = sunk(make_call(tokens=200, causal=True), sink=0)
    weight = projection_of(call)
    counts = (call.visibility.count > 1)[:, 0].expand(2, -1)
    sample = sample_rows([counts], ["a", "b"], RowSampling(64, 128, 0))
    assert_close(measured(replace(call, sample=sample), weight=weight), measured(call, weight=weight))


@pytest.mark.parametrize("mask", [None, key_padding([range(9), range(13)], 13)], ids=["plain", "padded"])
def test_what_keys_receive_is_summed_up_on_the_way(
    mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass gives the default statistics and it, where padding is, too."""
    call = sunk(make_call(mask=mask))
    sets = [None, torch.arange(13)[None] < 7]
    alone = sink_readings(selections_of(call, sets), NAMES, roots=lambda: roots_of(projection_of(call)))
    together = selections_of(call, sets)
    statistics = together[0].statistics
    statistics.givers = [on.rows for on in together]
    readings_of(together[0], ["entropy"])
    monkeypatch.setattr("diag.metrics.pattern_pass._live_blocks", None)  # no second pass
    found = sink_readings(together, NAMES, roots=lambda: roots_of(projection_of(call)))
    shape = shape_readings(together, ["sink_share"])
    for one, other in zip(found, alone, strict=True):
        for name in NAMES:
            for read, expected in zip(one[name][:2], other[name][:2], strict=True):
                torch.testing.assert_close(read, expected)
    monkeypatch.undo()
    for one, expected in zip(shape, shape_readings(selections_of(call, sets), ["sink_share"]), strict=True):
        torch.testing.assert_close(one["sink_share"].values, expected["sink_share"].values)


@pytest.mark.parametrize("case", [*EVERY, "sinks of no token"])
def test_columns_are_those_of_the_dense_pattern(case: str) -> None:
    call = EVERY[case] if case in EVERY else with_other_keys(CASES["causal"])
    generator = torch.Generator().manual_seed(4)
    keys = torch.randint(call.keys, (call.batch, call.heads, 2), generator=generator)
    found = pattern_columns(CallStatistics(call), keys)
    expected = torch.from_numpy(dense_pattern(call)).gather(-1, keys[:, :, None].expand(found.shape))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("elements", [1, 300, 10**6])
def test_events_are_read_in_parts(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = sunk(make_call(kv_heads=2))
    monkeypatch.setattr(sink_events, "EVENT_ELEMENTS", elements)
    assert_close(measured(call, weight=projection_of(call)), reference(call, projection_of(call)))


def test_roots_stand_for_projections() -> None:
    weight = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))  # narrower than a head
    root = roots_of(weight)
    torch.testing.assert_close(root @ root.mT, weight.double() @ weight.double().mT)

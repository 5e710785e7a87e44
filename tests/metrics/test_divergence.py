"""Head divergence against a dense reference, its bounds, and the neutral image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from reference import make_call, with_dense_output

from diag.errors import MeasurementError, UserError
from diag.inputs.images import images, neutral_image
from diag.measure.batch_readings import Incidents
from diag.measure.loop import measure
from diag.metrics.default import Selection, reduce
from diag.metrics.divergence import DIVERGENCE_METRICS, divergence_readings
from diag.metrics.names import metric_names
from diag.models import load
from diag.models.base import Sample
from diag.models.names.resolve import parse

NAMES = list(DIVERGENCE_METRICS)


def test_formulae_on_a_causal_call_with_grouped_heads() -> None:
    """Both metrics written out in float64; the first row, which sees only itself, does not count."""
    call = with_dense_output(make_call(heads=4, kv_heads=2, causal=True))
    neutral = torch.randn(call.output.shape, generator=torch.Generator().manual_seed(1))
    tokens = torch.arange(call.tokens)[None] % 3 != 1
    found = divergence_readings(Selection(call, tokens), neutral, NAMES)
    ours, other = call.output.double().numpy(), neutral.double().numpy()
    distance = np.linalg.norm(ours - other, axis=-1)
    share = 2 * distance / (np.linalg.norm(ours, axis=-1) + np.linalg.norm(other, axis=-1))
    rows = tokens[0].numpy().copy()
    rows[0] = False
    for name, expected in zip(NAMES, (distance, share), strict=True):
        got = reduce([found[name]], call.batch, "mean").numpy()
        np.testing.assert_allclose(got, expected[..., rows].mean(-1), atol=1e-5)


def test_the_relative_distance_runs_from_0_to_2() -> None:
    call = with_dense_output(make_call())
    for factor, expected in ((1.0, 0.0), (-1.0, 2.0), (-3.0, 2.0), (0.0, 2.0)):
        found = divergence_readings(Selection(call), call.output * factor, NAMES)
        reading = found["head_divergence_relative"]
        assert reduce([reading], call.batch, "mean").allclose(
            torch.tensor(expected, dtype=torch.float64), atol=1e-6
        )


def test_outputs_of_other_tokens_are_refused() -> None:
    call = make_call()
    with pytest.raises(MeasurementError, match="tokens have no partner"):
        divergence_readings(Selection(call), call.output[:, :, 1:], NAMES)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_neutral_image_is_its_mean_colour_and_size(mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    neutral = neutral_image(image)
    assert (neutral.size, neutral.mode) == ((50, 30), "RGB")
    (colour,) = neutral.getcolors()
    np.testing.assert_allclose(
        colour[1], np.asarray(image.convert("RGB"), float).mean((0, 1)), atol=0.5 + 1e-9
    )
    assert neutral_image(neutral).getcolors() == neutral.getcolors()


def test_the_group_by_name() -> None:
    assert metric_names(["divergence"]) == NAMES


def test_a_text_tower_has_no_image() -> None:
    tower = load(parse("demo:lm"), device="cpu", dtype=torch.float32).tower("text")
    with pytest.raises(UserError, match="the text tower takes none") as error:
        next(measure(tower, [], metrics=NAMES))
    assert error.value.tip == "give --images, or leave the divergence metrics out"


def test_a_vision_tower_beside_the_default_metrics() -> None:
    """The second pass leaves all other numbers alone, and an image of one colour diverges from nothing."""
    tower = load(parse("demo:vit-p16"), device="cpu", dtype=torch.float32).tower("vision")
    samples = list(tower.samples(images("demo"), None))[:3]
    plain = next(iter(measure(tower, samples, metrics=["cos_y_vself", "entropy"])))
    both = next(iter(measure(tower, samples, metrics=["cos_y_vself", "entropy", *NAMES])))
    for before, after in zip(plain, both, strict=True):
        assert np.array_equal(before.values, after.values[:, :2])
        assert (after.values[:, 2:] > 0).all()
        assert (after.values[:, 3] <= 2).all()
    blank = [Sample("blank", lambda: Image.new("RGB", (64, 64), (30, 90, 200)))]
    for layer in next(iter(measure(tower, blank, metrics=NAMES))):
        assert (layer.values == 0).all()


def test_an_image_that_cannot_be_prepared_is_left_out_of_both_passes() -> None:
    """Here images are prepared inside of their batch."""
    tower = load(parse("demo:vit-p16"), device="cpu", dtype=torch.float32).tower("vision")
    samples = list(tower.samples(images("demo"), None))[:3]
    odd, incidents = Sample("odd", lambda: Image.new("RGB", (0, 5))), Incidents()
    found = list(measure(tower, [*samples[:1], odd, *samples[1:]], metrics=NAMES, incidents=incidents))
    assert incidents.failed["odd"].startswith("cannot preprocess the image: ")
    for ours, alone in zip(found[0], next(iter(measure(tower, samples, metrics=NAMES))), strict=True):
        assert np.array_equal(ours.values, alone.values)

"""The loop: streamed equals one-shot, equals the dense reference, and refuses what it cannot measure."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import (
    CASES,
    OTHER_TOKENS,
    dense_pattern,
    make_call,
    reference,
    with_dense_output,
    with_other_keys,
)
from safetensors.torch import load_file
from tiny_towers import (
    IMAGES,
    INPUTS,
    TEXTS,
    VISION_TOKENS,
    Attention,
    InBatch,
    InTurn,
    Pooled,
    Skipping,
    Stack,
    run,
    samples_of,
    table,
    text_tower,
    tower_of,
    vision_tower,
)
from torch import Tensor

from diag.attention import softmax_statistics as softmax
from diag.attention.call import AttentionCall
from diag.attention.row_sums import row_sums, without_constant
from diag.attention.sampling import RowSampling
from diag.errors import MeasurementError, UnreadableInput, UserError
from diag.inputs import images as inputs
from diag.inputs.texts import texts
from diag.measure.activations import save_activations
from diag.measure.batch_readings import Incidents
from diag.measure.loop import capture, measure
from diag.measure.reconstruction import ReconstructionCheck
from diag.metrics import default as default_metrics
from diag.metrics.default import METRICS
from diag.metrics.pattern_shape import SHAPE_METRICS
from diag.models import load
from diag.models.base import Sample, Tower
from diag.models.encoding import each
from diag.models.hooks.block_parts import find_blocks
from diag.models.hooks.layers import Layer
from diag.models.hooks.meaning import nothing_of_its_own
from diag.models.hooks.seam import OnCall, attention_calls
from diag.models.names.resolve import parse

NAMES = list(METRICS)

TOWERS: dict[str, tuple[Callable[[], Tower], list[Sample]]] = {
    "vision": (vision_tower, IMAGES),
    "text": (text_tower, TEXTS),
    "windows in the batch": (lambda: vision_tower(Attention(), InBatch(), prefix=()), IMAGES),
    "windows in turn": (lambda: vision_tower(InTurn(), Attention(), prefix=()), IMAGES),
}


def facts_of(tower: Tower, samples: Sequence[Sample] = IMAGES) -> list[tuple[Any, ...]]:
    (batch,) = measure(tower, samples, metrics=["self_weight"], batch_size=len(samples))
    return [(f.n_tokens, f.attn_scope, f.first_token) for f in (block.facts for block in batch)]


# --- streamed equals one-shot, equals the reference -------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_streamed_equals_one_shot(name: str, batch_size: int) -> None:
    build, samples = TOWERS[name]
    tower = build()
    sets = tower.token_sets[:2]
    together = run(tower, samples, token_sets=sets, batch_size=INPUTS)
    streamed = list(measure(tower, samples, token_sets=sets, batch_size=batch_size))
    assert [len(batch[0].ids) for batch in streamed] == [
        min(batch_size, INPUTS - start) for start in range(0, INPUTS, batch_size)
    ]
    np.testing.assert_allclose(table(streamed), together, rtol=2e-6, atol=1e-6)
    # a negative control: inputs differ by more than the tolerance
    assert np.abs(np.diff(together, axis=3)).max() > 1e-2


def test_embedded_models_do_not_depend_on_the_batch_size() -> None:
    for model, given, kind, length in (
        ("demo:vit-p16", inputs.demo_images(), "vision", None),
        ("demo:lm", texts("demo"), "text", 24),
    ):
        tower = load(parse(model), device="cpu", dtype=torch.float32).tower(kind)
        samples = list(itertools.islice(tower.samples(given, length), 3))
        together = run(tower, samples, batch_size=3)
        assert together.shape == (6, 1, len(NAMES), 3, 3)
        assert np.isfinite(together).all()
        for batch_size in (1, 2):
            # six layers pass on how matrix products of other shapes round
            streamed = run(tower, samples, batch_size=batch_size)
            np.testing.assert_allclose(streamed, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vision", "text"])
def test_every_number_is_that_of_the_reference(name: str) -> None:
    build, samples = TOWERS[name]
    tower = build()
    sets = list(tower.token_sets)
    calls, measured = (
        capture(tower, tower.encode(samples)),
        run(tower, samples, token_sets=sets, batch_size=5),
    )
    assert len(calls) == len(measured) == 3
    for call, block in zip(calls, measured, strict=True):
        real = np.array([[t < len(sample.read()) for t in range(call.tokens)] for sample in samples])
        for token_set, values in zip(sets, block, strict=True):
            tokens = torch.from_numpy(real) & tower.tokens_in(token_set, call.tokens)
            expected = reference(call, tokens)
            for metric, number in zip(NAMES, values, strict=True):
                np.testing.assert_allclose(
                    number, expected[metric].numpy(), rtol=1e-5, atol=1e-5, err_msg=f"{token_set} {metric}"
                )


def test_padding_counts_for_nothing_where_the_model_does_not_hide_it() -> None:
    """CLIP's text is causal by argument alone: padding on the right changes no real token, but has rows."""
    torch.manual_seed(3)
    module = Stack(*(Attention(is_causal=True) for _ in range(2)))
    tower = replace(tower_of(module, text=True), forward=lambda batch: module(batch.data[0]))
    alone = run(tower, TEXTS, batch_size=1)
    np.testing.assert_allclose(run(tower, TEXTS, batch_size=INPUTS), alone, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("sampling", [None, RowSampling(rows=6, above=8)], ids=["all rows", "sampled"])
def test_no_statistic_of_a_call_is_computed_twice(
    sampling: RowSampling | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a second token set, and not for metrics of another group."""
    times: dict[str, int] = {}

    def count(where: Any, name: str) -> None:
        function = getattr(where, name)

        def counted(*given: Any) -> Any:
            times[name] = times.get(name, 0) + 1
            return function(*given)

        monkeypatch.setattr(where, name, counted)

    for name in ("softmax_statistics", "row_controls"):
        count(softmax, name)
    count(default_metrics, "value_statistics")
    tower = vision_tower()
    sets, names = ["patch", "all"], [*METRICS, *SHAPE_METRICS]
    list(measure(tower, IMAGES, metrics=names, token_sets=sets, sampling=sampling, batch_size=INPUTS))
    layers = len(tower.layers)
    expected = {"softmax_statistics": layers, "value_statistics": layers * len(sets)}
    assert times == (expected if sampling is None else {**expected, "row_controls": layers})


def test_token_sets_are_told_apart() -> None:
    tower = vision_tower()
    patch, everything, cls, registers = run(
        tower,
        IMAGES,
        token_sets=["patch", "all", "cls", "registers"],
        metrics=["self_weight", "value_similarity"],
    )[0]
    assert np.isnan(cls[1]).all()  # one token has no pair
    assert np.isfinite(cls[0]).all()
    assert np.isfinite(registers).all()
    weighted = (9 * patch[0] + cls[0] + 2 * registers[0]) / VISION_TOKENS
    np.testing.assert_allclose(weighted, everything[0], rtol=1e-12)
    default = run(tower, IMAGES, metrics=["self_weight"])
    np.testing.assert_array_equal(default[0, 0, 0], patch[0])


def test_blocks_say_what_they_are() -> None:
    batches = list(measure(text_tower(), TEXTS, batch_size=2))
    assert [batch[0].ids for batch in batches] == [
        ("input-0", "input-1"),
        ("input-2", "input-3"),
        ("input-4",),
    ]
    for batch in batches:
        assert [(block.layer, block.module) for block in batch] == [(i, f"layers.{i}") for i in range(3)]
        for block in batch:
            assert block.values.shape == (1, len(NAMES), len(batch[0].ids), 4)
            assert block.values.dtype == np.float64


def test_chosen_metrics_are_those_of_the_whole_table() -> None:
    tower = vision_tower()
    some = ["entropy_p15", "cos_y_vself", "self_specific_fraction", "entropy"]  # a ratio is taken later
    together, chosen = run(tower, IMAGES), run(tower, IMAGES, metrics=some)
    kept = [NAMES.index(name) for name in some if name in NAMES]
    assert len(kept) == 3
    np.testing.assert_array_equal(chosen, together[:, :, kept])


def test_chosen_layers_are_those_of_the_whole_table() -> None:
    tower = vision_tower()
    batches = list(measure(tower, IMAGES, layers=[2, 0, 2]))
    assert [block.layer for block in batches[0]] == [0, 2]
    np.testing.assert_array_equal(table(batches), run(tower, IMAGES)[[0, 2]])
    assert [call.layer for call in capture(tower, tower.encode(IMAGES), layers=[1])] == [1]


def test_a_batch_holds_no_more_than_the_tower_takes() -> None:
    tower = vision_tower(max_batch=2)
    assert [len(batch[0].ids) for batch in measure(tower, IMAGES, batch_size=8)] == [2, 2, 1]


def test_no_input_gives_no_batch() -> None:
    assert list(measure(vision_tower(), [])) == []


# --- windows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [InTurn, InBatch])
def test_the_tokens_of_windows_are_pooled(kind: type[Attention]) -> None:
    """Each token counts once: the mean over windows, weighted by their tokens."""
    tower = vision_tower(kind(), prefix=())
    measured = run(tower, IMAGES, batch_size=INPUTS)[0, 0]
    calls = capture(tower, tower.encode(IMAGES))
    parts = []  # one call for every window, a row for every input
    for call in calls:
        windows = call.batch // INPUTS
        for w in range(windows):
            rows = slice(w, None, windows)
            cut = {name: getattr(call, name)[rows] for name in ("query", "key", "value", "output")}
            parts.append(replace(call, **cut, log_normaliser=None))
    assert [part.tokens for part in parts] == ([5, 7] if kind is InTurn else [4, 4, 4])
    weights = np.array([part.tokens for part in parts]) / VISION_TOKENS
    numbers = [reference(part) for part in parts]
    for name, values in zip(NAMES, measured, strict=True):
        if name == "entropy_p15":
            continue
        expected = sum(w * number[name].numpy() for w, number in zip(weights, numbers, strict=True))
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5, err_msg=name)
    patterns = [dense_pattern(part) for part in parts]
    entropies = np.concatenate([-(p * np.log(p)).sum(-1) for p in patterns], -1)  # [input, head, token]
    np.testing.assert_allclose(
        measured[NAMES.index("entropy_p15")], np.percentile(entropies, 15, axis=-1), rtol=1e-5
    )


def test_rows_that_belong_to_no_input_are_refused() -> None:
    class Doubled(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(torch.cat([x, x[:1]]))[:-1]

    message = r"(?m)^layer 'layers\.1' ran 6 rows for 5 inputs: whose they are is unclear$"
    with pytest.raises(MeasurementError, match=message) as error:
        list(measure(vision_tower(Attention(), Doubled()), IMAGES))
    assert "--batch-size 1" in error.value.tip


# --- facts of the layers ----------------------------------------------------------------------------


def lower(tokens: int = VISION_TOKENS) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


class Masked(Attention):
    """Under a mask of its own."""

    def __init__(self, own: Tensor) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, self.own)


LEFT_PADDED = torch.ones(INPUTS, 1, 1, VISION_TOKENS, dtype=torch.bool)
LEFT_PADDED[1, ..., :4] = False


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Attention(), (12, "full", "included")),
        (Attention(is_causal=True), (12, "full", "excluded")),
        (Masked(lower()), (12, "full", "excluded")),
        (Masked(lower().triu(-3)), (12, "window", "excluded")),
        (Masked(lower(12).triu(-3) | lower(12).triu(-3).T), (12, "window", "included")),
        (Masked(LEFT_PADDED), (12, "full", "included")),
        (Masked(LEFT_PADDED & lower()), (12, "full", "excluded")),
        (Masked(torch.randn(1, 4, 12, 12)), (12, "full", "included")),
        (InTurn(), (7, "window", "included")),
        (InBatch(), (4, "window", "included")),
    ],
)
def test_facts_of_a_layer(layer: Attention, expected: tuple[int, str, str]) -> None:
    assert facts_of(vision_tower(Attention(), layer)) == [(12, "full", "included"), expected]


def test_padding_is_no_window() -> None:
    assert facts_of(text_tower(), TEXTS) == [(14, "full", "excluded")] * 3


def test_one_token_is_all_there_is() -> None:
    (batch,) = measure(tower_of(Stack(Attention()), prefix=()), samples_of(1, 1))
    assert (batch[0].facts.n_tokens, batch[0].facts.first_token) == (1, "included")
    assert np.isnan(batch[0].values).all()


def test_facts_hold_the_gate_and_the_projection() -> None:
    (batch,) = measure(vision_tower(), IMAGES)
    for block in batch:
        assert 0 < block.facts.gate_error < 1e-6
        assert block.facts.projection == "as captured"


# --- bias-free values ---------------------------------------------------------------------------------


def constants_of(tower: Tower, samples: Sequence[Sample], size: float = 1.0) -> dict[int, Tensor]:
    """A random constant for each KV head of each layer."""
    generator = torch.Generator().manual_seed(4)
    calls = capture(tower, tower.encode(samples))
    return {c.layer: size * torch.randn(c.kv_heads * c.value.shape[-1], generator=generator) for c in calls}


@pytest.mark.parametrize("name", ["vision", "text"])
def test_a_constant_is_taken_out_of_every_value_and_output(name: str) -> None:
    """Against the reference, whose outputs are made anew from the pattern and the values without it."""
    build, samples = TOWERS[name]
    tower = build()
    constants = constants_of(tower, samples)
    measured = run(tower, samples, value_constants=constants, token_sets=["all"], batch_size=INPUTS)
    plain = run(tower, samples, token_sets=["all"], batch_size=INPUTS)
    calls = capture(tower, tower.encode(samples))
    for call, values, before in zip(calls, measured, plain, strict=True):
        real = torch.tensor([[t < len(sample.read()) for t in range(call.tokens)] for sample in samples])
        constant = constants[call.layer].view(call.kv_heads, 1, -1)
        made_anew = with_dense_output(replace(call, value=call.value - constant))
        expected = reference(made_anew, real)
        for metric, number, old in zip(NAMES, values[0], before[0], strict=True):
            np.testing.assert_allclose(number, expected[metric].numpy(), rtol=1e-5, atol=2e-5, err_msg=metric)
            attention = metric.startswith(("self_weight", "entropy", "effective", "first"))
            assert np.array_equal(number, old) == attention, metric


@pytest.mark.parametrize("name", TOWERS)
def test_nothing_taken_out_is_the_table_as_computed(name: str) -> None:
    """Bit for bit: what a model without biases gives."""
    build, samples = TOWERS[name]
    tower = build()
    nothing = {index: 0 * constant for index, constant in constants_of(tower, samples).items()}
    measured = run(tower, samples, value_constants=nothing, batch_size=2)
    np.testing.assert_array_equal(measured, run(tower, samples, batch_size=2))


def test_the_gate_sees_the_call_as_captured() -> None:
    """Without a constant far larger than the values, A V could not be rebuilt to the gate's tolerance."""
    tower = vision_tower()
    constants = constants_of(tower, IMAGES, size=1e4)
    (plain,) = measure(tower, IMAGES)
    (free,) = measure(tower, IMAGES, value_constants=constants)
    assert [block.facts for block in plain] == [block.facts for block in free]


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("zero vectors")])
def test_the_pattern_gives_the_same_output_from_values_without_a_constant(name: str) -> None:
    """Rows that see nothing keep theirs: it is 0 on both sides."""
    call = CASES[name]
    constant = torch.randn(call.kv_heads * call.value.shape[-1], generator=torch.Generator().manual_seed(5))
    free = without_constant(call, constant)
    value = (call.value - constant.view(call.kv_heads, 1, -1)).to(call.value.dtype)
    expected = with_dense_output(replace(call, value=value))
    assert torch.equal(free.value, value)
    tolerance = 1e-5 if call.output.dtype in (torch.float32, torch.float64) else 0.05
    torch.testing.assert_close(free.output, expected.output, rtol=tolerance, atol=tolerance)
    for kept in ("query", "key", "mask", "pattern", "log_normaliser", "causal", "scale", "visibility"):
        assert getattr(free, kept) is getattr(call, kept), kept


def test_heads_that_the_model_repeated_share_a_constant() -> None:
    grouped = make_call(heads=4, kv_heads=2)
    each = {name: getattr(grouped, name).repeat_interleave(2, 1) for name in ("key", "value")}
    constant = torch.arange(2.0 * grouped.value.shape[-1])
    one, other = without_constant(grouped, constant), without_constant(replace(grouped, **each), constant)
    torch.testing.assert_close(one.output, other.output)
    torch.testing.assert_close(one.value.repeat_interleave(2, 1), other.value)


def test_half_precision_stays_half_precision() -> None:
    call = make_call(dtype=torch.bfloat16)
    free = without_constant(call, torch.ones(64))
    assert (free.value.dtype, free.output.dtype) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(free.value.float(), call.value.float() - 1, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("numbers", [0, 31, 48])
def test_a_constant_of_another_size_is_refused(numbers: int) -> None:
    with pytest.raises(
        MeasurementError, match=f"constant of {numbers} numbers does not fit 4 value heads of 16"
    ):
        without_constant(make_call(), torch.ones(numbers))


# --- the reconstruction gate ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["full; sinks", "group of 2, bias; other keys", "full; other keys, pattern given"]
)
def test_what_comes_of_no_token_is_part_of_what_is_rebuilt(name: str) -> None:
    call, gate = CASES[name], ReconstructionCheck()
    gate.check(call, ["a", "b"])
    total = float(row_sums(call)[:, :, torch.linspace(0, 12, 13).long()].mean())
    assert gate.facts(0, "as captured").row_sum == round(total, 3) < 0.95
    for wrong in (None, call.output.new_ones(1, 1, 1, 1) / 9):  # negative control
        with pytest.raises(MeasurementError, match="A V rebuilt from the call differs"):
            ReconstructionCheck().check(replace(call, outside=wrong), ["a", "b"])


def tampering(change: Callable[[AttentionCall], AttentionCall], layer: int = 1) -> Callable[..., Any]:
    """A `capture` that lies about one layer."""

    def capture(layers: Sequence[Layer], on_call: OnCall) -> Any:
        return attention_calls(
            layers, lambda call: on_call(change(call) if call.layer == layer else replace(call))
        )

    return capture


@pytest.mark.parametrize("name", OTHER_TOKENS)
def test_keys_of_other_tokens_pass_the_gate(name: str) -> None:
    call, gate = OTHER_TOKENS[name], ReconstructionCheck()
    gate.check(call, ["a", "b"])
    assert gate.facts(0, "as captured").n_tokens == call.tokens
    with pytest.raises(MeasurementError, match="A V rebuilt from the call differs"):
        gate.check(replace(call, value=call.value.flip(2)), ["a", "b"])


def test_saved_calls_hold_what_their_pattern_takes_where_keys_are_no_tokens(tmp_path: Path) -> None:
    tower = replace(vision_tower(), capture=tampering(with_other_keys))
    save_activations(tower, IMAGES[:1], tmp_path)
    saved = load_file(tmp_path / "00000.safetensors")
    assert "layer.00.outside" not in saved
    q, k, v, y, lse, outside, pattern = (
        saved[f"layer.01.{part}"]
        for part in ("query", "key", "value", "output", "log_normaliser", "outside", "pattern")
    )
    weights = (q @ k.mT * q.shape[-1] ** -0.5 - lse[..., None]).exp()
    torch.testing.assert_close(weights, pattern, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights @ v + outside, y, rtol=1e-5, atol=1e-5)


LIES: dict[str, Callable[[AttentionCall], AttentionCall]] = {
    "scale": lambda call: replace(call, scale=call.scale * 1.01),
    "causality": lambda call: replace(call, causal=True),
    "a mask": lambda call: replace(call, mask=lower()),
    "value heads": lambda call: replace(call, value=call.value.roll(1, dims=1)),
    "queries": lambda call: replace(call, query=call.query.flip(2)),
    "one value": lambda call: replace(call, value=call.value.index_fill(2, torch.tensor([5]), 0.0)),
    "the output": lambda call: replace(call, output=call.output * 1.001),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_call_that_does_not_rebuild_its_output_is_refused(lie: str) -> None:
    tower = vision_tower()
    honest = replace(tower, capture=tampering(replace))
    np.testing.assert_array_equal(run(honest, IMAGES), run(tower, IMAGES))
    message = (
        r"(?m)^layer 'layers\.1': A V rebuilt from the call differs from what the model used "
        r"\(relative error \d\.\de[-+]\d+, allowed 1e-05\)$"
    )
    with pytest.raises(MeasurementError, match=message):
        list(measure(replace(tower, capture=tampering(LIES[lie])), IMAGES))


@pytest.mark.parametrize(
    ("entry", "size", "told"), [(-100.0, 1, False), (-100.0, 60, True), (-1e3, 60, False)]
)
def test_scores_that_outweigh_a_mask_are_told(entry: float, size: float, told: bool) -> None:
    """What -100 hides has weight where scores differ by more: no model to be reported."""
    layer = Masked(torch.full((12, 12), entry).triu(1))
    with torch.no_grad():
        layer.q.weight.mul_(size)
        layer.k.weight.mul_(size / 12)
    tower = vision_tower(Attention(), layer)
    if not told:
        assert facts_of(tower)[1] == (12, "full", "excluded")
        return
    message = "^layer 'layers.1': scores of this input outweigh what its mask adds to hide keys"
    with pytest.raises(MeasurementError, match=message) as caught:
        list(measure(tower, IMAGES))
    assert "report" not in str(caught.value.tip)
    assert "-inf or a boolean mask" in str(caught.value.tip)


def test_half_precision_may_round() -> None:
    tower = vision_tower(*(Attention().bfloat16() for _ in range(2)))
    samples = [Sample(s.id, lambda s=s: s.read().bfloat16()) for s in IMAGES]
    (batch,) = measure(tower, samples)
    errors = [block.facts.gate_error for block in batch]
    assert all(1e-5 < error < 1e-2 for error in errors)
    with pytest.raises(MeasurementError, match=r"layers\.1.*allowed 1e-02") as caught:
        list(measure(replace(tower, capture=tampering(LIES["one value"])), samples))
    assert caught.value.tip.startswith("try --dtype float32; if that differs too, ")


# --- what cannot be measured ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message", "tip"),
    [
        ({"layers": [0, 3]}, "no layer 3", "layers are 0 to 2"),
        ({"layers": [-4]}, "no layer -4", "layers are 0 to 2, or -1 to -3 from the last"),
        ({"token_sets": ["patch", "image"]}, "no token set 'image'", "patch, all, cls or registers"),
    ],
)
def test_unknown_names_are_told_before_any_work(options: dict[str, Any], message: str, tip: str) -> None:
    unread = [Sample("a", lambda: pytest.fail("an input was read"))]
    with pytest.raises(UserError, match=message) as error:
        list(measure(vision_tower(), unread, **options))
    assert tip in error.value.tip.replace("'", "")


def test_a_model_without_attention_is_told() -> None:
    with pytest.raises(UserError, match="the model has no attention layer"):
        list(measure(replace(vision_tower(), layers=()), IMAGES))


def test_unreadable_inputs_are_noted_and_left_out() -> None:
    def broken() -> Tensor:
        raise UnreadableInput("cannot read image 'x.png': truncated")

    given = [IMAGES[0], Sample("x.png", broken), *IMAGES[1:], Sample("y.png", broken)]
    incidents, tower = Incidents(), vision_tower()
    batches = list(measure(tower, given, batch_size=2, incidents=incidents))
    assert [batch[0].ids for batch in batches] == [
        ("input-0", "input-1"),
        ("input-2", "input-3"),
        ("input-4",),
    ]
    assert incidents.failed == dict.fromkeys(("x.png", "y.png"), "cannot read image 'x.png': truncated")
    np.testing.assert_array_equal(table(batches), run(tower, IMAGES, batch_size=2))


def test_other_errors_are_not_swallowed() -> None:
    def broken() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(measure(vision_tower(), [Sample("x", broken)]))


def test_what_the_model_fails_of_itself_is_told_and_a_fault_of_ours_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(batch: object) -> None:
        raise KeyError("no such state")

    tower = replace(vision_tower(), forward=broken)
    message = "(?m)^the model's vision tower fails on its own input: it lacks 'no such state'$"
    for work in (lambda: run(tower, IMAGES), lambda: capture(tower, tower.encode(IMAGES[:1]))):
        with pytest.raises(UserError, match=message) as error:
            work()
        assert error.value.exit_code == 2
    monkeypatch.setattr("diag.measure.loop._edited_call", broken)
    with pytest.raises(TypeError):
        run(vision_tower(), IMAGES)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite_name_the_layer(number: float) -> None:
    tower = vision_tower()
    tower.layers[1].module.v.weight[3, 2] = number
    with pytest.raises(UserError, match=r"^layer 'layers\.1' gives values that are not finite") as error:
        list(measure(tower, IMAGES))
    assert "NaN or infinity" in error.value.tip


def spoiled(name: str, token: int, number: float = math.nan) -> Sample:
    """An input with one token of NaN or infinity."""
    x = IMAGES[0].read()
    x[token] = number
    return Sample(name, lambda: x.clone())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_listed_and_change_no_other(
    number: float, place: int, batch_size: int
) -> None:
    """Before the gate has passed and after it: all others are in the batches that they would be in."""
    given = [*IMAGES[:place], spoiled("bad", 4, number), spoiled("worse", 11, number), *IMAGES[place:]]
    incidents, options = Incidents(), {"token_sets": ["patch", "all"], "batch_size": batch_size}
    found = list(measure(vision_tower(), given, incidents=incidents, **options))
    alone = list(measure(vision_tower(), IMAGES, **options))
    np.testing.assert_array_equal(table(found), table(alone))
    assert [batch[0].ids for batch in found] == [batch[0].ids for batch in alone]
    assert [block.facts for block in found[0]] == [block.facts for block in alone[0]]
    assert list(incidents.failed) == ["bad", "worse"]
    for why in incidents.failed.values():
        assert re.fullmatch(r"layer 'layers\.0' gives values that are not finite( \(\w+\))?", why)


class Overflowing(Attention):
    """Gives infinity for inputs that begin with a large number."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        large = x[:, :1, :1] > 50
        return super().forward(torch.where(large, torch.inf, x), mask)


@pytest.mark.parametrize("place", [0, 4])
def test_the_layer_that_shows_it_first_is_told(place: int) -> None:
    given = [*IMAGES[:place], spoiled("bad", 0, 100.0), *IMAGES[place:]]
    incidents = Incidents()
    tower = vision_tower(Attention(), Overflowing(), Attention())
    list(measure(tower, given, batch_size=2, token_sets=["all"], incidents=incidents))
    assert list(incidents.failed) == ["bad"]
    assert incidents.failed["bad"].startswith("layer 'layers.1' gives values that are not finite")


@pytest.mark.parametrize("place", [0, 3])
def test_stream_metrics_go_on_without_an_input_too(place: int) -> None:
    model = load(parse("demo:vit-p16"), device="cpu", dtype=torch.float32)
    tower = model.towers["vision"]
    options = {"metrics": ["block_influence", "value_stream_cosine"], "batch_size": 2}
    options["blocks"] = find_blocks(model.module, tower.layers)
    good = list(itertools.islice(tower.samples(inputs.demo_images(), None), 4))
    bad = Sample("bad", lambda: torch.full((3, *[tower.facts["image_size"]] * 2), math.nan))
    incidents = Incidents()
    found = list(measure(tower, [*good[:place], bad, *good[place:]], incidents=incidents, **options))
    np.testing.assert_array_equal(table(found), table(list(measure(tower, good, **options))))
    assert "gives values that are not finite" in incidents.failed["bad"]
    assert not incidents.unprojected


@pytest.mark.parametrize("whole", [True, False])
def test_nothing_but_inputs_that_are_not_finite_is_an_error_of_the_whole(whole: bool) -> None:
    """Not of a later part, such as the last shard of a run with one input left."""
    given = [spoiled(str(number), number) for number in range(4)]
    incidents = Incidents()
    batches = measure(vision_tower(), given, batch_size=3, incidents=incidents, whole=whole)
    if whole:
        with pytest.raises(UserError, match=r"(?m)'layers\.0' .* not finite \(input '0' and 3 more\)$"):
            list(batches)
    else:
        assert not list(batches)
    assert list(incidents.failed) == ["0", "1", "2", "3"]


def test_inputs_that_cannot_be_encoded_are_left_out_of_their_batch() -> None:
    """Where nothing prepares them one by one, as for metrics that need the image itself."""
    tower = vision_tower()

    def refused(sample: Sample) -> Tensor:
        if sample.id == "odd":
            raise UnreadableInput("cannot preprocess the image: too narrow")
        return sample.read()

    def encode(samples: Sequence[Sample]) -> Any:
        each(samples, refused)
        return tower.encode(samples)

    incidents = Incidents()
    given = [IMAGES[0], Sample("odd", IMAGES[1].read), *IMAGES[1:]]
    found = list(measure(replace(tower, encode=encode), given, batch_size=2, incidents=incidents))
    assert incidents.failed == {"odd": "cannot preprocess the image: too narrow"}
    np.testing.assert_array_equal(table(found), run(tower, IMAGES, batch_size=2))


def test_a_layer_that_never_runs_is_named() -> None:
    tower, idle = vision_tower(), Attention()
    tower = replace(tower, layers=(*tower.layers, Layer(3, "layers.3", idle)))
    with pytest.raises(MeasurementError, match=r"^layer 'layers\.3' was never run") as error:
        list(measure(tower, IMAGES))
    assert "--layers" in error.value.tip
    assert run(tower, IMAGES, layers=[0, 1, 2]).shape[0] == 3


def test_a_layer_that_stops_running_is_named() -> None:
    batches = measure(vision_tower(Attention(), Skipping()), IMAGES, batch_size=2)
    assert len(list(itertools.islice(batches, 2))) == 2
    with pytest.raises(MeasurementError, match=r"^layer 'layers\.1' was never run"):
        next(batches)


def test_depths_that_share_weights_are_not_mixed() -> None:
    """ALBERT: one module at every depth. Its calls are no windows."""
    shared = Attention()
    tower = tower_of(Stack(Attention(), shared, shared))
    tower = replace(tower, layers=tower.layers[:2])
    message = (
        r"(?m)^layer 'layers\.1' ran 2 times in one forward pass: "
        r"depths that share weights would be mixed$"
    )
    with pytest.raises(MeasurementError, match=message):
        list(measure(tower, IMAGES))
    assert len(capture(tower, tower.encode(IMAGES))) == 3


def test_pooling_is_left_out_with_its_reason() -> None:
    incidents, tower = Incidents(), vision_tower(Attention(), Pooled(), Attention())
    batches = list(measure(tower, IMAGES, batch_size=2, incidents=incidents))
    assert [[block.layer for block in batch] for batch in batches] == [[0, 2]] * 3
    assert incidents.skipped_layers == {"layers.1": "4 queries over 12 keys: cross-attention or pooling"}


def test_nothing_but_pooling_is_an_error() -> None:
    with pytest.raises(MeasurementError) as told:
        list(measure(vision_tower(Pooled()), IMAGES))
    due = nothing_of_its_own("layers.0", "4 queries over 12 keys: cross-attention or pooling")
    assert (str(told.value), told.value.tip) == (str(due), due.tip)


def test_capture_hands_out_the_calls_in_order() -> None:
    tower = vision_tower(InTurn(), Attention(), prefix=())
    calls = capture(tower, tower.encode(IMAGES[:2]))
    assert [(call.layer, call.module, call.tokens) for call in calls] == [
        (0, "layers.0", 5),
        (0, "layers.0", 7),
        (1, "layers.1", 12),
    ]
    assert all(call.batch == 2 for call in calls)
    with pytest.raises(UserError, match="no layer 7"):
        capture(tower, tower.encode(IMAGES[:2]), layers=[7])

"""The shape of attention with fused kernels (here in Triton's interpreter) against plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import CASES, key_padding, make_call

from diag.attention import kernels
from diag.attention.call import AttentionCall
from diag.attention.positions import TEXT, Geometry
from diag.attention.sampling import RowSampling, sample_rows
from diag.metrics import pattern_pass
from diag.metrics.default import selections_of
from diag.metrics.pattern_shape import GROUPS, SHAPE_METRICS, shape_readings
from diag.metrics.readings import reduce

triton_scores = pytest.importorskip("diag.attention.kernels.triton_scores", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    not triton_scores.INTERPRETED, reason="tensors on the CPU need the interpreter"
)

FUSED = [name for group in ("sinks", "distance", "nmi") for name in GROUPS[group]]
IMAGE = Geometry(prefix=1, rows=3, cols=4, patch_size=14.0)
STRIP = Geometry(prefix=0, rows=1, cols=13, patch_size=2.0)


def numbers(call: AttentionCall, names: list[str], geometry: Geometry) -> dict[str, torch.Tensor]:
    sets = [torch.ones(1, call.tokens, dtype=torch.bool), torch.arange(call.tokens)[None] > 2]
    return {
        f"{name} of set {number}": reduce([one], call.batch, "mean")
        for number, found in enumerate(shape_readings(selections_of(call, sets), names, geometry=geometry))
        for name, one in found.items()
    }


EVERY_PLACE = [TEXT, IMAGE, STRIP, Geometry.unknown(1)]
PAIRS = [(case, geometry) for case in ("full", "causal left padding") for geometry in EVERY_PLACE]
PAIRS += [
    (case, IMAGE)
    for case in ("causal", "mask per head, unseen keys", "group of 2", "bias and -inf",
                 "causal left padding; sinks", "group of 2, bias; other keys")
]  # fmt: skip
"""What is seen, and where tokens are: a kernel takes the one without the other; interpreting them is slow."""


@pytest.mark.parametrize(("case", "geometry"), PAIRS, ids=str)
def test_kernels_give_what_blocks_give(
    case: str, geometry: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no block of the pattern is computed for what kernels know."""
    plain = numbers(replace(CASES[case]), FUSED, geometry)
    monkeypatch.setattr(kernels, "_has_triton", lambda call: True)
    monkeypatch.setattr(pattern_pass, "log2_pattern_blocks", None)
    for name, found in numbers(replace(CASES[case]), FUSED, geometry).items():
        torch.testing.assert_close(found, plain[name], rtol=2e-5, atol=2e-6, equal_nan=True, msg=name)


def test_what_kernels_do_not_know_still_comes_from_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(SHAPE_METRICS)
    plain = numbers(replace(CASES["causal"]), names, IMAGE)
    monkeypatch.setattr(kernels, "_has_triton", lambda call: True)
    for name, found in numbers(replace(CASES["causal"]), names, IMAGE).items():
        torch.testing.assert_close(found, plain[name], rtol=2e-5, atol=2e-6, equal_nan=True, msg=name)


def test_sampled_rows_are_picked_from_what_kernels_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    padding = key_padding([range(40), range(3, 40)], 40)
    call = make_call(tokens=40, mask=padding, causal=True)
    sample = sample_rows([padding[:, 0, 0]], ["a", "b"], RowSampling(rows=16, above=8))
    plain = numbers(replace(call, sample=sample), FUSED, TEXT)
    monkeypatch.setattr(kernels, "_has_triton", lambda call: True)
    for name, found in numbers(replace(call, sample=sample), FUSED, TEXT).items():
        torch.testing.assert_close(found, plain[name], rtol=2e-5, atol=2e-6, equal_nan=True, msg=name)


def test_kernels_are_not_asked_on_the_cpu() -> None:
    call = replace(CASES["causal"])
    givers = torch.ones(1, *call.output.shape[:3])
    wanted = {"received", "distance", "own"}
    assert kernels.fused_quantities(call, pytest.fail, wanted, givers, None, 0) == {}

"""What was not measured, in words."""

from __future__ import annotations

from diag.results.left_out import left_out

LINEAR, POOLED = "no softmax attention (GatedDeltaNet)", "64 queries over 4 keys: cross-attention or pooling"


def test_layers_of_one_reason_are_one_phrase() -> None:
    skipped = {f"layers.{index}": LINEAR for index in (0, 1, 2, 4, 5, 6)} | {"layers.8.attn": POOLED}
    numbers = {path: int(path.split(".")[1]) for path in skipped}
    skipped |= {"cross.0": POOLED, "cross.1": POOLED}  # hold no place
    assert left_out({"skipped_layers": skipped, "skipped_numbers": numbers}) == [
        f"layers 0-2, 4-6: {LINEAR}",
        f"layer 8: {POOLED}",
        f"cross.0 and 1 more: {POOLED}",
    ]


def test_runs_that_did_not_note_numbers_are_told_by_path() -> None:
    assert left_out({"skipped_layers": {"layers.1": LINEAR}}) == [f"layers.1: {LINEAR}"]
    assert left_out({"skipped_layers": None}) == left_out({}) == []

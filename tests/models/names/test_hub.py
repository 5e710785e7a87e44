"""What `attnbias models QUERY` finds beside the registries: text models on the hub, its cache, series."""

from __future__ import annotations

from pathlib import Path

import pytest

from diag.models.names import series
from diag.models.names.hub import HERE, MODELS, cached, listed
from diag.models.names.resolve import LANGUAGE_MODELS, listing, parse


def test_every_name_is_one_that_can_be_probed() -> None:
    names = [row.name for row in listed()]
    assert len(names) == len(set(names)) >= 60
    assert set(LANGUAGE_MODELS.values()) <= set(names)
    for row in listed():
        assert parse(row.name).resolved == row.resolves_to == f"hf:{row.name}"


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("llama 3.2", "meta-llama/Llama-3.2-1B"),
        ("mistral", "mistralai/Mistral-7B-v0.1"),
        ("BERT", "answerdotai"),
    ],
)
def test_text_models_are_found_by_a_part_of_their_name(query: str, name: str) -> None:
    assert any(row["name"].startswith(name) for row in listing(query))
    assert not any(row["name"].startswith(name) for row in listing())


def test_series_are_found_as_they_are_typed() -> None:
    rows = {row["name"]: row for row in listing("gpt2")}
    assert rows["--series gpt2"]["resolves_to"] == "4 models, gpt2 … gpt2-xl"
    assert [row["resolves_to"] for row in listing("gpt2")].count(
        "hf:openai-community/gpt2"
    ) == 2  # its aliases
    for row in listing("pythia"):
        if row["name"].startswith("--series "):
            assert series.members(row["name"].split()[1])


def test_what_lies_in_the_cache_is_found_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("models--me--my-model", "models--facebook--opt-125m", "datasets--me--texts", "version.txt"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cached() == {"me/my-model", "facebook/opt-125m"}
    notes = {row["name"]: row["note"] for query in ("my-model", "opt-") for row in listing(query)}
    assert notes["me/my-model"] == notes["facebook/opt-125m"] == HERE
    assert notes["facebook/opt-350m"] == ""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    assert cached() == set()
    assert len(list(listed())) == sum(len(names.split()) for names in MODELS.values())

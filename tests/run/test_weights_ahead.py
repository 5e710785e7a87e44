"""Weights read ahead: which files they are, when they are read, and that nothing of it can go wrong."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from diag.models.names.resolve import parse
from diag.models.names.spec import ModelSpec
from diag.run.plan import ProbePlan
from diag.run.run import run_probe
from diag.run.weights_ahead import WeightsAhead, weights_ahead, weights_of


def spec(name: str, family: str = "hf", **others: object) -> ModelSpec:
    return ModelSpec(name, family, name, **others)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in two files, beside its config and the same weights in another format."""
    place = tmp_path / "model"
    (place / "onnx").mkdir(parents=True)
    for name in ("b.safetensors", "a.safetensors", "pytorch_model.bin", "config.json", "onnx/model.onnx"):
        (place / name).write_bytes(bytes(100))
    return place


def test_the_files_of_a_folder_a_checkpoint_and_nothing(folder: Path) -> None:
    both = [folder / "a.safetensors", folder / "b.safetensors"]
    assert weights_of(spec(str(folder))) == both
    assert weights_of(spec(f"local-dir:{folder}", "timm")) == both
    assert weights_of(spec(str(folder), random_init=True)) == []
    assert weights_of(spec(str(folder), checkpoint=folder / "c.pt")) == [folder / "c.pt"]
    for file in both:
        file.unlink()
    assert weights_of(spec(str(folder))) == [folder / "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("name", "family", "repository"),
    [
        ("facebook/opt-125m", "hf", "facebook/opt-125m"),
        ("vit_base_patch16_224.augreg_in21k", "timm", "timm/vit_base_patch16_224.augreg_in21k"),
        ("vit_base_patch16_224", "timm", "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"),
        ("hf-hub:org/name", "timm", "org/name"),
    ],
)
def test_the_files_of_a_repository_in_the_cache(
    name: str, family: str, repository: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(repo: str, file: str, *, revision: str | None) -> str | None:
        return str(folder / file) if (repo, revision) == (repository, None) else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert weights_of(spec(name, family)) == [folder / "a.safetensors", folder / "b.safetensors"]
    assert weights_of(spec(name, family, revision="v2")) == []


@pytest.mark.parametrize("name", ["ViT-B-16/openai", "not/a/repository", "gpt2", "…"])
def test_what_is_not_there_is_not_read(name: str) -> None:
    assert weights_of(spec(name)) == []


def test_files_that_go_or_are_too_large_are_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with weights_ahead() as ahead:
        ahead.read(spec(str(folder), checkpoint=folder / "gone.safetensors"))
        assert ahead.thread is None
        monkeypatch.setattr("diag.run.weights_ahead.available", lambda device: 300)
        ahead.read(spec(str(folder)))
        assert ahead.thread is None
        monkeypatch.setattr("diag.run.weights_ahead.available", lambda device: 500)
        ahead.read(spec(str(folder)))
        assert ahead.thread is not None
    assert not ahead.thread.is_alive()


def test_reading_ends_with_the_run(tmp_path: Path) -> None:
    """A file without an end, as of a slow disk; meanwhile no other one is begun."""
    with weights_ahead() as ahead:
        ahead.read(spec("endless", checkpoint=Path("/dev/zero")))
        first = ahead.thread
        ahead.read(spec("other", checkpoint=Path("/dev/null")))
        assert ahead.thread is first is not None
        assert first.is_alive()
    assert not first.is_alive()
    assert first not in threading.enumerate()


def test_a_run_reads_the_model_behind_each_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(WeightsAhead, "read", lambda ahead, spec: read.append(spec.given))
    monkeypatch.setattr("diag.run.finish.draw", lambda *_: [])
    models: Sequence[str] = ("demo:vit-p16", "demo:vit-p8")
    plan = ProbePlan(models=models, images="demo", limit=1, metrics=("cos_y_vself",))
    run_probe(plan, tmp_path / "run", following=parse("demo:vit-p4"))
    assert read == ["demo:vit-p8", "demo:vit-p4"]

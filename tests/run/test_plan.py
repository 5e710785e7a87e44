"""Plans: what is refused, and what makes two runs the same run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from diag.errors import UserError
from diag.run import plan as config
from diag.run.environment import command_line, environment
from diag.run.plan import ProbePlan
from diag.studies.intervene.plan import IntervenePlan

DIGESTS = {"vision": "abc"}


def plan(**values: Any) -> ProbePlan:
    return ProbePlan.checked(**({"models": ("demo:vit-p16",)} | values))


CHANGES: dict[str, Any] = {
    "models": ("demo:vit-p8",),
    "images": "demo",
    "texts": "demo",
    "limit": 3,
    "seq_len": 16,
    "metrics": ("entropy",),
    "layers": (0,),
    "tokens": ("cls",),
    "values": "bias_free",
    "intervene": ("xsa",),
    "null": "untrained",
    "checkpoint": Path("weights.safetensors"),
    "model_args": ("img_size=96",),
    "random_init": True,
    "trust_remote_code": True,
    "allow_random": True,
    "dtype": "bfloat16",
    "seed": 1,
    "save_activations": 2,
    "keep_samples": 8,
    "exact": True,
    "sampled_rows": 128,
}
HOW: dict[str, Any] = {"device": "cpu", "batch_size": 3, "workers": 3, "figures": "none"}


def test_every_option_is_either_what_or_how() -> None:
    assert set(ProbePlan.model_fields) == {*CHANGES, *HOW}


@pytest.mark.parametrize("option", CHANGES)
def test_the_key_changes_with_what_is_measured(option: str) -> None:
    assert plan(**{option: CHANGES[option]}).key(DIGESTS) != plan().key(DIGESTS)


@pytest.mark.parametrize("option", HOW)
def test_the_key_does_not_change_with_how(option: str) -> None:
    assert plan(**{option: HOW[option]}).key(DIGESTS) == plan().key(DIGESTS)


def test_the_key_changes_with_the_inputs_and_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan().key(DIGESTS)
    assert plan().key({"vision": "abd"}) != before
    monkeypatch.setattr(config, "version", lambda: "99")
    assert plan().key(DIGESTS) != before


def test_the_key_does_not_change_with_how_a_path_is_typed(tmp_path: Path) -> None:
    for kind in ("images", "texts"):
        typed = ("d", "d/", "./d", "~/d", str(tmp_path / "d"), "../d")
        assert len({plan(**{kind: path}).key(DIGESTS) for path in typed}) == 1
        assert len({plan(**{kind: path}).key(DIGESTS) for path in ("d", "demo", "hf:d", None)}) == 4


SPELLINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"dtype": "fp16"}, {"dtype": "float16"}),
    ({"tokens": ("patches", "class")}, {"tokens": ("patch", "cls")}),
    ({"metrics": ("default",)}, {}),
    ({"metrics": ("default", "entropy")}, {"metrics": None}),
    ({"metrics": ("excess", "excess")}, {"metrics": ("excess",)}),
    ({"layers": (2, 0, 2)}, {"layers": (0, 2)}),
    ({"layers": ("1:3",)}, {"layers": (1, 2)}),
    ({"layers": ("last",)}, {"layers": (-1,)}),
    ({"values": "bias-free"}, {"values": "bias_free"}),
    ({"null": "untrained"}, {"null": "untrained=3"}),
    ({"model_args": ("b=1", "a=0x2")}, {"model_args": ("a=2", "b=1")}),
    ({"checkpoint": Path("x/../w.pt")}, {"checkpoint": Path("x/../w.pt").absolute()}),
    ({"model_args": ("checkpoint=w.pt",)}, {"model_args": (f"checkpoint={Path('w.pt').absolute()}",)}),
]


@pytest.mark.parametrize(("typed", "meant"), SPELLINGS)
def test_one_meaning_has_one_key(
    typed: dict[str, Any], meant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: False)  # the checkpoints are names alone
    assert plan(**typed).key(DIGESTS) == plan(**meant).key(DIGESTS) != plan(seed=1).key(DIGESTS)


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_the_key_changes_with_weights_in_a_folder_but_not_with_runs_below_it(
    tmp_path: Path, prefix: str
) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    os.utime(weights, ns=(0, 0))
    named = plan(models=(f"{prefix}{tmp_path}",))
    before = named.key(DIGESTS)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "plan.json").write_text("{}")
    assert named.key(DIGESTS) == before
    os.utime(weights, ns=(0, 1))
    assert named.key(DIGESTS) != before


def test_the_key_changes_with_weights_below_a_folder_but_not_with_what_was_written_there(
    tmp_path: Path,
) -> None:
    below = tmp_path / "shards" / "model-00001.safetensors"
    run = tmp_path / "mine"
    for folder in (below.parent, run / "activations"):
        folder.mkdir(parents=True)
    below.write_bytes(b"1")
    os.utime(below, ns=(0, 0))
    named = plan(models=(f"hf:{tmp_path}",))
    before = named.key(DIGESTS)
    (run / "plan.json").write_text("{}")
    (run / "activations" / "00000.safetensors").write_bytes(b"1")
    assert named.key(DIGESTS) == before
    os.utime(below, ns=(0, 1))
    assert named.key(DIGESTS) != before


def test_the_key_changes_with_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(b"1")
    mine = plan(checkpoint=file)
    before = mine.key(DIGESTS)
    file.write_bytes(b"12")
    assert mine.key(DIGESTS) != before


def test_the_key_changes_with_a_checkpoint_among_the_arguments(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(b"1")
    mine = plan(model_args=(f"checkpoint={file}",))
    before = mine.key(DIGESTS)
    os.utime(file, ns=(0, 0))
    assert mine.key(DIGESTS) != before


@pytest.mark.parametrize("where", ["", ":0-2", ":0/1"])
def test_the_key_follows_the_content_of_a_table_of_strengths(tmp_path: Path, where: str) -> None:
    """Whatever its size and times: it is small."""
    file = tmp_path / "strengths.csv"
    file.write_text("layer,head,strength\n0,0,0.5\n")
    written = file.stat()
    change = (f"gated_xsa={file}{where}",)
    plans = [
        plan(intervene=change),
        IntervenePlan.checked(models=("demo:vit-p16",), interventions=change),
    ]
    before = [mine.key(DIGESTS) for mine in plans]
    file.write_text("layer,head,strength\n0,0,0.7\n")
    os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
    after = [mine.key(DIGESTS) for mine in plans]
    assert all(old != new for old, new in zip(before, after, strict=True))
    os.utime(file, ns=(0, 0))
    assert [mine.key(DIGESTS) for mine in plans] == after


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "modeling_own.py", "adapter_config.json"])
def test_the_key_changes_with_a_model_file_edited_in_place(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    file = tmp_path / name
    file.write_text("a")
    os.utime(file, ns=(0, 0))
    mine = plan(models=(f"hf:{tmp_path}",))
    before = mine.key(DIGESTS)
    file.write_text("b")
    os.utime(file, ns=(0, 1))
    assert mine.key(DIGESTS) != before


def test_the_key_of_a_name_on_the_hub_has_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch moves; a commit in the name, and a cache that knows none, are as they were."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--org--tiny"
    named = {name: plan(models=(name,)) for name in ("hf:org/tiny", "tl:org/tiny", f"hf:org/tiny@{'a' * 40}")}

    def keys() -> list[str]:
        return [mine.key(DIGESTS) for mine in named.values()]

    found = [keys()]
    for commit in ("a" * 40, "b" * 40):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / "main").write_text(commit)
        found.append(keys())
    moving, lens, pinned = zip(*found, strict=True)
    assert [len(set(keys)) for keys in (moving, lens, pinned)] == [3, 3, 1]


def test_the_key_of_an_adapter_knows_the_files_of_its_model(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = plan(models=(f"hf:{adapter}",)).key(DIGESTS)
    (base / "model.safetensors").write_bytes(b"1")
    assert plan(models=(f"hf:{adapter}",)).key(DIGESTS) != before


def test_the_key_of_a_folder_with_an_adapter_knows_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it the adapter is loaded, without it only the base."""
    (tmp_path / "model.safetensors").write_bytes(b"1")
    mine = plan(models=(f"hf:{tmp_path}",))

    def keys() -> set[str]:
        found = set()
        for installed in (None, "0.18.0"):
            monkeypatch.setattr(config, "_peft", lambda installed=installed: installed)
            found.add(mine.key(DIGESTS))
        return found

    assert len(keys()) == 1
    (tmp_path / "adapter_config.json").write_text("{}")
    assert len(keys()) == 2


@pytest.mark.parametrize(
    ("values", "message", "tip"),
    [
        ({"limit": 0}, "--limit is above 0", "given: 0"),
        ({"batch_size": -1}, "--batch-size is at least 0", "given: -1"),
        ({"seq_len": 0}, "--seq-len", "given: 0"),
        ({"seq_len": 1}, "--seq-len", "given: 1"),
        ({"limit": 2**63}, "--limit", f"given: {2**63}"),
        ({"batch_size": 2**63}, "--batch-size", f"given: {2**63}"),
        ({"seed": 2**64}, "--seed", f"given: {2**64}"),
        ({"seq_len": 2**31}, "--seq-len", f"given: {2**31}"),
        ({"workers": 10**6}, "--workers", "given: 1000000"),
        ({"keep_samples": 2**63}, "--keep-samples", f"given: {2**63}"),
        ({"seed": -1}, "--seed", "given: -1"),
        ({"dtype": "float8"}, "--dtype is one of float32, bfloat16, float16", "given: 'float8'"),
        ({"metrics": ()}, "--metrics names nothing", "given: ''"),
        ({"layers": ()}, "--layers names nothing", "given: ''"),
        ({"tokens": ()}, "--tokens names nothing", "given: ''"),
        ({"layers": ("x",)}, "--layers does not understand 'x'", "for example 0,5-11"),
        ({"models": ()}, "--model names too little: at least 1", "given: ''"),
        ({"values": "centred"}, "--values is as-computed or bias-free", "given: 'centred'"),
        ({"limit": 1.5}, "--limit is a whole number", "given: 1.5"),
        ({"random_init": 7}, "--random-init is true or false", "given: 7"),
        ({"models": ("a",), "model_args": 3}, "--model-arg is a list", "given: 3"),
        ({"colour": 1}, "--colour is not known", "given: 1"),
    ],
)
def test_bad_options_are_named(values: dict[str, Any], message: str, tip: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan(**values)
    assert caught.value.tip == tip


def test_the_command_can_be_pasted_into_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/attnbias", "probe", "--images", "my photographs"])
    assert command_line() == "attnbias probe --images 'my photographs'"


def test_the_environment_names_versions_and_no_person() -> None:
    found = environment()
    assert set(found) == {"attnbias", "git", "python", "platform", "packages"}
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"]
    text = json.dumps(found)
    assert str(Path.home()) not in text
    assert os.uname().nodename not in text

"""Reading checkpoints: what is wrong with a file is said in two lines, and no code in it runs."""

from __future__ import annotations

import argparse
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diag.errors import UserError
from diag.models.checkpoint import read_checkpoint, read_variants
from diag.models.weights import digest, fit

State = Mapping[str, Tensor]


class Malicious:
    """A pickle that would write a file on loading."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def read(file: Path, content: object, module: nn.Module | None = None, **options: Any) -> Any:
    torch.save(content, file)
    return read_checkpoint(file, module, **options)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {"model": {"state_dict": s}, "args": argparse.Namespace(lr=0.1)},
    ],
)
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."]
)
def test_every_layout_gives_the_same_weights(
    tmp_path: Path, linear: nn.Module, wrap: Callable[[State], object], prefix: str
) -> None:
    state = {prefix + name: value for name, value in linear.state_dict().items()}
    other = nn.Linear(3, 2)
    assert digest(other) != digest(linear)
    found = read(tmp_path / "w.pt", wrap(state), other)
    fit(other, found.tensors, "it")
    assert digest(other) == digest(linear)
    assert found.notes == ()


def test_prefixes_are_left_out_wherever_they_are(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 2)))
    state = {"0._orig_mod.0.module.weight": torch.ones(2, 3), "0._orig_mod.0.module.bias": torch.ones(2)}
    found = read(tmp_path / "w.pt", {"n_averaged": torch.tensor(3), **state}, model)
    assert list(found.tensors) == ["0.0.weight", "0.0.bias"]
    own = nn.ModuleDict({"module": nn.Linear(3, 2)})  # a model whose own names look like that keeps them
    assert list(read(tmp_path / "w.pt", own.state_dict(), own).tensors) == ["module.weight", "module.bias"]


def test_a_prefix_that_all_names_share_is_left_out_and_said(tmp_path: Path, linear: nn.Module) -> None:
    state = {f"model.net.{name}": value for name, value in linear.state_dict().items()}
    found = read(tmp_path / "w.pt", {"state_dict": state, "epoch": 3}, linear)
    assert list(found.tensors) == ["weight", "bias"]
    assert found.notes == ("every name in the checkpoint begins with 'model.net.': left out",)
    assert list(read(tmp_path / "w.pt", state).tensors) == ["model.net.weight", "model.net.bias"]


def test_names_that_become_one_are_told(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(1), "_orig_mod.a": torch.zeros(1)}
    with pytest.raises(UserError, match=r"'module\.a' and '_orig_mod\.a' are one name, 'a'") as error:
        read(tmp_path / "w.pt", state)
    assert "the weights of one model alone" in (error.value.tip or "")


def test_averaged_weights_are_taken_where_the_family_does_so_and_it_is_said(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    both = {"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": {"a": torch.ones(1)}}
    averaged = read(file, both, averaged=True)
    assert averaged.tensors["a"] == 1
    assert averaged.notes == (
        "the weights averaged over training were taken, 'state_dict_ema';"
        " 'checkpoint_key=state_dict' takes the others",
    )
    plain = read_checkpoint(file)
    assert plain.tensors["a"] == 0
    assert plain.notes == (
        "the weights were taken, 'state_dict'; 'checkpoint_key=state_dict_ema' takes the others",
    )
    for key, value in (("state_dict", 0), ("state_dict_ema", 1)):
        for first in (False, True):
            picked = read_checkpoint(file, key=key, averaged=first)
            assert (picked.tensors["a"], picked.notes) == (value, ())


def test_what_is_there_is_named_and_can_be_picked(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    with pytest.raises(UserError) as error:
        read(file, {"ema": {"a": torch.ones(1)}, "student": {"net": {"a": torch.zeros(1)}}, "epoch": 3})
    assert str(error.value) == (
        f"checkpoint '{file}' holds no named tensors, but 'ema' (1 tensors), 'student.net' (1 tensors)"
    )
    assert error.value.tip == (
        f"pick one: -m NAME,checkpoint={file},checkpoint_key=ema"
        f" or -m NAME,checkpoint={file},checkpoint_key=student.net"
    )
    assert read_checkpoint(file, key="ema").tensors["a"] == 1
    assert read_checkpoint(file, key="student.net").tensors["a"] == 0
    with pytest.raises(UserError, match="no named tensors under 'teacher', but 'ema'"):
        read_checkpoint(file, key="teacher")
    two = {"model.a": torch.zeros(1), "model_ema.a": torch.ones(1)}
    assert read(file, {"state_dict": two}, key="state_dict.model_ema").tensors == {"a": torch.ones(1)}
    for nothing, told in (({"epoch": 3}, "it holds 'epoch'"), ([1], "it is a list")):
        with pytest.raises(UserError, match=f"holds no named tensors; {told}"):
            read(file, nothing)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"0": ["version", 1]}, r"is \"\['version', 1\]\", no mapping"),
        ({"0": 3, "1": {}}, "is '3', no mapping"),
        (["0"], r"is \"\['0'\]\", no mapping"),
        ({0: {"version": 1}}, "is of modules without a name"),
    ],
)
@pytest.mark.parametrize("key", [None, "part"])
def test_what_stands_beside_tensors_and_is_no_mapping(
    tmp_path: Path, said: Any, told: str, key: str | None
) -> None:
    state = OrderedDict({"part.0.weight": torch.zeros(1)})
    state._metadata = said  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=f"'_metadata' of its state dict {told}") as error:
        read(tmp_path / "w.pt", state, key=key)
    assert error.value.tip == "save it with torch.save(model.state_dict(), FILE)"


def test_a_part_keeps_what_was_changed_in_its_modules(tmp_path: Path) -> None:
    state = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 2))}).state_dict()
    state._metadata["net.0"]["attnbias_variant"] = "xsa"
    file = tmp_path / "w.pt"
    assert read(file, {"state_dict": state}).variants == read_variants(file) == {"net.0": "xsa"}
    assert read_checkpoint(file, key="state_dict.net").variants == {"0": "xsa"}
    assert read_checkpoint(file, nn.Sequential(nn.Linear(3, 2))).variants == {"0": "xsa"}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: torch.ones(2, 2).to_sparse(), r"'a' is stored as torch\.sparse_coo"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "'a' is quantised"),
        (lambda: torch.ones(2, device="meta"), "'a' has no data"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_array_is_refused_by_name(
    tmp_path: Path, make: Callable[[], Tensor], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        read(tmp_path / "w.pt", {"a": make()})


def test_scalars_views_and_shared_tensors_are_read(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    state = {"scalar": torch.tensor(3.0), "a": whole[:4].view(2, 2), "b": whole[:4], "c": whole[::3]}
    found = read(tmp_path / "w.pt", state).tensors
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("none.pt", "checkpoint '.*none.pt' does not exist"),
        ("folder", "cannot read checkpoint '.*folder': it is a folder"),
        ("pipe", "cannot read checkpoint '.*pipe': it is no plain file"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, place: str, told: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for reads in (read_checkpoint, read_variants):
        with pytest.raises(UserError, match=told) as error:
            reads(tmp_path / place)
        assert "weights-only .pt" in (error.value.tip or "")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 broken zip", b"\xff" * 32])
def test_a_corrupt_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for reads in (read_checkpoint, read_variants):
        with pytest.raises(UserError, match="cannot be read") as error:
            reads(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_truncated_file(tmp_path: Path, linear: nn.Module) -> None:
    save_file(linear.state_dict(), tmp_path / "w.safetensors")
    torch.save(linear.state_dict(), tmp_path / "w.pt")
    for file in (tmp_path / "w.safetensors", tmp_path / "w.pt"):
        file.write_bytes(file.read_bytes()[:-30])
        with pytest.raises(UserError, match="cannot be read"):
            read_checkpoint(file)


@pytest.mark.parametrize("said", ["not json", "[]", '{"blocks.0": 3}'])
def test_a_header_that_is_no_mapping_of_variants(tmp_path: Path, linear: nn.Module, said: str) -> None:
    save_file(linear.state_dict(), tmp_path / "w.safetensors", metadata={"attnbias_variant": said})
    with pytest.raises(UserError, match=r"'attnbias_variant' is .* no mapping of modules to variants"):
        read_checkpoint(tmp_path / "w.safetensors")


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Malicious(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="could run code: not loaded") as error:
        read_checkpoint(tmp_path / "w.pt")
    assert error.value.tip == "save the weights alone: torch.save(model.state_dict(), FILE)"
    assert not (tmp_path / "ran").exists()
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UserError, match="could run code"):
        read_checkpoint(tmp_path / "module.pt")

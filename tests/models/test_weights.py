"""Reading checkpoints: what is wrong with a file is said in two lines, and no code in it runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diag.errors import UserError
from diag.models.weights import digest, fit, read_checkpoint, refuse_non_finite


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


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_every_layout_gives_the_same_weights(
    tmp_path: Path, linear: nn.Module, wrap: object, prefix: str
) -> None:
    state = {prefix + name: value for name, value in linear.state_dict().items()}
    torch.save(wrap(state), tmp_path / "w.pt")
    other = nn.Linear(3, 2)
    assert digest(other) != digest(linear)
    fit(other, read_checkpoint(tmp_path / "w.pt"), "it")
    assert digest(other) == digest(linear)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist") as error:
        read_checkpoint(tmp_path / "none.pt")
    assert "weights-only .pt" in (error.value.tip or "")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 broken zip"])
def test_a_corrupt_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="cannot be read") as error:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_truncated_file(tmp_path: Path, linear: nn.Module) -> None:
    save_file(linear.state_dict(), tmp_path / "w.safetensors")
    torch.save(linear.state_dict(), tmp_path / "w.pt")
    for file in (tmp_path / "w.safetensors", tmp_path / "w.pt"):
        file.write_bytes(file.read_bytes()[:-30])
        with pytest.raises(UserError, match="cannot be read"):
            read_checkpoint(file)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Malicious(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="could run code: not loaded") as error:
        read_checkpoint(tmp_path / "w.pt")
    assert error.value.tip == "save the weights alone: torch.save(model.state_dict(), FILE)"
    assert not (tmp_path / "ran").exists()
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UserError, match="could run code"):
        read_checkpoint(tmp_path / "module.pt")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="holds no named tensors"):
        read_checkpoint(tmp_path / "w.pt")


def test_wrong_shapes_are_named(linear: nn.Module) -> None:
    with pytest.raises(UserError) as error:
        fit(linear, {"weight": torch.zeros(2, 5), "bias": torch.zeros(2)}, "checkpoint 'w.pt'")
    assert (
        str(error.value)
        == "checkpoint 'w.pt' does not fit the model: 'weight' is [2, 5], the model's is [2, 3]"
    )


def test_missing_and_foreign_tensors_are_named_up_to_three(linear: nn.Module) -> None:
    tensors = {f"x{i}": torch.zeros(1) for i in range(5)} | {"weight": torch.zeros(2, 3)}
    with pytest.raises(UserError) as error:
        fit(linear, tensors, "it")
    message = "it does not fit the model: it lacks 'bias' and the model has no 'x0', 'x1', 'x2' and 2 more"
    assert str(error.value) == message


def test_nan_in_weights_names_the_tensor(linear: nn.Module) -> None:
    refuse_non_finite(linear, "it")
    linear.bias.data[1] = float("nan")
    with pytest.raises(UserError, match="the weights 'bias' hold NaN or infinity"):
        refuse_non_finite(linear, "it")


def test_the_digest_sees_every_bit_name_and_type(linear: nn.Module) -> None:
    before = digest(linear)
    assert digest(linear) == before
    linear.bias.data[0] = torch.nextafter(linear.bias.data[0], torch.tensor(9.0))
    changed = digest(linear)
    assert len({before, changed, digest(linear.to(torch.bfloat16)), digest(nn.Sequential(linear))}) == 4

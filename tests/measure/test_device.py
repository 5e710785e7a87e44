"""Which devices are there, whatever torch says of those that are not."""

from __future__ import annotations

import pytest
import torch

from diag.errors import UserError
from diag.measure.device import device_of


@pytest.mark.parametrize(
    "name", ["meta", "hpu", "privateuseone", "cuda:-1", "mkldnn", "cpu:5", "cpu:", "", "abacus"]
)
def test_a_device_that_cannot_be_measured_on_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"device '{name}' is not available") as caught:
        device_of(name)
    assert "--device" in str(caught.value.tip)


def test_the_cpu_has_one_name() -> None:
    assert device_of("cpu:0") == device_of("cpu") == torch.device("cpu")


def test_apples_gpu_is_taken_for_the_cpu_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))
    for name in ("mps", "mps:0"):
        assert device_of(name) == torch.device("cpu")
        assert capsys.readouterr().err == (
            f"--device {name}: it has no float64, in which tokens are summed; the CPU measures instead\n"
        )
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(UserError, match="device 'mps' is not available"):  # which is so here
        device_of("mps")

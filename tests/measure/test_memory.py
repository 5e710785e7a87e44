"""The predicted peak against a measured one, and what is read off a model's matrices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model

from diag.measure import memory
from diag.measure.memory import Widths, available, peak, predicted, resident, restart_peak

MEASURED = """
import json, os, sys, torch
from transformers import GPT2Config, GPT2LMHeadModel
from diag.measure.loop import measure
from diag.measure import memory
from diag.measure.memory import Widths, peak, predicted, resident, restart_peak
from diag.models.base import Batch, Sample, Tower
from diag.models.hooks.layers import attention_modules

torch.set_num_threads(1)

def measured(width, tokens, inputs):
    config = GPT2Config(
        n_positions=tokens, n_embd=width, n_layer=2, n_head=width // 64, vocab_size=2048, use_cache=False
    )
    config._attn_implementation = "sdpa"
    model = GPT2LMHeadModel(config).eval()
    data = torch.randint(0, 2048, (inputs, tokens))
    tower = Tower(
        "text", attention_modules(model), None, lambda samples: Batch(tuple(s.id for s in samples), data),
        lambda batch: model(batch.data),
    )
    cpu = torch.device("cpu")
    loaded = restart_peak(cpu)
    list(measure(tower, [Sample(str(i), lambda: None) for i in range(inputs)], batch_size=inputs))
    widths = Widths.of(model, tower.layers[0].module)
    found = predicted(widths, tokens=tokens, inputs=inputs, loaded=loaded, device=cpu, dtype=torch.float32)
    print(json.dumps([peak(cpu), found.peak, loaded]), flush=True)

for size in json.loads(sys.argv[1]):  # each in a process of its own, which holds nothing of another
    child = os.fork()
    if child == 0:
        measured(*size)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, size
"""

SIZES = [(256, 512, 1), (384, 2048, 2), (384, 8192, 1)]


@pytest.fixture(scope="module")
def peaks() -> dict[tuple[int, int, int], tuple[int, int, int]]:
    """Measured peak, predicted peak and what the model took, in bytes."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", MEASURED, json.dumps(SIZES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(zip(SIZES, map(json.loads, done.stdout.splitlines()[-len(SIZES) :]), strict=True))


@pytest.mark.parametrize("size", SIZES, ids=[f"{w} wide, {n} x {t}" for w, t, n in SIZES])
def test_the_predicted_peak_is_near_the_measured_one(
    size: tuple[int, int, int], peaks: dict[tuple[int, int, int], tuple[int, int, int]]
) -> None:
    measured, expected, loaded = peaks[size]
    assert loaded < measured
    assert abs(expected / measured - 1) < 0.3, (expected >> 20, measured >> 20, loaded >> 20)


def test_widths_are_read_off_the_matrices() -> None:
    model = GPT2Model(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    assert Widths.of(model, model.h[0].attn) == Widths(64, 64 + 2 * 256, 64, 64)

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(64, 96), nn.Linear(64, 24), nn.Linear(64, 24)
            self.out = nn.Linear(96, 64)

    attention = Grouped()
    whole = nn.Sequential(attention, nn.Linear(64, 512))
    assert Widths.of(whole, attention) == Widths(64, 64 + 2 * 512, 96, 24)


def test_memory_grows_with_tokens_and_inputs() -> None:
    widths = Widths(768, 768 + 2 * 3072, 768, 768)

    def found(tokens: int, inputs: int) -> int:
        sizes = {"tokens": tokens, "inputs": inputs, "loaded": 0}
        return predicted(widths, **sizes, device=torch.device("cpu"), dtype=torch.float32).forward

    assert found(2048, 1) == pytest.approx(2 * found(1024, 1))
    assert found(1024, 4) == pytest.approx(4 * found(1024, 1))


def test_what_is_held_and_what_is_left() -> None:
    cpu = torch.device("cpu")
    before = restart_peak(cpu)
    block = torch.ones(32 << 20)
    assert resident() - before > 100 << 20
    del block
    assert peak(cpu) - before > 100 << 20
    assert 0 < available(cpu) < 1 << 50


def test_memory_is_told_without_proc_and_without_resource(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS, which has no /proc, and on Windows, which has no `resource` either."""
    cpu, linux = torch.device("cpu"), (peak(torch.device("cpu")), available(torch.device("cpu")))
    monkeypatch.setattr(memory, "PROC", tmp_path)
    restart_peak(cpu)
    assert abs(available(cpu) - linux[1]) < 0.2 * linux[1]
    most = 3 << 30
    monkeypatch.setattr(memory.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=most))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak(cpu) == most  # which counts bytes
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak(cpu) == most << 10
    before = resident()
    block = torch.ones(32 << 20)
    assert resident() - before > 100 << 20
    del block
    monkeypatch.setattr(memory, "resource", None)
    told = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1 << 20, peak_wset=1 << 21))
    monkeypatch.setattr("psutil.Process", lambda: told)
    assert (resident(), peak(cpu)) == (1 << 20, 1 << 21)


def test_a_kernel_that_tells_less_is_asked_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("Name:\tpython\n")
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\n")
    monkeypatch.setattr(memory, "PROC", tmp_path)
    assert peak(torch.device("cpu")) > 1 << 20
    assert available(torch.device("cpu")) > 1 << 20

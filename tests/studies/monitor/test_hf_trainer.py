"""The monitor in transformers' `Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import diag
from diag.studies.monitor.hf_trainer import MonitorCallback
from diag.studies.monitor.monitor import DEFAULT_METRICS


class Texts(torch.utils.data.Dataset):
    """Sixteen texts of twelve tokens, some of them padded."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(50, (16, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = (torch.arange(12) < 12 - index % 3).long()
        labels = self.ids[index].masked_fill(mask == 0, -100)
        return {"input_ids": self.ids[index], "attention_mask": mask, "labels": labels}


class Listener(transformers.TrainerCallback):
    """Stands for an integration: it comes before callbacks that are added later, or after them."""

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        self.logs.append((state.global_step, dict(logs)))


def trainer(folder: Path, *callbacks: Any, **arguments: Any) -> transformers.Trainer:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=16, vocab_size=50)
    options = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=2,
        logging_steps=3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    model = transformers.GPT2LMHeadModel(config)
    return transformers.Trainer(model, options, train_dataset=Texts(), callbacks=list(callbacks))


def keys(metrics: tuple[str, ...] = DEFAULT_METRICS) -> set[str]:
    return {f"attnbias/{metric}/{which}" for metric in metrics for which in ("layer_00", "layer_01", "mean")}


def test_numbers_go_through_the_trainer_to_every_integration(tmp_path: Path) -> None:
    integration = Listener()
    run = trainer(tmp_path, integration)
    callback = diag.MonitorCallback(run.log, every=2)
    run.add_callback(callback)
    run.train()
    logged = {step: logs for step, logs in integration.logs if "attnbias/entropy/mean" in logs}
    assert list(logged) == [1, 2, 4]
    assert keys() <= logged[2].keys()
    entries = [entry for entry in run.state.log_history if "attnbias/entropy/mean" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 4]
    assert entries[1]["attnbias/entropy/mean"] == logged[2]["attnbias/entropy/mean"]
    assert callback.monitor is not None
    assert callback.monitor.history["step"].unique().tolist() == [1, 2, 4]
    assert not run.model._forward_pre_hooks
    assert any("loss" in entry for entry in run.state.log_history)


def test_without_a_trainer_numbers_join_its_next_logs(tmp_path: Path) -> None:
    later = Listener()
    run = trainer(tmp_path, MonitorCallback(every=4, metrics="entropy"), later)
    run.train()
    joined = {step: logs for step, logs in later.logs if "attnbias/entropy/mean" in logs}
    assert list(joined) == [3, 5]
    assert "loss" in joined[3]
    entries = [entry for entry in run.state.log_history if "attnbias/entropy/mean" in entry]
    assert [entry["step"] for entry in entries] == [1, 4]


def test_a_fixed_batch_is_measured_before_the_first_step_with_its_padding(tmp_path: Path) -> None:
    data = Texts()
    batch = {
        name: torch.stack([data[row][name] for row in range(6)]) for name in ("input_ids", "attention_mask")
    }
    run = trainer(tmp_path)
    before = diag.probe(run.model.eval(), [batch], metrics=["cos_y_vself"]).layers
    callback = MonitorCallback(run.log, batch=batch, every=5, metrics="cos_y_vself")
    run.add_callback(callback)
    run.train()
    assert callback.monitor is not None
    history = callback.monitor.history
    assert history["step"].unique().tolist() == [0, 5]
    assert history[history["step"] == 0]["value"].tolist() == pytest.approx(before["mean"].tolist())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_training_is_bit_identical(tmp_path: Path, accumulated: int) -> None:
    def weights(*callbacks: Any) -> list[Tensor]:
        run = trainer(tmp_path, *callbacks, gradient_accumulation_steps=accumulated)
        run.train()
        return list(run.model.state_dict().values())

    plain, monitored = weights(), weights(MonitorCallback(every=1))
    assert all(map(torch.equal, plain, monitored))

    class Drawing(transformers.TrainerCallback):
        """A negative control: one draw too many gives other dropout masks."""

        def on_step_end(self, *args: Any, **others: Any) -> None:
            torch.rand(1)

    assert not all(map(torch.equal, plain, weights(Drawing())))

"""The monitor as a callback of transformers' `Trainer`.

trainer = Trainer(model, arguments, train_dataset=data)
trainer.add_callback(diag.MonitorCallback(trainer.log, every=100))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from diag.studies.monitor.monitor import DEFAULT_METRICS, Monitor


class MonitorCallback(TrainerCallback):
    """Measures on due steps of `Trainer.train` and logs the numbers with the losses.

    log: where they go, `trainer.log`: into the state's history and to every integration (Weights & Biases,
        TensorBoard …). None where there is no trainer yet, `Trainer(callbacks=[…])`: they then go into the
        state's history at once, and into the trainer's next own `logs`, which callbacks after this one see
        (the printed line does, integrations do not).
    The others are those of `Monitor`. Steps are the trainer's `global_step`, measured after the update on
    the last micro-batch. The first measurement is at step 1; with a fixed batch at step 0, before training.

    monitor: the `Monitor`, with its history; None until training begins.

    Raises as `Monitor` does, when training begins. `torch_compile=True` needs a fixed batch.
    """

    def __init__(
        self,
        log: Callable[[dict[str, float]], None] | None = None,
        *,
        batch: Tensor | Mapping[str, Tensor] | None = None,
        every: int = 100,
        rows: int = 8,
        metrics: Sequence[str] = DEFAULT_METRICS,
        layers: Sequence[int] | None = None,
        prefix_tokens: int = 0,
    ) -> None:
        self.log = log
        self._attach = partial(
            Monitor,
            batch=batch,
            every=every,
            rows=rows,
            metrics=metrics,
            layers=layers,
            prefix_tokens=prefix_tokens,
        )
        self.monitor: Monitor | None = None
        self._waiting: dict[str, float] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **others: Any,
    ) -> None:
        assert model is not None
        self.monitor = self._attach(model)
        self._measure(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._measure(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **others: Any,
    ) -> None:
        """Puts numbers that wait into the trainer's own logs."""
        if logs is not None:
            logs.update(self._waiting)
            self._waiting = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        if self.monitor is not None:
            self.monitor.close()

    def _measure(self, state: TrainerState) -> None:
        assert self.monitor is not None
        numbers = self.monitor.step(state.global_step)
        if not numbers:
            return
        if self.log is not None:
            self.log(dict(numbers))
            return
        place: dict[str, Any] = {"epoch": state.epoch, "step": state.global_step}
        state.log_history.append(numbers | place)
        self._waiting |= numbers

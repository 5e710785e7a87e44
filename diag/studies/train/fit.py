"""The loop: batches → loss → AdamW, checkpointed so that a resumed run equals one that was never stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diag.errors import UserError
from diag.inputs.outside import reason
from diag.results.writing import atomically
from diag.studies.train.plan import Recipe

Batch = dict[str, Tensor]


def rate_at(recipe: Recipe, step: int) -> float:
    """Learning rate at `step`, counted from 0: linear warm-up, then half a cosine to 0."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def optimiser_of(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices, and not biases, gains and gates; gates have a rate of their own."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "gates": []}
    for name, parameter in model.named_parameters():
        vector = "gates" if ".change." in name else "vectors"
        groups["matrices" if parameter.ndim > 1 else vector].append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": found,
                "weight_decay": recipe.weight_decay if kind == "matrices" else 0.0,
                "scale": recipe.gate_rate if kind == "gates" else 1.0,
            }
            for kind, found in groups.items()
            if found
        ],
        betas=recipe.betas,
    )


@dataclass
class Training:
    """One model on its way: what a checkpoint holds.

    log: a row per step. watched: rows of what was measured on the way. seconds: spent in the loop.
    """

    model: nn.Module
    recipe: Recipe
    device: torch.device
    step: int = 0
    log: list[dict[str, float]] = field(default_factory=list)
    watched: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.optimiser = optimiser_of(self.model, self.recipe)
        decay = self.recipe.ema
        ema = None if decay is None else get_ema_multi_avg_fn(decay)
        self.average = None if ema is None else AveragedModel(self.model, multi_avg_fn=ema)

    @property
    def result(self) -> nn.Module:
        """What is kept: the moving average if there is one, else the model."""
        return self.model if self.average is None else self.average.module

    def run(
        self,
        batches: Iterable[Batch],
        loss_of: Callable[[nn.Module, Batch], Tensor],
        *,
        checkpoint: Path,
        watch: Callable[[int], list[dict[str, Any]]] = lambda step: [],
        advance: Callable[[int], object] = lambda steps: None,
    ) -> None:
        """Goes from `step` to the recipe's last step; `batches` begin at `step`.

        Raises UserError if the loss is not finite.
        """
        self.model.train()
        started = time.perf_counter()
        for batch in batches:
            self.watched += watch(self.step)
            self._update({name: tensor.to(self.device) for name, tensor in batch.items()}, loss_of)
            advance(1)
            if self.step % self.recipe.checkpoint_every == 0 or self.step == self.recipe.steps:
                self.seconds += time.perf_counter() - started
                self.save(checkpoint)
                started = time.perf_counter()
        if not self.watched or self.watched[-1]["step"] != self.step:  # else stopped after this, and resumed
            self.watched += watch(self.step)
            self.save(checkpoint)
        self.model.eval()

    def _update(self, batch: Batch, loss_of: Callable[[nn.Module, Batch], Tensor]) -> None:
        rate = rate_at(self.recipe, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        half = self.recipe.precision != "float32"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            loss = loss_of(self.model, batch)
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()} at step {self.step}", "lower the learning rate")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.log.append(
            {"step": self.step, "loss": loss.item(), "learning_rate": rate, "gradient_norm": norm.item()}
        )
        self.step += 1

    def save(self, file: Path) -> None:
        """Writes everything that the rest of the run depends on, atomically."""
        document = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "log": self.log,
            "watched": self.watched,
            "seconds": self.seconds,
        }
        atomically(file, lambda temporary: torch.save(document, temporary))

    def resume(self, file: Path) -> None:
        """Continues from a checkpoint, generators included. Raises UserError where it cannot be read."""
        try:
            self._take_up(torch.load(file, map_location="cpu", weights_only=True))
        except (MemoryError, torch.OutOfMemoryError):
            raise  # the file is as it should be
        except OSError as error:
            raise UserError(
                f"cannot read checkpoint '{file}': {reason(error)}", "make it readable"
            ) from error
        except Exception as error:  # of a damaged file torch raises nearly anything, here or as it is fitted
            raise UserError(
                f"checkpoint '{file}' cannot be read: {reason(error)}",
                f"rm '{file}', then run the same command again: it trains this cell from the beginning",
            ) from error

    def _take_up(self, document: Any) -> None:
        steps, log, watched = document["step"], document["log"], document["watched"]
        if not (type(steps) is int and 0 <= steps <= self.recipe.steps):
            raise ValueError(f"'step' is {steps!r:.60}")
        if not all(isinstance(rows, list) and {*map(type, rows)} <= {dict} for rows in (log, watched)):
            raise ValueError("'log' or 'watched' is no list of rows")
        self.step, self.seconds, self.log, self.watched = steps, float(document["seconds"]), log, watched
        self.model.load_state_dict(document["model"])
        self.optimiser.load_state_dict(document["optimiser"])
        if self.average is not None:
            self.average.load_state_dict(document["average"])
        torch.set_rng_state(document["generator"])
        if document["cuda_generator"]:
            torch.cuda.set_rng_state_all(document["cuda_generator"])

"""The measurements while a model is being trained, in anyone's own loop.

    monitor = diag.Monitor(model, every=100)
    for step, batch in enumerate(loader):
        loss = model(batch) …
        if numbers := monitor.step(step):
            logger.log(numbers, step=step)

Training with a monitor is the same, bit for bit, as training without it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diag.attention.call import AttentionCall
from diag.errors import UserError
from diag.measure.loop import measure, pick_layers
from diag.metrics.catalogue import RATIOS
from diag.metrics.divergence import DIVERGENCE_METRICS
from diag.metrics.names import metric_names
from diag.metrics.sink_events import OF_PROJECTION
from diag.metrics.stream import STREAM_METRICS
from diag.models.base import Batch, Sample, Tower, device_of_module
from diag.models.by_size import BySize
from diag.models.families.from_module import TOWER, another
from diag.models.hooks.block_parts import find_blocks, understood_blocks
from diag.models.hooks.content import OTHERWISE
from diag.models.hooks.depth import Place
from diag.models.hooks.layers import Layer
from diag.models.hooks.meaning import Meaning, meaning_of
from diag.models.hooks.other_inputs import are_ids
from diag.models.hooks.seam import OnCall, attention_calls
from diag.results.layer_values import LayerValues
from diag.studies.monitor.training_pass import (
    Given,
    InputRecorder,
    Precision,
    fixed,
    precision,
    untouched,
    unwrapped,
)

DEFAULT_METRICS = ("cos_y_vself", "excess", "value_similarity", "entropy", "self_weight")


class Monitor:
    """Watches the attention layers of a model that is being trained.

    model: an `nn.Module` that uses PyTorch attention, on the CPU or a CUDA device; one wrapped in
        DistributedDataParallel or `torch.compile` is measured unwrapped. Give the object that your loop
        calls, or a part that runs through its `forward` (a CLIP's `visual`).
    batch: what is measured every time: a tensor, or a dict of tensors given by name, one input per row.
        Without one, the inputs of the due step itself, as the model was given them.
    every: steps that are multiples of it are due.
    rows: the most inputs of a training batch that are measured; a fixed batch is measured whole.
    metrics: names and groups as in `diag.probe`; all but the divergence metrics, which need a second image.
    layers: the model's own numbers, -1 for its last; all if None. prefix: what the keys begin with.
    prefix_tokens: leading tokens (class token, registers) that do not count; attention itself runs over them.

    Numbers are those of `diag.probe` on the same inputs and weights: the mean over heads within each input,
    then over inputs. For a model with an attention variant (`diag.variants`), y is what attention gives,
    before the variant changes it. Padding (`attention_mask`) does not count. Layers are found at the first
    measurement; `layers` and `history` are empty until then.

    Measuring is one forward pass in evaluation mode without gradients, with the weights of that moment, under
    the autocast that the inputs were trained under (a fixed batch: that around `step`). It happens in `step`,
    in process 0 alone, without communication.

    Raises UserError for unknown metrics, layers or batches and for models that are spread over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Tensor | Mapping[str, Tensor] | None = None,
        *,
        every: int = 100,
        rows: int = 8,
        metrics: Sequence[str] = DEFAULT_METRICS,
        layers: Sequence[int] | None = None,
        prefix_tokens: int = 0,
        prefix: str = "attnbias",
    ) -> None:
        for name, number in (("every", every), ("rows", rows)):
            if number < 1:
                raise UserError(f"{name}={number}", f"{name} is a positive number")
        self.every, self.prefix = every, prefix
        self.metrics = tuple(metric_names([metrics] if isinstance(metrics, str) else metrics))
        for metric in self.metrics:
            if metric in DIVERGENCE_METRICS:
                raise UserError(f"'{metric}' needs a neutral image", "measure it with attnbias probe")
        self.module = unwrapped(model)
        self._outside = model
        self._fixed = None if batch is None else fixed(batch)
        self._chosen, self._prefix_tokens = layers, prefix_tokens
        self._ear = InputRecorder(rows)
        self._hook: RemovableHandle | None = None
        self._tower: Tower | None = None
        self._rows: list[tuple[int, int, str, float]] = []
        self._last: int | None = None
        self._due = 0
        self._missed = False
        self._listen(True)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that are measured, with their paths, in order of first call; empty before that."""
        tower = self._tower
        return () if tower is None else tuple(pick_layers(tower.layers, self._chosen, tower.places))

    @property
    def history(self) -> pd.DataFrame:
        """All that was measured, long-form: step, layer, metric, value. Undefined numbers are left out."""
        return pd.DataFrame(self._rows, columns=["step", "layer", "metric", "value"])

    def step(self, step: int) -> dict[str, float]:
        """Told after each step's forward pass; the numbers of a due step, else an empty dict.

        The keys are `prefix/metric/layer_NN` and, over the measured layers, `prefix/metric/mean`. If nothing
        was given to the model before a due step, the next one stands in for it.

        Raises MeasurementError and UserError, naming the layer, where attention cannot be seen or measured,
        on the first measurement; later ones that fail are warned of, and training goes on. Raises UserError
        if the model's forward was not called between two steps.
        """
        if _rank():
            self.close()
            return {}
        stride = 1 if self._last is None else max(1, step - self._last)
        if self._last is None or step < self._last:
            self._due = math.ceil(step / self.every) * self.every
        self._last = step
        numbers = self._due_numbers(step) if step >= self._due else {}
        self._listen(step + stride >= self._due)
        return numbers

    def measure(self, step: int) -> dict[str, float]:
        """Measures now, due or not: the fixed batch, or the inputs that were last heard.

        Raises as `step` does on its first measurement.
        """
        given = self._fixed or self._ear.heard
        if given is None:
            raise self._unheard()
        device = device_of_module(self.module)
        given = replace(given.on(device), precision=given.precision or Precision.now(device))
        of_stream = not STREAM_METRICS.keys().isdisjoint(self.metrics)
        blocks = find_blocks if of_stream else understood_blocks
        needs_blocks = of_stream or not set(OF_PROJECTION).isdisjoint(self.metrics)
        needed = dict.fromkeys(part for name in self.metrics for part in RATIOS.get(name, (name,)))
        with untouched(self.module):
            tower = self._tower_for(given)
            found = next(
                measure(
                    tower,
                    [Sample("batch", lambda: given)],
                    metrics=list(needed),
                    layers=self._chosen,
                    blocks=blocks(self.module, self.layers) if needs_blocks else (),
                    batch_size=1,
                )
            )
        return self._kept(step, found)

    def close(self) -> None:
        """Takes the hook off the model; the history stays."""
        self._listen(False)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _due_numbers(self, step: int) -> dict[str, float]:
        if self._fixed is None and self._ear.heard is None:
            if self._missed:
                raise self._unheard()
            self._missed = True  # step() before the first forward pass, or steps of another stride
            return {}
        self._missed = False
        self._due = (step // self.every + 1) * self.every
        try:
            return self.measure(step)
        except (UserError, RuntimeError) as error:  # RuntimeError: memory that ran out, another input's shape
            if not self._rows:
                raise
            warnings.warn(f"step {step} was not measured: {error}", stacklevel=3)
            return {}

    def _listen(self, on: bool) -> None:
        """Hooks the ear on for the next forward pass, or off."""
        on = on and self._fixed is None
        if on and self._hook is None:
            self._ear.heard = None
            self._hook = self._outside.register_forward_pre_hook(self._ear, prepend=True, with_kwargs=True)
        elif not on and self._hook is not None:
            self._hook.remove()
            self._hook, self._ear.heard = None, None

    def _unheard(self) -> UserError:
        return UserError(
            f"no forward pass with gradients of the monitored {type(self._outside).__name__} was seen",
            "call the very object that was given to Monitor, or give a fixed batch: Monitor(model, batch)",
        )

    def _tower_for(self, given: Given) -> Tower:
        if self._tower is None:
            found = _meaning(self.module, given)
            layers, places = _layers_of(found)
            pick_layers(layers, self._chosen, places)
            sizes = BySize(found.towers, _encoded([Sample.holding("", given)]), tensors=Given.tensors)

            def look_again(group: Sequence[Sample]) -> None:
                sizes.keep(_encoded(group), _meaning(self.module, group[0].read()))

            # leading tokens are told apart in a vision tower only
            name, leading = ("vision", ("cls",) * self._prefix_tokens) if self._prefix_tokens else (TOWER, ())
            self._tower = Tower(
                name,
                layers,
                lambda inputs, seq_len: iter(()),
                lambda group: sizes.sized(_encoded(group)),
                lambda batch: _run(self.module, batch.data),
                prefix=leading,
                max_batch=1,
                places=places,
                capture=_captured,
                look_again=look_again,
            )
        return self._tower

    def _kept(self, step: int, found: Sequence[LayerValues]) -> dict[str, float]:
        """One batch's numbers into the history, and as a logger takes them."""
        inputs: dict[int, dict[str, np.ndarray]] = {}  # layer -> metric -> [input]
        for one in found:
            means = zip(one.metrics, _mean(one.values[0]), strict=True)
            inputs.setdefault(one.layer, {}).update(means)
        width = max(2, len(str(max(inputs))))
        numbers: dict[str, float] = {}
        for metric in self.metrics:
            values = {layer: _over_inputs(metric, inputs[layer]) for layer in sorted(inputs)}
            values = {layer: value for layer, value in values.items() if not math.isnan(value)}
            for layer, value in values.items():
                self._rows.append((step, layer, metric, value))
                numbers[f"{self.prefix}/{metric}/layer_{layer:0{width}}"] = value
            if values:
                numbers[f"{self.prefix}/{metric}/mean"] = sum(values.values()) / len(values)
        return numbers


def _meaning(module: nn.Module, given: Given) -> Meaning:
    """What the calls of a pass mean.

    Raises UserError where it is not clear whose rows those of a call are. Warns of a module that draws at
    random in evaluation mode, too.
    """
    found = meaning_of(
        module,
        lambda data: _run(module, data),
        given,
        given.with_first(another),
        inputs=given.rows,
        everywhere=not given.any(are_ids),
    )
    if found.random:
        name = type(module).__name__
        warnings.warn(f"{name} draws at random in evaluation mode, too: its numbers vary", stacklevel=2)
    elif found.rows == OTHERWISE:
        raise UserError(
            f"the rows of {type(module).__name__}'s attention calls are not those of its inputs",
            "measure it with diag.probe, which takes inputs one by one",
        )
    return found


def _layers_of(found: Meaning) -> tuple[tuple[Layer, ...], tuple[Place, ...]]:
    """The layers that a pass runs through, and all places; towers follow each other, numbered through."""
    layers, places = list[Layer](), list[Place]()
    for tower in found.towers:
        before = len(places)
        layers += [replace(layer, index=before + layer.index) for layer in tower.layers]
        places += [replace(place, index=before + place.index) for place in tower.places]
    return tuple(layers), tuple(places)


def _run(module: nn.Module, given: Given) -> Any:
    """One forward pass, not in inference mode: what a module keeps from that cannot be used in training."""
    device = device_of_module(module)
    autocast = given.precision or Precision.now(device)
    with torch.inference_mode(False), torch.no_grad(), precision(device, autocast):
        return given.call(module)


def _encoded(group: Sequence[Sample]) -> Batch:
    (sample,) = group
    given = sample.read()
    return Batch(tuple(f"{row:06d}" for row in range(given.rows)), given, given.real)


def _captured(layers: Sequence[Layer], on_call: OnCall) -> AbstractContextManager[Any]:
    """As `attention_calls`, the statistics in full precision also under autocast."""

    def in_full_precision(call: AttentionCall) -> Tensor | None:
        with torch.autocast(call.output.device.type, enabled=False):
            return on_call(call)

    return attention_calls(layers, in_full_precision)


def _over_inputs(metric: str, inputs: Mapping[str, np.ndarray]) -> float:
    """The mean over inputs, of a ratio the ratio of the means; NaN where the layer has no such number."""
    if metric in RATIOS:
        above, below = (inputs[part] for part in RATIOS[metric])
        both = ~np.isnan(above) & ~np.isnan(below)
        total = below[both].sum()
        return float(above[both].sum() / total) if total else math.nan
    return float(_mean(inputs[metric])) if metric in inputs else math.nan


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is defined; NaN where nothing is."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0.0).sum(-1) / defined.sum(-1)


def _rank() -> int:
    """The number of this process among those that train together; 0 if it is alone."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0

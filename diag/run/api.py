"""The same measurements from Python, in memory: `diag.probe` and `diag.capture`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.errors import UserError
from diag.inputs.given import as_inputs
from diag.inputs.items import Inputs
from diag.measure import loop as measure
from diag.measure.batch_readings import Incidents
from diag.measure.device import device_of, dtype_of
from diag.measure.meaning import understood
from diag.models import load
from diag.models.base import Model, Sample, Tower
from diag.models.families.from_module import from_module
from diag.models.names.resolve import parse
from diag.models.untrained import reinitialised, untrained_twin
from diag.results.tables import samples_frame, tables
from diag.results.untrained import beside
from diag.run import shards
from diag.run.plan import ProbePlan
from diag.run.prepared import Measurement
from diag.variants import variants_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Probe:
    """What was measured.

    layers: one row per (model, tower, layer, tokens, metric): mean over heads within each input, then
        mean, std, 95 % bootstrap interval and n over inputs.
    heads: the same per head. samples: one value per input, layer, head and metric.
    failed: inputs that could not be read, or gave values that are not finite, with the reason.
    skipped: layers that are not measured, by path, with the reason.
    depths: how many layers each tower has, also where only some are measured.
    meaning: what was found about the calls of each tower: whose their rows are, whether the model is random …
    """

    layers: pd.DataFrame
    heads: pd.DataFrame
    samples: pd.DataFrame
    failed: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    meaning: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)

    def plot(self) -> dict[str, Figure]:
        """The figures of a run folder, by name: curves per layer and layer × head maps."""
        from diag.show.figures import draw_run

        lines = self.layers[["model", "tower"]].drop_duplicates().itertuples(index=False)
        depths = {(model, tower): self.depths[tower] for model, tower in lines if tower in self.depths}
        return {name: figure for name, (figure, _) in draw_run(self.layers, self.heads, depths).items()}


def probe(
    model: str | nn.Module,
    inputs: Any,
    *,
    metrics: Sequence[str] | None = None,
    tokens: Sequence[str] | None = None,
    layers: Sequence[int] | str | None = None,
    values: str = "as_computed",
    intervene: Sequence[str] = (),
    null: str | None = None,
    limit: int = 64,
    seq_len: int | None = None,
    batch_size: int = 8,
    exact: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
    allow_random: bool = False,
) -> Probe:
    """Measures a named model on images or texts, or your own module on ready batches.

    model: a name as on the command line, or an `nn.Module` that uses PyTorch attention.
    inputs: for a name, a folder, a file, "demo", `diag.images(…)`, `diag.texts(…)`, or a list of PIL
        images, of paths of images (`pathlib`), or of strings; for a model of videos, a folder of frames for
        each clip, or a list of lists of PIL images. For a module, an iterable of batches, each a
        tensor or a dict of tensors that the module takes; every row of a batch is one input. A module runs
        where it is, as it is.
    metrics, tokens, layers: names, token sets, and the model's own numbers of layers, where -1 or "last" is
        its last; defaults are the `default` group, the tower's default token sets, and all layers.
    values: "as_computed", or "bias_free": without the constant that biases add to every value.
    batch_size: inputs per forward pass; 0 for as many as memory allows.
    exact: compute every query row, also beyond 2,048 tokens (docs/metrics.md, Sampled rows).
    intervene: what is done to attention, as on the command line: "xsa:8-11", "gated_xsa=0.5".
    null: "untrained", or "untrained=5": beside the model, three (or five) of its architecture with fresh
        weights (docs/nulls.md). A module is initialised by the `reset_parameters` and `init_weights` that its
        parts have; where these leave a parameter, it is refused, by its name.
    allow_random: measure also what is in training mode, or gives other numbers for the same input.

    Raises UserError for what you can mend, MeasurementError (a UserError) where a layer cannot be seen.

    >>> run = probe("demo:vit-p16", "demo", limit=2, metrics=["cos_y_vself"])
    >>> len(run.layers)
    6
    """
    plan = ProbePlan.checked(
        models=(model if isinstance(model, str) else type(model).__name__,),
        metrics=_listed(metrics),
        tokens=_listed(tokens),
        layers=_listed(layers),
        values=values,
        intervene=_listed(intervene),
        null=null,
        limit=limit,
        seq_len=seq_len,
        batch_size=batch_size,
        exact=exact,
        device=device,
        dtype=dtype,
        seed=seed,
        allow_random=allow_random,
    )
    measurement = Measurement.of(plan)
    if plan.seeds and isinstance(inputs, Iterator):
        inputs = list(inputs)  # every twin is given all of them
    loaded, towers, samples = _prepare(model, inputs, plan)
    twins = list[dict[str, pd.DataFrame]]()
    for seed in range(plan.seeds):
        twin = _prepare(_twin(model, loaded, plan, seed), inputs, plan)
        twins.append(_frames(*twin, measurement.of_untrained(), Incidents(), {}))
    incidents, skipped = Incidents(), dict[str, str]()
    of_towers = _frames(loaded, towers, samples, measurement, incidents, skipped)
    frames = [
        beside(frame, [twin[name] for twin in twins]) if twins else frame for name, frame in of_towers.items()
    ]
    if not frames:
        reason = next(iter(incidents.failed.values()), "there is none")
        raise UserError(f"no input could be read: {reason}", "give images in JPEG, PNG or WebP")
    frame = pd.concat(frames, ignore_index=True)
    if frame["value"].isna().all():
        count = int(frame["n_tokens"].max())
        raise UserError(
            f"none of the metrics has a number ({count} token{'' if count == 1 else 's'} per input)",
            "give inputs of more tokens, or other tokens= or metrics=; one alone has nothing to measure",
        )
    meaning = {tower.name: tower.meaning for tower in towers}
    depths = {tower.name: tower.depth for tower in towers}
    return Probe(*tables(frame, seed=seed), frame, incidents.failed, skipped, meaning, depths)


def capture(
    model: str | nn.Module,
    batch: Any,
    *,
    layers: Sequence[int] | str | None = None,
    limit: int = 64,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> list[AttentionCall]:
    """The attention calls of one forward pass, in order: queries, keys, values, output, mask and scale.

    batch: for a name, images or strings as in `probe`, the first `limit` of them in one forward pass;
        for a module, a tensor or a dict of tensors, whole.
    `diag.pattern_rows(call, rows)` gives attention weights of chosen query rows, or all of them.

    Raises UserError as `probe` does, and for more inputs than the model takes at once.
    """
    own_module = isinstance(model, nn.Module)
    plan = ProbePlan.checked(
        models=(type(model).__name__ if own_module else model,),
        layers=_listed(layers),
        limit=sys.maxsize if own_module else limit,
        seq_len=seq_len,
        device=device,
        dtype=dtype,
    )
    _, towers, samples = _prepare(model, [batch] if own_module else batch, plan, apart=False)
    calls = list[AttentionCall]()
    for tower in towers:
        if tower.max_batch is not None and len(samples) > tower.max_batch:
            raise UserError(
                f"'{model}' takes {tower.max_batch} input at once, {len(samples)} were given",
                f"limit={tower.max_batch}, or diag.probe for all of them",
            )
        calls += measure.capture(tower, tower.encode(samples), plan.layers)
    return calls


def _frames(
    loaded: Model,
    towers: Sequence[Tower],
    samples: Sequence[Sample],
    measurement: Measurement,
    incidents: Incidents,
    skipped: dict[str, str],
) -> dict[str, pd.DataFrame]:
    """Samples by tower, of those that have any. incidents, skipped: what happened is added to them."""
    frames = {}
    for tower in towers:
        job = shards.TowerJob.of(loaded, tower, measurement)
        if found := list(shards.shard_values(job, samples, incidents)):
            frames[tower.name] = samples_frame(found, measurement.ratios, job.constants)
        skipped |= incidents.skipped_layers
    return frames


def _twin(model: str | nn.Module, loaded: Model, plan: ProbePlan, seed: int) -> nn.Module | Model:
    """An untrained twin of a model. Raises UserError where none can be made."""
    if isinstance(model, nn.Module):
        return reinitialised(model, seed)
    where: dict[str, Any] = {"device": device_of(plan.device), "dtype": dtype_of(plan.dtype)}
    return untrained_twin(parse(model), seed, variants_in(loaded.module), **where)


def _prepare(
    model: str | nn.Module | Model, inputs: Any, plan: ProbePlan, *, apart: bool = True
) -> tuple[Model, Sequence[Tower], Sequence[Sample]]:
    """The model, the towers that take the inputs, and these. apart: as in `from_module`."""
    if isinstance(model, nn.Module):
        if isinstance(inputs, Tensor | Mapping):
            # a loop over it would take rows for batches, and tokens for inputs
            raise UserError(
                f"one batch was given (a {type(inputs).__name__}), where several are due",
                "pass a list of batches, also where it is one: [batch]",
            )
        return from_module(model, inputs, plan.limit, allow_random=plan.allow_random, apart=apart)
    if not isinstance(model, str | Model):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UserError(f"the model is {what}", "give its name as text, or an nn.Module that is built")
    where: dict[str, Any] = {"device": device_of(plan.device), "dtype": dtype_of(plan.dtype)}
    loaded = model if isinstance(model, Model) else load(parse(model), **where)
    kind = next(iter(loaded.towers))
    if isinstance(inputs, Inputs):
        kind = inputs.tower
    elif isinstance(inputs, Iterable) and not isinstance(inputs, str | Path | Mapping):
        inputs = list(inputs)
        kind = "text" if inputs and isinstance(inputs[0], str) else "vision"
    tower = next(iter(loaded.takers(kind, plan.tokens)), None) or loaded.tower(kind)
    samples = shards.tower_samples(tower, as_inputs(inputs, kind), limit=plan.limit, seq_len=plan.seq_len)
    return loaded, [understood(loaded, tower, samples, allow_random=plan.allow_random)], samples


def _listed(given: Any) -> tuple[Any, ...] | None:
    """What is no list is a list of one: a name, an index, or what the plan will refuse."""
    if given is None:
        return None
    return (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)

"""The measuring side: each model is loaded, sees the one input once, and one row of one layer is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.errors import UnreadableInput, UserError
from diag.inputs.items import Inputs, Item
from diag.measure.device import device_of, dtype_of
from diag.measure.loop import capture
from diag.measure.meaning import understood
from diag.models import load
from diag.models.base import Batch, Model, Sample, Tower
from diag.models.hooks.layers import Layer
from diag.models.layer_numbers import own_numbers
from diag.models.names.spec import ModelSpec
from diag.results.caveats import columns_of
from diag.results.looks import MEAN, NUMBERS
from diag.results.writing import file_stem
from diag.run.plan import specs_of
from diag.run.progress import Listener, Silent
from diag.studies.attend.agreements import agreement_of
from diag.studies.attend.folder import TOKEN_TYPES, Attended
from diag.studies.attend.gaze import LANGUAGE, grid_of, maps_of, questioned, shown
from diag.studies.attend.grid import MIDDLE, Grid, Point
from diag.studies.attend.plan import IMAGE_TIP, AttendPlan
from diag.studies.attend.row import TokenRow, row_of
from diag.studies.attend.saliency import explained_of


@dataclass(frozen=True)
class _Target:
    """Where the target is among the tokens, and what the tokens are.

    places: kind, row, col and text of every token. facts: what the manifest says about it.
    """

    position: int
    places: pd.DataFrame
    facts: dict[str, Any]
    picture: np.ndarray | None = None
    point: Point | None = None


@dataclass(frozen=True)
class _View:
    """One model's part of the answer. entry: what the manifest says. agreement, gaze: where asked for."""

    tokens: pd.DataFrame
    decomposition: pd.DataFrame
    target: _Target
    entry: dict[str, Any]
    agreement: pd.DataFrame | None = None
    gaze: pd.DataFrame | None = None


def measure_models(
    plan: AttendPlan, listener: Listener | None = None, *, given: Inputs | None = None
) -> Attended:
    """Carries out a plan, one model at a time. Raises UserError as `diag.studies.attend.attend` does.

    given: the plan's input, where it was read already.
    """
    listener = listener or Silent()
    specs = specs_of(plan.probe_plan())
    given = _in_memory(given or plan.inputs())
    device, dtype = device_of(plan.device), dtype_of(plan.dtype)
    views: list[_View] = []
    failed: dict[str, str] = {}
    for number, spec in enumerate(specs):
        point = views[0].target.point if views else None
        listener.start(spec.given, 1)
        try:
            # no name for the model here: the next one is loaded when it is gone
            views.append(
                _view(plan, spec, load(spec, device=device, dtype=dtype), number, given, point, listener)
            )
        except UserError as error:
            if number == 0:
                raise
            failed[spec.given] = str(error)
            listener.say(f"{spec.given} failed: {error}")
        listener.advance(1)
    agreed = [view.agreement for view in views if view.agreement is not None]
    looks = [view.gaze for view in views if view.gaze is not None]
    return Attended(
        pd.concat([view.tokens for view in views], ignore_index=True).astype(TOKEN_TYPES),
        pd.concat([view.decomposition for view in views], ignore_index=True),
        {view.entry["given"]: view.target.picture for view in views if view.target.picture is not None},
        [view.entry for view in views],
        failed,
        given,
        pd.concat(agreed, ignore_index=True) if agreed else None,
        pd.concat(looks, ignore_index=True) if looks else None,
    )


def _view(
    plan: AttendPlan,
    spec: ModelSpec,
    model: Model,
    number: int,
    given: Inputs,
    point: Point | None,
    listener: Listener,
) -> _View:
    for note in (f"{spec.given} → {model.resolved}", *model.notes):
        listener.say(note)
    tower = _tower(model, plan.tower) if plan.question is None else questioned(model, plan.question)
    if plan.image is not None:
        sample = next(tower.samples(given, None))
    else:
        sample = _window(model, tower, given, plan.seq_len, listener)
    tower = understood(model, tower, [sample])
    layer = chosen_layer(model, tower, plan.layer, plan.depth)
    batch = tower.encode([sample])
    call = _one_call(tower, layer, batch)
    among = None
    if plan.question is not None:
        target, among = _in_question(plan, model, tower, batch, sample), torch.ones(call.tokens).bool()
    elif plan.image is not None:
        target = _in_image(plan, model, tower, batch, call, point)
    else:
        target = _in_text(plan, model, tower, batch)
    among = tower.tokens_in(tower.token_sets[0], call.tokens) if among is None else among
    row = row_of(call, target.position, among)
    same = {"input": sample.id, "model": spec.given, "tower": tower.name, "layer": layer.index}
    caveated = columns_of(model.facts, tower.facts)
    entry: dict[str, Any] = {
        **dict(model.facts),
        **dict(tower.facts),
        **caveated,
        "given": spec.given,
        "resolved": model.resolved,
        "family": model.family,
        **same,
        "module": layer.path,
        "n_layers": tower.depth,
        "heads": call.heads,
        "kv_heads": call.kv_heads,
        "n_tokens": call.tokens,
        "gate_error": row.gate_error,
        "notes": list(model.notes),
        **target.facts,
    }
    if target.picture is not None:
        entry["picture"] = f"pictures/{number:02d}-{file_stem(spec.given)}.png"
        if target.facts.get("picture_note"):
            listener.say(f"{spec.given}: {target.facts['picture_note']}")
    head = chosen_head(plan.head, call, model)
    tables = (_tokens(row, head, target, same), _decomposition(row, same))
    tokens, decomposition = (table.assign(**caveated, inputs="given") for table in tables)
    agreed = None
    if plan.saliency:
        explained, entry["explained"] = explained_of(model, tower, batch)
        agreed = agreement_of(model.module, tower, batch, explained)
        agreed = agreed.assign(input=sample.id, model=spec.given, **caveated)
    gaze = None
    if plan.question is not None:
        entry["general"] = plan.general or model.towers[LANGUAGE].facts["prompt"]
        gaze = maps_of(model, tower, batch, sample, entry["general"], head)
        places = target.places[target.places["kind"] == "image"].reset_index(drop=True)
        gaze = gaze.join(places[["row", "col"]], on="token").astype({"row": "Int64", "col": "Int64"})
        gaze = gaze.assign(
            input=sample.id, model=spec.given, head=MEAN if head is None else str(head), **caveated
        )
    return _View(tokens, decomposition, target, entry, agreed, gaze)


def _in_image(
    plan: AttendPlan, model: Model, tower: Tower, batch: Batch, call: AttentionCall, point: Point | None
) -> _Target:
    """The target patch: as the plan names it, or the one at another model's `point`."""
    grid = _grid(model, tower, batch, call)
    if point is None:
        point = MIDDLE if plan.pixel is None else grid.at_pixel(plan.pixel)
        point = point if plan.patch is None else grid.centre(plan.patch)
    row, column = grid.patch_at(point)
    picture, note = picture_of(
        batch.data[0, :, : grid.height, : grid.width], tower.facts.get("preprocessing") or {}
    )
    facts = {"grid": [grid.rows, grid.columns], "target": [row, column], "picture_note": note}
    position = len(tower.prefix) + row * grid.columns + column
    return _Target(position, _patches(tower, grid), facts, picture, point)


def _in_text(plan: AttendPlan, model: Model, tower: Tower, batch: Batch) -> _Target:
    assert tower.token_text is not None
    ids = [int(i) for i in batch.data[0]]
    position = _position(plan.token or 0, len(ids), model)
    texts = [tower.token_text(i) for i in ids]
    places = pd.DataFrame({"kind": "text", "row": None, "col": None, "text": texts})
    return _Target(position, places, {"target": position, "target_text": texts[position]})


def _in_question(plan: AttendPlan, model: Model, tower: Tower, batch: Batch, sample: Sample) -> _Target:
    """The last token of image and question, or the one that the plan names."""
    assert tower.token_text is not None
    ids = [int(i) for i in batch.data["input_ids"][0]]
    position = _position(-1 if plan.token is None else plan.token, len(ids), model)
    texts = [tower.token_text(i) for i in ids]
    of_image, grid = batch.sets["image"][0].cpu().numpy(), grid_of(tower, batch)
    places = pd.DataFrame(
        {"kind": np.where(of_image, "image", "text"), "row": None, "col": None, "text": texts}
    )
    places.loc[of_image, "text"] = None
    if grid is not None:
        rows, columns = np.indices(grid).reshape(2, -1)
        places.loc[of_image, "row"], places.loc[of_image, "col"] = rows, columns
    pixels = batch.data.get("pixel_values")
    seen = pixels[0] if isinstance(pixels, Tensor) and pixels.ndim == 4 and len(pixels) == 1 else None
    picture = shown(sample.read()) if seen is None else picture_of(seen, _preprocessing(model))[0]
    facts = {"target": position, "target_text": texts[position], "grid": grid and list(grid)}
    return _Target(position, places, facts | {"question": plan.question}, picture)


def _preprocessing(model: Model) -> Mapping[str, Any]:
    """What was done to the image before the language model saw it."""
    vision = model.towers.get("vision")
    return {} if vision is None else vision.facts.get("preprocessing") or {}


def chosen_layer(model: Model, tower: Tower, layer: int | None, depth: float | None) -> Layer:
    """The layer with the model's own number, negative from its last, or the one that is nearest to a relative
    depth among those with attention weights on their own tokens; of two the deeper.

    Raises UserError for a layer that is not there or not measured.
    """
    if layer is not None:
        before, missing = f"'{model.name}': ", f"it has no layer {{}} in its {tower.name} tower"
        (number,) = own_numbers([layer], tower.layers, tower.places, before=before, missing=missing)
        return next(each for each in tower.layers if each.index == number)
    assert depth is not None
    deepest = max(len(tower.places), *(each.index + 1 for each in tower.layers)) - 1
    forms = [(each, each.form) for each in tower.layers]
    weighed = [
        each for each, form in forms if form.mixer == "softmax" and form.keys_of == "own"
    ] or tower.layers
    return min(weighed, key=lambda each: (abs(each.index - depth * deepest), -each.index))


def chosen_head(head: int | None, call: AttentionCall, model: Model) -> int | None:
    """The head, or None for all. Raises UserError with the range."""
    if head is None or 0 <= head < call.heads:
        return head
    raise UserError(
        f"'{model.name}' has no head {head} in layer {call.layer}",
        f"heads are 0 to {call.heads - 1}; without --head it is the mean over heads",
    )


def picture_of(pixels: Tensor, preprocessing: Mapping[str, Any]) -> tuple[np.ndarray, str | None]:
    """The image that a model sees, `[height, width, 3]` of uint8, from its input `[channel, height, width]`.

    Normalisation is undone with the mean and standard deviation of the preprocessing; without these,
    pixels are taken as they are if they lie in 0…1, else stretched over their range, with a note.
    """
    values = pixels.detach().float().cpu()
    if values.shape[0] == 1:
        values = values.expand(3, -1, -1)
    mean, std = preprocessing.get("mean"), preprocessing.get("std")
    note = None
    if mean is not None and std is not None:
        std, mean = (torch.tensor(part, dtype=values.dtype).view(-1, 1, 1) for part in (std, mean))
        values = values * std + mean
    elif values.min() < 0 or values.max() > 1:
        low, high = values.min(), values.max()
        values = (values - low) / (high - low).clamp(min=1e-9)
        note = "the preprocessing has no mean and std: the picture's brightness is stretched over its range"
    return (values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy(), note


def _in_memory(given: Inputs) -> Inputs:
    """The input, read once. Raises UserError if it cannot be read."""
    try:
        items = [Item(item.id, partial(lambda content: content, item.read())) for item in given]
    except UnreadableInput as error:
        raise UserError(str(error), IMAGE_TIP) from error
    return Inputs(given.kind, given.source, items, given.digest, given.stamp)


def _tower(model: Model, kind: str) -> Tower:
    if kind in model.towers:
        if model.towers[kind].frames is not None:
            raise UserError(
                f"model '{model.name}' takes clips, of which no map is drawn", "attnbias probe measures it"
            )
        return model.towers[kind]
    flag = "--text 'STRING' --token I" if "text" in model.towers else "--image FILE --patch ROW,COLUMN"
    raise UserError(f"model '{model.name}' has no {kind} tower", f"it takes {flag}")


def _window(model: Model, tower: Tower, given: Inputs, seq_len: int | None, listener: Listener) -> Sample:
    """The first window of a text, of `seq_len` tokens; if None, the tower's usual length or the whole text.

    Raises UserError if the text is shorter than `seq_len`, or the tower takes no such length.
    """
    windows = tower.samples(given, seq_len)
    found, another = next(windows, None), next(windows, None)
    if found is None and seq_len is None:
        found = _whole(tower, given)
    if found is None:
        raise UserError(
            f"the text is shorter than {seq_len or tower.facts.get('context')} tokens of '{model.name}'",
            "give more text" if seq_len is None else f"give more text, or --seq-len below {seq_len}",
        )
    if another is not None:
        listener.say(f"{model.name}: the first {len(found.read())} tokens of the text are looked at")
    return Sample(found.id.rpartition(":")[0], found.read)


def _whole(tower: Tower, given: Inputs) -> Sample | None:
    """The longest window that the text fills: towers say only whether a length is possible."""
    low, high = tower.facts.get("special_tokens", 0) + 1, 4096
    best = None
    while low <= high:
        middle = (low + high) // 2
        try:
            found = next(tower.samples(given, middle), None)
        except UserError:  # longer than the context, or a tower of one length only
            found = None
        if found is None:
            high = middle - 1
        else:
            best, low = found, middle + 1
    return best


def _one_call(tower: Tower, layer: Layer, batch: Batch) -> AttentionCall:
    """The layer's call, if it is one softmax over the tokens of the one input."""
    calls = capture(tower, batch, [layer.index])
    if not calls:
        raise UserError(
            f"layer {layer.index} ('{layer.path}') does not attend to its own tokens",
            "choose another --layer",
        )
    if len(calls) > 1 or calls[0].batch != 1:
        parts = len(calls) if len(calls) > 1 else calls[0].batch
        raise UserError(
            f"layer {layer.index} ('{layer.path}') attends in {parts} windows, not over the whole input",
            "choose a layer with full attention, with --layer",
        )
    return calls[0]


def _grid(model: Model, tower: Tower, batch: Batch, call: AttentionCall) -> Grid:
    """The grid of patches behind a call. Raises UserError, naming the layer, where tokens are no grid."""
    size = tower.facts.get("patch_size")
    if not isinstance(batch.data, Tensor) or batch.data.ndim != 4 or size is None:
        raise UserError(
            f"'{model.name}' does not cut its image into one grid of patches in reading order",
            "attend draws models that do, such as ViT, CLIP or DINOv2",
        )
    height, width = batch.data.shape[-2:]
    patch_height, patch_width = (size, size) if isinstance(size, int) else size
    rows, columns = height // patch_height, width // patch_width
    # pixels behind the last whole patch are not seen
    grid = Grid(model.name, rows * patch_height, columns * patch_width, rows, columns)
    if call.tokens != len(tower.prefix + tower.suffix) + grid.rows * grid.columns:
        raise UserError(
            f"layer {call.layer} ('{call.module}') of '{model.name}' has {call.tokens} tokens, not "
            f"{len(tower.prefix + tower.suffix)} + {grid.rows} × {grid.columns} patches",
            "choose a layer that keeps one token per patch, with --layer",
        )
    return grid


def _patches(tower: Tower, grid: Grid) -> pd.DataFrame:
    """kind, row, col and text of every token of an image."""
    before, behind = [None] * len(tower.prefix), [None] * len(tower.suffix)
    rows, columns = np.indices((grid.rows, grid.columns)).reshape(2, -1).tolist()
    kinds = [*tower.prefix, *["patch"] * len(rows), *tower.suffix]
    places = {"row": [*before, *rows, *behind], "col": [*before, *columns, *behind]}
    return pd.DataFrame({"kind": kinds, **places, "text": [None] * len(kinds)})


def _position(token: int, tokens: int, model: Model) -> int:
    if -tokens <= token < tokens:
        return token % tokens
    raise UserError(
        f"--token {token} is outside the {tokens} tokens of '{model.name}'",
        f"tokens are 0 to {tokens - 1}, or -1 to -{tokens} from the last",
    )


def _tokens(row: TokenRow, head: int | None, target: _Target, same: Mapping[str, Any]) -> pd.DataFrame:
    """The tokens' table of one model, in the columns of `Attended.tokens`."""
    of_head = slice(None) if head is None else slice(head, head + 1)
    weight = _mean(row.weight[of_head])
    position = np.arange(len(weight))
    table = pd.DataFrame(
        {
            "head": MEAN if head is None else str(head),
            "token": position,
            **{name: target.places[name].to_numpy() for name in target.places},
            "weight": weight,
            "value_cosine": _mean(row.value_cosine[of_head]),
            "rank": pd.Series(weight).rank(method="first", ascending=False),
            "is_target": position == target.position,
        }
    )
    # one type per column, whatever the model: all of it is missing for some
    return _behind(same, table.astype({**TOKEN_TYPES, "text": "string"}))


def _mean(per_head: np.ndarray) -> np.ndarray:
    """Mean over heads, `[token]`; where heads see different keys, over those that see the token."""
    seen = ~np.isnan(per_head)
    count = seen.sum(0)
    total = np.where(seen, per_head, 0.0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _decomposition(row: TokenRow, same: Mapping[str, Any]) -> pd.DataFrame:
    heads = [*map(str, range(len(row.weight))), MEAN]
    visible = (~np.isnan(row.weight)).sum(1)
    numbers = {name: [*row.numbers[name], row.numbers[name].mean()] for name in NUMBERS}
    table = pd.DataFrame({"head": heads, "n_visible": [*visible, visible.max()], **numbers})
    return _behind(same, table)


def _behind(same: Mapping[str, Any], table: pd.DataFrame) -> pd.DataFrame:
    """A table with constant columns in front of its own."""
    return pd.DataFrame(dict(same), index=table.index).join(table)

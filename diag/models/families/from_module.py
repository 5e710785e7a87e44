"""A user's own `nn.Module` with ready batches: no name, no preprocessing, no tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import UserError
from diag.models.base import Batch, Model, Sample, Tower, device_of_module, taken_beside_ids
from diag.models.by_size import BySize
from diag.models.cross import with_cross
from diag.models.hooks.content import INPUTS, OTHERWISE
from diag.models.hooks.layers import Layer
from diag.models.hooks.meaning import Meaning, Understood, meaning_of, refuse_random, told
from diag.models.hooks.other_inputs import are_ids, other_than
from diag.models.known import known_layers, trusted

TOWER = "module"


def from_module(
    module: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    limit: int | None = None,
    *,
    allow_random: bool = False,
    apart: bool = True,
    cross: bool = False,
) -> tuple[Model, tuple[Tower, ...], list[Sample]]:
    """A model with the towers that its forward pass runs, and one sample for each ready batch.

    batches: a tensor, given to the module as its only argument, or a dict of tensors, given by
        name; every row is one input. Where a module takes sequences first, every column is one. A
        two-dimensional `attention_mask` in a dict says which tokens are real.
    limit: the most inputs that are used.
    allow_random: whether the module may be in training mode, or give other numbers for the same input.
    apart: whether batches are cut into inputs, a sample each, where their rows are not those of the calls:
        windows, tiles, several views of an input.
    cross: whether layers that attend to another stack's tokens are a tower of their own.
    What the layers are is found by test on two inputs (`diag.models.hooks.meaning`), unless the module is as
    its library made it and known (`diag.models.known`). The module keeps its
    mode and its device; batches are moved to the device.

    Raises UserError if there is no batch, if a batch is neither, if the module is random without being
    allowed to, makes no attention call that can be seen, or no cross-attention where that is asked for.
    """
    ready = list(_ready(batches, limit, 0))
    if not ready:
        raise UserError("no batch was given", "pass an iterable of tensors, or of dicts of tensors")
    refuse_training(module, allow_random)
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    device = device_of_module(module)

    def forward(batch: Batch) -> Any:
        return module(**batch.data) if isinstance(batch.data, Mapping) else module(batch.data)

    def run(data: Any) -> None:
        with torch.inference_mode():
            forward(_on_device(Batch((), data), device))

    known = known_layers(module)
    tested = _most_padded(ready)
    found = (
        _meaning(module, run, tested, 0) if known is None else Meaning((Understood("", *known, {}),), INPUTS)
    )
    inputs_axis = int(found.sequence_first)
    if inputs_axis:
        ready = list(_ready((batch.data for batch in ready), limit, inputs_axis))
        tested = _most_padded(ready)
        found = _meaning(module, run, tested, inputs_axis)
    refuse_random(module, found, allow_random)
    if not apart and found.rows == OTHERWISE and len(tested.ids) > 1:
        found = _without_padding(found)  # it is known of inputs that run alone
    sizes = BySize(found.towers, tested, inputs_axis) if known is None else None

    def look_again(group: Sequence[Sample]) -> None:
        assert sizes is not None
        (sample,) = group
        sizes.keep(sample.read(), _meaning(module, run, sample.read(), inputs_axis))

    if apart and found.rows != INPUTS:
        ready = [one for batch in ready for one in _apart(batch, inputs_axis)]
    samples = [
        Sample.holding(batch.ids[0] if len(batch.ids) == 1 else f"batch-{number:05d}", batch)
        for number, batch in enumerate(ready)
    ]
    also = taken_beside_ids(module)
    towers = tuple(
        replace(
            _tower(
                one,
                told(found, one) if known is None else trusted(module),
                forward,
                samples,
                device,
                sizes,
            ),
            look_again=None if sizes is None else look_again,
            also=also,
        )
        for one in found.towers
    )
    towers = with_cross(towers, module) if cross else towers
    name = type(module).__name__
    model = Model(name, "module", f"module:{name}", module, {tower.name: tower for tower in towers})
    return model, towers, samples


def _without_padding(found: Meaning) -> Meaning:
    def layers(one: Understood) -> tuple[Layer, ...]:
        return tuple(replace(layer, form=replace(layer.form, padding=())) for layer in one.layers)

    return replace(found, towers=tuple(replace(one, layers=layers(one)) for one in found.towers))


def refuse_training(module: nn.Module, allow_random: bool) -> None:
    """Raises UserError for a module in training mode that is not allowed to be."""
    if module.training and not allow_random:
        raise UserError(
            f"{type(module).__name__} is in training mode", "call its eval() first, or pass allow_random=True"
        )


def _tower(
    one: Understood,
    meaning: Mapping[str, Any],
    forward: Callable[[Batch], Any],
    samples: Sequence[Sample],
    device: torch.device,
    sizes: BySize | None,
) -> Tower:
    """One tower of the module. Padding belongs to the tower whose masks hide it."""
    padded = one.alone or one.hides_padding

    def encode(group: Sequence[Sample]) -> Batch:
        (sample,) = group
        batch = _on_device(sample.read(), device)
        batch = batch if sizes is None else sizes.sized(batch)
        return batch if padded else replace(batch, real=None)

    return Tower(
        one.name or TOWER,
        one.layers,
        lambda inputs, seq_len: iter(samples),
        encode,
        forward,
        max_batch=1,
        places=one.places,
        skipped=one.skipped,
        meaning=meaning,
    )


def _most_padded(ready: Sequence[Batch]) -> Batch:
    """The batch with most padding; the first one where there are no masks."""
    masks = [mask for batch in ready if (mask := _mask_of(batch.data)) is not None]
    return ready[min(range(len(masks)), key=lambda number: float(masks[number].float().mean()), default=0)]


def _meaning(module: nn.Module, run: Callable[[Any], object], batch: Batch, axis: int) -> Meaning:
    """The tests on the input of a batch with most padding and one beside it; where there is none, it is made.

    A module that does not take two inputs, such as one that was exported, is given the whole batch.
    """
    mask = _mask_of(batch.data)
    one = 0 if mask is None else int(mask.sum(1).argmin())
    try:
        return _tested(module, run, batch.data, axis, one, 2)
    except UserError:
        raise
    except Exception:  # a module's own code, on what it may not have been made for
        count = len(batch.ids)
        if count <= 2:
            raise
        return _tested(module, run, batch.data, axis, one, count)


def _tested(
    module: nn.Module, run: Callable[[Any], object], given: Any, axis: int, one: int, inputs: int
) -> Meaning:
    """The tests on some inputs of a batch, `one` in front and then those that follow it."""
    tensors = dict(given) if isinstance(given, Mapping) else {"": given}
    of_ids = any(name.endswith("ids") for name in tensors)  # then other integers are boxes, sizes, places
    first, other, last, instead = ({} for _ in range(4))
    for name, x in tensors.items():
        chosen = x.narrow(axis, one, 1)
        beside = [x.narrow(axis, (one + i) % x.shape[axis], 1) for i in range(1, inputs)]
        beside = [another(chosen)] if x.shape[axis] == 1 else beside
        first[name], last[name] = torch.cat([chosen, *beside], axis), beside[-1]
        content = x.is_floating_point() or name.endswith("ids") or not of_ids
        instead[name] = another(chosen, 2) if content else chosen
        other[name] = torch.cat([instead[name], *beside], axis)
    whole = isinstance(given, Mapping)
    # ids in another order may be the same here and there
    everywhere = all(
        not are_ids(x) or bool((instead[name] != x.narrow(axis, one, 1)).all()) for name, x in tensors.items()
    )
    return meaning_of(
        module,
        run,
        first if whole else first[""],
        other if whole else other[""],
        inputs=inputs,
        everywhere=everywhere,
        real=_mask_of(first),
        last=None if inputs != 2 else last if whole else last[""],
        instead=None if inputs != 2 else instead if whole else instead[""],
    )


def another(x: Tensor, number: int = 1) -> Tensor:
    """Another input in the place of one, by number: of its values and ids; masks and flags stay."""
    return other_than(x, number) if x.is_floating_point() or are_ids(x) else x


def _mask_of(data: Any) -> Tensor | None:
    mask = data.get("attention_mask") if isinstance(data, Mapping) else None
    return mask.bool() if mask is not None and mask.ndim == 2 else None


def _apart(batch: Batch, axis: int) -> Iterator[Batch]:
    """Its inputs, one by one."""
    for row, name in enumerate(batch.ids):
        if isinstance(batch.data, Mapping):
            data: Any = {key: x.narrow(axis, row, 1) for key, x in batch.data.items()}
        else:
            data = batch.data.narrow(axis, row, 1)
        yield Batch((name,), data)


def _ready(batches: Iterable[Tensor | Mapping[str, Tensor]], limit: int | None, axis: int) -> Iterator[Batch]:
    """The batches where they lie, with inputs numbered from one to the next. axis: along which they lie."""
    first = 0
    for number, data in enumerate(batches):
        left = None if limit is None else limit - first
        if left is not None and left <= 0:
            return
        _check(data, number, axis)
        cut = _first_inputs(data, left, axis)
        count = (cut if isinstance(cut, Tensor) else next(iter(cut.values()))).shape[axis]
        yield Batch(tuple(f"{first + row:06d}" for row in range(count)), cut)
        first += count


def _check(data: Any, number: int, axis: int) -> None:
    """Raises UserError for a batch that is nested, or in which there is nothing."""
    for name, x in (data if isinstance(data, Mapping) else {"": data}).items():
        if not isinstance(x, Tensor):
            continue
        what = f"'{name}' of batch {number}" if name else f"batch {number}"
        if x.is_nested:
            raise UserError(
                f"{what} is a nested tensor, of inputs of several lengths",
                "give batches that are padded to one length (torch.nested.to_padded_tensor), with a mask",
            )
        if x.ndim > axis and (not x.shape[axis] or (not name and not x.numel())):
            raise UserError(
                f"{what} holds no {'tokens' if x.shape[axis] else 'inputs'}: its shape is {list(x.shape)}",
                "give batches of at least one input, of at least one token",
            )


def _first_inputs(
    data: Tensor | Mapping[str, Tensor], most: int | None, axis: int
) -> Tensor | dict[str, Tensor]:
    if isinstance(data, Tensor) and data.ndim > axis:
        return data.narrow(axis, 0, min(most or data.shape[axis], data.shape[axis]))
    if isinstance(data, Mapping) and data and all(isinstance(value, Tensor) for value in data.values()):
        lengths = {key: value.shape[axis] for key, value in data.items()}
        if len(set(lengths.values())) != 1:
            raise UserError(
                f"tensors of one batch differ in rows: {lengths}", "give every tensor one row per input"
            )
        return {
            key: value.narrow(axis, 0, min(most or len(value), value.shape[axis]))
            for key, value in data.items()
        }
    raise UserError(
        f"a batch is a {type(data).__name__}",
        "a batch is a tensor, or a dict of tensors, with one input per row",
    )


def _on_device(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch.data, Tensor):
        return replace(batch, data=batch.data.to(device))
    moved = {key: value.to(device) for key, value in batch.data.items()}
    return replace(batch, data=moved, real=_mask_of(moved))

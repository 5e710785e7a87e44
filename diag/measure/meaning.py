"""A tower as it is, and not as its parts are called: the tests of meaning on its first inputs.

`diag.models.hooks.meaning` tests; here a tower's own inputs are brought before it, and what it finds becomes
the tower that is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diag.errors import MeasurementError, UnreadableInput
from diag.measure.batch_size import is_out_of_memory
from diag.measure.loop import told_if_the_model_fails
from diag.models.base import Batch, Model, Sample, Tower
from diag.models.by_size import BySize
from diag.models.hooks.content import OTHERWISE
from diag.models.hooks.meaning import Meaning, Understood, meaning_of, refuse_random, told
from diag.models.hooks.other_inputs import other_than
from diag.models.hooks.seam import attention_calls
from diag.models.known import is_known, trusted


def understood(
    model: Model,
    tower: Tower,
    samples: Iterable[Sample],
    *,
    allow_random: bool = False,
    as_made: bool = True,
) -> Tower:
    """The tower with the layers that it really has, their numbers, and what is not measured of it.

    samples: the first one that can be read is looked at; where none can, where another library watches the
        model, and where it is known (`diag.models.known`), the tower comes back as it is.
    allow_random: whether a model may give other numbers for the same input.
    as_made: whether its library made the model just now; one that was in other hands may be changed.
    Raises UserError for a model that does without being allowed to, and where no layer can be measured.
    """
    if tower.meaning or tower.capture is not attention_calls:
        return tower
    if as_made and is_known(model.module, tower.layers):
        return replace(tower, meaning=trusted(model.module))
    content = _first_content(tower, samples)
    if content is None:
        return tower
    try:
        found = _meaning(model, tower, content, 1 if tower.max_batch == 1 else 2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = _meaning(model, tower, content, 1)
    refuse_random(model.module, found, allow_random)
    chosen = _chosen(tower, found)
    sizes = BySize([chosen], tower.encode([Sample.holding("test", content)]))

    def look_again(samples: Sequence[Sample]) -> None:
        again = _meaning(model, tower, samples[0].read(), 1 if tower.max_batch == 1 else 2)
        sizes.keep(tower.encode(samples), again)

    return replace(
        tower,
        encode=lambda samples: sizes.sized(tower.encode(samples)),
        look_again=look_again,
        layers=chosen.layers,
        places=chosen.places,
        skipped={**chosen.skipped, **_of_others(model, tower, found, chosen)},
        joined=chosen.joined,
        side_by_side=chosen.side_by_side,
        meaning=told(found, chosen),
        max_batch=1 if found.rows == OTHERWISE and not found.random else tower.max_batch,
    )


def _of_others(model: Model, tower: Tower, found: Meaning, chosen: Understood) -> dict[str, str]:
    """Layers of other stacks that ran, by path, and why they are not measured; not of other towers."""
    named = [layer.path for one in model.towers.values() if one.name != tower.name for layer in one.layers]
    told = dict[str, str]()
    for one in found.towers:
        if one is not chosen:
            why = f"of another stack ('{one.name}') than this tower: measure the model as a module"
            told |= dict(one.skipped) | {layer.path: why for layer in one.layers}
    return {path: why for path, why in told.items() if not _within(path, named)}


def _first_content(tower: Tower, samples: Iterable[Sample]) -> Any:
    """What the first sample that can be read holds, prepared for the tower."""
    for sample in samples:
        try:
            return sample.read() if tower.prepare is None else tower.prepare(sample.read())
        except UnreadableInput:
            continue
    return None


def _meaning(model: Model, tower: Tower, content: Any, inputs: int) -> Meaning:
    """The tests on one input, beside another one, and on a third one in its place."""
    second, third = _other(content, 1), _other(content, 2)
    pairs = [[content, second], [third, second]]

    def batch(contents: Sequence[Any]) -> Batch:
        given = [Sample.holding(f"test-{i}", each) for i, each in enumerate(contents[:inputs])]
        return tower.encode(given)

    def run(data: Batch) -> None:
        with torch.inference_mode(), told_if_the_model_fails(tower, data):
            tower.forward(data)

    first, other = batch(pairs[0]), batch(pairs[1])
    last, instead = (
        (tower.encode([Sample.holding("test-1", each)]) for each in (second, third))
        if inputs == 2
        else (None, None)
    )
    # the prompt beside an image is the same beside another one, and no padding
    everywhere = not isinstance(content, list) and not tower.marks
    return meaning_of(
        model.module, run, first, other, inputs=inputs, everywhere=everywhere, last=last, instead=instead
    )


def _other(content: Any, number: int) -> Any:
    """Another content of the same size: noise for images, the same tokens in another order for texts."""
    if isinstance(content, Tensor):
        return other_than(content, number)
    if isinstance(content, Image.Image):
        generator = np.random.default_rng(number)
        noise = generator.integers(0, 256, (content.height, content.width, 3), dtype=np.uint8)
        return Image.fromarray(noise)
    if isinstance(content, dict):
        return {name: _other(x, number) if x.is_floating_point() else x for name, x in content.items()}
    if isinstance(content, tuple):
        return tuple(other_than(x, number) if x.is_floating_point() else x for x in content)
    return content[number:] + content[:number]


def _chosen(tower: Tower, found: Meaning) -> Understood:
    """The tower among those that ran: the one with most of the layers that were expected by their names.

    Raises MeasurementError where none of them is: another stack's tokens are not those of this tower.
    """
    expected = [layer.path for layer in tower.layers]

    def shared(one: Understood) -> tuple[int, int]:
        return sum(_within(layer.path, expected) for layer in one.layers), len(one.layers)

    chosen = max(found.towers, key=shared)
    if expected and not shared(chosen)[0]:
        skipped = {path: why for one in found.towers for path, why in one.skipped.items()}
        path = next((path for path in skipped if _within(path, expected)), expected[0])
        why = skipped.get(path, "it makes no attention call that is seen")
        raise MeasurementError(
            f"no layer of its {tower.name} tower attends to its own tokens ('{path}': {why})",
            "measure the model as a module: diag.probe(module, batches)",
        )
    return chosen


def _within(path: str, others: Sequence[str]) -> bool:
    """Whether a module is one of others, within one of them, or around one."""
    return any(f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.") for other in others)

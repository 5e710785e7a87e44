"""A tower under edits: the context managers under which interventions take effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal

from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.positions import TEXT, Geometry
from diag.errors import UserError
from diag.models.base import Batch, Tower
from diag.models.hooks.beside import NOTHING, Beside, HeldOut, Noted
from diag.models.hooks.block_parts import Block
from diag.models.hooks.depth import Place
from diag.models.hooks.interventions import BRANCHES, GATE, INTERVENTIONS, Edit
from diag.models.hooks.layers import Layer
from diag.models.hooks.output_gates import check_gates, gate_edits
from diag.models.hooks.residual import branch_edits
from diag.models.layer_numbers import own_numbers


@contextmanager
def edited(
    tower: Tower,
    layers: Sequence[Layer],
    blocks: Sequence[Block],
    edits: Sequence[Edit],
    real: Tensor | None = None,
    beside: Beside = NOTHING,
) -> Iterator[None]:
    """Under this, the tower runs with the edits, in the order given; afterwards it is as it was.

    real: False at padding, for the batches that run inside; None if there is none. beside: what edits are
    told of that batch (`beside_of`).
    Layers that no edit names run the library's own code, bit for bit.
    """
    on_heads = [edit for edit in edits if edit.where == "attention"]
    touched = [layer for layer in layers if any(edit.at(layer.index) for edit in on_heads)]
    with ExitStack() as stack:
        if touched:
            stack.enter_context(tower.capture(touched, partial(heads_return, on_heads, beside=beside)))
        stack.enter_context(edited_modules(layers, blocks, edits, real))
        yield


def beside_of(
    tower: Tower, batch: Batch, held_out: HeldOut | None = None, noted: Noted | None = None
) -> Beside:
    """What edits are told of a batch.

    held_out: what other inputs gave. noted: where edits say what they did.
    """
    return Beside(
        ids=batch.ids,
        geometry=lambda call: geometry_of(tower, batch, call),
        image=lambda call: _of_an_image(tower, batch, call),
        real=batch.real,
        held_out=held_out,
        noted=noted,
    )


def geometry_of(tower: Tower, batch: Batch, call: AttentionCall) -> Geometry:
    """Where the tokens of a call lie: a grid of patches in a vision tower, else one line.

    Of one's own module, which may take images, tokens lie in a line where as many were given in one.
    """
    if tower.name != "vision":
        line = tower.input_kind == "text" or given_in_line(batch, call.tokens)
        return TEXT if line and call.own_keys else Geometry.unknown()  # squares are none of a line
    if tower.suffix or len(tower.marks) > 1:  # a grid has no places for what is beside it
        return Geometry.unknown(len(tower.prefix))
    windows = call.batch // len(batch.ids)
    if tower.windows_in_a_row(call.tokens, windows) > 1:  # prefix tokens stand between patches
        return Geometry.unknown()
    size = tower.facts.get("image_size")
    return Geometry.of_image(call.tokens, tower.beside(call.tokens)[0], size, windows)


def given_in_line(batch: Batch, tokens: int, *, ids: bool = False) -> bool:
    """Whether a batch holds so many tokens of each input in a line: as ids, or, unless `ids`, as vectors."""
    given = batch.data.values() if isinstance(batch.data, Mapping) else (batch.data,)
    lines = (x for x in given if isinstance(x, Tensor) and x.ndim in (2, 3) and tokens in x.shape[:2])
    return any(not (ids and x.is_floating_point()) for x in lines)


def _of_an_image(tower: Tower, batch: Batch, call: AttentionCall) -> Tensor | None:
    """Which keys of a call are of an image, `[row or 1, key]`; None where that is not known."""
    if not call.own_keys:
        return None
    if "image" in batch.sets:
        marked = batch.sets["image"]
        return marked if marked.shape == (call.batch, call.tokens) else None
    if "patch" in tower.token_sets:
        return tower.tokens_in("patch", call.tokens, call.batch // max(1, len(batch.ids)))[None]
    return None


def heads_return(edits: Sequence[Edit], call: AttentionCall, beside: Beside = NOTHING) -> Tensor:
    """What the heads return after the edits that name the call's layer, one after the other.

    beside: what the edits are told of the batch. An edit is of the pattern and the values that the model has,
    and of the output that the edit before it left.
    """
    for edit in edits:
        if edit.where == "attention" and edit.at(call.layer):
            call = replace(call, output=edit.output(call, beside))
    return call.output


@contextmanager
def edited_modules(
    layers: Sequence[Layer], blocks: Sequence[Block], edits: Sequence[Edit], real: Tensor | None = None
) -> Iterator[None]:
    """Under this, the edits of branches and gates take effect; those of heads do not.

    real: as in `edited`.
    """
    with ExitStack() as stack:
        for edit in edits:
            if edit.where == GATE:
                gated = [layer for layer in layers if edit.at(layer.index)]
                stack.enter_context(gate_edits(gated, INTERVENTIONS[edit.name].change))
            elif edit.where in BRANCHES:
                which: Literal["attention", "mlp"] = "mlp" if edit.where == "mlp branch" else "attention"
                changed = {
                    block.index: partial(edit.update, block.index) for block in blocks if edit.at(block.index)
                }
                stack.enter_context(branch_edits(blocks, changed, which, real))
        yield


def by_own_numbers(
    edits: Sequence[Edit], layers: Sequence[Layer], places: Sequence[Place] = ()
) -> list[Edit]:
    """The edits with the model's own numbers of layers, where some count from the last; where an edit names
    none, of those that have what it needs.

    Raises UserError for a layer that is not there or not measured, as `own_numbers` does.
    """

    def own(edit: Edit) -> Edit:
        if edit.layers is None:
            needs = INTERVENTIONS[edit.name]
            able = frozenset(
                layer.index
                for layer in layers
                if (layer.form.mixer == "softmax" or not needs.of_softmax)
                and (layer.form.keys_of == "own" or not needs.of_values)
            )
            return replace(edit, layers=able) if 0 < len(able) < len(layers) else edit
        before, missing = f"--intervene {edit.text}: ", "there is no layer {}"
        found = own_numbers(sorted(edit.layers), layers, places, before=before, missing=missing)
        return replace(edit, layers=frozenset(found))

    return [own(edit) for edit in edits]


def check_layers(edits: Sequence[Edit], layers: Sequence[Layer]) -> None:
    """Raises UserError for an edit of a layer, or of an output gate, that is not there."""
    known = {layer.index for layer in layers}
    for edit in edits:
        for index in sorted((edit.layers or frozenset()) - known):
            raise UserError(
                f"--intervene {edit.text}: there is no layer {index}", f"layers are 0 to {max(known)}"
            )
        if edit.where == GATE:
            check_gates([layer for layer in layers if edit.at(layer.index)])

"""A tower under edits: the context managers under which interventions take effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal

from torch import Tensor

from diag.attention import AttentionCall
from diag.blocks import Block
from diag.branches import branch_edits
from diag.errors import UserError
from diag.interventions import INTERVENTIONS, Edit
from diag.models.base import Tower
from diag.seam import Layer


@contextmanager
def edited(
    tower: Tower, layers: Sequence[Layer], blocks: Sequence[Block], edits: Sequence[Edit]
) -> Iterator[None]:
    """Under this, the tower runs with the edits, in the order given; afterwards it is as it was.

    Layers that no edit names run the library's own code, bit for bit.
    """
    on_heads = [edit for edit in edits if edit.where == "attention"]
    touched = [layer for layer in layers if any(edit.at(layer.index) for edit in on_heads)]
    with ExitStack() as stack:
        if touched:
            stack.enter_context(tower.capture(touched, partial(heads_return, on_heads)))
        stack.enter_context(edited_branches(blocks, edits))
        yield


def heads_return(edits: Sequence[Edit], call: AttentionCall) -> Tensor:
    """What the heads return after the edits that name the call's layer, one after the other."""
    for edit in edits:
        if edit.where == "attention" and edit.at(call.layer):
            call = replace(call, output=edit.output(call))
    return call.output


@contextmanager
def edited_branches(blocks: Sequence[Block], edits: Sequence[Edit]) -> Iterator[None]:
    """Under this, the edits of whole branches take effect; those of heads do not."""
    with ExitStack() as stack:
        for edit in edits:
            if edit.where != "attention":
                which: Literal["attention", "mlp"] = "mlp" if edit.where == "mlp branch" else "attention"
                changed = {block.index: partial(_changed, edit) for block in blocks if edit.at(block.index)}
                stack.enter_context(branch_edits(blocks, changed, which))
        yield


def check_layers(edits: Sequence[Edit], layers: Sequence[Layer]) -> None:
    """Raises UserError for an edit of a layer that is not there."""
    known = {layer.index for layer in layers}
    for edit in edits:
        for index in sorted((edit.layers or frozenset()) - known):
            raise UserError(
                f"--intervene {edit.text}: there is no layer {index}", f"layers are 0 to {max(known)}"
            )


def _changed(edit: Edit, update: Tensor, real: Tensor | None) -> Tensor:
    return INTERVENTIONS[edit.name].change(update, real, edit.strength)

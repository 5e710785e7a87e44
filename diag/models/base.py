"""What every family hands over: towers that turn samples into batches and run them.

A model has one tower per modality ("vision", "text"); one that reads images and text in one sequence has
a tower "language" besides. A tower is a frozen bundle of plain callables; nothing is inherited or overridden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from diag.errors import UserError, one_of
from diag.inputs.items import Inputs
from diag.models.hooks.depth import Place
from diag.models.hooks.layers import Form, Layer
from diag.models.hooks.seam import OnCall, attention_calls

BESIDE_IDS = ("attention_mask", "position_ids", "use_cache")


def taken_beside_ids(module: nn.Module) -> tuple[str, ...]:
    """What a module's forward takes by name beside `input_ids`, of `BESIDE_IDS`; nothing of others."""
    taken = inspect.signature(module.forward).parameters
    return tuple(name for name in BESIDE_IDS if name in taken) if "input_ids" in taken else ()


def device_of_module(module: nn.Module) -> torch.device:
    """Where a module's first parameter lies, and its inputs belong; the CPU for one without parameters."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


@dataclass(frozen=True)
class Sample:
    """One input as the model will see it: an id, and how to get the image or the token ids."""

    id: str
    read: Callable[[], Any]

    @staticmethod
    def holding(id: str, content: Any) -> Sample:
        """A sample that is in memory."""
        return Sample(id, partial(_itself, content))


def _itself(content: Any) -> Any:
    return content


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    data: what the tower's `forward` expects.
    real: False at padding; None if there is none.
    sets: which positions belong to a token set, for those that the tower does not know by position
        (`Tower.marks`); without padding.
    forms: how layers call attention in inputs of this size, by name, where that is not as the tower has it.
    """

    ids: tuple[str, ...]
    data: Any
    real: Bool[Tensor, "batch token"] | None = None
    sets: Mapping[str, Bool[Tensor, "batch token"]] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)

    def layers(self, layers: Sequence[Layer]) -> list[Layer]:
        """Layers as they call attention here."""
        return [replace(layer, form=self.forms.get(layer.name, layer.form)) for layer in layers]


@dataclass(frozen=True)
class Tower:
    """One stack of self-attention layers and how to feed it.

    layers: its attention modules in depth order; those that were found by their names, until
        `diag.measure.meaning.understood` has looked at what they do.
    places: all of its depth axis, where they are known. skipped: those that are not measured, and what holds
        no place, by path, and why. meaning: what the tests of meaning found, as a manifest has it.
    samples: cuts inputs into samples; the second argument is the sequence length (text) or None.
    encode: samples -> Batch on the tower's device, with the model's own preprocessing.
    prepare: the part of that preprocessing that one image goes through on the CPU, and another process may
        do: content of a sample -> what `encode` takes as well. What it made itself it returns as it is.
        Raises UnreadableInput. None where there is nothing worth it.
    forward: runs the tower on a batch.
    takes: the kind of inputs that it takes, "vision" or "text", where that is not its name.
    also: what its `forward` takes beside token ids where `data` is a dict: "attention_mask", "position_ids" …
    prefix, suffix: kinds of the tokens before and behind the patches, in order: "cls", "registers",
        "prompt" or "detection".
    joined: how many tokens stand before and behind the patches in layers of so many tokens, where others have
        joined them by then.
    side_by_side: how many windows of an input, each with such tokens of its own, stand in one row in layers
        that see all of them.
    patches: whether its tokens are patches, in all of its layers and but for those beside them.
    marks: token sets whose positions each batch brings with it. together: those that are measured where
        none is named; the first one if there are none.
    max_batch: the most samples that one forward may hold.
    frames: how many images one input is, of a tower of clips; None where it is a single one.
    capture: `capture(layers, on_call)`, the context manager under which calls are seen.
    padded: encodes images of different sizes as one batch for `forward`, filled up as their processor does,
        and says which pixels or patches of each are its own, `[image, height, width]` or `[image, patch]`.
        None where the processor fills nothing up.
    look_again: finds how layers call attention in inputs of the size of some samples, for `encode` to say so
        from then on. None where it cannot.
    decode: token ids -> their text; None for images.
    token_text: token id -> the text of that token alone, with the space before it; None for images.
    asking: the same tower with another text beside the image, where one stands there; None where none does.
    language_head: loads what turns the last states of a causal language model into next-token logits.
    ending: what `forward` ends in: "next-token logits", "class logits", "embedding" or "token states".
    facts: constants that explain a number: patch_size, image_size, context, preprocessing, bos …
    """

    name: str
    layers: tuple[Layer, ...]
    samples: Callable[[Inputs, int | None], Iterator[Sample]]
    encode: Callable[[Sequence[Sample]], Batch]
    forward: Callable[[Batch], Any]
    takes: str | None = None
    also: tuple[str, ...] = ()
    prepare: Callable[[Any], Any] | None = None
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    joined: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    side_by_side: int = 1
    patches: bool = True
    marks: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    max_batch: int | None = None
    frames: int | None = None
    capture: Callable[[Sequence[Layer], OnCall], AbstractContextManager[Any]] = attention_calls
    padded: Callable[[Sequence[Sample]], tuple[Batch, Bool[Tensor, "image ..."]]] | None = None
    look_again: Callable[[Sequence[Sample]], None] | None = None
    decode: Callable[[Sequence[int]], str] | None = None
    token_text: Callable[[int], str] | None = None
    asking: Callable[[str], Tower] | None = None
    language_head: Callable[[], nn.Module] | None = None
    ending: str = "token states"
    places: tuple[Place, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    meaning: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """How many places its depth axis has, with layers that are not measured."""
        return len(self.places) or len(self.layers)

    @property
    def token_sets(self) -> tuple[str, ...]:
        """The token sets that this tower has; the first one is the default."""
        if self.marks:
            return (*self.marks, "all")
        if self.name != "vision" or not self.patches:
            return ("all",)
        return ("patch", "all", *dict.fromkeys(self.prefix + self.suffix))

    @property
    def default_sets(self) -> tuple[str, ...]:
        """The token sets that are measured where none is named."""
        return self.together or self.token_sets[:1]

    @property
    def input_kind(self) -> str:
        """The kind of inputs that it takes: "vision" for images, "text" for texts."""
        return self.takes or self.name

    def check_set(self, token_set: str) -> None:
        """Raises UserError where the tower has no such token set."""
        if token_set not in self.token_sets:
            raise UserError(
                f"this model's {self.name} tower has no token set '{token_set}'",
                f"--tokens takes {one_of(self.token_sets)} here",
            )

    def beside(self, tokens: int) -> tuple[int, int]:
        """How many of `tokens` stand before the patches, and behind them.

        None where there are fewer than in other layers stand beside patches, as where these became groups.
        """
        front, back = self.joined.get(tokens, (len(self.prefix), len(self.suffix)))
        return (front, back) if front + back <= tokens else (0, 0)

    def windows_in_a_row(self, tokens: int, rows: int) -> int:
        """How many windows stand in a row of `tokens`, of a layer with `rows` rows for an input."""
        return self.side_by_side if rows == 1 and tokens % self.side_by_side == 0 else 1

    def tokens_in(self, token_set: str, tokens: int, rows: int = 1) -> Bool[Tensor, " token"]:
        """Which of `tokens` positions belong to a token set that is the same for every input.

        rows: how many rows of so many tokens an input has in that layer.
        Raises UserError where the tower has no such set.
        """
        self.check_set(token_set)
        if (windows := self.windows_in_a_row(tokens, rows)) > 1:
            return self.tokens_in(token_set, tokens // windows, windows).repeat(windows)
        front, back = self.beside(tokens)
        known = (front, back) == (len(self.prefix), len(self.suffix))
        prefix, suffix = (self.prefix, self.suffix) if known else (["joined"] * front, ["joined"] * back)
        kinds = [*prefix, *["patch"] * (tokens - front - back), *suffix]
        return torch.tensor([token_set in ("all", kind) for kind in kinds])


@dataclass(frozen=True)
class Model:
    """A loaded model: what was asked for, what it resolved to, and its towers by modality.

    zero_shot: names of classes → a function from image embeddings to class logits; None where there is none.
    """

    name: str
    family: str
    resolved: str
    module: nn.Module
    towers: Mapping[str, Tower]
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    zero_shot: Callable[[Sequence[str]], Callable[[Tensor], Tensor]] | None = None

    def takers(self, kind: str, token_sets: Sequence[str] | None = None) -> list[Tower]:
        """The towers that take "vision" or "text" inputs; with token sets, those that have one of them.

        Raises UserError for a token set that none of them has.
        """
        found = [tower for tower in self.towers.values() if tower.input_kind == kind]
        if not found or token_sets is None:
            return found
        for token_set in token_sets:
            if not any(token_set in tower.token_sets for tower in found):
                if len(found) == 1:
                    found[0].check_set(token_set)
                known = dict.fromkeys(name for tower in found for name in tower.token_sets)
                raise UserError(
                    f"this model has no token set '{token_set}'", f"--tokens takes {one_of(known)} here"
                )
        return [tower for tower in found if not set(token_sets).isdisjoint(tower.token_sets)]

    def tower(self, kind: str) -> Tower:
        """The tower for "vision" or "text" inputs. Raises UserError where the model has none."""
        if kind not in self.towers:
            flag = {"vision": "--images", "text": "--texts"}
            given = next(iter(self.towers))
            raise UserError(
                f"model '{self.name}' has no {kind} tower",
                f"it takes {flag[given]} DIR|demo" if given in flag else None,
            )
        return self.towers[kind]

"""Which image tokens of a language model carry the sinks of its vision tower: for `diag.metrics.followed`.

Which patch an image token comes of is not read off names or numbers of tokens, but tried: the states of half
of the patches are changed behind a block of the vision tower, and then those of the other half, for each
binary digit of a patch's number. The image tokens that change spell the number of their patch. A token that
changes both times comes of several patches; then nothing is followed.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.errors import UserError
from diag.measure.meaning import understood
from diag.metrics.default import selections_of
from diag.metrics.sink_events import sink_readings
from diag.models.base import Batch, Model, Sample, Tower
from diag.models.hooks.block_parts import find_blocks

TIP = "leave the group 'followed' out of --metrics"


class _Enough(Exception):  # noqa: N818 it is no error
    """Ends a forward pass whose first states of the language model were seen."""


@dataclass
class VisionSinks:
    """The vision tower of a model, and which image tokens of its language tower come of which patch.

    paths: number of image tokens -> the layers that they come through, and the patch of each.
    """

    model: Model
    language: Tower
    allow_random: bool = False
    vision: Tower | None = None
    paths: dict[int, tuple[frozenset[int], Tensor]] = field(default_factory=dict)

    def classes(self, samples: Sequence[Sample], batch: Batch) -> dict[str, Bool[Tensor, "batch token"]]:
        """The image tokens that carry sinks of their own input, the others, and as many at random.

        samples: those of the batch. Raises UserError, saying why, where image tokens are no single patches.
        """
        if self.vision is None:
            vision = self.model.tower("vision")
            self.vision = understood(self.model, vision, list(samples[:1]), allow_random=self.allow_random)
        image = batch.sets["image"].cpu()
        found = {name: torch.zeros_like(image) for name in ("carriers", "other_image", "random_image")}
        for row, sample in enumerate(samples):
            places = image[row].nonzero()[:, 0]
            layers, patch = self.path(sample, len(places))
            carries = torch.isin(patch, self.sinks(sample, layers))
            others = places[~carries]
            found["carriers"][row, places[carries]] = True
            found["other_image"][row, others] = True
            # the same whatever else is in the batch
            drawn = torch.Generator().manual_seed(zlib.crc32(sample.id.encode("utf-8", "surrogatepass")))
            chosen = torch.randperm(len(others), generator=drawn)[: int(carries.sum())]
            found["random_image"][row, others[chosen]] = True
        return found

    def sinks(self, sample: Sample, layers: frozenset[int]) -> Int[Tensor, " patch"]:
        """The numbers of the patches that are the sink of an event in any head of these layers."""
        tower, found = self.vision, list[Tensor]()
        assert tower is not None

        def on_call(call: AttentionCall) -> None:
            if call.layer not in layers or call.batch != 1 or not call.own_keys:
                return
            patches = tower.tokens_in("patch", call.tokens)
            (on,) = selections_of(call, [patches[None].to(call.output.device)])
            (reading,) = sink_readings([on], ["sink_index"])
            place = reading["sink_index"]
            index = place.values[place.weights > 0].long().cpu()
            number = patches.cumsum(0) - 1
            found.append(number[index[patches[index]]])

        with torch.inference_mode(), tower.capture(tower.layers, on_call):
            tower.forward(tower.encode([sample]))
        return torch.cat([torch.empty(0, dtype=torch.long), *found]).unique()

    def path(self, sample: Sample, tokens: int) -> tuple[frozenset[int], Int[Tensor, " token"]]:
        """The layers of the vision tower that image tokens come through, and the patch that each comes of."""
        if tokens not in self.paths:
            self.paths[tokens] = self._tried(sample, tokens)
        return self.paths[tokens]

    def _tried(self, sample: Sample, tokens: int) -> tuple[frozenset[int], Tensor]:
        tower, module = self.vision, self.model.module
        assert tower is not None
        blocks = find_blocks(module, tower.layers)
        first = find_blocks(module, self.language.layers[:1])[0].module
        batch = self.language.encode([sample])
        image = batch.sets["image"][0].cpu()
        untouched = _entering(self.language, batch, first)
        for place in reversed(range(len(blocks))):
            changed = _Changed(blocks[place].module, tower)
            everything = _moved(changed.entering(self.language, batch, first, None), untouched)[image]
            if not bool(everything.any()):
                continue  # what comes behind this block is not used
            if not bool(everything.all()):
                raise self._refusal("some image tokens come of no patch")
            patches = int(changed.patches)
            digits = max(1, (patches - 1).bit_length())
            number = torch.zeros(tokens, dtype=torch.long)
            for digit in range(digits):
                ones, zeros = (
                    _moved(changed.entering(self.language, batch, first, (digit, bit)), untouched)[image]
                    for bit in (1, 0)
                )
                if bool((ones & zeros).any()):
                    raise self._refusal("an image token comes of several patches")
                if not bool((ones | zeros).all()):
                    raise self._refusal("some image tokens come of no patch")
                number += ones.long() << digit
            if len(number.unique()) < tokens:
                raise self._refusal("several image tokens come of one patch")
            return frozenset(block.index for block in blocks[: place + 1]), number
        raise self._refusal("no patch of its vision tower reaches its image tokens")

    def _refusal(self, why: str) -> UserError:
        return UserError(
            f"sinks of the vision tower of '{self.model.name}' cannot be followed: {why}",
            TIP,
        )


@dataclass
class _Changed:
    """A block of the vision tower whose output is changed at some patches. patches: how many it has."""

    block: nn.Module
    tower: Tower
    patches: int = 0

    def entering(
        self, language: Tower, batch: Batch, first: nn.Module, which: tuple[int, int] | None
    ) -> Tensor:
        """What enters the language model. which: the patches with this binary digit; all of them if None."""

        def change(module: nn.Module, args: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            tokens = states.shape[-2]
            if states.numel() != tokens * states.shape[-1]:
                raise UserError("an image is cut into several rows (tiles, windows) of its vision tower", TIP)
            is_patch = self.tower.tokens_in("patch", tokens)
            number = is_patch.cumsum(0) - 1
            self.patches = int(is_patch.sum())
            chosen = is_patch if which is None else is_patch & ((number >> which[0]) & 1 == which[1])
            noise = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0))
            noise = noise.to(states.device, states.dtype) * states.float().std().to(states.dtype)
            moved = torch.where(chosen[:, None].to(states.device), states + noise, states)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = self.block.register_forward_hook(change, prepend=True)  # before a recorder of states
        try:
            return _entering(language, batch, first)
        finally:
            handle.remove()


def _entering(language: Tower, batch: Batch, first: nn.Module) -> Tensor:
    """The states that enter the language model's first block, `[token, channel]`; the pass ends there."""
    states = list[Tensor]()

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])
        raise _Enough

    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.inference_mode(), suppress(_Enough):
            language.forward(batch)
    finally:
        handle.remove()
    return states[0][0].cpu()


def _moved(one: Tensor, other: Tensor) -> Bool[Tensor, " token"]:
    """Which tokens are not the same to the bit."""
    return (one != other).any(-1)

"""Which tokens of a diffusion transformer are of the image and which of the text; its blocks as one depth.

Image and text attend to each other in one call, whose order differs from model to model. With every attention
silenced a token is what its own stream makes of it: it follows the image or the text, and not both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.models.families.diffusers.feeding import Text
from diag.models.hooks.depth import Place
from diag.models.hooks.layers import Layer
from diag.models.hooks.meaning import Meaning, Understood
from diag.models.hooks.seam import attention_calls

IMAGES, TEXTS = "image", "text"
"""The token sets."""

BESIDE = "it is a second attention of its block, over the image alone"
"""Why SD3.5's `attn2` is no layer: its block has its place on the depth axis already."""

Run = Callable[[Tensor, Text], object]
"""Runs the transformer on latents and a text of as many rows."""


def in_depth(
    found: Meaning, run: Run, latents: Float[Tensor, "2 channel height width"], text: Text
) -> tuple[Understood, dict[str, Bool[Tensor, "1 token"]]]:
    """All blocks as one depth axis, in the order in which they run, and which tokens are of image and text.

    Flux has blocks of two kinds, one after the other, over the same tokens. A block has one place: that of
    its joint attention.
    latents: of two images. text: of one row.
    """
    streams = _streams([layer for one in found.towers for layer in one.layers], run, latents, text)
    order = {path: number for number, path in enumerate(streams)}
    joint = max(streams.values(), key=lambda stream: stream.shape[1])
    measured = {
        (layer.path, layer.run): layer
        for one in found.towers
        for layer in one.layers
        if torch.equal(streams[layer.name], joint)
    }
    blocks = dict[str, list[Place]]()
    stacks = sorted(found.towers, key=lambda one: min(order[layer.name] for layer in one.layers))
    for place in (place for one in stacks for place in one.places):
        blocks.setdefault(_block(place.path), []).append(place)
    layers, places = list[Layer](), list[Place]()
    skipped = {path: why for one in stacks for path, why in one.skipped.items()}
    for index, inside in enumerate(blocks.values()):
        chosen = next((place for place in inside if (place.path, place.run) in measured), inside[0])
        layer = measured.get((chosen.path, chosen.run))
        places.append(replace(chosen, index=index, why=None if layer else chosen.why or BESIDE))
        layers += [replace(layer, index=index)] if layer else []
        skipped |= {place.path: place.why or BESIDE for place in inside if place is not chosen}
    whole = Understood("", tuple(layers), tuple(places), skipped)
    marks = {IMAGES: joint[0], TEXTS: joint[1]}
    return whole, {name: mask[None].cpu() for name, mask in marks.items() if mask.any()}


def _streams(
    layers: Sequence[Layer], run: Run, latents: Tensor, text: Text
) -> dict[str, Bool[Tensor, "2 token"]]:
    """For each layer, in the order of running, which tokens follow the image, and which the text alone."""
    three, states = text.rows(3), text.states
    drawn = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
    other = states + drawn * (float(states.float().std().nan_to_num()) or 1.0)
    otherwise = replace(three, states=torch.cat([states, states, other]))
    found = dict[str, Tensor]()

    def silent(call: AttentionCall) -> Tensor:
        values = call.value.float()
        apart = (values[1:] - values[:1]).abs().amax((1, 3))  # [image or text, token]
        follows = apart > 1e-3 * values.abs().max()
        found[call.module] = torch.stack([follows[0], follows[1] & ~follows[0]])
        return torch.zeros_like(call.output)

    with attention_calls(layers, silent):
        run(torch.cat([latents, latents[:1]]), otherwise)
    return found


def _block(path: str) -> str:
    """The block that a module is in: its path up to the last number."""
    numbered = re.match(r".*\.\d+(?=\.|$)", path)
    return numbered[0] if numbered else path

"""Secondary attention sinks: tokens whose state takes the direction of the first token's for some layers.

Definition of arXiv 2512.22213 as its code has it, in shares of the depth.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vecdot, vector_norm

SIMILARITY = 0.9
"""A later token with this absolute cosine with the first one stands as a sink."""

LEAST, MOST = 1 / 10, 5 / 8
"""A secondary sink stands in more, and in fewer, than these shares of the layers. The code of 2512.22213 has
more than 4 layers and fewer than depth - 15: the same at 40 layers."""


def alike_first(
    states: Float[Tensor, "batch token dim"], real: Bool[Tensor, "#batch token"]
) -> tuple[Bool[Tensor, "batch token"], Float[Tensor, " batch"]]:
    """Which later tokens have nearly the direction of the first real one, and the norm of that one."""
    batch, tokens, _ = states.shape
    place = real.expand(batch, -1).int().argmax(-1)  # [batch]
    # padding may hold anything
    states = states.float().masked_fill(~real[..., None], 0.0)
    first = states[torch.arange(batch, device=place.device), place]
    norm, first_norm = vector_norm(states, dim=-1), vector_norm(first, dim=-1)
    alike = vecdot(states, first[:, None]).abs() > SIMILARITY * norm * first_norm[:, None]
    later = torch.arange(tokens, device=place.device) > place[:, None]
    return alike & later & real, first_norm


def secondary_sink_lives(
    alike: Bool[Tensor, "layer batch token"], norms: Float[Tensor, "layer batch"]
) -> tuple[Bool[Tensor, "layer batch token"], Float[Tensor, "batch token"]]:
    """Where each secondary sink is created, and the share of layers in which it stands.

    alike, norms: of `alike_first`, after each layer.
    Only layers count in which the first token itself stands as a sink: from the largest rise of its norm
    to the largest fall after that. A token that stands in too few of them is noise, one that stands in too
    many a second primary sink.
    """
    depth = len(alike)
    stands = alike
    if depth > 1:
        layer = torch.arange(depth, device=norms.device)[:, None]
        step = norms.diff(dim=0)  # [layer - 1, batch]
        start = step.argmax(0) + 1
        falls = torch.where(layer[:-1] >= start, step, torch.inf)
        end = torch.where(falls.amin(0) < 0, falls.argmin(0) + 1, depth)
        stands = alike & ((layer >= start) & (layer < end))[..., None]
    life = stands.sum(0)
    secondary = (life > max(1.0, LEAST * depth)) & (life < MOST * depth)
    created = stands & (stands.cumsum(0) == 1)
    return created & secondary, life / depth

"""Which keys each query of a call sees: the structure of its mask, read once and kept small.

Nothing here holds a token × token matrix, except where the model's mask has no structure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which keys each query sees, kept as structure wherever the mask has one.

    rule: "full" (every real key), "causal" (real keys up to oneself) or "general" (`visible_rows`).
    keys: keys that any query sees, `[batch or 1, token]`; None if all of them.
    count: visible keys of each query, `[batch or 1, head or 1, token]`.
    visible_rows: whether each query sees each key, `[batch or 1, head or 1, token, token]`; of a general
        rule only.
    mask, causal, hidden: what it was read off.
    """

    rule: str
    keys: Bool[Tensor, "#batch token"] | None
    count: Int[Tensor, "#batch #head token"]
    visible_rows: Bool[Tensor, "#batch #head token token"] | None
    mask: Tensor | None
    causal: bool
    hidden: float

    @staticmethod
    def of(
        mask: Tensor | None, causal: bool, hidden: float, output: Float[Tensor, "batch head token dim"]
    ) -> Visibility:
        """Reads the structure off the mask of a call; O(rows · token) memory beside the mask itself.

        mask, causal, hidden, output: as in `AttentionCall`.
        """
        device, tokens = output.device, output.shape[2]
        position = torch.arange(1, tokens + 1, device=device)
        read_off = (mask, causal, hidden)
        if mask is None:
            count = position if causal else torch.full_like(position, tokens)
            return Visibility("causal" if causal else "full", None, count[None, None], None, *read_off)
        whole = four_dimensional(mask)
        visible = whole if whole.dtype == torch.bool else whole > hidden
        if visible.shape[1] > 1 and bool((visible == visible[:, :1]).all()):
            visible = visible[:, :1]
        visible = visible.expand(-1, -1, tokens, tokens)
        lower = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        if causal:
            visible = visible & lower
        count = visible.sum(-1)
        if visible.shape[1] == 1:
            keys = visible[:, 0].any(1)  # [batch, key]
            kept = None if bool(keys.all()) else keys
            for rule, shape in (("full", keys[:, None, :]), ("causal", keys[:, None, :] & lower)):
                if bool((visible[:, 0] == shape).all()):
                    return Visibility(rule, kept, count, None, *read_off)
        return Visibility("general", visible.any(2).any(1), count, visible, *read_off)

    def is_of(self, mask: Tensor | None, causal: bool, hidden: float, output: Tensor) -> bool:
        """Whether this was read off these very ones; a copy of a mask is another mask."""
        same = self.mask is mask and (self.causal, self.hidden) == (causal, hidden)
        return same and self.count.shape[2] == output.shape[2] and self.count.device == output.device

    def part(self, in_batch: slice, in_head: slice) -> Visibility:
        """That of some inputs and query heads."""
        keys = None if self.keys is None else of_inputs(self.keys, in_batch)
        visible = None if self.visible_rows is None else part_of(self.visible_rows, in_batch, in_head)
        count = part_of(self.count, in_batch, in_head)
        return replace(self, keys=keys, count=count, visible_rows=visible)

    def of_rows(
        self, rows: Int[Tensor, " row"], in_batch: slice = slice(None)
    ) -> Bool[Tensor, "#batch #head #row token"]:
        """Whether the query rows see each key; what inputs, heads or rows share keeps an axis of 1."""
        if self.visible_rows is not None:
            return of_inputs(self.visible_rows, in_batch)[:, :, rows]
        position = torch.arange(self.count.shape[2], device=self.count.device)
        every = torch.ones_like(position, dtype=torch.bool)[None]
        keys = (every if self.keys is None else of_inputs(self.keys, in_batch))[:, None, None, :]
        return keys if self.rule == "full" else keys & (position <= rows[:, None])

    def sum(
        self, x: Float[Tensor, "batch kv_head token dim"], weights: Float[Tensor, "#batch #kv_head token"]
    ) -> Float[Tensor, "batch some_head some_token dim"]:
        """`Σ_j visible_ij · w_j · x_j` for every query i, O(token · dim) memory.

        The head axis of the result is that of `x`, or every query head where the mask differs
        between heads; the token axis is 1 where all queries see the same keys.
        """
        if self.keys is not None:
            weights = weights * self.keys[:, None, :]
        if self.rule == "full":
            return weights[:, :, None, :] @ x
        x = x * weights[..., None]
        if self.rule == "causal":
            return x.cumsum(2)
        assert self.visible_rows is not None
        heads = self.visible_rows.shape[1]
        if heads not in (1, x.shape[1]):
            x = x.repeat_interleave(heads // x.shape[1], 1)
        blocks = self.visible_rows.split(256, dim=2)  # each [batch or 1, head or 1, row, key]
        return torch.cat([block.to(x.dtype) @ x for block in blocks], 2)

    def count_among(self, among: Bool[Tensor, "#batch token"]) -> Tensor:
        """How many of the keys in `among` each query sees, `[batch or 1, head or 1, token or 1]`."""
        if self.keys is not None:
            among = among & self.keys
        if self.rule == "full":
            return among.sum(-1)[:, None, None]
        if self.rule == "causal":
            return among.cumsum(-1)[:, None, :]
        assert self.visible_rows is not None
        blocks = self.visible_rows.split(256, dim=2)
        return torch.cat([(block & among[:, None, None, :]).sum(-1) for block in blocks], 2)

    @property
    def sees_itself(self) -> Tensor:
        """Whether each query sees its own key, broadcastable to `[batch, head, token]`."""
        if self.rule == "general":
            assert self.visible_rows is not None
            return self.visible_rows.diagonal(dim1=-2, dim2=-1)
        if self.keys is not None:
            return self.keys[:, None, :]
        return torch.ones_like(self.count, dtype=torch.bool)


def of_inputs(x: Tensor, in_batch: slice) -> Tensor:
    """Some inputs of what has one row for each of them, or one for all."""
    return x[in_batch] if x.shape[0] > 1 else x


def part_of(x: Tensor, in_batch: slice, in_head: slice) -> Tensor:
    """Some inputs and heads of `[batch or 1, head or 1, …]`."""
    x = of_inputs(x, in_batch)
    return x[:, in_head] if x.shape[1] > 1 else x


def four_dimensional(mask: Tensor) -> Tensor:
    """A mask with its missing leading axes."""
    return mask[(None,) * (4 - mask.ndim)]

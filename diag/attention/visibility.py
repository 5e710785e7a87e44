"""Which keys each query of a call sees: the structure of its mask, read once and kept small.

Nothing here holds a token × token matrix, except where the model's mask has no structure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from diag.errors import MeasurementError

NO_WEIGHT = math.log(torch.finfo(torch.float32).tiny)
"""-87.3: so far below the largest score of a row, a weight is zero in float32."""

STEP = -NO_WEIGHT / 2
"""43.7: entries of a bias lie closer together than this. A weight of e^-43.7 = 1e-19 still is nothing beside
1 in float32, where it is favoured by another 27 in its score."""

HIDDEN = -9000.0
"""Where a head has no larger entry than this, all of its keys are hidden."""

MOST_STEPS = 32
"""How often all entries are read for where the steps lead that a few rows begin; then they are sorted."""

TRIANGLE = 32
"""How many keys are summed by one product where sums run along them."""

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""How many entries of a mask are looked at together."""


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which keys each query sees, kept as structure wherever the mask has one.

    rule: "full" (every real key), "causal" (real keys up to oneself) or "general" (`visible_rows`).
    keys: keys that any query sees, `[batch or 1, key]`; None if all of them, or where queries select theirs:
        one that none selects is a token like others, and no padding. width: how many keys there are.
    count: visible keys of each query, `[batch or 1, head or 1, token]`.
    visible_rows: whether each query sees each key, `[batch or 1, head or 1, token, key]`; of a general
        rule only.
    mask, causal: what it was read off, in the form that calls use: a plain tensor, or None.
    hidden: an additive entry at or below it hides its key (`hiding`).
    """

    rule: str
    keys: Bool[Tensor, "#batch key"] | None
    width: int
    count: Int[Tensor, "#batch #head token"]
    visible_rows: Bool[Tensor, "#batch #head token key"] | None
    mask: Tensor | None
    causal: bool
    hidden: float

    @staticmethod
    def of(
        mask: Tensor | None,
        causal: bool,
        output: Float[Tensor, "batch head token dim"],
        keys: int | None = None,
    ) -> Visibility:
        """Reads the structure off the mask of a call; O(rows · token) memory beside the mask itself.

        mask, causal, output: as in `AttentionCall`. keys: how many there are; one for each token if None.

        Raises MeasurementError for a mask of other queries or keys.
        """
        mask, causal = plain(mask, causal)
        device, tokens = output.device, output.shape[2]
        width = tokens if keys is None else keys
        position = torch.arange(1, tokens + 1, device=device)
        square = width == tokens
        if mask is None and (square or not causal):
            count = position if causal else torch.full_like(position, width)
            rule = "causal" if causal else "full"
            return Visibility(rule, None, width, count[None, None], None, mask, causal, HIDDEN)
        if mask is not None and any(
            size not in (1, most) for size, most in zip(mask.shape[-2:], (tokens, width), strict=True)
        ):
            sizes = " x ".join(map(str, mask.shape[-2:]))
            raise MeasurementError(
                f"a mask of {sizes} queries and keys is not of "
                + (f"{tokens} tokens" if square else f"{tokens} queries and {width} keys"),
                f"give one that broadcasts to [batch, head, token, {'token' if square else 'key'}]",
            )
        hidden = HIDDEN
        if mask is not None and mask.dtype != torch.bool:
            mask, hidden = hiding(mask)
        read_off = (mask, causal, hidden)
        whole = position.new_ones(1, 1, 1, 1).bool() if mask is None else four_dimensional(mask)
        visible = whole if whole.dtype == torch.bool else whole > hidden
        if visible.shape[1] > 1 and bool((visible == visible[:, :1]).all()):
            visible = visible[:, :1]
        visible = visible.expand(-1, -1, tokens, width)
        lower = torch.ones(tokens, width, dtype=torch.bool, device=device).tril()
        if causal:
            visible = visible & lower
        count = visible.sum(-1)
        if visible.shape[1] == 1 and (square or not causal):
            seen = visible[:, 0].any(1)  # [batch, key]
            kept = None if bool(seen.all()) else seen
            for rule, shape in (("full", seen[:, None, :]), ("causal", seen[:, None, :] & lower)):
                if rule == "causal" and not square:
                    continue
                if bool((visible[:, 0] == shape).all()):
                    return Visibility(rule, kept, width, count, None, *read_off)
        kept = None if square and _selects(count) else visible.any(2).any(1)
        return Visibility("general", kept, width, count, visible, *read_off)

    @staticmethod
    def of_keys(keys: Bool[Tensor, "batch token"], causal: bool) -> Visibility:
        """That of a call in which nothing is hidden but some keys from everyone; O(token) memory."""
        rule, mask = ("causal" if causal else "full"), keys[:, None, None, :]
        count = keys.cumsum(-1) if causal else keys.sum(-1, keepdim=True).expand_as(keys)
        return Visibility(rule, keys, keys.shape[1], count[:, None], None, mask, causal, HIDDEN)

    @staticmethod
    def of_scores(
        scores: Float[Tensor, "#batch #head token key"],
        output: Float[Tensor, "batch head token dim"],
        weights: Float[Tensor, "batch head token key"] | None = None,
        added: Float[Tensor, "batch head token key"] | None = None,
    ) -> Visibility:
        """Reads the structure off the scores of a softmax, to which a mask has been added already.

        weights: those that came of it, where zeros among them hide keys as well. added: they, where something
            was added to them, so that keys have weight that scores hide.
        """
        shown = shown_by(scores)
        if added is not None and shown is not None:
            shown = shown | ((added.abs() > torch.finfo(torch.float32).tiny) & shown.any(-1, keepdim=True))
        if weights is not None:
            shown = weights != 0 if shown is None else shown & (weights != 0)
        read = Visibility.of(shown, False, output, scores.shape[-1])
        return replace(read, mask=None, causal=read.rule == "causal")

    def is_of(self, mask: Tensor | None, causal: bool, output: Tensor, keys: int) -> bool:
        """Whether this was read off these very ones; a copy of a mask is another mask."""
        same = self.mask is mask and self.causal == causal and self.width == keys
        return same and self.count.shape[2] == output.shape[2] and self.count.device == output.device

    def part(self, in_batch: slice, in_head: slice) -> Visibility:
        """That of some inputs and query heads."""
        keys = None if self.keys is None else of_inputs(self.keys, in_batch)
        visible = None if self.visible_rows is None else part_of(self.visible_rows, in_batch, in_head)
        count = part_of(self.count, in_batch, in_head)
        return replace(self, keys=keys, count=count, visible_rows=visible)

    def of_rows(
        self, rows: Int[Tensor, " row"], in_batch: slice = slice(None)
    ) -> Bool[Tensor, "#batch #head #row key"]:
        """Whether the query rows see each key; what inputs, heads or rows share keeps an axis of 1."""
        if self.visible_rows is not None:
            return of_inputs(self.visible_rows, in_batch)[:, :, rows]
        position = torch.arange(self.width, device=self.count.device)
        every = torch.ones_like(position, dtype=torch.bool)[None]
        keys = (every if self.keys is None else of_inputs(self.keys, in_batch))[:, None, None, :]
        return keys if self.rule == "full" else keys & (position <= rows[:, None])

    def sum(
        self, x: Float[Tensor, "batch kv_head key dim"], weights: Float[Tensor, "#batch #kv_head key"]
    ) -> Float[Tensor, "batch some_head some_token dim"]:
        """`Σ_j visible_ij · w_j · x_j` for every query i, O(token · dim) memory.

        The head axis of the result is that of `x`, or every query head where the mask differs
        between heads; the token axis is 1 where all queries see the same keys.
        """
        if self.keys is not None:
            weights = weights * self.keys[:, None, :]
        if self.rule == "full":
            return weights[:, :, None, :] @ x
        if self.rule == "causal":
            return prefix_sums(x, weights)
        x = x * weights[..., None]
        assert self.visible_rows is not None
        heads = self.visible_rows.shape[1]
        if heads not in (1, x.shape[1]):
            x = x.repeat_interleave(heads // x.shape[1], 1)
        blocks = self.visible_rows.split(256, dim=2)  # each [batch or 1, head or 1, row, key]
        return torch.cat([block.to(x.dtype) @ x for block in blocks], 2)

    def count_among(self, among: Bool[Tensor, "#batch key"]) -> Tensor:
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
        """Whether each query sees its own key, where it has one, broadcastable to `[batch, head, token]`."""
        if self.rule == "general":
            assert self.visible_rows is not None
            return self.visible_rows.diagonal(dim1=-2, dim2=-1)
        if self.keys is not None:
            return self.keys[:, None, :]
        return torch.ones_like(self.count, dtype=torch.bool)


def _selects(count: Int[Tensor, "batch head token"]) -> bool:
    """Whether each query of a mask without structure sees as many keys as all others do, or all up to itself.

    Padding that is hidden from all leaves fewer to the queries at the edges of a window.
    """
    most = count.amax()
    position = torch.arange(1, count.shape[-1] + 1, device=count.device)
    return bool((count == most).all() or (count == position.clamp(max=most)).all())


def prefix_sums(
    x: Float[Tensor, "batch head key dim"], weights: Float[Tensor, "#batch #head key"]
) -> Float[Tensor, "batch head key dim"]:
    """`Σ_{j ≤ i} w_j x_j` for every i: products with triangles of the weights, which are faster than one sum
    after the other.
    """
    keys = x.shape[2]
    if missing := -keys % TRIANGLE:
        x, weights = pad(x, (0, 0, 0, missing)), pad(weights, (0, missing))
    triangle = torch.ones(TRIANGLE, TRIANGLE, dtype=x.dtype, device=x.device).tril()
    parts = x.unflatten(2, (-1, TRIANGLE))  # [batch, head, part, TRIANGLE, dim]
    sums = (triangle * weights.unflatten(2, (-1, 1, TRIANGLE))) @ parts
    sums[:, :, 1:] += sums[:, :, :-1, -1:].cumsum(2)
    return sums.flatten(2, 3)[:, :, :keys]


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


def plain(mask: Tensor | None, causal: bool) -> tuple[Tensor | None, bool]:
    """A mask and whether the call is causal besides, with PyTorch's `CausalBias` as what it stands for.

    Its objects hold no mask: what is in their memory has no meaning. One that is aligned to the last of more
    keys than queries is left: no call on its own tokens has it.
    """
    if mask is None or type(mask) is Tensor:
        return mask, causal
    from torch.nn.attention.bias import CausalBias, CausalVariant  # takes a second; theirs is imported

    if not isinstance(mask, CausalBias):
        return mask, causal
    square = mask.seq_len_q == mask.seq_len_kv
    return (None, True) if square or mask.variant == CausalVariant.UPPER_LEFT else (mask, causal)


def hiding(mask: Float[Tensor, "*axes"]) -> tuple[Float[Tensor, "*axes"], float]:
    """The entry at or below which an additive mask hides a key, and the mask that this holds for.

    What is added to a score is a mask's or a distance's, and both may leave a weight of exactly zero: -1e4,
    -1e3, -100 beside a learned bias, and -1024 of the 2,048th key away. What tells them apart is that a bias
    goes down in steps and a mask at once. So, of the entries of a head, those are hidden that lie more than
    87.3 (`NO_WEIGHT`) below the largest, with nothing in the 43.7 (`STEP`) above them. A row that has no
    other entries sees nothing, though a softmax over equal entries is uniform: it is padding's. Infinity
    always hides; where a head has no entry above `HIDDEN`, all of them do.

    The mask is the one that was given, unless no entry parts the seen from the hidden of all heads: then it
    is a copy with -inf for what is hidden.
    """
    entries = four_dimensional(mask) if mask.ndim <= 4 else mask.flatten(0, -4)
    for axis in range(4):
        entries = entries if entries.stride(axis) else entries.narrow(axis, 0, 1)
    seen, away = _levels(entries)
    if away.amax() < seen.amin():
        return mask, (away.amax().item() + seen.amin().item()) / 2
    apart = four_dimensional(mask) <= (away + seen)[:, None, None] / 2
    return mask.masked_fill(apart.reshape(mask.shape), -torch.inf), -torch.inf


def shown_by(
    scores: Float[Tensor, "#batch #head token key"],
) -> Bool[Tensor, "#batch #head token key"] | None:
    """Which keys have weight after a softmax over the last axis, by the rule of `hiding`; None where all do.

    Scores of one row are compared with its largest. Block by block: no copy of the scores is made.
    """
    top, low = scores.amax(-1, keepdim=True), scores.amin(-1, keepdim=True)
    nothing = top <= HIDDEN
    if not bool(((low - top < NO_WEIGHT) | nothing).any()):
        return None
    shown = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    rows = max(1, BLOCK_ELEMENTS["cuda" if scores.is_cuda else "cpu"] // max(1, scores[:, :, 0].numel()))
    least, close = NO_WEIGHT, list[Tensor]()
    for part, highest in zip(scores.split(rows, 2), top.split(rows, 2), strict=True):
        below = (part - highest).float()
        close.append(below[(below <= NO_WEIGHT) & (below > NO_WEIGHT - STEP)])
    if any(x.numel() for x in close):  # are they steps of what is seen, or a mask?
        least = _steps_down(scores, top)
    for start in range(0, scores.shape[2], rows):
        at = slice(start, start + rows)
        torch.gt((scores[:, :, at] - top[:, :, at]).float(), least, out=shown[:, :, at])
    return shown & ~nothing


def _steps_down(scores: Tensor, top: Tensor) -> float:
    """Below which difference from the largest score of a row a step is too long for a bias. Sorts them."""
    below = (scores - top).float()
    levels = below[below > HIDDEN].sort(descending=True).values
    apart = levels[:-1] - levels[1:] >= STEP
    apart &= levels[1:] <= NO_WEIGHT
    return (levels[:-1][apart][0] - STEP / 2).item() if bool(apart.any()) else HIDDEN


def _levels(entries: Float[Tensor, "batch head row key"]) -> tuple[Tensor, Tensor]:
    """The smallest seen and the largest hidden entry of each head, `[head]` each; the latter may be -inf."""
    top, low = _largest(entries), _smallest(entries)
    least = top + NO_WEIGHT  # what is above it is seen
    seen, away = low, torch.full_like(low, -torch.inf)
    if not bool((low > least).all()):
        # the longest distances are in the first and the last rows
        seen = _joined_to(top, entries[:, :, [0, entries.shape[2] // 2, -1]])
        for _ in range(MOST_STEPS):
            away = _largest(entries, below=seen)
            joined = (away > _below(seen, entries)) | (away > least)
            if not bool(joined.any()):
                break
            seen = away.where(joined, seen)
            seen = seen.minimum(_smallest(entries, above=_below(seen, entries)))
        else:
            seen = _joined_to(top, entries)
            away = _largest(entries, below=seen)
    known = top.isfinite() & (top > HIDDEN)
    return seen.where(known, 0.0), away.where(known, HIDDEN)


def _joined_to(
    top: Float[Tensor, " head"], entries: Float[Tensor, "batch head row key"]
) -> Float[Tensor, " head"]:
    """How far down the steps of these entries lead from the largest one. Sorts them."""
    down = entries.transpose(0, 1).flatten(1).to(top.dtype).sort(-1, descending=True).values
    down = torch.cat([top[:, None], down], 1)  # [head, entry]
    joined = (down[:, 1:] > _below(down[:, :-1], entries)) | (down[:, 1:] > top[:, None] + NO_WEIGHT)
    return down.gather(1, joined.long().cumprod(1).sum(1, keepdim=True))[:, 0]


def _below(seen: Tensor, entries: Tensor) -> Tensor:
    """The end of a step down; further where the format of the entries has no number in it."""
    return seen - (2 * torch.finfo(entries.dtype).eps * seen.abs()).clamp(min=STEP)


def _largest(
    entries: Float[Tensor, "batch head row key"], below: Float[Tensor, " head"] | None = None
) -> Float[Tensor, " head"]:
    """The largest entry of each head, or of those below a bound, -inf where there are none."""
    if below is None:
        return _of_heads(entries, torch.amax)
    bound = below[:, None, None]
    return _of_heads(entries, torch.amax, lambda x: x.where(x < bound, -torch.inf))


def _smallest(
    entries: Float[Tensor, "batch head row key"], above: Float[Tensor, " head"] | None = None
) -> Float[Tensor, " head"]:
    """The smallest entry of each head, or of those above a bound, inf where there are none."""
    if above is None:
        return _of_heads(entries, torch.amin)
    bound = above[:, None, None]
    return _of_heads(entries, torch.amin, lambda x: x.where(x > bound, torch.inf))


def _of_heads(
    entries: Float[Tensor, "batch head row key"],
    extreme: Callable[..., Tensor],
    among: Callable[[Tensor], Tensor] = lambda x: x,
) -> Float[Tensor, " head"]:
    """An extreme of each head's entries, at least float32; in blocks of rows, so that no mask is copied."""
    rows = max(1, BLOCK_ELEMENTS["cuda" if entries.is_cuda else "cpu"] // max(1, entries[:, :, 0].numel()))
    found = extreme(torch.stack([extreme(among(x), (0, 2, 3)) for x in entries.split(rows, 2)]), 0)
    return found.to(torch.promote_types(found.dtype, torch.float32))

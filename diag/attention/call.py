"""One attention call: the queries, keys, values and output of one layer as the model used them.

Everything that is measured starts from an `AttentionCall`. No function here holds a token × token matrix,
except the mask that the model itself made.

Notation of the formulas: `s_ij = scale · q_i·k_j + mask_ij`, `lse_i = log Σ_j exp s_ij`,
`A_ij = exp(s_ij - lse_i)`, `y_i = Σ_j A_ij v_j`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diag.attention.sampling import RowSample
from diag.errors import MeasurementError

if TYPE_CHECKING:
    from diag.attention.statistics import SoftmaxStatistics

HIDDEN = -9000.0
"""An additive mask entry at or below this hides the key: exp(-9000) is zero in every float format.
Libraries write -inf, the smallest float or -10000; no position bias in use reaches it."""

TENSOR_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""How many numbers per thread some heads' queries or values may be where they are read head by head."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of one layer's attention, before the output projection.

    With grouped heads (`kv_head < head`) query head `h` reads KV head `h // (head // kv_head)`.
    Either `query` and `key` are given, or the `pattern` itself (the route of libraries that
    materialise it).

    mask: True where a key is visible (bool), or added to the scores (float), broadcastable to
        `[batch, head, token, token]`; None for no mask. `causal` is in addition to it.
    hidden: the additive entry at or below which a key is hidden.
    log_normaliser: `lse_i`, where the attention kernel returned it.
    sample: the query rows on which what needs whole rows of the pattern is computed; None for all.
    """

    layer: int
    module: str
    query: Float[Tensor, "batch head token dim"] | None
    key: Float[Tensor, "batch kv_head token dim"] | None
    value: Float[Tensor, "batch kv_head token value_dim"]
    output: Float[Tensor, "batch head token value_dim"]
    mask: Tensor | None
    causal: bool
    scale: float
    hidden: float = HIDDEN
    log_normaliser: Float[Tensor, "batch head token"] | None = None
    pattern: Float[Tensor, "batch head token token"] | None = None
    sample: RowSample | None = None

    @property
    def batch(self) -> int:
        """Rows of the call; more than the inputs of the batch where windows sit in the batch."""
        return self.output.shape[0]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.output.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens, as queries and as keys."""
        return self.output.shape[2]

    @property
    def kv_heads(self) -> int:
        """Key and value heads; a divisor of `heads`."""
        return self.value.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def query_heads(self, kv_heads: slice) -> slice:
        """The query heads that read some KV heads."""
        return slice(kv_heads.start * self.group, kv_heads.stop * self.group)

    @cached_property
    def visibility(self) -> Visibility:
        """Which keys each query sees."""
        return Visibility.of(self)

    @cached_property
    def softmax(self) -> SoftmaxStatistics:
        """The statistics of every row of the pattern, computed once."""
        from diag.attention.softmax import softmax_statistics  # it stands on this module

        return softmax_statistics(self)

    @cached_property
    def controls(self) -> Float[Tensor, "control batch head token"]:
        """What goes with the entropy of a row and costs no pattern: for estimates from sampled rows."""
        from diag.attention.softmax import row_controls

        return row_controls(self)


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which keys each query sees, kept as structure wherever the mask has one.

    rule: "full" (every real key), "causal" (real keys up to oneself) or "general" (`visible_rows`).
    keys: keys that any query sees, `[batch or 1, token]`; None if all of them.
    count: visible keys of each query, `[batch or 1, head or 1, token]`.
    """

    rule: str
    keys: Bool[Tensor, "#batch token"] | None
    count: Tensor
    visible_rows: Tensor | None = None

    @staticmethod
    def of(call: AttentionCall) -> Visibility:
        """Reads the structure off a call's mask; O(rows · token) memory beside the mask itself."""
        device, tokens = call.output.device, call.tokens
        position = torch.arange(1, tokens + 1, device=device)
        if call.mask is None:
            count = position if call.causal else torch.full_like(position, tokens)
            return Visibility("causal" if call.causal else "full", None, count[None, None])
        mask = four_dimensional(call.mask)
        visible = mask if mask.dtype == torch.bool else mask > call.hidden
        if visible.shape[1] > 1 and bool((visible == visible[:, :1]).all()):
            visible = visible[:, :1]
        visible = visible.expand(-1, -1, tokens, tokens)
        lower = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        if call.causal:
            visible = visible & lower
        count = visible.sum(-1)
        if visible.shape[1] == 1:
            keys = visible[:, 0].any(1)  # [batch, key]
            kept = None if bool(keys.all()) else keys
            for rule, shape in (("full", keys[:, None, :]), ("causal", keys[:, None, :] & lower)):
                if bool((visible[:, 0] == shape).all()):
                    return Visibility(rule, kept, count)
        return Visibility("general", visible.any(2).any(1), count, visible)

    def part(self, in_batch: slice, in_head: slice) -> Visibility:
        """That of some inputs and query heads."""

        keys = None if self.keys is None else of_inputs(self.keys, in_batch)
        visible = None if self.visible_rows is None else part_of(self.visible_rows, in_batch, in_head)
        return Visibility(self.rule, keys, part_of(self.count, in_batch, in_head), visible)

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


def without_constant(call: AttentionCall, constant: Float[Tensor, " channel"]) -> AttentionCall:
    """The call with a constant c taken out of every value, and so out of every output.

    Rows of A sum to 1, so A (V - 1 cᵀ) = Y - 1 cᵀ exactly. A row that sees no key sums to 0 and keeps
    its output. Queries, keys, mask and pattern stay.

    constant: c of each of the model's KV heads, one after the other. The model may have repeated
        them in the call.

    Raises MeasurementError if the call's heads cannot be those of the constant.
    """
    heads, rest = divmod(constant.numel(), call.value.shape[-1])
    if rest or heads == 0 or call.kv_heads % heads:
        raise MeasurementError(
            f"layer '{call.module}': a constant of {constant.numel()} numbers does not fit "
            f"{call.kv_heads} value heads of {call.value.shape[-1]}",
            "please report the model; without --values bias-free it can be measured",
        )
    each = constant.to(call.value.device).float().view(heads, 1, -1)
    each = each.repeat_interleave(call.kv_heads // heads, 0)  # [kv_head, 1, dim]
    sees = (call.visibility.count > 0)[..., None]
    output = call.output - torch.where(sees, each.repeat_interleave(call.group, 0), 0.0)
    changed = replace(
        call, value=(call.value - each).to(call.value.dtype), output=output.to(call.output.dtype)
    )
    changed.__dict__["visibility"] = call.visibility  # that of the mask, which several layers may share
    return changed


def all_rows(call: AttentionCall) -> AttentionCall:
    """The call without its sample of rows; what was computed of all rows is kept."""
    whole = replace(call, sample=None, log_normaliser=call.softmax.log_normaliser)
    whole.__dict__["visibility"] = call.visibility
    return whole


def head_chunks(call: AttentionCall, width: int) -> Iterator[tuple[slice, slice]]:
    """Some inputs and KV heads at a time, in order, so that on the CPU what is made of them stays in cache.

    width: numbers per token and query head.
    """
    number = max(1, of_threads(TENSOR_ELEMENTS, call.output.device) // (call.group * call.tokens * width))
    heads_at_once = -(-call.kv_heads // -(-call.kv_heads // number))  # parts of about one size
    batch_at_once = max(1, number // call.kv_heads)
    for b in range(0, call.batch, batch_at_once):
        for h in range(0, call.kv_heads, heads_at_once):
            yield (
                slice(b, min(b + batch_at_once, call.batch)),
                slice(h, min(h + heads_at_once, call.kv_heads)),
            )


def of_inputs(x: Tensor, in_batch: slice) -> Tensor:
    """Some inputs of what has one row for each of them, or one for all."""
    return x[in_batch] if x.shape[0] > 1 else x


def part_of(x: Tensor, in_batch: slice, in_head: slice) -> Tensor:
    """Some inputs and heads of `[batch or 1, head or 1, …]`."""
    x = of_inputs(x, in_batch)
    return x[:, in_head] if x.shape[1] > 1 else x


def of_threads(elements: Mapping[str, int], device: torch.device) -> int:
    """A block's size from a table by device; on a CPU that of one thread times their number."""
    return elements["cuda"] if device.type == "cuda" else elements["cpu"] * torch.get_num_threads()


def first_key(call: AttentionCall) -> Tensor:
    """Index of the first key that anyone sees, `[batch]`; 0 unless padding is on the left."""
    keys = call.visibility.keys
    if keys is None:
        return torch.zeros(call.batch, dtype=torch.long, device=call.output.device)
    return keys.int().argmax(-1).expand(call.batch)


def four_dimensional(mask: Tensor) -> Tensor:
    """A mask with its missing leading axes."""
    return mask[(None,) * (4 - mask.ndim)]

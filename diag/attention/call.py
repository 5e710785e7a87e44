"""One attention call: the queries, keys, values and output of one layer as the model used them.

Everything that is measured starts from an `AttentionCall`. It is data: what is computed of it is kept by
whoever measures (`CallStatistics`, `diag.attention.softmax_statistics`). No function here holds a token ×
token matrix.

Notation of the formulas: `s_ij = scale · q_i·k_j + mask_ij`, `lse_i = log Σ_j exp s_ij`,
`A_ij = exp(s_ij - lse_i)`, `y_i = Σ_j A_ij v_j + o_i`; i and j are tokens, and o_i is what comes of keys
that are none (`outside`), as a rule nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diag.attention.sampling import RowSample
from diag.attention.visibility import Visibility

KeysOf = Literal["own", "pooled", "others"]

TENSOR_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""How many numbers per thread some heads' queries or values may be where they are read head by head."""


@dataclass(frozen=True, eq=False)
class WeightMap:
    """One of the softmax maps of which a layer makes its weights: A = Σ_k c_k A_k.

    query, key, scale, log_normaliser: as in `AttentionCall`, of this map. coefficient: c_k of each query row.
    """

    query: Float[Tensor, "batch head token dim"]
    key: Float[Tensor, "batch kv_head key dim"]
    scale: float
    coefficient: Float[Tensor, "#batch #head #token"]
    log_normaliser: Float[Tensor, "batch head token"] | None = None


@dataclass(frozen=True, eq=False, repr=False)
class AttentionCall:
    """One call of one layer's attention, before the output projection.

    With grouped heads (`kv_head < head`) query head `h` reads KV head `h // (head // kv_head)`.
    Either `query` and `key` are given, or the `pattern` itself (the route of libraries that
    materialise it), or the `maps` that a layer adds up, over the same values and under the same mask. The
    weights of added maps, and of a pattern that was changed before it met the values, may be negative, and
    their rows need not sum to 1.

    Keys that are no tokens (sinks, memory, bias and zero keys) are in the softmax and nowhere in the call:
    not in `key`, `value`, `mask` or `pattern`, whose rows then sum to less than 1. `outside` tells of them.

    Where none of query and key, pattern and maps is given, the layer has no softmax and its weights are
    nowhere: values and outputs are all that is known of it.

    Where keys are not those of the queries' own tokens, there may be more or fewer of them, and no token has
    a value v_i of this layer: `keys_of` says whose they are.


    mask: True where a key is visible (bool), or added to the scores (float), broadcastable to
        `[batch, head, token, key]`; None for no mask. `causal` is in addition to it. What hides a key
        is decided by its weight (`diag.attention.visibility.hiding`).
    log_normaliser: `lse_i`, where the attention kernel returned it. It counts keys that are no tokens, too:
        where there are such, it has to be given beside `query` and `key`, or for each of the `maps`.
    outside: `o_i = Σ_e A_ie v_e` over the keys e that are no tokens, broadcastable to the output; None where
        all keys are tokens. Sinks have no value: theirs is a zero, `output.new_zeros(1, 1, 1, 1)`.
    keys_of: "own" (key i is that of the token of query i), "pooled" (keys of the same tokens, pooled or
        strided in equal squares, in their order) or "others" (cross-attention, and whatever else).
    padding: tokens that stand for nothing, such as those that fill up windows; they are in the softmax, and
        no number is of them. None for none.
    sample: the query rows on which what needs whole rows of the pattern is computed; None for all.
    visibility: which keys each query sees. It is read off `mask` and `causal`, unless one that was read off
        these very ones is given; so `dataclasses.replace` carries it along, and layers that share a mask
        share it.
    """

    layer: int
    module: str
    query: Float[Tensor, "batch head token dim"] | None
    key: Float[Tensor, "batch kv_head key dim"] | None
    value: Float[Tensor, "batch kv_head key value_dim"]
    output: Float[Tensor, "batch head token value_dim"]
    mask: Tensor | None
    causal: bool
    scale: float
    log_normaliser: Float[Tensor, "batch head token"] | None = None
    pattern: Float[Tensor, "batch head token key"] | None = None
    maps: tuple[WeightMap, ...] = ()
    outside: Float[Tensor, "#batch #head #token #value_dim"] | None = None
    keys_of: KeysOf = "own"
    padding: Bool[Tensor, "batch token"] | None = None
    sample: RowSample | None = None
    visibility: Visibility = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        given = self.visibility
        if given is None or not given.is_of(self.mask, self.causal, self.output, self.keys):
            read = Visibility.of(self.mask, self.causal, self.output, self.keys)
            for name, value in (("visibility", read), ("mask", read.mask), ("causal", read.causal)):
                object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        """In one line: whose call it is, and the sizes of what it returns; tensors are in the fields."""
        heads = f"{self.heads} heads" + (f" ({self.kv_heads} of values)" if self.group > 1 else "")
        size = f"{self.batch} × {heads} × {self.tokens} tokens × {self.output.shape[-1]}"
        seen = ", causal" if self.causal else ", masked" if self.mask is not None else ""
        kind = f"{str(self.output.dtype).removeprefix('torch.')} on {self.output.device}"
        return f"AttentionCall(layer {self.layer} '{self.module}': {size}{seen}, {kind})"

    @property
    def has_pattern(self) -> bool:
        """Whether weights are known, or can be made; not of a layer without softmax."""
        return self.query is not None or self.pattern is not None or bool(self.maps)

    @property
    def hidden(self) -> float:
        """An entry of an additive mask at or below this hides its key."""
        return self.visibility.hidden

    @property
    def own_keys(self) -> bool:
        """Whether key i is that of the token of query i."""
        return self.keys_of == "own"

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
        """Tokens: queries, and as a rule keys as well."""
        return self.output.shape[2]

    @property
    def keys(self) -> int:
        """Keys; as many as tokens wherever they are the tokens' own."""
        return self.value.shape[2]

    @property
    def kv_heads(self) -> int:
        """Key and value heads; a divisor of `heads`."""
        return self.value.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def of_map(self, one: WeightMap) -> AttentionCall:
        """One of the maps as a call, for what is read off weights alone: its output is that of all maps."""
        return replace(
            self,
            query=one.query,
            key=one.key,
            scale=one.scale,
            log_normaliser=one.log_normaliser,
            maps=(),
        )

    @property
    def is_softmax(self) -> bool:
        """Whether A is a softmax over tokens alone: rows that see a key sum to 1 by the way they are made."""
        plain = self.pattern is None and self.outside is None and not self.maps
        return plain and self.has_pattern

    def outside_at(self, rows: Tensor | slice) -> Float[Tensor, "#batch #head #row #value_dim"] | float:
        """What the outputs of the query rows hold that comes of no token, at least float32."""
        if self.outside is None:
            return 0.0
        part = self.outside if self.outside.shape[2] == 1 else self.outside[:, :, rows]
        return part.to(torch.promote_types(part.dtype, torch.float32))

    def query_heads(self, kv_heads: slice) -> slice:
        """The query heads that read some KV heads."""
        return slice(kv_heads.start * self.group, kv_heads.stop * self.group)


def head_chunks(call: AttentionCall, width: int) -> Iterator[tuple[slice, slice]]:
    """Some inputs and KV heads at a time, in order, so that on the CPU what is made of them stays in cache.

    width: numbers per token and query head.
    """
    number = max(1, of_threads(TENSOR_ELEMENTS, call.output.device) // (call.group * call.keys * width))
    heads_at_once = -(-call.kv_heads // -(-call.kv_heads // number))  # parts of about one size
    batch_at_once = max(1, number // call.kv_heads)
    for b in range(0, call.batch, batch_at_once):
        for h in range(0, call.kv_heads, heads_at_once):
            yield (
                slice(b, min(b + batch_at_once, call.batch)),
                slice(h, min(h + heads_at_once, call.kv_heads)),
            )


def repeats(value: Float[Tensor, "*any head token value_dim"]) -> int:
    """How many heads after each other hold the same values, in all places: KV heads that were written out.

    Models do that where heads are grouped and there is a mask, or attention is computed step by step.
    """
    heads = value.shape[-3]
    for group in sorted((number for number in range(2, heads + 1) if heads % number == 0), reverse=True):
        grouped = value.unflatten(-3, (heads // group, group))
        if torch.equal(grouped, grouped[..., :1, :, :].expand_as(grouped)):
            return group
    return 1


def of_threads(elements: Mapping[str, int], device: torch.device) -> int:
    """A block's size from a table by device; on a CPU that of one thread times their number."""
    return elements["cuda"] if device.type == "cuda" else elements["cpu"] * torch.get_num_threads()


def first_key(call: AttentionCall) -> Tensor:
    """Index of the first key that anyone sees, `[batch]`; 0 unless padding is on the left."""
    keys = call.visibility.keys
    if keys is None:
        return torch.zeros(call.batch, dtype=torch.long, device=call.output.device)
    return keys.int().argmax(-1).expand(call.batch)

"""Which query rows stand for all of them where a sequence is long, and how sure a mean over them is.

A mean over query rows is estimated from rows drawn at random in strata of neighbouring positions: two
rows per stratum, so that the position is covered evenly and the error of the estimate can be told from
how far the two lie apart. Every input has rows of its own, drawn from its id; all heads of a layer
share them. Tokens of a kind of which there are few (class token, registers) are all taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EXACT_TOKENS = 2048
"""Up to so many tokens every query row is computed."""

SAMPLED_ROWS = 1024
"""Query rows of each kind of token that stand for all of them in longer sequences."""


@dataclass(frozen=True)
class RowSampling:
    """How query rows are chosen.

    rows: how many of each kind of token; even. above: sequences of more tokens than this are sampled,
    None for never. seed: draws others.
    """

    rows: int = SAMPLED_ROWS
    above: int | None = EXACT_TOKENS
    seed: int = 0

    def applies(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens is sampled."""
        return self.above is not None and tokens > max(self.above, self.rows)


@dataclass(frozen=True, eq=False)
class RowSample:
    """The drawn rows of each input. A row that fills up has weight 0 and stands at the end.

    index: positions, ascending. weight: how many rows each stands for, itself among them.
    partner: where in the sample the other row of its stratum is; itself where it stands for itself only.
    """

    index: Int[Tensor, "batch row"]
    weight: Float[Tensor, "batch row"]
    partner: Int[Tensor, "batch row"]

    @property
    def rows(self) -> int:
        """Rows per input."""
        return self.index.shape[1]

    def at(self, x: Tensor) -> Tensor:
        """`[batch or 1, head or 1, token]` at the drawn rows, `[batch, head or 1, row]`."""
        index = self.index[:, None].expand(-1, x.shape[1], -1)
        return x.expand(self.index.shape[0], -1, -1).gather(-1, index)


def sample_rows(
    sets: Sequence[Bool[Tensor, "#batch token"]], keys: Sequence[str], sampling: RowSampling
) -> RowSample:
    """Draws rows such that each of the sets is covered.

    sets: rows that will be averaged over. Tokens that are in the same sets are of one kind, and every kind
        has its own strata; tokens in no set are not drawn. keys: what tells inputs apart.
    """
    device = sets[0].device
    kind = sum(part.long() << bit for bit, part in enumerate(sets))
    assert isinstance(kind, Tensor)
    of_inputs = kind.expand(len(keys), -1).cpu()
    drawn = [_draw_one(own, key, sampling) for own, key in zip(of_inputs, keys, strict=True)]
    longest = max(len(index) for index, _, _ in drawn)
    index = torch.zeros(len(drawn), longest, dtype=torch.long)
    weight = torch.zeros(len(drawn), longest, dtype=torch.float32)
    partner = torch.arange(longest).expand(len(drawn), -1).clone()
    for number, (places, weights, partners) in enumerate(drawn):
        count = len(places)
        index[number, :count], weight[number, :count], partner[number, :count] = places, weights, partners
        index[number, count:] = places[-1] if count else 0
    return RowSample(index.to(device), weight.to(device), partner.to(device))


def _draw_one(
    kind: Int[Tensor, " token"], key: str, sampling: RowSampling
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"], Int[Tensor, " row"]]:
    """Positions in order with their weights and partners, of one input."""
    nothing = torch.zeros(0, dtype=torch.long)
    index, weight, other = [nothing], [torch.zeros(0, dtype=torch.float32)], [nothing]
    for one in kind[kind > 0].unique().tolist():
        places = (kind == one).nonzero()[:, 0]
        if len(places) <= sampling.rows:
            chosen, weights, partners = places, torch.ones(len(places), dtype=torch.float32), places
        else:
            ranks, weights = _two_per_stratum(len(places), sampling.rows // 2, f"{sampling.seed}/{key}/{one}")
            chosen, partners = places[ranks].flatten(), places[ranks.flip(1)].flatten()
        index.append(chosen)
        weight.append(weights)
        other.append(partners)
    together, order = torch.cat(index).sort()
    return together, torch.cat(weight)[order], torch.searchsorted(together, torch.cat(other)[order])


def _two_per_stratum(
    count: int, strata: int, key: str
) -> tuple[Int[Tensor, "stratum 2"], Float[Tensor, " row"]]:
    """Two different ranks out of each of the equal strata of `count`, and how many each stands for."""
    bounds = torch.arange(strata + 1) * count // strata
    sizes = bounds.diff()
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    random = torch.rand(2, strata, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first = (random[0] * sizes).long()
    second = (random[1] * (sizes - 1)).long()
    second += second >= first
    ranks = torch.stack([first, second], 1).sort(1).values + bounds[:-1, None]
    return ranks, (sizes.float() / 2).repeat_interleave(2)

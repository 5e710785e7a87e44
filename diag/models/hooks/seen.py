"""One attention call as far as it is understood, and the module that made it while that runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from diag.attention.call import KeysOf
from diag.models.hooks.layout import PLAIN, Layout, merged_layout, plain_layout, sized_layout
from diag.models.hooks.linear import Recurrence
from diag.models.hooks.mode import Frame

ABOVE = 3
"""How many modules, from the one that called attention upwards, are asked: a block runs its attention, which
may run another one that is handed queries, keys and values."""

OWN, MIXED, SHARED, ELSEWHERE = "own tokens", "mixed values", "an earlier layer's values", "other tokens"
POOLED = "the same tokens in other numbers"
CHANNELS, HEADS, EVERYTHING, ORDER = "channels", "heads", "everything", "another order"
NOT_LINEAR, LEARNED, NO_QUERIES = "not linear", "learned weights", "no queries"
OVERLAP, EXPERTS = "overlapping windows", "experts"
REASONS = {
    CHANNELS: "it attends over channels, not over tokens",
    HEADS: "it attends over heads, not over tokens",
    EVERYTHING: "each of its values is made of many tokens",
    OVERLAP: "its windows overlap: a token is a key of several of them",
    EXPERTS: "it weighs what is made of one token (a mixture of experts)",
    ORDER: "its keys are not in the order of its queries",
    ELSEWHERE: "its keys are not the tokens of its queries (cross-attention)",
    NOT_LINEAR: "what it makes of its values is not linear in them",
    LEARNED: "its weights follow nothing that it reads: a learned matrix mixes its tokens",
    NO_QUERIES: "none of its queries follows a token: they are learned, or its softmax is not over keys",
}
"""What the axis test found -> why such a call is not measured."""


@dataclass(eq=False)
class Seen:
    """One attention call, as far as it is understood.

    path, run, number: of the module, which run of it, and which call in that run.
    print: of V, a number per token, `[…, token]`, in which two passes differ where V does.
    kind: what the axis test found; None where it could not be asked. why: it is not measured, if so.
    asked: whether it was. touched: whether the one changed element reached it.
    sizes: numbers of queries and keys, where they differ. keys_of: as in `AttentionCall`.
    adds_up: whether it is one of several maps of a sum.
    recurrence: of a mixer without softmax, which stands in for its call; its output stands for its queries.
    keys: which keys a mask shows to anyone, `[row, token]`. first_alone: the first token sees only itself.
    extra: how many keys in front of its tokens and behind them are none. unequal: there may be such, or
        tokens that were pooled to keys or queries.
    changed: along the first axis, where V did. rows_read: how many rows its module was given.
    open: how many more modules may be asked. query: or `scores`, where the model multiplies weights itself.
    """

    path: str
    run: int
    number: int
    print: Tensor
    kind: str | None = None
    why: str | None = None
    asked: bool = False
    touched: bool = False
    unequal: bool = False
    sizes: tuple[int, int] | None = None
    keys_of: KeysOf = "own"
    extra: tuple[int, int] = (0, 0)
    layout: Layout | None = None
    adds_up: bool = False
    recurrence: Recurrence | None = None
    keys: Tensor | None = None
    first_alone: bool = False
    open: int = ABOVE
    query: Tensor | None = None
    scores: Tensor | None = None
    value: Tensor | None = None
    output: Tensor | None = None
    changed: Tensor | None = None
    rows_read: int | None = None
    widths: list[int] = field(default_factory=list)

    def is_open(self, frame: Running) -> bool:
        """Whether a module may tell more: one that runs a recurrence only may have mixed values before it."""
        alone = self.recurrence is not None and len(frame.made) == 1
        return self.kind is None or (self.kind == OWN and alone)

    def waits(self, frame: Running) -> bool:
        """Whether what runs a module may tell more, also of queries and keys that this one was handed."""
        handed = self.unequal and self.path == frame.path and (self.sizes or (1,))[0] > 1
        return handed or self.is_open(frame) or self.layout is None

    def forget(self) -> None:
        """Takes back what the axis test found."""
        if self.why is None:
            self.kind, self.asked, self.touched = None, False, False

    def close(self) -> None:
        """Lets go of what the tests needed."""
        if self.layout is None and self.output is not None:
            sized = (sized_layout(self.output, width) for width in self.widths)
            self.layout = plain_layout(self.output) or next((one for one in sized if one), None)
            one_row = self.changed is None or len(self.changed) == 1
            # one head has a row for each input, though a projection may read several heads side by side
            if one_row and self.output.ndim == 3 and len(self.output) == self.rows_read:
                self.layout = Layout(1, 1)
            if self.layout is None and self.changed is not None:
                self.layout = merged_layout(self.output, self.changed)
        self.open, self.query, self.scores, self.value, self.output = 0, None, None, None, None

    @property
    def queries(self) -> int:
        """How many there are in all rows."""
        split = self.split(self.print)
        return len(split) * (split.shape[-1] if self.sizes is None else self.sizes[0])

    def tokens_of(self, x: Tensor) -> Tensor:
        """What is known of each key, `[…, key]`, of those that are tokens."""
        before, after = self.extra
        return x[..., before : x.shape[-1] - after]

    def rows(self, x: Tensor) -> Tensor:
        """What was told of each token, `[…, token]`, by rows of the call: `[row, token]`, of any head."""
        return self.split(x).any(1)

    def split(self, x: Tensor) -> Tensor:
        """What was told of each token, `[…, token]`, as `[row, head, token]`."""
        return (self.layout or PLAIN).split(x[..., None])[..., 0]


@dataclass
class Running(Frame):
    """made: the calls of this run and of all that ran in it, in order. waiting: those not understood yet."""

    made: list[Seen] = field(default_factory=list)
    waiting: list[Seen] = field(default_factory=list)

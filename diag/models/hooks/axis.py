"""The axis test: whose tokens a call is of, from what changes when its module is run again.

One element of what the module read is another one. In a call over its own tokens exactly one row of V
changes, and that row of Q; one column is a call over channels, one head a call over heads; where V does not
follow, keys are of something else, or the module was handed queries, keys and values, and what runs it is
asked instead. Where there are other numbers of keys than of queries, and both follow what the module reads,
keys were pooled, or queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diag.attention.visibility import HIDDEN
from diag.models.hooks.layout import PLAIN, TOKENS_FIRST
from diag.models.hooks.other_inputs import read_by, with_changed
from diag.models.hooks.seen import (
    CHANNELS,
    ELSEWHERE,
    EVERYTHING,
    EXPERTS,
    HEADS,
    LEARNED,
    MIXED,
    NO_QUERIES,
    ORDER,
    OVERLAP,
    OWN,
    POOLED,
    REASONS,
    Running,
    Seen,
)
from diag.models.hooks.squares import in_several_rows, in_squares, sides_of

Print = Callable[[Tensor], Tensor]
"""Values to a number per token, `[…, token]`."""

NEIGHBOURS = 8
"""Of how many tokens up to its own a value in front of a recurrence may be made; convolutions are 4 wide."""


Again = Callable[..., list[tuple[Tensor | None, Tensor]] | None]
"""Runs a module again on what `with_changed` returns: queries, or scores, and values of all its calls, or
None where that does not go. Its second argument: which call's output is changed at one token."""


def ask(frame: Running, args: Sequence[Any], kwargs: Mapping[str, Any], run: Again, printed: Print) -> None:
    """The axis test of a module that has just run, on all that waits in it.

    args, kwargs: what it was given. run: runs it again. printed: what a survey keeps of values.
    """
    again, (given, read) = run(with_changed(args, kwargs)), read_by(args, kwargs)
    if again is None:
        return
    for seen, (query, value) in zip(frame.made, again, strict=True):
        if seen.is_open(frame) and seen.value is not None and seen.value.shape == value.shape:
            seen.asked = True
            if seen.recurrence is not None:
                assert query is not None  # its output stands for it
                _ask_recurrence(seen, query, value)
            else:
                direct = seen.path == frame.path
                seen.kind = _kind(seen, query, value, direct=direct)
                if seen.kind is None and direct and len(given) == 1:
                    seen.kind = _without_queries(seen, query, value)
                    seen.why = REASONS.get(seen.kind or "")
                seen.rows_read = None if read is None else len(read)
            seen.touched = seen.kind is not None
    own = {(seen.path, seen.run) for seen in frame.made if seen.kind in (OWN, MIXED)}
    mine = [seen for seen in frame.made if seen.path == frame.path]
    unmoved = [seen for seen in mine if seen.asked and seen.kind is None]
    # the element was of another of its calls, as of a stream; or its query sees what fills a window alone
    unmoved = unmoved if len(mine) > 1 and not own else []
    unmoved += [seen for seen in mine if seen.kind == NO_QUERIES]
    if unmoved:
        further = run(with_changed(args, kwargs, part=6)) or []
        for seen, (query, value) in zip(frame.made, further, strict=False):
            if seen in unmoved and seen.value is not None and seen.value.shape == value.shape:
                kind = _kind(seen, query, value, direct=True)
                if seen.kind is None or kind is not None:
                    seen.kind, seen.why = kind, REASONS.get(kind or "", seen.why)
                    seen.why = None if kind in (OWN, MIXED) else seen.why
    own = {(seen.path, seen.run) for seen in frame.made if seen.kind in (OWN, MIXED)}
    others = [seen for seen in frame.made if seen.kind is None and (seen.path, seen.run) in own]
    unequal = [
        seen
        for seen, (_, value) in zip(frame.made, again, strict=True)
        if seen.unequal and _may_be_pooled(seen, value, direct=seen.path == frame.path)
    ]
    if not others and not unequal:
        return
    # windows in turn, or keys from elsewhere: when all that was read changes, V of windows does
    all_changed = run(with_changed(args, kwargs, everywhere=True)) or []
    for seen, (_, everywhere) in zip(frame.made, all_changed, strict=False):
        if seen in others and seen.value is not None and len(_followed(seen.value, everywhere)[-2]):
            seen.kind = OWN
    if not unequal:
        return
    # keys without a token follow nothing that is given, such as what another stack returned
    beside = run(with_changed(args, kwargs, everywhere=True, beside=True)) or []
    for seen, (query, value), (_, everywhere) in zip(frame.made, again, beside, strict=False):
        if seen in unequal:
            _ask_for_extra_keys(seen, query, value, everywhere, direct=seen.path == frame.path)
    if unequal := [seen for seen in unequal if seen.unequal and all_changed]:
        queries, keys = unequal[0].sizes or (0, 1)
        place = math.isqrt(queries // keys)  # the next key's, where keys are pooled
        one_more = run(with_changed(args, kwargs, at=place)) or []
        sides = sides_of([*args, *kwargs.values()])
        for seen, *runs in zip(frame.made, all_changed, again, one_more, strict=False):
            if seen in unequal and len({seen.print.shape, *(value.shape[:-1] for _, value in runs)}) == 1:
                _ask_for_pooling(seen, runs, sides, printed, direct=seen.path == frame.path)


def _ask_for_pooling(
    seen: Seen,
    runs: Sequence[tuple[Tensor | None, Tensor]],
    sides: set[int],
    printed: Print,
    *,
    direct: bool,
) -> None:
    """Notes a call of the same tokens in other numbers: queries and keys both follow what was read.

    runs: its queries, or its scores, and its values, when all that its module read was changed, and when
    one element was, for two of them. sides: as `in_squares` has them. printed: as in `ask`. direct: as in
    `_kind`: else it has to be seen that they were made of the same places.
    """
    assert seen.value is not None
    assert seen.sizes is not None
    (every, everywhere), *ones = runs
    queries, keys = seen.sizes
    followed = len(_followed(seen.value, everywhere)[-2])
    if direct and followed > queries:  # the module reads them: no module around it tells more
        seen.unequal = False
    if queries == 1 or followed < keys:
        return
    found = list[tuple[Tensor, Tensor]]()
    for again, value in ones:
        of_value = _followed(seen.value, value)[-2]
        of_query = _known_queries(seen, again, of_value)
        found.append((of_value[:0] if of_query is None else of_query, of_value))
    if seen.query is not None and every is not None:
        follow = len(_followed(seen.query, every)[-2]) == queries
    else:
        follow = any(len(of_query) for of_query, _ in found)
    squares = in_squares([pair for pair in found if all(map(len, pair))], queries, keys, sides)
    if follow and keys > queries and in_several_rows(everywhere, printed(everywhere)):
        seen.kind, seen.why, seen.unequal = OVERLAP, REASONS[OVERLAP], False
    elif follow and (direct or squares):
        seen.kind, seen.why, seen.asked, seen.unequal = POOLED, None, True, False
        seen.keys_of = "pooled" if squares and keys < queries else "others"
    elif direct and not follow and seen.query is None:
        seen.why = f"{seen.why}, or a softmax that is not over keys"


def are_in_turn(frame: Running, args: Sequence[Any], kwargs: Mapping[str, Any], run: Again) -> bool:
    """Whether the calls of one run are layers that follow each other, as in a model that is one function.

    They are where each one's values follow the output of the one before it, token by token; then they are
    numbered as runs. args, kwargs, run: as in `ask`.
    """
    calls = frame.made
    if (
        sum(seen.touched for seen in calls if seen.path == frame.path) < 2
        or calls[0].kind != OWN
        or not calls[0].touched
        or any(seen.path != frame.path or seen.value is None or seen.unequal for seen in calls)
    ):
        return False
    for number, seen in enumerate(calls[1:]):
        again = run(with_changed(args, kwargs, nothing=True), number)
        assert seen.value is not None
        if again is None or again[number + 1][1].shape != seen.value.shape:
            return False
        if _kind(seen, *again[number + 1], direct=True) != OWN:
            return False
    for number, seen in enumerate(calls):
        seen.kind, seen.run, seen.number = OWN, frame.run + number, 0
        seen.changed, seen.rows_read = calls[0].changed, calls[0].rows_read
    return True


def _kind(seen: Seen, again: Tensor | None, value_again: Tensor, *, direct: bool) -> str | None:
    """What a call is over, from what changed in V and Q; None where V does not tell.

    again: its query, or its scores, when the module ran again. direct: whether the module that made the call
    was asked, and not one that runs it, in which tokens may have been mixed before.
    """
    assert seen.value is not None
    places = _followed(seen.value, value_again)
    tokens, dims = places[-2:]
    if not len(tokens):
        return None
    if direct and seen.changed is None:
        seen.changed = places[0]
    of_query = _queries(seen, again, tokens)
    if len(tokens) == 1:
        if direct and len(of_query):
            return OWN if tokens[0] in of_query else ORDER
        return None if direct else OWN if of_query.tolist() == tokens.tolist() else ELSEWHERE
    if not direct:
        return None
    if len(dims) == 1 and seen.value.shape[-1] > 1:
        return CHANNELS
    if _once_in_each_row(seen.value, value_again):
        return OVERLAP
    several = seen.value.ndim == 4 and seen.value.shape[1] > 1
    if several and len(places[1]) == 1 and len(tokens) == seen.value.shape[-2]:
        return HEADS
    return MIXED if len(tokens) <= seen.value.shape[-2] / 2 else EVERYTHING


def _ask_recurrence(seen: Seen, output_again: Tensor, value_again: Tensor) -> None:
    """What a mixer without softmax is over, where its tokens are, and whether it is causal.

    Which axis holds tokens is the one that is not followed as a whole. Its values may be made of a few tokens
    each, by a convolution over neighbours.
    """
    assert seen.value is not None
    assert seen.query is not None
    assert seen.recurrence is not None
    known = seen.kind
    layouts = sorted((PLAIN, TOKENS_FIRST), key=lambda layout: layout != seen.layout)
    if (seen.layout or PLAIN).split(seen.value).shape[-2] == 1:  # a single head looks like a single token
        layouts.reverse()
    for layout in layouts:
        value, again, output = (layout.split(x) for x in (seen.value, value_again, seen.query))
        tokens, dims = _followed(value, again)[-2:]
        of_output = _followed(output, layout.split(output_again))[-2]
        size = value.shape[-2]
        if not len(tokens) or not len(of_output):
            continue
        alone = len(tokens) == 1
        causal = bool(of_output[0] == tokens[0]) and (bool(tokens[0] > 0) or size == 1)
        whole = len(tokens) == size or (causal and size - int(tokens[0]) == len(tokens) > NEIGHBOURS)
        if alone and tokens[0] not in of_output:
            seen.kind = known or ORDER
            continue
        if whole and not alone:
            seen.kind = known or (CHANNELS if len(dims) == 1 and value.shape[-1] > 1 else EVERYTHING)
            continue
        seen.kind, seen.layout = OWN if alone else MIXED, layout
        seen.recurrence = replace(seen.recurrence, causal=causal)
        seen.first_alone = causal
        return


def _without_queries(seen: Seen, again: Tensor | None, value_again: Tensor) -> str | None:
    """Why weights of a call do not follow the one token that its values do; None where they are not known.

    again, value_again: as in `_kind`, of a module that reads nothing else.
    """
    assert seen.value is not None
    known = seen.scores is not None and again is not None and seen.scores.shape == again.shape
    if not known or len(_followed(seen.value, value_again)[-2]) != 1:
        return None
    return LEARNED if torch.equal(seen.scores, again) else NO_QUERIES  # type: ignore[arg-type]


def _may_be_pooled(seen: Seen, value: Tensor, *, direct: bool) -> bool:
    """Whether it is worth asking about a call with other numbers of queries and keys.

    value: its values with one element changed. direct: as in `_kind`.
    """
    if seen.value is None or seen.value.shape != value.shape:
        return False
    return direct or len(_followed(seen.value, value)[-2]) > 0


def _once_in_each_row(value: Tensor, again: Tensor) -> bool:
    """Whether several tokens changed, but never two of one row."""
    changed = _apart(value, again).any(-1)  # […, token]
    return bool(changed.sum(-1).max() == 1)


def _ask_for_extra_keys(
    seen: Seen, again: Tensor | None, value: Tensor, everywhere: Tensor, *, direct: bool
) -> None:
    """Notes keys that are no tokens, of a call with more keys than queries: they follow nothing that is read.

    again, value: its query, or its scores, and its values, with one element changed; everywhere: its values
    when all that was read changed. direct: as in `_kind`.
    """
    assert seen.value is not None
    assert seen.output is not None
    if not seen.value.shape == value.shape == everywhere.shape:
        return
    followed, one = _followed(seen.value, everywhere)[-2], _followed(seen.value, value)[-2]
    queries, keys = seen.output.shape[-2], seen.value.shape[-2]
    if not len(one):
        return
    if direct and queries == 1 and len(one) == keys:
        seen.kind, seen.why, seen.unequal = EXPERTS, REASONS[EXPERTS], False
        return
    if len(followed) != queries or len(one) != 1:
        if direct and len(one) > 1 and len(followed) > queries:
            seen.why = f"{queries} queries over {keys} keys, of which some are made of several tokens"
        return
    before = int(followed[0])
    extra = (before, keys - queries - before)
    token = one - before
    in_a_row = int(followed[-1]) - before == queries - 1
    of_query = _queries(seen, again, one)
    if in_a_row and (token in of_query if direct else of_query.tolist() == token.tolist()):
        seen.kind, seen.why, seen.asked, seen.touched, seen.extra = OWN, None, True, True, extra
        seen.print, seen.unequal = seen.tokens_of(seen.print), False
        if seen.keys is not None:
            seen.keys = seen.tokens_of(seen.keys)


def _queries(seen: Seen, again: Tensor | None, keys: Tensor) -> Tensor:
    """As `_known_queries`; those of the keys where it is not known."""
    return keys if (known := _known_queries(seen, again, keys)) is None else known


def _known_queries(seen: Seen, again: Tensor | None, keys: Tensor) -> Tensor | None:
    """Which queries changed, where some keys did: what a row of scores is elsewhere tells it.

    None where scores are not known, or every key changed that they see.
    """
    if seen.query is not None and again is not None:
        return _followed(seen.query, again)[-2]
    if seen.scores is None or again is None or seen.scores.shape != again.shape:
        return None
    others = torch.ones(again.shape[-1], dtype=torch.bool, device=again.device)
    others[keys] = False
    if not others.any():
        return None
    # where a key is hidden in one of them, as outside of the largest scores, that is no change of its query
    hidden = ~((seen.scores > HIDDEN) & (again > HIDDEN))
    mine = keys[keys < again.shape[-2]]
    if (
        len(mine) and hidden[..., mine, :][..., others].all()
    ):  # such a query sees its own key alone, as the first of a text
        return None
    return _followed(*(x.masked_fill(hidden, 0.0)[..., others] for x in (seen.scores, again)))[-2]


def _apart(x: Tensor, again: Tensor) -> Tensor:
    """Where anything changed."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    apart = (x.to(exact) - again.to(exact)).abs()
    return apart > 1e-5 * apart.max()


def _followed(x: Tensor, again: Tensor) -> list[Tensor]:
    """On each axis, where anything changed."""
    changed, found = _apart(x, again), list[Tensor]()
    for _ in range(x.ndim):
        found.append(
            changed.flatten(1).any(1).nonzero()[:, 0] if changed.ndim > 1 else changed.nonzero()[:, 0]
        )
        changed = changed[found[-1]].movedim(
            0, -1
        )  # where nothing changed along an axis need not be looked at
    return found

"""The owner and content tests: whose rows calls have, and which of their tokens are of no input.

Two passes are compared, in which the first input is another one: only its own rows may change (*owner*), and
where windows are filled up, their tokens that stay what they were in all layers are padding (*content*).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from diag.models.hooks.seen import OWN, POOLED, Seen

INPUTS, WINDOWS, OTHERWISE = "one per input", "those of an input side by side", "otherwise"
EVERYWHERE = "everywhere"
"""Whose the rows of calls are, from the plainest on. The last is a change that was seen in rows of others."""

ALONE = 1e-5
"""By how much of the largest one numbers of an input may differ when it is alone: products of other sizes may
sum in another order."""

RESTS, CLOSELY = 1e-6, 1e-3
"""A token stays the same where it is apart by no more than this beside the largest number, and beside the
largest change."""

Changed = Mapping[Seen, Bool[Tensor, "row token"]]
"""Which tokens of a call are others when the first input is replaced."""


def changed_tokens(
    seen: Sequence[Seen], again: Sequence[Seen], *, closely: bool = False
) -> dict[Seen, Tensor]:
    """The tokens of each call that are others in a second pass; nothing where the passes differ in calls.

    closely: as in `_differs`.
    """
    both = [(one, two, one.tokens_of(two.print)) for one, two in zip(seen, again, strict=False)]
    if len(seen) != len(again) or any(
        (one.path, one.print.shape) != (two.path, of_two.shape) for one, two, of_two in both
    ):
        return {}
    return {
        one: one.rows(_differs((one.print - of_two).abs(), one.print.abs().max(), closely=closely))
        for one, _, of_two in both
        if one.layout is not None
    }


def changed_alone(seen: Sequence[Seen], alone: Sequence[Seen], instead: Sequence[Seen]) -> dict[Seen, Tensor]:
    """As `changed_tokens`, of one input that is run alone, and of another one in its place.

    seen: the calls of several inputs, which tell where heads are; nothing where one alone makes others.
    """
    found = dict[Seen, Tensor]()
    for one, *two in zip(seen, alone, instead, strict=False):
        first, second = (one.tokens_of(each.print) for each in two)
        if {one.path} != {each.path for each in two} or first.shape != second.shape or one.layout is None:
            return {}
        found[one] = one.rows(_differs((first - second).abs(), first.abs().max(), closely=True))
    return found if len(seen) == len(alone) == len(instead) else {}


def _differs(apart: Tensor, scale: Tensor, *, closely: bool) -> Tensor:
    """Where fingerprints are apart by more than rounding, which is told by their largest.

    closely: where values hardly depend on the input, all of them are apart by that little: then those stay
        the same that do so beside the others, as padding does to the last digit.
    """
    differs = apart > RESTS * scale
    # where nothing differs by more, what is left is rounding, and tells nothing
    return differs | (apart > CLOSELY * apart.nan_to_num().max()) if closely and differs.any() else differs


def plainly_apart(
    seen: Sequence[Seen], alone: Sequence[Seen], measured: Collection[Seen], everywhere: bool
) -> dict[Seen, Tensor] | None:
    """Of two inputs, the tokens of the first one that are others in the second, as `changed_tokens` has them.

    seen: the calls of both inputs. alone: those of the second input. measured: which of `seen` are. None
    unless each call gives it the rows there that it gives it behind the first one, and it differs from that
    in every token, but for what may stand at the ends of the first layer's: prefix tokens, or what two images
    have in common. A third input is to tell the rest.
    everywhere: as in `meaning_of`.
    """
    if [one.path for one in seen] != [two.path for two in alone]:
        return None
    found, second = dict[Seen, Tensor](), dict(zip(seen, alone, strict=True))
    of_tokens = [one for one in seen if one in measured or one.kind == OWN]  # all that tell of padding
    for place, one in enumerate(of_tokens):
        if one.layout is None or one.print.ndim != second[one].print.ndim:
            return None
        of_two, own = (one.split(x) for x in (one.print, one.tokens_of(second[one].print)))
        rows, scale = len(of_two) // 2, one.print.abs().max()
        if own.shape != of_two[rows:].shape or not ((own - of_two[rows:]).abs() <= ALONE * scale).all():
            return None
        differs = _differs((of_two[:rows] - of_two[rows:]).abs(), scale, closely=True).any(1)
        places = differs[0].nonzero()[:, 0]
        if not len(places):
            return None
        at_the_ends = place == 0 and rows == 1 and bool(differs[0, places[0] : places[-1]].all())
        if (everywhere or rows > 1) and not at_the_ends and not differs.all():
            return None
        found[one] = torch.cat([differs, torch.zeros_like(differs)])
    return found


def whose_rows(changed: Iterable[Tensor], inputs: int) -> str:
    """Whose rows calls have: of several verdicts, that of the least plain call."""
    verdicts = [INPUTS]
    for each in changed:
        touched, rows = each.any(1), len(each)
        if not touched.any():
            continue
        plain = rows % inputs == 0 and not touched[rows // inputs :].any()
        if plain:
            verdicts.append(INPUTS if rows == inputs else WINDOWS)
        else:
            verdicts.append(EVERYWHERE if touched[-1] else OTHERWISE)
    return max(verdicts, key=[INPUTS, WINDOWS, OTHERWISE, EVERYWHERE].index)


def padding_in(calls: Sequence[Seen], own: Changed, everywhere: bool) -> dict[Seen, Tensor]:
    """Which tokens are padding, `[row of an input, token]`, of the calls of a tower that have any.

    Where an input has several rows, and between others, they are what stays the same, but for prefix tokens,
    which windows may each have of their own; in front of all others
    and behind them only what does so in the last layer as well, or in windows of other layers: prefix tokens
    are the same in the first one, or in several that stand side by side there. The first tokens of a causal
    text are the same in all of them, and are none.

    everywhere: as in `meaning_of`; else it may be the same ids that stay, in a first layer: then only what
    several layers have counts, in rows of windows, or in all calls over so many tokens.
    """
    groups = dict[tuple[str, int, int, int], list[Seen]]()
    for one in calls:
        if one in own:
            apart = one.number if one.adds_up else 0  # maps of a sum are over the same tokens
            groups.setdefault((one.path, one.run, apart, own[one].shape[1]), []).append(one)
    together = {group[0]: group for group in groups.values()}  # windows in turn are rows of one layer
    of_group = {first: torch.cat([own[one] for one in group]) for first, group in together.items()}
    found = {
        one: rows
        for first, constant in _padding_in(together, of_group, everywhere).items()
        for one, rows in zip(
            together[first], constant.split([len(own[one]) for one in together[first]]), strict=True
        )
    }
    return {one: rows for one, rows in found.items() if rows.any()}


def _padding_in(
    together: Mapping[Seen, Sequence[Seen]], own: Changed, everywhere: bool
) -> dict[Seen, Tensor]:
    """As `padding_in`, of the first call of each group, with the rows of all."""
    found, at_ends = dict[Seen, Tensor](), dict[int, dict[Seen, Tensor]]()
    calls = [one for one in together if own[one].any()]
    for place, one in enumerate(calls):
        rows, tokens = own[one].shape
        constant = ~own[one] & ~_others_later(one, calls[place + 1 :], own)
        keys = [each.keys for each in together[one] if each.keys is not None]
        if len(keys) == len(together[one]) and all(each.shape[-1] == tokens for each in keys):
            each_rows = rows // len(keys)
            constant = constant & torch.cat([each[:each_rows] for each in keys])  # hidden ones need no test
        places = own[one].any(1).nonzero()[:1, 0]
        places = own[one][places[0]].nonzero()[:, 0]
        if constant.any() and (rows > 1 or constant[0, places[0] : places[-1]].any()):
            found[one] = constant
        else:
            if one.first_alone:
                constant = constant & (torch.arange(tokens, device=constant.device) > places[-1])
            at_ends.setdefault(tokens, {})[one] = constant
    if not everywhere:
        alike = {
            one: all(
                other in found and torch.equal(found[other], constant)
                for other in calls
                if own[other].shape == constant.shape
            )
            for one, constant in found.items()
        }
        sure = {one: x for one, x in found.items() if len(x) > 1 or (alike[one] and not one.first_alone)}
        return sure if len({(one.path, one.run) for one in sure}) > 1 else {}
    in_windows = [constant.all(0) for constant in found.values()]
    counts = {(constant.numel(), int(constant.sum())) for constant in found.values()}  # where these shift
    for of_ends in at_ends.values():
        *_, last = of_ends.values()
        known = any(torch.equal(constant, last.all(0)) for constant in in_windows)
        known = known or (last.numel(), int(last.sum())) in counts
        if last.any() and (known or len({(one.path, one.run) for one in of_ends}) > 1):
            found |= {one: last for one, constant in of_ends.items() if torch.equal(constant, last)}
    return found


def _others_later(one: Seen, later: Sequence[Seen], own: Changed) -> Tensor:
    """Which tokens of a call are the same for all inputs, and others in calls behind it: prefix tokens.

    None where nothing shows it. Layers over as many tokens in all have as many that are padding, though it
    may stand elsewhere in them, as in shifted windows.
    """
    constant = ~own[one]
    behind = [~own[x].reshape(constant.shape) for x in later if own[x].numel() == constant.numel()]
    if not behind:
        return torch.zeros_like(constant)
    gone = constant & ~torch.stack(behind).any(0)
    fewer = int(constant.sum()) - max(int(x.sum()) for x in behind)
    return gone if int(gone.sum()) == fewer else torch.zeros_like(constant)


def windows_in_a_row(calls: Sequence[Seen], own: Changed) -> int:
    """How many windows with prefix tokens of their own stand in one row in some layers."""
    calls = [one for one in calls if one in own and own[one].any()]
    shapes = dict.fromkeys(tuple(own[one].shape) for one in calls)
    for place, one in enumerate(calls):
        prefix = _others_later(one, calls[place + 1 :], own)
        for rows, tokens in shapes:
            if rows > 1 and rows * tokens == prefix.numel() and (1, rows * tokens) in shapes:
                each = prefix.reshape(rows, tokens)
                if bool(each[0].any() & (each == each[0]).all()):
                    return rows
    return 1


def joining(calls: Sequence[Seen], own: Changed, groups: set[int]) -> dict[int, tuple[int, int]]:
    """Tokens that join the others behind the first layer, such as a class token: as `Understood.joined`.

    They are the same for all inputs in the first layer that has so many tokens, and not in its last. Where an
    input has several rows, windows of it, none of them has any, unless such tokens are found; nor have
    groups of patches.

    calls: of all layers in order; those over pooled keys tell only how many tokens there are. groups: as in
    `of_groups`.
    """
    found, alike, lengths = dict[int, tuple[int, int]](), dict[int, list[Tensor]](), list[int]()
    of_tokens = [one for one in calls if one.kind != POOLED]
    for one in calls:
        if one.kind == POOLED and one.sizes is not None:
            lengths.append(one.sizes[0])
        elif one in own and own[one].any():
            lengths.append(own[one].shape[1])
            alike.setdefault(lengths[-1], []).append(own[one])
    in_windows = windows_in_a_row(of_tokens, own) > 1
    for tokens, (first, *later) in alike.items():
        places = first[0].nonzero()[:, 0].tolist() or [0, tokens - 1]
        front, back = places[0], tokens - 1 - places[-1]
        if front + back and later and bool(later[-1].all()):
            found |= {tokens: (front, back)} if tokens != lengths[0] else {}
        elif not front + back and (tokens in groups or (len(first) > 1 and not in_windows)):
            found[tokens] = (0, 0)
    return found


def of_groups(calls: Sequence[Seen], own: Changed) -> set[int]:
    """How many tokens there are where another call has made groups of the patches.

    Its keys are the patches alone, without what stood beside them.
    calls: all of them, in order; tokens are told of those in `own`.
    """
    patches, before, found = set[int](), set[int](), set[int]()
    grouped = False
    for one in calls:
        if one.sizes is not None:
            grouped = grouped or one.sizes[1] in patches
        elif one in own and own[one].any():
            tokens, beside = own[one].shape[1], int((~own[one][0]).sum())
            if grouped and tokens not in before:
                found.add(tokens)
            if beside and tokens not in before:
                patches.add(tokens - beside)
            before.add(tokens)
    return found

"""The depth axis of a model: which stacks of blocks it has, and the model's own numbers of their layers.

A stack is what shares the path before its first number: `encoder.layers`, `decoder.layers`. Every block of it
holds a place, whatever mixes tokens there, so that layer 3 of a hybrid whose first three blocks are linear is
layer 3; where blocks stand in stages, they are counted through. Nothing is run here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from torch import nn

CROSS = "cross-attention"
"""What stands in the reason of a module whose keys are not the tokens of its queries."""
EAGER = "it computes a softmax itself, and what is weighed with it is not seen"
"""That of a module of which no more is known."""
BESIDE = "no softmax, and beside attention in its block, whose place it is"
"""Why a mixer without softmax that runs in one block with attention is not measured."""
NUMBER = "#"

Found = Mapping[str, str | None]
"""Attention modules by path, and why one is not measured; None where it is."""


@dataclass(frozen=True)
class Place:
    """One place on a depth axis.

    index: its number. path: of the attention module, or of a block that has none. run: which run of that
    module in a forward pass. why: it is not measured, if so.
    """

    index: int
    path: str
    run: int = 0
    why: str | None = None


@dataclass(frozen=True)
class Stack:
    """One tower.

    name: what tells it from the others that are measured; empty where it is the only one.
    beside: attention that holds no place, such as cross-attention beside self-attention, by path, and why.
    """

    name: str
    places: tuple[Place, ...]
    beside: Mapping[str, str] = field(default_factory=dict)


def stacks_of(
    root: nn.Module,
    found: Found,
    *,
    ran: Iterable[tuple[str, int]] = (),
    keys: Mapping[str, int] | None = None,
    linear: Collection[str] = (),
) -> tuple[Stack, ...]:
    """The stacks below `root` in the order of its modules, each with all of its places.

    ran: which attention modules ran, and for which time, in order: `("layers.0.attn", 0)`. Those that are
    not among them hold one place each, in the order of modules. keys: how many keys each module had.
    linear: which of them have no softmax.
    """
    tree = _Tree(root)
    when = {key: place for place, key in enumerate(ran)}
    stacks = _grouped(tree, found, keys or {})
    measured = [stem for stem, paths in stacks.items() if any(found[path] is None for path in paths)]
    names = {stem: ".".join(stem) for stem in stacks} | _names(measured)
    return tuple(
        Stack(names[stem], *_places(tree, paths, found, when, linear)) for stem, paths in stacks.items()
    )


class _Tree:
    """The modules of a model by path, also where one stands under several, and their paths with numbers open.

    `block1` is numbered where there is a `block2` beside it; `wav2vec2` is a name.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.order = {path: place for place, path in enumerate(self.modules)}
        self.paths = dict[int, list[str]]()
        for path, module in self.modules.items():
            self.paths.setdefault(id(module), []).append(path)
        cut = {path: (path.rpartition(".")[0], _unnumbered(path)) for path in self.modules}
        alike = Counter(cut.values())
        self.open = dict[str, tuple[str, ...]]()
        for path, (parent, stem) in cut.items():
            name = path.rpartition(".")[2]
            numbered = stem != name and (not stem or alike[parent, stem] > 1)
            self.open[path] = (*self.open[parent], stem + NUMBER if numbered else name) if path else ()

    def numbers(self, path: str) -> list[int]:
        """Which components of the path of an attention module are numbered blocks: `attn1` itself is none."""
        parts = self.open[path]
        own = [place for place, part in enumerate(parts) if part.endswith(NUMBER)]
        return [place for place in own if place < len(parts) - 1 or parts[place] == NUMBER]

    def is_numbered(self, block: str) -> bool:
        """Whether blocks like this one are told apart by numbers."""
        return any(part.endswith(NUMBER) for part in self.open[block])

    def stem(self, path: str) -> tuple[str, ...]:
        """What stands before the first number of a path; all of one without."""
        parts, numbers = self.open[path], self.numbers(path)
        if not numbers:
            return tuple(path.split("."))
        first = parts[numbers[0]].removesuffix(NUMBER)
        return (*parts[: numbers[0]], first) if first else parts[: numbers[0]]


def with_reasons(
    places: Sequence[Place], measured: Collection[tuple[str, int]], skipped: Mapping[str, str]
) -> tuple[Place, ...]:
    """Places as they came out. measured: path and run. skipped: why others are not, by path."""
    return tuple(
        replace(place, why=None if (place.path, place.run) in measured else skipped[place.path])
        for place in places
    )


def _unnumbered(path: str) -> str:
    return path.rpartition(".")[2].rstrip("0123456789")


def _crosses(why: str | None) -> bool:
    return why is not None and CROSS in why


def _grouped(tree: _Tree, found: Found, keys: Mapping[str, int]) -> dict[tuple[str, ...], list[str]]:
    """The paths of each stack, by its stem.

    A module without a number is of the stack that it stands beside; where there is none, all of them are of
    one stack, unless some stand together with cross-attention, as in a decoder, and others do not; or, where
    all stand side by side, some have as many keys as cross-attention has, as an encoder's, and others do not.
    """
    stacks, alone = dict[tuple[str, ...], list[str]](), list[str]()
    for path in sorted(found, key=tree.order.__getitem__):
        if tree.numbers(path):
            stacks.setdefault(tree.stem(path), []).append(path)
        else:
            alone.append(path)
    apart = list[str]()
    for path in alone:
        parts = tuple(path.split("."))
        around = [stem for stem in stacks if parts[: len(stem) - 1] == stem[:-1]]
        if around:
            stacks[max(around, key=len)].append(path)
        elif stacks and _crosses(found[path]):  # it has no depth of its own
            stacks[max(stacks, key=lambda stem: _shared([stem, parts]))].append(path)
        else:
            apart.append(path)
    cut = [tuple(path.split(".")) for path in apart]
    shared = min(_shared(cut), *(len(parts) - 1 for parts in cut)) if cut else 0
    units = dict[str, list[str]]()
    for path, parts in zip(apart, cut, strict=True):
        units.setdefault(parts[shared], []).append(path)
    crossed = {name for name, paths in units.items() if len({_crosses(found[path]) for path in paths}) > 1}
    if not crossed:
        memory = {keys[path] for path in apart if _crosses(found[path]) and path in keys}
        others = {
            name
            for name, paths in units.items()
            if all(_crosses(found[path]) or keys.get(path) not in memory for path in paths)
        }
        own = {name for name in others if not all(_crosses(found[path]) for path in units[name])}
        crossed = others if memory and own else set()
    for name, paths in units.items():
        first = next(other for other in units if (other in crossed) == (name in crossed))
        stacks.setdefault((*cut[0][:shared], first), []).extend(paths)
    return stacks


def _shared(stems: Sequence[tuple[str, ...]]) -> int:
    """How many components all of them begin with."""
    alike = [len(set(parts)) == 1 for parts in zip(*stems, strict=False)]
    return (*alike, False).index(False)


def _names(stems: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """What tells stems apart, from where they part on: as few components as do."""
    if len(stems) == 1:
        return {stems[0]: ""}
    shared = _shared(stems)
    names = {}
    for stem in stems:
        own = stem[shared:]
        others = [other[shared:] for other in stems if other != stem]
        fewest = next(
            (size for size in range(1, len(own)) if all(other[:size] != own[:size] for other in others)),
            len(own),
        )
        names[stem] = ".".join(own[:fewest]) or "model"
    return names


def _places(
    tree: _Tree,
    paths: Sequence[str],
    found: Found,
    when: Mapping[tuple[str, int], int],
    linear: Collection[str],
) -> tuple[tuple[Place, ...], dict[str, str]]:
    """All places of one stack, and what holds none."""
    block_of = _blocks(tree, paths)
    inside = dict[str, list[tuple[str, int]]]()  # block -> the runs of attention modules in it
    looped = False
    for path in paths:
        runs = sorted(run for name, run in when if name == path) or [0]
        spots = [spot for spot in tree.paths[id(tree.modules[path])] if spot in block_of]
        if len(spots) != len(runs):  # not one module that stands under a path for each of its runs
            spots, looped = [path] * len(runs), looped or len(runs) > 1
        for spot, run in zip(spots, runs, strict=True):
            inside.setdefault(block_of[spot], []).append((path, run))
    beside = _beside(tree, inside, found)
    beside |= {
        path: BESIDE
        for own in inside.values()
        for path, _ in own
        if path in linear and any(other not in linear and other not in beside for other, _ in own)
    }
    inside = {
        block: kept for block, own in inside.items() if (kept := [x for x in own if x[0] not in beside])
    }
    numbered = any(tree.numbers(path) for path in paths)
    places: list[tuple[tuple[float, float], str, int, str | None]] = [
        # blocks in the order of their numbers; those that are run in a loop, or have none, in that of running
        ((tree.order[block] if numbered and not looped else 0, when.get(key, inf)), *key, found[key[0]])
        for block, own in inside.items()
        for key in own
    ]
    others = [path for path in paths if beside.get(path) != EAGER]  # a block with no more has no attention
    for block, path, why in _plain(tree, inside, others):
        later = [
            when.get(key, inf)
            for b, own in inside.items()
            for key in own
            if tree.order[b] > tree.order[block]
        ]
        at = (0, min(later, default=inf) - 0.5) if looped else (tree.order[block], inf)
        places.append((at, path, 0, why))
    places.sort(key=lambda place: place[0])
    return tuple(Place(index, path, run, why) for index, (_, path, run, why) in enumerate(places)), beside


def _blocks(tree: _Tree, paths: Iterable[str]) -> dict[str, str]:
    """The block that each attention module is in, under every path of it.

    It ends in the last number that differs among its like: in `layers.0.1.fn` and `layers.1.1.fn` the last
    one does not. What has no number is a block itself; one that others are in ends in a later number.
    """
    alike = dict[tuple[str, ...], list[str]]()
    for path in paths:
        for spot in tree.paths[id(tree.modules[path])]:
            alike.setdefault(tree.open[spot], []).append(spot)
    found = dict[str, str]()
    for form, spots in alike.items():
        parts, numbers = [spot.split(".") for spot in spots], tree.numbers(spots[0])
        # also among those in blocks of a list in which this one stands itself
        beside = [x.split(".") for own, others in alike.items() if own[: len(form)] == form for x in others]
        varying = [place for place in numbers if len({each[place] for each in beside}) > 1]
        last = (varying or numbers[:1] or [len(parts[0]) - 1])[-1]
        found |= {spot: ".".join(each[: last + 1]) for spot, each in zip(spots, parts, strict=True)}
    for spot, block in found.items():
        for last in tree.numbers(spot):
            if any(other.startswith(f"{found[spot]}.") for other in found.values()):  # all blocks of a stage
                found[spot] = max(block, ".".join(spot.split(".")[: last + 1]), key=len)
    return found


def _beside(tree: _Tree, inside: Mapping[str, Sequence[tuple[str, int]]], found: Found) -> dict[str, str]:
    """What holds no place: cross-attention in a block beside other attention, or in blocks of its own kind.

    Where blocks of one kind have either, as in a language model whose every fifth layer reads an image, and
    where a stack has nothing else, it holds one. A softmax of which nothing more was seen holds none where
    its like stands beside attention, or beside a stack of blocks: it may be of anything, such as the
    hyper-connections of DeepSeek-V4.
    """
    paths = {block: [path for path, _ in own] for block, own in inside.items()}
    attending = (own for own in paths.values() if any(found[path] != EAGER for path in own))
    kinds = {tree.open[path] for own in attending for path in own if found[path] == EAGER}
    numbered = any(map(tree.is_numbered, inside))
    unsure = {
        path: EAGER
        for block, own in paths.items()
        for path in own
        if found[path] == EAGER and (tree.open[path] in kinds or (numbered and not tree.is_numbered(block)))
    }
    paths = {block: [path for path in own if path not in unsure] for block, own in paths.items()}
    with_own = [block for block, own in paths.items() if any(not _crosses(found[path]) for path in own)]
    kinds = {tree.open[block] for block in with_own if tree.is_numbered(block)}
    return unsure | {
        path: found[path] or ""
        for block, own in paths.items()
        for path in own
        if with_own and _crosses(found[path]) and (block in with_own or tree.open[block] not in kinds)
    }


def _plain(
    tree: _Tree, inside: Mapping[str, Sequence[tuple[str, int]]], paths: Sequence[str]
) -> list[tuple[str, str, str]]:
    """Blocks like those with attention in which none was seen: block, what is named for it, and why."""
    kinds = {tree.open[block] for block in inside if tree.is_numbered(block)}
    attending = [tree.modules[block] for block in inside]
    seen = {
        (spot.removeprefix(f"{block}."), type(tree.modules[spot]))
        for block in inside
        for path in paths
        for spot in tree.paths[id(tree.modules[path])]
        if spot.startswith(f"{block}.")
    }
    plain = []
    for block, module in tree.modules.items():
        if tree.open[block] not in kinds or module in attending or not any(module.children()):
            continue
        if any(path.startswith(f"{block}.") for path in paths):
            continue
        if any(tree.open[part] in kinds for part in tree.modules if part.startswith(f"{block}.")):
            continue  # it holds blocks
        like = (f"{block}.{name}" for name, kind in seen if type(tree.modules.get(f"{block}.{name}")) is kind)
        if path := next(like, None):
            plain.append((block, path, "no attention call of it was seen"))
        else:
            plain.append((block, block, f"no softmax attention ({_mixer(module, attending)})"))
    return plain


def _mixer(block: nn.Module, attending: Collection[nn.Module]) -> str:
    """The class of what a block has where others have attention; its own where that cannot be told.

    That is the one child of a class that no block with attention has; of several, the one that has a name of
    its own too (a mixture of experts is called what the MLP of other layers is).
    """
    names = {name for other in attending for name, _ in other.named_children()}
    classes = {type(child) for other in attending for child in other.children()}
    own = {name: type(child).__name__ for name, child in block.named_children() if type(child) not in classes}
    for kinds in [own, {name: kind for name, kind in own.items() if name not in names}]:
        if len(kinds) == 1:
            return next(iter(kinds.values()))
    return type(block).__name__

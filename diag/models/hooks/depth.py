"""The depth axis of a model: which stacks of blocks it has, and the model's own numbers of their layers.

A stack is what shares the path before its first number: `encoder.layers`, `decoder.layers`. Every block of it
holds a place, whatever mixes tokens there, so that layer 3 of a hybrid whose first three blocks are linear is
layer 3. Stages are counted through. Nothing is run here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

NUMBER = re.compile(r"\d+$")


@dataclass(frozen=True)
class Place:
    """One place on a depth axis.

    index: the model's own number. path: of the attention module, or of a block without one. run: which of
    its module's runs. why: it has nothing to measure, if so.
    """

    index: int
    path: str
    run: int = 0
    why: str | None = None


@dataclass(frozen=True)
class Stack:
    """One tower. name: what tells it from the others; empty where it is alone. beside: attention that has no
    place of its own, such as cross-attention in a block that has self-attention, by path, and why."""

    name: str
    places: tuple[Place, ...]
    beside: Mapping[str, str] = field(default_factory=dict)


def stacks_of(
    root: nn.Module, found: Mapping[str, str | None], runs: Mapping[str, int] = {}
) -> tuple[Stack, ...]:
    """The stacks below `root` in the order of its modules, each with all of its places.

    found: paths of attention modules; why one is not measured, or None. runs: how often each ran, once if
    it is not said.
    """
    order = {path: place for place, (path, _) in enumerate(root.named_modules())}
    stacks = dict[str, list[str]]()
    for path in sorted(found, key=order.__getitem__):
        stacks.setdefault(_stem(path), []).append(path)
    if len(stacks) > 1 and not any(found[path] for path in found if not _numbers(path)):
        # modules that stand alone are the layers of one tower
        alone = [path for path in found if not _numbers(path)]
        if len(alone) == len(found):
            stacks = {"": sorted(found, key=order.__getitem__)}
    names = _names(list(stacks))
    return tuple(
        Stack(name, *_places(root, paths, found, runs))
        for name, paths in zip(names, stacks.values(), strict=True)
    )


def _numbers(path: str) -> list[int]:
    """Which components of a path end in a number."""
    return [place for place, part in enumerate(path.split(".")) if NUMBER.search(part)]


def _stem(path: str) -> str:
    """What stands before the first number of a path; of one without, what holds it."""
    parts, numbers = path.split("."), _numbers(path)
    if not numbers:
        return ".".join(parts[:-1])
    first = numbers[0]
    return ".".join([*parts[:first], *filter(None, [NUMBER.sub("", parts[first])])])


def _names(stems: Sequence[str]) -> list[str]:
    """What tells stems apart: the first component in which they differ."""
    if len(stems) == 1:
        return [""]
    parts = [stem.split(".") for stem in stems]
    shared = 0
    while all(len(each) > shared + 1 for each in parts) and len({each[shared] for each in parts}) == 1:
        shared += 1
    names = [each[shared] or "model" for each in parts]
    return names if len(set(names)) == len(names) else list(stems)


def _template(path: str, last: int | None = None) -> str:
    """A path, up to a component, with its numbers left open."""
    parts = path.split(".")
    return ".".join(NUMBER.sub("#", part) for part in (parts if last is None else parts[: last + 1]))


def _blocks(paths: Iterable[str]) -> dict[str, str]:
    """The block that each attention module is in: up to the last number that differs among its like."""
    alike = dict[str, list[list[str]]]()
    for path in paths:
        alike.setdefault(_template(path), []).append(path.split("."))
    found = dict[str, str]()
    for same in alike.values():
        numbers = _numbers(".".join(same[0]))
        varying = [place for place in numbers if len({parts[place] for parts in same}) > 1]
        last = (varying or numbers[:1] or [len(same[0]) - 1])[-1]
        found |= {".".join(parts): ".".join(parts[: last + 1]) for parts in same}
    return found


def _places(
    root: nn.Module, paths: Sequence[str], found: Mapping[str, str | None], runs: Mapping[str, int]
) -> tuple[tuple[Place, ...], dict[str, str]]:
    blocks = _blocks(paths)
    templates = {_template(block) for block in blocks.values()}
    modules = dict(root.named_modules())
    inside = dict[str, list[str]]()
    for path in modules:
        if _template(path) in templates:
            inside[path] = []
    for path in paths:
        inside[blocks[path]].append(path)
    with_attention = [modules[block] for block, own in inside.items() if own]
    kinds = {type(child) for block in with_attention for child in block.children()}
    places, beside = list[tuple[int, str, str | None]](), dict[str, str]()
    for block, own in inside.items():
        measured = [path for path in own if found[path] is None]
        if measured:
            beside |= {path: found[path] or "" for path in own if found[path] and is_cross(found[path])}
        for path in own:
            if path not in beside:
                places += [(run, path, found[path]) for run in range(max(1, runs.get(path, 1)))]
        if not own:
            places.append((0, block, _without(modules[block], kinds)))
    places.sort(key=lambda place: place[0])  # depths that share weights run one after the other
    return tuple(Place(index, path, run, why) for index, (run, path, why) in enumerate(places)), beside


def is_cross(why: str | None) -> bool:
    """Whether a reason is that keys are those of something else."""
    return why is not None and "cross-attention" in why


def _without(block: nn.Module, kinds: set[type[nn.Module]]) -> str:
    """What a block without softmax attention has instead."""
    own = [child for child in block.children() if type(child) not in kinds]
    return f"no softmax attention ({type(own[0] if own else block).__name__})"

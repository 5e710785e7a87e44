"""Which number a layer has within its model, from the places of blocks in their lists."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn


def place_of(root: nn.Module, path: str) -> list[tuple[str, int]]:
    """The numbered containers that a path goes through, outermost first: (container, number)."""
    words, found = path.split("."), []
    for at, word in enumerate(words):
        if word.isdigit() and at:
            container = ".".join(words[:at])
            if isinstance(root.get_submodule(container), nn.ModuleList | nn.Sequential):
                found.append((container, int(word)))
    return found


def block_of(root: nn.Module, path: str, level: int = 0) -> tuple[str, int] | None:
    """A list of blocks that a path goes through, and the block's number in it; level 0 is the innermost."""
    places = place_of(root, path)
    return places[-1 - min(level, len(places) - 1)] if places else None


def numbering_faults(root: nn.Module, lines: Sequence[Any], seen: Sequence[str]) -> Iterator[str]:
    """Layers of a table whose number is not their place.

    In one list of blocks that is the number in the list. Over several stages it is the rank among the blocks
    of all stages, or among those that attend. A module that runs several times is numbered by run.
    """
    towers: dict[str, list[Any]] = defaultdict(list)
    for line in lines:
        towers[line.tower].append(line)
    order = list(dict.fromkeys(seen))
    for tower, of_tower in towers.items():
        if len({line.layer for line in of_tower}) != len(of_tower):
            yield f"tower '{tower}' gives one number to several layers"
            continue
        if len({line.path for line in of_tower}) < len(of_tower):
            continue  # depths that share weights: compared by run
        places = [place_of(root, line.path) for line in of_tower]
        if not all(places):
            continue
        outer = {place[0][0] for place in places}
        if len({re.sub(r"\d+", "#", container) for container in outer}) > 1:  # `stage1`, `stage2` are stages
            yield f"tower '{tower}' holds layers of several towers: {', '.join(sorted(outer))}"
            continue
        # a list may hold the unlike parts of one block (T5), or blocks of unlike kinds (CoAtNet)
        deepest = max(map(len, places))
        if not any(_at_their_places(root, of_tower, order, level) for level in range(deepest)):
            told = ", ".join(f"{line.path} = {line.layer}" for line in of_tower[:4])
            yield f"layers are not numbered by their places: {told}"


def _at_their_places(root: nn.Module, of_tower: Sequence[Any], order: Sequence[str], level: int) -> bool:
    """Whether the numbers are those of the lists at a level."""
    seen = {path: block for path in order if (block := block_of(root, path, level))}
    blocks = {line.path: block for line in of_tower if (block := block_of(root, line.path, level))}
    mine = {container for container, _ in blocks.values()}
    lists = [
        of for of in dict.fromkeys(of for of, _ in seen.values()) if any(_alike(of, other) for other in mine)
    ]
    shared = len(set(blocks.values())) < len(blocks)  # a block that attends twice, as pixels and as patches
    if (
        len(lists) == 1
        and not shared
        and not any(block_of(root, line.path, level + 1) != blocks[line.path] for line in of_tower)
    ):
        return all(line.layer == blocks[line.path][1] for line in of_tower)
    whole = [path for path, _ in root.named_modules() if any(_alike(path, other) for other in mine)]
    attending = [path for path, (container, _) in seen.items() if container in lists]
    ranked = list(dict.fromkeys(seen[path] for path in attending))
    ways = (
        *(
            {path: starts[of] + len(_blocks(root, of, number)) for path, (of, number) in blocks.items()}
            for starts in (_starts(root, lists), _starts(root, whole))
            if mine <= starts.keys()
        ),
        {path: ranked.index(block) for path, block in blocks.items() if block in ranked},
        {path: attending.index(path) for path in blocks if path in attending},
        # of a block that attends twice, and to others' tokens besides
        {path: place for place, path in enumerate(path for path in attending if path in blocks)}
        if shared
        else {},
        _counted_through(root, blocks, order),
    )
    return any(all(line.layer == way.get(line.path) for line in of_tower) for way in ways)


def _counted_through(
    root: nn.Module, blocks: dict[str, tuple[str, int]], order: Sequence[str]
) -> dict[str, int]:
    """Numbers of paths among all blocks of the innermost lists, and what attends beside them, in order."""
    lists = {of for of, _ in blocks.values()}
    inner = [of for of in lists if not any(other.startswith(f"{of}.") for other in lists)]
    alike = [path for path, _ in root.named_modules() if any(_alike(path, of) for of in inner)]
    held = {id(part) for of in alike for part in _blocks(root, of)}
    units = [path for path, part in root.named_modules() if id(part) in held]
    for path in order:
        if not any(path == unit or path.startswith(f"{unit}.") for unit in units):
            units.append(path)
    place = {path: number for number, (path, _) in enumerate(root.named_modules())}
    units.sort(key=place.__getitem__)
    within = {p: [n for n, unit in enumerate(units) if p == unit or p.startswith(f"{unit}.")] for p in blocks}
    return {path: numbers[-1] for path, numbers in within.items() if numbers}


def _starts(root: nn.Module, lists: Sequence[str]) -> dict[str, int]:
    """The number of each list's first block, counted through all of them."""
    start, first = 0, {}
    for container in lists:
        first[container] = start
        start += len(_blocks(root, container))
    return first


def _blocks(root: nn.Module, container: str, until: int | None = None) -> list[nn.Module]:
    """The blocks of a list, up to one of them: what has parts, and is no single layer between them."""
    return [part for part in list(root.get_submodule(container).children())[:until] if any(part.children())]


def _alike(one: str, other: str) -> bool:
    one, other = (re.sub(r"\d+", "#", path) for path in (one, other))
    return one == other


def unnamed_blocks(root: nn.Module, attending: set[str], known: Iterable[str]) -> Iterator[str]:
    """Blocks without attention in a list where others of their class attend, and that are not named."""
    lists: dict[str, set[int]] = defaultdict(set)
    for path in attending:
        block = block_of(root, path)
        if block:
            lists[block[0]].add(block[1])
    known = list(known)
    for container, numbers in lists.items():
        blocks = root.get_submodule(container)
        if not isinstance(blocks, nn.ModuleList) or _are_parts(root, container, lists):
            continue
        classes = {type(blocks[number]) for number in numbers}
        for number, block in enumerate(blocks):
            path = f"{container}.{number}"
            named = any(of == path or of.startswith(f"{path}.") for of in known)
            if number not in numbers and type(block) in classes and not named:
                yield path


def _are_parts(root: nn.Module, container: str, lists: dict[str, set[int]]) -> bool:
    """Whether a list in a list holds the parts of one block: the same ones attend in all lists of its kind.

    They stand in wrappers of one class, such as a norm in front of attention and one in front of an MLP.
    """
    inside = len(place_of(root, f"{container}.0")) > 1
    alike = [numbers for other, numbers in lists.items() if _alike(other, container)]
    blocks = root.get_submodule(container)
    attending = [[type(part) for part in blocks[number].modules()] for number in lists[container]]
    others = [
        [type(part) for part in block.modules()]
        for number, block in enumerate(blocks.children())
        if number not in lists[container]
    ]
    return (
        inside and all(numbers == alike[0] for numbers in alike) and not any(x in attending for x in others)
    )

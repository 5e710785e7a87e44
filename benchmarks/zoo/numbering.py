"""Which number a layer has within its model, from the places of blocks in their lists; and blocks between them."""

from __future__ import annotations

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


def block_of(root: nn.Module, path: str) -> tuple[str, int] | None:
    """The list of blocks that a path goes through, and the block's number in it.

    Blocks of a list are alike. Where a block holds a list of unlike parts (T5's attention, cross-attention and
    feed-forward), that is not one.
    """
    places = place_of(root, path)
    for container, number in reversed(places):
        if len({type(block) for block in root.get_submodule(container).children()}) == 1:
            return container, number
    return places[0] if places else None


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
        blocks = {line.path: block for line in of_tower if (block := block_of(root, line.path))}
        if len(blocks) < len(of_tower):
            continue
        outer = {place_of(root, path)[0][0] for path in blocks}
        if len(outer) > 1:
            yield f"tower '{tower}' holds layers of several towers: {', '.join(sorted(outer))}"
            continue
        yield from _faults_of_tower(root, of_tower, blocks, order)


def _faults_of_tower(
    root: nn.Module, of_tower: Sequence[Any], blocks: dict[str, tuple[str, int]], order: Sequence[str]
) -> Iterator[str]:
    seen = {path: block for path in order if (block := block_of(root, path))}
    mine = {container for container, _ in blocks.values()}
    lists = [
        of for of in dict.fromkeys(of for of, _ in seen.values()) if any(_alike(of, other) for other in mine)
    ]
    if len(lists) == 1:
        for line in of_tower:
            if line.layer != blocks[line.path][1]:
                yield f"'{line.path}' is called layer {line.layer}"
        return
    start, first = 0, {}
    for container in lists:
        first[container] = start
        start += len(list(root.get_submodule(container).children()))
    attending = [path for path, (container, _) in seen.items() if container in lists]
    ranked = list(dict.fromkeys(seen[path] for path in attending))
    ways = (
        {path: first[container] + number for path, (container, number) in blocks.items()},
        {path: ranked.index(block) for path, block in blocks.items()},
        {path: attending.index(path) for path in blocks if path in attending},
    )
    if not any(all(line.layer == way.get(line.path) for line in of_tower) for way in ways):
        told = ", ".join(f"{line.path} = {line.layer}" for line in of_tower[:3])
        yield f"layers are not numbered by their places: {told}"


def _alike(one: str, other: str) -> bool:
    words = [word for word in one.split(".") if not word.isdigit()]
    return words == [word for word in other.split(".") if not word.isdigit()]


def unnamed_blocks(root: nn.Module, attending: set[str], known: Iterable[str]) -> Iterator[str]:
    """Blocks of a list that call no attention although blocks of the same class in it do, and are not named."""
    lists: dict[str, set[int]] = defaultdict(set)
    for path in attending:
        block = block_of(root, path)
        if block:
            lists[block[0]].add(block[1])
    known = list(known)
    for container, numbers in lists.items():
        blocks = root.get_submodule(container)
        if not isinstance(blocks, nn.ModuleList):
            continue
        classes = {type(blocks[number]) for number in numbers}
        for number, block in enumerate(blocks):
            path = f"{container}.{number}"
            named = any(of == path or of.startswith(f"{path}.") for of in known)
            if number not in numbers and type(block) in classes and not named:
                yield path

"""A YAML file with the line of every key, so that a mistake in a plan can be pointed at.

Read within bounds: aliases that multiply, and what is nested without end, are told like any other mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diag.errors import UserError
from diag.inputs.outside import MEGABYTE, reason, text_of

Place = tuple[str | int, ...]
"""Keys and positions from the top of a document, such as ("figures", 0, "probe")."""

MERGE = "tag:yaml.org,2002:merge"
"""The tag of `<<`: what is taken over from another mapping."""

TEXT = "tag:yaml.org,2002:str"
MOST_DIGITS = 300
"""Of what is no text: numbers in base 60 would take hours to read."""

MOST_VALUES, MOST_LEVELS = 100_000, 40
"""Of a document with every alias written out, and of what stands within what."""

QUOTES = "text with a colon or a brace needs quotes"


@dataclass(frozen=True)
class Document:
    """A file's content, and the line (from 1) of every key and list entry in it."""

    file: Path
    data: Any
    lines: Mapping[Place, int]

    def line(self, place: Place) -> int:
        """The line of a place, or of the innermost place around it that is in the file."""
        return self.lines.get(self.known(place), 1)

    def known(self, place: Place) -> Place:
        """As much of a place as the file has; steps that it lacks, such as a kind's name, are left out."""
        found: Place = ()
        for step in place:
            if (*found, step) in self.lines:
                found = (*found, step)
        return found

    def error(self, place: Place, message: str, tip: str | None = None) -> UserError:
        """The error that names file and line."""
        return UserError(f"{self.file}, line {self.line(place)}: {message}", tip)


def read_document(file: Path, what: str = "plan", *, like: str = "configs/demo.yaml") -> Document:
    """A YAML file. what: it, in words. like: an example, for tips.

    Raises UserError if it cannot be read, is no YAML, gives a key twice, or is beyond the bounds.
    """
    tip = f"give a YAML file, such as {like}"
    text = text_of(file, what, tip=tip, most=MEGABYTE)
    try:
        loader = _Loader(text, file)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{file}, line {line}: the character U+{error.character:04X} is not for YAML", "take it out"
        ) from error
    try:
        node = loader.get_single_node()
        data = None if node is None else loader.value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        tip = "indent with spaces, not with tabs" if r"'\t'" in (error.problem or "") else QUOTES
        raise UserError(f"{file}{where}: {error.problem or 'not YAML'}", tip) from error
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not YAML ({error})", tip) from error
    except RecursionError as error:  # of the parser, which goes as deep as the file does
        raise UserError(f"{file}: nested too deeply, {MOST_LEVELS} levels are the most", tip) from error
    finally:
        loader.dispose()
    return Document(file, data, loader.lines)


class _Loader(yaml.SafeLoader):
    """Notes the line of every place as it makes values of nodes; refuses a key that is given twice.

    values: made so far, what an alias stands for counted each time.
    """

    def __init__(self, text: str, file: Path) -> None:
        super().__init__(text)
        self.file = file
        self.lines: dict[Place, int] = {}
        self.values = 0

    def value(self, node: yaml.Node, place: Place = ()) -> Any:
        """What a node stands for; the keys of mappings as text."""
        self.lines.setdefault(place, node.start_mark.line + 1)
        self.count(node, len(place))
        if isinstance(node, yaml.SequenceNode):
            return [self.value(entry, (*place, number)) for number, entry in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return self.scalar(node)
        found = {}
        for key, value in self.pairs(node, len(place)).values():
            name = str(self.scalar(key))
            self.lines[(*place, name)] = key.start_mark.line + 1
            found[name] = self.value(value, (*place, name))
        return found

    def pairs(self, node: yaml.MappingNode, level: int) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """The keys and values of a mapping by the key's text, with those it takes over by `<<: *anchor`.

        Its own win over those it takes over, and of these the first that has a key.
        """
        self.count(node, level)
        self.refuse_keys(node)
        taken: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag != MERGE:
                own[key.value] = (key, value)
                continue
            for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(part, yaml.MappingNode):
                    raise self.refused(value, "'<<' takes over a mapping, or several", "<<: *NAME")
                taken = self.pairs(part, level + 1) | taken
        return taken | own

    def scalar(self, node: yaml.Node) -> Any:
        """What a single value stands for: text, a number, a date …"""
        if node.tag != TEXT and len(node.value) > MOST_DIGITS:
            raise self.refused(node, f"a number of {len(node.value):,} signs", "text needs quotes")
        try:
            return self.construct_object(node)
        except yaml.YAMLError:
            raise
        except Exception as error:  # a tag's constructor ends in whatever its conversion does
            said, kind = f"{node.value!s:.60}", str(node.tag).rpartition(":")[2]
            message = f"'{said}' is no {kind} ({reason(error)})"
            raise self.refused(node, message, f'text needs quotes: "{said}"') from error

    def count(self, node: yaml.Node, level: int) -> None:
        """Raises UserError where there are too many values, or one within too many others."""
        self.values += 1
        if self.values > MOST_VALUES:
            raise self.refused(
                node, f"more than {MOST_VALUES:,} values, aliases written out", "use fewer aliases"
            )
        if level > MOST_LEVELS:
            raise self.refused(node, f"nested too deeply, {MOST_LEVELS} levels are the most", "nest less")

    def refuse_keys(self, node: yaml.MappingNode) -> None:
        """YAML's libraries let the last of two equal keys win, silently; and a key may be a list."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.refused(key, "a key is one word", QUOTES)
            line = key.start_mark.line + 1
            if key.value in seen and key.tag != MERGE:
                raise self.refused(
                    key,
                    f"'{key.value}' is given again",
                    f"it is already on line {seen[key.value]}; leave one out",
                )
            seen[key.value] = line

    def refused(self, node: yaml.Node, message: str, tip: str) -> UserError:
        """The error that names file and line."""
        return UserError(f"{self.file}, line {node.start_mark.line + 1}: {message}", tip)

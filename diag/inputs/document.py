"""A YAML file with the line of every key, so that a mistake in a plan can be pointed at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diag.errors import UserError

Place = tuple[str | int, ...]
"""Keys and positions from the top of a document, such as ("figures", 0, "probe")."""


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


def read_document(file: Path) -> Document:
    """A YAML file. Raises UserError if it cannot be read, is no YAML, or gives a key twice."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(
            f"cannot read plan '{file}': {reason}", "give a YAML file, such as configs/demo.yaml"
        ) from error
    loader = _Loader(text, file)
    try:
        node = loader.get_single_node()
        data = None if node is None else loader.value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{file}{where}: {error.problem or 'not YAML'}", "text with a colon or a brace needs quotes"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not YAML ({error})", "give a YAML file") from error
    finally:
        loader.dispose()
    return Document(file, data, loader.lines)


class _Loader(yaml.SafeLoader):
    """Notes the line of every place as it makes values of nodes; refuses a key that is given twice."""

    def __init__(self, text: str, file: Path) -> None:
        super().__init__(text)
        self.file = file
        self.lines: dict[Place, int] = {}

    def value(self, node: yaml.Node, place: Place = ()) -> Any:
        """What a node stands for; the keys of mappings as text."""
        self.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(entry, (*place, number)) for number, entry in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return self.construct_object(node)
        self.refuse_repeated(node)
        self.flatten_mapping(node)  # `<<: *anchor`
        found = {}
        for key, value in node.value:
            name = str(self.construct_object(key))
            self.lines[(*place, name)] = key.start_mark.line + 1
            found[name] = self.value(value, (*place, name))
        return found

    def refuse_repeated(self, node: yaml.MappingNode) -> None:
        """YAML's libraries let the last of two equal keys win, silently."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise UserError(
                    f"{self.file}, line {line}: '{key.value}' is given again",
                    f"it is already on line {seen[key.value]}; leave one out",
                )
            seen[key.value] = line

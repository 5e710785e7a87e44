"""A YAML file with the line of every key, so that a mistake in a plan can be pointed at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        inner = self.known(place)
        return self.lines.get(inner, 1)

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
    loader = yaml.SafeLoader(text)
    lines: dict[Place, int] = {}
    try:
        node = loader.get_single_node()
        data = None if node is None else _value(loader, node, (), lines, file)
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
    return Document(file, data, lines)


def _value(
    loader: yaml.SafeLoader, node: yaml.Node, place: Place, lines: dict[Place, int], file: Path
) -> Any:
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated(node, file)
        loader.flatten_mapping(node)  # `<<: *anchor`
        return dict(_pairs(loader, node, place, lines, file))
    if isinstance(node, yaml.SequenceNode):
        return [
            _value(loader, entry, (*place, number), lines, file) for number, entry in enumerate(node.value)
        ]
    return loader.construct_object(node)


def _pairs(
    loader: yaml.SafeLoader, node: yaml.MappingNode, place: Place, lines: dict[Place, int], file: Path
) -> Iterator[tuple[str, Any]]:
    for key, value in node.value:
        name = str(loader.construct_object(key))
        lines[(*place, name)] = key.start_mark.line + 1
        yield name, _value(loader, value, (*place, name), lines, file)


def _refuse_repeated(node: yaml.MappingNode, file: Path) -> None:
    """YAML's libraries let the last of two equal keys win, silently."""
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
            raise UserError(
                f"{file}, line {key.start_mark.line + 1}: '{key.value}' is given again",
                f"it is already on line {seen[key.value]}; leave one out",
            )
        seen[key.value] = key.start_mark.line + 1

"""JSON and YAML that is spoilt: values, keys and the text itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from fuzzing.odd import ODD, near

Change = Callable[[Random, Path], str]
"""Spoils a file and says in words what it did."""


def json_value(draw: Random, file: Path) -> str:
    """One value or key of a JSON document."""
    found = json.loads(file.read_text(encoding="utf-8"))
    changed, said = _changed(draw, found)
    _put(file, json.dumps(changed).encode("utf-8", "surrogatepass"))
    return said


def json_text(draw: Random, file: Path) -> str:
    """The text of a JSON document, where a value cannot say it."""
    text = file.read_text(encoding="utf-8")
    key = json.loads(text)
    name = draw.choice(list(key)) if isinstance(key, dict) and key else "a"
    edits = {
        "one key twice": "{" + f'"{name}": 1, ' + text.lstrip()[1:],
        "nested deeply": text.replace("{", '{"deep": ' + "[" * 100_000 + "]" * 100_000 + ",", 1),
        "endless digits": text.replace("{", '{"digits": ' + "9" * 10_000 + ",", 1),
        "a byte order mark": "\ufeff" + text,
        "single quotes": text.replace('"', "'"),
        "a comment": "// words\n" + text,
        "a comma at the end": text.rstrip()[:-1] + ",}",
        "more behind the end": text + text,
        "null": "null",
        "a list": f"[{text}]",
        "a string": json.dumps(text),
        "a number": "7",
        "empty braces": "{}",
    }
    said = draw.choice(list(edits))
    _put(file, edits[said].encode())
    return said


def yaml_value(draw: Random, file: Path) -> str:
    """One value or key of a YAML document."""
    changed, said = _changed(draw, yaml.safe_load(file.read_text(encoding="utf-8")))
    text = yaml.safe_dump(changed, allow_unicode=draw.random() < 0.5, sort_keys=False)
    _put(file, text.encode("utf-8", "surrogatepass"))
    return said


def yaml_text(draw: Random, file: Path) -> str:
    """The text of a YAML document: tags, anchors, signs that it does not allow."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    places = [place for place, line in enumerate(lines) if ": " in line]
    place = draw.choice(places)
    before = lines[place].partition(": ")[0]
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    words = (
        *(
            "!!python/object:os.system x",
            "!!int x",
            "!!float words",
            "!!timestamp x",
            "!!binary ä",
            "!unknown x",
        ),
        *(
            "2024-13-45",
            "2024-02-30 25:61:61",
            "12:99:99",
            "*nowhere",
            "&a *a",
            "? x",
            "| \n",
            ">",
            "@x",
            "`x`",
        ),
        *(
            "{a: b",
            "[a, b",
            "'open",
            '"\\x"',
            "\x07",
            "\x00",
            "\ud7ff\ufffe",
            "0x",
            "0b2",
            ".inf",
            ".nan",
            "~",
        ),
        *("%TAG ! x", "{? [a]: b}", "{[a]: b}", "{<<: 3}", "<<: *x", "- x", "\t- x", ": : :", "1_0", "0o9"),
    )
    edits = {
        "aliases that multiply": "\n".join([*levels, text]),
        "aliases in a value": "\n".join([*levels, *lines[:place], f"{before}: *a8", *lines[place + 1 :]]),
        "a key twice": "\n".join([*lines[: place + 1], *lines[place:]]),
        "a tab": "\n".join([*lines[:place], "\t" + lines[place], *lines[place + 1 :]]),
        "two documents": f"{text}\n---\n{text}",
        "nested deeply": f"{text}\ndeep: " + "[" * 3000 + "]" * 3000,
        "a list": "- x\n- y\n",
        "a word": "words",
        "only a comment": "# nothing\n",
        "merged": f"<<: [{{a: 1}}, 3]\n{text}",
    }
    if draw.random() < 0.6:
        word = draw.choice(words)
        said, new = f"{before.strip()}: {word!r}", [*lines[:place], f"{before}: {word}", *lines[place + 1 :]]
        _put(file, "\n".join(new).encode("utf-8", "surrogatepass"))
        return said
    said = draw.choice(list(edits))
    _put(file, edits[said].encode())
    return said


def _changed(draw: Random, tree: Any) -> tuple[Any, str]:
    """A document with one change somewhere, more often near the top; and the change in words."""
    holder, where = tree, []
    if not isinstance(tree, dict | list) or not tree or draw.random() < 0.03:
        new = draw.choice(ODD)
        return new, f"the whole → {_short(new)}"
    while True:
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        where.append(str(key))
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.35:
            break
        holder = inner
    said = ".".join(where)
    way = draw.random()
    if way < 0.25:
        del holder[key]
        return tree, f"{said} dropped"
    if way < 0.32 and isinstance(holder, dict):
        name = draw.choice(("", "x", "é" * 300, "two\nlines", f"{key} ", str(key).upper()))
        holder[name] = holder.pop(key)
        return tree, f"{said} called {_short(name)}"
    if way < 0.37 and isinstance(holder, dict):
        name = draw.choice(("unknown", "format", "kind", "auto_map", "trust_remote_code", "dtype"))
        holder[name] = new = draw.choice(ODD)
        return tree, f"{name} added: {_short(new)}"
    holder[key] = new = near(draw, inner)
    return tree, f"{said} → {_short(new)}"


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 60 else f"{text[:50]}… ({len(text)} characters)"


def _put(file: Path, content: bytes) -> None:
    """Written anew: the file may be a link to the stock's."""
    file.unlink()
    file.write_bytes(content)

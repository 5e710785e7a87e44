"""The page that says what attnbias covers: docs/coverage.md."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from zoo.judge import EXACT, NOT_BUILT, VERDICTS

PACKAGES = {"torch": "torch", "timm": "timm", "open_clip": "open-clip-torch", "transformers": "transformers"}
ROUTES = {"module": "as a module", "name": "by name"}
SHOWN = 160


def written(known: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, from verdicts by `library|route|name`."""
    cells: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    lists: dict[tuple[str, str, str], list[tuple[str, str]]] = defaultdict(list)
    for job, found in sorted(known.items()):
        library, route, name = job.split("|")
        cells[library, route][found["verdict"]] += 1
        reasons = "; ".join(found["reasons"]).replace("\n", " ").replace("|", "/")
        reasons = re.sub(r"[\w:-]*(/[\w.-]+){2,}", "FOLDER", reasons)
        lists[found["verdict"], library, route].append((name, reasons[:SHOWN]))
    counted = [word for word in VERDICTS if word != NOT_BUILT]
    lines = ["# Coverage", "", INTRODUCTION.strip(), ""]
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES.values())
    lines += [f"Versions: {versions}. The command: `python benchmarks/coverage.py`.", ""]
    lines += [
        f"| library | route | judged | {' | '.join(counted)} | not built |",
        "|---" * (len(counted) + 4) + "|",
    ]
    for library in PACKAGES:
        for route, words in ROUTES.items():
            cell = cells.get((library, route))
            if cell:
                judged = sum(count for word, count in cell.items() if word != NOT_BUILT)
                row = " | ".join(str(cell[word]) for word in counted)
                lines.append(f"| {library} | {words} | {judged} | {row} | {cell[NOT_BUILT]} |")
    for word in (*[word for word in VERDICTS if word not in (EXACT, NOT_BUILT)], EXACT, NOT_BUILT):
        lines += ["", f"## {word[0].upper()}{word[1:]}", "", MEANINGS[word]]
        for library in PACKAGES:
            for route, words in ROUTES.items():
                of = lists.get((word, library, route))
                if not of:
                    continue
                lines += ["", f"### {library}, {words}: {word}", ""]
                if word == EXACT:
                    lines.append(", ".join(f"`{name}`" for name, _ in of))
                else:
                    lines += [f"- `{name}`: {reasons}" for name, reasons in of]
    return "\n".join(lines) + "\n"


INTRODUCTION = """
Which models attnbias measures, which it refuses, and whether what it says of them is right. Every
architecture of timm, open_clip and transformers that can be built small is built, with random weights;
so are torch's own. Each is given two different inputs, as a module (`diag.probe(module, batches)`) and
by name (from a folder that the library saved). A judge that shares no code with attnbias watches the
same model: it records every attention call and every softmax, runs each input alone, traces by gradients
whose tokens and whose values a call is over, computes the numbers densely in float64, and compares.
"""
MEANINGS = {
    "exact": "Every layer whose tokens meet their own values is in the table, with the numbers of "
    "the reference (1e-5), heads, layer numbers and inputs of the model; what else attends is named.",
    "partial (named)": "As exact, but a layer that could be measured is not; it is named with the reason.",
    "refused (true reason)": "No table; the reason that is given is what the judge saw, too.",
    "refused (false reason or raw exception)": "No table, and the reason is not what the judge saw, or "
    "is not one that it knows, or is a bare exception.",
    "wrong": "A number, an input, a head, a layer or a token set is not what it is called.",
    "silently incomplete": "What is in the table is right, but other attention is neither there nor named.",
    "not built": "These cannot be built here, or not small, or not run on generic inputs. They do not count.",
}

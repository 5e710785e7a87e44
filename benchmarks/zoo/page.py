"""The page that says what attnbias covers: docs/coverage.md."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

from zoo import of_others
from zoo.judge import EXACT, NOT_BUILT, REFUSED, VERDICTS

WITHOUT = "without attention"
WORDS = (*VERDICTS[:-1], WITHOUT, NOT_BUILT)
LAST = (EXACT, WITHOUT, NOT_BUILT)

PACKAGES = {"torch": "torch", "timm": "timm", "open_clip": "open-clip-torch", "transformers": "transformers"}
LIBRARIES = (*PACKAGES, "others")
ROUTES = {"module": "as a module", "name": "by name"}
SHOWN = 160
NONE_OF_ITS_OWN = re.compile(r"made no self-attention call|no self-attention layer|no attention layer")
"""Refusals of models that do not attend at all: they are counted apart, and named without a reason each."""


def written(known: Mapping[str, Mapping[str, Any]], site: Path | None = None) -> str:
    """The page, from verdicts by `library|route|name`; site: where the packages of other libraries lie."""
    cells: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    lists: dict[tuple[str, str, str], list[tuple[str, str]]] = defaultdict(list)
    for job, found in sorted(known.items()):
        library, route, name = job.split("|")
        reasons = "; ".join(found["reasons"]).replace("\n", " ").replace("|", "/")
        reasons = re.sub(r"[\w:-]*(/[\w.-]+){2,}", "FOLDER", reasons)
        word = found["verdict"]
        word = WITHOUT if word == REFUSED and NONE_OF_ITS_OWN.search(reasons) else word
        cells[library, route][word] += 1
        lists[word, library, route].append((name, reasons[:SHOWN]))
    lines = ["# Coverage", "", INTRODUCTION.strip(), ""]
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES.values())
    lines += [f"Versions: {versions}. The command: `python benchmarks/coverage.py`.", "", *_others(site)]
    counted = [word for word in WORDS if word not in (WITHOUT, NOT_BUILT)]
    lines += [
        f"| library | route | that attend | {' | '.join(counted)} | {WITHOUT} | {NOT_BUILT} |",
        "|---" * (len(counted) + 5) + "|",
    ]
    for library in LIBRARIES:
        for route, words in ROUTES.items():
            cell = cells.get((library, route))
            if cell:
                judged = sum(cell[word] for word in counted)
                row = " | ".join(str(cell[word]) for word in (*counted, WITHOUT, NOT_BUILT))
                lines.append(f"| {library} | {words} | {judged} | {row} |")
    for word in (*[word for word in WORDS if word not in LAST], *LAST):
        if not any(of == word for of, _, _ in lists):
            continue
        lines += ["", f"## {word[0].upper()}{word[1:]}", "", MEANINGS[word]]
        for library in LIBRARIES:
            for route, words in ROUTES.items():
                of = lists.get((word, library, route))
                if not of:
                    continue
                lines += ["", f"### {library}, {words}: {word}", ""]
                if word in (EXACT, WITHOUT):
                    lines.append(", ".join(f"`{name}`" for name, _ in of))
                else:
                    lines += [f"- `{name}`: {reasons}" for name, reasons in of]
    return "\n".join(lines) + "\n"


def _others(site: Path | None) -> list[str]:
    """How the packages of other libraries are fetched, at the versions that lie in a folder."""
    if site is None:
        return []
    found = {
        of.metadata["Name"].lower().replace("_", "-"): of.version for of in distributions(path=[str(site)])
    }
    named = " ".join(f"{name}=={found[name]}" for name in of_others.PACKAGES if name in found)
    return [
        "The packages of other libraries are no dependencies of this one; they were put into a folder of",
        "their own, which `python benchmarks/coverage.py --site FOLDER` reads:",
        "",
        "```",
        f"pip install --no-deps --target FOLDER {named}",
        "```",
        "",
    ]


INTRODUCTION = """
Which models attnbias measures, which it refuses, and whether what it says of them is right. Every
architecture of timm, open_clip and transformers that can be built small is built, with random weights; so
are torch's own, and models of libraries that write attention out themselves. Each is given two different
inputs, as a module (`diag.probe(module, batches)`) and by name (from a folder that the library saved). A
judge that shares no code with attnbias watches the same model: it records every attention call, follows every
softmax to what it is multiplied with, runs each input alone, finds out whose tokens and whose values a call
is over, by gradients or by changing one number and running a layer again, computes the numbers densely in
float64, and compares.
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
    "without attention": "No table, and rightly: nothing attends to its own tokens. They do not count.",
    "no verdict": "The process in which the model was judged ended, or took too long.",
    "judge failed": "The judge itself raised an error.",
    "not built": "These cannot be built here, or not small, or not run on generic inputs. They do not count.",
}

"""A table as LaTeX that fits a column of `article`: rules of booktabs, numbers aligned by siunitx."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import pandas as pd

from diag.results.decimals import fixed

PACKAGES = ("booktabs", "siunitx", "adjustbox")
SIGNS = {
    "−": "$-$",
    "±": "$\\pm$",
    "×": "$\\times$",
    "→": "$\\rightarrow$",
    "·": "$\\cdot$",
    "–": "--",
    "…": "\\dots{}",
    "‖": "$\\|$",
    "²": "$^2$",
    "≤": "$\\leq$",
    "≥": "$\\geq$",
    "ρ": "$\\rho$",
    "α": "$\\alpha$",
}
"""Signs that not every TeX engine has in its fonts."""
NUMBER = re.compile(r"([+−-]?)(\d+)(?:\.(\d+))?")
MISSING = ("", "–", "--", "nan")
"""What stands in a column of numbers where there is none."""
LINE = 12
"""Characters of a heading's line."""


def latex(frame: pd.DataFrame, about: str = "") -> str:
    """A `tabular`, everything escaped: text to the left, numbers aligned at their points.

    Numbers may be text, as `decimal` writes them. Long headings stand in several lines; a table that is wider
    than the line all the same is shrunk to it. about: where the numbers are from, as a comment.
    """
    cells = {name: [_text(value) for value in frame[name]] for name in frame}
    columns = {name: _columns_of_numbers(column) for name, column in cells.items()}
    styler = (
        pd.DataFrame(cells)
        .style.hide(axis="index")
        .format({name: _number for name, column in columns.items() if column}, escape="latex")
    )
    # text is escaped before it is formatted
    styler = styler.format_index(_heading, escape="latex", axis=1)
    text = styler.to_latex(
        hrules=True, siunitx=True, column_format="".join(column or "l" for column in columns.values())
    )
    for sign, command in SIGNS.items():
        text = text.replace(sign, command)
    lines = [
        "% needs " + "".join(f"\\usepackage{{{name}}}" for name in PACKAGES),
        *([f"% {' '.join(about.split())}"] if about else []),
        "\\begin{adjustbox}{max width=\\linewidth}",
        text.rstrip(),
        "\\end{adjustbox}",
    ]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    """A cell: floats with three decimals, as everywhere."""
    return ("–" if value != value else fixed(value)) if isinstance(value, float) else str(value)


def _columns_of_numbers(cells: list[str]) -> str:
    """What sets the cells in a column, `S[table-format=-1.3]`; empty if one of them is no number."""
    found = [NUMBER.fullmatch(cell) for cell in cells if cell not in MISSING]
    if not found or None in found:
        return ""
    signs = {match[1] for match in found if match} - {""}
    whole, part = (max(len(match[place] or "") for match in found if match) for place in (2, 3))
    plus = "retain-explicit-plus, " if "+" in signs else ""
    sign = "+" if plus else "-" if signs else ""
    return f"S[{plus}table-format={sign}{whole}.{part}]"


def _number(cell: object) -> str:
    return "{--}" if cell in MISSING else str(cell).replace("−", "-")


def _heading(name: object) -> str:
    """A heading, in several lines where it is long."""
    lines = textwrap.wrap(str(name), LINE, break_long_words=False, break_on_hyphens=False)
    return str(name) if len(lines) < 2 else "\\shortstack{" + "\\\\".join(lines) + "}"

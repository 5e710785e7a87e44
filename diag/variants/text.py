"""How a variant is written: `NAME[=FORM][:LAYERS]`, for example `xsa`, `gated_xsa=sigmoid`, `xsa:0-5,8`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from diag.errors import UserError, did_you_mean, ranges
from diag.variants.formulas import BASELINE, BROADCASTS, CHANGES

NAMES = (BASELINE, *CHANGES, *BROADCASTS)


@dataclass(frozen=True)
class Variant:
    """A variant of attention, or of the MLP branch, on some layers.

    form: the parameterisation, empty where there is none to choose. layers: the model's own numbers, None
        for all.
    """

    name: str
    form: str = ""
    layers: frozenset[int] | None = None

    @property
    def kind(self) -> str:
        """`NAME[=FORM]`: what a layer remembers of itself."""
        default = CHANGES[self.name].forms[:1] if self.name in CHANGES else ()
        return self.name if self.form in ("", *default) else f"{self.name}={self.form}"


def parse(text: str) -> Variant:
    """Reads `NAME[=FORM][:LAYERS]`. Raises UserError for an unknown name or form, or no range of layers."""
    match = re.fullmatch(r"([^=:]+)(?:=([^:]+))?(?::(.+))?", text.strip())
    name = match[1].strip().replace("-", "_") if match else ""
    if match is None or name not in NAMES:
        near = did_you_mean(name, NAMES) or f"variants are {', '.join(NAMES)}"
        raise UserError(f"there is no attention variant '{name or text}'", near)
    forms = CHANGES[name].forms if name in CHANGES else ()
    if match[2] and match[2] not in forms:
        allowed = f"write {name}={' or '.join(forms)}" if forms else f"write {name}"
        raise UserError(f"variant '{name}' has no form '{match[2]}'", allowed)
    form = match[2] or (forms[0] if forms else "")
    layers = None if match[3] is None else frozenset(ranges(match[3], f"variant {text}:", "xsa:0,5-11"))
    return Variant(name, form, layers)


def listing() -> dict[str, dict[str, Any]]:
    """Every variant with its definition, its forms and where it is from."""
    rows: list[tuple[str, str, tuple[str, ...], str]] = [
        (BASELINE, "the model as its library built it", (), "-"),
        *((name, (c.__doc__ or "").splitlines()[0], c.forms, c.source) for name, c in CHANGES.items()),
        *((name, said, (), "Context Broadcasting, 2210.08457") for name, said in BROADCASTS.items()),
    ]
    return {name: {"definition": said, "forms": f, "source": s} for name, said, f, s in rows}

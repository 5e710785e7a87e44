"""What `attnbias attend` looks at where nobody says: an input of the demonstration, the last layer, a token.

What was taken is said, with the options that choose another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diag.errors import say

IMAGE, TEXT = "demo:astronaut", "demo"


def completed(models: tuple[str, ...], fields: Mapping[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """The fields of a plan with those that were left out, which are said unless quiet.

    The target of an image that nobody names stays open: it is the patch in the middle of the first grid.
    Raises UserError where the first name is not known.
    """
    found, said = dict(fields), list[str]()

    def take(field: str, value: Any, words: str) -> None:
        found[field] = value
        said.append(words)

    if found["image"] is None and found["text"] is None:
        if found["token"] is not None or found["seq_len"] is not None or _reads_text(models[0], fields):
            take("text", TEXT, f"--text {TEXT}")
        else:
            take("image", IMAGE, f"--image {IMAGE}")
    if found["layer"] is None and found["depth"] is None:
        take("layer", -1, "--layer last")
    if found["text"] is not None and found["token"] is None:
        take("token", -1, "--token -1, the last")
    placed = any(found.get(field) is not None for field in ("patch", "pixel", "question"))
    if found["image"] is not None and not placed:
        said.append("the patch in the middle (--patch ROW,COLUMN names another)")
    if said and not quiet:
        say(f"by default: {', '.join(said)}")
    return found


def _reads_text(model: str, fields: Mapping[str, Any]) -> bool:
    """Whether a model takes texts and no images, as far as its name or its folder tells."""
    from diag.models.families import family_of
    from diag.models.names.resolve import parse

    spec = parse(model, trust_remote_code=fields["trust_remote_code"])
    return family_of(spec.family).reads_text(spec)

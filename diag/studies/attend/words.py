"""The window of a text that is looked at."""

from __future__ import annotations

from diag.errors import UserError
from diag.inputs.items import Inputs
from diag.models.base import Model, Sample, Tower
from diag.run.progress import Listener


def window(model: Model, tower: Tower, given: Inputs, seq_len: int | None, listener: Listener) -> Sample:
    """The first window of a text, of `seq_len` tokens; if None, the tower's usual length or the whole text.

    Raises UserError if the text is shorter than `seq_len`, or the tower takes no such length.
    """
    windows = tower.samples(given, seq_len)
    found, another = next(windows, None), next(windows, None)
    if found is None and seq_len is None:
        found = _whole(tower, given)
    if found is None:
        raise UserError(
            f"the text is shorter than {seq_len or tower.facts.get('context')} tokens of '{model.name}'",
            "give more text" if seq_len is None else f"give more text, or --seq-len below {seq_len}",
        )
    if another is not None:
        listener.say(f"{model.name}: the first {len(found.read())} tokens of the text are looked at")
    return Sample(found.id.rpartition(":")[0], found.read)


def _whole(tower: Tower, given: Inputs) -> Sample | None:
    """The longest window that the text fills: towers say only whether a length is possible."""
    low, high = tower.facts.get("special_tokens", 0) + 1, 4096
    best = None
    while low <= high:
        middle = (low + high) // 2
        try:
            found = next(tower.samples(given, middle), None)
        except UserError:  # longer than the context, or a tower of one length only
            found = None
        if found is None:
            high = middle - 1
        else:
            best, low = found, middle + 1
    return best

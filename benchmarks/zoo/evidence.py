"""What the judge saw of a model by itself: each input's calls, whose tokens they are of, what is random."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.observer import Call, observed
from zoo.provenance import CROSS, OWN, POOLED, UNKNOWN, kinds_of
from zoo.replay import kinds_of_eager

HEAD_NAMES = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads", "nb_heads")


def within(path: str, of: str) -> bool:
    """Whether a module is another, or in it."""
    return path == of or path.startswith(f"{of}.") or of == ""


@dataclass
class Evidence:
    """What a model does with some inputs.

    calls: of each input alone, in order. together: of all inputs in one batch. kinds: of whose tokens a
    fused call is, by (path, run, number of the call in that run). masks: which tokens of an input are real,
    where one came with it. coupled: whether an input gives other outputs beside others. random: whether the
    same input gives other outputs twice, of attention as well: what is drawn behind it changes no number.
    texts: how many tokens the texts have, which may share words. failed: what the model says of its own
    inputs. notes: what could not be found out. batch: all of the inputs.
    """

    root: nn.Module
    calls: list[list[Call]]
    together: list[Call]
    kinds: dict[tuple[str, int, bool, int], str] = field(default_factory=dict)
    masks: list[Tensor | None] = field(default_factory=list)
    coupled: bool = False
    random: bool = False
    failed: str = ""
    prefix: int | None = None
    texts: frozenset[int] = frozenset()
    notes: list[str] = field(default_factory=list)
    batch: Any = None

    @property
    def inputs(self) -> int:
        """How many."""
        return len(self.calls)

    def grouped(self, number: int) -> dict[tuple[str, int], list[Call]]:
        """The calls of one input that were seen whole, by module and run."""
        found: dict[tuple[str, int], list[Call]] = defaultdict(list)
        for call in self.calls[number]:
            if call.value is not None:
                found[call.path, call.run].append(call)
        return found

    @property
    def eager(self) -> list[str]:
        """Modules that compute softmax attention themselves, in order."""
        return list(dict.fromkeys(call.path for call in self.together if call.eager))

    @property
    def seen(self) -> list[str]:
        """Modules whose attention was seen whole, PyTorch's and their own, in order."""
        return list(dict.fromkeys(call.path for call in self.together if call.value is not None))

    @property
    def attending(self) -> list[str]:
        """Modules that attend, in order."""
        return list(dict.fromkeys(call.path for call in self.together))

    def kind(self, path: str, run: int, without: frozenset[int] = frozenset()) -> set[str]:
        """What the calls of a module's run are over; without: numbers of those that are left out."""
        return {
            kind
            for (of, which, _, number), kind in self.kinds.items()
            if (of, which) == (path, run) and number not in without
        } or {UNKNOWN}

    def kinds_within(self, path: str) -> set[str]:
        """What the calls of a module and of those in it are over, and of those that it is in."""
        return {kind for (of, *_), kind in self.kinds.items() if within(of, path) or within(path, of)}


def gathered(
    root: nn.Module,
    forward: Callable[[Any], Any],
    together: Any,
    each: Sequence[Any],
    masks: Sequence[Tensor | None] | None = None,
    prefix: int | None = None,
) -> Evidence:
    """Runs a model on a batch and on each of its inputs alone.

    forward: a batch -> the output. Raises nothing: what the model raises is in `failed`.
    """
    outputs: list[Tensor] = []

    def run(batch: Any) -> Callable[[], None]:
        return lambda: outputs.append(_first_tensor(forward(batch)))

    try:
        of_batch = observed(root, run(together))
        calls = [observed(root, run(one)) for one in each]
        calls_again = observed(root, run(each[0]))
    except Exception as error:  # a model may say anything of inputs
        return Evidence(root, [], [], failed=f"{type(error).__name__}: {error}")
    found = Evidence(root, calls, of_batch, masks=list(masks or [None] * len(each)), prefix=prefix)
    found.batch = together
    whole, single, again = outputs[0], outputs[1 : 1 + len(each)], outputs[-1]
    found.random = not _alike(single[0], again, 0) and not _same_calls(calls[0], calls_again)
    found.coupled = not any(
        all(_alike(part, one, 1e-3) for part, one in zip(whole.split(1, axis), single, strict=True))
        for axis in range(min(2, whole.ndim))
        if whole.shape[axis] == len(each)
    )
    for row, of_input in enumerate(calls):
        if len(of_input) == len(of_batch):
            for call, beside in zip(of_input, of_batch, strict=True):
                _as_in_the_batch(call, beside, row, len(each))
    try:
        traced = kinds_of(root, lambda: forward(_differentiable(each[0])))
    except Exception as error:  # not every model can be differentiated
        found.notes.append(f"whose tokens could not be traced: {type(error).__name__}: {str(error)[:80]}")
        traced = []
    if found.eager:
        traced += kinds_of_eager(root, lambda: forward(each[0]))
    number: dict[tuple[str, int, bool], int] = defaultdict(int)
    own: dict[tuple[str, int, bool, int], int] = {}
    for call, kind in traced:
        place = (call.path, call.run, call.eager)
        found.kinds[(*place, number[place])] = kind
        own[(*place, number[place])] = call.own
        number[place] += 1
    for of_input in calls:
        number.clear()
        for call in of_input:
            place = (call.path, call.run, call.eager)
            call.own = own.get((*place, number[place]), 0)
            number[place] += 1
    _keys_of_tokens(found)
    return found


def _keys_of_tokens(found: Evidence) -> None:
    """Takes for pooled what has keys beside its own tokens' that are of tokens, too.

    A token that is the same for all inputs, as a class token is at first, is another one deeper in the stack.
    """
    number: dict[tuple[str, int, bool], int] = defaultdict(int)
    beside: dict[str, list[tuple[tuple[str, int, bool, int], bool, int]]] = defaultdict(list)
    for call, other in zip(*found.calls[:2], strict=False):
        place = (call.path, call.run, call.eager)
        at = (*place, number[place])
        number[place] += 1
        if found.kinds.get(at) == OWN and len(set(call.lengths)) > 1:
            stack = re.sub(r"\d+", "#", call.path)
            beside[stack].append((at, _without_tokens(call, other), call.lengths[0]))
    for of_stack in beside.values():
        if not all(without for _, without, _ in of_stack):
            found.kinds |= {at: POOLED if queries > 1 else CROSS for at, _, queries in of_stack}


def _without_tokens(call: Call, other: Call) -> bool:
    """Whether the keys beside the queries' own are the same for two inputs: they are of no token."""
    assert call.value is not None
    if other.value is None or other.value.shape != call.value.shape:
        return False
    beside = torch.ones(call.lengths[1], dtype=torch.bool)
    beside[call.own : call.own + call.lengths[0]] = False
    return torch.equal(call.value[..., beside, :], other.value[..., beside, :])


def _as_in_the_batch(call: Call, beside: Call, row: int, inputs: int) -> None:
    """Takes an input's numbers from the batch where they are the same but for rounding.

    A sum over a larger batch is rounded elsewhere; the table is of the batch.
    """
    if call.eager != beside.eager or call.value is None or beside.value is None:
        return
    size = len(call.value)
    if len(beside.value) != size * inputs:
        return
    parts = {}
    for name in ("value", "output", *(("pattern",) if call.eager else ("query", "key"))):
        mine, theirs = getattr(call, name), getattr(beside, name)
        part = theirs[row * size : (row + 1) * size]
        if part.shape != mine.shape or (name != "output" and not _alike(part, mine, 2e-2)):
            return
        parts[name] = part
    for name, part in parts.items():
        setattr(call, name, part)
    # a mask that hides nothing of one input may be left out where it is alone
    mask = beside.mask
    if mask is not None and mask.ndim > 2 and mask.shape[0] == size * inputs and mask.shape[0] > 1:
        mask = mask[row * size : (row + 1) * size]
    call.mask, call.causal = mask, beside.causal


def _same_calls(calls: Sequence[Call], again: Sequence[Call]) -> bool:
    """Whether attention gave the same twice."""
    outputs = [(one.output, two.output) for one, two in zip(calls, again, strict=False)]
    return len(calls) == len(again) and all(
        one is two or (one is not None and two is not None and _alike(one, two, 0)) for one, two in outputs
    )


def _differentiable(batch: Any) -> Any:
    def on(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().clone().requires_grad_()
        return x

    if hasattr(batch, "data") and hasattr(batch, "ids"):  # a batch of a tower
        import dataclasses

        return dataclasses.replace(batch, data=_differentiable(batch.data))
    if isinstance(batch, dict):
        return {name: on(x) for name, x in batch.items()}
    return on(batch)


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.detach().double() if output.is_floating_point() else output.detach()
    values = (
        output.values() if hasattr(output, "values") else output if isinstance(output, list | tuple) else ()
    )
    for value in values:
        found = _first_tensor(value)
        if found.ndim:
            return found
    return torch.zeros(())


def _alike(x: Tensor, y: Tensor, tolerance: float) -> bool:
    if x.shape != y.shape:
        return False
    if not x.is_floating_point() or not tolerance:
        return bool(
            torch.equal(
                x.nan_to_num() if x.is_floating_point() else x, y.nan_to_num() if x.is_floating_point() else y
            )
        )
    scale = max(1.0, float(x.nan_to_num().abs().max())) if x.numel() else 1.0
    return x.numel() == 0 or float((x - y).nan_to_num().abs().max()) <= tolerance * scale


def configured_heads(root: nn.Module, path: str) -> int | None:
    """How many heads an attention module has, in the module's own words or its configuration's."""
    module = root.get_submodule(path)
    for name in HEAD_NAMES:
        count = getattr(module, name, None)
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            return count
    config = getattr(module, "config", None)
    for name in (
        ("encoder_attention_heads",) if re.search(r"encoder\.", path) else ("decoder_attention_heads",)
    ):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    for name in HEAD_NAMES:
        count = getattr(config, name, None)
        if isinstance(count, int):
            return count
    return None

"""What people hook, beside what attention used: each layer's value projection and its output projection.

Which module people hook is a matter of names, and the tables of names are here. Whether it shows what
attention uses is not: the calls themselves are captured in the same forward pass, and compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.errors import UserError
from diag.measure.loop import told_if_the_model_fails
from diag.models.base import Batch, Model, Tower
from diag.models.hooks.block_parts import upwards
from diag.models.hooks.layers import Layer
from diag.models.value_constants import value_constants
from diag.studies.audit.reasons import Finding, error_of, why_outputs_differ, why_values_differ
from diag.studies.audit.words import CONVOLVED, MISSING, NEVER, NORM, SHARED, UNEXPLAINED

VALUES, OUTPUT = "V", "Y"
"""What a hook is taken to show: values, and outputs before the output projection."""

OWN = ("v_proj", "value", "v_lin", "v", "to_v", "value_proj", "v_linear", "proj_v", "linear_v", "Wv", "wv")
EXPANDED = ("kv_b_proj",)
FUSED = (
    *("qkv", "c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj", "to_qkv", "att_proj", "W_pack"),
    *("attn_qkv", "in_proj_qkv", "in_proj_qkvz", "kv", "kv_proj", "key_value", "to_kv"),
)
VALUE_NAMES = (*OWN, *EXPANDED, *FUSED)
OUTPUT_NAMES = (
    *("o_proj", "out_proj", "c_proj", "proj", "dense", "out_lin", "to_out", "o", "out", "wo", "Wo"),
    *("output_proj", "resid_proj", "linear_out"),
)
"""What modules are called that people hook, the plainest first."""

LARGE = 1e6
"""Beside numbers so large nothing is left of what a norm adds to their mean of squares."""

IN_PROJECTION = "in_proj_weight"
"""Of `nn.MultiheadAttention`: a parameter, and no module that a hook could be put on."""


@dataclass(frozen=True)
class Row:
    """One hook of one layer. path: of the module. of: `VALUES` or `OUTPUT`."""

    layer: int
    hook: str
    path: str
    of: str
    found: Finding


@dataclass
class Pass:
    """What one forward pass showed. calls: of each layer, by number. shown: of each module, by path, what it
    returned (values) or read (outputs), each with its place in the order of things. order: of each layer's
    calls, the place of the first and of the last."""

    calls: dict[int, list[AttentionCall]] = field(default_factory=dict)
    shown: dict[tuple[str, str], list[tuple[int, Tensor]]] = field(default_factory=dict)
    order: dict[int, tuple[int, int]] = field(default_factory=dict)
    changed: dict[int, list[Tensor]] = field(default_factory=dict)
    clock: int = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def note(self, path: str, of: str, tensor: Tensor) -> None:
        self.shown.setdefault((path, of), []).append((self.tick(), tensor.detach().clone()))

    def last_before(self, path: str, of: str, time: int) -> Tensor | None:
        """What a module showed last before a time."""
        found = [tensor for at, tensor in self.shown.get((path, of), []) if at < time]
        return found[-1] if found else None

    def first_after(self, path: str, of: str, time: int) -> tuple[int, Tensor] | None:
        """What a module showed first after a time, and when."""
        return next(((at, tensor) for at, tensor in self.shown.get((path, of), []) if at > time), None)


@dataclass(frozen=True)
class Hooked:
    """The modules of a layer that people hook. value: the module, or `nn.MultiheadAttention` itself."""

    layer: Layer
    value: tuple[str, nn.Module] | None
    outputs: Sequence[tuple[str, nn.Module]]


def audit_hooks(model: Model, tower: Tower, batch: Batch, *, tolerance: float) -> list[Row]:
    """The value projection and the output projection of each layer, beside what attention used.

    batch: of the tower's, short: everything is kept at once. Raises UserError as the model's run does.
    """
    hooked = [_hooked(model.module, layer, tower.layers) for layer in tower.layers]
    seen = watched(tower, batch, hooked)
    rows, earlier = list[Row](), dict[int, Tensor]()
    for one in hooked:
        number = one.layer.index
        if number not in seen.calls:
            continue
        used = values_of(seen.calls[number])
        rows.append(_value_row(model, one, seen, used, earlier, tolerance))
        rows.append(_output_row(tower, batch, one, hooked, seen, tolerance))
        earlier[number] = used
    return rows


# --- which modules people hook


def _hooked(root: nn.Module, layer: Layer, layers: Sequence[Layer]) -> Hooked:
    """By their names, within the layer's module or the nearest module around it that holds no other layer."""
    paths = {module: path for path, module in root.named_modules()}
    path, value, outputs = paths.get(layer.module, layer.path), None, list[tuple[str, nn.Module]]()
    others = {one.module for one in layers if one.module is not layer.module}
    for module in upwards(root, path):
        inside = [(paths[one], one) for one in module.modules()]
        if any(one in others for _, one in inside):
            break
        value = value or _value_of(inside)
        outputs = outputs or [(name, one) for name, one in inside if _is_called(name, one, OUTPUT_NAMES)]
        if value and outputs:
            break
    return Hooked(layer, value, outputs)


def _value_of(inside: Sequence[tuple[str, nn.Module]]) -> tuple[str, nn.Module] | None:
    for wanted in VALUE_NAMES:
        for name, module in inside:
            if _is_called(name, module, (wanted,)):
                return name, module
    return next(((name, one) for name, one in inside if isinstance(one, nn.MultiheadAttention)), None)


def value_module(model: Model, tower: Tower, layer: Layer) -> nn.Module | None:
    """The value projection of a layer, by its name."""
    found = _hooked(model.module, layer, tower.layers).value
    return None if found is None else found[1]


def _is_called(path: str, module: nn.Module, names: Sequence[str]) -> bool:
    """Whether a module is of one of the names; the first of a list of modules is called as the list."""
    parts = path.split(".")
    own = parts[-2] if parts[-1] == "0" and len(parts) > 1 else parts[-1]
    return own in names and isinstance(getattr(module, "weight", None), Tensor)


# --- one forward pass


def watched(
    tower: Tower,
    batch: Batch,
    hooked: Sequence[Hooked],
    change: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
) -> Pass:
    """A forward pass with calls and hooks seen. change: what is done to Y, by layer."""
    seen = Pass()

    def on_call(call: AttentionCall) -> Tensor | None:
        seen.calls.setdefault(call.layer, []).append(call)
        now = seen.tick()
        seen.order[call.layer] = seen.order.get(call.layer, (now, now))[0], now
        if change is None or call.layer not in change:
            return None
        replaced = change[call.layer](call.output)
        seen.changed.setdefault(call.layer, []).append(replaced)
        return replaced

    with (
        torch.inference_mode(),
        told_if_the_model_fails(tower, batch),
        _noted(hooked, seen),
        tower.capture(tower.layers, on_call),
    ):
        tower.forward(batch)
    return seen


@contextmanager
def _noted(hooked: Sequence[Hooked], seen: Pass) -> Iterator[None]:
    """Hooks as people put them: on the output of one module, and on the input of the other."""
    values = {path: module for one in hooked if one.value for path, module in [one.value]}
    outputs = {path: module for one in hooked for path, module in one.outputs}
    with ExitStack() as undone:
        for path, module in values.items():
            if isinstance(module, nn.MultiheadAttention):
                hook = partial(_multi_head, seen, path)
                undone.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            else:
                undone.callback(module.register_forward_hook(partial(_returned, seen, path)).remove)
        for path, module in outputs.items():
            undone.callback(module.register_forward_pre_hook(partial(_read, seen, path)).remove)
        yield


def _returned(seen: Pass, path: str, module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        seen.note(path, VALUES, _channels_last(module, output))


def _read(seen: Pass, path: str, module: nn.Module, args: Any) -> None:
    if args and isinstance(args[0], Tensor):
        seen.note(path, OUTPUT, _channels_last(module, args[0]))


def _multi_head(seen: Pass, path: str, module: Any, args: Any, kwargs: Any) -> None:
    """What the third part of `in_proj_weight` makes of what the module reads, as people compute it."""
    value = args[2] if len(args) > 2 else kwargs["value"]
    weight = module.v_proj_weight if module.in_proj_weight is None else module.in_proj_weight.chunk(3)[2]
    bias = None if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[2]
    seen.note(path, VALUES, F.linear(value, weight, bias))


def _channels_last(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d | nn.Conv1d) and x.ndim > 2:
        return x.movedim(1, -1)
    return x


# --- what was found


def values_of(calls: Sequence[AttentionCall]) -> Tensor:
    """V of a layer's calls, `[row, head, dim]`; rows are tokens, in order."""
    return torch.cat([call.value.transpose(1, 2).flatten(0, 1) for call in calls])


def outputs_of(outputs: Sequence[Tensor]) -> Tensor:
    """Y of a layer's calls, `[row, head, dim]`. outputs: `[batch, head, token, dim]`."""
    return torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])


def _orders(x: Tensor) -> list[Tensor]:
    """`[…, channel]` as rows, and where it has two axes before with the other one first, too."""
    flat = x.reshape(-1, x.shape[-1])
    return [flat, x.transpose(0, 1).flatten(0, 1)] if x.ndim == 3 and 1 not in x.shape[:2] else [flat]


def _best(findings: Sequence[Finding]) -> Finding:
    """The first that explains, else the first."""
    return next((one for one in findings if one.reason != UNEXPLAINED), findings[0])


def _value_row(
    model: Model, one: Hooked, seen: Pass, used: Tensor, earlier: Mapping[int, Tensor], tolerance: float
) -> Row:
    layer, calls = one.layer, seen.calls[one.layer.index]
    if one.value is None:
        return Row(layer.index, "value projection", layer.path, VALUES, _without(used, earlier, tolerance))
    path, module = one.value
    name = IN_PROJECTION if isinstance(module, nn.MultiheadAttention) else path.rpartition(".")[2]
    shown = seen.last_before(path, VALUES, seen.order[layer.index][0])
    if shown is None:
        found = _without(used, earlier, tolerance)
        found = found if found.reason == SHARED else _silent(module)
        return Row(layer.index, name, path, VALUES, found)
    found = _best(
        [
            why_values_differ(
                rows,
                used,
                heads=calls[0].heads,
                tolerance=tolerance,
                latent=_compressed(module, one),
                earlier=earlier,
                constants=constants_of(model, layer, module),
            )
            for rows in _orders(shown)
        ]
    )
    if found.reason == UNEXPLAINED and layer.form.value_from == "mixed":
        found = Finding(found.relative_error, math.nan, CONVOLVED, "as by a convolution behind it")
    return Row(layer.index, name, path, VALUES, found)


def _without(used: Tensor, earlier: Mapping[int, Tensor], tolerance: float) -> Finding:
    """Where there is no projection that ran: V is that of an earlier layer, or of nobody knows whom."""
    for layer, values in earlier.items():
        if values.shape == used.shape and (left := error_of(values, used)) < tolerance:
            return Finding(math.nan, left, SHARED, f"of layer {layer}")
    return Finding(math.nan, math.nan, MISSING, "none of the usual names")


def _silent(module: nn.Module) -> Finding:
    """Of a module whose weights are read without its being run."""
    return Finding(math.nan, math.nan, NEVER, "its weights are read, the module itself is not run")


def _compressed(module: Any, one: Hooked) -> int:
    """How many numbers a projection reads where they are fewer than the stream has; 0 of others."""
    read = getattr(module, "in_features", 0)
    widths = [int(output.weight.shape[0]) for _, output in one.outputs if isinstance(output, nn.Linear)]
    return read if widths and 0 < read < widths[0] else 0


def constants_of(model: Model, layer: Layer, module: Any = None) -> dict[str, Tensor]:
    """The constants that a library may fold away, by name, `[channel]`; none where they are not known."""
    bias = getattr(module, "bias", None)
    found = {"b_V": bias} if isinstance(bias, Tensor) else {}
    with suppress(UserError):
        found["b_V + W_V β"] = value_constants(model.module, [layer])[layer.index]
    return found


def _output_row(
    tower: Tower, batch: Batch, one: Hooked, hooked: Sequence[Hooked], seen: Pass, tolerance: float
) -> Row:
    layer = one.layer
    output = outputs_of([call.output for call in seen.calls[layer.index]])
    width, last = output[0].numel(), seen.order[layer.index][1]
    events = [(path, seen.first_after(path, OUTPUT, last)) for path, _ in one.outputs]
    ran = [(event[0], path, event[1]) for path, event in events if event and event[1].shape[-1] == width]
    if not ran:
        found = Finding(math.nan, math.nan, MISSING, "none of the usual names")
        names = dict(one.outputs)
        path = next((path for path in names if path.endswith("out_proj")), layer.path)
        if path in names and not any(event for _, event in events):
            return Row(layer.index, path.rpartition(".")[2] + " input", path, OUTPUT, _silent(names[path]))
        return Row(layer.index, "output projection", layer.path, OUTPUT, found)
    _, path, read = min(ran, key=lambda event: event[0])
    found = _best([why_outputs_differ(rows, output, None, tolerance=tolerance) for rows in _orders(read)])
    if found.reason == UNEXPLAINED:
        found = _after_a_change(tower, batch, one, hooked, path, (read, output), tolerance)
    parts = path.split(".")
    name = parts[-2] if parts[-1] == "0" else parts[-1]
    return Row(layer.index, f"{name} input", path, OUTPUT, found)


def _after_a_change(
    tower: Tower,
    batch: Batch,
    one: Hooked,
    hooked: Sequence[Hooked],
    path: str,
    before: tuple[Tensor, Tensor],
    tolerance: float,
) -> Finding:
    """Asks the model what follows Y: each number of it is multiplied with another one."""
    read, output = before
    generator = torch.Generator().manual_seed(0)

    def asked(change: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], Tensor] | None:
        again = watched(tower, batch, hooked, {one.layer.index: change})
        event = again.first_after(path, OUTPUT, again.order[one.layer.index][1])
        return None if event is None else (_orders(event[1]), outputs_of(again.changed[one.layer.index]))

    def drawn(shape: Sequence[int], like: Tensor) -> Tensor:
        return (0.5 + torch.rand(shape, generator=generator)).to(like)

    each = asked(lambda output: output * drawn(output.shape, output))
    found = _best(
        [
            why_outputs_differ(rows, output, each and (each[0][place], each[1]), tolerance=tolerance)
            for place, rows in enumerate(_orders(read))
        ]
    )
    if found.reason != UNEXPLAINED:
        return found
    # a norm does not see how large Y is
    large = asked(lambda output: output * LARGE)
    heads = asked(lambda output: output * (LARGE * drawn((*output.shape[:3], 1), output)))
    tokens = asked(lambda output: output * (LARGE * drawn((output.shape[0], 1, output.shape[2], 1), output)))
    for over, scaled in (("each head", heads), ("all heads together", tokens)):
        if large and scaled and (left := error_of(scaled[0][0], large[0][0])) < tolerance:
            return replace(found, reason=NORM, remaining_error=left, detail=f"norm over {over}, and a factor")
    return found

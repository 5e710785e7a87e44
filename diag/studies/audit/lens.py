"""The hooks of transformer-lens beside what attention used: as it loads a model, and with norms folded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from diag.errors import UserError
from diag.measure.loop import capture
from diag.models.base import Batch, Model, Tower
from diag.models.families.demo import EMBEDDED
from diag.models.families.transformer_lens import bridge_of, folded, hooks_shown
from diag.models.names.spec import ModelSpec
from diag.studies.audit.hooks import OUTPUT, VALUES, Row, constants_of, outputs_of, value_module, values_of
from diag.studies.audit.reasons import distinct_heads, why_values_differ

TOLERANCE = 1e-4
"""Between two implementations of one model, whose numbers drift apart with depth."""


def lens_rows(spec: ModelSpec, model: Model, tower: Tower, batch: Batch) -> tuple[list[Row], str]:
    """`hook_v` and `hook_z` of each layer, as loaded and folded; and why they are not there, if so."""
    named = _named(spec)
    if named is None:
        return [], "transformer-lens loads language models in Hugging Face format only"
    rows, weight = list[Row](), next(model.module.parameters())
    try:
        bridge, _ = bridge_of(named, device=weight.device, dtype=weight.dtype)
        for name in ("", ", folded"):
            if name:
                folded(bridge, named)
            rows += _rows(model, tower, batch, hooks_shown(bridge, batch.data), name)
    except UserError as error:
        return rows, str(error)
    return rows, ""


def _named(spec: ModelSpec) -> ModelSpec | None:
    if spec.family == "demo" and spec.name == "lm":
        return replace(spec, family="tl", name=str(EMBEDDED / "lm"))
    return replace(spec, family="tl") if spec.family in ("hf", "tl") else None


def _rows(
    model: Model, tower: Tower, batch: Batch, shown: Mapping[int, Mapping[str, Tensor]], how: str
) -> Iterator[Row]:
    for call in capture(tower, batch):
        layer = next(one for one in tower.layers if one.index == call.layer)
        constants = constants_of(model, layer, value_module(model, tower, layer))
        values = values_of([call])
        group = call.heads // distinct_heads(values).shape[1]
        for hook, of, used in (("hook_v", VALUES, values), ("hook_z", OUTPUT, outputs_of([call.output]))):
            tensor = shown.get(call.layer, {}).get(hook)
            if tensor is None:
                continue
            known = constants
            if of == OUTPUT:  # of rows that sum to 1 the constant is that of the values, for each query head
                dim = used.shape[-1]
                known = {
                    name: x.view(-1, dim).repeat_interleave(group, 0).flatten()
                    for name, x in constants.items()
                }
            rows = tensor.flatten(2).flatten(0, 1)
            found = why_values_differ(rows, used, heads=call.heads, tolerance=TOLERANCE, constants=known)
            yield Row(call.layer, f"tl {hook}{how}", f"blocks.{call.layer}.attn.{hook}", of, found)

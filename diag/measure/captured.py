"""The metrics of attention that was captured anywhere: `diag.metrics_of` on tensors, a call, or a cache.

Other tools keep values, patterns and outputs; here they become an `AttentionCall`, which is tested as those
of a model's own run are, and measured by the same functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.pattern import pattern_rows, weighted_values
from diag.attention.visibility import Visibility
from diag.errors import UserError, did_you_mean
from diag.measure.reconstruction import gate_rows
from diag.metrics.default import METRICS, readings_of, selections_of
from diag.metrics.pattern_shape import SHAPE_METRICS, shape_readings
from diag.metrics.readings import reduce
from diag.models.hooks.residual import relative_error, tolerance

KNOWN = METRICS | {name: metric for name, metric in SHAPE_METRICS.items() if "top" not in metric.needs}
"""Those of one call by itself: an overlap is with the layer before."""

OF_CACHE = re.compile(r"blocks\.(\d+)\.attn\.hook_v")
"""How transformer-lens calls the values of a layer in its `ActivationCache`."""

HOOKS = {"value": "v", "pattern": "pattern", "output": "z"}

AXES = "[batch, head, token, dim]"


def metrics_of(
    call: Any = None,
    *,
    value: Any = None,
    output: Any = None,
    pattern: Any = None,
    query: Any = None,
    key: Any = None,
    mask: Any = None,
    causal: bool = False,
    scale: float | None = None,
    metrics: Sequence[str] | None = None,
    tokens: Any = None,
    per: str = "input",
) -> pd.DataFrame:
    """The metrics of attention that you have already, one row per layer, input, head and metric.

    call: an `AttentionCall` of `diag.capture`, or a cache of transformer-lens (`run_with_cache`), all layers
        of it. Else tensors or arrays, `[batch, head, token, dim]`; without a batch axis they are of one
        input, without a head axis of one head, too:
    value: what the weights multiply, also with fewer heads where query heads share them.
    pattern: the weights that multiplied it, `[batch, head, query, key]`; or query and key, with mask (True
        where a key is seen, or what is added to scores), causal and scale (1/√dim if None) as in PyTorch.
    output: before the output projection; computed where weights are there and it is not given.
        A list or tuple of any of these is of one layer after the other, as `output_attentions` of
        transformers has patterns; what an nnsight trace saved is taken as it is, or as its `.value`.
    metrics: names; the default ones if None. tokens: True for the tokens that count, `[token]` or
        `[batch, token]`; all if None.
    per: "input", or "token" for every token by itself, of metrics that have a number for each.

    Without weights, what needs them is NaN. Raises UserError for what does not fit together: also for
    weights that do not give the output.

    >>> v = np.eye(4)
    >>> table = metrics_of(value=v, pattern=np.eye(4), metrics=["cos_y_vself"])
    >>> table["value"].tolist()
    [1.0]
    """
    if per not in ("input", "token"):
        raise UserError(f"per = {per!r}", 'it is "input" or "token"')
    names = list(METRICS) if metrics is None else [metrics] if isinstance(metrics, str) else list(metrics)
    if not names:
        raise UserError("no metric is named", "metrics=None measures the default ones")
    for name in names:
        if name not in KNOWN:
            near = did_you_mean(name, KNOWN) or "`attnbias metrics` lists them"
            raise UserError(f"there is no metric '{name}' of one call", near)
    all_of = {"value": value, "output": output, "pattern": pattern, "query": query, "key": key, "mask": mask}
    given = {name: x for name, x in all_of.items() if x is not None}
    if call is None:
        calls = _of_layers(given, causal, scale)
    elif given:
        raise UserError(f"a call was given, and {', '.join(given)} besides", "give the one or the others")
    elif isinstance(call, AttentionCall):
        calls = iter([call])
    else:
        calls = _of_cache(call)
    with torch.no_grad():
        return pd.concat([_table(each, names, tokens, per) for each in calls], ignore_index=True)


def _of_layers(given: Mapping[str, Any], causal: bool, scale: float | None) -> Iterator[AttentionCall]:
    """A call for each layer of lists of layers, or the only one. Raises UserError as `metrics_of` does."""
    listed = {name: x for name, x in given.items() if _is_listed(x)}
    counts = {name: len(x) for name, x in listed.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"layers differ in number: {counts}", "give one tensor for every layer, in order")
    for layer in range(next(iter(counts.values()), 1)):
        here = {name: x[layer] if name in listed else x for name, x in given.items()}
        if missing := next((name for name, x in here.items() if x is None), None):
            raise UserError(
                f"{missing} of layer {layer} is None",
                'attn_implementation="eager" makes patterns; leave layers out that have none',
            )
        call = _of_tensors({name: _tensor(name, x) for name, x in here.items()}, causal, scale)
        yield replace(call, layer=layer)


def _is_listed(given: Any) -> bool:
    """Whether it is a list of tensors or arrays of at least two axes, one for each layer."""
    if not isinstance(given, list | tuple):
        return False
    axes = [getattr(_plain(x), "ndim", 0) for x in given]
    return max(axes, default=0) >= 2


def _plain(given: Any) -> Any:
    """What a proxy of nnsight stands for; anything else is itself."""
    value = getattr(given, "value", None)
    return value if isinstance(value, Tensor) and not isinstance(given, Tensor) else given


def _tensor(name: str, given: Any) -> Tensor:
    """With four axes. Raises UserError for what is no tensor or array, or has other axes."""
    given = _plain(given)
    try:
        x = given.detach() if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError):
        raise UserError(f"{name} is a {type(given).__name__}", "give a tensor or an array") from None
    if x.layout != torch.strided:
        raise UserError(f"{name} is not dense ({x.layout})", "give its to_dense()")
    if x.dtype.is_complex or (x.dtype == torch.bool and name != "mask"):
        raise UserError(f"{name} holds {str(x.dtype).removeprefix('torch.')}", "give real numbers")
    if not x.numel():
        raise UserError(
            f"{name} has the shape {list(x.shape)}", "give one input, head, token and channel at least"
        )
    if not 2 <= x.ndim <= 4:
        axes = "[batch, head, query, key]" if name in ("pattern", "mask") else AXES
        raise UserError(f"{name} has the shape {list(x.shape)}", f"give {axes}, [head, …] or two axes")
    return x[(None,) * (4 - x.ndim)]


def _mask(mask: Tensor | None, leader: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A mask of the scores, in their dtype.

    Raises UserError for other shapes, and for whole numbers, whose meaning is open.
    """
    if mask is None:
        return None
    batch, heads, tokens = leader.shape[:3]
    wanted = (batch, heads, tokens, tokens)
    if any(size not in (1, full) for size, full in zip(mask.shape, wanted, strict=True)):
        raise UserError(
            f"mask has the shape {list(mask.shape)}, beside scores of {list(wanted)}",
            "give [batch, head, query, key]; of an attention_mask of tokens, mask[:, None, None, :].bool()",
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise UserError("mask holds whole numbers", "mask.bool(), where 1 is a key that is seen")
    return mask if mask.dtype == torch.bool else mask.to(dtype)


def _causal(mask: Tensor, tokens: int) -> Tensor:
    """A mask with all later keys hidden as well."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def _of_tensors(given: Mapping[str, Tensor], causal: bool, scale: float | None) -> AttentionCall:
    """The call that the tensors tell of. Raises UserError where they do not fit together."""
    leader = next((given[name] for name in ("pattern", "query", "output") if name in given), None)
    both = {"query", "key"} & given.keys()
    if "value" not in given or leader is None or len(both) == 1:
        what = ", ".join(f"{name}=" for name in given) or "nothing"
        raise UserError(
            f"{what} is given", "give value= and pattern=, value=, query= and key=, or value= and output="
        )
    if scale is not None and not isinstance(scale, int | float):
        raise UserError(f"scale = {scale!r}", "give a number; 1/√dim if None")
    if both and "pattern" in given:
        raise UserError("pattern= is given, and query= and key= besides", "give the one or the others")
    value = given["value"] if given["value"].is_floating_point() else given["value"].float()
    batch, heads, tokens = leader.shape[:3]
    kv_heads, dim = value.shape[1], value.shape[3]
    wanted = {
        "value": (batch, heads if heads % kv_heads else kv_heads, tokens, dim),
        "pattern": (batch, heads, tokens, tokens),
        "output": (batch, heads, tokens, dim),
        "query": (batch, heads, tokens, leader.shape[3]),
        "key": (batch, kv_heads, tokens, leader.shape[3]),
    }
    for name, shape in wanted.items():
        if name in given and given[name].shape != shape:
            beside = f"{batch} inputs, {heads} heads and {tokens} tokens"
            raise UserError(
                f"{name} has the shape {list(given[name].shape)}", f"beside {beside} it is {list(shape)}"
            )
    pattern, query, key = (
        x if x is None else x.to(value.dtype) for x in map(given.get, ("pattern", "query", "key"))
    )
    mask, output = _mask(given.get("mask"), leader, value.dtype), given.get("output")
    if output is None and pattern is not None:
        output = (pattern.unflatten(1, (kv_heads, -1)) @ value[:, :, None]).flatten(1, 2)
    elif output is None:
        assert query is not None
        assert key is not None
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            mask if mask is None or not causal else _causal(mask, tokens),
            is_causal=causal and mask is None,
            scale=scale,
            enable_gqa=True,
        )
    seen = (
        Visibility.of(mask, causal, output)
        if pattern is None
        else Visibility.of_scores(pattern.new_zeros(()).expand_as(pattern), output, pattern)
    )
    call = AttentionCall(
        layer=0,
        module="",
        query=query,
        key=key,
        value=value,
        output=output.to(value.dtype),
        mask=seen.mask,
        causal=seen.causal,
        scale=leader.shape[3] ** -0.5 if scale is None else scale,
        pattern=pattern,
        visibility=seen,
    )
    if call.has_pattern and "output" in given:
        _refuse_other_output(call)
    return call


def _refuse_other_output(call: AttentionCall) -> None:
    """Raises UserError where the weights do not give the output."""
    rows = gate_rows(call)
    error = relative_error(weighted_values(call, pattern_rows(call, rows)), call.output[:, :, rows])
    if not error < tolerance(call.output.dtype):
        raise UserError(
            f"the output is not what the weights make of the values (relative error {error:.1e})",
            "the pattern is what multiplied V, after masks and dropout; the output is that of the heads, "
            "before the output projection",
        )


def _of_cache(cache: Any) -> Iterator[AttentionCall]:
    """The calls of every layer whose values, pattern and output a cache holds; tokens before heads there.

    Raises UserError for what is no such cache.
    """
    names = list(map(str, cache.keys())) if hasattr(cache, "keys") else []
    layers = sorted(int(found[1]) for name in names if (found := OF_CACHE.fullmatch(name)))
    if not layers:
        raise UserError(
            f"a {type(cache).__name__} was given, and no values of attention in it",
            "give an AttentionCall, tensors, or a cache of transformer-lens: hook_v, hook_pattern, hook_z",
        )
    for layer in layers:
        held = {name: f"blocks.{layer}.attn.hook_{hook}" for name, hook in HOOKS.items()}
        if missing := [hook for hook in held.values() if hook not in names]:
            raise UserError(
                f"the cache lacks {', '.join(missing)}", "keep it: names_filter of run_with_cache"
            )
        tensors = {name: _tensor(name, cache[hook]) for name, hook in held.items()}
        tensors |= {name: tensors[name].transpose(1, 2) for name in ("value", "output")}
        yield replace(_of_tensors(tensors, False, None), layer=layer, module=f"blocks.{layer}.attn")


def _table(call: AttentionCall, names: Sequence[str], tokens: Any, per: str) -> pd.DataFrame:
    """One row per input, head and metric, and with per="token" per token."""
    among = None
    if tokens is not None:
        among = torch.as_tensor(tokens, dtype=torch.bool, device=call.output.device)
        among = among[None] if among.ndim == 1 else among
        if among.ndim != 2 or among.shape[1] != call.tokens or among.shape[0] not in (1, call.batch):
            raise UserError(
                f"tokens has the shape {list(among.shape)}",
                f"give [{call.tokens}] or [{call.batch}, {call.tokens}]",
            )
    (on,) = selections_of(call, [among])
    readings = readings_of(on, [name for name in names if name in METRICS])
    (shape,) = shape_readings([on], [name for name in names if name in SHAPE_METRICS])
    readings |= shape
    whole = (call.batch, call.heads, call.tokens)
    axes = ["input", "head"] if per == "input" else ["input", "head", "token"]
    frames = []
    for name in names:
        if per == "input":
            numbers = reduce([readings[name]], call.batch, KNOWN[name].reduce)
        elif readings[name].values.shape[-1] == call.tokens > 1:
            of, weights = (x.expand(whole) for x in readings[name][:2])
            numbers = torch.where(weights > 0, of.double(), torch.nan)
        else:
            continue
        places = np.indices(numbers.shape).reshape(len(axes), -1)
        columns = dict(zip(axes, places, strict=True))
        frames.append(
            pd.DataFrame({"layer": call.layer, **columns, "metric": name, "value": numbers.cpu().flatten()})
        )
    if not frames:
        raise UserError(f"{', '.join(names)}: one number for all tokens", 'give per="input"')
    return pd.concat(frames, ignore_index=True)

"""Runs a model as Python from end to end, and reads attention calls that are not PyTorch's own.

Under `in_python` a function mode sees what a model calls: compiled modules and functions run as they are
written, scripted functions as the Python that they were made of, and the attention functions of xformers and
flash-attn, which no mode sees, are handed to it. What each is called with is read in PyTorch's terms
(`Reading`), or the reason why it cannot be.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from diag.errors import MeasurementError
from diag.models.hooks.eager import Product, Weights

WHAT_TO_TYPE = (
    "call F.scaled_dot_product_attention there; a model of transformers: "
    'model.set_attn_implementation("sdpa"), or "eager" where it has no sdpa'
)
"""What makes attention visible that is not."""

FLEX = "torch._higher_order_ops.flex_attention"
OTHERS = (
    "flash_attn",
    "flash_attn_interface",
    "flash_attn.cute",
    "sageattention",
    "torch.nn.attention.varlen",
    "xformers.ops",
)
"""Modules with attention functions. Those that are read take `[batch, token, head, dim]`."""


class Reading(NamedTuple):
    """What an attention function is called with, in PyTorch's terms and axes, `[batch, head, token, dim]`.

    arguments: those of `scaled_dot_product_attention`, by position. axes: of its output: where PyTorch's lie.
    """

    arguments: tuple[Any, ...]
    axes: tuple[int, ...]

    def in_torch_axes(self, output: Tensor) -> Tensor:
        """The output as PyTorch would give it, a view of the same memory."""
        return output.reshape(*output.shape[:2], -1, output.shape[-1]).permute(self.axes)

    def in_own_axes(self, output: Tensor, like: Tensor) -> Tensor:
        """An output in PyTorch's axes as the function would give it."""
        return output.permute(self.axes).reshape(like.shape)  # either order is its own inverse


Reader = Callable[..., "Reading | Product | str"]
"""Given the arguments of a call, what they mean; or why they cannot be read."""


@contextmanager
def in_python() -> Iterator[dict[Any, Reader]]:
    """Under this everything runs as Python. Gives the functions, beside PyTorch's, that can be read.

    Nothing is loaded for it: what is not in memory, the model does not use.
    """
    with ExitStack() as undone:
        if "torch._dynamo" in sys.modules or FLEX in sys.modules:
            undone.enter_context(torch.compiler.set_stance("force_eager"))
        script = torch.jit.ScriptFunction
        undone.callback(setattr, script, "__call__", script.__call__)
        script.__call__ = _as_written(script.__call__)  # type: ignore[method-assign]
        readers = dict[Any, Reader]()
        aten = torch.ops.aten.scaled_dot_product_attention  # what exported modules call
        readers |= dict.fromkeys((aten, aten.default), _read_exported)
        if FLEX in sys.modules:
            undone.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            readers[sys.modules[FLEX].flex_attention] = _FlexReader().read
        if others := _of_others():
            undone.enter_context(_overridable(others))
        yield readers | others


def _as_written(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A call of a scripted or traced function as one of the Python function that it was made of."""

    def call(scripted: Any, *args: Any, **kwargs: Any) -> Any:
        written = getattr(scripted, "_torchdynamo_inline", None)
        return compiled(scripted, *args, **kwargs) if written is None else written(*args, **kwargs)

    return call


def attends_out_of_sight(module: nn.Module) -> bool:
    """Whether a module is scripted or traced and computes attention: no call of it is made in Python."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    graph = str(module.inlined_graph)
    return any(f"aten::{name}" in graph for name in ("scaled_dot_product", "softmax", "_native_multi_head"))


def refuse_no_rows(x: Tensor, path: str) -> None:
    """Raises MeasurementError for tensors that cannot be looked at row by row. path: of the module."""
    if x.is_nested:
        raise MeasurementError(
            f"layer '{path}' attends over nested tensors, of several lengths",
            "give batches that are padded to one length, with a mask",
        )
    if torch._C._functorch.is_batchedtensor(x):
        raise MeasurementError(
            f"layer '{path}' runs under torch.vmap, where an attention call cannot be looked at",
            "measure the module that vmap maps, without it: it takes whole batches itself",
        )


# --- functions of other libraries


@contextmanager
def _overridable(functions: Collection[Callable[..., Any]]) -> Iterator[None]:
    """Has functions ask function modes first, as PyTorch's own do, wherever a module refers to them."""
    asking = {id(function): _asking(function) for function in functions}
    places = [
        (module, name, value)
        for module in list(sys.modules.values())
        for name, value in list(getattr(module, "__dict__", {}).items())
        if id(value) in asking
    ]
    for module, name, value in places:
        setattr(module, name, asking[id(value)])
    try:
        yield
    finally:
        for module, name, value in places:
            setattr(module, name, value)


def _asking(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def asking(*args: Any, **kwargs: Any) -> Any:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if has_torch_function(given):
            return handle_torch_function(function, given, *args, **kwargs)
        return function(*args, **kwargs)

    return asking


def _of_others() -> dict[Callable[..., Any], Reader]:
    """The attention functions of other libraries that are loaded, and how each is read."""
    found = dict[Callable[..., Any], Reader]()
    for library in OTHERS:
        for name, function in list(vars(sys.modules.get(library, object)).items()):
            if not inspect.isfunction(function) or not name.startswith(ATTENTION):
                continue
            called, signature = f"it calls {name} of {library}", inspect.signature(function)
            found[function] = partial(READERS.get(name, _unread), called, signature)
    return found


def _unread(called: str, signature: inspect.Signature, *args: Any, **kwargs: Any) -> str:
    return called


def _read_exported(*args: Any, **kwargs: Any) -> Reading:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    plain = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    given = plain | dict(zip(names, args, strict=False)) | kwargs
    return Reading(tuple(given[name] for name in names), (0, 1, 2, 3))


def _read_xformers(called: str, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Reading | str:
    """`memory_efficient_attention`: `[batch, token, head, dim]`, of one head `[batch, token, dim]`."""
    given = _given(signature, args, kwargs)
    query, key, value = (_of_tokens(given[name]) for name in ("query", "key", "value"))
    bias, causal = given.get("attn_bias"), False
    if type(bias).__name__ == "LowerTriangularMask":
        bias, causal = None, True
    elif bias is not None and not isinstance(bias, Tensor):
        if not hasattr(bias, "materialize"):
            return f"{called} with {type(bias).__name__}"
        shape = (query.shape[-2], key.shape[-2])
        bias = bias.materialize(shape, dtype=query.dtype, device=query.device)
    elif bias is not None and bias.ndim == 3:  # [batch · head, token, token]
        bias = bias.reshape(len(query), -1, *bias.shape[1:])
    shared = query.shape[1] != key.shape[1]
    arguments = (query, key, value, bias, given.get("p", 0.0), causal, given.get("scale"), shared)
    return Reading(arguments, (0, 2, 1, 3))


FLASH_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "window_size": ((-1, -1), (None, None)),
    "softcap": (0.0,),
    "alibi_slopes": (None,),
    "qv": (None,),
    "learnable_sink": (None,),
    "score_mod": (None,),
    "mask_mod": (None,),
}
"""Arguments of flash-attn that change the weights, and which values of them do not."""


def _read_flash(called: str, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Reading | str:
    """`flash_attn_func` and its two packed forms: `[batch, token, (3 or 2,) head, dim]`."""
    given = _given(signature, args, kwargs)
    for argument, plain in FLASH_PLAIN.items():
        value = given.get(argument, plain[0])
        if (tuple(value) if isinstance(value, list) else value) not in plain:
            return f"{called} with {argument}"
    if "qkv" in given:
        parts = given["qkv"].unbind(2)
    else:
        parts = (given["q"], *(given["kv"].unbind(2) if "kv" in given else (given["k"], given["v"])))
    query, key, value = (_of_tokens(x) for x in parts)
    causal, shared = bool(given.get("causal", False)), query.shape[1] != key.shape[1]
    dropout, scale = given.get("dropout_p", 0.0), given.get("softmax_scale")
    return Reading((query, key, value, None, dropout, causal, scale, shared), (0, 2, 1, 3))


ATTENTION = ("flash_attn_", "memory_efficient_attention", "sageattn", "varlen_attn")
"""How names of attention functions in them begin."""

READERS: Mapping[str, Callable[..., Reading | str]] = {
    "memory_efficient_attention": _read_xformers,
    "memory_efficient_attention_forward": _read_xformers,
    "flash_attn_func": _read_flash,
    "flash_attn_qkvpacked_func": _read_flash,
    "flash_attn_kvpacked_func": _read_flash,
}
"""What can be read of them; what is not here is named where it is called."""


def _given(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _of_tokens(x: Tensor) -> Tensor:
    """`[batch, token, …, dim]` as `[batch, head, token, dim]`; without an axis of heads there is one."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1]).transpose(1, 2)


# --- flex_attention


class _FlexReader:
    """Reads calls of `flex_attention`; the last mask is kept, as layers share it."""

    def __init__(self) -> None:
        self.kept: tuple[tuple[Any, ...], Tensor | None] | None = None

    def read(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Callable[..., Tensor],
        block_mask: tuple[Any, ...],
        scale: float,
        *others: Any,
        **kwargs: Any,
    ) -> Reading | Product | str:
        """As `torch.ops.higher_order.flex_attention` is called.

        A score_mod that adds something to each score is a mask; with any other one, such as a soft cap, the
        weights are computed, all of them, as flex_attention itself does where it is not compiled.
        """
        shape = (*query.shape[:-1], key.shape[-2])
        place, score = (torch.zeros((), dtype=x, device=query.device) for x in (torch.int64, torch.float64))
        added = None if score_mod(score, place, place, place, place) is score else score_mod
        what = (added, block_mask[-1], shape)
        if self.kept is None or self.kept[0] != what:
            shown = _at_all(block_mask[-1], (*block_mask[2].shape[:2], *shape[2:]), query)
            if bool((shown & ~_in_blocks(block_mask, shape, query)).any()):
                return "it calls flex_attention with a BlockMask whose blocks hide what its mask_mod shows"
            mask = None if bool(shown.all()) else shown
            bias = None if added is None else _added(added, shape, query)
            if added is not None and bias is None:
                return _weighed(query, key, value, added, mask, scale)
            if bias is not None:
                mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
            self.kept = what, mask
        arguments = (query, key, value, self.kept[1], 0.0, False, scale, query.shape[1] != key.shape[1])
        return Reading(arguments, (0, 1, 2, 3))


def _added(score_mod: Callable[..., Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """What a score_mod adds to scores, `[batch or 1, head, token, token]`; None if it does something else."""
    zero = torch.zeros(shape, dtype=torch.float64, device=like.device)
    added, again = (_at_all(score_mod, shape, like, x) for x in (zero, zero + 1))
    if not torch.allclose(again.where(added.isfinite(), 0), (added + 1).where(added.isfinite(), 0)):
        return None
    added = added[:1] if bool((added == added[:1]).all()) else added
    return added.to(torch.promote_types(like.dtype, torch.float32))


def _weighed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    mask: Tensor | None,
    scale: float,
) -> Product:
    """The weights of a call, softmax(score_mod(scale QKᵀ)), with its values."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    full = torch.promote_types(query.dtype, torch.float32)
    scores = scale * (query.to(full) @ key.to(full).mT)
    scores = _at_all(score_mod, tuple(scores.shape), query, scores)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    pattern = scores.softmax(-1).nan_to_num(0.0)  # of a query that sees nothing the output is zero
    return Product(pattern.to(query.dtype), value, scores, Weights(-1, -1, scores), (0, 1, 2, 3))


def _at_all(function: Callable[..., Tensor], shape: tuple[int, ...], like: Tensor, *first: Tensor) -> Tensor:
    """What a function of (first …,) batch, head, query and key says everywhere."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    for axis in reversed(range(4)):
        axes = [0 if other == axis else None for other in range(4)]
        function = torch.vmap(function, in_dims=(*[0] * len(first), *axes))
    with TransformGetItemToIndex():  # closures index their tensors with places
        return function(*first, *(torch.arange(size, device=like.device) for size in shape))


def _in_blocks(block_mask: tuple[Any, ...], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Which keys are in a block that compiled kernels visit, `[batch or 1, head or 1, token, token]`."""
    _, _, partial_counts, partial_places, full_counts, full_places, *_ = block_mask
    blocks = torch.zeros(partial_places.shape, dtype=torch.bool, device=like.device)
    for counts, places in ((partial_counts, partial_places), (full_counts, full_places)):
        if counts is not None:
            listed = torch.arange(places.shape[-1], device=like.device) < counts[..., None]
            blocks |= (
                torch.zeros_like(blocks, dtype=torch.int).scatter_add(-1, places.long(), listed.int()) > 0
            )
    of_query, of_key = (
        torch.arange(size, device=like.device) // length
        for size, length in zip(shape[2:], block_mask[-3:-1], strict=True)
    )
    return blocks[:, :, of_query][..., of_key]

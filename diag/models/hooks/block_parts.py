"""Which module is the block of an attention layer, and which of its parts return what is added to the stream.

A block adds two updates to the residual stream, one of attention and one of the MLP. `find_blocks` reads
from the names of a block's parts which modules return them. What names promise is checked with numbers:
`residual.check_states` rebuilds a block's output from its updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diag.errors import UserError
from diag.models.hooks.layers import Layer

PRE, RES_POST, POST, PARALLEL = "pre-norm", "res-post-norm", "post-norm", "parallel"
ATTENTION = "attn self_attn attention self_attention linear_attn mamba"
PROJECTIONS = "proj c_proj out_proj o_proj dense out_lin o"
BARE_SCALES = ("gamma_1", "lambda_1")
"""Layer scales that are parameters of the block itself."""


@dataclass(frozen=True, eq=False)
class Block:
    """The block of one attention layer.

    index, path: of the layer. module: the block.
    attention_branch, mlp_branch: the modules whose output is the update, after layer scale.
    output_projection: W_O; None if it is not known.
    arrangement: as in `diag.attention.states.BlockStates`.
    mlp_input: the module whose input is the stream that the MLP update is added to; None in parallel blocks
        with one norm.
    norms: of a post-norm block, after each add.
    scale: the layer scale between W_O and the stream.
    batch_first: whether tensors are `[batch, token, dim]` rather than `[token, batch, dim]`.
    """

    index: int
    path: str
    module: nn.Module
    attention_branch: nn.Module
    mlp_branch: nn.Module
    output_projection: nn.Module | None
    arrangement: str
    mlp_input: nn.Module | None = None
    norms: tuple[nn.Module, ...] = ()
    scale: Tensor | None = None
    batch_first: bool = True


@dataclass(frozen=True)
class _Layout:
    """Names of a block's parts, dotted; of several, with blanks between them, the first that is there.

    branch: what returns the attention update, where that is not the attention module.
    """

    arrangement: str
    attention: str
    mlp_branch: str
    mlp_input: str = ""
    branch: str = ""
    norms: str = ""
    only: Callable[[nn.Module], bool] = lambda module: True


def _is(*names: str) -> Callable[[nn.Module], bool]:
    return lambda module: type(module).__name__ in names


def _flag(name: str, value: bool) -> Callable[[nn.Module], bool]:
    return lambda module: getattr(module, name, None) is value


def _scale_is_a_module(module: nn.Module) -> bool:
    bare = any(isinstance(getattr(module, name, None), Tensor) for name in BARE_SCALES)
    return not bare or _child(module, "drop_path1") is not None


LAYOUTS = (
    # BERT and what follows it
    _Layout(
        POST,
        "attention.self",
        "output.dense",
        "intermediate",
        branch="attention.output.dense",
        norms="attention.output.LayerNorm output.LayerNorm",
    ),
    # vision models with BERT's names
    _Layout(PRE, "attention", "output.dense", "layernorm_after"),
    # DistilBERT
    _Layout(POST, "attention", "ffn", "ffn", norms="sa_layer_norm output_layer_norm"),
    # T5
    _Layout(PRE, "layer.0.SelfAttention", "layer.1.DenseReluDense", "layer.1.layer_norm"),
    # nn.TransformerEncoderLayer
    _Layout(PRE, "self_attn", "linear2", "norm2", only=_flag("norm_first", True)),
    _Layout(POST, "self_attn", "linear2", "linear1", norms="norm1 norm2", only=_flag("norm_first", False)),
    # OPT
    _Layout(PRE, "self_attn", "fc2", "final_layer_norm", only=_flag("do_layer_norm_before", True)),
    _Layout(
        POST,
        "self_attn",
        "fc2",
        "fc1",
        norms="self_attn_layer_norm final_layer_norm",
        only=_flag("do_layer_norm_before", False),
    ),
    # Gemma 3 and OLMo 2: a norm at the end of each branch
    _Layout(
        RES_POST,
        ATTENTION,
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm mlp",
        branch="post_attention_layernorm",
    ),
    # timm's
    _Layout(
        RES_POST,
        ATTENTION,
        "drop_path2",
        "mlp",
        branch="drop_path1",
        only=_is("ResPostBlock", "EvaBlockPostNorm", "SwinTransformerV2Block"),
    ),
    # GPT-NeoX, Phi, Cohere
    _Layout(
        PARALLEL, ATTENTION, "mlp", "post_attention_layernorm", only=_flag("use_parallel_residual", True)
    ),
    _Layout(
        PARALLEL, ATTENTION, "mlp", only=_is("PhiDecoderLayer", "CohereDecoderLayer", "Cohere2DecoderLayer")
    ),
    # everyone else
    _Layout(
        PRE,
        ATTENTION,
        "drop_path2 ls2 ls_2 layer_scale2 mlp",
        "norm2 ln_2 layer_norm2 layernorm_after post_attention_layernorm",
        branch=f"drop_path1 ls1 ls_1 layer_scale1 {ATTENTION}",
        only=_scale_is_a_module,
    ),
)

REFUSED = {
    "ParallelScalingBlock": "its attention and MLP share one projection",
    "DiffParallelScalingBlock": "its attention and MLP share one projection",
    "ParallelThingsBlock": "it runs several attention modules side by side",
}


def find_blocks(root: nn.Module, layers: Sequence[Layer]) -> tuple[Block, ...]:
    """The block of each attention layer below `root`.

    Raises UserError, naming the layer and its class, where a block's parts are not understood.
    """
    paths = {module: path for path, module in root.named_modules()}
    return tuple(_block_of(layer, root, paths) for layer in layers)


def understood_blocks(root: nn.Module, layers: Sequence[Layer]) -> tuple[Block, ...]:
    """As `find_blocks`, without the layers whose block is not understood."""
    paths, found = {module: path for path, module in root.named_modules()}, []
    for layer in layers:
        with suppress(UserError):
            found.append(_block_of(layer, root, paths))
    return tuple(found)


def _block_of(layer: Layer, root: nn.Module, paths: Mapping[nn.Module, str]) -> Block:
    if layer.module not in paths:
        raise UserError(f"layer '{layer.path}' is not part of the model", "give the model that it is from")
    around = []
    for candidate in upwards(root, paths[layer.module]):
        kind = type(candidate).__name__
        if kind in REFUSED:
            raise _not_understood(layer, f"{kind}: {REFUSED[kind]}")
        around.append(kind)
        found = _read(candidate, layer)
        if found is not None:
            return found
    raise _not_understood(
        layer,
        f"none of {', '.join(around)} holds an attention module, an MLP beside it and the norm before the "
        "MLP, under their usual names",
    )


def upwards(root: nn.Module, path: str) -> Iterator[nn.Module]:
    """The module at a path, and those around it from the innermost to `root`."""
    yield root.get_submodule(path)
    while path:
        path = path.rpartition(".")[0]
        yield root.get_submodule(path)


def _not_understood(layer: Layer, why: str) -> UserError:
    return UserError(
        f"the block of layer '{layer.path}' ({type(layer.module).__name__}) is not understood: {why}",
        "leave out what needs its branches, or choose other layers with --layers",
    )


def _read(module: nn.Module, layer: Layer) -> Block | None:
    """The module as the block of a layer; None if it is none."""
    for layout in LAYOUTS:
        holder = _first(module, layout.attention)
        if holder is None or not layout.only(module) or not any(m is layer.module for m in holder.modules()):
            continue
        attention = _first(module, layout.branch or layout.attention)
        mlp, mlp_input = _first(module, layout.mlp_branch), _first(module, layout.mlp_input)
        norms = [norm for name in layout.norms.split() if (norm := _child(module, name)) is not None]
        lacking = (layout.mlp_input and mlp_input is None) or len(norms) < len(layout.norms.split())
        if attention is None or mlp is None or lacking:
            continue
        return Block(
            index=layer.index,
            path=layer.path,
            module=module,
            attention_branch=attention,
            mlp_branch=mlp,
            output_projection=attention if isinstance(attention, nn.Linear) else _first(holder, PROJECTIONS),
            arrangement=layout.arrangement,
            mlp_input=mlp_input,
            norms=tuple(norms),
            scale=_scale_of(module),
            batch_first=getattr(layer.module, "batch_first", True),
        )
    return None


def _first(module: nn.Module, names: str) -> nn.Module | None:
    return next((child for name in names.split() if (child := _child(module, name)) is not None), None)


def _child(module: nn.Module, dotted: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in dotted.split("."):
        found = found._modules.get(name) if found is not None else None
    return found


def _scale_of(module: nn.Module) -> Tensor | None:
    for holder in (module, *(_child(module, name) for name in ("ls1", "ls_1", "layer_scale1"))):
        for name in (*BARE_SCALES, *(("gamma", "lambda1") if holder is not module else ())):
            found = getattr(holder, name, None)
            if isinstance(found, Tensor):
                return found
    return None


def head_projections(block: Block, heads: int) -> Tensor | None:
    """W_O of each head with layer scale, `[head, dim, width]`, so that u = v W; None as in `to_stream`, and
    where it is no plain matrix over `heads` heads side by side (quantised, or with an adapter).

    Float32 at least, a view of the weights where these are and nothing is scaled.
    """
    projection: Any = getattr(block.output_projection, "original_component", block.output_projection)
    weight = getattr(projection, "weight", None)
    plain = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()
    if to_stream(block) is None or not plain or hasattr(weight, "__tensor_flatten__"):
        return None
    assert isinstance(weight, Tensor)
    matrix = (weight if type(projection).__name__ == "Conv1D" else weight.T).detach()
    if len(matrix) % heads:
        return None
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32)).unflatten(0, (heads, -1))
    return matrix if block.scale is None else matrix * block.scale.detach()


def to_stream(block: Block) -> Callable[[Tensor], Tensor] | None:
    """W_O with layer scale, without its bias: `[batch, head, token, dim]` → `[batch, token, dim]` in float32.

    None where the projection is not known or a norm stands between it and the stream.
    """
    # transformer-lens wraps what it bridges
    projection: Any = getattr(block.output_projection, "original_component", block.output_projection)
    flipped = type(projection).__name__ == "Conv1D"  # transformers' weights the other way round
    if block.arrangement == RES_POST or not (flipped or isinstance(projection, nn.Linear)):
        return None
    # statistics read weights, they do not train them
    weight = (projection.weight.T if flipped else projection.weight).detach()
    scale = None if block.scale is None else block.scale.detach().float()

    def project(heads: Tensor) -> Tensor:
        joined = heads.transpose(1, 2).flatten(2).float()
        projected = F.linear(joined, weight.float())
        return projected if scale is None else projected * scale

    return project

"""The constant that biases put into every value of a layer, read off the weights: `c = b_V + W_V β`.

Rows of the pattern sum to 1, so such a constant enters every value and every output. b_V is the
bias of the value projection. β is the shift of the norm whose output the projection reads, in blocks
that normalise before attention. Where attention reads the residual stream itself (post-norm blocks
such as BERT's), the shift of an earlier norm is part of the stream and stays: only b_V is a constant.
transformer-lens folds the same two terms, for the same blocks (`supports_fold_ln`, `fold_value_biases`).

`ROWS` is the one table: what is not in it is refused by name, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diag.errors import UserError
from diag.models.hooks.block_parts import upwards
from diag.models.hooks.layers import Layer

FORMATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Projection(NamedTuple):
    """The rows of a projection that make values, KV heads in order, and their bias."""

    weight: Float[Tensor, "channel width"]
    bias: Float[Tensor, " channel"] | None

    def part(self, rows: Callable[[Tensor], Tensor]) -> Projection:
        """Some of its rows, alike of weight and bias."""
        return Projection(rows(self.weight), None if self.bias is None else rows(self.bias))


Read = Callable[[Any], Projection]
Norm = str | Callable[[Any], str | None] | None


@dataclass(frozen=True)
class BlockKind:
    """How one kind of attention inside one kind of block reads its values.

    block, attention: library and class; the block with the file that it is in. The attention lies in
        the block, however deep.
    norm: the norm that feeds the projection, by its name beside the attention module; None where the
        projection reads the residual stream; or a function of the block that says which.
    read: from the attention module to its value projection.
    """

    block: str
    attention: str
    norm: Norm
    read: Read


def value_constants(root: nn.Module, layers: Sequence[Layer]) -> dict[int, Float[Tensor, " channel"]]:
    """The constant of each layer's values, by layer index: KV heads one after the other, float32.

    root: the model that holds the layers.
    Nothing is run, and the model is not changed.

    Raises UserError, naming the first layer whose projection, or the norm before it, is not known.
    """
    paths = {module: path for path, module in root.named_modules()}
    constants = {}
    for layer in layers:
        try:
            with torch.no_grad():
                constants[layer.index] = _constant(root, paths.get(layer.module, ""), layer.module)
        except _UnknownError as why:
            name = type(_inner(layer.module)).__name__
            raise UserError(
                f"values of layer '{layer.path}' ({name}) cannot be made bias-free: {why}",
                "measure them as computed, the default, or leave the layer out with --layers",
            ) from None
    return constants


class _UnknownError(Exception):
    """Why the constant of one layer is not known."""


def _constant(root: nn.Module, path: str, module: Any) -> Tensor:
    attention = _inner(module)
    around = list(upwards(root, path))[1:]
    rows = ((_ROWS.get((_name(block, with_file=True), _name(attention))), block) for block in around)
    row, block = next(((row, block) for row, block in rows if row is not None), (None, None))
    if row is None:
        raise _UnknownError("its value projection is not known")
    # every bridge of transformer-lens holds a value layer of its own, also where the model's is fused
    projection = row.read(module) if attention is module else _linear(_inner(module.v))
    constant = torch.zeros_like(projection.weight[:, 0], dtype=torch.float64)
    if projection.bias is not None:
        constant += projection.bias
    norm = row.norm(block) if callable(row.norm) else row.norm
    shift = None if norm is None else _shift(_inner(getattr(around[0], norm)))
    if shift is not None:
        constant += projection.weight.double() @ shift.double()
    return constant.float()


def _shift(norm: nn.Module) -> Tensor | None:
    """The β of `x̂ γ + β`; None for a norm without one. What holds more than γ and β is no such norm."""
    parameters = dict(norm.named_parameters())
    if not parameters.keys() <= {"weight", "bias"} or dict(norm.named_buffers()):
        raise _UnknownError(f"the norm before its projection, {type(norm).__name__}, is not known")
    return parameters.get("bias")


def _inner(module: nn.Module) -> nn.Module:
    """What a bridge of transformer-lens wraps; every other module is itself."""
    return getattr(module, "_original_component", module)


def _name(module: nn.Module, *, with_file: bool = False) -> str:
    """Library and class, with the file between them, as in `BlockKind`."""
    library, _, file = type(module).__module__.replace("modeling_", "").partition(".")
    return ".".join([library, *([file.rpartition(".")[2]] if with_file else []), type(module).__name__])


# --- reading a projection


def _linear(linear: Any) -> Projection:
    """A plain linear layer as `[out, in]`. GPT-2's Conv1D is one that is stored `[in, out]`."""
    transposed = type(linear).__name__ == "Conv1D"
    plain = transposed or isinstance(linear, nn.Linear)  # an adapter wraps one, and adds to it
    # quantised weights are made of other tensors, whatever format they pretend to have
    if not plain or linear.weight.dtype not in FORMATS or hasattr(linear.weight, "__tensor_flatten__"):
        raise _UnknownError(f"its value projection, {type(linear).__name__}, is not a plain linear layer")
    return Projection(linear.weight.T if transposed else linear.weight, linear.bias)


def own(name: str) -> Read:
    """Values have a layer of their own."""
    return lambda attention: _linear(getattr(attention, name))


def last_third(name: str) -> Read:
    """One layer makes queries, keys and values, in this order."""
    return lambda attention: _linear(getattr(attention, name)).part(_third)


def _third(rows: Tensor) -> Tensor:
    return rows.chunk(3)[2]


def timm_qkv(attention: Any) -> Projection:
    """timm: fused or not; BEiT and EVA keep the fused layer's biases beside it, as `q_bias` and `v_bias`."""
    if attention.qkv is None:
        return _linear(attention.v_proj)
    weight, bias = last_third("qkv")(attention)
    return Projection(weight, getattr(attention, "v_bias", None) if bias is None else bias)


def in_proj(attention: Any) -> Projection:
    """`nn.MultiheadAttention`."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    if weight is None:
        return Projection(attention.v_proj_weight, None if bias is None else _third(bias))
    return Projection(weight, bias).part(_third)


def query_key_value(attention: Any) -> Projection:
    """GPT-NeoX: the rows of a head are its query, its key, its value."""
    by_head = (-1, 3, attention.head_size)
    return _linear(attention.query_key_value).part(lambda x: x.unflatten(0, by_head)[:, 2].flatten(0, 1))


# --- the table


def _rows(names: str, block: str, norm: Norm, read: Read, attention: str = "Attention") -> list[BlockKind]:
    """Those of transformers whose classes are called alike: `file.Beginning` of each, and the two endings."""
    each = (entry.split(".") for entry in names.split())
    return [
        BlockKind(f"transformers.{file}.{name}{block}", f"transformers.{name}{attention}", norm, read)
        for file, name in each
    ]


ROWS = (
    BlockKind("timm.vision_transformer.Block", "timm.Attention", "norm1", timm_qkv),
    BlockKind("timm.vision_transformer.ResPostBlock", "timm.Attention", None, timm_qkv),
    BlockKind("timm.vision_transformer.ParallelThingsBlock", "timm.Attention", "norm", timm_qkv),
    BlockKind("timm.vision_transformer_relpos.RelPosBlock", "timm.RelPosAttention", "norm1", timm_qkv),
    BlockKind("timm.vision_transformer_relpos.ResPostRelPosBlock", "timm.RelPosAttention", None, timm_qkv),
    BlockKind("timm.vision_transformer_sam.Block", "timm.Attention", "norm1", timm_qkv),
    BlockKind("timm.beit.Block", "timm.Attention", "norm1", timm_qkv),
    BlockKind("timm.eva.EvaBlock", "timm.EvaAttention", "norm1", timm_qkv),
    BlockKind("timm.eva.EvaBlock", "timm.AttentionRope", "norm1", timm_qkv),
    BlockKind("timm.eva.EvaBlockPostNorm", "timm.EvaAttention", None, timm_qkv),
    BlockKind("timm.eva.EvaBlockPostNorm", "timm.AttentionRope", None, timm_qkv),
    BlockKind("timm.swin_transformer.SwinTransformerBlock", "timm.WindowAttention", "norm1", timm_qkv),
    BlockKind("timm.hiera.HieraBlock", "timm.MaskUnitAttention", "norm1", timm_qkv),
    BlockKind("open_clip.transformer.ResidualAttentionBlock", "torch.MultiheadAttention", "ln_1", in_proj),
    BlockKind("torchvision.vision_transformer.EncoderBlock", "torch.MultiheadAttention", "ln_1", in_proj),
    BlockKind(
        "torch.transformer.TransformerEncoderLayer",
        "torch.MultiheadAttention",
        lambda block: "norm1" if block.norm_first else None,
        in_proj,
    ),
    *_rows("gpt2.GPT2", "Block", "ln_1", last_third("c_attn")),
    *_rows("gpt_neox.GPTNeoX", "Layer", "input_layernorm", query_key_value),
    *_rows(
        "opt.OPT",
        "DecoderLayer",
        lambda block: "self_attn_layer_norm" if block.do_layer_norm_before else None,
        own("v_proj"),
    ),
    *_rows("t5.T5", "LayerSelfAttention", "layer_norm", own("v")),
    *_rows(
        "bert.Bert roberta.Roberta xlm_roberta.XLMRoberta electra.Electra",
        "Layer",
        None,
        own("value"),
        attention="SelfAttention",
    ),
    BlockKind(
        "transformers.distilbert.TransformerBlock", "transformers.DistilBertSelfAttention", None, own("v_lin")
    ),
    *_rows("qwen2_5_vl.Qwen2_5_VLVision", "Block", "norm1", last_third("qkv")),
    *_rows(
        "llama.Llama mistral.Mistral mixtral.Mixtral qwen2.Qwen2 qwen3.Qwen3 qwen2_5_vl.Qwen2_5_VL "
        "gemma.Gemma gemma3.Gemma3 granite.Granite phi.Phi stablelm.StableLm starcoder2.Starcoder2",
        "DecoderLayer",
        "input_layernorm",
        own("v_proj"),
    ),
    *_rows("olmo2.Olmo2", "DecoderLayer", None, own("v_proj")),
    *_rows("vit.ViT deit.DeiT beit.Beit", "Layer", "layernorm_before", own("v_proj")),
    *_rows(
        "dinov2.Dinov2 dinov2_with_registers.Dinov2WithRegisters dinov3_vit.DINOv3ViT",
        "Layer",
        "norm1",
        own("v_proj"),
    ),
    *_rows("clip.CLIP siglip.Siglip siglip2.Siglip2", "EncoderLayer", "layer_norm1", own("v_proj")),
)

_ROWS = {(row.block, row.attention): row for row in ROWS}

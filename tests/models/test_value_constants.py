"""The constant in the values, for every kind of block in the table, found a second way and by other code.

A norm whose gain is zero hands on its shift alone, whatever the input: then every value of the layer
has to be the constant.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import torchvision
import transformers
from checkpoints import OPEN_CLIP_SIZES, TEXT_SIZES, VISION_SIZES, VOCABULARY
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.attention.row_sums import without_constant
from diag.errors import UserError
from diag.models import load
from diag.models.base import Tower
from diag.models.families import demo
from diag.models.hooks.layers import Layer, attention_modules
from diag.models.hooks.meaning import meaning_of
from diag.models.hooks.seam import attention_calls
from diag.models.names.resolve import parse
from diag.models.value_constants import ROWS, value_constants

CPU = {"device": "cpu", "dtype": torch.float32}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)}
HIERA = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "stages": (2, 1, 1, 1), "num_classes": 0}
TEXT = TEXT_SIZES | {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
TEXT |= {"max_position_embeddings": 64}
GROUPED = TEXT | {"num_key_value_heads": 2}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "patch_size": 14}
QWEN_VISION |= {"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


# --- one small model for each line of the table


@dataclass(frozen=True)
class Case:
    """A row's block, and a model that has it.

    stream: its attention reads the residual stream, so that only the projection's bias is constant.
    biased: False where neither the projection nor the norm has a bias: nothing is constant.
    """

    block: str
    build: Callable[..., nn.Module]
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    biased: bool = True

    @property
    def id(self) -> str:
        return f"{self.block}{'-stream' if self.stream else ''}{'' if self.biased else '-unbiased'}"

    @property
    def odd(self) -> bool:
        """Whether heads are not in the usual axis."""
        return self.block in ("timm.hiera.HieraBlock", "timm.vision_transformer_sam.Block")


def timm_case(block: str, name: str, *, stream: bool = False, biased: bool = True, **options: Any) -> Case:
    return Case(f"timm.{block}", timm.create_model, (name,), options, stream, biased)


def hf_case(
    block: str, kind: str, sizes: dict[str, Any], *, stream: bool = False, biased: bool = True, **more: Any
) -> Case:
    return Case(f"transformers.{block}", hugging_face, (kind, sizes | more), {}, stream, biased)


def hugging_face(kind: str, sizes: dict[str, Any]) -> nn.Module:
    config = transformers.CONFIG_MAPPING[kind](**sizes)
    config.use_cache = False
    return transformers.AutoModel.from_config(config, attn_implementation="sdpa")


def siglip2_text() -> nn.Module:
    config = transformers.Siglip2TextConfig(**TEXT)
    return transformers.Siglip2TextModel._from_config(config, attn_implementation="sdpa")


def torch_encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    return nn.Sequential(nn.Linear(32, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64)


def clip_tower(tower: str) -> nn.Module:
    module = open_clip.CLIP(**OPEN_CLIP_SIZES)
    return module.visual if tower == "vision" else TextTower(module)


class TextTower(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.clip = module
        del module.visual.transformer

    def forward(self, ids: Tensor) -> Tensor:
        return self.clip.encode_text(ids)


CASES = [
    timm_case("vision_transformer.Block", "vit_tiny_patch16_224", **VIT),
    timm_case("vision_transformer.Block", "vit_tiny_patch16_224", **VIT, qkv_bias=False),
    timm_case(
        "vision_transformer.Block",
        "vit_tiny_patch16_224",
        biased=False,
        **VIT,
        qkv_bias=False,
        norm_layer=timm.layers.RmsNorm,
    ),
    timm_case(
        "vision_transformer.ResPostBlock",
        "vit_tiny_patch16_224",
        stream=True,
        **VIT,
        block_fn=vision_transformer.ResPostBlock,
    ),
    timm_case(
        "vision_transformer.ParallelThingsBlock",
        "vit_tiny_patch16_224",
        **VIT,
        block_fn=vision_transformer.ParallelThingsBlock,
    ),
    timm_case("vision_transformer_relpos.RelPosBlock", "vit_relpos_small_patch16_224", **VIT),
    timm_case(
        "vision_transformer_relpos.ResPostRelPosBlock",
        "vit_relpos_small_patch16_rpn_224",
        stream=True,
        **VIT,
        qkv_bias=True,
    ),
    timm_case(
        "vision_transformer_sam.Block", "samvit_base_patch16", **VIT, window_size=2, global_attn_indexes=(1,)
    ),
    timm_case("beit.Block", "beit_base_patch16_224", **VIT),
    timm_case("eva.EvaBlock", "eva02_tiny_patch14_224", **VIT),
    timm_case("eva.EvaBlock", "eva02_tiny_patch14_224", **VIT, qkv_fused=True),
    timm_case("eva.EvaBlock", "vit_pe_core_tiny_patch16_384", **VIT),
    timm_case("eva.EvaBlock", "vit_pe_core_tiny_patch16_384", **VIT, qkv_fused=False, num_kv_heads=2),
    Case("timm.eva.EvaBlockPostNorm", eva.Eva, (), VIT | {"use_post_norm": True}, stream=True),
    Case(
        "timm.eva.EvaBlockPostNorm",
        eva.Eva,
        (),
        VIT | {"use_post_norm": True, "attn_type": "rope"},
        stream=True,
    ),
    timm_case("swin_transformer.SwinTransformerBlock", "swin_tiny_patch4_window7_224", **SWIN),
    timm_case("hiera.HieraBlock", "hiera_tiny_224", **HIERA),
    Case("open_clip.transformer.ResidualAttentionBlock", clip_tower, ("vision",)),
    Case("open_clip.transformer.ResidualAttentionBlock", clip_tower, ("text",)),
    Case("torchvision.vision_transformer.EncoderBlock", torchvision_vit),
    Case("torch.transformer.TransformerEncoderLayer", torch_encoder, (True,)),
    Case("torch.transformer.TransformerEncoderLayer", torch_encoder, (False,), stream=True),
    hf_case("gpt2.GPT2Block", "gpt2", TEXT),
    hf_case("gpt_neox.GPTNeoXLayer", "gpt_neox", TEXT),
    hf_case("opt.OPTDecoderLayer", "opt", TEXT, word_embed_proj_dim=32),
    hf_case("opt.OPTDecoderLayer", "opt", TEXT, stream=True, do_layer_norm_before=False),
    hf_case("t5.T5LayerSelfAttention", "t5", TEXT, biased=False, d_kv=8),
    *(
        hf_case(block, kind, TEXT, stream=True)
        for kind, block in {
            "bert": "bert.BertLayer",
            "roberta": "roberta.RobertaLayer",
            "xlm-roberta": "xlm_roberta.XLMRobertaLayer",
            "electra": "electra.ElectraLayer",
            "distilbert": "distilbert.TransformerBlock",
        }.items()
    ),
    hf_case("qwen2_5_vl.Qwen2_5_VLVisionBlock", "qwen2_5_vl_vision", QWEN_VISION),
    *(
        hf_case(block, kind, GROUPED | {"head_dim": 8}, biased=False)
        for kind, block in {
            "llama": "llama.LlamaDecoderLayer",
            "mistral": "mistral.MistralDecoderLayer",
            "mixtral": "mixtral.MixtralDecoderLayer",
            "qwen3": "qwen3.Qwen3DecoderLayer",
            "gemma": "gemma.GemmaDecoderLayer",
            "gemma3_text": "gemma3.Gemma3DecoderLayer",
            "granite": "granite.GraniteDecoderLayer",
        }.items()
    ),
    *(
        hf_case(block, kind, GROUPED, attention_bias=True)
        for kind, block in {"llama": "llama.LlamaDecoderLayer", "qwen3": "qwen3.Qwen3DecoderLayer"}.items()
    ),
    hf_case("qwen2.Qwen2DecoderLayer", "qwen2", GROUPED),
    hf_case("qwen2_5_vl.Qwen2_5_VLDecoderLayer", "qwen2_5_vl_text", GROUPED, rope_parameters=ROPE),
    hf_case("phi.PhiDecoderLayer", "phi", GROUPED),
    hf_case("stablelm.StableLmDecoderLayer", "stablelm", GROUPED),
    hf_case("starcoder2.Starcoder2DecoderLayer", "starcoder2", GROUPED),
    hf_case("olmo2.Olmo2DecoderLayer", "olmo2", GROUPED, stream=True, attention_bias=True),
    *(
        hf_case(block, kind, VISION_SIZES)
        for kind, block in {
            "vit": "vit.ViTLayer",
            "deit": "deit.DeiTLayer",
            "beit": "beit.BeitLayer",
            "dinov2": "dinov2.Dinov2Layer",
            "dinov2_with_registers": "dinov2_with_registers.Dinov2WithRegistersLayer",
            "dinov3_vit": "dinov3_vit.DINOv3ViTLayer",
            "clip_vision_model": "clip.CLIPEncoderLayer",
            "siglip_vision_model": "siglip.SiglipEncoderLayer",
        }.items()
    ),
    hf_case("clip.CLIPEncoderLayer", "clip_text_model", TEXT),
    Case("transformers.siglip2.Siglip2EncoderLayer", siglip2_text),
]


def run(module: nn.Module, case: Case) -> None:
    """Runs a model on two random inputs of the kind that it takes."""
    if case.block.endswith("Qwen2_5_VLVisionBlock"):
        module(torch.randn(64, 3 * 2 * 14 * 14), grid_thw=torch.tensor([[1, 8, 8]]))
    elif isinstance(module, nn.Sequential):
        module(torch.randn(2, 9, 32))
    elif isinstance(module, TextTower):
        module(torch.randint(2, 300, (2, 16)))
    elif getattr(module, "main_input_name", "") == "input_ids":
        part = module.get_encoder() if module.config.is_encoder_decoder else module
        part(input_ids=torch.randint(2, VOCABULARY, (2, 12)))
    else:
        side = 64 if "hiera" in case.block else 32
        module(torch.randn(2, 3, side, side))


def built(case: Case) -> tuple[nn.Module, tuple[Layer, ...]]:
    """The model in evaluation mode with random gains, shifts and biases, and its attention layers."""
    torch.manual_seed(0)
    module = case.build(*case.arguments, **case.options).eval().requires_grad_(False)
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = True
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else 0.1)
    layers = attention_modules(module)
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        layers = tuple(layer for layer in layers if layer.path.startswith("encoder."))
    if case.odd:  # where its heads are is found by test
        with torch.inference_mode():
            found = meaning_of(module, lambda _: run(module, case), None, None, inputs=2)
        forms = {layer.path: layer for tower in found.towers for layer in tower.layers}
        layers = tuple(forms[layer.path] for layer in layers if layer.path in forms)
    return module, layers


def silence(module: nn.Module, layers: tuple[Layer, ...], case: Case) -> None:
    """Makes every token of every layer alike: norms without gain, or a stream of zeros."""
    inside = {id(p) for layer in layers for p in layer.module.parameters()}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            gain = "Norm" in type(part).__name__ and name == "weight"
            if id(parameter) not in inside and (gain or case.stream):
                # Gemma's gain is 1 + weight
                parameter.fill_(-1.0 if gain and type(part).__name__.startswith("Gemma") else 0.0)


def calls_of(module: nn.Module, layers: tuple[Layer, ...], case: Case) -> list[AttentionCall]:
    torch.manual_seed(1)
    calls: list[AttentionCall] = []
    with torch.inference_mode(), attention_calls(layers, calls.append):
        run(module, case)
    return calls


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_without_gain_every_value_is_the_constant(case: Case) -> None:
    module, layers = built(case)
    assert case.block.rpartition(".")[2] in {type(part).__name__ for part in module.modules()}
    before = deepcopy(module.state_dict())
    constants = value_constants(module, layers)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    loud = calls_of(module, layers, case)
    assert 2 <= len({call.layer for call in loud}) <= len(constants) == len(layers)
    silence(module, layers, case)
    for call, quiet in zip(loud, calls_of(module, layers, case), strict=True):
        constant = constants[call.layer]
        assert constant.any() == case.biased
        each = constant.view(-1, 1, call.value.shape[-1])  # [the model's kv_head, 1, dim]
        expected = each.repeat_interleave(call.kv_heads // len(each), 0).expand_as(call.value)
        torch.testing.assert_close(quiet.value, expected, rtol=1e-5, atol=1e-5)
        free = without_constant(quiet, constant)
        assert free.value.abs().max() < 1e-5
        assert free.output.abs().max() < 1e-5
        # negative controls: with gain, values differ from it and between tokens
        assert (call.value - expected).abs().max() > 1e-2
        assert call.value.std(2).mean() > 1e-3


def test_every_line_of_the_table_has_a_model() -> None:
    assert {row.block for row in ROWS} == {case.block for case in CASES}
    assert len({(row.block, row.attention) for row in ROWS}) == len(ROWS)


# --- what other code folds


def language_model(folder: Path, name: str) -> tuple[Tower, nn.Module]:
    model = load(parse(f"{name}:{folder}"), **CPU)
    return model.tower("text"), model.module


def alignment(call: AttentionCall) -> Tensor:
    """cos(y_i, v_i), `[batch, head, token]`."""
    return torch.cosine_similarity(call.output, call.value.repeat_interleave(call.group, 1), dim=-1)


def folded_calls(folder: Path, ids: Tensor) -> list[AttentionCall]:
    """What the hooks of transformer-lens show once it has folded norms and value biases into the weights."""
    from transformer_lens.model_bridge import TransformerBridge

    from diag.models.families.transformer_lens import lens_calls

    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    bridge.enable_compatibility_mode(disable_warnings=True)
    bridge.eval()
    layers = [Layer(i, f"blocks.{i}.attn", block.attn) for i, block in enumerate(bridge.blocks)]
    calls: list[AttentionCall] = []
    with torch.inference_mode(), lens_calls(bridge, layers, calls.append, causal=True):
        bridge(ids)
    return calls


@pytest.mark.parametrize("kind", ["demo", "gpt2", "neox", "llama"])
def test_transformer_lens_folds_the_same(kind: str, folder_of: Callable[[str], Path]) -> None:
    """Same checkpoint, its own folding: the same values, outputs and cosines, head by head."""
    folder = demo.EMBEDDED / "lm" if kind == "demo" else folder_of(kind)
    ids = torch.randint(2, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
    tower, module = language_model(folder, "hf")
    constants = value_constants(module, tower.layers)
    ours: list[AttentionCall] = []
    with torch.inference_mode(), tower.capture(tower.layers, ours.append):
        module(input_ids=ids)
    for raw, theirs in zip(ours, folded_calls(folder, ids), strict=True):
        free = without_constant(raw, constants[raw.layer])
        torch.testing.assert_close(free.value, theirs.value, rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(free.output, theirs.output, rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(alignment(free), alignment(theirs), rtol=0, atol=1e-5)
        # a negative control: what is folded is not small
        if kind != "llama":
            assert (alignment(raw) - alignment(theirs)).abs().max() > 5e-3


def test_transformer_lens_folds_only_the_bias_where_norms_come_after(
    folder_of: Callable[[str], Path],
) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    folder = folder_of("bert")
    tower, module = language_model(folder, "hf")
    constants = value_constants(module, tower.layers)
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    with pytest.warns(UserWarning, match="does not support fold_ln"):
        bridge.enable_compatibility_mode(disable_warnings=True)
    for layer, block in zip(tower.layers, bridge.blocks, strict=True):
        value = layer.module.value
        assert torch.equal(block.attn.v.weight, value.weight)
        assert not block.attn.v.bias.any()
        assert torch.equal(constants[layer.index], value.bias)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "qwen3"])
def test_both_routes_have_one_constant(kind: str, folder_of: Callable[[str], Path]) -> None:
    constants = []
    for family in ("hf", "tl"):
        tower, module = language_model(folder_of(kind), family)
        constants.append(value_constants(module, tower.layers))
    assert constants[0].keys() == constants[1].keys()
    for index in constants[0]:
        torch.testing.assert_close(constants[0][index], constants[1][index])


def test_a_bias_that_moves_through_the_layer_does_not_count() -> None:
    """The same function with b_V or without: only the cosines as computed can tell."""
    case = CASES[0]
    module, layers = built(case)
    moved = deepcopy(module)
    for layer in attention_modules(moved):
        attention: Any = layer.module
        shift = attention.qkv.bias.chunk(3)[2].clone()
        attention.qkv.bias.chunk(3)[2].zero_()
        attention.proj.bias += attention.proj.weight @ shift
    calls = [calls_of(module, layers, case), calls_of(moved, attention_modules(moved), case)]
    free = [
        [without_constant(call, constants[call.layer]) for call in found]
        for found, constants in zip(
            calls, [value_constants(m, attention_modules(m)) for m in (module, moved)], strict=True
        )
    ]
    for a, b in zip(*free, strict=True):
        torch.testing.assert_close(alignment(a), alignment(b), rtol=0, atol=1e-5)
    assert all((alignment(a) - alignment(b)).abs().max() > 0.1 for a, b in zip(*calls, strict=True))


# --- what is refused


class Attention(nn.Module):
    """A stranger with the name of one that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(8), Attention()


class Adapted(nn.Module):
    """A layer of weights with something added to it."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias


def vit(**options: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **VIT, **options)


def adapted() -> nn.Module:
    module: Any = vit()
    module.blocks[1].attn.qkv = Adapted(module.blocks[1].attn.qkv)
    return module


def quantised() -> nn.Module:
    module: Any = vit()
    rows = module.blocks[1].attn.qkv.weight
    module.blocks[1].attn.qkv.weight = nn.Parameter(rows.to(torch.int8), requires_grad=False)
    return module


def batch_norm() -> nn.Module:
    module: Any = vit()
    module.blocks[1].norm1 = nn.BatchNorm1d(32)
    return module


NOT_KNOWN = "its value projection is not known"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "a stranger": (lambda: nn.Sequential(vit(), Block()), "'1.attn' (Attention)", NOT_KNOWN),
    "open_clip's own attention": (
        lambda: nn.Sequential(open_clip.transformer.CustomResidualAttentionBlock(32, 4)),
        "'0.attn' (Attention)",
        NOT_KNOWN,
    ),
    "known attention, unknown block": (
        lambda: nn.Sequential(timm.layers.Attention(32)),
        "'0' (Attention)",
        NOT_KNOWN,
    ),
    "unknown attention, known block": (
        lambda: vit(attn_layer="diff"),
        "'blocks.0.attn' (DiffAttention)",
        NOT_KNOWN,
    ),
    "an adapter": (
        adapted,
        "'blocks.1.attn' (Attention)",
        "its value projection, Adapted, is not a plain linear layer",
    ),
    "integers": (
        quantised,
        "'blocks.1.attn' (Attention)",
        "its value projection, Linear, is not a plain linear layer",
    ),
    "a norm over the batch": (
        batch_norm,
        "'blocks.1.attn' (Attention)",
        "the norm before its projection, BatchNorm1d, is not known",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(name: str) -> None:
    build, layer, why = REFUSED[name]
    module = build()
    layers = attention_modules(module)
    with pytest.raises(UserError) as error:
        value_constants(module, layers)
    assert str(error.value) == f"values of layer {layer} cannot be made bias-free: {why}"
    assert error.value.tip == "measure them as computed, the default, or leave the layer out with --layers"
    known = [one for one in layers if one.path.startswith(("0.blocks", "blocks.0")) and "diff" not in name]
    if "unknown" not in name:
        assert len(value_constants(module, known)) == len(known)


# --- from the command line and from Python


def probed(attnbias: Callable[..., Any], *options: str) -> Any:
    import pandas as pd

    metrics = "cos_y_vself,cos_y_vpartner,value_similarity,entropy,self_weight"
    ended = attnbias(
        "probe", "-m", "demo:lm", "--limit", "2", "--seq-len", "16", "--metrics", metrics, *options
    )
    assert ended.code == 0, ended.err
    (folder,) = [line.removeprefix("run: ") for line in ended.lines if line.startswith("run: ")]
    return folder, ended.out, pd.read_csv(Path(folder) / "layers.csv").set_index(["metric", "layer"])


def test_the_option_changes_the_table_and_its_name(attnbias: Callable[..., Any]) -> None:
    plain, shown, computed = probed(attnbias)
    spelled, _, same = probed(attnbias, "--values", "as-computed")
    assert plain == spelled
    assert computed.equals(same)
    dashed, told, free = probed(attnbias, "--values", "bias-free")
    assert probed(attnbias, "--values", "bias_free")[0] == dashed != plain
    assert (computed["values"].unique(), free["values"].unique()) == (["as_computed"], ["bias_free"])
    assert "values as_computed" in shown
    assert "values bias_free" in told
    change = (free["mean"] - computed["mean"]).abs()
    for metric in ("cos_y_vself", "cos_y_vpartner", "value_similarity"):
        assert (change[metric] > 0).all(), metric
        assert change[metric].max() > 0.01, metric
    for metric in ("entropy", "self_weight"):  # attention itself is what it was
        assert (change[metric] == 0).all(), metric


def test_other_values_are_not_understood(attnbias: Callable[..., Any]) -> None:
    ended = attnbias("probe", "-m", "demo:lm", "--values", "centred")
    assert ended.code == 2
    assert ended.lines == ["error: --values is as-computed or bias-free", "tip: given: 'centred'"]


def test_a_model_is_refused_before_it_runs(
    attnbias: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diag.run.run.shard_values", lambda *_, **__: pytest.fail("it was run"))
    monkeypatch.setattr(
        "diag.models.value_constants._ROWS",
        {("timm.vision_transformer.Block", "timm.Attention"): ROWS[0]},
    )
    ended = attnbias("probe", "-m", "demo:lm", "--limit", "1", "--values", "bias-free")
    assert ended.code == 2
    assert ended.lines[-2:] == [
        "error: values of layer 'h.0.attn' (GPT2Attention) cannot be made bias-free: "
        "its value projection is not known",
        "tip: measure them as computed, the default, or leave the layer out with --layers",
    ]
    assert not list(Path("runs").glob("*/layers.csv"))


def test_from_python_and_for_ones_own_module() -> None:
    import diag

    options = {"metrics": ["cos_y_vself"], "limit": 2}
    computed, free = (
        diag.probe("demo:vit-p16", "demo", values=values, **options).layers
        for values in ("as_computed", "bias-free")
    )
    assert free["values"].unique() == ["bias_free"]
    assert (free["mean"] != computed["mean"]).all()
    torch.manual_seed(0)
    module = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64), 2, enable_nested_tensor=False
    ).eval()
    batches = [torch.randn(9, 2, 32)]
    assert diag.probe(module, batches, values="bias_free", **options).layers["n"].gt(0).all()
    with pytest.raises(UserError, match=r"values of layer '0' \(Plain\) cannot be made bias-free"):
        diag.probe(nn.Sequential(Plain()).eval(), [torch.randn(2, 9, 8)], values="bias_free")


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]

"""Blocks are found in every family, and what is added to the stream is what their output is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from surveys import layers_on
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

from diag.attention.call import AttentionCall
from diag.attention.states import BlockStates
from diag.errors import MeasurementError, UserError
from diag.models.families.demo import build_vit
from diag.models.families.timm.load import fuse
from diag.models.hooks.block_parts import Block, find_blocks, to_stream
from diag.models.hooks.layers import Layer, attention_modules
from diag.models.hooks.residual import (
    branch_edits,
    check_states,
    projection_error,
    rebuild_error,
    stream_states,
)
from diag.models.hooks.seam import attention_calls

TOKENS = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = SIZES | TOKENS | {"max_position_embeddings": 24, "attn_implementation": "sdpa", "use_cache": False}
IMAGE = SIZES | {"image_size": 32, "patch_size": 8, "attn_implementation": "sdpa"}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
NEEDS = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])


@dataclass(frozen=True)
class Case:
    """A model, how it is run once, and how its blocks are arranged."""

    module: nn.Module
    run: Callable[[], Any]
    arrangement: str
    layers: tuple[Layer, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return find_blocks(self.module, self.layers)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Norms, biases and layer scales that are no constants, which would hide one that is left out."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            weight = name.endswith(("weight", "gamma", "lambda1", "gamma_1", "gamma_2"))
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + (0.8 if weight else 0)
    fuse(module)
    return module.eval()


def case(
    module: nn.Module, *inputs: Tensor, arrangement: str = "pre-norm", part: str = "", **named: Any
) -> Case:
    """A case that runs the module on the inputs; the layers are those of one part."""
    randomised(module)
    return Case(
        module,
        lambda: module(*inputs, **named),
        arrangement,
        attention_modules(module.get_submodule(part), prefix=f"{part}." if part else ""),
    )


class Stack(nn.Sequential):
    """Blocks one after the other."""


def hf(model: str, config: str, arrangement: str = "pre-norm", **sizes: Any) -> Callable[[], Case]:
    def build() -> Case:
        torch.manual_seed(0)
        kind, settings = getattr(transformers, model), getattr(transformers, config)(**sizes)
        module = kind._from_config(settings, attn_implementation="sdpa")
        if "image_size" in sizes:
            return case(module, torch.randn(2, 3, 32, 32), arrangement=arrangement)
        return case(module, torch.randint(2, 50, (2, 9)), arrangement=arrangement)

    return build


def timm_vit(arrangement: str = "pre-norm", **options: Any) -> Callable[[], Case]:
    return lambda: case(
        VisionTransformer(**VIT, **options), torch.randn(2, 3, 32, 32), arrangement=arrangement
    )


def encoder(norm_first: bool, batch_first: bool) -> Callable[[], Case]:
    def build() -> Case:
        layer = nn.TransformerEncoderLayer(
            16, 2, 24, norm_first=norm_first, batch_first=batch_first, activation="gelu"
        )
        module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        shape = (2, 9, 16) if batch_first else (9, 2, 16)
        return case(module, torch.randn(shape), arrangement="pre-norm" if norm_first else "post-norm")

    return build


def clip_tower(part: str) -> Callable[[], Case]:
    def build() -> Case:
        vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "ls_init_value": 0.5}
        text = {"context_length": 9, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
        module = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
        images, ids = torch.randn(2, 3, 32, 32), torch.randint(2, 50, (2, 9))
        return case(module, images, ids, part=part)

    return build


def qwen_vision() -> Case:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 14}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision | {"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56}
    ).vision_config
    kind = transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel
    module = kind._from_config(config, attn_implementation="sdpa")
    pixels = torch.randn(64, 3 * 2 * 14 * 14)
    return case(module, pixels, grid_thw=torch.tensor([[1, 8, 8]]))


def t5() -> Case:
    sizes = {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 48}
    module = transformers.T5EncoderModel._from_config(
        transformers.T5Config(**sizes, **TOKENS), attn_implementation="sdpa"
    )
    return case(module, torch.randint(2, 50, (2, 9)))


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class OwnBlock(nn.Module):
    """A user's block with usual names."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn, self.mlp = OwnAttention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


GPT2 = TOKENS | {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 24, "use_cache": False}
NEOX = ("GPTNeoXModel", "GPTNeoXConfig")
OPT = TOKENS | {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 48}
OPT |= {"max_position_embeddings": 24, "word_embed_proj_dim": 32, "use_cache": False}
DISTIL = TOKENS | {"n_layers": 2, "dim": 32, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 24}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2)}
EVA = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
CASES: Mapping[str, Callable[[], Case]] = {
    "timm": timm_vit(init_values=0.5),
    "timm, no layer scale": timm_vit(),
    "timm, drop path": timm_vit(drop_path_rate=0.2, init_values=0.5),
    "timm, norms after": timm_vit("res-post-norm", block_fn=ResPostBlock),
    "timm, scales as parameters": lambda: case(
        timm.create_model("eva02_tiny_patch14_224", init_values=0.5, **EVA), torch.randn(2, 3, 32, 32)
    ),
    "timm Swin": lambda: case(
        SwinTransformer(**SWIN, num_heads=(2, 4), num_classes=0), torch.randn(2, 3, 32, 32)
    ),
    "demo": lambda: case(build_vit(16), torch.randn(2, 3, 64, 64)),
    "open_clip vision": clip_tower("visual"),
    "open_clip text": clip_tower("transformer"),
    "TransformerEncoder": encoder(norm_first=False, batch_first=True),
    "TransformerEncoder, norm first": encoder(norm_first=True, batch_first=True),
    "TransformerEncoder, tokens first": encoder(norm_first=False, batch_first=False),
    "torchvision": lambda: case(
        Stack(*(EncoderBlock(2, 16, 24, 0.0, 0.0) for _ in range(2))), torch.randn(2, 9, 16)
    ),
    "own block": lambda: case(Stack(OwnBlock(), OwnBlock()), torch.randn(2, 9, 16)),
    "GPT-2": hf("GPT2Model", "GPT2Config", **GPT2),
    "NeoX, parallel": hf(*NEOX, "parallel", **TEXT, use_parallel_residual=True),
    "NeoX, sequential": hf(*NEOX, **TEXT, use_parallel_residual=False),
    "Phi": hf("PhiModel", "PhiConfig", "parallel", **TEXT),
    "BERT": hf("BertModel", "BertConfig", "post-norm", **TEXT),
    "RoBERTa": hf("RobertaModel", "RobertaConfig", "post-norm", **TEXT),
    "DistilBERT": hf("DistilBertModel", "DistilBertConfig", "post-norm", **DISTIL),
    "Llama": hf("LlamaModel", "LlamaConfig", **TEXT, num_key_value_heads=2),
    "Qwen2": hf("Qwen2Model", "Qwen2Config", **TEXT, num_key_value_heads=2),
    "Qwen3": hf("Qwen3Model", "Qwen3Config", **TEXT, num_key_value_heads=2, head_dim=8),
    "OLMo 2": hf("Olmo2Model", "Olmo2Config", "res-post-norm", **TEXT),
    "Gemma 3": hf("Gemma3TextModel", "Gemma3TextConfig", "res-post-norm", **TEXT, head_dim=8),
    "OPT": hf("OPTModel", "OPTConfig", **OPT),
    "OPT, norms after": hf("OPTModel", "OPTConfig", "post-norm", **OPT, do_layer_norm_before=False),
    "T5": t5,
    "ViT": hf("ViTModel", "ViTConfig", **IMAGE),
    "CLIP": hf("CLIPVisionModel", "CLIPVisionConfig", **IMAGE),
    "SigLIP": hf("SiglipVisionModel", "SiglipVisionConfig", **IMAGE),
    "DINOv2": hf("Dinov2Model", "Dinov2Config", **IMAGE, layerscale_value=0.5),
    "DINOv3": hf("DINOv3ViTModel", "DINOv3ViTConfig", **IMAGE, layerscale_value=0.5),
    "Qwen2.5-VL vision": qwen_vision,
}
every_case = pytest.mark.parametrize("name", CASES)


def seen(given: Case) -> tuple[list[BlockStates], list[AttentionCall], Any]:
    states: list[BlockStates] = []
    calls: list[AttentionCall] = []
    with (
        torch.no_grad(),
        attention_calls(given.layers, calls.append),
        stream_states(given.blocks, states.append),
    ):
        output = given.run()
    return states, calls, output


def flat(output: Any) -> Tensor:
    """The first tensor that a model returns."""
    if isinstance(output, transformers.utils.ModelOutput):
        output = output.to_tuple()
    return output if isinstance(output, Tensor) else output[0]


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


# --- finding blocks, and what they add ---------------------------------------------------------------


@every_case
def test_the_updates_add_up_to_what_the_block_returns(name: str) -> None:
    """The residual arithmetic written out, for every family."""
    torch.manual_seed(0)
    given = CASES[name]()
    blocks = given.blocks
    assert [block.index for block in blocks] == list(range(len(given.layers)))
    assert {block.arrangement for block in blocks} == {given.arrangement}
    states, _, _ = seen(given)
    assert [s.layer for s in states] == [block.index for block in blocks]
    for block, s in zip(blocks, states, strict=True):
        first, second = s.attention_update, s.mlp_update
        assert first.norm() > 1e-3 * s.before.norm(), "an update of nothing would prove nothing"
        assert second.norm() > 1e-3 * s.before.norm()
        if given.arrangement == "post-norm":
            assert len(block.norms) == 2
            middle = block.norms[0](s.before + first)
            after = block.norms[1](middle + second)
        elif given.arrangement == "parallel":
            middle, after = s.before, s.before + first + second
        else:
            middle, after = s.before + first, s.before + first + second
        torch.testing.assert_close(s.middle, middle, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(s.after, after, rtol=1e-5, atol=1e-5)
        assert rebuild_error(block, s) < 1e-5
        check_states(block, s)


@every_case
def test_blocks_follow_one_another(name: str) -> None:
    states, _, _ = seen(CASES[name]())
    for earlier, later in pairwise(states):
        if earlier.after.shape == later.before.shape:  # not across Swin's stages
            torch.testing.assert_close(earlier.after, later.before, rtol=0, atol=0)


@every_case
def test_what_is_watched_is_not_changed_and_nothing_is_left_behind(name: str) -> None:
    given = CASES[name]()

    with torch.inference_mode(), attention_calls(given.layers, lambda call: None):
        expected = flat(given.run())
        before = hooks(given.module)
        with stream_states(given.blocks, lambda states: None):
            assert torch.equal(flat(given.run()), expected)
    assert before - hooks(given.module) == 2 * len(given.layers)  # the seam's own


@every_case
def test_the_output_projection_makes_the_attention_update(name: str) -> None:
    """W_O, layer scale and the bias rebuild the update from the heads' outputs, so W_O is W_O."""
    given = CASES[name]()
    states, calls, _ = seen(given)
    if given.arrangement == "res-post-norm":
        assert all(s.to_stream is None for s in states)
        return
    windowed = name in ("timm Swin", "Qwen2.5-VL vision")
    for block, s in zip(given.blocks, states, strict=True):
        own = [call for call in calls if call.layer == s.layer]
        error = projection_error(block, replace(s, call=own[0]))
        if windowed and (len(own) > 1 or own[0].batch != s.batch):
            assert error == float("inf")
        else:
            assert error < 1e-5
            assert projection_error(block, replace(s, call=replace(own[0], output=own[0].output * 2))) > 1e-3


@every_case
def test_a_wrong_reading_of_a_block_does_not_pass_the_gate(name: str) -> None:
    """A negative control: every other arrangement is refused with numbers."""
    given = CASES[name]()
    states, _, _ = seen(given)
    for block, s in zip(given.blocks, states, strict=True):
        wrong = replace(block, arrangement="pre-norm" if given.arrangement == "parallel" else "parallel")
        assert rebuild_error(wrong, s) > 1e-3
        doubled = replace(s, mlp_update=2 * s.mlp_update)
        with pytest.raises(MeasurementError, match=rf"layer '{block.path}' \(\w+\), read as .* add up"):
            check_states(block, doubled)


def test_a_value_that_is_not_finite_is_told() -> None:
    given = CASES["own block"]()
    states, _, _ = seen(given)
    with pytest.raises(UserError, match=r"layer '0\.attn' gives values that are not finite") as error:
        check_states(given.blocks[0], replace(states[0], after=states[0].after / 0))
    assert "--dtype float32" in error.value.tip


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "NeoX, parallel", "timm", "open_clip vision"])
def test_half_precision_passes_the_gate(name: str) -> None:
    given = CASES[name]()
    given.module.bfloat16()
    run = given.run
    if name in ("timm", "open_clip vision"):
        image, ids = torch.randn(2, 3, 32, 32).bfloat16(), torch.randint(2, 50, (2, 9))
        run = lambda: given.module(*((image, ids) if name.startswith("open") else (image,)))
    states, _, _ = seen(replace(given, run=run))
    for block, s in zip(given.blocks, states, strict=True):
        assert s.after.dtype == torch.bfloat16
        check_states(block, s)


def test_layers_may_be_picked() -> None:
    given = CASES["GPT-2"]()
    states, _, _ = seen(replace(given, layers=given.layers[1:]))
    assert [(s.layer, s.path) for s in states] == [(1, "h.1.attn")]


def test_shapes_are_batch_token_dim() -> None:
    first, _, _ = seen(CASES["TransformerEncoder, tokens first"]())
    assert first[0].before.shape == first[0].mlp_update.shape == (2, 9, 16)
    grid, _, _ = seen(CASES["timm Swin"]())
    assert [s.after.shape for s in grid] == [(2, 64, 16)] * 2 + [(2, 16, 32)] * 2
    packed, _, _ = seen(CASES["Qwen2.5-VL vision"]())
    assert packed[0].before.shape == (1, 64, 32)


# --- what is not understood ---------------------------------------------------------------------------


class Bare(nn.Module):
    """Attention and MLP under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.channels = OwnAttention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(x + self.mixer(x))


def test_an_unknown_block_is_named_with_what_was_looked_for() -> None:
    module = Stack(OwnBlock(), Bare())
    with pytest.raises(UserError) as error:
        find_blocks(module, attention_modules(module))
    assert str(error.value) == (
        "the block of layer '1.mixer' (OwnAttention) is not understood: none of OwnAttention, Bare, Stack "
        "holds an attention module, an MLP beside it and the norm before the MLP, under their usual names"
    )
    assert "--layers" in error.value.tip


def test_timms_parallel_blocks_are_refused_by_name() -> None:
    things = VisionTransformer(**VIT, block_fn=ParallelThingsBlock)
    with pytest.raises(UserError, match=r"ParallelThingsBlock: it runs several attention modules"):
        find_blocks(things, attention_modules(things))
    scaling = randomised(VisionTransformer(**VIT, block_fn=ParallelScalingBlock))
    found = layers_on(scaling, torch.randn(2, 3, 32, 32))
    with pytest.raises(UserError, match=r"ParallelScalingBlock: its attention and MLP share one projection"):
        find_blocks(scaling, found)


def test_a_layer_scale_out_of_sight_is_not_overlooked() -> None:
    """A scale that is a parameter of the block comes after every module that could be watched."""
    module = Stack(OwnBlock())
    module[0].gamma_1 = nn.Parameter(torch.ones(16))
    with pytest.raises(UserError, match=r"layer '0\.attn' \(OwnAttention\) is not understood"):
        find_blocks(module, attention_modules(module))


def test_a_layer_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="layer 'x' is not part of the model"):
        find_blocks(Stack(OwnBlock()), [Layer(0, "x", OwnAttention())])


class Scaled(OwnBlock):
    """The names of an ordinary block, and something else."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + 0.5 * self.mlp(self.ln_2(x))


def test_the_gate_finds_a_block_that_is_not_what_its_names_say() -> None:
    given = case(Stack(Scaled()), torch.randn(2, 9, 16))
    states, _, _ = seen(given)
    with pytest.raises(
        MeasurementError, match=r"layer '0\.attn' \(Scaled\), read as pre-norm, does not add up"
    ):
        check_states(given.blocks[0], states[0])


class Skipping(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.ln_1(x))


class Shrinking(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x[:, ::2] + self.mlp(self.ln_2(x[:, ::2]))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Skipping, r"layer '0\.attn' finished without its stream between its branches"),
        (Shrinking, r"layer '0\.attn' turns \(2, 9, 16\) into \(2, 5, 16\): its stream is not understood"),
    ],
)
def test_a_block_that_goes_another_way_is_named(block: type[nn.Module], message: str) -> None:
    given = case(Stack(block()), torch.randn(2, 9, 16))
    before = hooks(given.module)
    with pytest.raises(MeasurementError, match=message):
        seen(given)
    assert hooks(given.module) == before


def test_a_block_that_never_ran_is_named() -> None:
    given = CASES["own block"]()
    with (
        pytest.raises(MeasurementError, match=r"the block of layer '1\.attn' was never run"),
        stream_states(given.blocks, lambda states: None),
    ):
        given.module[0](torch.randn(2, 9, 16))
    assert hooks(given.module) == 0


def test_everything_is_undone_after_an_exception() -> None:
    given = CASES["BERT"]()
    before = hooks(given.module)

    def fail(states: BlockStates) -> None:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"), stream_states(given.blocks, fail):
        given.run()
    assert hooks(given.module) == before


def test_one_block_is_held_at_a_time() -> None:
    given = CASES["GPT-2"]()
    with torch.inference_mode(), stream_states(given.blocks, lambda states: None):
        given.run()
        watches = [
            hook.__self__
            for block in given.blocks
            for hook in block.module._forward_hooks.values()
            if hasattr(hook, "__self__")
        ]
        assert len(watches) == 2
        assert all(watch.seen == {} for watch in watches)


# --- changing what a branch adds ------------------------------------------------------------------------


def zero(update: Tensor, real: Tensor | None) -> Tensor:
    return torch.zeros_like(update)


@pytest.mark.parametrize("which", ["attention", "mlp"])
@every_case
def test_an_edit_changes_the_very_tensor_that_is_added(name: str, which: str) -> None:
    given = CASES[name]()
    plain, _, _ = seen(given)
    with branch_edits(given.blocks, {1: zero}, which):
        edited, _, _ = seen(given)
    # nothing before it changes by a bit
    assert torch.equal(edited[0].after, plain[0].after)
    assert torch.equal(edited[1].before, plain[1].before)
    s = edited[1]
    update = s.attention_update if which == "attention" else s.mlp_update
    assert update.abs().max() == 0
    assert rebuild_error(given.blocks[1], s) < 1e-5
    assert not torch.equal(s.after, plain[1].after)
    if given.arrangement in ("pre-norm", "res-post-norm") and which == "attention":
        torch.testing.assert_close(s.middle, s.before, rtol=0, atol=0)


@pytest.mark.parametrize("which", ["attention", "mlp"])
@every_case
def test_an_edit_that_changes_nothing_changes_nothing(name: str, which: str) -> None:
    given = CASES[name]()
    plain, _, _ = seen(given)
    with branch_edits(given.blocks, {0: lambda update, real: update.clone()}, which):
        edited, _, _ = seen(given)
    for a, b in zip(plain, edited, strict=True):
        assert torch.equal(a.after, b.after)


@pytest.mark.parametrize("name", ["TransformerEncoder, tokens first", "OPT", "timm Swin", "GPT-2", "BERT"])
def test_an_edit_sees_batch_token_dim(name: str) -> None:
    """Context broadcasting is a mean over tokens: over the batch it would be another thing."""
    given = CASES[name]()
    plain, _, _ = seen(given)

    def broadcast(update: Tensor, real: Tensor | None) -> Tensor:
        return (update + update.mean(1, keepdim=True)) / 2

    with branch_edits(given.blocks, {1: broadcast}, "mlp"):
        edited, _, _ = seen(given)
    torch.testing.assert_close(edited[1].mlp_update, broadcast(plain[1].mlp_update, None))


def test_edits_are_seen_whichever_is_entered_first() -> None:
    given = CASES["GPT-2"]()
    states: list[BlockStates] = []
    with (
        torch.inference_mode(),
        stream_states(given.blocks, states.append),
        branch_edits(given.blocks, {0: zero}, "attention"),
    ):
        given.run()
    assert states[0].attention_update.abs().max() == 0
    check_states(given.blocks[0], states[0])


def test_an_edit_gets_the_mask_and_gradients_flow() -> None:
    given = CASES["BERT"]()
    scale = torch.tensor(0.5, requires_grad=True)

    def broadcast(update: Tensor, real: Tensor | None) -> Tensor:
        assert real is NEEDS
        mean = (update * real[..., None]).sum(1, keepdim=True) / real.sum(1)[:, None, None]
        return update + scale * mean

    with branch_edits(given.blocks, {1: broadcast}, "mlp", NEEDS):
        output = given.run().last_hidden_state
    output.square().sum().backward()
    assert scale.grad is not None
    assert scale.grad.abs() > 0


def test_edits_are_undone_and_unknown_layers_told() -> None:
    given = CASES["GPT-2"]()
    before = hooks(given.module)
    with pytest.raises(KeyError), branch_edits(given.blocks, {0: zero}, "mlp"):
        raise KeyError
    assert hooks(given.module) == before
    with (
        pytest.raises(UserError, match="no block for layer 7") as error,
        branch_edits(given.blocks, {7: zero}, "mlp"),
    ):
        pass
    assert error.value.tip == "layers are 0, 1"


def test_a_padded_encoder_is_seen_and_edited_on_its_plain_path() -> None:
    """With padding nn.TransformerEncoder would nest the batch and fuse the layers."""
    module = randomised(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2))
    x, states = torch.randn(2, 9, 16), []
    blocks = find_blocks(module, attention_modules(module))
    with torch.inference_mode(), stream_states(blocks, states.append):
        output = module(x, src_key_padding_mask=~NEEDS)
    assert output.shape == x.shape
    for block, s in zip(blocks, states, strict=True):
        check_states(block, s)
    with torch.inference_mode(), branch_edits(blocks, {1: zero}, "attention"):
        edited = module(x, src_key_padding_mask=~NEEDS)
    assert not torch.equal(edited[NEEDS], output[NEEDS])


def test_the_projection_leaves_its_bias_out_and_its_scale_in() -> None:
    given = CASES["timm"]()
    block, (states, calls, _) = given.blocks[0], seen(given)
    project = to_stream(block)
    assert project is not None
    assert block.scale is not None
    torch.testing.assert_close(project(torch.zeros_like(calls[0].output)), torch.zeros_like(states[0].before))
    direct = (states[0].attention_update / block.scale - block.output_projection.bias) * block.scale
    torch.testing.assert_close(project(calls[0].output), direct, rtol=1e-4, atol=1e-5)

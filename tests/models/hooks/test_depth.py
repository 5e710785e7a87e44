"""The depth axis: which stacks a model has, the numbers of their places, and what is said of empty ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn

from diag.models.hooks.depth import EAGER, Place, Stack, stacks_of

CROSS = "4 queries over 5 keys: cross-attention or pooling"
CHANNELS = "it attends over channels, not over tokens"
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
}
BART: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}


def attending(root: nn.Module, like: Mapping[str, str | None]) -> dict[str, str | None]:
    """What a pass over a model would find: modules whose path matches a pattern, and why one is skipped."""
    return {
        path: why
        for pattern, why in like.items()
        for path, _ in root.named_modules()
        if re.fullmatch(pattern, path)
    }


def stacks(root: nn.Module, like: Mapping[str, str | None]) -> tuple[Stack, ...]:
    found = attending(root, like)
    assert found
    return stacks_of(root, found)


def brief(stack: Stack) -> list[str]:
    """Each place as its path, with what is said of it where it is not measured."""
    assert [place.index for place in stack.places] == list(range(len(stack.places)))
    return [f"{place.path}: {place.why}" if place.why else place.path for place in stack.places]


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, **options)


def hf(name: str, **options: Any) -> Callable[[], nn.Module]:
    kind = re.split("Model|For", name)[0]
    return lambda: getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**options))


HYBRIDS = {
    "qwen3-next": (
        hf("Qwen3NextModel", **SMALL, num_key_value_heads=2, num_experts=2, mlp_only_layers=[3]),
        r".*\.self_attn",
        [
            *(f"layers.{i}: no softmax attention (Qwen3NextGatedDeltaNet)" for i in range(3)),
            "layers.3.self_attn",
        ],
    ),
    "jamba": (  # two kinds of decoder layers, and experts in every second one
        hf(
            "JambaModel",
            **SMALL,
            num_key_value_heads=2,
            attn_layer_offset=1,
            attn_layer_period=2,
            num_experts=2,
        ),
        r".*\.self_attn",
        [
            "layers.0: no softmax attention (JambaMambaMixer)",
            "layers.1.self_attn",
            "layers.2: no softmax attention (JambaMambaMixer)",
            "layers.3.self_attn",
        ],
    ),
    "nextvit": (  # of a convolution block every part is in the others too
        timm_model("nextvit_small"),
        r".*e_mhsa",
        [
            *(f"stages.0.blocks.{i}: no softmax attention (NextConvBlock)" for i in range(3)),
            *(f"stages.1.blocks.{i}: no softmax attention (NextConvBlock)" for i in range(3)),
            "stages.1.blocks.3.e_mhsa",
            *(
                f"stages.2.blocks.{i}.e_mhsa"
                if i in (4, 9)
                else f"stages.2.blocks.{i}: no softmax attention (NextConvBlock)"
                for i in range(10)
            ),
            *(f"stages.3.blocks.{i}: no softmax attention (NextConvBlock)" for i in range(2)),
            "stages.3.blocks.2.e_mhsa",
        ],
    ),
}


@pytest.mark.parametrize(("build", "measured", "places"), HYBRIDS.values(), ids=HYBRIDS.keys())
def test_blocks_that_mix_tokens_otherwise_keep_their_places(
    build: Callable[[], nn.Module], measured: str, places: list[str]
) -> None:
    with torch.device("meta"):
        (stack,) = stacks(build(), {measured: None})
    assert (stack.name, brief(stack)) == ("", places)


PATHS = {
    "swin": (
        timm_model("swin_tiny_patch4_window7_224", depths=(1, 2, 1, 1)),
        {r".*attn": None},
        [f"layers.{i}.blocks.{j}.attn" for i, j in ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0))],
    ),
    "twins": (
        timm_model("twins_svt_small", depths=(2, 2, 1, 1)),
        {r".*\.0\.attn": None, r".*\.1\.attn": CROSS},
        [
            *("blocks.0.0.attn", f"blocks.0.1.attn: {CROSS}", "blocks.1.0.attn", f"blocks.1.1.attn: {CROSS}"),
            *("blocks.2.0.attn", "blocks.3.0.attn"),
        ],
    ),
    "pvt-v2": (  # pooled keys: the first six keep their places
        timm_model("pvt_v2_b0"),
        {r"stages\.[012].*\.attn": CROSS, r"stages\.3.*\.attn": None},
        [f"stages.{i}.blocks.{j}.attn" + (f": {CROSS}" if i < 3 else "") for i in range(4) for j in (0, 1)],
    ),
    "segformer": (
        hf(
            "SegformerModel", depths=[1, 1, 1, 2], hidden_sizes=[8, 8, 8, 8], num_attention_heads=[1, 1, 1, 1]
        ),
        {r"stages\.[012]\..*\.attention": CROSS, r"stages\.3\..*\.attention": None},
        [
            *(f"stages.{i}.blocks.0.attention: {CROSS}" for i in range(3)),
            *(f"stages.3.blocks.{j}.attention" for j in (0, 1)),
        ],
    ),
    "maxvit": (  # each block attends over windows, then over a grid
        timm_model("maxvit_rmlp_pico_rw_256", depths=(1, 1, 1, 1)),
        {r".*\.attn": None},
        [f"stages.{i}.blocks.0.attn_{kind}.attn" for i in range(4) for kind in ("block", "grid")],
    ),
    "tnt": (
        timm_model("tnt_s_legacy_patch16_224", depth=2),
        {r".*attn_(in|out)": None},
        [f"blocks.{i}.attn_{kind}" for i in (0, 1) for kind in ("in", "out")],
    ),
    "davit": (
        timm_model("davit_tiny", depths=(1, 1, 1, 1)),
        {r".*\.0\.attn": None, r".*\.1\.attn": CHANNELS},
        [f"stages.{i}.blocks.0.{j}.attn" + (f": {CHANNELS}" if j else "") for i in range(4) for j in (0, 1)],
    ),
    "crossvit": (  # two branches; what joins them is no layer of its own
        timm_model("crossvit_9_240"),
        {r".*blocks.*blocks.*attn": None, r".*fusion.*attn": CROSS},
        [
            f"blocks.{i}.blocks.{branch}.{j}.attn"
            for i in range(3)
            for branch, j in ((0, 0), (1, 0), (1, 1), (1, 2))
        ],
    ),
    "pit": (
        timm_model("pit_ti_224"),
        {r".*\.attn": None},
        [f"transformers.{i}.blocks.{j}.attn" for i, depth in enumerate((2, 6, 4)) for j in range(depth)],
    ),
    "mllama": (  # a layer that attends to an image alone is a layer of the model
        hf("MllamaTextModel", **SMALL, num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=0),
        {r".*\.self_attn": None, r".*\.cross_attn": CROSS},
        ["layers.0.self_attn", f"layers.1.cross_attn: {CROSS}", "layers.2.self_attn", "layers.3.self_attn"],
    ),
    "wav2vec2": (  # a name that ends in a digit is no number
        hf("Wav2Vec2ForCTC", **SMALL | {"num_hidden_layers": 2}),
        {r".*layers\.\d\.attention": None},
        ["wav2vec2.encoder.layers.0.attention", "wav2vec2.encoder.layers.1.attention"],
    ),
}


@pytest.mark.parametrize(("build", "like", "places"), PATHS.values(), ids=PATHS.keys())
def test_layers_of_one_stack_are_counted_through(
    build: Callable[[], nn.Module], like: dict[str, str | None], places: list[str]
) -> None:
    with torch.device("meta"):
        (stack,) = stacks(build(), like)
    assert (stack.name, brief(stack)) == ("", places)


TOWERS = {
    "bart": (hf("BartModel", **BART), r".*self_attn", {"encoder": 2, "decoder": 2}),
    "whisper": (hf("WhisperModel", **BART, pad_token_id=0), r".*self_attn", {"encoder": 2, "decoder": 2}),
    "t5": (
        hf("T5Model", vocab_size=64, d_model=32, d_ff=32, num_layers=1, num_heads=2),
        r".*SelfAttention",
        {"encoder": 1, "decoder": 1},
    ),
    "transformer": (
        lambda: nn.Transformer(16, 2, 2, 3, 32, batch_first=True),
        r".*self_attn",
        {"encoder": 2, "decoder": 3},
    ),
    "clip": (
        hf("CLIPModel", text_config=SMALL, vision_config=SMALL | {"num_hidden_layers": 3}),
        r".*self_attn",
        {"text_model": 4, "vision_model": 3},
    ),
    "blip2": (
        hf(
            "Blip2Model",
            vision_config=SMALL,
            qformer_config=SMALL,
            text_config={"model_type": "opt", **SMALL},
        ),
        r".*(self_attn|\.attention\.attention)",
        {"vision_model": 4, "qformer": 4, "language_model": 4},
    ),
}


@pytest.mark.parametrize(("build", "measured", "depths"), TOWERS.values(), ids=TOWERS.keys())
def test_stacks_of_one_model_are_told_apart(
    build: Callable[[], nn.Module], measured: str, depths: dict[str, int]
) -> None:
    cross = r".*(encoder_attn|multihead_attn|EncDecAttention|crossattention\.attention)"
    with torch.device("meta"):
        model = build()
    found = stacks(model, {measured: None, cross: CROSS})
    assert {stack.name: len(stack.places) for stack in found} == depths
    assert not any(place.why for stack in found for place in stack.places)
    assert {path for stack in found for path in stack.beside} == set(attending(model, {cross: CROSS}))


def test_only_towers_with_something_to_measure_need_names() -> None:
    with torch.device("meta"):
        model = timm.create_model("xcit_nano_12_p16_224", depth=2, cls_attn_layers=1)
    blocks, cls = stacks(model, {r"blocks.*\.attn": None, r"cls_attn_blocks.*\.attn": CROSS})
    assert (blocks.name, len(blocks.places)) == ("", 2)
    assert (cls.name, brief(cls)) == ("cls_attn_blocks", [f"cls_attn_blocks.0.attn: {CROSS}"])


# --- modules of one's own


def parts(**children: nn.Module | dict[str, Any]) -> nn.Module:
    """A module with these children; what is a dictionary is one, too."""
    made = nn.Module()
    for name, child in children.items():
        made.add_module(name, parts(**child) if isinstance(child, dict) else child)
    return made


def attention() -> nn.Module:
    return nn.MultiheadAttention(4, 1)


def block() -> nn.Module:
    return parts(attn=attention(), mlp=nn.Linear(4, 4))


def test_named_blocks_are_one_tower() -> None:
    model = parts(first=block(), second=block())
    (stack,) = stacks(model, {r".*\.attn": None})
    assert brief(stack) == ["first.attn", "second.attn"]
    # without numbers, the order is that in which they run
    (turned,) = stacks_of(
        model, {"first.attn": None, "second.attn": None}, ran=[("second.attn", 0), ("first.attn", 0)]
    )
    assert brief(turned) == ["second.attn", "first.attn"]


def test_cross_attention_separates_towers_without_numbers() -> None:
    model = parts(encoder=block(), decoder={"attn": attention(), "cross": attention()})
    encoder, decoder = stacks(model, {r".*\.attn": None, r".*\.cross": CROSS})
    assert (encoder.name, brief(encoder)) == ("encoder", ["encoder.attn"])
    assert (decoder.name, brief(decoder)) == ("decoder", ["decoder.attn"])
    assert decoder.beside == {"decoder.cross": CROSS}


def test_what_ends_a_stage_holds_one_place_in_it() -> None:
    """LeViT: attention that pools is a block of its own, under the same number in every stage."""
    stages = [
        nn.ModuleList([parts(attn=attention()), parts(mlp=nn.Linear(4, 4)), attention()]) for _ in range(2)
    ]
    model = parts(stages=nn.ModuleList(stages))
    (stack,) = stacks(model, {r".*\.attn": None, r"stages\.\d\.2": CROSS})
    assert [place.path for place in stack.places if place.why is None] == [
        "stages.0.0.attn",
        "stages.1.0.attn",
    ]
    assert len({place.path for place in stack.places}) == len(stack.places) <= 6


def test_a_softmax_outside_of_the_blocks_holds_no_place() -> None:
    model = parts(detector=attention(), layers=layers_of(2))
    (stack,) = stacks(model, {r"layers.*attn": None, "detector": EAGER})
    assert brief(stack) == ["layers.0.attn", "layers.1.attn"]
    assert stack.beside == {"detector": EAGER}


def test_names_tell_stacks_apart_as_shortly_as_they_can() -> None:
    layers = nn.ModuleList([block()])
    model = parts(
        vision={"layers": layers}, text={"encoder": {"layers": layers_of(1)}, "decoder": {"h": layers_of(2)}}
    )
    found = stacks(model, {r".*attn": None})
    assert [(stack.name, len(stack.places)) for stack in found] == [
        ("vision", 1),
        ("text.encoder", 1),
        ("text.decoder", 2),
    ]


def layers_of(depth: int) -> nn.ModuleList:
    return nn.ModuleList([block() for _ in range(depth)])


def test_numbers_may_end_a_name() -> None:
    model = parts(stem=nn.Linear(4, 4), block1=block(), block2=parts(conv=nn.Conv1d(4, 4, 1)), block3=block())
    (stack,) = stacks(model, {r".*attn": None})
    assert brief(stack) == ["block1.attn", "block2: no softmax attention (Conv1d)", "block3.attn"]


@pytest.mark.parametrize("depth", [1, 3])
def test_the_last_number_may_be_a_part_of_a_block(depth: int) -> None:
    layer = [nn.ModuleList([parts(fn=attention()), parts(fn=nn.Linear(4, 4))]) for _ in range(depth)]
    (stack,) = stacks(parts(layers=nn.ModuleList(layer)), {r".*\.0\.fn": None})
    assert brief(stack) == [f"layers.{i}.0.fn" for i in range(depth)]


def test_a_layer_that_stands_alone_is_of_the_stack_beside_it_and_a_pooling_head_is_none() -> None:
    model = parts(trunk={"blocks": layers_of(2), "last": block()}, pool={"attn": attention()})
    (stack,) = stacks(model, {r"trunk.*attn": None, r"pool\.attn": CROSS})
    assert brief(stack) == ["trunk.blocks.0.attn", "trunk.blocks.1.attn", "trunk.last.attn"]
    assert stack.beside == {"pool.attn": CROSS}


def test_parts_of_a_sequence_that_are_no_blocks_hold_no_place() -> None:
    model = nn.Sequential(nn.Linear(4, 4), block(), block(), nn.LayerNorm(4))
    assert [brief(stack) for stack in stacks(model, {r".*attn": None})] == [["1.attn", "2.attn"]]


def test_a_block_that_did_not_run_is_told_so() -> None:
    (stack,) = stacks(parts(layers=layers_of(3)), {r"layers\.[01]\.attn": None})
    assert brief(stack)[2] == "layers.2.attn: no attention call of it was seen"


def test_the_model_itself_may_be_the_layer() -> None:
    assert stacks_of(attention(), {"": None}) == (Stack("", (Place(0, ""),)),)


# --- depth that shares weights


def test_a_module_that_runs_again_takes_a_place_for_each_run() -> None:
    with torch.device("meta"):
        model = hf("AlbertModel", **SMALL, num_hidden_groups=2)()
    groups = [f"encoder.albert_layer_groups.{group}.albert_layers.0.attention" for group in (0, 1)]
    ran = [(path, run) for path in groups for run in (0, 1)]
    (stack,) = stacks_of(model, dict.fromkeys(groups), ran=ran)
    assert [(place.path, place.run) for place in stack.places] == ran
    # a loop over both, twice
    turns = [(path, run) for run in (0, 1) for path in groups]
    (looped,) = stacks_of(model, dict.fromkeys(groups), ran=turns)
    assert [(place.path, place.run) for place in looped.places] == turns


def test_a_module_that_stands_in_several_layers_has_a_place_in_each() -> None:
    """Layers 1 and 3 run the same block, under the path of the first."""
    shared = block()
    plain = [parts(mamba=nn.Linear(4, 4)) for _ in range(2)]
    layers = nn.ModuleList([plain[0], parts(shared=shared), plain[1], parts(shared=shared)])
    path = "layers.1.shared.attn"
    (stack,) = stacks_of(parts(layers=layers), {path: None}, ran=[(path, 0), (path, 1)])
    assert stack.places == (
        Place(0, "layers.0", 0, "no softmax attention (Linear)"),
        Place(1, path),
        Place(2, "layers.2", 0, "no softmax attention (Linear)"),
        Place(3, path, 1),
    )


def test_blocks_without_attention_stand_before_the_one_they_precede_in_a_loop() -> None:
    layers = nn.ModuleList([parts(mamba=nn.Linear(4, 4)), block()])
    ran = [("layers.1.attn", run) for run in range(2)]
    (stack,) = stacks_of(parts(layers=layers), {"layers.1.attn": None}, ran=ran)
    assert [(place.path, place.run) for place in stack.places] == [("layers.0", 0), *ran]

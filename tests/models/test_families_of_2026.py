"""The families of 2026, small and random: which layers they have, whose values these are, what is skipped.

Models as their libraries build them; what a tower by name adds, kinds of tokens, is in the last test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import diag
from diag.attention.call import AttentionCall
from diag.measure.loop import measure
from diag.models import load
from diag.models.base import Tower
from diag.models.families.from_module import from_module
from diag.models.names.resolve import parse

NARROW = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
SPECIAL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = NARROW | SPECIAL | {"head_dim": 8, "max_position_embeddings": 64}
LATENT = {name: size for name, size in TEXT.items() if name != "head_dim"} | {
    **{"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
}
"""Multi-head latent attention: queries and keys of 12 dims, values of 6, all made of eight numbers."""
DENSE = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
DENSE |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 4}
SELECTED = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8}
DELTA = {f"linear_{part}_head_dim": 8 for part in ("key", "value")}
DELTA |= {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
VISION = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
VISION |= {"image_size": 32, "patch_size": 8}
LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
SINGLE = "1 queries over"


@dataclass(frozen=True)
class Case:
    """One family.

    build: the model, or its config. layers: with softmax, number -> path. others: number -> class of what
    mixes tokens without one: it is measured as such, or named. skipped: what is no attention of its own
    tokens, path -> part of the reason. unmeasured: how many of these hold a place. values: number -> whose
    they are, where they are not the layer's own. heads, kv_heads, value_dim: of every call; kv_heads are
    told by what they hold. gated: whether the output projection reads something else than Y. sinks: numbers
    of layers whose rows sum to less than 1. windows: of those that do not see all tokens. padded: of those
    whose windows are filled up. towers: of the module; the first is looked at.
    """

    name: str
    build: Callable[[], Any]
    layers: Mapping[int, str]
    others: Mapping[int, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    unmeasured: int = 0
    values: Mapping[int, str] = field(default_factory=dict)
    heads: int | Mapping[int, int] = 4
    kv_heads: int | Mapping[int, int] = 2
    value_dim: int = 8
    gated: bool = False
    sinks: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    padded: tuple[int, ...] = ()
    towers: tuple[str, ...] = ("module",)
    inputs: Callable[[], Any] | None = None


def config(name: str, *sizes: Mapping[str, Any], **more: Any) -> Callable[[], Any]:
    merged = {key: value for part in sizes for key, value in part.items()} | more
    return lambda: getattr(transformers, f"{name}Config")(**merged)


def numbered(path: str, *numbers: int) -> dict[int, str]:
    return {number: path.format(number) for number in numbers}


SHARING = {
    **{"num_hidden_layers": 5, "num_kv_shared_layers": 2, "sliding_window": 4},
    **{"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 4},
    "layer_types": [SLIDING, FULL, SLIDING, FULL, FULL],
}
ATTENTION = "layers.{}.self_attn"
HYPER = "computes a softmax itself"
HYBRID = {"num_hidden_layers": 3, "layer_types": [LINEAR, FULL, LINEAR]}

TEXTS = [
    Case(
        "gemma-3n",
        config(
            *("Gemma3nText", TEXT, SHARING),
            intermediate_size=[16] * 5,
            activation_sparsity_pattern=[0.0] * 5,
            altup_num_inputs=2,
            laurel_rank=4,
            layer_types=[SLIDING, FULL, SLIDING, FULL, SLIDING],
        ),
        numbered(ATTENTION, *range(5)),
        values={3: "layer 1", 4: "layer 2"},
        windows=(0, 2, 4),
    ),
    Case(
        "gemma-4",
        config("Gemma4Text", TEXT, SHARING, global_head_dim=8),
        numbered(ATTENTION, *range(5)),
        values={3: "layer 1", 4: "layer 1"},
        windows=(0, 2),
    ),
    Case(
        "qwen3-next",
        config("Qwen3Next", TEXT, DELTA, HYBRID, EXPERTS, shared_expert_intermediate_size=16),
        numbered(ATTENTION, 1),
        dict.fromkeys((0, 2), "Qwen3NextGatedDeltaNet"),
        gated=True,
    ),
    Case(
        "qwen3.5",
        config("Qwen3_5Text", TEXT, DELTA, HYBRID),
        numbered(ATTENTION, 1),
        dict.fromkeys((0, 2), "Qwen3_5GatedDeltaNet"),
        gated=True,
    ),
    Case(
        "qwen3.5-moe",
        config("Qwen3_5MoeText", TEXT, DELTA, HYBRID, EXPERTS, shared_expert_intermediate_size=16),
        numbered(ATTENTION, 1),
        dict.fromkeys((0, 2), "Qwen3_5MoeGatedDeltaNet"),
        gated=True,
    ),
    Case(
        "deepseek-v3",
        config("DeepseekV3", LATENT, DENSE, num_hidden_layers=2),
        numbered(ATTENTION, 0, 1),
        kv_heads=4,
        value_dim=6,
    ),
    Case(
        "deepseek-v3.2",
        config("DeepseekV32", LATENT, DENSE, SELECTED, num_hidden_layers=2),
        numbered(ATTENTION, 0, 1),
        kv_heads=4,
        value_dim=6,
        windows=(0, 1),
    ),
    Case(
        "deepseek-v4",
        config(
            *("DeepseekV4", LATENT, DENSE, SELECTED),
            num_hidden_layers=3,
            num_key_value_heads=1,
            head_dim=8,
            o_groups=1,
            o_lora_rank=8,
            sliding_window=4,
            hc_mult=2,
            layer_types=[SLIDING, "compressed_sparse_attention", SLIDING],
        ),
        numbered(ATTENTION, 0, 1, 2),
        skipped={f"layers.{n}.{part}_hc": HYPER for n in range(3) for part in ("attn", "ffn")}
        | {f"layers.1.self_attn.compressor{part}": HYPER for part in ("", ".indexer")},
        kv_heads=1,
        values={1: "others"},  # compressed keys beside those of the tokens
        gated=True,  # values carry positions, which are turned back before the projection
        sinks=(0, 1, 2),
        windows=(0, 1, 2),
    ),
    Case(
        "glm-5",
        config("GlmMoeDsa", LATENT, DENSE, SELECTED, num_hidden_layers=2),
        numbered(ATTENTION, 0, 1),
        kv_heads=4,
        value_dim=6,
        windows=(0, 1),
    ),
    Case(
        "glm-5-next",
        config(
            *("Glm5NextText", LATENT, DENSE, SELECTED, HYBRID),
            index_kpool=2,
            qk_rope_head_dim=0,
            mlp_layer_types=["dense"] * 3,
            linear_head_dim=8,
            linear_num_heads=2,
        ),
        numbered(ATTENTION, 1),
        dict.fromkeys((0, 2), "Glm5NextTextLinearAttention"),
        {f"layers.{n}.{part}_hc": HYPER for n in range(3) for part in ("attn", "ffn")}
        | {"layers.1.self_attn.indexer": HYPER},
        kv_heads=4,
        value_dim=6,
        windows=(1,),
    ),
    Case(
        "kimi-k2.5",
        lambda: transformers.Kimi_K25Config(
            text_config={"model_type": "deepseek_v3", **LATENT, **DENSE, "num_hidden_layers": 2},
            vision_config={**VISION, "image_size": 28},
        ),
        numbered("language_model.layers.{}.self_attn", 0, 1),
        kv_heads=4,
        value_dim=6,
    ),
    Case(
        "kimi-linear",
        config(
            *("KimiLinear", LATENT, HYBRID),
            num_local_experts=2,
            num_experts_per_tok=1,
            mlp_layer_types=["dense"] * 3,
            linear_head_dim=8,
            linear_num_heads=2,
        ),
        numbered(ATTENTION, 1),
        dict.fromkeys((0, 2), "KimiLinearDeltaAttention"),
        kv_heads=4,
        value_dim=6,
    ),
    Case(
        "llama-4",
        config(
            *("Llama4Text", TEXT),
            num_hidden_layers=4,
            attention_chunk_size=4,
            num_local_experts=2,
            intermediate_size_mlp=16,
            no_rope_layers=[1, 1, 1, 0],
        ),
        numbered(ATTENTION, *range(4)),
        windows=(0, 1, 2),
    ),
    Case(
        "olmo-3",
        config("Olmo3", TEXT, num_hidden_layers=3, sliding_window=4, layer_types=[SLIDING, SLIDING, FULL]),
        numbered(ATTENTION, 0, 1, 2),
        windows=(0, 1),
    ),
    Case(
        "gpt-oss",
        config(
            "GptOss", TEXT, num_hidden_layers=2, sliding_window=4, num_local_experts=2, num_experts_per_tok=1
        ),
        numbered(ATTENTION, 0, 1),
        sinks=(0, 1),
        windows=(0,),
    ),
    Case(
        "nemotron-h",
        config(
            *("NemotronH", TEXT),
            hybrid_override_pattern="M-*M",
            num_hidden_layers=4,
            mamba_num_heads=2,
            mamba_head_dim=16,
            ssm_state_size=4,
            n_groups=1,
            chunk_size=4,
        ),
        {2: "layers.2.mixer"},
        {0: "NemotronHMamba2Mixer", 1: "NemotronHMLP", 3: "NemotronHMamba2Mixer"},
    ),
    Case(
        "lfm2",
        config("Lfm2", TEXT, num_hidden_layers=3, layer_types=["conv", FULL, "conv"]),
        numbered(ATTENTION, 1),
        dict.fromkeys((0, 2), "Lfm2ShortConv"),
    ),
]


def pixels(size: int = 32, **more: int) -> Callable[[], Any]:
    return lambda: torch.randn(2, 3, size, size)


def packed() -> dict[str, Tensor]:
    sizes = {"pixel_attention_mask": torch.ones(2, 16, dtype=torch.long)}
    return {"pixel_values": torch.randn(2, 16, 192), "spatial_shapes": torch.tensor([[4, 4]] * 2), **sizes}


def hiera() -> Any:
    backbone = {
        **{"model_type": "sam2_hiera_det_model", "hidden_size": 16, "num_attention_heads": 1},
        **{
            "image_size": [64, 64],
            "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [16, 32, 64, 128],
        },
        **{"num_attention_heads_per_stage": [1, 2, 4, 8], "window_size_per_stage": [4, 2, 4, 2]},
        **{"global_attention_blocks": [3], "window_positional_embedding_background_size": [2, 2]},
    }
    return transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[128, 64, 32, 16],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=16,
    )


WINDOWED = {"image_size": 64, "window_size": 3, "global_attn_indexes": [1]}
TWO = {"heads": 2, "kv_heads": 2}
IMAGES = [
    Case("dinov3", config("DINOv3ViT", VISION), numbered("model.layer.{}.attention", 0, 1), **TWO),
    Case(
        "siglip-2",
        config("Siglip2Vision", {k: x for k, x in VISION.items() if k != "image_size"}, num_patches=16),
        numbered("encoder.layers.{}.self_attn", 0, 1),
        skipped={"head.attention": SINGLE},
        inputs=packed,
        **TWO,
    ),
    Case(
        "perception-encoder",
        lambda: timm.create_model(
            "vit_pe_core_tiny_patch16_384", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2
        ),
        numbered("blocks.{}.attn", 0, 1),
        skipped={"attn_pool": SINGLE},
        **TWO,
    ),
    Case(
        "aimv2",
        config("Aimv2Vision", VISION),
        numbered("encoder.layers.{}.attention", 0, 1),
        skipped={"head": SINGLE},
        **TWO,
    ),
    Case("radio", config("Radio", VISION), numbered("encoder.layer.{}.attention", 0, 1), **TWO),
    Case(
        "v-jepa-2",
        config(
            *("VJEPA2", {key: VISION[key] for key in ("hidden_size", "num_hidden_layers", "patch_size")}),
            **{f"pred_{key}": VISION[key] for key in ("hidden_size", "num_hidden_layers")},
            num_attention_heads=2,
            pred_num_attention_heads=2,
            crop_size=32,
            frames_per_clip=4,
        ),
        numbered("encoder.layer.{}.attention", 0, 1),
        towers=("encoder", "predictor"),
        inputs=lambda: {"pixel_values_videos": torch.randn(2, 4, 3, 32, 32)},
        **TWO,
    ),
    Case(
        "sam",
        config("SamVision", VISION, WINDOWED, mlp_dim=16, output_channels=8, num_pos_feats=8),
        numbered("vision_encoder.layers.{}.attn", 0, 1),
        windows=(0,),
        padded=(0,),
        inputs=pixels(64),
        **TWO,
    ),
    Case(
        "sam-2",
        hiera,
        numbered("backbone.blocks.{}.attn", 0, 1, 3, 4),
        skipped={"backbone.blocks.2.attn": SINGLE},  # its windows have one query each
        unmeasured=1,
        values=dict.fromkeys((1, 4), "others"),
        windows=(0, 1),
        heads={0: 1, 1: 2, 3: 4, 4: 8},
        kv_heads={0: 1, 1: 2, 3: 4, 4: 8},
        value_dim=16,
        inputs=pixels(64),
    ),
    Case(
        "sam-3",
        lambda: transformers.Sam3VisionConfig(
            backbone_config={"model_type": "sam3_vit_model", "pretrain_image_size": 64, **VISION, **WINDOWED},
            fpn_hidden_size=16,
            backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        ),
        numbered("backbone.layers.{}.attention", 0, 1),
        windows=(0,),
        padded=(0,),
        inputs=pixels(64),
        **TWO,
    ),
]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def ids(inputs: int = 2, tokens: int = 9) -> Tensor:
    return torch.stack([torch.randperm(50)[:tokens] + 3 for _ in range(inputs)])


def built(case: Case) -> nn.Module:
    with torch.inference_mode(False):
        made = case.build()
        module = made if isinstance(made, nn.Module) else transformers.AutoModel.from_config(made)
    return module.eval()


def calls_of(tower: Tower, data: Any) -> list[AttentionCall]:
    found: list[AttentionCall] = []
    with tower.capture(tower.layers, found.append):
        tower.forward(tower.encode(data))
    return found


def of_layer(heads: int | Mapping[int, int], call: AttentionCall) -> int:
    return heads if isinstance(heads, int) else heads[call.layer]


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("case", [*TEXTS, *IMAGES], ids=lambda case: case.name)
def test_what_the_calls_of_a_family_mean(case: Case) -> None:
    is_text = case in TEXTS
    given = case.inputs or (ids if is_text else pixels())
    _, towers, samples = from_module(built(case), [given(), given()])
    tower = towers[0]
    assert tuple(one.name for one in towers) == case.towers
    found = {layer.index: layer.path for layer in tower.layers}
    assert {number: path for number, path in found.items() if number not in case.others} == case.layers
    assert tower.depth == len(case.layers) + len(case.others) + case.unmeasured
    skipped = dict(tower.skipped)
    for number, kind in case.others.items():
        told = skipped.pop(f"layers.{number}", None)
        assert (told == f"no softmax attention ({kind})") != (number in found)
    assert skipped.keys() == case.skipped.keys()
    assert all(why in skipped[path] for path, why in case.skipped.items())
    assert not tower.meaning["random"]
    assert tower.meaning["padded_windows"] == [case.layers[number] for number in case.padded]
    with_softmax = replace(tower, layers=[layer for layer in tower.layers if layer.index in case.layers])
    for call in calls_of(with_softmax, samples[:1]):
        assert call.heads == of_layer(case.heads, call)
        # under a mask transformers repeats heads of values
        assert call.value[0].unique(dim=0).shape[0] == of_layer(case.kv_heads, call)
        assert call.value.shape[-1] == case.value_dim
        causal = (call.visibility.count <= torch.arange(1, call.tokens + 1)).all()
        assert causal or not is_text or not call.own_keys
    (measured,) = measure(with_softmax, samples[:1], metrics=["cos_y_vself"], token_sets=["all"])
    assert [values.layer for values in measured] == list(case.layers)
    for values in measured:
        facts = values.facts
        assert facts.value_from == case.values.get(values.layer, "own")
        assert facts.projection == ("modified" if case.gated else "as captured")
        assert (facts.row_sum < 0.99) == (values.layer in case.sinks)
        assert facts.row_sum <= 1 + 1e-5
        assert (facts.attn_scope == "window") == (values.layer in case.windows)


# --- selected keys


@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-5"])
@pytest.mark.parametrize(("selected", "padding"), [(4, 0), (9, 0), (3, 2)])
def test_nulls_range_over_the_selected_keys(
    name: str, selected: int, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the seam, in float64: the mean of the values that the mask shows, and its cosine with one's own;
    and the mean cosine of the output with each of the others.

    A token that no query selects is one like others. As everywhere, a row of one key does not count.
    """
    (case,) = (case for case in TEXTS if case.name == name)
    with torch.inference_mode(False):
        sizes = case.build()
        sizes.index_topk = selected
        module = transformers.AutoModel.from_config(sizes).eval()
    shown = (torch.arange(9) >= padding).long()[None]
    data = {"input_ids": ids(1), "attention_mask": shown} if padding else ids(1)
    table = diag.probe(
        module, [data], metrics=["cos_y_vuniform", "cos_y_vpartner", "self_weight_ratio"]
    ).layers
    found = table.set_index(["layer", "metric"])["mean"]
    given: list[Any] = []
    real = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
        given.append((query, key, value, options["attn_mask"], options["scale"]))
        return real(query, key, value, *more, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    module(**data) if padding else module(data)
    assert len(given) == 2
    for layer, (query, key, value, mask, scale) in enumerate(given):
        bias = torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf)
        visible = mask[0, 0]  # the same in all heads
        counts = visible.sum(-1)
        assert counts.tolist()[padding:] == [min(i + 1, selected) for i in range(9 - padding)]
        rows = (counts > 1) & shown[0].bool()
        counts = counts.clamp(min=1)
        mean = visible.double() / counts[:, None] @ value.double()
        cosine = F.cosine_similarity(mean, value.double(), dim=-1)[..., rows].mean()
        assert found[layer, "cos_y_vuniform"] == pytest.approx(float(cosine), abs=1e-6)
        pattern = (query.double() @ key.double().mT * scale + bias).softmax(-1)
        output, others = pattern @ value.double(), visible & ~torch.eye(9, dtype=torch.bool)
        cosines = F.normalize(output, dim=-1) @ F.normalize(value.double(), dim=-1).mT  # [.., query, key]
        partner = (cosines * others).sum(-1) / others.sum(-1).clamp(min=1)
        assert (others.sum(-1)[rows] > 0).all()
        expected = float(partner[..., rows].mean())
        assert found[layer, "cos_y_vpartner"] == pytest.approx(expected, abs=1e-6)
        ratio = (pattern.diagonal(dim1=-2, dim2=-1) * counts)[..., rows].mean()
        assert found[layer, "self_weight_ratio"] == pytest.approx(float(ratio), abs=1e-5)


# --- by name


def test_kinds_of_tokens_that_are_no_patches(tmp_path: Path) -> None:
    """RADIO holds class tokens and registers in one parameter."""
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with torch.inference_mode(False):
        sizes = transformers.RadioConfig(**VISION, num_cls_tokens=2, num_registers=3)
        transformers.AutoModel.from_config(sizes).save_pretrained(tmp_path)
    tower = load(parse(f"hf:{tmp_path}"), device="cpu", dtype=torch.float32).tower("vision")
    assert tower.prefix == ("cls", "cls", "registers", "registers", "registers")
    assert tower.tokens_in("patch", 16 + 5).tolist() == [False] * 5 + [True] * 16
    assert (tower.facts["patch_size"], tower.token_sets) == (8, ("patch", "all", "cls", "registers"))

"""Every model type of transformers' automatic mapping, small: one generic shrinker, few exceptions."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from zoo.case import Case, NotBuiltError, lively, part

VOCABULARY, TOKENS, SIDE, PATCH = 300, 12, 32, 8
WIDTH, HEADS, DEPTH = 32, 4, 2
LARGEST = 80_000_000
"""Parameters of a model that is run here, at most."""

SMALL: dict[str, Any] = (
    dict.fromkeys(
        [
            "hidden_size",
            "d_model",
            "n_embd",
            "dim",
            "embed_dim",
            "embedding_size",
            "word_embed_proj_dim",
            "hidden_dim",
            "encoder_hidden_size",
            "decoder_hidden_size",
            "d_embed",
            "emb_dim",
            "projection_dim",
            "text_embed_dim",
            "out_hidden_size",
            "attention_hidden_size",
            "vision_hidden_size",
            "hidden_sizes_out",
            "qformer_hidden_size",
            "lm_hidden_size",
            "embed_size",
        ],
        WIDTH,
    )
    | dict.fromkeys(
        [
            "num_attention_heads",
            "n_head",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "n_heads",
            "num_self_attention_heads",
            "num_cross_attention_heads",
            "attention_heads",
        ],
        HEADS,
    )
    | dict.fromkeys(["num_key_value_heads", "n_kv_heads", "num_kv_heads", "multi_query_group_num"], 2)
    | dict.fromkeys(
        [
            "num_hidden_layers",
            "n_layer",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
            "n_layers",
            "depth",
            "num_encoder_layers",
            "num_decoder_layers",
            "num_blocks",
            "num_hidden_groups",
            "num_self_attends_per_block",
            "l_layers",
            "x_layers",
            "r_layers",
        ],
        DEPTH,
    )
    | dict.fromkeys(
        [
            "intermediate_size",
            "d_ff",
            "ffn_dim",
            "n_inner",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "mlp_dim",
            "ffn_hidden_size",
            "inner_dim",
            "feed_forward_hidden_size",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "encoder_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_ffn_hidden_size",
            "filter_size",
        ],
        2 * WIDTH,
    )
    | dict.fromkeys(
        [
            "vocab_size",
            "text_vocab_size",
            "src_vocab_size",
            "tgt_vocab_size",
            "entity_vocab_size",
            "vocab_size_per_layer_input",
        ],
        VOCABULARY,
    )
    | dict.fromkeys(["head_dim", "d_kv", "attention_head_size", "kv_channels", "v_head_dim"], WIDTH // HEADS)
    | {"mamba_d_ssm": 64, "upsample_groups": WIDTH, "n_mamba_heads": 8, "laurel_rank": 8}
    | {"max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_source_positions": 128}
    | {"max_target_positions": 128, "max_seq_len": 128, "seq_length": 128, "max_sequence_length": 128}
    | {
        "image_size": SIDE,
        "patch_size": PATCH,
        "num_experts": 4,
        "num_local_experts": 4,
        "n_routed_experts": 4,
    }
    | {"num_experts_per_tok": 2, "n_shared_experts": 1, "moe_topk": 2, "num_experts_per_token": 2, "top_k": 2}
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16}
    | {"hidden_size_per_layer_input": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64}
    | {"conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2}
    | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_queries": 6}
    | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1}
    | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "state_size": 8, "n_groups": 1}
    | {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    | {
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
        "sep_token_id": 2,
    }
    | {"dropout": 0.0, "sliding_window": 6, "num_mel_bins": 16}
    | {
        "fullatt_block_indexes": [1],
        "window_size": 4,
        "deepstack_visual_indexes": [0],
        "attn_layer_indices": [1],
    }
)
DEEP = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "n_layers", "depth")
DEEP += (
    "num_encoder_layers",
    "num_decoder_layers",
    "num_blocks",
    "num_hidden_groups",
    "l_layers",
    "x_layers",
)
WIDE = ("vocab_size", "num_experts", "num_local_experts", "n_routed_experts", "text_vocab_size", "image_size")
GROUPED = ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "multi_query_group_num")
SIZES: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "ungrouped": SMALL | dict.fromkeys(GROUPED, HEADS),
    "shallow": {key: value for key, value in SMALL.items() if key in (*DEEP, *WIDE, "dropout", "r_layers")},
    "shallow, images as they are": {
        key: value
        for key, value in SMALL.items()
        if key in (*DEEP, *WIDE, "dropout", "r_layers") and key != "image_size"
    },
}
"""What is made small, in turn, until a model can be built and run."""
SPECIAL = ("image", "video", "audio", "vision_start", "vision_end", "boi", "eoi", "mask", "boa", "eoa")
"""Beginnings of names of tokens whose default ids lie beyond the small vocabulary."""


def names() -> list[str]:
    """Every model type of `transformers.AutoModel`."""
    return sorted(MODEL_MAPPING_NAMES)


def shrunk(values: dict[str, Any], kind: str, sizes: str = "small") -> dict[str, Any]:
    """A configuration's fields with small sizes; lists per layer are cut, or cycled, to the depth."""
    from zoo.exceptions import FIELDS

    small: dict[str, Any] = {}
    next_id = 290
    new = SIZES["ungrouped" if sizes == "small" and values.get("kv_lora_rank") else sizes]
    whole = sizes in ("small", "ungrouped")
    staged = any(
        isinstance(values.get(key), list | tuple) for key in ("depths", "hidden_sizes", "layer_depths")
    )
    for key, value in values.items():
        if key in LEFT_OUT and not (staged and key in OUT):
            continue
        if isinstance(value, dict) and key.endswith(("config", "encoder", "decoder")) and value:
            small[key] = shrunk(value, str(value.get("model_type", "")), sizes)
        elif key in new and value is not None and value != 0:
            alike = isinstance(value, list | tuple) == isinstance(new[key], list)
            small[key] = new[key] if alike else value
        elif key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            small[key], next_id = next_id, next_id - 1
        else:
            small[key] = value
    if whole and isinstance(values.get("image_size"), list | tuple):
        small["image_size"] = [SIDE] * len(values["image_size"])
    _of_stages(small, whole)
    for key in ("rotary_dim", "d_head"):
        if whole and isinstance(small.get(key), int):
            small[key] = WIDTH // HEADS
    depths = (
        small[key]
        for key in ("num_hidden_layers", "num_layers", "n_layer")
        if isinstance(small.get(key), int)
    )
    depth = next(depths, DEPTH)
    was = next((values[key] for key in ("num_hidden_layers", "num_layers", "n_layer") if values.get(key)), 0)
    for key, value in small.items():
        if isinstance(value, list | tuple) and (key in PER_LAYER or (len(value) == was and was > 4)):
            small[key] = _cut(list(value), depth)
    if whole and isinstance(small.get("intermediate_size"), list | tuple):
        small["intermediate_size"] = 2 * WIDTH
    for key in ("rope_parameters", "rope_scaling"):
        if whole and isinstance(small.get(key), dict):
            small[key] = _rope(small[key], small.get("head_dim") or WIDTH // HEADS, default_sections(kind))
    if "head_dim" in small and small["head_dim"] is None and whole:
        small["head_dim"] = WIDTH // HEADS
    if whole:
        small.update({key: value for key, value in FIELDS.get(kind, {}).items() if key in values})
    return small


OUT = ("out_features", "out_indices", "_out_features", "_out_indices")
LEFT_OUT = ("stage_names", "per_layer_config", *OUT)
"""What names layers; where they are few stages, they all stay, and so does what names them."""
PER_LAYER = [
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "attn_type_list",
    "attention_layers",
    "activation_sparsity_pattern",
]


def _of_stages(small: dict[str, Any], whole: bool) -> None:
    """Models of several stages: one or two blocks in each, and heads that divide their widths."""
    depths = small.get("depths")
    if "depths" in small and "window_size" in small and isinstance(small.get("image_size"), int):
        small["image_size"] = 128  # the last stage holds a window, too
        if whole:
            small["patch_size"] = 4
    if isinstance(depths, list | tuple) and all(isinstance(depth, int) for depth in depths):
        small["depths"] = [min(depth, 2) for depth in depths]
        heads = small.get("num_heads")
        if whole and isinstance(heads, list | tuple) and "embed_dim" in small:
            small["num_heads"] = [2**stage for stage in range(1, len(heads) + 1)]


def default_sections(kind: str) -> bool:
    """Whether a model of this type cuts rotary angles in sections of sizes that its code has as defaults."""
    if kind not in CONFIG_MAPPING:
        return False
    place = CONFIG_MAPPING[kind].__module__.replace("configuration", "modeling")
    try:
        return 'get("mrope_section"' in inspect.getsource(import_module(place))
    except ImportError:
        return False


def _rope(given: dict[str, Any], width: int, sections: bool) -> dict[str, Any]:
    """Rotary sections of a head's width, which add up to half of what is rotated."""
    if all(isinstance(value, dict) for value in given.values()) and given:
        return {key: _rope(value, width, sections) for key, value in given.items()}
    given = dict(given)
    if sections or isinstance(given.get("mrope_section"), list | tuple):
        half = int(width * given.get("partial_rotary_factor", 1)) // 2
        first = half - 2 * (half // 3)
        given["mrope_section"] = [first, half // 3, half // 3]
    return given


def _cut(of_layers: list[Any], depth: int) -> list[Any]:
    """As many entries as layers, with every kind of layer among them if they are enough."""
    kinds = list(dict.fromkeys(of_layers))
    return (kinds + of_layers)[:depth] if len(kinds) <= depth else kinds[-depth:]


def config_of(kind: str, sizes: str = "small") -> transformers.PretrainedConfig:
    """A small configuration of a model type. Raises NotBuiltError."""
    config_class = CONFIG_MAPPING[kind]
    try:
        default = config_class()
    except Exception as error:  # a library's constructor may say anything
        raise NotBuiltError(f"its configuration has no defaults: {_line(error)}") from error
    values = default.to_dict()
    for key in ("transformers_version", "architectures", "_name_or_path", "dtype", "model_type"):
        values.pop(key, None)
    try:
        config = config_class(**shrunk(values, kind, sizes))
    except Exception as error:
        raise NotBuiltError(f"no small configuration: {_line(error)}") from error
    config.use_cache = False
    return config


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]


def build(name: str, folder: Path | None) -> Case:
    """A model type with random weights, on two inputs, as small as it runs. Raises NotBuiltError."""
    from zoo import inputs

    why = ""
    for sizes in SIZES:
        try:
            module = _module(config_of(name, sizes))
            case = Case("transformers", name, module, *_batch(module))
        except NotBuiltError as error:
            why = why or str(error)
            continue
        if folder is not None:
            assert not isinstance(case.batch, torch.Tensor)
            case.folder = inputs.saved(module, folder, case.batch)
        return case
    raise NotBuiltError(why)


def _module(config: transformers.PretrainedConfig) -> Any:
    """A model of a configuration, with random weights. Raises NotBuiltError."""
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
        except Exception as error:
            raise NotBuiltError(f"cannot be built: {_line(error)}") from error
    if size > LARGEST:
        raise NotBuiltError(f"{size:,} parameters at its smallest here")
    torch.manual_seed(0)
    try:
        module = transformers.AutoModel.from_config(config)
    except Exception as error:
        raise NotBuiltError(f"cannot be built: {_line(error)}") from error
    return lively(module).requires_grad_(False)


def _batch(module: Any) -> tuple[dict[str, torch.Tensor]]:
    """The first batch that a model takes, and of which it takes one input. Raises NotBuiltError."""
    from zoo import inputs

    why = ""
    for trial in inputs.trials(module):
        try:
            with torch.no_grad():
                module(**trial)
                module(**{key: part(x, 0, inputs.ROWS) for key, x in trial.items()})
        except Exception as error:
            why = why or f"{sorted(trial)}: {_line(error)}"
            continue
        return (trial,)
    raise NotBuiltError(f"it does not run: {why or 'no inputs are known for it'}")

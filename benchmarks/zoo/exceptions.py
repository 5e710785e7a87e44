"""Fields of configurations that the generic shrinker of transformers' models cannot guess, by model type."""

from __future__ import annotations

from typing import Any

ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
SERIES: dict[str, Any] = {
    "prediction_length": 8,
    "context_length": 16,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
    "cardinality": [0],
    "embedding_dimension": [0],
}
FIELDS: dict[str, dict[str, Any]] = {
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROTARY, "sliding_attention": ROTARY}},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [64] * 4,
    },
    "glm4v_moe_text": {
        "rope_parameters": ROTARY | {"partial_rotary_factor": 0.5, "mrope_section": [2, 0, 0]}
    },
    "zaya": {"num_experts_per_tok": 1, "sliding_window": 6},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "bros": {"dim_bbox_sinusoid_emb_2d": 8, "dim_bbox_projection": 8},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1]},
    "lilt": {"hidden_size": 48, "num_attention_heads": 4},
    "mistral_large4_text": {"kv_source_layers": [0, 0]},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "is_decoder": False},
    "swin2sr": {"embed_dim": 24, "num_heads": [2, 2], "depths": [2, 2], "image_size": 32, "patch_size": 1},
    "swinv2": {"window_size": 4, "embed_dim": 32, "num_heads": [2, 4, 8, 16], "depths": [2, 1, 1, 1]},
    "swin": {"window_size": 4, "embed_dim": 32, "num_heads": [2, 4, 8, 16]},
    "superpoint": {
        "keypoint_threshold": 0.0,
        "max_keypoints": 16,
        "border_removal_distance": 0,
        "nms_radius": 1,
    },
}

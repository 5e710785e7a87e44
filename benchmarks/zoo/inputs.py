"""Inputs for any model of transformers, from the arguments that its forward takes; and its folder on disk."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from zoo.of_transformers import PATCH, SIDE, TOKENS, VOCABULARY

ROWS = 2


def trials(module: Any) -> Iterator[dict[str, Tensor]]:
    """Batches that a model may take, the fullest first; inputs stand one after another in each tensor."""
    taken = inspect.signature(module.forward).parameters
    needed = {name for name, of in taken.items() if of.default is of.empty}
    if needed & GRIDS:
        yield from packed(module, taken)
    for batch in plain(module):
        beside = {}
        for name, make in BESIDE.items():
            if name in taken and name not in batch and (name in needed or name in ALWAYS):
                try:
                    beside[name] = make(module.config, batch)
                except (AttributeError, KeyError):  # it means something else in this model
                    continue
        yield batch | beside


GRIDS = {"grid_thw", "image_grid_thw", "target_sizes", "grid_hws", "pixel_position_ids", "spatial_shapes"}
ALWAYS = {"visual_feats", "visual_pos", "qformer_input_ids", "input_features_mask", "task_inputs"} | {
    "actions",
    "rewards",
    "returns_to_go",
    "timesteps",
    "past_observed_mask",
    "future_values",
    "future_time_features",
}
"""Arguments that are given although they have a default: without them a model fails later."""


def _like_ids(config: Any, batch: dict[str, Tensor]) -> Tensor:
    return torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % 90 + 5


def _ones(config: Any, batch: dict[str, Tensor]) -> Tensor:
    first = next(iter(batch.values()))
    frames = max(first.shape[1:]) if "input_features" in batch else first.shape[1]
    return torch.ones(ROWS, frames, dtype=torch.long)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


BESIDE: dict[str, Any] = {
    "input_ids": _like_ids,
    "decoder_input_ids": _like_ids,
    "qformer_input_ids": _like_ids,
    "task_inputs": lambda config, batch: torch.arange(ROWS * 77).view(ROWS, 77) % 90 + 5,
    "input_features_mask": _ones,
    "past_values_padding": lambda config, batch: torch.zeros(batch["past_values"].shape[:2]),
    "freq": lambda config, batch: torch.zeros(ROWS, 1, dtype=torch.long),
    "visual_feats": lambda config, batch: _noise(ROWS, 6, config.visual_feat_dim),
    "visual_pos": lambda config, batch: _noise(ROWS, 6, config.visual_pos_dim),
    "prompt_pixel_values": lambda config, batch: _noise(*batch["pixel_values"].shape),
    "prompt_masks": lambda config, batch: _noise(*batch["pixel_values"].shape),
    "input_values": lambda config, batch: _noise(ROWS, 1, 3200),
    "past_time_features": lambda config, batch: _noise(*batch["past_values"].shape[:2], 1),
    "past_observed_mask": lambda config, batch: torch.ones(batch["past_values"].shape),
    "future_values": lambda config, batch: _noise(ROWS, config.prediction_length),
    "future_time_features": lambda config, batch: _noise(ROWS, config.prediction_length, 1),
    "query_embeds": lambda config, batch: _noise(ROWS, 6, config.hidden_size),
    "inputs_embeds": lambda config, batch: _noise(ROWS, TOKENS, config.hidden_size),
    "states": lambda config, batch: _noise(ROWS, TOKENS, config.state_dim),
    "actions": lambda config, batch: _noise(ROWS, TOKENS, config.act_dim),
    "rewards": lambda config, batch: _noise(ROWS, TOKENS, 1),
    "returns_to_go": lambda config, batch: _noise(ROWS, TOKENS, 1),
    "timesteps": lambda config, batch: torch.arange(TOKENS).expand(ROWS, -1),
}
"""What other arguments hold, by name."""


def packed(module: Any, taken: Any) -> Iterator[dict[str, Tensor]]:
    """Patches of images of several sizes in one row, and how many of them each image has."""
    config = getattr(module.config, "vision_config", module.config)
    of = next((getattr(config, name) for name in ("in_channels", "in_chans") if hasattr(config, name)), 3)
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    side, main = 8, "hidden_states" if "hidden_states" in taken else "pixel_values"
    merges = "merge_sizes" in taken
    for deep in dict.fromkeys((getattr(config, "temporal_patch_size", 1) or 1, 1)):
        width = of * deep * patch**2
        flat = _noise(ROWS * side * side, width)
        grid = torch.tensor([[1, side, side]] * ROWS)
        beside = {"merge_sizes": torch.ones(ROWS, dtype=torch.long)} if merges else {}
        for name in ("grid_thw", "image_grid_thw"):
            if name in taken:
                yield {main: flat, name: grid} | beside
                yield {main: flat.view(-1, of, patch, patch * deep), name: grid} | beside
                yield {main: flat.view(1, -1, width), name: grid} | beside
        if "grid_hws" in taken:
            yield {main: flat.view(-1, of, patch, patch * deep), "grid_hws": grid[:, 1:]}
        if "target_sizes" in taken:
            yield {main: _noise(ROWS, of, patch, side * side * patch), "target_sizes": grid[:, 1:]}
        if "spatial_shapes" in taken:
            mask = torch.ones(ROWS, side * side, dtype=torch.long)
            yield {
                main: flat.view(ROWS, -1, width),
                "spatial_shapes": grid[:, 1:],
                "pixel_attention_mask": mask,
            }
        if "pixel_position_ids" in taken:
            places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(ROWS, -1, -1)
            yield {main: flat.view(ROWS, -1, width), "pixel_position_ids": places.contiguous()}


def plain(module: Any) -> Iterator[dict[str, Tensor]]:
    """Batches of what a model's first argument may be."""
    generator = torch.Generator().manual_seed(1)
    taken = inspect.signature(module.forward).parameters
    config = module.config
    text = getattr(config, "text_config", config)
    vocabulary = min(getattr(text, "vocab_size", VOCABULARY) or VOCABULARY, VOCABULARY)
    ids = torch.randint(5, max(vocabulary - 30, 8), (ROWS, TOKENS), generator=generator)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[1, TOKENS - 3 :] = 0
    vision = getattr(config, "vision_config", config)
    side = side_of(vision)
    channels = getattr(vision, "num_channels", None) or 3
    pixels = torch.randn(ROWS, channels if isinstance(channels, int) else 3, side, side, generator=generator)
    main = getattr(module, "main_input_name", "input_ids")
    of_text: dict[str, Tensor] = {"input_ids": ids}
    if "attention_mask" in taken:
        of_text["attention_mask"] = mask
    if "bbox" in taken:
        of_text["bbox"] = torch.randint(0, 50, (ROWS, TOKENS, 4), generator=generator).sort(-1).values
    if "decoder_input_ids" in taken:
        of_text["decoder_input_ids"] = torch.randint(5, vocabulary - 30, (ROWS, TOKENS), generator=generator)
    if main == "input_ids" and "pixel_values" in taken and "input_ids" in taken:
        # an image in the text only where its tokens can be placed; else text and image side by side
        placed = with_image(module, ids, mask, pixels)
        if placed:
            yield placed
        yield of_text | {"pixel_values": pixels}
    if main in ("input_ids", "inputs") and "input_ids" in taken:
        yield of_text
        yield {k: v for k, v in of_text.items() if k != "decoder_input_ids"}
        yield {"input_ids": ids}
    if "pixel_values" in taken:
        yield {"pixel_values": pixels}
        yield of_text | {"pixel_values": pixels}
        for other in (64, 96, 128, 224, 384):
            yield {"pixel_values": torch.randn(ROWS, 3, other, other, generator=generator)}
    if "pixel_values_videos" in taken or "pixel_values" in taken:
        frames = getattr(config, "num_frames", None) or 2
        video = torch.randn(ROWS, frames, 3, side, side, generator=generator)
        yield {("pixel_values_videos" if "pixel_values_videos" in taken else "pixel_values"): video}
        if "input_ids" in taken and "pixel_values_videos" not in taken:
            yield of_text | {"pixel_values": video}
    if "input_features" in taken:
        named = ("num_mel_bins", "feature_size", "feature_projection_input_dim", "input_feat_per_channel")
        mel = next((getattr(config, name) for name in named if getattr(config, name, None)), 16)
        for shape in (
            (ROWS, 64, 4 * mel),
            (ROWS, mel, 256),
            (ROWS, 64, mel),
            (ROWS, 1, 64, mel),
            (ROWS, mel, 3000),
            (ROWS, 1, 1001, 64),
        ):
            features = torch.randn(shape, generator=generator)
            if "input_ids" in taken:
                yield of_text | {"input_features": features}
            yield {"input_features": features} | (
                {"decoder_input_ids": of_text["decoder_input_ids"]} if "decoder_input_ids" in taken else {}
            )
    if "input_values" in taken:
        hidden = getattr(config, "hidden_size", None) or 32
        yield {
            name: torch.randn(ROWS, TOKENS, hidden, generator=generator)
            for name in ("input_values", "decoder_input_values")
            if name in taken
        }
        for shape in ((ROWS, 2000), (ROWS, 64, 16), (ROWS, 1, 3200), (ROWS, 1024, 128), (ROWS, 16000)):
            values = torch.randn(shape, generator=generator)
            yield {"input_values": values} | (
                {"decoder_input_ids": of_text["decoder_input_ids"]} if "decoder_input_ids" in taken else {}
            )
            if "decoder_input_values" in taken:
                mel = getattr(config, "num_mel_bins", 80)
                yield {
                    "input_values": values,
                    "decoder_input_values": torch.randn(ROWS, TOKENS, mel, generator=generator),
                }
    if "past_values" in taken:
        channels = getattr(config, "num_input_channels", None) or 1
        context = getattr(config, "context_length", None) or 32
        lags = max(getattr(config, "lags_sequence", None) or [0])
        for length in dict.fromkeys((context + lags, context, 64, 512)):
            yield {"past_values": torch.randn(ROWS, length, channels, generator=generator)}
            yield {"past_values": torch.randn(ROWS, length, generator=generator)}
    if "input_ids" in taken:
        yield of_text
        yield {"input_ids": ids}
    if "states" in taken:
        yield {"states": _noise(ROWS, TOKENS, config.state_dim)}
    if "query_embeds" in taken:
        yield {"query_embeds": _noise(ROWS, 6, config.hidden_size)}
    if "inputs" in taken:
        yield {"inputs": torch.randn(ROWS, TOKENS, getattr(config, "d_model", 32), generator=generator)}
        yield {"inputs": ids, "attention_mask": mask}
    if "inputs_embeds" in taken:
        width = getattr(text, "hidden_size", 32)
        yield {"inputs_embeds": torch.randn(ROWS, TOKENS, width, generator=generator)}
        yield {"inputs_embeds": torch.randn(ROWS, TOKENS, width, generator=generator), "attention_mask": mask}
    if "hidden_states" in taken:
        width = getattr(config, "hidden_size", 32)
        yield {"hidden_states": torch.randn(ROWS, TOKENS, width, generator=generator)}


def with_image(module: Any, ids: Tensor, mask: Tensor, pixels: Tensor) -> dict[str, Tensor] | None:
    """Text with as many image tokens in front as one image gives; None where that is not simple."""
    token = getattr(module.config, "image_token_id", None)
    if token is None or not hasattr(module, "get_image_features"):
        return None
    try:
        with torch.no_grad():
            found = module.get_image_features(pixel_values=pixels)
        features = getattr(found, "pooler_output", found)
        features = features if isinstance(features, Tensor) else torch.stack(list(features))
        count = features.numel() // features.shape[-1] // len(pixels)
    except Exception:  # every model wants something else here
        return None
    front = torch.full((len(ids), count), token)
    return {
        "input_ids": torch.cat([front, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(front), mask], 1),
        "pixel_values": pixels,
    }


def saved(module: Any, folder: Path, batch: Mapping[str, Tensor]) -> Path:
    """The model in a folder, with a tokenizer and an image processor as its kind needs.

    batch: what it takes, which tells the size of images.
    """
    module.save_pretrained(folder)
    taken = inspect.signature(module.forward).parameters
    if "input_ids" in taken:
        save_tokenizer(folder, around=not _causal(module.config))
    if "pixel_values" in taken:
        vision = getattr(module.config, "vision_config", module.config)
        pixels = batch.get("pixel_values")
        side = pixels.shape[-1] if pixels is not None and pixels.ndim in (4, 5) else side_of(vision)
        _processor(vision, taken, side).save_pretrained(folder)
    return folder


def _processor(vision: Any, taken: Any, side: int) -> Any:
    """The image processor that makes what a model takes."""
    deep = getattr(vision, "temporal_patch_size", None) or 1
    bounds = {"min_pixels": (4 * PATCH) ** 2, "max_pixels": (16 * PATCH) ** 2}
    if "spatial_shapes" in taken:
        return transformers.Siglip2ImageProcessor(patch_size=vision.patch_size, max_num_patches=16)
    if "merge_sizes" in taken:
        return transformers.VideoLlama3ImageProcessor(patch_size=vision.patch_size, merge_size=1, **bounds)
    if hasattr(vision, "spatial_merge_size"):
        return transformers.Qwen2VLImageProcessor(
            patch_size=vision.patch_size,
            temporal_patch_size=deep,
            merge_size=vision.spatial_merge_size,
            **bounds,
        )
    size = {"height": side, "width": side}
    return transformers.ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def side_of(vision: Any) -> int:
    """The side of an image. Stages and convolutions halve it; the last should have some tokens left."""
    side = getattr(vision, "image_size", None) or 4 * SIDE
    side = side if isinstance(side, int) else side[0]
    return max(side, 4 * SIDE) if hasattr(vision, "depths") else side


def _causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING as MASKED,
    )

    return type(config) in CAUSAL and type(config) not in MASKED


def save_tokenizer(folder: Path, *, around: bool) -> None:
    """A byte-level tokenizer of single bytes; around: whether texts get special tokens at both ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "<pad>", "</s>", *alphabet]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if around:
        pairs = [("<s>", 0), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=pairs)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)

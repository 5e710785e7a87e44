"""Zero-shot classes of Hugging Face CLIP models: pooled image states → similarities to names of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""CLIP's seven simple templates, those that open_clip models are asked with too."""


def is_contrastive(module: Any) -> bool:
    """Whether a model scores images against texts as CLIP does: two projections and a temperature."""
    parts = ("vision_model", "visual_projection", "text_model", "text_projection", "logit_scale")
    return all(hasattr(module, part) for part in parts)


def zero_shot(
    module: Any, tokenizer: Any, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Callable[[Float[Tensor, "batch dim"]], Float[Tensor, "batch class"]]:
    """What turns the vision tower's pooled states into class logits, with the model's own temperature.

    A class is the mean of its normalised embeddings over the templates, normalised again; an underscore in a
    name is a blank. With one template these are the logits of the model itself.
    """
    device = module.logit_scale.device
    longest = module.config.text_config.max_position_embeddings
    with torch.inference_mode():
        classes = []
        for name in names:
            written = [template.format(name.replace("_", " ")) for template in templates]
            encoded = tokenizer(
                written, padding=True, truncation=True, max_length=longest, return_tensors="pt"
            ).to(device)
            states = module.text_model(
                input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
            ).pooler_output
            each = normalize(module.text_projection(states), dim=-1)  # [template, dim]
            classes.append(normalize(each.mean(0), dim=-1))
        among = torch.stack(classes)  # [class, dim]
        scale = module.logit_scale.exp()
    return lambda pooled: scale * normalize(module.visual_projection(pooled), dim=-1) @ among.T

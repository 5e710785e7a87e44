"""How each class of diffusion transformer is run: its latents, its prompt and its time step as arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline
from jaxtyping import Float, Int
from torch import Tensor

GUIDANCE = {"FluxTransformer2DModel": 3.5, "SanaTransformer2DModel": 4.5}
"""How strongly models that learned guidance are told to follow the prompt: the default of their pipelines."""


@dataclass(frozen=True)
class Text:
    """What a model is told beside the latents: one row for all inputs, or one for each.

    states: of the prompt's tokens. pooled: of the whole prompt. mask: which tokens are no padding, where a
        model is told that.
    """

    states: Float[Tensor, "batch token dim"]
    pooled: Float[Tensor, "batch dim"] | None = None
    mask: Int[Tensor, "batch token"] | None = None

    def rows(self, number: int) -> Text:
        """The same for so many inputs."""
        return self._each(lambda x: x.expand(number, *x.shape[1:]))

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Text:
        """The same on a device; the mask keeps its format."""
        return self._each(lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Text:
        pooled, mask = (None if x is None else change(x) for x in (self.pooled, self.mask))
        return Text(change(self.states), pooled, mask)


Arguments = Callable[[Any, Tensor, Text, float], dict[str, Any]]
"""Transformer, latents `[batch, channel, height, width]`, text with as many rows, time step -> arguments."""


@dataclass(frozen=True)
class Feeding:
    """One class of transformer.

    arguments: of its forward. prompt: what its pipeline makes of a prompt. tokens: of a prompt, where nothing
        encodes one. packed: how many latents side by side make one token's channels. side: pixels of a
        latent, where no VAE says it. flows: whether image and noise are mixed in proportion to
        the time step.
    """

    arguments: Arguments
    prompt: Callable[[Any, str], Text]
    tokens: int
    packed: int = 1
    side: int = 8
    flows: bool = True

    def shares(self, t: float, scheduler: Any) -> tuple[float, float]:
        """How much of the image and of the noise latents hold at a time step."""
        if self.flows:
            return 1 - t / 1000, t / 1000
        kept = float(scheduler.alphas_cumprod[min(int(t), len(scheduler.alphas_cumprod) - 1)])
        return kept**0.5, (1 - kept) ** 0.5

    def nothing(self, config: Mapping[str, Any]) -> Text:
        """Text embeddings of zeros, in place of a prompt that nothing can encode."""
        width = config["joint_attention_dim" if "joint_attention_dim" in config else "caption_channels"]
        pooled = config.get("pooled_projection_dim")
        return Text(torch.zeros(1, self.tokens, width), None if pooled is None else torch.zeros(1, pooled))


def _steps(latents: Tensor, t: float) -> Tensor:
    """One number for each input."""
    return torch.full((len(latents),), t, device=latents.device)


def _sd3(module: Any, latents: Tensor, text: Text, t: float) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "encoder_hidden_states": text.states,
        "pooled_projections": text.pooled,
        "timestep": _steps(latents, t),
    }


def _flux(module: Any, latents: Tensor, text: Text, t: float) -> dict[str, Any]:
    batch, channels, height, width = latents.shape
    strength = _steps(latents, GUIDANCE[type(module).__name__])
    return {
        "hidden_states": FluxPipeline._pack_latents(latents, batch, channels, height, width),
        "encoder_hidden_states": text.states,
        "pooled_projections": text.pooled,
        "timestep": _steps(latents, t / 1000),
        "img_ids": FluxPipeline._prepare_latent_image_ids(
            batch, height // 2, width // 2, latents.device, latents.dtype
        ),
        "txt_ids": torch.zeros(text.states.shape[1], 3, device=latents.device, dtype=latents.dtype),
        "guidance": strength if module.config.guidance_embeds else None,
    }


def _pixart(module: Any, latents: Tensor, text: Text, t: float) -> dict[str, Any]:
    size = torch.tensor(latents.shape[-2:], device=latents.device, dtype=latents.dtype).expand(
        len(latents), 2
    )
    sizes = {"resolution": size * 8, "aspect_ratio": size[:, :1] / size[:, 1:]}
    return {
        "hidden_states": latents,
        "encoder_hidden_states": text.states,
        "encoder_attention_mask": text.mask,
        "timestep": _steps(latents, min(int(t), 999)),
        "added_cond_kwargs": sizes if module.use_additional_conditions else dict.fromkeys(sizes),
    }


def _sana(module: Any, latents: Tensor, text: Text, t: float) -> dict[str, Any]:
    config = module.config
    strength = GUIDANCE[type(module).__name__] * config.guidance_embeds_scale
    return {
        "hidden_states": latents,
        "encoder_hidden_states": text.states,
        "encoder_attention_mask": text.mask,
        "timestep": _steps(latents, t * config.timestep_scale),
        "guidance": _steps(latents, strength) if config.guidance_embeds else None,
    }


def _by_several(pipeline: Any, prompt: str) -> Text:
    states, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
    return Text(states, pooled)


def _by_two(pipeline: Any, prompt: str) -> Text:
    states, pooled, _ = pipeline.encode_prompt(prompt, None)
    return Text(states, pooled)


def _by_one(pipeline: Any, prompt: str) -> Text:
    states, mask, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    return Text(states, mask=mask)


FEEDINGS = {
    "SD3Transformer2DModel": Feeding(_sd3, _by_several, 77 + 256),
    "FluxTransformer2DModel": Feeding(_flux, _by_two, 512, packed=2),
    "PixArtTransformer2DModel": Feeding(_pixart, _by_one, 300, flows=False),
    "SanaTransformer2DModel": Feeding(_sana, _by_one, 300, side=32),
}
"""By class of the transformer. Tokens of a prompt are those of the published pipelines."""

"""open_clip models, both towers: published tags, hub and local folders, or one's own training checkpoint.

`img_size=` in a name is open_clip's `force_image_size`: position embeddings are interpolated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from diag.errors import UserError, did_you_mean, one_of
from diag.inputs.outside import json_of
from diag.models.base import Model, Tower, device_of_module
from diag.models.checkpoint import read_checkpoint
from diag.models.encoding import (
    frame,
    image_encoder,
    image_preparation,
    image_samples,
    text_encoder,
    text_facts,
    text_samples,
    token_text,
)
from diag.models.families.open_clip import OWN_CONFIGS
from diag.models.families.timm.load import fitted_by_timm, fuse, on_grid, patch_size_of, resampled, stretched
from diag.models.first_layer import placed
from diag.models.loading import build_towers, constructing, hub, layers_of, quiet, ready, theirs
from diag.models.names.spec import LOCAL, SCHEMAS, ModelSpec
from diag.models.sizes import (
    IMAGE,
    NATIVE,
    PATCH,
    Fitted,
    Sides,
    fitted,
    plain,
    refuse_remainder,
    refuse_too_large,
    refuse_unreasonable,
    requested,
)
from diag.models.weights import fit
from diag.variants import described, restore

FORCED = "force_image_size"
MODEL_ARGUMENTS = (IMAGE, FORCED, "force_quick_gelu", "force_context_length", "force_patch_dropout")


def load(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype) -> Model:
    """Loads `open_clip:NAME/TAG`, or `open_clip:NAME` with a checkpoint.

    A tower without self-attention, or whose tokenizer is not at hand, is left out with a note.
    Raises UserError as `diag.models.load` does.
    """
    for config in OWN_CONFIGS.glob("*.json"):
        if open_clip.get_model_config(config.stem) is None:
            open_clip.add_model_config(config)
    notes: list[str] = []
    _check_config(spec)
    image = _image_size(spec)
    native = None if image is None else _native(spec, image)
    module = _create(spec, notes, image)
    fit_to = NATIVE
    if spec.checkpoint is not None:
        found = read_checkpoint(spec.checkpoint, module, key=spec.checkpoint_key)
        notes += found.notes
        tensors = _converted(spec, module, found.tensors)
        restore(module, found.variants)
        if image is not None:
            tensors, fit_to = _resampled(module, tensors, spec.name)
        fit(module, tensors, f"checkpoint '{spec.checkpoint}'")
    elif native is not None and not spec.random_init:
        stored = partial(_create, spec, [], None)
        fit_to = _fitted_by_open_clip(module.visual, native.visual, spec.name, stored)
    notes += (*fit_to.notes, *described(module))
    fuse(module)
    ready(module, spec.resolved, device=device, dtype=dtype)
    builders: dict[str, Callable[[], Tower]] = {
        "vision": lambda: _vision(spec, module, fit_to, dtype),
        "text": lambda: _text(spec, module),
    }
    towers = build_towers(builders, notes)
    zero_shot = partial(_zero_shot, spec, module) if {"vision", "text"} <= set(towers) else None
    return Model(spec.given, spec.family, spec.resolved, module, towers, tuple(notes), zero_shot=zero_shot)


def _zero_shot(spec: ModelSpec, module: Any, names: Sequence[str]) -> Callable[[Tensor], Tensor]:
    """Image embeddings → similarities to class names, in open_clip's seven simple templates."""
    with torch.inference_mode():
        classes = open_clip.build_zero_shot_classifier(
            module,
            open_clip.get_tokenizer(_hub_form(spec)),
            [name.replace("_", " ") for name in names],
            open_clip.SIMPLE_IMAGENET_TEMPLATES,
            device=device_of_module(module),
        )  # [dim, class]
    return lambda embedding: 100 * torch.nn.functional.normalize(embedding, dim=-1) @ classes


def _vision(spec: ModelSpec, module: Any, fit_to: Fitted, dtype: torch.dtype) -> Tower:
    visual = module.visual
    with theirs(f"the preprocessing of '{spec.base}' cannot be used", "check its preprocess_cfg"):
        settings = PreprocessCfg(**visual.preprocess_cfg)
        transform = image_transform_v2(settings, is_train=False)
        mean, std = list(settings.mean), list(settings.std)
    size = settings.size
    facts = {
        "image_size": size if isinstance(size, int) else plain(size),
        **fit_to.facts,
        "preprocessing": {
            "size": size,
            "crop": settings.resize_mode,
            "interpolation": settings.interpolation,
            "mean": mean,
            "std": std,
        },
    }
    return vision_tower(module, transform, spec.resolved, facts, dtype)


def vision_tower(
    module: Any,
    transform: Callable[[Image.Image], Tensor],
    source: str,
    facts: Mapping[str, Any],
    dtype: torch.dtype,
) -> Tower:
    """The vision tower of a model; `transform` takes an RGB image to pixels. source: its name, for errors."""
    visual = module.visual
    trunk = getattr(visual, "trunk", None)
    prepare = image_preparation(transform, dtype)
    tower = Tower(
        name="vision",
        layers=layers_of(visual, source, "vision", prefix="visual."),
        samples=image_samples,
        prepare=prepare,
        encode=image_encoder(prepare, device_of_module(module)),
        forward=lambda batch: module.encode_image(batch.data),
        ending="embedding",
        facts=facts,
    )
    patch_size = getattr(visual, "patch_size", None) if trunk is None else patch_size_of(trunk)
    return placed(tower, visual, patch_size)


def _text(spec: ModelSpec, module: Any) -> Tower:
    with quiet(), hub(_text_config(spec).get("hf_tokenizer_name", spec.resolved), "tokenizer.json"):
        tokenizer = open_clip.get_tokenizer(_hub_form(spec))
    return text_tower(module, tokenizer, spec.resolved)


def text_tower(module: Any, tokenizer: Any, source: str) -> Tower:
    """The text tower of a model, with a tokenizer as open_clip makes one. source: its name, for errors."""
    separate = getattr(module, "text", None)  # CustomTextCLIP; a plain CLIP holds its text tower itself
    holder = module if separate is None else separate
    root, prefix = (module.transformer, "transformer.") if separate is None else (separate, "text.")
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:
        before, after, tokenise = [tokenizer.sot_token_id], [tokenizer.eot_token_id], tokenizer.encode
    else:
        before, after = frame(inner)

        def tokenise(text: str) -> list[int]:
            return inner(tokenizer.clean_fn(text), add_special_tokens=False, verbose=False)["input_ids"]

    # 0 of an encoder of relative positions (mT5), which takes any length
    context = getattr(holder, "context_length", 0) or tokenizer.context_length or None
    fixed = separate is None or getattr(separate, "attn_mask", None) is not None
    return Tower(
        name="text",
        layers=layers_of(root, source, "text", prefix=prefix),
        # a causal mask or a plain CLIP's position embeddings are added whole, whatever the length of the text
        samples=text_samples(tokenise, context=context, before=before, after=after, fixed=fixed),
        encode=text_encoder(device_of_module(module)),
        forward=lambda batch: module.encode_text(batch.data),
        token_text=token_text(tokenizer if inner is None else inner),
        ending="embedding",
        facts=text_facts(context, before, after),
    )


# --- other image sizes than that of the weights


def _image_size(spec: ModelSpec) -> Sides | None:
    """The image size that was asked for, by either of its names. Raises UserError for a patch size."""
    if PATCH in spec.model_args:
        raise UserError(
            f"'{spec.base}' keeps its patch size",
            "timm: models take patch_size=; with open_clip, name an architecture with that patch size",
        )
    if {IMAGE, FORCED} <= spec.model_args.keys():
        raise UserError(f"'{spec.base}': {IMAGE} and {FORCED} are the same", f"give {IMAGE} alone")
    return requested(spec.model_args, IMAGE, spec.base) or requested(spec.model_args, FORCED, spec.base)


def _native(spec: ModelSpec, image: Sides) -> Any:
    """The model at its own size, without weights.

    Raises UserError where its vision tower cannot take another size, or patches do not fill `image`.
    """
    with torch.device("meta"):
        native: Any = _create(replace(spec, random_init=True), [], None, device="meta")
    visual = native.visual
    trunk = getattr(visual, "trunk", None)
    embed: Any = visual if trunk is None else getattr(trunk, "patch_embed", None)
    fixed = trunk is not None and not hasattr(trunk, "set_input_size")
    if fixed or getattr(embed, "grid_size", None) is None:
        raise UserError(
            f"'{spec.base}' has a vision tower ({type(trunk or visual).__name__}) of one image size",
            f"leave {IMAGE} out",
        )
    if image != (embed.image_size if trunk is None else embed.img_size):
        refuse_remainder(image, embed.patch_size, spec.base)
    return native


def _resampled(module: Any, tensors: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], Fitted]:
    """One's own weights with position embeddings brought to the size of `module`."""
    visual = module.visual
    if hasattr(visual, "trunk"):
        return resampled(visual.trunk, tensors, name, "visual.trunk.")
    key = "visual.positional_embedding"
    before = tensors.get(key)
    side = 0 if before is None else isqrt(max(len(before) - 1, 0))
    if before is None or side**2 + 1 != len(before) or (side, side) == visual.grid_size:
        return tensors, NATIVE
    positions = ((side, side), visual.grid_size)
    resized = {**tensors, key: _on_grid(before, *positions)}
    return resized, fitted(name, visual.image_size, positions=positions)


def _on_grid(embedding: Tensor, before: Sides, now: Sides) -> Tensor:
    """As `open_clip.model.resize_pos_embed`, which leaves other grids of equally many patches as they are."""
    return on_grid(embedding[None].float(), before, now)[0].to(embedding.dtype)


def _fitted_by_open_clip(visual: Any, native: Any, name: str, stored: Callable[[], Any]) -> Fitted:
    """What was done to published weights, by open_clip or here.

    native: the tower at the size of its weights, without them. stored: loads the model with them.
    """
    if hasattr(visual, "trunk"):
        stretched(visual.trunk, native.trunk, lambda: stored().visual.trunk)
        return fitted_by_timm(visual.trunk, native.trunk, name)
    grids = native.grid_size, visual.grid_size
    if grids[0] == grids[1]:
        return NATIVE
    own = visual.positional_embedding
    as_many = own.shape == native.positional_embedding.shape
    if as_many and torch.equal(own, stored().visual.positional_embedding):
        own.data = _on_grid(own.data, *grids)
    return fitted(name, visual.image_size, positions=grids)


# --- loading


def _check_config(spec: ModelSpec) -> None:
    """Raises UserError for a folder's config that is none, and for sizes that this machine cannot build."""
    refuse_unreasonable({k: v for k, v in spec.model_args.items() if k != IMAGE}, spec.base)
    if spec.name.startswith(LOCAL):
        file = Path(spec.name.removeprefix(LOCAL)) / "open_clip_config.json"
        tip = "open_clip: takes a folder with the open_clip_config.json and weights of one model"
        config = json_of(file, "config", tip=tip)
        if not isinstance(config.get("model_cfg"), Mapping):
            raise UserError(f"'{file}' holds no model_cfg", tip)
        refuse_unreasonable(config, f"'{file}'")
        with torch.device("meta"):
            module = _create(replace(spec, random_init=True), [], None, device="meta")
        refuse_too_large(module, spec.resolved)


def _create(
    spec: ModelSpec, notes: list[str], image: Sides | None, device: str | torch.device = "cpu"
) -> nn.Module:
    arguments = {key: value for key, value in spec.model_args.items() if key not in (IMAGE, FORCED)}
    if image is not None:
        arguments[FORCED] = plain(image)
    architecture, _, tag = spec.name.partition("/")
    repository, file, files = spec.name, "open_clip_config.json", "--include 'open_clip_*'"
    published = spec.published
    if spec.name.startswith(SCHEMAS):
        architecture, tag = _hub_form(spec), ""
        repository = spec.name.partition(":")[2]
    elif published:
        weights = _published(spec, architecture, tag)
        organisation, name, *path = weights["hf_hub"].strip("/").split("/")
        repository, file = f"{organisation}/{name}", "/".join(path) or "open_clip_model.safetensors"
        config = open_clip.get_model_config(architecture) or {}
        if weights.get("quick_gelu") and not config.get("quick_gelu"):
            arguments["force_quick_gelu"] = True
            notes.append(f"the weights '{tag}' were trained with QuickGELU: it is used")
    elif foreign := _text_config(spec).get("hf_model_name"):  # its text tower is one of transformers
        repository, file, files = foreign, "config.json", "config.json"
    with (
        constructing(spec, MODEL_ARGUMENTS),
        quiet(),
        hub(repository, file, download=files),
    ):
        return open_clip.create_model(
            architecture,
            pretrained=tag if published and tag else None,
            device=device,
            load_weights=published,
            pretrained_text=False,
            require_pretrained=published,
            **arguments,
        )


def _hub_form(spec: ModelSpec) -> str:
    """What open_clip's own functions call the model, without a tag."""
    if spec.name.startswith(SCHEMAS):
        return f"{spec.name}@{spec.revision}" if spec.revision else spec.name
    return spec.name.partition("/")[0]


def _text_config(spec: ModelSpec) -> dict[str, Any]:
    """What open_clip's own config says of a model's text tower; empty for models of others."""
    if spec.name.startswith(SCHEMAS):
        return {}
    config: dict[str, Any] = open_clip.get_model_config(_hub_form(spec)) or {}
    return config.get("text_cfg", {})


def _published(spec: ModelSpec, architecture: str, tag: str) -> dict[str, Any]:
    """open_clip's entry for a tag. Raises UserError where there is none, naming up to three that exist."""
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not tag:
        first = one_of(f"open_clip:{architecture}/{name}" for name in tags[:3])
        raise UserError(
            f"'{spec.base}' names an architecture, not its weights",
            f"use --checkpoint FILE, or {first}" if tags else "use --checkpoint FILE",
        )
    weights = open_clip.get_pretrained_cfg(architecture, tag)
    if not weights:
        near = did_you_mean(tag, tags) or (f"its tags include {one_of(tags[:3])}" if tags else "it has none")
        raise UserError(f"open_clip has no weights '{tag}' for '{architecture}'", near)
    if not weights.get("hf_hub"):
        raise UserError(
            f"'{spec.base}' is not on the Hugging Face Hub, but at {weights['url']}",
            f"download that file, then: -m open_clip:{architecture} --checkpoint FILE",
        )
    return weights


OF_OPENAI = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Sizes that OpenAI's archives hold among the weights."""


def _converted(spec: ModelSpec, module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Older and foreign layouts of the same weights, as `open_clip.load_checkpoint` converts them.

    Position embeddings are not resized: without img_size a checkpoint of another size is an error, not an
    interpolation.
    Raises UserError for OpenAI's weights in a model that does not compute their QuickGELU.
    """
    if tensors.keys() >= OF_OPENAI:
        config = open_clip.get_model_config(spec.name) or {}
        if not (config.get("quick_gelu") or spec.model_args.get("force_quick_gelu")):
            raise UserError(
                f"'{spec.base}' would run with GELU, but OpenAI's weights were trained with QuickGELU",
                f"add force_quick_gelu=true: -m {spec.resolved},force_quick_gelu=true",
            )
        tensors = {name: value for name, value in tensors.items() if name not in OF_OPENAI}
    tensors = convert_state_dict(module, tensors)
    if "positional_embedding" in tensors and not hasattr(module, "positional_embedding"):
        tensors = convert_to_custom_text_state_dict(tensors)
    tensors.pop("text.transformer.embeddings.position_ids", None)
    for name in ("logit_scale", "logit_bias"):
        expected = getattr(module, name, None)
        if name in tensors and expected is not None and expected.numel() == tensors[name].numel():
            tensors[name] = tensors[name].reshape(expected.shape)
    return tensors

"""timm's vision transformers: their names, from timm's registry, a hub repository or a folder.

What a name means is told here, by timm's registry or its index (`registry.py`); `load.py` loads it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from diag.errors import UserError, did_you_mean, need, one_of
from diag.inputs.outside import mapping_in
from diag.models.families.open_clip import open_clip_configs
from diag.models.families.timm.registry import timm_registry
from diag.models.family import LIST_TIP, Family, Listed, loaded_by, patches
from diag.models.names.spec import HUB, LOCAL, SCHEMAS, ModelSpec

_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)?")


def _row(name: str) -> Listed:
    """What timm's registry says about one of its names."""
    config = timm_registry().config(name)
    patch = re.search(r"patch(\d+)", name)
    tokens = patches(config.size[1:], int(patch[1])) if config and patch else ""
    return Listed(name, f"timm:{name}", tokens, config.licence if config else "")


def _claims(spec: ModelSpec) -> bool:
    return bool(_NAME.fullmatch(spec.name)) and timm_registry().has(spec.name.partition(".")[0])


def _in_folder(folder: Path, given: str) -> str | None:
    """A folder that timm saved: its config names an architecture, and no Hugging Face model type."""
    config = mapping_in(folder / "config.json")  # the last family says what is wrong with it
    return f"{LOCAL}{folder}" if "architecture" in config and "model_type" not in config else None


def _named(spec: ModelSpec) -> ModelSpec:
    if spec.name.startswith(SCHEMAS):
        return spec
    need(f"'{spec.given}'", "timm")
    known = timm_registry()
    architecture, _, tag = spec.name.partition(".")
    if not known.has(architecture):
        near = did_you_mean(spec.name, [*known.published(""), *known.models()])
        raise UserError(f"model '{spec.given}' not found in timm", near or LIST_TIP)
    tags = [name.partition(".")[2] for name in known.published(architecture)]
    if tag and tag not in tags:
        some = f"its tags include {one_of(tags[:3])}" if tags else "it has no published weights"
        raise UserError(f"timm's '{architecture}' has no weights '{tag}'", did_you_mean(tag, tags) or some)
    return _native_activation(spec) if spec.published else spec


def _native_activation(spec: ModelSpec) -> ModelSpec:
    """CLIP weights that were trained with QuickGELU, moved to the timm variant that computes it.

    timm builds `*_clip_224.openai` and its like with GELU, which changes every layer silently; its
    registry says so in a note. DFN weights carry no note.
    Raises UserError where timm has no such variant.
    """
    known = timm_registry()
    config = known.config(spec.name)
    architecture, _, tag = spec.name.partition(".")
    tag = tag or (config.tag if config else "")
    if "_clip_" not in architecture or "quickgelu" in architecture or config is None:
        return spec
    if not config.quickgelu and tag not in ("dfn2b", "dfn5b"):
        return spec
    variant = architecture.replace("_clip_", "_clip_quickgelu_")
    if f"{variant}.{tag}" in known.published(variant):
        note = f"weights trained with QuickGELU: '{variant}' computes it, '{architecture}' does not"
        return replace(spec, name=f"{variant}.{tag}", note=note)
    size = re.match(r"vit_([a-z]+)_patch(\d+)", architecture)
    letter = {"base": "B", "large": "L", "huge": "H", "gigantic": "bigG"}.get(size[1], "") if size else ""
    own = f"ViT-{letter}-{size[2]}-quickgelu" if size else ""
    use = f"open_clip:{own}/{tag}" if own in open_clip_configs() else "open_clip's '-quickgelu' variant"
    raise UserError(
        f"'{spec.resolved}' would run with GELU, but its weights were trained with QuickGELU", f"use {use}"
    )


def _repository(spec: ModelSpec) -> str:
    """timm keeps each of its weights in a repository of its own."""
    if spec.name.startswith(HUB) or "." in spec.name:
        return spec.name.removeprefix(HUB) if spec.name.startswith(HUB) else f"timm/{spec.name}"
    config = timm_registry().config(spec.name)
    return f"timm/{spec.name}.{config.tag}" if config and config.tag else spec.name


FAMILY = Family(
    "timm",
    load=loaded_by("diag.models.families.timm.load"),
    named=_named,
    claims=_claims,
    in_folder=_in_folder,
    form="NAME",
    names=lambda: timm_registry().published(""),
    row=_row,
    architecture=lambda name: re.split("[./]", name)[0],
    folders=True,
    hub=True,
    needs=("timm", "torchvision"),
    packages=("timm",),
    repository=_repository,
)

"""open_clip's models: ARCHITECTURE or ARCHITECTURE/TAG, a hub repository or a folder.

What a name means is read off config files, without open_clip; `load.py` loads it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diag.errors import UserError, did_you_mean, need, one_of
from diag.models.family import LIST_TIP, Family, Listed, loaded_by, patches
from diag.models.names.spec import HUB, LOCAL, SCHEMAS, ModelSpec

OWN_CONFIGS = Path(__file__).parent / "model_configs"
BEGINNINGS = ("ViT-", "EVA", "coca_", "RN", "PE-", "ViTamin-")
"""Of architectures that a mistyped name is compared with, before it passes for a hub repository."""


@cache
def open_clip_configs() -> dict[str, Path]:
    """Name -> config file of every architecture, those shipped here as well; imports nothing."""
    spec = find_spec("open_clip")
    folders = [OWN_CONFIGS]
    if spec is not None and spec.submodule_search_locations:
        folders.insert(0, Path(spec.submodule_search_locations[0]) / "model_configs")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.json"))}


def _claims(spec: ModelSpec) -> bool:
    """Raises UserError for a mistyped `ViT-B-16/tag`, which would otherwise pass for a hub repository."""
    architecture = re.split("[/,]", spec.name)[0]
    if architecture in open_clip_configs():
        return True
    if architecture != spec.name and architecture.startswith(BEGINNINGS):
        near = difflib.get_close_matches(architecture, list(open_clip_configs()), n=3, cutoff=0.85)
        if near:
            forms = one_of(name + spec.name[len(architecture) :] for name in near)
            raise UserError(f"model '{spec.given}' not found", f"did you mean {forms}?")
    return False


def _in_folder(folder: Path, given: str) -> str | None:
    return f"{LOCAL}{folder}" if (folder / "open_clip_config.json").is_file() else None


def _named(spec: ModelSpec) -> ModelSpec:
    """The tag is left out where the weights come from elsewhere."""
    if spec.revision and not spec.name.startswith(HUB):
        raise UserError(
            f"model '{spec.given}': open_clip names weights by tag, not by revision",
            "write open_clip:NAME/TAG",
        )
    if spec.name.startswith(SCHEMAS):
        return spec
    architecture, _, tag = spec.name.replace(",", "/", 1).partition("/")
    if architecture not in open_clip_configs():
        need(f"'{spec.given}'", "open_clip")
        near = did_you_mean(architecture, open_clip_configs())
        raise UserError(f"model '{spec.given}' not found in open_clip", near or LIST_TIP)
    return replace(spec, name=f"{architecture}/{tag.strip()}" if tag and spec.published else architecture)


def _row(name: str) -> Listed:
    """What a config says about its architecture."""
    vision: Mapping[str, Any] = json.loads(open_clip_configs()[name].read_text("utf-8"))["vision_cfg"]
    tokens = patches(vision["image_size"], vision["patch_size"]) if vision.get("patch_size") else ""
    return Listed(name, f"open_clip:{name}", tokens, note="name the weights: NAME/TAG, or --checkpoint FILE")


FAMILY = Family(
    "open_clip",
    load=loaded_by("diag.models.families.open_clip.load"),
    named=_named,
    claims=_claims,
    in_folder=_in_folder,
    form="ARCHITECTURE/WEIGHTS",
    names=lambda: list(open_clip_configs()),
    row=_row,
    architecture=lambda name: re.split("[./]", name)[0],
    folders=True,
    hub=True,
    tagged=True,
    needs=("open_clip",),
    packages=("open_clip_torch",),
)

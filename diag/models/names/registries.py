"""Which names there are: short names and embedded models (`aliases.toml`), open_clip's and timm's registries.

The libraries are asked only when one of their names is looked for; open_clip's configs are read as files.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diag.models.names import arguments

OWN_OPEN_CLIP_CONFIGS = Path(__file__).parent / "open_clip_configs"


@cache
def _tables() -> dict[str, dict[str, dict[str, Any]]]:
    return tomllib.loads((Path(__file__).parent / "aliases.toml").read_text(encoding="utf-8"))


def aliases() -> dict[str, dict[str, Any]]:
    """Short name -> what it stands for, from aliases.toml."""
    return _tables()["aliases"]


def demo_models() -> dict[str, dict[str, Any]]:
    """The embedded models, without their family prefix."""
    return _tables()["demo"]


@cache
def open_clip_configs() -> dict[str, Path]:
    """Name -> config file of every open_clip architecture, with the ones shipped here; imports nothing."""
    spec = find_spec("open_clip")
    folders = [OWN_OPEN_CLIP_CONFIGS]
    if spec is not None and spec.submodule_search_locations:
        folders.insert(0, Path(spec.submodule_search_locations[0]) / "model_configs")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.json"))}


@cache
def timm_pretrained() -> tuple[str, ...]:
    """Every timm name with published weights, `ARCHITECTURE.TAG`."""
    import timm

    return tuple(timm.list_pretrained())


def every_name() -> list[str]:
    """Every name that can be typed without a family, and the embedded models."""
    return [
        *aliases(),
        *(f"demo:{name}" for name in demo_models()),
        *open_clip_configs(),
        *timm_pretrained(),
    ]


# --- rows of a listing


def row(name: str, resolves_to: str, tokens: str, licence: str, note: str) -> dict[str, str]:
    """What `attnbias models` says about one name."""
    return {"name": name, "resolves_to": resolves_to, "tokens": tokens, "licence": licence, "note": note}


def short_rows() -> list[dict[str, str]]:
    """The short names and the embedded models."""
    rows = [
        row(
            name,
            entry["model"] + arguments.written(entry.get("model_args", {})),
            entry["tokens"],
            entry["licence"],
            entry.get("note", ""),
        )
        for name, entry in aliases().items()
    ]
    return rows + [
        row(f"demo:{name}", f"demo:{name}", entry["tokens"], "this package's", entry["note"])
        for name, entry in demo_models().items()
    ]


def timm_row(name: str) -> dict[str, str]:
    """What timm's registry says about one of its names."""
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    patch = re.search(r"patch(\d+)", name)
    tokens = _patches(config.input_size[1:], int(patch[1])) if config and patch else ""
    return row(name, f"timm:{name}", tokens, (config.license if config else "") or "", "")


def open_clip_row(name: str) -> dict[str, str]:
    """What an open_clip config says about its architecture."""
    vision: Mapping[str, Any] = json.loads(open_clip_configs()[name].read_text())["vision_cfg"]
    tokens = _patches(vision["image_size"], vision["patch_size"]) if "patch_size" in vision else ""
    return row(name, f"open_clip:{name}", tokens, "", "name the weights: NAME/TAG, or --checkpoint FILE")


def _patches(image_size: int | Sequence[int], patch_size: int | Sequence[int]) -> str:
    sides = [(size, size) if isinstance(size, int) else tuple(size) for size in (image_size, patch_size)]
    return f"{(sides[0][0] // sides[1][0]) * (sides[0][1] // sides[1][1])} patches"

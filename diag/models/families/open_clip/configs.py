"""open_clip's architectures: the config files that come with it, and ours in `model_configs`."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

OWN_CONFIGS = Path(__file__).parent / "model_configs"


@cache
def open_clip_configs() -> dict[str, Path]:
    """Name -> config file of every architecture; imports nothing."""
    spec = find_spec("open_clip")
    folders = [OWN_CONFIGS]
    if spec is not None and spec.submodule_search_locations:
        folders.insert(0, Path(spec.submodule_search_locations[0]) / "model_configs")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.json"))}

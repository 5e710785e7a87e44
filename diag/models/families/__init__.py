"""The model families, one file or folder each, and the table that finds them."""

from __future__ import annotations

from importlib import import_module

from diag.models.family import Family

FAMILIES = {
    "timm": "diag.models.families.timm",
    "open_clip": "diag.models.families.open_clip",
    "hf": "diag.models.families.hf",
    "tl": "diag.models.families.transformer_lens",
    "diffusers": "diag.models.families.diffusers",
    "demo": "diag.models.families.demo",
}
"""Prefix -> the module that holds the family's `FAMILY`, and imports its library only to load a model."""


def family_of(prefix: str) -> Family:
    """The family of a prefix in the table."""
    family: Family = import_module(FAMILIES[prefix]).FAMILY
    return family


def all_families() -> list[Family]:
    """Every family, in the order of the table."""
    return [family_of(prefix) for prefix in FAMILIES]

"""The true class of each image of a labelled folder, `DIR/class/*.jpg`, as a model counts its classes."""

from __future__ import annotations

from collections.abc import Sequence

from diag.errors import UserError, need


def class_names(ids: Sequence[str]) -> list[str]:
    """The class folders of images `class/name.jpg`, sorted. Raises UserError for an image outside any."""
    for name in ids:
        if "/" not in name or ".tar/" in name:
            raise UserError(f"image '{name}' lies in no class folder", "--labelled takes DIR/class/*.jpg")
    return sorted({name.partition("/")[0] for name in ids})


def labels(ids: Sequence[str], classes: int, *, named: bool = False) -> dict[str, int]:
    """Image id → class number.

    classes: how many the model has. named: the model's classes are the folders themselves, in order
        (zero-shot); otherwise folders are class numbers, as many as the model has classes (sorted, as
        torchvision's ImageFolder counts them), or ImageNet synsets such as n01440764.
    Raises UserError where folders cannot be matched with the model's classes, and for synsets without timm.
    """
    folders = class_names(ids)
    if named or len(folders) == classes:
        number = {name: place for place, name in enumerate(folders)}
    elif all(name.isdigit() and int(name) < classes for name in folders):
        number = {name: int(name) for name in folders}
    elif classes == 1000 and all(name.startswith("n") and name[1:].isdigit() for name in folders):
        need("folders named by ImageNet's synsets", "timm")
        from timm.data import ImageNetInfo

        synsets = list(ImageNetInfo().label_names())
        number = {name: synsets.index(name) for name in folders if name in synsets}
    else:
        raise UserError(
            f"the model has {classes} classes and the folder {len(folders)}: which is which is unclear",
            "name the class folders by number, or give as many folders as the model has classes",
        )
    return {name: number.get(name.partition("/")[0], -1) for name in ids}

"""What a model family tells of itself: what its names mean, how it is loaded, what is said about it.

A family is one file or folder under `families/` that holds one `FAMILY`, and one line of the table there.
Its names are resolved and listed without torch, so whatever is heavy is imported where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from diag.models.names.spec import HUB, ModelSpec

if TYPE_CHECKING:
    import torch

    from diag.models.base import Model

LIST_TIP = "'attnbias models' lists short names, 'attnbias models QUERY' searches every name"
SPREAD = "spread"
"""In place of a device: a model's layers lie on all GPUs, where its family can do that."""


@dataclass(frozen=True)
class Listed:
    """What `attnbias models` says about one name.

    name: as it is typed. tokens: what one input becomes. Empty where nothing is known.
    """

    name: str
    resolves_to: str
    tokens: str = ""
    licence: str = ""
    note: str = ""


def patches(image_size: int | Sequence[int], patch_size: int | Sequence[int]) -> str:
    """How many patches an image has, in the words of a row."""
    (height, width), patch = ((x, x) if isinstance(x, int) else x for x in (image_size, patch_size))
    return f"{(height // patch[0]) * (width // patch[1])} patches"


@dataclass(frozen=True)
class Family:
    """One family of models.

    prefix: what stands before the colon in its names.
    load: `load(spec, *, device, dtype)`, the model. Raises UserError as `diag.models.load` does.
    named: checks a name typed with the prefix, or that `claims` took, and brings it to its full form.
        Raises UserError for a name that does not exist, with near ones.
    claims: whether a name without a prefix is one of its names. Raises UserError for one that is nearly.
    in_folder: the name of the model that a folder holds; None for a folder of another family. The second
        argument is the folder as it was typed.
    fallback: it claims whatever may be a name, or a folder, so it is asked after all others.
    form: how one of its names is typed, where not all of them are listed.
    names: every name that is known without asking a network, as it is typed.
    row: what is known of one of these. always_listed: they are few, and listed where nothing is searched for.
    architecture: a name without what tells weights apart.
    folders: its names may be folders. hub: they may begin with `hf-hub:`, as those of other families may.
    tagged: a comma in a name belongs to it (ARCHITECTURE,TAG) and is no mistyped argument.
    spreads: its models can lie on several devices.
    needs: the libraries that its models are loaded with, as they are imported (`diag.errors.EXTRAS`).
    packages: the same as they are installed, for the record of versions.
    commit: of a name on the hub the commit that would be loaded; None where that is not known.
    reads_text: whether a model takes texts and no images, as far as its name or its folder tells.
    repository: where on the hub a model's weights lie; None where that is not known without loading it.
    """

    prefix: str
    load: Callable[..., Model]
    named: Callable[[ModelSpec], ModelSpec]
    claims: Callable[[ModelSpec], bool] = lambda spec: False
    in_folder: Callable[[Path, str], str | None] = lambda folder, given: None
    fallback: bool = False
    form: str = ""
    names: Callable[[], Sequence[str]] = tuple
    row: Callable[[str], Listed] = lambda name: Listed(name, name)
    always_listed: bool = False
    architecture: Callable[[str], str] = lambda name: name
    folders: bool = False
    hub: bool = False
    tagged: bool = False
    spreads: bool = False
    needs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    commit: Callable[[ModelSpec], str | None] = lambda spec: None
    reads_text: Callable[[ModelSpec], bool] = lambda spec: False
    repository: Callable[[ModelSpec], str | None] = lambda spec: spec.name.removeprefix(HUB)


def loaded_by(module: str) -> Callable[..., Model]:
    """The `load` of a module that is imported with the first model, as it brings the library."""

    def load(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype) -> Model:
        model: Model = import_module(module).load(spec, device=device, dtype=dtype)
        return model

    return load

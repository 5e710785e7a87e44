"""A model object with what feeds it, a tokenizer, a processor or a transform: measured as one with a name is.

Objects of transformers, timm and open_clip have the towers that they have by name, with the same windows of
texts and the same token sets; of any other module, the whole of it is one tower.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diag.errors import UserError
from diag.models.base import Model, Tower, device_of_module
from diag.models.encoding import image_encoder, image_preparation, image_samples
from diag.models.first_layer import placed
from diag.models.loading import build_towers, layers_of, theirs
from diag.models.names.spec import ModelSpec
from diag.models.sizes import plain

LIBRARIES = ("timm", "open_clip", "transformers")

TOKENIZER_TIP = "tokenizer= takes that of transformers, or of open_clip for its models"
TRANSFORM_TIP = "preprocess= makes a tensor [3, height, width] of an image; processor= is of transformers"


@dataclass(frozen=True)
class Fed:
    """What makes inputs of a model of texts and images.

    tokenizer: of transformers or open_clip. processor: of transformers: one of images, or one that holds a
        tokenizer besides. preprocess: an image to a tensor, as timm, open_clip and torchvision have it.
    """

    tokenizer: Any = None
    processor: Any = None
    preprocess: Any = None

    def __bool__(self) -> bool:
        return any(part is not None for part in (self.tokenizer, self.processor, self.preprocess))

    @property
    def kind(self) -> str:
        """The inputs that it can only be meant for, where nothing else tells: "vision" or "text"."""
        return "text" if self.preprocess is None and not self._sees else "vision"

    @property
    def _sees(self) -> bool:
        return self.processor is not None and not _is_tokenizer(self.processor)

    def of_texts(self) -> Any:
        """The tokenizer. Raises UserError where none is given."""
        found = self.tokenizer
        if found is None and self.processor is not None:
            found = self.processor if _is_tokenizer(self.processor) else _part(self.processor, "tokenizer")
        if found is None:
            raise UserError("inputs are texts, and no tokenizer is given", TOKENIZER_TIP)
        return found

    def of_images(self) -> Any:
        """The processor of images. Raises UserError where none is given."""
        if not self._sees:
            raise UserError("inputs are images, and neither processor nor preprocess is given", TRANSFORM_TIP)
        return _part(self.processor, "image_processor") or self.processor

    def of_both(self) -> Any:
        """The processor of images and texts together. Raises UserError where none is given."""
        self.of_images()
        return self.processor

    def pixels_of(self) -> Callable[[Image.Image], Tensor]:
        """RGB image → `[3, height, width]`. Raises UserError where nothing is given that makes one."""
        if self.preprocess is not None:
            return partial(_transformed, self.preprocess)
        processor = self.of_images()
        return lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]


def from_object(module: nn.Module, kind: str, fed: Fed) -> Model:
    """The model of a module, with the towers that take "vision" or "text" inputs, as `kind` says.

    The module keeps its mode, its device and its format. Raises UserError where what is given does not feed
    such a tower, or the module has none.
    """
    name = type(module).__name__
    spec, notes = ModelSpec(name, "module", name), list[str]()
    dtype = next((x.dtype for x in module.parameters() if x.is_floating_point()), torch.float32)
    library = library_of(module)
    if kind == "text" and library != "timm":
        fed.of_texts()  # a mistake in what is given comes before one in what the model is
    builders: dict[str, Callable[[], Tower]]
    if library == "open_clip":
        from diag.models.families.open_clip.load import text_tower, vision_tower

        def reading() -> Tower:
            with theirs(f"the tokenizer does not fit {name}", "give open_clip.get_tokenizer(NAME)"):
                return text_tower(module, fed.of_texts(), name)

        def seeing() -> Tower:
            transform = fed.pixels_of()
            facts = {"image_size": _size(_trial(transform))}
            return vision_tower(module, transform, name, facts, dtype)

        builders = {"vision": seeing, "text": reading}
    elif library == "transformers" and (kind == "text" or fed.preprocess is None):
        from diag.models.families.hf.load import Feeding, Lacking, builders_of

        given = Feeding(fed.of_texts, fed.of_images, fed.of_images, fed.of_both)
        module = getattr(module, "base_model", module)
        builders = builders_of(spec, module, Lacking(name), given, notes, dtype=dtype)
    elif kind == "text":
        builders = {"text": lambda: _reading(module, fed.of_texts(), name)}
    else:
        builders = {"vision": lambda: _seeing(module, fed.pixels_of(), name, dtype)}
    takes = {"vision": ("vision", "language"), "text": ("text",)}[kind]
    wanted = {tower: build for tower, build in builders.items() if tower in takes}
    if not wanted:
        raise UserError(
            f"{name} takes no {'images' if kind == 'vision' else 'texts'}", f"it has: {', '.join(builders)}"
        )
    towers = build_towers(wanted, notes, needed=kind if kind in wanted else None)
    return Model(name, "module", f"module:{name}", module, towers, tuple(notes))


def library_of(module: nn.Module) -> str:
    """Which of `LIBRARIES` a module, or what it is derived from, is of; empty for none."""
    packages = [kind.__module__.partition(".")[0] for kind in type(module).__mro__]
    return next((package for package in packages if package in LIBRARIES), "")


def _reading(module: nn.Module, tokenizer: Any, name: str) -> Tower:
    """A module that takes `input_ids` as its only argument, or the first one."""
    from diag.models.families.hf.load import text_tower

    causal = False  # it is not known; special tokens are put around a text as its tokenizer does it
    return text_tower(module, tokenizer, layers_of(module, name, "text"), source=name, causal=causal)


def _seeing(module: nn.Module, transform: Callable[[Image.Image], Tensor], name: str, dtype: Any) -> Tower:
    """A module that takes pixels as its only argument, or by the name `pixel_values`."""
    library = library_of(module)
    part: Any = module
    if library == "transformers":  # of two towers, the one that takes pixels
        base = getattr(module, "base_model", module)
        part = next((x for x in map(partial(_part, base), ("vision_model", "visual")) if x is not None), base)
    device = device_of_module(module)
    trial = _trial(transform)
    named = "pixel_values" in inspect.signature(part.forward).parameters

    def run(pixels: Tensor) -> Any:
        return part(pixel_values=pixels) if named else part(pixels)

    prepare = image_preparation(transform, dtype)
    prefix = next((f"{path}." for path, child in module.named_modules() if child is part and path), "")
    tower = Tower(
        name="vision",
        layers=layers_of(part, name, "vision", prefix=prefix, run=lambda: run(trial[None].to(device, dtype))),
        samples=image_samples,
        prepare=prepare,
        encode=image_encoder(prepare, device),
        forward=lambda batch: run(batch.data),
        facts={"image_size": _size(trial)},
    )
    return placed(tower, part, _patch_size(part, library))


def _patch_size(module: Any, library: str) -> Any:
    if library == "timm":
        from diag.models.families.timm.load import patch_size_of

        return patch_size_of(module)
    return _part(_part(module, "config"), "patch_size")


def _trial(transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """What is made of a picture of noise. Raises UserError where that is no `[channel, height, width]`."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    with theirs("preprocess, or processor, fails on an image", TRANSFORM_TIP):
        made = transform(Image.fromarray(noise))
    if not isinstance(made, Tensor) or made.ndim != 3:
        what = f"of shape {list(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
        raise UserError(f"what preprocess makes of an image is {what}", TRANSFORM_TIP)
    return made


def _transformed(preprocess: Any, image: Image.Image) -> Any:
    """What a transform makes of one image; one that makes a batch of one is asked for that."""
    made = preprocess(image)
    return made[0] if isinstance(made, Tensor) and made.ndim == 4 and len(made) == 1 else made


def _size(pixels: Tensor) -> Any:
    return plain(pixels.shape[-2:])


def _is_tokenizer(processor: Any) -> bool:
    return hasattr(processor, "convert_ids_to_tokens") or hasattr(processor, "sot_token_id")


def _part(whole: Any, name: str) -> Any:
    return getattr(whole, name, None)

"""Diffusion transformers at one time step: images as noised latents, and one prompt for all of them.

A pipeline's VAE encodes an image and its text encoders the prompt. Where a folder lacks them, latents are
noise and text embeddings zeros, and that is a caveat of every number.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from diag.errors import UserError, one_of
from diag.inputs.outside import json_of
from diag.models.base import Batch, Model, Sample, Tower
from diag.models.encoding import each, image_samples, preparation
from diag.models.families.diffusers import CLASSES, MOST, PIPELINE, TIME, TRANSFORMER, USUAL, class_in
from diag.models.families.diffusers.feeding import FEEDINGS, Feeding, Text
from diag.models.families.diffusers.streams import in_depth
from diag.models.families.hf.files import silenced as transformers_silenced
from diag.models.hooks.meaning import meaning_of, refuse_random, told
from diag.models.loading import hub, ready, theirs, unknown_argument
from diag.models.names.spec import ModelSpec
from diag.models.sizes import IMAGE, refuse_remainder, refuse_unreasonable, square
from diag.models.weights import up_to_three

PROMPT, USUAL_PROMPT = "prompt", "a photograph"
"""The argument that names what the image is said to show, and what it is where none is given."""

NOISE, NO_PROMPT = "noise latents", "no prompt"
"""What a model is given in place of what its folder cannot encode: the column `inputs` says so."""

WEIGHTS_TIP = "save it again with save_pretrained, or download the folder again"


def load(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype) -> Model:
    """Loads `diffusers:FOLDER` or `diffusers:ORG/NAME[@REVISION]`.

    Raises UserError as `diag.models.load` does.
    """
    t, prompt = _asked(spec)
    found = _read(spec, dtype)
    feeding = FEEDINGS[type(found.module).__name__]
    with silenced():
        ready(found.module, spec.resolved, device=device, dtype=dtype)
        vae = found.vae and found.vae.requires_grad_(False).eval().to(device, torch.float32)
    text = _text(spec, found, feeding, prompt, device, dtype)
    nothing = feeding.nothing(found.module.config).to(device, dtype)
    fed = _Fed(found, feeding, vae, text or nothing, t, torch.device(device), dtype)
    tower = _tower(spec, fed)
    instead = ", ".join(what for what, lacks in ((NOISE, vae is None), (NO_PROMPT, text is None)) if lacks)
    facts = {
        **tower.facts,
        "t": t,
        "latents": "noise" if vae is None else "of the image",
        "prompt": None if text is None else prompt,
        "instead": instead or None,
    }
    notes = [f"time step {t:g} of {MOST}: 0 is the image, {MOST} is noise"]
    if vae is None:
        notes.append("no VAE in the folder: latents are noise, as at t=1000, and show nothing of an image")
    if text is None:
        notes.append("no text encoders in the folder: text embeddings are zeros, no prompt")
    tower = replace(tower, facts=facts)
    kind = {"model_type": type(found.module).__name__}
    return Model(
        spec.given, spec.family, spec.resolved, found.module, {"vision": tower}, tuple(notes), facts=kind
    )


@contextmanager
def silenced() -> Iterator[None]:
    """Keeps diffusers, and transformers below it, from logging and from drawing progress bars."""
    log = diffusers.utils.logging
    bar = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        with transformers_silenced():
            yield
    finally:
        if bar:
            log.enable_progress_bar()


def _asked(spec: ModelSpec) -> tuple[float, str]:
    """Time step and prompt. Raises UserError for arguments that are none, and a time step out of range."""
    if spec.checkpoint is not None:
        raise UserError(
            f"--checkpoint does not go with '{spec.base}'",
            "put the weights into the folder and give the folder: -m diffusers:FOLDER",
        )
    known = (TIME, PROMPT, IMAGE)
    for key in spec.model_args:
        if key not in known:
            raise unknown_argument(key, known, spec.base)
    t = spec.model_args.get(TIME, USUAL)
    if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t <= MOST:
        raise UserError(
            f"{spec.base}: {TIME} is {t!r}, not a time step",
            f"it can be from 0 (the image) to {MOST} (noise), for example {TIME}={USUAL}",
        )
    return t, str(spec.model_args.get(PROMPT, USUAL_PROMPT))


# --- files


@dataclass(frozen=True)
class _Found:
    """What a folder holds: the transformer, and of its pipeline what is there."""

    module: Any
    pipeline: Any = None
    vae: Any = None


def _read(spec: ModelSpec, dtype: torch.dtype) -> _Found:
    """Raises UserError for what holds no transformer that can be run, and for files that cannot be read."""
    folder, tip = Path(spec.name), "diffusers: takes a folder that a pipeline or its transformer saved"
    local = folder.is_dir()
    alone = local and not (folder / PIPELINE).exists()
    file = folder / (TRANSFORMER if alone else PIPELINE)
    if not local:
        with _reading(spec, PIPELINE, tip):
            file = Path(hf_hub_download(spec.name, PIPELINE, revision=spec.revision))
    document = json_of(file, "config", tip=tip)
    named = class_in(document)
    if named not in CLASSES:
        raise UserError(
            f"'{spec.name}' holds a {named}, which is not measured",
            f"measured are {one_of(CLASSES.values())}",
        )
    if not local:
        with _reading(spec, PIPELINE, tip):
            folder = Path(diffusers.DiffusionPipeline.download(spec.name, revision=spec.revision))
    module = _transformer(spec, getattr(diffusers, named), folder / ("" if alone else "transformer"), dtype)
    if alone or spec.random_init:
        return _Found(module)
    parts = [name for name, part in document.items() if isinstance(part, list) and name != "transformer"]
    # what a pipeline names and its folder lacks is left out: it is told as a caveat
    lacking = [name for name in parts if document[name][:1] in ([], [None]) or not (folder / name).is_dir()]
    with _reading(spec, PIPELINE, WEIGHTS_TIP):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, transformer=module, dtype=dtype, **dict.fromkeys(lacking)
        )
    return _Found(module, pipeline, pipeline.vae)


@contextmanager
def _reading(spec: ModelSpec, file: str, tip: str) -> Iterator[None]:
    """Turns what goes wrong in diffusers, or on the hub, into two lines."""
    what = f"{file} of '{spec.name}' cannot be read"
    with silenced(), theirs(what, tip), hub(spec.name, file, revision=spec.revision):
        yield


def _transformer(spec: ModelSpec, kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    with _reading(spec, "the transformer", WEIGHTS_TIP):
        config = kind.load_config(folder)
    refuse_unreasonable(config, f"'{folder / TRANSFORMER}'")
    with _reading(spec, "the transformer", WEIGHTS_TIP):
        if spec.random_init:
            return kind.from_config(config)
        module, report = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        names = up_to_three([f"'{name}'" for name in sorted(report["missing_keys"])])
        raise UserError(f"the weights of '{spec.name}' lack {names}: they would be random", WEIGHTS_TIP)
    return module


def _text(
    spec: ModelSpec, found: _Found, feeding: Feeding, prompt: str, device: Any, dtype: torch.dtype
) -> Text | None:
    """What the pipeline's encoders make of the prompt; None where it lacks one of them."""
    pipeline = found.pipeline
    encoders = [] if pipeline is None else [x for x in pipeline.components if x.startswith("text_encoder")]
    # the third encoder of Stable Diffusion 3 may be left out: its pipeline puts zeros in its place
    needed = [name for name in encoders if name != "text_encoder_3"]
    if not needed or any(getattr(pipeline, name) is None for name in needed):
        if PROMPT in spec.model_args:
            raise UserError(
                f"'{spec.name}' has no text encoders: it cannot be told a prompt", f"leave {PROMPT} out"
            )
        return None
    with (
        silenced(),
        torch.inference_mode(),
        theirs(f"the prompt of '{spec.name}' cannot be encoded", WEIGHTS_TIP),
    ):
        for name in encoders:
            encoder = getattr(pipeline, name)
            if encoder is not None:
                encoder.eval().to(device)
        text = feeding.prompt(pipeline, prompt).to(device, dtype)
    pipeline.register_modules(**dict.fromkeys(encoders))  # the largest part, and done with
    return text


# --- inputs


@dataclass(frozen=True)
class _Fed:
    """How the transformer of a folder is run on images."""

    found: _Found
    feeding: Feeding
    vae: Any
    text: Text
    t: float
    device: torch.device
    dtype: torch.dtype

    @property
    def side(self) -> int:
        """Pixels of a latent, down and sideways."""
        return self.found.pipeline.vae_scale_factor if self.vae is not None else self.feeding.side

    @property
    def patch(self) -> int:
        """Pixels of a token."""
        return self.side * self.found.module.config.patch_size * self.feeding.packed

    @property
    def usual_size(self) -> int:
        """Of the images, in pixels."""
        return self.found.module.config.get("sample_size", 128) * self.side

    def latents(self, pixels: Tensor) -> Tensor:
        """Noised latents of images `[batch, 3, height, width]`: the same for an image in any batch."""
        height, width = (size // self.side for size in pixels.shape[-2:])
        channels = self.found.module.config.in_channels // self.feeding.packed**2
        noise = torch.stack([_noise(each, (channels, height, width)) for each in pixels]).to(self.device)
        if self.vae is None:
            return noise.to(self.dtype)
        with torch.inference_mode():
            coded = self.vae.encode(pixels.to(self.device))
            clean = coded.latent_dist.mode() if hasattr(coded, "latent_dist") else coded.latent
        config = self.vae.config
        clean = (clean - (config.get("shift_factor") or 0)) * config.scaling_factor
        of_image, of_noise = self.feeding.shares(self.t, self.found.pipeline.scheduler)
        return (of_image * clean + of_noise * noise).to(self.dtype)

    def arguments(self, latents: Tensor, text: Text) -> dict[str, Any]:
        """Of the transformer's forward."""
        return self.feeding.arguments(self.found.module, latents, text.rows(len(latents)), self.t)


def _noise(pixels: Tensor, shape: Sequence[int]) -> Tensor:
    """Noise that belongs to an image: drawn from a seed that its pixels give."""
    seed = zlib.crc32(pixels.cpu().contiguous().numpy().tobytes())
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tower(spec: ModelSpec, fed: _Fed) -> Tower:
    module, size = fed.found.module, square(spec.model_args, spec.base) or fed.usual_size
    refuse_remainder((size, size), (fed.patch, fed.patch), spec.base)
    resize = transforms.Compose(
        [
            transforms.Resize(size, InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToImage(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    prepare = preparation(resize)
    tests = f"'{spec.resolved}' fails on images of {size} px"
    noise = [torch.randn(3, size, size, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def run(latents: Tensor, text: Text) -> object:
        return module(**fed.arguments(latents, text))

    with torch.inference_mode(), theirs(tests, f"try another size: {IMAGE}={fed.usual_size}"):
        first, second, other = (fed.latents(pixels[None]) for pixels in noise)
        run(first, fed.text)
    with torch.inference_mode():
        both, replaced = torch.cat([first, second]), torch.cat([other, second])
        found = meaning_of(module, lambda latents: run(latents, fed.text), both, replaced, inputs=2)
        refuse_random(module, found, False)
        chosen, sets = in_depth(found, run, torch.cat([first, other]), fed.text)

    def encode(samples: Sequence[Sample]) -> Batch:
        pixels = torch.stack(each(samples, lambda sample: prepare(sample.read())))
        data = fed.arguments(fed.latents(pixels), fed.text)
        marked = {name: mask.expand(len(samples), -1) for name, mask in sets.items()}
        return Batch(tuple(sample.id for sample in samples), data, sets=marked)

    return Tower(
        name="vision",
        layers=chosen.layers,
        samples=image_samples,
        prepare=prepare,
        encode=encode,
        forward=lambda batch: module(**batch.data),
        marks=tuple(sets),
        together=tuple(sets),
        ending="token states",
        places=chosen.places,
        skipped=chosen.skipped,
        meaning=told(found, chosen),
        facts={
            "patch_size": fed.patch,
            "image_size": size,
            "positions": _positions(module, size // fed.side),
            "preprocessing": {"size": [size, size], "crop": "center", "interpolation": "bicubic"},
        },
    )


def _positions(module: Any, latents: int) -> str:
    """Says "interpolated" where the model computes sines and cosines of a grid for another one (PixArt)."""
    embed: Any = getattr(module, "pos_embed", None)
    stretched = getattr(embed, "pos_embed", None) is not None and embed.pos_embed_max_size is None
    return "interpolated" if stretched and latents != module.config.sample_size else "native"

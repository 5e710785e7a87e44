"""The files of a Hugging Face model: config, tokenizer, processors. What goes wrong is told in two lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from diag.errors import UserError, one_of
from diag.inputs.outside import MEGABYTE, json_of, regular
from diag.models.families.hf import config_of
from diag.models.families.hf.formats import adapted, gguf_in
from diag.models.families.hf.vlm import PROMPT, image_token
from diag.models.loading import first_line, hub, quiet, unknown_argument
from diag.models.names.spec import ModelSpec, folder_named
from diag.models.sizes import IMAGE, PATCH, refuse_unreasonable
from diag.models.weights import up_to_three

FILES = "--include '*.json' --include '*.safetensors' --include '*.txt' --include '*.model'"

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Either may hold the settings of an image processor."""

VIDEO_PROCESSOR = "video_preprocessor_config.json"
PROCESSOR_TIP = "save it there with image_processor.save_pretrained(FOLDER)"

MOST_TOKENIZER = 256 * MEGABYTE
"""Bytes of a document beside the weights; the largest are tokenizers of 250,000 words, some 35 MB."""

WEIGHTS = tuple(
    f"{stem}{index}" for stem in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)
"""What transformers looks for in a folder."""


@contextmanager
def silenced() -> Iterator[None]:
    """Keeps transformers from logging and from drawing its progress bar."""
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()


@contextmanager
def reading(spec: ModelSpec, file: str, *, tip: str, what: str = "") -> Iterator[None]:
    """Turns what goes wrong while a file of a model is read into two lines. what: it, in other words."""
    try:
        with silenced(), hub(spec.name, file, download=FILES, revision=spec.revision):
            yield
    except UserError:
        raise
    except Exception as error:  # whatever files of others make the library say
        text = str(error)
        if "trust_remote_code" in text:
            raise UserError(
                f"'{spec.name}' would run code from its repository: not loaded",
                "read that code first; if you trust it, add --trust-remote-code",
            ) from None
        if "does not appear to have a file" in text and not Path(spec.name).is_dir():
            revision = f" --revision {spec.revision}" if spec.revision else ""
            raise UserError(
                f"'{spec.name}' has no {file}, or it is not on this machine yet",
                f"where there is a network: hf download {spec.name} {FILES}{revision}",
            ) from error
        why = first_line(error)
        if "ignore_mismatched_sizes" in why:
            why = "its tensors are of other sizes than its config.json says"
        what = what or f"{file} of '{spec.name}'"
        raise UserError(f"{what} cannot be read: {why}", tip) from error


def _beside(spec: ModelSpec, kind: Any, file: str, tip: str) -> Any:
    """What one of transformers' automatic classes makes of the files beside the weights."""
    for document in Path(spec.name).glob("*.json"):
        regular(document, "model file", tip, most=MOST_TOKENIZER)
    with reading(spec, file, tip=tip):
        return kind.from_pretrained(
            spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code, **in_gguf(spec)
        )


def in_gguf(spec: ModelSpec) -> dict[str, str]:
    """What `from_pretrained` is told of a folder that holds a model in GGUF; nothing of any other."""
    file = gguf_in(Path(spec.name))
    return {} if file is None else {"gguf_file": file}


def around(spec: ModelSpec, *files: str) -> ModelSpec:
    """Of an adapter alone the model that it names, where none of the files lies beside it; else the spec."""
    folder = Path(spec.name)
    base = adapted(folder)
    if base is None or any((folder / file).exists() for file in files):
        return spec
    return replace(spec, name=str(folder_named(base) or base), revision=None)


def load_config(spec: ModelSpec) -> transformers.PretrainedConfig:
    """The model's config with the arguments applied and the cache of generation switched off.

    `img_size` is left to the image processor and the forward pass of a model with a vision tower, `prompt`
    to the language tower of a vision-language model.
    """
    tip = "save the model again with model.save_pretrained(FOLDER)"
    whole = around(spec)
    folder = Path(whole.name)
    if folder.is_dir() and not in_gguf(whole):
        refuse_unreasonable(config_of(folder), f"'{folder / 'config.json'}'")
    config: transformers.PretrainedConfig = _beside(whole, transformers.AutoConfig, "config.json", tip)
    sees = hasattr(config, "vision_config") or hasattr(config, "image_size")
    asked = {IMAGE: sees, PROMPT: image_token(config) is not None}
    for key, value in spec.model_args.items():
        if asked.get(key, False):
            continue
        if not hasattr(config, key):
            raise unknown_argument(key, list(config.to_dict()), spec.base)
        if key == PATCH and value != config.patch_size and not spec.random_init:
            raise UserError(f"'{spec.base}' keeps its patch size", "timm: models take patch_size=")
        with reading(spec, "config.json", tip="leave the argument out"):
            setattr(config, key, value)
    for part in (config, getattr(config, "text_config", None), getattr(config, "encoder", None)):
        if isinstance(part, transformers.PretrainedConfig):
            part.use_cache = False
    return config


def check_weights(folder: Path) -> None:
    """Raises UserError for a folder without the weights that transformers looks for, or with part of them."""
    if gguf_in(folder) is not None:
        return
    found = next((name for name in WEIGHTS if (folder / name).exists()), None)
    if found is None:
        others = sorted(
            path.name for kind in ("safetensors", "bin", "pt", "pth") for path in folder.glob(f"*.{kind}")
        )
        raise UserError(
            f"folder '{folder}' has no {WEIGHTS[0]}" + (f", but {up_to_three(others)}" if others else ""),
            f"weights are called {one_of(WEIGHTS)}",
        )
    if not found.endswith(".json"):
        return
    file, tip = folder / found, "download the folder again, all of its files"
    stored = json_of(file, "index", tip=tip).get("weight_map")
    if not isinstance(stored, Mapping) or not all(isinstance(name, str) for name in stored.values()):
        raise UserError(f"'{file}' has no weight_map of tensors to files", tip)
    for name in dict.fromkeys(stored.values()):
        if Path(name).name != name:
            raise UserError(f"'{file}' names a file elsewhere, {name!r}: not read", "its files lie beside it")
        if not (folder / name).is_file():
            raise UserError(f"'{name}' is not there, which '{file}' names", tip)


def load_tokenizer(spec: ModelSpec) -> Any:
    """The tokenizer that lies beside the weights. Raises UserError if there is none."""
    spec = around(spec, "tokenizer.json", "tokenizer_config.json")
    tip = "save it there with tokenizer.save_pretrained(FOLDER)"
    if not Path(spec.name).is_dir():
        tip = f"where there is a network: hf download {spec.name} {FILES}"
    tokenizer = _beside(spec, transformers.AutoTokenizer, "tokenizer.json", tip)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"'{spec.name}' has no tokenizer", tip)
    return tokenizer


def is_causal(config: transformers.PretrainedConfig) -> bool:
    """Whether a text model reads from left to right: a language model that is not a masked one."""
    kind = type(config)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING


def load_image_processor(spec: ModelSpec) -> Any:
    """The image processor that lies beside the weights. Raises UserError if there is none."""
    spec = around(spec, *PROCESSORS)
    tip, folder = PROCESSOR_TIP, Path(spec.name)
    if folder.is_dir() and not any((folder / name).is_file() for name in PROCESSORS):
        raise UserError(f"folder '{folder}' has no {PROCESSORS[0]}", tip)
    return _beside(spec, transformers.AutoImageProcessor, "preprocessor_config.json", tip)


def load_video_processor(spec: ModelSpec, config: transformers.PretrainedConfig) -> Any:
    """What makes a clip of frames: the video or image processor that the model was saved with.

    One in place of the other may give other pixels: ViViT's two scale them differently.
    Raises UserError where neither is there.
    """
    folder = Path(spec.name)
    saved = (folder / VIDEO_PROCESSOR).is_file()
    if saved or not (folder.is_dir() or type(config) in IMAGE_PROCESSOR_MAPPING):
        return _beside(spec, transformers.AutoVideoProcessor, VIDEO_PROCESSOR, PROCESSOR_TIP)
    return load_image_processor(spec)


def load_processor(spec: ModelSpec) -> Any:
    """What makes one input of an image and a prompt. Raises UserError if there is none."""
    tip = "save it there with processor.save_pretrained(FOLDER)"
    return _beside(around(spec, *PROCESSORS), transformers.AutoProcessor, "processor_config.json", tip)

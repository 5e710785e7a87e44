"""Hugging Face models from a folder or the hub: text, vision, both towers of contrastive models, and the
vision tower and language model of vision-language models.

Only models whose attention goes through `scaled_dot_product_attention` are loaded; the others are
refused by name, because a model that computes softmax itself cannot be seen. `img_size=` makes the image
processor give that size, and the model interpolate its position embeddings if it has any.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
)

from diag.errors import UserError
from diag.models.base import Model, Tower
from diag.models.hf_head import load_language_head
from diag.models.hf_variants import restore_variants
from diag.models.hf_vision import packed_tower, vision_tower
from diag.models.hf_vlm import PROMPT, image_token, language_tower
from diag.models.hf_zero_shot import is_contrastive, zero_shot
from diag.models.loading import (
    first_line,
    frame,
    hub,
    layers_of,
    quiet,
    ready,
    text_encoder,
    text_facts,
    text_samples,
    unknown_argument,
    vocabulary_digest,
)
from diag.models.names import ModelSpec
from diag.models.sizes import IMAGE, PATCH
from diag.models.spread import SPREAD, entrance, placement, refuse_offloaded
from diag.variants import described
from diag.variants.in_transformers import HF_NAME

VISION_PARTS = ("vision_model", "visual", "vision_tower")
TEXT_PARTS = ("text_model", "language_model")
FILES = "--include '*.json' --include '*.safetensors' --include '*.txt' --include '*.model'"
HARMLESS_IF_MISSING = ("pooler", "head", "classifier", "position_ids", "mask_token", "logit_scale")
"""Weights that no attention layer reads: a checkpoint may lack them."""

UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    SafetensorError,
    pickle.UnpicklingError,
)

Build = Callable[[], Tower]


def load(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype) -> Model:
    """Loads `hf:FOLDER` or `hf:ORG/NAME[@REVISION]`. Raises UserError as `diag.models.load` does.

    A tower of several whose tokenizer or image processor is not at hand is left out with a note.
    """
    if spec.checkpoint is not None:
        raise UserError(
            f"--checkpoint does not go with '{spec.base}'",
            "put the weights into the folder beside config.json and give the folder: -m hf:FOLDER",
        )
    config = load_config(spec)
    spread = device == SPREAD
    module = _load_module(spec, config, dtype, placement() if spread else {})
    refuse_eager(spec, module)
    refuse_offloaded(module, spec.resolved)
    # not the format: rotary frequencies, and what a model keeps in float32, would be rounded with the rest
    ready(module, spec.resolved, device=None if spread else device, dtype=None)
    towers: dict[str, Tower] = {}
    notes = [spec.note] if spec.note else []
    refusals = []
    for kind, build in _builders(spec, module, notes, dtype=dtype).items():
        try:
            towers[kind] = build()
        except UserError as refusal:
            if kind == "vision" and IMAGE in spec.model_args:
                raise  # the size was asked for by name
            refusals.append(refusal)
            notes.append(f"no {kind} tower: {refusal}")
    if not towers:
        raise refusals[0]
    notes += described(module)
    facts = {"model_type": config.model_type, "commit": commit_of(spec)}
    scores = {"vision", "text"} <= towers.keys() and is_contrastive(module)
    classes = partial(_zero_shot, spec, module) if scores else None
    return Model(spec.given, spec.family, spec.resolved, module, towers, tuple(notes), facts, classes)


def _zero_shot(spec: ModelSpec, module: Any, names: Sequence[str]) -> Callable[[Tensor], Tensor]:
    return zero_shot(module, load_tokenizer(spec), names)


# --- loading


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
def reading(spec: ModelSpec, file: str, *, tip: str) -> Iterator[None]:
    """Turns what goes wrong while a file of a model is read into two lines."""
    try:
        with silenced(), hub(spec.name, file, download=FILES, revision=spec.revision):
            yield
    except UserError:
        raise
    except UNREADABLE as error:
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
        if "scaled_dot_product_attention" in text:
            raise _eager(spec, text.split(" ", 1)[0]) from None
        raise UserError(f"{file} of '{spec.name}' cannot be read: {first_line(error)}", tip) from error


def load_config(spec: ModelSpec) -> transformers.PretrainedConfig:
    """The model's config with the arguments applied and the cache of generation switched off.

    `img_size` is left to the image processor and the forward pass of a model with a vision tower, `prompt`
    to the language tower of a vision-language model.
    """
    with reading(spec, "config.json", tip="save the model again with model.save_pretrained(FOLDER)"):
        config = transformers.AutoConfig.from_pretrained(
            spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    sees = hasattr(config, "vision_config") or hasattr(config, "image_size")
    asked = {IMAGE: sees, PROMPT: image_token(config) is not None}
    for key, value in spec.model_args.items():
        if asked.get(key, False):
            continue
        if not hasattr(config, key):
            raise unknown_argument(key, list(config.to_dict()), spec.base)
        if key == PATCH and value != config.patch_size and not spec.random_init:
            raise UserError(f"'{spec.base}' keeps its patch size", "timm: models take patch_size=")
        setattr(config, key, value)
    for part in (config, getattr(config, "text_config", None), getattr(config, "encoder", None)):
        if isinstance(part, transformers.PretrainedConfig):
            part.use_cache = False
    return config


def commit_of(spec: ModelSpec) -> str | None:
    """The commit of the hub repository that was loaded; None for a folder."""
    if Path(spec.name).is_dir():
        return None
    file = try_to_load_from_cache(spec.name, "config.json", revision=spec.revision)
    return Path(file).parent.name if isinstance(file, str) else None


def load_tokenizer(spec: ModelSpec) -> Any:
    """The tokenizer that lies beside the weights. Raises UserError if there is none."""
    tip = "save it there with tokenizer.save_pretrained(FOLDER)"
    if not Path(spec.name).is_dir():
        tip = f"where there is a network: hf download {spec.name} {FILES}"
    with reading(spec, "tokenizer.json", tip=tip):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"'{spec.name}' has no tokenizer", tip)
    return tokenizer


def is_causal(config: transformers.PretrainedConfig) -> bool:
    """Whether a text model reads from left to right: a language model that is not a masked one."""
    kind = type(config)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING


def refuse_eager(spec: ModelSpec, module: nn.Module) -> None:
    """Raises UserError for a model, or a part of one, that ended up computing attention by itself."""
    for part in module.modules():
        config = getattr(part, "config", None)
        if not isinstance(config, transformers.PretrainedConfig):
            continue
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        if config._attn_implementation not in (None, "sdpa", HF_NAME) or capped:
            raise _eager(spec, type(part).__name__)


def _eager(spec: ModelSpec, architecture: str) -> UserError:
    return UserError(
        f"'{spec.resolved}' ({architecture}) computes softmax attention itself: its calls cannot be seen",
        f"transformer-lens may show it, at short lengths: -m tl:{spec.name}",
    )


def _load_module(
    spec: ModelSpec, config: transformers.PretrainedConfig, dtype: torch.dtype, placing: Mapping[str, Any]
) -> nn.Module:
    """placing: what `from_pretrained` is told of devices; nothing for the CPU."""
    encoder_only = config.is_encoder_decoder and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    auto = transformers.AutoModelForTextEncoding if encoder_only else transformers.AutoModel
    tip = "check the folder, or download it again: the weights must be those of its config.json"
    with reading(spec, "model.safetensors", tip=tip):
        if spec.random_init:
            if placing:
                raise UserError("--device spread does not go with --random-init", "give a model with weights")
            return auto.from_config(
                config, attn_implementation="sdpa", dtype=dtype, trust_remote_code=spec.trust_remote_code
            )
        module, report = auto.from_pretrained(
            spec.name,
            config=config,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            attn_implementation="sdpa",
            dtype=dtype,
            output_loading_info=True,
            **placing,
        )
    missing = sorted(k for k in report["missing_keys"] if not any(part in k for part in HARMLESS_IF_MISSING))
    if missing:
        names = ", ".join(f"'{name}'" for name in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"the weights of '{spec.name}' lack {names}{more}: they would be random", tip)
    restore_variants(module, Path(spec.name))
    return module


# --- towers


def _builders(spec: ModelSpec, module: Any, notes: list[str], *, dtype: torch.dtype) -> dict[str, Build]:
    """How to build each tower that a model has; a tower adds to `notes` what was done to its sizes."""
    config = module.config
    vision = next((part for part in VISION_PARTS if hasattr(module, part)), None)
    text = next((part for part in TEXT_PARTS if hasattr(module, part)), None)
    builders: dict[str, Build] = {}

    def see(part: Any, prefix: str) -> Tower:
        packed = hasattr(part.config, "spatial_merge_size")
        build = packed_tower if packed else vision_tower
        processor = load_image_processor(spec)
        return build(spec, part, prefix, processor, notes, device=entrance(part), dtype=dtype)

    if vision:
        builders["vision"] = lambda: see(getattr(module, vision), f"{vision}.")
    if text:
        inner = getattr(module, text)
        causal = text == "language_model" or is_causal(inner.config)
        builders["text"] = lambda: text_tower(spec, inner, f"{text}.", causal=causal)
    if vision and text and (token := image_token(config)) is not None:
        builders["language"] = lambda: language_tower(
            spec, module, f"{text}.", load_processor(spec), token, device=entrance(module), dtype=dtype
        )
    if builders:
        return builders
    if module.main_input_name == "pixel_values":
        return {"vision": lambda: see(module, "")}
    if module.main_input_name == "input_ids":
        encoder = module.get_encoder() if config.is_encoder_decoder else module
        prefix = next((f"{path}." for path, child in module.named_modules() if child is encoder and path), "")
        causal = is_causal(config)
        device = entrance(module)
        head = partial(load_language_head, spec, module, device=device, dtype=dtype) if causal else None
        return {"text": lambda: text_tower(spec, encoder, prefix, causal=causal, head=head)}
    raise UserError(
        f"'{spec.resolved}' takes '{module.main_input_name}', neither images nor text",
        "attnbias measures text and vision models",
    )


def text_tower(
    spec: ModelSpec,
    module: nn.Module,
    prefix: str,
    *,
    causal: bool,
    head: Callable[[], nn.Module] | None = None,
) -> Tower:
    """The tower of a text stack: windows of its tokenizer's tokens.

    A causal model gets bare text (a BOS in front would be the same sink in every window); one that
    reads both ways, and the text tower of a contrastive model, get their special tokens.
    """
    tokenizer = load_tokenizer(spec)
    before, after = ([], []) if causal else frame(tokenizer)
    context = context_of(module, tokenizer)
    return Tower(
        name="text",
        layers=layers_of(module, spec.resolved, "text", prefix=prefix),
        samples=text_samples(tokens_of(tokenizer), context=context, before=before, after=after),
        encode=text_encoder(entrance(module)),
        forward=lambda batch: module(input_ids=batch.data),
        decode=tokenizer.decode,
        language_head=head,
        facts={**text_facts(context, before, after), "tokenizer": vocabulary_digest(tokenizer)},
    )


def tokens_of(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text -> token ids without special tokens, and without a warning about its length."""
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def context_of(module: nn.Module, tokenizer: Any) -> int | None:
    """The most tokens that a text model takes; None for no limit.

    Models that count positions from behind the padding index (RoBERTa) lose that many of them.
    """
    context = getattr(module.config, "max_position_embeddings", None)
    if context is None:
        limit = tokenizer.model_max_length
        return limit if limit < 1_000_000 else None
    for path, child in module.named_modules():
        if path.endswith("position_embeddings") and getattr(child, "padding_idx", None) is not None:
            return child.num_embeddings - child.padding_idx - 1
    return context


def load_image_processor(spec: ModelSpec) -> Any:
    """The image processor that lies beside the weights. Raises UserError if there is none."""
    tip = "save it there with image_processor.save_pretrained(FOLDER)"
    with reading(spec, "preprocessor_config.json", tip=tip):
        return transformers.AutoImageProcessor.from_pretrained(
            spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )


def load_processor(spec: ModelSpec) -> Any:
    """What makes one input of an image and a prompt. Raises UserError if there is none."""
    tip = "save it there with processor.save_pretrained(FOLDER)"
    with reading(spec, "processor_config.json", tip=tip):
        return transformers.AutoProcessor.from_pretrained(
            spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )

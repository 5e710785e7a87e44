"""Hugging Face models from a folder or the hub: text, vision, both towers of contrastive models, and the
vision tower and language model of vision-language models.

Attention goes through `scaled_dot_product_attention` where a model can do that. `img_size=` makes the image
processor give that size, and the model interpolate its position embeddings if it has any.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

from diag.errors import UserError
from diag.models.base import Batch, Model, Tower, device_of_module, taken_beside_ids
from diag.models.checkpoint import checked_variants, read_checkpoint
from diag.models.encoding import frame, text_encoder, text_facts, text_samples, token_text, vocabulary_digest
from diag.models.families.hf import commit_of
from diag.models.families.hf.device_map import placement, refuse_offloaded
from diag.models.families.hf.files import (
    around,
    check_weights,
    in_gguf,
    is_causal,
    load_config,
    load_image_processor,
    load_processor,
    load_tokenizer,
    load_video_processor,
    reading,
)
from diag.models.families.hf.formats import quantisation
from diag.models.families.hf.head import load_language_head
from diag.models.families.hf.video import PIXELS, clip_tower, frames_of
from diag.models.families.hf.vision import config_around, seen
from diag.models.families.hf.vlm import image_token, language_tower
from diag.models.families.hf.zero_shot import is_contrastive, zero_shot
from diag.models.family import SPREAD
from diag.models.hooks.layers import Layer
from diag.models.loading import build_towers, layers_of, ready, theirs
from diag.models.names.spec import ModelSpec
from diag.models.sizes import IMAGE, refuse_too_large
from diag.models.weights import fit, up_to_three
from diag.variants import METADATA, described, restore

VISION_PARTS = ("vision_model", "visual", "vision_tower", "vision_encoder")
TEXT_PARTS = ("text_model", "language_model", "text_encoder")
HARMLESS_IF_MISSING = ("pooler", "head", "classifier", "position_ids", "mask_token", "logit_scale")
"""Weights that no attention layer reads: a checkpoint may lack them."""

TOKENIZER_TIP = "save the one that belongs to the model: tokenizer.save_pretrained(FOLDER)"

WEIGHTS_TIP = "check the folder, or download it again: the weights must be those of its config.json"

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
    module, lacks = _load_module(spec, config, dtype, placement() if spread else {})
    refuse_offloaded(module, spec.resolved)
    # not the format: rotary frequencies, and what a model keeps in float32, would be rounded with the rest
    ready(module, spec.resolved, device=None if spread else device, dtype=None)
    notes: list[str] = []
    sized = "vision" if IMAGE in spec.model_args else None  # the size was asked for by name
    fed = Feeding.of_files(spec, config)
    towers = build_towers(builders_of(spec, module, lacks, fed, notes, dtype=dtype), notes, needed=sized)
    notes += described(module)
    facts = {"model_type": config.model_type, "commit": commit_of(spec)}
    if not spec.random_init and (Path(spec.name) / "adapter_config.json").is_file():
        loaded = transformers.utils.is_peft_available()
        facts["weights"] = "with adapter" if loaded else "without adapter"
        notes.append(
            f"the adapter in the folder was {'loaded' if loaded else 'not loaded: peft is not installed'}"
        )
    scores = {"vision", "text"} <= towers.keys() and is_contrastive(module) and not lacks.names
    classes = (lambda names: zero_shot(module, load_tokenizer(spec), names)) if scores else None
    return Model(spec.given, spec.family, spec.resolved, module, towers, tuple(notes), facts, classes)


# --- loading


@dataclass(frozen=True)
class Lacking:
    """Weights that a model's files lack, by name; they are zeros. source: the model."""

    source: str
    names: tuple[str, ...] = ()

    def refuse(self, prefix: str) -> None:
        """Raises UserError where some of them are below a part, or anywhere for an empty prefix."""
        missing = [name for name in self.names if name.startswith(prefix)]
        if missing:
            names = up_to_three([f"'{name}'" for name in missing])
            raise UserError(f"the weights of '{self.source}' lack {names}: they would be random", WEIGHTS_TIP)


def _load_module(
    spec: ModelSpec, config: transformers.PretrainedConfig, dtype: torch.dtype, placing: Mapping[str, Any]
) -> tuple[nn.Module, Lacking]:
    """placing: what `from_pretrained` is told of devices; nothing for the CPU."""
    auto: Any = transformers.AutoModelForTextEncoding if _is_encoder(config) else transformers.AutoModel
    method = quantisation(config)
    if method == "torchao" and is_causal(
        config
    ):  # its weights are known by the names that they were saved with
        auto = transformers.AutoModelForCausalLM
    if spec.random_init and placing:
        raise UserError("--device spread does not go with --random-init", "give a model with weights")
    if not spec.random_init and Path(around(spec).name).is_dir():
        check_weights(Path(around(spec).name))
    file = "config.json" if spec.random_init else in_gguf(spec).get("gguf_file", "model.safetensors")
    what, tip = "", WEIGHTS_TIP
    if method is not None:
        what = f"'{spec.name}', quantised with {method},"
        tip = "install what that names, or give the model that it was made from, not quantised"
    with reading(spec, file, tip=tip, what=what):
        how = {"trust_remote_code": spec.trust_remote_code, "dtype": dtype}
        if spec.random_init:
            with torch.device("meta"):
                refuse_too_large(auto.from_config(deepcopy(config)), spec.resolved)
            return _through_sdpa(auto.from_config, config, **how), Lacking(spec.name)
        load_it = partial(auto.from_pretrained, spec.name, revision=spec.revision, output_loading_info=True)
        module, report = _through_sdpa(
            lambda own, **more: load_it(config=own, **more), config, **how, **placing, **in_gguf(spec)
        )
        module = module.base_model if auto is transformers.AutoModelForCausalLM else module
    missing = sorted(k for k in report["missing_keys"] if not any(part in k for part in HARMLESS_IF_MISSING))
    for name in missing:  # which values they got is chance
        module.state_dict()[name].zero_()
    _restore_variants(module, Path(spec.name))
    return module, Lacking(spec.name, tuple(missing))


def _is_encoder(config: transformers.PretrainedConfig) -> bool:
    """Whether a model is loaded as its encoder alone, which may be all that its folder has weights of.

    A T5 that was saved as an encoder says that it is no encoder-decoder; T5Gemma's encoder takes no other.
    """
    encoder: Any = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    if encoder is None:
        return False
    if not config.is_encoder_decoder:
        return encoder.__name__.endswith("EncoderModel")
    with torch.device("meta"):
        try:
            encoder(deepcopy(config))
        except ValueError:
            return False
    return True


def _through_sdpa(build: Callable[..., Any], config: transformers.PretrainedConfig, **arguments: Any) -> Any:
    """What `build` makes of a config with SDPA, or else with SDPA in those parts that do not refuse it.

    Scores that are capped are what SDPA leaves out without a word: such a model computes attention itself.
    """
    if _caps_scores(config.to_dict()):
        return build(config, attn_implementation="eager", **arguments)
    try:
        return build(deepcopy(config), attn_implementation="sdpa", **arguments)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
    return build(config, **arguments)


def _caps_scores(settings: Mapping[str, Any]) -> bool:
    """Whether a config, or one within it, caps the scores of attention."""
    inner = (value for value in settings.values() if isinstance(value, Mapping))
    return settings.get("attn_logit_softcapping") is not None or any(map(_caps_scores, inner))


def _restore_variants(module: Any, folder: Path) -> None:
    """Makes a model that was loaded from a folder what it was when it was saved.

    Its config says which module's attention was changed in training; transformers itself loads the unchanged
    model, and leaves out what a change has learned.
    Raises UserError where weights of a change are missing.
    """
    kinds, file = getattr(module.config, METADATA, None), folder / "model.safetensors"
    if not kinds:
        return
    kinds = checked_variants(kinds, f"'{folder / 'config.json'}'")
    prefix = f"{module.base_model_prefix}."  # the folder may hold the model with its head
    restore(module, {path.removeprefix(prefix): kind for path, kind in kinds.items()})
    stored = {name.removeprefix(prefix): tensor for name, tensor in read_checkpoint(file).tensors.items()}
    for path in kinds:
        within = f"{path.removeprefix(prefix)}.change."
        own = {name.removeprefix(within): t for name, t in stored.items() if name.startswith(within)}
        fit(module.get_submodule(within[:-1]), own, f"'{file}'")


# --- towers


@dataclass(frozen=True)
class Feeding:
    """How to get what makes inputs of texts and images, where a tower needs it. Each raises UserError."""

    tokenizer: Callable[[], Any]
    image_processor: Callable[[], Any]
    video_processor: Callable[[], Any]
    processor: Callable[[], Any]

    @staticmethod
    def of_files(spec: ModelSpec, config: transformers.PretrainedConfig) -> Feeding:
        """What was saved with a model."""
        return Feeding(
            partial(load_tokenizer, spec),
            partial(load_image_processor, spec),
            partial(load_video_processor, spec, config),
            partial(load_processor, spec),
        )


def builders_of(
    spec: ModelSpec, module: Any, lacks: Lacking, fed: Feeding, notes: list[str], *, dtype: torch.dtype
) -> dict[str, Build]:
    """How to build each tower that a model has; a tower adds to `notes` what was done to its sizes.

    Of weights that are not there each tower minds its own, and a language model all of them.
    """
    config = module.config
    # a part may be None: of Gemma 4 without images, for one
    vision = next((part for part in VISION_PARTS if isinstance(getattr(module, part, None), nn.Module)), None)
    text = next((part for part in TEXT_PARTS if isinstance(getattr(module, part, None), nn.Module)), None)
    builders: dict[str, Build] = {}

    def see(part: Any, prefix: str) -> Tower:
        layers = layers_of(part, spec.resolved, "vision", prefix=prefix)
        # DETR's decoder attends among the objects that it looks for, V-JEPA's predictor among hidden places
        beside = (f"{prefix}decoder.", f"{prefix}predictor.")
        ahead = tuple(layer for layer in layers if not layer.path.startswith(beside))
        layers = ahead if hasattr(part, "encoder") else layers
        if frames_of(config_around(part, module)) is not None:
            return clip_tower(spec, module, part, layers, fed.video_processor(), dtype)
        return seen(spec, module, part, layers, fed.image_processor(), notes, dtype)

    def read(part: Any, prefix: str, causal: bool, head: Callable[[], nn.Module] | None = None) -> Tower:
        layers = layers_of(part, spec.resolved, "text", prefix=prefix)
        tokenizer = fed.tokenizer()
        return text_tower(part, tokenizer, layers, source=spec.name, causal=causal, head=head)

    def answer(token: int) -> Tower:
        return language_tower(spec, module, f"{text}.", fed.processor(), token, dtype)

    def whole(build: Build, prefix: str = "") -> Build:
        def checked() -> Tower:
            lacks.refuse(prefix)
            return build()

        return checked

    if vision:
        builders["vision"] = whole(lambda: see(getattr(module, vision), f"{vision}."), f"{vision}.")
    if text:
        inner = getattr(module, text)
        causal = text == "language_model" or is_causal(config_around(inner, module))
        builders["text"] = whole(lambda: read(inner, f"{text}.", causal), f"{text}.")
    if vision and text and (token := image_token(config)) is not None:
        builders["language"] = whole(lambda: answer(token))
    if builders:
        return builders
    takes = inspect.signature(module.forward).parameters
    if "input_ids" not in takes and not {*PIXELS, "grid_thw"}.isdisjoint(takes):
        return {"vision": whole(lambda: see(module, ""))}
    if module.main_input_name == "pixel_values":
        return {"vision": whole(lambda: see(module, ""))}
    if module.main_input_name == "input_ids" in takes:
        encoder = module.get_encoder() if config.is_encoder_decoder else module
        prefix = next((f"{path}." for path, child in module.named_modules() if child is encoder and path), "")
        causal = is_causal(config)
        head = partial(load_language_head, spec, module, dtype=dtype) if causal else None
        return {"text": whole(lambda: read(encoder, prefix, causal, head))}
    first = module.main_input_name if module.main_input_name in takes else next(iter(takes), "nothing")
    raise UserError(
        f"'{spec.resolved}' takes '{first}', neither images nor text",
        "attnbias measures text and vision models",
    )


def text_tower(
    module: nn.Module,
    tokenizer: Any,
    layers: tuple[Layer, ...],
    *,
    source: str,
    causal: bool,
    window: int | None = None,
    head: Callable[[], nn.Module] | None = None,
) -> Tower:
    """The tower of a text stack: windows of its tokenizer's tokens.

    A causal model gets bare text (a BOS in front would be the same sink in every window); one that
    reads both ways, and the text tower of a contrastive model, get their special tokens.
    source: the model's name, for errors. window: the most tokens, where that is less than the model takes.
    """
    with theirs(f"the tokenizer of '{source}' cannot be used", TOKENIZER_TIP):
        before, after = ([], []) if causal else frame(tokenizer)
        vocabulary = vocabulary_digest(tokenizer)
    context = _context_of(module, tokenizer)
    narrow = window is not None and window < (context or window + 1)

    def tokens_of(text: str) -> list[int]:
        with theirs(f"the tokenizer of '{source}' cannot be used", TOKENIZER_TIP):
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    return Tower(
        name="text",
        layers=layers,
        samples=text_samples(
            tokens_of,
            context=window if narrow else context,
            limit="sliding window" if narrow else "context",
            before=before,
            after=after,
        ),
        encode=text_encoder(device_of_module(module)),
        forward=partial(_run, module),
        also=taken_beside_ids(module),
        decode=tokenizer.decode,
        token_text=token_text(tokenizer),
        language_head=head,
        facts={**text_facts(context, before, after), "tokenizer": vocabulary},
    )


def _run(module: nn.Module, batch: Batch) -> Any:
    """A text model on its ids alone, or on ids, mask and positions by name."""
    return module(**batch.data) if isinstance(batch.data, Mapping) else module(input_ids=batch.data)


def _context_of(module: nn.Module, tokenizer: Any) -> int | None:
    """The most tokens that a text model takes; None for no limit.

    Models that count positions from behind the padding index (RoBERTa) lose that many of them.
    """
    config = getattr(module, "config", None)  # FSMT's encoder has none
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        limit = tokenizer.model_max_length
        return limit if isinstance(limit, int) and limit < 1_000_000 else None
    for path, child in module.named_modules():
        if path.endswith("position_embeddings") and getattr(child, "padding_idx", None) is not None:
            return len(child.weight) - child.padding_idx - 1
    return context if context > 0 else None  # XLNet says -1

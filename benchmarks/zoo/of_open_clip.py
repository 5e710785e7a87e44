"""open_clip's architectures, small: one for each kind of vision and text tower."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from timm.models import _registry

from zoo import of_transformers
from zoo.case import Case, NotBuiltError, lively
from zoo.inputs import save_tokenizer
from zoo.of_timm import SIZE


def names() -> list[str]:
    """Every architecture whose config is of another kind than those before it, sizes and tokenizers aside."""
    kinds: dict[str, str] = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        kinds.setdefault(json.dumps(_kind(config), sort_keys=True), name)
    return sorted(kinds.values())


ASIDE = [
    "layers",
    "width",
    "heads",
    "head_width",
    "patch_size",
    "image_size",
    "embed_dim",
    "context_length",
    "vocab_size",
    "mlp_ratio",
    "size",
    "timm_drop",
    "init_logit_bias",
    "init_logit_scale",
    "hf_tokenizer_name",
    "tokenizer_kwargs",
    "bos_id",
    "eos_id",
    "image_mean",
    "image_std",
]


def _kind(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _kind(value) for key, value in config.items() if key not in ASIDE}
    if isinstance(config, str) and "_" in config:  # a model of timm
        return "_".join(word for word in config.split("_") if not SIZE.match(word))
    return config


def small(name: str, texts: Path) -> dict[str, Any]:
    """A model's config with small sizes; towers of timm keep theirs, at the smallest image they take.

    texts: where a text tower of transformers is written.
    """
    config = copy.deepcopy(open_clip.get_model_config(name))
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" not in vision:
        if isinstance(vision.get("layers"), list):
            vision |= {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}
        else:
            vision |= {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
            vision |= {"attn_pooler_heads": 4} if vision.get("attentional_pool") else {}
    text.pop("tokenizer_kwargs", None)
    if "hf_model_name" in text:
        folder = _text_model(text["hf_model_name"], texts)
        text |= {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_model_pretrained": False}
    else:
        text.pop("hf_tokenizer_name", None)
        text |= {"width": 32, "heads": 4, "layers": 2, "vocab_size": 49408}
        text |= {"context_length": 16}
    config["embed_dim"] = (
        32 if "timm_model_name" not in vision or "proj" in str(vision) else config["embed_dim"]
    )
    if "multimodal_cfg" in config:
        vision |= {"width": 32, "head_width": 8}
        config["multimodal_cfg"] |= {"width": 32, "heads": 4, "layers": 2, "attn_pooler_heads": 4}
        config["multimodal_cfg"] |= {"context_length": 16, "vocab_size": 49408}
    return config


def _text_model(name: str, folder: Path) -> Path:
    """The configuration and tokenizer of a small text model of the kind that a name of the hub stands for."""
    kinds = {"xlm-roberta": "xlm-roberta", "roberta": "roberta", "mt5": "mt5", "nllb": "m2m_100"}
    kind = next((model_type for word, model_type in kinds.items() if word in name.lower()), None)
    if kind is None:
        raise NotBuiltError(f"its text tower is a model of the hub, {name}")
    of_transformers.config_of(kind).save_pretrained(folder)
    for place in (folder, folder.parent):  # open_clip looks for tokenizers beside its own config
        save_tokenizer(place, around=True)
    return folder


def build(name: str, folder: Path | None) -> Case:
    """One of them: its image and text towers run as a module, and apart by name. Raises NotBuiltError."""
    with tempfile.TemporaryDirectory() as scratch:
        return _built(name, folder or Path(scratch), folder is not None)


ENTRIES = dict(_registry._model_entrypoints)


def _shrink(name: str, side: int) -> None:
    """Has timm build a small model under a name, in this process: open_clip hands it no sizes."""
    entry = ENTRIES[name]

    def small(pretrained: bool = False, **options: Any) -> torch.nn.Module:
        for sizes in (SIZES | {"img_size": side}, {"depth": 2, "img_size": side}, {"img_size": side}):
            try:
                return entry(pretrained=pretrained, **options, **sizes)
            except (TypeError, ValueError, RuntimeError, AssertionError):
                continue
        return entry(pretrained=pretrained, **options)

    _registry._model_entrypoints[name] = small


SIZES = {"depth": 2, "embed_dim": 96, "num_heads": 3}


def _built(name: str, folder: Path, by_name: bool) -> Case:
    texts = Path(tempfile.mkdtemp(dir=folder))
    config = small(name, texts)
    vision, why = config["vision_cfg"], ""
    timm = "timm_model_name" in vision
    for side in dict.fromkeys(
        (64, 96, 128, 224, vision.get("image_size", 224)) if timm else (vision["image_size"],)
    ):
        vision["image_size"] = side
        preprocess = {"size": side, "mean": [0.5] * 3, "std": [0.5] * 3}
        document = {"model_cfg": config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(document))
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        if timm:
            _shrink(vision["timm_model_name"], side)
        try:
            module = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
            context = min(getattr(module, "context_length", None) or 16, 16)
            ids = torch.randint(5, 250, (2, context), generator=generator)
            batch = {"image": torch.randn(2, 3, side, side, generator=generator), "text": ids}
            lively(module).requires_grad_(False)
            with torch.no_grad():
                module(**batch)
        except Exception as error:  # a library may say anything of a size that it does not take
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        case = Case("open_clip", name, module, batch)
        if by_name:
            try:
                open_clip.get_tokenizer(f"local-dir:{folder}")
            except Exception as error:
                raise NotBuiltError(f"no tokenizer can be made for it: {type(error).__name__}") from error
            state = {key: value.clone().contiguous() for key, value in module.state_dict().items()}
            save_file(state, folder / "open_clip_model.safetensors")
            case.folder = folder
        return case
    raise NotBuiltError(why)

"""Tiny checkpoints in the formats that people have: written once per session, random weights, seeded."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = "the cat sat on the mat and the dog ran after the cat over the hill . " * 12
TEXT_SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
VISION_SIZES = TEXT_SIZES | {"image_size": 32, "patch_size": 8}
VOCABULARY = 300


def save_tokenizer(folder: Path, *, special: tuple[str, str] | None = None) -> None:
    """A byte-level BPE tokenizer; `special` are the tokens that its template puts around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if special:
        pairs = [(token, tokenizer.token_to_id(token)) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A {special[1]}", special_tokens=pairs
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


def save_language_model(folder: Path, kind: str) -> Path:
    """A causal or bidirectional text model with its tokenizer in a Hugging Face folder."""
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = TEXT_SIZES | tokens | {"max_position_embeddings": 64}
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens))
    elif kind == "neox":
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**text))
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, num_key_value_heads=2))
    elif kind == "qwen3":
        config = transformers.Qwen3Config(**text, num_key_value_heads=2, head_dim=8)
        model = transformers.Qwen3ForCausalLM(config)
    elif kind == "qwen3-next":  # the second of three blocks has softmax attention
        linear = dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "head_dim"), 8)
        linear |= {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "num_experts": 1}
        kinds = ["linear_attention", "full_attention", "linear_attention"]
        sizes = text | linear | {"num_key_value_heads": 2, "num_hidden_layers": 3, "layer_types": kinds}
        config = transformers.Qwen3NextConfig(**sizes, mlp_only_layers=[0, 1, 2])
        model = transformers.Qwen3NextForCausalLM(config)
    elif kind == "lfm2":  # the second of three blocks has attention, the others short convolutions
        kinds = ["conv", "full_attention", "conv"]
        sizes = text | {"num_key_value_heads": 2, "num_hidden_layers": 3, "layer_types": kinds}
        model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**sizes))
    elif kind in ("mamba", "rwkv"):
        sizes = tokens | {"hidden_size": 32, "num_hidden_layers": 2}
        config = {"mamba": transformers.MambaConfig, "rwkv": transformers.RwkvConfig}[kind](**sizes)
        model = transformers.AutoModelForCausalLM.from_config(config)
    elif kind == "gemma2":  # large weights: the cap on scores of this size is far from a line
        sizes = text | {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
        config = transformers.Gemma2Config(**sizes, attn_logit_softcapping=0.5, initializer_range=0.4)
        model = transformers.Gemma2ForCausalLM(config)
    elif kind == "gpt-oss":
        sizes = text | {"num_key_value_heads": 2, "head_dim": 8}
        config = transformers.GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1)
        model = transformers.GptOssForCausalLM(config)
    elif kind == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**text))
    elif kind == "t5":
        sizes = {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64}
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, **tokens, decoder_start_token_id=1)
        )
    else:
        raise KeyError(kind)
    _unlike_constants(model)
    model.save_pretrained(folder)
    save_tokenizer(folder, special=("<s>", "</s>") if kind in ("bert", "t5") else None)
    return folder


def _unlike_constants(model: torch.nn.Module) -> None:
    """Biases and norms start at constants, which would hide a route that loses them."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.2)


def save_vision_model(folder: Path, kind: str) -> Path:
    """A vision or image-text model with its image processor (and tokenizer) in a Hugging Face folder."""
    torch.manual_seed(0)
    side = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    text = TEXT_SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 24}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    processor = transformers.ViTImageProcessor(**side)
    if kind == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(**VISION_SIZES))
    elif kind == "dinov2":
        model = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**VISION_SIZES, num_register_tokens=2)
        )
    elif kind == "dinov3":
        model = transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(**VISION_SIZES, num_register_tokens=2)
        )
    elif kind == "clip":
        model = transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=VISION_SIZES, text_config=text, projection_dim=16)
        )
        processor = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        save_tokenizer(folder, special=("<s>", "</s>"))
    elif kind == "siglip":
        model = transformers.SiglipModel(
            transformers.SiglipConfig(vision_config=VISION_SIZES, text_config=text)
        )
        processor = transformers.SiglipImageProcessor(**side)
        save_tokenizer(folder, special=("<s>", "</s>"))
    elif kind == "qwen2_5_vl":
        vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "patch_size": 14}
        vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56}
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        language = text | {"num_key_value_heads": 2, "rope_parameters": rope}
        model = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=language)
        )
        processor = transformers.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=140 * 140)
        save_tokenizer(folder)
    else:
        raise KeyError(kind)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


IMAGE_WORDS = ("<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def save_vision_language_model(folder: Path, kind: str) -> Path:
    """A LLaVA or Qwen2.5-VL with its whole processor in a Hugging Face folder."""
    torch.manual_seed(0)
    save_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(IMAGE_WORDS)})
    ids = dict(zip(IMAGE_WORDS, tokenizer.convert_tokens_to_ids(list(IMAGE_WORDS)), strict=True))
    text = TEXT_SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "num_key_value_heads": 2}
    text |= {"initializer_range": 0.3}  # small weights make all tokens alike
    if kind == "llava":
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(**VISION_SIZES),
                text_config=transformers.LlamaConfig(**text),
                image_token_id=ids["<image>"],
            )
        )
        processor = transformers.LlavaProcessor(
            transformers.CLIPImageProcessor(
                size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
            ),
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    elif kind == "qwen2_5_vl_whole":
        vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "patch_size": 14}
        vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56}
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        config = transformers.Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text | {"rope_parameters": rope},
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
        sides = {"min_pixels": 56 * 56, "max_pixels": 140 * 140}
        processor = transformers.Qwen2_5_VLProcessor(
            transformers.Qwen2VLImageProcessor(**sides),
            tokenizer,
            transformers.Qwen2VLVideoProcessor(**sides),
            chat_template=(
                "{% for message in messages %}{% for part in message['content'] %}"
                "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
                "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} answer :"
            ),
        )
    else:
        raise KeyError(kind)
    _unlike_constants(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_timm(folder: Path, name: str, **arguments: object) -> Path:
    """A timm model's weights as safetensors."""
    import timm

    torch.manual_seed(0)
    file = folder / "weights.safetensors"
    save_file(timm.create_model(name, **arguments).state_dict(), file)
    return file


OPEN_CLIP_SIZES = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def save_open_clip(folder: Path) -> Path:
    """An open_clip training checkpoint: a state dict with the prefix of parallel training, and more."""
    import open_clip

    torch.manual_seed(0)
    module = open_clip.CLIP(**OPEN_CLIP_SIZES)
    state = {f"module.{name}": value for name, value in module.state_dict().items()}
    file = folder / "epoch_1.pt"
    torch.save({"epoch": 1, "name": "tiny", "state_dict": state, "optimizer": {"state": {}}}, file)
    return file


LATENTS = {"in_channels": 4, "sample_size": 8, "patch_size": 2}
DIFFUSION = {
    # of Stable Diffusion 3.5: its first block attends once more, over the image alone
    "sd3": (
        "SD3Transformer2DModel",
        LATENTS
        | {"num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32}
        | {"caption_projection_dim": 16, "pooled_projection_dim": 16, "out_channels": 4}
        | {"pos_embed_max_size": 8, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    ),
    "flux": (
        "FluxTransformer2DModel",
        {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
        | {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16}
        | {"axes_dims_rope": (4, 6, 6), "guidance_embeds": True},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        LATENTS
        | {"num_attention_heads": 2, "attention_head_dim": 8, "out_channels": 8, "num_layers": 2}
        | {"cross_attention_dim": 16, "caption_channels": 32},
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
        }
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
        | {"caption_channels": 32, "sample_size": 2},
    ),
}
"""Kind -> class of diffusers and its sizes."""


def save_diffusion_model(folder: Path, kind: str) -> Path:
    """A diffusion transformer alone, in a folder of diffusers."""
    import diffusers

    name, sizes = DIFFUSION[kind]
    torch.manual_seed(0)
    getattr(diffusers, name)(**sizes).save_pretrained(folder)
    return folder


def save_pipeline(folder: Path, kind: str) -> Path:
    """A pipeline of diffusers, "sd3", "flux" or "pixart": its VAE halves sides, and it has text encoders."""
    import diffusers

    name, sizes = DIFFUSION[kind]
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = {"block_out_channels": [8, 8], "latent_channels": 4, "norm_num_groups": 4, "shift_factor": 0.1}
    text = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    pooled = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 77}

    def pooling(kind: type, width: int) -> transformers.PreTrainedModel:
        size = TEXT_SIZES | pooled | {"hidden_size": width, "projection_dim": width}
        return kind(transformers.CLIPTextConfig(**size))

    save_tokenizer(folder / "words", special=("<s>", "</s>"))
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "words")
    reader = transformers.T5EncoderModel(transformers.T5Config(**text))
    module = getattr(diffusers, name)(**sizes)
    parts = {"transformer": module, "vae": diffusers.AutoencoderKL(**blocks, **vae), "tokenizer": tokenizer}
    if kind == "pixart":
        parts |= {"scheduler": diffusers.DDPMScheduler(), "text_encoder": reader}
        diffusers.PixArtSigmaPipeline(**parts).save_pretrained(folder)
        return folder
    tokenizer.model_max_length = 77
    parts |= {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "tokenizer_2": tokenizer}
    if kind == "flux":
        parts |= {"text_encoder": pooling(transformers.CLIPTextModel, 16), "text_encoder_2": reader}
        diffusers.FluxPipeline(**parts).save_pretrained(folder)
    else:
        halves = (pooling(transformers.CLIPTextModelWithProjection, 8) for _ in range(2))
        parts |= dict(zip(("text_encoder", "text_encoder_2"), halves, strict=True))
        parts |= {"text_encoder_3": reader, "tokenizer_3": tokenizer}
        diffusers.StableDiffusion3Pipeline(**parts).save_pretrained(folder)
    return folder

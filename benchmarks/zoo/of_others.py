"""Models of other libraries, small: their packages are no dependencies of the project.

They are found in the folder that `coverage.py --site` names, into which pip has put them without what they
depend on; docs/coverage.md has the command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.case import Case, NotBuiltError, lively

SITE = "ATTNBIAS_ZOO_SITE"
"""The environment variable in which the program hands the folder to its workers."""
PACKAGES = (
    "vit-pytorch",
    "x-transformers",
    "segment-anything",
    "timesformer-pytorch",
    "performer-pytorch",
    "local-attention",
    "linformer",
    "nystrom-attention",
    "perceiver-pytorch",
    "linear-attention-transformer",
    "axial-attention",
    "memory-efficient-attention-pytorch",
    "kornia",
    "monai",
    "swin-transformer-pytorch",
    "conformer",
    # what these import
    "einops",
    "einx",
    "loguru",
    "hyper-connections",
    "axial-positional-embedding",
    "product-key-memory",
    "frozendict",
    "kornia-rs",
    "torch-einops-utils",
)


def image(side: int = 64, *, channels: int = 3) -> Callable[[], Tensor]:
    """Two images."""
    return lambda: torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> Callable[[], Tensor]:
    """Numbers of a shape."""
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ids(length: int = 16) -> Callable[[], Tensor]:
    """Two texts."""
    return lambda: torch.randint(0, 99, (2, length), generator=torch.Generator().manual_seed(1))


class Called(nn.Module):
    """A module that takes its one input in its own way."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Tensor) -> Any:
        """The inner module on x."""
        return self.call(self.inner, x)


@dataclass(frozen=True)
class Recipe:
    """A class of a package, its arguments, and an input; call: how it is run, where that is not plain."""

    path: str
    arguments: dict[str, Any] = field(default_factory=dict)
    given: Callable[[], Tensor] = field(default_factory=image)
    call: Callable[[nn.Module, Tensor], Any] | None = None
    of: Callable[[type], nn.Module] | None = None

    def built(self) -> nn.Module:
        """The module. Raises ImportError where its package is absent."""
        package, _, name = self.path.rpartition(".")
        made = getattr(import_module(package), name)
        module = self.of(made) if self.of else made(**self.arguments)
        return Called(module, self.call) if self.call else module


PLAIN: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64}
VIT: dict[str, Any] = {"image_size": 64, "patch_size": 16, "num_classes": 7, **PLAIN}


def _text(kind: str = "Decoder", **options: Any) -> Recipe:
    """A model of x-transformers over ids."""

    def of(wrapper: Any) -> nn.Module:
        layers = getattr(import_module("x_transformers"), kind)
        return wrapper(
            num_tokens=100, max_seq_len=64, attn_layers=layers(dim=32, depth=2, heads=4, **options)
        )

    return Recipe("x_transformers.TransformerWrapper", given=ids(), of=of)


def _vision(kind: str = "Encoder", **options: Any) -> Recipe:
    def of(wrapper: Any) -> nn.Module:
        layers = getattr(import_module("x_transformers"), kind)(dim=32, depth=2, heads=4, **options)
        return wrapper(image_size=64, patch_size=16, num_classes=7, attn_layers=layers)

    return Recipe("x_transformers.ViTransformerWrapper", of=of)


def _levels(**options: Any) -> dict[str, Any]:
    return {"num_classes": 7, **options}


RECIPES: dict[str, Recipe] = {
    "vit-pytorch ViT": Recipe("vit_pytorch.ViT", VIT | {"dim_head": 8}),
    "vit-pytorch SimpleViT": Recipe("vit_pytorch.SimpleViT", VIT | {"dim_head": 8}),
    "vit-pytorch SimpleViT (flash)": Recipe(
        "vit_pytorch.simple_flash_attn_vit.SimpleViT", VIT | {"dim_head": 8}
    ),
    "vit-pytorch SimpleViT (registers)": Recipe(
        "vit_pytorch.simple_vit_with_register_tokens.SimpleViT", VIT | {"dim_head": 8}
    ),
    "vit-pytorch SimpleViT (qk norm)": Recipe("vit_pytorch.simple_vit_with_qk_norm.SimpleViT", VIT),
    "vit-pytorch ViT (parallel)": Recipe("vit_pytorch.parallel_vit.ViT", VIT),
    "vit-pytorch ViT (small data)": Recipe("vit_pytorch.vit_for_small_dataset.ViT", VIT),
    "vit-pytorch ViT (patch dropout)": Recipe("vit_pytorch.vit_with_patch_dropout.ViT", VIT),
    "vit-pytorch ViT (patch merger)": Recipe(
        "vit_pytorch.vit_with_patch_merger.ViT",
        VIT | {"depth": 4, "patch_merge_layer": 2, "patch_merge_num_tokens": 8},
    ),
    "vit-pytorch LearnableMemoryViT": Recipe("vit_pytorch.learnable_memory_vit.ViT", VIT),
    "vit-pytorch DeepViT": Recipe("vit_pytorch.deepvit.DeepViT", VIT | {"dim_head": 8}),
    "vit-pytorch CaiT": Recipe("vit_pytorch.cait.CaiT", VIT | {"cls_depth": 1, "dim_head": 8}),
    "vit-pytorch CrossViT": Recipe(
        "vit_pytorch.cross_vit.CrossViT",
        _levels(image_size=64, sm_dim=16, lg_dim=32, sm_patch_size=8, lg_patch_size=16, depth=1),
    ),
    "vit-pytorch CvT": Recipe(
        "vit_pytorch.cvt.CvT",
        _levels(s1_emb_dim=16, s2_emb_dim=32, s3_emb_dim=32, s2_heads=2, s3_heads=2, s3_depth=1),
    ),
    "vit-pytorch CCT": Recipe(
        "vit_pytorch.cct.CCT",
        _levels(img_size=64, embedding_dim=32, n_conv_layers=2, num_layers=2, num_heads=4, mlp_ratio=2.0),
    ),
    "vit-pytorch T2TViT": Recipe(
        "vit_pytorch.t2t.T2TViT",
        _levels(image_size=64, dim=32, depth=2, heads=4, mlp_dim=64, t2t_layers=((7, 4), (3, 2), (3, 2))),
    ),
    "vit-pytorch PiT": Recipe(
        "vit_pytorch.pit.PiT",
        _levels(image_size=64, patch_size=8, dim=32, depth=(1, 1), heads=4, mlp_dim=64, dim_head=8),
    ),
    "vit-pytorch LeViT": Recipe(
        "vit_pytorch.levit.LeViT",
        _levels(image_size=64, dim=(32, 32), depth=1, heads=(2, 4), mlp_mult=2, stages=2, dim_key=8),
    ),
    "vit-pytorch TwinsSVT": Recipe(
        "vit_pytorch.twins_svt.TwinsSVT",
        _levels(
            s1_emb_dim=16,
            s1_local_patch_size=4,
            s1_global_k=4,
            s2_emb_dim=16,
            s2_local_patch_size=4,
            s2_global_k=4,
            s3_emb_dim=16,
            s3_local_patch_size=2,
            s3_global_k=2,
            s3_depth=1,
            s4_emb_dim=16,
            s4_local_patch_size=1,
            s4_global_k=1,
        ),
    ),
    "vit-pytorch RegionViT": Recipe(
        "vit_pytorch.regionvit.RegionViT",
        _levels(dim=(16, 32, 32, 32), depth=(1, 1, 1, 1), window_size=7),
        image(224),
    ),
    "vit-pytorch ScalableViT": Recipe(
        "vit_pytorch.scalable_vit.ScalableViT",
        _levels(
            dim=16,
            heads=(2, 2, 2, 2),
            depth=(1, 1, 1, 1),
            ssa_dim_key=(8, 8, 8, 8),
            reduction_factor=(8, 4, 2, 1),
            window_size=(16, 8, None, None),
        ),
        image(64),
    ),
    "vit-pytorch SepViT": Recipe(
        "vit_pytorch.sep_vit.SepViT",
        _levels(dim=16, dim_head=8, heads=(2, 2, 2, 2), depth=(1, 1, 1, 1), window_size=7),
        image(224),
    ),
    "vit-pytorch MaxViT": Recipe(
        "vit_pytorch.max_vit.MaxViT",
        _levels(dim_conv_stem=16, dim=16, dim_head=8, depth=(1, 1), window_size=4),
        image(64),
    ),
    "vit-pytorch NesT": Recipe(
        "vit_pytorch.nest.NesT",
        _levels(image_size=64, patch_size=4, dim=16, heads=2, num_hierarchies=3, block_repeats=(1, 1, 1)),
    ),
    "vit-pytorch MobileViT": Recipe(
        "vit_pytorch.mobile_vit.MobileViT",
        {
            "image_size": (64, 64),
            "dims": [16, 16, 32],
            "num_classes": 7,
            "channels": [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8],
        },
    ),
    "vit-pytorch XCiT": Recipe("vit_pytorch.xcit.XCiT", VIT | {"cls_depth": 1}),
    "vit-pytorch ViViT": Recipe(
        "vit_pytorch.vivit.ViViT",
        {
            "image_size": 32,
            "frames": 4,
            "image_patch_size": 16,
            "frame_patch_size": 2,
            "num_classes": 7,
            "dim": 32,
            "spatial_depth": 2,
            "temporal_depth": 2,
            "heads": 4,
            "mlp_dim": 64,
        },
        noise(2, 3, 4, 32, 32),
    ),
    "vit-pytorch ViT 3D": Recipe(
        "vit_pytorch.vit_3d.ViT",
        {"image_size": 32, "frames": 4, "image_patch_size": 16, "frame_patch_size": 2, "num_classes": 7}
        | PLAIN,
        noise(2, 3, 4, 32, 32),
    ),
    "vit-pytorch ViT 1D": Recipe(
        "vit_pytorch.vit_1d.ViT", {"seq_len": 64, "patch_size": 8, "num_classes": 7} | PLAIN, noise(2, 3, 64)
    ),
    "x-transformers Decoder": _text(),
    "x-transformers Encoder": _text("Encoder"),
    "x-transformers Decoder (flash)": _text(attn_flash=True),
    "x-transformers Decoder (rotary, RMS norm)": _text(rotary_pos_emb=True, use_rmsnorm=True),
    "x-transformers Decoder (ALiBi)": _text(alibi_pos_bias=True),
    "x-transformers Decoder (T5 bias)": _text(rel_pos_bias=True),
    "x-transformers Decoder (memory keys)": _text(attn_num_mem_kv=4),
    "x-transformers Decoder (memory keys, flash)": _text(attn_num_mem_kv=4, attn_flash=True),
    "x-transformers Decoder (zero key)": _text(attn_add_zero_kv=True),
    "x-transformers Decoder (talking heads)": _text(
        attn_pre_talking_heads=True, attn_post_talking_heads=True
    ),
    "x-transformers Decoder (grouped keys)": _text(attn_kv_heads=2),
    "x-transformers Decoder (one key head)": _text(attn_one_kv_head=True),
    "x-transformers Decoder (q k norm)": _text(attn_qk_norm=True),
    "x-transformers Decoder (value gates)": _text(attn_gate_values=True),
    "x-transformers Decoder (soft clamp)": _text(attn_softclamp_logits=True),
    "x-transformers Decoder (sparse top k)": _text(attn_sparse_topk=4),
    "x-transformers Decoder (sandwich)": _text(sandwich_coef=1),
    "x-transformers Decoder (macaron)": _text(macaron=True),
    "x-transformers ViTransformerWrapper": _vision(),
    "x-transformers ViTransformerWrapper (flash)": _vision(attn_flash=True),
    "x-transformers XTransformer": Recipe(
        "x_transformers.XTransformer",
        {
            "dim": 32,
            "enc_num_tokens": 100,
            "enc_depth": 2,
            "enc_heads": 4,
            "enc_max_seq_len": 64,
            "dec_num_tokens": 100,
            "dec_depth": 2,
            "dec_heads": 4,
            "dec_max_seq_len": 64,
        },
        ids(),
        lambda model, x: model(x, x.flip(1)),
    ),
    "segment-anything ImageEncoderViT": Recipe(
        "segment_anything.modeling.ImageEncoderViT",
        {
            "img_size": 64,
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
            "out_chans": 16,
            "use_rel_pos": True,
            "window_size": 3,
            "global_attn_indexes": (1,),
        },
    ),
    "timesformer-pytorch TimeSformer": Recipe(
        "timesformer_pytorch.TimeSformer",
        {
            "dim": 32,
            "image_size": 32,
            "patch_size": 16,
            "num_frames": 4,
            "num_classes": 7,
            "depth": 2,
            "heads": 4,
            "dim_head": 8,
        },
        noise(2, 4, 3, 32, 32),
    ),
    "performer-pytorch Performer": Recipe(
        "performer_pytorch.Performer",
        {"dim": 32, "depth": 2, "heads": 4, "causal": False, "dim_head": 8},
        noise(2, 16, 32),
    ),
    "local-attention LocalTransformer": Recipe(
        "local_attention.LocalTransformer",
        {
            "num_tokens": 100,
            "dim": 32,
            "depth": 2,
            "max_seq_len": 64,
            "local_attn_window_size": 8,
            "heads": 4,
            "dim_head": 8,
            "causal": True,
        },
        ids(32),
    ),
    "linformer Linformer": Recipe(
        "linformer.Linformer", {"dim": 32, "seq_len": 16, "depth": 2, "heads": 4, "k": 8}, noise(2, 16, 32)
    ),
    "nystrom-attention Nystromformer": Recipe(
        "nystrom_attention.Nystromformer",
        {"dim": 32, "depth": 2, "heads": 4, "dim_head": 8, "num_landmarks": 4},
        noise(2, 16, 32),
    ),
    "perceiver-pytorch Perceiver": Recipe(
        "perceiver_pytorch.Perceiver",
        {
            "input_channels": 3,
            "input_axis": 2,
            "num_freq_bands": 4,
            "max_freq": 10.0,
            "depth": 2,
            "num_latents": 16,
            "latent_dim": 32,
            "cross_heads": 1,
            "latent_heads": 4,
            "latent_dim_head": 8,
            "num_classes": 7,
        },
        noise(2, 16, 16, 3),
    ),
    "linear-attention-transformer": Recipe(
        "linear_attention_transformer.LinearAttentionTransformerLM",
        {"num_tokens": 100, "dim": 32, "heads": 4, "depth": 2, "max_seq_len": 64},
        ids(),
    ),
    "axial-attention AxialAttention": Recipe(
        "axial_attention.AxialAttention",
        {"dim": 32, "dim_index": 1, "heads": 4, "num_dimensions": 2},
        noise(2, 32, 8, 8),
    ),
    "memory-efficient-attention Attention": Recipe(
        "memory_efficient_attention_pytorch.Attention",
        {"dim": 32, "heads": 4, "dim_head": 8, "causal": True},
        noise(2, 16, 32),
    ),
    "kornia VisionTransformer": Recipe(
        "kornia.models.vit.VisionTransformer",
        {
            "image_size": 64,
            "patch_size": 16,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "dropout_attn": 0.0,
        },
    ),
    "kornia TinyViT": Recipe("kornia.contrib.TinyViT", {"img_size": 128, "num_classes": 7}, image(128)),
    "monai ViT": Recipe(
        "monai.networks.nets.ViT",
        {
            "in_channels": 1,
            "img_size": (16, 16, 16),
            "patch_size": (8, 8, 8),
            "hidden_size": 48,
            "mlp_dim": 64,
            "num_layers": 2,
            "num_heads": 4,
        },
        noise(2, 1, 16, 16, 16),
    ),
    "monai SwinUNETR": Recipe(
        "monai.networks.nets.SwinUNETR",
        {"in_channels": 1, "out_channels": 2, "feature_size": 12, "spatial_dims": 2, "depths": (1, 1, 1, 1)},
        image(64, channels=1),
    ),
    "swin-transformer-pytorch SwinTransformer": Recipe(
        "swin_transformer_pytorch.SwinTransformer",
        {
            "hidden_dim": 16,
            "layers": (2, 2, 2, 2),
            "heads": (2, 2, 2, 2),
            "num_classes": 7,
            "head_dim": 8,
            "window_size": 2,
            "downscaling_factors": (4, 2, 2, 2),
        },
    ),
    "conformer Conformer": Recipe(
        "conformer.Conformer",
        {"dim": 32, "depth": 2, "dim_head": 8, "heads": 4, "ff_mult": 2, "conv_kernel_size": 3},
        noise(2, 16, 32),
    ),
}


def names() -> list[str]:
    """All of them, whether or not their packages are there."""
    return list(RECIPES)


def build(name: str, folder: Path | None) -> Case:
    """One of them, on two inputs. There is no name for these. Raises NotBuiltError."""
    site = os.environ.get(SITE)
    if site and site not in sys.path:
        sys.path.append(site)
    torch.manual_seed(0)
    recipe = RECIPES[name]
    try:
        module = lively(recipe.built()).requires_grad_(False)
    except ImportError as error:
        raise NotBuiltError(f"its package is not there ({error}): see the command above") from error
    batch = recipe.given()
    with torch.no_grad():
        try:
            module(batch)
            module(batch[:1])
        except Exception as error:  # another version of a library takes other inputs
            raise NotBuiltError(f"it does not run: {type(error).__name__}: {error}"[:200]) from error
    return Case("others", name, module, batch)

"""Whether inputs and documents reach each other: in models that let them on purpose, and in honest ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from checkpoints import OPEN_CLIP_SIZES
from PIL import Image
from torch import Tensor, nn

from diag.models.names.spec import ModelSpec
from diag.studies.audit import AuditPlan, audit, audit_module
from diag.studies.audit.leaks import apart
from diag.studies.audit.words import (
    ALONE,
    BLOCKS,
    DIFFERS,
    DOCUMENT,
    FINAL,
    IN_BATCH,
    LEAK,
    LEFT,
    NONE,
    NOT_TESTED,
    OTHER_INPUT,
    PADDING,
    PLAIN,
    RESTART,
    RIGHT,
    ROUNDING,
    UNCACHED,
    UNCOUNTED,
    UNMASKED,
)

IDS = {"input_ids": torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(1))}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT |= {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR |= {f"linear_{part}_head_dim": 8 for part in ("key", "value")}
LINEAR |= {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
TIGHT = (NONE, ROUNDING)


class Attention(nn.Module):
    """Two heads; `masked` is whether it minds the mask."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mask = mask if self.masked else None
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return x + self.proj(y.transpose(1, 2).flatten(2))


class Reader(nn.Module):
    """Reads ids both ways, with learned positions. masked: of each of its layers. mixed: whether it adds the
    mean of the batch to every input, behind its first layer."""

    def __init__(self, masked: tuple[bool, ...] = (True, True), mixed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(64, 16), nn.Embedding(64, 16)
        self.layers = nn.ModuleList(Attention(one) for one in masked)
        self.mixed = mixed

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask.bool()[:, None, None]
        x = self.words(input_ids) + self.places(position_ids)
        for number, layer in enumerate(self.layers):
            x = layer(x, attention_mask)
            if self.mixed and number == 0:
                x = x + x.mean(0, keepdim=True)
        return x


def leaks_of(module: nn.Module, batch: Any = IDS) -> pd.DataFrame:
    return audit_module(module.eval(), [batch]).leaks


def level_of(leaks: pd.DataFrame, case: str, changed: str) -> dict[int, str]:
    rows = leaks[(leaks["case"] == case) & (leaks["changed"] == changed)]
    return dict(zip(rows["layer"], rows["level"], strict=True))


def test_an_honest_model_leaks_nothing_to_the_bit() -> None:
    leaks = leaks_of(Reader())
    for case in (RIGHT, LEFT, UNCOUNTED):
        for changed in (OTHER_INPUT, PADDING):
            assert level_of(leaks, case, changed) == {0: NONE, 1: NONE, FINAL: NONE}
    assert set(level_of(leaks, BLOCKS, DOCUMENT).values()) == {NONE}
    for case in (RIGHT, LEFT, BLOCKS):  # the right positions give the numbers of the input alone
        assert set(level_of(leaks, case, ALONE).values()) <= set(TIGHT)
    assert set(level_of(leaks, UNCOUNTED, ALONE).values()) == {DIFFERS}
    for case in (PLAIN, RESTART):  # nothing in this model knows what positions that start anew mean
        assert set(level_of(leaks, case, DOCUMENT).values()) == {LEAK}


def test_attention_without_its_mask_leaks_and_from_which_layer_on() -> None:
    leaks = leaks_of(Reader((True, False, True)))
    for case in (RIGHT, LEFT):
        assert level_of(leaks, case, OTHER_INPUT) == {0: NONE, 1: NONE, 2: NONE, FINAL: NONE}
        assert level_of(leaks, case, PADDING) == {0: NONE, 1: LEAK, 2: LEAK, FINAL: LEAK}
        assert level_of(leaks, case, ALONE)[1] == DIFFERS
    assert level_of(leaks, BLOCKS, DOCUMENT) == {0: NONE, 1: LEAK, 2: LEAK, FINAL: LEAK}


def test_inputs_of_a_batch_that_are_mixed_leak() -> None:
    leaks = leaks_of(Reader(mixed=True))
    assert level_of(leaks, RIGHT, OTHER_INPUT) == {0: NONE, 1: LEAK, FINAL: LEAK}
    # the padding reaches its own input's tokens by no way
    assert set(level_of(leaks, RIGHT, PADDING).values()) == {NONE}


def test_the_change_is_that_of_y_relative_to_itself() -> None:
    """Against the two runs made by hand, in float64."""
    module = Reader((False,)).eval()
    leaks = leaks_of(module)
    a, b, c = (IDS["input_ids"][row : row + 1] for row in (0, 1, 2))
    outputs = []
    with torch.inference_mode():
        for first in (a, c):
            x = module.words(torch.cat([first[:, :8], b[:, :8]], 1)) + module.places(torch.arange(16))
            q, k, v = module.layers[0].qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).double()
            y = (q @ k.mT * 8**-0.5).softmax(-1) @ v
            outputs.append(y[0, :, 8:])
    expected = ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item()
    row = leaks[(leaks["case"] == PLAIN) & (leaks["changed"] == DOCUMENT) & (leaks["layer"] == 0)]
    assert row["change"].item() == pytest.approx(expected, rel=1e-5)
    assert row["noise"].item() == 0


def test_what_was_not_changed_is_not_called_tight() -> None:
    """A negative control: the documents are the same."""
    same = {"input_ids": IDS["input_ids"][:1].repeat(3, 1)}
    assert set(level_of(leaks_of(Reader(), same), RIGHT, OTHER_INPUT).values()) == {NOT_TESTED}


def test_apart_is_zero_only_for_equal_bits() -> None:
    one = torch.ones(4, dtype=torch.float64)
    assert apart(one, one.clone()) == 0
    assert apart(one + 1e-15, one) == pytest.approx(1e-15, rel=0.2)
    assert apart(one[:3], one) != apart(one[:3], one)


# --- of transformers and timm


def config(name: str, **more: Any) -> Callable[[], nn.Module]:
    made = getattr(transformers, f"{name}Config")
    return lambda: transformers.AutoModel.from_config(made(**TEXT | more))


def leaky(leaks: pd.DataFrame) -> set[str]:
    return set(leaks["case"][leaks["level"] == LEAK])


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        # positions that start anew are minded only without a cache, which transformers makes by default
        (config("Llama", num_key_value_heads=2), {PLAIN, RESTART}),
        (config("Bert"), {PLAIN, RESTART, UNCACHED}),
        # its masks are made without its positions
        (
            config("GptOss", num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
            {PLAIN, RESTART, UNCACHED},
        ),
        # its layers without softmax mind no mask of documents
        (
            config("Qwen3Next", num_key_value_heads=2, head_dim=8, mlp_only_layers=[0, 1], **LINEAR),
            {PLAIN, RESTART, UNCACHED, BLOCKS},
        ),
    ],
)
def test_which_packed_and_padded_batches_of_transformers_leak(
    build: Callable[[], nn.Module], expected: set[str]
) -> None:
    torch.manual_seed(0)
    leaks = leaks_of(build())
    assert leaky(leaks) == expected
    assert not leaks["why"].any()
    for case in (RIGHT, LEFT):
        assert set(level_of(leaks, case, ALONE).values()) <= set(TIGHT)


def test_a_batch_that_a_model_does_not_take_is_named_not_measured() -> None:
    made = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4, initializer_range=0.2)
    leaks = leaks_of(transformers.AutoModel.from_config(made))
    untested = leaks[leaks["level"] == NOT_TESTED].set_index("case")["why"]
    assert untested[RESTART] == "the model takes no position_ids"
    assert untested[BLOCKS].startswith("the model does not take it: ")
    assert leaky(leaks) == {PLAIN}


def test_a_text_tower_without_a_mask_hides_what_follows_by_being_causal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """open_clip fills texts up with zeros, and what it returns is one embedding per text."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", OPEN_CLIP_SIZES)
    spec = ModelSpec("tiny", "open_clip", "tiny", random_init=True)
    monkeypatch.setattr("diag.studies.audit.measure.specs_of", lambda plan: [spec])
    leaks = audit(AuditPlan(models=("tiny",), texts="demo")).leaks
    assert level_of(leaks, UNMASKED, PADDING) == {0: NONE, 1: NONE, FINAL: NOT_TESTED}
    assert level_of(leaks, IN_BATCH, OTHER_INPUT) == {0: NONE, 1: NONE, FINAL: NONE}


@pytest.mark.filterwarnings("ignore")
def test_patches_that_fill_an_image_up_do_not_reach_its_own(tmp_path: Path) -> None:
    """SigLIP 2: 16 patches of 8 pixels are the most, and a wide image has fewer."""
    torch.manual_seed(0)
    sizes = {name: TEXT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    made = transformers.Siglip2VisionConfig(**sizes, intermediate_size=64, num_patches=16, patch_size=8)
    transformers.Siglip2VisionModel(made).save_pretrained(tmp_path / "model")
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    Image.effect_noise((80, 40), 90).convert("RGB").save(tmp_path / "images" / "a.png")
    plan = AuditPlan(models=(f"hf:{tmp_path / 'model'}",), images=str(tmp_path / "images"))
    leaks = audit(plan).leaks
    levels = level_of(leaks, "padded", PADDING)
    assert {levels[0], levels[1]} == {NONE}
    assert level_of(leaks, IN_BATCH, OTHER_INPUT) == {FINAL: NOT_TESTED}


def test_images_of_a_batch_are_told_apart() -> None:
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
    images = torch.randn(2, 3, 32, 32)
    leaks = leaks_of(module, images)
    assert level_of(leaks, IN_BATCH, OTHER_INPUT) == {0: NONE, 1: NONE, FINAL: NONE}
    assert set(level_of(leaks, IN_BATCH, ALONE).values()) <= set(TIGHT)
    module.blocks[1].register_forward_pre_hook(lambda block, args: (args[0] + args[0].mean(0),))
    assert level_of(leaks_of(module, images), IN_BATCH, OTHER_INPUT) == {0: NONE, 1: LEAK, FINAL: LEAK}

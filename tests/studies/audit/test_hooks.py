"""What people hook in small random models of many kinds: whether it is what attention uses, or why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from checkpoints import OPEN_CLIP_SIZES, TEXT_SIZES, save_language_model
from torch import Tensor, nn

from diag.studies.audit import Audited, AuditPlan, audit, audit_module
from diag.studies.audit.words import (
    CONSTANT,
    CONVOLVED,
    GATE,
    INTERLEAVED,
    LATENT,
    MISSING,
    NEVER,
    NORM,
    REPEATED,
    SAME,
    SHARED,
)

IDS = {"input_ids": torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(1))}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEXT = TEXT_SIZES | {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
NEMO = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 4}
GEMMA = {"num_hidden_layers": 3, "num_kv_shared_layers": 1, "intermediate_size": [16] * 3, **NEMO}
GEMMA |= {"activation_sparsity_pattern": [0.0] * 3, "altup_num_inputs": 2, "laurel_rank": 4}
GEMMA |= {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 4}
LATENTS = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
LATENTS |= {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_group": 1}
LATENTS |= {"topk_group": 1, "first_k_dense_replace": 2}
DELTA = {f"linear_{part}_head_dim": 8 for part in ("key", "value")}
DELTA |= {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
DELTA |= {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
DELTA |= {"shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]}


def config(name: str, *sizes: dict[str, Any], **more: Any) -> Callable[[], nn.Module]:
    merged = {key: value for part in sizes for key, value in part.items()} | more
    return lambda: transformers.AutoModel.from_config(getattr(transformers, f"{name}Config")(**merged))


def of_timm(name: str, **more: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, img_size=32, **more)


class Gated(nn.Module):
    """Attention with a gate of its own for each head, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))
        self.gate = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            one(x).unflatten(-1, (4, 4)).transpose(1, 2) for one in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [batch, token, head, dim]
        return x + self.o_proj((y * self.gate(x).sigmoid()[..., None]).flatten(2))


ROWS: dict[str, tuple[Callable[[], nn.Module], dict[tuple[str, int], str]]] = {
    "gpt2": (
        config("GPT2", vocab_size=64, n_layer=2, n_embd=32, n_head=4, n_positions=64),
        {("c_attn", 0): SAME, ("c_proj input", 1): SAME},
    ),
    "llama": (config("Llama", GROUPED), {("v_proj", 1): REPEATED, ("o_proj input", 1): SAME}),
    "phi-3": (config("Phi3", GROUPED), {("qkv_proj", 1): REPEATED, ("o_proj input", 1): SAME}),
    "bert": (config("Bert", TEXT), {("value", 1): SAME, ("dense input", 1): SAME}),
    "neox": (config("GPTNeoX", TEXT), {("query_key_value", 1): INTERLEAVED, ("dense input", 1): SAME}),
    "falcon": (
        config(
            *("Falcon", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}),
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
        ),
        {("query_key_value", 0): INTERLEAVED, ("dense input", 0): SAME},
    ),
    "bloom": (
        config("Bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        {("query_key_value", 1): INTERLEAVED, ("dense input", 1): SAME},
    ),
    "gemma-3n": (
        config("Gemma3nText", GROUPED, GEMMA),
        {("v_proj", 1): NORM, ("o_proj input", 1): SAME, ("value projection", 2): SHARED},
    ),
    "deepseek-v3": (
        config("DeepseekV3", TEXT, LATENTS),
        {("kv_b_proj", 1): LATENT, ("o_proj input", 1): SAME},
    ),
    "qwen3-next": (
        config("Qwen3Next", GROUPED, DELTA),
        {
            ("in_proj_qkvz", 0): CONVOLVED,
            ("out_proj input", 0): NORM,
            ("v_proj", 1): REPEATED,
            ("o_proj input", 1): GATE,
        },
    ),
    "vit of timm": (
        of_timm("vit_tiny_patch16_224", patch_size=8, depth=2),
        {("qkv", 1): SAME, ("proj input", 1): SAME},
    ),
    "eva of timm": (
        of_timm("eva02_tiny_patch14_224", patch_size=8, depth=1),
        {("qkv", 0): NEVER, ("proj input", 0): SAME},
    ),
    "open_clip": (
        lambda: open_clip.CLIP(**OPEN_CLIP_SIZES).visual,
        {("in_proj_weight", 1): SAME, ("out_proj input", 1): NEVER},
    ),
}


def unlike_constants(module: nn.Module) -> nn.Module:
    """Biases and norms start at constants, which would hide a reason."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.2)
    return module.eval()


@pytest.mark.parametrize("kind", ROWS)
def test_each_kind_of_model_has_its_reasons(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, expected = ROWS[kind]
    torch.manual_seed(0)
    monkeypatch.setattr("diag.studies.audit.measure.text_changes", lambda *given: [])
    monkeypatch.setattr("diag.studies.audit.measure.changes_of", lambda *given: [])
    hooks = audit_module(unlike_constants(build()), [IDS if kind in MODELS_OF_IDS else IMAGES]).hooks
    found = dict(zip(zip(hooks["hook"], hooks["layer"], strict=True), hooks["reason"], strict=True))
    assert {place: found[place] for place in expected} == expected
    told = hooks[~hooks["reason"].isin((CONVOLVED, NEVER, MISSING))]
    assert (told["remaining_error"] < 1e-5).all()
    alike = hooks[hooks["reason"].isin((SAME, REPEATED))]
    assert (alike["relative_error"] < 1e-6).all()
    apart = hooks[~hooks["reason"].isin((SAME, REPEATED, SHARED, NEVER))]
    assert (apart["relative_error"] > 1e-2).all()


MODELS_OF_IDS = [kind for kind in ROWS if kind not in ("vit of timm", "eva of timm", "open_clip")]


def test_a_gate_by_hand_is_found_with_its_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Gated(), Gated()).eval()
    hooks = audit_module(model, [torch.randn(3, 12, 16)]).hooks
    gates = hooks[hooks["hook"] == "o_proj input"]
    assert set(gates["reason"]) == {GATE}
    assert gates["detail"].str.startswith("a factor for each token and head").all()
    assert set(hooks["reason"][hooks["hook"] == "v_proj"]) == {SAME}


def test_a_projection_that_is_called_otherwise_is_told_not_guessed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Gated()).eval()
    model[0].values, model[0].o_projection = model[0].v_proj, model[0].o_proj
    model[0].forward = lambda x: _renamed(model[0], x)
    del model[0].v_proj, model[0].o_proj
    hooks = audit_module(model, [torch.randn(3, 12, 16)]).hooks
    assert list(hooks["hook"]) == ["value projection", "output projection"]
    assert list(hooks["reason"]) == [MISSING, MISSING]


def _renamed(module: Any, x: Tensor) -> Tensor:
    q, k, v = (
        one(x).unflatten(-1, (4, 4)).transpose(1, 2) for one in (module.q_proj, module.k_proj, module.values)
    )
    y = nn.functional.scaled_dot_product_attention(q, k, v)
    return x + module.o_projection(y.transpose(1, 2).flatten(2))


# --- transformer-lens


@pytest.fixture(scope="module")
def of_gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Audited]:
    folder = save_language_model(tmp_path_factory.mktemp("gpt2"), "gpt2")
    return folder, audit(AuditPlan(models=(f"hf:{folder}",), texts="demo", seq_len=16))


def test_transformer_lens_shows_v_as_loaded_and_a_constant_less_once_folded(
    of_gpt2: tuple[Path, Audited],
) -> None:
    hooks = of_gpt2[1].hooks
    assert set(hooks["layer"]) == {0, 1}
    reasons = hooks.groupby("hook", sort=False)["reason"].agg(lambda x: "|".join(dict.fromkeys(x)))
    assert reasons.to_dict() == {
        **dict.fromkeys(("c_attn", "c_proj input", "tl hook_v", "tl hook_z"), SAME),
        **dict.fromkeys(("tl hook_v, folded", "tl hook_z, folded"), CONSTANT),
    }
    folded = hooks[hooks["reason"] == CONSTANT]
    assert set(folded["detail"]) == {"b_V + W_V β is missing from every value"}
    assert (folded["relative_error"] > 0.01).all()
    assert (folded["remaining_error"] < 1e-5).all()


def test_a_name_of_transformer_lens_is_audited_as_the_model_that_it_loads(
    of_gpt2: tuple[Path, Audited],
) -> None:
    folder, found = of_gpt2
    of_lens = audit(AuditPlan(models=(f"tl:{folder}",), texts="demo", seq_len=16))
    assert of_lens.hooks.drop(columns="model").equals(found.hooks.drop(columns="model"))


def test_models_that_transformer_lens_does_not_load_are_audited_without(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "lfm2", "lfm2")
    plan = AuditPlan(models=(f"hf:{folder}",), texts="demo", seq_len=16, random_init=True)
    found = audit(plan)
    assert "takes the weights of its folder only" in found.models[0]["transformer_lens"]
    assert not found.hooks["hook"].str.startswith("tl ").any()

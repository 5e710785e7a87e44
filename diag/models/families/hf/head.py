"""What turns the last states of a causal Hugging Face model into next-token logits.

The probe runs models without their head, which it never reads; whoever asks for a loss loads it.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from diag.errors import UserError
from diag.models.base import device_of_module
from diag.models.families.hf.files import reading
from diag.models.loading import ready
from diag.models.names.spec import ModelSpec

SCALED = ("logit_scale", "logits_scaling", "final_logit_softcapping")
"""Configuration of models that change logits after the projection."""


def load_language_head(spec: ModelSpec, module: Any, *, dtype: torch.dtype) -> nn.Module:
    """States `[batch, token, dim]` → logits `[batch, token, vocabulary]`.

    module: the model without its head, loaded from the same spec.
    Raises UserError where the checkpoint holds no head, or logits are changed after it.
    """
    for name in SCALED:
        if getattr(module.config, name, None) not in (None, 1, 1.0):
            raise UserError(
                f"'{spec.base}' changes its logits after the projection ({name}): its loss is not understood",
                "measure what changes in its tokens instead",
            )
    if module.config.tie_word_embeddings:
        tied = nn.Linear(1, 1, bias=False)
        tied.weight = module.get_input_embeddings().weight
        return tied
    if spec.random_init:
        raise UserError(f"'{spec.base}' has no head with random weights", "give a model with weights")
    with reading(spec, "model.safetensors", tip="the weights must be those of a language model"):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            spec.name,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            dtype=dtype,
            output_loading_info=True,
        )
    whole, report = loaded
    head = whole.get_output_embeddings()
    if head is None or any("lm_head" in key or "embed_out" in key for key in report["missing_keys"]):
        raise UserError(
            f"'{spec.base}' has no language head: its next-token loss cannot be computed",
            "give the folder of the whole language model",
        )
    return ready(head, spec.resolved, device=device_of_module(module), dtype=dtype)

"""Attention classes of transformers with a change between attention and output projection.

The change is applied by an attention function of our own, which every model that calls the library's
interface takes; the function gets no layer input, so a class mixed in before the library's keeps it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from diag.errors import UserError
from diag.variants.attention import mixed
from diag.variants.formulas import Change, Sizes, mean_of_visible

HF_NAME = "attnbias"
"""What transformers knows the changed attention as: `config._attn_implementation`."""


class ChangedHf(nn.Module):
    """What is mixed into an attention class of transformers: it keeps its input for the change."""

    change: Change
    layer_inputs: Tensor

    def forward(self, hidden_states: Tensor, *args: Any, **settings: Any) -> Any:
        """As the library's; `_hf_attention` applies the change within."""
        self.layer_inputs = hidden_states
        result = super().forward(hidden_states, *args, **settings)
        del self.layer_inputs
        return result


def _hf_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, `[batch, token, head, dim]`, changed where the module has a change."""
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if not isinstance(module, ChangedHf):
        return output, weights
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal  # as the library decides it
    changed = module.change(
        output.transpose(1, 2),
        value,
        module.layer_inputs,
        lambda: mean_of_visible(value, attention_mask, causal),
    )
    return changed.transpose(1, 2).contiguous(), None


AttentionInterface.register(HF_NAME, _hf_attention)
AttentionMaskInterface.register(HF_NAME, sdpa_mask)


def can_be_changed(module: Any) -> bool:
    """Whether it is the attention of a layer, of a class that calls the library's interface."""
    known = isinstance(getattr(module, "head_dim", None), int) and hasattr(module, "layer_idx")
    named = type(module).__name__.endswith("Attention")
    return named and known and isinstance(module.config, PretrainedConfig)


def swap(module: Any, path: str) -> Sizes:
    """Makes a module that can be changed a changed one; its sizes.

    The model then takes the attention function of this file in all of its layers. Raises UserError where it
    does not run transformers' sdpa attention.
    """
    current = module.config._attn_implementation
    if current not in ("sdpa", HF_NAME):
        raise UserError(
            f"'{path}' runs {current} attention", "build the model with attn_implementation='sdpa'"
        )
    module.config._attn_implementation = HF_NAME
    module.__class__ = mixed(ChangedHf, type(module), "Changed")
    return Sizes(module.config.hidden_size, module.config.num_attention_heads, module.head_dim)

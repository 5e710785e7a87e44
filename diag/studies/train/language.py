"""The language task: next token with a small GPT-2, on the bundled text or one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diag.errors import UserError, need
from diag.inputs.outside import reason
from diag.inputs.texts import demo_text, read_text
from diag.results.writing import keep
from diag.studies.train.fit import Batch
from diag.studies.train.folders import save_transformers
from diag.studies.train.plan import TrainPlan

TRAINED_SHARE = 0.9
END = "<|endoftext|>"
SIZES = {"vocab_size": 2048, "n_positions": 256, "n_embd": 96, "n_layer": 6, "n_head": 3}
"""Arguments of GPT2Config where a plan gives no other."""

WATCHED = 8
"""Windows that are looked at while training."""


class LanguageTask:
    """Next-token prediction; the first 90 % of the text train, the rest is held out.

    Raises UserError if the text is too short, or the model's sizes are refused.
    """

    def __init__(self, plan: TrainPlan) -> None:
        self.plan = plan
        self.sizes = SIZES | plan.model
        self.context = int(self.sizes["n_positions"])
        text = demo_text() if plan.train is None else read_text(Path(plan.train))
        cut = int(len(text) * TRAINED_SHARE)
        self.held_out_text = text[cut:]
        self.tokenizer = byte_pairs(text[:cut], int(self.sizes["vocab_size"]), self.context)
        self.train, self.held_out = (self._tokens(part) for part in (text[:cut], text[cut:]))
        if len(self.held_out) < self.context or len(self.train) <= self.context:
            raise UserError(
                f"the text gives {len(self.held_out)} held-out tokens, a window has {self.context}",
                "give a longer text, or a smaller n_positions",
            )

    def build(self, patch_size: int | None) -> nn.Module:
        return gpt2(self.sizes)

    def batch(self, generator: np.random.Generator) -> Batch:
        """Random windows of the training text."""
        count = self.plan.recipe.batch_size
        starts = generator.integers(0, len(self.train) - self.context, count)
        return {"input_ids": torch.stack([self.train[s : s + self.context] for s in starts])}

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """transformers' own loss, nats per token."""
        return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Nats per token over at most `held_out` windows that do not overlap."""
        windows = self._windows()[: self.plan.recipe.held_out]
        losses = [float(self.loss(model, {"input_ids": window[None].to(device)})) for window in windows]
        return {"loss": sum(losses) / len(losses), "held_out": len(losses)}

    def watched(self) -> Batch:
        """The first held-out windows."""
        return {"input_ids": self._windows()[:WATCHED]}

    def save(self, model: nn.Module, folder: Path) -> None:
        save_transformers(model, self.tokenizer, folder)

    def probed(self, folder: Path) -> dict[str, str]:
        """The held-out text, as a file."""
        file = folder / "held-out.txt"
        keep(file, self.held_out_text.encode("utf-8"))
        return {"texts": str(file)}

    def _tokens(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _windows(self) -> Tensor:
        return self.held_out[: len(self.held_out) // self.context * self.context].view(-1, self.context)


def gpt2(sizes: Mapping[str, Any]) -> nn.Module:
    """A GPT-2 with random weights. Raises UserError for sizes that its config refuses."""
    from transformers import GPT2Config, GPT2LMHeadModel

    try:
        config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)
        return GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    except Exception as error:  # of the library's own checks, and of memory that is not there
        raise UserError(
            f"GPT2Config refuses {dict(sizes)}: {reason(error)}", "model: takes its arguments"
        ) from None


def byte_pairs(text: str, vocabulary: int, context: int) -> Any:
    """A byte-level BPE tokenizer trained on a text, as a fast tokenizer of transformers.

    Raises UserError where that is not installed.
    """
    need("a language model to train", "transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, model_max_length=context
    )

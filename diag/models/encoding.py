"""Inputs as towers take them: images to pixels, texts to windows of tokens, and both to batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from diag.errors import BadInputs, UnreadableInput, UserError
from diag.inputs.images import rgb
from diag.inputs.items import Inputs
from diag.models.base import Batch, Sample
from diag.models.loading import first_line

DEFAULT_SEQUENCE = 128

Made = TypeVar("Made")


# --- images


def image_samples(inputs: Inputs, seq_len: int | None) -> Iterator[Sample]:
    """One sample per image."""
    for item in inputs:
        yield Sample(item.id, item.read)


def preparation(transform: Callable[[Image.Image], Any]) -> Callable[[Any], Any]:
    """A tower's `prepare`: any image in RGB through `transform`, which gives no image.

    Its errors are of that image, such as one too narrow to be resized: UnreadableInput.
    """

    def prepare(content: Any) -> Any:
        if not isinstance(content, Image.Image):
            return content  # prepared already
        try:
            return transform(rgb(content))
        except Exception as error:  # libraries refuse an odd image with whatever breaks first
            raise UnreadableInput(f"cannot preprocess the image: {first_line(error)}") from error

    return prepare


def each(samples: Sequence[Sample], made_of: Callable[[Sample], Made]) -> list[Made]:
    """What is made of every sample. Raises BadInputs for those of which nothing can be."""
    made, bad = list[Made](), dict[str, str]()
    for sample in samples:
        try:
            made.append(made_of(sample))
        except UnreadableInput as error:
            bad[sample.id] = str(error)
    if bad:
        raise BadInputs(bad)
    return made


def image_preparation(
    transform: Callable[[Image.Image], Float[Tensor, "channel height width"]], dtype: torch.dtype
) -> Callable[[Any], Float[Tensor, "channel height width"]]:
    """A tower's `prepare` for pixels in the model's format, half of the bytes to move where it is a half."""
    return preparation(lambda image: transform(image).to(dtype))


def image_encoder(
    prepare: Callable[[Any], Float[Tensor, "channel height width"]], device: str | torch.device
) -> Callable[[Sequence[Sample]], Batch]:
    """Samples -> a batch of pixels `[batch, 3, height, width]`, each image through `prepare`."""

    def encode(samples: Sequence[Sample]) -> Batch:
        pixels = each(samples, lambda sample: prepare(sample.read()))
        return Batch(tuple(sample.id for sample in samples), _on_device(pixels, torch.device(device)))

    return encode


def _on_device(images: Sequence[Tensor], device: torch.device) -> Tensor:
    first = images[0]
    alike = all(image.shape == first.shape for image in images)  # copy_ would broadcast
    if device.type != "cuda" or not alike or not first.is_pinned():
        return torch.stack(list(images)).to(device)
    batch = torch.empty((len(images), *first.shape), dtype=first.dtype, device=device)
    for row, image in zip(batch, images, strict=True):
        row.copy_(image, non_blocking=True)  # the GPU fetches it; nothing is copied here
    return batch


# --- texts


def text_samples(
    tokenise: Callable[[str], list[int]],
    *,
    context: int | None,
    limit: str = "context",
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    fixed: bool = False,
) -> Callable[[Inputs, int | None], Iterator[Sample]]:
    """Cuts each text into windows of exactly `seq_len` tokens, without padding; a rest is dropped.

    context: the most tokens that the model takes; None for no limit. The default length is
        min(128, context). limit: what of the model that is, in words.
    before, after: special tokens put around each window, counted in its length.
    fixed: the model takes exactly `context` tokens.
    Texts shorter than one window give no sample; a text that is the only one, where no length was asked for,
    is a window of its own.

    Raises UserError, on the first sample, if the length is not possible.
    """

    def samples(inputs: Inputs, seq_len: int | None) -> Iterator[Sample]:
        usual = min(DEFAULT_SEQUENCE, context or DEFAULT_SEQUENCE)
        length = seq_len or (context if fixed and context else usual)
        if fixed and length != context:
            raise UserError(
                f"--seq-len {length}: this text tower takes exactly {context} tokens",
                f"use --seq-len {context}",
            )
        if context is not None and length > context:
            raise UserError(
                f"--seq-len {length} is longer than the model's {limit}", f"use at most {context}"
            )
        own = length - len(before) - len(after)
        if own < 1:
            raise UserError(
                f"--seq-len {length} leaves no room beside {len(before) + len(after)} special tokens",
                f"use at least {len(before) + len(after) + 1}",
            )
        for item in inputs:
            text = item.read()
            assert isinstance(text, str)
            tokens = np.asarray(tokenise(text), dtype=np.int32)  # four bytes each; in a list it would be 36
            shorter = seq_len is None and not fixed and len(inputs) == 1 and length - own + len(tokens) > 1
            size = min(own, len(tokens)) if shorter else own
            for start in range(0, len(tokens) - size + 1, size):
                window = tokens[start : start + size]
                yield Sample(f"{item.id}:{start // size:05d}", partial(_framed, before, window, after))

    return samples


def _framed(before: Sequence[int], window: np.ndarray, after: Sequence[int]) -> list[int]:
    return [*before, *window.tolist(), *after]


def token_text(tokenizer: Any) -> Callable[[int], str]:
    """Token id -> the text of that token alone; a leading space is kept where the tokenizer has one."""
    pieces = getattr(tokenizer, "convert_ids_to_tokens", None)

    def text_of(index: int) -> str:
        text = str(tokenizer.decode([index]))
        # decoding drops the space of a sentence piece that stands alone
        spaced = pieces and str(pieces(index)).startswith("\N{LOWER ONE EIGHTH BLOCK}")
        return f" {text}" if spaced and not text.startswith(" ") else text

    return text_of


def text_facts(context: int | None, before: Sequence[int], after: Sequence[int]) -> dict[str, Any]:
    """The constants of a text tower; `bos` says whether anything was put before a window."""
    return {"context": context, "bos": "yes" if before else "no", "special_tokens": len(before) + len(after)}


def vocabulary_digest(tokenizer: Any) -> str:
    """Tells whether two models cut a text into the same windows: a hash of the tokenizer's vocabulary."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


def text_encoder(device: str | torch.device) -> Callable[[Sequence[Sample]], Batch]:
    """Samples -> a batch of token ids `[batch, token]`."""

    def encode(samples: Sequence[Sample]) -> Batch:
        ids: Int[Tensor, "batch token"] = torch.tensor([sample.read() for sample in samples], device=device)
        return Batch(tuple(sample.id for sample in samples), ids)

    return encode


def frame(tokenizer: Callable[..., Any]) -> tuple[list[int], list[int]]:
    """The special tokens that a Hugging Face tokenizer puts before and after a text.

    >>> frame(bert_tokenizer)
    ([101], [102])
    """
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []

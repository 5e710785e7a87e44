"""What the families share: any image becomes RGB, texts become whole windows, hub errors two lines."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from diag.errors import UnreadableInput, UserError
from diag.inputs.images import rgb
from diag.inputs.items import Inputs, Item
from diag.models.base import Sample
from diag.models.encoding import image_encoder, image_preparation, text_samples
from diag.models.loading import hub, quiet


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]
)
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert rgb(Image.new(mode, (5, 4))).mode == "RGB"


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 32768], [65535, 256]], dtype=np.uint16)
    assert np.asarray(rgb(Image.fromarray(values)))[..., 0].tolist() == [[0, 128], [255, 1]]


def test_transparent_pixels_show_no_hidden_colour() -> None:
    image = Image.new("RGBA", (1, 1), (200, 100, 50, 0))
    assert rgb(image).getpixel((0, 0)) == (0, 0, 0)
    image = Image.new("RGBA", (1, 1), (200, 100, 50, 255))
    assert rgb(image).getpixel((0, 0)) == (200, 100, 50)


def windows(text: str, seq_len: int | None, **options: object) -> list[list[int]]:
    inputs = Inputs("texts", "it", [Item("a", lambda: text), Item("short", lambda: "x")], "0")
    cut = text_samples(lambda t: [ord(c) for c in t], **{"context": 10, **options})
    return [sample.read() for sample in cut(inputs, seq_len)]


def test_windows_are_whole_adjacent_and_framed() -> None:
    assert windows("abcdefgh", 3) == [[97, 98, 99], [100, 101, 102]]
    assert windows("abcdefgh", 5, before=[1], after=[2]) == [[1, 97, 98, 99, 2], [1, 100, 101, 102, 2]]
    assert windows("abcdefghij", None) == [[*range(97, 107)]]
    assert len(windows("a" * 300, None, context=None)[0]) == 128


def test_an_image_is_prepared_once_and_its_errors_are_its_own() -> None:
    def transform(image: Image.Image) -> torch.Tensor:
        assert image.mode == "RGB"
        if image.width < 3:
            raise ValueError("too narrow\nfor this")
        return torch.ones(3, image.height, image.width) / 3

    prepare = image_preparation(transform, torch.bfloat16)
    prepared = prepare(Image.new("L", (5, 4)))
    assert (prepared.shape, prepared.dtype) == ((3, 4, 5), torch.bfloat16)
    assert prepare(prepared) is prepared
    with pytest.raises(UnreadableInput, match=r"^cannot preprocess the image: too narrow$"):
        prepare(Image.new("RGB", (2, 5)))
    samples = [Sample("image", lambda: Image.new("RGB", (5, 4))), Sample("prepared", lambda: prepared)]
    batch = image_encoder(prepare, "cpu")(samples)
    assert batch.ids == ("image", "prepared")
    assert torch.equal(batch.data, torch.stack([prepared, prepared]))


@pytest.mark.parametrize(
    ("seq_len", "options", "message", "tip"),
    [
        (11, {}, "--seq-len 11 is longer than the model's context", "use at most 10"),
        (2, {"before": [1], "after": [2]}, "leaves no room beside 2 special tokens", "use at least 3"),
        (9, {"fixed": True}, "takes exactly 10 tokens", "use --seq-len 10"),
    ],
)
def test_impossible_lengths(seq_len: int, options: dict[str, object], message: str, tip: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        windows("abcdefgh", seq_len, **options)
    assert error.value.tip == tip


def test_a_hub_miss_names_repository_file_and_command() -> None:
    with pytest.raises(UserError) as error, hub("org/name", "model.safetensors", revision="v1"):
        raise OSError("no") from LocalEntryNotFoundError("offline")
    message = "'model.safetensors' of 'org/name' is not on this machine and the hub cannot be reached"
    assert str(error.value) == message
    assert error.value.tip == "where there is a network: hf download org/name --revision v1"
    with pytest.raises(KeyError), hub("org/name", "x"):
        raise KeyError("something else")


def test_quiet_leaves_logging_as_it_was() -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.manager.disable)
    with quiet():
        logging.warning("not shown")
    assert (list(root.handlers), root.manager.disable) == before

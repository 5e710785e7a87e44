"""Diffusion transformers: what they are fed, which tokens are whose, what is told of what a folder lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import save_pipeline
from commands import Ended
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import diag
from diag.errors import UserError
from diag.models import load
from diag.models.base import Batch, Model, Sample, Tower
from diag.models.names.resolve import parse
from diag.results.caveats import NO_PROMPT, NOISE
from diag.results.collect import collect

CPU = {"device": "cpu", "dtype": torch.float32}
Folders = Callable[[str], Path]
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    for seed in range(2)
]


def loaded(name: object, **options: Any) -> Model:
    return load(parse(str(name), **options), **CPU)


def batch_of(tower: Tower, *images: Image.Image) -> Batch:
    return tower.encode([Sample.holding(f"image-{i}", image) for i, image in enumerate(images)])


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_pipeline(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


# --- which layers and tokens


@pytest.mark.parametrize(
    ("kind", "paths", "tokens", "image", "skipped"),
    [
        (  # image first; the second attention of SD3.5's blocks takes no place on the depth axis
            "sd3",
            ["transformer_blocks.0.attn", "transformer_blocks.1.attn", "transformer_blocks.2.attn"],
            16 + 333,
            slice(0, 16),
            {f"transformer_blocks.{i}.attn2": "over the image alone" for i in (0, 1)},
        ),
        (  # text first; two kinds of blocks are one depth
            "flux",
            [f"{kind}transformer_blocks.{i}.attn" for kind in ("", "single_") for i in (0, 1)],
            512 + 16,
            slice(512, 528),
            {},
        ),
        (  # text is read by cross-attention alone
            "pixart",
            ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
            16,
            slice(0, 16),
            {f"transformer_blocks.{i}.attn2": "16 queries over 300 keys: cross-attention" for i in (0, 1)},
        ),
        (  # its own attention has no softmax, the one over text has
            "sana",
            ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
            4,
            slice(0, 4),
            {f"transformer_blocks.{i}.attn2": "4 queries over 300 keys: cross-attention" for i in (0, 1)},
        ),
    ],
)
def test_blocks_are_one_depth_and_tokens_belong_to_their_stream(
    folder_of: Folders, kind: str, paths: list[str], tokens: int, image: slice, skipped: dict[str, str]
) -> None:
    tower = loaded(f"{folder_of(kind)},img_size=64").tower("vision")
    assert [(layer.index, layer.path) for layer in tower.layers] == list(enumerate(paths))
    assert [(place.index, place.why) for place in tower.places] == [(i, None) for i in range(len(paths))]
    assert tower.skipped.keys() == skipped.keys()
    assert all(why in tower.skipped[path] for path, why in skipped.items())
    sets = batch_of(tower, *IMAGES).sets
    expected = torch.zeros(2, tokens, dtype=torch.bool)
    expected[:, image] = True
    assert torch.equal(sets["image"], expected)
    assert tower.marks == (("image", "text") if tokens > 16 else ("image",))
    assert "text" not in sets or torch.equal(sets["text"], ~expected)
    assert (tower.facts["patch_size"], tower.facts["image_size"]) == (32 if kind == "sana" else 16, 64)
    assert {layer.form.mixer for layer in tower.layers} == {"linear" if kind == "sana" else "softmax"}


def test_streams_are_told_apart_by_content_and_not_by_where_they_stand(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model, whose calls have every token in another place: the sets go with them."""
    order = torch.randperm(349, generator=torch.Generator().manual_seed(0))
    back = order.argsort()

    def shuffled(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        joint = query.shape[2] == len(order)
        moved = [x[:, :, order] if joint else x for x in (query, key, value)]
        output = F.scaled_dot_product_attention(*moved, **given)
        return output[:, :, back] if joint else output

    class Torch:
        scaled_dot_product_attention = staticmethod(shuffled)

    plain = loaded(folder_of("sd3")).tower("vision")
    monkeypatch.setattr("diffusers.models.attention_processor.F", Torch)
    moved = loaded(folder_of("sd3")).tower("vision")
    for name in ("image", "text"):
        before, now = (batch_of(tower, IMAGES[0]).sets[name][0] for tower in (plain, moved))
        assert torch.equal(now, before[order])


def test_numbers_of_both_sets_are_those_of_the_formula(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax, A V and cosines in float64, of what was handed to attention, past the seam."""
    found = diag.probe(str(folder_of("sd3")), IMAGES[:1], metrics=["cos_y_vself"])
    table = found.layers.set_index(["layer", "tokens"])["mean"]
    given: list[tuple[Tensor, Tensor, Tensor]] = []
    real = F.scaled_dot_product_attention

    class Torch:
        @staticmethod
        def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            given.append((query, key, value))
            return real(query, key, value, **options)

    tower = loaded(folder_of("sd3")).tower("vision")
    batch = batch_of(tower, IMAGES[0])
    monkeypatch.setattr("diffusers.models.attention_processor.F", Torch)
    tower.forward(batch)
    joint = [call for call in given if call[0].shape[2] == 349]
    assert len(given) == 5
    assert len(joint) == 3
    for layer, (query, key, value) in enumerate(call for call in joint):
        query, key, value = query.double(), key.double(), value.double()
        pattern = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        cosine = F.cosine_similarity(pattern @ value, value, dim=-1)[0]  # [head, token]
        for name in ("image", "text"):
            mean = cosine[:, batch.sets[name][0]].mean()
            assert table[layer, name] == pytest.approx(float(mean), abs=1e-5)


# --- what is fed


def test_latents_are_mixed_with_noise_in_proportion_to_the_time_step(pipelines: Folders) -> None:
    folder = pipelines("flux")
    towers = {t: loaded(f"{folder},img_size=16,t={t}").tower("vision") for t in (0, 250, 1000)}
    packed = {t: batch_of(tower, IMAGES[0]).data["hidden_states"] for t, tower in towers.items()}
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    pixels = towers[0].prepare(IMAGES[0])
    assert pixels.shape == (3, 16, 16)
    assert -1 <= float(pixels.min()) < -0.1 < 0.1 < float(pixels.max()) <= 1
    clean = (vae.encode(pixels[None]).latent_dist.mode() - 0.1) * vae.config.scaling_factor
    # a token is 2 × 2 latents: [channel, row, column] -> [token, channel of each of the four]
    tokens = clean[0].reshape(4, 4, 2, 4, 2).permute(1, 3, 0, 2, 4).reshape(1, 16, 16)
    torch.testing.assert_close(packed[0], tokens, rtol=1e-5, atol=1e-5)
    mixed = 0.75 * packed[0] + 0.25 * packed[1000]
    torch.testing.assert_close(packed[250], mixed, rtol=1e-5, atol=1e-5)
    assert float(packed[1000].std()) == pytest.approx(1, abs=0.15)
    data = batch_of(towers[250], IMAGES[0]).data
    assert (data["timestep"].tolist(), data["guidance"].tolist()) == ([0.25], [3.5])
    assert data["img_ids"][5].tolist() == [0, 1, 1]


def test_the_scheduler_says_how_much_noise_there_is_where_it_does_not_flow(pipelines: Folders) -> None:
    folder = pipelines("pixart")
    kept = diffusers.DDPMScheduler().alphas_cumprod
    towers = {t: loaded(f"{folder},img_size=16,t={t}").tower("vision") for t in (0, 300, 1000)}
    data = {t: batch_of(tower, IMAGES[0]).data for t, tower in towers.items()}
    assert [int(one["timestep"][0]) for one in data.values()] == [0, 300, 999]
    ends = torch.stack([data[0]["hidden_states"], data[1000]["hidden_states"]]).flatten(1)
    shares = torch.tensor([[kept[i] ** 0.5, (1 - kept[i]) ** 0.5] for i in (0, 999)])
    of_image, of_noise = torch.linalg.solve(shares, ends)
    expected = kept[300] ** 0.5 * of_image + (1 - kept[300]) ** 0.5 * of_noise
    torch.testing.assert_close(data[300]["hidden_states"].flatten(), expected, rtol=1e-4, atol=1e-4)


def test_noise_belongs_to_its_image_and_not_to_its_batch(folder_of: Folders) -> None:
    tower = loaded(folder_of("sd3")).tower("vision")
    alone = [batch_of(tower, image).data["hidden_states"][0] for image in IMAGES]
    both = batch_of(tower, *IMAGES[::-1]).data["hidden_states"]
    assert torch.equal(both, torch.stack(alone[::-1]))
    assert not torch.equal(*alone)


@pytest.mark.parametrize(("kind", "tokens"), [("flux", 512), ("sd3", 77 + 256)])
def test_the_prompt_is_told_to_the_text_alone(pipelines: Folders, kind: str, tokens: int) -> None:
    folder = pipelines(kind)
    towers = [loaded(f"{folder},img_size=16{more}").tower("vision") for more in ("", ",prompt=a dog")]
    usual, other = (batch_of(tower, IMAGES[0]).data for tower in towers)
    assert [tower.facts["prompt"] for tower in towers] == ["a photograph", "a dog"]
    assert torch.equal(usual["hidden_states"], other["hidden_states"])
    for name in ("encoder_hidden_states", "pooled_projections"):
        assert not torch.equal(usual[name], other[name])
    assert usual["encoder_hidden_states"].shape == (1, tokens, 32)
    assert usual["pooled_projections"].shape == (1, 16)


def test_half_precision_is_measured(pipelines: Folders) -> None:
    found = diag.probe(
        f"{pipelines('pixart')},img_size=16", IMAGES, metrics=["cos_y_vself"], dtype="bfloat16"
    )
    plain = diag.probe(f"{pipelines('pixart')},img_size=16", IMAGES, metrics=["cos_y_vself"])
    assert set(found.layers["dtype"]) == {"bfloat16"}
    assert found.layers["mean"].tolist() == pytest.approx(plain.layers["mean"].tolist(), abs=0.05)


# --- what is told


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ([], "given"),
        (["vae"], NOISE),
        (["text_encoder", "text_encoder_2"], NO_PROMPT),
        (["text_encoder_2", "vae"], f"{NOISE}, {NO_PROMPT}"),
    ],
)
def test_what_a_pipeline_lacks_is_a_caveat(
    pipelines: Folders, tmp_path: Path, attnbias: Callable[..., Ended], lost: list[str], said: str
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(pipelines("flux"), folder)
    for part in lost:
        shutil.rmtree(folder / part)
    size = 64 if "vae" in lost else 16
    ended = attnbias(
        *("probe", "-m", f"{folder},img_size={size},t=100", "--images", "demo", "--limit", "2"),
        *("--metrics", "cos_y_vself", "-o", "run"),
    )
    assert ended.code == 0, ended.err
    table = collect([Path("run")])
    assert set(table.layers["inputs"]) == {said}
    assert set(table.layers["tokens"]) == {"image", "text"}
    assert all(label.endswith(said) == (said != "given") for label in table.labels)
    (entry,) = json.loads(Path("run/manifest.json").read_text())["models"]
    assert entry["resolved"] == f"diffusers:{folder},img_size={size},t=100"
    assert (entry["t"], entry["prompt"]) == (100, None if NO_PROMPT in said else "a photograph")
    assert ("no VAE" in " ".join(entry["notes"])) == (NOISE in said)


def test_stable_diffusion_3_goes_without_its_largest_encoder(pipelines: Folders, tmp_path: Path) -> None:
    shutil.copytree(pipelines("sd3"), tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder" / "text_encoder_3")
    tower = loaded(f"{tmp_path / 'folder'},img_size=16").tower("vision")
    states = batch_of(tower, IMAGES[0]).data["encoder_hidden_states"][0]
    assert (tower.facts["prompt"], tower.facts["instead"]) == ("a photograph", None)
    assert (states != 0).any(1).tolist() == [True] * 77 + [False] * 256


def told(name: object, **options: Any) -> UserError:
    with pytest.raises(UserError) as error:
        loaded(name, **options)
    assert "\n" not in str(error.value)
    assert error.value.tip
    return error.value


@pytest.mark.parametrize(
    ("arguments", "why", "tip"),
    [
        (",t=1001", "t is 1001, not a time step", "from 0 (the image) to 1000 (noise)"),
        (",t=half", "t is 'half', not a time step", "t=500"),
        (",t=true", "t is True, not a time step", "t=500"),
        (",time=3", "does not take the argument 'time'", "own options"),
        (",img_size=40", "40 px is not a multiple of the patch size 16", "img_size=32 or img_size=48"),
        (",img_size=256", "fails on images of 256 px", "img_size=64"),
        (",prompt=a dog", "has no text encoders", "leave prompt out"),
        (",checkpoint=x.safetensors", "--checkpoint does not go with", "-m diffusers:FOLDER"),
    ],
)
def test_arguments_are_checked(folder_of: Folders, arguments: str, why: str, tip: str) -> None:
    error = told(f"{folder_of('sd3')}{arguments}")
    assert why in str(error)
    assert tip in (error.tip or "")


def test_what_cannot_be_read_or_run_is_told(
    folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(folder_of("pixart"), folder)
    weights = diffusers.PixArtTransformer2DModel.from_pretrained(folder).state_dict()
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: x for name, x in weights.items() if name != "proj_out.bias"}, file)
    assert "lack 'proj_out.bias': they would be random" in str(told(folder))
    file.write_bytes(b"no weights")
    assert "the transformer of" in str(told(folder))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert "the transformer of" in str(told(folder))
    random = loaded(folder, random_init=True)
    assert random.facts["weights"] == "random"
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    error = told(f"diffusers:{folder}")
    assert "holds a UNet2DConditionModel, which is not measured" in str(error)
    assert error.tip == "measured are 'Stable Diffusion 3', 'Flux', 'PixArt' or 'Sana'"
    assert "names no model_type" in str(told(folder))  # without the prefix it is no folder of this family
    (folder / "config.json").write_text("{")
    assert "it is not JSON" in str(told(f"diffusers:{folder}"))
    assert "cannot be reached" in str(told("diffusers:org/name"))
    monkeypatch.setattr("diag.errors.find_spec", lambda name: None)
    assert told(folder_of("pixart")).tip == 'pip install "attnbias[diffusers]"'


def test_two_time_steps_of_one_model_are_a_controlled_comparison(
    pipelines: Folders, attnbias: Callable[..., Ended]
) -> None:
    name = f"{pipelines('pixart')},img_size=16"
    given = ("--images", "demo", "--limit", "2", "--metrics", "cos_y_vself", "-o", "run")
    probed = attnbias("probe", "-m", f"{name},t=100", "-m", f"{name},t=900", *given)
    assert probed.code == 0, probed.err
    compared = attnbias("compare", "run", "-o", "compared")
    assert compared.code == 0, compared.err
    said = " ".join(compared.out.split())
    assert "Of patch size, image size, T, weights and time step only time step differs." in said

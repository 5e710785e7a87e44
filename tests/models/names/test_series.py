"""Series: their names exist, every vision member has the tokens that the data file lists, and they run."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import open_clip
import pandas as pd
import pytest
import timm
import torch
from commands import Ended
from safetensors.torch import load_file, save_file

from diag.errors import UserError
from diag.inputs.items import Inputs
from diag.models import load
from diag.models.base import Tower
from diag.models.names.resolve import parse
from diag.models.names.series import Series, find, listing, members, names

Attnbias = Callable[..., Ended]

PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
SERIES = [find(name) for name in names()]
VISION = [series for series in SERIES if series.tokens]
TEXT = [series for series in SERIES if not series.tokens]
REGISTERED = [
    (series, member, tokens)
    for series in VISION
    for member, tokens in zip(series.members, series.tokens, strict=True)
    if "hf-hub:" not in member and not member.startswith("demo:")
]
ON_THE_HUB = [
    (member, tokens)
    for series in VISION
    for member, tokens in zip(series.members, series.tokens, strict=True)
    if "hf-hub:" in member
]


# --- the data file


def test_the_series_of_the_documentation_are_there() -> None:
    wanted = "demo augreg-s augreg-b dino-s dino-b flexivit-b openvision-s openvision-b clip-datacomp"
    wanted += " siglip2-b16 paligemma gpt2 pythia qwen3 pythia-steps-160m pythia-steps-160m-short"
    assert set(wanted.split()) <= set(names())
    assert len(names()) == len(set(names())) == 30


@pytest.mark.parametrize("series", SERIES, ids=lambda series: series.name)
def test_every_series_is_whole(series: Series) -> None:
    assert len(series.members) == len(set(series.members)) >= 2
    assert len(series.tokens) in (0, len(series.members))
    for text in (series.constant, series.varies, series.control):
        assert len(text) > 5
        assert "{" not in text
        assert "#" not in text
    assert series.control.endswith(".")
    for member in series.members[:: max(1, len(series.members) // 12)]:
        assert parse(member).given == member


@pytest.mark.parametrize("size", ["70m", "160m", "12b"])
def test_steps_of_pythia(size: str) -> None:
    found = members(f"pythia-steps-{size}")
    steps = [int(name.rpartition("@step")[2]) for name in found]
    assert len(steps) == 154
    assert steps[:13] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000]
    assert steps[-1] == 143000
    assert steps == sorted(set(steps))
    assert parse(found[3]).resolved == f"hf:EleutherAI/pythia-{size}@step4"
    short = members(f"pythia-steps-{size}-short")
    assert set(short) <= set(found)
    assert (short[0], short[-1]) == (found[0], found[-1])


def test_flexivit_covers_every_patch_size_that_fills_240_pixels() -> None:
    sizes = [parse(name).model_args["patch_size"] for name in members("flexivit-b")]
    assert sizes == [48, 40, 30, 24, 20, 16, 15, 12, 10, 8]
    assert [(240 // size) ** 2 for size in sizes] == list(find("flexivit-b").tokens)


def test_an_unknown_series_has_near_names() -> None:
    with pytest.raises(UserError, match="there is no series 'augreg-x'") as error:
        members("augreg-x")
    assert "'augreg-" in (error.value.tip or "")
    with pytest.raises(UserError) as error:
        find("qqqqqq")
    assert "series are 'demo', 'augreg-s'" in (error.value.tip or "")


def test_a_listing_can_be_narrowed_by_series_and_by_member() -> None:
    assert [row["name"] for row in listing()] == names()
    assert [row["name"] for row in listing("dino")] == ["dino-s", "dino-b"]
    assert [row["name"] for row in listing("siglip gap")] == ["paligemma"]
    assert listing("no such series") == []


# --- the names exist, and so do the tokens


def test_timm_has_every_name_with_its_weights() -> None:
    published = set(timm.list_pretrained())
    asked = {
        parse(member).name for series in SERIES for member in series.members if member.startswith("timm:")
    }
    assert len(asked) == 17
    assert asked <= published


def test_open_clip_has_every_name_with_its_weights() -> None:
    published = {f"{name}/{tag}" for name, tag in open_clip.list_pretrained()}
    asked = [member.removeprefix("open_clip:") for member in members("clip-datacomp")]
    assert set(asked) <= published


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are built on the meta device: shapes without values, so there is none to check or to hash."""
    of_timm, of_open_clip = timm.create_model, open_clip.create_model

    def create_timm(*args: object, **kwargs: object) -> torch.nn.Module:
        with torch.device("meta"):
            return of_timm(*args, **kwargs)

    def create_open_clip(*args: object, **kwargs: object) -> torch.nn.Module:
        with torch.device("meta"):
            return of_open_clip(*args, **{**kwargs, "device": "meta"})

    monkeypatch.setattr(timm, "create_model", create_timm)
    monkeypatch.setattr(open_clip, "create_model", create_open_clip)
    monkeypatch.setattr("diag.models.loading.refuse_non_finite", lambda module, source: None)
    monkeypatch.setattr("diag.models.weights.digest", lambda module: "")


def tokens_of(tower: Tower, photographs: Inputs) -> int:
    """Tokens that the first attention layer reads, in a forward pass without values."""
    seen: list[int] = []
    hook = tower.layers[0].module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].shape[1]),
        with_kwargs=True,
    )
    try:
        tower.forward(tower.encode([next(tower.samples(photographs, None))]))
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("series", "member", "tokens"), REGISTERED, ids=[member for _, member, _ in REGISTERED]
)
def test_every_member_has_the_tokens_that_are_listed(
    series: Series, member: str, tokens: int, photographs: Inputs, weightless: None
) -> None:
    spec = parse(member, random_init=True)
    tower = load(spec, device="meta", dtype=torch.float32).tower("vision")
    assert tokens_of(tower, photographs) - len(tower.prefix) == tokens
    assert (tower.facts["image_size"] // tower.facts["patch_size"]) ** 2 == tokens
    assert tower.prefix == (() if "siglip" in member else ("cls",))


@pytest.mark.parametrize(("member", "tokens"), ON_THE_HUB, ids=[member for member, _ in ON_THE_HUB])
def test_members_on_the_hub_have_the_tokens_of_their_names(
    member: str, tokens: int, photographs: Inputs, weightless: None, tmp_path: Path
) -> None:
    """OpenVision is in no registry: this builds the geometry of its published configs from the name."""
    size, patch, image = re.fullmatch(r".*-vit-(\w+)-patch(\d+)-(\d+)", member).groups()  # type: ignore[union-attr]
    width = {"small": 384, "base": 768}[size]
    vision = {"image_size": int(image), "patch_size": int(patch), "width": width, "layers": 12}
    vision |= {"head_width": 64, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
    text = {"context_length": 80, "vocab_size": 32000, "width": width, "heads": width // 64, "layers": 12}
    config = {"model_cfg": {"embed_dim": width, "vision_cfg": vision, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    spec = parse(f"open_clip:local-dir:{tmp_path}", random_init=True)
    tower = load(spec, device="meta", dtype=torch.float32).tower("vision")
    assert tokens_of(tower, photographs) - len(tower.prefix) == tokens


@pytest.mark.network
@pytest.mark.skipif("ATTNBIAS_NETWORK" not in os.environ, reason="needs the hub; set ATTNBIAS_NETWORK=1")
@pytest.mark.parametrize("member", [members("openvision-s")[0], members("openvision-b")[3]])
def test_openvision_is_on_the_hub(member: str, photographs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are in no library's registry, so only the hub knows whether they exist."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    tower = load(parse(member), device="cpu", dtype=torch.float32).tower("vision")
    series = find("openvision-s" if "small" in member else "openvision-b")
    expected = series.tokens[series.members.index(member)]
    calls: list = []
    with torch.inference_mode(), tower.capture(tower.layers, calls.append):
        tower.forward(tower.encode([next(tower.samples(photographs, None))]))
    assert calls[0].tokens - len(tower.prefix) == expected


def test_flexivit_resamples_what_is_stored_and_says_so(tmp_path: Path) -> None:
    """The series' geometry with a made checkpoint in place of the published one."""
    torch.manual_seed(0)
    small = {"embed_dim": 48, "depth": 1, "num_heads": 3}
    module = timm.create_model("flexivit_base", **small)
    module.pos_embed.data.normal_()
    file = tmp_path / "flexivit.pt"
    torch.save(module.state_dict(), file)
    options = [f"{key}={value}" for key, value in small.items()]
    for member, tokens in zip(members("flexivit-b"), find("flexivit-b").tokens, strict=True):
        patch = parse(member).model_args["patch_size"]
        name = f"timm:flexivit_base,checkpoint={file},patch_size={patch}"
        model = load(parse(name, model_args=options), device="cpu", dtype=torch.float32)
        assert model.module.pos_embed.shape[1] == tokens
        kernel = model.module.patch_embed.proj.weight
        expected = timm.layers.resample_patch_embed(module.patch_embed.proj.weight, [patch, patch])
        assert torch.equal(kernel, expected)
        facts = model.tower("vision").facts
        same = patch == 16
        assert (facts["positions"], facts["patch_embedding"]) == (
            ("native", "native") if same else ("interpolated", "resampled")
        )
        said = " ".join(model.notes)
        assert ("FlexiViT was trained so" in said) is not same
        assert ("lossy" in said) is (patch < 16)
        assert ("exact upward" in said) is (patch > 16)


def test_steps_of_one_model_are_revisions_of_one_repository(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps in a made hub cache: each name loads its own weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--EleutherAI--pythia-70m"
    hashes = set()
    for place, member in enumerate(members("pythia-steps-70m")[:2]):
        commit = str(place) * 40
        shutil.copytree(folder_of("neox"), repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / parse(member).revision).write_text(commit)  # type: ignore[operator]
        weights = repository / "snapshots" / commit / "model.safetensors"
        save_file(
            {key: value * (place + 1) for key, value in load_file(weights).items()}, weights, {"format": "pt"}
        )
        model = load(parse(member), device="cpu", dtype=torch.float32)
        assert (model.facts["commit"], model.facts["revision"]) == (commit, f"step{place}")
        assert len(model.tower("text").layers) == 2
        hashes.add(model.facts["weights_sha256"])
    assert len(hashes) == 2


# --- on the command line


def test_a_series_is_measured_like_its_members(attnbias: Attnbias) -> None:
    given = ("--images", "demo", "--limit", 2, "--metrics", "cos_y_vself", "--layers", "0,11", "-o", "run")
    ended = attnbias("probe", "--series", "augreg-s", "--random-init", *given)
    assert ended.code == 0, ended.err
    table = pd.read_csv("run/layers.csv")
    assert list(table["model"].unique()) == members("augreg-s")
    assert list(table["n_tokens"].unique()) == [50, 197]
    assert list(table["patch_size"].unique()) == [32, 16]
    for entry in json.loads(Path("run/manifest.json").read_text())["models"]:
        assert (entry["positions"], entry["patch_embedding"]) == ("native", "native")


def test_series_and_models_go_together(attnbias: Attnbias, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diag.run.forecast.forecast", lambda *given: {})  # loads every model
    ended = attnbias("probe", "-m", "demo:vit-p8,img_size=128", "--series", "demo", "--dry-run", "--json")
    assert list(json.loads(ended.out)["models"]) == ["demo:vit-p8,img_size=128", *members("demo")]
    ended = attnbias("probe", "--series", "flexivit-b", "--series", "demo", "-m", "demo:vit-p8", "--dry-run")
    assert (ended.code, ended.out.count("model  ")) == (0, 13)
    ended = attnbias("probe", "--series", "augreg", "--dry-run")
    assert (ended.code, ended.out) == (2, "")
    assert ended.lines[0] == "error: there is no series 'augreg'"
    assert "'augreg-s'" in ended.lines[1]


def test_without_a_model_or_a_series_both_are_named(attnbias: Attnbias) -> None:
    ended = attnbias("probe", "--images", "demo")
    assert ended.code == 2
    assert ended.lines == [
        "error: name what to measure with -m/--model NAME or --series NAME",
        "tip: for example -m demo:vit-p8, or --series demo; attnbias probe --help shows more",
    ]


def test_series_are_listed_on_eighty_columns(attnbias: Attnbias) -> None:
    ended = attnbias("models", "--series")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert max(map(len, [*lines, *ended.lines])) <= 80
    said = " ".join(" ".join(lines).split())
    for series in SERIES:
        assert series.name in said
        assert series.control in said
    assert "3 models · patch size 32, 16, 8 · 49, 196, 784 patch tokens" in said


def test_one_series_is_listed_with_its_members(attnbias: Attnbias) -> None:
    ended = attnbias("models", "augreg-b", "--series")
    assert "  timm:vit_base_patch8_224.augreg_in21k     784 patch tokens" in ended.out.splitlines()
    ended = attnbias("models", "--series", "gpt2")
    assert ended.out.splitlines()[-4:] == ["  gpt2", "  gpt2-medium", "  gpt2-large", "  gpt2-xl"]
    ended = attnbias("models", "--series", "pythia-steps-160m")
    assert ended.out.splitlines()[-1] == "  and 130 more, to pythia-160m@step143000 (--json lists all)"
    rows = json.loads(attnbias("models", "--series", "pythia-steps-160m", "--json").out)
    assert {row["name"]: len(row["members"]) for row in rows} == {
        "pythia-steps-160m": 154,
        "pythia-steps-160m-short": 10,
    }
    ended = attnbias("models", "--series", "pithia")
    assert (ended.code, ended.lines[0]) == (2, "error: there is no series 'pithia'")
    assert "'pythia'" in ended.lines[1]


# --- the documentation


def rows_of_the_page() -> list[str]:
    """The table of series as the page shows it; series that differ in nothing but their model share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for series in SERIES:
        tokens = ", ".join(map(str, series.tokens)) or "text"
        told = (str(len(series.members)), series.varies, tokens, series.control)
        rows.setdefault(told, []).append(f"`{series.name}`")
    return [f"| {' | '.join([', '.join(found), *told])} |" for told, found in rows.items()]


def test_the_page_lists_every_series() -> None:
    rows = "\n".join(rows_of_the_page())
    assert rows in PAGE, f"put this table into docs/models.md:\n{rows}"
    assert all(f"`{name}`" in PAGE for name in names())

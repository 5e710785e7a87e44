"""One token of one input: against dense float64 computations, between grids, and from the command line."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoints import save_language_model, save_vision_model
from commands import Ended
from PIL import Image
from reference import CASES, OTHER_TOKENS, dense_pattern, dense_visible, float64, make_call, with_maps
from torch import nn

from diag.attention.call import AttentionCall
from diag.errors import UserError
from diag.measure.loop import capture
from diag.metrics.default import METRICS, Selection, readings_of
from diag.models import load
from diag.models.base import Sample
from diag.models.hooks.depth import Place
from diag.models.hooks.layers import Layer
from diag.models.names.resolve import parse
from diag.results.caveats import COLUMNS
from diag.results.writing import write as write_table
from diag.run.plan import ProbePlan
from diag.show.report.attended import read_attended, section_of
from diag.studies.attend import Attended, AttendPlan, attend, folder_of, read, run_attend, write
from diag.studies.attend.grid import Grid
from diag.studies.attend.measure import chosen_layer, picture_of
from diag.studies.attend.row import NUMBERS, row_of
from diag.studies.writeup.captions import look_settings

ASTRONAUT = {"image": "demo:astronaut", "layer": -1, "patch": (1, 2)}
SENTENCE = "the cat sat on the mat and the dog ran after the cat"
SHARED = [name for name in NUMBERS if name in METRICS]
"""What a probe measures as well."""


# --- the dense reference: from the formulas, with the whole pattern, in float64


def dense_row(call: AttentionCall, row: int, among: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers of one row of a call whose batch is one, one head at a time: name -> `[head, …]`."""
    pattern, visible = dense_pattern(call)[0], dense_visible(call)[0]
    found: dict[str, list[object]] = {name: [] for name in ("weight", "value_cosine", *NUMBERS)}
    for head in range(call.heads):
        v = float64(call.value)[0, head // call.group]
        a, seen = pattern[head, row], visible[head, row]
        outside = (
            np.zeros(v.shape)
            if call.outside is None
            else float64(call.outside.expand_as(call.output))[0, head]
        )
        y = a[seen] @ v[seen] + outside[row]
        cosine = np.array([np.dot(x, v[row]) / norms(x, v[row]) for x in v])
        own = v[row] / np.linalg.norm(v[row])
        z = y - np.dot(y, own) * own
        partners = [j for j in np.flatnonzero(seen & among) if j != row]
        with_own = v[np.flatnonzero(seen & among)]
        null = np.mean([np.dot(y, v[j]) / norms(y, v[j]) for j in partners]) if partners else np.nan
        bias, part = np.dot(y, own) / np.linalg.norm(y), a[row] * np.linalg.norm(v[row]) / np.linalg.norm(y)
        others = sum(a[j] * v[j] for j in np.flatnonzero(seen) if j != row) + outside[row]
        context = np.dot(others, own) / np.linalg.norm(y)
        uniform = a[seen].sum() * with_own.mean(0) + outside[row]
        numbers = {
            "weight": np.where(seen, a, np.nan),
            "value_cosine": np.where(seen, cosine, np.nan),
            "cos_y_vself": bias,
            "self_part": part,
            "context_part": context,
            "cos_y_vpartner": null,
            "cos_y_vuniform": np.dot(uniform, own) / np.linalg.norm(uniform),
            "excess": bias - null,
            "removed_energy": 1 - np.dot(z, z) / np.dot(y, y),
            "self_weight": a[row],
            "output_norm": np.linalg.norm(y),
            "projection": np.dot(y, own),
            "exclusive_norm": np.linalg.norm(z),
            "value_norm": np.linalg.norm(v[row]),
        }
        for name, value in numbers.items():
            found[name].append(value)
    return {name: np.array(values) for name, values in found.items()}


def norms(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.linalg.norm(x) * np.linalg.norm(y))


def of_one_input(call: AttentionCall) -> AttentionCall:
    """The first row of a call's batch."""
    from dataclasses import replace

    def first(x: torch.Tensor | None) -> torch.Tensor | None:
        return x if x is None or x.ndim < 4 or x.shape[0] == 1 else x[:1]

    names = ("query", "key", "value", "output", "mask", "pattern", "outside")
    cut = {name: first(getattr(call, name)) for name in names}
    lse = call.log_normaliser
    return replace(call, **cut, log_normaliser=None if lse is None else lse[:1])


def captured(plan: AttendPlan, number: int = 0) -> tuple[AttentionCall, np.ndarray]:
    """The call that a plan looks at, and its default token set, by the probe's route."""
    spec = parse(
        plan.models[number], model_args=plan.model_args, random_init=plan.random_init, checkpoint=None
    )
    torch.manual_seed(0)
    tower = load(spec, device="cpu", dtype=torch.float32).tower(plan.tower)
    item = next(iter(plan.inputs()))
    samples = (
        [Sample(item.id, item.read)] if plan.image else [next(tower.samples(plan.inputs(), plan.seq_len))]
    )
    layers = [layer.index for layer in tower.layers]
    assert plan.layer is not None
    (call,) = capture(tower, tower.encode(samples), [layers[plan.layer]])
    return call, tower.tokens_in(tower.token_sets[0], call.tokens).numpy()


def assert_is_dense(found: Attended, call: AttentionCall, among: np.ndarray, model: str) -> None:
    tokens = found.tokens[found.tokens["model"] == model]
    heads = found.decomposition[found.decomposition["model"] == model].set_index("head")
    target = int(np.flatnonzero(tokens["is_target"])[0])
    dense = dense_row(call, target, among)
    head = tokens["head"].iloc[0]
    for name in ("weight", "value_cosine"):
        expected = dense[name].mean(0) if head == "mean" else dense[name][int(head)]
        np.testing.assert_allclose(tokens[name].to_numpy(float), expected, atol=1e-6)
    for name in NUMBERS:
        np.testing.assert_allclose(
            heads.loc[[str(h) for h in range(call.heads)], name], dense[name], atol=2e-6
        )
        assert heads.loc["mean", name] == pytest.approx(dense[name].mean(), abs=2e-6)


# --- one row


@pytest.mark.parametrize(
    "case",
    [
        "full",
        "causal",
        "group of 2",
        "group of 4",
        "group of 2, left padding",
        "group of 2, bias",
        "bias and -inf",
        "mask per head, unseen keys; pattern given",
        "causal left padding; log-normaliser given",
        "wider values",
        "full; sinks",
        "group of 2, bias; other keys",
        "causal left padding; mixed heads",
    ],
)
def test_a_row_is_what_dense_attention_says(case: str) -> None:
    call = of_one_input(CASES[case])
    among = np.arange(call.tokens) % 3 != 1
    seen = dense_visible(call)[0]
    for row in np.flatnonzero(among & seen.any(-1).all(0))[-3:]:
        if not seen[:, row, row].all():
            continue
        found, dense = row_of(call, int(row), torch.from_numpy(among)), dense_row(call, int(row), among)
        np.testing.assert_array_equal(~np.isnan(found.weight), seen[:, row])
        np.testing.assert_allclose(found.weight, dense["weight"], atol=1e-6)
        np.testing.assert_allclose(found.value_cosine, dense["value_cosine"], atol=1e-6)
        for name in NUMBERS:
            np.testing.assert_allclose(found.numbers[name], dense[name], atol=3e-6, err_msg=name)


def test_a_row_of_added_maps_has_no_uniform_null_and_all_else() -> None:
    call = with_maps(make_call(batch=1), -0.4)
    among = np.ones(call.tokens, dtype=bool)
    found, dense = row_of(call, 5, torch.from_numpy(among)), dense_row(call, 5, among)
    np.testing.assert_allclose(found.weight, dense["weight"], atol=1e-6)
    for name in NUMBERS:
        expected = np.full(call.heads, np.nan) if name == "cos_y_vuniform" else dense[name]
        np.testing.assert_allclose(found.numbers[name], expected, atol=3e-6, err_msg=name)


def test_a_row_of_other_tokens_keys_is_refused() -> None:
    call = replace(OTHER_TOKENS["as many keys"], layer=3)
    with pytest.raises(UserError, match=r"^layer 'layer' attends to keys that are not its tokens' own"):
        row_of(call, 5, torch.ones(13, dtype=torch.bool))


@pytest.mark.parametrize(
    "case", ["full", "causal", "group of 2", "group of 2, bias", "group of 2, bias; other keys"]
)
def test_a_row_agrees_with_the_metrics_of_a_probe(case: str) -> None:
    call = of_one_input(CASES[case])
    among = torch.arange(call.tokens) % 3 != 1
    expected = readings_of(Selection(call, among[None]), SHARED)
    found = row_of(call, 6, among)
    for name in SHARED:
        reading = expected[name]
        assert bool((reading.weights.expand(1, call.heads, -1)[0, :, 6] > 0).all())
        np.testing.assert_allclose(found.numbers[name], reading.values[0, :, 6], atol=2e-6, err_msg=name)


def test_the_parts_of_a_row_add_up() -> None:
    call = of_one_input(CASES["group of 2"])
    numbers = row_of(call, 4, torch.ones(call.tokens, dtype=torch.bool)).numbers
    np.testing.assert_allclose(
        numbers["projection"] ** 2 + numbers["exclusive_norm"] ** 2, numbers["output_norm"] ** 2, rtol=1e-12
    )
    np.testing.assert_allclose(
        numbers["self_part"] + numbers["context_part"], numbers["cos_y_vself"], rtol=1e-12
    )


def test_the_wrong_value_head_would_be_seen() -> None:
    """A negative control of the comparisons above: values by another grouping do not rebuild the output."""
    from dataclasses import replace

    call = of_one_input(CASES["group of 2"])
    with pytest.raises(UserError, match="A V rebuilt from the call differs"):
        row_of(replace(call, value=call.value.flip(1)), 4, torch.ones(call.tokens, dtype=torch.bool))


def test_a_token_that_sees_only_itself_has_no_partner() -> None:
    call = of_one_input(CASES["causal"])
    numbers = row_of(call, 0, torch.ones(call.tokens, dtype=torch.bool)).numbers
    assert np.isnan(numbers["cos_y_vpartner"]).all()
    np.testing.assert_allclose(numbers["cos_y_vself"], 1, atol=1e-6)
    np.testing.assert_allclose(numbers["context_part"], 0, atol=1e-6)


# --- models


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language model whose 4 query heads share 2 value heads."""
    return f"hf:{save_language_model(tmp_path_factory.mktemp('llama'), 'llama')}"


@pytest.mark.parametrize("head", [None, 2])
def test_patches_of_demo_models_are_dense_attention(head: int | None) -> None:
    plan = AttendPlan(models=("demo:vit-p16", "demo:vit-p8"), head=head, **ASTRONAUT)
    found = attend(plan)
    for number, model in enumerate(plan.models):
        assert_is_dense(found, *captured(plan, number), model)
    assert set(found.tokens["head"]) == {"mean" if head is None else "2"}
    assert found.failed == {}


def test_the_mean_over_heads_is_the_mean_of_the_heads() -> None:
    given = {"models": ("demo:vit-p16",), **ASTRONAUT}
    heads = [attend(AttendPlan(head=head, **given)).tokens for head in range(3)]
    mean = attend(AttendPlan(**given)).tokens
    for name in ("weight", "value_cosine"):
        np.testing.assert_allclose(mean[name], np.mean([head[name] for head in heads], axis=0), atol=1e-12)
    assert mean["weight"].sum() == pytest.approx(1, abs=1e-5)
    assert np.abs(heads[0]["weight"] - heads[1]["weight"]).max() > 0.01


def test_registers_and_class_token_are_told_from_patches() -> None:
    arguments = ("img_size=56", "depth=2", "embed_dim=32", "num_heads=4")
    plan = AttendPlan(
        models=("timm:vit_small_patch14_reg4_dinov2",), model_args=arguments, random_init=True, **ASTRONAUT
    )
    torch.manual_seed(0)
    found = attend(plan)
    tokens = found.tokens
    assert list(tokens["kind"]) == ["cls"] + ["registers"] * 4 + ["patch"] * 16
    assert tokens["row"].isna().tolist() == [True] * 5 + [False] * 16
    target = tokens[tokens["is_target"]].iloc[0]
    assert (target["token"], target["row"], target["col"]) == (5 + 1 * 4 + 2, 1, 2)
    assert_is_dense(found, *captured(plan), plan.models[0])


def test_values_are_those_of_the_module_itself() -> None:
    """Without the seam: queries, keys and values read off the module's own projection."""
    plan = AttendPlan(models=("demo:vit-p8",), head=1, **ASTRONAUT)
    model = load(parse("demo:vit-p8"), device="cpu", dtype=torch.float32)
    tower, seen = model.towers["vision"], {}
    attention = tower.layers[-1].module
    qkv = attention.qkv
    assert isinstance(qkv, nn.Module)
    handle = qkv.register_forward_hook(lambda module, given, out: seen.update(out=out.detach().double()))
    item = next(iter(plan.inputs()))
    tower.forward(tower.encode([Sample(item.id, item.read)]))
    handle.remove()
    q, k, v = seen["out"].reshape(65, 3, 3, 32).permute(1, 2, 0, 3)[:, 1].numpy()
    scores = q[11] @ k.T / np.sqrt(32)  # row 1, column 2 behind the class token
    weight = np.exp(scores - scores.max())
    tokens = attend(plan).tokens
    np.testing.assert_allclose(tokens["weight"], weight / weight.sum(), atol=1e-6)
    cosine = v @ v[11] / np.linalg.norm(v, axis=1) / np.linalg.norm(v[11])
    np.testing.assert_allclose(tokens["value_cosine"], cosine, atol=1e-6)


@pytest.mark.parametrize("head", [None, 3])
def test_a_causal_model_sees_what_came_before(llama: str, head: int | None) -> None:
    plan = AttendPlan(models=(llama,), text=SENTENCE, layer=1, token=5, head=head, seq_len=9)
    found = attend(plan)
    tokens = found.tokens
    assert tokens["weight"].notna().tolist() == [True] * 6 + [False] * 3
    assert (
        tokens["value_cosine"].isna().tolist() == tokens["rank"].isna().tolist() == [False] * 6 + [True] * 3
    )
    assert sorted(tokens["rank"].dropna()) == [1, 2, 3, 4, 5, 6]
    assert tokens.loc[tokens["rank"] == 1, "weight"].iloc[0] == tokens["weight"].max()
    assert set(found.decomposition["n_visible"]) == {6}
    assert SENTENCE.startswith("".join(tokens["text"]))
    assert_is_dense(found, *captured(plan), llama)
    assert found.models[0]["kv_heads"] == 2
    assert found.models[0]["heads"] == 4


def test_a_short_text_is_looked_at_whole(llama: str) -> None:
    short = attend(AttendPlan(models=(llama,), text="the cat sat", layer=0, token=-1))
    assert "".join(short.tokens["text"]) == "the cat sat"
    assert short.tokens["is_target"].tolist()[-1]
    assert short.tokens["input"].iloc[0] == "text"


@pytest.mark.parametrize("text", ["the cat sat " * 40, "~nobody-of-this-name the cat", "the\0cat"])
def test_a_text_that_cannot_name_a_file_is_a_text(text: str) -> None:
    plan = AttendPlan(models=("demo:lm",), text=text, layer=0, token=0)
    (item,) = plan.inputs()
    assert item.read() == text


def test_both_directions_see_the_special_tokens(tmp_path: Path) -> None:
    bert = f"hf:{save_language_model(tmp_path, 'bert')}"
    tokens = attend(AttendPlan(models=(bert,), text=SENTENCE, layer=0, token=2)).tokens
    assert tokens["weight"].notna().all()
    assert tokens["text"].iloc[0] == "<s>"


def test_layers_count_from_the_end_and_by_depth() -> None:
    base = {"models": ("demo:vit-p16",), "image": "demo:moon", "patch": (0, 0)}
    layers = {
        name: attend(AttendPlan(**base, **given)).models[0]["layer"]  # type: ignore[arg-type]
        for name, given in {"last": {"layer": -1}, "first": {"layer": -6}, "middle": {"depth": 0.5}}.items()
    }
    assert layers == {"last": 5, "first": 0, "middle": 3}


def test_depth_is_that_of_the_model_where_layers_are_not_measured() -> None:
    model = load(parse("demo:vit-p16"), device=torch.device("cpu"), dtype=torch.float32)
    places = tuple(
        Place(i, f"layers.{i}", 0, None if i in (3, 7) else "no softmax attention") for i in range(8)
    )
    layers = tuple(Layer(place.index, place.path, nn.Identity()) for place in places if place.why is None)
    tower = replace(model.towers["vision"], layers=layers, places=places)
    found = [chosen_layer(model, tower, None, depth).index for depth in (0, 0.5, 5 / 7, 0.75, 1)]
    assert found == [3, 3, 7, 7, 7]
    assert chosen_layer(model, tower, -5, None).index == 3
    with pytest.raises(
        UserError, match=r"'demo:vit-p16': layer 4 \('layers.4'\) is not measured: no softmax"
    ):
        chosen_layer(model, tower, 4, None)


# --- targets and pictures


def test_a_patch_keeps_its_place_in_another_grid() -> None:
    coarse, fine = Grid("a", 64, 64, 4, 4), Grid("b", 224, 224, 14, 14)
    assert coarse.centre((1, 2)) == (Fraction(5, 8), Fraction(3, 8))
    assert fine.patch_at(coarse.centre((1, 2))) == (5, 8)
    for row, column in np.ndindex(4, 4):
        assert coarse.patch_at(coarse.centre((row, column))) == (row, column)
        # a centre on a border goes right and down, whatever floats would make of it
        assert Grid("c", 64, 64, 8, 8).patch_at(coarse.centre((row, column))) == (2 * row + 1, 2 * column + 1)
    assert Grid("d", 64, 128, 2, 4).patch_at(Grid("d", 64, 128, 2, 4).at_pixel((127, 0))) == (0, 3)


def test_every_model_gets_the_same_target() -> None:
    plan = AttendPlan(
        models=("demo:vit-p16", "demo:vit-p8", "demo:vit-p4"), image="demo:chelsea", layer=0, pixel=(20, 50)
    )
    found = attend(plan)
    assert [entry["target"] for entry in found.models] == [[3, 1], [6, 2], [12, 5]]
    by_patch = attend(AttendPlan(models=plan.models, image="demo:chelsea", layer=0, patch=(3, 1)))
    assert [entry["target"] for entry in by_patch.models] == [[3, 1], [7, 3], [14, 6]]


def test_the_picture_is_the_image_that_the_model_saw() -> None:
    from diag.inputs.images import demo_images

    found = attend(AttendPlan(models=("demo:vit-p16",), **ASTRONAUT))
    picture = found.pictures["demo:vit-p16"]
    assert picture.shape == (64, 64, 3)
    (item,) = [item for item in demo_images() if item.id == "astronaut"]
    image = item.read()
    assert isinstance(image, Image.Image)
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR), dtype=int)
    assert np.abs(picture.astype(int) - expected).max() <= 2


def test_pictures_of_other_preprocessings() -> None:
    pixels = torch.rand(3, 4, 5)
    plain, note = picture_of(pixels, {"mean": None, "std": None})
    np.testing.assert_array_equal(plain, (pixels * 255).round().byte().permute(1, 2, 0).numpy())
    assert note is None
    stretched, note = picture_of(pixels * 4 - 2, {})
    assert (stretched.min(), stretched.max()) == (0, 255)
    assert note is not None
    assert "no mean and std" in note
    assert picture_of(torch.zeros(1, 4, 4), {"mean": [0.5], "std": [0.5]})[0].shape == (4, 4, 3)


def test_a_hugging_face_picture_is_unnormalised(tmp_path: Path) -> None:
    model = f"hf:{save_vision_model(tmp_path / 'vit', 'vit')}"
    red = tmp_path / "red.png"
    Image.new("RGB", (40, 40), (200, 30, 90)).save(red)
    plan = AttendPlan(models=(model,), image=str(red), layer=0, patch=(0, 0))
    found = attend(plan)
    assert set(map(tuple, found.pictures[model].reshape(-1, 3).tolist())) == {(200, 30, 90)}
    laid_out = attend(plan.model_copy(update={"device": "spread"}))  # as --help offers
    pd.testing.assert_frame_equal(laid_out.tokens, found.tokens, check_exact=not torch.cuda.is_available())


# --- the folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[AttendPlan, Path, Attended]:
    plan = AttendPlan(models=("demo:vit-p16", "demo:vit-p8"), **ASTRONAUT)
    folder = tmp_path_factory.mktemp("attend") / "look"
    found = attend(plan)
    write(found, plan, folder)
    return plan, folder, found


def test_what_is_read_is_what_was_written(written: tuple[AttendPlan, Path, Attended]) -> None:
    plan, folder, found = written
    again = read(folder)
    pd.testing.assert_frame_equal(again.tokens, found.tokens)
    pd.testing.assert_frame_equal(again.decomposition, found.decomposition, check_exact=False, rtol=1e-7)
    assert again.pictures.keys() == found.pictures.keys()
    for model, picture in found.pictures.items():
        np.testing.assert_array_equal(again.pictures[model], picture)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["kind"], manifest["status"], manifest["key"]) == ("attend", "complete", plan.key())
    assert {path.stem for path in (folder / "figures").glob("*.pdf")} == {"similarity-map", "most-attended"}


def test_a_folder_is_read_and_drawn_without_torch(written: tuple[AttendPlan, Path, Attended]) -> None:
    code = (
        "import sys; from pathlib import Path; from diag.studies.attend import read, AttendPlan, folder_of\n"
        "from diag.show.figures.attend import draw_attended\n"
        f"a = read(Path({str(written[1])!r})); draw_attended(a.tokens, a.decomposition, a.pictures)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.usefixtures("sketched")
def test_a_finished_folder_is_not_measured_again(
    written: tuple[AttendPlan, Path, Attended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = AttendPlan(models=("demo:vit-p16",), **ASTRONAUT)
    folder = run_attend(plan)
    assert folder == folder_of(plan)
    before = (folder / "tokens.parquet").stat().st_mtime_ns
    assert run_attend(plan.model_copy(update={"device": "cpu"})) == folder
    assert (folder / "tokens.parquet").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds another run"):
        run_attend(plan.model_copy(update={"patch": (0, 0)}), folder)


def test_a_plan_is_known_by_what_it_measures(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    plan = AttendPlan(models=("demo:vit-p16",), image=str(image), layer=0, patch=(0, 0))
    key = plan.key()
    assert plan.model_copy(update={"device": "cuda:0"}).key() == key
    assert plan.model_copy(update={"head": 0}).key() != key
    Image.new("RGB", (8, 8), "red").save(image)
    assert plan.key() != key
    assert plan.probe_plan() == ProbePlan(models=("demo:vit-p16",))


def test_a_look_is_known_by_what_lies_in_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by how its place is typed: an input of one name and content is one look."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    for place, colour in (("a.png", "red"), ("b/a.png", "red"), ("c.png", "red"), ("b/c.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(place)
    Path("a.txt").write_text("the assert statement")

    def key(**given: Any) -> str:
        return AttendPlan(models=("demo:vit-p16",), layer=0, **given).key()

    def of(image: str) -> str:
        return key(image=image, patch=(0, 0))

    Path("link").symlink_to("b")
    same = {of(place) for place in ("a.png", "./a.png", str(tmp_path / "a.png"), "b/a.png", "link/a.png")}
    assert len(same) == 1
    assert len({*same, of("c.png"), of("b/c.png"), of("demo:astronaut"), of("demo:coffee")}) == 5
    assert key(text="a.txt", token=0) == key(text="./a.txt", token=0)
    assert key(text="a.txt", token=0) != key(text="the assert statement", token=0)


def test_what_is_hashed_is_what_is_looked_at(tmp_path: Path) -> None:
    """Also where the picture is replaced while it is looked at."""
    file = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "red").save(file)
    plan = AttendPlan(models=("demo:vit-p16",), image=str(file), layer=0, patch=(0, 0))
    given, key, content = plan.inputs(), plan.key(), hashlib.sha256(file.read_bytes()).hexdigest()
    Image.new("RGB", (64, 64), "blue").save(file)
    found = attend(plan, given=given)
    assert found.pictures["demo:vit-p16"][0, 0].tolist() == [255, 0, 0]
    write(found, plan, tmp_path / "look")
    manifest = json.loads((tmp_path / "look" / "manifest.json").read_text())
    assert (manifest["key"], manifest["input"]["sha256"]) == (key, content)
    assert plan.key() != key


@pytest.mark.usefixtures("sketched")
def test_tables_that_were_edited_are_told(attnbias: Callable[..., Ended]) -> None:
    given = (
        "attend",
        "-m",
        "demo:vit-p16",
        "--image",
        "demo:coffee",
        "--layer",
        0,
        "--patch",
        "0,0",
        "-o",
        "x",
    )
    assert attnbias(*given).code == 0
    assert not any("is not as" in line for line in attnbias(*given).lines)
    with Path("x", "decomposition.csv").open("a") as file:
        file.write("\n")
    assert "decomposition.csv of 'x' is not as the run wrote it" in attnbias(*given).lines


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "is no finished look at a token"),
        ("{", "is not JSON"),
        ("{}", "is not what attnbias attend wrote"),
        ('{"kind": "attend", "format": 0}', "has format 0; this version reads 1"),
        ('{"kind": "attend", "format": 1, "models": []}', "cannot read table"),
    ],
)
def test_other_folders_are_refused(manifest: str | None, message: str, tmp_path: Path) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


# --- mistakes

GIVEN = {"models": ("demo:vit-p16",), **ASTRONAUT}
TEXT = {"models": ("demo:lm",), "text": "the assert statement", "layer": 0, "token": 0}


@pytest.mark.parametrize(
    ("given", "message", "tip"),
    [
        (
            {**GIVEN, "patch": (4, 0)},
            "--patch 4,0 is outside the 4 × 4 patches of",
            "rows are 0 to 3, columns 0 to 3",
        ),
        ({**GIVEN, "patch": (0, -1)}, "--patch 0,-1 is outside", "rows are 0 to 3, columns 0 to 3"),
        (
            {**GIVEN, "patch": None, "pixel": (64, 0)},
            "--pixel 64,0 is outside the 64 × 64 pixels",
            "x is 0 to 63",
        ),
        ({**GIVEN, "head": 3}, "has no head 3 in layer 5", "heads are 0 to 2"),
        ({**GIVEN, "layer": 6}, "has no layer 6 in its vision tower", "layers are 0 to 5, or -1 to -6"),
        ({**GIVEN, "layer": -7}, "has no layer -7", "layers are 0 to 5"),
        (
            {**GIVEN, "models": ("demo:lm",)},
            "model 'demo:lm' has no vision tower",
            "it takes --text 'STRING'",
        ),
        ({**TEXT, "models": ("demo:vit-p8",)}, "has no text tower", "it takes --image FILE --patch"),
        ({**TEXT, "token": 99}, "--token 99 is outside the 5 tokens of 'demo:lm'", "tokens are 0 to 4"),
        ({**TEXT, "seq_len": 50}, "the text is shorter than 50 tokens of 'demo:lm'", "--seq-len below 50"),
        ({**TEXT, "text": " "}, "the text is empty", "give --text 'STRING' or a text file"),
        ({**TEXT, "text": "absent.txt"}, "'absent.txt' does not exist", "--text takes a UTF-8 text file"),
        ({**GIVEN, "image": "absent.png"}, "'absent.png' does not exist", "--image takes an image file"),
        ({**GIVEN, "image": "demo:astronout"}, "no demo image is called", "did you mean 'astronaut'?"),
        ({**GIVEN, "device": "cuda:99"}, "device 'cuda:99' is not available", "--device auto, cpu or cuda:0"),
    ],
)
def test_mistakes_name_what_is_allowed(given: dict[str, object], message: str, tip: str) -> None:
    with pytest.raises(UserError) as told:
        attend(AttendPlan(**given))  # type: ignore[arg-type]
    assert message in str(told.value)
    assert tip in (told.value.tip or "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "no input is given"),
        ({"text": "a"}, "both --image and --text are given"),
        ({"layer": None}, "no layer is given"),
        ({"depth": 0.5}, "both --layer and --depth are given"),
        ({"pixel": (0, 0)}, "both --patch and --pixel are given"),
        ({"token": 1}, "--token belongs to --text"),
        ({"seq_len": 8}, "--seq-len belongs to --text"),
        ({"image": None, "text": "a"}, "--patch belongs to --image"),
        ({"image": None, "text": "a", "patch": None}, "no target is given"),
        ({"top": 0}, "--top is above 0"),
        ({"top": 2**63}, "--top"),
        ({"layer": 2**64}, "--layer"),
        ({"patch": (0, -(2**64))}, "--patch"),
        ({"depth": 1.5, "layer": None}, "--depth is at most 1"),
        ({"dtype": "int8"}, "--dtype is one of float32, bfloat16, float16"),
        ({"heads": 1}, "--heads is not known"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as told:
        AttendPlan.checked(**{**GIVEN, **change})
    assert message in str(told.value)
    assert told.value.tip


def test_an_unreadable_image_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"cannot read image 'broken\.png'") as told:
        attend(AttendPlan(**{**GIVEN, "image": str(broken)}))  # type: ignore[arg-type]
    assert told.value.tip
    with pytest.raises(UserError, match="is a folder, not one image"):
        AttendPlan(**{**GIVEN, "image": str(tmp_path)}).inputs()  # type: ignore[arg-type]


def test_windows_are_refused_by_layer() -> None:
    arguments = ("img_size=64", "embed_dim=24", "window_size=4", "depths=(1,1)", "num_heads=(2,2)")
    plan = AttendPlan(
        models=("timm:swin_tiny_patch4_window7_224",),
        model_args=arguments,
        random_init=True,
        image="demo:moon",
        layer=0,
        patch=(0, 0),
    )
    with pytest.raises(UserError, match=r"layer 0 \('layers\.0.*attn'\) attends in 16 windows"):
        attend(plan)


def test_patches_in_another_order_are_refused(tmp_path: Path) -> None:
    """Qwen's tower orders patches by its windows: a map of them would be of another image."""
    model = f"hf:{save_vision_model(tmp_path / 'qwen', 'qwen2_5_vl')}"
    with pytest.raises(UserError, match="does not cut its image into one grid of patches") as told:
        attend(AttendPlan(models=(model,), image="demo:moon", layer=1, patch=(0, 0)))
    assert told.value.tip


# --- the command line


def test_the_command_prints_a_table_and_names_its_folder(attnbias: Callable[..., Ended]) -> None:
    given = ("-m", "demo:vit-p16", "-m", "demo:vit-p8", "--image", "demo:astronaut", "--layer", "last")
    ended = attnbias("attend", *given, "--patch", "1,2", "--top", 3, "-o", "look")
    assert ended.code == 0, ended.err
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "folder: look" in ended.lines
    assert ended.out.count("rank  token") == 2
    assert "target patch 1,2 of 4×4" in ended.out
    assert "target patch 3,5 of 8×8" in ended.out
    tokens = read(Path("look")).tokens
    most = tokens[(tokens["model"] == "demo:vit-p16") & (tokens["rank"] == 1)].iloc[0]
    assert f"   1  {most['row']},{most['col']}" in ended.out
    assert f"{most['weight']:.4f}" in ended.out
    mean = read(Path("look")).decomposition.query("model == 'demo:vit-p16' and head == 'mean'").iloc[0]
    split = "cos(y,v) {cos_y_vself:.3f} = self {self_part:.3f} + context {context_part:.3f}".format(**mean)
    assert split in ended.out


def test_json_and_quiet(attnbias: Callable[..., Ended]) -> None:
    given = ("attend", "-m", "demo:lm", "--text", "The assert statement", "--layer", 2, "--token", -1)
    ended = attnbias(*given, "--json", "--top", 2)
    document = json.loads(ended.out)
    (model,) = document["models"]
    assert (model["layer"], model["head"], len(model["heads"])) == (2, "mean", 3)
    assert [token["rank"] for token in model["most_attended"]] == [1, 2]
    parts = model["decomposition"]
    assert parts["cos_y_vself"] == pytest.approx(parts["self_part"] + parts["context_part"], abs=1e-7)
    quiet = attnbias(*given, "-q", "--top", 2)
    assert (quiet.out.strip(), quiet.err) == (document["folder"], "")


def test_a_long_name_is_shortened_and_one_head_has_norms(
    attnbias: Callable[..., Ended], tmp_path: Path
) -> None:
    folder = tmp_path / ("long" * 20)
    save_language_model(folder, "gpt2")
    ended = attnbias(
        "attend", "-m", f"hf:{folder}", "--text", SENTENCE, "--layer", 0, "--token", 0, "--head", 1
    )
    assert ended.code == 0, ended.err
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "partner –" in ended.out  # the first token sees only itself
    assert "100% along v, 0% exclusive (‖y‖ " in ended.out


def test_text_is_printed_as_text(attnbias: Callable[..., Ended]) -> None:
    ended = attnbias("attend", "-m", "demo:lm", "--text", "demo", "--depth", 0.5, "--token", 100, "-o", "t")
    assert ended.code == 0
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "sees 101" in ended.out
    assert "the first 128 tokens of the text are looked at" in ended.err
    assert (Path("t") / "figures" / "strip.png").is_file()


def test_a_model_that_fails_beside_others_is_told(attnbias: Callable[..., Ended]) -> None:
    given = ("attend", "-m", "demo:vit-p16", "-m", "demo:lm", "--image", "demo:moon", "--layer", 0)
    ended = attnbias(*given, "--patch", "0,0", "-o", "look")
    assert ended.code == 3
    assert "  demo:lm: model 'demo:lm' has no vision tower" in ended.lines
    assert json.loads(Path("look/manifest.json").read_text())["status"] == "partial"
    swapped = attnbias("attend", "-m", "demo:lm", "-m", "demo:vit-p16", *given[5:], "--patch", "0,0")
    assert swapped.code == 2
    assert not list(Path("runs").glob("*"))


@pytest.mark.parametrize(
    ("options", "message", "tip"),
    [
        (("--patch", "9,9"), "error: --patch 9,9 is outside the 4 × 4 patches", "tip: rows are 0 to 3"),
        (("--patch", "3"), "error: --patch does not understand '3'", "tip: --patch ROW,COLUMN, for example"),
        (
            ("--patch", "1,1", "--pixel", "1,1"),
            "error: both --patch and --pixel",
            "tip: give --patch ROW,COL",
        ),
    ],
)
def test_mistakes_are_two_lines(
    attnbias: Callable[..., Ended], options: tuple[str, ...], message: str, tip: str
) -> None:
    ended = attnbias("attend", "-m", "demo:vit-p16", "--image", "demo:moon", "--layer", 0, *options)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.lines[-2].startswith(message)
    assert ended.lines[-1].startswith(tip)


def test_caveats_stand_in_columns_table_json_captions_and_report(attnbias: Callable[..., Ended]) -> None:
    model = "demo:vit-p16,img_size=48"
    given = ("attend", "-m", model, "--image", "demo:moon", "--layer", 0, "--patch", "0,0", "-o", "look")
    ended = attnbias(*given)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[0] == f"{model} · interpolated positions"
    (said,) = json.loads(attnbias(*given, "--json").out)["models"]
    assert said["caveats"] == ["interpolated positions"]
    found = read(Path("look"))
    for table in (found.tokens, found.decomposition):
        assert set(table["positions"]) == {"interpolated"}
        assert (set(table["weights"]), set(table["inputs"])) == ({"loaded"}, {"given"})
    assert f"{model} · interpolated positions: layer 0" in look_settings(found)
    for sketched in Path("look", "figures").glob("*.png"):
        Image.new("RGB", (8, 8)).save(sketched)
    section = section_of(read_attended([Path("look")])[0][0])
    assert {row[0] for row in section.rows} == {f"{model} · interpolated positions"}
    assert f"{model} · interpolated positions: cosine" in section.pictures[0][1]
    # a folder of an earlier version has no such columns, but its manifest tells
    for name in ("tokens.parquet", "decomposition.csv"):
        table = found.tokens if name == "tokens.parquet" else found.decomposition
        write_table(table.drop(columns=[*COLUMNS]), Path("look", name))
    assert set(read(Path("look")).tokens["positions"]) == {"interpolated"}
    assert section_of(read_attended([Path("look")])[0][0]).rows == section.rows

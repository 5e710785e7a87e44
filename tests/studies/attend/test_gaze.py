"""Where a question makes a vision-language model look: dense float64, maps made by hand, end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import save_vision_language_model
from commands import Ended
from PIL import Image

from diag.errors import UserError
from diag.models import load
from diag.models.names.resolve import parse
from diag.results.gaze import contrast_of, entropy_of, gaze_shift_of, per_layer
from diag.show.report.attended import read_attended, section_of
from diag.studies.attend import AttendPlan, attend, read

QUESTION, GENERAL = "the dog ran after the cat ?", "the cat sat ."


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"hf:{save_vision_language_model(tmp_path_factory.mktemp('llava'), 'llava')}"


def plan_of(name: str, **more: Any) -> AttendPlan:
    given: dict[str, Any] = {"image": "demo:astronaut", "layer": -1, "question": QUESTION, "general": GENERAL}
    return AttendPlan(models=(name,), **given | more)


def dense(folder: str, prompt: str, plan: AttendPlan) -> np.ndarray:
    """`[layer, head, query behind the image, image token]`: the library's own weights of the whole model."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    (item,) = plan.inputs()
    given = processor(
        images=[item.read().convert("RGB")], text=[f"{processor.image_token}\n{prompt}"], return_tensors="pt"
    )
    given["pixel_values"] = given["pixel_values"].double()
    image = given["input_ids"][0] == model.config.image_token_id
    with torch.no_grad():
        maps = model.eval()(**given, output_attentions=True).attentions
    after = int(image.nonzero().max()) + 1
    return torch.stack([one[0, :, after:][..., image] for one in maps]).numpy()


@pytest.mark.parametrize("head", [None, 2])
def test_maps_are_the_librarys_weights(llava: str, head: int | None) -> None:
    plan = plan_of(llava, head=head)
    found = attend(plan)
    assert found.gaze is not None
    task, general = (dense(llava.removeprefix("hf:"), text, plan) for text in (QUESTION, GENERAL))
    task, general = (x.mean(1) if head is None else x[:, head] for x in (task, general))
    assert list(found.gaze["layer"].unique()) == [0, 1]
    for layer, rows in found.gaze.groupby("layer"):
        a, b = task[layer][-1], general[layer][-1]
        shift = np.zeros(len(a))
        for before, after in zip(task[layer], task[layer][1:], strict=False):
            shift += np.maximum(after - before, 0)
        expected = {"task": a, "general": b, "contrast": a / (b + 0.01 * b.mean()), "gaze_shift": shift}
        for name, values in expected.items():
            np.testing.assert_allclose(rows[name], values, rtol=2e-4, atol=1e-7)
        assert rows[["row", "col"]].to_numpy().tolist() == [[i // 4, i % 4] for i in range(16)]
        numbers = per_layer(rows).iloc[0]
        p = a / a.sum()
        assert numbers["entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
        assert numbers["image_mass"] == pytest.approx(a.sum(), rel=1e-5)
    # the last token's row is the same that is looked at
    row = found.tokens[found.tokens["kind"] == "image"]["weight"]
    np.testing.assert_allclose(row, found.gaze[found.gaze["layer"] == 1]["task"], rtol=1e-5)


def test_maps_made_by_hand() -> None:
    """Three query tokens, four image tokens: attention moves from the first to the last, and back a bit."""
    maps = np.array([[0.4, 0.1, 0.1, 0.0], [0.1, 0.1, 0.1, 0.3], [0.2, 0.1, 0.0, 0.3]])
    np.testing.assert_allclose(gaze_shift_of(maps), [0.1, 0.0, 0.0, 0.3])
    np.testing.assert_allclose(gaze_shift_of(maps[:1]), 0.0)
    general = np.array([0.1, 0.1, 0.2, 0.0])
    np.testing.assert_allclose(contrast_of(maps[-1], general), [0.2 / 0.101, 0.1 / 0.101, 0.0, 0.3 / 0.001])
    np.testing.assert_allclose(
        entropy_of(np.array([[2.0, 2, 2, 2], [0, 0, 3, 0]])), [np.log(4), 0.0], atol=1e-12
    )


def test_a_model_of_native_sizes_has_its_grid(tmp_path: Path) -> None:
    folder = save_vision_language_model(tmp_path, "qwen2_5_vl_whole")
    found = attend(plan_of(f"hf:{folder}"))
    assert found.gaze is not None
    assert found.models[0]["grid"] == [5, 5]
    assert (found.gaze["row"].max(), found.gaze["col"].max()) == (4, 4)
    assert found.models[0]["general"] == GENERAL


def test_a_question_from_the_command_line(llava: str, attnbias: Callable[..., Ended], tmp_path: Path) -> None:
    given = ["-m", llava, "--image", "demo:astronaut", "--question", QUESTION, "--layer", "0", "--top", "2"]
    ended = attnbias("attend", *given, "-o", str(tmp_path / "look"))
    assert ended.code == 0, ended.err
    assert "of the last token's attention, in general" in ended.out
    assert "entropy  " in ended.out
    assert "contrast largest at " in ended.out
    again = attnbias("attend", *given, "-o", str(tmp_path / "look"), "--json")
    (model,) = json.loads(again.out)["models"]
    assert model["question"] == QUESTION
    assert model["general"] == "Describe this image."
    assert [one["layer"] for one in model["gaze"]] == [0, 1]
    found = read(tmp_path / "look")
    assert found.gaze is not None
    assert len(found.gaze) == 2 * 16
    assert {path.name for path in (tmp_path / "look" / "figures").iterdir()} == {
        "gaze.pdf",
        "gaze.png",
        "gaze.csv",
    }
    Image.new("RGB", (8, 8)).save(tmp_path / "look" / "figures" / "gaze.png")  # it was only sketched
    (looked,), problems = read_attended([tmp_path / "look"])
    assert [picture.name for picture, _ in section_of(looked).pictures] == ["gaze"]
    assert not problems


def test_the_tower_that_asks_is_the_one_of_that_prompt(llava: str) -> None:
    model = load(parse(llava), device="cpu", dtype=torch.float32)
    named = load(parse(f"{llava},prompt={GENERAL}"), device="cpu", dtype=torch.float32)
    tower = model.towers["language"]
    assert tower.asking is not None
    (sample,) = list(tower.samples(plan_of(llava).inputs(), None))
    asked, same = tower.asking(GENERAL).encode([sample]), named.towers["language"].encode([sample])
    assert torch.equal(asked.data["input_ids"], same.data["input_ids"])
    assert not torch.equal(asked.data["input_ids"], tower.encode([sample]).data["input_ids"])


@pytest.mark.parametrize(
    ("change", "message", "tip"),
    [
        (
            {"question": None},
            "--general is what --question is compared with",
            "give --question 'STRING' as well",
        ),
        ({"image": None, "text": "a cat"}, "--question is asked about an image", "a text takes --token I"),
        ({"patch": (0, 0)}, "--patch does not go with --question", "or another with --token I"),
        ({"saliency": True}, "--saliency does not go with --question", "leave one of them out"),
    ],
)
def test_questions_that_cannot_be_are_refused(change: dict[str, Any], message: str, tip: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        plan_of("demo:vit-p8", **change)
    assert tip in (told.value.tip or "")


def test_a_model_that_reads_no_question_is_told() -> None:
    with pytest.raises(UserError, match="'demo:vit-p16' reads no question beside an image"):
        attend(plan_of("demo:vit-p16"))

"""An audit as a whole: its plan, its folder, its sentences, and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from commands import Ended, run_cli

import diag
from diag.errors import UserError
from diag.studies.audit import AuditPlan, folder_of, read, run_audit
from diag.studies.audit.folder import LAYOUTS, OWNER
from diag.studies.audit.words import (
    ALONE,
    BLOCKS,
    DIFFERS,
    DOCUMENT,
    FINAL,
    GATE,
    LEAK,
    NONE,
    NOT_TESTED,
    OTHER_INPUT,
    PLAIN,
    REPEATED,
    RESTART,
    RIGHT,
    ROUNDING,
    SAME,
    UNCOUNTED,
    on_hooks,
    on_leaks,
    worst,
)


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The demo models, audited without transformer-lens. Only to be read."""
    folder = tmp_path_factory.mktemp("audit") / "found"
    given = ("-m", "demo:vit-p16", "-m", "demo:lm", "--no-lens", "--seq-len", 16)
    return folder, run_cli("audit", *given, "-o", folder)


def test_the_folder_holds_tables_and_a_manifest_that_says_it_in_sentences(
    audited: tuple[Path, Ended],
) -> None:
    folder, ended = audited
    assert ended.code == 0, ended.err
    assert {file.name for file in folder.iterdir()} == {"plan.json", "manifest.json", *LAYOUTS}
    assert OWNER.files(folder) == sorted(file.name for file in folder.iterdir())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["kind"], manifest["status"]) == ("audit", "complete")
    assert manifest["verdicts"]["demo:vit-p16 · vision"] == {
        "hooks": "qkv is V in all layers 0-5; proj input is Y in all layers 0-5",
        "leaks": (
            "no leak, to the bit: batch; "
            "not tested: padded (images are brought to one size: nothing is padded)"
        ),
    }
    text = manifest["verdicts"]["demo:lm · text"]
    assert text["hooks"] == "c_attn is V in all layers 0-5; c_proj input is Y in all layers 0-5"
    assert "LEAK: packed (by design, the other document: " in text["leaks"]
    assert "other numbers than alone: padded left without positions (" in text["leaks"]
    found = read(folder)
    for name, table in (("hooks.csv", found.hooks), ("leaks.csv", found.leaks)):
        assert list(table.columns) == list(LAYOUTS[name].needed)
    assert found.verdicts == manifest["verdicts"]
    assert [entry["resolved"] for entry in found.models] == ["demo:vit-p16", "demo:lm"]


def test_the_terminal_shows_a_row_for_layers_that_are_alike(audited: tuple[Path, Ended]) -> None:
    lines = audited[1].out.splitlines()
    assert lines[0] == "demo:vit-p16 · vision"
    assert lines[1].split() == ["hook", "of", "layers", "error", "left", "reason"]
    assert lines[2].split() == ["qkv", "V", "0-5", "0", "0", "the", "same"]
    assert max(map(len, lines)) <= 80
    assert audited[1].lines[-1] == f"folder: {audited[0]}"


def test_a_finished_audit_is_found_again_and_printed_as_json_or_a_path(audited: tuple[Path, Ended]) -> None:
    folder = audited[0]
    given = ("audit", "-m", "demo:vit-p16", "-m", "demo:lm", "--no-lens", "--seq-len", 16, "-o", folder)
    again = run_cli(*given, "--json")
    assert "already complete" in again.err
    document = json.loads(again.out)
    assert set(document) == {"folder", "verdicts", "models", "hooks", "leaks", "failed"}
    assert len(document["hooks"]) == 24
    assert run_cli(*given, "-q").out == f"{folder}\n"


def test_a_model_that_fails_beside_another_is_named(attnbias: Callable[..., Ended]) -> None:
    given = ("audit", "-m", "demo:vit-p16", "-m", "demo:lm", "--images", "demo", "-o", "found")
    ended = attnbias(*given)
    assert ended.code == 3
    assert "demo:lm: model 'demo:lm' has no vision tower" in ended.err
    assert json.loads(Path("found/manifest.json").read_text())["status"] == "partial"
    alone = attnbias("audit", "-m", "demo:lm", "--images", "demo")
    assert alone.code == 2
    assert alone.lines[-2:] == [
        "error: model 'demo:lm' has no vision tower",
        "tip: it takes --texts DIR|demo",
    ]


def test_too_little_text_is_told(attnbias: Callable[..., Ended]) -> None:
    Path("short.txt").write_text("One line.")
    ended = attnbias("audit", "-m", "demo:lm", "--texts", "short.txt", "--no-lens")
    assert ended.code == 2
    assert ended.lines[-2:] == [
        "error: 'short.txt' gives no sample for the text tower",
        "tip: the text is shorter than one window: give more text, or a smaller --seq-len",
    ]
    ended = attnbias("audit", "-m", "demo:lm", "--seq-len", 4)
    assert ended.lines[-2:] == ["error: --seq-len is at least 8", "tip: given: 4"]


def test_other_folders_are_not_taken_for_audits(audited: tuple[Path, Ended], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no finished audit"):
        read(tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "attend"}')
    with pytest.raises(UserError, match="is not what attnbias audit wrote"):
        read(tmp_path)
    with pytest.raises(UserError, match="holds what attnbias attend wrote"):
        run_audit(AuditPlan(models=("demo:vit-p16",), images="demo"), tmp_path)


def test_the_key_is_of_what_is_asked_not_of_how() -> None:
    plan = AuditPlan(models=("demo:vit-p16",), images="demo")
    others = [plan.model_copy(update=change) for change in ({"lens": False}, {"seq_len": 16})]
    assert plan.model_copy(update={"device": "cpu"}).key() == plan.key()
    assert len({one.key() for one in (plan, *others)}) == 3
    assert folder_of(plan).name.startswith("audit-demo-vit-p16-")


def test_it_is_public_and_planned_and_read_without_torch(audited: tuple[Path, Ended]) -> None:
    assert diag.audit.AuditPlan is AuditPlan  # type: ignore[attr-defined]
    code = (
        "import sys; from pathlib import Path; from diag.audit import AuditPlan, read; "
        f"AuditPlan(models=('demo:lm',)); read(Path({str(audited[0])!r})); print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


# --- sentences


def hooks_table(*rows: tuple[int, str, str, str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["layer", "hook", "of", "reason", "detail"])


def test_a_sentence_names_what_is_used_and_what_is_not_by_layers() -> None:
    table = hooks_table(
        (0, "v_proj", "V", SAME, ""),
        (1, "v_proj", "V", REPEATED, "2 value heads for 4 query heads"),
        (0, "o_proj input", "Y", SAME, ""),
        (1, "o_proj input", "Y", GATE, "from 0.1 to 0.9"),
        (2, "o_proj input", "Y", GATE, "from 0.2 to 0.8"),
    )
    assert on_hooks(table) == (
        "v_proj is V in all layers 0-1; o_proj input is not Y (gate in layers 1-2), and is in layer 0"
    )
    assert on_hooks(table.iloc[3:4]) == "o_proj input is not Y (gate, from 0.1 to 0.9, in layer 1)"


def test_a_sentence_tells_leaks_by_design_from_others_and_where_they_begin() -> None:
    rows = [
        (RIGHT, OTHER_INPUT, 0, 0.0, NONE, ""),
        (RIGHT, OTHER_INPUT, FINAL, 1e-7, ROUNDING, ""),
        (UNCOUNTED, OTHER_INPUT, 0, 0.0, NONE, ""),
        (UNCOUNTED, ALONE, 0, 0.25, DIFFERS, ""),
        (PLAIN, DOCUMENT, FINAL, 0.5, LEAK, ""),
        (PLAIN, DOCUMENT, 2, 0.25, LEAK, ""),
        (PLAIN, ALONE, 2, 0.25, DIFFERS, ""),
        (RESTART, DOCUMENT, FINAL, float("nan"), NOT_TESTED, "the model takes no position_ids"),
        (BLOCKS, DOCUMENT, FINAL, 0.125, LEAK, ""),
    ]
    table = pd.DataFrame(rows, columns=["case", "changed", "layer", "change", "level", "why"])
    assert on_leaks(table) == (
        "no leak, to the bit: padded left without positions; no leak, to rounding: padded right; "
        "LEAK: packed (by design, the other document: 0.5 from layer 2 on), "
        "packed with block mask (the other document: 0.12 in the output); "
        "other numbers than alone: padded left without positions (0.25); "
        "not tested: packed with positions (the model takes no position_ids)"
    )


def test_the_worst_level_is_shown() -> None:
    assert worst([NONE, ROUNDING]) == ROUNDING
    assert worst([LEAK, NOT_TESTED, NONE]) == LEAK

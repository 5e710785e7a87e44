"""`docs/typed.md`: what people type, and what comes of it. `python tests/test_typed_page.py` renews it."""

from __future__ import annotations

import glob
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Ended, run_cli

PAGE = Path(__file__).parent.parent / "docs" / "typed.md"

HEAD = """# What people type

Every spelling below is one that somebody has typed, with what came of it. The answers are real: a test runs
all of them and compares; `python tests/test_typed_page.py` renews this page. Lines that begin with `!` went
to stderr, the number behind a command is its exit code where that is not 0, `KEY` stands for eight signs that
tell runs apart, and `…` for lines that are left out. The folder holds `photos/` (two PNG files), `notes.txt`,
`notes/` (Markdown), `rows.jsonl`, `rows.csv` and `rows.parquet` (a column of texts each), `paper.pdf`, and
`plans/` (plans for three verbs).
"""

ONE = "--metrics cos_y_vself,self_part --figures none"
LAST = f"--layers last {ONE}"
EVERY = "attnbias demo:lm --texts notes.txt --layers last --metrics all --figures none"
SHOWN = {EVERY: 4, "attnbias attend demo:lm --top 3": 1}
"""Lines that are shown of answers that grow with the catalogue, or change with Python's help."""

SECTIONS: dict[str, tuple[str, list[str]]] = {
    "A model": (
        "It needs neither a verb nor an option. What is no model is told what it is.",
        [
            f"attnbias demo:vit-p16 --limit 2 {LAST}",
            f"attnbias probe demo:vit-p16 demo:vit-p8 --images demo --limit 2 {LAST}",
            "attnbias compare demo:vit-p16 demo:vit-p8 --limit 2 --dry-run",
            "attnbias gtp2-nothing",
            "attnbias prboe demo:lm",
            "attnbias demo:vit-p16 photos/a.png",
            "attnbias models llama-3",
            "attnbias models gpt2",
        ],
    ),
    "Layers": (
        "The model's own numbers: ranges with both ends, slices of Python, -1 or `last` from the end.",
        [
            f"attnbias demo:lm --texts notes.txt --layers -1 {ONE}",
            f"attnbias demo:lm --texts notes.txt --layers last {ONE}",
            f"attnbias demo:lm --texts notes.txt --layers 1:3 {ONE}",
            f"attnbias demo:lm --texts notes.txt --layers -2: {ONE}",
            "attnbias demo:lm --texts notes.txt --layers 3:",
            "attnbias demo:lm --texts notes.txt --layers 99",
        ],
    ),
    "Metrics, formats and token sets": (
        "What is called in several ways has one meaning, and one key: a second run is there already.",
        [
            f"attnbias demo:lm --texts notes.txt --dtype bf16 {LAST}",
            f"attnbias demo:lm --texts notes.txt --dtype torch.bfloat16 {LAST}",
            "attnbias demo:lm --dtype fp8",
            f"attnbias demo:vit-p16 --images photos --tokens patches,class {LAST}",
            EVERY,
        ],
    ),
    "Images": (
        "A folder, a file, or a pattern in quotes, which a shell must not write out.",
        [
            f"attnbias demo:vit-p16 --images photos {LAST}",
            f"attnbias demo:vit-p16 --images 'photos/*.png' {LAST}",
            "attnbias demo:vit-p16 --images photos/*.png",
            "attnbias demo:vit-p16 --images notes.txt",
            "attnbias demo:vit-p16 --images paper.pdf",
            "attnbias demo:vit-p16 --images notes",
        ],
    ),
    "Texts": (
        "Words in quotes, standard input, files, a column of a table, a folder.",
        [
            f'attnbias demo:lm --texts "a sentence of several words that somebody has typed" {LAST}',
            f"cat notes.txt | attnbias demo:lm --texts - {LAST}",
            f"attnbias demo:lm --texts notes {LAST}",
            f"attnbias demo:lm --texts rows.jsonl {LAST}",
            f"attnbias demo:lm --texts rows.csv,column=body {LAST}",
            f"attnbias demo:lm --texts rows.parquet {LAST}",
            "attnbias demo:lm --texts rows.csv",
            "attnbias demo:lm --texts paper.pdf",
            "attnbias demo:lm --texts photos/a.png",
            "attnbias demo:lm --texts nowhere.txt",
        ],
    ),
    "Options for another kind of model": (
        "They are named, and left out.",
        [
            f"attnbias demo:vit-p16 --images photos --texts notes.txt --seq-len 8 {LAST}",
            "attnbias demo:lm --images photos",
        ],
    ),
    "One token": (
        "A model alone suffices; what is taken is said.",
        ["attnbias attend demo:vit-p16 --top 3", "attnbias attend demo:lm --top 3"],
    ),
    "Plans": (
        "A file goes to the verb that it is for; of several, those for others are left out.",
        [
            "attnbias figures plans/*.yaml --dry-run",
            "attnbias train plans/figures.yaml",
            "attnbias figures plans/train.yaml",
            "attnbias plans/figures.yaml",
            "attnbias compare plans/clip.yaml",
        ],
    ),
    "Values that cannot be": (
        "One sentence on what is allowed, before anything is loaded.",
        [
            "attnbias demo:vit-p16 --limit 0",
            "attnbias demo:vit-p16 --limit many",
            "attnbias demo:vit-p16 --metrics entrpy",
            "attnbias demo:vit-p16 --null trained",
            "attnbias demo:lm --seq-len 1",
        ],
    ),
}

PLANS = {
    "figures": "title: Two patch sizes\nprobes:\n  sizes: {series: demo, images: demo, limit: 2}\n"
    "figures:\n  - {kind: curves, probe: sizes}\n",
    "train": "title: t\ntask: crops\nrecipe: {}\nvariants: [sa]\n",
    "clip": "epochs: 1\nlr: 0.001\n",
}


def prepared(folder: Path) -> None:
    """Writes the files that the commands name."""
    import pyarrow as pa
    from PIL import Image
    from pyarrow import parquet

    for name in ("photos", "notes", "plans"):
        (folder / name).mkdir()
    for name, colour in (("a", 40), ("b", 200)):
        image = (
            Image.linear_gradient("L")
            .resize((64, 64))
            .point(lambda grey, colour=colour: grey * colour // 255)
        )
        image.convert("RGB").save(folder / "photos" / f"{name}.png")
    words = "the quick brown fox jumps over the lazy dog and runs away from the river to the hill again"
    (folder / "notes.txt").write_text(words)
    (folder / "notes" / "a.md").write_text(f"# Fox\n\n{words}")
    (folder / "rows.jsonl").write_text(f'{{"text": "{words}"}}\n')
    (folder / "rows.csv").write_text(f"id,body\n1,{words}\n")
    parquet.write_table(pa.table({"text": [words]}), folder / "rows.parquet")
    (folder / "paper.pdf").write_bytes(b"%PDF-1.7")
    for name, text in PLANS.items():
        (folder / "plans" / f"{name}.yaml").write_text(text)


def answer(command: str) -> str:
    """What a command prints, as the page shows it; patterns without quotes are written out, as by a shell."""
    piped, _, typed = command.rpartition(" | ")
    words = [
        found
        for word in shlex.split(typed)[1:]
        for found in (sorted(glob.glob(word)) if "*" in word and f"'{word}'" not in command else [word])
    ]
    with pytest.MonkeyPatch.context() as patch:
        content = Path(piped.split()[1]).read_bytes() if piped else b""
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        ended = run_cli(*words)
    return re.sub(r"-[0-9a-f]{8}\b", "-KEY", _shown(command, ended))


def _shown(command: str, ended: Ended) -> str:
    code = f"  # {ended.code}" if ended.code else ""
    out = ended.out.rstrip("\n").splitlines()
    if command in SHOWN:
        out = [*out[: SHOWN[command]], "…"]
    lines = [f"$ {command}{code}", *out, *(f"! {line}" for line in ended.lines)]
    return "\n".join(line.rstrip() for line in lines)


def page(answers: dict[str, str]) -> str:
    """The whole page."""
    parts = [HEAD]
    for title, (said, commands) in SECTIONS.items():
        blocks = "\n\n".join(answers[command] for command in commands)
        parts.append(f"## {title}\n\n{said}\n\n```text\n{blocks}\n```\n")
    return "\n".join(parts)


@pytest.fixture(scope="module")
def text() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_the_page_has_every_spelling_and_no_other(text: str) -> None:
    shown = [re.sub(r"  # \d$", "", line)[2:] for line in text.splitlines() if line.startswith("$ ")]
    assert shown == [command for _, commands in SECTIONS.values() for command in commands]
    assert len(set(shown)) == len(shown)
    assert all(f"## {title}\n\n{said}\n" in text for title, (said, _) in SECTIONS.items())
    assert text.startswith(HEAD)
    assert "-0.000" not in text
    assert "−0.000" not in text


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("title", SECTIONS)
def test_what_is_shown_is_what_comes(
    title: str, text: str, attnbias: Callable[..., Ended], tmp_path: Path
) -> None:
    from test_docs import assert_alike

    prepared(tmp_path)
    for command in SECTIONS[title][1]:
        start = re.search(rf"^\$ {re.escape(command)}(  # \d)?$", text, re.MULTILINE)
        assert start is not None
        shown = re.split(r"\n\n\$ |\n```", text[start.start() :])[0]
        assert_alike(shown, answer(command), 0.02)


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parent.parent))  # this checkout, whatever is installed
    answers = dict[str, str]()
    for _, typed in SECTIONS.values():
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            prepared(Path(scratch))
            answers |= {command: answer(command) for command in typed}
    PAGE.write_text(page(answers), encoding="utf-8")

"""What is spoilt, how, and which verbs are told to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzzing.documents import Change, json_text, json_value, yaml_text, yaml_value
from fuzzing.files import another_name, another_place, linked, some_bytes
from fuzzing.formats import image, safetensors, tar, text, torch_file
from fuzzing.options import typed
from fuzzing.stock import CHANGE, FEW, LOOK, OWN, READ, SEE, SIZES, VIT
from fuzzing.tables import csv_text, table

Words = tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """Words of the command line.

    owns: what it may write, by its first name; nothing else may change. keeps: what it had measured before it
    refused stays, for the next time.
    """

    words: Words
    owns: tuple[str, ...] = ("out", "out.html", "runs")
    keeps: bool = False


@dataclass(frozen=True)
class Kind:
    """Files that are spoilt in one way.

    area: what reads them first. parts: of the stock, which the commands stand on. files: which one is
    spoilt, as a pattern. changes: how; given twice, twice as often. words: draws the command line
    instead.
    """

    area: str
    parts: Words
    files: str
    changes: tuple[Change, ...]
    commands: tuple[Command, ...]
    words: Callable[[Random], Command] | None = None

    def spoil(self, draw: Random, folder: Path) -> str:
        """Spoils a file in a copy of the parts, and says which and how."""
        if not self.files:
            return "nothing"
        file = draw.choice(sorted(path for path in folder.glob(self.files) if path.is_file()))
        return f"{file.relative_to(folder)}: {draw.choice(self.changes)(draw, file)}"

    def command(self, draw: Random) -> Command:
        """What is typed."""
        return self.words(draw) if self.words else draw.choice(self.commands)


def _commands(
    *lines: str | Words, owns: Words = ("out", "out.html", "runs"), keeps: bool = False
) -> tuple[Command, ...]:
    words = (tuple(line.split()) if isinstance(line, str) else line for line in lines)
    return tuple(Command(line, owns, keeps) for line in words)


JSON = (json_value, json_value, json_value, json_text, some_bytes, another_place)
YAML = (yaml_value, yaml_value, yaml_text, yaml_text, some_bytes, another_place)
CSV = (table, table, table, csv_text, some_bytes, another_place)
PARQUET = (table, table, table, some_bytes, another_place)
BYTES = (some_bytes, another_place)

RUN = ("images", "run", "other")
READ_RUN = (
    *_commands(
        "compare run -q -o out", "compare run other -q -o out", "compare run other --published -q -o out"
    ),
    *_commands("report run other -q -o out.html", "report run -q -o out.html"),
    *_commands("merge run -q", "merge run --json"),
    *_commands(("probe", *VIT, "--tokens", "patch,cls", "-o", "run"), owns=("run",)),
)
AGAIN = _commands(("probe", *VIT, "--tokens", "patch,cls", "--overwrite", "-o", "run"), owns=("run",))
MOMENTS = ("images", "moments", "other")
READ_MOMENTS = (
    *_commands(
        "compare moments -q -o out", "compare moments other -q -o out", "report moments -q -o out.html"
    ),
    *_commands("merge moments -q"),
    *_commands(("probe", *FEW, "-o", "moments"), owns=("moments",)),
)
UNFINISHED = ("images", "unfinished", "rest")
RESUME = (
    *_commands("merge unfinished rest -q", owns=("unfinished",), keeps=True),  # what it copied is verified
    *_commands("merge unfinished -q", owns=("unfinished",)),
    Command(("probe", *FEW, "-o", "unfinished"), ("unfinished",), keeps=True),
    Command(("probe", *FEW, "--shard", "2/2", "-o", "unfinished"), ("unfinished",), keeps=True),
)
LOOKED = ("images", "attend", "run")
READ_LOOK = (
    *_commands(
        "report run attend -q -o out.html", "report attend -q -o out.html", "compare attend run -q -o out"
    ),
    *_commands(("attend", "-m", "demo:vit-p16", *LOOK, "-o", "attend"), owns=("attend",)),
    *_commands(("attend", "-m", "demo:vit-p16", *LOOK, "--overwrite", "-o", "attend"), owns=("attend",)),
)
CHANGED = ("images", "labelled", "intervene", "run")
CHANGING = ("intervene", "-m", "demo:vit-p16", *CHANGE)
MEASURED = ("intervene", "runs")
READ_CHANGED = (
    *_commands((*CHANGING, "-o", "intervene"), (*CHANGING, "--overwrite", "-o", "intervene"), owns=MEASURED),
    *_commands("report intervene run -q -o out.html", "compare intervene run -q -o out"),
)
COMPARED = ("images", "run", "other", "comparison")
READ_COMPARED = (
    *_commands("compare run other -q -o comparison", owns=("comparison",)),
    *_commands("report comparison run -q -o out.html", "compare comparison -q -o out"),
)
TRAINED = ("plans", "training")
TRAIN = ("train", "plans/train.yaml", "--device", "cpu", "-q")
READ_TRAINED = (
    *_commands((*TRAIN, "-o", "training"), owns=("training",)),
    *_commands(
        "report training -q -o out.html", "compare training -q -o out", "compare training/probe -q -o out"
    ),
)
DRAWN = ("plans", "images", "runs", "drawn")
DRAW = (
    *_commands("figures plans/figures.yaml -q -o out", "figures plans/figures.yaml --dry-run"),
    *_commands("figures plans/figures.yaml -q -o drawn", owns=("drawn", "runs")),
    *_commands("figures plans/figures.yaml --check -q -o drawn", owns=("runs",)),
)


def _model(folder: str, inputs: Words, *more: Words) -> tuple[Command, ...]:
    """What reads a model folder."""
    given = ("-m", folder, *inputs)
    limit = ("--limit", "2", "-q")
    return _commands(
        ("probe", *given, *limit, "-o", "out"),
        ("probe", *given, *limit, "-o", "out"),
        ("probe", *given, "--dry-run", *limit),
        ("probe", *given, "--random-init", *limit, "-o", "out"),
        *more,
    )


ATTEND = "--image images/b.png --layer 1 --patch 1,1 -q -o out"
SAY = "--text texts/notes.txt --seq-len 12 --layer 1 --token 5 -q -o out"
OWN_MODEL = (*OWN, *SIZES, "--images", "images", "--limit", "2", "-q")

INPUTS = ("probe", "-m", "demo:vit-p16", "--limit", "3", "-q")

KINDS: dict[str, Kind] = {
    "manifest": Kind("reading", RUN, "run/manifest.json", JSON, READ_RUN + AGAIN),
    "plan": Kind("reading", RUN, "run/plan.json", JSON, READ_RUN + AGAIN),
    "layers": Kind("reading", RUN, "run/layers.csv", CSV, READ_RUN),
    "heads": Kind("reading", RUN, "run/heads.parquet", PARQUET, READ_RUN),
    "samples": Kind("reading", RUN, "run/samples.parquet", PARQUET, READ_RUN),
    "moments": Kind("reading", MOMENTS, "moments/*.*", BYTES, READ_MOMENTS),
    "quantiles": Kind("reading", MOMENTS, "moments/quantiles.parquet", PARQUET, READ_MOMENTS),
    "attend-manifest": Kind("reading", LOOKED, "attend/manifest.json", JSON, READ_LOOK),
    "attend-tokens": Kind("reading", LOOKED, "attend/tokens.parquet", PARQUET, READ_LOOK),
    "attend-heads": Kind("reading", LOOKED, "attend/decomposition.csv", CSV, READ_LOOK),
    "attend-files": Kind("reading", LOOKED, "attend/**/*", BYTES, READ_LOOK),
    "intervene-manifest": Kind("reading", CHANGED, "intervene/manifest.json", JSON, READ_CHANGED),
    "intervene-tables": Kind("reading", CHANGED, "intervene/*.csv", CSV, READ_CHANGED),
    "intervene-files": Kind("reading", CHANGED, "intervene/**/*", BYTES, READ_CHANGED),
    "compare-manifest": Kind("reading", COMPARED, "comparison/manifest.json", JSON, READ_COMPARED),
    "compare-files": Kind("reading", COMPARED, "comparison/**/*", BYTES, READ_COMPARED),
    "train-documents": Kind("reading", TRAINED, "training/**/*.json", JSON, READ_TRAINED),
    "train-tables": Kind("reading", TRAINED, "training/**/*.csv", CSV, READ_TRAINED),
    "train-files": Kind("reading", TRAINED, "training/**/*", BYTES, READ_TRAINED),
    "figures-manifests": Kind("reading", DRAWN, "*/*/manifest.json", JSON, DRAW),
    "figures-tables": Kind("reading", DRAWN, "runs/*/layers.csv", CSV, DRAW),
    "figures-files": Kind("reading", DRAWN, "*/**/*", BYTES, DRAW),
    "figures-plan": Kind("reading", DRAWN, "plans/figures.yaml", YAML, DRAW),
    "train-plan": Kind(
        "reading",
        TRAINED,
        "plans/train.yaml",
        YAML,
        _commands((*TRAIN, "--dry-run"), (*TRAIN, "-o", "training")),
    ),
    "clip-plan": Kind(
        "reading", ("plans",), "plans/clip.yaml", YAML, _commands("train-clip --config plans/clip.yaml --")
    ),
    "shards-plan": Kind("shards", UNFINISHED, "unfinished/plan.json", JSON, RESUME),
    "shards-documents": Kind("shards", UNFINISHED, "*/shards/*.json", JSON, RESUME),
    "shards-tables": Kind("shards", UNFINISHED, "*/shards/*.parquet", PARQUET, RESUME),
    "shards-files": Kind("shards", UNFINISHED, "*/shards/*", BYTES, RESUME),
    "timm": Kind("models", ("images", "timm"), "timm/config.json", JSON, _model("./timm", SEE)),
    "hf-text": Kind(
        "models",
        ("texts", "gpt2"),
        "gpt2/*.json",
        JSON,
        _model("./gpt2", READ, ("attend", "-m", "./gpt2", *SAY.split())),
    ),
    "hf-config": Kind("models", ("texts", "gpt2"), "gpt2/config.json", JSON, _model("./gpt2", READ)),
    "hf-index": Kind(
        "models",
        ("texts", "sharded"),
        "sharded/model.safetensors.index.json",
        JSON,
        _model("./sharded", READ),
    ),
    "hf-bert": Kind("models", ("texts", "bert"), "bert/config.json", JSON, _model("./bert", READ)),
    "hf-vit": Kind(
        "models",
        ("images", "vit"),
        "vit/*.json",
        JSON,
        _model("./vit", SEE, ("attend", "-m", "./vit", *ATTEND.split())),
    ),
    "hf-clip": Kind("models", ("images", "texts", "clip"), "clip/*.json", JSON, _model("./clip", SEE + READ)),
    "open-clip": Kind(
        "models",
        ("images", "texts", "open_clip"),
        "open_clip/open_clip_config.json",
        JSON,
        _model("open_clip:local-dir:./open_clip", SEE),
    ),
    "demo-lm": Kind("models", ("texts", "demo_lm"), "demo_lm/*.json", JSON, _model("./demo_lm", READ)),
    "model-files": Kind("models", ("texts", "gpt2"), "gpt2/*", BYTES, _model("./gpt2", READ)),
    "model-weights": Kind(
        "models", ("images", "vit"), "vit/model.safetensors", (safetensors, *BYTES), _model("./vit", SEE)
    ),
    "timm-weights": Kind(
        "models", ("images", "timm"), "timm/model.safetensors", (safetensors, *BYTES), _model("./timm", SEE)
    ),
    "safetensors": Kind(
        "models",
        ("images", "weights"),
        "weights/own.safetensors",
        (safetensors, safetensors, *BYTES),
        _commands(("probe", *OWN_MODEL, "--checkpoint", "weights/own.safetensors", "-o", "out")),
    ),
    "torch-file": Kind(
        "models",
        ("images", "weights"),
        "weights/own.pt",
        (torch_file, torch_file, torch_file, *BYTES),
        _commands(("probe", *OWN_MODEL, "--checkpoint", "weights/own.pt", "-o", "out")),
    ),
    "images": Kind(
        "inputs",
        ("images",),
        "images/*",
        (image, image, image, *BYTES, another_name, linked),
        _commands(
            (*INPUTS, "--images", "images", "-o", "out"),
            (*INPUTS, "--images", "images/b.png", "-o", "out"),
            ("attend", "-m", "demo:vit-p16", *LOOK, "-o", "out"),
        ),
    ),
    "labelled": Kind(
        "inputs",
        ("labelled",),
        "labelled/*/*",
        (image, image, *BYTES, another_name, linked),
        _commands(("intervene", "-m", "demo:vit-p16", *CHANGE, "-o", "out"), keeps=True),  # the untouched run
    ),
    "texts": Kind(
        "inputs",
        ("texts",),
        "texts/*",
        (text, text, text, *BYTES, another_name, linked),
        _commands(
            "probe -m demo:lm --texts texts --seq-len 12 --limit 2 -q -o out",
            "probe -m demo:lm --texts texts/notes.txt --seq-len 12 --limit 2 -q -o out",
            f"attend -m demo:lm {SAY}",
        ),
    ),
    "tar": Kind(
        "inputs",
        ("tars",),
        "tars/photos.tar",
        (tar, tar, tar, some_bytes, some_bytes, another_place),
        _commands(
            (*INPUTS, "--images", "tars/photos.tar", "-o", "out"), (*INPUTS, "--images", "tars", "-o", "out")
        ),
    ),
    **{
        f"options-{verb}": Kind(
            "cli", parts, "", (), (), words=lambda draw, verb=verb: Command(*typed(draw, verb))
        )
        for verb, parts in {
            "probe": ("images", "texts", "run"),
            "compare": ("images", "texts", "run", "other"),
            "attend": ("images", "texts", "attend"),
            "intervene": ("images", "texts", "labelled", "run"),
            "figures": ("plans", "images", "runs", "run"),
            "report": ("images", "run", "attend"),
            "merge": ("images", "run", "unfinished"),
            "train": ("plans", "images", "run"),
            "train-clip": ("plans", "images"),
            "models": ("images",),
        }.items()
    },
}
"""name → what is spoilt and read. In bulk they take turns."""
